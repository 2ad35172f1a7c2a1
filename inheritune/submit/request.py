"""What the user asks for: a job of slurm/jobs.yaml, its arguments, and sbatch options after two dashes."""

import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from inheritune.cluster.job_records import SWITCHES
from inheritune.config.jobs import JobSpec, load_jobs
from inheritune.config.paths import REPOSITORY
from inheritune.config.values import ARGUMENTS
from inheritune.errors import UserError, suggest_name

VERB_SWITCHES = ("allow_task_code",)
# fmt: off
VALUED = (
    "--array", "-a", "--dependency", "-d", "--output", "-o", "--job-name", "-J", "--time", "-t",
    "--begin", "-b", "--nodes", "-N", "--gpus-per-node", "--gpus", "-G", "--chdir", "-D",
)
# fmt: on
"""Options of sbatch that are read here. Each has a value, which may be a word of its own."""
NO_JOB = {
    "--help": "-h",
    "--usage": "",
    "--version": "-V",
    "--test-only": "",
    "--quiet": "-Q",
    "--wait": "-W",
    "--parsable": "",
}
"""Options of sbatch that queue no job, hide its number, or return only at its end: {name: short name}."""
FLAGS = "HIOVWQhks"
"""sbatch's short options without a value of their own."""


@dataclass(frozen=True)
class Kind:
    """What all jobs of a verb have in common."""

    words: tuple[str, ...]
    """Arguments by position."""
    flags: tuple[str, ...]
    array: str | None = None
    """Tasks of its array; None for a single job, "runs" for one task per run."""
    slots: bool = False
    """Whether the tasks of its array take turns on one run."""
    single: bool = False
    """Whether it runs as one process."""
    cpu_tasks: int = 2
    """Processes where it runs on CPUs and TASKS is not set."""
    local: str = ""
    """What does the same without Slurm."""


_TRAIN = "EXPERIMENT --run RUN [--procs N]"
KINDS = {
    "train": Kind(("experiment", "run"), ("stage", "seed", "ds"), local=f"train {_TRAIN}"),
    "grow": Kind(("experiment", "run"), ("seed", "ds"), "1-12%1", True, local=f"grow {_TRAIN}"),
    "baselines": Kind(("experiment",), ("seed", "ds"), "runs", local=f"train {_TRAIN}"),
    "evaluate": Kind(
        ("experiment",),
        ("run", "seed", "ds", "tasks", "model", "out", "allow_task_code"),
        "runs",
        cpu_tasks=1,
        local="evaluate EXPERIMENT --run RUN [--procs N]",
    ),
    "analyze": Kind(
        ("model", "experiment"),
        ("out", "sequences", "length", "seed", "maps"),
        single=True,
        local="analyze --model MODEL --data EXPERIMENT",
    ),
    "prepare": Kind(
        ("experiment",), ("workers", "parts"), single=True, local="prepare EXPERIMENT [--workers N]"
    ),
}


@dataclass(frozen=True)
class Request:
    """A job as it was asked for."""

    job: JobSpec
    script: str
    """Path of the script that the job runs and that the user calls."""
    words: tuple[str, ...] = ()
    """Its arguments as typed, without what only concerns submitting."""
    values: Mapping[str, str] = field(default_factory=dict)
    """{argument: text}, with those of the job's entry in jobs.yaml."""
    options: tuple[str, ...] = ()
    """Options for sbatch."""
    switches: frozenset[str] = frozenset()

    @property
    def kind(self) -> Kind:
        return KINDS[self.job.verb]

    @property
    def seed(self) -> int:
        return int(self.values.get("seed", 0))

    @property
    def stage(self) -> int | None:
        return int(self.values["stage"]) if "stage" in self.values else None

    @property
    def waits(self) -> bool:
        """Whether the job waits for another, which may make what this one lacks."""
        return bool(read_option(self.options, "--dependency", "-d"))

    @property
    def shares_run(self) -> bool:
        """Whether the tasks of an array would all work on the same run, data or model."""
        is_over_runs = self.kind.array == "runs" and "run" not in self.values
        return not (is_over_runs or "parts" in self.values)

    @property
    def names_files(self) -> bool:
        """Whether an argument is a path outside the repository that counts from this folder."""
        paths = [Path(text) for text in self.values.values()]
        mine = [path for path in paths if path.suffix and not path.is_absolute() and path.exists()]
        return any(not path.resolve().is_relative_to(REPOSITORY) for path in mine)

    def flags(self, *left_out: str) -> list[str]:
        """Return the flags of the verb as words, in the order of its table."""
        found: list[str] = []
        for name in self.kind.flags:
            if name in self.values and name not in left_out:
                flag = f"--{name.replace('_', '-')}"
                found += [flag] if name in VERB_SWITCHES else [flag, self.values[name]]
        return found


def read_request(job: str, argv: list[str], script: str | None = None) -> Request:
    """Return the request for job `job` with the arguments `argv`.

    `script` is the script that the user called, where it is not that of the job. Raises UserError for an
    unknown job, flag or argument, a missing one, and a value of the wrong type."""
    spec = find_spec(job)
    own = argv[: argv.index("--")] if "--" in argv else argv
    reader = _Reader(
        spec, f"usage: bash {shlex.quote(script or f'slurm/{job}.sh')} {format_usage(spec)}", list(own)
    )
    while reader.rest:
        reader.read_word()
    missing = [place for place in reader.kind.words if place not in reader.values]
    if missing and "help" not in reader.switches:
        raise UserError(f"{job} needs {missing[0].upper()}; {reader.usage}")
    options = tuple(argv[len(own) + 1 :])
    check_options(options)
    path, switches = script or str(spec.script), frozenset(reader.switches)
    return Request(spec, path, tuple(reader.words), reader.values, options, switches)


class _Reader:
    """Takes the words of a command line apart, one flag or argument at a time."""

    def __init__(self, spec: JobSpec, usage: str, rest: list[str]):
        self.job, self.kind, self.usage, self.rest = spec.name, KINDS[spec.verb], usage, rest
        own = {name: getattr(spec, name) for name in ("experiment", "run", "stage")}
        self.values = {name: str(value) for name, value in own.items() if value is not None}
        self.fixed = set(self.values)
        self.words: list[str] = []
        self.switches: set[str] = set()

    def read_word(self) -> None:
        """Take the next word, and its value where it has one."""
        word = self.rest.pop(0)
        name = word[2:].replace("-", "_")
        if word in ("-h", "--help"):
            self.switches.add("help")
        elif word.startswith("--") and name in SWITCHES:
            self.switches.add(name)
        elif word.startswith("-"):
            self._read_flag(word)
        else:
            self._read_place(word)

    def _read_place(self, word: str) -> None:
        free = [place for place in self.kind.words if place not in self.values]
        if not free:
            raise UserError(f"{self.job} takes no further argument '{word}'; {self.usage}")
        self.values[free[0]] = word
        self.words.append(word)

    def _read_flag(self, word: str) -> None:
        flag, equals, text = word.partition("=")
        name = flag[2:].replace("-", "_")
        if not word.startswith("--") or name in self.fixed or name not in self.kind.flags:
            known = [f"--{n.replace('_', '-')}" for n in (*self.kind.flags, *SWITCHES) if n not in self.fixed]
            raise UserError(f"{self.job} has no flag {flag}; {suggest_name(flag, known)}")
        if name in self.values:
            raise UserError(f"{self.job}: {flag} is given twice")
        self.words.append(word)
        if name in VERB_SWITCHES:
            text = "True"
        elif not equals and self.rest and not self.rest[0].startswith("--"):
            text = self.rest.pop(0)
            self.words.append(text)
        if not text:
            raise UserError(f"{self.job}: {flag} needs a value")
        self.values[name] = check_value(self.job, name, text)


def check_options(options: Sequence[str]) -> None:
    """Raise UserError for options of sbatch that do not queue one job, and for spellings that are not read
    here: shortened names, and short options joined in one word."""
    for name, _, words in _split_options(options):
        if problem := _explain_option(name, words[0]):
            raise UserError(f"after the two dashes: {problem}")


def _explain_option(name: str, word: str) -> str:
    """Return what is wrong with an option of sbatch, and what to do; empty if nothing is."""
    if word == ":":
        return "':' asks for a job of unlike parts, and all nodes of these jobs are alike; leave it out"
    if name in NO_JOB or (name and name in NO_JOB.values()):
        return f"{name} is no option for a job that is queued and recorded; leave it out"
    known = [n for n in (*VALUED, *NO_JOB) if n.startswith("--")]
    full = [n for n in known if n.startswith(name)] if name.startswith("--") and name not in known else []
    if full and len(name) > 2:
        return f"{name} is a shortened option of sbatch; write it out, as {' or '.join(full)}"
    if word.startswith("-") and word[1:2] in FLAGS and word[2:]:
        return f"{word} joins several options of sbatch; write them apart, as {word[:2]} -{word[2:]}"
    return ""


def find_spec(job: str) -> JobSpec:
    """Return the job called `job`. Raises UserError if there is none."""
    if job not in load_jobs():
        raise UserError(f"there is no job '{job}' in slurm/jobs.yaml; {suggest_name(job, load_jobs())}")
    return load_jobs()[job]


def check_value(job: str, name: str, text: str) -> str:
    """Return `text`. Raises UserError if it is not the number that argument `name` takes."""
    if name in ARGUMENTS:
        try:
            ARGUMENTS[name].read(text)
        except ValueError as problem:
            raise UserError(f"{job}: --{name} {problem} (got '{text}')") from None
    return text


def format_usage(spec: JobSpec) -> str:
    """Return the arguments of a job's script in one line."""
    kind = KINDS[spec.verb]
    fixed = {name for name in ("experiment", "run", "stage") if getattr(spec, name) is not None}
    words = [name.upper() for name in kind.words if name not in fixed]
    names = [name for name in kind.flags if name not in fixed]
    flags = [
        f"[--{name.replace('_', '-')}{'' if name in VERB_SWITCHES else ' ' + name.upper()}]" for name in names
    ]
    return " ".join([*words, *flags, "[--rehearse] [--dry-run] [--no-snapshot] [-- SBATCH OPTIONS]"])


def describe_job(job: str) -> str:
    """Return the text of `bash slurm/JOB.sh --help`."""
    spec = find_spec(job)
    gpus = f"{spec.gpus} GPUs" if spec.gpus else "CPUs only"
    lines = [
        f"bash slurm/{job}.sh {format_usage(spec)}",
        "",
        spec.about,
        f"{gpus}; GPUS=N, NODES=N, TASKS=N, ARRAY=1-12%1 or no, REHEARSE=1 and the SITE_ variables of "
        "slurm/site.sh change the shape; FORCE=1 submits though the same is queued.",
        f"Without Slurm: python -m inheritune {format_local(spec)}",
    ]
    return "\n".join(lines)


def format_local(spec: JobSpec) -> str:
    """Return what does the same without Slurm, as the words after `python -m inheritune`."""
    line = KINDS[spec.verb].local
    for name in ("experiment", "run"):
        line = line.replace(name.upper(), getattr(spec, name) or name.upper())
    return line + (f" --stage {spec.stage}" if spec.stage else "")


def make_again(request: Request, environment: Mapping[str, str]) -> str:
    """Return the line to paste that asks for the same again, with the shape and without dependencies.

    Where a relative path is in it, it goes to this folder first."""
    names, words = ("REHEARSE", "SITE", "GPUS", "NODES", "TASKS", "ARRAY"), [*request.words]
    shape = [f"{name}={shlex.quote(environment[name])}" for name in names if environment.get(name)]
    if "rehearse" in request.switches and not environment.get("REHEARSE"):
        shape.append("REHEARSE=1")
    if "no_snapshot" in request.switches:
        words.append("--no-snapshot")
    usual = load_jobs()[request.job.name].gpus
    if request.job.gpus != usual and not environment.get("GPUS"):
        shape.append(f"GPUS={request.job.gpus}")
    kept = drop_option(request.options, "--dependency", "-d")
    line = ["bash", request.script, *words, *(["--", *kept] if kept else [])]
    moved = [f"cd {shlex.quote(os.getcwd())} &&"] if request.names_files else []
    return " ".join([*moved, *shape, shlex.join(line)])


def is_set(environment: Mapping[str, str], name: str) -> bool:
    """Return whether a variable that switches something on is set."""
    return environment.get(name, "0") not in ("", "0")


def read_option(options: Sequence[str], *names: str) -> str:
    """Return the value of the last of sbatch's `options` called `names`; empty if there is none."""
    found = [value for name, value, _ in _split_options(options) if name in names]
    return found[-1] if found else ""


def drop_option(options: Sequence[str], *names: str) -> list[str]:
    """Return sbatch's `options` without those called `names`."""
    kept = [words for name, _, words in _split_options(options) if name not in names]
    return [word for words in kept for word in words]


def _split_options(options: Sequence[str]) -> Iterator[tuple[str, str, Sequence[str]]]:
    """Yield (name, value, its words) of each of sbatch's options: --name=value, --name value, -n value or
    -nvalue. The value of an option that is not in VALUED, in a word of its own, is an option for itself."""
    position = 0
    while position < len(options):
        word = options[position]
        name, equals, value = word.partition("=")
        if not word.startswith("--"):
            name, value = word[:2], word[2:]
            equals = value
        size = 2 if name in VALUED and not equals and position + 1 < len(options) else 1
        yield name, value if size == 1 else options[position + 1], options[position : position + size]
        position += size


def make_command(request: Request) -> list[str]:
    """Return the verb that the job's tasks run, as the words after `python -m inheritune`."""
    values, verb = request.values, request.job.verb
    if verb == "analyze":
        return ["analyze", "--model", values["model"], "--data", values["experiment"], *request.flags()]
    if verb == "grow":
        return ["grow", values["experiment"], "--run", values["run"], "--slot", *request.flags()]
    words = ["train" if verb == "baselines" else verb, values["experiment"]]
    if verb in ("train", "baselines"):
        words += ["--run", values.get("run", "")]
    if "parts" in values:  # one task of the array each
        words += ["--part", f"{values.get('task', 'TASK')}/{values['parts']}"]
    return [*words, *request.flags("parts")]


def name_job(script: Path, words: tuple[str, ...], rehearsal: bool) -> str:
    """Return the name of a job in the queue: its script and arguments, in characters that Slurm shows."""
    parts = [script.stem]
    for word in words:
        last = word.removeprefix("--").rpartition("/")[2]
        parts.append(last.removesuffix(".yaml"))
    name = "-".join([*parts, *(["rehearsal"] if rehearsal else [])])
    return "".join(c if c.isascii() and (c.isalnum() or c in "_.-") else "_" * len(c.encode()) for c in name)
