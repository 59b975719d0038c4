"""quantize_norms in whole engines: which norms give int8 rows, and that not a bit of the logits moves."""

from pathlib import Path

import pytest
import torch

from tritium.calibrate.engine_logits import EngineLogits
from tritium.compiled import compile_module
from tritium.compiler import build
from tritium.config import BuildConfig
from tritium.testing.plain_models import PlainLlama
from tritium.testing.tiny_models import random_prompt


def small() -> PlainLlama:
    torch.manual_seed(0)
    return PlainLlama(size=128, num_heads=4, intermediate=288)


def test_every_norm_before_linears_in_int8_gives_its_rows_and_those_of_other_schemes_give_none() -> None:
    ops = [step.op for step in compile_module(small(), BuildConfig(scheme="w4a8_g32")).plan.steps]
    assert [op for op in ops if "norm" in op] == ["quantized_rms_norm"] + ["quantized_add_rms_norm"] * 4
    for scheme in ("w8a16", None):
        plan = compile_module(small(), BuildConfig(scheme=scheme)).plan
        assert not any("quantized" in step.op and "norm" in step.op for step in plan.steps)


def test_a_linear_that_is_left_out_keeps_its_norm_as_it_was() -> None:
    config = BuildConfig(scheme="w8a8", unquantized=("layers.0.q.weight", "layers.0.k.weight", "layers.0.v.weight"))
    ops = [step.op for step in compile_module(small(), config).plan.steps]
    assert [op for op in ops if "norm" in op] == ["rms_norm"] + ["quantized_add_rms_norm"] * 4


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8_g32"])
def test_logits_have_the_same_bits_with_the_pass_and_without(scheme: str, tmp_path: Path) -> None:
    window, logits = random_prompt(40, 199), []
    for disabled in ((), ("quantize_norms",)):
        config = BuildConfig(scheme=scheme, dtype="bfloat16", disabled_passes=disabled, max_model_len=64)  # type: ignore[arg-type]
        engine = build(small().bfloat16(), config, output_dir=tmp_path / f"{len(disabled)}")
        assert any(step.op == "quantized_add_rms_norm" for step in engine.plan.steps) is (not disabled)
        logits.append(EngineLogits(engine, len(window)).logits(window))
    assert torch.equal(*logits)
