"""Measures the quality of images and models, compares runs, and checks served images for drift.

    python monitor.py quality runs/x                     samples of a run, against images that it has not seen
    python monitor.py compare runs/*                     curves of several runs, and which is the best
    python monitor.py watch served                       tests the folder of `server.py --save served` every hour

All comparisons use the features of a small network of our own, which was trained once on synthetic butterflies and
never changes (`builtin/features.py`). Numbers are comparable between runs, but not with anyone else's "FID" or "KID";
for those, `quality --inception` adds the features of the Inception network that papers use (`builtin/inception.py`).
"""

import argparse
import base64
import functools
import hashlib
import io
import json
import math
import os
import re
import signal
import sys
import time
import traceback
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from http.client import HTTPException
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import data
import ddpm
import sample
from builtin.copies import Memorisation, memorised
from builtin.features import (
    FEATURES_HASH,
    STATISTICS,
    Features,
    features_of,
    load_features,
    statistics_of,
)
from builtin.inception import load_inception
from builtin.quality import COLUMNS, Estimate, as_records, as_rows, measures
from builtin.report import SCHEMA, text_table, write_report
from builtin.run_report import compare_runs, read_run
from builtin.served_images import ServedImages
from builtin.telemetry import exposition, labelled
from data import Flag, InputError, real, whole

# ---- quality ---------------------------------------------------------------------------------------------------------


def quality(extract: Callable, images: Tensor, real: Tensor) -> dict[str, Estimate]:
    """Compares uint8 (N, C, H, W) images with real ones by their features.

    `extract` computes the features of 64 images at a time. Returns the numbers of builtin.quality.measures.
    """
    return measures(features_of(extract, images), features_of(extract, real))


UNSEEN = "synthetic:4096:2147483648"  # no run is trained on this seed unless it asks for it


def read_images(source: str, shape: tuple, revision: str | None = None) -> data.Dataset:
    """Reads a source of data.prepare at a shape (channels, height, width)."""
    return data.prepare(source, shape[1], channels=shape[0], revision=revision)


def choose(dataset: data.Dataset, rows: np.ndarray | Tensor) -> data.Dataset:
    """Keeps some images of a dataset, in this order."""
    rows = np.asarray(rows)
    labels = None if dataset.labels is None else dataset.labels[rows]
    return replace(dataset, images=dataset.images[rows], labels=labels)


def random_subset(images: data.Dataset, count: int) -> data.Dataset:
    """Chooses at most `count` images at random.

    A synthetic dataset has equally many images of each family, so a plain subset would vary less than a random set, and
    KID would be biased downwards. From synthetic datasets, the number of each family is therefore drawn at random
    first, and at most half of the images are taken.
    """
    random = data.generator("some", data.original_name(images.source))
    if not data.is_synthetic(images.source):
        return choose(images, torch.randperm(len(images.images), generator=random)[:count])
    count = min(count, len(images.images) // 2)
    times = torch.randint(len(images.classes), (count,), generator=random).bincount()
    rows = [np.flatnonzero(images.labels == k)[:number] for k, number in enumerate(times.tolist())]
    return choose(images, np.concatenate(rows))


def unseen_synthetic(shape: tuple) -> data.Dataset:
    """Returns 2,000 synthetic images with a seed that no model was trained on."""
    return random_subset(read_images(UNSEEN, shape), 2000)


def images_of_run(run: Path, shape: tuple) -> tuple[data.Dataset, data.Dataset]:
    """Reads what a run was trained on, and images that it has not seen: held out, or new synthetic ones."""
    config = data.read_json(run / "config.json")
    try:
        source, fingerprint = config["data"]["source"], config["data"]["fingerprint"]
        images = read_images(source, shape, config["settings"].get("revision"))
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{run / 'config.json'} is not the config.json of a run; name images with --real") from error
    if images.fingerprint != fingerprint:
        raise InputError(f"{source} has changed since {run} was trained; name other images with --real and --train")
    training, held_out = (choose(images, rows) for rows in data.split(images))
    if data.is_synthetic(images.source):
        return training, unseen_synthetic(shape)
    return training, held_out


def references(args: argparse.Namespace, path: Path, shape: tuple) -> tuple:
    """Reads the training images, if they are known, and the real images to compare with."""
    training, real = None, None
    if (path / "metrics.jsonl").exists() and not (args.real and args.train):
        training, real = images_of_run(path, shape)
    elif path.resolve() == sample.DEFAULT_MODEL.resolve() and not args.real:  # trained on synthetic butterflies
        real = unseen_synthetic(shape)
    if args.train:
        training = read_images(args.train, shape)
    if args.real:
        real = read_images(args.real, shape)
        real = random_subset(real, len(real.images))
    if real is None:
        raise InputError(f"{path} does not say which images to compare it with; name them with --real")
    return training, real


def read_subject(args: argparse.Namespace) -> tuple:
    """Returns the images to evaluate, training images, real images, and what made the images to evaluate."""
    path, which = sample.find_model(args.subject or None)
    if not args.subject:
        print(which)
    is_model = any((path / name).exists() for name in ("model", "unet", "config.json"))
    if not is_model:
        size = args.size or 64
        images = read_images(args.subject, (3, size, size))
        training, real = references(args, path, (3, size, size))
        made_by = {"source": images.source, "fingerprint": images.fingerprint}
        return torch.from_numpy(random_subset(images, args.n).images), training, real, made_by
    device = sample.choose_device(args.device)
    model = sample.load(path, device, sample.choose_precision(device))
    _, height, width = model.shape
    if height != width or args.size not in (None, height):
        raise InputError(
            f"{path}: its images are {width} x {height}; only square ones, at their own size, are compared"
        )
    training, real = references(args, path, model.shape)
    made_by = {
        "source": str(path),
        "model": model.hash,
        "seed": args.seed,
        "sampler": ddpm.DEFAULT_SAMPLER,
        "steps": ddpm.DEFAULT_STEPS,
    }
    images = sample.draw_like(model, args.seed, args.n, real)
    return images, training, real, made_by


def compare_sets(args: argparse.Namespace, sets: dict[str, Tensor], real: Tensor) -> list[dict]:
    """Measures sets of images, by name, against real ones: with our features, and with Inception's if asked."""
    extractors = {f"Papilio {FEATURES_HASH[:8]}": (load_features(), measures)}
    if args.inception:
        inception = load_inception(None if args.inception == "auto" else Path(args.inception))
        extractors[f"Inception {inception.weights}"] = (
            inception.to(sample.choose_device(args.device)),
            inception.measures,
        )
    records = []
    for features, (extract, measures_of) in extractors.items():
        y = features_of(extract, real)
        found = {name: measures_of(features_of(extract, images), y) for name, images in sets.items()}
        records += as_records(features, found, {name: len(images) for name, images in sets.items()}, len(real))
    return records


def examples(name: str, images: Tensor) -> dict:
    """Returns up to 16 of the images, evenly spaced, as pictures of a report."""
    some = images[:: math.ceil(len(images) / 16)]
    return pictures(f"Some of the {name}", some, [""] * len(some))


def report_quality(args: argparse.Namespace) -> None:
    """Reports the quality of the images and, for comparison, of as many training images."""
    images, training, real, made_by = read_subject(args)
    if min(len(images), len(real.images)) < 3:
        raise InputError(
            f"quality needs at least 3 images on each side, and there are {len(images)} to evaluate and "
            f"{len(real.images)} to compare with; ask for more with -n, or name others with --real"
        )
    facts = {"features": FEATURES_HASH, **made_by}
    for name, dataset in (("real", real), ("training", training)):
        if dataset:
            facts |= {f"{name} images": dataset.source, f"{name} fingerprint": dataset.fingerprint}
    sets = {"images": images}
    if training:
        sets["training images"] = torch.from_numpy(random_subset(training, len(images)).images)
    real_pixels = torch.from_numpy(real.images)
    metrics = compare_sets(args, sets, real_pixels)
    rows = as_rows(metrics)
    title = f"{made_by['source']} against {len(real_pixels):,} images of {real.source}"
    print(title, text_table(COLUMNS, rows), sep="\n")
    document = {
        "title": title,
        "verdict": "KID {value:.4f} ({low:.4f} to {high:.4f}), N {n:,}".format(**metrics[0]),
        "alarm": False,
        "facts": facts,
        "tables": [{"title": "Measures", "columns": COLUMNS, "rows": rows}],
        "pictures": [examples(name, pixels) for name, pixels in {**sets, "real images": real_pixels}.items()],
        "metrics": metrics,
    }
    write_report(args.out, document, args.json)


# ---- memorised -------------------------------------------------------------------------------------------------------

PAIRS = 24  # shown in a report


def closest_pairs(images: Tensor, training: Tensor, found: Memorisation, names: Sequence[str]) -> dict:
    """Returns the pictures of generated images and their nearest training images, closest first."""
    pairs, captions = [], []
    for i in found.generated.distance.argsort(stable=True)[:PAIRS].tolist():
        index, mirrored, distance, _ = (values[i].item() for values in vars(found.generated).values())
        copied = training[index]
        caption = f"{names[i]}training image {index}, distance {distance:.3f}"
        if mirrored:
            copied, caption = copied.flip(-1), f"{caption}, mirrored"
        pairs.append(torch.cat([images[i], copied], 2))
        captions.append(caption)
    return pictures("Closest pairs: generated image, training image", torch.stack(pairs), captions)


def copies_table(found: Memorisation) -> dict:
    rows = []
    for name, near in (("generated", found.generated.near), ("not generated", found.null)):
        copies, count = int(near.sum()), len(near)
        low, high = wilson(copies, count)
        rows.append([name, count, copies, f"{copies / count:.1%}", f"{low:.1%} to {high:.1%}"])
    columns = ["images", "number", "near-copies", "share", "95% interval"]
    return {"title": "Near-copies of training images", "columns": columns, "rows": rows}


def report_memorised(args: argparse.Namespace) -> int:
    """Looks for copies of training images. Returns 1 if the model has memorised some."""
    images, training, real, made_by = read_subject(args)
    if training is None:
        raise InputError(f"{made_by['source']} does not tell what it was trained on; name the images with --train")
    pixels = torch.from_numpy(training.images)
    found = memorised(images, pixels, torch.from_numpy(real.images))
    names = [""] * len(images)
    if "seed" in made_by:
        names = [f"seed {args.seed + i}, " for i in range(len(images))]
    distances = {"generated": found.generated.distance.tolist(), "held out": found.held_out.distance.tolist()}
    sets = {
        "training images": f"{len(pixels)} of {training.source}",
        "held-out images": f"{len(real.images)} of {real.source}",
    }
    document = {
        "title": f"Memorisation: {made_by['source']}",
        "verdict": found.verdict,
        "alarm": found.found,
        "p": found.p,
        "facts": made_by | sets,
        "tables": [copies_table(found)],
        "histograms": [{"title": "Distance to the nearest training image", "lines": distances}],
        "pictures": [closest_pairs(images, pixels, found, names)],
    }
    print(found.verdict)
    write_report(args.out, document, args.json)
    return int(found.found)


# ---- drift: are these images like those of the golden set? -----------------------------------------------------------

LEAST = 64  # fewest images on each side of a test
COMPONENTS = 32


@dataclass(frozen=True)
class Measured:
    """Images of one size, with their features and statistics."""

    pixels: Tensor  # uint8 (N, C, H, W)
    labels: Tensor  # int64 (N,); 0 without classes
    features: Tensor  # float64 (N, 128)
    statistics: Tensor  # float64 (N, 13)
    names: np.ndarray  # str (N,)

    def rows(self, rows: Tensor | slice) -> "Measured":
        return Measured(**{name: values[rows] for name, values in vars(self).items()})


def measure(network: Features, pixels: Tensor, labels: Sequence[int], names: Sequence[str]) -> Measured:
    """Computes features and statistics of uint8 (N, C, H, W) images."""
    labels, names = torch.tensor(labels, dtype=torch.int64), np.array(names, dtype=str)
    return Measured(pixels, labels, features_of(network, pixels), statistics_of(pixels), names)


def measure_dataset(network: Features, dataset: data.Dataset) -> Measured:
    count = len(dataset.images)
    labels = np.zeros(count) if dataset.labels is None else dataset.labels
    return measure(network, torch.from_numpy(dataset.images), labels, [f"image {i}" for i in range(count)])


def class_means(values: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Returns the mean of values (N, d) in each class: (classes, d)."""
    sums = torch.zeros(classes, values.shape[1], dtype=values.dtype).index_add_(0, labels, values)
    return sums / labels.bincount(minlength=classes).clamp(min=1)[:, None]


def gaussian_kernel(fit: Tensor, values: Tensor) -> Tensor:
    """Returns the kernel of each pair of values (N, d): float32 (N, N) with a zero diagonal.

    Scales, components (at most 32) and the bandwidth, a median distance, come from `fit` (M, d).
    """
    mean, std = fit.mean(0), fit.std(0).clamp(min=1e-3)
    directions = torch.linalg.svd((fit - mean) / std, full_matrices=False).Vh[:COMPONENTS].T
    fit, values = ((part - mean) / std @ directions for part in (fit, values))
    distances = torch.cdist(values, values) / torch.pdist(fit).median().clamp(min=1e-6)  # 0 if most images are the same
    return torch.exp(-0.5 * distances.square()).fill_diagonal_(0).float()


def near_distance(features: Tensor) -> float:
    """Returns 0.4 of the median nearest-neighbour distance of features (N, 128): few pairs of images are closer."""
    return 0.4 * float(torch.cdist(features, features).fill_diagonal_(math.inf).amin(1).median())


def permutations(labels: Tensor, current: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Draws random subsets with as many images of each class as the current ones: float32 (count, N) of 0 and 1.

    labels (N,) are the classes; current (N,) marks the current images.
    """
    order = (labels + torch.rand(count, len(labels), generator=generator, dtype=torch.float64)).argsort(1)
    by_class = labels.sort().values
    sizes, wanted = labels.bincount(), labels[current].bincount(minlength=int(labels.max()) + 1)
    rank = torch.arange(len(labels)) - (sizes.cumsum(0) - sizes)[by_class]
    first = (rank < wanted[by_class]).float()
    return torch.zeros(count, len(labels)).scatter_(1, order, first.expand(count, -1))


def mmd(kernel: Tensor, chosen: Tensor) -> Tensor:
    """Returns the unbiased MMD^2 of the chosen images and the others, for each row of chosen (B, N): (B,).

    kernel (N, N) has a zero diagonal (Gretton et al. 2012, eq. 3).
    """
    n = chosen[0].sum()
    m = len(kernel) - n
    sums = chosen @ kernel
    within = (sums * chosen).sum(1)
    between = sums.sum(1) - within
    others = kernel.sum() - 2 * between - within
    return within / (n * (n - 1)) + others / (m * (m - 1)) - 2 * between / (n * m)


def near_pairs(near: Tensor, chosen: Tensor) -> Tensor:
    """Returns the number of pairs of chosen images that are near, for each row of chosen (B, N); near is (N, N)."""
    return ((chosen @ near) * chosen).sum(1)


def holm(ps: dict) -> dict:
    """Adjusts p-values for their number: those of at most alpha are significant (Holm 1979)."""
    adjusted, highest = {}, 0.0
    for rank, name in enumerate(sorted(ps, key=ps.get)):
        highest = max(highest, (len(ps) - rank) * ps[name])
        adjusted[name] = min(1.0, highest)
    return adjusted


def compare(fit: Measured, golden: Measured, current: Measured, alpha: float) -> tuple[dict, Tensor]:
    """Tests whether current images and golden ones of the same classes differ. `fit` is part of neither.

    MMD compares features and statistics, less the means of the classes. Near-duplicates are counted in the current
    images and in random ones. Returns {test: p-value}, from 40 / alpha permutations, and for each image, golden ones
    first, how much more it is like the current images than like the golden ones: float32 (N,).
    """
    labels = torch.cat([golden.labels, current.labels])
    current_rows = torch.arange(len(labels)) >= len(golden.labels)
    scores, kernels = {}, {}
    for name in ("features", "statistics"):
        values = torch.cat([getattr(golden, name), getattr(current, name)])
        fitted = getattr(fit, name)
        means = class_means(fitted, fit.labels, 1 + int(max(labels.max(), fit.labels.max())))
        kernels[name] = gaussian_kernel(fitted - means[fit.labels], values - means[labels])
        scores[name] = partial(mmd, kernels[name])
    features = torch.cat([golden.features, current.features])
    near = torch.cdist(features, features) <= near_distance(fit.features)
    scores["duplicates"] = partial(near_pairs, near.float().fill_diagonal_(0))
    actual, count = current_rows.float()[None], round(40 / alpha) - 1
    random, at_least = data.generator("permutations"), dict.fromkeys(scores, 1)  # 1 counts the actual choice
    for start in range(0, count, 500):
        chosen = permutations(labels, current_rows, min(500, count - start), random)
        for name, score in scores.items():
            at_least[name] += int((score(chosen) >= score(actual) - 1e-6).sum())  # counts ties despite rounding
    ps = {name: number / (count + 1) for name, number in at_least.items()}
    weights = actual[0] / actual.sum() - (1 - actual[0]) / (1 - actual).sum()
    return ps, kernels[min(kernels, key=ps.get)] @ weights


# ---- golden set and served images ------------------------------------------------------------------------------------

SETTINGS = ("model", "sampler", "steps", "spacing", "eta", "guidance")  # served images with other values are ignored
GOLDEN_SEED = 2**40  # seed of the first golden image, larger than seeds that people choose


@dataclass(frozen=True)
class Golden:
    """A golden set. Its first fifth calibrates the tests; the rest is compared."""

    source: str
    images: Measured
    classes: tuple[str, ...]
    facts: dict  # how a model made them; {} for other pictures


def make_reference(args: argparse.Namespace) -> None:
    """Draws the golden set of a model into a folder: reference.json, images.npz and a picture."""
    if (args.out / "reference.json").exists():
        raise InputError(f"--out {args.out} already has a golden set; choose another folder")
    with data.disk_errors(f"write to {args.out}"):
        args.out.mkdir(parents=True, exist_ok=True)
    path, which = sample.find_model(args.model)
    device = sample.choose_device(args.device)
    model = sample.load(path, device, sample.choose_precision(device, args.precision))
    chosen = {flag.dest: getattr(args, flag.dest) for flag in sample.DRAW_FLAGS[3:]}
    request = sample.DrawRequest(n=args.n, seed=GOLDEN_SEED, classes=None, **chosen)
    table, config = request.table(model.schedule), model.network.config
    print(f"{which}: {model.shape[2]} px, {args.sampler}, steps {len(table)}, {device.type}, {model.precision}")
    labels, seeds = zip(*request.images(config), strict=True)
    pixels = sample.draw_all(model, seeds, table, labels, guidance=args.guidance)
    images = measure(load_features(), pixels, [label or 0 for label in labels], [f"seed {seed}" for seed in seeds])
    np.savez(encoded := io.BytesIO(), **{name: np.asarray(values) for name, values in vars(images).items()})
    data.atomic_write(args.out / "images.npz", lambda file: file.write(encoded.getvalue()))
    data.write_png(args.out / "grid.png", data.grid(pixels[:64]))
    content = {
        "schema": SCHEMA,
        "features": FEATURES_HASH,
        "images": hashlib.sha256(encoded.getvalue()).hexdigest(),
        "classes": [sample.class_name(config, label) for label in range(config.class_count)],
        "duplicates": near_distance(images.features[: args.n // 5]),
        "facts": {"guidance": args.guidance, **request.facts(model, len(table))},
    }
    data.write_json(args.out / "reference.json", content)  # last: it marks a complete golden set
    print(f"wrote {args.n} images to {args.out}")


def read_golden(source: str, network: Features, size: int | None = None) -> Golden:
    """Reads what make_reference wrote, or other pictures, scaled to size x size."""
    file = Path(source) / "images.npz"
    if not file.with_name("reference.json").exists():
        if source == "reference" and not file.parent.is_dir():
            raise InputError("--reference reference: there is no such golden set; draw one with `monitor.py reference`")
        side = size or 64
        images = read_images(source, (3, side, side))
        images = random_subset(images, len(images.images))
        return Golden(source, measure_dataset(network, images), images.classes, {})
    kept = data.read_json(file.with_name("reference.json"))
    with data.disk_errors(f"read {file}"):
        encoded = file.read_bytes()
    found = SCHEMA, FEATURES_HASH, hashlib.sha256(encoded).hexdigest()
    wanted = (kept.get(name) for name in ("schema", "features", "images"))
    if found != tuple(wanted) or not {"classes", "facts"} <= kept.keys():
        raise InputError(
            f"{file} is damaged, or from another version; delete {source} and run `monitor.py reference --out {source}`"
        )
    with np.load(io.BytesIO(encoded), allow_pickle=False) as arrays:
        values = {name: torch.from_numpy(arrays[name]) for name in arrays.files if name != "names"}
        images = Measured(**values, names=arrays["names"])
    return Golden(source, images, tuple(kept["classes"]), kept["facts"])


def served_records(store: ServedImages) -> list[tuple]:
    """Returns (file, facts) of each served image that has not been deleted, oldest first."""
    with data.disk_errors(f"read {store.folder}", "name the folder that `server.py --save` writes"):
        records = [record for day in store.days() for record in store.records(day) if os.path.lexists(record[0])]
    return sorted(records, key=lambda record: float(record[1]["time"]))


def comparable(records: list[tuple], golden: Golden) -> list[tuple]:
    """Keeps the records of images with the golden set's settings and classes, for each class and seed the oldest."""
    wanted = {key: golden.facts[key] for key in SETTINGS if key in golden.facts}
    kept = {}
    for file, facts in records:
        made = {"guidance": 1.0, "class": None, **facts}
        if wanted == {key: made.get(key) for key in wanted} and (not golden.classes or made["class"] in golden.classes):
            kept.setdefault(f"{made['class']} {made.get('seed')}", (file, facts))
    return list(kept.values())


def read_served(
    store: ServedImages, records: Iterable[tuple], golden: Golden, most: int, network: Features
) -> tuple[Measured, int]:
    """Reads up to `most` images. Returns them, and how many others are damaged or of another size."""
    shape = golden.images.pixels.shape[1:]
    pixels, labels, names, unreadable = [torch.empty(0, *shape, dtype=torch.uint8)], [], [], 0
    for file, facts in records:
        if len(names) == most:
            break
        with suppress(FileNotFoundError):  # deleted in the meantime
            image = store.read(file)
            if image is None or image.shape != shape:
                unreadable += 1
                continue
            pixels.append(torch.from_numpy(image.copy())[None])
            labels.append(golden.classes.index(facts["class"]) if golden.classes else 0)
            names.append(f"{file.parent.name}/{file.name}")
    return measure(network, torch.cat(pixels), labels, names), unreadable


# ---- reports ---------------------------------------------------------------------------------------------------------


def pictures(title: str, pixels: Tensor, names: Sequence[str]) -> dict:
    items = []
    for image, name in zip(pixels, names, strict=True):
        png = base64.b64encode(data.encode_png(data.grid(image[None], padding=0))).decode()
        items.append({"caption": str(name), "source": f"data:image/png;base64,{png}"})
    return {"title": title, "items": items}


def requests_table(records: list[tuple], count: int) -> dict:
    """Compares the requests for the newest `count` images with those for as many before. A change is not drift."""
    parts = [[facts for _, facts in part] for part in (records[-2 * count : -count], records[-count:])]
    rows = []
    for key in ("class", "steps", "sampler", "guidance", "model"):
        counts = [Counter(str(facts.get(key, "-"))[:40] for facts in part) for part in parts]
        rows += [[key, value, counts[0][value], counts[1][value]] for value in counts[0] | counts[1]]
    columns = ["setting", "value", f"{len(parts[0])} images before", f"newest {len(parts[1])} images"]
    return {"title": "Requests (a change here is not drift)", "columns": columns, "rows": rows}


def wilson(part: int, whole: int) -> tuple[float, float]:
    """Returns the 95% interval of a share (Wilson 1927)."""
    z = 1.96
    half = z * math.sqrt(part * (whole - part) / whole + z * z / 4)
    return tuple((part + z * z / 2 + side) / (whole + z * z) for side in (-half, half))


def votes_table(store: ServedImages) -> dict:
    """Counts votes by model."""
    lines = [line for day in store.days() for line in store.lines(day)]
    votes = Counter((str(line.get("model"))[:12], line["vote"]) for line in lines if line.get("vote") in ("up", "down"))
    rows = []
    for model in sorted({model for model, _ in votes}):
        ups, count = votes[model, "up"], votes[model, "up"] + votes[model, "down"]
        low, high = wilson(ups, count)
        rows.append([model, count, f"{ups / count:.1%}", f"{low:.1%} to {high:.1%}"])
    return {"title": "Votes", "columns": ["model", "votes", "up", "95% interval"], "rows": rows}


def explain(golden: Measured, current: Measured, unusual: Tensor) -> dict:
    """Returns the tables, histograms and pictures of a report, the statistics that changed most first.

    The golden mean is weighted by the classes of the current images.
    """
    classes = 1 + int(max(golden.labels.max(), current.labels.max()))
    before = class_means(golden.statistics, golden.labels, classes)[current.labels].mean(0)
    now = current.statistics.mean(0)
    change = (now - before) / golden.statistics.std(0).clamp(min=1e-3)
    order = change.abs().argsort(descending=True).tolist()
    rows = [[STATISTICS[i], f"{before[i]:.3f}", f"{now[i]:.3f}", f"{change[i]:+.2f}"] for i in order]
    histograms = []
    for i in order[:3]:
        lines = {"golden": golden.statistics[:, i].tolist(), "current": current.statistics[:, i].tolist()}
        histograms.append({"title": STATISTICS[i], "lines": lines})
    of_golden, of_current = unusual.split([len(golden.labels), len(current.labels)])
    shown = {
        "Current images least like the golden set": current.rows(of_current.topk(8).indices),
        "Golden images least like the current ones": golden.rows(of_golden.topk(8, largest=False).indices),
    }
    columns = ["", "golden", "current", "change in standard deviations"]
    return {
        "tables": [{"title": "What changed", "columns": columns, "rows": rows}],
        "histograms": histograms,
        "pictures": [pictures(title, part.pixels, part.names) for title, part in shown.items()],
    }


def judge(golden: Golden, current: Measured, unreadable: int, alpha: float) -> tuple[dict, dict]:
    """Returns findings {kind: text, "" if all is well} and the document of a report.

    Raises InputError if there are too few images for a test.
    """
    fifth = len(golden.images.labels) // 5
    fit, compared = (golden.images.rows(part) for part in (slice(fifth), slice(fifth, None)))
    compared = compared.rows(torch.isin(compared.labels, current.labels))
    current = current.rows(torch.isin(current.labels, compared.labels))  # other classes have no golden images
    readable, findings, document = len(current.labels), {"damaged": ""}, {"tables": []}
    if unreadable > (readable + unreadable) / 100:
        findings["damaged"] = (
            f"Damaged: {unreadable} of {readable + unreadable} images cannot be read or have another size."
        )
    if min(readable, len(compared.labels)) >= LEAST:
        ps, unusual = compare(fit, compared, current, alpha)
        adjusted, document = holm(ps), explain(compared, current, unusual)
        evidence = f"smallest adjusted p {min(adjusted.values()):.2g}, alarm at {alpha:g}"
        verdict = f"In control: no test finds a difference between {readable} images and the golden set ({evidence})."
        findings["drift"] = ""
        if min(adjusted.values()) <= alpha:
            tests = ", ".join(name for name, p in adjusted.items() if p <= alpha)
            moved = ", ".join(f"{row[0]} {row[3]}" for row in document["tables"][0]["rows"][:3])
            findings["drift"] = verdict = (
                f"Drift: {readable} images differ from the golden set in {tests} ({evidence}). "
                f"Largest changes, in standard deviations: {moved}."
            )
        rows = [[name, f"{p:.4f}", f"{adjusted[name]:.4f}"] for name, p in ps.items()]
        title = f"Tests (alarm: adjusted p of at most {alpha:g}; p: how often random regrouping differs as much)"
        document["tables"].insert(0, {"title": title, "columns": ["", "p", "adjusted p"], "rows": rows})
        document |= {"verdict": f"{verdict} {findings['damaged']}".strip(), "p": min(adjusted.values())}
    elif not findings["damaged"]:
        raise InputError(
            f"a test needs {LEAST} images on each side; {readable} have the settings and classes of the golden set, "
            f"and {len(compared.labels)} in {golden.source} have theirs: wait for more, or draw a larger golden set"
        )
    facts = {"golden set": golden.source, "features": FEATURES_HASH, "alpha": alpha, **golden.facts}
    return findings, {"verdict": findings["damaged"], "alarm": any(findings.values()), "facts": facts, **document}


def require_size(golden: Golden, n: int) -> None:
    """Raises InputError if a golden set is too small for tests of n images, which all share it."""
    if 5 * n > len(golden.images.labels):
        raise InputError(
            f"-n {n} needs a golden set of at least {5 * n} images, and {golden.source} has "
            f"{len(golden.images.labels)}; choose a smaller -n or draw a larger golden set"
        )


def test_served(args: argparse.Namespace, golden: Golden, network: Features, records: list, chosen: Iterable) -> tuple:
    """Judges up to args.n of the chosen served images. Returns what `judge` does."""
    store = ServedImages(Path(args.subject))
    findings, document = judge(golden, *read_served(store, chosen, golden, args.n, network), args.alpha)
    document["tables"] += [requests_table(records, args.n), votes_table(store)]
    return findings, document | {"title": f"Images served from {args.subject}"}


def report_drift(args: argparse.Namespace) -> int:
    """Judges the newest served images, or a set of pictures. Returns 1 if something is wrong."""
    network = load_features()
    golden = read_golden(args.reference, network, args.size)
    store = ServedImages(Path(args.subject))
    if store.folder.is_dir() and store.days():
        require_size(golden, args.n)
        records = served_records(store)
        findings, document = test_served(args, golden, network, records, reversed(comparable(records, golden)))
    else:
        images = read_images(args.subject, golden.images.pixels.shape[1:])
        if images.classes != golden.classes:  # different names cannot be matched
            golden.images.labels.zero_()
            images = replace(images, labels=None)
        findings, document = judge(golden, measure_dataset(network, images), 0, args.alpha)
        document["title"] = f"{args.subject} against {args.reference}"
    print(document["verdict"])
    write_report(args.out, document, args.json)
    return int(document["alarm"])


# ---- HTTP ------------------------------------------------------------------------------------------------------------


class NoRedirects(urllib.request.HTTPRedirectHandler):
    """Makes a redirect an error: it would take a token or a secret address elsewhere."""

    def redirect_request(self, *_) -> None:
        return None


def fetch(url: str, body: bytes | None = None, headers: Mapping | None = None, limit: int = 10**8) -> tuple:
    """Returns headers of a response, and up to `limit` bytes of its body. Raises OSError, HTTPException or ValueError.

    A wait for data may last 60 seconds.
    """
    opener = urllib.request.build_opener(NoRedirects)
    with opener.open(urllib.request.Request(url, body, headers or {}), timeout=60) as response:
        return response.headers, response.read(limit)


# ---- replay ----------------------------------------------------------------------------------------------------------

# Largest RMS difference, in levels of 255, between an image and its redrawn copy. With the default model, batches
# of 1 and of 4 differ by 0.01 in fp32 and by 0.6 in bf16; fp32 and bf16 differ by 0.9.
ROUNDING = {"fp32": 0.25, "bf16": 2.0, "fp16": 2.0}


class Unreachable(InputError):
    """The server gives no usable answer."""

    status = 3


def redraw_over_http(address: str, facts: dict) -> tuple[str, np.ndarray]:
    """Asks a server for the image with given facts. Returns the hash of its model, and uint8 (C, H, W)."""
    usual = {"spacing": "default", "guidance": 1}
    names = ("seed", "class", "guidance", "sampler", "steps", "spacing", "eta")
    query = {name: facts[name] for name in names if name in facts and facts[name] != usual.get(name)}
    headers = {"Authorization": f"Bearer {os.environ.get('PAPILIO_TOKEN', '').strip()}"}
    try:
        url = f"{address.rstrip('/')}/generate_sample/?{urllib.parse.urlencode(query)}"
        answer, body = fetch(url, headers=headers)
        return str(answer["X-Model-Hash"]), data.decode_png(io.BytesIO(body))[:, 2:-2, 2:-2]  # without a grid's border
    except Exception as error:  # a library's text may contain the token
        status = getattr(error, "code", type(error).__name__)
        if status == 400:
            raise ValueError("the server rejects its settings") from None
        raise Unreachable(
            f"--url {address} gave no image ({status}); check that server.py runs there, and $PAPILIO_TOKEN"
        ) from None


def difference(store: ServedImages, file: Path, facts: dict, redraw: Callable) -> str:
    """Returns how a served image differs from its redrawn copy, "" if only by rounding."""
    try:
        image = store.read(file)
        if image is None:
            return "is damaged"
        model, again = redraw(facts)
        limit = ROUNDING[facts["precision"]]
    except FileNotFoundError:  # deleted in the meantime
        return ""
    except Unreachable:
        raise
    except Exception as error:  # the line of the log is damaged: values may have any type
        return f"cannot be drawn again: {data.reason(error)}"
    if model != facts["model"]:
        return f"was made by model {facts['model'][:12]}, but was drawn again by model {model[:12]!r}"
    if again.shape != image.shape:
        return "has another size"
    rms = np.sqrt(np.square(again.astype(float) - image).mean())
    return f"differs by {rms:.1f} levels (RMS)" if rms > limit else ""


def report_replay(args: argparse.Namespace) -> int:
    """Draws served images again and compares them. Returns 1 if one differs by more than rounding."""
    store = ServedImages(Path(args.subject))
    records = served_records(store)
    if args.url:  # assume the model that made most images
        model_hash = Counter(str(facts.get("model")) for _, facts in records).most_common(1)
        model_hash = model_hash and model_hash[0][0]
    else:
        path, which = sample.find_model(args.model)
        print(which)
        load = functools.cache(partial(sample.load, path, sample.choose_device(args.device)))
        model_hash = sample.read_model(path).hash

    def redraw(facts: dict) -> tuple[str, np.ndarray]:
        if args.url:
            return redraw_over_http(args.url, facts)
        model = load(facts["precision"])
        return model.hash, sample.draw_again(model, facts).numpy()

    made_by_it = [(file, facts) for file, facts in records if facts.get("model") == model_hash]
    if not made_by_it:
        raise InputError(
            f"none of the {len(records)} images in {args.subject} was made by model {model_hash}; "
            "name their model with --model"
        )
    chosen = np.linspace(0, len(made_by_it) - 1, min(args.n, len(made_by_it))).round().astype(int)
    results = {file: difference(store, file, facts, redraw) for file, facts in (made_by_it[i] for i in chosen)}
    wrong = [f"{file} {text}" for file, text in results.items() if text]
    others = len(records) - len(made_by_it)
    print(
        *wrong,
        f"{len(results)} images drawn again, {len(wrong)} differ; {others} images of other models were skipped",
        sep="\n",
    )
    return int(bool(wrong))


# ---- watch -----------------------------------------------------------------------------------------------------------

SETTLE = 60  # seconds: younger images may still be being written
QUIET = {"drift": 3, "damaged": 3, "stale": 1, "model": 1}  # tests without an alarm that end an episode
WATCH_METRICS = {
    "papilio_watch_tests_total": "Tests of served images.",
    "papilio_watch_alarm": "1 during an episode of this kind: drift, damaged, stale or model.",
    "papilio_watch_unsent_messages": "Messages not yet delivered.",
    "papilio_watch_timestamp_seconds": "Time of the last check.",
}


def web_address(text: str) -> str:
    """Checks an address. The error does not repeat it, because the address of a webhook is secret."""
    if re.fullmatch(r"https?://[\w.-]+(:\d+)?(/[!-~]*)?", text):
        return text
    raise argparse.ArgumentTypeError("not a web address; give one like https://host/path")


def send(webhook: str, text: str) -> bool:
    """Sends a message in Slack's format, in up to three tries. Returns whether it was accepted."""
    body = json.dumps({"text": text}).encode()
    for pause in (1, 4, 0):
        try:
            fetch(webhook, body, {"Content-Type": "application/json"}, limit=0)
            return True
        except (OSError, HTTPException, ValueError) as error:  # its text may contain the address
            print(
                f"the webhook did not accept a message ({getattr(error, 'code', type(error).__name__)})",
                file=sys.stderr,
            )
            time.sleep(pause)
    return False


def update_episodes(episodes: dict, findings: dict) -> list[str]:
    """Opens and closes episodes according to findings {kind: text, "" if all is well}. Returns messages to send."""
    messages = []
    for kind, text in findings.items():
        if text:
            if kind not in episodes:
                messages.append(text)
            episodes[kind] = 0  # tests without an alarm
        elif kind in episodes:
            episodes[kind] += 1
            if episodes[kind] >= QUIET[kind]:
                del episodes[kind]
                messages.append(f"Recovered: the {kind} alarm has ended.")
    return messages


def other_models(records: list[tuple], golden: Golden) -> str:
    """Returns a sentence if some images were made by another model than the golden set, "" if none."""
    model = golden.facts.get("model")
    others = {str(facts.get("model"))[:12] for _, facts in records if model not in (None, facts.get("model"))}
    return others and f"Model: images were made by {', '.join(sorted(others))}, and the golden set by {model[:12]}."


def check_once(args: argparse.Namespace, golden: Golden, network: Features, state: dict) -> dict:
    """Checks for silence and other models, and tests the images that came since the last test, if they are enough."""
    now = time.time()
    records = [pair for pair in served_records(ServedImages(Path(args.subject))) if float(pair[1]["time"]) <= now]
    newest = float(records[-1][1]["time"]) if records else state["started"]
    stale = f"Stale: no image was saved in {args.subject} for {args.stale} h."
    findings = {"stale": stale if now - newest > args.stale * 3600 else ""}
    findings["model"] = other_models(records[-args.n :], golden)
    state["last"] = min(state["last"], now)  # the clock may have been set back
    fresh = [pair for pair in comparable(records, golden) if state["last"] < float(pair[1]["time"]) < now - SETTLE]
    if len(fresh) < args.n:
        return findings
    state |= {"last": float(fresh[-1][1]["time"]), "tests": state["tests"] + 1}
    try:
        judged, document = test_served(args, golden, network, records, reversed(fresh))
        findings |= judged
        state["history"] = [*state["history"], [now, document.get("p")]][-1000:]
        lines = {"p": state["history"]}
        document["series"] = [{"title": "Smallest adjusted p", "log": True, "time": True, "lines": lines}]
        print(document["verdict"], flush=True)
        name = "report.html"
        if document["alarm"]:
            name = time.strftime("alarm-%Y-%m-%d-%H%M%S.html", time.gmtime(now))
        write_report(args.out / name, document)
    except InputError as error:  # too few images in common classes, or a full disk
        print(f"error: {error}", file=sys.stderr)
    return findings


def read_state(file: Path, golden: Golden) -> dict:
    """Reads the state that an earlier process left, or returns a new one."""
    state = {"golden": golden.facts, "started": time.time(), "last": 0.0, "tests": 0}
    state |= {"episodes": {}, "unsent": [], "history": []}
    if not file.exists():
        return state
    kept = data.read_json(file)
    if kept.get("golden") != golden.facts or any(type(kept.get(key)) is not type(state[key]) for key in state):
        raise InputError(f"{file} is damaged, or belongs to another golden set; delete it or choose another --out")
    return kept


def report_watch(args: argparse.Namespace) -> int:
    """Checks served images at intervals and reports when alarms begin and end. Returns 1 during an episode."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    network, file = load_features(), args.out / "state.json"
    golden = read_golden(args.reference, network)
    require_size(golden, args.n)
    state, webhook = read_state(file, golden), args.webhook
    if not webhook and os.environ.get("PAPILIO_WEBHOOK"):
        try:
            webhook = web_address(os.environ["PAPILIO_WEBHOOK"].strip())
        except argparse.ArgumentTypeError as error:
            raise InputError(f"$PAPILIO_WEBHOOK: {error}") from None
    while True:
        state["unsent"] += update_episodes(state["episodes"], check_once(args, golden, network, state))
        data.write_json(file, state)  # before sending, so that a restart sends the rest
        for text in list(state["unsent"]):
            print(f"message: {text}", flush=True)
            if not webhook or send(webhook, text):
                state["unsent"].remove(text)
                data.write_json(file, state)
        numbers = {labelled("papilio_watch_alarm", kind=kind): kind in state["episodes"] for kind in QUIET}
        numbers["papilio_watch_tests_total"] = state["tests"]
        numbers["papilio_watch_unsent_messages"] = len(state["unsent"])
        numbers["papilio_watch_timestamp_seconds"] = time.time()
        write_textfile(args.out / "papilio.prom", numbers)
        if not args.every:
            return int(bool(state["episodes"]))
        time.sleep(args.every)


def write_textfile(file: Path, numbers: dict) -> None:
    """Writes metrics for the textfile collector of Prometheus' node exporter."""
    data.atomic_write(file, lambda opened: opened.write(exposition(WATCH_METRICS, numbers).encode()))


# ---- runs ------------------------------------------------------------------------------------------------------------


def report_runs(args: argparse.Namespace) -> None:
    """Compares runs: what differs between their settings, and which is the best."""
    folders = [Path(name) for name in args.subject]
    runs = []
    for folder in folders:
        try:
            runs.append(read_run(folder))
        except InputError as error:
            print(f"skipped {folder}: {error}", file=sys.stderr)
    if not runs:
        raise InputError(f"none of {', '.join(args.subject)} is a run; name folders that train.py wrote, like runs/*")
    document = compare_runs(runs, args.sort)
    (table,) = document["tables"]
    print(text_table(table["columns"], table["rows"]), document["verdict"], sep="\n")
    write_report(args.out, document, args.json)


# ---- command line ----------------------------------------------------------------------------------------------------

SUBJECT_FLAGS = [
    Flag("-n", 1000, whole(3, 1_000_000), "images to sample, or to read from SUBJECT"),
    Flag("--real", None, str, "images to compare with: folder, parquet file, Hugging Face dataset id or "
         "synthetic:COUNT:SEED (default: the run's held-out images, or new synthetic ones if it was trained on "
         "synthetic images)"),
    Flag("--train", None, str, "training images (default: those of the run)"),
    Flag("--size", None, whole(8, 1024), "scale images to N x N pixels (default: the model's size, else 64)"),
    Flag("--seed", 0, whole(0), "seed of the first sample"),
    Flag("--json", None, Path, "also write the report as JSON"),
    sample.DEVICE_FLAGS[0],
]  # fmt: skip
QUALITY_FLAGS = {
    "quality": [
        *SUBJECT_FLAGS,
        Flag("--inception", None, str, "also measure FID and the Inception score, with the weights in this file; auto: "
             "those that pytorch-fid left in torch's cache", {"metavar": "PATH"}),
        Flag("--out", Path("quality.html"), Path, "report to write"),
    ],
}  # fmt: skip
MEMORISED_FLAGS = {"memorised": [*SUBJECT_FLAGS, Flag("--out", Path("memorised.html"), Path, "report to write")]}
REFERENCE_FLAGS = {
    "golden set": [
        sample.MODEL_FLAG,
        Flag(
            "-n",
            1280,
            whole(5 * LEAST, 100_000),
            "images to draw; a fifth calibrates the tests, served images are compared with the rest",
        ),
        Flag("--out", Path("reference"), Path, "folder to write"),
        *sample.DRAW_FLAGS[3:],
        *sample.DEVICE_FLAGS,
    ],
}
LOOK_FLAGS = [
    Flag("--reference", "reference", str, "golden set: folder written by `monitor.py reference`, or any pictures"),
    Flag("-n", 256, whole(LEAST, 10_000), "number of newest served images to test"),
]  # fmt: skip
ALPHA = "false-alarm rate: share of tests that raise an alarm although nothing has changed"
DRIFT_FLAGS = {
    "drift": [
        *LOOK_FLAGS,
        Flag("--alpha", 0.01, real(1e-4, 0.5), ALPHA),
        Flag("--size", None, whole(8, 1024), "scale pictures to N x N pixels, if the golden set is not from "
             "`monitor.py reference` (default: 64)"),
        Flag("--out", Path("drift.html"), Path, "report to write"),
        Flag("--json", None, Path, "also write the report as JSON"),
    ],
}  # fmt: skip
REPLAY_FLAGS = {
    "replay": [
        Flag("-n", 32, whole(1, 100_000), "images to draw again, evenly spaced from the oldest to the newest"),
        Flag("--url", None, web_address, "let this server draw them, with the token in $PAPILIO_TOKEN (default: draw "
             "them here)", {"metavar": "URL"}),
        sample.MODEL_FLAG,
        sample.DEVICE_FLAGS[0],
    ],
}  # fmt: skip
WATCH_FLAGS = {
    "watch": [
        *LOOK_FLAGS,
        Flag("--alpha", 0.001, real(1e-4, 0.5), ALPHA),
        Flag("--every", 3600, whole(0, 10**6), "seconds between checks; 0: check once and exit"),
        Flag("--stale", 24, whole(1, 10_000), "hours without a new image that raise an alarm"),
        Flag("--webhook", None, web_address, "send messages to this address, in Slack's format "
             "(default: $PAPILIO_WEBHOOK)", {"metavar": "URL"}),
        Flag("--out", Path("watch"), Path, "folder for reports, state and papilio.prom (metrics for Prometheus)"),
    ],
}  # fmt: skip


SERVED = "folder that `server.py --save` writes"
COMPARE_FLAGS = {
    "compare": [
        Flag("--sort", "held_out_loss", ("held_out_loss", "kid", "loss"), "ranks runs by their lowest value of this"),
        Flag("--out", Path("compare.html"), Path, "report to write"),
        Flag("--json", None, Path, "also write the report as JSON"),
    ],
}


COMMANDS = {  # name: (function, what it does, its subject, its flags)
    "quality": (
        report_quality,
        "measures how close images are to real ones: KID, FD, precision, recall, density, coverage; FID if asked",
        "run, model folder, or images as for --real (default: the newest run, or the default model)",
        QUALITY_FLAGS,
    ),
    "memorised": (
        report_memorised,
        "looks for copies of training images; the exit status is 1 if the model has memorised some",
        "run, model folder, or images as for --train (default: the newest run, or the default model)",
        MEMORISED_FLAGS,
    ),
    "compare": (
        report_runs,
        "compares runs: curves, the settings that differ, the best of each",
        "folders of runs, like runs/*",
        COMPARE_FLAGS,
    ),
    "reference": (
        make_reference,
        "draws the golden set of a model, that drift and watch compare images with",
        None,
        REFERENCE_FLAGS,
    ),
    "drift": (
        report_drift,
        "tests whether images still look like a golden set; exit status 1 if not, or if more than 1% are damaged",
        f"{SERVED}, or any pictures (folder, parquet file, dataset)",
        DRIFT_FLAGS,
    ),
    "replay": (
        report_replay,
        "draws served images again and compares the pixels; the exit status is 1 if they differ",
        SERVED,
        REPLAY_FLAGS,
    ),
    "watch": (
        report_watch,
        "tests for drift at intervals, and sends a message when an alarm begins and when it ends",
        SERVED,
        WATCH_FLAGS,
    ),
}


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = data.Parser("monitor.py", "Evaluate and watch images and models.", __doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (work, text, subject, flags) in COMMANDS.items():
        command = commands.add_parser(name, help=text.replace("%", "%%"), description=text, docstring=__doc__)
        command.set_defaults(work=work)
        if subject:
            nargs = {"quality": "?", "memorised": "?", "compare": "+"}.get(name)
            command.add_argument("subject", nargs=nargs, metavar="SUBJECT", help=subject)
        data.add_flags(command, flags)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    sample.set_threads()
    try:
        return data.exit_status(lambda: args.work(args))
    except Exception:  # Python would exit with 1, which means drift
        traceback.print_exc()
        return 3


if __name__ == "__main__":
    sys.exit(main())
