"""`verify PATH`: whether the files of runs and data are whole, by the hashes in their markers."""

import os
from collections.abc import Callable, Iterable
from pathlib import Path

from inheritune.config.units import format_bytes
from inheritune.errors import NoAccess, UserError, is_machine_limit
from inheritune.files.json_files import read_json, read_jsonl
from inheritune.files.markers import COMPLETE, MARKERS, check_files, find_damage, read_marked_files
from inheritune.files.rundir import RunDir


def verify(path: str | Path, progress: Callable[[list[Path]], Iterable[Path]] = iter) -> None:
    """Print for every marker at or below `path` whether its files are whole, and which of the results,
    records and analyses, which hold their own hashes, are not.

    Also prints which checkpoints have no marker yet, and which entries of checkpoints/ no run reads.
    `progress` wraps the list of markers.

    Raises UserError at the end if anything is damaged or may not be read, or if nothing is to verify."""
    top = Path(path)
    folders, markers, broken, hidden = _find_markers(top)
    if not markers and not broken and not hidden:
        raise UserError(f"nothing to verify in {top}: no {', '.join(MARKERS)} at or below it")
    n_damaged, n_hidden = len(broken), len(hidden)
    for marker in progress(markers):
        damaged, unread = _verify_marker(marker)
        n_damaged, n_hidden = n_damaged + damaged, n_hidden + unread
    for folder in folders:
        damaged, unread = _verify_record(RunDir(folder))
        n_damaged, n_hidden = n_damaged + damaged, n_hidden + unread
    for word, sentences in (("DAMAGED", broken), ("NOT READ", hidden)):
        print("".join(f"{word}: {sentence}\n" for sentence in sentences), end="")
    for folder in folders:
        if folder.name == "checkpoints":
            _print_unused(RunDir(folder.parent), set(folders))
    unknown = f"{n_hidden} cannot be read (named above): see their owner and mode; they may be sound"
    if n_damaged:
        raise UserError(
            f"{n_damaged} files of {top} are damaged (named above): restore them, or delete the folders they "
            f"are in{f'. {unknown}' if n_hidden else ''}"
        )
    if n_hidden:
        raise UserError(f"of the files and folders of {top}, {unknown}")


def _find_markers(top: Path) -> tuple[list[Path], list[Path], list[str], list[str]]:
    """Return (`top` and all folders below it, the markers in them, a sentence for each folder that is broken,
    and one for each that may not be read). Links are followed, and each folder is listed once."""
    folders: list[Path] = []
    markers: list[Path] = []
    broken: list[str] = []
    hidden: list[str] = []
    seen, waiting = set(), [top]
    while waiting:
        folder = waiting.pop()
        try:
            facts, entries = folder.stat(), list(os.scandir(folder))
            inner = [folder / entry.name for entry in entries if entry.is_dir()]
            found = [folder / entry.name for entry in entries if entry.name in MARKERS and entry.is_file()]
        except (FileNotFoundError, NotADirectoryError):  # a running job deletes its old checkpoints
            continue
        except PermissionError as error:
            hidden.append(str(NoAccess(folder, error.strerror)))
            continue
        except OSError as error:
            if is_machine_limit(error):
                raise
            broken.append(f"{folder} cannot be read ({error.strerror})")
            continue
        if (facts.st_dev, facts.st_ino) not in seen:
            seen.add((facts.st_dev, facts.st_ino))
            folders.append(folder)
            markers += found
            waiting += inner
    order = {name: place for place, name in enumerate(MARKERS)}
    markers.sort(key=lambda path: (path.parent, order[path.name]))
    return sorted(folders), markers, sorted(broken), sorted(hidden)


def _verify_marker(marker: Path) -> tuple[int, int]:
    """Print whether the files of `marker` are whole. Returns how many are not, and how many may not be
    read."""
    files: dict[str, dict] = {}
    problems: list[str] = []
    hidden: list[str] = []
    try:
        files = read_marked_files(marker)
    except NoAccess as error:
        hidden.append(str(error))
    except (UserError, OSError) as error:
        if is_machine_limit(error):
            raise
        problems.append(str(error))
    for name, facts in files.items():
        try:
            problems += find_damage(marker.parent, {name: facts})
        except PermissionError as error:
            hidden.append(str(NoAccess(marker.parent / name, error.strerror)))
        except OSError as error:
            if is_machine_limit(error):
                raise
            problems.append(str(error))
    # a running job keeps only its last checkpoints, and deletes the marker of an old one first
    if problems and not marker.is_file():
        print(f"deleted meanwhile: {marker.parent}")
        return 0, 0
    size = format_bytes(sum(facts["bytes"] for facts in files.values()), "MB", 1)
    state = "DAMAGED" if problems else "NOT READ" if hidden else "whole"
    print(f"{state}: {marker} ({len(files)} files, {size})")
    print("".join(f"  {problem}\n" for problem in problems + hidden), end="")
    return len(problems), len(hidden)


def _verify_record(run: RunDir) -> tuple[int, int]:
    """Print which of the results, record, analysis and provenance in a run's folder are damaged or may not be
    read. Returns how many of each."""
    checks: dict[Path, Callable[[], object]] = {
        run.results: lambda: _check_results(run),
        run.attention: lambda: read_jsonl(run.attention),
        run.provenance: lambda: read_json(run.provenance),
    }
    n_damaged = n_hidden = 0
    for path, check in checks.items():
        try:
            if path.is_file():
                check()
        except (NoAccess, PermissionError) as error:
            n_hidden += 1
            print(f"NOT READ: {error}")
        except (UserError, OSError) as error:
            if is_machine_limit(error):
                raise
            n_damaged += 1
            print(f"DAMAGED: {error}")
    return n_damaged, n_hidden


def _check_results(run: RunDir) -> None:
    """Raise UserError if results.json is not as written, or the record that a finished run has its numbers
    from is not as it left it."""
    results = read_json(run.results)
    if run.is_done() and isinstance(results, dict):
        check_files(run.path, results.get("record", {}))


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
