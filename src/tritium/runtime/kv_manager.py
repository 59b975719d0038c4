"""Gives KV blocks to requests and takes them back: pool and prefix cache behind the verbs the scheduler thinks in.

A KV group is a set of layers that see equally far back (`window` keys, 0 for all). A request has one block table per
group, all of the same length; every group's blocks have the same byte size and come from one pool.
"""

from collections.abc import Sequence
from itertools import chain

from tritium.runtime.block_pool import BlockPool
from tritium.runtime.prefix_cache import PrefixCache, PrefixHit
from tritium.runtime.request import NULL_BLOCK, Request


class KVManager:
    """The only writer of a request's block tables and of the pool."""

    def __init__(
        self, *, num_blocks: int, block_size: int, windows: Sequence[int], fingerprint: str, enable_prefix_caching: bool
    ) -> None:
        self.block_size = block_size
        self.windows = tuple(windows)
        self.cache = PrefixCache(block_size, fingerprint, self.windows)
        self.pool = BlockPool(num_blocks, on_evict=self.cache.forget)
        self._enable_prefix_caching = enable_prefix_caching

    def peak_blocks(self, num_tokens: int, chunk: int) -> int:
        """The most blocks a request holds at once while `num_tokens` are computed in chunks of at most `chunk`."""
        size = self.block_size
        full = -(-num_tokens // size)
        # n positions touch at most (n + size - 2) // size + 1 blocks; a chunk also sees the window - 1 keys before it
        return sum(min(full, (w + chunk + size - 3) // size + 1) if w else full for w in self.windows)

    def lookup(self, request: Request) -> PrefixHit:
        """What the cache holds of this request's tokens, but for those computed in any case: at least the last."""
        if not self._enable_prefix_caching:
            return PrefixHit(0, [[] for _ in self.windows])
        num_blocks = request.num_reusable_tokens // self.block_size
        self.cache.extend(request.block_digests, request.token_ids, request.cache_salt, num_blocks)
        return self.cache.lookup(request.block_digests[:num_blocks])

    def num_shared(self, hit: PrefixHit) -> int:
        """Blocks of the hit that others use now: taking them costs no free block."""
        return sum(map(self.pool.is_used, chain.from_iterable(hit.tables)))

    def open(self, request: Request, hit: PrefixHit) -> None:
        """Give a request without blocks the ones of its hit."""
        for table in hit.tables:
            self.pool.share(table)
        request.block_tables = hit.tables
        request.num_held_blocks = sum(block != NULL_BLOCK for block in chain.from_iterable(hit.tables))
        request.num_slots = request.num_computed_tokens = hit.num_blocks * self.block_size
        request.num_published_blocks = hit.num_blocks
        request.can_publish = self._enable_prefix_caching

    def reach(self, request: Request, num_blocks: int) -> int:
        """How many tokens of the request could be in the cache if it took `num_blocks` more blocks."""
        return request.num_slots + num_blocks // len(self.windows) * self.block_size

    def missing_blocks(self, request: Request, num_tokens: int) -> int:
        """Blocks to allocate before the first `num_tokens` tokens have their slots."""
        return max(0, -(-(num_tokens - request.num_slots) // self.block_size)) * len(self.windows)

    def grow(self, request: Request, num_tokens: int) -> None:
        """Allocate slots for the first `num_tokens` tokens; `missing_blocks` of them must be free."""
        per_group = self.missing_blocks(request, num_tokens) // len(self.windows)
        for table in request.block_tables:
            table.extend(self.pool.allocate(per_group))
        request.num_held_blocks += per_group * len(self.windows)
        request.num_slots += per_group * self.block_size

    def trim(self, request: Request) -> None:
        """Free the blocks that no token from `num_computed_tokens` on can see."""
        for window, table in zip(self.windows, request.block_tables, strict=True):
            if not window:
                continue
            index = max(0, request.num_computed_tokens - window + 1) // self.block_size - 1
            behind = []
            while index >= 0 and table[index] != NULL_BLOCK:  # what is before a null block is null
                behind.append(table[index])
                table[index] = NULL_BLOCK
                index -= 1
            self.pool.release(behind)
            request.num_held_blocks -= len(behind)

    def publish(self, request: Request) -> None:
        """Name the blocks that have become full and computed, so that others can hit them."""
        if not request.can_publish:
            return
        num_full = request.num_computed_tokens // self.block_size
        if num_full <= request.num_published_blocks:
            return
        digests = request.block_digests
        self.cache.extend(digests, request.token_ids, request.cache_salt, num_full)
        for group, table in enumerate(request.block_tables):
            for index in range(request.num_published_blocks, num_full):
                if self.cache.publish(group, digests[index], table[index]):
                    self.pool.keep(table[index])
        request.num_published_blocks = num_full

    def close(self, request: Request) -> None:
        """Take all blocks back. The last of each chain is freed first, so that it is also evicted first."""
        for blocks in zip(*(reversed(table) for table in request.block_tables), strict=True):
            self.pool.release(blocks)
        request.block_tables = []
        request.num_held_blocks = request.num_slots = request.num_computed_tokens = request.num_published_blocks = 0

    def distrust(self, request: Request) -> None:
        """Something went wrong while it was computed: no block that it used or published is hit again."""
        for block in self.cache.withdraw(request.block_digests):
            self.pool.unkeep(block)

    def forget_all(self, fingerprint: str | None) -> None:
        """Empty the prefix cache; see `Scheduler.reset_prefix_cache`."""
        self.cache.clear(fingerprint)
        self.pool.keep_none()
