"""The job scripts of slurm/ on a real Slurm: submitting, finding themselves, stopping, going on, failing.

counting.py stands for the training program where only the script's own doings are looked at.
"""

import inspect
import os
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
from conftest import write_tokens
from slurm_cluster import (  # noqa: F401
    COUNTING,
    REPOSITORY,
    cluster,
    has_slurm,
    session_cluster,
    slurm,
)

from inheritune.cli.verbs import Verbs
from inheritune.cluster.job_records import Record, find_record, make_keys, write_record
from inheritune.cluster.status import status
from inheritune.config.experiment import load_experiment
from inheritune.errors import UserError
from inheritune.files.markers import is_prepared
from inheritune.files.rundir import RunDir, get_data_dir
from inheritune.submit.control import cancel, print_queue, retry
from inheritune.submit.request import KINDS
from inheritune.submit.runs import list_baselines
from inheritune.submit.snapshot import list_code
from inheritune.submit.submission import submit

SCRIPTS = sorted(
    p for p in (REPOSITORY / "slurm").glob("*.sh") if p.name not in ("job.sh", "site.sh", "fetch.sh")
)
PROFILES = {
    "8 GPUs a node": {"LAB_GPUS": 8},
    "4 GPUs a node": {"LAB_NODES": 4, "LAB_GPUS": 4},
    "typed GPUs": {"LAB_NODES": 4, "LAB_GPUS": 4, "LAB_GPU_TYPE": "h200", "SITE_GPU_TYPE": "h200"},
    "no requeue": {"LAB_GPUS": 8, "LAB_REQUEUE": 0, "SITE_REQUEUE": "no"},
    "one big shared node": {"LAB_NODES": 1, "LAB_GPUS": 16, "LAB_CPUS": 256, "LAB_MEM": 2048000},
}


def words_of(script: Path) -> list[str]:
    """Arguments that a generic script needs; the others need none."""
    generic = {"train": ["small", "reference"], "grow": ["small", "grown"], "analyze": ["gpt2", "small"]}
    return generic.get(script.stem, ["small"] if script.stem in ("baselines", "evaluate", "prepare") else [])


# --- submitting ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("profile", PROFILES)
def test_every_script_is_accepted(profile):
    """Slurm takes the command and the header of each."""
    knobs = PROFILES[profile]
    site = {name: value for name, value in knobs.items() if name.startswith("SITE_")}
    with cluster(**knobs) as here:
        lines = {script.stem: here.plan(script.stem, *words_of(script), **site) for script in SCRIPTS}
        assert len(lines) > 30
        for script in SCRIPTS:
            if profile == "8 GPUs a node":
                here.run("sbatch", "--test-only", script, *words_of(script))
            here.run(*shlex.split(lines[script.stem].replace("sbatch ", "sbatch --test-only ", 1)))
        assert "No jobs" in here.run("scontrol", "show", "jobs")
    shape = re.search(r"--nodes=\d+ --gpus-per-node=\S+", lines["gpt2_xl_growth"])[0]
    assert (
        shape
        == {
            "8 GPUs a node": "--nodes=2 --gpus-per-node=8",
            "4 GPUs a node": "--nodes=4 --gpus-per-node=4",
            "typed GPUs": "--nodes=4 --gpus-per-node=h200:4",
            "no requeue": "--nodes=2 --gpus-per-node=8",
            "one big shared node": "--nodes=1 --gpus-per-node=16",
        }[profile]
    )
    assert ("--no-requeue" in lines["gpt2_xl_growth"]) == (profile == "no requeue")


def test_headers_have_the_shape_that_the_readme_tells():
    for script in SCRIPTS:
        header = "\n".join(line for line in script.read_text().splitlines() if line.startswith("#SBATCH"))
        assert "--signal=B:USR1@300 --requeue --open-mode=append" in header, script
        assert f"--job-name={script.stem} " in header and "--nodes=1 " in header, script
        assert "ntasks-per-gpu" not in header, script
        assert os.access(script, os.X_OK), script


def test_the_readme_names_every_script():
    text = (REPOSITORY / "slurm" / "README.md").read_text()
    named = set(re.findall(r"`(\w+\.sh)`", text)) | set(re.findall(r"bash slurm/(\w+\.sh)", text))
    for name in re.findall(r"`(\w+)_\{(\w+(?:,\w+)*)\}\.sh`", text):
        named |= {f"{name[0]}_{kind}.sh" for kind in name[1].split(",")}
    assert named - {"X.sh"} == {p.name for p in (REPOSITORY / "slurm").glob("*.sh")}
    assert all((REPOSITORY / "slurm" / target).exists() for target in re.findall(r"\]\(([^)#:]+)\)", text))


def test_site_file_serves_a_login_shell(slurm):  # noqa: F811
    """Sourced, it exports what sbatch reads; a value that is set wins over the guess."""
    shown = slurm.run(
        "bash", "-c", f"source {REPOSITORY}/slurm/site.sh; env", SITE_ACCOUNT="mine", SITE_CPUS_PER_GPU=3
    )
    wanted = {
        "ACCOUNT": "mine",
        "GPUS_PER_NODE": "4",
        "CPUS_PER_GPU": "3",
        "MEM_PER_GPU": "115200M",
        "TIMELIMIT": "24:00:00",
        "SIGNAL": "B:USR1@300",
    }
    have = dict(re.findall(r"^SBATCH_(\w+)=(.*)", shown, re.MULTILINE))
    assert wanted.items() <= have.items()
    assert "PARTITION" not in have  # the default partition has GPUs: nothing to ask for
    slurm.run(
        "bash", "-c", f"source {REPOSITORY}/slurm/site.sh; sbatch --test-only {REPOSITORY}/slurm/train.sh a b"
    )
    # what it exported must not give GPUs to a job that asks for none
    rehearsal = (
        f"source {REPOSITORY}/slurm/site.sh; REHEARSE=1 bash {REPOSITORY}/slurm/train.sh quickstart random "
        "--dry-run"
    )
    (line,) = re.findall(r"^.*sbatch .*$", slurm.run("bash", "-c", rehearsal), re.MULTILINE)
    assert line.startswith("env -u SBATCH_") and "-u SBATCH_GPUS_PER_NODE " in line
    # a profile's values go before those of the file; an unknown one is named
    profile = f"source {REPOSITORY}/slurm/site.sh; env"
    assert "SBATCH_PARTITION=gpu\n" in slurm.run("bash", "-c", profile, SITE="example")
    assert "SITE=nosuch names no file" in slurm.run("bash", "-c", profile, SITE="nosuch")
    assert "SITE=../site names no file" in slurm.run("bash", "-c", profile, SITE="../site")  # itself


def test_site_file_finds_the_partition_with_gpus(tmp_path):
    extra = tmp_path / "extra.conf"
    extra.write_text(
        "PartitionName=cpu Nodes=127.0.0.9 Default=YES State=UP MaxTime=60\n"
        "NodeName=127.0.0.9 NodeHostname=nowhere NodeAddr=127.0.0.1 Port=1 CPUs=4 "
        "RealMemory=8000 State=UNKNOWN\n"
        "PartitionName=short Nodes=127.0.0.2 MaxTime=02:00:00 State=UP\n"
    )
    with cluster(LAB_EXTRA=extra, LAB_PARTITIONS="gpus") as here:
        ask = f"source {REPOSITORY}/slurm/site.sh; env | grep SBATCH"
        guessed = here.run("bash", "-c", ask)
        assert "SBATCH_PARTITION=gpus" in guessed and "SBATCH_TIMELIMIT=24:00:00" in guessed
        assert "SBATCH_TIMELIMIT=120" in here.run("bash", "-c", ask, SITE_PARTITION="short")
        assert "SBATCH_TIMELIMIT=120" in here.run("bash", "-c", ask, SITE_PARTITION="cpu,short")
        # a job without GPUs is not sent to the partition that was guessed for those with
        for more, partition in (
            ({}, None),
            ({"SITE_CPU_PARTITION": "cpu"}, "cpu"),
            ({"SITE_PARTITION": "gpus"}, "gpus"),
        ):
            line = here.plan("train", "a", 2, REHEARSE=1, SITE_CONSTRAINT="big", **more)
            assert re.findall(r"--partition=(\S+)", line) == [partition] * bool(partition)
            assert ("--constraint" in line) == (partition != "cpu")
        sourced = here.run("bash", "-c", f"source {REPOSITORY}/slurm/site.sh; env -0").split("\0")
        exported = dict(word.split("=", 1) for word in sourced if word.startswith(("SITE_", "SBATCH_")))
        for shell in ({}, exported):
            # nor does it ask for that one's time, which may be longer
            line = here.plan("prepare", "small", **shell)
            assert "--partition" not in line and "--time" not in line
            assert "--time=30 " in here.plan("prepare", "small", **{**shell, "SITE_TIME": 30})
            assert "--partition=gpus " in here.plan("train", "a", 2, **shell)


def test_plain_sbatch_finds_the_repository_from_any_folder(slurm, tmp_path):  # noqa: F811
    """In a job $0 is a copy in a spool folder. The last line of a failed log names the cause and the line to
    paste. The last task of an array has the id of all; a script may be a link."""
    (tmp_path / "my link.sh").symlink_to(REPOSITORY / "slurm" / "evaluate.sh")
    words = ["no such $(touch pwned)"]
    options = ["--parsable", "--array=1-2", "--output", tmp_path / "log-%a"]
    records = slurm.wait(slurm.run("sbatch", *options, tmp_path / "my link.sh", *words, cwd=tmp_path))
    for task in "12":
        log = (tmp_path / f"log-{task}").read_text()
        assert "no experiment 'no such $(touch pwned)'" in log
        assert log.splitlines()[-1].endswith(
            f"submit again: bash {REPOSITORY}/slurm/evaluate.sh 'no such $(touch pwned)'"
        )
    assert {record["ExitCode"] for record in records} == {"2:0"} and len(records) == 2
    assert not (tmp_path / "pwned").exists()
    # a copy cannot know where the repository is
    copy = shutil.copy(REPOSITORY / "slurm" / "evaluate.sh", tmp_path / "copy.sh")
    said = slurm.run("bash", copy, "small", cwd=tmp_path, check=False)
    assert said.endswith("set INHERITUNE_REPOSITORY to the repository, or link the script")


def test_mistakes_at_submission_are_one_sentence(slurm, small, own_root):  # noqa: F811
    """Nothing is submitted, and the exit code is 2. What else is refused: unit/test_submit.py."""
    said = slurm.run("bash", "-c", f"bash {REPOSITORY}/slurm/train.sh {small} refrence; echo code $?")
    assert "did you mean 'reference'?\ncode 2" in said
    fetch = REPOSITORY / "slurm" / "fetch.sh"
    assert "did you mean 'quickstart'?" in slurm.run("bash", fetch, "quickstat", check=False)
    nowhere = own_root.parent / "slurm.conf"
    nowhere.touch()  # not a missing one, for which Slurm's commands wait a minute
    train = [REPOSITORY / "slurm" / "train.sh", small, "reference"]
    elsewhere = slurm.run("bash", *train, check=False, SLURM_CONF=nowhere)
    assert elsewhere.startswith("inheritune: no Slurm answers here")
    assert elsewhere.count("\n") == 0
    (own_root / "runs").mkdir(exist_ok=True)
    (own_root / "runs" / "logs").write_text("a file")
    assert "runs/logs cannot be written (File exists)" in slurm.run("bash", *train, check=False)
    assert not slurm.run("squeue", "-h")


def test_baselines_of_baselines_wait(slurm, own_root, capsys):  # noqa: F811
    """Each other run is a task of one array. The run whose layers an analysis chooses waits for that."""
    script = REPOSITORY / "slurm" / "gpt2_medium_baselines.sh"
    waiting = ["--", "--hold", "--dependency=singleton"]
    printed = slurm.run("bash", script, *waiting)
    first, analysis, *behind = re.findall(r"^submitted job (\d+)$", printed, re.MULTILINE)
    names = list_baselines(load_experiment("gpt2_medium_owt"))
    number = {name: position for position, name in enumerate(names, 1)}
    (measuring,) = slurm.records(analysis)
    assert measuring["JobName"] == "analyze-reference-gpt2_medium_owt"
    assert measuring["Dependency"] == "singleton(unfulfilled)"
    (chosen,) = (
        job for job in behind if slurm.records(job)[0]["Dependency"] == f"afterok:{analysis}(unfulfilled)"
    )
    assert slurm.records(chosen)[0]["ArrayTaskId"] == str(number["influence"])
    behind.remove(chosen)
    waits = {"stacking": "stacking_half", "inheritune_18_200k_50k": "reference_200k_50k"}
    waits["inheritune_clip"] = "reference_clip"
    for job, (run, source) in zip(behind, waits.items(), strict=True):
        (record,) = slurm.records(job)
        assert record["ArrayTaskId"] == str(number[run])
        assert record["Dependency"].startswith(f"afterok:{first}_{number[source]}(")
    alone = sorted(int(line) for line in slurm.run("squeue", "-h", "-r", "-j", first, "-o", "%K").split())
    assert alone == sorted(set(number.values()) - {number[run] for run in (*waits, "influence")})
    assert f"not submitted: job {first}" in slurm.run("bash", script, *waiting)
    with slurm.login():  # of an array over runs, one task
        status("gpt2_medium_owt")
        told = capsys.readouterr().out
        assert re.search(rf"^random_12 +queued .* {first}_{number['random_12']} held", told, re.MULTILINE)
        cancel("gpt2_medium_owt", "stacking_half")
        (line,) = capsys.readouterr().out.splitlines()
        assert line.startswith(
            f"cancelled job {first}_{number['stacking_half']} (PENDING: train gpt2_medium_owt/"
        )
        assert line.endswith(f"; job(s) {behind[0]}_{number['stacking']} waited for it")
        assert len(slurm.run("squeue", "-h", "-r").splitlines()) == len(names)
        cancel("gpt2_medium_owt")
        ended = sorted([first, analysis, chosen, *behind])
        assert sorted(re.findall(r"cancelled job (\S+)", capsys.readouterr().out)) == ended
        slurm.wait(*ended)
        # what it waited for is gone, and so is that reason to trust that it has what it needs
        with pytest.raises(UserError, match="its data is not prepared"):
            retry(behind[0])
        assert "not queued any more; now it does not wait" in capsys.readouterr().out
        retry(f"{first}_{number['random_12']}")
    said = capsys.readouterr().out
    assert f"--array={number['random_12']} " in said, said
    slurm.run("scancel", re.search(r"^submitted job (\d+)$", said, re.MULTILINE)[1])
    # nor is it queued without its data
    assert "cannot start yet: its data is not prepared" in slurm.run("bash", script, check=False)
    assert f"--dependency=afterok:JOB_{number['stacking_half']} " in slurm.run("bash", script, "--dry-run")


@pytest.mark.slow
def test_a_paper_script_submits_where_no_folder_is_set(tmp_path, monkeypatch):
    """By default runs and data belong to the checkout: here a copy of it. The first job that the cluster does
    not take ends the script, which then goes on where it ended."""
    code, extra = tmp_path / "code", tmp_path / "extra.conf"
    for path in list_code():
        (code / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPOSITORY / path, code / path)
    extra.write_text("MaxArraySize=5\n")
    for name in ("INHERITUNE_ROOT", "HF_HOME", "SCRATCH"):
        monkeypatch.delenv(name, raising=False)
    ask = {"PYTHONPATH": code, "REHEARSE": 1, "SUBMIT": 1, "VIRTUAL_ENV": sys.prefix}
    script = f"bash {shlex.quote(str(code))}/recipes/table5_val_loss.sh; echo ends with $?"
    with cluster(LAB_EXTRA=extra) as here:
        here.run("scontrol", "update", "nodename=ALL", "state=drain", "reason=test")  # nothing starts
        said = here.run("bash", "-c", script, **ask)
        jobs = re.findall(r"^submitted job (\d+)$", said, re.MULTILINE)
        queued = dict(line.split() for line in here.run("squeue", "-h", "-o", "%A %E").splitlines())
        (record,) = here.records(jobs[1])
        again = here.run("bash", "-c", f"ARRAY=1-4%1 {script}", **ask)
        then = here.run("squeue", "-h", "-o", "%A").split()
    assert "(MaxArraySize=5); use ARRAY=1-4%1" in said and said.endswith("\nends with 1")
    assert f"queued so far: {' '.join(jobs)} (scancel {' '.join(jobs)} cancels them)" in said
    assert queued.keys() == set(jobs) and record["StdOut"].startswith(f"{code}/runs/logs/")
    assert [queued[job] for job in jobs[:2]] == ["(null)", f"afterok:{jobs[0]}(unfulfilled)"]
    assert again.endswith("When these jobs are done, run this again: it then only draws.\nends with 0")
    assert re.findall(r"not submitted: job (\d+) \(PENDING\) does this already", again) == jobs
    assert set(then) == {*jobs, *re.findall(r"^submitted job (\d+)$", again, re.MULTILINE)}


def test_a_module_that_is_loaded_again_does_not_hide_the_environment(slurm, tmp_path):  # noqa: F811
    """Lmod reloads a module that the submitting shell had loaded, whose Python then goes before the active
    environment's; and the shell that sbatch wraps a command in may drop the function `module`."""
    (tmp_path / "init").mkdir(), (tmp_path / "bin").mkdir()
    (tmp_path / "init" / "bash").write_text(f"module() {{ echo loads $2; PATH={tmp_path}/bin:$PATH; }}\n")
    (tmp_path / "bin" / "python").write_text("#!/bin/bash\necho the Python of the module >&2\nexit 1\n")
    (tmp_path / "bin" / "python").chmod(0o755)
    job = slurm.submit(
        COUNTING,
        tmp_path / "a",
        2,
        VIRTUAL_ENV=COUNTING.parent,  # whose bin/python is the stand-in
        SITE_MODULES="python/3.11",
        MODULESHOME=tmp_path,
        LMOD_PKG="",
        CONDA_DEFAULT_ENV="base",
    )
    (record,) = slurm.wait(job)
    assert record["JobState"] == "COMPLETED" and "loads python/3.11" in slurm.log(job), slurm.logs()


@pytest.mark.slow
def test_a_controller_that_does_not_answer_is_asked_again(slurm, tmp_path):  # noqa: F811
    """Neither the start of a job nor its requeue fails for it."""
    (tmp_path / "bin").mkdir(), (tmp_path / "calls").mkdir()
    stub, first = tmp_path / "bin" / "scontrol", f"[ -e {tmp_path}/calls/$2 ]"
    stub.write_text(f"""#!/bin/bash
[ $1 != show ] || {first} || {{ touch {tmp_path}/calls/$2; exit 1; }}
exec {shutil.which("scontrol")} "$@"
""")
    stub.chmod(0o755)
    job = slurm.submit(COUNTING, tmp_path / "a", 30, PATH=f"{tmp_path}/bin:{os.environ['PATH']}")
    slurm.wait_for_log(job, "rank 3 counts from 0")
    (tmp_path / "calls" / "job").unlink()
    slurm.ask_to_stop(job)
    (record,) = slurm.wait(job)
    assert (
        record["JobState"] == "COMPLETED" and record["Restarts"] == "1" and counted(tmp_path / "a") == {30}
    ), slurm.logs()
    assert {path.name for path in (tmp_path / "calls").iterdir()} == {"config", "job", "hostnames"}


def test_names_are_data(slurm, tmp_path):  # noqa: F811
    folder = tmp_path / "it's $(touch pwned) `touch pwned` & a name"
    job = slurm.submit(COUNTING, folder, 3, cwd=tmp_path)
    (record,) = slurm.wait(job)
    assert record["JobState"] == "COMPLETED", slurm.logs()
    assert (folder / "DONE").exists() and not list(tmp_path.rglob("pwned"))


def test_a_second_submission_is_told(slurm, tmp_path, capsys):  # noqa: F811
    job = slurm.submit(COUNTING, tmp_path / "a", 3, "--", "--hold")
    assert slurm.submit(COUNTING, tmp_path / "a", 3, "--", "--job-name=other") == job
    assert (
        f"not submitted: job {job} (PENDING) does this already (train a/3, seed 0)" in capsys.readouterr().out
    )
    assert slurm.submit(COUNTING, tmp_path / "a", 3, "--", "--hold", FORCE=1) != job


def test_what_is_queued_is_known_before_more_is(slurm, small, own_root, tmp_path):  # noqa: F811
    """A squeue that fails, a damaged record, a STOP file, an answer of sbatch with more lines or none."""
    script, run = REPOSITORY / "slurm" / "train.sh", RunDir.of(load_experiment(small), "reference")
    train = ["bash", script, small, "reference"]
    (tmp_path / "bin").mkdir()

    def run_with(name: str, body: str, *words, **environment) -> str:
        stub = tmp_path / "bin" / name
        stub.write_text(f"#!/bin/bash\n{body}\n")
        stub.chmod(0o755)
        path = f"{tmp_path}/bin:{os.environ['PATH']}"
        said = slurm.run(
            "bash", "-c", f"{shlex.join(map(str, words))}; echo ends with $?", PATH=path, **environment
        )
        stub.unlink()
        return said

    real = shutil.which("sbatch")
    said = run_with("sbatch", f'{real} "$@"; echo Thank you', *train, "--", "--hold")
    job = re.search(r"^submitted job (\d+)$", said, re.MULTILINE)[1]
    said = run_with("squeue", "exit 1", *train)
    assert said.startswith("inheritune: squeue does not answer") or "\ninheritune: squeue does not" in said
    assert said.endswith("ends with 2") and "FORCE=1" in said
    said = run_with("squeue", "exit 1", "python", "-m", "inheritune", "retry", job)
    assert f"not known whether job {job} is queued" in said and said.endswith("ends with 2")
    said = run_with("sbatch", "echo Thank you", *train, FORCE=1)
    assert "without a job's number (it said 'Thank you')" in said and said.endswith("ends with 2")
    record = find_record(job)
    kept = record.read_bytes()
    record.write_bytes(kept[:100])
    assert f"{record} of queued job {job} is damaged" in slurm.run(*train, check=False)
    record.write_bytes(kept)
    assert f"not submitted: job {job}" in slurm.run(*train)
    # Ctrl-C between sbatch's answer and the record
    other = [*train, "--seed", "1"]
    said = run_with("sbatch", f'n=$({real} "$@"); kill -INT $PPID; sleep 1; echo $n', *other, "--", "--hold")
    assert "submitted job" in said, said
    second = re.search(r"^submitted job (\d+)$", said, re.MULTILINE)[1]
    assert said.endswith("ends with 130") and f"not submitted: job {second}" in slurm.run(*other)
    run.stop.parent.mkdir(parents=True)
    run.stop.touch()
    assert f"{run.stop} exists; delete it to continue" in slurm.run(*train, check=False)
    assert set(slurm.run("squeue", "-h", "-o", "%A").split()) == {job, second}


def test_a_retry_asks_for_the_same_from_any_folder(slurm, small, own_root, tmp_path, monkeypatch):  # noqa: F811
    """Also for a rehearsal, and with the file of the folder that the job was submitted from."""
    write_tokens(get_data_dir(load_experiment(small, rehearse=True)))
    script = REPOSITORY / "slurm" / "train.sh"
    ask = ["bash", script, Path(small).name, "reference", "--rehearse", "--no-snapshot", "--", "--hold"]
    job = re.search(r"^submitted job (\d+)$", slurm.run(*ask, cwd=Path(small).parent), re.MULTILINE)[1]
    slurm.run("scancel", job)
    slurm.wait(job)
    said = slurm.run("python", "-m", "inheritune", "retry", job, cwd=tmp_path)
    again = re.search(r"^submitted job (\d+)$", said, re.MULTILINE)[1]
    (first,), (second,) = slurm.records(job), slurm.records(again)
    same = ("NumCPUs", "TimeLimit", "WorkDir", "JobName")
    assert [first[key] for key in same] == [second[key] for key in same]
    assert "TresPerNode" not in second and "runs/code" not in said and "--rehearse" in said


def test_the_rest_of_some_baselines_is_queued(slurm, own_root, capsys):  # noqa: F811
    script = REPOSITORY / "slurm" / "gpt2_medium_baselines.sh"
    waiting = ["--", "--hold", "--dependency=singleton"]
    names = list_baselines(load_experiment("gpt2_medium_owt"))
    alone = slurm.run("bash", REPOSITORY / "slurm" / "train.sh", "gpt2_medium_owt", names[0], *waiting)
    one = re.search(r"^submitted job (\d+)$", alone, re.MULTILINE)[1]
    said = slurm.run("bash", script, *waiting)
    assert f"not submitted: job {one} (PENDING) does this already (train gpt2_medium_owt/{names[0]}," in said
    tasks = [line.split() for line in slurm.run("squeue", "-h", "-r", "-o", "%A %K").splitlines()]
    others = list(range(2, len(names) + 1))
    assert sorted(int(k) for _, k in tasks if k != "N/A") == others
    # the first, and the analysis that chooses the layers of one of them
    assert len(tasks) == len(others) + 2
    lost = next(job for job in slurm.run("squeue", "-h", "-r", "-o", "%i").split() if job != one)
    slurm.run("scancel", lost)
    slurm.until(lambda: len(slurm.run("squeue", "-h", "-r").splitlines()) == len(names))
    slurm.run("bash", script, *waiting)
    assert len(slurm.run("squeue", "-h", "-r").splitlines()) == len(names) + 1


@pytest.mark.slow
def test_jobs_are_known_by_what_they_do(slurm, small, own_root, capsys):  # noqa: F811
    """queue, status, cancel and retry, and a job that will never start."""
    asked = [
        "--",
        "--hold",
        "--nice=7",
        "--mail-user=me@here",
        "--mail-type=END",
        "--exclude=127.0.0.3",
        "--comment=mine",
    ]
    with slurm.login():
        submit("train", [small, "reference", *asked])
        status(small)  # a growth would train the reference too
        assert "next" not in capsys.readouterr().out
        submit("train", [small, "grown", "--stage", "1", "--", "--hold", "--dependency=afterok:1"])
        said = capsys.readouterr().out
        assert re.search(r"^log: .* \(once the job has started\)$", said, re.MULTILINE)
        behind = re.search(r"^submitted job (\d+)$", said, re.MULTILINE)[1]
        job = str(int(behind) - 1)
        slurm.run("scontrol", "update", f"jobid={behind}", f"dependency=afterok:{job}")
        print_queue()
        rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
        assert "(JobHeldUser)" in rows[job] and "train small/reference, seed 0" in rows[job]
        assert "train small/grown stage 1, seed 0" in rows[behind] and f"afterok:{job}" in rows[behind]
        status(small)
        said = capsys.readouterr().out
        assert re.search(
            rf"^reference +queued.* {job} held \(JobHeldUser\): scontrol release {job}$", said, re.MULTILINE
        ), said
        # a command that is pasted must not queue the same a second time
        assert "reference: next" not in said and "grown: next" not in said
        submit("train", [small, "reference"])
        assert f"not submitted: job {job} (PENDING) does this already" in capsys.readouterr().out
        cancel("small", "reference")
        assert (
            f"cancelled job {job} (PENDING: train small/reference, seed 0); job(s) {behind} waited for it"
            in (capsys.readouterr().out)
        )
        slurm.wait(job, behind)
        status(small)
        assert (
            f"job {behind} left the queue before it started (it waited for afterok:1)"
            in capsys.readouterr().out
        )
        retry(job)
        again = re.search(r"^submitted job (\d+)$", capsys.readouterr().out, re.MULTILINE)[1]
    (first,), (second,) = slurm.records(job), slurm.records(again)
    same = ("JobName", "Nice", "MailUser", "ExcNodeList", "Comment", "TresPerNode", "TimeLimit")
    assert {key: first[key] for key in same} == {key: second[key] for key in same} and first["Nice"] == "7"
    # each runs the code that was there when it was submitted
    assert f"exec bash {own_root}/runs/code/" in slurm.run("scontrol", "write", "batch_script", again, "-")


def test_in_an_allocation_a_dry_run_is_dry_and_index_0_is_refused(slurm, small, own_root):  # noqa: F811
    script = REPOSITORY / "slurm" / "train.sh"
    allocation = ["salloc", "--nodes=1", "--gpus-per-node=2"]
    said = slurm.run(*allocation, "bash", script, small, "reference", "--dry-run")
    assert re.search(
        rf"would run: srun .*--ntasks=2 .*python -m inheritune train {small} --run reference", said
    )
    assert not (own_root / "runs" / "small").exists()
    log = own_root.parent / "log"
    job = slurm.run(
        "sbatch", "--parsable", "--array=0", "-o", log, REPOSITORY / "slurm" / "evaluate.sh", small
    )
    assert slurm.wait(job)[0]["ExitCode"] == "2:0" and "the array has index 0" in log.read_text()
    assert f" (live checkout {REPOSITORY}: what is edited there reaches this job), " in log.read_text()
    # a mistake of plain sbatch costs one slot
    words = [REPOSITORY / "slurm" / "grow.sh", small, "grown", "--sead", "1"]
    job = slurm.run("sbatch", "--parsable", "--array=1-3%1", "-o", own_root.parent / "mistake", *words)
    slurm.wait(job)
    assert set(states(slurm, job).values()) == {"FAILED", "CANCELLED"}
    assert "did you mean '--seed'?" in (own_root.parent / "mistake").read_text()


def test_tasks_that_would_work_on_one_run_at_once_do_not(slurm, small, own_root):  # noqa: F811
    """Plain sbatch queues such an array, and both tasks start. `submit` refuses it: unit/test_submit.py."""
    for script, run in (("grow", "grown"), ("train", "reference")):
        log = own_root.parent / f"{script}-%a"
        command = ["sbatch", "--parsable", "--array=1-2", "-o", log, REPOSITORY / "slurm" / f"{script}.sh"]
        job = slurm.run(*command, small, run)
        slurm.wait(job)
        ended = states(slurm, job)
        assert ended["1"] == "FAILED" and set(ended.values()) <= {"FAILED", "CANCELLED"}
        logs = [path.read_text() for path in own_root.parent.glob(f"{script}-?")]
        for text in logs:
            last = text.splitlines()[-1]
            assert "FAILED (code 2): the tasks of this array would work on one run at the same time" in last
            assert "submit it with --array=1-N%1; fix that, then submit again: bash " in last
        assert logs and not (own_root / "runs" / "small").exists()


def edit(path: str) -> str:
    """Change an experiment, so that its next submission runs another snapshot; its path."""
    Path(path).write_text(f"{Path(path).read_text()}# edited\n")
    return path


def test_snapshots_go_when_no_job_can_run_them(slurm, small, own_root, capsys):  # noqa: F811
    code = own_root / "runs" / "code"

    def ask(*words) -> tuple[str, str]:
        """(job, name of its snapshot)"""
        submit("train", [edit(small), *words, "--", "--hold", "--dependency=singleton"])
        job = re.search(r"^submitted job (\d+)$", capsys.readouterr().out, re.MULTILINE)[1]
        return job, next(code.glob(f"*.used-lab.{job}")).name.partition(".")[0]

    with slurm.login(FORCE="1"):
        queued, first = ask("reference")
        over, second = ask("reference")
        gone, third = ask("reference")
        _, fourth = ask("reference")
        cancel(over), cancel(gone)  # Slurm knows them for a while, and would requeue them
        ask("reference")
        snapshots = {first, second, third, fourth}
        assert {path.name for path in code.iterdir() if path.is_dir()} > snapshots
        # as when it has forgotten a job; another cluster's queue, and a submission's intention, are unknown
        (code / f"{third}.used-lab.{gone}").rename(code / f"{third}.used-lab.999999")
        (code / f"{second}.used-lab.{over}").rename(code / f"{second}.used-elsewhere.{over}")
        (code / f"{first}.used-lab.999998").touch()
        (code / f"{fourth}.used-login+7").touch()
        submit("train", [edit(small), "reference", "--", "--hold"])
        assert "removed 1 snapshot(s) of runs/code that no job can run any more" in capsys.readouterr().out
        assert {path.name for path in code.iterdir() if path.is_dir()} > snapshots - {third}
        assert not list(code.glob(f"{third}*")) and (code / f"{first}.used-lab.{queued}").is_file()
        assert not (code / f"{first}.used-lab.999998").exists()
        # one that was refused marks nothing
        with pytest.raises(UserError, match="sbatch refused the job"):
            submit("train", [edit(small), "reference", "--", "--partition=nowhere"])
        assert len(list(code.glob("*.used-login+*"))) == len(list(code.glob("*+*"))) == 1


def test_a_job_whose_snapshot_was_removed_says_so(slurm, small, own_root):  # noqa: F811
    words = ["grow", [small, "grown", "--", "--hold"]]
    with slurm.login(ARRAY="1-3%1"):
        submit(*words)
    array = slurm.run("squeue", "-h", "-o", "%F").splitlines()[0]
    (code,) = [path for path in (own_root / "runs" / "code").iterdir() if path.is_dir()]
    shutil.rmtree(code)
    slurm.run("scontrol", "release", array)
    slurm.wait(array)
    assert set(states(slurm, array).values()) == {"FAILED", "CANCELLED"}
    last = slurm.log(f"{array}_1").splitlines()[-1]
    cause = f"the snapshot {code}, which this job runs, was removed"
    assert last.startswith(f"job {array}_1: FAILED (code 2): {cause}; submit again: ARRAY=1-3%1 bash ")
    assert f"Comment={cause}" in slurm.run("scontrol", "show", "job", f"{array}_1")


def test_what_the_site_file_names_must_exist_before_a_job_queues(slurm, small):  # noqa: F811
    script = REPOSITORY / "slurm" / "train.sh"
    for site, says in (
        ({"SITE_MODULES": "nosuch"}, "inheritune: module load nosuch failed on "),
        ({"SITE_CONDA": "nosuch"}, "inheritune: conda activate nosuch failed on "),
        ({"SITE_APPTAINER": "/no/image"}, "inheritune: SITE_APPTAINER is /no/image, which does not exist"),
    ):
        said = slurm.run("bash", "-c", f"bash {script} {small} reference; echo code $?", **site)
        *_, last, code = said.splitlines()
        assert last.startswith(says) and code == "code 2", said
    assert not slurm.run("squeue", "-h")


def test_work_of_another_user_in_the_same_folder_is_not_queued_twice(slurm, small, own_root, capsys):  # noqa: F811
    """And one whose program has not begun to write is starting."""
    if os.geteuid():
        pytest.skip("submitting for another user needs root")
    sleep = ["--parsable", "-o", "/dev/null", "--wrap", "sleep 60"]
    theirs = slurm.run("sbatch", "--uid=nobody", "--hold", *sleep)
    mine = slurm.run("sbatch", *sleep)
    for job, run in ((theirs, "grown"), (mine, "reference")):
        keys = make_keys("train", small, [run])
        write_record(job, Record("train", "train.sh", (small, run), (), ("bash",), "bash train.sh", keys))
    slurm.until(lambda: slurm.records(mine)[0]["JobState"] == "RUNNING")
    with slurm.login():
        submit("grow", [small, "grown"])
        assert f"not submitted: job {theirs} (PENDING) does this already" in capsys.readouterr().out
        status(small)
        assert re.search(rf"^reference +starting .* {mine} on 127", capsys.readouterr().out, re.MULTILINE)
    slurm.run("scancel", theirs)


@pytest.mark.slow
def test_a_job_that_goes_on_in_another_keeps_its_snapshot(slurm, small, own_root):  # noqa: F811
    job = slurm.submit(REPOSITORY / "slurm" / "train.sh", small, "reference", GPUS=1, SITE_REQUEUE="no")
    (mark,) = (own_root / "runs" / "code").glob(f"*.used-lab.{job}")
    slurm.wait_for_log(job, "restart 0 on")
    slurm.ask_to_stop(job)
    slurm.wait(job)
    then = re.search(r"does not requeue; job (\d+) goes on", slurm.log(job))[1]
    assert mark.with_name(f"{mark.name.partition('.')[0]}.used-lab.{then}").is_file(), slurm.logs()
    slurm.run("scancel", then)


@pytest.mark.parametrize("gpus", [4, 0])
def test_rehearsal_asks_for_no_gpu(gpus, tmp_path):
    with cluster(LAB_GPUS=gpus) as here:
        job = here.submit(COUNTING, tmp_path / "a", 2, REHEARSE=1, NODES=2)
        (record,) = here.wait(job)
        assert record["JobState"] == "COMPLETED" and "gpu" not in record["TRES"], here.logs()
        assert "REHEARSAL" in here.log(job) and "2 task(s) of 1 CPU(s)" in here.log(job)
        assert {p.name for p in (tmp_path / "a").iterdir()} == {"rank0", "rank1", "DONE"}
        if not gpus:
            with pytest.raises(UserError, match="sinfo shows no GPU"):
                here.submit(COUNTING, tmp_path / "b", 2)


def test_prepare_rehearses_for_real(slurm, small, own_root):  # noqa: F811
    """As an array of two parts, which the last one joins, from the experiment as it was when submitted."""
    prepared = get_data_dir(load_experiment(small, rehearse=True))
    job = slurm.submit(REPOSITORY / "slurm/prepare.sh", small, "--parts", 2, "--", "--hold", REHEARSE=1)
    Path(small).write_text("data: edited while the job waits")
    slurm.run("scontrol", "release", job)
    slurm.wait(job, timeout=240)
    assert {record["JobState"] for record in slurm.records(job)} == {"COMPLETED"}, slurm.logs()
    logs = [slurm.log(f"{job}_{task}") for task in (1, 2)]
    assert all(f" (snapshot {own_root}/runs/code/" in log for log in logs), logs
    assert all("'bash" not in log and log.splitlines()[-1].endswith("finished") for log in logs), logs
    assert sum("tokens/s" in log for log in logs) == 1, logs
    assert is_prepared(prepared)


def test_a_job_whose_run_has_a_stop_file_says_so_last(slurm, small, own_root):  # noqa: F811
    """The slots behind it are cancelled, and what waits for its success does not start."""
    run = RunDir.of(load_experiment(small), "grown")
    grow = [REPOSITORY / "slurm" / "grow.sh", small, "grown", "--", "--hold"]
    job = slurm.submit(*grow, GPUS=1, ARRAY="1-3%1")
    behind = slurm.submit(COUNTING, own_root / "b", 2, "--", f"--dependency=afterok:{job}")
    run.path.mkdir(parents=True)
    run.stop.touch()
    slurm.run("scontrol", "release", job)
    assert slurm.wait(job, behind, timeout=120)[-1]["JobState"] == "CANCELLED"
    ended = {(record["JobState"], record["ExitCode"]) for record in slurm.records(job)}
    assert ended == {("FAILED", "3:0"), ("CANCELLED", "0:0")} and not run.is_done(), slurm.logs()
    first, last = slurm.log(f"{job}_1").splitlines()[-2:]
    assert "the rest of the array was cancelled: the run was stopped" in first
    assert "stopped, not finished:" in last and f"{run.stop} exists; delete it to continue" in last, (
        slurm.logs()
    )


def test_a_job_without_gpus_and_unequal_nodes_are_refused(slurm, tmp_path):  # noqa: F811
    wrap = shlex.join(["bash", str(COUNTING), str(tmp_path / "a"), "2"])
    unequal = slurm.run("sbatch", "--parsable", "-o", tmp_path / "1", "--nodes=2", "--gpus=3", "--wrap", wrap)
    none = slurm.run("sbatch", "--parsable", "-o", tmp_path / "2", "--nodes=2", "--wrap", wrap)
    assert [r["ExitCode"] for r in slurm.wait(unequal, none)] == ["2:0", "2:0"]
    assert "unequal numbers of GPUs (127.0.0.2: 2, 127.0.0.3: 1)" in (tmp_path / "1").read_text()
    assert "has no GPU" in (tmp_path / "2").read_text()


# --- stopping and going on ----------------------------------------------------------------------------------


def counted(folder: Path) -> set[int]:
    return {int(path.read_text()) for path in folder.glob("rank*")}


def test_usr1_saves_and_the_job_requeues_itself(slurm, tmp_path):  # noqa: F811
    job = slurm.submit(COUNTING, tmp_path / "a", 30, GPUS=8)
    slurm.wait_for_log(job, "rank 7 counts from 0")
    slurm.ask_to_stop(job)
    slurm.wait_for_log(job, "requeued as restart 1")
    assert "stopped at" in slurm.log(job) and not (tmp_path / "a" / "DONE").exists()
    (record,) = slurm.wait(job)
    log = slurm.log(job)
    assert record["JobState"] == "COMPLETED" and record["Restarts"] == "1", log
    assert "restart 1 on" in log and counted(tmp_path / "a") == {30}
    assert log.count("rank 7 counts from 0") == 1  # the second run did not begin anew


def test_a_site_without_requeue_gets_a_new_job_of_the_same_shape(slurm, tmp_path):  # noqa: F811
    asked = "--time=7 --comment=x --nice=7 --mail-user=me@here --mail-type=END --exclusive"
    asked += " --nodelist=127.0.0.[2-3]"
    job = slurm.submit(COUNTING, tmp_path / "a b", 30, "--", *asked.split(), SITE_REQUEUE="no", GPUS=8)
    slurm.wait_for_log(job, "rank 7 counts from 0")
    behind = slurm.submit(COUNTING, tmp_path / "behind", 2, "--", f"--dependency=afterok:{job}")
    slurm.ask_to_stop(job)
    (first,) = slurm.wait(job)
    then = re.search(r"does not requeue; job (\d+) goes on", slurm.log(job))[1]
    (second,) = slurm.wait(then)
    (last,) = slurm.wait(behind)  # of the work's end, not of its first job's
    assert last["JobState"] == "COMPLETED" and last["StartTime"] >= second["EndTime"], slurm.logs()
    assert first["Restarts"] == "0" and second["JobState"] == "COMPLETED", slurm.logs()
    same = ["JobName", "NumNodes", "NumCPUs", "TRES", "TimeLimit", "Partition", "TresPerNode", "StdOut"]
    same += ["Comment", "Nice", "MailUser", "MailType", "OverSubscribe", "ReqNodeList"]
    assert (first["Nice"], first["OverSubscribe"], first["MailType"]) == ("7", "NO", "END")
    assert {key: first[key] for key in same} == {key: second[key] for key in same}
    assert "restart 1 on" in slurm.log(then) and counted(tmp_path / "a b") == {30}
    assert "should wait for" not in slurm.log(job)


def test_what_waits_for_an_array_of_slots_waits_for_the_job_that_goes_on(slurm, tmp_path):  # noqa: F811
    """Where the site does not requeue, its last slot submits a job behind itself."""
    array = slurm.submit(COUNTING, tmp_path / "a", 30, SITE_REQUEUE="no", COUNTING_SLOTS=1, ARRAY="1-1%1")
    slurm.wait_for_log(f"{array}_1", "rank 3 counts from 0")
    behind = slurm.submit(COUNTING, tmp_path / "behind", 2, "--", f"--dependency=afterany:{array}")
    slurm.ask_to_stop(f"{array}_1")
    slurm.wait(array)
    then = re.search(r"does not requeue; job (\d+) goes on", slurm.logs())[1]
    (last,) = slurm.wait(behind)
    ((second,), log) = slurm.wait(then), slurm.logs()
    assert last["JobState"] == second["JobState"] == "COMPLETED" and last["StartTime"] >= second["EndTime"], (
        log
    )
    assert counted(tmp_path / "a") == {30} and "should wait for" not in log


def test_a_refused_submission_of_baselines_fails(slurm, own_root):  # noqa: F811
    script = REPOSITORY / "slurm" / "gpt2_medium_baselines.sh"
    printed = slurm.run(
        "bash",
        "-c",
        f"bash {script} -- --partition=nowhere --dependency=singleton; echo ends with $?",
        check=False,
    )
    assert (
        printed.endswith("ends with 2") and "invalid partition" in printed and "submitted job" not in printed
    )


def test_a_requeue_from_outside_comes_back_once(slurm, tmp_path):  # noqa: F811
    job = slurm.submit(COUNTING, tmp_path / "a", 30)
    slurm.wait_for_log(job, "rank 3 counts from 0")
    slurm.run("scontrol", "requeue", job)
    slurm.wait_for_log(job, "cancelled or requeued from outside")
    (record,) = slurm.wait(job)
    assert record["JobState"] == "COMPLETED" and record["Restarts"] == "1", slurm.log(job)
    assert "SIGTERM" in slurm.log(job) and counted(tmp_path / "a") == {30}


def test_a_cancelled_job_stays_cancelled(slurm, tmp_path):  # noqa: F811
    job = slurm.submit(COUNTING, tmp_path / "a", 100)
    slurm.wait_for_log(job, "rank 3 counts from 0")
    slurm.run("scancel", job)
    (record,) = slurm.wait(job)
    assert record["JobState"] == "CANCELLED" and record["Restarts"] == "0", slurm.log(job)
    assert "cancelled or requeued from outside; to go on: GPUS=4 bash" in slurm.log(job).splitlines()[-1]
    assert len(counted(tmp_path / "a")) and max(counted(tmp_path / "a")) < 100  # but saved


def test_restarts_are_capped(slurm, tmp_path):  # noqa: F811
    job = slurm.submit(COUNTING, tmp_path / "a", 100, MAX_RESTARTS=0)
    slurm.wait_for_log(job, "rank 3 counts from 0")
    slurm.ask_to_stop(job)
    (record,) = slurm.wait(job)
    assert record["ExitCode"] == "1:0" and "all that MAX_RESTARTS allows" in slurm.log(job).splitlines()[-1]


def test_a_preempted_job_comes_back(tmp_path):
    """At preemption the tasks get TERM and save; a job whose step then ends with 0 would count as finished
    (Slurm 22.05)."""
    extra = tmp_path / "preempt.conf"
    extra.write_text(
        "PreemptType=preempt/partition_prio\nPreemptMode=REQUEUE\n"
        "PartitionName=low Nodes=ALL PriorityTier=1 PreemptMode=REQUEUE GraceTime=8 State=UP\n"
        "PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF State=UP\n"
    )
    with cluster(LAB_EXTRA=extra) as here:
        job = here.submit(COUNTING, tmp_path / "a", 40, SITE_PARTITION="low")
        here.wait_for_log(job, "rank 3 counts from 0")
        here.run(
            "sbatch",
            "--partition=high",
            "--nodes=2",
            "--exclusive",
            "--output=/dev/null",
            "--wrap",
            "sleep 1",
        )
        (record,) = here.wait(job)
        assert record["JobState"] == "COMPLETED" and int(record["Restarts"]) >= 1, here.log(job)
        assert "by SIGTERM" in here.log(job) and counted(tmp_path / "a") == {40}
        assert here.log(job).count("counts from 0") == 4


def test_a_lost_node_brings_the_job_back(tmp_path):
    with cluster() as here:
        job = here.submit(COUNTING, tmp_path / "a", 30, "--", "--nodelist=127.0.0.2")
        here.wait_for_log(job, "rank 3 counts from 0")
        here.run("scontrol", "update", "nodename=127.0.0.2", "state=down", "reason=test")
        here.until(lambda: here.records(job)[0]["JobState"] == "PENDING")
        # the lost node's processes are gone
        here.until(lambda: not here.run("pgrep", "-f", tmp_path / "a", check=False))

        def finished() -> bool:
            """As a person would: the node is put to use again, and a job that it could not start meanwhile is
            released."""
            # it may be back by itself
            here.run("scontrol", "update", "nodename=127.0.0.2", "state=resume", check=False)
            here.run("scontrol", "release", job, check=False)
            return here.records(job)[0]["JobState"] == "COMPLETED"

        here.until(finished, 120)
        (record,) = here.records(job)
        assert int(record["Restarts"]) >= 1, here.log(job)
        assert counted(tmp_path / "a") == {30}


# --- failing ------------------------------------------------------------------------------------------------


def test_a_killed_task_fails_the_job_with_its_cause(slurm, tmp_path):  # noqa: F811
    job = slurm.submit(COUNTING, tmp_path / "a", 50, COUNTING_FAILS="killed")
    (record,) = slurm.wait(job)
    last = slurm.log(job).splitlines()[-1]
    assert record["JobState"] == "FAILED" and record["ExitCode"] == "137:0"
    assert "killed by signal 9 (out of memory?) on one of the nodes 127.0.0." in last
    assert last.endswith(
        f"resumes from the last checkpoint: GPUS=4 bash {COUNTING} {tmp_path}/a 50 --no-snapshot"
    )


def test_a_run_without_done_is_not_finished(slurm, tmp_path):  # noqa: F811
    job = slurm.submit(COUNTING, tmp_path / "a", 3, COUNTING_FAILS="done")
    (record,) = slurm.wait(job)
    last = slurm.log(job).splitlines()[-1]
    assert record["ExitCode"] == "1:0" and "the program ended without an error" in last, slurm.log(job)
    assert "seed0/3 has no DONE" in last


def test_restarts_without_a_new_step_stop_with_the_reason(slurm, tmp_path):  # noqa: F811
    """Here by the slots of an array: no requeue has to be waited for."""
    job = slurm.submit(COUNTING, tmp_path / "a", 5, COUNTING_SLOTS=1, COUNTING_FAILS="idle")
    for slot in "123":
        slurm.wait_for_log(f"{job}_{slot}", "rank 3 counts from 0")
        slurm.ask_to_stop(f"{job}_{slot}")
    slurm.wait(job)
    assert [states(slurm, job)[slot] for slot in "123"] == ["COMPLETED", "COMPLETED", "FAILED"], slurm.logs()
    last = slurm.log(f"{job}_3").splitlines()[-1]
    assert "FAILED (code 1): no progress: 2 restarts in a row without a new step" in last
    assert "CANCELLED" in states(slurm, job).values()


def test_a_failure_before_python_names_node_and_cause(slurm, own_root, tmp_path):  # noqa: F811
    """No environment on the node, a module that does not load; and on a full disk, where no line can be
    written, Slurm's comment has the cause. The slots behind are cancelled."""
    script = REPOSITORY / "slurm" / "gpt2_xl_growth.sh"
    lost = dict.fromkeys(("VIRTUAL_ENV", "CONDA_PREFIX"), "")
    command = ["sbatch", "--parsable", "--array=1-3%1"]
    jobs = [
        slurm.run(*command, "--output", tmp_path / "no-environment", script, **lost),
        slurm.run(*command, "--output", tmp_path / "no-module", script, SITE_MODULES="nosuch"),
        slurm.run(*command, "--output", "/dev/full", script, **lost),
    ]
    slurm.wait(*jobs)
    for job, cause in zip(
        jobs, ("the Python environment", "module load nosuch", "the Python environment"), strict=True
    ):
        assert set(states(slurm, job).values()) == {"FAILED", "CANCELLED"}
        shown = slurm.run("scontrol", "show", "job", f"{job}_1")
        assert re.search(rf"Comment=127\.0\.0\.\d: {cause} failed", shown), shown
    last = (tmp_path / "no-environment").read_text().splitlines()[-1]
    assert "FAILED (code 2): the Python environment failed on node 127.0.0." in last
    assert last.endswith(f"submit again: bash {script} ")
    assert not (own_root / ".venv").exists()


def test_on_a_full_disk_nothing_is_queued_and_a_job_leaves_its_cause_with_slurm(
    slurm,  # noqa: F811
    small,
    tmp_path,
    disk,
    monkeypatch,
):
    monkeypatch.setenv("INHERITUNE_ROOT", str(disk.path))
    write_tokens(get_data_dir(load_experiment(small)))
    array = slurm.submit(COUNTING, tmp_path / "a", 5, "--", "--hold", COUNTING_SLOTS=1)
    behind = slurm.submit(COUNTING, tmp_path / "b", 5, "--", f"--dependency=afterok:{array}")
    for free, says in ((0, "cannot be written .No space left on device."), (99_000, "no space left while")):
        disk.resize(disk.used() + free)
        with slurm.login(), pytest.raises(UserError, match=says):
            submit("train", [small, "reference"])
    assert {name.partition("_")[0] for name in slurm.run("squeue", "-hr", "-o%i").split()} == {array, behind}
    disk.resize(disk.used())
    slurm.run("scontrol", "release", array)
    slurm.wait(array, behind)
    assert set(states(slurm, array).values()) == {"FAILED", "CANCELLED"}
    assert slurm.records(behind)[0]["JobState"] == "CANCELLED" and not (tmp_path / "a").exists()
    shown = slurm.run("scontrol", "show", "job", f"{array}_1")
    assert re.search(r"Comment=127\.0\.0\.\d: .*No space left on device", shown), shown


# --- arrays of slots ----------------------------------------------------------------------------------------


def find_node(slurm, job) -> str:  # noqa: F811
    """The node that a job on one node ran on: not the first one, while that still ends another job."""
    return re.search(r" on 1 node\(s\) (127\.0\.0\.[23]),", slurm.log(job))[1]


def states(slurm, job) -> dict[str, str]:  # noqa: F811
    return {record["ArrayTaskId"]: record["JobState"] for record in slurm.records(job)}


def test_the_next_slot_goes_on_and_surplus_ones_are_cancelled(slurm, tmp_path):  # noqa: F811
    job = slurm.submit(COUNTING, tmp_path / "a", 20, COUNTING_SLOTS=1)
    behind = slurm.submit(COUNTING, tmp_path / "b", 2, "--", f"--dependency=afterok:{job}")
    slurm.wait_for_log(f"{job}_1", "rank 3 counts from 0")
    slurm.ask_to_stop(f"{job}_1")
    records = slurm.wait(job)
    assert [states(slurm, job)[task] for task in "12"] == ["COMPLETED"] * 2, slurm.logs()
    assert "CANCELLED" in states(slurm, job).values() and {r["Restarts"] for r in records} == {"0"}
    assert "the next slot of the array goes on" in slurm.log(f"{job}_1")
    assert "the rest of the array was cancelled: nothing is left" in slurm.log(f"{job}_2")
    # what waited for the success of the whole array waits for the slot that had it
    assert slurm.wait(behind)[0]["JobState"] == "COMPLETED", slurm.logs()
    assert counted(tmp_path / "a") == {20}


def test_the_last_slot_requeues_itself_alone(slurm, tmp_path):  # noqa: F811
    """The last task of an array has the array's own id: what is said of it must not reach the others."""
    job = slurm.submit(COUNTING, tmp_path / "a", 30, COUNTING_SLOTS=1, ARRAY="1-2%1")
    for task in "12":
        slurm.wait_for_log(f"{job}_{task}", "rank 3 counts from")
        slurm.ask_to_stop(f"{job}_{task}")
    records = slurm.wait(job)
    assert {(r["ArrayTaskId"], r["JobState"], r["Restarts"]) for r in records} == {
        ("1", "COMPLETED", "0"),
        ("2", "COMPLETED", "1"),
    }
    assert counted(tmp_path / "a") == {30}


def test_a_chain_of_jobs_does_what_an_array_does(slurm, tmp_path):  # noqa: F811
    first = slurm.submit(COUNTING, tmp_path / "a", 10, COUNTING_SLOTS=1, ARRAY="no")
    behind = f"--dependency=afterany:{first}"
    second = slurm.submit(COUNTING, tmp_path / "a", 10, "--", behind, COUNTING_SLOTS=1, ARRAY="no", FORCE=1)
    assert [r["JobState"] for r in slurm.wait(first, second)] == ["COMPLETED", "COMPLETED"], slurm.logs()
    assert counted(tmp_path / "a") == {10} and "nothing is left to do" in slurm.log(second)


def test_a_mistake_stops_the_rest_of_the_array(slurm, tmp_path):  # noqa: F811
    job = slurm.submit(COUNTING, tmp_path / "a", 20, COUNTING_SLOTS=1, COUNTING_FAILS="mistake")
    behind = slurm.submit(COUNTING, tmp_path / "b", 2, "--", f"--dependency=afterok:{job}")
    slurm.wait(job, behind)
    assert set(states(slurm, job).values()) == {"FAILED", "CANCELLED"}, slurm.logs()
    assert slurm.records(behind)[0]["JobState"] == "CANCELLED"
    last = slurm.log(f"{job}_1").splitlines()[-1]
    assert f"FAILED (code 2): {find_node(slurm, f'{job}_1')} rank 0: the loss is not a number; " in last
    assert (
        f"; job(s) {behind} waited for its success and will not start; fix that, then submit again: " in last
    )


def test_the_same_crash_twice_stops_the_array_and_another_slot_is_told_why(slurm, tmp_path):  # noqa: F811
    job = slurm.submit(COUNTING, tmp_path / "a", 20, COUNTING_SLOTS=1, COUNTING_FAILS="crash")
    slurm.wait(job)
    assert [states(slurm, job).get(t) for t in "12"] == ["FAILED", "FAILED"] and "CANCELLED" in states(
        slurm, job
    ).values()
    assert "the rest of the array was cancelled" not in slurm.log(f"{job}_1")
    assert "the rest of the array was cancelled" in slurm.log(f"{job}_2")
    cause = f"{find_node(slurm, f'{job}_2')} rank 0: the loss is not a number"  # of the newest failure
    slurm.run("scontrol", "requeue", f"{job}_1")  # as a slot that starts in spite of all
    slurm.until(lambda: f"this array was stopped: {cause}" in slurm.log(f"{job}_1"))
    slurm.wait(job)


@pytest.mark.parametrize("verb", KINDS)
def test_without_slurm_the_line_that_does_the_same_is_told(verb):
    line = KINDS[verb].local
    flags = {flag for flag in ("--workers", "--procs", "--model", "--data", "--run") if flag in line}
    function = getattr(Verbs, line.split()[0])
    assert {flag[2:] for flag in flags} <= set(inspect.signature(function).parameters)


# --- the time limit -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def limited(request, tmp_path_factory):
    """(cluster, job, folder) of a job with a limit of one minute, on a cluster of its own. It starts before
    the other tests of this file, which its minute passes with; None if the test of it is not asked for."""
    asked = any(item.name == "test_the_time_limit_asks_first" for item in request.session.items)
    if not asked or not has_slurm():
        yield None
        return
    folder = tmp_path_factory.mktemp("limited")
    with cluster() as here:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("INHERITUNE_ROOT", str(folder / "root"))
            job = here.submit(COUNTING, folder / "a", 550, SITE_TIME=1, SITE_LEAD=40)
        yield here, job, folder / "a"


@pytest.mark.slow
def test_the_time_limit_asks_first(limited):
    """Slurm looks at limits every 30 s: with one minute and 40 s of lead the signal comes after 20 to 50
    s."""
    if limited is None:
        pytest.skip("Slurm is missing")
    here, job, folder = limited
    (record,) = here.wait(job, timeout=200)
    assert record["JobState"] == "COMPLETED" and int(record["Restarts"]) >= 1, here.log(job)
    assert "stopped at" in here.log(job) and "by SIGUSR1" in here.log(job) and counted(folder) == {550}
