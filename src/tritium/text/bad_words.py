"""Words that must not come about, as the token sequences that would spell them."""

from collections.abc import Sequence

from tritium.text.tokenizer import Tokenizer


def bad_word_ids(words: Sequence[str], tokenizer: Tokenizer) -> tuple[tuple[int, ...], ...]:
    """Each word as it is tokenised at the beginning of a text and after a space, where these differ.

    The rule is vLLM's (`SamplingParams.update_from_tokenizer`), without its exception for spaced words of another
    length. Other splits of the same text into tokens are not covered; a model rarely chooses them.
    """
    sequences: dict[tuple[int, ...], None] = {}
    for word in words:
        bare = word.lstrip()
        for text in (bare or word, f" {bare}" if bare else word):
            if ids := tuple(tokenizer.encode(text, add_special_tokens=False)):
                sequences[ids] = None
    return tuple(sequences)
