"""The description of the routes, made of the models and typed dicts of protocol.py."""

import functools
import importlib.metadata
import re
from typing import Any, NamedTuple

from pydantic import TypeAdapter
from pydantic.json_schema import models_json_schema

from npr_jax.serve import protocol
from npr_jax.serve.http import OPEN

_REF = "#/components/schemas/{model}"


class _Route(NamedTuple):
    """A route: `body` and `answer` are of protocol.py; `streams`: or as events; `fails`: statuses
    that it may have beside those that all have."""

    method: str
    path: str
    summary: str
    answer: Any
    body: Any = None
    streams: bool = False
    fails: tuple[int, ...] = ()


_ROUTES = (
    _Route(
        "post",
        "/v1/chat/completions",
        "Goes on with a conversation.",
        protocol.ChatAnswer,
        protocol.ChatRequest,
        True,
        (404, 429),
    ),
    _Route(
        "post",
        "/v1/completions",
        "Goes on with texts or token ids.",
        protocol.CompletionAnswer,
        protocol.CompletionRequest,
        True,
        (404, 429),
    ),
    _Route(
        "post",
        "/v1/responses",
        "Answers a text or a conversation.",
        protocol.ResponsesAnswer,
        protocol.ResponsesRequest,
        True,
        (404, 429),
    ),
    _Route("get", "/v1/models", "The model that is served.", protocol.ModelList),
    _Route("get", "/v1/models/{model}", "The model.", protocol.ModelCard, fails=(404,)),
    _Route(
        "delete",
        "/v1/requests/{id}",
        "Ends the answers to a request, by its id or X-Request-Id.",
        protocol.Aborted,
        fails=(404,),
    ),
    _Route(
        "post",
        "/v1/reload",
        "Reads the weights again; waits for the answers of the old ones.",
        protocol.Reloaded,
        fails=(403, 404, 409),
    ),
    _Route(
        "post",
        "/tokenize",
        "Token ids of a prompt.",
        protocol.TokenizeAnswer,
        protocol.TokenizeRequest,
        fails=(404,),
    ),
    _Route(
        "post",
        "/detokenize",
        "The text of token ids.",
        protocol.DetokenizeAnswer,
        protocol.DetokenizeRequest,
        fails=(404,),
    ),
    _Route("get", "/tokenizer_info", "The tokenizer.", protocol.TokenizerInfo),
    _Route("get", "/health", "Whether requests are taken.", protocol.Health),
    _Route("get", "/version", "Of npr_jax, and of the weights.", protocol.Version),
)


@functools.cache
def description() -> dict[str, Any]:
    """The OpenAPI document."""
    answers = {route.answer for route in _ROUTES} | {protocol.ErrorAnswer}
    _, said = TypeAdapter.json_schemas(
        [(kind.__name__, "serialization", TypeAdapter(kind)) for kind in answers],
        ref_template=_REF,
    )
    bodies = {route.body for route in _ROUTES if route.body}
    _, asked = models_json_schema([(body, "validation") for body in bodies], ref_template=_REF)
    found = said["$defs"] | asked["$defs"]
    return {
        "openapi": "3.1.0",
        "info": {"title": "npr_jax", "version": importlib.metadata.version("npr_jax")},
        "paths": _paths(),
        "components": {
            "schemas": dict(sorted(found.items())),
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


def _paths() -> dict[str, Any]:
    paths: dict[str, Any] = {}
    for route in _ROUTES:
        ok = {"application/json": {"schema": _ref(route.answer)}}
        if route.streams:
            # Without a type: tools read it as the whole text, or as that of each event.
            ok["text/event-stream"] = {"schema": {"description": "Each `data` is a JSON text."}}
        answers: dict[str, Any] = {"200": {"description": "The answer.", "content": ok}}
        statuses = {503, *route.fails} | ({400, 408, 413, 415} if route.body else set())
        statuses |= set() if route.path in OPEN else {401}
        for status in sorted(statuses):
            schema = _ref(protocol.ErrorAnswer)
            if route.path == "/health":
                schema = _ref(protocol.Health)
            content = {"application/json": {"schema": schema}}
            answers[str(status)] = {"description": "Why not.", "content": content}
        operation: dict[str, Any] = {"summary": route.summary, "responses": answers}
        if route.body:
            content = {"application/json": {"schema": _ref(route.body)}}
            operation["requestBody"] = {"required": True, "content": content}
        operation["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
            for name in re.findall(r"{(\w+)}", route.path)
        ]
        paths.setdefault(route.path, {})[route.method] = operation
    return paths


def _ref(kind: Any) -> dict[str, str]:
    return {"$ref": _REF.format(model=kind.__name__)}
