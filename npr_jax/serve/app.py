"""The routes of the server, over an AsyncEngine."""

import asyncio
import contextlib
import importlib.metadata
import time
from collections import abc
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from npr_jax.decode import AsyncEngine, Engine, Event
from npr_jax.decode.async_engine import Answers, Full, Stopped
from npr_jax.model.pretrained import Model
from npr_jax.serve.answering import Answering, Choice
from npr_jax.serve.asking import Asked, Asker, refused
from npr_jax.serve.config import ServeConfig
from npr_jax.serve.errors import ApiError
from npr_jax.serve.forms import Chat, Completion
from npr_jax.serve.http import OPEN, Door, EventStream, Json, failure, leaving, read
from npr_jax.serve.metrics import Metrics, Watch
from npr_jax.serve.openapi import description
from npr_jax.serve.page import page
from npr_jax.serve.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    ResponsesRequest,
    TokenizeRequest,
)
from npr_jax.serve.responses import Responses

_LARGE = 2**16  # bytes


class Server:
    """The application; `app` is ASGI. `reload()` reads the weights again, for POST /v1/reload."""

    def __init__(
        self,
        model: Model,
        engine: Engine,
        config: ServeConfig,
        name: str,
        key: str | None = None,
        reload: abc.Callable[[], Any] | None = None,
    ):
        self.model, self.config, self.name = model, config, name
        self.asker = Asker(model, config, name)
        self.engine = AsyncEngine(engine, config.max_requests)
        self.metrics = Metrics()
        self.draining = False
        self._reload = reload
        self._begun = int(time.time())
        self._running: dict[str, set[Answers]] = {}
        routes = [
            Route("/", self._page),
            Route("/health", self._health),
            Route("/version", self._version),
            Route("/metrics", self._metrics),
            Route("/openapi.json", self._openapi),
            Route("/v1/models", self._models),
            Route("/v1/models/{model:path}", self._model),
            Route("/v1/completions", self._completions, methods=["POST"]),
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
            Route("/v1/responses", self._responses, methods=["POST"]),
            Route("/v1/requests/{id:path}", self._abort, methods=["DELETE"]),
            Route("/v1/reload", self._reload_weights, methods=["POST"]),
            Route("/tokenize", self._tokenize, methods=["POST"]),
            Route("/detokenize", self._detokenize, methods=["POST"]),
            Route("/tokenizer_info", self._tokenizer_info),
        ]
        self._paths = {route.endpoint: route.path for route in routes}
        middleware = [Middleware(Door, key=key, open_paths=OPEN, answered=self._answered)]
        if config.cors:
            cors = {"allow_origins": config.cors, "allow_methods": ["*"], "allow_headers": ["*"]}
            middleware.insert(0, Middleware(CORSMiddleware, **cors))
        self.app = Starlette(
            routes=routes,
            middleware=middleware,
            exception_handlers={ApiError: _api_error, HTTPException: _http_error},
            lifespan=self._lifespan,
        )

    @contextlib.asynccontextmanager
    async def _lifespan(self, _) -> abc.AsyncIterator[None]:
        async with self.engine:
            yield

    async def drain(self, seconds: float) -> None:
        """Takes no new request; ends what is unfinished after so many seconds at most."""
        self.draining = True
        await self.engine.stop(seconds)

    def _answered(self, scope, status: int) -> None:
        path = self._paths.get(scope.get("endpoint"), "other")
        self.metrics.http.labels(path, str(status)).inc()

    # What decodes.

    async def _completions(self, request: Request) -> Response:
        body = await self._read(request, CompletionRequest)
        self.asker.check_model(body.model)
        asked = await _beside(request, self.asker.completion, body)
        return await self._answer(request, asked, "cmpl", Completion, body.ignored)

    async def _chat(self, request: Request) -> Response:
        body = await self._read(request, ChatRequest)
        self.asker.check_model(body.model)
        asked = await _beside(request, self.asker.chat, body)
        return await self._answer(request, asked, "chatcmpl", Chat, body.ignored)

    async def _responses(self, request: Request) -> Response:
        body = await self._read(request, ResponsesRequest)
        self.asker.check_model(body.model)
        asked = await _beside(request, self.asker.responses, body)

        def form(answering: Answering) -> Responses:
            return Responses(answering, body)

        return await self._answer(request, asked, "resp", form, body.ignored)

    async def _answer(
        self, request: Request, asked: Asked, kind: str, form: abc.Callable, ignored: str
    ) -> Response:
        """Asks the engine, and answers in one of the forms below: at once or in pieces."""
        watch = Watch(self.metrics)
        try:
            answers = await self._submit(request, asked)
        except BaseException:
            watch.refused()
            raise
        plain = request.state.request_id
        name = f"{kind}-{plain}"
        for known in (plain, name):
            self._running.setdefault(known, set()).add(answers)
        answering = Answering(
            self.engine.engine,
            self.asker,
            asked,
            answers.requests,
            name,
            f"weights-{answers.version}",
        )

        over = False

        def leave() -> None:
            nonlocal over
            if over:
                return
            over = True
            answers.abort()
            for known in (plain, name):
                self._running[known].discard(answers)
                if not self._running[known]:
                    del self._running[known]
            usage = answering.usage()
            reasons = [
                "aborted" if c.trajectory is None else c.trajectory.finish_reason
                for c in answering.choices
            ]
            watch.end(usage["prompt_tokens"], usage["completion_tokens"], reasons)

        async def visits() -> abc.AsyncIterator[dict[Choice, list[Event]]]:
            try:
                async for events in answers:
                    watch.heard(sum(event.kind == "token" for event in events))
                    yield answering.sort(events)
            except Stopped as error:
                raise self._gone(error) from error

        headers = {"x-ignored-fields": ignored} if ignored else {}
        shape = form(answering)
        if asked.stream:
            return EventStream(shape.stream(visits()), leave, headers)
        async with leaving(request.receive, leave):
            async for visit in visits():
                for choice, events in visit.items():
                    for event in events:
                        choice.hear(event)
            return Json(shape.whole(), headers=headers)

    async def _submit(self, request: Request, asked: Asked) -> Answers:
        if self.draining:
            raise self._gone()
        # New weights may be waited for: a client that leaves meanwhile gives its place back.
        asking = asyncio.ensure_future(self.engine.submit(asked.prompts, asked.sampling))
        try:
            async with leaving(request.receive, asking.cancel):
                await asyncio.wait([asking])
            if asking.cancelled():
                raise ClientDisconnect
            return asking.result()
        except Full as error:
            raise ApiError(
                429,
                f"{self.engine.num_unfinished} answers are unfinished, of at most "
                f"{self.config.max_requests}: try again later.",
                code="queue_full",
                headers={"retry-after": "1"},
            ) from error
        except Stopped as error:
            raise self._gone(error) from error
        except ValueError as error:
            raise refused(error) from error

    def _gone(self, error: Stopped | None = None) -> ApiError:
        """Why nothing is taken: a shutdown, also one that began while the engine was asked."""
        if self.draining:
            text = "The server is shutting down."
        else:
            cause = f" It failed: {error.__cause__}." if error and error.__cause__ else ""
            text = f"The engine takes no more requests.{cause}"
        return ApiError(503, text, code="unavailable", headers={"retry-after": "30"})

    async def _abort(self, request: Request) -> Response:
        name = request.path_params["id"]
        found = list(self._running.get(name, ()))
        if not found:
            raise ApiError(404, f"No request {name!r} is being answered.", "id", "not_found")
        for answers in found:
            answers.abort()
        return JSONResponse({"id": name, "object": "request.aborted", "aborted": len(found)})

    async def _reload_weights(self, request: Request) -> Response:
        if self._reload is None:
            raise ApiError(404, "This server was started without a directory to read again.")
        # It needs no body, so a browser would send it for any page.
        origin = request.headers.get("origin")
        if origin and not {origin, "*"} & {*self.config.cors}:
            raise ApiError(403, "Pages of other origins may not ask for this (cors).")
        try:
            params = await run_in_threadpool(self._reload)
            version = await self.engine.set_params(params)
        except (ValueError, OSError) as error:
            raise ApiError(409, f"The old weights stay: {error}", code="reload_failed") from error
        except Stopped as error:
            raise self._gone(error) from error
        return JSONResponse({"object": "weights", "version": version})

    # What does not.

    async def _read(self, request: Request, kind):
        return await read(request, kind, self.config.max_body, self.config.header_seconds)

    async def _models(self, _: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def _model(self, request: Request) -> Response:
        self.asker.check_model(request.path_params["model"])
        return JSONResponse(self._card())

    def _card(self) -> dict[str, Any]:
        return {
            "id": self.name,
            "object": "model",
            "created": self._begun,
            "owned_by": "npr_jax",
            "max_model_len": self.asker.longest,
            "parallel": self.asker.parallel,
        }

    async def _tokenize(self, request: Request) -> Response:
        body = await self._read(request, TokenizeRequest)
        self.asker.check_model(body.model)
        ids = await _beside(request, self.asker.tokenize, body)
        texts = None
        if body.return_token_strs:
            texts = await _beside(request, lambda ids: [self.asker.decode([i]) for i in ids], ids)
        found = {"count": len(ids), "max_model_len": self.asker.longest, "tokens": ids}
        return JSONResponse(found | {"token_strs": texts})

    async def _detokenize(self, request: Request) -> Response:
        body = await self._read(request, DetokenizeRequest)
        self.asker.check_model(body.model)
        text = await _beside(request, self.asker.detokenize, body.tokens)
        return Json({"prompt": text})

    async def _tokenizer_info(self, _: Request) -> Response:
        tokenizer = self.asker.tokenizer
        return JSONResponse(
            {
                "tokenizer_class": type(tokenizer).__name__,
                "bos_token": tokenizer.bos_token,
                "eos_token": tokenizer.eos_token,
                "pad_token": tokenizer.pad_token,
                "chat_template": tokenizer.chat_template,
                "vocab_size": self.asker.vocab_size,
                "model_max_length": self.asker.longest,
            }
        )

    async def _health(self, _: Request) -> Response:
        if self.draining:
            return JSONResponse({"status": "shutting down"}, 503)
        if not self.engine.healthy:
            error = self.engine.error
            return JSONResponse({"status": f"unhealthy: {type(error).__name__}: {error}"}, 503)
        return JSONResponse({"status": "ok"})

    async def _version(self, _: Request) -> Response:
        version = importlib.metadata.version("npr_jax")
        return JSONResponse({"version": version, "weights": self.engine.version})

    async def _metrics(self, _: Request) -> Response:
        with contextlib.suppress(Stopped):
            self.metrics.engine(await self.engine.stats())
        self.metrics.answers.set(self.engine.num_unfinished)
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    async def _openapi(self, _: Request) -> Response:
        return JSONResponse(description())

    async def _page(self, _: Request) -> Response:
        return page()


async def _beside(request: Request, do: abc.Callable[[Any], Any], given) -> Any:
    """`do(given)`; of a large body in another thread, as it may take the tokenizer seconds."""
    if request.state.body_size < _LARGE:
        return do(given)
    return await run_in_threadpool(do, given)


async def _api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return failure(error)


async def _http_error(_: Request, error: Exception) -> Response:
    """What Starlette refuses: no such path, no such method."""
    assert isinstance(error, HTTPException)
    headers = dict(error.headers or {})
    return failure(ApiError(error.status_code, f"{error.detail}.", headers=headers))
