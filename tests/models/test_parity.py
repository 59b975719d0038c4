"""Our modules against transformers, on models in which every tensor matters. (Engines are compared in tests/engine.)"""

import json

import pytest
import torch
from safetensors.torch import load_file

from tritium.models import MixtureOfExperts
from tritium.ops.moe import route
from tritium.testing import tiny_models as tiny
from tritium.testing.tiny_configs import GEMMA2, GEMMA3, TINY_MODELS
from tritium.weights.source import DictSource

PROMPT_LEN = 60  # beyond every window and every original_max_position_embeddings of TINY_MODELS
SCALED = [name for name, config in TINY_MODELS.items() if config.get("rope_scaling")]
BASES = (
    *("llama", "mistral", "qwen2-window", "qwen3", "gemma2", "phi3", "stablelm", "gpt2", "gptj", "gpt_neox", "opt"),
    *("falcon", "bloom", "mixtral", "qwen3_moe", "gemma3"),
)
PERTURBED = (
    *("llama-mha-biased", "llama-tied", "mistral", "qwen2-window", "qwen3", "qwen3-biased"),
    *("gemma2", "gemma2-no-caps", "stablelm", "stablelm-biased-tied", "gpt2", "gpt2-untied", "gptj", "gptj-tied"),
    *("phi3", "gpt_neox", "gpt_neox-sequential", "opt", "opt-post-norm", "opt-untied"),
    *("falcon", "falcon-grouped", "falcon-grouped-one-norm", "falcon-alibi", "bloom", "bloom-untied"),
    *("mixtral", "qwen3_moe", "qwen3_moe-not-normed", "gemma3", "stablelm-parallel", "stablelm-qk-norm"),
)

LIVELY = {"bloom": 1, "gemma3": 4}  # seeds of models that do not soon turn in circles, as small ones like to


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.full) for seed in (2, 3))])
@pytest.mark.parametrize("name", TINY_MODELS)
def test_logits_equal_those_of_transformers(tmp_path, name, seed):
    path = tiny.make_checkpoint(tmp_path, name, seed=seed)
    prompt = tiny.random_prompt(PROMPT_LEN, seed=seed)
    expected = tiny.reference_logits(tiny.reference_model(path), prompt)
    found = tiny.our_logits(tiny.our_model(path, max_model_len=PROMPT_LEN), prompt)
    assert expected.std() >= 2
    assert tiny.relative_error(found, expected) <= 1e-4


@pytest.mark.parametrize("name", SCALED)
def test_the_prompt_is_long_enough_for_the_scaling_to_matter(tmp_path, name):
    plain = {**TINY_MODELS[name], "rope_scaling": None}
    prompt = tiny.random_prompt(PROMPT_LEN)
    scaled = tiny.our_model(tiny.make_checkpoint(tmp_path / "scaled", name), max_model_len=PROMPT_LEN)
    unscaled = tiny.our_model(tiny.make_checkpoint(tmp_path / "plain", plain), max_model_len=PROMPT_LEN)
    assert tiny.relative_error(tiny.our_logits(scaled, prompt), tiny.our_logits(unscaled, prompt)) > 0.05


@pytest.mark.parametrize("name", ["mistral", "qwen2-window", "qwen3", "gemma2", "phi3", "mixtral-window", "gemma3"])
def test_the_prompt_is_long_enough_for_the_window_to_matter(tmp_path, name):
    wide = {**TINY_MODELS[name], "sliding_window": 4096}
    prompt = tiny.random_prompt(PROMPT_LEN)
    narrow = tiny.our_logits(tiny.our_model(tiny.make_checkpoint(tmp_path / "narrow", name)), prompt)
    full = tiny.our_logits(tiny.our_model(tiny.make_checkpoint(tmp_path / "full", wide)), prompt)
    window = TINY_MODELS[name]["sliding_window"]
    assert torch.equal(narrow[:window], full[:window])
    assert tiny.relative_error(narrow[window:], full[window:]) > 0.05


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "qwen3_moe-not-normed"])
def test_experts_have_unequal_loads_and_weights(tmp_path, name):
    module = tiny.our_model(tiny.make_checkpoint(tmp_path, name))
    routed = []
    for layer in module.layers:
        if isinstance(layer.mlp, MixtureOfExperts):
            layer.mlp.router.register_forward_hook(
                lambda router, x, logits, k=layer.mlp.num_active: routed.append(route(logits, k, True))
            )
    tiny.our_logits(module, tiny.random_prompt(PROMPT_LEN))
    for experts, weights in routed:
        loads = experts.flatten().bincount(minlength=module.config.experts.num_experts)
        assert loads.min() > 0 and loads.max() >= 1.3 * loads.min()
        assert weights[:, 0].std() > 0.1
    assert len(routed) == len(module.config.experts.layers)


@pytest.mark.parametrize("name", ["falcon-alibi", "bloom"])
def test_the_prompt_is_long_enough_for_alibi_to_matter(tmp_path, name):
    path, prompt = tiny.make_checkpoint(tmp_path, name), tiny.random_prompt(PROMPT_LEN)
    module = tiny.our_model(path)
    biased = tiny.our_logits(module, prompt)
    for layer in module.layers:
        assert len(set(layer.attention.alibi_slopes.tolist())) == layer.attention.num_heads
        layer.attention.alibi_slopes.zero_()
    assert tiny.relative_error(tiny.our_logits(module, prompt)[1:], biased[1:]) > 0.05


def test_a_multimodal_gemma_3_is_its_text_model(tmp_path):
    path, prompt = tiny.make_checkpoint(tmp_path, "gemma3"), tiny.random_prompt(PROMPT_LEN)
    expected = tiny.reference_logits(tiny.reference_model(path), prompt)
    tensors = {f"language_model.{name}": t for name, t in load_file(path / "model.safetensors").items()}
    tensors["vision_tower.vision_model.embeddings.patch_embedding.bias"] = torch.ones(3)
    tiny.write_tensors(path, tensors)
    wrapped = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "text_config": GEMMA3}
    (path / "config.json").write_text(json.dumps(wrapped))
    assert tiny.relative_error(tiny.our_logits(tiny.our_model(path), prompt), expected) <= 1e-4


@pytest.mark.parametrize("cap", ["attn_logit_softcapping", "final_logit_softcapping"])
def test_the_soft_caps_of_gemma_2_are_reached(tmp_path, cap):
    prompt = tiny.random_prompt(PROMPT_LEN)
    capped = tiny.our_model(tiny.make_checkpoint(tmp_path / "capped", "gemma2"))
    free = tiny.our_model(tiny.make_checkpoint(tmp_path / "free", GEMMA2 | {cap: None}))
    assert tiny.relative_error(tiny.our_logits(capped, prompt), tiny.our_logits(free, prompt)) > 0.05


@pytest.mark.parametrize("name", PERTURBED)
def test_perturbing_any_tensor_changes_our_logits_as_it_changes_theirs(tmp_path, name):
    path = tiny.make_checkpoint(tmp_path, name)
    prompt = tiny.random_prompt(PROMPT_LEN if "moe" in name or "mixtral" in name else 24)  # each expert has its tokens
    reference, tensors = tiny.reference_model(path), load_file(path / "model.safetensors")
    before = tiny.reference_logits(reference, prompt)
    module = tiny.our_model(path)
    generator = torch.Generator().manual_seed(7)  # not 0: the draws of make_checkpoint again would only scale a tensor
    for tensor_name, tensor in tensors.items():
        changed = tensor + 0.3 * tensor.square().mean().sqrt() * torch.randn(tensor.shape, generator=generator)
        tiny.reference_tensor(reference, tensor_name).copy_(changed)
        after = tiny.reference_logits(reference, prompt)
        found = tiny.our_logits(tiny.fill(module, DictSource({**tensors, tensor_name: changed})), prompt)
        # without RoPE a bias of the keys adds the same to all scores of a query, which softmax does not see
        can_matter = not (name.startswith("opt") and "k_proj.bias" in tensor_name)
        assert not can_matter or tiny.relative_error(after, before) > 1e-3, f"{tensor_name} does not matter"
        assert tiny.relative_error(found, after) <= 1e-4, tensor_name
        tiny.reference_tensor(reference, tensor_name).copy_(tensor)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", BASES)
def test_low_precision_is_at_most_twice_as_far_from_fp32_as_transformers_is(tmp_path, name, dtype):
    path = tiny.make_checkpoint(tmp_path, name, dtype=dtype)
    prompt = tiny.random_prompt(PROMPT_LEN)
    exact = tiny.reference_logits(tiny.reference_model(path), prompt)
    theirs = tiny.reference_logits(tiny.reference_model(path, dtype), prompt)
    ours = tiny.our_logits(tiny.our_model(path, dtype="auto"), prompt)
    assert (ours - exact).square().mean().sqrt() <= 2 * (theirs - exact).square().mean().sqrt()


@pytest.mark.parametrize("stored", ["bfloat16", "float16", "float32"])
def test_a_checkpoint_of_any_dtype_computes_in_fp32_as_transformers_does(tmp_path, stored):
    path = tiny.make_checkpoint(tmp_path, "qwen2", dtype=stored, num_shards=3)
    prompt = tiny.random_prompt(20)
    expected = tiny.reference_logits(tiny.reference_model(path), prompt)
    assert tiny.relative_error(tiny.our_logits(tiny.our_model(path), prompt), expected) <= 1e-4


@pytest.mark.parametrize("name", ["gpt2", "gptj", "gpt_neox", "opt", "bloom"])
def test_files_of_other_spellings_load(tmp_path, name):
    path = tiny.make_checkpoint(tmp_path, name, is_other_spelling=True, num_shards=2)
    prompt = tiny.random_prompt(PROMPT_LEN)
    expected = tiny.reference_logits(tiny.reference_model(path), prompt)
    assert tiny.relative_error(tiny.our_logits(tiny.our_model(path), prompt), expected) <= 1e-4


@pytest.mark.parametrize(("name", "pairs"), [("phi3-longrope", 8), ("phi3-longrope-partial", 6)])
def test_longrope_takes_the_short_factors_for_a_short_engine_and_the_long_ones_for_a_long_one(tmp_path, name, pairs):
    """As transformers does for sequences on the same side of the original length."""
    path = tiny.make_checkpoint(tmp_path, name)
    prompt = tiny.random_prompt(30)
    short, long = (tiny.our_logits(tiny.our_model(path, max_model_len=n), prompt) for n in (32, 33))
    expected = tiny.reference_logits(tiny.reference_model(path), prompt)
    assert tiny.relative_error(short, expected) <= 1e-4
    assert tiny.relative_error(long, expected) > 0.05


def test_dynamic_rope_equals_the_unscaled_one_up_to_its_original_length(tmp_path):
    path = tiny.make_checkpoint(tmp_path, "llama-dynamic")
    prompt = tiny.random_prompt(32)
    expected = tiny.reference_logits(tiny.reference_model(path), prompt)
    assert tiny.relative_error(tiny.our_logits(tiny.our_model(path, max_model_len=32), prompt), expected) <= 1e-4


@pytest.mark.parametrize("length", [10, 32, 60])
def test_frozen_dynamic_rope_is_the_formula_of_transformers_at_every_length(tmp_path, length):
    path = tiny.make_checkpoint(tmp_path, "llama-dynamic")
    prompt = tiny.random_prompt(length)
    reference = tiny.freeze_dynamic_rope(tiny.reference_model(path), 90)
    expected = tiny.reference_logits(reference, prompt)
    assert tiny.relative_error(tiny.our_logits(tiny.our_model(path, max_model_len=90), prompt), expected) <= 1e-4


@pytest.mark.parametrize("name", BASES)
def test_greedy_decoding_of_the_tiny_models_does_not_repeat_itself(tmp_path, name):
    module = tiny.our_model(tiny.make_checkpoint(tmp_path, name, seed=LIVELY.get(name, 0)))
    tokens = tiny.random_prompt(5)
    for _ in range(32):
        tokens.append(int(tiny.our_logits(module, tokens)[-1].argmax()))
    assert len(set(tokens[5:])) >= 16
