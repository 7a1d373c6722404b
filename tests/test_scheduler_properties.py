"""Random event sequences against the scheduler's promises: nothing lost, nothing twice, bounds kept, one end each."""

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fewstep.runtime.costs import Costs
from fewstep.runtime.scheduler import STRETCH, Accepted, Ended, Job, Lane, Rejected, Scheduler, Stepped

ROW = st.tuples(st.sampled_from([1, 2]), st.booleans())
STEPS = st.lists(ROW, min_size=1, max_size=5).map(tuple)
ROLES = ("text", "denoiser", "denoiser+control", "decoder")


def tables(seconds):
    costs = Costs()
    for model in ("m", "n"):
        for role, (one, many) in zip(ROLES, seconds, strict=True):
            costs.record((model, role), 1, one)
            costs.record((model, role), 8, many)
    return costs


SECONDS = st.lists(st.tuples(st.floats(1e-3, 0.1), st.floats(1e-3, 1.0)), min_size=4, max_size=4)


class Machine(RuleBasedStateMachine):
    """Any number of calls may be out at once, and come back in any order."""

    @initialize(
        seconds=st.none() | SECONDS,
        max_queue=st.integers(1, 6),
        max_batch=st.integers(1, 8),
        sizes=st.sampled_from([(), (1, 8), (1, 2, 4, 8)]),
        mixes=st.booleans(),
    )
    def begin(self, seconds, max_queue, max_batch, sizes, mixes):
        self.max_queue, self.max_batch = max_queue, max(max_batch, *sizes, 1)
        lane = Lane(max_batch=self.max_batch, batch_sizes=sizes, mixes_control=mixes)
        costs = Costs() if seconds is None else tables(seconds)
        self.scheduler = Scheduler({"m": lane, "n": lane}, costs, max_queue=max_queue)
        self.mixes = mixes
        self.now_s = 0.0
        self.jobs, self.ends = {}, Counter()
        self.out = []  # calls that run
        self.text, self.steps, self.decoded = Counter(), Counter(), Counter()

    @rule(
        model=st.sampled_from("mn"),
        rows=STEPS,
        prompts=st.integers(0, 2),
        pictures=st.integers(1, 3),
        priority=st.integers(-20, 20),
        deadline_s=st.none() | st.floats(0.01, 3.0),
    )
    def submit(self, model, rows, prompts, pictures, priority, deadline_s):
        name = str(len(self.jobs))
        job = Job(
            id=name, model=model, prompts=prompts, rows=rows, pictures=pictures, priority=priority,
            deadline_s=None if deadline_s is None else self.now_s + deadline_s,
        )  # fmt: skip
        decision = self.scheduler.submit(job, self.now_s)
        if isinstance(decision, Accepted):
            self.jobs[name] = job
        else:
            assert isinstance(decision, Rejected) and decision.retry_after_s >= 0
            assert deadline_s is not None or self.scheduler.live == self.max_queue

    @rule()
    def take(self):
        work = self.scheduler.next()
        if work is None:
            return
        assert len(set(work.items)) == len(work.items) >= 1
        assert work.size <= self.max_batch or len(work.items) == 1
        running = {(other.kind, item) for other in self.out for item in other.items}
        for item in work.items:
            job = self.jobs[item.id]
            assert not self.ends[item.id], "work of a request that has ended"
            assert (work.kind, item) not in running, "the same work twice at once"
            assert job.model == work.model
            if work.kind == "text":
                assert not self.text[item.id] and job.prompts
            else:
                assert self.text[item.id] or not job.prompts
                assert item.step == self.steps[item.id, item.picture], "a step skipped or repeated"
            if work.kind == "denoise" and not self.mixes:
                assert job.rows[item.step][1] == (work.role == "denoiser+control")
            if work.kind == "decode":
                assert item.step == len(job.rows) and not self.decoded[item.id, item.picture]
        self.out.append(work)

    @precondition(lambda self: self.out)
    @rule(data=st.data())
    def bring_back(self, data):
        work = self.out.pop(data.draw(st.integers(0, len(self.out) - 1)))
        faults = [data.draw(st.sampled_from([None, None, None, "NaN"])) for _ in work.items]
        over = {item.id for item in work.items if self.ends[item.id]}
        for item, fault in zip(work.items, faults, strict=True):
            if fault is None:
                counter = {"text": self.text, "denoise": self.steps, "decode": self.decoded}[work.kind]
                counter[item.id if work.kind == "text" else (item.id, item.picture)] += 1
        for event in self.scheduler.complete(work, faults, self.now_s):
            assert event.id not in over, "an event after the end"
            self.see(event)

    @rule(data=st.data())
    def cancel(self, data):
        name = data.draw(st.sampled_from([*self.jobs, "nobody"]))
        ended = self.scheduler.cancel(name)
        assert (ended is not None) == (name in self.jobs and not self.ends[name])
        if ended is not None:
            self.see(ended)

    @rule(seconds=st.floats(0.0, 1.0))
    def pass_time(self, seconds):
        self.now_s += seconds
        for ended in self.scheduler.expire(self.now_s):
            assert self.jobs[ended.id].deadline_s <= self.now_s
            self.see(ended)
        assert self.scheduler.expire(self.now_s) == []

    def see(self, event):
        if isinstance(event, Stepped):
            assert event.step == self.steps[event.id, event.picture]
            assert not self.ends[event.id]
            return
        assert isinstance(event, Ended)
        self.ends[event.id] += 1
        job = self.jobs[event.id]
        if event.reason == "finished":
            assert all(self.steps[event.id, p] == len(job.rows) for p in range(job.pictures))
            assert all(self.decoded[event.id, p] == 1 for p in range(job.pictures))
            assert job.deadline_s is None or self.now_s < job.deadline_s
        assert (event.reason == "failed") == (event.error is not None)

    @invariant()
    def each_ends_at_most_once_and_the_queue_is_bounded(self):
        if not hasattr(self, "scheduler"):
            return
        assert max(self.ends.values(), default=0) <= 1
        assert self.scheduler.live == len(self.jobs) - sum(self.ends.values())
        assert self.scheduler.live <= self.max_queue

    def teardown(self):
        """Whatever happened, serving on from here ends every request that is left, once."""
        if not hasattr(self, "scheduler"):
            return
        while True:
            while (work := self.scheduler.next()) is not None:
                self.out.append(work)
            if not self.out:
                break
            work = self.out.pop()
            for event in self.scheduler.complete(work, [None] * len(work.items), self.now_s):
                if isinstance(event, Ended):
                    self.ends[event.id] += 1
        assert self.scheduler.live == 0
        assert all(self.ends[name] == 1 for name in self.jobs)


Machine.TestCase.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
TestScheduler = Machine.TestCase


@settings(max_examples=30, deadline=None)
@given(
    steps=st.integers(1, 12),
    priority=st.integers(-2, 2),
    rival_steps=st.integers(1, 4),
    rival_priority=st.integers(-2, 2),
    rival_deadline_s=st.none() | st.floats(0.5, 2.0),
)
def test_no_request_waits_for_ever(steps, priority, rival_steps, rival_priority, rival_deadline_s):
    """Rivals of any size and urgency arrive faster than they can be served; the first request still ends in time."""
    one = 0.01
    scheduler = Scheduler({"m": Lane(max_batch=1)}, tables([(one, 8 * one)] * 4), max_queue=50)
    scheduler.submit(_job("victim", steps, priority, None), 0.0)
    own = one * (steps + 1)
    bound = STRETCH * own * 2.0**-priority + 50 * one * 5 + 1.0
    now, number, done = 0.0, 0, False
    while not done and now <= bound:
        for _ in range(2):
            number += 1
            deadline = None if rival_deadline_s is None else now + rival_deadline_s
            scheduler.submit(_job(f"r{number}", rival_steps, rival_priority, deadline), now)
        scheduler.expire(now)
        now += one
        work = scheduler.next()
        done = Ended("victim", "finished") in scheduler.complete(work, [None] * len(work.items), now)
    assert done, f"still waiting after {now:.2f} s; its own cost is {own:.2f} s"


def _job(name, steps, priority, deadline_s):
    return Job(id=name, model="m", prompts=0, rows=((1, False),) * steps, priority=priority, deadline_s=deadline_s)
