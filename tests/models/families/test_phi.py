"""config.json of Phi-3."""

import pytest

from tritium import models
from tritium.testing.configs import check_published, error_of, parse, without
from tritium.testing.tiny_configs import PHI3, TINY_MODELS

PHI3_MINI_128K = {
    "architectures": ["Phi3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 1,
    "embd_pdrop": 0.0, "eos_token_id": 32000, "hidden_act": "silu", "hidden_size": 3072, "initializer_range": 0.02,
    "intermediate_size": 8192, "max_position_embeddings": 131072, "model_type": "phi3", "num_attention_heads": 32,
    "num_hidden_layers": 32, "num_key_value_heads": 32, "original_max_position_embeddings": 4096,
    "pad_token_id": 32000, "resid_pdrop": 0.0, "rms_norm_eps": 1e-05, "rope_theta": 10000.0,
    "rope_scaling": {"long_factor": [4.0] * 48, "short_factor": [1.0] * 48, "type": "longrope"},
    "sliding_window": 262144, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "transformers_version": "4.40.2", "use_cache": True, "vocab_size": 32064,
}  # fmt: skip


def test_the_published_file_of_phi_3_mini_128k_is_read():
    check_published(PHI3_MINI_128K, head_size=96, num_kv_heads=32, windows=(262144,) * 32, default_model_len=131072)
    rope = parse(PHI3_MINI_128K).rope
    assert (rope.type, rope.dim, rope.factor, rope.original_max_position_embeddings) == ("longrope", 96, 32.0, 4096)
    assert rope.long_factors == (4.0,) * 48


def test_the_first_files_call_longrope_by_other_names():
    new = TINY_MODELS["phi3-longrope"]
    for name in ("su", "yarn"):
        assert parse(new | {"rope_scaling": new["rope_scaling"] | {"type": name}}) == parse(new)


def test_part_of_a_head_may_be_rotated_and_a_window_may_be_absent():
    config = parse(without(PHI3, "sliding_window") | {"partial_rotary_factor": 0.5})
    assert config.rope == models.RopeConfig(dim=8) and config.windows == (0, 0, 0)


@pytest.mark.parametrize("factors", [None, 3.0, [1.0] * 7, [1.0] * 9, [*[1.0] * 7, 0], [*[1.0] * 7, "1"], [True] * 8])
@pytest.mark.parametrize("name", ["short_factor", "long_factor"])
def test_longrope_needs_a_number_for_each_rotated_pair(name, factors):
    scaling = TINY_MODELS["phi3-longrope"]["rope_scaling"] | {name: factors}
    message = error_of(TINY_MODELS["phi3-longrope"] | {"rope_scaling": scaling})
    assert f"field 'rope_scaling.{name}' is" in message and "expected 8 numbers above 0" in message


def test_longrope_without_an_original_length_to_speak_of_is_refused():
    config = TINY_MODELS["phi3-longrope"] | {"original_max_position_embeddings": 1}
    assert "field 'rope_scaling.original_max_position_embeddings' is 1" in error_of(config)
