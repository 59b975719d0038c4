"""The decoder that every built-in family is an instance of."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from tritium import ops
from tritium.models.blocks import BLOCK_CLASSES
from tritium.models.config import ModelConfig
from tritium.models.parts import Embedding, Head, Linear, make_norm
from tritium.models.rope import rope_frequencies


class Decoder(nn.Module):
    """Token ids and positions in, logits out. A subclass changes the layers by naming `block_class`.

    Its only buffers are `inv_freq` and `inv_freq_local`. They hold real numbers even when the module is made on the
    meta device.
    """

    block_class: ClassVar[type[nn.Module] | None] = None  # None: the one that config asks for
    inv_freq: Tensor
    inv_freq_local: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        hidden, width = config.hidden_size, config.embedding_size or config.hidden_size
        self.embed_tokens = Embedding(config.vocab_size, width)
        self.project_in = Linear(width, hidden, bias=False) if width != hidden else None
        self.project_out = Linear(hidden, width, bias=False) if width != hidden else None
        scale = torch.tensor(config.embedding_scale, dtype=getattr(torch, config.dtype), device="cpu")
        self.embedding_scale = float(scale)  # rounded as a multiplication in that dtype would round it
        self.embed_positions = None
        if config.has_learned_positions:
            self.embed_positions = Embedding(config.max_position_embeddings, hidden)
        self.embedding_norm = make_norm(config) if config.has_embedding_norm else None
        self.attention_scalings: dict[str, float] = {}
        for name, rope in (("inv_freq", config.rope), ("inv_freq_local", config.rope_local)):
            if rope is not None:
                max_model_len = config.max_model_len or config.default_model_len
                inv_freq, self.attention_scalings[name] = rope_frequencies(rope, max_model_len)
                self.register_buffer(name, inv_freq, persistent=False)
        block = self.block_class or BLOCK_CLASSES[config.block]
        self.layers = nn.ModuleList(block(config, layer) for layer in range(config.num_layers))
        self.norm = make_norm(config) if config.has_final_norm else None
        self.lm_head = Head(config)

    def forward(self, input_ids_T: Tensor, positions_T: Tensor) -> Tensor:
        """logits_TV for ids and positions (int64) of one sequence, position i + 1 after position i."""
        x_TD = self.embed(input_ids_T, positions_T)
        cos_sin, cos_sin_local = self.rotations(positions_T)
        for name, layer in self.layers.named_children():  # by name: capture may leave equal layers out
            x_TD = layer(x_TD, cos_sin_local if self.config.windows[int(name)] else cos_sin)
        if self.norm is not None:
            x_TD = self.norm(x_TD)
        if self.project_out is not None:
            x_TD = self.project_out(x_TD)
        return self.lm_head(x_TD, self.embed_tokens.weight)

    def embed(self, input_ids_T: Tensor, positions_T: Tensor) -> Tensor:
        """What the first layer reads: [T, D]."""
        x_TD = self.embed_tokens(input_ids_T)
        if self.embedding_scale != 1.0:
            x_TD = x_TD * self.embedding_scale
        if self.project_in is not None:
            x_TD = self.project_in(x_TD)
        if self.embedding_norm is not None:
            x_TD = self.embedding_norm(x_TD)
        return x_TD if self.embed_positions is None else x_TD + self.embed_positions(positions_T)

    def rotations(self, positions_T: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """cos and sin of full and of windowed layers; None without rotary positions."""
        found = [
            ops.rope_cos_sin(positions_T, getattr(self, name), scaling)
            for name, scaling in self.attention_scalings.items()
        ]
        return (found[0], found[-1]) if found else (None, None)
