"""paged_attention, compiled (csrc/attention.cpp)."""

import ctypes
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from tritium.errors import KernelError
from tritium.kernels.cpu import library
from tritium.kernels.kernel import Thunk
from tritium.ops.quantized import SCALE_BYTES

_POINTERS = ("q", "cache", "out", "block_table", "cu_seqlens_q", "context_lens", "batch_counts", "alibi_slopes")
_STRIDES = ("q_stride_token", "q_stride_head", "out_stride_token", "out_stride_head", "stride_block", "table_stride")
_SIZES = ("num_heads", "num_kv_heads", "head_size", "block_size", "item_rows")


class PagedAttentionArgs(ctypes.Structure):
    """csrc/attention.cpp PagedAttentionArgs."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_int64) for name in (*_STRIDES, *_SIZES)),
        *((name, ctypes.c_int32) for name in ("window", "is_int8")),
        *((name, ctypes.c_float) for name in ("scale", "softcap")),
    ]


def supports_paged_attention(args: Mapping[str, Any]) -> str | None:
    """q and cache of one dtype or the cache in int8, query heads a multiple of kv heads, equal head sizes."""
    q, cache = args["q_TNH"], args["cache_layer"]
    is_int8 = cache.dtype == torch.int8
    if reason := library.refuse({"q_TNH": q, "cache_layer": None if is_int8 else cache}):
        return reason
    (num_heads, head_size), (num_kv_heads, row_size) = q.shape[1:], cache.shape[2::2]
    cache_head_size = row_size - SCALE_BYTES if is_int8 else row_size
    if head_size != cache_head_size:
        return f"q has heads of {head_size}, the cache of {cache_head_size}"
    if num_heads % num_kv_heads:
        return f"{num_heads} query heads cannot share {num_kv_heads} kv heads evenly"
    slopes = args.get("alibi_slopes_N")
    if slopes is not None and (slopes.dtype != torch.float32 or tuple(slopes.shape) != (num_heads,)):
        return f"alibi slopes are {slopes.dtype} {list(slopes.shape)}, expected {num_heads} fp32 numbers"
    return None


def bind_paged_attention(args: Mapping[str, Any], outputs: Sequence[torch.Tensor], *, item_rows: int = 64) -> Thunk:
    """ops.paged_attention into outputs[0]; its rows past batch_counts[1] stay as they are.

    item_rows: a tactic: rows (query tokens times the heads that share a kv head) computed as one piece of work.
    q and out may be strided in tokens and heads, the cache in blocks. Reads only keys that a query of the step sees.
    """
    q, cache, table, out = args["q_TNH"], args["cache_layer"], args["block_table_SB"], outputs[0]
    counters = [args[name] for name in ("cu_seqlens_q", "context_lens_S", "batch_counts")]
    if reason := supports_paged_attention(args):
        raise KernelError(f"paged_attention: {reason}")
    for name, x, num_dense in (
        ("q_TNH", q, 1),
        ("out", out, 1),
        ("cache_layer", cache, 4),
        ("block_table_SB", table, 1),
    ):
        if not x[(0,) * (x.dim() - num_dense)].is_contiguous():
            raise KernelError(
                f"{name} with sizes {tuple(x.shape)} and strides {x.stride()} has rows that are not dense"
            )
    for x in (table, *counters):
        if x.dtype != torch.int32:
            raise KernelError(f"tables and counts of paged_attention are int32, not {x.dtype}")
    slopes = [args["alibi_slopes_N"].contiguous()] if args.get("alibi_slopes_N") is not None else []
    struct = PagedAttentionArgs(
        q=q.data_ptr(),
        cache=cache.data_ptr(),
        out=out.data_ptr(),
        block_table=table.data_ptr(),
        cu_seqlens_q=counters[0].data_ptr(),
        context_lens=counters[1].data_ptr(),
        batch_counts=counters[2].data_ptr(),
        alibi_slopes=slopes[0].data_ptr() if slopes else None,
        q_stride_token=q.stride(0),
        q_stride_head=q.stride(1),
        out_stride_token=out.stride(0),
        out_stride_head=out.stride(1),
        stride_block=cache.stride(0),
        table_stride=table.stride(0),
        num_heads=q.shape[1],
        num_kv_heads=cache.shape[2],
        head_size=q.shape[2],
        block_size=cache.shape[3],
        item_rows=item_rows,
        window=args["window"],
        is_int8=cache.dtype == torch.int8,
        scale=args["scale"],
        softcap=args["softcap"],
    )
    return library.thunk("paged_attention", q.dtype, struct, q, cache, out, table, *slopes, *counters)
