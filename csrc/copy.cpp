#include "copy.hpp"

#include <algorithm>
#include <atomic>
#include <ctime>
#include <deque>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "box.hpp"
#include "crc32c.hpp"

namespace ckptd {

namespace {

constexpr std::int64_t page_bytes = 4096;
constexpr std::int64_t largest_part_bytes = 4 * 1024 * 1024;
constexpr std::int64_t smallest_part_bytes = 256 * 1024;
constexpr std::int64_t parts_per_thread = 4;  // at least, of the whole call: evens out threads of unequal speed
constexpr std::int64_t job_cost_bytes = 512;  // what setting up a job costs, as bytes copied in that time
constexpr std::int64_t batch_cost_bytes = 512 * 1024;
constexpr std::int64_t thread_cost_bytes = 1024 * 1024;  // less work than this is not worth another thread

std::atomic<std::int64_t> helpers_nanoseconds{0};

// Called by a helper at its end: what it has taken of the processor.
void account_for_helper() {
    timespec taken{};
    if (clock_gettime(CLOCK_THREAD_CPUTIME_ID, &taken) == 0) {
        helpers_nanoseconds += std::int64_t{taken.tv_sec} * 1'000'000'000 + taken.tv_nsec;
    }
}

// A piece of one job that is too big for one thread.
struct Part {
    std::size_t job;
    Box box;
    std::uint32_t crc;
};

// Jobs [first, last) that one thread does in a row, except those cut into parts.
struct Batch {
    std::size_t first;
    std::size_t last;
};

struct Plan {
    std::int64_t part_bytes;
    std::int64_t cost = 0;
    std::deque<Part> parts;  // in logical order within each job
    std::vector<Batch> batches;
};

std::int64_t bytes_of(const CopyJobs& jobs, std::size_t job) {
    std::int64_t bytes = jobs.itemsize[job];
    const std::int64_t* sizes = jobs.sizes + job * jobs.dimensions;
    for (std::size_t i = 0; i < jobs.dimensions; ++i) bytes *= sizes[i];
    return bytes;
}

Box box_of(const CopyJobs& jobs, std::size_t job) {
    Box box(reinterpret_cast<const std::byte*>(jobs.source[job]), reinterpret_cast<std::byte*>(jobs.target[job]),
            jobs.itemsize[job]);
    const std::size_t first = job * jobs.dimensions;
    for (std::size_t i = first; i < first + jobs.dimensions; ++i) {
        // Without a target its strides mean nothing; the source's let dimensions merge.
        const std::int64_t target_stride = box.target != nullptr ? jobs.target_strides[i] : jobs.source_strides[i];
        box.append({jobs.sizes[i], jobs.source_strides[i], target_stride});
    }
    box.finish();
    return box;
}

void run_job(const CopyJobs& jobs, std::size_t job) {
    std::uint32_t crc = 0;
    if (bytes_of(jobs, job) > 0) copy_box(box_of(jobs, job), jobs.crc != nullptr ? &crc : nullptr);
    if (jobs.crc != nullptr) jobs.crc[job] = crc;
}

std::int64_t choose_part_bytes(const CopyJobs& jobs, std::size_t threads) {
    std::int64_t total = 0;
    for (std::size_t job = 0; job < jobs.count; ++job) total += bytes_of(jobs, job);
    const std::int64_t even = total / (static_cast<std::int64_t>(threads) * parts_per_thread);
    return std::clamp(even, smallest_part_bytes, largest_part_bytes) / page_bytes * page_bytes;
}

Plan make_plan(const CopyJobs& jobs, std::size_t threads) {
    Plan plan;
    plan.part_bytes = choose_part_bytes(jobs, threads);
    std::int64_t batch_cost = 0;
    std::size_t first = 0;
    for (std::size_t job = 0; job < jobs.count; ++job) {
        const std::int64_t bytes = bytes_of(jobs, job);
        plan.cost += bytes + job_cost_bytes;
        if (bytes > plan.part_bytes) {
            for_each_part(box_of(jobs, job), plan.part_bytes,
                          [&](const Box& box) { plan.parts.push_back({job, box, 0}); });
            continue;
        }
        batch_cost += bytes + job_cost_bytes;
        if (batch_cost >= batch_cost_bytes) {
            plan.batches.push_back({first, job + 1});
            first = job + 1;
            batch_cost = 0;
        }
    }
    if (first < jobs.count) plan.batches.push_back({first, jobs.count});
    return plan;
}

void run_task(const CopyJobs& jobs, Plan& plan, std::size_t task) {
    if (task < plan.parts.size()) {
        Part& part = plan.parts[task];
        copy_box(part.box, jobs.crc != nullptr ? &part.crc : nullptr);
        return;
    }
    const Batch& batch = plan.batches[task - plan.parts.size()];
    for (std::size_t job = batch.first; job < batch.last; ++job) {
        if (bytes_of(jobs, job) <= plan.part_bytes) run_job(jobs, job);
    }
}

void join_checksums(const CopyJobs& jobs, const Plan& plan) {
    std::size_t job = jobs.count;
    for (const Part& part : plan.parts) {
        if (part.job != job) {
            job = part.job;
            jobs.crc[job] = 0;
        }
        jobs.crc[job] = crc32c::combine(jobs.crc[job], part.crc, static_cast<std::uint64_t>(part.box.bytes()));
    }
}

void check_job(const CopyJobs& jobs, std::size_t job) {
    const auto fail = [&](const std::string& what) {
        throw std::invalid_argument("copy job " + std::to_string(job) + ": " + what);
    };
    std::int64_t bytes = jobs.itemsize[job];
    if (bytes < 1) fail("itemsize " + std::to_string(bytes) + ", expected at least 1");
    for (std::size_t i = job * jobs.dimensions; i < (job + 1) * jobs.dimensions; ++i) {
        if (jobs.sizes[i] < 0) fail("size " + std::to_string(jobs.sizes[i]) + " is negative");
        if (jobs.source_strides[i] < 0 || jobs.target_strides[i] < 0) fail("a stride is negative");
        if (__builtin_mul_overflow(bytes, jobs.sizes[i], &bytes)) fail("more bytes than a signed 64-bit integer holds");
    }
    if (bytes == 0) return;
    if (jobs.source[job] == 0) fail("source address is 0");
    if (jobs.target[job] == 0 && jobs.crc == nullptr) fail("target address is 0 and no checksum is asked for");
}

}  // namespace

void check_jobs(const CopyJobs& jobs) {
    if (jobs.dimensions > max_dimensions) {
        throw std::invalid_argument("copy jobs have " + std::to_string(jobs.dimensions) + " dimensions, at most " +
                                    std::to_string(max_dimensions));
    }
    for (std::size_t job = 0; job < jobs.count; ++job) check_job(jobs, job);
}

void copy_boxes(const CopyJobs& jobs, std::size_t threads) {
    if (threads <= 1) {
        for (std::size_t job = 0; job < jobs.count; ++job) run_job(jobs, job);
        return;
    }
    Plan plan = make_plan(jobs, threads);
    const std::size_t tasks = plan.parts.size() + plan.batches.size();
    const auto useful = static_cast<std::size_t>(plan.cost / thread_cost_bytes + 1);
    std::atomic<std::size_t> next{0};
    const auto work = [&] {
        for (std::size_t task = next++; task < tasks; task = next++) run_task(jobs, plan, task);
    };
    const auto help = [&] {
        work();
        account_for_helper();
    };
    // Started anew each time: a pool would not survive the fork of a data loader's workers.
    std::vector<std::thread> helpers;
    try {
        while (helpers.size() + 1 < std::min({threads, tasks, useful})) helpers.emplace_back(help);
    } catch (const std::system_error&) {
        // No more threads to be had: those that run will do it all.
    }
    work();
    for (std::thread& helper : helpers) helper.join();
    if (jobs.crc != nullptr) join_checksums(jobs, plan);
}

double helpers_cpu_seconds() {
    return static_cast<double>(helpers_nanoseconds.load()) * 1e-9;
}

}  // namespace ckptd
