"""Checkpoints as other programs quantise them, written number by number as their formats say; small and slow."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from tritium.testing.tiny_models import write_tensors

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # output that the i-th four bits of a word are of
Writer = Callable[[str, Tensor, torch.Generator], tuple[dict[str, Tensor], Tensor]]


def quantize_checkpoint(plain: Path, path: Path, config: dict[str, Any], writer: Writer, seed: int = 0) -> Path:
    """Write `plain` anew with the linears of its layers as `writer` keeps them; beside it, at `plain_of(path)`,
    the same weights dequantised, in fp32. Returns `path`.

    writer: a weight's name without `.weight`, the weight [N, K] and a source of numbers, to its tensors and what they
    stand for.
    """
    generator = torch.Generator().manual_seed(seed)
    kept: dict[str, Tensor] = {}
    dequantized: dict[str, Tensor] = {}
    for name, tensor in load_file(plain / "model.safetensors").items():
        if not name.endswith("_proj.weight"):
            kept[name] = dequantized[name] = tensor
            continue
        tensors, dequantized[name] = writer(name.removesuffix(".weight"), tensor, generator)
        kept |= tensors
    described = json.loads((plain / "config.json").read_text())
    for folder, tensors, more in ((path, kept, {"quantization_config": config}), (plain_of(path), dequantized, {})):
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(described | more))
        write_tensors(folder, {name: tensor.contiguous() for name, tensor in tensors.items()})
    return path


def plain_of(path: Path) -> Path:
    """Where the same weights lie dequantised."""
    return path.with_name(path.name + "-plain")


def drawn(
    weight: Tensor, group: int, levels: int, zero: int | None, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers [N, K] from 0 to levels - 1, zeros [N, G] (`zero`, or drawn), and scales [N, G] that bfloat16 holds."""
    num_out, num_in = weight.shape
    shape = (num_out, num_in // group)
    scales = weight.unflatten(1, (-1, group)).abs().amax(-1) / (levels / 2)
    scales = (scales.bfloat16() * (1 + torch.randint(0, 2, shape, generator=generator) / 4)).bfloat16().float()
    zeros = torch.full(shape, zero) if zero is not None else torch.randint(1, levels, shape, generator=generator)
    numbers = (weight / scales.repeat_interleave(group, 1)).round() + zeros.repeat_interleave(group, 1)
    return numbers.clamp(0, levels - 1).int(), zeros.int(), scales


def value(numbers: Tensor, zeros: Tensor, scales: Tensor, groups_K: Tensor) -> Tensor:
    """(number - zero) * scale, one input after the other."""
    columns = [(numbers[:, k] - zeros[:, g]).float() * scales[:, g] for k, g in enumerate(groups_K.tolist())]
    return torch.stack(columns, 1)


def words(numbers: Tensor, bits: int, order: tuple[int, ...] = ()) -> Tensor:
    """[rows, n] numbers as int32 words [rows, n * bits / 32]: the first (or order[0]th) in a word's lowest bits."""
    each = 32 // bits
    rows = torch.nn.functional.pad(numbers.long(), (0, -numbers.shape[1] % each)).unflatten(1, (-1, each))
    total = sum(rows[..., j] << (bits * i) for i, j in enumerate(order or range(each)))
    return torch.where(total >= 1 << 31, total - (1 << 32), total).to(torch.int32)


def awq_writer(group: int, zero: int | None) -> Writer:
    """AutoAWQ's gemm layout."""

    def write(base: str, weight: Tensor, generator: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
        numbers, zeros, scales = drawn(weight, group, 16, zero, generator)
        tensors = {
            f"{base}.qweight": words(numbers.t(), 4, AWQ_ORDER),
            f"{base}.qzeros": words(zeros.t(), 4, AWQ_ORDER),
            f"{base}.scales": scales.t().half(),
        }
        return tensors, value(numbers, zeros, scales, torch.arange(weight.shape[1]) // group)

    return write


def gptq_writer(
    group: int, zero: int | None, *, bits: int = 4, is_act_order: bool = False, is_v2: bool = False
) -> Writer:
    """AutoGPTQ's layout, of the first or the second version."""

    def write(base: str, weight: Tensor, generator: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
        levels = 1 << bits
        numbers, zeros, scales = drawn(weight, group, levels, zero, generator)
        groups = torch.arange(weight.shape[1]) // group
        if is_act_order:
            groups = groups[torch.randperm(len(groups), generator=generator)]
        tensors = {
            f"{base}.qzeros": words(zeros.t() if is_v2 else (zeros.t() - 1) % levels, bits),
            f"{base}.scales": scales.t().half(),
            f"{base}.g_idx": groups.int(),
        }
        tensors[f"{base}.qweight"] = words(numbers, bits).t()  # words run along the inputs
        return tensors, value(numbers, zeros, scales, groups)

    return write


def packed_writer(group: int, zero: int | None, *, bits: int = 4, has_order: bool = False) -> Writer:
    """compressed-tensors' pack-quantized. group 0: a scale for each output."""

    def write(base: str, weight: Tensor, generator: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
        size = group or weight.shape[1]
        numbers, zeros, scales = drawn(weight, size, 1 << bits, zero, generator)
        groups = torch.arange(weight.shape[1]) // size
        tensors = {
            f"{base}.weight_packed": words(numbers, bits),
            f"{base}.weight_scale": scales.bfloat16(),
            f"{base}.weight_shape": torch.tensor(weight.shape),
        }
        if has_order:
            groups = groups[torch.randperm(len(groups), generator=generator)]
            tensors[f"{base}.weight_g_idx"] = groups.int()
        if zero is None:
            tensors[f"{base}.weight_zero_point"] = words(zeros.t(), bits).t()
        return tensors, value(numbers, zeros, scales, groups)

    return write


def int8_writer(has_zeros: bool) -> Writer:
    """compressed-tensors' int-quantized, with a scale (and a zero) for each output."""

    def write(base: str, weight: Tensor, generator: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
        numbers, zeros, scales = drawn(weight, weight.shape[1], 256, None if has_zeros else 128, generator)
        tensors = {
            f"{base}.weight": (numbers - 128).to(torch.int8),
            f"{base}.weight_scale": scales,
            f"{base}.input_scale": torch.ones(1),
        }
        if has_zeros:
            tensors[f"{base}.weight_zero_point"] = (zeros - 128).to(torch.int8)
        return tensors, value(numbers, zeros, scales, torch.zeros(weight.shape[1], dtype=torch.int64))

    return write


def fp8_writer(kind: str, block: int = 48) -> Writer:
    """e4m3 with scales by "channel", "tensor" or square "block"."""

    def write(base: str, weight: Tensor, generator: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
        num_out, num_in = weight.shape
        rows, columns = {"channel": (1, num_in), "tensor": (num_out, num_in), "block": (block, block)}[kind]
        shape = (-(-num_out // rows), -(-num_in // columns))
        scales = torch.rand(shape, generator=generator) / 100 + 0.01
        full = torch.tensor([[scales[n // rows, k // columns] for k in range(num_in)] for n in range(num_out)])
        numbers = (weight / full).clamp(-448, 448).to(torch.float8_e4m3fn)
        name = "weight_scale_inv" if kind == "block" else "weight_scale"
        kept = scales.reshape(1) if kind == "tensor" else scales
        return {f"{base}.weight": numbers, f"{base}.{name}": kept}, numbers.float() * full

    return write
