"""An engine's weights as kernels want them: mapped from its file, or generated, and packed once where a kernel asks."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from tritium.engine.engine import Engine
from tritium.engine.plan import Plan, Ref, Value
from tritium.engine.recipe_file import weight_specs
from tritium.errors import CheckpointError, EngineError
from tritium.kernels.kernel import Kernel, resolve
from tritium.weights.dummy import DummySource
from tritium.weights.safetensors import SafetensorsSource
from tritium.weights.source import TensorSpec, WeightSource


class LoadedWeights:
    """Weights by their name in the plan. What was read or generated only to be packed does not stay in plain form."""

    def __init__(
        self, engine: Engine, source: WeightSource | None = None, *, device: torch.device | None = None
    ) -> None:
        """Open the engine's weights, or take `source` in their place, which has every one by its name in the plan.

        device: where they are wanted; None is the CPU.
        Raises `EngineError` when one is missing or not what the plan expects.
        """
        specs = weight_specs(engine.plan)
        sources = _sources(engine, specs) if source is None else [source]
        self._sources = {name: source for source in sources for name in source.names if name in specs}
        self._device = device
        self._packed: dict[tuple[str, str], Any] = {}
        self._plain: set[str] = set()  # weights that a step reads in their plain form
        self._made: dict[str, torch.Tensor] = {}  # what a source that maps no file gave
        for name, spec in specs.items():
            found = self._sources[name].spec(name) if name in self._sources else None
            if found != spec:
                raise EngineError(
                    f"{engine.weights_path or engine.path}: weight {name!r} is {found or 'missing'}, the plan expects "
                    f"{spec}: build the engine again"
                )

    def get(self, name: str) -> torch.Tensor:
        """The weight in its plain form; on the CPU a view of the file where there is one. Do not write to it."""
        source = self._sources[name]
        self._plain.add(name)
        if self._device is None and isinstance(source, SafetensorsSource):
            return source.get(name)
        if name not in self._made:
            if isinstance(source, DummySource):
                self._made[name] = source.get(name, self._device)
            else:
                self._made[name] = source.get(name).to(self._device or "cpu")
        return self._made[name]

    def packed(self, name: str, target: str, weight: Callable[[], torch.Tensor]) -> Any:
        """What the pack function `target` makes of `weight()` (value `name`, perhaps a view of a weight); made once."""
        key = (name, target)
        if key not in self._packed:
            kept = set(self._plain)
            self._packed[key] = resolve(target)(weight())
            for only_packed in self._plain - kept:
                self._release(only_packed)
            self._plain = kept
        return self._packed[key]

    def _release(self, name: str) -> None:
        source = self._sources[name]
        self._made.pop(name, None)
        if isinstance(source, SafetensorsSource):
            source.release(name)


def bytes_in_use(plan: Plan, kernels: Sequence[Kernel]) -> int:
    """Bytes that the weights take while steps run: once in each form, plain or packed, that a kernel asks for."""
    values, specs = plan.by_name, weight_specs(plan)
    uses = set()
    for step, kernel in zip(plan.steps, kernels, strict=True):
        for name, arg in step.args.items():
            for item in arg if isinstance(arg, list) else [arg]:
                if isinstance(item, Ref):
                    uses.add((_root(item.value, values), kernel.pack.get(name)))
    return sum(_num_bytes(specs[name]) for name, _ in uses if name in specs)


def _root(name: str, values: Mapping[str, Value]) -> str:
    """The value that a chain of views looks at."""
    while values[name].kind == "view":
        name = values[name].base
    return name


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


def _num_bytes(spec: TensorSpec) -> int:
    dtype: torch.dtype = getattr(torch, spec.dtype)
    return torch.Size(spec.shape).numel() * dtype.itemsize
