"""Quantisation schemes: what a preset's name stands for."""

from dataclasses import dataclass
from typing import Literal

WeightKind = Literal["int8", "int4", "fp8"]
BITS: dict[str, int] = {"int8": 8, "int4": 4, "fp8": 8}


@dataclass(frozen=True)
class WeightFormat:
    """How a weight is kept: the numbers it is made of, and how many inputs share a scale (0: all of an output's).

    "fp8" is e4m3, with a scale for each output.
    """

    kind: WeightKind
    group_size: int = 0

    @property
    def bits(self) -> int:
        """Of one number."""
        return BITS[self.kind]

    @property
    def name(self) -> str:
        """ "int4_g128"; `format_named` is the inverse."""
        return f"{self.kind}_g{self.group_size}" if self.group_size else self.kind


def format_named(name: str) -> WeightFormat:
    """The format of that name. Raises `ValueError` for any other string."""
    kind, _, size = name.partition("_g")
    found = WeightFormat(kind, int(size) if size.isdecimal() and len(size) < 8 else 0)  # type: ignore[arg-type]
    if kind not in BITS or found.name != name or (kind == "fp8" and found.group_size):
        raise ValueError(f"no weight format is named {name!r}")
    return found


INT8, FP8 = WeightFormat("int8"), WeightFormat("fp8")


@dataclass(frozen=True, kw_only=True)
class QuantScheme:
    """weight: of the linears. int8_activations: rows are quantised as they come, one scale a token.

    head: how the last linear's weight, which makes the logits, is kept; None: in the model's dtype. Also taken for a
        weight whose inputs are no multiple of the group.
    """

    name: str
    weight: WeightFormat
    int8_activations: bool
    head: WeightFormat | None = INT8


SCHEMES: tuple[QuantScheme, ...] = (
    QuantScheme(name="w8a8", weight=INT8, int8_activations=True),
    QuantScheme(name="w8a16", weight=INT8, int8_activations=False),
    QuantScheme(name="w4a16_g128", weight=WeightFormat("int4", 128), int8_activations=False),
    QuantScheme(name="w4a8_g32", weight=WeightFormat("int4", 32), int8_activations=True),
    QuantScheme(name="w4a8_g128", weight=WeightFormat("int4", 128), int8_activations=True),
    QuantScheme(name="fp8", weight=FP8, int8_activations=False, head=None),  # activations and KV cache too: a GPU's
)


def scheme_named(name: str) -> QuantScheme:
    """The preset of that name. Raises `KeyError` with the known names."""
    for scheme in SCHEMES:
        if scheme.name == name:
            return scheme
    raise KeyError(f"no scheme is named {name!r}; known: {', '.join(s.name for s in SCHEMES)}")
