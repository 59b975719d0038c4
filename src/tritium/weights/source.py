"""Where checkpoint tensors come from: one small protocol, and its in-memory implementations.

`SafetensorsSource` (files) is in `weights/safetensors.py`, `DummySource` (no files at all) in `weights/dummy.py`.
"""

import difflib
from collections.abc import Collection, Mapping
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from tritium.errors import CheckpointError

FLOAT_DTYPES = ("float32", "bfloat16", "float16", "float64")


class TensorSpec(NamedTuple):
    """dtype: torch's name without `torch.`; shape: sizes."""

    dtype: str
    shape: tuple[int, ...]


class WeightSource(Protocol):
    """Named tensors, readable in any order, any number of times."""

    @property
    def names(self) -> Collection[str]:
        """The name of every tensor."""
        ...

    def where(self, name: str) -> str:
        """The file (or object) that holds, or should hold, a tensor; for messages."""
        ...

    def spec(self, name: str) -> TensorSpec:
        """dtype and shape, without reading the tensor. `CheckpointError` when there is no such tensor."""
        ...

    def get(self, name: str) -> Tensor:
        """The tensor on the CPU; perhaps a view of a file: do not write to it. `CheckpointError` when missing."""
        ...


class DictSource:
    """Tensors of a mapping, e.g. a state dict. `label` says in messages where they came from."""

    def __init__(self, tensors: Mapping[str, Tensor], label: str = "the given state dict") -> None:
        self._tensors, self._label = tensors, label

    @property
    def names(self) -> Collection[str]:
        return self._tensors.keys()

    def where(self, name: str) -> str:
        return self._label

    def spec(self, name: str) -> TensorSpec:
        tensor = self._find(name)
        return TensorSpec(dtype_name(tensor.dtype), tuple(tensor.shape))

    def get(self, name: str) -> Tensor:
        tensor = self._find(name)
        if tensor.is_meta:
            raise CheckpointError(
                f"{self._label}: {name!r} is on the meta device and has no values; pass weights=, or create the module "
                'with real tensors (weights="dummy" fills any model with random ones)'
            )
        return tensor.detach().cpu()

    def _find(self, name: str) -> Tensor:
        if name not in self._tensors:
            raise missing_tensor(name, self._label, self._tensors.keys())
        return self._tensors[name]


class ModuleSource(DictSource):
    """The parameters and buffers of a module, by the names the module gives them (tied ones under each name)."""

    def __init__(self, module: nn.Module) -> None:
        tensors: dict[str, Tensor] = dict(module.named_parameters(remove_duplicate=False))
        tensors |= dict(module.named_buffers(remove_duplicate=False))
        super().__init__(tensors, f"module {type(module).__name__}")


def missing_tensor(name: str, where: str, names: Collection[str]) -> CheckpointError:
    """The error for a tensor that is not there, with the nearest name that is."""
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"; nearest: {near[0]!r}" if near else ""
    return CheckpointError(f"{where}: tensor {name!r} is missing ({len(names)} tensors are there{hint})")


def dtype_name(dtype: torch.dtype) -> str:
    """torch's name without `torch.`: "bfloat16"."""
    return str(dtype).removeprefix("torch.")
