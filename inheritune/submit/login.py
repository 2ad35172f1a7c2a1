"""`submit JOB WORDS`: a job of slurm/jobs.yaml, or all jobs that an item of the paper lacks."""

from inheritune.config.jobs import load_jobs
from inheritune.config.values import ARGUMENTS
from inheritune.errors import UserError, suggest_name
from inheritune.paper.items import list_items
from inheritune.submit.paper_jobs import submit_item
from inheritune.submit.submission import submit


def submit_words(job: str, words: list[str]) -> None:
    """Submit job `job` with its `words`, or the jobs of a paper's item, which takes --seed K.

    Raises UserError for anything else, and for what cannot run; then nothing, or not all of it, is queued."""
    if job in load_jobs():
        submit(job, words)
        return
    if job not in list_items():
        names = [*load_jobs(), *list_items()]
        raise UserError(f"there is no job and no item of the paper '{job}'; {suggest_name(job, names)}")
    if not submit_item(job, _read_seed(job, words)):
        print(f"{job} lacks nothing: draw it with bash recipes/paper_item.sh {job}")


def _read_seed(item: str, words: list[str]) -> int:
    """Return the seed of an item. Raises UserError for other words."""
    if not words:
        return 0
    text = words[1] if words[0] == "--seed" and len(words) == 2 else words[0].partition("--seed=")[2]
    try:
        return int(ARGUMENTS["seed"].read(text))
    except ValueError:
        raise UserError(f"submit {item} takes --seed K only (got '{' '.join(words)}')") from None
