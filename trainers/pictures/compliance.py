"""Does a picture show what its caption says? A geometric reader of `scenes` pictures; nothing in it is learned.

`read` finds the objects of a picture: its border gives the background, pixels far from the background fall into patches
of one colour, and each patch is compared with the outline of every shape, at the centre and radius that its area asks
for. `check` holds the reading against a caption's claims, which is exact knowledge (`scenes.Caption`), not language.

Pictures are [64, 64, 3] uint8; x grows to the right, y downward; lengths are in pixels.
"""

import itertools
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from . import scenes

Array = NDArray[np.float32]
Labels = NDArray[np.int32]

MIN_AREA = 30.0
"""Patches below this area (pixels) are specks: half the smallest object, a small star."""
MIN_FIT = 0.7
"""Overlap with the best outline below which a patch has no shape. Real renders reach 0.85 and more."""
MAX_COLOUR_DISTANCE = 60.0
"""RGB distance from a palette colour beyond which a colour has no name; two palette colours are 80 or more apart."""
SIZE_BORDER = (scenes.RADII["small"][1] + scenes.RADII["large"][0]) / 2
_FOREGROUND_DISTANCE = 45.0
"""RGB distance from the background at which a pixel counts as drawn: half the weakest contrast of the palette."""
_MAX_OBJECTS = 6
"""Objects considered, largest first; a picture with more than these is wrong whatever else it shows."""
_MAX_PATCHES = 48
"""Patches considered before rims are given to their objects."""

_COLOUR_NAMES = tuple(scenes.COLOURS)
_COLOURS: Array = np.array(list(scenes.COLOURS.values()), np.float32)
_GROUND_NAMES = tuple(scenes.BACKGROUNDS)
_GROUNDS: Array = np.array(list(scenes.BACKGROUNDS.values()), np.float32)


@dataclass(frozen=True)
class Found:
    """One patch of a picture. `shape` or `colour` is None where no word fits; `fit` is its overlap with `shape`."""

    shape: str | None
    colour: str | None
    size: str
    x: float
    y: float
    radius: float
    fit: float


@dataclass(frozen=True)
class Reading:
    """What a picture shows: patches, largest first, and the background (None where no word fits)."""

    objects: tuple[Found, ...]
    background: str | None


@dataclass(frozen=True)
class Verdict:
    """Each claim of a caption, and whether the picture meets it: `count`, `1.shape`, ..., `relation`, `background`."""

    claims: dict[str, bool]

    @property
    def score(self) -> float:
        """Fraction of claims met."""
        return sum(self.claims.values()) / len(self.claims)

    @property
    def strict(self) -> bool:
        """Whether every claim is met."""
        return all(self.claims.values())


def check(picture: NDArray[np.uint8], caption: scenes.Caption) -> Verdict:
    """Hold a picture against a caption. Found objects are given to the claimed ones in the most favourable way.

    Errors: ValueError where the picture is not [64, 64, 3] uint8.
    """
    return judge(read(picture), caption)


def judge(reading: Reading, caption: scenes.Caption) -> Verdict:
    """The verdict on a picture that was read already."""
    found, wanted = reading.objects, caption.objects
    claims = {"count": len(found) == len(wanted)}
    met = [[_object_claims(claim, thing) for thing in found] for claim in wanted]
    best: dict[str, bool] = {}
    seats = [*range(len(found)), *[None] * max(0, len(wanted) - len(found))]
    for chosen in itertools.permutations(seats, len(wanted)):
        trial = _trial(chosen, met, reading, caption)
        if not best or sum(trial.values()) > sum(best.values()):
            best = trial
        if all(best.values()):
            break
    claims |= best
    if caption.background is not None:
        claims["background"] = reading.background == caption.background
    return Verdict(claims)


def read(picture: NDArray[np.uint8]) -> Reading:
    """Find what a picture shows.

    Errors: ValueError where the picture is not [64, 64, 3] uint8.
    """
    if picture.shape != (scenes.SIZE, scenes.SIZE, 3) or picture.dtype != np.uint8:
        raise ValueError(f"a scenes picture is [64, 64, 3] uint8; this one is {list(picture.shape)} {picture.dtype}")
    pixels = picture.astype(np.float32)
    ground = _ground(pixels)
    away = pixels - ground
    distance = np.sqrt(np.einsum("hwc,hwc->hw", away, away))
    nearest = np.argmin(np.stack([np.square(pixels - c).sum(-1) for c in _COLOURS]), axis=0)
    labels = _absorb_rims(_keep_largest(_label(np.where(distance > _FOREGROUND_DISTANCE, nearest + 1, 0))))
    counts = np.bincount(labels.ravel())
    order = [k for k in np.argsort(-counts, kind="stable") if k and counts[k] >= MIN_AREA / 2]
    objects = [_measure(away, distance, labels, int(k), ground) for k in order[:_MAX_OBJECTS]]
    name, apart = _nearest(ground, _GROUNDS, _GROUND_NAMES)
    background = name if apart <= MAX_COLOUR_DISTANCE / 1.5 else None
    return Reading(tuple(o for o in objects if o is not None), background)


def _trial(
    chosen: tuple[int | None, ...], met: list[list[dict[str, bool]]], reading: Reading, caption: scenes.Caption
) -> dict[str, bool]:
    """The claims on objects and relation, where claim i is held by the found object chosen[i]; None holds nothing."""
    trial: dict[str, bool] = {}
    for i, (claim, k) in enumerate(zip(caption.objects, chosen, strict=True)):
        held = dict.fromkeys(_said(claim), False) if k is None else met[i][k]
        trial |= {f"{i + 1}.{name}": ok for name, ok in held.items()}
    if caption.relation is not None:
        centres = [(reading.objects[k].x, reading.objects[k].y) for k in chosen if k is not None]
        trial["relation"] = len(centres) == len(chosen) and scenes.holds(caption.relation, centres)
    return trial


def _said(claim: scenes.ObjectClaim) -> tuple[str, ...]:
    return ("shape", "colour") if claim.size is None else ("shape", "colour", "size")


def _object_claims(claim: scenes.ObjectClaim, thing: Found) -> dict[str, bool]:
    return {name: getattr(claim, name) == getattr(thing, name) for name in _said(claim)}


def _ground(pixels: Array) -> Array:
    """The background's RGB: the median of the two outermost pixel rows, which no object reaches."""
    rim = [pixels[:2], pixels[-2:], pixels[:, :2].swapaxes(0, 1), pixels[:, -2:].swapaxes(0, 1)]
    ground: Array = np.median(np.concatenate([r.reshape(-1, 3) for r in rim]), axis=0).astype(np.float32)
    return ground


def _nearest(colour: Array, palette: Array, names: tuple[str, ...]) -> tuple[str, float]:
    distances = np.sqrt(np.square(palette - colour).sum(-1))
    k = int(np.argmin(distances))
    return names[k], float(distances[k])


def _label(classes: NDArray[np.integer]) -> Labels:
    """Number the 8-connected patches of equal class from 1; class 0 stays 0.

    Works on runs of equal class within a row: a few hundred of them, joined row by row with union-find.
    """
    height, width = classes.shape
    breaks = np.ones((height, width), bool)
    breaks[:, 1:] = classes[:, 1:] != classes[:, :-1]
    starts = np.flatnonzero(breaks)
    ends = np.append(starts[1:], height * width)
    kinds = classes.ravel()[starts]
    parent = list(range(len(starts)))

    def root(k: int) -> int:
        while parent[k] != k:
            parent[k] = parent[parent[k]]
            k = parent[k]
        return k

    above: list[tuple[int, int, int, int]] = []
    current: list[tuple[int, int, int, int]] = []
    row = 0
    for k, (start, end, kind) in enumerate(zip(starts.tolist(), ends.tolist(), kinds.tolist(), strict=True)):
        if start // width != row:
            above, current, row = current, [], start // width
        if kind == 0:
            continue
        left, right = start - row * width, end - row * width
        for a_left, a_right, a_kind, a in above:
            if a_kind == kind and a_left <= right and left <= a_right:
                parent[root(k)] = root(a)
        current.append((left, right, kind, k))
    roots = np.array([root(k) for k in range(len(starts))])
    names = np.zeros(len(starts), np.int32)
    kept = np.unique(roots[kinds != 0])
    names[kept] = np.arange(1, len(kept) + 1)
    run_labels = np.where(kinds == 0, 0, names[roots]).astype(np.int32)
    return np.repeat(run_labels, ends - starts).reshape(height, width)


def _keep_largest(labels: Labels) -> Labels:
    """Labels with all but the largest patches made 0; only noise has so many."""
    areas = np.bincount(labels.ravel())
    if len(areas) <= _MAX_PATCHES:
        return labels
    areas[0] = 0
    areas[np.argsort(-areas, kind="stable")[_MAX_PATCHES:]] = 0
    return np.where(areas[labels] > 0, labels, 0)


def _absorb_rims(labels: Labels) -> Labels:
    """Give rims to the patch they surround: a mixture at an edge may resemble a third colour (orange on mint: yellow).

    A rim is a patch with almost no pixel whose four neighbours belong to it, touching a larger patch.
    """
    padded = np.pad(labels, 1)
    around = [padded[1:-1, :-2], padded[1:-1, 2:], padded[:-2, 1:-1], padded[2:, 1:-1]]
    core = np.logical_and.reduce([labels == side for side in around])
    areas = np.bincount(labels.ravel())
    cores = np.bincount(labels.ravel(), weights=core.ravel(), minlength=len(areas))
    for k in np.argsort(areas, kind="stable"):
        if k == 0 or cores[k] > 0.15 * areas[k]:
            continue
        inside = labels == k
        touching = np.concatenate([side[inside] for side in around])
        contacts = np.bincount(touching[(touching != k) & (touching != 0)], minlength=len(areas))
        contacts[areas <= areas[k]] = 0
        if contacts.any():
            # the views in `around` look at a copy, so a later, larger rim still sees who touched it
            labels = np.where(inside, np.argmax(contacts), labels).astype(np.int32)
    return labels


def _measure(away: Array, distance: Array, labels: Labels, k: int, ground: Array) -> Found | None:
    """Patch k as an object; None for a speck. `away` is the picture less its background, `distance` its length."""
    inside = labels == k
    rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
    window = np.s_[_span(rows), _span(columns)]
    inside, others = inside[window], (labels[window] != k) & (labels[window] != 0)
    lengths = distance[window][inside]
    colour = np.median(away[window][inside][lengths >= np.median(lengths)], axis=0)
    coverage = away[window] @ (colour / float(colour @ colour))
    coverage = np.where(_grow(inside) & ~others, coverage, 0.0)
    area = float(coverage.sum())
    if area < MIN_AREA:
        return None
    y, x = np.mgrid[window].astype(np.float32) + 0.5
    centre_x, centre_y = float((coverage * x).sum()) / area, float((coverage * y).sum()) / area
    shape, fit, x0, y0, radius = _fit_shape(coverage, x, y, (centre_x, centre_y, area))
    name, apart = _nearest(colour + ground, _COLOURS, _COLOUR_NAMES)
    return Found(
        shape=shape if fit >= MIN_FIT else None,
        colour=name if apart <= MAX_COLOUR_DISTANCE else None,
        size="small" if radius < SIZE_BORDER else "large",
        x=x0,
        y=y0,
        radius=radius,
        fit=fit,
    )


def _span(indices: NDArray[np.intp]) -> slice:
    """The pixels from first to last index, and two more on either side where there are any."""
    return slice(max(0, int(indices[0]) - 2), min(scenes.SIZE, int(indices[-1]) + 3))


def _grow(inside: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Every pixel of a mask and its eight neighbours."""
    out = inside.copy()
    out[1:] |= inside[:-1]
    out[:-1] |= inside[1:]
    wide = out.copy()
    wide[:, 1:] |= out[:, :-1]
    wide[:, :-1] |= out[:, 1:]
    return wide


def _fit_shape(
    coverage: Array, x: Array, y: Array, moments: tuple[float, float, float]
) -> tuple[str, float, float, float, float]:
    """The shape whose outline overlaps best (intersection over union), as (shape, overlap, x, y, radius).

    moments: centroid x, y and area; they give each shape the centre and radius it would have.
    """
    centre_x, centre_y, area = moments
    coverage = coverage.clip(0.0, 1.0)
    best = (scenes.SHAPES[0], -1.0, centre_x, centre_y, 0.0)
    for shape, (unit_area, drop, table) in _OUTLINES.items():
        radius = math.sqrt(area / unit_area)
        x0, y0 = centre_x, centre_y - drop * radius
        column = _cell((x - x0) / radius)
        row = _cell((y - y0) / radius)
        drawn = (0.5 - radius * table[row, column]).clip(0.0, 1.0)
        overlap = float(np.minimum(drawn, coverage).sum() / np.maximum(drawn, coverage).sum())
        if overlap > best[1]:
            best = (shape, overlap, x0, y0, radius)
    return best


_CELLS, _REACH = 256, 1.6
"""Outline tables: cells per side, and how far a table reaches from the centre in radii."""


def _cell(u: Array) -> NDArray[np.intp]:
    return ((u + _REACH) * (_CELLS / (2 * _REACH))).clip(0, _CELLS - 1).astype(np.intp)


def _signed_distance(shape: str) -> Array:
    """Distance to the outline of a shape of radius 1 (negative inside), [256, 256] over [-1.6, 1.6] squared."""
    ticks = (np.arange(_CELLS) + 0.5) * (2 * _REACH / _CELLS) - _REACH
    x, y = np.meshgrid(ticks, ticks)
    if shape in ("circle", "ring"):
        far = np.hypot(x, y)
        round_one: Array = (far - 1 if shape == "circle" else np.maximum(far - 1, 0.55 - far)).astype(np.float32)
        return round_one
    corners = scenes.outline(shape, 0.0, 0.0, 1.0)
    inside = np.zeros_like(x, bool)
    nearest = np.full_like(x, np.inf)
    for (ax, ay), (bx, by) in zip(corners, [*corners[1:], corners[0]], strict=True):
        dx, dy = bx - ax, by - ay
        along = (((x - ax) * dx + (y - ay) * dy) / (dx * dx + dy * dy)).clip(0, 1)
        nearest = np.minimum(nearest, np.hypot(x - ax - along * dx, y - ay - along * dy))
        if dy:
            inside ^= ((ay > y) != (by > y)) & (x < ax + (y - ay) * dx / dy)
    signed: Array = np.where(inside, -nearest, nearest).astype(np.float32)
    return signed


def _outline_table(shape: str) -> tuple[float, float, Array]:
    """(area, how far the centroid lies below the centre, signed distances) of a shape of radius 1."""
    table = _signed_distance(shape)
    inside = table < 0
    ticks = (np.arange(_CELLS) + 0.5) * (2 * _REACH / _CELLS) - _REACH
    area = float(inside.sum()) * (2 * _REACH / _CELLS) ** 2
    return area, float((inside.sum(1) * ticks).sum() / inside.sum()), table


_OUTLINES = {shape: _outline_table(shape) for shape in scenes.SHAPES}
