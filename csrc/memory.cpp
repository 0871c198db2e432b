#include "memory.hpp"

#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>

namespace ckptd {

namespace {

// From the kernel's headers, which may be older than the kernel.
constexpr int advice_populate_read = 22;
constexpr int advice_populate_write = 23;

}  // namespace

int populate(std::uintptr_t address, std::size_t size, bool write) {
    if (size == 0) return 0;
    const auto page = static_cast<std::uintptr_t>(sysconf(_SC_PAGESIZE));
    const std::uintptr_t first = address / page * page;
    const std::size_t length = address + size - first;
    const int advice = write ? advice_populate_write : advice_populate_read;
    while (madvise(reinterpret_cast<void*>(first), length, advice) != 0) {
        if (errno != EINTR) return errno;
    }
    return 0;
}

}  // namespace ckptd
