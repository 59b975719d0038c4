"""AWQ checkpoints (AutoAWQ's `gemm` layout): 4 bits, zeros per group.

A linear is three tensors: qweight int32 [K, N / 8], qzeros int32 [G, N / 8], scales float16 [G, N]. The eight outputs
of a word lie, from its lowest bits up, in the order 0 2 4 6 1 3 5 7. A weight is (q - zero) * scale.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tritium.errors import UnsupportedModel
from tritium.quant.schemes import WeightFormat
from tritium.weights.packed_fields import HALF, Found, choice, group_size, grouped, whole
from tritium.weights.source import WeightSource
from tritium.weights.stored import Codes, StoredWeight, check_tensor, unpacked

ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # where in its word an output lies
MIDDLE = 8


def read_awq(config: Mapping[str, Any], source: WeightSource, where: str) -> Found:
    """The quantised weights by name, and the tensors they are made of."""
    choice(config, where, "bits", (4,), default=None)
    if str(config.get("version", "gemm")).lower() != "gemm":
        raise UnsupportedModel(
            f"{where}: quantization_config.version is {config.get('version')!r}; of AWQ only the 'gemm' layout is read"
        )
    size = group_size(config, where)
    weights: dict[str, StoredWeight] = {}
    hidden: list[str] = []
    for name in [name for name in source.names if name.endswith(".qweight")]:
        base = name.removesuffix(".qweight")
        parts = (name, f"{base}.qzeros", f"{base}.scales")
        num_in, words = whole(source, name, "int32", 2)
        num_groups = grouped(source, name, num_in, size)
        check_tensor(source, parts[1], ("int32",), (num_groups, words))
        check_tensor(source, parts[2], HALF, (num_groups, words * 8))
        zeros = _outputs_last(source.get(parts[1]))
        is_symmetric = bool((zeros == MIDDLE).all())
        kept = WeightFormat("int4", num_in // num_groups) if is_symmetric and num_in // num_groups % 32 == 0 else None
        weights[f"{base}.weight"] = StoredWeight((words * 8, num_in), partial(_read, source, parts, kept), kept)
        hidden += parts
    return Found(weights, hidden)


def _read(source: WeightSource, parts: tuple[str, str, str], kept: WeightFormat | None) -> Codes:
    numbers, zeros = (_outputs_last(source.get(name)).t() for name in parts[:2])
    scales = source.get(parts[2]).t()
    if kept is not None:
        return Codes(numbers.to(torch.int8) - MIDDLE, scales)
    return Codes(numbers, scales, zeros)


def _outputs_last(packed: Tensor) -> Tensor:
    """[rows, N / 8] words as [rows, N] numbers."""
    return unpacked(packed, 4).unflatten(1, (-1, 8))[..., list(ORDER)].flatten(1)
