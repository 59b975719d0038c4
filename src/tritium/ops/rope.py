"""rope_cos_sin, rope: references and spellings."""

from collections.abc import Callable

import torch

from tritium.ops.op import Op, Spelling, like_first

Turn = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def rope_cos_sin(positions_T: torch.Tensor, inv_freq_P: torch.Tensor, attention_scaling: float = 1.0) -> torch.Tensor:
    """Cosines, then sines, of position * inv_freq, times attention_scaling: float32 [T, 2P] for every model dtype."""
    angles_TP = positions_T[:, None].to(torch.float32) * inv_freq_P[None, :].to(torch.float32)
    return torch.cat((angles_TP.cos() * attention_scaling, angles_TP.sin() * attention_scaling), dim=-1)


def rope(x_TNH: torch.Tensor, cos_sin: torch.Tensor, interleaved: bool = False) -> torch.Tensor:
    """Rotates the first 2P dimensions of each head by the angles in `cos_sin` [T, 2P]; the rest pass. fp32, cast once.

    Pair p is dimensions (p, p + P), or (2p, 2p + 1) when interleaved (GPT-J). Like x.
    """
    cos_T1P, sin_T1P = cos_sin[:, None, :].chunk(2, dim=-1)
    num_pairs = cos_T1P.shape[-1]
    h = x_TNH[..., : 2 * num_pairs].to(torch.float32)
    if interleaved:
        first, second = h[..., 0::2], h[..., 1::2]
    else:
        first, second = h[..., :num_pairs], h[..., num_pairs:]
    rotated = (first * cos_T1P - second * sin_T1P, second * cos_T1P + first * sin_T1P)
    out = torch.stack(rotated, dim=-1).flatten(-2) if interleaved else torch.cat(rotated, dim=-1)
    return torch.cat((out.to(x_TNH.dtype), x_TNH[..., 2 * num_pairs :]), dim=-1)


def _positions_inv_freq(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    return torch.arange(8) * 5, 1.0 / 10000.0 ** (torch.arange(6) / 6)


def _x_cos_sin(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    positions_T, inv_freq_P = _positions_inv_freq(dtype)
    return torch.randn(8, 3, 12, dtype=dtype), rope_cos_sin(positions_T, inv_freq_P)


def _outer(positions_T: torch.Tensor, inv_freq_P: torch.Tensor, *, attention_scaling: float) -> torch.Tensor:
    angles = torch.outer(positions_T.float(), inv_freq_P)
    return torch.cat((angles.cos() * attention_scaling, angles.sin() * attention_scaling), dim=-1)


def _outer_unscaled(positions_T: torch.Tensor, inv_freq_P: torch.Tensor) -> torch.Tensor:
    angles = torch.outer(positions_T.float(), inv_freq_P)
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


def _rotate_half(x: torch.Tensor) -> torch.Tensor:
    first, second = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return torch.cat((-second, first), dim=-1)


def _half(x_TNH: torch.Tensor, cos_sin: torch.Tensor) -> torch.Tensor:
    cos, sin = cos_sin.chunk(2, dim=-1)
    cos, sin = torch.cat((cos, cos), dim=-1).unsqueeze(1), torch.cat((sin, sin), dim=-1).unsqueeze(1)
    return (x_TNH.float() * cos + _rotate_half(x_TNH.float()) * sin).to(x_TNH.dtype)


def _half_in_dtype(x_TNH: torch.Tensor, cos_sin: torch.Tensor) -> torch.Tensor:
    cos, sin = cos_sin.to(x_TNH.dtype).chunk(2, dim=-1)
    cos, sin = torch.cat((cos, cos), dim=-1).unsqueeze(1), torch.cat((sin, sin), dim=-1).unsqueeze(1)
    return x_TNH * cos + _rotate_half(x_TNH) * sin


def _two_halves(x_TNH: torch.Tensor, cos_sin: torch.Tensor) -> torch.Tensor:
    cos, sin = cos_sin.unsqueeze(1).chunk(2, dim=-1)
    first, second = x_TNH.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x_TNH.dtype)


def _rotate_every_two(x: torch.Tensor) -> torch.Tensor:
    return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)


def _every_two(x_TNH: torch.Tensor, cos_sin: torch.Tensor) -> torch.Tensor:
    cos, sin = cos_sin.chunk(2, dim=-1)
    cos, sin = cos.repeat_interleave(2, dim=-1).unsqueeze(1), sin.repeat_interleave(2, dim=-1).unsqueeze(1)
    return (x_TNH.float() * cos + _rotate_every_two(x_TNH.float()) * sin).to(x_TNH.dtype)


def _every_two_in_dtype(x_TNH: torch.Tensor, cos_sin: torch.Tensor) -> torch.Tensor:
    cos, sin = cos_sin.to(x_TNH.dtype).chunk(2, dim=-1)
    cos, sin = cos.repeat_interleave(2, dim=-1).unsqueeze(1), sin.repeat_interleave(2, dim=-1).unsqueeze(1)
    return x_TNH * cos + _rotate_every_two(x_TNH) * sin


def _beside(turn: Turn) -> Turn:
    """`turn` of the first dimensions of each head, as many as there are angles; the rest stands beside it."""

    def spelled(x_TNH: torch.Tensor, cos_sin: torch.Tensor) -> torch.Tensor:
        num_turned = cos_sin.shape[-1]
        return torch.cat((turn(x_TNH[..., :num_turned], cos_sin), x_TNH[..., num_turned:]), dim=-1)

    return spelled


def _wide_x_cos_sin(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    return torch.randn(8, 3, 22, dtype=dtype), _x_cos_sin(dtype)[1]


def _cos_sin_shape(positions_T: torch.Tensor, inv_freq_P: torch.Tensor, attention_scaling: float = 1.0) -> torch.Tensor:
    shape = (positions_T.shape[0], 2 * inv_freq_P.shape[0])
    return torch.empty(shape, dtype=torch.float32, device=positions_T.device)


ROPE_COS_SIN = Op(
    name="rope_cos_sin",
    schema="rope_cos_sin(Tensor positions_T, Tensor inv_freq_P, float attention_scaling=1.0) -> Tensor",
    reference=rope_cos_sin,
    fake=_cos_sin_shape,
    spellings=(
        Spelling(name="outer", fn=_outer, example=_positions_inv_freq, attributes={"attention_scaling": 1.2345}),
        Spelling(name="outer_unscaled", fn=_outer_unscaled, example=_positions_inv_freq),
    ),
)
_INTERLEAVED = {"interleaved": True}

ROPE = Op(
    name="rope",
    schema="rope(Tensor x_TNH, Tensor cos_sin, bool interleaved=False) -> Tensor",
    reference=rope,
    fake=like_first,
    spellings=tuple(
        Spelling(name=name, fn=fn, example=example, binds=binds, bound=bound)
        for written, turn, binds, bound in (
            ("half", _half, {}, 0.0),
            ("half_in_dtype", _half_in_dtype, {}, 2.0),
            ("two_halves", _two_halves, {}, 0.0),
            ("every_two", _every_two, _INTERLEAVED, 0.0),
            ("every_two_in_dtype", _every_two_in_dtype, _INTERLEAVED, 2.0),
        )
        for name, fn, example in (
            (f"{written}_of_a_part", _beside(turn), _wide_x_cos_sin),
            (written, turn, _x_cos_sin),
        )
    ),
)
