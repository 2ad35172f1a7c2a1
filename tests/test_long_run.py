"""What long_run.py says of a series: a leak is seen, noise is not taken for one."""

import numpy as np
import pytest
from long_run import slope

STEPS = np.arange(1000, 5000)
NOISE = np.random.default_rng(0).normal(size=len(STEPS))


@pytest.mark.parametrize("leak", [0.0, 0.5, 5.0])
def test_the_interval_of_the_slope_holds_the_leak(leak):
    found, low, high = slope(STEPS, 900 + leak * STEPS / 1000 + NOISE)
    assert low < leak < high and (low > 0) == (leak > 0) and high - low < 0.1
    assert found == pytest.approx(leak, abs=0.05)


def test_noise_that_comes_and_goes_slowly_makes_the_interval_wide():
    slow = 10 * np.sin(STEPS / 300)
    _, low, high = slope(STEPS, 30 + slow)
    assert low < 0 < high and high - low > 2
