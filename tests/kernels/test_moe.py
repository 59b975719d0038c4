"""The mixture of experts beyond what every kernel is tested for: crowds, rows without numbers, refusals."""

from dataclasses import replace

import pytest
import torch

from tritium import ops
from tritium.kernels.kernel import TensorSpec, resolve
from tritium.kernels.table import KERNELS
from tritium.ops.moe import route
from tritium.testing.kernel_cases import bind

ROWS = [k for k in KERNELS if k.op == "moe" and k.backend != "gpu"]  # the others: tests/gpu


def arguments(num_tokens: int, num_experts: int, top_k: int, dtype: torch.dtype, width: int = 70) -> dict:
    hidden = 50
    return {
        "x_TD": torch.randn(num_tokens, width).to(dtype),
        "router_TE": torch.randn(num_tokens, num_experts).to(dtype),
        "gate_up_EGD": (torch.randn(num_experts, 2 * hidden, width) / width**0.5).to(dtype),
        "down_EDF": (torch.randn(num_experts, width, hidden) / hidden**0.5).to(dtype),
        "top_k": top_k,
        "is_normed": True,
        "kind": "silu",
    }


def result(kernel, args):
    out = torch.full_like(args["x_TD"], 77.0)
    bind(kernel, args, out)()
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("kernel", ROWS, ids=lambda k: k.name)
def test_a_row_has_the_same_bits_alone_and_where_all_others_choose_its_experts(kernel, dtype):
    args = arguments(97, 7, 3, dtype)
    args["router_TE"][:] = args["router_TE"][:1]  # every expert has 97 rows, or none
    crowded = result(kernel, args)
    for t in (0, 50, 96):
        alone = {n: a[t : t + 1] if n in ("x_TD", "router_TE") else a for n, a in args.items()}
        assert torch.equal(result(kernel, alone)[0], crowded[t])


@pytest.mark.parametrize("kernel", ROWS, ids=lambda k: k.name)
def test_rows_that_are_no_numbers_stay_alone_with_it(kernel):
    """Rows behind a batch hold anything."""
    args = arguments(20, 5, 2, torch.bfloat16)
    before = result(kernel, args)
    args["x_TD"][3], args["router_TE"][7], args["router_TE"][8] = torch.nan, torch.nan, torch.inf
    after = result(kernel, args)
    others = [t for t in range(20) if t not in (3, 7, 8)]
    assert torch.equal(after[others], before[others])
    assert after[[3, 7, 8]].isnan().all()


@pytest.mark.parametrize("kernel", ROWS, ids=lambda k: k.name)
def test_of_equal_logits_the_experts_with_lower_numbers_are_chosen(kernel):
    args = arguments(4, 6, 2, torch.float32)
    args["router_TE"][:] = torch.tensor([0.0, 1.0, 1.0, 1.0, 0.0, -1.0])
    torch.testing.assert_close(result(kernel, args), ops.moe(**args), rtol=1e-5, atol=1e-5)
    args["gate_up_EGD"][3:] = torch.nan
    args["down_EDF"][0] = torch.nan
    assert result(kernel, args).isfinite().all()


def test_no_tokens_are_no_work():
    for kernel in ROWS:
        assert result(kernel, arguments(0, 5, 2, torch.float32)).shape == (0, 70)


def test_the_compiled_kernel_refuses_what_it_has_no_code_for():
    supports = resolve(next(k for k in ROWS if k.backend == "cpu").supports)
    args = arguments(4, 5, 2, torch.float32)
    specs = {
        n: TensorSpec(dtype=a.dtype, shape=tuple(a.shape)) if isinstance(a, torch.Tensor) else a
        for n, a in args.items()
    }
    assert supports(specs) is None
    assert "bfloat16" in supports(specs | {"router_TE": replace(specs["router_TE"], dtype=torch.bfloat16)})
    many = replace(specs["router_TE"], shape=(None, 1025))
    assert supports(specs | {"router_TE": many}) == "there are 1025 experts, more than 1024"
    assert supports(specs | {"top_k": 6}) == "a token cannot choose 6 of 5 experts"


def test_experts_that_tokens_bring_give_what_a_router_with_the_same_choice_gives_and_a_missing_one_gives_nan():
    kernel = next(k for k in KERNELS if k.name == "cpu.experts")
    for dtype in (torch.float32, torch.bfloat16):
        args = arguments(40, 6, 2, dtype)
        expected = result(next(k for k in ROWS if k.backend == "cpu"), args)
        chosen, weights = route(args["router_TE"], 2, True)
        given = {name: args[name] for name in ("x_TD", "gate_up_EGD", "down_EDF", "kind")}
        found = result(kernel, given | {"chosen_TJ": chosen, "weights_TJ": weights})
        torch.testing.assert_close(found, expected, rtol=4e-3 if dtype == torch.bfloat16 else 1e-6, atol=1e-6)
        chosen[3, 1], chosen[7, 0] = 6, -1
        broken = result(kernel, given | {"chosen_TJ": chosen, "weights_TJ": weights})
        assert broken[[3, 7]].isnan().all() and torch.equal(broken[8:], found[8:])


def test_the_compiled_experts_refuse_narrow_choices_weights_of_another_type_and_too_many():
    tensors = {"x_TD": (4, 8), "gate_up_EGD": (3, 8, 8), "down_EDF": (3, 8, 4), "weights_TJ": (4, 2)}
    specs = {name: TensorSpec(dtype=torch.bfloat16, shape=shape) for name, shape in tensors.items()}
    specs |= {"chosen_TJ": TensorSpec(dtype=torch.int64, shape=(4, 2)), "kind": "silu"}
    supports = resolve(next(k for k in KERNELS if k.name == "cpu.experts").supports)
    assert supports(specs) is None
    half = replace(specs["weights_TJ"], dtype=torch.float16)
    assert supports(specs | {"weights_TJ": half}) == "experts are chosen in int64 with weights in float16"
    narrow = replace(specs["chosen_TJ"], dtype=torch.int32)
    assert supports(specs | {"chosen_TJ": narrow}) == "experts are chosen in int32 with weights in bfloat16"
    assert supports(specs | {"down_EDF": replace(specs["down_EDF"], shape=(1025, 8, 4))}).startswith("there are 1025")
