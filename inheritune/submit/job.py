"""What slurm/job.sh asks in a job: `begin`, before there is anything to run, and `end`, after it.

    python -m inheritune.submit.job begin SCRIPT JOB WORDS ...   prints shell code: environment, command
    python -m inheritune.submit.job end CODE SIGNALLED           decides: finished, requeued, failed
    python -m inheritune.submit.job fetch WORDS ...              runs `fetch` in the site's image

Files in $INHERITUNE_JOB, runs/jobs/ID/ (runtime/job_reports.py writes the first three):

    more      the program saved and stopped, and there is more to do
    stopped   a STOP file ended the program before its work was done
    failure   "NODE rank R: cause", and its exit code on a second line
    state     what `begin` found, for `end`"""

import os
import shlex
import sys
import traceback

from inheritune.errors import UserError
from inheritune.runtime import streams
from inheritune.submit.job_context import read_context
from inheritune.submit.job_end import end_job, fail_job
from inheritune.submit.job_start import begin_job
from inheritune.submit.site import find_image


def main(argv: list[str]) -> int:
    """Run one of the three. Returns the exit code."""
    action, *words = argv
    if action == "begin":
        print("\n".join(begin_job(words[0], words[1], words[2:])), flush=True)
        return 0
    if action == "fetch":
        command = [*shlex.split(find_image(os.environ)), "python", "-m", "inheritune", "fetch", *words]
        os.execvp(command[0], command)
    try:
        return end_job(int(words[0]), bool(words[1:] and words[1]))
    except Exception as error:  # a mistake of ours must not leave a job without its last line
        traceback.print_exception(error)
        return fail_job(read_context(), 1, f"the end of the job failed ({type(error).__name__}: {error})")


if __name__ == "__main__":
    streams.guard_streams()  # a full disk takes the log too
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        print(f"inheritune: {error}", file=sys.stderr)
        sys.exit(2)
