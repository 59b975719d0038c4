"""A model by its directory, its .gguf file or its hub id."""

from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from tritium.errors import CheckpointError
from tritium.weights.gguf_source import GGUF_SUFFIX

FILES = ("*.safetensors", "*.json", "tokenizer*", "*.jinja")
OTHER_FORMATS = ("*/*", "consolidated*")  # the same weights once more, as other programs want them


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
    try:
        return Path(
            huggingface_hub.snapshot_download(
                str(model), allow_patterns=list(FILES), ignore_patterns=list(OTHER_FORMATS)
            )
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        first = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"{model} is no directory here, and could not be fetched from the Hugging Face hub: {first}"
        ) from error
