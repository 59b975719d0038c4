"""The tensors of a checkpoint, whatever its files are: safetensors, plain or quantised by others, or GGUF."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tritium.errors import CheckpointError, UnsupportedModel
from tritium.weights.awq import read_awq
from tritium.weights.compressed import read_compressed, read_fp8
from tritium.weights.gguf_source import open_gguf
from tritium.weights.gptq import read_gptq
from tritium.weights.hub import GGUF_SUFFIX
from tritium.weights.safetensors import SafetensorsSource
from tritium.weights.source import WeightSource
from tritium.weights.stored import QuantizedSource

READERS = {"awq": read_awq, "gptq": read_gptq, "compressed-tensors": read_compressed, "fp8": read_fp8}
CONFIG_FILES = ("config.json", "quantize_config.json")  # the second: older GPTQ checkpoints
MAX_CONFIG_BYTES = 10_000_000


def open_checkpoint(path: Path) -> WeightSource:
    """A model directory or a .gguf file. Raises `CheckpointError`, `UnsupportedModel` for other kinds."""
    if path.suffix == GGUF_SUFFIX and path.is_file():
        return open_gguf(path)
    source = SafetensorsSource(path)
    config, where = quantization_config(path)
    if not config:
        return source
    method = config.get("quant_method")
    if not isinstance(method, str) or method not in READERS:
        raise UnsupportedModel(
            f"{where}: quantization_config.quant_method is {method!r:.60}; read are {', '.join(READERS)}, and GGUF "
            "files. Use one of these, or the unquantised weights"
        )
    found = READERS[method](config, source, where)
    if not found.weights:
        raise CheckpointError(
            f"{where}: says the weights are quantised by {method!r}, but {source.where('')} has no such tensors: "
            "configuration and weights are of different downloads"
        )
    return QuantizedSource(source, found.weights, found.hidden)


def quantization_config(model_dir: Path) -> tuple[Mapping[str, Any], str]:
    """What the directory says of its weights' quantisation, empty for plain ones; and the file that says it."""
    for name in CONFIG_FILES:
        path = model_dir / name
        if not path.is_file() or path.stat().st_size > MAX_CONFIG_BYTES:
            continue
        try:
            data = json.loads(path.read_bytes())
        except (ValueError, RecursionError):
            continue  # whoever reads the configuration says what is wrong with it
        if not isinstance(data, dict):
            continue
        config = {"quant_method": "gptq"} | data if name != "config.json" else None
        config = config or data.get("quantization_config") or data.get("compression_config") or {}
        if not isinstance(config, dict):
            raise CheckpointError(f"{path}: quantization_config is a {type(config).__name__}, expected an object")
        if config:
            return config, str(path)
    return {}, str(model_dir)
