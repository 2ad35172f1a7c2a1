"""`train EXPERIMENT --run NAME`: one run (or one stage of a grown run), from its start to final/ and DONE.

Reading order: train -> prepare_start -> Trainer.fit. The loop shows DeepSpeed's forward, backward and step. A
finished run is a no-op; an interrupted one goes on from its newest complete checkpoint, with the same bits at
the same world size.
"""

import gc
import json
import math
import os
import time

import numpy as np
import torch
import yaml

from inheritune.config import environment
from inheritune.config.experiment import load_experiment
from inheritune.data.batches import Order, Share, Tokens, check_some_shards, read_share
from inheritune.data.prepare import check_corpus
from inheritune.data.tokens import check_vocabulary
from inheritune.engines import checkpoint, dslint
from inheritune.engines.engine import (
    gradient_norm,
    held_bytes,
    learning_rate,
    load_json,
    peak_flops,
    peak_memory,
    release_groups,
    resolve_precision,
    set_learning_rate,
    start_engine,
    weights_are_finite,
    zero_stage,
)
from inheritune.errors import Stopped, UserError
from inheritune.files import rundir
from inheritune.files.lock import Lock
from inheritune.files.rundir import data_dir, node, read_json, write_json, write_text
from inheritune.models.architectures import clear_dropout, count_parameters, flops_per_token
from inheritune.models.sources import open_source
from inheritune.models.surgery import check_start
from inheritune.runs import identity
from inheritune.runs.comparison import compare, interval
from inheritune.runs.job import Job
from inheritune.runs.starts import prepare_start, source_of
from inheritune.runtime import dist, signals
from inheritune.runtime.log import logger, progress, setup
from inheritune.training import validate
from inheritune.training.distil import Teacher
from inheritune.training.record import Metrics, StartClock, record_provenance, start_wandb

BAD_STEPS = 3
"""Steps in a row whose loss or gradient is not finite, after which a run stops: a batch may be bad, but not
three."""


def train(
    experiment: str, run: str, seed: int = 0, stage: int | None = None, ds: str | None = None, rehearse=None
) -> None:
    """Train `run` of `experiment`, or several ('a,b') one after the other, on the ranks of this launch; see
    the module's docstring."""
    loaded = load_experiment(experiment, rehearse)
    jobs = [Job(loaded, name, seed, stage) for name in run.split(",")]
    for job in jobs:
        if job.run.init.external:
            raise UserError(
                f"run '{job.name}' is a finished model of others ({job.run.init.external.source}); only "
                f"evaluate or analyze it"
            )
        if job.run.grow and not stage:
            raise UserError(
                f"run '{job.name}' grows by stages; use 'grow {experiment} --run {job.name}', or give "
                f"--stage N"
            )
        if stage:
            job.depths()
    for job in jobs:
        train_job(job, ds)
        # parameters of ZeRO refer to each other in rings: the next run must not find them on its GPU
        gc.collect()
        if dist.device().type == "cuda":
            torch.cuda.empty_cache(), torch.cuda.reset_peak_memory_stats()


def train_job(job: Job, ds: str | None = None) -> None:
    """Train `job` with the DeepSpeed JSON `ds` (default: the experiment's)."""
    if job.dir.is_done():
        if dist.rank() == 0:
            print(f"{job.title()} is finished: {job.dir.final}")
            if note := identity.describe_change_since(job.dir, job):
                print(f"note: {note}; to train that, start a run of another name")
        return
    dist.tell_run(job.dir.path)
    path = ds or job.settings.deepspeed
    settings = load_json(path)
    clock = StartClock(first=not torch.distributed.is_initialized())
    clock.end("imports")
    dist.start()
    setup()
    preflight = dist.preflight(data_dir(job.experiment))
    check_same_files(job, settings, path)
    clock.end("preflight")
    # before the data is opened: that of another experiment lies in another folder, or is not there
    dist.on_rank0(identity.check_begun, job, job.settings, identity.UNRESOLVED)
    tokens = Tokens.of(job.experiment, "train")
    dist.on_rank0(check_corpus, job.experiment, tokens.folder)
    check_vocabulary(
        tokens.vocab_size, job.experiment.model.vocab_size, f"model.vocab_size of {job.experiment.name}"
    )
    check_some_shards(tokens.folder)
    logger.info("%s", preflight)
    trainer = Trainer(job, settings, tokens)
    for warning in dslint.report(
        path, dslint.lint(settings, job.experiment.model, trainer.train, dist.world())
    ):
        logger.warning("%s", warning) if dist.rank() == 0 else None
    clock.end("data")
    lock = Lock(job.dir.path, signals.asked_to_stop)
    dist.on_rank0(lock.acquire)
    clock.end("lock")
    trainer.clock = clock
    try:
        if not dist.on_rank0(job.dir.is_done):  # another job may have finished it while this one waited
            with dist.Watchdog(
                dist.patience_s() * 3 / 4
            ) as trainer.watch:  # it speaks before the collectives give up
                trainer.fit(lock)
                release_groups()
    finally:
        if dist.rank() == 0:
            lock.release()


def check_same_files(job: Job, settings: dict, path: str) -> None:
    """Raises UserError on every rank unless all ranks read the same experiment and the same DeepSpeed JSON
    `path`: a file on each node's own disk may differ, and nothing later would show it."""
    read = {
        f"experiment {job.experiment.name}": job.resolved(job.settings),
        f"DeepSpeed JSON {path}": settings,
    }
    for what, content in read.items():
        seen = dist.gather(json.dumps(content, sort_keys=True))
        other = next((r for r, its in enumerate(seen) if its != seen[0]), None)
        if other is not None:
            nodes = dist.gather(node())
            raise UserError(
                f"the {what} that rank {other} on {nodes[other]} reads is not that of rank 0 on {nodes[0]}; "
                f"put the file on a "
                f"disk that all nodes share, and start again"
            )


class Trainer:
    """One job on this launch's ranks: its data, engine and record."""

    def __init__(self, job: Job, settings: dict, tokens: Tokens):
        self.job, self.settings, self.tokens = job, settings, tokens
        self.device = dist.device()
        self.train = resolve_precision(job.settings, self.device)
        data = job.experiment.data
        self.length = data.sequence_length
        self.batch = self.train.batch_tokens // self.length
        self.order = Order(tokens, data.sampling, self.length, self.batch, job.seed)
        self.order.check_steps(self.train.steps)
        self.val_tokens = Tokens(tokens.folder, "val")
        self.val_starts = validate.final_windows(self.val_tokens, self.length, self.train.final_windows)
        ceiling = settings["train_micro_batch_size_per_gpu"]
        self.share = Share.of(self.batch, dist.rank(), dist.world(), ceiling)
        self.pace = "the start"
        self.why: str | None = None  # reason to stop before the end
        self.bad: list[dict] = []  # the steps up to now, in a row, that were not finite: see _note_bad_step
        self.next_look = 0.0
        self.arithmetic = self.share.describe(self.batch, dist.world(), ceiling, self.length)

    def fit(self, lock: Lock) -> None:
        """Everything from the start checkpoint to DONE. Raises Stopped, with all saved, when asked to leave
        before."""
        job, run_dir = self.job, self.job.dir
        self.lock = lock
        self.teacher = None
        if distil := job.run.distil:
            self.teacher = Teacher(distil, *dist.on_rank0(source_of, job, distil.teacher, distil.revision))
        dist.on_rank0(self._check_same_experiment)
        dist.on_rank0(self._check_reference)
        if self._asked_to_stop():
            raise Stopped(f"{job.title()} did not start: {self.why}", again="STOP" not in self.why)
        resume = checkpoint.find(run_dir)
        if resume is not None:
            dist.on_rank0(identity.check_checkpoint, job, self.train, self.tokens.fingerprint, resume)
        resized = resume is not None and checkpoint.is_resize(run_dir, resume, self.settings)
        self.clock.end("hashes of checkpoints")
        dist.on_rank0(rundir.remove_leftovers, run_dir.path)
        if resume is not None:
            dist.on_rank0(checkpoint.prune, run_dir, resume, self.train.keep_last)
        self.watch.at("loading the start or a checkpoint")
        start = dist.on_rank0(prepare_start, job)
        dist.on_rank0(check_start, start)
        source = open_source(str(start), check=False)
        identity.check_start_model(job, source.config, start)
        self.clock.end("making the start")
        if self.teacher:
            self.teacher.load(source.config, self.length, self.train.precision, self.device)
        setup(run_dir)
        if cleared := clear_dropout(source.config):
            logger.info(
                "dropout of the start is off, as in every run: %s",
                ", ".join(f"{k} {v}" for k, v in cleared.items()),
            )
        dist.on_rank0(self._record_start, start, resume)
        logger.info(
            "%s on %d rank(s), %s, ZeRO %s", job.title(), dist.world(), self.device, zero_stage(self.settings)
        )
        logger.info("%s", self.arithmetic)

        weights = (
            source
            if resume is None
            else open_source(str(run_dir.checkpoint(resume)), check=False)
            if resized
            else None
        )
        self.engine = start_engine(
            source.config, weights, self.settings, self.train, self.share.micro_batch, self.share.accumulation
        )
        self.clock.end("engine")
        state = {"step": 0, "tokens": 0, "data": self.tokens.fingerprint, "evaluated": -1, "bad": []}
        if resume is not None:
            state = (checkpoint.restore_resized if resized else checkpoint.restore)(
                self.engine, run_dir, resume
            )
            logger.info("resumed at step %d of %d", state["step"], self.train.steps)
            self.bad = state.get("bad", [])  # a start does not begin the count of bad steps anew
        self.clock.end("checkpoint")
        if state["step"] < self.train.steps:
            checkpoint.check_room(self.engine, run_dir)  # now, not after the first thousand steps
        self.saved = state["step"] if resume is not None else 0  # step of the newest checkpoint
        self._open_record(resume, state)
        if not (self._loop(state) and self._finish(state, source.config)):
            self._leave(state)

    def _loop(self, state: dict) -> bool:
        """Forward, backward, step; log, evaluate, save. `state` is all that must survive a restart beside the
        engine. False when asked to stop before the last step.

        The loss is the cross-entropy, with a teacher alpha of it + (1 - alpha) of the divergence from the
        teacher."""
        engine, train, share = self.engine, self.train, self.share
        device, step_tokens = self.device, self.batch * self.length
        # DeepSpeed averages over ranks and accumulation steps; this makes it the mean over the step's real
        # tokens
        scale = dist.world() * share.accumulation / step_tokens
        mix = torch.tensor(
            [self.teacher.alpha, 1 - self.teacher.alpha] if self.teacher else [1.0], device=device
        )
        engine.train()
        bar = progress(desc="training", unit="step", total=train.steps, initial=state["step"])
        go_on = self._between_steps(
            state
        )  # an earlier start may have stopped before what was due at this step
        self.clock.end("validation")
        self.held, t0, steps_since = {}, time.perf_counter(), 0
        while go_on and state["step"] < train.steps:
            step = state["step"] + 1
            self.watch.at(f"step {step}: reading its batch")
            windows, weights = (
                torch.from_numpy(a).to(device) for a in read_share(self.order, step - 1, share)
            )
            lr = learning_rate(step, train)
            set_learning_rate(engine, lr)
            sums = torch.zeros(len(mix), dtype=torch.float64, device=device)
            for window, weight in zip(windows, weights, strict=True):  # (M, T + 1), (M,)
                self.watch.at(f"step {step}: forward, backward and update")
                logits = engine(input_ids=window[:, :-1], use_cache=False).logits  # (M, T, V)
                parts = [validate.token_losses(logits, window[:, 1:])]  # each (M, T)
                parts += [self.teacher.divergences(window, logits)] if self.teacher else []
                del logits  # backward frees it, the largest tensor of all, as soon as it has its gradient
                losses = torch.stack([part.sum(dim=1) @ weight for part in parts])
                loss = losses @ mix * scale
                # times 1, or nan where the loss is not finite: then the gradient is not either, which all
                # ranks will see
                engine.backward(loss * (1 + 0 * loss.detach()))
                sums += losses.detach()
                norm = gradient_norm(engine) if engine.is_gradient_accumulation_boundary() else None
                if step == train.steps and engine.is_gradient_accumulation_boundary():
                    self.held = held_bytes(engine)  # while the gradients are there
                engine.step()
            state["step"], state["tokens"] = step, step * step_tokens
            bar.update()
            steps_since += 1
            if "first step" not in self.clock.parts:
                self.clock.end("first step")
                dist.rank() == 0 and self.clock.record(self.job.dir)

            if engine.was_step_applied():
                self.bad = state["bad"] = []
            else:
                self._note_bad_step(state, sums)
            if not self.bad and (step % train.log_every == 0 or step == train.steps):
                means = (dist.all_sum(sums) / step_tokens).tolist()
                loss = sum(part * mean for part, mean in zip(mix.tolist(), means, strict=True))
                seconds = (time.perf_counter() - t0) / steps_since
                parts = dict(zip(("ce_loss", "distil_loss"), means, strict=False)) if self.teacher else {}
                self._log_step(
                    state,
                    {"loss": loss, **parts},
                    lr,
                    engine.get_global_grad_norm() if norm is None else norm,
                    seconds,
                )
                bar.set_postfix_str(f"loss {loss:.3f}, {step_tokens / seconds:,.0f} tokens/s")
                self.pace = (
                    f"{step_tokens / seconds:,.0f} tokens/s, {(train.steps - step) * seconds / 60:.1f} min "
                    f"left"
                )
                t0, steps_since = time.perf_counter(), 0
            pause = time.perf_counter()
            go_on = self._between_steps(state)
            t0 += time.perf_counter() - pause  # a step's time is that of training
        bar.close()
        return go_on

    def _note_bad_step(self, state: dict, sums: torch.Tensor) -> None:
        """Record a step whose loss or gradient was not finite, and which the weights have therefore not
        taken, with what a replay needs; `sums` are this rank's sums of losses. Raises UserError after
        BAD_STEPS in a row."""
        job, share, step = self.job, self.share, state["step"]
        losses = (sums / (share.count * self.length)).tolist()
        starts = self.order.starts(step - 1)[share.first : share.first + share.count].tolist()
        losses = [loss if math.isfinite(loss) else None for loss in losses]  # JSON has no nan
        ranks = dist.gather({"node": node(), "losses": losses, "windows": starts})
        self.bad = state["bad"] = [*self.bad, {"step": step, "ranks": ranks}]
        facts = {
            "data": str(self.tokens.folder),
            "data_fingerprint": self.tokens.fingerprint,
            "seed": job.seed,
        }
        dist.on_rank0(
            write_json, job.dir.bad_batch, {**facts, "window_tokens": self.length + 1, "steps": self.bad}
        )
        if self.metrics:
            self.metrics.add(
                {"step": step, "tokens": state["tokens"], "skipped_steps": self.engine.skipped_steps}
            )
        where = [f"{r} ({its['node']})" for r, its in enumerate(ranks) if None in its["losses"]]
        what = f"the loss of rank {', '.join(where)}" if where else "the gradient"
        what += f" is not finite at step {step}, its batch is in {job.dir.bad_batch}"
        if len(self.bad) == BAD_STEPS:
            raise self._damaged(f"{what}, {BAD_STEPS} steps in a row")
        logger.warning("%s: the step was skipped", what)

    def _check_weights(self, state: dict) -> None:
        """Raises UserError on every rank if a weight is not finite: such weights are never written."""
        if not weights_are_finite(self.engine):
            raise self._damaged(f"a weight is not finite after step {state['step']}")

    def _damaged(self, what: str) -> UserError:
        good = (
            f"that of step {self.saved} is the last checkpoint"
            if self.saved
            else "there is no checkpoint yet"
        )
        return UserError(
            f"{self.job.title()}: {what}; {good}, and the same command goes on from there; if it comes here "
            f"again, lower "
            f"train.lr, or use precision fp32 or another node"
        )

    def _between_steps(self, state: dict) -> bool:
        """What is due at state["step"]: the curve's validation, kept weights, a checkpoint. False when asked
        to stop."""
        step, train, kept = state["step"], self.train, self.job.dir.kept(state["step"])
        if self._asked_to_stop():
            return False
        if step % train.eval_every == 0 and state["evaluated"] < step < train.steps:
            if self._evaluate(step, state["tokens"]) is None:
                return False
            state["evaluated"] = step
        if step in self.job.run.keep_at:
            run = identity.describe_run(self.job, self.train, self.tokens.fingerprint)
            if not dist.on_rank0(identity.is_kept, kept, run):
                self._check_weights(state)
                checkpoint.export_weights(self.engine, kept, self.tokens.folder / "tokenizer", run)
        if step % train.checkpoint_every == 0 and self.saved < step < train.steps:
            self._save(state)
            return not self._asked_to_stop()  # a long save may have used up the time for another step
        return True

    def _save(self, state: dict) -> None:
        if dist.on_rank0(self.lock.lost):
            raise RuntimeError(
                f"{self.job.dir.path} was taken over by another job, which took this one for dead: not saving"
            )
        self._check_weights(state)
        if self.metrics:
            self.metrics.sync()
        self.watch.at(f"saving after step {state['step']}")
        run = identity.describe_run(self.job, self.train, self.tokens.fingerprint)
        seconds = checkpoint.save(self.engine, self.job.dir, state, self.settings, self.train.keep_last, run)
        self.saved = state["step"]
        lead = environment.number("INHERITUNE_LEAD")
        if seconds > lead / 2:
            logger.warning(
                "saving took %.0f s of the %.0f s between the job's signal and its time limit: raise "
                "SITE_LEAD in "
                "slurm/site.sh to %.0f or more, or the work since the last checkpoint may be lost",
                seconds,
                lead,
                4 * seconds,
            )

    def _asked_to_stop(self) -> bool:
        """Whether any rank got a signal, or a STOP file lies in the run's folder; the same on every rank."""
        self.watch.at("between two steps or two batches of validation")
        reason = signals.asked_to_stop()
        if reason is None and dist.rank() == 0 and time.monotonic() > self.next_look:
            self.next_look = time.monotonic() + 1  # a shared disk need not be asked at every step
            stops = (
                str(self.job.root.stop),
                os.environ.get("INHERITUNE_STOP", ""),
            )  # and that of a growth that needs this run
            reason = next(
                (f"{stop} is there; delete it to go on" for stop in stops if os.path.isfile(stop)), None
            )
        self.why = dist.agree(reason)
        return self.why is not None

    def _leave(self, state: dict) -> None:
        """Save what is not yet saved and end this start. Raises Stopped."""
        if state["step"] > self.saved:
            self._save(state)
        if self.metrics:
            self.metrics.close()
        job = self.job
        what = f"{job.title()} stopped at step {state['step']} of {self.train.steps} ({self.why})"
        facts = {"step": state["step"], "why": self.why, "time": time.time(), "node": node()}
        dist.on_rank0(write_json, job.dir.stopped, facts)
        raise Stopped(f"{what}, all saved; the same command goes on from there", again="STOP" not in self.why)

    def _finish(self, state: dict, config) -> bool:
        """final/, the validation of the finished model on all windows, results.json, DONE. False when asked
        to stop."""
        run_dir, train = self.job.dir, self.train
        losses = self._evaluate(state["step"], state["tokens"], final=True)
        if losses is None:
            return False
        checkpoint.export_weights(self.engine, run_dir.final, self.tokens.folder / "tokenizer")
        memory = dist.gather({**self.held, "peak": peak_memory(self.device)})
        dist.on_rank0(self._write_results, losses, config, memory)
        logger.info(
            "%s: finished, validation loss %.4f after %d steps", self.job.title(), losses.mean(), train.steps
        )
        if self.metrics:
            self.metrics.close()
        return True

    def _evaluate(self, step: int, tokens_seen: int, final: bool = False) -> np.ndarray | None:
        """Validation on the curve's windows (all of them at the end); a row of metrics.jsonl.  -> per-window
        losses, or None when asked to stop meanwhile: then nothing is recorded, and the next start validates
        again."""
        curve = validate.curve_windows(len(self.val_starts), self.train.eval_windows)
        starts = self.val_starts if final else self.val_starts[curve]
        losses = validate.window_losses(
            self.engine, self.val_tokens, self.length, starts, self.device, stop=self._asked_to_stop
        )
        if losses is None:
            return None
        if not np.isfinite(losses).all():
            raise self._damaged(f"the validation loss is not finite after step {step}")
        on_curve = interval(losses[curve] if final else losses)
        if self.metrics:
            self.metrics.add(
                {
                    "step": step,
                    "tokens": tokens_seen,
                    "val_loss": on_curve["mean"],
                    "val_windows": on_curve["n"],
                }
            )
            with rundir.replacing(self.job.dir.losses(step)) as temporary, open(temporary, "wb") as file:
                np.save(file, losses)
        logger.info(
            "step %d of %d: validation loss %.4f (%s)", step, self.train.steps, on_curve["mean"], self.pace
        )
        return losses

    def _log_step(self, state: dict, losses: dict, lr: float, norm, seconds: float) -> None:
        flops = self.flops_per_token * self.batch * self.length / seconds
        peak = peak_flops(self.device)
        memory = peak_memory(self.device)
        if self.metrics:
            self.metrics.add(
                {
                    "step": state["step"],
                    "tokens": state["tokens"],
                    **losses,
                    "lr": lr,
                    "grad_norm": None if norm is None else float(norm),
                    "step_s": round(seconds, 5),
                    "tokens_per_s": round(self.batch * self.length / seconds, 1),
                    "mfu": round(flops / (peak * dist.world()), 4) if peak else None,
                    "peak_memory_gb": round(memory.get("allocated", memory["resident"]) / 1e9, 3),
                    "skipped_steps": self.engine.skipped_steps,
                }
            )

    def _check_reference(self) -> None:
        """Raises UserError now, not after the training, if the result could not be compared with the
        reference."""
        here = {"data_fingerprint": self.tokens.fingerprint, "precision": self.train.precision}
        here["windows"] = validate.describe_windows(self.val_starts, self.length)
        compare(self.job, np.zeros(len(self.val_starts)), here)

    def _check_same_experiment(self) -> None:
        """Raises UserError if the run folder belongs to another experiment or other data than asked for
        now."""
        run_dir = self.job.dir
        identity.check_begun(self.job, self.train)
        identity.check_stages_before(self.job, self.train)
        if run_dir.provenance.is_file():
            first = run_dir.read_starts("data_fingerprint")[0]
            identity.check_origin(self.job, first.get("start_weights") or {})
            if self.teacher and self.teacher.files != (first.get("teacher") or {}).get("files"):
                raise UserError(
                    f"{run_dir.path} was taught by {first['teacher']['folder']}, whose weights are not those "
                    f"of "
                    f"{self.teacher.source.folder} now; restore them or start a run of another name"
                )
            data = first["data_fingerprint"]
            if data != self.tokens.fingerprint:
                raise UserError(
                    f"{run_dir.path} was trained on data {data}, {self.tokens.folder} now holds "
                    f"{self.tokens.fingerprint}; "
                    f"restore that data or start a run of another name"
                )

    def _record_start(self, start, resume: int | None) -> None:
        run_dir = self.job.dir
        run_dir.stopped.unlink(missing_ok=True)
        write_text(run_dir.experiment, yaml.safe_dump(self.job.resolved(self.train), sort_keys=False))
        record_provenance(
            run_dir,
            data_fingerprint=self.tokens.fingerprint,
            start=str(start),
            start_source=read_json(start / "inherited.json").get("source"),
            start_weights=identity.describe_origin(self.job),
            resumed_at=resume,
            teacher=self.teacher and {"folder": str(self.teacher.source.folder), "files": self.teacher.files},
            device=str(self.device),
            precision=self.train.precision,
            deepspeed=self.settings,
            batch=self.arithmetic,
        )

    def _open_record(self, resume: int | None, state: dict) -> None:
        job = self.job
        self.flops_per_token = flops_per_token(self.engine.module.config, self.length)
        if self.teacher:  # of its forward and backward passes only the forward one, a third
            self.flops_per_token += flops_per_token(self.teacher.source.config, self.length) / 3
        self.metrics = None
        if dist.rank() == 0:
            mirror = start_wandb(
                job.dir, job.experiment, job.name, self.train.wandb, self.train.wandb_project
            )
            self.metrics = Metrics(job.dir, -1 if resume is None else resume, mirror)

    def _write_results(self, losses: np.ndarray, config, memory: list[dict]) -> None:
        job, run_dir = self.job, self.job.dir
        results = {
            "experiment": job.experiment.name,
            "rehearsal": job.experiment.rehearsal,
            "run": job.name,
            "stage": job.stage,
            "seed": job.seed,
            "layers": config.num_hidden_layers,
            "parameters": count_parameters(config),
            "steps": self.train.steps,
            "tokens": self.train.steps * self.train.batch_tokens,
            "train_flops": self.flops_per_token * self.train.steps * self.train.batch_tokens,
            "precision": self.train.precision,
            "data_fingerprint": self.tokens.fingerprint,
            "windows": validate.describe_windows(self.val_starts, self.length),
            "validation": interval(losses),
            "memory": memory,
        }
        results.update(compare(job, losses, results))
        record = ("metrics.jsonl", f"validation/step_{self.train.steps}.npy")
        results["record"] = rundir.hash_folder(run_dir.path, only=record)
        done = {"final": rundir.hash_folder(run_dir.final)}
        write_json(run_dir.results, {**results, "weights": rundir.seal_of(done["final"])})
        write_json(run_dir.done, done)
