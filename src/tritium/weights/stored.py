"""Weights that a checkpoint keeps quantised: what is read of them, and a source that shows them as plain tensors.

Sizes: N outputs, K inputs, G groups. A weight is `(number - zero) * scale`, computed in fp32; a checkpoint's scales and
numbers have so few bits that the product of half-precision scales is exact.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tritium.errors import CheckpointError
from tritium.quant.schemes import WeightFormat
from tritium.quant.weights import DTYPES, SCALE_DTYPES, pack_nibbles
from tritium.weights.source import TensorSpec, WeightSource, missing_tensor


@dataclass(frozen=True)
class Codes:
    """numbers_NK: int8, uint8 or e4m3. scales_NG, zeros_NG (None: zero): floating. groups_K: each input's group, int64;
    None: K / G inputs after each other share one.
    """

    numbers_NK: Tensor
    scales_NG: Tensor
    zeros_NG: Tensor | None = None
    groups_K: Tensor | None = None

    def dequantized(self) -> Tensor:
        """fp32 [N, K]."""
        out = self.numbers_NK.float()
        if self.zeros_NG is not None:
            out -= self._by_input(self.zeros_NG)
        return out * self._by_input(self.scales_NG)

    def _by_input(self, values_NG: Tensor) -> Tensor:
        num_in = self.numbers_NK.shape[1]
        if self.groups_K is not None:
            return values_NG.float()[:, self.groups_K]
        return values_NG.float().repeat_interleave(num_in // values_NG.shape[1], 1)


@dataclass(frozen=True)
class StoredWeight:
    """shape: [N, K]. read: its codes. format: in which kernels can take the codes as they are; None: they cannot, and
    the weight is used dequantised.

    With a format the codes have no zeros, signed numbers and groups in order.
    """

    shape: tuple[int, int]
    read: Callable[[], Codes]
    format: WeightFormat | None = None

    def numbers(self) -> Tensor:
        """As `quant.weights.quantize_weight` lays them out."""
        assert self.format is not None
        numbers = self.read().numbers_NK
        return pack_nibbles(numbers) if self.format.kind == "int4" else numbers.to(DTYPES[self.format.kind])

    def scales(self) -> Tensor:
        """[N, G] in the format's own dtype: half-precision scales of 4-bit weights are rounded to bfloat16."""
        assert self.format is not None
        return self.read().scales_NG.to(SCALE_DTYPES[self.format.kind])


class QuantizedSource:
    """`files` with its quantised weights as fp32 tensors under plain names. hidden: tensors they are made of."""

    def __init__(self, files: WeightSource, weights: Mapping[str, StoredWeight], hidden: Collection[str]) -> None:
        self._files, self._weights, self._label = files, weights, files.where("")
        hidden = set(hidden)
        for name in weights:
            if name in files.names and name not in hidden:
                raise CheckpointError(
                    f"{files.where(name)}: holds {name!r} both quantised and as a plain tensor; download it again"
                )
        self._names = dict.fromkeys([*(n for n in files.names if n not in hidden), *weights])

    @property
    def names(self) -> Collection[str]:
        return self._names.keys()

    def where(self, name: str) -> str:
        return self._files.where(name) if name in self._files.names else self._label

    def spec(self, name: str) -> TensorSpec:
        if name in self._weights:
            return TensorSpec("float32", self._weights[name].shape)
        return self._plain(name).spec(name)

    def get(self, name: str) -> Tensor:
        if name in self._weights:
            return self._weights[name].read().dequantized()
        return self._plain(name).get(name)

    def stored(self, name: str) -> StoredWeight | None:
        """The weight as the checkpoint keeps it; None for a plain tensor."""
        return self._weights.get(name)

    def _plain(self, name: str) -> WeightSource:
        if name not in self._names:
            raise missing_tensor(name, self._label, self.names)
        return self._files


def stored_weight(source: WeightSource, name: str) -> StoredWeight | None:
    """How `source` keeps a weight; None: as a plain tensor."""
    return source.stored(name) if isinstance(source, QuantizedSource) else None


def unpacked(packed_RC: Tensor, bits: int) -> Tensor:
    """int32 [R, C] as uint8 [R, C * 32 / bits]: the numbers of a word from its lowest bits up."""
    data = packed_RC.contiguous().view(torch.uint8)
    return data if bits == 8 else torch.stack((data & 15, data >> 4), -1).flatten(-2)


def tensor_of(source: WeightSource, name: str, dtypes: Collection[str], shape: tuple[int, ...]) -> Tensor:
    """A tensor that must have one of these dtypes and this shape."""
    check_tensor(source, name, dtypes, shape)
    return source.get(name)


def check_tensor(source: WeightSource, name: str, dtypes: Collection[str], shape: tuple[int, ...]) -> None:
    """Raise `CheckpointError` unless the tensor is there, in one of these dtypes and this shape."""
    spec = source.spec(name)
    if spec.dtype not in dtypes or spec.shape != shape:
        raise CheckpointError(
            f"{source.where(name)}: tensor {name!r} is {spec.dtype} {list(spec.shape)}, expected {' or '.join(dtypes)} "
            f"{list(shape)} beside what else there is of this weight; the file is damaged or quantised in another way"
        )
