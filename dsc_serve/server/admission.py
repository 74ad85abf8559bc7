"""Who is let in: places in the house, and what each key may use of it."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from typing import Any

from dsc_serve.config import LimitConfig
from dsc_serve.server.errors import ApiError, bad_request
from dsc_serve.server.keys import Key

GENERATIONS = frozenset({"/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/embeddings", "/v1/dsc/trace"})
RETRY_AFTER_S = 1
SHUTTING_DOWN = "the server is shutting down"
Clock = Callable[[], float]


class Permits:
    """Counts the generations in the house, queued and running, one for each prompt and choice. idle: there are none."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.held = 0
        self.idle = asyncio.Event()
        self.idle.set()

    @property
    def full(self) -> bool:
        return self.held >= self.capacity

    def take(self, count: int) -> None:
        """Raises ApiError (429) when so many are not free."""
        if self.held + count > self.capacity:
            raise too_many(
                f"the server is full: {self.held} of {self.capacity} places are taken and the request needs {count}",
                "queue_full",
            )
        self.held += count
        self.idle.clear()

    def release(self, count: int) -> None:
        self.held -= count
        if not self.held:
            self.idle.set()


class Rate:
    """So much a minute, a whole minute's worth of it at once. per_minute: 0 for no limit."""

    def __init__(self, per_minute: int, clock: Clock) -> None:
        self.per_minute = per_minute
        self._clock = clock
        self._level, self._at = float(per_minute), clock()

    def wait_s(self, amount: int = 1) -> float:
        """Seconds until so many more are free; 0 when they are."""
        self._fill()
        return max(0.0, (amount - self._level) * 60 / self.per_minute) if self.per_minute else 0.0

    def charge(self, amount: int) -> None:
        """Below 0: give back."""
        self._fill()
        self._level = min(self.per_minute, self._level - amount)

    def _fill(self) -> None:
        now = self._clock()
        self._level = min(self.per_minute, self._level + (now - self._at) * self.per_minute / 60)
        self._at = now


class Account:
    """What one key uses at the moment."""

    def __init__(self, key: Key, limits: LimitConfig, clock: Clock) -> None:
        self.held = 0
        self.follow(key, limits, clock)

    def follow(self, key: Key, limits: LimitConfig, clock: Clock) -> None:
        """Take over the limits of a key that is new, or has changed; its rates begin afresh."""
        self.key = key
        self.streams = limits.streams_per_key if key.streams is None else key.streams
        requests, tokens = key.requests_per_minute, key.tokens_per_minute
        self.requests = Rate(limits.requests_per_minute if requests is None else requests, clock)
        self.tokens = Rate(limits.tokens_per_minute if tokens is None else tokens, clock)

    def check(self, count: int) -> None:
        """Raises ApiError (429) when the key may not have so many more generations now."""
        if self.streams and self.held + count > self.streams:
            raise too_many(
                f"this key has {self.held} generations of the {self.streams} that it may have at a time, and the "
                f"request needs {count}",
                "too_many_streams",
            )
        for rate, what in ((self.requests, "generations"), (self.tokens, "tokens")):
            if wait_s := rate.wait_s():
                raise too_many(f"this key has used the {rate.per_minute} {what} of a minute", "rate_limited", wait_s)

    def reserve(self, tokens: int) -> Rate:
        """Set tokens aside, and return what they are taken of. Raises ApiError (429) when not so many are left."""
        rate = self.tokens
        if wait_s := rate.wait_s(tokens):
            left = f"of the {rate.per_minute} tokens that this key may use in a minute"
            raise too_many(f"the request may take {tokens} tokens, which are not left {left}", "rate_limited", wait_s)
        rate.charge(tokens)
        return rate


class Lease:
    """The places that one exchange holds until it ends, and the tokens that its key has set aside for it."""

    def __init__(self, permits: Permits, account: Account | None) -> None:
        self._permits, self._account = permits, account
        self._count = 0
        self._rate: Rate | None = None  # that of the tokens, which a change of the key replaces
        self._reserved = 0

    def take(self, count: int) -> None:
        """Raises ApiError (429); then nothing is taken."""
        if self._account is not None:
            self._account.check(count)
        self._permits.take(count)
        self._count += count
        if self._account is not None:
            self._account.held += count
            self._account.requests.charge(count)

    @property
    def streams(self) -> int:
        """Generations that the key may have at a time; 0: no limit."""
        return 0 if self._account is None else self._account.streams

    @property
    def tokens(self) -> int:
        """Tokens that the key may use in a minute; 0: no limit."""
        return 0 if self._account is None else self._account.tokens.per_minute

    def reserve(self, tokens: int) -> None:
        """Set aside what the request may take at most. Raises ApiError (429); then nothing is taken."""
        if self._account is not None:
            self._rate, self._reserved = self._account.reserve(tokens), tokens

    def charge(self, tokens: int) -> None:
        """Give back what is left of what was set aside when only so many have been taken."""
        if self._rate is not None:
            self._rate.charge(tokens - self._reserved)
            self._rate = None

    def release(self) -> None:
        """Safe to call twice. What has not been charged is given back whole."""
        self.charge(0)
        self._permits.release(self._count)
        if self._account is not None:
            self._account.held -= self._count
        self._count = 0


class Admission:
    """The doorkeeper of one app. draining: nobody is let in any more."""

    def __init__(self, permits: Permits, limits: LimitConfig, clock: Clock = time.monotonic) -> None:
        self.permits = permits
        self.draining = False
        self._limits, self._clock = limits, clock
        self._accounts: dict[str, Account] = {}

    def lease(self, key: Key | None) -> Lease:
        """An empty lease for one exchange."""
        return Lease(self.permits, None if key is None else self.account(key))

    def account(self, key: Key) -> Account:
        account = self._accounts.get(key.name)
        if account is None:
            account = self._accounts[key.name] = Account(key, self._limits, self._clock)
        elif account.key != key:
            account.follow(key, self._limits, self._clock)
        return account

    def state(self) -> dict[str, Any]:
        """Who is in the house."""
        places = {"held": self.permits.held, "capacity": self.permits.capacity}
        held = {name: account.held for name, account in self._accounts.items()}
        return {"draining": self.draining, "places": places, "generations_by_key": held}

    def check_open(self) -> None:
        """Raises ApiError where no generation at all can be let in: 503 while draining, 429 when the house is full."""
        if self.draining:
            raise shutting_down()
        if self.permits.full:
            self.permits.take(1)

    def admit(self, lease: Lease, count: int, param: str) -> None:
        """Take places for `count` generations. Raises ApiError; 400, naming `param`, when there never are so many."""
        for most, what in ((self.permits.capacity, "this server holds"), (lease.streams, "this key may have")):
            if 0 < most < count:
                raise bad_request(param, f"{param} asks for {count} generations at once; {what} at most {most}")
        self.check_open()
        lease.take(count)


def shutting_down() -> ApiError:
    headers = {"Retry-After": str(RETRY_AFTER_S), "Connection": "close"}
    return ApiError(503, SHUTTING_DOWN, type="server_error", code="shutting_down", headers=headers)


def too_many(message: str, code: str, wait_s: float = RETRY_AFTER_S) -> ApiError:
    seconds = max(RETRY_AFTER_S, math.ceil(wait_s))
    return ApiError(
        429,
        f"{message}; try again in {seconds} s",
        type="rate_limit_error",
        code=code,
        headers={"Retry-After": str(seconds)},
    )
