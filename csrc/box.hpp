// A strided box to copy: where its first byte is on both sides, and its dimensions from the outermost in.
//
// Logical order is row-major. `run` is how many bytes lie together on both sides: the innermost dimension's if that is
// packed on both, else one element's. Boxes are normalised on construction: no dimension of size 1, none that could be
// merged with its neighbour.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>

namespace ckptd {

constexpr std::size_t max_dimensions = 64;

struct Dimension {
    std::int64_t size;
    std::int64_t source_stride;  // bytes, not negative
    std::int64_t target_stride;
};

class Box {
  public:
    Box(const std::byte* source, std::byte* target, std::int64_t itemsize)
        : source(source), target(target), run(itemsize) {}

    Box(const Box& other) : source(other.source), target(other.target), run(other.run), count(other.count) {
        std::copy_n(other.dimensions.begin(), count, dimensions.begin());
    }
    Box& operator=(const Box&) = delete;

    // Appends the next dimension inwards, merging it into the one before where both sides allow it.
    void append(const Dimension& inner) {
        if (inner.size == 1) return;
        if (count > 0) {
            Dimension& outer = dimensions[count - 1];
            if (outer.source_stride == inner.size * inner.source_stride &&
                outer.target_stride == inner.size * inner.target_stride) {
                outer = {outer.size * inner.size, inner.source_stride, inner.target_stride};
                return;
            }
        }
        dimensions[count++] = inner;
    }

    // Call after the last append: takes a packed innermost dimension into the run.
    void finish() {
        if (count == 0) return;
        const Dimension& last = dimensions[count - 1];
        if (last.source_stride != run || last.target_stride != run) return;
        run *= last.size;
        --count;
    }

    std::int64_t bytes() const {
        std::int64_t product = run;
        for (std::size_t i = 0; i < count; ++i) product *= dimensions[i].size;
        return product;
    }

    // Rows [first, first + rows) of the outermost dimension.
    Box part(std::int64_t first, std::int64_t rows) const {
        Box made(*this);
        made.advance(first * dimensions[0].source_stride, first * dimensions[0].target_stride);
        made.dimensions[0].size = rows;
        return made;
    }

    // One row of the outermost dimension, without that dimension.
    Box row(std::int64_t index) const {
        Box made(source, target, run);
        made.advance(index * dimensions[0].source_stride, index * dimensions[0].target_stride);
        made.count = count - 1;
        std::copy_n(dimensions.begin() + 1, made.count, made.dimensions.begin());
        return made;
    }

    void advance(std::int64_t source_bytes, std::int64_t target_bytes) {
        source += source_bytes;
        if (target != nullptr) target += target_bytes;
    }

    // Whether the bytes of one side lie together in logical order.
    bool packed(std::int64_t Dimension::* stride) const {
        std::int64_t expected = run;
        for (std::size_t i = count; i-- > 0;) {
            if (dimensions[i].size != 1 && dimensions[i].*stride != expected) return false;
            expected *= dimensions[i].size;
        }
        return true;
    }

    // Makes one side a packed buffer in logical order.
    void pack(std::int64_t Dimension::* stride) {
        std::int64_t expected = run;
        for (std::size_t i = count; i-- > 0;) {
            dimensions[i].*stride = expected;
            expected *= dimensions[i].size;
        }
    }

    const std::byte* source;
    std::byte* target;  // null: only a checksum is wanted
    std::int64_t run;
    std::size_t count = 0;
    std::array<Dimension, max_dimensions> dimensions;
};

// Calls `visit` with parts of at most `limit` bytes (one run of a box may be cut, one element never is) that make up
// `box` in logical order.
template <typename Visit>
void for_each_part(const Box& box, std::int64_t limit, Visit&& visit) {
    const std::int64_t bytes = box.bytes();
    if (bytes <= limit) {
        visit(box);
        return;
    }
    if (box.count == 0) {
        for (std::int64_t at = 0; at < bytes; at += limit) {
            Box part(box.source, box.target, std::min(limit, bytes - at));
            part.advance(at, at);
            visit(part);
        }
        return;
    }
    const std::int64_t rows = box.dimensions[0].size;
    const std::int64_t together = limit / (bytes / rows);
    if (together == 0) {
        for (std::int64_t i = 0; i < rows; ++i) for_each_part(box.row(i), limit, visit);
        return;
    }
    for (std::int64_t i = 0; i < rows; i += together) visit(box.part(i, std::min(together, rows - i)));
}

// Copies a box, without a checksum, in the order that suits the caches.
void move_box(const Box& box);

// Copies a box and continues `*crc` with its bytes in logical order; either may be left out (`target`, `crc` null).
void copy_box(const Box& box, std::uint32_t* crc);

}  // namespace ckptd
