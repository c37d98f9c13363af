"""A server over the fake device, on a real socket; and a client of plain sockets."""

import contextlib
import dataclasses
import http.client
import json
import sys
import threading
import time

import bigram
import uvicorn
from fake_device import engine_on_fake_device

from npr_jax.decode import EngineConfig, fork_join
from npr_jax.model.pretrained import Model
from npr_jax.serve.app import Server
from npr_jax.serve.config import ServeConfig
from npr_jax.serve.server import http_protocol

JSON = {"Content-Type": "application/json"}
COMPLETION, CHAT, RESPONSES = "/v1/completions", "/v1/chat/completions", "/v1/responses"
# What the fake device goes on with has branches, nested ones, and every kind of end.
PROMPTS = ["1421", "1516", "1620", "1120", "1414", "1812", "1212"]
LONG = {"max_tokens": 1000, "ignore_eos": True, "parallel": False, "prompt": "12"}
ENGINE = EngineConfig(
    lanes=4,
    pages=400,
    page_size=4,
    steps=5,
    header_rows=4,
    header_chunk=4,
    prefill_rows=2,
    prefill_chunk=8,
    max_branches=4,
    max_depth=3,
)
CONFIG = ServeConfig(engine=ENGINE, name="toy", compilation_cache=None)


class Digits:
    """Every token is two digits. A chat is its turns one after the other, each after `[01]`; `[00]`
    begins a text, as its encoder does too."""

    bos_token, eos_token, pad_token = "00", "02", None
    bos_token_id = 0
    chat_template = "turns"

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        begin = [0] if add_special_tokens else []
        digits = "".join(c for c in text if c.isdigit())
        pairs = [digits[i : i + 2] for i in range(0, len(digits) - 1, 2)]
        return begin + [min(int(pair), 39) for pair in pairs]

    def decode(self, ids, clean_up_tokenization_spaces=True) -> str:
        return "".join(f"{token:02d}" for token in ids)

    def get_vocab(self) -> dict[str, int]:
        return {self.convert_ids_to_tokens(token): token for token in range(40)}

    def convert_ids_to_tokens(self, token: int) -> str:
        return f"{token:02d}"

    def apply_chat_template(self, turns, tokenize, add_generation_prompt, **options) -> str:
        if options.get("fail"):
            raise ValueError("the template says no")
        return "00" + "".join(f"01{turn['content']}" for turn in turns)


@dataclasses.dataclass
class Running:
    """A server that runs, and where."""

    server: Server
    port: int
    key: str | None = None

    def connect(self, timeout: float = 60) -> http.client.HTTPConnection:
        """A connection of its own."""
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)

    def ask(self, method: str, path: str, body=None, headers=None):
        """(status, headers, JSON or bytes) of an answer."""
        headers = dict(headers or {})
        if self.key:
            headers.setdefault("Authorization", f"Bearer {self.key}")
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
        headers.setdefault("Content-Type", "application/json")
        connection = self.connect()
        with contextlib.closing(connection):
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            raw, found = answer.read(), {k.lower(): v for k, v in answer.getheaders()}
        if found.get("content-type", "").startswith("application/json"):
            return answer.status, found, json.loads(raw)
        return answer.status, found, raw

    def post(self, path: str, expected: int = 200, **body):
        """The JSON that a body is answered with."""
        status, _, answer = self.ask("POST", path, body)
        assert status == expected, (status, answer)
        return answer

    def stream(self, path: str, **body) -> list[dict]:
        """The pieces of a stream, but for its end, which is checked."""
        status, headers, raw = self.ask("POST", path, body | {"stream": True})
        assert status == 200, raw
        assert headers["content-type"].startswith("text/event-stream")
        return pieces_of(raw)

    def figures(self) -> dict[str, float]:
        """The metrics by their names with labels."""
        _, _, raw = self.ask("GET", "/metrics")
        lines = [line for line in raw.decode().splitlines() if not line.startswith("#")]
        return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines}

    def slow(self, seconds: float = 0.005) -> None:
        """Every visit of the engine takes so long from now on."""
        runner = self.server.engine.engine.runner
        decode = runner._steps.decode

        def wait(*arguments):
            time.sleep(seconds)
            return decode(*arguments)

        runner._steps = runner._steps._replace(decode=wait)

    @contextlib.contextmanager
    def asking(self, path: str = COMPLETION, headers=None, **body):
        """An answer whose first bytes have come; then the client leaves."""
        connection = self.connect()
        try:
            connection.request("POST", path, json.dumps(body), JSON | (headers or {}))
            if body.get("stream"):
                answer = connection.getresponse()
                answer.read(1)
                yield answer
            else:
                while not self.figures()["npr_requests_running"]:
                    time.sleep(0.005)
                yield None
        finally:
            connection.close()

    def idle(self, seconds: float = 10) -> None:
        """Waits until nothing is held."""
        end = time.monotonic() + seconds
        while True:
            figures = self.figures()
            names = ("requests_running", "answers_unfinished", "engine_lanes_busy")
            held = {name: figures[f"npr_{name}"] for name in (*names, "engine_pages_held")}
            if not any(held.values()):
                return
            assert time.monotonic() < end, held
            time.sleep(0.02)


def pieces_of(raw: bytes) -> list[dict]:
    """The JSON of server-sent events, which end as they should."""
    *events, end, rest = raw.decode().split("\n\n")
    assert end == "data: [DONE]" and not rest
    pieces = []
    for event in events:
        *name, data = event.split("\n")
        assert data.startswith("data: ")
        pieces.append(json.loads(data.removeprefix("data: ")))
        assert name == ([f"event: {pieces[-1]['type']}"] if "type" in pieces[-1] else [])
    return pieces


@contextlib.contextmanager
def serving(config: ServeConfig = CONFIG, key=None, reload=None, engine=None, **changes):
    """Runs a server; `changes` are of the toy's model."""
    engine = engine or engine_on_fake_device(config.engine, **{"tokenizer": Digits()} | changes)
    model = Model(engine.model_config, {}, engine.tokenizer, engine.tags)
    server = Server(model, engine, config, config.name or "toy", key, reload)
    settings = uvicorn.Config(
        server.app,
        http=http_protocol(config),
        port=0,
        log_config=None,
        timeout_graceful_shutdown=2,
    )
    process = uvicorn.Server(settings)
    thread = threading.Thread(target=process.run, daemon=True)
    thread.start()
    while not process.started:
        assert thread.is_alive()
        time.sleep(0.005)
    port = process.servers[0].sockets[0].getsockname()[1]
    try:
        yield Running(server, port, key)
    finally:
        process.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


if __name__ == "__main__":  # a process of its own, which tells its port
    fork_join.check_block = bigram.check_block_without_numbers
    with serving(dataclasses.replace(CONFIG, stalled_seconds=2.0, header_seconds=2.0)) as running:
        print(running.port, flush=True)
        sys.stdin.read()
