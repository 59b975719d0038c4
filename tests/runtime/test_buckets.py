"""Buckets: at least as many rows as asked, never many more, always a multiple."""

from hypothesis import given
from hypothesis import strategies as st

from tritium.runtime.buckets import bucket, common_multiple


@given(st.integers(0, 10_000), st.sampled_from([1, 2, 4, 8]))
def test_a_bucket_holds_the_rows_and_wastes_little(count, multiple):
    size = bucket(count, multiple)
    assert size >= max(1, count)
    assert size % multiple == 0
    assert size - max(1, count) < (1 if count <= 64 else 16 if count <= 512 else 64) + multiple
    assert bucket(size, multiple) == size


@given(st.integers(0, 5000), st.integers(0, 5000), st.sampled_from([1, 2, 4]))
def test_more_rows_never_get_a_smaller_bucket(a, b, multiple):
    small, large = sorted((a, b))
    assert bucket(small, multiple) <= bucket(large, multiple)


def test_there_are_few_buckets():
    assert len({bucket(n) for n in range(1, 2049)}) == 64 + 28 + 24


def test_the_multiple_of_a_phase_suits_all_its_kernels():
    assert common_multiple([1, 2, 4]) == 4
    assert common_multiple([]) == 1
