"""The thread that owns an engine: takes requests, computes step after step, hands pieces of completions to asyncio.

Requests and cancellations come through a queue and are looked at between steps, so a client that leaves gives its slot
back at the next one. Pieces go the other way once a step at most: the first token at once, then every `flush_s` or
`FLUSH_TOKENS`, all streams of a step by one wake-up of the event loop. Neither side ever waits for the other's work.
How many rows of prompts a step takes follows the pace that was measured.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from queue import Empty, SimpleQueue

from services.inference.engine import Engine, Logits, Rows
from services.inference.scheduler import Chunk, Scheduler, Sequence, Share, Step
from services.inference.stream import Detail, Finish, Piece, TokenStream
from smeltkit.errors import EngineUnavailable, InternalError, SmeltError
from smeltkit.ml.sampling import Sampler, log_softmax, token_logprobs, top_logprobs
from smeltkit.telemetry import histogram, names

log = logging.getLogger(__name__)

FLUSH_TOKENS = 16
PACE_ROWS_MIN = 32
"""Rows of prompts that a step may always take, and from which on it tells the pace."""
PACE_WEIGHT = 0.25
"""Weight of the newest step in the measured pace."""
ALONE_STEP_S = 1.0
"""How long a step of prompts alone may last: a client that leaves frees its slot only between steps."""


class Request:
    """Work for a runtime and the mailbox of its results, which its reader empties at its own pace."""

    def __init__(self, sequence: Sequence) -> None:
        self.sequence = sequence
        self.is_ended = False
        """Whether the runtime is done with it; set on its thread."""
        self.marks_ns: dict[str, int] = {}
        """When it was first computed ("prefill") and gave its first token ("first_token"), in Unix time."""
        self._arrived = asyncio.Event()
        self._error: SmeltError | None = None

    def fail(self, error: SmeltError) -> None:
        """Raises `error` at the reader; on the event loop."""
        self._error = error
        self._arrived.set()

    async def _wait(self) -> None:
        await self._arrived.wait()
        self._arrived.clear()
        if self._error is not None:
            raise self._error


class Generation(Request):
    """A completion under way."""

    def __init__(
        self, sequence: Sequence, stream: TokenStream, sampler: Sampler, *, logprobs: int = -1, final_only: bool = False
    ) -> None:
        """`logprobs`: -1 none, 0 of the chosen token, else also of the best n. `final_only`: one piece, at the end."""
        super().__init__(sequence)
        self.stream = stream
        self.sampler = sampler
        self.logprobs = logprobs
        sequence.is_patient = final_only
        self.takes_best = sampler.params.is_greedy and sampler.params.repetition_penalty == 1
        """Whether the next token is simply the one with the largest logit."""
        self.flushed_s = 0.0
        """When the last piece was given out, on the monotonic clock."""
        self._mail = Piece()

    def deliver(self, piece: Piece) -> None:
        """Puts `piece` into the mailbox; on the event loop."""
        self._mail.add(piece)
        self._arrived.set()

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """The completion as it grows; the last piece has the finish reason. Raises what the runtime met."""
        piece = Piece()
        while piece.finish is None:
            await self._wait()
            piece, self._mail = self._mail, Piece()
            yield piece


class Scoring(Request):
    """Log-probabilities of given tokens, under way."""

    def __init__(self, sequence: Sequence) -> None:
        super().__init__(sequence)
        sequence.is_patient = True
        self.logprobs: list[float] = [0.0]

    def complete(self) -> None:
        """Wakes the reader; on the event loop."""
        self._arrived.set()

    async def result(self) -> list[float]:
        """The log-probability of each token given those before it; 0 for the first."""
        await self._wait()
        return self.logprobs


class Runtime:
    """One engine and its thread. Made on the event loop that reads its results."""

    def __init__(self, engine: Engine, scheduler: Scheduler, *, vocab_size: int, flush_s: float, step_s: float) -> None:
        """`vocab_size`: tokens that exist; a model may have logits for more. `flush_s`: see FLUSH_TOKENS.

        `step_s`: how long prompts may make a step last while somebody watches others generate.
        """
        self.engine = engine
        self.failure: SmeltError | None = None
        """What ended the thread, once it has; the engine is of no use then."""
        self._scheduler = scheduler
        self._vocab_size = vocab_size
        self._flush_s = flush_s
        self._pace = Pace()
        self._step_s = step_s
        self._is_paced = True
        self._bound_prompts()
        self._loop = asyncio.get_running_loop()
        self._commands: SimpleQueue[tuple[str, Request | None]] = SimpleQueue()
        self._active: dict[Sequence, Request] = {}
        self._deliveries: list[tuple[Request, Piece | SmeltError | None]] = []
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def running(self) -> int:
        """Requests in slots."""
        return len(self._scheduler.running)

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._scheduler.waiting) + self._commands.qsize()

    def submit(self, request: Request) -> None:
        """Starts `request`; its reader gets the results, or the error if it is refused."""
        self._commands.put(("submit", request))
        if self.failure is not None:
            raise self.failure

    def cancel(self, request: Request) -> None:
        """Ends `request` at the next step; nothing happens if it has ended."""
        if not request.is_ended:
            self._commands.put(("cancel", request))

    @contextmanager
    def unpaced(self) -> Iterator[None]:
        """Prompts in as few steps as they fit into while the block lasts, however slow the machine is just now: where a
        prompt is cut moves its logits in their last digits. For a model that nobody else uses, else clients wait."""
        self._is_paced = False
        self._bound_prompts()
        try:
            yield
        finally:
            self._is_paced = True
            self._bound_prompts()

    async def close(self) -> None:
        """Stops the thread and frees the engine; what still runs gets EngineUnavailable."""
        self._commands.put(("close", None))
        await asyncio.to_thread(self._thread.join)

    # --- the thread ---------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._take_commands():
                self._step(self._scheduler.plan())
        except Exception as error:
            log.exception("the engine failed")
            self.failure = error if isinstance(error, SmeltError) else EngineUnavailable(f"it failed: {error!r}")
        finally:
            self._end_all()
            self.engine.close()

    def _take_commands(self) -> bool:
        """Posts what is ready, handles what came in, waits if there is nothing to compute; False when it is to stop."""
        while True:
            self._post()
            is_idle = not self._scheduler.has_work
            if is_idle and self._commands.empty():
                self.engine.rest()
            try:
                command, request = self._commands.get(block=is_idle)
            except Empty:
                return True
            if request is None:
                return False
            if command == "submit":
                self._start(request)
            elif not request.is_ended:
                self._end(request)

    def _start(self, request: Request) -> None:
        try:
            self._scheduler.submit(request.sequence)
            self._active[request.sequence] = request
        except SmeltError as error:
            request.is_ended = True
            self._deliveries.append((request, error))

    def _step(self, step: Step) -> None:
        for operation in step.operations:
            if isinstance(operation, Share):
                self.engine.share(operation.source, operation.target, operation.count)
            else:
                self.engine.cut(operation.slot, operation.count)
        work = [(self._active[chunk.sequence], chunk) for chunk in step.chunks]
        for request, _ in work:
            if not request.marks_ns:
                request.marks_ns["prefill"] = time.time_ns()
        rows, started = _rows(step.chunks), time.perf_counter()
        logits = self.engine.decode(rows)[:, : self._vocab_size]
        histogram(names.BATCH_ROWS).record(len(rows.tokens))
        if self._pace.measured(len(rows.tokens), time.perf_counter() - started):
            self._bound_prompts()
        self._scheduler.commit(step)
        self._advance(work, logits)

    def _bound_prompts(self) -> None:
        """Tells the scheduler how many rows of prompts fit into the time of a step."""
        rows_max = self.engine.info.batch_rows
        if not self._is_paced:
            self._scheduler.prompt_rows = self._scheduler.alone_rows = rows_max
            return
        self._scheduler.prompt_rows = min(self._pace.rows_in(self._step_s), rows_max)
        self._scheduler.alone_rows = min(self._pace.rows_in(max(self._step_s, ALONE_STEP_S)), rows_max)

    def _advance(self, work: list[tuple[Request, Chunk]], logits: Logits) -> None:
        """Gives each chunk its rows of `logits`: (outputs, vocab), in the order of the chunks."""
        best = logits.argmax(axis=1).tolist()
        row, now = 0, time.monotonic()
        for request, chunk in work:
            is_last = not chunk.sequence.remaining
            count = chunk.count if chunk.sequence.all_outputs else int(is_last)
            try:
                if isinstance(request, Scoring):
                    _score(request, chunk, logits[row : row + count])
                elif is_last:
                    assert isinstance(request, Generation)
                    self._choose(request, logits[row], best[row], now)
            except SmeltError as error:
                self._end(request, error)
            row += count
            if is_last and isinstance(request, Scoring):
                self._end(request)

    def _choose(self, request: Generation, logits: Logits, best: int, now: float) -> None:
        stream = request.stream
        if not math.isfinite(logits[best]):
            raise InternalError("the engine returned logits without a finite maximum, so no token can be chosen")
        token = best if request.takes_best else request.sampler.pick(logits, stream.count)
        if not stream.count:
            request.marks_ns["first_token"] = time.time_ns()
        stream.push(token, _detail(logits, token, request.logprobs) if request.logprobs >= 0 else None)
        if stream.finish is not None:
            self._end(request)
            return
        self._scheduler.append(request.sequence, token)
        if request.sequence.is_patient:
            return
        if stream.pending >= FLUSH_TOKENS or now - request.flushed_s >= self._flush_s:
            request.flushed_s = now
            self._deliveries.append((request, stream.take()))

    def _end(self, request: Request, error: SmeltError | None = None) -> None:
        """Frees what `request` holds and sends its last piece, or `error`."""
        request.is_ended = True
        self._scheduler.finish(request.sequence)
        del self._active[request.sequence]
        if error is None and isinstance(request, Generation):
            request.stream.end(Finish.CANCELLED)
            self._deliveries.append((request, request.stream.take()))
        else:
            self._deliveries.append((request, error))

    def _end_all(self) -> None:
        """Whatever is left when the thread ends, or comes later, gets the failure."""
        self.failure = error = self.failure or EngineUnavailable("the model was unloaded; send the request again")
        while not self._commands.empty():
            _, request = self._commands.get()
            if request is not None and not request.is_ended:
                self._active[request.sequence] = request
        self._deliveries += [(request, error) for request in self._active.values()]
        self._post()

    def _post(self) -> None:
        if self._deliveries:
            deliveries, self._deliveries = self._deliveries, []
            self._loop.call_soon_threadsafe(_deliver, deliveries)


class Pace:
    """How many rows take how long, learnt from the steps that were large enough to tell."""

    def __init__(self) -> None:
        self._row_s = 0.0

    def measured(self, rows: int, seconds: float) -> bool:
        """Takes in that a step of `rows` rows took `seconds`; whether that tells something new."""
        if rows < PACE_ROWS_MIN:
            return False
        self._row_s += (seconds / rows - self._row_s) * (PACE_WEIGHT if self._row_s else 1.0)
        return True

    def rows_in(self, seconds: float) -> int:
        """Rows that take about `seconds`, PACE_ROWS_MIN at least; a few before anything was measured."""
        return max(int(seconds / self._row_s), PACE_ROWS_MIN) if self._row_s else 4 * PACE_ROWS_MIN


def _deliver(deliveries: list[tuple[Request, Piece | SmeltError | None]]) -> None:
    for request, item in deliveries:
        if isinstance(item, SmeltError):
            request.fail(item)
        elif isinstance(request, Generation) and item is not None:
            request.deliver(item)
        elif isinstance(request, Scoring):
            request.complete()


def _rows(chunks: list[Chunk]) -> Rows:
    rows = Rows()
    for chunk in chunks:
        sequence = chunk.sequence
        rows.tokens += sequence.tokens[chunk.start : chunk.end]
        rows.positions += range(chunk.start, chunk.end)
        rows.slots += [sequence.slot] * chunk.count
        rows.outputs += [sequence.all_outputs] * (chunk.count - 1)
        rows.outputs.append(sequence.all_outputs or chunk.end == len(sequence.tokens))
    return rows


def _score(request: Scoring, chunk: Chunk, logits: Logits) -> None:
    """Adds the log-probability that each row (count, vocab) gives to the token after it."""
    following = request.sequence.tokens[chunk.start + 1 : chunk.end + 1]
    request.logprobs += token_logprobs(logits[: len(following)], following)


def _detail(logits: Logits, token: int, count: int) -> Detail:
    logprobs = log_softmax(logits)
    return Detail(token, float(logprobs[token]), tuple(top_logprobs(logprobs, count)))
