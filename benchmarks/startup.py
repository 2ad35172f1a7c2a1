"""Start-up: `--help`, `check`, `plan`, and a resumed run from the start of its process to the end of its
first step.

Beside the resume: importing torch, transformers and DeepSpeed, and reading and hashing the checkpoint's
bytes, which no resume can do without.
"""

import json
import shutil
import time
from pathlib import Path

from harness import Case, Goal, clock, main, values, verb, write_experiment, write_tokens


def helped(work: dict, folder: Path) -> None:
    verb("--help")


def checked(work: dict, folder: Path) -> None:
    verb("check", work["experiment"])


def planned(work: dict, folder: Path) -> None:
    verb("plan", work["experiment"])


def setup(work: dict, folder: Path) -> None:
    """A run that was asked to stop at its second step, and saved."""
    from harness import run, sys

    from inheritune.config.experiment import load_experiment
    from inheritune.files.rundir import get_data_dir

    place = folder / "resume"
    shutil.rmtree(place, ignore_errors=True)
    settings = place / "ds.json"
    place.mkdir(parents=True)
    settings.write_text(json.dumps({"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 1}}))
    train = {
        "steps": 1000,
        "batch_tokens": 64,
        "warmup_steps": 1,
        "lr": 3e-4,
        "precision": "fp32",
        "eval_every": 1000,
    }
    train |= {
        "eval_windows": 2,
        "final_windows": 2,
        "log_every": 1,
        "checkpoint_every": 1000,
        "deepspeed": str(settings),
    }
    path = write_experiment(
        place,
        {"sequence_length": 64, "name": "resume"},
        model=work["model"],
        train=train,
        runs={"reference": {"init": "random"}},
    )
    experiment = load_experiment(str(path))
    write_tokens(get_data_dir(experiment), 100_000, 1000, experiment.model.vocab_size)
    run(sys.executable, "-c", STOP, path)


STOP = """
import sys
from inheritune.errors import Stopped
from inheritune.runtime import signals
from inheritune.training import loop as train
from inheritune.training.step_log import StepLog
log_step = StepLog._log_step
def stop_at_two(self, state, *rest):
    log_step(self, state, *rest)
    signals.received.append("benchmark") if state.step == 2 else None
StepLog._log_step = stop_at_two
try:
    train.train(sys.argv[1], "reference")
except Stopped:
    pass
"""


class FirstStep(Exception):
    """The run has done its first step."""


def since_start() -> float:
    """Seconds since this process began."""
    import psutil

    return time.time() - psutil.Process().create_time()


def resumed(work: dict, folder: Path) -> dict:
    """`train` until it logs its first step; the parts are read at the functions that it calls."""
    from harness import _profiler, nullcontext

    from inheritune.engines import checkpoint
    from inheritune.training import loop as training
    from inheritune.training import start
    from inheritune.training.step_log import StepLog

    stamps, originals = (
        {"imports_s": since_start()},
        (start.start_engine, checkpoint.restore_checkpoint, checkpoint.find_newest_checkpoint),
    )

    def stamped(name, function):
        def call(*arguments):
            begun = time.perf_counter()
            answer = function(*arguments)
            stamps[name] = time.perf_counter() - begun
            return answer

        return call

    def first(self, state, *_):
        raise FirstStep

    start.start_engine = stamped("engine_s", originals[0])
    checkpoint.restore_checkpoint, checkpoint.find_newest_checkpoint = (
        stamped("restore_s", originals[1]),
        stamped("hashes_s", originals[2]),
    )
    StepLog._log_step = first
    try:
        with _profiler or nullcontext():
            training.train(str(folder / "resume" / "resume.yaml"), "reference")
    except FirstStep:
        stamps["seconds"] = since_start()
    stamps["rest_s"] = stamps["seconds"] - sum(
        stamps[f"{part}_s"] for part in ("imports", "engine", "restore", "hashes")
    )
    return stamps


def imports(work: dict, folder: Path) -> dict:
    with clock() as measured:
        import deepspeed  # noqa: F401
        import torch  # noqa: F401
        from transformers import AutoModelForCausalLM  # noqa: F401
    return measured


def read(work: dict, folder: Path) -> dict:
    """Every file of the newest checkpoint, hashed and unpickled."""
    import deepspeed  # noqa: F401 (whose classes are in it: not to be imported within the clock)
    import torch

    from inheritune.config.experiment import load_experiment
    from inheritune.files.markers import hash_file
    from inheritune.files.rundir import RunDir

    run_dir = RunDir.of(load_experiment(str(folder / "resume" / "resume.yaml")), "reference")
    files = [
        file for file in run_dir.checkpoint(run_dir.complete_checkpoints()[-1]).rglob("*") if file.is_file()
    ]
    with clock() as measured:
        for file in files:
            hash_file(file)
            torch.load(file, weights_only=False) if file.suffix == ".pt" else None
    return measured | {"gb": sum(file.stat().st_size for file in files) / 1e9}


def cases(size: str) -> list[Case]:
    model = {"size": "gpt2_tiny", "vocab_size": 512} if size == "small" else {"size": "gpt2_small"}
    instant = {"--help": helped, "check": checked, "plan": planned}
    limits = {"--help": 0.3, "check": 5.0, "plan": 5.0}
    goals = [Goal(f"seconds of {name}", limits[name], values(name), of=name) for name in instant]
    loading = [Goal("seconds beside those of imports and reading", None, beside_loading)]
    return [
        Case("verbs without work, gpt2_xl_owt", {"experiment": "gpt2_xl_owt"}, instant, goals),
        Case(
            "resume of " + ("a toy" if size == "small" else "GPT-2 124M") + " to its first step",
            {"model": model},
            {"ours": resumed, "imports alone": imports, "limit: reading the checkpoint": read},
            loading,
            setup,
        ),
    ]


def beside_loading(turns: dict) -> list[float]:
    columns = zip(turns["ours"], turns["imports alone"], turns["limit: reading the checkpoint"], strict=False)
    return [our["seconds"] / (lib["seconds"] + file["seconds"]) for our, lib, file in columns]


if __name__ == "__main__":
    main(__file__, cases)
