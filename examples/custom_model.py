"""A model of your own, written from nothing in plain PyTorch, compiled and run.

python examples/custom_model.py
"""

import tempfile

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tritium import LLM, SamplingParams, build, ops

VOCAB_SIZE, HIDDEN, HEADS, LAYERS, MAX_LEN = 256, 64, 4, 2, 128


class Layer(nn.Module):
    """Attention, which sees one sequence (the compiler adds the KV cache), then an MLP, each behind a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(HIDDEN, 3 * HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.up, self.down = nn.Linear(HIDDEN, 4 * HIDDEN), nn.Linear(4 * HIDDEN, HIDDEN)
        self.norm_1, self.norm_2 = nn.LayerNorm(HIDDEN), nn.LayerNorm(HIDDEN)

    def forward(self, x_TD: Tensor) -> Tensor:
        q, k, v = (part.view(-1, HEADS, HIDDEN // HEADS) for part in self.qkv(self.norm_1(x_TD)).chunk(3, dim=-1))
        x_TD = x_TD + self.out(ops.attention(q, k, v, scale=(HIDDEN // HEADS) ** -0.5).reshape(-1, HIDDEN))
        return x_TD + self.down(F.gelu(self.up(self.norm_2(x_TD))))


class TinyModel(nn.Module):
    """`forward(ids, positions) -> logits`, over packed tokens, is all that is asked of a model."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCAB_SIZE, HIDDEN), nn.Embedding(MAX_LEN, HIDDEN)
        self.layers = nn.Sequential(*(Layer() for _ in range(LAYERS)))
        self.head = nn.Linear(HIDDEN, VOCAB_SIZE, bias=False)

    def forward(self, input_ids_T: Tensor, positions_T: Tensor) -> Tensor:
        return self.head(self.layers(self.tokens(input_ids_T) + self.places(positions_T)))


torch.manual_seed(0)
model, prompt = TinyModel().eval().requires_grad_(False), [1, 2, 3, 5, 8, 13]
with tempfile.TemporaryDirectory() as place:
    engine = build(model, output_dir=f"{place}/tiny", max_model_len=MAX_LEN)
    with LLM(engine.path) as llm:
        ours = llm.generate(prompt, SamplingParams(temperature=0, max_tokens=16))[0].outputs[0].token_ids
ids = list(prompt)
while len(ids) < len(prompt) + 16:
    ids.append(int(model(torch.tensor(ids), torch.arange(len(ids)))[-1].argmax()))
assert ours == ids[len(prompt) :], f"{ours} is not what PyTorch chooses: {ids[len(prompt) :]}"
print("TinyModel, equal to PyTorch:", ours)
