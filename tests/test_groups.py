"""Several models under one name: students by condition, experts by noise interval."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fewstep.models.paths import VP
from fewstep.models.spec import Guidance
from fewstep.runtime.engines.fake_engine import FakeEngine, fake_bundle, fake_spec
from fewstep.runtime.errors import BundleError, InvalidRequest
from fewstep.runtime.sampling.events import Finished
from fewstep.runtime.sampling.groups import Expert, Group, Student, read_group
from fewstep.runtime.sampling.loop import run_request
from fewstep.runtime.sampling.plan import compile_plan
from fewstep.runtime.sampling.request import GenerateRequest, resolve
from fewstep.runtime.service.local import Runtime, summary

WORDS = Group(name="msd", students=(Student(model="a", words=("cat", "dog")), Student(model="b", words=("red", "sky"))))
PHASED = Group(name="phased", experts=(Expert(model="a", down_to=600.0), Expert(model="b")))


def ask(**settings):
    return GenerateRequest(**{"prompt": "a red cat", **settings})


def serve(groups, names="ab", **settings):
    engines = {name: FakeEngine() for name in names}
    return Runtime([fake_bundle(name) for name in names], engines=engines, groups=groups, **settings), engines


@given(st.lists(st.sampled_from(["cat", "Dog", "red", "sky", "ring", "a"]), max_size=6))
def test_words_decide_and_the_first_of_equals(words):
    prompt = ", ".join(words)
    a = len({word.lower() for word in words} & {"cat", "dog"})
    b = len({word.lower() for word in words} & {"red", "sky"})
    assert WORDS.by_words(prompt) == ("b" if b > a else "a") == WORDS.by_words(prompt)


@given(st.lists(st.floats(-9, 9), min_size=3, max_size=3))
def test_the_nearest_centroid_decides(point):
    centroids = {"a": (1.0, 0.0, 0.0), "b": (-1.0, 0.0, 2.0), "c": (0.0, 3.0, -1.0)}
    group = Group(name="msd", students=tuple(Student(model=n, centroid=c) for n, c in centroids.items()))
    far = {name: np.linalg.norm(np.subtract(point, centre)) for name, centre in centroids.items()}
    assert far[group.nearest(point)] == pytest.approx(min(far.values()))


def test_rows_go_to_the_expert_of_their_time():
    spec = fake_spec()
    plan = compile_plan(resolve(ask(steps=8), spec), spec)
    assigned = PHASED.assign(plan)
    assert [row.model for row in assigned.rows] == [None if row.t >= 600.0 else "b" for row in plan.rows]
    assert [(row.t, row.a, row.b, row.c) for row in assigned.rows] == [(r.t, r.a, r.b, r.c) for r in plan.rows]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, "students or experts"),
        ({"students": WORDS.students, "experts": PHASED.experts}, "not both"),
        ({"students": (Student(model="a", centroid=(1.0,)), Student(model="b", centroid=(1.0, 2.0)))}, "one length"),
        ({"experts": (Expert(model="a", down_to=100.0), Expert(model="b", down_to=200.0))}, "must fall"),
        ({"experts": (Expert(model="a", down_to=100.0),)}, "to 0"),
        ({"students": WORDS.students, "reader": "a"}, "no centroids"),
    ],
)
def test_groups_that_cannot_be_are_refused(fields, said):
    with pytest.raises(BundleError, match=said):
        Group(name="g", **fields)


def test_a_group_is_read_from_json_and_strictly(tmp_path):
    path = tmp_path / "group.json"
    students = [{"model": "a", "words": ["cat", "dog"]}, {"model": "b", "words": ["red", "sky"]}]
    path.write_text(json.dumps({"name": "msd", "students": students}))
    assert read_group(path) == WORDS
    for text, said in (
        ("{", "cannot be read"),
        ('{"name": "g", "student": []}', "'student' is not a field of Group"),
        ('{"name": "g", "experts": [{"model": "a", "upto": 1}]}', "'upto' is not a field of Expert"),
        ('{"name": "g", "experts": [{"model": "a", "down_to": "0"}]}', "must be numbers"),
        ("[]", "is not a group"),
    ):
        path.write_text(text)
        with pytest.raises(BundleError, match=said):
            read_group(path)


def test_a_group_needs_models_that_are_served_and_alike():
    with pytest.raises(BundleError, match="needs the model 'b'; served are a"):
        serve([PHASED], names="a")
    engines = {"a": FakeEngine(), "b": FakeEngine()}
    other = fake_spec(path=VP(beta_end=0.02))
    with pytest.raises(BundleError, match="differ in path"):
        Runtime([fake_bundle("a"), fake_bundle("b", other)], engines=engines, groups=[PHASED])
    with pytest.raises(BundleError, match="has the name of something"):
        serve([Group(name="a", students=WORDS.students)])


def test_students_are_chosen_by_words_and_named_in_the_result():
    runtime, _ = serve([WORDS])
    with runtime:
        assert set(runtime.models) == {"a", "b", "msd"}
        found = {prompt: runtime.generate(ask(prompt=prompt), "msd").model for prompt in ("a dog", "red sky", "ring")}
        assert found == {"a dog": "a", "red sky": "b", "ring": "a"}
        with pytest.raises(InvalidRequest, match="steps is 3"):
            runtime.submit(ask(steps=3), "msd")
        with pytest.raises(BundleError, match="part of the group 'msd'"):
            runtime.unload("b")


def test_students_are_chosen_by_the_embedding_whether_it_is_known_or_not():
    prompts = ["a red cat", "two stars", "sky"]
    with Runtime([fake_bundle("a")], engines={"a": FakeEngine()}) as runtime:
        for prompt in prompts:
            runtime.generate(ask(prompt=prompt))
        cache = runtime._loading.served["a"].prompts.embeddings
        centres = [tuple(summary(cache.peek(prompt))) for prompt in prompts]
    students = tuple(Student(model=name, centroid=centre) for name, centre in zip("abc", centres, strict=True))
    runtime, engines = serve([Group(name="msd", students=students, reader="a")], names="abc")
    with runtime:
        for _ in range(2):
            for prompt, name in zip(prompts, "abc", strict=True):
                ticket = runtime.submit(ask(prompt=prompt, seed=7), "msd")
                events = list(ticket.events())
                assert [type(event) for event in events].count(Finished) == 1 and isinstance(events[-1], Finished)
                alone = run_request(FakeEngine(), fake_bundle(name), ask(prompt=prompt, seed=7))
                assert events[-1].result.model == name
                assert np.array_equal(events[-1].result.pictures[0], alone.pictures[0])
        read = [call for call in engines["a"].calls if call.role == "text"]
        assert len(read) == len(prompts), "a known prompt is routed without the encoder"
        found = runtime.metrics()
    assert (found.accepted, found.finished, found.live) == (6, 6, 0)


def test_a_student_that_cannot_do_it_fails_the_request_once():
    spec = fake_spec(guidance=Guidance(mode="none"))
    students = (Student(model="a", centroid=(9.0,) * 8), Student(model="b", centroid=(0.0,) * 8))
    engines = {"a": FakeEngine(), "b": FakeEngine(spec)}
    group = Group(name="msd", students=students)
    with Runtime([fake_bundle("a"), fake_bundle("b", spec)], engines=engines, groups=[group]) as runtime:
        with pytest.raises(InvalidRequest, match="guidance"):
            runtime.generate(ask(guidance=5.0), "msd")
        assert runtime.generate(ask(), "msd").model == "b"


def test_experts_take_turns_and_equal_ones_are_one_model():
    runtime, engines = serve([PHASED])
    with runtime:
        result = runtime.generate(ask(steps=4, seed=3), "phased")
    alone = run_request(FakeEngine(), fake_bundle("a"), ask(steps=4, seed=3))
    assert result.model == "phased" and np.array_equal(result.pictures[0], alone.pictures[0])
    times = {name: [t for call in e.calls if call.role == "denoiser" for t in call.t] for name, e in engines.items()}
    assert times == {"a": [999.0, 759.0], "b": [499.0, 259.0]}
