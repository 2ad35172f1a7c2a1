"""The local files that hold documents: the standard library, globs, and folders of the datasets library."""

import glob
import logging
import os
import sysconfig
from pathlib import Path

from inheritune.config.paths import REPOSITORY
from inheritune.errors import UserError, suggest_name
from inheritune.files.json_files import read_json

log = logging.getLogger(__name__)

NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
SAVED_SPLITS, SAVED_STATE = "dataset_dict.json", "state.json"
"""What `save_to_disk` writes: the names of a DatasetDict's splits, and the files of one split, in order."""


def list_standard_library() -> list[str]:
    """Return the .py files of this Python's standard library, without tests and installed packages."""
    stdlib, found = sysconfig.get_path("stdlib"), []
    for folder, subfolders, names in os.walk(stdlib):
        subfolders[:] = [name for name in subfolders if name not in NOT_LIBRARY]
        found += [
            os.path.relpath(os.path.join(folder, name), stdlib) for name in names if name.endswith(".py")
        ]
    return sorted(found)


def find_local_files(pattern: str, split: str | None = None) -> list[str]:
    """Return the sorted files that match, from the current folder or else from the repository.

    A pattern that is a file's own name means that file, even if it holds a bracket or a star. A folder means
    what `list_saved_files` says."""
    given = os.path.expanduser(os.path.expandvars(pattern))
    for base in (os.getcwd(), str(REPOSITORY)):
        literal = os.path.join(base, given)
        if os.path.isfile(literal):
            return [literal]
        if os.path.isdir(literal):
            return list_saved_files(Path(literal), split)
        found = glob.glob(
            given if os.path.isabs(given) else os.path.join(glob.escape(base), given), recursive=True
        )
        for name in found:
            if os.path.islink(name) and not os.path.exists(os.path.realpath(name)):
                raise UserError(
                    f"data.files: {name}, which '{pattern}' matches, is a link to {os.readlink(name)}, which "
                    f"does not exist; restore it, or remove the link"
                )
        if names := sorted(name for name in found if os.path.isfile(name)):
            return names
    brackets = (
        " ([ and ] mean a set of letters in a pattern; write [[] for a bracket)" if "[" in given else ""
    )
    raise UserError(
        f"data.files: '{pattern}' matches no file, neither from {os.getcwd()} nor from {REPOSITORY}{brackets}"
    )


def drop_links(groups: dict[str, list[str]]) -> dict[str, list[str]]:
    """Return `groups` with each real file once: under its own name if that was found, else under its first
    link's.

    A link to a folder above itself would give each document many times, in both parts of the split. Raises
    UserError if a file belongs to two groups."""
    taken: dict[str, str] = {}
    result = {}
    for group, names in groups.items():
        real = {name: os.path.realpath(name) for name in names}
        own = {place for name, place in real.items() if os.path.abspath(name) == place}
        kept: dict[str, str] = {}
        for name, place in real.items():
            if place not in kept and (place not in own or os.path.abspath(name) == place):
                kept[place] = name
        for place, name in kept.items():
            if place in taken:
                raise UserError(
                    f"data.files: {name} belongs to the groups '{taken[place]}' and '{group}'; leave it in "
                    f"one"
                )
            taken[place] = group
        result[group] = list(kept.values())
        if links := len(names) - len(kept):
            log.warning(
                "data.files: %d names are links to other files of the list; each file is read once", links
            )
    return result


def list_saved_files(folder: Path, split: str | None) -> list[str]:
    """Return the Arrow files of a folder: those that `save_to_disk` wrote, in its order, or all `*.arrow`.

    `split` is that of a DatasetDict (None: train, or the only one). Raises UserError if there is no such
    split, or no Arrow file."""
    if (folder / SAVED_SPLITS).is_file():
        found = read_json(folder / SAVED_SPLITS)["splits"]
        folder /= choose_split(split, found, str(folder))
    elif split is not None and (folder / SAVED_STATE).is_file():
        raise UserError(f"data.split: {folder} has no splits, it is one data set; leave out 'split'")
    if (folder / SAVED_STATE).is_file():
        names = [file["filename"] for file in read_json(folder / SAVED_STATE)["_data_files"]]
    else:
        names = sorted(path.name for path in folder.glob("*.arrow"))
    if not names:
        raise UserError(
            f"data.files: {folder} is a folder without Arrow files; name the files in it, such as "
            f"'{folder}/**/*.jsonl'"
        )
    return [str(folder / name) for name in names]


def choose_split(split: str | None, found: list[str], where: str) -> str:
    """Return the split to read: `split`, else train or the only one. Raises UserError if `found` lacks it."""
    chosen = split or ("train" if "train" in found or len(found) != 1 else found[0])
    if chosen not in found:
        raise UserError(
            f"data.split: {where} has no split '{chosen}'{format_hint(chosen, found)}; its splits: "
            f"{', '.join(found) or 'none'}"
        )
    return chosen


def format_hint(name: str, found: list[str]) -> str:
    """Return " (did you mean ...)" if one of `found` is close to `name`, else an empty text."""
    close = suggest_name(name, found)
    return f" ({close})" if close.startswith("did you mean") else ""
