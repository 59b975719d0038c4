"""Edits of a row: compiled and torch code against the formulas of docs/sampling.md, written out one token at a time."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tritium.kernels.eager.sampling import edited
from tritium.kernels.logit_edits import LogitEdits
from tritium.kernels.sampling import SamplerKernel, SamplingTable

LARGEST = float(np.finfo(np.float32).max)


def plainly(x: list[float], edits: LogitEdits) -> list[float]:
    """The definition, token by token."""
    x = x if edits.processed is None else edits.processed.tolist()
    counts = dict(zip(edits.seen_ids[: edits.num_seen].tolist(), edits.seen_counts.tolist(), strict=False))
    biases = dict(zip(edits.bias_ids.tolist(), edits.bias_values.tolist(), strict=True))
    allowed = None if edits.allowed_ids is None else set(edits.allowed_ids.tolist())
    banned = set(edits.banned_ids.tolist())
    result = []
    for token_id, logit in enumerate(x):
        if token_id in biases:
            logit = single(logit + biases[token_id])
        if token_id in counts:
            rate = float(edits.repetition)
            logit = logit / rate if logit > 0 else logit * rate
            count = counts[token_id]
            logit = single(logit - (float(edits.frequency) * count + float(edits.presence)) if count else logit)
        if (allowed is not None and token_id not in allowed) or token_id in banned:
            logit = -math.inf
        result.append(logit)
    return result


def single(x: float) -> float:
    return float(np.float32(x if math.isinf(x) else min(max(x, -LARGEST), LARGEST)))


def random_edits(generator: np.random.Generator, vocab_size: int, row_V: np.ndarray) -> LogitEdits:
    def some(count: int) -> list[int]:
        return generator.integers(0, vocab_size, count).tolist()

    def maybe() -> bool:
        return bool(generator.random() < 0.5)

    bias = {token_id: float(generator.normal() * 20) for token_id in some(9)}
    edits = LogitEdits(
        repetition=float(generator.choice([0.01, 0.7, 1.0, 1.3, 100.0])),
        frequency=float(generator.choice([-2.0, 0.0, 0.3])),
        presence=float(generator.choice([-0.7, 0.0, 2.0])),
        bias=bias if maybe() else None,
        allowed_ids=some(vocab_size) if maybe() else None,
    )
    if maybe():
        edits.see_prompt(some(40))
    for token_id in some(int(generator.integers(0, 150))):
        edits.count(token_id)
    if maybe():
        edits.ban(some(vocab_size // 4))
    if maybe():
        edits.process((row_V[::-1] * 0.5).astype(np.float32))
    return edits


@settings(max_examples=120, deadline=None)
@given(seed=st.integers(0, 1 << 30), vocab_size=st.sampled_from([1, 7, 128, 129, 1000]))
def test_any_edits_give_the_rows_that_the_formulas_say_and_the_same_tokens_in_both(seed: int, vocab_size: int) -> None:
    generator = np.random.default_rng(seed)
    rows = SamplingTable(4)
    rows.temperature[:] = [0, 0, 0.8, 1.0]
    rows.top_p[3], rows.seed[:], rows.counter[:] = 0.9, seed, np.arange(4)
    logits = torch.from_numpy(generator.normal(size=(4, vocab_size)) * 4).float()
    logits[1, 0] = -torch.inf if vocab_size > 1 else 3.0e38
    expected = []
    for row in range(4):
        edits = random_edits(generator, vocab_size, logits[row].numpy())
        rows.edit(row, edits)
        expected.append(plainly(logits[row].tolist(), edits))
        assert edited(logits[row].clone(), edits).tolist() == expected[row]
    tokens = [
        SamplerKernel(vocab_size, 4, is_compiled=is_compiled).run(logits, rows).token_ids.tolist()
        for is_compiled in (True, False)
    ]
    assert tokens[0][:2] == tokens[1][:2]
    for row in range(4):
        for found in tokens:
            if max(expected[row]) == -math.inf:
                assert found[row] == -1
            elif row < 2:
                assert found[row] == int(np.argmax(expected[row]))
            else:
                assert expected[row][found[row]] > -math.inf


@pytest.mark.parametrize("is_compiled", [True, False])
def test_a_row_with_edits_is_sampled_as_the_edited_row_and_its_neighbours_as_ever(is_compiled: bool) -> None:
    torch.manual_seed(0)
    logits = torch.randn(8, 5000) * 2
    plain, rows = SamplingTable(8), SamplingTable(8)
    generator = np.random.default_rng(3)
    changed = logits.clone()
    for table in (plain, rows):
        table.temperature[:], table.top_p[::2], table.top_k[::3] = 0.9, 0.8, 50
        table.seed[:], table.counter[:] = 5, np.arange(8)
    for row in (0, 1, 3, 6):
        rows.edit(row, random_edits(generator, 5000, logits[row].numpy()))
        changed[row] = edited(logits[row].clone(), rows.edits[row])
    kernel = SamplerKernel(5000, 8, is_compiled=is_compiled)
    expected = kernel.run(changed, plain).token_ids.tolist()
    assert kernel.run(logits, rows).token_ids.tolist() == expected
    rows.edit(0, None)
    rows.edit(3, None)
    assert kernel.run(logits, rows).token_ids[[1, 2, 4, 5, 6, 7]].tolist() == [expected[i] for i in (1, 2, 4, 5, 6, 7)]


@pytest.mark.parametrize("is_compiled", [True, False])
def test_a_forced_token_is_taken_with_its_logprob_whatever_else_is_asked(is_compiled: bool) -> None:
    torch.manual_seed(0)
    logits = torch.randn(3, 300)
    rows = SamplingTable(3)
    rows.forced[:] = [7, 299, -1]
    rows.num_logprobs[:], rows.num_top = 2, 2
    edits = LogitEdits()
    edits.ban([7])
    rows.edit(0, edits)
    sampled = SamplerKernel(300, 3, is_compiled=is_compiled).run(logits, rows)
    assert sampled.token_ids.tolist() == [7, 299, int(logits[2].argmax())]
    exact = torch.log_softmax(logits.double(), -1)
    assert np.allclose(sampled.logprobs, exact[range(3), sampled.token_ids.tolist()], rtol=0, atol=4e-6)
    assert sampled.top_ids.tolist() == exact.topk(2).indices.tolist()
