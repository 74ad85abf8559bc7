"""A cluster of Ray's that is told to stop, and a replica whose caller leaves: without Ray itself."""

from __future__ import annotations

import asyncio
import threading
import warnings
from types import SimpleNamespace

import pytest
from starlette.types import Message, Receive, Scope, Send

with warnings.catch_warnings(action="ignore"):  # of Ray's own use of pydantic
    pytest.importorskip("ray.serve", reason="Ray is not installed")

from ray.serve.schema import ServeDeploySchema

from dsc_serve.scale import local
from dsc_serve.scale.call import AnswerPart, Call
from dsc_serve.scale.placement import PlacementKey
from dsc_serve.scale.replica import MAX_UNSENT, BrokenAnswerError, Replica


def test_a_cluster_that_does_not_come_up_can_be_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    stop, looks = threading.Event(), 0

    def status() -> SimpleNamespace:
        nonlocal looks
        looks += 1
        if looks == 2:
            stop.set()
        return SimpleNamespace(applications={})

    monkeypatch.setattr(local, "serve", SimpleNamespace(start=lambda **_: None, status=status))
    monkeypatch.setattr(local, "_get_global_client", lambda: SimpleNamespace(deploy_apps=lambda _: None))
    config = ServeDeploySchema.model_validate({"applications": [{"name": "a", "import_path": "a:b"}]})
    assert local.deploy(config, stop) is False
    assert looks == 2


class Started(Replica):
    """A replica around an app alone."""

    def __init__(self, app: object) -> None:
        self._name, self._app = "r", app  # type: ignore[assignment]

    def __del__(self) -> None:  # type: ignore[override]
        pass


CALL = Call("POST", "/", b"", [], b"", None, PlacementKey(""))
BEGIN: Message = {"type": "http.response.start", "status": 200, "headers": []}
PART: Message = {"type": "http.response.body", "body": b"x", "more_body": True}


def test_a_caller_that_leaves_a_full_queue_ends_its_answer() -> None:
    full = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send(BEGIN)
        await send(PART)
        await asyncio.sleep(0)
        for sent in range(MAX_UNSENT + 1):
            if sent == MAX_UNSENT:
                full.set()
            await send(PART)

    async def run() -> None:
        answer = Started(app).answer(CALL)
        await anext(answer)
        assert isinstance(await anext(answer), AnswerPart)
        await full.wait()
        await asyncio.wait_for(answer.aclose(), 5)

    asyncio.run(run())


def test_an_answer_settles_its_account_after_its_last_message() -> None:
    settled: list[bool] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send(BEGIN)
        await send({**PART, "more_body": False})
        await asyncio.sleep(0.05)
        settled.append(True)

    async def run() -> None:
        parts = [part async for part in Started(app).answer(CALL)]
        assert isinstance(parts[-1], AnswerPart) and parts[-1].last

    asyncio.run(asyncio.wait_for(run(), 5))
    assert settled


def test_an_answer_that_breaks_off_is_told() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send(BEGIN)
        await send(PART)
        raise KeyError("a bug")

    async def run() -> None:
        with pytest.raises(BrokenAnswerError):
            async for _ in Started(app).answer(CALL):
                pass

    asyncio.run(asyncio.wait_for(run(), 5))
