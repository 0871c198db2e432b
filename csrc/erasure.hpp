// Reed-Solomon codes over GF(2^8) for stripes: see docs/erasure.md, section 4. ISA-L does the arithmetic on buffers in
// place; this chooses the matrix, works in blocks that stay in the cache, and treats inputs as padded with zeros.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace ckptd::erasure {

constexpr std::size_t most_positions = 256;  // of a stripe: k + m

// Takes the kernels from ISA-L where it has them; else, or before this is called, a portable one gives the same bytes.
void prepare();

// Factors of targets by sources, row-major [targets, sources]: target = sum of factor * source.
struct Matrix {
    std::size_t targets;
    std::size_t sources;
    std::vector<std::uint8_t> factors;
};

// The m parities from the k data segments. Throws std::invalid_argument unless k >= 1 and k + m <= 256.
Matrix encoding_matrix(std::size_t k, std::size_t m);

// The wanted positions from k present ones. Throws std::invalid_argument for positions beyond 256, given twice, or both
// present and wanted.
Matrix decoding_matrix(const std::vector<std::int64_t>& present, const std::vector<std::int64_t>& wanted);

// `count` rows to be multiplied by one matrix, as columns: addresses and sizes of sources [count, sources], addresses
// of targets [count, targets], bytes to produce [count]. A source shorter than its row is as if zeros followed.
struct Rows {
    std::size_t count;
    const std::uint64_t* source;
    const std::int64_t* size;
    const std::uint64_t* target;
    const std::int64_t* length;
    std::uint32_t* crc;  // null: no checksums; else [count, targets], receives the CRC-32C of each target
};

// Throws std::invalid_argument for the first row that cannot be: negative lengths, sizes beyond the row's length, null
// addresses of bytes, targets that overlap each other or a source.
void check_rows(const Rows& rows, const Matrix& matrix);

// Computes rows that passed the check, on the calling thread and up to `threads - 1` others. `portable`: without ISA-L.
void multiply(const Rows& rows, const Matrix& matrix, std::size_t threads, bool portable);

}  // namespace ckptd::erasure
