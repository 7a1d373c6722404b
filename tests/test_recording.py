"""What an engine was fed, in rows."""

import torch

from fewstep.runtime.engine import DECODER, DENOISER
from fewstep.runtime.engines.fake_engine import FakeEngine
from fewstep.runtime.engines.recording import RecordingEngine


def fed(k, batch=2):
    return {
        "x": torch.full((batch, 4, 2, 2), float(k)),
        "t": torch.arange(batch) + 10.0 * k,
        "ctx": torch.zeros(batch, 3, 8),
        "w": torch.ones(batch),
    }


def test_every_row_is_kept_as_it_was_and_outputs_are_the_engines():
    engine = FakeEngine()
    recorder = RecordingEngine(engine)
    assert (recorder.name, recorder.capabilities) == (engine.name, engine.capabilities)
    feeds = fed(1)
    found, wanted = recorder.run(DENOISER, feeds), engine.run(DENOISER, fed(1))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    feeds["t"].zero_()
    assert [float(row["t"]) for row in recorder.rows[DENOISER]] == [10.0, 11.0]
    assert all(value.shape[0] == 1 for row in recorder.rows[DENOISER] for value in row.values())


def test_the_last_ones_where_not_all_are_wanted():
    recorder = RecordingEngine(FakeEngine(), keep=1)
    for k in (1, 2):
        recorder.run(DENOISER, fed(k))
        (picture,) = recorder.run(DECODER, {"latent": torch.full((2, 4, 2, 2), float(k))})
    assert [float(row["t"]) for row in recorder.rows[DENOISER]] == [21.0]
    assert len(recorder.pictures) == 1 and torch.equal(recorder.pictures[0], picture[1:])
