// Square transposes of numbers in vectors of 16 bytes or more, written with the compiler's vectors so that every CPU
// has them. Everything is local to the file that includes it: files are compiled for different CPUs.
//
// 2^r vectors of elements are one row after another. A round separates the even from the odd elements; after r rounds
// elements whose positions agree modulo 2^r stand together, which is what both byte planes (elements are bytes, 2^r
// the itemsize) and transposed tiles (2^r the lanes of a vector) need.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

namespace ckptd {

namespace {

constexpr std::size_t vector_bytes = 16;

template <typename Element, std::size_t bytes = vector_bytes>
struct Vector {
    typedef Element Type __attribute__((vector_size(bytes)));
    static constexpr std::size_t lanes = bytes / sizeof(Element);
};

template <typename Element, std::size_t count, std::size_t bytes = vector_bytes>
using Block = std::array<typename Vector<Element, bytes>::Type, count>;

// Lane i of the result is lane scale * i + offset of the two vectors one after the other.
template <std::size_t scale, std::size_t offset, typename V, std::size_t... lane>
inline V pick(V first, V second, std::index_sequence<lane...>) {
    return __builtin_shufflevector(first, second, (scale * lane + offset)...);
}

// Lane i of the result is lane offset + i / 2 of the first vector (even i) or the second (odd i).
template <std::size_t offset, typename V, std::size_t... lane>
inline V weave(V first, V second, std::index_sequence<lane...>) {
    return __builtin_shufflevector(first, second, (offset + lane / 2 + lane % 2 * sizeof...(lane))...);
}

// The elements of `block` at positions p modulo `count`, for each p.
template <typename Element, std::size_t count, std::size_t bytes = vector_bytes>
inline Block<Element, count, bytes> split_block(const Block<Element, count, bytes>& block) {
    if constexpr (count == 1) {
        return block;
    } else {
        constexpr auto lanes = std::make_index_sequence<Vector<Element, bytes>::lanes>();
        Block<Element, count / 2, bytes> even, odd;
        for (std::size_t i = 0; i < count / 2; ++i) {
            even[i] = pick<2, 0>(block[2 * i], block[2 * i + 1], lanes);
            odd[i] = pick<2, 1>(block[2 * i], block[2 * i + 1], lanes);
        }
        even = split_block<Element, count / 2, bytes>(even);
        odd = split_block<Element, count / 2, bytes>(odd);
        Block<Element, count, bytes> result;
        for (std::size_t i = 0; i < count / 2; ++i) {
            result[2 * i] = even[i];
            result[2 * i + 1] = odd[i];
        }
        return result;
    }
}

// The inverse of `split_block`.
template <typename Element, std::size_t count, std::size_t bytes = vector_bytes>
inline Block<Element, count, bytes> join_block(const Block<Element, count, bytes>& block) {
    if constexpr (count == 1) {
        return block;
    } else {
        constexpr auto lanes = std::make_index_sequence<Vector<Element, bytes>::lanes>();
        Block<Element, count / 2, bytes> even, odd;
        for (std::size_t i = 0; i < count / 2; ++i) {
            even[i] = block[2 * i];
            odd[i] = block[2 * i + 1];
        }
        even = join_block<Element, count / 2, bytes>(even);
        odd = join_block<Element, count / 2, bytes>(odd);
        Block<Element, count, bytes> result;
        for (std::size_t i = 0; i < count / 2; ++i) {
            result[2 * i] = weave<0>(even[i], odd[i], lanes);
            result[2 * i + 1] = weave<Vector<Element, bytes>::lanes / 2>(even[i], odd[i], lanes);
        }
        return result;
    }
}

// `count` vectors, `stride` bytes apart.
template <typename Element, std::size_t count, std::size_t bytes = vector_bytes>
inline Block<Element, count, bytes> load_block(const std::byte* at, std::ptrdiff_t stride) {
    Block<Element, count, bytes> block;
    for (std::size_t i = 0; i < count; ++i) {
        std::memcpy(&block[i], at + static_cast<std::ptrdiff_t>(i) * stride, bytes);
    }
    return block;
}

template <typename Element, std::size_t count, std::size_t bytes = vector_bytes>
inline void store_block(std::byte* at, std::ptrdiff_t stride, const Block<Element, count, bytes>& block) {
    for (std::size_t i = 0; i < count; ++i) {
        std::memcpy(at + static_cast<std::ptrdiff_t>(i) * stride, &block[i], bytes);
    }
}

}  // namespace

}  // namespace ckptd
