"""Provenance: which module and which line of the model's code a node comes from."""

import re
from typing import NamedTuple

from torch import fx


class Source(NamedTuple):
    """module: dotted path inside the model. place: `file.py:line`. code: that line's text."""

    module: str = ""
    place: str = ""
    code: str = ""

    @classmethod
    def of(cls, node: fx.Node) -> "Source":
        """Read torch.export's metadata of a node."""
        stack = node.meta.get("nn_module_stack") or {}
        path = list(stack.values())[-1][0] if stack else ""
        frames = re.findall(r'File "([^"]+)", line (\d+), in [^\n]*\n([^\n]*)', node.meta.get("stack_trace") or "")
        if not frames:
            return cls(path)
        file, line, code = frames[-1]
        return cls(path, f"{file.rsplit('/', 1)[-1]}:{line}", code.strip())

    def __str__(self) -> str:
        return "  ".join(part for part in (self.module, self.place, self.code) if part)
