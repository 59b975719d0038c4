"""The kernels of rows on drawn shapes, layouts, values, numbers of threads: right by the rule, and each row by itself.

Right: within twice the error of the op's reference in the same dtype, and a rounding; and of what sums in fp32 over an
order of their own, 16 roundings of the sum of the absolute terms. What lies between the elements of an input is NaN.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tritium import ops
from tritium.kernels.cpu import library
from tritium.kernels.kernel import Kernel, resolve
from tritium.kernels.table import KERNELS
from tritium.testing import kernel_cases as cases
from tritium.testing.kernel_cases import Args, Case, first_rows, in_double, run
from tritium.testing.layouts import draw_layout, draw_layouts, draw_threads

pytestmark = pytest.mark.skipif(not library.available(), reason=library.why_not())
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# One, odd, and one beside vectors, tiles, groups of rows and panels; the last ones are shared by threads
ROWS = st.sampled_from([0, 1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 65, 130])
WIDTHS = st.one_of(st.integers(1, 70), st.sampled_from([127, 128, 129, 255, 257, 511, 513, 1000, 1030]))
OUTPUTS = st.sampled_from([1, 3, 15, 16, 17, 31, 32, 33, 63, 65, 100])
KINDS = st.sampled_from(cases.KINDS)
SCALES = st.sampled_from([1.0, 1e-3, 30.0])
SUMS = 16 * torch.finfo(torch.float32).eps


def kernel_named(name: str) -> Kernel:
    return next(kernel for kernel in KERNELS if kernel.name == name)


def call(kernel: Kernel, args: Args, *outputs: torch.Tensor) -> None:
    resolve(kernel.target)(args, outputs)()


def draw_norm(data: st.DataObject) -> Case:
    op, width, booleans = data.draw(st.sampled_from(["rms_norm", "layer_norm"])), data.draw(WIDTHS), st.booleans()
    literals: dict[str, Any] = {"eps": data.draw(st.sampled_from([1e-6, 1e-3]))}
    if op == "layer_norm":
        return cases.norm_case("", op, width, cases.exact_layer_norm, bias=data.draw(booleans), **literals)
    literals |= {
        "weight_offset": data.draw(st.sampled_from([0.0, 1.0])),
        "cast_before_weight": data.draw(st.booleans()),
    }
    return cases.norm_case("", op, width, cases.exact_rms_norm, **literals)


def draw_rope(data: st.DataObject) -> Case:
    size = data.draw(st.integers(2, 130))
    pairs = data.draw(st.integers(1, size // 2))
    return cases.rope_case("", data.draw(st.integers(1, 9)), size, pairs, interleaved=data.draw(st.booleans()))


def draw_activation(data: st.DataObject) -> Case:
    make = data.draw(st.sampled_from([cases.activation_case, cases.gated_case]))
    return make(data.draw(KINDS), data.draw(WIDTHS))


def draw_linear(data: st.DataObject) -> Case:
    num_out, num_in = data.draw(OUTPUTS), data.draw(WIDTHS)
    which = data.draw(st.sampled_from(["linear", "linear_add", "linear_pair"]))
    if which == "linear":
        return cases.linear_case(num_out, num_in, has_bias=data.draw(st.booleans()))
    if which == "linear_add":
        return cases.linear_add_case(num_out, num_in)
    return cases.linear_pair_case(num_out, data.draw(st.sampled_from([32, 64, 512])), num_in)


def draw_experts(data: st.DataObject) -> Case:
    num_experts, width, hidden = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 70)), data.draw(OUTPUTS)
    num_chosen, kind, flag = data.draw(st.integers(1, num_experts)), data.draw(KINDS), data.draw(st.booleans())
    if data.draw(st.booleans()):
        return cases.moe_case(num_experts, width, hidden, num_chosen, kind, is_normed=flag)
    return cases.experts_case(num_experts, width, hidden, num_chosen, kind, is_wide=flag)


def terms(args: Args, case: Case) -> float:
    """The largest sum of absolute terms of a result that is a sum; 0 of others."""
    if not case.op.startswith(("linear", "moe", "experts")):
        return 0.0
    absolute = {n: a.abs() if isinstance(a, torch.Tensor) and n != "router_TE" else a for n, a in args.items()}
    return case.exact(**in_double(absolute)).abs().max().item()


def check(data: st.DataObject, draw: Callable[[st.DataObject], Case]) -> None:
    torch.manual_seed(data.draw(st.integers(0, 1 << 16)))
    case, dtype, num_tokens = draw(data), data.draw(st.sampled_from(DTYPES)), data.draw(ROWS)
    args, scale = case.make(num_tokens, dtype), data.draw(SCALES)
    name = case.rows[0]
    args[name] = args[name] * scale
    dense = {n: a.contiguous() if isinstance(a, torch.Tensor) else a for n, a in args.items()}
    args = draw_layouts(data, args)
    kernel, reference = kernel_named(f"cpu.{case.op}"), ops.op_named(case.op).reference(**dense)
    shape = tuple(reference.shape)
    with draw_threads(data):
        whole = run(kernel, args, shape, reference.dtype)
    if num_tokens == 0:
        return
    exact = case.exact(**in_double(dense))
    # In low precision a hidden value is rounded too, and few results may have met no rounding by luck.
    roundings = SUMS + (torch.finfo(dtype).eps if case.op in ("moe", "experts") else 0.0)
    ulp = torch.finfo(reference.dtype).eps * exact.abs().max() + torch.finfo(reference.dtype).tiny
    limit = 2 * (reference.double() - exact).abs().max() + ulp + roundings * terms(dense, case)
    error = (whole.double() - exact).abs().max()
    assert error <= limit, f"error {error:.3g}, limit {limit:.3g}"
    start = data.draw(st.integers(0, num_tokens - 1))
    end = data.draw(st.integers(start + 1, num_tokens))
    with draw_threads(data):
        part = run(kernel, first_rows(case, args, start, end), (end - start, *shape[1:]), reference.dtype)
    assert torch.equal(part, whole[start:end]), f"rows {start} to {end} have other bits alone"


DRAWN = {
    "norms": draw_norm,
    "rope": draw_rope,
    "activations": draw_activation,
    "linears": draw_linear,
    "experts": draw_experts,
}


@pytest.mark.parametrize("name", DRAWN)
@settings(max_examples=15)
@given(st.data())
def test_drawn_rows_are_right_and_have_the_same_bits_alone(name: str, data: st.DataObject) -> None:
    check(data, DRAWN[name])


@pytest.mark.full
@pytest.mark.parametrize("name", DRAWN)
@settings(max_examples=1500)
@given(st.data())
def test_many_drawn_rows_are_too(name: str, data: st.DataObject) -> None:
    check(data, DRAWN[name])


def check_sum_then_norm(data: st.DataObject) -> None:
    """The norm of a sum has the bits of the sum, then the norm."""
    torch.manual_seed(data.draw(st.integers(0, 1 << 16)))
    case, dtype, num_tokens = draw_norm(data), data.draw(st.sampled_from(DTYPES)), data.draw(ROWS)
    args = case.make(num_tokens, dtype)
    residual = torch.randn(args["x"].shape).to(dtype)
    total = args["x"] + residual
    kernel = kernel_named(f"cpu.add_{case.op}")
    outputs = [torch.full(total.shape, torch.nan, dtype=dtype) for _ in range(2)]
    given_args = {**draw_layouts(data, args), "residual": draw_layout(data, residual)}
    with draw_threads(data):
        call(kernel, given_args, *outputs)
    assert torch.equal(outputs[1], total)
    assert torch.equal(outputs[0], run(kernel_named(f"cpu.{case.op}"), args | {"x": total}, total.shape, dtype))


def check_copies(data: st.DataObject) -> None:
    """Gathered rows are the rows."""
    torch.manual_seed(data.draw(st.integers(0, 1 << 16)))
    dtype, num_source, width = data.draw(st.sampled_from(DTYPES)), data.draw(st.integers(1, 50)), data.draw(WIDTHS)
    source = torch.randn(num_source, width).to(dtype)
    rows = torch.randint(0, num_source, (data.draw(ROWS),))
    laid, laid_rows, shape = draw_layout(data, source), draw_layout(data, rows), (len(rows), width)
    with draw_threads(data):
        gathered = run(kernel_named("cpu.gather_rows"), {"x_TD": laid, "rows_R": laid_rows}, shape, dtype)
        embedded = run(kernel_named("cpu.embedding"), {"weight_VD": laid, "ids_T": laid_rows}, shape, dtype)
    assert torch.equal(gathered, source[rows]) and torch.equal(embedded, source[rows])


def check_int8_rows(data: st.DataObject) -> None:
    """Rows of a table in int8 have the bits of the op; one that is not there is NaN, and no other."""
    torch.manual_seed(data.draw(st.integers(0, 1 << 16)))
    dtype, num_source, width = data.draw(st.sampled_from(DTYPES)), data.draw(st.integers(1, 50)), data.draw(WIDTHS)
    qweight = torch.randint(-127, 128, (num_source, width)).to(torch.int8)
    scales = torch.rand(num_source, 1) * data.draw(st.sampled_from([1.0, 1e-3, 1e-38, 1e36, torch.nan]))
    args = {"qweight_VD": qweight, "scales_V1": scales, "ids_T": torch.randint(0, num_source, (data.draw(ROWS),))}
    given_dtype = {"dtype": str(dtype)[6:]}
    expected = ops.op_named("quantized_embedding").reference(**args, **given_dtype)
    if data.draw(st.booleans()):
        args["ids_T"][:1] = data.draw(st.sampled_from([-1, num_source, 1 << 40]))
        expected[:1] = torch.nan
    with draw_threads(data):
        found = run(
            kernel_named("cpu.quantized_embedding"),
            draw_layouts(data, args) | given_dtype,
            tuple(expected.shape),
            dtype,
        )
    assert torch.equal(found.isnan(), expected.isnan()) and torch.equal(found.nan_to_num(), expected.nan_to_num())


def check_angles(data: st.DataObject) -> None:
    """Cosines and sines of any position, within two roundings of the angle's own in fp32."""
    torch.manual_seed(data.draw(st.integers(0, 1 << 16)))
    positions = torch.randint(0, 1 << data.draw(st.integers(1, 24)), (data.draw(ROWS),))
    args = {"positions_T": positions, "inv_freq_P": torch.rand(data.draw(st.integers(1, 130)))}
    args["attention_scaling"] = data.draw(st.sampled_from([1.0, 1.25]))
    shape = (len(positions), 2 * len(args["inv_freq_P"]))
    with draw_threads(data):
        found = run(kernel_named("cpu.rope_cos_sin"), draw_layouts(data, args), shape, torch.float32)
    exact = cases.exact_cos_sin(**args)
    assert ((found.double() - exact).abs() <= 4 * torch.finfo(torch.float32).eps).all()


def check_rope_kv_store(data: st.DataObject) -> None:
    """Queries and cache have the bits of rope, then a copy or the op's own quantisation, in exactly the named slots."""
    torch.manual_seed(data.draw(st.integers(0, 1 << 16)))
    dtype, size, num_kv_heads = data.draw(st.sampled_from(DTYPES)), data.draw(st.integers(2, 100)), data.draw(KV_HEADS)
    num_tokens, block_size = data.draw(ROWS), data.draw(st.sampled_from([1, 8, 16, 256]))
    angles = torch.rand(num_tokens, data.draw(st.integers(1, size // 2))) * 100
    q = torch.randn(num_tokens, num_kv_heads * data.draw(KV_HEADS), size).to(dtype)
    k, v = (torch.randn(num_tokens, num_kv_heads, size).to(dtype) for _ in range(2))
    num_blocks = 2 + num_tokens // block_size
    slots = torch.randperm(num_blocks * block_size)[:num_tokens]
    slots[torch.rand(num_tokens) < 0.2] = -1
    is_int8 = data.draw(st.booleans())
    shape = (num_blocks, 3, 2, num_kv_heads, block_size, size + 4 * is_int8)
    empty = torch.full(shape, -1, dtype=torch.int8) if is_int8 else torch.full(shape, torch.nan, dtype=dtype)
    turning = {"cos_sin": torch.cat((angles.cos(), angles.sin()), -1), "interleaved": data.draw(st.booleans())}
    turned = [run(kernel_named("cpu.rope"), {"x_TNH": x, **turning}, tuple(x.shape), dtype) for x in (q, k)]
    caches = [empty.clone() for _ in range(3)]
    ops.kv_store(turned[1], v, caches[0][:, 1], slots)
    given_args = draw_layouts(data, {"q_TNH": q, "k_TKH": k, "v_TKH": v, "slot_mapping_T": slots, **turning})
    stored = draw_layouts(data, {"k_TKH": turned[1], "v_TKH": v, "slot_mapping_T": slots})
    out = torch.full(q.shape, torch.nan, dtype=dtype)
    with draw_threads(data):
        call(kernel_named("cpu.rope_kv_store"), {**given_args, "cache_layer": caches[1][:, 1]}, out)
        call(kernel_named("cpu.kv_store"), {**stored, "cache_layer": caches[2][:, 1]})
    assert torch.equal(out, turned[0])
    for cache in caches[1:]:
        assert torch.equal(cache.view(torch.uint8), caches[0].view(torch.uint8))


KV_HEADS = st.integers(1, 4)
FUSED = {
    "a sum and a norm": check_sum_then_norm,
    "copies": check_copies,
    "rows in int8": check_int8_rows,
    "angles": check_angles,
    "rope and the cache": check_rope_kv_store,
}


@pytest.mark.parametrize("name", FUSED)
@settings(max_examples=15)
@given(st.data())
def test_drawn_calls_give_what_they_stand_for(name: str, data: st.DataObject) -> None:
    FUSED[name](data)


@pytest.mark.full
@pytest.mark.parametrize("name", FUSED)
@settings(max_examples=1500)
@given(st.data())
def test_many_drawn_calls_do_too(name: str, data: st.DataObject) -> None:
    FUSED[name](data)
