"""Models in memory within a budget: who goes, who stays, and that the bound holds whatever is asked."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fewstep.runtime.engine import Capabilities
from fewstep.runtime.errors import BundleError, EngineFailed
from fewstep.runtime.service.residence import STAY, Residence, Resident, weight_bytes


class Engine:
    """Says what was done to it."""

    def __init__(self, log, roles=("text",)):
        self.name, self.capabilities = "engine", Capabilities(roles=frozenset(roles), max_batch=1)
        self.log = log
        log.append("opened")

    def run(self, role, feeds):
        self.log.append(f"ran {role}")
        return ()

    def close(self):
        self.log.append("closed")


def house(budget, **sizes):
    found = Residence(budget)
    for k, (name, size) in enumerate(sizes.items()):
        found.enter(name, size, float(k), 1.0, fixed=False)
    return found


def test_an_engine_goes_and_comes_back():
    log = []
    resident = Resident(Engine(log), lambda: Engine(log))
    resident.run("text", {})
    resident.close()
    resident.close()
    with pytest.raises(EngineFailed, match="not in memory"):
        resident.run("text", {})
    resident.bring_back()
    resident.run("text", {})
    assert log == ["opened", "ran text", "closed", "opened", "ran text"]
    resident.reopen = lambda: Engine(log, roles=())
    resident.close()
    with pytest.raises(EngineFailed, match="came back without"):
        resident.bring_back()
    assert log[-2:] == ["opened", "closed"]


def test_the_one_asked_for_longest_ago_goes_first():
    found = house(30, a=10, b=10, c=10)
    found.use("a", 9.0)
    assert found.victims("d", 10, 10.0, ()) == ("b",)
    assert found.victims("d", 20, 10.0, ()) == ("b", "c")
    assert found.victims("d", 10, 10.0, ("b",)) == ("c",), "the idle go before those in use"
    assert house(None, a=10).victims("d", 10**9, 0.0, ()) == ()


def test_a_model_in_use_stays_its_time():
    found = house(20, a=10, b=10)
    wait = found.victims("c", 10, 2.0, ("a", "b"))
    assert wait == pytest.approx(STAY * 1.0 - 2.0), "a came at 0"
    assert found.victims("c", 10, STAY + 0.5, ("a", "b")) == ("a",)
    found.leave("a")
    assert found.victims("c", 10, 0.0, ("b",)) == ()


def test_what_cannot_fit_is_refused_with_the_figures():
    found = Residence(30)
    found.enter("fixed", 20, 0.0, 0.0, fixed=True)
    with pytest.raises(BundleError, match=r"big takes 11 bytes beside 20 that stay; memory_budget_bytes is 30"):
        found.check("big", 11)
    found.check("fits", 10)
    assert math.isinf(found.victims("big", 11, 99.0, ()))


@settings(max_examples=60, deadline=None)
@given(
    budget=st.integers(10, 40),
    sizes=st.lists(st.integers(1, 10), min_size=1, max_size=6),
    asked=st.lists(st.tuples(st.integers(0, 5), st.sets(st.integers(0, 5))), max_size=30),
)
def test_the_budget_holds_whatever_is_asked(budget, sizes, asked):
    found, now = Residence(budget), 0.0
    for k, size in enumerate(sizes):
        going = found.victims(str(k), size, math.inf, ())
        for name in going:
            found.leave(name)
        found.enter(str(k), size, now, 0.5, fixed=False)
        assert found.bytes <= budget
    for number, busy in asked:
        now += 0.7
        name = str(number % len(sizes))
        found.use(name, now)
        going = () if found.inside(name) else found.victims(name, found.size(name), now, {str(k) for k in busy})
        if isinstance(going, float):
            assert 0.0 < going <= STAY * 0.5
            continue
        assert len(set(going)) == len(going) and name not in going
        for other in going:
            found.leave(other)
        if not found.inside(name):
            found.enter(name, found.size(name), now, 0.5, fixed=False)
        assert found.bytes <= budget


def test_a_bundle_weighs_what_its_weight_files_do(tiny_lcm):
    size = weight_bytes(tiny_lcm)
    assert 100_000 < size < sum(path.stat().st_size for path in tiny_lcm.root.rglob("*") if path.is_file())
