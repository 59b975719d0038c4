"""What there is to choose: the sites of a plan, and the kernels and tactics that can run each."""

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from tritium.engine.plan import Arg, Phase, Plan, Ref, Step
from tritium.errors import ConfigError
from tritium.kernels.kernel import Kernel, Tactic
from tritium.kernels.plugin import Plugin
from tritium.runtime.kernel_choice import candidates


@dataclass(frozen=True, eq=False)
class Candidate:
    """A kernel with one of its tactics; an empty one is the default."""

    kernel: Kernel
    tactic: Tactic

    @property
    def name(self) -> str:
        """`cpu.linear`, `cpu.paged_attention:item_rows=32`."""
        return ":".join([self.kernel.name, *(f"{name}={value}" for name, value in self.tactic.items())])


@dataclass(frozen=True, eq=False)
class Site:
    """Equal steps. key: what a time depends on, beside batch, kernel, tactic and environment."""

    key: str
    op: str
    phase: Phase
    steps: tuple[int, ...]
    candidates: tuple[Candidate, ...]


def sites(
    plan: Plan,
    plugins: Sequence[Plugin],
    device: str = "cpu",
    *,
    denied: Collection[str] = (),
    is_thorough: bool,
    is_bitwise: bool = False,
    capability: tuple[int, int] | None = None,
) -> list[Site]:
    """Every site with more than one candidate. Raises `ConfigError` when everything is denied that can run a step.

    is_thorough: count torch's reference kernels too, where a compiled one can run; on a GPU never. is_bitwise,
    capability: what a GPU's candidates must keep and may need, see `candidates`.
    """
    groups: dict[str, list[int]] = {}
    for index, step in enumerate(plan.steps):
        groups.setdefault(site_key(plan, step), []).append(index)
    found = []
    for key, indices in groups.items():
        step = plan.steps[indices[0]]
        rows = candidates(plan, step, plugins, device, is_bitwise=is_bitwise, capability=capability)
        if not is_thorough or device == "cuda":
            rows = [pair for pair in rows if pair[0].backend != "eager"] or rows
        every = [Candidate(row, tactic) for row, tactics in rows for tactic in tactics]
        allowed = tuple(c for c in every if c.kernel.name not in denied and c.name not in denied)
        if every and not allowed:
            raise ConfigError(f"every kernel that can run {step.op} is denied: {', '.join(c.name for c in every)}")
        if len(every) > 1:
            found.append(Site(key, step.op, step.phase, tuple(indices), allowed))
    return found


def site_key(plan: Plan, step: Step) -> str:
    """One line of JSON: op, literals, and dtype and sizes of every value."""
    return json.dumps(
        [step.op, step.phase, {name: _describe(plan, arg) for name, arg in step.args.items()}], separators=(",", ":")
    )


def _describe(plan: Plan, arg: Arg) -> Any:
    if isinstance(arg, Ref):
        value = plan.value(arg.value)
        return [value.kind == "weight", value.dtype, list(value.shape)]
    return [_describe(plan, item) for item in arg] if isinstance(arg, list) else arg


def time_key(site: Site, count: int, candidate: Candidate) -> str:
    """The timing cache's key for one measurement."""
    return f"{site.key}@{count}:{candidate.name}"
