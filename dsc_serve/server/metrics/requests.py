"""The metrics of one app."""

from __future__ import annotations

from collections import Counter, defaultdict
from functools import partial

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.registry import Collector

from dsc_serve.engine.histogram import COUNT_EDGES, STEP_EDGES_S, Histogram
from dsc_serve.server.adapters import Catalogue
from dsc_serve.server.admission import GENERATIONS, Permits
from dsc_serve.server.errors import CLIENT_CLOSED
from dsc_serve.server.keys import KeyRing
from dsc_serve.server.metrics.adapters import BASE, MOST_ADAPTERS, OTHER, AdapterUse, adapter_families
from dsc_serve.server.metrics.engine import WatchedEngine, engine_families, process_families
from dsc_serve.server.metrics.families import Families, counter, counters, gauge, histogram, histograms
from dsc_serve.server.tools.registry import FORMS
from dsc_serve.worker.client import EngineDiedError
from dsc_serve.worker.messages import Stats

FIRST_TOKEN_EDGES_S = (
    0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60,
)  # fmt: skip
DURATION_EDGES_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
FINISH_REASONS = ("stop", "length", "abort", "timeout", "error")
EMBEDDING_ENDS = ("done", "abort", "timeout", "error")
STATUSES = (200, 429, CLIENT_CLOSED, 500, 503)  # there from the start: a series that begins above 0 shows no increase
STATS_TIMEOUT_S = 1.0


class Metrics(Collector):
    """Counts of the HTTP edge, each a plain number until it is scraped; the engine is asked at the scrape.

    ring: the keys that the app lets in. catalogue: the adapters, where there may be any.
    """

    def __init__(self, engine: WatchedEngine, permits: Permits, catalogue: Catalogue | None = None) -> None:
        self._engine, self._permits, self._catalogue = engine, permits, catalogue
        self.ring = KeyRing("", "")
        self._stats: Stats | None = None
        self._heartbeat_age_s = 0.0
        self._requests: Counter[tuple[str, ...]] = Counter(
            {(endpoint, str(status)): 0 for endpoint in sorted(GENERATIONS) for status in STATUSES}
        )
        self._durations: defaultdict[tuple[str, ...], Histogram] = defaultdict(partial(Histogram, DURATION_EDGES_S))
        self._generations: Counter[tuple[str, ...]] = Counter({(reason,): 0 for reason in FINISH_REASONS})
        self._by_adapter = {BASE: AdapterUse()}
        self._embeddings: Counter[tuple[str, ...]] = Counter({(reason,): 0 for reason in EMBEDDING_ENDS})
        self.first_token = Histogram(FIRST_TOKEN_EDGES_S)
        self.inter_token, self._per_token = Histogram(STEP_EDGES_S), Histogram(STEP_EDGES_S)
        self._prompt_sizes, self._output_sizes = Histogram(COUNT_EDGES), Histogram(COUNT_EDGES)
        self.prompt_tokens = self.generated_tokens = 0
        self._calls: Counter[tuple[str, ...]] = Counter({(form,): 0 for form in FORMS})
        self._malformed = Counter(self._calls)
        self._ready = True
        self._registry = CollectorRegistry()
        self._registry.register(self)
        ProcessCollector(registry=self._registry)

    def request_ended(self, endpoint: str, status: int, seconds: float) -> None:
        self._requests[endpoint, str(status)] += 1
        self._durations[endpoint,].observe(seconds)

    def generation_ended(
        self, reason: str, prompt_tokens: int, tokens: int, per_token_s: float | None, adapter: str = ""
    ) -> None:
        """per_token_s: the mean time of a token after the first; None where there was none. adapter: "": the base."""
        self._counts_of(adapter or BASE).add(prompt_tokens, tokens)
        self._generations[reason,] += 1
        self._prompt_sizes.observe(prompt_tokens)
        self._output_sizes.observe(tokens)
        if per_token_s is not None:
            self._per_token.observe(per_token_s)

    def _counts_of(self, adapter: str) -> AdapterUse:
        """Names come from the folder of adapters and not from clients; of very many, the later ones share a series."""
        if adapter not in self._by_adapter and len(self._by_adapter) > MOST_ADAPTERS:
            adapter = OTHER
        return self._by_adapter.setdefault(adapter, AdapterUse())

    def embedding_ended(self, reason: str) -> None:
        self._embeddings[reason,] += 1

    def called(self, form: str, calls: int, malformed: int) -> None:
        """An answer had calls of this form, some of whose arguments were no JSON object."""
        self._calls[form,] += calls
        self._malformed[form,] += malformed

    async def scrape(self, ready: bool) -> bytes:
        """The text of a scrape. ready: whether the server says that it is."""
        self._ready, self._heartbeat_age_s = ready, self._engine.heartbeat_age_s
        try:
            self._stats = await self._engine.stats(STATS_TIMEOUT_S)
        except (TimeoutError, EngineDiedError, ConnectionError):
            self._stats = None
        if self._catalogue is not None:
            await self._catalogue.look()
        return generate_latest(self._registry)

    def collect(self) -> Families:
        yield from self.request_families()
        known = {} if self._catalogue is None else self._catalogue.known
        yield from adapter_families(list(known.values()), self._by_adapter)
        yield from process_families(self._engine, self._heartbeat_age_s)
        if self._stats is not None:
            yield from engine_families(self._stats)

    def request_families(self) -> Families:
        yield counters(
            "requests",
            f"HTTP requests by the status that the client got, in a stream its last event's; {CLIENT_CLOSED}: it left "
            "before the end.",
            ("endpoint", "status"),
            self._requests,
        )
        yield histograms(
            "request_duration_seconds",
            "From an HTTP request's arrival to the end of its answer.",
            ("endpoint",),
            self._durations,
        )
        yield counters(
            "generations",
            "Generations that ended, one for each prompt and choice; abort: the client left or did not read, or "
            "another choice of its request failed.",
            ("finish_reason",),
            self._generations,
        )
        yield counters(
            "embeddings",
            "Texts of /v1/embeddings that ended; done: with a vector; abort: the client left, or another text failed.",
            ("finish_reason",),
            self._embeddings,
        )
        yield histogram(
            "time_to_first_token_seconds",
            "From an HTTP request's arrival to the first token of each of its generations.",
            self.first_token,
        )
        yield histogram("inter_token_latency_seconds", "Between the tokens of one generation.", self.inter_token)
        yield histogram(
            "time_per_output_token_seconds",
            "Mean time of a generation's tokens after the first, one observation for each generation.",
            self._per_token,
        )
        yield counter("prompt_tokens", "Prompt tokens of admitted requests.", self.prompt_tokens)
        yield counter("generated_tokens", "Tokens that the engine generated.", self.generated_tokens)
        yield histogram("generation_prompt_tokens", "Prompt tokens of a generation.", self._prompt_sizes)
        yield histogram("generation_output_tokens", "Tokens generated for a generation.", self._output_sizes)
        yield counters(
            "tool_calls", "Calls of tools in answers, by the form in which they came.", ("form",), self._calls
        )
        yield counters(
            "tool_calls_malformed",
            "Those whose arguments are no JSON object: cut off, or written wrongly where nothing constrained them.",
            ("form",),
            self._malformed,
        )
        yield gauge("permits", "Places for generations in the house, running or waiting.", self._permits.capacity)
        yield gauge("permits_held", "Places taken; when all are, requests get 429.", self._permits.held)
        yield gauge("api_keys", "API keys that are valid now.", self.ring.count)
        yield gauge(
            "key_file_unusable",
            "1 while the key file cannot be used as it is; the keys that it last held stay valid.",
            bool(self.ring.trouble),
        )
        yield gauge("ready", "1 while /health/ready says so; 0 also while the server drains.", self._ready)
