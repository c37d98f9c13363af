"""An engine for asyncio: one thread owns it, and any number of coroutines ask it for answers.

What a coroutine asks for goes into the thread's inbox, which is emptied between two visits. What a
visit has told goes back to the event loop in one call, whatever the number of tokens and answers.
"""

import asyncio
import contextlib
import dataclasses
import threading
import time
from collections import abc, deque
from queue import SimpleQueue
from typing import Any

from npr_jax.decode.engine import Engine
from npr_jax.decode.outputs import Event
from npr_jax.decode.sampling import SamplingParams


class Full(RuntimeError):
    """As many answers are unfinished as may be."""


class Stopped(RuntimeError):
    """The engine takes nothing more: it was stopped, or has failed, which is then the cause."""


class Answers:
    """The answers to what one call of `AsyncEngine.submit` asked for: iterate for their events, a
    list for each visit, in order; the last has the last finish. Leaving the `async with` block
    aborts what is unfinished. Raises Stopped where the engine fails so that it cannot tell them.

    Attributes:
      requests: the ids of the answers, n of a prompt together.
      version: of the weights, which are the same for all their tokens.
    """

    def __init__(self, engine: "AsyncEngine"):
        self.requests: list[int] = []
        self.version = 0
        self._engine = engine
        self._unfinished = 0
        self._visits: asyncio.Queue[list[Event] | Stopped] = asyncio.Queue()

    async def __aenter__(self) -> "Answers":
        return self

    async def __aexit__(self, *_) -> None:
        self.abort()

    def abort(self) -> None:
        """Ends the unfinished ones; their finish is told as any other."""
        if self._unfinished:
            self._engine._tell(_Message(self._engine._abort, (self,)))

    async def __aiter__(self) -> abc.AsyncIterator[list[Event]]:
        while self._unfinished or not self._visits.empty():
            visit = await self._visits.get()
            if isinstance(visit, Stopped):
                raise visit
            yield visit

    def _hear(self, events: list[Event]) -> int:
        """Takes the events of a visit; returns how many answers they finish."""
        finished = sum(event.kind == "finish" for event in events)
        self._unfinished -= finished
        self._visits.put_nowait(events)
        return finished

    def _lose(self, error: "Stopped") -> int:
        """Nothing more comes; returns how many answers have no finish."""
        lost, self._unfinished = self._unfinished, 0
        self._visits.put_nowait(error)
        return lost


@dataclasses.dataclass(eq=False)
class _Message:
    """To the thread: call `do(*arguments)`, and tell `reply`, if there is one, what came of it."""

    do: abc.Callable
    arguments: tuple = ()
    reply: asyncio.Future | None = None
    waits: bool = False  # for new weights that are waited for


class AsyncEngine:
    """Serves one event loop; `async with AsyncEngine(engine):` starts and stops it. The engine is
    its own meanwhile: nobody else may call it.

    `max_requests`: answers that may be unfinished at a time; more are refused.
    """

    def __init__(self, engine: Engine, max_requests: int = 1024):
        self.engine, self.max_requests = engine, max_requests
        self.version = 0  # of the weights: how often they were swapped
        self.error: BaseException | None = None  # that ended the thread
        self._asking = threading.Lock()  # around what puts messages there, and what ends that
        self._deaf = False  # nobody looks into the inbox any more
        self._inbox: SimpleQueue[_Message] = SimpleQueue()
        self._unfinished = 0  # the loop's count
        self._until: float | None = None  # asked to stop: unfinished answers may go on so long
        self._loop: asyncio.AbstractEventLoop | None = None
        self._gone = asyncio.Event()  # the thread
        self._thread = threading.Thread(target=self._run, name="npr_jax engine", daemon=True)
        # What only the thread touches:
        self._streams: dict[int, Answers] = {}  # of unfinished answers
        self._weights: _Message | None = None  # that wait for the last answer
        self._held: deque[_Message] = deque()  # until then

    async def __aenter__(self) -> "AsyncEngine":
        if count := self.engine.stats()["unfinished"]:
            raise RuntimeError(f"{count} answers of the engine are unfinished: abort them first")
        self.engine.step()  # events that nobody has taken out
        self._loop = asyncio.get_running_loop()
        self._thread.start()
        return self

    async def __aexit__(self, *_) -> None:
        await self.stop()

    @property
    def healthy(self) -> bool:
        """Whether it takes requests."""
        return self._thread.is_alive() and self._until is None and self.error is None

    @property
    def num_unfinished(self) -> int:
        """Answers that were asked for, and whose finish was not told yet."""
        return self._unfinished

    async def submit(
        self,
        prompts: abc.Sequence[str | abc.Sequence[int]],
        sampling: SamplingParams | None = None,
    ) -> Answers:
        """Queues `sampling.n` answers to every prompt.

        Raises what `Engine.submit` raises; Full where more than `max_requests` would be unfinished;
        Stopped where the engine has failed or was asked to stop.
        """
        sampling = sampling or SamplingParams()
        count = sampling.n * (len(prompts) if isinstance(prompts, abc.Sized) else 1)
        if self._unfinished + count > self.max_requests:
            raise Full(
                f"{self._unfinished} answers are unfinished and {count} more are asked for, at "
                f"most max_requests={self.max_requests} may be: try again later"
            )
        answers = Answers(self)
        reply = self._ask(self._submit, answers, prompts, sampling, waits=True)
        answers._unfinished = count
        self._unfinished += count

        def look(reply: asyncio.Future) -> None:
            if reply.exception():  # refused
                self._unfinished -= count

        reply.add_done_callback(look)
        try:
            await asyncio.shield(reply)
        except asyncio.CancelledError:  # it is queued, or will be
            answers.abort()
            raise
        return answers

    async def set_params(self, params) -> int:
        """Swaps the weights once all unfinished answers are done; what is submitted meanwhile waits
        for the new ones. Returns their version; raises what `Engine.set_params` raises."""
        return await self._ask(self._set_params, params, waits=True)

    async def stats(self) -> dict[str, float]:
        """`Engine.stats`, between two visits."""
        if not self._thread.is_alive():
            return self.engine.stats()
        return await self._ask(self.engine.stats)

    async def stop(self, drain: float = 0.0) -> None:
        """Takes nothing more, lets unfinished answers go on for `drain` seconds, aborts what is
        left, and ends the thread. Called again it can only shorten that."""
        until = time.monotonic() + drain
        if self._until is None or until < self._until:
            self._until = until
            self._tell(_Message(lambda: None))
        await self._gone.wait()
        self._thread.join()

    def _tell(self, message: _Message) -> None:
        self._inbox.put(message)

    def _ask(self, do: abc.Callable, *arguments, waits: bool = False) -> asyncio.Future[Any]:
        reply = asyncio.get_running_loop().create_future()
        with self._asking:
            if self._deaf or (waits and not self.healthy):
                raise Stopped("the engine takes no more requests") from self.error
            self._tell(_Message(do, arguments, reply, waits))
        return reply

    # From here on: the thread.

    def _run(self) -> None:
        try:
            while not (self._over() and self._inbox.empty()):
                self._read_inbox()
                if self._until is not None and time.monotonic() >= self._until:
                    self.engine.abort()
                self._deliver(self.engine.step())
        except BaseException as error:
            self.error = error
            with contextlib.suppress(Exception):
                self.engine.abort()  # a visit that fails has ended all with that reason
                self._deliver(self.engine.step())
        finally:
            with self._asking:
                self._deaf = True
            lost = Stopped("the engine has failed, and cannot tell how this answer ended")
            lost.__cause__ = self.error
            self._call(self._lose, {*self._streams.values()}, lost)
            for message in self._left():
                self._answer(message, Stopped("the engine takes no more requests"), self.error)
            self._call(self._gone.set)

    def _over(self) -> bool:
        return self._until is not None and not self._streams

    def _left(self) -> abc.Iterator[_Message]:
        """Messages that came too late."""
        if self._weights:
            yield self._weights
        yield from self._held
        while not self._inbox.empty():
            yield self._inbox.get()

    def _read_inbox(self) -> None:
        """Does what was asked for; waits where nothing else is to be done."""
        while True:
            if self._weights and not self._streams:
                self._do(self._weights)
                self._weights, held, self._held = None, self._held, deque()
                for message in held:
                    self._take(message)
            elif self._inbox.empty() and (self._streams or self._over()):
                return
            else:
                self._take(self._inbox.get())

    def _take(self, message: _Message) -> None:
        if self._weights and message.waits:
            self._held.append(message)
        elif message.do == self._set_params:
            self._weights = message
        else:
            self._do(message)

    def _do(self, message: _Message) -> None:
        try:
            self._answer(message, message.do(*message.arguments))
        except Exception as error:  # the caller's mistake
            self._answer(message, error)

    def _set_params(self, params) -> int:
        self.engine.set_params(params)
        self.version += 1
        return self.version

    def _submit(self, answers: Answers, prompts, sampling: SamplingParams) -> None:
        answers.version = self.version
        answers.requests = self.engine.submit(prompts, sampling)
        self._streams |= dict.fromkeys(answers.requests, answers)

    def _abort(self, answers: Answers) -> None:
        for message in [some for some in self._held if some.arguments[0] is answers]:
            self._held.remove(message)
            self._answer(message, Stopped("it was aborted while it waited for new weights"))
        for request in answers.requests:
            if request in self._streams:
                self.engine.abort(request)

    def _answer(self, message: _Message, result, cause: BaseException | None = None) -> None:
        """Tells the event loop what came of a message."""

        def tell(reply: asyncio.Future) -> None:
            if reply.cancelled():
                return
            if isinstance(result, Exception):
                result.__cause__ = cause
                reply.set_exception(result)
            else:
                reply.set_result(result)

        if message.reply is not None:
            self._call(tell, message.reply)

    def _deliver(self, events: list[Event]) -> None:
        """Hands a visit's events over."""
        told: dict[Answers, list[Event]] = {}
        for event in events:
            told.setdefault(self._streams[event.request], []).append(event)
            if event.kind == "finish":
                del self._streams[event.request]
        if told:
            self._call(self._hear, told)

    def _hear(self, told: dict[Answers, list[Event]]) -> None:
        """The event loop's end of it."""
        for answers, events in told.items():
            self._unfinished -= answers._hear(events)

    def _lose(self, lost: set[Answers], error: Stopped) -> None:
        for answers in lost:
            self._unfinished -= answers._lose(error)

    def _call(self, do: abc.Callable, *arguments) -> None:
        assert self._loop is not None
        self._loop.call_soon_threadsafe(do, *arguments)
