// Takes few items apart into byte planes and puts them together, in vectors of as many bytes as the CPU of the file
// that includes this has.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

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

// Calls work(planes) with a constant where there are vectors for so many; how many items it took.
template <typename Work>
std::size_t with_vectors(std::size_t itemsize, const Work& work) {
    switch (itemsize) {
        case 1:
            return work(std::integral_constant<std::size_t, 1>());
        case 2:
            return work(std::integral_constant<std::size_t, 2>());
        case 4:
            return work(std::integral_constant<std::size_t, 4>());
        case 8:
            return work(std::integral_constant<std::size_t, 8>());
        case 16:
            return work(std::integral_constant<std::size_t, 16>());
        default:
            return 0;
    }
}

template <std::size_t bytes>
void split_piece(const std::byte* source, const Places& at, std::size_t items, std::size_t itemsize) {
    const std::size_t taken = with_vectors(
        itemsize, [&](auto planes) { return split_vectors<decltype(planes)::value, bytes>(source, at, items); });
    for (std::size_t item = taken; item < items; ++item) {
        for (std::size_t plane = 0; plane < itemsize; ++plane) at[plane][item] = source[item * itemsize + plane];
    }
}

template <std::size_t bytes>
void join_piece(const Places& at, std::byte* target, std::size_t items, std::size_t itemsize) {
    const std::size_t taken = with_vectors(
        itemsize, [&](auto planes) { return join_vectors<decltype(planes)::value, bytes>(at, target, items); });
    for (std::size_t item = taken; item < items; ++item) {
        for (std::size_t plane = 0; plane < itemsize; ++plane) target[item * itemsize + plane] = at[plane][item];
    }
}

}  // namespace

}  // namespace ckptd::byteplanes
