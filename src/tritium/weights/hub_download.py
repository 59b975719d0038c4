"""Fetching a model from the Hugging Face hub. Loaded for hub ids alone: its client takes long to import."""

from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from tritium.errors import CheckpointError

FILES = ("*.safetensors", "*.json", "tokenizer*", "*.jinja")
OTHER_FORMATS = ("*/*", "consolidated*")  # the same weights once more, as other programs want them


def download(model: str) -> Path:
    """The local snapshot of a hub id, fetched when it is not there yet. Raises `CheckpointError` when it cannot be."""
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
