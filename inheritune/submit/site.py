"""What the cluster is like: the values of slurm/site.sh, and what its partitions and controller report."""

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from inheritune.config.paths import REPOSITORY, find_checkout
from inheritune.errors import UserError
from inheritune.files.storage import find_root
from inheritune.submit.slurm_commands import ask_slurm, count_gres

SITE_FILE = REPOSITORY / "slurm" / "site.sh"
NAMES = ("INHERITUNE_ROOT", "HF_HOME")
DEFAULT_LEAD_S = 300


@dataclass(frozen=True)
class Site:
    """A cluster's values and limits."""

    values: Mapping[str, str]
    """SITE_... variables, INHERITUNE_ROOT and HF_HOME, without those that are empty."""
    nodes: str = ""
    """Lines of `sinfo -h -e -o '%P|%D|%c|%m|%l|%G'`."""
    max_array_size: int | None = None
    exported: tuple[str, ...] = ()
    """Names of sbatch's variables that the user's shell exports."""

    def get(self, name: str) -> str:
        return self.values.get(f"SITE_{name}", "")

    def count(self, name: str) -> int:
        """Return the whole number in SITE_`name`, 0 if it is empty. Raises UserError for anything else."""
        text = self.get(name) or "0"
        if not text.isdecimal():
            raise UserError(f"SITE_{name} must be a whole number (got '{text}'); change it in slurm/site.sh")
        return int(text)

    def check(self) -> None:
        """Raise UserError for a value that sbatch would refuse, or take for something else: a memory without
        unit is in MB there."""
        memory, time = self.get("MEM_PER_GPU"), self.get("TIME")
        if memory and not re.fullmatch(r"[1-9][0-9]*[KMGT]", memory, re.IGNORECASE):
            raise UserError(
                f"SITE_MEM_PER_GPU takes a whole number with its unit, as in 60G (got '{memory}'); change it "
                f"in slurm/site.sh"
            )
        is_endless = time.upper() in ("UNLIMITED", "INFINITE")
        if time and not is_endless and not read_minutes(time):
            raise UserError(
                f"SITE_TIME takes minutes, hours:minutes:seconds, days-hours or UNLIMITED (got '{time}'); "
                f"change it in slurm/site.sh"
            )
        self.count("CPUS_PER_GPU")

    @property
    def root(self) -> str:
        return self.values.get("INHERITUNE_ROOT") or str(REPOSITORY)

    @property
    def lead_s(self) -> int:
        return self.count("LEAD") if self.get("LEAD") else DEFAULT_LEAD_S

    @property
    def requeues(self) -> bool:
        return self.get("REQUEUE") in ("yes", "")

    def count_gpus(self, partition: str) -> int:
        """Return all GPUs of a partition (or of several, with commas); of the default one if it is empty.

        0 where sinfo names none."""
        total = 0
        for line in self.nodes.splitlines():
            fields = line.split("|")
            if len(fields) < 3:  # a notice
                continue
            name, nodes, *_, gres = fields
            is_wanted = name.rstrip("*") in partition.split(",") if partition else name.endswith("*")
            if is_wanted and nodes.isdecimal():
                total += int(nodes) * count_gres(gres, self.get("GPU_TYPE"))
        return total


def read_site(environment: Mapping[str, str]) -> Site:
    """Return the site of slurm/site.sh, with the values of `environment` before its own.

    Raises UserError if the file has a mistake."""
    values = _source_file(environment)
    config = ask_slurm("scontrol", "show", "config", tries=1) or ""
    size = re.search(r"MaxArraySize\s*=\s*([0-9]+)", config)
    exported = tuple(sorted(name for name in environment if name.startswith("SBATCH_")))
    nodes = ask_slurm("sinfo", "-h", "-e", "-o", "%P|%D|%c|%m|%l|%G", tries=1) or ""
    return Site(values, nodes, int(size[1]) if size else None, exported)


def _source_file(environment: Mapping[str, str]) -> dict[str, str]:
    """Return what slurm/site.sh sets, without what is empty. Raises UserError if it has a mistake."""
    command = ["bash", "-c", 'set -a; . "$1" && env -0', "_", str(SITE_FILE)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=dict(environment))
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(
            last.removeprefix("inheritune: ") if "inheritune: " in last else f"{SITE_FILE}: {last}"
        )
    pairs = (entry.partition("=") for entry in done.stdout.split("\0"))
    return {n: v for n, _, v in pairs if v and (n.startswith("SITE_") or n == "SITE" or n in NAMES)}


def adopt_folders() -> None:
    """Let this process keep runs and data where the jobs do: on a cluster, INHERITUNE_ROOT and HF_HOME of
    slurm/site.sh, unless INHERITUNE_ROOT is set.

    Raises UserError if the file has a mistake."""
    if os.environ.get("INHERITUNE_ROOT") or not shutil.which("sbatch"):
        return
    found = _source_file({**os.environ, "SLURM_JOB_ID": "0"})  # as in a job, it does not ask sinfo
    for name in NAMES:
        if name in found:
            os.environ[name] = found[name]


def read_minutes(text: str) -> float | None:
    """Return the minutes in a time limit of Slurm's: 90, 90:30, 24:00:00, 2-12, 2-12:30.

    None for no limit, or for a text that is none."""
    match = re.fullmatch(r"(?:([0-9]+)-)?([0-9]+)(?::([0-9]+))?(?::([0-9]+))?", text.strip())
    if not match:
        return None
    days, *rest = match.groups()
    numbers = [float(part) for part in rest if part is not None]
    if days is not None:
        hours, minutes, seconds = (*numbers, 0.0, 0.0)[:3]
        return int(days) * 1440 + hours * 60 + minutes + seconds / 60
    if len(numbers) == 3:
        return numbers[0] * 60 + numbers[1] + numbers[2] / 60
    return numbers[0] + (numbers[1] / 60 if len(numbers) == 2 else 0)


def check_image(environment: Mapping[str, str]) -> None:
    """Raise UserError for a site's image that is missing, and for paths with blanks beside it."""
    image, root = environment.get("SITE_APPTAINER", ""), str(find_root())
    if image and re.search(r"\s", image + root + environment.get("HF_HOME", "") + str(REPOSITORY)):
        raise UserError(
            "with an Apptainer image its path, INHERITUNE_ROOT, HF_HOME and the repository's path may "
            "hold no spaces"
        )
    if image and not Path(image).is_file():
        top = shlex.quote(str(find_checkout()))
        build = f"cd {top} && apptainer build {shlex.quote(image)} slurm/inheritune.def"
        raise UserError(f"SITE_APPTAINER is {image}, which does not exist; make it with: {build}")


def find_image(environment: Mapping[str, str]) -> str:
    """Return what starts a command in the site's image; empty without one.

    Raises UserError as `check_image` does."""
    check_image(environment)
    image = environment.get("SITE_APPTAINER", "")
    if not image:
        return ""
    root, home = str(find_root()), environment.get("HF_HOME", "")
    for folder in filter(None, (root, home)):
        Path(folder).mkdir(parents=True, exist_ok=True)  # what does not exist cannot be bound
    places = list(dict.fromkeys(filter(None, (str(REPOSITORY), str(find_checkout()), root, home))))
    binds = " ".join(f"--bind {place}" for place in places)
    return f"apptainer exec --nv --env PYTHONNOUSERSITE=1 {binds} {image}"
