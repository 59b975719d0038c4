"""Well-known shapes of decoders by name: what `--arch` takes, beside the rows of `encoder_presets.py`.

Each row is the config.json of the published model, with only the fields that say the shape. Sources: the model cards'
repositories on the Hugging Face hub.
"""

from typing import Any

from tritium.errors import ConfigError
from tritium.models.config import ModelConfig
from tritium.models.encoder_presets import ENCODER_PRESETS, unknown
from tritium.models.hf_config import parse_config


def _llama(layers: int, hidden: int, intermediate: int, heads: int, kv_heads: int, **more: Any) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": 32_000,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "torch_dtype": "bfloat16",
        "tie_word_embeddings": False,
        **more,
    }


LLAMA_3 = {"vocab_size": 128_256, "max_position_embeddings": 8192, "rope_theta": 500_000.0}


def _llama_3_rope(factor: float) -> dict[str, Any]:
    scaling = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    return {**LLAMA_3, "max_position_embeddings": 131_072, "rope_scaling": scaling}


def _qwen2(layers: int, hidden: int, intermediate: int, heads: int, kv_heads: int, **more: Any) -> dict[str, Any]:
    shape = _llama(layers, hidden, intermediate, heads, kv_heads)
    return shape | {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": 152_064,
        "max_position_embeddings": 32_768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000.0,
        "use_sliding_window": False,
        **more,
    }


def _qwen3(layers: int, hidden: int, intermediate: int, heads: int, kv_heads: int, **more: Any) -> dict[str, Any]:
    names = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 128, "vocab_size": 151_936}
    return _qwen2(layers, hidden, intermediate, heads, kv_heads, max_position_embeddings=40_960) | names | more


def _gemma2(layers: int, hidden: int, intermediate: int, heads: int, kv_heads: int, **more: Any) -> dict[str, Any]:
    shape = _llama(layers, hidden, intermediate, heads, kv_heads)
    del shape["hidden_act"]
    return shape | {
        "architectures": ["Gemma2ForCausalLM"],
        "model_type": "gemma2",
        "vocab_size": 256_000,
        "max_position_embeddings": 8192,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-6,
        "hidden_activation": "gelu_pytorch_tanh",
        "sliding_window": 4096,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "tie_word_embeddings": True,
        **more,
    }


def _stablelm(
    layers: int, hidden: int, intermediate: int, heads: int, kv_heads: int = 32, **more: Any
) -> dict[str, Any]:
    shape = _llama(layers, hidden, intermediate, heads, kv_heads)
    del shape["rms_norm_eps"]
    return shape | {
        "architectures": ["StableLmForCausalLM"],
        "model_type": "stablelm",
        "layer_norm_eps": 1e-5,
        "partial_rotary_factor": 0.25,
        **more,
    }


def _phi3(layers: int, hidden: int, intermediate: int, heads: int, kv_heads: int, **more: Any) -> dict[str, Any]:
    names = {"architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "vocab_size": 32_064, "sliding_window": 2047}
    return _llama(layers, hidden, intermediate, heads, kv_heads) | names | more


def _gpt_neox(layers: int, hidden: int, heads: int, **more: Any) -> dict[str, Any]:
    return {
        "architectures": ["GPTNeoXForCausalLM"],
        "model_type": "gpt_neox",
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_attention_heads": heads,
        "vocab_size": 50_432,
        "max_position_embeddings": 2048,
        "hidden_act": "gelu",
        "rotary_pct": 0.25,
        "rotary_emb_base": 10_000,
        "layer_norm_eps": 1e-5,
        "use_parallel_residual": True,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        **more,
    }


def _opt(layers: int, hidden: int, heads: int, **more: Any) -> dict[str, Any]:
    return {
        "architectures": ["OPTForCausalLM"],
        "model_type": "opt",
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "word_embed_proj_dim": hidden,
        "ffn_dim": 4 * hidden,
        "num_attention_heads": heads,
        "vocab_size": 50_272,
        "max_position_embeddings": 2048,
        "activation_function": "relu",
        "do_layer_norm_before": True,
        "torch_dtype": "float16",
        **more,
    }


def _falcon(layers: int, hidden: int, heads: int, **more: Any) -> dict[str, Any]:
    return {
        "architectures": ["FalconForCausalLM"],
        "model_type": "falcon",
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "vocab_size": 65_024,
        "layer_norm_epsilon": 1e-5,
        "multi_query": True,
        "parallel_attn": True,
        "new_decoder_architecture": False,
        "alibi": False,
        "bias": False,
        "torch_dtype": "bfloat16",
        **more,
    }


def _bloom(layers: int, hidden: int, heads: int, **more: Any) -> dict[str, Any]:
    return {
        "architectures": ["BloomForCausalLM"],
        "model_type": "bloom",
        "n_layer": layers,
        "hidden_size": hidden,
        "n_head": heads,
        "vocab_size": 250_880,
        "layer_norm_epsilon": 1e-5,
        "torch_dtype": "float16",
        **more,
    }


def _gpt2(layers: int, hidden: int, heads: int) -> dict[str, Any]:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "n_layer": layers,
        "n_embd": hidden,
        "n_head": heads,
        "n_positions": 1024,
        "vocab_size": 50_257,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "torch_dtype": "float32",
    }


PRESETS: dict[str, dict[str, Any]] = {
    "llama-2-7b": _llama(32, 4096, 11_008, 32, 32),
    "llama-2-13b": _llama(40, 5120, 13_824, 40, 40),
    "llama-2-70b": _llama(80, 8192, 28_672, 64, 8),
    "llama-3-8b": _llama(32, 4096, 14_336, 32, 8, **LLAMA_3),
    "llama-3-70b": _llama(80, 8192, 28_672, 64, 8, **LLAMA_3),
    "llama-3.1-8b": _llama(32, 4096, 14_336, 32, 8, **_llama_3_rope(8.0)),
    "llama-3.2-1b": _llama(16, 2048, 8192, 32, 8, head_dim=64, **_llama_3_rope(32.0) | {"tie_word_embeddings": True}),
    "llama-3.2-3b": _llama(28, 3072, 8192, 24, 8, head_dim=128, **_llama_3_rope(32.0) | {"tie_word_embeddings": True}),
    "mistral-7b": _llama(
        32, 4096, 14_336, 32, 8,
        architectures=["MistralForCausalLM"], model_type="mistral", max_position_embeddings=32_768, sliding_window=4096,
    ),
    "mixtral-8x7b": _llama(
        32, 4096, 14_336, 32, 8, architectures=["MixtralForCausalLM"], model_type="mixtral",
        max_position_embeddings=32_768, rope_theta=1_000_000.0, num_local_experts=8, num_experts_per_tok=2,
    ),
    "qwen2-7b": _qwen2(28, 3584, 18_944, 28, 4, max_position_embeddings=131_072, sliding_window=131_072),
    "qwen2.5-0.5b": _qwen2(24, 896, 4864, 14, 2, vocab_size=151_936, tie_word_embeddings=True),
    "qwen2.5-1.5b": _qwen2(28, 1536, 8960, 12, 2, vocab_size=151_936, tie_word_embeddings=True),
    "qwen2.5-7b": _qwen2(28, 3584, 18_944, 28, 4),
    "qwen3-0.6b": _qwen3(28, 1024, 3072, 16, 8, tie_word_embeddings=True),
    "qwen3-8b": _qwen3(36, 4096, 12_288, 32, 8),
    "qwen3-30b-a3b": _qwen3(
        48, 2048, 6144, 32, 4, architectures=["Qwen3MoeForCausalLM"], model_type="qwen3_moe", num_experts=128,
        num_experts_per_tok=8, moe_intermediate_size=768, norm_topk_prob=True, mlp_only_layers=[],
    ),
    "gemma-2-2b": _gemma2(26, 2304, 9216, 8, 4),
    "gemma-2-9b": _gemma2(42, 3584, 14_336, 16, 8),
    "gemma-2-27b": _gemma2(46, 4608, 36_864, 32, 16, head_dim=128, query_pre_attn_scalar=144),
    "gemma-3-1b": _gemma2(
        26, 1152, 6912, 4, 1, architectures=["Gemma3ForCausalLM"], model_type="gemma3_text", vocab_size=262_144,
        max_position_embeddings=32_768, sliding_window=512, attn_logit_softcapping=None, final_logit_softcapping=None,
        rope_theta=1_000_000.0, rope_local_base_freq=10_000.0, sliding_window_pattern=6,
    ),
    "phi-3-mini-4k": _phi3(32, 3072, 8192, 32, 32),
    "phi-3-medium-4k": _phi3(40, 5120, 17_920, 40, 10),
    "stablelm-3b": _stablelm(32, 2560, 6912, 32, vocab_size=50_304),
    "stablelm-2-1.6b": _stablelm(24, 2048, 5632, 32, vocab_size=100_352, use_qkv_bias=True),
    "stablelm-2-12b": _stablelm(
        40, 5120, 13_824, 32, 8, vocab_size=100_352, qk_layernorm=True, use_parallel_residual=True
    ),
    "gpt2": _gpt2(12, 768, 12),
    "gpt2-medium": _gpt2(24, 1024, 16),
    "gpt2-large": _gpt2(36, 1280, 20),
    "gpt2-xl": _gpt2(48, 1600, 25),
    "gpt-j-6b": _gpt2(28, 4096, 16) | {
        "architectures": ["GPTJForCausalLM"], "model_type": "gptj", "n_positions": 2048, "rotary_dim": 64,
        "vocab_size": 50_400, "tie_word_embeddings": False, "torch_dtype": "bfloat16",  # published in fp32 and fp16
    },
    "gpt-neox-20b": _gpt_neox(44, 6144, 64, hidden_act="gelu_fast"),
    "pythia-160m": _gpt_neox(12, 768, 12, vocab_size=50_304),
    "pythia-6.9b": _gpt_neox(32, 4096, 32),
    "falcon-rw-1b": _falcon(
        24, 2048, 32, vocab_size=50_304, multi_query=False, parallel_attn=False, alibi=True, bias=True,
    ),
    "falcon-7b": _falcon(32, 4544, 71),
    "falcon-40b": _falcon(60, 8192, 128, new_decoder_architecture=True, num_kv_heads=8),
    "bloom-560m": _bloom(24, 1024, 16),
    "bloom-7b1": _bloom(30, 4096, 32),
    "opt-125m": _opt(12, 768, 12),
    "opt-350m": _opt(24, 1024, 16, word_embed_proj_dim=512, do_layer_norm_before=False),
    "opt-6.7b": _opt(32, 4096, 32),
}  # fmt: skip


def preset(name: str, *, dtype: str = "auto", max_model_len: int | None = None) -> ModelConfig:
    """The configuration of a well-known decoder. Raises `ConfigError` for an unknown name, with the nearest one."""
    if name in ENCODER_PRESETS:
        raise ConfigError(f"{name!r} is an encoder, not a decoder: encoder_preset({name!r}) has its configuration")
    if name not in PRESETS:
        raise unknown("architecture", name, [*PRESETS, *ENCODER_PRESETS])
    return parse_config(PRESETS[name], f"preset {name}", dtype=dtype, max_model_len=max_model_len)
