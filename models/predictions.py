"""What a network's raw output F means, as coefficients: every estimate is affine in (x_t, F).

`x0 = x0_x * x + x0_f * F` and `eps = eps_x * x + eps_f * F`. Nothing beyond this file asks for a prediction type.

| prediction | F is | paths | x0 | eps |
| --- | --- | --- | --- | --- |
| eps | the noise | all | (x - sigma F) / alpha | F |
| x0 | the clean sample | all | F | (x - alpha F) / sigma |
| v | alpha eps - sigma x0 (Salimans & Ho 2022) | alpha^2 + sigma^2 = 1 | alpha x - sigma F | sigma x + alpha F |
| flow | eps - x0 | alpha + sigma = 1 | x - sigma F | x + alpha F |
| trig | dx/dt, with sigma_data inside F | TrigFlow | cos t x - sin t F | (sin t x + cos t F) / sigma_data |
"""

from dataclasses import dataclass
from typing import Any

from .errors import SpecError
from .paths import Path, TrigFlow

PREDICTIONS = ("eps", "v", "x0", "flow", "trig")


@dataclass(frozen=True)
class Affine:
    """Coefficients of the clean estimate and of the noise estimate; floats, or tensors shaped as the time was."""

    x0_x: Any
    x0_f: Any
    eps_x: Any
    eps_f: Any


def check_prediction(prediction: str, path: Path) -> None:
    """Errors: `SpecError` where the prediction is unknown or is not defined on the path."""
    if prediction not in PREDICTIONS:
        raise SpecError(f"prediction is {prediction!r}; use one of {', '.join(PREDICTIONS)}")
    allowed = {"v": ("vp",), "flow": ("flow",), "trig": ("trig",)}.get(prediction)
    if allowed and path.kind not in allowed:
        raise SpecError(f"prediction {prediction!r} is defined on the {allowed[0]!r} path, not on {path.kind!r}")


def estimates(prediction: str, path: Path, t: Any) -> Affine:
    """Coefficients at time t (float, or tensor of any shape, in the path's native time; float64)."""
    check_prediction(prediction, path)
    alpha, sigma = path.alpha(t), path.sigma(t)
    zero = alpha * 0.0
    if prediction == "eps":
        return Affine(1.0 / alpha, -sigma / alpha, zero, zero + 1.0)
    if prediction == "x0":
        return Affine(zero, zero + 1.0, 1.0 / sigma, -alpha / sigma)
    if prediction == "v":
        return Affine(alpha, -sigma, sigma, alpha)
    if prediction == "flow":
        return Affine(zero + 1.0, -sigma, zero + 1.0, alpha)
    assert isinstance(path, TrigFlow)
    sine = sigma / path.sigma_data
    return Affine(alpha, -sine, sine / path.sigma_data, alpha / path.sigma_data)


def target(prediction: str, path: Path, t: Any, x0: Any, eps: Any) -> Any:
    """What F should be for one pair (x0, eps); the coefficients must already broadcast against x0."""
    check_prediction(prediction, path)
    if prediction == "eps":
        return eps
    if prediction == "x0":
        return x0
    alpha, sigma = path.alpha(t), path.sigma(t)
    if prediction == "v":
        return alpha * eps - sigma * x0
    if prediction == "flow":
        return eps - x0
    return path.dalpha(t) * x0 + path.dsigma(t) * eps
