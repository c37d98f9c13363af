"""The forms of an answer: completions and chats, at once or in pieces."""

from abc import ABC, abstractmethod
from collections import abc
from typing import Any

from npr_jax.decode import Event
from npr_jax.serve.answering import Answering, Choice, Said

Visits = abc.AsyncIterator[dict[Choice, list[Event]]]


class Form(ABC):
    """What completions and chats have in common; a piece has what one choice has said since."""

    kind: str

    def __init__(self, answering: Answering):
        self.answering, self.asked = answering, answering.asked
        self._begun: set[int] = set()  # choices of which something was told

    def whole(self) -> dict[str, Any]:
        """The answer, once all choices have finished."""
        choices = [self._whole(choice, choice.say()) for choice in self.answering.choices]
        head = self.answering.head(self.kind)
        return head | {"choices": choices, "usage": self.answering.usage()}

    async def stream(self, visits: Visits) -> abc.AsyncIterator[dict[str, Any]]:
        """The pieces: a choice's last has its finish reason, then comes the usage if asked for."""
        for piece in self._opening():
            yield self._chunk(piece)
        async for visit in visits:
            for choice, events in visit.items():
                if self.asked.branches:
                    pieces = self._branch_pieces(choice, events)
                else:
                    for event in events:
                        choice.hear(event)
                    pieces = self._pieces(choice)
                for piece in pieces:
                    yield self._chunk(piece)
        if self.asked.usage_last:
            head = self.answering.head(self._chunk_kind())
            yield head | {"choices": [], "usage": self.answering.usage()}

    def _chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        chunk = self.answering.head(self._chunk_kind()) | {"choices": [choice]}
        if self.asked.usage_always:
            chunk["usage"] = self.answering.usage()
        elif self.asked.usage_last:
            chunk["usage"] = None
        return chunk

    def _pieces(self, choice: Choice) -> abc.Iterator[dict[str, Any]]:
        """What it has said, if anything."""
        echo = choice.index not in self._begun and self.asked.echo
        said = choice.say()
        over = choice.trajectory is not None
        if said.text or said.reasoning or said.tokens or over or echo:
            self._begun.add(choice.index)
            yield self._piece(choice, said, echo)

    def _branch_pieces(self, choice: Choice, events: list[Event]) -> abc.Iterator[dict[str, Any]]:
        """What has happened to it, each with its text."""
        for event in self.answering.branch_events(choice, events):
            text = "".join(token["text"] for token in event.get("tokens", ()))
            if event["event"] == "finish":
                text = choice.rest()
            said = Said([], [], text, "")
            finish = choice.finish if event["event"] == "finish" else {"finish_reason": None}
            # A token has its log-probs in the event.
            yield self._piece(choice, said, False) | {"logprobs": None, "branch": event} | finish

    def _opening(self) -> abc.Iterator[dict[str, Any]]:
        return iter(())

    def _chunk_kind(self) -> str:
        return self.kind

    @abstractmethod
    def _whole(self, choice: Choice, said: Said) -> dict[str, Any]: ...

    @abstractmethod
    def _piece(self, choice: Choice, said: Said, echo: bool) -> dict[str, Any]: ...


class Completion(Form):
    """Of /v1/completions."""

    kind = "text_completion"

    def _whole(self, choice: Choice, said: Said) -> dict[str, Any]:
        return self._piece(choice, said, self.asked.echo)

    def _piece(self, choice: Choice, said: Said, echo: bool) -> dict[str, Any]:
        text = self.asked.texts[choice.prompt] + said.text if echo else said.text
        logprobs = self.answering.completion_logprobs(choice, said, echo)
        choice.length += len(said.text)
        return {"index": choice.index, "text": text, "logprobs": logprobs} | choice.finish


class Chat(Form):
    """Of /v1/chat/completions."""

    kind = "chat.completion"

    def _chunk_kind(self) -> str:
        return "chat.completion.chunk"

    def _opening(self) -> abc.Iterator[dict[str, Any]]:
        for choice in self.answering.choices:
            delta = {"role": "assistant", "content": ""}
            yield {"index": choice.index, "delta": delta, "logprobs": None, "finish_reason": None}

    def _whole(self, choice: Choice, said: Said) -> dict[str, Any]:
        message = {"role": "assistant", "content": said.text}
        if self.asked.separate:
            message["reasoning_content"] = said.reasoning
        logprobs = self.answering.chat_logprobs(said)
        return {"index": choice.index, "message": message, "logprobs": logprobs} | choice.finish

    def _piece(self, choice: Choice, said: Said, echo: bool) -> dict[str, Any]:
        delta: dict[str, Any] = {}
        if said.reasoning:
            delta["reasoning_content"] = said.reasoning
        if said.text:
            delta["content"] = said.text
        logprobs = self.answering.chat_logprobs(said)
        return {"index": choice.index, "delta": delta, "logprobs": logprobs} | choice.finish
