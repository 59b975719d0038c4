"""A plugin's ops as torch ops: a graph's node needs one as its target. They exist while a build runs, no longer."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from tritium.ops.op import Op

PREFIX = "tritium_plugin_"
Targets = Mapping[str, tuple[Op, Any]]


@contextmanager
def registered(ops: Mapping[str, Op]) -> Iterator[Targets]:
    """Inside: each op (by the name plans give it, `<plugin>.<op>`) with the torch op that stands for it in graphs."""
    libraries: dict[str, torch.library.Library] = {}
    targets = {}
    try:
        for name, op in ops.items():
            namespace = PREFIX + name.partition(".")[0]
            library = libraries.get(namespace) or torch.library.Library(namespace, "FRAGMENT")
            libraries[namespace] = library
            library.define(op.schema)
            library.impl(op.name, op.reference, "CompositeExplicitAutograd")
            torch.library.register_fake(f"{namespace}::{op.name}", op.fake, lib=library)
            targets[name] = (op, getattr(getattr(torch.ops, namespace), op.name).default)
        yield targets
    finally:
        for namespace, library in libraries.items():
            library._destroy()
            delattr(torch.ops, namespace)  # or a second build would find the first one's ops there


def is_foreign(namespace: str) -> bool:
    """True for the namespace of a plugin's torch ops."""
    return namespace.startswith(PREFIX)
