"""The steps of a runner that are captured: which graph computes a step, what it reads, and what it gives.

A step with chunks of prompts is captured for a number of single tokens and one of all tokens. It lies in the inputs as
it does without a graph: its chunks begin behind the single tokens that there are. Those that the graph has besides are
sequences with empty contexts; attention gives zeros for them, which the chunks' own overwrites. Where the chunks are,
how long, and after how much of their prompts, is data.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from dsc_kernels.chunks import PlacedChunks
from dsc_serve.engine.device_inputs import CHUNKS
from dsc_serve.engine.graph_budget import GraphBudget, GraphKey, buckets, chosen, idle_rows, told
from dsc_serve.engine.graph_forms import FORMS, LAYERS, HeadRoom, LayersAlone, StepOutput, form_of
from dsc_serve.engine.graphs import Capture, StepGraphs
from dsc_serve.engine.inputs import Inputs
from dsc_serve.engine.request import Request
from dsc_serve.model.batch import Chunk, StepBatch
from dsc_serve.model.decoder import Decoder


class CapturedSteps:
    """Steps of at most `max_running` single tokens, captured here and replayed when there is one like them, and such of
    at most `step_tokens` tokens with chunks of prompts; step_tokens: 0 where these cannot be.

    layers: what computes the layers of a batch, [T, d]. inputs: where batches lie. spare_block: of the KV pools, which
    rows of padding write to. drawn: int64 [≥ max_running], where tokens go that a graph draws. replays: is told of the
    rows of each step that is replayed.
    """

    def __init__(
        self,
        model: Decoder,
        layers: Callable[[StepBatch], Tensor],
        inputs: Inputs,
        max_running: int,
        step_tokens: int,
        max_context_len: int,
        spare_block: int,
        drawn: Tensor,
        replays: Callable[[int], None],
        capture: Capture,
        budget: GraphBudget,
    ) -> None:
        self._model, self._layers, self._inputs, self._replays = model, layers, inputs, replays
        self._max_running, self._max_context_len, self._spare_block = max_running, max_context_len, spare_block
        config, itemsize, sizes = model.config, model.dtype.itemsize, buckets(max_running)
        keys = chosen(config, sizes, itemsize, budget, step_tokens)
        kept = max((key.decodes for key in keys if FORMS[key.form].keeps_logits), default=0)
        self._room = HeadRoom(drawn, kept, config.vocab_size)
        self.graphs = StepGraphs(keys, self._ready, self._computed, capture, budget.seconds)
        self.most = self.graphs.most()  # single tokens of a step
        self.told = told(config, self.graphs.keys, itemsize, self.graphs.capture_s, sizes, step_tokens)
        self._idle_rows = idle_rows(config)

    def _requests(self, key: GraphKey) -> int:
        """Rows of tables that a graph reads."""
        return min(key.decodes + (CHUNKS if key.tokens else 0), self._max_running)

    def _ready(self, key: GraphKey) -> None:
        """Let all that the inputs hold be padding."""
        self._inputs.wait()
        self._inputs.pad(0, self._requests(key), self._spare_block)
        self._inputs.pad_columns(0, key.rows, self._spare_block)
        self._inputs.place(())
        self._inputs.on_device(key.rows, self._requests(key), placed=bool(key.tokens))

    def _computed(self, key: GraphKey) -> Tensor:
        size, context = (key.rows, self._requests(key)), self._max_context_len
        chunks: tuple[Chunk, ...] | PlacedChunks = ()
        if key.tokens:
            chunks = PlacedChunks(self._inputs.chunk_places(*size), key.rows, context)
        hidden = self._layers(StepBatch(*self._inputs.held(*size), key.decodes, context, chunks))
        FORMS[key.form].finish(self._model, hidden, self._room)
        return hidden

    def key(self, form: LayersAlone, count: int) -> GraphKey | None:
        """The graph that so many single tokens are replayed with: of the step's form, or another one for its layers."""
        found = (self.graphs.key(name, count) for name in dict.fromkeys((form.name, LAYERS.name, *FORMS)))
        return next((key for key in found if key is not None), None)

    def step(self, ordered: Sequence[tuple[Request, int]], chunks: Sequence[Chunk]) -> StepOutput | None:
        """A step that the inputs hold, replayed; None where no graph holds it. chunks: of those of its requests that
        have several tokens, the last ones.

        In a graph of another form only the layers are of use to it.
        """
        if chunks:
            return self._mixed(len(ordered) - len(chunks), chunks)
        count = len(ordered)
        form = form_of([one for request, _ in ordered for one in (request, *request.siblings)])
        key = self.key(form, count)
        if key is None:
            return None
        self._inputs.pad(count, key.decodes, self._spare_block)
        self._inputs.on_device(key.rows, key.decodes)
        return self._replayed(key, form if key.form == form.name else LAYERS, count)

    def _mixed(self, decodes: int, chunks: Sequence[Chunk]) -> StepOutput | None:
        count = decodes + sum(chunk.length for chunk in chunks)
        key = self.graphs.mixed(decodes, count)
        if key is None or len(chunks) > CHUNKS or key.rows - count > self._idle_rows:
            return None
        self._inputs.pad_columns(count, key.rows, self._spare_block)
        self._inputs.rows[decodes : key.decodes] = 0
        self._inputs.place(chunks)
        self._inputs.on_device(key.rows, self._requests(key), placed=True)
        return self._replayed(key, LAYERS, count)

    def _replayed(self, key: GraphKey, form: LayersAlone, count: int) -> StepOutput:
        self._replays(key.rows)
        return form.output(self.graphs.replay(key), self._room).first(count)
