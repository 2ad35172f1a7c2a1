"""The order of data: a pure function of (fingerprint, seed, step, position), any batch on any number of
ranks."""

import numpy as np
import pytest
from conftest import write_tokens

from inheritune.data import batches
from inheritune.data.batches import Order, Share, Tokens, check_some_shards, read_share
from inheritune.errors import UserError


@pytest.fixture
def tokens(tmp_path):
    return Tokens(write_tokens(tmp_path / "data"), "train")


def test_stream_is_read_across_shard_borders(tokens):
    whole = np.concatenate([np.fromfile(tokens.folder / f"train_0000{i}.bin", "<u2") for i in range(3)])
    for start, count in ((0, 10), (2990, 40), (2999, 2502), (0, 7000), (6990, 10)):
        assert np.array_equal(tokens.read(start, count), whole[start : start + count])


@pytest.mark.parametrize("sampling", ["random_windows", "one_pass", "epochs:3"])
def test_order_depends_on_nothing_but_fingerprint_seed_and_step(tokens, sampling):
    order = Order(tokens, sampling, 32, 20, seed=1)
    first = [order.starts(step) for step in range(6)]
    again = Order(tokens, sampling, 32, 20, seed=1)
    for step in (5, 0, 3):  # in any order, without what came before
        assert np.array_equal(again.starts(step), first[step])
    assert max(s.max() for s in first) + 32 < tokens.n_tokens
    if sampling != "one_pass":
        assert not np.array_equal(Order(tokens, sampling, 32, 20, seed=2).starts(0), first[0])
        tokens.fingerprint = "other"
        assert not np.array_equal(Order(tokens, sampling, 32, 20, seed=1).starts(0), first[0])


def test_one_sample_does_not_move_with_the_batch_size(tokens):
    small, large = Order(tokens, "random_windows", 32, 20, 0), Order(tokens, "random_windows", 32, 50, 0)
    assert np.array_equal(small.starts(3), large.starts(3)[:20])


def test_epochs_read_every_window_once_in_a_new_order_each(tokens):
    order = Order(tokens, "epochs:2", 32, 20, 0)
    n = order.n_windows
    read = np.concatenate([order.starts(step) for step in range(2 * n // 20)])
    assert sorted(read[:n]) == [i * 32 for i in range(n)]
    assert not np.array_equal(read[:n], read[n : 2 * n]) and len(set(read[n : 2 * n])) == len(read[n : 2 * n])


def test_one_pass_is_sequential_and_ends(tokens):
    order = Order(tokens, "one_pass", 32, 20, 0)
    assert np.array_equal(order.starts(2), np.arange(40, 60) * 32)
    order.check_steps(order.n_windows // 20)
    with pytest.raises(UserError, match="at most 10 steps"):
        order.check_steps(order.n_windows // 20 + 1)


def test_random_windows_cover_the_whole_text(tokens):
    starts = np.concatenate([Order(tokens, "random_windows", 32, 200, 0).starts(s) for s in range(20)])
    assert starts.min() < 50 and starts.max() > tokens.n_tokens - 32 - 50


# Medium, Large and XL, Small, FineWeb, figures 23 and 24, low data, tests
PAPER_BATCHES = [384, 128, 480, 60, 48, 64, 20]


@pytest.mark.parametrize("batch", PAPER_BATCHES)
@pytest.mark.parametrize("world", [1, 2, 3, 6, 7, 8, 16])
@pytest.mark.parametrize("ceiling", [1, 4, 16, 1000])
def test_shares_cover_the_batch_once_with_equal_work(batch, world, ceiling):
    shares = [Share.of(batch, rank, world, ceiling) for rank in range(world)]
    covered = np.concatenate([np.arange(s.first, s.first + s.count) for s in shares])
    assert np.array_equal(covered, np.arange(batch))
    assert max(s.count for s in shares) - min(s.count for s in shares) <= 1
    assert len({(s.micro_batch, s.accumulation) for s in shares}) == 1  # the same forwards on every rank
    assert shares[0].micro_batch <= ceiling
    assert all(s.count <= s.micro_batch * s.accumulation for s in shares)
    # the ceiling is met with as few steps as it allows
    assert shares[0].accumulation == -(-shares[0].count // ceiling)


def test_more_ranks_than_sequences_is_refused():
    with pytest.raises(UserError, match="use at most 20 ranks"):
        Share.of(20, 0, 21, 4)


def test_every_rank_together_reads_the_global_batch(tokens):
    order = Order(tokens, "random_windows", 32, 20, 0)
    parts = []
    for rank in range(3):
        windows, weights = read_share(order, 4, Share.of(20, rank, 3, 2))
        assert windows.shape == (4, 2, 33) and weights.shape == (4, 2)
        parts.append(windows.reshape(-1, 33)[weights.reshape(-1) == 1])
    together = np.concatenate(parts)
    assert np.array_equal(together, np.stack([tokens.read(int(s), 33) for s in order.starts(4)]))


def test_too_short_a_text_is_refused(tmp_path):
    short = Tokens(write_tokens(tmp_path / "short", train_shards=(20,)), "train")
    with pytest.raises(UserError, match="20 tokens, fewer than one window of 32"):
        Order(short, "random_windows", 32, 4, 0)


def test_cut_shard_and_missing_data_are_refused(tmp_path):
    folder = write_tokens(tmp_path / "data")
    (folder / "train_00001.bin").write_bytes(b"\0" * 10)
    with pytest.raises(UserError, match=r"train_00001.bin has 10 bytes, its manifest says 5000"):
        Tokens(folder, "train")
    with pytest.raises(UserError, match="no prepared data"):
        Tokens(tmp_path, "train")


def test_a_shard_whose_content_changed_is_found_by_the_hashes_of_some_start(tmp_path, monkeypatch):
    folder = write_tokens(tmp_path / "data")
    for draw in range(3):  # one training shard each, of three; the clock draws it
        monkeypatch.setattr(batches.time, "time_ns", lambda draw=draw: draw)
        check_some_shards(folder)
    # of another size: always found
    (folder / "train_00001.bin").write_bytes((folder / "train_00002.bin").read_bytes() * 2)
    with pytest.raises(UserError, match="train_00001.bin has 6000 bytes"):
        Tokens(folder, "train")
    write_tokens(tmp_path / "again")
    changed = bytearray((tmp_path / "again" / "train_00001.bin").read_bytes())
    changed[1234] ^= 1
    (tmp_path / "again" / "train_00001.bin").write_bytes(changed)
    said = []
    for draw in range(3):
        monkeypatch.setattr(batches.time, "time_ns", lambda draw=draw: draw)
        try:
            check_some_shards(tmp_path / "again")
        except UserError as error:
            said.append(str(error))
    assert (
        len(said) == 1
        and "train_00001.bin does not have the content" in said[0]
        and "run 'prepare' again" in said[0]
    )
    (tmp_path / "again" / "val_00000.bin").write_bytes(bytes(2400))  # validation is hashed at every start
    with pytest.raises(UserError, match="val_00000.bin does not have the content"):
        check_some_shards(tmp_path / "again")
