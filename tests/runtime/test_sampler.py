"""The sampler between requests and the kernel: parameters follow their request through slots and rows."""

import re

import numpy as np
import pytest
import torch
import transformers

from tritium.runtime.batch import BatchLayout
from tritium.runtime.logit_rules import LogitRules
from tritium.runtime.request import Request, RowError, SampledToken
from tritium.runtime.sampler import Sampler
from tritium.sampling_params import SamplingParams

VOCAB_SIZE = 50


def layout(slots, positions):
    count = len(slots)
    return BatchLayout(count, count, count, np.array(slots), np.array(positions))


def request(name="r", prompt=(1, 2, 3), eos=(), **params):
    return Request(name, prompt, SamplingParams(**params), eos_token_ids=eos)


def rows(count, seed=0):
    return torch.randn(count, VOCAB_SIZE, generator=torch.Generator().manual_seed(seed)) * 3


def test_each_row_is_sampled_by_its_own_requests_parameters():
    sampler, logits = Sampler(VOCAB_SIZE, 8), rows(3)
    sampler.admit(5, request(temperature=0))
    sampler.admit(2, request(temperature=2.0, seed=1))
    sampler.admit(7, request(temperature=5.0, top_k=1))
    tokens = sampler.sample(logits, layout([5, 2, 7], [3, 3, 3]))
    assert [tokens[i].token_id == int(logits[i].argmax()) for i in (0, 2)] == [True, True]
    alone = Sampler(VOCAB_SIZE, 8)
    alone.admit(0, request(temperature=2.0, seed=1))
    assert alone.sample(logits[1:2], layout([0], [3]))[0].token_id == tokens[1].token_id


def test_a_draw_depends_on_seed_and_position_alone():
    sampler = Sampler(VOCAB_SIZE, 4)
    sampler.admit(0, request(temperature=3.0, seed=9))
    sampler.admit(1, request(temperature=3.0, seed=9))
    same = rows(1).expand(2, VOCAB_SIZE)
    a, b = sampler.sample(same, layout([0, 1], [10, 10]))
    assert a.token_id == b.token_id
    drawn = {sampler.sample(same, layout([0, 1], [10, n]))[1].token_id for n in range(30)}
    assert len(drawn) > 5


def test_a_slot_that_changes_hands_takes_the_new_requests_parameters():
    sampler, logits = Sampler(VOCAB_SIZE, 4), rows(1)
    sampler.admit(0, request(temperature=0, logprobs=3))
    assert len(sampler.sample(logits, layout([0], [3]))[0].top_logprobs) == 3
    sampler.admit(0, request(temperature=0))
    assert sampler.sample(logits, layout([0], [3]))[0].top_logprobs == ()


def test_rows_get_as_many_logprobs_as_they_asked_for():
    sampler, logits = Sampler(VOCAB_SIZE, 4), rows(4)
    for slot, count in enumerate((None, 0, 2, 5)):
        sampler.admit(slot, request(temperature=0, logprobs=count))
    tokens = sampler.sample(logits, layout([0, 1, 2, 3], [3] * 4))
    assert [len(token.top_logprobs) for token in tokens] == [0, 0, 2, 5]
    expected = torch.log_softmax(logits, -1)
    for row in (1, 2, 3):
        assert tokens[row].logprob == pytest.approx(float(expected[row].max()), abs=1e-5)
    ids, values = zip(*tokens[3].top_logprobs, strict=True)
    assert list(ids) == expected[3].topk(5).indices.tolist()
    assert list(values) == pytest.approx(expected[3].topk(5).values.tolist(), abs=1e-5)


def test_more_logprobs_than_tokens_are_all_tokens():
    sampler = Sampler(4, 1)
    sampler.admit(0, request(temperature=0, logprobs=20))
    [token] = sampler.sample(torch.tensor([[1.0, 3.0, 2.0, 0.0]]), layout([0], [3]))
    assert [i for i, _ in token.top_logprobs] == [1, 2, 0, 3]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_row_that_is_not_finite_gives_no_token_and_its_neighbours_theirs(bad):
    sampler, logits = Sampler(VOCAB_SIZE, 4), rows(3)
    logits[1, 7] = bad
    for slot in range(3):
        sampler.admit(slot, request(temperature=0))
    tokens = sampler.sample(logits, layout([0, 1, 2], [3] * 3))
    assert tokens[1] == RowError("the model's logits were not finite numbers")
    assert [tokens[i].token_id for i in (0, 2)] == logits[[0, 2]].argmax(-1).tolist()


def run(logits, r, sampler=None):
    """The next token of a request whose slot is 0; it takes it as the scheduler would."""
    if sampler is None:
        sampler = Sampler(logits.shape[1], 1)
        sampler.admit(0, r)
    [token] = sampler.sample(logits, layout([0], [r.num_tokens]))
    if isinstance(token, SampledToken):
        r.append_output(token)
    return token


def test_stop_ids_cannot_be_among_the_first_min_tokens_as_in_transformers():
    logits = rows(1)
    first, second, third = logits[0].topk(3).indices.tolist()
    r = request(temperature=0, min_tokens=3, stop_token_ids=(second,), eos=(first,))
    sampler = Sampler(VOCAB_SIZE, 1)
    sampler.admit(0, r)
    assert [run(logits, r, sampler).token_id for _ in range(5)] == [third, third, third, first, first]
    oracle = transformers.MinNewTokensLengthLogitsProcessor(3, 3, [first, second], device="cpu")
    for count in range(5):
        ids = torch.tensor([[1, 2, 3] + [third] * count])
        assert int(oracle(ids, logits.clone()).argmax()) == (third if count < 3 else first)
    free = request(temperature=0, min_tokens=3, ignore_eos=True, eos=(first,))
    assert run(logits, free).token_id == first


def history(seed, count):
    return torch.randint(0, VOCAB_SIZE, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def test_penalties_are_those_of_transformers_and_of_the_published_formula():
    for seed in range(20):
        logits, prompt, outputs = rows(1, seed), history(seed, 12), history(seed + 99, 15)
        penalties = {"repetition_penalty": 1.7, "frequency_penalty": 0.6, "presence_penalty": -0.4}
        r = request("r", prompt, temperature=0, **penalties)
        for token_id in outputs:
            r.append_output(SampledToken(token_id))
        expected = transformers.RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([prompt + outputs]), logits)
        counts = torch.bincount(torch.tensor(outputs), minlength=VOCAB_SIZE)
        expected = expected - 0.6 * counts + 0.4 * (counts > 0)
        sampler = Sampler(VOCAB_SIZE, 1)
        sampler.admit(0, r)
        order = []
        for _ in range(10):  # greedy, banning what was taken: the whole order of the logits shows
            order.append(sampler.sample(logits, layout([0], [r.num_tokens]))[0].token_id)
            logits[0, order[-1]] = -1e30
        assert order == expected[0].topk(10).indices.tolist()


def test_a_penalty_grows_with_every_output_and_survives_a_change_of_slot():
    logits = torch.zeros(1, VOCAB_SIZE)
    logits[0, 7], logits[0, 9], logits[0, 4] = 3.0, 2.5, 2.1
    r = request(temperature=0, frequency_penalty=1.0)
    sampler = Sampler(VOCAB_SIZE, 4)
    sampler.admit(0, r)
    chosen = [run(logits, r, sampler).token_id for _ in range(3)]
    sampler.admit(3, r)  # preempted, and back in another slot
    for _ in range(3):
        [token] = sampler.sample(logits, layout([3], [r.num_tokens]))
        r.append_output(token)
        chosen.append(token.token_id)
    assert chosen == [7, 9, 4, 7, 9, 4]


def test_prompt_tokens_count_for_repetition_only():
    logits = torch.zeros(1, VOCAB_SIZE)
    logits[0, 2], logits[0, 9] = 3.0, 2.5
    assert run(logits, request(temperature=0, presence_penalty=2.0, frequency_penalty=2.0)).token_id == 2
    assert run(logits, request(temperature=0, repetition_penalty=1.5)).token_id == 9


def test_bias_allowed_ids_and_bans_meet_in_one_row():
    logits = rows(1)
    order = logits[0].argsort(descending=True).tolist()
    assert run(logits, request(temperature=0, logit_bias={order[30]: 100.0})).token_id == order[30]
    assert run(logits, request(temperature=0, allowed_token_ids=order[20:40])).token_id == order[20]
    lifted = {"logit_bias": {order[3]: 100, order[25]: 50}, "allowed_token_ids": order[20:]}
    assert run(logits, request(temperature=0, **lifted)).token_id == order[25]
    bad = Request("r", [1], SamplingParams(temperature=0, **lifted), bad_word_ids=((order[25],),))
    assert run(logits, bad).token_id == order[20]
    nothing = Request("r", [1], SamplingParams(allowed_token_ids=[5, 6]), bad_word_ids=((5,), (6,)))
    error = run(logits, nothing)
    assert isinstance(error, RowError) and "allowed_token_ids, bad_words" in error.message


def test_bad_words_are_those_of_transformers():
    for seed in range(30):
        sequences = [history(seed * 7 + i, 1 + i % 4) for i in range(12)]
        sequences = [[t % 6 for t in sequence] for sequence in sequences]  # few tokens: prefixes do come about
        prompt = [t % 6 for t in history(seed + 1000, 8)]
        logits = rows(1, seed)[:, :8]
        expected = transformers.NoBadWordsLogitsProcessor(sequences)(torch.tensor([prompt]), logits)
        rules = LogitRules(Request("r", prompt, SamplingParams(), bad_word_ids=tuple(map(tuple, sequences))))
        assert rules.prepare(logits, 0) is None
        assert set(rules.edits.banned_ids.tolist()) == set(expected[0].isneginf().nonzero().flatten().tolist())


def test_custom_processors_run_in_order_on_a_copy_and_logprobs_stay_the_models():
    logits, seen = rows(1), []
    before = logits.clone()

    def keep_even(prompt, outputs, row):
        seen.append((list(prompt), list(outputs), row.dtype, row.shape))
        row[1::2] = -np.inf

    def lower_the_best(prompt, outputs, row):
        return np.where(row == row.max(), row - 100, row)

    r = request(temperature=0, logits_processors=[keep_even, lower_the_best], logprobs=0)
    even = logits[0, ::2].argsort(descending=True)[1].item() * 2
    token = run(logits, r)
    assert token.token_id == even
    assert token.logprob == pytest.approx(float(torch.log_softmax(logits, -1)[0, even]), abs=1e-5)
    assert seen == [([1, 2, 3], [], np.float32, (VOCAB_SIZE,))] and torch.equal(logits, before)


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        (np.zeros(3), r"Broken returned an array of shape \(3,\), not \(50,\)"),
        (np.full(VOCAB_SIZE, np.nan), "Broken returned logits that are NaN"),
        (np.full(VOCAB_SIZE, np.inf), "Broken returned logits that are NaN or .inf"),
        (np.full(VOCAB_SIZE, -np.inf), "logits_processors ban them all"),
        (ValueError("no luck"), "Broken raised ValueError: no luck"),
        (SystemExit(3), "Broken raised SystemExit: 3"),
        ("text", "Broken raised ValueError"),
    ],
    ids=str,
)
def test_a_custom_processor_that_fails_ends_its_row_alone_and_is_named(returned, words):
    class Broken:
        def __call__(self, prompt, outputs, row):
            if isinstance(returned, BaseException):
                raise returned
            return returned

    sampler, logits = Sampler(VOCAB_SIZE, 2), rows(2)
    sampler.admit(0, request(temperature=0, logits_processors=Broken()))
    sampler.admit(1, request(temperature=0))
    error, neighbour = sampler.sample(logits, layout([0, 1], [3, 3]))
    assert isinstance(error, RowError) and re.search(words, error.message)
    assert neighbour.token_id == int(logits[1].argmax())
