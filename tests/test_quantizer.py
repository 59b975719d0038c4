"""`quantize`: methods that learn from a text, engines that keep what was learned, going on after an interruption."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tritium import quantizer
from tritium.calibrate.calibrate import Calibration, calibrate
from tritium.calibrate.engine_logits import EngineLogits
from tritium.calibrate.gptq import gptq
from tritium.calibrate.smoothing import rounded, smoothing_vector
from tritium.calibrate.work_dir import WorkDir
from tritium.compiler import build
from tritium.engine.recipe_file import read_recipes
from tritium.errors import ConfigError, EngineError
from tritium.ops.quantized import dequantize_weight, quantize_rows
from tritium.passes.smooth import SMOOTHING
from tritium.quant.schemes import INT8, WeightFormat, scheme_named
from tritium.quant.weights import quantize_weight
from tritium.quantizer import quantize
from tritium.testing.plain_models import PlainLlama
from tritium.testing.tiny_encoders import encoder_directory
from tritium.testing.tiny_models import TINY_MODELS, make_checkpoint, random_prompt
from tritium.testing.tiny_tokenizers import byte_level_bpe, write_directory
from tritium.weights.recipe_json import from_json, to_json
from tritium.weights.recipes import Checkpoint, Constant, Quantized, Scaled, Scales, describe

G32 = WeightFormat("int4", 32)
WINDOWS = [random_prompt(24, seed=seed) for seed in range(4)]


def outlier_rows(num_rows: int = 256, num_in: int = 128) -> torch.Tensor:
    rows = torch.randn(num_rows, num_in)
    rows[:, ::16] *= 30
    return rows


def learn(module: PlainLlama, method: str, work: WorkDir | None = None, scheme: str = "w4a8_g32") -> dict:
    wanted = Calibration(method=method, scheme=scheme_named(scheme), left_out=(), windows=WINDOWS)  # type: ignore[arg-type]
    return calibrate(module, lambda name: module.get_parameter(name).detach(), wanted, work or WorkDir(None, ""))


@pytest.fixture(scope="module")
def module() -> PlainLlama:
    torch.manual_seed(3)
    return PlainLlama(size=128, num_heads=4, intermediate=288)


@pytest.fixture(scope="module")
def learned(module: PlainLlama) -> dict[str, dict[str, torch.Tensor]]:
    return {method: learn(module, method) for method in ("smoothquant", "awq", "gptq")}


@pytest.mark.parametrize("kept", [INT8, G32, WeightFormat("int4", 128)], ids=lambda kept: kept.name)
def test_gptq_has_less_error_on_its_inputs_than_rounding_to_the_nearest(kept: WeightFormat) -> None:
    rows = outlier_rows() @ torch.randn(128, 128)  # inputs that depend on each other
    weight = torch.randn(48, 128)
    numbers, scales = gptq(weight, rows.t() @ rows, kept)

    def error(other: torch.Tensor) -> float:
        return float((rows @ (other - weight).t()).square().sum())

    assert error(dequantize_weight(numbers, scales)) < 0.7 * error(rounded(weight, kept))


def test_gptq_rounds_to_scales_as_they_count() -> None:
    """Inputs that do not depend on each other have nothing to make up for: each number is the nearest to its weight,
    also where a group's scale is a few steps of its output's largest."""
    weight = torch.randn(64, 128) * torch.logspace(0, -2.5, 4).repeat_interleave(32)
    numbers, scales = gptq(weight, torch.eye(128), G32)
    assert torch.equal(numbers, quantize_weight(weight, scales, G32))


def test_gptq_survives_inputs_that_are_always_zero_and_too_few_rows() -> None:
    rows = torch.randn(3, 128)
    rows[:, 40:] = 0
    numbers, scales = gptq(torch.randn(8, 128), rows.t() @ rows, G32)
    assert torch.isfinite(dequantize_weight(numbers, scales)).all()


@pytest.mark.parametrize("method", ["smoothquant", "awq"])
def test_a_smoothing_vector_has_less_error_than_none(method: str) -> None:
    rows, weight = outlier_rows(), torch.randn(48, 128)
    vector = smoothing_vector(rows, [(weight, INT8)], method, int8_activations=True)  # type: ignore[arg-type]

    def error(by: torch.Tensor) -> float:
        numbers, steps = quantize_rows(rows / by)
        return float((numbers.float() * steps @ rounded(weight * by, INT8).t() - rows @ weight.t()).square().sum())

    assert error(vector) < 0.5 * error(torch.ones(128)) and (vector > 0).all()


def test_channels_that_are_always_zero_are_left_as_they_are() -> None:
    rows = outlier_rows()
    rows[:, 5] = 0
    assert smoothing_vector(rows, [(torch.randn(8, 128), INT8)], "awq", int8_activations=True)[5] == 1


def test_each_method_learns_what_it_is_for(learned) -> None:
    ends = {method: {name.rpartition(":")[2] for name in found} for method, found in learned.items()}
    assert ends == {"smoothquant": {"smoothing"}, "awq": {"smoothing", "importance"}, "gptq": {"numbers", "scales"}}
    assert sum(name.endswith(SMOOTHING) for name in learned["awq"]) == 5  # two norms a layer, and the last


@pytest.mark.parametrize("method", ["smoothquant", "awq", "gptq"])
def test_an_engine_follows_its_method_and_is_close_to_the_model(method, module, learned, tmp_path) -> None:
    options = {"max_model_len": 64, "scheme": "w4a8_g32"}
    engine = build(module, output_dir=tmp_path / "engine", calibration=learned[method], **options)
    plain = build(module, output_dir=tmp_path / "plain", max_model_len=64)
    rounded_engine = build(module, output_dir=tmp_path / "rtn", **options)
    assert engine.manifest.calibration == ("numbers" if method == "gptq" else "vectors")
    assert rounded_engine.manifest.calibration is None and engine.manifest.matches.get("smooth", 0) == 5 * (
        method != "gptq"
    )
    found, expected, nearest = (EngineLogits(e, 32).logits(WINDOWS[0]) for e in (engine, plain, rounded_engine))
    assert not torch.equal(found, nearest)
    assert (found - expected).norm() < 1.2 * (nearest - expected).norm()


def test_smoothing_alone_changes_nothing_but_rounding(module, learned, tmp_path) -> None:
    vectors = {name: v for name, v in learned["awq"].items() if name.endswith(SMOOTHING)}
    smoothed = build(module, output_dir=tmp_path / "a", calibration=vectors, max_model_len=64)
    plain = build(module, output_dir=tmp_path / "b", max_model_len=64)
    found, expected = (EngineLogits(engine, 32).logits(WINDOWS[0]) for engine in (smoothed, plain))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_a_calibration_that_was_stopped_goes_on_behind_its_last_layer(method, module, learned, tmp_path) -> None:
    class Stopped(Exception):
        pass

    class Once(WorkDir):
        def add(self, results, place, values) -> None:
            super().add(results, place, values)
            if len(list(tmp_path.glob("results-*"))) == 2:
                raise Stopped

    with pytest.raises(Stopped):
        learn(module, method, Once(tmp_path, "key"))
    seen = []
    wanted = Calibration(method=method, scheme=scheme_named("w4a8_g32"), left_out=(), windows=WINDOWS)
    read = lambda name: seen.append(name) or module.get_parameter(name).detach()  # noqa: E731
    found = calibrate(module, read, wanted, WorkDir(tmp_path, "key"))
    assert found.keys() == learned[method].keys()
    assert all(torch.equal(found[name], learned[method][name]) for name in found)
    assert not any(name.startswith("layers.0.") for name in seen)
    assert WorkDir(tmp_path, "another").results == {} and not list(tmp_path.glob("results-*"))


@pytest.mark.parametrize("method", ["smoothquant", "awq"])
def test_a_refit_equals_a_build_given_the_same_calibration_and_says_it_is_stale(method, learned, tmp_path) -> None:
    torch.manual_seed(3)
    old, new = (PlainLlama(size=128, num_heads=4, intermediate=288) for _ in range(2))
    options = {"max_model_len": 64, "scheme": "w4a8_g32", "calibration": learned[method]}
    refit = build(old, output_dir=tmp_path / "old", **options)
    assert not refit.manifest.is_calibration_stale
    refit = refit.refit(new.state_dict())
    fresh = build(new, output_dir=tmp_path / "new", **options)
    assert refit.weights_path.read_bytes() == fresh.weights_path.read_bytes()
    assert refit.manifest.is_calibration_stale and not fresh.manifest.is_calibration_stale


def test_a_refit_of_gptqs_numbers_is_refused(module, learned, tmp_path) -> None:
    engine = build(module, output_dir=tmp_path / "e", max_model_len=64, scheme="w4a8_g32", calibration=learned["gptq"])
    names = [name for name, tree in read_recipes(engine.path).items() if tree == Constant(name)]
    assert any(name.endswith(".int4") for name in names) and set(load_file(engine.weights_path)) >= set(names)
    assert not any(name.endswith((":numbers", ":scales")) for name in load_file(engine.weights_path))  # kept once
    with pytest.raises(EngineError, match=r"/e: its weights are the numbers that GPTQ made .* with `tritium quantize`"):
        engine.refit(module.state_dict())


def test_the_recipes_are_read_as_they_were_written() -> None:
    vector = Constant("a:importance")
    scaled = Scaled(Checkpoint("a", (8, 64)), Constant("n:smoothing"), True, 1.0)
    for tree in (Quantized(scaled, G32, vector), Scales(scaled, G32, vector), Scales(scaled, G32)):
        assert from_json(json.loads(json.dumps(to_json(tree)))) == tree
    assert describe(scaled) == "scaled(a, 1 / n:smoothing)"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "gptq"}, r"method='gptq' learns from a text: give calibration_text \(--calibration FILE\)"),
        ({"method": "rtn", "calibration_text": "x"}, r"method='rtn' needs no text"),
        ({"method": "hqq"}, r"method must be one of rtn, smoothquant, awq, gptq, static, not 'hqq'"),
        ({"method": "awq", "calibration_text": "none.txt"}, r"calibration text none.txt cannot be read"),
        ({"method": "awq", "calibration_text": "none.txt", "num_tokens": 1}, r"num_tokens must be an integer from 2"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options: dict, message: str, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "model")
    with pytest.raises(ConfigError, match=message):
        quantize(checkpoint, output_dir=tmp_path / "engine", scheme="w8a8", **options)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"calibration text .*text has 0 bytes: expected 1 to 67108864"),
        ("a", r"calibration text .*text has 1 tokens, too few to learn from"),
    ],
)
def test_what_no_method_learns_from_is_refused(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "text").write_text(content)
    checkpoint = make_checkpoint(tmp_path / "model", TINY_MODELS["llama"] | {"vocab_size": 400})
    write_directory(checkpoint, byte_level_bpe(), {"eos_token": "<|end|>"})
    options = {"scheme": "w8a8", "method": "awq", "calibration_text": tmp_path / "text"}
    with pytest.raises(ConfigError, match=message):
        quantize(checkpoint, output_dir=tmp_path / "e", **options)


def test_an_encoder_has_no_scheme_to_learn_for(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("some words")
    checkpoint, _ = encoder_directory(tmp_path / "model", "BertModel")
    with pytest.raises(ConfigError, match=r"model is an encoder: schemes are for decoders"):
        quantize(checkpoint, output_dir=tmp_path / "e", scheme="w8a8", method="awq", calibration_text=tmp_path / "text")


def test_a_model_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("some words")
    checkpoint = make_checkpoint(tmp_path / "model")
    with pytest.raises(
        ConfigError, match=r"model has no tokenizer.json, without which a text is no tokens: put the one .* beside"
    ):
        quantize(checkpoint, output_dir=tmp_path / "e", scheme="w8a8", method="awq", calibration_text=tmp_path / "text")


def test_a_start_after_an_interruption_takes_nothing_that_other_weights_gave(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TINY_MODELS["llama"] | {"vocab_size": 400, "max_position_embeddings": 64}
    text = tmp_path / "text"
    text.write_text("The quick brown fox jumps over the lazy dog. ")
    monkeypatch.setattr(quantizer, "build", lambda model, config, *, calibration, **_: calibration)

    def learn_from_files(seed: int, work: Path, **options: Any) -> tuple[dict[str, torch.Tensor], int]:
        checkpoint = make_checkpoint(tmp_path / "model", config, seed=seed)  # the same names, shapes, sizes and path
        write_directory(checkpoint, byte_level_bpe(), {"eos_token": "<|end|>"})
        calls: list[str] = []
        options |= {"scheme": "w8a8", "method": "smoothquant", "calibration_text": text, "work_dir": work}
        progress = lambda stage, *_: calls.append(stage)  # noqa: E731
        found: Any = quantize(checkpoint, output_dir=tmp_path / "engine", progress=progress, **options)
        return found, len(calls)

    first, num_linears = learn_from_files(1, tmp_path / "work")
    again, num_repeated = learn_from_files(1, tmp_path / "work")
    assert 0 < num_repeated < num_linears and all(torch.equal(again[name], first[name]) for name in first)
    other, num_computed = learn_from_files(2, tmp_path / "work")
    assert num_computed == num_linears and not all(torch.equal(other[name], first[name]) for name in first)
    assert learn_from_files(2, tmp_path / "work", dtype="bfloat16")[1] == num_linears
    assert learn_from_files(2, tmp_path / "work", dtype="bfloat16", max_model_len=32)[1] == num_linears
