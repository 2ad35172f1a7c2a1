"""The files of a data set of the Hub that hold documents: by name, or by configuration and split.

A data set is pinned by its commit. The listing is kept in the data folder, so that a machine without internet
sees the same files. Files are downloaded one by one, when they are first read, and read by the readers of
local files.
"""

import fnmatch
import glob
import logging
import tempfile
from collections.abc import Callable
from pathlib import Path

from inheritune.config.sections import Source
from inheritune.config.source_shape import is_commit
from inheritune.data.local_files import choose_split, format_hint
from inheritune.errors import UserError, summarize_error
from inheritune.files.hub import translate_hub_errors
from inheritune.files.json_files import read_json, write_json

log = logging.getLogger(__name__)

LISTED_NAMES = 30
"""Configurations that an error message lists; some data sets have hundreds."""


def get_pin(source: Source) -> tuple[str, str]:
    """Return (repository, commit) of a Hub data set. Raises UserError if `data.revision` is not a commit."""
    if source.repo is None or not is_commit(source.revision):
        raise UserError(
            f"data.revision: '{source.revision}' is not a commit of {source.repo}; write the 40 digits that "
            f"the Hub shows under 'Files and versions', so that the data cannot change under the experiment"
        )
    return source.repo, str(source.revision)


def download_file(source: Source, name: str) -> Path:
    """Return the path of one file of the data set in the Hub's cache; download it if it is missing there."""
    import huggingface_hub

    repo, revision = get_pin(source)
    with translate_hub_errors(f"{name} of {repo}@{revision}", f"datasets/{repo}"):
        return Path(huggingface_hub.hf_hub_download(repo, name, repo_type="dataset", revision=revision))


def make_hub_finder(source: Source, kept: Path) -> Callable[[str], list[str]]:
    """Return a function from a pattern to the sorted names in the data set that match it.

    The names come from the listing in the file `kept`, else from the Hub. A name without a wildcard needs
    neither."""
    repo, revision = get_pin(source)

    def find(pattern: str) -> list[str]:
        if not glob.has_magic(pattern):
            return [pattern]
        listed = _list_hub_files(repo, revision, kept)
        found = [name for name in listed if fnmatch.fnmatchcase(name, pattern)]
        if not found:
            raise UserError(
                f"data.files: '{pattern}' matches none of the {len(listed)} files of {repo} at {revision}"
            )
        return found

    return find


def _list_hub_files(repo: str, revision: str, kept: Path) -> list[str]:
    """Return the sorted names of all files of a Hub data set: from `kept`, else from the Hub, then kept.

    Offline and without a kept listing, the names in the Hub's cache are used. A warning says so, because a
    part of the files is other data."""
    import huggingface_hub
    from huggingface_hub import constants

    if kept.is_file():
        return read_json(kept)
    what, page = f"the listing of {repo}@{revision}", f"datasets/{repo}"
    if constants.HF_HUB_OFFLINE:
        with translate_hub_errors(what, page):
            cache = Path(
                huggingface_hub.snapshot_download(
                    repo, repo_type="dataset", revision=revision, local_files_only=True
                )
            )
        found = sorted(path.relative_to(cache).as_posix() for path in cache.rglob("*") if path.is_file())
        log.warning("offline: %s@%s is taken to be the %d files in %s", repo, revision, len(found), cache)
        return found
    with translate_hub_errors(what, page):
        found = sorted(huggingface_hub.HfApi().list_repo_files(repo, repo_type="dataset", revision=revision))
    write_json(kept, found)
    return found


# --- configurations and splits ------------------------------------------------------------------------------


def list_split_files(source: Source, kept: Path) -> list[str]:
    """Return the names of the files of a configuration and split, in the order of the datasets library: from
    the file `kept`, else from the Hub, then kept.

    The library finds them as `load_dataset` does: by the card of the data set, else by the names of its
    files. Raises UserError if there is no such configuration or split, if the data set is a loading script,
    which is never run, or without internet."""
    if kept.is_file():
        return read_json(kept)
    repo, revision = get_pin(source)
    with translate_hub_errors(f"the data set {repo}@{revision}", f"datasets/{repo}"):
        files = _ask_for_splits(repo, revision, source.config)
    split = choose_split(source.split, list(files), repo)
    start = f"hf://datasets/{repo}@{revision}/"
    if other := next((url for url in files[split] if not url.startswith(start)), None):
        raise UserError(
            f"data.repo: {repo} names files of another place ({other}); name that data set itself"
        )
    found = [url.removeprefix(start) for url in files[split]]
    write_json(kept, found)
    return found


def _ask_for_splits(repo: str, revision: str, config: str | None) -> dict[str, list[str]]:
    """Return {split: addresses of its files} of a configuration, by the datasets library."""
    import datasets
    from datasets.data_files import EmptyDatasetError
    from datasets.exceptions import DataFilesNotFoundError
    from huggingface_hub.errors import LocalEntryNotFoundError

    with tempfile.TemporaryDirectory() as cache:  # the library makes a lock there
        try:
            names = datasets.get_dataset_config_names(repo, revision=revision)
            chosen = config or datasets.get_dataset_default_config_name(repo, revision=revision)
            if chosen not in names:
                raise _make_config_error(repo, config, names)
            builder = datasets.load_dataset_builder(repo, chosen, revision=revision, cache_dir=cache)
        except RuntimeError as error:
            if "script" not in str(error):
                raise
            raise UserError(
                f"data.repo: {repo} is a loading script ({summarize_error(error)}), and no code of a data "
                f"set is run; name its data files in 'files', or use a copy of it in parquet"
            ) from None
        except (DataFilesNotFoundError, EmptyDatasetError, ValueError) as error:
            if isinstance(error, LocalEntryNotFoundError):  # without internet
                raise
            raise UserError(
                f"data.repo: datasets finds no splits in {repo} ({summarize_error(error)[:200]}); "
                f"name the data files in 'files'"
            ) from None
    return {split: list(files) for split, files in (builder.config.data_files or {}).items()}


def _make_config_error(repo: str, config: str | None, names: list[str]) -> UserError:
    """Return the refusal of a configuration that a data set lacks, or of none where it has several."""
    listed = ", ".join(names[:LISTED_NAMES])
    listed += f" and {len(names) - LISTED_NAMES} more" if len(names) > LISTED_NAMES else ""
    if config is None:
        return UserError(f"data.config: {repo} has several configurations, so name one: {listed}")
    hint = format_hint(config, names)
    return UserError(f"data.config: {repo} has no configuration '{config}'{hint}; it has: {listed}")
