"""Downstream tasks: scores equal to the lm_eval command's, on one rank and two, saved and resumed task by
task, from the cache alone where there is no internet. The tasks are of the paper's kinds, on the sixteen
documents of recipes/lm_eval/rehearsal."""

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import sentencepiece
import torch
import yaml
from conftest import REPOSITORY, experiment_dict, refused, run_verb, write_experiment, write_tokens
from fork_server import OFFLINE_FORKS
from hub_server import Hub
from lm_eval_command import lm_eval_command, lm_eval_results
from made_up_runs import write_settings
from tiny_models import random_model
from tiny_tokenizers import write_chat_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel

from inheritune.config.catalog import TASKS
from inheritune.config.experiment import load_experiment
from inheritune.config.paths import RECIPES
from inheritune.config.problems import parse_section
from inheritune.config.sections import Evaluate, Model
from inheritune.data.bpe_training import train_bpe
from inheritune.data.fast_tokenizer import FastTokenizer
from inheritune.data.sentencepiece_tokenizer import SentencePieceTokenizer
from inheritune.errors import UserError
from inheritune.evaluation.downstream import (
    TASK_FILES,
    hash_content,
    list_unscored,
    load_tasks,
    open_tokenizer,
    wrap_model,
)
from inheritune.files.json_files import read_json, write_json
from inheritune.files.rundir import RunDir, get_data_dir
from inheritune.models import networks

pytestmark = pytest.mark.slow

TEXT = "".join(page.read_text(encoding="utf-8") for page in sorted((REPOSITORY / "docs").glob("*.md")))
OWN = {
    "choice": {"task": "rehearsal_choice", "metrics": ["acc", "acc_norm"], "shots": 1},
    "word": {"task": "rehearsal_word", "metrics": ["perplexity", "acc"], "shots": 1},
    "text": {"task": "rehearsal_text", "metrics": ["word_perplexity", "bits_per_byte"]},
}
ALONE = {"HF_HUB_OFFLINE": 1, "HF_DATASETS_OFFLINE": 1}


def write_model(folder: Path, seed: int = 1) -> Path:
    """A random GPT-2 of the paper's form with a tokenizer of 300 ids."""
    # 3 layers: the scaling by layer matters
    config = networks.build_config(
        Model(size="gpt2_tiny", layers=3, width=32, heads=2, positions=96, vocab_size=320)
    )
    random_model(config, seed).save_pretrained(folder)
    train_bpe("bpe:300", [TEXT] * 3, folder)
    return folder


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    return write_model(tmp_path / "checkpoint")


def write_own(tmp_path: Path, checkpoint: Path, tasks: dict = OWN, **files: dict) -> str:
    """An experiment with `tasks`, whose data has the checkpoint's tokenizer; `files` are task files beside
    some that include the rehearsal's."""
    (tmp_path / "own").mkdir(exist_ok=True)
    theirs = {path.stem: {"include": str(path)} for path in (TASK_FILES / "rehearsal").glob("*.yaml")}
    for name, content in {**theirs, **files}.items():
        (tmp_path / "own" / f"{name}.yaml").write_text(yaml.safe_dump(content))
    raw = experiment_dict(evaluate={"tasks": tasks, "task_files": str(tmp_path / "own"), "batch": 4})
    raw["runs"]["theirs"] = {"init": {"external": {"source": str(checkpoint)}}}
    path = write_experiment(tmp_path / "recipes", raw)
    folder = get_data_dir(load_experiment(path))
    if not folder.exists():
        write_tokens(folder)
        shutil.rmtree(folder / "tokenizer")
        train_bpe("bpe:300", [TEXT] * 3, folder / "tokenizer")
    return path


def results_of(path: str) -> dict:
    return read_json(RunDir.of(load_experiment(path), "theirs").results)


def scores(results: dict) -> dict:
    """{(task, metric): {score, stderr}} of a results.json."""
    rows = results["tasks"].items()
    return {
        (name, metric): value
        for name, row in rows
        for metric, value in row.items()
        if isinstance(value, dict)
    }


def test_scores_are_those_of_the_lm_eval_command_on_one_rank_and_two(tmp_path, checkpoint):
    path = write_own(tmp_path, checkpoint)
    said = run_verb("evaluate", path, "--run", "theirs", **ALONE)
    ours = results_of(path)
    assert ours["validation"]["n"] == 16 and ours["layers"] == 3 and not ours["rehearsal"]
    names, more = (
        [task["task"] for task in OWN.values()],
        ("--num_fewshot", 1, "--device", "cpu", "--batch_size", 3),
    )
    command = lm_eval_command(checkpoint, names, tmp_path / "own", tmp_path / "theirs", *more)
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}, check=False
    )
    assert done.returncode == 0, done.stderr
    theirs = lm_eval_results(tmp_path / "theirs")
    for name, task in OWN.items():
        values = theirs["results"][task["task"]]
        for metric in task["metrics"]:
            score, stderr = values[f"{metric},none"], values[f"{metric}_stderr,none"]
            assert ours["tasks"][name][metric]["score"] == pytest.approx(score, rel=1e-6)
            assert ours["tasks"][name][metric]["stderr"] == (
                None if stderr == "N/A" else pytest.approx(stderr, rel=1e-6)
            )
        row = ours["tasks"][name]
        assert row["n"] == theirs["n-samples"][task["task"]]["effective"] == 16
        assert (
            row["version"] == str(theirs["versions"][task["task"]])
            and row["lm_eval"] == theirs["lm_eval_version"]
        )
    # numbers that could differ
    assert len({round(value["score"], 6) for value in scores(ours).values()}) >= 4
    assert len(said.stdout.splitlines()) < 10 and not said.stderr.strip()  # no bars, no warnings

    run_verb("evaluate", path, "--model", checkpoint, "--out", tmp_path / "two.json", procs=2, **ALONE)
    two = json.loads((tmp_path / "two.json").read_text())
    assert two["tasks"]["choice"]["checkpoint"] == ours["tasks"]["choice"]["checkpoint"] and set(
        scores(two)
    ) == set(scores(ours))
    for (name, metric), value in scores(two).items():
        one = scores(ours)[name, metric]
        assert value["score"] == pytest.approx(one["score"], rel=1e-5)
        # whose error is drawn (bootstrap), from the documents in the order of the ranks
        if metric != "perplexity":
            assert value["stderr"] == (one["stderr"] and pytest.approx(one["stderr"], rel=1e-5))


def test_scores_of_a_bf16_forward_are_summed_in_fp32(checkpoint):
    """A sum of 80 logarithms in bf16 is a multiple of two nats: choices of a question would tie."""
    model = GPT2LMHeadModel.from_pretrained(checkpoint).eval()
    tokens = list(range(40, 130))
    request = (("", ""), tokens[:10], tokens[10:])
    sums = {}
    for precision in ("fp32", "bf16_autocast"):
        ours = wrap_model(model, open_tokenizer(checkpoint), 4, precision)
        ((sums[precision], _),) = ours._loglikelihood_tokens([request], disable_tqdm=True)
    assert 0 < abs(sums["bf16_autocast"] - sums["fp32"]) < 0.5
    assert float(torch.tensor(sums["bf16_autocast"]).bfloat16()) != sums["bf16_autocast"]


def test_stages_and_kept_weights_have_names_and_results_of_their_own(tmp_path, checkpoint):
    path = write_own(tmp_path, checkpoint)
    run = RunDir.of(load_experiment(path), "grown")
    for stage in (1, 2):
        shutil.copytree(checkpoint, run.stage(stage).final)
        write_json(run.stage(stage).done, {"final": {}})
        write_json(run.stage(stage).results, {})
        write_settings(load_experiment(path), "grown", run.stage(stage), stage)
    write_json(run.done, {"stage": 2, "layers": 3})
    write_model(run.stage(1).kept(4), seed=2)
    run_verb("evaluate", path, "--run", "grown/stage1,grown,grown/stage1@4", "--tasks", "choice", **ALONE)
    folders = run.stage(1).path, run.stage(2).path, run.stage(1).kept(4)
    first, chosen, kept = (read_json(folder / "results.json") for folder in folders)
    assert first == chosen and scores(first) and first["validation"]["n"] == 16
    assert kept["validation"] != first["validation"] and identity_of(kept) != identity_of(first)
    assert "run 'grown' of small (seed 0) is finished and has no stage 3; its stages are 1, 2" in refused(
        "evaluate", path, "--run", "grown/stage3"
    )
    assert "has no run 'grwn'; did you mean 'grown'" in refused("evaluate", path, "--run", "grwn/stage1")


def identity_of(results: dict) -> str:
    return results["tasks"]["choice"]["checkpoint"]


def test_an_interrupted_evaluation_goes_on_with_the_tasks_that_are_left(tmp_path, checkpoint):
    path = write_own(tmp_path, checkpoint)
    file = RunDir.of(load_experiment(path), "theirs").results
    process = subprocess.Popen(
        [OFFLINE_FORKS.python(), "-m", "inheritune", "evaluate", path, "--run", "theirs"],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **{k: str(v) for k, v in ALONE.items()}},
    )
    deadline = time.monotonic() + 300
    while not (file.is_file() and read_json(file).get("tasks")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGUSR1)
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 0 and "left to score (SIGUSR1)" in said
    before = results_of(path)["tasks"]
    assert 1 <= len(before) < len(OWN)

    said = run_verb("evaluate", path, "--run", "theirs", **ALONE).stdout
    after = results_of(path)["tasks"]
    assert list(after) == list(OWN) and all(after[name] == row for name, row in before.items())
    assert all((f"{name}: " in said) == (name not in before) for name in OWN)

    # other shots, and other weights, are scored anew
    path = write_own(tmp_path, checkpoint, {**OWN, "choice": {**OWN["choice"], "shots": 2}})
    said = run_verb("evaluate", path, "--run", "theirs", **ALONE).stdout
    assert "choice: " in said and "word: " not in said and results_of(path)["tasks"]["choice"]["shots"] == 2
    write_model(checkpoint, seed=2)
    run_verb("evaluate", path, "--run", "theirs", "--tasks", "word", **ALONE)
    assert list(results_of(path)["tasks"]) == ["word"]  # the others were of weights that are gone
    assert results_of(path)["tasks"]["word"]["perplexity"] != after["word"]["perplexity"]


def test_what_cannot_be_scored_is_one_sentence(tmp_path, checkpoint):
    absent = {
        "task": "absent",
        "dataset_path": "someone/absent",
        "output_type": "multiple_choice",
        "test_split": "test",
    }
    drawn = {"include": "choice.yaml", "task": "drawn", "fewshot_config": {"sampler": "default"}}
    tasks = {
        **OWN,
        "absent": {"task": "absent", "metrics": ["acc"]},
        "drawn": {**OWN["choice"], "task": "drawn"},
    }
    path = write_own(tmp_path, checkpoint, tasks, absent=absent, drawn=drawn)
    evaluate = ["evaluate", path, "--run", "theirs"]
    assert "no task 'chioce'; did you mean 'choice'?" in refused(*evaluate, "--tasks", "chioce")
    said = refused(*evaluate, "--tasks", "absent", HF_HOME=tmp_path / "empty", **ALONE)
    assert (
        "data of task absent" in said
        and "neither in the cache" in said
        and "run 'python -m inheritune fetch'" in said
    )
    assert "2 ranks would give another score than one" in refused(
        *evaluate, "--tasks", "drawn", "--procs", 2, **ALONE
    )
    assert not RunDir.of(load_experiment(path), "theirs").results.exists()  # refused before the work

    run_verb(*evaluate, "--tasks", "choice", **ALONE)
    results = results_of(path)
    results["tasks"]["choice"]["version"] = "0.9"
    write_json(RunDir.of(load_experiment(path), "theirs").results, results)
    said = refused(*evaluate, "--tasks", "choice,word", **ALONE)
    assert "score of choice in results.json is of version 0.9" in said and "has 1.0" in said
    assert results_of(path) == results

    file = RunDir.of(load_experiment(path), "theirs").results
    file.unlink()
    file.mkdir()  # of a name that cannot be written, as in a folder that is read-only
    assert "is a folder; give the file to write" in refused(*evaluate, "--tasks", "none")  # before the work
    file.rmdir()

    for name in ("tokenizer.json", "tokenizer_config.json"):
        (checkpoint / name).unlink()
    assert "holds no tokenizer, which the tasks need" in refused(*evaluate, "--tasks", "word", **ALONE)
    said = run_verb(*evaluate, "--tasks", "none", **ALONE).stdout
    assert "holds no tokenizer: its token ids are taken to be those of the experiment's data" in said


def test_fetch_takes_the_data_of_the_tasks_and_evaluate_needs_no_internet_afterwards(
    request, tmp_path, checkpoint
):
    folder = tmp_path / "hub" / "datasets" / "someone" / "questions"
    folder.mkdir(parents=True)
    shutil.copy(TASK_FILES / "rehearsal" / "test.jsonl", folder)
    hub = Hub(tmp_path / "hub")
    request.addfinalizer(hub.close)
    content = {
        "include": "choice.yaml",
        "task": "fetched",
        "dataset_path": "someone/questions",
        "custom_dataset": None,
    }
    tasks = {"fetched": {"task": "fetched", "metrics": ["acc"]}, "choice": {**OWN["choice"], "shots": 0}}
    path = write_own(tmp_path, checkpoint, tasks, fetched=content | {"fewshot_split": None})
    home = {"HF_HOME": tmp_path / "home", "HF_HUB_DISABLE_XET": 1, "HF_ENDPOINT": hub.url}
    assert "neither in the cache" in refused("evaluate", path, "--run", "theirs", **home, **ALONE)
    run_verb("fetch", path, **home)
    assert hub.taken == ["test.jsonl"]
    hub.close()
    run_verb("evaluate", path, "--run", "theirs", **{**home, **ALONE, "HF_ENDPOINT": "http://127.0.0.1:9"})
    rows = results_of(path)["tasks"]
    assert rows["fetched"]["acc"] == rows["choice"]["acc"] and rows["fetched"]["n"] == 16


def filtered(task: str, documents: Path, *names: str) -> dict:
    """A task of generated text whose filters each take another part of it: the first letter, the whole."""
    patterns = {"first": "^(.)", "whole": "(?s)^(.*)$"}
    chains = [
        [{"function": "regex", "regex_pattern": patterns[name]}, {"function": "take_first"}] for name in names
    ]
    return {
        "task": task,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(documents)}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["@@"], "max_gen_toks": 3, "do_sample": False},
        "filter_list": [{"name": name, "filter": chain} for name, chain in zip(names, chains, strict=True)],
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }


def test_each_filter_of_a_task_has_a_score_of_its_own(tmp_path, checkpoint):
    """Which one is meant has to be said. The answers are those of the model, so the scores are known."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    tokenizer, lines = AutoTokenizer.from_pretrained(checkpoint), []
    for text in ("def first(", "import os", "the second layer", "class Run"):
        ids = tokenizer(text, return_tensors="pt").input_ids
        said = model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
        lines.append({"text": text, "answer": tokenizer.decode(said)})
    lines[0]["answer"] = lines[0]["answer"][:1]  # right by its first letter only
    documents = tmp_path / "documents.jsonl"
    documents.write_text("".join(json.dumps(line) + "\n" for line in lines))
    files = {
        "both": filtered("both", documents, "first", "whole"),
        "other": filtered("other", documents, "whole"),
        "pair": {
            "group": "pair",
            "task": ["both", "other"],
            "aggregate_metric_list": [{"metric": "exact_match"}],
            "metadata": {"version": 1},
        },
    }

    def own(task: str, metric: str) -> str:
        return write_own(tmp_path, checkpoint, {"asked": {"task": task, "metrics": [metric]}}, **files)

    said = refused("evaluate", own("both", "exact_match"), "--run", "theirs", **ALONE)
    names = "'exact_match,first', 'exact_match,whole'"
    assert f"exact_match by 2 filters, each with a score of its own; name one in metrics: {names}" in said
    said = refused("evaluate", own("both", "exact_match,hole"), "--run", "theirs", **ALONE)
    assert "task asked has no filter 'hole' of exact_match; did you mean 'whole'?" in said
    said = refused("evaluate", own("pair", "exact_match,first"), "--run", "theirs", **ALONE)
    assert "which 'other' lacks: it would leave that task out" in said
    asked = {"both": "exact_match,whole", "other": "exact_match", "pair": "exact_match,whole"}
    command = lm_eval_command(checkpoint, ["pair"], tmp_path / "own", tmp_path / "theirs", "--device", "cpu")
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    theirs = lm_eval_results(tmp_path / "theirs")["results"]
    assert theirs["both"]["exact_match,first"] != theirs["both"]["exact_match,whole"]
    for task, metric in [*asked.items(), ("both", "exact_match,first")]:
        path = own(task, metric)
        said = run_verb("evaluate", path, "--run", "theirs", **ALONE)
        score = theirs[task][metric if "," in metric else f"{metric},whole"]
        assert results_of(path)["tasks"]["asked"][metric]["score"] == pytest.approx(score)
        assert f"{metric} {score:.4f}" in said.stdout + said.stderr


def test_a_metric_that_the_documents_do_not_allow_is_told(tmp_path, checkpoint):
    """The binary F1 of three choices: its library refuses after all forwards."""
    documents = tmp_path / "documents.jsonl"
    rows = [{"text": f"number {n}", "answer": n % 3} for n in range(6)]
    documents.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "three",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(documents)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": ["one", "two", "three"],
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}, {"metric": "f1"}],
    }
    path = write_own(tmp_path, checkpoint, {"three": {"task": "three", "metrics": ["acc"]}}, three=task)
    said = refused("evaluate", path, "--run", "theirs", **ALONE)
    assert "a metric of task three cannot be computed of its documents" in said and "average" in said


def test_metrics_and_shots_that_a_task_has_not_are_refused(tmp_path):
    files = str(TASK_FILES / "rehearsal")

    def load(name: str, **keys):
        return load_tasks(parse_section(Evaluate, {"tasks": {name: keys}}, "here").tasks, files)

    with pytest.raises(UserError, match="task x has no metric 'f1'; valid names: acc, acc_norm"):
        load("x", task="rehearsal_choice", metrics=["f1"])
    with pytest.raises(
        UserError, match=r"task x has \d+ documents to take few-shot examples from .* 99 shots"
    ):
        load("x", task="rehearsal_choice", metrics=["acc"], shots=99)
    own = tmp_path / "own"
    own.mkdir()
    group = {"group": "pair", "task": ["rehearsal_choice"], "metadata": {"version": 3}}
    (own / "choice.yaml").write_text(yaml.safe_dump({"include": f"{files}/choice.yaml"}))
    for means in ([], [{"metric": "acc_norm"}]):
        (own / "pair.yaml").write_text(yaml.safe_dump(group | {"aggregate_metric_list": means}))
        with pytest.raises(UserError, match="task x: group 'pair' of lm-eval has no mean of 'acc'"):
            load_tasks(
                parse_section(Evaluate, {"tasks": {"x": {"task": "pair", "metrics": ["acc"]}}}, "h").tasks,
                str(own),
            )
    with pytest.raises(UserError, match="unknown task 'arc_esy'; did you mean 'arc_easy'?"):
        parse_section(Evaluate, {"tasks": ["arc_esy"]}, "here")
    with pytest.raises(UserError, match="give a list of names"):
        parse_section(Evaluate, {"tasks": "piqa"}, "here")
    assert (
        parse_section(Evaluate, {"tasks": {"mmlu": {"shots": 0}}}, "here").tasks["mmlu"].task
        == "mmlu_plain_mean"
    )


@pytest.mark.parametrize("damage", ["empty", "cut", "missing"])
def test_damaged_documents_of_ones_own_are_one_sentence(tmp_path, damage):
    documents = tmp_path / "documents.jsonl"
    text = (TASK_FILES / "rehearsal" / "test.jsonl").read_text()
    if damage != "missing":
        documents.write_text("" if damage == "empty" else text[:-20])
    chosen, content = write_local_task(tmp_path, documents)
    assert content["task"] == "mine"
    with pytest.raises(UserError, match="^the data of task x (holds no|cannot be|is missing)") as told:
        load_tasks(chosen, str(tmp_path / "own"))
    assert "fetch" not in str(told.value) and (damage != "missing" or str(documents) in str(told.value))


def write_local_task(tmp_path: Path, documents: Path) -> tuple[dict, dict]:
    """(the tasks of an experiment, the content of the task file) of a task with documents of one's own."""
    task = {"task": "mine", "dataset_path": "json", "output_type": "loglikelihood", "test_split": "test"}
    task |= {"dataset_kwargs": {"data_files": {"test": str(documents)}}, "metric_list": [{"metric": "acc"}]}
    task |= {"doc_to_text": "{{question}}", "doc_to_target": "{{answer}}", "metadata": {"version": 1}}
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "mine.yaml").write_text(yaml.safe_dump(task))
    return parse_section(Evaluate, {"tasks": {"x": {"task": "mine", "metrics": ["acc"]}}}, "here").tasks, task


def test_a_score_of_other_documents_or_templates_is_not_kept(tmp_path):
    documents = tmp_path / "documents.jsonl"
    shutil.copy(TASK_FILES / "rehearsal" / "test.jsonl", documents)
    chosen, task = write_local_task(tmp_path, documents)

    def load() -> dict:
        (tmp_path / "own" / "mine.yaml").write_text(yaml.safe_dump(task))
        return load_tasks(chosen, str(tmp_path / "own"))

    def is_kept() -> bool:
        row = {"task": "mine", "shots": 0, "version": "1", "acc": {}, "checkpoint": "c", "content": content}
        return list_unscored(chosen, load(), {"tasks": {"x": row}}, "c") == []

    content = hash_content(load()["x"])
    assert is_kept()
    documents.write_text("".join(documents.read_text().splitlines(keepends=True)[:-1]))
    assert not is_kept()
    content = hash_content(load()["x"])
    assert is_kept()
    task["doc_to_text"] = "Q: {{question}}"
    assert not is_kept()


def test_a_score_follows_its_examples_and_its_groups_weights(tmp_path):
    """lm-eval takes examples from the training split where the task's file names no other."""
    examples = tmp_path / "train.jsonl"
    for file in (examples, tmp_path / "documents.jsonl"):
        shutil.copy(TASK_FILES / "rehearsal" / "test.jsonl", file)
    _, task = write_local_task(tmp_path, tmp_path / "documents.jsonl")
    task["dataset_kwargs"]["data_files"]["train"] = str(examples)
    (tmp_path / "own" / "mine.yaml").write_text(yaml.safe_dump(task | {"training_split": "train"}))
    group = {"group": "two", "task": ["mine"], "metadata": {"version": 1}}

    def hash_tasks(is_weighted: bool = True) -> list[str]:
        group["aggregate_metric_list"] = [{"metric": "acc", "weight_by_size": is_weighted}]
        (tmp_path / "own" / "two.yaml").write_text(yaml.safe_dump(group))
        raw = {name: {"task": name, "metrics": ["acc"], "shots": 2} for name in ("mine", "two")}
        chosen = parse_section(Evaluate, {"tasks": raw}, "here").tasks
        return [hash_content(found) for found in load_tasks(chosen, str(tmp_path / "own")).values()]

    before = hash_tasks()
    assert before == hash_tasks()
    assert [now == then for now, then in zip(hash_tasks(False), before, strict=True)] == [True, False]
    examples.write_text("".join(examples.read_text().splitlines(keepends=True)[:-1]))
    assert [now == then for now, then in zip(hash_tasks(), before, strict=True)] == [False, False]


def test_the_spelling_of_a_special_token_is_text_as_in_prepare(tmp_path):
    for folder in ("bpe", "chat"):
        (tmp_path / folder).mkdir()
    train_bpe("bpe:300", [TEXT[:2000]], tmp_path / "bpe")
    write_chat_tokenizer(tmp_path / "chat")
    (tmp_path / "text").write_text(TEXT)
    model = tmp_path / "tokenizer"
    sentencepiece.SentencePieceTrainer.train(
        input=tmp_path / "text", model_prefix=model, vocab_size=400, model_type="bpe", minloglevel=2
    )
    SentencePieceTokenizer(f"{model}.model").save(tmp_path / "pieces")
    for name, spelled in (("bpe", "<|endoftext|>"), ("chat", "<|end|>"), ("pieces", "</s>")):
        text = f"It ends with {spelled} and goes on, <unk>."
        ours = (
            SentencePieceTokenizer(f"{model}.model")
            if name == "pieces"
            else FastTokenizer("bpe:300", tmp_path / name)
        )
        theirs = open_tokenizer(tmp_path / name)
        assert theirs.encode(text, add_special_tokens=False) == ours.encode_batch([text])[0].tolist()
        assert ours.end_of_text not in theirs.encode(text, add_special_tokens=False)


def test_a_tokenizer_that_differs_from_its_sentencepiece_model_is_refused(tmp_path):
    (tmp_path / "text").write_text(TEXT)
    sentencepiece.SentencePieceTrainer.train(
        input=tmp_path / "text",
        model_prefix=tmp_path / "tokenizer",
        vocab_size=400,
        model_type="bpe",
        minloglevel=2,
    )
    good = tmp_path / "good"
    SentencePieceTokenizer(str(tmp_path / "tokenizer.model")).save(good)
    assert open_tokenizer(good).encode("a word", add_special_tokens=False)
    bad = tmp_path / "bad"
    shutil.copytree(good, bad)
    parts = json.loads((bad / "tokenizer.json").read_text())
    parts["normalizer"]["normalizers"] = [
        n for n in parts["normalizer"]["normalizers"] if n["type"] != "Prepend"
    ]
    # the fault of a wrong conversion: no space before the first word
    (bad / "tokenizer.json").write_text(json.dumps(parts))
    with pytest.raises(UserError, match="does not give the ids of its sentencepiece model"):
        open_tokenizer(bad)


def test_another_vocabulary_has_scores_but_no_validation_loss(tmp_path, checkpoint):
    path = write_own(tmp_path, checkpoint)
    train_bpe("bpe:300", ["naïve café, it's a string of quotes x  +   1"] * 9 + [TEXT[:2000]], checkpoint)
    said = run_verb("evaluate", path, "--run", "theirs", "--tasks", "choice", **ALONE).stdout
    assert (
        "no validation loss" in said
        and "validation" not in results_of(path)
        and "acc" in results_of(path)["tasks"]["choice"]
    )


def test_every_named_task_is_one_of_lm_eval_and_a_group_is_scored(tmp_path, checkpoint):
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._yaml_loader import load_yaml

    manager = TaskManager(include_path=[TASK_FILES])
    for name, task in TASKS.items():
        entry = manager.task_index[task["task"]]
        content = load_yaml(entry.yaml_path, resolve_func=False, recursive=True)
        listed = content.get("metric_list") or content["aggregate_metric_list"]
        assert set(task["metrics"]) <= {metric["metric"] for metric in listed}, name
        assert entry.yaml_path.parent == TASK_FILES or "lm_eval" in entry.yaml_path.parts
    assert manager.task_index["logiqa"].yaml_path.parent == TASK_FILES
    mmlu, ours = (manager.task_index[name].cfg for name in ("mmlu", "mmlu_plain_mean"))
    assert mmlu["task"] == ours["task"] and not ours["aggregate_metric_list"][0]["weight_by_size"]
    assert {
        name for path in RECIPES.glob("*.yaml") for name in load_experiment(path.stem).evaluate.tasks
    } == set(TASKS)

    first = {"include": "choice.yaml", "task": "first", "doc_to_target": 0}
    group = {"group": "pair", "task": ["rehearsal_choice", "first"], "metadata": {"version": 3}}
    group["aggregate_metric_list"] = [{"metric": "acc", "weight_by_size": False}]
    tasks = {
        name: {"task": name, "metrics": ["acc"], "shots": 1} for name in ("pair", "rehearsal_choice", "first")
    }
    path = write_own(tmp_path, checkpoint, tasks, first=first, pair=group)
    run_verb("evaluate", path, "--run", "theirs", **ALONE)
    rows = results_of(path)["tasks"]
    assert rows["pair"]["acc"]["score"] == pytest.approx(
        (rows["rehearsal_choice"]["acc"]["score"] + rows["first"]["acc"]["score"]) / 2
    )
    assert rows["pair"]["n"] == 32 and rows["pair"]["version"] == "3" and rows["pair"]["acc"]["stderr"] > 0


def test_a_rehearsal_scores_stand_ins_without_the_hub(tmp_path):
    """The shipped XL experiment: its public model is a random one of the rehearsal's size, its tasks are the
    small ones."""
    alone = {**ALONE, "REHEARSE": 1, "HF_HOME": tmp_path / "empty"}
    run_verb("prepare", "gpt2_xl_owt", **alone)
    run_verb("evaluate", "gpt2_xl_owt", "--run", "public", **alone)
    experiment = load_experiment("gpt2_xl_owt", rehearse=True)
    results = read_json(RunDir.of(experiment, "public").results)
    assert (
        results["rehearsal"]
        and list(results["tasks"]) == list(experiment.evaluate.tasks)
        and results["validation"]["n"]
    )
    assert {row["n"] for row in results["tasks"].values()} == {16}


def test_code_of_task_files_runs_only_where_it_is_allowed(tmp_path, checkpoint):
    """A copy of the rehearsal's task files is not the repository's any more."""
    path = write_own(tmp_path, checkpoint, {"choice": OWN["choice"]})
    shutil.rmtree(tmp_path / "own")
    shutil.copytree(TASK_FILES / "rehearsal", tmp_path / "own")
    loader = (tmp_path / "own" / "documents.py").read_text()
    (tmp_path / "own" / "documents.py").write_text(f"open({str(tmp_path / 'trapped')!r}, 'w')\n{loader}")
    for verb in (["fetch", path], ["check", path], ["evaluate", path, "--run", "theirs"]):
        said = refused(*verb, **ALONE)
        assert (
            f"task files in {tmp_path / 'own'} name code" in said
            and "choice.yaml, line 3: !function documents.load" in said
        )
        assert "give --allow-task-code" in said and not (tmp_path / "trapped").exists()
    run_verb("check", path, "--allow-task-code")
    run_verb("evaluate", path, "--run", "theirs", "--tasks", "none", **ALONE)
    assert not (tmp_path / "trapped").exists()
    run_verb("fetch", path, "--allow-task-code", **ALONE)
    assert (tmp_path / "trapped").exists()
    run_verb("evaluate", path, "--run", "theirs", "--allow-task-code", **ALONE)
    assert results_of(path)["tasks"]["choice"]["n"] == 16
