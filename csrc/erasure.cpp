#include "erasure.hpp"

#include <algorithm>
#include <array>
#include <stdexcept>
#include <string>

#include "crc32c.hpp"
#include "isal.hpp"
#include "threads.hpp"

namespace ckptd::erasure {

namespace {

using InitialiseTables = void (*)(int sources, int targets, unsigned char* factors, unsigned char* tables);
using EncodeData = void (*)(int length, int sources, int targets, unsigned char* tables, unsigned char** source,
                            unsigned char** target);

InitialiseTables initialise_tables = nullptr;
EncodeData encode_data = nullptr;

constexpr std::int64_t block_bytes = 256 * 1024;  // of each source at a time: outputs are still cached for the checksum
constexpr std::int64_t largest_part_bytes = 4 * 1024 * 1024;
constexpr std::size_t parts_per_thread = 4;            // at least: evens out threads of unequal speed
constexpr double thread_cost_bytes = 2 * 1024 * 1024;  // less work than this is not worth another thread
constexpr std::size_t isal_table_bytes = 32;           // for each factor
constexpr std::size_t portable_table_bytes = 256;

// What a source has beyond its end. Never written.
alignas(64) std::byte zeros[block_bytes];

// ---- arithmetic in GF(2^8) modulo 0x11d; 2 generates it

struct Logarithms {
    std::array<std::uint8_t, 256> logarithm{};
    std::array<std::uint8_t, 510> power{};
};

constexpr Logarithms make_logarithms() {
    Logarithms tables{};
    unsigned value = 1;
    for (std::size_t exponent = 0; exponent < 255; ++exponent) {
        tables.power[exponent] = tables.power[exponent + 255] = static_cast<std::uint8_t>(value);
        tables.logarithm[value] = static_cast<std::uint8_t>(exponent);
        value = (value << 1) ^ ((value & 0x80) ? 0x11d : 0);
    }
    return tables;
}

constexpr Logarithms field = make_logarithms();

std::uint8_t product(std::uint8_t left, std::uint8_t right) {
    if (left == 0 || right == 0) return 0;
    return field.power[field.logarithm[left] + field.logarithm[right]];
}

std::uint8_t inverse(std::uint8_t value) {
    return field.power[255 - field.logarithm[value]];
}

// The factor of data position `column` in position `position` of a stripe with k data positions.
std::uint8_t generator(std::size_t position, std::size_t column, std::size_t k) {
    if (position < k) return position == column ? 1 : 0;
    return inverse(static_cast<std::uint8_t>(position ^ column));
}

// target -= factor * source, for rows of matrices.
void subtract(std::uint8_t* target, const std::uint8_t* source, std::uint8_t factor, std::size_t count) {
    for (std::size_t i = 0; i < count; ++i) target[i] ^= product(factor, source[i]);
}

// Gauss-Jordan. Every k rows of the generator can be inverted, so a pivot is always found.
std::vector<std::uint8_t> inverted(std::vector<std::uint8_t> matrix, std::size_t k) {
    std::vector<std::uint8_t> result(k * k, 0);
    for (std::size_t i = 0; i < k; ++i) result[i * k + i] = 1;
    for (std::size_t column = 0; column < k; ++column) {
        std::size_t pivot = column;
        while (pivot < k && matrix[pivot * k + column] == 0) ++pivot;
        if (pivot == k) throw std::logic_error("erasure: the matrix is singular");
        std::swap_ranges(&matrix[pivot * k], &matrix[pivot * k] + k, &matrix[column * k]);
        std::swap_ranges(&result[pivot * k], &result[pivot * k] + k, &result[column * k]);
        const std::uint8_t scale = inverse(matrix[column * k + column]);
        for (std::size_t i = 0; i < k; ++i) {
            matrix[column * k + i] = product(scale, matrix[column * k + i]);
            result[column * k + i] = product(scale, result[column * k + i]);
        }
        for (std::size_t row = 0; row < k; ++row) {
            const std::uint8_t factor = matrix[row * k + column];
            if (row == column || factor == 0) continue;
            subtract(&matrix[row * k], &matrix[column * k], factor, k);
            subtract(&result[row * k], &result[column * k], factor, k);
        }
    }
    return result;
}

void check_positions(const std::vector<std::int64_t>& present, const std::vector<std::int64_t>& wanted) {
    std::array<const char*, most_positions> seen{};
    const auto take = [&](std::int64_t position, const char* role) {
        const auto fail = [&](const std::string& what) {
            throw std::invalid_argument("decode: " + std::string(role) + " position " + std::to_string(position) +
                                        what);
        };
        if (position < 0 || position >= static_cast<std::int64_t>(most_positions)) fail(", expected 0 to 255");
        const char*& before = seen[static_cast<std::size_t>(position)];
        if (before != nullptr) fail(std::string(" is already ") + before);
        before = role;
    };
    for (const std::int64_t position : present) take(position, "present");
    for (const std::int64_t position : wanted) take(position, "wanted");
}

// ---- multiplication of blocks

// One matrix made ready, for blocks of at most block_bytes.
class Kernel {
  public:
    Kernel(const Matrix& matrix, bool portable)
        : targets_(matrix.targets), sources_(matrix.sources), portable_(portable || encode_data == nullptr) {
        const std::size_t count = matrix.factors.size();
        tables_.resize(count * (portable_ ? portable_table_bytes : isal_table_bytes));
        if (!portable_) {
            initialise_tables(static_cast<int>(sources_), static_cast<int>(targets_),
                              const_cast<unsigned char*>(matrix.factors.data()), tables_.data());
            return;
        }
        for (std::size_t i = 0; i < tables_.size(); ++i) {
            tables_[i] = product(matrix.factors[i / portable_table_bytes], static_cast<std::uint8_t>(i));
        }
    }

    void operator()(std::int64_t bytes, unsigned char** source, unsigned char** target) const {
        if (portable_) return multiply_by_tables(bytes, source, target);
        encode_data(static_cast<int>(bytes), static_cast<int>(sources_), static_cast<int>(targets_),
                    const_cast<unsigned char*>(tables_.data()), source, target);
    }

  private:
    void multiply_by_tables(std::int64_t bytes, unsigned char** source, unsigned char** target) const {
        for (std::size_t row = 0; row < targets_; ++row) {
            std::fill_n(target[row], bytes, static_cast<unsigned char>(0));
            for (std::size_t column = 0; column < sources_; ++column) {
                const std::uint8_t* table = &tables_[(row * sources_ + column) * portable_table_bytes];
                for (std::int64_t i = 0; i < bytes; ++i) target[row][i] ^= table[source[column][i]];
            }
        }
    }

    std::size_t targets_;
    std::size_t sources_;
    bool portable_;
    std::vector<std::uint8_t> tables_;
};

// Bytes [first, last) of one row: what one thread does at a time.
struct Part {
    std::size_t row;
    std::int64_t first;
    std::int64_t last;
};

// `total`: the bytes of all rows.
std::vector<Part> make_parts(const Rows& rows, double total, std::size_t threads) {
    const double even = std::min(total / static_cast<double>(threads * parts_per_thread), 1.0 * largest_part_bytes);
    const std::int64_t part_bytes =
        std::max<std::int64_t>(static_cast<std::int64_t>(even) / block_bytes, 1) * block_bytes;
    std::vector<Part> parts;
    for (std::size_t row = 0; row < rows.count; ++row) {
        for (std::int64_t first = 0; first < rows.length[row]; first += part_bytes) {
            parts.push_back({row, first, std::min(first + part_bytes, rows.length[row])});
        }
    }
    return parts;
}

void run_part(const Rows& rows, const Matrix& matrix, const Kernel& kernel, const Part& part, std::uint32_t* crc) {
    const std::uint64_t* addresses = rows.source + part.row * matrix.sources;
    const std::int64_t* sizes = rows.size + part.row * matrix.sources;
    std::array<unsigned char*, most_positions> source;
    std::array<unsigned char*, most_positions> target;
    for (std::int64_t offset = part.first, next = 0; offset < part.last; offset = next) {
        // Up to the next multiple of a block, or the nearest end of a source: then each is either whole or zero.
        next = std::min(part.last, (offset / block_bytes + 1) * block_bytes);
        for (std::size_t i = 0; i < matrix.sources; ++i) {
            if (sizes[i] > offset) next = std::min(next, sizes[i]);
            source[i] = sizes[i] > offset ? reinterpret_cast<unsigned char*>(addresses[i]) + offset
                                          : reinterpret_cast<unsigned char*>(zeros);
        }
        for (std::size_t i = 0; i < matrix.targets; ++i) {
            target[i] = reinterpret_cast<unsigned char*>(rows.target[part.row * matrix.targets + i]) + offset;
        }
        kernel(next - offset, source.data(), target.data());
        for (std::size_t i = 0; crc != nullptr && i < matrix.targets; ++i) {
            crc[i] = crc32c::extend(crc[i], target[i], static_cast<std::size_t>(next - offset));
        }
    }
}

void join_checksums(const Rows& rows, std::size_t targets, const std::vector<Part>& parts,
                    const std::vector<std::uint32_t>& checksums) {
    std::fill_n(rows.crc, rows.count * targets, 0u);
    for (std::size_t part = 0; part < parts.size(); ++part) {
        const auto bytes = static_cast<std::uint64_t>(parts[part].last - parts[part].first);
        for (std::size_t i = 0; i < targets; ++i) {
            std::uint32_t& joined = rows.crc[parts[part].row * targets + i];
            joined = crc32c::combine(joined, checksums[part * targets + i], bytes);
        }
    }
}

bool overlap(std::uint64_t left, std::int64_t left_bytes, std::uint64_t right, std::int64_t right_bytes) {
    if (left_bytes == 0 || right_bytes == 0) return false;
    return left < right ? right - left < static_cast<std::uint64_t>(left_bytes)
                        : left - right < static_cast<std::uint64_t>(right_bytes);
}

void check_row(const Rows& rows, const Matrix& matrix, std::size_t row) {
    const auto fail = [&](const std::string& what) {
        throw std::invalid_argument("erasure row " + std::to_string(row) + ": " + what);
    };
    const std::int64_t length = rows.length[row];
    const std::uint64_t* source = rows.source + row * matrix.sources;
    const std::int64_t* size = rows.size + row * matrix.sources;
    const std::uint64_t* target = rows.target + row * matrix.targets;
    if (length < 0) fail("length " + std::to_string(length) + " is negative");
    for (std::size_t i = 0; i < matrix.sources; ++i) {
        if (size[i] < 0 || size[i] > length) {
            fail("source " + std::to_string(i) + " has " + std::to_string(size[i]) + " bytes, expected 0 to " +
                 std::to_string(length));
        }
        if (size[i] > 0 && source[i] == 0) fail("source " + std::to_string(i) + " is at address 0");
    }
    for (std::size_t i = 0; i < matrix.targets && length > 0; ++i) {
        if (target[i] == 0) fail("target " + std::to_string(i) + " is at address 0");
        for (std::size_t j = 0; j < matrix.sources; ++j) {
            if (overlap(target[i], length, source[j], size[j])) {
                fail("target " + std::to_string(i) + " overlaps source " + std::to_string(j));
            }
        }
        for (std::size_t j = 0; j < i; ++j) {
            if (overlap(target[i], length, target[j], length)) {
                fail("target " + std::to_string(i) + " overlaps target " + std::to_string(j));
            }
        }
    }
}

}  // namespace

void prepare() {
    try {
        initialise_tables = reinterpret_cast<InitialiseTables>(isal::function("ec_init_tables"));
        encode_data = reinterpret_cast<EncodeData>(isal::function("ec_encode_data"));
    } catch (const std::runtime_error&) {
        encode_data = nullptr;  // a libisal with checksums alone
    }
}

Matrix encoding_matrix(std::size_t k, std::size_t m) {
    if (k < 1 || k + m > most_positions) {
        throw std::invalid_argument("encode: " + std::to_string(k) + " sources and " + std::to_string(m) +
                                    " targets, expected at least 1 source and at most 256 of both");
    }
    Matrix matrix{m, k, {}};
    for (std::size_t position = k; position < k + m; ++position) {
        for (std::size_t column = 0; column < k; ++column) matrix.factors.push_back(generator(position, column, k));
    }
    return matrix;
}

Matrix decoding_matrix(const std::vector<std::int64_t>& present, const std::vector<std::int64_t>& wanted) {
    check_positions(present, wanted);
    const std::size_t k = present.size();
    if (k < 1) throw std::invalid_argument("decode: no position is present");
    std::vector<std::uint8_t> rows;
    for (const std::int64_t position : present) {
        for (std::size_t column = 0; column < k; ++column) {
            rows.push_back(generator(static_cast<std::size_t>(position), column, k));
        }
    }
    const std::vector<std::uint8_t> data_from_present = inverted(std::move(rows), k);
    Matrix matrix{wanted.size(), k, std::vector<std::uint8_t>(wanted.size() * k, 0)};
    for (std::size_t row = 0; row < wanted.size(); ++row) {
        for (std::size_t column = 0; column < k; ++column) {
            const std::uint8_t factor = generator(static_cast<std::size_t>(wanted[row]), column, k);
            subtract(&matrix.factors[row * k], &data_from_present[column * k], factor, k);
        }
    }
    return matrix;
}

void check_rows(const Rows& rows, const Matrix& matrix) {
    for (std::size_t row = 0; row < rows.count; ++row) check_row(rows, matrix, row);
}

void multiply(const Rows& rows, const Matrix& matrix, std::size_t threads, bool portable) {
    if (matrix.targets == 0) return;
    double total = 0;
    for (std::size_t row = 0; row < rows.count; ++row) total += static_cast<double>(rows.length[row]);
    const double worth = total * static_cast<double>(matrix.sources) / thread_cost_bytes + 1;
    const std::size_t useful = worth < static_cast<double>(threads) ? static_cast<std::size_t>(worth) : threads;
    const std::vector<Part> parts = make_parts(rows, total, useful);
    const Kernel kernel(matrix, portable);
    std::vector<std::uint32_t> checksums(rows.crc != nullptr ? parts.size() * matrix.targets : 0, 0);
    share_tasks(parts.size(), useful, [&](std::size_t part) {
        std::uint32_t* crc = rows.crc != nullptr ? &checksums[part * matrix.targets] : nullptr;
        run_part(rows, matrix, kernel, parts[part], crc);
    });
    if (rows.crc != nullptr) join_checksums(rows, matrix.targets, parts, checksums);
}

}  // namespace ckptd::erasure
