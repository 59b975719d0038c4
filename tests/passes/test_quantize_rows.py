"""Linears of rows in 8 bits, for GPUs: what the pass leaves, what its recipes give; the kernels are in tests/gpu."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tritium.calibrate.calibrate import Calibration, calibrate
from tritium.calibrate.engine_logits import EngineLogits
from tritium.calibrate.work_dir import WorkDir
from tritium.compiled import compile_module
from tritium.compiler import build
from tritium.config import BuildConfig
from tritium.errors import CaptureError, CheckpointError, ConfigError
from tritium.models.create import create
from tritium.models.presets import preset
from tritium.ops import op_named
from tritium.ops.fp8 import quantize_fp8
from tritium.quant.schemes import scheme_named
from tritium.quantizer import quantize
from tritium.testing.plain_models import PlainLlama
from tritium.testing.tiny_models import random_prompt, relative_error
from tritium.weights.dummy import is_kept_of_dummies
from tritium.weights.recipe_json import from_json, to_json
from tritium.weights.recipes import Concat, evaluate, leaves
from tritium.weights.source import ModuleSource


def test_each_weight_is_the_numbers_and_scales_of_its_parts_one_after_the_other() -> None:
    torch.manual_seed(0)
    module = PlainLlama(size=128, num_heads=4, intermediate=288)
    compiled = compile_module(module, BuildConfig(scheme="fp8", device="cuda"))
    names = [step.args["weight_NK"].value for step in compiled.plan.steps if step.op == "linear_fp8"]
    assert any(isinstance(compiled.weights[name], Concat) for name in names)
    for name in names:
        trees = [from_json(to_json(compiled.weights[f"{name}{end}"])) for end in ("", "_scales")]
        parts = [module.get_parameter(leaf.name).detach() for leaf in leaves(trees[0])]
        numbers, scales = quantize_fp8(torch.cat(parts))
        found, found_scales = (evaluate(tree, ModuleSource(module)) for tree in trees)
        assert torch.equal(found.view(torch.uint8), numbers.view(torch.uint8)), name
        assert torch.equal(found_scales, scales.view(1, -1)), name
        assert not any(is_kept_of_dummies(tree, "cuda") for tree in trees)  # a GPU generates them itself


def small() -> PlainLlama:
    torch.manual_seed(0)
    return PlainLlama(size=128, num_heads=4, intermediate=288)


def test_w8a8_on_a_gpu_quantises_rows_where_they_are_made_the_heads_too() -> None:
    plan = compile_module(small(), BuildConfig(scheme="w8a8", device="cuda")).plan
    ops = [step.op for step in plan.steps]
    assert "linear" not in ops and "quantized_linear" not in ops
    assert ops.count("linear_int8") == 2 * 4 + 1  # qkv, output, gate and up, down; and the head
    assert {op for op in ops if op.endswith("_int8")} == {
        "linear_int8", "rms_norm_int8", "add_rms_norm_int8", "gated_activation_int8", "quantize_int8",
    }  # fmt: skip
    assert {step.kernel for step in plan.steps if step.op == "linear_int8"} == {"gpu.linear_int8"}


def test_in_fp8_an_attention_and_the_mlp_beside_it_leave_through_one_linear() -> None:
    config = replace(
        preset("gpt-j-6b", dtype="bfloat16", max_model_len=64), num_layers=2, windows=(0, 0), vocab_size=256
    )
    module = create(config)
    model = compile_module(module, BuildConfig(scheme="fp8", device="cuda"))
    ops = [step.op for step in model.plan.steps]
    assert ops.count("activation_pair_fp8") == 2 and "add" not in ops and "activation_fp8" not in ops
    pair = next(step for step in model.plan.steps if step.op == "activation_pair_fp8")
    linear = model.plan.steps[model.plan.steps.index(pair) + 1]
    tree = model.weights[linear.args["weight_NK"].value]
    names = ("layers.0.attention.o_proj.weight", "layers.0.mlp.down_proj.weight")
    assert tuple(leaf.name for leaf in leaves(tree)) == names
    left_out = BuildConfig(scheme="fp8", device="cuda", unquantized=("*.o_proj.weight",))
    assert "activation_pair_fp8" not in [step.op for step in compile_module(module, left_out).plan.steps]


@pytest.mark.parametrize("scheme", ["w8a16", "w4a16_g128"])
def test_weights_alone_are_quantised_on_a_gpu_as_on_a_cpu(scheme: str) -> None:
    plans = [compile_module(small(), BuildConfig(scheme=scheme, device=d)).plan for d in ("cuda", "cpu")]  # type: ignore[arg-type]
    weights = [{v.name for v in plan.values if v.kind == "weight"} for plan in plans]
    assert weights[0] == weights[1]
    kernels = {step.kernel for step in plans[0].steps if step.op == "quantized_linear"}
    assert kernels == {"gpu.quantized_linear"}


@pytest.mark.parametrize("scheme", ["w8a8", "fp8"])
def test_tensors_that_are_left_out_stay(scheme: str) -> None:
    config = BuildConfig(scheme=scheme, device="cuda", unquantized=("*.down.weight",))  # type: ignore[arg-type]
    steps = compile_module(small(), config).plan.steps
    assert sum("down" in step.args["weight_NK"].value for step in steps if step.op == "linear") == 2
    with pytest.raises(CaptureError, match=rf"scheme='{scheme}': there is no linear to quantise .*\('\*',\)"):
        compile_module(small(), replace(config, unquantized=("*",)))


@pytest.mark.parametrize(("scheme", "allowed"), [("w8a8", 0.02), ("w8a16", 1e-6), ("fp8", 0.1)])
def test_an_engine_for_a_gpu_computes_by_references_what_the_scheme_says(
    scheme: str, allowed: float, tmp_path: Path
) -> None:
    """Against the CPU's engine of the scheme: rounding parts where a norm is quantised before it is rounded; of fp8
    against the model as it is."""
    window = random_prompt(30, 199)
    other = BuildConfig(scheme=None if scheme == "fp8" else scheme)  # type: ignore[arg-type]
    configs = {"gpu": BuildConfig(scheme=scheme, device="cuda"), "cpu": other}  # type: ignore[arg-type]
    logits = []
    for name, config in configs.items():
        engine = build(small(), config, output_dir=tmp_path / name, max_model_len=64)
        logits.append(EngineLogits(engine, len(window)).logits(window))
    assert relative_error(*logits) <= allowed


@pytest.mark.parametrize("scheme", ["w8a8", "fp8"])
def test_a_static_scale_is_the_texts_largest_element_and_takes_the_rows_place(scheme: str, tmp_path: Path) -> None:
    module, windows = small(), [random_prompt(24, seed=seed) for seed in range(3)]
    wanted = Calibration(method="static", scheme=scheme_named(scheme), left_out=(), windows=windows)
    learned = calibrate(module, lambda name: module.get_parameter(name).detach(), wanted, WorkDir(None, ""))
    embedded = module.embed(torch.tensor(windows)).detach()
    largest = module.layers[0].norm_1(embedded).abs().max()
    found = learned["layers.0.q.weight:input_scale"]
    torch.testing.assert_close(found, largest.view(1) / (448 if scheme == "fp8" else 127))
    assert torch.equal(found, learned["layers.0.v.weight:input_scale"])
    assert ("head.weight:input_scale" in learned) == (scheme == "w8a8")
    config = BuildConfig(scheme=scheme, device="cuda", max_model_len=64)  # type: ignore[arg-type]
    engine = build(module, config, calibration=learned, output_dir=tmp_path / "static")
    end = "_fp8" if scheme == "fp8" else "_int8"
    scaled = [step.args.get("scale") for step in engine.plan.steps if step.op.endswith(end) and "linear" not in step.op]
    assert scaled and all(scale is not None for scale in scaled) and engine.manifest.calibration == "vectors"
    plain = build(module, output_dir=tmp_path / "plain", max_model_len=64)
    static, expected = (EngineLogits(e, 24).logits(windows[0]) for e in (engine, plain))
    assert relative_error(static, expected) <= 0.1


@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_a_text_that_gives_no_finite_scale_is_refused_with_the_weight(broken: float) -> None:
    module = small()
    module.layers[0].norm_1.weight.data[3] = broken
    wanted = Calibration(method="static", scheme=scheme_named("w8a8"), left_out=(), windows=[random_prompt(24)])
    with pytest.raises(CheckpointError, match=rf"layers.0.q.weight: the calibration text .* as large as {broken}"):
        calibrate(module, lambda name: module.get_parameter(name).detach(), wanted, WorkDir(None, ""))


def test_static_scales_are_refused_where_no_row_takes_them(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("a b c")
    where = {"output_dir": tmp_path / "e", "calibration_text": tmp_path / "text"}
    with pytest.raises(
        ConfigError, match=r"method='static' is for .*'fp8' or 'w8a8'.*, not for 'w8a8' with device='cpu'"
    ):
        quantize("m", scheme="w8a8", method="static", **where)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"method='awq' is not for scheme='fp8': say 'rtn' or 'static'"):
        quantize("m", scheme="fp8", device="cuda", method="awq", **where)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["fp8", "int8"])
def test_a_row_with_an_infinity_or_a_nan_has_no_scale_under_a_static_one_either(name: str) -> None:
    x = torch.randn(3, 16)
    x[1, 4], x[2, 5] = torch.inf, torch.nan
    _, scales = op_named(f"quantize_{name}").reference(x, torch.tensor([0.5]))
    assert scales[0] == 0.5 and scales[1:].isnan().all()
