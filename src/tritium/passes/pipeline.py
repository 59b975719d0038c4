"""All passes, in order, in phases. Required ones always run; an optional one can be switched off by its name.

The order is the design: a comment stands wherever a position matters.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import fx

from tritium.engine.plan import KVGroup, Plan
from tritium.errors import ConfigError
from tritium.graph.derived import derived_weights
from tritium.graph.foreign import Targets
from tritium.graph.grammar import verify, verify_captured
from tritium.graph.locality import prove_token_local
from tritium.mapping import Ranks
from tritium.passes.canonicalise import canonicalise
from tritium.passes.dead_code import remove_duplicates
from tritium.passes.fold_constants import constants_of, fold_constants
from tritium.passes.fold_weights import fold_weights
from tritium.passes.fuse_add_norm import fuse_add_norm
from tritium.passes.fuse_linear_activation import fuse_linear_activation
from tritium.passes.fuse_linear_add import fuse_linear_add
from tritium.passes.fuse_rope_kv import fuse_rope_kv
from tritium.passes.gather_rows import gather_sampled_rows
from tritium.passes.insert_kv import insert_kv
from tritium.passes.lower import lower
from tritium.passes.merge_gate_up import merge_gate_up
from tritium.passes.merge_outputs import merge_outputs
from tritium.passes.merge_parallel import merge_parallel
from tritium.passes.merge_qkv import merge_qkv
from tritium.passes.quantize import keep_stored, quantize
from tritium.passes.quantize_embedding import quantize_embedding
from tritium.passes.quantize_kv import quantize_kv
from tritium.passes.quantize_norms import quantize_norms
from tritium.passes.quantize_rows import quantize_linears, store_fp8
from tritium.passes.recognise import recognise
from tritium.passes.recognise_attention import read_shared_heads, recognise_attention
from tritium.passes.recognise_plugins import recognise_plugins
from tritium.passes.recognise_products import recognise_products
from tritium.passes.recognise_rotary import recognise_rotary
from tritium.passes.recognise_scores import recognise_scores
from tritium.passes.result import PassResult
from tritium.passes.shard import shard
from tritium.passes.sites import check_sites, hidden, split
from tritium.passes.smooth import smooth
from tritium.passes.views import canonicalise_views
from tritium.quant.schemes import FP8, QuantScheme, WeightFormat, scheme_named
from tritium.weights.recipes import Recipe

Rewrite = Callable[[fx.Graph], PassResult]


@dataclass(frozen=True, kw_only=True)
class Pass:
    """A row of the pipeline. is_required: the graph cannot be lowered without it."""

    name: str
    run: Rewrite
    is_required: bool = True


@dataclass(frozen=True)
class Optimised:
    """A graph ready for lowering, how often each pass matched, and a decoder's KV groups.

    weights: the recipes of weights that passes made, over the model's own tensors. constants: by weight name.
    """

    graph: fx.Graph
    matches: dict[str, int]
    weights: dict[str, Recipe]
    constants: dict[str, torch.Tensor]
    kv_groups: tuple[KVGroup, ...] = ()

    @classmethod
    def of(cls, graph: fx.Graph, matches: dict[str, int], kv_groups: tuple[KVGroup, ...] = ()) -> "Optimised":
        """With the weights and constants that the graph has now."""
        return cls(graph, matches, derived_weights(graph), constants_of(graph), kv_groups)


class Run:
    """Runs passes on a graph, in place, without those that are disabled; `matches` says how often each matched.

    disabled: names of optional passes, or `pass@module`, which is off for the calls of that module alone (sites.py).
    Raises `ConfigError` for one that is neither. `after` is called with the graph after each pass.
    """

    def __init__(self, graph: fx.Graph, disabled: Sequence[str] = (), after: Rewrite | None = None) -> None:
        check_disabled(disabled)
        check_sites(graph, disabled)
        self.matches: dict[str, int] = {}
        self._graph, self._after = graph, after
        self._disabled = {name for name, site in map(split, disabled) if site is None}
        self._sites: dict[str, list[str]] = {}
        for name, site in map(split, disabled):
            if site is not None:
                self._sites.setdefault(name, []).append(site)

    def __call__(self, passes: Sequence[Pass]) -> None:
        for row in passes:
            if row.name not in self._disabled:
                with hidden(self._graph, self._sites.get(row.name, ())):
                    self.matches[row.name] = row.run(self._graph).num_matches
                if self._after is not None:
                    self._after(self._graph)


NORMALISE = (
    Pass(name="canonicalise", run=canonicalise),  # leaves nothing that is dead: asserts gone, their inputs go too
    Pass(name="remove_duplicates", run=remove_duplicates),  # before matching: a pattern names each value once
    Pass(
        name="fold_constants", run=fold_constants, is_required=False
    ),  # before matching: frequencies made in forward()
    Pass(name="recognise_attention", run=recognise_attention),
    Pass(name="recognise_scores", run=recognise_scores),  # after fold_constants: biases are constants by then
    Pass(name="canonicalise_heads", run=canonicalise),  # its permutations meet the model's own
    Pass(name="read_shared_heads", run=read_shared_heads, is_required=False),
    Pass(name="recognise_rotary", run=recognise_rotary),  # before recognise: gives cos and sin the form that rope reads
    Pass(name="canonicalise_rotary", run=canonicalise),
    Pass(name="remove_duplicates_rotary", run=remove_duplicates),
    Pass(name="recognise_products", run=recognise_products),
    Pass(name="recognise", run=recognise),  # leaves nothing dead: the proof looks at live nodes only
    Pass(name="remove_duplicates_again", run=remove_duplicates),  # one op in two spellings is two of one op
)
# Between them stands the proof: recognised attention is exempt from it, everything else must be token-local.
# gather_sampled_rows stands before insert_kv, because it looks for stateless attention.
BATCH = (Pass(name="gather_sampled_rows", run=gather_sampled_rows),)
# Merging stands after gather_sampled_rows, for linears over T and over R rows are not siblings; and before insert_kv,
# for it finds queries, keys and values by their attention. Quantising, when it is asked for, follows the merging.
MERGE = (
    Pass(name="fold_weights", run=fold_weights, is_required=False),  # first: a weight behind a view cannot be merged
    Pass(name="merge_qkv", run=merge_qkv, is_required=False),
    Pass(name="merge_gate_up", run=merge_gate_up, is_required=False),
    Pass(name="merge_parallel", run=merge_parallel, is_required=False),  # takes what the two before it have made
    Pass(name="canonicalise_slices", run=canonicalise_views),  # a slice of a slice is one
)
FUSE = (
    Pass(name="fuse_linear_activation", run=fuse_linear_activation, is_required=False),  # gate and up are one by now
    # Before fuse_add_norm, which would take the last sum of an attention and an MLP apart from the others; after
    # quantising, for it is for plain linears.
    Pass(name="merge_outputs", run=merge_outputs, is_required=False),
    Pass(name="fuse_add_norm", run=fuse_add_norm, is_required=False),
    # After fuse_add_norm: a sum that a norm reads costs nothing there, where both are in cache; this takes the others.
    Pass(name="fuse_linear_add", run=fuse_linear_add, is_required=False),
    Pass(name="fuse_rope_kv", run=fuse_rope_kv, is_required=False),  # after insert_kv, which makes what it matches
    Pass(name="quantize_norms", run=quantize_norms, is_required=False),  # last: it takes norms and linears as fused
)
PASSES = (*NORMALISE, *BATCH, *MERGE, *FUSE)
OPTIONAL = tuple(p.name for p in PASSES if not p.is_required)


def optimise(
    graph: fx.Graph,
    *,
    disabled: Sequence[str] = (),
    after: Rewrite | None = None,
    foreign: Targets | None = None,
    scheme: str | None = None,
    unquantized: Sequence[str] = (),
    has_quantized_embedding: bool = False,
    ranks: Ranks = Ranks(),
    stored: Mapping[str, WeightFormat] | None = None,
    kv_dtype: str = "auto",
    calibrated: Collection[str] = (),
    device: str = "cpu",
) -> Optimised:
    """Run the pipeline on a captured graph, in place. `after` is called with it after each pass (tests, dumps).

    foreign: the ops of plugins. scheme: how linears are quantised; unquantized: names of weights that are not.
    has_quantized_embedding: keep the table of tokens in 8 bits.
    ranks: those that share the model, and which of them this graph is for.
    stored: weights that the checkpoint keeps quantised; without a scheme they stay so. kv_dtype: "int8" keeps keys and
    values in it.
    calibrated: names of calibration tensors (calibrate/calibrate.py). device: on "cuda" rows are quantised by the ops
    before a linear, on a CPU by the linear.

    Raises `CaptureError` when the graph is outside the vocabulary or not token-local, `ConfigError` for a name in
    `disabled` that is no optional pass.
    """
    if ranks.tensor_parallel > 1 and stored:
        raise ConfigError(
            f"tensor_parallel={ranks.tensor_parallel}: {next(iter(stored))!r} is kept quantised, which "
            "ranks cannot share: give them the unquantised model"
        )
    if ranks.tensor_parallel > 1 and calibrated:
        raise ConfigError(
            f"tensor_parallel={ranks.tensor_parallel}: what calibration has learned is of whole weights, ranks have "
            "parts of them: quantise without it (method rtn)"
        )
    run = Run(graph, disabled, after)
    verify_captured(graph)
    run(NORMALISE)
    prove_token_local(graph)
    if calibrated:  # here, where calibration saw the graph
        run([Pass(name="smooth", run=partial(smooth, vectors=calibrated))])
    if foreign:
        run([Pass(name="recognise_plugins", run=partial(recognise_plugins, targets=foreign))])
    run(BATCH)
    if ranks.tensor_parallel > 1:  # before merging: a part of a joint weight is not the joint weight of the parts
        run([Pass(name="shard", run=partial(shard, ranks=ranks))])
    run(MERGE)
    chosen = scheme_named(scheme) if scheme is not None else None
    # after merging: a merged linear is quantised as one, part by part
    has_rows = chosen is not None and quantises_rows(chosen, device)
    how: dict[str, Any] = {"scheme": chosen, "left_out": unquantized, "calibrated": calibrated}
    if chosen is not None and not has_rows:
        run([Pass(name="quantize", run=partial(quantize, **how))])
    if chosen is None and stored:
        run([Pass(name="keep_stored", run=partial(keep_stored, stored=stored))])
    if has_quantized_embedding:  # after quantize, whose weights a tied head shares with it
        run([Pass(name="quantize_embedding", run=partial(quantize_embedding, left_out=unquantized))])
    result, kv_groups = insert_kv(graph)
    run.matches["insert_kv"] = result.num_matches
    run(FUSE)
    if has_rows:  # last: it takes the norms before a linear as FUSE has made them
        run([Pass(name="quantize_rows", run=partial(quantize_linears, **how))])
    if chosen is not None and chosen.weight == FP8:
        kv_groups = store_fp8(graph, kv_groups)
    if kv_dtype == "int8":
        kept, kv_groups = quantize_kv(graph, kv_groups)
        run.matches["quantize_kv"] = kept.num_matches
    verify(graph, foreign=[target for _, target in (foreign or {}).values()])
    return Optimised.of(graph, run.matches, kv_groups)


def quantises_rows(scheme: QuantScheme, device: str) -> bool:
    """The rows that a linear reads are quantised by the ops before it (`quantize_rows`), not by the linear."""
    return scheme.weight == FP8 or (scheme.int8_activations and device == "cuda")


NOT_ON_GPUS = ("fuse_linear_activation", "merge_outputs", "fuse_linear_add")


def left_out(disabled: Sequence[str], device: str) -> tuple[str, ...]:
    """`disabled`, and what a device does better without.

    On a GPU cuBLAS has no epilogue for activations or for a sum beside a bias. Two inputs of one GEMM would be copied
    side by side: as many launches as two GEMMs and a sum. In fp8 the op that quantises them does that copy, and
    quantize_rows.py merges them there.
    """
    return (*disabled, *(NOT_ON_GPUS if device == "cuda" else ()))


def check_disabled(disabled: Sequence[str]) -> None:
    """Raises `ConfigError` for what names no optional pass."""
    for name, _ in map(split, disabled):
        if name not in OPTIONAL:
            raise ConfigError(
                f"disabled_passes: {name!r} is not an optional pass; optional: {', '.join(OPTIONAL) or 'none'}"
            )


def to_plan(optimised: Optimised) -> Plan:
    """Lower an optimised graph."""
    return lower(optimised.graph, optimised.kv_groups)
