"""A built-in model with another MLP, by subclassing, compiled with random weights and run.

python examples/changed_model.py
"""

import tempfile

import torch.nn.functional as F
from torch import Tensor

from tritium import LLM, SamplingParams, build
from tritium.models import MLP, DecoderBlock, create
from tritium.models.decoder import Decoder
from tritium.models.presets import preset


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


model = create(preset("gpt2", dtype="float32", max_model_len=128), SquaredReluDecoder)
with tempfile.TemporaryDirectory() as place:
    engine = build(model, weights="dummy", output_dir=f"{place}/changed")
    with LLM(engine.path) as llm:
        output = llm.generate([1, 2, 3, 5, 8, 13], SamplingParams(temperature=0, max_tokens=16))[0]
print("gpt2 with squared ReLU:", output.outputs[0].token_ids)
