"""The prefix cache against a model that remembers whole prefixes instead of digests."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tritium.runtime.prefix_cache import PrefixCache


def digests_of(cache, token_ids, num_blocks, salt=""):
    digests = []
    cache.extend(digests, token_ids, salt, num_blocks)
    return digests


def test_a_digest_depends_on_every_token_before_it_on_salt_fingerprint_and_block_size():
    base = digests_of(PrefixCache(2, "w0"), [1, 2, 3, 4], 2)
    assert base == digests_of(PrefixCache(2, "w0"), [1, 2, 3, 4, 9], 2)
    others = [
        digests_of(PrefixCache(2, "w0"), [7, 2, 3, 4], 2),
        digests_of(PrefixCache(2, "w0"), [1, 2, 3, 4], 2, salt="tenant"),
        digests_of(PrefixCache(2, "w1"), [1, 2, 3, 4], 2),
        digests_of(PrefixCache(4, "w0"), [1, 2, 3, 4], 1) * 2,
    ]
    last = [digests[-1] for digests in (base, *others)]
    assert len(set(last)) == len(last)
    assert digests_of(PrefixCache(2, "w0"), [1, 2, 7, 4], 2)[0] == base[0]


def test_salt_and_fingerprint_cannot_be_shifted_into_each_other():
    assert digests_of(PrefixCache(2, "ab"), [1, 2], 1, salt="c") != digests_of(
        PrefixCache(2, "a"), [1, 2], 1, salt="bc"
    )
    assert digests_of(PrefixCache(2, "x"), [1, 2], 1, salt="\ud800") != digests_of(PrefixCache(2, "x"), [1, 2], 1)


def test_digests_grow_a_block_at_a_time_to_what_they_are_at_once():
    cache, tokens, digests = PrefixCache(2, ""), [5, 6, 7, 8, 9, 10], []
    for num_blocks in (1, 2, 2, 3):
        cache.extend(digests, tokens, "s", num_blocks)
    assert digests == digests_of(cache, tokens, 3, salt="s")


def test_the_first_published_block_keeps_the_name_until_it_is_forgotten():
    cache = PrefixCache(2, "")
    (digest,) = digests_of(cache, [1, 2], 1)
    assert cache.publish(0, digest, 5) and not cache.publish(0, digest, 6)
    assert cache.lookup([digest]).tables == [[5]] and 6 not in cache
    cache.forget(5)
    assert cache.lookup([digest]).num_blocks == 0
    assert cache.publish(0, digest, 6)


def test_a_windowed_group_needs_only_the_blocks_inside_its_window():
    cache = PrefixCache(2, "", windows=(0, 3))
    digests = digests_of(cache, list(range(8)), 4)
    for index in range(4):
        cache.publish(0, digests[index], 10 + index)
    cache.publish(1, digests[3], 23)
    hit = cache.lookup(digests)  # the query at position 8 sees keys 6, 7 and 8: block 3
    assert hit.num_blocks == 4
    assert hit.tables == [[10, 11, 12, 13], [0, 0, 0, 23]]
    assert cache.lookup(digests[:3]).num_blocks == 0


def test_a_hit_is_the_longest_prefix_that_all_groups_can_use():
    cache = PrefixCache(1, "", windows=(0, 2))
    digests = digests_of(cache, list(range(6)), 6)
    for index in (0, 1, 2, 3):
        cache.publish(0, digests[index], 10 + index)
    for index in (1, 5):
        cache.publish(1, digests[index], 20 + index)
    assert cache.lookup(digests) == (2, [[10, 11], [0, 21]])


BLOCK = 2


class PrefixCacheMachine(RuleBasedStateMachine):
    """Publishes and forgets blocks at random; every lookup is compared with a search over whole prefixes."""

    @initialize(windows=st.sampled_from([(0,), (3,), (0, 3), (4, 0, 2), (1, 5)]))
    def start(self, windows):
        self.windows = windows
        self.fingerprint = 0
        self.cache = PrefixCache(BLOCK, "0", windows)
        self.names = {}  # (group, salt, tokens of the whole prefix) -> block
        self.next_block = 1

    tokens = st.lists(st.integers(0, 1), min_size=0, max_size=10)
    salts = st.sampled_from(["", "a"])

    @rule(tokens=tokens, salt=salts, data=st.data())
    def publish(self, tokens, salt, data):
        digests = digests_of(self.cache, tokens, len(tokens) // BLOCK, salt)
        for index, digest in enumerate(digests):
            for group in range(len(self.windows)):
                if data.draw(st.booleans()):
                    name = (group, salt, tuple(tokens[: (index + 1) * BLOCK]))
                    assert self.cache.publish(group, digest, self.next_block) == (name not in self.names)
                    self.names.setdefault(name, self.next_block)
                    self.next_block += 1

    @precondition(lambda self: self.names)
    @rule(data=st.data())
    def forget(self, data):
        name = data.draw(st.sampled_from(sorted(self.names)))
        self.cache.forget(self.names.pop(name))

    @rule(tokens=tokens, salt=salts)
    def withdraw(self, tokens, salt):
        digests = digests_of(self.cache, tokens, len(tokens) // BLOCK, salt)
        names = [
            (group, salt, tuple(tokens[: (index + 1) * BLOCK]))
            for group in range(len(self.windows))
            for index in range(len(digests))
        ]
        assert self.cache.withdraw(digests) == [self.names.pop(name) for name in names if name in self.names]

    @rule(is_refit=st.booleans())
    def clear(self, is_refit):
        self.fingerprint += is_refit
        self.cache.clear(str(self.fingerprint) if is_refit else None)
        self.names.clear()

    @rule(tokens=tokens, salt=salts)
    def lookup(self, tokens, salt):
        digests = digests_of(self.cache, tokens, len(tokens) // BLOCK, salt)
        hit = self.cache.lookup(digests)
        assert hit.num_blocks == max(n for n in range(len(digests) + 1) if self.is_usable(tokens, salt, n))
        for group, table in enumerate(hit.tables):
            visible = self.visible_blocks(group, hit.num_blocks)
            assert table == [
                self.names[group, salt, tuple(tokens[: (i + 1) * BLOCK])] if i in visible else 0
                for i in range(hit.num_blocks)
            ]

    def visible_blocks(self, group, num_blocks):
        position, window = num_blocks * BLOCK, self.windows[group]
        return {key // BLOCK for key in range(position) if not window or key > position - window}

    def is_usable(self, tokens, salt, num_blocks):
        return all(
            (group, salt, tuple(tokens[: (index + 1) * BLOCK])) in self.names
            for group in range(len(self.windows))
            for index in self.visible_blocks(group, num_blocks)
        )

    @invariant()
    def every_named_block_is_known(self):
        if hasattr(self, "cache"):
            assert len(self.cache) == len(self.names)
            assert all(block in self.cache for block in self.names.values())


TestPrefixCacheMachine = PrefixCacheMachine.TestCase
TestPrefixCacheMachine.settings = settings(max_examples=60, stateful_step_count=20, deadline=None)


def test_forgetting_a_block_that_has_no_name_is_an_error():
    with pytest.raises(KeyError):
        PrefixCache(2, "").forget(3)
