"""The decoder that every built-in family is an instance of."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from tritium import ops
from tritium.models.blocks import Embedding, Head, block_for, make_norm
from tritium.models.config import ModelConfig
from tritium.models.rope import rope_frequencies


class Decoder(nn.Module):
    """Token ids and positions in, logits out. A subclass changes the layers by naming `block_class`.

    `inv_freq` is the only buffer. It holds real numbers even when the module is made on the meta device.
    """

    block_class: ClassVar[type[nn.Module] | None] = None  # None: the one that config asks for
    inv_freq: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        scale = torch.tensor(config.embedding_scale, dtype=getattr(torch, config.dtype), device="cpu")
        self.embedding_scale = float(scale)  # rounded as a multiplication in that dtype would round it
        self.embed_positions, self.attention_scaling = None, 1.0
        if config.rope is None:
            self.embed_positions = Embedding(config.max_position_embeddings, config.hidden_size)
        else:
            max_model_len = config.max_model_len or config.default_model_len
            inv_freq, self.attention_scaling = rope_frequencies(config.rope, max_model_len)
            self.register_buffer("inv_freq", inv_freq, persistent=False)
        block = self.block_class or block_for(config)
        self.layers = nn.ModuleList(block(config, layer) for layer in range(config.num_layers))
        self.norm = make_norm(config)
        self.lm_head = Head(config)

    def forward(self, input_ids_T: Tensor, positions_T: Tensor) -> Tensor:
        """logits_TV for ids and positions (int64) of one sequence, position i + 1 after position i."""
        x_TD, cos_sin = self.embed_tokens(input_ids_T), None
        if self.embedding_scale != 1.0:
            x_TD = x_TD * self.embedding_scale
        if self.embed_positions is not None:
            x_TD = x_TD + self.embed_positions(positions_T)
        else:
            cos_sin = ops.rope_cos_sin(positions_T, self.inv_freq, self.attention_scaling)
        for layer in self.layers:
            x_TD = layer(x_TD, cos_sin)
        return self.lm_head(self.norm(x_TD), self.embed_tokens.weight)
