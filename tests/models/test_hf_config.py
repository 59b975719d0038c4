"""config.json as people publish it, and as it should not be. Each error names file, field and value."""

import json
import resource

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tritium import models
from tritium.errors import CheckpointError, ConfigError, TritiumError, UnsupportedModel
from tritium.testing.tiny_models import GEMMA2, GPT2, GPTJ, LLAMA, MISTRAL, QWEN2, QWEN3, TINY_MODELS
from tritium.weights.source import DictSource


def parse(config, **more):
    return models.parse_config(config, "dir/config.json", **more)


def without(config, *names):
    return {name: value for name, value in config.items() if name not in names}


def error_of(config, kind=CheckpointError):
    with pytest.raises(kind) as caught:
        parse(config)
    assert str(caught.value).startswith("dir/config.json: ")
    return str(caught.value)


def test_a_llama_config_says_what_it_says():
    config = parse(LLAMA)
    assert (config.family, config.num_layers, config.num_heads, config.num_kv_heads) == ("llama", 3, 4, 2)
    assert (config.hidden_size, config.head_size, config.intermediate_size, config.vocab_size) == (64, 16, 96, 199)
    assert (config.norm, config.norm_eps, config.activation, config.is_gated) == ("rms_norm", 1e-5, "silu", True)
    assert config.rope == models.RopeConfig(dim=16, theta=10000.0)
    assert config.windows == (0, 0, 0)
    assert not (config.has_qkv_bias or config.has_output_bias or config.has_mlp_bias or config.tie_word_embeddings)


def test_gptj_rotates_part_of_a_head_in_neighbouring_pairs_beside_its_mlp():
    config = parse(GPTJ)
    assert config.rope == models.RopeConfig(dim=8, is_interleaved=True)
    assert config.is_parallel and config.has_lm_head_bias and not config.is_gated
    assert config.intermediate_size == 80


def test_gpt2_has_learned_positions_and_a_tied_head():
    config = parse(GPT2)
    assert config.rope is None and config.tie_word_embeddings and config.intermediate_size == 256
    assert config.attention_scale(1) == 0.25
    assert parse(TINY_MODELS["gpt2-scaled-by-layer"]).attention_scale(1) == 0.125
    assert parse(GPT2 | {"scale_attn_weights": False}).attention_scale(2) == 1.0


def test_mistral_windows_every_layer_and_null_means_none():
    assert parse(MISTRAL).windows == (11, 11, 11)
    assert parse(MISTRAL | {"sliding_window": None}).windows == (0, 0, 0)
    assert parse(without(MISTRAL, "sliding_window")).windows == (4096, 4096, 4096)  # transformers' default


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


def test_gemma2_windows_every_other_layer_and_caps_scores_and_logits():
    config = parse(GEMMA2)
    assert (config.windows, config.attention_softcap, config.logit_softcap) == ((12, 0, 12), 2.0, 6.0)
    assert (config.attention_scale(0), config.embedding_scale) == (20**-0.5, 8.0)
    assert (config.norm, config.has_post_norms, config.activation) == ("offset_rms_norm", True, "gelu_tanh")
    absent = parse(without(GEMMA2, "attn_logit_softcapping", "final_logit_softcapping"))
    assert (absent.attention_softcap, absent.logit_softcap) == (50.0, 30.0)  # transformers' defaults
    assert parse(GEMMA2 | {"attn_logit_softcapping": None}).attention_softcap == 0
    types = ["full_attention", "full_attention", "sliding_attention"]
    assert parse(GEMMA2 | {"layer_types": types}).windows == (0, 0, 12)


PUBLISHED = {  # with the fields that say nothing about the shape, as the files of these models have them
    "gpt2": (
        {
            "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1,
            "bos_token_id": 50256, "embd_pdrop": 0.1, "eos_token_id": 50256, "initializer_range": 0.02,
            "layer_norm_epsilon": 1e-05, "model_type": "gpt2", "n_ctx": 1024, "n_embd": 768, "n_head": 12,
            "n_layer": 12, "n_positions": 1024, "resid_pdrop": 0.1, "summary_activation": None,
            "summary_first_dropout": 0.1, "summary_proj_to_labels": True, "summary_type": "cls_index",
            "summary_use_proj": True, "vocab_size": 50257,
            "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
        },
        {"tie_word_embeddings": True, "intermediate_size": 3072, "head_size": 64, "dtype": "float32"},
    ),
    "gpt-j": (
        {
            "activation_function": "gelu_new", "architectures": ["GPTJForCausalLM"], "attn_pdrop": 0.0,
            "bos_token_id": 50256, "eos_token_id": 50256, "gradient_checkpointing": False, "layer_norm_epsilon": 1e-05,
            "model_type": "gptj", "n_embd": 4096, "n_head": 16, "n_inner": None, "n_layer": 28, "n_positions": 2048,
            "rotary": True, "rotary_dim": 64, "scale_attn_weights": True, "tie_word_embeddings": False,
            "tokenizer_class": "GPT2Tokenizer", "transformers_version": "4.18.0.dev0", "use_cache": True,
            "vocab_size": 50400,
        },
        {"intermediate_size": 16384, "head_size": 256, "has_lm_head_bias": True, "is_parallel": True},
    ),
    "llama-3.1-instruct": (
        {
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
        },
        {"head_size": 128, "num_kv_heads": 8, "dtype": "bfloat16", "default_model_len": 131072},
    ),
    "qwen2.5-yarn": (
        {
            "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
            "eos_token_id": 151645, "hidden_act": "silu", "hidden_size": 3584, "initializer_range": 0.02,
            "intermediate_size": 18944, "max_position_embeddings": 32768, "max_window_layers": 28,
            "model_type": "qwen2", "num_attention_heads": 28, "num_hidden_layers": 28, "num_key_value_heads": 4,
            "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 131072, "tie_word_embeddings": False,
            "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"},
            "torch_dtype": "bfloat16", "use_cache": True, "use_sliding_window": False, "vocab_size": 152064,
        },
        {"has_qkv_bias": True, "has_output_bias": False, "windows": (0,) * 28, "default_model_len": 131072},
    ),
    "qwen3-0.6b": (
        {
            "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
            "bos_token_id": 151643, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 1024,
            "initializer_range": 0.02, "intermediate_size": 3072, "max_position_embeddings": 40960,
            "max_window_layers": 28, "model_type": "qwen3", "num_attention_heads": 16, "num_hidden_layers": 28,
            "num_key_value_heads": 8, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000,
            "sliding_window": None, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
            "transformers_version": "4.51.0", "use_cache": True, "use_sliding_window": False, "vocab_size": 151936,
        },
        {"head_size": 128, "has_qk_norm": True, "has_qkv_bias": False, "windows": (0,) * 28, "dtype": "bfloat16"},
    ),
    "gemma-2-27b": (
        {
            "architectures": ["Gemma2ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
            "attn_logit_softcapping": 50.0, "bos_token_id": 2, "cache_implementation": "hybrid", "eos_token_id": 1,
            "final_logit_softcapping": 30.0, "head_dim": 128, "hidden_act": "gelu_pytorch_tanh",
            "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 4608, "initializer_range": 0.02,
            "intermediate_size": 36864, "max_position_embeddings": 8192, "model_type": "gemma2",
            "num_attention_heads": 32, "num_hidden_layers": 46, "num_key_value_heads": 16, "pad_token_id": 0,
            "query_pre_attn_scalar": 144, "rms_norm_eps": 1e-06, "rope_theta": 10000.0, "sliding_window": 4096,
            "sliding_window_size": 4096, "torch_dtype": "float32", "transformers_version": "4.42.0.dev0",
            "use_cache": True, "vocab_size": 256000,
        },
        {"head_size": 128, "windows": (4096, 0) * 23, "attention_scales": (1 / 12,) * 46, "tie_word_embeddings": True},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_files_are_read(name):
    content, expected = PUBLISHED[name]
    config = parse(content)
    assert {field: getattr(config, field) for field in expected} == expected


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


@pytest.mark.parametrize("kind", ["su", "longrope", "mrope", "ntk", 7, None])
def test_an_unknown_rope_type_is_refused_with_the_known_ones(kind):
    message = error_of(LLAMA | {"rope_scaling": {"type": kind, "factor": 2.0}}, UnsupportedModel)
    assert f"field 'rope_scaling.type' is {kind!r}" in message
    assert "default, linear, dynamic, yarn, llama3" in message


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
        (LLAMA | {"quantization_config": {"quant_method": "gptq"}}, "field 'quantization_config'"),
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
    assert "tritium/models/families.py" in message


def test_the_model_type_stands_in_for_a_missing_architecture():
    assert parse(without(QWEN2, "architectures")).family == "qwen2"
    assert "field 'model_type' is missing" in error_of(without(LLAMA, "architectures", "model_type"))


@pytest.mark.parametrize("odd", [[1, 2], {"a": 1}, "rope", 0.1, -3, 10**30, None, True, float("nan"), ""], ids=repr)
@pytest.mark.parametrize("name", ["llama-yarn-mscale", "mistral", "qwen2-window", "qwen3", "gemma2", "gpt2", "gptj"])
def test_any_odd_value_in_any_field_is_read_or_refused_by_design(name, odd):
    for field in TINY_MODELS[name]:
        try:
            models.create(parse(TINY_MODELS[name] | {field: odd}))
        except TritiumError as error:
            assert field in str(error) or "archit" in str(error)


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
