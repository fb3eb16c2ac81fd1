"""Attempts that run beside each other: an ordinary call has one, a hedged one may have two.

Which of two wins is decided by the first output, since from then on a user sees it; the loser is cancelled at once and
its cost is booked. Source: Dean and Barroso, "The tail at scale" (2013): a second request after the 95th percentile
cuts the tail for a few per cent more load.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import anyio
import anyio.abc

from ridethrough.runtime.errors import ModelError, Slow
from ridethrough.runtime.router.attempt import Attempt, Said
from ridethrough.runtime.router.call import Place

HEDGED_SHARE, HEDGES_AT_ONCE = 0.05, 10.0
"""At most so many of all calls get a second attempt, and so many in a row."""


class HedgingBudget:
    """Lets one call in twenty have a second attempt."""

    def __init__(self) -> None:
        self._tokens = HEDGES_AT_ONCE / 2

    def earn(self) -> None:
        """A call was answered."""
        self._tokens = min(HEDGES_AT_ONCE, self._tokens + HEDGED_SHARE)

    def take(self) -> bool:
        """Whether one more call may have a second attempt."""
        if self._tokens < 1.0:
            return False
        self._tokens -= 1.0
        return True

    def give_back(self) -> None:
        """It could not be made after all."""
        self._tokens += 1.0


async def run_attempt(attempt: Attempt) -> ModelError | None:
    """Run an attempt to its end and return its failure. It is freed early when its deployment turns out to be ill."""
    attempt.ticket.free = attempt.scope.cancel
    try:
        with attempt.scope:
            await attempt.run()
            return None
    except ModelError as error:
        return error
    finally:
        attempt.ticket.free = None
    text = (
        f"{attempt.deployment.name} gave no output for longer than it normally takes, and other calls to it fail too: "
        f"it was not waited for any more"
    )
    return Slow(text, phase="first_token", deployment=attempt.deployment.name)


Second = Callable[[], Awaitable["tuple[Attempt, Place] | None"]]


class Race:
    """The attempts of one call at one time; ``failures`` has an entry for each that has ended by itself."""

    def __init__(self, first: Attempt, place: Place) -> None:
        """``first`` has not been run yet."""
        self.attempts = [first]
        self.places = {first: place}
        self.failures: dict[Attempt, ModelError | None] = {}
        self.winner: Attempt | None = None
        self._said: Said | None = None
        self._moved = anyio.Event()

    def listen(self, said: Said | None) -> None:
        """Tell the texts of the winner, and of nobody else."""
        self._said = said
        self.attempts[0].heard = self._hear

    def won(self, attempt: Attempt) -> None:
        """Nobody else can answer any more."""
        self.winner = attempt

    async def run(self, after: float, second: Second) -> None:
        """Run the first attempt, and from ``after`` seconds without output on a second one beside it.

        Raises:
            Exception: What went wrong besides the attempts (in a listener, say), as it is and in no group.
        """
        try:
            async with anyio.create_task_group() as group:
                group.start_soon(self._run, self.attempts[0])
                with anyio.move_on_after(after):
                    await self._moved.wait()
                if not self._moved.is_set():
                    await self._run_beside(group, second)
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None

    async def _run_beside(self, group: anyio.abc.TaskGroup, second: Second) -> None:
        hedge = await second()
        if hedge is None:
            return
        attempt, place = hedge
        self.attempts.append(attempt)
        self.places[attempt] = place
        attempt.heard = self._hear
        group.start_soon(self._run, attempt)

    async def _run(self, attempt: Attempt) -> None:
        failure = await run_attempt(attempt)
        if self.winner is not None and self.winner is not attempt:
            return  # it was cancelled because it had lost
        self.failures[attempt] = failure
        if failure is None:
            self._decide(attempt)
        elif self.winner is attempt:
            self.winner = None
        self._moved.set()

    def _hear(self, attempt: Attempt, text: str) -> None:
        """An attempt gave output: the first one that does has won."""
        if self.winner is None:
            self._decide(attempt)
        if text and self._said is not None and self.winner is attempt:
            self._said(attempt, text)

    def _decide(self, winner: Attempt) -> None:
        self.winner = winner
        self._moved.set()
        for other in self.attempts:
            if other is not winner and other not in self.failures:
                other.scope.cancel()
