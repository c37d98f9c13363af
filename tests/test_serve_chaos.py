"""Bad clients, many at a time: the server answers others, says 4xx or 503, and keeps nothing.

`NPR_CHAOS_SECONDS` (120) is how long they go on.
"""

import asyncio
import collections
import contextlib
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from serve_toy import CHAT, COMPLETION, PROMPTS, RESPONSES, Running

SECONDS = float(os.environ.get("NPR_CHAOS_SECONDS", "120"))
CLIENTS = 12


@contextlib.contextmanager
def toy_process():
    """The toy's server in a process of its own, whose memory is its own too."""
    command = [sys.executable, str(Path(__file__).with_name("serve_toy.py"))]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None and process.stdout is not None
    try:
        yield process.pid, Running(None, int(process.stdout.readline()))
    finally:
        process.stdin.close()
        assert process.wait(60) == 0
        process.stdout.close()


def body(rng: random.Random) -> tuple[str, dict]:
    """A request that is right."""
    path, prompt = rng.choice([COMPLETION, CHAT, RESPONSES]), rng.choice(PROMPTS)
    changes: dict = {"seed": rng.randrange(9), "stream": rng.random() < 0.6}
    tokens = rng.choice([1, 8, 60, 300])
    if path == RESPONSES:
        return path, {"input": prompt, "max_output_tokens": tokens} | changes
    changes |= {"max_tokens": tokens, "n": rng.choice([1, 1, 3])}
    changes |= {"stream_branches": True} if changes["stream"] and rng.random() < 0.3 else {}
    if path == CHAT:
        turn = {"role": "user", "content": prompt}
        apart = "stream_branches" not in changes and rng.random() < 0.5
        return path, {"messages": [turn], "separate_reasoning": apart} | changes
    return path, {"prompt": rng.choice([prompt, [prompt, "12"], [12, 13]])} | changes


ODD = [
    None,
    True,
    -1,
    0,
    1e308,
    10**400,
    "",
    "x" * 3000,
    [],
    {},
    [[]],
    [{}],
    "\x00",
    "\ud7ff\U0001f600",
]


def wrong(rng: random.Random) -> tuple[str, bytes]:
    """A request with something odd in it, or no JSON at all."""
    path, right = body(rng)
    kind = rng.randrange(5)
    if kind == 0:
        right[rng.choice([*right, "stop", "logit_bias", "temperature", "é"])] = rng.choice(ODD)
    elif kind == 1:
        return path, json.dumps(right).encode()[: rng.randrange(1, 60)]
    elif kind == 2:
        raw = bytearray(json.dumps(right).encode())
        raw[rng.randrange(len(raw))] = rng.randrange(256)
        return path, bytes(raw)
    elif kind == 3:
        return path, b"[" * rng.randrange(1, 50_000)
    else:
        right = {"prompt": rng.choice(ODD), "messages": rng.choice(ODD), "input": rng.choice(ODD)}
    return path, json.dumps(right).encode()


def http(path: str, raw: bytes, *, method="POST", length=None, more=b"") -> bytes:
    length = len(raw) if length is None else length
    head = f"{method} {path} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
    return head.encode() + more + f"Content-Length: {length}\r\n\r\n".encode() + raw


async def statuses(reader: asyncio.StreamReader) -> list[int]:
    """Of all answers until the server closes."""
    raw = await reader.read()
    return [int(part[:3]) for part in raw.split(b"HTTP/1.1 ")[1:]]


async def client(port: int, rng: random.Random, until: float, seen: collections.Counter) -> None:
    """One bad thing after the other."""
    while time.monotonic() < until:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 24)
        kind = rng.choice(["right", "cut", "wrong", "half", "slow", "pipelined", "noise", "method"])
        try:
            async with asyncio.timeout(60):
                if kind == "right":
                    path, asked = body(rng)
                    writer.write(
                        http(path, json.dumps(asked).encode(), more=b"Connection: close\r\n")
                    )
                    found = await statuses(reader)
                    assert found and set(found) <= {200, 503}, found
                elif kind == "cut":
                    path, asked = body(rng)
                    writer.write(http(path, json.dumps(asked).encode()))
                    await reader.read(rng.randrange(1, 3000))
                    found = []
                elif kind == "wrong":
                    path, raw = wrong(rng)
                    writer.write(http(path, raw, more=b"Connection: close\r\n"))
                    found = await statuses(reader)
                elif kind == "half":
                    path, asked = body(rng)
                    raw = json.dumps(asked).encode()
                    writer.write(http(path, raw[: rng.randrange(len(raw))], length=len(raw)))
                    if rng.random() < 0.1:  # till the server has waited long enough
                        found = await statuses(reader)
                    else:
                        await writer.drain()
                        found = []
                elif kind == "slow":
                    path, asked = body(rng)
                    writer.write(
                        http(path, json.dumps(asked).encode(), more=b"Connection: close\r\n")
                    )
                    raw = b""
                    while part := await reader.read(rng.randrange(1, 400)):
                        raw += part
                        await asyncio.sleep(0.002)
                    found = [int(raw[9:12])]
                elif kind == "pipelined":
                    for _ in range(3):
                        path, asked = body(rng)
                        asked["stream"] = False
                        asked.pop("stream_branches", None)
                        writer.write(http(path, json.dumps(asked).encode()))
                    writer.write(http("/health", b"", method="GET", more=b"Connection: close\r\n"))
                    found = await statuses(reader)
                elif kind == "noise":
                    writer.write(rng.randbytes(rng.randrange(1, 2000)) + b"\r\n\r\n")
                    writer.write_eof()
                    found = await statuses(reader)
                else:
                    method = rng.choice(["GET", "PUT", "DELETE", "HEAD", "OPTIONS", "X"])
                    path = rng.choice([COMPLETION, "/", "/v1/models", "/metrics", "/nothing"])
                    writer.write(http(path, b"", method=method, more=b"Connection: close\r\n"))
                    found = await statuses(reader)
        except ConnectionError:
            found = []  # it has closed before it was sent all
        finally:
            writer.close()
        seen.update((kind, status) for status in found or [0])


def resident(pid: int) -> float:
    """MB of a process."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise AssertionError("no VmRSS")


@pytest.mark.slow
def test_bad_clients_get_no_5xx_and_nothing_grows():
    seen: collections.Counter = collections.Counter()
    memory: list[tuple[int, float]] = []

    async def everyone(pid: int, port: int) -> None:
        until = time.monotonic() + SECONDS
        clients = [client(port, random.Random(i), until, seen) for i in range(CLIENTS)]

        async def follow() -> None:
            while time.monotonic() < until:
                await asyncio.sleep(SECONDS / 120)
                memory.append((seen.total(), resident(pid)))

        await asyncio.gather(follow(), *clients)

    with toy_process() as (pid, server):
        asyncio.run(everyone(pid, server.port))
        server.idle(20)
        assert server.ask("GET", "/health")[0] == 200
        server.post(COMPLETION, prompt="12", max_tokens=3)
        assert server.figures()["npr_engine_joins_total"] > 10
    bad = {key: count for key, count in seen.items() if key[1] >= 500 and key[1] != 503}
    assert not bad, bad
    kinds = {kind for kind, _ in seen}
    assert len(kinds) == 8 and {200, 400, 404, 405, 415} - {s for _, s in seen} <= {415}
    requests, sizes = np.array(memory[len(memory) // 3 :]).T  # after the caches have filled
    slope = np.polyfit(requests, sizes, 1)[0] * 10_000
    print(
        f"{seen.total()} requests, {sizes[0]:.0f} to {sizes[-1]:.0f} MB, {slope:.1f} MB in 10,000"
    )
    assert slope < 1, f"{slope:.1f} MB in 10,000 requests"


@pytest.mark.slow
def test_a_thousand_clients_that_leave_hold_up_nobody():
    async def leave(port: int) -> None:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        asked = {"prompt": "12", "max_tokens": 1500, "ignore_eos": True, "stream": True}
        writer.write(http(COMPLETION, json.dumps(asked).encode()))
        await writer.drain()
        await asyncio.sleep(0.5)
        writer.close()

    async def everyone(port: int) -> None:
        for _ in range(4):
            await asyncio.gather(*(leave(port) for _ in range(250)))

    with toy_process() as (_, server):
        asyncio.run(everyone(server.port))
        begun = time.monotonic()
        server.post(COMPLETION, prompt="12", max_tokens=3)
        assert time.monotonic() - begun < 1
        server.idle()
