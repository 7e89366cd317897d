"""Near-duplicates and topics by an embedding: of a user's own code, and of a vision tower."""

from __future__ import annotations

import numpy as np
import pytest

from infra.errors import UserError
from infra.storage import Storage
from models.source import content_sha256, resolve
from pipelines import signatures
from pipelines.release import release
from tests.pipelines.rendered import brighter, names, rules, sample_id, scenes, store


def colour(frames: np.ndarray) -> np.ndarray:
    """An embedding: the mean colour."""
    return frames.reshape(len(frames), -1, 3).mean(axis=1) + 1.0


@pytest.fixture
def own_code(monkeypatch: pytest.MonkeyPatch) -> str:
    import sys
    import types

    module = types.ModuleType("own_embedding")
    module.colour = colour
    module.words = lambda frames: ["no"] * len(frames)
    module.nothing = lambda frames: np.full((len(frames), 2), np.nan)
    monkeypatch.setitem(sys.modules, "own_embedding", module)
    return "own_embedding"


def plain(*shades: tuple[int, int, int]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        f"clip {at}": np.clip(np.array(shade) + rng.integers(-3, 4, (5, 32, 32, 3)), 0, 255).astype(np.uint8)
        for at, shade in enumerate(shades)
    }


REDS, BLUES = [(200, 10, 10), (180, 8, 8), (120, 6, 6)], [(10, 10, 200)]


def test_embeddings_of_your_own_code(tmp_path, own_code):
    storage = Storage(str(tmp_path))
    store(storage, plain(*REDS, *BLUES), score=[0.1, 0.9, 0.2, 0.3])
    embedding = {"call": f"{own_code}:colour", "version": "1"}
    near = {"hash": None, "cosine": 0.99}
    made = release(storage, "v1", rules=rules(near_duplicates=near, embedding=embedding))
    assert names(storage, made) == {"clip 1", "clip 3"}
    both = {"hash": 0, "cosine": 0.99, "match": "both"}
    assert release(storage, "v2", rules=rules(near_duplicates=both, embedding=embedding)).rows == 4


def test_topics_are_capped(tmp_path, own_code):
    storage = Storage(str(tmp_path))
    store(storage, plain(*REDS, *BLUES), score=[0.1, 0.9, 0.2, 0.3])
    held = rules(caps=[{"by": "topic", "most": 2}], topics=2, embedding={"call": f"{own_code}:colour", "version": "1"})
    made = release(storage, "v1", rules=held)
    assert names(storage, made) == {"clip 1", "clip 2", "clip 3"}
    assert [topic["samples"] for topic in made.selection["topics"]] == [3, 1]
    assert made.selection["caps"][0]["values"] == [
        {"value": "1", "before": 3, "after": 2},
        {"value": "2", "before": 1, "after": 1},
    ]


@pytest.mark.parametrize(
    ("call", "said"),
    [
        ("own_embedding:words", "embedding: own_embedding:words@1: expected"),
        ("own_embedding:nothing", "expected 2 vectors of finite numbers"),
        ("own_embedding:none", "embedding.call: own_embedding:none: cannot be imported"),
    ],
)
def test_embeddings_that_are_none_are_refused(tmp_path, own_code, call, said):
    storage = Storage(str(tmp_path))
    store(storage, plain(*REDS[:2]))
    held = rules(near_duplicates={"cosine": 0.9}, embedding={"call": call, "version": "1"})
    with pytest.raises(UserError, match=said):
        release(storage, "v1", rules=held)
    assert list(storage.files("releases")) == []


def test_the_vision_tower_of_a_multimodal_model(tmp_path):
    storage, clips = Storage(str(tmp_path)), scenes()
    store(storage, {f"clip {at}": clip for at, clip in enumerate(clips[:4])} | {"copy": brighter(clips[1])})
    held = rules(near_duplicates={"hash": None, "cosine": 0.995}, embedding={"model": "pack://shapes", "num_frames": 3})
    made = release(storage, "v1", rules=held)
    assert made.selection["embedding"] == f"vision tower {content_sha256(resolve('pack://shapes', 'judge'))}"
    (cluster,) = made.selection["near_duplicates"]["largest"]
    assert {cluster["kept"], *cluster["removed"]} == {sample_id("clip 1"), sample_id("copy")}


def test_long_embeddings_are_projected_and_keep_their_angles():
    rng = np.random.default_rng(0)
    one, noise = rng.standard_normal((2, 3000))
    pairs = np.stack([one, one + 0.1 * noise, noise]).astype(np.float32)
    kind = signatures.EmbeddingKind(lambda frames: pairs, "1")
    found = signatures.embeddings(
        np.stack([np.frombuffer(value, np.uint8) for value in kind.compute([np.zeros((1, 2, 2, 3), np.uint8)] * 3)])
    ).astype(np.float32)
    assert found.shape == (3, 256)
    exact = pairs / np.linalg.norm(pairs, axis=1, keepdims=True)
    assert found[0] @ found[1] == pytest.approx(exact[0] @ exact[1], abs=0.005)
    assert found[0] @ found[2] == pytest.approx(exact[0] @ exact[2], abs=0.25)
