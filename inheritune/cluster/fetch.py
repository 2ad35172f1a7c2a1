"""`fetch EXPERIMENT`: everything of the Hub that an experiment needs, into the local cache, where there is
internet.

`wanted` lists the files (documents as far as the token budget goes, tokenizer, the models that runs start
from or evaluate) with their sizes; `fetch` shows that beside the free space, and only then downloads what the
cache does not have.
"""

import math
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.hf_api import RepoFile
from tabulate import tabulate

from inheritune.config.experiment import Experiment
from inheritune.data.documents import Source
from inheritune.data.tokens import bpe_size, keep_gpt2, load_tokenizer, on_the_hub
from inheritune.errors import UserError
from inheritune.evaluation.downstream import load_tasks
from inheritune.evaluation.taskcode import refuse_task_code
from inheritune.files.escape import markdown
from inheritune.files.hub import hub_errors
from inheritune.files.rundir import data_dir, free_bytes, more_room
from inheritune.models.sources import COMMON_FILES, WEIGHTS, download_model, weight_patterns
from inheritune.runtime.log import logger

BYTES_PER_TOKEN = 8
"""An estimate on the safe side: English text has 4 to 5 bytes a token, JSONL a little more. Parquet and
packed files count half: the Hub's hold 2 to 3 bytes a token, other columns included."""
SPARE_BYTES = 64 << 20  # left free: the cache's own records, a file system's blocks


@dataclass
class Repository:
    """What is needed of one repository of the Hub: {file: bytes}, and which of these files are in the
    cache."""

    what: str
    kind: str
    name: str
    revision: str | None
    files: dict[str, int] = field(default_factory=dict)
    cached: set[str] = field(default_factory=set)

    @property
    def page(self) -> str:
        return f"datasets/{self.name}" if self.kind == "dataset" else self.name

    def missing(self) -> dict[str, int]:
        return {file: size for file, size in self.files.items() if file not in self.cached}

    def in_cache(self, file: str) -> Path | None:
        """The file's path in the cache, or None."""
        found = huggingface_hub.try_to_load_from_cache(
            self.name, file, repo_type=self.kind, revision=self.revision
        )
        return Path(found) if isinstance(found, str) else None

    def add(self, names: list[str]) -> None:
        """Add files, with the sizes that the cache or else the Hub says. Raises UserError if one is in
        neither."""
        paths = {name: self.in_cache(name) for name in names}
        self.files |= {name: path.stat().st_size for name, path in paths.items() if path}
        self.cached |= {name for name, path in paths.items() if path}
        unknown = [name for name in names if name not in self.files]
        for start in range(0, len(unknown), 500):  # names in one request
            with hub_errors(f"the file sizes of {self.name}@{self.revision}", self.page):
                told = huggingface_hub.HfApi().get_paths_info(
                    self.name, unknown[start : start + 500], repo_type=self.kind, revision=self.revision
                )
            self.files |= {entry.path: entry.size for entry in told if isinstance(entry, RepoFile)}
        lost = [name for name in names if name not in self.files]
        if lost:
            raise UserError(
                f"{self.name} at {self.revision} has no file {lost[0]}; correct the experiment, or its "
                f"revision"
            )


def wanted(experiment: Experiment) -> list[Repository]:
    """The repositories that `prepare` and every run of the experiment read, documents first.

    Raises UserError if the Hub cannot be asked, or has not what the experiment names."""
    data, found = experiment.data, []
    if data.source == "hub":
        documents = Repository("documents", "dataset", data.repo, data.revision)
        for group, names in Source(data, data_dir(experiment)).groups.items():
            documents.add(names)
            share = data.weights[group] / sum(data.weights.values()) if data.weights else 1.0
            # a random split counts the documents of all files first
            tokens = data.max_tokens * share if data.max_tokens and not data.validation.fraction else math.inf
            for name in names[enough(documents.files, names, tokens) :]:
                del documents.files[name]
        documents.cached &= documents.files.keys()
        found.append(documents)
    models = {}
    for run in experiment.runs.values():
        for source, revision in run.sources():
            local = source in experiment.runs or Path(source).expanduser().is_dir()
            if not local and not experiment.rehearsal:  # a rehearsal has a stand-in
                models[source, revision] = Repository("model", "model", source, revision)
    for model in models.values():
        model.add(model_files(model))
    place, revision = on_the_hub(data.tokenizer), data.tokenizer_revision
    if place and (place[0], revision) not in models:  # a model brings its tokenizer along
        found.append(Repository("tokenizer", "model", place[0], revision))
        found[-1].add([place[1]])
    return found + list(models.values())


def enough(sizes: dict[str, int], names: list[str], tokens: float) -> int:
    """How many of `names`, from the first, hold `tokens` tokens by the estimate (BYTES_PER_TOKEN); all, if
    they do not."""
    have = 0.0
    for count, name in enumerate(names):
        if have > tokens:
            return count
        plain = name.endswith((".jsonl", ".txt"))
        have += sizes[name] / (BYTES_PER_TOKEN if plain else BYTES_PER_TOKEN / 2)
    return len(names)


def model_files(model: Repository) -> list[str]:
    """Names of the weights (safetensors, or .bin where there are none), configs and tokenizer files of a
    model."""
    with hub_errors(f"the listing of {model.name}@{model.revision or 'main'}", model.page):
        listed = huggingface_hub.HfApi().list_repo_files(model.name, revision=model.revision)
    for stem, suffix in WEIGHTS:
        weights = [
            name for name in listed if any(fnmatchcase(name, p) for p in weight_patterns(stem, suffix))
        ]
        if weights:
            return [
                name for pattern in COMMON_FILES for name in listed if fnmatchcase(name, pattern)
            ] + weights
    raise UserError(
        f"{model.name} holds neither model.safetensors nor pytorch_model.bin in its first folder; use "
        f"another model"
    )


def fetch(experiment: Experiment, allow_task_code: bool = False) -> None:
    """Print what the experiment needs and what of it is missing, then download that. A killed fetch goes on
    with the first file that the cache has not whole.

    Raises UserError, before anything is downloaded, if there is no room, no internet, a licence to accept
    first, or code in task files that is not allowed."""
    refuse_task_code(experiment.evaluate.task_files, allow_task_code)
    repositories = wanted(experiment)
    if repositories:
        print(table(repositories), flush=True)
        check_room(sum(size for one in repositories for size in one.missing().values()))
    for one in repositories:
        for file in list(one.missing())[
            :1
        ]:  # asks for the file's head: a gated repository lists its files to everyone
            with hub_errors(f"{file} of {one.name}", one.page):
                huggingface_hub.hf_hub_download(
                    one.name, file, repo_type=one.kind, revision=one.revision, dry_run=True
                )
    if bpe_size(experiment.data.tokenizer) is None:  # one that is trained on the documents needs no download
        tokenizer = load_tokenizer(experiment.data)
        if experiment.data.tokenizer == "gpt2":  # which is not on the Hub
            keep_gpt2(tokenizer)
    taken = 0
    for one in repositories:
        for number, (file, size) in enumerate(one.missing().items(), 1):
            logger.info(
                "%s: file %d of %d, %s (%s)", one.name, number, len(one.missing()), file, in_units(size)
            )
            with hub_errors(f"{file} of {one.name}", one.page):
                huggingface_hub.hf_hub_download(one.name, file, repo_type=one.kind, revision=one.revision)
            taken += 1
        if one.what == "model":
            download_model(
                one.name, one.revision
            )  # finds every file there; leaves the listing that it needs offline
    tasks = experiment.evaluate
    load_tasks(
        tasks.tasks, tasks.task_files, allow_task_code
    )  # lm-eval keeps their data where it will look for it
    files = sum(len(one.files) for one in repositories)
    print(
        f"{files} files of {experiment.name} are in the cache: {taken} downloaded, {files - taken} were there"
    )


def table(repositories: list[Repository]) -> str:
    """What is needed, a row per repository and the sum, with the free space of the cache."""
    rows = [
        [
            markdown(f"{one.what}: {one.name}@{(one.revision or 'main')[:8]}"),
            len(one.files),
            sum(one.files.values()),
            len(one.cached),
            sum(one.missing().values()),
        ]
        for one in repositories
    ]
    rows.append(["in all", *(sum(column) for column in list(zip(*rows, strict=True))[1:])])
    cells = [
        [name, files, in_units(size), cached, in_units(missing)]
        for name, files, size, cached, missing in rows
    ]
    text = tabulate(
        cells, headers=["from the Hub", "files", "size", "in the cache", "to download"], tablefmt="github"
    )
    estimate = (
        f"How many files of documents hold max_tokens is an estimate: {BYTES_PER_TOKEN} bytes a token of "
        f"plain text, "
        f"{BYTES_PER_TOKEN // 2} of parquet or packed text, about a third more than usual."
    )
    where, free = free_space()
    return f"{text}\n{estimate}\nFree in {where}: {in_units(free)}"


def free_space() -> tuple[Path, int]:
    """(the Hub's cache, bytes free there)."""
    cache = Path(constants.HF_HUB_CACHE)
    return cache, free_bytes(cache)


def check_room(need: int) -> None:
    """Raises UserError if the cache's disk has not `need` bytes and a little."""
    cache, free = free_space()
    if need and free < need + SPARE_BYTES:
        raise UserError(
            f"{in_units(need)} are to be downloaded, but {cache} has {in_units(free)} free; "
            f"{more_room(cache)}"
        )


def in_units(size: float) -> str:
    """Bytes as kB, MB, GB (powers of 1000, as the Hub's pages show them)."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"
