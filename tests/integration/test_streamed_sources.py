"""Sources of documents that the datasets library knows: configurations and splits of the Hub (from the small
Hub of hub_server.py), folders of save_to_disk, CSV, Arrow and WebDataset files."""

import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from conftest import REPOSITORY
from hub_server import COMMIT, Hub
from test_prepare import experiment, some_texts, write_jsonl

from inheritune.config.experiment import Experiment
from inheritune.data.documents import Corpus
from inheritune.data.prepare import prepare
from inheritune.errors import UserError
from inheritune.files.json_files import read_json
from inheritune.files.rundir import get_data_dir

TEXTS = some_texts(240)
HUB = {"source": "hub", "repo": "someone/texts", "revision": COMMIT}
CARD = """---
configs:
- config_name: sample-10BT
  default: true
  data_files:
  - {split: train, path: sample/*.parquet}
  - {split: validation, path: held/*.parquet}
- config_name: code
  data_files: code/*.csv
---
"""


@pytest.fixture(autouse=True)
def _root(tmp_path, monkeypatch):
    monkeypatch.setenv("INHERITUNE_ROOT", str(tmp_path / "root"))
    monkeypatch.chdir(tmp_path)


def write_csv(path: Path, texts: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pa.csv.write_csv(pa.table({"id": range(len(texts)), "text": texts}), path)
    return path


def write_arrow(path: Path, texts: list) -> Path:
    table = pa.table({"text": texts})
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=70)
    return path


def write_tar(path: Path, texts: list[str]) -> Path:
    """Samples of five files each; md, jsonl and bin are of kinds that the library does not decode."""
    with tarfile.open(path, "w") as archive:
        for number, text in enumerate(texts):
            row = json.dumps({"text": text, "n": number}).encode()
            contents = {
                "txt": text.encode(),
                "json": row,
                "jsonl": row,
                "md": text.encode(),
                "bin": b"\xe9t\xe9",
            }
            for suffix, content in contents.items():
                entry = tarfile.TarInfo(f"{number:06d}.{suffix}")
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
    return path


def splits_of(chosen: Experiment) -> tuple:
    manifest = read_json(prepare(chosen, 1) / "manifest.json")
    return manifest["splits"], manifest["fingerprint"]


# --- files --------------------------------------------------------------------------------------------------


def test_streamed_formats_give_the_bytes_of_jsonl(tmp_path):
    from datasets import Dataset, DatasetDict

    texts = [
        *TEXTS,
        "12",
        "NA",
        "a\r\nb",
        '"quoted", and\tmore',
    ]  # what readers of CSV take for something else
    places = tmp_path / "in [1]"
    places.mkdir()
    write_jsonl(places / "a.jsonl", texts)
    write_csv(places / "a.csv", texts)
    (places / "b.tsv").write_bytes((places / "a.csv").read_bytes())
    table = pa.table({"id": range(len(texts)), "text": texts})
    pa.csv.write_csv(table, places / "b.tsv", pa.csv.WriteOptions(delimiter="\t"))
    write_arrow(places / "a.arrow", texts)
    with pa.OSFile(str(places / "b.arrow"), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    write_tar(places / "a.tar", texts)
    saved = Dataset.from_dict({"text": texts})
    saved.save_to_disk(places / "saved", num_shards=2)
    DatasetDict({"train": saved, "test": saved.select(range(9))}).save_to_disk(places / "splits")
    (places / "folder").mkdir()
    write_arrow(places / "folder" / "one.arrow", texts)
    expected = splits_of(experiment(files=[str(places / "a.jsonl")]))
    for name in ("a.csv", "b.tsv", "a.arrow", "b.arrow", "saved", "splits", "folder"):
        assert splits_of(experiment(files=[str(places / name)])) == expected, name
    for key in ("txt", "json.text", "md"):
        assert splits_of(experiment(files=[str(places / "a.tar")], text_key=key)) == expected
    test = Corpus(experiment(files=[str(places / "splits")], split="test").data, tmp_path)
    assert sum(test.count(name) for name in test.groups[""]) == 9


def test_a_column_whose_name_ends_as_a_renamed_one_does_is_no_second_one(tmp_path):
    (tmp_path / "a.csv").write_text("text,text.1\n" + "".join(f"{letter},two\n" for letter in "abc" * 9))
    chosen = Corpus(experiment(files=["a.csv"]).data, tmp_path)
    assert sum(chosen.count(name) for name in chosen.groups[""]) == 27


def test_bytes_of_an_archive_that_are_not_utf8_are_counted(tmp_path):
    write_tar(tmp_path / "a.tar", TEXTS[:9])
    with pytest.raises(UserError, match="no usable document .[0-9]+ not UTF-8"):
        prepare(experiment(files=["a.tar"], text_key="bin"), 1)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"files": ["a.csv"], "text_key": "txt"}, r"a\.csv has no column 'txt' .*'text'\? It has: id, text"),
        ({"files": ["a.arrow"], "text_key": "body"}, r"a\.arrow has no column 'body' .*valid names: text"),
        (
            {"files": ["a.tar"], "text_key": "body"},
            r"a\.tar has no column 'body' .*valid names: bin, .*, txt",
        ),
        (
            {"files": ["a.tar"], "text_key": "jsonl.text"},
            r"jsonl\.text: the files .* are read as str",
        ),
        ({"files": ["longer.csv"]}, r"longer\.csv has rows with more fields than its header; quote"),
        ({"files": ["twice.csv"]}, r"twice\.csv has two columns 'text'; rename one"),
        ({"files": ["binary.csv"]}, r"binary\.csv is cut off, damaged or no csv file"),
        ({"files": ["comma.csv"]}, r"comma\.csv has rows with more fields than its header; quote"),
        (
            {"files": ["a.jsonl"], "text_key": "content"},
            r"a\.jsonl has no column 'content' .*It has: text, meta",
        ),
        ({"files": ["none.csv"]}, "empty corpus, no usable document .no document at all"),
        ({"files": ["damaged.csv"]}, r"damaged\.csv is cut off, damaged or no csv file"),
        ({"files": ["damaged.arrow"]}, r"damaged\.arrow is cut off or damaged .it has no end"),
        ({"files": ["batches.arrow"]}, r"batches\.arrow is cut off or damaged .it has no end of a stream"),
        ({"files": ["damaged.tar"], "text_key": "txt"}, r"damaged\.tar is cut off or damaged .it has no end"),
        ({"files": ["nothing"]}, r"nothing is a folder without Arrow files; name the files in it"),
        ({"files": ["saved"], "split": "train"}, "data.split: .*saved has no splits"),
        ({"files": ["splits"], "split": "tset"}, r"has no split 'tset' .did you mean 'test'.*: train, test"),
    ],
)
def test_what_is_refused_leaves_nothing(tmp_path, data, said):
    from datasets import Dataset, DatasetDict

    write_csv(tmp_path / "a.csv", TEXTS[:9])
    write_arrow(tmp_path / "a.arrow", TEXTS[:9])
    write_tar(tmp_path / "a.tar", TEXTS[:9])
    write_jsonl(tmp_path / "a.jsonl", TEXTS[:9])
    (tmp_path / "none.csv").write_text("text\n")
    (tmp_path / "longer.csv").write_text("id,text,lang\n" + "1,hello, you,en\n" * 9)
    (tmp_path / "twice.csv").write_text("text,text\n" + "one,two\n" * 9)
    (tmp_path / "binary.csv").write_bytes(b"\x01" * 200_000)  # longer than a field may be
    (tmp_path / "comma.csv").write_text("id,text,lang\n" + "1,hello,en,\n" * 9)
    (tmp_path / "damaged.csv").write_text('text\n"never closed\n')
    (tmp_path / "damaged.arrow").write_bytes((tmp_path / "a.arrow").read_bytes()[:300])
    whole = write_arrow(tmp_path / "batches.arrow", TEXTS[:200]).read_bytes()
    cut = whole.rindex(b"\xff\xff\xff\xff", 0, len(whole) - 8)  # where its last batch begins
    (tmp_path / "batches.arrow").write_bytes(whole[:cut])
    (tmp_path / "damaged.tar").write_bytes(b"no archive" * 100)
    (tmp_path / "nothing").mkdir()
    saved = Dataset.from_dict({"text": TEXTS[:3]})
    saved.save_to_disk(tmp_path / "saved")
    DatasetDict({"train": saved, "test": saved}).save_to_disk(tmp_path / "splits")
    chosen = experiment(**data)
    with pytest.raises(UserError, match=said):
        prepare(chosen, 1)
    assert not get_data_dir(chosen).exists()


# --- the Hub ------------------------------------------------------------------------------------------------

PREPARE_EACH = """
import sys
from inheritune.cluster.fetch import list_repositories
from inheritune.config.experiment import Experiment
from inheritune.data.prepare import prepare
from inheritune.errors import UserError
for words in sys.stdin:
    fetches, chosen = words.startswith("FETCH "), Experiment.model_validate_json(words.removeprefix("FETCH "))
    try: print([sorted(one.files) for one in list_repositories(chosen)] if fetches else prepare(chosen, 1))
    except UserError as error: print("REFUSED", error)
"""


def prepare_each(chosen: list[Experiment], fetched: Experiment | None = None, **environment) -> list[str]:
    """What `prepare` says to each experiment, in a process with this environment; then the files that `fetch`
    would take for `fetched`."""
    lines = "\n".join(one.model_dump_json(by_alias=True) for one in chosen)
    if fetched:
        lines += f"\nFETCH {fetched.model_dump_json(by_alias=True)}"
    done = subprocess.run(
        [sys.executable, "-c", PREPARE_EACH],
        input=lines,
        cwd=REPOSITORY,
        env={**os.environ, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.fixture
def hub(request, tmp_path):
    texts = tmp_path / "hub" / "datasets" / "someone" / "texts"
    for folder in ("sample", "held", "code"):
        (texts / folder).mkdir(parents=True)
    for number in range(2):
        part = pa.table({"text": TEXTS[number * 120 :][:120]})
        pq.write_table(part, texts / "sample" / f"00{number}.parquet")
    pq.write_table(pa.table({"text": TEXTS[:60]}), texts / "held" / "a.parquet")
    write_csv(texts / "code" / "a.csv", TEXTS[60:120])
    (texts / "README.md").write_text(CARD)
    (texts.parent / "pictures").mkdir()
    (texts.parent / "pictures" / "a.xyz").write_text("of no known format")
    script = texts.parent / "script"
    script.mkdir()
    (script / "script.py").write_text("raise SystemExit('this must not run')")
    served = Hub(tmp_path / "hub")
    request.addfinalizer(served.close)
    return served


def test_a_configuration_and_split_of_the_hub(tmp_path, hub):
    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    online = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
    named, default = experiment(config="sample-10BT", split="train", **HUB), experiment(**HUB)
    held, code = experiment(split="validation", **HUB), experiment(config="code", **HUB)
    wrong = [
        experiment(config="sample-10bt", **HUB),
        experiment(split="test", **HUB),
        experiment(config="code", text_key="body", **HUB),
        experiment(**HUB | {"repo": "someone/script"}),
        experiment(**HUB | {"repo": "someone/none"}),
        experiment(**HUB | {"repo": "someone/pictures"}),
    ]
    parts = {
        "web": {**HUB, "config": "sample-10BT", "weight": 0.5},
        "code": {**HUB, "config": "code", "weight": 0.3},
        "own": {"source": "files", "files": [str(tmp_path / "a.jsonl")], "weight": 0.2},
    }
    mixed = experiment(source="interleave", interleave=parts)
    said = prepare_each([named, default, held, code, *wrong, mixed], mixed, **online)
    assert said[10:] == [
        str(get_data_dir(mixed)),
        "[['code/a.csv', 'sample/000.parquet', 'sample/001.parquet']]",
    ]
    assert [file["name"] for file in read_json(get_data_dir(mixed) / "manifest.json")["source_files"]] == [
        "someone/texts/code/a.csv",
        str(tmp_path / "a.jsonl"),
        "someone/texts/sample/000.parquet",  # the code ends before the second
    ]
    assert said[:4] == [str(get_data_dir(chosen)) for chosen in (named, default, held, code)]
    expected = splits_of(experiment(files=["a.jsonl"]))
    for chosen in (named, default):
        manifest = read_json(get_data_dir(chosen) / "manifest.json")
        assert (manifest["splits"], manifest["fingerprint"]) == expected
        assert [file["name"] for file in manifest["source_files"]] == [
            "sample/000.parquet",
            "sample/001.parquet",
        ]
    assert [hub.taken.count(f"sample/00{n}.parquet") for n in range(2)] == [1, 1]
    assert all(line.startswith("REFUSED ") for line in said[4:10])
    assert (
        "has no configuration 'sample-10bt' (did you mean 'sample-10BT'?); it has: sample-10BT, code"
        in said[4]
    )
    assert "someone/texts has no split 'test'; its splits: train, validation" in said[5]
    assert "a.csv has no column 'body'" in said[6]
    assert "someone/script is a loading script" in said[7] and "no code of a data set is run" in said[7]
    assert "the data set someone/none" in said[8]
    assert "datasets finds no splits in someone/pictures" in said[9]
    assert not any((get_data_dir(chosen) / "progress.json").exists() for chosen in wrong)

    hub.close()  # what is listed and cached is enough; what is not says what to do
    for name in ("manifest.json", "progress.json"):
        (get_data_dir(named) / name).unlink(missing_ok=True)
    offline = {**online, "HF_HUB_OFFLINE": "1"}
    new = experiment(config="sample-10BT", **HUB)
    said = prepare_each([named, new], **offline)
    assert said[0] == str(get_data_dir(named))
    assert said[1].startswith("REFUSED the data set someone/texts@") and "inheritune fetch" in said[1]
