"""The sampler between requests and the kernel: parameters follow their request through slots and rows."""

import numpy as np
import pytest
import torch

from tritium.runtime.batch import BatchLayout
from tritium.runtime.request import Request
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
    assert tokens[1] is None
    assert [tokens[i].token_id for i in (0, 2)] == logits[[0, 2]].argmax(-1).tolist()


def test_stop_ids_cannot_be_chosen_before_min_tokens():
    sampler, logits = Sampler(VOCAB_SIZE, 4), rows(1)
    first, second, third = logits[0].topk(3).indices.tolist()
    sampler.admit(0, request(temperature=0, min_tokens=3, stop_token_ids=(second,), eos=(first,)))
    chosen = [sampler.sample(logits, layout([0], [3 + n]))[0].token_id for n in range(4)]
    assert chosen == [third, third, first, first]  # the third output is the first that may end it
    sampler.admit(0, request(temperature=0, min_tokens=3, ignore_eos=True, eos=(first,)))
    assert sampler.sample(logits, layout([0], [3]))[0].token_id == first
