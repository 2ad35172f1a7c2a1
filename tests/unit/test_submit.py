"""Submitting: requests, sbatch's command, keys and endings, from recorded text and without a process."""

import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import REPOSITORY

sys.path.append(str(REPOSITORY / "tools"))
import golden
import job_stubs

from inheritune.cluster.job_records import Key, Record, make_keys, read_keys, read_record, write_record
from inheritune.cluster.slurm_queue import read_queue
from inheritune.config.experiment import load_experiment
from inheritune.config.jobs import find_job, format_shape, load_jobs
from inheritune.errors import UserError
from inheritune.files.processes import get_node_name
from inheritune.paper.prerequisites import Step
from inheritune.submit import submission as submissions
from inheritune.submit.interfaces import choose_interface
from inheritune.submit.job_context import JobContext
from inheritune.submit.job_end import Facts, decide_ending
from inheritune.submit.job_start import _choose_part, check_tasks
from inheritune.submit.paper_jobs import format_dependency, plan_jobs
from inheritune.submit.preflight import check_folders, check_request, describe_cost
from inheritune.submit.recovery import describe_options
from inheritune.submit.request import (
    describe_job,
    drop_option,
    make_again,
    make_command,
    read_option,
    read_request,
)
from inheritune.submit.runs import list_baselines, list_waiting
from inheritune.submit.sbatch import list_indices, make_submission, replay_options
from inheritune.submit.site import Site, adopt_folders, read_minutes
from inheritune.submit.slurm_commands import (
    find_dependents,
    list_node_gpus,
    name_jobs,
    read_fields,
    rewrite_dependency,
    strip_options,
)
from inheritune.submit.snapshot_uses import _has_ended

SITE = Site(
    {"SITE_GPUS_PER_NODE": "8", "SITE_TIME": "1440", "INHERITUNE_ROOT": "/scratch"},
    nodes="gpu*|2|64|512000|1-00:00:00|gpu:h200:8(S:0-1)\ncpu|9|64|512000|infinite|(null)",
    max_array_size=1001,
)


def site_with(**values) -> Site:
    """SITE with other SITE_ values."""
    return replace(SITE, values={**SITE.values, **{f"SITE_{name}": str(v) for name, v in values.items()}})


def line(job: str, *words: str, site: Site = SITE, runs: int = 5, **environment) -> str:
    """The command that submits a job."""
    given = {name: str(value) for name, value in environment.items()}
    return make_submission(read_request(job, list(words)), site, given, runs).line(site)


def refusal(job: str, *words: str, site: Site = SITE, **environment) -> str:
    """The sentence with which a job is refused."""
    with pytest.raises(UserError) as caught:
        line(job, *words, site=site, **environment)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_name_of_a_job_is_a_word_of_the_lines_to_paste(capsys):
    assert "--job-name 'a/b' has a slash" in refusal("grow", "small", "grown", "--", "--job-name=a/b")
    request = read_request("grow", ["small", "grown", "--", "--job-name=a;b $(touch x)"])
    submissions._print_queued("7", make_submission(request, SITE, {}), (), SITE)
    watch = next(row for row in capsys.readouterr().out.splitlines() if row.startswith("watch:"))
    assert shlex.split(watch)[-1].endswith("/a;b $(touch x)-7_*.out") and shlex.split(watch)[-2] == "-F"


# --- jobs.yaml and its scripts ------------------------------------------------------------------------------


def test_the_scripts_are_those_of_jobs_yaml():
    scripts = {path.stem for path in (REPOSITORY / "slurm").glob("*.sh")} - {"job", "site", "fetch"}
    assert scripts == set(load_jobs()) and len(scripts) > 30
    for job in load_jobs().values():
        assert job.script.read_text() == job_stubs.make_stub(job), "python tools/job_stubs.py writes them"
        if job.experiment:
            loaded = load_experiment(job.experiment)
            assert job.run is None or loaded.run(job.run)
            assert job.verb != "grow" or loaded.run(job.run).grow


def test_the_commands_are_those_of_golden_json():
    recorded = json.loads((REPOSITORY / "tests" / "golden.json").read_text())["submissions"]
    assert golden.hash_submissions() == recorded


def test_a_submission_as_text():
    assert line("gpt2_xl_stage1", "--seed", "1", "--", "--nodelist=n7") == (
        "sbatch --job-name=gpt2_xl_stage1-seed-1 --nodes=2 --gpus-per-node=8 --time=1440 --signal=B:USR1@300 "
        "--requeue --open-mode=append --output=/scratch/runs/logs/%x-%j.out --export=ALL "
        f"--kill-on-invalid-dep=yes --nodelist=n7 --wrap 'exec bash {REPOSITORY}/slurm/gpt2_xl_stage1.sh "
        "--seed 1'"
    )
    rehearsal = line("gpt2_xl_stage1", REHEARSE="1", site=replace(SITE, exported=("SBATCH_TIMELIMIT",)))
    assert rehearsal.startswith(
        "env -u SBATCH_TIMELIMIT sbatch --job-name=gpt2_xl_stage1-rehearsal --nodes=1"
    )
    assert "--ntasks=2 --cpus-per-task=1 --mem-per-cpu=4G" in rehearsal and "gpus" not in rehearsal
    assert "gpus" not in line("prepare", "small") and "--cpus-per-task=16" in line("prepare", "small")


def test_a_preparation_in_parts_is_an_array():
    assert "--array=1-8 " in line("prepare", "small", "--parts", "8")
    assert "--array=2,5 " in line("prepare", "small", "--parts", "8", ARRAY="2,5")  # parts that failed
    request = read_request("prepare", ["small", "--parts", "8", "--workers", "4"])
    fifth = _choose_part(request, JobContext("prepare", "", False, job="77_5"))
    assert make_command(fifth) == ["prepare", "small", "--part", "5/8", "--workers", "4"]
    alone = _choose_part(request, JobContext("prepare", "", False, job="77"))
    assert make_command(alone) == ["prepare", "small", "--workers", "4"]
    with pytest.raises(UserError, match="prepare: --parts must be at least 1 .got '0'."):
        read_request("prepare", ["small", "--parts", "0"])


def test_the_site_decides():
    own = site_with(ACCOUNT="mine", QOS="q", MAIL="me@here", REQUEUE="no", GPU_TYPE="h200", PARTITION="gpu")
    printed = line("train", "a", "b", site=own)
    wanted = "--account=mine --qos=q --mail-user=me@here --mail-type=END,FAIL,REQUEUE --no-requeue"
    assert set(wanted.split()) <= set(printed.split()) and "--gpus-per-node=h200:8" in printed
    # SITE_TIME reaches rehearsals where it was set, not where it was guessed for jobs with GPUs
    assert "--time=120 " in line("train", "a", "b", site=site_with(TIME=120), REHEARSE=1)
    assert "--time=01:00:00 " in line("train", "a", "b", site=site_with(GUESSED_TIME=1440), REHEARSE=1)
    guessed = site_with(PARTITION="gpu", GUESSED_PARTITION="gpu", GUESSED_TIME="1440", CONSTRAINT="big")
    assert "--partition" not in line("prepare", "a", site=guessed)
    assert "--time" not in line("prepare", "a", site=guessed)
    cpus = line("prepare", "a", site=replace(guessed, values={**guessed.values, "SITE_CPU_PARTITION": "cpu"}))
    assert "--partition=cpu" in cpus and "--constraint" not in cpus
    assert "--nodes=4 --gpus-per-node=4 " in line("gpt2_xl_growth", site=replace(
        site_with(GPUS_PER_NODE=4), nodes="gpu*|9|64|5|1|gpu:4"))  # fmt: skip


def test_on_a_cluster_a_verb_uses_the_folders_of_the_site(tmp_path, monkeypatch):
    """Else `inheritune status` in a login shell would say of what the jobs make that it is not started."""
    for name in ("INHERITUNE_ROOT", "HF_HOME"):  # which monkeypatch restores
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("SCRATCH", str(tmp_path))
    monkeypatch.setattr(shutil, "which", lambda name: None)
    adopt_folders()
    assert not os.environ["INHERITUNE_ROOT"]
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    adopt_folders()
    assert os.environ["INHERITUNE_ROOT"] == f"{tmp_path}/inheritune"
    assert os.environ["HF_HOME"] == f"{tmp_path}/inheritune/huggingface"
    monkeypatch.setenv("INHERITUNE_ROOT", "/mine")
    adopt_folders()
    assert os.environ["INHERITUNE_ROOT"] == "/mine"


# --- what is refused before it queues -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("job", "words", "says"),
    [
        ("train", ["small", "reference", "--sead", "1"], "train has no flag --sead; did you mean '--seed'?"),
        ("train", ["small"], "train needs RUN; usage: bash slurm/train.sh EXPERIMENT RUN"),
        ("train", ["small", "reference", "more"], "takes no further argument 'more'"),
        ("train", ["small", "reference", "--seed", "x"], "--seed takes a whole number (got 'x')"),
        ("train", ["small", "reference", "--seed"], "--seed needs a value"),
        ("train", ["small", "reference", "--seed", "1", "--seed=2"], "--seed is given twice"),
        ("gpt2_xl_stage1", ["gpt2_xl_owt"], "takes no further argument 'gpt2_xl_owt'"),
        ("gpt2_xl_stage1", ["--stage", "2"], "has no flag --stage"),
        ("trian", ["a", "b"], "no job 'trian'"),
        ("train", ["a", "b", "--", "--version"], "--version is no option for a job that is queued"),
        ("train", ["a", "b", "--", "-Q"], "-Q is no option for a job that is queued"),
        ("train", ["a", "b", "--", "--wait"], "--wait is no option for a job that is queued"),
        ("train", ["a", "b", "--", "--nodes=1", ":", "--nodes=2"], "':' asks for a job of unlike parts"),
        ("train", ["a", "b", "--", "--depend=afterok:1"], "--depend is a shortened option of sbatch; write"),
        ("train", ["a", "b", "--", "--hold", "--job=a/b"], "write it out, as --job-name"),
        ("train", ["a", "b", "--", "-Ht2"], "-Ht2 joins several options of sbatch; write them apart"),
    ],
)
def test_a_mistake_in_the_words_is_one_sentence(job, words, says):
    assert says in refusal(job, *words)


@pytest.mark.parametrize(
    ("words", "environment", "site", "says"),
    [
        ([], {"GPUS": 64}, {}, "asks for 64 GPUs and the default partition has 16; GPUS=16 or fewer"),
        ([], {"GPUS": 9}, {}, "9 GPUs cannot be divided equally over 2 nodes of at most 8"),
        ([], {"GPUS": "two"}, {}, "GPUS takes a number of at least 1 (got 'two')"),
        ([], {}, {"GPUS_PER_NODE": ""}, "sinfo shows no GPU; set SITE_PARTITION or SITE_GPUS_PER_NODE"),
        ([], {}, {"LEAD": 3600, "TIME": "01:00:00"}, "SITE_LEAD=3600 seconds is not less than the time"),
        (["--", "-t", "4"], {}, {}, "SITE_LEAD=300 seconds is not less than the time limit 4"),
        (["--", "-G3"], {}, {}, "--gpus=3 lets Slurm give the nodes unequal numbers of GPUs"),
        (["--", "-a", "1-3"], {}, {}, "on one run at the same time"),
        ([], {"ARRAY": "1-4:0"}, {}, "ARRAY takes tasks such as 1-12%1"),
        ([], {"ARRAY": "4-1%1"}, {}, "ARRAY takes tasks such as 1-12%1"),
        ([], {"ARRAY": "1-99999999999%1"}, {}, "ARRAY takes tasks such as 1-12%1"),
        (["--", "--time=4"], {}, {}, "SITE_LEAD=300 seconds is not less than the time limit 4"),
        ([], {}, {"LEAD": "5m"}, "SITE_LEAD must be a whole number (got '5m')"),
        ([], {}, {"MEM_PER_GPU": "60"}, "SITE_MEM_PER_GPU takes a whole number with its unit, as in 60G"),
        (
            [],
            {},
            {"TIME": "tomorrow"},
            "SITE_TIME takes minutes, hours:minutes:seconds, days-hours or UNLIMITED (got",
        ),
        (
            [],
            {},
            {"TIME": "0"},
            "SITE_TIME takes minutes, hours:minutes:seconds, days-hours or UNLIMITED (got '0')",
        ),
        ([], {}, {"CPUS_PER_GPU": "2.5"}, "SITE_CPUS_PER_GPU must be a whole number (got '2.5')"),
        (["--", "--gpus=3"], {}, {}, "--gpus=3 lets Slurm give the nodes unequal numbers of GPUs"),
        (["--", "--array=0-3"], {}, {}, "has index 0"),
        ([], {"ARRAY": "0-3%1"}, {}, "the array 0-3%1 has index 0"),
        ([], {"ARRAY": "1-4"}, {}, "on one run at the same time; let one run after the other, with ARRAY=1"),
        ([], {"ARRAY": "1-4%2"}, {}, "with ARRAY=1-4%1"),
        ([], {"ARRAY": "1-1001%1"}, {}, "(MaxArraySize=1001); use ARRAY=1-1000%1"),
        ([], {"ARRAY": "four"}, {}, "ARRAY takes tasks such as 1-12%1"),
    ],
)
def test_a_shape_that_would_fail_is_refused(words, environment, site, says):
    assert says in refusal("grow", "small", "grown", *words, site=site_with(**site), **environment)


@pytest.mark.parametrize(
    ("job", "words"),
    [
        ("train", ["small", "reference"]),
        ("evaluate", ["small", "--run", "reference"]),
        ("analyze", ["gpt2", "small"]),
        ("prepare", ["small"]),
    ],
)
def test_no_array_works_on_one_run_at_once(job, words):
    assert "on one run at the same time" in refusal(job, *words, "--", "--array=1-2")
    assert "--array=1-2%1 " in line(job, *words, "--", "--array=1-2%1")


def test_the_users_own_options_are_read_in_each_spelling():
    for words in (["--array=2-3%1"], ["--array", "2-3%1"], ["-a", "2-3%1"], ["-a2-3%1"]):
        options = ["--hold", *words, "--nice=7"]
        assert read_option(options, "--array", "-a") == "2-3%1"
        assert drop_option(options, "--array", "-a") == ["--hold", "--nice=7"]
    words = ["small", "grown", "--", "-J", "mine", "-o", "/logs/%x-%j", "-N", "3", "--gpus-per-node=h200:2"]
    asked = make_submission(read_request("grow", words), SITE, {})
    assert (asked.name, asked.log, asked.shape.gpus, asked.shape.nodes) == ("mine", "/logs/%x-%j", 6, 3)
    tasks = make_submission(read_request("evaluate", ["small", "--", "--array", "2,3"]), SITE, {}, 5)
    assert tasks.shape.array == "2,3" and tasks.log.endswith("/%x-%A_%a.out")


def test_usual_spellings_of_options_are_not_refused():
    words = [
        "-vv",
        "-H",
        "-t",
        "2:00:00",
        "-p",
        "gpu",
        "--nodelist",
        "n[1-2]",
        "--comment=a : b",
        "--exclusive",
    ]
    assert read_request("train", ["a", "b", "--", *words]).options == tuple(words)


def test_a_folder_that_slurm_reads_otherwise_is_refused(tmp_path, monkeypatch):
    """Slurm fills %x in the folder of a log too, and --chdir moves a job away from a relative path."""
    percent = replace(SITE, values={**SITE.values, "INHERITUNE_ROOT": "/scratch/100%x"})
    assert "INHERITUNE_ROOT is /scratch/100%x" in refusal("train", "small", "reference", site=percent)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").touch()
    away = ["--", "--chdir=/"]
    assert "would look for mine.yaml in / (--chdir)" in refusal("train", "mine.yaml", "reference", *away)
    assert "--chdir=/" in line("train", str(tmp_path / "mine.yaml"), "reference", *away)
    request = read_request("train", ["mine.yaml", "reference", "--rehearse", "--no-snapshot"])
    again = make_again(request, {})
    assert again.startswith(f"cd {tmp_path} && REHEARSE=1 bash ")
    assert again.endswith("/slurm/train.sh mine.yaml reference --no-snapshot")


def test_the_folders_of_records_and_of_an_own_log_are_looked_at(tmp_path):
    words = ["small", "reference", "--", "-o", "/proc/nowhere/mine.out"]
    with pytest.raises(UserError, match="/proc/nowhere cannot be written"):
        check_folders(make_submission(read_request("train", words), SITE, {}), tmp_path)
    assert (tmp_path / "runs" / "jobs").is_dir() and not (tmp_path / "runs" / "logs").exists()


def test_a_submission_that_ended_without_a_job_uses_no_snapshot():
    ended = subprocess.Popen(["true"])
    ended.wait()
    node = get_node_name()
    assert _has_ended(f"{node}+{ended.pid}") and not _has_ended(f"{node}+{os.getpid()}")
    assert not _has_ended(f"other+{ended.pid}") and not _has_ended(f"{node}+x")


def test_a_total_of_gpus_is_for_jobs_that_train():
    """GPUS=8 of a table of the paper, which also prepares and evaluates."""
    assert "--gpus-per-node=8 " in line("train", "small", "reference", GPUS=8)
    assert "--gpus-per-node=1 " in line("evaluate", "small", GPUS=8)
    assert "gpus" not in line("prepare", "small", GPUS=8) and "gpus" not in line("evaluate", "small", GPUS=0)


def test_other_arrays_are_accepted():
    assert "--array=1-5 " in line("baselines", "small")
    assert "--array" not in line("evaluate", "small", "--run", "reference")
    assert "--array" not in line("grow", "small", "grown", ARRAY="no")
    assert "--array=3 " in line("grow", "small", "grown", ARRAY="3")
    assert list_indices("1,4-8:2%3") == [1, 4, 6, 8]


@pytest.mark.parametrize(
    ("text", "minutes"),
    [
        ("90", 90),
        ("90:30", 90.5),
        ("24:00:00", 1440),
        ("2-12", 3600),
        ("2-12:30", 3630),
        ("1-0:0:30", 1440.5),
    ],
)
def test_time_limits_are_read_as_slurm_reads_them(text, minutes):
    assert read_minutes(text) == minutes and read_minutes("UNLIMITED") is None


def test_a_job_is_checked_before_it_queues(small, own_root):
    """What was submitted before and failed hours later."""

    def refused(job, *words) -> str:
        with pytest.raises(UserError) as caught:
            check_request(read_request(job, list(words)), rehearsal=False)
        return str(caught.value)

    assert "did you mean 'reference'?" in refused("train", small, "refrence")
    assert "no experiment 'nosuch'" in refused("prepare", "nosuch")
    assert "no stage 9" in refused("train", small, "grown", "--stage", "9")
    assert "did you mean 'ds_configs/zero3.json'?" in refused(
        "train", small, "reference", "--ds", "zero3.json"
    )
    assert "has no 'grow' section" in refused("grow", small, "reference")
    assert "use grow.sh, or --stage N" in refused("train", small, "grown")
    assert "has no run 'nosuch'" in refused("evaluate", small, "--run", "nosuch")
    # what it lacks, unless it waits for what makes it
    assert "run 'reference', which it needs, is not trained" in refused(
        "train", small, "grown", "--stage", "1"
    )
    assert "is not finished; first:" in refused("evaluate", small, "--run", "reference")
    behind = ["--", "--dependency=afterok:7"]
    waiting = read_request("train", [small, "grown", "--stage", "1", *behind])
    assert check_request(waiting, rehearsal=False)
    assert check_request(read_request("evaluate", [small, "--run", "reference", *behind]), rehearsal=False)


def test_a_dry_run_says_what_is_missing_and_goes_on(small, own_root, capsys):
    words = [small, "grown", "--stage", "1", "--dry-run"]
    assert check_request(read_request("train", words), rehearsal=False)
    assert "note: " in (said := capsys.readouterr().out) and "'reference', which it needs" in said


def test_the_cost_is_one_line():
    request = read_request("gpt2_xl_stage1", [])
    shape = make_submission(request, SITE, {}).shape
    said = describe_cost(request, load_experiment("gpt2_xl_owt"), shape, SITE)
    assert said.startswith("cost: 16 GPU(s) for 3.1 hours, 49.5 GPU-hours at 40% of the bf16 rate of an H100")
    assert "/gpt2_xl_owt/seed0/inheritune/stage1 (" in said and said.endswith(" GB)")
    prepare = read_request("prepare", ["quickstart"])
    shape = make_submission(prepare, SITE, {}).shape
    said = describe_cost(prepare, load_experiment("quickstart"), shape, SITE)
    assert said.startswith("cost: 1 task(s) of 16 CPU(s); leaves ") and "/data/" in said
    # without a plan, and without a time limit
    analyze, shape = read_request("analyze", ["gpt2", "quickstart"]), replace(shape, gpus=1)
    said = [describe_cost(analyze, None, shape, Site({"SITE_TIME": time})) for time in ("04:00:00", "")]
    assert said == [
        "cost: 1 GPU(s), at most 04:00:00 each time; leaves attention.jsonl and its plots",
        "cost: 1 GPU(s); leaves attention.jsonl and its plots",
    ]


# --- lines to paste and resubmission ------------------------------------------------------------------------


def test_the_work_of_a_preparation_is_its_data_of_an_analysis_its_file(own_root):
    def find_keys(job, *words):
        request = read_request(job, list(words))
        return submissions.list_keys(request, False, [], make_submission(request, SITE, {}))

    (one,), (other,) = (find_keys("prepare", f"gpt2_{size}_owt") for size in ("medium", "large"))
    assert one.meets(other) and not one.meets(find_keys("prepare", "gpt2_medium_fineweb")[0])
    (one,), (other,) = (find_keys("analyze", "m", "small", *more) for more in ([], ["--sequences", "256"]))
    assert one.meets(other) and not one.meets(find_keys("analyze", "m", "small", "--out", "x")[0])


def test_a_line_that_is_no_row_ends_nothing(monkeypatch, tmp_path):
    """Of a job whose command has a line break, or a notice of a site."""
    rows = "7|7|RUNNING|n1||(null)|/x/other.sh two\nlines\n8_1|8|PENDING||Priority|(null)|/y.sh"
    (tmp_path / "squeue").write_text(f"#!/bin/bash\ncat <<'E'\nnotice\n{rows}\nE\n")
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert {name: job.command for name, job in read_queue().items()} == {
        "7": "/x/other.sh two",
        "8_1": "/y.sh",
        "8": "/y.sh",
    }
    assert replace(SITE, nodes=f"a notice\n{SITE.nodes}").count_gpus("") == 16


def test_a_line_to_paste_keeps_the_shape():
    assert describe_job("gpt2_xl_stage1").endswith("train gpt2_xl_owt --run inheritune [--procs N] --stage 1")
    assert describe_job("grow").endswith("python -m inheritune grow EXPERIMENT --run RUN [--procs N]")
    assert format_shape("train", "gpt2_xl_owt") == "GPUS=16 " and format_shape("train", "small") == ""
    assert find_job("train", "gpt2_xl_owt", "inheritune", 1) is load_jobs()["gpt2_xl_stage1"]
    rehearsal = make_again(read_request("train", ["a", "b", "--rehearse"]), {})
    assert rehearsal == f"REHEARSE=1 bash {REPOSITORY}/slurm/train.sh a b"
    request = read_request(
        "gpt2_xl_growth", ["--", "--dependency=afterok:7", "--exclude=n1", "-d", "after:3"]
    )
    again = make_again(request, {"SITE": "mine", "GPUS": "8"})
    assert again == f"SITE=mine GPUS=8 bash {REPOSITORY}/slurm/gpt2_xl_growth.sh -- --exclude=n1"


def test_a_resubmission_asks_for_all_that_was_asked_for():
    asked = ["--mail-user=me", "--mail-type=ALL", "--exclude=n1", "--nodelist=n2", "--exclusive", "--nice=7"]
    asked += ["--comment=mine", "--time=7", "--reservation=r"]
    words = ["a", "b", "--", *asked, "--dependency=afterok:7", "--hold", "-b", "20:00"]
    options = make_submission(read_request("train", words), SITE, {}).options
    new = replay_options(options, "afterany:9", log="/log")
    assert set(asked) < set(new) and "--hold" not in new and "--dependency=afterok:7" not in new
    assert "20:00" not in new  # it would wait for the evening after
    assert new[-2:] == ["--dependency=afterany:9", "--output=/log"] and new.count("--output=/log") == 1
    array = make_submission(read_request("grow", ["a", "b"]), SITE, {}).options
    assert replay_options(array, "afterany:9_12", "12").count("--array=12") == 1


SHOWN = """JobId=12 ArrayJobId=12 ArrayTaskId=3 ArrayTaskThrottle=1 JobName=gpt2_xl_growth
   UserId=me(1000) GroupId=me(1000) MCS_label=N/A
   Priority=4294901754 Nice=7 Account=mine QOS=(null)
   JobState=RUNNING Reason=None Dependency=(null)
   Requeue=1 Restarts=0 BatchFlag=1 Reboot=0 ExitCode=0:0
   RunTime=00:00:05 TimeLimit=1-00:00:00 TimeMin=N/A
   Partition=gpu AllocNode:Sid=login:1
   ReqNodeList=n[2-3] ExcNodeList=n1
   NodeList=n[2-3]
   NumNodes=2 NumCPUs=128 NumTasks=2 CPUs/Task=N/A ReqB:S:C:T=0:0:*:*
   TRES=cpu=128,mem=900G,node=2,billing=128,gres/gpu=16
   JOB_GRES=gpu:16
     Nodes=n[2-3] CPU_IDs=0-63 Mem=460800 GRES=gpu:8(IDX:0-7)
   MinCPUsNode=1 MinMemoryNode=0 MinTmpDiskNode=0
   Features=(null) DelayBoot=00:00:00
   OverSubscribe=NO Contiguous=0 Licenses=(null) Network=(null)
   Command=/home/me/a b/slurm/gpt2_xl_growth.sh --seed 1
   StdOut=/scratch/my log-12_3.out
   CpusPerTres=gres:gpu:8
   MemPerTres=gres:gpu:57600
   TresPerNode=gres:gpu:8
   MailUser=me@here MailType=END,FAIL

JobId=13 ArrayJobId=12 ArrayTaskId=4 JobName=other
   Partition=other
"""


def test_the_options_of_a_plain_sbatch_are_recovered():
    fields = read_fields(SHOWN)
    assert (
        fields["Command"] == "/home/me/a b/slurm/gpt2_xl_growth.sh --seed 1" and fields["Partition"] == "gpu"
    )
    job = {"SLURM_NNODES": "2", "SLURM_ARRAY_TASK_ID": "3", "SLURM_MEM_PER_GPU": "57600", "SITE_LEAD": "60"}
    assert describe_options(fields, job) == (
        "--job-name=gpt2_xl_growth", "--partition=gpu", "--account=mine", "--nodelist=n[2-3]", "--exclude=n1",
        "--nice=7", "--mail-user=me@here", "--mail-type=END,FAIL", "--time=1-00:00:00",
        "--output=/scratch/my log-12_3.out", "--array=3", "--nodes=2", "--gpus-per-node=8",
        "--cpus-per-gpu=8", "--mem-per-gpu=57600", "--exclusive", "--signal=B:USR1@60", "--requeue",
        "--open-mode=append", "--export=ALL",
    )  # fmt: skip
    assert list_node_gpus(SHOWN) == [("n[2-3]", 8)]
    unequal = SHOWN.replace(
        "     Nodes=n[2-3]", "     Nodes=n1 CPU_IDs=0 Mem=1 GRES=gpu:h200:4(IDX:0-3)\n     Nodes=n[2-3]"
    )
    assert list_node_gpus(unequal) == [("n1", 4), ("n[2-3]", 8)]


def test_a_jobs_own_variables_do_not_pass_for_the_next_ones():
    given = {
        "SLURM_CONF": "/c",
        "SLURM_JOB_ID": "7",
        "SBATCH_PARTITION": "x",
        "INHERITUNE_JOB": "/j",
        "HOME": "/h",
    }
    assert strip_options(given) == {"SLURM_CONF": "/c", "HOME": "/h"}


# --- dependents, keys, graph --------------------------------------------------------------------------------

QUEUED = """13|afterok:12(unfulfilled)
14|afterany:12_*(unfulfilled),afterok:9_3(unfulfilled)
15|afterok:12_4(unfulfilled)
12_5|(null)
16|afterok:112(unfulfilled)"""


def test_dependents_are_found_and_moved():
    assert [job for job, _ in find_dependents(QUEUED, "12")] == ["13", "14", "15"]
    assert [job for job, _ in find_dependents(QUEUED, "12", "4")] == ["13", "14", "15"]
    assert [job for job, _ in find_dependents(QUEUED, "9", "4")] == []
    assert name_jobs(["13", "9", "11_10", "11_2", "12_3", "12_3"]) == "9, 11, 12_3, 13"
    both = find_dependents(QUEUED, "12")[1][1]
    assert rewrite_dependency(both, "12", "", "20") == "afterany:20,afterok:9_3"


def test_keys_tell_work_apart(own_root):
    (one,) = make_keys("train", "recipes/small.yaml", ["grown"], stage=1, seed=0)
    assert one == Key("train", "small", "grown", 1)
    assert one.meets(make_keys("grow", "small", ["grown"])[0])  # which does all stages
    for other in ({"stage": 2}, {"seed": 1}, {"rehearsal": True}, {"run": "other"}, {"verb": "evaluate"}):
        assert not one.meets(replace(one, **other))
    assert one.describe() == "train small/grown stage 1, seed 0"
    record = Record("train", "/x/train.sh", ("small", "grown"), ("--nice=1",), ("bash",), "bash x", (one,))
    write_record("12_3", record)
    found = read_record("12")
    assert found == replace(record, submitted=found.submitted) and read_keys("12_4", "") == (one,)
    # a task of an array over runs does its own work only
    keys = make_keys("baselines", "small", ["a", "b", "c"])
    write_record("20", replace(record, options=("--array=1,3-4",), keys=keys))
    assert read_keys("20_3", "") == (keys[1],) and read_keys("20", "") == keys == read_keys("20_2", "")
    # plain sbatch has no record before it starts
    command = f"{REPOSITORY}/slurm/gpt2_xl_stage1.sh --seed 3"
    assert read_keys("13", command) == make_keys("train", "gpt2_xl_owt", ["inheritune"], stage=1, seed=3)
    assert read_keys("13", "/home/me/gpt2_xl_stage1.sh") == () == read_keys("13", "")
    assert read_keys("13", command.replace("--seed 3", "--seed=4"))[0].seed == 4
    assert read_keys("13", command.replace("--seed 3", "--seed one")) == ()
    plain = f"{REPOSITORY}/slurm/train.sh /w/small.yaml grown --rehearse --stage=2"
    assert read_keys("13", plain) == (Key("train", "small", "grown", 2, rehearsal=True),)
    assert read_keys("13", f"{REPOSITORY}/slurm/train.sh small") == ()
    # experiments may share their data
    one, other = (Key("prepare", name, detail="openwebtext-1") for name in ("medium", "large"))
    assert one.meets(other) and not one.meets(replace(other, detail="openwebtext-2"))


def test_baselines_that_start_from_baselines_wait():
    loaded = load_experiment("gpt2_medium_owt")
    names = list_baselines(loaded)
    waiting = {names[n - 1]: [names[s - 1] for s in sources] for n, sources in list_waiting(loaded).items()}
    assert waiting == {
        "stacking": ["stacking_half"],
        "inheritune_18_200k_50k": ["reference_200k_50k"],
        "inheritune_clip": ["reference_clip"],
    }


def test_the_jobs_of_an_item_wait_for_what_they_need():
    steps = [
        Step("prepare", "gpt2_xl_owt"),
        Step("train", "gpt2_xl_owt", "reference", (1,)),
        Step("grow", "gpt2_xl_owt", "inheritune", (1, 2)),
        Step("evaluate", "gpt2_xl_owt", "inheritune/stage1", (3,)),
        Step("analyze", "gpt2_xl_owt", "reference", (1, 2), "--maps 1:1"),
    ]
    planned = plan_jobs(steps, seed=2)
    commands = [" ".join(make_command(job.request)) for job in planned]
    assert commands == [
        "prepare gpt2_xl_owt",
        "train gpt2_xl_owt --run reference --seed 2",
        "grow gpt2_xl_owt --run inheritune --slot --seed 2",
        "evaluate gpt2_xl_owt --run inheritune/stage1 --seed 2",
        "analyze --model reference --data gpt2_xl_owt --seed 2 --maps 1:1",
    ]
    jobs = {1: "11", 2: "12", 3: "13"}
    waits = [format_dependency(job.after, steps, jobs) for job in planned]
    assert waits == ["", "afterok:11", "afterok:11,afterok:12", "afterany:13", "afterok:11,afterok:12"]
    # with the GPUs of the paper's jobs, also in the line to paste
    assert [job.request.job.gpus for job in planned] == [0, 16, 16, 1, 1]
    assert make_again(planned[1].request, {}).startswith("GPUS=16 bash ")
    alone = [
        job.request.job.gpus for job in plan_jobs(steps, seed=2, gpus=1)
    ]  # what trains, as the claim's jobs
    assert alone == [0, 1, 1, 1, 1]


# --- how a job ends -----------------------------------------------------------------------------------------

SAVED = Facts(0, True, more="step 3 of 9", restarts=1)


@pytest.mark.parametrize(
    ("facts", "kind", "says"),
    [
        (Facts(0, False), "finished", ""),
        (Facts(0, False, undone=("/r/x",)), "fail", "without an error, and /r/x has no DONE"),
        (Facts(0, False, stopped="STOP exists", undone=("/r",)), "stopped", "STOP exists"),
        (Facts(1, False), "fail", ""),
        (SAVED, "requeue", "step 3"),
        (replace(SAVED, code=143), "requeue", ""),
        (replace(SAVED, failure="n1 rank 0: x"), "finished", ""),
        (replace(SAVED, code=1, failure="n1 rank 0: x"), "fail", ""),
        (replace(SAVED, code=1, signalled=False), "fail", ""),
        (Facts(138, True), "requeue", "before the tasks had started"),
        (Facts(138, False), "fail", ""),
        (replace(SAVED, slot_behind=True), "next slot", ""),
        (replace(SAVED, batch=False), "left", "interactive"),
        (replace(SAVED, job_state="COMPLETING"), "left", "cancelled or requeued from outside"),
        (replace(SAVED, job_state="COMPLETING", reason="TimeLimit"), "requeue", ""),
        (replace(SAVED, job_state="PREEMPTED"), "requeue", ""),
        (replace(SAVED, job_state="CANCELLED"), "left", "the job is CANCELLED"),
        (replace(SAVED, restarts=100), "fail", "all that MAX_RESTARTS allows"),
        (replace(SAVED, stalls=1), "requeue", ""),
        (replace(SAVED, stalls=2), "fail", "no progress: 2 restarts in a row without a new step"),
        (replace(SAVED, stalls=2, slot_behind=True), "fail", "no progress"),
    ],
)
def test_how_a_job_ends(facts, kind, says):
    ending = decide_ending(facts)
    assert ending.kind == kind and says in ending.text
    assert ending.kind not in ("stopped", "fail") or ending.code


def test_the_python_beside_an_image_needs_few_packages(tmp_path):
    """Those that job.sh asks for: what decides runs next to srun, what computes in the image."""
    site = Path(sysconfig.get_path("purelib"))
    few = "pydantic pydantic_core annotated_types typing_extensions.py typing_inspection"
    few += " yaml xxhash fire termcolor"
    for name in few.split():
        (tmp_path / name).symlink_to(site / name)
    code = "import inheritune.submit.login, inheritune.submit.job, inheritune.cli"
    environment = {**os.environ, "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{tmp_path}"}
    subprocess.run([sys.executable, "-S", "-c", code], check=True, env=environment)


# --- on the node --------------------------------------------------------------------------------------------


def test_the_interface_is_chosen():
    both = {"eth0": "10.0.0.5", "ib0": "10.1.0.5", "docker0": "172.17.0.1"}
    assert choose_interface(both, "10.0.0.5") == "ib0"
    del both["ib0"]
    assert choose_interface(both, "10.0.0.5") == "eth0" and choose_interface(both, "127.0.0.1") == ""


ALONE = {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_MIN": "3", "SLURM_ARRAY_TASK_COUNT": "1"}
FIRST = {"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_COUNT": "4"}


def test_a_job_refuses_arrays_that_plain_sbatch_took():
    """Each task does, the first one too: nothing is worked on."""
    for tasks in (ALONE, FIRST, {**FIRST, "SLURM_ARRAY_TASK_ID": "4"}):
        check_tasks(tasks, SHOWN, True)  # with ArrayTaskThrottle=1
    parallel = SHOWN.replace("ArrayTaskThrottle=1 ", "")
    check_tasks(FIRST, parallel, False)  # a run each
    check_tasks(ALONE, parallel, True)
    for tasks in (FIRST, {**FIRST, "SLURM_ARRAY_TASK_ID": "4"}):
        for shown in (parallel, SHOWN.replace("Throttle=1", "Throttle=12")):
            with pytest.raises(UserError, match="on one run at the same time; submit it with --array=1-N%1"):
                check_tasks(tasks, shown, True)
    for task in "03":
        with pytest.raises(UserError, match="has index 0"):
            check_tasks({**FIRST, "SLURM_ARRAY_TASK_ID": task, "SLURM_ARRAY_TASK_MIN": "0"}, SHOWN, False)
