"""Load on a running server: streams completions from it and measures what a client sees."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime

import msgspec
from tqdm import tqdm

from dsc_serve.bench.load.arrivals import ARRIVALS, Pace, RequestBudget
from dsc_serve.bench.load.connection import Connections, DisconnectError, Endpoint, ProtocolError
from dsc_serve.bench.load.exchange import RequestOutcome, error_body, measure_request
from dsc_serve.bench.load.lengths import Lengths, parse_lengths
from dsc_serve.bench.load.prompts import Ask, ask_source
from dsc_serve.bench.load.summary import LoadResult, parse_limits, summarize
from dsc_serve.bench.machine import describe_machine, load_average
from dsc_serve.config import ConfigError


class LoadError(RuntimeError):
    """The load cannot begin: the server does not answer, or has no model."""


class LoadConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What to send, how much of it, and how fast."""

    url: str  # of the server, such as http://127.0.0.1:8000
    models: tuple[str, ...] = ()  # asked for in turn; none: the first one listed
    arrivals: str = "closed"  # the load profile, a name in ARRIVALS
    concurrency: int = 8  # streams of the closed loop, or requests of a burst
    request_rate: float = 1.0  # requests per second of an open one
    burstiness: float = 1.0  # of gamma arrivals; 1 is Poisson's
    end_rate: float | None = None  # what a ramp's rate has become after duration_s
    # requests of an open profile that are sent at once; the others wait here, and their times count from when they were
    # due
    max_in_flight: int | None = None
    # no request starts after that many or after duration_s, whichever comes first; those in flight end, so a run takes
    # at most duration_s + timeout_s, and the warm-up before it as long again
    requests: int = 200
    duration_s: float = 120.0
    # requests before the measurement, sent the same way and discarded; None means one per stream
    warmup: int | None = None
    timeout_s: float = 120.0  # most seconds for one request, from its start to its end
    prompt_file: str | None = None  # a UTF-8 text to cut prompts from
    sharegpt: str | None = None  # conversations as JSON, whose questions are prompts
    # a folder with the tokenizer by which lengths are counted in these files; without it, words are
    tokenizer: str | None = None
    vocab_size: int = 256  # without either file, prompts are random ids below it
    # a number, or a distribution as in `lengths`; None: the questions of sharegpt whole, else 64
    prompt_tokens: int | str | None = None
    # max_tokens of requests, likewise; None: as long as the answers of sharegpt, else 64
    output_tokens: int | str | None = None
    prefix_tokens: int = 0  # each prompt begins with one of `prefixes` beginnings of that length, drawn evenly
    prefixes: int = 1
    ignore_eos: bool = True  # generate all output tokens, and show the special ones; left out of requests when False
    temperature: float = 0.0
    # limits in milliseconds that a request must keep to count in request_goodput, such as ("ttft:100",)
    goodput: tuple[str, ...] = ()
    seed: int = 0  # of the prompts and arrivals, and with a temperature above 0 of the sampling
    api_key: str = ""

    def __post_init__(self) -> None:
        Endpoint(self.url)
        if self.arrivals not in ARRIVALS:
            raise ConfigError(f"arrivals is {self.arrivals!r}; it must be one of {', '.join(ARRIVALS)}")
        for field in ("concurrency", "requests", "vocab_size", "prefixes"):
            if getattr(self, field) < 1:
                raise ConfigError(f"{field} is {getattr(self, field)}; it must be at least 1")
        for field in ("duration_s", "timeout_s", "request_rate", "burstiness", "end_rate"):
            value = getattr(self, field)
            if value is not None and not 0 < value < float("inf"):
                raise ConfigError(f"{field} is {value}; it must be a finite number above 0")
        for field in ("warmup", "prefix_tokens"):
            value = getattr(self, field)
            if value is not None and value < 0:
                raise ConfigError(f"{field} is {value}; it must be at least 0")
        if self.max_in_flight is not None and self.max_in_flight < 1:
            raise ConfigError(f"max_in_flight is {self.max_in_flight}; it must be at least 1")
        if not self.temperature >= 0:
            raise ConfigError(f"temperature is {self.temperature}; it must be at least 0")
        if not all(" " < char <= "~" for char in self.api_key):
            raise ConfigError("api_key holds a character that no header can carry; it must be printable ASCII")
        self._check_combinations()
        self.lengths("prompt_tokens")
        self.lengths("output_tokens")
        parse_limits(self.goodput)

    def _check_combinations(self) -> None:
        files = self.prompt_file is not None, self.sharegpt is not None
        rules = {
            "tokenizer": (self.tokenizer is None or any(files), "together with prompt_file or sharegpt"),
            "sharegpt": (not all(files), "without prompt_file"),
            "prefix_tokens": (not self.prefix_tokens or not files[1], "without sharegpt"),
            "prefixes": (self.prefixes == 1 or self.prefix_tokens > 0, "together with prefix_tokens"),
            "burstiness": (self.burstiness == 1 or self.arrivals == "gamma", "with arrivals gamma"),
            "end_rate": (self.end_rate is None or self.arrivals == "ramp", "with arrivals ramp"),
            "max_in_flight": (self.max_in_flight is None or self.arrivals != "closed", "with open arrivals"),
        }
        for field, (kept, rule) in rules.items():
            if not kept:
                raise ConfigError(f"{field} is {getattr(self, field)!r}; it is of use only {rule}")
        if self.arrivals == "ramp" and self.end_rate is None:
            raise ConfigError("end_rate is not set; a ramp needs it")

    def lengths(self, field: str) -> Lengths | None:
        """The lengths that prompt_tokens or output_tokens describes."""
        value = getattr(self, field)
        return None if value is None else parse_lengths(field, value)

    def describe(self) -> dict[str, object]:
        """The settings as they may be shown: all but the key."""
        return {field: getattr(self, field) for field in self.__struct_fields__ if field != "api_key"}


def event_loop() -> asyncio.AbstractEventLoop:
    """The cheapest event loop there is: the client's work is done on the server's cores when both share a machine."""
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


def run_load(config: LoadConfig, watch: Callable[[RequestOutcome], None] = lambda outcome: None) -> LoadResult:
    """Put the load on the server and measure it; `watch` is told of each measured request when it has ended.

    Raises ConfigError and TokenizerError when prompts cannot be made, LoadError when the server does not answer.
    Requests that fail are counted in the result.
    """
    with asyncio.Runner(loop_factory=event_loop) as runner:
        return runner.run(measure(config, watch))


async def measure(config: LoadConfig, watch: Callable[[RequestOutcome], None] = lambda outcome: None) -> LoadResult:
    """`run_load` for code that has an event loop of its own."""
    asks = ask_source(
        prompt_file=config.prompt_file,
        sharegpt=config.sharegpt,
        tokenizer=config.tokenizer,
        vocab_size=config.vocab_size,
        prompt_tokens=config.lengths("prompt_tokens"),
        output_tokens=config.lengths("output_tokens"),
        prefix_tokens=config.prefix_tokens,
        prefixes=config.prefixes,
        seed=config.seed,
    )
    endpoint = Endpoint(config.url)
    with Connections(endpoint) as connections:
        models = config.models or (await first_model(connections, endpoint, config),)
        requests = encode_requests(endpoint, models, asks, config)
        warmup = config.concurrency if config.warmup is None else config.warmup
        await drive(connections, requests, config, warmup, lambda _: None)
        client = describe_machine() | {"load_average_start": load_average()}
        outcomes: list[RequestOutcome] = []
        # disable=None: a bar on a terminal, nothing elsewhere
        with tqdm(total=config.requests, unit="req", disable=None, dynamic_ncols=True) as bar:

            def record(outcome: RequestOutcome) -> None:
                outcomes.append(outcome)
                watch(outcome)
                bar.update()

            date = datetime.now(UTC).isoformat(timespec="seconds")
            start, start_cpu = time.perf_counter(), time.process_time()
            await drive(connections, requests, config, config.requests, record)
            duration, cpu = time.perf_counter() - start, time.process_time() - start_cpu
        client |= {"load_average_end": load_average(), "client_cpu": round(cpu / duration, 4)}
    return summarize(
        outcomes,
        duration,
        limits=parse_limits(config.goodput),
        date=date,
        url=config.url,
        model=", ".join(models),
        max_concurrency=config.concurrency if config.arrivals == "closed" else None,
        request_rate=None if config.arrivals == "closed" else config.request_rate,
        config=config.describe(),
        client=client,
    )


async def drive(
    connections: Connections,
    requests: Iterator[bytes],
    config: LoadConfig,
    count: int,
    record: Callable[[RequestOutcome], None],
) -> None:
    """Send up to `count` requests by the configured profile, and tell `record` what became of each."""

    gate = asyncio.Semaphore(config.max_in_flight or count or 1)

    async def send(due: float) -> None:
        request = next(requests)  # before waiting: the order of arrival is that of the prompts
        async with gate:
            record(await measure_request(connections, request, due, config.timeout_s))

    pace = Pace(
        config.concurrency,
        config.request_rate,
        config.seed,
        config.burstiness,
        config.end_rate or config.request_rate,
        config.duration_s,
    )
    await ARRIVALS[config.arrivals](send, RequestBudget(count, config.duration_s), pace)


def encode_requests(
    endpoint: Endpoint, models: Sequence[str], asks: Iterator[Ask], config: LoadConfig
) -> Iterator[bytes]:
    """The bytes of each request in turn."""
    encoder = msgspec.json.Encoder()
    fields: dict[str, object] = {
        "temperature": config.temperature,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if config.ignore_eos:
        fields |= {"ignore_eos": True, "skip_special_tokens": False}  # after an end every token may be a special one
    for index, ask in enumerate(asks):
        if config.temperature > 0:
            fields["seed"] = config.seed + index
        own = {"model": models[index % len(models)], "prompt": ask.prompt, "max_tokens": ask.output_tokens}
        body = encoder.encode(fields | own)
        yield endpoint.request("POST", "/v1/completions", body, config.api_key)


async def first_model(connections: Connections, endpoint: Endpoint, config: LoadConfig) -> str:
    """The id of the first model that the server lists. Raises LoadError."""
    body = bytearray()
    request = endpoint.request("GET", "/v1/models", api_key=config.api_key)
    try:
        async with asyncio.timeout(config.timeout_s):
            status = await connections.exchange(request, body.extend)
    except (TimeoutError, DisconnectError, ProtocolError, OSError) as error:
        reason = str(error) or f"no answer within {config.timeout_s:g} s"
        raise LoadError(f"{config.url} does not answer GET /v1/models: {reason}") from error
    if status != 200:
        raise LoadError(f"{config.url} answers GET /v1/models with HTTP {status}: {error_body(bytes(body))}")
    try:
        listed = msgspec.json.decode(body, type=dict[str, object]).get("data")
    except msgspec.DecodeError as error:
        raise LoadError(f"{config.url} answers GET /v1/models with something that is not JSON: {error}") from error
    first = listed[0] if isinstance(listed, list) and listed else None
    name = first.get("id") if isinstance(first, dict) else None
    if not isinstance(name, str):
        raise LoadError(f"{config.url} lists no model; name one with `models`")
    return name
