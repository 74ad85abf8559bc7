"""The page at /: what is sent, to whom, under which paths, and with which headers."""

from __future__ import annotations

import asyncio
import re
import tomllib
from collections.abc import Callable
from importlib import resources
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI, Request
from support.fake_engine import FakeEngine
from support.serving import ask, live
from test_connections import said

from dsc_serve.addresses import OWN_PATHS
from dsc_serve.config import AccessConfig, ConfigError, EngineConfig, ServerConfig
from dsc_serve.scale.call import Call
from dsc_serve.server import page
from dsc_serve.server.app import create_app
from dsc_serve.server.keys import KeyRing
from dsc_serve.settings import SETTINGS
from dsc_serve.text.tokenizer import Tokenizer

KEY = "k" * 16
FILES = sorted(page.paths())
ROOT = Path(__file__).parents[2]
Build = Callable[..., FastAPI]


@pytest.fixture
def page_app(engine: FakeEngine, tokenizer: Tokenizer) -> Build:
    def build(ring: KeyRing | None = None, metrics_key: bool = False, **settings: object) -> FastAPI:
        access = AccessConfig(metrics_key=metrics_key)
        config = ServerConfig(served_model_name="fake", access=access, engine=EngineConfig(max_running=2), **settings)
        return create_app(config, engine, tokenizer, ring)

    return build


def test_the_page_is_all_of_its_folder() -> None:
    sources = {entry.name for entry in resources.files(page.__package__).iterdir()} - {"__init__.py", "__pycache__"}
    assert {path.removeprefix("/page/") or "index.html" for path in FILES} - {"/"} | {"index.html"} == sources
    assert len(FILES) > 10


def test_a_wheel_has_every_file_of_the_page() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = project["tool"]["setuptools"]["package-data"]["dsc_serve"]
    package = ROOT / "dsc_serve"
    packed = {file for pattern in patterns for file in package.glob(pattern)}
    assert {file for file in (package / "server" / "page").iterdir() if file.suffix in page.MEDIA_TYPES} <= packed


@pytest.mark.parametrize("path", FILES)
def test_every_file_is_sent_as_what_it_is_under_a_strict_policy(page_app: Build, path: str) -> None:
    answer = ask(page_app(), "GET", path)
    assert answer.status_code == 200
    suffix = Path(path).suffix or ".html"
    assert answer.headers["content-type"].split(";")[0] == page.MEDIA_TYPES[suffix]
    assert answer.headers["x-content-type-options"] == "nosniff"
    policy = dict(part.strip().split(" ", 1) for part in answer.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'" and policy["frame-ancestors"] == "'none'"
    assert all(policy[f"{kind}-src"] == "'self'" for kind in ("script", "style", "connect", "img"))
    assert policy["require-trusted-types-for"] == "'script'" and policy["trusted-types"] == "'none'"
    assert "unsafe" not in str(policy)
    assert "access-control-allow-origin" not in answer.headers


def test_nothing_is_loaded_from_elsewhere_and_nothing_stands_within_the_document() -> None:
    for file in page.page_files(""):
        text = file.body.decode()
        addresses = set(re.findall(r"(?:https?:)?//[\w.-]+\.\w+[^\s\"')]*", re.sub(r"^\s*//.*$", "", text, flags=re.M)))
        assert addresses <= {"http://www.w3.org/2000/svg"}, file.path
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text), (
            file.path
        )
    index = next(file for file in page.page_files("") if file.path == "/").body.decode()
    assert not re.search(r"<script(?![^>]* src=)|<style|\son\w+=|\sstyle=|javascript:", index)
    assert all(f"/{path}" in FILES for path in re.findall(r"(?:src|href)=\"([^\"]+)\"", index))


def test_every_module_that_is_imported_is_there() -> None:
    for file in page.page_files(""):
        for name in re.findall(r"from \"\./([^\"]+)\"", file.body.decode()):
            assert f"/page/{name}" in FILES, (file.path, name)


def test_a_browser_that_has_a_file_is_told_so_and_gets_nothing_again(page_app: Build) -> None:
    app = page_app()
    first = ask(app, "GET", "/")
    tag = first.headers["etag"]
    assert first.headers["cache-control"] == "no-cache"
    assert len({ask(app, "GET", path).headers["etag"] for path in FILES}) == len(FILES)
    for known in (tag, f"W/{tag}", f'"other", {tag}', "*"):
        again = ask(app, "GET", "/", headers={"if-none-match": known})
        assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", tag)
        assert "content-security-policy" in again.headers
    for other in ('"other"', tag.strip('"'), ""):
        assert ask(app, "GET", "/", headers={"if-none-match": other}).status_code == 200
    assert ask(page_app(root_path="/llm"), "GET", "/").headers["etag"] != tag, "another page, another tag"


@pytest.mark.parametrize("path", ["/", "/page/app.js"])
def test_a_head_is_the_head_of_the_whole(page_app: Build, path: str) -> None:
    def heads(method: str) -> tuple[list[str], bytes]:
        request = f"{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode()
        head, _, body = asyncio.run(said(page_app(), request)).partition(b"\r\n\r\n")
        varying = ("date:", "x-request-id:")
        return sorted(x for x in head.decode().lower().split("\r\n") if not x.startswith(varying)), body

    (head, nothing), (whole, body) = heads("HEAD"), heads("GET")
    assert head == whole and nothing == b"" and f"content-length: {len(body)}" in head


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE"])
def test_the_page_can_only_be_read(page_app: Build, method: str) -> None:
    answer = ask(page_app(), method, "/")
    assert answer.status_code == 405
    assert answer.json()["error"]["code"] == "method_not_allowed"


def test_the_page_needs_no_key_and_what_it_asks_for_does(page_app: Build) -> None:
    app = page_app(KeyRing("", f"me:{KEY}"), metrics_key=True)
    assert all(ask(app, "GET", path).status_code == 200 for path in (*FILES, "/page/app.js/"))
    for path in ("/v1/models", "/metrics", "/page", "/page/nothing.js", "/page/app.js/x", "/page//app.js", "/pages"):
        assert ask(app, "GET", path).status_code == 401, path
    assert ask(app, "POST", "/v1/completions", json={"prompt": "x"}).status_code == 401
    assert ask(app, "GET", "/page/nothing.js", headers={"authorization": f"Bearer {KEY}"}).status_code == 404


@pytest.mark.parametrize("path", ["/page/../__init__.py", "/page/__init__.py", "/page/%2e%2e/app.py", "/page/.."])
def test_nothing_but_the_files_of_the_page_can_be_had(page_app: Build, path: str) -> None:
    request = f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode()
    assert asyncio.run(said(page_app(), request)).startswith(b"HTTP/1.1 404 ")


def test_a_server_without_the_page_has_nothing_of_it(page_app: Build) -> None:
    for path in FILES:
        assert ask(page_app(page=False), "GET", path).json()["error"]["code"] == "unknown_url"
        assert ask(page_app(KeyRing("", f"me:{KEY}"), page=False), "GET", path).status_code == 401
    assert SETTINGS["page"].default is True


@pytest.mark.parametrize("given", ["", "/llm"])
@pytest.mark.parametrize("root_path", ["/llm", "/a/b.c"])
def test_behind_a_path_everything_is_there_whether_the_proxy_takes_it_off_or_not(
    page_app: Build, root_path: str, given: str
) -> None:
    before = root_path if given else ""
    app = page_app(KeyRing("", f"me:{KEY}"), root_path=root_path)
    key = {"authorization": f"Bearer {KEY}"}
    index = ask(app, "GET", before + "/")
    assert f'<head>\n<base href="{root_path}/">' in index.text
    assert ask(app, "GET", before or "/").text == index.text
    assert ask(app, "GET", before + "/page/app.js").status_code == 200
    assert ask(app, "GET", before + "/v1/models").status_code == 401
    assert ask(app, "GET", before + "/v1/models", headers=key).json()["data"][0]["id"] == "fake"
    assert ask(app, "GET", before + "/health/").status_code == 200
    done = ask(app, "POST", before + "/v1/completions", headers=key, json={"prompt": "x", "max_tokens": 1})
    assert done.status_code == 200
    document = ask(app, "GET", before + "/openapi.json", headers=key).json()
    assert document["servers"] == [{"url": root_path}] and "/" not in document["paths"]
    assert f"{root_path}/openapi.json" in ask(app, "GET", before + "/docs", headers=key).text
    metrics = ask(app, "GET", "/metrics").text
    assert 'requests_total{endpoint="/v1/completions",status="200"} 1.0' in metrics
    assert 'requests_total{endpoint="/page",status="200"} 1.0' in metrics
    assert ask(app, "GET", root_path + "x/health").status_code == 401, "another path than the server's"


def test_without_a_path_there_is_no_base(page_app: Build) -> None:
    assert "<base" not in ask(page_app(), "GET", "/").text
    assert ask(page_app(), "GET", "/llm/health").status_code == 404


@pytest.mark.parametrize(
    "path", ["llm", "/llm/", "/", "//x", "/a//b", "/a b", "/../a", "/a/..", "/.", '/"><script>', "/é", "/a?b", "/%41"]
)
def test_a_path_that_is_none_is_refused(path: str) -> None:
    with pytest.raises(ConfigError, match=r"root_path is .*; it must be empty or names of letters"):
        ServerConfig(root_path=path)


@pytest.mark.parametrize("name", OWN_PATHS)
def test_a_path_that_begins_as_the_server_s_own_is_refused(name: str) -> None:
    for path in (f"/{name}", f"/{name}/more"):
        with pytest.raises(ConfigError, match="must not begin as the server's own paths do"):
            ServerConfig(root_path=path)
    assert ServerConfig(root_path=f"/{name}x").root_path == f"/{name}x"


def test_the_paths_of_the_server_are_those_that_are_kept_for_it(page_app: Build) -> None:
    routes = {route.path.split("/")[1] for route in page_app().routes} - {""}
    assert routes == set(OWN_PATHS)


def test_the_page_comes_through_the_door_of_many_replicas(page_app: Build) -> None:
    """What the door makes of a request, to the app that a replica runs."""
    app = page_app(root_path="/llm")

    async def through(path: str) -> httpx.Response:
        scope = {"type": "http", "method": "GET", "path": path, "query_string": b"", "client": None, "headers": []}
        call = Call.of(Request(scope), b"")

        async def door(scope: object, receive: object, send: object) -> None:
            await app(call.scope(), receive, send)  # type: ignore[arg-type]

        async with httpx.AsyncClient(transport=httpx.ASGITransport(door), base_url="http://door") as client:
            return await client.get(path)

    for path in FILES:
        assert asyncio.run(through(path)).content == asyncio.run(through(f"/llm{path}")).content != b""


def test_a_model_says_how_many_atoms_there_are_to_pick(page_app: Build, engine: FakeEngine) -> None:
    card = ask(page_app(), "GET", "/v1/models").json()["data"][0]
    assert card["dsc"] == {"layers": 2, "atoms": 500, "atoms_per_token": 3}
    assert card["picks"] == {"of": "atoms", "layers": [0, 1], "number": 500, "per_token": 3}
    engine.capacity = type(engine.capacity)(300, 512, 64, 16)
    assert ask(page_app(), "GET", "/v1/models").json()["data"][0]["dsc"] is None


def test_what_a_model_is_called_is_never_markup(engine: FakeEngine, tokenizer: Tokenizer) -> None:
    """No answer that holds a name or a text can be taken for a document."""
    name = "<img src=x onerror=alert(1)>"
    app = create_app(ServerConfig(served_model_name=name), engine, tokenizer)

    async def run() -> list[httpx.Response]:
        async with live(app) as port, httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
            return [await client.get(path) for path in ("/v1/models", f"/v1/models/{name}x", f"/{name}", "/")]

    *answers, index = asyncio.run(run())
    assert name not in index.text
    assert all(answer.headers["content-type"] == "application/json" for answer in answers)
