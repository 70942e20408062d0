"""Measures how often `monitor.py drift` raises an alarm, without and with drift, beside Evidently's rule.

    python -m benchmarks.watch                                   everything: two hours on two cores
    python -m benchmarks.watch --only calibration,power          some parts
    python -m benchmarks.watch --photographs FOLDER --run runs/NAME     also on photographs, and with weights of a run

Images are drawn once, with the default model, and kept in --images; the sets of a look are random choices of them that
share no image. The shifts and their three severities were fixed before anything was measured.
"""

import copy
import io
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from statistics import fmean, median

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import data
import ddpm
import monitor
import sample
import unet
from benchmarks import common

FIT, COMPARED = 256, 1024
SIZES = (64, 128, 256)
LOOKS = 20
NULL_LOOKS = 200
ALPHA = 0.01
COARSE = 0.04  # 999 permutations: enough for an adjusted p of 0.01, and four times as fast
TESTS = ("features", "statistics", "duplicates")


# ---- shifts: uint8 (N, 3, H, W) and a severity in, the same out ------------------------------------------------------


def levels(x: Tensor) -> Tensor:
    return x.round().clamp(0, 255).to(torch.uint8)


def some(images: Tensor, share: float) -> Tensor:
    """Which images are affected: bool (N, 1, 1, 1)."""
    return (torch.rand(len(images), generator=data.generator("some")) < share).view(-1, 1, 1, 1)


def blur(images: Tensor, sigma: float) -> Tensor:
    kernel = torch.exp(-(torch.arange(-4, 5.0) ** 2) / (2 * sigma**2))
    kernel = kernel / kernel.sum()
    flat = F.pad(images.float().flatten(0, 1)[:, None], (4, 4, 4, 4), mode="replicate")
    return levels(F.conv2d(F.conv2d(flat, kernel.view(1, 1, 1, 9)), kernel.view(1, 1, 9, 1)).view(images.shape))


def cast(images: Tensor, amount: float) -> Tensor:
    return levels(images.float() + torch.tensor([amount, 0.0, -amount]).view(3, 1, 1))


def noise(images: Tensor, std: float) -> Tensor:
    return levels(images.float() + std * torch.randn(images.shape, generator=data.generator("noise")))


def collapse(images: Tensor, share: float) -> Tensor:
    """A share of the images becomes copies of four, with noise of one level."""
    chosen = torch.randint(4, (len(images),), generator=data.generator("collapse"))
    return torch.where(some(images, share), noise(images[:4][chosen], 1), images)


def swapped_colours(images: Tensor, share: float) -> Tensor:
    return torch.where(some(images, share), images.flip(1), images)


def raised_black(images: Tensor, share: float) -> Tensor:
    """A wrong range: -1..1 is taken for something narrower."""
    return levels(images.float() * (1 - share) + 255 * share)


def black(images: Tensor, share: float) -> Tensor:
    return torch.where(some(images, share), torch.zeros_like(images), images)


def jpeg(images: Tensor, quality: float) -> Tensor:
    found = []
    for image in images:
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(file := io.BytesIO(), "JPEG", quality=int(quality))
        found.append(torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1))
    return torch.stack(found)


SHIFTS = {
    "blur, pixels": (blur, (0.4, 0.7, 1.0)),
    "colour cast, levels": (cast, (4, 8, 16)),
    "noise, levels": (noise, (3, 6, 12)),
    "mode collapse, share": (collapse, (0.1, 0.25, 0.5)),
    "RGB as BGR, share": (swapped_colours, (0.1, 0.33, 1)),
    "wrong range, share": (raised_black, (0.05, 0.15, 0.5)),
    "black images, share": (black, (0.01, 0.03, 0.1)),
    "JPEG, quality": (jpeg, (75, 50, 25)),
}
STEPS = (5, 3, 1)  # instead of 10
RAW = (0.5, 1.0, 1.5)  # how far from the averaged weights to the raw ones
EARLY = (0.75, 0.5, 0.25)  # of the steps of training


# ---- images ----------------------------------------------------------------------------------------------------------


@cache
def network() -> monitor.Features:
    return monitor.load_features()


def measured(images: Tensor, labels: Tensor) -> monitor.Measured:
    return monitor.measure(network(), images, labels.tolist(), [""] * len(images))


def join(parts: Sequence[monitor.Measured]) -> monitor.Measured:
    fields = ("pixels", "labels", "features", "statistics")
    joined = {name: torch.cat([getattr(part, name) for part in parts]) for name in fields}
    return monitor.Measured(**joined, names=np.concatenate([part.names for part in parts]))


@dataclass
class Drawer:
    """Draws images of a model and keeps them in a folder, for this run and later ones."""

    folder: Path
    model: sample.Model

    def __call__(self, name: str, count: int, first: int, steps: int | None = None, size: int = 32) -> monitor.Measured:
        """Returns images with seeds from `first` on, whose class is the seed modulo the number of classes."""
        file, classes = self.folder / f"{name}.pt", self.model.network.config.class_count
        seeds = range(first, first + count)
        labels = [seed % classes if classes else None for seed in seeds]
        if not file.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            table = ddpm.sampler_table(self.model.schedule, steps=steps)
            images = []
            for start in tqdm(range(0, count, size), desc=name, disable=None):
                part = slice(start, start + size)
                images.append(sample.draw(self.model, seeds[part], table, labels[part], batch_size=size))
            torch.save(torch.cat(images), file)
        return measured(torch.load(file), torch.tensor([label or 0 for label in labels]))


# ---- looks -----------------------------------------------------------------------------------------------------------


@dataclass
class Sets:
    """Golden images, and unaltered current ones that share no seed with them."""

    golden: monitor.Measured
    fresh: monitor.Measured
    fit: int = FIT
    compared: int = COMPARED

    def looks(self, current: monitor.Measured, n: int, count: int) -> list[dict]:
        """Judges `count` random choices of n images, each against another random golden set: adjusted p-values."""
        found = []
        for i in range(count):
            random = data.generator("look", n, i)
            golden = self.golden.rows(torch.randperm(len(self.golden.labels), generator=random))
            chosen = current.rows(torch.randperm(len(current.labels), generator=random)[:n])
            fit, compared = golden.rows(slice(self.fit)), golden.rows(slice(self.fit, self.fit + self.compared))
            found.append(monitor.holm(monitor.compare(fit, compared, chosen, COARSE)[0]))
        return found


def rejected(looks: list[dict], alpha: float = ALPHA, names: Sequence[str] = TESTS) -> float:
    """Returns the share of looks in which one of these tests raises an alarm."""
    return sum(min(look[name] for name in names) <= alpha for look in looks) / len(looks)


def auc(shifted: list[dict], null: list[dict]) -> float:
    """Returns the probability that a shifted look has the smaller p, ties counted half."""
    a, b = (np.array([min(look.values()) for look in part]) for part in (shifted, null))
    return float((a[:, None] < b).mean() + 0.5 * (a[:, None] == b).mean())


def power_rows(sets: Sets, altered: dict, sizes: Sequence[int]) -> list[list[str]]:
    """Returns a row for each {shift and severity: images}: power and AUC for each size, and power of single tests."""
    null = {n: sets.looks(sets.fresh, n, NULL_LOOKS) for n in sizes}
    rows = []
    for name, images in {"none": None, **altered}.items():
        row, looks = [name], null
        if images is not None:
            looks = {n: sets.looks(images, n, LOOKS) for n in sizes}
        for n in sizes:
            row.append(f"{rejected(looks[n]):.2f} / {auc(looks[n], null[n]):.2f}")
        row += [f"{rejected(looks[sizes[-1]], names=[test]):.2f}" for test in TESTS]
        print("|", " | ".join(row), "|", flush=True)
        rows.append(row)
    head = ["shift", *(f"{n} images" for n in sizes), *(f"{test} alone" for test in TESTS)]
    return common.table(head, rows)


def altered_sets(fresh: monitor.Measured) -> dict:
    return {
        f"{name} {severity:g}": measured(shift(fresh.pixels, severity), fresh.labels)
        for name, (shift, severities) in SHIFTS.items()
        for severity in severities
    }


# ---- rows ------------------------------------------------------------------------------------------------------------


@dataclass
class Study:
    """What the parts of the benchmark need."""

    draw: Drawer
    sets: Sets
    run: Path | None
    photographs: Path | None


def binomial_bound(trials: int, rate: float) -> float:
    """Returns the share that a rate stays below in 99% of experiments."""
    chances = [math.comb(trials, k) * rate**k * (1 - rate) ** (trials - k) for k in range(trials + 1)]
    return next(k for k in range(trials + 1) if sum(chances[: k + 1]) >= 0.99) / trials


def calibration(study: Study) -> list[str]:
    """False alarms of fresh golden sets against fresh current ones."""
    pool = join([study.sets.golden, study.sets.fresh])
    rows = []
    for n in SIZES:
        found = []
        for i in range(NULL_LOOKS):
            order = torch.randperm(len(pool.labels), generator=data.generator("pair", n, i))
            fit, compared, current = order[: FIT + COMPARED + n].split([FIT, COMPARED, n])
            found.append(
                monitor.holm(monitor.compare(*(pool.rows(part) for part in (fit, compared, current)), ALPHA)[0])
            )
        row = [str(n)]
        for alpha in (0.05, 0.01):
            row.append(f"{rejected(found, alpha):.3f} (bound {binomial_bound(NULL_LOOKS, alpha):.3f})")
        rows.append([*row, f"{median(min(look.values()) for look in found):.2f}"])
        print("|", " | ".join(rows[-1]), "|", flush=True)
    return common.table(["images", "rejected at 0.05", "rejected at 0.01", "median smallest p"], rows)


def spread(study: Study) -> list[str]:
    """False alarms of `watch` for single golden sets, which all looks share: 20 golden sets x 200 looks."""
    pool, rates = join([study.sets.golden, study.sets.fresh]), {0.05: [], 0.01: []}
    for i in range(20):
        order = torch.randperm(len(pool.labels), generator=data.generator("golden", i))
        fit, compared, rest = order.split([FIT, COMPARED, len(order) - FIT - COMPARED])
        found = []
        for k in range(NULL_LOOKS):
            chosen = rest[torch.randperm(len(rest), generator=data.generator("look", i, k))[:256]]
            parts = [pool.rows(part) for part in (fit, compared, chosen)]
            found.append(monitor.holm(monitor.compare(*parts, 0.1)[0]))  # 399 permutations
        for alpha in rates:
            rates[alpha].append(rejected(found, alpha))
        print(f"golden set {i}: {rates[0.05][-1]:.3f} at 0.05, {rates[0.01][-1]:.3f} at 0.01", flush=True)
    rows = [
        [f"{alpha:g}", *(f"{pick(found):.3f}" for pick in (min, median, fmean, max))] for alpha, found in rates.items()
    ]
    return common.table(["alpha", "minimum", "median", "mean", "maximum"], rows)


def power(study: Study) -> list[str]:
    """Power at 0.01 / AUC of the smallest p. The last columns are the power of single tests, at the largest size."""
    sets, draw = study.sets, study.draw
    altered = altered_sets(sets.fresh)
    altered |= {f"{steps} steps instead of 10": draw(f"steps{steps}", 512, 2 * 10**9, steps) for steps in STEPS}
    return power_rows(sets, altered, SIZES)


def controls(study: Study) -> list[str]:
    """What must not raise an alarm, and bfloat16, which is stated as it comes out."""
    sets, draw = study.sets, study.draw
    half = replace(draw, model=sample.load(draw.model.folder.parent, precision="bf16"))
    pixels, n = sets.fresh.pixels[:512], 64
    encoded = [data.encode_png(data.grid(image[None], padding=0)) for image in pixels]
    decoded = torch.stack([torch.from_numpy(data.decode_png(io.BytesIO(png)).copy()) for png in encoded])
    order = torch.randperm(len(pixels), generator=data.generator("order"))
    current = {
        "new seeds": sets.fresh.rows(slice(512)),
        "PNG encoded again": measured(decoded, sets.fresh.labels[:512]),
        "another order": sets.fresh.rows(order),
        "batches of 5": draw("batch5", 160, 5 * 10**9, size=5),
        "bf16": half("bf16", 96, 5 * 10**9),
    }
    rows = [[name, f"{rejected(sets.looks(images, n, LOOKS)):.2f}"] for name, images in current.items()]
    return common.table(["control", f"share of {LOOKS} looks at {n} images that are rejected at {ALPHA}"], rows)


def weights_of(run: Path) -> dict:
    """Returns {shift: network} of a run: raw weights, and averaged ones of earlier checkpoints."""
    files = sorted(run.glob("checkpoint-*.pt"))
    saved = [torch.load(io.BytesIO(file.read_bytes()[:-32]), weights_only=True) for file in files]
    last, found = saved[-1], {}
    for amount in RAW:
        raw, ema = last["network"], last["ema"]
        found[f"raw weights, {amount:g} of the way"] = {name: ema[name].lerp(raw[name], amount) for name in ema}
    for share in EARLY:
        early = next(part for part in saved if part["step"] == round(share * last["step"]))
        found[f"checkpoint after {share:g} of the steps"] = early["ema"]
    return found


def checkpoints(study: Study) -> list[str]:
    """Raw weights instead of averaged ones, and earlier checkpoints."""
    run = study.run
    final = sample.read_model(run)
    draw = Drawer(study.draw.folder / run.name, sample.load(run))
    sets = Sets(draw("golden", FIT + COMPARED + 512, 10**9), draw("fresh", 768, 3 * 10**9))
    altered = {}
    for name, weights in weights_of(run).items():
        network = copy.deepcopy(final.network)
        network.load_state_dict(weights)
        network = unet.for_drawing(network, torch.device("cpu"), torch.float32)
        altered[name] = replace(draw, model=replace(final, network=network))(name, 384, 4 * 10**9)
    return power_rows(sets, altered, SIZES)


def photographs(study: Study) -> list[str]:
    """The same shifts on photographs: one half is the golden set, choices from the other half are current."""
    images = monitor.measure_dataset(network(), monitor.read_images(str(study.photographs), (3, 64, 64)))
    order = torch.randperm(len(images.labels), generator=data.generator("halves"))
    halves = [images.rows(part) for part in order.split(len(order) // 2)]
    fit = len(order) // 10
    sets = Sets(*halves[:2], fit=fit, compared=len(order) // 2 - fit)
    return power_rows(sets, altered_sets(sets.fresh), SIZES)


def drifted_share(golden: Tensor, current: Tensor) -> float:
    """Returns the share of columns that Evidently's preset calls drifted, with more than 1,000 golden rows.

    It is the share whose Wasserstein distance, in standard deviations of the golden column, is at least 0.1.
    """
    from scipy.stats import wasserstein_distance

    pairs = zip(golden.T.numpy(), current.T.numpy(), strict=True)
    return float(np.mean([wasserstein_distance(a, b) / max(np.std(a), 1e-3) >= 0.1 for a, b in pairs]))


def evidently_share(golden: Tensor, current: Tensor) -> float:
    """Returns what Evidently itself says."""
    import pandas
    from evidently import Report
    from evidently.presets import DataDriftPreset

    frames = [
        pandas.DataFrame(part.numpy(), columns=[f"f{i}" for i in range(part.shape[1])]) for part in (current, golden)
    ]
    return Report([DataDriftPreset()]).run(*frames).dict()["metrics"][0]["value"]["share"]


def evidently(study: Study) -> list[str]:
    """The rule of Evidently's data-drift preset, half of the columns drifted, on the same features and looks."""
    sets, shares = study.sets, {}

    def judge(name: str, current: Tensor, n: int, count: int, golden: Tensor = sets.golden.features) -> None:
        shares[name] = []
        for i in range(count):
            random = data.generator("look", n, i)
            rows = torch.randperm(len(golden), generator=random)[FIT : FIT + COMPARED]
            pair = golden[rows], current[torch.randperm(len(current), generator=random)[:n]]
            shares[name].append(drifted_share(*pair))
            if name == "none, 64 images" and i == 0:
                assert evidently_share(*pair) == shares[name][0]

    for n in SIZES:
        judge(f"none, {n} images", sets.fresh.features, n, NULL_LOOKS)
    real = monitor.measure_dataset(network(), monitor.read_images("synthetic:1500", (3, 64, 64)))
    judge("none, 256 images, training images instead of golden ones", sets.fresh.features, 256, LOOKS, real.features)
    altered = altered_sets(sets.fresh)
    altered |= {f"{steps} steps instead of 10": study.draw(f"steps{steps}", 512, 2 * 10**9, steps) for steps in STEPS}
    for name, images in altered.items():
        judge(name, images.features, 256, LOOKS)
    limit = sorted(shares["none, 256 images"])[-max(1, round(ALPHA * NULL_LOOKS))]
    rows = []
    for name, found in shares.items():
        rows.append([name, f"{np.mean(np.array(found) >= 0.5):.2f}", f"{np.mean(np.array(found) > limit):.2f}"])
    head = ["shift", "preset: half of the columns", "more columns than in 99% of looks at 256 images without a shift"]
    return common.table(head, rows)


def cost(study: Study) -> list[str]:
    """Wall-clock time and memory of `monitor.py drift` with 1,000 images against 1,000, in a process of its own."""
    images = torch.cat([torch.load(study.draw.folder / f"pool{i}.pt") for i in range(2)])[:2000]
    with tempfile.TemporaryDirectory() as temporary:
        for i, image in enumerate(images):
            data.write_png(Path(temporary) / "ab"[i % 2] / f"{i}.png", data.grid(image[None], padding=0))
        command = [sys.executable, "monitor.py", "drift", f"{temporary}/a", "--reference", f"{temporary}/b"]
        rows = []
        for _ in range(3):
            begin = time.perf_counter()
            environment = os.environ | {"PAPILIO_CACHE": f"{temporary}/cache"}
            subprocess.run([*command, "--out", f"{temporary}/drift.html"], cwd=common.ROOT, env=environment)
            rows.append(time.perf_counter() - begin)
    memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    return [f"Seconds: minimum {min(rows):.1f}, median {median(rows):.1f}, n {len(rows)}; at most {memory:.2f} GiB."]


PARTS = {
    "calibration": calibration,
    "spread": spread,
    "power": power,
    "controls": controls,
    "checkpoints": checkpoints,
    "photographs": photographs,
    "evidently": evidently,
    "cost": cost,
}


def parser() -> common.Parser:
    flags = common.Parser("watch", __doc__)
    flags.add_argument(
        "--only",
        type=common.some_of(PARTS),
        default=list(PARTS),
        metavar="PARTS",
        help=f"parts separated by commas: {', '.join(PARTS)} (default: all that have what they need)",
    )
    flags.add_argument(
        "--images",
        type=Path,
        default=common.ROOT / "runs/benchmarks/watch-images",
        metavar="FOLDER",
        help="where drawn images are kept (default: runs/benchmarks/watch-images)",
    )
    flags.add_argument("--photographs", type=Path, metavar="FOLDER", help="folder of photographs")
    text = "finished run that kept its checkpoints after 1/4, 1/2 and 3/4 of its steps"
    flags.add_argument("--run", type=Path, metavar="FOLDER", help=text)
    return flags


def main() -> None:
    flags = parser()
    args = flags.parse_args()
    missing = {name for name, given in (("checkpoints", args.run), ("photographs", args.photographs)) if not given}
    names = [name for name in args.only if name not in missing]
    if "evidently" in names:
        flags.require(["evidently", "scipy"])
    sample.set_threads()
    results = common.Results(flags, args)
    draw = Drawer(args.images, sample.load(sample.DEFAULT_MODEL))
    golden = join([draw("pool0", 1536, 10**9), draw("pool1", 1536, 3 * 10**9)])
    study = Study(draw, Sets(golden, draw("pool2", 1536, 4 * 10**9)), args.run, args.photographs)
    lines = []
    for name in names:
        print(name, flush=True)
        heading = " ".join(PARTS[name].__doc__.split())
        lines += [f"## {name}", "", heading, "", *PARTS[name](study), ""]
        results.write(".md", "\n".join([*lines, common.described(common.machine()), ""]))
    results.finish()


if __name__ == "__main__":
    main()
