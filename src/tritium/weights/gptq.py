"""GPTQ checkpoints (AutoGPTQ, GPTQModel): 4 or 8 bits, with or without act-order.

A linear is qweight int32 [K * bits / 32, N], packed along the inputs; qzeros int32 [G, N * bits / 32]; scales [G, N];
and g_idx int32 [K], each input's group, which act-order has shuffled. A weight is (q - zero) * scale. The first
version of the format keeps zero - 1 (0 as the largest number), the second, checkpoint_format "gptq_v2", the zero
itself.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tritium.errors import CheckpointError
from tritium.quant.schemes import WeightFormat
from tritium.weights.packed_fields import HALF, Found, choice, group_size, grouped, whole
from tritium.weights.source import WeightSource
from tritium.weights.stored import Codes, StoredWeight, check_tensor, unpacked


def read_gptq(config: Mapping[str, Any], source: WeightSource, where: str) -> Found:
    """The quantised weights by name, and the tensors they are made of."""
    bits = choice(config, where, "bits", (4, 8), default=None)
    zero_offset = 1 if choice(config, where, "checkpoint_format", ("gptq", "gptq_v2"), default="gptq") == "gptq" else 0
    size, each = group_size(config, where), 32 // bits
    weights: dict[str, StoredWeight] = {}
    hidden: list[str] = []
    for name in [name for name in source.names if name.endswith(".qweight")]:
        base = name.removesuffix(".qweight")
        words, num_out = whole(source, name, "int32", 2)
        num_in = words * each
        num_groups = grouped(source, name, num_in, size)
        check_tensor(source, f"{base}.qzeros", ("int32",), (num_groups, -(-num_out // each)))
        check_tensor(source, f"{base}.scales", HALF, (num_groups, num_out))
        groups = _groups(source, f"{base}.g_idx", num_in, num_groups)
        zeros = _zeros(source, base, bits, zero_offset, num_out)
        kept = None
        if bits == 4 and groups is None and (zeros == 8).all() and num_in // num_groups % 32 == 0:
            kept = WeightFormat("int4", num_in // num_groups)
        read = partial(_read, source, base, bits, zero_offset, groups, kept)
        weights[f"{base}.weight"] = StoredWeight((num_out, num_in), read, kept)
        hidden += [f"{base}.{part}" for part in ("qweight", "qzeros", "scales", "g_idx")]
    return Found(weights, hidden)


def _read(
    source: WeightSource, base: str, bits: int, zero_offset: int, groups_K: Tensor | None, kept: WeightFormat | None
) -> Codes:
    numbers = unpacked(source.get(f"{base}.qweight").t(), bits)
    scales = source.get(f"{base}.scales").t()
    if kept is not None:
        return Codes(numbers.to(torch.int8) - 8, scales)
    return Codes(numbers, scales, _zeros(source, base, bits, zero_offset, numbers.shape[0]).t(), groups_K)


def _zeros(source: WeightSource, base: str, bits: int, offset: int, num_out: int) -> Tensor:
    """[G, N]; the first version's addition wraps around."""
    return (unpacked(source.get(f"{base}.qzeros"), bits)[:, :num_out].int() + offset) & ((1 << bits) - 1)


def _groups(source: WeightSource, name: str, num_in: int, num_groups: int) -> Tensor | None:
    """Each input's group; None when they lie in order (also when the file does not say, which is the same)."""
    if name not in source.names:
        return None
    check_tensor(source, name, ("int32", "int64"), (num_in,))
    groups = source.get(name).long()
    if int(groups.min()) < 0 or int(groups.max()) >= num_groups:
        raise CheckpointError(
            f"{source.where(name)}: tensor {name!r} names groups {int(groups.min())} to {int(groups.max())}, but there "
            f"are {num_groups}; the file is damaged"
        )
    in_order = torch.arange(num_in) // (num_in // num_groups)
    return None if torch.equal(groups, in_order) else groups
