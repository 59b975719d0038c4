"""config.json of GPT-NeoX."""

from tritium import models
from tritium.testing.configs import check_published, parse
from tritium.testing.tiny_configs import GPT_NEOX

PYTHIA_160M = {
    "architectures": ["GPTNeoXForCausalLM"], "bos_token_id": 0, "classifier_dropout": 0.1, "eos_token_id": 0,
    "hidden_act": "gelu", "hidden_size": 768, "initializer_range": 0.02, "intermediate_size": 3072,
    "layer_norm_eps": 1e-05, "max_position_embeddings": 2048, "model_type": "gpt_neox", "num_attention_heads": 12,
    "num_hidden_layers": 12, "rotary_emb_base": 10000, "rotary_pct": 0.25, "tie_word_embeddings": False,
    "torch_dtype": "float16", "transformers_version": "4.24.0", "use_cache": True, "use_parallel_residual": True,
    "vocab_size": 50304,
}  # fmt: skip


def test_the_published_file_of_pythia_is_read():
    check_published(PYTHIA_160M, head_size=64, block="parallel_two_norms", has_qkv_bias=True, dtype="float16")
    assert parse(PYTHIA_160M).rope == models.RopeConfig(dim=16)


def test_attention_and_mlp_follow_each_other_where_the_file_says_so():
    assert parse(GPT_NEOX | {"use_parallel_residual": False}).block == "pre_norm"


def test_the_base_of_its_rope_has_a_name_of_its_own():
    assert parse(GPT_NEOX | {"rotary_emb_base": 5e5}).rope == models.RopeConfig(dim=8, theta=5e5)
