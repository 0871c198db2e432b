// Byte planes: the bytes of equal significance of many numbers put together, which zstd then packs far better.
// Plane p holds byte p of every item in order.
#pragma once

#include <cstddef>
#include <cstdint>

namespace ckptd::byteplanes {

constexpr std::size_t max_itemsize = 64;

// Where the planes of `items` items of `itemsize` bytes (1 to 64) lie. The first `leading` are in `blocks`, one after
// the other, each cut into blocks of `block` bytes with `gap` bytes before each one that belong to somebody else; the
// others are in `rest`, one after the other.
struct Planes {
    std::byte* rest;
    std::byte* blocks;
    std::size_t items;
    std::size_t itemsize;
    std::size_t leading = 0;
    std::size_t block = 0;
    std::size_t gap = 0;

    std::size_t rest_bytes() const {
        return (itemsize - leading) * items;
    }
    std::size_t blocks_bytes() const {
        return leading == 0 ? 0 : leading * (items + (items + block - 1) / block * gap);
    }
};

// Both return the CRC-32C of the items' bytes: of those that were taken apart, even if the source changes meanwhile, or
// put together. Nothing may overlap.
std::uint32_t split(const std::byte* source, const Planes& planes);
std::uint32_t join(const Planes& planes, std::byte* target);

}  // namespace ckptd::byteplanes
