"""`verify PATH`: whether the files of runs and data are whole, by the hashes in their markers."""

import os
from collections.abc import Callable, Iterable
from pathlib import Path

from inheritune.config.units import format_bytes
from inheritune.errors import UserError
from inheritune.files.markers import COMPLETE, MARKERS, find_damage, read_marked_files
from inheritune.files.rundir import RunDir


def verify(path: str | Path, progress: Callable[[list[Path]], Iterable[Path]] = iter) -> None:
    """Print for every marker at or below `path` whether its files are whole.

    Also prints which checkpoints have no marker yet, and which entries of checkpoints/ no run reads.
    `progress` wraps the list of markers.

    Raises UserError at the end if anything is damaged or cannot be read, or if there is nothing to verify."""
    top = Path(path)
    folders, markers, unreadable = _find_markers(top)
    if not markers and not unreadable:
        raise UserError(f"nothing to verify in {top}: no {', '.join(MARKERS)} at or below it")
    n_damaged = len(unreadable)
    for marker in progress(markers):
        n_damaged += _verify_marker(marker)
    for sentence in unreadable:
        print(f"DAMAGED: {sentence}")
    for folder in folders:
        if folder.name == "checkpoints":
            _print_unused(RunDir(folder.parent), set(folders))
    if n_damaged:
        raise UserError(
            f"{n_damaged} files of {top} are damaged (named above): restore them, or delete the folders they "
            f"are in"
        )


def _find_markers(top: Path) -> tuple[list[Path], list[Path], list[str]]:
    """Return (`top` and all folders below it, the markers in them, a sentence for each folder that cannot be
    read). Links are followed, and each folder is listed once."""
    folders: list[Path] = []
    markers: list[Path] = []
    unreadable: list[str] = []
    seen, waiting = set(), [top]
    while waiting:
        folder = waiting.pop()
        try:
            facts, entries = folder.stat(), list(os.scandir(folder))
            inner = [folder / entry.name for entry in entries if entry.is_dir()]
            found = [folder / entry.name for entry in entries if entry.name in MARKERS and entry.is_file()]
        except (FileNotFoundError, NotADirectoryError):  # a running job deletes its old checkpoints
            continue
        except OSError as error:
            unreadable.append(f"{folder} cannot be read ({error.strerror})")
            continue
        if (facts.st_dev, facts.st_ino) not in seen:
            seen.add((facts.st_dev, facts.st_ino))
            folders.append(folder)
            markers += found
            waiting += inner
    order = {name: place for place, name in enumerate(MARKERS)}
    markers.sort(key=lambda path: (path.parent, order[path.name]))
    return sorted(folders), markers, sorted(unreadable)


def _verify_marker(marker: Path) -> int:
    """Print whether the files of `marker` are whole. Returns how many are not."""
    files: dict[str, dict] = {}
    try:
        files = read_marked_files(marker)
        problems = list(find_damage(marker.parent, files))
    except (UserError, OSError) as error:
        files, problems = {}, [str(error)]
    # a running job keeps only its last checkpoints, and deletes the marker of an old one first
    if problems and not marker.is_file():
        print(f"deleted meanwhile: {marker.parent}")
        return 0
    size = format_bytes(sum(facts["bytes"] for facts in files.values()), "MB", 1)
    print(f"{'DAMAGED' if problems else 'whole'}: {marker} ({len(files)} files, {size})")
    print("".join(f"  {problem}\n" for problem in problems), end="")
    return len(problems)


def _print_unused(run: RunDir, readable: set[Path]) -> None:
    """Print which entries of checkpoints/ no run reads: unfinished ones, a copy under a wrong name, other
    names."""
    own = {
        run.checkpoint(step).name: step for step in run.checkpoint_steps() if run.checkpoint(step) in readable
    }
    for path in sorted(path for path in run.checkpoints.iterdir() if path in readable or path.is_file()):
        if path.name not in own:
            if not path.name.startswith("."):  # such names are temporary, or the file system's
                print(f"not read by any run: {path} has no name of a checkpoint")
        elif not (path / COMPLETE).is_file():
            print(f"unfinished: {path} has no COMPLETE, so no run reads it")
        elif run.named_step(own[path.name]) != own[path.name]:
            print(
                f"not read by any run: {path} is a copy of the checkpoint of step "
                f"{run.named_step(own[path.name])}"
            )
