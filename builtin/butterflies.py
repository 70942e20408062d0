"""Synthetic butterflies: a program that renders as many pinned specimens as are asked for, so that nothing has to be
downloaded to train the first model.

Specimen `index` of a `seed` is a pure function of (VERSION, seed, index) at every size, the same on every machine to 2
levels of 255. The fifteen families take turns and are the classes of the dataset.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

VERSION = 1  # increase it with any change that moves a pixel by more than 2 levels of 255
COUNT = 8192  # specimens in the dataset `synthetic`
# Outlines of the right wings: corners of a smooth closed curve, x outwards and y upwards from the middle of the thorax.
# The unit is half a side of the picture, before the specimen is scaled. Both wings rotate about the hinge.
HINGE = (0.09, 0.04)
OUTLINES = {
    "broad": "0,.1 .32,.38 .66,.58 .87,.59 .86,.42 .72,.20 .62,-.04 .32,-.08 0,-.06",
    "hooked": "0,.1 .30,.40 .62,.62 .90,.68 .84,.50 .68,.24 .61,-.04 .3,-.08 0,-.06",
    "angled": "0,.1 .30,.40 .60,.58 .80,.57 .77,.44 .67,.32 .68,.14 .60,-.04 .3,-.08 0,-.06",
    "long": "0,.1 .40,.32 .76,.44 .97,.38 .94,.22 .76,.06 .54,-.06 .3,-.08 0,-.06",
    "round": "0,.1 .28,.40 .54,.58 .73,.57 .78,.38 .70,.16 .58,-.04 .3,-.08 0,-.06",
    "pointed": "0,.1 .34,.44 .70,.68 .88,.72 .82,.52 .62,.20 .50,-.04 .26,-.08 0,-.06",
    "fan": "0,.08 .30,.08 .56,.02 .68,-.18 .62,-.42 .44,-.58 .24,-.56 .08,-.40 0,-.1",
    "small": "0,.08 .26,.06 .50,.0 .60,-.14 .54,-.34 .38,-.48 .20,-.48 .07,-.34 0,-.1",
    "tapered": "0,.08 .28,.07 .52,.0 .60,-.2 .54,-.42 .38,-.62 .24,-.64 .10,-.46 0,-.1",
}
# Forewing outline, hindwing outline, depth of the scallops, length of the tail, layers of paint from the bottom up.
# A layer: the wings it is painted on (f, h or both), the painter (a method of _Wing), colours, the painter's arguments.
FAMILIES = {
    "admiral": ("angled", "fan", 0.02, 0, "fh ground 211; fh base 543 .4; f slash d42 .44 .055 .9; h margin d52 "
        ".13; h spots 211 .91 .016 7; f tip 111 .3; f spots eee .8 .026 9 0 .5; f slash eee .66 .02 .9; fh margin "
        "cb9 .012"),
    "birdwing": ("long", "small", 0, 0, "fh ground 111; f streak 3a4 .26 .06; f streak 3a4 .8 .05; f shine 8e7 .35; "
        "f veins 111 .012; h ground eb2; h veins 111 .01; fh margin 111 .07; h spots 111 .76 .028 6"),
    "blue": ("round", "fan", 0, 0, "fh ground 79d; fh shine bcf .7; fh base 459 .35; fh veins 45a .005; fh margin "
        "234 .05; h spots 223 .87 .018 7; fh margin eee .022"),
    "copper": ("round", "fan", 0.01, 0, "f ground e72; h ground 433; fh shine fb5 .4; fh veins 531 .004; f margin "
        "322 .1; f spots 211 .74 .026 7; f eye 211 .35 .42 .035; f eye 211 .55 .28 .03; h arc e72 .86 .055; h spots "
        "211 .93 .014 8; fh base 322 .25"),
    "glasswing": ("long", "fan", 0, 0, "fh ground dcc; fh shine bcd .6; fh veins 322 .01; fh margin 532 .1; fh "
        "arc c63 .89 .03; f slash 421 .5 .03 .6; fh margin 221 .03"),
    "longwing": ("long", "small", 0, 0, "fh ground 111; fh shine 335 .5; f slash d32 .56 .08 .55; h streak ed7 .3 "
        ".04; fh margin 544 .008"),
    "monarch": ("broad", "fan", 0.008, 0, "fh ground e72; fh base b51 .5; f tip 211 .34; fh veins 211 .013; fh "
        "margin 211 .1; fh spots fed .95 .012 14; fh spots fed .885 .011 15; f spots ec8 .74 .03 9 .02 .4"),
    "morpho": ("hooked", "fan", 0.012, 0, "fh ground 27d; fh shine 7cf .9; fh base 136 .3; fh veins 125 .006; f "
        "tip 111 .36; fh margin 111 .09; f spots eef .93 .012 9"),
    "mourningcloak": ("angled", "fan", 0.025, 0, "fh ground 412; fh shine 733 .4; fh base 211 .4; fh margin 111 "
        ".18; fh margin eda .095; fh spots 58d .8 .02 11"),
    "owl": ("broad", "fan", 0.01, 0, "fh ground 864; fh ripples 532 9 .35; fh base 542 .45; f arc db8 .78 .05; fh "
        "margin 422 .09; f eye db8,211 .22 .7 .07; h eye ec9,211,d93,111 .5 .56 .17"),
    "peacock": ("angled", "fan", 0.03, 0, "fh ground a32; fh base 521 .35; fh veins 621 .006; fh margin 543 .09; "
        "f eye ec7,323,68d,a43 .24 .76 .13; h eye dc9,112,68e,212 .42 .7 .14"),
    "sulphur": ("round", "fan", 0, 0, "fh ground ed2; fh shine fe9 .5; fh base 872 .15; fh veins ca1 .005; fh "
        "margin 222 .12; f spots ed2 .93 .012 7; f eye 222 .4 .46 .04; h eye e82 .5 .4 .06"),
    "swallowtail": ("hooked", "fan", 0.03, 0.27, "fh ground ec5; fh veins 111 .01; f stripes 111 4.2; fh margin "
        "111 .15; fh spots ec5 .92 .022 8; h arc 47c .8 .04; h eye d43,111 .85 .78 .055; fh base 111 .28"),
    "white": ("round", "fan", 0, 0, "fh ground eed; fh base 888 .28; fh veins ccb .006; f tip 333 .24; f eye 333 "
        ".45 .6 .045; f eye 333 .72 .62 .045; h eye 444 .1 .62 .04"),
    "zebra": ("pointed", "tapered", 0, 0.34, "fh ground eed; fh shine ced .5; f stripes 112 6.5; h streak 112 .42 "
        ".022; h streak 112 .8 .022; fh margin 112 .06; h arc 47c .84 .025; h eye d33 .93 .62 .05"),
}  # fmt: skip
ANGLES = 512  # samples of a wing's outline around the full circle


def _smooth(x: np.ndarray) -> np.ndarray:
    """The smoothstep cubic: 0 below 0, 1 above 1."""
    x = np.clip(x, 0, 1)
    return x * x * (3 - 2 * x)


@functools.cache
def _outline(corners: str) -> tuple[np.ndarray, np.ndarray]:
    """Angles and radii, seen from the hinge, of the closed curve through the corners (Catmull & Rom 1974)."""
    p = np.array([corner.split(",") for corner in corners.split()], float) - HINGE
    before, after, beyond = (np.roll(p, shift, 0)[:, None] for shift in (1, -1, -2))
    t, p = np.linspace(0, 1, 16, endpoint=False)[:, None], p[:, None]
    cubic = 2 * before - 5 * p + 4 * after - beyond + t * (3 * (p - after) + beyond - before)
    curve = (p + t / 2 * (after - before + t * cubic)).reshape(-1, 2)
    angles = np.arctan2(curve[:, 1], curve[:, 0])
    order = np.argsort(angles)
    return angles[order], np.hypot(*curve[order].T)


@dataclass(frozen=True)
class _Wing:
    """A wing's outline and the position of every pixel on that wing, as arrays of one shape.

    The painters are the methods without a docstring: each returns the opacity (0 to 1) of its layer at every pixel."""

    x: np.ndarray  # from the middle of the body outwards
    y: np.ndarray  # upwards
    u: np.ndarray  # 0 at the hinge, 1 at the outline
    a: np.ndarray  # 0 at the leading edge, 1 at the trailing edge
    radius: np.ndarray  # from the hinge to the outline, through the pixel
    inside: np.ndarray  # distance to the outline, negative outside the wing
    outline: Callable[[float], float]  # angle -> radius, without wear
    edges: tuple[float, float]  # angles of the leading and trailing edges
    pixel: float  # side of a pixel
    mottle: np.ndarray | None = None  # smooth noise, -1 to 1
    light: float = 0.0  # angle of the incoming light

    def covered(self, depth: np.ndarray) -> np.ndarray:
        """Antialiasing: the share of each pixel that lies inside an edge at this distance."""
        return np.clip(depth / self.pixel + 0.5, 0, 1)

    def across(self, a: np.ndarray | float) -> np.ndarray:
        """Distance to the ray from the hinge at `a`."""
        return np.abs(self.a - a) * self.u * self.radius * (self.edges[0] - self.edges[1])

    def away(self, a: float, u: float) -> np.ndarray:
        """Distance to the point (a, u) of the wing."""
        angle = self.edges[0] - a * (self.edges[0] - self.edges[1])
        r = u * float(self.outline(angle))
        return np.hypot(self.x - HINGE[0] - r * math.cos(angle), self.y - HINGE[1] - r * math.sin(angle))

    def ground(self):
        return np.ones_like(self.u)

    def base(self, reach):
        return 0.9 * np.exp(-((self.u / reach) ** 2))

    def tip(self, reach):
        return _smooth((reach - self.away(0.18, 1) + 0.04 * self.mottle) / 0.1)

    def eye(self, a, u, radius):  # concentric rings, one colour each
        return [self.covered(radius * share - self.away(a, u)) for share in (1, 0.74, 0.45, 0.2)]

    def arc(self, u, width):
        width = width * (1 + 0.25 * np.cos(16 * math.pi * self.a))
        return self.covered((width - np.abs(self.u - u)) * self.radius)

    def margin(self, width):
        lobes = 1 + (0.16 * np.cos(16 * math.pi * self.a) + 0.15 * self.mottle) * (width > 0.03)
        return self.covered(width * lobes - self.inside) * _smooth((self.u - 0.45) / 0.2)

    def spots(self, u, radius, count, first=0.0, last=1.0):
        along = ((self.a * count) % 1 - 0.5) / count * self.across(self.a - 1)
        mask = self.covered(radius - np.hypot(along, (self.u - u) * self.radius))
        return mask * _smooth((self.a - first) * 50) * _smooth((last - self.a) * 50)

    def slash(self, x, width, slant):
        wave = 1 + 0.2 * np.sin(40 * self.y) + 0.4 * self.mottle
        mask = self.covered(width * wave - np.abs(self.x - x + slant * (self.y - 0.35)))
        return mask * _smooth(self.inside / 0.03 - 0.3)

    def streak(self, a, width):
        width = width * (1 + 0.3 * self.mottle) * np.minimum(1, 3 - 3 * self.u)
        return self.covered(width - self.across(a + 0.1 * self.u**2)) * _smooth(6 * self.u - 0.5)

    def stripes(self, count):
        q = (0.8 * self.x + 0.6 * self.y) * count + 0.05 * self.light
        return self.covered((0.3 - 0.13 * self.a - np.abs(q - np.round(q))) / count) * _smooth((0.8 - self.a) / 0.15)

    def ripples(self, count, strength):
        phase = 2 * math.pi * self.u * count + 5 * self.mottle + 4 * np.sin(14 * self.a)
        return strength * _smooth(0.5 + 0.5 * np.sin(phase))

    def shine(self, strength):
        towards = self.x * math.cos(self.light) + self.y * math.sin(self.light)
        return 0.6 * strength * _smooth(0.5 + 1.2 * (towards + 0.25 * self.mottle))

    def veins(self, width):
        q = 8 * self.a + 0.4 * (self.u - 0.5)
        rays = self.covered(width * (0.5 + self.u) - np.abs(q - np.round(q)) / 8 * self.across(self.a - 1))
        cell = self.covered(0.8 * width - np.abs(self.u - 0.42 - 0.08 * np.cos(6.3 * self.a)) * self.radius)
        cell = cell * _smooth((self.a - 0.05) / 0.1) * _smooth((0.8 - self.a) / 0.1)
        sides = self.covered(0.8 * width - np.minimum(self.across(0.12), self.across(0.62)))
        outer = _smooth((self.u - 0.3) / 0.1)
        mask = np.maximum(np.maximum(rays * outer, cell), sides * (1 - outer))
        return mask * min(1, 1.5 * width / self.pixel)  # veins thinner than a pixel become paler


def _rgb(digits: str) -> np.ndarray:
    return np.array([[int(digit, 16) / 15] for digit in digits], np.float32)


def render(seed: int, index: int, size: int) -> np.ndarray:
    """Renders specimen `index` of a seed, pinned on paper: uint8 (3, size, size), antialiased.

    Its family is number index % len(FAMILIES) of FAMILIES. Seeds and indices go from 0 to 2^56.
    """
    bits = np.random.Philox(key=[seed, VERSION << 56 | index]).random_raw(
        256
    )  # Philox streams never change between numpy versions
    numbers = iter(((bits >> np.uint64(11)) * 2.0**-53).tolist())

    def between(low: float, high: float) -> float:
        return low + (high - low) * next(numbers)

    forewing, hindwing, scallops, tail, text = list(FAMILIES.values())[index % len(FAMILIES)]
    outlines = {"h": _outline(OUTLINES[hindwing]), "f": _outline(OUTLINES[forewing])}
    factor = max(1, round(144 / size))  # small pictures are rendered larger and averaged
    side = size * factor
    axis = ((np.arange(side) + 0.5) / side * 2 - 1).astype(np.float32)
    x, y = np.meshgrid(axis - between(-0.03, 0.03), -axis - between(-0.03, 0.03) - 0.03)
    paper = np.array([between(0.955, 0.985), between(0.95, 0.975), between(0.925, 0.95)])[:, None, None]
    picture = (paper - 0.01 * (x * between(-1, 1) + y * between(-1, 1))).astype(np.float32)

    turn, reach = 0.5 * between(-1, 1) ** 3, between(0.84, 0.97)
    scale = reach / max(radii.max() for _, radii in outlines.values())
    cos, sin = math.cos(turn) / scale, math.sin(turn) / scale
    x, y, pixel = x * cos + y * sin, y * cos - x * sin, 2 / side / scale
    flat = np.abs(x) / (between(0.84, 1) + between(-0.05, 0.05) * np.sign(x))  # the wings tilt, the body does not
    wear, spread, light = between(0, 1) ** 3, between(-0.14, 0.12), between(0, 6)
    waves = [(between(-9, 9), between(-9, 9), between(0, 6)) for _ in range(3)]
    tone = np.array([[between(0.96, 1.04)], [between(0.97, 1.03)], [between(0.94, 1.06)]]) * between(0.88, 1.05)
    fade = between(0, 0.08) + 0.22 * wear

    wings = {}
    for key, turned in (("h", -0.6 * spread + between(-0.04, 0.04)), ("f", spread)):
        edges = (0.80 + turned, -0.20 + turned) if key == "f" else (0.10 + turned, -1.75 + turned)
        wings[key] = _shape(flat, y, x < 0, pixel, outlines[key], turned, edges, scallops, wear, between)
    if tail:
        v = np.clip((-0.46 - y) / tail, 0, 1)
        width = 0.030 + 0.022 * _smooth((v - 0.45) / 0.4)
        depth = width - np.hypot(flat - 0.36 - 0.1 * v * v, y + 0.46 + v * tail)
        np.maximum(wings["h"].inside, depth, out=wings["h"].inside)
    both, far = np.maximum(wings["f"].inside, wings["h"].inside), max(1, round(0.03 / pixel))
    shadow = np.full_like(both, -1)
    shadow[far:, far // 2 :] = both[:-far, : side - far // 2]
    picture *= 1 - 0.22 * _smooth((shadow + 0.05) / 0.09)
    layers = [layer.split() for layer in text.split(";")]
    for key, wing in wings.items():
        covered = wing.covered(wing.inside)
        chosen = np.nonzero(covered.ravel())[0]
        arrays = {name: getattr(wing, name).ravel()[chosen] for name in ("x", "y", "u", "a", "radius", "inside")}
        mottle = sum(np.sin(p * arrays["x"] + q * arrays["y"] + phase) for p, q, phase in waves) / 3
        small = replace(wing, **arrays, mottle=mottle, light=light)
        colours = _paint(small, [layer for layer in layers if key in layer[0]], between)
        if key == "h":  # the forewing's shadow
            colours *= 1 - 0.4 * _smooth(1 + wings["f"].inside.ravel()[chosen] / 0.05)
        colours += fade * (0.7 * colours.mean(0) + 0.2 - colours)
        pixels = picture.reshape(3, -1)
        pixels[:, chosen] += covered.ravel()[chosen] * (colours * tone.astype(np.float32) - pixels[:, chosen])
    body = 0.3 * _rgb(layers[0][2])[:, :, None] + between(0.05, 0.15)
    _add_body(picture, x, y, pixel, body, between(0.26, 0.36), between(0.20, 0.34))
    return (picture.reshape(3, size, factor, size, factor).mean((2, 4)).clip(0, 1) * 255).round().astype(np.uint8)


def _shape(x, y, left, pixel: float, outline, turned: float, edges, scallops: float, wear: float, between) -> _Wing:
    """Finds the position of every pixel (x, y) on a wing; the left and the right wing are worn differently."""
    angles = np.linspace(-math.pi, math.pi, ANGLES + 1)
    plain = np.interp(angles - turned, *outline, period=2 * math.pi)
    sides = []
    for _ in range(2):
        table = plain * (1 + 0.01 * np.sin(angles * between(9, 15) + between(0, 6)))
        table *= 1 + scallops * np.abs(np.sin(11 * angles))
        for _ in range(2):  # broken edges
            depth, width = wear * max(0, between(-0.3, 0.35)), between(0.02, 0.1)
            table *= 1 - depth * np.exp(-(((angles - between(-1.2, 0.9)) / width) ** 2))
        sides.append(table)
    table = np.concatenate(sides).astype(np.float32)
    x0, y0 = x - HINGE[0], y - HINGE[1]
    r, angle = np.hypot(x0, y0), np.arctan2(y0, x0)
    place = (angle + math.pi) * (ANGLES / (2 * math.pi))
    cell = np.minimum(place.astype(np.int32), ANGLES - 1)
    part, cell = place - cell, cell + (ANGLES + 1) * left
    low, high = table[cell], table[cell + 1]
    radius = low + part * (high - low)
    slope = (
        (high - low) * (ANGLES / (2 * math.pi)) / radius
    )  # a slanted outline is nearer than the distance along the ray
    inside = (radius - r) / np.sqrt(1 + np.minimum(slope * slope, 9))
    a = (edges[0] - angle) / (edges[0] - edges[1])
    return _Wing(x, y, r / radius, a, radius, inside, functools.partial(np.interp, xp=angles, fp=plain), edges, pixel)


def _paint(wing: _Wing, layers: list[list[str]], between) -> np.ndarray:
    """Paints the layers of a wing, each argument varied a little, then light and shade: (3, P) colours of P pixels."""
    colours = np.ones((3, len(wing.u)), np.float32)
    for _, painter, named, *numbers in layers:
        varied = [float(number) * between(0.9, 1.1) if "." in number else float(number) for number in numbers]
        masks = getattr(wing, painter)(*varied)
        for mask, name in zip(masks if painter == "eye" else [masks], named.split(","), strict=False):
            colours += mask * (_rgb(name) - colours)
    folds = 0.04 * np.cos(16 * math.pi * wing.a) * _smooth((wing.u - 0.2) / 0.3)
    return colours * (0.97 + folds + 0.03 * wing.mottle - 0.18 * np.exp(-((wing.u / 0.22) ** 2)))


def _add_body(picture, x, y, pixel: float, colour: np.ndarray, length: float, reach: float) -> None:
    """Paints abdomen, thorax, head and antennae onto the picture (3, H, W)."""
    for cy, rx, ry in ((-0.22, 0.042, 0.27), (0.06, 0.064, 0.14), (0.22, 0.047, 0.05)):
        z = np.hypot(x / rx, (y - cy) / ry)
        shade = 1.5 - 0.9 * np.minimum(z, 1) ** 2 + 0.25 * np.sin(90 * y) * (cy < 0) - 0.3 * x / rx
        picture += np.clip((1 - z) * rx / pixel + 0.5, 0, 1) * (colour * shade.clip(0.4, 2.2) - picture)
    v = np.clip((y - 0.22) / length, 0, 1)
    width = 0.006 + 0.012 * _smooth((v - 0.82) / 0.12)
    sideways = (np.abs(x) - 0.02 - reach * v**1.3) * math.cos(math.atan(reach / length))
    depth = width - np.hypot(sideways, y - 0.22 - v * length)
    picture += np.clip(depth / pixel + 0.5, 0, 1) * np.minimum(1, 2 * width / pixel) * (0.16 - picture)
