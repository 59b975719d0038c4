"""`tritium bench throughput`: forced lengths, honest percentiles, a report that says what was measured."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from tritium.cli.main import app
from tritium.cli.measuring import assert_lengths, percentiles, random_prompts
from tritium.errors import ConfigError, EngineError
from tritium.runtime.outputs import CompletionOutput, RequestOutput

DEMO = str(Path(__file__).parents[2] / "examples" / "demo_model")


def test_the_demo_model_is_measured_and_the_report_is_complete() -> None:
    sizes = ["--num-prompts", "6", "--input-len", "20", "--output-len", "5", "--max-model-len", "64"]
    result = CliRunner().invoke(app, ["bench", "throughput", DEMO, *sizes, "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["output_tokens_per_second"] == pytest.approx(6 * 5 / report["seconds"])
    assert report["total_tokens_per_second"] == pytest.approx(6 * 25 / report["seconds"])
    assert report["prefix_hit_tokens"] == 0
    assert report["steps"] >= 5
    assert len(report["plan_sha256"]) == 64
    assert report["versions"].keys() == {"tritium", "torch", "python"}
    assert (report["config"]["num_prompts"], report["config"]["max_model_len"]) == (6, 64)
    for name in ("ttft", "tpot", "latency"):
        values = report[f"{name}_seconds"]
        assert 0 < values["p50"] <= values["p90"] <= values["p99"] <= report["seconds"]


def test_prompts_are_distinct_repeatable_and_within_the_vocabulary() -> None:
    prompts = random_prompts(50, 3, 10, seed=1)
    assert len({tuple(prompt) for prompt in prompts}) == 50
    assert all(len(prompt) == 3 and all(0 <= i < 10 for i in prompt) for prompt in prompts)
    assert prompts == random_prompts(50, 3, 10, seed=1) != random_prompts(50, 3, 10, seed=2)
    with pytest.raises(ConfigError, match="not 50 distinct prompts of 1 tokens"):
        random_prompts(50, 1, 10, seed=1)


@given(st.lists(st.floats(0, 1e6), min_size=1))
def test_a_percentile_is_the_smallest_value_that_so_many_do_not_exceed(values: list[float]) -> None:
    result = percentiles(values)
    for p in (50, 90, 99):
        value = result[f"p{p}"]
        assert sum(v <= value for v in values) * 100 >= p * len(values)
        assert all(v >= value or sum(w <= v for w in values) * 100 < p * len(values) for v in values)


@pytest.mark.parametrize(
    ("completion", "prompt", "message"),
    [
        (CompletionOutput(token_ids=[1, 2], finish_reason="length"), [1], "after 2 of 3 tokens; nothing was measured"),
        (CompletionOutput(token_ids=[1, 2, 3], finish_reason="stop"), [1], "ended with 'stop'"),
        (CompletionOutput(token_ids=[1, 2, 3], finish_reason="length"), [1, 2], "a prompt of 2 tokens"),
    ],
)
def test_a_wrong_length_is_an_error_not_a_measurement(
    completion: CompletionOutput, prompt: list[int], message: str
) -> None:
    output = RequestOutput(request_id="0", prompt=None, prompt_token_ids=prompt, outputs=[completion])
    with pytest.raises(EngineError, match=message):
        assert_lengths([output], input_len=1, output_len=3)
