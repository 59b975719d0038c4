"""Rotary frequencies of each RoPE type. P = dim / 2 pairs of dimensions.

Formulas as in transformers' `modeling_rope_utils.py` (v5), evaluated in the same order in float32, so that they agree
to the last bit. Sources: default Su et al. 2021 (RoFormer, arXiv:2104.09864); linear Chen et al. 2023 (Position
Interpolation, arXiv:2306.15595); dynamic NTK Reddit users u/bloc97 and u/emozilla 2023; yarn Peng et al. 2023
(arXiv:2309.00071); llama3 Meta's Llama 3.1 release; longrope Ding et al. 2024 (arXiv:2402.13753).
"""

import math

import torch
from torch import Tensor

from tritium.models.rope_config import RopeConfig


def rope_frequencies(rope: RopeConfig, max_model_len: int) -> tuple[Tensor, float]:
    """Inverse frequencies, float32 [P], and the factor that cos and sin are multiplied by.

    max_model_len matters to "longrope", which has one set of factors for sequences up to
    original_max_position_embeddings and another for longer ones, and to "dynamic". The latter is defined to change its
    base with the length of the sequence:

        base' = base · (factor · L / M - (factor - 1)) ^ (dim / (dim - 2)),

    with L = max(length, M) and M = max_position_embeddings. Keys cached under an older base would be wrong, so L is
    frozen here at max_model_len. Results equal transformers' for sequences of that length (and, when max_model_len <=
    M, for all up to M), and a token's numbers never depend on how long its sequence will become. In the same way the
    factors of longrope are those for max_model_len, and results equal transformers' where it takes the same ones.
    """
    steps = torch.arange(0, rope.dim, 2, dtype=torch.int64, device="cpu").to(torch.float32) / rope.dim
    if rope.type == "dynamic":
        return 1.0 / (_dynamic_base(rope, max_model_len) ** steps), 1.0
    if rope.type == "longrope":
        is_long = max_model_len > rope.original_max_position_embeddings
        factors = torch.tensor(rope.long_factors if is_long else rope.short_factors, dtype=torch.float32, device="cpu")
        return 1.0 / (factors * rope.theta**steps), _longrope_attention_factor(rope)
    inv_freq = 1.0 / (rope.theta**steps)
    if rope.type == "linear":
        return inv_freq / rope.factor, 1.0
    if rope.type == "llama3":
        return _llama3(rope, inv_freq), 1.0
    if rope.type == "yarn":
        return _yarn(rope, rope.theta**steps), _yarn_attention_factor(rope)
    return inv_freq, 1.0


def _dynamic_base(rope: RopeConfig, max_model_len: int) -> float:
    longest = max(max_model_len, rope.max_position_embeddings)
    stretch = rope.factor * longest / rope.max_position_embeddings - (rope.factor - 1)
    return rope.theta * stretch ** (rope.dim / (rope.dim - 2))


def _llama3(rope: RopeConfig, inv_freq: Tensor) -> Tensor:
    """Long wavelengths are divided by factor, short ones kept, those between blended."""
    length, low, high = rope.original_max_position_embeddings, rope.low_freq_factor, rope.high_freq_factor
    wavelength = 2 * math.pi / inv_freq
    scaled = torch.where(wavelength > length / low, inv_freq / rope.factor, inv_freq)
    smooth = (length / wavelength - low) / (high - low)
    blended = (1 - smooth) * scaled / rope.factor + smooth * scaled
    is_between = ~(wavelength < length / high) & ~(wavelength > length / low)
    return torch.where(is_between, blended, scaled)


def _yarn(rope: RopeConfig, pos_freqs: Tensor) -> Tensor:
    """Dimensions that turn often in the original length are kept, seldom turning ones interpolated, a ramp between."""

    def border(rotations: float) -> float:
        turns = rope.original_max_position_embeddings / (rotations * 2 * math.pi)
        return rope.dim * math.log(turns) / (2 * math.log(rope.theta))

    low, high = border(rope.beta_fast), border(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    high = high + 0.001 if low == high else high
    ramp = torch.clamp((torch.arange(rope.dim // 2, dtype=torch.float32, device="cpu") - low) / (high - low), 0, 1)
    kept = 1 - ramp
    return 1.0 / (rope.factor * pos_freqs) * (1 - kept) + 1.0 / pos_freqs * kept


def _yarn_attention_factor(rope: RopeConfig) -> float:
    """Given, or 0.1 · mscale · ln(factor) + 1, or the ratio of two of these (DeepSeek's mscale / mscale_all_dim)."""

    def mscale(weight: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * weight * math.log(rope.factor) + 1.0

    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return mscale(rope.mscale) / mscale(rope.mscale_all_dim)
    return mscale(1.0)


def _longrope_attention_factor(rope: RopeConfig) -> float:
    """Given, or sqrt(1 + ln(factor) / ln(original length)): the entropy of attention over more tokens stays."""
    if rope.attention_factor is not None:
        return rope.attention_factor
    return (
        1.0
        if rope.factor <= 1
        else math.sqrt(1 + math.log(rope.factor) / math.log(rope.original_max_position_embeddings))
    )
