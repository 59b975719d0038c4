"""Reading fields of a Hugging Face config.json. Each is checked when it is read, before anything is made of it."""

from collections.abc import Mapping
from typing import Any

from tritium.errors import CheckpointError, UnsupportedModel
from tritium.models.rope_config import MAX_SIZE

RESTORE = "restore the config.json that the model was published with"
REQUIRED: Any = object()  # the default of a field that must be there

ACTIVATION_NAMES = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "quick_gelu": "quick_gelu",
}


class Fields:
    """The fields of one JSON object. `where` is the file (and object) for messages.

    A field may have several names (`"n_embd", "hidden_size"`); the first one present counts. A default that is not
    REQUIRED is taken when the field is absent; null counts as absent for `optional_*` only.
    """

    def __init__(self, data: Mapping[str, Any], where: str, path: str = "") -> None:
        self.data, self.where, self._path = data, where, path

    def error(self, name: str, problem: str) -> CheckpointError:
        """The error for a field: names file and field."""
        return CheckpointError(f"{self.where}: field {self._path + name!r} {problem}; {RESTORE}")

    def unsupported(self, name: str, value: object, why: str) -> UnsupportedModel:
        """The error for a feature this version does not have."""
        return UnsupportedModel(f"{self.where}: field {self._path + name!r} is {value!r}: {why}")

    def get(self, *names: str, default: Any = REQUIRED) -> tuple[str, Any]:
        """The first of these names that is present, and its value, unchecked."""
        for name in names:
            if name in self.data:
                return name, self.data[name]
        if default is REQUIRED:
            raise self.error(names[0], "is missing")
        return names[0], default

    def integer(self, *names: str, low: int = 1, high: int = MAX_SIZE, default: Any = REQUIRED) -> int:
        """An integer in [low, high]."""
        name, value = self.get(*names, default=default)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.error(name, f"is {value!r}, expected an integer from {low} to {high}")
        return value

    def optional_integer(self, *names: str, low: int = 1, high: int = MAX_SIZE) -> int | None:
        """An integer in [low, high], or None when absent or null."""
        return None if self.get(*names, default=None)[1] is None else self.integer(*names, low=low, high=high)

    def number(self, *names: str, low: float = 0.0, high: float = 1e12, default: Any = REQUIRED) -> float:
        """A finite number in (low, high]."""
        name, value = self.get(*names, default=default)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not (is_number and low < value <= high):  # NaN is in no range; a huge int has no float to ask isfinite of
            raise self.error(name, f"is {value!r}, expected a number above {low:g} and at most {high:g}")
        return float(value)

    def optional_number(self, *names: str, low: float = 0.0, high: float = 1e12) -> float | None:
        """A finite number in (low, high], or None when absent or null."""
        return None if self.get(*names, default=None)[1] is None else self.number(*names, low=low, high=high)

    def boolean(self, *names: str, default: Any = REQUIRED) -> bool:
        """true or false."""
        name, value = self.get(*names, default=default)
        if not isinstance(value, bool):
            raise self.error(name, f"is {value!r}, expected true or false")
        return value

    def section(self, *names: str) -> "Fields | None":
        """A nested object, or None when absent, null or empty."""
        name, value = self.get(*names, default=None)
        if value is not None and not isinstance(value, Mapping):
            raise self.error(name, f"is {value!r}, expected an object")
        return Fields(value, self.where, f"{self._path}{name}.") if value else None

    def activation(self, *names: str, default: Any = REQUIRED) -> str:
        """An activation function, by our name."""
        name, value = self.get(*names, default=default)
        if not isinstance(value, str) or value not in ACTIVATION_NAMES:
            raise self.unsupported(name, value, f"known activations are {', '.join(ACTIVATION_NAMES)}")
        return ACTIVATION_NAMES[value]

    def refuse(self, name: str, harmless: tuple[Any, ...], why: str) -> None:
        """`UnsupportedModel` when a field asks for what no built-in model does."""
        value = self.data.get(name)
        if value is not None and value not in harmless:
            raise self.unsupported(name, value, why)
