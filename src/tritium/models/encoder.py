"""The encoder that BERT, RoBERTa and their heads are instances of.

T tokens, D model, N heads, H head size, C labels.
"""

import torch
from torch import Tensor, nn

from tritium import ops
from tritium.models.encoder_config import EncoderConfig
from tritium.models.parts import Embedding, LayerNorm, Linear


class EncoderBlock(nn.Module):
    """norm(x + attention(x)), then norm(x + mlp(x)); each token sees every other one."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        hidden, self.num_heads, self.head_size = config.hidden_size, config.num_heads, config.head_size
        self.activation = config.activation
        self.q_proj, self.k_proj, self.v_proj = (Linear(hidden, hidden) for _ in range(3))
        self.o_proj, self.attention_norm = Linear(hidden, hidden), LayerNorm(hidden, config.norm_eps)
        self.up_proj = Linear(hidden, config.intermediate_size)
        self.down_proj = Linear(config.intermediate_size, hidden)
        self.mlp_norm = LayerNorm(hidden, config.norm_eps)

    def forward(self, x_TD: Tensor) -> Tensor:
        q, k, v = (p(x_TD).view(-1, self.num_heads, self.head_size) for p in (self.q_proj, self.k_proj, self.v_proj))
        out_TNH = ops.attention(q, k, v, self.head_size**-0.5, causal=False)
        x_TD = self.attention_norm(x_TD + self.o_proj(out_TNH.view(-1, self.num_heads * self.head_size)))
        return self.mlp_norm(x_TD + self.down_proj(ops.activation(self.up_proj(x_TD), self.activation)))


class Encoder(nn.Module):
    """Token ids, positions and token types of one sequence in; named outputs out.

    head "none": "hidden" [T, D] and, with a pooler, "pooled" [T, D]; "sequence" and "token": "scores" [T, C].
    row_outputs: those of which only a sequence's first token counts; the compiler computes no other.
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config, hidden = config, config.hidden_size
        self.embed_tokens = Embedding(config.vocab_size, hidden)
        self.embed_positions = Embedding(config.num_positions, hidden)
        self.embed_types = Embedding(config.num_token_types, hidden)
        self.embed_norm = LayerNorm(hidden, config.norm_eps)
        self.layers = nn.ModuleList(EncoderBlock(config) for _ in range(config.num_layers))
        self.pooler = Linear(hidden, hidden) if config.has_pooler or config.head == "sequence" else None
        self.classifier = Linear(hidden, len(config.labels)) if config.labels else None
        self.row_outputs = {"none": ("pooled",), "sequence": ("scores",), "token": ()}[config.head]

    def forward(self, input_ids_T: Tensor, positions_T: Tensor, token_types_T: Tensor) -> dict[str, Tensor]:
        x_TD = self.embed_tokens(input_ids_T) + self.embed_types(token_types_T) + self.embed_positions(positions_T)
        x_TD = self.embed_norm(x_TD)
        for layer in self.layers:
            x_TD = layer(x_TD)
        pooled_TD = None if self.pooler is None else torch.tanh(self.pooler(x_TD))
        if self.classifier is not None:
            return {"scores": self.classifier(x_TD if pooled_TD is None else pooled_TD)}
        return {"hidden": x_TD} if pooled_TD is None else {"hidden": x_TD, "pooled": pooled_TD}
