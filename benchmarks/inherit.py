"""The first half of a sharded checkpoint's layers: the `inherit` verb beside from_pretrained +
save_pretrained and mergekit.

The source is made on disk: OpenLLaMA-3B's shape in bf16, 6.9 GB in shards of 2 GB, in the page cache when a
turn begins. The limit is `cp` of as many bytes as the result has; ours also hashes and flushes every file, so
`cp` with an xxh3-128 of what it wrote and a flush is there too. transformers and mergekit neither hash nor
flush. mergekit (passthrough) is taken from $BENCH_MERGEKIT, a folder that run.sh fills by pip; without it the
row is missing.
"""

import os
import shutil
import sys
from pathlib import Path

from harness import Case, Goal, clock, main, over, run, values, verb


def setup(work: dict, folder: Path) -> None:
    """A checkpoint of random numbers, the same in all blocks (bytes are bytes to all contestants)."""
    import torch

    from inheritune.config.sections import Model
    from inheritune.models.dtypes import BF16
    from inheritune.models.networks import build_config, list_checkpoint_shapes
    from inheritune.models.writer import write_checkpoint

    source = folder / "source"
    if source.is_dir():
        return
    config, made = build_config(Model(**work["model"])), {}
    specs = {name: (shape, BF16) for name, shape in list_checkpoint_shapes(config).items()}

    def tensor_of(name: str):
        shape = specs[name][0]
        if shape not in made:
            made[shape] = (torch.randn(shape) * 0.02).bfloat16()
        return made[shape]

    unfinished = folder / "source.tmp"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    write_checkpoint(unfinished, config, specs, tensor_of, max_shard_bytes=work["shard_bytes"])
    unfinished.rename(source)


def target(folder: Path) -> Path:
    """An empty place for the result, the source in the page cache, nothing waiting to be written, and free
    memory that was written before: a virtual machine may have to ask its host for other pages, which would
    take longer than to write them."""
    shutil.rmtree(folder / "target", ignore_errors=True)
    with open(folder / "pages", "wb") as pages:
        for _ in range(
            0, sum(file.stat().st_size for file in (folder / "source").glob("*.safetensors")), 2 << 24
        ):
            pages.write(bytes(1 << 24))  # half as many bytes as the source has
    (folder / "pages").unlink()
    for file in (folder / "source").glob("*.safetensors"):
        with open(file, "rb") as source:
            while source.read(1 << 24):
                pass
    os.sync()
    return folder / "target"


def size_of(folder: Path) -> dict:
    return {"gb": sum(file.stat().st_size for file in folder.rglob("*.safetensors")) / 1e9}


def ours(work: dict, folder: Path) -> dict:
    out = target(folder)
    with clock() as measured:
        verb("inherit", "--source", folder / "source", "--layers", f"0:{work['layers']}", "--out", out)
    return measured | size_of(out)


TRANSFORMERS = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto")
model.model.layers = model.model.layers[:int(sys.argv[2])]
model.config.num_hidden_layers = int(sys.argv[2])
model.save_pretrained(sys.argv[3], max_shard_size="2GB")
"""


def transformers(work: dict, folder: Path) -> dict:
    """from_pretrained, the list of layers cut, save_pretrained."""
    out = target(folder)
    with clock() as measured:
        run(sys.executable, "-c", TRANSFORMERS, folder / "source", work["layers"], out)
    return measured | size_of(out)


MERGE = """
slices: [{{sources: [{{model: {source}, layer_range: [0, {layers}]}}]}}]
merge_method: passthrough
dtype: bfloat16
"""


def mergekit(work: dict, folder: Path) -> dict:
    """mergekit-yaml, passthrough, with --lazy-unpickle as its README has it for little memory; shards of 1B
    numbers, 2 GB."""
    package = Path(os.environ.get("BENCH_MERGEKIT") or "")
    if not (package / "mergekit").is_dir():
        raise SystemExit("no mergekit: set BENCH_MERGEKIT to a folder that holds it (run.sh does)")
    out = target(folder)
    (folder / "merge.yaml").write_text(MERGE.format(source=folder / "source", layers=work["layers"]))
    path = os.pathsep.join([os.environ["PYTHONPATH"], str(package)])
    command = [
        sys.executable,
        "-m",
        "mergekit.scripts.run_yaml",
        folder / "merge.yaml",
        out,
        "--no-copy-tokenizer",
    ]
    with clock() as measured:
        run(*command, "--lazy-unpickle", "--allow-crimes", "--out-shard-size", "1B", PYTHONPATH=path)
    return measured | size_of(out)


def copy(work: dict, folder: Path, safe: bool = False) -> dict:
    """`cp` of as many bytes of the source as the half has; `safe`: then hashed and flushed."""
    out = target(folder)
    out.mkdir()
    (folder / "bytes").mkdir(exist_ok=True)
    half = folder / "bytes" / "half"
    if not half.is_file():
        wanted = int(work["bytes"])
        with open(half, "wb") as joined:
            for file in sorted((folder / "source").glob("*.safetensors")):
                with open(file, "rb") as source:
                    while wanted and (block := source.read(min(wanted, 1 << 24))):
                        wanted -= joined.write(block)
        os.sync()
    with open(half, "rb") as source:
        while source.read(1 << 24):
            pass
    with clock() as measured:
        run("cp", "--reflink=never", half, out / "half")
        if safe:
            from inheritune.files.markers import hash_file
            from inheritune.files.writing import sync_path

            hash_file(out / "half")
            sync_path(out / "half")
    return measured | {"gb": (out / "half").stat().st_size / 1e9}


def copy_safe(work: dict, folder: Path) -> dict:
    return copy(work, folder, safe=True)


def case(name: str, model: dict, layers: int, shard_bytes: int) -> Case:
    from inheritune.config.sections import Model
    from inheritune.models.sizes import list_parameters

    work = {"model": model, "layers": layers, "shard_bytes": shard_bytes}
    work["bytes"] = 2 * sum(tensor.numel for tensor in list_parameters(Model(**model), layers))
    contestants = {"ours": ours, "transformers": transformers, "mergekit passthrough": mergekit}
    contestants |= {"limit: cp": copy, "limit: cp, xxh3-128, fsync": copy_safe}
    goals = [
        Goal("time of cp of the same bytes", None, over("ours", "limit: cp")),
        Goal("time of cp, hash and flush of the same bytes", 1.2, over("ours", "limit: cp, xxh3-128, fsync")),
        Goal("peak MB", 500, values("ours", "peak_mb")),
        Goal("time of from_pretrained, save_pretrained", 1.0, over("ours", "transformers")),
        Goal("time of mergekit passthrough", 1.0, over("ours", "mergekit passthrough")),
    ]
    return Case(name, work, contestants, goals, setup)


def cases(size: str) -> list[Case]:
    if size == "small":
        return [
            case(
                "4 of 8 layers of a toy",
                {"size": "llama_tiny", "layers": 8, "width": 256, "heads": 4, "mlp_width": 688},
                4,
                1 << 22,
            )
        ]
    return [case("13 of 26 layers of OpenLLaMA-3B's shape, bf16", {"size": "openllama_3b"}, 13, 2 << 30)]


if __name__ == "__main__":
    main(__file__, cases)
