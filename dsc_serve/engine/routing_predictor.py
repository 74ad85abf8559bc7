"""What requests pick, and new ones are expected to pick: signatures, for the policies that go by them."""

from __future__ import annotations

from collections import deque

from dsc_kernels.sketch import Signature, Sketch
from dsc_serve.engine.request import Request
from dsc_serve.engine.routing_recorder import RecordedStep

FORESEEN = 64  # requests that get a prediction after one step, where they came before there was any


class PickPredictor:
    """Keeps the sketch of all watched steps, and the signatures of the requests that took part in them."""

    def __init__(self, sketch: Sketch) -> None:
        self.sketch = sketch
        self._unforeseen: deque[Request] = deque()

    def expect(self, request: Request) -> None:
        """Predict what a new request will pick; later, where nothing has been picked so far."""
        if self.sketch.tokens:
            request.signature = self.sketch.predict(request.tokens)
        else:
            self._unforeseen.append(request)

    def observe(self, step: RecordedStep) -> None:
        for request in step.requests:
            if request.seen is None:
                request.seen = Signature.empty()
                request.signature = request.seen.bits
        signatures = [request.seen for request in step.requests if request.seen]
        self.sketch.observe(step.picks.numpy(), step.token_ids, step.owners, signatures)
        for _ in range(min(FORESEEN, len(self._unforeseen))):
            waiting = self._unforeseen.popleft()
            if waiting.seen is None:
                waiting.signature = self.sketch.predict(waiting.tokens)
