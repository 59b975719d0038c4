"""Fetching a model from the Hugging Face hub. Loaded for hub ids alone: its client takes long to import."""

from pathlib import Path

import huggingface_hub

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
    except Exception as error:  # what a connection raises that breaks is the client's transport's, another each version
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"{model} is no directory here, and could not be fetched from the Hugging Face hub: "
            f"{first.rstrip('.')}. Check the id, your access to it and the connection, or name a directory"
        ) from error
