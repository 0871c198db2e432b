// Copies from CUDA devices into main memory, by the driver's API, which is loaded at run time: nothing of CUDA is
// needed to build, and one build serves every CUDA.
//
// Owns, per device, a stream of its own and pinned staging for small pieces; the primary context, which PyTorch uses
// too, is retained for as long. Does not own what is copied or where to: the caller keeps both until a copy is
// finished. No function waits for a device, `Copy::finished` excepted, and that no longer than it is told to. All
// functions may be called by any thread, also while a CUDA graph is being captured: they neither join a capture nor
// break it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "box.hpp"
#include "copy.hpp"

namespace ckptd::cuda {

class Driver;
class Device;
class Event;

using Stream = std::uint64_t;  // a CUstream; 0 is the default stream of the device

// A part of the staging of a device.
struct Staging {
    std::byte* memory = nullptr;
    std::size_t size = 0;
};

// One batch of copies, queued on the stream of its device.
class Copy {
  public:
    explicit Copy(std::shared_ptr<Device> device);
    Copy(const Copy&) = delete;
    Copy& operator=(const Copy&) = delete;
    ~Copy();

    // What is queued on `stream` from now on waits for this batch. False: `stream` is being captured into a graph, so
    // nothing runs on it now, and nothing is done. Throws std::runtime_error.
    bool hold(Stream stream);

    // Whether the device has done it all, or, where `error` says something, will do no more of it; waits for that at
    // most so many seconds.
    bool finished(double seconds);

    // Once finished, and without an error: puts the bytes that came in another order, or together with others, into
    // their places. Only now the targets hold the boxes.
    void settle();

    // Empty, or why the targets do not get what they should.
    const std::string& error() const {
        return error_;
    }

  private:
    friend class Engine;
    friend class Issue;

    // Bytes that came to staging, among others.
    struct Gathered {
        std::size_t offset;
        std::byte* target;
        std::size_t size;
    };
    // A box that came in the order of its memory: `dimensions` of it, in logical order.
    struct Permuted {
        std::byte* target;
        std::size_t size;
        std::int64_t itemsize;
        std::vector<Dimension> dimensions;
    };

    std::shared_ptr<Device> device_;
    std::unique_ptr<Event> done_;
    Staging staging_;
    std::vector<Gathered> gathered_;
    std::vector<Permuted> permuted_;
    bool finished_ = false;
    std::string error_;
};

// All devices of the process.
class Engine {
  public:
    // Opens the driver's library (a file, or a name for the dynamic linker). Throws std::runtime_error.
    explicit Engine(const std::string& library);

    // Page-locks memory, for all devices, so that they copy into it directly. Throws std::runtime_error where the
    // system does not allow it; copies into it are right all the same, and slow.
    void pin(int device, std::uint64_t address, std::size_t size);
    void unpin(int device, std::uint64_t address);

    // Queues copies of boxes from memory of `device` to packed targets, after all that is queued on the streams `after`
    // by now. `jobs`: passed the check; the strides of targets are not looked at. Throws std::runtime_error where
    // nothing is queued: the driver does not work, or one of the streams is being captured into a graph.
    std::shared_ptr<Copy> copy(int device, const std::vector<Stream>& after, const CopyJobs& jobs);

    // Lets go of streams, staging and contexts once the last copy has gone. The engine may be used again.
    void close();

  private:
    std::shared_ptr<Device> device(int ordinal);

    std::shared_ptr<Driver> driver_;
    std::mutex mutex_;
    std::map<int, std::shared_ptr<Device>> devices_;
};

}  // namespace ckptd::cuda
