"""Host memory that is left (host_memory.py): the kernel's number, and the limits of control groups."""

import psutil
import pytest

from inheritune.runtime.host_memory import find_available_memory

GB = 10**9


def write_group(folder, limit, use: int, cache: int, v1: bool = False) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if v1 else ("memory.max", "memory.current")
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{use}\n")
    prefix = "total_" if v1 else ""
    rows = f"anon 5\n{prefix}inactive_file {cache}\n{prefix}active_file 7\nfile 1\n"
    (folder / "memory.stat").write_text(rows)


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A machine with 100 GB available, whose process is in the task of a Slurm job."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 100 * GB}))
    (tmp_path / "proc/self").mkdir(parents=True)
    return tmp_path


def test_without_control_groups_it_is_the_kernels_number(root):
    assert find_available_memory(root) == 100 * GB
    assert 0 < find_available_memory() <= 100 * GB  # this machine's own groups can be read


def test_the_tightest_group_above_the_process_counts_with_its_page_cache(root):
    (root / "proc/self/cgroup").write_text("0::/slurm/job_7/step_0\n")
    groups = root / "sys/fs/cgroup"
    write_group(groups / "slurm/job_7/step_0", "max", 1 * GB, 0)
    write_group(groups / "slurm/job_7", 60 * GB, 50 * GB, 20 * GB)
    write_group(groups / "slurm", 90 * GB, 10 * GB, 0)
    assert find_available_memory(root) == 30 * GB + 7
    write_group(groups / "slurm/job_7/step_0", 2 * GB, 3 * GB, 0)  # beyond its limit
    assert find_available_memory(root) == 0


def test_the_first_version_of_control_groups_too(root):
    (root / "proc/self/cgroup").write_text("4:cpu,cpuacct:/slurm\n3:memory:/slurm/job_7\n1:name=systemd:/x\n")
    write_group(root / "sys/fs/cgroup/memory/slurm/job_7", 8 * GB, 5 * GB, 1 * GB, v1=True)
    assert find_available_memory(root) == 4 * GB + 7
