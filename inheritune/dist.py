"""Ranks: joining the process group under srun, torchrun, `deepspeed` or plainly, and the few collectives that are used.

Nothing here needs a compiler: DeepSpeed's shared-memory CPU collective, the one op it would build at start, is turned off.
"""

import logging
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import warnings

from inheritune.config import REPOSITORY, UserError

_LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def rank() -> int:
    """This process's rank, also before the group exists."""
    return int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or 0)


def world() -> int:
    """Number of processes of the group that `start` joined."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def start() -> None:
    """Choose the device and join the process group; call once, before anything imports deepspeed.

    Raises UserError where a GPU is present that torch cannot use."""
    _quiet()
    _find_peers()
    device()
    import deepspeed
    import torch

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would compile for half a minute, or fail without g++
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if torch.cuda.is_available():
        torch.cuda.set_device(device())
    if not torch.distributed.is_initialized():
        deepspeed.init_distributed(dist_backend="nccl" if torch.cuda.is_available() else "gloo", verbose=False)


def launched() -> bool:
    """Whether a launcher (srun, torchrun, deepspeed or `launch`) started this process as one of several."""
    return bool(os.environ.get("RANK")) or int(os.environ.get("SLURM_STEP_NUM_TASKS") or 1) > 1


def launch(verb: list[str], procs: int) -> int:
    """Run `python -m inheritune VERB ...` as `procs` processes on this machine, or as srun's tasks inside a Slurm job;
    returns the exit code of the first that failed, or 0. The others are ended then: they would wait for it for ever."""
    command = [sys.executable, "-m", "inheritune", *verb]
    path = os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])
    common = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // procs)), **os.environ, "PYTHONPATH": path}
    in_batch_script = os.environ.get("SLURM_JOB_ID") and not os.environ.get("SLURM_STEP_NUM_TASKS")
    if procs > 1 and in_batch_script and shutil.which("srun"):
        return subprocess.run(["srun", "--kill-on-bad-exit=1", *command], check=False).returncode
    if procs > 1:
        common.update(WORLD_SIZE=str(procs), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(_free_port()))
    ranks = []
    for number in range(procs):
        own = {"RANK": str(number), "LOCAL_RANK": str(number)} if procs > 1 else {}
        ranks.append(subprocess.Popen(command, env={**common, **own}))
    try:
        while any(process.poll() is None for process in ranks):
            failed = next((process.returncode for process in ranks if process.poll()), 0)
            if failed:
                time.sleep(1)  # let the others say what they know
                return failed
            time.sleep(0.05)
        return next((process.returncode for process in ranks if process.returncode), 0)
    finally:
        for process in ranks:
            if process.poll() is None:
                process.kill()
            process.wait()


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def stop() -> None:
    """Leave the group: without this a process now and then aborts at exit although its work is done."""
    import torch

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def device():
    """torch.device of this rank: its GPU, or the CPU where there is none (or DS_ACCELERATOR=cpu).

    Raises UserError where a GPU is present that torch cannot use."""
    import torch

    if os.environ.get("DS_ACCELERATOR") == "cpu":
        return torch.device("cpu")
    if torch.cuda.is_available():
        visible = torch.cuda.device_count()
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK") or 0) if visible > 1 else 0)
    unused = unused_gpu(torch.__version__, torch.version.cuda)
    if unused:
        raise UserError(unused)
    os.environ["DS_ACCELERATOR"] = "cpu"
    return torch.device("cpu")


def unused_gpu(torch_version: str, torch_cuda: str | None) -> str | None:
    """A sentence if this machine has an NVIDIA GPU that the installed torch cannot use, else None."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "" or not shutil.which("nvidia-smi"):
        return None
    report = subprocess.run(["nvidia-smi"], capture_output=True, text=True, check=False)
    driver = re.search(r"Driver Version: *([\d.]+)", report.stdout)
    cuda = re.search(r"CUDA Version: *([\d.]+)", report.stdout)
    if report.returncode or not driver:
        return None
    newest = cuda.group(1) if cuda else "unknown"
    return (
        f"this machine has a GPU (driver {driver.group(1)}, CUDA up to {newest}), but torch {torch_version} "
        f"(built for {'CUDA ' + torch_cuda if torch_cuda else 'the CPU only'}) cannot use it; install the same torch from "
        f"PyTorch's wheel index cu{newest.replace('.', '')} or the nearest below it, or set DS_ACCELERATOR=cpu to use the "
        f"CPU on purpose"
    )


def _find_peers() -> None:
    """Set the variables that torch.distributed reads, from srun's if they are not there."""
    if all(os.environ.get(name) for name in _LAUNCHED):
        return  # torchrun and the deepspeed launcher set them all
    peers = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    if os.environ.get("SLURM_STEP_NUM_TASKS"):  # set inside srun's tasks, not in the batch script
        nodes = os.environ["SLURM_STEP_NODELIST"]
        hosts = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
        job, step = int(os.environ["SLURM_JOB_ID"]), int(os.environ.get("SLURM_STEP_ID") or 0)
        peers = {
            "RANK": os.environ["SLURM_PROCID"],
            "WORLD_SIZE": os.environ["SLURM_STEP_NUM_TASKS"],
            "LOCAL_RANK": os.environ["SLURM_LOCALID"],
            "MASTER_ADDR": hosts.stdout.split()[0],
            # of the job and the step: two jobs on one node do not meet
            "MASTER_PORT": str(20000 + (job * 61 + step) % 20000),
        }
    else:
        peers["MASTER_PORT"] = str(_free_port())
    os.environ.update(peers)


def _quiet() -> None:
    """Keep the libraries' warnings, which a user can do nothing about, off the screen."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("DS_LOG_LEVEL", "error")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"(torch|deepspeed|transformers)(\.|$)")


def barrier() -> None:
    import torch

    if world() > 1:
        torch.distributed.barrier()


def all_sum(tensor):
    """Sum of `tensor` over the ranks, in place."""
    import torch

    if world() > 1:
        torch.distributed.all_reduce(tensor)
    return tensor


def gather(value) -> list:
    """Every rank's `value`, in rank order, on every rank."""
    import torch

    if world() == 1:
        return [value]
    values = [None] * world()
    torch.distributed.all_gather_object(values, value)
    return values


def on_rank0(function, *args, **kwargs):
    """Call `function` on rank 0 only; its result, or its UserError, reaches every rank."""
    import torch

    outcome = [None, None]
    failure = None
    if rank() == 0:
        try:
            outcome[0] = function(*args, **kwargs)
        except UserError as error:
            outcome[1] = str(error)
        except Exception as error:
            failure, outcome[1] = error, f"rank 0 failed: {error!r}"
    if world() > 1:
        torch.distributed.broadcast_object_list(outcome, src=0)
    if failure is not None:
        raise failure
    if outcome[1] is not None:
        raise UserError(outcome[1])
    return outcome[0]
