"""Images or runs in, metrics out: distance to real images, and copies of training images; telemetry of the server.

    python monitor.py quality                            samples from the newest run, against images it has not seen
    python monitor.py quality runs/x -n 5000             more samples, for a narrower interval
    python monitor.py quality birds/ --real photos/      one set of images against another

Quality is measured on the features of a small network of our own (`Features`), which was trained once on synthetic
butterflies and never changes. Numbers are comparable between runs, but not with anyone else's "FID" or "KID".
"""

import argparse
import hashlib
import json
import math
import os
import queue
import re
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
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
from data import Flag, InputError, whole

SCHEMA = 1  # version of the JSON of --json

# ---- features --------------------------------------------------------------------------------------------------------

FEATURES = Path(__file__).parent / "builtin/features.safetensors"
FEATURES_HASH = "a3daaf4402247b69d568ca1730fa2f0524006d7d2ef808b7127dc9ce8bc2840d"


class Features(nn.Module):
    """Maps uint8 images (N, 1 or 3, H, W) to float32 (N, 128), standardised on synthetic butterflies.

    `builtin/features.py` trained it to classify the families of synthetic butterflies and to estimate how much each had
    been damaged. It scales images to 64 x 64 pixels, so it does not see the finest detail of larger ones.
    """

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
    """Reads the pinned extractor. Raises InputError if its file is missing or another one."""
    with data.disk_errors(f"read {FEATURES}"):
        found = hashlib.sha256(FEATURES.read_bytes()).hexdigest()
    if found != FEATURES_HASH:
        raise InputError(
            f"{FEATURES} is not the file of this version; restore it, because numbers are comparable only with that one"
        )
    network = Features()
    tensors = unet.read_safetensors(FEATURES)
    network.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    return network.to(memory_format=torch.channels_last).eval().requires_grad_(False)


def features_of(network: Features, images: Tensor) -> Tensor:
    """Returns the features of uint8 (N, C, H, W) images: float64 (N, 128)."""
    return torch.cat([network(part) for part in images.split(64)]).double()


# ---- statistics ------------------------------------------------------------------------------------------------------


def kid(x: Tensor, y: Tensor) -> tuple[float, float]:
    """Returns the kernel distance of two sets of features (N, d) and (M, d), and its standard error.

    The unbiased estimate of MMD^2 with the kernel (x.y/d + 1)^3 (Binkowski et al. 2018, section 4), from all pairs
    rather than subsets; it can be below 0 for sets from one distribution. The standard error is the jackknife's, which
    leaves out each image of either set in turn (Arvesen 1969). It covers the choice of images, not that of a training
    seed, and is a third too large for sets from one distribution. Raises ValueError for fewer than 3 images.
    """
    m, n = len(x), len(y)
    if min(m, n) < 3:
        raise ValueError(f"a kernel distance needs at least 3 images on each side, not {m} and {n}")

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / a.shape[1] + 1) ** 3

    def row_sums(a: Tensor, b: Tensor) -> Tensor:
        return torch.cat([kernel(part, b).sum(1) for part in a.split(1024)])

    def row_sums_within(a: Tensor) -> Tensor:  # without the kernel of an image and itself
        itself = ((a * a).sum(1) / a.shape[1] + 1) ** 3
        return row_sums(a, a) - itself

    xx, yy = row_sums_within(x), row_sums_within(y)
    xy, yx = row_sums(x, y), row_sums(y, x)
    within_x, within_y, between = xx.sum(), yy.sum(), xy.sum()
    value = within_x / (m * (m - 1)) + within_y / (n * (n - 1)) - 2 * between / (m * n)
    without_x = (within_x - 2 * xx) / ((m - 1) * (m - 2)) - 2 * (between - xy) / ((m - 1) * n)
    without_y = (within_y - 2 * yy) / ((n - 1) * (n - 2)) - 2 * (between - yx) / (m * (n - 1))
    variance = sum((len(part) - 1) * part.var(correction=0) for part in (without_x, without_y))
    return float(value), float(variance.sqrt())


def frechet_distance(x: Tensor, y: Tensor) -> float:
    """Returns the Frechet distance of Gaussians fitted to two sets of features (N, d) (Heusel et al. 2017, eq. 6).

    It is biased upwards by about 1/N, so compare it only between equal numbers of images, with N above d.
    """
    covariances = x.T.cov(), y.T.cov()
    values, vectors = torch.linalg.eigh(covariances[0])
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ covariances[1] @ root).clamp(min=0).sqrt().sum()
    traces = sum(covariance.trace() for covariance in covariances)
    return max(0.0, float((x.mean(0) - y.mean(0)).square().sum() + traces - 2 * cross))


# Of 500 synthetic butterflies and of 100 photographs that had been held out, none is a near-copy by this measure; of
# training images with noise of 8 levels, 94% and 100% are.
NEIGHBOURS = 50
NEAR = 1 / 3
SAME = 2.0  # levels: a copy even if the training set has the image many times


def near_copies(images: Tensor, training: Tensor) -> Tensor:
    """Returns which images (N, C, H, W) are near-copies of training images (M, C, H, W), uint8 both: bool (N,).

    A near-copy's nearest training image, mirrored or not, is less than a third as far away as the median of its 50
    nearest ones, so that plain images, which are close to many, are not counted (Carlini et al. 2023, section 5.1).
    Distances are RMS over pixels, at 32 x 32 for larger images. Copies that were moved or darkened are not found.
    """

    def flat(levels: Tensor) -> Tensor:
        levels = levels.float()
        if min(levels.shape[2:]) > 32:
            levels = F.adaptive_avg_pool2d(levels, 32)
        return levels.flatten(1)

    training_sides = flat(training), flat(training.flip(-1))
    found = []
    for part in images.split(256):
        part = flat(part)
        distances = torch.minimum(*(torch.cdist(part, side) for side in training_sides))  # (n, M)
        nearest = distances.topk(min(NEIGHBOURS, len(training)), largest=False).values
        limit = (NEAR * nearest.median(dim=1).values).clamp(min=SAME * part.shape[1] ** 0.5)
        found.append(nearest[:, 0] < limit)
    return torch.cat(found)


# ---- quality ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Quality:
    """How close a set of images is to a real one."""

    images: int  # N
    real: int  # images of the real set
    kid: float
    kid_low: float  # of the 95% interval
    kid_high: float
    fd: float | None  # None if a set has too few images
    near_copies: int | None  # of training images, if these are known

    def __str__(self) -> str:
        text = f"N {self.images}  KID {self.kid:.4f} ({self.kid_low:.4f} to {self.kid_high:.4f})  FD "
        text += "-" if self.fd is None else f"{self.fd:.2f}"
        if self.near_copies is not None:
            text += f"  near-copies {self.near_copies} ({self.near_copies / self.images:.1%})"
        return text


def quality(network: Features, images: Tensor, real: Tensor, training: Tensor | None = None) -> Quality:
    """Compares uint8 (N, C, H, W) images with real ones and, for near-copies, with training images."""
    x, y = features_of(network, images), features_of(network, real)
    value, error = kid(x, y)
    fd, copies = None, None
    if min(len(x), len(y)) > x.shape[1]:
        fd = frechet_distance(x, y)
    if training is not None:
        copies = int(near_copies(images, training).sum())
    return Quality(len(images), len(real), value, value - 1.96 * error, value + 1.96 * error, fd, copies)


UNSEEN = "synthetic:4096:2147483648"  # no run is trained on this seed unless it asks for it


@dataclass(frozen=True)
class Images:
    """Images of one size, their source and, if there are any, their classes."""

    source: str
    fingerprint: str
    pixels: Tensor  # uint8 (N, C, H, W)
    labels: Tensor | None
    classes: tuple[str, ...]

    def rows(self, rows: Tensor) -> "Images":
        labels = None if self.labels is None else self.labels[rows]
        return replace(self, pixels=self.pixels[rows], labels=labels)


def read_images(source: str, shape: tuple, revision: str | None = None) -> tuple[Images, data.Dataset]:
    """Reads a source of data.prepare at a shape (channels, height, width)."""
    dataset = data.prepare(source, shape[1], channels=shape[0], revision=revision)
    labels = None if dataset.labels is None else torch.from_numpy(dataset.labels)
    pixels = torch.from_numpy(dataset.images)
    return Images(dataset.source, dataset.fingerprint, pixels, labels, dataset.classes), dataset


def random_subset(images: Images, count: int) -> Images:
    """Chooses at most `count` images at random.

    Synthetic images have equally many of each family, so that a subset of them varies less than a random set, and KID
    would be biased downwards. Of these, the families are chosen at random first, which takes at most half of them.
    """
    random = data.generator("some", data.original_name(images.source))
    if not data.is_synthetic(images.source):
        return images.rows(torch.randperm(len(images.pixels), generator=random)[:count])
    count = min(count, len(images.pixels) // 2)
    times = torch.randint(len(images.classes), (count,), generator=random).bincount()
    return images.rows(torch.cat([(images.labels == k).nonzero()[:number, 0] for k, number in enumerate(times)]))


def unseen_synthetic(shape: tuple) -> Images:
    """Returns 2,000 synthetic images with a seed that no model was trained on."""
    return random_subset(read_images(UNSEEN, shape)[0], 2000)


def images_of_run(run: Path, shape: tuple) -> tuple[Images, Images]:
    """Reads what a run was trained on, and images that it has not seen: held out, or new synthetic ones."""
    config = data.read_json(run / "config.json")
    settings, kept = config.get("settings"), config.get("data")
    if not isinstance(settings, dict) or not isinstance(kept, dict) or not isinstance(kept.get("source"), str):
        raise InputError(f"{run / 'config.json'} is not the config.json of a run; name images with --real")
    images, dataset = read_images(kept["source"], shape, settings.get("revision"))
    if images.fingerprint != kept.get("fingerprint"):
        raise InputError(f"{kept['source']} is not what it was for {run}; name other images with --real and --train")
    training, held_out = (images.rows(torch.from_numpy(rows)) for rows in data.split(dataset))
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
        training, _ = read_images(args.train, shape)
    if args.real:
        real, _ = read_images(args.real, shape)
        real = random_subset(real, len(real.pixels))
    if real is None:
        raise InputError(f"{path} does not tell which images it should be like; name them with --real")
    return training, real


def sample_like(model: sample.Model, seed: int, count: int, real: Images, table: Tensor | None = None) -> Tensor:
    """Draws `count` images with the default sampler, or a table of ddpm.sampler_table.

    A model with classes draws them as often as the real images have them, or equally often if those have others.
    """
    config, labels = model.network.config, []
    if table is None:
        table = ddpm.sampler_table(model.schedule)
    if config.class_count:
        known = torch.arange(config.class_count)
        if real.classes == config.class_names:
            known = real.labels
        labels = known[torch.randint(len(known), (count,), generator=data.generator("classes", seed))].tolist()
    images = []
    for start in tqdm(range(0, count, 32), desc="sampling", unit="batch", disable=None):
        seeds = range(seed + start, seed + min(start + 32, count))
        part = labels[start : start + len(seeds)]
        images.append(sample.draw(model, seeds, table, part, batch_size=32))
    return torch.cat(images)


def read_subject(args: argparse.Namespace) -> tuple:
    """Returns the images to evaluate, training images, real images, and what made the images to evaluate."""
    path, which = sample.find_model(args.subject or None)
    if not args.subject:
        print(which)
    is_model = any((path / name).exists() for name in ("model", "unet", "config.json"))
    if not is_model:
        size = args.size or 64
        images, _ = read_images(args.subject, (3, size, size))
        training, real = references(args, path, (3, size, size))
        made_by = {"source": images.source, "fingerprint": images.fingerprint}
        return random_subset(images, args.n).pixels, training, real, made_by
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
    return sample_like(model, args.seed, args.n, real), training, real, made_by


def report_quality(args: argparse.Namespace) -> None:
    """Prints the quality of the images and, for comparison, of as many training images."""
    network = load_features()
    images, training, real, made_by = read_subject(args)
    if min(len(images), len(real.pixels)) < 3:
        raise InputError(
            f"quality needs at least 3 images on each side, and there are {len(images)} to evaluate and "
            f"{len(real.pixels)} to compare with; ask for more with -n, or name others with --real"
        )
    rows = {"images": quality(network, images, real.pixels, training and training.pixels)}
    if training:
        rows["training images"] = quality(network, random_subset(training, len(images)).pixels, real.pixels)
    print(f"{made_by['source']} against {len(real.pixels):,} images of {real.source}")
    for name, row in rows.items():
        print(f"{name:17}{row}")
    if args.json:
        record = {"schema": SCHEMA, "features": FEATURES_HASH, "torch": torch.__version__, "made_by": made_by}
        for name, images in (("real", real), ("training", training)):
            record[name] = images and {"source": images.source, "fingerprint": images.fingerprint}
        data.write_json(args.json, record | {name.replace(" ", "_"): asdict(row) for name, row in rows.items()})
        print(f"wrote {args.json}")


# ---- telemetry of the server -----------------------------------------------------------------------------------------

# name: help. Names follow the conventions of Prometheus, which give the type: see metric_type.
METRICS = {
    "papilio_request_seconds": "Time from a request's head to the end of its response, by route and status.",
    "papilio_queue_wait_seconds": "Time from a request's admission to its first step.",
    "papilio_step_seconds": "Time of an iteration of the engine: one step of a batch of images.",
    "papilio_steps_total": "Image-steps made; guided ones count twice.",
    "papilio_images_total": "Images finished.",
    "papilio_sampling_cpu_seconds_total": "CPU time of the process while the network ran.",
    "papilio_departures_total": "Clients that left before their images were finished.",
    "papilio_engine_errors_total": "Iterations of the engine that raised an exception.",
    "papilio_feedback_total": "Votes on images, by vote and model.",
    "papilio_model_loads_total": "Models loaded, by result.",
    "papilio_save_errors_total": "Images that could not be saved.",
    "papilio_saved_bytes": "Bytes in the folder of served images.",
    "papilio_batch_capacity": "Image-steps that fit in a turn.",
    "papilio_queue_requests": "Admitted requests that are not finished.",
    "papilio_queue_steps": "Image-steps still to be made for admitted requests.",
    "papilio_queue_capacity_steps": "Image-steps that may wait, or can be finished in time.",
    "papilio_connections": "Open connections.",
    "papilio_turned_away_total": "Connections rejected because all others had a request in flight.",
    "papilio_worker_up": "1 while the engine's thread is alive.",
    "papilio_model_info": "Always 1; the labels say which model new requests get.",
    "papilio_gpu_memory_bytes": "Memory of tensors on the GPU.",
    "process_resident_memory_bytes": "Memory of the process.",
    "process_cpu_seconds_total": "CPU time of the process.",
    "process_open_fds": "Open file descriptors.",
}
BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120)


def metric_type(name: str) -> str:
    if name.endswith("_total"):
        return "counter"
    return "histogram" if name.endswith("_seconds") else "gauge"


def labelled(name: str, **labels: str) -> str:
    escapes = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})
    pairs = ",".join(f'{key}="{str(value).translate(escapes)}"' for key, value in labels.items())
    return f"{name}{{{pairs}}}" if pairs else name


class Metrics:
    """Counters and histograms, and the page that shows them together with gauges (Prometheus text format 0.0.4)."""

    def __init__(self):
        self.lock = threading.RLock()
        self.numbers: dict = {}  # by name and labels

    def add(self, name: str, value: float = 1, **labels: str) -> None:
        key = labelled(name, **labels)
        with self.lock:
            self.numbers[key] = self.numbers.get(key, 0) + value

    def observe(self, name: str, value: float, **labels: str) -> None:
        with self.lock:  # a page shows all of an observation or nothing
            for bound in (*BUCKETS, math.inf):
                self.add(f"{name}_bucket", value <= bound, **labels, le="+Inf" if bound == math.inf else f"{bound:g}")
            self.add(f"{name}_sum", value, **labels)
            self.add(f"{name}_count", 1, **labels)

    def page(self, gauges: dict) -> str:
        with self.lock:
            numbers = self.numbers | gauges
        lines = []
        for name, sentence in METRICS.items():
            lines += [f"# HELP {name} {sentence}", f"# TYPE {name} {metric_type(name)}"]
            names = [name]
            if metric_type(name) == "histogram":
                names = [f"{name}_bucket", f"{name}_sum", f"{name}_count"]
            lines += [f"{key} {value:.15g}" for key, value in numbers.items() if key.partition("{")[0] in names]
        return "\n".join([*lines, ""])


def gauges(server) -> dict:
    """Returns the gauges of a server.Server and of its process."""
    engine = server.engine
    with engine.lock:
        model, jobs = engine.model, list(engine.jobs)
    numbers = {
        "papilio_batch_capacity": engine.batch,
        "papilio_queue_requests": len(jobs),
        "papilio_queue_steps": sum(job.work for job in jobs),
        "papilio_queue_capacity_steps": engine.room(server.seconds),
        "papilio_connections": len(server.connections),
        "papilio_worker_up": engine.alive(),
    }
    if server.store:
        numbers["papilio_saved_bytes"] = server.store.bytes
    if model:
        key = labelled("papilio_model_info", hash=model.hash, pixels=model.shape[1], precision=model.precision)
        numbers[key] = 1
    return numbers | process_gauges()


def process_gauges() -> dict:
    """Returns gauges of this process: CPU time, and on Linux memory and file descriptors."""
    gauges = {"process_cpu_seconds_total": time.process_time()}
    with suppress(OSError, ValueError):
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        gauges["process_resident_memory_bytes"] = pages * os.sysconf("SC_PAGE_SIZE")
        gauges["process_open_fds"] = len(os.listdir("/proc/self/fd"))
    if torch.cuda.is_available():
        gauges["papilio_gpu_memory_bytes"] = torch.cuda.memory_allocated()
    return gauges


LOG_AS_JSON = threading.Event()
LOG: queue.Queue = queue.Queue(maxsize=1000)  # lines to be written; if nobody reads stderr, further ones are dropped


def log(text: str, **fields) -> None:
    """Queues a line for stderr: the time and the last 1,000 characters of a text, without control characters.

    With --log json it is a JSON object, which also has the given fields.
    """
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    text = re.sub(r"[^ -~]+", " ", text)[-1000:]
    line = f"{now} {text}\n"
    if LOG_AS_JSON.is_set():
        line = json.dumps({"time": now, "message": text, **fields}) + "\n"
    with suppress(queue.Full):
        LOG.put_nowait(line)


def write_log() -> None:
    """Writes queued lines. The server runs it in a thread of its own, because a full pipe blocks."""
    while True:
        line = LOG.get()
        with suppress(OSError, ValueError):  # stderr may be closed
            sys.stderr.write(line)
            sys.stderr.flush()
        LOG.task_done()


def wait_until_done(tasks: queue.Queue, seconds: float) -> None:
    """Waits for `seconds` until all tasks of a queue are done."""
    with tasks.all_tasks_done:
        tasks.all_tasks_done.wait_for(lambda: not tasks.unfinished_tasks, seconds)


# ---- command line ----------------------------------------------------------------------------------------------------

QUALITY_FLAGS = {
    "quality": [
        Flag("-n", 1000, whole(3, 1_000_000), "images to sample, or to read from SUBJECT"),
        Flag("--real", None, str, "images to compare with: folder, parquet file, Hugging Face dataset id or "
             "synthetic:COUNT:SEED (default: the run's held-out images, or new synthetic ones if it was trained on "
             "synthetic images)"),
        Flag("--train", None, str, "training images, to find near-copies (default: those of the run)"),
        Flag("--size", None, whole(8, 1024), "scale images to N x N pixels (default: the model's size, else 64)"),
        Flag("--seed", 0, whole(0), "seed of the first sample"),
        Flag("--json", None, Path, "also write the metrics to this file"),
        sample.DEVICE_FLAGS[0],
    ],
}  # fmt: skip


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = data.Parser("monitor.py", "Evaluate images and models.", __doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    text = "how close images are to real ones: KID with its 95% interval, FD, number of near-copies"
    command = commands.add_parser("quality", help=text.replace("%", "%%"), description=text, docstring=__doc__)
    command.set_defaults(work=report_quality)
    command.add_argument(
        "subject",
        nargs="?",
        metavar="SUBJECT",
        help="run, model folder, or images as for --real (default: the newest run, or the default model)",
    )
    data.add_flags(command, QUALITY_FLAGS)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    sample.set_threads()
    return data.exit_status(lambda: args.work(args))


if __name__ == "__main__":
    sys.exit(main())
