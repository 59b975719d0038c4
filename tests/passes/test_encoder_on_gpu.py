"""An encoder's plan for a GPU: every step over tokens has a kernel there, under every scheme; built without a GPU."""

import dataclasses
from collections import Counter
from typing import Any

import pytest

from tritium import models
from tritium.compiled import compile_encoder
from tritium.config import BuildConfig
from tritium.engine.plan import Plan
from tritium.models.encoder_config import EncoderConfig
from tritium.runtime.kernel_choice import candidates, choose_kernels

SHAPE = EncoderConfig(
    architecture="BertModel",
    vocab_size=200,
    hidden_size=128,
    intermediate_size=256,
    num_layers=2,
    num_heads=2,
    num_positions=64,
    num_token_types=2,
    has_pooler=True,
)


def plan_for(**options: Any) -> Plan:
    config = BuildConfig(device="cuda", **options)
    return compile_encoder(models.create_encoder(dataclasses.replace(SHAPE, dtype=config.dtype)), config).plan


@pytest.mark.parametrize(
    ("options", "linear"),
    [
        ({"dtype": "float16"}, "gpu.linear"),
        ({"dtype": "bfloat16", "scheme": "fp8"}, "gpu.linear_fp8"),
        ({"dtype": "float16", "scheme": "w8a8"}, "gpu.linear_int8"),
        ({"dtype": "float16", "scheme": "w8a16"}, "gpu.quantized_linear"),
        ({"dtype": "bfloat16", "scheme": "w4a16_g128"}, "gpu.quantized_linear"),
        ({"dtype": "bfloat16", "invariance": "bitwise"}, "gpu.linear_fixed"),
    ],
)
def test_every_step_but_a_sum_and_a_tanh_has_a_kernel_of_its_own(options: dict[str, Any], linear: str) -> None:
    kernels = Counter(step.kernel for step in plan_for(**options).steps)
    assert kernels[linear] == 4 * 2 + 1  # two layers and the pooler
    assert kernels["gpu.varlen_attention"] == 2
    eager = {"eager.aten.add.Tensor": 1, "eager.aten.tanh.default": 1}
    assert {name: count for name, count in kernels.items() if name.startswith("eager")} == eager


def test_rows_are_quantised_once_for_the_linears_that_read_them() -> None:
    ops = Counter(step.op for step in plan_for(dtype="bfloat16", scheme="fp8").steps)
    assert ops["activation_fp8"] == 2 and ops["quantize_fp8"] == 3 * 2 + 1


def test_the_tuner_may_take_flash_attention_where_it_can_run() -> None:
    def rows(plan: Plan, **options: Any) -> list[str]:
        step = next(step for step in plan.steps if step.op == "varlen_attention")
        return [row.name for row, _ in candidates(plan, step, device="cuda", **options) if row.backend == "gpu"]

    half, whole = plan_for(dtype="float16"), plan_for(dtype="float32")
    both = ["gpu.varlen_attention", "gpu.varlen_attention_flash"]
    assert rows(half, capability=(9, 0)) == both
    assert rows(half, capability=(7, 5)) == rows(whole) == rows(half, is_bitwise=True) == both[:1]
    assert "gpu.varlen_attention_flash" not in {kernel.name for kernel in choose_kernels(half, device="cuda")}
