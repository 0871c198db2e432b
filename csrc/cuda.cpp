#include "cuda.hpp"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <stdexcept>
#include <thread>
#include <utility>

#include "cuda_driver.hpp"

namespace ckptd::cuda {

namespace {

constexpr unsigned portable = 1;
constexpr std::size_t small_bytes = 4096;          // what is not bigger is gathered with its neighbours
constexpr std::size_t widest_gap_bytes = 2048;     // between neighbours; the caching allocator leaves up to 511
constexpr std::int64_t widest_pitch = 0x7fffffff;  // of every device
constexpr auto poll_pause = std::chrono::microseconds(100);

Handle handle_of(Stream stream) {
    return reinterpret_cast<Handle>(stream);
}

DevicePointer address_of(const std::byte* source) {
    return reinterpret_cast<DevicePointer>(source);
}

// Whether work that is queued on `stream` now becomes part of a graph rather than being done.
bool is_capturing(const Driver& driver, Stream stream) {
    int status = 0;
    const Result result = driver.cuStreamIsCapturing(handle_of(stream), &status);
    if (result == capture_implicit) return true;
    driver.check(result, "cuStreamIsCapturing");
    return status != 0;
}

}  // namespace

// Turns jobs into as few calls of the driver as can be.
class Issue {
  public:
    Issue(const Device& device, Copy& copy) : device_(device), driver_(*device.driver), copy_(copy) {}

    void run(const CopyJobs& jobs) {
        for (std::size_t job = 0; job < jobs.count; ++job) add(jobs, job);
        flush();
        gather();
    }

  private:
    struct Run {
        const std::byte* source;
        std::byte* target;
        std::size_t size;
    };

    // The box of a job is copied in the order of the source's memory, which makes its runs as long as they can be;
    // where that is not the logical order, or elements are repeated (stride 0), `settle` does the rest.
    void add(const CopyJobs& jobs, std::size_t job) {
        const std::int64_t* sizes = jobs.sizes + job * jobs.dimensions;
        const std::int64_t* strides = jobs.source_strides + job * jobs.dimensions;
        const std::int64_t itemsize = jobs.itemsize[job];
        order_.clear();
        bool repeated = false;
        for (std::size_t i = 0; i < jobs.dimensions; ++i) {
            if (sizes[i] == 0) return;
            if (sizes[i] == 1) continue;
            if (strides[i] == 0) {
                repeated = true;
            } else {
                order_.push_back(i);
            }
        }
        const auto outer = [&](std::size_t a, std::size_t b) { return strides[a] > strides[b]; };
        const bool ordered = std::is_sorted(order_.begin(), order_.end(), outer);
        if (!ordered) std::stable_sort(order_.begin(), order_.end(), outer);
        packed_.assign(jobs.dimensions, 0);
        std::int64_t bytes = itemsize;
        for (std::size_t i = order_.size(); i-- > 0;) {
            packed_[order_[i]] = bytes;
            bytes *= sizes[order_[i]];
        }
        auto* target = reinterpret_cast<std::byte*>(jobs.target[job]);
        Box box(reinterpret_cast<const std::byte*>(jobs.source[job]), target, itemsize);
        for (const std::size_t i : order_) box.append({sizes[i], strides[i], packed_[i]});
        box.finish();
        const bool direct = ordered && !repeated;
        if (direct && box.count == 0 && static_cast<std::size_t>(bytes) <= small_bytes) {
            small_.push_back({box.source, target, static_cast<std::size_t>(bytes)});
        } else {
            move(box);
        }
        if (!direct) permute(jobs, job, target, static_cast<std::size_t>(bytes));
    }

    void permute(const CopyJobs& jobs, std::size_t job, std::byte* target, std::size_t bytes) {
        const std::int64_t* sizes = jobs.sizes + job * jobs.dimensions;
        Copy::Permuted permuted{target, bytes, jobs.itemsize[job], {}};
        std::int64_t stride = jobs.itemsize[job];
        for (std::size_t i = jobs.dimensions; i-- > 0;) {
            permuted.dimensions.push_back({sizes[i], packed_[i], stride});
            stride *= sizes[i];
        }
        std::reverse(permuted.dimensions.begin(), permuted.dimensions.end());
        copy_.permuted_.push_back(std::move(permuted));
    }

    void move(const Box& box) {
        if (box.count == 0) {
            linear(box.source, box.target, static_cast<std::size_t>(box.run));
        } else if (box.count == 1 && planar(box)) {
            return;
        } else {
            for (std::int64_t i = 0; i < box.dimensions[0].size; ++i) move(box.row(i));
        }
    }

    bool planar(const Box& box) {
        const Dimension& rows = box.dimensions[0];
        if (rows.source_stride < box.run || rows.source_stride > widest_pitch) return false;
        Memcpy2D copy{};
        copy.source_type = memory_of_device;
        copy.source_device = address_of(box.source);
        copy.source_pitch = static_cast<std::size_t>(rows.source_stride);
        copy.target_type = memory_of_host;
        copy.target_host = box.target;
        copy.target_pitch = static_cast<std::size_t>(rows.target_stride);
        copy.width = static_cast<std::size_t>(box.run);
        copy.height = static_cast<std::size_t>(rows.size);
        driver_.check(driver_.cuMemcpy2DAsync(&copy, device_.stream), "cuMemcpy2DAsync");
        return true;
    }

    // Queues a run, together with the one before if they touch on both sides.
    void linear(const std::byte* source, std::byte* target, std::size_t size) {
        if (source == last_.source + last_.size && target == last_.target + last_.size && last_.size > 0) {
            last_.size += size;
            return;
        }
        flush();
        last_ = {source, target, size};
    }

    void flush() {
        if (last_.size > 0) queue(last_.source, last_.target, last_.size);
        last_.size = 0;
    }

    void queue(const std::byte* source, std::byte* target, std::size_t size) {
        driver_.check(driver_.cuMemcpyDtoHAsync(target, address_of(source), size, device_.stream), "cuMemcpyDtoHAsync");
    }

    // Small pieces that lie near each other come together, with what is between them, to staging: thousands of copies
    // become a few. All of a span is within one allocation, so that it may be read.
    void gather() {
        std::sort(small_.begin(), small_.end(), [](const Run& a, const Run& b) { return a.source < b.source; });
        struct Span {
            std::size_t first, last, size;
        };
        std::vector<Span> spans;
        std::size_t total = 0;
        const std::byte* end_of_allocation = nullptr;
        for (std::size_t i = 0; i < small_.size(); ++i) {
            const Run& run = small_[i];
            if (!spans.empty()) {
                Span& span = spans.back();
                const std::byte* begin = small_[span.first].source;
                const std::byte* end = std::max(begin + span.size, run.source + run.size);
                if (run.source <= begin + span.size + widest_gap_bytes && end <= end_of_allocation) {
                    span.last = i + 1;
                    span.size = static_cast<std::size_t>(end - begin);
                    continue;
                }
                total += span.size;
            }
            spans.push_back({i, i + 1, run.size});
            if (run.source >= end_of_allocation) end_of_allocation = end_of(run.source);
        }
        if (!spans.empty()) total += spans.back().size;
        if (spans.size() < small_.size()) copy_.staging_ = device_of().take(total);
        std::size_t offset = 0;
        for (const Span& span : spans) {
            if (copy_.staging_.memory == nullptr || span.last - span.first == 1) {
                for (std::size_t i = span.first; i < span.last; ++i) {
                    linear(small_[i].source, small_[i].target, small_[i].size);
                }
                continue;
            }
            const std::byte* begin = small_[span.first].source;
            queue(begin, copy_.staging_.memory + offset, span.size);
            for (std::size_t i = span.first; i < span.last; ++i) {
                const auto inside = static_cast<std::size_t>(small_[i].source - begin);
                copy_.gathered_.push_back({offset + inside, small_[i].target, small_[i].size});
            }
            offset += span.size;
        }
        flush();
    }

    // Where the allocation around an address ends; null if the driver does not know.
    const std::byte* end_of(const std::byte* source) const {
        DevicePointer base = 0;
        std::size_t size = 0;
        if (driver_.cuMemGetAddressRange(&base, &size, address_of(source)) != success) return nullptr;
        return reinterpret_cast<const std::byte*>(base + size);
    }

    Device& device_of() const {
        return *copy_.device_;
    }

    const Device& device_;
    const Driver& driver_;
    Copy& copy_;
    Run last_{nullptr, nullptr, 0};
    std::vector<Run> small_;
    std::vector<std::size_t> order_;
    std::vector<std::int64_t> packed_;
};

Copy::Copy(std::shared_ptr<Device> device) : device_(std::move(device)) {}

Copy::~Copy() {
    // Staging that a device may still write to is never used again.
    if (finished_ && staging_.memory != nullptr) device_->give_back(staging_);
}

bool Copy::hold(Stream stream) {
    const Here here(*device_);
    const Driver& driver = *device_->driver;
    if (is_capturing(driver, stream)) return false;
    driver.check(driver.cuStreamWaitEvent(handle_of(stream), done_->handle, 0), "cuStreamWaitEvent");
    return true;
}

bool Copy::finished(double seconds) {
    const auto until = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds);
    const Driver& driver = *device_->driver;
    while (!finished_) {
        {
            const Here here(*device_);
            // After an error the event says nothing any more; what the stream says is true of all that is on it.
            Result result = error_.empty() ? driver.cuEventQuery(done_->handle) : not_ready;
            if (result != success && result != not_ready) error_ = driver.text(result, "cuEventQuery");
            if (!error_.empty()) result = driver.cuStreamQuery(device_->stream);
            finished_ = result != not_ready;
        }
        if (finished_ || std::chrono::steady_clock::now() >= until) break;
        std::this_thread::sleep_for(poll_pause);
    }
    return finished_;
}

void Copy::settle() {
    if (!finished_ || !error_.empty())
        throw std::runtime_error("the copy has not succeeded: there is nothing to settle");
    for (const Gathered& gathered : gathered_) {
        std::memcpy(gathered.target, staging_.memory + gathered.offset, gathered.size);
    }
    std::vector<std::byte> came;
    for (const Permuted& permuted : permuted_) {
        came.assign(permuted.target, permuted.target + permuted.size);
        Box box(came.data(), permuted.target, permuted.itemsize);
        for (const Dimension& dimension : permuted.dimensions) box.append(dimension);
        box.finish();
        copy_box(box, nullptr);
    }
    gathered_.clear();
    permuted_.clear();
}

Engine::Engine(const std::string& library) : driver_(std::make_shared<Driver>(library)) {}

std::shared_ptr<Device> Engine::device(int ordinal) {
    const std::lock_guard<std::mutex> locked(mutex_);
    std::shared_ptr<Device>& device = devices_[ordinal];
    if (device == nullptr) device = std::make_shared<Device>(driver_, ordinal);
    return device;
}

void Engine::pin(int device, std::uint64_t address, std::size_t size) {
    const std::shared_ptr<Device> at = this->device(device);
    const Here here(*at);
    driver_->check(driver_->cuMemHostRegister(reinterpret_cast<void*>(address), size, portable), "cuMemHostRegister");
}

void Engine::unpin(int device, std::uint64_t address) {
    const std::shared_ptr<Device> at = this->device(device);
    const Here here(*at);
    driver_->check(driver_->cuMemHostUnregister(reinterpret_cast<void*>(address)), "cuMemHostUnregister");
}

std::shared_ptr<Copy> Engine::copy(int ordinal, const std::vector<Stream>& after, const CopyJobs& jobs) {
    const std::shared_ptr<Device> device = this->device(ordinal);
    const Driver& driver = *driver_;
    const Here here(*device);
    for (const Stream stream : after) {
        if (is_capturing(driver, stream)) {
            throw std::runtime_error("a CUDA graph is being captured on the stream that the state is written on");
        }
    }
    auto copy = std::make_shared<Copy>(device);
    copy->done_ = std::make_unique<Event>(*device);
    for (const Stream stream : after) {
        const Event written(*device);
        driver.check(driver.cuEventRecord(written.handle, handle_of(stream)), "cuEventRecord");
        driver.check(driver.cuStreamWaitEvent(device->stream, written.handle, 0), "cuStreamWaitEvent");
    }
    try {
        Issue(*device, *copy).run(jobs);
        driver.check(driver.cuEventRecord(copy->done_->handle, device->stream), "cuEventRecord");
    } catch (const std::runtime_error& error) {
        copy->error_ = error.what();  // something is queued: the caller waits until it is done
    }
    return copy;
}

void Engine::close() {
    const std::lock_guard<std::mutex> locked(mutex_);
    devices_.clear();
}

}  // namespace ckptd::cuda
