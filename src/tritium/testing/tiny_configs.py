"""config.json of small models, one per feature of every family, in the spelling of its time."""

from typing import Any

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 199,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MISTRAL = LLAMA | {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "head_dim": 24,
    "sliding_window": 11,
}
QWEN2 = LLAMA | {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "rope_theta": 1e6,
    "use_sliding_window": False,
    "sliding_window": 13,
    "max_window_layers": 1,
}
QWEN3 = QWEN2 | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 24}
MIXTRAL = LLAMA | {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "num_local_experts": 5,
    "num_experts_per_tok": 2,
    "sliding_window": None,
}
QWEN3_MOE = QWEN2 | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "head_dim": 24,
    "num_hidden_layers": 3,
    "num_experts": 6,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 40,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [1],
}
GEMMA2 = {name: value for name, value in LLAMA.items() if name != "hidden_act"} | {
    "architectures": ["Gemma2ForCausalLM"],
    "model_type": "gemma2",
    "head_dim": 24,
    "query_pre_attn_scalar": 20,
    "sliding_window": 12,
    "attn_logit_softcapping": 2.0,
    "final_logit_softcapping": 6.0,
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
}
GEMMA3 = {name: value for name, value in GEMMA2.items() if "softcapping" not in name} | {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "sliding_window_pattern": 3,
    "rope_theta": 1e6,
    "rope_local_base_freq": 10000.0,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
}
STABLELM = {name: value for name, value in LLAMA.items() if name != "rms_norm_eps"} | {
    "architectures": ["StableLmForCausalLM"],
    "model_type": "stablelm",
    "layer_norm_eps": 1e-5,
    "partial_rotary_factor": 0.25,
}
GPT2: dict[str, Any] = {
    "architectures": ["GPT2LMHeadModel"],
    "model_type": "gpt2",
    "vocab_size": 199,
    "n_embd": 64,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 96,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
GPTJ = GPT2 | {
    "architectures": ["GPTJForCausalLM"],
    "model_type": "gptj",
    "rotary_dim": 8,
    "n_inner": 80,
    "tie_word_embeddings": False,
}

GPT_NEOX = {name: value for name, value in LLAMA.items() if name not in ("rms_norm_eps", "num_key_value_heads")} | {
    "architectures": ["GPTNeoXForCausalLM"],
    "model_type": "gpt_neox",
    "layer_norm_eps": 1e-5,
    "hidden_act": "gelu",
    "rotary_pct": 0.5,
    "rotary_emb_base": 10000,
    "use_parallel_residual": True,
}
OPT: dict[str, Any] = {
    "architectures": ["OPTForCausalLM"],
    "model_type": "opt",
    "vocab_size": 199,
    "hidden_size": 64,
    "word_embed_proj_dim": 64,
    "ffn_dim": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 96,
    "activation_function": "relu",
    "do_layer_norm_before": True,
    "bos_token_id": 2,
    "eos_token_id": 2,
    "pad_token_id": 1,
}
FALCON: dict[str, Any] = {
    "architectures": ["FalconForCausalLM"],
    "model_type": "falcon",
    "vocab_size": 199,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "layer_norm_epsilon": 1e-5,
    "multi_query": True,
    "parallel_attn": True,
    "new_decoder_architecture": False,
    "alibi": False,
    "bias": False,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
BLOOM: dict[str, Any] = {
    "architectures": ["BloomForCausalLM"],
    "model_type": "bloom",
    "vocab_size": 199,
    "hidden_size": 60,
    "n_layer": 3,
    "n_head": 6,
    "layer_norm_epsilon": 1e-5,
    "seq_length": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 3,
}
PHI3 = LLAMA | {
    "architectures": ["Phi3ForCausalLM"],
    "model_type": "phi3",
    "original_max_position_embeddings": 128,
    "rope_scaling": None,
    "sliding_window": 13,
    "pad_token_id": 0,
}


def _longrope(pairs: int) -> dict[str, Any]:
    """128 positions, trained on 32: short factors near 1, long ones up to 4."""
    return {
        "original_max_position_embeddings": 32,
        "rope_scaling": {
            "type": "longrope",
            "short_factor": [1.0 + 0.05 * pair for pair in range(pairs)],
            "long_factor": [1.0 + 3.0 * pair / pairs for pair in range(pairs)],
        },
    }


def _scaled(kind: str, **more: Any) -> dict[str, Any]:
    """A Llama with 32 positions of pre-training stretched by 4; prompts of more than 32 tokens see the scaling."""
    scaling = {"rope_type": kind, "factor": 4.0, **more}
    if kind in ("linear", "dynamic"):
        return LLAMA | {"max_position_embeddings": 32, "rope_scaling": scaling}
    return LLAMA | {"rope_scaling": scaling | {"original_max_position_embeddings": 32}}


TINY_MODELS: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "llama-tied": LLAMA | {"tie_word_embeddings": True},
    "llama-mha-biased": LLAMA | {"num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True},
    "llama-linear": _scaled("linear"),
    "llama-dynamic": _scaled("dynamic"),
    "llama-llama3": _scaled("llama3", low_freq_factor=1.0, high_freq_factor=4.0),
    "llama-yarn": _scaled("yarn"),
    "llama-yarn-mscale": _scaled("yarn", mscale=1.3, mscale_all_dim=0.6, beta_fast=4, beta_slow=0.5),
    "llama-yarn-factor": _scaled("yarn", attention_factor=1.4, truncate=False),
    "mistral": MISTRAL,
    "mistral-no-window": MISTRAL | {"sliding_window": None, "head_dim": None},
    "qwen2": QWEN2,
    "qwen2-window": QWEN2 | {"use_sliding_window": True},
    "qwen2-tied": QWEN2 | {"tie_word_embeddings": True},
    "qwen3": QWEN3 | {"use_sliding_window": True},
    "qwen3-biased": QWEN3 | {"attention_bias": True, "tie_word_embeddings": True},
    "mixtral": MIXTRAL,
    "mixtral-window": MIXTRAL | {"sliding_window": 14, "num_experts_per_tok": 1},
    "qwen3_moe": QWEN3_MOE,
    "qwen3_moe-not-normed": QWEN3_MOE
    | {"norm_topk_prob": False, "decoder_sparse_step": 2, "mlp_only_layers": [], "use_sliding_window": True},
    "gemma2": GEMMA2,
    "gemma2-no-caps": GEMMA2
    | {"attn_logit_softcapping": None, "final_logit_softcapping": None, "attention_bias": True},
    "gemma3": GEMMA3,
    "phi3": PHI3,
    "phi3-longrope": PHI3 | _longrope(8) | {"sliding_window": None},
    "phi3-longrope-partial": PHI3 | _longrope(6) | {"partial_rotary_factor": 0.75, "tie_word_embeddings": True},
    "stablelm": STABLELM,
    "stablelm-parallel": STABLELM | {"use_parallel_residual": True},
    "stablelm-qk-norm": STABLELM | {"use_parallel_residual": True, "qk_layernorm": True},
    "stablelm-linear": STABLELM | {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "stablelm-biased-tied": STABLELM
    | {"use_qkv_bias": True, "partial_rotary_factor": 0.5, "tie_word_embeddings": True},
    "gpt2": GPT2,
    "gpt2-scaled-by-layer": GPT2 | {"scale_attn_by_inverse_layer_idx": True, "n_inner": 72},
    "gpt2-untied": GPT2 | {"tie_word_embeddings": False},
    "gptj": GPTJ,
    "gptj-tied": GPTJ | {"tie_word_embeddings": True, "rotary_dim": 16},
    "gpt_neox": GPT_NEOX,
    "gpt_neox-sequential": GPT_NEOX | {"use_parallel_residual": False, "attention_bias": False, "rotary_pct": 1.0},
    "opt": OPT,
    "opt-post-norm": OPT | {"do_layer_norm_before": False, "word_embed_proj_dim": 48},
    "opt-untied": OPT | {"enable_bias": False, "tie_word_embeddings": False, "_remove_final_layer_norm": True},
    "falcon": FALCON,
    "falcon-grouped": FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2, "tie_word_embeddings": False},
    "falcon-grouped-one-norm": FALCON
    | {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1, "ffn_hidden_size": 80},
    "falcon-alibi": FALCON | {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True},
    "bloom": BLOOM,
    "bloom-untied": BLOOM | {"tie_word_embeddings": False, "n_head": 4},
}
