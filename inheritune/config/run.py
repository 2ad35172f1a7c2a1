"""One run of an experiment: where its first weights come from, how it is trained, and how it grows."""

from typing import Annotated, Any, Literal, get_args

from pydantic import Field, model_validator

from inheritune.config import values
from inheritune.config.fields import AboveZero, BelowOne, Layer, Layers, Steps, Strict
from inheritune.config.layers import count_layers, parse_auto, parse_layers, place_layers
from inheritune.errors import UserError

Part = Literal["token_embedding", "position_embedding", "blocks", "final_norm", "head"]
Module = Literal["attn", "mlp", "norms"]
Norm = Literal["attn_norm", "mlp_norm"]

PARTS: tuple[Part, ...] = get_args(Part)
MODULES: tuple[Module, ...] = get_args(Module)
NORMS: tuple[Norm, ...] = get_args(Norm)
"""Modules that name one norm of a block: that of the attention, or of the MLP. `norms` means both."""


class Start(Strict):
    """A model that a run starts from: another run of the file, a local checkpoint, or a Hub id."""

    source: str
    revision: str | None = None


class External(Start):
    """A finished third-party model, only evaluated or analyzed."""


class HalfWidth(Start):
    """`source` at half its heads and half its width (see models/surgery.py)."""

    def blocks(self, n_source: int) -> list[int | None]:
        return [*range(n_source)]

    def count(self, n_source: int) -> int:
        return n_source


class Blocks(Start):
    """Some of the blocks of `source`, and the other parts to copy."""

    layers: str | list[Layer]
    """Half-open range 'a:b' (0:16 are the first 16; ':16', '-4:' work too), a list of block indices,
    'drop:3,7-9' (all others), or 'auto:8': the 8 that an analysis of the source names by cost
    ('auto:8:influence', 'auto:8:window': by another measure)."""
    parts: list[Part] = list(PARTS)


class Stack(Blocks):
    """Blocks of `source` twice, one copy after the other (stacking; from the reference: hybrid stacking)."""

    def blocks(self, n_source: int) -> list[int | None]:
        return [*parse_layers(self.layers, n_source)] * 2

    def count(self, n_source: int) -> int:
        return 2 * count_layers(self.layers, n_source)


class Inherit(Blocks):
    """Weights copied from `source`."""

    modules: list[Literal[Module, Norm]] = list(MODULES)
    depth: Layers | None = None
    """Blocks of the model, if more than are copied; the others are random."""
    at: Layer | None = None
    """Index of the first copied block in the model (default: 0)."""

    def blocks(self, n_source: int) -> list[int | None]:
        return place_layers(self.layers, n_source, self.depth, self.at or 0)

    def count(self, n_source: int) -> int:
        copied = list(range(count_layers(self.layers, n_source)))
        return len(place_layers(copied, n_source, self.depth, self.at or 0))


class Init(Strict):
    """Where a run's first weights come from: exactly one of these."""

    random: bool = False
    inherit: Inherit | None = None
    stack: Stack | None = None
    half_width: HalfWidth | None = None
    external: External | None = None

    @model_validator(mode="before")
    @classmethod
    def _word(cls, value: Any) -> Any:
        return {"random": True} if value == "random" else value

    @model_validator(mode="after")
    def _one_kind(self) -> "Init":
        kinds = list(type(self).model_fields)
        if sum(bool(getattr(self, kind)) for kind in kinds) != 1:
            raise ValueError(f"give exactly one of: {', '.join(kinds)}")
        return self

    @property
    def copied(self) -> Inherit | Stack | HalfWidth | None:
        """The start that copies another model's weights, or None.

        Its `blocks(n_source)` gives for each block of the model its block in the source, None for a random
        one; `count(n_source)` gives how many they are, also where a measurement chooses them."""
        return self.inherit or self.stack or self.half_width


class Distil(Strict):
    """Logit distillation.

    The loss is alpha * cross-entropy + (1 - alpha) * temperature^2 * KL(teacher || student)."""

    teacher: str
    """Another run of the file, a local checkpoint or a Hub id, of the same vocabulary."""
    revision: str | None = None
    alpha: BelowOne = 0.6
    temperature: AboveZero = 1.0


class Grow(Strict):
    """Growth by stages (paper, Algorithm 1): add `by` layers until parity with the source or `max_layers`."""

    by: Layers = 2
    margin: Annotated[float, values.FINITE] = 0.01
    """Parity: the upper end of the 95% interval of (ours - reference) is at or below this many nats."""
    max_layers: Layers
    from_: Annotated[Literal["reference", "previous", "middle"], Field(alias="from")] = "reference"
    """reference: every stage restarts from the reference's first layers, as in the paper. previous: a stage
    keeps the weights that the last one trained, and adds the reference's next layers. middle: it keeps them,
    and repeats the `by` layers in its middle (gradual stacking; config/layers.py: repeat_middle)."""

    def depths(self, inherited: str | list[int], n_source: int) -> list[int]:
        """Return the number of layers of each stage: the inherited ones, then `by` more up to max_layers.

        Raises UserError if the inherited ones are not the first layers of the source (`n_source` blocks), if
        max_layers is less than them or more than the source has, or if a stage has too few to repeat."""
        first = [] if parse_auto(inherited) else parse_layers(inherited, n_source)
        if not first or first != list(range(len(first))):
            raise UserError(f"a run that grows must inherit the first layers, '0:n' (got {inherited})")
        if not len(first) <= self.max_layers <= n_source:
            raise UserError(
                f"grow.max_layers ({self.max_layers}) must lie between the first stage's {len(first)} layers "
                f"and the source's {n_source}"
            )
        depths = [*range(len(first), self.max_layers, self.by), self.max_layers]
        if self.from_ == "middle" and len(depths) > 1 and depths[1] - depths[0] > depths[0]:
            raise UserError(
                f"grow.by ({self.by}) repeats more layers than the {depths[0]} of the first stage; with "
                f"'from: middle' it is at most {depths[0]}"
            )
        return depths


class Run(Strict):
    """One model of the experiment."""

    init: Init
    distil: Distil | None = None
    layers: Layers | None = None
    """Blocks of a random model, or of the first stage of one that grows; an inherited one has as many as it
    copies."""
    train: dict[str, Any] = {}
    """Keys of `train` that differ in this run."""
    grow: Grow | None = None
    compare: str | None = None
    """Run whose validation loss this one is compared with (default: the source, if the file has it)."""
    keep_at: list[Steps] = []
    """Steps whose weights are kept as at_<step>/."""

    @model_validator(mode="after")
    def _consistent(self) -> "Run":
        inherit = self.init.inherit
        from_scratch = self.grow and self.grow.from_ == "middle" and self.init.random and self.layers
        if self.grow and not inherit and not from_scratch:
            raise ValueError(
                "'grow' needs 'init: {inherit: ...}'; 'from: middle' also takes 'init: random' with 'layers'"
            )
        if self.layers and not self.init.random:
            raise ValueError(
                "'layers' belongs to a random run; an inherited one has as many layers as it copies"
            )
        if self.grow and inherit and (inherit.depth or inherit.at):
            raise ValueError("'grow' adds layers to the first ones; leave out init.inherit.depth and at")
        if self.distil and self.init.external:
            raise ValueError("'distil' belongs to a run that is trained; an external model is not")
        return self

    def depths(self, n_source: int) -> list[int]:
        """Return the number of layers of each stage of a grown run, whose source or, from scratch, whose
        experiment's model has `n_source` blocks; [] for a run that does not grow.

        Raises UserError as Grow.depths does."""
        if self.grow is None:
            return []
        return self.grow.depths(
            self.init.inherit.layers if self.init.inherit else f"0:{self.layers}", n_source
        )

    def sources(self) -> list[tuple[str, str | None]]:
        """Return (source, revision) of each model that this run is, copies or learns from.

        A source is a run of the file, a local checkpoint or a Hub id."""
        start = self.init.external or self.init.copied
        found = [(start.source, start.revision)] if start else []
        return found + ([(self.distil.teacher, self.distil.revision)] if self.distil else [])
