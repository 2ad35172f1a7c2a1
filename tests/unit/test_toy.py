"""The authors' toy models: the ranks that this code computes, and the table that shows them."""

import torch
from markdown_rows import split_row

from inheritune.analysis import toy as models
from inheritune.paper import tables, toy


def test_one_set_of_maps_has_two_ranks():
    """Each sequence looks at tokens of its own, so every map has full rank; their mean is uniform."""
    A_NHTT = torch.stack([torch.eye(10).roll(shift, dims=1) for shift in range(10)])[:, None]
    assert models.measure_both_ranks(A_NHTT) == {"batch_mean": 1.0, "sequence": 9.0}


def test_random_heads_are_near_uniform_after_the_softmax():
    """Before it, the rank of a sequence's logits is at most the head's width; of a mean of four, more."""
    found = models.measure_random_heads(n_heads=2, width=16, length=64, batch=4)
    assert found["after_softmax"] == {"batch_mean": 1.0, "sequence": 1.0}
    assert found["before_softmax"]["sequence"] <= 8 < found["before_softmax"]["batch_mean"]


def test_the_trained_layer_is_the_notebooks():
    """Its rank of 45.25 after one step is the notebook's; rounding moves single heads by a rank or two."""
    (first,) = models.train_layer(steps=1)
    assert abs(first["batch_mean"] - 45.25) <= 0.5 and abs(first["sequence"] - 47.4) <= 0.5


def test_the_table_shows_both_ranks_beside_the_notebooks(monkeypatch, capsys):
    monkeypatch.setenv("REHEARSE", "1")
    tables.table("toy", missing=True)
    assert capsys.readouterr().out == "toy - - -\n"
    tables.table("toy")
    shown = capsys.readouterr().out
    assert shown.startswith("REHEARSAL, not a result.") and shown.count("| not run") == 10
    path = toy.run_toy()
    capsys.readouterr()
    tables.table("toy", missing=True)
    assert not capsys.readouterr().out
    tables.table("toy")
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| after softmax"))
    assert split_row(line)[1:] == ["1", "1.00", "1.00"]
    assert path.with_name("toy.png").stat().st_size > 10_000 and "rehearsal" in str(path)
