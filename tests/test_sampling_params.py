"""SamplingParams: every number is bounded when it is made."""

import pytest

from tritium.errors import RequestError
from tritium.sampling_params import SamplingParams


@pytest.mark.parametrize("name", ["temperature", "top_p", "min_p"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0, 1e300, 10**400, "1", True, None])
def test_what_is_no_number_in_range_is_a_request_error_that_names_it(name, value):
    with pytest.raises(RequestError, match=name):
        SamplingParams(**{name: value})


@pytest.mark.parametrize("name", ["max_tokens", "top_k", "seed", "logprobs", "min_tokens"])
@pytest.mark.parametrize("value", [-1, 10**400, 1.5, "1", True])
def test_counts_are_bounded_integers(name, value):
    with pytest.raises(RequestError, match=name):
        SamplingParams(**{name: value})


def test_an_unknown_name_is_refused_with_the_nearest_known_one():
    with pytest.raises(RequestError, match="unknown option 'temprature'; did you mean 'temperature'"):
        SamplingParams(temprature=1)
