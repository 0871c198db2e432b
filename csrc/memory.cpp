#include "memory.hpp"

#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>

namespace ckptd {

namespace {

// From the kernel's headers, which may be older than the kernel.
constexpr int advice_populate_read = 22;
constexpr int advice_populate_write = 23;
constexpr int advice_collapse = 25;

constexpr std::size_t huge_page = std::size_t{2} << 20;

// Where memory is in pieces the kernel may take longer than this to put a huge page together.
constexpr std::chrono::milliseconds slow_page{2};

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

namespace {

// One huge page at an aligned address of a mapped memfd.
bool collapse(char* address) {
    // Its first small page has to be there; the others need not, which spares clearing and copying them.
    if (populate(reinterpret_cast<std::uintptr_t>(address), 1, true) != 0) return false;
    for (int tries = 0; tries < 3; ++tries) {
        if (madvise(address, huge_page, advice_collapse) == 0) return true;
        if (errno != EAGAIN && errno != EINTR) break;
    }
    return false;
}

}  // namespace

std::size_t back_with_huge_pages(int descriptor, std::size_t offset, std::size_t size, int most_slow) {
    const std::size_t first = (offset + huge_page - 1) / huge_page * huge_page;
    const std::size_t end = (offset + size) / huge_page * huge_page;
    if (first >= end) return 0;
    // Room for the range at an address that is aligned as its offset is: only such a mapping can be collapsed.
    const std::size_t reserved = end - first + huge_page;
    void* const room = mmap(nullptr, reserved, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (room == MAP_FAILED) return 0;
    const std::size_t past = reinterpret_cast<std::uintptr_t>(room) % huge_page;
    char* const aligned = static_cast<char*>(room) + (huge_page - past) % huge_page;
    std::size_t backed = 0;
    if (mmap(aligned, end - first, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, descriptor,
             static_cast<off_t>(first)) != MAP_FAILED) {
        for (int slow = 0; backed < end - first && slow < most_slow;) {
            const auto began = std::chrono::steady_clock::now();
            if (!collapse(aligned + backed)) break;
            backed += huge_page;
            if (std::chrono::steady_clock::now() - began > slow_page) ++slow;
        }
    }
    munmap(room, reserved);
    return backed;
}

}  // namespace ckptd
