"""Native jobs: begun, looked up, followed, cancelled; the same key again gives the same result."""

import asyncio
import json
import threading

import httpx
import pytest
from live import Live, fake_server, until

from fewstep.runtime.engines.fake_engine import Fault
from fewstep.server import jobs as job_module
from fewstep.server.errors import Refused
from fewstep.server.jobs import Entry, Jobs, Told
from fewstep.server.settings import Settings


@pytest.fixture(scope="module")
def live():
    with fake_server() as server:
        yield server


def begin(live: Live, key: str | None = None, **body: object) -> httpx.Response:
    headers = {} if key is None else {"Idempotency-Key": key}
    return live.http.post("/v1/jobs", json={"prompt": "a red circle", **body}, headers=headers)


def look_up(live: Live, job_id: str) -> dict:
    return live.http.get(f"/v1/jobs/{job_id}").json()


def ended(live: Live, job_id: str) -> dict:
    until(lambda: look_up(live, job_id)["status"] not in ("queued", "running"))
    return look_up(live, job_id)


def frames(text: str) -> list[tuple[str, int, dict]]:
    found = []
    for frame in text.split("\n\n")[:-1]:
        name, number, data = frame.split("\n")
        found.append((name.removeprefix("event: "), int(number.removeprefix("id: ")), json.loads(data[6:])))
    return found


def test_a_job_is_begun_followed_and_looked_up(live: Live):
    reply = begin(live, steps=4, seed=7)
    card = reply.json()
    assert (reply.status_code, card["status"], card["model"]) == (202, "queued", "fake")
    assert reply.headers["location"] == f"/v1/jobs/{card['id']}"
    seen = frames(live.http.get(f"/v1/jobs/{card['id']}/events").text)
    assert [name for name, _, _ in seen] == ["progress"] * 4 + ["finished"]
    assert [number for _, number, _ in seen] == [0, 1, 2, 3, 4]
    done = ended(live, card["id"])
    assert done["status"] == "finished" and done["result"] == seen[-1][2]
    plain = live.generate(steps=4, seed=7).json()
    assert done["result"]["pictures"] == plain["pictures"]


def test_a_reader_who_was_cut_off_goes_on_where_it_stopped(live: Live):
    job_id = begin(live, steps=4).json()["id"]
    ended(live, job_id)
    for after, numbers in (("1", [2, 3, 4]), ("4", []), ("99", []), ("junk", [0, 1, 2, 3, 4])):
        reply = live.http.get(f"/v1/jobs/{job_id}/events", headers={"Last-Event-ID": after})
        assert [number for _, number, _ in frames(reply.text)] == numbers


def test_an_event_id_longer_than_any_is_refused(live: Live):
    job_id = begin(live, steps=1).json()["id"]
    for digits in (19, 5000):
        reply = live.http.get(f"/v1/jobs/{job_id}/events", headers={"Last-Event-ID": "9" * digits})
        error = reply.json()["error"]
        assert (reply.status_code, error["param"]) == (400, "Last-Event-ID") and f"{digits} digits" in error["message"]
    assert live.http.get(f"/v1/jobs/{job_id}/events", headers={"Last-Event-ID": "9" * 18}).status_code == 200


def test_a_job_goes_on_when_its_readers_leave_and_ends_when_cancelled():
    with fake_server(delay_s=0.05) as live:
        job_id = begin(live, steps=8).json()["id"]
        with live.http.stream("GET", f"/v1/jobs/{job_id}/events") as reply:
            next(reply.iter_lines())
        running = look_up(live, job_id)
        assert running["status"] == "running" and running["progress"]["steps"] == 8
        assert live.http.delete(f"/v1/jobs/{job_id}").json()["status"] == "cancelled"
        gone = look_up(live, job_id)
        assert gone["error"]["code"] == "cancelled" and "result" not in gone
        assert sum(call.role == "denoiser" for call in live.engine.calls) < 9
        kept = ended(live, begin(live, steps=8).json()["id"])
        assert kept["status"] == "finished"


def test_an_ended_job_that_is_deleted_is_forgotten(live: Live):
    job_id = begin(live, steps=1).json()["id"]
    ended(live, job_id)
    assert live.http.delete(f"/v1/jobs/{job_id}").json()["status"] == "finished"
    for reply in (live.http.get(f"/v1/jobs/{job_id}"), live.http.delete(f"/v1/jobs/{job_id}")):
        assert (reply.status_code, reply.json()["error"]["code"]) == (404, "job_not_found")


def test_a_failed_job_says_why():
    with fake_server(faults={("decoder", k): Fault("fail") for k in range(2, 99)}) as live:
        while live.generate(steps=1).status_code == 200:
            pass
        failed = ended(live, begin(live, "key", steps=1).json()["id"])
        assert failed["status"] == "failed" and failed["error"]["code"] == "engine_failed"


def test_the_same_key_again_gives_the_same_result(live: Live):
    headers = {"Idempotency-Key": "same"}
    body = {"prompt": "no seed, so each call would differ", "steps": 4}
    first, again = (live.http.post("/v1/generate", json=body, headers=headers) for _ in range(2))
    assert first.status_code == 200 and first.json() == again.json()
    assert "idempotency-replayed" not in first.headers and again.headers["idempotency-replayed"] == "true"
    streamed = live.http.post("/v1/generate", json=body, headers={**headers, "Accept": "text/event-stream"})
    assert frames(streamed.text)[-1][2] == first.json()
    assert live.http.post("/v1/jobs", json=body, headers=headers).json()["result"] == first.json()
    assert live.http.post("/v1/generate", json=body).json()["seeds"] != first.json()["seeds"]


def test_another_body_under_the_same_key_is_refused(live: Live):
    begin(live, "once", steps=1)
    reply = begin(live, "once", steps=2)
    error = reply.json()["error"]
    assert (reply.status_code, error["code"], error["param"]) == (422, "idempotency_key_reused", "Idempotency-Key")
    assert "new key" in error["message"] and reply.headers["x-should-retry"] == "false"


def test_calls_at_once_under_one_key_are_one_job():
    with fake_server(delay_s=0.05) as live:
        replies: list[httpx.Response] = []
        threads = [threading.Thread(target=lambda: replies.append(begin(live, "one", steps=4))) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len({reply.json()["id"] for reply in replies}) == 1
        done = ended(live, replies[0].json()["id"])
        assert done["status"] == "finished" and live.runtime.metrics().accepted == 2  # one was the warm-up


def test_a_call_with_a_key_goes_on_when_its_caller_leaves():
    with fake_server(delay_s=0.1) as live, httpx.Client(base_url=live.url, headers={"Idempotency-Key": "k"}) as http:
        body = {"prompt": "a", "steps": 4}
        with pytest.raises(httpx.ReadTimeout):
            http.post("/v1/generate", json=body, timeout=0.2)
        assert http.post("/v1/generate", json=body, timeout=20).headers["idempotency-replayed"] == "true"
        assert live.runtime.metrics().failed == {}


def test_a_failed_call_may_be_made_again_under_its_key():
    with fake_server(faults={("decoder", 3): Fault("fail")}) as live:
        statuses = [live.http.post("/v1/generate", json={"prompt": "a"}, headers={"Idempotency-Key": "k"}).status_code]
        while 500 not in statuses:
            key = {"Idempotency-Key": f"k{len(statuses)}"}
            statuses.append(live.http.post("/v1/generate", json={"prompt": "a"}, headers=key).status_code)
        again = live.http.post("/v1/generate", json={"prompt": "a"}, headers=key)
        assert again.status_code == 200 and "idempotency-replayed" not in again.headers


def test_jobs_and_keys_belong_to_their_caller():
    with fake_server(Settings(api_keys=("one", "two"))) as live:
        one, two = (
            httpx.Client(base_url=live.url, headers={"Authorization": f"Bearer {key}"}) for key in ("one", "two")
        )
        with one, two:
            body, key = {"prompt": "a", "steps": 1}, {"Idempotency-Key": "k"}
            mine = one.post("/v1/jobs", json=body, headers=key).json()["id"]
            assert two.get(f"/v1/jobs/{mine}").status_code == two.delete(f"/v1/jobs/{mine}").status_code == 404
            assert two.post("/v1/jobs", json=body, headers=key).json()["id"] != mine
            assert one.get(f"/v1/jobs/{mine}").status_code == 200


def test_a_bad_job_is_refused_at_once(live: Live):
    reply = begin(live, steps=3)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "steps")
    assert begin(live, "x" * 256).status_code == 400


async def told(*events: Told):
    for event in events:
        yield event


async def previewed_job() -> dict[str, object]:
    def step(picture: int, step: int, **said: object) -> Told:
        return Told("progress", {"picture": picture, "step": step, **said})

    entry = Entry("1", "me", "m", 0)
    for number in range(1, 5):
        for picture in (0, 1):
            await entry.add(step(picture, number, preview_b64="x" * 1000))
        await entry.add(step(0, number))
    found: dict[str, object] = {"running": entry.size, "events": len(entry.events)}
    await entry.add(Told("finished", {"pictures": [{"b64": "x" * 3000}]}))
    told = [told async for _, told in entry.follow()]
    found["shown"] = [(told.data["picture"], told.data["step"]) for told in told if "preview_b64" in told.data]
    found["size"], found["kept"] = entry.size, sum(told.bytes for told in told)
    return found


def test_of_previews_a_job_keeps_the_last_of_each_picture():
    assert asyncio.run(previewed_job()) == {
        "running": 2000,
        "events": 12,
        "shown": [(0, 4), (1, 4)],
        "size": 5000,
        "kept": 5000,
    }


def test_a_reader_who_follows_sees_every_preview():
    async def follow() -> list[str]:
        entry, seen = Entry("1", "me", "m", 0), []

        async def read() -> None:
            async for _, told in entry.follow():
                seen.append(told.data.get("preview_b64", ""))

        reading = asyncio.create_task(read())
        for number in range(3):
            await asyncio.sleep(0)
            await entry.add(Told("progress", {"picture": 0, "step": number, "preview_b64": f"p{number}"}))
            await asyncio.sleep(0.01)
        await entry.add(Told("failed", {"error": {"code": "cancelled"}}))
        await reading
        return seen

    assert asyncio.run(follow()) == ["p0", "p1", "p2", ""]


async def large_jobs(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[bool]]:
    now_s = [100.0]
    monkeypatch.setattr(job_module.time, "monotonic", lambda: now_s[0])
    jobs, found = Jobs(max_bytes=10_000, keep_s=3600.0), {}

    async def end(name: str, size: int) -> None:
        entry = Entry(name, "me", "m", 0, ("me", name), "d")
        jobs.start(entry, told(Told("finished", {"pictures": [{"b64": "x" * size}]})))
        await entry.outcome()
        await asyncio.sleep(0)

    await end("small", 1000)
    await end("large", 20_000)
    now_s[0] += job_module.NEWEST_S - 1.0
    found["at first"] = [_there(jobs, "small"), _there(jobs, "large")]
    now_s[0] += 2.0
    found["then"] = [_there(jobs, "large")]
    await end("larger", 30_000)
    await end("after", 1000)
    found["once another ended"] = [_there(jobs, "larger"), _there(jobs, "after")]
    found["keys"] = [jobs.replay(("me", name), "d") is not None for name in ("small", "large", "larger", "after")]
    return found


def test_the_job_that_ended_last_can_be_fetched_though_it_is_too_large_to_keep(monkeypatch: pytest.MonkeyPatch):
    assert asyncio.run(large_jobs(monkeypatch)) == {
        "at first": [False, True],
        "then": [False],
        "once another ended": [False, True],
        "keys": [False, False, False, True],
    }


async def run_jobs() -> dict[str, object]:
    jobs = Jobs(max_bytes=10_000, keep_s=60.0)
    entries = [Entry(str(n), "me", "m", 0, ("me", f"k{n}"), "d") for n in range(4)]
    for entry in entries:
        jobs.start(entry, told(Told("finished", {"pictures": [{"b64": "x" * 3000}]})))
        await entry.outcome()
        await asyncio.sleep(0)
    found = {"kept": [n for n in range(4) if _there(jobs, str(n))], "size": entries[3].size}
    found["keys"] = [n for n in range(4) if jobs.replay(("me", f"k{n}"), "d") is not None]
    endless = Entry("5", "me", "m", 0)
    jobs.start(endless, _forever())
    await asyncio.sleep(0.01)
    found["running"] = endless.status()["status"]
    await jobs.close()
    return found


async def _forever():
    yield Told("progress", {"step": 1})
    await asyncio.Event().wait()


def _there(jobs: Jobs, job_id: str) -> bool:
    try:
        return jobs.find(job_id, "me").ended
    except Refused:
        return False


def test_ended_jobs_are_kept_within_their_bytes():
    assert asyncio.run(run_jobs()) == {"kept": [2, 3], "size": 3000 + 1024, "keys": [2, 3], "running": "running"}
