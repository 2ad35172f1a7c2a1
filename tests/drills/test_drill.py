"""The short form of drill.py: one round, every step of the chain killed once, at a moment drawn by lot."""

import random

import pytest
from drill import EVERY, drill, table


@pytest.mark.drill
@pytest.mark.parametrize("in_background", [False, True])
def test_a_round_of_the_drill(tmp_path, monkeypatch, in_background):
    monkeypatch.setenv("INHERITUNE_ROOT", str(tmp_path))  # each chain sets its own
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed {seed}")
    total, lost = drill(tmp_path, kills=1, seed=seed, few=1, in_background=in_background)
    assert sum(total.values()) >= 4, f"seed {seed}: {table(total)}"
    assert max(lost, default=0) <= EVERY * (1 + in_background)
