"""Whether prepared data still is what its documents and tokenizer would give: the warnings and refusals about
documents that changed since they were prepared."""

import itertools
import logging
import shlex
from pathlib import Path

from inheritune.config.experiment import Experiment
from inheritune.config.paths import resolve_path
from inheritune.config.sections import Data
from inheritune.data.documents import Corpus
from inheritune.data.tokenizer_loading import load_tokenizer
from inheritune.errors import UserError
from inheritune.files.json_files import read_json
from inheritune.files.markers import MANIFEST, hash_file

log = logging.getLogger(__name__)


def report_changes(experiment: Experiment, folder: Path) -> None:
    """Warn if the documents are no longer those that the data in `folder` was prepared from, and say how to
    prepare it again.

    Sizes are compared, and the content of files that are newer than the manifest. A data set of the Hub is
    pinned by its commit. Raises UserError if the names of the experiment now mean another corpus altogether
    (`check_same_corpus`)."""
    manifest, prepared = read_json(folder / MANIFEST), shlex.quote(str(folder / MANIFEST))
    again = (
        f"to prepare it again (its runs must then start again too): rm {prepared} && python -m inheritune "
        f"prepare {experiment.given}"
    )
    if has_tokenizer_changed(experiment.data, manifest):
        log.warning(
            "%s was prepared with other files of tokenizer %s, and stays as it is; %s",
            folder,
            experiment.data.tokenizer,
            again,
        )
    before, data = {file["name"]: file for file in manifest["source_files"]}, experiment.data
    if data.source == "hub" or not before:
        return
    try:
        corpus = Corpus(data, folder)
    except UserError:  # no file matches any more
        return
    if not before.keys() & itertools.chain(*corpus.groups.values()):
        check_same_corpus(corpus, before, folder)
        return
    parts = [
        f"{len(names)} {what} ({names[0]}{', ...' if len(names) > 1 else ''})"
        for what, names in _find_changes(corpus, manifest, folder).items()
        if names
    ]
    if parts:
        log.warning(
            "%s was prepared from other documents: %s. It stays as it is; %s", folder, ", ".join(parts), again
        )


def _find_changes(corpus: Corpus, manifest: dict, folder: Path) -> dict[str, list[str]]:
    """Return the names of the files that are new, gone, or changed since `manifest` was written."""
    before = {file["name"]: file for file in manifest["source_files"]}
    now = list(itertools.chain(*corpus.groups.values()))
    read_all = manifest.get("all_files", True)  # else reading ended at max_tokens, before the last file
    since = (folder / MANIFEST).stat().st_mtime
    return {
        "new": [name for name in now if name not in before] if read_all else [],
        "gone": [name for name in before if name not in now],
        "changed": [
            name
            for name, entry in before.items()
            if name in now and "revision" not in entry and _has_changed(corpus.path(name), entry, since)
        ],
    }


def _has_changed(path: Path, before: dict, since: float) -> bool:
    """Return whether a file differs from its entry in the manifest. Older manifests have sizes only."""
    facts = path.stat()
    if facts.st_size != before["bytes"]:
        return True
    newer = max(facts.st_mtime, facts.st_ctime) > since  # a copy may keep the time of what it was copied from
    return "xxh3" in before and newer and hash_file(path) != before["xxh3"]


def has_tokenizer_changed(data: Data, manifest: dict) -> bool:
    """Return whether the tokenizer that `data` names by a path gives other ids than the one that the data was
    prepared with."""
    if not resolve_path(data.tokenizer).exists():
        return False
    return load_tokenizer(data).fingerprint != manifest["tokenizer"]["fingerprint"]


def check_corpus(experiment: Experiment, folder: Path) -> None:
    """Check prepared data by `check_same_corpus`, where the documents can be seen from here. A compute node
    may see none."""
    if experiment.data.source != "files":
        return
    try:
        corpus = Corpus(experiment.data, folder)
    except UserError:
        return
    before = {file["name"]: file for file in read_json(folder / MANIFEST)["source_files"]}
    check_same_corpus(corpus, before, folder)


def check_same_corpus(corpus: Corpus, before: dict[str, dict], folder: Path) -> None:
    """Raise UserError if data was prepared from another corpus: none of its files (`before`: name to entry of
    the manifest) is in `corpus`, and the contents differ too.

    A relative path, or a variable, then means other documents here. Files that were moved have the same
    contents. Where there are no files at all, they are assumed to be deleted on purpose."""
    names = list(itertools.chain(*corpus.groups.values()))
    if corpus.data.source != "files" or not before or not names or set(names) & set(before):
        return
    known = {entry.get("xxh3") for entry in before.values()} | {None}
    other = next((name for name in names if corpus.describe(name)["xxh3"] not in known), None)
    if other is not None:
        raise UserError(
            f"{folder} was prepared from {next(iter(before))} and the like; from here data.files means other "
            f"documents, such as {other}; give data another name, or write absolute paths in data.files"
        )
