"""What a text may consist of: whole numbers that the model has rows for, each with its type."""

from enum import IntEnum
from typing import Any

import pytest

from tritium.errors import RequestError, RequestTooLarge
from tritium.runtime.encoder_request import EncoderRequest


class Token(IntEnum):
    FIRST = 3


def check(ids: Any, types: Any = None) -> EncoderRequest:
    types = [0] * len(ids) if types is None else types
    request = EncoderRequest(token_ids=ids, token_types=types, task="embed")
    request.check(max_model_len=8, vocab_size=100, num_token_types=2)
    return request


@pytest.mark.parametrize("ids", [[0, 99, 5], (7,), [Token.FIRST, 4]])
def test_a_text_of_known_tokens_is_its_numbers(ids: Any) -> None:
    request = check(ids, [1] * len(ids))
    assert request.ids.tolist() == list(ids) and request.types.tolist() == [1] * len(ids)


@pytest.mark.parametrize("wrong", [100, -1, 1 << 70, True, 2.0, "3", None])
def test_what_is_no_token_is_named(wrong: object) -> None:
    with pytest.raises(RequestError) as caught:
        check([5, wrong, 6])
    assert str(caught.value) == f"{wrong!r} is no token id of this model: expected an integer from 0 to 99"


def test_types_are_held_to_the_model_and_to_the_number_of_tokens() -> None:
    with pytest.raises(RequestError, match="2 is no token type of this model: expected an integer from 0 to 1"):
        check([5, 6], [0, 2])
    with pytest.raises(RequestError, match="2 token ids need as many token types, not 0"):
        check([5, 6], [])


def test_a_text_has_tokens_and_not_more_than_the_model_takes() -> None:
    with pytest.raises(RequestError, match="the prompt has no tokens: an encoder needs at least one"):
        check([])
    with pytest.raises(RequestTooLarge, match="the prompt has 9 tokens, the model takes 8: shorten it"):
        check([1] * 9)
