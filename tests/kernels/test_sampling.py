"""Sampling: the stated rule against a plain float64 oracle, the promised distribution, and rows that mind their own."""

import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tritium.errors import KernelError
from tritium.kernels.cpu import library
from tritium.kernels.eager.sampling import uniform
from tritium.kernels.logit_edits import LogitEdits
from tritium.kernels.sampling import Sampled, SamplerKernel, SamplingTable
from tritium.testing.isa_levels import LEVELS, compiled

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MARGIN = 2e-6  # of the whole weight: fp32 weights cannot decide a draw or a cut that is closer than this


@pytest.fixture(params=["compiled", "eager"])
def is_compiled(request: pytest.FixtureRequest) -> bool:
    if request.param == "compiled" and not library.available():
        pytest.skip(library.why_not())
    return bool(request.param == "compiled")


def table(num_rows: int, **fields: Any) -> SamplingTable:
    rows = SamplingTable(num_rows)
    rows.counter[:] = np.arange(num_rows)
    rows.seed[:] = 1234
    for name, value in fields.items():
        getattr(rows, name)[:] = value
    rows.num_top = max(0, int(rows.num_logprobs.max()))
    return rows


def sample(logits: torch.Tensor, rows: SamplingTable, *, is_compiled: bool = True) -> Sampled:
    return SamplerKernel(logits.shape[1], max(1, len(logits)), is_compiled=is_compiled).run(logits, rows)


def oracle(logits: torch.Tensor, rows: SamplingTable, row: int) -> tuple[int, float]:
    """The rule in float64 by a full sort: the token, and how far the nearest decision was from going the other way."""
    x = logits.double().numpy()
    weights = np.exp((x - x.max()) / float(rows.temperature[row]))
    order = np.lexsort((np.arange(len(x)), -x))
    margin = np.inf
    if rows.top_k[row]:
        order = order[: int(rows.top_k[row])]
    if rows.top_p[row] < 1:
        reached = np.cumsum(weights[order])
        target = float(rows.top_p[row]) * reached[-1]
        order = order[: int(np.searchsorted(reached, target)) + 1]
        margin = min(margin, float(np.abs(reached - target).min() / reached[-1]))
    kept = np.zeros(len(x), bool)
    kept[order] = True
    kept &= weights >= rows.min_p[row]
    ids = np.flatnonzero(kept)
    reached = np.cumsum(weights[ids])
    u = uniform(int(rows.seed[row]), int(rows.counter[row])) * reached[-1]
    place = int(np.searchsorted(reached, u, side="right"))
    return int(ids[place]), min(margin, float(np.abs(reached - u).min() / reached[-1]))


def assert_follows_the_rule(logits: torch.Tensor, rows: SamplingTable, *, is_compiled: bool) -> None:
    token_ids = sample(logits, rows, is_compiled=is_compiled).token_ids
    expected = [oracle(logits[row], rows, row) for row in range(len(logits))]
    decided = [row for row, (_, margin) in enumerate(expected) if margin > MARGIN]
    assert len(decided) >= 0.8 * len(logits), "the comparison has lost its meaning"
    assert [int(token_ids[row]) for row in decided] == [expected[row][0] for row in decided]


FILTERS: tuple[dict[str, Any], ...] = (
    {},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 1000},
    {"top_p": 0.3},
    {"top_p": 0.95},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"top_k": 40, "top_p": 0.8, "min_p": 0.02},
    {"top_p": 0.9, "min_p": 0.05},
    {"top_k": 2000, "top_p": 0.999},
)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_tokens_follow_the_rule_from_peaked_rows_to_flat_ones(
    filters: dict[str, Any], dtype: torch.dtype, is_compiled: bool
) -> None:
    torch.manual_seed(0)
    for vocab_size in (5, 130, 3001):
        logits = (torch.randn(40, vocab_size) * torch.logspace(-2, 1, 40)[:, None]).to(dtype)
        rows = table(40, temperature=torch.linspace(0.3, 2.0, 40).numpy(), **filters)
        assert_follows_the_rule(logits, rows, is_compiled=is_compiled)


@pytest.mark.parametrize("filters", [{}, {"top_k": 50}, {"top_k": 9000, "top_p": 0.9}, {"top_p": 0.9}], ids=str)
def test_tokens_follow_the_rule_in_the_largest_vocabularies(filters: dict[str, Any]) -> None:
    torch.manual_seed(1)
    for vocab_size in (32000, 128256, 262144):
        peaked = torch.randn(3, vocab_size) * 2
        peaked[:, ::2500] += torch.rand(3, peaked[:, ::2500].shape[1]) * 12 + 6
        logits = torch.cat([torch.randn(2, vocab_size) * 3, peaked, peaked.bfloat16().float()])
        assert_follows_the_rule(logits, table(8, temperature=0.8, **filters), is_compiled=True)


def _awkward_rows(vocab_size: int) -> Iterator[torch.Tensor]:
    yield torch.zeros(vocab_size)  # nothing but ties
    yield torch.arange(vocab_size) % 3 * 0.5  # three values
    yield -torch.logspace(-30, 30, vocab_size)  # no scale fits
    masked = torch.randn(vocab_size)
    masked[10:-10] = torch.finfo(torch.float32).min
    yield masked
    masked = torch.randn(vocab_size)
    masked[5:-5] = -torch.inf
    yield masked
    yield torch.full((vocab_size,), -torch.inf).index_fill(0, torch.tensor([vocab_size - 2]), 3.4e38)
    yield torch.linspace(-1, 1, vocab_size) * 3.4e38
    yield torch.where(torch.arange(vocab_size) % 2 == 0, 0.0, -0.0)  # equal, though their bits differ


@pytest.mark.parametrize("filters", [{}, {"top_k": 3}, {"top_k": 700}, {"top_p": 0.5}, {"top_p": 0.99}], ids=str)
def test_ties_masks_and_extremes_follow_the_rule(filters: dict[str, Any], is_compiled: bool) -> None:
    logits = torch.stack(list(_awkward_rows(12345)))
    assert_follows_the_rule(logits.repeat(3, 1), table(24, temperature=1.0, **filters), is_compiled=is_compiled)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_parameters_on_any_row_follow_the_rule(data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 1 << 16)))
    vocab_size, scale = data.draw(st.integers(1, 2000)), data.draw(st.sampled_from([0.01, 1.0, 8.0]))
    logits = (torch.randn(1, vocab_size) * scale).to(data.draw(st.sampled_from(DTYPES)))
    rows = table(
        1,
        temperature=data.draw(st.floats(0.01, 10)),
        top_k=data.draw(st.integers(0, 2 * vocab_size)),
        top_p=data.draw(st.floats(0.001, 1)),
        min_p=data.draw(st.floats(0, 1)),
        seed=data.draw(st.integers(0, (1 << 64) - 1)),
        counter=data.draw(st.integers(0, (1 << 64) - 1)),
    )
    token, margin = oracle(logits[0], rows, 0)
    for is_compiled in (True, False):
        assert sample(logits, rows, is_compiled=is_compiled).token_ids[0] == token or margin < MARGIN


@pytest.mark.parametrize("streams", ["counters of one seed", "seeds at one counter"])
@pytest.mark.parametrize("filters", [{}, {"top_k": 4}, {"top_p": 0.7}, {"min_p": 0.3}], ids=str)
def test_draws_have_the_promised_distribution(filters: dict[str, Any], streams: str, is_compiled: bool) -> None:
    num_draws, temperature = 20000 if is_compiled else 4000, 0.7
    logits = torch.tensor([1.0, -0.5, 2.0, 0.3, 2.0, -1.0, 0.0, 1.4])
    rows = table(num_draws, temperature=temperature, **filters)
    if streams == "seeds at one counter":
        rows.seed[:], rows.counter[:] = np.arange(num_draws), 5
    observed = np.bincount(
        sample(logits.expand(num_draws, -1), rows, is_compiled=is_compiled).token_ids, minlength=len(logits)
    )
    p = torch.softmax(logits.double() / temperature, 0)
    order = p.argsort(descending=True, stable=True)
    if "top_k" in filters:
        order = order[:4]
    if "top_p" in filters:
        order = order[: int((p[order].cumsum(0) < 0.7).sum()) + 1]
    if "min_p" in filters:
        order = order[p[order] >= 0.3 * p.max()]
    kept = sorted(order.tolist())
    assert len(kept) > 1 and set(np.flatnonzero(observed)) == set(kept)
    expected = (p[kept] / p[kept].sum()).numpy() * num_draws
    chi_square = float(((observed[kept] - expected) ** 2 / expected).sum())
    assert chi_square < {1: 10.83, 2: 13.82, 3: 16.27, 7: 24.32}[len(kept) - 1]  # p = 0.001


def test_uniform_numbers_are_those_of_philox_4x32_10() -> None:
    # Random123's known answer (kat_vectors) for a key and a counter of zero; the compiled one draws the same tokens.
    assert uniform(0, 0) == ((0x6627E8D5 << 32 | 0xE169C58D) >> 11) * 2.0**-53
    numbers = [uniform(seed, counter) for seed in range(100) for counter in range(100)]
    assert len(set(numbers)) == len(numbers) and all(0 <= u < 1 for u in numbers)
    assert abs(np.mean(numbers) - 0.5) < 0.01 and abs(np.var(numbers) - 1 / 12) < 0.003


def test_greedy_takes_the_lowest_id_among_equals(is_compiled: bool) -> None:
    logits = torch.full((4, 300), -5.0)
    logits[0, [7, 130, 299]] = 2.0
    logits[1, 299] = 2.0
    logits[2, :] = -0.0
    logits[2, 5] = 0.0
    logits[3, [128, 129]] = 9.0
    rows = table(4, temperature=0.0, top_k=5, top_p=0.1, min_p=0.9)
    assert sample(logits, rows, is_compiled=is_compiled).token_ids.tolist() == [7, 299, 0, 128]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_a_row_without_an_answer_is_flagged_and_its_neighbours_do_not_notice(
    dtype: torch.dtype, is_compiled: bool
) -> None:
    torch.manual_seed(0)
    logits = torch.randn(6, 1000).to(dtype)
    rows = table(6, temperature=[0, 1, 0, 1, 0, 1], top_p=0.9, num_logprobs=3)
    clean = sample(logits, rows, is_compiled=is_compiled)
    logits[1, 999], logits[2, 3], logits[3, :] = torch.nan, torch.inf, -torch.inf
    result = sample(logits, rows, is_compiled=is_compiled)
    for mine, before in zip(result, clean, strict=True):
        assert np.array_equal(mine[[0, 4, 5]], before[[0, 4, 5]])
    assert result.token_ids[1:4].tolist() == [-1, -1, -1] and np.isnan(result.logprobs[1:4]).all()
    assert (result.top_ids[1:4] == -1).all() and (result.top_logprobs[1:4] == -np.inf).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_logprobs_are_those_of_the_raw_logits_and_ties_are_listed_by_id(dtype: torch.dtype, is_compiled: bool) -> None:
    torch.manual_seed(0)
    for vocab_size in (3, 128, 5000):
        logits = (torch.randn(7, vocab_size) * 3).round(decimals=1).to(dtype)
        rows = table(7, temperature=[0, 0.5, 1, 2, 1, 1, 1], top_p=0.8, num_logprobs=[20, 5, 0, -1, 1, 20, 19])
        result = sample(logits, rows, is_compiled=is_compiled)
        exact = torch.log_softmax(logits.double(), -1)
        order = torch.from_numpy(np.lexsort((np.arange(vocab_size)[None].repeat(7, 0), -logits.double().numpy())))
        for row, wanted in enumerate(rows.num_logprobs.tolist()):
            chosen = result.logprobs[row]
            assert np.isnan(chosen) if wanted < 0 else abs(chosen - exact[row, result.token_ids[row]]) < 4e-6
            count = min(max(0, wanted), vocab_size)
            assert result.top_ids[row].tolist() == order[row, :count].tolist() + [-1] * (20 - count)
            assert np.allclose(result.top_logprobs[row, :count], exact[row, order[row, :count]], rtol=0, atol=4e-6)
            assert (result.top_logprobs[row, count:] == -np.inf).all()


def test_banned_tokens_are_not_chosen_and_change_no_logprob(is_compiled: bool) -> None:
    torch.manual_seed(0)
    logits = torch.randn(5, 400)
    logits[:, 17] = 9.0
    plain = table(5, temperature=[0, 0, 1, 1, 1], num_logprobs=2)
    before = [x.copy() for x in sample(logits, plain, is_compiled=is_compiled)]
    assert before[0][:2].tolist() == [17, 17]
    rows = table(5, temperature=[0, 0, 1, 1, 1], num_logprobs=2)
    banned = {0: [17, 17, -1, 400, 99999], 3: np.setdiff1d(np.arange(400), [5]), 4: np.arange(400)}
    for row, ids in banned.items():
        rows.edit(row, edits := LogitEdits())
        edits.ban(ids)
    result = sample(logits, rows, is_compiled=is_compiled)
    second = int(logits[0].argsort(descending=True)[1])
    exact = torch.log_softmax(logits.double(), -1)
    assert result.token_ids.tolist() == [second, 17, before[0][2], 5, -1]
    assert abs(result.logprobs[0] - exact[0, second]) < 4e-6 and abs(result.logprobs[3] - exact[3, 5]) < 4e-6
    assert np.array_equal(result.top_ids, before[2]) and np.array_equal(result.top_logprobs, before[3])
    for row in banned:
        rows.edit(row, None)
    assert sample(logits, rows, is_compiled=is_compiled).token_ids.tolist() == before[0].tolist()


def test_a_row_has_the_same_bits_alone_in_any_batch_and_for_every_number_of_threads(is_compiled: bool) -> None:
    torch.manual_seed(0)
    wide = torch.randn(24, 3000).to(torch.bfloat16)
    logits = wide[:, 100:2901]  # rows with a stride
    untouched = wide.clone()
    rows = table(24, temperature=np.linspace(0, 2, 24), num_logprobs=4)
    rows.top_p[::2], rows.top_k[::3], rows.min_p[::5] = 0.9, 30, 0.1
    kernel = SamplerKernel(2801, 24, is_compiled=is_compiled)
    whole = [x.copy() for x in kernel.run(logits, rows)]
    order = torch.randperm(24)
    shuffled = table(24, num_logprobs=4)
    for name in ("temperature", "top_k", "top_p", "min_p", "seed", "counter"):
        getattr(shuffled, name)[:] = getattr(rows, name)[order.numpy()]
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            for mine, expected in zip(kernel.run(logits[order], shuffled), whole, strict=True):
                assert np.array_equal(mine, expected[order.numpy()])
            for mine, expected in zip(kernel.run(logits[:3], rows), whole, strict=True):
                assert np.array_equal(mine, expected[:3])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(wide, untouched)


@pytest.mark.skipif(not library.available(), reason=library.why_not())
def test_an_older_instruction_set_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    avx2 = compiled(LEVELS["avx2"])
    rows = table(24, temperature=np.linspace(0, 2, 24), num_logprobs=4)
    rows.top_p[::2], rows.top_k[::3], rows.min_p[::5] = 0.9, 300, 0.1
    for dtype in DTYPES:
        logits = torch.randn(24, 20001).to(dtype)
        native = [x.copy() for x in sample(logits, rows)]
        with monkeypatch.context() as patch:
            patch.setattr(library, "_load", lambda: (avx2, ""))
            older = sample(logits, rows)
        assert all(np.array_equal(mine, other) for mine, other in zip(native, older, strict=True))


def test_it_refuses_logits_that_it_has_no_code_for_and_works_without_a_compiler(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kernel, rows = SamplerKernel(10, 4), table(4)
    for logits, message in (
        (torch.zeros(2, 11), "(2, 11)"),
        (torch.zeros(2, 20)[:, ::2], "strides (20, 2)"),
        (torch.zeros(2, 10, dtype=torch.float64), "float64"),
        (torch.zeros(5, 10), "5 rows"),
    ):
        with pytest.raises(KernelError, match=re.escape(message)):
            kernel.run(logits, rows)
    assert kernel.run(torch.zeros(0, 10), rows).token_ids.tolist() == []
    monkeypatch.setattr(library, "available", lambda: False)
    assert SamplerKernel(10, 4).run(torch.eye(10)[3:5], rows).token_ids.tolist() == [3, 4]
