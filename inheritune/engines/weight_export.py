"""The weights of a run as a Hugging Face checkpoint: final/, and the weights kept at a step."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from inheritune.data.tokenizer_files import copy_tokenizer
from inheritune.engines.engine import gather_parameters
from inheritune.engines.failures import explain_write_error, raise_on_all_ranks
from inheritune.engines.resize import get_shape
from inheritune.files.json_files import write_json
from inheritune.files.markers import COMPLETE, hash_folder
from inheritune.files.rundir import RunDir
from inheritune.files.writing import replace_atomically
from inheritune.models.architectures import find_architecture
from inheritune.models.config_files import copy_settings
from inheritune.models.dtypes import FP32
from inheritune.models.networks import list_saved_tensors
from inheritune.models.writer import CheckpointWriter
from inheritune.runtime.ranks import get_rank


def export_weights(engine: Any, folder: Path, tokenizer: Path, run: dict | None = None) -> None:
    """Write the fp32 masters as a Hugging Face checkpoint, with the tokenizer and the generation settings of
    the model that the run started from, one parameter in memory at a time. All ranks must call this. Weights
    kept at a step (all but final/) get a marker, which describes the `run` (identity.describe_run).

    Raises UserError on every rank if the disk is full; nothing is left then."""
    parameters = gather_parameters(engine)
    problem: Exception | None = None
    if get_rank() == 0:
        try:
            with replace_atomically(folder) as temporary:
                temporary.mkdir()
                _write_parameters(engine, parameters, temporary)
                copy_tokenizer(tokenizer, temporary, ["**/*"], trained=True)
                start = RunDir(folder.parent).init
                if (start / "config.json").is_file():
                    copy_settings(start, temporary)
                if folder.name != "final":  # the marker of final/ is DONE
                    write_json(temporary / COMPLETE, {"files": hash_folder(temporary), "run": run})
        except Exception as error:
            problem = explain_write_error(error, folder)
    for _ in parameters:  # gathering needs every rank, also for what rank 0 could not write
        pass
    raise_on_all_ranks(problem)


def _write_parameters(
    engine: Any, parameters: Iterator[tuple[str, torch.Tensor | None]], folder: Path
) -> None:
    """Write config.json and the tensors of `parameters`, split into the pieces that the architecture
    stores."""
    config = engine.module.config
    table = find_architecture(config)
    pieces = {
        name: table.in_checkpoint(name, tuple(get_shape(tensor)))
        for name, tensor in list_saved_tensors(engine.module).items()
    }
    specs = {piece: (shape, FP32) for shapes in pieces.values() for piece, shape in shapes.items()}
    writer = CheckpointWriter(folder, config, specs)
    for name, value in parameters:
        if value is None:
            raise RuntimeError(f"rank 0 holds no tensor of {name}")
        shapes = pieces[name]
        parts = value.flatten().tensor_split(len(shapes))
        for (piece, shape), part in zip(shapes.items(), parts, strict=True):
            writer.add(piece, part.view(shape))
    writer.close()
