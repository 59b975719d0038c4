"""config.json of OPT."""

import pytest

from tritium.errors import ConfigError, UnsupportedModel
from tritium.testing.configs import check_published, error_of, parse
from tritium.testing.tiny_configs import OPT

OPT_350M = {
    "_remove_final_layer_norm": False, "activation_dropout": 0.0, "activation_function": "relu",
    "architectures": ["OPTForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 2, "hidden_size": 1024,
    "do_layer_norm_before": False, "dropout": 0.1, "eos_token_id": 2, "ffn_dim": 4096, "init_std": 0.02,
    "layerdrop": 0.0, "max_position_embeddings": 2048, "model_type": "opt", "num_attention_heads": 16,
    "num_hidden_layers": 24, "pad_token_id": 1, "prefix": "</s>", "torch_dtype": "float16", "use_cache": True,
    "vocab_size": 50272, "word_embed_proj_dim": 512,
}  # fmt: skip


def test_the_published_file_of_opt_350m_is_read():
    check_published(
        OPT_350M,
        block="post_norm",
        has_final_norm=False,
        embedding_size=512,
        tie_word_embeddings=True,
        activation="relu",
    )


def test_other_sizes_norm_before_and_in_the_end():
    config = parse(OPT)
    assert (config.block, config.has_final_norm, config.rope) == ("pre_norm", True, None)
    assert not parse(OPT | {"_remove_final_layer_norm": True}).has_final_norm


def test_its_positions_end_where_the_table_does_without_its_first_two_rows():
    assert parse(OPT, max_model_len=96).max_model_len == 96
    with pytest.raises(ConfigError, match=r"max_model_len \(97\) must be at most 96"):
        parse(OPT, max_model_len=97)


def test_norms_without_weights_are_refused():
    message = error_of(OPT | {"layer_norm_elementwise_affine": False}, UnsupportedModel)
    assert "field 'layer_norm_elementwise_affine' is False" in message
