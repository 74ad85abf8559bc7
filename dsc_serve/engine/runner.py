"""The runner: from requests and token counts to the model's inputs, and from its outputs to tokens."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from itertools import compress

import numpy as np
import torch
from torch import Tensor

from dsc_kernels import ops
from dsc_kernels.plan import Planner
from dsc_serve.config import EngineConfig
from dsc_serve.engine import sampler
from dsc_serve.engine.adapter_runs import DRAFTED, SINGLE, adapter_runs, by_kind, by_kind_and_adapter, kind_of, no_runs
from dsc_serve.engine.captured import CapturedSteps
from dsc_serve.engine.constraints import answered, answered_ahead, constrain
from dsc_serve.engine.draft_rows import single_rows
from dsc_serve.engine.graph_budget import USUAL, GraphBudget
from dsc_serve.engine.graph_forms import StepOutput
from dsc_serve.engine.graphs import Capture, capture_for
from dsc_serve.engine.inputs import Inputs
from dsc_serve.engine.output import TokenLogprobs
from dsc_serve.engine.pack import Work, pack
from dsc_serve.engine.picks import StepPicks
from dsc_serve.engine.position import Position, PositionAhead, agreed
from dsc_serve.engine.request import Request
from dsc_serve.engine.routing import RoutingWatch
from dsc_serve.engine.sampler import Sampler, is_greedy, logprobs, to_device
from dsc_serve.engine.step_result import Launched, StepResult
from dsc_serve.engine.token_feed import TokenFeed
from dsc_serve.kv_layout import blocks_for
from dsc_serve.model.batch import Chunk, StepBatch
from dsc_serve.model.decoder import Decoder, dsc_layers
from dsc_serve.model.ffn.picks import Picks
from dsc_serve.sampling_params import EngineCapacity

HEAD_ROWS = 64  # most prompt rows whose logits exist at a time
TILED = (1, 16, 32, 64, 128, 256)  # tokens up to which Triton's products have tiles of their own


class Runner:
    """Runs steps of at most `step_tokens` tokens of `max_running` requests over its own KV pools.

    Input buffers and pools are allocated once; a step fills them in place. With `capture`, steps of single tokens, also
    for drafts, and such with chunks of prompts are captured here and replayed later, and what other steps need is
    compiled; the pools have one block more, which rows of padding write to. adapted: whether requests may have
    adapters. ahead: whether steps may be launched before the tokens of the last one have been read. graph_budget: what
    capturing may take.
    """

    inputs_kind: type[Inputs] = Inputs

    def __init__(
        self,
        model: Decoder,
        capacity: EngineCapacity,
        step_tokens: int,
        max_running: int,
        capture: Capture | None = None,
        int8_kv: bool = False,
        adapted: bool = False,
        ahead: bool = False,
        graph_budget: GraphBudget = USUAL,
        spare: bool = False,
    ) -> None:
        if capacity.kv_windows != model.groups.windows:
            raise ValueError(f"kv_windows is {capacity.kv_windows}; the model has {model.groups.windows}")
        self.model, self.block_size = model, capacity.block_size
        self._spare_block, self._max_context_len = capacity.num_blocks, capacity.max_tokens
        has_spare = spare or capture is not None
        self.kv_caches = model.kv_caches(capacity.num_blocks + has_spare, capacity.block_size, int8_kv)
        self._most_tokens = min(step_tokens, max_running * self._max_context_len)
        self._place = by_kind_and_adapter if adapted else by_kind
        self._adapter_runs = adapter_runs if adapted else no_runs
        self.sampler = Sampler(model.config.eos_token_ids)
        width = blocks_for(capacity.max_tokens, capacity.block_size)
        self._inputs = self.inputs_kind(step_tokens, max_running, width, model.device, len(capacity.kv_windows))
        self._feed: TokenFeed | None = None
        if ahead:
            self._feed = TokenFeed(model.config.vocab_size, max_running, model.device)
        keys = {cache.keys.data_ptr(): cache for cache in self.kv_caches}.values()  # groups of layers share theirs
        self._pools = [part for cache in keys for part in ((cache.keys,) if cache.latent else cache)]
        self._layers = dsc_layers(model)
        banks = [layer.index for layer in model.layers if layer.ffn in self._layers]
        vocabulary = model.config.vocab_size
        self.routing = RoutingWatch(self._layers, step_tokens, vocabulary, banks) if self._layers else None
        self.graphs: CapturedSteps | None = None
        self.captured = ""  # what was, in words
        if capture is not None:
            self.graphs = self._captured(max_running, step_tokens, capture, graph_budget)
            began = time.perf_counter()
            self.warm_up()
            self.captured = f"{self.graphs.told}; {time.perf_counter() - began:.1f} s for what steps without one need"

    @torch.inference_mode()
    def _captured(self, max_running: int, step_tokens: int, capture: Capture, budget: GraphBudget) -> CapturedSteps:
        if self._feed is None:
            drawn = torch.zeros(max_running, dtype=torch.int64, device=self.model.device)
        else:
            drawn = self._feed.drawn  # where the next step looks its token ids up
        backend = ops.backend(self.model.dtype, self.model.device)
        placing = all(backend.places_chunks(cache) for cache in self.kv_caches)
        sizes = max_running, step_tokens if placing else 0, self._max_context_len, self._spare_block
        work = self.model, self._layers_of, self._inputs
        return CapturedSteps(*work, *sizes, drawn, self._replayed, capture, budget)

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Compile what eager steps and drawing from them need before requests wait for it; needs the spare block."""
        for tokens in sorted({min(size, self._most_tokens) for size in (*TILED, self._most_tokens)}):
            self._compute_nothing(tokens)
        sampler.prepare(self.model.config.vocab_size, self.model.device)
        for planner in self._planners():
            planner.count_anew()

    def _compute_nothing(self, tokens: int) -> None:
        """A step of nobody's chunks."""
        starts = range(0, tokens, self._max_context_len)
        chunks = []
        self._inputs.wait()
        self._inputs.pad(0, tokens, self._spare_block)
        for row, start in enumerate(starts):
            count = min(self._max_context_len, tokens - start)
            self._inputs.columns[1][start : start + count] = np.arange(count)
            self._inputs.rows[row] = count
            chunks.append(Chunk(row, start, count, count))
        inputs = self._inputs.on_device(tokens, len(chunks))
        self._layers_of(StepBatch(*inputs, 0, 0, tuple(chunks)))

    def _planners(self) -> list[Planner]:
        return [layer.planner for layer in self._layers if layer.planner is not None]

    def _replayed(self, rows: int) -> None:
        """A replay asks no planner, but it is a step that counts."""
        for planner in self._planners():
            planner.grouped(rows)

    def run(self, work: Work) -> StepResult:
        """Compute the given number of new tokens of each request and sample where that is all of them.

        What is more than all of them are its first drafts: a token is drawn after each of these too.
        """
        if torch.is_inference_mode_enabled():  # the engine's loop switches once: switching takes 1 % of a short step
            return self._run(work)
        with torch.inference_mode():
            return self._run(work)

    @property
    def flies(self) -> bool:
        """Whether steps may be launched now: made for it, and nobody looks at what every step picks."""
        return self._feed is not None and (self.routing is None or self.routing.on_picks is None)

    @torch.inference_mode()
    def launch(self, work: Work) -> Launched:
        """Have a device compute a step of requests none of which needs the host, and go on without waiting for it.

        Their tokens may be those that the step launched before this one has not drawn yet.
        """
        assert self._feed is not None, "this runner was not made to launch steps ahead"
        started = time.perf_counter()
        ordered = sorted(work, key=self._place)
        if self.routing is not None:
            self.routing.begin(sum(count for _, count in ordered), len(ordered))
        output = self._output(ordered, None)
        if self.routing is not None:
            self.routing.record(ordered, None, output.hidden.shape[0])
        forward_s = time.perf_counter() - started
        ends = np.cumsum([count for _, count in ordered]).tolist()
        drawing = [i for i, (request, count) in enumerate(ordered) if count == request.num_uncomputed]
        requests = [ordered[i][0] for i in drawing]
        tokens = self._next_tokens(output, [ends[i] - 1 for i in drawing], requests)
        places = {request.id: self._feed.first + i for i, request in enumerate(requests)}
        return Launched(places, self._feed.keep(tokens, placed=tokens is output.tokens), forward_s)

    def _next_tokens(self, output: StepOutput, rows: list[int], requests: Sequence[Request]) -> Tensor:
        """Tokens int64 [R] that follow rows of a step, where they lie."""
        if not rows:
            return torch.zeros(0, dtype=torch.int64, device=output.hidden.device)
        if output.tokens is not None or all(map(is_greedy, requests)):
            return output.greedy(self.model, rows)
        return self.sampler.draw(output.rows_of_logits(self.model, rows), requests)

    def _run(self, work: Work) -> StepResult:
        started = time.perf_counter()
        ordered = sorted(work, key=self._place)
        picks: list[Picks] | None = [] if any(request.params.routing for request, _ in ordered) else None
        if self.routing is not None:
            self.routing.begin(sum(count for _, count in ordered), len(ordered))
        output = self._output(ordered, picks)
        hidden = output.hidden
        if self.routing is not None:
            self.routing.record(ordered, self._inputs.columns[0], hidden.shape[0])
        result = StepResult(forward_s=time.perf_counter() - started)
        rows: list[int] = []
        requests: list[Request] = []
        ahead: list[tuple[int, PositionAhead]] = []  # with their rows
        drafted: dict[str, int] = {}
        start = 0
        for request, count in ordered:
            own = request.num_uncomputed
            if request.reads_prompt and request.reported < request.prompt_size:
                self._report_prompt(request, hidden[start : start + count], result)
            if count >= own and request.max_tokens > 0:
                rows += [start + own - 1] * (1 + len(request.siblings))  # choices begin with the same logits
                requests.append(request)
                requests += request.siblings
                if count > own:
                    drafted[request.id] = count - own
                    ahead += [(start + own - 1 + n, PositionAhead(request, n)) for n in range(1, count - own + 1)]
            start += count
        if not all(request.may_sample for request in requests):
            may, result.waited_s = answered(requests, result.forward_s, len(requests) < len(ordered))
            result.late = {request.id for request, known in zip(requests, may, strict=True) if not known}
            known = [not result.late.intersection(waits_for(request)) for request in requests]
            rows, requests = list(compress(rows, known)), list(compress(requests, known))
            ahead = [(row, position) for row, position in ahead if position.request.id not in result.late]
        if ahead:
            result.foreseen_s = answered_ahead([position for _, position in ahead], result.forward_s, len(ordered) == 1)
            ahead = [(row, position) for row, position in ahead if position.known]
        if requests:
            rows += [row for row, _ in ahead]
            self._draw(output, rows, requests, [position for _, position in ahead], drafted, result)
        if picks is not None:
            self._report_picks(ordered, StepPicks(picks), result)
        if drafted and self.routing is not None:
            self.routing.keep(np.concatenate([np.arange(*rows) for _, rows in kept_rows(ordered, result)]))
        return result

    def _draw(
        self,
        output: StepOutput,
        rows: list[int],
        requests: list[Request],
        ahead: list[PositionAhead],
        drafted: dict[str, int],
        result: StepResult,
    ) -> None:
        """Draw the next token of each request, and one after each draft: the rows are theirs, then those ahead."""
        positions: list[Position] = [*requests, *ahead]
        entries: dict[int, TokenLogprobs] = {}
        if output.tokens is not None or all(map(is_greedy, positions)):
            tokens = sampler.read(output.greedy(self.model, rows))
        else:
            tokens, entries = self._sample(output.rows_of_logits(self.model, rows), positions, result)
        count = len(requests)
        result.tokens = {request.id: token for request, token in zip(requests, tokens[:count], strict=True)}
        if entries:
            result.logprobs = {request.id: entries[i] for i, request in enumerate(requests) if i in entries}
        if drafted:
            after = {i - count: entry for i, entry in entries.items() if i >= count}
            result.further = agreed(result.tokens, drafted, ahead, tokens[count:], after)

    @torch.inference_mode()
    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy KV blocks, each pair's first to its second, as if all at once: one's source may be another's target."""
        sources, targets = to_device(torch.tensor(pairs), self.model.device).unbind(1)
        for part in self._pools:
            part[targets] = part[sources]

    def _output(self, ordered: Work, picks: list[Picks] | None) -> StepOutput:
        """What a step gave, replayed where one like it was captured."""
        if self.graphs is not None and picks is None:
            ordered = single_rows(ordered, self.graphs.most)
        size, kinds = len(ordered), [kind_of(*pair) for pair in ordered]
        decodes, drafted = kinds.count(SINGLE), kinds.count(DRAFTED)
        self._inputs.wait()
        chunks = self.pack(ordered, decodes, drafted)
        runs = self._adapter_runs(ordered)
        if self.graphs is not None and picks is None and not runs:
            replayed = self.graphs.step(ordered, chunks)
            if replayed is not None:
                return replayed
        inputs = self._inputs.on_device(sum(count for _, count in ordered), size)
        # As it was captured: another one may need another kernel, and so a compiler.
        max_context_len = self._max_context_len
        if self.graphs is None:
            max_context_len = max((request.num_computed + 1 for request, _ in ordered[:decodes]), default=0)
        return StepOutput(self._layers_of(StepBatch(*inputs, decodes, max_context_len, chunks, runs, drafted), picks))

    def _layers_of(self, batch: StepBatch, picks: list[Picks] | None = None) -> Tensor:
        if self._feed is not None:
            batch = batch._replace(token_ids=self._feed.resolve(batch.token_ids))
        return self.model.hidden(batch, self.kv_caches, picks)

    def pack(self, ordered: Work, decodes: int, drafted: int) -> tuple[Chunk, ...]:
        """Write a step's inputs to the buffers."""
        return pack(self._inputs, ordered, decodes, drafted, self.block_size)

    def _sample(
        self, logits: Tensor, positions: list[Position], result: StepResult
    ) -> tuple[list[int], dict[int, TokenLogprobs]]:
        """A token for each row of logits, and the log probabilities of those that are asked for, by row."""
        reporting = [i for i, position in enumerate(positions) if position.params.logprobs is not None]
        raw = logits[reporting] if reporting else None  # a copy: sampling changes the logits
        result.stuck = constrain(logits, positions)
        tokens = self.sampler(logits, positions)
        if raw is None:
            return tokens, {}
        top = [positions[i].params.logprobs or 0 for i in reporting]
        entries = logprobs(raw, [tokens[i] for i in reporting], top)
        return tokens, dict(zip(reporting, entries, strict=True))

    def _report_picks(self, ordered: Work, picks: StepPicks, result: StepResult) -> None:
        for request, (start, end) in kept_rows(ordered, result):
            routing = picks.report(request, start, end - start) if request.params.routing else None
            if routing is not None:
                result.routing |= dict.fromkeys([request.id, *(one.id for one in request.siblings)], routing)

    def _report_prompt(self, request: Request, hidden: Tensor, result: StepResult) -> None:
        """Report of the prompt positions among a chunk's rows what has not been reported before."""
        first = max(request.num_computed, request.reported)
        end = min(request.num_computed + hidden.shape[0], request.prompt_size)
        if request.pooler is not None:
            start = first + request.pooler.skipped(first, end)
            if start < end:
                rows = self.model.norm(hidden[start - request.num_computed : end - request.num_computed])
                request.collected.append(request.pooler.part(rows))
            request.reported = end
            if end == request.prompt_size:
                result.embeddings[request.id] = request.pooler.vector(request.collected)
            return
        entries: list[TokenLogprobs | None] = [None] if first == 0 else []
        for start in range(first, end, HEAD_ROWS):
            stop = min(start + HEAD_ROWS, end)
            logits = self.model.logits(hidden[start - request.num_computed : stop - request.num_computed])
            if request.collect is not None:
                request.collected.append(request.collect(start, logits))
            if request.params.prompt_logprobs is not None:
                targets = request.tokens[start + 1 : min(stop + 1, request.prompt_size)]
                top = [request.params.prompt_logprobs] * len(targets)
                entries += logprobs(logits[: len(targets)], targets, top)
        for one in (request, *request.siblings):
            one.reported = max(request.reported, end)
            if one.params.prompt_logprobs is not None:
                result.prompt_logprobs[one.id] = entries


def runner_of(model: Decoder, config: EngineConfig, capacity: EngineCapacity) -> Runner:
    """A runner of a whole model, as the configuration says."""
    capture = capture_for(model.dtype, model.device)
    flies = config.step_ahead == "auto" and model.device.type != "cpu"
    graphs = GraphBudget(config.graphs, config.graph_mb << 20, config.graph_capture_s)
    options = capture, config.kv_dtype == "int8", bool(config.adapters), flies, graphs
    return Runner(model, capacity, config.step_tokens, config.max_running, *options)


def kept_rows(ordered: Work, result: StepResult) -> Iterator[tuple[Request, tuple[int, int]]]:
    """A step's requests, each with its first row and the one after its last that is no wrong draft's."""
    start = 0
    for request, count in ordered:
        further = result.further.get(request.id)
        kept = request.num_uncomputed + (0 if further is None else len(further.tokens))
        yield request, (start, start + min(count, kept))
        start += count


def waits_for(request: Request) -> tuple[str, ...]:
    """Whose grammars must have answered before a request is sampled: its own, and its leader's."""
    return (request.id,) if request.leader is None else (request.id, request.leader.id)
