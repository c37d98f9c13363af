"""The server: what a client does wrong is named, and costs nobody else anything."""

import dataclasses
import threading
import time

import pytest
from pydantic import TypeAdapter
from serve_toy import (
    CHAT,
    COMPLETION,
    CONFIG,
    RESPONSES,
    Digits,
    serving,
)

from npr_jax.serve import protocol

pytestmark = pytest.mark.usefixtures("plans_without_numbers")


@pytest.fixture(scope="module")
def server():
    with serving() as running:
        yield running
        running.idle()


BAD = [
    (COMPLETION, {"prompt": 5}, "prompt"),
    (COMPLETION, {"prompt": []}, "prompt"),
    (COMPLETION, {"prompt": [40]}, "prompt"),
    (COMPLETION, {"prompt": [-1]}, "prompt"),
    (COMPLETION, {"prompt": [1, "a"]}, "prompt"),
    (COMPLETION, {"prompt": ["1"] * 1000}, "prompt"),
    (COMPLETION, {"prompt": "12" * 2000}, "prompt"),
    (COMPLETION, {"prompt": "12", "max_tokens": 0}, "max_tokens"),
    (COMPLETION, {"prompt": "12", "max_tokens": -1}, "max_tokens"),
    (COMPLETION, {"prompt": "12", "max_tokens": 1.5}, "max_tokens"),
    (COMPLETION, {"prompt": "12", "max_tokens": "5"}, "max_tokens"),
    (COMPLETION, {"prompt": "12", "max_tokens": 10**30}, "max_tokens"),
    (COMPLETION, {"prompt": "12", "temperature": -0.1}, "temperature"),
    (COMPLETION, {"prompt": "12", "top_p": 0}, "top_p"),
    (COMPLETION, {"prompt": "12", "top_p": 1.1}, "top_p"),
    (COMPLETION, {"prompt": "12", "top_k": -2}, "top_k"),
    (COMPLETION, {"prompt": "12", "n": 0}, "n"),
    (COMPLETION, {"prompt": "12", "n": 1000}, "n"),
    (COMPLETION, {"prompt": "12", "logprobs": 21}, "logprobs"),
    (COMPLETION, {"prompt": "12", "logprobs": -1}, "logprobs"),
    (COMPLETION, {"prompt": "12", "stop": ""}, "stop"),
    (COMPLETION, {"prompt": "12", "stop": ["1"] * 17}, "stop"),
    (COMPLETION, {"prompt": "12", "seed": 2**63}, "seed"),
    (COMPLETION, {"prompt": "12", "logit_bias": {"40": 1}}, "logit_bias"),
    (COMPLETION, {"prompt": "12", "logit_bias": {"x": 1}}, "logit_bias"),
    (COMPLETION, {"prompt": "12", "logit_bias": {"3": 101}}, "logit_bias"),
    (COMPLETION, {"prompt": "12", "presence_penalty": 2.1}, "presence_penalty"),
    (COMPLETION, {"prompt": "12", "best_of": 2}, "best_of"),
    (COMPLETION, {"prompt": "12", "suffix": "1"}, "suffix"),
    (COMPLETION, {"prompt": "12", "stream_options": {}}, "stream_options"),
    (COMPLETION, {"prompt": "12", "stream_branches": True}, "stream_branches"),
    (COMPLETION, {"prompt": "12", "max_branches": 9}, "max_branches"),
    (COMPLETION, {"prompt": "12", "max_depth": 9}, "max_depth"),
    (COMPLETION, {"prompt": "12", "min_tokens": 9, "max_tokens": 8}, "min_tokens"),
    (COMPLETION, {"prompt": "12", "stop_token_ids": [40]}, "stop_token_ids"),
    (COMPLETION, {"prompt": "12", "stop_token_ids": list(range(10))}, "stop_token_ids"),
    (COMPLETION, {"prompt": ""} | {"model": "toy", "prompt": None}, "prompt"),
    (CHAT, {"messages": []}, "messages"),
    (CHAT, {"messages": "hello"}, "messages"),
    (CHAT, {"messages": [{"role": "user"}]}, "messages"),
    (CHAT, {"messages": [{"role": "user", "content": None}]}, "messages"),
    (CHAT, {"messages": [{"role": "user", "content": 5}]}, "messages"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
    (CHAT, {"messages": [{"content": "12"}]}, "messages"),
    (CHAT, {"messages": [{"role": "assistant", "content": "12"}]}, "messages"),
    (CHAT, {"messages": [{"role": "assistant", "tool_calls": [{}]}] * 2}, "messages"),
    (CHAT, {"top_logprobs": 5}, "top_logprobs"),
    (CHAT, {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    (CHAT, {"tools": [{"type": "function"}]}, "tools"),
    (CHAT, {"separate_reasoning": True, "stream_branches": True}, "separate_reasoning"),
    (CHAT, {"response_format": {"type": "json_object"}}, "response_format"),
    (CHAT, {"chat_template_kwargs": {"fail": True}}, "messages"),
    (CHAT, {"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs"),
    (RESPONSES, {"input": ""}, "input"),
    (RESPONSES, {"input": "12", "previous_response_id": "a"}, "previous_response_id"),
    (RESPONSES, {"input": "12", "tools": [{}]}, "tools"),
    (RESPONSES, {"input": "12" * 1591}, "input"),
    (RESPONSES, {"input": "12" * 3000}, "input"),
    (RESPONSES, {"input": "12", "metadata": {"a": float("nan")}}, "metadata"),
    ("/tokenize", {}, "prompt"),
    ("/tokenize", {"prompt": "1", "messages": [{"role": "user", "content": "1"}]}, "prompt"),
    ("/detokenize", {"tokens": [40]}, "tokens"),
    ("/detokenize", {"tokens": ["a"]}, "tokens"),
]


@pytest.mark.parametrize(("path", "body", "param"), BAD)
def test_what_a_client_does_wrong_is_named(server, path, body, param):
    if path == CHAT:
        body = {"messages": [{"role": "user", "content": "12"}]} | body
    for stream in (False, True):
        if stream and (not path.startswith("/v1") or param.startswith("stream")):
            continue
        error = server.post(path, 400, **body, **({"stream": True} if stream else {}))["error"]
        assert error["param"] == param and param in error["message"], error
        assert error["type"] == "invalid_request_error"
        TypeAdapter(protocol.ErrorObject).validate_python(error)


RAW = [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"prompt": "\xff"}', b'{"prompt": "12", "n": NaN}']
RAW += [b"[" * 100_000, b'{"a":' * 100_000, b'{"prompt": "12", "n": 1' + b"0" * 5000 + b"}"]
RAW += [b'{"prompt": "\\ud800"}', b'{"prompt": "12", "temperature": Infinity}']


@pytest.mark.parametrize("raw", RAW, ids=range(len(RAW)))
def test_what_is_no_body_is_refused(server, raw):
    for path in (COMPLETION, CHAT, RESPONSES, "/detokenize"):
        status, _, answer = server.ask("POST", path, raw)
        assert status == 400 and set(answer["error"]) == {"message", "type", "param", "code"}


MILLION = 10**6
MANY = ",".join(f'"{i}":"x"' for i in range(MILLION)).encode()
LARGE = [
    ("prompt", b'{"prompt": [' + b"1," * MILLION + b'"x"]}'),
    ("prompt", b'{"prompt": [' + b"1.5," * MILLION + b"1]}"),
    ("prompt", b'{"prompt": [[' + b"1.5," * MILLION + b"1]]}"),
    ("prompt", b'{"prompt": "' + b"12" * MILLION + b'"}'),
    ("logit_bias", b'{"prompt": "12", "logit_bias": {%s}}' % MANY),
    ("stop", b'{"prompt": "12", "stop": [' + b"1," * MILLION + b"1]}"),
]


@pytest.mark.parametrize(("param", "raw"), LARGE, ids=range(len(LARGE)))
def test_a_body_with_a_million_faults_has_one_error_soon(server, param, raw):
    begun = time.monotonic()
    status, _, answer = server.ask("POST", COMPLETION, raw)
    assert status == 400 and answer["error"]["param"] == param
    assert time.monotonic() - begun < 3


def test_a_large_text_keeps_nobody_waiting():
    class Slow(Digits):
        def encode(self, text, add_special_tokens=True):
            time.sleep(1.5 if len(text) > 1000 else 0)
            return super().encode(text, add_special_tokens)

    with serving(tokenizer=Slow()) as server:
        body = {"prompt": "12" * 1000, "max_tokens": 1, "colour": "x" * 70_000}
        thread = threading.Thread(target=server.post, args=(COMPLETION,), kwargs=body)
        thread.start()
        time.sleep(0.3)
        begun = time.monotonic()
        assert server.ask("GET", "/health")[0] == 200
        assert time.monotonic() - begun < 0.9 and thread.is_alive()
        thread.join()


def test_a_body_of_another_type_is_refused_and_an_error_is_short(server):
    for kind in ("", "text/plain", "application/x-www-form-urlencoded"):
        headers = {"Content-Type": kind}
        status, _, answer = server.ask("POST", COMPLETION, {"prompt": "12"}, headers)
        assert status == 415 and "application/json" in answer["error"]["message"]
    headers = {"Content-Type": "application/json; charset=utf-8"}
    assert server.ask("POST", COMPLETION, {"prompt": "12"}, headers)[0] == 200
    for body in ({"prompt": "12", "model": "x" * 10**5}, {"prompt": "12", "n": "x" * 10**5}):
        status, _, answer = server.ask("POST", COMPLETION, body)
        assert status in (400, 404) and len(answer["error"]["message"]) < 1100


def test_other_paths_and_methods_and_models_are_errors_in_json(server):
    for method, path, status in (
        ("GET", "/nothing", 404),
        ("GET", COMPLETION, 405),
        ("POST", "/v1/models", 405),
        ("GET", "/v1/models/other", 404),
        ("DELETE", "/v1/requests/none", 404),
        ("POST", "/v1/reload", 404),
    ):
        found, _, answer = server.ask(method, path)
        assert found == status and answer["error"]["message"], (method, path, found)
    error = server.post(COMPLETION, 404, prompt="12", model="other")["error"]
    assert error["code"] == "model_not_found" and error["param"] == "model"
    assert server.ask("GET", "/v1/models/toy")[2]["id"] == "toy"


def test_an_unknown_field_is_ignored_and_named(server):
    status, headers, _ = server.ask("POST", COMPLETION, {"prompt": "12", "colour": 1, "size": 2})
    assert status == 200 and headers["x-ignored-fields"] == "colour, size"


def test_the_name_of_an_unknown_field_is_no_header_of_its_own(server):
    for name in ("a\r\nSet-Cookie: b", "a\0b", "ü\u2028", "\x7f"):
        status, headers, _ = server.ask("POST", COMPLETION, {"prompt": "12", name: 1})
        assert status == 200 and "set-cookie" not in headers
        assert headers["x-ignored-fields"] == name.encode("unicode_escape").decode()
    for names, told in (([" a "], "a"), ([" "], None), (["a" * 499, "b"], "a" * 499 + ",")):
        body = {"prompt": "12"} | dict.fromkeys(names, 1)
        status, headers, _ = server.ask("POST", COMPLETION, body)
        assert status == 200 and headers.get("x-ignored-fields") == told


def test_the_id_of_a_request_is_echoed_or_made(server):
    for given, same in (("abc-1", True), ("", False), ("x" * 200, False)):
        body, headers = {"prompt": "12", "max_tokens": 2}, {"X-Request-Id": given}
        _, found, answer = server.ask("POST", COMPLETION, body, headers)
        assert (found["x-request-id"] == given) == same
        assert answer["id"] == f"cmpl-{found['x-request-id']}"


def test_a_key_is_asked_for():
    with serving(key="sécret") as server:
        for given in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}):
            headers = {"Authorization": ""} | given
            status, found, answer = server.ask("GET", "/v1/models", None, headers)
            assert status == 401 and answer["error"]["code"] == "invalid_api_key"
            assert found["www-authenticate"] == "Bearer"
            assert server.ask("GET", "/health", None, headers)[0] == 200
            assert server.ask("GET", "/tokenizer_info", None, headers)[0] == 401
        right = {"Authorization": "Bearer sécret".encode()}
        assert server.ask("GET", "/v1/models", None, right)[0] == 200


def test_bodies_that_are_too_large_or_too_slow_are_refused():
    with serving(dataclasses.replace(CONFIG, max_body=1000, header_seconds=0.3)) as server:
        status, _, answer = server.ask("POST", COMPLETION, {"prompt": "1" * 2000})
        assert status == 413 and "1000" in answer["error"]["message"]
        connection = server.connect()
        connection.putrequest("POST", COMPLETION)
        connection.putheader("Content-Length", "100")
        connection.putheader("Content-Type", "application/json")
        connection.endheaders(b'{"prompt"')
        assert connection.getresponse().status == 408
        connection.close()


def test_pages_of_other_origins_may_ask_only_if_they_are_named():
    headers = {"Origin": "http://elsewhere"}
    with serving() as server:
        assert "access-control-allow-origin" not in server.ask("GET", "/health", None, headers)[1]
    with serving(dataclasses.replace(CONFIG, cors=("http://elsewhere",))) as server:
        _, found, _ = server.ask("GET", "/health", None, headers)
        assert found["access-control-allow-origin"] == "http://elsewhere"
