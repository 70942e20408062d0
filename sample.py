"""A model folder in, images out; and what a model folder is: reading, writing, choosing device and precision.

python sample.py -n 8                        the newest run, a PNG grid
python sample.py -n 64 --each --out birds    single files
python sample.py --model FOLDER              a run, a model folder, a folder that diffusers wrote
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import data
import ddpm
import unet
from data import InputError

RUNS = Path("runs")
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


def load(path: Path | str, device: torch.device | str = "cpu", precision: str = "fp32") -> Model:
    """Reads a run's newest model, a model folder, or what diffusers wrote (flat folders and `.bin` included), checks
    all of it, and prepares the network for drawing. InputError, one sentence, for whatever is wrong with it."""
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
    return Model(network, schedule, config_file.parent, digest.hexdigest(), device, precision)


def prepare(network: unet.UNet, device: torch.device, precision: str) -> None:
    """Makes a network ready to draw, in place; a prepared one is never saved."""
    network.to(device=device, dtype=PRECISIONS[precision], memory_format=torch.channels_last)
    network.eval().requires_grad_(False)


def newest_run(runs: Path = RUNS) -> Path:
    """The run whose model was written last. InputError, with the remedy, where there is none."""
    models = list(runs.glob(f"*/model/unet/{WEIGHTS}.safetensors"))
    if not models:
        raise InputError(
            f"there is no model in {runs}/ yet: train one with `python train.py --data FOLDER`, "
            "or name a model folder with --model"
        )
    return max(models, key=lambda file: (file.stat().st_mtime_ns, file)).parents[2]


# ---- drawing ---------------------------------------------------------------------------------------------------------


def image_generator(seed: int) -> torch.Generator:
    """The generator of one image: it draws x_T and then each step's noise, on the CPU whatever the device."""
    return torch.Generator().manual_seed(seed % 2**63)


def draw(
    model: Model,
    seeds: Sequence[int],
    table: Tensor,
    labels: Sequence[int] | None = None,
    *,
    batch_size: int = 8,
    exact: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """One image for each seed, uint8 (N, C, H, W) on the CPU. Image i depends on seeds[i] and labels[i] alone: to one
    level in fp32 whatever the batch size, to the bit with `exact`, which pads each batch to EXACT_BATCH images.
    `progress(n)` is called after each step with the number of images in the batch."""
    size = EXACT_BATCH if exact else batch_size
    drawn = []

    def report(i, x0):
        if progress:
            progress(len(batch))

    for start in range(0, len(seeds), size):
        batch = list(seeds[start : start + size])
        chosen = None if labels is None else list(labels[start : start + size])
        padding = size - len(batch) if exact else 0
        images = ddpm.draw(
            model.network,
            table,
            [image_generator(seed) for seed in batch + [0] * padding],
            model.shape,
            device=model.device,
            labels=None if chosen is None else torch.tensor(chosen + [0] * padding, device=model.device),
            patch_size=model.network.config.patch_size,
            progress=report,
        )
        drawn.append(data.to_uint8(images[: len(batch)]).cpu())
    return torch.cat(drawn)


def choose_class(config: unet.UNetConfig, name: str | None) -> int | None:
    """A class by name or number. InputError where the model has none, needs one, or has no such one."""
    count, names = config.num_class_embeds, list(config.class_names or ())
    known = ", ".join(names) if names else f"0 to {(count or 1) - 1}"
    if count is None:
        if name is not None:
            raise InputError(f"--class {name}: this model was trained without classes")
        return None
    if name is None:
        raise InputError(f"this model draws by class: choose one with --class ({known})")
    if name in names:
        return names.index(name)
    if name.isascii() and name.isdigit() and int(name) < (len(names) or count):
        return int(name)
    raise InputError(f"--class {name}: this model has no such class; it has {known}")


def whole_number(least: int, most: int = 2**63 - 1) -> Callable[[str], int]:
    """An argparse type: a whole number in a range, refused in a sentence."""

    def parse(text: str) -> int:
        if not (text.isascii() and text.isdigit() and len(text) <= 19 and least <= int(text) <= most):
            bound = f"from {least} to {most}" if most < 2**62 else f"of at least {least}"
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number {bound}")
        return int(text)

    return parse


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="sample.py", allow_abbrev=False, description="Draw images from a trained model."
    )
    what = parser.add_argument_group("what to draw")
    what.add_argument(
        "-n", type=whole_number(1, 1_000_000), default=8, metavar="N", help="number of images (default 8)"
    )
    what.add_argument(
        "--model", metavar="FOLDER", help="a run, a model folder or a diffusers folder (default: the newest run)"
    )
    what.add_argument("--class", dest="label", metavar="NAME", help="draw this class, by name or number")
    what.add_argument(
        "--seed",
        type=whole_number(0),
        default=0,
        metavar="N",
        help="of the first image; image i is that of seed + i, whatever n and the batch size are (default 0)",
    )
    what.add_argument(
        "--out", type=Path, metavar="PATH", help="file to write, or folder with --each (default samples.png, samples/)"
    )
    what.add_argument("--each", action="store_true", help="write each image to a file of its own, named by its seed")
    how = parser.add_argument_group("how to draw")
    how.add_argument("--sampler", choices=ddpm.SAMPLERS, default=ddpm.DEFAULT_SAMPLER, help="default %(default)s")
    how.add_argument(
        "--steps",
        type=whole_number(1),
        metavar="N",
        help=f"calls of the network an image (default {ddpm.DEFAULT_STEPS}; ddpm: as many as in training)",
    )
    how.add_argument(
        "--spacing",
        choices=ddpm.SPACINGS,
        help="which timesteps to visit (default logsnr; ddpm: as the model's scheduler_config.json says)",
    )
    how.add_argument(
        "--eta", type=float, default=0.0, metavar="X", help="noise added by the sampler ddim, 0 to 1 (default 0)"
    )
    machine = parser.add_argument_group("machine")
    machine.add_argument("--device", metavar="NAME", help="cpu, cuda or mps (default: the fastest there is)")
    machine.add_argument("--precision", choices=PRECISIONS, help="default: bf16 where the hardware has it, else fp32")
    machine.add_argument(
        "--batch-size", type=whole_number(1, 65536), metavar="N", help="images drawn at once (default 8)"
    )
    machine.add_argument(
        "--exact",
        action="store_true",
        help=f"the same bits for an image whatever it is drawn with: each batch padded to {EXACT_BATCH}",
    )
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    from tqdm import tqdm

    if args.exact and args.batch_size:
        raise InputError("--exact draws in batches of one size; leave --batch-size out")
    path = Path(args.model) if args.model is not None else newest_run()
    device = choose_device(args.device)
    model = load(path, device, choose_precision(device, args.precision))
    config = model.network.config
    label = choose_class(config, args.label)
    try:
        table = ddpm.plan(model.schedule, args.sampler, args.steps, args.spacing, args.eta)
    except ValueError as error:
        raise InputError(f"--model {path}: {error}") from error
    out = args.out or Path("samples" if args.each else "samples.png")
    if out.is_dir() != args.each and out.exists():
        raise InputError(f"--out {out} is a {'folder; without' if out.is_dir() else 'file; with'} --each name a "
                         f"{'folder' if args.each else 'file'}")  # fmt: skip
    if not args.each and out.suffix.lower() != ".png":
        raise InputError(f"--out {out}: pictures are PNG files; give it a name that ends in .png")
    print(f"{path}: {config.image_size[1]} px, {args.sampler}, {len(table)} steps, {device.type}, {model.precision}")

    facts = {
        "seed": args.seed,
        "steps": len(table),
        "sampler": args.sampler,
        "spacing": args.spacing or "default",
        "eta": args.eta,
        "model": model.hash,
        "precision": model.precision,
        "torch": torch.__version__,
    } | ({} if label is None else {"class": label})
    drawn, size = [], EXACT_BATCH if args.exact else args.batch_size or 8
    with tqdm(total=args.n * len(table), unit="step", disable=None) as bar:
        for start in range(0, args.n, size):
            seeds = range(args.seed + start, args.seed + min(start + size, args.n))
            labels = None if label is None else [label] * len(seeds)
            images = draw(model, seeds, table, labels, batch_size=size, exact=args.exact, progress=bar.update)
            drawn.append(images)
            for seed, image in zip(seeds, images, strict=True) if args.each else ():
                data.write_png(out / f"{seed}.png", data.grid(image[None], padding=0), facts | {"seed": seed})
    if not args.each:
        data.write_png(out, data.grid(torch.cat(drawn)), facts | {"count": args.n})
    print(f"wrote {args.n} images to {out}/" if args.each else f"wrote {out}")


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    return data.exit_status(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
