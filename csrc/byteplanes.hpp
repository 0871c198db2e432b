// Byte planes: the bytes of equal significance of many numbers put together, which zstd then packs far better.
// Plane p of the target holds byte p of every item in order. Source and target must not overlap.
#pragma once

#include <cstddef>

namespace ckptd::byteplanes {

void split(const std::byte* source, std::byte* target, std::size_t items, std::size_t itemsize);
void join(const std::byte* source, std::byte* target, std::size_t items, std::size_t itemsize);

}  // namespace ckptd::byteplanes
