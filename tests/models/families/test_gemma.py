"""config.json of Gemma."""

from tritium import models
from tritium.errors import UnsupportedModel
from tritium.testing.configs import check_published, error_of, parse, without
from tritium.testing.tiny_configs import GEMMA2, GEMMA3

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


GEMMA_3_1B = {
    "architectures": ["Gemma3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "attn_logit_softcapping": None, "bos_token_id": 2, "cache_implementation": "hybrid", "eos_token_id": [1, 106],
    "final_logit_softcapping": None, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 1152,
    "initializer_range": 0.02, "intermediate_size": 6912, "max_position_embeddings": 32768, "model_type": "gemma3_text",
    "num_attention_heads": 4, "num_hidden_layers": 26, "num_key_value_heads": 1, "pad_token_id": 0,
    "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_local_base_freq": 10000, "rope_scaling": None,
    "rope_theta": 1000000, "sliding_window": 512, "sliding_window_pattern": 6, "torch_dtype": "bfloat16",
    "transformers_version": "4.50.0.dev0", "use_cache": True, "vocab_size": 262144,
}  # fmt: skip


def test_the_published_file_of_gemma_3_is_read():
    check_published(GEMMA_3_1B, windows=(*((512,) * 5 + (0,)) * 4, 512, 512), has_qk_norm=True, logit_softcap=0.0)
    check_published(GEMMA_3_1B, rope=models.RopeConfig(dim=256, theta=1e6), rope_local=models.RopeConfig(dim=256))


def test_old_and_new_spellings_of_gemma_3s_two_ropes_mean_the_same():
    nested = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    new = without(GEMMA3, "rope_scaling", "rope_theta", "rope_local_base_freq") | {"rope_parameters": nested}
    assert parse(new) == parse(GEMMA3)
    nested["sliding_attention"]["rope_type"] = "linear"
    assert "is 'linear': windowed layers have plain RoPE" in error_of(new, UnsupportedModel)


def test_a_multimodal_file_without_a_text_model_is_refused():
    config = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3"}
    assert "field 'text_config' is missing" in error_of(config)


def test_a_published_multimodal_file_leaves_out_defaults():
    text = {"hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34}
    text |= {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024}
    config = parse({"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "text_config": text})
    assert (config.num_heads, config.num_kv_heads, config.head_size, config.vocab_size) == (8, 4, 256, 262_208)
    assert config.windows[:6] == (1024,) * 5 + (0,) and config.rope.factor == 8.0
