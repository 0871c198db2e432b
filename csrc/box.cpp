#include "box.hpp"

#include <cstring>
#include <memory>

#include "crc32c.hpp"
#include "run.hpp"

namespace ckptd {

namespace {

constexpr std::int64_t short_run_bytes = 256;    // shorter runs are gathered before they are checksummed
constexpr std::int64_t slab_bytes = 512 * 1024;  // moved, then checksummed out of the second-level cache
constexpr std::int64_t tile = 32;                // elements a side: a tile's lines of both sides fit the first level

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

using MoveRectangle = void (*)(const std::byte*, std::byte*, const Plane&, std::size_t);

MoveRectangle rectangle_mover(std::int64_t run) {
    switch (run) {
        case 1:
            return move_rectangle<1>;
        case 2:
            return move_rectangle<2>;
        case 4:
            return move_rectangle<4>;
        case 8:
            return move_rectangle<8>;
        case 16:
            return move_rectangle<16>;
        default:
            return move_rectangle<0>;
    }
}

// Moves a plane in tiles where its two sides run in different directions, as in a transposed matrix.
void move_plane(const std::byte* source, std::byte* target, const Plane& plane, std::int64_t run, bool transposed) {
    const MoveRectangle move = rectangle_mover(run);
    const auto bytes = static_cast<std::size_t>(run);
    if (!transposed) return move(source, target, plane, bytes);
    for (std::int64_t i = 0; i < plane.outer.size; i += tile) {
        for (std::int64_t j = 0; j < plane.inner.size; j += tile) {
            Plane part = plane;
            part.outer.size = std::min(tile, plane.outer.size - i);
            part.inner.size = std::min(tile, plane.inner.size - j);
            move(source + i * plane.outer.source_stride + j * plane.inner.source_stride,
                 target + i * plane.outer.target_stride + j * plane.inner.target_stride, part, bytes);
        }
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

// A slab whose short runs are packed on neither side goes through here.
std::byte* staging() {
    thread_local std::unique_ptr<std::byte[]> buffer(new std::byte[slab_bytes]);
    return buffer.get();
}

void copy_slab(const Box& slab, std::uint32_t* crc) {
    const auto bytes = static_cast<std::size_t>(slab.bytes());
    if (slab.packed(&Dimension::source_stride)) {
        *crc = crc32c::extend(*crc, slab.source, bytes);
        if (slab.target != nullptr) move_box(slab);
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
    for_each_position(others.data(), count, box.source, box.target, [&](const std::byte* source, std::byte* target) {
        move_plane(source, target, plane, box.run, transposed);
    });
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
    const auto bytes = static_cast<std::size_t>(box.run);
    for_each_position(box.dimensions.data(), box.count, box.source, box.target,
                      [&](const std::byte* source, std::byte* target) { copy_run(source, target, bytes, crc); });
}

}  // namespace ckptd
