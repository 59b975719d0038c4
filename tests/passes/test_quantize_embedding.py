"""The table of tokens in 8 bits: which tables, what a tied head shares with it, and what engines then compute."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tritium.calibrate.engine_logits import EngineLogits
from tritium.compiled import compile_module
from tritium.compiler import build
from tritium.config import BuildConfig, RuntimeConfig
from tritium.engine.engine import Engine
from tritium.engine.obtain import obtain_engine
from tritium.engine.plan import Sizes
from tritium.engine.recipe_file import read_recipes
from tritium.errors import CaptureError, ConfigError
from tritium.inspection.costs import Batch, step_cost
from tritium.ops.quantized import dequantize_weight
from tritium.quant.schemes import INT8
from tritium.quant.weights import quantize_weight, scales_of
from tritium.runtime.footprint import footprint
from tritium.runtime.kernel_choice import choose_kernels
from tritium.runtime.request import Request
from tritium.testing.plain_models import PlainLlama
from tritium.testing.recorder import Recorder, assert_bit_equal, greedy_request
from tritium.testing.tiny_configs import LLAMA
from tritium.testing.tiny_models import make_checkpoint, random_prompt, relative_error
from tritium.weights.recipes import Quantized, Scales
from tritium.weights.safetensors import SafetensorsSource

TABLE = "embed_tokens.weight"
IN_8_BITS: dict[str, Any] = {"quantize_embedding": True, "dtype": "bfloat16"}


def plain() -> PlainLlama:
    torch.manual_seed(0)
    return PlainLlama(size=128, num_heads=4, intermediate=288)


def sizes(engine: Engine) -> dict[str, int]:
    """Bytes of each weight in the engine's file."""
    source = SafetensorsSource(engine.weights_path)
    return {name: source.get(name).nbytes for name in source.names}


def requests() -> list[Request]:
    """Some longer than a step takes."""
    return [greedy_request(f"r{i}", random_prompt(length, seed=i), 4) for i, length in enumerate((1, 7, 30, 33))]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A model with a tied head, twice, with different weights."""
    path = tmp_path_factory.mktemp("models")
    return [make_checkpoint(path / f"{seed}", LLAMA | {"tie_word_embeddings": True}, seed=seed) for seed in (1, 2)]


@pytest.fixture(scope="module")
def tied(checkpoints: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return build(checkpoints[0], output_dir=tmp_path_factory.mktemp("tied") / "e", scheme="w8a8", **IN_8_BITS)


@pytest.fixture(scope="module")
def untouched(checkpoints: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """The same model with its table in bf16."""
    return build(checkpoints[0], output_dir=tmp_path_factory.mktemp("bf16") / "e", scheme="w8a8", dtype="bfloat16")


@pytest.mark.parametrize("scheme", [None, "w4a8_g32"])
def test_the_table_takes_8_bits_with_a_scheme_and_without_one(scheme: str | None) -> None:
    compiled = compile_module(plain(), BuildConfig(scheme=scheme, quantize_embedding=True))  # type: ignore[arg-type]
    (step,) = [step for step in compiled.plan.steps if step.op == "quantized_embedding"]
    assert step.kernel == "cpu.quantized_embedding" and compiled.matches["quantize_embedding"] == 1
    table = compiled.plan.value(step.args["qweight_VD"].value)
    assert (table.dtype, table.shape) == ("int8", (199, 128)) and table.name.endswith("weight.int8")
    assert not any(value.kind == "weight" and value.name == table.name[:-5] for value in compiled.plan.values)


def test_a_tied_head_has_the_tables_recipe_and_the_engine_holds_both_once(tied: Engine) -> None:
    head = tied.plan.steps[-1]
    lookup = next(step for step in tied.plan.steps if step.op == "quantized_embedding")
    assert head.args["qweight"] == lookup.args["qweight_VD"] and head.args["scales_NG"] == lookup.args["scales_V1"]
    recipes, held = read_recipes(tied.path), sizes(tied)
    assert isinstance(recipes[f"{TABLE}.int8"], Quantized) and isinstance(recipes[f"{TABLE}.scales"], Scales)
    assert [name for name in held if TABLE in name] == [f"{TABLE}.int8", f"{TABLE}.scales"]


def test_a_table_that_a_head_does_not_share_is_a_weight_of_its_own(checkpoints: list[Path], tmp_path: Path) -> None:
    engine = build(checkpoints[0], output_dir=tmp_path / "e", **IN_8_BITS)
    held = sizes(engine)
    assert held[TABLE] == 2 * held[f"{TABLE}.int8"] == 64 * held[f"{TABLE}.scales"] // 2


def test_memory_and_cost_count_a_byte_for_each_number_and_a_scale_for_each_row() -> None:
    found = {}
    for is_quantized in (False, True):
        plan = compile_module(plain().bfloat16(), BuildConfig(quantize_embedding=is_quantized)).plan
        (step,) = [step for step in plan.steps if "ids_T" in step.args]
        known: dict[str, Any] = {"is_bitwise": True, "engine_max_model_len": 64, "available_bytes": 1 << 30}
        cost = step_cost(plan, step, Batch(Sizes(tokens=8, sequences=1, rows=1), 8)).num_bytes
        found[is_quantized] = footprint(plan, choose_kernels(plan), RuntimeConfig(), **known).weights_bytes, cost
    assert found[False][0] - found[True][0] == 199 * 128 * 2 - 199 * (128 + 4)
    assert found[False][1] == 8 * 128 * 4 and found[True][1] == 8 * (128 * 3 + 4)


def test_logits_are_those_of_the_table_as_it_is_kept_and_near_those_of_the_table_as_it_was(tmp_path: Path) -> None:
    module, window, logits = plain(), random_prompt(40, 199), {}
    kept = scales_of(module.embed.weight.detach(), INT8)
    numbers = quantize_weight(module.embed.weight.detach(), kept, INT8)
    rounded = module.state_dict() | {"embed.weight": dequantize_weight(numbers, kept)}
    for name, options in (("as it was", {}), ("kept", {"quantize_embedding": True}), ("rounded", {"weights": rounded})):
        engine = build(module, output_dir=tmp_path / name, max_model_len=64, **options)  # type: ignore[arg-type]
        logits[name] = EngineLogits(engine, len(window)).logits(window)
    assert torch.equal(logits["kept"], logits["rounded"])
    assert 1e-4 < relative_error(logits["kept"], logits["as it was"]) < 0.02


def test_a_request_has_the_bits_in_company_that_it_has_alone(tied: Engine) -> None:
    config = RuntimeConfig(max_num_seqs=4, max_num_batched_tokens=24, kv_cache_memory=1 << 22, num_threads=1)
    alone: dict[Any, Any] = {}
    for request in requests():
        alone |= Recorder(tied, config).run([request])
    assert_bit_equal(Recorder(tied, config).run(requests()), alone)


def test_a_refit_gives_the_weights_of_a_build(tied: Engine, checkpoints: list[Path], tmp_path: Path) -> None:
    fresh = build(checkpoints[1], output_dir=tmp_path / "fresh", scheme="w8a8", **IN_8_BITS)
    refitted = Engine.load(shutil.copytree(tied.path, tmp_path / "refitted"))
    refitted.refit(checkpoints[1])
    refitted = Engine.load(refitted.path)
    assert refitted.weights_path is not None and fresh.weights_path is not None
    assert refitted.weights_path.read_bytes() == fresh.weights_path.read_bytes()


def test_what_unquantized_names_stays_and_a_model_without_such_a_table_is_refused() -> None:
    config = BuildConfig(scheme="w8a8", quantize_embedding=True, unquantized=("embed.weight",))
    with pytest.raises(
        CaptureError, match=r"quantize_embedding=True: .* no table .*'embed.weight'.*; build without it"
    ):
        compile_module(plain(), config)


def test_what_cannot_have_it_is_refused_by_name(tied: Engine, untouched: Engine, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"quantize_embedding=True is for device='cpu', not for 'cuda'.*leave it out"):
        BuildConfig(quantize_embedding=True, device="cuda")
    with pytest.raises(ConfigError, match=r"tensor_parallel=2 does not go with quantize_embedding=True"):
        BuildConfig(quantize_embedding=True, tensor_parallel=2)
    with pytest.raises(ConfigError, match=r"quantize_embedding must be True or False, not 'int4'"):
        BuildConfig(quantize_embedding="int4")  # type: ignore[arg-type]
    with pytest.raises(
        ConfigError, match=r"quantize_embedding=True: the engine .* was built without it; build another"
    ):
        obtain_engine(untouched.path, BuildConfig(quantize_embedding=True), build=lambda *_: None)
    assert obtain_engine(tied.path, BuildConfig(quantize_embedding=True), build=lambda *_: None) == tied.path
    linear = torch.nn.Linear(4, 4)
    with pytest.raises(ConfigError, match=r"quantize_embedding=True has no meaning for a stateless module"):
        build(linear, output_dir=tmp_path / "e", example_inputs={"input": torch.ones(2, 4)}, quantize_embedding=True)
