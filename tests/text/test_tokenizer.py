"""The tokenizer: ids and text equal transformers', and every fault of a directory has its own message."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tritium.errors import CheckpointError, RequestError
from tritium.testing import tiny_tokenizers
from tritium.text.tokenizer import Tokenizer

DEMO = Path(__file__).parents[2] / "examples" / "demo_model"
TEXTS = [
    "",
    " ",
    "Hello world",
    "  two  spaces \t and a tab\n\nnewlines",
    "Zwölf Boxkämpfer 🙂🚀 日本語 e\u0301",
    "def f(x):\n    return x ** 2 + 1234567\n",
    "<|end|> and </s> and <s> inside <|eot_id|>",
    "▁marks▁in text",
    "\x00\x7f control",
]


@pytest.fixture(scope="module", params=tiny_tokenizers.KINDS)
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_tokenizers.write_directory(
        tmp_path_factory.mktemp("tokenizer"),
        tiny_tokenizers.KINDS[request.param](),
        {
            **tiny_tokenizers.NAMED_TOKENS[request.param],
            "clean_up_tokenization_spaces": False,
            "additional_special_tokens": ["<|extra|>"],
        },
    )


@pytest.fixture
def bpe(tmp_path: Path) -> Path:
    return tiny_tokenizers.write_directory(tmp_path / "bpe", tiny_tokenizers.byte_level_bpe(), {"eos_token": "<|end|>"})


def reference(directory: Path):
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(directory)


def test_ids_equal_transformers_with_and_without_special_tokens(directory: Path) -> None:
    ours, theirs = Tokenizer.from_directory(directory), reference(directory)
    for text in TEXTS:
        for add in (True, False):
            assert ours.encode(text, add_special_tokens=add) == theirs.encode(text, add_special_tokens=add), (text, add)


def test_text_equals_transformers_for_any_ids(directory: Path) -> None:
    ours, theirs = Tokenizer.from_directory(directory), reference(directory)

    @given(st.lists(st.integers(0, ours.vocab_size - 1), max_size=40), st.booleans())
    def check(ids: list[int], skip: bool) -> None:
        assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)

    check()


def test_special_tokens_equal_transformers(directory: Path) -> None:
    ours, theirs = Tokenizer.from_directory(directory), reference(directory)
    assert ours.special_token_ids >= set(theirs.all_special_ids)
    assert (ours.bos_token_id, ours.eos_token_id, ours.pad_token_id) == (
        theirs.bos_token_id,
        theirs.eos_token_id,
        theirs.pad_token_id,
    )
    assert ours.vocab_size == len(theirs)


def test_the_demo_checkpoint_encodes_as_transformers_does() -> None:
    ours, theirs = Tokenizer.from_directory(DEMO), reference(DEMO)
    text = (DEMO / "heldout.txt").read_text(encoding="utf-8")[:20_000]
    assert ours.encode(text) == theirs.encode(text)
    assert ours.decode(ours.encode(text, add_special_tokens=False)) == text


@pytest.mark.parametrize(
    ("generation", "model", "expected"),
    [
        ({"eos_token_id": 7}, {}, {0, 7}),
        ({"eos_token_id": [7, 9]}, {"eos_token_id": 5}, {0, 5, 7, 9}),
        ({"eos_token_id": None}, {"eos_token_id": [5]}, {0, 5}),
        ({}, {}, {0}),
    ],
)
def test_eos_ids_of_all_files_are_merged(bpe: Path, generation: dict, model: dict, expected: set[int]) -> None:
    (bpe / "generation_config.json").write_text(json.dumps(generation))
    (bpe / "config.json").write_text(json.dumps(model))
    assert Tokenizer.from_directory(bpe).eos_token_ids == expected


@pytest.mark.parametrize("value", ["2", -1, True, [1, "x"], 1.5, {"a": 1}])
def test_an_eos_that_is_no_token_id_is_refused_with_its_value(bpe: Path, value: object) -> None:
    (bpe / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(CheckpointError, match=r"generation_config\.json: eos_token_id") as caught:
        Tokenizer.from_directory(bpe)
    assert repr(value) in str(caught.value)


def test_an_eos_beyond_the_models_vocabulary_is_refused(bpe: Path) -> None:
    (bpe / "generation_config.json").write_text(json.dumps({"eos_token_id": 9999}))
    with pytest.raises(CheckpointError, match=r"eos_token_id 9999 is not a token: the model's vocab_size is 512"):
        Tokenizer.from_directory(bpe, model_vocab_size=512)


def test_a_vocabulary_larger_than_the_models_is_refused_with_both_sizes(bpe: Path) -> None:
    with pytest.raises(CheckpointError, match=r"does not match the model: it has token ids up to 399 .* is 300"):
        Tokenizer.from_directory(bpe, model_vocab_size=300)
    assert Tokenizer.from_directory(bpe, model_vocab_size=400).vocab_size == 400


def test_tokens_of_added_tokens_decoder_are_added_at_their_ids(tmp_path: Path) -> None:
    added = {
        "400": {"content": "<tool_call>", "special": False, "normalized": False, "lstrip": False, "rstrip": True},
        "401": {"content": "<|im_end|>", "special": True, "normalized": False},
    }
    config = {"eos_token": "<|im_end|>", "added_tokens_decoder": added}
    directory = tiny_tokenizers.write_directory(tmp_path, tiny_tokenizers.byte_level_bpe(), config)
    ours, theirs = Tokenizer.from_directory(directory), reference(directory)
    text = "a <tool_call>  {}<|im_end|> b"
    assert {400, 401} < set(ours.encode(text))
    assert ours.encode(text) == theirs.encode(text)
    assert 401 in ours.special_token_ids and 400 not in ours.special_token_ids
    assert ours.eos_token_ids == {401}


def test_an_added_token_at_an_impossible_id_is_refused(tmp_path: Path) -> None:
    config = {"added_tokens_decoder": {"405": {"content": "<gap>"}}}
    directory = tiny_tokenizers.write_directory(tmp_path, tiny_tokenizers.byte_level_bpe(), config)
    with pytest.raises(CheckpointError, match=r"'<gap>' should have id 405, but tokenizer\.json leads to id 400"):
        Tokenizer.from_directory(directory)


@pytest.mark.parametrize("table", [[], {"x": {"content": "a"}}, {"1": "a"}, {"1": {"content": 3}}, {"1": {}}])
def test_a_malformed_added_tokens_decoder_is_refused(tmp_path: Path, table: object) -> None:
    directory = tiny_tokenizers.write_directory(
        tmp_path, tiny_tokenizers.byte_level_bpe(), {"added_tokens_decoder": table}
    )
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: added_tokens_decoder"):
        Tokenizer.from_directory(directory)


def test_older_directories_name_their_tokens_in_special_tokens_map(tmp_path: Path) -> None:
    directory = tiny_tokenizers.write_directory(
        tmp_path,
        tiny_tokenizers.byte_level_bpe(),
        {},
        special_tokens_map={"eos_token": {"content": "<|end|>", "lstrip": False}},
        added_tokens={"<new>": 400},
    )
    ours, theirs = Tokenizer.from_directory(directory), reference(directory)
    assert ours.eos_token_id == theirs.eos_token_id == 0
    assert ours.encode("a<new>b") == theirs.encode("a<new>b")


def test_a_directory_with_only_tokenizer_model_names_the_command_that_converts_it(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x07\n\x05<unk>")
    with pytest.raises(CheckpointError) as caught:
        Tokenizer.from_directory(tmp_path)
    assert f"T.from_pretrained({str(tmp_path)!r}).save_pretrained({str(tmp_path)!r})" in str(caught.value)
    assert "pip install transformers sentencepiece" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", b"{"),
        ("tokenizer.json", b'{"model": {"type": "Nonsense"}}'),
        ("tokenizer_config.json", b"not json"),
        ("tokenizer_config.json", b"[1]"),
        ("tokenizer_config.json", b"\xff\xfe"),
        ("tokenizer_config.json", b'{"eos_token": 3}'),
        ("generation_config.json", b"[" * 100_000),
        ("chat_template.jinja", b"\xff\xfe"),
    ],
)
def test_a_damaged_file_is_refused_by_name(bpe: Path, name: str, content: bytes) -> None:
    (bpe / name).write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        Tokenizer.from_directory(bpe)
    assert str(bpe / name) in str(caught.value)


def test_a_directory_without_a_tokenizer_says_that_ids_still_work(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no tokenizer\.json; prompts can then only be given as token ids"):
        Tokenizer.from_directory(tmp_path)
    with pytest.raises(CheckpointError, match="is not a directory"):
        Tokenizer.from_directory(tmp_path / "absent")


@pytest.mark.parametrize("text", ["half \ud83d a pair", 3, None])
def test_a_prompt_that_is_not_text_is_a_request_error(bpe: Path, text: object) -> None:
    with pytest.raises(RequestError, match="not valid Unicode text"):
        Tokenizer.from_directory(bpe).encode(text)  # type: ignore[arg-type]


def test_ids_without_a_token_give_no_text(bpe: Path) -> None:
    tokenizer = Tokenizer.from_directory(bpe)
    assert tokenizer.decode([*tokenizer.encode("ab"), 100_000]) == "ab"
    assert tokenizer.token(100_000) is None


def test_truncation_and_padding_of_the_file_do_not_reach_prompts(tmp_path: Path) -> None:
    library = tiny_tokenizers.byte_level_bpe()
    library.enable_truncation(4)
    library.enable_padding(length=16)
    directory = tiny_tokenizers.write_directory(tmp_path, library, {"eos_token": "<|end|>"})
    text = "a text of more than four tokens, surely"
    assert Tokenizer.from_directory(directory).decode(Tokenizer.from_directory(directory).encode(text)) == text
