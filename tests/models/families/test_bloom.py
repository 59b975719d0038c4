"""config.json of BLOOM."""

from dataclasses import replace

import pytest

from tritium.errors import ConfigError, UnsupportedModel
from tritium.models.alibi import alibi_slopes
from tritium.testing.configs import check_published, error_of, parse
from tritium.testing.tiny_configs import BLOOM

BLOOM_560M = {
    "apply_residual_connection_post_layernorm": False, "attention_dropout": 0.0, "attention_softmax_in_fp32": True,
    "architectures": ["BloomForCausalLM"], "bias_dropout_fusion": True, "bos_token_id": 1, "eos_token_id": 2,
    "hidden_dropout": 0.0, "initializer_range": 0.02, "layer_norm_epsilon": 1e-05, "masked_softmax_fusion": True,
    "model_type": "bloom", "n_embed": 1024, "n_inner": None, "n_layer": 24, "num_attention_heads": 16,
    "offset_alibi": 100, "pad_token_id": 3, "pretraining_tp": 1, "seq_length": 2048,
    "skip_bias_add": True, "skip_bias_add_qkv": False, "slow_but_exact": False, "torch_dtype": "float16",
    "transformers_version": "4.20.0", "unk_token_id": 0, "use_cache": True, "vocab_size": 250880,
}  # fmt: skip


def test_the_published_file_of_bloom_is_read():
    check_published(BLOOM_560M, hidden_size=1024, intermediate_size=4096, head_size=64, default_model_len=2048)
    check_published(BLOOM_560M, alibi_slopes=alibi_slopes(16), has_embedding_norm=True, dtype="float16")


def test_its_length_has_no_end():
    assert parse(BLOOM, max_model_len=100_000).max_model_len == 100_000


def test_a_residual_sum_of_norms_is_refused():
    message = error_of(BLOOM | {"apply_residual_connection_post_layernorm": True}, UnsupportedModel)
    assert "field 'apply_residual_connection_post_layernorm' is True" in message


@pytest.mark.parametrize("slopes", [(), (0.5,) * 5, (0.5,) * 5 + (float("nan"),)])
def test_slopes_are_one_finite_number_for_each_head(slopes):
    with pytest.raises(ConfigError, match="alibi_slopes must be 6 finite numbers, not"):
        replace(parse(BLOOM), alibi_slopes=slopes)
