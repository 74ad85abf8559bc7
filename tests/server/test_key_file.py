"""The file of API keys while the server runs: what is wrong with it, and what holds meanwhile."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest
from support.access import ALICE, BOB, ROOT, Write, bearer, entry
from support.fake_engine import FakeEngine
from support.serving import app_around, ask, until

from dsc_serve.config import ConfigError
from dsc_serve.server.keys import KeyRing, digest, parse_environment


def overwrite(path: Path, text: str) -> None:
    """In place, as a shell's > does."""
    path.write_bytes(text.encode("utf-8", "surrogateescape"))


def rename(old: str, new: str) -> None:
    Path(old).rename(new)


def test_keys_come_and_go_without_a_restart(engine: FakeEngine, write: Write, caplog: pytest.LogCaptureFixture) -> None:
    ring = KeyRing(write(entry("alice", ALICE)), f"env:{ROOT}")
    app = app_around(engine, None, ring)

    def valid() -> list[bool]:
        return [ask(app, "GET", "/v1/models", headers=bearer(key)).status_code == 200 for key in (ALICE, BOB, ROOT)]

    assert valid() == [True, False, True]
    assert not ring.reload()
    write(entry("bob", BOB))
    assert ring.reload()
    assert valid() == [False, True, True]
    write("[broken")
    assert not ring.reload()
    assert valid() == [False, True, True]
    assert "API keys stay as they were" in caplog.text
    Path(write("")).unlink()
    assert not ring.reload()
    assert valid() == [False, True, True]
    write(entry("alice", ALICE))
    assert ring.reload()
    assert valid() == [True, False, True]


UNUSABLE = {
    "deep array": "a = " + "[" * 20_000,
    "deep table": "a = " + "{b = " * 20_000,
    "deep header": "[" * 20_000,
    "deep name": "[" + ".".join("a" * 2_000) + "]",
    "many digits": "a = " + "9" * 5_000,
    "many digits of a limit": entry("bob", BOB, streams="9" * 5_000),
    "huge limit": entry("bob", BOB, tokens_per_minute=10**400),
    "huge float": entry("bob", BOB, weight="1e999"),
    "emptied": "",
    "only a comment": "# keys\n",
    "cut within a key": entry("bob", BOB)[:40],
    "cut within a name": "[bo",
    "cut behind a name": "[bob]\n",
    "two names with one key": entry("bob", BOB) + entry("carol", BOB),
    "one name twice": entry("bob", BOB) + entry("bob", ALICE),
    "a key of the environment": entry("bob", ROOT),
    "too large": entry("bob", BOB) + "#" * 2**20,
    "not UTF-8": "\udcff",
}


@pytest.mark.parametrize("text", UNUSABLE.values(), ids=UNUSABLE)
def test_a_file_that_cannot_be_used_leaves_the_last_good_keys_and_is_told(
    engine: FakeEngine, write: Write, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setattr("dsc_serve.server.keys.LOOK_S", 0.01)
    monkeypatch.setattr("dsc_serve.server.keys.SETTLE_S", 0.02)
    path = Path(write(entry("alice", ALICE)))
    ring = KeyRing(str(path), f"env:{ROOT}")
    app = app_around(engine, None, ring)

    def told() -> tuple[bool, bool]:
        lines = ask(app, "GET", "/metrics", headers=bearer(ROOT)).text.splitlines()
        return "dsc_serve_key_file_unusable 1.0" in lines, "dsc_serve_api_keys 2.0" in lines

    async def run() -> None:
        reading = asyncio.create_task(ring.keep_current())
        overwrite(path, text)
        await until(lambda: ring.trouble)
        assert ring.find(ALICE.encode()) and not ring.find(BOB.encode())
        await asyncio.sleep(0.05)
        assert caplog.text.count("API keys stay as they were") == 1
        assert await asyncio.to_thread(told) == (True, True)
        write(entry("bob", BOB))  # the task that reads it has not ended
        await until(lambda: ring.find(BOB.encode()))
        assert ring.find(ALICE.encode()) is None
        assert await asyncio.to_thread(told) == (False, True)
        assert reading.cancel()

    asyncio.run(run())
    assert BOB not in caplog.text and digest(BOB.encode()) not in caplog.text
    overwrite(path, text)
    with pytest.raises(ConfigError, match=r"key_file|the same key") as refused:
        KeyRing(str(path), f"env:{ROOT}")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("kind", ["pipe", "folder"])
def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "keys.toml"
    os.mkfifo(path) if kind == "pipe" else path.mkdir()
    with pytest.raises(ConfigError, match=r"key_file .* cannot be read"):
        KeyRing(str(path), "")


def test_a_file_that_is_being_written_is_read_once_it_is_left_alone(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dsc_serve.server.keys.LOOK_S", 0.01)
    monkeypatch.setattr("dsc_serve.server.keys.SETTLE_S", 0.3)
    path = Path(write(entry("alice", ALICE)))
    ring = KeyRing(str(path), "")
    parts = [entry(f"other{i}", f"a-key-of-some-length-{i}") for i in range(20)] + [entry("alice", ALICE)]

    async def run() -> None:
        reading = asyncio.create_task(ring.keep_current())
        written = ""
        for part in parts:  # the file parses after each, and lacks a key
            overwrite(path, written := written + part)
            await asyncio.sleep(0.03)
            assert ring.find(ALICE.encode())
        await until(lambda: ring.count == len(parts))
        assert ring.find(ALICE.encode())
        reading.cancel()

    asyncio.run(run())


def test_the_file_is_looked_at_while_the_server_runs(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsc_serve.server.keys.LOOK_S", 0.01)
    monkeypatch.setattr("dsc_serve.server.keys.SETTLE_S", 0.02)
    path = write(entry("alice", ALICE))
    ring = KeyRing(path, "")

    async def run() -> None:
        reading = asyncio.create_task(ring.keep_current())
        write(entry("bob", BOB))
        await until(lambda: ring.find(BOB.encode()))
        assert ring.find(ALICE.encode()) is None
        rename(path, f"{path}.old")
        await until(lambda: ring.trouble)  # and a task that cannot find it goes on
        rename(f"{path}.old", path)
        await until(lambda: not ring.trouble)
        assert ring.find(BOB.encode())
        reading.cancel()

    asyncio.run(run())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[a]\nsha256 = 'abc'", "a: sha256 must be 64 hexadecimal digits"),
        (entry("a", ALICE, wieght=2), "a: Object contains unknown field `wieght`"),
        (entry("a", ALICE, weight=0), "a: weight is 0.0; it must be a finite number above 0"),
        (entry("a", ALICE) + "name = 'b'", "a: name is not a field"),
        (entry("a", ALICE, cache_salt=repr("x" * 257)), "a: cache_salt is '257 characters'; it must be at most 256"),
        (entry("a", ALICE, streams=-1), "a: streams is -1; it must be at least 0"),
        (entry("a", ALICE, streams='"x"'), "a: Expected `int | null`, got `str`"),
        ("a = 1", "a: Expected `object`, got `int`"),
        (entry("env", ALICE), "env is the name of a key in the environment too"),
    ],
)
def test_what_is_wrong_in_a_key_file_is_named(write: Write, text: str, words: str) -> None:
    with pytest.raises(ConfigError) as error:
        KeyRing(write(text), f"env:{ROOT}")
    assert words in str(error.value)


def test_blanks_around_keys_of_the_environment_are_not_part_of_them() -> None:
    keys = parse_environment(f"alice:{ALICE}, bob:{BOB}\n")
    assert {name: key.sha256 for name, key in keys.items()} == {
        "alice": digest(ALICE.encode()),
        "bob": digest(BOB.encode()),
    }


@pytest.mark.parametrize("text", [" , ", ",", " ", "\n", ",,,"])
def test_a_variable_that_names_no_key_is_an_error_and_not_an_open_server(text: str) -> None:
    with pytest.raises(ConfigError, match="is set but names no key"):
        KeyRing("", text)


def test_two_names_with_one_key_are_an_error_of_the_environment_too() -> None:
    with pytest.raises(ConfigError, match="alice and bob have the same key") as refused:
        parse_environment(f"alice:{ALICE},bob:{ALICE}")
    assert ALICE not in str(refused.value) and digest(ALICE.encode()) not in str(refused.value)


@pytest.mark.parametrize("text", ["nokey", "name:", ":secret-secret-secret", "name:short-secret", f"a:{ALICE},a:{BOB}"])
def test_what_is_wrong_with_a_key_of_the_environment_is_said_without_showing_it(text: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_environment(text)
    assert "secret" not in str(error.value) and ALICE not in str(error.value)


def test_a_key_file_that_is_missing_is_named() -> None:
    with pytest.raises(ConfigError, match=r"key_file /nowhere/keys\.toml cannot be read"):
        KeyRing("/nowhere/keys.toml", "")
