"""Kernels of fused ops: bit for bit what the kernels of the ops that they stand for give, one after the other."""

import pytest
import torch

from tritium import ops
from tritium.kernels.kernel import resolve
from tritium.kernels.table import KERNELS

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def run(name: str, args: dict, *outputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    (kernel,) = (k for k in KERNELS if k.name == name)
    resolve(kernel.target)(args, outputs)()
    return outputs


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.full(shape, torch.nan, dtype=dtype)


def view(num_tokens: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows inside wider ones, as a slice of a merged linear has them."""
    return torch.randn(num_tokens, 2 * width + 3).to(dtype)[:, 2 : 2 + width]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ["cpu", "eager"])
@pytest.mark.parametrize("norm", ["rms_norm", "layer_norm", "layer_norm without bias", "rms_norm of gemma"])
@pytest.mark.parametrize(("num_tokens", "width"), [(1, 37), (5, 64), (200, 1000)])
def test_add_norm_has_the_bits_of_add_then_norm(norm, backend, dtype, num_tokens, width):
    x, residual, weight = view(num_tokens, width, dtype), view(num_tokens, width, dtype), torch.randn(width).to(dtype)
    literals = {"weight": weight, "eps": 1e-5}
    if norm == "rms_norm of gemma":
        literals |= {"weight_offset": 1.0, "cast_before_weight": False}
    if norm.startswith("layer"):
        literals["bias"] = None if "without" in norm else torch.randn(width).to(dtype)
    op = norm.split()[0]
    total = x + residual
    (expected,) = run(f"{backend}.{op}", {"x": total, **literals}, empty(total.shape, dtype))
    args = {"x": x, "residual": residual, **literals}
    out, found = run(f"{backend}.add_{op}", args, empty(total.shape, dtype), empty(total.shape, dtype))
    assert torch.equal(found, total) and torch.equal(out, expected)


@pytest.mark.parametrize("op", ["add_rms_norm", "add_layer_norm"])
@pytest.mark.parametrize("place", ["x", "residual"])
def test_the_sum_may_lie_where_a_summand_lay_and_the_norm_where_the_other(op, place):
    args = {name: torch.randn(6, 50) for name in ("x", "residual")} | {"weight": torch.randn(50), "eps": 1e-5}
    args |= {"bias": torch.randn(50)} if "layer" in op else {}
    expected = run(f"cpu.{op}", args, empty((6, 50), torch.float32), empty((6, 50), torch.float32))
    other = "residual" if place == "x" else "x"
    found = run(f"cpu.{op}", args, args[other], args[place])
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ["cpu", "eager"])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "size", "pairs"), [(6, 2, 32, 16), (3, 3, 20, 7)])
def test_rope_kv_store_has_the_bits_of_rope_then_kv_store(backend, dtype, interleaved, heads, kv_heads, size, pairs):
    num_tokens, block_size = 150, 8
    qkv = view(num_tokens, (heads + 2 * kv_heads) * size, dtype).unflatten(1, (-1, size))
    q, k, v = qkv.split([heads, kv_heads, kv_heads], dim=1)
    cos_sin = ops.rope_cos_sin(torch.randint(0, 999, (num_tokens,)), torch.rand(pairs))
    slots = torch.randperm(20 * block_size)[:num_tokens]
    slots[::9] = -1
    caches = [empty((20, 3, 2, kv_heads, block_size, size), dtype) for _ in range(2)]
    turned = {}
    for name, x in (("q", q), ("k", k)):
        rope = {"x_TNH": x, "cos_sin": cos_sin, "interleaved": interleaved}
        (turned[name],) = run(f"{backend}.rope", rope, empty(tuple(x.shape), dtype))
    store = {"k_TKH": turned["k"], "v_TKH": v, "cache_layer": caches[0][:, 1], "slot_mapping_T": slots}
    run(f"{backend}.kv_store", store)
    args = {"q_TNH": q, "k_TKH": k, "v_TKH": v, "cos_sin": cos_sin, "cache_layer": caches[1][:, 1]}
    args |= {"slot_mapping_T": slots, "interleaved": interleaved}
    (out,) = run(f"{backend}.rope_kv_store", args, empty(tuple(q.shape), dtype))
    assert torch.equal(out, turned["q"])
    assert torch.equal(caches[1].nan_to_num(7.0), caches[0].nan_to_num(7.0))
    assert not caches[1][:, 1].isnan().all() and caches[1][:, [0, 2]].isnan().all()
