"""GGUF files: the header. Nothing in it is believed: each count, length and offset is held against the file's size.

A file is, little endian: "GGUF", version u32 (2 or 3), number of tensors u64, number of fields u64; the fields (name,
type u32, value); the tensors' descriptions (name, number of dimensions u32, sizes u64, the fastest first, type u32,
offset u64); and from the next multiple of general.alignment on the data. A string is a length u64 and UTF-8.
"""

import math
import mmap
import struct
from pathlib import Path
from typing import Any, NamedTuple

from tritium.errors import CheckpointError, UnsupportedModel
from tritium.weights.gguf_blocks import TYPES, BlockType

MAGIC = b"GGUF"
VERSIONS = (2, 3)
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
MAX_DIMS = 4  # ggml's own
MAX_NAME = 1 << 16  # bytes of a name
MAX_ALIGNMENT = 1 << 20
AGAIN = "the file is damaged or incomplete: download it again"


class Array(NamedTuple):
    """An array of the header, which is checked but not read: strings of a vocabulary take long."""

    num_items: int


class GgufTensor(NamedTuple):
    """shape: as torch has it, the slowest dimension first. begin, end: bytes of the file."""

    type: BlockType
    shape: tuple[int, ...]
    begin: int
    end: int


class GgufHeader(NamedTuple):
    """fields: scalars, strings and `Array`s by name."""

    fields: dict[str, Any]
    tensors: dict[str, GgufTensor]


def read_gguf_header(path: Path) -> GgufHeader:
    """The header of a file. Raises `CheckpointError`, `UnsupportedModel` for versions and types that are not read."""
    size = path.stat().st_size
    if size < 24:
        raise CheckpointError(f"{path}: is {size} bytes long, too short for a GGUF file; {AGAIN}")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as data:
        return _Reader(path, data).header()


class _Reader:
    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path, self._data, self._at = path, data, 0

    def header(self) -> GgufHeader:
        if self._data[:4] != MAGIC:
            raise CheckpointError(f"{self._path}: starts with {bytes(self._data[:4])!r}, not {MAGIC!r}: no GGUF file")
        self._at = 4
        version = self._number("I")
        if version not in VERSIONS:
            raise UnsupportedModel(
                f"{self._path}: is GGUF version {version}; versions 2 and 3, little endian, are read"
            )
        num_tensors, num_fields = self._number("Q"), self._number("Q")
        self._check_count(num_tensors, 24, "tensors")
        self._check_count(num_fields, 13, "fields")
        fields: dict[str, Any] = {}
        for _ in range(num_fields):
            name = self._name("a field", fields)
            fields[name] = self._value(name, self._number("I"))
        described: dict[str, tuple[BlockType, tuple[int, ...], int]] = {}
        for _ in range(num_tensors):
            name = self._name("a tensor", described)
            described[name] = self._description(name)
        alignment = fields.get("general.alignment", 32)
        if type(alignment) is not int or not 1 <= alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
            raise CheckpointError(f"{self._path}: general.alignment is {alignment!r}, expected a power of two; {AGAIN}")
        start = -(-self._at // alignment) * alignment
        return GgufHeader(fields, self._placed(described, start, alignment))

    def _placed(
        self, described: dict[str, tuple[BlockType, tuple[int, ...], int]], start: int, alignment: int
    ) -> dict[str, GgufTensor]:
        """Where each tensor's bytes lie: inside the file, aligned, none over another."""
        tensors, position = {}, start
        for name, (kind, shape, offset) in sorted(described.items(), key=lambda item: item[1][2]):
            begin = start + offset
            end = begin + math.prod(shape) // kind.num_elements * kind.num_bytes
            if offset % alignment or begin < position or end > len(self._data):
                raise CheckpointError(
                    f"{self._path}: tensor {name!r} takes bytes {begin} to {end} of {len(self._data)}, and the one "
                    f"before it ends at {position} (multiples of {alignment}); {AGAIN}"
                )
            tensors[name], position = GgufTensor(kind, shape, begin, end), end
        return {name: tensors[name] for name in described}

    def _description(self, name: str) -> tuple[BlockType, tuple[int, ...], int]:
        num_dims = self._number("I")
        if not 1 <= num_dims <= MAX_DIMS:
            raise CheckpointError(
                f"{self._path}: tensor {name!r} has {num_dims} dimensions, not 1 to {MAX_DIMS}; {AGAIN}"
            )
        sizes = tuple(self._number("Q") for _ in range(num_dims))
        number, offset = self._number("I"), self._number("Q")
        if number not in TYPES:
            known = ", ".join(kind.name for kind in TYPES.values())
            raise UnsupportedModel(
                f"{self._path}: tensor {name!r} is of ggml type {number}; read are {known}: use a file of one of these"
            )
        kind = TYPES[number]
        if not all(1 <= size <= 1 << 40 for size in sizes) or sizes[0] % kind.num_elements:
            raise CheckpointError(
                f"{self._path}: tensor {name!r} of type {kind.name} has sizes {list(sizes)}; the first must be a "
                f"multiple of {kind.num_elements}; {AGAIN}"
            )
        return kind, sizes[::-1], offset

    def _value(self, name: str, kind: int) -> Any:
        if kind == STRING:
            return self._string(len(self._data), f"field {name!r}")
        if kind != ARRAY:
            return self._number(self._scalar(name, kind))
        kind, count = self._number("I"), self._number("Q")
        if kind == STRING:
            self._check_count(count, 8, f"strings of field {name!r}")
            for _ in range(count):
                self._skip(self._number("Q"), f"field {name!r}")
        else:
            self._skip(count * struct.calcsize(self._scalar(name, kind)), f"field {name!r}")
        return Array(count)

    def _scalar(self, name: str, kind: int) -> str:
        if kind not in SCALARS:
            raise CheckpointError(f"{self._path}: field {name!r} is of unknown type {kind}; {AGAIN}")
        return SCALARS[kind]

    def _name(self, what: str, known: dict[str, Any]) -> str:
        name = self._string(MAX_NAME, f"the name of {what}")
        if name in known:
            raise CheckpointError(f"{self._path}: names {name[:80]!r} twice; {AGAIN}")
        return name

    def _string(self, limit: int, what: str) -> str:
        start, length = self._at + 8, self._number("Q")
        if length > limit:
            raise CheckpointError(f"{self._path}: {what} is {length} bytes long, more than {limit}; {AGAIN}")
        self._skip(length, what)
        try:
            return self._data[start : start + length].decode()
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{self._path}: {what} at byte {start} is not UTF-8 ({error}); {AGAIN}") from None

    def _number(self, code: str) -> Any:
        start = self._at
        self._skip(struct.calcsize(code), "the header")
        return struct.unpack_from("<" + code, self._data, start)[0]

    def _skip(self, num_bytes: int, what: str) -> None:
        if num_bytes > len(self._data) - self._at:
            raise CheckpointError(
                f"{self._path}: {what} has {num_bytes} bytes at byte {self._at}, but the file ends at "
                f"{len(self._data)}; {AGAIN}"
            )
        self._at += num_bytes

    def _check_count(self, count: int, least_bytes: int, what: str) -> None:
        """Each takes some bytes: a count that the file has no room for is refused before anything is read."""
        if count * least_bytes > len(self._data) - self._at:
            raise CheckpointError(
                f"{self._path}: says it has {count} {what}, for which its {len(self._data)} bytes have no room; {AGAIN}"
            )
