"""Binding: evaluate every weight's recipe and stream the results into one safetensors file."""

import json
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from tritium.errors import CheckpointError, EngineError
from tritium.weights.hashed_file import HashedFile
from tritium.weights.recipes import Recipe, describe, evaluate, infer
from tritium.weights.safetensors import DTYPES
from tritium.weights.source import TensorSpec, WeightSource

ALIGNMENT = 64  # bytes: where the data starts in the file
DTYPE_CODES = {name: code for code, name in DTYPES.items()}
Progress = Callable[[str, int, int], None]


class Written(NamedTuple):
    """A file's size in bytes and its sha256 in hex."""

    size: int
    sha256: str


def check(
    recipes: Mapping[str, Recipe],
    specs: Mapping[str, TensorSpec],
    source: WeightSource,
    constants: Mapping[str, Tensor] | None = None,
) -> None:
    """Raise unless each weight of `specs` has a recipe that gives its dtype and shape. Reads no tensor."""
    for name, spec in specs.items():
        if name not in recipes:
            raise EngineError(f"weight {name!r} has no recipe; known: {', '.join(list(recipes)[:5])}, ...")
        found = infer(recipes[name], source, constants)
        if found != spec:
            raise CheckpointError(
                f"weight {name!r} = {describe(recipes[name])} is {found.dtype} {list(found.shape)}, expected "
                f"{spec.dtype} {list(spec.shape)}; config.json and the weights do not belong together"
            )


def bind(
    recipes: Mapping[str, Recipe],
    specs: Mapping[str, TensorSpec],
    source: WeightSource,
    path: str | Path,
    *,
    constants: Mapping[str, Tensor] | None = None,
    progress: Progress | None = None,
) -> Written:
    """Write the weights of `specs`, in that order, to the new safetensors file `path`; returns its size and hash.

    Everything is checked before the file is made. Memory: one recipe's inputs and output at a time. After an error the
    file is incomplete and must be thrown away (its header promises more bytes than it has, so no reader accepts it).
    progress(name, bytes done, bytes in all) is called after each weight.

    Raises `CheckpointError` for weights that are missing or do not fit, `EngineError` when the file cannot be written.
    """
    check(recipes, specs, source, constants)
    path = Path(path)
    header, total = _header(specs)
    free = shutil.disk_usage(path.parent).free
    if total + len(header) > free:
        raise EngineError(f"{path}: the weights take {total + len(header)} bytes, the disk has {free} bytes free")
    done = 0
    try:
        with HashedFile(path) as file:
            file.write(memoryview(header))
            for name, spec in specs.items():
                file.write(_bytes(evaluate(recipes[name], source, constants)))
                done += _size(spec)
                if progress is not None:
                    progress(name, done, total)
    except OSError as error:
        raise EngineError(f"{path}: could not be written after {done} of {total} bytes of weights: {error}") from error
    return Written(len(header) + total, file.sha256)


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().data


def _size(spec: TensorSpec) -> int:
    return math.prod(spec.shape) * getattr(torch, spec.dtype).itemsize


def _header(specs: Mapping[str, TensorSpec]) -> tuple[bytes, int]:
    """The file's first bytes (JSON's length, JSON, padding up to a multiple of ALIGNMENT), and the size of the data."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, spec in specs.items():
        begin, end = end, end + _size(spec)
        entries[name] = {"dtype": DTYPE_CODES[spec.dtype], "shape": list(spec.shape), "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text, end
