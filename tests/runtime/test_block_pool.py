"""The block pool against a model that keeps plain sets and counts."""

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tritium.errors import ConfigError
from tritium.runtime.block_pool import BlockPool


def test_the_null_block_is_never_handed_out_and_never_counted():
    pool = BlockPool(5)
    assert sorted(pool.allocate(4)) == [1, 2, 3, 4]
    pool.share([0, 0])
    pool.release([0])
    assert (pool.num_used, pool.num_free) == (4, 0)


def test_a_pool_of_only_the_null_block_is_refused():
    with pytest.raises(ConfigError, match=r"num_blocks must be at least 2 .* not 1"):
        BlockPool(1)


def test_more_blocks_than_are_free_are_refused_and_nothing_is_taken():
    pool = BlockPool(4)
    pool.allocate(2)
    with pytest.raises(RuntimeError, match="2 blocks were asked for with 1 free"):
        pool.allocate(2)
    assert pool.num_free == 1
    pool.check()


def test_a_block_released_twice_is_an_error_that_names_it():
    pool = BlockPool(4)
    (block,) = pool.allocate(1)
    pool.release([block])
    with pytest.raises(RuntimeError, match=f"block {block} was released more often"):
        pool.release([block])


def test_a_free_block_cannot_be_kept_and_a_blank_one_cannot_be_shared():
    pool = BlockPool(4)
    with pytest.raises(RuntimeError, match="block 2 is free"):
        pool.keep(2)
    with pytest.raises(KeyError):
        pool.share([2])


def test_blank_blocks_go_first_then_kept_ones_the_longest_unused_first():
    evicted = []
    pool = BlockPool(6, on_evict=evicted.append)
    a, b, c, d, _ = pool.allocate(5)
    for block in (a, b, c):
        pool.keep(block)
    pool.release([b, a, d, c])
    assert pool.allocate(1) == [d]
    pool.share([b])  # a hit makes it the newest again
    pool.release([b])
    assert pool.allocate(3) == [a, c, b] == evicted


def test_a_lost_block_is_noticed():
    pool = BlockPool(4)
    pool._blank.pop()
    with pytest.raises(RuntimeError, match=r"2 blank \+ 0 kept \+ 0 used are not 3"):
        pool.check()


class BlockPoolMachine(RuleBasedStateMachine):
    """Random owners take, share and drop blocks; the model knows who holds what and the order of eviction."""

    @initialize(num_blocks=st.integers(2, 9))
    def start(self, num_blocks):
        self.evicted = []
        self.pool = BlockPool(num_blocks, on_evict=self.evicted.append)
        self.references = Counter()
        self.kept = set()  # blocks whose content is worth something
        self.order = []  # of those, the free ones, the longest unused first
        self.total = num_blocks - 1

    @rule(count=st.integers(0, 4))
    def allocate(self, count):
        if count > self.pool.num_free:
            with pytest.raises(RuntimeError):
                self.pool.allocate(count)
            return
        num_blank = self.pool.num_free - len(self.order)
        num_evicted = max(0, count - num_blank)
        expected, self.order = self.order[:num_evicted], self.order[num_evicted:]
        self.evicted.clear()
        blocks = self.pool.allocate(count)
        assert self.evicted == expected
        assert len(set(blocks)) == count and 0 not in blocks
        assert not any(self.references[block] for block in blocks)
        self.kept -= set(blocks)
        self.references.update(blocks)

    @precondition(lambda self: +self.references or self.order)
    @rule(data=st.data())
    def share(self, data):
        block = data.draw(st.sampled_from(sorted(set(+self.references) | set(self.order))))
        self.pool.share([0, block])
        self.references[block] += 1
        if block in self.order:
            self.order.remove(block)

    @precondition(lambda self: +self.references)
    @rule(data=st.data())
    def release(self, data):
        blocks = data.draw(st.lists(st.sampled_from(sorted(+self.references)), unique=True))
        self.pool.release([*blocks, 0])
        self.references.subtract(blocks)
        self.order += [block for block in blocks if not self.references[block] and block in self.kept]

    @precondition(lambda self: +self.references)
    @rule(data=st.data())
    def keep(self, data):
        block = data.draw(st.sampled_from(sorted(+self.references)))
        self.pool.keep(block)
        self.kept.add(block)

    @precondition(lambda self: +self.references or self.order)
    @rule(data=st.data())
    def unkeep(self, data):
        block = data.draw(st.sampled_from(sorted(set(+self.references) | set(self.order))))
        self.pool.unkeep(block)
        self.kept.discard(block)
        if block in self.order:
            self.order.remove(block)

    @rule()
    def keep_none(self):
        self.pool.keep_none()
        self.kept.clear()
        self.order.clear()

    @invariant()
    def counts_agree(self):
        if hasattr(self, "pool"):
            self.pool.check()
            used = set(+self.references)
            assert self.pool.num_used == len(used)
            assert self.pool.num_free == self.total - len(used)
            assert {block for block in range(self.total + 1) if self.pool.is_used(block)} == used


TestBlockPoolMachine = BlockPoolMachine.TestCase
TestBlockPoolMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
