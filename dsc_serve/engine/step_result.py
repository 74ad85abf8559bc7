"""What came of a step, and a step of which that is not known yet."""

from __future__ import annotations

from dataclasses import dataclass, field

from dsc_serve.engine.output import RoutingSlice, TokenLogprobs
from dsc_serve.engine.position import Further
from dsc_serve.engine.token_feed import TokenReading


@dataclass
class StepResult:
    """What one step computed, by request id."""

    tokens: dict[str, int] = field(default_factory=dict)  # sampled, for every request that is computed to its end
    logprobs: dict[str, TokenLogprobs] = field(default_factory=dict)  # of that token, where asked for
    further: dict[str, Further] = field(default_factory=dict)  # after that token, of requests with drafts
    prompt_logprobs: dict[str, list[TokenLogprobs | None]] = field(default_factory=dict)  # of those it reached
    embeddings: dict[str, bytes] = field(default_factory=dict)  # float32, where asked for and complete
    stuck: dict[str, str] = field(default_factory=dict)  # why a request cannot go on
    late: set[str] = field(default_factory=set)  # computed and not sampled: the grammar has not answered, or is done
    routing: dict[str, RoutingSlice] = field(default_factory=dict)  # what its tokens picked, where asked for
    forward_s: float = 0.0  # until the layers' output
    waited_s: float = 0.0  # for grammars to answer
    foreseen_s: float = 0.0  # and then to say what may follow drafts

    def add(self, other: StepResult) -> None:
        """Take in what another part of the same step computed, of other requests."""
        self.tokens |= other.tokens
        self.logprobs |= other.logprobs
        self.further |= other.further
        self.prompt_logprobs |= other.prompt_logprobs
        self.embeddings |= other.embeddings
        self.stuck |= other.stuck
        self.late |= other.late
        self.routing |= other.routing
        self.forward_s += other.forward_s
        self.waited_s += other.waited_s
        self.foreseen_s += other.foreseen_s


@dataclass(frozen=True)
class Launched:
    """A step that a device computes."""

    # What stands in the next step's inputs for the token of each request that draws one, by id, in the order of
    # `reading`
    places: dict[str, int]
    reading: TokenReading  # of the tokens that it draws
    forward_s: float  # until its layers had been launched

    def read(self) -> StepResult:
        """Waits for the device to have computed it."""
        return StepResult(dict(zip(self.places, self.reading.tokens(), strict=True)), forward_s=self.forward_s)
