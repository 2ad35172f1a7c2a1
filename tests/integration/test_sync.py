"""sync: what it writes is read back from W&B's own .wandb files (WANDB_MODE=offline); refusals are one
sentence."""

import json
import struct
from pathlib import Path

import pytest
import yaml
from conftest import run_verb
from wandb.proto import wandb_internal_pb2

from inheritune.files.json_files import read_json
from inheritune.training.mirror import _unsynced

pytestmark = pytest.mark.slow

ROWS = [{"step": 0, "tokens": 0, "val_loss": 5.5}] + [
    {"step": s, "tokens": 10 * s, "loss": 5 - s / 10} for s in range(1, 6)
]


def records(path: Path) -> list:
    """The records of a .wandb file: after 7 bytes, blocks of 32 KiB of chunks (crc 4, length 2, kind 1 of
    whole, first, middle, last), as in LevelDB's log; a block's last 6 bytes or fewer are empty."""
    data, found, parts, position = path.read_bytes(), [], b"", 7
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:
            position += 32768 - position % 32768
            continue
        length, kind = struct.unpack("<HB", data[position + 4 : position + 7])
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            found.append(wandb_internal_pb2.Record.FromString(parts))
            parts = b""
    return found


def segments(folder: Path) -> list[tuple[object, list[dict]]]:
    """(the run's record, its rows without what W&B adds) of every offline segment, oldest first."""
    result = []
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb"), key=lambda p: p.stat().st_mtime_ns):
        all_records = records(path)
        rows = [
            {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
            for record in all_records
            if record.WhichOneof("record_type") == "history"
        ]
        rows = [{key: value for key, value in row.items() if not key.startswith("_")} for row in rows]
        result.append((next(r.run for r in all_records if r.WhichOneof("record_type") == "run"), rows))
    return result


@pytest.fixture
def folder(tmp_path) -> Path:
    """A run folder as training leaves it."""
    path = tmp_path / "runs" / "rehearsal" / "small" / "seed0" / "reference"
    path.mkdir(parents=True)
    described = {
        "experiment": "small",
        "rehearsal": True,
        "run_name": "reference",
        "train": {"wandb_project": "ours", "lr": 0.1},
    }
    (path / "experiment.yaml").write_text(yaml.safe_dump(described))
    write_rows(path, ROWS)
    return path


def write_rows(folder: Path, rows: list[dict]) -> None:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_rows_reach_one_run_once(folder):
    said = run_verb("sync", folder, WANDB_MODE="offline").stdout
    assert "6 of 6 rows written to a segment" in said
    more = [*ROWS, {"step": 5, "tokens": 50, "val_loss": 4.4}, {"step": 6, "tokens": 60, "loss": 4.3}]
    write_rows(folder, more)
    assert "2 of 8 rows" in run_verb("sync", folder, WANDB_MODE="offline").stdout
    assert "nothing new" in run_verb("sync", folder, WANDB_MODE="offline").stdout
    (run, first), (again, second) = segments(folder)
    assert first == ROWS and second == more[6:]
    assert run.run_id == again.run_id == (folder / "wandb_id").read_text() == said.split()[-1]
    assert (run.project, run.display_name, list(run.tags)) == ("ours", "small/reference", ["rehearsal"])
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert config["train"]["lr"] == 0.1
    synced = read_json(folder / "wandb_synced.json")
    assert [synced[key] for key in ("mode", "rows", "last_step")] == ["offline", 8, 6]


def test_only_a_rehearsal_is_tagged(folder):
    (folder / "experiment.yaml").write_text((folder / "experiment.yaml").read_text().replace("true", "false"))
    (folder / "wandb_id").write_text("kept1234")
    run_verb("sync", folder, WANDB_MODE="offline")
    ((run, rows),) = segments(folder)
    assert not run.tags and run.run_id == "kept1234" and rows == ROWS


@pytest.mark.parametrize(
    ("kept", "expected"),
    [(ROWS[:4], []), (ROWS[:4] + [{"step": 4}, {"step": 7}], [{"step": 7}]), (ROWS, [])],
    ids=["went back", "went back and on", "as it was"],
)
def test_a_run_that_went_back_sends_no_step_twice(kept, expected):
    assert _unsynced(kept, {"rows": 6, "last_step": 5}) == expected


def refused(*words, **environment) -> str:
    done = run_verb(*words, check=False, **environment)
    assert done.returncode == 2 and "Traceback" not in done.stdout + done.stderr, done.stdout + done.stderr
    return done.stderr.strip().splitlines()[-1]


def test_what_cannot_be_synced_is_one_sentence(folder, tmp_path):
    assert "is not a run folder" in refused("sync", tmp_path / "nowhere")
    grown = tmp_path / "grown"
    (grown / "stage1").mkdir(parents=True)
    (grown / "stage1" / "metrics.jsonl").write_text("")
    assert "is a grown run" in refused("sync", grown)
    nobody = {
        "HOME": tmp_path,
        "NETRC": tmp_path / "netrc",
        "WANDB_API_KEY": "",
        "WANDB_CONFIG_DIR": tmp_path / "config",
    }
    nowhere = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_INIT_TIMEOUT": 8}
    assert "'wandb login'" in refused("sync", folder, **{**nobody, **nowhere})
    said = refused("sync", folder, **{**nobody, **nowhere, "WANDB_API_KEY": "0" * 40})
    assert "W&B cannot be reached" in said
    assert not (folder / "wandb_synced.json").exists()
    # rows in an offline segment are not at W&B: an online sync still has them to send
    run_verb("sync", folder, WANDB_MODE="offline")
    assert "W&B cannot be reached" in refused(
        "sync", folder, **{**nobody, **nowhere, "WANDB_API_KEY": "0" * 40}
    )
