"""A model in fp32, layer by layer: the certificate's reference.

The graph is the one that capture gives, before any pass: no rewrite of ours is in it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tritium.calibrate.stream import ReadWeight, Stream
from tritium.graph.capture import capture


class StreamedReference:
    """`module` captured in fp32. read_weight: a parameter or buffer by its name in the module, in its own dtype."""

    def __init__(self, module: nn.Module, read_weight: ReadWeight) -> None:
        captured = capture(module, dtype=torch.float32)
        self._stream = Stream(captured.graph, captured.constants, read_weight)

    @property
    def most_weight_bytes(self) -> int:
        """Of fp32 weights that were in memory at once, in the last run."""
        return self._stream.most_weight_bytes

    def logits(self, windows: Sequence[Sequence[int]]) -> list[Tensor]:
        """fp32 [len, V] of each window of token ids. Each weight is read once, however many windows there are."""
        return self._stream.run(windows)
