"""The examples run as they stand and say what they promise.

Those that show a process start one; the others run as `__main__` in this process, which has torch loaded already.
tensor_parallel.py: tests/runtime/test_tensor_parallel.py.
"""

import ast
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
Run = Callable[[str], str]


def run_alone(name: str) -> str:
    done = subprocess.run([sys.executable, EXAMPLES / name], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs an example and returns what it prints."""

    def run(name: str) -> str:
        monkeypatch.setattr(sys, "argv", [str(EXAMPLES / name)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_an_example_of_the_gallery_is_read_in_a_minute() -> None:
    # What `make demo` runs; an op, its kernel in C++ and a model that takes it; two processes that find each other.
    longer = {"demo.py", "plugin.py", "tensor_parallel.py"}
    lengths = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in EXAMPLES.glob("*.py")}
    assert {name for name, length in lengths.items() if length >= 60} <= longer


def test_the_demo_completes_every_prompt_and_ends_with_its_speed() -> None:
    lines = run_alone("demo.py").splitlines()
    assert re.fullmatch(r"12 requests, 8 in flight at once: [\d,]+ tokens in [\d.]+ s, [\d,]+ tokens/s", lines[-1])
    finished = [line for line in lines if re.search(r"\(\d+ tokens, (length|stop)\)$", line)]
    assert len(finished) == 12
    status = [line for line in lines if "requests in flight" in line]
    assert any(re.search(r"8 requests in flight \+ 4 waiting .* KV blocks [1-9]\d* of 256$", line) for line in status)
    assert "engine " in lines[0]


def test_the_recommender_answers_as_torch_does_for_every_batch(run: Run) -> None:
    lines = run("recommender.py").splitlines()
    assert lines[0] == "takes dense, categories; gives click; batches of 1 to 256"
    answers = [re.fullmatch(r"batch of (\d+): best item \d+, equal to torch within (.*)", line) for line in lines[1:]]
    assert [found is not None and found[1] for found in answers] == ["1", "7", "256"]
    assert max(float(found[2]) for found in answers if found is not None) < 1e-5


def test_embeddings_rank_the_sentences(run: Run) -> None:
    lines = run("embeddings.py").splitlines()
    scores = [float(line.split()[0]) for line in lines]
    assert len(lines) == 3 and scores == sorted(scores, reverse=True) and -1 <= min(scores) <= max(scores) <= 1.001


def test_classification_names_the_likeliest_label_of_each_text(run: Run) -> None:
    lines = run("classification.py").splitlines()
    assert len(lines) == 3
    assert all(re.match(r"(negative|neutral|positive) \((0\.[3-9]\d|1\.00)\): ", line) for line in lines)


def test_models_of_ones_own_compile_and_the_plain_one_equals_pytorch(run: Run) -> None:
    assert run("custom_model.py").startswith("TinyModel, equal to PyTorch: [")
    tokens = re.fullmatch(r"gpt2 with squared ReLU: \[([\d, ]+)\]\n", run("changed_model.py"))
    assert tokens is not None and len(tokens[1].split(",")) == 16


def test_logits_processors_of_ones_own_choose_what_may_be_said(run: Run) -> None:
    digits, without, free = (
        ast.literal_eval(line.removeprefix("--- ")) for line in run("logits_processor.py").splitlines()
    )
    assert set(digits) <= set("0123456789, ") and len(digits) > 20
    assert free.count("e") > 3 and without.count("e") < free.count("e")
    assert without[:5] == free[:5]


def test_a_plugin_computes_its_op_in_one_step_and_changes_no_token(run: Run) -> None:
    lines = run("plugin.py").splitlines()
    found = [re.fullmatch(r"(\d) plugins: (\d+) steps, [\d.]+ ms a prompt of 256", line) for line in lines]
    (none, without), (one, with_it) = [match.groups() for match in found if match]
    assert (none, one) == ("0", "1")
    assert int(without) - int(with_it) == 4 * 3  # in each of four layers one step instead of four; it checks the tokens
    assert len((EXAMPLES / "plugin.py").read_text().splitlines()) < 80


def test_the_offline_batch_prints_the_likelier_of_two_samples_per_prompt(run: Run) -> None:
    lines = run("offline_batch.py").splitlines()
    assert len(lines) == 6
    for line in lines:
        found = re.fullmatch(r" *(-\d+\.\d\d) per token, ended by (stop|length): ('.*'|\".*\")", line)
        assert found is not None and float(found[1]) < 0


def test_a_stream_shows_every_piece_and_one_that_is_left_frees_its_blocks(run: Run) -> None:
    *_, whole, part, blocks = run("streaming.py").splitlines()
    assert ast.literal_eval(whole.removeprefix("whole: ")).startswith("def main(")
    assert ast.literal_eval(part.removeprefix("left early: ")).startswith("import os\n")
    assert blocks == "KV blocks in use: 0"


def test_a_second_turn_of_a_chat_finds_the_first_in_the_cache(run: Run) -> None:
    first, second = re.findall(r"^\((\d+) prompt tokens, (\d+) of them cached\)$", run("chat.py"), re.MULTILINE)
    assert int(first[1]) == 0 and int(second[1]) >= 16


def test_the_openai_package_talks_to_a_server_of_its_own() -> None:
    completion, chat, *answers = run_alone("openai_client.py").splitlines()
    assert completion.startswith("completion: ") and len(ast.literal_eval(chat.removeprefix("chat: "))) > 5
    found = [re.fullmatch(r"answer (\d): .*, log-probability -\d+\.\d\d", line) for line in answers]
    assert [match and match[1] for match in found] == ["0", "1", "2"]
    assert len((EXAMPLES / "openai_client.py").read_text().splitlines()) < 60
