"""Who owns which KV block: reference counts and the order in which free blocks are taken again.

Every block but the null block is in exactly one of three places: used (reference count above 0), blank (free, content
worthless) or kept (free, content may still be hit by the prefix cache). Blank blocks are taken first, then kept ones,
the longest unused first. The pool knows nothing of tokens.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable

from tritium.errors import ConfigError
from tritium.runtime.request import NULL_BLOCK


class BlockPool:
    """Blocks 1..num_blocks-1; block 0 is the null block, which nobody owns.

    on_evict: called with a kept block at the moment its content is given up, before it is handed out again.
    """

    def __init__(self, num_blocks: int, on_evict: Callable[[int], None] = lambda block: None) -> None:
        if num_blocks < 2:
            raise ConfigError(f"num_blocks must be at least 2 (one is the null block), not {num_blocks}")
        self.num_usable = num_blocks - 1
        self.num_used = 0
        self._on_evict = on_evict
        self._references = [0] * num_blocks
        self._is_kept = bytearray(num_blocks)
        self._blank = list(range(num_blocks - 1, NULL_BLOCK, -1))
        self._kept: OrderedDict[int, None] = OrderedDict()

    @property
    def num_free(self) -> int:
        """Blocks that `allocate` can hand out: blank ones and kept ones."""
        return self.num_usable - self.num_used

    def is_used(self, block: int) -> bool:
        """True while somebody holds a reference."""
        return self._references[block] > 0

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks (at most `num_free`), one reference each. Their old content is given up."""
        if count > self.num_free:
            raise RuntimeError(
                f"{count} blocks were asked for with {self.num_free} free: the scheduler must check first"
            )
        blocks = [self._blank.pop() if self._blank else self._evict() for _ in range(count)]
        for block in blocks:
            self._references[block] = 1
        self.num_used += count
        return blocks

    def share(self, blocks: Iterable[int]) -> None:
        """Add a reference to each block, used or kept; null blocks are passed over."""
        for block in blocks:
            if block == NULL_BLOCK:
                continue
            if self._references[block] == 0:
                del self._kept[block]  # KeyError: a blank block holds nothing to share
                self.num_used += 1
            self._references[block] += 1

    def release(self, blocks: Iterable[int]) -> None:
        """Drop a reference of each block, in this order; one that nobody holds is free, kept ones newest last."""
        for block in blocks:
            if block == NULL_BLOCK:
                continue
            count = self._references[block] - 1
            if count < 0:
                raise RuntimeError(f"block {block} was released more often than it was taken")
            self._references[block] = count
            if count == 0:
                self.num_used -= 1
                if self._is_kept[block]:
                    self._kept[block] = None
                else:
                    self._blank.append(block)

    def keep(self, block: int) -> None:
        """From now on the content of this used block is worth keeping when it becomes free."""
        if self._references[block] == 0:
            raise RuntimeError(f"block {block} is free: only a used block's content can be declared worth keeping")
        self._is_kept[block] = 1

    def unkeep(self, block: int) -> None:
        """Its content, used or kept, is worthless after all. Does not call `on_evict`."""
        self._is_kept[block] = 0
        if block in self._kept:
            del self._kept[block]
            self._blank.append(block)

    def keep_none(self) -> None:
        """Declare the content of every block worthless, used ones' too. Does not call `on_evict`."""
        self._is_kept = bytearray(len(self._references))
        self._blank.extend(self._kept)
        self._kept.clear()

    def check(self) -> None:
        """Raise unless free + used = total. Costs 0.2 µs: done every step."""
        if len(self._blank) + len(self._kept) + self.num_used != self.num_usable:
            raise RuntimeError(
                f"KV blocks were lost or found: {len(self._blank)} blank + {len(self._kept)} kept + "
                f"{self.num_used} used are not {self.num_usable}"
            )

    def _evict(self) -> int:
        block, _ = self._kept.popitem(last=False)
        self._is_kept[block] = 0
        self._on_evict(block)
        return block
