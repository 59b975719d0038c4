"""Example inputs of a stateless module, as `build` takes them, and what they say of its inputs: name, dtype, sizes."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from tritium.errors import ConfigError
from tritium.graph.capture import InputSpec

ExampleInputs = Mapping[str, Any] | Sequence[Any]


class ModuleInputs(NamedTuple):
    """specs: by name, in the order of forward's parameters. is_by_name: forward is called with keywords."""

    specs: dict[str, InputSpec]
    is_by_name: bool


def read_example_inputs(module: nn.Module, example: ExampleInputs) -> ModuleInputs:
    """Only dtypes and sizes are looked at. Raises `ConfigError` for what forward does not take or has no common batch.

    example: tensors by the names of forward's parameters, or in their order; each with the batch as first dimension.
    """
    parameters = inspect.signature(module.forward).parameters
    if isinstance(example, Mapping):
        named = _in_order(module, example, parameters)
    elif isinstance(example, (list, tuple)):
        places = [p.name for p in parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        if len(example) > len(places) and not any(p.kind == p.VAR_POSITIONAL for p in parameters.values()):
            raise ConfigError(
                f"example_inputs has {len(example)} tensors, {type(module).__name__}.forward takes {len(places)}"
            )
        names = [*places, *(f"input_{i}" for i in range(len(places), len(example)))]
        named = dict(zip(names, example, strict=False))
    else:
        raise ConfigError(f"example_inputs must be a dict or a tuple of tensors, not {type(example).__name__}")
    if not named:
        raise ConfigError("example_inputs is empty: a stateless module is compiled from at least one input")
    tensors = {name: _tensor(name, value) for name, value in named.items()}
    batches = {name: tensor.shape[0] for name, tensor in tensors.items()}
    if len(set(batches.values())) > 1:
        raise ConfigError(
            f"example_inputs have batches of different sizes ({batches}): the first dimension is the batch"
        )
    specs = {name: InputSpec(tensor.dtype, tuple(tensor.shape[1:])) for name, tensor in tensors.items()}
    return ModuleInputs(specs, isinstance(example, Mapping))


def _in_order(
    module: nn.Module, example: Mapping[str, Any], parameters: Mapping[str, inspect.Parameter]
) -> dict[str, Any]:
    takes_any = any(p.kind == p.VAR_KEYWORD for p in parameters.values())
    for name in example:
        if not isinstance(name, str) or (name not in parameters and not takes_any):
            raise ConfigError(
                f"example_inputs: {name!r} is no parameter of {type(module).__name__}.forward, which takes "
                f"{', '.join(parameters)}"
            )
    known = {name: example[name] for name in parameters if name in example}
    return known | dict(example)


def _tensor(name: str, value: Any) -> torch.Tensor:
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(value)
    if not isinstance(value, torch.Tensor) or not value.dim():
        raise ConfigError(f"example_inputs: {name!r} must be a tensor [batch, ...], not {value!r:.100}")
    return value
