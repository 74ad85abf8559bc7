"""The run: steps over all tenants, looks at held-out text, checkpoints, and the adapters at its end."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsc_serve.machine import default_threads
from dsc_serve.model.architectures import Settings, architecture_of
from dsc_serve.model.architectures.family import as_stored
from dsc_serve.model.checkpoint import open_source
from dsc_serve.model.peft import write_adapter
from dsc_serve.model.peft.modules import Base
from dsc_serve.model.peft.tensors import Matrices
from dsc_serve.model.source import ModelSource
from dsc_serve.train.adapt.network import AdaptedNetwork, Updates
from dsc_serve.train.adapt.settings import AdapterRunSettings, LowRankSettings
from dsc_serve.train.adapt.tenants import clip, fresh_updates, tenants_of
from dsc_serve.train.allocator import keep_memory
from dsc_serve.train.checkpoint import Checkpoints, claim_folder, load_state, save_state, write_whole
from dsc_serve.train.clock import TrainingClock
from dsc_serve.train.plots import line_chart, write_plots
from dsc_serve.train.record import Progress, Record, read_log
from dsc_serve.train.settings import TrainError

ADAPTERS = "adapters"  # of a run's folder: what `serve --adapters` takes
LOG = "log.jsonl"
FINAL_WINDOWS = 64  # of each text, at most, that the end is measured on
PROBE_ROWS = 2


class AdapterTrainer:
    """One run in one folder; started again on the same folder it goes on from its last checkpoint.

    The folder holds settings.json, tokenizer/ and data/, state.pt, log.jsonl, *.svg, summary.json and, at the end, the
    adapters, one folder for each text. time_limit: seconds for everything, over all starts; it replaces `steps`.
    final_windows: held-out windows of each text, at most, that the end is measured on. prepared: another folder, whose
    tokenizer/ and data/ are used instead, or made there.
    Raises TrainError, CheckpointError and ConfigError in one line.
    """

    def __init__(
        self,
        settings: AdapterRunSettings,
        base: Path,
        texts: Sequence[Path],
        folder: Path,
        name: str,
        time_limit: float | None = None,
        prepared: Path | None = None,
    ) -> None:
        keep_memory()
        self.settings, self.folder, self.name = settings, folder, name
        self.final_windows = FINAL_WINDOWS
        self.clock = TrainingClock(time_limit, settings.steps)
        named = {"base": name, "texts": sorted(path.name for path in texts)}
        claim_folder(folder, LOG, {**named, **settings.model_dump(mode="json")})
        source = open_source(base)
        self._take(source)
        self.config = source.config
        state = load_state(folder / "state.pt", torch.device("cpu"))
        torch.set_num_threads(state["threads"] if state else settings.threads or default_threads())
        place = prepared or folder
        tokenizer = tokenizer_of(source, place / "tokenizer")
        self.tenants = tenants_of(texts, settings, tokenizer, self.config.vocab_size, place / "data")
        weights = {name: tensor.float() for name, tensor in source.weights().items()}
        self._draw(weights)
        self.network = self._network(weights, state["dtype"] if state else settings.dtype)
        self.optimiser = torch.optim.AdamW(self._groups(), lr=settings.rate, weight_decay=0.0, foreach=True)
        self.step = self.tokens = 0
        if state is not None:
            self._resume(state)
        lost = max((line["seconds"] for line in read_log(folder / LOG)), default=0.0)
        self.clock.before = max(self.clock.before, lost)
        self.record = Record(folder / LOG, self.step or -1)

    def _take(self, source: ModelSource) -> None:
        """What is kept of a base. Raises TrainError for one that cannot be trained on."""
        check_base(source, self.settings.length)
        self.base = Base(source.config, source.origin)

    def _draw(self, weights: Mapping[str, Tensor]) -> None:
        """The numbers that are trained, as they begin."""
        self.updates = {
            key: (torch.nn.Parameter(down), torch.nn.Parameter(up))
            for key, (down, up) in fresh_updates(self.config, self.lora, self.tenants).items()
        }
        if not self.updates:
            raise TrainError(f"modules is {list(self.lora.modules)}, and the base has none of them")

    def _pairs(self) -> Updates:
        """What is trained, as the network takes it."""
        return self.updates

    @property
    def lora(self) -> LowRankSettings:
        assert isinstance(self.settings, LowRankSettings)
        return self.settings

    def _groups(self) -> list[dict[str, Any]]:
        """What is trained, with its rate as a part of the settings'."""
        return [{"params": [tensor for pair in self.updates.values() for tensor in pair], "factor": 1.0}]

    def run(self, until: int | None = None, stop_at: float | None = None) -> dict[str, Any] | None:
        """Train to the end and write the adapters; returns what summary.json says. A finished run only returns it.

        until: the step after which the run stops where it is, and nothing is returned. stop_at: a time of
        time.monotonic(); a run whose next step, or whose end, would go beyond it stops likewise.
        """
        done = self.folder / "summary.json"
        if done.is_file():
            summary: dict[str, Any] = json.loads(done.read_text("utf8"))
            return summary
        if self.step == 0:
            self._look()
            self.clock.begin()
        settings, progress = self.settings, Progress(self.clock.share(self.step))
        checkpoints, logged = Checkpoints(self.clock, settings.checkpoint_s, self._save), self.clock.spent
        counted, losses = self.tokens, []
        while (share := self.clock.share(self.step)) < 1:
            if (until is not None and self.step >= until) or self._late(self.clock.longest, stop_at):
                progress.close()
                self._save()
                return None
            began = self.clock.spent
            factor = rate_factor(self.step, share, settings)
            found, norms = self._step(factor)
            losses.append(found)
            if self.step % settings.log_steps == 0:
                speed = (self.tokens - counted) / (self.clock.spent - logged)
                line = self._line(torch.stack(losses).mean(0), norms, factor, speed)
                self.record.write(line)
                progress.show(self.clock.share(self.step), line)
                losses, logged, counted = [], self.clock.spent, self.tokens
            if self.step % settings.evaluate_steps == 0:
                before = self.clock.spent
                self._look()
                logged += self.clock.spent - before
            checkpoints.look()
            self.clock.longest = max(self.clock.longest, self.clock.spent - began)
        progress.close()
        self._save()
        return None if self._late(self.clock.reserve, stop_at) else self._finish()

    def _late(self, seconds: float, stop_at: float | None) -> bool:
        return stop_at is not None and time.monotonic() + seconds > stop_at

    def _network(self, weights: Mapping[str, Tensor], dtype: str) -> AdaptedNetwork:
        """In the dtype that is named, or under "auto" in the one in which a small step takes less time here."""
        made = {
            name: self._made(weights, getattr(torch, name))
            for name in (("float32", "bfloat16") if dtype == "auto" else (dtype,))
        }
        if len(made) == 1:
            self.dtype = dtype
            return made[dtype]
        windows = torch.zeros(len(self.tenants), 1, self.settings.length + 1, dtype=torch.int64)[:PROBE_ROWS]
        times = {}
        for name, network in made.items():
            for _ in range(2):  # the first warms
                began = time.perf_counter()
                self._backward(network, windows)
                times[name] = time.perf_counter() - began
        for group in self._groups():
            for tensor in group["params"]:
                tensor.grad = None
        self.dtype = min(times, key=times.__getitem__)
        return made[self.dtype]

    def _made(self, weights: Mapping[str, Tensor], dtype: torch.dtype) -> AdaptedNetwork:
        return AdaptedNetwork(self.config, weights, self.lora.alpha / self.lora.rank, dtype, torch.device("cpu"))

    def _backward(self, network: AdaptedNetwork, windows: Tensor) -> Tensor:
        """Adds to the gradients; returns the loss of each of the first tenants, one for each of the windows' rows."""
        kind, tenants = network.weights["model.norm.weight"].dtype, len(windows)
        used = {key: (down[:tenants].to(kind), up[:tenants].to(kind)) for key, (down, up) in self._pairs().items()}
        losses = torch.stack(network.losses(used, windows))
        losses.sum().backward()  # type: ignore[no-untyped-call]
        return losses.detach()

    def _step(self, factor: float) -> tuple[Tensor, Tensor]:
        """One update of every tenant; returns the losses [N] and the gradients' norms [N] before clipping."""
        settings = self.settings
        windows = torch.stack([own.sampler.take(settings.rows, settings.length) for own in self.tenants])
        losses = self._backward(self.network, windows)
        norms = self._clip()
        if not bool(torch.isfinite(norms).all()):
            name = self.tenants[int((~torch.isfinite(norms)).nonzero()[0])].name
            raise TrainError(f"{name}: the gradient at step {self.step} is not finite; lower the rate")
        for group in self.optimiser.param_groups:
            group["lr"] = settings.rate * factor * group["factor"]
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.step += 1
        self.tokens += windows.shape[0] * settings.rows * settings.length
        return losses, norms

    def _clip(self) -> Tensor:
        return clip(self.updates, self.settings.clip)

    def _loss(self, tenant: int, windows: Tensor, adapted: bool) -> Tensor:
        """Of windows of one tenant alone. windows int64 [1, rows, T + 1]."""
        kind, i = self.network.weights["model.norm.weight"].dtype, tenant
        own = {k: (down[i : i + 1].to(kind), up[i : i + 1].to(kind)) for k, (down, up) in self._pairs().items()}
        (loss,) = self.network.losses(own if adapted else {}, windows)
        return loss

    def held_out(self, windows: int, adapted: bool = True) -> dict[str, tuple[float, float]]:
        """Nats per token and bits per byte by text, of so many held-out windows at most; adapted: with the adapters."""
        found = {}
        for i, tenant in enumerate(self.tenants):
            nats, tokens, size = 0.0, 0, 0
            (text,) = tenant.corpus.sources
            for window, count in list(tenant.corpus.held_windows(text, self.settings.length))[:windows]:
                with torch.no_grad():
                    loss = self._loss(i, window[None, None], adapted)
                nats += float(loss) * (len(window) - 1)
                tokens, size = tokens + len(window) - 1, size + count
            found[tenant.name] = nats / tokens, nats / math.log(2) / size
        return found

    def _look(self) -> None:
        began = self.clock.spent
        found = self.held_out(self.settings.evaluate_windows)
        self.clock.reserve = 2.6 * (self.clock.spent - began) * self.final_windows / self.settings.evaluate_windows
        loss = sum(loss for loss, _ in found.values()) / len(found)
        self.record.write(
            {
                "step": self.step,
                "seconds": round(self.clock.spent, 1),
                "tokens": self.tokens,
                "held_out_loss": round(loss, 5),
                "held_out_bits_per_byte": {name: round(bits, 5) for name, (_, bits) in found.items()},
            }
        )

    def _line(self, losses: Tensor, norms: Tensor, factor: float, speed: float) -> dict[str, Any]:
        return {
            "step": self.step,
            "seconds": round(self.clock.spent, 1),
            "tokens": self.tokens,
            "loss": round(float(losses.mean()), 5),
            "losses": {own.name: round(float(loss), 5) for own, loss in zip(self.tenants, losses, strict=True)},
            "rate": round(factor, 5),
            "gradient_norm": round(float(norms.max()), 4),
            "tokens_per_second": round(speed),
        }

    def _save(self) -> None:
        state = {
            "updates": {name: [tensor.detach() for tensor in own] for name, own in self._numbers().items()},
            "optimiser": self.optimiser.state_dict(),
            "step": self.step,
            "tokens": self.tokens,
            "drawn": {own.name: own.sampler.drawn for own in self.tenants},
            "began": self.clock.began,
            "reserve": self.clock.reserve,
            "spent": self.clock.spent,
            "longest": self.clock.longest,
            "dtype": self.dtype,
            "threads": torch.get_num_threads(),
        }
        save_state(state, self.folder / "state.pt")

    def _resume(self, state: dict[str, Any]) -> None:
        for name, tensors in self._numbers().items():
            for own, stored in zip(tensors, state["updates"][name], strict=True):
                own.data.copy_(stored)
        self.optimiser.load_state_dict(state["optimiser"])
        self.step, self.tokens = state["step"], state["tokens"]
        for tenant in self.tenants:
            tenant.sampler.drawn = state["drawn"][tenant.name]
        self.clock.began, self.clock.reserve = state["began"], state["reserve"]
        self.clock.before, self.clock.longest = state["spent"], state["longest"]

    def _numbers(self) -> dict[str, Sequence[Tensor]]:
        """All that is trained, as checkpoints name it."""
        return {f"{layer}.{module}": pair for (layer, module), pair in self.updates.items()}

    def _write(self) -> None:
        """The adapters, as `serve` takes them."""
        names = {parts[0]: own.name for own in self.base.modules.values() for parts in own.parts}
        for i, tenant in enumerate(self.tenants):
            modules = {
                names[key]: Matrices(down[i].detach().clone(), up[i].detach().clone())
                for key, (down, up) in self.updates.items()
            }
            write_adapter(self.folder / ADAPTERS / tenant.name, self.name, self.lora.alpha, modules)

    def _finish(self) -> dict[str, Any]:
        before, after = self.held_out(self.final_windows, adapted=False), self.held_out(self.final_windows)
        self._write()
        self.record.close()
        self._plot()
        summary = {
            "base": self.name,
            "steps": self.step,
            "tokens": self.tokens,
            "seconds": round(self.clock.spent, 1),
            "dtype": self.dtype,
            "threads": torch.get_num_threads(),
            "bits_per_byte": {
                name: {"base": round(before[name][1], 5), "adapted": round(bits, 5)}
                for name, (_, bits) in after.items()
            },
        }
        write_whole(self.folder / "summary.json", json.dumps(summary, indent=2) + "\n")
        return summary

    def _plot(self) -> None:
        lines = self.record.lines
        write_plots(lines, self.folder)
        looks = [line for line in lines if "held_out_bits_per_byte" in line]
        series = {
            own.name: [(line["tokens"] / 1e6, line["held_out_bits_per_byte"][own.name]) for line in looks]
            for own in self.tenants
        }
        chart = line_chart("Held out, by text", "million tokens", "bits per byte", series)
        (self.folder / "texts.svg").write_text(chart, "utf8")


def rate_factor(step: int, share: float, settings: AdapterRunSettings) -> float:
    rise = min(1.0, (step + 1) / settings.warmup) if settings.warmup else 1.0
    return rise * (settings.final + (1 - settings.final) * (1 + math.cos(math.pi * min(share, 1.0))) / 2)


def check_base(source: ModelSource, length: int) -> None:
    """Raises TrainError where adapters of a base are served but not trained."""
    origin = source.origin
    if origin is not None:
        family = architecture_of(Settings(origin.content, origin.path))
        if family.conversion is not as_stored:
            names = origin.content.get("architectures")
            raise TrainError(
                f"{source.path}: the base is of the family {names!r}, whose weights are brought into another form; "
                "adapters of it are served, and trained with PEFT"
            )
    if length > source.config.max_position_embeddings:
        raise TrainError(f"length is {length}; the base's context is {source.config.max_position_embeddings}")


def tokenizer_of(source: ModelSource, folder: Path) -> Path:
    """The base's tokenizer as files. Raises TrainError where it has none."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = source.texts()
    if not texts:
        raise TrainError(f"{source.path}: the base has no tokenizer; texts cannot become its tokens")
    for name, text in texts.items():
        (folder / name).write_text(text, "utf8")
    return folder
