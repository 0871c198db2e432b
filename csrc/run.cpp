#include "run.hpp"

#include <algorithm>
#include <cstring>

#include "crc32c.hpp"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace ckptd {

namespace {

constexpr std::size_t block_bytes = 1024;
constexpr std::size_t line_bytes = 64;

// Copies whole lines to a target aligned to a line, past the caches, and to `kept`, as aligned, which stays in them.
using StreamLines = void (*)(const std::byte* source, std::byte* target, std::byte* kept, std::size_t size);

#if defined(__x86_64__)

__attribute__((target("avx512f"))) void stream_avx512(const std::byte* source, std::byte* target, std::byte* kept,
                                                      std::size_t size) {
    for (std::size_t at = 0; at < size; at += line_bytes) {
        const __m512i line = _mm512_loadu_si512(source + at);
        _mm512_store_si512(kept + at, line);
        _mm512_stream_si512(reinterpret_cast<__m512i*>(target + at), line);
    }
}

__attribute__((target("avx"))) void stream_avx(const std::byte* source, std::byte* target, std::byte* kept,
                                               std::size_t size) {
    for (std::size_t at = 0; at < size; at += sizeof(__m256i)) {
        const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source + at));
        _mm256_store_si256(reinterpret_cast<__m256i*>(kept + at), half);
        _mm256_stream_si256(reinterpret_cast<__m256i*>(target + at), half);
    }
}

void stream_sse2(const std::byte* source, std::byte* target, std::byte* kept, std::size_t size) {
    for (std::size_t at = 0; at < size; at += sizeof(__m128i)) {
        const __m128i word = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source + at));
        _mm_store_si128(reinterpret_cast<__m128i*>(kept + at), word);
        _mm_stream_si128(reinterpret_cast<__m128i*>(target + at), word);
    }
}

StreamLines choose_stream() {
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f")) return stream_avx512;
    if (__builtin_cpu_supports("avx")) return stream_avx;
    return stream_sse2;
}

#else

void stream_plain(const std::byte* source, std::byte* target, std::byte* kept, std::size_t size) {
    std::memcpy(kept, source, size);
    std::memcpy(target, kept, size);
}

StreamLines choose_stream() {
    return stream_plain;
}

#endif

const StreamLines stream_lines = choose_stream();

// The checksum is of what was copied, even where the source changes meanwhile.
void copy_block(const std::byte* source, std::byte* target, std::size_t size, std::uint32_t* crc) {
    std::memcpy(target, source, size);
    if (crc != nullptr) *crc = crc32c::extend(*crc, target, size);
}

// Starts loading a block while the one before it is worked on, which leaves the memory no pause.
void prefetch_block(const std::byte* at) {
    for (std::size_t line = 0; line < block_bytes; line += line_bytes) __builtin_prefetch(at + line);
}

void copy_streamed(const std::byte* source, std::byte* target, std::size_t size, std::uint32_t* crc) {
    const std::size_t head = -reinterpret_cast<std::uintptr_t>(target) % line_bytes;
    copy_block(source, target, head, crc);
    const std::size_t end = size - (size - head) % line_bytes;
    alignas(line_bytes) std::byte block[block_bytes];
    for (std::size_t at = head; at < end;) {
        const std::size_t length = std::min(block_bytes, end - at);
        if (end - at >= 2 * block_bytes) prefetch_block(source + at + block_bytes);
        stream_lines(source + at, target + at, block, length);
        if (crc != nullptr) *crc = crc32c::extend(*crc, block, length);
        at += length;
    }
    copy_block(source + end, target + end, size - end, crc);
}

}  // namespace

void copy_run(const std::byte* source, std::byte* target, std::size_t size, std::uint32_t* crc, Store store) {
    if (target == nullptr) {
        if (crc != nullptr) *crc = crc32c::extend(*crc, source, size);
    } else if (store == Store::streamed && size >= line_bytes) {
        copy_streamed(source, target, size, crc);
    } else if (crc == nullptr) {
        std::memcpy(target, source, size);
    } else {
        for (std::size_t at = 0; at < size; at += block_bytes) {
            copy_block(source + at, target + at, std::min(block_bytes, size - at), crc);
        }
    }
}

void finish_streamed() {
#if defined(__x86_64__)
    _mm_sfence();
#endif
}

}  // namespace ckptd
