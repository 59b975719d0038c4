"""Which KV block holds which tokens, so that equal prefixes are computed once.

A full block's name is its digest: sha256 over the digest before it and its token ids, from a root that hashes the
cache's fingerprint (weights generation, KV format) and the request's salt. Equal digests mean equal tokens from the
first on, in the same model, for somebody allowed to share. sha256, not Python's hash: a collision would serve a
stranger's cache.
"""

from array import array
from collections.abc import Sequence
from hashlib import sha256
from typing import NamedTuple

from tritium.runtime.request import NULL_BLOCK


class PrefixHit(NamedTuple):
    """`num_blocks` blocks of a prompt are cached; one table per KV group, null where the window does not reach."""

    num_blocks: int
    tables: list[list[int]]


class PrefixCache:
    """Maps digests to blocks, per KV group; owns no block.

    windows: one per group, the keys a query sees at most, 0 for all. In a windowed group a prefix is usable as soon as
    the blocks that the next query can see are there.
    """

    def __init__(self, block_size: int, fingerprint: str, windows: Sequence[int] = (0,)) -> None:
        self._block_size = block_size
        self._windows = tuple(windows)
        self._fingerprint = fingerprint
        self._blocks: list[dict[bytes, int]] = [{} for _ in self._windows]
        self._names: dict[int, tuple[int, bytes]] = {}

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, block: int) -> bool:
        return block in self._names

    def extend(self, digests: list[bytes], token_ids: Sequence[int], salt: str, num_blocks: int) -> None:
        """Append the digests of a sequence's blocks to those already there until there are `num_blocks`."""
        size, first = self._block_size, len(digests)
        parent = digests[-1] if digests else self._root(salt)
        data = array("q", token_ids[first * size : num_blocks * size]).tobytes()
        num_bytes = size * 8
        for start in range(0, (num_blocks - first) * num_bytes, num_bytes):
            parent = sha256(parent + data[start : start + num_bytes]).digest()
            digests.append(parent)

    def lookup(self, digests: Sequence[bytes]) -> PrefixHit:
        """The longest prefix of `digests` that is usable in every group. Takes no reference."""
        longest = len(digests)
        runs = []
        for window, blocks in zip(self._windows, self._blocks, strict=True):
            runs.append(self._runs(blocks, digests[:longest], stop_at_gap=window == 0))
            longest = len(runs[-1]) - 1
        while not all(self._is_usable(w, run, longest) for w, run in zip(self._windows, runs, strict=True)):
            longest -= 1
        return PrefixHit(longest, [self._table(group, digests[:longest]) for group in range(len(self._windows))])

    def publish(self, group: int, digest: bytes, block: int) -> bool:
        """Name a full, computed block. False when another block has that name: the first one published keeps it."""
        if self._blocks[group].setdefault(digest, block) != block:
            return False
        self._names[block] = (group, digest)
        return True

    def forget(self, block: int) -> None:
        """Its content is about to be overwritten, or not to be trusted."""
        group, digest = self._names.pop(block)
        del self._blocks[group][digest]

    def withdraw(self, digests: Sequence[bytes]) -> list[int]:
        """Forget whatever these digests name, in all groups; returns the blocks."""
        found = [blocks[digest] for blocks in self._blocks for digest in digests if digest in blocks]
        for block in found:
            self.forget(block)
        return found

    def clear(self, fingerprint: str | None = None) -> None:
        """Forget everything; from now on names start from `fingerprint`, when one is given."""
        for blocks in self._blocks:
            blocks.clear()
        self._names.clear()
        if fingerprint is not None:
            self._fingerprint = fingerprint

    def _root(self, salt: str) -> bytes:
        return sha256(repr((self._fingerprint, self._block_size, salt)).encode("utf-8", "surrogatepass")).digest()

    def _first_visible(self, window: int, num_blocks: int) -> int:
        """The first block that the query after `num_blocks` blocks can see."""
        return max(0, num_blocks * self._block_size - window + 1) // self._block_size if window else 0

    def _is_usable(self, window: int, run: Sequence[int], num_blocks: int) -> bool:
        return run[num_blocks] >= num_blocks - self._first_visible(window, num_blocks)

    def _runs(self, blocks: dict[bytes, int], digests: Sequence[bytes], *, stop_at_gap: bool) -> list[int]:
        """runs[n]: how many cached blocks end, without a gap, at the n-th."""
        runs = [0]
        for digest in digests:
            is_cached = digest in blocks
            if stop_at_gap and not is_cached:
                break
            runs.append(runs[-1] + 1 if is_cached else 0)
        return runs

    def _table(self, group: int, digests: Sequence[bytes]) -> list[int]:
        first = self._first_visible(self._windows[group], len(digests))
        blocks = self._blocks[group]
        return [NULL_BLOCK] * first + [blocks[digest] for digest in digests[first:]]
