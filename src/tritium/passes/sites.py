"""Leaving an optional pass out at one place of the model: `merge_qkv@layers.3.attention`.

A site is the dotted path of a module. The pass is run without it: while it runs, the calls of that module and of its
parts are strangers to it, so it rewrites nothing that one of them belongs to.
"""

import contextlib
from collections.abc import Collection, Iterator, Sequence

from torch import fx

from tritium.errors import ConfigError
from tritium.graph.edit import Target
from tritium.graph.spec import target_of

SHOWN = 12


class _Hidden:
    """What a hidden call calls: nothing that any pass knows."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.__name__ = f"hidden_{target}"


def split(entry: str) -> tuple[str, str | None]:
    """An entry of `disabled_passes`: a pass, and the module where it is off; None: it is off everywhere."""
    name, at, module = entry.partition("@")
    return name, module if at else None


def is_within(module: str, site: str) -> bool:
    """True for the module itself and for its parts."""
    return module == site or module.startswith(f"{site}.")


@contextlib.contextmanager
def hidden(graph: fx.Graph, sites: Collection[str]) -> Iterator[None]:
    """Inside, the calls of these modules match nothing. Those that write stay as they are: nobody reads them, so they
    would be taken for dead code."""
    veiled = []
    for node in graph.nodes:
        target = target_of(node)
        is_there = isinstance(target, Target) and any(is_within(node.meta["source"].module, site) for site in sites)
        if is_there and not target._schema.is_mutable:
            node.target = _Hidden(target)
            veiled.append(node)
    yield
    for node in veiled:
        node.target = target_of(node).target


def check_sites(graph: fx.Graph, disabled: Sequence[str]) -> None:
    """Raises `ConfigError` for a site that no call of the model is in."""
    modules = dict.fromkeys(node.meta["source"].module for node in graph.nodes if node.op == "call_function")
    for entry in disabled:
        site = split(entry)[1]
        if site is not None and not any(is_within(module, site) for module in modules):
            known = [module for module in modules if module]
            more = f" and {len(known) - SHOWN} more" if len(known) > SHOWN else ""
            raise ConfigError(
                f"disabled_passes: {entry!r} names no part of this model that computes anything; its parts: "
                f"{', '.join(known[:SHOWN]) or 'none'}{more}"
            )
