"""The command line: `inheritune VERB`. Verbs import what they need when they run, so that --help is instant.

python-fire calls a verb before it looks at the flags it does not know, and returns what a verb returns on
every rank; so flags are checked here first, and verbs return nothing.
"""

import inspect
import os
import sys
import time
import traceback

from inheritune.config import environment, values
from inheritune.errors import Stopped, UserError, nearest
from inheritune.runtime import dist, launcher, signals, streams

SAVING = ("train", "prepare", "grow", "evaluate")
"""Verbs that save and leave when they are asked to."""
PRINTING = ("check", "plan", "status", "table", "verify")
"""Verbs whose result is what they print."""
SWITCHES = ("rehearse", "slot", "json", "missing", "allow_task_code")


class Verbs:
    """Inheritune: small language models from the first layers of larger ones (arXiv 2404.08634).

    EXPERIMENT is the name of a file in recipes/ (quickstart) or the path of a YAML file. Runs and data lie
    under $INHERITUNE_ROOT. REHEARSE=1, or --rehearse, runs any experiment in small."""

    def prepare(self, experiment, workers=None, rehearse=None):
        """Turn the experiment's documents into token shards under data/. A killed prepare goes on where it
        was."""
        from inheritune.config.experiment import load_experiment
        from inheritune.data.prepare import prepare
        from inheritune.runtime.log import setup

        setup()
        prepare(load_experiment(experiment, rehearse), workers)

    def fetch(self, experiment, rehearse=None, allow_task_code=None):
        """Download what an experiment needs of the Hub into the cache, where there is internet; first says
        how much it is.

        Documents (as many files as the tokens asked for need), the tokenizer, the models that its runs start
        from, the data of its downstream tasks. --allow-task-code lets the experiment's task files run the
        code that they name."""
        from inheritune.cluster.fetch import fetch
        from inheritune.config.experiment import load_experiment
        from inheritune.runtime.log import setup

        setup()
        fetch(load_experiment(experiment, rehearse), bool(allow_task_code))

    def train(self, experiment, run, seed=0, stage=None, ds=None, procs=1, rehearse=None):
        """Train one run (or --stage N of a grown run) to its end; goes on from the last checkpoint if there
        is one.

        --run A,B,C trains several, one after the other: the start-up takes longer than a small run.
        Start it with srun, torchrun or deepspeed on many GPUs, or give --procs N for N processes on this
        machine. torchrun needs two dashes, else it takes --run for its own: torchrun --nproc_per_node 8 -m --
        inheritune train ..."""
        from inheritune.training.loop import train

        train(experiment, run, seed, stage, ds, rehearse)

    def inherit(self, source, layers, out, parts=None, modules=None, seed=0, revision=None, depth=None, at=0):
        """Write an HF checkpoint of the chosen layers of SOURCE, e.g. --layers 0:16 for the first 16
        (half-open).

        SOURCE: a folder with safetensors, .bin or DeepSpeed ZeRO shards, or a Hub id. PARTS: any of
        token_embedding, position_embedding, blocks, final_norm, head; MODULES: any of attn, mlp, norms, or of
        the norms one: attn_norm, mlp_norm. The rest starts fresh. With --depth 24 --at 15 they become blocks
        15 on of 24; the others start fresh."""
        from inheritune.config.experiment import MODULES, PARTS
        from inheritune.models.surgery import inherit

        def split(words, default):
            return words.split(",") if words else default

        try:
            chosen = values.read_numbers(values.LAYER, layers) if "," in layers else layers
        except ValueError as problem:
            raise UserError(
                f"inherit: --layers as a list {problem} for each layer, as in 0,2,4 (got '{layers}')"
            ) from None
        inherit(source, chosen, out, split(parts, PARTS), split(modules, MODULES), seed, revision, depth, at)
        print(f"wrote {out}: layers {layers} of {source}")

    def analyze(self, model, data, out=None, sequences=100, length=100, seed=0, maps=None):
        """Measure attention rank and column mass per layer; draw them; suggest how many layers to inherit.

        MODEL: an HF checkpoint or id, or the name of a run of DATA; DATA: an experiment (its prepared data)
        or a folder that prepare wrote. MAPS: attention maps to keep for drawing, as layer:head from 1, e.g.
        4:2,7:3."""
        from inheritune.analysis.attention import run_analyze
        from inheritune.paper.figures import plot_attention

        try:
            found = (
                [values.read_numbers(values.LAYERS, pair, ":") for pair in maps.split(",")] if maps else []
            )
            pairs = [(layer - 1, head - 1) for layer, head in found] or None
        except ValueError:
            raise UserError(
                f"analyze: --maps takes pairs layer:head, counted from 1, such as 4:2,7:3 (got '{maps}')"
            ) from None
        folder = run_analyze(model, data, out, sequences, length, seed, pairs)
        print("plots:", *(path.relative_to(folder) for path in plot_attention(folder)), "in", folder)

    def grow(self, experiment, run, seed=0, procs=1, ds=None, slot=None, rehearse=None):
        """Everything a grown run needs, in order: data, reference, stage 1, stage 2 ... until parity or the
        last stage.

        --slot does only the next of these, as one task of a job array."""
        from inheritune.cluster.grow import grow

        grow(experiment, run, seed, procs, ds, bool(slot), rehearse)

    def check(
        self,
        experiment,
        run=None,
        stage=None,
        seed=0,
        rehearse=None,
        ds=None,
        gpus=None,
        allow_task_code=None,
    ):
        """Whether an experiment, its DeepSpeed JSON (or --ds FILE) and what --run starts from are sound;
        takes no GPU.

        --gpus 8, or --gpus 1,4,8, shows how the batch is cut over so many GPUs and what goes wrong there.
        --allow-task-code passes over code that the experiment's task files name."""
        from inheritune.cluster.grow import check

        check(experiment, run, stage, seed, rehearse, ds, gpus, bool(allow_task_code))

    def plan(
        self,
        experiment,
        run=None,
        ds=None,
        gpus=8,
        gpu="H100",
        gpu_memory=None,
        mfu=0.4,
        json=None,
        against=None,
        rehearse=None,
    ):
        """Memory of each GPU and host, disk, FLOPs and hours of an experiment, or of one --run, before it
        queues; needs no GPU.

        Says what fits on GPUS of the kind --gpu (--gpu-memory: other GB) and, if not, the smallest change of
        the JSON --ds.
        --json for scripts; --against FOLDER of a finished run shows what it measured beside what was
        planned."""
        from inheritune.planning.plan import plan

        plan(experiment, run, ds, gpus, gpu, gpu_memory, mfu, bool(json), against, rehearse)

    def evaluate(
        self,
        experiment,
        run=None,
        model=None,
        tasks=None,
        seed=0,
        out=None,
        procs=1,
        rehearse=None,
        allow_task_code=None,
    ):
        """Validation loss of a finished run, or of any checkpoint (--model), and the scores of the
        experiment's lm-eval tasks.

        --run A,B/stage2,C@10000 measures several: runs, a stage of a grown one, weights kept at a step.
        --tasks a,b takes only these tasks, --tasks none only the loss. Each task is saved as it ends; the
        same command goes on. --allow-task-code lets the experiment's task files run the code that they
        name."""
        from inheritune.evaluation.evaluate import evaluate

        evaluate(experiment, run, model, tasks, seed, out, rehearse, bool(allow_task_code))

    def table(self, item, seed=0, rehearse=None, missing=None):
        """A table of the paper (table5): ours beside theirs, with noise and verdicts; or that of an
        experiment.

        --missing prints what has to be run before: verb, experiment, run, the lines it waits for, options;
        for figures too."""
        from inheritune.paper.tables import table

        if drawn := table(item, seed, rehearse, bool(missing)):
            from inheritune.paper.figures import plot_cells

            plot_cells(*drawn)

    def figure(self, item, seed=0, rehearse=None):
        """A figure of the paper (fig05), its data beside ours; or the plots of an experiment."""
        from inheritune.paper.figures import figure

        print("\n".join(str(path) for path in figure(item, seed, rehearse)))

    def export(self, folder, to, dtype=None):
        """Write a finished run (its FOLDER) as a plain checkpoint with tokenizer and model card.

        DTYPE is fp32 or bf16, by default that of the model which the run started from.
        Plain GPT-2 or Llama for any program: scaling by layer folded in, padding of the vocabulary cut off,
        logits compared."""
        from inheritune.evaluation.export import export

        export(folder, to, dtype)

    def status(self, experiment, seed=0, rehearse=None):
        """Where every run of an experiment stands: state, step, loss, speed, time left, job, last error, next
        command."""
        from inheritune.cluster.status import status

        status(experiment, seed, rehearse)

    def verify(self, path):
        """Compare every file of runs and data below PATH with the hashes in its marker; exit code 2 if one is
        damaged."""
        from inheritune.cluster.status import verify
        from inheritune.runtime.log import progress

        verify(path, lambda markers: progress(markers, desc="verifying", unit="folder"))

    def sync(self, folder):
        """Send the record of a run that trained offline (its FOLDER's metrics.jsonl) to one W&B run; again,
        only new rows.

        Where there is internet and 'wandb login' was done; WANDB_MODE=offline writes a segment instead."""
        from inheritune.runtime.log import setup
        from inheritune.training.record import sync

        setup()
        sync(folder)


def main(argv: list[str]) -> int:
    """Run one verb. Exit code 0, 2 for a user's mistake, told in one sentence, or 130 after a Ctrl-C."""
    argv = [
        word for word in argv if not word.startswith("--local_rank=")
    ]  # the deepspeed launcher's; so says the environment
    os.umask(
        os.umask(0o022) | 0o002
    )  # what a run loads again is never for everyone to write; a group may be let in
    try:
        code = choose(argv)
    except KeyboardInterrupt:
        code = signals.INTERRUPTED
    except Exception as error:
        code = report(error)
    return signals.INTERRUPTED if code == 0 and signals.is_interrupted() else code


def choose(argv: list[str]) -> int:
    """Run the verb that a command line names, or print its help; the exit code."""
    verbs = {name: f for name, f in inspect.getmembers(Verbs, inspect.isfunction) if not name.startswith("_")}
    asks_help = "-h" in argv or "--help" in argv
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(overview(verbs))
        return check_printed()
    verb = argv[0]
    if verb not in verbs:
        raise UserError(f"unknown verb '{verb}'; {nearest(verb, verbs)}")
    if asks_help:
        print(f"python -m inheritune {verb} {usage(verbs[verb])}\n\n{inspect.getdoc(verbs[verb])}")
        return check_printed()
    check_here()
    code = run(verb, bind(verb, verbs[verb], argv[1:]), argv)
    return check_printed() if verb in PRINTING and code == 0 else code


def check_here() -> None:
    """Raises UserError if the current folder was deleted: relative paths mean nothing there, and libraries
    fail in their own words."""
    try:
        os.getcwd()
    except FileNotFoundError:
        raise UserError("the current folder is gone; cd to one that exists, and start again") from None


def check_printed() -> int:
    """0. Raises UserError if what was printed could not be written, where it is all that was asked for."""
    if error := streams.unwritten():
        raise UserError(f"standard output cannot be written ({error.strerror})")
    return 0


def report(error: Exception) -> int:
    """Tell the user and the job's script why the verb did not come to its end; the exit code."""
    if isinstance(error, Stopped):
        try:
            if dist.rank() == 0:
                print(f"inheritune: {error}", flush=True)
                dist.tell_stopped(error)
            return 0
        except UserError as untold:
            error = untold
    if not isinstance(error, UserError):
        traceback.print_exception(error)
        dist.tell_failure(f"{type(error).__name__}: {error}")
        return 1
    if dist.rank() == 0 or isinstance(error, dist.NodeError):
        print(f"inheritune: {error}", file=sys.stderr, flush=True)
        dist.tell_failure(str(error), 2)
    else:
        time.sleep(3)  # srun --kill-on-bad-exit would end rank 0 before it has spoken
    return 2


def bind(verb: str, function, argv: list[str]) -> dict:
    """{argument: value} of a verb's command line, every flag and value checked; the environment's numbers
    too, some of which are read only hours later.

    Raises UserError for an unknown, repeated or missing argument, and for a value that is not of the
    argument's kind."""
    environment.check()
    parameters = {name: p for name, p in inspect.signature(function).parameters.items() if name != "self"}
    positional = [name for name, p in parameters.items() if p.default is p.empty]
    found, rest = {}, list(argv)
    while rest:
        word = rest.pop(0)
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            name = name.replace("-", "_")
            if name not in parameters:
                flags = [f"--{p.replace('_', '-')}" for p in parameters]
                raise UserError(f"{verb} has no flag --{name}; {nearest('--' + name, flags)}")
            if name in SWITCHES and not equals:
                value = "True"
            elif not equals:
                value = rest.pop(0) if rest and not rest[0].startswith("--") else ""
        else:
            name, value = next((p for p in positional if p not in found), None), word
            if name is None:
                raise UserError(
                    f"{verb} takes no further argument '{word}'; usage: python -m inheritune {verb} "
                    f"{usage(function)}"
                )
        if not value:
            raise UserError(f"{verb}: --{name} needs a value")
        if name in found:
            raise UserError(f"{verb}: --{name} is given twice")
        found[name] = typed(verb, name, value)
    missing = [name for name in positional if name not in found]
    if missing:
        raise UserError(
            f"{verb} needs {missing[0].upper()}; usage: python -m inheritune {verb} {usage(function)}"
        )
    return found


def typed(verb: str, name: str, text: str):
    """The value of an argument: a number, or True or False of a switch; else the text itself, since names,
    paths and layer ranges may look like numbers (1e3, 0:4). Raises UserError if it is not of the argument's
    kind."""
    flag = f"{verb}: --{name.replace('_', '-')}"
    if name in SWITCHES:
        if text.lower() not in values.TRUTHS:
            raise UserError(f"{flag} is given alone, or with true or false (got '{text}')")
        return values.TRUTHS[text.lower()]
    if name not in values.ARGUMENTS or (verb, name) == ("check", "gpus"):  # that is a list
        return text
    try:
        return values.ARGUMENTS[name].read(text)
    except ValueError as problem:
        shown = f"'{text}'" if str(problem).startswith("takes") else text
        raise UserError(f"{flag} {problem} (got {shown})") from None


def run(verb: str, arguments: dict, argv: list[str]) -> int:
    """Call the verb, and say it in a sentence where a limit of the machine is met."""
    try:
        return call(verb, arguments, argv)
    except (
        Exception
    ) as error:  # after which other ranks may be in a collective; not so if all were asked to stop
        dist.stop() if isinstance(error, Stopped) else None
        if limit := dist.limit_error(error):
            raise limit from None
        raise


def call(verb: str, arguments: dict, argv: list[str]) -> int:
    """Call the verb through Fire, or start it as several processes where --procs asks for them."""
    if verb in SAVING:
        signals.listen()
    else:
        signals.raise_interrupts()
    procs = launcher.count_processes(verb, arguments.get("procs"), os.environ)
    if procs > 1:
        from inheritune.cluster.grow import launch

        return launch(argv, procs)
    import fire

    fire.Fire(
        Verbs(),
        command=[verb, *(f"--{name}={value!r}" for name, value in arguments.items())],
        name="inheritune",
    )
    dist.stop()
    return 0


def usage(function) -> str:
    """E.g. 'EXPERIMENT --run RUN [--seed 0]'."""
    words = []
    for name, parameter in inspect.signature(function).parameters.items():
        if name != "self":
            flag, value = (
                name.replace("_", "-"),
                name.upper() if parameter.default is None else parameter.default,
            )
            if name in ("experiment", "item", "folder"):
                words.append(name.upper())
            elif parameter.default is parameter.empty:
                words.append(f"--{flag} {name.upper()}")
            else:
                words.append(f"[--{flag}]" if name in SWITCHES else f"[--{flag} {value}]")
    return " ".join(words)


def overview(verbs: dict) -> str:
    lines = [inspect.getdoc(Verbs), "", "python -m inheritune VERB ... (VERB --help tells more)", ""]
    lines += [f"  {name:10} {inspect.getdoc(function).splitlines()[0]}" for name, function in verbs.items()]
    return "\n".join(lines)


def leave(code: int) -> None:
    """End this process."""
    if code == signals.INTERRUPTED:
        sys.stdout.flush(), sys.stderr.flush()
        signals.leave_interrupted()
    if (
        "torch.distributed" in sys.modules
    ):  # torch's own threads abort a process at its exit now and then, work done
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def run_command() -> None:
    """Run the verb of this process's command line, and end the process."""
    streams.guard()
    leave(main(sys.argv[1:]))
