"""Flat networks against diffusers' own calls on the same modules."""

import pytest
import torch
from diffusers import LatentConsistencyModelPipeline

from fewstep.models.networks import as_network, guidance_embedding


@pytest.fixture(scope="module")
def feeds():
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    return {
        "x": draw(3, 4, 16, 16),
        "t": torch.tensor([999.0, 500.0, 19.0]),
        "ctx": draw(3, 24, 32),
        "edge": draw(3, 3, 32, 32).sigmoid(),
    }


def test_denoiser_is_the_unet(tiny_teacher, feeds):
    net = tiny_teacher.denoiser_net()
    assert not net.takes_w
    with torch.no_grad():
        theirs = net.unet(feeds["x"], feeds["t"], feeds["ctx"]).sample
        assert torch.equal(net(feeds["x"], feeds["t"], feeds["ctx"]), theirs)
        one = net(feeds["x"][1:2], feeds["t"][1:2], feeds["ctx"][1:2])
    torch.testing.assert_close(one, theirs[1:2], rtol=1e-4, atol=1e-5)


def test_guidance_scale_reaches_the_unet(tiny_lcm, feeds):
    net = tiny_lcm.denoiser_net()
    w = torch.tensor([1.0, 3.0, 8.0])
    with torch.no_grad():
        embedded = LatentConsistencyModelPipeline.get_guidance_scale_embedding(None, w - 1, embedding_dim=32)
        theirs = net.unet(feeds["x"], feeds["t"], feeds["ctx"], timestep_cond=embedded).sample
        ours = net(feeds["x"], feeds["t"], feeds["ctx"], w)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        assert not torch.equal(ours, net(feeds["x"], feeds["t"], feeds["ctx"], w + 1))
    with pytest.raises(ValueError, match="pass w"):
        net(feeds["x"], feeds["t"], feeds["ctx"])


@pytest.mark.parametrize("dim", [32, 256, 512])
def test_guidance_embedding_is_diffusers(dim):
    w = torch.tensor([1.0, 1.5, 4.0, 8.5])
    theirs = LatentConsistencyModelPipeline.get_guidance_scale_embedding(None, w - 1, embedding_dim=dim)
    torch.testing.assert_close(guidance_embedding(w, dim), theirs, rtol=0, atol=1e-6)
    ours = guidance_embedding(torch.tensor([1.0]), dim)
    assert torch.equal(ours, torch.cat([torch.zeros(1, dim // 2), torch.ones(1, dim // 2)], dim=1))


def test_control_residuals(tiny_teacher, feeds):
    net, control = tiny_teacher.denoiser_net(), tiny_teacher.controlnet()
    scale = torch.tensor([0.0, 0.5, 1.0])
    with torch.no_grad():
        ours = control(feeds["x"], feeds["t"], feeds["ctx"], feeds["edge"], scale)
        down, mid = control.controlnet(feeds["x"], feeds["t"], feeds["ctx"], feeds["edge"], return_dict=False)
        for mine, theirs in zip(ours, (*down, mid), strict=True):
            torch.testing.assert_close(mine, theirs * scale.reshape(-1, 1, 1, 1))
        steered = net.steered()(feeds["x"], feeds["t"], feeds["ctx"], *ours)
        plain = net(feeds["x"], feeds["t"], feeds["ctx"])
    torch.testing.assert_close(steered[0], plain[0], rtol=1e-4, atol=1e-5)
    assert (steered[2] - plain[2]).abs().max() > 1e-3, "an edge map must be felt"


def test_as_network_reads_the_condition(tiny_teacher, feeds):
    net, control = tiny_teacher.denoiser_net(), tiny_teacher.controlnet()
    run = as_network(net, control)
    cond = {"ctx": feeds["ctx"], "edge": feeds["edge"], "control_scale": torch.tensor([0.0, 0.5, 1.0])}
    with torch.no_grad():
        direct = net.steered()(
            feeds["x"], feeds["t"], feeds["ctx"],
            *control(feeds["x"], feeds["t"], feeds["ctx"], feeds["edge"], cond["control_scale"]),
        )  # fmt: skip
        assert torch.equal(run(feeds["x"], feeds["t"].double(), cond), direct)
        full = run(feeds["x"], feeds["t"], {"ctx": feeds["ctx"], "edge": feeds["edge"]})
        ones = run(feeds["x"], feeds["t"], {**cond, "control_scale": torch.ones(3)})
        assert torch.equal(full, ones)
        assert torch.equal(
            run(feeds["x"], feeds["t"], {"ctx": feeds["ctx"]}), net(feeds["x"], feeds["t"], feeds["ctx"])
        )


def test_pictures_and_latents(tiny_teacher):
    encoder, decoder = tiny_teacher.encoder(), tiny_teacher.decoder()
    picture = torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        latent = encoder(picture)
        assert latent.shape == (2, 4, 16, 16)
        scale = tiny_teacher.spec.latent.scale
        torch.testing.assert_close(latent, encoder.vae.encode(picture).latents * scale)
        torch.testing.assert_close(decoder(latent), decoder.vae.decode(latent / scale).sample)


def test_text_encoder_gives_the_last_hidden_state(tiny_teacher):
    net = tiny_teacher.text_encoder()
    ids = torch.tensor([[54, 3, 4, 55] + [55] * 20])
    with torch.no_grad():
        assert torch.equal(net(ids), net.text_encoder(ids).last_hidden_state)
