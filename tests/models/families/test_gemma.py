"""config.json of Gemma."""

from tritium.testing.configs import check_published, parse, without
from tritium.testing.tiny_configs import GEMMA2

GEMMA_2_27B = {
    "architectures": ["Gemma2ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "attn_logit_softcapping": 50.0, "bos_token_id": 2, "cache_implementation": "hybrid", "eos_token_id": 1,
    "final_logit_softcapping": 30.0, "head_dim": 128, "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 4608, "initializer_range": 0.02,
    "intermediate_size": 36864, "max_position_embeddings": 8192, "model_type": "gemma2",
    "num_attention_heads": 32, "num_hidden_layers": 46, "num_key_value_heads": 16, "pad_token_id": 0,
    "query_pre_attn_scalar": 144, "rms_norm_eps": 1e-06, "rope_theta": 10000.0, "sliding_window": 4096,
    "sliding_window_size": 4096, "torch_dtype": "float32", "transformers_version": "4.42.0.dev0",
    "use_cache": True, "vocab_size": 256000,
}  # fmt: skip


def test_the_published_file_of_gemma_2_is_read():
    check_published(
        GEMMA_2_27B, head_size=128, windows=(4096, 0) * 23, attention_scales=(1 / 12,) * 46, tie_word_embeddings=True
    )


def test_gemma2_windows_every_other_layer_and_caps_scores_and_logits():
    config = parse(GEMMA2)
    assert (config.windows, config.attention_softcap, config.logit_softcap) == ((12, 0, 12), 2.0, 6.0)
    assert (config.attention_scale(0), config.embedding_scale) == (20**-0.5, 8.0)
    assert (config.norm, config.block, config.activation) == ("offset_rms_norm", "sandwich", "gelu_tanh")
    absent = parse(without(GEMMA2, "attn_logit_softcapping", "final_logit_softcapping"))
    assert (absent.attention_softcap, absent.logit_softcap) == (50.0, 30.0)  # transformers' defaults
    assert parse(GEMMA2 | {"attn_logit_softcapping": None}).attention_softcap == 0
    types = ["full_attention", "full_attention", "sliding_attention"]
    assert parse(GEMMA2 | {"layer_types": types}).windows == (0, 0, 12)
