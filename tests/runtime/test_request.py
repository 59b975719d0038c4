"""What a request accepts from its caller."""

import math

import numpy as np
import pytest

from tritium.errors import RequestError
from tritium.runtime.request import Request, SampledToken
from tritium.sampling_params import SamplingParams

PARAMS = SamplingParams()


@pytest.mark.parametrize(
    ("token_ids", "named"),
    [
        ([1, -5, 2], "-5 at position 1"),
        ([1, 1 << 31], f"{1 << 31} at position 1"),
        ([1 << 70], "too big"),
        ([1.5], "float"),
        ([math.nan], "float"),
        ([None], "NoneType"),
        (["1"], "str"),
        ("123", "a string is not a list"),
        (b"123", "a string is not a list"),
        (7, "not iterable"),
    ],
)
def test_prompts_that_are_not_token_ids_are_refused_by_name_and_value(token_ids, named):
    with pytest.raises(RequestError) as caught:
        Request("r1", token_ids, PARAMS)
    assert "'r1'" in str(caught.value) and named in str(caught.value)


@pytest.mark.parametrize("token_ids", [[3, 4], (3, 4), np.array([3, 4]), np.array([3, 4], np.int32)])
def test_any_sequence_of_integers_becomes_a_list_of_plain_ints(token_ids):
    request = Request("r1", token_ids, PARAMS)
    assert request.token_ids == request.prompt_token_ids == [3, 4]
    assert {type(i) for i in request.token_ids} == {int}


def test_the_prompt_is_copied_and_outputs_never_reach_it():
    prompt = [3, 4]
    request = Request("r1", prompt, PARAMS)
    request.append_output(SampledToken(9))
    prompt.append(5)
    assert (request.prompt_token_ids, request.output_token_ids, request.token_ids) == ([3, 4], [9], [3, 4, 9])


@pytest.mark.parametrize("priority", [1.0, math.nan, "1", None, True, 1 << 40])
def test_a_priority_that_would_spoil_the_order_is_refused(priority):
    with pytest.raises(RequestError, match="'r1': priority must be an integer"):
        Request("r1", [1], PARAMS, priority=priority)


@pytest.mark.parametrize("request_id", ["", None, 5])
def test_a_request_id_must_be_a_non_empty_string(request_id):
    with pytest.raises(RequestError, match=f"request_id must be a non-empty string, not {request_id!r}"):
        Request(request_id, [1], PARAMS)


def test_a_cache_salt_must_be_a_string():
    with pytest.raises(RequestError, match="cache_salt must be a string, not 5"):
        Request("r1", [1], PARAMS, cache_salt=5)


def test_stop_ids_are_the_eos_ids_and_the_users_and_only_the_users_when_eos_is_ignored():
    assert Request("a", [1], SamplingParams(stop_token_ids=(5,)), eos_token_ids=(2, 3)).stop_ids == {2, 3, 5}
    ignoring = SamplingParams(stop_token_ids=(5,), ignore_eos=True)
    assert Request("a", [1], ignoring, eos_token_ids=(2, 3)).stop_ids == {5}


def test_logprobs_are_kept_only_when_asked_for():
    token = SampledToken(9, -0.5, ((9, -0.5), (4, -1.5)))
    for logprobs, kept in ((None, []), (0, [token]), (2, [token])):
        request = Request("a", [1], SamplingParams(logprobs=logprobs))
        request.append_output(token)
        assert request.output_logprobs == kept


def test_requests_are_compared_by_identity():
    assert Request("a", [1], PARAMS) != Request("a", [1], PARAMS)
