"""Two models of your own, compiled and run: one written from nothing in plain PyTorch, one a built-in one, changed.

python examples/custom_model.py
"""

import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tritium import LLM, SamplingParams, build, ops
from tritium.models import MLP, DecoderBlock, create
from tritium.models.decoder import Decoder
from tritium.models.presets import preset

VOCAB_SIZE, HIDDEN, HEADS, LAYERS, MAX_LEN = 256, 64, 4, 2, 128


# -- 1. From nothing: any module over packed tokens. Attention sees one sequence; the compiler adds the KV cache.
class Layer(nn.Module):
    """Attention, then an MLP, each behind a norm written out by hand: the compiler recognises it."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(HIDDEN, 3 * HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.up, self.down = nn.Linear(HIDDEN, 4 * HIDDEN), nn.Linear(4 * HIDDEN, HIDDEN)
        self.norm_1, self.norm_2 = nn.Parameter(torch.ones(HIDDEN)), nn.Parameter(torch.ones(HIDDEN))

    def forward(self, x_TD: Tensor) -> Tensor:
        q_TNH, k_TNH, v_TNH = (
            part.view(-1, HEADS, HIDDEN // HEADS) for part in self.qkv(rms_norm(x_TD, self.norm_1)).chunk(3, dim=-1)
        )
        out_TNH = ops.attention(q_TNH, k_TNH, v_TNH, scale=(HIDDEN // HEADS) ** -0.5)
        x_TD = x_TD + self.out(out_TNH.reshape(-1, HIDDEN))
        return x_TD + self.down(F.gelu(self.up(rms_norm(x_TD, self.norm_2))))


class TinyModel(nn.Module):
    """`forward(ids, positions) -> logits` is all that is asked of a model."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCAB_SIZE, HIDDEN), nn.Embedding(MAX_LEN, HIDDEN)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.head = nn.Linear(HIDDEN, VOCAB_SIZE, bias=False)

    def forward(self, input_ids_T: Tensor, positions_T: Tensor) -> Tensor:
        x_TD = self.tokens(input_ids_T) + self.places(positions_T)
        for layer in self.layers:
            x_TD = layer(x_TD)
        return self.head(x_TD)


def rms_norm(x_TD: Tensor, weight_D: Tensor) -> Tensor:
    """One of the ordinary ways to write it."""
    variance = x_TD.float().pow(2).mean(-1, keepdim=True)
    return (x_TD.float() * torch.rsqrt(variance + 1e-6)).to(x_TD.dtype) * weight_D


# -- 2. A built-in model with another MLP, by subclassing.
class SquaredReluMLP(MLP):
    """down(relu(up(x))²)."""

    def forward(self, x_TD: Tensor) -> Tensor:
        hidden = F.relu(self.up_proj(x_TD))
        return self.down_proj(hidden * hidden)


class SquaredReluBlock(DecoderBlock):
    """A decoder block that uses it."""

    mlp_class = SquaredReluMLP


class SquaredReluDecoder(Decoder):
    """A decoder made of such blocks."""

    block_class = SquaredReluBlock


def main(directory: Path) -> None:
    """Build both, check the first against PyTorch, generate with both."""
    torch.manual_seed(0)
    model = TinyModel().eval()
    prompt, params = [1, 2, 3, 5, 8, 13], SamplingParams(temperature=0, max_tokens=16)
    with LLM(build(model, output_dir=directory / "tiny", max_model_len=MAX_LEN).path) as llm:
        ours = llm.generate(prompt, params)[0].outputs[0].token_ids
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(params.max_tokens or 0):
            ids.append(int(model(torch.tensor(ids), torch.arange(len(ids)))[-1].argmax()))
    assert ours == ids[len(prompt) :], f"{ours} is not what PyTorch chooses: {ids[len(prompt) :]}"
    print("TinyModel, equal to PyTorch:", ours)

    config = preset("gpt2", dtype="float32", max_model_len=MAX_LEN)
    changed = create(config, SquaredReluDecoder)
    with LLM(build(changed, weights="dummy", output_dir=directory / "changed").path) as llm:
        print("gpt2 with squared ReLU:", llm.generate(prompt, params)[0].outputs[0].token_ids)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        main(Path(place))
