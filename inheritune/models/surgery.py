"""Surgery: new checkpoints out of blocks of old ones, described by the architecture table and done tensor by
tensor.

`inherit` keeps chosen blocks of a source (paper, section 3), also doubled (stacking) or at other places among
random ones, `halve` keeps all of them at half the width, `extend` lengthens a trained model by blocks of its
reference (growth with `from: previous`), `write_random` writes the random start. All say, for every tensor of
the target, where it comes from (`Origin`), and `_write` does the rest: an ordinary Hugging Face checkpoint
and `inherited.json`, which lists each tensor as copied (from which file, with which hash) or fresh (how).
Sources are only read. A target appears under its name whole or not at all.
"""

import copy
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash

from inheritune.config.experiment import MODULES, NORMS, PARTS, parse_layers, place_layers
from inheritune.data.tokenizer_files import copy_tokenizer
from inheritune.errors import UserError, nearest
from inheritune.files import rundir
from inheritune.files.outputs import check_new_folder, resolve_output
from inheritune.models.architectures import (
    Shape,
    architecture,
    fresh_tensor,
    takes_token_types,
    tensor_shapes,
)
from inheritune.models.config_files import copy_settings, drop_older_keys
from inheritune.models.sources import Source, describe_not_finite, open_source
from inheritune.models.writer import write_checkpoint
from inheritune.runtime.log import logger

MANIFEST = "inherited.json"


@dataclass(frozen=True)
class Origin:
    """Where one tensor of a target comes from: `name` in `source`, or a fresh value (source None); stored as
    `dtype`."""

    dtype: torch.dtype
    source: Source | None = None
    name: str = ""
    fused: int = 0
    """0: the whole tensor. Else its first entries in every dimension, as many as the target has, where the
    last dimension is `fused` matrices side by side (queries, keys, values), each cut alike."""

    def value(self, shape: Shape) -> torch.Tensor | Iterator[memoryview]:
        """The value from the source, cut to `shape` where it is cut; as blocks of bytes where these are only
        copied."""
        blocks = (
            self.source.blocks(self.name)
            if not self.fused and self.source.dtype(self.name) == self.dtype
            else None
        )
        if blocks:
            return blocks
        tensor = self.source.tensor(self.name)
        if self.fused:
            corner = (*shape[:-1], self.fused, shape[-1] // self.fused)
            tensor = tensor.unflatten(-1, (self.fused, -1))[tuple(map(slice, corner))].flatten(-2)
        return tensor.to(self.dtype)


def inherit(
    source: str | Path,
    layers: str | Sequence[int],
    out: str | Path,
    parts: Sequence[str] = PARTS,
    modules: Sequence[str] = MODULES,
    seed: int = 0,
    revision: str | None = None,
    depth: int | None = None,
    at: int = 0,
    copies: int = 1,
) -> dict:
    """Write the blocks `layers` of `source` (a folder or a Hub id) to `out`; returns the manifest.

    They are the target's blocks from index `at` on, of `depth` in all (default: up to the last of them);
    `copies` puts them there so many times, one copy after the other.

    `parts` names what is copied and `modules` limits it inside the blocks; the rest is that of the random
    model of this depth and `seed`. A tied head is one tensor with the token embedding, copied if either is
    named. Every tensor keeps the source's dtype (fp32 for a DeepSpeed checkpoint). Doing the same again
    changes nothing.

    Raises UserError for unknown names, layers out of range, a source that cannot be used, an `out` that holds
    something else, and a disk without room; then nothing is written."""
    parts, modules = _chosen(parts, PARTS, "parts"), _chosen(modules, MODULES + NORMS, "modules")
    opened = open_source(source, revision)
    table, tied, n_source = (
        opened.table,
        bool(opened.config.tie_word_embeddings),
        getattr(opened.config, opened.table.layers),
    )
    for name in modules:
        if name in NORMS and name not in table.modules:
            raise UserError(
                f"modules: in a block of {table.name} one norm serves attention and MLP, so name norms, not "
                f"{name}"
            )
    once = parse_layers(layers if isinstance(layers, str) else list(layers), n_source)
    indices = place_layers(once * copies, n_source, depth, at)
    config = cut_config(opened.config, indices)

    origins = {}
    for name in tensor_shapes(config):
        part, module = table.part_of(name)
        copied = part in parts and (
            module is None or module in modules or (module in NORMS and "norms" in modules)
        )
        copied |= tied and name == table.embedding and "head" in parts
        inside, from_name = table.split_name(name), name
        if inside is not None:
            layer = indices[inside[0]]
            copied &= layer is not None
            from_name = table.block.format(i=once[0] if layer is None else layer) + inside[1]
        dtype = opened.dtype(from_name)
        origins[name] = Origin(dtype, opened, from_name) if copied else Origin(dtype)
    about = {
        "kind": "inherit" if copies == 1 else "stack",
        **_identity(opened),
        "layers": indices,
        "parts": parts,
        "modules": modules,
        "seed": seed,
        "tied_head": tied,
        "moved_blocks": _moved(config, indices),
    }
    return _write(Path(out), config, origins, about, seed, opened.config_path.parent)


def halve(source: str | Path, out: str | Path, revision: str | None = None) -> dict:
    """Write all blocks of `source` at half its heads and half its width (`half_config`) to `out`; returns the
    manifest.

    Of every tensor the first rows and columns are kept: of queries, keys and values those of the first half
    of the heads, of embeddings, norms and projections those of the first half of the width. Raises UserError
    as `inherit` does."""
    opened = open_source(source, revision)
    config = half_config(opened.config)
    origins = {
        name: Origin(opened.dtype(name), opened, name, 3 if ".attn.c_attn." in name else 1)
        for name in tensor_shapes(config)
    }
    layers = list(range(getattr(config, opened.table.layers)))
    sizes = {"heads": config.num_attention_heads, "width": config.hidden_size}
    about = {
        "kind": "half_width",
        **_identity(opened),
        "layers": layers,
        **sizes,
        "moved_blocks": _moved(config, layers),
    }
    return _write(Path(out), config, origins, about, 0, opened.config_path.parent)


MLP_WIDTH = {"gpt2": "n_inner", "llama": "intermediate_size"}
"""Families that can be halved, and how their configs call the width of the MLP."""


def half_config(config):
    """A copy of `config` with half the heads, each as wide as before, and width and MLP smaller in the same
    proportion. Of an odd number of heads the smaller half is kept: of GPT-2 XL's 25 heads of 64, width 1600,
    these are 12, width 768.

    Raises UserError for another family than GPT-2 and Llama, and for a single head of keys and values."""
    groups = getattr(config, "num_key_value_heads", config.num_attention_heads)
    if config.model_type not in MLP_WIDTH or groups < 2:
        what = f"family {config.model_type} with {groups} key and value head(s)"
        raise UserError(
            f"half width can be cut from gpt2 and llama models with at least 2 heads, not from {what}"
        )
    half, mlp_width = copy.deepcopy(config), MLP_WIDTH[config.model_type]
    heads = config.num_attention_heads // groups * (groups // 2)
    half.num_attention_heads, half.hidden_size = (
        heads,
        config.hidden_size * heads // config.num_attention_heads,
    )
    if groups != config.num_attention_heads:
        half.num_key_value_heads = groups // 2
    if getattr(config, mlp_width) is not None:
        setattr(half, mlp_width, getattr(config, mlp_width) * heads // config.num_attention_heads)
    return half


def write_random(config, out: str | Path, seed: int = 0) -> dict:
    """Write the random start of `config` (a transformers configuration) to `out`: every tensor fresh, fp32.

    Returns the manifest. Raises UserError as `inherit` does."""
    origins = {name: Origin(torch.float32) for name in tensor_shapes(config)}
    described = {key: value for key, value in config.to_dict().items() if key not in INCIDENTAL}
    digest = xxhash.xxh3_128_hexdigest(json.dumps(described, sort_keys=True, default=str).encode())
    about = {
        "kind": "random",
        "config": digest,
        "layers": getattr(config, architecture(config.model_type).layers),
        "seed": seed,
    }
    return _write(Path(out), config, origins, about, seed, None)


def extend(
    previous: str | Path, reference: str | Path, layers_from: int, layers_to: int, out: str | Path
) -> dict:
    """Write to `out` the model `previous` (of `layers_from` blocks), continued by the blocks [layers_from,
    layers_to) of `reference`, in `previous`'s dtype; returns the manifest. Embeddings, final norm and head
    are `previous`'s.

    Raises UserError if the two are not the same model but for depth, and as `inherit` does."""
    old, new = open_source(previous), open_source(reference)
    if old.config.model_type != new.config.model_type:
        raise UserError(
            f"{previous} is a {old.config.model_type} and {reference} a {new.config.model_type}: they cannot "
            f"be joined"
        )
    n_old, n_new = getattr(old.config, old.table.layers), getattr(new.config, new.table.layers)
    if n_old != layers_from:
        raise UserError(
            f"{previous} has {n_old} layers, not {layers_from}; give the stage that is to be extended"
        )
    if not layers_from < layers_to <= n_new:
        raise UserError(f"cannot extend {layers_from} layers to {layers_to}: {reference} has {n_new}")
    of_depth = {old.table.layers, *old.table.per_layer, *INCIDENTAL}
    ours, theirs = drop_older_keys(old.config.to_dict()), drop_older_keys(new.config.to_dict())
    differing = sorted(
        key for key in ours.keys() | theirs.keys() if key not in of_depth and ours.get(key) != theirs.get(key)
    )
    if differing:
        key = differing[0]
        raise UserError(
            f"{previous} and {reference} differ in {key} ({ours.get(key)} and {theirs.get(key)}), so they "
            f"cannot be joined"
        )
    config = cut_config(new.config, range(layers_to))
    origins = {}
    for name in tensor_shapes(config):
        inside = old.table.split_name(name)
        source = old if inside is None or inside[0] < layers_from else new
        origins[name] = Origin(old.dtype(old.table.embedding), source, name)
    about = {
        "kind": "extend",
        "previous": _identity(old),
        "reference": _identity(new),
        "layers": list(range(layers_to)),
        "layers_from": layers_from,
        "moved_blocks": _moved(config, range(layers_to)),
    }
    return _write(Path(out), config, origins, about, 0, old.config_path.parent)


# Config keys that say nothing about what the model computes.
INCIDENTAL = ("dtype", "architectures", "transformers_version", "_name_or_path", "use_cache")


def cut_config(config, layers: Sequence[int | None]):
    """A copy of `config` with the blocks `layers` (None: new): the depth set, lists with one entry per block
    cut alike."""
    table, raw = architecture(config.model_type), config.to_dict()
    raw[table.layers] = len(layers)
    for key in table.per_layer:
        if isinstance(raw.get(key), list):
            raw[key] = [
                raw[key][min(i, len(raw[key]) - 1) if layer is None else layer]
                for i, layer in enumerate(layers)
            ]
    return type(config).from_dict(raw)


def _chosen(names: str | Sequence[str], valid: Sequence[str], what: str) -> list[str]:
    """`names` in the order of `valid`. Raises UserError for an unknown one and for none."""
    names = names.split(",") if isinstance(names, str) else list(names)
    for name in names:
        if name not in valid:
            raise UserError(f"{what}: unknown name '{name}'; {nearest(name, valid)}")
    if not names:
        raise UserError(f"{what} is empty, so nothing would be copied; leave it out to copy everything")
    return [name for name in valid if name in names]


def _identity(source: Source) -> dict:
    """What tells a source from another one, and from itself after it was written anew."""
    return {
        "source": source.origin,
        "revision": source.revision,
        "source_kind": source.kind,
        "source_config": source.config_hash,
        "source_files": source.files(),
    }


def _moved(config, layers: Sequence[int | None]) -> dict:
    """Which blocks compute something else than in the source because their index changed."""
    moved = [{"block": i, "source_block": layer} for i, layer in enumerate(layers) if layer not in (i, None)]
    if not getattr(config, "scale_attn_by_inverse_layer_idx", False):
        return {
            "changed": False,
            "blocks": [],
            "meaning": "a block computes the same at any index of this model",
        }
    meaning = "every block keeps its index and computes what it did in the source"
    if moved:
        meaning = (
            "attention logits are divided by (index + 1), so these blocks attend otherwise than they did in "
            "the source"
        )
    return {"changed": bool(moved), "blocks": moved, "meaning": meaning}


def _write(
    out: Path, config, origins: dict[str, Origin], about: dict, seed: int, beside: Path | None
) -> dict:
    """Write the checkpoint that `origins` describes, tokenizer files from the folder `beside`, and the
    manifest, last.

    `about` is what the manifest says besides its tensors and files; an `out` that says the same is left as it
    is."""
    about = json.loads(json.dumps(about))  # as it will be read again: tuples are lists
    out = resolve_output(out)
    if finished := _finished(out, about):
        print(f"{out}: already there")
        _warn_of_not_finite(out, finished.get("not_finite", {}))
        return finished
    check_new_folder(out)
    shapes = tensor_shapes(config)
    specs = {name: (shape, origins[name].dtype) for name, shape in shapes.items()}
    for name, origin in origins.items():
        if origin.source and not origin.fused and origin.source.shape(origin.name) != shapes[name]:
            raise UserError(
                f"{name} would need shape {shapes[name]}, the source's {origin.name} has "
                f"{origin.source.shape(origin.name)}"
            )
    _check_room(out, sum(math.prod(shape) * dtype.itemsize for shape, dtype in specs.values()))

    def tensor_of(name: str) -> torch.Tensor | Iterator[memoryview]:
        origin = origins[name]
        if origin.source:
            return origin.value(shapes[name])
        return fresh_tensor(name, shapes[name], config, seed).to(origin.dtype)

    with rundir.replacing(out) as folder:
        folder.mkdir(parents=True)
        written = write_checkpoint(folder, config, specs, tensor_of)
        if beside:
            copied = copy_tokenizer(beside, folder, token_types=takes_token_types(config))
            copied += copy_settings(beside, folder)
            written["files"] |= rundir.hash_folder(folder, only=copied)
        hashes = {name: written["tensors"][name]["xxh3"] for name in origins}
        tensors = {
            name: _record(origin, hashes[name], seed, shapes[name]) for name, origin in origins.items()
        }
        bad = {name: row["not_finite"] for name, row in written["tensors"].items() if row["not_finite"]}
        manifest = {**about, "not_finite": bad, "tensors": tensors, "files": written["files"]}
        rundir.write_json(folder / MANIFEST, manifest)
    _warn_of_not_finite(out, bad)
    return manifest


def _warn_of_not_finite(out: Path, counts: dict[str, int]) -> None:
    if counts:
        logger.warning(
            "%s: %s; copied as they are, but no run can start from them", out, describe_not_finite(counts)
        )


def check_start(folder: Path) -> None:
    """Raises UserError if the checkpoint `folder`, which this module made, is not as it was left, or holds
    nan or inf, with which nothing can be trained."""
    rundir.check_own(folder)
    counts = rundir.read_json(folder / MANIFEST).get("not_finite")
    if counts is None:  # of a version that did not count them
        open_source(folder, check=False).check_finite()
    if counts:
        raise UserError(
            f"{folder}: {describe_not_finite(counts)}; repair the source they come from, delete this folder "
            f"and start again"
        )


def _record(origin: Origin, xxh3: str, seed: int, shape: Shape) -> dict:
    """The manifest's row of one tensor. `xxh3` is the hash of the target's bytes: the source's, unless it was
    cast or cut."""
    if origin.source is None:
        return {"fresh": f"fresh_tensor with seed {seed}, as in the random model of this depth", "xxh3": xxh3}
    row = {
        "file": str(origin.source.folder / origin.source.file_of(origin.name)),
        "tensor": origin.name,
        "xxh3": xxh3,
    }
    stored, whole = origin.source.dtype(origin.name), origin.source.shape(origin.name)
    if whole != shape:
        parts = f", in each of {origin.fused} parts" if origin.fused > 1 else ""
        row["cut"] = f"the first {list(shape)} of {list(whole)}{parts}"
    return {"copied": row if stored == origin.dtype else {**row, "cast": f"{stored} to {origin.dtype}"}}


def _finished(out: Path, about: dict) -> dict | None:
    """The manifest in `out` if it is this very surgery, whole; None if `out` is free. Raises UserError if it
    is taken."""
    if not out.is_dir() or not any(out.iterdir()):
        return None
    manifest = rundir.read_json(out / MANIFEST) if (out / MANIFEST).is_file() else {}
    differing = sorted(key for key, value in about.items() if manifest.get(key) != value)
    if differing:
        what = f"another surgery (its {differing[0]} differs)" if manifest else "something else"
        raise UserError(f"{out} already holds {what}; choose another folder, or delete it")
    rundir.check_files(out, manifest["files"])
    return manifest


def _check_room(out: Path, need: int) -> None:
    """Raises UserError if the disk of `out` has not `need` bytes and a little for headers and configs."""
    free = rundir.free_bytes(out)
    if free < need + (16 << 20):
        raise UserError(
            f"{out} needs {need / 1e6:.0f} MB, its disk has {free / 1e6:.0f} MB free; {rundir.more_room(out)}"
        )
