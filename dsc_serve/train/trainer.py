"""The training run: steps, held-out evaluations, checkpoints, and the exported model at its end."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsc_serve.machine import default_threads
from dsc_serve.model.decoder import parameter_counts
from dsc_serve.model.initial import initial_tensors
from dsc_serve.train.allocator import keep_memory
from dsc_serve.train.checkpoint import Checkpoints, claim_folder, load_state, save_state, write_whole
from dsc_serve.train.clock import TrainingClock
from dsc_serve.train.corpus import Corpus, WindowSampler, prepare
from dsc_serve.train.export import export_model
from dsc_serve.train.ffn import Pass
from dsc_serve.train.network import Network
from dsc_serve.train.optimiser import Optimiser, rate_factor
from dsc_serve.train.plots import write_plots
from dsc_serve.train.record import Progress, Record, read_log
from dsc_serve.train.revive import revive
from dsc_serve.train.settings import TrainError, TrainingPhase, TrainSettings
from dsc_serve.train.usage import TrainingUsage

MODEL = "model"
LOG = "log.jsonl"


@dataclass(frozen=True)
class HeldOut:
    """Loss on held-out windows: nats per token over all, bits per byte of each source and over all bytes."""

    loss: float
    bits_per_byte: float
    sources: dict[str, float]
    tokens: int
    dead: list[int]  # per layer, the members of its bank that no token picked; empty for a dense FFN
    members: int  # of all layers


class Trainer:
    """One run in one folder; started again on the same folder it goes on from its last checkpoint.

    The folder holds settings.json, data/ (tokens and tokenizer), state.pt, log.jsonl, *.svg, summary.json and, at the
    end, model/ in the serving form. time_limit: seconds for everything, over all starts; it replaces `schedule.steps`.
    Raises TrainError and ConfigError in one line.
    """

    def __init__(
        self,
        settings: TrainSettings,
        texts: Sequence[Path],
        folder: Path,
        device: str = "cpu",
        time_limit: float | None = None,
        data: Path | None = None,
    ) -> None:
        keep_memory()
        self.settings, self.folder = settings, folder
        self.clock = TrainingClock(time_limit, settings.schedule.steps)
        self.device = torch.device(device)
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise TrainError("device is cuda, but torch sees no CUDA device here")
        claim_folder(folder, LOG, settings.model_dump(mode="json"))
        state = load_state(folder / "state.pt", self.device)
        torch.set_num_threads(state["threads"] if state else settings.run.threads or default_threads())
        vocabulary = settings.model.get("vocab_size")
        if not isinstance(vocabulary, int):
            raise TrainError(f"[model] vocab_size is {vocabulary!r}, expected a whole number")
        self.corpus: Corpus = prepare(texts, settings.data, vocabulary, data or folder / "data")
        self.config = settings.model_config_for(self.corpus.tokenizer.eos_token_id)
        self.sampler = WindowSampler(self.corpus.train, settings.run.seed)
        self.dtype = getattr(torch, settings.run.dtype)
        self.network = Network(self.config, self.dtype, self.device)
        fresh = initial_tensors(self.config, settings.run.seed, torch.float32)
        self.masters = {name: torch.nn.Parameter(tensor.to(self.device)) for name, tensor in fresh}
        self.working = {n: m.detach().to(self.dtype, copy=True).requires_grad_() for n, m in self.masters.items()}
        self.optimiser = Optimiser(self.masters, settings.optimiser)
        self.step, self.tokens, self.stepping = 0, 0, 0.0
        self.recent, self.since_revival = TrainingUsage(), TrainingUsage()
        if state is not None:
            self._resume(state)
        lost = max((line["seconds"] for line in read_log(folder / LOG)), default=0.0)
        self.clock.before = max(self.clock.before, lost)
        self.record = Record(folder / LOG, self.step or -1)  # the look before the first step is taken again

    def run(self, give_up: float | None = None) -> dict[str, Any] | None:
        """Train to the end and export; returns what summary.json says. A finished run only returns it.

        give_up: seconds over all starts after which the run stops where it is, and nothing is returned.
        """
        done = self.folder / "summary.json"
        if done.is_file():
            summary: dict[str, Any] = json.loads(done.read_text("utf8"))
            return summary
        if self.step == 0:
            self._evaluate()
            self.clock.begin()
        run, progress = self.settings.run, Progress(self.clock.share(self.step))
        checkpoints, logged = Checkpoints(self.clock, run.checkpoint_s, self._save), self.clock.spent
        counted = self.tokens
        losses: list[float] = []
        while (share := self.clock.share(self.step)) < 1:
            if give_up is not None and self.clock.spent > give_up:
                self._save()
                return None
            phase = next(phase for phase in self.settings.schedule.phases if share < phase.until)
            factor = rate_factor(self.step, share, self.settings.schedule)
            began = self.clock.spent
            loss, norm = self._step(phase, factor)
            self.stepping += self.clock.spent - began
            losses.append(loss)
            if self.step % run.log_steps == 0:
                speed = (self.tokens - counted) / (self.clock.spent - logged)
                line = self._line(sum(losses) / len(losses), norm, factor, phase.length, speed)
                self.record.write(line)
                progress.show(self.clock.share(self.step), line)
                losses, logged, counted, self.recent = [], self.clock.spent, self.tokens, TrainingUsage()
            if self.step % run.evaluate_steps == 0:
                before = self.clock.spent
                self._evaluate()
                logged += self.clock.spent - before
            checkpoints.look()
            self.clock.longest = max(self.clock.longest, self.clock.spent - began)
        progress.close()
        self._save()
        return self._finish()

    def measure(self, steps: int) -> tuple[float, float, float]:
        """Seconds of a step (the median of so many, after one), of the full and of a short held-out evaluation."""
        self._step(self.settings.schedule.phases[-1], 0.0)
        times = []
        for _ in range(steps):
            began = self.clock.spent
            self._step(self.settings.schedule.phases[-1], 0.0)
            times.append(self.clock.spent - began)
        began = self.clock.spent
        found = self.held_out(self.settings.run.evaluate_windows)
        short = self.clock.spent - began
        full = short * sum(source.held for source in self.corpus.sources) / found.tokens
        return statistics.median(times), full, short

    def held_out(self, windows: int | None = None) -> HeldOut:
        """Loss over windows of the model's whole context without overlap: all of them, or that many per source."""
        length = self.config.max_position_embeddings
        nats = bits = size = tokens = 0.0
        sources, usage = {}, TrainingUsage()
        rows = max(1, self.settings.schedule.micro_tokens // length)
        for source in self.corpus.sources:
            taken = list(self.corpus.held_windows(source, length))[:windows]
            own_nats, own_bytes = 0.0, sum(count for _, count in taken)
            for start in range(0, len(taken), rows):
                batch = torch.stack([window for window, _ in taken[start : start + rows]]).to(self.device)
                with torch.no_grad():
                    outcome = self.network(self.working, batch, Pass(self.settings.losses, training=False))
                count = batch.shape[0] * (batch.shape[1] - 1)
                own_nats += float(outcome.loss) * count
                tokens += count
                usage.add(outcome.layers)
            sources[source.name] = own_nats / math.log(2) / own_bytes
            nats, size = nats + own_nats, size + own_bytes
        bits = nats / math.log(2)
        return HeldOut(nats / tokens, bits / size, sources, int(tokens), usage.dead, sum(map(len, usage.picks)))

    def _step(self, phase: TrainingPhase, factor: float) -> tuple[float, float]:
        """One update; returns the mean loss and the gradient's norm before clipping."""
        windows = self.sampler.take(phase.step_tokens // phase.length, phase.length).to(self.device)
        total = 0.0
        routed: list[Tensor | None] = []
        rows = max(1, self.settings.schedule.micro_tokens // phase.length)
        for i, part in enumerate(torch.split(windows, rows)):
            weight = len(part) / len(windows)
            noise = (self.settings.run.seed << 40) + (self.step << 8) + i  # of the pass; each layer makes its own of it
            mode = Pass(self.settings.losses, noise=noise, frame=0.0 if i else 1 / weight)
            outcome = self.network(self.working, part, mode)
            ((outcome.loss + outcome.terms) * weight).backward()  # type: ignore[no-untyped-call]
            total += float(outcome.loss.detach()) * weight
            for name, working in self.working.items():
                master = self.masters[name]
                if working.grad is not None:
                    grad = working.grad.float()
                    master.grad = grad if master.grad is None else master.grad.add_(grad)
                    working.grad = None
            routed = [trace.routed for trace in outcome.layers]
            self.recent.add(outcome.layers, weight)
            self.since_revival.add(outcome.layers, weight)
        norm = float(torch.nn.utils.clip_grad_norm_(self.masters.values(), self.settings.optimiser.clip))
        if not math.isfinite(norm):
            raise TrainError(f"the gradient at step {self.step} is not finite; lower the rate or raise the warm-up")
        self.optimiser.step(factor)
        self.step += 1
        self.tokens += phase.step_tokens
        self._revive(routed)
        with torch.no_grad():
            for name, working in self.working.items():
                working.copy_(self.masters[name])
        return total, norm

    def _revive(self, routed: Sequence[Tensor | None]) -> None:
        run = self.settings.run
        over = self.clock.share(self.step) > run.revive_until
        if not run.revive_steps or self.step % run.revive_steps or over or self.config.ffn.kind != "dsc":
            return
        revived = []
        for i, (picks, rows) in enumerate(zip(self.since_revival.picks, routed, strict=True)):
            assert rows is not None
            prefix, seed = f"model.layers.{i}.mlp.", (run.seed << 40) + (self.step << 8) + i
            revived.append(revive(self.masters, prefix, picks, rows, self.optimiser, seed))
        self.since_revival = TrainingUsage()
        self.record.write({"step": self.step, "seconds": round(self.clock.spent, 1), "revived": revived})

    def _evaluate(self) -> None:
        """A look at some held-out windows; also tells how long the full evaluation at the end will take."""
        began = self.clock.spent
        found = self.held_out(self.settings.run.evaluate_windows)
        took = self.clock.spent - began
        self.clock.reserve = 1.3 * took * sum(source.held for source in self.corpus.sources) / found.tokens
        line = {
            "step": self.step,
            "seconds": round(self.clock.spent, 1),
            "tokens": self.tokens,
            "held_out_loss": round(found.loss, 5),
            "held_out_bits_per_byte": round(found.bits_per_byte, 5),
        }
        self.record.write(line)

    def _line(self, loss: float, norm: float, factor: float, length: int, speed: float) -> dict[str, Any]:
        return {
            "step": self.step,
            "seconds": round(self.clock.spent, 1),
            "tokens": self.tokens,
            "loss": round(loss, 5),
            "rate": round(factor, 5),
            "gradient_norm": round(norm, 4),
            "length": length,
            "tokens_per_second": round(speed),
            "used": self.recent.used,
            "signal": self.recent.signal,
        }

    def _resume(self, state: dict[str, Any]) -> None:
        for name, tensor in state["masters"].items():
            self.masters[name].data.copy_(tensor)
            self.working[name].data.copy_(tensor)
        self.optimiser.load(state["optimiser"])
        self.step, self.tokens, self.stepping = state["step"], state["tokens"], state["stepping"]
        self.sampler.drawn = state["drawn"]
        self.since_revival = TrainingUsage(state["picks"])
        self.clock.began, self.clock.reserve = state["began"], state["reserve"]
        self.clock.before, self.clock.longest = state["spent"], state.get("longest", 0.0)

    def _save(self) -> None:
        state = {
            "masters": {name: master.detach() for name, master in self.masters.items()},
            "optimiser": self.optimiser.state(),
            "step": self.step,
            "tokens": self.tokens,
            "stepping": self.stepping,
            "drawn": self.sampler.drawn,
            "picks": self.since_revival.picks,
            "began": self.clock.began,
            "reserve": self.clock.reserve,
            "spent": self.clock.spent,
            "longest": self.clock.longest,
            "threads": torch.get_num_threads(),
        }
        save_state(state, self.folder / "state.pt")

    def _finish(self) -> dict[str, Any]:
        dtype = getattr(torch, self.settings.run.export)
        export_model(self.config, self.masters, dtype, self.corpus.folder, self.folder / MODEL)
        found = self.held_out()
        total, active = parameter_counts(self.config)
        summary = {
            "kind": self.config.ffn.kind,
            "parameters": total,
            "active_parameters": active,
            "steps": self.step,
            "tokens": self.tokens,
            "corpus_tokens": len(self.corpus.train),
            "training_seconds": round(self.stepping, 1),
            "seconds": round(self.clock.spent, 1),
            "threads": torch.get_num_threads(),
            "device": str(self.device),
            "held_out_loss": round(found.loss, 5),
            "held_out_bits_per_byte": round(found.bits_per_byte, 5),
            "held_out_tokens": found.tokens,
            "sources": {name: round(bits, 4) for name, bits in found.sources.items()},
            "dead": found.dead,
            "members": found.members,
        }
        self.record.close()
        write_plots(self.record.lines, self.folder)
        write_whole(self.folder / "summary.json", json.dumps(summary, indent=2) + "\n")
        return summary
