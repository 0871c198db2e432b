// CRC-32C (Castagnoli), the checksum that travels with every chunk. ISA-L computes it; this adds lengths beyond int,
// continuation and combination. All values are standard CRCs: crc32c("123456789") is 0xE3069283, of nothing 0.
#pragma once

#include <cstddef>
#include <cstdint>

namespace ckptd::crc32c {

// Takes the function from ISA-L. Throws std::runtime_error where there is none. Call before anything else.
void prepare();

// True once `prepare` has succeeded.
bool ready();

// The CRC of what `crc` stands for followed by `size` bytes at `data`.
std::uint32_t extend(std::uint32_t crc, const void* data, std::size_t size);

// The CRC of two byte strings one after the other, from their CRCs and the length of the second.
std::uint32_t combine(std::uint32_t first, std::uint32_t second, std::uint64_t second_bytes);

}  // namespace ckptd::crc32c
