// Requests to the kernel about mapped memory.
#pragma once

#include <cstddef>
#include <cstdint>

namespace ckptd {

// Maps all pages of [address, address + size) now, for writing or reading: touching fresh pages one by one is more
// than ten times slower. Returns 0 or an errno (EINVAL: the kernel is older than 5.14, or the address is wrong).
int populate(std::uintptr_t address, std::size_t size, bool write);

// Backs [offset, offset + size) of a memfd with pages of 2 MiB, as far as the kernel has them, whatever it is set to do
// by itself (MADV_COLLAPSE; Linux 6.1): the bytes stay as they are. Stops where it has no more, or has taken long
// to make `most_slow` of them; never an error, since nothing depends on it but speed. Returns how many bytes now lie in
// such pages.
std::size_t back_with_huge_pages(int descriptor, std::size_t offset, std::size_t size, int most_slow);

}  // namespace ckptd
