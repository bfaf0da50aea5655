"""Read a pickle without unpickling it. No function that the pickle names is ever called.

Like Python's unpickler, the reader has a stack of values and a memo of values that are used again. It accepts the instructions that
`torch.load` with `weights_only=True` accepts. The reader itself makes numbers, strings and containers. For every other object, the
caller either gives a function that makes the object, or asks for the object's data (`PickledObject`).

Errors are `ContentError`, whose message completes a sentence such as "last.ckpt cannot be used: ...".
"""

import io
import pickletools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from icl.files.reading import ContentError

_MAX_INSTRUCTIONS = 2**21
"""Largest number of instructions of a pickle. Each instruction may make a Python object of about 64 bytes."""
_MAX_KEY_BITS = 60
"""Largest number of bits of a whole number that is a key. With larger numbers, a file could contain many keys with equal hashes."""


class UnknownObjectError(ContentError):
    """Raised if a pickle contains a Python object that the caller does not accept."""

    def __init__(self, name: str) -> None:
        self.name = name[:100]
        super().__init__(f"it contains the Python object `{self.name}`")


@dataclass(eq=False, repr=False)
class Name:
    """Name of a function, a class or a constant in a pickle, as `module.name`."""

    text: str


@dataclass(eq=False, repr=False)
class PickledObject:
    """The data of a Python object that is not made."""

    name: str
    """Name of the function or class that would make the object, as `module.name`."""
    arguments: tuple[Any, ...]
    state: Any = None


@dataclass(frozen=True, kw_only=True)
class Objects:
    """The objects that a caller accepts in a pickle."""

    functions: Mapping[str, Callable[..., Any]]
    """For each function or class of the pickle, the function that is called in its place."""
    constants: frozenset[str]
    """Names that may occur as arguments. Each of them becomes a `Name`."""
    is_kept: Callable[[str], bool]
    """Function that takes the name of a function or class. It returns whether an object of this kind becomes a `PickledObject`."""
    load: Callable[..., Any]
    """Function that returns an object that is stored outside the pickle. Its arguments are the object's persistent id."""


def parse_pickle(stream: io.BytesIO, objects: Objects) -> Any:
    """Return the content of the pickle that begins at the stream's position, and move past it.

    Raises:
        UnknownObjectError: If the pickle contains an object that is not accepted.
        ContentError: If the pickle is damaged or too large. Damaged pickles may also raise other errors.
    """
    return _Reader(objects).value(stream)


def as_tuple(values: Any) -> tuple[Any, ...]:
    """Return a list or tuple as a tuple.

    Refuse other values. A tensor, for example, may have many more elements than the file has bytes.

    Raises:
        ContentError: If the value is refused.
    """
    if type(values) not in (list, tuple):
        raise ContentError("it is damaged (it contains a value that is not a list)")
    return tuple(values)


def as_dict(pairs: Any = ()) -> dict[Any, Any]:
    """Return a dict of these keys and values.

    Raises:
        ContentError: If a key is not a number, a string, bytes or None, or if a whole number that is a key is too large.
    """
    if type(pairs) is dict:
        return dict(pairs)
    table = {}
    for key, value in map(as_tuple, as_tuple(pairs)):
        if not (key is None or isinstance(key, (str, bytes, float, int))):
            raise ContentError(f"it contains a dict or set with a key of the type {type(key).__name__}")
        if isinstance(key, int) and key.bit_length() > _MAX_KEY_BITS:
            raise ContentError("it contains a dict or set with a key that is too large")
        table[key] = value
    return table


def _as_bytes(text: Any, encoding: Any) -> bytes:
    """Return the bytes that a pickle of protocol 2 stores as a Latin-1 string.

    Refuse other encodings, which may need much memory or time.
    """
    if encoding != "latin1" or not isinstance(text, str):
        raise ContentError("it is damaged (it contains bytes in an odd encoding)")
    return text.encode("latin1")


CONTAINERS: Mapping[str, Callable[..., Any]] = {
    "collections.OrderedDict": as_dict,
    "collections.Counter": as_dict,
    "builtins.set": lambda values: set(as_dict([(value, None) for value in as_tuple(values)])),
    "builtins.complex": lambda real, imaginary: complex(float(real), float(imaginary)),
    "_codecs.encode": _as_bytes,
}
"""Functions and classes of containers and numbers, each with the function that is called in its place."""


class _Reader:
    def __init__(self, objects: Objects) -> None:
        self.objects = objects
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def value(self, stream: io.BytesIO) -> Any:
        """Return the content of a pickle."""
        for number, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
            if number >= _MAX_INSTRUCTIONS:
                raise ContentError(f"it contains more than {_MAX_INSTRUCTIONS:,} values")
            if opcode.name in _VALUES:
                self.push(_VALUES[opcode.name](argument))
            elif opcode.name in _STEPS:
                _STEPS[opcode.name](self, argument)
            else:
                raise ContentError(f"it is damaged (it contains the pickle instruction {opcode.name})")
        return self.stack.pop()

    def push(self, value: Any) -> None:
        """Add a value to the stack."""
        self.stack.append(value)

    def mark(self) -> None:
        """Begin a new list of values."""
        self.marks.append(self.stack)
        self.stack = []

    def marked(self) -> list[Any]:
        """Remove and return the values since the last mark."""
        values, self.stack = self.stack, self.marks.pop()
        return values

    def last(self, count: int) -> list[Any]:
        """Remove the last `count` values from the stack, and return them."""
        values = self.stack[-count:]
        del self.stack[-count:]
        return values

    def extend(self, values: list[Any]) -> None:
        """Append values to the list that is the last value of the stack."""
        if type(self.stack[-1]) is not list:
            raise ContentError("it is damaged (it appends to a value that is not a list)")
        self.stack[-1].extend(values)

    def update(self, values: list[Any]) -> None:
        """Add keys and values to the dict that is the last value of the stack."""
        if type(self.stack[-1]) is not dict:
            raise ContentError("it is damaged (it sets an item of a value that is not a dict)")
        self.stack[-1].update(as_dict([*zip(values[::2], values[1::2], strict=True)]))

    def refer(self, argument: str) -> None:
        """Push the name of a function, class or constant."""
        module, _, name = argument.partition(" ")
        full = f"{'builtins' if module == '__builtin__' else module}.{name}"
        if not (full in self.objects.functions or full in self.objects.constants or self.objects.is_kept(full)):
            raise UnknownObjectError(full)
        self.push(Name(full))

    def call(self) -> None:
        """Replace a name and arguments by the object that they describe."""
        name, arguments = self.last(2)
        if not (isinstance(name, Name) and type(arguments) is tuple):
            raise ContentError("it is damaged (it calls a value that is not a function)")
        if name.text in self.objects.functions:
            self.push(self.objects.functions[name.text](*arguments))
        elif self.objects.is_kept(name.text):
            self.push(PickledObject(name.text, arguments))
        else:
            raise UnknownObjectError(name.text)

    def build(self) -> None:
        """Set the state of an object. Ignore the state of a dict, because PyTorch stores only the versions of modules in it."""
        state = self.stack.pop()
        if isinstance(self.stack[-1], PickledObject):
            self.stack[-1].state = state
        elif type(self.stack[-1]) is not dict:
            raise ContentError("it is damaged (it changes a value that is not an object)")


def _text(text: str) -> str:
    text.encode()  # raises an error for invalid Unicode, which could not be printed
    return text


_VALUES: Mapping[str, Callable[[Any], Any]] = {
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "BINFLOAT", "LONG1"), lambda number: number),
    **dict.fromkeys(("BINUNICODE", "SHORT_BINSTRING"), _text),
    "EMPTY_LIST": lambda _: [],
    "EMPTY_DICT": lambda _: {},
    "EMPTY_TUPLE": lambda _: (),
    "NONE": lambda _: None,
    "NEWTRUE": lambda _: True,
    "NEWFALSE": lambda _: False,
}
"""Instructions that add a value to the stack, each with the function that makes the value from the instruction's argument."""
_STEPS: Mapping[str, Callable[[_Reader, Any], None]] = {
    **dict.fromkeys(("PROTO", "STOP"), lambda self, _: None),
    "MARK": lambda self, _: self.mark(),
    "TUPLE": lambda self, _: self.push(tuple(self.marked())),
    "TUPLE1": lambda self, _: self.push(tuple(self.last(1))),
    "TUPLE2": lambda self, _: self.push(tuple(self.last(2))),
    "TUPLE3": lambda self, _: self.push(tuple(self.last(3))),
    "APPEND": lambda self, _: self.extend(self.last(1)),
    "APPENDS": lambda self, _: self.extend(self.marked()),
    "SETITEM": lambda self, _: self.update(self.last(2)),
    "SETITEMS": lambda self, _: self.update(self.marked()),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT"), lambda self, index: self.memo.update({index: self.stack[-1]})),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), lambda self, index: self.push(self.memo[index])),
    "GLOBAL": _Reader.refer,
    **dict.fromkeys(("REDUCE", "NEWOBJ"), lambda self, _: self.call()),
    "BUILD": lambda self, _: self.build(),
    "BINPERSID": lambda self, _: self.push(self.objects.load(*as_tuple(self.stack.pop()))),
}
"""The other instructions, each with the function that carries it out."""
