"""The steps of a runner that are captured: which graph computes a step, what it reads, and what it gives."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from dsc_serve.engine.graph_budget import GraphBudget, GraphKey, buckets, chosen, told
from dsc_serve.engine.graph_forms import FORMS, LAYERS, HeadRoom, StepOutput, form_of
from dsc_serve.engine.graphs import Capture, StepGraphs
from dsc_serve.engine.inputs import Inputs
from dsc_serve.engine.position import Position
from dsc_serve.model.batch import StepBatch
from dsc_serve.model.decoder import Decoder


class CapturedSteps:
    """Steps of at most `max_running` single tokens, captured here and replayed when there is one like them.

    layers: what computes the layers of a batch, [T, d]. inputs: where batches lie; they hold one of padding, and are on
    the device. spare_block: of the KV pools, which rows of padding write to. drawn: int64 [≥ max_running], where tokens
    go that a graph draws. replays: is told of the rows of each step that is replayed.
    """

    def __init__(
        self,
        model: Decoder,
        layers: Callable[[StepBatch], Tensor],
        inputs: Inputs,
        max_running: int,
        max_context_len: int,
        spare_block: int,
        drawn: Tensor,
        replays: Callable[[int], None],
        capture: Capture,
        budget: GraphBudget,
    ) -> None:
        self._model, self._layers, self._inputs, self._replays = model, layers, inputs, replays
        self._max_context_len, self._spare_block = max_context_len, spare_block
        config, itemsize, sizes = model.config, model.dtype.itemsize, buckets(max_running)
        keys = chosen(config, sizes, itemsize, budget)
        kept = max((key.decodes for key in keys if FORMS[key.form].keeps_logits), default=0)
        self._room = HeadRoom(drawn, kept, config.vocab_size)
        self.graphs = StepGraphs(keys, self._computed, capture, budget.seconds)
        self.most = self.graphs.most()  # single tokens of a step
        self.told = told(config, self.graphs.keys, itemsize, self.graphs.capture_s, sizes)

    def _computed(self, key: GraphKey) -> Tensor:
        held = self._inputs.held(key.rows, key.decodes)
        hidden = self._layers(StepBatch(*held, key.decodes, self._max_context_len, ()))
        FORMS[key.form].finish(self._model, hidden, self._room)
        return hidden

    def step(self, requests: Sequence[Position], count: int) -> StepOutput | None:
        """A step of `count` single tokens, which the inputs hold and from which these requests draw, replayed; None
        where no graph holds it.

        In a graph of another form only the layers are of use to it.
        """
        form = form_of(requests)
        found = (self.graphs.key(name, count) for name in dict.fromkeys((form.name, LAYERS.name, *FORMS)))
        key = next((key for key in found if key is not None), None)
        if key is None:
            return None
        self._inputs.pad(count, key.decodes, self._spare_block)
        self._inputs.on_device(key.rows, key.decodes)
        self._replays(key.rows)
        hidden = self.graphs.replay(key)
        return (form if key.form == form.name else LAYERS).output(hidden, self._room).first(count)
