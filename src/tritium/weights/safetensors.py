"""Safetensors directories, as people publish them: one file, or shards with an index.

A file is: 8 bytes header length (little endian), the header (JSON: name -> dtype, shape, data_offsets), the data.
Nothing in it is believed: lengths, offsets, sizes and names are checked when the directory is opened, before any tensor
memory is taken, and each problem names its file and tensor. Data is memory-mapped; a tensor is a view of the file.
"""

import json
import math
import mmap
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tritium.errors import CheckpointError
from tritium.weights.source import TensorSpec, missing_tensor

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000  # the safetensors library's own limit
MAX_INDEX_BYTES = 100_000_000
MAX_DIMS = 64  # torch's own limit; the product of a million sizes would take hours
DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U8": "uint8", "U16": "uint16", "U32": "uint32", "U64": "uint64", "BOOL": "bool",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
}  # fmt: skip
NO_RESERVE = 0x4000 if sys.platform == "linux" else 0  # MAP_NORESERVE: a file larger than memory can still be mapped
AGAIN = "the file is damaged or incomplete: download it again"


class Entry(NamedTuple):
    """A tensor in a file: its spec and where its bytes lie, counted from the start of the file."""

    spec: TensorSpec
    begin: int
    end: int


class SafetensorsSource:
    """The tensors of a model directory, or of one file. `CheckpointError` when one is missing or damaged."""

    def __init__(self, model_dir: str | Path) -> None:
        self._dir = Path(model_dir)
        self._files: dict[str, Path] = {}
        self._entries: dict[str, Entry] = {}
        self._maps: dict[Path, mmap.mmap] = {}
        single, index = self._dir / SINGLE_FILE, self._dir / INDEX_FILE
        if self._dir.is_file():
            self._add(self._dir, read_header(self._dir))
        elif single.is_file():
            self._add(single, read_header(single))
        elif index.is_file():
            self._open_shards(index)
        else:
            raise _no_weights(self._dir)

    @property
    def names(self) -> Collection[str]:
        return self._entries.keys()

    def where(self, name: str) -> str:
        return str(self._files.get(name, self._dir))

    def spec(self, name: str) -> TensorSpec:
        return self._find(name).spec

    def get(self, name: str) -> Tensor:
        entry, path = self._find(name), self._files[name]
        dtype = getattr(torch, entry.spec.dtype)
        if entry.begin == entry.end:
            return torch.empty(entry.spec.shape, dtype=dtype)
        data = torch.frombuffer(self._map(path), dtype=torch.uint8, offset=entry.begin, count=entry.end - entry.begin)
        if entry.begin % dtype.itemsize:
            data = data.clone()
        return data.view(dtype).view(entry.spec.shape)

    def release(self, name: str) -> None:
        """Give a tensor's pages back to the system; whoever reads them again reads the file again."""
        entry, path = self._find(name), self._files[name]
        begin = -(-entry.begin // mmap.PAGESIZE) * mmap.PAGESIZE  # pages that hold other tensors too are left
        end = entry.end // mmap.PAGESIZE * mmap.PAGESIZE
        if begin < end and path in self._maps and hasattr(mmap, "MADV_DONTNEED"):
            self._maps[path].madvise(mmap.MADV_DONTNEED, begin, end - begin)

    def _find(self, name: str) -> Entry:
        if name not in self._entries:
            raise missing_tensor(name, str(self._dir), self.names)
        return self._entries[name]

    def _map(self, path: Path) -> mmap.mmap:
        if path not in self._maps:
            with path.open("rb") as file:  # writable and private: torch wants it so; nothing is ever written back
                protection = mmap.PROT_READ | mmap.PROT_WRITE
                self._maps[path] = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE | NO_RESERVE, prot=protection)
        return self._maps[path]

    def _open_shards(self, index: Path) -> None:
        weight_map = _read_index(index)
        for file_name in dict.fromkeys(weight_map.values()):
            path = self._dir / file_name
            if not path.is_file():
                some = [name for name, of in weight_map.items() if of == file_name]
                raise CheckpointError(
                    f"{path}: this shard is missing; {index.name} places {len(some)} tensors in it, e.g. {some[0]!r}: "
                    "download it again"
                )
            self._add(path, read_header(path))
        for name, file_name in weight_map.items():
            if self._files.get(name) != self._dir / file_name:
                raise CheckpointError(
                    f"{index}: places tensor {name!r} in {file_name}, which does not hold it: index and shards are of "
                    "different downloads; download them again"
                )

    def _add(self, path: Path, entries: dict[str, Entry]) -> None:
        for name, entry in entries.items():
            if name in self._entries:
                raise CheckpointError(
                    f"{path}: tensor {name!r} is also in {self._files[name].name}; shards of different downloads are "
                    "mixed: download them again"
                )
            self._files[name], self._entries[name] = path, entry


def read_header(path: Path) -> dict[str, Entry]:
    """Every tensor of a file, checked: known dtypes, sizes that match, no gap, no overlap, nothing beyond the file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        if len(prefix) < 8:
            raise CheckpointError(f"{path}: is {size} bytes long, too short for a safetensors file; {AGAIN}")
        length = int.from_bytes(prefix, "little")
        if length > min(MAX_HEADER_BYTES, size - 8):
            raise CheckpointError(
                f"{path}: says its header is {length} bytes long, but the file has {size} bytes (and a header at most "
                f"{MAX_HEADER_BYTES}); {AGAIN}"
            )
        header = _parse_json(path, file.read(length))
    header.pop("__metadata__", None)
    entries = {name: _entry(path, name, fields, 8 + length, size) for name, fields in header.items()}
    position = 8 + length
    for name, entry in sorted(entries.items(), key=lambda item: item[1][1:]):
        if entry.begin != position:
            problem = "overlaps the tensor before it" if entry.begin < position else "leaves a gap before it"
            raise CheckpointError(
                f"{path}: tensor {name!r} starts at byte {entry.begin}, {problem} ({position}); {AGAIN}"
            )
        position = entry.end
    if position != size:
        raise CheckpointError(f"{path}: has {size} bytes, its tensors end at byte {position}; {AGAIN}")
    return entries


def _entry(path: Path, name: str, fields: Any, data_start: int, size: int) -> Entry:
    try:
        dtype, shape, (begin, end) = fields["dtype"], fields["shape"], fields["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(f"{path}: tensor {name!r} is described by {str(fields)[:100]!r}; {AGAIN}") from None
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(
            f"{path}: tensor {name!r} has dtype {dtype!r}, which is not one of {', '.join(DTYPES)}: {AGAIN}, or use an "
            "unquantised checkpoint"
        )
    if not isinstance(shape, list) or len(shape) > MAX_DIMS or not all(_is_size(n) for n in [*shape, begin, end]):
        raise CheckpointError(
            f"{path}: tensor {name!r} has shape {str(shape)[:100]} and offsets {str([begin, end])[:100]}; {AGAIN}"
        )
    needed = math.prod(shape) * getattr(torch, DTYPES[dtype]).itemsize
    if end - begin != needed:
        raise CheckpointError(
            f"{path}: tensor {name!r} takes bytes {begin} to {end}, but {dtype} {shape} takes {needed} bytes; {AGAIN}"
        )
    if data_start + end > size:
        raise CheckpointError(
            f"{path}: tensor {name!r} ends at byte {data_start + end}, but the file has {size} bytes; {AGAIN}"
        )
    return Entry(TensorSpec(DTYPES[dtype], tuple(shape)), data_start + begin, data_start + end)


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62


def _read_index(path: Path) -> dict[str, str]:
    if path.stat().st_size > MAX_INDEX_BYTES:
        raise CheckpointError(f"{path}: is {path.stat().st_size} bytes long, more than an index can be; {AGAIN}")
    weight_map = _parse_json(path, path.read_bytes()).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: field 'weight_map' is {str(weight_map)[:60]}, expected tensor -> file; {AGAIN}")
    for name, file_name in weight_map.items():
        is_plain = (
            isinstance(file_name, str) and Path(file_name).name == file_name and file_name.endswith(".safetensors")
        )
        if not is_plain:
            raise CheckpointError(
                f"{path}: places tensor {name!r} in {file_name!r}; expected a .safetensors file in the same directory"
            )
    return weight_map


def _parse_json(path: Path, data: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            names = [name for name, _ in pairs]
            double = next(name for name in names if names.count(name) > 1)
            raise CheckpointError(f"{path}: names {double!r} twice; {AGAIN}")
        return found

    try:
        value = json.loads(data, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the header is not JSON ({error}); {AGAIN}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: the header is a {type(value).__name__}, not a JSON object; {AGAIN}")
    return value


def _no_weights(model_dir: Path) -> CheckpointError:
    if not model_dir.is_dir():
        return CheckpointError(
            f"{model_dir}: there is no such directory; name a directory with config.json and {SINGLE_FILE}"
        )
    old = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in model_dir.glob(pattern))
    if old:
        convert = (
            f"python -c \"from transformers import AutoModelForCausalLM as M; M.from_pretrained('{model_dir}', "
            f"dtype='auto').save_pretrained('{model_dir}-safetensors')\""
        )
        return CheckpointError(
            f"{model_dir}: the weights are {old[0]}, a pickle, which can run code when it is opened; Tritium reads "
            f"only safetensors. Convert them, and copy the tokenizer files beside them: {convert}"
        )
    others = sorted(p.name for p in model_dir.glob("*.safetensors"))
    hint = f"; it has {', '.join(others[:3])}, which is not the Hugging Face layout" if others else ""
    return CheckpointError(f"{model_dir}: has neither {SINGLE_FILE} nor {INDEX_FILE}{hint}: download the model again")
