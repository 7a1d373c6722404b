"""The `scenes` data set: captioned pictures of simple shapes, drawn on demand, endless and exactly labelled.

A sample is a 64x64 RGB picture of one to three objects, a caption that describes it in one of many phrasings, an edge
map, and a mask per object. A caption says only part of what is in the picture (size and background may go unsaid);
`Caption` keeps exactly what was said, so a picture can be checked against its words (`trainers.pictures.compliance`).

Axes: pictures are [H, W, 3] uint8, x grows to the right, y grows downward, radii and positions are in pixels.
"""

import itertools
import math
import random
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image, ImageChops, ImageDraw, ImageFilter

SIZE = 64
SUPERSAMPLE = 4
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
COLOURS = {
    "red": (220, 40, 40),
    "green": (30, 150, 60),
    "blue": (40, 80, 225),
    "yellow": (245, 215, 40),
    "purple": (150, 55, 190),
    "orange": (245, 135, 25),
    "white": (250, 250, 250),
    "black": (18, 18, 18),
}
BACKGROUNDS = {
    "gray": (132, 132, 132),
    "pink": (250, 172, 192),
    "sky": (150, 206, 242),
    "tan": (206, 170, 124),
    "mint": (170, 230, 188),
}
RADII = {"small": (6.5, 7.5), "large": (10.5, 12.0)}
"""Radius range in pixels of each size word; the gap between the ranges keeps the two apart."""
RELATIONS = ("left", "right", "above", "below", "row", "column")
"""Said of two objects: where the first is, seen from the second. Said of three: listed left to right, or top down."""
WAYS = {"left": (0, 1), "right": (0, -1), "above": (1, 1), "below": (1, -1), "row": (0, 1), "column": (1, 1)}
"""(axis, sign) of the way from each object named to the next: x or y, growing or falling."""

_SIZE_WORDS = {"small": ("small", "tiny", "little"), "large": ("large", "big")}
_NUMBER_WORDS = {1: ("a", "one"), 2: ("two",), 3: ("three",)}
_RELATION_WORDS = {
    "left": ("left of", "to the left of"),
    "right": ("right of", "to the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
    "row": ("in a row from left to right", "side by side from left to right"),
    "column": ("in a column from top to bottom", "stacked from top to bottom"),
}
_MEANT: dict[str, dict[str, Any]] = {
    "size": {word: size for size, group in _SIZE_WORDS.items() for word in group},
    "number": {word: number for number, group in _NUMBER_WORDS.items() for word in group},
    "shape": {form: shape for shape in SHAPES for form in (shape, f"{shape}s", f"{shape}es")},
    "beside": {"left": "left", "right": "right", "above": "above", "over": "above", "below": "below", "under": "below"},
    "lined": {"row": "row", "side": "row", "column": "column", "stacked": "column"},
}
"""What single words mean; each relation has one word of its own."""
_OPENINGS = ("", "", "", "a picture of ", "a drawing of ", "an image of ", "we see ")
_GROUNDS = ("on a {} background", "on {}", "over a {} background", "with a {} background")


@dataclass(frozen=True)
class SceneObject:
    """One drawn object: its centre and radius in pixels, and the words for what it is."""

    shape: str
    colour: str
    size: str
    x: float = 0.0
    y: float = 0.0
    radius: float = 0.0


@dataclass(frozen=True)
class Scene:
    """What is drawn. `jitter` shifts each object's and the background's RGB by a few units."""

    objects: tuple[SceneObject, ...]
    background: str
    jitter: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class ObjectClaim:
    """What a caption says of one object; None where it says nothing."""

    shape: str
    colour: str
    size: str | None = None


@dataclass(frozen=True)
class Caption:
    """A text and exactly what it claims: objects in the order named, their relation, and the background."""

    text: str
    objects: tuple[ObjectClaim, ...]
    relation: str | None = None
    background: str | None = None


@dataclass(frozen=True)
class Sample:
    scene: Scene
    caption: Caption


def sample(rng: random.Random) -> Sample:
    """Draw one scene and one caption of it."""
    count = rng.choices((1, 2, 3), weights=(4, 4, 2))[0]
    claims = _choose_objects(count, rng)
    relation = _choose_relation(claims, rng)
    objects = _place(claims, relation, rng)
    background = rng.choice(tuple(BACKGROUNDS))
    scene = Scene(objects, background, _jitter(len(objects) + 1, rng))
    return Sample(scene, caption(scene, relation, rng))


def sample_like(caption: Caption, rng: random.Random) -> Scene:
    """Another scene of a caption that `sample` made: what it leaves unsaid (sizes, ground, places) is drawn afresh."""
    claims: list[ObjectClaim] = []
    alike = len(set(caption.objects)) == 1
    crowded = len(caption.objects) == 3
    for k, claim in enumerate(caption.objects):
        others = [*claims, *caption.objects[k + 1 :]]
        if claim.size is None and crowded and (alike or any(o.size == "large" for o in others)):
            claim = replace(claim, size="small")
        elif claim.size is None:
            claim = replace(claim, size=claims[0].size if alike and claims else rng.choice(tuple(RADII)))
        claims.append(claim)
    objects = _place(tuple(claims), caption.relation, rng)
    jitter = _jitter(len(objects) + 1, rng)
    return Scene(objects, caption.background or rng.choice(tuple(BACKGROUNDS)), jitter)


def crowd(rng: random.Random) -> Scene:
    """A scene that no caption speaks of: up to five objects anywhere, often of one kind, colour or shape."""
    objects: list[SceneObject] = []
    for _ in range(rng.randint(0, 5)):
        shape, colour, size = rng.choice(SHAPES), rng.choice(tuple(COLOURS)), rng.choice(tuple(RADII))
        if objects and rng.random() < 0.6:
            other = rng.choice(objects)
            shape, colour = rng.choice(((other.shape, other.colour), (other.shape, colour), (shape, other.colour)))
        radius = rng.uniform(*RADII[size])
        margin = radius * 1.1 + 1.5
        for _ in range(20):
            x, y = rng.uniform(margin, SIZE - margin), rng.uniform(margin, SIZE - margin)
            trial = [*objects, SceneObject(shape, colour, size, x, y, radius)]
            if _apart(trial):
                objects = trial
                break
    return Scene(tuple(objects), rng.choice(tuple(BACKGROUNDS)), _jitter(len(objects) + 1, rng))


def caption(scene: Scene, relation: str | None, rng: random.Random) -> Caption:
    """Say something of a scene: sizes and background may go unsaid, the phrasing is drawn afresh."""
    objects = tuple(ObjectClaim(o.shape, o.colour, o.size) for o in scene.objects)
    said = _unsay_sizes(objects, rng)
    background = scene.background if rng.random() < 0.7 else None
    return Caption(describe(said, relation, background, rng), said, relation, background)


def describe(objects: tuple[ObjectClaim, ...], relation: str | None, background: str | None, rng: random.Random) -> str:
    """Phrase the claims in words; `read_caption` is the inverse."""
    if len(objects) > 1 and len(set(objects)) == 1:
        body = _noun(objects[0], rng, rng.choice(_NUMBER_WORDS[len(objects)]))
        if relation is not None:
            body += " " + rng.choice(_RELATION_WORDS[relation]).split(" from ")[0]
    else:
        nouns = [_noun(o, rng, rng.choice(_NUMBER_WORDS[1])) for o in objects]
        if len(nouns) == 2 and relation is not None:
            body = f"{nouns[0]} {rng.choice(_RELATION_WORDS[relation])} {nouns[1]}"
        elif len(nouns) == 1:
            body = nouns[0]
        else:
            body = ", ".join(nouns[:-1]) + rng.choice((" and ", ", ")) + nouns[-1]
            if relation is not None:
                body += " " + rng.choice(_RELATION_WORDS[relation])
    opening = rng.choice(_OPENINGS)
    if background is None:
        return opening + body
    if rng.random() < 0.15:
        return f"{background} background , {body}".replace(" ,", ",")
    return f"{opening}{body} {rng.choice(_GROUNDS).format(background)}"


def read_caption(text: str) -> Caption:
    """The claims of a text as `describe` phrases them; words that it does not know are passed over."""
    objects: list[ObjectClaim] = []
    said = text.replace(",", " , ").lower().split()
    number, size, colour, relation, background = 1, None, None, None, None
    for k, word in enumerate(said):
        size = _MEANT["size"].get(word, size)
        number = _MEANT["number"].get(word, number)
        colour = word if word in COLOURS else colour
        background = word if word in BACKGROUNDS else background
        shape = _MEANT["shape"].get(word)
        if shape is not None and colour is not None:
            objects += [ObjectClaim(shape, colour, size)] * number
            number, size, colour = 1, None, None
        # "over" says where an object is, and in "over a pink background" nothing
        elif len(objects) == 1 and word in _MEANT["beside"] and not set(said[k + 1 : k + 4]) & set(BACKGROUNDS):
            relation = _MEANT["beside"][word]
        elif len(objects) > 1 and word in _MEANT["lined"]:
            relation = _MEANT["lined"][word]
    return Caption(text, tuple(objects), relation, background)


def words() -> list[str]:
    """Every word a caption can hold, sorted; the tokenizer of the family gives each a token of its own."""
    found = {"and", ","}
    for groups in (_SIZE_WORDS, _NUMBER_WORDS, _RELATION_WORDS):
        for phrases in groups.values():
            for phrase in phrases:
                found.update(phrase.split())
    for phrase in (*_OPENINGS, *_GROUNDS):
        found.update(phrase.replace("{}", "").split())
    for shape in SHAPES:
        found.update((shape, plural(shape)))
    return sorted(found | set(COLOURS) | set(BACKGROUNDS))


def plural(shape: str) -> str:
    return shape + ("es" if shape.endswith("s") else "s")


def render(scene: Scene) -> Image.Image:
    """The picture, [64, 64] RGB, antialiased."""
    ground = shifted(BACKGROUNDS[scene.background], scene.jitter[-1])
    big = Image.new("RGB", (SIZE * SUPERSAMPLE, SIZE * SUPERSAMPLE), ground)
    for thing, jitter in zip(scene.objects, scene.jitter, strict=False):
        big.paste(shifted(COLOURS[thing.colour], jitter), mask=stencil(thing))
    return big.resize((SIZE, SIZE), Image.Resampling.BOX)


def masks(scene: Scene) -> list[Image.Image]:
    """One [64, 64] "L" mask per object, 255 inside."""
    small = (stencil(thing).resize((SIZE, SIZE), Image.Resampling.BOX) for thing in scene.objects)
    return [mask.point(lambda v: 255 if v >= 128 else 0) for mask in small]


def edges(scene: Scene) -> Image.Image:
    """The outline of every object, [64, 64] RGB, white on black: the ControlNet's condition."""
    lines = Image.new("L", (SIZE, SIZE), 0)
    for mask in masks(scene):
        lines = ImageChops.lighter(lines, ImageChops.subtract(mask, mask.filter(ImageFilter.MinFilter(3))))
    return Image.merge("RGB", (lines, lines, lines))


def outline(shape: str, x: float, y: float, radius: float) -> list[tuple[float, float]]:
    """Corner points of the straight-edged shapes."""
    if shape == "square":
        r = radius * 0.9
        return [(x - r, y - r), (x + r, y - r), (x + r, y + r), (x - r, y + r)]
    if shape == "triangle":
        return [(x, y - radius), (x + radius, y + radius * 0.8), (x - radius, y + radius * 0.8)]
    if shape == "star":
        tips = []
        for k in range(10):
            r = radius * (1.1 if k % 2 == 0 else 0.45)
            tips.append((x + r * math.sin(k * math.pi / 5), y - r * math.cos(k * math.pi / 5)))
        return tips
    arm, r = radius * 0.33, radius
    return [
        (x - arm, y - r), (x + arm, y - r), (x + arm, y - arm), (x + r, y - arm), (x + r, y + arm), (x + arm, y + arm),
        (x + arm, y + r), (x - arm, y + r), (x - arm, y + arm), (x - r, y + arm), (x - r, y - arm), (x - arm, y - arm),
    ]  # fmt: skip


def stencil(thing: SceneObject) -> Image.Image:
    """The object's mask at the supersampled size, 255 inside."""
    mask = Image.new("L", (SIZE * SUPERSAMPLE, SIZE * SUPERSAMPLE), 0)
    draw = ImageDraw.Draw(mask)
    x, y, r = (v * SUPERSAMPLE for v in (thing.x, thing.y, thing.radius))
    if thing.shape in ("circle", "ring"):
        draw.ellipse((x - r, y - r, x + r, y + r), fill=255)
        if thing.shape == "ring":
            hole = r * 0.55
            draw.ellipse((x - hole, y - hole, x + hole, y + hole), fill=0)
    else:
        draw.polygon(outline(thing.shape, x, y, r), fill=255)
    return mask


def shifted(colour: tuple[int, int, int], jitter: tuple[int, int, int]) -> tuple[int, int, int]:
    r, g, b = (min(255, max(0, c + j)) for c, j in zip(colour, jitter, strict=True))
    return r, g, b


def _choose_objects(count: int, rng: random.Random) -> tuple[ObjectClaim, ...]:
    def one() -> ObjectClaim:
        return ObjectClaim(rng.choice(SHAPES), rng.choice(tuple(COLOURS)), rng.choice(tuple(RADII)))

    if count > 1 and rng.random() < 0.25:
        return (one() if count == 2 else replace(one(), size="small"),) * count
    chosen: list[ObjectClaim] = []
    while len(chosen) < count:
        new = one()
        if count == 3 and any(o.size == "large" for o in chosen):
            new = replace(new, size="small")  # two large objects and a third do not fit in a row
        if all((new.shape, new.colour) != (o.shape, o.colour) for o in chosen):
            chosen.append(new)
    return tuple(chosen)


def _choose_relation(objects: tuple[ObjectClaim, ...], rng: random.Random) -> str | None:
    same = len(set(objects)) == 1
    if len(objects) == 1 or rng.random() < 0.25:
        return None
    if len(objects) == 2 and not same:
        return rng.choice(RELATIONS[:4])
    return rng.choice(RELATIONS[4:])


def _jitter(count: int, rng: random.Random) -> tuple[tuple[int, int, int], ...]:
    return tuple((rng.randint(-6, 6), rng.randint(-6, 6), rng.randint(-6, 6)) for _ in range(count))


def _place(objects: tuple[ObjectClaim, ...], relation: str | None, rng: random.Random) -> tuple[SceneObject, ...]:
    while True:
        placed = []
        for claim in objects:
            size = claim.size or "small"
            radius = rng.uniform(*RADII[size])
            margin = radius * 1.1 + 1.5
            x, y = rng.uniform(margin, SIZE - margin), rng.uniform(margin, SIZE - margin)
            placed.append(SceneObject(claim.shape, claim.colour, size, x, y, radius))
        if relation in ("row", "column"):
            placed = _line_up(placed, relation, rng)
        if _inside(placed) and _apart(placed) and holds(relation, [(o.x, o.y) for o in placed]):
            return tuple(placed)


def _line_up(placed: list[SceneObject], relation: str, rng: random.Random) -> list[SceneObject]:
    """Put the objects one after another along the axis; uniform placement would almost never do so."""
    gap = 3.0
    free = max(0.0, SIZE - 2.2 * sum(o.radius for o in placed) - gap * (len(placed) - 1) - 4)
    cuts = sorted(rng.uniform(0, free) for _ in placed)
    across = rng.uniform(14, SIZE - 14)
    done, used = [], 2.0
    for thing, cut in zip(placed, cuts, strict=True):
        along = used + cut + 1.1 * thing.radius
        used += 2.2 * thing.radius + gap
        wobble = min(max(across + rng.uniform(-3, 3), thing.radius * 1.1 + 1.5), SIZE - thing.radius * 1.1 - 1.5)
        x, y = (along, wobble) if relation == "row" else (wobble, along)
        done.append(replace(thing, x=x, y=y))
    return done


def _inside(placed: list[SceneObject]) -> bool:
    return all(min(o.x, o.y, SIZE - o.x, SIZE - o.y) >= 1.1 * o.radius + 1 for o in placed)


def _apart(placed: list[SceneObject]) -> bool:
    pairs = ((a, b) for i, a in enumerate(placed) for b in placed[i + 1 :])
    return all(math.hypot(a.x - b.x, a.y - b.y) > 1.12 * (a.radius + b.radius) + 2.5 for a, b in pairs)


def holds(relation: str | None, centres: list[tuple[float, float]]) -> bool:
    """Whether centres, in the order named, stand in the relation. No relation always holds."""
    if relation is None:
        return True
    axis, sign = WAYS[relation]
    steps = [((b[0] - a[0]), (b[1] - a[1])) for a, b in itertools.pairwise(centres)]
    return all(sign * step[axis] > abs(step[1 - axis]) for step in steps)


def _unsay_sizes(objects: tuple[ObjectClaim, ...], rng: random.Random) -> tuple[ObjectClaim, ...]:
    if len(set(objects)) == 1:
        return objects if rng.random() < 0.5 else tuple(replace(o, size=None) for o in objects)
    return tuple(o if rng.random() < 0.5 else replace(o, size=None) for o in objects)


def _noun(claim: ObjectClaim, rng: random.Random, number: str) -> str:
    size = "" if claim.size is None else rng.choice(_SIZE_WORDS[claim.size]) + " "
    many = number not in _NUMBER_WORDS[1]
    return f"{number} {size}{claim.colour} {plural(claim.shape) if many else claim.shape}"
