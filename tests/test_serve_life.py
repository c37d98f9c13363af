"""The server's life: clients that leave, a full queue, failures, new weights, its end."""

import asyncio
import contextlib
import dataclasses
import json
import socket
import threading
import time

import bigram
import pytest
import uvicorn
from conftest import spread
from serve_toy import (
    CHAT,
    COMPLETION,
    CONFIG,
    JSON,
    LONG,
    PROMPTS,
    pieces_of,
    serving,
)
from uvicorn.server import ServerState

from npr_jax.decode.async_engine import Stopped
from npr_jax.serve import answering
from npr_jax.serve.server import http_protocol

pytestmark = pytest.mark.usefixtures("plans_without_numbers")


@pytest.fixture(scope="module")
def server():
    with serving() as running:
        yield running
        running.idle()


def test_metrics_count_exactly():
    with serving() as server:
        answers = [
            server.post(COMPLETION, prompt=prompt, max_tokens=30, n=2, seed=1) for prompt in PROMPTS
        ]
        server.post(COMPLETION, 400, prompt=5)
        server.idle()
        figures = server.figures()
        usage = [answer["usage"] for answer in answers]
        for name in ("prompt", "completion"):
            shown = {"prompt": "prompt", "completion": "generation"}[name]
            total = sum(some[f"{name}_tokens"] for some in usage)
            assert figures[f"npr_{shown}_tokens_total"] == total
        ended = {k: v for k, v in figures.items() if k.startswith("npr_answers_finished_total")}
        assert sum(ended.values()) == 2 * len(PROMPTS)
        route = f'route="{COMPLETION}"'
        assert figures[f'npr_http_requests_total{{{route},status="200"}}'] == len(PROMPTS)
        assert figures[f'npr_http_requests_total{{{route},status="400"}}'] == 1
        for name in ("time_to_first_token", "request"):
            assert figures[f"npr_{name}_seconds_count"] == len(PROMPTS)


def test_more_than_the_queue_holds_is_refused_and_may_come_later():
    with serving(dataclasses.replace(CONFIG, max_requests=3)) as server:
        server.slow()
        with contextlib.ExitStack() as stack:
            for _ in range(3):
                stack.enter_context(server.asking(**LONG, stream=True))
            status, headers, answer = server.ask("POST", COMPLETION, {"prompt": "12"})
            assert status == 429 and int(headers["retry-after"]) >= 1
            assert answer["error"]["type"] == "rate_limit_error"
        server.idle()
        assert server.figures()["npr_request_seconds_count"] == 3  # without what was refused
        server.post(COMPLETION, prompt="12")
        error = server.post(COMPLETION, 400, prompt="12", n=4)["error"]
        assert error["param"] == "n"


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_ends_its_answers(stream, capfd):
    with serving() as server:
        server.slow(0.03)  # so that they would take six seconds
        with server.asking(**LONG, n=3, stream=stream):
            assert server.figures()["npr_answers_unfinished"] == 3
        server.idle(2)
        assert server.figures()['npr_answers_finished_total{reason="aborted"}'] == 3
    assert "Traceback" not in capfd.readouterr().err


def test_a_request_can_be_ended_by_its_id():
    with serving() as server:
        server.slow()
        for name in ("mine/1", "cmpl-mine/1"):
            with server.asking(headers={"X-Request-Id": "mine/1"}, **LONG, stream=True) as answer:
                status, _, told = server.ask("DELETE", f"/v1/requests/{name}")
                assert status == 200 and told["aborted"] == 1
                pieces = pieces_of(b"d" + answer.read())
            assert pieces[-1]["choices"][0]["finish_reason"] == "abort"
            server.idle()
        assert server.ask("DELETE", "/v1/requests/mine")[0] == 404


def _head(path: str, more: str) -> bytes:
    return f"POST {path} HTTP/1.1\r\nHost: a\r\n{more}\r\n\r\n".encode()


HALVES = {  # what a client sends, and what it goes on with, never to its end
    "headers": (b"GET /health HTTP/1.1\r\nHos", b"x"),
    "headers of a second request": (b"GET /health HTTP/1.1\r\nHost: a\r\n\r\nGET /heal", b"x"),
    "a body that was answered": (
        _head(COMPLETION, "Content-Length: 9999999\r\nContent-Type: application/json"),
        b"x",
    ),
}


@pytest.mark.parametrize("name", HALVES)
def test_a_client_that_never_comes_to_its_end_is_left(name):
    with serving(dataclasses.replace(CONFIG, max_body=1000, header_seconds=0.4)) as server:
        sent, more = HALVES[name]
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
            connection.sendall(sent)
            begun = time.monotonic()
            with pytest.raises(ConnectionError):
                while time.monotonic() < begun + 5:
                    time.sleep(0.05)
                    connection.sendall(more)
        # A client that takes its time between two requests may stay.
        connection = server.connect()
        for _ in range(2):
            connection.request("GET", "/health")
            assert connection.getresponse().read()
            time.sleep(0.6)
        connection.close()


def test_what_is_no_http_is_told_so_and_never_inside_an_answer(server, caplog):
    chunked = "Transfer-Encoding: chunked\r\nContent-Type: "
    for kind, status in (("application/json", b"400"), ("text/plain", b"415")):
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
            connection.sendall(_head(COMPLETION, chunked + kind))
            raw = connection.recv(9999) if status == b"415" else b""
            connection.sendall(b"no chunk\r\n")
            while got := connection.recv(9999):
                raw += got
        assert raw.startswith(b"HTTP/1.1 " + status) and raw.count(b"HTTP/1.1") == 1
        assert json.loads(raw.split(b"\r\n\r\n")[1])["error"]["message"]
    assert not [record for record in caplog.records if record.name == "asyncio"]


def test_when_the_engine_fails_every_request_hears_why_and_health_says_so():
    with serving() as server:
        runner = server.server.engine.engine.runner
        calls = []

        def fail(*arguments):
            calls.append(1)
            time.sleep(0.005)
            if len(calls) > 20:
                raise RuntimeError("the device is gone")
            return steps.decode(*arguments)

        steps = runner._steps
        runner._steps = steps._replace(decode=fail)
        found = []

        def ask(stream):
            status, _, answer = server.ask("POST", COMPLETION, LONG | {"stream": stream})
            found.append((status, answer if isinstance(answer, dict) else pieces_of(answer)))

        threads = [threading.Thread(target=ask, args=(i % 2 == 0,)) for i in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert len(found) == 6
        for status, answer in found:
            error = answer["error"] if isinstance(answer, dict) else answer[-1]["error"]
            assert status == (503 if isinstance(answer, dict) else 200)
            assert "the device is gone" in error["message"]
        status, _, health = server.ask("GET", "/health")
        assert status == 503 and "the device is gone" in health["status"]
        error = server.post(COMPLETION, 503, prompt="12")["error"]
        assert "the device is gone" in error["message"]
        assert server.ask("GET", "/metrics")[0] == 200


def test_at_shutdown_new_requests_are_refused_and_old_ones_end():
    with serving() as server:
        server.slow(0.02)
        loop = server.server.engine._loop
        assert loop is not None
        with server.asking(**LONG | {"max_tokens": 200}, stream=True) as short:
            draining = asyncio.run_coroutine_threadsafe(server.server.drain(20), loop)
            while not server.server.draining:
                time.sleep(0.005)
            status, headers, answer = server.ask("POST", COMPLETION, {"prompt": "12"})
            assert status == 503 and headers["retry-after"]
            assert "shutting down" in answer["error"]["message"]
            assert server.ask("GET", "/health")[0] == 503
            pieces = pieces_of(b"d" + short.read())
            assert pieces[-1]["choices"][0]["finish_reason"] == "length"
        draining.result(20)


def test_a_request_that_meets_the_shutdown_in_the_engine_hears_of_it(monkeypatch):
    with serving() as server:

        async def submit(*_):
            server.server.draining = True
            raise Stopped("the engine takes no more requests")

        monkeypatch.setattr(server.server.engine, "submit", submit)
        error = server.post(COMPLETION, 503, prompt="12")["error"]
        assert "shutting down" in error["message"]


def test_at_shutdown_what_takes_too_long_is_ended():
    with serving() as server:
        server.slow(0.05)
        loop = server.server.engine._loop
        assert loop is not None
        with server.asking(**LONG, stream=True) as answer:
            asyncio.run_coroutine_threadsafe(server.server.drain(0.2), loop).result(20)
            pieces = pieces_of(b"d" + answer.read())
            assert pieces[-1]["choices"][0]["finish_reason"] == "abort"


def test_weights_can_be_swapped_while_it_runs():
    norm = bigram.model().params["final_norm"]
    weights = [dict(bigram.model().params, final_norm=norm + i) for i in (1, 2)]

    def reload():
        if not weights:
            raise ValueError("the directory is empty")
        return weights.pop(0)

    with serving(reload=reload) as server:
        for version in range(3):
            body = {"prompt": "12", "max_tokens": 40, "seed": 1}
            assert server.post(COMPLETION, **body)["system_fingerprint"] == f"weights-{version}"
            assert server.ask("GET", "/version")[2]["weights"] == version
            if version < 2:
                assert server.post("/v1/reload")["version"] == version + 1
        error = server.post("/v1/reload", 409)["error"]
        assert "the directory is empty" in error["message"]
        assert server.ask("GET", "/version")[2]["weights"] == 2


def test_who_leaves_while_new_weights_are_waited_for_gives_its_place_back():
    config = dataclasses.replace(CONFIG, max_requests=2)
    with serving(config, reload=lambda: dict(bigram.model().params)) as server:
        server.slow(0.03)
        with server.asking(**LONG, stream=True):
            reloading = threading.Thread(target=server.post, args=("/v1/reload",))
            reloading.start()
            while not server.server.engine._weights:
                time.sleep(0.01)
            connection = server.connect()
            connection.request("POST", COMPLETION, json.dumps({"prompt": "12"}), JSON)
            while server.figures()["npr_answers_unfinished"] < 2:
                time.sleep(0.01)
            connection.close()
            end = time.monotonic() + 5
            while server.figures()["npr_answers_unfinished"] > 1:
                assert time.monotonic() < end
                time.sleep(0.01)
            assert server.server.engine._weights and server.figures()["npr_requests_running"] == 1
        reloading.join(20)
        server.idle()


def test_a_page_elsewhere_cannot_reload_the_weights():
    config = dataclasses.replace(CONFIG, cors=("http://here",))
    with serving(config, reload=lambda: dict(bigram.model().params)) as server:
        status, _, answer = server.ask("POST", "/v1/reload", b"", {"Origin": "http://elsewhere"})
        assert status == 403 and "origins" in answer["error"]["message"]
        for headers in ({"Origin": "http://here"}, {}):
            assert server.ask("POST", "/v1/reload", b"", headers)[0] == 200


def test_pipelined_requests_are_answered_in_turn(server):
    body = json.dumps({"prompt": "12", "max_tokens": 3}).encode()
    head = f"POST {COMPLETION} HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n"
    head = head.encode() + b"Content-Type: application/json\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        connection.sendall(3 * (head + body) + b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")
        raw = b""
        while raw.count(b"HTTP/1.1 200") < 4 or not raw.endswith(b"}"):
            got = connection.recv(65536)
            assert got
            raw += got


# Some of the first two hundred calls, and nightly all of them.
CALLS = dict.fromkeys((*range(1, 201, 18), *range(1, 201)))


@pytest.mark.parametrize("failing", spread(CALLS, 6, 12))
def test_a_failing_device_leaves_no_request_without_an_answer(failing):
    """Whichever call of the device it is, every request ends with a reason."""
    with serving() as server:
        runner, calls = server.server.engine.engine.runner, []

        def counted(step):
            def call(*arguments):
                calls.append(1)
                if len(calls) == failing:
                    raise RuntimeError("the device is gone")
                return step(*arguments)

            return call

        steps = runner._steps
        runner._steps = runner._prompt_steps = steps._replace(
            **{name: counted(getattr(steps, name)) for name in ("prefill", "decode")}
        )
        found = []

        def ask(number):
            body = {"prompt": PROMPTS[number % len(PROMPTS)], "max_tokens": 160}
            body |= {"stream": number % 2 == 0, "temperature": 0}
            found.append(server.ask("POST", COMPLETION, body))

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert len(found) == len(threads)
        failed = server.ask("GET", "/health")[0] == 503
        assert failed == (len(calls) >= failing)
        for status, _, answer in found:
            assert status in ((200, 503) if failed else (200,))
            pieces = [answer] if isinstance(answer, dict) else pieces_of(answer)
            last = pieces[-1]
            over = "error" in last or last["choices"][0]["finish_reason"]
            assert over and (failed or "error" not in last)


def test_the_tokens_of_an_answer_can_be_limited():
    with serving(dataclasses.replace(CONFIG, max_tokens=20)) as server:
        answer = server.post(COMPLETION, prompt="12", max_tokens=20, parallel=False)
        assert answer["usage"]["completion_tokens"] <= 20
        error = server.post(COMPLETION, 400, prompt="12", max_tokens=21)["error"]
        assert error["param"] == "max_tokens" and "20" in error["message"]
        chat = server.post(CHAT, messages=[{"role": "user", "content": "12"}])
        assert chat["usage"]["completion_tokens"] <= 20


class Wire:
    """A transport that is told what happens to it."""

    def __init__(self):
        self.happened = []

    def __getattr__(self, name):
        return lambda *_: self.happened.append(name)

    def get_extra_info(self, name, default=None):
        return default


def test_a_client_that_sends_no_headers_or_reads_nothing_is_let_go():
    config = dataclasses.replace(CONFIG, header_seconds=0.05, stalled_seconds=0.05)

    async def alone(stall: bool) -> list[str]:
        settings = uvicorn.Config(lambda *_: None, log_config=None)
        settings.load()
        state, wire = ServerState(), Wire()
        connection = http_protocol(config)(settings, state, {})
        connection.connection_made(wire)
        if stall:
            connection._late.cancel()
            connection.pause_writing()
        else:
            connection.data_received(b"GET /health HTTP/1.1\r\nHost")
        await asyncio.sleep(0.2)
        return wire.happened

    assert "close" in asyncio.run(alone(stall=False))
    assert "abort" in asyncio.run(alone(stall=True))


def test_a_client_that_reads_again_in_time_is_kept():
    config = dataclasses.replace(CONFIG, header_seconds=9.0, stalled_seconds=0.1)

    async def alone() -> list[str]:
        settings = uvicorn.Config(lambda *_: None, log_config=None)
        settings.load()
        wire = Wire()
        connection = http_protocol(config)(settings, ServerState(), {})
        connection.connection_made(wire)
        for _ in range(4):
            connection.pause_writing()
            await asyncio.sleep(0.05)
            connection.resume_writing()
        await asyncio.sleep(0.2)
        connection.connection_lost(None)
        return wire.happened

    assert "abort" not in asyncio.run(alone())


def test_a_fault_of_the_server_is_told_without_its_inside(monkeypatch, capfd):
    def broken(*_):
        raise KeyError("a secret of the inside")

    with serving() as server:
        monkeypatch.setattr(answering.Answering, "usage", broken)
        monkeypatch.setattr(answering.Choice, "say", broken)
        for stream in (False, True):
            body = {"prompt": "12", "max_tokens": 5, "stream": stream}
            status, _, answer = server.ask("POST", COMPLETION, body)
            assert status == (200 if stream else 500)
            error = pieces_of(answer)[-1]["error"] if stream else answer["error"]
            assert error["type"] == "server_error" and "secret" not in str(error)
    assert capfd.readouterr().err.count("a secret of the inside") >= 2
