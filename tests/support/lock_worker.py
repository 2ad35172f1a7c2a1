"""Worker of test_lock: users who cannot see each other's processes meet at one lock, or at one file that both
write.

python lock_worker.py FOLDER PROC, as the first process of a process namespace of its own. PROC: "hidden"
mounts a /proc that shows a user only their own processes, "outer" leaves the /proc of the namespace outside,
"none" covers it. Prints one JSON object."""

import json
import os
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

from inheritune.errors import UserError
from inheritune.files.lock import Lock, find_lock_holder
from inheritune.files.writing import replace_atomically

USERS = (12345, 12346)


def in_child(user: int, function, *arguments) -> int:
    """Start `function` as `user` in a process of its own.  -> its number"""
    if pid := os.fork():
        return pid
    code = 1
    try:
        os.setgroups([])
        os.setgid(user)
        os.setuid(user)
        os.umask(0)
        function(*arguments)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def hold(path: Path) -> None:
    Lock.BEAT = 1000.0  # the test sets the time of the last beat
    Lock(path, wait=0).acquire()
    path.with_name("held").touch()
    time.sleep(600)


def write_slowly(path: Path) -> None:
    with replace_atomically(path) as temporary:
        temporary.mkdir()
        (temporary / "part").write_text("of a living process")
        path.with_name("writing").touch()
        time.sleep(600)


def contend(path: Path, answer: Path) -> None:
    said = "taken"
    try:
        with Lock(path, wait=0):
            pass
    except UserError as error:
        said = str(error)
    answer.write_text(said)


def replace(path: Path) -> None:
    with replace_atomically(path) as temporary:
        temporary.write_text("of the second user")


def ask(function, *arguments) -> None:
    """Run `function` as the second user to its end."""
    code = os.waitpid(in_child(USERS[1], function, *arguments), 0)[1]
    assert code == 0, function.__name__


def wait_for(file: Path) -> None:
    deadline = time.monotonic() + 60
    while not file.exists():
        assert time.monotonic() < deadline, file
        time.sleep(0.05)


def meet(folder: Path) -> dict:
    """What the second user meets while the first holds a lock: at once, after its silence, and after its
    end."""
    run, answer, found = folder / "run", folder / "answer", {}

    def asked() -> str:
        ask(contend, run, answer)
        return answer.read_text()

    first = in_child(USERS[0], hold, run)
    wait_for(folder / "held")
    (lock,) = folder.glob(".run.lock.*")
    found["beating"] = asked()
    found["holder"] = find_lock_holder(run) is not None
    os.kill(first, signal.SIGKILL)
    os.waitpid(first, 0)
    found["killed"] = asked()

    lock.unlink(missing_ok=True)
    (folder / "held").unlink()
    first = in_child(USERS[0], hold, run)
    wait_for(folder / "held")
    (lock,) = folder.glob(".run.lock.*")
    os.utime(lock, (time.time() - Lock.SILENCE - 30,) * 2)
    found["silent"] = asked()
    os.kill(first, signal.SIGKILL)
    os.waitpid(first, 0)
    return found


def write_both(folder: Path) -> dict:
    """What is left of a temporary folder of the first user when the second writes the same file: of a living
    process, then of one that was killed."""
    out = folder / "out"

    def left() -> list[str]:
        ask(replace, out)
        return sorted(path.name for path in folder.glob(".out.tmp*/part"))

    first = in_child(USERS[0], write_slowly, out)
    wait_for(folder / "writing")
    found = {"while it writes": left()}
    os.kill(first, signal.SIGKILL)
    os.waitpid(first, 0)
    return found | {"after its end": left(), "written": out.read_text()}


if __name__ == "__main__":
    place, proc = Path(sys.argv[1]), sys.argv[2]
    mount = {"hidden": ["-t", "proc", "-o", "hidepid=2", "proc"], "none": ["-t", "tmpfs", "tmpfs"]}.get(proc)
    if mount:
        subprocess.run(["mount", *mount, "/proc"], check=True)
    print(json.dumps({"lock": meet(place), "file": write_both(place)}))
