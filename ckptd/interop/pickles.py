"""Reads pickles as data: a stack machine for the opcodes of plain values, that calls and imports nothing.

Owns which globals may be named. Each is a name in a table here, and calling it makes an inert value of this module or
of `format.objects`; any other global is a FormatError that names it. That is what `weights_only=True` promises, kept
more narrowly: there is no path from a pickle to a Python callable. Written anew, not derived from `pickle.Unpickler`,
which lets a pickle set attributes of what it is given and grow its memo at will.

Time and memory grow with the bytes given: an opcode makes at most one object, what calls may copy is bounded, the memo
is a dict, keys of dicts are text or small integers (other pairs are kept aside, never hashed), integers are bounded.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Callable
from typing import Any

from ckptd.core.errors import FormatError
from ckptd.core.types import DTYPES
from ckptd.format.objects import DeviceValue, DtypeValue, SizeValue

MAX_PICKLE_BYTES = 1024**3
MAX_INTEGER_BYTES = 4096
MAX_NAME_BYTES = 256

_COPIES = 16
"""Calls may copy so many items for every byte of the pickle: a value that is built once may be used often."""
_SMALL_INTEGER = 2**60
"""Larger ones may be made to collide in a hash table."""


@dataclasses.dataclass(frozen=True, slots=True)
class Storage:
    """A persistent reference to a record of a torch.save file: its dtype (None: bytes), record, and elements."""

    dtype: str | None
    record: str
    elements: int


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class TensorView:
    """A tensor as torch.save describes it: a strided view of a storage, in elements; `dtype` None: the storage's."""

    storage: Storage
    offset: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str | None = None


@dataclasses.dataclass(slots=True, eq=False)
class Instance:
    """An object of an admitted class: its name, and the attributes that the pickle gives it."""

    name: str
    state: dict[str, Any]


class Pairs(dict[Any, Any]):
    """A dict of a pickle. What has a key that is not text or a small integer is in `others`, in order."""

    __slots__ = ("others",)

    def __init__(self) -> None:
        super().__init__()
        self.others: list[tuple[Any, Any]] = []

    def put(self, key: Any, value: Any) -> None:
        if type(key) is str or (type(key) is int and abs(key) < _SMALL_INTEGER):
            self[key] = value
        else:
            self.others.append((key, value))


class OrderedPairs(Pairs):
    """A collections.OrderedDict."""

    __slots__ = ()


class CountedPairs(Pairs):
    """A collections.Counter."""

    __slots__ = ()


@dataclasses.dataclass(frozen=True, slots=True)
class _Global:
    """A name that a pickle may mention; `call` makes a value of arguments (None: it is not to be called), `instance`
    is the name of a class of which it may make an `Instance`."""

    name: str
    call: Callable[..., Any] | None = None
    instance: bool = False


Globals = dict[tuple[str, str], Any]
"""(module, name) -> a `_Global`, or the value that the name stands for."""


def read_pickle(
    data: bytes | memoryview, globals_: Globals, what: str, persistent: Callable[[Any], Any] | None = None
) -> Any:
    """The value of a pickle, `what` in messages. Raises FormatError; nothing is executed, whatever it says."""
    if len(data) > MAX_PICKLE_BYTES:
        raise FormatError(f"{what}: a pickle of {len(data)} bytes; expected at most {MAX_PICKLE_BYTES}")
    machine = _Machine(bytes(data), globals_, persistent)
    try:
        return machine.run()
    except FormatError as error:
        raise FormatError(f"{what}: {error}") from None
    except (IndexError, KeyError, TypeError, ValueError, struct.error, OverflowError, AttributeError) as error:
        raise FormatError(
            f"{what}: not a pickle that can be read: {type(error).__name__} at byte {machine.position}"
        ) from None


def _called(name: str, make: Callable[..., Any]) -> _Global:
    return _Global(name, make)


def _integers(values: Any) -> tuple[int, ...]:
    if not isinstance(values, (tuple, list)) or not all(type(value) is int and abs(value) < 2**62 for value in values):
        raise FormatError("expected whole numbers")
    return tuple(values)


def sizes_of(value: Any) -> tuple[int, ...]:
    """The numbers of a torch.Size or a tuple."""
    sizes = value.sizes if isinstance(value, SizeValue) else _integers(value)
    if any(size < 0 for size in sizes):
        raise FormatError(f"sizes {sizes}: negative")
    return sizes


def _rebuild(storage: Any, offset: Any, sizes: Any, strides: Any, *_rest: Any) -> TensorView:
    if not isinstance(storage, Storage):
        raise FormatError(f"a tensor of a {type(storage).__name__}; expected a storage")
    (start,) = _integers((offset,))
    made = TensorView(storage, start, sizes_of(sizes), _integers(strides))
    if len(made.sizes) != len(made.strides):
        raise FormatError(f"a tensor of sizes {made.sizes} and strides {made.strides}")
    return made


def _rebuild_v3(
    storage: Any, offset: Any, sizes: Any, strides: Any, _grad: Any, _hooks: Any, dtype: Any, *_rest: Any
) -> TensorView:
    if not isinstance(dtype, DtypeValue):
        raise FormatError("a tensor without a dtype")
    return dataclasses.replace(_rebuild(storage, offset, sizes, strides), dtype=dtype.name)


def _same(value: Any, *_rest: Any) -> Any:
    if not isinstance(value, TensorView):
        raise FormatError(f"a parameter of a {type(value).__name__}; expected a tensor")
    return value


def _counted(counts: Any = None) -> CountedPairs:
    made = CountedPairs()
    if isinstance(counts, Pairs):
        made.update(counts)
        made.others += counts.others
    return made


def _device(kind: Any, index: Any = None) -> DeviceValue:
    if not isinstance(kind, str) or not (index is None or type(index) is int):
        raise FormatError("a device that is none")
    return DeviceValue(kind if index is None else f"{kind}:{index}")


def _encode(text: Any, encoding: Any) -> bytes:
    """How protocol 2 spells bytes."""
    if type(text) is not str or encoding != "latin1":
        raise FormatError("bytes that are not spelled as latin1")
    return text.encode("latin1")


def _plain_set(kind: type[set[Any]] | type[frozenset[Any]]) -> Callable[[Any], Any]:
    def make(values: Any = ()) -> Any:
        return kind(_hashable(value) for value in values)

    return make


def _hashable(value: Any) -> Any:
    if type(value) in (str, bytes, float, bool, type(None)) or (type(value) is int and abs(value) < _SMALL_INTEGER):
        return value
    raise FormatError(f"a set of {type(value).__name__}; expected numbers and text")


def _complex(real: Any, imaginary: Any) -> complex:
    if type(real) is not float or type(imaginary) is not float:
        raise FormatError("a complex number that is none")
    return complex(real, imaginary)


def _text(*parts: Any) -> str:
    if not all(type(part) is str for part in parts):
        raise FormatError("a path that is not text")
    return "/".join(parts)


_DTYPES = {("torch", name): DtypeValue(name) for name in DTYPES} | {
    ("torch", other): DtypeValue(name)
    for other, name in (("half", "float16"), ("float", "float32"), ("double", "float64"), ("long", "int64"))
}

_STORAGES = {
    "BoolStorage": "bool",
    "ByteStorage": "uint8",
    "CharStorage": "int8",
    "ShortStorage": "int16",
    "IntStorage": "int32",
    "LongStorage": "int64",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "FloatStorage": "float32",
    "DoubleStorage": "float64",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
}

PLAIN_GLOBALS: Globals = {
    **_DTYPES,
    ("torch", "Size"): _called("torch.Size", lambda sizes=(): SizeValue(_integers(sizes))),
    ("torch", "device"): _called("torch.device", _device),
    ("collections", "OrderedDict"): _called("collections.OrderedDict", OrderedPairs),
    ("collections", "Counter"): _called("collections.Counter", _counted),
    ("_codecs", "encode"): _called("_codecs.encode", _encode),
    **{
        (module, name): _called(name, make)
        for module in ("builtins", "__builtin__")
        for name, make in (
            ("set", _plain_set(set)),
            ("frozenset", _plain_set(frozenset)),
            ("complex", _complex),
            ("bytes", lambda: b""),  # how protocol 2 spells none at all
        )
    },
}
"""What plain values need."""

TENSOR_GLOBALS: Globals = {
    **PLAIN_GLOBALS,
    **{("torch", name): _Global(dtype) for name, dtype in _STORAGES.items()},
    ("torch.storage", "UntypedStorage"): _Global(""),
    ("torch", "UntypedStorage"): _Global(""),
    ("torch._utils", "_rebuild_tensor"): _called("_rebuild_tensor", _rebuild),
    ("torch._utils", "_rebuild_tensor_v2"): _called("_rebuild_tensor_v2", _rebuild),
    ("torch._utils", "_rebuild_tensor_v3"): _called("_rebuild_tensor_v3", _rebuild_v3),
    ("torch._utils", "_rebuild_parameter"): _called("_rebuild_parameter", _same),
}
"""What torch.save files of tensors and plain values need."""

_METADATA = "torch.distributed.checkpoint.metadata"

METADATA_GLOBALS: Globals = {
    **PLAIN_GLOBALS,
    **{
        (_METADATA, name): _Global(name, instance=True)
        for name in (
            "Metadata",
            "TensorStorageMetadata",
            "TensorProperties",
            "ChunkStorageMetadata",
            "BytesStorageMetadata",
            "MetadataIndex",
            "StorageMeta",
        )
    },
    (_METADATA, "_MEM_FORMAT_ENCODING"): _called("_MEM_FORMAT_ENCODING", lambda value: None),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): _Global("_StorageInfo", instance=True),
    ("torch.serialization", "_get_layout"): _called("_get_layout", lambda name: name),
    **{
        (module, name): _called(name, _text)
        for module in ("pathlib", "pathlib._local")
        for name in ("Path", "PosixPath", "PurePath", "PurePosixPath", "WindowsPath", "PureWindowsPath")
    },
}
"""What `.metadata` of torch.distributed.checkpoint needs."""


def _short(name: Any) -> str:
    return name[:MAX_NAME_BYTES] if type(name) is str else type(name).__name__


def storage_of(reference: Any) -> Storage:
    """The storage that a persistent id of torch.save stands for."""
    if not isinstance(reference, tuple) or len(reference) != 5 or reference[0] != "storage":
        raise FormatError("refers to something that is not a storage")
    _, kind, record, _, elements = reference
    if not isinstance(kind, _Global) or kind.call is not None or kind.instance:
        raise FormatError("a storage of no type")
    if type(record) is not str or not record.isascii() or not record.isdigit() or len(record) > 12:
        raise FormatError("a storage whose record is not named by a number")
    (count,) = _integers((elements,))
    if count < 0:
        raise FormatError(f"a storage of {count} elements")
    return Storage(kind.name or None, record, count)


class _Machine:
    """One run over one pickle."""

    def __init__(self, data: bytes, globals_: Globals, persistent: Callable[[Any], Any] | None) -> None:
        self.position = 0
        self._data = data
        self._globals = globals_
        self._persistent = persistent
        self._stack: list[Any] = []
        self._marks: list[list[Any]] = []
        self._memo: dict[int, Any] = {}
        self._copies = _COPIES * (len(data) + 1024)

    def run(self) -> Any:
        operations = _OPERATIONS
        while True:
            code = self._data[self.position]
            self.position += 1
            if code == 0x2E:  # STOP
                if len(self._stack) != 1 or self._marks:
                    raise FormatError("a pickle that ends with other than one value")
                return self._stack[0]
            operation = operations.get(code)
            if operation is None:
                raise FormatError(f"opcode {code:#04x} at byte {self.position - 1} is not admitted")
            operation(self)

    def take(self, count: int) -> bytes:
        """The next bytes of the pickle."""
        end = self.position + count
        if count < 0 or end > len(self._data):
            raise FormatError(f"cut short at byte {self.position}")
        taken = self._data[self.position : end]
        self.position = end
        return taken

    def number(self, layout: str) -> int:
        """A little-endian number of the pickle."""
        (value,) = struct.unpack(layout, self.take(struct.calcsize(layout)))
        return int(value)

    def line(self) -> str:
        end = self._data.index(b"\n", self.position, self.position + MAX_NAME_BYTES)
        text = self._data[self.position : end].decode("utf-8")
        self.position = end + 1
        return text

    def charge(self, items: int) -> None:
        """Accounts for items that are about to be copied."""
        self._copies -= items
        if self._copies < 0:
            raise FormatError("copies the same values over and over")

    def push(self, value: Any) -> None:
        self._stack.append(value)

    def pop(self) -> Any:
        return self._stack.pop()

    def mark(self) -> None:
        self._marks.append(self._stack)
        self._stack = []

    def to_mark(self) -> list[Any]:
        """What was pushed since the last mark."""
        items = self._stack
        self._stack = self._marks.pop()
        return items

    def store(self, index: int) -> None:
        self._memo[index] = self._stack[-1]

    def memoize(self) -> None:
        self._memo[len(self._memo)] = self._stack[-1]

    def fetch(self, index: int) -> None:
        self.push(self._memo[index])

    def extend(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if type(target) is not list:
            raise FormatError(f"appends to a {type(target).__name__}")
        target.extend(items)

    def put(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if not isinstance(target, Pairs) or len(items) % 2:
            raise FormatError(f"sets items of a {type(target).__name__}")
        for index in range(0, len(items), 2):
            target.put(items[index], items[index + 1])

    def add(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if type(target) is not set:
            raise FormatError(f"adds to a {type(target).__name__}")
        target.update(map(_hashable, items))

    def name(self, module: Any, name: Any) -> None:
        found = self._globals.get((module, name)) if type(module) is str and type(name) is str else None
        if found is None:
            raise FormatError(
                f"names {_short(module)}.{_short(name)}, which is not admitted: only tensors and plain values "
                "are read, and nothing is executed"
            )
        self.push(found)

    def reduce(self) -> None:
        arguments, function = self.pop(), self.pop()
        if not isinstance(function, _Global) or function.call is None or type(arguments) is not tuple:
            raise FormatError(f"calls {getattr(function, 'name', type(function).__name__)}, which is not admitted")
        self.charge(len(arguments) + sum(len(argument) for argument in arguments if hasattr(argument, "__len__")))
        self.push(function.call(*arguments))

    def new(self) -> None:
        arguments, kind = self.pop(), self.pop()
        if not isinstance(kind, _Global) or not kind.instance or arguments != ():
            raise FormatError(f"makes a {getattr(kind, 'name', type(kind).__name__)}, which is not admitted")
        self.push(Instance(kind.name, {}))

    def build(self) -> None:
        state, target = self.pop(), self._stack[-1]
        if isinstance(target, OrderedPairs) and isinstance(state, Pairs):
            return  # attributes of an OrderedDict, such as `_metadata` of a state dict: not part of its value
        if not isinstance(target, Instance):
            raise FormatError(f"sets attributes of a {type(target).__name__}")
        if type(state) is tuple and target.name == "TensorProperties" and len(state) == 5:
            state = dict(zip(("dtype", "layout", "requires_grad", "memory_format", "pin_memory"), state, strict=True))
        if not isinstance(state, dict) or not all(type(key) is str for key in state):
            raise FormatError(f"attributes of {target.name} that are not named")
        self.charge(len(state))
        target.state.update(state)

    def refer(self) -> None:
        if self._persistent is None:
            raise FormatError("refers to something outside the pickle")
        self.push(self._persistent(self.pop()))

    def protocol(self) -> None:
        version = self.number("<B")
        if not 2 <= version <= 5:
            raise FormatError(f"pickle protocol {version}; expected 2 to 5")

    def integer(self, size: int) -> None:
        if size > MAX_INTEGER_BYTES:
            raise FormatError(f"an integer of {size} bytes")
        self.push(int.from_bytes(self.take(size), "little", signed=True))

    def text(self, size: int) -> None:
        self.push(self.take(size).decode("utf-8", "surrogatepass"))

    def tuple_of(self, count: int) -> None:
        if len(self._stack) < count:
            raise FormatError("a tuple of what is not there")
        items = tuple(self._stack[len(self._stack) - count :])
        del self._stack[len(self._stack) - count :]
        self.push(items)

    def pair(self) -> None:
        value, key = self.pop(), self.pop()
        self.put([key, value])

    def ignore(self, count: int) -> None:
        self.take(count)

    def drop(self) -> None:
        self.pop()

    def drop_to_mark(self) -> None:
        self.to_mark()

    def push_after(self, make: Callable[[list[Any]], Any]) -> None:
        """What `make` makes of everything since the last mark."""
        items = self.to_mark()
        self.push(make(items))

    def real(self) -> None:
        (value,) = struct.unpack(">d", self.take(8))
        self.push(value)

    def named_by_stack(self) -> None:
        name, module = self.pop(), self.pop()
        self.name(module, name)

    def dictionary(self) -> None:
        items = self.to_mark()
        self.push(Pairs())
        self.put(items)


_OPERATIONS: dict[int, Callable[[_Machine], None]] = {
    0x80: _Machine.protocol,
    0x95: lambda machine: machine.ignore(8),  # FRAME: a hint for reading
    ord("("): _Machine.mark,
    ord("0"): _Machine.drop,
    ord("1"): _Machine.drop_to_mark,
    ord("N"): lambda machine: machine.push(None),
    0x88: lambda machine: machine.push(True),
    0x89: lambda machine: machine.push(False),
    ord("J"): lambda machine: machine.push(machine.number("<i")),
    ord("K"): lambda machine: machine.push(machine.number("<B")),
    ord("M"): lambda machine: machine.push(machine.number("<H")),
    0x8A: lambda machine: machine.integer(machine.number("<B")),
    0x8B: lambda machine: machine.integer(machine.number("<i")),
    ord("G"): _Machine.real,
    0x8C: lambda machine: machine.text(machine.number("<B")),
    ord("X"): lambda machine: machine.text(machine.number("<I")),
    0x8D: lambda machine: machine.text(machine.number("<Q")),
    ord("C"): lambda machine: machine.push(machine.take(machine.number("<B"))),
    ord("B"): lambda machine: machine.push(machine.take(machine.number("<I"))),
    0x8E: lambda machine: machine.push(machine.take(machine.number("<Q"))),
    0x96: lambda machine: machine.push(machine.take(machine.number("<Q"))),  # a bytearray becomes bytes
    ord(")"): lambda machine: machine.push(()),
    0x85: lambda machine: machine.tuple_of(1),
    0x86: lambda machine: machine.tuple_of(2),
    0x87: lambda machine: machine.tuple_of(3),
    ord("t"): lambda machine: machine.push_after(tuple),
    ord("]"): lambda machine: machine.push([]),
    ord("l"): lambda machine: machine.push_after(list),
    ord("a"): lambda machine: machine.extend([machine.pop()]),
    ord("e"): lambda machine: machine.extend(machine.to_mark()),
    ord("}"): lambda machine: machine.push(Pairs()),
    ord("d"): _Machine.dictionary,
    ord("s"): _Machine.pair,
    ord("u"): lambda machine: machine.put(machine.to_mark()),
    0x8F: lambda machine: machine.push(set()),
    0x90: lambda machine: machine.add(machine.to_mark()),
    0x91: lambda machine: machine.push_after(_plain_set(frozenset)),
    ord("c"): lambda machine: machine.name(machine.line(), machine.line()),
    0x93: _Machine.named_by_stack,
    ord("R"): _Machine.reduce,
    0x81: _Machine.new,
    ord("b"): _Machine.build,
    ord("q"): lambda machine: machine.store(machine.number("<B")),
    ord("r"): lambda machine: machine.store(machine.number("<I")),
    0x94: _Machine.memoize,
    ord("h"): lambda machine: machine.fetch(machine.number("<B")),
    ord("j"): lambda machine: machine.fetch(machine.number("<I")),
    ord("Q"): _Machine.refer,
}
"""Opcode -> what it does. All others (EXT, INST, OBJ, REDUCE of old protocols, buffers) are refused."""
