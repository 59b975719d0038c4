"""config.json of Mixtral and Qwen3-MoE: which layers have experts, and how many of them."""

import pytest

from tritium import models
from tritium.errors import ConfigError
from tritium.models import ExpertsConfig
from tritium.testing.configs import check_published, error_of, parse, without
from tritium.testing.tiny_configs import MIXTRAL, QWEN3_MOE
from tritium.weights.recipes import Checkpoint, Concat, Reshape

MIXTRAL_8X7B = {
    "architectures": ["MixtralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2,
    "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
    "max_position_embeddings": 32768, "model_type": "mixtral", "num_attention_heads": 32, "num_experts_per_tok": 2,
    "num_hidden_layers": 32, "num_key_value_heads": 8, "num_local_experts": 8, "output_router_logits": False,
    "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.02, "sliding_window": None,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.36.0.dev0", "use_cache": True,
    "vocab_size": 32000,
}  # fmt: skip
QWEN3_30B_A3B = {
    "architectures": ["Qwen3MoeForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "bos_token_id": 151643, "decoder_sparse_step": 1, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu",
    "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 6144, "max_position_embeddings": 40960,
    "max_window_layers": 48, "mlp_only_layers": [], "model_type": "qwen3_moe", "moe_intermediate_size": 768,
    "norm_topk_prob": True, "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8,
    "num_hidden_layers": 48, "num_key_value_heads": 4, "output_router_logits": False, "rms_norm_eps": 1e-06,
    "rope_scaling": None, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001, "sliding_window": None,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.51.0", "use_cache": True,
    "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip


def test_the_published_files_are_read():
    mixtral = ExpertsConfig(num_experts=8, num_active=2, intermediate_size=14336, layers=tuple(range(32)))
    check_published(MIXTRAL_8X7B, experts=mixtral, windows=(0,) * 32)
    qwen = ExpertsConfig(num_experts=128, num_active=8, intermediate_size=768, layers=tuple(range(48)))
    check_published(QWEN3_30B_A3B, experts=qwen, has_qk_norm=True, head_size=128, windows=(0,) * 48)


def test_dense_layers_are_named_or_lie_between_the_sparse_ones():
    fields = QWEN3_MOE | {"num_hidden_layers": 6}
    assert parse(fields).experts.layers == (0, 2, 3, 4, 5)
    assert parse(fields | {"decoder_sparse_step": 2, "mlp_only_layers": [3]}).experts.layers == (1, 5)
    assert parse(fields | {"mlp_only_layers": list(range(6))}).experts is None
    assert not parse(without(fields, "norm_topk_prob")).experts.is_normed


def test_a_window_is_that_of_all_layers_if_it_is_used():
    assert parse(QWEN3_MOE).windows == (0, 0, 0)
    assert parse(QWEN3_MOE | {"use_sliding_window": True}).windows == (13, 13, 13)


def test_experts_are_stacked_from_a_tensor_each():
    recipes = models.weight_recipes(models.create(parse(MIXTRAL)))
    gate_up, down = (recipes[f"layers.1.mlp.experts_{name}"].of for name in ("gate_up", "down"))
    place = "model.layers.1.block_sparse_moe.experts"
    parts = tuple(Checkpoint(f"{place}.3.{part}.weight", (96, 64)) for part in ("w1", "w3"))
    assert gate_up.parts[3] == Reshape(Concat(parts, 0), (1, 192, 64)) and len(gate_up.parts) == 5
    assert down.parts[4] == Reshape(Checkpoint(f"{place}.4.w2.weight", (64, 96)), (1, 64, 96))


@pytest.mark.parametrize(
    ("config", "fields", "message"),
    [
        (MIXTRAL, {"num_experts_per_tok": 6}, "field 'num_experts_per_tok' is 6, expected an integer from 1 to 5"),
        (MIXTRAL, {"num_local_experts": 0}, "field 'num_local_experts' is 0, expected an integer from 1 to 1024"),
        (QWEN3_MOE, {"num_experts": 1025}, "field 'num_experts' is 1025, expected an integer from 0 to 1024"),
        (QWEN3_MOE, {"mlp_only_layers": [1.5]}, "field 'mlp_only_layers' is [1.5], expected a list of layers' numbers"),
        (QWEN3_MOE, {"decoder_sparse_step": 0}, "field 'decoder_sparse_step' is 0"),
    ],
)
def test_numbers_of_experts_that_cannot_be_are_named(config, fields, message):
    assert message in error_of(config | fields)


def test_more_active_experts_than_there_are_is_a_config_error():
    with pytest.raises(ConfigError, match="num_active must be an integer from 1 to 4, not 5"):
        ExpertsConfig(num_experts=4, num_active=5, intermediate_size=8, layers=(0,))
