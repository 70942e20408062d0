"""A model folder in, images out; reads and writes model folders, chooses device and precision.

    python sample.py -n 8                                 eight images from the newest run, as a grid in samples.png
    python sample.py --class monarch --guidance 2         one class, with guidance (needs a model with classes)
    python sample.py --model FOLDER --each --out birds    single files; FOLDER: a run, model or diffusers folder

A `DrawRequest` says what to draw. The command line and the server both make one, from the flags in DRAW_FLAGS.
"""

import argparse
import hashlib
import math
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import data
import ddpm
import unet
from data import Flag, InputError, real, whole

RUNS = Path("runs")
DEFAULT_MODEL = Path(__file__).parent / "builtin/model"
WEIGHTS = "diffusion_pytorch_model"
DIFFUSERS_VERSION = "0.40.0"  # save_model writes its file layout
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
EXACT_BATCH = 4  # batch size of --exact: an image's bits depend on the batch shape, so it is fixed

Seed = int | tuple[int, int, float]  # a number, or (a, b, f): noise interpolated from seed a to seed b by fraction f


# ---- device and precision --------------------------------------------------------------------------------------------


def choose_device(name: str | None = None) -> torch.device:
    """Returns the named device, or the fastest one. Raises InputError for one that this machine does not have."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name is None:
        return torch.device(next(kind for kind in available if available[kind]))
    with suppress(RuntimeError):
        device = torch.device(name)
        if available.get(device.type):
            return device
    raise InputError(f"--device {name}: this machine or this PyTorch has no such device; choose another with --device")


def process() -> tuple[int, int]:
    """Returns the number of this process, and how many torchrun has started; (0, 1) without torchrun."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def has_bf16(device: torch.device) -> bool:
    """Returns whether the hardware supports bfloat16, without emulation."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # missing in PyTorch 2.10: fp32 there
        return any(present is True for name, present in capabilities.items() if "bf16" in name)
    return False


def choose_precision(device: torch.device, name: str | None = None) -> str:
    """Returns the named precision, by default bf16 if the hardware supports it and fp32 otherwise."""
    if name is None:
        return "bf16" if has_bf16(device) else "fp32"
    if name == "fp16" and device.type == "cpu":
        raise InputError("--precision fp16 is slower than fp32 on a CPU; choose fp32 or bf16")
    return name


def set_threads(cgroup: Path = Path("/sys/fs/cgroup/cpu.max")) -> None:
    """Caps PyTorch's threads at the container's CPU quota, unless OMP_NUM_THREADS is set.

    PyTorch counts the machine's processors. Threads beyond the quota make every operation wait.
    """
    with suppress(OSError, ValueError):
        quota, period = cgroup.read_text().split()
        if quota != "max" and "OMP_NUM_THREADS" not in os.environ:
            limit = math.ceil(int(quota) / int(period))
            torch.set_num_threads(max(1, min(torch.get_num_threads(), limit)))


def compile_or_continue(network: unet.UNet, call: Callable, mode: str = "default") -> None:
    """Compiles a network in place with torch.compile, then runs call(), which runs the network.

    If that fails, prints a message and returns to eager mode. Compiled code is cached between runs.
    """
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(data.cache_folder() / "compile"))
    try:
        network.compile(mode=mode)
        call()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        print(f"torch.compile does not work here ({data.reason(error)}): continuing without it", flush=True)
        with suppress(Exception):  # if compile() itself raised, there is nothing to undo
            network.compile(disable=True)


def compile_for_drawing(network: unet.UNet, batch: int) -> None:
    """Compiles a network for batches of this many images, with CUDA graphs on a GPU."""
    mode = "reduce-overhead" if network.conv_in.weight.is_cuda else "default"
    with torch.inference_mode():  # tensors made outside it would trigger a recompilation
        inputs = zero_inputs(network, batch)
        compile_or_continue(network, lambda: network(*inputs), mode)


def zero_inputs(network: unet.UNet, batch: int) -> tuple:
    """Returns images, timesteps and labels, all zero, of the shapes that the network takes."""
    device, config = network.conv_in.weight.device, network.config
    x = torch.zeros(batch, config.image_channels, *config.image_size, device=device)
    t = torch.zeros(batch, dtype=torch.int64, device=device)
    return x, t, t if config.num_class_embeds else None


# ---- model folders ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Model:
    """A network and its noise schedule, with the folder that they were read from."""

    network: unet.UNet
    schedule: ddpm.Schedule
    folder: Path
    hash: str  # SHA-256 of the configurations and weights, as they are on disk
    device: torch.device = torch.device("cpu")
    precision: str = "fp32"

    @property
    def shape(self) -> tuple:
        """Shape of its images: (channels, height, width)."""
        return self.network.config.image_channels, *self.network.config.image_size


def save_model(folder: Path, network: unet.UNet, schedule: ddpm.Schedule) -> None:
    """Writes a diffusers pipeline folder. If the folder exists, only the weights are replaced, atomically.

    Raises InputError if the disk fails, and ValueError for a copy that unet.for_drawing made.
    """
    if network.to_embs is not None:
        raise ValueError("this network is a copy prepared for drawing; save the network that it was made from")
    tensors = network.state_dict()
    data.atomic_write(folder / f"unet/{WEIGHTS}.safetensors", lambda file: unet.write_safetensors(tensors, file))
    files = {
        "unet/config.json": {"_class_name": "UNet2DModel", **network.config.to_dict()},
        "scheduler/scheduler_config.json": {"_class_name": "DDPMScheduler", **schedule.to_dict()},
        "model_index.json": {
            "_class_name": "DDPMPipeline",
            "scheduler": ["diffusers", "DDPMScheduler"],
            "unet": ["diffusers", "UNet2DModel"],
        },
    }
    for name, content in files.items():
        if not (folder / name).exists():
            data.write_json(folder / name, {"_diffusers_version": DIFFUSERS_VERSION, **content})


def _model_files(path: Path) -> tuple[Path, ...]:
    """Finds network configuration, scheduler configuration and weights in a run, a pipeline folder or a flat folder."""
    if not path.is_dir():
        raise InputError(f"{path}: there is no such folder")
    folder = path
    if (path / "model").is_dir():
        folder = path / "model"
    elif (path / "metrics.jsonl").exists():
        raise InputError(f"{path}: this run has saved no model yet")
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


def _digest(files: Sequence[Path]) -> str:
    """Returns SHA-256 of the files' SHA-256, in hex."""
    digest = hashlib.sha256()
    for file in files:
        with data.disk_errors(f"read {file}", "check its permissions"), open(file, "rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()


def read_model(path: Path | str) -> Model:
    """Reads and checks a run's newest model, a model folder, or a folder that diffusers wrote (flat and `.bin` too).

    The network is on the CPU in float32. Raises a one-sentence InputError for anything wrong with the folder.
    """
    with data.disk_errors(f"read {path}"):
        files = _model_files(Path(path))
    found = _digest(files)
    config_file, schedule_file, weights_file = files
    with data.bad_input(config_file):
        config = unet.UNetConfig.from_dict(data.read_json(config_file))
    with data.bad_input(schedule_file):
        schedule = ddpm.Schedule.from_dict(data.read_json(schedule_file))
    with data.bad_input(weights_file):
        network = unet.build(config, unet.read_weights(weights_file))
    if config.image_size is None or any(side % config.divisor for side in config.image_size):
        raise InputError(f"{config_file}: sample_size must be given, and be a multiple of {config.divisor} in pixels")
    if config.out_channels != config.in_channels or config.image_channels not in (1, 3):
        raise InputError(
            f"{config_file}: in_channels {config.in_channels} and out_channels {config.out_channels} must "
            f"both be {config.patch_size**2} (grey) or {3 * config.patch_size**2} (colour)"
        )
    if _digest(files) != found:
        raise InputError(f"{path} changed while it was read; try again")
    return Model(network, schedule, config_file.parent, found)


def load(
    path: Path | str, device: torch.device | str = "cpu", precision: str = "fp32", *, packed: bool = True
) -> Model:
    """Reads a model as read_model does, and prepares its network for drawing on a device in a precision."""
    model = read_model(path)
    device = torch.device(device)
    network = unet.for_drawing(model.network, device, PRECISIONS[precision], packed=packed)
    return replace(model, network=network, device=device, precision=precision)


@torch.inference_mode()
def measure_rate(model: Model, batch: int) -> float:
    """Returns the network's predictions per second in batches of this size. Raises InputError if one is not finite."""
    inputs, seconds = zero_inputs(model.network, batch), math.inf
    for _ in range(3):  # the first call allocates
        begin = time.perf_counter()
        finite = bool(model.network(*inputs).isfinite().all())
        seconds = min(seconds, time.perf_counter() - begin)
    if not finite:
        raise InputError(f"{model.folder}: the network's output is not finite")
    return batch / seconds


def find_model(named: Path | str | None) -> tuple[Path, str]:
    """Returns the folder of the model to use, and a text that says which it is and why.

    That is the named one, else the run in RUNS whose model was written last, else the default model. Raises InputError
    if there is none.
    """
    if named is not None:
        return Path(named), str(named)
    models = list(RUNS.glob(f"*/model/unet/{WEIGHTS}.safetensors"))
    if models:
        run = max(models, key=lambda file: (file.stat().st_mtime_ns, file)).parents[2]
        return run, f"{run} (the newest run; override with --model)"
    if DEFAULT_MODEL.is_dir():
        return DEFAULT_MODEL, f"the default model ({RUNS}/ has no model yet; override with --model)"
    raise InputError(
        f"there is no model in {RUNS}/ yet: train one with `python train.py`, or name a folder with --model"
    )


# ---- drawing ---------------------------------------------------------------------------------------------------------


def image_generator(seed: int) -> torch.Generator:
    """Returns the generator of one image, for x_T and then each step's noise; on the CPU whatever the device."""
    return torch.Generator().manual_seed(seed % 2**63)


def noise_of(seed: Seed, shape: tuple, patch_size: int) -> Callable:
    """Returns a function that gives fresh noise (1, C, H, W) at each call."""
    if isinstance(seed, tuple):
        a, b = (noise_of(end, shape, patch_size) for end in seed[:2])
        return lambda: ddpm.slerp(a(), b(), seed[2])
    generator = image_generator(seed)
    return lambda: ddpm.normal([generator], shape, patch_size)


@torch.inference_mode()
def draw(
    model: Model,
    seeds: Sequence[Seed],
    table: Tensor,
    labels: Sequence[int] = (),
    *,
    guidance: float = 1.0,
    picture: Tensor | None = None,
    known: Tensor | None = None,
    batch_size: int = 8,
    exact: bool = False,
    progress: Callable | None = None,
) -> Tensor:
    """Draws one image for each seed: uint8 (N, C, H, W) on the CPU.

    Image i depends only on seeds[i] and labels[i], except for rounding: at most 1/255 in fp32, and none with `exact`,
    which pads each batch to EXACT_BATCH images.

    table     from `ddpm.sampler_table`; with `picture`, made for the `ddpm.truncated` schedule
    labels    class of each image; (): no class, for a model without classes or trained with label dropout
    guidance  classifier-free guidance scale: 1 off, 0 unconditional; any value but 1 needs the null label
    picture   float (C, H, W) in -1..1: start from this picture, noised to the table's first timestep
    known     float (C, H, W): the known part of the image; NaN elsewhere
    progress  progress(i, drawings) is called after each step i of a batch
    """
    null = model.network.config.null_label
    if guidance != 1 and null is None:
        raise InputError(f"--guidance {guidance:g}: this model was not trained with classes and label dropout; omit it")
    labels = labels or [null] * len(seeds)
    if exact:
        batch_size = EXACT_BATCH
    drawings = [Drawing(seed, label, table, guidance) for seed, label in zip(seeds, labels, strict=True)]
    for begin in range(0, len(drawings), batch_size):
        batch = drawings[begin : begin + batch_size]
        for drawing in batch:
            drawing.begin(model, picture)
        for i in range(len(table)):
            advance(model, batch, batch_size if exact else len(batch), known)
            if progress:
                progress(i, batch)
    return torch.stack([drawing.pixels for drawing in drawings])


def draw_all(model: Model, seeds: Sequence[int], table: Tensor, labels: Sequence, **options) -> Tensor:
    """Draws images as `draw` does, in batches of 32, with a progress bar."""
    from tqdm import tqdm

    with tqdm(total=len(seeds) * len(table), desc="sampling", unit="step", disable=None) as bar:

        def progress(_, batch: Sequence[Drawing]) -> None:
            bar.update(len(batch))

        return draw(model, seeds, table, labels, batch_size=32, progress=progress, **options)


def draw_like(model: Model, seed: int, count: int, like: data.Dataset, table: Tensor | None = None) -> Tensor:
    """Draws `count` images with the default sampler, or a table of ddpm.sampler_table.

    A model with classes draws them as often as the dataset has them, or equally often if that has others.
    """
    config, labels = model.network.config, []
    if table is None:
        table = ddpm.sampler_table(model.schedule)
    if config.class_count:
        known = torch.arange(config.class_count)
        if like.classes == config.class_names:
            known = torch.from_numpy(like.labels)
        labels = known[torch.randint(len(known), (count,), generator=data.generator("classes", seed))].tolist()
    return draw_all(model, range(seed, seed + count), table, labels)


@dataclass(eq=False)
class Drawing:
    """One image that is being drawn, together with others, one step at a time."""

    seed: Seed
    label: int | None
    table: Tensor
    guidance: float = 1.0
    watched: bool = False  # whether previews are wanted
    step: int = 0  # steps made
    noise: Callable | None = None
    drawn: Tensor | None = None  # noise of the next step, kept so that a failed step can be retried
    state: Tensor | None = None  # (1, 4, C, H, W)
    preview: tuple = 0, None  # steps made, and the estimate of x0 or the finished image, uint8 (C, H, W)
    pixels: Tensor | None = None  # uint8 (C, H, W), once finished

    def begin(self, model: Model, picture: Tensor | None = None) -> None:
        """Makes the first state: noise alone, or a picture (C, H, W) noised to the table's first timestep."""
        self.noise = noise_of(self.seed, model.shape, model.network.config.patch_size)
        x = self.noise().to(model.device)
        if picture is not None:
            forward = ddpm.training_table(model.schedule).float().to(model.device)
            timestep = torch.tensor([int(self.table[0, ddpm.TIMESTEP])], device=model.device)
            x, _ = ddpm.noisy_and_target(forward, picture.to(model.device), x, timestep)
        self.state = ddpm.initial_state(x)

    @property
    def weight(self) -> int:
        """Predictions per step: two with guidance."""
        return 1 if self.guidance in (0, 1) else 2

    @property
    def work(self) -> int:
        """Predictions still to be made."""
        return self.weight * (len(self.table) - self.step)


def advance(model: Model, drawings: Sequence[Drawing], batch_size: int, known: Tensor | None = None) -> None:
    """Makes one step of each drawing, in one call of the network on a batch padded to batch_size.

    The drawings may be at different steps of different tables, but must all have guidance or all have none. `known` is
    as in ddpm.step.
    """
    config, device = model.network.config, model.device
    if known is not None:
        known = known.to(device)
    batch = [*range(len(drawings)), *[0] * (batch_size - len(drawings))]
    rows = torch.stack([drawing.table[drawing.step] for drawing in drawings])
    noise = torch.zeros(len(drawings), *model.shape)
    for i, drawing in enumerate(drawings):
        if ddpm.needs_noise(rows[i]):
            if drawing.drawn is None:
                drawing.drawn = drawing.noise()
            noise[i] = drawing.drawn
    labels = [config.null_label if drawing.guidance == 0 else drawing.label for drawing in drawings]
    labels = None if labels[0] is None else torch.tensor(labels, device=device)[batch]
    network = model.network
    if drawings[0].weight == 2:
        guidance = torch.tensor([drawing.guidance for drawing in drawings], device=device)[batch]
        network = ddpm.guided(network, guidance[:, None, None, None], config.null_label)
    state = torch.cat([drawing.state for drawing in drawings])[batch]
    rows = rows[batch]
    output = network(state[:, ddpm.X], rows[:, ddpm.TIMESTEP].long().to(device), labels)
    state, x0 = ddpm.step(state, output, rows, noise[batch].to(device), known)
    states = [part.clone() for part in state[: len(drawings)].split(1)]  # a view would keep the whole batch in memory
    if any(drawing.watched for drawing in drawings):
        previews = data.to_uint8(x0).cpu()
    if any(drawing.step + 1 == len(drawing.table) for drawing in drawings):
        pixels = data.to_uint8(state[:, ddpm.X]).cpu()
    for i, drawing in enumerate(drawings):  # nothing fails from here on: all are advanced, or none
        drawing.state, drawing.step, drawing.drawn = states[i], drawing.step + 1, None
        if drawing.step == len(drawing.table):
            drawing.pixels, drawing.state, drawing.noise = pixels[i], None, None
            drawing.preview = drawing.step, drawing.pixels
        elif drawing.watched:
            drawing.preview = drawing.step, previews[i]


# ---- what to draw ----------------------------------------------------------------------------------------------------

# The fields of a DrawRequest, as flags of sample.py and as parameters of the server.
DRAW_FLAGS = [
    Flag("-n", 8, whole(1, 1_000_000), "number of images"),
    Flag("--seed", None, whole(0), "seed of the first image; image i has seed + i (default: 0)"),
    Flag("--class", None, str, "comma-separated names or numbers, or all; n images of each (default: the "
         "classes in turn; with --from, no class)", {"dest": "classes"}),
    Flag("--guidance", 1.0, real(0, 1000), "classifier-free guidance scale: 0 no class, 1 no guidance, 2 or 3 strong"),
    Flag("--sampler", ddpm.DEFAULT_SAMPLER, tuple(ddpm.SAMPLERS), "sampling algorithm"),
    Flag("--steps", None, whole(1), f"sampling steps at strength 1 (default: {ddpm.DEFAULT_STEPS}; ddpm: all "
         "timesteps)"),
    Flag("--spacing", None, ddpm.SPACINGS, "spacing of the timesteps (default: trailing; ddpm: the one in the "
         "model's scheduler_config.json)"),
    Flag("--eta", 0.0, real(0, 1), "noise added by the sampler ddim: 0 none, 1 as much as ddpm"),
]  # fmt: skip


HTTP_NAMES = {"n": "n_images", "classes": "class"}  # parameters of the server whose names differ
MAX_IMAGES = 64  # of one request to the server


def parameters(model: Model) -> dict:
    """Returns {name: Flag}, the parameters of the server: DRAW_FLAGS within the limits of the model."""
    config = model.network.config
    changes = {
        "n": {"type": whole(1, MAX_IMAGES), "default": 1},
        "seed": {"help": "seed of the first image; image i has seed + i (default: chosen at random)"},
        "steps": {"type": whole(1, model.schedule.num_train_timesteps)},
        "guidance": {"type": real(0, 20)},
        "classes": {
            "type": tuple(class_name(config, label) for label in range(config.class_count)),
            "help": "class of the images (default: the classes in turn, by seed)",
        },
    }
    flags = {flag.dest: replace(flag, **changes.get(flag.dest, {})) for flag in DRAW_FLAGS}
    if config.null_label is None:
        del flags["guidance"]
    if not config.class_count:
        del flags["classes"]
    return {HTTP_NAMES.get(name, name): flag for name, flag in flags.items()}


@dataclass(frozen=True)
class DrawRequest:
    """What to draw: a field for each row of DRAW_FLAGS."""

    n: int
    seed: int | None  # None: 0
    classes: str | None
    guidance: float
    sampler: str
    steps: int | None
    spacing: str | None
    eta: float

    def table(self, schedule: ddpm.Schedule, strength: float = 1.0) -> Tensor:
        """Returns the sampler's table; `strength` < 1 keeps that share of the steps and of the timesteps.

        Raises InputError for an incompatible sampler, steps, spacing or eta.
        """
        try:
            table = ddpm.sampler_table(schedule, self.sampler, self.steps, self.spacing, self.eta)
            if strength < 1:
                steps = max(1, round(strength * len(table)))
                schedule = ddpm.truncated(schedule, strength)
                table = ddpm.sampler_table(schedule, self.sampler, steps, self.spacing, self.eta)
        except ValueError as error:
            raise InputError(str(error)) from error
        return table

    def images(self, config: unet.UNetConfig, seeds: Sequence[Seed] = ()) -> list[tuple]:
        """Returns (label, seed) of each image: all seeds for each named class.

        If none is named, the class is the seed modulo the number of classes. `seeds` overrides self.seed and self.n.
        """
        first = self.seed or 0
        seeds = seeds or [(first + i) % 2**63 for i in range(self.n)]
        if self.classes is not None:
            return [(label, seed) for label in choose_classes(config, self.classes) for seed in seeds]
        if not config.class_count:
            return [(None, seed) for seed in seeds]
        numbers = [seed[0] if isinstance(seed, tuple) else seed for seed in seeds]
        return [(number % config.class_count, seed) for number, seed in zip(numbers, seeds, strict=True)]

    def facts(self, model: Model, steps: int, exact: bool = False) -> dict:
        """Returns what is needed to draw the images again, for the text chunks of their files."""
        facts = {
            "seed": self.seed or 0,
            "steps": steps,
            "sampler": self.sampler,
            "spacing": self.spacing or "default",
            "eta": self.eta,
            "model": model.hash,
            "precision": model.precision,
            "torch": torch.__version__,
        }
        if self.classes is not None or self.guidance != 1:
            facts["guidance"] = self.guidance
        if exact:
            facts["exact"] = True
        return facts


def choose_classes(config: unet.UNetConfig, text: str) -> list[int]:
    """Returns the labels for --class: names or numbers separated by commas, or all.

    Raises InputError if the model has no classes, or lacks one of these.
    """
    names, count = list(config.class_names or ()), config.class_count
    if not count:
        raise InputError(f"--class {text}: this model was trained without classes (train.py --classes)")
    if text in names:
        return [names.index(text)]
    if text == "all":
        return list(range(count))
    labels = []
    for name in (part.strip() for part in text.split(",")):
        if name in names:
            labels.append(names.index(name))
        elif re.fullmatch(r"[0-9]{1,8}", name) and int(name) < count:
            labels.append(int(name))
        else:
            known = ", ".join(names) or f"0 to {count - 1}"
            raise InputError(f"--class {name!r}: this model has no such class; it has {known}")
    return list(dict.fromkeys(labels))  # each once


def class_name(config: unet.UNetConfig, label: int) -> str:
    if config.class_names and label < len(config.class_names):
        return config.class_names[label]
    return str(label)


def draw_again(model: Model, facts: dict) -> Tensor:
    """Draws the image that has these facts, see DrawRequest.facts: uint8 (C, H, W).

    Raises KeyError, TypeError or ValueError if the facts are incomplete or wrong.
    """
    spacing, labels = facts["spacing"], ()
    if spacing == "default":
        spacing = None
    table = ddpm.sampler_table(model.schedule, facts["sampler"], facts["steps"], spacing, facts["eta"])
    if "class" in facts:
        labels = choose_classes(model.network.config, facts["class"])
    return draw(model, [facts["seed"]], table, labels, guidance=facts.get("guidance", 1.0))[0]


def grid_facts(config: unet.UNetConfig, images: list[tuple]) -> dict:
    """Returns the number of images in a grid and their classes, for its text chunks."""
    names = dict.fromkeys(class_name(config, label) for label, _ in images if label is not None)
    return {"count": len(images)} | ({"class": ",".join(names)} if names else {})


# ---- command line ----------------------------------------------------------------------------------------------------

MODEL_FLAG = Flag("--model", None, Path, "run, model folder or diffusers folder (default: the newest run in runs/, or "
                  "the default model)")  # fmt: skip
DEVICE_FLAGS = [
    Flag("--device", None, str, "cpu, cuda or mps (default: the fastest one)"),
    Flag(
        "--precision",
        None,
        tuple(PRECISIONS),
        "precision of the network (default: bf16 if the hardware supports it, else fp32)",
    ),
]
SAMPLE_FLAGS = {
    "what to draw": [
        MODEL_FLAG,
        *DRAW_FLAGS[:4],
        Flag("--from", None, Path, "draw variations of this picture: noised by --strength, then denoised",
             {"dest": "picture"}),
        Flag("--strength", None, real(0.001, 1), "noise added to --from, 1: pure noise (default: 0.6; 1 with --mask)"),
        Flag("--mask", None, Path, "mask of the same size as --from: white areas (128 and above) are inpainted, "
             "the rest is kept"),
        Flag("--walk", None, whole(0), "interpolate from seed A to seed B in n images",
             {"nargs": 2, "metavar": ("A", "B")}),
    ],
    "how to draw": DRAW_FLAGS[4:],
    "files": [
        Flag("--out", None, Path, "file to write, or folder with --each (default: samples.png, samples/)"),
        Flag("--film", None, Path, "also write the denoising, or the interpolation, as an animated .png or .gif"),
        Flag("--scale", 1, whole(1, 64), "enlarge each pixel to N x N"),
        Flag("--each", None, bool, "one file per image, named by seed, or with --walk by position; images that "
             "are there with the same settings are not drawn again"),
    ],
    "machine": [
        *DEVICE_FLAGS,
        Flag("--batch-size", None, whole(1, 65536), "images per call of the network (default: 8)"),
        Flag("--compile", None, bool, "torch.compile the network: takes minutes the first time, then seconds; slower "
             "than eager mode on a CPU in bf16"),
        Flag("--exact", None, bool, f"images bit-identical in any batch: each batch is padded to {EXACT_BATCH} images"),
    ],
}  # fmt: skip


def check_flags(args: argparse.Namespace, out: Path) -> None:
    """Raises InputError for incompatible flags, before anything is read or drawn."""
    named = {"--out": out, "--film": args.film, "--from": args.picture, "--mask": args.mask}
    places = {flag: path.resolve() for flag, path in named.items() if path}
    written = [places[flag] for flag in ("--out", "--film") if flag in places]
    clash = any(list(places.values()).count(place) > 1 for place in written)
    clash = clash or any(place.parent == places["--out"] for place in places.values())  # inside the folder --out
    wrong_film = args.film and (args.film.suffix.lower() not in (".png", ".gif") or args.film.is_dir())
    refused = [
        (args.exact and args.batch_size, "--exact has a batch size of its own; omit --batch-size"),
        (
            args.strength and not args.picture,
            "--strength is the noise added to a picture; name the picture with --from",
        ),
        (args.mask and not args.picture, "--mask fills a part of a picture; name the picture with --from"),
        (args.walk and args.seed is not None, "--walk names two seeds; omit --seed"),
        (args.walk and args.n < 2, f"-n {args.n}: --walk needs at least 2 images, its two ends; choose a larger -n"),
        (
            args.guidance != 1 and args.picture and args.classes is None,
            f"--guidance {args.guidance:g} needs a class; name the picture's class with --class",
        ),
        (
            wrong_film,
            f"--film {args.film}: films are animated PNG or GIF files; choose a name that ends in .png or .gif",
        ),
        (
            process()[1] > 1 and (not args.each or args.film),
            "several processes draw only single files; add --each and omit --film",
        ),
        (args.each and out.exists() and not out.is_dir(), f"--out {out} is a file, but --each needs a folder"),
        (not args.each and out.is_dir(), f"--out {out} is a folder; name a file, or add --each"),
        (
            not args.each and out.suffix.lower() != ".png",
            f"--out {out}: pictures are PNG files; choose a name that ends in .png",
        ),
        (clash, f"{', '.join(places)}: these paths overlap; choose another --out"),
    ]
    for wrong, sentence in refused:
        if wrong:
            raise InputError(sentence)


def choose_images(args: argparse.Namespace, request: DrawRequest, config: unet.UNetConfig) -> list:
    """Returns (label, seed) of each image, also for --walk and --from."""
    seeds = []
    if args.walk:
        seeds = [(*args.walk, i / (args.n - 1)) for i in range(args.n)]
    images = request.images(config, seeds)
    if args.picture and args.classes is None:
        if config.class_count and config.null_label is None:
            raise InputError("this model needs a class; name the picture's class with --class")
        images = [(None, seed) for _, seed in images]
    return images


def read_picture(flag: str, path: Path, size: Sequence[int], channels: int) -> Tensor:
    """Reads a picture of any format as uint8 (channels, H, W). Raises InputError if it is unreadable."""
    if size[0] != size[1]:
        raise InputError(f"{flag} needs a model of square images, not of {size[1]} x {size[0]}")
    try:
        return torch.from_numpy(data.decode(path.read_bytes(), size[0], channels).copy())
    except Exception as error:  # decoders raise nearly anything for a damaged file
        raise InputError(f"{flag} {path} cannot be read: {data.reason(error)}") from error


def read_inputs(args: argparse.Namespace, model: Model) -> tuple:
    """Reads --from and --mask: the arguments `picture` and `known` of `draw`."""
    if not args.picture:
        return None, None
    channels, *size = model.shape
    picture = data.to_float(read_picture("--from", args.picture, size, channels))
    if not args.mask:
        return picture, None
    mask = read_picture("--mask", args.mask, size, 1)
    (mask_width, mask_height), (width, height) = (data.picture_size(path) for path in (args.mask, args.picture))
    if (mask_width, mask_height) != (width, height):
        raise InputError(
            f"--mask {args.mask} is {mask_width} x {mask_height} and --from {args.picture} is {width} x {height}; "
            "make them the same size"
        )
    return picture, torch.where(mask >= 128, torch.nan, picture)


class Output:
    """Writes the output files: each image when it is finished (--each) or one grid at the end, then the film."""

    def __init__(self, args: argparse.Namespace, out: Path, config: unet.UNetConfig, images: list, facts: dict):
        self.args, self.out, self.config, self.images, self.facts = args, out, config, images, facts
        self.rows = len(images) // args.n
        self.count = 0  # images drawn
        self.drawn: list[Tensor] = []  # of each batch, uint8 (n, C, H, W), unless only single files are written
        self.frames: dict = {}  # the same after some of the steps, for a film of the denoising
        for path in (out, args.film):  # fail before drawing, not after it
            if path:
                with data.disk_errors(f"make the folder of {path}"):
                    path.absolute().parent.mkdir(parents=True, exist_ok=True)

    def keep_frame(self, i: int, steps: int, batch: Sequence[Drawing]) -> None:
        """Keeps the images after step i for the film: at most 60 frames, without the last step."""
        if self.args.film and not self.args.walk and i % math.ceil(steps / 60) == 0 and i < steps - 1:
            x = torch.cat([drawing.state[:, ddpm.X] for drawing in batch])
            self.frames.setdefault(i, []).append(data.to_uint8(x).cpu())

    def missing(self) -> list[int]:
        """Lists the images to draw: all, or with --each those of this process that have no file with the same facts."""
        rank, world = process()
        mine = range(rank, len(self.images), world)
        if not self.args.each or self.args.film or self.args.picture:  # the file of a picture may have changed
            return list(mine)
        height, width = (side * self.args.scale for side in self.config.image_size)
        return [i for i in mine if not self.is_written(i, {"width": width, "height": height})]

    def is_written(self, i: int, size: dict) -> bool:
        name, own_facts = self.name_and_facts(i)
        wanted = {key: str(value) for key, value in (self.facts | own_facts).items()}
        return wanted | size == data.png_facts(self.out / f"{name}.png")

    def add(self, numbers: Sequence[int], drawn: Tensor) -> None:
        """Takes the images with these numbers; with --each, writes their files."""
        self.count += len(drawn)
        if not self.args.each or self.args.film:
            self.drawn.append(drawn)
        if self.args.each:
            for i, image in zip(numbers, drawn, strict=True):
                name, own_facts = self.name_and_facts(i)
                picture = data.grid(image[None], padding=0, scale=self.args.scale)
                data.write_png(self.out / f"{name}.png", picture, self.facts | own_facts)

    def name_and_facts(self, i: int) -> tuple[str, dict]:
        """Returns the file name of image i, without .png, and the facts of this image alone."""
        label, place = self.images[i][0], i % self.args.n
        own_facts = {"seed": self.images[i][1]}
        if self.args.walk:
            own_facts = {"frame": place}
        name = str(*own_facts.values())
        if label is None:
            return name, own_facts
        own_facts["class"] = class_name(self.config, label)
        if self.rows > 1:
            prefix = re.sub(r"[^\w-]", "_", own_facts["class"])
            others = [re.sub(r"[^\w-]", "_", class_name(self.config, row)) for row, _ in self.images[:: self.args.n]]
            if len({other.casefold() for other in others}) < len(others):  # two classes would share a file
                prefix = label
            name = f"{prefix}-{name}"
        return name, own_facts

    def finish(self) -> None:
        picture = partial(data.grid, columns=self.args.n if self.rows > 1 else None, scale=self.args.scale)
        if self.args.each:
            rank, world = process()
            others = len(range(rank, len(self.images), world)) - self.count
            plural = "s" * (self.count != 1)
            before = f"; {others} had been drawn before" * (others > 0)
            print(f"wrote {self.count} image{plural} to {self.out}/{before}")
        if self.drawn:
            images = torch.cat(self.drawn)
        if not self.args.each:
            data.write_png(self.out, picture(images), self.facts | grid_facts(self.config, self.images))
            print(f"wrote {self.out}")
        if self.args.film:
            frames = [*(torch.cat(frame) for frame in self.frames.values()), images]
            if self.args.walk:
                frames = images.unflatten(0, (self.rows, -1)).transpose(0, 1)
            *frames, last = (picture(frame) for frame in frames)
            data.write_png(self.args.film, last, self.facts, frames)
            print(f"wrote {self.args.film}")


def run(args: argparse.Namespace) -> None:
    from tqdm import tqdm

    out = args.out or Path("samples" if args.each else "samples.png")
    check_flags(args, out)
    path, which = find_model(args.model)
    device = choose_device(args.device)
    if device.type == "cuda":
        device = torch.device("cuda", device.index or int(os.environ.get("LOCAL_RANK", 0)))
    model = load(path, device, choose_precision(device, args.precision), packed=not args.compile)
    config = model.network.config
    request = DrawRequest(**{flag.dest: getattr(args, flag.dest) for flag in DRAW_FLAGS})
    images = choose_images(args, request, config)
    strength = args.strength or (0.6 if args.picture and not args.mask else 1.0)
    table = request.table(model.schedule, strength)
    steps = len(table)
    picture, known = read_inputs(args, model)
    plural = "s" * (steps > 1)
    print(f"{which}: {model.shape[2]} px, {args.sampler}, {steps} step{plural}, {device.type}, {model.precision}")

    facts = request.facts(model, steps, bool(args.exact))
    if args.walk:
        facts = {"walk": " ".join(map(str, args.walk)), "frames": args.n, **facts}
        del facts["seed"]
    if args.picture:
        facts |= {"from": args.picture, "strength": strength}
    if args.mask:
        facts["mask"] = args.mask
    output = Output(args, out, config, images, facts)
    size = EXACT_BATCH if args.exact else args.batch_size or 8
    if args.compile:
        compile_for_drawing(model.network, size if args.exact else min(size, len(images)))
    options = {"guidance": args.guidance, "known": known, "batch_size": size, "exact": args.exact}
    if strength < 1:
        options["picture"] = picture

    numbers = output.missing()
    with tqdm(total=len(numbers) * steps, unit="step", disable=None) as bar:

        def progress(i: int, batch: Sequence[Drawing]) -> None:
            bar.update(len(batch))
            output.keep_frame(i, steps, batch)

        for start in range(0, len(numbers), size):
            batch = numbers[start : start + size]
            labels, seeds = zip(*(images[i] for i in batch), strict=True)
            if labels[0] is None:
                labels = ()
            output.add(batch, draw(model, seeds, table, labels, **options, progress=progress))
    output.finish()


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = data.Parser("sample.py", "Draw images from a trained model.", __doc__)
    data.add_flags(parser, SAMPLE_FLAGS)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    set_threads()
    return data.exit_status(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
