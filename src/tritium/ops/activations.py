"""activation, gated_activation: references and spellings."""

import math

import torch
import torch.nn.functional as F

from tritium.ops.op import Op, Spelling, like_first

KINDS = ("silu", "gelu", "gelu_tanh", "relu", "quick_gelu")


def activation(x: torch.Tensor, kind: str) -> torch.Tensor:
    """The function named by `kind` (one of `KINDS`) of each element, in fp32, cast once. Like x.

    gelu is the exact one (erf); gelu_tanh is GPT-2's "gelu_new"; quick_gelu is x * sigmoid(1.702 x).
    """
    h = x.to(torch.float32)
    if kind == "silu":
        h = F.silu(h)
    elif kind == "gelu":
        h = F.gelu(h)
    elif kind == "gelu_tanh":
        h = F.gelu(h, approximate="tanh")
    elif kind == "relu":
        h = torch.relu(h)
    elif kind == "quick_gelu":
        h = h * torch.sigmoid(1.702 * h)
    else:
        raise ValueError(f"activation kind must be one of {', '.join(KINDS)}, not {kind!r}")
    return h.to(x.dtype)


def gated_activation(gate: torch.Tensor, up: torch.Tensor, kind: str) -> torch.Tensor:
    """`activation(gate, kind) * up`, both rounded to gate's dtype, as `F.silu(gate) * up` does. Like gate."""
    return activation(gate, kind) * up


def _x(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    return (torch.randn(8, 48, dtype=dtype) * 3,)


def _gate_up(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    return torch.randn(8, 48, dtype=dtype) * 3, torch.randn(8, 48, dtype=dtype)


def _silu(x: torch.Tensor) -> torch.Tensor:
    return F.silu(x)


def _silu_written_out(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(x)


def _gelu(x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x)


def _gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x, approximate="tanh")


def _gelu_new(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


def _relu(x: torch.Tensor) -> torch.Tensor:
    return torch.relu(x)


def _quick_gelu(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(1.702 * x)


def _gated_silu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return F.silu(gate) * up


def _gated_gelu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return F.gelu(gate) * up


def _gated_gelu_tanh(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return F.gelu(gate, approximate="tanh") * up


ACTIVATION = Op(
    name="activation",
    schema="activation(Tensor x, str kind) -> Tensor",
    reference=activation,
    fake=like_first,
    spellings=(
        Spelling(name="silu", fn=_silu, example=_x, binds={"kind": "silu"}),
        Spelling(name="silu_written_out", fn=_silu_written_out, example=_x, binds={"kind": "silu"}, bound=1.0),
        Spelling(name="gelu", fn=_gelu, example=_x, binds={"kind": "gelu"}),
        Spelling(name="gelu_tanh", fn=_gelu_tanh, example=_x, binds={"kind": "gelu_tanh"}),
        Spelling(name="gelu_new", fn=_gelu_new, example=_x, binds={"kind": "gelu_tanh"}, bound=2.0),
        Spelling(name="relu", fn=_relu, example=_x, binds={"kind": "relu"}),
        Spelling(name="quick_gelu", fn=_quick_gelu, example=_x, binds={"kind": "quick_gelu"}, bound=1.0),
    ),
)
GATED_ACTIVATION = Op(
    name="gated_activation",
    schema="gated_activation(Tensor gate, Tensor up, str kind) -> Tensor",
    reference=gated_activation,
    fake=like_first,
    spellings=(
        Spelling(name="silu", fn=_gated_silu, example=_gate_up, binds={"kind": "silu"}),
        Spelling(name="gelu", fn=_gated_gelu, example=_gate_up, binds={"kind": "gelu"}),
        Spelling(name="gelu_tanh", fn=_gated_gelu_tanh, example=_gate_up, binds={"kind": "gelu_tanh"}),
    ),
)
