"""embedding, embedding_part, gather_rows, kv_store: copies by row number.

One program copies (a part of) one row. Rows are dense in their last dimension; sources and targets may be strided.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl

from tritium.errors import KernelError
from tritium.kernels.cpu.layout import Reads
from tritium.kernels.kernel import Thunk

_BLOCK = 2048  # elements: 16 bytes a thread for bf16 in 8 warps


@triton.jit
def _gather_rows_kernel(
    x_ptr, rows_ptr, out_ptr, num_source_rows, first, width, stride_x, stride_out,
    BLOCK: tl.constexpr, IS_PART: tl.constexpr,
):  # fmt: skip
    """Row - first of x; one that x lacks is all NaN, or zeros, when x is a part of a table."""
    row = tl.program_id(0).to(tl.int64)
    source = tl.load(rows_ptr + row).to(tl.int64) - first
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    known_width = tl.where((source >= 0) & (source < num_source_rows), width, 0)
    x = tl.load(x_ptr + source * stride_x + column, mask=column < known_width, other=0.0 if IS_PART else float("nan"))
    tl.store(out_ptr + row * stride_out + column, x, mask=column < width)


@triton.jit
def _kv_store_kernel(
    k_ptr, v_ptr, cache_ptr, slots_ptr,
    stride_k_token, stride_k_head, stride_v_token, stride_v_head, stride_block,
    NUM_HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One token's keys and values into [block, 2, head, offset, :]; a negative slot stores nothing."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token)
    if slot >= 0:
        i = tl.arange(0, BLOCK)
        head, d = i // HEAD_SIZE, i % HEAD_SIZE
        is_in = i < NUM_HEADS * HEAD_SIZE
        k = tl.load(k_ptr + token * stride_k_token + head * stride_k_head + d, mask=is_in)
        v = tl.load(v_ptr + token * stride_v_token + head * stride_v_head + d, mask=is_in)
        place = cache_ptr + slot // PAGE * stride_block + (head * PAGE + slot % PAGE) * HEAD_SIZE + d
        tl.store(place, k.to(cache_ptr.dtype.element_ty), mask=is_in)
        tl.store(place + NUM_HEADS * PAGE * HEAD_SIZE, v.to(cache_ptr.dtype.element_ty), mask=is_in)


@triton.jit
def _bring_kernel(source_ptr, target_ptr, num_words, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target_ptr + i, tl.load(source_ptr + i, mask=i < num_words), mask=i < num_words)


def bring(source: torch.Tensor, target: torch.Tensor) -> None:
    """Launch: copy 64-bit words out of pinned host memory. Of a few it is over sooner than a copy engine has begun."""
    _bring_kernel[(triton.cdiv(len(source), 256),)](source, target, len(source), BLOCK=256, num_warps=4)


def bind_embedding(args: Mapping[str, Any], outputs: Sequence[torch.Tensor]) -> Thunk:
    """ops.embedding into outputs[0]. An id that the table has no row for gives a row of NaN."""
    return _bind_look_up(args, outputs[0])


def bind_embedding_part(args: Mapping[str, Any], outputs: Sequence[torch.Tensor]) -> Thunk:
    """ops.embedding_part into outputs[0]."""
    return _bind_look_up(args, outputs[0], first=args["first"], is_part=True)


def bind_gather_rows(args: Mapping[str, Any], outputs: Sequence[torch.Tensor]) -> Thunk:
    """ops.gather_rows into outputs[0]. A number that x has no row for gives a row of NaN."""
    return _bind_gather(args["x_TD"], args["rows_R"], outputs[0])


def bind_kv_store(args: Mapping[str, Any], outputs: Sequence[torch.Tensor]) -> Thunk:
    """ops.kv_store: k and v may be strided in tokens and heads, the cache in blocks; casts to fp8 saturate."""
    _, num_heads, head_size = args["k_TKH"].shape
    sizes = {"NUM_HEADS": num_heads, "BLOCK": triton.next_power_of_2(num_heads * head_size)}
    return bind_store(_kv_store_kernel, args, **sizes)


def bind_store(kernel: Any, args: Mapping[str, Any], **sizes: int) -> Thunk:
    """ops.kv_store by a kernel of one program a token; sizes: what it is compiled for beside HEAD_SIZE and PAGE."""
    k, v, cache, slots = (args[name] for name in ("k_TKH", "v_TKH", "cache_layer", "slot_mapping_T"))
    need_dense(k_TKH=k[0, 0], v_TKH=v[0, 0], cache_layer=cache[0], slot_mapping_T=slots)
    return partial(
        kernel[(k.shape[0],)],
        *(k, v, cache, slots, k.stride(0), k.stride(1), v.stride(0), v.stride(1), cache.stride(0)),
        HEAD_SIZE=k.shape[2],
        PAGE=cache.shape[3],
        num_warps=4,
        **sizes,
    )


def need_dense(**tensors: torch.Tensor) -> None:
    """Raise `KernelError` that names the first tensor whose elements are not adjacent."""
    for name, tensor in tensors.items():
        if not tensor.is_contiguous():
            raise KernelError(f"{name}: a part of sizes {tuple(tensor.shape)} has strides {tensor.stride()}: not dense")


def _bind_look_up(args: Mapping[str, Any], out: torch.Tensor, **part: Any) -> Thunk:
    """A stateless module's ids may have any sizes and strides."""
    reads, table = Reads(), args["weight_VD"]
    ids = reads.dense(args["ids_T"]).view(-1)
    return reads.before(_bind_gather(table, ids, out.view(-1, table.shape[1]), **part))


def _bind_gather(
    x: torch.Tensor, rows: torch.Tensor, out: torch.Tensor, *, first: int = 0, is_part: bool = False
) -> Thunk:
    need_dense(source=x[0], rows=rows, out=out[0])
    width = x.shape[1]
    block = min(_BLOCK, triton.next_power_of_2(width))
    grid = (rows.shape[0], triton.cdiv(width, block))
    sizes = (x.shape[0], first, width, x.stride(0), out.stride(0))
    return partial(_gather_rows_kernel[grid], x, rows, out, *sizes, BLOCK=block, IS_PART=is_part, num_warps=4)
