"""Models of one's own: plain torch with the checkpoint's names, or a built-in with one part changed."""

import json
from typing import ClassVar

import torch
from torch import nn

from tritium import models
from tritium.testing import tiny_models as tiny
from tritium.testing.tiny_configs import LLAMA, MISTRAL
from tritium.weights.safetensors import SafetensorsSource
from tritium.weights.source import ModuleSource


class PlainBlock(nn.Module):
    def __init__(self, size, heads):
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(size, 3 * size), nn.Linear(size, size)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(1, 2, 0, 3)
        out = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.out(out.transpose(0, 1).flatten(1))


class PlainModel(nn.Module):
    """Knows nothing of Tritium."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.blocks = nn.ModuleList(PlainBlock(16, 2) for _ in range(2))
        self.head = nn.Linear(16, 50, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.tensor(0.5), persistent=False)

    def forward(self, input_ids, positions):
        x = self.embed(input_ids) * self.scale
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def test_a_plain_module_is_filled_by_its_own_names(tmp_path):
    trained = PlainModel()
    tiny.write_tensors(tmp_path, {name: tensor.detach().clone() for name, tensor in trained.named_parameters()})
    fresh = PlainModel()
    recipes = models.weight_recipes(fresh, source=SafetensorsSource(tmp_path), mapping={"head.weight": "embed.weight"})
    assert set(recipes) == {*trained.state_dict(), "scale"}
    filled = tiny.fill(fresh, SafetensorsSource(tmp_path), {"head.weight": "embed.weight"})
    ids = torch.arange(20)
    assert torch.equal(filled(ids, ids), trained(ids, ids))


def test_a_module_with_values_is_its_own_source():
    trained, fresh = PlainModel(), PlainModel()
    filled = tiny.fill(fresh, ModuleSource(trained))
    ids = torch.arange(20)
    assert not torch.equal(PlainModel()(ids, ids), trained(ids, ids))
    assert torch.equal(filled(ids, ids), trained(ids, ids))


class NormedAttention(models.Attention):
    """Queries and keys are normed before they are rotated, as Qwen3 does."""

    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.q_norm = models.RMSNorm(config.head_size, config.norm_eps)
        self.k_norm = models.RMSNorm(config.head_size, config.norm_eps)

    def project(self, x_TD):
        q_TNH, k_TKH, v_TKH = super().project(x_TD)
        return self.q_norm(q_TNH), self.k_norm(k_TKH), v_TKH


class NormedBlock(models.DecoderBlock):
    attention_class = NormedAttention


class NormedDecoder(models.Decoder):
    block_class = NormedBlock
    checkpoint_names: ClassVar = {
        "layers.*.attention.q_norm": "model.layers.*.self_attn.q_norm",
        "layers.*.attention.k_norm": "model.layers.*.self_attn.k_norm",
    }


def test_a_subclass_with_one_part_changed_is_another_published_model(tmp_path):
    qwen3 = LLAMA | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 16}
    path = tiny.make_checkpoint(tmp_path, qwen3)
    config = models.parse_config(LLAMA, "a llama of the same shape")
    module = tiny.fill(models.create(config, NormedDecoder), SafetensorsSource(path))
    prompt = tiny.random_prompt(40)
    expected = tiny.reference_logits(tiny.reference_model(path), prompt)
    assert tiny.relative_error(tiny.our_logits(module, prompt), expected) <= 1e-4


def test_a_decoder_made_by_hand_has_real_weights():
    config = models.ModelConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_layers=2, num_heads=2, num_kv_heads=1, head_size=8,
        max_position_embeddings=64, rope=models.RopeConfig(dim=8),
    )  # fmt: skip
    logits = tiny.our_logits(models.Decoder(config), list(range(30)))
    assert logits.shape == (30, 50) and torch.isfinite(logits).all() and logits.std() > 0.1


def test_the_tiny_checkpoints_config_is_what_was_asked_for(tmp_path):
    path = tiny.make_checkpoint(tmp_path, "mistral", dtype="bfloat16", num_shards=2)
    assert json.loads((path / "config.json").read_text()) == MISTRAL | {"torch_dtype": "bfloat16"}
    assert len(list(path.glob("model-*-of-00002.safetensors"))) == 2
