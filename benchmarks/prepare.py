"""Documents to token files: the `prepare` verb beside nanoGPT's prepare.py (datasets.map, tiktoken) and the
tokenizers library.

The documents are the text of Python's standard library, repeated, in parquet files as OpenWebText has them.
Every contestant reads them, splits them, and writes the ids as uint16; the limit is tiktoken (or
sentencepiece) alone on all cores, the texts in memory and the processes started. Times of the verb and of the
scripts are those of whole processes.
"""

import multiprocessing
import os
import shutil
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
from harness import Case, Goal, clock, main, over, values, verb, write_experiment

CORES = len(os.sched_getaffinity(0))
FILES = 4


def setup(work: dict, folder: Path) -> None:
    """work["mb"] MB of documents in parquet files, the experiment, and the tokenizer's files."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from inheritune.config.experiment import load_experiment
    from inheritune.config.sections import Data
    from inheritune.data.documents import Corpus, UnusableDocument, batch_documents, extract_text
    from inheritune.data.tokenizer_loading import load_tokenizer

    place = folder / work["key"]
    shutil.rmtree(place, ignore_errors=True)
    (place / "documents").mkdir(parents=True)
    sentencepiece = work["kind"] == "sentencepiece"
    if sentencepiece:
        train_sentencepiece(place / "tokenizer.model", work["vocabulary"])
    about = {"name": "bench", "tokenizer": "gpt2", "validation": {"fraction": 0.0005}}
    about |= {"tokenizer": str(place / "tokenizer.model")} if sentencepiece else {}
    embedded = Data(**about, source="embedded", sequence_length=128, sampling="one_pass")
    source, texts, size = Corpus(embedded, place / "unused"), [], 0
    for group in source.groups:
        for batch in batch_documents(source, group, (0, 0), 1 << 20):
            for raw in batch.raws:
                with suppress(UnusableDocument):  # an empty file
                    texts.append(extract_text(batch.kind, raw, "text"))
    rows = []
    while size < work["mb"] * 1e6:
        for text in texts:
            rows.append(f"# copy {len(rows)}\n{text}")
            size += len(text.encode())
            if size >= work["mb"] * 1e6:
                break
    for number in range(FILES):
        part = pa.table({"text": rows[number::FILES]})
        pq.write_table(part, place / "documents" / f"{number}.parquet", row_group_size=1000)
    files = {"source": "files", "files": [str(place / "documents" / "*.parquet")]}
    path = write_experiment(
        place,
        {**about, **files},
        model={"size": "gpt2_small", "vocab_size": 50304},
        train={"steps": 1, "batch_tokens": 128, "lr": 1e-3, "warmup_steps": 0},
        runs={"reference": {"init": "random"}},
    )
    load_tokenizer(load_experiment(str(path)).data).save(place / "tokenizer")


def train_sentencepiece(path: Path, vocabulary: int) -> None:
    """A BPE model with byte fallback, trained on 4 MB of the standard library (its size, not its quality, is
    what matters)."""
    import sentencepiece

    library = Path(os.__file__).parent
    text = "\n".join(file.read_text(errors="ignore") for file in sorted(library.glob("*.py")))[:4_000_000]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text.splitlines()),
        model_prefix=str(path.with_suffix("")),
        vocab_size=vocabulary,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
        hard_vocab_limit=False,
    )


def tokenizer_of(work: dict, folder: Path):
    """The tokenizer as inheritune.data.tokens opens it: tiktoken or sentencepiece."""
    from inheritune.data.gpt2_tokenizer import Gpt2Tokenizer
    from inheritune.data.sentencepiece_tokenizer import SentencePieceTokenizer

    place = folder / work["key"] / "tokenizer"
    return (
        SentencePieceTokenizer("bench", folder=place)
        if work["kind"] == "sentencepiece"
        else Gpt2Tokenizer(place)
    )


def ours(work: dict, folder: Path) -> dict:
    from inheritune.config.experiment import load_experiment
    from inheritune.files.rundir import get_data_dir

    path = str(folder / work["key"] / f"{work['key']}.yaml")
    shutil.rmtree(get_data_dir(load_experiment(path)), ignore_errors=True)
    with clock() as measured:
        verb("prepare", path)
    tokens = sum(file.stat().st_size for file in get_data_dir(load_experiment(path)).glob("*.bin")) / 2
    return measured | {"tokens": tokens}


def nanogpt(work: dict, folder: Path, batched: bool = False) -> dict:
    """data/openwebtext/prepare.py of nanoGPT on the same files: map with one process per core, then 1,024
    writes. `batched`: with map's own batches, which the library's documentation calls the fast way."""
    cache = folder / work["key"] / "cache"
    shutil.rmtree(cache, ignore_errors=True)
    with clock() as measured:
        from datasets import load_dataset

        tokenizer = tokenizer_of(work, folder)
        encode = encode_one(work, folder)
        documents = load_dataset(
            "parquet",
            data_files=str(folder / work["key"] / "documents" / "*.parquet"),
            split="train",
            cache_dir=str(cache),
            num_proc=CORES,
        )
        split = documents.train_test_split(test_size=0.0005, seed=2357, shuffle=True)

        end = tokenizer.end_of_text

        def process(example):
            ids = [*encode(example["text"]), end]
            return {"ids": ids, "len": len(ids)}

        def process_batch(examples):
            rows = [[*encode(text), end] for text in examples["text"]]
            return {"ids": rows, "len": [len(row) for row in rows]}

        tokenized = split.map(
            process_batch if batched else process, batched=batched, remove_columns=["text"], num_proc=CORES
        )
        for name, its in tokenized.items():
            total = np.sum(its["len"], dtype=np.uint64)
            out = np.memmap(
                folder / work["key"] / f"{name}.bin", dtype=np.uint16, mode="w+", shape=(int(total),)
            )
            first, batches = 0, min(1024, len(its))
            for index in range(batches):
                batch = its.shard(num_shards=batches, index=index, contiguous=True).with_format("numpy")
                ids = np.concatenate(batch[:]["ids"])
                out[first : first + len(ids)] = ids
                first += len(ids)
            out.flush()
    return measured


def nanogpt_batched(work: dict, folder: Path) -> dict:
    return nanogpt(work, folder, batched=True)


def encode_one(work: dict, folder: Path):
    """text -> ids, by tiktoken's encode_ordinary or sentencepiece's encode, as nanoGPT and its like call
    them."""
    if work["kind"] == "sentencepiece":
        import sentencepiece

        return sentencepiece.SentencePieceProcessor(
            model_file=str(folder / work["key"] / "tokenizer.model")
        ).encode
    import tiktoken

    ours = tokenizer_of(work, folder)._encoding  # its ranks, under tiktoken's own name for the same
    return tiktoken.Encoding(
        "bench",
        pat_str=ours._pat_str,
        mergeable_ranks=ours._mergeable_ranks,
        special_tokens=ours._special_tokens,
    ).encode_ordinary


def hf_tokenizers(work: dict, folder: Path) -> dict:
    """encode_batch of the tokenizers library on all cores, a thousand documents at a time, and the same files
    written."""
    with clock() as measured:
        import pyarrow.parquet as pq
        from tokenizers import Tokenizer

        backend = Tokenizer.from_file(str(folder / work["key"] / "tokenizer" / "tokenizer.json"))
        with open(folder / work["key"] / "hf.bin", "wb") as out:
            for file in sorted((folder / work["key"] / "documents").glob("*.parquet")):
                for batch in pq.ParquetFile(file).iter_batches(1000):
                    for row in backend.encode_batch_fast(batch["text"].to_pylist(), add_special_tokens=False):
                        out.write(np.array([*row.ids, 0], np.uint16).tobytes())
    return measured


def _encode_all(texts, work, folder, ready, go, seconds):
    tokenizer = tokenizer_of(work, folder)
    tokenizer.encode_batch(texts[:10])
    ready.release()
    go.wait()
    start = time.perf_counter()
    for first in range(0, len(texts), 100):
        tokenizer.encode_batch(texts[first : first + 100])
    seconds.put((time.perf_counter() - start, time.process_time()))


def limit(work: dict, folder: Path) -> dict:
    """The slowest of one process per core, each with its part of the texts; what they yield is dropped."""
    import pyarrow.parquet as pq

    texts = [
        t
        for f in sorted((folder / work["key"] / "documents").glob("*.parquet"))
        for t in pq.read_table(f)["text"].to_pylist()
    ]
    context = multiprocessing.get_context("fork")
    ready, go, seconds = context.Semaphore(0), context.Event(), context.Queue()
    processes = [
        context.Process(target=_encode_all, args=(texts[i::CORES], work, folder, ready, go, seconds))
        for i in range(CORES)
    ]
    for process in processes:
        process.start()
    for _ in processes:
        ready.acquire()
    go.set()
    found = [seconds.get() for _ in processes]
    for process in processes:
        process.join()
    return {"seconds": max(wall for wall, _ in found), "cpu_seconds": sum(cpu for _, cpu in found)}


def case(kind: str, mb: float, **more) -> Case:
    alone = f"limit: {'tiktoken' if kind == 'gpt2' else 'sentencepiece'} alone"
    contestants = {
        "ours": ours,
        "datasets.map, as nanoGPT": nanogpt,
        "datasets.map, batched": nanogpt_batched,
    }
    contestants |= {"tokenizers batch": hf_tokenizers, alone: limit}
    goals = [
        Goal("time of the encoder alone on all cores", 1 / 0.9, over("ours", alone)),
        Goal("CPU time of the encoder alone", None, over("ours", alone, key="cpu_seconds")),
        Goal("time of datasets.map, as nanoGPT", None, over("ours", "datasets.map, as nanoGPT")),
        Goal(
            "time of the faster datasets.map",
            1 / 2,
            over("ours", "datasets.map, as nanoGPT", "datasets.map, batched"),
        ),
        Goal("time of the tokenizers batch call", 1.0, over("ours", "tokenizers batch")),
        Goal("peak MB of a process", None, values("ours", "peak_mb")),
    ]
    work = {"key": f"{kind}{mb:g}", "kind": kind, "mb": mb, **more}
    name = f"{'GPT-2 BPE' if kind == 'gpt2' else 'sentencepiece'}, {mb:g} MB of text"
    return Case(name, work, contestants, goals, setup, rare=("tokenizers batch",))


def cases(size: str) -> list[Case]:
    if size == "small":
        return [case("gpt2", 2), case("sentencepiece", 2, vocabulary=600)]
    return [case("gpt2", 150), case("sentencepiece", 60, vocabulary=8000)]


if __name__ == "__main__":
    main(__file__, cases)
