"""Images or runs in, verdicts out.

    python monitor.py quality                            draws from the newest run, against images it has not seen
    python monitor.py quality photos/ --real other/      any images against any others

Everything is measured on the features of a small network of our own (`Features`), which was trained once on drawn
butterflies and never changes: numbers are comparable between runs, and with no other "FID" or "KID".
"""

import argparse
import hashlib
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import data
import ddpm
import sample
import unet
from data import InputError

SCHEMA = 1  # of the JSON that is written

# ---- features --------------------------------------------------------------------------------------------------------

FEATURES = Path(__file__).parent / "weights/features.safetensors"
FEATURES_HASH = "a3daaf4402247b69d568ca1730fa2f0524006d7d2ef808b7127dc9ce8bc2840d"


class Features(nn.Module):
    """uint8 images (N, 1 or 3, H, W) of any size -> float32 (N, 128), of mean 0 and deviation 1 on drawn butterflies.

    `weights/features.py` trained it to tell the families of drawn butterflies apart and to say how they had been
    damaged. It looks at 64 x 64 pixels: of larger images it does not see the finest detail."""

    SIDE = 64
    LAYERS = ((32, 1), (48, 2), (64, 1), (96, 2), (96, 1), (128, 2), (128, 1))  # channels, stride

    def __init__(self):
        super().__init__()
        widths = [3, *(width for width, _ in self.LAYERS)]
        self.convs = nn.ModuleList(
            nn.Conv2d(before, width, 3, stride, padding=1)
            for before, (width, stride) in zip(widths, self.LAYERS, strict=False)
        )
        self.register_buffer("mean", torch.zeros(widths[-1]))
        self.register_buffer("std", torch.ones(widths[-1]))

    def forward(self, images: Tensor) -> Tensor:
        h = data.to_float(images).expand(-1, 3, -1, -1)
        if h.shape[2:] != (self.SIDE, self.SIDE):
            h = F.interpolate(h, (self.SIDE, self.SIDE), mode="bilinear", antialias=True)
        for conv in self.convs:
            h = F.relu(conv(h))
        return (h.mean((2, 3)) - self.mean) / self.std


def load_features() -> Features:
    """The pinned extractor. InputError where its file is missing or is not the one that this version was made with."""
    with data.disk_errors(f"read {FEATURES}"):
        found = hashlib.sha256(FEATURES.read_bytes()).hexdigest()
    if found != FEATURES_HASH:
        raise InputError(f"{FEATURES} is not the file of this version; restore it, or no two numbers are comparable")
    network = Features()
    network.load_state_dict({name: tensor.float() for name, tensor in unet.read_safetensors(FEATURES).items()})
    return network.to(memory_format=torch.channels_last).eval().requires_grad_(False)


def features_of(network: Features, images: Tensor) -> Tensor:
    """uint8 (N, C, H, W) -> float64 (N, 128)."""
    return torch.cat([network(part) for part in images.split(64)]).double()


# ---- statistics ------------------------------------------------------------------------------------------------------


def kid(x: Tensor, y: Tensor) -> tuple[float, float]:
    """Kernel distance of two sets of features (N, d) and (M, d), and its standard error.

    The unbiased estimate of MMD^2 with the kernel (x.y/d + 1)^3 (Binkowski et al. 2018, section 4), from all pairs
    rather than subsets; below 0 by chance where the sets are alike. The standard error is the jackknife's: each
    image of either set left out in turn (Arvesen 1969); it is of the images alone, not of a training's luck, and a
    third too large where the sets are alike. ValueError for fewer than 3 images."""
    m, n = len(x), len(y)
    if min(m, n) < 3:
        raise ValueError(f"a kernel distance needs at least 3 images on each side, not {m} and {n}")

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / a.shape[1] + 1) ** 3

    def row_sums(a: Tensor, b: Tensor) -> Tensor:
        return torch.cat([kernel(part, b).sum(1) for part in a.split(1024)])

    def on_itself(a: Tensor) -> Tensor:  # without the kernel of an image and itself
        return row_sums(a, a) - ((a * a).sum(1) / a.shape[1] + 1) ** 3

    xx, yy, xy, yx = on_itself(x), on_itself(y), row_sums(x, y), row_sums(y, x)
    within_x, within_y, between = xx.sum(), yy.sum(), xy.sum()
    value = within_x / (m * (m - 1)) + within_y / (n * (n - 1)) - 2 * between / (m * n)
    without_x = (within_x - 2 * xx) / ((m - 1) * (m - 2)) - 2 * (between - xy) / ((m - 1) * n)
    without_y = (within_y - 2 * yy) / ((n - 1) * (n - 2)) - 2 * (between - yx) / (m * (n - 1))
    variance = sum((len(part) - 1) * part.var(correction=0) for part in (without_x, without_y))
    return float(value), float(variance.sqrt())


def frechet_distance(x: Tensor, y: Tensor) -> float:
    """Of the Gaussians with the means and covariances of two sets of features (N, d) (Heusel et al. 2017, eq. 6).
    Biased upwards by about 1/N: comparable for equal numbers of images only. Meaningless unless N is above d."""
    covariances = x.T.cov(), y.T.cov()
    values, vectors = torch.linalg.eigh(covariances[0])
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ covariances[1] @ root).clamp(min=0).sqrt().sum()
    traces = sum(covariance.trace() for covariance in covariances)
    return max(0.0, float((x.mean(0) - y.mean(0)).square().sum() + traces - 2 * cross))


# Of 500 drawn butterflies, and of 100 photographs of butterflies, that had been held out none is a near-copy by this
# measure; of training images with noise of 8 levels 94% and 100% are.
NEIGHBOURS, NEAR = 50, 1 / 3
SAME = 2.0  # levels; a copy even where the training set has the image many times


def near_copies(images: Tensor, training: Tensor) -> Tensor:
    """Which images (N, C, H, W) are near-copies of training images (M, C, H, W), uint8 both -> bool (N,).

    An image is one if its nearest training image, mirrored or not, is less than a third as far as the median of its 50
    nearest: so plain images, which lie close to many, are not accused (Carlini et al. 2023, section 5.1). Distances
    are RMS over pixels, at 32 x 32 where images are larger. Copies that were moved or darkened are not found."""

    def flat(levels: Tensor) -> Tensor:
        levels = levels.float()
        return (F.adaptive_avg_pool2d(levels, 32) if min(levels.shape[2:]) > 32 else levels).flatten(1)

    both = [flat(training), flat(training.flip(-1))]
    found = []
    for part in images.split(256):
        part = flat(part)
        distances = torch.minimum(*(torch.cdist(part, side) for side in both))  # (n, M)
        nearest = distances.topk(min(NEIGHBOURS, len(training)), largest=False).values
        limit = (NEAR * nearest.median(dim=1).values).clamp(min=SAME * part.shape[1] ** 0.5)
        found.append(nearest[:, 0] < limit)
    return torch.cat(found)


# ---- quality ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Quality:
    """How far a set of images is from a real one."""

    images: int  # N
    real: int  # images of the real set
    kid: float
    kid_low: float  # of the 95% interval
    kid_high: float
    fd: float | None  # none where either set has too few images for one
    near_copies: int | None  # of training images, where these are known

    def __str__(self) -> str:
        text = f"N {self.images}  KID {self.kid:.4f} ({self.kid_low:.4f} to {self.kid_high:.4f})"
        text += "  FD -" if self.fd is None else f"  FD {self.fd:.2f}"
        if self.near_copies is None:
            return text
        return f"{text}  near-copies {self.near_copies} ({self.near_copies / self.images:.1%})"


def quality(network: Features, images: Tensor, real: Tensor, training: Tensor | None = None) -> Quality:
    """uint8 (N, C, H, W) images against real ones and, for near-copies, those trained on."""
    x, y = features_of(network, images), features_of(network, real)
    value, error = kid(x, y)
    copies = None if training is None else int(near_copies(images, training).sum())
    bounds = value - 1.96 * error, value + 1.96 * error
    fd = frechet_distance(x, y) if min(x.shape[0], y.shape[0]) > x.shape[1] else None
    return Quality(len(images), len(real), value, *bounds, fd, copies)


FRESH = "drawn:4096:2147483648"  # butterflies that no run is trained on unless it asks for this seed


@dataclass(frozen=True)
class Images:
    """Images of one size, where they come from and, where they have classes, these."""

    source: str
    fingerprint: str
    pixels: Tensor  # uint8 (N, C, H, W)
    labels: Tensor | None
    classes: tuple[str, ...]


def take(dataset: data.Dataset, rows: slice | Sequence[int] = slice(None)) -> Images:
    labels = None if dataset.labels is None else torch.from_numpy(dataset.labels[rows])
    pixels = torch.from_numpy(dataset.images[rows])
    return Images(dataset.source, dataset.fingerprint, pixels, labels, dataset.classes)


def is_drawn(source: str) -> bool:
    return source.partition(":")[0] == "drawn"


def some(images: Images, count: int) -> Images:
    """At most `count` of the images, at random; of drawn butterflies at most half. Those have their families in turn,
    so that all of them hold fewer pairs of one family than a random set, and KID would be biased downwards: families
    are chosen by chance, and from each as many images as it was chosen times."""
    random = data.generator("some", images.source)
    if is_drawn(images.source):
        families = len(images.classes)
        times = torch.randint(families, (min(count, len(images.pixels) // 2),), generator=random).bincount()
        rows = torch.cat([(images.labels == k).nonzero()[:, 0][:number] for k, number in enumerate(times)])
    else:
        rows = torch.randperm(len(images.pixels), generator=random)[:count]
    return replace(images, pixels=images.pixels[rows], labels=None if images.labels is None else images.labels[rows])


def fresh(shape: tuple[int, int, int]) -> Images:
    """Drawn butterflies (channels, height, width) that no run was trained on, their families by chance."""
    return some(take(data.prepare(FRESH, shape[1], channels=shape[0])), 2000)


def images_of_run(run: Path, shape: tuple[int, int, int]) -> tuple[Images, Images]:
    """What a run was trained on, and images it has not seen: fresh drawn ones, or those that were held out."""
    config = sample.read_json(run / "config.json")
    settings, kept = config.get("settings"), config.get("data")
    if not isinstance(settings, dict) or not isinstance(kept, dict) or not isinstance(kept.get("source"), str):
        raise InputError(f"{run / 'config.json'} is no config.json of a run; name images with --real")
    dataset = data.prepare(kept["source"], shape[1], channels=shape[0], revision=settings.get("revision"))
    if dataset.fingerprint != kept.get("fingerprint"):
        raise InputError(
            f"{kept['source']}: the data are no longer those of {run}; name others with --real and --train"
        )
    rows, held_out = data.split(dataset)
    return take(dataset, rows), fresh(shape) if is_drawn(kept["source"]) else take(dataset, held_out)


def draw(model: sample.Model, seed: int, count: int, real: Images, table: Tensor | None = None) -> Tensor:
    """`count` images as sample.py draws them when nothing is said, or by a table of `ddpm.plan`; of a model with
    classes, these as often as the real images have them, or equally often where those have others."""
    config, labels = model.network.config, None
    if config.class_count:
        known = real.labels if real.classes == config.class_names else torch.arange(config.class_count)
        labels = known[torch.randint(len(known), (count,), generator=data.generator("classes", seed))].tolist()
    table, drawn = ddpm.plan(model.schedule) if table is None else table, []
    for start in tqdm(range(0, count, 32), desc="drawing", unit="batch", disable=None):
        seeds = range(seed + start, seed + min(start + 32, count))
        part = None if labels is None else labels[start : start + len(seeds)]
        drawn.append(sample.draw(model, seeds, table, part, batch_size=32))
    return torch.cat(drawn)


def is_model(path: Path) -> bool:
    return any((path / name).exists() for name in ("model", "unet", "config.json"))


def open_subject(args: argparse.Namespace) -> tuple[Tensor, Images, Images | None, dict]:
    """The images to judge, real ones, those trained on where they are known, and what made the images."""
    path = Path(args.subject) if args.subject else sample.newest_run()
    model, shape = None, (3, args.size or 64, args.size or 64)
    if is_model(path):
        device = sample.choose_device(args.device)
        model = sample.load(path, device, sample.choose_precision(device))
        shape = model.shape
        if shape[1] != shape[2] or args.size not in (None, shape[1]):
            raise InputError(f"{path}: its images are {shape[2]} x {shape[1]}; square ones are compared, as they are")
    else:
        images = take(data.prepare(args.subject, shape[1], channels=shape[0]))
    real = training = None
    if (path / "metrics.jsonl").exists() and not (args.real and args.train):
        training, real = images_of_run(path, shape)
    if args.train:
        training = take(data.prepare(args.train, shape[1], channels=shape[0]))
    if args.real:
        real = take(data.prepare(args.real, shape[1], channels=shape[0]))
        real = some(real, len(real.pixels))
    elif real is None and path.resolve() == sample.BOX.resolve():  # which was trained on drawn butterflies
        real = fresh(shape)
    if real is None:
        raise InputError(f"{path} does not say which images it should be like; name them with --real")
    if model is None:
        return some(images, args.n).pixels, real, training, {"source": images.source, "fingerprint": images.fingerprint}
    facts = {"model": model.hash, "seed": args.seed, "sampler": ddpm.DEFAULT_SAMPLER, "steps": ddpm.DEFAULT_STEPS}
    return draw(model, args.seed, args.n, real), real, training, {"source": str(path), **facts}


def report_quality(args: argparse.Namespace) -> None:
    """`monitor.py quality`: a row for the images, a row for as many training images, which a perfect model would
    equal, and the same as JSON."""
    network = load_features()
    images, real, training, facts = open_subject(args)
    if min(len(images), len(real.pixels)) < 3:
        raise InputError(
            f"quality needs at least 3 images on each side, and there are {len(images)} to judge and "
            f"{len(real.pixels)} to compare with; ask for more with -n, or name others with --real"
        )
    pixels = None if training is None else training.pixels
    rows = {"images": quality(network, images, real.pixels, pixels)}
    if training is not None:
        rows["training images"] = quality(network, some(training, len(images)).pixels, real.pixels)
    print(f"{facts['source']} against {len(real.pixels):,} images of {real.source}")
    for name, row in rows.items():
        print(f"{name:17}{row}")
    if args.json:
        record = {"schema": SCHEMA, "features": FEATURES_HASH, "torch": torch.__version__, "made_by": facts}
        for name, other in (("real", real), ("training", training)):
            record[name] = other and {"source": other.source, "fingerprint": other.fingerprint}
        sample.write_json(args.json, record | {name.replace(" ", "_"): asdict(row) for name, row in rows.items()})
        print(f"wrote {args.json}")


# ---- command line ----------------------------------------------------------------------------------------------------


QUALITY = {
    "quality": {
        "-n": (1000, sample.whole_number(3, 1_000_000), "images to draw, or to take"),
        "--real": (None, str, "folder, parquet file, hub id or drawn:N:SEED (default: what a run held out, or fresh "
                   "butterflies where it was trained on drawn ones)"),
        "--train": (None, str, "what was trained on, for near-copies (default: a run's own)"),
        "--size": (None, sample.whole_number(8, 1024), "side to scale images to (default 64; models have their own)"),
        "--seed": (0, sample.whole_number(0), "of the first image drawn"),
        "--json": (None, Path, "write the numbers here too"),
        "--device": (None, str, "cpu, cuda or mps (default: the fastest there is)"),
    },
}  # fmt: skip


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("monitor.py", allow_abbrev=False, description="Judge images and models.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    command = commands.add_parser(
        "quality",
        help="how near images are to real ones: KID, FD, near-copies",
        description="How near images are to real ones: KID with its 95% interval and FD, on our own pinned features, "
        "and the number of near-copies of training images.",
    )
    command.set_defaults(work=report_quality)
    command.add_argument("subject", nargs="?", metavar="SUBJECT", help="a run, a model folder, or images as for --real "
                         "(default: the newest run)")  # fmt: skip
    sample.add_flags(command, QUALITY)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    sample.set_threads()
    return data.exit_status(lambda: args.work(args))


if __name__ == "__main__":
    sys.exit(main())
