"""Files and pixels: from a folder, parquet files, a hub id or its own drawing to one uint8 array, and back to PNG.

`prepare` decodes a source once and caches it; `split` sets near-duplicate-free held-out images aside;
`batch_indices`, `flip` and `generator` are pure functions of (seed, step): there is no loader state.

    python data.py SOURCE     prepares, verifies and describes a data set
"""

import argparse
import functools
import hashlib
import io
import json
import math
import operator
import os
import re
import shutil
import sys
import tempfile
import threading
import urllib.error
import urllib.request
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps, PngImagePlugin

FORMAT = 2  # of the prepared folder and of the conversion that fills it: a change makes every cache key a new one
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
SIZES = (8, 1024)  # 8: the near-duplicate descriptor has 8 x 8 cells
SHORT_NAMES = {"smithsonian": "huggan/smithsonian_butterflies_subset"}
LABEL_COLUMNS = ("label", "labels", "class", "fine_label")
HUB_SECONDS = 5.0
# Levels of 255, RMS. Of 700 butterflies on white and of CIFAR-10, at 32 px, 11 and 84 pairs are within it. In
# samples seen by eye they were one photograph, recompressed, shifted or mirrored, or specimens hard to tell
# apart; no group exceeds 3. At 12, different specimens join in a chain of 18.
NEAR_DUPLICATE = 8.0


class InputError(ValueError):
    """Bad input: worth one sentence and an exit status, no traceback."""

    status = 2


@dataclass(frozen=True)
class Dataset:
    """Prepared images, all of one size, and what they came from."""

    images: np.ndarray  # uint8 (N, C, H, W), a memory map that copies on write
    labels: np.ndarray | None  # int64 (N,), indices into classes
    classes: tuple[str, ...]  # () where there are none
    digests: np.ndarray  # uint8 (N, 32): SHA-256 of each image's encoded bytes, or of what to draw; at every size
    groups: np.ndarray  # int64 (N,): near-duplicates have the same number
    checksum: str  # SHA-256 over images, labels and class names, in order
    fingerprint: str  # the checksum; of drawn images, which may differ by 2 levels elsewhere, SHA-256 of what to draw
    source: str  # absolute path, hub id or drawn:N
    revision: str | None  # of a hub id, or of the drawing
    skipped: tuple[str, ...]  # "name: reason"
    folder: Path  # where it is cached


@dataclass(frozen=True)
class Source:
    """Where images come from, before anything is decoded."""

    kind: str  # "folder", "parquet", "hub" or "drawn"
    name: str  # absolute path, hub id or drawn:N
    revision: str | None
    root: Path = Path()  # of `files`
    files: tuple[str, ...] = ()  # relative posix paths, sorted


@dataclass(frozen=True)
class Item:
    """One image that is still encoded: its bytes, the file that holds them, or what draws it at a size."""

    name: str
    encoded: bytes | Path | Callable[[int], np.ndarray]
    label: int | str | None


# ---------------------------------------------------------------------------------------------------- pixels


def to_float(images: torch.Tensor) -> torch.Tensor:
    """uint8 levels 0..255 of any shape -> float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Float in [-1, 1] of any shape and precision -> uint8, clamped and rounded as diffusers does."""
    return ((images.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)


def decode(encoded: bytes, size: int, channels: int) -> np.ndarray:
    """One encoded image -> uint8 (channels, size, size): upright, on white, centre-cropped, never squashed.

    Of an animation, the first frame. Raises what Pillow raises for damaged data, and ValueError for a
    decompression bomb and for floating-point pixels.
    """
    with Image.open(io.BytesIO(encoded)) as image:
        # Pillow only warns up to twice its limit; nothing is decoded before this line.
        if Image.MAX_IMAGE_PIXELS and image.width * image.height > Image.MAX_IMAGE_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels, more than Pillow's MAX_IMAGE_PIXELS")
        image.draft(None, (2 * size, 2 * size))  # JPEG: decode at 1/2, 1/4 or 1/8, at least twice the target
        image = _convert(ImageOps.exif_transpose(image), "L" if channels == 1 else "RGB")
    pixels = np.asarray(_fit(image, size))
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)


def picture_size(path: Path | str) -> tuple[int, int]:
    """Width and height of a picture that `decode` takes, before it is turned upright."""
    with Image.open(path) as image:
        return image.size


def _convert(image: Image.Image, mode: str) -> Image.Image:
    """Any Pillow mode -> "L" or "RGB" of 8 bits, transparency composited on white."""
    if image.mode == "F":
        raise ValueError("floating-point pixels, whose range is unknown")
    if image.mode.startswith("I"):  # 16 bits a pixel: convert() would clip at 255 instead of scaling
        levels = np.asarray(image).astype(np.float64) / 257
        image = Image.fromarray(levels.round().clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == mode else image.convert("RGB").convert(mode)


def _fit(image: Image.Image, size: int) -> Image.Image:
    """The central square, scaled to size x size in one antialiased step; its own pixels where it fits."""
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    if side == size:
        return image.crop((int(left), int(top), int(left) + side, int(top) + side))
    return image.resize((size, size), Image.Resampling.LANCZOS, box=(left, top, left + side, top + side))


def grid(
    images: torch.Tensor | np.ndarray, columns: int | None = None, padding: int = 2, scale: int = 1
) -> Image.Image:
    """uint8 (N, C, H, W), C 1 or 3, any N >= 1 -> one picture on white, row by row, near-square if not told; of
    each pixel `scale` x `scale`.

    Raises InputError for any other shape or type.
    """
    images = np.asarray(images.detach().cpu() if isinstance(images, torch.Tensor) else images)
    if images.ndim != 4 or images.dtype != np.uint8 or not len(images) or images.shape[1] not in (1, 3):
        raise InputError(
            f"a grid needs uint8 images of shape (N, 1 or 3, H, W), N >= 1; got {images.dtype} {images.shape}"
        )
    images = images.repeat(scale, 2).repeat(scale, 3)
    count, channels, height, width = images.shape
    columns = min(columns or math.ceil(math.sqrt(count)), count)
    rows = math.ceil(count / columns)
    step_y, step_x = height + padding, width + padding
    canvas = np.full((rows * step_y + padding, columns * step_x + padding, channels), 255, np.uint8)
    for i, image in enumerate(images):
        y, x = i // columns * step_y + padding, i % columns * step_x + padding
        canvas[y : y + height, x : x + width] = image.transpose(1, 2, 0)
    return Image.fromarray(canvas[:, :, 0] if channels == 1 else canvas)


# ------------------------------------------------------------------------------------------------- randomness


def generator(*key: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator seeded by its key alone: 63 bits of BLAKE2b over the key's ints and strings.

    Neighbouring keys give unrelated streams, and ("a", 1) is not ("a1",). PyTorch's CPU generator keeps only
    the low 32 bits of a seed, so two of 100,000 keys may share a stream there; CUDA's keeps all.
    """
    text = json.dumps([part if isinstance(part, str) else operator.index(part) for part in key])
    seed = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1
    return torch.Generator(device=device).manual_seed(seed)


@functools.lru_cache(maxsize=2)  # a batch looks at one epoch, or at two where it straddles
def _permutation(n: int, seed: int, epoch: int) -> torch.Tensor:
    return torch.randperm(n, generator=generator(seed, "order", epoch))


def batch_indices(n: int, seed: int, step: int, batch_size: int) -> torch.Tensor:
    """Which of n images make up the global batch of a step: int64 (batch_size,), a pure function.

    Sample g = step * batch_size + position belongs to epoch g // n, a fresh permutation of range(n). Batches
    run on over the end of an epoch, and hold several epochs where batch_size > n.
    """
    samples = torch.arange(step * batch_size, (step + 1) * batch_size)
    epochs, places = samples // n, samples % n
    return torch.cat([_permutation(n, seed, epoch)[places[epochs == epoch]] for epoch in epochs.unique().tolist()])


def flip(images: torch.Tensor, seed: int, step: int, start: int = 0, total: int | None = None) -> torch.Tensor:
    """(B, C, H, W) -> the same with about half of the images mirrored left-right, by (seed, step, position).

    A process that holds rows start : start + B of a global batch of `total` passes both, so that the number
    of processes changes nothing: the bits of the whole batch are drawn and its own rows used.
    """
    total = start + len(images) if total is None else total
    bits = torch.randint(2, (total,), generator=generator(seed, "flip", step), dtype=torch.bool)
    mine = bits[start : start + len(images)].to(images.device)
    return torch.where(mine[:, None, None, None], images.flip(-1), images)


# ---------------------------------------------------------------------------------------------------- writing


@contextmanager
def disk_errors(action: str, remedy="free some space, check its permissions or choose another place") -> Iterator[None]:
    """Turn what the disk says (full, no permission, is a directory) into one sentence."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        if isinstance(error, FileExistsError | NotADirectoryError):
            reason = "a file is where a folder is needed"
        raise InputError(f"cannot {action}: {reason}; {remedy}") from error


def atomic_write(path: Path | str, write: Callable[[BinaryIO], None]) -> None:
    """Call write(file) so that `path` holds all of it or, after any failure, what it held before.

    Parent folders are created. Raises InputError for any OSError; what else `write` raises passes through.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.urandom(6).hex()}.tmp")
    with disk_errors(f"write {path}"):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Not tempfile: its files are private to the user, and a model folder is shared.
            with open(temporary, "xb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
    with suppress(OSError):  # a rename is on disk once its folder is; some systems cannot open a folder
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def encode_png(
    image: Image.Image, text: Mapping[str, object] | None = None, film: Sequence[Image.Image] = (), kind: str = "PNG"
) -> bytes:
    """A PNG file with `text` as its text chunks.

    With `film` it is animated: those pictures at ten a second, then `image` for two; it may be a "GIF" then."""
    info = PngImagePlugin.PngInfo()
    for key, value in (text or {}).items():
        info.add_text(key, str(value).encode("utf-8", "backslashreplace").decode())  # a path may be no text
    first, *rest = *film, image
    options = {"append_images": rest, "loop": 0, "duration": [100] * len(film) + [2000]} if film else {}
    first.save(file := io.BytesIO(), kind, pnginfo=info, save_all=bool(film), **options)
    return file.getvalue()


def write_png(path: Path | str, *picture) -> None:
    """Write what `encode_png` makes of `picture` atomically, a GIF by the name's suffix. Raises InputError as
    atomic_write does."""
    kind = "GIF" if Path(path).suffix.lower() == ".gif" else "PNG"
    encoded = encode_png(*picture, kind=kind)
    atomic_write(path, lambda file: file.write(encoded))


# ------------------------------------------------------------------------------------------ drawn butterflies

DRAWN_VERSION = 1  # of all that follows: a change that shows by more than 2 levels of 255 makes it a new one
DRAWN_COUNT = 8192
# Outlines of right wings: corners of a smooth closed curve, x outwards and y upwards from the middle of the thorax.
# Lengths are in half sides of the picture, before the scale of the specimen. Both wings turn about the hinge.
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
# Forewing, hindwing, depth of the scallops, length of the tail; then layers of paint, the ground first: on which wings
# (f, h or both), the painter, a method of _Wing, colours, its numbers.
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
TURNS = 512  # angles at which a wing's outline is kept


def _smooth(x: np.ndarray) -> np.ndarray:
    """0 below 0, 1 above 1, a cubic between."""
    x = np.clip(x, 0, 1)
    return x * x * (3 - 2 * x)


@functools.cache
def _outline(corners: str) -> tuple[np.ndarray, np.ndarray]:
    """Angles and radii about the hinge of the closed curve through the corners (Catmull & Rom 1974)."""
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
    """A wing's outline and, of each pixel, its place on the wing: arrays of one shape.

    Its painters take numbers and return how much of a layer's colour each pixel takes, 0 to 1."""

    x: np.ndarray  # from the middle of the body outwards
    y: np.ndarray  # upwards
    u: np.ndarray  # 0 at the hinge, 1 at the outline
    a: np.ndarray  # 0 at the leading edge, 1 at the trailing edge
    radius: np.ndarray  # from the hinge to the outline, through the pixel
    inside: np.ndarray  # distance to the outline, negative outside of it
    outline: Callable[[float], float]  # angle -> radius, without wear
    edges: tuple[float, float]  # angles of the leading and trailing edges
    pixel: float  # side of a pixel
    mottle: np.ndarray | None = None  # smooth noise, -1 to 1
    light: float = 0.0  # the angle that it falls from

    def covered(self, depth: np.ndarray) -> np.ndarray:
        """Antialiasing: the share of each pixel that lies inside of an edge, from its distance to it."""
        return np.clip(depth / self.pixel + 0.5, 0, 1)

    def across(self, a: np.ndarray | float) -> np.ndarray:
        """The distance to the ray at a."""
        return np.abs(self.a - a) * self.u * self.radius * (self.edges[0] - self.edges[1])

    def away(self, a: float, u: float) -> np.ndarray:
        """The distance to a place on the wing."""
        angle = self.edges[0] - a * (self.edges[0] - self.edges[1])
        r = u * float(self.outline(angle))
        return np.hypot(self.x - HINGE[0] - r * math.cos(angle), self.y - HINGE[1] - r * math.sin(angle))

    def ground(self):
        return np.ones_like(self.u)

    def base(self, reach):
        return 0.9 * np.exp(-((self.u / reach) ** 2))

    def tip(self, reach):
        return _smooth((reach - self.away(0.18, 1) + 0.04 * self.mottle) / 0.1)

    def eye(self, a, u, radius):  # rings, a colour each
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
        return mask * min(1, 1.5 * width / self.pixel)  # thinner than a pixel: paler


def _rgb(digits: str) -> np.ndarray:
    return np.array([[int(digit, 16) / 15] for digit in digits], np.float32)


def draw_butterfly(seed: int, index: int, size: int) -> np.ndarray:
    """Specimen `index` of a seed's endless collection, pinned on paper: uint8 (3, size, size), antialiased.

    A function of (DRAWN_VERSION, seed, index) at every size, to 2 levels on any machine. Its family is number
    index % len(FAMILIES) of FAMILIES. Seeds and indices go from 0 to 2^56.
    """
    bits = np.random.Philox(key=[seed, DRAWN_VERSION << 56 | index]).random_raw(256)  # a stream that never changes
    numbers = iter(((bits >> np.uint64(11)) * 2.0**-53).tolist())

    def between(low: float, high: float) -> float:
        return low + (high - low) * next(numbers)

    forewing, hindwing, scallops, tail, text = list(FAMILIES.values())[index % len(FAMILIES)]
    outlines = {"h": _outline(OUTLINES[hindwing]), "f": _outline(OUTLINES[forewing])}
    factor = max(1, round(144 / size))  # small pictures are drawn larger and averaged
    side = size * factor
    axis = ((np.arange(side) + 0.5) / side * 2 - 1).astype(np.float32)
    x, y = np.meshgrid(axis - between(-0.03, 0.03), -axis - between(-0.03, 0.03) - 0.03)
    paper = np.array([between(0.955, 0.985), between(0.95, 0.975), between(0.925, 0.95)])[:, None, None]
    picture = (paper - 0.01 * (x * between(-1, 1) + y * between(-1, 1))).astype(np.float32)

    turn, reach = 0.5 * between(-1, 1) ** 3, between(0.84, 0.97)
    scale = reach / max(radii.max() for _, radii in outlines.values())
    cos, sin = math.cos(turn) / scale, math.sin(turn) / scale
    x, y, pixel = x * cos + y * sin, y * cos - x * sin, 2 / side / scale
    flat = np.abs(x) / (between(0.84, 1) + between(-0.05, 0.05) * np.sign(x))  # wings tilt, the body does not
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
    """Places every pixel (x, y) of the picture on a wing; the two sides (`left` or not) are worn differently."""
    angles = np.linspace(-math.pi, math.pi, TURNS + 1)
    plain = np.interp(angles - turned, *outline, period=2 * math.pi)
    sides = []
    for _ in range(2):
        table = plain * (1 + 0.01 * np.sin(angles * between(9, 15) + between(0, 6)))
        table *= 1 + scallops * np.abs(np.sin(11 * angles))
        for _ in range(2):  # a piece broken out, or none
            depth, width = wear * max(0, between(-0.3, 0.35)), between(0.02, 0.1)
            table *= 1 - depth * np.exp(-(((angles - between(-1.2, 0.9)) / width) ** 2))
        sides.append(table)
    table = np.concatenate(sides).astype(np.float32)
    x0, y0 = x - HINGE[0], y - HINGE[1]
    r, angle = np.hypot(x0, y0), np.arctan2(y0, x0)
    place = (angle + math.pi) * (TURNS / (2 * math.pi))
    cell = np.minimum(place.astype(np.int32), TURNS - 1)
    part, cell = place - cell, cell + (TURNS + 1) * left
    low, high = table[cell], table[cell + 1]
    radius = low + part * (high - low)
    slope = (high - low) * (TURNS / (2 * math.pi)) / radius  # a slanting outline is nearer than the ray says
    inside = (radius - r) / np.sqrt(1 + np.minimum(slope * slope, 9))
    a = (edges[0] - angle) / (edges[0] - edges[1])
    return _Wing(x, y, r / radius, a, radius, inside, functools.partial(np.interp, xp=angles, fp=plain), edges, pixel)


def _paint(wing: _Wing, layers: list[list[str]], between) -> np.ndarray:
    """(3, P) colours of a wing's P pixels: its layers, each number varied a little, then light and shade."""
    colours = np.ones((3, len(wing.u)), np.float32)
    for _, painter, named, *numbers in layers:
        varied = [float(number) * between(0.9, 1.1) if "." in number else float(number) for number in numbers]
        masks = getattr(wing, painter)(*varied)
        for mask, name in zip(masks if painter == "eye" else [masks], named.split(","), strict=False):
            colours += mask * (_rgb(name) - colours)
    folds = 0.04 * np.cos(16 * math.pi * wing.a) * _smooth((wing.u - 0.2) / 0.3)
    return colours * (0.97 + folds + 0.03 * wing.mottle - 0.18 * np.exp(-((wing.u / 0.22) ** 2)))


def _add_body(picture, x, y, pixel: float, colour: np.ndarray, length: float, reach: float) -> None:
    """Abdomen, thorax, head and antennae, onto the picture (3, H, W)."""
    for cy, rx, ry in ((-0.22, 0.042, 0.27), (0.06, 0.064, 0.14), (0.22, 0.047, 0.05)):
        z = np.hypot(x / rx, (y - cy) / ry)
        shade = 1.5 - 0.9 * np.minimum(z, 1) ** 2 + 0.25 * np.sin(90 * y) * (cy < 0) - 0.3 * x / rx
        picture += np.clip((1 - z) * rx / pixel + 0.5, 0, 1) * (colour * shade.clip(0.4, 2.2) - picture)
    v = np.clip((y - 0.22) / length, 0, 1)
    width = 0.006 + 0.012 * _smooth((v - 0.82) / 0.12)
    sideways = (np.abs(x) - 0.02 - reach * v**1.3) * math.cos(math.atan(reach / length))
    depth = width - np.hypot(sideways, y - 0.22 - v * length)
    picture += np.clip(depth / pixel + 0.5, 0, 1) * np.minimum(1, 2 * width / pixel) * (0.16 - picture)


# ---------------------------------------------------------------------------------------------------- sources


def find_source(source: str, revision: str | None = None) -> Source:
    """What `source` names: a folder of images, parquet files, a hub id or drawn. Raises InputError for all else."""
    path = Path(os.path.expanduser(source))
    drawn = source.partition(":")[0] == "drawn"
    if revision and (drawn or source == "auto" or os.path.exists(path)):
        raise InputError(f"revision {revision!r} is for hub ids, and {source} is none; leave it out")
    if drawn:
        return _find_drawn(source)
    if source and os.path.isdir(path):
        files = _list_files(path)
        for kind, suffixes in (("folder", SUFFIXES), ("parquet", {".parquet"})):
            chosen = tuple(name for name in files if Path(name).suffix.lower() in suffixes)
            if chosen:
                return Source(kind, str(path.resolve()), None, path.resolve(), chosen)
        raise InputError(f"{source} holds no images ({' '.join(sorted(SUFFIXES))}) and no parquet files")
    if os.path.isfile(path):
        if path.suffix.lower() != ".parquet":
            raise InputError(f"{source} is a single file but not parquet; name the folder of the images")
        return Source("parquet", str(path.resolve()), None, path.resolve().parent, (path.name,))
    name = SHORT_NAMES.get(source, source)
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        raise InputError(
            f"{source!r} is no folder or parquet file here and no hub id; name a folder of images, "
            f"a .parquet file, a hub id like org/name, or one of: auto, drawn, {', '.join(SHORT_NAMES)}"
        )
    return Source("hub", name, revision)


def _find_drawn(source: str) -> Source:
    match = re.fullmatch(r"drawn(?::(\d{1,9})(?::(\d{1,15}))?)?", source, re.ASCII)
    count, seed = (int(match[1] or DRAWN_COUNT), int(match[2] or 0)) if match else (0, 0)
    if count < 2:
        raise InputError(f"{source!r}: write drawn, drawn:N for N butterflies (at least 2), or drawn:N:SEED for others")
    return Source("drawn", f"drawn:{count}" + (f":{seed}" if seed else ""), str(DRAWN_VERSION))


def _read_drawn(source: Source) -> tuple[int, tuple[str, ...], Iterable[Item]]:
    """(count, class names, items): the families in turn."""
    count, seed = (int(part) for part in f"{source.name}:0".split(":")[1:3])
    draws = (functools.partial(draw_butterfly, seed, i) for i in range(count))
    items = (Item(f"drawn {DRAWN_VERSION} {seed} {i}", draw, i % len(FAMILIES)) for i, draw in enumerate(draws))
    return count, tuple(FAMILIES), items


def _list_files(root: Path) -> list[str]:
    """Relative posix paths of all files that are not hidden, sorted. Links to folders are not followed."""

    def refuse(error: OSError) -> None:
        raise InputError(f"cannot list {error.filename}: {error.strerror}; check its permissions") from error

    found = []
    for folder, subfolders, names in os.walk(root, onerror=refuse):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        found += [Path(folder, name) for name in names if not name.startswith(".")]
    return sorted(path.relative_to(root).as_posix() for path in found)


def _read_folder(source: Source) -> tuple[int, tuple[str, ...], Iterable[Item]]:
    """(count, class names, items): an image's class is the name of the folder it lies in."""
    parents = [Path(name).parent.name for name in source.files]
    classes = tuple(sorted(set(parents)))
    if "" in classes or len(classes) == 1:
        classes = ()
    index = {name: i for i, name in enumerate(classes)}
    pairs = zip(source.files, parents, strict=True)
    items = (Item(name, source.root / name, index.get(parent)) for name, parent in pairs)
    return len(parents), classes, items


def _read_table(table) -> tuple[int, tuple[str, ...] | None, Iterable[Item]]:
    """(count, class names, items) of a datasets.Dataset; the names are None where only its labels tell."""
    import datasets

    image, label = _image_column(table.features), _label_column(table.features)
    if image is None:
        raise InputError(f"no column holds images; the columns are: {', '.join(table.features)}")
    classes = getattr(table.features[label], "names", None) if label else ()
    table = table.select_columns([image, label] if label else [image])
    table = table.cast_column(image, datasets.Image(decode=False))

    def items() -> Iterator[Item]:
        for i, row in enumerate(table):
            cell = row[image] or {"path": None, "bytes": None}
            file = Path(cell["path"]) if cell["path"] else b""
            # An empty cell becomes empty bytes, which no decoder accepts: named and skipped as damaged.
            yield Item(cell["path"] or f"row {i}", cell["bytes"] or file, row[label] if label else None)

    return len(table), tuple(classes) if classes is not None else None, items()


def _image_column(features) -> str | None:
    """By type: an Image feature, else a struct with "bytes", else binary."""
    import datasets

    kinds = (
        lambda feature: isinstance(feature, datasets.Image),
        lambda feature: isinstance(feature, dict) and "bytes" in feature,
        lambda feature: getattr(feature, "dtype", None) in ("binary", "large_binary"),
    )
    return next((name for kind in kinds for name, feature in features.items() if kind(feature)), None)


def _label_column(features) -> str | None:
    """By type: a ClassLabel, else integers or strings under one of the usual names."""
    import datasets

    for name, feature in features.items():
        if isinstance(feature, datasets.ClassLabel):
            return name
    for name in LABEL_COLUMNS:
        if re.fullmatch(r"u?int\d+|(large_)?string", str(getattr(features.get(name), "dtype", None))):
            return name
    return None


def _hub_answers(seconds: float = HUB_SECONDS) -> bool:
    """Whether the hub, or the proxy's way to it, answers anything at all before the deadline."""
    answers: list[bool] = []

    def ask() -> None:
        try:
            request = urllib.request.Request(_hub_address(), method="HEAD")
            # A new opener reads the *_proxy variables now; urlopen keeps those of its first call.
            urllib.request.build_opener().open(request, timeout=seconds).close()
            answers.append(True)
        except urllib.error.HTTPError as error:
            answers.append(error.code not in (502, 503, 504))  # a proxy that cannot reach the hub
        except Exception:
            answers.append(False)

    # A thread, because no timeout reaches into a hanging name lookup; a daemon, so as not to delay the exit.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return answers == [True]


def _hub_address() -> str:
    return os.environ.get("HF_ENDPOINT") or "https://huggingface.co"


def _load_table(source: Source, scratch: Path):
    """The source as a datasets.Dataset. Raises InputError where hub or datasets refuse."""
    if source.kind == "hub" and not _hub_answers():
        raise InputError(
            f"{source.name!r} is no folder here, and the hub at {_hub_address()} gave no answer within "
            f"{HUB_SECONDS:.0f} seconds; name a folder of images or a .parquet file, or set HF_ENDPOINT to a "
            "mirror or https_proxy to a proxy"
        )
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    try:
        if source.kind == "hub":
            return datasets.load_dataset(source.name, revision=source.revision, split="train")
        files = [str(source.root / name) for name in source.files]
        # The Arrow copy that datasets makes goes with the scratch folder: only our array stays.
        return datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(scratch))
    except Exception as error:
        raise InputError(f"cannot load {source.name!r}: {reason(error)}") from error


def reason(error: Exception) -> str:
    """The first line of an error, in short, without the addresses of buffers."""
    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image, or of a format that is not known"
    lines = str(getattr(error, "strerror", None) or error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:200]


# -------------------------------------------------------------------------------------------------- preparing


def cache_folder() -> Path:
    """$PAPILIO_CACHE, else papilio/ in $XDG_CACHE_HOME, else ~/.cache/papilio."""
    if os.environ.get("PAPILIO_CACHE"):
        return Path(os.environ["PAPILIO_CACHE"]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "papilio"


def prepare(
    source: str,
    size: int,
    *,
    channels: int = 3,
    revision: str | None = None,
    cache: Path | None = None,
    progress: bool = True,
) -> Dataset:
    """Decode every image of a source once, into one array on disk; the next call only opens it.

    source    a folder of images (sub-folders are classes), a .parquet file or a folder of them, a hub id
              "org/name", "smithsonian", "drawn" (or "drawn:N", "drawn:N:SEED"), or "auto": smithsonian where it is
              prepared already or the hub answers, and drawn elsewhere; which one it is, is printed
    size      pixels a side, 8 to 1024; images are scaled to it by their shorter side and centre-cropped
    channels  3 (RGB) or 1 (grey)
    revision  of a hub id: branch, tag or commit
    cache     where prepared data lives; see cache_folder

    Raises InputError for a source that cannot be read, fewer than 2 images, more than 1% of unreadable files,
    and a disk that refuses.
    """
    if not str(size).isdecimal() or not SIZES[0] <= int(size) <= SIZES[1]:
        raise InputError(f"size {size}: images here are square; use one whole number from {SIZES[0]} to {SIZES[1]}")
    size = int(size)
    if channels not in (1, 3):
        raise InputError(f"channels {channels}: use 3 (RGB) or 1 (grey)")
    if source == "auto" and not revision:
        return _prepare_auto(size, channels=channels, cache=cache, progress=progress)
    found = find_source(str(source), revision)
    with disk_errors(f"read {found.name}"):
        key = _cache_key(found, size, channels)
    cache = Path(cache or cache_folder())
    folder = cache / "data" / key
    if dataset := _open(folder):
        return dataset
    with disk_errors(f"prepare {found.name} in {cache}"):
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = folder.with_name(f".{key[:16]}.{os.urandom(6).hex()}")
        scratch.mkdir()
        try:
            _fill(scratch, found, size, channels, progress)
            _commit(scratch, folder)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    if dataset := _open(folder):
        return dataset
    raise InputError(f"the prepared data in {folder} changed while it was written; run again")


def _prepare_auto(size: int, **options) -> Dataset:
    try:
        dataset = prepare("smithsonian", size, **options)
        print("data: the Smithsonian butterflies (--data auto)", flush=True)
    except InputError as error:
        print(f"data: DRAWN BUTTERFLIES (--data auto), because {str(error).partition(';')[0]}", flush=True)
        return prepare("drawn", size, **options)
    return dataset


def _cache_key(source: Source, size: int, channels: int) -> str:
    """Changes with the source, its revision, and the name, length and time of each of its files."""
    listing = []
    for name in source.files:
        try:
            stat = os.stat(source.root / name)
            listing.append((name, stat.st_size, stat.st_mtime_ns))
        except OSError:  # a link to nowhere: named and skipped when it is decoded
            listing.append((name, None, None))
    facts = [FORMAT, source.kind, source.name, source.revision, size, channels, listing]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


def _fill(folder: Path, source: Source, size: int, channels: int, progress: bool) -> None:
    """Write images.bin, labels.npy, digests.npy and meta.json of a source into an empty folder."""
    with tempfile.TemporaryDirectory(dir=folder.parent, ignore_cleanup_errors=True) as scratch:
        if source.kind in ("folder", "drawn"):
            total, classes, items = (_read_folder if source.kind == "folder" else _read_drawn)(source)
        else:
            total, classes, items = _read_table(_load_table(source, Path(scratch)))
        labels, digests, skipped = _decode_all(folder / "images.bin", items, total, size, channels, progress)
        del items  # it holds the Arrow file open, which some systems then refuse to delete
    if len(skipped) > 0.01 * total:
        raise InputError(
            f"{len(skipped)} of {total} images in {source.name} cannot be read (over 1%); "
            "repair or remove them: " + "; ".join(skipped[:3]) + ("; ..." if len(skipped) > 3 else "")
        )
    if len(digests) < 2:
        raise InputError(f"{source.name} holds {len(digests)} readable image(s); at least 2 are needed")
    labels, classes = _dense_labels(labels, classes)
    shape = (len(digests), channels, size, size)
    images = np.memmap(folder / "images.bin", np.uint8, "r", shape=shape)
    if labels is not None:
        np.save(folder / "labels.npy", labels)
    np.save(folder / "digests.npy", np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 32))
    drawn = source.kind == "drawn"  # each from numbers of its own: none is a copy
    np.save(folder / "groups.npy", np.arange(len(images)) if drawn else near_duplicates(images))
    checksum = fingerprint(images, labels, classes)
    recipe = hashlib.sha256(json.dumps([source.name, source.revision, shape]).encode()).hexdigest()
    meta = {
        "format": FORMAT,
        "shape": shape,
        "classes": classes,
        "checksum": checksum,
        "fingerprint": recipe if drawn else checksum,
        "source": source.name,
        "revision": source.revision,
        "skipped": skipped,
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")


def _decode_all(
    path: Path, items: Iterable[Item], total: int, size: int, channels: int, progress: bool
) -> tuple[list, list[bytes], list[str]]:
    """Append each decoded image to the file `path`, in the order of items: (labels, digests, skipped)."""
    from tqdm import tqdm

    def work(item: Item) -> tuple[Item, bytes, np.ndarray | str]:
        try:
            if callable(item.encoded):
                image = Image.fromarray(item.encoded(size).transpose(1, 2, 0)).convert("L" if channels == 1 else "RGB")
                pixels = np.asarray(image).reshape(size, size, channels).transpose(2, 0, 1)
                return item, hashlib.sha256(item.name.encode()).digest(), pixels
            encoded = item.encoded.read_bytes() if isinstance(item.encoded, Path) else item.encoded
            return item, hashlib.sha256(encoded).digest(), decode(encoded, size, channels)
        except Exception as error:  # damaged files make decoders raise nearly anything
            return item, b"", reason(error)

    labels, digests, skipped = [], [], []
    workers = os.cpu_count() or 1
    # Warning filters belong to the process, so they are set out here and not by each thread.
    with warnings.catch_warnings(), open(path, "wb") as file, ThreadPoolExecutor(workers) as pool:
        warnings.simplefilter("ignore")
        done = _ordered_map(pool, work, items, window=4 * workers)
        for item, digest, pixels in tqdm(done, "preparing", total, disable=not progress, unit="image"):
            if isinstance(pixels, str):
                skipped.append(f"{item.name}: {pixels}")
                continue
            file.write(pixels.tobytes())
            labels.append(item.label)
            digests.append(digest)
        file.flush()
        os.fsync(file.fileno())
    return labels, digests, skipped


def _ordered_map(pool: ThreadPoolExecutor, work: Callable, items: Iterable, window: int) -> Iterator:
    """pool.map that reads at most `window` items ahead, so that memory stays flat."""
    pending = deque()
    for item in items:
        pending.append(pool.submit(work, item))
        if len(pending) >= window:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def _dense_labels(labels: list, classes: tuple[str, ...] | None) -> tuple[np.ndarray | None, tuple[str, ...]]:
    """int64 labels 0..K-1 and K names; (None, ()) where there are no classes or an image has no label."""
    if classes == () or any(label is None for label in labels):
        return None, ()
    if classes is None:  # labels whose names nobody gave: their sorted values are the names
        values = sorted(set(labels))
        index = {value: i for i, value in enumerate(values)}
        labels, classes = [index[label] for label in labels], tuple(str(value) for value in values)
    if min(labels) < 0:  # the hub's -1 stands for "no label"
        return None, ()
    return np.array(labels, np.int64), classes


def _commit(scratch: Path, folder: Path) -> None:
    """Move a finished folder to its place. If another process was faster, its folder stays."""
    try:
        scratch.rename(folder)
    except OSError:
        if _open(folder) is None:  # damaged: that is why this process prepared it again
            shutil.rmtree(folder)
            scratch.rename(folder)


def _open(folder: Path) -> Dataset | None:
    """The prepared data in a folder, or None where it is missing or its files do not have their lengths."""
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        shape, classes = tuple(meta["shape"]), tuple(meta["classes"])
        if meta["format"] != FORMAT or (folder / "images.bin").stat().st_size != math.prod(shape):
            return None
        digests, groups = np.load(folder / "digests.npy"), np.load(folder / "groups.npy")
        labels = np.load(folder / "labels.npy") if classes else None
        # Copy on write: PyTorch warns of an array that is not writable, and the file stays as it is all the same.
        images = np.memmap(folder / "images.bin", np.uint8, "c", shape=shape)
        lengths = {len(images), len(digests), len(groups), len(labels) if classes else shape[0]}
        if lengths != {shape[0]} or groups.dtype != np.int64:
            return None
        rest = {name: meta[name] for name in ("checksum", "fingerprint", "source", "revision")}
        return Dataset(images, labels, classes, digests, groups, **rest, skipped=tuple(meta["skipped"]), folder=folder)
    except (OSError, ValueError, KeyError, TypeError, EOFError):
        return None


def fingerprint(images: np.ndarray, labels: np.ndarray | None, classes: tuple[str, ...]) -> str:
    """SHA-256 hex over shape, class names, labels (as little-endian int64) and images, in order."""
    digest = hashlib.sha256(json.dumps([list(images.shape), list(classes)]).encode())
    if labels is not None:
        digest.update(labels.astype("<i8").tobytes())
    for start in range(0, len(images), 1024):
        digest.update(np.ascontiguousarray(images[start : start + 1024]))
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------------ split


def split(dataset: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """(train, held_out): ascending int64 indices, chosen by content, the same images whatever their order.

    About n/7 images are held out up to n = 700, then 100, then n/50. Near-duplicates stay on one side. At
    another size the same images are chosen, unless a pair near the limit is within it at one size only.
    """
    return choose_held_out(dataset.groups, dataset.digests)


def choose_held_out(groups: np.ndarray, digests: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Take whole groups, in the order of their smallest digest, until enough images are held out.

    groups   int64 (N,): images with the same number stay together
    digests  uint8 (N, 32)
    """
    n = len(groups)
    target = min(max(1, n // 7), max(100, n // 50))
    members: dict[int, list[int]] = {}
    for i in sorted(range(n), key=lambda i: digests[i].tobytes()):
        members.setdefault(int(groups[i]), []).append(i)
    ranked = list(members.values())  # a dict keeps its order: here that of each group's smallest digest
    held = _take([], ranked, target, most=1.5 * target)
    if len(held) < target:  # only groups that overshoot by half are left: the smallest ones, up to n/2 in all
        taken = set(held)
        rest = [group for group in ranked if group[0] not in taken]
        held = _take(held, sorted(rest, key=len), target, most=n / 2)
    if not held:  # nearly all images are alike, and no split is clean
        held = _take([], [[i] for group in ranked for i in group], target, most=target)
    held_out = np.array(sorted(held), np.int64)
    return np.setdiff1d(np.arange(n), held_out), held_out


def _take(held: list[int], groups: list[list[int]], target: int, most: float) -> list[int]:
    """Add whole groups in order, none that would make it more than `most`, until `target` is reached."""
    held = list(held)
    for group in groups:
        if len(held) >= target:
            break
        if len(held) + len(group) <= most:
            held += group
    return held


def near_duplicates(images: np.ndarray, chunk: int = 512) -> np.ndarray:
    """uint8 (N, C, H, W) -> int64 (N,): equal numbers for images that a chain of near-duplicates links.

    Two images are near-duplicates if their 8 x 8 area means, or those of one and of the other's mirror image,
    differ by at most NEAR_DUPLICATE levels, root mean square. Every such pair is found, without comparing all
    pairs: the mean of the cells is that of their mirror image, and two means differ by no more than the RMS
    difference, so in the order of the means only a window behind each image can hold its duplicates.

    Memory: 4 x 64 x C bytes an image, twice, besides chunks.
    """
    cells = _describe(images)
    means = cells.mean((1, 2, 3), dtype=np.float64)
    order = np.argsort(means)
    cells, means = cells[order], means[order]
    squares = np.einsum("nchw,nchw->n", cells, cells, dtype=np.float64)
    limit = NEAR_DUPLICATE**2 * cells[0].size  # of a squared distance
    parents = np.arange(len(cells))
    for start in range(0, len(cells), chunk):
        here = slice(start, min(start + chunk, len(cells)))
        last = np.searchsorted(means, means[here.stop - 1] + NEAR_DUPLICATE * 1.001)
        for other in range(start, last, chunk):
            there = slice(other, min(other + chunk, last))
            right = cells[there].astype(np.float64).reshape(there.stop - other, -1)
            for left in (cells[here], cells[here, ..., ::-1]):
                products = left.astype(np.float64).reshape(len(left), -1) @ right.T
                rows, columns = np.nonzero(squares[here, None] + squares[there] - 2 * products <= limit)
                _link(parents, rows + start, columns + other)
    groups = np.empty(len(cells), np.int64)
    groups[order] = order[parents]
    return groups


def _describe(images: np.ndarray) -> np.ndarray:
    """uint8 (N, C, H, W) -> float32 (N, C, 8, 8) area means in levels, read in chunks."""
    cells = np.empty((*images.shape[:2], 8, 8), np.float32)
    for start in range(0, len(images), 256):
        levels = torch.from_numpy(images[start : start + 256].astype(np.float32))
        cells[start : start + 256] = torch.nn.functional.adaptive_avg_pool2d(levels, 8).numpy()
    return cells


def _link(parents: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> None:
    """Union-find in place: joins each pair (rows[k], columns[k]); every parent is a root before and after."""
    while not np.array_equal(parents[rows], parents[columns]):
        a, b = parents[rows], parents[columns]
        np.minimum.at(parents, np.maximum(a, b), np.minimum(a, b))
        while not np.array_equal(parents, parents[parents]):
            parents[:] = parents[parents]


# ---------------------------------------------------------------------------------------------- command line


def exit_status(work: Callable[[], int | None]) -> int:
    """Runs a command: its own status or 0, or 2 and one sentence on stderr for bad input, or 130 for Ctrl-C."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # a file's name may be no text at all
    try:
        return work() or 0
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.status
    except (MemoryError, RuntimeError) as error:
        # A CPU says so in words only; a GPU's torch.OutOfMemoryError is a RuntimeError too.
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        print("error: the memory is full; choose a smaller --batch-size or size", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def describe(dataset: Dataset, out: Path) -> None:
    """Verify a data set, print what is in it and write a grid of up to 64 images to `out`."""
    n, channels, size, _ = dataset.images.shape
    revision = f" at revision {dataset.revision}" if dataset.revision else ""
    print(f"source       {dataset.source}{revision}")
    print(f"images       {n:,} of {size} x {size} pixels, {'grey' if channels == 1 else 'RGB'}")
    print(f"prepared in  {dataset.folder} ({dataset.images.nbytes / 1e6:,.1f} MB)")
    print(f"classes      {len(dataset.classes) or 'none'}")
    for label, name in enumerate(dataset.classes):
        print(f"             {(dataset.labels == label).sum():>7,} {name}")
    print(f"skipped      {len(dataset.skipped)}")
    for line in dataset.skipped[:10]:
        print(f"             {line}")
    if fingerprint(dataset.images, dataset.labels, dataset.classes) != dataset.checksum:
        raise InputError(f"the prepared data in {dataset.folder} is damaged; delete it and run again")
    print(f"fingerprint  {dataset.fingerprint} (verified)")
    train, held_out = split(dataset)
    sizes = np.unique(dataset.groups, return_counts=True)[1]
    repeated = sizes[sizes > 1]
    print(f"split        {len(train):,} for training, {len(held_out):,} held out")
    print(f"duplicates   {len(repeated):,} groups of near-duplicates, {repeated.sum():,} images in all")
    spread = np.linspace(0, n - 1, min(n, 64)).round().astype(np.int64)
    write_png(out, grid(dataset.images[spread]), {"fingerprint": dataset.fingerprint})
    print(f"picture      {out} ({len(spread)} images)")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Prepare, verify and describe a data set.")
    parser.add_argument(
        "source",
        help="A folder of images, a .parquet file or a folder of them, a hub id (org/name), smithsonian, drawn, "
        "drawn:N (N butterflies), drawn:N:SEED (others), or auto.",
    )
    parser.add_argument("--size", default="64", help="Pixels a side, 8 to 1024 (default: %(default)s).")
    parser.add_argument("--channels", type=int, default=3, help="3 for RGB or 1 for grey (default: %(default)s).")
    parser.add_argument("--revision", help="The branch, tag or commit of a hub id (default: its newest).")
    parser.add_argument("--out", type=Path, default=Path("data.png"), help="The picture (default: %(default)s).")
    args = parser.parse_args(argv)
    return exit_status(
        lambda: describe(prepare(args.source, args.size, channels=args.channels, revision=args.revision), args.out)
    )


if __name__ == "__main__":
    sys.exit(main())
