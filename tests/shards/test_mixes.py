"""Mixes of row groups: compared with plain indexing."""

import numpy as np
import pytest

from pipeline.shards.layout import Layout
from pipeline.shards.mixes import Mix, joined


@pytest.mark.parametrize(("channels", "size"), [(1, 4), (3, 4), (3, 8), (5, 16)])
def test_a_mix_is_its_row_groups_one_after_the_other_in_the_order_that_was_asked_for(channels, size):
    """Would catch: rows at the wrong place, a part of a row that is left out, the rows outside of low … high."""
    numbers = np.random.default_rng(channels * size)
    layout = Layout(size, channels, {1: 4.0, 2: 4.0}, "haar")
    sizes, parts = [5, 7, 1], [(0, 5), (2, 6), (0, 1)]
    groups = []
    for rows in sizes:
        levels = {
            level: numbers.integers(-99, 99, (rows, *layout.shape(level))).astype(layout.dtype(level))
            for level in layout.steps
        }
        groups.append((numbers.integers(0, 10**12, rows), numbers.integers(-1, 9, rows).astype(np.int32), levels))
    count = sum(high - low for low, high in parts)
    order = numbers.permutation(count)
    mix = Mix(layout, list(layout.steps), order)
    for first, number in ((9, 2), (5, 1), (0, 0)):  # in any order
        mix.put(first, groups[number], *parts[number])

    def expected(pick):
        return np.concatenate([pick(group)[low:high] for group, (low, high) in zip(groups, parts, strict=True)])[order]

    assert np.array_equal(mix.content[0], expected(lambda group: group[0]))
    assert np.array_equal(mix.content[1], expected(lambda group: group[1]))
    for level in layout.steps:
        whole = expected(lambda group, level=level: group[2][level])
        assert mix.content[2][level].dtype == layout.dtype(level)
        assert np.array_equal(mix.content[2][level], whole)
        assert np.array_equal(joined([(mix, 2, 7, 1.0)], level), whole[2:7])
        several = [(mix, 8, 10, 1.0), (mix, 0, 3, 1.0), (mix, 9, 10, 0.0)]
        assert np.array_equal(joined(several, level), whole[[8, 9, 0, 1, 2, 9]])


def test_a_batch_within_a_mix_is_not_copied_and_one_over_two_is():
    layout = Layout(4, 1, {1: 1.0}, "haar")
    mix = Mix(layout, [1], np.arange(6))
    assert np.shares_memory(joined([(mix, 1, 4, 1.0)], 1), mix.content[2][1])
    assert not np.shares_memory(joined([(mix, 5, 6, 1.0), (mix, 0, 1, 1.0)], 1), mix.content[2][1])
