"""What the benchmarks share: contestants take turns, each in a process of its own, on the same work; their
ratios are printed.

A benchmark is a file of this folder with `cases(size)` and, at its end, `main(__file__, cases)`:

    python benchmarks/batches.py [--size small|full|gpu] [--case WORDS] [--turns N] [--folder D] [--out F]

A contestant is a function (work, folder) -> dict | None: what it measured (`seconds`, `cpu_seconds`, ...) or
None, and then the time of the whole call counts. Turn 1 runs A, B, C, turn 2 C, B, A, turn 3 B, C, A, turn 4
A, C, B and so on, so that a machine whose speed drifts is fair to all, and what one leaves behind (memory,
caches) does not always reach the same one; a ratio is taken within a turn. Peak memory is that of the largest
process of a turn, as the kernel counts it; what contestants read is made in a process of its own, because the
kernel counts a starting process's memory towards the new one.
"""

import argparse
import json
import os
import platform
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent
sys.path[:0] = [str(REPOSITORY), *(str(REPOSITORY / place) for place in ("tests", "tests/support"))]
from random_shards import write_shards  # noqa: E402
from written import markdown  # noqa: E402

MARK = "BENCH "  # begins the line on which a turn prints what it measured
Turns = dict[str, list[dict]]
"""{contestant: what it measured in each turn}; a turn that failed holds `error` alone."""


@dataclass(frozen=True)
class Goal:
    """`value` of the turns (a number for each turn that has it) is to be at most `at_most` in the median;
    None: only shown. `of`: the contestant that is profiled where the goal is missed (default: the first)."""

    what: str
    at_most: float | None
    value: Callable[[Turns], list[float]]
    of: str = ""


@dataclass(frozen=True)
class Case:
    """Contestants on one piece of work. `setup` makes what they read, once; those in `rare` run in the first
    turn only."""

    name: str
    work: dict
    contestants: dict[str, Callable]
    goals: list[Goal] = field(default_factory=list)
    setup: Callable | None = None
    rare: tuple[str, ...] = ()
    ranks: int = 1
    by_torch: bool = False
    """Whether a missed goal is profiled by torch's profiler instead of Python's."""


def values(name: str, key: str = "seconds") -> Callable[[Turns], list[float]]:
    """What contestant `name` measured, turn by turn."""
    return lambda turns: [turn[key] for turn in turns[name] if key in turn]


def over(ours: str, *theirs: str, key: str = "seconds") -> Callable[[Turns], list[float]]:
    """Ratio of ours to the other contestant, or to the least of the others, within each turn."""

    def ratios(turns: Turns) -> list[float]:
        rows = zip(turns[ours], *(turns[name] for name in theirs), strict=False)
        return [
            a[key] / min(b[key] for b in others)
            for a, *others in rows
            if key in a and all(b.get(key) for b in others)
        ]

    return ratios


profiling = False
"""Whether this process is one that is to say where its time goes."""
_profiler = None
"""Python's or torch's profiler in a process that is to say where its time goes; it runs while a `clock`
does."""


@contextmanager
def clock():
    """Times the block: yields a dict that then holds `seconds` (wall) and `cpu_seconds` (this process, its
    threads and those of its children that have ended)."""

    def cpu():
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(each.ru_utime + each.ru_stime for each in used)

    global _profiler
    measured, start, start_cpu = {}, time.perf_counter(), cpu()
    profiler, _profiler = _profiler, None  # a clock within this one does not start it again
    with profiler or nullcontext():
        yield measured
    _profiler = profiler
    measured |= {"seconds": time.perf_counter() - start, "cpu_seconds": cpu() - start_cpu}


def run(*words, **environment) -> str:
    """Run a command; its output. Raises RuntimeError with the end of what it printed if it fails."""
    done = subprocess.run(
        [str(word) for word in words],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env=os.environ | {key: str(value) for key, value in environment.items()},
        check=False,
    )
    if done.returncode:
        raise RuntimeError(
            f"{' '.join(map(str, words[:4]))} ... failed: {(done.stdout + done.stderr)[-1500:]}"
        )
    return done.stdout


def verb(*words, **environment) -> None:
    """`python -m inheritune WORDS`, as a user runs it; where that is to be profiled, in this process."""
    if not profiling:
        run(sys.executable, "-m", "inheritune", *words, **environment)
        return
    from inheritune.cli import main

    os.environ |= {key: str(value) for key, value in environment.items()}
    with clock():  # nothing where the caller has one
        main([str(word) for word in words])


def write_tokens(folder: Path, train: int, val: int, vocabulary: int, shard: int = 100_000_000) -> None:
    """A prepared data folder of tokens that a model can learn something from (a random walk over the
    vocabulary)."""
    from inheritune.files.json_files import write_json

    (folder / "tokenizer").mkdir(parents=True, exist_ok=True)
    counts = {"train": train, "val": val}
    sizes = {
        split: [min(shard, count - first) for first in range(0, count, shard)]
        for split, count in counts.items()
    }
    splits = write_shards(folder, sizes, vocabulary)
    tokenizer = {"vocab_size": vocabulary}
    write_json(
        folder / "manifest.json",
        {"fingerprint": "bench", "dtype": "<u2", "splits": splits, "tokenizer": tokenizer},
    )


def write_experiment(folder: Path, data: dict | None = None, **sections) -> Path:
    """An experiment file in `folder`, called like it; `data` replaces keys of the data section."""
    import yaml

    text = {"name": "bench", "source": "embedded", "tokenizer": "bpe:300", "validation": {"fraction": 0.05}}
    read = {"sequence_length": 128, "sampling": "random_windows"}
    sections = {"paper": [], "data": {**text, **read, **(data or {})}, **sections}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{folder.name}.yaml"
    path.write_text(yaml.safe_dump(sections, sort_keys=False), encoding="utf-8")
    return path


# --- running ------------------------------------------------------------------------------------------------


def main(file: str, cases: Callable[[str], list[Case]]) -> None:
    """The command line of a benchmark file."""
    parser = argparse.ArgumentParser(description=(sys.modules["__main__"].__doc__ or "").splitlines()[0])
    parser.add_argument("--size", default="full", choices=("small", "full", "gpu"))
    parser.add_argument("--case", help="only cases whose name contains these words")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument(
        "--folder", help="where inputs and outputs lie (a fast disk); default: a temporary folder"
    )
    parser.add_argument(
        "--out", help="JSON of results; default: results/ beside this file, for --size small nowhere"
    )
    # one contestant, in the process that main started for it
    parser.add_argument("--turn", help=argparse.SUPPRESS)
    parser.add_argument("--profile", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    chosen = [case for case in cases(options.size) if not options.case or options.case in case.name]
    if not chosen:
        parser.error(f"--case {options.case}: cases are {[case.name for case in cases(options.size)]}")
    if options.turn:
        _one_turn(next(case for case in chosen if case.name == options.case), options)
        return
    out = options.out or (HERE / "results" / f"{Path(file).stem}.json" if options.size != "small" else None)
    temporary = None if options.folder else tempfile.mkdtemp(prefix="inheritune_bench_")
    folder = Path(options.folder or temporary)
    try:
        for case in chosen:
            result = {
                "part": Path(file).stem,
                "size": options.size,
                **_take_turns(file, case, folder, options),
            }
            print(describe(result), flush=True)
            _store(Path(out), result) if out else None
    finally:
        shutil.rmtree(temporary) if temporary else None


def _one_turn(case: Case, options) -> None:
    """Run one contestant here and print what it measured."""
    global _profiler, profiling
    folder = Path(options.folder)
    function = case.setup if options.turn == SETUP else case.contestants[options.turn]
    if options.profile:
        profiler, profiling = _start_profiler(case.by_torch), True
        _profiler = profiler
        function(case.work, folder)
        measured = {"profile": profile_lines(profiler, case.by_torch)}
    else:
        with clock() as whole:
            measured = function(case.work, folder)
        measured = measured or whole
    print(MARK + json.dumps(measured), flush=True)
    os._exit(0)  # torch's own threads abort a process at its exit now and then, its work done


def _start_profiler(by_torch: bool):
    if by_torch:
        import torch

        return torch.profiler.profile()
    import cProfile

    return cProfile.Profile()


def profile_lines(profiler, by_torch: bool) -> list[str]:
    """Where the time went, by self time: torch operations (on a GPU its kernels), or functions of Python."""
    if by_torch:
        import torch

        events = list(profiler.key_averages())
        # an operation has its kernels' time as well: it would be counted twice
        kernels = [event for event in events if event.device_type != torch.autograd.DeviceType.CPU]
        events, on_gpu = kernels or events, bool(kernels)
        of = "self_device_time_total" if on_gpu else "self_cpu_time_total"
        events.sort(key=lambda event: -getattr(event, of))
        total = sum(getattr(event, of) for event in events)
        return [f"{getattr(event, of) / total:5.1%} {event.count:6d} x {event.key}" for event in events[:14]]
    import pstats

    rows = sorted(pstats.Stats(profiler).stats.items(), key=lambda item: -item[1][2])[:14]
    return [
        f"{its[2]:7.2f} s {its[0]:6d} x {Path(file).parent.name}/{Path(file).name}:{line} {name}"
        for (file, line, name), its in rows
    ]


def _take_turns(file: str, case: Case, folder: Path, options) -> dict:
    folder.mkdir(parents=True, exist_ok=True)
    os.environ |= {"INHERITUNE_ROOT": str(folder / "root"), "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    print(f"== {Path(file).stem}: {case.name}", flush=True)
    if case.setup:
        made = _start(file, case, SETUP, folder, options.size)
        if "error" in made:
            raise SystemExit(
                f"{Path(file).stem}: {case.name}: what the contestants read could not be made: "
                f"{made['error']}"
            )
    turns: Turns = {name: [] for name in case.contestants}
    names, load = list(case.contestants), os.getloadavg()[0]
    for number in range(options.turns):
        order = names[number // 2 % len(names) :] + names[: number // 2 % len(names)]
        for name in order[:: -1 if number % 2 else 1]:
            if number and (name in case.rare or "error" in turns[name][0]):
                continue
            turns[name].append(_start(file, case, name, folder, options.size))
            print(f"   turn {number + 1} {name}: {_short(turns[name][-1])}", flush=True)
    goals = [_judge(goal, turns) for goal in case.goals]
    missed = [goal for goal in goals if goal["met"] is False]
    to_profile = dict.fromkeys(
        next((goal.of for goal in case.goals if goal.what == one["what"]), "") for one in missed
    )
    profile = [
        line for name in to_profile for line in _profiled(file, case, name or names[0], folder, options.size)
    ] or None
    return {
        "case": case.name,
        "work": {key: value for key, value in case.work.items() if not str(key).startswith("_")},
        "ranks": case.ranks,
        "date": time.strftime("%Y-%m-%d %H:%M %Z"),
        "machine": machine() | {"load_before": round(load, 1), "load_after": round(os.getloadavg()[0], 1)},
        "turns": turns,
        "goals": goals,
        "profile": profile,
    }


def _profiled(file: str, case: Case, name: str, folder: Path, size: str) -> list[str]:
    """Where the time of a contestant goes, a line each; nothing if it can't be said."""
    return [
        f"{name}:",
        *_start(file, case, name, folder, size, "--profile").get("profile", ["(it could not be profiled)"]),
    ]


PATIENCE_S = 3600
"""A turn that takes longer is ended."""
SETUP = "make what the contestants read"


def _start(file: str, case: Case, name: str, folder: Path, size: str, *more: str) -> dict:
    """One turn of a contestant in a fresh process (one for each rank): what it measured, with `peak_mb`;
    `error` if it failed."""
    if case.ranks > 1 and name == SETUP:
        case = replace(case, ranks=1)
    visible = (
        {"CUDA_VISIBLE_DEVICES": ",".join(map(str, range(case.ranks)))}
        if "CUDA_VISIBLE_DEVICES" not in os.environ
        else {}
    )
    command = [
        sys.executable,
        file,
        f"--turn={name}",
        "--case",
        case.name,
        "--size",
        size,
        "--folder",
        str(folder),
        *more,
    ]
    if case.ranks > 1:
        from inheritune.runtime.rendezvous import find_free_port

        shared = {
            "WORLD_SIZE": str(case.ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(find_free_port()),
        }
        shared["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // case.ranks))
        environments = [
            os.environ | visible | shared | {"RANK": str(r), "LOCAL_RANK": str(r)} for r in range(case.ranks)
        ]
    else:
        environments = [os.environ | visible]  # HF Trainer would take every GPU that it sees
    with tempfile.TemporaryDirectory() as said:
        started = []
        for rank, environment in enumerate(environments):
            with open(Path(said) / f"{rank}", "w") as output:
                started.append(
                    subprocess.Popen(
                        command, stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=REPOSITORY
                    )
                )
        ended = _wait(started)
        texts = [(Path(said) / f"{rank}").read_text(errors="replace") for rank in range(len(started))]
    lines = [[line for line in text.splitlines() if line.startswith(MARK)] for text in texts]
    if any(status for _, status, _ in ended) or not all(lines):
        return {"error": _last_words(texts, folder)}
    found = [json.loads(its[-1].removeprefix(MARK)) for its in lines]
    measured = found[0]
    if "cpu_seconds" in measured:
        measured["cpu_seconds"] = sum(one["cpu_seconds"] for one in found)
    return {"peak_mb": round(max(usage.ru_maxrss for _, _, usage in ended) / 1e3 * 1.024, 1)} | measured


def _wait(started: list[subprocess.Popen]) -> list[tuple]:
    """(pid, status, usage) of each process, in order; where one fails or takes too long, the others are
    killed."""
    ended, until = {}, time.monotonic() + PATIENCE_S
    while len(ended) < len(started):
        for process in started:
            if process.pid not in ended and (found := os.wait4(process.pid, os.WNOHANG))[0]:
                ended[process.pid] = found
        if any(status for _, status, _ in ended.values()) or time.monotonic() > until:
            for process in started:
                if process.pid not in ended:
                    os.kill(process.pid, signal.SIGKILL)
        time.sleep(0.05)
    return [ended[process.pid] for process in started]


def _last_words(texts: list[str], folder: Path) -> str:
    """The last line of the first process that ends in an error, without names of this machine."""
    lines = [
        line for text in texts for line in text.splitlines() if line.strip() and not line.startswith(MARK)
    ]
    said = next(
        (line for line in reversed(lines) if re.match(r"[\w.]*(Error|Exit|Exception|Interrupt)\b", line)), ""
    )
    said = said or (lines or ["it said nothing"])[-1]
    for ours in (folder, REPOSITORY, sys.prefix, sys.base_prefix, Path.home()):
        said = said.replace(str(ours), "...")
    return said.replace(socket.gethostname(), "this machine")[:300]


def _judge(goal: Goal, turns: Turns) -> dict:
    """The goal beside what was measured; `met` is None where a contestant is missing."""
    failed = {name for name, its in turns.items() if "error" in its[0]}
    try:
        measured = goal.value(turns)
    except (IndexError, KeyError):
        measured = []
    if not measured:
        return {
            "what": goal.what,
            "at_most": goal.at_most,
            "values": [],
            "met": None,
            "lacks": sorted(failed),
        }
    return {
        "what": goal.what,
        "at_most": goal.at_most and round(goal.at_most, 4),
        "values": [round(value, 4) for value in measured],
        "median": round(median(measured), 4),
        "met": None if goal.at_most is None else median(measured) <= goal.at_most,
    }


def machine() -> dict:
    """Processor, cores, memory, GPU, Python and library versions, commit."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    named = [line.partition(":")[2].strip() for line in info.splitlines() if line.startswith("model name")]
    versions = {}
    for name in (
        "torch",
        "deepspeed",
        "transformers",
        "accelerate",
        "datasets",
        "tiktoken",
        "tokenizers",
        "lm-eval",
    ):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    gpu = ""
    if shutil.which("nvidia-smi"):
        asked = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        gpu = (
            subprocess.run(asked, capture_output=True, text=True, check=False)
            .stdout.strip()
            .replace("\n", ", ")
        )
    from inheritune.training.provenance import git_commit

    return {
        "cpu": named[0] if named else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9),
        "gpu": gpu or None,
        "python": platform.python_version(),
        "versions": versions,
        "commit": git_commit(),
    }


# --- showing ------------------------------------------------------------------------------------------------


def spread(numbers: list[float]) -> str:
    """'1.23 (1.20 to 1.31)': median and range; three significant digits."""
    if len(numbers) == 1:
        return f"{numbers[0]:.3g}"
    return f"{median(numbers):.3g} ({min(numbers):.3g} to {max(numbers):.3g})"


def _short(turn: dict) -> str:
    if "error" in turn:
        return "failed: " + turn["error"].strip().splitlines()[-1][:160]
    return ", ".join(f"{key} {value:.3g}" for key, value in turn.items() if isinstance(value, int | float))


def table_of(results: list[dict]) -> str:
    """Every contestant of the results, in Markdown; what only a GPU has is a column where there is such a
    number."""
    turns = [turn for result in results for its in result["turns"].values() for turn in its]
    columns = {key: head for key, head in COLUMNS.items() if any(key in turn for turn in turns)}
    rows = [row for result in results for row in rows_of(result, columns)]
    return markdown(["part", "contestant", *columns.values()], rows)


def rows_of(result: dict, columns: dict) -> list[list[str]]:
    """A row for each contestant: part, contestant, and the columns."""
    rows, first = [], f"{result['part']}: {result['case']}"
    for name, turns in result["turns"].items():
        measured = [turn for turn in turns if "seconds" in turn]
        found = [[turn[key] for turn in measured if turn.get(key) is not None] for key in columns]
        cells = (
            [spread(numbers) if numbers else "" for numbers in found]
            if measured
            else ["failed"] + [""] * (len(found) - 1)
        )
        rows.append([first, name, *cells])
        first = ""
    return rows


def goal_rows(result: dict) -> list[list[str]]:
    rows = []
    for goal in result["goals"]:
        measured = (
            spread(goal["values"]) if goal["values"] else f"not measured (no {', '.join(goal['lacks'])})"
        )
        bound = "" if goal["at_most"] is None else f"{goal['at_most']:.3g}"
        verdict = {True: "met", False: "missed", None: ""}[goal["met"]]
        rows.append([f"{result['part']}: {result['case']}", goal["what"], bound, measured, verdict])
    return rows


COLUMNS = {"seconds": "seconds", "cpu_seconds": "CPU seconds", "peak_mb": "peak MB of the host"}
COLUMNS |= {"tokens_per_s": "tokens/s", "mfu": "MFU", "gpu_gb": "GPU GB"}
GOAL_HEADS = ["part", "ratio or number", "goal: at most", "measured", ""]


def describe(result: dict) -> str:
    """The tables of one case, and the profile where a goal was missed."""
    parts = [table_of([result])] + ([markdown(GOAL_HEADS, goal_rows(result))] if result["goals"] else [])
    parts += ["where the time goes:\n  " + "\n  ".join(result["profile"])] if result["profile"] else []
    return "\n\n".join(parts) + "\n"


def _store(path: Path, result: dict) -> None:
    """Put `result` into the JSON list at `path`, in the place of an earlier one of that case and size."""
    path.parent.mkdir(parents=True, exist_ok=True)
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    kept = [old for old in before if (old["case"], old["size"]) != (result["case"], result["size"])]
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps([*kept, result], indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)
