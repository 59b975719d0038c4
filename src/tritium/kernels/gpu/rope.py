"""rope_cos_sin, rope, and rope_kv_store: one program a token, all its heads; pairs (p, p + P), or (2p, 2p + 1) when
interleaved.

fp32, cast once. rope_kv_store rotates the queries as rope does, the keys into their slot of the cache
[block, 2, kv head, PAGE, HEAD_SIZE], and copies the values there; a cache in fp8 saturates.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

from tritium.kernels.gpu.copies import need_dense
from tritium.kernels.gpu.programmatic import begin, launch_options
from tritium.kernels.kernel import Thunk

# tl.cos is the hardware's: at a thousand radians it is off by more than bf16's rounding. The interpreter has no other.
_IS_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def angles(cos_sin_ptr, NUM_HEADS: tl.constexpr, PAIRS: tl.constexpr, BLOCK: tl.constexpr):
    """One token's cosines and sines, for every head."""
    i = tl.arange(0, BLOCK)
    place, is_in = cos_sin_ptr + i % PAIRS, i < NUM_HEADS * PAIRS
    return tl.load(place, mask=is_in, other=0.0), tl.load(place + PAIRS, mask=is_in, other=0.0)


@triton.jit
def _pairs(NUM_HEADS: tl.constexpr, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK: tl.constexpr):
    """Of all heads' pairs: head, the two dimensions, and whether there is such a pair."""
    i = tl.arange(0, BLOCK)
    first = i % PAIRS * 2 if INTERLEAVED else i % PAIRS
    return i // PAIRS, first, first + (1 if INTERLEAVED else PAIRS), i < NUM_HEADS * PAIRS


@triton.jit
def _rest(NUM_HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr, PAIRS: tl.constexpr, BLOCK: tl.constexpr):
    """Of what is not rotated: head, dimension, and whether there is such an element."""
    j = tl.arange(0, BLOCK)
    REST: tl.constexpr = HEAD_SIZE - 2 * PAIRS
    return j // REST, 2 * PAIRS + j % REST, j < NUM_HEADS * REST


@triton.jit
def load_heads(
    x_ptr, stride_head, NUM_HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr, PAIRS: tl.constexpr,
    INTERLEAVED: tl.constexpr, BLOCK: tl.constexpr, REST_BLOCK: tl.constexpr,
):  # fmt: skip
    """One token's heads: both halves of the pairs, and the rest (anything, where there is none)."""
    head, first, second, is_in = _pairs(NUM_HEADS, PAIRS, INTERLEAVED, BLOCK)
    a = tl.load(x_ptr + head * stride_head + first, mask=is_in, other=0.0)
    b = tl.load(x_ptr + head * stride_head + second, mask=is_in, other=0.0)
    rest = a
    if HEAD_SIZE > 2 * PAIRS:
        head, d, is_in = _rest(NUM_HEADS, HEAD_SIZE, PAIRS, REST_BLOCK)
        rest = tl.load(x_ptr + head * stride_head + d, mask=is_in)
    return a, b, rest


@triton.jit
def store_heads(
    out_ptr, stride_head, a, b, rest, cos, sin, NUM_HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr,
    PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK: tl.constexpr, REST_BLOCK: tl.constexpr,
):  # fmt: skip
    """What `load_heads` gave, rotated; rounded to its own type, then to what out holds."""
    dtype: tl.constexpr = a.dtype
    out_dtype: tl.constexpr = out_ptr.dtype.element_ty
    head, first, second, is_in = _pairs(NUM_HEADS, PAIRS, INTERLEAVED, BLOCK)
    a, b = a.to(tl.float32), b.to(tl.float32)
    tl.store(out_ptr + head * stride_head + first, (a * cos - b * sin).to(dtype).to(out_dtype), mask=is_in)
    tl.store(out_ptr + head * stride_head + second, (b * cos + a * sin).to(dtype).to(out_dtype), mask=is_in)
    if HEAD_SIZE > 2 * PAIRS:
        head, d, is_in = _rest(NUM_HEADS, HEAD_SIZE, PAIRS, REST_BLOCK)
        tl.store(out_ptr + head * stride_head + d, rest.to(out_dtype), mask=is_in)


@triton.jit
def _rope_cos_sin_kernel(
    positions_ptr, inv_freq_ptr, out_ptr, num_tokens, attention_scaling, PAIRS: tl.constexpr, TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    t, p = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS), tl.arange(0, BLOCK)
    is_t, is_p = t < num_tokens, p < PAIRS
    position = tl.load(positions_ptr + t, mask=is_t, other=0).to(tl.float32)
    angle = position[:, None] * tl.load(inv_freq_ptr + p, mask=is_p, other=0.0).to(tl.float32)[None, :]
    place = out_ptr + t[:, None] * (2 * PAIRS) + p[None, :]
    is_in = is_t[:, None] & is_p[None, :]
    cos = tl.cos(angle) if _IS_INTERPRETED else libdevice.cos(angle)
    sin = tl.sin(angle) if _IS_INTERPRETED else libdevice.sin(angle)
    tl.store(place, cos * attention_scaling, mask=is_in)
    tl.store(place + PAIRS, sin * attention_scaling, mask=is_in)


@triton.jit
def _rope_kernel(
    x_ptr, cos_sin_ptr, out_ptr, stride_x_token, stride_x_head, stride_out_token, stride_out_head, stride_angles,
    NUM_HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr,
    BLOCK: tl.constexpr, REST_BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    cos, sin = angles(cos_sin_ptr + token * stride_angles, NUM_HEADS, PAIRS, BLOCK)
    a, b, rest = load_heads(
        x_ptr + token * stride_x_token, stride_x_head, NUM_HEADS, HEAD_SIZE, PAIRS, INTERLEAVED, BLOCK, REST_BLOCK
    )  # fmt: skip
    store_heads(
        out_ptr + token * stride_out_token, stride_out_head, a, b, rest, cos, sin,
        NUM_HEADS, HEAD_SIZE, PAIRS, INTERLEAVED, BLOCK, REST_BLOCK,
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
    """Loads everything before it stores anything: one wait for memory, where each store would begin another."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token)  # slots and angles are made before any kernel that starts early
    cos_sin_ptr += token * stride_angles
    cos, sin = angles(cos_sin_ptr, NUM_HEADS, PAIRS, BLOCK)
    kv_cos, kv_sin = angles(cos_sin_ptr, NUM_KV_HEADS, PAIRS, KV_BLOCK)
    begin(IS_EARLY)
    q_a, q_b, q_rest = load_heads(
        q_ptr + token * stride_q_token, stride_q_head, NUM_HEADS, HEAD_SIZE, PAIRS, INTERLEAVED, BLOCK, REST_BLOCK
    )  # fmt: skip
    k_a, k_b, k_rest = load_heads(
        k_ptr + token * stride_k_token, stride_k_head,
        NUM_KV_HEADS, HEAD_SIZE, PAIRS, INTERLEAVED, KV_BLOCK, KV_REST_BLOCK,
    )  # fmt: skip
    i = tl.arange(0, V_BLOCK)
    head, d = i // HEAD_SIZE, i % HEAD_SIZE
    is_in = i < NUM_KV_HEADS * HEAD_SIZE
    v = tl.load(v_ptr + token * stride_v_token + head * stride_v_head + d, mask=is_in)
    store_heads(
        out_ptr + token * stride_out_token, stride_out_head, q_a, q_b, q_rest, cos, sin,
        NUM_HEADS, HEAD_SIZE, PAIRS, INTERLEAVED, BLOCK, REST_BLOCK,
    )  # fmt: skip
    if slot >= 0:
        place = cache_ptr + slot // PAGE * stride_block + slot % PAGE * HEAD_SIZE
        store_heads(
            place, PAGE * HEAD_SIZE, k_a, k_b, k_rest, kv_cos, kv_sin,
            NUM_KV_HEADS, HEAD_SIZE, PAIRS, INTERLEAVED, KV_BLOCK, KV_REST_BLOCK,
        )  # fmt: skip
        place += NUM_KV_HEADS * PAGE * HEAD_SIZE
        tl.store(place + head * PAGE * HEAD_SIZE + d, v.to(cache_ptr.dtype.element_ty), mask=is_in)


def bind_rope_cos_sin(args: Mapping[str, Any], outputs: Sequence[torch.Tensor]) -> Thunk:
    """ops.rope_cos_sin into outputs[0]."""
    positions, inv_freq, out = args["positions_T"], args["inv_freq_P"], outputs[0]
    need_dense(positions_T=positions, inv_freq_P=inv_freq, out=out)
    (num_tokens,), (pairs,) = positions.shape, inv_freq.shape
    block = triton.next_power_of_2(pairs)
    tokens = max(1, 512 // block)
    return partial(
        _rope_cos_sin_kernel[(triton.cdiv(num_tokens, tokens),)],
        *(positions, inv_freq, out, num_tokens, float(args.get("attention_scaling", 1.0))),
        PAIRS=pairs,
        TOKENS=triton.next_power_of_2(tokens),
        BLOCK=block,
        num_warps=4,
    )


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
    _, num_kv_heads, head_size = args["k_TKH"].shape
    pairs = args["cos_sin"].shape[1] // 2
    sizes = {
        "NUM_KV_HEADS": num_kv_heads,
        "KV_BLOCK": triton.next_power_of_2(num_kv_heads * pairs),
        "KV_REST_BLOCK": triton.next_power_of_2(max(1, num_kv_heads * (head_size - 2 * pairs))),
        "V_BLOCK": triton.next_power_of_2(num_kv_heads * head_size),
    }
    return bind_rope_and_store(_rope_kv_store_kernel, args, outputs[0], **sizes)


def bind_rope_and_store(kernel: Any, args: Mapping[str, Any], out: torch.Tensor, **sizes: int) -> Thunk:
    """ops.rope_kv_store by a kernel of one program a token; sizes: what it is compiled for of keys and values."""
    q, k, v, cos_sin = (args[name] for name in ("q_TNH", "k_TKH", "v_TKH", "cos_sin"))
    cache, slots = args["cache_layer"], args["slot_mapping_T"]
    need_dense(q_TNH=q[0, 0], k_TKH=k[0, 0], v_TKH=v[0, 0], cos_sin=cos_sin[0], cache_layer=cache[0], out=out[0, 0])
    num_tokens, num_heads, head_size = q.shape
    pairs = cos_sin.shape[1] // 2
    strides = [s for t in (q, k, v) for s in t.stride()[:2]]
    return partial(
        kernel[(num_tokens,)],
        *(q, k, v, cos_sin, cache, slots, out, *strides),
        *(cos_sin.stride(0), cache.stride(0), out.stride(0), out.stride(1)),
        NUM_HEADS=num_heads,
        HEAD_SIZE=head_size,
        PAIRS=pairs,
        INTERLEAVED=args.get("interleaved", False),
        PAGE=cache.shape[3],
        BLOCK=triton.next_power_of_2(num_heads * pairs),
        REST_BLOCK=triton.next_power_of_2(max(1, num_heads * (head_size - 2 * pairs))),
        num_warps=4,
        **sizes,
        **launch_options(q.device),
    )
