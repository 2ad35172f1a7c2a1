"""`init`: write the experiment of a pretrained model and some text, fitted to the data and to this machine.

The reference is the model itself. Its first layers are grown against it, and compared with a random start of
the same size, with the same layers distilled, and with as many layers chosen by each rule.
"""

import json
import os
import re
import shlex
from collections import Counter
from pathlib import Path
from typing import Any

from inheritune.config import names
from inheritune.config.experiment import Experiment
from inheritune.config.layers import AUTO, RULES
from inheritune.config.problems import parse_section
from inheritune.config.reading import read_text
from inheritune.config.schema import format_schema
from inheritune.config.sections import Data
from inheritune.config.source_shape import find_config, read_shape
from inheritune.config.units import format_memory
from inheritune.data.documents import Corpus, UnusableDocument, batch_documents, extract_text
from inheritune.data.tokenizer_files import check_embedding
from inheritune.data.tokenizer_loading import load_tokenizer
from inheritune.errors import UserError
from inheritune.files.outputs import check_new_file, resolve_output
from inheritune.files.rundir import get_seed_dir
from inheritune.files.writing import write_text
from inheritune.models.sizes import list_parameters
from inheritune.models.sources import open_source
from inheritune.planning.draft_file import WRITTEN_BY, format_file
from inheritune.planning.draft_sizes import Sizes, Text, choose_depths, choose_sizes
from inheritune.planning.machine import Fit, Machine, find_machine, fit_settings

MOST_READ = 32 << 20
"""Bytes of text that are looked at; more of it changes no number below."""
SAMPLE = 1 << 20
"""Bytes of text that are encoded, to estimate the tokens."""


def draft(model: str, text: str, out: str, revision: str | None = None, steps: int | None = None) -> str:
    """Write the experiment to `out`; returns what to do next.

    `model`: a folder, GGUF file or Hub id; `text`: a glob of documents; `steps`: of each run, in place of
    what fits. A file that this command wrote is kept. Raises UserError, with nothing written, if one of them
    cannot be used, or if another `out` exists."""
    command = f"python -m inheritune init --model {shlex.quote(model)} --text {shlex.quote(text)}"
    command += f" --revision {shlex.quote(revision)}" if revision else ""
    command += f" --steps {steps}" if steps is not None else ""
    if _was_written_by(command, resolve_output(out)):
        return f"{out} is kept: this command wrote it"
    path = _check_out(out)
    check_absent(schema := path.with_name(f"{path.stem}.schema.json"))
    pattern = os.path.abspath(os.path.expanduser(os.path.expandvars(text)))
    _check_files(_describe_data(path.stem, pattern, model), text)  # before the weights are opened
    source = open_source(model, revision)
    name = source.origin if source.revision else str(source.config_path.parent.absolute())
    pinned = {"revision": source.revision} if source.revision else {}
    shape = read_shape(find_config(name, source.revision))
    if shape["layers"] < 2:
        raise UserError(f"{name} has one layer, so there is nothing to cut")
    check_embedding(source.config_path.parent, shape["vocab_size"])
    data = _describe_data(path.stem, pattern, name, source.revision)
    found = read_text_sizes(data)
    machine = find_machine()
    sizes = choose_sizes(found, shape["positions"], machine, steps)
    raw = _describe_experiment(data, name, pinned, shape["layers"], sizes, machine)
    experiment = parse_section(Experiment, {**raw, "name": path.stem}, str(path))
    fit = _fit(experiment, machine)  # a model that does not fit here may fit elsewhere, as `plan` says
    settings = path.with_name(f"{path.stem}.ds.json")
    if fit.settings:
        check_absent(settings)
        raw["train"]["deepspeed"] = str(settings)
        write_text(settings, json.dumps(fit.settings, indent=2) + "\n")
    write_text(schema, format_schema())
    memory = f"{format_memory(fit.peak)} at the peak, as planned, on {machine.describe()}"
    memory += "" if fit.fits else ": too much"
    write_text(path, format_file(raw, shape, command, found, sizes, memory, out, schema.name))
    return _describe_next(out, found, sizes, machine, fit)


def _was_written_by(command: str, path: Path) -> bool:
    """Return whether the head of the file at `path` says that `command` wrote it, whatever was edited."""
    try:
        return path.is_file() and f"{WRITTEN_BY}{command}" in read_text(path).splitlines()[:5]
    except UserError:  # no text
        return False


def _check_out(out: str) -> Path:
    """Return the path to write. Raises UserError if it exists, is no YAML or has the name of other runs."""
    path = resolve_output(out)
    if path.suffix not in (".yaml", ".yml"):
        raise UserError(f"init: --out is the file of an experiment, NAME.yaml (got '{out}')")
    if path.exists():
        raise UserError(f"{path} exists and is left as it is; give another --out, or delete it")
    if problem := names.find_experiment_problem(path.stem):
        raise UserError(f"init: --out: '{names.format_name(path.stem)}' {problem}")
    check_new_file(path)
    if (runs := get_seed_dir(path.stem, 0, False).parent).exists():
        raise UserError(f"{runs} holds runs of another experiment of that name; give another --out")
    return path


def check_absent(path: Path) -> None:
    """Raise UserError if `path`, a file that is written beside the experiment, exists."""
    if path.exists():
        raise UserError(f"{path} exists and is left as it is; give another --out, or delete it")


# --- the text -----------------------------------------------------------------------------------------------


def _describe_data(stem: str, pattern: str, tokenizer: str, revision: str | None = None) -> Data:
    """Return the data section, but for what is fitted."""
    described = {
        "name": re.sub(r"[^A-Za-z0-9_.-]", "_", stem).lstrip(".") or "text",
        "source": "files",
        "files": [pattern],
        "tokenizer": tokenizer,
        "tokenizer_revision": revision,
        "validation": {"fraction": 0.1},
        "sequence_length": 1,
        "sampling": "random_windows",
    }
    return Data.model_validate(described)


def _check_files(data: Data, given: str) -> None:
    """Raise UserError if the pattern `given` matches no file, or one of a kind that is not read."""
    try:
        Corpus(data, Path())
    except UserError as error:
        raise UserError(f"init: --text '{given}': {str(error).removeprefix('data.files: ')}") from None


def read_text_sizes(data: Data) -> Text:
    """Return how much text the documents hold, of at most MOST_READ bytes.

    Raises UserError if none of them can be used, and if there is no such tokenizer."""
    tokenizer, corpus = load_tokenizer(data), Corpus(data, Path())
    n_bytes = n_documents = sampled = sample_tokens = 0
    is_whole = True
    defects: Counter[str] = Counter()
    for batch in batch_documents(corpus, "", (0, 0), SAMPLE):
        for raw in batch.raws:
            try:
                document = extract_text(batch.kind, raw, data.text_key)
            except UnusableDocument as defect:
                defects[str(defect)] += 1
                continue
            n_documents += 1
            n_bytes += len(document.encode())
            if sampled < SAMPLE:
                part = document[:SAMPLE]
                sampled += len(part.encode())
                sample_tokens += len(tokenizer.encode_batch([part])[0]) + 1
        if n_bytes >= MOST_READ:
            is_whole = False
            break
    if not n_documents:
        why = defects.most_common(1)[0][0] if defects else "no document"
        raise UserError(f"{', '.join(data.files)}: no document can be used ({why}); give other files")
    tokens = max(sample_tokens, round(n_bytes * sample_tokens / max(1, sampled)))
    return Text(n_documents, tokens, is_whole)


# --- fitting ------------------------------------------------------------------------------------------------


def _fit(experiment: Experiment, machine: Machine) -> Fit:
    """Return the DeepSpeed settings under which the largest runs fit into the machine."""
    model, train = experiment.model, experiment.train
    n, _, most = choose_depths(model.layers)
    teacher = sum(p.numel for p in list_parameters(model, model.layers))
    if train.precision == "auto" and not machine.gpus:
        train = train.model_copy(update={"precision": "fp32"})
    models = [(model, most, 0), (model, n, teacher)]
    return fit_settings(machine, machine.json, models, train, experiment.data.sequence_length)


# --- the file -----------------------------------------------------------------------------------------------


def _describe_experiment(
    data: Data, source: str, pinned: dict, layers: int, sizes: Sizes, machine: Machine
) -> dict[str, Any]:
    """Return the experiment as a mapping."""
    n, by, most = choose_depths(layers)
    start = {"source": source, **pinned}
    first = {"inherit": {**start, "layers": f"0:{n}"}}
    final = max(2, min(sizes.windows, 4096 if machine.gpus else 400))
    steps = sizes.steps
    return {
        "about": f"The first layers of {source}, grown against the model itself.",
        "paper": [
            {"run": "reference", "label": "the model"},
            {"run": "inheritune", "label": "first layers"},
            {"run": "random", "label": "random start"},
            {"run": "distilled", "label": "first layers, distilled"},
            {"run": "cost", "label": "layers by cost"},
            {"run": "influence", "label": "layers by influence"},
            {"run": "window", "label": "all but a window"},
        ],
        "data": {
            **data.model_dump(include={"name", "source", "files", "tokenizer"}),
            **({"tokenizer_revision": data.tokenizer_revision} if data.tokenizer_revision else {}),
            **sizes.split,
            "sequence_length": sizes.length,
            "sampling": data.sampling,
        },
        "model": {"from": source, **pinned},
        "train": {
            "steps": steps,
            "batch_tokens": sizes.sequences * sizes.length,
            "lr": 3.0e-4,
            "min_lr": 3.0e-5,
            "warmup_steps": max(1, steps // 10),
            "deepspeed": machine.json,
            "eval_every": max(1, steps // 10),
            "eval_windows": min(final, 100),
            "final_windows": final,
            "log_every": max(1, steps // 50),
            "checkpoint_every": max(1, steps // 4),
        },
        "runs": {
            "reference": {"init": {"external": start}},
            "inheritune": {"init": first, "compare": "reference", "grow": {"by": by, "max_layers": most}},
            "random": {"init": "random", "layers": n, "compare": "reference"},
            "distilled": {
                "init": first,
                "compare": "reference",
                "distil": {"teacher": source, **pinned},
            },
            **{
                rule: {
                    "init": {"inherit": {**start, "layers": f"{AUTO}{n}:{rule}"}},
                    "compare": "reference",
                }
                for rule in RULES
            },
        },
    }


def _describe_next(out: str, text: Text, sizes: Sizes, machine: Machine, fit: Fit) -> str:
    """Return what was written, and the commands that come next."""
    name = shlex.quote(out)
    lines = [
        f"wrote {out}: {text.documents:,} document(s), {text.describe_tokens()}; {sizes.steps:,} steps "
        f"of {sizes.sequences} sequences of {sizes.length}, for {machine.describe()}",
    ]
    if not fit.fits:
        lines.append(
            f"these runs need {format_memory(fit.peak)}, more than there is: plan says what fits elsewhere"
        )
    following = (f"check {name}", f"prepare {name}", f"grow {name} --run inheritune", f"table {name}")
    lines += ["next:", *(f"    python -m inheritune {words}" for words in following)]
    return "\n".join(lines)
