"""The verbs, as python-fire calls them. A verb returns nothing, because Fire prints what it returns."""

from inheritune.analysis.thresholds import LENGTH, SEQUENCES
from inheritune.config import values
from inheritune.errors import UserError


class Verbs:
    """Inheritune: small language models from the first layers of larger ones (arXiv 2404.08634).

    EXPERIMENT is the name of a file in recipes/ (quickstart) or the path of a YAML file. Runs and data are
    stored under $INHERITUNE_ROOT. REHEARSE=1, or --rehearse, runs any experiment at small scale."""

    def init(
        self,
        model: str,
        text: str,
        out: str = "mine.yaml",
        revision: str | None = None,
        steps: int | None = None,
    ) -> None:
        """Write an experiment: the first layers of MODEL, trained on TEXT and grown against MODEL itself.

        MODEL: a folder, a GGUF file or a Hub id (--revision: its commit). TEXT: a glob of documents, in
        quotes: 'my/*.txt', also .jsonl and .parquet. All numbers are fitted to model, text and this machine;
        --steps replaces the steps of each run. check, plan, prepare, grow, table, figure and export take the
        file as it is."""
        from inheritune.planning.draft import draft
        from inheritune.runtime.log import set_up_logging

        set_up_logging()
        print(draft(model, text, out, revision, steps))

    def schema(self, out: str | None = None) -> None:
        """Print the JSON Schema of an experiment's file, by which editors complete and check it.

        --out writes it to a file. An editor with the YAML language server uses it where the first line of an
        experiment is: # yaml-language-server: $schema=FILE"""
        from inheritune.config.schema import format_schema, is_schema
        from inheritune.files.outputs import resolve_replaceable
        from inheritune.files.writing import write_text

        if out is None:
            print(format_schema(), end="")
            return
        write_text(resolve_replaceable(out, "schema", is_schema), format_schema())

    def prepare(
        self,
        experiment: str,
        workers: int | None = None,
        part: str | None = None,
        rehearse: bool | None = None,
    ) -> None:
        """Turn the experiment's documents into token shards under data/. A killed prepare resumes.

        --part K/N encodes part K of N of the files, on any machine that sees the data folder; the part that
        ends last joins all into the same shards."""
        from inheritune.config.experiment import load_experiment
        from inheritune.data.prepare import prepare
        from inheritune.runtime.log import set_up_logging

        set_up_logging()
        prepare(load_experiment(experiment, rehearse), workers, part)

    def fetch(
        self, experiment: str, rehearse: bool | None = None, allow_task_code: bool | None = None
    ) -> None:
        """Download what an experiment needs of the Hub into the cache; needs internet.

        First prints how much it is: documents (as many files as the requested tokens need), the tokenizer,
        the models that runs start from, the data of the downstream tasks. --allow-task-code lets the
        experiment's task files run the code that they name."""
        from inheritune.cluster.fetch import fetch
        from inheritune.config.experiment import load_experiment
        from inheritune.runtime.log import set_up_logging

        set_up_logging()
        fetch(load_experiment(experiment, rehearse), bool(allow_task_code))

    def train(
        self,
        experiment: str,
        run: str,
        seed: int = 0,
        stage: int | None = None,
        ds: str | None = None,
        procs: int = 1,
        rehearse: bool | None = None,
    ) -> None:
        """Train one run (or --stage N of a grown run) to its end, from its last checkpoint if there is one.

        --run A,B,C trains several, one after the other: starting takes longer than a small run.
        On many GPUs, start it with srun, torchrun or deepspeed; --procs N starts N processes on this machine.
        torchrun needs two dashes, else it takes --run for its own:
            torchrun --nproc_per_node 8 -m -- inheritune train ..."""
        from inheritune.training.loop import train

        train(experiment, run, seed, stage, ds, rehearse)

    def inherit(
        self,
        source: str,
        out: str,
        layers: str | None = None,
        drop: str | None = None,
        parts: str | None = None,
        modules: str | None = None,
        seed: int = 0,
        revision: str | None = None,
        depth: int | None = None,
        at: int = 0,
        dtype: str | None = None,
    ) -> None:
        """Write an HF checkpoint of chosen layers of SOURCE: --layers 0:16 for the first 16 (half-open).

        SOURCE: a folder with safetensors, .bin or DeepSpeed ZeRO shards, or a Hub id.
        LAYERS: a range, a list (0,2,4), or auto:8, auto:8:influence, auto:8:window: the 8 that a stored
        analysis of SOURCE names by cost, by influence, or around the best window to leave out.
        DROP: instead, what is left out, counted from 0, both ends of a range: 3,7-9.
        PARTS: any of token_embedding, position_embedding, blocks, final_norm, head.
        MODULES: any of attn, mlp, norms, or one of the norms: attn_norm, mlp_norm.
        All other tensors are newly initialized. With --depth 24 --at 15 the layers become blocks 15 and
        following of 24. Tensors keep the source's dtype, or have DTYPE: fp32, bf16 or fp16."""
        from inheritune.cli.chosen_layers import read_layers
        from inheritune.config.run import MODULES, PARTS
        from inheritune.models.surgery import inherit

        chosen = read_layers(source, layers, drop, revision)
        parts_list = parts.split(",") if parts else PARTS
        modules_list = modules.split(",") if modules else MODULES
        inherit(source, chosen, out, parts_list, modules_list, seed, revision, depth, at, dtype=dtype)
        what = layers or f"all but {drop}"
        if isinstance(chosen, list) and layers and layers.startswith("auto:"):
            what = f"{layers} ({','.join(map(str, chosen))})"
        print(f"wrote {out}: layers {what} of {source}")

    def analyze(
        self,
        model: str,
        data: str,
        out: str | None = None,
        sequences: int = SEQUENCES,
        length: int = LENGTH,
        seed: int = 0,
        maps: str | None = None,
        ranks_only: bool | None = None,
        revision: str | None = None,
    ) -> None:
        """Measure and plot attention rank, column mass and cost per layer; suggest how many to inherit.

        The cost of a layer is how much the loss rises without it, without its attention, without its MLP;
        that takes most of the time. --ranks-only leaves it out.
        MODEL: an HF checkpoint or id (--revision: its commit), or the name of a run of DATA.
        DATA: an experiment (its prepared data) or a folder that prepare wrote.
        MAPS: attention maps to keep for plotting, as layer:head from 1, e.g. 4:2,7:3."""
        from inheritune.analysis.analyze import run_analyze
        from inheritune.paper.attention_plots import plot_attention

        try:
            words = maps.split(",") if maps else []
            found = [values.read_numbers(values.LAYERS, pair, ":") for pair in words]
            pairs = [(int(layer) - 1, int(head) - 1) for layer, head in found]
        except ValueError:
            raise UserError(
                f"analyze: --maps takes pairs layer:head, counted from 1, such as 4:2,7:3 (got '{maps}')"
            ) from None
        folder = run_analyze(
            model, data, out, sequences, length, seed, pairs or None, revision, costs=not ranks_only
        )
        print("plots:", *(path.relative_to(folder) for path in plot_attention(folder)), "in", folder)

    def grow(
        self,
        experiment: str,
        run: str,
        seed: int = 0,
        procs: int = 1,
        ds: str | None = None,
        slot: bool | None = None,
        rehearse: bool | None = None,
    ) -> None:
        """Do all that a grown run needs: data, reference, stages 1, 2 ... until parity or the last stage.

        --slot does only the next of these, as one task of a job array."""
        from inheritune.cluster.grow import grow

        grow(experiment, run, seed, procs, ds, bool(slot), rehearse)

    def check(
        self,
        experiment: str,
        run: str | None = None,
        stage: int | None = None,
        seed: int = 0,
        rehearse: bool | None = None,
        ds: str | None = None,
        gpus: str | None = None,
        allow_task_code: bool | None = None,
    ) -> None:
        """Check an experiment, its DeepSpeed JSON (or --ds FILE) and what --run starts from; needs no GPU.

        --gpus 8, or --gpus 1,4,8, shows how the batch is divided over so many GPUs, and what fails there.
        --allow-task-code accepts code that the experiment's task files name."""
        from inheritune.cluster.check import check

        check(experiment, run, stage, seed, rehearse, ds, gpus, bool(allow_task_code))

    def plan(
        self,
        experiment: str,
        run: str | None = None,
        ds: str | None = None,
        gpus: int = 8,
        gpu: str = "H100",
        gpu_memory: int | None = None,
        mfu: float = 0.4,
        json: bool | None = None,
        against: str | None = None,
        rehearse: bool | None = None,
    ) -> None:
        """Print memory per GPU and host, disk, FLOPs and hours of an experiment or of --run; needs no GPU.

        Reports what fits on GPUS of the kind --gpu (--gpu-memory: other GB) and, if nothing does, the
        smallest change of the JSON --ds.
        --json prints JSON for scripts. --against FOLDER of a finished run shows its measurements alongside
        the plan."""
        from inheritune.planning.plan import plan

        plan(experiment, run, ds, gpus, gpu, gpu_memory, mfu, bool(json), against, rehearse)

    def evaluate(
        self,
        experiment: str,
        run: str | None = None,
        model: str | None = None,
        tasks: str | None = None,
        seed: int = 0,
        out: str | None = None,
        procs: int = 1,
        rehearse: bool | None = None,
        allow_task_code: bool | None = None,
        ds: str | None = None,
    ) -> None:
        """Measure validation loss and lm-eval scores of a finished run, or of any checkpoint (--model).

        --run A,B/stage2,C@10000 measures several: runs, a stage of a grown one, weights kept at a step.
        --tasks a,b takes only these of the experiment's tasks, --tasks none only the loss. Each task is saved
        when it is done, and the same command continues. --allow-task-code lets the experiment's task files
        run the code that they name.
        --ds FILE at ZeRO 3 divides the model over the processes, for one that does not fit as a whole; the
        experiment's JSON, if it is at ZeRO 3, does so where there are several. Else each loads a copy."""
        from inheritune.evaluation.evaluate import evaluate

        evaluate(experiment, run, model, tasks, seed, out, rehearse, bool(allow_task_code), ds)

    def table(
        self, item: str, seed: int = 0, rehearse: bool | None = None, missing: bool | None = None
    ) -> None:
        """Print a table of the paper (table5) with this repository's results, or the table of an experiment.

        The results are shown with noise and verdicts.
        --missing prints what has to be run before: verb, experiment, run, the lines it waits for, options;
        also for figures."""
        from inheritune.paper.tables import table

        if drawn := table(item, seed, rehearse, bool(missing)):
            from inheritune.paper.table_plots import plot_cells

            plot_cells(*drawn)

    def figure(self, item: str, seed: int = 0, rehearse: bool | None = None) -> None:
        """Draw a figure of the paper (fig05) with this repository's results, or an experiment's plots."""
        from inheritune.paper.figures import figure

        print("\n".join(str(path) for path in figure(item, seed, rehearse)))

    def report(self, item: str, seed: int = 0, rehearse: bool | None = None, out: str | None = None) -> None:
        """Write one HTML page of an experiment, or of a table or figure of the paper (table5).

        It opens from disk and needs no network: the verdict, the table, curves to zoom into, growth, rank,
        mass and cost per layer, what ran where. Numbers lead to the files that they were read from.
        ITEM can also be the folder of the evidence: recipes/evidence/cpu. --out FILE.html writes the page
        elsewhere, with links from there."""
        from inheritune.paper.report import report

        print(report(item, seed, rehearse, out))

    def export(self, folder: str, to: str, dtype: str | None = None) -> None:
        """Write a finished run (its FOLDER) as a portable checkpoint with tokenizer and model card.

        It is plain GPT-2 or Llama: scaling by layer is folded in, padding of the vocabulary is cut off, and
        the logits are compared. DTYPE is fp32 or bf16, by default that of the model the run started from."""
        from inheritune.evaluation.export import export

        export(folder, to, dtype)

    def status(
        self, experiment: str, seed: int = 0, rehearse: bool | None = None, watch: bool | None = None
    ) -> None:
        """Print every run's state, step, loss, speed, time left, queue, job, last error and next command.

        --watch prints it again every 30 seconds until Ctrl-C."""
        from inheritune.cluster.status import status, watch_status

        (watch_status if watch else status)(experiment, seed, rehearse)

    def submit(self, job: str, words: list | None = None) -> None:
        """Check a job and submit it to Slurm: JOB of slurm/jobs.yaml, or an item of the paper (table5).

        The words after JOB are those of slurm/JOB.sh: `submit JOB --help` lists them. After two dashes come
        options for sbatch. An item takes --seed K: all that it lacks is submitted, with dependencies."""
        from inheritune.submit.login import submit_words

        submit_words(job, list(words or []))

    def queue(self) -> None:
        """Print your Slurm jobs: state, reason for waiting, dependencies, and what each does."""
        from inheritune.submit.control import print_queue

        print_queue()

    def cancel(self, target: str, run: str | None = None, seed: int = 0) -> None:
        """Cancel job TARGET, or the jobs of experiment TARGET (of its --run with --seed)."""
        from inheritune.submit.control import cancel

        cancel(target, run, seed)

    def retry(self, job: str) -> None:
        """Submit JOB, which has left the queue, again as it was asked for: arguments, options, variables."""
        from inheritune.submit.control import retry

        retry(job)

    def verify(self, path: str) -> None:
        """Compare all files of runs and data below PATH with their hashes; exit code 2 if one is damaged."""
        from inheritune.cluster.verify import verify
        from inheritune.runtime.log import make_progress_bar

        verify(path, lambda markers: make_progress_bar(markers, desc="verifying", unit="folder"))

    def sync(self, folder: str) -> None:
        """Send the record of a run that trained offline (its FOLDER's metrics.jsonl) to W&B.

        Repeated, it sends only new rows to the same W&B run. It needs internet and 'wandb login';
        WANDB_MODE=offline writes a segment instead."""
        from inheritune.runtime.log import set_up_logging
        from inheritune.training.mirror import sync

        set_up_logging()
        sync(folder)
