from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stages.cut import CutDetector, Method, cuts, pieces


def shots(footage: Any, *lengths: int) -> np.ndarray:
    """Frames of shots that move, each of a texture and a tint of its own."""
    tints = [(1.0, 0.4, 0.4), (0.3, 0.5, 1.0), (0.5, 1.0, 0.4), (1.0, 1.0, 1.0), (0.4, 0.4, 0.4)]
    made = [footage.frames(length, seed=at) * np.array(tints[at]) for at, length in enumerate(lengths)]
    return np.concatenate(made).astype(np.uint8)


@pytest.mark.parametrize("method", ["adaptive", "content", "hash"])
def test_cuts_are_found_where_they_are(method: Method, footage: Any) -> None:
    made = footage.video("a.mp4", shots(footage, 30, 40, 25, 30))
    assert cuts(made, CutDetector(method)) == pytest.approx([30 / 24, 70 / 24, 95 / 24])
    assert cuts(footage.video("one.mp4", footage.frames(60)), CutDetector(method)) == []


@pytest.mark.parametrize(
    ("name", "made_as"),
    [
        ("a.mkv", {"codec": "ffv1", "pixel_format": "yuv420p10le"}),
        ("a.mp4", {"rotate": 90}),
        ("a.ts", {}),
        ("a.avi", {"codec": "mpeg4", "rate": 25, "options": {"b": "8000000"}}),
    ],
)
def test_cuts_are_found_in_whatever_can_be_probed(name: str, made_as: dict[str, Any], footage: Any) -> None:
    made = footage.video(name, shots(footage, 30, 30), **made_as)
    assert cuts(made, CutDetector("content")) == pytest.approx([30 / made_as.get("rate", 24)], abs=0.002)


def test_a_cut_of_a_variable_rate_is_at_its_own_timestamp(footage: Any) -> None:
    shown = np.cumsum([0, *np.random.default_rng(0).integers(20, 120, 59)]).tolist()
    made = footage.video("a.mkv", shots(footage, 25, 35), pts=shown)
    assert cuts(made, CutDetector("content")) == pytest.approx([shown[25] / 1000])


def test_cuts_nearer_than_the_least_distance_count_once(footage: Any) -> None:
    frames = shots(footage, 30, 6, 30)
    made = footage.video("a.mp4", frames)
    assert len(cuts(made, CutDetector("hash", min_frames=15))) == 1
    assert len(cuts(made, CutDetector("hash", min_frames=4))) == 2


def test_a_threshold_of_ones_own_is_kept_to(footage: Any) -> None:
    made = footage.video("a.mp4", shots(footage, 30, 30))
    assert cuts(made, CutDetector("content", threshold=250)) == []


def test_pieces_of_a_source_by_hand() -> None:
    found = pieces([1.0, 4.0, 16.0], 41.0)
    assert [(piece.start, piece.end) for piece in found if piece.reason is None] == [
        (1.0, 4.0),
        (4.0, 10.0),
        (10.0, 16.0),
        *[(16.0 + 25 / 3 * at, 16.0 + 25 / 3 * (at + 1)) for at in range(2)],
        (pytest.approx(16.0 + 50 / 3), 41.0),
    ]
    assert [(piece.start, piece.end, piece.reason) for piece in found if piece.reason] == [
        (0.0, 1.0, "too_short: 1.000 s < 2")
    ]


def test_a_split_moves_to_a_keyframe_within_the_bounds() -> None:
    assert [piece.end for piece in pieces([], 12.0, keyframes=[0.0, 5.0, 11.5])] == [5.0, 12.0]
    assert [piece.end for piece in pieces([], 12.0, keyframes=[0.0, 1.5, 11.0])] == [6.0, 12.0]


@pytest.mark.parametrize(("shortest", "longest"), [(2.0, 3.0), (0.0, 10.0), (6.0, 10.0)])
def test_bounds_that_leave_lengths_without_a_split_are_refused(shortest: float, longest: float) -> None:
    with pytest.raises(ValueError, match="expected 0 < 2 x shortest <= longest"):
        pieces([], 100.0, shortest, longest)


SECONDS = st.floats(0.01, 500.0)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(SECONDS, max_size=12), SECONDS, st.lists(SECONDS, max_size=40), st.floats(0.5, 4), st.floats(2, 6))
def test_pieces_tile_a_source_and_keep_to_the_bounds(
    found: list[float], seconds: float, keyframes: list[float], shortest: float, ratio: float
) -> None:
    longest, keys = shortest * ratio, sorted(keyframes)
    made = pieces(found, seconds, shortest, longest, keys)
    edges = [piece.start for piece in made] + [made[-1].end]
    assert edges[0] == 0.0 and edges[-1] == seconds
    assert all(before.end == after.start for before, after in pairwise(made))
    assert {cut for cut in found if cut < seconds} <= set(edges)
    for piece in made:
        if piece.reason is None:
            assert shortest - 1e-9 <= piece.seconds <= longest + 1e-9
        else:
            assert piece.seconds < shortest
            assert {piece.start, piece.end} <= {0.0, seconds, *found}, "only a whole shot is too short"
