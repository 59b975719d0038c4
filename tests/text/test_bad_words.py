"""Bad words become the token sequences that spell them, at the beginning of a text and after a space."""

import pytest

from tritium.testing.tiny_tokenizers import KINDS
from tritium.text.bad_words import bad_word_ids
from tritium.text.tokenizer import Tokenizer


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("word", ["dog", " dog", "hello world", "é", "   "])
def test_a_word_is_banned_with_and_without_a_space_before_it(kind, word):
    tokenizer = Tokenizer(KINDS[kind]())
    sequences = bad_word_ids([word], tokenizer)
    bare = word.strip() or word
    spellings = {tuple(tokenizer.encode(text, add_special_tokens=False)) for text in (bare, f" {bare}")} - {()}
    assert set(sequences) == (spellings if word.strip() else set(sequences))
    assert all(sequences), "an empty sequence would ban nothing"


def test_a_word_given_twice_is_banned_once_and_order_is_kept():
    tokenizer = Tokenizer(KINDS["byte-level BPE"]())
    once = bad_word_ids(["fox", "dog"], tokenizer)
    assert bad_word_ids(["fox", "dog", " fox", "dog"], tokenizer) == once
    assert len(once) == 4
