"""The program: runs the verb of a command line, reports its failure, and ends the process."""

import os
import sys
import time
import traceback

from inheritune.cli.arguments import OPEN_VERBS, bind_arguments
from inheritune.cli.help import describe_verb, describe_verbs, list_verbs, read_version
from inheritune.cli.verbs import Verbs
from inheritune.errors import Stopped, UserError, suggest_name
from inheritune.runtime import dist, job_reports, launcher, limits, signals, streams

SAVING_VERBS = ("train", "prepare", "grow", "evaluate")
"""Verbs that save and leave when they are asked to."""
PRINTING_VERBS = ("check", "plan", "queue", "status", "table", "verify")
"""Verbs whose result is what they print."""
REPORT_DELAY_S = 3
"""Time for rank 0 to report: srun --kill-on-bad-exit ends all ranks when the first one leaves."""


def main(argv: list[str]) -> int:
    """Run one verb. Returns exit code 0, 2 for a user error (reported in one sentence), or 130 after a
    Ctrl-C."""
    # the deepspeed launcher adds this flag; the environment says the same
    argv = [word for word in argv if not word.startswith("--local_rank=")]
    # a run loads its own files again, so they are never writable by everyone; a group may be allowed
    os.umask(os.umask(0o022) | 0o002)
    try:
        code = run_line(argv)
    except KeyboardInterrupt:
        code = signals.INTERRUPTED
    except Exception as error:
        code = report_error(error)
    return signals.INTERRUPTED if code == 0 and signals.is_interrupted() else code


def run_line(argv: list[str]) -> int:
    """Run the verb that a command line names, or print help or version. Returns the exit code."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        return print_text(describe_verbs())
    if argv[0] == "--version":
        return print_text(read_version())
    verbs, verb = list_verbs(), argv[0]
    if verb not in verbs:
        raise UserError(f"unknown verb '{verb}'; {suggest_name(verb, verbs)}")
    if ("-h" in argv or "--help" in argv) and (verb not in OPEN_VERBS or argv[1].startswith("-")):
        return print_text(describe_verb(verb))
    check_current_folder()
    code = run_verb(verb, bind_arguments(verb, verbs[verb], argv[1:]), argv)
    return check_printed() if verb in PRINTING_VERBS and code == 0 else code


def print_text(text: str) -> int:
    """Print the text that was asked for. Returns the exit code."""
    print(text)
    return check_printed()


def check_current_folder() -> None:
    """Raise UserError if the current folder was deleted.

    Relative paths then mean nothing, and libraries fail with messages of their own."""
    try:
        os.getcwd()
    except FileNotFoundError:
        raise UserError("the current folder is gone; cd to one that exists, and start again") from None


def check_printed() -> int:
    """Return exit code 0. Raises UserError if the output, which is all that was asked for, could not be
    written."""
    if error := streams.find_write_error():
        raise UserError(f"standard output cannot be written ({error.strerror})")
    return 0


def report_error(error: Exception) -> int:
    """Tell the user and the job's script why the verb did not finish. Returns the exit code."""
    if isinstance(error, Stopped):
        try:
            report_stop(error)
            return 0
        except UserError as problem:
            error = problem
    if not isinstance(error, UserError):
        traceback.print_exception(error)
        job_reports.report_failure(f"{type(error).__name__}: {error}")
        return 1
    if dist.get_rank() == 0 or isinstance(error, dist.NodeError):
        print(f"inheritune: {error}", file=sys.stderr, flush=True)
        job_reports.report_failure(str(error), 2)
    else:
        time.sleep(REPORT_DELAY_S)
    return 2


def report_stop(error: Stopped) -> None:
    """Print on rank 0 why the work was stopped, and tell the job's script."""
    if dist.get_rank() == 0:
        print(f"inheritune: {error}", flush=True)
        job_reports.report_stopped(error)


def run_verb(verb: str, arguments: dict, argv: list[str]) -> int:
    """Call the verb. A limit of the machine that it meets is raised as a UserError of one sentence."""
    from inheritune.submit.site import adopt_folders

    try:
        adopt_folders()
        return call_verb(verb, arguments, argv)
    except Exception as error:
        # after any other error, the other ranks may be in a collective operation
        if isinstance(error, Stopped):
            dist.leave_group()
        if limit := limits.explain_limit(error):
            raise limit from None
        raise


def call_verb(verb: str, arguments: dict, argv: list[str]) -> int:
    """Call the verb through Fire, or start it as several processes if --procs asks for them."""
    if verb in SAVING_VERBS:
        signals.listen_for_signals()
    else:
        signals.raise_interrupts()
    procs = launcher.count_processes(verb, arguments.get("procs"), os.environ)
    if procs > 1:
        from inheritune.cluster.launch import launch_verb

        return launch_verb(argv, procs)
    import fire

    fire.Fire(
        Verbs(),
        command=[verb, *(f"--{name}={value!r}" for name, value in arguments.items())],
        name="inheritune",
    )
    dist.leave_group()
    return 0


def leave(code: int) -> None:
    """End this process."""
    if code == signals.INTERRUPTED:
        flush_streams()
        signals.exit_interrupted()
    if "torch.distributed" in sys.modules:
        # torch's own threads sometimes abort a process at its exit, after its work is done
        flush_streams()
        os._exit(code)
    sys.exit(code)


def flush_streams() -> None:
    """Write what standard output and error still hold."""
    sys.stdout.flush()
    sys.stderr.flush()


def run_command() -> None:
    """Run the verb of this process's command line, and end the process."""
    streams.guard_streams()
    leave(main(sys.argv[1:]))
