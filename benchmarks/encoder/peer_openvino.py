"""The peer OpenVINO, in an environment of its own: int8 weights and activations by NNCF, calibrated on random texts."""

from pathlib import Path
from typing import Any

import nncf
import numpy as np
import openvino
import torch
from transformers import BertModel

from encoder import side

CALIBRATION_TEXTS, CALIBRATION_LEN = 64, 128


class Hidden(torch.nn.Module):
    """The model, with its hidden states as the one output."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.module(input_ids, attention_mask=attention_mask).last_hidden_state


def write_int8(model: Path, path: Path) -> None:
    """Convert and quantise, as NNCF does for transformers."""
    module: Any = BertModel.from_pretrained(model, add_pooling_layer=False).eval()
    converted = openvino.convert_model(Hidden(module), example_input=side.padded([[5] * 9, [6] * 4]))
    draw = np.random.default_rng(1)
    texts = draw.integers(1000, side.VOCAB_SIZE, (CALIBRATION_TEXTS, 1, CALIBRATION_LEN))
    examples = nncf.Dataset([(ids, np.ones_like(ids)) for ids in texts])
    kind = nncf.ModelType.TRANSFORMER
    openvino.save_model(nncf.quantize(converted, examples, model_type=kind, subset_size=CALIBRATION_TEXTS), path)


def encoders(model: Path, dtype: str) -> dict[str, side.Encode]:
    """Beside the model stands its graph. dtype: "w8a8"."""
    path = model.parent / "openvino-int8.xml"
    if not path.exists():
        write_int8(model, path)
    options = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "PERFORMANCE_HINT": "LATENCY"}
    request = openvino.Core().compile_model(path, "CPU", options).create_infer_request()

    def hidden_of(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(request.infer([ids.numpy(), mask.numpy()])[0])

    return side.padded_ways(hidden_of)


if __name__ == "__main__":
    side.run(encoders)
