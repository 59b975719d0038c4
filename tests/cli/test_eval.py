"""`tritium eval`: transformers' numbers on the same windows, each token scored once, errors that say what to do."""

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from tritium.cli.eval_command import tokenise, window_sizes, windows
from tritium.cli.main import app
from tritium.errors import ConfigError
from tritium.testing.tiny_configs import LLAMA
from tritium.testing.tiny_models import make_checkpoint

DEMO = Path(__file__).parents[2] / "examples" / "demo_model"


@pytest.fixture(scope="module")
def text() -> str:
    return (DEMO / "heldout.txt").read_text()[:1200] + "é"


def evaluate(text: str, place: Path, *flags: str) -> dict:
    path = place / "text.txt"
    path.write_text(text)
    result = CliRunner().invoke(
        app, ["eval", str(DEMO), "--text", str(path), "--dtype", "float32", "--max-model-len", "128", "--json", *flags]
    )
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize(("window", "stride"), [(64, 63), (64, 24)])
def test_perplexity_and_bits_are_those_of_transformers_on_the_same_windows(text, tmp_path, window, stride) -> None:
    report = evaluate(text, tmp_path, "--window", str(window), "--stride", str(stride))
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    model = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    bos = [tokenizer.bos_token_id]
    size = window - 1
    nats, scored = 0.0, set()
    for start in range(0, len(ids), min(stride, size)):
        part = torch.tensor(bos + ids[start : start + size])
        with torch.inference_mode():
            logprobs = model(part[None]).logits[0].log_softmax(-1)
        for i in range(1, len(part)):
            if start + i - 1 not in scored:
                scored.add(start + i - 1)
                nats -= logprobs[i - 1, part[i]].item()
    assert report["tokens"] == report["tokens_scored"] == len(ids) == len(scored)
    assert report["bytes_scored"] == len(text.encode())
    assert report["perplexity"] == pytest.approx(math.exp(nats / len(ids)), rel=1e-4)
    assert report["bits_per_byte"] == pytest.approx(nats / math.log(2) / len(text.encode()), rel=1e-4)


def test_max_tokens_ends_the_text_and_without_flags_windows_are_as_long_as_the_model_allows(text, tmp_path) -> None:
    report = evaluate(text, tmp_path, "--max-tokens", "200")
    assert (report["tokens"], report["windows"], report["tokens_scored"]) == (200, 2, 200)
    assert (report["config"]["window"], report["config"]["stride"]) == (127, 126)


@given(st.integers(1, 60), st.integers(1, 12), st.data(), st.booleans())
def test_every_token_with_something_before_it_is_scored_once(num_tokens, size, data, has_prefix) -> None:
    stride = data.draw(st.integers(1, size))
    found = list(windows(num_tokens, size, stride, has_prefix=has_prefix))
    scored = [i for one in found for i in range(one.first_scored, one.end)]
    assert scored == sorted(set(scored))
    assert all(one.start + (not has_prefix) <= one.first_scored < one.end <= one.start + size for one in found)
    missing = set(range(num_tokens)) - set(scored)
    assert missing <= (set() if has_prefix else set(range(0, num_tokens, stride)))


class WithBos:
    """A tokenizer that puts token 7 before, and 8 behind, the bytes of a text."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        ids = list(text.encode())
        return [7, *ids, 8] if add_special_tokens else ids


def test_a_bos_starts_every_window_and_counts_towards_its_length() -> None:
    assert tokenise(WithBos(), "bcd", Path("some.txt"), 2) == ([7], [98, 99])
    assert window_sizes(16, None, 1, 128) == (15, 15)
    assert window_sizes(None, 8, 0, 4096) == (512, 8)


def test_a_text_without_tokens_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"some\.txt has 0 tokens: there is nothing to score; name a longer text"):
        tokenise(WithBos(), "", Path("some.txt"), None)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((128, None, 0, 128), "--window must be 127 or less, not 128"),
        ((64, 65, 0, 128), "--stride must be 64 or less, not 65: tokens between windows would not be scored"),
        ((2, None, 2, 128), "--window must be above 2, not 2"),
    ],
)
def test_windows_that_cannot_be_are_refused(sizes, message) -> None:
    with pytest.raises(ConfigError, match=message):
        window_sizes(*sizes)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\xff", "not UTF-8"),
        (b"a" * (1 + (16 << 20)), "is longer than"),
    ],
)
def test_a_text_without_anything_to_score_is_refused_by_name(content, message, tmp_path) -> None:
    path = tmp_path / "some.txt"
    path.write_bytes(content)
    flags = ["--text", str(path), "--dtype", "float32", "--max-model-len", "128"]
    result = CliRunner().invoke(app, ["eval", str(DEMO), *flags])
    assert (result.exit_code, result.stdout) == (1, "")
    line = result.stderr.splitlines()[-1]
    assert line.startswith("error: ") and "some.txt" in line and message in line


def test_an_engine_without_a_tokenizer_is_refused_by_name(tmp_path) -> None:
    model = make_checkpoint(tmp_path / "tiny", LLAMA)
    (tmp_path / "some.txt").write_text("some text")
    result = CliRunner().invoke(app, ["eval", str(model), "--text", str(tmp_path / "some.txt")])
    assert result.exit_code == 1
    assert "has no tokenizer.json; put the one that the model was published with" in result.stderr.splitlines()[-1]
