"""Every GPU kernel of an op that computes rows: within twice the low-precision reference's own error, plus one ulp."""

from typing import Any

import pytest
import torch

from tritium import ops
from tritium.kernels.kernel import Kernel, TensorSpec, resolve
from tritium.kernels.table import KERNELS
from tritium.testing.kernel_cases import CASES, Case, in_double, run, specs_of

pytestmark = pytest.mark.gpu
PAIRS = [pytest.param(k, c, id=c.name) for c in CASES for k in KERNELS if k.op == c.op and k.backend == "gpu"]
DTYPES = (torch.float32, torch.float16, *((torch.bfloat16,) if torch.cuda.is_available() else ()))


def moved(args: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Tensors on the device with the strides they had."""
    return {name: _moved(value, device) if isinstance(value, torch.Tensor) else value for name, value in args.items()}


def _moved(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    storage = torch.empty(x.untyped_storage().nbytes() // x.element_size(), dtype=x.dtype).set_(x.untyped_storage())
    return storage.to(device).as_strided(x.shape, x.stride(), x.storage_offset())


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize(("kernel", "case"), PAIRS)
def test_a_kernel_is_within_twice_the_references_own_error(
    kernel: Kernel, case: Case, dtype: torch.dtype, device: torch.device
) -> None:
    for num_tokens in (1, 33):
        args = case.make(num_tokens, dtype)
        specs = {
            n: TensorSpec(dtype=a.dtype, shape=tuple(a.shape)) if isinstance(a, torch.Tensor) else a
            for n, a in args.items()
        }
        assert kernel.supports is None or resolve(kernel.supports)(specs) is None
        reference = ops.op_named(case.op).reference(**args)
        exact = case.exact(**in_double(args))
        out = run(kernel, moved(args, device), tuple(reference.shape), reference.dtype).cpu()
        ulp = torch.finfo(reference.dtype).eps * exact.abs().max()
        limit = 2 * (reference.double() - exact).abs().max() + ulp
        error = (out.double() - exact).abs().max()
        assert error <= limit, f"error {error:.3g}, limit {limit:.3g} at {num_tokens} rows"


@pytest.mark.parametrize("op", ["embedding", "gather_rows"])
def test_a_row_that_does_not_exist_is_nan(op: str, device: torch.device) -> None:
    kernel = next(k for k in KERNELS if k.op == op and k.backend == "gpu")
    table, rows = torch.randn(5, 37, device=device), torch.tensor([4, 5, -1, 0], device=device)
    args = dict(zip(("x_TD", "rows_R") if op == "gather_rows" else ("weight_VD", "ids_T"), (table, rows), strict=True))
    out = run(kernel, args, (4, 37), torch.float32)
    assert torch.equal(out[[0, 3]], table[[4, 0]]) and out[1:3].isnan().all()


def test_a_part_of_a_table_gives_zeros_for_the_rows_of_other_parts(device: torch.device) -> None:
    kernel = next(k for k in KERNELS if k.op == "embedding_part" and k.backend == "gpu")
    table, ids = torch.randn(5, 37, device=device), torch.tensor([4, 5, 9, 10, 0, -1, 7], device=device)
    out = run(kernel, {"weight_VD": table, "ids_T": ids, "first": 5}, (7, 37), torch.float32)
    assert torch.equal(out, ops.embedding_part(ids, table, 5))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_ids_of_any_sizes_and_strides_find_their_rows_or_nan(dtype: torch.dtype, device: torch.device) -> None:
    kernel = next(k for k in KERNELS if k.op == "embedding" and k.backend == "gpu")
    table = torch.randn(9, 37, device=device)
    ids = torch.randint(0, 9, (4, 3, 2)).to(device, dtype)[:, 1]
    ids[2, 1], ids[0, 0] = 9, -1
    assert resolve(kernel.supports or "")(specs_of({"ids_T": ids, "weight_VD": table})) is None
    out = run(kernel, {"ids_T": ids, "weight_VD": table}, (4, 2, 37), torch.float32)
    is_known = (ids >= 0) & (ids < 9)
    assert torch.equal(out[is_known], table[ids[is_known].long()]) and out[~is_known].isnan().all()
    one = run(kernel, {"ids_T": ids[1, 1], "weight_VD": table}, (37,), torch.float32)
    assert torch.equal(one, table[int(ids[1, 1])])


def test_kv_store_writes_each_token_into_its_slot_and_nothing_else(device: torch.device) -> None:
    kernel = next(k for k in KERNELS if k.op == "kv_store" and k.backend == "gpu")
    k, v = (torch.randn(6, 3, 40, device=device)[:, :, 4:24] for _ in range(2))
    cache = torch.full((5, 2, 2, 3, 8, 20), 7.0, device=device)[:, 1]
    slots = torch.tensor([9, -1, 39, 8, -1, 15], device=device)
    expected = cache.clone()
    ops.kv_store(k, v, expected, slots)
    args = {"k_TKH": k, "v_TKH": v, "cache_layer": cache, "slot_mapping_T": slots}
    resolve(kernel.target)(args, [])()
    assert torch.equal(cache, expected)


def on_gpu(op: str) -> Any:
    return resolve(next(k for k in KERNELS if k.op == op and k.backend == "gpu").target)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("op", ["add_rms_norm", "add_layer_norm"])
def test_add_norm_is_the_sum_and_its_norm(op: str, dtype: torch.dtype, device: torch.device) -> None:
    x, residual = (torch.randn(7, 150, dtype=dtype)[:, 11:123].to(device) for _ in range(2))
    args: dict[str, Any] = {"x": x, "residual": residual, "weight": torch.randn(112, dtype=dtype).to(device)}
    args |= {"eps": 1e-5} | ({"bias": torch.randn(112, dtype=dtype).to(device)} if op == "add_layer_norm" else {})
    out, total = (torch.full((7, 112), float("nan"), dtype=dtype, device=device) for _ in range(2))
    on_gpu(op)(args, [out, total])()
    expected, expected_total = ops.op_named(op).reference(**args)
    assert torch.equal(total, expected_total)
    norm = ops.op_named(op.removeprefix("add_")).reference
    wide = {n: a.double() if isinstance(a, torch.Tensor) else a for n, a in args.items() if n not in ("x", "residual")}
    exact = norm(x=expected_total.double(), **wide)  # of one sum, so that a bias which cancels it bounds nothing
    allowed = 2 * (expected - exact).abs().max() + torch.finfo(dtype).eps * exact.abs().max()
    assert (out - exact).abs().max() <= allowed


@pytest.mark.parametrize(("pairs", "interleaved"), [(10, False), (6, True), (10, True)])
def test_rope_kv_store_is_rope_of_both_and_kv_store(pairs: int, interleaved: bool, device: torch.device) -> None:
    qkv = torch.randn(6, 11 * 20 + 5, device=device)[:, 5:].unflatten(1, (11, 20))
    q, k, v = qkv[:, :5], qkv[:, 5:8], qkv[:, 8:]
    angles = torch.rand(6, pairs, device=device) * 50
    cache = torch.full((5, 2, 2, 3, 8, 20), 7.0, device=device)[:, 1]
    args: dict[str, Any] = {"q_TNH": q, "k_TKH": k, "v_TKH": v, "cos_sin": torch.cat((angles.cos(), angles.sin()), -1)}
    args |= {"slot_mapping_T": torch.tensor([9, -1, 39, 8, -1, 15], device=device), "interleaved": interleaved}
    expected_cache = cache.clone()
    expected = ops.op_named("rope_kv_store").reference(**args, cache_layer=expected_cache)
    out = torch.full(q.shape, float("nan"), device=device)
    on_gpu("rope_kv_store")({**args, "cache_layer": cache}, [out])()
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(cache, expected_cache, rtol=1e-6, atol=1e-6)
