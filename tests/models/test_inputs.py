from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from models.inputs import InputError, first_frame


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    """Left third red, middle green, right blue; 96 wide, 32 high."""
    pixels = np.zeros((32, 96, 3), dtype=np.uint8)
    for at in range(3):
        pixels[:, 32 * at : 32 * at + 32, at] = 255
    path = tmp_path / "thirds.png"
    Image.fromarray(pixels).save(path)
    return path


def test_first_frame_cuts_the_centre(picture: Path) -> None:
    frame = first_frame([{"role": "first_frame", "uri": str(picture)}], 16, 16)
    assert frame.shape == (16, 16, 3)
    assert frame.dtype == np.uint8
    np.testing.assert_array_equal(frame, np.broadcast_to([0, 255, 0], (16, 16, 3)))


def test_first_frame_checks_the_hash(picture: Path) -> None:
    digest = hashlib.sha256(picture.read_bytes()).hexdigest()
    item = {"role": "first_frame", "uri": f"file://{picture}", "sha256": digest}
    assert first_frame([item], 32, 96).shape == (32, 96, 3)
    with pytest.raises(InputError, match="sha256"):
        first_frame([item | {"sha256": "0" * 64}], 32, 96)


@pytest.mark.parametrize(
    "inputs",
    [[], [{"role": "mask", "uri": "x"}], [{"role": "first_frame", "uri": "/no/such.png"}], [{"role": "first_frame"}]],
)
def test_first_frame_missing_is_the_samples_fault(inputs: list[dict[str, str]]) -> None:
    with pytest.raises(InputError, match=r"^inputs: "):
        first_frame(inputs, 32, 32)


def test_first_frame_unreadable_is_the_samples_fault(tmp_path: Path) -> None:
    path = tmp_path / "broken.png"
    path.write_bytes(b"\x89PNG nothing")
    with pytest.raises(InputError, match="not an image"):
        first_frame([{"role": "first_frame", "uri": str(path)}], 32, 32)
