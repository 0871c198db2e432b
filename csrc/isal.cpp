#include "isal.hpp"

#include <dlfcn.h>

#include <atomic>
#include <stdexcept>

namespace ckptd::isal {

namespace {

std::atomic<void*> library{nullptr};

}  // namespace

void load(const std::string& path) {
    if (library.load() != nullptr) return;
    // Local: symbols of a libisal that another extension brought must stay apart from ours.
    void* handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (handle == nullptr) throw std::runtime_error(dlerror());
    library.store(handle);
}

void* function(const char* name) {
    void* handle = library.load();
    if (handle == nullptr) throw std::runtime_error("ISA-L is not loaded; call load_isal first");
    void* address = dlsym(handle, name);
    if (address == nullptr) throw std::runtime_error(std::string("ISA-L has no function ") + name);
    return address;
}

}  // namespace ckptd::isal
