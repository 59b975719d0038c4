"""Sampling on a GPU: greedy is argmax, draws follow the softmax within top_k, top_p and min_p, and depend on no other
row."""

import pytest
import torch

pytestmark = pytest.mark.gpu


def sample(logits: torch.Tensor, device: torch.device, **given: object) -> torch.Tensor:
    from tritium.kernels.gpu.sampling import Sampling

    num_rows = len(logits)
    values = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 7, "position": torch.arange(num_rows)}
    values |= {"slot": torch.arange(num_rows).flip(0), **given}
    dtypes = {"temperature": torch.float32, "top_k": torch.int32, "top_p": torch.float32, "min_p": torch.float32}
    parameters = {
        name: torch.as_tensor(value).to(dtypes.get(name, torch.int64)).expand(num_rows).contiguous().to(device)
        for name, value in values.items()
    }
    tokens = torch.full((num_rows,), -7, device=device)
    last = torch.full((num_rows,), -7, device=device)
    sampling = Sampling(logits.shape[1], num_rows, parameters)
    sampling.run(logits.to(device), tokens, last, has_limits=bool({"top_k", "top_p", "min_p"} & set(given)))
    assert torch.equal(last[parameters["slot"]], tokens.clamp(min=0))
    return tokens.cpu()


def test_greedy_takes_the_largest_and_of_equals_the_first(device: torch.device) -> None:
    logits = torch.randn(5, 20_000)
    logits[1, [50, 9000, 19_999]] = 100.0
    logits[2, 13], logits[3, 7], logits[4] = float("nan"), float("inf"), float("-inf")
    tokens = sample(logits, device, temperature=0.0)
    assert tokens.tolist() == [int(logits[0].argmax()), 50, -1, -1, -1]


def test_draws_follow_the_softmax(device: torch.device) -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, float("-inf")]).expand(400, 5).contiguous()
    counts = torch.bincount(sample(logits, device, temperature=0.8), minlength=5)
    expected = 400 * (logits[0] / 0.8).softmax(0)
    assert counts[4] == 0
    chi_square = ((counts[:4] - expected[:4]).square() / expected[:4]).sum()
    assert chi_square < 16.3  # 3 degrees of freedom: exceeded once in a thousand seeds


@pytest.mark.parametrize(
    ("limit", "kept"), [({"top_k": 2}, 2), ({"top_p": 0.7}, 2), ({"top_p": 0.6}, 1), ({"min_p": 0.2}, 2)], ids=str
)
def test_limits_keep_what_they_say(limit: dict[str, float], kept: int, device: torch.device) -> None:
    logits = torch.tensor([2.0, 0.0, -1.0, 3.0, 1.0]).expand(60, 5).contiguous()  # shares .09 .03 .01 .64 .23... of 3
    seen = set(sample(logits, device, **limit).tolist())
    assert seen == set(logits[0].topk(kept).indices.tolist())


def test_a_draw_depends_on_its_own_row_seed_and_position_only(device: torch.device) -> None:
    logits = torch.randn(6, 3000)
    both = {"seed": torch.tensor([1, 2, 3, 4, 5, 6]), "position": torch.tensor([5, 5, 5, 9, 9, 9])}
    tokens = sample(logits, device, **both)
    alone = [sample(logits[i : i + 1], device, **{n: v[i : i + 1] for n, v in both.items()}) for i in range(6)]
    assert torch.equal(tokens, torch.cat(alone))
    assert not torch.equal(tokens, sample(logits, device, **{**both, "seed": both["seed"] + 10}))


def test_pending_ids_become_their_slots_last_tokens(device: torch.device) -> None:
    from tritium.kernels.gpu.sampling import resolve_ids

    ids = torch.tensor([5, -1, -3, 0, -2], device=device)
    resolve_ids(ids, torch.tensor([10, 11, 12], device=device))
    assert ids.tolist() == [5, 10, 12, 0, 11]
