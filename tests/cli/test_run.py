"""`tritium run` and `tritium chat` on the demo model: what they print is what the library answers."""

import asyncio
import json
import resource
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tritium.cli.main import app
from tritium.cli.run_command import collect
from tritium.llm import LLM, CompletionOutput, RequestOutput
from tritium.sampling_params import SamplingParams

DEMO = str(Path(__file__).parents[2] / "examples" / "demo_model")
SMALL = ["--max-model-len", "256", "--max-num-seqs", "4"]
PROMPTS = ["def main(", "import os"]
GREEDY = ["--temperature", "0", "--max-tokens", "12"]


@pytest.fixture(scope="module")
def expected() -> list[str]:
    with LLM(DEMO, max_model_len=256, max_num_seqs=4) as llm:
        outputs = llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=12))
    texts = [out.outputs[0].text for out in outputs]
    assert all(texts) and texts[0] != texts[1]
    return texts


def tritium(*arguments: str, input: str | None = None):
    return CliRunner().invoke(app, list(arguments), input=input, catch_exceptions=False)


def test_one_prompt_prints_its_completion_and_nothing_else(expected: list[str]) -> None:
    result = tritium("run", DEMO, "--prompt", PROMPTS[0], *GREEDY, *SMALL)
    assert (result.exit_code, result.stdout) == (0, expected[0] + "\n")
    assert "max_num_seqs            4" in result.stderr
    assert "max_model_len           256" in result.stderr


def test_several_prompts_are_printed_in_their_order(expected: list[str]) -> None:
    result = tritium("run", DEMO, "--prompt", PROMPTS[0], "--prompt", PROMPTS[1], *GREEDY, *SMALL)
    assert result.stdout == "".join(f"--- {p}\n{t}\n" for p, t in zip(PROMPTS, expected, strict=True))


def test_a_reader_that_leaves_early_ends_it_quietly() -> None:
    command = [
        sys.executable,
        "-m",
        "tritium",
        "run",
        DEMO,
        "--prompt",
        "import",
        "--max-tokens",
        "500",
        "--ignore-eos",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.read(1)
        process.stdout.close()
        log = process.stderr.read()
    assert process.returncode == 141
    assert "Traceback" not in log and "rror" not in log


def test_json_holds_configuration_and_outputs(expected: list[str]) -> None:
    result = tritium("run", DEMO, "--prompt", PROMPTS[0], "--prompt", PROMPTS[1], *GREEDY, *SMALL, "--json")
    report = json.loads(result.stdout)
    assert [out["text"] for out in report["outputs"]] == expected
    assert [len(out["token_ids"]) for out in report["outputs"]] == [12, 12]
    assert report["config"]["max_model_len"] == 256 and report["config"]["dtype"] == "bfloat16"
    assert report["outputs"][0]["finish_reason"] == "length"


def test_a_prompt_that_is_too_long_is_one_error_line() -> None:
    result = tritium("run", DEMO, "--prompt", "x " * 400, *SMALL)
    assert result.exit_code == 1
    assert "error: request" in result.stderr.splitlines()[-1]
    assert "max_model_len=256" in result.stderr.splitlines()[-1]


def test_a_file_is_completed_with_one_error_per_bad_line_and_resumed(expected: list[str], tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = [
        {"id": "a", "prompt": PROMPTS[0]},
        {"id": "bad", "prompt": PROMPTS[0], "temprature": 0},
        {"id": "ids", "prompt": [1, 2, 3], "max_tokens": 3, "logprobs": 2},
        {"id": "long", "prompt": [1] * 300},
        {"id": "chat", "messages": [{"role": "user", "content": "Add two numbers."}], "max_tokens": 5},
    ]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    files = ("--input", str(source), "--output", str(target))

    first = tritium("run", DEMO, *files, *GREEDY, *SMALL, "--json")
    assert first.exit_code == 1  # two lines failed, and are recorded
    assert {key: json.loads(first.stdout)[key] for key in ("completed", "failed", "skipped")} == {
        "completed": 3,
        "failed": 2,
        "skipped": 0,
    }
    records = {entry["id"]: entry for entry in map(json.loads, target.read_text().splitlines())}
    assert records.keys() == {"a", "bad", "ids", "long", "chat"}
    assert records["a"]["text"] == expected[0]
    assert len(records["ids"]["token_ids"]) == len(records["ids"]["logprobs"]) == 3
    assert len(records["ids"]["logprobs"][0]["top_logprobs"]) == 2
    assert len(records["chat"]["token_ids"]) <= 5
    assert "did you mean 'temperature'" in records["bad"]["error"]["message"]
    assert records["long"]["error"]["type"] == "RequestTooLarge"

    answers = [line for line in target.read_text().splitlines(keepends=True) if "error" not in json.loads(line)]
    assert len(answers) == 3
    with target.open("a") as file:
        file.write('{"id": "b", "te')  # as after a crash in the middle of a line
    lines[1] = {"id": "bad", "prompt": PROMPTS[1]}
    source.write_text("".join(json.dumps(line) + "\n" for line in [*lines, {"id": "b", "prompt": PROMPTS[1]}]))
    second = tritium("run", DEMO, *files, *GREEDY, *SMALL)
    assert second.exit_code == 1  # one is too long still
    assert "2 completed, 1 failed, 3 done before" in second.stderr
    after = target.read_text().splitlines(keepends=True)
    assert after[:3] == answers
    added = {entry["id"]: entry for entry in map(json.loads, after[3:])}
    assert added.keys() == {"bad", "long", "b"} and "error" in added["long"]
    assert added["bad"]["text"] == added["b"]["text"] == expected[1]


def test_a_long_answer_is_joined_once_not_anew_for_each_token() -> None:
    copied = 0

    class Text(str):
        def __add__(self, other: str) -> "Text":
            nonlocal copied
            copied += len(self) + len(other)
            return Text(str(self) + other)

    class Source:
        async def generate_async(self, prompt: str, params: SamplingParams):
            for i in range(100):
                token = CompletionOutput(text=Text("ab"), token_ids=[i], finish_reason="length" if i == 99 else None)
                yield RequestOutput(request_id="r", prompt=prompt, prompt_token_ids=[1], outputs=[token])

    out = asyncio.run(collect(Source(), "p", SamplingParams())).outputs[0]  # type: ignore[arg-type]
    assert (out.text, out.token_ids, out.finish_reason) == ("ab" * 100, list(range(100)), "length")
    assert out.logprobs is None and copied == 0


def test_a_full_disk_ends_the_job_with_one_line(tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps({"prompt": "import", "max_tokens": 200}) + "\n" for _ in range(4)))
    command = [sys.executable, "-m", "tritium", "run", DEMO, "--input", source, "--output", target, *SMALL]
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (300, 300))  # bytes a file may have
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=limit)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(f"error: {target} cannot be written: ")
    assert "Traceback" not in done.stderr


def test_a_chat_keeps_its_history_until_it_is_reset() -> None:
    lines = "Add two numbers.\n\nAgain.\n/reset\nAdd two numbers.\n/exit\nnever\n"
    result = tritium("chat", DEMO, "--temperature", "0", "--max-tokens", "8", *SMALL[:2], "--json", input=lines)
    config, *answers = map(json.loads, result.stdout.splitlines())
    assert config["config"]["max_model_len"] == 256
    assert [answer["role"] for answer in answers] == ["assistant"] * 3
    assert answers[0] == answers[2]
    with LLM(DEMO, max_model_len=256) as llm:
        history = [
            {"role": "user", "content": "Add two numbers."},
            {"role": "assistant", "content": answers[0]["content"]},
            {"role": "user", "content": "Again."},
        ]
        (second,) = llm.chat(history, SamplingParams(temperature=0, max_tokens=8))
    assert answers[1]["content"] == second.outputs[0].text


def test_a_chat_survives_a_message_that_is_too_long() -> None:
    lines = "word " * 400 + "\nhello\n"
    result = tritium("chat", DEMO, "--temperature", "0", "--max-tokens", "4", *SMALL[:2], "--json", input=lines)
    _, error, answer = map(json.loads, result.stdout.splitlines())
    assert error["error"]["type"] == "RequestTooLarge"
    assert answer["role"] == "assistant"
