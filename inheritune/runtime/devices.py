"""The device of this rank: its GPU, or the CPU."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from typing import TYPE_CHECKING

from inheritune.runtime.launcher import find_launch
from inheritune.runtime.ranks import NodeError

if TYPE_CHECKING:
    import torch

SMI_TIMEOUT_S = 120
"""nvidia-smi takes half a minute on a machine of eight GPUs without the persistence daemon."""
CPU_ONLY = "DS_ACCELERATOR=cpu to use the CPU on purpose"


def get_device() -> torch.device:
    """Return the device of this rank: its GPU, or the CPU if there is none (or DS_ACCELERATOR=cpu).

    Raises UserError if a GPU is present that torch cannot use."""
    import torch

    if os.environ.get("DS_ACCELERATOR") == "cpu":
        return torch.device("cpu")
    if torch.cuda.is_available():
        # each task sees only its own GPU: DeepSpeed would look for the one with index LOCAL_RANK
        if torch.cuda.device_count() == 1:
            os.environ["LOCAL_RANK"] = "0"
        return torch.device("cuda", find_launch(os.environ).local_rank)
    unused = find_unused_gpu(torch.__version__, torch.version.cuda)
    if unused:
        raise NodeError(unused)
    os.environ["DS_ACCELERATOR"] = "cpu"
    return torch.device("cpu")


def read_gpu_name(device: torch.device) -> str | None:
    """Return the name of a GPU as its driver has it, or None for the CPU."""
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else None


def find_unused_gpu(torch_version: str, torch_cuda: str | None) -> str | None:
    """Return a sentence if this machine has an NVIDIA GPU that the installed torch cannot use, else None."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "" or not shutil.which("nvidia-smi"):
        return None
    try:
        report = subprocess.run(
            ["nvidia-smi"], capture_output=True, text=True, check=False, timeout=SMI_TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        hangs = f"nvidia-smi does not answer within {SMI_TIMEOUT_S} s, so the GPU's driver hangs"
        return f"{hangs}; restart this machine, or set {CPU_ONLY}"
    except OSError:  # a file of that name that cannot be executed
        return None
    driver = re.search(r"Driver Version: *([\d.]+)", report.stdout)
    cuda = re.search(r"CUDA Version: *([\d.]+)", report.stdout)
    if report.returncode or not driver:
        return None
    newest = cuda.group(1) if cuda else "unknown"
    return (
        f"this machine has a GPU (driver {driver.group(1)}, CUDA up to {newest}), but torch {torch_version} "
        f"(built for {'CUDA ' + torch_cuda if torch_cuda else 'the CPU only'}) cannot use it; install the "
        f"same torch from PyTorch's wheel index cu{newest.replace('.', '')} or the nearest below it, or set "
        f"{CPU_ONLY}"
    )
