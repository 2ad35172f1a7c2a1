"""Documents from files: the readers of decoders.py beside the datasets library's stream of the same files.

Each contestant yields the texts of all rows, in one process, from four files that the system has in memory.
Imports and the first row are not counted.
"""

import json
from contextlib import suppress
from pathlib import Path

from harness import Case, Goal, clock, main, over
from prepare import setup as write_parquet


def setup(work: dict, folder: Path) -> None:
    """The parquet files of prepare.py, and the same rows as JSON Lines."""
    import pyarrow.parquet as pq

    write_parquet(work, folder)
    for path in sorted((folder / work["key"] / "documents").glob("*.parquet")):
        lines = [json.dumps({"text": text}) + "\n" for text in pq.read_table(path)["text"].to_pylist()]
        path.with_suffix(".jsonl").write_text("".join(lines), encoding="utf-8")


def list_files(work: dict, folder: Path) -> list[Path]:
    files = sorted((folder / work["key"] / "documents").glob(f"*.{work['suffix']}"))
    for path in files:
        path.read_bytes()
    return files


def ours(work: dict, folder: Path) -> dict:
    from inheritune.config.sections import Data
    from inheritune.data.documents import Corpus, UnusableDocument, batch_documents, extract_text

    files = [str(path) for path in list_files(work, folder)]
    about = {"name": "bench", "tokenizer": "gpt2", "validation": {"fraction": 0.1}, "sampling": "one_pass"}
    corpus, size = Corpus(Data(**about, source="files", files=files, sequence_length=8), folder), 0
    next(batch_documents(corpus, "", (0, 0), 1))  # which imports pyarrow
    with clock() as measured:
        for batch in batch_documents(corpus, "", (0, 0), 1 << 19):
            for raw in batch.raws:
                with suppress(UnusableDocument):
                    size += len(extract_text(batch.kind, raw, batch.key))
    return measured | {"characters": size}


def by_datasets(work: dict, folder: Path) -> dict:
    from datasets import load_dataset

    kind = {"jsonl": "json"}.get(work["suffix"], work["suffix"])

    def stream(files: list[Path]):
        names = [str(path) for path in files]
        return load_dataset(
            kind, data_files=names, split="train", streaming=True, cache_dir=str(folder / "cache")
        )

    files, size = list_files(work, folder), 0
    next(iter(stream(files[:1])))  # which imports the rest of the library
    with clock() as measured:
        for row in stream(files):
            size += len(row["text"])
    return measured | {"characters": size}


def case(suffix: str, mb: float) -> Case:
    contestants = {"ours": ours, "datasets, streamed": by_datasets}
    goals = [Goal("time of the datasets library's stream", 1.0, over("ours", "datasets, streamed"))]
    work = {"key": f"{suffix}{mb:g}", "kind": "gpt2", "suffix": suffix, "mb": mb}
    return Case(f"reading {suffix}, {mb:g} MB of text", work, contestants, goals, setup)


def cases(size: str) -> list[Case]:
    return [case(suffix, 2 if size == "small" else 60) for suffix in ("parquet", "jsonl")]


if __name__ == "__main__":
    main(__file__, cases)
