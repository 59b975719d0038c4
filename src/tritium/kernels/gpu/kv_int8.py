"""kv_store and rope_kv_store into a cache in int8, laid out as ops/kv_int8.py says: one program a token,
all its heads."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from tritium.kernels.gpu.copies import bind_store
from tritium.kernels.gpu.programmatic import begin
from tritium.kernels.gpu.rope import angles, bind_rope_and_store, load_heads, store_heads
from tritium.kernels.kernel import Thunk
from tritium.ops.quantized import SCALE_BYTES

_SCALE_BYTES = tl.constexpr(SCALE_BYTES)
_TO_EVEN = tl.constexpr(12582912.0)  # see rows.py
_TINY = tl.constexpr(1e-30)  # ops/quantized.py


@triton.jit
def _scales(largest):
    """What numbers are multiplied by, and the scale, of rows with these largest elements; NaN if not finite."""
    is_finite = largest < float("inf")
    inverse = tl.where(is_finite & (largest >= _TINY), 127.0 / largest, 0.0)
    return inverse, tl.where(is_finite, largest * (1.0 / 127.0), float("nan"))


@triton.jit
def _integers(x, inverse):
    """Rows times their inverse scales, halves to even; zeros in a row that has none."""
    x = tl.where(inverse[:, None] > 0.0, x * inverse[:, None], 0.0)
    return ((x + _TO_EVEN) - _TO_EVEN).to(tl.int32).to(tl.int8)


@triton.jit
def _largest(x):
    """By row; NaN counts as infinity."""
    x = tl.abs(x)
    return tl.max(tl.where(x == x, x, float("inf")), 1)


@triton.jit
def _places(keys_ptr, slot, head, stride_block, HEAD_SIZE: tl.constexpr, PAGE: tl.constexpr):
    """Where a slot's heads and their scales go."""
    ROW: tl.constexpr = HEAD_SIZE + _SCALE_BYTES
    heads_ptr = keys_ptr + slot // PAGE * stride_block + head * PAGE * ROW
    scales_ptr = (heads_ptr + PAGE * HEAD_SIZE).to(tl.pointer_type(tl.float32)) + slot % PAGE
    return heads_ptr + slot % PAGE * HEAD_SIZE, scales_ptr


@triton.jit
def _store_rows(rows_ptr, scales_ptr, x, head, d, HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr):
    """Whole heads x [head, d], zero where there is none, to the rows at rows_ptr [head]."""
    inverse, scales = _scales(_largest(x))
    is_in = (head < HEADS)[:, None] & (d < HEAD_SIZE)[None, :]
    tl.store(rows_ptr[:, None] + d[None, :], _integers(x, inverse), mask=is_in)
    tl.store(scales_ptr, scales, mask=head < HEADS)


@triton.jit
def _kv_store_kernel(
    k_ptr, v_ptr, cache_ptr, slots_ptr, stride_k_token, stride_k_head, stride_v_token, stride_v_head, stride_block,
    HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr, PAGE: tl.constexpr, HEAD_ROWS: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token)
    if slot >= 0:
        TO_VALUES: tl.constexpr = HEADS * PAGE * (HEAD_SIZE + _SCALE_BYTES)
        head, d = tl.arange(0, HEAD_ROWS), tl.arange(0, HEAD_BLOCK)
        is_in = (head < HEADS)[:, None] & (d < HEAD_SIZE)[None, :]
        k_place = k_ptr + token * stride_k_token + head[:, None] * stride_k_head + d[None, :]
        v_place = v_ptr + token * stride_v_token + head[:, None] * stride_v_head + d[None, :]
        k = tl.load(k_place, mask=is_in, other=0.0).to(tl.float32)
        v = tl.load(v_place, mask=is_in, other=0.0).to(tl.float32)
        rows_ptr, scales_ptr = _places(cache_ptr, slot, head, stride_block, HEAD_SIZE, PAGE)
        _store_rows(rows_ptr, scales_ptr, k, head, d, HEADS, HEAD_SIZE)
        _store_rows(rows_ptr + TO_VALUES, scales_ptr + TO_VALUES // 4, v, head, d, HEADS, HEAD_SIZE)


@triton.jit
def _rope_kv_store_kernel(
    q_ptr, k_ptr, v_ptr, cos_sin_ptr, cache_ptr, slots_ptr, out_ptr,
    stride_q_token, stride_q_head, stride_k_token, stride_k_head, stride_v_token, stride_v_head, stride_angles,
    stride_block, stride_out_token, stride_out_head,
    NUM_HEADS: tl.constexpr, HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr, PAIRS: tl.constexpr,
    INTERLEAVED: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr, REST_BLOCK: tl.constexpr,
    HEAD_ROWS: tl.constexpr, PAIRS_BLOCK: tl.constexpr, HEAD_BLOCK: tl.constexpr, IS_EARLY: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token)
    cos_sin_ptr += token * stride_angles
    cos, sin = angles(cos_sin_ptr, NUM_HEADS, PAIRS, BLOCK)
    begin(IS_EARLY)
    a, b, rest = load_heads(
        q_ptr + token * stride_q_token, stride_q_head, NUM_HEADS, HEAD_SIZE, PAIRS, INTERLEAVED, BLOCK, REST_BLOCK
    )  # fmt: skip
    store_heads(
        out_ptr + token * stride_out_token, stride_out_head, a, b, rest, cos, sin,
        NUM_HEADS, HEAD_SIZE, PAIRS, INTERLEAVED, BLOCK, REST_BLOCK,
    )  # fmt: skip
    if slot >= 0:
        TO_VALUES: tl.constexpr = HEADS * PAGE * (HEAD_SIZE + _SCALE_BYTES)
        dtype: tl.constexpr = k_ptr.dtype.element_ty
        head, p, d = tl.arange(0, HEAD_ROWS), tl.arange(0, PAIRS_BLOCK), tl.arange(0, HEAD_BLOCK)
        is_head, is_p = head < HEADS, p < PAIRS
        is_pair = is_head[:, None] & is_p[None, :]
        first = p * 2 if INTERLEAVED else p
        second = first + (1 if INTERLEAVED else PAIRS)
        heads_ptr = k_ptr + token * stride_k_token + head[:, None] * stride_k_head
        x = tl.load(heads_ptr + first[None, :], mask=is_pair, other=0.0).to(tl.float32)
        y = tl.load(heads_ptr + second[None, :], mask=is_pair, other=0.0).to(tl.float32)
        k_cos = tl.load(cos_sin_ptr + p, mask=is_p, other=0.0)[None, :]
        k_sin = tl.load(cos_sin_ptr + PAIRS + p, mask=is_p, other=0.0)[None, :]
        turned_x = (x * k_cos - y * k_sin).to(dtype).to(tl.float32)
        turned_y = (y * k_cos + x * k_sin).to(dtype).to(tl.float32)
        is_rest = is_head[:, None] & ((d >= 2 * PAIRS) & (d < HEAD_SIZE))[None, :]
        k_rest = tl.load(heads_ptr + d[None, :], mask=is_rest, other=0.0).to(tl.float32)
        most = tl.maximum(tl.maximum(_largest(turned_x), _largest(turned_y)), _largest(k_rest))
        inverse, scales = _scales(most)
        rows_ptr, scales_ptr = _places(cache_ptr, slot, head, stride_block, HEAD_SIZE, PAGE)
        tl.store(rows_ptr[:, None] + first[None, :], _integers(turned_x, inverse), mask=is_pair)
        tl.store(rows_ptr[:, None] + second[None, :], _integers(turned_y, inverse), mask=is_pair)
        tl.store(rows_ptr[:, None] + d[None, :], _integers(k_rest, inverse), mask=is_rest)
        tl.store(scales_ptr, scales, mask=is_head)
        is_in = is_head[:, None] & (d < HEAD_SIZE)[None, :]
        v_place = v_ptr + token * stride_v_token + head[:, None] * stride_v_head + d[None, :]
        v = tl.load(v_place, mask=is_in, other=0.0).to(tl.float32)
        _store_rows(rows_ptr + TO_VALUES, scales_ptr + TO_VALUES // 4, v, head, d, HEADS, HEAD_SIZE)


def bind_kv_store(args: Mapping[str, Any], outputs: Sequence[torch.Tensor]) -> Thunk:
    """ops.kv_store: k and v may be strided in tokens and heads, the cache in blocks."""
    return bind_store(_kv_store_kernel, args, **_sizes(args))


def bind_rope_kv_store(args: Mapping[str, Any], outputs: Sequence[torch.Tensor]) -> Thunk:
    """ops.rope_kv_store: rotated queries into outputs[0]; q, k, v may be strided in tokens and heads."""
    pairs_block = triton.next_power_of_2(args["cos_sin"].shape[1] // 2)
    return bind_rope_and_store(_rope_kv_store_kernel, args, outputs[0], PAIRS_BLOCK=pairs_block, **_sizes(args))


def _sizes(args: Mapping[str, Any]) -> dict[str, int]:
    """A tile has all heads of a token, whole."""
    _, num_heads, head_size = args["k_TKH"].shape
    rows, block = triton.next_power_of_2(num_heads), triton.next_power_of_2(head_size)
    return {"HEADS": num_heads, "HEAD_ROWS": rows, "HEAD_BLOCK": block}
