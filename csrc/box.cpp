#include "box.hpp"

#include <cstring>
#include <memory>
#include <type_traits>

#include "crc32c.hpp"
#include "run.hpp"
#include "transpose.hpp"

namespace ckptd {

namespace {

constexpr std::int64_t short_run_bytes = 256;            // shorter runs are gathered before they are checksummed
constexpr std::int64_t streamed_run_bytes = 2048;        // of shorter runs too much lies in broken lines
constexpr std::int64_t streamed_box_bytes = 256 * 1024;  // smaller boxes may well be read again soon
constexpr std::int64_t slab_bytes = 2 * 1024 * 1024;     // moved, then checksummed while the caches hold it
constexpr std::size_t source_tile_bytes = 256;  // of a tile's lines: the source's are in as many pages as there are
constexpr std::size_t target_tile_bytes = 64;   // lines, so that each visit should bring several cache lines

// Two dimensions of a box, the inner one second.
struct Plane {
    Dimension outer;
    Dimension inner;
};

// `unit` bytes at a time; 0: `run` bytes, known only at run time.
template <std::size_t unit>
void move_rectangle(const std::byte* source, std::byte* target, const Plane& plane, std::size_t run) {
    for (std::int64_t i = 0; i < plane.outer.size; ++i) {
        const std::byte* from = source + i * plane.outer.source_stride;
        std::byte* to = target + i * plane.outer.target_stride;
        for (std::int64_t j = 0; j < plane.inner.size; ++j) {
            std::memcpy(to, from, unit == 0 ? run : unit);
            from += plane.inner.source_stride;
            to += plane.inner.target_stride;
        }
    }
}

template <std::size_t unit>
using ElementOf = std::conditional_t<
    unit == 1, std::uint8_t,
    std::conditional_t<unit == 2, std::uint16_t, std::conditional_t<unit == 4, std::uint32_t, std::uint64_t>>>;

// Transposes a tile whose lines lie packed on each side. By way of buffers, so that each line of memory is touched
// once: strides are often powers of two, and lines that far apart push each other out of the caches.
template <std::size_t unit>
void transpose_tile(const std::byte* source, std::byte* target, const Plane& plane) {
    using Element = ElementOf<unit>;
    constexpr std::size_t lanes = Vector<Element>::lanes;
    constexpr std::size_t rows = source_tile_bytes / unit;
    constexpr std::size_t columns = target_tile_bytes / unit;
    alignas(64) std::byte gathered[columns * source_tile_bytes];
    alignas(64) std::byte transposed[rows * target_tile_bytes];
    for (std::size_t j = 0; j < columns; ++j) {
        std::memcpy(gathered + j * source_tile_bytes, source + static_cast<std::int64_t>(j) * plane.inner.source_stride,
                    source_tile_bytes);
    }
    for (std::size_t i = 0; i < rows; i += lanes) {
        for (std::size_t j = 0; j < columns; j += lanes) {
            const auto block =
                load_block<Element, lanes>(gathered + j * source_tile_bytes + i * unit, source_tile_bytes);
            store_block<Element, lanes>(transposed + i * target_tile_bytes + j * unit, target_tile_bytes,
                                        split_block<Element, lanes>(block));
        }
    }
    for (std::size_t i = 0; i < rows; ++i) {
        std::memcpy(target + static_cast<std::int64_t>(i) * plane.outer.target_stride,
                    transposed + i * target_tile_bytes, target_tile_bytes);
    }
}

// Moves a plane in tiles, since its two sides run in different directions, as in a transposed matrix.
template <std::size_t unit>
void move_transposed(const std::byte* source, std::byte* target, const Plane& plane, std::size_t run) {
    constexpr bool vectors = unit != 0 && unit < vector_bytes;
    constexpr std::int64_t rows = source_tile_bytes / (unit == 0 ? vector_bytes : unit);
    constexpr std::int64_t columns = target_tile_bytes / (unit == 0 ? vector_bytes : unit);
    const bool packed = vectors && plane.outer.source_stride == unit && plane.inner.target_stride == unit;
    for (std::int64_t i = 0; i < plane.outer.size; i += rows) {
        for (std::int64_t j = 0; j < plane.inner.size; j += columns) {
            Plane part = plane;
            part.outer.size = std::min(rows, plane.outer.size - i);
            part.inner.size = std::min(columns, plane.inner.size - j);
            const std::byte* from = source + i * plane.outer.source_stride + j * plane.inner.source_stride;
            std::byte* to = target + i * plane.outer.target_stride + j * plane.inner.target_stride;
            if constexpr (vectors) {
                if (packed && part.outer.size == rows && part.inner.size == columns) {
                    transpose_tile<unit>(from, to, part);
                    continue;
                }
            }
            move_rectangle<unit>(from, to, part, run);
        }
    }
}

using MovePlane = void (*)(const std::byte*, std::byte*, const Plane&, std::size_t);

template <std::size_t unit>
MovePlane plane_mover(bool transposed) {
    return transposed ? move_transposed<unit> : move_rectangle<unit>;
}

MovePlane choose_mover(std::int64_t run, bool transposed) {
    switch (run) {
        case 1:
            return plane_mover<1>(transposed);
        case 2:
            return plane_mover<2>(transposed);
        case 4:
            return plane_mover<4>(transposed);
        case 8:
            return plane_mover<8>(transposed);
        case 16:
            return plane_mover<16>(transposed);
        default:
            return plane_mover<0>(transposed);
    }
}

std::size_t smallest_stride(const Box& box, std::int64_t Dimension::* stride) {
    std::size_t found = box.count - 1;
    for (std::size_t i = box.count - 1; i-- > 0;) {
        if (box.dimensions[i].*stride < box.dimensions[found].*stride) found = i;
    }
    return found;
}

// Calls `visit(source, target)` at every position of the dimensions given, in row-major order.
template <typename Visit>
void for_each_position(const Dimension* dimensions, std::size_t count, const std::byte* source, std::byte* target,
                       Visit&& visit) {
    std::array<std::int64_t, max_dimensions> position{};
    while (true) {
        visit(source, target);
        std::size_t i = count;
        for (; i > 0; --i) {
            const Dimension& dimension = dimensions[i - 1];
            source += dimension.source_stride;
            if (target != nullptr) target += dimension.target_stride;
            if (++position[i - 1] < dimension.size) break;
            position[i - 1] = 0;
            source -= dimension.size * dimension.source_stride;
            if (target != nullptr) target -= dimension.size * dimension.target_stride;
        }
        if (i == 0) return;
    }
}

// A slab whose short runs are not packed in the target goes through here.
std::byte* staging() {
    thread_local std::unique_ptr<std::byte[]> buffer(new std::byte[slab_bytes]);
    return buffer.get();
}

// The checksum is of what was copied, even where the source changes meanwhile.
void copy_slab(const Box& slab, std::uint32_t* crc) {
    const auto bytes = static_cast<std::size_t>(slab.bytes());
    if (slab.target == nullptr && slab.packed(&Dimension::source_stride)) {
        *crc = crc32c::extend(*crc, slab.source, bytes);
        return;
    }
    if (slab.target != nullptr && slab.packed(&Dimension::target_stride)) {
        move_box(slab);
        *crc = crc32c::extend(*crc, slab.target, bytes);
        return;
    }
    Box gather(slab);
    gather.target = staging();
    gather.pack(&Dimension::target_stride);
    move_box(gather);
    *crc = crc32c::extend(*crc, gather.target, bytes);
    if (slab.target == nullptr) return;
    Box scatter(slab);
    scatter.source = gather.target;
    scatter.pack(&Dimension::source_stride);
    move_box(scatter);
}

}  // namespace

void move_box(const Box& box) {
    if (box.count == 0) {
        std::memcpy(box.target, box.source, static_cast<std::size_t>(box.run));
        return;
    }
    const std::size_t inner = smallest_stride(box, &Dimension::target_stride);
    std::size_t outer = smallest_stride(box, &Dimension::source_stride);
    const bool transposed = outer != inner;
    std::array<Dimension, max_dimensions> others;
    std::size_t count = 0;
    Plane plane{{1, 0, 0}, box.dimensions[inner]};
    if (!transposed) outer = inner > 0 ? inner - 1 : box.count > 1 ? 1 : 0;
    if (outer != inner) plane.outer = box.dimensions[outer];
    for (std::size_t i = 0; i < box.count; ++i) {
        if (i != inner && i != outer) others[count++] = box.dimensions[i];
    }
    const MovePlane move = choose_mover(box.run, transposed);
    const auto run = static_cast<std::size_t>(box.run);
    for_each_position(others.data(), count, box.source, box.target,
                      [&](const std::byte* source, std::byte* target) { move(source, target, plane, run); });
}

void copy_box(const Box& box, std::uint32_t* crc) {
    if (box.count > 0 && box.run < short_run_bytes) {
        for_each_part(box, slab_bytes, [&](const Box& slab) {
            if (crc != nullptr) {
                copy_slab(slab, crc);
            } else {
                move_box(slab);
            }
        });
        return;
    }
    const bool streamed = box.target != nullptr && box.run >= streamed_run_bytes && box.bytes() >= streamed_box_bytes;
    const Store store = streamed ? Store::streamed : Store::cached;
    const auto bytes = static_cast<std::size_t>(box.run);
    for_each_position(box.dimensions.data(), box.count, box.source, box.target,
                      [&](const std::byte* source, std::byte* target) { copy_run(source, target, bytes, crc, store); });
    if (streamed) finish_streamed();
}

}  // namespace ckptd
