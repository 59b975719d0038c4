"""docs/migrate.md names nothing of ours that is not there."""

import dataclasses
import re
from pathlib import Path

import typer

from tritium.cli.main import app
from tritium.config import BuildConfig, RuntimeConfig
from tritium.sampling_params import SamplingParams

TEXT = (Path(__file__).parents[1] / "docs" / "migrate.md").read_text(encoding="utf-8")


def names(section: str, column: int) -> set[str]:
    """What stands in backquotes in a column of a section's tables."""
    body = TEXT.split(f"## {section}", 1)[1].split("\n## ")[0]
    rows = [line.split("|") for line in body.splitlines() if line.startswith("|")]
    return {name for row in rows for name in re.findall(r"`([^`]+)`", row[column])}


def test_every_serve_flag_on_our_side_exists() -> None:
    command = typer.main.get_command(app).commands["serve"]  # type: ignore[attr-defined]
    known = {option for parameter in command.params for option in parameter.opts}
    flags = {name for name in names("`vllm serve`", 2) if name.startswith("--")}
    assert len(flags) >= 5
    assert flags <= known


def test_every_field_of_sampling_params_is_in_the_table() -> None:
    fields = {field.name for field in dataclasses.fields(SamplingParams)}
    assert fields - {"logits_processors"} <= names("`SamplingParams`", 1)


def test_every_option_of_the_runtime_is_named_and_every_option_named_exists() -> None:
    runtime = {field.name for field in dataclasses.fields(RuntimeConfig)}
    build = {field.name for field in dataclasses.fields(BuildConfig)}
    ours = names("`LLM(...)`", 2)
    assert {"dtype", "scheme", "disabled_passes", "kv_cache_memory", "policy", "max_num_seqs"} <= ours & (
        runtime | build
    )
    assert runtime - {"num_threads"} <= ours | names("`LLM(...)`", 1)
