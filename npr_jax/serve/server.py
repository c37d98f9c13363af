"""The process of a server: model, warm-up, socket, signals."""

import asyncio
import contextlib
import signal
import socket
from collections import abc
from pathlib import Path

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from npr_jax.base.compile_cache import use_cache
from npr_jax.decode import Engine
from npr_jax.evaluate.generate import compile_all
from npr_jax.model.pretrained import Model, load
from npr_jax.serve.app import Server
from npr_jax.serve.config import ServeConfig
from npr_jax.serve.errors import ApiError
from npr_jax.serve.http import failure

_LAST_SECONDS = 5  # in which answers that have ended reach their clients, at shutdown
_IDLE_SECONDS = 75  # of a connection: more than proxies and clients, lest they use one that closes


def serve(
    model: str,
    config: ServeConfig,
    key: str | None = None,
    adapter: str | None = None,
    tell: abc.Callable[[str], None] = lambda line: None,
) -> None:
    """Serves a model, with the adapters of another directory if there is one.

    Until SIGTERM or SIGINT; then answers have `config.drain` seconds to end, or until the next.

    `key`: what clients show as `Authorization: Bearer KEY`; None lets everybody in. `tell` hears
    how compilation goes, and at last the address.

    Raises ValueError where the model cannot be served, OSError where the address is taken.
    """
    with _socket(config) as listener:
        if config.compilation_cache:
            use_cache(config.compilation_cache)

        def read() -> Model:
            return load(model, dtype=config.dtype, adapter=adapter)

        loaded = read()
        if loaded.tokenizer is None:
            raise ValueError(f"{model} has no tokenizer, and texts need one")
        if loaded.tags is None:
            tell(f"{model} has no tags: it is served sequentially")
        engine = Engine(loaded, config.engine)
        compile_all(engine, tell)
        name = config.name or (Path(model).resolve().name if Path(model).exists() else model)
        server = Server(loaded, engine, config, name, key, reload=lambda: read().params)
        process = _Process(server, config)
        with asyncio.Runner(loop_factory=process.config.get_loop_factory()) as runner:
            runner.run(process.run(listener, tell))


def _socket(config: ServeConfig) -> contextlib.AbstractContextManager[socket.socket]:
    """Bound before anything is loaded, and not listening yet: nobody waits in vain."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((config.host, config.port))
    except (OSError, OverflowError) as error:
        listener.close()
        raise OSError(
            f"cannot listen at {config.host} port {config.port} ({error}): give another --host or "
            "--port (0 takes a free port)"
        ) from error
    return listener


class _Process(uvicorn.Server):
    """uvicorn, but for signals: after the first, clients hear that the server is shutting down."""

    def __init__(self, server: Server, config: ServeConfig):
        self._app = server
        self._ending: list[asyncio.Task] = []
        self._drain = float(config.drain)
        settings = uvicorn.Config(
            server.app,
            http=http_protocol(config),
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=_LAST_SECONDS,
            timeout_keep_alive=_IDLE_SECONDS,
        )
        super().__init__(settings)

    async def run(  # pyright: ignore[reportIncompatibleMethodOverride]  # theirs starts the loop
        self, listener: socket.socket, tell: abc.Callable[[str], None]
    ) -> None:
        """Serves until it is told to end."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._end)
        listener.listen(2048)
        host, port = listener.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        started = asyncio.create_task(self._serve([listener]))
        while not (self.started or started.done()):
            await asyncio.sleep(0.01)
        if self.started:
            tell(f"serving {self._app.name} at http://{shown}:{port}")
        await started

    def _end(self) -> None:
        if len(self._ending) < 2:  # the second does not wait for answers
            seconds = 0.0 if self._ending else self._drain
            self._ending.append(asyncio.create_task(self._shut(seconds)))
        else:
            self.should_exit = self.force_exit = True

    async def _shut(self, seconds: float) -> None:
        await self._app.drain(seconds)
        self.should_exit = True


def http_protocol(config: ServeConfig) -> type[H11Protocol]:
    """HTTP with limits on a client's time: for its headers, and for reading what it is sent."""

    class Limited(H11Protocol):
        def connection_made(self, transport) -> None:
            super().connection_made(transport)
            self._late: asyncio.TimerHandle | None = None
            self._stalled: asyncio.TimerHandle | None = None
            self._look()

        def connection_lost(self, exc: Exception | None) -> None:
            for timer in (self._late, self._stalled):
                if timer:
                    timer.cancel()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._look()

        def _look(self) -> None:
            """Headers have to come in time, before every request; and so has the rest of a body
            that was answered without it."""
            answering = self.cycle is not None and not self.cycle.response_complete
            if answering and self._late:
                self._late.cancel()
                self._late = None
            elif not answering and not self._late:
                self._late = self.loop.call_later(config.header_seconds, self.transport.close)

        def pause_writing(self) -> None:
            super().pause_writing()
            self._stalled = self.loop.call_later(config.stalled_seconds, self.transport.abort)

        def resume_writing(self) -> None:
            if self._stalled:
                self._stalled.cancel()
                self._stalled = None
            super().resume_writing()

        def send_400_response(self, msg: str) -> None:
            """What is no HTTP is answered in JSON, too; but if an answer has begun, by the end."""
            if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
                self.transport.close()
                return
            text = bytes(failure(ApiError(400, msg, code="invalid_http")).body)
            headers = [
                (b"content-type", b"application/json"),
                (b"content-length", str(len(text)).encode()),
                (b"connection", b"close"),
            ]
            for event in (
                h11.Response(status_code=400, headers=headers, reason=b"Bad Request"),
                h11.Data(data=text),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")
            self.transport.close()

    return Limited
