// The functions of the CUDA driver that are used, under the names that libcuda exports, and who owns its handles.
//
// Declared here by hand after CUDA's documentation of its binary interface, which has been the same since CUDA 10.
#pragma once

#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "cuda.hpp"

namespace ckptd::cuda {

using Result = int;
using Context = void*;
using Handle = void*;  // of a stream or an event
using DevicePointer = unsigned long long;

constexpr Result success = 0;
constexpr Result not_ready = 600;
constexpr Result capture_implicit = 906;  // the default stream, while another that it waits for is being captured
constexpr int relaxed_capture = 2;
constexpr int memory_of_host = 1;
constexpr int memory_of_device = 2;

struct Memcpy2D {
    std::size_t source_x, source_y;
    int source_type;
    const void* source_host;
    DevicePointer source_device;
    void* source_array;
    std::size_t source_pitch;
    std::size_t target_x, target_y;
    int target_type;
    void* target_host;
    DevicePointer target_device;
    void* target_array;
    std::size_t target_pitch;
    std::size_t width, height;
};

// The library, never closed. Throws std::runtime_error if it is not there, lacks a function, or finds no device.
class Driver {
  public:
    explicit Driver(const std::string& library);

    // Throws std::runtime_error with the driver's own words unless `result` is success.
    void check(Result result, const char* function) const;
    std::string text(Result result, const char* function) const;

    // In a forked child the handles are the parent's, and nothing may be called.
    bool ours() const {
        return getpid() == process_;
    }

    Result (*cuDeviceGet)(int* device, int ordinal);
    Result (*cuDevicePrimaryCtxRetain)(Context* context, int device);
    Result (*cuDevicePrimaryCtxRelease)(int device);
    Result (*cuCtxPushCurrent)(Context context);
    Result (*cuCtxPopCurrent)(Context* context);
    Result (*cuCtxGetStreamPriorityRange)(int* least, int* greatest);
    Result (*cuThreadExchangeStreamCaptureMode)(int* mode);
    Result (*cuStreamCreateWithPriority)(Handle* stream, unsigned flags, int priority);
    Result (*cuStreamDestroy)(Handle stream);
    Result (*cuStreamQuery)(Handle stream);
    Result (*cuStreamWaitEvent)(Handle stream, Handle event, unsigned flags);
    Result (*cuStreamIsCapturing)(Handle stream, int* status);
    Result (*cuEventCreate)(Handle* event, unsigned flags);
    Result (*cuEventRecord)(Handle event, Handle stream);
    Result (*cuEventQuery)(Handle event);
    Result (*cuEventDestroy)(Handle event);
    Result (*cuMemGetAddressRange)(DevicePointer* base, std::size_t* size, DevicePointer address);
    Result (*cuMemHostRegister)(void* address, std::size_t size, unsigned flags);
    Result (*cuMemHostUnregister)(void* address);
    Result (*cuMemHostAlloc)(void** address, std::size_t size, unsigned flags);
    Result (*cuMemFreeHost)(void* address);
    Result (*cuMemcpyDtoHAsync)(void* target, DevicePointer source, std::size_t size, Handle stream);
    Result (*cuMemcpy2DAsync)(const Memcpy2D* copy, Handle stream);

  private:
    Result (*cuInit)(unsigned flags);
    Result (*cuGetErrorName)(Result result, const char** text);
    Result (*cuGetErrorString)(Result result, const char** text);
    pid_t process_;
};

// One device: its primary context, the stream of our copies, and staging.
class Device {
  public:
    Device(std::shared_ptr<Driver> driver, int ordinal);
    Device(const Device&) = delete;
    Device& operator=(const Device&) = delete;
    ~Device();

    // Staging of at least `size` bytes; none where that would be more than a device may have.
    Staging take(std::size_t size);
    void give_back(const Staging& staging);

    const std::shared_ptr<Driver> driver;
    Context context = nullptr;
    Handle stream = nullptr;

  private:
    int device_ = 0;
    std::mutex mutex_;
    std::size_t allocated_ = 0;
    std::vector<Staging> free_;
};

// Makes a device's context current, and what is called meanwhile no part of a graph that is being captured.
class Here {
  public:
    explicit Here(const Device& device);
    Here(const Here&) = delete;
    Here& operator=(const Here&) = delete;
    ~Here();

  private:
    const Driver& driver_;
    int mode_ = relaxed_capture;
};

class Event {
  public:
    explicit Event(const Device& device);
    Event(const Event&) = delete;
    Event& operator=(const Event&) = delete;
    ~Event();

    const Handle handle;

  private:
    const Driver& driver_;
};

}  // namespace ckptd::cuda
