"""`tritium build`, and what is built from a well-known shape with random weights."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from tritium.cli.main import app
from tritium.engine.engine import Engine
from tritium.llm import LLM
from tritium.models.encoder_presets import ENCODER_PRESETS
from tritium.models.presets import PRESETS

DEMO = str(Path(__file__).parents[2] / "examples" / "demo_model")
TINY = {
    **PRESETS["llama-2-7b"],
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
}


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(PRESETS, "tiny-llama", TINY)
    return "tiny-llama"


def tritium(*arguments: str):
    return CliRunner().invoke(app, list(arguments), catch_exceptions=False)


def test_a_checkpoint_becomes_an_engine_and_the_report_says_what_it_is(tmp_path: Path) -> None:
    result = tritium("build", DEMO, "--output", str(tmp_path / "engine"), "--max-model-len", "128", "--json")
    assert result.exit_code == 0, result.stderr
    report, engine = json.loads(result.stdout), Engine.load(tmp_path / "engine", verify=True)
    assert report["engine"] == str(tmp_path / "engine")
    assert report["config"]["max_model_len"] == report["max_model_len"] == engine.manifest.max_model_len == 128
    assert report["steps"] == len(engine.plan.steps)
    assert report["bytes"] == sum(path.stat().st_size for path in engine.path.iterdir() if path.name != "manifest.json")
    assert {"capture", "optimise", "write"} <= report["timings"].keys()
    ran = tritium("run", str(engine.path), "--prompt", "import ", "--max-tokens", "3", "--temperature", "0", "--json")
    assert len(json.loads(ran.stdout)["outputs"][0]["token_ids"]) == 3


def test_a_shape_with_random_weights_needs_no_weights_file(tiny: str, tmp_path: Path) -> None:
    result = tritium("build", "--arch", tiny, "--dummy-weights", "--dtype", "float32", "--output", str(tmp_path / "e"))
    assert result.exit_code == 0, result.stderr
    assert result.stdout == ""
    assert result.stderr.splitlines()[-1].startswith(f"built {tmp_path / 'e'}: ")
    manifest = Engine.load(tmp_path / "e").manifest
    assert (manifest.dtype, manifest.dummy_seed is not None) == ("float32", True)
    assert sum(file.size for file in manifest.files.values()) < 1 << 20


def test_an_encoders_shape_becomes_an_engine_that_embeds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    small = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    monkeypatch.setitem(ENCODER_PRESETS, "tiny-bert", {**ENCODER_PRESETS["bert-base"], **small})
    arguments = ["--arch", "tiny-bert", "--dummy-weights", "--dtype", "bfloat16", "--max-model-len", "64"]
    result = tritium("build", *arguments, "--output", str(tmp_path / "engine"))
    assert result.exit_code == 0, result.stderr
    manifest = Engine.load(tmp_path / "engine").manifest
    assert (manifest.kind, manifest.dtype, manifest.max_model_len) == ("encoder", "bfloat16", 64)
    with LLM(tmp_path / "engine", max_num_seqs=2, max_num_batched_tokens=64, num_threads=1) as llm:
        (output,) = llm.embed([[5, 6, 7]], pooling="mean", use_progress=False)
    assert len(output.outputs.embedding) == 32


def test_throughput_of_a_shape_is_measured_without_leaving_an_engine(tiny: str, tmp_path: Path) -> None:
    sizes = ["--num-prompts", "3", "--input-len", "9", "--output-len", "4", "--max-model-len", "32"]
    result = tritium("bench", "throughput", "--arch", tiny, "--dummy-weights", *sizes, "--json")
    report = json.loads(result.stdout)
    assert report["config"]["dtype"] == "bfloat16"
    assert report["config"]["max_model_len"] == 32
    assert not Path(report["config"]["engine"]).exists()
    assert report["tpot_seconds"].keys() == {"mean", "p50", "p90", "p99"}


def test_a_build_that_fails_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"architectures": ["Wav2Vec2Model"]}')
    save_file({"weight": torch.ones(1)}, tmp_path / "model" / "model.safetensors")
    result = tritium("build", str(tmp_path / "model"), "--output", str(tmp_path / "engine"), "--json")
    assert result.exit_code == 1
    error = json.loads(result.stdout)["error"]
    assert error["type"] == "UnsupportedModel" and "Wav2Vec2Model" in error["message"]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
