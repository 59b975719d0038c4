"""Finds stop strings in text that arrives in pieces, one constant-time step a character (Knuth-Morris-Pratt)."""

from collections.abc import Sequence
from functools import lru_cache


@lru_cache(maxsize=1024)
def _borders(pattern: str) -> tuple[int, ...]:
    """borders[n]: length of the longest proper prefix of `pattern[:n]` that is also its suffix (borders[0] is 0)."""
    borders = [0, 0]
    length = 0
    for character in pattern[1:]:
        while length and pattern[length] != character:
            length = borders[length]
        length += pattern[length] == character
        borders.append(length)
    return tuple(borders)


class StopStringMatcher:
    """Feeds on text piece by piece; the stop string that ends first wins, the longest of those that end together.

    num_held: how many of the last characters may yet turn out to begin a stop string.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [(stop, _borders(stop)) for stop in stops]
        self._matched = [0] * len(self._stops)
        self.num_held = 0

    def feed(self, text: str, *, is_honoured: bool) -> tuple[str, int] | None:
        """The stop string found and the number of characters of `text` up to its end; None when there is none.

        A stop string that ends in this `text` while not `is_honoured` counts as ordinary text.
        """
        for position, character in enumerate(text):
            found = ""
            for index, (stop, borders) in enumerate(self._stops):
                length = self._matched[index]
                while length and stop[length] != character:
                    length = borders[length]
                length += stop[length] == character
                if length == len(stop):
                    if is_honoured and length > len(found):
                        found = stop
                    length = borders[length]
                self._matched[index] = length
            if found:
                return found, position + 1
        self.num_held = max(self._matched, default=0)
        return None
