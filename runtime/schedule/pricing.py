"""What a job and its calls cost by the measured table, served alone or in batches. Pure."""

import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from .costs import Batches, Costs, best_batches
from .jobs import Job, Lane


@dataclass(frozen=True, slots=True)
class Price:
    """Seconds of a job's parts, each alone in its call: each preparation, each row of one picture, its end, and all
    of it together."""

    before_s: tuple[float, ...]
    row_s: tuple[float, ...]
    finish_s: float
    total_s: float


class Pricing:
    """Reads the cost table for engines as their lanes say they are called."""

    def __init__(self, lanes: Mapping[str, Lane], costs: Costs) -> None:
        self._lanes = lanes
        self._costs = costs

    def call_s(self, model: str, role: str, size: int) -> float:
        """Seconds of a call, counting the padding to a size that the engine has, and the calls above its largest."""
        lane = self._lanes[model]
        if size > lane.max_batch:
            whole, rest = divmod(size, lane.max_batch)
            last = self.call_s(model, role, rest) if rest else 0.0
            return whole * self.call_s(model, role, lane.max_batch) + last
        padded = size
        if lane.batch_sizes:
            padded = min((s for s in lane.batch_sizes if s >= size), default=size)
        return self._costs.seconds((model, role), padded)

    def job(self, job: Job) -> Price:
        """What a job costs if it shares no call."""
        watched = self.call_s(job.model, job.watch, 1) if job.watch else 0.0
        calls = {row: watched + self.call_s(row.model, row.role, row.evaluations) for row in set(job.rows)}
        rows = tuple([calls[row] for row in job.rows])
        before = tuple([self.call_s(part.model, part.role, part.size) for part in job.before])
        finish = 0.0 if job.finish is None else self.call_s(job.model, job.finish, 1)
        total = sum(before) + job.pictures * (sum(rows) + finish) + (job.then_s or 0.0)
        return Price(before, rows, finish, total)

    def measured(self, job: Job) -> bool:
        """Whether a job's price rests on measurements, not on guesses."""
        calls = {(row.model, row.role) for row in job.rows} | {(part.model, part.role) for part in job.before}
        if job.finish is not None:
            calls.add((job.model, job.finish))
        return all(self._costs.measured(call) for call in calls)

    def known(self, model: str, role: str) -> bool:
        """Whether calls of a role were measured."""
        return self._costs.measured((model, role))

    def batches(self, model: str, role: str, sizes: Sequence[int]) -> Batches:
        """How to serve items of these sizes in order: as many in a call as pays, and as the engine takes."""
        if not sizes:
            return Batches(0, 0.0, 0.0)
        sums = [0, *accumulate(sizes)]
        most = max(1, bisect.bisect_right(sums, self._lanes[model].max_batch) - 1)
        return best_batches(len(sizes), most, lambda k: self.call_s(model, role, sums[k]))
