"""Every `--arch` preset at full size, on the meta device, against transformers."""

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.gemma2.modeling_gemma2 import Gemma2RotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.mistral.modeling_mistral import MistralRotaryEmbedding
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding
from transformers.models.stablelm.modeling_stablelm import StableLmRotaryEmbedding

from tritium import models
from tritium.errors import ConfigError
from tritium.models.rope import rope_frequencies
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
    "qwen2-7b": 7616,
    "qwen2.5-0.5b": 494,
    "qwen2.5-1.5b": 1544,
    "qwen2.5-7b": 7616,
    "qwen3-0.6b": 596,
    "qwen3-8b": 8191,
    "gemma-2-2b": 2614,
    "gemma-2-9b": 9242,
    "gemma-2-27b": 27227,
    "stablelm-3b": 2795,
    "stablelm-2-1.6b": 1645,
    "gpt2": 124,
    "gpt2-medium": 355,
    "gpt2-large": 774,
    "gpt2-xl": 1558,
    "gpt-j-6b": 6051,
}

ROTARY = {
    "llama": LlamaRotaryEmbedding,
    "mistral": MistralRotaryEmbedding,
    "qwen2": Qwen2RotaryEmbedding,
    "qwen3": Qwen3RotaryEmbedding,
    "gemma2": Gemma2RotaryEmbedding,
    "stablelm": StableLmRotaryEmbedding,
}


def hf_config(name):
    fields = dict(models.PRESETS[name])
    return CONFIG_MAPPING[fields["model_type"]](**fields)


@pytest.mark.parametrize("name", models.PRESETS)
def test_the_loader_asks_for_exactly_the_tensors_transformers_has(name):
    with torch.device("meta"):
        reference = AutoModelForCausalLM.from_config(hf_config(name))
    expected = {key: tuple(tensor.shape) for key, tensor in reference.state_dict().items()}
    if reference.config.tie_word_embeddings:
        del expected["lm_head.weight"]
    recipes = models.weight_recipes(models.create(models.preset(name)))
    asked = {leaf.name: leaf.shape for r in recipes.values() for leaf in leaves(r) if isinstance(leaf, Checkpoint)}
    assert asked == expected
    assert round(reference.num_parameters() / 1e6) == PARAMETERS[name]


@pytest.mark.parametrize("name", [name for name in models.PRESETS if not name.startswith("gpt")])
def test_rotary_frequencies_equal_those_of_transformers_bit_for_bit(name):
    config, reference = models.preset(name), hf_config(name)
    expected = ROTARY[config.family](reference)
    found, scaling = rope_frequencies(config.rope, config.default_model_len)
    assert torch.equal(found, expected.inv_freq)
    assert scaling == expected.attention_scaling


def test_a_preset_takes_no_memory():
    module = models.create(models.preset("llama-2-70b"))
    assert all(parameter.is_meta for parameter in module.parameters())
    assert sum(buffer.numel() for buffer in models.constants(module).values()) == 64


def test_an_unknown_preset_names_the_nearest_one():
    with pytest.raises(ConfigError, match=r"unknown architecture 'llama3-8b'; did you mean 'llama-3-8b'\?"):
        models.preset("llama3-8b")
