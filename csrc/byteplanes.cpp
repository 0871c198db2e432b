#include "byteplanes.hpp"

#include <algorithm>

#include "planes.hpp"
#include "run.hpp"

namespace ckptd::byteplanes {

namespace {

constexpr std::size_t line_bytes = 64;
constexpr std::size_t piece_bytes = 4096;  // stays in the first-level cache beside what it is made of

Mover choose_mover() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool wide = __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512bw");
    if (wide && wide_mover != nullptr) return *wide_mover;
#endif
    return {split_piece<vector_bytes>, join_piece<vector_bytes>};
}

const Mover mover = choose_mover();

// Starts loading what the next piece needs while this one is worked on, which leaves the memory no pause.
template <bool write>
void prefetch(const std::byte* at, std::size_t size) {
    for (std::size_t line = 0; line < size; line += line_bytes) __builtin_prefetch(at + line, write);
}

template <bool write>
void prefetch_planes(const Places& at, const Planes& planes, std::size_t items) {
    for (std::size_t plane = 0; plane < planes.itemsize; ++plane) prefetch<write>(at[plane] + items, items);
}

// Calls work(first item, items, their places) for pieces that no cut between blocks goes through.
template <typename Work>
void for_pieces(const Planes& planes, const Work& work) {
    const std::size_t most = piece_bytes / planes.itemsize / line_bytes * line_bytes;
    const std::size_t blocks = planes.leading == 0 ? 0 : planes.blocks_bytes() / planes.leading;
    Places at{};
    for (std::size_t item = 0, count; item < planes.items; item += count) {
        count = std::min(most, planes.items - item);
        if (planes.leading > 0) {
            const std::size_t block = item / planes.block;
            count = std::min(count, (block + 1) * planes.block - item);
            for (std::size_t plane = 0; plane < planes.leading; ++plane) {
                at[plane] = planes.blocks + plane * blocks + item + (block + 1) * planes.gap;
            }
        }
        for (std::size_t plane = planes.leading; plane < planes.itemsize; ++plane) {
            at[plane] = planes.rest + (plane - planes.leading) * planes.items + item;
        }
        work(item, count, at);
    }
}

}  // namespace

std::uint32_t split(const std::byte* source, const Planes& planes) {
    alignas(line_bytes) std::byte kept[piece_bytes];
    std::uint32_t crc = 0;
    for_pieces(planes, [&](std::size_t item, std::size_t count, const Places& at) {
        const std::size_t size = count * planes.itemsize;
        const std::byte* from = source + item * planes.itemsize;
        if (item + 2 * count <= planes.items) {
            prefetch<false>(from + size, size);
            prefetch_planes<true>(at, planes, count);
        }
        copy_run(from, kept, size, &crc, Store::cached);
        mover.split(kept, at, count, planes.itemsize);
    });
    return crc;
}

std::uint32_t join(const Planes& planes, std::byte* target) {
    alignas(line_bytes) std::byte kept[piece_bytes];
    std::uint32_t crc = 0;
    for_pieces(planes, [&](std::size_t item, std::size_t count, const Places& at) {
        if (item + 2 * count <= planes.items) prefetch_planes<false>(at, planes, count);
        mover.join(at, kept, count, planes.itemsize);
        copy_run(kept, target + item * planes.itemsize, count * planes.itemsize, &crc, Store::streamed);
    });
    finish_streamed();
    return crc;
}

}  // namespace ckptd::byteplanes
