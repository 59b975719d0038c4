"""config.json as people publish it, and as it should not be. Each error names file, field and value."""

import json
import resource

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tritium import models
from tritium.errors import CheckpointError, ConfigError, TritiumError, UnsupportedModel
from tritium.testing.configs import ODD_VALUES, check_odd_values, error_of, parse, without
from tritium.testing.tiny_configs import GPT2, LLAMA, QWEN2, TINY_MODELS
from tritium.weights.source import DictSource

ROPES = {
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 32, "mscale": 1.3, "mscale_all_dim": 0.6},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32},
}


@pytest.mark.parametrize("kind", ROPES)
def test_old_and_new_rope_spellings_mean_the_same(kind):
    plain = without(LLAMA, "rope_theta")
    new = parse(plain | {"rope_parameters": {"rope_type": kind, "rope_theta": 5e5, **ROPES[kind]}})
    old = parse(plain | {"rope_theta": 5e5, "rope_scaling": {"rope_type": kind, **ROPES[kind]}})
    oldest = parse(plain | {"rope_theta": 5e5, "rope_scaling": {"type": kind, **ROPES[kind]}})
    assert new == old == oldest
    assert new.rope.type == kind and new.rope.theta == 5e5 and new.rope.factor == ROPES[kind]["factor"]


@pytest.mark.parametrize("field", ["factor", "low_freq_factor", "high_freq_factor"])
def test_a_scaling_without_one_of_its_numbers_names_it(field):
    scaling = {"rope_type": "llama3", **without(ROPES["llama3"], field)}
    assert f"field 'rope_scaling.{field}' is missing" in error_of(LLAMA | {"rope_scaling": scaling})


@pytest.mark.parametrize("kind", ["su", "mrope", "ntk", 7, None])
def test_an_unknown_rope_type_is_refused_with_the_known_ones(kind):
    message = error_of(LLAMA | {"rope_scaling": {"type": kind, "factor": 2.0}}, UnsupportedModel)
    assert f"field 'rope_scaling.type' is {kind!r}" in message
    assert "default, linear, dynamic, yarn, llama3, longrope" in message


@pytest.mark.parametrize(
    ("config", "length"),
    [
        (LLAMA, 128),
        (LLAMA | {"rope_scaling": {"type": "linear", "factor": 4.0}}, 128),
        (LLAMA | {"rope_scaling": {"type": "dynamic", "factor": 4.0}}, 512),
        (TINY_MODELS["llama-yarn"] | {"max_position_embeddings": 32}, 128),
        (TINY_MODELS["llama-llama3"], 128),
        (GPT2, 96),
    ],
)
def test_the_default_length_is_what_the_checkpoint_claims(config, length):
    assert parse(config).default_model_len == length


def test_learned_positions_end_and_rotary_ones_do_not():
    assert parse(LLAMA, max_model_len=100_000).max_model_len == 100_000
    with pytest.raises(ConfigError, match=r"max_model_len \(97\) must be at most 96"):
        parse(GPT2, max_model_len=97)


@pytest.mark.parametrize(
    ("fields", "dtype"),
    [
        ({"torch_dtype": "bfloat16"}, "bfloat16"),
        ({"dtype": "float16"}, "float16"),
        ({"torch_dtype": "torch.float32"}, "float32"),
        ({"torch_dtype": "float64"}, "float32"),
        ({}, "float32"),
        ({"torch_dtype": None}, "float32"),
    ],
)
def test_auto_takes_the_dtype_that_config_json_says(fields, dtype):
    assert parse(LLAMA | fields).dtype == dtype
    assert parse(LLAMA | fields, dtype="bfloat16").dtype == "bfloat16"


def test_auto_takes_the_dtype_of_the_weights_when_config_json_says_none():
    source = DictSource({"mask": torch.zeros(1, dtype=torch.uint8), "w": torch.zeros(1, dtype=torch.float16)})
    assert parse(LLAMA, source=source).dtype == "float16"


def test_a_stored_dtype_without_kernels_is_refused():
    assert "field 'torch_dtype' is 'float8_e4m3fn'" in error_of(
        LLAMA | {"torch_dtype": "float8_e4m3fn"}, UnsupportedModel
    )


LLAMA_FIELDS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
GPT_FIELDS = ("vocab_size", "n_embd", "n_layer", "n_head")
MUST_HAVE = [(LLAMA, name) for name in LLAMA_FIELDS] + [(GPT2, name) for name in GPT_FIELDS]


@pytest.mark.parametrize(("config", "name"), MUST_HAVE)
def test_a_missing_field_is_named(config, name):
    assert f"field {name!r} is missing" in error_of(without(config, name))


ODD_MODELS = (
    *("llama-yarn-mscale", "mistral", "qwen2-window", "qwen3", "gemma2", "phi3-longrope", "stablelm", "gpt2", "gptj"),
    *("gpt_neox", "opt", "falcon-grouped", "falcon-alibi", "bloom", "mixtral", "qwen3_moe", "gemma3"),
)
ABSURD = (-1, 0, 10**12, 2**63, 1.5, float("nan"), "64", True, None, [64])


@pytest.mark.parametrize("value", ABSURD, ids=repr)
@pytest.mark.parametrize(("config", "name"), MUST_HAVE)
def test_an_absurd_size_is_named_with_its_value_before_memory_is_taken(config, name, value):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert f"field {name!r} is {value!r}, expected an integer from 1 to" in error_of(config | {name: value})
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 10_000  # kilobytes


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_attention_heads": 7}, "field 'num_attention_heads' is 7, which does not divide the hidden size 64"),
        ({"num_key_value_heads": 3}, "field 'num_key_value_heads' is 3, which does not divide num_attention_heads (4)"),
        ({"num_key_value_heads": 0}, "field 'num_key_value_heads' is 0, expected an integer from 1 to 4"),
        ({"num_key_value_heads": 8}, "field 'num_key_value_heads' is 8, expected an integer from 1 to 4"),
        ({"head_dim": 0}, "field 'head_dim' is 0, expected an integer from 1"),
        ({"head_dim": 15}, "field 'head_dim' is 15: an odd head cannot be rotated in pairs"),
        ({"rms_norm_eps": -1e-5}, "field 'rms_norm_eps' is -1e-05, expected a number above 0"),
        ({"rms_norm_eps": "1e-5"}, "field 'rms_norm_eps' is '1e-5'"),
        ({"rope_theta": 0}, "field 'rope_theta' is 0"),
        ({"rope_theta": float("inf")}, "field 'rope_theta' is inf"),
        ({"max_position_embeddings": -5}, "field 'max_position_embeddings' is -5"),
        ({"tie_word_embeddings": "yes"}, "field 'tie_word_embeddings' is 'yes', expected true or false"),
        ({"attention_bias": 1}, "field 'attention_bias' is 1, expected true or false"),
        ({"rope_scaling": 4.0}, "field 'rope_scaling' is 4.0, expected an object"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "field 'rope_scaling.factor' is 0"),
        ({"rope_scaling": {"type": "linear", "factor": "4"}}, "field 'rope_scaling.factor' is '4'"),
        (
            {"rope_scaling": {"rope_type": "llama3", **ROPES["llama3"], "high_freq_factor": 1.0}},
            "field 'rope_scaling.high_freq_factor' is 1, expected more than low_freq_factor (1)",
        ),
        ({"architectures": "LlamaForCausalLM"}, "field 'architectures' is 'LlamaForCausalLM', expected a list"),
    ],
)
def test_a_contradiction_names_the_field_and_its_value(fields, message):
    assert message in error_of(LLAMA | fields)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LLAMA | {"hidden_act": "xielu"}, "field 'hidden_act' is 'xielu'"),
        (LLAMA | {"partial_rotary_factor": 0.5}, "field 'partial_rotary_factor' is 0.5"),
        (GPT2 | {"add_cross_attention": True}, "field 'add_cross_attention' is True"),
        (QWEN2 | {"use_mrope": True}, "field 'use_mrope' is True"),
        (LLAMA | {"architectures": ["FooForCausalLM"]}, "architecture 'FooForCausalLM' is unknown"),
        (without(LLAMA, "architectures") | {"model_type": "foo"}, "model_type 'foo' is unknown"),
    ],
)
def test_a_feature_no_family_has_is_unsupported(config, message):
    assert message in error_of(config, UnsupportedModel)


def test_an_unknown_architecture_lists_the_known_ones_and_how_to_add_one():
    message = error_of(LLAMA | {"architectures": ["FooForCausalLM"]}, UnsupportedModel)
    for known in ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "GPT2LMHeadModel", "GPTJForCausalLM"):
        assert known in message
    assert "tritium/models/families" in message


def test_the_model_type_stands_in_for_a_missing_architecture():
    assert parse(without(QWEN2, "architectures")).family == "qwen2"
    assert "field 'model_type' is missing" in error_of(without(LLAMA, "architectures", "model_type"))


@pytest.mark.parametrize("odd", ODD_VALUES, ids=repr)
@pytest.mark.parametrize("name", ODD_MODELS)
def test_any_odd_value_in_any_field_is_read_or_refused_by_design(name, odd):
    check_odd_values(name, odd)


EXTREMES = (5e-324, 1e-300, 1e-40, 1.0 + 1e-15, 1e12, 1e300, 0.0, -0.0, 1, 2**24)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(EXTREMES),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
ROPE_FIELDS = [
    *("type", "rope_type", "factor", "rope_theta", "original_max_position_embeddings", "beta_fast", "beta_slow"),
    *("mscale", "mscale_all_dim", "low_freq_factor", "high_freq_factor", "attention_factor", "truncate"),
]


@given(
    st.dictionaries(st.sampled_from(ROPE_FIELDS), json_values, max_size=6),
    st.sampled_from(["yarn", "llama3", "linear", "dynamic"]),
)
def test_any_rope_settings_give_finite_frequencies_or_a_designed_error(fields, kind):
    try:
        module = models.create(parse(LLAMA | {"rope_scaling": {"rope_type": kind, "factor": 2.0, **fields}}))
    except TritiumError:
        return
    assert torch.isfinite(module.inv_freq).all()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not JSON"),
        ("{", "is not JSON"),
        ('{"a": ' + "[" * 100_000, "is not JSON"),
        ("[1, 2]", "is a JSON list, expected an object"),
        ("\x80", "is not JSON"),
    ],
    ids=["empty", "cut", "deep", "list", "binary"],
)
def test_a_damaged_file_is_named(tmp_path, text, message):
    (tmp_path / "config.json").write_bytes(text.encode("latin1"))
    with pytest.raises(CheckpointError, match=message) as caught:
        models.read_config(tmp_path)
    assert str(tmp_path / "config.json") in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json: there is no such file"):
        models.read_config(tmp_path)


def test_a_directory_is_read_like_its_contents(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    assert models.read_config(tmp_path, dtype="bfloat16", max_model_len=50) == parse(
        LLAMA, dtype="bfloat16", max_model_len=50
    )
