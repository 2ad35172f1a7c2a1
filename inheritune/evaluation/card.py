"""The model card of an export: README.md with the head that the Hub reads, from the run's own JSON files."""

import json
from pathlib import Path
from typing import Any

import yaml

from inheritune.config.reading import read_yaml
from inheritune.files.escape import escape_markdown
from inheritune.files.json_files import read_json
from inheritune.files.markers import INHERITED
from inheritune.files.rundir import RunDir

SCALED = "scale_attn_by_inverse_layer_idx"
"""Key of GPT-2's config for the scaling of attention logits by layer."""
KNOWN_LICENCES = yaml.safe_load((Path(__file__).parent / "licences.yaml").read_text(encoding="utf-8"))
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
"""How to use the model, by the class that opens its tokenizer with the run's ids."""

CARD = """---
{head}
---

# {name}

{rehearsal}A language model of {layers} layers and {parameters:,.2f}M parameters, made with
Inheritune ([arXiv 2404.08634](https://arxiv.org/abs/2404.08634)): {title}.
{lineage}
- Data: {data_name}{revision}, tokenizer {tokenizer}, sequences of {sequence_length} tokens
- Training: {steps:,} steps of {batch_tokens:,} tokens, {tokens:,} in all, {precision}
- Code: commit {commit}, {versions}

## Evaluation

- Validation loss: {loss} nats per token, {windows} windows of {data_name}{against}

Intervals are 95% over validation windows; they do not cover the choice of seeds.

## Use

```python
{snippet}```

Weights are {dtype}: {scaling}vocabulary as the tokenizer's. On two random sequences, computed in fp32, logits differ from the
trained weights' by at most {difference:.1e} (the largest logit is {largest:.1f}).

## Licences
{model_licences}
- data, {data_name}: {data_licence}

As far as known, without warranty; choose the licence of this model in their light before publishing it.
"""  # noqa: E501 - the text is written as it stands

REHEARSAL = "**REHEARSAL: every size was shrunk to try the code; this is no result.**\n\n"
SCALING = "W_Q / (layer + 1) in place of the scaling of attention logits by layer, "


def format_card(
    run: RunDir, described: dict, name: str, dtype: str, compared: dict[str, float], opener: str
) -> str:
    """Return README.md of the export `name`: a YAML head for the Hub, and what the model is.

    `described` is the run's experiment.yaml, `compared` what `compare_logits` returned, `opener` a key of
    SNIPPETS."""
    results, start = run.read_results(), run.read_starts("versions", "git_commit")[-1]
    data, train, lineage = described["data"], described["train"], list_parents(run)
    parents = [parent for parent in lineage.values() if parent]
    licences = {parent: KNOWN_LICENCES["models"].get(parent, "unknown") for parent in parents}
    data_name = data["repo"] or (data["source"] if data["source"] == "embedded" else data["name"])
    return CARD.format(
        head=yaml.safe_dump(_make_head(described, parents, licences), sort_keys=False).strip(),
        name=escape_markdown(name),
        rehearsal=REHEARSAL if described["rehearsal"] else "",
        layers=results["layers"],
        parameters=results["parameters"] / 1e6,
        title=format_run_title(described),
        lineage=_format_lineage(lineage, described),
        data_name=data_name,
        revision=f" at revision {data['revision']}" if data["revision"] else "",
        tokenizer=escape_markdown(data["tokenizer"]),
        sequence_length=data["sequence_length"],
        steps=results["steps"],
        batch_tokens=train["batch_tokens"],
        tokens=results["tokens"],
        precision=train["precision"],
        commit=start["git_commit"] or "unknown",
        versions=", ".join(f"{library} {version}" for library, version in start["versions"].items()),
        loss=_format_interval(results["validation"], ".4f"),
        windows=results["validation"]["n"],
        against=_format_difference(results),
        snippet=SNIPPETS[opener].format(name=json.dumps(name)),
        dtype=dtype,
        scaling=SCALING if has_layer_scaling(run) else "",
        difference=compared["difference"],
        largest=compared["largest"],
        model_licences="".join(f"\n- {parent}: {licence}" for parent, licence in licences.items()),
        data_licence=KNOWN_LICENCES["data"].get(data_name, "unknown"),
    )


def _make_head(described: dict, parents: list[str], licences: dict[str, str]) -> dict[str, Any]:
    """Return the YAML head, as the Hub reads it; a licence only if that of all parents is known."""
    head: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    head["tags"] = ["inheritune", "rehearsal"] if described["rehearsal"] else ["inheritune"]
    if parents:
        head["base_model"] = parents
    if repo := described["data"]["repo"]:
        head["datasets"] = [repo]
    known = set(licences.values()) - {"unknown"}
    if len(known) == 1:
        head["license"] = known.pop().split()[0]
    return head


def list_parents(run: RunDir) -> dict[str, str | None]:
    """Return {description: Hub id or None} of all that the run's first weights were copied from, the nearest
    first."""
    if not (run.init / INHERITED).is_file():
        return {}
    manifest = read_json(run.init / INHERITED)
    found: dict[str, str | None] = {}
    at_half = " at half width" if manifest["kind"] == "half_width" else ""
    layers = _format_layers([layer for layer in manifest["layers"] if layer is not None])
    copied = f"layers {layers} (from 0){at_half}"
    for origin in [manifest] if "source" in manifest else [manifest["previous"], manifest["reference"]]:
        name, revision = origin["source"], origin["revision"]
        parent = RunDir(Path(name).parent)
        if revision:
            found[f"[{name}](https://huggingface.co/{name}) at revision {revision}, {copied}"] = name
        elif parent.experiment.is_file():
            found[f"{format_run_title(read_yaml(parent.experiment))}, {copied}"] = None
            found |= list_parents(parent)
        else:  # the rest of the path says nothing on another machine
            found[f"the local checkpoint '{escape_markdown(Path(name).name)}', {copied}"] = None
    return found


def _format_lineage(lineage: dict[str, str | None], described: dict) -> str:
    lines = "".join(f"\n- Parent: {parent}" for parent in lineage) or "\n- Parent: none, a random start"
    teacher = (described["run"].get("distil") or {}).get("teacher")
    if teacher:
        shown = escape_markdown(Path(teacher).name if Path(teacher).is_absolute() else teacher)
        lines += f"\n- Teacher (logits): '{shown}'"
    return lines


def format_run_title(described: dict) -> str:
    """Return run, stage, experiment and seed of an experiment.yaml in a few words."""
    stage = f" stage {described['stage']}" if described["stage"] else ""
    experiment = escape_markdown(described["experiment"])
    return f"run '{described['run_name']}'{stage} of experiment {experiment} (seed {described['seed']})"


def has_layer_scaling(run: RunDir) -> bool:
    """Return whether the run's model scales attention logits by layer."""
    return bool(read_json(run.final / "config.json").get(SCALED))


def _format_layers(layers: list[int]) -> str:
    """Return e.g. '0 to 11' or '0, 2, 4'."""
    if len(layers) > 1 and layers == list(range(layers[0], layers[-1] + 1)):
        return f"{layers[0]} to {layers[-1]}"
    return ", ".join(map(str, layers))


def _format_difference(results: dict) -> str:
    gap = results.get("difference")
    if not gap:
        return ""
    shown = _format_interval(gap, "+.4f")
    return f"\n- Difference to run '{results['compared_with']}': {shown}, paired by window"


def _format_interval(value: dict[str, float], form: str) -> str:
    return f"{value['mean']:{form}} ({value['low']:{form}} to {value['high']:{form}})"
