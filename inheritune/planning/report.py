"""Plans as text: a paragraph for one model, and the table of several."""

from inheritune.config.catalog import GPU_SPECS
from inheritune.config.units import format_memory
from inheritune.planning.memory import FRAGMENTATION, FRAMEWORK
from inheritune.planning.saving import DISK_RATE

HEADS = [
    "run",
    "layers",
    "parameters",
    "tokens",
    "FLOPs",
    "GPU-hours",
    "hours",
    "peak/GPU",
    "fits",
    "disk",
]


def format_plans(plans: list[dict], gpus: int, gpu: str, room_gb: float, mfu: float) -> str:
    """Return the table of `plans`, their sums, the changes that make the too large ones fit, and the
    warnings, each once."""
    gpu_hours = sum(facts["gpu_hours"] for facts in plans)
    disk = sum(facts["disk"] for facts in plans)
    sums = (
        f"in all {gpu_hours:,.1f} GPU-hours, if every stage of growth is needed, and "
        f"{format_memory(disk)} of disk; {gpus} x {gpu} ({room_gb} GB) at {mfu:.0%} of "
        f"{GPU_SPECS[gpu]['tflops']:g} TFLOP/s, without evaluation, saving and queueing"
    )
    table = format_text_table(HEADS, [_format_row(facts) for facts in plans])
    warnings = dict.fromkeys(sentence for facts in plans for sentence in facts["warnings"])
    return "\n".join([table, sums, *_list_changes(plans), *(f"warning: {sentence}" for sentence in warnings)])


def _format_row(facts: dict) -> list:
    return [
        format_model_name(facts),
        facts["layers"],
        f"{facts['parameters'] / 1e6:,.0f}M",
        f"{facts['tokens'] / 1e9:.1f}B",
        f"{facts['flops']:.1e}",
        f"{facts['gpu_hours']:,.1f}",
        f"{facts['hours']:,.1f}",
        format_memory(facts["peak"]),
        "yes" if facts["fits"] else "NO",
        format_memory(facts["disk"]),
    ]


def _list_changes(plans: list[dict]) -> list[str]:
    """Return one sentence for each change of the JSON, with the models that need it."""
    needed: dict[str, list[str]] = {}
    for facts in plans:
        if not facts["fits"]:
            needed.setdefault("\n    ".join(facts["diff"]), []).append(format_model_name(facts))
    return [f"{', '.join(names)}: too large; {_describe_change(diff)}" for diff, names in needed.items()]


def _describe_change(diff: str) -> str:
    if diff:
        return f"the smallest change of the JSON that fits:\n    {diff}"
    return "no change of the JSON fits: use more GPUs"


def describe_plan(facts: dict) -> str:
    """Describe one model: batch, memory by component and by phase, host, disk."""
    parts, phases = (
        ", ".join(f"{what} {format_memory(size)}" for what, size in facts[kind].items() if size)
        for kind in ("component", "phases")
    )
    return (
        f"{format_model_name(facts)}: {facts['batch']}\n"
        f"  whole micro batches up to {facts['full_micro_batches_up_to_gpus']} GPUs; at most "
        f"{facts['most_gpus']} GPUs\n"
        f"  one GPU holds: {parts}\n  its phases: {phases}\n"
        f"  peak {format_memory(facts['peak'])} in '{facts['peak_phase']}', with "
        f"{format_memory(FRAMEWORK)} of CUDA and NCCL and {FRAGMENTATION:.0%} for the allocator (these "
        f"two are estimates)\n"
        f"  one host: {format_memory(facts['host'])} of memory, {format_memory(facts['pinned'])} of it "
        f"pinned (up to twice that where torch rounds blocks up to powers of two), "
        f"{format_memory(facts['copies'])} for copies of a checkpoint that is being written\n"
        f"  a checkpoint: {format_memory(facts['checkpoint'])}, written in {facts['save_s']:.1f} s at "
        f"{format_memory(DISK_RATE)}/s; training waits {facts['wait_s']:.1f} s for it, "
        f"{facts['wait_share']:.1%} of the time (the rates are assumed); the run's folder: "
        f"{format_memory(facts['disk'])}"
    )


def format_comparison(rows: list[list]) -> str:
    """Return the table of a run's planned and measured bytes, as `compare_measured` gives them."""
    shown = [
        [
            what,
            format_memory(planned),
            format_memory(measured),
            f"{planned / max(1, measured) - 1:+.1%}",
        ]
        for what, planned, measured in rows
    ]
    return format_text_table(["per rank", "planned", "measured", "planned is"], shown)


def format_model_name(facts: dict) -> str:
    """Return the run, and the stage of a grown one."""
    return facts["run"] + (f" stage {facts['stage']}" if facts["stage"] else "")


def format_text_table(heads: list[str], rows: list[list]) -> str:
    """Return a plain text table, its first column to the left and the others to the right."""
    from tabulate import tabulate

    return tabulate(
        rows,
        heads,
        tablefmt="simple",
        disable_numparse=True,
        colalign=["left"] + ["right"] * (len(heads) - 1),
    )
