"""New weights for a running executor, bound piece by piece beside the ones in use.

Bound steps hold the addresses of their weights, and a packed weight may be any object a kernel likes. So new weights
are not written over the old ones: every step is bound a second time, to new storage, and the executor then exchanges
the whole set. An error on the way changes nothing; the price is memory for both sets until the exchange.
"""

from collections.abc import Callable, Sequence

from tritium.kernels.kernel import Thunk
from tritium.runtime.binding import Binder

Piece = Callable[[], Thunk]


class StagedWeights:
    """A binder with new weights, and the steps of the smallest batch bound by it: all weights are made and packed."""

    def __init__(self, binder: Binder, pieces: Sequence[Piece]) -> None:
        """pieces: one per step of the plan, in order; each binds its step by `binder`."""
        self.binder = binder
        self.thunks: list[Thunk] = []
        self._pieces = iter(pieces)

    def advance(self) -> bool:
        """Bind one more step, on the engine thread; False when all are."""
        piece = next(self._pieces, None)
        if piece is not None:
            self.thunks.append(piece())
        return piece is not None
