"""The table that `analyze` prints, of at most 100 columns. Layers are counted from 1, as in the paper's
figures."""

from inheritune.analysis.costs import KINDS
from inheritune.analysis.layers import is_of_little_use
from inheritune.analysis.thresholds import LITTLE_USE, MAIN_THRESHOLD, NEAR_ONE

RULE_NAMES = {"first": "first n", "cost": "by cost", "influence": "by influence", "window": "best window"}


def describe_rows(rows: list[dict]) -> str:
    """Return the rows of attention.jsonl as plain text."""
    header, summary = rows[0], rows[-1]
    layers = [row for row in rows if row["kind"] == "layer"]
    loss = header.get("loss")
    lines = [
        f"{header['model']}: {header['sequences']} sequences of {header['length']} tokens, tau = eta = "
        f"{MAIN_THRESHOLD}; layers from 1"
    ]
    if loss is not None:
        lines += [
            f"loss {loss:.4f} nats per token; block, attn, mlp: how much it rises without them;",
            "infl.: 1 - cosine of a block's input and output; norm: output of heads at rank 1, all heads: 1",
        ]
    lines += [_describe_layers_head(loss is not None)]
    lines += [_describe_layer(row, loss) for row in layers]
    for row in (row for row in rows if row["kind"] == "group"):
        where = f"{row['name']} (layers {row['first'] + 1} to {row['end']})"
        line = f"AvgRank of {where}: {row['avg_rank']:.2f}"
        lines.append(f"{line}, a lazy group" if row["lazy"] else line)
    lines.append(
        f"heads at rank 1: {summary['heads_rank_1']} of {summary['heads']}; near 1 (< {NEAR_ONE}): "
        f"{summary['heads_near_1']}; near uniform attention: {summary['heads_uniform']}"
    )
    if loss is not None:
        lines += _describe_cuts(rows)
    lines += [f"not measured: {sentence}" for sentence in _list_missing(header.get("costs_missing", {}))]
    return "\n".join([*lines, summary["reason"], *_describe_choice(rows)])


def _describe_layers_head(with_costs: bool) -> str:
    line = f"{'layer':>5}  {'MaxRank':>14}  {'AvgMass':>14}  {'rank 1':>8}"
    if with_costs:
        line += f"  {'norm':>4}" + "".join(f"  {kind:>7}" for kind in KINDS) + f"  {'infl.':>6}"
    return line


def _describe_layer(row: dict, loss: float | None) -> str:
    rank, rank_std = row["max_rank"][MAIN_THRESHOLD], row["max_rank_std"][MAIN_THRESHOLD]
    mass, mass_std = row["avg_mass"][MAIN_THRESHOLD], row["avg_mass_std"][MAIN_THRESHOLD]
    ranks = row["rank"][MAIN_THRESHOLD]
    heads = f"{row['heads_rank_1']} of {len(ranks)}"
    line = f"{row['layer'] + 1:>5}  {f'{rank:.2f} +- {rank_std:.2f}':>14}"
    line += f"  {f'{mass:.2f} +- {mass_std:.2f}':>14}  {heads:>8}"
    if loss is not None:
        line += f"  {_describe_norm(row):>4}"
        line += "".join(f"  {_format_cost(row['cost'][kind]):>7}" for kind in KINDS)
        line += f"  {row['influence']:>6.3f}"
    mark = ""
    if row["lazy"]:
        mark = "lazy"
    elif row["near_lazy"]:
        mark = "near 1"
    elif row["uniform"]:
        mark = "uniform"
    if loss is not None and is_of_little_use(row, loss):
        mark += "*"
    return f"{line}  {mark}".rstrip()


def _format_cost(cost: float | None) -> str:
    return "-" if cost is None else f"{cost:.4f}"[:7]


def _describe_norm(row: dict) -> str:
    """Return the mean output norm of the heads at rank 1, as a share of the mean over all heads."""
    norms, ranks = row["head_norm"], row["rank"][MAIN_THRESHOLD]
    if not norms or len(norms) != len(ranks):
        return "-"
    of_rank_1 = [norm for norm, rank in zip(norms, ranks, strict=True) if rank == 1]
    average = sum(norms) / len(norms)
    return f"{sum(of_rank_1) / len(of_rank_1) / average:.2f}" if of_rank_1 and average else "-"


def _list_missing(missing: dict) -> list[str]:
    """Return sentences on what the header says was not measured."""
    if "all" in missing:
        return [f"what layers are worth: {missing['all']}"]
    why = "it has no module of its own in the table of architectures, or is not all that the block adds"
    return [
        f"{part} of {len(layers)} layers (the first: {layers[0] + 1}): {why}"
        for part, layers in missing.items()
    ]


def _describe_cuts(rows: list[dict]) -> list[str]:
    """Return the lines on the loss right after a cut, before any training."""
    found = {(row["n"], row["rule"]): row["loss"] for row in rows if row["kind"] == "cut"}
    names = "".join(f"  {name:>12}" for name in RULE_NAMES.values())
    lines = ["loss right after a cut to n layers, by what is kept:", f"{'n':>5}{names}"] if found else []
    for n in sorted({n for n, _ in found}):
        lines.append(f"{n:>5}" + "".join(f"  {found[n, rule]:>12.4f}" for rule in RULE_NAMES))
    for row in (row for row in rows if row["kind"] == "without_lazy"):
        names = ", ".join(str(layer + 1) for layer in row["layers"])
        lines.append(
            f"without all layers of MaxRank below {NEAR_ONE} ({names}): {row['loss']:.4f}, "
            f"{row['loss'] - rows[0]['loss']:+.4f}"
        )
    return lines


def _describe_choice(rows: list[dict]) -> list[str]:
    """Return the sentences on the choice by cost, beside the paper's two rules."""
    header, summary = rows[0], rows[-1]
    if "suggested_by_cost" not in summary:
        return []
    depth, n, by_rank = header["layers"], summary["suggested_by_cost"], summary["suggested_layers"]
    half, little = max(1, depth // 2), len(summary["little_use_layers"])
    first = next(row["loss"] for row in rows if row["kind"] == "first")
    lines = [
        f"of little use (*: without the block the loss rises by less than {LITTLE_USE:.0%}): {little} of "
        f"{depth} layers"
    ]
    if n == depth:
        lines.append(f"by cost, no layer at the end can be left out: layer {depth} is of use")
    else:
        lines.append(
            f"by cost, inherit the first {n} (--layers 0:{n}): the {depth - n} after them are each of little "
            f"use; loss right after the cut {first[n]:.4f}, before it {header['loss']:.4f}"
        )
    if n != by_rank:
        lines.append(
            f"rank and cost disagree: {by_rank} layers by rank, {n} by cost; loss right after the cut to "
            f"{by_rank}: {first[by_rank]:.4f}"
        )
    if half not in (n, by_rank):
        lines.append(f"right after the cut to the paper's half, {half} layers, it is {first[half]:.4f}")
    return lines + _describe_best(rows, by_rank)


def _describe_best(rows: list[dict], n: int) -> list[str]:
    """Return the line on the rule that loses least at `n` layers, unless that is to keep the first."""
    cuts = [row for row in rows if row["kind"] == "cut" and row["n"] == n]
    best = min(cuts, key=lambda row: row["loss"], default=None)
    if best is None or best["rule"] == "first":
        return []
    return [
        f"of {n} layers, those chosen by {best['rule']} lose least: {best['loss']:.4f} (--layers "
        f"auto:{n}:{best['rule']})"
    ]
