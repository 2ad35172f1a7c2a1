"""Sizes in messages (units.py), and the one look at a disk's free space (storage.py)."""

import pytest

from inheritune.config.units import format_bytes, format_memory
from inheritune.errors import UserError
from inheritune.files.storage import check_free_space, count_free_bytes


@pytest.mark.parametrize(
    ("size", "shown"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (2_600_000, "3 MB"), (1.25e12, "1,250.0 GB")],
)
def test_a_size_has_the_largest_unit_that_it_reaches(size, shown):
    assert format_bytes(size) == shown


def test_sizes_that_are_compared_have_one_unit():
    assert [format_bytes(size, "MB") for size in (4e4, 4e10)] == ["0 MB", "40,000 MB"]
    assert [format_memory(size) for size in (2.1e6, 1e8, 1.31e10)] == ["2.1 MB", "0.1 GB", "13.1 GB"]


def test_a_disk_without_space_is_one_sentence(tmp_path):
    free = count_free_bytes(tmp_path)
    check_free_space(tmp_path, free // 2, "the work")
    sentence = "^the work needs [0-9,]+ MB, its disk has [0-9,]+ MB free; wait, free some, or .*, and go on$"
    with pytest.raises(UserError, match=sentence):
        check_free_space(tmp_path / "to be made", free * 2, "the work", "wait, ", ", and go on")
