"""Everything that is said of an engine, in one value: steps by block, with costs and times; memory; certificate."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from tritium.config import check_int
from tritium.engine.arena import ITEM_SIZES, Lifetime, find_lifetimes, plan_arena
from tritium.engine.certificate import Certificate, read_certificate
from tritium.engine.engine import Engine
from tritium.engine.plan import Extent, Plan, Ref, Sizes, Step
from tritium.errors import EngineError
from tritium.inspection.ceilings import Ceilings, measure_ceilings
from tritium.inspection.costs import Batch, Cost, step_cost
from tritium.runtime.step_times import StepTimer


@dataclass(frozen=True, kw_only=True)
class StepFacts:
    """A step. module: the part of the model it comes from. sources: the captured calls it stands for.

    seconds: measured; None when nothing was. attainable: seconds by the machine's ceilings; None likewise.
    """

    index: int
    op: str
    module: str
    place: str
    phase: str
    kernel: str
    tactic: str
    sources: tuple[str, ...]
    weights: tuple[str, ...]
    cost: Cost
    seconds: float | None
    attainable: float | None


@dataclass(frozen=True, kw_only=True)
class Buffer:
    """A temporary's place in the arena, in bytes, and the steps during which it is needed."""

    name: str
    offset: int
    size: int
    life: Lifetime


@dataclass(frozen=True, kw_only=True)
class Report:
    """blocks: step facts by block of the model, in order. batch: what was measured, in words."""

    engine: Engine
    blocks: Mapping[str, list[StepFacts]]
    batch: str
    ceilings: Ceilings | None
    buffers: tuple[Buffer, ...]
    arena_bytes: int
    certificate: Certificate | None

    @property
    def steps(self) -> list[StepFacts]:
        """All of them, in the plan's order."""
        return sorted((step for block in self.blocks.values() for step in block), key=lambda step: step.index)


def make_report(engine: Engine, *, num_tokens: int, is_decode: bool, is_measured: bool = True) -> Report:
    """Gather it. num_tokens: of one prompt, of an encoder's text, or with `is_decode` as many decoding sequences with
    128 tokens each.

    is_measured: time the steps and the machine's ceilings; else costs are predicted alone. Raises `EngineError` for
    stateless modules, for encoders with `is_decode`, and where nothing can be measured here.
    """
    kind, longest = engine.manifest.kind, engine.manifest.max_model_len
    if kind not in ("decoder", "encoder"):
        raise EngineError(f"{engine.path} is a stateless module: decoders and encoders are looked into")
    if kind == "encoder" and is_decode:
        raise EngineError(f"{engine.path} is an encoder: it decodes nothing; leave out --decode")
    if not is_decode:
        check_int("the number of tokens", num_tokens, 1, longest if kind == "encoder" else longest - 2)
    if is_measured and engine.manifest.backend != "cpu":
        raise EngineError(
            f"{engine.path} is for {engine.manifest.backend!r}: steps are timed on CPUs only; give --no-timing"
        )
    if is_measured and engine.manifest.mapping:
        raise EngineError(f"{engine.path} is a part of a model: steps of whole models are timed; give --no-timing")
    context = min(128, longest - 2) if is_decode else num_tokens if kind == "encoder" else num_tokens // 2
    sequences, rows = (num_tokens, num_tokens) if is_decode else (1, 1)
    batch = Batch(Sizes(tokens=num_tokens, sequences=sequences, rows=rows), max(1, context))
    seconds: list[float] | None = None
    ceilings = None
    if is_measured:
        timer = StepTimer(engine)
        seconds = timer.decode(num_tokens, context) if is_decode else timer.prefill(num_tokens)
        ceilings = measure_ceilings(getattr(torch, engine.manifest.dtype))
    arena = plan_arena(engine.plan, batch.sizes)
    lives = find_lifetimes(engine.plan)
    buffers = tuple(
        Buffer(name=name, offset=offset, size=_size(engine.plan, name, batch.sizes), life=lives[name])
        for name, offset in arena.offsets.items()
    )
    text = "text" if kind == "encoder" else "prompt"
    what = f"{num_tokens} sequences decode one token each" if is_decode else f"one {text} of {num_tokens} tokens"
    return Report(
        engine=engine,
        blocks=_blocks(engine, batch, seconds, ceilings),
        batch=what,
        ceilings=ceilings,
        buffers=buffers,
        arena_bytes=arena.total,
        certificate=read_certificate(engine.path),
    )


def _blocks(
    engine: Engine, batch: Batch, seconds: list[float] | None, ceilings: Ceilings | None
) -> dict[str, list[StepFacts]]:
    nodes = _graph_nodes(engine)
    blocks: dict[str, list[StepFacts]] = {}
    module = place = ""
    for index, step in enumerate(engine.plan.steps):
        source = _source(step, nodes)
        module, place = source.get("module", module), source.get("place", "")
        cost = step_cost(engine.plan, step, batch)
        attainable = None
        if ceilings is not None:
            attainable = max(cost.num_bytes / ceilings.bytes_per_second, cost.flops / ceilings.flops_per_second)
        facts = StepFacts(
            index=index,
            op=step.op,
            module=module,
            place=place,
            phase=step.phase,
            kernel=step.kernel,
            tactic=_tactic(engine, index, step, batch),
            sources=step.sources,
            weights=_weights(engine.plan, step),
            cost=cost,
            seconds=None if seconds is None else seconds[index],
            attainable=attainable,
        )
        blocks.setdefault(_block_of(module), []).append(facts)
    return blocks


def _source(step: Step, nodes: dict[str, dict[str, str]]) -> dict[str, str]:
    """Of the call that the step is; of two results the first is `name.0`."""
    name = step.outputs[0] if step.outputs else ""
    return nodes.get(name) or nodes.get(name.rpartition(".")[0], {})


def _graph_nodes(engine: Engine) -> dict[str, dict[str, str]]:
    """The provenance of each call of the final graph, by name."""
    path = engine.path / "graph.json"
    try:
        nodes = json.loads(path.read_text(encoding="utf-8"))["nodes"]
        return {node["name"]: node["source"] for node in nodes if "op" in node}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EngineError(f"{path} is damaged ({error}): build the engine again") from None


def _block_of(module: str) -> str:
    """`layers.3.attention.q_proj` belongs to `layers.3`; what is in no numbered part to "the rest"."""
    match = re.match(r"(?:[A-Za-z_]\w*\.)*?[A-Za-z_]\w*\.\d+", module)
    return match[0] if match else "outside the blocks"


def _weights(plan: Plan, step: Step) -> tuple[str, ...]:
    names = []
    for arg in step.args.values():
        name = arg.value if isinstance(arg, Ref) else ""
        while name and plan.value(name).kind == "view":
            name = plan.value(name).base
        if name and plan.value(name).kind == "weight":
            names.append(name)
    return tuple(names)


def _tactic(engine: Engine, index: int, step: Step, batch: Batch) -> str:
    count = batch.sizes.tokens if step.phase == "tokens" else batch.sizes.rows
    tactic = engine.tactics.tactic(index, step.kernel, count) if engine.tactics else {}
    return ", ".join(f"{name}={value}" for name, value in tactic.items())


def _size(plan: Plan, name: str, sizes: Sizes) -> int:
    value = plan.value(name)
    return math.prod(Extent.parse(dim).at(sizes) for dim in value.shape) * ITEM_SIZES[value.dtype]
