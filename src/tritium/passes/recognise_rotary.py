"""Find the cosines and sines of rotary embeddings, wherever they are computed.

Matches: `cos` or `sin` of positions x inv_freq [T, P], or of that twice side by side [T, 2P] (as `rotate_half` code
    wants it), perhaps times a number.
Replaces with: a slice of `tritium.rope_cos_sin(positions, inv_freq, attention_scaling)`, or that twice side by side:
    the form in which `ops.rope`'s spellings read it. Bit for bit the same values.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import fx

from tritium.graph.capture import capture_function
from tritium.graph.edit import insert_inferred, replace
from tritium.graph.match import Match, Pattern, find
from tritium.graph.spec import spec_of
from tritium.passes.canonicalise import canonicalise
from tritium.passes.dead_code import remove_dead_code, remove_duplicates
from tritium.passes.result import PassResult

aten = torch.ops.aten
SCALING = 1.2345


class Form(NamedTuple):
    """function: cos or sin. copies: 1, or 2 side by side. is_scaled: multiplied by a number."""

    function: Callable[[torch.Tensor], torch.Tensor]
    copies: int
    is_scaled: bool


FORMS = tuple(Form(f, copies, scaled) for scaled in (True, False) for copies in (2, 1) for f in (torch.cos, torch.sin))


def recognise_rotary(graph: fx.Graph) -> PassResult:
    """See the module's docstring."""
    if not any(node.target in (aten.cos.default, aten.sin.default) for node in graph.nodes):
        return PassResult(0)
    count = 0
    for form, pattern in _patterns():
        for node in list(graph.nodes):
            match = find(pattern, node) if node.op == "call_function" else None
            if match is not None:
                with graph.inserting_before(node):
                    new = _replacement(node, form, match.bound(pattern), match)
                replace(node, new)
                count += 1
        remove_dead_code(graph)
    return PassResult(count)


def _replacement(root: fx.Node, form: Form, inputs: dict[str, fx.Node], match: Match) -> fx.Node:
    graph = root.graph
    scaling = match.attributes.get("attention_scaling", 1.0)
    args = (inputs["positions_T"], inputs["inv_freq_P"], float(scaling))
    cos_sin = insert_inferred(graph, torch.ops.tritium.rope_cos_sin.default, args, like=root)
    cos_sin.meta["covers"] = tuple(name for node in match.covered() for name in node.meta["covers"])
    (num_pairs,) = spec_of(inputs["inv_freq_P"]).shape
    start = 0 if form.function is torch.cos else num_pairs
    part = insert_inferred(graph, aten.slice.Tensor, (cos_sin, 1, start, start + num_pairs), like=root)  # type: ignore[operator]
    return part if form.copies == 1 else insert_inferred(graph, aten.cat.default, ([part, part], -1), like=root)


@functools.cache
def _patterns() -> list[tuple[Form, Pattern]]:
    return [(form, _pattern(form)) for form in FORMS]


def _pattern(form: Form) -> Pattern:
    def spelled(positions_T: torch.Tensor, inv_freq_P: torch.Tensor) -> torch.Tensor:
        angles_TP = positions_T.to(torch.float32)[:, None] * inv_freq_P[None, :]
        values = form.function(torch.cat([angles_TP] * form.copies, dim=-1) if form.copies > 1 else angles_TP)
        return values * SCALING if form.is_scaled else values

    graph = capture_function(spelled, (torch.arange(8), torch.rand(6)), {})
    canonicalise(graph)
    remove_dead_code(graph)
    remove_duplicates(graph)
    return Pattern(graph, sentinels={SCALING: "attention_scaling"} if form.is_scaled else {})
