"""Every `--arch` preset at full size, on the meta device, against transformers."""

from importlib import import_module

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModel, AutoModelForCausalLM

from tritium import models
from tritium.errors import ConfigError
from tritium.models.rope import rope_frequencies
from tritium.testing.tiny_models import checkpoint_tensors
from tritium.weights.recipes import Checkpoint, leaves

PARAMETERS = {  # in millions, as the model cards say; embeddings counted once when tied
    "llama-2-7b": 6738,
    "llama-2-13b": 13016,
    "llama-2-70b": 68977,
    "llama-3-8b": 8030,
    "llama-3-70b": 70554,
    "llama-3.1-8b": 8030,
    "llama-3.2-1b": 1236,
    "llama-3.2-3b": 3213,
    "mistral-7b": 7242,
    "mixtral-8x7b": 46703,
    "qwen2-7b": 7616,
    "qwen2.5-0.5b": 494,
    "qwen2.5-1.5b": 1544,
    "qwen2.5-7b": 7616,
    "qwen3-0.6b": 596,
    "qwen3-8b": 8191,
    "qwen3-30b-a3b": 30532,
    "gemma-2-2b": 2614,
    "gemma-2-9b": 9242,
    "gemma-2-27b": 27227,
    "gemma-3-1b": 1000,
    "phi-3-mini-4k": 3821,
    "phi-3-medium-4k": 13960,
    "stablelm-3b": 2795,
    "stablelm-2-1.6b": 1645,
    "stablelm-2-12b": 12143,
    "gpt2": 124,
    "gpt2-medium": 355,
    "gpt2-large": 774,
    "gpt2-xl": 1558,
    "gpt-j-6b": 6051,
    "gpt-neox-20b": 20555,
    "pythia-160m": 162,
    "pythia-6.9b": 6857,
    "falcon-rw-1b": 1312,
    "falcon-7b": 6922,
    "falcon-40b": 41303,
    "bloom-560m": 559,
    "bloom-7b1": 7069,
    "opt-125m": 125,
    "opt-350m": 331,
    "opt-6.7b": 6658,
}
ENCODER_PARAMETERS = {  # the same, with the pooler, which published weights have, and without the head of masked tokens
    "bert-base": 109,
    "bert-large": 335,
    "roberta-base": 125,
    "roberta-large": 355,
    "xlm-roberta-base": 278,
    "xlm-roberta-large": 560,
}
HAS_ROPE = [name for name in models.PRESETS if models.preset(name).rope and name != "gpt-j-6b"]  # it has no such module


def hf_config(name):
    fields = dict(models.PRESETS.get(name) or models.ENCODER_PRESETS[name])
    return CONFIG_MAPPING[fields["model_type"]](**fields)


@pytest.mark.parametrize("name", models.PRESETS)
def test_the_loader_asks_for_exactly_the_tensors_transformers_has(name):
    with torch.device("meta"):
        reference = AutoModelForCausalLM.from_config(hf_config(name))
    expected = {key: tuple(tensor.shape) for key, tensor in checkpoint_tensors(reference).items()}
    recipes = models.weight_recipes(models.create(models.preset(name)))
    asked = {leaf.name: leaf.shape for r in recipes.values() for leaf in leaves(r) if isinstance(leaf, Checkpoint)}
    assert asked == expected
    assert round(reference.num_parameters() / 1e6) == PARAMETERS[name]


@pytest.mark.parametrize("name", models.ENCODER_PRESETS)
def test_an_encoders_loader_asks_for_exactly_the_tensors_transformers_has(name):
    with torch.device("meta"):
        reference = AutoModel.from_config(hf_config(name))  # published tensors are those of a model with a head
    prefix = "bert" if name.startswith("bert") else "roberta"
    expected = {f"{prefix}.{key}": tuple(tensor.shape) for key, tensor in reference.state_dict().items()}
    config = models.encoder_preset(name)
    recipes = models.weight_recipes(models.create_encoder(config), config)
    asked = {leaf.name: leaf.shape for r in recipes.values() for leaf in leaves(r) if isinstance(leaf, Checkpoint)}
    assert asked == expected
    assert round(reference.num_parameters() / 1e6) == ENCODER_PARAMETERS[name]
    assert (config.num_positions, config.dtype) == (512, "float32")


@pytest.mark.parametrize("name", HAS_ROPE)
def test_rotary_frequencies_equal_those_of_transformers_bit_for_bit(name):
    config, reference = models.preset(name), hf_config(name)
    expected = rotary_embedding(config.family, reference)
    found, scaling = rope_frequencies(config.rope, config.default_model_len)
    kind = "" if hasattr(expected, "inv_freq") else "full_attention_"
    assert torch.equal(found, getattr(expected, f"{kind}inv_freq"))
    assert scaling == getattr(expected, f"{kind}attention_scaling")
    if config.rope_local:
        local, _ = rope_frequencies(config.rope_local, config.default_model_len)
        assert torch.equal(local, expected.sliding_attention_inv_freq)


def rotary_embedding(family, config):
    """transformers' module that rotates the positions of this family."""
    family = family.removesuffix("_text")
    module = import_module(f"transformers.models.{family}.modeling_{family}")
    return next(cls for name, cls in vars(module).items() if name.endswith("RotaryEmbedding"))(config)


def test_a_preset_takes_no_memory():
    module = models.create(models.preset("llama-2-70b"))
    assert all(parameter.is_meta for parameter in module.parameters())
    assert sum(buffer.numel() for buffer in models.constants(module).values()) == 64


def test_an_unknown_preset_names_the_nearest_one():
    with pytest.raises(ConfigError, match=r"unknown architecture 'llama3-8b'; did you mean 'llama-3-8b'\?"):
        models.preset("llama3-8b")


def test_an_encoder_is_no_decoder_and_an_unknown_one_names_the_nearest():
    with pytest.raises(ConfigError, match=r"'bert-base' is an encoder, not a decoder: encoder_preset\('bert-base'\)"):
        models.preset("bert-base")
    with pytest.raises(ConfigError, match=r"unknown architecture 'bert-bas'; did you mean 'bert-base'\?"):
        models.preset("bert-bas")
    with pytest.raises(ConfigError, match=r"unknown encoder 'roberta-bas'; did you mean 'roberta-base'\?"):
        models.encoder_preset("roberta-bas")
