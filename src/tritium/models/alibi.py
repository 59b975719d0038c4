"""Slopes of attention with linear biases (ALiBi): Press et al. 2022, arXiv:2108.12409."""


def alibi_slopes(num_heads: int) -> tuple[float, ...]:
    """One slope for each head: 2^(-8/n), 2^(-16/n), ... for n heads, n a power of two.

    Other numbers of heads take those of the next lower power of two, then every second one of the next higher.
    """
    lower = 1 << (num_heads.bit_length() - 1)
    slopes = [2.0 ** (-8 * i / lower) for i in range(1, lower + 1)]
    between = [2.0 ** (-4 * i / lower) for i in range(1, 2 * (num_heads - lower), 2)]
    return (*slopes, *between)
