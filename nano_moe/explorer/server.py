"""The local server: the page, its documents, routing of typed text, generating. Loopback only.

A page of another site may send requests here, too, and a name of another site may be made to
resolve to this machine: requests are answered only under our own name, and only to our own page.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
import webbrowser
from collections.abc import AsyncIterator, Sequence
from types import FrameType
from typing import TypeVar

import uvicorn
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nano_moe.errors import TRACEBACK, UserError
from nano_moe.explorer import page
from nano_moe.explorer.contract import Settings
from nano_moe.explorer.desk import Desk
from nano_moe.explorer.opened import GENERATED, TEXT, Opened, overview

HOST, PORT = "127.0.0.1", 7860
BODY = 131_072  # bytes of a request: the longest text, every character escaped twice over
HEADERS = {
    b"cache-control": b"no-store",
    b"content-security-policy": b"frame-ancestors 'none'",
    b"cross-origin-resource-policy": b"same-origin",
    b"referrer-policy": b"no-referrer",
    b"x-content-type-options": b"nosniff",
}


class Asked(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Text(Asked):
    """A text to route."""

    text: str = Field(max_length=TEXT)


class Continue(Asked):
    """A text to go on with."""

    prompt: str = Field(max_length=TEXT)
    tokens: int = Field(ge=1, le=GENERATED)
    temperature: float = Field(ge=0, le=10)
    top_p: float = Field(gt=0, le=1)
    seed: int = Field(ge=0, lt=2**53)

    def settings(self) -> Settings:
        return {
            "tokens": self.tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "seed": self.seed,
        }


Question = TypeVar("Question", bound=Asked)


class Guard:
    """Answers requests under one of `hosts` only, and none that another site's page sends."""

    def __init__(self, app: ASGIApp, hosts: Sequence[str]):
        self.app, self.hosts = app, set(hosts)
        self.origins = {f"http://{host}" for host in hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *HEADERS.items()]
            await send(message)

        given = [(name, value.decode("latin-1")) for name, value in scope["headers"]]
        hosts = [value for name, value in given if name == b"host"]
        origins = {value for name, value in given if name == b"origin"}
        if len(hosts) != 1 or hosts[0] not in self.hosts or not origins <= self.origins:
            refused = _fault("this address is for the explorer's own page", 403)
            return await refused(scope, receive, with_headers)
        await self.app(scope, receive, with_headers)


class Server(uvicorn.Server):
    """One that also ends what is under way when it is interrupted, so that nobody waits for it."""

    def __init__(self, config: uvicorn.Config, desk: Desk):
        super().__init__(config)
        self.desk = desk

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.desk.ended = True
        super().handle_exit(sig, frame)


def application(desk: Desk, port: int) -> ASGIApp:
    """The page of a desk's runs, as it is served on a port."""
    opened = desk.opened

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        desk.close()

    async def root(request: Request) -> Response:
        desk.later(opened[0].warm_up)  # not before: the page is to be there first
        return HTMLResponse(page.html({"overview": overview(opened, live=True)}, live=True))

    async def document(request: Request) -> Response:
        try:
            found = await desk.document(request.path_params["key"])
        except UserError as error:  # as a file that stands alone has it
            return _fault(str(error), 200)
        return _fault("no such document", 404) if found is None else _json(found)

    async def route(request: Request) -> Response:
        one, asked = _run(opened, request), await _question(request, Text)
        return _json(page.dumped(await desk.do(one.route, asked.text)))

    async def generate(request: Request) -> Response:
        one, asked = _run(opened, request), await _question(request, Continue)
        return await _stream(desk, one, asked)

    app = Starlette(
        routes=[
            Route("/", root),
            Route("/api/runs/{run:int}/route", route, methods=["POST"]),
            Route("/api/runs/{run:int}/generate", generate, methods=["POST"]),
            Route("/api/{key:path}", document),
        ],
        exception_handlers={
            UserError: lambda request, error: _fault(str(error), 422),
            Exception: lambda request, error: _fault(_unforeseen(error), 500),
            HTTPException: lambda request, error: _fault(error.detail, error.status_code),
        },
        lifespan=lifespan,
        max_body_size=BODY,
    )
    return Guard(app, [f"{name}:{port}" for name in (HOST, "localhost")])


def serve(opened: Sequence[Opened], *, port: int | None = None, browse: bool = True) -> None:
    """Serve until interrupted; raises UserError where the port that was asked for is taken."""
    with contextlib.closing(bind(port)) as listening:
        number = listening.getsockname()[1]
        url = f"http://{HOST}:{number}/"
        print(f"{', '.join(one.name for one in opened)}: {url} (Ctrl-C ends it)", flush=True)
        if browse and _has_browser():
            threading.Thread(target=webbrowser.open, args=(url,), daemon=True).start()
        desk = Desk(opened)
        config = uvicorn.Config(
            application(desk, number),
            log_level="error" if TRACEBACK in os.environ else "critical",
            access_log=False,
            ws="none",
            timeout_graceful_shutdown=3,
        )
        with contextlib.suppress(KeyboardInterrupt):
            Server(config, desk).run(sockets=[listening])


def bind(port: int | None) -> socket.socket:
    """A listening socket: on that port, or else on ours or any free one; raises UserError."""
    for wanted in (port,) if port is not None else (PORT, 0):
        listening = socket.socket()
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((HOST, wanted))
            listening.listen()
            return listening
        except (OSError, OverflowError):
            listening.close()
    raise UserError(f"--port {port}: taken or not allowed; name another, or none to get a free one")


async def _stream(desk: Desk, one: Opened, asked: Continue) -> Response:
    """Lines of JSON: the prompt's trace, then each token, or the fault that ended it."""
    steps = await desk.do(one.generate, asked.prompt, asked.settings())
    prompt = await desk.do(one.route, asked.prompt)

    async def lines() -> AsyncIterator[str]:
        try:
            yield page.dumped({"prompt": prompt}) + "\n"
            while (step := await desk.do(next, steps, None)) is not None:
                yield page.dumped(step) + "\n"
        except UserError as error:
            yield page.dumped({"error": str(error)}) + "\n"
        finally:
            desk.later(steps.close)

    return StreamingResponse(lines(), media_type="application/x-ndjson")


def _run(opened: Sequence[Opened], request: Request) -> Opened:
    number = request.path_params["run"]
    if number >= len(opened):
        raise HTTPException(404, "no such run")
    return opened[number]


async def _question(request: Request, kind: type[Question]) -> Question:
    """The request's JSON; raises UserError where it is none of that kind."""
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise HTTPException(415, "send application/json")
    body = await request.body()
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        fault = error.errors()[0]
        field = ".".join(map(str, fault["loc"])) or "request"
        raise UserError(f"{field}: {fault['msg']}") from error


def _unforeseen(error: Exception) -> str:
    what = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    return f"{what}; not foreseen, set {TRACEBACK}=1 to see where"


def _fault(message: str, status: int) -> Response:
    return JSONResponse({"error": message}, status)


def _json(text: str) -> Response:
    return Response(text, media_type="application/json")


def _has_browser() -> bool:
    """Whether there is a screen; without one, a text browser would take the terminal over."""
    if sys.platform in ("darwin", "win32"):
        return True
    return any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY"))
