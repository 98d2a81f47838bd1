"""Watches the numbers of a run and says when it should stop."""

import collections
from typing import Any, NamedTuple

import jax

HISTORY = 100  # values of each loss that a new one is compared with,
ENOUGH = 20  # once there are so many
SEEN_AT_LEAST = 1000  # samples to which the share of bad records refers, however few were seen


class Trouble(NamedTuple):
    """What is wrong: `sound` is the last iteration before it began, `iteration` the one whose `batch` shows it."""

    reason: str
    sound: int
    iteration: int
    batch: Any
    is_data: bool


class Guard:
    """Judges every iteration when the next has been started, so that devices never wait for it."""

    def __init__(self, *, max_skipped: int, max_loss_ratio: float, max_bad_data: float, batch_size: int):
        """A limit of 0 is none.

        max_skipped: updates skipped in a row. max_loss_ratio: a loss relative to the largest of its last values.
        max_bad_data: share of bad records among the samples seen, `batch_size` an iteration.
        """
        self._max_skipped, self._max_loss_ratio, self._max_bad_data = max_skipped, max_loss_ratio, max_bad_data
        self._batch_size = batch_size
        self.start(0, skipped=0)

    def start(self, iteration: int, skipped: int) -> None:
        """Forgets what it saw: the run goes on from a sound iteration, up to which so many updates were skipped."""
        self.sound = iteration  # the last one after which nothing looked wrong
        self._waiting: tuple[int, Any, Any] | None = None
        self._skipped, self._in_a_row = skipped, 0
        self._losses = collections.defaultdict(lambda: collections.deque(maxlen=HISTORY))

    def judge(self, iteration: int, batch: Any, metrics: Any, *, last: bool = False) -> Trouble | None:
        """Takes an iteration, counted from 1, and tells what was wrong with the one before, or with the `last`."""
        waiting, self._waiting = self._waiting, (iteration, batch, metrics)
        trouble = None if waiting is None else self._judge(*waiting)
        return self._judge(*self._waiting) if last and trouble is None else trouble

    def _judge(self, iteration: int, batch: Any, metrics: Any) -> Trouble | None:
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        skipped = int(values["skipped"])
        self._in_a_row = self._in_a_row + 1 if skipped > self._skipped else 0
        self._skipped = skipped
        if self._max_skipped and self._in_a_row >= self._max_skipped:
            reason = f"{self._in_a_row} updates in a row were skipped, their gradients were not finite"
            return Trouble(reason, iteration - self._in_a_row, iteration, batch, is_data=False)
        bad = sum(value for name, value in values.items() if name.startswith("bad_data/"))
        seen = max(iteration * self._batch_size, SEEN_AT_LEAST)
        if self._max_bad_data and bad > self._max_bad_data * seen:
            reason = f"{bad:.0f} of {seen:,} samples were bad records, more than faults.max_bad_data allows"
            return Trouble(reason, iteration, iteration, batch, is_data=True)
        for name, value in values.items():
            if name.startswith("loss_") and (largest := self._outgrown(name, abs(value))):
                reason = f"{name} is {value:.4g}, the largest of those before was {largest:.4g}"
                return Trouble(reason, iteration - 1, iteration, batch, is_data=False)
        self.sound = iteration - (self._in_a_row if self._max_skipped else 0)
        return None

    def _outgrown(self, name: str, value: float) -> float:
        """The largest earlier value if the new one is out of all proportion to it, else 0."""
        losses = self._losses[name]
        largest = max(losses, default=0.0)
        if self._max_loss_ratio and len(losses) >= ENOUGH and value > self._max_loss_ratio * largest:
            return largest
        if value < float("inf"):
            losses.append(value)
        return 0.0
