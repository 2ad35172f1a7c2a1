"""Damage: every kind of file that a run reads, harmed in every way, under the verb that reads it. The verb
ends with the same bits, refuses in a sentence that names the file, or goes on from the checkpoint before with
a warning; no traceback, no other number. What comes out stands in damage.md; each cell is compared with it.

DAMAGE=write pytest tests/integration/test_damage.py     writes damage.md anew"""

import contextlib
import ctypes
import io
import json
import os
import re
import shlex
import shutil
import signal
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import REPOSITORY, experiment_dict, write_experiment
from markdown_rows import split_row
from tabulate import tabulate
from tiny_models import config_of, random_model

from inheritune import cli as program
from inheritune.errors import UserError
from inheritune.files.json_files import read_json, read_jsonl
from inheritune.files.markers import hash_folder
from inheritune.files.rundir import RunDir
from inheritune.files.writing import remove_path
from inheritune.runtime import dist
from inheritune.runtime.log import logger

pytestmark = pytest.mark.slow

TABLE = REPOSITORY / "tests" / "damage.md"
WRITE = os.environ.get("DAMAGE") == "write"
READERS = "## Files that were cut off"
"""Where the part of damage.md begins that tests/unit/test_readers.py makes."""

# --- the damages --------------------------------------------------------------------------------------------


def flip(path: Path, _=None) -> None:
    """One bit: of text, that which makes the digit nearest the middle another one; else one among the
    numbers."""
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    digits = (
        [i for i, byte in enumerate(content) if chr(byte).isdecimal()] if path.suffix not in BINARY else []
    )
    content[min(digits, key=lambda i: abs(i - middle)) if digits else len(content) * 2 // 3] ^= 1
    path.write_bytes(content)


BINARY = (".bin", ".pt", ".safetensors", ".npy")


def folder_in_its_place(path: Path, _=None) -> None:
    path.unlink()
    path.mkdir()


DAMAGES: dict[str, Callable[[Path, Path], object]] = {
    "truncated": lambda path, _: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "one bit flipped": flip,
    "emptied": lambda path, _: path.write_bytes(b""),
    "missing": lambda path, _: path.unlink(),
    "another's": lambda path, other: shutil.copyfile(other, path),
    "unreadable": lambda path, _: path.chmod(0),
    "a folder": folder_in_its_place,
}


@contextlib.contextmanager
def modes_count():
    """Let file modes bind root too: this thread lays its right to pass over them (CAP_DAC_OVERRIDE,
    CAP_DAC_READ_SEARCH) down for a while. The calls are Linux's capget and capset, version 3."""
    libc, header, data = (
        ctypes.CDLL(None, use_errno=True),
        (ctypes.c_uint32 * 2)(0x20080522, 0),
        (ctypes.c_uint32 * 6)(),
    )
    libc.capget(header, data)
    before = data[0]
    data[0] &= ~0b110
    libc.capset(header, data)
    try:
        yield
    finally:
        data[0] = before
        libc.capset(header, data)


# --- verbs in this process ----------------------------------------------------------------------------------


def verb(tree: Path, words: list[str]) -> tuple[int, str]:
    """`python -m inheritune WORDS` in this process, with `tree` as its root.  -> (exit code, what it
    printed)"""
    said, handlers = io.StringIO(), {s: signal.getsignal(s) for s in (signal.SIGUSR1, signal.SIGTERM)}
    quiet = {"INHERITUNE_ROOT": str(tree), "INHERITUNE_LOCK_WAIT": "0"}
    try:
        with (
            mock.patch.dict(os.environ, quiet),
            contextlib.redirect_stdout(said),
            contextlib.redirect_stderr(said),
        ):
            # DeepSpeed knows only the first group of a process
            with modes_count(), mock.patch("inheritune.runtime.dist.leave_group"):
                return program.main([word.replace("TREE", str(tree)) for word in words]), said.getvalue()
    finally:
        logger.handlers.clear()
        for number, handler in handlers.items():
            signal.signal(number, handler)


RUNS = "runs/small/seed0"
RECORD = ("step", "tokens", "loss", "lr", "grad_norm", "val_loss")


def trained(tree: Path, run: str) -> dict:
    """All that training may not change: weights, record, results."""
    folder = RunDir(tree / RUNS / run)
    results = read_json(folder.results)
    return {
        "weights": {
            n: t
            for f in folder.final.glob("*.safetensors")
            for n, t in safetensors.torch.load_file(f).items()
        },
        "files": hash_folder(folder.final),
        "record": [tuple(row.get(key) for key in RECORD) for row in read_jsonl(folder.metrics)],
        "results": {key: results.get(key) for key in ("validation", "steps", "difference")},
    }


def inherited(tree: Path) -> dict:
    return {p.name: p.read_bytes() for p in (tree / "cut").iterdir() if p.name != "inherited.json"}


def pictures(tree: Path) -> dict:
    return {p.name: p.read_bytes() for p in (tree / RUNS).glob("*.png")}


@dataclass(frozen=True)
class Scene:
    """A verb, on the tree without what `without` names (globs); `result` is what it must not change."""

    words: list[str]
    without: tuple[str, ...]
    result: Callable[[Path], object] | None
    """None: what it printed."""


def train(run: str) -> list[str]:
    return ["train", "TREE/small.yaml", "--run", run, "--ds", "TREE/ds.json"]


SCENES = {
    "train": Scene(train("reference"), (f"{RUNS}/reference",), lambda tree: trained(tree, "reference")),
    "resume": Scene(
        train("reference"),
        tuple(f"{RUNS}/reference/{name}" for name in ("DONE", "final", "results.json")),
        lambda tree: trained(tree, "reference"),
    ),
    "train from a run": Scene(train("copied"), (f"{RUNS}/copied",), lambda tree: trained(tree, "copied")),
    "grow": Scene(
        ["grow", "TREE/small.yaml", "--run", "grown"],
        (f"{RUNS}/grown/DONE",),
        lambda tree: read_json(tree / RUNS / "grown/DONE"),
    ),
    "table": Scene(["table", "TREE/small.yaml"], (), None),
    "figure": Scene(["figure", "TREE/small.yaml"], (), pictures),
    "evaluate": Scene(
        ["evaluate", "TREE/small.yaml", "--run", "reference"],
        (),
        lambda tree: [
            read_json(tree / RUNS / "reference/results.json")[key]
            for key in ("validation", "steps", "memory")
        ],
    ),
    "analyze": Scene(
        [
            *["analyze", "--data", "TREE/small.yaml", "--sequences", "4", "--length", "16", "--model"],
            f"TREE/{RUNS}/reference",
        ],
        (f"{RUNS}/reference/attention.jsonl",),
        lambda tree: read_jsonl(tree / RUNS / "reference/attention.jsonl")[1:],  # the first names the tree
    ),
} | {
    f"inherit from {kind}": Scene(
        ["inherit", "--source", f"TREE/{kind}", "--layers", "1:3", "--out", "TREE/cut"], (), inherited
    )
    for kind in ("safetensors", "bin", "deepspeed")
}

CHECKPOINT = f"{RUNS}/reference/checkpoints/step_00000004"
START = f"{RUNS}/random_init_4_layers"
FILES: list[
    tuple[str, str, str]
] = [  # what it is, the verb that reads it, where it lies (a glob of one file)
    ("token shard", "train", "data/small-*/train_00001.bin"),
    ("manifest.json", "train", "data/small-*/manifest.json"),
    ("tokenizer.json", "train", "data/small-*/tokenizer/tokenizer.json"),
    ("random start: weights", "train", f"{START}/model-*.safetensors"),
    ("random start: index", "train", f"{START}/model.safetensors.index.json"),
    ("random start: config.json", "train", f"{START}/config.json"),
    ("random start: inherited.json", "train", f"{START}/inherited.json"),
    ("experiment", "resume", "small.yaml"),
    ("DeepSpeed JSON", "resume", "ds.json"),
    ("checkpoint: model states", "resume", f"{CHECKPOINT}/deepspeed/*model_states.pt"),
    ("checkpoint: optimizer states", "resume", f"{CHECKPOINT}/deepspeed/*optim_states.pt"),
    ("checkpoint: random generators", "resume", f"{CHECKPOINT}/rng_00000.pt"),
    ("checkpoint: config.json", "resume", f"{CHECKPOINT}/config.json"),
    ("checkpoint: metrics.jsonl", "resume", f"{CHECKPOINT}/metrics.jsonl"),
    ("checkpoint: COMPLETE", "resume", f"{CHECKPOINT}/COMPLETE"),
    ("metrics.jsonl", "resume", f"{RUNS}/reference/metrics.jsonl"),
    ("experiment.yaml", "resume", f"{RUNS}/reference/experiment.yaml"),
    ("provenance.json", "resume", f"{RUNS}/reference/provenance.json"),
    ("source run: weights", "train from a run", f"{RUNS}/reference/final/model-*.safetensors"),
    ("source run: config.json", "train from a run", f"{RUNS}/reference/final/config.json"),
    ("source run: DONE", "train from a run", f"{RUNS}/reference/DONE"),
    ("source run: results.json", "train from a run", f"{RUNS}/reference/results.json"),
    ("source run: validation losses", "train from a run", f"{RUNS}/reference/validation/step_6.npy"),
    ("stage: results.json", "grow", f"{RUNS}/grown/stage1/results.json"),
    ("results.json", "table", f"{RUNS}/reference/results.json"),
    ("metrics.jsonl", "table", f"{RUNS}/reference/metrics.jsonl"),
    ("DONE", "table", f"{RUNS}/reference/DONE"),
    ("grown run: DONE", "table", f"{RUNS}/grown/DONE"),
    ("attention.jsonl", "figure", f"{RUNS}/reference/attention.jsonl"),
    ("validation shard", "evaluate", "data/small-*/val_00000.bin"),
    ("final: weights", "evaluate", f"{RUNS}/reference/final/model-*.safetensors"),
    ("results.json", "evaluate", f"{RUNS}/reference/results.json"),
    ("final: weights", "analyze", f"{RUNS}/reference/final/model-*.safetensors"),
    ("final: config.json", "analyze", f"{RUNS}/reference/final/config.json"),
    ("shard", "inherit from safetensors", "safetensors/model-00002-*.safetensors"),
    ("index", "inherit from safetensors", "safetensors/model.safetensors.index.json"),
    ("config.json", "inherit from safetensors", "safetensors/config.json"),
    ("shard", "inherit from bin", "bin/pytorch_model-00002-*.bin"),
    ("index", "inherit from bin", "bin/pytorch_model.bin.index.json"),
    ("model states", "inherit from deepspeed", "deepspeed/deepspeed/*model_states.pt"),
    ("optimizer states", "inherit from deepspeed", "deepspeed/deepspeed/*optim_states.pt"),
]

# --- the trees ----------------------------------------------------------------------------------------------


def plant(folder: Path, seed: int) -> Path:
    """A tree with all of FILES: data, finished runs, one of them grown, and checkpoints of others; other ones
    for each seed."""
    tree = folder / f"tree{seed}"
    tree.mkdir()
    rows = np.random.default_rng(seed).integers(0, 26, (200, 30)) + ord("a")
    text = folder / f"text{seed}.jsonl"  # outside: a data folder's name covers the path of its documents
    text.write_text(
        "".join(
            json.dumps({"text": " ".join(bytes(w).decode() for w in row.reshape(-1, 5).astype("u1"))}) + "\n"
            for row in rows
        )
    )
    runs = {
        "reference": {"init": "random"},
        "copied": {"init": {"inherit": {"source": "reference", "layers": "0:2"}}},
        "grown": {
            "init": {"inherit": {"source": "reference", "layers": "0:2"}},
            "grow": {"by": 1, "max_layers": 3, "margin": (-9.0, 9.0)[seed]},  # two stages, one
        },
    }
    raw = experiment_dict(runs=runs)
    raw["data"] |= {"name": "small", "source": "files", "files": [str(text)], "validation": {"fraction": 0.2}}
    raw["data"] |= {"shard_tokens": 1500}
    raw["train"]["lr"] = 1e-3 * (seed + 1)
    write_experiment(tree, raw)
    settings = {"train_micro_batch_size_per_gpu": 5 + 5 * seed, "zero_optimization": {"stage": 1}}
    (tree / "ds.json").write_text(json.dumps(settings, indent=1))
    chain = [["prepare", "TREE/small.yaml", "--workers", "1"], train("reference")]
    chain += [[*train("grown"), "--stage", str(stage)] for stage in (1, 2)[: 2 - seed]]
    chain += [SCENES["grow"].words, SCENES["analyze"].words]
    for words in chain:
        code, said = verb(tree, words)
        assert code == 0, said
    model = random_model(config_of("llama"), seed)
    model.save_pretrained(tree / "safetensors", max_shard_size="20KB")
    shutil.copytree(tree / CHECKPOINT, tree / "deepspeed", ignore=shutil.ignore_patterns("COMPLETE"))
    # as DeepSpeed writes them elsewhere: with checksums in the file
    for path in tree.glob("deepspeed/deepspeed/*.pt"):
        torch.save(torch.load(path, weights_only=False), path)
    (tree / "bin").mkdir()
    model.config.save_pretrained(tree / "bin")
    names = list(model.state_dict())
    files = {f"pytorch_model-0000{i + 1}-of-00002.bin": names[i::2] for i in (0, 1)}
    for file, part in files.items():
        torch.save({name: model.state_dict()[name].clone() for name in part}, tree / "bin" / file)
    index = {"weight_map": {name: file for file, part in files.items() for name in part}}
    (tree / "bin" / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return tree


@dataclass
class World:
    whole: Path
    other: Path
    expected: dict[str, object]
    """Of each scene, its result on the whole tree."""


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    folder = tmp_path_factory.mktemp("damage")
    whole, other = plant(folder, 0), plant(folder, 1)
    found = {}
    for name, scene in SCENES.items():
        code, said, result = play(whole, folder / "tree", scene)
        assert code == 0, said
        found[name] = result
    return World(whole, other, found)


def play(
    tree: Path, copy: Path, scene: Scene, harm: Callable[[Path], object] = lambda _: None
) -> tuple[int, str, object]:
    """Act `scene` out on a copy of `tree` that `harm` was done to.  -> (exit code, what it printed, its
    result if it ended)"""
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(tree, copy)
    for pattern in scene.without:
        for path in copy.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    harm(copy)
    code, said = verb(copy, scene.words)
    result = None if code else scene.result(copy) if scene.result else said
    return code, said, result


def the(tree: Path, pattern: str) -> Path:
    (path,) = tree.glob(pattern)
    return path


# --- the outcome of each ------------------------------------------------------------------------------------

NOTES = """

Written by `DAMAGE=write pytest tests/integration/test_damage.py`. refused: one sentence that names the file, exit code 2. same bits:
weights, record and results as without the damage. the checkpoint before: the same bits too, and a warning. same to 1e-5:
the JSON decides memory and speed only. left out: a picture is not drawn. the same file: two runs do not differ in it.

not seen: nothing at hand tells what should be there. Of checkpoints that others made, safetensors and `config.json` carry no
hash, and a whole other one of the same shape is as good (`inherited.json` keeps the hash of all that was read). Of the training
shards, which are many gigabytes, a start compares the sizes, and the hash of one shard per rank, another at each start;
`prepare` and `verify` compare all hashes.
"""  # noqa: E501 - the text is written as it stands

OUTCOMES: dict[tuple[str, str], dict[str, str]] = defaultdict(dict)


def same(result, expected) -> bool:
    if isinstance(result, dict) and isinstance(result.get("weights"), dict):
        weights = result["weights"].keys() == expected["weights"].keys() and all(
            torch.equal(tensor, expected["weights"][name]) for name, tensor in result["weights"].items()
        )
        return weights and all(result[key] == expected[key] for key in result if key != "weights")
    return result == expected


def close(result, expected) -> bool:
    """Whether trained weights are the same but for rounding."""
    return (
        isinstance(result, dict)
        and "weights" in result
        and all(
            torch.allclose(tensor, expected["weights"][name], rtol=0, atol=1e-5)
            for name, tensor in result["weights"].items()
        )
    )


def outcome(world: World, copy: Path, scene: str, pattern: str, damage: str) -> tuple[str, str]:
    """(cell of the table, what was printed)."""
    harmed = the(world.whole, pattern).relative_to(world.whole)
    others = [*world.other.glob(pattern), *world.other.glob(f"{RUNS}/grown/stage1/init/{harmed.name}")]
    different = [path for path in others if path.read_bytes() != (world.whole / harmed).read_bytes()]
    if damage == "another's" and not different:
        return "the same file", ""
    other = different[0] if different else others[0]
    code, said, result = play(
        world.whole, copy, SCENES[scene], lambda tree: DAMAGES[damage](tree / harmed, other)
    )
    expected, path = world.expected[scene], copy / harmed
    if code == 2:
        lines = [line for line in said.splitlines() if line.startswith("inheritune: ")]
        folders = [str(folder) for folder in path.parents if folder.is_relative_to(copy) and folder != copy]
        named = [
            str(path),
            *folders,
            f"run '{path.parent.name}'",
            f"{copy / RUNS}/reference was started with",
        ]
        named.append(f"{copy}/data/small-")  # another's experiment has other data
        assert len(lines) == 1 and any(name in lines[0] for name in named), said
        return "refused", said
    assert code == 0, said
    if same(result, expected):
        return "the checkpoint before" if "is skipped" in said else "same bits", said
    if close(result, expected):
        return "same to 1e-5", said
    if scene == "figure" and all(expected[name] == picture for name, picture in result.items()):
        return "left out", said
    return "not seen", said


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(
    ("what", "scene", "pattern"), FILES, ids=[f"{scene}-{what}" for what, scene, _ in FILES]
)
def test_damage(world, tmp_path, what, scene, pattern, damage):
    found, said = outcome(world, tmp_path / "tree", scene, pattern, damage)
    OUTCOMES[what, scene][damage] = found
    if what == "token shard" and found == "refused" and damage in ("one bit flipped", "another's"):
        return  # seen by chance, where a start looks into some of the shards
    shutil.rmtree(tmp_path / "tree", ignore_errors=True)
    assert WRITE or found == committed()[what, scene][damage], said


def committed() -> dict[tuple[str, str], dict[str, str]]:
    """The cells of damage.md."""
    own = TABLE.read_text().partition(READERS)[0]
    rows = [split_row(line) for line in own.splitlines() if "|" in line]
    heads, *cells = [row for row in rows if not row[0].startswith(":") and not row[0].startswith("-")]
    return {(row[0], row[1]): dict(zip(heads[2:], row[2:], strict=True)) for row in cells}


@pytest.fixture(scope="module", autouse=True)
def leave():
    """One thread, since all here is tiny; at the end write the table, where that was asked for, and leave the
    process group."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    dist.leave_group()
    if WRITE:
        rows = [
            [what, scene, *(OUTCOMES[what, scene].get(d, "?") for d in DAMAGES)] for what, scene, _ in FILES
        ]
        _, heading, readers = TABLE.read_text().partition(READERS)
        table = tabulate(rows, headers=["file", "read by", *DAMAGES], tablefmt="github")
        TABLE.write_text(table + NOTES + f"\n{heading}{readers}")


# --- beside the table ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pattern", [f"{CHECKPOINT}/COMPLETE", f"{RUNS}/reference/DONE", f"{RUNS}/grown/DONE"]
)
def test_no_bit_of_a_marker_can_change_unseen(world, tmp_path, pattern):
    path = the(world.whole, pattern)
    whole, content, refused = read_json(path), path.read_bytes(), 0
    for bit in range(8 * len(content)):
        harmed = bytearray(content)
        harmed[bit // 8] ^= 1 << bit % 8
        (tmp_path / "marker").write_bytes(harmed)
        try:
            found = read_json(tmp_path / "marker")
        except UserError:
            refused += 1
            continue
        assert {key: found.get(key) for key in whole} == whole, bit  # a space more, or the seal's own name
    assert refused > 7 * len(content)


def test_without_a_whole_checkpoint_a_run_refuses_rather_than_starts_over(world, tmp_path):
    def harm(tree):
        for path in tree.glob(f"{RUNS}/reference/checkpoints/*/deepspeed/*optim_states.pt"):
            flip(path)

    code, said, _ = play(world.whole, tmp_path / "tree", SCENES["resume"], harm)
    assert code == 2 and said.count("is skipped") == 2 and "step_00000002" in said.splitlines()[-1], said
    assert (
        "delete" in said
        and len(list((tmp_path / "tree").glob(f"{RUNS}/reference/checkpoints/*/COMPLETE"))) == 2
    )


def test_tokens_that_fail_are_prepared_again(world, tmp_path):
    shutil.copytree(world.whole, tmp_path / "tree")
    shard = the(tmp_path / "tree", "data/small-*/train_00001.bin")
    before = hash_folder(shard.parent)
    flip(shard)
    code, said = verb(tmp_path / "tree", ["prepare", "TREE/small.yaml", "--workers", "1"])
    assert (
        code == 0 and f"{shard} does not have the content" in said and hash_folder(shard.parent) == before
    ), said


@pytest.mark.parametrize(
    "content", ["{}", "[]", '{"starts": []}', '{"starts": [3]}', '{"starts": [{}]}', '{"starts']
)
def test_starts_that_are_not_recorded_are_refused_by_all_that_read_them(world, tmp_path, content):
    """provenance.json with no seal, as a person or another program leaves it."""
    shutil.copytree(world.whole, tmp_path / "tree")
    path = tmp_path / "tree" / RUNS / "reference" / "provenance.json"
    path.write_text(content)
    readers = [
        ["export", f"TREE/{RUNS}/reference", "--to", "TREE/out"],
        ["plan", "TREE/small.yaml", "--run", "reference", "--against", f"TREE/{RUNS}/reference"],
    ]
    for words in readers:
        code, said = verb(tmp_path / "tree", words)
        assert code == 2 and str(path) in said and "Traceback" not in said, said
    for pattern in SCENES["resume"].without:
        remove_path(tmp_path / "tree" / pattern)
    code, said = verb(tmp_path / "tree", SCENES["resume"].words)
    assert code == 2 and "Traceback" not in said and said.splitlines()[-1].startswith("inheritune: "), said
    assert str(path) in said, said


@pytest.mark.parametrize(
    "words", [["table", "TREE/small.yaml"], ["status", "TREE/small.yaml"]], ids=["table", "status"]
)
@pytest.mark.parametrize("folder", [f"{RUNS}/reference", RUNS, "runs"])
def test_a_run_folder_of_another_user_is_told(world, tmp_path, words, folder):
    shutil.copytree(world.whole, tmp_path / "tree")
    (tmp_path / "tree" / folder).chmod(0)
    code, said = verb(tmp_path / "tree", words)
    (tmp_path / "tree" / folder).chmod(0o755)
    assert code == (2 if words[0] == "table" else 0) and "Traceback" not in said, said
    assert "Permission denied" in said and str(tmp_path / "tree" / RUNS / "reference") in said, said


# --- what a refusal says to do works ------------------------------------------------------------------------


@dataclass(frozen=True)
class Remedy:
    """`words` are refused on a tree that `harm` was done to, in a sentence that `says` this; after `does`
    they work (or, if it gives other words, these)."""

    words: list[str]
    harm: Callable[[Path], object]
    says: str
    does: Callable[[Path, re.Match], list[str] | None]


def run_words(tree: Path, words: list[str]) -> None:
    code, said = verb(tree, words)
    assert code == 0, said


def run_printed(tree: Path, found: re.Match) -> None:
    """Run the command that the sentence ends with."""
    run_words(tree, shlex.split(found[1]))


def prepare_anew(tree: Path, found: re.Match) -> None:
    remove_path(Path(found[1]))
    run_words(tree, ["prepare", "TREE/small.yaml", "--workers", "1"])


def misname_checkpoint(tree: Path) -> None:
    """Of the two, one is gone and one has the name of a step that it is not of."""
    unfinish(tree)
    remove_path(tree / RUNS / "reference/checkpoints/step_00000002")
    (tree / CHECKPOINT).rename((tree / CHECKPOINT).with_name("step_00000005"))


def rename_checkpoint(tree: Path, found: re.Match) -> None:
    Path(found[1]).rename(tree / CHECKPOINT)


def edit_json(path: Path, change: Callable[[dict], object]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def forget(*patterns: str) -> Callable[[Path], None]:
    def harm(tree: Path) -> None:
        for path in [path for pattern in patterns for path in tree.glob(pattern)]:
            remove_path(path)

    return harm


def unseal(pattern: str) -> Callable[[Path, re.Match], None]:
    return lambda tree, _: edit_json(the(tree, pattern), lambda value: value.pop("seal"))


def restore_tokenizer(tree: Path, _) -> None:
    for file in the(tree, "data/small-*/tokenizer").iterdir():
        shutil.copy(file, tree / RUNS / "reference" / "final")


def damage_checkpoints(tree: Path) -> None:
    unfinish(tree)
    for path in tree.glob(f"{RUNS}/reference/checkpoints/*/deepspeed/*optim_states.pt"):
        flip(path)


unfinish = forget(*(f"{RUNS}/reference/{name}" for name in ("DONE", "final", "results.json")))
EXPORT = ["export", f"TREE/{RUNS}/reference", "--to", "TREE/out"]
CUT = SCENES["inherit from safetensors"].words
REMEDIES = {
    "a source that is not trained": Remedy(
        train("copied"),
        forget(f"{RUNS}/copied", f"{RUNS}/reference"),
        r"is not finished; first: python -m inheritune (.*)",
        run_printed,
    ),
    "a file edited on purpose": Remedy(
        ["table", "TREE/small.yaml"],
        lambda tree: edit_json(
            tree / RUNS / "reference/results.json", lambda value: value.update(note="by hand")
        ),
        r"results.json is not as it was written; .* delete its 'seal'",
        unseal(f"{RUNS}/reference/results.json"),
    ),
    "a damaged marker": Remedy(
        ["prepare", "TREE/small.yaml", "--workers", "1"],
        lambda tree: the(tree, "data/small-*/manifest.json").write_text("{}"),
        r"(\S+)/manifest.json is not a valid marker; restore it, or delete its folder",
        lambda _, found: remove_path(Path(found[1])),
    ),
    "a shard that is gone": Remedy(
        train("copied"),
        forget(f"{RUNS}/copied", "data/small-*/train_00001.bin"),
        r"; delete (\S+/manifest.json) and run 'prepare' again",
        prepare_anew,
    ),
    "an empty analysis": Remedy(
        ["figure", "TREE/small.yaml"],
        lambda tree: (tree / RUNS / "reference/attention.jsonl").write_text(""),
        r"attention.jsonl is empty; analyze the model again",
        lambda tree, _: run_words(tree, SCENES["analyze"].words),
    ),
    "a file that may not be read": Remedy(
        SCENES["evaluate"].words,
        lambda tree: the(tree, f"{RUNS}/reference/final/model-*.safetensors").chmod(0),
        r"(\S+) cannot be used \(Permission denied\): see its owner and mode",
        lambda _, found: Path(found[1]).chmod(0o644),
    ),
    "a folder that may not be written": Remedy(
        CUT,
        lambda tree: (tree / "closed").mkdir(0o555),
        "cannot write .*: Permission denied; choose a folder that you can write",
        lambda tree, _: [word.replace("TREE/closed/cut", "TREE/cut") for word in CUT],
    ),
    "checkpoints that are all damaged": Remedy(
        SCENES["resume"].words,
        damage_checkpoints,
        r"no other checkpoint is whole: restore it, or delete (\S+) to start over",
        lambda _, found: remove_path(Path(found[1])),
    ),
    "a checkpoint of another name": Remedy(
        SCENES["resume"].words,
        misname_checkpoint,
        r"(\S+) is a copy of the checkpoint of step 4 under a wrong name; rename or delete it",
        rename_checkpoint,
    ),
    "an export without a tokenizer": Remedy(
        EXPORT,
        forget(f"{RUNS}/reference/final/tokenizer*"),
        "holds no tokenizer .*; copy the files of the prepared data's tokenizer/ into it, and export again",
        restore_tokenizer,
    ),
    "an export to a folder in use": Remedy(
        EXPORT,
        lambda tree: shutil.copytree(tree / "safetensors", tree / "out"),
        "already holds something; choose another folder, or delete it",
        lambda *_: [word.replace("TREE/out", "TREE/other") for word in EXPORT],
    ),
    "an export to a folder to delete": Remedy(
        EXPORT,
        lambda tree: shutil.copytree(tree / "safetensors", tree / "out"),
        r"(\S+) already holds something; choose another folder, or delete it",
        lambda _, found: remove_path(Path(found[1])),
    ),
    "a cut to a folder in use": Remedy(
        CUT,
        lambda tree: shutil.copytree(tree / "bin", tree / "cut"),
        r"(\S+) already holds something else; choose another folder, or delete it",
        lambda _, found: remove_path(Path(found[1])),
    ),
    "starts that are not recorded": Remedy(
        SCENES["resume"].words,
        lambda tree: (unfinish(tree), (tree / RUNS / "reference/provenance.json").write_text("{}")),
        r"(\S+) does not list the starts of its run: it is damaged; restore it, or delete it",
        lambda _, found: remove_path(Path(found[1])),
    ),
    "a stop that is damaged": Remedy(
        ["status", "TREE/small.yaml"],
        lambda tree: (unfinish(tree), (tree / RUNS / "reference/STOPPED").write_text("{}")),
        r"(\S+) does not say why the run stopped: it is damaged; delete it",
        lambda _, found: remove_path(Path(found[1])),
    ),
}


@pytest.mark.parametrize("name", REMEDIES)
def test_a_remedy_works(world, tmp_path, name):
    tree, case = tmp_path / "tree", REMEDIES[name]
    shutil.copytree(world.whole, tree)
    case.harm(tree)
    words = (
        [word.replace("TREE/cut", "TREE/closed/cut") for word in case.words]
        if (tree / "closed").exists()
        else case.words
    )
    code, said = verb(tree, words)
    assert code == (0 if words[0] == "status" else 2) and "Traceback" not in said, said
    found = re.search(case.says, said.splitlines()[-1] if words[0] != "status" else said)
    assert found, said
    words = case.does(tree, found) or case.words
    code, said = verb(tree, words)
    assert code == 0 and not re.search(case.says, said), said
