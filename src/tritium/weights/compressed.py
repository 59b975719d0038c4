"""compressed-tensors checkpoints (LLM Compressor) and fp8 ones: integers or e4m3 with scales beside them.

pack-quantized   weight_packed int32 [N, K * bits / 32], numbers + 2 ** (bits - 1); weight_shape; weight_scale [N, G];
                 weight_zero_point int32 [N * bits / 32, G], packed the same way, or int8 [N, G]; weight_g_idx [K]
int-quantized    weight int8 [N, K], weight_scale [N, G] or one for all; weight_zero_point int8 like it
float-quantized  weight e4m3 [N, K], weight_scale the same
fp8              weight e4m3 [N, K], weight_scale as above, or weight_scale_inv for blocks (weight_block_size)

What a linear is follows from its tensors; the configuration's groups are not needed for it.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tritium.errors import CheckpointError, UnsupportedModel
from tritium.quant.schemes import FP8, INT8, WeightFormat
from tritium.weights.packed_fields import HALF, Found, choice, whole
from tritium.weights.source import WeightSource
from tritium.weights.stored import Codes, StoredWeight, check_tensor, unpacked

FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "dense", None)
OTHER_SCALES = (".input_scale", ".input_zero_point", ".output_scale", ".k_scale", ".v_scale", ".q_scale")
INDEX = ("int32", "int64")


def read_compressed(config: Mapping[str, Any], source: WeightSource, where: str) -> Found:
    """The quantised weights by name, and the tensors they are made of."""
    choice(config, where, "format", FORMATS, default=None)
    for name in ("sparsity_config", "transform_config"):
        if value := config.get(name):
            raise UnsupportedModel(
                f"{where}: quantization_config.{name} is {str(value)[:80]}; only plain ones are read"
            )
    return _found(source, None)


def read_fp8(config: Mapping[str, Any], source: WeightSource, where: str) -> Found:
    """The same for quant_method "fp8"."""
    choice(config, where, "fmt", ("e4m3", None), default=None)
    block = config.get("weight_block_size")
    is_block = isinstance(block, list) and len(block) == 2 and all(type(n) is int and 1 <= n <= 1 << 16 for n in block)
    if block is not None and not is_block:
        raise CheckpointError(f"{where}: quantization_config.weight_block_size is {block!r:.80}, expected two sizes")
    return _found(source, tuple(block) if is_block else None)  # type: ignore[arg-type]


def _found(source: WeightSource, block: tuple[int, ...] | None) -> Found:
    weights: dict[str, StoredWeight] = {}
    hidden = [name for name in source.names if name.endswith(OTHER_SCALES)]
    for name in source.names:
        base, _, kind = name.rpartition(".")
        if kind == "weight_packed":
            weights[f"{base}.weight"] = _packed(source, base)
        elif kind == "weight" and source.spec(name).dtype in ("int8", "float8_e4m3fn"):
            weights[name] = _plain(source, base, block)
        else:
            continue
        parts = ("weight_packed", "weight_shape", "weight_scale", "weight_scale_inv", "weight_zero_point")
        hidden += [f"{base}.{part}" for part in (kind, *parts, "weight_g_idx")]
    return Found(weights, hidden)


def _packed(source: WeightSource, base: str) -> StoredWeight:
    name = f"{base}.weight_packed"
    num_rows, words = whole(source, name, "int32", 2)
    check_tensor(source, f"{base}.weight_shape", INDEX, (2,))
    num_out, num_in = (int(size) for size in source.get(f"{base}.weight_shape"))
    bits = next((b for b in (4, 8) if 0 < num_in <= words * 32 and -(-num_in * b // 32) == words), 0)
    if num_out != num_rows or not bits:
        raise CheckpointError(
            f"{source.where(name)}: tensor {name!r} is [{num_rows}, {words}], but its weight_shape says [{num_out}, "
            f"{num_in}], which takes so many words in neither 4 nor 8 bits; the file is damaged or of another kind"
        )
    num_groups = _num_groups(source, f"{base}.weight_scale", (num_out, num_in))
    groups = _groups(source, f"{base}.weight_g_idx", num_in, num_groups)
    zeros = _packed_zeros(source, base, bits, (num_out, num_groups))
    is_plain = zeros is None and groups is None
    kept = None
    if is_plain and bits == 4 and num_in // num_groups % 32 == 0:
        kept = WeightFormat("int4", num_in // num_groups)
    if is_plain and bits == 8 and num_groups == 1:
        kept = INT8

    def read() -> Codes:
        numbers = (unpacked(source.get(name), bits)[:, :num_in].int() - (1 << (bits - 1))).to(torch.int8)
        scales = _full(source.get(f"{base}.weight_scale"), num_out)
        return Codes(numbers, scales, _packed_zeros(source, base, bits, (num_out, num_groups)), groups)

    return StoredWeight((num_out, num_in), read, kept)


def _plain(source: WeightSource, base: str, block: tuple[int, ...] | None) -> StoredWeight:
    name = f"{base}.weight"
    dtype = source.spec(name).dtype
    num_out, num_in = whole(source, name, dtype, 2)
    inverse, zeros_name = f"{base}.weight_scale_inv", f"{base}.weight_zero_point"
    if block is not None and inverse in source.names:
        rows, columns = block
        check_tensor(source, inverse, HALF, (-(-num_out // rows), -(-num_in // columns)))
        return StoredWeight((num_out, num_in), partial(_blocks, source, name, inverse, rows, columns))
    scale = inverse if inverse in source.names else f"{base}.weight_scale"
    num_groups = _num_groups(source, scale, (num_out, num_in))
    has_zeros = zeros_name in source.names
    if has_zeros:
        check_tensor(source, zeros_name, ("int8",), source.spec(scale).shape)
        has_zeros = bool(source.get(zeros_name).any())
    kept = (FP8 if dtype == "float8_e4m3fn" else INT8) if num_groups == 1 and not has_zeros else None

    def read() -> Codes:
        zeros = _full(source.get(zeros_name), num_out) if has_zeros else None
        return Codes(source.get(name), _full(source.get(scale), num_out), zeros)

    return StoredWeight((num_out, num_in), read, kept)


def _blocks(source: WeightSource, name: str, inverse: str, rows: int, columns: int) -> Codes:
    numbers = source.get(name)
    scales = source.get(inverse).float().repeat_interleave(rows, 0)[: numbers.shape[0]]
    return Codes(numbers, scales, groups_K=torch.arange(numbers.shape[1]) // columns)


def _num_groups(source: WeightSource, name: str, weight: tuple[int, int]) -> int:
    """Of a scale that is [N, G], or one number for all outputs."""
    spec, (num_out, num_in) = source.spec(name), weight
    if spec.dtype in HALF and spec.shape in ((), (1,), (1, 1)):
        return 1
    is_matrix = len(spec.shape) == 2 and spec.shape[0] == num_out and 1 <= spec.shape[1] <= num_in
    if spec.dtype not in HALF or not is_matrix or num_in % spec.shape[1]:
        raise CheckpointError(
            f"{source.where(name)}: tensor {name!r} is {spec.dtype} {list(spec.shape)}, expected floating-point scales "
            f"of a weight {list(weight)}: one, [{num_out}, 1] or one a group of inputs; the file is damaged"
        )
    return spec.shape[1]


def _groups(source: WeightSource, name: str, num_in: int, num_groups: int) -> Tensor | None:
    """Each input's group where the file says it."""
    if name not in source.names:
        return None
    check_tensor(source, name, INDEX, (num_in,))
    groups = source.get(name).long()
    if int(groups.min()) < 0 or int(groups.max()) >= num_groups:
        raise CheckpointError(
            f"{source.where(name)}: tensor {name!r} names groups {int(groups.min())} to {int(groups.max())}, but there "
            f"are {num_groups}; the file is damaged"
        )
    return groups


def _packed_zeros(source: WeightSource, base: str, bits: int, shape: tuple[int, int]) -> Tensor | None:
    """Signed zeros [N, G]; None when all are zero or none are given."""
    name, each = f"{base}.weight_zero_point", 32 // bits
    if name not in source.names:
        return None
    if source.spec(name).dtype == "int8":
        check_tensor(source, name, ("int8",), shape)
        zeros = source.get(name).int()
    else:
        check_tensor(source, name, ("int32",), (-(-shape[0] // each), shape[1]))
        zeros = unpacked(source.get(name).t(), bits)[:, : shape[0]].t().int() - (1 << (bits - 1))
    return zeros if bool(zeros.any()) else None


def _full(values: Tensor, num_out: int) -> Tensor:
    """[N, G] of that, or of one number for all."""
    return (
        values.expand(num_out, 1)
        if values.dim() == 2 and values.shape[0] == 1
        else (values if values.dim() == 2 else values.reshape(1, 1).expand(num_out, 1))
    )
