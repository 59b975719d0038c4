"""Quantisation schemes: what a preset's name stands for."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class WeightFormat:
    """How a weight is kept. bits: 8 or 4. group_size: inputs that share a scale; 0: all of an output's."""

    bits: int
    group_size: int = 0


@dataclass(frozen=True, kw_only=True)
class QuantScheme:
    """weight: of the linears. int8_activations: rows are quantised as they come, one scale a token.

    head: how the last linear's weight, which makes the logits, is kept. Also taken for a weight whose inputs are no
    multiple of the group.
    """

    name: str
    weight: WeightFormat
    int8_activations: bool
    head: WeightFormat = WeightFormat(bits=8)


SCHEMES: tuple[QuantScheme, ...] = (
    QuantScheme(name="w8a8", weight=WeightFormat(bits=8), int8_activations=True),
    QuantScheme(name="w8a16", weight=WeightFormat(bits=8), int8_activations=False),
    QuantScheme(name="w4a16_g128", weight=WeightFormat(bits=4, group_size=128), int8_activations=False),
    QuantScheme(name="w4a8_g32", weight=WeightFormat(bits=4, group_size=32), int8_activations=True),
    QuantScheme(name="w4a8_g128", weight=WeightFormat(bits=4, group_size=128), int8_activations=True),
)


def scheme_named(name: str) -> QuantScheme:
    """The preset of that name. Raises `KeyError` with the known names."""
    for scheme in SCHEMES:
        if scheme.name == name:
            return scheme
    raise KeyError(f"no scheme is named {name!r}; known: {', '.join(s.name for s in SCHEMES)}")
