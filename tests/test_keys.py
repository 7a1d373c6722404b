"""API keys: what the file holds of them, who a key belongs to, what it may use, and the command that makes them."""

import json
import stat

import pytest

from fewstep.server.errors import Refused
from fewstep.server.key_commands import command
from fewstep.server.keys import BadKeys, Key, KeyRing, make_key, read_keys, write_keys
from fewstep.server.quota import Bucket, Caller, Callers


def test_a_file_holds_no_key_and_only_its_owner_reads_it(tmp_path):
    file = tmp_path / "keys.json"
    text, key = make_key("alice", rate_per_s=2.5, share=0.5)
    write_keys(file, [key])
    assert text.startswith("fs-") and len(text) > 40
    assert text not in file.read_text() and text[3:] not in file.read_text()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert read_keys(file) == (key,) and key.rate_per_s == 2.5


def test_the_same_key_under_two_salts_gives_two_hashes():
    ring = KeyRing(["same", "same"])
    assert len({key.salt for key in ring.keys}) == len({key.hash for key in ring.keys}) == 2


def test_a_ring_knows_its_keys_and_no_others(tmp_path):
    file = tmp_path / "keys.json"
    made = [make_key(name) for name in ("alice", "bob")]
    write_keys(file, [key for _, key in made])
    ring = KeyRing(["plain"], file)
    assert [ring.find(text).name for text, _ in made] == ["alice", "bob"]
    assert ring.find("plain").name == "key-1"
    assert [ring.find(text) for text in ("", "fs-", made[0][0][:-1], made[0][0] + "x", made[0][1].hash, "\udc80")] == [
        None
    ] * 6
    assert not ring.open and KeyRing().open
    assert not KeyRing([], tmp_path / "none-yet.json").open, "a file that is to come closes the server already"


def test_every_key_is_compared_and_in_constant_time(monkeypatch):
    """No early exit: the comparison that is made does not depend on which key was given."""
    import fewstep.server.keys as module

    compared = []
    real = module.secrets.compare_digest
    monkeypatch.setattr(module.secrets, "compare_digest", lambda a, b: compared.append(b) or real(a, b))
    ring = KeyRing(["a", "b", "c"])
    for given in ("a", "c", "none"):
        compared.clear()
        ring.find(given)
        assert compared == [key.hash for key in ring.keys]


def test_a_running_ring_sees_a_revoked_key_and_survives_a_broken_file(tmp_path, monkeypatch, caplog):
    import fewstep.server.keys as module

    now_s = 0.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now_s)
    file = tmp_path / "keys.json"
    (first, kept), (second, gone) = make_key("kept"), make_key("gone")
    write_keys(file, [kept, gone])
    ring = KeyRing([], file)
    assert ring.find(second) == gone
    write_keys(file, [kept])
    now_s = 2.0
    assert ring.find(second) is None and ring.find(first) == kept
    file.write_text("{ broken")
    now_s = 4.0
    assert ring.find(first) == kept
    assert "cannot be used, the keys stay" in caplog.text


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("{", "cannot be read as a key file"),
        ("[]", 'must hold {"keys": [...]}'),
        ('{"keys": [{"name": "a"}]}', "without name, salt and hash"),
        ('{"keys": [{"name": "a", "salt": "00", "hash": "zz"}]}', "must be hexadecimal"),
        ('{"keys": [{"name": "a", "salt": "", "hash": "", "rate": 1}]}', "no field 'rate'"),
        ('{"keys": [{"name": "a", "salt": "", "hash": "", "share": "all"}]}', "share is 'all', of the wrong kind"),
        ('{"keys": [{"name": "a", "salt": "", "hash": "", "burst": true}]}', "burst is True, of the wrong kind"),
    ],
)
def test_a_bad_file_says_what_is_wrong(tmp_path, content, part):
    file = tmp_path / "keys.json"
    file.write_text(content)
    with pytest.raises(BadKeys) as caught:
        read_keys(file)
    assert part in str(caught.value) and str(file) in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"name": "a b"}, "'a b'"),
        ({"rate_per_s": 0.0}, "rate_per_s of key 'a' is 0.0"),
        ({"rate_per_s": float("nan")}, "is nan"),
        ({"burst": 0}, "burst of key 'a' is 0"),
        ({"share": 1.5}, "share of key 'a' is 1.5"),
    ],
)
def test_a_bad_limit_is_named(settings, part):
    with pytest.raises(BadKeys) as caught:
        Key(**{"name": "a", "salt": "", "hash": "", **settings})
    assert part in str(caught.value)


def test_a_bucket_gives_its_burst_then_its_rate():
    bucket = Bucket(rate_per_s=2.0, burst=3, now_s=0.0)
    assert [bucket.take(0.0) for _ in range(4)] == [0.0, 0.0, 0.0, 0.5]
    assert bucket.take(0.5) == 0.0 and bucket.take(0.5) == pytest.approx(0.5)
    taken = sum(bucket.take(1.0 + k / 100) == 0.0 for k in range(1001))
    assert taken == pytest.approx(2.0 * 10.5, abs=1), "ten seconds at two per second, and half a second before"
    assert [bucket.take(1e6) for _ in range(4)][:3] == [0.0] * 3, "an idle bucket fills to its burst, not above"
    assert bucket.take(1e6) > 0.0


def test_a_clock_that_steps_back_gives_nothing_away():
    bucket = Bucket(rate_per_s=1.0, burst=1, now_s=10.0)
    assert bucket.take(10.0) == 0.0
    assert bucket.take(5.0) == pytest.approx(1.0) and bucket.take(5.5) == pytest.approx(0.5)


def test_a_share_is_held_until_requests_end():
    caller = Caller(Key(name="a", salt="", hash="", share=0.1), 0.0)
    for _ in range(2):
        caller.hold(20)
    with pytest.raises(Refused, match="has 2 requests waiting or running, and may have 2") as caught:
        caller.hold(20)
    assert (caught.value.status, caught.value.headers["Retry-After"]) == (429, "1")
    caller.release()
    caller.hold(20)
    assert caller.held == 2


def test_a_key_keeps_what_it_used_until_its_limits_change(tmp_path, monkeypatch):
    import fewstep.server.keys as module

    now_s = 0.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now_s)
    file = tmp_path / "keys.json"
    text, key = make_key("a", rate_per_s=1.0)
    write_keys(file, [key])
    callers = Callers(KeyRing([], file))
    assert callers.find(text) is callers.find(text) and callers.find("other") is None
    before = callers.find(text)
    write_keys(file, [Key(**{**vars(key), "rate_per_s": 9.0})])
    now_s = 2.0
    assert callers.find(text) is not before and callers.find(text).key.rate_per_s == 9.0


def test_the_command_makes_lists_and_revokes(tmp_path, capsys):
    file = ["--file", str(tmp_path / "folder" / "keys.json")]
    assert command(["add", "alice", "--rate", "5", "--burst", "20", "--share", "0.25", *file]) == 0
    text = capsys.readouterr().out.strip()
    assert command(["add", "root", "--admin", *file]) == 0
    assert KeyRing([], tmp_path / "folder" / "keys.json").find(text).name == "alice"
    capsys.readouterr()
    assert command(["list", "--json", *file]) == 0
    first, second = json.loads(capsys.readouterr().out)["keys"]
    assert (first["name"], first["rate_per_s"], first["burst"], first["share"]) == ("alice", 5.0, 20, 0.25)
    assert second["admin"] is True and "hash" not in second and "salt" not in second
    assert command(["add", "alice", *file]) == 1
    assert "already" in capsys.readouterr().err
    assert command(["revoke", "alice", *file]) == 0 and command(["revoke", "alice", *file]) == 1
    assert command(["list", *file]) == 0
    listed = capsys.readouterr().out
    assert "root" in listed and "alice" not in listed


def test_the_command_reads_the_file_of_the_environment(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FEWSTEP_KEY_FILE", str(tmp_path / "mine.json"))
    assert command(["add", "bob"]) == 0
    assert [key.name for key in read_keys(tmp_path / "mine.json")] == ["bob"]
    assert capsys.readouterr().out.startswith("fs-")
