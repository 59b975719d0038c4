"""StableLM's config.json: which part of a head is rotated, and what no block does yet."""

import pytest

from tritium import models
from tritium.errors import CheckpointError, UnsupportedModel
from tritium.testing.configs import error_of
from tritium.testing.tiny_configs import STABLELM


def test_a_published_file_is_read():
    published = {
        "architectures": ["StableLmForCausalLM"], "bos_token_id": 100257, "eos_token_id": 100257, "hidden_act": "silu",
        "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 5632, "layer_norm_eps": 1e-05,
        "max_position_embeddings": 4096, "model_type": "stablelm", "num_attention_heads": 32, "num_hidden_layers": 24,
        "num_key_value_heads": 32, "partial_rotary_factor": 0.25, "rope_theta": 10000, "tie_word_embeddings": False,
        "torch_dtype": "float16", "transformers_version": "4.38.0", "use_cache": True, "use_qkv_bias": True,
        "vocab_size": 100352,
}  # fmt: skip
    config = models.parse_config(published, "dir/config.json")
    assert (config.norm, config.norm_eps, config.is_gated) == ("layer_norm", 1e-5, True)
    assert config.rope == models.RopeConfig(dim=16) and config.head_size == 64
    assert config.has_qkv_bias and not config.has_output_bias and not config.has_mlp_bias
    assert config.dtype == "float16"


def test_a_quarter_of_a_head_is_rotated_unless_the_file_says_another_part():
    plain = {name: value for name, value in STABLELM.items() if name not in ("partial_rotary_factor", "rope_theta")}
    inside = {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5, "partial_rotary_factor": 0.5}}
    assert models.parse_config(plain, "config").rope == models.RopeConfig(dim=4)
    assert models.parse_config(plain | inside, "config").rope == models.RopeConfig(dim=8, theta=5e5)


@pytest.mark.parametrize("odd", [0, -0.5, 1.5, "half", True, float("nan"), 0.1, 0.2])
def test_a_part_that_cannot_be_rotated_is_named(odd):
    assert "field 'partial_rotary_factor' is" in error_of(STABLELM | {"partial_rotary_factor": odd}, CheckpointError)


def test_attention_and_mlp_stand_side_by_side_where_the_file_says_so():
    assert models.parse_config(STABLELM | {"use_parallel_residual": True}, "config").block == "parallel"


def test_queries_and_keys_have_norms_by_head_where_the_file_says_so():
    assert not models.parse_config(STABLELM, "config").has_qk_norm
    config = models.parse_config(STABLELM | {"qk_layernorm": True}, "config")
    assert config.has_qk_norm and config.has_norm_per_head
    attention = models.Attention(config, 0)
    assert attention.q_norm.weight.shape == (config.num_heads, config.head_size)
    assert attention.k_norm.weight.shape == (config.num_kv_heads, config.head_size)


@pytest.mark.parametrize(
    ("fields", "name"),
    [({"rope_scaling": {"type": "ntk", "factor": 2.0}}, "rope_scaling.type")],
)
def test_what_no_block_does_is_refused(fields, name):
    assert f"field '{name}' is" in error_of(STABLELM | fields, UnsupportedModel)
