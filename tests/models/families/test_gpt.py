"""config.json of GPT-2 and GPT-J."""

from tritium import models
from tritium.testing.configs import check_published, parse
from tritium.testing.tiny_configs import GPT2, GPTJ, TINY_MODELS

GPT2_PUBLISHED = {
    "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1,
    "bos_token_id": 50256, "embd_pdrop": 0.1, "eos_token_id": 50256, "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05, "model_type": "gpt2", "n_ctx": 1024, "n_embd": 768, "n_head": 12,
    "n_layer": 12, "n_positions": 1024, "resid_pdrop": 0.1, "summary_activation": None,
    "summary_first_dropout": 0.1, "summary_proj_to_labels": True, "summary_type": "cls_index",
    "summary_use_proj": True, "vocab_size": 50257,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
}  # fmt: skip


def test_the_published_file_of_gpt_2_is_read():
    check_published(GPT2_PUBLISHED, tie_word_embeddings=True, intermediate_size=3072, head_size=64, dtype="float32")


GPTJ_PUBLISHED = {
    "activation_function": "gelu_new", "architectures": ["GPTJForCausalLM"], "attn_pdrop": 0.0,
    "bos_token_id": 50256, "eos_token_id": 50256, "gradient_checkpointing": False, "layer_norm_epsilon": 1e-05,
    "model_type": "gptj", "n_embd": 4096, "n_head": 16, "n_inner": None, "n_layer": 28, "n_positions": 2048,
    "rotary": True, "rotary_dim": 64, "scale_attn_weights": True, "tie_word_embeddings": False,
    "tokenizer_class": "GPT2Tokenizer", "transformers_version": "4.18.0.dev0", "use_cache": True,
    "vocab_size": 50400,
}  # fmt: skip


def test_the_published_file_of_gpt_j_is_read():
    check_published(GPTJ_PUBLISHED, intermediate_size=16384, head_size=256, has_lm_head_bias=True, block="parallel")


def test_gptj_rotates_part_of_a_head_in_neighbouring_pairs_beside_its_mlp():
    config = parse(GPTJ)
    assert config.rope == models.RopeConfig(dim=8, is_interleaved=True)
    assert config.block == "parallel" and config.has_lm_head_bias and not config.is_gated
    assert config.intermediate_size == 80


def test_gpt2_has_learned_positions_and_a_tied_head():
    config = parse(GPT2)
    assert config.rope is None and config.tie_word_embeddings and config.intermediate_size == 256
    assert config.attention_scale(1) == 0.25
    assert parse(TINY_MODELS["gpt2-scaled-by-layer"]).attention_scale(1) == 0.125
    assert parse(GPT2 | {"scale_attn_weights": False}).attention_scale(2) == 1.0
