"""The claim of a table: that Inheritune's smaller model is level with the full one, put to one rule for the
paper's numbers and for this repository's.

A table may match the paper cell by cell and its claim may fail all the same: each number differs a little
from the paper's, and the two models differ the wrong way. So a row marked `claim` in items.yaml gets a row of
its own below the table.
"""

from dataclasses import dataclass

from inheritune.config.experiment import Experiment
from inheritune.config.run import Grow
from inheritune.paper.items import Column, Item, Row, split_run
from inheritune.paper.table_cells import (
    NOISE_UNKNOWN,
    NOT_RUN,
    Cell,
    combine_noises,
    format_noise,
    is_higher_better,
    make_cell,
    read_row_results,
    refuse_mixture,
)
from inheritune.runs.comparison import Z95

PREFIX = "claim: "
"""The beginning of the label of a claim row."""
LAST_TEN = 10
"""Evaluations in the mean that softens the noise of the paper's last value."""
DEFAULT_MARGIN: float = Grow.model_fields["margin"].default
"""Margin of a run that does not grow, in nats."""
NOTE = (
    "A claim row is the difference of Inheritune's model to the full one ± noise, in the paper / in this "
    f"repository. Its 95% interval reaches {Z95:.2f} times the noise to either side. For a loss the claim "
    f"holds if the interval ends at or below the margin ({DEFAULT_MARGIN} nats, the stop rule of growth), "
    "and fails if it begins above it. A score has no margin: the claim holds if the interval lies on the "
    "better side of zero, and fails if it lies on the worse one. Otherwise it is not decided. This "
    "repository's losses are paired by window where the run was compared with the full model. The paper's "
    "noise is that of two last values, or of two means of the last ten."
)


@dataclass(frozen=True)
class Gap:
    """A difference to the full model: this model minus the full one, and its standard deviation."""

    mean: float
    noise: float | None

    def place(self, margin: float, higher_is_better: bool) -> str:
        """Return where the model is relative to the full one: above, below, or within margin or noise."""
        if self.noise is None:
            return NOISE_UNKNOWN
        low, high = self.mean - Z95 * self.noise, self.mean + Z95 * self.noise
        if high < 0:
            return "below"
        if high <= margin and not higher_is_better:
            return "within the margin of"
        return "above" if low > 0 else "within the noise of"

    def judge(self, margin: float, higher_is_better: bool) -> str:
        """Return the verdict on the claim that the model is level with the full one or better."""
        if self.noise is None:
            return NOISE_UNKNOWN
        worse_by = -self.mean if higher_is_better else self.mean
        if worse_by + Z95 * self.noise <= margin:
            return "holds"
        return "fails" if worse_by - Z95 * self.noise > margin else "not decided"


@dataclass(frozen=True)
class Claim:
    """A cell of a claim row."""

    margin: float
    higher_is_better: bool
    digits: int
    paper: Gap | None = None
    """By the paper's last values."""
    last_ten: Gap | None = None
    """By the means of the last ten evaluations of the paper's logs."""
    own_layers: int = 0
    """Blocks of this repository's model."""
    ours: Gap | None = None
    state: str = NOT_RUN
    """Why this repository has no difference."""
    small: bool = False
    """Whether this repository's is a rehearsal."""

    def judge(self, gap: Gap | None) -> str:
        """Return the verdict on a difference of this cell; empty if there is none."""
        return gap.judge(self.margin, self.higher_is_better) if gap else ""

    def describe(self, gap: Gap) -> str:
        """Return a difference in words: where the model is, the difference, its noise, the verdict."""
        place = gap.place(self.margin, self.higher_is_better)
        where = "" if place == NOISE_UNKNOWN else f"{place} the full model: "
        mean = round(gap.mean, self.digits) + 0.0  # no -0.00
        return f"{where}{mean:+.{self.digits}f}{format_noise(gap.noise, self.digits)}, {self.judge(gap)}"

    def text(self) -> str:
        """Return the cell as it is printed: the paper's difference / this repository's."""
        paper = self.describe(self.paper) if self.paper else "-"
        if self.ours is None:
            return f"{paper} / {self.state}"
        own = f"with {self.own_layers} layers {self.describe(self.ours)}"
        return f"{paper} / REHEARSAL ({own})" if self.small else f"{paper} / {own}"

    def text_of_last_ten(self) -> str:
        """Return the paper's difference by the means of ten evaluations; empty if it has no logs."""
        return f"last ten: {self.describe(self.last_ten)}" if self.last_ten else ""

    def record(self) -> dict:
        """Return the cell as columns of a CSV file, those of `Cell.record`."""
        cell = Cell(state=self.judge(self.ours) or self.state, paper_state=self.judge(self.paper))
        if self.paper:
            cell.paper, cell.paper_noise = f"{self.paper.mean:+.4f}", self.paper.noise
        if self.paper and self.last_ten:
            cell.log = (self.paper.mean, self.last_ten.mean, self.last_ten.noise or 0.0)
        if self.ours:
            cell.ours, cell.noise = self.ours.mean, self.ours.noise
            cell.state = f"REHEARSAL ({cell.state})" if self.small else cell.state
        return cell.record()


def list_claims(item: Item) -> list[Row]:
    """Return the rows of a table that get a claim row."""
    return [row for row in item.rows if row.claim]


def make_claim(
    item: Item, row: Row, column: Column, experiments: dict[str, Experiment], seed: int
) -> Claim | None:
    """Return the claim of `row` in a column; None for a column that measures nothing.

    Raises UserError if the two models were measured on different data."""
    if column.metric == "parameters" or not (column.metric or column.mean):
        return None
    name, run = split_run(row)
    experiment = experiments[name]
    spec = experiment.run(run)
    full = _find_full_row(item, name, experiment.reference_of(spec) or "")
    own, other = (make_cell(item, one, column, experiments, seed) for one in (row, full))
    refuse_mixture(column.label, f"the claim '{row.label}'", [(full.label, other), (row.label, own)])
    results = read_row_results(row, experiments, seed)
    ours = _pair_losses(results, split_run(full)[1]) if column.metric == "validation" else None
    if not ours and own.ours is not None and other.ours is not None:
        ours = Gap(own.ours - other.ours, combine_noises([own.noise, other.noise]))
    paper, last_ten = _compare_published(own, other)
    return Claim(
        margin=(spec.grow.margin if spec.grow else DEFAULT_MARGIN) if column.metric == "validation" else 0.0,
        higher_is_better=is_higher_better(column),
        digits=4 if column.metric == "validation" else 2,
        paper=paper,
        last_ten=last_ten,
        own_layers=results.get("layers", 0),
        ours=ours,
        state=NOT_RUN if own.ours is None else "the full model is not run",
        small=experiment.rehearsal,
    )


def _find_full_row(item: Item, experiment: str, reference: str) -> Row:
    """Return the table's row of the full model, or a row of its own for a table that does not show it."""
    run = f"{experiment}/{reference}"
    return next((row for row in item.rows if row.run == run), Row(label="the full model", run=run))


def _pair_losses(results: dict, reference: str) -> Gap | None:
    """Return the difference that was measured window by window; None if the run was not compared."""
    difference = results.get("difference")
    if not difference or results.get("compared_with", reference) != reference:
        return None
    return Gap(difference["mean"], (difference["high"] - difference["low"]) / 2 / Z95)


def _compare_published(own: Cell, full: Cell) -> tuple[Gap | None, Gap | None]:
    """Return the paper's difference by its last values, and by the means of its last ten evaluations."""
    if own.target is None or full.target is None:
        return None, None
    last = Gap(own.target - full.target, combine_noises([own.paper_noise, full.paper_noise]))
    if not (own.log and full.log and last.noise is not None):
        return last, None
    return last, Gap(own.log[1] - full.log[1], last.noise / LAST_TEN**0.5)
