#include "byteplanes.hpp"

#include <cstdint>

#include "transpose.hpp"

namespace ckptd::byteplanes {

namespace {

using Byte = std::uint8_t;
constexpr std::size_t lanes = Vector<Byte>::lanes;

// Both return how many items they took, a multiple of 16; the rest is for the plain loop.
template <std::size_t planes>
std::size_t split_vectors(const std::byte* source, std::byte* target, std::size_t items) {
    const std::size_t end = items - items % lanes;
    for (std::size_t item = 0; item < end; item += lanes) {
        const auto block = load_block<Byte, planes>(source + item * planes, vector_bytes);
        store_block<Byte, planes>(target + item, static_cast<std::ptrdiff_t>(items), split_block<Byte, planes>(block));
    }
    return end;
}

template <std::size_t planes>
std::size_t join_vectors(const std::byte* source, std::byte* target, std::size_t items) {
    const std::size_t end = items - items % lanes;
    for (std::size_t item = 0; item < end; item += lanes) {
        const auto block = load_block<Byte, planes>(source + item, static_cast<std::ptrdiff_t>(items));
        store_block<Byte, planes>(target + item * planes, vector_bytes, join_block<Byte, planes>(block));
    }
    return end;
}

std::size_t split_most(const std::byte* source, std::byte* target, std::size_t items, std::size_t itemsize) {
    switch (itemsize) {
        case 1:
            return split_vectors<1>(source, target, items);
        case 2:
            return split_vectors<2>(source, target, items);
        case 4:
            return split_vectors<4>(source, target, items);
        case 8:
            return split_vectors<8>(source, target, items);
        case 16:
            return split_vectors<16>(source, target, items);
        default:
            return 0;
    }
}

std::size_t join_most(const std::byte* source, std::byte* target, std::size_t items, std::size_t itemsize) {
    switch (itemsize) {
        case 1:
            return join_vectors<1>(source, target, items);
        case 2:
            return join_vectors<2>(source, target, items);
        case 4:
            return join_vectors<4>(source, target, items);
        case 8:
            return join_vectors<8>(source, target, items);
        case 16:
            return join_vectors<16>(source, target, items);
        default:
            return 0;
    }
}

}  // namespace

void split(const std::byte* source, std::byte* target, std::size_t items, std::size_t itemsize) {
    for (std::size_t item = split_most(source, target, items, itemsize); item < items; ++item) {
        for (std::size_t plane = 0; plane < itemsize; ++plane) {
            target[plane * items + item] = source[item * itemsize + plane];
        }
    }
}

void join(const std::byte* source, std::byte* target, std::size_t items, std::size_t itemsize) {
    for (std::size_t item = join_most(source, target, items, itemsize); item < items; ++item) {
        for (std::size_t plane = 0; plane < itemsize; ++plane) {
            target[item * itemsize + plane] = source[plane * items + item];
        }
    }
}

}  // namespace ckptd::byteplanes
