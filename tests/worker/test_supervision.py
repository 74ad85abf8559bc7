"""An engine that dies or hangs is replaced, and every request learns what has become of it."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import scripted_engine
from scripted_engine import AGE, ANSWER, BEGIN, DIE, FLOOD, HANG, STALL, WAIT

from dsc_serve.config import EngineConfig, LifeConfig
from dsc_serve.sampling_params import SamplingParams
from dsc_serve.scheduling_params import SchedulingParams
from dsc_serve.worker import client as client_module
from dsc_serve.worker import supervisor as supervisor_module
from dsc_serve.worker.client import EngineClient, EngineDiedError, UnreadError
from dsc_serve.worker.messages import Delta
from dsc_serve.worker.supervisor import EngineStartError, EngineSupervisor

ENGINE = str(Path(scripted_engine.__file__))
HURRIED = SchedulingParams(queue_timeout_s=0.05)
Supervise = Callable[..., "asynccontextmanager[EngineSupervisor]"]


@pytest.fixture
def supervised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., object]:
    monkeypatch.setattr(supervisor_module, "FIRST_BACKOFF_S", 0.01)

    @asynccontextmanager
    async def run(good_starts: int = 100, max_unread: int = 1000, **life: float) -> AsyncIterator[EngineSupervisor]:
        settings = {"ping_s": 0.1, "stall_s": 0.3, "hang_s": 0.8, "start_timeout_s": 30, **life}
        command = (sys.executable, ENGINE, str(tmp_path / "starts"), str(good_starts))
        supervisor = EngineSupervisor(EngineConfig(), LifeConfig(**settings), max_unread, command)  # type: ignore[arg-type]
        await supervisor.start()
        try:
            yield supervisor
        finally:
            await supervisor.stop()

    return run


def scenario(test: Awaitable[None]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(60):
            await test

    asyncio.run(limited())


async def until(condition: Callable[[], object]) -> None:
    while not condition():  # noqa: ASYNC110  what is waited for knows of no event
        await asyncio.sleep(0.01)


async def ask(client: EngineClient, name: str, first: int) -> list[int]:
    tokens: list[int] = []
    async for delta in client.generate(name, [first], SamplingParams()):
        tokens += delta.token_ids
    return tokens


def engine_pid(supervisor: EngineSupervisor) -> int:
    assert supervisor._process is not None
    return supervisor._process.pid


def runs(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def test_requests_that_had_begun_end_and_the_others_are_served_by_the_next_engine(supervised: Supervise) -> None:
    async def test() -> None:
        async with supervised() as supervisor:
            client = supervisor.client
            begun = [asyncio.create_task(ask(client, f"begun{i}", BEGIN)) for i in range(3)]
            waiting = asyncio.create_task(ask(client, "waiting", WAIT))
            await until(lambda: sum(p.begun for p in client._pending.values()) == 3)
            os.kill(engine_pid(supervisor), signal.SIGKILL)
            for task in begun:
                with pytest.raises(EngineDiedError, match="the engine process has ended"):
                    await task
            assert not client.alive
            with pytest.raises(EngineDiedError):
                await ask(client, "new", ANSWER)
            await until(lambda: client.alive)
            assert client.in_flight == 1
            assert (client.restarts, client.trouble) == (1, "")
            assert await ask(client, "new", ANSWER) == [1, engine_pid(supervisor)]
            await until(lambda: client._pending["waiting"].tries == 2)
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
            assert client.in_flight == 0

    scenario(test())


def test_a_request_that_kills_its_engine_is_not_tried_for_ever(supervised: Supervise) -> None:
    async def test() -> None:
        async with supervised() as supervisor:
            with pytest.raises(EngineDiedError):
                await ask(supervisor.client, "poison", DIE)
            await until(lambda: supervisor.client.alive)
            assert supervisor.client.restarts == 2
            assert len(await ask(supervisor.client, "next", ANSWER)) == 2

    scenario(test())


@pytest.mark.parametrize(("kind", "words"), [(HANG, "has not answered"), (STALL, "completed no step")])
def test_an_engine_that_hangs_is_noticed_and_then_replaced(supervised: Supervise, kind: int, words: str) -> None:
    async def test() -> None:
        async with supervised() as supervisor:
            client, first = supervisor.client, engine_pid(supervisor)
            task = asyncio.create_task(ask(client, "a", kind))
            await until(lambda: client.trouble)
            assert words in client.trouble
            assert client.alive, "it is only doubted yet"
            await until(lambda: client.restarts == 1)
            if kind == HANG:  # it said nothing, so the next engine got it; that hangs too
                await until(lambda: client.restarts == 2)
            with pytest.raises(EngineDiedError, match=f"{words}.* raise hang_s or lower step_tokens"):
                await task
            await until(lambda: client.alive)
            assert engine_pid(supervisor) != first
            assert not runs(first)

    scenario(test())


def test_the_next_engine_is_told_how_long_a_request_has_waited(
    supervised: Supervise, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor_module, "FIRST_BACKOFF_S", 0.2)

    async def test() -> None:
        async with supervised() as supervisor:
            started = time.monotonic()
            (age_ms,) = await ask(supervisor.client, "a", AGE)
            assert 200 <= age_ms <= 1000 * (time.monotonic() - started)

    scenario(test())


@pytest.mark.parametrize(
    ("terms", "fault", "words"),
    [
        (SchedulingParams(timeout_s=0.2), signal.SIGSTOP, "did not end within its timeout_s of 0.2 s"),
        (SchedulingParams(timeout_s=0.2), signal.SIGKILL, "did not end within its timeout_s of 0.2 s"),
        (SchedulingParams(queue_timeout_s=0.2), signal.SIGKILL, "did not begin within its queue_timeout_s of 0.2 s"),
    ],
)
def test_a_request_s_time_is_up_even_without_an_engine(
    supervised: Supervise, monkeypatch: pytest.MonkeyPatch, terms: SchedulingParams, fault: signal.Signals, words: str
) -> None:
    monkeypatch.setattr(client_module, "LATE_S", 0.1)
    monkeypatch.setattr(supervisor_module, "FIRST_BACKOFF_S", 20)

    async def test() -> None:
        async with supervised(hang_s=30) as supervisor:
            client, pid = supervisor.client, engine_pid(supervisor)
            deltas = client.generate("a", [WAIT], SamplingParams(), terms)
            first = asyncio.create_task(anext(deltas))
            await until(lambda: client.in_flight)
            os.kill(pid, fault)
            delta = await first
            assert (delta.token_ids, delta.finish_reason) == ([], "timeout")
            assert words in delta.error
            assert not [delta async for delta in deltas]
            assert client.restarts == client.in_flight == 0
            if fault == signal.SIGSTOP:
                os.kill(pid, signal.SIGCONT)

    scenario(test())


def test_a_request_that_may_have_begun_is_not_taken_for_one_that_waits(
    supervised: Supervise, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "LATE_S", 0.05)

    async def test() -> None:
        async with supervised() as supervisor:
            task = asyncio.create_task(anext(supervisor.client.generate("a", [WAIT], SamplingParams(), HURRIED)))
            _, unfinished = await asyncio.wait((task,), timeout=0.4)
            assert unfinished
            task.cancel()

    scenario(test())


def test_an_engine_that_recovers_in_time_is_kept(supervised: Supervise) -> None:
    async def test() -> None:
        async with supervised(hang_s=30) as supervisor:
            client, pid = supervisor.client, engine_pid(supervisor)
            os.kill(pid, signal.SIGSTOP)
            await until(lambda: "has not answered" in client.trouble)
            silent = client.heartbeat_age_s
            assert silent >= supervisor.life.stall_s / 2
            os.kill(pid, signal.SIGCONT)
            await until(lambda: not client.trouble)
            assert client.heartbeat_age_s < silent
            assert await ask(client, "a", ANSWER) == [1, pid]

    scenario(test())


def test_a_restart_loop_gives_up_and_says_so(supervised: Supervise, caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        async with supervised(good_starts=1, max_restarts=3) as supervisor:
            client = supervisor.client
            waiting = asyncio.create_task(ask(client, "waiting", WAIT))
            await until(lambda: client.in_flight)
            os.kill(engine_pid(supervisor), signal.SIGKILL)
            with pytest.raises(EngineDiedError, match=r"not be started.*; it was started again 3 times.*gives up"):
                await waiting
            assert "no more engines" not in client.trouble, "what it is may be nobody's business outside"
            assert client.gave_up
            with pytest.raises(EngineDiedError, match="gives up"):
                await ask(client, "new", ANSWER)

    scenario(test())
    assert any(record.levelname == "CRITICAL" and "gives up" in record.message for record in caplog.records)
    assert any("no more engines" in record.message for record in caplog.records)


def test_another_model_in_the_folder_is_not_served_in_the_first_one_s_name(
    supervised: Supervise, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def test() -> None:
        (tmp_path / "model").write_text("a")
        async with supervised() as supervisor:
            client = supervisor.client
            os.kill(engine_pid(supervisor), signal.SIGKILL)
            await until(lambda: client.restarts == 1 and client.alive)
            assert await ask(client, "same", ANSWER)
            (tmp_path / "model").write_text("b")
            waiting = asyncio.create_task(ask(client, "waiting", WAIT))
            await until(lambda: client.in_flight)
            os.kill(engine_pid(supervisor), signal.SIGKILL)
            with pytest.raises(EngineDiedError, match="is not the one that this server was started with"):
                await waiting
            assert client.gave_up and not client.alive
            assert (tmp_path / "starts").stat().st_size == 3, "a model that is not the right one is not loaded again"

    scenario(test())
    assert any(record.levelname == "CRITICAL" and "is not the one" in record.message for record in caplog.records)


def test_an_engine_that_never_came_up_is_its_starter_s_error(supervised: Supervise) -> None:
    async def test() -> None:
        with pytest.raises(EngineStartError, match="no more engines"):
            async with supervised(good_starts=0):
                pass

    scenario(test())


def test_news_that_nobody_takes_end_their_request(supervised: Supervise) -> None:
    async def test() -> None:
        async with supervised(max_unread=8) as supervisor:
            client = supervisor.client
            deltas = client.generate("slow", [FLOOD], SamplingParams())
            taken: list[Delta] = [await anext(deltas)]
            await until(lambda: not client.in_flight)
            with pytest.raises(UnreadError, match="left 8 steps' tokens unread"):
                async for delta in deltas:
                    taken.append(delta)
            assert len(taken) <= 10
            stats = await client.stats()
            assert stats.running == 0, "the engine was not told"

    scenario(test())


def test_the_end_of_the_server_ends_requests_and_the_process(supervised: Supervise) -> None:
    async def test() -> None:
        async with supervised() as supervisor:
            pid = engine_pid(supervisor)
            task = asyncio.create_task(ask(supervisor.client, "a", BEGIN))
            await until(lambda: supervisor.client.in_flight)
        with pytest.raises(EngineDiedError, match="shutting down"):
            await task
        assert not runs(pid)

    scenario(test())


def test_an_end_that_comes_together_with_an_answer_is_no_less_an_end(supervised: Supervise) -> None:
    """`asyncio.wait_for` of Python 3.11 would take the answer and go on; the server then never ends."""

    async def run() -> None:
        async with supervised(ping_s=20.0, stall_s=30.0, hang_s=40.0) as supervisor:
            connection = supervisor.client._connection
            assert connection is not None
            asking = asyncio.create_task(connection.stats(20.0))
            await asyncio.sleep(0)
            (answer,) = connection._stats.values()
            answer.set_result("an answer")
            asking.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asking
            watching = asyncio.create_task(supervisor._broken(connection))
            await asyncio.sleep(0)
            connection.lose("gone")
            watching.cancel()
            with pytest.raises(asyncio.CancelledError):
                await watching

    scenario(run())
