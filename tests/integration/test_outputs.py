"""Where a verb writes: links, dots, files and folders that cannot be written to are used as meant, or refused
in a sentence."""

import json
import os
import subprocess
from pathlib import Path

import pytest
from conftest import one_sentence, refused, run_verb
from fork_server import FORKS
from tiny_models import config_of, random_model

from inheritune.analysis.analyze import check_replaced
from inheritune.errors import UserError
from inheritune.evaluation.evaluate import check_results, merge_results
from inheritune.files.json_files import read_json, write_json, write_jsonl
from inheritune.files.outputs import check_new_file, check_new_folder, check_writable, resolve_output
from inheritune.files.rundir import RunDir
from inheritune.files.writing import replace_atomically
from inheritune.models import targets
from inheritune.models.surgery import inherit


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    random_model(config_of("llama")).save_pretrained(folder)
    return folder


def inherit_to(source: Path, out: str, cwd: Path):
    """`inherit --out OUT` as started from `cwd`."""
    words = ["inherit", "--source", str(source), "--layers", "0:2", "--out", out]
    command = [FORKS.python(), "-m", "inheritune", *words]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


def test_link_to_an_empty_folder_stays_a_link(source, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real", target_is_directory=True)
    for out in ("link/", "link"):
        done = inherit_to(source, out, tmp_path)
        assert done.returncode == 0, done.stderr
        assert os.readlink(tmp_path / "link") == "real" and (tmp_path / "real" / "inherited.json").is_file()
    assert "already complete" in done.stdout  # the second time
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "real"]


def test_new_folders_and_trailing_slashes(source, tmp_path):
    for out in ("new/", "deep/er/still", "./dotted"):
        assert inherit_to(source, out, tmp_path).returncode == 0
        assert (tmp_path / out / "config.json").is_file()


REFUSED = {
    "dangling link": ("link", "link is a link to nowhere/out, which does not exist; make that"),
    "link above": ("link/out", "link is a link to nowhere/out, which does not exist; make that"),
    "file": ("file", "file is a file; give the name of a new folder"),
    "below a file": ("file/out", "file is a file, so nothing can be written below it"),
    "here": (".", "is the folder you are in; give the name of a new one"),
    "above": ("..", "already holds something"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_anything_is_written(source, tmp_path, case):
    out, sentence = REFUSED[case]
    here = tmp_path / "here"
    here.mkdir()
    if case not in ("here", "above"):
        (here / "file").write_text("precious")
        (here / "link").symlink_to("nowhere/out")
    before = {p: p.lstat().st_mtime_ns for p in tmp_path.rglob("*")}
    assert sentence in one_sentence(inherit_to(source, out, here))
    assert {p: p.lstat().st_mtime_ns for p in tmp_path.rglob("*")} == before


def test_disk_that_is_read_only(source, disk):
    disk.resize(1 << 20)
    (disk.path / "empty").mkdir()
    subprocess.run(["mount", "-o", "remount,ro", str(disk.path)], check=True)
    for out in ("out", "deep/out", "empty"):
        assert f"{disk.path} cannot be written to" in one_sentence(
            inherit_to(source, str(disk.path / out), disk.path.parent)
        )
    with pytest.raises(UserError, match="cannot be written to"):
        check_writable(disk.path / "results")
    with pytest.raises(UserError, match="cannot write .*Read-only file system"):
        with replace_atomically(disk.path / "deep" / "file"):
            pass


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no /proc")
@pytest.mark.parametrize("path", ["/proc/x.json", "/proc/sub/x.json", "/sys/x.json"])
def test_a_folder_that_lets_in_and_takes_no_file_is_refused(path):
    """os.access says yes to root."""
    with pytest.raises(UserError, match="takes no files|cannot write /sys: "):
        check_new_file(Path(path))


def test_mount_point_is_refused(disk):
    disk.resize(1 << 20)
    with pytest.raises(UserError, match="is where a disk is mounted; give the name of a new folder in it"):
        check_new_folder(disk.path)


def test_loop_of_links_and_home(tmp_path, monkeypatch):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(UserError, match="a is a link to b, which does not exist"):
        resolve_output(tmp_path / "a")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_output("~/out") == tmp_path / "out"


def test_a_file_never_takes_the_place_of_a_folder(tmp_path):
    """Writing a file under the name of a folder once deleted the folder and all in it."""
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("precious")
    with pytest.raises(UserError, match="is a folder, so no file of that name can be written"):
        with replace_atomically(tmp_path / "thesis") as temporary:
            temporary.write_text("{}")
    assert (tmp_path / "thesis" / "chapter1.tex").read_text() == "precious"
    assert [p.name for p in tmp_path.iterdir()] == ["thesis"]
    with pytest.raises(
        UserError, match=r"is a folder; give the file to write, such as .*thesis/results.json"
    ):
        check_new_file(tmp_path / "thesis")


def test_what_appears_in_a_new_folder_meanwhile_is_left_as_it_is(tmp_path):
    """It was once deleted, because only the beginning looked whether the folder was free."""
    out = tmp_path / "out"
    with replace_atomically(out, new=True) as temporary:  # an empty folder is free
        out.mkdir()
        temporary.mkdir()
        (temporary / "config.json").write_text("{}")
    assert [p.name for p in out.iterdir()] == ["config.json"]
    (tmp_path / "file").write_text("precious")
    for taken in (out, tmp_path / "file"):
        with pytest.raises(UserError, match=f"{taken} was made by another process meanwhile"):
            with replace_atomically(taken, new=True) as temporary:
                temporary.mkdir()
    assert [p.name for p in out.iterdir()] == ["config.json"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "out"]


def test_inherit_never_deletes_what_was_put_into_its_output_meanwhile(source, tmp_path, monkeypatch):
    out, write = tmp_path / "out", targets.write_checkpoint

    def put_beside(*arguments):
        out.mkdir()
        (out / "precious").write_text("precious")
        return write(*arguments)

    monkeypatch.setattr(targets, "write_checkpoint", put_beside)
    with pytest.raises(UserError, match="was made by another process meanwhile"):
        inherit(str(source), "0:2", out)
    assert [p.name for p in out.iterdir()] == ["precious"] and [p.name for p in tmp_path.iterdir()] == ["out"]


def test_evaluate_writes_where_it_is_told_or_refuses_before_it_measures(small, tmp_path, source):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("precious")
    said = one_sentence(
        run_verb("evaluate", small, "--model", source, "--out", tmp_path / "thesis", check=False)
    )
    assert "is a folder; give the file to write" in said and (tmp_path / "thesis" / "chapter1.tex").is_file()
    (tmp_path / "dangling").symlink_to("nowhere/results.json")
    said = one_sentence(
        run_verb("evaluate", small, "--model", source, "--out", tmp_path / "dangling", check=False)
    )
    assert "which does not exist" in said


def test_analyze_refuses_before_it_measures(small, tmp_path, source):
    (tmp_path / "file").write_text("precious")
    (tmp_path / "dangling").symlink_to("nowhere")
    for out, sentence in (
        ("file", "is a file, so nothing"),
        ("file/in", "is a file, so nothing"),
        ("dangling", "is a link to"),
    ):
        said = one_sentence(
            run_verb("analyze", "--model", source, "--data", small, "--out", tmp_path / out, check=False)
        )
        assert sentence in said
    assert (tmp_path / "file").read_text() == "precious"


LARGE = config_of("llama")
LARGE.vocab_size, LARGE.max_position_embeddings = 320, 64


@pytest.fixture
def fitting(tmp_path) -> Path:
    """A model of the size of the small experiment's vocabulary."""
    random_model(LARGE, seed=1).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_evaluate_never_writes_over_what_is_not_its_own(small, tmp_path, source):
    """Results of another model once kept that one's name over the new numbers; other JSON was merged with
    them."""
    out = tmp_path / "out.json"
    check_results(out, str(source))  # nothing is there yet
    for held in ({"model": "gpt2"}, {"notes": "mine"}, {}, [1], "x"):
        out.write_text(json.dumps(held))
        with pytest.raises(
            UserError, match="holds no results of evaluate --model, and is left as it is; give another --out"
        ):
            check_results(out, str(source))
    out.write_text("precious")
    with pytest.raises(UserError, match="cannot be read as JSON"):
        check_results(out, str(source))
    held = {"model": "gpt2", "experiment": "small", "validation": {}}
    out.write_text(json.dumps(held))
    said = refused("evaluate", small, "--model", source, "--out", out)
    assert (
        f"holds the results of gpt2, not of {source}; give another --out" in said
        and json.loads(out.read_text()) == held
    )
    out.write_text("[1]")
    assert "holds no results of evaluate" in refused("evaluate", small, "--model", source, "--out", out)
    assert out.read_text() == "[1]"


def test_evaluate_tells_weights_that_were_replaced(small, tmp_path, fitting):
    out = tmp_path / "out.json"
    words = ("evaluate", small, "--model", fitting, "--out", out)
    run_verb(*words)
    first = read_json(out)
    assert first["model"] == str(fitting) and first["validation"]["n"] == 16
    run_verb(*words)
    assert read_json(out)["validation"] == first["validation"]  # the same weights again
    random_model(LARGE, seed=2).save_pretrained(fitting)
    said = refused(*words)
    assert (
        f"holds the results of the weights {first['checkpoint']} of {fitting}" in said
        and "give another --out" in said
    )
    assert read_json(out)["validation"] == first["validation"]


def test_evaluations_at_the_same_time_keep_each_others_scores(tmp_path):
    """Each once wrote what it had read at its start, and the score of the other was gone."""
    out = tmp_path / "results.json"
    first, second = ({"model": "m", "experiment": "x", "checkpoint": "c", "tasks": {}} for _ in range(2))
    merge_results(out, first, "c")
    merge_results(out, second, "c")  # both have begun
    first["tasks"]["a"] = {"checkpoint": "c", "acc": 1}
    merge_results(out, first, "c", "a")
    second["tasks"]["b"] = {"checkpoint": "c", "acc": 2}
    merge_results(out, second, "c", "b")
    assert {name: row["acc"] for name, row in read_json(out)["tasks"].items()} == {"a": 1, "b": 2}
    merge_results(out, {"model": "m", "experiment": "x", "validation": {}}, None)  # --tasks none
    assert list(read_json(out)["tasks"]) == ["a", "b"] and [p.name for p in tmp_path.iterdir()] == [out.name]


def test_two_models_evaluated_to_one_file_at_the_same_time_do_not_overwrite_each_other(tmp_path):
    out = tmp_path / "results.json"
    merge_results(out, {"model": "m", "experiment": "x", "checkpoint": "c"}, "c")
    before = out.read_bytes()
    with pytest.raises(UserError, match="holds the results of m, not of n; give another --out"):
        merge_results(out, {"model": "n", "experiment": "x", "checkpoint": "d"}, "d")
    with pytest.raises(UserError, match="holds the results of the weights c of m, which now has d"):
        merge_results(out, {"model": "m", "experiment": "x", "checkpoint": "d"}, "d")
    assert out.read_bytes() == before
    write_json(out, {"mine": 1})
    with pytest.raises(UserError, match="holds no results of evaluate --model"):
        merge_results(out, {"model": "m", "experiment": "x", "checkpoint": "c"}, "c")


def test_evaluate_refuses_out_beside_a_run(small, tmp_path):
    said = refused("evaluate", small, "--run", "reference", "--out", tmp_path / "out.json")
    assert "--out goes with --model only, because the results of a run are stored in its own folder" in said
    assert not (tmp_path / "out.json").exists()


def test_analyze_never_writes_over_what_is_not_its_own(small, tmp_path, fitting):
    out = tmp_path / "out"
    words = ("analyze", "--model", fitting, "--data", small, "--out", out, "--sequences", 2, "--length", 8)
    out.mkdir()
    (out / "max_rank.png").write_bytes(b"precious")
    said = refused(*words)
    assert "max_rank.png lies without an attention.jsonl" in said and "give another --out" in said
    assert (out / "max_rank.png").read_bytes() == b"precious" and len(list(out.iterdir())) == 1
    (out / "max_rank.png").unlink()
    row = {"kind": "header", "model": "gpt2", "revision": None}
    for held in ('{"my": "rows"}\n', "no rows", "", json.dumps(row) + "\n"):
        (out / "attention.jsonl").write_text(held)
        with pytest.raises(
            UserError, match="attention.jsonl is not as analyze leaves it, and is left as it is"
        ):
            check_replaced(RunDir(out), str(fitting), None)
    write_jsonl(out / "attention.jsonl", [row])
    with pytest.raises(UserError, match=f"was measured on gpt2, not on {fitting}"):
        check_replaced(RunDir(out), str(fitting), None)
    with pytest.raises(UserError, match="was measured on gpt2, not on gpt2@main"):
        check_replaced(RunDir(out), "gpt2", "main")
    (out / "attention.jsonl").unlink()
    (out / "notes.md").write_text("precious")
    run_verb(*words)
    assert (out / "max_rank.png").is_file() and (out / "notes.md").read_text() == "precious"
    check_replaced(RunDir(out), str(fitting), None)  # a second time renews it
