"""API keys: who may ask, and how much of the server each may have. Only hashes are kept."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
import os
import secrets
import time
from collections.abc import Mapping
from pathlib import Path

import msgspec

from dsc_serve.config import API_KEYS, MOST, ConfigError, ServerConfig, environment_keys
from dsc_serve.documents import DocumentError, parse_toml, read_document
from dsc_serve.parameter_errors import ParameterError
from dsc_serve.scheduling_params import SchedulingParams
from dsc_serve.settings import items

log = logging.getLogger(__name__)

SHORTEST = 16  # characters of a key, which is hashed once: only keys that cannot be guessed are safe so
LOOK_S = 1.0
SETTLE_S = 2.0  # a file that was written to so lately may be half of what it is going to be
MAX_FILE = 2**20  # bytes
PER_KEY = ("streams_per_key", "requests_per_minute", "tokens_per_minute")


class Key(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One key. Limits: 0 is none, None the server's default."""

    sha256: str  # of the key, in hexadecimal digits
    weight: float = 1.0  # its share of a busy engine
    priority: int = 0  # of requests that ask for none; lower is served earlier
    streams: int | None = None  # of its generations at a time, the most
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    cache_salt: str = ""  # its prompts share cached prefixes with those of keys that have the same one, and no others
    admin: bool = False  # it may use /admin
    # The only models that it may use and see, the base among them where it is named; None: all. A request that names
    # none gets the base, or where it may not, the first of them.
    adapters: tuple[str, ...] | None = None
    name: str = ""  # for logs and metrics

    def __post_init__(self) -> None:
        if len(self.sha256) != 64 or set(self.sha256) - set("0123456789abcdef"):
            raise ValueError("sha256 must be 64 hexadecimal digits in small letters")
        for field in ("streams", "requests_per_minute", "tokens_per_minute"):
            if not 0 <= (getattr(self, field) or 0) <= MOST:
                raise ValueError(f"{field} is {getattr(self, field):.6g}; it must be at least 0 and at most {MOST}")
        if self.adapters is not None and (not self.adapters or not all(self.adapters)):
            raise ValueError(f"adapters is {list(self.adapters)}; it must be names of adapters, or be left out")
        SchedulingParams(weight=self.weight, priority=self.priority, cache_salt=self.cache_salt)

    def scheduling(self, asked: SchedulingParams) -> SchedulingParams:
        """The terms of a request with this key.

        A request may make itself less urgent than its key, not more, and keep its prompts apart from others of its key.
        """
        priority = max(self.priority, asked.priority) if asked.priority else self.priority
        salt = digest(f"{digest(self.cache_salt.encode())}{asked.cache_salt}".encode())
        return msgspec.structs.replace(asked, tenant=self.name, weight=self.weight, priority=priority, cache_salt=salt)


def digest(key: bytes) -> str:
    return hashlib.sha256(key).hexdigest()


def new_key(name: str) -> tuple[str, str]:
    """A key, and the table for the key file by which it is recognised."""
    key = f"dsc-{secrets.token_urlsafe(32)}"
    return key, f'[{json.dumps(name)}]\nsha256 = "{digest(key.encode())}"\n'


def parse_environment(text: str) -> dict[str, Key]:
    """Keys by name from NAME:KEY,NAME:KEY. Raises ConfigError, which never shows a key."""
    keys: dict[str, Key] = {}
    if text and not items(text):
        raise ConfigError(f"{API_KEYS} is set but names no key; it must be NAME:KEY,NAME:KEY, or be left out")
    for number, entry in enumerate(items(text), 1):
        name, colon, key = entry.partition(":")
        if not (name and colon) or len(key) < SHORTEST:
            raise ConfigError(f"API key {number} must be NAME:KEY, with a key of at least {SHORTEST} characters")
        if name in keys:
            raise ConfigError(f"API key {number} has the name {name!r}, as another has")
        keys[name] = Key(sha256=digest(key.encode()), name=name)
    check_different(keys, API_KEYS)
    return keys


def check_different(keys: Mapping[str, Key], source: str) -> None:
    """Raises ConfigError where two names have one key: whose requests they are could not be told."""
    names: dict[str, str] = {}
    for name, key in keys.items():
        other = names.setdefault(key.sha256, name)
        if other != name:
            raise ConfigError(f"{source}: {other} and {name} have the same key; each name needs its own")


def parse_file(path: Path) -> dict[str, Key]:
    """Keys by name from a TOML file with one table for each, and at least one. Raises ConfigError."""
    try:
        tables = parse_toml(read_document(path, MAX_FILE))
    except (OSError, DocumentError) as error:
        raise ConfigError(f"key_file {path} cannot be read as TOML: {error}") from None
    keys = {}
    for name, table in tables.items():
        try:
            key = msgspec.convert(table, Key)
            if key.name:
                raise ValueError("name is not a field; a key has the name of its table")
            keys[name] = msgspec.structs.replace(key, name=name)
        except (msgspec.ValidationError, ParameterError, ValueError, OverflowError) as error:
            raise ConfigError(f"key_file {path}: {name}: {error}") from None
    if not keys:
        raise ConfigError(f"key_file {path} holds no key; `dsc-serve key NAME` makes one")
    check_different(keys, f"key_file {path}")
    return keys


class KeyRing:
    """The keys that are valid now. required: whether a request must have one.

    trouble: why the key file cannot be used as it is now, "" when it can; the keys that it last held stay valid.
    """

    def __init__(self, key_file: str, environment: str) -> None:
        self._path = Path(key_file) if key_file else None
        self._fixed = parse_environment(environment)
        self.required = bool(key_file or environment)
        self.trouble = ""
        self._stamp = self._look()
        self._keys = self._read()

    @property
    def count(self) -> int:
        return len(self._keys)

    @classmethod
    def of(cls, config: ServerConfig) -> KeyRing:
        """The keys of a server. Raises ConfigError, too where there are none and a setting would do nothing."""
        ring = cls(config.access.key_file, environment_keys())
        asked = {"metrics_key": config.access.metrics_key, **{name: getattr(config.limits, name) for name in PER_KEY}}
        for name, value in asked.items():
            if value and not ring.required:
                allowed = f"without API keys it does nothing: set key_file or {API_KEYS}, or leave it out"
                raise ConfigError(f"{name} is {json.dumps(value)}; {allowed}")
        return ring

    def find(self, token: bytes) -> Key | None:
        """The key that a client has sent. Takes the same time for any that is wrong."""
        sent, found = digest(token), None
        for key in self._keys.values():
            if hmac.compare_digest(key.sha256, sent):
                found = key
        return found

    def reload(self) -> bool:
        """Read the file again if it has changed or could not be used; until it can, all keys stay as they were."""
        stamp = self._look()
        if stamp == self._stamp and not self.trouble:
            return False
        try:
            keys = self._read()
        except ConfigError as error:
            self._note(str(error))
            return False
        self._keys, self._stamp, self.trouble = keys, stamp, ""
        log.info("%d API keys are valid now", len(keys))
        return True

    async def keep_current(self) -> None:
        """Look at the file for ever. One that is being written to is read when it has been left alone for a while."""
        seen, since = self._stamp, 0.0
        while self._path is not None:
            await asyncio.sleep(LOOK_S)
            try:
                stamp = await asyncio.to_thread(self._look)
                if stamp != seen:
                    seen, since = stamp, time.monotonic()
                if time.monotonic() - since >= SETTLE_S:
                    await asyncio.to_thread(self.reload)
            except Exception as error:  # were this task to end, keys that are taken back would open for ever
                self._note(f"key_file {self._path} cannot be looked at: {error}")

    def _note(self, trouble: str) -> None:
        if trouble != self.trouble:
            log.error("API keys stay as they were: %s", trouble)
        self.trouble = trouble

    def _look(self) -> tuple[int, ...] | None:
        """What changes when the file, or what it is allowed to be read by, does."""
        try:
            found = os.stat(self._path) if self._path else None  # noqa: PTH116  follows a mounted secret's links
        except OSError:
            return None
        return None if found is None else (found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_ino)

    def _read(self) -> dict[str, Key]:
        """Raises ConfigError."""
        keys = parse_file(self._path) if self._path else {}
        twice = keys.keys() & self._fixed.keys()
        if twice:
            raise ConfigError(f"key_file {self._path}: {min(twice)} is the name of a key in the environment too")
        both = keys | self._fixed
        check_different(both, f"key_file {self._path} and {API_KEYS}")
        return both
