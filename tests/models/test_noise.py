from __future__ import annotations

import hashlib

import numpy as np
import pytest

from models.noise import noise_key, standard_normal

KEY = "f84ab80079b7f6ede8dac15605b3d72b"
GOLDEN = "cdb898eb04a1c28c309ed4f8d146753a89a3fddf151749a2cd1387c6b32e16d2"


def test_noise_key_is_fixed_for_ever() -> None:
    assert noise_key(0, "abc", 0) == KEY
    assert len({noise_key(seed, prompt, index) for seed in (0, 1) for prompt in ("a", "b") for index in (0, 1)}) == 8


def test_standard_normal_has_golden_bytes() -> None:
    noise = standard_normal(KEY, (16, 5, 8, 8))
    assert noise.dtype == np.float32
    np.testing.assert_array_equal(noise.ravel()[:3], np.array([0.8643934, -0.69040126, -1.004913], dtype=np.float32))
    assert hashlib.sha256(noise.astype("<f4").tobytes()).hexdigest() == GOLDEN


def test_standard_normal_is_standard_and_independent() -> None:
    a, b = standard_normal(KEY, (100_000,)), standard_normal(noise_key(0, "abc", 1), (100_000,))
    # standard errors: 1/sqrt(n) for mean and correlation, sqrt(2/n) for the variance
    assert abs(a.mean()) < 4 / np.sqrt(a.size)
    assert abs(a.var() - 1) < 4 * np.sqrt(2 / a.size)
    assert abs((a * b).mean()) < 4 / np.sqrt(a.size)


@pytest.mark.parametrize("shape", [(16, 5, 8, 8), (4, 32, 32)])
def test_standard_normal_is_the_same_each_time(shape: tuple[int, ...]) -> None:
    np.testing.assert_array_equal(standard_normal(KEY, shape), standard_normal(KEY, shape))
