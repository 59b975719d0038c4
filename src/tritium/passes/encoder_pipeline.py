"""The passes for an encoder: a decoder's, but attention sees whole sequences and nothing is kept between batches."""

from collections.abc import Collection, Sequence
from functools import partial
from typing import Any

from torch import fx

from tritium.graph.edit import output_node
from tritium.graph.grammar import verify_calls, verify_form
from tritium.graph.locality import prove_token_local
from tritium.graph.spec import args_of
from tritium.passes.gather_rows import gather_sampled_rows
from tritium.passes.insert_varlen import insert_varlen
from tritium.passes.pipeline import FUSE, MERGE, NORMALISE, Optimised, Pass, Run, quantises_rows
from tritium.passes.quantize import quantize
from tritium.passes.quantize_embedding import quantize_embedding
from tritium.passes.quantize_rows import quantize_linears
from tritium.quant.schemes import scheme_named


def optimise_encoder(
    graph: fx.Graph,
    outputs: Sequence[str],
    row_outputs: Collection[str],
    *,
    disabled: Sequence[str] = (),
    scheme: str | None = None,
    unquantized: Sequence[str] = (),
    has_quantized_embedding: bool = False,
    device: str = "cpu",
) -> Optimised:
    """Run the passes on a captured graph, in place.

    outputs: what the graph returns, in order. row_outputs: those that are computed for sampled rows only.
    scheme: how linears are quantised; unquantized: names of weights that are not.
    has_quantized_embedding: keep the table of tokens in 8 bits. device: as in `pipeline.optimise`.
    Raises `CaptureError` when the graph is outside the vocabulary or not token-local, `ConfigError` for a name in
    `disabled` that is no optional pass.
    """
    run = Run(graph, disabled)
    verify_form(graph)
    run(NORMALISE)
    prove_token_local(graph)
    results = zip(outputs, args_of(output_node(graph))[0], strict=True)
    whole = [node for name, node in results if name not in row_outputs]
    run.matches["gather_sampled_rows"] = gather_sampled_rows(graph, whole).num_matches
    run(MERGE)
    chosen = scheme_named(scheme) if scheme is not None else None
    has_rows = chosen is not None and quantises_rows(chosen, device)
    how: dict[str, Any] = {"scheme": chosen, "left_out": unquantized}
    if chosen is not None and not has_rows:
        run([Pass(name="quantize", run=partial(quantize, **how))])
    if has_quantized_embedding:  # after quantize, whose weights a tied head shares with it
        run([Pass(name="quantize_embedding", run=partial(quantize_embedding, left_out=unquantized))])
    run.matches["insert_varlen"] = insert_varlen(graph).num_matches
    run(FUSE)
    if has_rows:  # last: it takes the norms before a linear as FUSE has made them
        run([Pass(name="quantize_rows", run=partial(quantize_linears, **how))])
    verify_form(graph)
    verify_calls(graph)
    return Optimised.of(graph, run.matches)
