"""A model folder in, images out; and what a model folder is: reading, writing, choosing device and precision.

python sample.py -n 8                        the newest run, a PNG grid
python sample.py -n 64 --each --out birds    single files
python sample.py --model FOLDER              a run, a model folder, a folder that diffusers wrote
"""

import argparse
import hashlib
import json
import math
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import data
import ddpm
import unet
from data import InputError

RUNS = Path("runs")
BOX = Path(__file__).parent / "weights/butterflies"  # a trained model that comes with the code
WEIGHTS = "diffusion_pytorch_model"
DIFFUSERS_VERSION = "0.40.0"  # whose file layout is written
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
EXACT_BATCH = 4  # the one batch shape of `--exact`: an image's bits depend on it, so it is the same everywhere


# ---- device and precision --------------------------------------------------------------------------------------------


def choose_device(name: str | None = None) -> torch.device:
    """The named device, or the fastest there is. InputError for one that this machine does not have."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name is None:
        return torch.device(next(kind for kind, available in there.items() if available))
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or not there.get(device.type, False):
        raise InputError(
            f"--device {name}: this machine or this PyTorch has no such device; choose another with --device"
        )
    return device


def has_bf16(device: torch.device) -> bool:
    """Whether bfloat16 is done by the hardware, rather than emulated."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        ask = getattr(torch.cpu, "get_capabilities", dict)  # PyTorch 2.10 has no public way to ask: fp32 there
        return any(there is True for name, there in ask().items() if "bf16" in name)
    return False


def choose_precision(device: torch.device, name: str | None = None) -> str:
    """The named precision, or bf16 where the hardware has it and fp32 elsewhere."""
    if name is None:
        return "bf16" if has_bf16(device) else "fp32"
    if name == "fp16" and device.type == "cpu":
        raise InputError("--precision fp16 is slower than fp32 on a CPU; choose fp32 or bf16")
    return name


def set_threads(cgroup: Path = Path("/sys/fs/cgroup/cpu.max")) -> None:
    """No more threads than a container may use processors, which PyTorch does not see: more of them wait for each other
    at every operation. OMP_NUM_THREADS overrules it."""
    with suppress(OSError, ValueError):
        quota, period = cgroup.read_text().split()
        if quota != "max" and "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, min(torch.get_num_threads(), math.ceil(int(quota) / int(period)))))


def compile_for_drawing(network: unet.UNet, batch: int) -> None:
    """torch.compile, in place, tried on a batch of this many images; with CUDA graphs on a GPU. What it compiled is
    kept between runs. Where it does not work, says so and leaves the network as it is."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(data.cache_folder() / "compile"))
    device, config = network.conv_in.weight.device, network.config
    network.pack(False)
    x = torch.zeros(batch, config.image_channels, *config.image_size, device=device)
    t = torch.zeros(batch, dtype=torch.int64, device=device)
    try:
        network.compile(mode="reduce-overhead" if device.type == "cuda" else "default")
        with torch.inference_mode():
            network(x, t, t if config.num_class_embeds else None)
    except Exception as error:
        go_on_without_compile(network, error)
        network.pack(True)


def go_on_without_compile(network: unet.UNet, error: Exception) -> None:
    reason = str(error).strip().splitlines()[0][:100] if str(error).strip() else type(error).__name__
    print(f"torch.compile does not work here ({reason}): going on without it", flush=True)
    with suppress(Exception):  # where even asking raised, there is nothing to undo
        network.compile(disable=True)


# ---- model folders ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Model:
    """A network that is ready to draw, and what it was read from."""

    network: unet.UNet
    schedule: ddpm.Schedule
    folder: Path
    hash: str  # SHA-256 of configurations and weights, as they lie on disk
    device: torch.device
    precision: str

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of its images: (channels, height, width)."""
        return self.network.config.image_channels, *self.network.config.image_size


def save_model(folder: Path, network: unet.UNet, schedule: ddpm.Schedule) -> None:
    """Writes a diffusers pipeline folder; in one that is there already, only the weights, by one rename. InputError
    where the disk refuses."""
    library = {"_diffusers_version": DIFFUSERS_VERSION}
    index = {"scheduler": ["diffusers", "DDPMScheduler"], "unet": ["diffusers", "UNet2DModel"]}
    files = {
        "unet/config.json": {"_class_name": "UNet2DModel", **network.config.to_dict()},
        "scheduler/scheduler_config.json": {"_class_name": "DDPMScheduler", **schedule.to_dict()},
        "model_index.json": {"_class_name": "DDPMPipeline", **index},
    }
    if network.to_embs is not None:
        raise ValueError("a network that was fused for drawing has no longer the weights of a file")
    tensors = network.state_dict()
    data.atomic_write(folder / f"unet/{WEIGHTS}.safetensors", lambda file: unet.write_safetensors(tensors, file))
    for name, content in files.items():
        if not (folder / name).exists():
            write_json(folder / name, library | content)


def write_json(path: Path, content: dict) -> None:
    text = json.dumps(content, indent=2, sort_keys=True) + "\n"
    data.atomic_write(path, lambda file: file.write(text.encode()))


def read_json(path: Path) -> dict:
    """InputError for a file that is missing, unreadable or no JSON object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or "it is not JSON"
        raise InputError(f"{path} cannot be read: {reason}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} holds something else than a JSON object")
    return content


def _parts(path: Path) -> tuple[Path, Path, Path]:
    """The configurations and weights of a run, a pipeline folder or a flat folder: unet, scheduler, weights."""
    if not path.is_dir():
        raise InputError(f"{path}: there is no such folder")
    if not (path / "model").is_dir() and (path / "metrics.jsonl").exists():
        raise InputError(f"{path}: this run has saved no model yet")
    folder = path / "model" if (path / "model").is_dir() else path
    inner = folder / "unet" if (folder / "unet").is_dir() else folder
    schedulers = (folder / "scheduler/scheduler_config.json", folder / "scheduler_config.json")
    scheduler = next((file for file in schedulers if file.is_file()), schedulers[0])
    weights = [inner / f"{WEIGHTS}{suffix}" for suffix in (".safetensors", ".bin")]
    found = next((file for file in weights if file.is_file()), None)
    for file, what in ((inner / "config.json", "network configuration"), (scheduler, "scheduler configuration")):
        if not file.is_file():
            raise InputError(f"{path} is no model folder: it has no {what} ({file.relative_to(path)})")
    if found is None:
        raise InputError(f"{path} has no weights ({weights[0].relative_to(path)}, or .bin)")
    return inner / "config.json", scheduler, found


def load(path: Path | str, device: torch.device | str = "cpu", precision: str = "fp32", *, fuse: bool = True) -> Model:
    """Reads a run's newest model, a model folder, or what diffusers wrote (flat folders and `.bin` included), checks
    all of it, and prepares the network for drawing; with `fuse` off its weights keep the names of the file. InputError,
    one sentence, for whatever is wrong with it."""
    with data.disk_errors(f"read {path}"):
        config_file, schedule_file, weights_file = _parts(Path(path))
    digest = hashlib.sha256()
    for file in (config_file, schedule_file, weights_file):
        try:
            with open(file, "rb") as opened:
                digest.update(hashlib.file_digest(opened, "sha256").digest())
        except OSError as error:
            raise InputError(f"{file} cannot be read: {error.strerror}") from error
    file = config_file
    try:
        config = unet.UNetConfig.from_dict(read_json(config_file))
        file = schedule_file
        schedule = ddpm.Schedule.from_dict(read_json(schedule_file))
        file = weights_file
        network = unet.build(config, unet.read_weights(weights_file))
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"{file}: {error}") from error
    if config.image_size is None or any(side % config.divisor for side in config.image_size):
        raise InputError(f"{config_file}: sample_size must be there, and divide by {config.divisor} in pixels")
    if config.out_channels != config.in_channels or config.image_channels not in (1, 3):
        raise InputError(
            f"{config_file}: {config.in_channels} channels in and {config.out_channels} out in patches of "
            f"{config.patch_size} make no pictures; grey (1) and colour (3) are drawn"
        )
    device = torch.device(device)
    prepare(network, device, precision)
    if fuse:
        network.fuse()
    return Model(network, schedule, config_file.parent, digest.hexdigest(), device, precision)


def prepare(network: unet.UNet, device: torch.device, precision: str) -> None:
    """Makes a network ready to draw, in place; a prepared one is never saved."""
    network.to(device=device, dtype=PRECISIONS[precision], memory_format=torch.channels_last)
    network.eval().requires_grad_(False)


def newest_run(runs: Path = RUNS) -> Path:
    """The run whose model was written last, or the model in the box where there is none. InputError, with the remedy,
    where neither is there."""
    models = list(runs.glob(f"*/model/unet/{WEIGHTS}.safetensors"))
    if models:
        return max(models, key=lambda file: (file.stat().st_mtime_ns, file)).parents[2]
    if BOX.is_dir():
        return BOX
    raise InputError(
        f"there is no model in {runs}/ yet: train one with `python train.py`, or name a model folder with --model"
    )


# ---- drawing ---------------------------------------------------------------------------------------------------------


def image_generator(seed: int) -> torch.Generator:
    """The generator of one image: it draws x_T and then each step's noise, on the CPU whatever the device."""
    return torch.Generator().manual_seed(seed % 2**63)


def noise_of(seed: int | tuple[int, int, float], shape: tuple[int, int, int], patch_size: int) -> Callable[[], Tensor]:
    """Fresh noise (1, C, H, W) at each call: of a seed; or of (a, b, f), that between seeds a and b."""
    if isinstance(seed, tuple):
        a, b = (noise_of(end, shape, patch_size) for end in seed[:2])
        return lambda: ddpm.slerp(a(), b(), seed[2])
    generator = image_generator(seed)
    return lambda: ddpm.normal([generator], shape, patch_size)


def draw(
    model: Model,
    seeds: Sequence[int | tuple[int, int, float]],
    table: Tensor,
    labels: Sequence[int] | None = None,
    *,
    guidance: float = 1.0,
    picture: Tensor | None = None,
    known: Tensor | None = None,
    batch_size: int = 8,
    exact: bool = False,
    progress: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """One image for each seed, uint8 (N, C, H, W) on the CPU. Image i depends on seeds[i] and labels[i] alone: to one
    level in fp32 whatever the batch size, to the bit with `exact`, which pads each batch to EXACT_BATCH images.

    seeds     numbers, or (a, b, f): f of the way from the noise of seed a to that of b
    table     of `ddpm.plan`; with `picture`, on `ddpm.up_to` of the model's schedule
    labels    classes; left out, those of a model with classes draw without one
    guidance  1 draws the class as trained, 0 without a class, more exaggerates it; needs the model's null label
    picture   float (C, H, W) in -1..1: noised up to the table's first timestep, in place of noise alone
    known     float (C, H, W): what is known of the image; NaN elsewhere
    progress  called after each step i with the images so far, float (n, C, H, W)
    """
    size = EXACT_BATCH if exact else batch_size
    config, null = model.network.config, model.network.config.null_label
    if guidance != 1 and null is None:
        raise InputError(f"--guidance {guidance:g}: this model was trained without hidden classes (train.py "
                         "--classes --label-dropout); leave it out")  # fmt: skip
    if null is not None and (labels is None or guidance == 0):
        labels = [null] * len(seeds)
    network = model.network if guidance in (0, 1) else ddpm.guided(model.network, guidance, null)
    forward, first = ddpm.training_table(model.schedule).float(), torch.tensor([int(table[0, ddpm.TIMESTEP])])
    picture, known = (None if part is None else part.to(model.device) for part in (picture, known))
    drawn = []

    def start(noise: Tensor) -> Tensor:
        return ddpm.noisy_and_target(forward.to(noise.device), picture, noise, first.to(noise.device))[0]

    def report(i: int, x: Tensor, x0: Tensor) -> None:
        if progress:
            progress(i, x[: len(batch)])

    for begin in range(0, len(seeds), size):
        batch = list(seeds[begin : begin + size])
        padding = [0] * (size - len(batch) if exact else 0)
        chosen = None if labels is None else [*labels[begin : begin + size], *padding]
        sources = [noise_of(seed, model.shape, config.patch_size) for seed in batch + padding]
        images = ddpm.draw(
            network,
            table,
            lambda sources=sources: torch.cat([source() for source in sources]),
            device=model.device,
            labels=None if chosen is None else torch.tensor(chosen, device=model.device),
            start=None if picture is None else start,
            known=known,
            progress=report,
        )
        drawn.append(data.to_uint8(images[: len(batch)]).cpu())
    return torch.cat(drawn)


# ---- what was served -------------------------------------------------------------------------------------------------


class Store:
    """Images that were served, for the monitor: `<day>/<name>-<k>.png` and a line of JSON each in
    `<day>/<process>.jsonl`. Above `limit` bytes the oldest day goes first; where only today is left nothing more is
    saved. Several threads and processes may save into one folder."""

    def __init__(self, folder: Path, limit: int):
        self.folder, self.limit, self.lock = folder, limit, threading.Lock()
        self.log = f"{os.getpid()}-{os.urandom(4).hex()}.jsonl"
        with data.disk_errors(f"write to {folder}"):
            folder.mkdir(parents=True, exist_ok=True)
            self.count()

    def days(self) -> list[Path]:
        """The oldest first; folders without a log are somebody else's."""
        named = (path for path in self.folder.iterdir() if re.fullmatch(r"\d{4}-\d\d-\d\d", path.name))
        return sorted(day for day in named if any(day.glob("*.jsonl")))

    def count(self) -> None:
        """What this and other processes have saved."""
        self.bytes = sum(file.stat().st_size for day in self.days() for file in day.glob("[!.]*"))
        self.counted = time.monotonic()

    def save(self, name: str, images: Sequence[tuple[Tensor, dict]]) -> list[Exception]:
        """uint8 (C, H, W) images and their facts. Returns why some could not be saved; raises nothing."""
        day, errors = self.folder / time.strftime("%Y-%m-%d", time.gmtime()), []
        with self.lock:
            for k, (pixels, facts) in enumerate(images):
                try:
                    facts = facts | {"request": name, "time": f"{time.time():.3f}"}
                    body = data.encode_png(data.grid(pixels[None], padding=0), facts)
                    line = json.dumps({"file": f"{name}-{k}.png", **facts}) + "\n"
                    self.make_room(day, len(body) + len(line))
                    data.atomic_write(day / f"{name}-{k}.png", lambda file, body=body: file.write(body))
                    self.bytes += len(body)
                    with open(day / self.log, "a", encoding="utf-8") as file:
                        self.bytes += file.write(line)
                except (InputError, OSError) as error:
                    errors.append(error)
        return errors

    def make_room(self, today: Path, size: int) -> None:
        if time.monotonic() > self.counted + 600:
            self.count()
        while self.bytes + size > self.limit:
            oldest = next(iter(self.days()), today)
            if oldest == today:
                raise InputError(f"the images of today fill the {self.limit:,} bytes of {self.folder}")
            with suppress(FileNotFoundError):  # another process was faster
                shutil.rmtree(oldest)
            self.count()


# ---- command line ----------------------------------------------------------------------------------------------------


def choose_classes(config: unet.UNetConfig, text: str | None) -> list[int]:
    """The labels that --class asks for: names or numbers with commas between, or all. InputError where the model has no
    classes or no such one."""
    names, count = list(config.class_names or ()), config.class_count
    if not count:
        raise InputError(f"--class {text}: this model was trained without classes (train.py --classes)")
    known = ", ".join(names) if names else f"0 to {count - 1}"
    if text == "all" and text not in names:
        return list(range(count))

    def choose(name: str) -> int:
        if name in names:
            return names.index(name)
        if name.isascii() and name.isdigit() and int(name) < count:
            return int(name)
        raise InputError(f"--class {name!r}: this model has no such class; it has {known}")

    parts = [text] if text in names else [part.strip() for part in text.split(",")]
    return list(dict.fromkeys(choose(part) for part in parts))  # each once


def choose_jobs(args: argparse.Namespace, config: unet.UNetConfig) -> list[tuple[int | None, int | tuple]]:
    """(label, seed) of each image: a row of images for each class of --class. Without it the classes in turn, by the
    seed, a walk in that of its first seed; and no class where there is none, or where a picture's is not known."""
    seeds = list(range(args.seed or 0, (args.seed or 0) + args.n))
    if args.walk:
        seeds = [(*args.walk, i / (args.n - 1)) for i in range(args.n)]
    if args.classes is not None:
        return [(label, seed) for label in choose_classes(config, args.classes) for seed in seeds]
    if args.picture and config.class_count and config.null_label is None:
        raise InputError("this model draws by class: say with --class which one the picture is of")
    if args.picture or not config.class_count:
        return [(None, seed) for seed in seeds]
    return [((seed[0] if args.walk else seed) % config.class_count, seed) for seed in seeds]


def read_picture(flag: str, path: Path, size: tuple[int, int], channels: int) -> Tensor:
    """A picture of any kind as the model's images are, uint8 (channels, H, W). InputError where it is none."""
    if size[0] != size[1]:
        raise InputError(f"{flag}: this model's images are {size[1]} x {size[0]}; only square ones are read")
    try:
        return torch.from_numpy(data.decode(path.read_bytes(), size[0], channels).copy())
    except Exception as error:  # damaged files make decoders raise nearly anything
        raise InputError(f"{flag} {path} cannot be read: {data.reason(error)}") from error


def whole_number(least: int, most: int = 2**63 - 1) -> Callable[[str], int]:
    """An argparse type: a whole number in a range, refused in a sentence."""

    def parse(text: str) -> int:
        if not (text.isascii() and text.isdigit() and len(text) <= 19 and least <= int(text) <= most):
            bound = f"from {least} to {most}" if most < 2**62 else f"of at least {least}"
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number {bound}")
        return int(text)

    return parse


def real(least: float, most: float = math.inf):
    """An argparse type: a finite number in a range, refused in a sentence."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and least <= value <= most):
            bound = f"of at least {least:g}" if math.isinf(most) else f"from {least:g} to {most:g}"
            raise argparse.ArgumentTypeError(f"{text!r} is not a number {bound}")
        return value

    return parse


# flag: (default, argparse type or choices or bool, one sentence, what else argparse is told), by group
FLAGS = {
    "what to draw": {
        "-n": (8, whole_number(1, 1_000_000), "number of images"),
        "--model": (None, str, "a run, a model folder or a diffusers folder (default: the newest run, or the model "
                    "in the box)"),
        "--class": (None, str, "names or numbers with commas between, or all: a row of n images of each (default: "
                    "the classes in turn; of a picture, none)", {"dest": "classes"}),
        "--guidance": (1.0, real(0, 1000), "how much of a class: 1 as trained, 0 nothing of it, 2 or 3 exaggerate it"),
        "--seed": (None, whole_number(0), "of the first image; image i is that of seed + i (default 0)"),
        "--out": (None, Path, "file to write, or folder with --each (default samples.png, samples/)"),
        "--from": (None, Path, "draw variations of this picture: noised up to --strength, then denoised",
                   {"dest": "picture"}),
        "--strength": (None, real(0.001, 1), "how far to noise it: 1 leaves nothing (default 0.6; with --mask 1)"),
        "--mask": (None, Path, "fill the white part (128 of 255 and above) of this mask, of the size of --from, anew "
                   "and leave the rest as it is"),
        "--walk": (None, whole_number(0), "draw n images on the way from seed A to seed B",
                   {"nargs": 2, "metavar": ("A", "B")}),
        "--film": (None, Path, "write the denoising, or the walk, as an animated .png or .gif too"),
        "--scale": (1, whole_number(1, 64), "enlarge each pixel to N x N, to look at"),
        "--each": (False, bool, "each image in a file of its own, named by class and seed, or by place in a walk"),
    },
    "how to draw": {
        "--sampler": (ddpm.DEFAULT_SAMPLER, tuple(ddpm.SAMPLERS), "how the steps are made"),
        "--steps": (None, whole_number(1), f"calls of the network an image (default {ddpm.DEFAULT_STEPS}; ddpm: as "
                    "many as in training)"),
        "--spacing": (None, ddpm.SPACINGS, "which timesteps to visit (default trailing; ddpm: as the model's "
                      "scheduler_config.json says)"),
        "--eta": (0.0, float, "noise added by the sampler ddim, 0 to 1"),
    },
    "machine": {
        "--device": (None, str, "cpu, cuda or mps (default: the fastest there is)"),
        "--precision": (None, tuple(PRECISIONS), "default: bf16 where the hardware has it, else fp32"),
        "--batch-size": (None, whole_number(1, 65536), "images drawn at once (default 8)"),
        "--compile": (False, bool, "torch.compile the network: minutes the first time, seconds later; on a CPU in bf16 "
                      "it does not pay"),
        "--exact": (False, bool, f"the same bits whatever an image is drawn with: batches padded to {EXACT_BATCH}"),
    },
}  # fmt: skip


def add_flags(parser: argparse.ArgumentParser, groups: dict) -> None:
    for title, rows in groups.items():
        group = parser.add_argument_group(title)
        for flag, (default, kind, sentence, *more) in rows.items():
            how = {"type": kind, "metavar": {str: "NAME", Path: "PATH"}.get(kind, "N")}
            how = {"choices": kind} if isinstance(kind, tuple) else {"action": "store_true"} if kind is bool else how
            shown = f" (default {default})" if default not in (None, False) else ""
            group.add_argument(flag, default=default, help=sentence + shown, **how | dict(*more))


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("sample.py", allow_abbrev=False, description="Draw images from a trained model.")
    add_flags(parser, FLAGS)
    return parser.parse_args(argv)


def check(args: argparse.Namespace, out: Path) -> None:
    """InputError for flags that do not go together, before anything is read or drawn."""
    named = {"--out": out, "--film": args.film, "--from": args.picture, "--mask": args.mask}
    places = {flag: path.resolve() for flag, path in named.items() if path}
    written = [places[flag] for flag in ("--out", "--film") if flag in places]
    clash = any(list(places.values()).count(place) > 1 for place in written)
    clash = clash or any(place.parent == places["--out"] for place in places.values())  # among the files of --each
    refused = [
        (args.exact and args.batch_size, "--exact draws in batches of one size; leave --batch-size out"),
        (args.strength and not args.picture, "--strength says how far to noise a picture; name it with --from"),
        (args.mask and not args.picture, "--mask fills a part of a picture; name it with --from"),
        (args.walk and args.seed is not None, "--walk names its own two seeds; leave --seed out"),
        (args.walk and args.n < 2, "--walk needs at least 2 images, its ends; ask for more with -n"),
        (args.guidance != 1 and args.picture and args.classes is None,
         "--guidance is towards a class; say with --class which one the picture is of"),
        (args.film and (args.film.suffix.lower() not in (".png", ".gif") or args.film.is_dir()),
         f"--film {args.film}: films are animated PNG or GIF files; give it a name that ends in .png or .gif"),
        (args.each and out.exists() and not out.is_dir(), f"--out {out} is a file; with --each name a folder"),
        (not args.each and out.is_dir(), f"--out {out} is a folder; without --each name a file"),
        (not args.each and out.suffix.lower() != ".png",
         f"--out {out}: pictures are PNG files; give it a name that ends in .png"),
        (clash, f"{', '.join(places)}: no two may name the same place; choose another --out"),
    ]  # fmt: skip
    for wrong, sentence in refused:
        if wrong:
            raise InputError(sentence)


def plan(args: argparse.Namespace, schedule: ddpm.Schedule, strength: float) -> Tensor:
    """The table of the sampler asked for; of a picture noised part-way, as dense a one on the rest of the way."""
    try:
        table = ddpm.plan(schedule, args.sampler, args.steps, args.spacing, args.eta)
        if strength == 1:
            return table
        steps = max(1, round(strength * len(table)))
        return ddpm.plan(ddpm.up_to(schedule, strength), args.sampler, steps, args.spacing, args.eta)
    except ValueError as error:
        raise InputError(str(error)) from error


def read_inputs(args: argparse.Namespace, model: Model) -> tuple[Tensor | None, Tensor | None]:
    """What `draw` calls picture and known, of --from and --mask."""
    if not args.picture:
        return None, None
    size, channels = model.shape[1:], model.shape[0]
    picture = data.to_float(read_picture("--from", args.picture, size, channels))
    if not args.mask:
        return picture, None
    mask = read_picture("--mask", args.mask, size, 1)
    sizes = [data.picture_size(path) for path in (args.mask, args.picture)]
    if sizes[0] != sizes[1]:
        raise InputError("--mask {} is {} x {} and --from {} is {} x {}; make them of one size".format(
            args.mask, *sizes[0], args.picture, *sizes[1]))  # fmt: skip
    return picture, torch.where(mask >= 128, torch.nan, picture)


def run(args: argparse.Namespace) -> None:
    from tqdm import tqdm

    out = args.out or Path("samples" if args.each else "samples.png")
    check(args, out)
    path = Path(args.model) if args.model is not None else newest_run()
    device = choose_device(args.device)
    model = load(path, device, choose_precision(device, args.precision))
    config = model.network.config
    jobs = choose_jobs(args, config)
    rows = len(jobs) // args.n
    strength = args.strength or (0.6 if args.picture and not args.mask else 1.0)
    table = plan(args, model.schedule, strength)
    begin, known = read_inputs(args, model)
    steps = f"{len(table)} step" + "s" * (len(table) > 1)
    print(f"{path}: {config.image_size[1]} px, {args.sampler}, {steps}, {device.type}, {model.precision}")

    facts = describe(args, model, table, strength)
    every = math.ceil(len(table) / 60)  # the film of a thousand steps has sixty pictures
    drawn, film = [], [[] for _ in range(0, len(table) - 1, every)]
    size = EXACT_BATCH if args.exact else args.batch_size or 8
    if args.compile:
        compile_for_drawing(model.network, size if args.exact else min(size, len(jobs)))
    options = {"guidance": args.guidance, "picture": begin if strength < 1 else None, "known": known}

    def progress(i: int, x: Tensor) -> None:
        bar.update(len(x))
        if args.film and not args.walk and i % every == 0 and i < len(table) - 1:
            film[i // every].append(data.to_uint8(x).cpu())

    for path in (out, args.film) if args.film else (out,):  # before the work, not after it
        with data.disk_errors(f"make the folder of {path}"):
            path.absolute().parent.mkdir(parents=True, exist_ok=True)
    with tqdm(total=len(jobs) * len(table), unit="step", disable=None) as bar:
        for start in range(0, len(jobs), size):
            labels, part = zip(*jobs[start : start + size], strict=True)
            labels = None if labels[0] is None else labels
            drawn.append(draw(model, part, table, labels, **options, batch_size=size, exact=args.exact,
                              progress=progress))  # fmt: skip
            for i, image in enumerate(drawn[-1] if args.each else (), start):
                name, own = describe_one(args, config, jobs, i)
                data.write_png(out / f"{name}.png", data.grid(image[None], padding=0, scale=args.scale), facts | own)
    images = torch.cat(drawn)
    picture = partial(data.grid, columns=args.n if rows > 1 else None, scale=args.scale)
    if not args.each:
        data.write_png(out, picture(images), facts | describe_grid(config, jobs))
    images_word = "image" + "s" * (len(images) > 1)
    print(f"wrote {len(images)} {images_word} to {out}/" if args.each else f"wrote {out}")
    if args.film:
        frames = (
            images.unflatten(0, (rows, -1)).transpose(0, 1)
            if args.walk
            else [*(torch.cat(frame) for frame in film), images]
        )
        *frames, last = (picture(frame) for frame in frames)
        data.write_png(args.film, last, facts, frames)
        print(f"wrote {args.film}")


def class_name(config: unet.UNetConfig, label: int) -> str:
    return config.class_names[label] if label < len(config.class_names or ()) else str(label)


def describe(args: argparse.Namespace, model: Model, table: Tensor, strength: float) -> dict:
    """What made a picture, for the text of its file."""
    facts = {"seed": args.seed or 0} if not args.walk else {"walk": " ".join(map(str, args.walk))}
    facts |= {
        "steps": len(table),
        "sampler": args.sampler,
        "spacing": args.spacing or "default",
        "eta": args.eta,
        "model": model.hash,
        "precision": model.precision,
        "torch": torch.__version__,
    }
    facts |= {"guidance": args.guidance} if args.classes is not None or args.guidance != 1 else {}
    if args.picture:
        facts |= {"from": args.picture, "strength": strength} | ({"mask": args.mask} if args.mask else {})
    return facts


def describe_grid(config: unet.UNetConfig, jobs: list) -> dict:
    """What is true of all images of a grid together."""
    labels = dict.fromkeys(label for label, _ in jobs if label is not None)
    names = ",".join(class_name(config, label) for label in labels)
    return {"count": len(jobs)} | ({"class": names} if names else {})


def describe_one(args: argparse.Namespace, config: unet.UNetConfig, jobs: list, i: int) -> tuple[str, dict]:
    """The name of the file of image i, and what is true of this image alone."""
    label, place = jobs[i][0], i % args.n
    own = {"frame": place} if args.walk else {"seed": (args.seed or 0) + place}
    name = str(*own.values())
    if label is None:
        return name, own
    if len(jobs) > args.n:
        rows = [row for row, _ in jobs[:: args.n]]
        slugs = [re.sub(r"[^\w-]", "_", class_name(config, row)) for row in rows]
        apart = len({slug.casefold() for slug in slugs}) == len(slugs)
        name = f"{slugs[rows.index(label)] if apart else label}-{name}"
    return name, own | {"class": class_name(config, label)}


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    set_threads()
    return data.exit_status(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
