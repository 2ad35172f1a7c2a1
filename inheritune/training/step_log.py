"""What a run logs of its steps: rows of metrics.jsonl, the progress bar, and the pace."""

import torch

from inheritune.engines.memory import find_peak_flops, measure_peak_memory
from inheritune.runtime import dist
from inheritune.runtime.log import make_progress_bar
from inheritune.training.clocks import StartClock, StepTimer
from inheritune.training.inputs import RunInputs
from inheritune.training.record import Metrics
from inheritune.training.state import StepResult, TrainState


class StepLog:
    """Counts the steps of a start, and logs every `train.log_every`-th one.

    `metrics` is None on all ranks but 0. `loss_weights` are those of the parts of the loss (`StepResult`)."""

    def __init__(
        self,
        inputs: RunInputs,
        state: TrainState,
        clock: StartClock,
        metrics: Metrics | None,
        loss_weights: torch.Tensor,
        flops_per_token: float,
    ):
        self.inputs, self.train, self.clock, self.metrics = inputs, inputs.train, clock, metrics
        self.loss_weights, self.flops_per_token = loss_weights, flops_per_token
        self.timer = StepTimer()
        self.pace = "the start"
        """What the log line of a validation reports of the speed."""
        self._bar = make_progress_bar(
            desc="training", unit="step", total=self.train.steps, initial=state.step
        )

    def count_step(self) -> None:
        """Count a step, done or skipped. The first one ends the start of the run."""
        self._bar.update()
        self.timer.count_step()
        if "first step" not in self.clock.parts:
            self.clock.end("first step")
            if dist.get_rank() == 0:
                self.clock.record(self.inputs.job.dir)

    def log_if_due(self, state: TrainState, result: StepResult) -> None:
        """Log the step that `state` has come to, if its turn has come. Every rank must call."""
        step, steps = state.step, self.train.steps
        if step % self.train.log_every and step != steps:
            return
        step_tokens = self.inputs.step_tokens
        means = (dist.sum_over_ranks(result.loss_sums) / step_tokens).tolist()
        weighted = zip(self.loss_weights.tolist(), means, strict=True)
        losses = {"loss": sum(weight * mean for weight, mean in weighted)}
        if len(means) > 1:
            losses |= dict(zip(("ce_loss", "distil_loss"), means, strict=True))
        seconds = self.timer.seconds_per_step()
        self._log_step(state, losses, result, seconds)
        self._bar.set_postfix_str(f"loss {losses['loss']:.3f}, {step_tokens / seconds:,.0f} tokens/s")
        self.pace = f"{step_tokens / seconds:,.0f} tokens/s"
        if step < steps:
            self.pace += f", {(steps - step) * seconds / 60:.1f} min left"
        self.timer.restart()

    def _log_step(self, state: TrainState, losses: dict, result: StepResult, seconds: float) -> None:
        """Add a row to metrics.jsonl. `losses` are means over the step's tokens on all ranks, `seconds` is
        the time of a step."""
        step_tokens, norm = self.inputs.step_tokens, result.grad_norm
        flops = self.flops_per_token * step_tokens / seconds
        peak = find_peak_flops(self.inputs.device)
        memory = measure_peak_memory(self.inputs.device)
        if self.metrics is None:
            return
        row = {
            "step": state.step,
            "tokens": state.tokens,
            **losses,
            "lr": result.lr,
            "grad_norm": None if norm is None else float(norm),
            "step_s": round(seconds, 5),
            "tokens_per_s": round(step_tokens / seconds, 1),
            "mfu": round(flops / (peak * dist.get_world_size()), 4) if peak else None,
            "peak_memory_gb": round(memory.get("allocated", memory["resident"]) / 1e9, 3),
            "skipped_steps": result.skipped_steps,
        }
        self.metrics.add(row)

    def close(self) -> None:
        self._bar.close()
