"""A pytest plugin that writes down what the compiled kernels are called with, for a process without Python to repeat.

    pytest -p tritium.testing.kernel_calls --record-kernel-calls FILE tests/kernels

Each call is written with all the memory that its arguments point to, before and after: tests/kernels/replay.cpp runs it
again, under a sanitizer or on another processor, and compares every byte. Of calls of one kernel with equal numbers
(sizes, strides, flags) and the same arguments given the first is kept. Calls of a library that a test compiled itself
do not count.

The file: for each call a header, the symbol, the regions and the relocations, as in replay.cpp. Region 0 is the struct.
"""

import contextlib
import ctypes
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO
from unittest import mock

import numpy as np
import pytest
import torch

from tritium.kernels.cpu import library, sampling
from tritium.kernels.logit_edits import EditsStruct
from tritium.kernels.sampling_table import Sampled, SamplingTable

MOST_BYTES = 1 << 21  # of one call: larger ones go the same ways
KINDS = {torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}  # else raw bytes: 0
Region = tuple[int, int, int]  # address, bytes, kind


def pytest_addoption(parser: pytest.Parser) -> None:
    """The file's name."""
    parser.addoption("--record-kernel-calls", type=Path, help="write the kernels' calls to this file")


@pytest.fixture(autouse=True, scope="session")
def recording(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every call of the session, when the option is given."""
    path = request.config.getoption("--record-kernel-calls")
    if path is None:
        yield
        return
    with open(path, "wb") as file, recorded(file):
        yield


@contextlib.contextmanager
def recorded(file: BinaryIO) -> Iterator[None]:
    """While it is entered, calls go to `file` when they are made for the first time."""
    own, make = library._library(), library.call
    seen: set[tuple[str, bytes]] = set()
    arrays: list[Any] = []  # of the sampler's call that is being made

    def call(loaded: ctypes.CDLL, name: str, dtype: torch.dtype | None, args: ctypes.Structure, *tensors: torch.Tensor):
        thunk = make(loaded, name, dtype, args, *tensors)
        if loaded is not own:
            return thunk
        symbol = f"tritium_{name}" + (f"_{library.SUFFIXES[dtype]}" if dtype else "")

        def run() -> object:
            key = (symbol, _numbers(args))
            regions = _regions(args, [*tensors, *arrays])
            if key in seen or sum(size for _, size, _ in regions) > MOST_BYTES:
                return thunk()
            seen.add(key)
            before = [ctypes.string_at(address, size) for address, size, _ in regions]
            result = thunk()
            _write(file, symbol, regions, before, _relocations(regions, [args, *_edits(arrays)]))
            return result

        return run

    sample = sampling.Sampling.__call__

    def with_arrays(self: sampling.Sampling, logits: torch.Tensor, rows: SamplingTable, out: Sampled) -> None:
        edits = [e for e in rows.edits if e is not None]
        arrays[:] = [logits, *out, *(getattr(rows, name) for name in sampling._TABLE), *edits]
        try:
            sample(self, logits, rows, out)
        finally:
            arrays.clear()

    with mock.patch.object(library, "call", call), mock.patch.object(sampling.Sampling, "__call__", with_arrays):
        yield


def _numbers(args: ctypes.Structure) -> bytes:
    """The numbers of a struct, and which of its pointers are given."""
    values = ((kind, getattr(args, name)) for name, kind, *_ in args._fields_)
    return repr([value is None if kind is ctypes.c_void_p else value for kind, value in values]).encode()


def _edits(arrays: list[Any]) -> list[EditsStruct]:
    return [a._struct for a in arrays if hasattr(a, "_struct")]


def _regions(args: ctypes.Structure, holders: list[Any]) -> list[Region]:
    """The struct, then the memory of what it points to: from a tensor's first element to its last. Overlaps are one."""
    spans: list[Region] = []
    for holder in holders:
        if isinstance(holder, torch.Tensor):
            if holder.numel():
                last = sum((n - 1) * stride for n, stride in zip(holder.shape, holder.stride(), strict=True))
                size = (last + 1) * holder.element_size()
                spans.append((holder.data_ptr(), size, KINDS.get(holder.dtype, 0)))
        elif isinstance(holder, np.ndarray):
            spans.append((holder.ctypes.data, holder.nbytes, int(holder.dtype == np.float32)))
        else:  # LogitEdits
            spans.append((holder.address, ctypes.sizeof(EditsStruct), 0))
            spans += _regions(holder._struct, [x for x in vars(holder).values() if isinstance(x, np.ndarray)])[1:]
    merged: list[Region] = []
    for address, size, kind in sorted(spans):
        if merged and address < sum(merged[-1][:2]):
            start, length, first_kind = merged[-1]
            merged[-1] = (start, max(length, address + size - start), first_kind)
        else:
            merged.append((address, size, kind))
    return [(ctypes.addressof(args), ctypes.sizeof(args), 0), *merged]


def _relocations(regions: list[Region], structs: list[Any]) -> list[tuple[int, int, int, int]]:
    """(region, offset) of each pointer, and (region, offset) of what it points to."""
    places = []
    for each in structs:
        for name, kind, *_ in each._fields_:
            if kind is ctypes.c_void_p and getattr(each, name):
                places.append((ctypes.addressof(each) + getattr(type(each), name).offset, name))
    addresses = {ctypes.addressof(each) for each in structs[1:]}
    for start, size, _ in regions[1:]:  # an array of addresses: the sampler's edits_at
        for place in range(start, start + size - 7, 8) if addresses else ():
            if ctypes.c_uint64.from_address(place).value in addresses:
                places.append((place, "edits_at"))
    found = []
    for place, name in places:
        where, to = _locate(regions, place), _locate(regions, ctypes.c_uint64.from_address(place).value)
        if where is None or to is None:
            raise AssertionError(f"{type(structs[0]).__name__}.{name} points to memory that the call does not hold")
        found.append((*where, *to))
    return found


def _locate(regions: list[Region], address: int) -> tuple[int, int] | None:
    for i, (start, size, _) in enumerate(regions):
        if start <= address < start + max(size, 1):
            return i, address - start
    return None


def _write(
    file: BinaryIO,
    symbol: str,
    regions: list[Region],
    before: list[bytes],
    relocations: list[tuple[int, int, int, int]],
) -> None:
    file.write(struct.pack("<QQQ", len(symbol), len(regions), len(relocations)) + symbol.encode())
    for (address, size, kind), content in zip(regions, before, strict=True):
        file.write(struct.pack("<QQ", size, kind) + content + ctypes.string_at(address, size))
    for each in relocations:
        file.write(struct.pack("<QQQQ", *each))
