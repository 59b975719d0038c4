"""What a checkpoint must have for a model: every contradiction names file, tensor and what to do."""

import pytest
import torch
from safetensors.torch import load_file

from tritium import models
from tritium.errors import CheckpointError, ConfigError
from tritium.testing import tiny_models as tiny
from tritium.testing.tiny_configs import LLAMA
from tritium.weights.recipes import Cast, Checkpoint, Concat, Constant, Slice, Transpose
from tritium.weights.safetensors import SafetensorsSource


def damage(path, change):
    """Rewrite a checkpoint's tensors after `change(tensors)`."""
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    tiny.write_tensors(path, tensors)


def error_of(path):
    """The message of loading `path`, which must name its weights file."""
    with pytest.raises(CheckpointError) as caught:
        tiny.our_model(path)
    assert str(caught.value).startswith(str(path))
    return str(caught.value)


def test_missing_tensors_are_all_named_at_once(tmp_path):
    path = tiny.make_checkpoint(tmp_path)
    damage(path, lambda t: [t.pop(f"model.layers.{i}.mlp.up_proj.weight") for i in (0, 2)])
    message = error_of(path)
    assert (
        "2 of 30 tensors are missing: 'model.layers.0.mlp.up_proj.weight', 'model.layers.2.mlp.up_proj.weight'"
        in message
    )


def test_a_wrong_shape_names_both_shapes(tmp_path):
    path = tiny.make_checkpoint(tmp_path)
    damage(path, lambda t: t.update({"model.layers.1.self_attn.k_proj.weight": torch.zeros(64, 64)}))
    assert "tensor 'model.layers.1.self_attn.k_proj.weight' is [64, 64], expected [32, 64]" in error_of(path)


def test_a_transposed_weight_is_named_as_the_checkpoint_stores_it(tmp_path):
    path = tiny.make_checkpoint(tmp_path, "gpt2")
    damage(path, lambda t: t.update({"transformer.h.0.attn.c_attn.weight": torch.zeros(192, 64)}))
    assert "tensor 'transformer.h.0.attn.c_attn.weight' is [192, 64], expected [64, 192]" in error_of(path)


def test_an_integer_weight_is_refused(tmp_path):
    path = tiny.make_checkpoint(tmp_path)
    damage(path, lambda t: t.update({"model.norm.weight": torch.ones(64, dtype=torch.int32)}))
    assert "tensor 'model.norm.weight' has dtype int32; only float32, bfloat16" in error_of(path)


def test_a_bias_that_config_json_does_not_know_is_not_dropped_silently(tmp_path):
    path = tiny.make_checkpoint(tmp_path)
    damage(path, lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)}))
    message = error_of(path)
    assert "1 of 31 tensors have no place in a LlamaForCausalLM with this config.json" in message
    assert "'model.layers.0.self_attn.q_proj.bias'" in message


def test_more_layers_than_config_json_says_are_not_dropped_silently(tmp_path):
    path = tiny.make_checkpoint(tmp_path)
    damage(
        path,
        lambda t: t.update({f"model.layers.3.{k}": t[f"model.layers.2.{k}"].clone() for k in ["mlp.up_proj.weight"]}),
    )
    assert "'model.layers.3.mlp.up_proj.weight'" in error_of(path)


def test_old_rotary_buffers_are_ignored(tmp_path):
    path = tiny.make_checkpoint(tmp_path)
    prompt = tiny.random_prompt(20)
    before = tiny.our_logits(tiny.our_model(path), prompt)
    damage(path, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.full((8,), 9.0)}))
    assert torch.equal(tiny.our_logits(tiny.our_model(path), prompt), before)


def test_an_untied_model_without_a_head_says_how_to_tie_it(tmp_path):
    path = tiny.make_checkpoint(tmp_path)
    damage(path, lambda t: t.pop("lm_head.weight"))
    message = error_of(path)
    assert "'lm_head.weight' is missing" in message and "tie_word_embeddings is false" in message


def test_a_tied_model_with_another_head_is_refused(tmp_path):
    path = tiny.make_checkpoint(tmp_path, "llama-tied")
    damage(path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] * 1.5}))
    message = error_of(path)
    assert "'lm_head.weight' differs from 'model.embed_tokens.weight'" in message
    assert "set tie_word_embeddings to false" in message


@pytest.mark.parametrize("name", ["llama-tied", "gpt2"])
def test_a_tied_model_may_carry_a_copy_of_its_head(tmp_path, name):
    path = tiny.make_checkpoint(tmp_path, name)
    embedding = "transformer.wte.weight" if name == "gpt2" else "model.embed_tokens.weight"
    prompt = tiny.random_prompt(20)
    before = tiny.our_logits(tiny.our_model(path), prompt)
    damage(path, lambda t: t.update({"lm_head.weight": t[embedding].clone()}))
    assert torch.equal(tiny.our_logits(tiny.our_model(path), prompt), before)


def test_recipes_say_how_each_weight_is_made(tmp_path):
    path = tiny.make_checkpoint(tmp_path, "gpt2", is_other_spelling=True)
    module = models.create(models.read_config(path, dtype="bfloat16"))
    recipes = models.weight_recipes(module, source=SafetensorsSource(path))
    fused = Checkpoint("h.1.attn.c_attn.weight", (64, 192))
    assert recipes["layers.1.attention.k_proj.weight"] == Cast(Transpose(Slice(fused, 1, 64, 128)), "bfloat16")
    assert recipes["layers.0.attention.v_proj.bias"] == Cast(
        Slice(Checkpoint("h.0.attn.c_attn.bias", (192,)), 0, 128, 192), "bfloat16"
    )
    assert recipes["embed_positions.weight"] == Cast(Checkpoint("wpe.weight", (96, 64)), "bfloat16")
    assert set(recipes) == {name for name, _ in module.named_parameters()}


def test_rotary_frequencies_are_a_constant_of_the_model():
    module = models.create(models.preset("llama-3.2-1b"))
    assert models.weight_recipes(module)["inv_freq"] == Constant("inv_freq")
    assert models.constants(module)["inv_freq"].dtype == torch.float32


def test_a_mapping_goes_before_the_familys_naming(tmp_path):
    module = models.create(models.parse_config(LLAMA, "config"))
    both = Concat((Checkpoint("a"), Checkpoint("b")), 0)
    mapping = {
        "layers.*.mlp.up_proj": "deep.*.up",
        "layers.1.mlp.up_proj.weight": "second",
        "norm.weight": "last.scale",
        "lm_head.weight": both,
    }
    recipes = models.weight_recipes(module, mapping=mapping)
    assert recipes["layers.0.mlp.up_proj.weight"] == Cast(Checkpoint("deep.0.up.weight", (96, 64)), "float32")
    assert recipes["layers.1.mlp.up_proj.weight"] == Cast(Checkpoint("second", (96, 64)), "float32")
    assert recipes["norm.weight"] == Cast(Checkpoint("last.scale", (64,)), "float32")
    assert recipes["lm_head.weight"] == Cast(both, "float32")
    assert recipes["embed_tokens.weight"] == Cast(Checkpoint("model.embed_tokens.weight", (199, 64)), "float32")


def test_a_mapping_of_a_parameter_that_is_not_there_is_refused():
    module = models.create(models.parse_config(LLAMA, "config"))
    with pytest.raises(ConfigError, match=r"'layers.\*.mlp.up_prj' is no parameter of Decoder; did you mean 'layers"):
        models.weight_recipes(module, mapping={"layers.*.mlp.up_prj": "x"})
