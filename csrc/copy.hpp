// Many boxes copied by several threads: what one capture or load asks for in one call.
#pragma once

#include <cstddef>
#include <cstdint>

namespace ckptd {

// `count` jobs of `dimensions` dimensions, as columns; two-dimensional columns are row-major [count, dimensions].
// Strides are bytes. A target of 0 asks only for the checksum; jobs without bytes may have any address.
struct CopyJobs {
    std::size_t count;
    std::size_t dimensions;
    const std::uint64_t* source;
    const std::uint64_t* target;
    const std::int64_t* sizes;
    const std::int64_t* source_strides;
    const std::int64_t* target_strides;
    const std::int64_t* itemsize;
    std::uint32_t* crc;  // null: no checksums; else receives one a job, of its bytes in logical order
};

// Raises std::invalid_argument for the first job that cannot be: negative sizes or strides, more bytes than int64, no
// source, neither target nor checksum.
void check_jobs(const CopyJobs& jobs);

// Runs jobs that passed the check, on the calling thread and up to `threads - 1` others. Targets must not overlap
// each other or any source.
void copy_boxes(const CopyJobs& jobs, std::size_t threads);

// What the other threads of all calls so far have taken of the processor.
double helpers_cpu_seconds();

}  // namespace ckptd
