// A CUDA driver without a device, for tests: the functions that ckptd uses, over main memory.
//
// What is queued on a stream is done when the test says so (`fake_run`), in any order that streams and events allow, by a
// seed; so a wait that is missing, or memory that is given up early, really yields wrong bytes. It counts calls and live
// handles, writes down the order of calls, fails the n-th one, and refuses to read outside of "device memory".
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <set>
#include <string>
#include <thread>
#include <vector>

namespace {

constexpr int invalid_value = 1, invalid_handle = 400, not_ready = 600, capture_isolation = 905, capture_implicit = 906;
constexpr int launch_failed = 719;

struct Event {
    std::uint64_t recorded = 0;  // how often cuEventRecord was called
    std::uint64_t reached = 0;   // how many of those the streams have come to
    bool destroyed = false;
};

struct Operation {
    std::function<void()> run;
    Event* waits_for = nullptr;
    std::uint64_t until = 0;
};

struct Stream {
    int device;
    std::deque<Operation> queue;
    int preference = 0;
    bool capturing = false;
};

struct Context {
    int device;
    int retained = 0;
    Stream standard;
};

struct Fake {
    std::recursive_mutex mutex;
    int devices = 1;
    std::map<int, Context> contexts;
    std::set<Stream*> streams;  // of the driver's users
    std::set<Stream*> own;      // of the test
    std::set<Event*> events;
    std::vector<Event*> graveyard;
    std::map<std::uintptr_t, std::size_t> pinned, allocated, memory;
    std::string log;
    std::map<std::string, long> calls;
    std::string failing;
    long failing_in = 0;
    int failure = 0;
    bool sticky = false, dead = false, ignore_waits = false, implicit = false;
    std::string misuse;
};

Fake& fake() {
    static Fake* made = new Fake;
    return *made;
}

thread_local std::vector<Context*> current;
thread_local int capture_mode = 0;

using Locked = std::lock_guard<std::recursive_mutex>;

// Notes a call; not 0: what it shall return.
int called(const char* name) {
    Fake& f = fake();
    ++f.calls[name];
    f.log += name;
    f.log += '\n';
    if (f.dead) return launch_failed;
    if (f.failure != 0 && (f.failing.empty() || f.failing == name) && --f.failing_in == 0) {
        const int failure = f.failure;
        f.failure = 0;
        if (f.sticky) {
            f.dead = true;
            for (Stream* stream : f.streams) stream->queue.clear();
        }
        return failure;
    }
    return 0;
}

void misused(const std::string& how) {
    if (fake().misuse.empty()) fake().misuse = how;
}

Stream* stream_of(void* handle) {
    Fake& f = fake();
    if (handle == nullptr) {
        if (current.empty()) {
            misused("the default stream without a context");
            return nullptr;
        }
        return &current.back()->standard;
    }
    auto* stream = static_cast<Stream*>(handle);
    if (f.streams.count(stream) == 0 && f.own.count(stream) == 0) {
        misused("a stream that is not there");
        return nullptr;
    }
    return stream;
}

void push(Stream* stream, std::function<void()> run) {
    stream->queue.push_back({std::move(run), nullptr, 0});
}

bool runnable(const Stream& stream) {
    if (stream.queue.empty()) return false;
    const Operation& next = stream.queue.front();
    return next.waits_for == nullptr || fake().ignore_waits || next.waits_for->reached >= next.until;
}

std::vector<Stream*> all_streams() {
    Fake& f = fake();
    std::vector<Stream*> all(f.streams.begin(), f.streams.end());
    all.insert(all.end(), f.own.begin(), f.own.end());
    for (auto& [device, context] : f.contexts) all.push_back(&context.standard);
    return all;
}

bool in_memory(std::uintptr_t address, std::size_t size) {
    Fake& f = fake();
    if (f.memory.empty()) return true;
    auto found = f.memory.upper_bound(address);
    if (found == f.memory.begin()) return false;
    --found;
    return address >= found->first && address + size <= found->first + found->second;
}

std::atomic<bool> scheduling{false};
std::thread* scheduler = nullptr;

}  // namespace

extern "C" {

// --- for the test

int fake_run(std::uint64_t seed, long most) {
    Fake& f = fake();
    std::mt19937_64 random(seed);
    long done = 0;
    while (done < most) {
        const Locked locked(f.mutex);
        std::vector<Stream*> ready;
        for (Stream* stream : all_streams()) {
            if (runnable(*stream)) ready.push_back(stream);
        }
        if (ready.empty()) break;
        int best = ready.front()->preference;
        for (Stream* stream : ready) best = std::max(best, stream->preference);
        ready.erase(
            std::remove_if(ready.begin(), ready.end(), [&](Stream* stream) { return stream->preference < best; }),
            ready.end());
        Stream* chosen = ready[random() % ready.size()];
        const Operation operation = chosen->queue.front();
        chosen->queue.pop_front();
        operation.run();
        ++done;
    }
    return static_cast<int>(done);
}

// A thread that runs what is queued, one operation at a time.
void fake_start(std::uint64_t seed) {
    scheduling = true;
    scheduler = new std::thread([seed] {
        for (std::uint64_t i = 0; scheduling; ++i) {
            if (fake_run(seed + i, 1) == 0) std::this_thread::sleep_for(std::chrono::microseconds(50));
        }
    });
}

void fake_stop() {
    if (scheduler == nullptr) return;
    scheduling = false;
    scheduler->join();
    delete scheduler;
    scheduler = nullptr;
}

void fake_reset(int devices) {
    fake_stop();
    Fake& f = fake();
    const Locked locked(f.mutex);
    f.devices = devices;
    f.contexts.clear();
    for (Stream* stream : f.own) delete stream;
    f.own.clear();
    f.streams.clear();
    f.events.clear();
    f.pinned.clear();
    f.allocated.clear();
    f.memory.clear();
    f.log.clear();
    f.calls.clear();
    f.misuse.clear();
    f.failure = 0;
    f.sticky = f.dead = f.ignore_waits = f.implicit = false;
}

void* fake_stream(int device) {
    const Locked locked(fake().mutex);
    auto* made = new Stream;
    made->device = device;
    fake().own.insert(made);
    return made;
}

// Copies `size` bytes from `source`, as they are now, to `target` when the stream comes to it.
void fake_kernel(void* handle, void* target, const void* source, std::size_t size) {
    const Locked locked(fake().mutex);
    const auto* begin = static_cast<const char*>(source);
    auto bytes = std::make_shared<std::vector<char>>(begin, begin + size);
    push(static_cast<Stream*>(handle), [bytes, target] { std::memcpy(target, bytes->data(), bytes->size()); });
}

// Among streams that can go on those with the highest preference do. Null: all streams of the driver's users.
void fake_prefer(void* handle, int preference) {
    const Locked locked(fake().mutex);
    if (handle != nullptr) static_cast<Stream*>(handle)->preference = preference;
    for (Stream* stream : fake().streams) {
        if (handle == nullptr) stream->preference = preference;
    }
}

void fake_capturing(void* handle, int capturing) {
    const Locked locked(fake().mutex);
    static_cast<Stream*>(handle)->capturing = capturing != 0;
}

void fake_capture_implicitly(int implicit) {
    fake().implicit = implicit != 0;
}

void fake_ignore_waits(int ignore) {
    fake().ignore_waits = ignore != 0;
}

// The n-th call from now of a function (empty: of any) fails; `sticky`: and with it all others, as after a fault.
void fake_fail(const char* function, long nth, int code, int sticky) {
    const Locked locked(fake().mutex);
    fake().failing = function;
    fake().failing_in = nth;
    fake().failure = code;
    fake().sticky = sticky != 0;
}

// An allocation on the device; once there is one, nothing else is.
void fake_memory(std::uintptr_t address, std::size_t size) {
    const Locked locked(fake().mutex);
    fake().memory[address] = size;
}

long fake_calls(const char* function) {
    const Locked locked(fake().mutex);
    if (*function != 0) return fake().calls[function];
    long total = 0;
    for (const auto& [name, count] : fake().calls) total += count;
    return total;
}

// Handles that are there: contexts, streams, events, pinned and allocated memory.
long fake_live() {
    Fake& f = fake();
    const Locked locked(f.mutex);
    long contexts = 0;
    for (const auto& [device, context] : f.contexts) contexts += context.retained;
    return contexts +
           static_cast<long>(f.streams.size() + f.events.size() + f.pinned.size() + f.allocated.size());
}

long fake_queued() {
    const Locked locked(fake().mutex);
    long queued = 0;
    for (const Stream* stream : all_streams()) queued += static_cast<long>(stream->queue.size());
    return queued;
}

const char* fake_log() {
    return fake().log.c_str();
}

const char* fake_misuse() {
    return fake().misuse.c_str();
}

// --- the driver

int cuInit(unsigned) {
    const Locked locked(fake().mutex);
    return called("cuInit");
}

int cuGetErrorName(int, const char** text) {
    *text = "CUDA_ERROR_FAKE";
    return 0;
}

int cuGetErrorString(int, const char** text) {
    *text = "an error of the fake driver";
    return 0;
}

int cuDeviceGet(int* device, int ordinal) {
    const Locked locked(fake().mutex);
    if (const int error = called("cuDeviceGet")) return error;
    *device = ordinal;
    return ordinal < fake().devices ? 0 : 101;
}

int cuDevicePrimaryCtxRetain(void** context, int device) {
    const Locked locked(fake().mutex);
    if (const int error = called("cuDevicePrimaryCtxRetain")) return error;
    Context& found = fake().contexts[device];
    found.device = found.standard.device = device;
    ++found.retained;
    *context = &found;
    return 0;
}

int cuDevicePrimaryCtxRelease_v2(int device) {
    const Locked locked(fake().mutex);
    const int error = called("cuDevicePrimaryCtxRelease_v2");
    --fake().contexts[device].retained;
    return error;
}

int cuCtxPushCurrent_v2(void* context) {
    const Locked locked(fake().mutex);
    if (const int error = called("cuCtxPushCurrent_v2")) return error;
    current.push_back(static_cast<Context*>(context));
    return 0;
}

int cuCtxPopCurrent_v2(void** context) {
    const Locked locked(fake().mutex);
    called("cuCtxPopCurrent_v2");
    if (current.empty()) {
        misused("popped a context that is not there");
        return invalid_value;
    }
    *context = current.back();
    current.pop_back();
    return 0;
}

int cuCtxGetStreamPriorityRange(int* least, int* greatest) {
    const Locked locked(fake().mutex);
    *least = 0;
    *greatest = -5;
    return called("cuCtxGetStreamPriorityRange");
}

int cuThreadExchangeStreamCaptureMode(int* mode) {
    const Locked locked(fake().mutex);
    if (const int error = called("cuThreadExchangeStreamCaptureMode")) return error;
    std::swap(*mode, capture_mode);
    return 0;
}

int cuStreamCreateWithPriority(void** stream, unsigned flags, int) {
    const Locked locked(fake().mutex);
    if (const int error = called("cuStreamCreateWithPriority")) return error;
    if (flags != 1 || current.empty()) misused("a stream that is not non-blocking, or without a context");
    auto* made = new Stream;
    made->device = current.back()->device;
    fake().streams.insert(made);
    *stream = made;
    return 0;
}

int cuStreamDestroy_v2(void* stream) {
    const Locked locked(fake().mutex);
    const int error = called("cuStreamDestroy_v2");
    auto* found = static_cast<Stream*>(stream);
    if (fake().streams.erase(found) == 0) misused("a stream is destroyed twice");
    if (!found->queue.empty()) misused("a stream is destroyed with work on it");
    delete found;
    return error;
}

int cuStreamQuery(void* stream) {
    const Locked locked(fake().mutex);
    if (const int error = called("cuStreamQuery")) return error;
    if (capture_mode != 2) misused("a query that breaks a capture");
    const Stream* found = stream_of(stream);
    return found == nullptr ? invalid_handle : found->queue.empty() ? 0 : not_ready;
}

int cuStreamWaitEvent(void* stream, void* event, unsigned) {
    const Locked locked(fake().mutex);
    if (const int error = called("cuStreamWaitEvent")) return error;
    Stream* found = stream_of(stream);
    auto* awaited = static_cast<Event*>(event);
    if (found == nullptr || fake().events.count(awaited) == 0) return invalid_handle;
    if (found->capturing) {
        misused("a wait that breaks a capture");
        return capture_isolation;
    }
    found->queue.push_back({[] {}, awaited, awaited->recorded});
    return 0;
}

int cuStreamIsCapturing(void* stream, int* status) {
    const Locked locked(fake().mutex);
    if (const int error = called("cuStreamIsCapturing")) return error;
    if (stream == nullptr && fake().implicit) return capture_implicit;
    const Stream* found = stream_of(stream);
    if (found == nullptr) return invalid_handle;
    *status = found->capturing ? 1 : 0;
    return 0;
}

int cuEventCreate(void** event, unsigned flags) {
    const Locked locked(fake().mutex);
    if (const int error = called("cuEventCreate")) return error;
    if (flags != 2) misused("an event that takes times");
    auto* made = new Event;
    fake().events.insert(made);
    *event = made;
    return 0;
}

int cuEventRecord(void* event, void* stream) {
    const Locked locked(fake().mutex);
    if (const int error = called("cuEventRecord")) return error;
    Stream* found = stream_of(stream);
    auto* recorded = static_cast<Event*>(event);
    if (found == nullptr || fake().events.count(recorded) == 0) return invalid_handle;
    const std::uint64_t number = ++recorded->recorded;
    push(found, [recorded, number] { recorded->reached = std::max(recorded->reached, number); });
    return 0;
}

int cuEventQuery(void* event) {
    const Locked locked(fake().mutex);
    if (const int error = called("cuEventQuery")) return error;
    if (capture_mode != 2) misused("a query that breaks a capture");
    const auto* found = static_cast<Event*>(event);
    return found->reached >= found->recorded ? 0 : not_ready;
}

int cuEventDestroy_v2(void* event) {
    const Locked locked(fake().mutex);
    const int error = called("cuEventDestroy_v2");
    auto* found = static_cast<Event*>(event);
    if (fake().events.erase(found) == 0) misused("an event is destroyed twice");
    fake().graveyard.push_back(found);  // streams may still come to it, as with the real one
    return error;
}

int cuMemGetAddressRange_v2(unsigned long long* base, std::size_t* size, unsigned long long address) {
    const Locked locked(fake().mutex);
    if (const int error = called("cuMemGetAddressRange_v2")) return error;
    for (const auto& [begin, bytes] : fake().memory) {
        if (begin <= address && address < begin + bytes) {
            *base = begin;
            *size = bytes;
            return 0;
        }
    }
    return invalid_value;
}

int cuMemHostRegister_v2(void* address, std::size_t size, unsigned flags) {
    const Locked locked(fake().mutex);
    if (const int error = called("cuMemHostRegister_v2")) return error;
    if (flags != 1 || current.empty()) misused("memory is not pinned for all devices, or without a context");
    fake().pinned[reinterpret_cast<std::uintptr_t>(address)] = size;
    return 0;
}

int cuMemHostUnregister(void* address) {
    const Locked locked(fake().mutex);
    const int error = called("cuMemHostUnregister");
    if (fake().pinned.erase(reinterpret_cast<std::uintptr_t>(address)) == 0) misused("memory is unpinned twice");
    return error;
}

int cuMemHostAlloc(void** address, std::size_t size, unsigned) {
    const Locked locked(fake().mutex);
    if (const int error = called("cuMemHostAlloc")) return error;
    *address = new char[size];
    fake().allocated[reinterpret_cast<std::uintptr_t>(*address)] = size;
    return 0;
}

int cuMemFreeHost(void* address) {
    const Locked locked(fake().mutex);
    const int error = called("cuMemFreeHost");
    fake().allocated.erase(reinterpret_cast<std::uintptr_t>(address));
    delete[] static_cast<char*>(address);
    return error;
}

int cuMemcpyDtoHAsync_v2(void* target, unsigned long long source, std::size_t size, void* stream) {
    const Locked locked(fake().mutex);
    if (const int error = called("cuMemcpyDtoHAsync_v2")) return error;
    Stream* found = stream_of(stream);
    if (found == nullptr || size == 0 || !in_memory(source, size)) return invalid_value;
    push(found, [=] { std::memcpy(target, reinterpret_cast<const void*>(source), size); });
    return 0;
}

struct Memcpy2D {
    std::size_t source_x, source_y;
    int source_type;
    const void* source_host;
    unsigned long long source_device;
    void* source_array;
    std::size_t source_pitch, target_x, target_y;
    int target_type;
    void* target_host;
    unsigned long long target_device;
    void* target_array;
    std::size_t target_pitch, width, height;
};

int cuMemcpy2DAsync_v2(const Memcpy2D* given, void* stream) {
    const Locked locked(fake().mutex);
    if (const int error = called("cuMemcpy2DAsync_v2")) return error;
    Stream* found = stream_of(stream);
    const Memcpy2D copy = *given;
    const std::size_t extent = copy.source_pitch * (copy.height - 1) + copy.width;
    if (found == nullptr || copy.source_type != 2 || copy.target_type != 1 || copy.source_pitch < copy.width ||
        copy.target_pitch < copy.width || copy.source_pitch > 0x7fffffff || !in_memory(copy.source_device, extent)) {
        return invalid_value;
    }
    push(found, [=] {
        for (std::size_t row = 0; row < copy.height; ++row) {
            std::memcpy(static_cast<char*>(copy.target_host) + row * copy.target_pitch,
                        reinterpret_cast<const char*>(copy.source_device) + row * copy.source_pitch, copy.width);
        }
    });
    return 0;
}

}  // extern "C"
