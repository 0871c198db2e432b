// ckptd._native: the only file that sees Python. Checks what it is given (ValueError), releases the GIL, calls.
// ckptd/core/native.py documents the functions and is their only importer.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cerrno>
#include <optional>
#include <string>
#include <vector>

#include "box.hpp"
#include "byteplanes.hpp"
#include "copy.hpp"
#include "crc32c.hpp"
#include "cuda.hpp"
#include "erasure.hpp"
#include "isal.hpp"
#include "memory.hpp"

namespace nb = nanobind;

namespace {

using namespace ckptd;

// The contiguous bytes of an object with the buffer protocol, held for as long as this lives.
class BufferView {
  public:
    BufferView(nb::handle object, bool writable) {
        if (PyObject_GetBuffer(object.ptr(), &view_, writable ? PyBUF_WRITABLE : PyBUF_SIMPLE) != 0) {
            throw nb::python_error();
        }
    }
    BufferView(const BufferView&) = delete;
    BufferView& operator=(const BufferView&) = delete;
    ~BufferView() {
        PyBuffer_Release(&view_);
    }

    std::byte* data() const {
        return static_cast<std::byte*>(view_.buf);
    }
    std::size_t size() const {
        return static_cast<std::size_t>(view_.len);
    }

  private:
    Py_buffer view_;
};

using Column = nb::ndarray<nb::ro>;
using WritableColumn = nb::ndarray<>;

std::string shape_text(const std::vector<std::size_t>& shape) {
    std::string text = "[";
    for (std::size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
    return text + "]";
}

// Checks that a column is a packed array of `Element` in main memory with the shape given. `name` is for the message.
template <typename Element, typename Array>
Element* checked(const Array& array, const std::string& name, const std::vector<std::size_t>& shape) {
    std::vector<std::size_t> found(array.ndim());
    bool packed = true;
    std::int64_t expected = 1;
    for (std::size_t i = array.ndim(); i-- > 0;) {
        found[i] = array.shape(i);
        if (found[i] > 1 && array.stride(i) != expected) packed = false;
        expected *= static_cast<std::int64_t>(found[i]);
    }
    const auto fail = [&](const std::string& what) { throw nb::value_error((name + " " + what).c_str()); };
    if (array.device_type() != nb::device::cpu::value) fail("is not in main memory");
    if (array.dtype() != nb::dtype<std::remove_const_t<Element>>()) fail("has the wrong dtype");
    if (found != shape) fail("has shape " + shape_text(found) + ", expected " + shape_text(shape));
    if (expected > 0 && !packed) fail("is not C-contiguous");
    return static_cast<Element*>(array.data());
}

void require_checksums() {
    if (!crc32c::ready()) throw std::runtime_error("ISA-L is not loaded; call load_isal first");
}

void load_isal(const std::string& path) {
    isal::load(path);
    crc32c::prepare();
    erasure::prepare();
}

std::uint32_t crc32c_of(nb::handle data, std::uint32_t initial) {
    require_checksums();
    const BufferView view(data, false);
    nb::gil_scoped_release released;
    return crc32c::extend(initial, view.data(), view.size());
}

void copy_boxes_of(const Column& source, const Column& target, const Column& sizes, const Column& source_strides,
                   const Column& target_strides, const Column& itemsize, std::optional<WritableColumn> crc,
                   std::int64_t threads) {
    if (source.ndim() != 1) throw nb::value_error("copy_boxes: source is not one-dimensional");
    if (sizes.ndim() != 2) throw nb::value_error("copy_boxes: sizes is not two-dimensional");
    if (threads < 1) throw nb::value_error("copy_boxes: threads is less than 1");
    const std::size_t count = source.shape(0);
    const std::size_t dimensions = sizes.shape(1);
    CopyJobs jobs{count,
                  dimensions,
                  checked<const std::uint64_t>(source, "copy_boxes: source", {count}),
                  checked<const std::uint64_t>(target, "copy_boxes: target", {count}),
                  checked<const std::int64_t>(sizes, "copy_boxes: sizes", {count, dimensions}),
                  checked<const std::int64_t>(source_strides, "copy_boxes: source_strides", {count, dimensions}),
                  checked<const std::int64_t>(target_strides, "copy_boxes: target_strides", {count, dimensions}),
                  checked<const std::int64_t>(itemsize, "copy_boxes: itemsize", {count}),
                  nullptr};
    if (crc.has_value()) {
        require_checksums();
        jobs.crc = checked<std::uint32_t>(*crc, "copy_boxes: crc", {count});
    }
    nb::gil_scoped_release released;
    check_jobs(jobs);
    copy_boxes(jobs, static_cast<std::size_t>(threads));
}

// The columns of rows that `matrix` is to multiply, checked for shape and dtype.
erasure::Rows rows_of(const std::string& function, const erasure::Matrix& matrix, const Column& sources,
                      const Column& sizes, const Column& targets, const Column& lengths,
                      const std::optional<WritableColumn>& crc) {
    const std::size_t count = sources.shape(0);
    const std::vector<std::size_t> inputs{count, matrix.sources};
    const std::vector<std::size_t> outputs{count, matrix.targets};
    if (crc.has_value()) require_checksums();
    return {count,
            checked<const std::uint64_t>(sources, function + ": sources", inputs),
            checked<const std::int64_t>(sizes, function + ": sizes", inputs),
            checked<const std::uint64_t>(targets, function + ": targets", outputs),
            checked<const std::int64_t>(lengths, function + ": lengths", {count}),
            crc.has_value() ? checked<std::uint32_t>(*crc, function + ": crc", outputs) : nullptr};
}

void multiply_rows(const erasure::Rows& rows, const erasure::Matrix& matrix, std::int64_t threads, bool portable) {
    nb::gil_scoped_release released;
    erasure::check_rows(rows, matrix);
    erasure::multiply(rows, matrix, static_cast<std::size_t>(threads), portable);
}

void require_rows(const std::string& function, const Column& sources, const Column& targets, std::int64_t threads) {
    if (sources.ndim() != 2) throw nb::value_error((function + ": sources is not two-dimensional").c_str());
    if (targets.ndim() != 2) throw nb::value_error((function + ": targets is not two-dimensional").c_str());
    if (threads < 1) throw nb::value_error((function + ": threads is less than 1").c_str());
}

void erasure_encode(const Column& sources, const Column& sizes, const Column& targets, const Column& lengths,
                    std::optional<WritableColumn> crc, std::int64_t threads, bool portable) {
    require_rows("erasure_encode", sources, targets, threads);
    const erasure::Matrix matrix = erasure::encoding_matrix(sources.shape(1), targets.shape(1));
    multiply_rows(rows_of("erasure_encode", matrix, sources, sizes, targets, lengths, crc), matrix, threads, portable);
}

void erasure_decode(const std::vector<std::int64_t>& present, const std::vector<std::int64_t>& wanted,
                    const Column& sources, const Column& sizes, const Column& targets, const Column& lengths,
                    std::optional<WritableColumn> crc, std::int64_t threads, bool portable) {
    require_rows("erasure_decode", sources, targets, threads);
    const erasure::Matrix matrix = erasure::decoding_matrix(present, wanted);
    multiply_rows(rows_of("erasure_decode", matrix, sources, sizes, targets, lengths, crc), matrix, threads, portable);
}

std::uint32_t copy_bytes(std::uint64_t source_address, nb::handle target, bool crc) {
    if (crc) require_checksums();
    const BufferView view(target, true);
    if (source_address == 0 && view.size() > 0) throw nb::value_error("copy_bytes: source address is 0");
    nb::gil_scoped_release released;
    std::uint32_t checksum = 0;
    if (view.size() > 0) {
        const Box box(reinterpret_cast<const std::byte*>(source_address), view.data(),
                      static_cast<std::int64_t>(view.size()));
        copy_box(box, crc ? &checksum : nullptr);
    }
    return checksum;
}

std::uint64_t address_of(nb::handle buffer) {
    return reinterpret_cast<std::uintptr_t>(BufferView(buffer, false).data());
}

// Planes of items of `itemsize` bytes that fill `items` buffer, in buffers of the sizes that the planes need.
byteplanes::Planes checked_planes(const BufferView& items, const BufferView& rest, const BufferView* blocks,
                                  std::int64_t itemsize, std::int64_t leading, std::int64_t block, std::int64_t gap) {
    if (itemsize < 1 || itemsize > static_cast<std::int64_t>(byteplanes::max_itemsize)) {
        throw nb::value_error("byteplanes: itemsize is not 1 to 64");
    }
    if (leading < 0 || leading > itemsize) throw nb::value_error("byteplanes: leading is not 0 to itemsize");
    if (leading > 0 && (block < 1 || gap < 0 || gap > block)) throw nb::value_error("byteplanes: block or gap");
    const auto width = static_cast<std::size_t>(itemsize);
    if (items.size() % width != 0) {
        throw nb::value_error(("byteplanes: items have " + std::to_string(items.size()) +
                               " bytes, expected a multiple of itemsize " + std::to_string(itemsize))
                                  .c_str());
    }
    const byteplanes::Planes planes{rest.data(),
                                    blocks == nullptr ? nullptr : blocks->data(),
                                    items.size() / width,
                                    width,
                                    static_cast<std::size_t>(leading),
                                    static_cast<std::size_t>(block),
                                    static_cast<std::size_t>(gap)};
    const std::size_t blocks_bytes = blocks == nullptr ? 0 : blocks->size();
    if (rest.size() != planes.rest_bytes() || blocks_bytes != planes.blocks_bytes()) {
        throw nb::value_error(("byteplanes: planes have " + std::to_string(rest.size()) + " bytes, blocks " +
                               std::to_string(blocks_bytes) + "; expected " + std::to_string(planes.rest_bytes()) +
                               " and " + std::to_string(planes.blocks_bytes()))
                                  .c_str());
    }
    return planes;
}

// Calls work(items, planes) without the GIL.
template <typename Work>
std::uint32_t with_planes(nb::handle items, bool items_writable, nb::handle rest, nb::handle blocks,
                          std::int64_t itemsize, std::int64_t leading, std::int64_t block, std::int64_t gap,
                          const Work& work) {
    require_checksums();
    const BufferView whole(items, items_writable);
    const BufferView others(rest, !items_writable);
    std::optional<BufferView> cut;
    if (!blocks.is_none()) cut.emplace(blocks, !items_writable);
    const auto planes = checked_planes(whole, others, cut ? &*cut : nullptr, itemsize, leading, block, gap);
    nb::gil_scoped_release released;
    return work(whole.data(), planes);
}

std::uint32_t split_planes(nb::handle source, nb::handle planes, std::int64_t itemsize, nb::handle blocks,
                           std::int64_t leading, std::int64_t block, std::int64_t gap) {
    return with_planes(source, false, planes, blocks, itemsize, leading, block, gap, byteplanes::split);
}

std::uint32_t join_planes(nb::handle planes, nb::handle target, std::int64_t itemsize, nb::handle blocks,
                          std::int64_t leading, std::int64_t block, std::int64_t gap) {
    return with_planes(target, true, planes, blocks, itemsize, leading, block, gap,
                       [](std::byte* at, const byteplanes::Planes& found) { return byteplanes::join(found, at); });
}

std::shared_ptr<cuda::Copy> cuda_copy(cuda::Engine& engine, int device, const std::vector<cuda::Stream>& after,
                                      const Column& source, const Column& target, const Column& sizes,
                                      const Column& source_strides, const Column& itemsize) {
    if (source.ndim() != 1) throw nb::value_error("Cuda.copy: source is not one-dimensional");
    if (sizes.ndim() != 2) throw nb::value_error("Cuda.copy: sizes is not two-dimensional");
    const std::size_t count = source.shape(0);
    const std::size_t dimensions = sizes.shape(1);
    const auto* strides = checked<const std::int64_t>(source_strides, "Cuda.copy: source_strides", {count, dimensions});
    const CopyJobs jobs{count,
                        dimensions,
                        checked<const std::uint64_t>(source, "Cuda.copy: source", {count}),
                        checked<const std::uint64_t>(target, "Cuda.copy: target", {count}),
                        checked<const std::int64_t>(sizes, "Cuda.copy: sizes", {count, dimensions}),
                        strides,
                        strides,
                        checked<const std::int64_t>(itemsize, "Cuda.copy: itemsize", {count}),
                        nullptr};
    nb::gil_scoped_release released;
    check_jobs(jobs);
    return engine.copy(device, after, jobs);
}

void define_cuda(nb::module_& module) {
    using namespace nb::literals;
    using Released = nb::call_guard<nb::gil_scoped_release>;
    nb::class_<cuda::Copy>(module, "CudaCopy")
        .def("hold", &cuda::Copy::hold, "stream"_a, Released())
        .def("finished", &cuda::Copy::finished, "seconds"_a, Released())
        .def("settle", &cuda::Copy::settle, Released())
        .def_prop_ro("error", &cuda::Copy::error);
    nb::class_<cuda::Engine>(module, "Cuda")
        .def(nb::init<const std::string&>(), "library"_a)
        .def("pin", &cuda::Engine::pin, "device"_a, "address"_a, "size"_a, Released())
        .def("unpin", &cuda::Engine::unpin, "device"_a, "address"_a, Released())
        .def("copy", &cuda_copy, "device"_a, "after"_a, "source"_a.noconvert(), "target"_a.noconvert(),
             "sizes"_a.noconvert(), "source_strides"_a.noconvert(), "itemsize"_a.noconvert())
        .def("close", &cuda::Engine::close, Released());
}

void populate_pages(std::uint64_t address, std::uint64_t size, bool write) {
    int error = 0;
    {
        nb::gil_scoped_release released;
        error = populate(address, size, write);
    }
    if (error != 0) {
        errno = error;
        PyErr_SetFromErrno(PyExc_OSError);
        throw nb::python_error();
    }
}

std::uint64_t huge_pages(int descriptor, std::uint64_t offset, std::uint64_t size, int most_slow) {
    nb::gil_scoped_release released;
    return back_with_huge_pages(descriptor, offset, size, most_slow);
}

}  // namespace

NB_MODULE(_native, module) {
    using namespace nb::literals;
    module.doc() = "Native parts of ckptd; see ckptd.core.native.";
    module.def("load_isal", &load_isal, "path"_a);
    module.def("crc32c", &crc32c_of, "data"_a, "initial"_a = 0);
    module.def("crc32c_combine", &crc32c::combine, "first"_a, "second"_a, "second_bytes"_a);
    module.def("copy_boxes", &copy_boxes_of, "source"_a.noconvert(), "target"_a.noconvert(), "sizes"_a.noconvert(),
               "source_strides"_a.noconvert(), "target_strides"_a.noconvert(), "itemsize"_a.noconvert(), nb::kw_only(),
               "crc"_a.noconvert() = nb::none(), "threads"_a = 1);
    module.def("helpers_cpu_s", &helpers_cpu_seconds);
    module.def("copy_bytes", &copy_bytes, "source_address"_a, "target"_a, "crc"_a = true);
    module.def("address_of", &address_of, "buffer"_a);
    module.def("byteplanes_split", &split_planes, "source"_a, "planes"_a, "itemsize"_a, "blocks"_a = nb::none(),
               "leading"_a = 0, "block"_a = 0, "gap"_a = 0);
    module.def("byteplanes_join", &join_planes, "planes"_a, "target"_a, "itemsize"_a, "blocks"_a = nb::none(),
               "leading"_a = 0, "block"_a = 0, "gap"_a = 0);
    module.def("erasure_encode", &erasure_encode, "sources"_a.noconvert(), "sizes"_a.noconvert(),
               "targets"_a.noconvert(), "lengths"_a.noconvert(), nb::kw_only(), "crc"_a.noconvert() = nb::none(),
               "threads"_a = 1, "portable"_a = false);
    module.def("erasure_decode", &erasure_decode, "present"_a, "wanted"_a, "sources"_a.noconvert(),
               "sizes"_a.noconvert(), "targets"_a.noconvert(), "lengths"_a.noconvert(), nb::kw_only(),
               "crc"_a.noconvert() = nb::none(), "threads"_a = 1, "portable"_a = false);
    module.def("populate", &populate_pages, "address"_a, "size"_a, nb::kw_only(), "write"_a = true);
    module.def("back_with_huge_pages", &huge_pages, "descriptor"_a, "offset"_a, "size"_a, "most_slow"_a);
    define_cuda(module);
}
