"""quantized_linear, alone or with an activation, compiled (csrc/linear_quantized.cpp): weights of 8 and 4 bits."""

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tritium.errors import KernelError
from tritium.kernels.cpu import library, memory
from tritium.kernels.cpu.activations import refuse_kind
from tritium.kernels.cpu.layout import Reads, dense_output
from tritium.kernels.cpu.linear import PackedWeight
from tritium.kernels.kernel import Scalar, Thunk
from tritium.ops.activations import KINDS
from tritium.ops.quantized import steps_of

PATHS = ("auto", "vectors", "tiles", "groups")  # csrc/linear_quantized_rows.h Path
MAX_IN_GROUP, TILE_BYTES = 512, 64  # csrc/linear_quantized_tiles.h
MAX_INPUTS = 1 << 16  # 255 * 127 times this fits 32 bits
GROUP_MULTIPLE = 32


class QuantizedLinearArgs(ctypes.Structure):
    """csrc/linear_quantized.cpp QuantizedLinearArgs."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "weight", "bias", "units", "steps", "out")),
        *((name, ctypes.c_int64) for name in ("num_outer", "num_inner", "stride_outer", "stride_inner")),
        *((name, ctypes.c_int64) for name in ("num_in", "num_out", "num_groups", "kind")),
        *((name, ctypes.c_int32) for name in ("bits", "int8_activations", "is_gated")),
        ("residual", ctypes.c_void_p),
        ("has_rows", ctypes.c_int64),
        ("path", ctypes.c_int32),
    ]


class QuantizedPackArgs(ctypes.Structure):
    """csrc/linear_quantized.cpp QuantizedPackArgs."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("weight", "out")),
        *((name, ctypes.c_int64) for name in ("num_in", "num_out")),
        *((name, ctypes.c_int32) for name in ("bits", "is_gated")),
    ]


class ScalesPackArgs(ctypes.Structure):
    """csrc/linear_quantized.cpp ScalesPackArgs."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("scales", "out")),
        *((name, ctypes.c_int64) for name in ("num_out", "num_groups", "item_size")),
        ("is_gated", ctypes.c_int32),
    ]


def supports(args: Mapping[str, Any]) -> str | None:
    """8 bits with a scale per output in fp32, or 4 bits in groups of a multiple of 32 with scales in bf16."""
    x, qweight, scales = args["x"], args["qweight"], args["scales_NG"]
    num_in, num_groups = qweight.shape[1] * (2 if qweight.dtype == torch.uint8 else 1), scales.shape[1]
    has_rows = x.dtype == torch.int8
    if has_rows and not (args["int8_activations"] and getattr(torch, args.get("dtype", ""), None) in library.SUFFIXES):
        return "x is int8, which it has no code for without int8_activations and the dtype of the result"
    if reason := library.refuse({"bias": args.get("bias")} | ({} if has_rows else {"x": x})):
        return reason
    if num_in > MAX_INPUTS:
        return f"{num_in} inputs are more than {MAX_INPUTS}: a sum might not fit 32 bits"
    kind = f"{str(qweight.dtype)[6:]} in {num_groups} groups with scales in {str(scales.dtype)[6:]}"
    if qweight.dtype == torch.int8 and scales.dtype == torch.float32 and num_groups == 1:
        return None
    if qweight.dtype == torch.uint8 and scales.dtype == torch.bfloat16 and num_in % (num_groups * GROUP_MULTIPLE) == 0:
        return None
    return f"it has no code for a weight of {num_in} inputs kept as {kind}"


def supports_activation(args: Mapping[str, Any]) -> str | None:
    """The same, and a kind of activation that csrc knows."""
    return refuse_kind(args["kind"]) or supports(args)


def supports_add(args: Mapping[str, Any]) -> str | None:
    """The same, and a residual of the activations' dtype."""
    x = {} if args["x"].dtype == torch.int8 else {"x": args["x"]}
    return library.refuse(x | {"residual": args["residual"]}) or supports(args)


def supports_tactic(args: Mapping[str, Any], tactic: Mapping[str, Scalar]) -> str | None:
    """There is something to choose on AMX alone, and other paths where sums are exact: the bits stay."""
    num_in = args["qweight"].shape[1] * (2 if args["qweight"].dtype == torch.uint8 else 1)
    group_size = num_in // args["scales_NG"].shape[1] if args["qweight"].dtype == torch.uint8 else None
    return _refuse_path(args, group_size, str(tactic["path"]))


def _refuse_path(args: Mapping[str, Any], group_size: int | None, path: str) -> str | None:
    """group_size: of 4 bits."""
    if path not in PATHS:
        return f"a path is one of {', '.join(PATHS)}"
    if path == PATHS[0]:
        return None
    if not library.has_tiles():
        return "there are no AMX tiles in this process, and nothing to choose"
    if not args["int8_activations"]:
        return "activations are not int8, and another path would give other bits"
    if path == "groups" and (group_size is None or group_size % TILE_BYTES or group_size > MAX_IN_GROUP):
        kept = "8 bits are not in groups" if group_size is None else f"groups are of {group_size}"
        return f"{kept}, not 4 bits in groups of a multiple of {TILE_BYTES} up to {MAX_IN_GROUP}"
    return None


def pack_weight(qweight: torch.Tensor) -> PackedWeight:
    """int8 [N, K] or uint8 [N, K / 2] in panels of units; see csrc/linear_quantized.h."""
    return _packed(qweight, is_gated=False)


def pack_gated(qweight: torch.Tensor) -> PackedWeight:
    """The weight of a gated linear, gates before what they gate, with both side by side in every panel."""
    return _packed(qweight, is_gated=True)


def _packed(qweight: torch.Tensor, *, is_gated: bool) -> PackedWeight:
    bits = 8 if qweight.dtype == torch.int8 else 4
    qweight = qweight.contiguous()
    num_out, num_in = qweight.shape[0], qweight.shape[1] * 8 // bits
    num_panels = _num_panels(num_out, is_gated=is_gated)
    size = num_panels * library.quantized_units(library.panel_outputs(), num_in, bits)
    data = memory.for_packed(size, torch.int32)
    struct = QuantizedPackArgs(qweight.data_ptr(), data.data_ptr(), num_in, num_out, bits, is_gated)
    library.thunk("quantized_pack", None, struct, qweight, data)()
    return PackedWeight(data, num_out // 2 if is_gated else num_out, num_in, is_gated)


@dataclass(frozen=True)
class PackedScales:
    """units [panels, 1, outputs of a panel] in fp32 and, of 4 bits, steps [panels, G, outputs] in int16."""

    units: torch.Tensor
    steps: torch.Tensor | None


def pack_scales(scales_NG: torch.Tensor) -> PackedScales:
    """Scales as `ops.quantized.steps_of` splits them, panel by panel, filled up with zeros."""
    return _packed_scales(scales_NG, is_gated=False)


def pack_gated_scales(scales_NG: torch.Tensor) -> PackedScales:
    """The same for the weight of a gated linear."""
    return _packed_scales(scales_NG, is_gated=True)


def _packed_scales(scales_NG: torch.Tensor, *, is_gated: bool) -> PackedScales:
    if scales_NG.dtype == torch.float32:
        return PackedScales(_in_panels(scales_NG, is_gated=is_gated), None)
    units_N1, steps_NG = steps_of(scales_NG)
    steps = _in_panels(steps_NG.to(torch.int16), is_gated=is_gated)
    return PackedScales(_in_panels(units_N1, is_gated=is_gated), steps)


def _in_panels(scales_NG: torch.Tensor, *, is_gated: bool) -> torch.Tensor:
    scales_NG = scales_NG.contiguous()
    num_out, num_groups = scales_NG.shape
    shape = (_num_panels(num_out, is_gated=is_gated), num_groups, library.panel_outputs())
    packed = torch.empty(shape, dtype=scales_NG.dtype)
    struct = ScalesPackArgs(scales_NG.data_ptr(), packed.data_ptr(), num_out, num_groups, scales_NG.itemsize, is_gated)
    library.thunk("scales_pack", None, struct, scales_NG, packed)()
    return packed


def _num_panels(num_out: int, *, is_gated: bool) -> int:
    outputs = library.panel_outputs()
    return -(-(num_out // 2) // (outputs // 2)) if is_gated else -(-num_out // outputs)


def bind(args: Mapping[str, Any], outputs: Sequence[torch.Tensor], *, path: str = "auto") -> Thunk:
    """ops.quantized_linear, or one of `quantized_linear_...`, into outputs[0], which is dense.

    path: how sums of int8 activations are made: on vectors, on tiles, on tiles group by group, or as the number of rows
    has it; none changes a bit. `KernelError` for what `supports_tactic` refuses.
    """
    reads, out, weight, scales = Reads(), dense_output(outputs[0]), args["qweight"], args["scales_NG"]
    x, rows = reads.rows(args["x"])
    bias = None if args.get("bias") is None else reads.dense(args["bias"])
    steps = scales.steps
    group_size = None if steps is None else weight.num_in // steps.shape[1]
    if reason := _refuse_path(args, group_size, path):
        raise KernelError(f"a quantised linear with path={path!r}: {reason}; leave the tactic out")
    struct = QuantizedLinearArgs(
        *(x.data_ptr(), weight.data.data_ptr(), None if bias is None else bias.data_ptr(), scales.units.data_ptr()),
        *(None if steps is None else steps.data_ptr(), out.data_ptr()),
        *rows,
        *(weight.num_in, weight.num_out, 1 if steps is None else steps.shape[1]),
        *(KINDS.index(args["kind"]) if "kind" in args else -1, 8 if steps is None else 4),
        *(args["int8_activations"], weight.is_gated),
    )
    struct.has_rows = x.dtype == torch.int8
    struct.path = PATHS.index(path)
    kept = (x, weight.data, scales.units, out, *(t for t in (steps, bias) if t is not None))
    if "residual" in args:
        residual = reads.dense(args["residual"])
        struct.residual = residual.data_ptr()
        kept += (residual,)
    return reads.before(library.thunk("quantized_linear", out.dtype, struct, *kept))
