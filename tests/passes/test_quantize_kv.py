"""The cache in int8: every layer's, once, and the model still says what it said."""

import pytest
import torch

from tritium.compiled import compile_module
from tritium.config import BuildConfig
from tritium.errors import ConfigError
from tritium.ops.quantized import SCALE_BYTES
from tritium.testing.plain_models import PlainLlama


def test_every_layers_cache_has_rows_of_integers_and_a_scale() -> None:
    torch.manual_seed(0)
    module = PlainLlama(size=128, num_heads=4, intermediate=288)
    plain, kept = (compile_module(module, BuildConfig(kv_dtype=name)) for name in ("auto", "int8"))
    assert "quantize_kv" not in plain.matches and kept.matches["quantize_kv"] == kept.matches["insert_kv"] > 0
    for before, after in zip(plain.plan.kv_groups, kept.plan.kv_groups, strict=True):
        assert (after.dtype, after.head_size) == ("int8", before.head_size + SCALE_BYTES)
        assert after.layers == before.layers
    caches = [value for value in kept.plan.values if value.kind == "kv"]
    assert {(value.dtype, value.shape[-1]) for value in caches} == {("int8", kept.plan.kv_groups[0].head_size)}
    assert [step.op for step in kept.plan.steps] == [step.op for step in plain.plan.steps]


def test_a_gpu_has_kernels_for_it_and_other_types_are_refused_by_name() -> None:
    torch.manual_seed(0)
    module = PlainLlama(size=128, num_heads=4, intermediate=288)
    steps = compile_module(module, BuildConfig(kv_dtype="int8", device="cuda")).plan.steps
    found = {step.kernel for step in steps if step.op in ("rope_kv_store", "paged_attention")}
    assert found == {"gpu.rope_kv_store_int8", "gpu.paged_attention"}
    with pytest.raises(ConfigError, match="kv_dtype must be one of auto, int8, not 'int4'"):
        BuildConfig(kv_dtype="int4")  # type: ignore[arg-type]
