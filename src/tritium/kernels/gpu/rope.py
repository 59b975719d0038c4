"""rope, and rope_kv_store: one program a token, all its heads; pairs (p, p + P), or (2p, 2p + 1) when interleaved.

fp32, cast once. rope_kv_store rotates the queries as rope does, the keys into their slot of the cache
[block, 2, kv head, PAGE, HEAD_SIZE], and copies the values there; a cache in fp8 saturates.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl

from tritium.kernels.gpu.copies import need_dense
from tritium.kernels.gpu.programmatic import begin, launch_options
from tritium.kernels.kernel import Thunk


@triton.jit
def _rotate(
    x_ptr, out_ptr, cos_sin_ptr, stride_x_head, stride_out_head, dtype: tl.constexpr,
    NUM_HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr,
    BLOCK: tl.constexpr, REST_BLOCK: tl.constexpr,
):  # fmt: skip
    """One token's heads, rotated by its angles; rounded to dtype, then to what out holds."""
    i = tl.arange(0, BLOCK)
    head, pair = i // PAIRS, i % PAIRS
    is_in = i < NUM_HEADS * PAIRS
    cos = tl.load(cos_sin_ptr + pair, mask=is_in, other=0.0)
    sin = tl.load(cos_sin_ptr + PAIRS + pair, mask=is_in, other=0.0)
    first = pair * 2 if INTERLEAVED else pair
    second = first + (1 if INTERLEAVED else PAIRS)
    a = tl.load(x_ptr + head * stride_x_head + first, mask=is_in, other=0.0).to(tl.float32)
    b = tl.load(x_ptr + head * stride_x_head + second, mask=is_in, other=0.0).to(tl.float32)
    out_dtype = out_ptr.dtype.element_ty
    tl.store(out_ptr + head * stride_out_head + first, (a * cos - b * sin).to(dtype).to(out_dtype), mask=is_in)
    tl.store(out_ptr + head * stride_out_head + second, (b * cos + a * sin).to(dtype).to(out_dtype), mask=is_in)
    REST: tl.constexpr = HEAD_SIZE - 2 * PAIRS
    if REST > 0:
        j = tl.arange(0, REST_BLOCK)
        rest_head, d = j // REST, 2 * PAIRS + j % REST
        is_rest = j < NUM_HEADS * REST
        rest = tl.load(x_ptr + rest_head * stride_x_head + d, mask=is_rest)
        tl.store(out_ptr + rest_head * stride_out_head + d, rest.to(out_dtype), mask=is_rest)


@triton.jit
def _rope_kernel(
    x_ptr, cos_sin_ptr, out_ptr, stride_x_token, stride_x_head, stride_out_token, stride_out_head, stride_angles,
    NUM_HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr,
    BLOCK: tl.constexpr, REST_BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    _rotate(
        x_ptr + token * stride_x_token, out_ptr + token * stride_out_token, cos_sin_ptr + token * stride_angles,
        stride_x_head, stride_out_head, x_ptr.dtype.element_ty, NUM_HEADS, HEAD_SIZE, PAIRS, INTERLEAVED, BLOCK,
        REST_BLOCK,
    )  # fmt: skip


@triton.jit
def _rope_kv_store_kernel(
    q_ptr, k_ptr, v_ptr, cos_sin_ptr, cache_ptr, slots_ptr, out_ptr,
    stride_q_token, stride_q_head, stride_k_token, stride_k_head, stride_v_token, stride_v_head, stride_angles,
    stride_block, stride_out_token, stride_out_head,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr, PAIRS: tl.constexpr,
    INTERLEAVED: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr, REST_BLOCK: tl.constexpr,
    KV_BLOCK: tl.constexpr, IS_EARLY: tl.constexpr, KV_REST_BLOCK: tl.constexpr, V_BLOCK: tl.constexpr,
):  # fmt: skip
    begin(IS_EARLY)
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token)
    cos_sin_ptr += token * stride_angles
    dtype = q_ptr.dtype.element_ty
    _rotate(
        q_ptr + token * stride_q_token, out_ptr + token * stride_out_token, cos_sin_ptr, stride_q_head, stride_out_head,
        dtype, NUM_HEADS, HEAD_SIZE, PAIRS, INTERLEAVED, BLOCK, REST_BLOCK,
    )  # fmt: skip
    if slot >= 0:
        place = cache_ptr + slot // PAGE * stride_block + slot % PAGE * HEAD_SIZE
        _rotate(
            k_ptr + token * stride_k_token, place, cos_sin_ptr, stride_k_head, PAGE * HEAD_SIZE, dtype,
            NUM_KV_HEADS, HEAD_SIZE, PAIRS, INTERLEAVED, KV_BLOCK, KV_REST_BLOCK,
        )  # fmt: skip
        i = tl.arange(0, V_BLOCK)
        head, d = i // HEAD_SIZE, i % HEAD_SIZE
        is_in = i < NUM_KV_HEADS * HEAD_SIZE
        v = tl.load(v_ptr + token * stride_v_token + head * stride_v_head + d, mask=is_in)
        place += NUM_KV_HEADS * PAGE * HEAD_SIZE
        tl.store(place + head * PAGE * HEAD_SIZE + d, v.to(cache_ptr.dtype.element_ty), mask=is_in)


def bind_rope(args: Mapping[str, Any], outputs: Sequence[torch.Tensor]) -> Thunk:
    """ops.rope into outputs[0]; x and out may be strided in tokens and heads."""
    x, cos_sin, out = args["x_TNH"], args["cos_sin"], outputs[0]
    need_dense(x_TNH=x[0, 0], cos_sin=cos_sin[0], out=out[0, 0])
    num_tokens, num_heads, head_size = x.shape
    pairs = cos_sin.shape[1] // 2
    return partial(
        _rope_kernel[(num_tokens,)],
        *(x, cos_sin, out, x.stride(0), x.stride(1), out.stride(0), out.stride(1), cos_sin.stride(0)),
        NUM_HEADS=num_heads,
        HEAD_SIZE=head_size,
        PAIRS=pairs,
        INTERLEAVED=args.get("interleaved", False),
        BLOCK=triton.next_power_of_2(num_heads * pairs),
        REST_BLOCK=triton.next_power_of_2(max(1, num_heads * (head_size - 2 * pairs))),
        num_warps=4,
    )


def bind_rope_kv_store(args: Mapping[str, Any], outputs: Sequence[torch.Tensor]) -> Thunk:
    """ops.rope_kv_store: rotated queries into outputs[0]; q, k, v may be strided in tokens and heads."""
    q, k, v, cos_sin = (args[name] for name in ("q_TNH", "k_TKH", "v_TKH", "cos_sin"))
    cache, slots, out = args["cache_layer"], args["slot_mapping_T"], outputs[0]
    need_dense(q_TNH=q[0, 0], k_TKH=k[0, 0], v_TKH=v[0, 0], cos_sin=cos_sin[0], cache_layer=cache[0], out=out[0, 0])
    num_tokens, num_heads, head_size = q.shape
    num_kv_heads, pairs = k.shape[1], cos_sin.shape[1] // 2
    rest = head_size - 2 * pairs
    strides = [s for t in (q, k, v) for s in t.stride()[:2]]
    return partial(
        _rope_kv_store_kernel[(num_tokens,)],
        *(q, k, v, cos_sin, cache, slots, out, *strides),
        *(cos_sin.stride(0), cache.stride(0), out.stride(0), out.stride(1)),
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        HEAD_SIZE=head_size,
        PAIRS=pairs,
        INTERLEAVED=args.get("interleaved", False),
        PAGE=cache.shape[3],
        BLOCK=triton.next_power_of_2(num_heads * pairs),
        REST_BLOCK=triton.next_power_of_2(max(1, num_heads * rest)),
        KV_BLOCK=triton.next_power_of_2(num_kv_heads * pairs),
        KV_REST_BLOCK=triton.next_power_of_2(max(1, num_kv_heads * rest)),
        V_BLOCK=triton.next_power_of_2(num_kv_heads * head_size),
        num_warps=4,
        **launch_options(q.device),
    )
