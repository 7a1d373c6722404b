"""Planted faults in score distillation and in laws within an interval (`test_oracle_mutants` plants them)."""

from mutants import Mutant

from fewstep.models.denoiser import Denoiser
from fewstep.trainers.distribution import anchor, score_gap, subinterval
from fewstep.trainers.distribution.backtrack import Snapshot, Trail
from fewstep.trainers.distribution.only import Only
from fewstep.trainers.parts import rollout
from fewstep.trainers.parts.divergences import Divergence
from fewstep.trainers.parts.segments import RandomWalk, Segments
from fewstep.trainers.parts.transitions import noised


def normalised(original):
    """DMD's normaliser where the method has none."""
    return lambda real, fake, made, t, noise, cond, floor=1e-6: original(real, fake, made, t, noise, cond, 1e-6)


def floorless(original):
    return lambda real, fake, made, t, noise, cond, floor=1e-6: original(real, fake, made, t, noise, cond, None)


def unnormed(original):
    """h as it is, whatever its size."""

    def weights(self, logits, path, t):
        return 2.0 * original(self, logits, path, t)

    return weights


def from_clean(original):
    """A landing's noise as if the clean estimate were noised."""
    return lambda self, path, t, noise: noised(path, self.x0, t, noise)


def next_landing(original):
    """Landings one segment too early."""

    def ends(self, path):
        table = original(self, path)
        return [(t, table[max(0, k - 1)][1]) for k, (t, _) in enumerate(table)]

    return ends


def clean_aim(original):
    """The sample itself, which is not unbiased for the law of its landing."""
    return lambda path, made, t, noise: made.x_s


def noisy_jump(original):
    def jump(self, x, t, s, cond):
        return original(self, x, t, s, cond).roll(1, 0)

    return jump


def rising(original):
    """Times of a walk in rising order."""

    def exit(self, path, turn):
        walked, other = original(self, path, turn)
        return (walked[0], *sorted(walked[1:])), other

    return exit


def other_pairs(original):
    return lambda batch: original(batch).roll(1, 0)


ONE_STEP = ("diff-instruct", "vsd", "swiftbrush", "snoopi")
SCORE_MUTANTS: dict[str, Mutant] = {
    "gap: normalised where it should not be": Mutant(score_gap, "dmd_gradient", normalised, ONE_STEP),
    "gap: no normaliser": Mutant(score_gap, "dmd_gradient", floorless, ("dmd", "decoupled-dmd", "cdm", "tdm")),
    "gap: guidance left out": Mutant(
        score_gap, "guided", lambda g: lambda teacher, uncond, w: teacher, ("swiftbrush", "snoopi", "dmd", "phased-dmd")
    ),
    "gap: sign flipped": Mutant(score_gap, "carry", lambda g: lambda x, grad: g(x, -grad), (*ONE_STEP, "tdm", "rcm")),
    "f: ratio upside down": Mutant(Divergence, "ratio", lambda g: lambda *a: 1.0 / g(*a), ("f-distill",)),
    "f: weights of any size": Mutant(Divergence, "weights", unnormed, ("f-distill",)),
    "split: one draw for both": Mutant(
        score_gap, "augmented", lambda g: lambda whole, plain, made, t, noise: whole, ("decoupled-dmd", "cdm")
    ),
    "segments: a landing noised as clean data": Mutant(rollout.Made, "at", from_clean, ("tdm", "phased-dmd")),
    "segments: lands where the step before it does": Mutant(Segments, "ends", next_landing, ("tdm", "phased-dmd")),
    "landing: the state for the aim": Mutant(subinterval, "landing_aim", clean_aim, ("phased-dmd",)),
    "trajectory: weight upside down": Mutant(subinterval, "importance", lambda g: lambda *a: 1.0 / g(*a), ("tdm",)),
    "walk: states of other rows": Mutant(Denoiser, "jump", noisy_jump, ("cdm",)),
    "walk: times rise": Mutant(RandomWalk, "exit", rising, ("cdm",)),
    "part: everywhere and always": Mutant(
        Only, "loss", lambda g: lambda self, *rest: self.term.loss(*rest), ("flash-dmd", "disback")
    ),
    "trail: the nearest snapshot for all": Mutant(
        Trail,
        "role",
        lambda g: lambda self, progress: "teacher" if progress >= self.back else "fake.trail0",
        ("disback",),
    ),
    "trail: snapshots follow to the end": Mutant(Snapshot, "__call__", lambda g: lambda *asked: 0.0, ("disback",)),
    "pairs: noise of another sample": Mutant(anchor, "paired_noise", other_pairs, ("dmd",)),
}
