"""A KV cache in int8: stored are the bits of the op, read values are as near as fp32 sums, and rows are their own."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tritium import ops
from tritium.kernels.cpu import copies, library, rope
from tritium.kernels.cpu.attention import bind_paged_attention, supports_paged_attention
from tritium.kernels.kernel import TensorSpec
from tritium.ops.kv_int8 import quantize_cache
from tritium.ops.quantized import SCALE_BYTES
from tritium.testing.attention_problems import Problem, check_company

pytestmark = pytest.mark.skipif(not library.available(), reason=library.why_not())
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EACH_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])


def in_int8(args: dict[str, Any]) -> dict[str, Any]:
    """The same arguments with the cache in int8; slots that held NaN have a NaN scale."""
    return {**args, "cache_layer": quantize_cache(args["cache_layer"])}


def compute(args: dict[str, Any]) -> torch.Tensor:
    out = torch.full_like(args["q_TNH"], 77.0)
    bind_paged_attention(in_int8(args), [out])()
    return out


def empty_cache(num_kv_heads: int, head_size: int) -> torch.Tensor:
    """[5 blocks, 2, K, 4, row] inside wider blocks, all bytes 7."""
    return torch.full((5, 3, 2, num_kv_heads, 4, head_size + SCALE_BYTES), 7, dtype=torch.int8)[:, 1]


MIXED = [(1, 1), (1, 130), (3, 3), (17, 150), (70, 70), (1, 64), (1, 65), (66, 129)]
SHAPES = [(8, 2, 64), (4, 4, 80), (4, 1, 20), (2, 2, 256), (71, 1, 64), (3, 1, 7)]


@EACH_DTYPE
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_its_error_is_at_most_twice_that_of_a_cast(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    slopes = torch.rand(shape[0]) / 4
    for window, softcap, alibi in ((0, 0.0, None), (70, 20.0, slopes)):
        problem = Problem.draw([c for _, c in MIXED], *shape, dtype, window=window, softcap=softcap, slopes=alibi)
        args = in_int8(problem.args(list(enumerate(MIXED))))
        exact = ops.paged_attention(**{**args, "q_TNH": args["q_TNH"].float()})
        out = torch.full_like(args["q_TNH"], 77.0)
        bind_paged_attention(args, [out])()
        error, cast = (out.float() - exact).abs(), (exact.to(dtype).float() - exact).abs()
        assert error.square().mean().sqrt() <= 2 * cast.square().mean().sqrt() + 2e-6 * exact.abs().max()
        assert error.max() <= 3 * cast.max() + 1e-5 * exact.abs().max()


@EACH_DTYPE
def test_what_it_stores_are_the_bits_of_the_op_and_negative_slots_are_left_alone(dtype: torch.dtype) -> None:
    wide = torch.randn(9, 3, 5, 40).to(dtype)
    wide[2, 0, 1, 3], wide[3, 1, 2], wide[4, 1, 0, 39] = float("nan"), 0.0, float("inf")
    k, v = wide[:, 0, :3, 1:38], wide[:, 1, 1:4, 3:]
    slots = torch.tensor([4, 19, -1, 7, 8, 5, -1, 12, 6])
    kernel, op = empty_cache(3, 37), empty_cache(3, 37)
    copies.bind_kv_store({"k_TKH": k, "v_TKH": v, "cache_layer": kernel, "slot_mapping_T": slots}, [])()
    ops.kv_store(k, v, op, slots)
    assert torch.equal(kernel, op) and (kernel[0] == 7).all() and (kernel[1, 0, :, 0] != 7).any()


@EACH_DTYPE
@pytest.mark.parametrize("interleaved", [False, True])
def test_rotating_and_storing_in_one_step_gives_the_bits_of_two(dtype: torch.dtype, interleaved: bool) -> None:
    q, k, v = torch.randn(6, 4, 24).to(dtype), torch.randn(6, 2, 24).to(dtype), torch.randn(6, 2, 24).to(dtype)
    cos_sin = torch.randn(6, 20)
    slots = torch.tensor([4, 9, 10, -1, 17, 5])
    one, two = empty_cache(2, 24), empty_cache(2, 24)
    out, rotated_q, rotated_k = torch.empty_like(q), torch.empty_like(q), torch.empty_like(k)
    args = {"q_TNH": q, "k_TKH": k, "v_TKH": v, "cos_sin": cos_sin, "slot_mapping_T": slots}
    assert rope.supports_rope_kv_store({**args, "cache_layer": one}) is None
    rope.bind_rope_kv_store({**args, "cache_layer": one, "interleaved": interleaved}, [out])()
    for x, y in ((q, rotated_q), (k, rotated_k)):
        rope.bind_rope({"x_TNH": x, "cos_sin": cos_sin, "interleaved": interleaved}, [y])()
    ops.kv_store(rotated_k, v, two, slots)
    assert torch.equal(out, rotated_q) and torch.equal(one, two)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_a_sequence_in_any_batch_has_the_bits_it_has_alone(data: st.DataObject) -> None:
    check_company(data, compute, most_sequences=4)


def test_a_row_without_room_for_its_scale_is_refused_with_its_sizes() -> None:
    q = TensorSpec(dtype=torch.bfloat16, shape=(None, 8, 64))
    cache = TensorSpec(dtype=torch.int8, shape=(None, 2, 4, 16, 64))
    assert supports_paged_attention({"q_TNH": q, "cache_layer": cache}) == "q has heads of 64, the cache of 60"
    k = TensorSpec(dtype=torch.bfloat16, shape=(None, 4, 64))
    slots = TensorSpec(dtype=torch.int64, shape=(None,))
    args = {"k_TKH": k, "v_TKH": k, "cache_layer": cache, "slot_mapping_T": slots}
    assert copies.supports_kv_store(args) == "k has heads of 64, the cache rows of 64 in torch.int8"
