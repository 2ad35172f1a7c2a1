"""What long_run.py says of a series: a leak is seen, noise is not taken for one. goodput.py in small."""

import json
import subprocess
import sys

import numpy as np
import pytest
from conftest import REPOSITORY
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


@pytest.mark.drill
def test_goodput_is_put_together_from_the_parts_of_real_restarts(tmp_path):
    command = [
        sys.executable,
        REPOSITORY / "tests" / "drills" / "goodput.py",
        "--every",
        "150",
        "--compile",
        "--out",
        tmp_path,
    ]
    printed = subprocess.run(command, check=True, text=True, capture_output=True).stdout
    found = json.loads((tmp_path / "goodput.json").read_text())
    assert "| 2 rank(s) after 1 |" in printed and len(found["restarts"]) == 2 and 0 < found["goodput"] < 1
    for parts in found["restarts"]:
        assert all(parts[part] > 0 for part in ("imports", "making the start", "first step"))
        assert sum(parts.values()) < found["seconds"]
    assert found["restarts"][0]["first step"] > 1, "the blocks are compiled in the first step"
    lost = found["xl"]["fixed_s"] + 3 * found["xl"]["reading it"]
    assert found["xl_goodput"] == pytest.approx(7200 / (7200 + lost))
