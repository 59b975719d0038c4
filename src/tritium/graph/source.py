"""Provenance: which module and which line of the model's code a node comes from."""

import re
from pathlib import Path
from typing import NamedTuple

import torch
from torch import fx

TORCH = str(Path(torch.__file__).parent)  # frames inside torch.nn say nothing of the model


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
        stack_trace = node.meta.get("stack_trace") or ""
        frames = re.findall(r'File "([^"]+)", line (\d+), in [^\n]*(?:\n(?! *File )([^\n]*))?', stack_trace)
        if not frames:
            return cls(path)
        file, line, code = next((f for f in reversed(frames) if not f[0].startswith(TORCH)), frames[-1])
        return cls(path, f"{file.rsplit('/', 1)[-1]}:{line}", code.strip())

    def __str__(self) -> str:
        return "  ".join(part for part in (self.module, self.place, self.code) if part)
