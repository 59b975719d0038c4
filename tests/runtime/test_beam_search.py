"""The bookkeeping of beam search against trying every sequence, on a model that is a table."""

import itertools
import math
import random

import pytest

from tritium.errors import EngineError, RequestError
from tritium.runtime.beam_search import BeamSearch, run_searches
from tritium.runtime.outputs import StepOutput
from tritium.runtime.request import SampledToken
from tritium.sampling_params import BeamSearchParams

VOCAB = range(4)
EOS = 3


def logprobs(token_ids):
    """A model: what follows these tokens."""
    draw = random.Random(repr(list(token_ids)))
    weights = [draw.random() ** 3 + 1e-3 for _ in VOCAB]
    return sorted(((i, math.log(w / sum(weights))) for i, w in enumerate(weights)), key=lambda item: -item[1])


def search(prompt, max_tokens, **params):
    found = BeamSearch(BeamSearchParams(max_tokens=max_tokens, **params), [EOS], max_tokens)
    while not found.is_done:
        found.advance([logprobs([*prompt, *beam.token_ids])[: found.num_continuations] for beam in found.beams])
    return found.sequences


def every_sequence(prompt, max_tokens):
    """All that may come out, with their cumulative logprobs."""
    for length in range(1, max_tokens + 1):
        for tokens in itertools.product(VOCAB, repeat=length):
            is_end = tokens[-1] == EOS or length == max_tokens
            if EOS not in tokens[:-1] and is_end:
                steps = [dict(logprobs([*prompt, *tokens[:i]]))[token] for i, token in enumerate(tokens)]
                yield list(tokens), sum(steps)


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, -0.5, 2.0])
@pytest.mark.parametrize("seed", range(5))
def test_a_beam_as_wide_as_the_tree_finds_the_best_of_all_sequences(seed, length_penalty):
    params = {"beam_width": 64, "length_penalty": length_penalty, "early_stopping": "never"}
    found = search([seed], 4, **params)
    expected = sorted(every_sequence([seed], 4), key=lambda item: -item[1] / len(item[0]) ** length_penalty)
    if length_penalty <= 0:  # a longer one is never better: "never" stops when no beam can win, and has all that matter
        expected = expected[:1]
    for mine, (token_ids, total) in zip(found, expected[:10], strict=False):
        assert mine.token_ids == token_ids
        assert mine.cumulative_logprob == pytest.approx(total)
        assert mine.score == pytest.approx(total / len(token_ids) ** length_penalty)


def test_a_narrow_beam_gives_as_many_sequences_best_first_and_a_width_of_one_is_greedy():
    for seed in range(20):
        sequences = search([seed], 6, beam_width=3)
        scores = [sequence.score for sequence in sequences]
        assert len(sequences) == 3 and scores == sorted(scores, reverse=True)
        tokens = []
        while len(tokens) < 6 and (not tokens or tokens[-1] != EOS):
            tokens.append(logprobs([seed, *tokens])[0][0])
        greedy = search([seed], 6, beam_width=1, early_stopping=True)
        assert tokens[-1] != EOS or greedy[0].token_ids[-1] == EOS or len(greedy[0].token_ids) == 6


def test_eos_is_an_ordinary_token_when_it_is_ignored():
    for sequence in search([1], 5, beam_width=4, ignore_eos=True):
        assert len(sequence.token_ids) == 5


class TableDoor:
    """An engine that answers from the table, the last request first."""

    def __init__(self, fails=None):
        self.waiting, self.aborted, self._fails = [], [], fails

    def submit(self, request, listener):
        self.waiting.append(request)
        if self._fails is not None and len(request.prompt_token_ids) == 4:
            listener(self._fails(request.request_id))
            return
        tops = tuple(logprobs(request.prompt_token_ids)[: request.params.logprobs])
        token = SampledToken(tops[0][0], tops[0][1], tops)
        listener(StepOutput(request.request_id, "", (token.token_id,), (token,), "length"))

    def abort(self, request_id):
        self.aborted.append(request_id)


def test_searches_run_together_and_each_gives_what_it_gives_alone():
    params = BeamSearchParams(beam_width=3, max_tokens=5)
    searches = {f"s{i}": ([i], BeamSearch(params, [EOS], 5)) for i in range(4)}
    run_searches(searches, TableDoor())
    for i in range(4):
        assert searches[f"s{i}"][1].sequences == search([i], 5, beam_width=3)


@pytest.mark.parametrize(
    ("fails", "error", "words"),
    [
        (lambda name: StepOutput(name, "", (), finish_reason="error", error="boom"), EngineError, "error.: boom"),
        (lambda name: StepOutput(name, "", (), finish_reason="abort"), EngineError, "it was aborted"),
        (
            lambda name: StepOutput(name, "", (), finish_reason="error", refusal=RequestError("too long")),
            RequestError,
            "too long",
        ),
    ],
)
def test_a_step_that_fails_ends_the_search_and_aborts_what_still_runs(fails, error, words):
    door = TableDoor(fails)
    params = BeamSearchParams(beam_width=2, max_tokens=9, ignore_eos=True)
    with pytest.raises(error, match=words):
        run_searches({"s": ([1], BeamSearch(params, [], 9))}, door)
    assert door.aborted == ["s/1"]
