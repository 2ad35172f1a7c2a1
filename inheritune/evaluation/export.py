"""`export FOLDER --to D`: a finished run as a checkpoint for the world outside, with tokenizer and model
card.

A run keeps the paper's parameterization, which few programs know: transformers 4 with SDPA ignores
`scale_attn_by_inverse_layer_idx` without a word, vLLM refuses it. Here the scaling by layer goes into the
query weights (W_Q / (layer + 1), flag off) and the rows that pad the vocabulary are cut off. The folder
appears under its name only after the logits of the two were compared.
"""

import copy
import json
import shlex
from pathlib import Path

import torch
import yaml

from inheritune.analysis.attention import load_model
from inheritune.config.experiment import Data, read_yaml
from inheritune.data.tokenizer_files import copy_tokenizer
from inheritune.data.tokens import PROBE, Tokenizer, load_tokenizer
from inheritune.errors import UserError, nearest
from inheritune.files.escape import markdown
from inheritune.files.outputs import check_new_folder, resolve_output
from inheritune.files.rundir import RunDir, read_json, replacing, write_json, write_text
from inheritune.models.architectures import seeded, tensor_shapes
from inheritune.models.config_files import SPECIAL_IDS
from inheritune.models.sources import Source, open_source
from inheritune.models.surgery import MANIFEST
from inheritune.models.writer import write_checkpoint

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOLERANCE = {"fp32": 1e-5, "bf16": 0.05}
"""Largest difference of a logit, as a share of the largest logit where that is above 1. bf16 has 8 bits for a
number: its bound only finds a broken export, and the card tells the difference."""
SCALED = "scale_attn_by_inverse_layer_idx"
LICENCES = yaml.safe_load((Path(__file__).parent / "licences.yaml").read_text(encoding="utf-8"))


def export(folder: str, to: str, dtype: str | None = None) -> None:
    """Write the finished run in `folder` (a grown run: the stage that its DONE names) to the new folder `to`,
    in `dtype` (fp32 or bf16; default: that of the model which the run started from).

    Raises UserError for an unfinished or damaged run, one without a tokenizer, an unknown dtype and a `to`
    that holds something or cannot be written; then nothing is written."""
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"export: unknown dtype '{dtype}'; {nearest(dtype, DTYPES)}")
    out, run = resolve_output(to), finished(RunDir(folder))
    check_new_folder(out)
    if not any((run.final / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        raise UserError(
            f"{run.final} holds no tokenizer (tokenizer.json or tokenizer.model); copy the files of the "
            f"prepared data's "
            f"tokenizer/ into it, and export again"
        )
    dtype = dtype or stated_dtype(run)
    described = read_yaml(run.experiment)
    tokenizer = load_tokenizer(Data.model_validate(described["data"]), run.final)
    source = open_source(run.final)
    config = outside_config(source.config, tokenizer.vocab_size, tokenizer.end_of_text)
    specs = {name: (shape, DTYPES[dtype]) for name, shape in tensor_shapes(config).items()}
    with replacing(out) as temporary:
        temporary.mkdir()
        write_checkpoint(
            temporary, config, specs, lambda name: outside_tensor(source, config, name).to(DTYPES[dtype])
        )
        copy_tokenizer(run.final, temporary, trained=True)
        opener, pad_token_id = open_as_others(temporary, tokenizer)
        settings = outside_settings(run, config, tokenizer, pad_token_id)
        write_json(temporary / "generation_config.json", settings, seal=False)
        compared = compare_logits(run.final, temporary, config.vocab_size)
        if not compared["difference"] <= TOLERANCE[dtype] * max(1.0, compared["largest"]):
            raise RuntimeError(
                f"the export of {run.final} computes other logits ({compared}): nothing was written"
            )
        write_text(temporary / "README.md", model_card(run, described, out.name, dtype, compared, opener))
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


def stated_dtype(run: RunDir) -> str:
    """The dtype of the model that the run started from, where an export can have it; else fp32, that of the
    run."""
    config = run.init / "config.json"
    described = read_json(config) if config.is_file() else {}
    stated = described.get("dtype") or described.get("torch_dtype")
    return next((name for name, dtype in DTYPES.items() if str(dtype) == f"torch.{stated}"), "fp32")


def finished(run: RunDir) -> RunDir:
    """The run or stage whose final/ is meant by a run's folder. Raises UserError if there is none."""
    if not run.is_done():
        if RunDir(run.path.parent).is_done() and run.path.name == "final":
            raise UserError(
                f"{run.path} holds the weights of a run; give the run's folder, {run.path.parent}"
            )
        what = "is not finished (no DONE)" if run.experiment.is_file() or run.stages() else "is no run folder"
        raise UserError(f"{run.path} {what}; export takes runs/<experiment>/seed<k>/<run> of a finished run")
    return run.chosen()


def outside_config(config, vocab_size: int, end_of_text: int):
    """`config` for other programs: standard scaling, the tokenizer's vocabulary, and the `special_ids` of a
    text (in our training `end_of_text` lies between any two texts). Biases held at zero keep their mark,
    which others ignore."""
    config = copy.deepcopy(config)
    if getattr(config, SCALED, False):
        setattr(config, SCALED, False)
    config.vocab_size, config.use_cache = vocab_size, True
    ids = special_ids({key: getattr(config, key, None) for key in SPECIAL_IDS}, vocab_size, end_of_text)
    for key in SPECIAL_IDS:
        setattr(config, key, ids[key])
    return config


def special_ids(stated: dict, vocab_size: int, end_of_text: int) -> dict:
    """{bos, eos and pad_token_id: id} of a trained model, from those that are `stated` for the model it
    started from.

    Where that one ends a text otherwise than the run's data do, its ids are of another tokenizer: then
    `end_of_text` begins and ends a text, and nothing pads it."""
    known = {key: _below(vocab_size, stated.get(key)) for key in SPECIAL_IDS}
    ends = known["eos_token_id"]
    if end_of_text not in (ends if isinstance(ends, list) else [ends]):
        known = {"eos_token_id": end_of_text, "bos_token_id": None, "pad_token_id": None}
    if known["bos_token_id"] is None:
        known["bos_token_id"] = end_of_text
    return known


def _below(vocab_size: int, ids: int | list[int] | None) -> int | list[int] | None:
    """An id, or those of a list, below `vocab_size`; None where there is none."""
    if isinstance(ids, list):
        return [number for number in ids if number < vocab_size] or None
    return ids if ids is not None and ids < vocab_size else None


def outside_tensor(source: Source, config, name: str) -> torch.Tensor:
    """Tensor `name` of the outside form `config` of `source`, in the source's dtype."""
    tensor, inside = source.tensor(name), source.table.split_name(name)
    if inside is None:
        of_vocabulary = source.table.parts["token_embedding"] + source.table.parts["head"]
        is_padded = name in of_vocabulary and tensor.shape[0] == source.config.vocab_size
        return tensor[: config.vocab_size] if is_padded else tensor
    if getattr(source.config, SCALED, False) and inside[1] in ("attn.c_attn.weight", "attn.c_attn.bias"):
        # GPT-2, the one family with this flag: inputs x outputs, the first `hidden_size` outputs are the
        # queries
        tensor[..., : source.config.hidden_size] /= inside[0] + 1
    return tensor


def outside_settings(run: RunDir, config, tokenizer: Tokenizer, pad_token_id: int | None) -> dict:
    """generation_config.json of the outside form `config`: the settings of the model that the run started
    from, and which ids begin, end and pad a text (`pad_token_id` is the tokenizer's own)."""
    kept = [
        folder / "generation_config.json" for folder in (run.final, run.init)
    ]  # older runs have it in init/ only
    stated = next((read_json(path) for path in kept if path.is_file()), {})
    ids = {key: stated.get(key, getattr(config, key, None)) for key in SPECIAL_IDS}
    ids = special_ids(ids, config.vocab_size, tokenizer.end_of_text)
    if ids["pad_token_id"] is None:
        ids["pad_token_id"] = tokenizer.end_of_text if pad_token_id is None else pad_token_id
    return stated | ids


def open_as_others(folder: Path, tokenizer: Tokenizer) -> tuple[str, int | None]:
    """(class, id of its padding token) by which others open the tokenizer in `folder` with the ids of
    `tokenizer`.

    transformers 5 has AutoTokenizer take a class of its own for a few families (Qwen2Tokenizer), whatever the
    folder states."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if not (folder / "tokenizer.json").is_file():  # tokens.py found no counterpart that gives its ids
        return "sentencepiece", None
    code = Path(__file__).read_text(encoding="utf-8").splitlines(keepends=True)
    texts = [PROBE, "e\u0301 \u212b \ufb01 1000000000", *(line for line in code if "<" not in line)]
    expected = [ids.tolist() for ids in tokenizer.encode_batch(texts)]
    for name, kind in {
        "AutoTokenizer": AutoTokenizer,
        "PreTrainedTokenizerFast": PreTrainedTokenizerFast,
    }.items():
        opened = kind.from_pretrained(folder)
        if opened(texts, add_special_tokens=False)["input_ids"] == expected:
            return name, opened.pad_token_id
    raise RuntimeError(f"no class of transformers gives the ids of {folder}'s tokenizer: nothing was written")


def compare_logits(ours: Path, exported: Path, vocab_size: int) -> dict:
    """Both checkpoints on the same two random sequences in fp32, ours by eager attention and the export by
    SDPA, as others open it.  -> {"difference": largest |difference|, "largest": largest |logit|}, without the
    padding of the vocabulary"""
    logits = []
    for folder, attention in ((ours, "eager"), (exported, "sdpa")):
        model = load_model(str(folder), attention=attention)  # one at a time in memory
        length = min(getattr(model.config, "max_position_embeddings", 512), 512)
        ids = torch.randint(0, vocab_size, (2, length), generator=seeded("export")).to(model.device)
        with torch.no_grad():
            logits.append(model(ids, use_cache=False).logits[..., :vocab_size].float().cpu())  # (2, T, V)
        del model
    return {"difference": float((logits[1] - logits[0]).abs().max()), "largest": float(logits[0].abs().max())}


# --- the model card -----------------------------------------------------------------------------------------


def parents(run: RunDir) -> dict[str, str | None]:
    """{description: Hub id or None} of all that the run's first weights were copied from, the nearest
    first."""
    if not (run.init / MANIFEST).is_file():
        return {}
    manifest, found = read_json(run.init / MANIFEST), {}
    at_half = " at half width" * (manifest["kind"] == "half_width")
    copied = (
        f"layers {_ranges([layer for layer in manifest['layers'] if layer is not None])} (from 0){at_half}"
    )
    for origin in [manifest] if "source" in manifest else [manifest["previous"], manifest["reference"]]:
        name, parent = origin["source"], RunDir(Path(origin["source"]).parent)
        if origin["revision"]:
            found[f"[{name}](https://huggingface.co/{name}) at revision {origin['revision']}, {copied}"] = (
                name
            )
        elif parent.experiment.is_file():
            described = read_yaml(parent.experiment)
            found[f"{_title(described)}, {copied}"] = None
            found |= parents(parent)
        else:  # the path is this machine's own affair
            found[f"the local checkpoint '{markdown(Path(name).name)}', {copied}"] = None
    return found


def _title(described: dict) -> str:
    stage = f" stage {described['stage']}" if described["stage"] else ""
    experiment = markdown(described["experiment"])
    return f"run '{described['run_name']}'{stage} of experiment {experiment} (seed {described['seed']})"


def _ranges(layers: list[int]) -> str:
    """E.g. '0 to 11' or '0, 2, 4'."""
    if len(layers) > 1 and layers == list(range(layers[0], layers[-1] + 1)):
        return f"{layers[0]} to {layers[-1]}"
    return ", ".join(map(str, layers))


SNIPPETS = {
    "AutoTokenizer": """from transformers import AutoModelForCausalLM, AutoTokenizer

folder = {name}
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
prompt = tokenizer("The", return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=20)[0]))
""",
    "sentencepiece": """import torch
from sentencepiece import SentencePieceProcessor
from transformers import AutoModelForCausalLM

folder = {name}
tokenizer = SentencePieceProcessor(model_file=folder + "/tokenizer.model")
model = AutoModelForCausalLM.from_pretrained(folder)
prompt = torch.tensor([tokenizer.encode("The")])
print(tokenizer.decode(model.generate(prompt, max_new_tokens=20)[0].tolist()))
""",
}
SNIPPETS["PreTrainedTokenizerFast"] = SNIPPETS["AutoTokenizer"].replace(
    "AutoTokenizer", "PreTrainedTokenizerFast"
)
"""The card's use of a model, by the class that opens its tokenizer with the run's ids."""


def model_card(run: RunDir, described: dict, name: str, dtype: str, compared: dict, opener: str) -> str:
    """README.md of the export: a YAML head as the Hub reads it, and what the model is, from the run's own
    JSON."""
    results, start = run.read_results(), run.read_starts("versions", "git_commit")[-1]
    data, train, lineage = described["data"], described["train"], parents(run)
    hub = [parent for parent in lineage.values() if parent]
    licences = {parent: LICENCES["models"].get(parent, "unknown") for parent in hub}
    data_name = data["repo"] or (data["source"] if data["source"] == "embedded" else data["name"])
    head = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["inheritune"]}
    head["tags"] += ["rehearsal"] * described["rehearsal"]
    head |= {"base_model": hub} if hub else {}
    head |= {"datasets": [data["repo"]]} if data["repo"] else {}
    known = set(licences.values()) - {"unknown"}
    head |= {"license": known.pop().split()[0]} if len(known) == 1 else {}
    rehearsal = (
        "**REHEARSAL: every size was shrunk to try the code; this is no result.**\n\n"
        if described["rehearsal"]
        else ""
    )
    loss, gap = results["validation"], results.get("difference")
    against = (
        f"\n- Difference to run '{results['compared_with']}': {_interval(gap, '+.4f')}, paired by window"
        if gap
        else ""
    )
    versions = ", ".join(f"{library} {version}" for library, version in start["versions"].items())
    revision = f" at revision {data['revision']}" if data["revision"] else ""
    copied = "".join(f"\n- Parent: {parent}" for parent in lineage) or "\n- Parent: none, a random start"
    if teacher := (described["run"].get("distil") or {}).get("teacher"):  # of a path only the name
        shown = markdown(Path(teacher).name if Path(teacher).is_absolute() else teacher)
        copied += f"\n- Teacher (logits): '{shown}'"
    of_models = "".join(f"\n- {parent}: {licence}" for parent, licence in licences.items())
    by = "W_Q / (layer + 1) in place of the scaling of attention logits by layer, " if run_scales(run) else ""
    return f"""---
{yaml.safe_dump(head, sort_keys=False).strip()}
---

# {markdown(name)}

{rehearsal}A language model of {results["layers"]} layers and {results["parameters"] / 1e6:,.2f}M parameters, made with
Inheritune ([arXiv 2404.08634](https://arxiv.org/abs/2404.08634)): {_title(described)}.
{copied}
- Data: {data_name}{revision}, tokenizer {markdown(data["tokenizer"])}, sequences of {data["sequence_length"]} tokens
- Training: {results["steps"]:,} steps of {train["batch_tokens"]:,} tokens, {results["tokens"]:,} in all, {train["precision"]}
- Code: commit {start["git_commit"] or "unknown"}, {versions}

## Evaluation

- Validation loss: {_interval(loss, ".4f")} nats per token, {loss["n"]} windows of {data_name}{against}

Intervals are 95% over validation windows; they do not cover the choice of seeds.

## Use

```python
{SNIPPETS[opener].format(name=json.dumps(name))}```

Weights are {dtype}: {by}vocabulary as the tokenizer's. On two random sequences, computed in fp32, logits differ from the
trained weights' by at most {compared["difference"]:.1e} (the largest logit is {compared["largest"]:.1f}).

## Licences
{of_models}
- data, {data_name}: {LICENCES["data"].get(data_name, "unknown")}

As far as known, without warranty; choose the licence of this model in their light before publishing it.
"""  # noqa: E501 - the text is written as it stands


def run_scales(run: RunDir) -> bool:
    """Whether the run's own form scales attention logits by layer."""
    return bool(read_json(run.final / "config.json").get(SCALED))


def _interval(value: dict, form: str) -> str:
    return f"{value['mean']:{form}} ({value['low']:{form}} to {value['high']:{form}})"
