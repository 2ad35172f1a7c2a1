"""Copies of states in host memory (host_copies.py)."""

import io
import subprocess
import sys

import torch
from conftest import REPOSITORY

from inheritune.engines import host_copies
from inheritune.engines.host_copies import HostCopies


def save(content) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def make_content() -> dict:
    """Every kind of tensor that DeepSpeed's states have."""
    flat = torch.arange(12, dtype=torch.float32)
    marked = torch.ones(2, requires_grad=True)
    marked.ds_id = "4_4"
    views = {"first": flat[:4].view(2, 2), "turned": flat[4:].view(2, 4).t()}
    return {
        "views": views,
        "again": [views["first"], flat],
        "marked": marked,
        "parameter": torch.nn.Parameter(torch.zeros(3)),
        "rounded": torch.ones(5, dtype=torch.bfloat16),
        "empty": torch.empty(0),
        "lr": 0.1,
    }


def test_torch_save_writes_the_same_bytes_of_a_copy():
    content = make_content()
    before = save(content)
    copied = HostCopies().make(content)
    for tensor in (content["again"][1], content["parameter"].data, content["rounded"]):
        tensor.zero_().add_(7)
    content["views"]["lr"] = 0.2
    assert save(copied) == before != save(content)


def test_the_memory_is_used_again_once_it_is_given_back():
    copies, state = HostCopies(), {"a": torch.zeros(1000), "b": torch.ones(1000), "c": torch.ones(10)}
    first, second = copies.make(state), copies.make(state)
    held = {t.data_ptr() for t in [*first.values(), *second.values()]}
    assert len(held) == 6  # two at a time
    copies.reuse()
    third = copies.make({"a": state["b"], "b": state["a"]})
    assert {t.data_ptr() for t in third.values()} < held
    assert third["a"].eq(1).all() and third["b"].eq(0).all()


def test_memory_that_is_held_needs_no_room(monkeypatch, own_log, caplog):
    copies, state = HostCopies(), {"a": torch.zeros(1_000_000)}
    copies.make(state)
    copies.reuse()
    monkeypatch.setattr(host_copies, "find_available_memory", lambda: 0)
    assert copies.make(state) is not None
    assert HostCopies().make(state) is None


def test_what_cannot_be_allocated_is_not_copied():
    """Nothing says so beforehand: `ulimit -v` is no limit that the system's number of free bytes knows of."""
    code = """
import resource, torch
from pathlib import Path
from inheritune.engines.host_copies import HostCopies
state = {"a": torch.zeros(50_000_000)}  # 200 MB
mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (mapped + (50 << 20), resource.RLIM_INFINITY))
assert HostCopies().make(state) is None and state["a"].eq(0).all()
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "training waits while 0.2 GB of a checkpoint are written" in done.stderr
