#include "byteplanes.hpp"

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>

namespace ckptd::byteplanes {

namespace {

constexpr std::size_t lanes = 16;
typedef std::uint8_t Vector __attribute__((vector_size(lanes)));

// `planes` vectors: 16 items of `planes` bytes, or the 16-byte pieces of their planes.
template <std::size_t planes>
using Block = std::array<Vector, planes>;

inline Vector even_bytes(Vector low, Vector high) {
    return __builtin_shufflevector(low, high, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
}

inline Vector odd_bytes(Vector low, Vector high) {
    return __builtin_shufflevector(low, high, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
}

inline Vector interleave_low(Vector even, Vector odd) {
    return __builtin_shufflevector(even, odd, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
}

inline Vector interleave_high(Vector even, Vector odd) {
    return __builtin_shufflevector(even, odd, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
}

// Separates even from odd bytes, then each half again: after log2(planes) rounds every plane stands alone.
template <std::size_t planes>
inline Block<planes> split_block(const Block<planes>& items) {
    if constexpr (planes == 1) {
        return items;
    } else {
        Block<planes / 2> even, odd;
        for (std::size_t i = 0; i < planes / 2; ++i) {
            even[i] = even_bytes(items[2 * i], items[2 * i + 1]);
            odd[i] = odd_bytes(items[2 * i], items[2 * i + 1]);
        }
        even = split_block<planes / 2>(even);
        odd = split_block<planes / 2>(odd);
        Block<planes> result;
        for (std::size_t i = 0; i < planes / 2; ++i) {
            result[2 * i] = even[i];
            result[2 * i + 1] = odd[i];
        }
        return result;
    }
}

template <std::size_t planes>
inline Block<planes> join_block(const Block<planes>& pieces) {
    if constexpr (planes == 1) {
        return pieces;
    } else {
        Block<planes / 2> even, odd;
        for (std::size_t i = 0; i < planes / 2; ++i) {
            even[i] = pieces[2 * i];
            odd[i] = pieces[2 * i + 1];
        }
        even = join_block<planes / 2>(even);
        odd = join_block<planes / 2>(odd);
        Block<planes> result;
        for (std::size_t i = 0; i < planes / 2; ++i) {
            result[2 * i] = interleave_low(even[i], odd[i]);
            result[2 * i + 1] = interleave_high(even[i], odd[i]);
        }
        return result;
    }
}

inline Vector load(const std::byte* at) {
    Vector vector;
    std::memcpy(&vector, at, lanes);
    return vector;
}

inline void store(std::byte* at, Vector vector) {
    std::memcpy(at, &vector, lanes);
}

// How many items the vectors took; the rest is for the plain loop.
template <std::size_t planes>
std::size_t split_vectors(const std::byte* source, std::byte* target, std::size_t items) {
    const std::size_t end = items - items % lanes;
    for (std::size_t item = 0; item < end; item += lanes) {
        Block<planes> block;
        for (std::size_t i = 0; i < planes; ++i) block[i] = load(source + item * planes + i * lanes);
        block = split_block<planes>(block);
        for (std::size_t i = 0; i < planes; ++i) store(target + i * items + item, block[i]);
    }
    return end;
}

template <std::size_t planes>
std::size_t join_vectors(const std::byte* source, std::byte* target, std::size_t items) {
    const std::size_t end = items - items % lanes;
    for (std::size_t item = 0; item < end; item += lanes) {
        Block<planes> block;
        for (std::size_t i = 0; i < planes; ++i) block[i] = load(source + i * items + item);
        block = join_block<planes>(block);
        for (std::size_t i = 0; i < planes; ++i) store(target + item * planes + i * lanes, block[i]);
    }
    return end;
}

}  // namespace

void split(const std::byte* source, std::byte* target, std::size_t items, std::size_t itemsize) {
    std::size_t done = 0;
    if (itemsize == 1) done = split_vectors<1>(source, target, items);
    if (itemsize == 2) done = split_vectors<2>(source, target, items);
    if (itemsize == 4) done = split_vectors<4>(source, target, items);
    if (itemsize == 8) done = split_vectors<8>(source, target, items);
    if (itemsize == 16) done = split_vectors<16>(source, target, items);
    for (std::size_t item = done; item < items; ++item) {
        for (std::size_t plane = 0; plane < itemsize; ++plane) {
            target[plane * items + item] = source[item * itemsize + plane];
        }
    }
}

void join(const std::byte* source, std::byte* target, std::size_t items, std::size_t itemsize) {
    std::size_t done = 0;
    if (itemsize == 1) done = join_vectors<1>(source, target, items);
    if (itemsize == 2) done = join_vectors<2>(source, target, items);
    if (itemsize == 4) done = join_vectors<4>(source, target, items);
    if (itemsize == 8) done = join_vectors<8>(source, target, items);
    if (itemsize == 16) done = join_vectors<16>(source, target, items);
    for (std::size_t item = done; item < items; ++item) {
        for (std::size_t plane = 0; plane < itemsize; ++plane) {
            target[item * itemsize + plane] = source[plane * items + item];
        }
    }
}

}  // namespace ckptd::byteplanes
