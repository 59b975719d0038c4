"""The passes for a stateless module, in order: no attention to batch, no proof, and sizes linear in the batch.

A module is run as it is, on exactly the batch that it is given; nothing is padded, so it may mix what it likes.
"""

from collections.abc import Sequence

from torch import fx

from tritium.graph.grammar import verify_form
from tritium.graph.module_grammar import verify_module
from tritium.passes.batch_views import expand_along_batch
from tritium.passes.canonicalise import canonicalise
from tritium.passes.dead_code import remove_dead_code, remove_duplicates
from tritium.passes.embedding_bags import split_bags
from tritium.passes.fold_constants import fold_constants
from tritium.passes.fuse_linear_activation import fuse_linear_activation
from tritium.passes.pipeline import Optimised, Pass, Run
from tritium.passes.recognise import recognise
from tritium.passes.recognise_products import recognise_products

MODULE = (
    Pass(name="split_bags", run=split_bags),
    Pass(name="expand_along_batch", run=expand_along_batch),  # before canonicalise, which knows fixed sizes only
    Pass(name="canonicalise", run=canonicalise),
    Pass(name="remove_dead_code", run=remove_dead_code),  # sizes that only views read are gone now
    Pass(name="remove_duplicates", run=remove_duplicates),
    Pass(name="fold_constants", run=fold_constants),
    Pass(name="recognise_products", run=recognise_products),
    Pass(name="recognise", run=recognise),
    Pass(name="canonicalise_recognised", run=canonicalise),
    Pass(name="remove_duplicates_again", run=remove_duplicates),
    Pass(name="remove_dead_code_again", run=remove_dead_code),
    Pass(name="fuse_linear_activation", run=fuse_linear_activation),
)


def optimise_module(graph: fx.Graph, disabled: Sequence[str] = ()) -> Optimised:
    """Run the passes on a captured graph, in place, without the optional ones that are `disabled`.

    Raises `CaptureError` with the node that no kernel runs, or whose sizes are not linear in the batch.
    """
    verify_form(graph)
    run = Run(graph, disabled)
    run(MODULE)
    verify_module(graph)
    return Optimised.of(graph, run.matches)
