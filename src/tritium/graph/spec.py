"""What the compiler knows of a node's value: dtype and shape, sizes linear in the batch.

Every node of a graph carries `node.meta["spec"]`: a `Spec`, or a tuple of them for an op with several outputs, or None
for one without. A size is an int, or an `Extent` when it depends on the batch; extents never hold plain numbers.
"""

from typing import Any, NamedTuple

import torch
from torch import fx

from tritium.engine.plan import Extent
from tritium.errors import CaptureError

Dim = int | Extent
NUM_TOKENS = Extent(tokens=1)
NUM_ROWS = Extent(rows=1)
IRREGULAR = Extent(tokens=-1)  # a size that is not a·T + d: no value of a finished graph has it


class Spec(NamedTuple):
    """dtype and shape of a value."""

    dtype: torch.dtype
    shape: tuple[Dim, ...]

    @property
    def rank(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    @property
    def batch_dims(self) -> tuple[int, ...]:
        """Indices of the dimensions whose size depends on the batch."""
        return tuple(i for i, dim in enumerate(self.shape) if isinstance(dim, Extent))

    def with_shape(self, shape: tuple[Dim, ...]) -> "Spec":
        """The same dtype with another shape."""
        return Spec(self.dtype, shape)

    def __str__(self) -> str:
        return f"{dtype_name(self.dtype)}[{', '.join(str(dim) for dim in self.shape)}]"


def dtype_name(dtype: torch.dtype) -> str:
    """torch's name of a dtype without `torch.`."""
    return str(dtype).removeprefix("torch.")


def spec_of(node: fx.Node) -> Spec:
    """The spec of a node with exactly one tensor output. Raises `CaptureError` with the node for any other."""
    spec = node.meta["spec"]
    if not isinstance(spec, Spec):
        raise CaptureError(
            f"{node.name} = {node.target} gives {spec} where one tensor is expected. "
            f"At {node.meta.get('source') or 'an unknown place'}. Write the model without this value"
        )
    return spec


def args_of(node: fx.Node) -> tuple[Any, ...]:
    """The positional arguments, without fx's union of all that they could be."""
    return node.args


def target_of(node: fx.Node) -> Any:
    """What the node calls, without fx's union."""
    return node.target


def has_spec(node: object) -> bool:
    """True for a node with exactly one tensor output."""
    return isinstance(node, fx.Node) and isinstance(node.meta.get("spec"), Spec)
