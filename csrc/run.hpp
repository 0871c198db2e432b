// Copies one contiguous run of bytes and takes its checksum on the way: the inner loop of every capture and load.
//
// In blocks of 1 KiB the checksum pulls the source into the first-level cache and the copy takes it from there, so
// that memory is read once; long runs are written past the caches, so that it is not read for the target either.
#pragma once

#include <cstddef>
#include <cstdint>

namespace ckptd {

// Where the target's bytes go: cached, for what may be read again soon; streamed past the caches, for long copies.
enum class Store { cached, streamed };

// Copies `size` bytes; `target` null: only the checksum; `crc` null: only the copy. `*crc` is continued.
// The checksum is of what was copied, even if the source changes meanwhile.
void copy_run(const std::byte* source, std::byte* target, std::size_t size, std::uint32_t* crc, Store store);

// Streamed stores are weakly ordered: call before anybody is told that the copy is done.
void finish_streamed();

}  // namespace ckptd
