"""How cost grows: ours alone at four sizes of a training step, prepare, inherit and analyze, and one plot
(growth.png).

    python benchmarks/growth.py [--size small|full]

The exponent is that of cost ~ size^b, fitted to the medians; memory is the largest process's. Size is counted
in FLOPs per step, bytes of text, bytes of the result, and attention maps (sequences x layers x heads)."""

import sys

import analyze
import harness
import inherit
import numpy as np
import prepare
import train_step
from harness import HERE, Case, spread
from written import markdown


def only_ours(case: Case, name: str, amount: float) -> Case:
    work = {**case.work, "amount": amount}
    return Case(name, work, {"ours": case.contestants["ours"]}, setup=case.setup, ranks=case.ranks)


def cases(size: str) -> list[Case]:
    small, found = size == "small", []
    for layers, width in ((2, 64), (4, 128), (8, 256), (8, 512)):
        model = train_step.TINY | {"layers": layers, "width": width}
        made = train_step.cpu_case("", f"grow{width}", model, 128, 2 if small else 8, 3 if small else 10)
        found.append(only_ours(made, f"train step {layers} x {width}", train_step.step_flops(made.work)))
    for mb in (1, 2, 3, 4) if small else (15, 30, 60, 120):
        found.append(only_ours(prepare.case("gpt2", mb), f"prepare {mb} MB", mb * 1e6))
    for layers in (2, 3, 4, 5) if small else (3, 6, 13, 26):
        shape = (
            {"size": "llama_tiny", "layers": 8, "width": 256, "heads": 4, "mlp_width": 688}
            if small
            else {"size": "openllama_3b"}
        )
        made = inherit.case("", shape, layers, (1 << 22) if small else (2 << 30))
        found.append(only_ours(made, f"inherit {layers} layers", made.work["bytes"]))
    for sequences in (2, 4, 6, 8) if small else (25, 50, 100, 200):
        model = (
            {"size": "gpt2_tiny", "positions": 128, "vocab_size": 2048} if small else {"size": "gpt2_small"}
        )
        layers, heads = (8, 4) if small else (12, 12)
        made = analyze.case("", model, sequences)
        found.append(only_ours(made, f"analyze {sequences} sequences", sequences * layers * heads))
    return found


PARTS = {
    "train step": "FLOPs of a step",
    "prepare": "bytes of text",
    "inherit": "bytes of the result",
    "analyze": "attention maps",
}


def curves(results: list[dict]) -> dict[str, dict]:
    """{part: {sizes, seconds (all turns), peak_mb, exponent}}"""
    found = {}
    for part in PARTS:
        its = [result for result in results if result["case"].startswith(part)]
        its = [result for result in its if "seconds" in result["turns"]["ours"][0]]
        if len(its) < 2:
            continue
        sizes = [result["work"]["amount"] for result in its]
        seconds = [[turn["seconds"] for turn in result["turns"]["ours"]] for result in its]
        peaks = [[turn["peak_mb"] for turn in result["turns"]["ours"]] for result in its]
        slope = np.polyfit(np.log(sizes), np.log([np.median(one) for one in seconds]), 1)[0]
        found[part] = {"sizes": sizes, "seconds": seconds, "peak_mb": peaks, "exponent": float(slope)}
    return found


def table(results: list[dict]) -> str:
    rows = []
    for part, its in curves(results).items():
        for size, seconds, peaks in zip(its["sizes"], its["seconds"], its["peak_mb"], strict=True):
            rows.append(
                [part, f"{size:.3g} {PARTS[part]}", spread(seconds), spread(peaks), f"{its['exponent']:.2f}"]
            )
    return markdown(["part", "size", "seconds", "peak MB", "exponent of all four"], rows)


def plot(results: list[dict], path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullLocator

    figure, axes = pyplot.subplots(1, 4, figsize=(13, 3.2))
    for axis, (part, its) in zip(axes, curves(results).items(), strict=False):
        medians = [np.median(one) for one in its["seconds"]]
        ends = [
            [m - min(one) for m, one in zip(medians, its["seconds"], strict=True)],
            [max(one) - m for m, one in zip(medians, its["seconds"], strict=True)],
        ]
        axis.errorbar(its["sizes"], medians, yerr=ends, marker="o", label="seconds", color="C0")
        axis.plot(
            its["sizes"],
            [np.median(one) / 1000 for one in its["peak_mb"]],
            marker="s",
            color="C1",
            label="peak GB",
        )
        axis.set(xscale="log", yscale="log", xlabel=PARTS[part], title=f"{part}: size^{its['exponent']:.2f}")
        axis.xaxis.set_minor_locator(NullLocator())
        axis.set_xticks(
            its["sizes"], [f"{size:.1e}".replace("e+0", "e").replace("e+", "e") for size in its["sizes"]]
        )
        axis.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
        for which in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
            which(FormatStrFormatter("%g"))
        axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    import json
    from pathlib import Path

    harness.main(__file__, cases)
    stored = HERE / "results" / "growth.json"
    if "--turn" not in sys.argv and "--out" in sys.argv:
        stored = Path(sys.argv[sys.argv.index("--out") + 1])
    if "--turn" not in sys.argv and stored.is_file():
        results = json.loads(stored.read_text(encoding="utf-8"))
        print(table(results))
        plot(results, stored.parent / "growth.png")
