"""linear and what is fused with it, compiled (csrc/linear.cpp): the weight packed once, one layout for all rows."""

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tritium.kernels.cpu import library, memory
from tritium.kernels.cpu.activations import refuse_kind
from tritium.kernels.cpu.layout import Reads, dense_output
from tritium.kernels.kernel import Thunk
from tritium.ops.activations import KINDS

TILE_INPUTS = 32  # csrc/linear.h kTileK
SHARED = ("auto", "rows", "panels")  # rows: blocks of rows and panels; auto: rows from 64 a thread on


class LinearArgs(ctypes.Structure):
    """csrc/linear.cpp LinearArgs."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "weight", "bias", "more", "residual", "out")),
        *((name, ctypes.c_int64) for name in ("num_outer", "num_inner", "stride_outer", "stride_inner")),
        *((name, ctypes.c_int64) for name in ("num_in", "num_out", "num_more", "kind")),
        ("is_gated", ctypes.c_int32),
        ("share_by", ctypes.c_int32),
        ("block_rows", ctypes.c_int64),
    ]


class LinearPackArgs(ctypes.Structure):
    """csrc/linear.cpp LinearPackArgs."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("weight", "out")),
        *((name, ctypes.c_int64) for name in ("num_in", "num_out", "stride")),
        ("is_gated", ctypes.c_int32),
    ]


@dataclass(frozen=True)
class PackedWeight:
    """A weight in the layout of csrc/linear.h: panels of outputs, filled up with zeros.

    num_out: what the linear writes: half of the weight's rows when it is gated.
    """

    data: torch.Tensor
    num_out: int
    num_in: int
    is_gated: bool = False


def supports(args: Mapping[str, Any]) -> str | None:
    """x, weight and bias of one dtype."""
    return library.refuse({name: args.get(name) for name in ("x", "weight_NK", "bias")})


def supports_activation(args: Mapping[str, Any]) -> str | None:
    """The same, and a kind of activation that csrc knows."""
    return refuse_kind(args["kind"]) or supports(args)


def supports_add(args: Mapping[str, Any]) -> str | None:
    """The residual of that dtype too."""
    return library.refuse({name: args.get(name) for name in ("x", "weight_NK", "bias", "residual")})


def supports_pair(args: Mapping[str, Any]) -> str | None:
    """Both inputs of that dtype; in bf16 the first one fills whole tiles."""
    size = args["x"].shape[-1]
    if args["x"].dtype == torch.bfloat16 and size % TILE_INPUTS:
        return f"the first input has {size} elements, no multiple of {TILE_INPUTS}"
    return library.refuse({name: args.get(name) for name in ("x", "y", "weight_NK", "bias")})


def pack_weight(weight_NK: torch.Tensor) -> PackedWeight:
    """The weight as `bind` takes it. Memory: the packed form, at most 31 outputs and 31 inputs larger."""
    return _packed(weight_NK, is_gated=False)


def pack_gated(weight_NK: torch.Tensor) -> PackedWeight:
    """The weight of a gated linear, gates before what they gate, with both side by side in every panel."""
    return _packed(weight_NK, is_gated=True)


def _packed(weight_NK: torch.Tensor, *, is_gated: bool) -> PackedWeight:
    if weight_NK.shape[1] > 1 and weight_NK.stride(1) != 1:
        weight_NK = weight_NK.contiguous()
    num_out, num_in = weight_NK.shape
    size = library.packed_size(num_out, num_in, weight_NK.dtype, is_gated=is_gated)
    data = memory.for_packed(size, weight_NK.dtype)
    struct = LinearPackArgs(weight_NK.data_ptr(), data.data_ptr(), num_in, num_out, weight_NK.stride(0), is_gated)
    library.thunk("linear_pack", weight_NK.dtype, struct, weight_NK, data)()
    return PackedWeight(data, num_out // 2 if is_gated else num_out, num_in, is_gated)


def bind(
    args: Mapping[str, Any], outputs: Sequence[torch.Tensor], *, share: str = "auto", block_rows: int = 0
) -> Thunk:
    """ops.linear, or one of `linear_...`, of a packed weight, into outputs[0], which is dense.

    share: what threads share, one of `SHARED`. block_rows: rows that one piece of the weight is used for while it is in
    the cache; 0: as many as L2 is made for. Neither changes a bit.
    """
    reads, out, weight = Reads(), dense_output(outputs[0]), args["weight_NK"]
    x, rows = reads.rows(args["x"])
    others = [args.get(name) for name in ("bias", "y", "residual")]
    bias, more, residual = (None if tensor is None else reads.dense(tensor) for tensor in others)
    given = (x, weight.data, bias, more, residual, out)
    kind = KINDS.index(args["kind"]) if "kind" in args else -1
    sizes = (weight.num_in, weight.num_out, 0 if more is None else more.shape[-1], kind)
    pointers = (None if tensor is None else tensor.data_ptr() for tensor in given)
    struct = LinearArgs(*pointers, *rows, *sizes, weight.is_gated, SHARED.index(share), block_rows)
    return reads.before(library.thunk("linear", x.dtype, struct, *(t for t in given if t is not None)))
