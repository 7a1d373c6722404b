"""The short way of JSON bodies: the same answers as FastAPI's own way, which takes every call that it does not."""

import asyncio
import json
from collections.abc import Iterator
from typing import Annotated, Any

import fastapi.routing
import pytest
from fastapi import APIRouter, BackgroundTasks, Depends, FastAPI, Header, Request, Response
from fastapi import Body as InBody
from fastapi.testclient import TestClient
from live import Live, fake_server
from pydantic import BaseModel

from fewstep.server.json_routes import JSONReply, JSONRoute

PLAIN = "application/json"
LONGER = "application/json; charset=utf-8"
BODIES = [
    '{"prompt": "a red circle", "steps": 2, "seed": 3}',
    '{"prompt": "\\u00e9\\ud83d\\ude00", "seed": 18446744073709551615}',
    '{"prompt": "twice", "seed": 1, "seed": 2}',
    '{"prompt": 3}',
    '{"prompt": "a", "steps": "2"}',
    '{"prompt": "a", "steps": 2.0}',
    '{"prompt": "a", "steps": 99}',
    '{"prompt": "a", "guidance": NaN}',
    '{"prompt": "a", "guidance": 1e999}',
    '{"prompt": "a", "promt": "b"}',
    '{"prompt": "\\ud83d"}',
    '{"prompt": "a"',
    "[]",
    "null",
    "",
    "[" * 5000,
]


@pytest.fixture(scope="module")
def live():
    with fake_server() as server:
        yield server


def said(reply: Any) -> Any:
    """An answer without what differs from call to call."""
    found = reply.json()
    return reply.status_code, {**found, "timings": sorted(found["timings"])} if "timings" in found else found


@pytest.mark.parametrize("text", BODIES, ids=range(len(BODIES)))
def test_both_ways_answer_alike(live: Live, text: str):
    short, usual = (
        live.http.post("/v1/generate", content=text.encode(), headers={"content-type": kind})
        for kind in (PLAIN, LONGER)
    )
    assert said(short) == said(usual)


@pytest.fixture
def usual(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The paths that FastAPI solved the parameters of."""
    found, solve = [], fastapi.routing.solve_dependencies

    async def counted(*, request: Request, **known: Any) -> Any:
        found.append(request.url.path)
        return await solve(request=request, **known)

    monkeypatch.setattr(fastapi.routing, "solve_dependencies", counted)
    return found


class Body(BaseModel):
    number: int


def app() -> TestClient:
    router = APIRouter(route_class=JSONRoute)

    @router.post("/short")
    async def short(body: Body, request: Request, mark: Annotated[str | None, Header()] = None) -> Response:
        return JSONReply({"number": body.number, "mark": mark, "path": request.url.path})

    @router.post("/needs-header")
    async def needs_header(body: Body, mark: Annotated[str, Header()]) -> Response:
        return JSONReply({"mark": mark})

    @router.post("/in-path/{name}")
    async def in_path(body: Body, name: str) -> Response:
        return JSONReply({"name": name})

    @router.post("/embedded")
    async def embedded(body: Annotated[Body, InBody(embed=True)]) -> Response:
        return JSONReply({"number": body.number})

    @router.post("/answers-itself")
    async def answers_itself(body: Body, response: Response, later: BackgroundTasks) -> Response:
        return JSONReply({"given": [type(given).__name__ for given in (response, later)]})

    @router.post("/guarded", dependencies=[Depends(lambda: None)])
    async def guarded(body: Body) -> Response:
        return JSONReply({"number": body.number})

    @router.post("/value")
    async def value(body: Body) -> dict[str, int]:
        return {"number": body.number}

    made = FastAPI()
    made.include_router(router)
    return TestClient(made)


def test_a_plain_call_goes_the_short_way(usual: list[str]):
    assert app().post("/short", json={"number": 3}).json() == {"number": 3, "mark": None, "path": "/short"}
    assert usual == []


@pytest.mark.parametrize(
    ("path", "headers", "status", "answer"),
    [
        ("/short", {"mark": "x"}, 200, {"number": 3, "mark": "x", "path": "/short"}),
        ("/short", {"content-type": LONGER}, 200, {"number": 3, "mark": None, "path": "/short"}),
        ("/needs-header", {"mark": "x"}, 200, {"mark": "x"}),
        ("/needs-header", {}, 422, None),
        ("/in-path/a", {}, 200, {"name": "a"}),
        ("/embedded", {}, 422, None),
        ("/answers-itself", {}, 200, {"given": ["Response", "BackgroundTasks"]}),
        ("/guarded", {}, 200, {"number": 3}),
        ("/value", {}, 200, {"number": 3}),
    ],
)
def test_what_asks_for_more_goes_fastapis_way(
    usual: list[str], path: str, headers: dict[str, str], status: int, answer: Any
):
    reply = app().post(path, content=b'{"number": 3}', headers={"content-type": PLAIN, **headers})
    assert reply.status_code == status and usual == [path]
    assert answer is None or reply.json() == answer


def test_a_body_that_is_not_valid_gets_fastapis_error(usual: list[str]):
    reply = app().post("/short", json={"number": "three"})
    assert reply.status_code == 422 and reply.json()["detail"][0]["loc"] == ["body", "number"] and usual == ["/short"]


@pytest.mark.parametrize("kind", [PLAIN, LONGER])
def test_a_caller_who_leaves_in_the_middle_of_a_body_is_no_fault_of_the_servers(kind: str):
    messages: Iterator[Any] = iter(({"type": "http.request", "body": b'{"num', "more_body": True},))
    sent: list[Any] = []

    async def receive() -> Any:
        return next(messages, {"type": "http.disconnect"})

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"content-type", kind.encode())]
    scope = {"type": "http", "method": "POST", "path": "/short", "headers": headers, "query_string": b""}
    asyncio.run(app().app(scope, receive, send))
    assert sent[0]["status"] == 400


def test_a_reply_is_json_as_python_writes_it():
    content = {"text": 'é\u2028"\\', "numbers": [1, 2.5, 1e-7, 2**70], "none": None, "pairs": ({"a": True},)}
    found = json.loads(JSONReply(content).body)
    assert found == json.loads(json.dumps(content))
    assert json.loads(JSONReply({"never": float("nan")}).body) == {"never": None}
