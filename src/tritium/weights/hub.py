"""A model by its directory, its .gguf file or its hub id."""

from importlib import import_module
from pathlib import Path

from tritium.errors import CheckpointError

GGUF_SUFFIX = ".gguf"  # here, not beside their reader: a server that names a model loads no torch


def model_directory(model: str | Path) -> Path:
    """The directory (or .gguf file) itself, or the local snapshot of a hub id, fetched when it is not there yet.

    Raises `CheckpointError` when it is neither, or cannot be fetched.
    """
    path = Path(model)
    if path.is_dir() or (path.is_file() and path.suffix == GGUF_SUFFIX):
        return path
    looks_like_id = isinstance(model, str) and model.count("/") <= 1 and not model.startswith((".", "/", "~"))
    if not looks_like_id or path.exists():
        what = "is a file" if path.exists() else "does not exist"
        raise CheckpointError(
            f"{model} {what}: expected a model directory with config.json and safetensors, a {GGUF_SUFFIX} file "
            "or a hub id"
        )
    snapshot: Path = import_module("tritium.weights.hub_download").download(str(model))
    return snapshot
