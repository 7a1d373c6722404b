"""Random event sequences against the scheduler's promises: nothing lost, nothing twice, bounds kept, one end each."""

from collections import Counter
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fewstep.runtime.schedule.costs import Costs
from fewstep.runtime.schedule.jobs import Accepted, Ended, Job, Lane, Paused, Prepare, Rejected, RowCall, Stepped, mixed
from fewstep.runtime.schedule.scheduler import DEADLINE_STRETCH, STRETCH, Scheduler

MODELS = ("m", "n")
STEERED = "denoiser+control"
ROLES = ("text", "encoder", "denoiser", STEERED, mixed(STEERED), "decoder")
ROW = st.builds(RowCall, st.sampled_from(MODELS), st.sampled_from(["denoiser", STEERED]), st.sampled_from([1, 2]))
PREPARE = st.one_of(
    st.builds(Prepare, st.just("text"), st.sampled_from(MODELS), st.just("text"), st.integers(1, 2)),
    st.builds(Prepare, st.just("encode"), st.sampled_from(MODELS), st.just("encoder"), st.just(1)),
)
WORK = st.tuples(
    st.sampled_from(MODELS),
    st.lists(PREPARE, max_size=3).map(tuple),
    st.lists(ROW, min_size=1, max_size=5).map(tuple),
    st.sampled_from(["decoder", "decoder", None]),
    st.integers(1, 3),
)
"""(model, before, rows, finish, pictures)."""


def tables(seconds):
    costs = Costs()
    for model in MODELS:
        for role, (one, many) in zip(ROLES, seconds, strict=True):
            costs.record((model, role), 1, one)
            costs.record((model, role), 8, many)
    return costs


SECONDS = st.lists(st.tuples(st.floats(1e-3, 0.1), st.floats(1e-3, 1.0)), min_size=len(ROLES), max_size=len(ROLES))


class Done:
    """What of one stage of a request has come back."""

    def __init__(self, job):
        self.job = job
        self.before, self.steps, self.decoded = set(), Counter(), set()

    @property
    def whole(self):
        pictures = range(self.job.pictures)
        return (
            len(self.before) == len(self.job.before)
            and all(self.steps[p] == len(self.job.rows) for p in pictures)
            and (self.job.finish is None or len(self.decoded) == self.job.pictures)
        )


class Machine(RuleBasedStateMachine):
    """Any number of calls may be out at once, and come back in any order."""

    @initialize(
        seconds=st.none() | SECONDS,
        max_queue=st.integers(1, 6),
        max_batch=st.integers(1, 8),
        sizes=st.sampled_from([(), (1, 8), (1, 2, 4, 8)]),
    )
    def begin(self, seconds, max_queue, max_batch, sizes):
        self.max_queue, self.max_batch = max_queue, max(max_batch, *sizes, 1)
        lane = Lane(max_batch=self.max_batch, batch_sizes=sizes)
        costs = Costs() if seconds is None else tables(seconds)
        self.scheduler = Scheduler(dict.fromkeys(MODELS, lane), costs, max_queue=max_queue)
        self.now_s = 0.0
        self.done, self.ends, self.paused = {}, Counter(), set()
        self.held = set()
        self.out = []  # calls that run

    @rule(
        asked=WORK,
        priority=st.integers(-20, 20),
        deadline_s=st.none() | st.floats(0.01, 3.0),
        then_s=st.none() | st.floats(0.0, 0.5),
    )
    def submit(self, asked, priority, deadline_s, then_s):
        name = str(len(self.done))
        model, before, rows, finish, pictures = asked
        job = Job(
            id=name, model=model, before=before, rows=rows, finish=finish, pictures=pictures,
            priority=priority, deadline_s=None if deadline_s is None else self.now_s + deadline_s, then_s=then_s,
        )  # fmt: skip
        decision = self.scheduler.submit(job, self.now_s)
        if isinstance(decision, Accepted):
            assert decision.finish_s >= self.now_s
            self.done[name] = Done(job)
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
        assert work.model not in self.held
        running = {(other.kind, item) for other in self.out for item in other.items}
        size = 0
        for item in work.items:
            assert not self.ends[item.id], "work of a request that has ended"
            assert item.id not in self.paused, "work of a request that waits for more"
            assert (work.kind, item) not in running, "the same work twice at once"
            size += self.check(work, item, self.done[item.id])
        assert size == work.size
        self.out.append(work)

    def check(self, work, item, done):
        """The item is what its request needs next; its size."""
        job = done.job
        if work.kind in ("text", "encode"):
            part = job.before[item.step]
            assert item.step not in done.before and part[:3] == (work.kind, work.model, work.role)
            return part.size
        assert len(done.before) == len(job.before), "rows wait for every preparation"
        assert item.step == done.steps[item.picture], "a step skipped or repeated"
        if work.kind == "decode":
            assert item.step == len(job.rows) and item.picture not in done.decoded
            assert (work.model, work.role) == (job.model, job.finish)
            return 1
        row = job.rows[item.step]
        assert row.model == work.model
        assert row.role == work.role or (row.role == "denoiser" and work.priced == mixed(work.role))
        return row.evaluations

    @precondition(lambda self: self.out)
    @rule(data=st.data())
    def bring_back(self, data):
        work = self.out.pop(data.draw(st.integers(0, len(self.out) - 1)))
        self.complete(work, [data.draw(st.sampled_from([None] * 6 + ["NaN"])) for _ in work.items])

    def complete(self, work, faults):
        over = {item.id for item in work.items if self.ends[item.id]}
        for item, fault in zip(work.items, faults, strict=True):
            done = self.done[item.id]
            if fault is not None:
                continue
            if work.kind == "denoise":
                done.steps[item.picture] += 1
            elif work.kind == "decode":
                done.decoded.add(item.picture)
            else:
                done.before.add(item.step)
        for event in self.scheduler.complete(work, faults, self.now_s):
            assert event.id not in over, "an event after the end"
            self.see(event)

    @rule(data=st.data(), asked=WORK, more=st.booleans())
    @precondition(lambda self: self.paused)
    def go_on(self, data, asked, more):
        """A paused request gets more work, or is said to be over."""
        name = data.draw(st.sampled_from(sorted(self.paused)))
        self.paused.discard(name)
        if not more:
            self.see(self.scheduler.conclude(name, self.now_s))
            return
        model, before, rows, finish, pictures = asked
        job = replace(
            self.done[name].job, model=model, before=before, rows=rows, finish=finish, pictures=pictures,
            then_s=None,
        )  # fmt: skip
        self.done[name] = Done(job)
        self.scheduler.extend(job)

    @rule(data=st.data())
    def cancel(self, data):
        name = data.draw(st.sampled_from([*self.done, "nobody"]))
        ended = self.scheduler.cancel(name)
        assert (ended is not None) == (name in self.done and not self.ends[name])
        if ended is not None:
            self.see(ended)

    @rule(model=st.sampled_from(MODELS))
    def hold_or_release(self, model):
        """A model's engine is put out of memory, or comes back."""
        if model in self.held:
            self.held.discard(model)
            self.scheduler.release(model)
        else:
            self.held.add(model)
            self.scheduler.hold(model)

    @rule(seconds=st.floats(0.0, 1.0))
    def pass_time(self, seconds):
        self.now_s += seconds
        for ended in self.scheduler.expire(self.now_s):
            assert self.done[ended.id].job.deadline_s <= self.now_s
            self.see(ended)
        assert self.scheduler.expire(self.now_s) == []
        assert self.scheduler.next_deadline_s is None or self.scheduler.next_deadline_s > self.now_s

    def see(self, event):
        done = self.done[event.id]
        if isinstance(event, Stepped):
            assert event.step == done.steps[event.picture]
            assert not self.ends[event.id]
        elif isinstance(event, Paused):
            assert done.whole and done.job.then_s is not None and event.id not in self.paused
            self.paused.add(event.id)
        else:
            assert isinstance(event, Ended)
            self.ends[event.id] += 1
            self.paused.discard(event.id)
            if event.reason == "finished":
                assert done.whole
                assert done.job.deadline_s is None or self.now_s < done.job.deadline_s
            assert (event.reason == "failed") == (event.error is not None)

    @invariant()
    def each_ends_at_most_once_and_the_queue_is_bounded(self):
        if not hasattr(self, "scheduler"):
            return
        assert max(self.ends.values(), default=0) <= 1
        live = [name for name in self.done if not self.ends[name]]
        assert self.scheduler.live == len(live) <= self.max_queue
        for model in MODELS:
            assert set(self.scheduler.users(model)) == {n for n in live if model in self.done[n].job.models}

    def teardown(self):
        """Whatever happened, serving on from here ends every request that is left, once."""
        if not hasattr(self, "scheduler"):
            return
        for model in self.held:
            self.scheduler.release(model)
        while True:
            while (work := self.scheduler.next()) is not None:
                self.out.append(work)
            for name in tuple(self.paused):
                self.see(self.scheduler.conclude(name, self.now_s))
            if not self.out:
                break
            work = self.out.pop()
            self.complete(work, [None] * len(work.items))
        assert self.scheduler.live == 0 and self.scheduler.next_deadline_s is None
        assert all(self.ends[name] == 1 for name in self.done)
        assert all(self.scheduler.waiting_due_s(model) is None for model in MODELS)
        for model in MODELS:
            self.scheduler.drop(model)


Machine.TestCase.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
TestScheduler = Machine.TestCase


@settings(max_examples=40, deadline=None)
@given(
    asked=st.lists(st.tuples(WORK, st.integers(-3, 3), st.none() | st.floats(1.0, 9.0)), min_size=2, max_size=8),
    seconds=SECONDS,
)
def test_the_most_urgent_ready_work_is_in_every_call(asked, seconds):
    """Due order: no call leaves out the ready item of the request that was due first among all that are ready."""
    lane = Lane(max_batch=4)
    scheduler = Scheduler(dict.fromkeys(MODELS, lane), tables(seconds), max_queue=50)
    due = {}
    for number, ((model, before, rows, finish, pictures), priority, deadline_s) in enumerate(asked):
        job = Job(
            id=str(number), model=model, before=before, rows=rows, finish=finish, pictures=pictures,
            priority=priority, deadline_s=deadline_s,
        )  # fmt: skip
        if isinstance(scheduler.submit(job, 0.0), Accepted):
            own = scheduler._pricing.job(job).total_s
            soft = (STRETCH if deadline_s is None else DEADLINE_STRETCH) * own * 2.0**-priority
            due[job.id] = min(soft, deadline_s - own) if deadline_s is not None else soft
    calls = 0
    while (work := scheduler.next()) is not None:
        calls += 1
        waiting = [due[r] for r in due if r in scheduler._live and scheduler._live[r].queued]
        assert min(due[item.id] for item in work.items) <= min(waiting, default=float("inf")) + 1e-9
        order = [due[item.id] for item in work.items]
        assert order == sorted(order)
        scheduler.complete(work, [None] * len(work.items), 0.0)
    assert (calls > 0) == bool(due) and scheduler.live == 0


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
    scheduler = Scheduler({"m": Lane(max_batch=1)}, tables([(one, 8 * one)] * len(ROLES)), max_queue=50)
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
    return Job(id=name, model="m", rows=(RowCall("m"),) * steps, priority=priority, deadline_s=deadline_s)
