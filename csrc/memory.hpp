// Requests to the kernel about mapped memory.
#pragma once

#include <cstddef>
#include <cstdint>

namespace ckptd {

// Maps all pages of [address, address + size) now, for writing or reading: touching fresh pages one by one is more
// than ten times slower. Returns 0 or an errno (EINVAL: the kernel is older than 5.14, or the address is wrong).
int populate(std::uintptr_t address, std::size_t size, bool write);

}  // namespace ckptd
