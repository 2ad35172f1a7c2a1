"""What the training loop passes on: the state that survives a restart, and the result of a step."""

from dataclasses import asdict, dataclass, field

import torch


@dataclass
class TrainState:
    """The progress of a run. Together with the engine and the random generators, it is all that must survive
    a restart. A checkpoint stores it as a dict of these fields, in this order."""

    step: int = 0
    """Steps done, with those that were skipped (`bad`)."""
    tokens: int = 0
    data: str = ""
    """Fingerprint of the training data."""
    evaluated: int = -1
    """Step of the last validation of the loss curve; -1 before the first."""
    bad: list[dict] = field(default_factory=list)
    """The latest steps, in a row, that were skipped because the loss or the gradient was not finite. A
    restart does not begin this count anew."""

    def to_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_dict(cls, stored: dict) -> "TrainState":
        """Read what `to_dict` wrote. Checkpoints of older versions have no `bad`."""
        bad = stored.get("bad", [])
        return cls(stored["step"], stored["tokens"], stored["data"], stored["evaluated"], bad)


@dataclass(frozen=True)
class StepResult:
    """What one step of training leaves for the log."""

    loss_sums: torch.Tensor
    """Sums over this rank's tokens, float64: of the cross-entropy, with a teacher also of the divergence."""
    lr: float
    grad_norm: float | None
    """Norm of the mean gradient before clipping."""
    is_applied: bool
    """False if the loss or the gradient was not finite, so that the weights were not updated."""
    skipped_steps: int
    """Steps that were skipped so far, as DeepSpeed counts them."""
