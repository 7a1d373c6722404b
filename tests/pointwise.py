"""Data whose every latent pixel is drawn alone from one mixture on the line, and engines that know its score."""

import torch

from fewstep.models.paths import VP
from fewstep.models.predictions import target
from fewstep.models.spec import Guidance
from fewstep.runtime.engine import DENOISER
from fewstep.runtime.engines.fake_engine import FakeEngine, fake_bundle, fake_spec
from fewstep.runtime.sampling.loop import run_request
from fewstep.runtime.sampling.served import Served
from fewstep.runtime.sampling.text import Prompts

MEANS, STD = (-1.0, 1.0), 0.15
PATH = VP()
CFG = Guidance(mode="cfg", default=1.0, range=(1.0, 9.0))


def clean(x, alpha, sigma, means=MEANS, std=STD):
    """E[x0 | x] of every pixel of x = alpha x0 + sigma eps."""
    spread = alpha**2 * std**2 + sigma**2
    apart = torch.stack([x - alpha * mean for mean in means])
    share = torch.softmax(-(apart**2) / (2 * spread), dim=0)
    parts = torch.stack([mean + alpha * std**2 / spread * a for mean, a in zip(means, apart, strict=True)])
    return (share * parts).sum(dim=0)


def draws(count, means=MEANS, std=STD, seed=0):
    draw = torch.Generator().manual_seed(seed)
    which = torch.randint(len(means), (count,), generator=draw)
    return torch.tensor(means)[which] + std * torch.randn(count, generator=draw)


class Knows(FakeEngine):
    """A fake whose denoiser's output is `answer(x, t, alpha, sigma) -> (x0, eps)` as the spec's prediction."""

    def __init__(self, spec, answer, **settings):
        super().__init__(spec, **settings)
        self.answer = answer

    def _answer(self, role, feeds):
        if role != DENOISER:
            return super()._answer(role, feeds)
        rows = []
        for x, t in zip(feeds["x"].double(), feeds["t"].tolist(), strict=True):
            alpha, sigma = PATH.alpha(t), PATH.sigma(t)
            x0, eps = self.answer(x, t, alpha, sigma)
            rows.append(target(self.spec.prediction, PATH, t, x0, eps).float())
        return (torch.stack(rows),)


def exact(means=MEANS, std=STD):
    def answer(x, t, alpha, sigma):
        x0 = clean(x, alpha, sigma, means, std)
        return x0, (x - alpha * x0) / sigma

    return answer


def spec_of(sampler, **changes):
    plain = {"prediction": "eps", "path": PATH, "boundary": None, "stochastic": sampler == "lcm", "guidance": CFG}
    return fake_spec(**{**plain, "sampler": sampler, **changes})


def served(name, spec, engine):
    return Served(name, spec, engine, Prompts(fake_bundle(name, spec), 4))


def latents(spec, engine, request, models=None):
    """The final latents of a request's pictures by the dull loop, [n, C, h, w], and every latent on the way."""
    seen = {}
    run_request(
        engine, fake_bundle("own", spec), request, models=models, watch=lambda p, k, x: seen.__setitem__((p, k), x)
    )
    last = max(k for _, k in seen)
    return torch.stack([seen[p, last] for p in range(request.n)]), seen


def apart(a, b):
    """Wasserstein distance of two samples of one size on the line."""
    return (a.flatten().sort().values - b.flatten().sort().values).abs().mean().item()
