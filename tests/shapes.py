"""Simple coloured shapes on white, a folder a class."""

import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

SHAPES = {"circle": 64, "diamond": 4, "hexagon": 6, "square": 4, "triangle": 3}  # corners
TURNS = {"square": 45.0, "triangle": -90.0}  # degrees; the others start with a corner to the right


def make_shapes(folder: Path | str, count: int = 300, size: int = 32, seed: int = 0) -> Path:
    """Write `count` PNGs of size x size pixels into `folder`/<shape>/, the same ones for the same seed."""
    folder = Path(folder)
    draws = np.random.default_rng(seed)
    names = sorted(SHAPES)
    for i in range(count):
        name = names[i % len(names)]
        centre = draws.uniform(0.42, 0.58, 2)
        radius = draws.uniform(0.2, 0.38)
        colour = tuple(draws.integers(0, 200, 3).tolist())
        path = folder / name / f"{i:05d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        _draw(name, centre, radius, colour, size).save(path)
    return folder


def _draw(name: str, centre: np.ndarray, radius: float, colour: tuple[int, ...], size: int) -> Image.Image:
    scale = 4 * size  # drawn at four times the size, because ImageDraw does not antialias
    corners = SHAPES[name]
    angles = np.radians(TURNS.get(name, 0.0)) + np.arange(corners) * 2 * math.pi / corners
    points = scale * (centre + radius * np.stack([np.cos(angles), np.sin(angles)], axis=1))
    image = Image.new("RGB", (scale, scale), "white")
    ImageDraw.Draw(image).polygon([tuple(point) for point in points.tolist()], fill=colour)
    return image.resize((size, size), Image.Resampling.LANCZOS)
