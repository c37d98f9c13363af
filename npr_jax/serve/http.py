"""HTTP around the routes: bodies, errors, keys, streams, and clients that leave."""

import asyncio
import contextlib
import hmac
import json
import random
import sys
import traceback
from collections import abc
from typing import TypeVar

import pydantic
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from npr_jax.serve.errors import ApiError

Body = TypeVar("Body", bound=pydantic.BaseModel)
REQUEST_ID = "x-request-id"
OPEN = frozenset({"/", "/health", "/version", "/metrics", "/openapi.json"})  # without a key


def failure(error: ApiError) -> JSONResponse:
    """An error as OpenAI's clients read it."""
    return JSONResponse(error.body(), error.status, error.headers)


async def read(request: Request, kind: type[Body], most: int, seconds: float) -> Body:
    """The body of a request; raises ApiError for one that is too large, too slow, or no JSON of
    this kind."""
    media = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if media != "application/json":  # which a page of another origin cannot send unasked
        raise ApiError(415, f"Content-Type is {media!r}, needed is 'application/json'.")
    raw = bytearray()
    too_large = ApiError(413, f"The body has more than {most} bytes.", code="body_too_large")
    if int(request.headers.get("content-length") or 0) > most:
        raise too_large
    try:
        async with asyncio.timeout(seconds):
            async for part in request.stream():
                raw += part
                if len(raw) > most:
                    raise too_large
    except TimeoutError as error:
        raise ApiError(408, f"The body did not come within {seconds:g} s.") from error
    request.state.body_size = len(raw)
    try:
        return kind.model_validate_json(bytes(raw))
    except pydantic.ValidationError as error:
        raise _unfit(error) from error


def _unfit(error: pydantic.ValidationError) -> ApiError:
    """What is wrong with a body, in its own terms."""
    # Of alternatives (a text or a list) the one that came furthest says most.
    first = max(error.errors(include_url=False, include_input=False), key=lambda e: len(e["loc"]))
    place = [part for part in first["loc"] if _is_field(part)]
    path = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in place).lstrip(".")
    text = f"{path}: {first['msg']}" if path else first["msg"]
    text = text.encode("ascii", "backslashreplace").decode()
    param = next((part for part in place if isinstance(part, str)), None)
    return ApiError(400, text, param, code="invalid_body" if param is None else "invalid_value")


def _is_field(part: int | str) -> bool:
    """Whether a part of an error's place is the client's, and not pydantic's name of a type."""
    return isinstance(part, int) or (part.isidentifier() and part not in ("str", "int", "float"))


class Json(Response):
    """An answer, with the texts of a model."""

    media_type = "application/json"

    def render(self, content: dict) -> bytes:
        """In UTF-8."""
        return _json(content)


class EventStream(Response):
    """Server-sent events: every `data` is a JSON text. Ends with `[DONE]`, after an error too.

    `leave()` is called when the client has gone or everything is told.
    """

    media_type = "text/event-stream"

    def __init__(
        self, data: abc.AsyncIterator[dict], leave: abc.Callable[[], None], headers: dict[str, str]
    ):
        self.status_code, self.background = 200, None
        self._data, self._leave = data, leave
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no"} | headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends what there is, until there is no more or nobody listens."""
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        async with leaving(receive, self._leave):
            await send(start)
            try:
                async for value in self._data:
                    # Those of /v1/responses have a name of their own.
                    name = b"event: %s\n" % value["type"].encode() if "type" in value else b""
                    await self._send(send, name + b"data: " + _json(value))
            except ApiError as error:
                await self._send(send, b"data: " + _json(error.body()))
            except Exception as error:
                await self._send(send, b"data: " + _json(failed(error).body()))
            await self._send(send, b"data: [DONE]")
            await send({"type": "http.response.body", "body": b""})

    async def _send(self, send: Send, lines: bytes) -> None:
        await send({"type": "http.response.body", "body": lines + b"\n\n", "more_body": True})


def failed(error: Exception) -> ApiError:
    """What a client hears of a fault of the server, which is told in full where it runs."""
    traceback.print_exception(error, file=sys.stderr)
    return ApiError(500, "The server failed.")


def _json(value: dict) -> bytes:
    # A model may say a half of a character's pair, which UTF-8 does not have.
    return json.dumps(value, ensure_ascii=False, allow_nan=False).encode(errors="replace")


@contextlib.asynccontextmanager
async def leaving(receive: Receive, leave: abc.Callable[[], object]) -> abc.AsyncIterator[None]:
    """Calls `leave` when the client has gone, and at the end."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        leave()

    watcher = asyncio.create_task(watch())
    try:
        yield
    finally:
        watcher.cancel()
        leave()


class Door:
    """What every request passes: it gets an id, shows its key, and is answered with JSON whatever
    happens. `answered(path, status)` hears of every answer."""

    def __init__(
        self,
        app: ASGIApp,
        key: str | None,
        open_paths: frozenset[str],
        answered: abc.Callable[[Scope, int], None],
    ):
        self._app, self._open, self._answered = app, open_paths, answered
        self._key = None if key is None else f"Bearer {key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        name = headers.get(REQUEST_ID, "")
        if not (0 < len(name) <= 128 and name.isascii() and name.isprintable()):
            name = f"{random.getrandbits(128):032x}"  # no call of the system, as uuid4
        scope.setdefault("state", {})["request_id"] = name
        status = 0

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)[REQUEST_ID] = name
            await send(message)

        try:
            if self._known(scope, headers):
                await self._app(scope, receive, answer)
            else:
                error = ApiError(401, "Incorrect API key provided.", code="invalid_api_key")
                error.headers["www-authenticate"] = "Bearer"
                await failure(error)(scope, receive, answer)
        except ClientDisconnect:
            return
        except Exception as error:
            told = failed(error)
            if not status:
                await failure(told)(scope, receive, answer)
        finally:
            if status:
                self._answered(scope, status)

    def _known(self, scope: Scope, headers: Headers) -> bool:
        """Whether a request may come in; takes the same time for every wrong key."""
        if self._key is None or scope["path"] in self._open or scope["method"] == "OPTIONS":
            return True
        given = headers.get("authorization", "").encode("latin-1", "replace")
        return hmac.compare_digest(given, self._key)
