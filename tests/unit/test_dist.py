"""Ranks and devices: what is said about a GPU that torch cannot use; several processes end together."""

import os
import socket
import subprocess
import threading

import pytest
from conftest import REPOSITORY, one_sentence, run_verb

from inheritune.cluster import launch
from inheritune.runtime import devices, rendezvous


@pytest.fixture
def gpu_machine(tmp_path, monkeypatch):
    """A machine whose nvidia-smi reports a driver for CUDA 12.4."""
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho '| NVIDIA-SMI 550.54   Driver Version: 550.54   CUDA Version: 12.4 |'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)


def test_gpu_that_torch_cannot_use_is_named_with_versions_and_the_way_out(gpu_machine):
    sentence = devices.find_unused_gpu("2.13.0+cpu", None)
    assert (
        "driver 550.54, CUDA up to 12.4" in sentence
        and "torch 2.13.0+cpu (built for the CPU only)" in sentence
    )
    assert "wheel index cu124" in sentence and "DS_ACCELERATOR=cpu" in sentence


def test_hidden_gpus_and_machines_without_any_are_fine(gpu_machine, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert devices.find_unused_gpu("2.13.0+cpu", None) is None
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setenv("PATH", "/nonexistent")
    assert devices.find_unused_gpu("2.13.0+cpu", None) is None


def test_training_is_refused_there_instead_of_using_the_cpu(gpu_machine, small):
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU that torch can use")
    done = run_verb("train", small, "--run", "reference", check=False)
    assert done.returncode == 2 and "this machine has a GPU (driver 550.54" in done.stderr


def test_the_scripts_ask_for_the_device_before_they_train(gpu_machine):
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU that torch can use")
    command = ["bash", "-c", "source recipes/setup.sh; check_gpu; echo trains"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "this machine has a GPU (driver 550.54" in one_sentence(done)


def test_a_set_up_that_was_stopped_installs_again_what_it_was_at(tmp_path):
    """By pip itself: what it installed is kept, and without the mark of its end it is installed again."""
    command = ["python", "-m", "venv", str(tmp_path / "venv")]
    subprocess.run(command, check=True)
    (info,) = (tmp_path / "venv").glob("lib/python*/site-packages/pip-*.dist-info")
    half = info.with_name("half-1.0.dist-info")
    half.mkdir()
    (half / "METADATA").write_text("Metadata-Version: 2.1\nName: half\nVersion: 1.0\n")
    listed = [tmp_path / "venv" / "bin" / "python", "-m", "pip", "list", "--format=freeze"]
    before = subprocess.run(listed, capture_output=True, text=True, check=True).stdout
    forget = [
        "bash",
        "-c",
        'source recipes/setup.sh; forget_half_installed "$1"',
        "_",
        str(tmp_path / "venv"),
    ]
    subprocess.run(forget, check=True, cwd=REPOSITORY)
    after = subprocess.run(listed, capture_output=True, text=True, check=True).stdout
    assert "half==1.0" in before and "half==1.0" not in after and "pip==" in after


def test_first_failing_process_ends_the_others_with_its_code(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    assert launch.launch_verb(["train", "quickstart", "--run", "nothing"], 2) == 2
    assert launch.launch_verb(["--help"], 2) == 0


def test_a_port_that_the_job_before_still_holds_is_waited_for(monkeypatch):
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        held.listen()
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setenv("WORLD_SIZE", "1")
        threading.Timer(2, held.close).start()
        store = rendezvous.open_store("127.0.0.1", held.getsockname()[1])
        store.set("key", "value")
        assert store.get("key") == b"value"
