"""`tritium bench latency`: times of tokens as a reader has them, alone and under load, at forced lengths."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tritium.cli.main import app

DEMO = str(Path(__file__).parents[2] / "examples" / "demo_model")
SIZES = ["--num-prompts", "4", "--input-len", "12", "--output-len", "5", "--max-model-len", "64"]


@pytest.mark.parametrize("load", [["--concurrency", "2"], ["--rate", "200"]])
def test_the_demo_model_is_measured_alone_and_under_load_and_times_add_up(load: list[str]) -> None:
    result = CliRunner().invoke(app, ["bench", "latency", DEMO, *SIZES, *load, "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["config"][load[0].removeprefix("--")] == float(load[1])
    assert len(report["plan_sha256"]) == 64
    for part in (report["alone"], report["loaded"]):
        assert (part["num_requests"], part["prefix_hit_tokens"]) == (4, 0)
        times = [part[f"{name}_seconds"] for name in ("ttft", "itl", "latency")]
        assert all(0 <= values["p50"] <= values["p90"] <= values["p99"] <= part["seconds"] for values in times)
        first, gap, whole = (values["mean"] for values in times)
        assert first > 0 and gap > 0
        assert first + 4 * gap == pytest.approx(whole)
        assert part["output_tokens_per_second"] == pytest.approx(20 / part["seconds"])
    assert report["alone"]["latency_seconds"]["mean"] * 4 <= report["alone"]["seconds"]


def test_for_people_it_says_both_loads() -> None:
    result = CliRunner().invoke(app, ["bench", "latency", DEMO, *SIZES, "--concurrency", "2"], catch_exceptions=False)
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert [line.split(":")[0] for line in lines[::4]] == ["one request at a time", "2 at once"]
    assert [line.split()[0] for line in lines[1:4]] == ["ttft", "itl", "latency"]
    assert "max_model_len" in result.stderr
