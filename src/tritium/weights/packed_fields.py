"""What the readers of quantised checkpoints share: fields of a quantization_config, and sizes of packed tensors."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tritium.errors import CheckpointError, UnsupportedModel
from tritium.weights.source import WeightSource
from tritium.weights.stored import StoredWeight

HALF = ("float16", "bfloat16", "float32")


@dataclass(frozen=True)
class Found:
    """weights: by the name that they have unquantised. hidden: the tensors that they are made of."""

    weights: Mapping[str, StoredWeight]
    hidden: Sequence[str]


def choice(config: Mapping[str, Any], where: str, name: str, known: tuple[Any, ...], default: Any) -> Any:
    """The field, one of `known`. Raises `UnsupportedModel` for another value."""
    value = config.get(name, default)
    if isinstance(value, (list, dict)) or value not in known or (isinstance(value, bool) != (True in known)):
        raise UnsupportedModel(
            f"{where}: quantization_config.{name} is {value!r}; read: {', '.join(map(repr, known))}. Use the "
            "checkpoint's unquantised weights"
        )
    return value


def group_size(config: Mapping[str, Any], where: str) -> int:
    """Inputs that share a scale; 0: all of an output's (-1 in the file)."""
    value = config.get("group_size", -1)
    if value is None or value == -1:
        return 0
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 1 << 20:
        raise CheckpointError(f"{where}: quantization_config.group_size is {value!r}, expected -1 or a positive number")
    return value


def whole(source: WeightSource, name: str, dtype: str, rank: int) -> tuple[int, ...]:
    """The sizes of a tensor that must have this dtype and rank, and elements."""
    spec = source.spec(name)
    if spec.dtype != dtype or len(spec.shape) != rank or 0 in spec.shape:
        raise CheckpointError(
            f"{source.where(name)}: tensor {name!r} is {spec.dtype} {list(spec.shape)}, expected {dtype} of rank "
            f"{rank}; the file is damaged or quantised in another way than its configuration says"
        )
    return spec.shape


def grouped(source: WeightSource, name: str, num_in: int, size: int) -> int:
    """The number of groups of `num_in` inputs."""
    if size and num_in % size:
        raise CheckpointError(
            f"{source.where(name)}: tensor {name!r} has {num_in} inputs, which are no multiple of "
            f"quantization_config.group_size = {size}"
        )
    return num_in // size if size else 1
