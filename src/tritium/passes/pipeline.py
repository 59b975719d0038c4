"""All passes, in order, in phases. Required ones always run; an optional one can be switched off by its name.

The order is the design: a comment stands wherever a position matters.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import fx

from tritium.engine.plan import KVGroup, Plan
from tritium.errors import ConfigError
from tritium.graph.grammar import verify, verify_captured
from tritium.graph.locality import prove_token_local
from tritium.passes.canonicalise import canonicalise
from tritium.passes.dead_code import remove_dead_code, remove_duplicates
from tritium.passes.gather_rows import gather_sampled_rows
from tritium.passes.insert_kv import insert_kv
from tritium.passes.lower import lower
from tritium.passes.recognise import recognise
from tritium.passes.recognise_attention import read_shared_heads, recognise_attention
from tritium.passes.recognise_products import recognise_products
from tritium.passes.recognise_rotary import recognise_rotary
from tritium.passes.result import PassResult

Rewrite = Callable[[fx.Graph], PassResult]


@dataclass(frozen=True, kw_only=True)
class Pass:
    """A row of the pipeline. is_required: the graph cannot be lowered without it."""

    name: str
    run: Rewrite
    is_required: bool = True


@dataclass(frozen=True)
class Optimised:
    """A graph ready for lowering, its KV groups, and how often each pass matched."""

    graph: fx.Graph
    kv_groups: tuple[KVGroup, ...]
    matches: dict[str, int]


NORMALISE = (
    Pass(name="canonicalise", run=canonicalise),
    Pass(name="remove_dead_code", run=remove_dead_code),  # before matching: asserts gone, their inputs go too
    Pass(name="remove_duplicates", run=remove_duplicates),  # before matching: a pattern names each value once
    Pass(name="recognise_attention", run=recognise_attention),
    Pass(name="canonicalise_heads", run=canonicalise),  # its permutations meet the model's own
    Pass(name="read_shared_heads", run=read_shared_heads, is_required=False),
    Pass(name="recognise_rotary", run=recognise_rotary),  # before recognise: gives cos and sin the form that rope reads
    Pass(name="canonicalise_rotary", run=canonicalise),
    Pass(name="remove_duplicates_rotary", run=remove_duplicates),
    Pass(name="recognise_products", run=recognise_products),
    Pass(name="recognise", run=recognise),
    Pass(name="canonicalise_recognised", run=canonicalise),
    Pass(name="remove_duplicates_again", run=remove_duplicates),  # each layer recognised its own rope_cos_sin
    Pass(name="remove_dead_code_again", run=remove_dead_code),  # before the proof: it looks at live nodes only
)
# Between them stands the proof: recognised attention is exempt from it, everything else must be token-local.
# gather_sampled_rows stands before insert_kv, because it looks for stateless attention.
BATCH = (Pass(name="gather_sampled_rows", run=gather_sampled_rows),)
OPTIONAL = tuple(p.name for p in (*NORMALISE, *BATCH) if not p.is_required)


def optimise(graph: fx.Graph, *, disabled: Sequence[str] = (), after: Rewrite | None = None) -> Optimised:
    """Run the pipeline on a captured graph, in place. `after` is called with it after each pass (tests, dumps).

    Raises `CaptureError` when the graph is outside the vocabulary or not token-local, `ConfigError` for a name in
    `disabled` that is no optional pass.
    """
    for name in disabled:
        if name not in OPTIONAL:
            raise ConfigError(
                f"disabled_passes: {name!r} is not an optional pass; optional: {', '.join(OPTIONAL) or 'none'}"
            )
    matches: dict[str, int] = {}

    def run(passes: Sequence[Pass]) -> None:
        for row in passes:
            if row.name not in disabled:
                matches[row.name] = row.run(graph).num_matches
                if after is not None:
                    after(graph)

    verify_captured(graph)
    run(NORMALISE)
    prove_token_local(graph)
    run(BATCH)
    result, kv_groups = insert_kv(graph)
    matches["insert_kv"] = result.num_matches
    verify(graph)
    return Optimised(graph, kv_groups, matches)


def to_plan(optimised: Optimised) -> Plan:
    """Lower an optimised graph."""
    return lower(optimised.graph, optimised.kv_groups)
