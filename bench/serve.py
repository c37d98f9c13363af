"""What the server costs: a closed loop of streams over HTTP, against the same load in process.

    python bench/serve.py tiny DIR        # DIR: the demo's model; its answers have branches
    python bench/serve.py smollm2 DIR     # lines of text of one length
    python bench/serve.py peer DIR --peer VENV/bin/transformers    # the same lines, by its `serve`

The engine (and the server) have one core, the client another; in process all have one. Both sides
by turns, each in a process of its own, with the same prompts and seeds, so the same tokens. Printed
and written to bench/results/serve.json: tokens/s, seconds to the first piece, and between pieces
(medians of the requests, then of the runs).
"""

import argparse
import asyncio
import contextlib
import datetime
import json
import os
import platform
import signal
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "serve.json"
LOADS = {
    # tokens of an answer at most, whether they all have so many, and how many there are a stream
    "tiny": {"max_tokens": 160, "fixed": False, "each": 24},
    "smollm2": {"max_tokens": 64, "fixed": True, "each": 2},
    # transformers has no ignore_eos: what it says is counted, and may be shorter
    "peer": {"max_tokens": 64, "fixed": True, "each": 2},
}
CONFIG = ["--set", "engine.lanes=64", "--set", "engine.pages=1600"]


def bodies(load: str, count: int) -> list[dict]:
    """The requests, the same for both sides."""
    made = []
    for number in range(count):
        digits = [(number * 7 + i * 3) % 10 for i in range(6)]
        if load == "tiny":
            a, b, c, d, e, f = digits
            prompt = f"A:{a}+{b};B:{c}*{d};C:{e}*{f}?"
        else:
            prompt = f"The number {number} is {digits}. " + "Tell me more about it. " * 8
        body = {"prompt": prompt, "seed": number, "max_tokens": LOADS[load]["max_tokens"]}
        made.append(body | {"temperature": 1.0, "ignore_eos": LOADS[load]["fixed"]})
    return made


def summary(seconds: float, told: list[tuple[float, list[float], int]]) -> dict:
    """Of (asked, times of pieces, tokens) of all requests."""
    first = [times[0] - asked for asked, times, _ in told]
    between = [(times[-1] - times[0]) / (len(times) - 1) for _, times, _ in told if len(times) > 1]
    tokens = sum(count for *_, count in told)
    return {
        "tokens": tokens,
        "tokens_per_s": tokens / seconds,
        "requests_per_s": len(told) / seconds,
        "first_s": statistics.median(first),
        "between_s": statistics.median(between),
    }


async def closed_loop(streams: int, requests: list[dict], ask) -> dict:
    """So many requests are under way at any time, until all are done."""
    waiting, told = list(reversed(requests)), []

    async def stream() -> None:
        while waiting:
            body, asked = waiting.pop(), time.perf_counter()
            told.append((asked, *await ask(body)))

    begun = time.perf_counter()
    await asyncio.gather(*(stream() for _ in range(streams)))
    return summary(time.perf_counter() - begun, told)


def in_process(model: str, load: str, streams: list[int]) -> None:
    """Prints a line of JSON for each number of streams; the engine alone, one visit after the
    other."""
    import npr_jax
    from npr_jax.base.compile_cache import use_cache
    from npr_jax.base.config import load_config
    from npr_jax.serve.asking import Asker
    from npr_jax.serve.config import ServeConfig
    from npr_jax.serve.protocol import CompletionRequest

    config = load_config(ServeConfig, "serve", CONFIG[1::2])
    use_cache(config.compilation_cache)
    loaded = npr_jax.load(model)
    engine = npr_jax.Engine(loaded, config.engine)
    engine.warmup()
    asker = Asker(loaded, config, "model")

    def run(count: int, requests: list[dict]) -> dict:
        waiting, told, running = list(reversed(requests)), [], {}
        begun = time.perf_counter()
        while waiting or running:
            while waiting and len(running) < count:
                asked = asker.completion(CompletionRequest(**waiting.pop()))
                (request,) = engine.submit(asked.prompts, asked.sampling)
                running[request] = time.perf_counter(), []
            events = engine.step()
            now = time.perf_counter()
            for request in {event.request for event in events}:
                running[request][1].append(now)
            for event in events:
                if event.kind == "finish":
                    made = event.trajectory
                    told.append((*running.pop(event.request), len(made.response_ids)))
        return summary(time.perf_counter() - begun, told)

    for count in streams:
        requests = bodies(load, count * LOADS[load]["each"])
        run(count, requests[: 2 * count])  # and forget how it was
        engine.drop_prefix_cache()
        print(json.dumps(run(count, requests)), flush=True)


async def over_http(port: int, load: str, streams: int, model: str | None = None) -> dict:
    """The same of a server."""

    async def ask(body: dict) -> tuple[list[float], int]:
        body = body | {"stream": True, "stream_options": {"include_usage": True}}
        text = json.dumps(body | ({"model": model} if model else {}))
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(
            b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
            b"Connection: close\r\nContent-Length: %d\r\n\r\n%s" % (len(text), text.encode())
        )
        times, usage = [], {}
        while line := await reader.readline():
            if not line.startswith(b"data: {"):
                continue
            piece = json.loads(line[6:])
            if piece["choices"]:
                times.append(time.perf_counter())
            usage = piece.get("usage") or usage
        writer.close()
        return times, usage["completion_tokens"]

    requests = bodies(load, streams * LOADS[load]["each"])
    await closed_loop(streams, requests[: 2 * streams], ask)
    return await closed_loop(streams, requests, ask)


@contextlib.contextmanager
def server(model: str):
    """`npr-jax serve` on the first core; its port."""
    command = [sys.executable, "-m", "npr_jax", "serve", "--model", model, "--port", "0", *CONFIG]
    process = subprocess.Popen(["taskset", "-c", "0", *command], stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        for line in process.stderr:
            if "serving" in line:
                break
        else:
            raise RuntimeError("the server has not started")
        yield int(line.rsplit(":", 1)[1])
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def compare(model: str, load: str, streams: list[int], rounds: int) -> dict:
    """Both sides by turns."""
    found: dict[str, dict[int, list[dict]]] = {
        side: {count: [] for count in streams} for side in ("in process", "server")
    }
    for _ in range(rounds):
        command = [sys.executable, __file__, load, model, "--alone", *map(str, streams)]
        done = subprocess.run(
            ["taskset", "-c", "0", *command], stdout=subprocess.PIPE, text=True, check=True
        )
        for count, line in zip(streams, done.stdout.splitlines(), strict=True):
            found["in process"][count].append(json.loads(line))
        with server(model) as port:
            for count in streams:
                found["server"][count].append(asyncio.run(over_http(port, load, count)))
        for count in streams:
            print(load, count, {side: runs[count][-1] for side, runs in found.items()}, flush=True)
    lines = []
    for count in streams:
        sides = {
            side: {
                name: statistics.median(run[name] for run in runs[count]) for name in runs[count][0]
            }
            for side, runs in found.items()
        }
        alone, served = sides["in process"], sides["server"]
        assert alone["tokens"] == served["tokens"], "not the same load"
        ratios = {
            name: served[name] / alone[name] for name in ("tokens_per_s", "first_s", "between_s")
        }
        lines.append({"model": load, "streams": count, "rounds": rounds, **sides, "ratios": ratios})
        print(json.dumps(lines[-1]))
    return {f"{load} {line['streams']}": line for line in lines}


def peer(model: str, streams: list[int], rounds: int, command: str) -> dict:
    """The server, and transformers' own, by turns; each one's own text."""
    own, other, port = [], [], 8377
    for _ in range(rounds):
        with server(model) as served:
            own.append([asyncio.run(over_http(served, "peer", count)) for count in streams])
        options = ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        line = ["taskset", "-c", "0", command, "serve", model, *options, "--dtype", "float32"]
        process = subprocess.Popen(line, env=environment, **quiet)
        try:
            while True:
                with contextlib.suppress(OSError):
                    socket.create_connection(("127.0.0.1", port)).close()
                    break
                time.sleep(0.2)
            other.append([asyncio.run(over_http(port, "peer", count, model)) for count in streams])
        finally:
            process.terminate()
            process.wait(30)
        print(json.dumps([own[-1], other[-1]]), flush=True)
    lines = {}
    for i, count in enumerate(streams):
        sides = {
            side: statistics.median(run[i]["tokens_per_s"] for run in runs)
            for side, runs in (("npr_jax", own), ("transformers", other))
        }
        lines[f"peer {count}"] = {"model": "peer", "streams": count, "rounds": rounds, **sides}
        print(json.dumps(lines[f"peer {count}"]))
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("load", choices=[*LOADS])
    parser.add_argument("model")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peer", metavar="TRANSFORMERS", help="the command of another venv")
    parser.add_argument("--alone", type=int, nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.alone:
        in_process(options.model, options.load, options.alone)
        return
    os.sched_setaffinity(0, {1})
    if options.load == "peer":
        lines = peer(options.model, options.streams, options.rounds, options.peer)
    else:
        lines = compare(options.model, options.load, options.streams, options.rounds)
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    kept |= {name: line | {"date": f"{datetime.date.today()}"} for name, line in lines.items()}
    kept["machine"] = f"{platform.machine()}, a core each for server and client"
    RESULTS.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
