"""Torch's faster ways: made before the first request, never during one, and equal to torch within their precision."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from fewstep.export.graphs import random_feeds
from fewstep.export.parity import relative_error
from fewstep.runtime.engines import compiled_engine
from fewstep.runtime.engines.compiled_engine import VARIANTS, Buckets, Rounded, capture_for, cpp_compiler, open_variant
from fewstep.runtime.engines.registry import KINDS, open_engine
from fewstep.runtime.engines.torch_engine import TorchEngine
from fewstep.runtime.errors import EngineUnavailable


@pytest.fixture(scope="module")
def reference(tiny_lcm):
    return TorchEngine(tiny_lcm)


def feeds_of(bundle, role, batch):
    return random_feeds(bundle, role, batch=batch, size=(32, 32), seed=batch)


def test_every_variant_is_a_kind_of_engine():
    assert set(VARIANTS) <= set(KINDS)
    assert all(KINDS[kind].cuda == variant.captured for kind, variant in VARIANTS.items())


def test_buckets_prepare_only_when_told_and_fall_back_to_the_network():
    made = []

    def make(network, feeds):
        made.append(feeds[0].shape)
        return lambda *given: ("fast", given[0].shape)

    bucket = Buckets(lambda *given: ("slow", given[0].shape), make)
    assert bucket(torch.zeros(2, 3))[0] == "slow" and made == []
    bucket.preparing = True
    assert bucket(torch.zeros(2, 3), None)[0] == "fast" and bucket(torch.zeros(2, 3), None)[0] == "fast"
    bucket.preparing = False
    assert bucket(torch.zeros(2, 3), None)[0] == "fast"
    for other in ((torch.zeros(3, 3), None), (torch.zeros(2, 3).double(), None), (torch.zeros(2, 3), torch.zeros(1))):
        assert bucket(*other)[0] == "slow"
    assert made == [(2, 3)]


@torch.inference_mode()
def test_buckets_give_whole_tensors_made_under_inference_mode():
    with torch.inference_mode(mode=False):
        strided = torch.arange(6.0).reshape(2, 3).T
    seen = []
    Buckets(seen.append, None)(strided)
    assert seen[0].is_contiguous() and seen[0].is_inference() and torch.equal(seen[0], strided)


def test_bfloat16_ends_at_the_borders_and_spares_the_times():
    seen = {}

    class Network(torch.nn.Module):
        inputs, outputs = ("x", "t", "size_ids", "mask"), ("f", "g")

        def forward(self, x, t, size_ids, mask):
            seen.update(x=x.dtype, t=t.dtype, size_ids=size_ids.dtype, mask=mask.dtype)
            return x, size_ids

    out = Rounded(Network())(
        torch.ones(1, 2), torch.tensor([999.0]), torch.ones(1, 2), torch.ones(1, dtype=torch.int64)
    )
    assert seen == {"x": torch.bfloat16, "t": torch.float32, "size_ids": torch.float32, "mask": torch.int64}
    assert [part.dtype for part in out] == [torch.float32, torch.float32]


def test_bfloat16_engine_is_near_torch_at_any_batch(tiny_lcm, reference):
    engine = open_engine(tiny_lcm, "torch-bf16")
    assert engine.name == "torch-bf16" and engine.capabilities.batch_sizes == ()
    for role in ("denoiser", "denoiser+control", "controlnet", "decoder", "encoder", "text"):
        feeds = feeds_of(tiny_lcm, role, 3)
        pairs = zip(engine.run(role, feeds), reference.run(role, feeds), strict=True)
        errors = [relative_error(a, b) for a, b in pairs]
        assert max(errors) == 0.0 if role == "text" else 1e-5 < max(errors) < 5e-2


def test_everything_is_prepared_when_the_engine_is_opened(tiny_lcm, monkeypatch):
    made = []

    def compile_for(network, feeds, inductor):
        made.append((tuple(feeds[0].shape), dict(inductor)))
        return network

    monkeypatch.setattr(compiled_engine, "compile_for", compile_for)
    monkeypatch.setattr(compiled_engine, "cpp_compiler", lambda: "g++")
    engine = open_variant(tiny_lcm, kind="torch-compile", batch_sizes=(3, 1), inductor={"freezing": True}, device="cpu")
    assert engine.capabilities.batch_sizes == (1, 3) and engine.capabilities.max_batch == 3
    shapes = [(1, 4, 16, 16), (3, 4, 16, 16)]
    assert [shape for shape, _ in made] == shapes + shapes, "denoiser and decoder, each in both sizes"
    assert all(settings == {"freezing": True} for _, settings in made)
    engine.run("denoiser", feeds_of(tiny_lcm, "denoiser", 3))
    engine.run("decoder", feeds_of(tiny_lcm, "decoder", 2))
    assert len(made) == 4, "a request prepares nothing"


def test_a_network_that_cannot_be_prepared_names_the_way_out(tiny_lcm, monkeypatch):
    def compile_for(network, feeds, inductor):
        raise RuntimeError("no such operator")

    monkeypatch.setattr(compiled_engine, "compile_for", compile_for)
    monkeypatch.setattr(compiled_engine, "cpp_compiler", lambda: "g++")
    with pytest.raises(EngineUnavailable, match=r"torch-compile cannot be prepared .*no such operator.*'torch'"):
        open_variant(tiny_lcm, kind="torch-compile", device="cpu")


def test_what_is_missing_or_has_no_use_is_refused(tiny_lcm, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(EngineUnavailable, match="'cuda' and torch sees no CUDA"):
        open_engine(tiny_lcm, "torch-cudagraphs")
    with pytest.raises(EngineUnavailable, match="device is 'cpu'; the engine 'torch-cudagraphs' captures"):
        open_variant(tiny_lcm, kind="torch-cudagraphs", device="cpu")
    for name, kind in (("inductor", "torch-cudagraphs"), ("batch_sizes", "torch-bf16"), ("roles", "torch-bf16")):
        with pytest.raises(EngineUnavailable, match=f"{name} was given; the engine '{kind}' has no use"):
            open_variant(tiny_lcm, kind=kind, device="cuda", **{name: ()})
    monkeypatch.setattr(compiled_engine, "which", lambda name: None)
    with pytest.raises(EngineUnavailable, match=r"neither \$CXX, g\+\+ nor clang\+\+"):
        open_engine(tiny_lcm, "torch-compile")


def fake_cuda(log):
    @contextmanager
    def stream(side):
        log.append("side stream")
        yield
        log.append("main stream")

    @contextmanager
    def graph(made, pool=None):
        log.append(f"capture in {pool}")
        yield
        log.append("captured")

    waits = SimpleNamespace(wait_stream=lambda other: log.append("wait"))
    return SimpleNamespace(
        Stream=lambda: waits, current_stream=lambda: waits, stream=stream, graph=graph,
        CUDAGraph=lambda: SimpleNamespace(replay=lambda: log.append("replay")),
    )  # fmt: skip


def test_capture_warms_up_aside_and_replays_on_copies():
    log, seen = [], []

    def network(x, missing):
        log.append("network")
        seen.append(x)
        return (x,)

    first = torch.zeros(2)
    run = capture_for(network, (first, None), cuda=fake_cuda(log), pool="pool")
    side = ["wait", "side stream", "network", "network", "network", "main stream", "wait"]
    assert log == [*side, "capture in pool", "network", "captured"]
    (out,) = run(torch.ones(2), None)
    assert log[-1] == "replay" and log.count("network") == 4, "a call replays, it runs nothing anew"
    assert torch.equal(out, torch.ones(2)) and out is seen[-1], "the feed was copied to where the graph reads"
    assert torch.equal(first, torch.zeros(2)), "and the example was left alone"


@pytest.mark.skipif(cpp_compiler() is None, reason="torch compiles with a C++ compiler, and none is here")
def test_a_compiled_decoder_equals_torch_and_is_not_compiled_again(tiny_lcm, reference):
    from torch._dynamo.utils import counters

    engine = open_variant(tiny_lcm, kind="torch-compile", batch_sizes=(2,), roles=("decoder",), device="cpu")
    compiled = dict(counters["stats"])
    assert compiled["unique_graphs"] >= 1
    for feeds in (feeds_of(tiny_lcm, "decoder", 2), feeds_of(tiny_lcm, "decoder", 3)):
        found, wanted = engine.run("decoder", feeds)[0], reference.run("decoder", feeds)[0]
        assert relative_error(found, wanted) < 1e-5
    assert dict(counters["stats"]) == compiled


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", ["torch-cudagraphs", "torch-cudagraphs-bf16"])
def test_captured_networks_equal_torch_on_the_device(tiny_lcm, kind):
    engine, wanted = open_engine(tiny_lcm, kind, batch_sizes=(1, 2)), TorchEngine(tiny_lcm, device="cuda")
    for role in ("denoiser", "controlnet", "denoiser+control", "decoder"):
        for batch in (2, 1, 2):
            feeds = {name: feed.cuda() for name, feed in feeds_of(tiny_lcm, role, batch).items()}
            pairs = zip(engine.run(role, feeds), wanted.run(role, feeds), strict=True)
            assert max(relative_error(a, b) for a, b in pairs) < (5e-2 if kind.endswith("bf16") else 1e-4)
