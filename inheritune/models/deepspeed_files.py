"""DeepSpeed's checkpoints: where the fp32 masters and AdamW's moments are in the files of all ranks.

`engine.save_checkpoint` writes a folder per tag with one file of model states (ZeRO 3: one per rank) and, at
ZeRO 1 to 3, one file of optimizer states per rank. The vectors in these are cut here into parameters.
"""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from inheritune.errors import UserError
from inheritune.files import markers
from inheritune.files.markers import COMPLETE
from inheritune.models.architectures import Shape
from inheritune.models.dtypes import FP32, find_dtype
from inheritune.models.extents import Extent, Stored, cut_extents
from inheritune.models.torch_files import load_skeleton, locate_tensor

# --- files --------------------------------------------------------------------------------------------------


def find_tag_folder(folder: Path) -> Path | None:
    """Return the folder of DeepSpeed's files, or None.

    It is `folder` itself or, one level down, the tag named by `latest` or the only one. Raises UserError if
    there are several, or if `latest` names none of them."""
    if any(folder.glob("[!.]*_model_states.pt")):
        return folder
    tags = [p for p in sorted(folder.iterdir()) if p.is_dir() and any(p.glob("[!.]*_model_states.pt"))]
    if (folder / COMPLETE).is_file():  # written here: folders that were added since are ignored
        listed = {name.partition("/")[0] for name in markers.read_marked_files(folder / COMPLETE)}
        tags = [tag for tag in tags if tag.name in listed]
    if (folder / "latest").is_file():
        latest = (folder / "latest").read_text(encoding="utf-8", errors="replace").strip()
        if latest not in [p.name for p in tags]:
            raise UserError(
                f"{folder / 'latest'} names '{latest}', which holds no DeepSpeed files; give the tag's own "
                f"folder"
            )
        return folder / latest
    if len(tags) > 1:
        raise UserError(
            f"{folder} holds {len(tags)} DeepSpeed checkpoints, {tags[0].name} to {tags[-1].name}; name one"
        )
    return tags[0] if tags else None


def _list_rank_files(folder: Path, kind: str) -> list[Path]:
    """Return zero_pp_rank_<r>_mp_rank_00_<kind>_states.pt in the order of ranks.

    Raises UserError if one is missing, and for tensor parallelism."""
    ranks = {}
    for path in folder.glob(f"*_{kind}_states.pt"):
        match = re.fullmatch(rf"(?:\w+_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_{kind}_states\.pt", path.name)
        if match and int(match[2]):
            raise UserError(
                f"{path} belongs to a model split by tensor parallelism, which is not supported; export it "
                f"first"
            )
        if match:
            ranks[int(match[1])] = path
    if sorted(ranks) != list(range(len(ranks))):
        gap = next(r for r in range(len(ranks)) if r not in ranks)
        raise UserError(
            f"{folder} lacks the {kind} states of rank {gap}; the checkpoint is incomplete, use another one"
        )
    return [ranks[r] for r in range(len(ranks))]


def _load_models(folder: Path, check: bool) -> tuple[list[Path], list[dict]]:
    """Return the files of model states and what they hold. Raises UserError if this is no whole model."""
    files = _list_rank_files(folder, "model") or [folder / "mp_rank_00_model_states.pt"]
    if not files[0].is_file():
        raise UserError(f"{folder} lacks {files[0].name}; the checkpoint is incomplete, use another one")
    models = [load_skeleton(path, check) for path in files]
    if not isinstance(models[0], dict) or not isinstance(models[0].get("module"), dict):
        raise UserError(
            f"{files[0]} holds no whole model (pipeline parallelism is not supported); export it first"
        )
    return files, models


# --- tensors ------------------------------------------------------------------------------------------------


def read_deepspeed(folder: Path, what: str = "master", check: bool = False) -> dict[str, Stored]:
    """Read where the fp32 masters are in a folder that `engine.save_checkpoint` wrote.

    Any ZeRO stage and any number of ranks. At ZeRO 1 to 3 `what` may also be "exp_avg", "exp_avg_sq" or
    "step" of AdamW; these exist for the trained parameters only. Frozen parameters have no master: at ZeRO 0
    to 2 they are in the module's state (DeepSpeed's own zero_to_fp32 loses them at ZeRO 1), at ZeRO 3 in
    fragments. `check` verifies the checksums of the files. Raises UserError for missing ranks, tensor
    parallelism and lost masters."""
    model_files, models = _load_models(folder, check)
    groups = models[0].get("param_shapes")
    whole = {n: t for n, t in models[0]["module"].items() if find_dtype(t.dtype) and t.numel()}
    in_module = {
        n: Stored(tuple(t.shape), FP32, (locate_tensor(model_files[0], t),)) for n, t in whole.items()
    }
    if groups is None:  # ZeRO 0: the module itself is the master
        rounded = [name for name, tensor in whole.items() if tensor.element_size() < 4]
        if rounded:
            raise UserError(
                f"{folder} holds {rounded[0]} in half precision without its fp32 master; inherit from final/"
            )
        return in_module

    optim_files = _list_rank_files(folder, "optim")
    states = [load_skeleton(path, check)["optimizer_state_dict"] for path in optim_files]
    stage = int(states[0].get("zero_stage", 1)) if states else 0
    _check_all_ranks(folder, models[0].get("dp_world_size"), optim_files, model_files if stage == 3 else None)
    vectors = _list_masters(states, stage, folder)
    if what != "master":
        moments = _list_moments(states, stage, what, folder)
        if what == "step":  # one number per flat group, the same in all
            step = locate_tensor(optim_files[0], moments[0][0]["step"])
            return {"step": Stored((), FP32, (step,))}
        vectors = [[group[what] for group in rank] for rank in moments]
    parts = [
        [locate_tensor(path, t) for t in vector] for path, vector in zip(optim_files, vectors, strict=True)
    ]
    if stage == 3:
        trained = _join_stage_3({n: shape for g in groups for n, shape in g.items()}, parts, folder)
    else:
        trained = _join_stages_1_and_2(groups, parts, states[0].get("param_alignment_paddings"))
    if what != "master":
        return trained
    stored = trained | _read_fragments(models, model_files, folder) if stage == 3 else in_module | trained
    if stage == 3:  # buffers are whole in each rank's file
        stored |= {name: in_module[name] for name in models[0].get("buffer_names") or [] if name in in_module}
    return stored | {name: stored[owner] for name, owner in models[0]["shared_params"].items()}


def _check_all_ranks(
    folder: Path, n_ranks: int | None, optim_files: Sequence[Path], model_files: Sequence[Path] | None
) -> None:
    """Raise UserError unless every rank that saved has its file; `model_files` is None below ZeRO 3."""
    for kind, files in (("optimizer", optim_files), ("model", model_files)):
        if files is not None and len(files) != n_ranks:
            raise UserError(
                f"{folder} has the {kind} states of {len(files)} ranks, but {n_ranks} saved it; use another "
                f"one"
            )


def _list_masters(states: Sequence[dict], stage: int, folder: Path) -> list[list[torch.Tensor]]:
    """Return the flat fp32 vectors of each rank, one per group. Raises UserError if there are none."""
    key = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
    if key not in states[0]:
        raise UserError(f"{folder} holds no fp32 masters ({key}); inherit from final/")
    return [state[key] for state in states]


def _list_moments(states: Sequence[dict], stage: int, what: str, folder: Path) -> list[list[dict[str, Any]]]:
    """Return AdamW's state of each rank, one dict per flat group. Raises UserError if it lacks `what`."""
    kept = [state["optimizer_state_dict" if stage == 3 else "base_optimizer_state"] for state in states]
    # a list of groups where "elastic_checkpoint" is set, else a dict of them
    moments = [
        rank if isinstance(rank, list) else [rank["state"][g] for g in sorted(rank["state"])] for rank in kept
    ]
    if not all(rank and all(what in group for group in rank) for rank in moments):
        raise UserError(
            f"{folder} holds no {what} of AdamW: it was saved before the first step, or by another optimizer"
        )
    return moments


def _read_fragments(models: Sequence[dict], files: Sequence[Path], folder: Path) -> dict[str, Stored]:
    """Return the frozen parameters of a ZeRO 3 checkpoint, which each rank holds a fragment of."""
    fragments = [
        [locate_tensor(path, t) for t in (model["frozen_param_fragments"] or {}).values()]
        for path, model in zip(files, models, strict=True)
    ]
    return _join_stage_3(models[0]["frozen_param_shapes"] or {}, fragments, folder)


def _join_stage_3(
    shapes: Mapping[str, Shape], parts: Sequence[Sequence[Extent]], folder: Path
) -> dict[str, Stored]:
    """Return the parameters of ZeRO 3: each is cut into equal parts, the last one padded.

    A rank's parts follow each other through `parts[rank]`. Raises UserError if they do not add up."""
    stored, position = {}, 0
    for name, shape in shapes.items():
        part = math.ceil(math.prod(shape) / len(parts))
        extents = [extent for rank in parts for extent in cut_extents(rank, position, part)]
        stored[name] = Stored(tuple(shape), FP32, cut_extents(extents, 0, math.prod(shape)))
        position += part
    if any(sum(extent.count for extent in rank) != position for rank in parts):
        raise UserError(
            f"{folder} is damaged: a rank's parts do not add up to {position} elements; use another "
            f"checkpoint"
        )
    return stored


def _join_stages_1_and_2(
    groups: Sequence[Mapping[str, Shape]],
    parts: Sequence[Sequence[Extent]],
    paddings: Sequence[Sequence[int]] | None,
) -> dict[str, Stored]:
    """Return the parameters of ZeRO 1 and 2: each group is one vector, parameter after parameter.

    `parts[rank]` has one partition of each vector."""
    stored = {}
    for g, group in enumerate(groups):
        vector, position = [rank[g] for rank in parts], 0
        for i, (name, shape) in enumerate(group.items()):
            stored[name] = Stored(tuple(shape), FP32, cut_extents(vector, position, math.prod(shape)))
            position += math.prod(shape) + (paddings[g][i] if paddings else 0)
    return stored
