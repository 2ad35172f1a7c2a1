"""`train EXPERIMENT --run NAME`: one run (or one stage of a grown run), from its start to final/ and DONE.

Reading order: train, train_job, Trainer.fit, Trainer.train_step. A finished run is a no-op. An interrupted
one resumes from its newest complete checkpoint, with the same bits at the same number of ranks.
"""

import gc
import time

import numpy as np
import torch

from inheritune.config.experiment import load_experiment
from inheritune.data.batches import Tokens, check_some_shards, read_share
from inheritune.data.corpus_changes import check_corpus
from inheritune.data.tokenizer import check_vocabulary
from inheritune.engines import checkpoint, dslint, weight_export
from inheritune.engines.adamw import compute_gradient_norm, compute_learning_rate, set_learning_rate
from inheritune.engines.background import Saves
from inheritune.engines.casts import keep_casts
from inheritune.engines.deepspeed_json import load_deepspeed_json
from inheritune.engines.deepspeed_keys import saves_in_background
from inheritune.engines.engine import has_finite_weights, release_groups
from inheritune.engines.memory import count_held_bytes, measure_peak_memory
from inheritune.errors import Stopped, UserError
from inheritune.files import writing
from inheritune.files.json_files import write_json
from inheritune.files.lock import Lock
from inheritune.files.processes import get_node_name
from inheritune.files.rundir import get_data_dir
from inheritune.models.networks import count_flops_per_token
from inheritune.models.sizes import FORWARD_SHARE
from inheritune.runs import changes, identity, shapes
from inheritune.runs.comparison import compute_interval
from inheritune.runs.job import Job
from inheritune.runtime import dist, job_reports, node_checks, rendezvous, signals, watchdog
from inheritune.runtime.log import logger, set_up_logging
from inheritune.training import losses, validate
from inheritune.training.bad_steps import (
    MAX_BAD_STEPS,
    damage_error,
    describe_bad_step,
    explain_bad_step,
    write_bad_steps,
)
from inheritune.training.clocks import StartClock
from inheritune.training.inputs import RunInputs, check_same_files
from inheritune.training.record import open_metrics
from inheritune.training.results import write_results
from inheritune.training.start import StartedRun, start_run
from inheritune.training.state import StepResult, TrainState
from inheritune.training.step_log import StepLog
from inheritune.training.stopping import StopRequest, StopRequests


def train(
    experiment: str,
    run: str,
    seed: int = 0,
    stage: int | None = None,
    ds: str | None = None,
    rehearse: bool | None = None,
) -> None:
    """Train `run` of `experiment`, or several ('a,b') one after the other, on the ranks of this launch, with
    the DeepSpeed JSON `ds` (default: the experiment's)."""
    loaded = load_experiment(experiment, rehearse)
    jobs = [Job(loaded, name, seed, stage) for name in run.split(",")]
    for job in jobs:
        _check_trainable(job, experiment)
    for job in jobs:
        train_job(job, ds)
        # parameters of ZeRO refer to each other in rings: the next run must not find them on its GPU
        gc.collect()
        if dist.get_device().type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def _check_trainable(job: Job, experiment: str) -> None:
    """Raise UserError if the run cannot be trained, or not without a stage."""
    if external := job.run.init.external:
        raise UserError(
            f"run '{job.name}' is a finished third-party model ({external.source}); evaluate or analyze it"
        )
    if job.run.grow and not job.stage:
        raise UserError(
            f"run '{job.name}' grows by stages; use 'grow {experiment} --run {job.name}', or give --stage N"
        )
    if job.stage:
        job.depths()
    changes.check_kind(job.root, is_grown=job.run.grow is not None)
    shapes.check_sources(job.experiment, [job.name])


def train_job(job: Job, ds: str | None = None) -> None:
    """Train `job` with the DeepSpeed JSON `ds` (default: the experiment's)."""
    if job.dir.is_done():
        _report_done(job)
        return
    job_reports.report_run(job.dir.path)
    path = ds or job.settings.deepspeed
    deepspeed = load_deepspeed_json(path)
    clock = StartClock(first=not torch.distributed.is_initialized())
    clock.end("imports")
    dist.init_distributed()
    set_up_logging()
    checked = node_checks.compare_nodes(get_data_dir(job.experiment))
    check_same_files(job, deepspeed, path)
    clock.end("preflight")
    tokens = _open_tokens(job)
    logger.info("%s", checked)
    inputs = RunInputs.of(job, deepspeed, tokens)
    ranks = dist.get_world_size()
    for warning in dslint.check_at_start(path, deepspeed, job.experiment.model, inputs.train, ranks):
        if dist.get_rank() == 0:
            logger.warning("%s", warning)
    clock.end("data")
    lock = Lock(job.dir.path, signals.get_stop_signal)
    dist.run_on_rank0(lock.acquire)
    clock.end("lock")
    try:
        if not dist.run_on_rank0(job.dir.is_done):  # another job may have finished it while this one waited
            # the watchdog reports before the collectives give up
            with watchdog.Watchdog(rendezvous.get_collective_timeout_s() * 3 / 4) as watch:
                stops = StopRequests(job, watch)
                started = start_run(inputs, stops, clock, watch)
                Trainer(inputs, started, lock, stops, clock, watch).fit(started.state)
                release_groups()
    finally:
        if dist.get_rank() == 0:
            lock.release()


def _report_done(job: Job) -> None:
    if dist.get_rank() == 0:
        print(f"{job.title()} is finished: {job.dir.final}")
        if note := changes.describe_change_since(job.dir, job):
            print(f"note: {note}; to train that, start a run of another name")


def _open_tokens(job: Job) -> Tokens:
    """Open the training data. Raises UserError on every rank if it is damaged or not that of the
    experiment."""
    # before the data is opened: that of another experiment lies in another folder, or does not exist
    dist.run_on_rank0(identity.check_unchanged, job, job.settings, changes.UNRESOLVED)
    tokens = Tokens.of(job.experiment, "train")
    dist.run_on_rank0(check_corpus, job.experiment, tokens.folder)
    check_vocabulary(
        tokens.vocab_size, job.experiment.model.vocab_size, f"model.vocab_size of {job.experiment.name}"
    )
    check_some_shards(tokens.folder)
    return tokens


class Trainer:
    """The loop over the steps of one run, and what is due between them: validation, kept weights,
    checkpoints.

    `state` is all that must survive a restart beside the engine and the random generators."""

    def __init__(
        self,
        inputs: RunInputs,
        started: StartedRun,
        lock: Lock,
        stops: StopRequests,
        clock: StartClock,
        watch: watchdog.Watchdog,
    ):
        self.inputs, self.job, self.train = inputs, inputs.job, inputs.train
        self.engine, self.config, self.teacher = started.engine, started.config, started.teacher
        self.lock, self.stops, self.clock, self.watch = lock, stops, clock, watch
        self.saves = Saves(saves_in_background(inputs.deepspeed, inputs.device.type == "cuda"))
        self.saved_step = 0 if started.resumed_at is None else started.state.step
        """Step of the newest checkpoint, which `saves` may still be writing; 0 without one."""
        self.held: dict[str, int] = {}
        """Bytes that the engine holds at the last step (`count_held_bytes`)."""
        # DeepSpeed averages over ranks and accumulation steps; this makes it the mean over the step's real
        # tokens
        self.loss_scale = dist.get_world_size() * inputs.share.accumulation / inputs.step_tokens
        parts = [self.teacher.alpha, 1 - self.teacher.alpha] if self.teacher else [1.0]
        self.loss_weights = torch.tensor(parts, device=inputs.device)
        """Of the cross-entropy and, with a teacher, of the divergence from it."""
        self.flops_per_token = count_flops_per_token(self.engine.module.config, inputs.length)
        if self.teacher:
            self.flops_per_token += (
                count_flops_per_token(self.teacher.source.config, inputs.length) * FORWARD_SHARE
            )
        self.metrics = open_metrics(self.job, self.train, started.resumed_at)
        self.log = StepLog(
            inputs, started.state, clock, self.metrics, self.loss_weights, self.flops_per_token
        )

    def fit(self, state: TrainState) -> None:
        """Train from `state` to DONE. Raises Stopped, with everything saved, when asked to stop before."""
        try:
            request = self._train_steps(state) or self._finish(state)
            if request:
                self._leave(state, request)
        finally:
            self.saves.close()

    def _train_steps(self, state: TrainState) -> StopRequest | None:
        """Train up to the last step, or until asked to stop."""
        self.engine.train()
        request = self._validate_and_save(state)  # an earlier start may have stopped before it
        self.clock.end("validation")
        self.log.timer.restart()
        while request is None and state.step < self.train.steps:
            result = self.train_step(state)
            self.log.count_step()
            if result.is_applied:
                state.bad = []
                self.log.log_if_due(state, result)
            else:
                self._skip_step(state, result)
            with self.log.timer.paused():  # a step's time is that of training
                request = self._validate_and_save(state)
        self.log.close()
        return request

    def train_step(self, state: TrainState) -> StepResult:
        """Train on the next global batch, in `share.accumulation` micro steps, and advance `state`.

        The loss is the mean cross-entropy of the tokens. With a teacher it is alpha times that, plus
        (1 - alpha) times the mean divergence from the teacher."""
        engine, step = self.engine, state.step + 1
        self.watch.at(f"step {step}: reading its batch")
        windows, weights = self._read_batch(step)  # (A, M, T + 1), (A, M)
        lr = compute_learning_rate(step, self.train)
        set_learning_rate(engine, lr)
        loss_sums = torch.zeros(len(self.loss_weights), dtype=torch.float64, device=self.inputs.device)
        with keep_casts(engine):
            for window, weight in zip(windows, weights, strict=True):  # (M, T + 1), (M,)
                self.watch.at(f"step {step}: forward, backward and update")
                losses = self._forward(window, weight)
                loss = losses @ self.loss_weights * self.loss_scale
                # times 1, or nan where the loss is not finite: all ranks will see it in the gradient
                engine.backward(loss * (1 + 0 * loss.detach()))
                loss_sums += losses.detach()
                if engine.is_gradient_accumulation_boundary():
                    torch.clear_autocast_cache()  # the update makes other weights, and needs the memory
                    norm = compute_gradient_norm(engine)
                    if step == self.train.steps:
                        self.held = count_held_bytes(engine)  # while the gradients exist
                engine.step()
        state.step, state.tokens = step, step * self.inputs.step_tokens
        norm = engine.get_global_grad_norm() if norm is None else norm
        return StepResult(loss_sums, lr, norm, engine.was_step_applied(), engine.skipped_steps)

    def _read_batch(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return this rank's windows and their weights for step `step` (from 1), on its device."""
        device = self.inputs.device
        windows, weights = read_share(self.inputs.order, step - 1, self.inputs.share)
        return torch.from_numpy(windows).to(device), torch.from_numpy(weights).to(device)

    def _forward(self, window: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Sum the losses over the tokens of a micro batch, each window times its weight.

        Returns (1,), the cross-entropy, or (2,), with a teacher also the divergence from it. The logits, the
        largest tensor of all, are local to this function, so that backward frees them as soon as it has
        their gradient."""
        logits = self.engine(input_ids=window[:, :-1], use_cache=False).logits  # (M, T, V)
        parts = [losses.token_losses(logits, window[:, 1:])]  # each (M, T)
        if self.teacher:
            parts.append(self.teacher.divergences(window, logits))
        return torch.stack([part.sum(dim=1) @ weight for part in parts])

    def _skip_step(self, state: TrainState, result: StepResult) -> None:
        """Record a step that did not change the weights, with what a replay needs. Raises UserError after
        MAX_BAD_STEPS in a row."""
        bad_step = describe_bad_step(self.inputs, state.step, result.loss_sums)
        state.bad = [*state.bad, bad_step]
        dist.run_on_rank0(write_bad_steps, self.inputs, state.bad)
        if self.metrics:
            row = {"step": state.step, "tokens": state.tokens, "skipped_steps": result.skipped_steps}
            self.metrics.add(row)
        problem = explain_bad_step(self.job, bad_step)
        if len(state.bad) == MAX_BAD_STEPS:
            raise damage_error(self.job, f"{problem}, {MAX_BAD_STEPS} steps in a row", self.saved_step)
        logger.warning("%s: the step was skipped", problem)

    def _validate_and_save(self, state: TrainState) -> StopRequest | None:
        """Validate, keep weights and save a checkpoint, each if it is due at `state.step`; return the request
        to stop, if there is one."""
        step, train = state.step, self.train
        if request := self.stops.ask():
            return request
        self.saves.check()
        if step % train.eval_every == 0 and state.evaluated < step < train.steps:
            if self._validate(state) is None:
                return self.stops.latest
            state.evaluated = step
        if step in self.job.run.keep_at:
            self._keep_weights(step)
        if step % train.checkpoint_every == 0 and self.saved_step < step < train.steps:
            self._save(state)
            return self.stops.ask()  # a long save may have used up the time for another step
        return None

    def _keep_weights(self, step: int) -> None:
        """Write the weights of a step of `keep_at`, unless this run has kept them before."""
        folder, run = self.job.dir.kept(step), self.inputs.describe_run()
        if not dist.run_on_rank0(identity.is_kept, folder, run):
            self._check_weights(step)
            weight_export.export_weights(self.engine, folder, self.inputs.tokens.folder / "tokenizer", run)

    def _save(self, state: TrainState) -> None:
        """Write a checkpoint, or begin to. Raises UserError if another job has taken over the run."""
        job, train = self.job, self.train
        if dist.run_on_rank0(self.lock.lost):
            raise UserError(
                f"another job took this one for dead and took over {job.dir.path}: not saving; let it work"
            )
        self._check_weights(state.step)
        if self.metrics:
            self.metrics.sync()
        self.watch.at(f"saving after step {state.step}")
        checkpoint.save_checkpoint(
            self.engine,
            job.dir,
            state.to_dict(),
            self.inputs.deepspeed,
            train.keep_last,
            self.inputs.describe_run(),
            self.saves,
        )
        self.saved_step = state.step

    def _await_save(self) -> None:
        """Wait until the newest checkpoint is complete."""
        self.watch.at(f"waiting for the checkpoint of step {self.saved_step}")
        self.saves.wait()

    def _check_weights(self, step: int) -> None:
        """Raise UserError on every rank if a weight is not finite: such weights are never written."""
        if not has_finite_weights(self.engine):
            raise damage_error(self.job, f"a weight is not finite after step {step}", self.saved_step)

    def _validate(self, state: TrainState, final: bool = False) -> np.ndarray | None:
        """Validate on the windows of the loss curve, or on all if `final`, and add a row to metrics.jsonl.

        Returns the mean loss of each window, or None when asked to stop meanwhile: then nothing is recorded,
        and the next start validates again. Raises UserError if a loss is not finite."""
        inputs, step = self.inputs, state.step
        curve = validate.curve_windows(len(inputs.val_starts), self.train.eval_windows)
        starts = inputs.val_starts if final else inputs.val_starts[curve]
        losses = validate.window_losses(
            self.engine, inputs.val_tokens, inputs.length, starts, inputs.device, stop=self.stops.ask
        )
        if losses is None:
            return None
        if not np.isfinite(losses).all():
            problem = f"the validation loss is not finite after step {step}"
            raise damage_error(self.job, problem, self.saved_step)
        on_curve = compute_interval(losses[curve] if final else losses)
        if self.metrics:
            row = {"val_loss": on_curve["mean"], "val_windows": on_curve["n"]}
            self.metrics.add({"step": step, "tokens": state.tokens, **row})
            with (
                writing.replace_atomically(self.job.dir.losses(step)) as temporary,
                open(temporary, "wb") as file,
            ):
                np.save(file, losses)
        shown = (step, self.train.steps, on_curve["mean"], self.log.pace)
        logger.info("step %d of %d: validation loss %.4f (%s)", *shown)
        return losses

    def _finish(self, state: TrainState) -> StopRequest | None:
        """Validate on all windows, then write final/, results.json and DONE; return the request to stop, if
        one came before."""
        job, train = self.job, self.train
        losses = self._validate(state, final=True)
        if losses is None:
            return self.stops.latest
        self._await_save()
        weight_export.export_weights(self.engine, job.dir.final, self.inputs.tokens.folder / "tokenizer")
        memory = dist.gather_objects({**self.held, "peak": measure_peak_memory(self.inputs.device)})
        dist.run_on_rank0(write_results, self.inputs, self.config, losses, self.flops_per_token, memory)
        shown = (job.title(), losses.mean(), train.steps)
        logger.info("%s: finished, validation loss %.4f after %d steps", *shown)
        if self.metrics:
            self.metrics.close()
        return None

    def _leave(self, state: TrainState, request: StopRequest) -> None:
        """Save what is not saved yet and end this start. Raises Stopped."""
        job = self.job
        if state.step > self.saved_step:
            self._save(state)
        self._await_save()
        if self.metrics:
            self.metrics.close()
        facts = {"step": state.step, "why": str(request), "time": time.time(), "node": get_node_name()}
        dist.run_on_rank0(write_json, job.dir.stopped, facts)
        raise Stopped(
            f"{job.title()} stopped at step {state.step} of {self.train.steps} ({request}), all saved; the "
            f"same command resumes from there",
            again=request.may_restart,
        )
