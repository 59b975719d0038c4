"""Where the plans of two engines of one model differ: their steps, put together by the captured calls they stand for.

A site is as few captured calls as possible of which each engine computes all, by steps of its own: what one match of a
pass has changed. Its name is the part of the model that the calls are in.
"""

import itertools
import json
from dataclasses import dataclass

from tritium.engine.engine import Engine
from tritium.engine.plan import Step
from tritium.errors import EngineError


@dataclass(frozen=True, kw_only=True)
class Site:
    """module: the dotted path, or "the model" for calls outside all modules. first, second: indices of the steps of
    each engine. ops: what they compute, with and without."""

    module: str
    first: tuple[int, ...]
    second: tuple[int, ...]
    ops: str


def changed_sites(first: Engine, second: Engine) -> list[Site]:
    """Every site where they differ, in the plan's order."""
    modules = captured_modules(first) | captured_modules(second)
    groups = _groups([*first.plan.steps, *second.plan.steps])
    num_first = len(first.plan.steps)
    sites = []
    for indices in groups:
        of_first = tuple(i for i in indices if i < num_first)
        of_second = tuple(i - num_first for i in indices if i >= num_first)
        ours, theirs = [first.plan.steps[i] for i in of_first], [second.plan.steps[i] for i in of_second]
        if [(s.op, s.sources) for s in ours] != [(s.op, s.sources) for s in theirs]:
            finer = theirs if len(theirs) >= len(ours) else ours
            ops = f"{_ops(ours)} in place of {_ops(theirs)}"
            sites.append(Site(module=_module(finer, modules), first=of_first, second=of_second, ops=ops))
    return sites


def captured_modules(engine: Engine) -> dict[str, str]:
    """The module of each captured call, by its name: that of the call of the final graph that stands for fewest."""
    path = engine.path / "graph.json"
    try:
        calls = [node for node in json.loads(path.read_text(encoding="utf-8"))["nodes"] if "op" in node]
        calls.sort(key=lambda node: -len(node["covers"]))
        return {name: node["source"]["module"] for node in calls for name in node["covers"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EngineError(f"{path} is damaged ({error}): build the engine again") from None


def _groups(steps: list[Step]) -> list[list[int]]:
    """Steps that share captured calls, directly or through others, as indices; in the order of their first ones."""
    group_of: dict[str, int] = {}
    groups: dict[int, list[int]] = {}
    for index, step in enumerate(steps):
        known = sorted({group_of[name] for name in _sources(step) if name in group_of})
        joined = sorted([*(i for number in known for i in groups.pop(number)), index])
        number = known[0] if known else index
        groups[number] = joined
        group_of |= {name: number for i in joined for name in _sources(steps[i])}
    return sorted(groups.values())


def _sources(step: Step) -> tuple[str, ...]:
    """What the step stands for; one that the compiler has added, for itself."""
    return step.sources or (f"{step.op} {' '.join(step.outputs)}",)


def _module(steps: list[Step], modules: dict[str, str]) -> str:
    """What several equal steps are all part of; of different ones, the module of the last, which ends the pattern."""
    last = steps if len({step.op for step in steps}) == 1 else steps[-1:]
    paths = [modules.get(name, "").split(".") for step in last for name in step.sources]
    together = itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))
    return ".".join(parts[0] for parts in together)


def _ops(steps: list[Step]) -> str:
    return " + ".join(step.op for step in steps) or "nothing"
