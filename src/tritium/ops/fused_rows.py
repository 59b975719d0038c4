"""Norms, sums and activations that give their rows quantised, for a linear behind them: one family of ops a format.

A row becomes numbers of few bits and its scale. Passes make these ops; each equals its parts one after the other, but
that the row is quantised before it is rounded to its dtype. With `scale`, one number for the whole tensor that
calibration has found, rows take that in place of their own; what lies beyond the format's largest number is cut off.
"""

from collections.abc import Callable

import torch

from tritium.ops.activations import activation
from tritium.ops.norms import layer_norm
from tritium.ops.op import Op

Pair = tuple[torch.Tensor, torch.Tensor]
Quantize = Callable[[torch.Tensor, torch.Tensor | None], Pair]

ROW_FORMATS = ("fp8", "int8")
ROW_BASES = (
    "quantize", "rms_norm", "add_rms_norm", "gated_activation", "activation", "add_layer_norm", "activation_pair",
)  # fmt: skip
_NORM = "float eps, float weight_offset, bool cast_before_weight"
_ADD_LAYER_NORM = "Tensor x, Tensor residual, Tensor? x_bias, Tensor weight, Tensor? bias, float eps"


def with_nan_rows(scale: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    """The one scale [1] for every row of h [T, K], [T, 1]; NaN for a row that holds an infinity or a NaN."""
    return torch.where(h.isfinite().all(-1, keepdim=True), scale.expand(len(h), 1), torch.nan)


def scaled(
    sums: torch.Tensor, x_scales: torch.Tensor, weight_scales: torch.Tensor, bias: torch.Tensor | None, dtype: str
) -> torch.Tensor:
    """A linear's sums [T, N] in fp32 times x_scales [T, 1] and weight_scales [1, N], plus bias, in `dtype`."""
    sums = sums * x_scales * weight_scales
    return (sums if bias is None else sums + bias.to(torch.float32)).to(getattr(torch, dtype))


def row_ops(name: str, dtype: torch.dtype, quantize: Quantize) -> tuple[Op, ...]:
    """quantize_<name>, rms_norm_<name>, add_rms_norm_<name>, gated_activation_<name>, activation_<name>,
    add_layer_norm_<name> and activation_pair_<name>. quantize(x [T, K], scale): rows in `dtype`, their scales
    in fp32, [T, 1]."""

    def rms_norm(
        x: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        weight_offset: float,
        cast_before_weight: bool,
        scale: torch.Tensor | None = None,
    ) -> Pair:
        """Quantised `rms_norm(x, ...)`."""
        h = x.to(torch.float32)
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
        h = h.to(x.dtype).to(torch.float32) if cast_before_weight else h
        return quantize(h * (weight.to(torch.float32) + weight_offset), scale)

    def add_rms_norm(
        x: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        weight_offset: float,
        cast_before_weight: bool,
        scale: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Quantised `rms_norm(x + residual, ...)`, and the sum itself, rounded to x's dtype."""
        total = x + residual
        return *rms_norm(total, weight, eps, weight_offset, cast_before_weight, scale), total

    def gated(gate: torch.Tensor, up: torch.Tensor, kind: str, scale: torch.Tensor | None = None) -> Pair:
        """Quantised `gated_activation(gate, up, kind)`."""
        return quantize(activation(gate, kind).to(torch.float32) * up.to(torch.float32), scale)

    def activated(x: torch.Tensor, bias: torch.Tensor | None, kind: str, scale: torch.Tensor | None = None) -> Pair:
        """Quantised `activation(x + bias, kind)`, the sum in fp32."""
        h = x.to(torch.float32)
        return quantize(activation(h if bias is None else h + bias.to(torch.float32), kind), scale)

    def activated_pair(
        x: torch.Tensor, y: torch.Tensor, bias: torch.Tensor | None, kind: str, scale: torch.Tensor | None = None
    ) -> Pair:
        """x [T, K1], and beside it `activation(y + bias, kind)` [T, K2], quantised as one row: [T, K1 + K2]."""
        h = y.to(torch.float32)
        h = activation(h if bias is None else h + bias.to(torch.float32), kind)
        return quantize(torch.cat((x.to(torch.float32), h), -1), scale)

    def add_layer_norm(
        x: torch.Tensor,
        residual: torch.Tensor,
        x_bias: torch.Tensor | None,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        eps: float,
        scale: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Quantised `layer_norm(x + residual + x_bias, weight, bias, eps)`, and the sum, rounded once to x's dtype."""
        total = x.to(torch.float32) + residual.to(torch.float32)
        total = (total if x_bias is None else total + x_bias.to(torch.float32)).to(x.dtype)
        bias = None if bias is None else bias.to(torch.float32)
        return *quantize(layer_norm(total.to(torch.float32), weight.to(torch.float32), bias, eps), scale), total

    def fake_rows(x: torch.Tensor, *_: object, **__: object) -> Pair:
        scales = torch.empty((x.shape[0], 1), dtype=torch.float32, device=x.device)
        return torch.empty(x.shape, dtype=dtype, device=x.device), scales

    def fake_wide_rows(x: torch.Tensor, y: torch.Tensor, *_: object, **__: object) -> Pair:
        return fake_rows(x.new_empty((x.shape[0], x.shape[1] + y.shape[1])))

    def fake_rows_and_sum(x: torch.Tensor, *_: object, **__: object) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return *fake_rows(x), torch.empty(x.shape, dtype=x.dtype, device=x.device)

    results: dict[Callable[..., object], str] = {
        fake_rows: "(Tensor, Tensor)",
        fake_wide_rows: "(Tensor, Tensor)",
        fake_rows_and_sum: "(Tensor, Tensor, Tensor)",
    }
    rows: tuple[tuple[str, Callable[..., object], str, Callable[..., object]], ...] = (
        ("quantize", quantize, "Tensor x", fake_rows),
        ("rms_norm", rms_norm, f"Tensor x, Tensor weight, {_NORM}", fake_rows),
        ("add_rms_norm", add_rms_norm, f"Tensor x, Tensor residual, Tensor weight, {_NORM}", fake_rows_and_sum),
        ("gated_activation", gated, "Tensor gate, Tensor up, str kind", fake_rows),
        ("activation", activated, "Tensor x, Tensor? bias, str kind", fake_rows),
        ("add_layer_norm", add_layer_norm, _ADD_LAYER_NORM, fake_rows_and_sum),
        ("activation_pair", activated_pair, "Tensor x, Tensor y, Tensor? bias, str kind", fake_wide_rows),
    )
    return tuple(
        Op(
            name=f"{base}_{name}",
            schema=f"{base}_{name}({arguments}, Tensor? scale=None) -> {results[fake]}",
            reference=reference,
            fake=fake,
            is_fused=True,
        )
        for base, reference, arguments, fake in rows
    )


def linear_op(name: str, reference: Callable[..., torch.Tensor]) -> Op:
    """linear_<name>: a linear of rows and weights that are quantised so."""

    def fake(x: torch.Tensor, x_scales: object, weight_NK: torch.Tensor, *rest: object) -> torch.Tensor:
        dtype = rest[-1]
        assert isinstance(dtype, str)
        return torch.empty((x.shape[0], weight_NK.shape[0]), dtype=getattr(torch, dtype), device=x.device)

    arguments = "Tensor x, Tensor x_scales, Tensor weight_NK, Tensor weight_scales, Tensor? bias, str dtype"
    return Op(
        name=f"linear_{name}",
        schema=f"linear_{name}({arguments}) -> Tensor",
        reference=reference,
        fake=fake,
        is_fused=True,
    )
