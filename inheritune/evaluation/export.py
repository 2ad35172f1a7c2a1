"""`export FOLDER --to D`: write a finished run as a portable checkpoint, with tokenizer and model card.

A run keeps the paper's parameterization, which few programs know: transformers 4 with SDPA silently ignores
`scale_attn_by_inverse_layer_idx`, vLLM refuses it. Here the scaling by layer moves into the query weights
(W_Q / (layer + 1), flag off), and the rows that pad the vocabulary are cut off. The folder appears under its
name only after the logits of the two were compared.
"""

import copy
import shlex
from pathlib import Path
from typing import Any

import torch

from inheritune.analysis.attention import load_model
from inheritune.config.reading import read_yaml
from inheritune.config.sections import Data
from inheritune.config.source_shape import SPECIAL_IDS
from inheritune.data.tokenizer import PROBE, Tokenizer
from inheritune.data.tokenizer_files import copy_tokenizer
from inheritune.data.tokenizer_loading import load_tokenizer
from inheritune.errors import UserError, suggest_name
from inheritune.evaluation.card import SCALED, format_card
from inheritune.files.json_files import read_json, write_json
from inheritune.files.outputs import check_new_folder, resolve_output
from inheritune.files.rundir import RunDir
from inheritune.files.writing import replace_atomically, write_text
from inheritune.models.dtypes import STORED_AS
from inheritune.models.initialization import make_generator
from inheritune.models.networks import list_checkpoint_shapes
from inheritune.models.sources import Source, open_source
from inheritune.models.writer import write_checkpoint

DTYPES = {name: STORED_AS[name] for name in ("fp32", "bf16")}
TOLERANCE = {"fp32": 1e-5, "bf16": 0.05}
"""Largest difference of a logit, as a share of the largest logit where that is above 1. bf16 has 8 bits of
precision: its bound finds only a broken export, and the card states the difference."""


def export(folder: str, to: str, dtype: str | None = None) -> None:
    """Write the finished run in `folder` to the new folder `to`.

    Of a grown run it is the stage that its DONE names. `dtype` is fp32 or bf16; the default is that of the
    model which the run started from.

    Raises UserError for an unfinished or damaged run, one without a tokenizer, an unknown dtype, and a `to`
    that holds something or cannot be written. Then nothing is written."""
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"export: unknown dtype '{dtype}'; {suggest_name(dtype, DTYPES)}")
    out, run = resolve_output(to), find_finished(RunDir(folder))
    check_new_folder(out)
    if not any((run.final / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        raise UserError(
            f"{run.final} holds no tokenizer (tokenizer.json or tokenizer.model); copy the files of the "
            f"prepared data's tokenizer/ into it, and export again"
        )
    dtype = dtype or get_source_dtype(run)
    described = read_yaml(run.experiment)
    tokenizer = load_tokenizer(Data.model_validate(described["data"]), run.final)
    source = open_source(run.final)
    config = make_portable_config(source.config, tokenizer.vocab_size, tokenizer.end_of_text)
    specs = {name: (shape, DTYPES[dtype]) for name, shape in list_checkpoint_shapes(config).items()}
    with replace_atomically(out, new=True) as temporary:
        temporary.mkdir()
        write_checkpoint(
            temporary,
            config,
            specs,
            lambda name: make_portable_tensor(source, config, name).to(DTYPES[dtype].torch),
        )
        copy_tokenizer(run.final, temporary, trained=True)
        opener, pad_token_id = find_opener(temporary, tokenizer)
        settings = make_generation_config(run, config, tokenizer, pad_token_id)
        write_json(temporary / "generation_config.json", settings, seal=False)
        compared = compare_logits(run.final, temporary, config.vocab_size)
        if not compared["difference"] <= TOLERANCE[dtype] * max(1.0, compared["largest"]):
            raise RuntimeError(
                f"the export of {run.final} computes other logits ({compared}): nothing was written"
            )
        write_text(temporary / "README.md", format_card(run, described, out.name, dtype, compared, opener))
    if opener != "AutoTokenizer":
        print(
            f"AutoTokenizer gives other ids than the run was trained with: open it as README.md shows, by "
            f"{opener}"
        )
    print(
        f"wrote {out} in {dtype}: its logits differ by at most {compared['difference']:.1e} "
        f"(the largest is {compared['largest']:.1f})"
    )
    print(f"to publish it: hf upload OWNER/{out.name} {shlex.quote(str(out))}")


def get_source_dtype(run: RunDir) -> str:
    """Return the dtype of the model that the run started from if an export can have it, else that of the
    run, fp32."""
    config = run.init / "config.json"
    described = read_json(config) if config.is_file() else {}
    stated = described.get("dtype") or described.get("torch_dtype")
    return next((name for name, dtype in DTYPES.items() if str(dtype) == f"torch.{stated}"), "fp32")


def find_finished(run: RunDir) -> RunDir:
    """Return the run or stage whose final/ a run's folder stands for. Raises UserError if there is none."""
    if not run.is_done():
        if RunDir(run.path.parent).is_done() and run.path.name == "final":
            raise UserError(
                f"{run.path} holds the weights of a run; give the run's folder, {run.path.parent}"
            )
        is_run = run.experiment.is_file() or run.stages()
        what = "is not finished (no DONE)" if is_run else "is not a run folder"
        raise UserError(f"{run.path} {what}; export takes runs/<experiment>/seed<k>/<run> of a finished run")
    return run.chosen()


# --- the portable form --------------------------------------------------------------------------------------


def make_portable_config(config: Any, vocab_size: int, end_of_text: int) -> Any:
    """Return `config` for other programs: standard scaling, the tokenizer's vocabulary, and the
    `choose_special_ids` of a text.

    In training `end_of_text` lies between any two texts. Biases held at zero keep their mark, which other
    programs ignore."""
    config = copy.deepcopy(config)
    if getattr(config, SCALED, False):
        setattr(config, SCALED, False)
    config.vocab_size, config.use_cache = vocab_size, True
    stated = {key: getattr(config, key, None) for key in SPECIAL_IDS}
    ids = choose_special_ids(stated, vocab_size, end_of_text)
    for key in SPECIAL_IDS:
        setattr(config, key, ids[key])
    return config


def choose_special_ids(stated: dict, vocab_size: int, end_of_text: int) -> dict:
    """Return {bos, eos and pad_token_id: id} of a trained model, from those `stated` for the model that it
    started from.

    If that model ends a text with another id than the run's data, its ids belong to another tokenizer. Then
    `end_of_text` begins and ends a text, and nothing pads it."""
    known = {key: _limit_ids(vocab_size, stated.get(key)) for key in SPECIAL_IDS}
    ends = known["eos_token_id"]
    if end_of_text not in (ends if isinstance(ends, list) else [ends]):
        known = {"eos_token_id": end_of_text, "bos_token_id": None, "pad_token_id": None}
    if known["bos_token_id"] is None:
        known["bos_token_id"] = end_of_text
    return known


def _limit_ids(vocab_size: int, ids: int | list[int] | None) -> int | list[int] | None:
    """Return an id, or those of a list, below `vocab_size`; None if there is none."""
    if isinstance(ids, list):
        return [number for number in ids if number < vocab_size] or None
    return ids if ids is not None and ids < vocab_size else None


def make_portable_tensor(source: Source, config: Any, name: str) -> torch.Tensor:
    """Return tensor `name` of `source` in the portable form of `config`, in the source's dtype."""
    tensor, inside = source.tensor(name), source.table.split_name(name)
    if inside is None:
        of_vocabulary = source.table.parts["token_embedding"] + source.table.parts["head"]
        is_padded = name in of_vocabulary and tensor.shape[0] == source.config.vocab_size
        return tensor[: config.vocab_size] if is_padded else tensor
    layer, name_inside = inside
    if getattr(source.config, SCALED, False) and name_inside in ("attn.c_attn.weight", "attn.c_attn.bias"):
        # Only GPT-2 has this flag. Its matrices are inputs x outputs, and the first `hidden_size` outputs are
        # the queries.
        tensor[..., : source.config.hidden_size] /= layer + 1
    return tensor


def make_generation_config(
    run: RunDir, config: Any, tokenizer: Tokenizer, pad_token_id: int | None
) -> dict[str, Any]:
    """Return generation_config.json of the portable form `config`.

    It has the settings of the model that the run started from, and the ids that begin, end and pad a text.
    `pad_token_id` is the tokenizer's own."""
    # Older runs have the file in init/ only.
    kept = [folder / "generation_config.json" for folder in (run.final, run.init)]
    stated: dict[str, Any] = next((read_json(path) for path in kept if path.is_file()), {})
    ids = {key: stated.get(key, getattr(config, key, None)) for key in SPECIAL_IDS}
    ids = choose_special_ids(ids, config.vocab_size, tokenizer.end_of_text)
    if ids["pad_token_id"] is None:
        ids["pad_token_id"] = tokenizer.end_of_text if pad_token_id is None else pad_token_id
    return stated | ids


def find_opener(folder: Path, tokenizer: Tokenizer) -> tuple[str, int | None]:
    """Return (class, id of its padding token) by which others open the tokenizer in `folder` with the ids of
    `tokenizer`.

    AutoTokenizer of transformers 5 chooses a class of its own for a few families (Qwen2Tokenizer), whatever
    the folder states."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if not (folder / "tokenizer.json").is_file():  # tokens.py found no counterpart that gives its ids
        return "sentencepiece", None
    code = Path(__file__).read_text(encoding="utf-8").splitlines(keepends=True)
    texts = [PROBE, "e\u0301 \u212b \ufb01 1000000000", *(line for line in code if "<" not in line)]
    expected = [ids.tolist() for ids in tokenizer.encode_batch(texts)]
    openers: dict[str, Any] = {
        "AutoTokenizer": AutoTokenizer,
        "PreTrainedTokenizerFast": PreTrainedTokenizerFast,
    }
    for name, opener in openers.items():
        opened = opener.from_pretrained(folder)
        if opened(texts, add_special_tokens=False)["input_ids"] == expected:
            return name, opened.pad_token_id
    raise RuntimeError(f"no class of transformers gives the ids of {folder}'s tokenizer: nothing was written")


def compare_logits(ours: Path, exported: Path, vocab_size: int) -> dict[str, float]:
    """Compare both checkpoints on the same two random sequences in fp32.

    Ours runs by eager attention, the export by SDPA, as other programs open it. Returns {"difference":
    largest |difference|, "largest": largest |logit|}, without the padding of the vocabulary."""
    logits = []
    for folder, attention in ((ours, "eager"), (exported, "sdpa")):
        model: Any = load_model(str(folder), attention=attention)  # one at a time in memory
        length = min(getattr(model.config, "max_position_embeddings", 512), 512)
        ids = torch.randint(0, vocab_size, (2, length), generator=make_generator("export")).to(model.device)
        with torch.no_grad():
            logits.append(model(ids, use_cache=False).logits[..., :vocab_size].float().cpu())  # (2, T, V)
        del model
    return {"difference": float((logits[1] - logits[0]).abs().max()), "largest": float(logits[0].abs().max())}
