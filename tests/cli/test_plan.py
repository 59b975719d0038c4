"""`tritium plan` says before anything is loaded what a process then allocates."""

import gc
import json

import pytest
import torch
from typer.testing import CliRunner

from tritium.cli.main import app
from tritium.cli.plan_command import Planned, predict
from tritium.compiler import build
from tritium.config import RuntimeConfig, available_memory
from tritium.models.hf_config import parse_config
from tritium.runtime.encoder_runner import EncoderRunner
from tritium.runtime.executor import Executor
from tritium.testing.stateless_models import ImageClassifier
from tritium.testing.tiny_configs import TINY_MODELS
from tritium.testing.tiny_encoders import make_encoder

WIDE = {"vocab_size": 4096, "num_hidden_layers": 3, "max_position_embeddings": 2048}
SHAPES = {
    "llama in bf16": ("llama", "bfloat16", {**WIDE, "hidden_size": 512, "intermediate_size": 1536, "head_dim": 64}),
    "llama in fp32": ("llama", "float32", {**WIDE, "hidden_size": 384, "intermediate_size": 1024, "head_dim": 48}),
    "tied embeddings": ("qwen2", "bfloat16", {**WIDE, "hidden_size": 512, "intermediate_size": 1024}),
    "windows": ("mistral", "float32", {**WIDE, "hidden_size": 512, "intermediate_size": 2048, "head_dim": 64}),
    "gpt-j": (
        "gptj",
        "bfloat16",
        {"vocab_size": 4096, "n_embd": 512, "n_layer": 3, "n_inner": 2048, "n_head": 8, "n_positions": 2048},
    ),
}
RUNTIME = RuntimeConfig(max_num_seqs=16, max_num_batched_tokens=256, kv_cache_memory=96 << 20, num_threads=1)


def allocated() -> dict[int, int]:
    """Bytes of every storage that a living tensor holds, by address."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, torch.nn.Parameter)]
    storages = [tensor.untyped_storage() for tensor in tensors if tensor.device.type == "cpu"]
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


@pytest.mark.parametrize("shape", SHAPES)
def test_the_prediction_is_within_two_per_cent_of_what_is_then_allocated(shape, tmp_path):
    family, dtype, sizes = SHAPES[shape]
    config = parse_config(TINY_MODELS[family] | sizes, shape, dtype=dtype)
    engine = build(config, output_dir=tmp_path / "engine", weights="dummy")
    planned = Planned(engine.plan, engine.manifest.max_model_len, True, dtype)
    predicted = predict(planned, RUNTIME, available_memory())
    before = allocated()
    executor = Executor(engine, RUNTIME)
    after = allocated()
    taken = sum(size for address, size in after.items() if address not in before)
    assert executor.memory == predicted.memory
    assert abs(taken - predicted.total_bytes) <= 0.02 * predicted.total_bytes


@pytest.mark.full
def test_a_rank_takes_its_part_and_has_room_for_as_much_more():
    flags = ["plan", "--arch", "llama-3.2-1b", "--gpu", "l40s", "--json"]
    alone = CliRunner().invoke(app, flags)
    shared = CliRunner().invoke(app, [*flags, "--tensor-parallel", "2"])
    assert alone.exit_code == shared.exit_code == 0
    one, half = json.loads(alone.stdout), json.loads(shared.stdout)
    assert half["config"]["tensor_parallel"] == 2
    assert half["weights_bytes"] == pytest.approx(one["weights_bytes"] / 2, rel=0.01)
    assert half["num_tokens"] > 2 * one["num_tokens"]


def test_a_shape_is_planned_without_weights_and_its_figures_add_up():
    result = CliRunner().invoke(app, ["plan", "--arch", "llama-3.2-1b", "--memory", str(8 << 30), "--json"])
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    assert found["total_bytes"] == found["weights_bytes"] + found["arena_bytes"] + found["kv_bytes"]
    assert found["workspace_bytes"] == 0
    parameters = 1_235_814_400  # of the published checkpoint; the tied embedding is read plain and packed
    assert found["weights_bytes"] == pytest.approx(2 * (parameters + 128_256 * 2048), rel=1e-3)
    assert found["num_tokens"] == (found["kv_blocks"] - 1) * found["config"]["block_size"]


def test_a_table_in_8_bits_counts_a_byte_for_each_number_and_its_scales():
    flags = ["--arch", "llama-3.2-1b", "--scheme", "w8a16", "--quantize-embedding", "--memory", str(8 << 30), "--json"]
    result = CliRunner().invoke(app, ["plan", *flags])
    assert result.exit_code == 0 and json.loads(result.stdout)["weights_bytes"] == pytest.approx(
        1_235_814_400 + 128_256 * 2048, rel=5e-3
    )


def test_what_does_not_fit_is_one_line_with_the_numbers_and_exit_code_1():
    result = CliRunner().invoke(app, ["plan", "--arch", "llama-3.2-1b", "--memory", "1000000000"])
    assert result.exit_code == 1
    line = result.stderr.strip().splitlines()[-1]
    assert line.startswith("error: the model does not fit: memory available 1.00 GB, weights 3.00 GB")


def test_a_gpu_is_planned_without_one_from_the_bytes_it_has():
    arguments = ["plan", "--arch", "llama-3-8b", "--device", "cuda", "--scheme", "fp8", "--json"]
    found = json.loads(CliRunner().invoke(app, [*arguments, "--memory", str(80 << 30)]).stdout)
    assert (found["config"]["device"], found["config"]["dtype"]) == ("cuda", "bfloat16")
    assert found["weights_bytes"] == pytest.approx(8.03e9 + 2 * 128_256 * 4096, rel=0.15)  # embeddings stay in bf16
    left = (79 << 30) - found["weights_bytes"] - found["arena_bytes"]
    assert found["kv_bytes"] <= 0.9 * left
    refused = json.loads(CliRunner().invoke(app, arguments).stdout)["error"]
    assert (refused["type"], "there is no GPU here; say by --gpu which" in refused["message"]) == ("ConfigError", True)


def test_a_gpu_that_is_named_is_planned_with_everything_that_it_would_hold():
    arguments = ["plan", "--arch", "llama-3-8b", "--max-num-seqs", "512", "--json"]
    found = json.loads(CliRunner().invoke(app, [*arguments, "--gpu", "h200", "--scheme", "fp8"]).stdout)
    assert (found["config"]["device"], found["config"]["memory"]) == ("cuda", 1397 * (1 << 30) // 10 - (600 << 20))
    parts = ("weights", "arena", "kv", "workspace")
    assert found["total_bytes"] == sum(found[f"{part}_bytes"] for part in parts) < found["config"]["memory"]
    tables = 512 * -(-found["max_model_len"] // 16) * 4
    decode = (264 // 8) * 32 * 16 * (128 + 2) * 4  # 16 parts of as many contexts as leave an H100's SMs without work
    hopper = 256 << 20  # heads of 128: the prompts' keys and values in the tensor cores' order
    known = (64 << 20) + tables + decode
    assert known + hopper < found["workspace_bytes"] < known + hopper + (4 << 20)
    refused = json.loads(CliRunner().invoke(app, [*arguments, "--gpu", "a100", "--scheme", "fp8"]).stdout)["error"]
    assert refused["message"].startswith("gpu.rms_norm_fp8 needs compute capability 8.9, and A100 80 GB has 8.0: build")
    small = json.loads(CliRunner().invoke(app, [*arguments, "--gpu", "a100", "--scheme", "w8a8"]).stdout)
    tables = 512 * -(-small["max_model_len"] // 16) * 4
    assert small["workspace_bytes"] < (64 << 20) + tables + decode + (4 << 20)  # no Hopper
    assert small["weights_bytes"] == pytest.approx(found["weights_bytes"] - 128_256 * 4096, rel=0.01)  # the head


def test_what_a_mixture_of_experts_keeps_on_a_gpu_beside_the_arena_is_planned():
    arguments = ["plan", "--arch", "mixtral-8x7b", "--gpu", "h200", "--max-num-seqs", "64", "--json"]
    found = json.loads(CliRunner().invoke(app, [*arguments, "--max-num-batched-tokens", "8000"]).stdout)
    choices = 2 * 8192  # top 2; buffers are made for powers of two, of which all together take twice the largest
    experts = 2 * choices * ((4096 + 14336) * 2 + 24)
    attention = (256 << 20) + (264 // 8) * 32 * 16 * (128 + 2) * 4
    tables = 64 * -(-found["max_model_len"] // 16) * 4
    known = (64 << 20) + attention + experts + tables
    assert 0.999 * known < found["workspace_bytes"] < known + (4 << 20)
    assert found["total_bytes"] < found["config"]["memory"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--gpu", "b300"], "--gpu 'b300' is not known: it is one of h200, h100, a100, l40s, or say --memory"),
        (["--gpu", "h100", "--memory", "5"], "--gpu h100 and --memory 5 both say how much there is: give one"),
    ],
)
def test_a_gpu_that_cannot_be_planned_is_refused_with_what_to_say(given: list[str], message: str):
    result = CliRunner().invoke(app, ["plan", "--arch", "llama-3.2-1b", *given])
    assert result.exit_code == 1 and message in result.stderr


def test_a_scheme_shows_in_the_weights():
    arguments = ["plan", "--arch", "llama-3.2-1b", "--memory", str(8 << 30), "--json"]
    plain, small = (
        json.loads(CliRunner().invoke(app, [*arguments, *more]).stdout) for more in ([], ["--scheme", "w4a16_g128"])
    )
    assert small["weights_bytes"] < 0.6 * plain["weights_bytes"]


def test_an_engine_is_planned_from_its_own_plan(tmp_path):
    config = parse_config(TINY_MODELS["llama"], "llama", dtype="float32")
    engine = build(config, output_dir=tmp_path / "engine", weights="dummy")
    result = CliRunner().invoke(app, ["plan", str(engine.path), "--json"])
    assert json.loads(result.stdout)["config"]["dtype"] == "float32"


def test_a_memory_of_nothing_is_refused_by_name():
    result = CliRunner().invoke(app, ["plan", "--arch", "llama-3.2-1b", "--memory", "0"])
    assert result.exit_code == 1
    assert "--memory must be a number of bytes from 1 on, not 0" in result.stderr


def test_an_encoder_is_planned_without_a_cache_as_its_runner_lays_it_out(tmp_path):
    path, _ = make_encoder(tmp_path / "model", "BertModel")
    engine = build(path, output_dir=tmp_path / "engine")
    runner = EncoderRunner(engine, RUNTIME)
    laid_out = runner._runner._arena_bytes
    runner.close()
    result = CliRunner().invoke(
        app, ["plan", str(engine.path), "--max-num-seqs", "16", "--max-num-batched-tokens", "256", "--json"]
    )
    planned = json.loads(result.stdout)
    assert planned["max_model_len"] == 72 and not {"kv_bytes", "kv_blocks", "num_tokens"} & planned.keys()
    assert planned["arena_bytes"] == laid_out > 0
    assert planned["weights_bytes"] + laid_out == planned["total_bytes"]
    said = CliRunner().invoke(app, ["plan", str(engine.path)])
    assert "512 tokens at once, of up to 64 texts" in said.stdout and "KV cache" not in said.stdout


@pytest.mark.full
def test_an_encoder_is_planned_for_a_gpu_that_is_not_here():
    arguments = ["plan", "--arch", "bert-base", "--dtype", "float16", "--max-num-batched-tokens", "16384", "--json"]
    planned = json.loads(CliRunner().invoke(app, [*arguments, "--gpu", "l40s"]).stdout)
    assert planned["config"]["device"] == "cuda" and planned["workspace_bytes"] > 64 << 20
    assert 2 * 109e6 < planned["weights_bytes"] < 2 * 110e6  # BERT-base has 109.5 million parameters
    widest = 16384 * 2 * (3072 + 3072)  # what the activation reads and writes
    assert widest < planned["arena_bytes"] < 2 * widest
    refused = CliRunner().invoke(app, ["plan", "--arch", "bert-base", "--device", "cuda", "--memory", "1000000000"])
    assert refused.exit_code == 1 and "the model does not fit: memory available" in refused.stderr


def test_a_stateless_module_is_not_planned_and_that_is_said(tmp_path):
    example = {"image": torch.zeros(1, 3, 32, 32)}
    engine = build(ImageClassifier().eval(), example_inputs=example, output_dir=tmp_path / "engine")
    result = CliRunner().invoke(app, ["plan", str(engine.path)])
    assert result.exit_code == 1
    assert (
        f"{engine.path} is a stateless module" in result.stderr and "decoders and encoders are planned" in result.stderr
    )
