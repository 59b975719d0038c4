"""The streaming detokenizer: joined deltas are the full decode, cut at stop strings, never within a character."""

import time
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Library

from tritium.sampling_params import SamplingParams
from tritium.testing import tiny_tokenizers
from tritium.text.detokenizer import IncrementalDetokenizer
from tritium.text.tokenizer import Tokenizer

DECODERS = {
    "none": None,
    "WordPiece": decoders.WordPiece(),
    "BPE suffix": decoders.BPEDecoder(suffix="</w>"),
    "Metaspace that never prepends": decoders.Metaspace(prepend_scheme="never"),
    "strip before fuse": decoders.Sequence([decoders.Strip("a", 1, 0), decoders.Fuse()]),
    "strip after fuse": decoders.Sequence([decoders.Fuse(), decoders.Strip("a", 2, 0)]),
    "regex replace": decoders.Sequence([decoders.Replace(Regex("[ab]+"), "-"), decoders.Fuse()]),
    "bytes in a sequence": decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteLevel()]),
    "byte fallback alone": decoders.ByteFallback(),
}


def word_level(decoder: object) -> Library:
    words = ["<unk>", "a", "ba", "▁", "▁a", "##b", "c</w>", "é", "Ġx", "Ã", "©", "<0xC3>", "<0xA9>", "<0xFF>", " a", ""]
    library = Library(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    if decoder is not None:
        library.decoder = decoder  # type: ignore[assignment]
    library.add_special_tokens(["<unk>"])
    return library


TOKENIZERS = {kind: Tokenizer(make()) for kind, make in tiny_tokenizers.KINDS.items()}
TOKENIZERS |= {kind: Tokenizer(word_level(decoder)) for kind, decoder in DECODERS.items()}
BYTES = Tokenizer(tiny_tokenizers.byte_level_bpe())


def params(**options: object) -> SamplingParams:
    return SamplingParams(**options)


def stream(tokenizer: Tokenizer, ids: Sequence[int], chunk: int = 1, **options: object) -> tuple[list[str], str | None]:
    """The deltas, the last of them from `finish`, and the stop string that ended the output."""
    detokenizer = IncrementalDetokenizer(tokenizer, params(**options))
    deltas = []
    for start in range(0, len(ids), chunk):
        text, stop = detokenizer.push(ids[start : start + chunk])
        deltas.append(text)
        if stop is not None:
            assert detokenizer.finish() == ("", None)
            return deltas, stop
    text, stop = detokenizer.finish()
    return [*deltas, text], stop


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_joined_deltas_are_exactly_the_full_decode(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]

    @given(st.lists(st.integers(0, tokenizer.vocab_size + 2), max_size=60), st.integers(1, 7), st.booleans())
    def check(ids: list[int], chunk: int, skip: bool) -> None:
        deltas, stop = stream(tokenizer, ids, chunk, skip_special_tokens=skip)
        assert "".join(deltas) == tokenizer.decode(ids, skip_special_tokens=skip)
        assert stop is None

    check()


@given(st.binary(max_size=60), st.integers(1, 5))
@settings(max_examples=300)
def test_any_bytes_decode_as_the_tokenizers_library_decodes_them(data: bytes, chunk: int) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())  # U+0100 upwards stand for the bytes that do not print
    unprintable = [byte for byte in range(256) if chr(byte) not in alphabet]
    id_of = {BYTES.token(index): index for index in range(BYTES.vocab_size)}
    ids = [id_of[chr(256 + unprintable.index(byte)) if byte in unprintable else chr(byte)] for byte in data]
    deltas, _ = stream(BYTES, ids, chunk)
    assert "".join(deltas) == BYTES.decode(ids) == data.decode("utf-8", "replace")


@given(st.text(max_size=40))
def test_no_delta_ends_within_a_character(text: str) -> None:
    for kind in tiny_tokenizers.KINDS:
        tokenizer = TOKENIZERS[kind]
        ids = tokenizer.encode(text, add_special_tokens=False)
        whole = tokenizer.decode(ids)
        deltas, _ = stream(tokenizer, ids)
        assert "".join(deltas) == whole
        if "\N{REPLACEMENT CHARACTER}" not in whole:
            assert all("\N{REPLACEMENT CHARACTER}" not in delta for delta in deltas)


def test_text_streams_as_soon_as_it_is_certain() -> None:
    ids = BYTES.encode("x🙂y")
    deltas, _ = stream(BYTES, ids)
    assert deltas[0] == "x"
    assert deltas[-2:] == ["y", ""]
    sentencepiece = TOKENIZERS["SentencePiece BPE with byte fallback"]
    deltas, _ = stream(sentencepiece, sentencepiece.encode("the dog", add_special_tokens=False))
    assert sum(map(bool, deltas)) >= 4


def test_a_decoder_without_a_streaming_form_gives_its_text_at_the_end() -> None:
    tokenizer = Tokenizer(word_level(decoders.Sequence([decoders.Fuse(), decoders.Strip("a", 0, 1)])))
    deltas, _ = stream(tokenizer, [1, 2, 1])
    assert deltas == ["", "", "", "aba"]
    assert tokenizer.decode([1, 2, 1]) == "aba"


def test_an_incomplete_character_at_the_end_becomes_a_replacement_character() -> None:
    ids = BYTES.encode("🙂")[:-1]
    deltas, _ = stream(BYTES, ids)
    assert deltas == [""] * len(ids) + ["\N{REPLACEMENT CHARACTER}"]


STOPS = st.lists(st.text("abc\n", min_size=1, max_size=4), min_size=1, max_size=4, unique=True)


@given(st.text("abc\n", max_size=40), STOPS, st.integers(1, 5), st.booleans(), st.integers(0, 12))
@settings(max_examples=500)
def test_stop_strings_cut_where_a_search_of_the_whole_text_would(
    text: str, stops: list[str], chunk: int, include: bool, min_tokens: int
) -> None:
    ids = [i for character in text for i in BYTES.encode(character)]
    assert len(ids) == len(text)  # one token a character: ends of stop strings are counts of tokens
    ends = [(end, -len(stop), stop) for stop in stops for end in range(1, len(text) + 1) if text[:end].endswith(stop)]
    ends = sorted(entry for entry in ends if entry[0] >= min_tokens)
    deltas, stop = stream(BYTES, ids, chunk, stop=stops, include_stop_str_in_output=include, min_tokens=min_tokens)
    if not ends:
        assert ("".join(deltas), stop) == (text, None)
        return
    end, negative_length, first = ends[0]
    assert stop == first
    assert "".join(deltas) == text[: end if include else end + negative_length]


@given(st.text("ab", max_size=30), STOPS)
def test_text_that_may_begin_a_stop_string_is_held_back_and_nothing_else_is(text: str, stops: list[str]) -> None:
    detokenizer = IncrementalDetokenizer(BYTES, params(stop=stops))
    shown = ""
    for position, character in enumerate(text):
        delta, stop = detokenizer.push(BYTES.encode(character))
        if stop is not None:
            return
        shown += delta
        so_far = text[: position + 1]
        held = max(n for n in range(len(so_far) + 1) if n == 0 or any(s.startswith(so_far[-n:]) for s in stops))
        assert shown == so_far[: len(so_far) - held]


def test_tokens_after_a_stop_string_give_no_text() -> None:
    detokenizer = IncrementalDetokenizer(BYTES, params(stop="b"))
    ids = [*BYTES.encode("a"), *BYTES.encode("b"), *BYTES.encode("c")]
    assert detokenizer.push(ids) == ("a", "b")
    assert detokenizer.push(BYTES.encode("d")) == ("", None)


def test_special_tokens_are_left_out_unless_asked_for() -> None:
    ids = [*BYTES.encode("a"), 0, *BYTES.encode("b")]
    assert "".join(stream(BYTES, ids)[0]) == "ab"
    assert "".join(stream(BYTES, ids, skip_special_tokens=False)[0]) == "a<|end|>b"


def test_a_hostile_stop_string_costs_a_constant_per_character() -> None:
    stops = ["a" * (1024 - index) + "b" for index in range(1, 64)]  # almost match everywhere
    ids = BYTES.encode("a")
    detokenizer = IncrementalDetokenizer(BYTES, params(stop=stops))
    detokenizer.push(ids * 1024)
    start = time.perf_counter()
    detokenizer.push(ids * 1000)
    assert time.perf_counter() - start < 2.0  # 126,000 constant steps; rescanning the held text would be 64 million
