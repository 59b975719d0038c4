"""SamplingParams: every number is bounded when it is made."""

import dataclasses

import numpy as np
import pytest

from tritium.errors import RequestError
from tritium.sampling_params import SamplingParams


@pytest.mark.parametrize(
    "name", ["temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"]
)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -3.0, 1e300, 10**400, "1", True, None])
def test_what_is_no_number_in_range_is_a_request_error_that_names_it(name, value):
    with pytest.raises(RequestError, match=name):
        SamplingParams(**{name: value})


@pytest.mark.parametrize("name", ["max_tokens", "top_k", "seed", "logprobs", "min_tokens", "truncate_prompt_tokens"])
@pytest.mark.parametrize("value", [-1, 10**400, 1.5, "1", True])
def test_counts_are_bounded_integers(name, value):
    with pytest.raises(RequestError, match=name):
        SamplingParams(**{name: value})


def test_an_unknown_name_is_refused_with_the_nearest_known_one():
    with pytest.raises(RequestError, match="unknown option 'temprature'; did you mean 'temperature'"):
        SamplingParams(temprature=1)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"repetition_penalty": 0}, "repetition_penalty must be a finite number from 0.01 to 100.0, not 0"),
        ({"presence_penalty": 2.5}, "presence_penalty .* from -2.0 to 2.0, not 2.5"),
        ({"logit_bias": {-1: 1}}, "a token id of logit_bias must be .* not -1"),
        ({"logit_bias": {"x": 1}}, "a token id of logit_bias must be .* not 'x'"),
        ({"logit_bias": {5: float("nan")}}, "logit_bias of token 5 .* not nan"),
        ({"logit_bias": {5: 101}}, "logit_bias of token 5 .* to 100.0, not 101"),
        ({"logit_bias": [1]}, r"logit_bias must map token ids to numbers, not \[1\]"),
        ({"logit_bias": dict.fromkeys(range(5000), 1.0)}, "at most 4096 entries, not 5000"),
        ({"allowed_token_ids": []}, "allowed_token_ids is empty"),
        ({"allowed_token_ids": [1, -5]}, "allowed_token_ids must be an integer .* not -5"),
        ({"allowed_token_ids": [1, None]}, r"allowed_token_ids must be one int or a list of them, not \[1, None\]"),
        ({"stop_token_ids": ["a"]}, r"stop_token_ids must be one int or a list of them, not \['a'\]"),
        ({"bad_words": [""]}, "bad_words needs 1 to 1024 characters, not 0"),
        ({"bad_words": ["x"] * 257}, "bad_words may hold at most 256 entries, not 257"),
        ({"stop": ["x"] * 10_000}, "stop may hold at most 64 entries, not 10000"),
        ({"stop": "x", "detokenize": False}, "'x'.* needs text, but detokenize is False"),
        ({"detokenize": 1}, "detokenize must be true or false, not 1"),
        ({"logits_processors": [5]}, r"logits_processors must be callables .* not \[5\]"),
        ({"logits_processors": [len] * 17}, "at most 16, not 17"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_what_is_out_of_bounds_is_named_with_its_value_and_what_is_allowed(fields, words):
    with pytest.raises(RequestError, match=words):
        SamplingParams(**fields)


def test_biases_may_be_spelled_as_json_spells_them_and_are_a_copy():
    given = {"5": 1, 7: -2.5}
    params = SamplingParams(logit_bias=given)
    given.clear()
    assert params.logit_bias == {5: 1.0, 7: -2.5}
    assert dataclasses.replace(params, seed=1).logit_bias == params.logit_bias
    assert hash(params) == hash(dataclasses.replace(params))
    assert SamplingParams(logit_bias=None, bad_words=None, logits_processors=None) == SamplingParams()


def test_one_of_a_list_may_stand_alone():
    params = SamplingParams(bad_words="x", allowed_token_ids=3, logits_processors=len)
    assert (params.bad_words, params.allowed_token_ids, params.logits_processors) == (("x",), (3,), (len,))


def test_numpy_scalars_become_plain_numbers_which_can_be_sent_to_other_processes():
    given = np.float64(0.5)
    params = SamplingParams(temperature=given, top_p=given, min_p=given, frequency_penalty=given, logit_bias={3: given})
    plain = SamplingParams(temperature=0.5, top_p=0.5, min_p=0.5, frequency_penalty=0.5, logit_bias={3: 0.5})
    assert params == plain
    for name in ("temperature", "top_p", "min_p", "frequency_penalty"):
        assert type(getattr(params, name)) is float
    assert [type(text) for text in SamplingParams(stop=[np.str_("a")]).stop] == [str]
