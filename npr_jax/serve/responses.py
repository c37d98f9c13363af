"""The form of /v1/responses: one message of text, at once or as events."""

from collections import abc
from typing import Any

from npr_jax.serve.answering import Answering
from npr_jax.serve.forms import Visits
from npr_jax.serve.protocol import ResponsesRequest


class Responses:
    """One answer to `body`."""

    def __init__(self, answering: Answering, body: ResponsesRequest):
        self.answering, self.body = answering, body
        (self.choice,) = answering.choices
        self._text = ""

    def whole(self) -> dict[str, Any]:
        """The answer, once it has finished."""
        self._text += self.choice.say().text
        return self._response()

    async def stream(self, visits: Visits) -> abc.AsyncIterator[dict[str, Any]]:
        """The events, numbered."""
        number = 0
        async for event in self._events(visits):
            yield event | {"sequence_number": number}
            number += 1

    async def _events(self, visits: Visits) -> abc.AsyncIterator[dict[str, Any]]:
        place: dict[str, Any] = {"item_id": self._message_id, "output_index": 0, "content_index": 0}
        yield {"type": "response.created", "response": self._response()}
        yield {"type": "response.in_progress", "response": self._response()}
        item = self._message() | {"content": []}
        yield {"type": "response.output_item.added", "output_index": 0, "item": item}
        yield place | {"type": "response.content_part.added", "part": _part("")}
        async for visit in visits:
            for choice, events in visit.items():
                for event in events:
                    choice.hear(event)
                if text := choice.say().text:
                    self._text += text
                    yield place | {
                        "type": "response.output_text.delta",
                        "delta": text,
                        "logprobs": [],
                    }
        yield place | {"type": "response.output_text.done", "text": self._text, "logprobs": []}
        yield place | {"type": "response.content_part.done", "part": _part(self._text)}
        yield {"type": "response.output_item.done", "output_index": 0, "item": self._message()}
        response = self._response()
        yield {"type": f"response.{response['status']}", "response": response}

    @property
    def _message_id(self) -> str:
        return f"msg-{self.answering.name.removeprefix('resp-')}"

    @property
    def _status(self) -> str:
        """In the words of the API."""
        reason = self.choice.finish_reason
        if reason is None:
            return "in_progress"
        return "completed" if reason == "stop" else "incomplete"

    def _message(self) -> dict[str, Any]:
        return {
            "id": self._message_id,
            "type": "message",
            "role": "assistant",
            "status": self._status,
            "content": [_part(self._text)],
        }

    def _response(self) -> dict[str, Any]:
        body, status = self.body, self._status
        sampling = self.answering.asked.sampling
        why = {"length": "max_output_tokens"}.get(self.choice.finish_reason or "", "aborted")
        return {
            "id": self.answering.name,
            "object": "response",
            "created_at": self.answering.created,
            "status": status,
            "model": self.answering.asker.name,
            "output": [] if status == "in_progress" else [self._message()],
            "usage": None if status == "in_progress" else self._usage(),
            "error": None,
            "incomplete_details": {"reason": why} if status == "incomplete" else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "tools": [],
            "tool_choice": "none",
            "parallel_tool_calls": False,
            "metadata": body.metadata or {},
            "store": False,
        }

    def _usage(self) -> dict[str, Any]:
        usage = self.answering.usage()
        return {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": usage["prompt_tokens_details"],
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage["total_tokens"],
            "critical_path": usage["critical_path"],
        }


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
