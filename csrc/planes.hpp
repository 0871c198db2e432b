// Takes few items apart into byte planes and puts them together, in vectors of as many bytes as the CPU of the file
// that includes this has.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "byteplanes.hpp"
#include "transpose.hpp"

namespace ckptd::byteplanes {

// Where some items' byte of each plane is.
using Places = std::array<std::byte*, max_itemsize>;

struct Mover {
    void (*split)(const std::byte* source, const Places& at, std::size_t items, std::size_t itemsize);
    void (*join)(const Places& at, std::byte* target, std::size_t items, std::size_t itemsize);
};

// For CPUs that pick any bytes out of two vectors of 64 bytes in one instruction (AVX-512 VBMI); null if there is none.
extern const Mover* const wide_mover;

namespace {

using Byte = std::uint8_t;

// Both return how many items they took, a multiple of the lanes; the rest is for the plain loop.
template <std::size_t planes, std::size_t bytes>
std::size_t split_vectors(const std::byte* source, const Places& at, std::size_t items) {
    const std::size_t end = items - items % bytes;
    for (std::size_t item = 0; item < end; item += bytes) {
        const auto block =
            split_block<Byte, planes, bytes>(load_block<Byte, planes, bytes>(source + item * planes, bytes));
        for (std::size_t plane = 0; plane < planes; ++plane) std::memcpy(at[plane] + item, &block[plane], bytes);
    }
    return end;
}

template <std::size_t planes, std::size_t bytes>
std::size_t join_vectors(const Places& at, std::byte* target, std::size_t items) {
    const std::size_t end = items - items % bytes;
    for (std::size_t item = 0; item < end; item += bytes) {
        Block<Byte, planes, bytes> block;
        for (std::size_t plane = 0; plane < planes; ++plane) std::memcpy(&block[plane], at[plane] + item, bytes);
        store_block<Byte, planes, bytes>(target + item * planes, bytes, join_block<Byte, planes, bytes>(block));
    }
    return end;
}

template <std::size_t bytes>
std::size_t split_most(const std::byte* source, const Places& at, std::size_t items, std::size_t itemsize) {
    switch (itemsize) {
        case 1:
            return split_vectors<1, bytes>(source, at, items);
        case 2:
            return split_vectors<2, bytes>(source, at, items);
        case 4:
            return split_vectors<4, bytes>(source, at, items);
        case 8:
            return split_vectors<8, bytes>(source, at, items);
        case 16:
            return split_vectors<16, bytes>(source, at, items);
        default:
            return 0;
    }
}

template <std::size_t bytes>
std::size_t join_most(const Places& at, std::byte* target, std::size_t items, std::size_t itemsize) {
    switch (itemsize) {
        case 1:
            return join_vectors<1, bytes>(at, target, items);
        case 2:
            return join_vectors<2, bytes>(at, target, items);
        case 4:
            return join_vectors<4, bytes>(at, target, items);
        case 8:
            return join_vectors<8, bytes>(at, target, items);
        case 16:
            return join_vectors<16, bytes>(at, target, items);
        default:
            return 0;
    }
}

template <std::size_t bytes>
void split_piece(const std::byte* source, const Places& at, std::size_t items, std::size_t itemsize) {
    for (std::size_t item = split_most<bytes>(source, at, items, itemsize); item < items; ++item) {
        for (std::size_t plane = 0; plane < itemsize; ++plane) at[plane][item] = source[item * itemsize + plane];
    }
}

template <std::size_t bytes>
void join_piece(const Places& at, std::byte* target, std::size_t items, std::size_t itemsize) {
    for (std::size_t item = join_most<bytes>(at, target, items, itemsize); item < items; ++item) {
        for (std::size_t plane = 0; plane < itemsize; ++plane) target[item * itemsize + plane] = at[plane][item];
    }
}

}  // namespace

}  // namespace ckptd::byteplanes
