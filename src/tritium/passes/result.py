"""What a pass returns."""

from dataclasses import dataclass


@dataclass(frozen=True)
class PassResult:
    """num_matches: places that were changed. details: how many by rule, where a pass has several."""

    num_matches: int
    details: tuple[tuple[str, int], ...] = ()
