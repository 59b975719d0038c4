"""config.json of Qwen."""

from tritium.testing.configs import check_published, error_of, parse, without
from tritium.testing.tiny_configs import QWEN2, QWEN3

QWEN2_5_YARN = {
    "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
    "eos_token_id": 151645, "hidden_act": "silu", "hidden_size": 3584, "initializer_range": 0.02,
    "intermediate_size": 18944, "max_position_embeddings": 32768, "max_window_layers": 28,
    "model_type": "qwen2", "num_attention_heads": 28, "num_hidden_layers": 28, "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 131072, "tie_word_embeddings": False,
    "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"},
    "torch_dtype": "bfloat16", "use_cache": True, "use_sliding_window": False, "vocab_size": 152064,
}  # fmt: skip


def test_the_published_file_of_qwen_2_5_is_read():
    check_published(QWEN2_5_YARN, has_qkv_bias=True, has_output_bias=False, windows=(0,) * 28, default_model_len=131072)


QWEN3_0_6B = {
    "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "bos_token_id": 151643, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 1024,
    "initializer_range": 0.02, "intermediate_size": 3072, "max_position_embeddings": 40960,
    "max_window_layers": 28, "model_type": "qwen3", "num_attention_heads": 16, "num_hidden_layers": 28,
    "num_key_value_heads": 8, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000,
    "sliding_window": None, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0", "use_cache": True, "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip


def test_the_published_file_of_qwen_3_is_read():
    check_published(
        QWEN3_0_6B, head_size=128, has_qk_norm=True, has_qkv_bias=False, windows=(0,) * 28, dtype="bfloat16"
    )


def test_qwen2_windows_the_layers_from_max_window_layers_on_if_it_uses_them():
    assert parse(QWEN2).windows == (0, 0, 0)
    assert parse(QWEN2 | {"use_sliding_window": True}).windows == (0, 13, 13)
    types = ["sliding_attention", "full_attention", "sliding_attention"]
    assert parse(QWEN2 | {"use_sliding_window": True, "layer_types": types}).windows == (13, 0, 13)
    assert "field 'layer_types' is ['sliding_attention'" in error_of(QWEN2 | {"layer_types": types})


def test_qwen3_norms_queries_and_keys_of_heads_that_are_128_wide_unless_said():
    config = parse(without(QWEN3, "head_dim"))
    assert config.has_qk_norm and config.head_size == 128 and not config.has_qkv_bias
    assert parse(QWEN3 | {"use_sliding_window": True}).windows == (0, 13, 13)
    assert parse(QWEN3 | {"attention_bias": True}).has_output_bias
