"""Mixtures of experts on a GPU, beside what test_kernels asks of every kernel: crowds, rows without numbers, chunks."""

from typing import Any

import pytest
import torch

from tritium import ops
from tritium.kernels.kernel import TensorSpec, resolve
from tritium.kernels.select import valid_kernels

pytestmark = pytest.mark.gpu


def problem(num_tokens: int, num_experts: int, top_k: int, device: torch.device) -> dict[str, Any]:
    draw = lambda *sizes: torch.randn(*sizes).to(torch.float16)  # noqa: E731
    args = {
        "x_TD": draw(num_tokens, 48),
        "router_TE": draw(num_tokens, num_experts),
        "gate_up_EGD": draw(num_experts, 72, 48) / 7,
        "down_EDF": draw(num_experts, 48, 36) / 6,
    }
    return {n: a.to(device) for n, a in args.items()} | {"top_k": top_k, "is_normed": True, "kind": "silu"}


def compute(op: str, args: dict[str, Any]) -> torch.Tensor:
    specs = {n: TensorSpec(dtype=a.dtype, shape=tuple(a.shape)) if torch.is_tensor(a) else a for n, a in args.items()}
    (kernel,) = valid_kernels(op, specs, available={"gpu"})
    out = torch.full_like(args["x_TD"], 77.0)
    resolve(kernel.target)(args, [out])()
    return out


def test_a_row_has_the_same_bits_alone_and_where_all_others_choose_its_experts(device: torch.device) -> None:
    args = problem(200, 6, 2, device)
    args["router_TE"][:, 3] += 20
    whole = compute("moe", args)
    assert (whole.float() - ops.moe(**args).float()).norm() <= 2e-3 * whole.float().norm()
    for start, stop in ((0, 1), (70, 71), (130, 200)):
        part = {name: args[name][start:stop] for name in ("x_TD", "router_TE")}
        assert torch.equal(compute("moe", args | part), whole[start:stop])


def test_of_equal_logits_the_experts_with_lower_numbers_are_chosen(device: torch.device) -> None:
    args = problem(9, 8, 3, device)
    args["router_TE"].zero_()
    torch.testing.assert_close(compute("moe", args), ops.moe(**args), rtol=4e-3, atol=4e-3)


def test_a_row_without_numbers_is_nan_and_its_neighbours_are_as_they_were(device: torch.device) -> None:
    args = problem(20, 5, 2, device)
    before = compute("moe", args)
    args["router_TE"][7, 2] = float("nan")
    after = compute("moe", args)
    assert after[7].isnan().all() and torch.equal(after[:7], before[:7]) and torch.equal(after[8:], before[8:])


def test_given_choices_and_weights_are_taken_and_an_unknown_expert_is_nan(device: torch.device) -> None:
    args = problem(70, 5, 2, device)
    chosen = torch.stack([torch.randperm(5)[:2] for _ in range(70)]).to(device)
    given = {name: args[name] for name in ("x_TD", "gate_up_EGD", "down_EDF", "kind")}
    given |= {"chosen_TJ": chosen, "weights_TJ": torch.rand(70, 2, device=device)}
    expected = ops.experts(**given)
    assert (compute("experts", given).float() - expected.float()).norm() <= 2e-3 * expected.float().norm()
    chosen[4, 1] = 9
    assert compute("experts", given)[4].isnan().all()
