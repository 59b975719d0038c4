"""An engine's weights as kernels want them: mapped from its file, or generated, and packed once where a kernel asks."""

from typing import Any

import torch

from tritium.engine.engine import Engine
from tritium.engine.plan import Extent, Value
from tritium.errors import CheckpointError, EngineError
from tritium.kernels.kernel import resolve
from tritium.weights.dummy import DummySource
from tritium.weights.safetensors import SafetensorsSource
from tritium.weights.source import TensorSpec, WeightSource


class LoadedWeights:
    """Weights by their name in the plan. What only a packed form is asked of is not kept in its plain form."""

    def __init__(self, engine: Engine) -> None:
        """Open the engine's weights. Raises `EngineError` when one is missing or not what the plan expects."""
        specs = {v.name: _spec(v) for v in engine.plan.values if v.kind == "weight"}
        self.num_bytes = sum(_num_bytes(spec) for spec in specs.values())
        self._sources = {name: source for source in _sources(engine, specs) for name in source.names if name in specs}
        self._packed: dict[tuple[str, str], Any] = {}
        self._generated: dict[str, torch.Tensor] = {}
        for name, spec in specs.items():
            found = self._sources[name].spec(name) if name in self._sources else None
            if found != spec:
                raise EngineError(
                    f"{engine.weights_path or engine.path}: weight {name!r} is {found or 'missing'}, the plan expects "
                    f"{spec}: build the engine again"
                )

    def get(self, name: str) -> torch.Tensor:
        """The weight in its plain form; a view of the file where there is one. Do not write to it."""
        source = self._sources[name]
        if not isinstance(source, DummySource):
            return source.get(name)
        if name not in self._generated:
            self._generated[name] = source.get(name)
        return self._generated[name]

    def packed(self, name: str, target: str, weight: torch.Tensor) -> Any:
        """What the pack function `target` makes of `weight` (value `name`, perhaps a view of a weight); made once."""
        key = (name, target)
        if key not in self._packed:
            self._packed[key] = resolve(target)(weight)
        return self._packed[key]


def _sources(engine: Engine, specs: dict[str, TensorSpec]) -> list[WeightSource]:
    """In rising precedence: what is in the engine's file is not generated."""
    sources: list[WeightSource] = []
    if engine.manifest.dummy_seed is not None:
        sources.append(DummySource(specs, engine.manifest.dummy_seed))
    if engine.weights_path is not None:
        try:
            sources.append(SafetensorsSource(engine.weights_path))
        except CheckpointError as error:
            raise EngineError(f"{error}; or build the engine again") from error
    return sources


def _spec(value: Value) -> TensorSpec:
    return TensorSpec(value.dtype, tuple(Extent.parse(dim).constant for dim in value.shape))


def _num_bytes(spec: TensorSpec) -> int:
    dtype: torch.dtype = getattr(torch, spec.dtype)
    return torch.Size(spec.shape).numel() * dtype.itemsize
