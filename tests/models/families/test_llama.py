"""config.json of Llama and Mistral."""

from tritium import models
from tritium.testing.configs import check_published, parse, without
from tritium.testing.tiny_configs import LLAMA, MISTRAL

LLAMA_3_1_INSTRUCT = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009], "hidden_act": "silu", "hidden_size": 4096,
    "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 131072, "mlp_bias": False,
    "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
    "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_theta": 500000.0, "tie_word_embeddings": False,
    "rope_scaling": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192, "rope_type": "llama3",
    },
    "torch_dtype": "bfloat16", "transformers_version": "4.42.3", "use_cache": True, "vocab_size": 128256,
}  # fmt: skip


def test_the_published_file_of_llama_3_1_is_read():
    check_published(LLAMA_3_1_INSTRUCT, head_size=128, num_kv_heads=8, dtype="bfloat16", default_model_len=131072)


def test_a_llama_config_says_what_it_says():
    config = parse(LLAMA)
    assert (config.family, config.num_layers, config.num_heads, config.num_kv_heads) == ("llama", 3, 4, 2)
    assert (config.hidden_size, config.head_size, config.intermediate_size, config.vocab_size) == (64, 16, 96, 199)
    assert (config.norm, config.norm_eps, config.activation, config.is_gated) == ("rms_norm", 1e-5, "silu", True)
    assert config.rope == models.RopeConfig(dim=16, theta=10000.0)
    assert config.windows == (0, 0, 0)
    assert not (config.has_qkv_bias or config.has_output_bias or config.has_mlp_bias or config.tie_word_embeddings)


def test_mistral_windows_every_layer_and_null_means_none():
    assert parse(MISTRAL).windows == (11, 11, 11)
    assert parse(MISTRAL | {"sliding_window": None}).windows == (0, 0, 0)
    assert parse(without(MISTRAL, "sliding_window")).windows == (4096, 4096, 4096)  # transformers' default
