"""Snapshots: the code that a job runs with, as it was when it was submitted."""

from pathlib import Path

from conftest import REPOSITORY

from inheritune.submit.snapshot import list_code, make_snapshot


def test_a_snapshot_is_the_code_as_it_was(own_root):
    names = {str(path) for path in list_code()}
    assert {
        "slurm/job.sh",
        "slurm/jobs.yaml",
        "inheritune/cli/program.py",
        "recipes/quickstart.yaml",
    } <= names
    code = make_snapshot()
    assert code == make_snapshot() and code.is_relative_to(Path(own_root))  # equal code, one copy
    job = Path("slurm/job.sh")
    assert (code / job).read_bytes() == (REPOSITORY / job).read_bytes() and (
        code / "COMMIT"
    ).read_text().strip()
