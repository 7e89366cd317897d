from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.errors import UserError
from pipelines.caps import Values, apply_caps
from pipelines.rules import Cap


def values(*rows: object) -> Values:
    found = Values()
    for row in rows:
        found.append(row)
    return found


def test_the_best_of_each_value_stay():
    kinds = values("a", "a", "b", "a", None, "b", "b")
    stay, said = apply_caps(np.arange(7), [Cap(by="kind", most=2)], [kinds])
    assert stay.tolist() == [0, 1, 2, 4, 5]
    assert said[0]["removed"] == 2
    assert said[0]["values"] == [{"value": "a", "before": 3, "after": 2}, {"value": "b", "before": 3, "after": 2}]


def test_a_list_counts_by_its_items_and_caps_hold_together():
    tags = values(["x", "y"], ["y"], ["x"], ["z"], ["z"], [])
    model = values("m", "m", "n", "m", "n", "m")
    stay, said = apply_caps(np.arange(6), [Cap(by="tags", most=1), Cap(by="model", most=2)], [tags, model])
    # 1 and 2: y and x are full. 3 goes in as the second m. 4: z is full. 5 has no tag, but m is full.
    assert stay.tolist() == [0, 3]
    assert [cap["removed"] for cap in said] == [3, 1]


def test_rows_come_in_the_order_of_their_quality():
    stay, _ = apply_caps(np.array([3, 0, 2, 1]), [Cap(by="kind", most=1)], [values("a", "a", "a", "b")])
    assert stay.tolist() == [3, 0]


def test_a_share_is_one_of_what_stays():
    # 8 a, 1 b, 1 c: half of ten would be five a, but then they are five of seven. Two of four are half.
    kinds = values(*"aaaaaaaabc")
    stay, said = apply_caps(np.arange(10), [Cap(by="kind", share=0.5)], [kinds])
    assert len(stay) == 4
    assert said[0]["most"] == 2


def test_a_share_that_nothing_can_hold_is_refused():
    with pytest.raises(UserError, match=r"cap: kind: no selection of these 4 samples has at most 0.3 of it"):
        apply_caps(np.arange(4), [Cap(by="kind", share=0.3)], [values(*"aabb")])


def test_a_share_holds_of_samples_that_have_no_value():
    nothing = values(*[None] * 10)
    stay, said = apply_caps(np.arange(10), [Cap(by="kind", share=0.05)], [nothing])
    assert (len(stay), said[0]["removed"], said[0]["values"]) == (10, 0, [])
    # The only sample with a value is not among the rows.
    stay, _ = apply_caps(np.arange(1), [Cap(by="kind", share=0.05)], [values(None, "a")])
    assert stay.tolist() == [0]
    with pytest.raises(UserError, match=r"at most 0\.05 of it"):
        apply_caps(np.arange(10), [Cap(by="kind", share=0.05)], [values("a", *[None] * 9)])


@given(st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=200), st.sampled_from([0.25, 0.29, 0.4, 0.5]))
def test_a_share_takes_as_many_as_can_be(kinds, share):
    counts = [kinds.count(kind) for kind in set(kinds)]
    sizes = {sum(min(count, limit) for count in counts): limit for limit in range(1, len(kinds) + 1)}
    possible = [size for size, limit in sizes.items() if min(limit, max(counts)) <= share * size + 1e-9]
    try:
        stay, _ = apply_caps(np.arange(len(kinds)), [Cap(by="kind", share=share)], [values(*kinds)])
    except UserError:
        assert not possible
    else:
        assert len(stay) == max(possible)
