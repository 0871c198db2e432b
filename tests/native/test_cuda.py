"""Copies from CUDA devices, on a fake driver: what is queued when, on which streams, after which events; that the bytes
are those of the boundary in every order that streams allow; and what becomes of errors."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import pytest

from ckptd.core.native import Cuda, CudaCopy, address_of
from tests.native.fake_cuda import Fake, library

Bytes = npt.NDArray[np.uint8]
SEEDS = range(20)
WAIT_S = 10.0


@pytest.fixture
def fake() -> Iterator[Fake]:
    made = Fake(library())
    yield made
    assert made.misuse == ""
    made.reset()


@pytest.fixture
def cuda(fake: Fake) -> Iterator[Cuda]:
    """Whatever a test does, nothing of the driver is left at its end."""
    made = Cuda(fake.library)
    yield made
    made.close()
    assert fake.live == 0


def copy_arrays(
    cuda: Cuda,
    arrays: Sequence[npt.NDArray[np.generic]],
    targets: Sequence[Bytes],
    after: Sequence[int],
    device: int = 0,
) -> CudaCopy:
    """One batch: each array, as it lies, to its packed target."""
    width = max(array.ndim for array in arrays)
    pad = [(*(1,) * (width - array.ndim),) for array in arrays]
    return cuda.copy(
        device,
        after,
        np.array([array.__array_interface__["data"][0] for array in arrays], np.uint64),
        np.array([address_of(target) for target in targets], np.uint64),
        np.array([(*array.shape, *ones) for array, ones in zip(arrays, pad, strict=True)], np.int64),
        np.array([(*array.strides, *ones) for array, ones in zip(arrays, pad, strict=True)], np.int64),
        np.array([array.itemsize for array in arrays], np.int64),
    )


def room(arrays: Sequence[npt.NDArray[np.generic]]) -> list[Bytes]:
    """Packed targets, one after the other, 64 bytes apart as in a slot."""
    ends = np.cumsum([-(-array.size * array.itemsize // 64) * 64 for array in arrays])
    memory = np.zeros(int(ends[-1]) if len(ends) else 0, np.uint8)
    starts = [0, *ends[:-1].tolist()]
    return [memory[start : start + a.size * a.itemsize] for start, a in zip(starts, arrays, strict=True)]


def packed(array: npt.NDArray[np.generic]) -> bytes:
    return np.ascontiguousarray(array).tobytes()


def random_array(shape: Sequence[int], seed: int = 0) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).random(tuple(shape), np.float32)


def test_a_step_is_copied_as_it_was_in_every_order(fake: Fake, cuda: Cuda) -> None:
    """Step n is queued, then the copy, then the next step, which waits: whatever the device does first, step n is what
    arrives, and step n + 1 what is there at the end."""
    for seed in SEEDS:
        state, target = random_array([5000]), room([random_array([5000])])
        stream = fake.stream()
        step, following = random_array([5000], 2 * seed + 1).tobytes(), random_array([5000], 2 * seed + 2).tobytes()
        fake.kernel(stream, state.ctypes.data, step)
        copy = copy_arrays(cuda, [state], target, [stream])
        assert copy.hold(stream)
        fake.kernel(stream, state.ctypes.data, following)
        assert not copy.finished(0.0)
        fake.run(seed)
        assert copy.finished(0.0)
        copy.settle()
        assert target[0].tobytes() == step
        assert state.tobytes() == following


@pytest.mark.parametrize("first", ["copies", "training"])
def test_without_waits_the_bytes_are_wrong(fake: Fake, cuda: Cuda, first: str) -> None:
    """The test above can fail: on a driver that ignores waits, both orders yield what is not step n."""
    state, target = random_array([5000]), room([random_array([5000])])
    stream = fake.stream()
    step, following = random_array([5000], 1).tobytes(), random_array([5000], 2).tobytes()
    fake.kernel(stream, state.ctypes.data, step)
    copy = copy_arrays(cuda, [state], target, [stream])
    copy.hold(stream)
    fake.kernel(stream, state.ctypes.data, following)
    fake.ignore_waits(True)
    fake.prefer(stream if first == "training" else None, 1)
    fake.run()
    assert copy.finished(0.0)
    assert target[0].tobytes() != step


def test_a_stream_that_nobody_holds_back_runs_on(fake: Fake, cuda: Cuda) -> None:
    """Forward and backward do not wait: only what is queued after `hold` does."""
    state, target, loss = random_array([100]), room([random_array([100])]), random_array([1])
    stream = fake.stream()
    copy = copy_arrays(cuda, [state], target, [stream])
    fake.prefer(stream, 1)
    fake.kernel(stream, loss.ctypes.data, b"\1\2\3\4")
    fake.run(most=2)  # the record and the loss; none of them the copy
    assert loss.tobytes() == b"\1\2\3\4"
    assert not copy.finished(0.0)
    fake.run()
    assert copy.finished(WAIT_S)


def test_the_order_of_calls(fake: Fake, cuda: Cuda) -> None:
    """An event of the training's stream comes before the first copy, the event of the batch after the last."""
    arrays = [random_array([3000]), random_array([20, 30])[:, 5:20], random_array([2000])]
    targets = room(arrays)
    stream = fake.stream()
    copy = copy_arrays(cuda, arrays, targets, [stream])
    kinds = ("cuStreamIsCapturing", "cuEventRecord", "cuStreamWaitEvent", "cuMemcpyDtoHAsync_v2", "cuMemcpy2DAsync_v2")
    assert [name for name in fake.log if name in kinds] == [
        "cuStreamIsCapturing",
        "cuEventRecord",
        "cuStreamWaitEvent",
        "cuMemcpy2DAsync_v2",
        "cuMemcpyDtoHAsync_v2",
        "cuMemcpyDtoHAsync_v2",
        "cuEventRecord",
    ]
    copy.hold(stream)
    assert fake.log[-4:-2] == ["cuStreamIsCapturing", "cuStreamWaitEvent"]
    assert not {"cuStreamQuery", "cuEventQuery"} & set(fake.log)
    fake.run()
    assert copy.finished(0.0)


def boxes() -> dict[str, npt.NDArray[np.generic]]:
    base = random_array([12, 10, 8])
    big = random_array([300, 400])
    return {
        "packed": big,
        "rows": big[10:200],
        "columns": big[:, 30:90],
        "one column": big[:, 7:8],
        "transposed": big.T,
        "part of a transposed": big.T[50:60, 20:280],
        "channels last": base.transpose(0, 2, 1),
        "reversed dimensions": base.transpose(2, 1, 0),
        "inner box": base[2:7, 3:9, 1:5],
        "every other": big[::2, ::3],
        "expanded": np.broadcast_to(random_array([1, 40]), (30, 40)),
        "expanded within": np.broadcast_to(random_array([30, 1]), (30, 40)),
        "one value": np.broadcast_to(random_array([1]), (5, 6)),
        "scalar": np.array(3.5),
        "empty": random_array([0, 4]),
        "bytes": np.arange(200, dtype=np.uint8),
        "overlapping": np.lib.stride_tricks.as_strided(random_array([64]), (8, 8), (8, 4)),
    }


@pytest.mark.parametrize("name", list(boxes()))
def test_boxes_of_every_kind(fake: Fake, cuda: Cuda, name: str) -> None:
    array = boxes()[name]
    target = room([array])
    copy = copy_arrays(cuda, [array], target, [])
    fake.run()
    assert copy.finished(0.0)
    copy.settle()
    assert target[0].tobytes() == packed(array)


@pytest.mark.parametrize(
    ("name", "calls"), [("transposed", 1), ("channels last", 1), ("columns", 1), ("one column", 1)]
)
def test_a_permuted_box_is_one_copy(fake: Fake, cuda: Cuda, name: str, calls: int) -> None:
    """It comes in the order of its memory, not element by element."""
    array = boxes()[name]
    target = room([array])
    copy = copy_arrays(cuda, [array], target, [])
    assert fake.calls("cuMemcpyDtoHAsync_v2") + fake.calls("cuMemcpy2DAsync_v2") == calls
    fake.run()
    assert copy.finished(0.0)


def test_random_boxes_in_one_batch(fake: Fake, cuda: Cuda) -> None:
    random = np.random.default_rng(7)
    arrays = []
    for _ in range(300):
        shape = random.integers(1, 9, size=int(random.integers(1, 5)))
        array = random_array([int(s) * 3 for s in shape], int(random.integers(1000)))
        cut = tuple(slice(int(random.integers(0, s)), None, int(random.integers(1, 3))) for s in array.shape)
        arrays.append(array[cut].transpose(random.permutation(array.ndim)))
    targets = room(arrays)
    copy = copy_arrays(cuda, arrays, targets, [])
    fake.run()
    assert copy.finished(0.0)
    copy.settle()
    assert [target.tobytes() for target in targets] == [packed(array) for array in arrays]


def test_fifty_thousand_small_tensors(fake: Fake, cuda: Cuda) -> None:
    """As the caching allocator lays them: 512 bytes apart, in segments of 2 MiB. They come in one copy a segment."""
    count, segment = 50_000, 2 * 1024 * 1024
    memory = np.random.default_rng(0).integers(0, 256, -(-count * 512 // segment) * segment, np.uint8)
    for start in range(0, len(memory), segment):
        fake.memory(memory.ctypes.data + start, segment)
    arrays = [memory[512 * i : 512 * i + 4 + 4 * (i % 64)] for i in range(count)]
    targets = room(arrays)
    before = fake.calls()
    copy = copy_arrays(cuda, arrays, targets, [fake.stream()])
    assert fake.calls("cuMemcpyDtoHAsync_v2") == len(memory) // segment
    assert fake.calls() - before < 100
    fake.run()
    assert copy.finished(0.0)
    copy.settle()
    assert all(target.tobytes() == array.tobytes() for target, array in zip(targets, arrays, strict=True))


def test_small_tensors_far_apart_come_alone(fake: Fake, cuda: Cuda) -> None:
    """Nothing is read between allocations, and no staging is taken for what stands alone."""
    arrays = [random_array([16], i) for i in range(8)]
    for array in arrays:
        fake.memory(array.ctypes.data, array.nbytes)
    targets = room(arrays)
    copy = copy_arrays(cuda, arrays, targets, [])
    fake.run()
    assert copy.finished(0.0)
    copy.settle()
    assert [target.tobytes() for target in targets] == [array.tobytes() for array in arrays]
    assert fake.calls("cuMemcpyDtoHAsync_v2") == 8
    assert fake.calls("cuMemHostAlloc") == 0


def test_neighbours_on_both_sides_are_one_copy(fake: Fake, cuda: Cuda) -> None:
    whole = random_array([64 * 1024])
    parts = np.split(whole, 16)
    target = np.zeros(whole.nbytes, np.uint8)
    copy = copy_arrays(cuda, parts, np.split(target, 16), [])
    assert fake.calls("cuMemcpyDtoHAsync_v2") == 1
    fake.run()
    assert copy.finished(0.0)
    assert target.tobytes() == whole.tobytes()


def test_staging_is_used_again(fake: Fake, cuda: Cuda) -> None:
    """Gathering the same small tensors for ever allocates once; where staging is not to be had, they come alone."""
    memory = np.random.default_rng(0).integers(0, 256, 100 * 512, np.uint8)
    arrays = [memory[512 * i : 512 * i + 100] for i in range(100)]
    fake.memory(memory.ctypes.data, memory.nbytes)

    def captured() -> list[bytes]:
        targets = room(arrays)
        copy = copy_arrays(cuda, arrays, targets, [])
        fake.run()
        assert copy.finished(0.0)
        copy.settle()
        return [target.tobytes() for target in targets]

    fake.fail("cuMemHostAlloc")
    expected = [array.tobytes() for array in arrays]
    assert captured() == expected
    assert fake.calls("cuMemcpyDtoHAsync_v2") == 100
    for _ in range(5):
        assert captured() == expected
    assert fake.calls("cuMemHostAlloc") == 2
    assert fake.calls("cuMemcpyDtoHAsync_v2") == 105


def test_several_devices(fake: Fake, cuda: Cuda) -> None:
    """Each has a stream of its own; one that is slow does not hold back the other."""
    fake.reset(2)
    first, second = random_array([1000], 1), random_array([1000], 2)
    targets = room([first, second])
    streams = [fake.stream(0), fake.stream(1)]
    copies = [
        copy_arrays(cuda, [array], [target], [stream], device)
        for device, (array, target, stream) in enumerate(zip([first, second], targets, streams, strict=True))
    ]
    for copy, stream in zip(copies, streams, strict=True):
        assert copy.hold(stream)
    assert fake.calls("cuStreamCreateWithPriority") == 2
    fake.run()
    assert all(copy.finished(0.0) for copy in copies)
    assert [target.tobytes() for target in targets] == [first.tobytes(), second.tobytes()]


def test_several_streams_write_the_state(fake: Fake, cuda: Cuda) -> None:
    """The copy comes after all of them, and each of them can be held back."""
    for seed in SEEDS:
        parts = [random_array([400], i) for i in range(3)]
        targets, streams = room(parts), [fake.stream() for _ in parts]
        written = [random_array([400], 10 + i).tobytes() for i in range(3)]
        for stream, part, data in zip(streams, parts, written, strict=True):
            fake.kernel(stream, part.ctypes.data, data)
        copy = copy_arrays(cuda, parts, targets, streams)
        for stream, part in zip(streams, parts, strict=True):
            assert copy.hold(stream)
            fake.kernel(stream, part.ctypes.data, bytes(part.nbytes))
        fake.run(seed)
        assert copy.finished(0.0)
        assert [target.tobytes() for target in targets] == written


def test_a_stream_that_is_being_captured(fake: Fake, cuda: Cuda) -> None:
    """A graph in the making is neither joined nor broken: no copy begins, and one that has begun need not be waited
    for, since nothing runs on such a stream."""
    state = random_array([1000])
    target, stream = room([state]), fake.stream()
    copy = copy_arrays(cuda, [state], target, [stream])
    fake.capturing(stream, True)
    assert not copy.hold(stream)
    with pytest.raises(RuntimeError, match="graph is being captured"):
        copy_arrays(cuda, [state], target, [stream])
    fake.capture_implicitly(True)
    with pytest.raises(RuntimeError, match="graph is being captured"):
        copy_arrays(cuda, [state], target, [0])
    assert not copy.hold(0)
    fake.capturing(stream, False)
    fake.run()
    assert copy.finished(0.0)


def test_memory_is_pinned_and_given_back(fake: Fake, cuda: Cuda) -> None:
    memory = np.zeros(8192, np.uint8)
    cuda.pin(0, address_of(memory), memory.nbytes)
    assert fake.calls("cuMemHostRegister_v2") == 1
    cuda.unpin(0, address_of(memory))
    fake.fail("cuMemHostRegister_v2")
    with pytest.raises(RuntimeError, match="cuMemHostRegister: CUDA_ERROR_FAKE"):
        cuda.pin(0, address_of(memory), memory.nbytes)


def batch(fake: Fake, cuda: Cuda, seed: int) -> None:
    """A batch of everything, as careful as a capture is: right bytes, or an error that somebody hears of."""
    arrays = [*boxes().values(), *(random_array([3000], i) for i in range(4))]
    targets = room(arrays)
    stream = fake.stream()
    try:
        copy = copy_arrays(cuda, arrays, targets, [stream])
    except RuntimeError:
        return
    failed = bool(copy.error)
    try:
        copy.hold(stream)
    except RuntimeError:
        failed = True
    fake.run(seed)
    while True:
        try:
            if copy.finished(0.0):
                break
        except RuntimeError:
            failed = True
            break
    if not failed and not copy.error:
        copy.settle()
        assert [target.tobytes() for target in targets] == [packed(array) for array in arrays]
    fake.run(seed)


def test_an_error_at_each_call(fake: Fake) -> None:
    """Whichever call fails, once or with all that follow: an error is heard of or the bytes are right, nothing is left,
    nothing hangs."""
    cuda = Cuda(fake.library)
    batch(fake, cuda, 0)
    cuda.close()
    calls = fake.calls() - 1  # cuInit apart
    assert calls > 30
    for sticky, nth in itertools.product((False, True), range(1, calls + 1)):
        fake.reset()
        cuda = Cuda(fake.library)
        fake.fail("", nth, sticky=sticky)
        batch(fake, cuda, nth)
        cuda.close()
        assert fake.misuse == ""
        assert fake.live == 0 or sticky, f"call {nth}"


def test_a_library_that_is_none(fake: Fake) -> None:
    with pytest.raises(RuntimeError, match="no-such"):
        Cuda("/no-such-library.so")
    with pytest.raises(RuntimeError, match="has no function"):
        Cuda("libm.so.6")
    fake.fail("cuInit")
    with pytest.raises(RuntimeError, match="cuInit: CUDA_ERROR_FAKE"):
        Cuda(fake.library)


def test_what_cannot_be_is_refused(fake: Fake, cuda: Cuda) -> None:
    good = np.zeros(1, np.uint64)
    one, shape = np.ones(1, np.int64), np.ones((1, 1), np.int64)
    with pytest.raises(ValueError, match="source address is 0"):
        cuda.copy(0, [], good, good, shape, shape, one)
    with pytest.raises(ValueError, match="source_strides has shape"):
        cuda.copy(0, [], good, good, shape, np.ones((1, 2), np.int64), one)
    with pytest.raises(RuntimeError, match="cuDeviceGet"):
        copy_arrays(cuda, [random_array([4])], room([random_array([4])]), [], device=7)
    assert fake.queued == 0
