"""A data set in, a model folder out: one loop, to be read from top to bottom.

    python train.py                                             butterflies; the device decides how large a network
    python train.py --data FOLDER --preset nano --steps 2000    32 px, minutes on a laptop
    python train.py --resume runs/x                             goes on to the bit
    python train.py --init MODEL --data FOLDER --lr 1e-4        fine-tunes
    torchrun --nproc-per-node 4 train.py --data FOLDER          the same batch, on four GPUs

Every draw (data order, flips, timesteps, noise) is a pure function of (seed, step, position in the batch), and dropout
one of (seed, step, process). So a run that is stopped anywhere and resumed equals the run that was not, and the number
of processes changes rounding alone, dropout apart.
"""

import argparse
import atexit
import copy
import hashlib
import io
import json
import math
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path

import numpy
import PIL
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

import data
import ddpm
import sample
import unet
from data import InputError

# ---- settings --------------------------------------------------------------------------------------------------------


def numbers(text: str) -> list[int]:
    """An argparse type: whole numbers separated by commas, or nothing."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    return [sample.whole_number(1, 65536)(part) for part in parts]


whole, real = sample.whole_number, sample.real
# name: (default, argparse type or choices or bool, one sentence), by group. What a preset sets stands in PRESETS.
SETTINGS = {
    "data": {
        "data": ("auto", str, "folder of images, parquet file, hub id, smithsonian, drawn, drawn:N, or auto: "
                 "smithsonian where it is prepared already or the hub answers, and drawn butterflies elsewhere"),
        "revision": (None, str, "commit or branch of a hub id"),
        "size": (32, whole(8, 1024), "side of the images in pixels"),
        "image_channels": (3, whole(1, 3), "3 for colour, 1 for grey"),
        "classes": (False, bool, "learn the classes, so that sample.py can draw one with --class"),
        "label_dropout": (0.1, real(0, 1), "share of images whose class is hidden, for guidance, with --classes"),
        "flips": (True, bool, "mirror half of the images left-right, anew each time"),
    },
    "network": {
        "channels": ([32, 64, 128], numbers, "channels of each level; each next one has half the size"),
        "attention": ([8], numbers, "sides, in the network's pixels, of the levels with attention"),
        "layers": (1, whole(1, 16), "resnets a level"),
        "head_dim": (32, whole(1, 4096), "channels of an attention head"),
        "patch_size": (1, whole(1, 16), "pixels a side that enter the network as one"),
        "groups": (4, whole(1, 65536), "groups of a group norm; at most as many as divide the channels"),
        "dropout": (0.0, real(0, 0.99), "share of activations dropped inside resnets"),
    },
    "diffusion": {
        "prediction": ("v_prediction", ddpm.PREDICTIONS, "what the network predicts"),
        "noise_schedule": ("linear", ddpm.BETA_SCHEDULES, "how noise grows with the timestep"),
        "zero_snr": (False, bool, "rescale the schedule so that its last timestep is noise alone"),
        "timesteps": (1000, whole(2, 100_000), "timesteps of the noise schedule"),
        "loss": ("mse", ddpm.LOSSES, "mse, or min_snr: min-SNR-gamma weighting"),
        "gamma": (5.0, real(0.01), "bound on the signal-to-noise ratio, for min_snr"),
        "density": ("lognormal", ddpm.DENSITIES, "of training timesteps; lognormal is in sigma/alpha"),
        "density_mean": (-0.8, real(-20, 20), "of log(sigma/alpha), for lognormal"),
        "density_std": (1.6, real(0.01, 20), "of log(sigma/alpha), for lognormal"),
    },
    "optimisation": {
        "steps": (5000, whole(1, 10**9), "updates of the weights"),
        "epochs": (None, whole(1, 10**6), "passes over the data, in place of --steps"),
        "batch_size": (16, whole(1, 65536), "images an update, over all processes"),
        "accumulate": (1, whole(1, 4096), "parts that a process cuts its share of the batch into, to save memory"),
        "optimizer": ("muon", ("muon", "adamw"), "muon: orthogonalised updates of the inner convolutions and matrices, "
                      "AdamW of the rest"),
        "lr": (None, real(0, 1000), "highest learning rate; beside Muon AdamW has 0.3 of it (default: muon 0.01, "
               "adamw 0.001)"),
        "warmup": (200, whole(0, 10**9), "steps over which the learning rate grows to --lr"),
        "decay": ("cosine", ("cosine", "constant"), "of the learning rate after the warm-up"),
        "weight_decay": (0.01, real(0), "share of the weights that is taken off a step, times the learning rate"),
        "clip": (1.0, real(1e-6), "bound on the gradient's norm"),
        "ema": (500_000, whole(0), "half-life of the averaged weights in images, up to a tenth of those seen; 0: none"),
        "seed": (0, whole(0), "of everything random"),
    },
    "watching": {
        "log_every": (20, whole(1), "steps between lines of metrics.jsonl"),
        "eval_every": (500, whole(1), "steps between held-out losses"),
        "preview_every": (500, whole(1), "steps between grids of samples"),
        "save_every": (500, whole(1), "steps between checkpoints"),
        "keep": (2, whole(1, 1000), "newest checkpoints to keep"),
    },
    "machine": {
        "device": (None, str, "cpu, cuda or mps (default: the fastest there is)"),
        "precision": (None, tuple(sample.PRECISIONS), "of AMP (default: bf16 where the hardware has it)"),
        "compile": (None, bool, "torch.compile the network (default: on a GPU)"),
    },
}  # fmt: skip
RATES = {"muon": 0.01, "adamw": 1e-3}
DEFAULTS = {name: row[0] for group in SETTINGS.values() for name, row in group.items()}

PRESETS = {
    "nano": {},
    "small": {"size": 64, "channels": [32, 64, 128, 160], "attention": [16, 8], "steps": 16_000},
    "base": {"size": 128, "channels": [64, 128, 256, 384], "attention": [16, 8], "layers": 2, "head_dim": 64,
             "groups": 8, "patch_size": 2, "batch_size": 64, "warmup": 1000, "steps": 60_000, "density_mean": -0.4,
             "eval_every": 1000, "preview_every": 1000, "save_every": 1000},
    # The network and recipe of the diffusers butterfly tutorial.
    "classic": {"size": 128, "channels": [128, 128, 256, 256, 512, 512], "attention": [8], "layers": 2, "head_dim": 8,
                "groups": 32, "prediction": "epsilon", "density": "uniform", "batch_size": 16, "optimizer": "adamw",
                "lr": 1e-4, "warmup": 500, "epochs": 30, "ema": 0},
}  # fmt: skip
DEVICE_PRESETS = {"cuda": "base", "mps": "small", "cpu": "nano"}
RESUMABLE = {"steps", "epochs", "data", "device", "save_every", "keep"}  # flags that may change when a run goes on
NETWORK = {*SETTINGS["network"], "image_channels", "classes"} - {"dropout"}  # what --init takes from the model,
SCHEDULE = {"prediction", "noise_schedule", "zero_snr", "timesteps"}  # with these


def parse_arguments(argv: Sequence[str] | None) -> tuple[argparse.Namespace, dict]:
    """The run's own arguments, and the settings that were given as flags."""
    parser = argparse.ArgumentParser(
        prog="train.py",
        allow_abbrev=False,
        description="Train a diffusion model on images. Settings are defaults, changed by a preset or by --config, "
        "changed by flags.",
    )
    group = parser.add_argument_group("run")
    group.add_argument("--out", type=Path, metavar="FOLDER", help="new folder of the run (default: runs/ and the date)")
    group.add_argument("--preset", choices=PRESETS, help="nano 32 px, small 64 px, base and classic 128 px "
                       "(default: base on cuda, small on mps, nano on cpu)")  # fmt: skip
    group.add_argument("--config", type=Path, metavar="FILE", help="repeat a run from its config.json")
    group.add_argument(
        "--resume", type=Path, metavar="RUN", help="go on with this run; to extend a finished one, add --steps"
    )
    group.add_argument("--init", metavar="MODEL", help="start from the weights of this run or model folder")
    for title, rows in SETTINGS.items():
        group = parser.add_argument_group(title)
        for name, (default, kind, sentence) in rows.items():
            changed = {preset: values[name] for preset, values in PRESETS.items() if name in values}
            shown = [f"default {_show(default)}"] * (default is not None)
            shown += [f"{preset} {_show(value)}" for preset, value in changed.items()]
            how = {"type": kind, "metavar": {str: "NAME", numbers: "N,N"}.get(kind, "N")}
            how = {"choices": kind} if isinstance(kind, tuple) else how
            how = {"action": argparse.BooleanOptionalAction} if kind is bool else how
            sentence = f"{sentence} ({'; '.join(shown)})" if shown else sentence
            flag = "--" + name.replace("_", "-")
            group.add_argument(flag, dest=name, default=argparse.SUPPRESS, help=sentence.replace("%", "%%"), **how)
    args = vars(parser.parse_args(argv))
    given = {name: value for name, value in args.items() if name in DEFAULTS}
    run = argparse.Namespace(**{name: value for name, value in args.items() if name not in DEFAULTS})
    return run, given


def _show(value) -> str:
    """A default as `--help` shows it."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, list):
        return ",".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def read_config(path: Path) -> dict:
    """A run's config.json, its settings checked as flags are. InputError names what is wrong with it."""
    config = sample.read_json(path)
    settings = config.get("settings")
    if (
        not isinstance(settings, dict)
        or settings.keys() != DEFAULTS.keys() | {"init"}
        or not (settings["init"] is None or isinstance(settings["init"], str))
    ):
        raise InputError(f"{path} is no config.json of a run of this version")
    for name, (default, kind, _) in ((name, row) for group in SETTINGS.values() for name, row in group.items()):
        value = settings[name]
        text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
        try:
            fits = value in kind if isinstance(kind, tuple) else kind(text) == value
        except (ValueError, argparse.ArgumentTypeError):
            fits = False
        if not (isinstance(value, bool) if kind is bool else fits or value is default):
            raise InputError(f"{path}: {name} cannot be {value!r}")
    return config


def resolve(run: argparse.Namespace, given: dict, config: dict | None, device: torch.device) -> dict:
    """All settings of a new run: defaults, then a preset or another run's config.json, then flags."""
    if config and run.preset:
        raise InputError("--preset and --config both set everything; give one of them")
    settings = DEFAULTS | {"init": None} | (PRESETS[run.preset or DEVICE_PRESETS[device.type]] if not config else {})
    settings |= (config["settings"] if config else {}) | given
    settings["init"] = os.path.abspath(run.init) if run.init is not None else settings["init"]
    if "steps" in given:
        settings["epochs"] = None
    settings["device"] = device.type
    settings["lr"] = RATES[settings["optimizer"]] if settings["lr"] is None else settings["lr"]
    if settings["precision"] is None:  # a GPU without bf16 trains in fp16, with a scaler
        missing = device.type == "cuda" and not sample.has_bf16(device)
        settings["precision"] = "fp16" if missing else sample.choose_precision(device)
    if settings["precision"] == "bf16" and device.type == "mps":
        raise InputError("--precision bf16 is not implemented for mps; choose fp32")
    settings["compile"] = device.type == "cuda" if settings["compile"] is None else settings["compile"]
    if "label_dropout" in given and not settings["classes"] and not settings["init"]:
        raise InputError("--label-dropout hides classes, which are learnt only with --classes; add it, or leave it out")
    if settings["init"] and (clash := sorted((NETWORK | SCHEDULE) & given.keys())):
        raise InputError(f"--{clash[0].replace('_', '-')} comes from the model that --init names; leave it out")
    if not settings["channels"]:
        raise InputError("--channels needs at least one number")
    levels, patch = len(settings["channels"]), settings["patch_size"]
    if not settings["init"] and settings["size"] % (patch * 2 ** (levels - 1)):  # before any image is read
        raise InputError(
            f"--size {settings['size']} must be a multiple of {patch * 2 ** (levels - 1)}: "
            f"{levels} levels, each half the size of the one before, and patches of {patch}"
        )
    return settings


def design(settings: dict, classes: Sequence[str]) -> tuple[unet.UNetConfig, ddpm.Schedule]:
    """The network and the noise schedule that the settings describe."""
    widths, patch = settings["channels"], settings["patch_size"]
    sides = [settings["size"] // patch // 2**i for i in range(len(widths))]
    if unknown := sorted(set(settings["attention"]) - set(sides)):
        raise InputError(f"--attention {unknown[0]}: the levels' sides are {', '.join(map(str, sides))}")
    down = tuple("AttnDownBlock2D" if side in settings["attention"] else "DownBlock2D" for side in sides)
    groups = math.gcd(settings["groups"], *widths)
    channels = settings["image_channels"] * patch**2
    try:
        config = unet.UNetConfig(
            sample_size=sides[0],
            in_channels=channels,
            out_channels=channels,
            down_block_types=down,
            up_block_types=tuple(name.replace("Down", "Up") for name in reversed(down)),
            block_out_channels=tuple(widths),
            layers_per_block=settings["layers"],
            attention_head_dim=settings["head_dim"],
            norm_num_groups=groups,
            dropout=settings["dropout"],
            num_class_embeds=len(classes) + (settings["label_dropout"] > 0) if settings["classes"] else None,
            class_names=tuple(classes) if settings["classes"] else None,
            patch_size=patch,
        )
        with torch.device("meta"):
            unet.UNet(config)  # heads must divide channels
        schedule = ddpm.Schedule(
            num_train_timesteps=settings["timesteps"],
            beta_schedule=settings["noise_schedule"],
            prediction_type=settings["prediction"],
            rescale_betas_zero_snr=settings["zero_snr"],
        )
    except ValueError as error:
        raise InputError(f"the settings do not go together: {error}") from error
    return config, schedule


def learning_rate(settings: dict, step: int) -> float:
    """Linear warm-up, then half a cosine to zero (Loshchilov & Hutter 2017) or a constant."""
    warmup = settings["warmup"]
    if step < warmup:
        return settings["lr"] * (step + 1) / (warmup + 1)
    if settings["decay"] == "constant":
        return settings["lr"]
    progress = (step - warmup) / max(settings["steps"] - warmup, 1)
    return settings["lr"] * (1 + math.cos(math.pi * progress)) / 2


def ema_weight(settings: dict, step: int) -> float:
    """Of the newest weights in their average. The half-life grows to a tenth of the images seen, so that short runs
    forget their beginning as well as long ones (Karras et al. 2022, EDM, ramps up in the same way)."""
    half_life = min(settings["ema"], 0.1 * settings["batch_size"] * (step + 1))
    return 1 - 0.5 ** (settings["batch_size"] / half_life) if half_life else 1.0


# ---- the run folder --------------------------------------------------------------------------------------------------


def save_checkpoint(folder: Path, step: int, state: dict, keep: int) -> None:
    """One file, its SHA-256 at the end, put in place by one rename; older ones are pruned only after it."""
    torch.save(state, buffer := io.BytesIO())  # in memory first: torch's writer hides what a disk says
    content = buffer.getbuffer()
    parts = content, hashlib.sha256(content).digest()
    data.atomic_write(folder / f"checkpoint-{step:08d}.pt", lambda file: file.writelines(parts))
    for old in sorted(folder.glob("checkpoint-*.pt"))[:-keep]:
        with data.disk_errors(f"delete {old}"):
            old.unlink()


def load_checkpoint(folder: Path) -> dict:
    """The newest checkpoint that is whole; a damaged one is named and passed over. InputError where none is left."""
    for file in sorted(folder.glob("checkpoint-*.pt"), reverse=True):
        try:
            content = file.read_bytes()
        except OSError as error:
            print(f"{file} cannot be read ({error.strerror}); trying the one before", file=sys.stderr)
            continue
        if hashlib.sha256(content[:-32]).digest() == content[-32:]:
            return torch.load(io.BytesIO(content[:-32]), map_location="cpu", weights_only=True)
        print(f"{file} is damaged; trying the one before", file=sys.stderr)
    raise InputError(f"{folder} has no checkpoint that is whole, so there is nothing to go on from; start a new run")


def identity(record: dict) -> str:
    """What may not change while a run goes on, as text: it is kept in each checkpoint and compared on resuming."""
    settings = {name: value for name, value in record["settings"].items() if name not in RESUMABLE}
    return json.dumps([settings, record["network"], record["schedule"]], sort_keys=True)


def log(folder: Path, record: dict) -> None:
    path = folder / "metrics.jsonl"
    with data.disk_errors(f"write {path}"), open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def cut_metrics(folder: Path, step: int) -> None:
    """Drops what was logged after the checkpoint, a line cut off by a crash included: it will be logged again."""
    path = folder / "metrics.jsonl"
    kept = []
    with data.disk_errors(f"read {path}"):
        lines = path.read_bytes().splitlines() if path.exists() else []
    for line in lines:
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + b"\n")
        except (ValueError, TypeError, KeyError):
            continue
    data.atomic_write(path, lambda file: file.write(b"".join(kept)))


def versions() -> dict:
    packages = {"torch": torch.__version__, "numpy": numpy.__version__, "pillow": PIL.__version__}
    return {"python": platform.python_version()} | packages


def git_commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def refuse_occupied(folder: Path) -> None:
    """InputError for a folder that holds anything: a new run overwrites nothing."""
    with data.disk_errors(f"use the folder --out {folder}"):
        occupied = folder.exists() and any(folder.iterdir())
    if occupied:
        raise InputError(f"--out {folder} is not empty; go on with it by --resume, or name a new folder")


def new_folder(out: Path | None) -> Path:
    """Creates the run's folder, a dated one where none was named."""
    folder = out or sample.RUNS / datetime.now().strftime("%Y-%m-%d-%H%M%S")
    refuse_occupied(folder)
    with data.disk_errors(f"make the folder --out {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def raise_if_changed(run: argparse.Namespace, given: dict, base: dict | None, dataset, start_model) -> None:
    """--config repeats a run only on the data, and from the model, that it had. InputError otherwise."""
    if not run.config:
        return
    same = (base.get("data") or {}).get("fingerprint") == dataset.fingerprint
    if not same and not {"data", "revision", "size", "image_channels"} & given.keys():
        raise InputError(
            f"--config {run.config}: {dataset.source} is not what it was; to use it all the same, add --data"
        )
    if start_model and run.init is None and base.get("init_hash") != start_model.hash:
        raise InputError(
            f"--config {run.config}: the model it began from has changed; to use it all the same, add --init"
        )


# ---- batches, held-out loss, pictures --------------------------------------------------------------------------------


class Batches:
    """The training batches: pure functions of (seed, step, position), cut to this process's share."""

    def __init__(
        self, dataset, rows, settings: dict, null: int | None, cdf: Tensor, device: torch.device, rank: int, world: int
    ):
        self.seed, self.total, self.device = settings["seed"], settings["batch_size"], device
        self.flips, self.null, self.label_dropout = settings["flips"], null, settings["label_dropout"]
        self.mine = slice(rank * self.total // world, (rank + 1) * self.total // world)
        self.rows = torch.from_numpy(rows)
        self.images = torch.from_numpy(dataset.images)
        self.labels = torch.from_numpy(dataset.labels).to(device) if settings["classes"] else None
        self.cdf = cdf.to(device, torch.float32)
        if device.type != "cpu" and dataset.images.nbytes < 2**31:  # small data lives on the device
            self.images = self.images.to(device)

    def indices(self, step: int) -> Tensor:
        """Rows of the data set in the global batch of a step."""
        return self.rows[data.batch_indices(len(self.rows), self.seed, step, self.total)]

    def __call__(self, step: int) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """x0 (B, C, H, W) in [-1, 1], labels, timesteps and noise of this process's share of a step."""
        indices = self.indices(step)[self.mine]
        images = self.images[indices.to(self.images.device)].to(self.device, non_blocking=True)
        if self.flips:
            images = data.flip(images, self.seed, step, self.mine.start, self.total)
        x0 = data.to_float(images)
        # The whole batch's numbers are drawn and the share cut out, so that the cut changes no number.
        random = data.generator(self.seed, "noise", step, device=self.device)
        uniform = torch.rand(self.total, generator=random, device=self.device)[self.mine]
        eps = torch.randn(self.total, *x0.shape[1:], generator=random, device=self.device)[self.mine]
        labels = None if self.labels is None else self.labels[indices.to(self.device)]
        if labels is not None and self.null is not None:  # Ho & Salimans 2022, algorithm 1
            drawn = torch.rand(self.total, generator=data.generator(self.seed, "label", step))[self.mine]
            labels = torch.where(drawn.to(self.device) < self.label_dropout, self.null, labels)
        return x0, labels, ddpm.draw_timesteps(self.cdf, uniform), eps


class HeldOut:
    """Up to 512 held-out images with fixed noise, at timesteps spread evenly over the training density."""

    def __init__(self, dataset, rows, settings: dict, cdf: Tensor, device: torch.device):
        rows = rows[:: math.ceil(len(rows) / 512)]
        self.x0 = data.to_float(torch.from_numpy(dataset.images[rows])).to(device)
        self.labels = torch.from_numpy(dataset.labels[rows]).to(device) if settings["classes"] else None
        random = data.generator("held out")  # not the run's seed: runs are compared on the same noise
        order = torch.randperm(len(rows), generator=random)
        self.t = ddpm.draw_timesteps(cdf, (order + 0.5) / len(rows)).to(device)
        self.eps = torch.randn(self.x0.shape, generator=random).to(device)
        self.batch = settings["batch_size"]

    @torch.no_grad()
    def loss(self, network, table: Tensor, autocast) -> float:
        values = []
        for i in range(0, len(self.x0), self.batch):
            part = slice(i, i + self.batch)
            x_t, target = ddpm.noisy_and_target(table, self.x0[part], self.eps[part], self.t[part])
            with autocast():
                output = network(x_t, self.t[part], None if self.labels is None else self.labels[part])
            values.append(ddpm.losses(table, output, target, self.t[part]))
        return torch.cat(values).mean().item()


def preview(network: unet.UNet, schedule: ddpm.Schedule, device: torch.device, autocast):
    """A grid of 16 images, or 4 of large ones, in 10 calls of the network; the same seeds each time."""
    config = network.config
    count = 16 if max(config.image_size) <= 64 else 4
    shape = (config.image_channels, *config.image_size)
    labels = torch.arange(count, device=device) % config.class_count if config.class_count else None
    with autocast():
        images = ddpm.draw(
            network,
            ddpm.plan(schedule, steps=min(10, schedule.num_train_timesteps)),
            partial(ddpm.normal, [sample.image_generator(seed) for seed in range(count)], shape, config.patch_size),
            device=device,
            labels=labels,
        )
    return data.grid(data.to_uint8(images), scale=max(1, 128 // max(config.image_size)))


# ---- training --------------------------------------------------------------------------------------------------------


def backward(forward, table: Tensor, batch: tuple, accumulate: int, autocast, scaler, no_sync) -> Tensor:
    """Gradients of the mean loss over this process's share of a batch, in `accumulate` parts; returns the loss."""
    total = torch.zeros((), device=table.device)
    parts = [part if part is not None else [None] * accumulate for part in
             (None if tensor is None else tensor.chunk(accumulate) for tensor in batch)]  # fmt: skip
    for i, (x0, labels, t, eps) in enumerate(zip(*parts, strict=True)):
        x_t, target = ddpm.noisy_and_target(table, x0, eps, t)
        with no_sync() if i < accumulate - 1 else nullcontext():
            with autocast():
                output = forward(x_t, t, labels)
            loss = ddpm.losses(table, output, target, t).mean() / accumulate
            scaler.scale(loss).backward()
        total += loss.detach()
    return total


def probe(network: unet.UNet, batches: Batches, table: Tensor, settings: dict, autocast) -> tuple[float, float]:
    """GFLOP and training seconds an image, timed on a small batch without touching weights. Where torch.compile finds
    no compiler, says so in a line and goes back to eager."""
    gflop = unet.flops(network.config, network.config.image_size) / 1e9
    share = len(batches(0)[0]) // settings["accumulate"]
    count = max(1, min(share, round(100 / gflop))) if not settings["compile"] else share
    batch = tuple(None if tensor is None else tensor[:count] for tensor in batches(0))
    scaler = torch.amp.GradScaler(enabled=False)
    seconds, start = math.inf, time.perf_counter()
    for attempt in range(8):
        begin = time.perf_counter()
        try:
            if settings["compile"] and not attempt:
                network.compile()
            backward(network, table, batch, 1, autocast, scaler, nullcontext).item()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            if not settings["compile"] or attempt:
                raise
            sample.go_on_without_compile(network, error)
        network.zero_grad()
        seconds = min(seconds, (time.perf_counter() - begin) / count)
        if attempt > 1 and time.perf_counter() - start > 3:
            break
    return gflop, seconds


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """(N, rows, columns) -> the same with all singular values near 1 (0.7 to 1.2): Newton-Schulz iterations of a
    quintic, whose coefficients were chosen for speed (Jordan et al. 2024, "Muon")."""
    x = matrices.bfloat16() if sample.has_bf16(matrices.device) else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    wide = x.mT if x.shape[1] > x.shape[2] else x
    for _ in range(steps):
        square = wide @ wide.mT
        wide = 3.4445 * wide + (-4.7750 * square + 2.0315 * square @ square) @ wide
    return (wide.mT if x.shape[1] > x.shape[2] else wide).to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised, for matrices and convolutions, these as (out, in x height x width): that of
    torch.optim.Muon (Jordan et al. 2024), which takes matrices alone and cannot be held."""

    def __init__(self, parameters, lr: float, weight_decay: float, momentum: float = 0.95):
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, held: Tensor) -> None:
        """One update, or none at all where `held`, a boolean on the device, says so."""
        (group,) = self.param_groups
        by_shape: dict = {}
        for parameter in group["params"]:
            by_shape.setdefault(parameter.shape, []).append(parameter)
        for shape, parameters in by_shape.items():  # those of one shape together: fewer and larger products
            gradients = torch.stack([parameter.grad.flatten(1) for parameter in parameters])
            kept = self.state[parameters[0]]
            before = kept.setdefault("momentum", torch.zeros_like(gradients))
            momentum = torch.where(held, before, before.lerp(gradients, 1 - group["momentum"]))
            update = orthogonalise(gradients.lerp(momentum, group["momentum"]))
            size = max(1, update.shape[1] / update.shape[2]) ** 0.5 * group["lr"]
            kept["momentum"] = momentum
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"] * ~held)
            update = torch.where(held, 0.0, -size * update).unflatten(2, shape[1:])
            torch._foreach_add_(parameters, list(update.unbind()))


class State:
    """All that changes while a run goes on, and that a resumed run needs beside its seed."""

    def __init__(self, network: unet.UNet, settings: dict, device: torch.device):
        self.step, self.best = 0, math.inf  # updates made; lowest held-out loss
        self.network = network
        self.ema = copy.deepcopy(network).eval().requires_grad_(False)
        options = {"lr": settings["lr"], "weight_decay": settings["weight_decay"]}
        rest, inner = [], []
        for name, parameter in network.named_parameters():
            orthogonal = settings["optimizer"] == "muon" and "_block" in name and parameter.ndim > 1
            (inner if orthogonal else rest).append(parameter)
        self.adamw = torch.optim.AdamW(rest, fused=True, **options)
        self.muon = Muon(inner, **options) if inner else None
        self.scaler = torch.amp.GradScaler(device.type, enabled=settings["precision"] == "fp16")
        self.sums = torch.zeros(4, device=device)  # since the last line of metrics: loss, norm, steps, overflows
        self.first_bad = torch.full((), -1, device=device)  # the first step that was not finite

    def parts(self) -> list[str]:
        return ["network", "ema", "adamw", "scaler"] + ["muon"] * (self.muon is not None)

    def state_dict(self) -> dict:
        parts = {name: getattr(self, name).state_dict() for name in self.parts()}
        return parts | {"step": self.step, "best": self.best, "sums": self.sums}

    def load_state_dict(self, saved: dict) -> None:
        for name in self.parts():
            getattr(self, name).load_state_dict(saved[name])
        self.step, self.best = saved["step"], saved["best"]
        self.sums.copy_(saved["sums"])

    @torch.no_grad()
    def update(self, loss: Tensor, settings: dict) -> None:
        """One step of the optimizers and the average. Where loss or gradient are not finite nothing moves, then or ever
        after, by a flag on the device that nothing waits for. An fp16 scaler's overflows skip one step only."""
        optimizers = [self.adamw] + [self.muon] * (self.muon is not None)
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = learning_rate(settings, self.step)
            self.scaler.unscale_(optimizer)
        if self.muon:
            self.adamw.param_groups[0]["lr"] *= 0.3
        norm = torch.nn.utils.clip_grad_norm_(self.network.parameters(), settings["clip"])
        overflow = loss.isfinite() & ~norm.isfinite() & self.scaler.is_enabled()
        bad = ~(loss.isfinite() & norm.isfinite()) & ~overflow
        self.first_bad = torch.where((self.first_bad < 0) & bad, self.step, self.first_bad)
        held = (self.first_bad >= 0) | overflow
        self.adamw.found_inf = held.float()  # fused AdamW leaves weights, moments and step count alone
        self.adamw.step()  # not through the scaler, which knows overflows only; gradients are unscaled already
        if self.muon:
            self.muon.step(held)
        self.scaler.update()
        self.network.zero_grad()
        averages = list(self.ema.parameters())
        differences = torch._foreach_sub(list(self.network.parameters()), averages)
        torch._foreach_mul_(differences, ema_weight(settings, self.step) * ~held)
        torch._foreach_add_(averages, differences)
        self.sums[:3] += torch.where(held, 0.0, torch.stack([loss, norm, torch.ones_like(loss)]))
        self.sums[3] += overflow
        self.step += 1

    def metrics(self, settings: dict) -> dict:
        """Means since the last call, which starts new ones."""
        loss, norm, count, overflows = self.sums.tolist()
        self.sums.zero_()
        means = {"loss": loss / max(count, 1), "grad_norm": norm / max(count, 1), "overflows": int(overflows)}
        images = self.step * settings["batch_size"]
        return {"step": self.step, "images": images, "lr": learning_rate(settings, self.step - 1)} | means


class Diverged(InputError):
    """The loss or a gradient was not finite: the run ends, its saved files untouched."""

    status = 1


class Stop:
    """Ctrl-C and SIGTERM ask the loop to end after the step in hand, with everything saved."""

    def __init__(self):
        self.signal = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._ask)

    def _ask(self, number, frame):
        if self.signal:  # asked twice: at once
            raise KeyboardInterrupt
        self.signal = number

    def agreed(self, group) -> int:
        """The signal, if any: asked of all processes of a group at each step, for they must stop at the same one."""
        if group is None:
            return self.signal
        flag = torch.tensor(self.signal)
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=group)
        return int(flag)


def start_resumed(run: argparse.Namespace, given: dict) -> tuple[dict, dict]:
    """config.json of the run to go on with, brought up to date with the few flags that may change; its checkpoint."""
    named = {name for name in ("out", "preset", "config", "init") if getattr(run, name) is not None}
    if refused := sorted((given.keys() - RESUMABLE) | named):
        flag = refused[0].replace("_", "-")
        raise InputError(f"--{flag} cannot change when a run is resumed; start a new run, or leave it out")
    file = run.resume / "config.json"
    saved, checkpoint = read_config(file), load_checkpoint(run.resume)
    if not isinstance(saved.get("data"), dict) or not {"network", "schedule"} <= saved.keys():
        raise InputError(f"{file} is damaged: it lacks network, schedule or data")
    if identity(saved) != checkpoint["identity"]:
        raise InputError(
            f"{file} is not what it was when {run.resume} began; undo the edit, or start a new run by --config"
        )
    saved["settings"] |= given
    if "steps" in given:
        saved["settings"]["epochs"] = None
    return saved, checkpoint


def adopt(settings: dict, given: dict, size: int | None, model: sample.Model) -> tuple[unet.UNetConfig, ddpm.Schedule]:
    """With --init: the network and schedule of a model, at the size asked for; settings follow the model."""
    config = model.network.config
    settings["size"] = size or config.image_size[0]
    if config.null_label is None:
        if given.get("label_dropout"):
            raise InputError("--label-dropout: the model that --init names knows no hidden class; leave it out")
        settings["label_dropout"] = 0.0
    settings["image_channels"], settings["classes"] = config.image_channels, bool(config.num_class_embeds)
    if settings["size"] % config.divisor:
        raise InputError(f"--size {settings['size']} must be a multiple of {config.divisor} for this model")
    side = settings["size"] // config.patch_size
    return replace(config, sample_size=side, dropout=settings["dropout"]), model.schedule


def prepare_data(settings: dict, rank: int, world: int) -> data.Dataset:
    """The first process prepares the data, the others find it prepared. Fills in what depends on the data. InputError
    in every process where the first one cannot."""
    options = {"channels": settings["image_channels"], "revision": settings["revision"], "progress": not rank}
    found = [None]
    if not rank:
        try:
            dataset = data.prepare(settings["data"], settings["size"], **options)
            found = [dataset.source]
        except InputError as error:
            found = [error]
    if world > 1:
        dist.broadcast_object_list(found)
    if isinstance(found[0], InputError):
        raise found[0]
    if rank:
        dataset = data.prepare(found[0], settings["size"], **options)
    settings["data"] = dataset.source
    if settings["classes"] and not dataset.classes:
        raise InputError(f"--classes: the images of {settings['data']} have no classes; names of folders make them")
    return dataset


def open_folder(folder: Path, state: State, record: dict, batches: Batches, text: str) -> None:
    """Writes what is known before the first step, and says it."""
    sample.write_json(folder / "config.json", record)
    cut_metrics(folder, state.step)
    data.write_png(
        folder / "samples/data.png",
        data.grid(data.to_uint8(batches(0)[0][:64]), scale=max(1, 128 // record["settings"]["size"])),
    )
    kept = record["data"]
    print(f"{kept['images']} images to train on, {kept['held_out']} held out ({kept['source']})")
    for line in kept["skipped"][:5]:
        print(f"skipped {line}")
    if len(kept["skipped"]) > 5:
        print(f"skipped {len(kept['skipped'])} in all; `python data.py` lists them")
    print(text)
    print(f"{folder}: " + (f"going on from step {state.step}" if state.step else "a new run"), flush=True)


def describe(settings: dict, preset: str, state: State, cost: tuple[float, float], world: int) -> str:
    parameters = sum(parameter.numel() for parameter in state.network.parameters())
    gflop, seconds = cost
    images = (settings["steps"] - state.step) * settings["batch_size"]
    usual = RATES[settings["optimizer"]]
    far = "below" if settings["lr"] < usual / 10 else "above" if settings["lr"] > usual * 10 else None
    effect = "many more steps needed" if far == "below" else "training may diverge"
    said = f"\n--lr {settings['lr']:g} is far {far} {settings['optimizer']}'s default of {usual:g}: {effect}"
    return (
        f"{preset}: {settings['size']} px, {parameters:,} parameters, {gflop:.2f} GFLOP an image\n"
        f"{settings['steps'] - state.step:,} steps of {settings['batch_size']} images on {settings['device']} in "
        f"{settings['precision']}: about {timedelta(seconds=round(images * seconds / world))}"
    ) + (said if far else "")


def train(run: argparse.Namespace, given: dict) -> int:
    # -- distributed set-up: torchrun sets these variables
    rank, local, world = (int(os.environ.get(name, fallback)) for name, fallback in
                          (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))  # fmt: skip
    lead = rank == 0
    if "steps" in given and "epochs" in given:
        raise InputError("--steps and --epochs say the same thing; give one of them")
    saved, checkpoint = start_resumed(run, given) if run.resume else (None, None)
    if run.out is not None:
        refuse_occupied(run.out)
    base = saved or (read_config(run.config) if run.config else None)
    device = sample.choose_device(given.get("device") or (base["settings"]["device"] if base else None))
    if world > 1:
        if device.type == "cuda":
            device = torch.device("cuda", local)
            torch.cuda.set_device(device)
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=2))
        atexit.register(dist.destroy_process_group)
    signals = dist.new_group(backend="gloo") if world > 1 else None  # on the CPU: asking does not wait for a GPU

    # -- settings and data
    settings = saved["settings"] if saved else resolve(run, given, base, device)
    start_model = sample.load(settings["init"], fuse=False) if settings["init"] and not saved else None
    if start_model:
        size = given.get("size", base["settings"]["size"] if base else None)
        config, schedule = adopt(settings, given, size, start_model)
    share = world * settings["accumulate"]
    if settings["batch_size"] % share:
        raise InputError(f"--batch-size {settings['batch_size']} must be a multiple of {share}: "
                         "processes times --accumulate")  # fmt: skip
    dataset = prepare_data(settings, rank, world)
    if saved and saved["data"].get("fingerprint") != dataset.fingerprint:
        raise InputError(
            f"{settings['data']}: the data are no longer what they were; name them with --data if they moved"
        )
    raise_if_changed(run, given, base, dataset, start_model)
    rows, held_rows = data.split(dataset)
    if settings["epochs"]:
        settings["steps"] = math.ceil(settings["epochs"] * len(rows) / settings["batch_size"])
    if not base and "warmup" not in given:  # the default, or a preset's, in a short run
        settings["warmup"] = min(settings["warmup"], settings["steps"] // 10)

    # -- model, or resume
    if saved:
        config, schedule = unet.UNetConfig.from_dict(saved["network"]), ddpm.Schedule.from_dict(saved["schedule"])
    elif not start_model:
        config, schedule = design(settings, dataset.classes)
    if config.num_class_embeds and len(dataset.classes) > config.num_class_embeds:
        raise InputError(f"{len(dataset.classes)} classes of images for a model of {config.num_class_embeds}")
    if config.class_names and dataset.classes != config.class_names:
        raise InputError(
            f"the classes of the images ({', '.join(dataset.classes)}) are not those of the model "
            f"({', '.join(config.class_names)})"
        )
    torch.manual_seed(data.generator(settings["seed"], "weights").initial_seed())
    network = unet.UNet(config)
    if start_model:
        network.load_state_dict(start_model.network.state_dict())
    network.to(device=device, memory_format=torch.channels_last)
    state = State(network, settings, device)
    if checkpoint:
        state.load_state_dict(checkpoint)
        del checkpoint
    if state.step >= settings["steps"]:
        raise InputError(f"{run.resume} has finished its {state.step} steps; give a larger number with --steps")

    # -- batches, compile, the run's folder
    def save_state() -> None:
        save_checkpoint(folder, state.step, state.state_dict() | {"identity": identity(record)}, settings["keep"])

    def autocast():
        return torch.autocast(device.type, sample.PRECISIONS[settings["precision"]], enabled=amp)

    amp = settings["precision"] != "fp32"
    table = ddpm.training_table(schedule, settings["loss"], settings["gamma"]).to(device, torch.float32)
    try:
        cdf = ddpm.timestep_cdf(schedule, settings["density"], settings["density_mean"], settings["density_std"])
    except ValueError as error:
        raise InputError(f"--density-mean and --density-std: {error}") from error
    batches = Batches(dataset, rows, settings, config.null_label, cdf, device, rank, world)
    held_out = HeldOut(dataset, held_rows, settings, cdf, device)
    cost = probe(network, batches, table, settings, autocast)
    folder = run.resume or (new_folder(run.out) if lead else None)
    if lead:
        kept = {"source": dataset.source, "revision": dataset.revision, "fingerprint": dataset.fingerprint,
                "images": len(rows), "held_out": len(held_rows), "skipped": list(dataset.skipped[:100])}  # fmt: skip
        record = {"schema": 1, "settings": settings, "network": config.to_dict(), "schedule": schedule.to_dict(),
                  "data": kept, "versions": versions(), "git_commit": git_commit(), "processes": world,
                  "threads": torch.get_num_threads(),
                  "init_hash": start_model.hash if start_model else (base or {}).get("init_hash")}  # fmt: skip
        preset = run.preset or DEVICE_PRESETS[device.type]
        preset += " with changes" * bool(SETTINGS["network"].keys() & given.keys())
        preset = "as before" if base else f"from {settings['init']}" if start_model else preset
        open_folder(folder, state, record, batches, describe(settings, preset, state, cost, world))
        if not saved:
            save_state()  # so that a run that dies early goes on from the same weights
    forward = torch.nn.parallel.DistributedDataParallel(network) if world > 1 else network
    no_sync = forward.no_sync if world > 1 else nullcontext

    # -- loop
    steps, stop = settings["steps"], Stop()
    begin, logged = time.perf_counter(), state.step
    bar = tqdm(total=steps, initial=state.step, unit="step", disable=None if lead else True, smoothing=0.05)
    while state.step < steps:
        # Dropout is the one draw by a global generator: seeded each step, so there is no state to save.
        torch.manual_seed(data.generator(settings["seed"], "dropout", state.step, rank).initial_seed())
        batch = batches(state.step)
        loss = backward(forward, table, batch, settings["accumulate"], autocast, state.scaler, no_sync)
        if world > 1:
            dist.all_reduce(loss)
            loss /= world
        state.update(loss, settings)
        bar.update()

        due = {name for name in ("log", "eval", "preview", "save") if state.step % settings[f"{name}_every"] == 0}
        if state.step == steps:
            due = {"log", "eval", "preview", "save"}
        asked = stop.agreed(signals)
        if not due and not asked:
            continue
        if state.first_bad >= 0:  # the one place that waits for the device
            at = int(state.first_bad)
            raise Diverged(
                f"the loss or a gradient was not finite at step {at}, with the images {batches.indices(at).tolist()} "
                "of the data; what was saved is kept; a new run with a lower --lr or --precision fp32 may help"
            )
        if state.scaler.is_enabled() and state.scaler.get_scale() < 1:
            raise Diverged(f"gradients overflow fp16 at step {state.step} even unscaled; try --precision fp32")
        if "log" in due:
            line = state.metrics(settings)
            speed = (state.step - logged) * settings["batch_size"] / (time.perf_counter() - begin)
            begin, logged = time.perf_counter(), state.step
        if lead:
            if "log" in due:
                log(folder, line | {"images_per_second": speed, "time": time.time()})
                bar.set_postfix_str(f"loss {line['loss']:.4f}, {speed:.1f} images/s")
            if "eval" in due:
                held_out_loss = held_out.loss(state.ema, table, autocast)
                if not math.isfinite(held_out_loss):
                    raise Diverged(f"the held-out loss was not finite at step {state.step}; try a lower --lr")
                log(folder, {"step": state.step, "held_out_loss": held_out_loss})
                if held_out_loss < state.best:
                    state.best = held_out_loss
                    sample.save_model(folder / "best", state.ema, schedule)
            if "preview" in due:
                picture = preview(state.ema, schedule, device, autocast)
                path = folder / f"samples/{state.step:08d}.png"
                data.write_png(path, picture, {"step": str(state.step)})
                bar.write(f"step {state.step}: look at {path}")
            if "save" in due or asked:
                # The checkpoint last: it says that everything up to its step is on disk.
                sample.save_model(folder / "model", state.ema, schedule)
                save_state()
        if asked:
            break
    bar.close()
    if lead and state.step < steps:
        print(f"stopped at step {state.step}; go on with: python train.py --resume {folder}")
    elif lead:
        print(f"finished; draw with: python sample.py --model {folder}")
    return 128 + asked if asked else 0


def main(argv: Sequence[str] | None = None) -> int:
    run, given = parse_arguments(argv)
    sample.set_threads()
    return data.exit_status(lambda: train(run, given))


if __name__ == "__main__":
    sys.exit(main())
