"""`fetch EXPERIMENT`: download everything of the Hub that an experiment needs into the local cache.

`list_repositories` lists the files with their sizes: documents as far as the token budget goes, the
tokenizer, the models that runs start from or evaluate. `fetch` prints them with the free space, and then
downloads what the cache lacks.
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
from inheritune.config.units import format_bytes
from inheritune.data.bpe_training import parse_bpe_size
from inheritune.data.documents import Corpus
from inheritune.data.gpt2_tokenizer import Gpt2Tokenizer, save_gpt2_ranks
from inheritune.data.sentencepiece_tokenizer import parse_hub_model
from inheritune.data.tokenizer_loading import load_tokenizer
from inheritune.errors import UserError
from inheritune.evaluation.downstream import load_tasks
from inheritune.evaluation.taskcode import refuse_task_code
from inheritune.files.escape import escape_markdown
from inheritune.files.hub import translate_hub_errors
from inheritune.files.rundir import get_data_dir
from inheritune.files.storage import check_free_space, count_free_bytes
from inheritune.models.downloads import COMMON_FILES, download_model
from inheritune.models.weight_files import WEIGHTS, list_weight_patterns
from inheritune.runs.pins import read_pin
from inheritune.runtime.log import logger

BYTES_PER_TOKEN = 8
"""A high estimate: English text has 4 to 5 bytes a token, JSONL a little more. Parquet and packed files are
estimated at half: those of the Hub have 2 to 3 bytes a token, other columns included."""
RESERVE_BYTES = 64 << 20
"""Space kept free for the cache's own records and the file system's blocks."""
NAMES_PER_REQUEST = 500


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
        """Path of its page on the Hub."""
        return f"datasets/{self.name}" if self.kind == "dataset" else self.name

    def missing(self) -> dict[str, int]:
        """Return {file: bytes} of the files that are not in the cache."""
        return {file: size for file, size in self.files.items() if file not in self.cached}

    def find_cached(self, file: str) -> Path | None:
        """Return the file's path in the cache, or None."""
        found = huggingface_hub.try_to_load_from_cache(
            self.name, file, repo_type=self.kind, revision=self.revision
        )
        return Path(found) if isinstance(found, str) else None

    def add(self, names: list[str]) -> None:
        """Add files, with their sizes in the cache or else on the Hub.

        One request asks for NAMES_PER_REQUEST sizes. snapshot_download(dry_run=True) of huggingface_hub 2.4
        sends one request per file, and fails for a gated repository before its sizes can be printed. Raises
        UserError if a file is in neither."""
        paths = {name: self.find_cached(name) for name in names}
        self.files |= {name: path.stat().st_size for name, path in paths.items() if path}
        self.cached |= {name for name, path in paths.items() if path}
        unknown = [name for name in names if name not in self.files]
        for start in range(0, len(unknown), NAMES_PER_REQUEST):
            with translate_hub_errors(f"the file sizes of {self.name}@{self.revision}", self.page):
                entries = huggingface_hub.HfApi().get_paths_info(
                    self.name,
                    unknown[start : start + NAMES_PER_REQUEST],
                    repo_type=self.kind,
                    revision=self.revision,
                )
            self.files |= {entry.path: entry.size for entry in entries if isinstance(entry, RepoFile)}
        lost = [name for name in names if name not in self.files]
        if lost:
            raise UserError(
                f"{self.name} at {self.revision} has no file {lost[0]}; correct the experiment, or its "
                f"revision"
            )

    def download(self, file: str, only_check: bool = False) -> None:
        """Download a file into the cache; with `only_check`, only ask for its head."""
        with translate_hub_errors(f"{file} of {self.name}", self.page):
            huggingface_hub.hf_hub_download(
                self.name, file, repo_type=self.kind, revision=self.revision, dry_run=only_check
            )


def list_repositories(experiment: Experiment) -> list[Repository]:
    """Return the repositories that `prepare` and every run of the experiment read, documents first.

    Raises UserError if the Hub cannot be reached, or lacks what the experiment names."""
    data = experiment.data
    found = _list_documents(experiment) if data.takes_from("hub") else []
    models: dict[tuple[str, str | None], Repository] = {}
    for run in experiment.runs.values():
        for source, revision in run.sources():
            local = source in experiment.runs or Path(source).expanduser().is_dir()
            if not local and not experiment.rehearsal:  # a rehearsal has a stand-in
                commit = read_pin(experiment, source, revision)
                models[source, commit] = Repository("model", "model", source, commit)
    for model in models.values():
        model.add(list_model_files(model))
    place, revision = parse_hub_model(data.tokenizer), data.tokenizer_revision
    if place and (place[0], revision) not in models:  # a model includes its tokenizer
        found.append(Repository("tokenizer", "model", place[0], revision))
        found[-1].add([place[1]])
    return found + list(models.values())


def _list_documents(experiment: Experiment) -> list[Repository]:
    """Return the data sets with those of their files that hold the experiment's tokens, by the estimate."""
    data, corpus = experiment.data, Corpus(experiment.data, get_data_dir(experiment))
    found: dict[tuple[str | None, str | None], Repository] = {}
    for group, given in corpus.groups.items():
        source = data.sources.get(group, data)
        if source.source != "hub":
            continue
        key, names = (source.repo, source.revision), [corpus.get_own_name(name) for name in given]
        documents = found.setdefault(
            key, Repository("documents", "dataset", source.repo or "", source.revision)
        )
        documents.add(names)
        share = data.shares[group] / sum(data.shares.values()) if data.shares else 1.0
        # a random split counts the documents of all files first
        tokens = data.max_tokens * share if data.max_tokens and not data.validation.fraction else math.inf
        for name in names[count_files(documents.files, names, tokens) :]:
            del documents.files[name]
    for documents in found.values():
        documents.cached &= documents.files.keys()
    return list(found.values())


def count_files(sizes: dict[str, int], names: list[str], tokens: float) -> int:
    """Return how many of `names`, from the first, hold `tokens` tokens by the estimate (BYTES_PER_TOKEN).

    The result is the number of all names if they hold fewer tokens."""
    n_tokens = 0.0
    for count, name in enumerate(names):
        if n_tokens > tokens:
            return count
        is_plain = name.endswith((".jsonl", ".txt"))
        n_tokens += sizes[name] / (BYTES_PER_TOKEN if is_plain else BYTES_PER_TOKEN / 2)
    return len(names)


def list_model_files(model: Repository) -> list[str]:
    """Return the names of the weights (safetensors, or .bin if there are none), configs and tokenizer files
    of a model."""
    with translate_hub_errors(f"the listing of {model.name}@{model.revision or 'main'}", model.page):
        listed = huggingface_hub.HfApi().list_repo_files(model.name, revision=model.revision)
    for stem, suffix in WEIGHTS:
        patterns = list_weight_patterns(stem, suffix)
        weights = [name for name in listed if any(fnmatchcase(name, pattern) for pattern in patterns)]
        if weights:
            common = [name for pattern in COMMON_FILES for name in listed if fnmatchcase(name, pattern)]
            return common + weights
    raise UserError(
        f"{model.name} holds neither model.safetensors nor pytorch_model.bin in its first folder; use "
        f"another model"
    )


def fetch(experiment: Experiment, allow_task_code: bool = False) -> None:
    """Print what the experiment needs and what of it is missing, then download the missing files.

    A killed fetch continues with the first file that is not complete in the cache. Raises UserError, before
    anything is downloaded, if there is no room, no internet, a licence to accept first, or code in task files
    that is not allowed."""
    refuse_task_code(experiment.evaluate.task_files, allow_task_code)
    repositories = list_repositories(experiment)
    if repositories:
        print(format_table(repositories), flush=True)
        _check_cache_space(sum(size for one in repositories for size in one.missing().values()))
    for one in repositories:
        for file in list(one.missing())[:1]:  # a gated repository lists its files to everyone
            one.download(file, only_check=True)
    # one that is trained on the documents needs no download
    if parse_bpe_size(experiment.data.tokenizer) is None:
        tokenizer = load_tokenizer(experiment.data)
        if isinstance(tokenizer, Gpt2Tokenizer):  # its file is not on the Hub
            save_gpt2_ranks(tokenizer)
    n_downloaded = sum(_download_missing(one) for one in repositories)
    tasks = experiment.evaluate
    # lm-eval keeps the data of the tasks where it later looks for it
    load_tasks(tasks.tasks, tasks.task_files, allow_task_code)
    n_files = sum(len(one.files) for one in repositories)
    print(
        f"{n_files} files of {experiment.name} are in the cache: {n_downloaded} downloaded, "
        f"{n_files - n_downloaded} were there"
    )


def _download_missing(repository: Repository) -> int:
    """Download the files of a repository that the cache lacks. Returns their number."""
    missing = repository.missing()
    for number, (file, size) in enumerate(missing.items(), 1):
        logger.info(
            "%s: file %d of %d, %s (%s)", repository.name, number, len(missing), file, format_bytes(size)
        )
        repository.download(file)
    if repository.what == "model":
        # every file is in the cache by now; this keeps the listing that is needed offline
        download_model(repository.name, repository.revision)
    return len(missing)


def format_table(repositories: list[Repository]) -> str:
    """Return a table of what is needed, a row per repository and their sum, with the free space of the
    cache."""
    rows = [
        (
            escape_markdown(f"{one.what}: {one.name}@{(one.revision or 'main')[:8]}"),
            len(one.files),
            sum(one.files.values()),
            len(one.cached),
            sum(one.missing().values()),
        )
        for one in repositories
    ]
    totals = [sum(column) for column in list(zip(*rows, strict=True))[1:]]
    rows.append(("in all", totals[0], totals[1], totals[2], totals[3]))
    cells = [
        [name, files, format_bytes(size), cached, format_bytes(missing)]
        for name, files, size, cached, missing in rows
    ]
    text = tabulate(
        cells, headers=["from the Hub", "files", "size", "in the cache", "to download"], tablefmt="github"
    )
    estimate = (
        f"How many files of documents hold max_tokens is an estimate: {BYTES_PER_TOKEN} bytes a token of "
        f"plain text, {BYTES_PER_TOKEN // 2} of parquet or packed text, about a third more than usual."
    )
    cache = Path(constants.HF_HUB_CACHE)
    return f"{text}\n{estimate}\nFree in {cache}: {format_bytes(count_free_bytes(cache))}"


def _check_cache_space(need: int) -> None:
    """Raise UserError if the cache's disk lacks room for a download of `need` bytes and RESERVE_BYTES."""
    cache = Path(constants.HF_HUB_CACHE)
    if need:
        check_free_space(cache, need + RESERVE_BYTES, f"the download of {format_bytes(need)} to {cache}")
