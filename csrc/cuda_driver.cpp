#include "cuda_driver.hpp"

#include <dlfcn.h>

#include <algorithm>
#include <stdexcept>

namespace ckptd::cuda {

namespace {

constexpr unsigned portable = 1;
constexpr unsigned stream_non_blocking = 1;  // the default stream does not wait for it, nor it for that one
constexpr unsigned event_without_timing = 2;
constexpr std::size_t least_staging_bytes = 1024 * 1024;
constexpr std::size_t most_staging_bytes = 64 * 1024 * 1024;  // of a device, all together

template <typename Function>
void find(void* library, const char* name, Function& function) {
    void* address = dlsym(library, name);
    if (address == nullptr) throw std::runtime_error(std::string("the CUDA driver has no function ") + name);
    function = reinterpret_cast<Function>(address);
}

Handle make_event(const Driver& driver) {
    Handle event = nullptr;
    driver.check(driver.cuEventCreate(&event, event_without_timing), "cuEventCreate");
    return event;
}

}  // namespace

Driver::Driver(const std::string& library) : process_(getpid()) {
    void* handle = dlopen(library.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (handle == nullptr) throw std::runtime_error(dlerror());
    find(handle, "cuInit", cuInit);
    find(handle, "cuGetErrorName", cuGetErrorName);
    find(handle, "cuGetErrorString", cuGetErrorString);
    find(handle, "cuDeviceGet", cuDeviceGet);
    find(handle, "cuDevicePrimaryCtxRetain", cuDevicePrimaryCtxRetain);
    find(handle, "cuDevicePrimaryCtxRelease_v2", cuDevicePrimaryCtxRelease);
    find(handle, "cuCtxPushCurrent_v2", cuCtxPushCurrent);
    find(handle, "cuCtxPopCurrent_v2", cuCtxPopCurrent);
    find(handle, "cuCtxGetStreamPriorityRange", cuCtxGetStreamPriorityRange);
    find(handle, "cuThreadExchangeStreamCaptureMode", cuThreadExchangeStreamCaptureMode);
    find(handle, "cuStreamCreateWithPriority", cuStreamCreateWithPriority);
    find(handle, "cuStreamDestroy_v2", cuStreamDestroy);
    find(handle, "cuStreamQuery", cuStreamQuery);
    find(handle, "cuStreamWaitEvent", cuStreamWaitEvent);
    find(handle, "cuStreamIsCapturing", cuStreamIsCapturing);
    find(handle, "cuEventCreate", cuEventCreate);
    find(handle, "cuEventRecord", cuEventRecord);
    find(handle, "cuEventQuery", cuEventQuery);
    find(handle, "cuEventDestroy_v2", cuEventDestroy);
    find(handle, "cuMemGetAddressRange_v2", cuMemGetAddressRange);
    find(handle, "cuMemHostRegister_v2", cuMemHostRegister);
    find(handle, "cuMemHostUnregister", cuMemHostUnregister);
    find(handle, "cuMemHostAlloc", cuMemHostAlloc);
    find(handle, "cuMemFreeHost", cuMemFreeHost);
    find(handle, "cuMemcpyDtoHAsync_v2", cuMemcpyDtoHAsync);
    find(handle, "cuMemcpy2DAsync_v2", cuMemcpy2DAsync);
    check(cuInit(0), "cuInit");
}

std::string Driver::text(Result result, const char* function) const {
    const char* name = nullptr;
    const char* meaning = nullptr;
    if (cuGetErrorName(result, &name) != success || name == nullptr) name = "an error without a name";
    if (cuGetErrorString(result, &meaning) != success || meaning == nullptr) meaning = "no description";
    return std::string(function) + ": " + name + " (" + std::to_string(result) + "): " + meaning;
}

void Driver::check(Result result, const char* function) const {
    if (result != success) throw std::runtime_error(text(result, function));
}

Device::Device(std::shared_ptr<Driver> with, int ordinal) : driver(std::move(with)) {
    driver->check(driver->cuDeviceGet(&device_, ordinal), "cuDeviceGet");
    driver->check(driver->cuDevicePrimaryCtxRetain(&context, device_), "cuDevicePrimaryCtxRetain");
    try {
        const Here here(*this);
        int least = 0;
        int greatest = 0;
        driver->check(driver->cuCtxGetStreamPriorityRange(&least, &greatest), "cuCtxGetStreamPriorityRange");
        driver->check(driver->cuStreamCreateWithPriority(&stream, stream_non_blocking, least),
                      "cuStreamCreateWithPriority");
    } catch (const std::runtime_error&) {
        driver->cuDevicePrimaryCtxRelease(device_);
        throw;
    }
}

Device::~Device() {
    if (!driver->ours()) return;
    Context popped = nullptr;
    const bool here = driver->cuCtxPushCurrent(context) == success;  // where not, all is tried nevertheless
    for (const Staging& staging : free_) driver->cuMemFreeHost(staging.memory);
    driver->cuStreamDestroy(stream);
    if (here) driver->cuCtxPopCurrent(&popped);
    driver->cuDevicePrimaryCtxRelease(device_);
}

Staging Device::take(std::size_t size) {
    const std::lock_guard<std::mutex> locked(mutex_);
    const auto found =
        std::find_if(free_.begin(), free_.end(), [&](const Staging& staging) { return staging.size >= size; });
    if (found != free_.end()) {
        const Staging staging = *found;
        free_.erase(found);
        return staging;
    }
    std::size_t rounded = least_staging_bytes;
    while (rounded < size) rounded *= 2;
    void* memory = nullptr;
    if (allocated_ + rounded > most_staging_bytes || driver->cuMemHostAlloc(&memory, rounded, portable) != success) {
        return {};
    }
    allocated_ += rounded;
    return {static_cast<std::byte*>(memory), rounded};
}

void Device::give_back(const Staging& staging) {
    const std::lock_guard<std::mutex> locked(mutex_);
    free_.push_back(staging);
}

Here::Here(const Device& device) : driver_(*device.driver) {
    driver_.check(driver_.cuCtxPushCurrent(device.context), "cuCtxPushCurrent");
    if (const Result result = driver_.cuThreadExchangeStreamCaptureMode(&mode_); result != success) {
        Context popped = nullptr;
        driver_.cuCtxPopCurrent(&popped);
        driver_.check(result, "cuThreadExchangeStreamCaptureMode");
    }
}

Here::~Here() {
    Context popped = nullptr;
    driver_.cuThreadExchangeStreamCaptureMode(&mode_);
    driver_.cuCtxPopCurrent(&popped);
}

Event::Event(const Device& device) : handle(make_event(*device.driver)), driver_(*device.driver) {}

Event::~Event() {
    if (driver_.ours()) driver_.cuEventDestroy(handle);
}

}  // namespace ckptd::cuda
