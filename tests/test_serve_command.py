"""`npr-jax serve` as a process: its address, its second start, and its end."""

import contextlib
import http.client
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
from serve_process import block, started

JSON = {"Content-Type": "application/json"}
SMALL = {
    "engine.lanes": 2,
    "engine.pages": 600,
    "engine.steps": 4,
    "engine.max_branches": 2,
    "engine.header_rows": 2,
    "engine.prefill_rows": 2,
    "engine.prefill_chunk": 16,
    "engine.max_logprobs": 0,
    "engine.max_logit_bias": 0,
}


def ask(port: int, path: str, body=None):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    with contextlib.closing(connection):
        connection.request("POST" if body else "GET", path, body and json.dumps(body), JSON)
        answer = connection.getresponse()
        return answer.status, answer.read()


LONG = {"prompt": "A:1+1?", "max_tokens": 1500, "ignore_eos": True, "parallel": False}


@pytest.mark.slow
def test_it_answers_starts_again_without_compiling_and_ends_in_order(tmp_path):
    with started("tiny", tmp_path, sets=SMALL) as (process, port, said):
        assert re.search(r"compile: \d+/\d+ programs", said)
        assert ask(port, "/health")[0] == 200
        status, answer = ask(port, "/v1/completions", {"prompt": "A:1+1?", "max_tokens": 5})
        assert status == 200 and json.loads(answer)["usage"]["completion_tokens"] <= 5
        if shutil.which("curl"):
            curl = ["bash", "-euc", block("sh", "curl", port)]
            done = subprocess.run(curl, cwd=tmp_path, capture_output=True, timeout=60, check=True)
            assert json.loads(done.stdout)["choices"][0]["message"]["content"]
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    with started("tiny", tmp_path, "--drain", "20", sets=SMALL) as (process, port, said):
        assert "nothing had to be compiled" in said
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        body = json.dumps(LONG | {"stream": True})
        connection.request("POST", "/v1/completions", body, JSON)
        stream = connection.getresponse()
        stream.read(1)
        process.send_signal(signal.SIGTERM)
        status = 200
        for _ in range(1000):  # until the signal has arrived
            status, answer = ask(port, "/v1/completions", {"prompt": "A", "max_tokens": 1})
            if status != 200:
                break
        assert status == 503 and b"shutting down" in answer
        text = stream.read().decode()
        assert '"finish_reason": "length"' in text and text.endswith("data: [DONE]\n\n")
        assert process.wait(30) == 0
        connection.close()


@pytest.mark.slow
def test_a_second_signal_does_not_wait_for_answers(tmp_path):
    with started("tiny", tmp_path, "--drain", "60", sets=SMALL) as (process, port, _):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        body = json.dumps(LONG | {"stream": True, "n": 16})
        connection.request("POST", "/v1/completions", body, JSON)
        stream = connection.getresponse()
        stream.read(1)
        begun = time.monotonic()
        process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        text = stream.read().decode()
        assert '"finish_reason": "abort"' in text and text.endswith("data: [DONE]\n\n")
        assert process.wait(30) == 0 and time.monotonic() - begun < 20
        assert "Traceback" not in process.stderr.read()
        connection.close()


def test_an_address_that_is_taken_is_an_error_before_anything_is_loaded():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        begun = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-m", "npr_jax", "serve", "--model", "tiny", "--port", str(port)],
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert done.returncode in (1, 2) and f"port {port}" in done.stderr
    assert "--port" in done.stderr and "compile" not in done.stderr
    assert "Traceback" not in done.stderr and time.monotonic() - begun < 40
