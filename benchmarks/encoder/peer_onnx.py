"""The peer ONNX Runtime, in the environment that has it: its own BERT optimizer and its own dynamic quantisation."""

from pathlib import Path
from typing import Any

import onnxruntime
import torch
from onnx import TensorProto
from onnxruntime.quantization import quantize_dynamic
from onnxruntime.transformers.optimizer import optimize_model
from transformers import BertModel

from encoder import side


class Hidden(torch.nn.Module):
    """The model, with its hidden states as the one output."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.module(input_ids, attention_mask=attention_mask).last_hidden_state


def write_graph(model: Path, dtype: str, path: Path) -> None:
    """Export, optimize and, for "w8a8", quantise; what lies between stands beside `path`."""
    module: Any = BertModel.from_pretrained(model, add_pooling_layer=False, attn_implementation="eager").eval()
    plain, optimized = model.parent / "plain.onnx", path if dtype == "float32" else model.parent / "optimized.onnx"
    axes = {name: {0: "batch", 1: "length"} for name in ("input_ids", "attention_mask", "hidden")}
    names = {"input_names": ["input_ids", "attention_mask"], "output_names": ["hidden"]}
    example = side.padded([[5] * 9, [6] * 4])
    torch.onnx.export(Hidden(module), example, str(plain), dynamic_axes=axes, dynamo=False, opset_version=17, **names)
    optimize_model(str(plain), model_type="bert", num_heads=12, hidden_size=768).save_model_to_file(str(optimized))
    if dtype == "w8a8":  # onnx infers no types behind the optimizer's own ops: say what they are
        quantize_dynamic(optimized, path, per_channel=True, extra_options={"DefaultTensorType": TensorProto.FLOAT})


def encoders(model: Path, dtype: str) -> dict[str, side.Encode]:
    """Beside the model stands its graph; one that is there is taken. dtype: "float32" or "w8a8"."""
    path = model.parent / f"onnx-{dtype}.onnx"
    if not path.exists():
        write_graph(model, dtype, path)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def hidden_of(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        (hidden,) = session.run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
        return torch.from_numpy(hidden)

    return side.padded_ways(hidden_of)


if __name__ == "__main__":
    side.run(encoders)
