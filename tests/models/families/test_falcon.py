"""config.json of Falcon: which of its architectures, what its slopes are."""

import pytest
import torch

from tritium import models
from tritium.errors import UnsupportedModel
from tritium.models.alibi import alibi_slopes
from tritium.testing.configs import check_published, error_of, parse
from tritium.testing.tiny_configs import FALCON, TINY_MODELS

COMMON = {
    "apply_residual_connection_post_layernorm": False, "architectures": ["FalconForCausalLM"],
    "attention_dropout": 0.0, "bias": False, "bos_token_id": 11, "eos_token_id": 11, "hidden_dropout": 0.0,
    "initializer_range": 0.02, "layer_norm_epsilon": 1e-05, "model_type": "falcon", "multi_query": True,
    "parallel_attn": True, "torch_dtype": "bfloat16", "use_cache": True, "vocab_size": 65024, "alibi": False,
}  # fmt: skip
FALCON_7B = COMMON | {"hidden_size": 4544, "num_attention_heads": 71, "num_hidden_layers": 32}
FALCON_7B |= {"new_decoder_architecture": False}
FALCON_40B = COMMON | {"hidden_size": 8192, "num_attention_heads": 128, "num_hidden_layers": 60, "num_kv_heads": 8}
FALCON_40B |= {"new_decoder_architecture": True}


def test_the_published_files_of_7b_and_40b_are_read():
    check_published(FALCON_7B, head_size=64, num_kv_heads=1, block="parallel", rope=models.RopeConfig(dim=64))
    check_published(FALCON_40B, head_size=64, num_kv_heads=8, block="parallel_two_norms", intermediate_size=32768)


def test_the_number_of_norms_and_of_kv_heads_depends_on_the_architecture():
    one_norm = {"new_decoder_architecture": True, "num_ln_in_parallel_attn": 1}
    assert parse(FALCON | one_norm).block == "parallel" and parse(FALCON | one_norm).num_kv_heads == 4
    assert parse(FALCON | {"multi_query": False}).num_kv_heads == 4
    assert parse(FALCON | {"parallel_attn": False}).block == "pre_norm"
    assert parse(FALCON | {"num_kv_heads": 2}).num_kv_heads == 1  # of no account to the old architecture


def test_alibi_takes_the_place_of_rope_and_is_rounded_and_scaled():
    config = parse(TINY_MODELS["falcon-alibi"] | {"num_attention_heads": 32})
    assert config.rope is None and len(config.alibi_slopes) == 32
    expected = torch.tensor(alibi_slopes(32)).bfloat16().double() * 2**-0.5  # heads of 2
    assert config.alibi_slopes == tuple(expected.tolist())


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"num_ln_in_parallel_attn": 2}, "num_ln_in_parallel_attn"),
        ({"new_decoder_architecture": True, "parallel_attn": False}, "parallel_attn"),
    ],
)
def test_a_mixture_of_architectures_is_refused(fields, name):
    assert f"field '{name}' is" in error_of(FALCON | fields, UnsupportedModel)


def test_kv_heads_that_do_not_divide_the_heads_are_refused():
    message = error_of(FALCON | {"new_decoder_architecture": True, "num_kv_heads": 3})
    assert "field 'num_kv_heads' is 3, which does not divide num_attention_heads (4)" in message
