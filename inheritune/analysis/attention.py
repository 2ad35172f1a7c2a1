"""Attention measures of the paper (FACTS section 3): approximate rank and column mass of every head, lazy
layers.

    python -m inheritune analyze --model runs/quickstart/seed0/reference/final --data quickstart

The model reads N seeded windows of T validation tokens (causal, no BOS added); every layer's maps are
measured the moment they are made and then dropped, so one layer's attention is in memory at a time. The
numbers go to attention.jsonl, one row each: `header`, `layer` (counted from 0), `group`, `map`, `summary`.
figures.plot_attention draws them, counting from 1.

Legend of suffixes: N = sequences, B = sequences of one batch, H = heads, T = tokens, F = fractions (tau or
eta), M = matrices.
"""

from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from inheritune.config import names
from inheritune.config.experiment import RECIPES, Experiment, load_experiment, read_yaml
from inheritune.data.batches import Tokens
from inheritune.errors import UserError
from inheritune.files.outputs import check_writable, resolve_output
from inheritune.files.rundir import (
    RunDir,
    beside,
    check_own,
    finished_weights,
    is_sealed,
    parse_weights_name,
    root,
    write_jsonl,
)
from inheritune.models.architectures import hf_config
from inheritune.models.surgery import write_random
from inheritune.runtime.dist import device, limit_error

TAUS = (0.80, 0.85, 0.90, 0.95)
"""Shares of the squared singular values; the paper uses 0.90 and ablates the others (its Figure 10)."""
ETAS = (0.90,)
"""Share of the squared Frobenius norm for the column mass."""
MAIN = "0.9"
"""Key of the tau and eta that decide laziness."""
NEAR_ONE = 1.5
"""A mean rank below this is 'near 1': what looks like 1 in the paper's plots. It decides nothing, and is only
counted."""
MAP_TOKENS, MAP_SEQUENCES = 40, 3  # the paper's Figures 9 and 12 show 40 tokens, mean of 3 strings


# --- the two measures ---------------------------------------------------------------------------------------


def approximate_rank(A_NHTT: torch.Tensor, taus=TAUS) -> torch.Tensor:
    """k*: the smallest k whose k largest squared singular values reach tau of their total (paper, section 2).

    (N, H, T, T) -> (F, N, H) int64. The squared singular values are the eigenvalues of A A^T, in float64:
    errors of about 1e-14 of the total, at a third of the cost of a decomposition of A."""
    A_NHTT = A_NHTT.detach().double()
    ascending_NHT = _eigenvalues((A_NHTT @ A_NHTT.mT).flatten(0, 1)).unflatten(0, A_NHTT.shape[:2])
    return _count_to_reach(ascending_NHT.flip(-1).clamp(min=0), taus)


def _eigenvalues(G_MTT: torch.Tensor) -> torch.Tensor:
    """Eigenvalues, ascending, of M symmetric matrices.  -> (M, T)

    On a CPU each core takes matrices of its own: LAPACK's threads inside one 100 x 100 matrix made this 10
    times slower on a busy machine."""
    cores = torch.get_num_threads()
    if G_MTT.is_cuda or cores == 1:
        return torch.linalg.eigvalsh(G_MTT)
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(cores) as pool:
            return torch.cat(list(pool.map(torch.linalg.eigvalsh, G_MTT.chunk(cores))))
    finally:
        torch.set_num_threads(cores)


def column_mass(A_NHTT: torch.Tensor, etas=ETAS) -> torch.Tensor:
    """m*: the smallest number of columns, largest first, whose squared L2 norms reach eta of the squared
    Frobenius norm.

    (N, H, T, T) -> (F, N, H) int64 (paper, section C)."""
    columns_NHT = A_NHTT.double().square().sum(dim=-2)
    return _count_to_reach(columns_NHT.sort(dim=-1, descending=True).values, etas)


def _count_to_reach(parts_NHT: torch.Tensor, fractions) -> torch.Tensor:
    """How many of the descending `parts` add up to each fraction of their sum.  -> (F, N, H)

    A sum that misses by 1e-9 of the total has reached it: 90 equal parts of 100 are 0.90, whatever float64
    makes of it."""
    sums_NHT = parts_NHT.cumsum(dim=-1)
    total_NH1 = sums_NHT[..., -1:]
    return torch.stack([(sums_NHT < (fraction - 1e-9) * total_NH1).sum(dim=-1) + 1 for fraction in fractions])


# --- attention maps of a model ------------------------------------------------------------------------------


def load_model(model: str, revision: str | None = None, attention: str = "eager") -> torch.nn.Module:
    """A Hugging Face causal LM (folder or Hub id) in fp32, on the GPU if there is one. `attention`:
    transformers' name.

    Raises UserError if it cannot be loaded; never runs code that comes with a model."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    if not Path(model).is_dir() and (model.count("/") != 1 or model.startswith((".", "/", "~"))):
        raise UserError(
            f"there is no model folder {model}; give a folder with config.json, or a Hub id such as "
            f"owner/name"
        )
    check_own(Path(model))
    try:
        loaded, report = AutoModelForCausalLM.from_pretrained(
            model,
            revision=revision or "main",
            attn_implementation=attention,
            dtype=torch.float32,
            trust_remote_code=False,
            output_loading_info=True,
        )
    # transformers and torch have many words for: not there, not a causal LM, needs its own code, cut off,
    # unsafe to unpickle
    except Exception as error:
        if limit_error(error):  # the machine's fault, not the model's
            raise
        raise UserError(
            f"model {model} cannot be loaded as a causal LM: {' '.join(str(error).split())[:300]}"
        ) from None
    if report["missing_keys"]:  # transformers would fill them with random numbers
        raise UserError(
            f"model {model} lacks the weights {', '.join(sorted(report['missing_keys'])[:3])}; restore the "
            f"checkpoint"
        )
    return loaded.eval().to(device())


@contextmanager
def watch_attention(model: torch.nn.Module, length: int, measure):
    """While the block runs, `measure(layer, A_BHTT)` is called with each layer's attention, in the order of
    the layers.

    The hook sits on every module and takes the (B, H, T, T) map out of the output of the innermost one that
    returns it, so it needs no table of families, and no map outlives its layer (output_attentions would keep
    all of them). Raises UserError if a map is not finite."""
    order: dict[torch.nn.Module, int] = {}

    def hook(module, arguments, output):
        if not isinstance(output, tuple):
            return None
        for place, value in enumerate(output):
            if not (torch.is_tensor(value) and value.dim() == 4 and value.shape[-2:] == (length, length)):
                continue
            layer = order.get(module, len(order))
            if not torch.isfinite(value).all():
                raise UserError(
                    f"the attention of layer {layer} (from 0) is not finite: the model's weights are damaged"
                )
            if value.min() < 0 or value.triu(1).any():  # keys or values whose head size happens to be T
                continue
            order[module] = layer
            measure(layer, value.detach())
            return (*output[:place], None, *output[place + 1 :])

    handles = [module.register_forward_hook(hook) for module in model.modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def read_windows(tokens: Tokens, n_sequences: int, length: int, seed: int) -> torch.Tensor:
    """The first `length` tokens of `n_sequences` windows, drawn by `seed` without overlap.  -> (N, T) int64

    Raises UserError if the text is too short."""
    available = tokens.n_tokens // length
    if n_sequences < 1 or length < 2:
        raise UserError(f"at least 1 sequence of at least 2 tokens is needed (got {n_sequences} of {length})")
    if n_sequences > available:
        raise UserError(
            f"{n_sequences} sequences of {length} tokens need {n_sequences * length} tokens, but the "
            f"validation text of "
            f"{tokens.folder} has {tokens.n_tokens}: use --sequences {available} or prepare more text"
        )
    starts = np.random.default_rng(seed).choice(available, size=n_sequences, replace=False) * length
    return torch.from_numpy(np.stack([tokens.read(int(start), length) for start in starts]))


def analyze(
    model: str,
    tokens: Tokens,
    n_sequences: int = 100,
    length: int = 100,
    seed: int = 0,
    maps: list[tuple[int, int]] | None = None,
    batch: int = 20,
    revision: str | None = None,
    progress: bool = False,
) -> list[dict]:
    """All rows of attention.jsonl for `model` (folder or Hub id) on `tokens` (the validation split).

    `maps` lists (layer, head) pairs, from 0, whose mean map is kept for drawing; the default is head 0 at
    four depths. Raises UserError if the text, the positions or the vocabulary do not fit, or if the model's
    attention is not to be had."""
    windows_NT = read_windows(tokens, n_sequences, length, seed)
    loaded = load_model(model, revision)
    config = loaded.config.get_text_config()
    if not hasattr(config, "num_attention_heads"):
        raise UserError(f"{model} ({config.model_type}) is not a transformer: it has no attention to analyze")
    n_layers, n_heads = config.num_hidden_layers, config.num_attention_heads
    if maps is None:
        maps = [(layer, 0) for layer in sorted({n_layers * twelfth // 12 for twelfth in (2, 4, 9, 11)})]
    maps = [tuple(pair) for pair in maps]
    _check_fit(model, config, tokens, length, maps)

    ranks, masses = defaultdict(list), defaultdict(list)  # layer -> one (F, B, H) per batch
    sums = dict.fromkeys(maps, 0.0)
    first = 0  # of the current batch

    def measure(layer, A_BHTT):
        ranks[layer].append(approximate_rank(A_BHTT).cpu())
        masses[layer].append(column_mass(A_BHTT).cpu())
        for head in (h for of_layer, h in sums if of_layer == layer):
            shown = A_BHTT[: max(0, MAP_SEQUENCES - first), head, :MAP_TOKENS, :MAP_TOKENS]
            sums[layer, head] = sums[layer, head] + shown.double().sum(dim=0).cpu().numpy()
        bar.update(len(A_BHTT))

    bar = tqdm(
        total=n_layers * n_sequences,
        desc="attention",
        unit=" maps",
        leave=False,
        disable=None if progress else True,
    )
    with bar, watch_attention(loaded, length, measure), torch.inference_mode():
        for first in range(0, n_sequences, batch):
            ids_BT = windows_NT[first : first + batch].to(loaded.device)
            loaded.base_model(input_ids=ids_BT, use_cache=False)  # without the head: logits are not needed
    if len(ranks) != n_layers:
        raise UserError(
            f"{len(ranks)} attention maps came out of the {n_layers} layers of {model} "
            f"({config.model_type}); only models "
            f"whose every layer has causal softmax attention, returned by transformers' eager form, can be "
            f"analyzed"
        )

    header = {
        "kind": "header",
        "model": str(model),
        "revision": revision,
        "model_type": config.model_type,
        "layers": n_layers,
        "heads": n_heads,
        "data": tokens.fingerprint,
        "sequences": n_sequences,
        "length": length,
        "seed": seed,
        "taus": list(TAUS),
        "etas": list(ETAS),
        "near_one": NEAR_ONE,
    }
    layers = [
        layer_row(layer, torch.cat(ranks[layer], dim=1).numpy(), torch.cat(masses[layer], dim=1).numpy())
        for layer in range(n_layers)
    ]
    shown = min(MAP_SEQUENCES, n_sequences)
    map_rows = [
        {
            "kind": "map",
            "layer": layer,
            "head": head,
            "sequences": shown,
            "mean": (total / shown).round(4).tolist(),
        }
        for (layer, head), total in sums.items()
    ]
    return [header, *layers, *group_rows(layers), *map_rows, summary_row(layers)]


def _check_fit(model: str, config, tokens: Tokens, length: int, maps: list[tuple[int, int]]) -> None:
    """Raises UserError unless the model can read such windows of this data and has the heads that `maps` asks
    for."""
    positions = getattr(config, "max_position_embeddings", None)
    if positions and length > positions:
        raise UserError(
            f"--length {length} is beyond the {positions} positions of {model}; use --length {positions} or "
            f"less"
        )
    if tokens.vocab_size > config.vocab_size:
        raise UserError(
            f"the data in {tokens.folder} has a vocabulary of {tokens.vocab_size} tokens, {model} knows "
            f"{config.vocab_size}; "
            f"prepare the text with the model's own tokenizer"
        )
    shape = (config.num_hidden_layers, config.num_attention_heads)
    for pair in maps:
        if len(pair) != 2 or not all(0 <= index < size for index, size in zip(pair, shape, strict=True)):
            raise UserError(
                f"map {pair} is not a (layer, head) of {model}, which has {shape[0]} layers of {shape[1]} "
                f"heads, from 0"
            )


# --- from maps to layers ------------------------------------------------------------------------------------


def layer_row(layer: int, ranks_FNH: np.ndarray, masses_FNH: np.ndarray) -> dict:
    """One layer's numbers, keyed by tau or eta. Rank(h) and m(h) are means over the sequences; MaxRank is the
    largest Rank of a head, AvgMass the mean of m over heads. The deviations are those over the sequences: of
    k* in the head that is the MaxRank, and of m* averaged over heads. `lazy` is the paper's definition:
    MaxRank is 1 exactly."""
    taus, etas = [f"{tau:g}" for tau in TAUS], [f"{eta:g}" for eta in ETAS]
    rank_FH, mass_FH = ranks_FNH.mean(axis=1), masses_FNH.mean(axis=1)
    top_F = rank_FH.argmax(axis=1)
    main = rank_FH[taus.index(MAIN)]
    return {
        "kind": "layer",
        "layer": layer,
        "lazy": bool(main.max() == 1),
        "near_lazy": bool(main.max() < NEAR_ONE),
        "heads_rank_1": int((main == 1).sum()),
        "heads_near_1": int((main < NEAR_ONE).sum()),
        "max_rank": {tau: float(rank_FH[f].max()) for f, tau in enumerate(taus)},
        "max_rank_std": {tau: round(float(ranks_FNH[f, :, top_F[f]].std()), 6) for f, tau in enumerate(taus)},
        "avg_mass": {eta: round(float(mass_FH[f].mean()), 6) for f, eta in enumerate(etas)},
        "avg_mass_std": {
            eta: round(float(masses_FNH[f].mean(axis=1).std()), 6) for f, eta in enumerate(etas)
        },
        "rank": {tau: rank_FH[f].tolist() for f, tau in enumerate(taus)},
        "mass": {eta: mass_FH[f].tolist() for f, eta in enumerate(etas)},
    }


def average_rank(layers: list[dict], first: int, end: int) -> float:
    """AvgRank: mean MaxRank (tau 0.90) of the layers [first, end)."""
    return float(np.mean([row["max_rank"][MAIN] for row in layers[first:end]]))


def group_rows(layers: list[dict]) -> list[dict]:
    """AvgRank of the halves and the thirds of the model (the paper's Table 4 uses thirds of 12 layers), as
    rows over half-open ranges. `lazy` is the paper's definition of a lazy group: floor(AvgRank) = 1."""
    rows = []
    for parts, word in ((2, "half"), (3, "third")):
        ends = [len(layers) * part // parts for part in range(parts + 1)]
        for part, (first, end) in enumerate(zip(ends, ends[1:], strict=False)):
            if end > first:
                average = average_rank(layers, first, end)
                name = f"{word} {part + 1} of {parts}"
                rows.append(
                    {"kind": "group", "name": name, "first": first, "end": end, "avg_rank": round(average, 6)}
                )
                rows[-1]["lazy"] = int(average) == 1
    return rows


def suggest_layers(rows: list[dict]) -> tuple[int, str]:
    """How many first layers to inherit, and why in one sentence.

    n is the smallest number >= 1 such that the layers left out, [n, L), are a lazy group (floor(AvgRank) = 1)
    that begins with a layer of floor(MaxRank) = 1: without the second condition the mean of a long tail would
    swallow potent layers at its head. If no group of the kind runs to the last layer, n is the paper's
    choice, L / 2 (at least 1)."""
    layers = [row for row in rows if row["kind"] == "layer"]
    n_layers = len(layers)
    half = max(1, n_layers // 2)
    for n in range(1, n_layers):
        average = average_rank(layers, n, n_layers)
        if int(layers[n]["max_rank"][MAIN]) == 1 and int(average) == 1:
            return n, (
                f"inherit the first {n} of {n_layers} layers (--layers 0:{n}): the {n_layers - n} after them "
                f"are the first "
                f"lazy group that runs to the last layer (AvgRank {average:.2f}); the paper starts at half, "
                f"{half}"
            )
    return half, (
        f"inherit the first {half} of {n_layers} layers (--layers 0:{half}), the paper's choice of half: no "
        f"lazy group runs to "
        f"the last layer (its MaxRank is {layers[-1]['max_rank'][MAIN]:.2f})"
    )


def summary_row(layers: list[dict]) -> dict:
    """Counts over the whole model, and the suggested number of layers."""
    suggested, reason = suggest_layers(layers)
    return {
        "kind": "summary",
        "lazy_layers": [row["layer"] for row in layers if row["lazy"]],
        "near_lazy_layers": [row["layer"] for row in layers if row["near_lazy"]],
        "heads": sum(len(row["rank"][MAIN]) for row in layers),
        "heads_rank_1": sum(row["heads_rank_1"] for row in layers),
        "heads_near_1": sum(row["heads_near_1"] for row in layers),
        "suggested_layers": suggested,
        "reason": reason,
    }


# --- the verb -----------------------------------------------------------------------------------------------


def describe(rows: list[dict]) -> str:
    """The rows as a plain-text table; layers are counted from 1 here, as in the paper's figures."""
    header, summary = rows[0], rows[-1]
    lines = [
        f"{header['model']}: {header['sequences']} sequences of {header['length']} tokens, tau = eta = "
        f"{MAIN}; layers from 1",
        f"{'layer':>5}  {'MaxRank':>15}  {'AvgMass':>15}  {'heads at rank 1':>15}",
    ]
    for row in (row for row in rows if row["kind"] == "layer"):
        rank = f"{row['max_rank'][MAIN]:.2f} +- {row['max_rank_std'][MAIN]:.2f}"
        mass = f"{row['avg_mass'][MAIN]:.2f} +- {row['avg_mass_std'][MAIN]:.2f}"
        heads = f"{row['heads_rank_1']} of {len(row['rank'][MAIN])}"
        mark = "lazy" if row["lazy"] else f"near 1 (< {NEAR_ONE})" if row["near_lazy"] else ""
        lines.append(f"{row['layer'] + 1:>5}  {rank:>15}  {mass:>15}  {heads:>15}  {mark}".rstrip())
    for row in (row for row in rows if row["kind"] == "group"):
        where = f"{row['name']} (layers {row['first'] + 1} to {row['end']})"
        lines.append(f"AvgRank of {where}: {row['avg_rank']:.2f}{', a lazy group' if row['lazy'] else ''}")
    lines.append(
        f"heads at rank 1: {summary['heads_rank_1']} of {summary['heads']}; near 1 (< {NEAR_ONE}): "
        f"{summary['heads_near_1']}"
    )
    return "\n".join([*lines, summary["reason"]])


def named_run(model: str, experiment: Experiment, seed: int = 0) -> tuple[str, str | None, Path] | None:
    """(checkpoint, its revision, folder for the rows) of a run of `experiment`: RUN, RUN/stage2, RUN@10000,
    or, measured on the data of `experiment`, a run of another: EXPERIMENT/RUN. None if `model` is no such
    name.

    A model of others is a random one of that size in a rehearsal. Raises UserError if the run is not
    finished."""
    name, *_ = parse_weights_name(model)
    owner, _, run = name.rpartition("/")
    if Path(model).exists() or (owner and not (RECIPES / f"{owner}.yaml").is_file()):
        return None
    owned = load_experiment(owner, experiment.rehearsal) if owner else experiment
    if run not in owned.runs:
        return None
    folder, external = RunDir.of(owned, run, seed), owned.runs[run].init.external
    if external and owned.rehearsal:
        weights, revision = folder.seed_checkpoint(owned.model.layers), None
        write_random(hf_config(owned.model, owned.model.layers), weights, seed)
    elif external:
        weights, revision = external.source, external.revision
    else:
        weights, revision = finished_weights(owned, model.removeprefix(f"{owner}/"), seed), None
        folder = beside(weights)
    return str(weights), revision, folder.path / f"on_{experiment.name}" if owner else folder.path


def check_replaced(folder: RunDir, model: str, revision: str | None) -> None:
    """Raises UserError if `folder` holds files of the names that are written and they are not those of an
    earlier analysis of the same model: an attention.jsonl as we left it, and the plots beside it."""
    kept = "and is left as it is; give another --out"
    if not folder.attention.exists():
        for name in names.PLOTS:
            if (folder.path / name).exists():
                raise UserError(
                    f"{folder.path / name} lies without an attention.jsonl, so it was not drawn by analyze, "
                    f"{kept}"
                )
        return
    try:
        header, sealed = next(iter(folder.read_attention()), {}), is_sealed(folder.attention)
    except UserError:  # damaged, or never ours
        header, sealed = {}, False
    if not sealed or header.get("kind") != "header" or not isinstance(header.get("model"), str):
        raise UserError(f"{folder.attention} is not as analyze leaves it, {kept}")
    same = header["model"] == str(model) or Path(header["model"]).resolve() == Path(model).resolve()
    if not same or header.get("revision") != revision:
        both = ((header["model"], header.get("revision")), (model, revision))
        of, asked = (f"{name}@{at}" if at else name for name, at in both)
        raise UserError(f"{folder.attention} was measured on {of}, not on {asked}, {kept}")


def run_analyze(
    model: str,
    data: str,
    out: str | None = None,
    sequences: int = 100,
    length: int = 100,
    seed: int = 0,
    maps: list[tuple[int, int]] | None = None,
    revision: str | None = None,
) -> Path:
    """The verb: measure, write attention.jsonl, print the table. Returns the folder, for
    figures.plot_attention.

    `model` is an HF checkpoint, a Hub id, the folder of a finished run (a grown one means its chosen stage),
    or a name (`named_run`, of that seed). `data` is an experiment or a folder of prepared data. `out` is by
    default the run folder that holds the weights, else runs/analysis/<model>. In a rehearsal, whose models
    are short, `length` is cut to its sequences.

    Raises UserError, before it measures, if `out` holds files that would be overwritten and are not ours
    (`check_replaced`)."""
    given = str(resolve_output(out)) if out else None
    if given:
        check_writable(Path(given))
    out = given
    if (Path(data) / "manifest.json").is_file():
        experiment, tokens = None, Tokens(data, "val")
    else:
        experiment = load_experiment(data)
        tokens = Tokens.of(experiment, "val")
    if experiment and (named := named_run(model, experiment, seed)):
        model, revision, out = named[0], revision or named[1], out or named[2]
    if RunDir(model).is_done():
        model = str(RunDir(model).weights())
    run = RunDir(Path(model).resolve().parent)
    is_final = Path(model).resolve() == run.final and run.final.is_dir()
    described = [experiment.model_dump(mode="json")] if experiment else []
    if is_final and run.experiment.is_file():
        described.append(read_yaml(run.experiment))
    rehearsals = [one["data"]["sequence_length"] for one in described if one["rehearsal"]]
    length = min([length, *rehearsals])
    if out:
        folder = Path(out)
    elif is_final:
        folder = run.path
    # a local folder by its last two names (at_00010000 alone would not say whose), a Hub id by both of its
    # own
    else:
        name = "--".join((Path(model).resolve() if Path(model).exists() else Path(model)).parts[-2:])
        folder = root() / "runs" / (names.REHEARSAL if rehearsals else "") / names.ANALYSIS / name
    if given:
        check_replaced(RunDir(folder), model, revision)
    rows = analyze(model, tokens, sequences, length, seed, maps, revision=revision, progress=True)
    rows[0]["rehearsal"] = bool(rehearsals)
    rows[0] |= {"weights": run.weights_hash()} if is_final and run.is_done() and not out else {}
    write_jsonl(RunDir(folder).attention, rows)
    print(describe(rows))
    return folder
