"""varlen_attention, compiled (csrc/varlen_attention.cpp)."""

import ctypes
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from tritium.errors import KernelError
from tritium.kernels.cpu import library
from tritium.kernels.cpu.layout import Reads
from tritium.kernels.kernel import Thunk

_POINTERS = ("q", "k", "v", "out", "cu_seqlens_q", "batch_counts")
_STRIDES = ("q_stride_token", "q_stride_head", "k_stride_token", "k_stride_head", "out_stride_token", "out_stride_head")
_SIZES = ("num_heads", "num_kv_heads", "head_size")


class VarlenAttentionArgs(ctypes.Structure):
    """csrc/varlen_attention.cpp VarlenAttentionArgs."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_int64) for name in (*_STRIDES, *_SIZES)),
        *((name, ctypes.c_float) for name in ("scale", "softcap")),
    ]


def supports_varlen_attention(args: Mapping[str, Any]) -> str | None:
    """q, k and v of one dtype and one head size, query heads a multiple of kv heads."""
    q, k, v = args["q_TNH"], args["k_TKH"], args["v_TKH"]
    if reason := library.refuse({"q_TNH": q, "k_TKH": k, "v_TKH": v}):
        return reason
    (num_heads, head_size), (num_kv_heads, kv_head_size) = q.shape[1:], k.shape[1:]
    if head_size != kv_head_size or v.shape[1:] != k.shape[1:]:
        return f"heads of q, k and v are {head_size}, {kv_head_size} and {v.shape[2]} long"
    if num_heads % num_kv_heads:
        return f"{num_heads} query heads cannot share {num_kv_heads} kv heads evenly"
    return None


def bind_varlen_attention(args: Mapping[str, Any], outputs: Sequence[torch.Tensor]) -> Thunk:
    """ops.varlen_attention into outputs[0]; its rows past batch_counts[1] stay as they are. q, k, v may be strided."""
    reads, out = Reads(), outputs[0]
    if reason := supports_varlen_attention(args):
        raise KernelError(f"varlen_attention: {reason}")
    q, k, v = (reads.adjacent(args[name]) for name in ("q_TNH", "k_TKH", "v_TKH"))
    if k.stride() != v.stride():
        k, v = reads.dense(k), reads.dense(v)
    counters = [args[name] for name in ("cu_seqlens_q", "batch_counts")]
    for x in counters:
        if x.dtype != torch.int32:
            raise KernelError(f"counts of varlen_attention are int32, not {x.dtype}")
    if out.stride(-1) != 1:
        raise KernelError(f"the output's rows, {tuple(out.shape)} with strides {out.stride()}, are not dense")
    struct = VarlenAttentionArgs(
        *(t.data_ptr() for t in (q, k, v, out, *counters)),
        *(t.stride(dim) for t in (q, k, out) for dim in (0, 1)),
        *(q.shape[1], k.shape[1], q.shape[2]),
        *(args["scale"], args["softcap"]),
    )
    return reads.before(library.thunk("varlen_attention", q.dtype, struct, q, k, v, out, *counters))
