"""What a row of the model table says: how a config.json is read, and where in a checkpoint each weight is."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tritium.models.families.places import Place
from tritium.models.hf_fields import Fields

Names = dict[str, str | Place]


@dataclass(frozen=True, kw_only=True)
class Family:
    """architecture: as in config.json's `architectures`; name: as in its `model_type`.

    read: config.json -> keywords of ModelConfig.
    names: our module path, `*` for a layer's number -> the checkpoint's, or a place in a tensor of it; `.weight` or
    `.bias` is appended to both.
    respelled: (start of a name, what some publications have in its place).
    ignored: regular expressions of tensors that published checkpoints carry beside the weights.
    """

    name: str
    architecture: str
    read: Callable[[Fields], dict[str, Any]]
    names: Names
    respelled: tuple[tuple[str, str], ...] = ()
    ignored: tuple[str, ...] = ()
