"""A dataset in, a model folder out: one loop, to be read from top to bottom.

    python train.py --data photos/ --steps 2000                     trains on a folder of images
    python train.py --resume runs/x                                 continues a run, bit-identically
    torchrun --nproc-per-node 4 train.py --data photos/             the same global batch, on four GPUs

Data order, flips, timesteps and noise are pure functions of (seed, step, position in the global batch); dropout depends
on (seed, step, process). A run that is stopped anywhere and resumed therefore equals the run that was never stopped,
and the number of processes changes only rounding and dropout.
"""

import argparse
import atexit
import copy
import json
import math
import os
import platform
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

import data
import ddpm
import monitor
import sample
import unet
from builtin.features import load_features
from builtin.muon import Muon
from builtin.profile import profile
from builtin.run_folder import (
    append_metrics,
    cut_metrics,
    load_checkpoint,
    resume_after_restart,
    run_folder,
    save_checkpoint,
)
from builtin.run_report import model_card, report_run
from data import Flag, InputError, real, whole

# ---- settings --------------------------------------------------------------------------------------------------------


def whole_numbers(low: int, high: int) -> Callable:
    """Returns a parser of comma-separated whole numbers, or an empty text: a type for argparse."""
    return lambda text: [whole(low, high)(part.strip()) for part in text.split(",") if part.strip()]


QUALITY_IMAGES = 256
SEARCHED = 4096  # training images among which copies are looked for during training

# All settings of a run. A preset replaces some of the defaults. Flags and config.json use the same names.
SETTINGS = {
    "data": [
        Flag("--data", "auto", str, "folder of images, parquet file, Hugging Face dataset id, smithsonian, "
             "synthetic[:COUNT], or auto: smithsonian if it is cached or the hub can be reached, else synthetic"),
        Flag("--revision", None, str, "commit or branch of a Hugging Face dataset"),
        Flag("--size", 32, whole(8, 1024), "width and height of the images in pixels"),
        Flag("--image-channels", 3, whole(1, 3), "3 for colour, 1 for grey"),
        Flag("--classes", False, bool, "train a class-conditional model, for sample.py --class"),
        Flag("--label-dropout", 0.1, real(0, 1), "probability of dropping the class, for guidance; needs --classes"),
        Flag("--flips", True, bool, "flip each image horizontally with probability 0.5"),
    ],
    "network": [
        Flag("--init", None, str, "start from the weights of this run or model folder, with its network and schedule"),
        Flag("--channels", [32, 64, 128], whole_numbers(1, 65536), "channels per level; each halves the resolution"),
        Flag("--attention", [8], whole_numbers(1, 65536), "feature-map resolutions that get attention"),
        Flag("--layers", 1, whole(1, 16), "ResNet blocks per level"),
        Flag("--head-dim", 32, whole(1, 4096), "channels of an attention head"),
        Flag("--patch-size", 1, whole(1, 16), "fold N x N pixels into channels at the input (space-to-depth)"),
        Flag("--groups", 4, whole(1, 65536), "groups of a group norm, lowered to a common divisor of --channels"),
        Flag("--dropout", 0.0, real(0, 0.99), "dropout probability in ResNet blocks"),
    ],
    "diffusion": [
        Flag("--prediction", "v_prediction", ddpm.PREDICTIONS, "what the network predicts"),
        Flag("--noise-schedule", "linear", ddpm.BETA_SCHEDULES, "noise schedule"),
        Flag("--zero-snr", False, bool, "rescale the schedule to zero terminal SNR: the last timestep is pure noise"),
        Flag("--timesteps", 1000, whole(2, 100_000), "timesteps of the noise schedule"),
        Flag("--loss", "mse", ddpm.LOSSES, "mse, or min_snr: min-SNR-gamma weighting"),
        Flag("--gamma", 5.0, real(0.01), "upper bound of the signal-to-noise ratio, for min_snr"),
        Flag("--density", "lognormal", ddpm.DENSITIES, "distribution of timesteps: uniform, or lognormal sigma/alpha"),
        Flag("--density-mean", -0.8, real(-20, 20), "mean of log(sigma/alpha), for lognormal"),
        Flag("--density-std", 1.6, real(0.01, 20), "standard deviation of log(sigma/alpha), for lognormal"),
    ],
    "optimisation": [
        Flag("--steps", 5000, whole(1, 10**9), "updates of the weights"),
        Flag("--epochs", None, whole(1, 10**6), "passes over the data, instead of --steps"),
        Flag("--batch-size", 16, whole(1, 65536), "images per update, over all processes"),
        Flag("--accumulate", 1, whole(1, 4096), "gradient accumulation: micro-batches per update and process"),
        Flag("--optimizer", "muon", ("muon", "adamw"), "muon: Muon for the weight matrices of the blocks, AdamW for "
             "the rest"),
        Flag("--lr", None, real(0, 1000), "peak learning rate (default: muon 0.01, adamw 0.001)"),
        Flag("--warmup", 200, whole(0, 10**9), "steps over which the learning rate rises to --lr"),
        Flag("--decay", "cosine", ("cosine", "constant"), "learning rate after the warm-up"),
        Flag("--weight-decay", 0.01, real(0), "decoupled weight decay, multiplied by the learning rate"),
        Flag("--skip-batches", [], whole_numbers(0, 10**9), "steps whose batches are skipped, as after a divergence"),
        Flag("--clip", 1.0, real(1e-6), "gradients are clipped to this norm"),
        Flag("--ema", 500_000, whole(0), "half-life of the weight EMA in images, at most 1/10 of the images seen; "
             "0: no EMA"),
        Flag("--seed", 0, whole(0), "random seed of the training"),
    ],
    "logging": [
        Flag("--log-every", 20, whole(1), "steps between lines of metrics.jsonl"),
        Flag("--eval-every", 500, whole(1), "steps between held-out losses"),
        Flag("--quality-every", None, whole(0, 10**9), f"steps between measurements of quality and memorisation, on "
             f"{QUALITY_IMAGES} images; 0: none (default: such that drawing them takes about 5% of the time)"),
        Flag("--preview-every", 500, whole(1), "steps between grids of samples"),
        Flag("--save-every", 500, whole(1), "steps between checkpoints"),
        Flag("--keep", 2, whole(1, 1000), "checkpoints to keep"),
    ],
    "machine": [
        sample.DEVICE_FLAGS[0],
        Flag("--precision", None, tuple(sample.PRECISIONS), "precision of AMP (default: bf16 if the hardware "
             "supports it, else fp16 on CUDA and fp32 elsewhere)"),
        Flag("--compile", None, bool, "torch.compile the network (default: on CUDA)"),
    ],
}  # fmt: skip
FLAGS_BY_NAME = {flag.dest: flag for flags in SETTINGS.values() for flag in flags}
DEFAULTS = {name: flag.default for name, flag in FLAGS_BY_NAME.items()}
RATES = {"muon": 0.01, "adamw": 1e-3}  # default of --lr

PRESETS = {
    "nano": {},
    "small": {"size": 64, "channels": [32, 64, 128, 160], "attention": [16, 8], "steps": 16_000},
    "base": {"size": 128, "channels": [64, 128, 256, 384], "attention": [16, 8], "layers": 2, "head_dim": 64,
             "groups": 8, "patch_size": 2, "batch_size": 64, "warmup": 1000, "steps": 60_000, "density_mean": -0.4,
             "eval_every": 1000, "preview_every": 1000, "save_every": 1000},
    # Network and recipe of diffusers' butterfly training tutorial.
    "classic": {"size": 128, "channels": [128, 128, 256, 256, 512, 512], "attention": [8], "layers": 2, "head_dim": 8,
                "groups": 32, "prediction": "epsilon", "density": "uniform", "batch_size": 16, "optimizer": "adamw",
                "lr": 1e-4, "warmup": 500, "epochs": 30, "ema": 0},
}  # fmt: skip
DEVICE_PRESETS = {"cuda": "base", "mps": "small", "cpu": "nano"}
# May change when a run is resumed. Only rounding depends on the number of micro-batches.
RESUMABLE = {"steps", "epochs", "data", "device", "quality_every", "save_every", "keep"}
RESUMABLE |= {"accumulate", "skip_batches"}
# Settings taken from the model of --init; their flags are refused together with --init.
FROM_MODEL = {flag.dest for flag in SETTINGS["network"] if flag.dest not in ("dropout", "init")}
FROM_MODEL |= {"image_channels", "classes", "prediction", "noise_schedule", "zero_snr", "timesteps"}

RUN_FLAGS = {
    "run": [
        Flag("--out", None, Path, "folder of a new run (default: runs/DATE-TIME)"),
        Flag("--preset", None, tuple(PRESETS), "nano (32 px), small (64 px), base or classic (128 px) (default: by "
             "device: cpu nano, mps small, cuda base)"),
        Flag("--config", None, Path, "start a new run with the settings of this config.json"),
        Flag("--profile", None, Path, "train nothing: print where the time of a step goes, and write a trace (JSON)"),
        Flag("--resume", None, Path, "continue the run in this folder; add --steps to extend a finished one"),
    ]
}  # fmt: skip


def parse_arguments(argv: Sequence[str] | None) -> tuple[argparse.Namespace, dict]:
    """Returns the arguments of RUN_FLAGS, and the settings that were given as flags."""
    parser = data.Parser(
        "train.py",
        "Train a diffusion model on images. Settings come from the defaults, then from a\n"
        "preset or --config, then from flags.",
        __doc__,
    )
    data.add_flags(parser, RUN_FLAGS)
    for title, flags in SETTINGS.items():
        shown = [replace(flag, default=argparse.SUPPRESS, help=_help_with_defaults(flag)) for flag in flags]
        data.add_flags(parser, {title: shown})
    args = vars(parser.parse_args(argv))
    given = {name: args.pop(name) for name in DEFAULTS if name in args}
    return argparse.Namespace(**args), given


def _help_with_defaults(flag: Flag) -> str:
    defaults = {preset: values.get(flag.dest) for preset, values in {"default": DEFAULTS, **PRESETS}.items()}
    shown = ", ".join(f"{name}: {data.as_text(value)}" for name, value in defaults.items() if value is not None)
    return f"{flag.help} ({shown})" if shown else flag.help


def read_config(path: Path) -> dict:
    """Reads a run's config.json and validates its settings by the same rules as flags.

    Settings that are missing, because the version was older, take their defaults and are listed under "defaulted".
    Raises InputError if anything else is missing, unknown or invalid.
    """
    config = data.read_json(path)
    settings = config.get("settings")
    if not settings or not isinstance(settings, dict) or not isinstance(config.get("data", {}), dict):
        raise InputError(f"{path} is not the config.json of a run: it has no settings")
    unknown = sorted(settings.keys() - DEFAULTS.keys())
    if unknown:
        raise InputError(
            f"{path} has settings that this version does not know: {', '.join(unknown)}; use the version that wrote "
            "it, or remove them"
        )
    config["defaulted"] = sorted(DEFAULTS.keys() - settings.keys())
    config["settings"] = settings = DEFAULTS | settings
    for name, flag in FLAGS_BY_NAME.items():
        if not flag.accepts(settings[name]):
            raise InputError(f"{path}: {name} cannot be {settings[name]!r}")
    return config


def resolve_settings(args: argparse.Namespace, given: dict, base: dict | None, device: torch.device) -> dict:
    """Returns all settings of a new run: defaults, then a preset or settings of --config (`base`), then flags."""
    if base and args.preset:
        raise InputError("--preset and --config exclude each other; give one of them")
    preset = PRESETS[args.preset or DEVICE_PRESETS[device.type]]
    settings = DEFAULTS | (base or preset) | given
    if "init" in given:
        settings["init"] = os.path.abspath(given["init"])
    if "steps" in given:
        settings["epochs"] = None
    settings["device"] = device.type
    resolve_defaults(settings, device)
    check_settings(settings, given)
    return settings


def resolve_defaults(settings: dict, device: torch.device) -> None:
    """Sets the settings whose defaults depend on others or on the device."""
    if settings["lr"] is None:
        settings["lr"] = RATES[settings["optimizer"]]
    if settings["precision"] is None:
        other = "fp16" if device.type == "cuda" else "fp32"
        settings["precision"] = "bf16" if sample.has_bf16(device) else other
    if settings["compile"] is None:
        settings["compile"] = device.type == "cuda"
    if settings["quality_every"] is None:  # forward passes: drawing an image takes 10, training on it 3
        steps = QUALITY_IMAGES * 10 / 3 / settings["batch_size"] / 0.05
        previews = math.ceil(steps / settings["preview_every"])
        settings["quality_every"] = previews * settings["preview_every"]


def check_settings(settings: dict, given: dict) -> None:
    """Raises InputError for incompatible settings, before any image is read."""
    if (settings["device"], settings["precision"]) == ("mps", "bf16"):
        raise InputError("--precision bf16 is not implemented for mps; choose fp32")
    if not settings["channels"]:
        raise InputError("--channels needs at least one number")
    if settings["init"]:
        fixed = sorted(FROM_MODEL & given.keys())
        if fixed:
            raise InputError(f"{FLAGS_BY_NAME[fixed[0]].name} is set by the model of --init; omit it")
        return
    if "label_dropout" in given and not settings["classes"]:
        raise InputError("--label-dropout needs --classes; add --classes or omit --label-dropout")
    levels, patch = len(settings["channels"]), settings["patch_size"]
    divisor = patch * 2 ** (levels - 1)
    if settings["size"] % divisor:
        raise InputError(
            f"--size {settings['size']} must be a multiple of {divisor}: "
            f"{levels} levels, each half the size of the one before, and patches of {patch}"
        )


def make_configs(settings: dict, classes: Sequence[str]) -> tuple:
    """Returns the network's configuration and the noise schedule that the settings describe."""
    widths, patch = settings["channels"], settings["patch_size"]
    sides = [settings["size"] // patch // 2**i for i in range(len(widths))]
    unknown = sorted(set(settings["attention"]) - set(sides))
    if unknown:
        raise InputError(f"--attention {unknown[0]}: the resolutions are only {', '.join(map(str, sides))}")
    down = tuple("AttnDownBlock2D" if side in settings["attention"] else "DownBlock2D" for side in sides)
    channels = settings["image_channels"] * patch**2
    names = tuple(classes) if settings["classes"] else None
    with data.bad_input("these settings are incompatible"):
        config = unet.UNetConfig(
            sample_size=sides[0],
            in_channels=channels,
            out_channels=channels,
            down_block_types=down,
            up_block_types=tuple(name.replace("Down", "Up") for name in reversed(down)),
            block_out_channels=tuple(widths),
            layers_per_block=settings["layers"],
            attention_head_dim=settings["head_dim"],
            norm_num_groups=math.gcd(settings["groups"], *widths),
            dropout=settings["dropout"],
            num_class_embeds=names and len(names) + (settings["label_dropout"] > 0),  # the last one: "no class"
            class_names=names,
            patch_size=patch,
        )
        with torch.device("meta"):
            unet.UNet(config)  # raises ValueError if head_dim does not divide the channels
        schedule = ddpm.Schedule(
            num_train_timesteps=settings["timesteps"],
            beta_schedule=settings["noise_schedule"],
            prediction_type=settings["prediction"],
            rescale_betas_zero_snr=settings["zero_snr"],
        )
    return config, schedule


def learning_rate(settings: dict, step: int) -> float:
    """Returns the learning rate of a step: linear warm-up, then constant or a cosine (Loshchilov & Hutter 2017)."""
    peak, warmup = settings["lr"], settings["warmup"]
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    if settings["decay"] == "constant":
        return peak
    progress = (step - warmup) / max(settings["steps"] - warmup, 1)
    return peak * (1 + math.cos(math.pi * progress)) / 2


def ema_weight(settings: dict, step: int) -> float:
    """Returns the weight of the newest parameters in the moving average.

    The half-life is at most a tenth of the images seen, so that short runs forget their initial weights too (the ramp
    of EDM, Karras et al. 2022).
    """
    half_life = min(settings["ema"], 0.1 * settings["batch_size"] * (step + 1))
    return 1 - 0.5 ** (settings["batch_size"] / half_life) if half_life else 1.0


def identity(record: dict) -> str:
    """Returns, as text, the part of config.json that must stay the same on resuming; checkpoints store it."""
    settings = {name: value for name, value in (DEFAULTS | record["settings"]).items() if name not in RESUMABLE}
    return json.dumps([settings, record.get("network"), record.get("schedule")], sort_keys=True)


# ---- batches, held-out loss, pictures --------------------------------------------------------------------------------


class Batch(NamedTuple):
    """Images with their classes, timesteps and noise."""

    x0: Tensor  # (B, C, H, W) in [-1, 1]
    labels: Tensor | None  # (B,)
    t: Tensor  # (B,)
    eps: Tensor  # (B, C, H, W)

    def part(self, start: int, count: int) -> "Batch":
        rows = slice(start, start + count)
        return Batch(*(tensor if tensor is None else tensor[rows] for tensor in self))


def prediction_losses(network: Callable, table: Tensor, batch: Batch, autocast: Callable) -> Tensor:
    """Returns the loss of each image of a batch, (B,) float32."""
    x_t, target = ddpm.noisy_and_target(table, batch.x0, batch.eps, batch.t)
    with autocast():
        output = network(x_t, batch.t, batch.labels)
    return ddpm.losses(table, output, target, batch.t)


class Batches:
    """The training batches of this process: its share of global batches, which are pure functions of (seed, step)."""

    def __init__(
        self, dataset, rows, settings: dict, null: int | None, cdf: Tensor, device: torch.device, rank: int, world: int
    ):
        self.seed, self.total, self.device = settings["seed"], settings["batch_size"], device
        self.flips, self.null, self.label_dropout = settings["flips"], null, settings["label_dropout"]
        self.share = slice(rank * self.total // world, (rank + 1) * self.total // world)
        self.rows = torch.from_numpy(rows)
        self.images = torch.from_numpy(dataset.images)
        self.labels = torch.from_numpy(dataset.labels).to(device) if settings["classes"] else None
        self.cdf = cdf.to(device, torch.float32)
        if device.type != "cpu" and dataset.images.nbytes < 2**31:  # small datasets are kept on the device
            self.images = self.images.to(device)

    def indices(self, step: int) -> Tensor:
        """Returns the rows of the dataset in the global batch of a step."""
        return self.rows[data.batch_indices(len(self.rows), self.seed, step, self.total)]

    def __call__(self, step: int) -> Batch:
        """Returns this process's share of the batch of a step."""
        indices = self.indices(step)[self.share]
        images = self.images[indices.to(self.images.device)].to(self.device, non_blocking=True)
        if self.flips:
            images = data.flip(images, self.seed, step, self.share.start, self.total)
        x0 = data.to_float(images)
        # Generated for the whole batch and then sliced, so that the numbers do not depend on the share of a process.
        random = data.generator(self.seed, "noise", step, device=self.device)
        uniform = torch.rand(self.total, generator=random, device=self.device)[self.share]
        eps = torch.randn(self.total, *x0.shape[1:], generator=random, device=self.device)[self.share]
        labels = self.labels
        if labels is not None:
            labels = labels[indices.to(self.device)]
            if self.null is not None:  # Ho & Salimans 2022, algorithm 1
                chance = torch.rand(self.total, generator=data.generator(self.seed, "label", step))[self.share]
                labels = torch.where(chance.to(self.device) < self.label_dropout, self.null, labels)
        return Batch(x0, labels, ddpm.choose_timesteps(self.cdf, uniform), eps)


class HeldOut:
    """Up to 512 held-out images with fixed noise, at evenly spaced quantiles of the training timesteps."""

    def __init__(self, dataset, rows, settings: dict, cdf: Tensor, device: torch.device):
        rows = rows[:: math.ceil(len(rows) / 512)]
        x0 = data.to_float(torch.from_numpy(dataset.images[rows])).to(device)
        labels = torch.from_numpy(dataset.labels[rows]).to(device) if settings["classes"] else None
        random = data.generator("held out")  # without the run's seed, so that runs are compared on the same noise
        order = torch.randperm(len(rows), generator=random)
        t = ddpm.choose_timesteps(cdf, (order + 0.5) / len(rows)).to(device)
        eps = torch.randn(x0.shape, generator=random).to(device)
        self.batch = Batch(x0, labels, t, eps)
        self.batch_size = settings["batch_size"]

    @torch.no_grad()
    def losses(self, network: Callable, table: Tensor, autocast: Callable) -> Tensor:
        """Returns the loss of each image, in the order of their timesteps: float32 (N,)."""
        parts = (self.batch.part(start, self.batch_size) for start in range(0, len(self.batch.x0), self.batch_size))
        losses = torch.cat([prediction_losses(network, table, part, autocast) for part in parts])
        return losses[self.batch.t.argsort()]


def preview(model: sample.Model, autocast: Callable):
    """Draws a grid of 16 images, or 4 if they are large, in 10 steps, with the same seeds each time."""
    config, (_, height, width) = model.network.config, model.shape
    count = 16 if max(height, width) <= 64 else 4
    labels = [i % config.class_count for i in range(count)] if config.class_count else ()
    with autocast():
        images = sample.draw(model, range(count), ddpm.sampler_table(model.schedule), labels, batch_size=count)
    return data.grid(images, scale=max(1, 128 // max(height, width)))


# ---- state --------------------------------------------------------------------------------------------


class Diverged(InputError):
    """The loss or a gradient was not finite: the run ends, and its saved files stay as they are."""

    status = 1


class State:
    """Everything that changes during a run, and that a resumed run needs besides its seed."""

    def __init__(self, network: unet.UNet, settings: dict, device: torch.device):
        self.step = 0  # updates made
        self.best = math.inf  # lowest held-out loss
        self.network = network
        self.ema = copy.deepcopy(network).eval().requires_grad_(False)
        options = {"lr": settings["lr"], "weight_decay": settings["weight_decay"]}
        rest, inner = [], []
        for name, parameter in network.named_parameters():
            orthogonal = settings["optimizer"] == "muon" and "_block" in name and parameter.ndim > 1
            (inner if orthogonal else rest).append(parameter)
        self.optimizers = {"adamw": torch.optim.AdamW(rest, fused=True, **options)}
        if inner:
            self.optimizers["muon"] = Muon(inner, **options)
        self.scaler = torch.amp.GradScaler(device.type, enabled=settings["precision"] == "fp16")
        self.sums = torch.zeros(4, device=device)  # since the last line of metrics: loss, norm, steps, overflows
        self.first_bad = torch.full((), -1, device=device)  # first step whose loss or gradient was not finite

    def parts(self) -> dict:
        return {"network": self.network, "ema": self.ema, "scaler": self.scaler, **self.optimizers}

    def state_dict(self) -> dict:
        parts = {name: part.state_dict() for name, part in self.parts().items()}
        return parts | {"step": self.step, "best": self.best, "sums": self.sums}

    def load_state_dict(self, saved: dict) -> None:
        for name, part in self.parts().items():
            if name not in saved:
                raise InputError(
                    f"the checkpoint has no state of {name}: it was written by a version too old to resume"
                )
            part.load_state_dict(saved[name])
        self.step, self.best = saved["step"], saved["best"]
        self.sums.copy_(saved["sums"])

    @torch.no_grad()
    def update(self, loss: Tensor, settings: dict) -> None:
        """Makes one step of the optimizers and of the moving average.

        The first step with a non-finite loss or gradient is recorded on the device, without a synchronisation. In fp16,
        which synchronises at each step, a non-finite gradient of a finite loss is an overflow: the step is skipped and
        the scaler reduces its scale.
        """
        for optimizer in self.optimizers.values():
            optimizer.param_groups[0]["lr"] = learning_rate(settings, self.step)
            self.scaler.unscale_(optimizer)
        if "muon" in self.optimizers:
            self.optimizers["adamw"].param_groups[0]["lr"] *= 0.3
        norm = torch.nn.utils.clip_grad_norm_(self.network.parameters(), settings["clip"])
        finite = loss.isfinite() & norm.isfinite()
        if self.scaler.is_enabled() and loss.isfinite() and not finite:
            self.sums[3] += 1
        else:
            self.first_bad = torch.where((self.first_bad < 0) & ~finite, self.step, self.first_bad)
            for optimizer in self.optimizers.values():
                optimizer.step()  # not scaler.step, which would skip one optimizer without the other
            self.sums[:3] += torch.stack([loss, norm, torch.ones_like(loss)])
        self.scaler.update()
        self.network.zero_grad()
        self.average(settings)
        self.step += 1

    @torch.no_grad()
    def average(self, settings: dict) -> None:
        """Moves the average towards the weights."""
        weight = ema_weight(settings, self.step)
        torch._foreach_lerp_(list(self.ema.parameters()), list(self.network.parameters()), weight)

    def metrics(self, settings: dict) -> dict:
        """Returns the means since the last call, and starts new ones."""
        loss, norm, count, overflows = self.sums.tolist()
        self.sums.zero_()
        means = {"loss": loss / count, "grad_norm": norm / count} if count else {}  # all skipped: no means
        return {
            "step": self.step,
            "images": self.step * settings["batch_size"],
            "lr": learning_rate(settings, self.step - 1),
            **means,
            "overflows": int(overflows),
        }

    def raise_if_diverged(self, batches: Batches) -> None:
        """Waits for the device. Raises Diverged, before anything is written, if a step was not finite."""
        bad = int(self.first_bad)
        if bad >= 0:
            raise Diverged(
                f"the loss or a gradient was not finite at step {bad}, on images {batches.indices(bad).tolist()} "
                f"of the dataset; saved files are kept; resume with --skip-batches {bad} to skip this batch, or "
                "start a new run with a lower --lr or --precision fp32"
            )
        if self.scaler.is_enabled() and self.scaler.get_scale() < 1:
            raise Diverged(f"fp16 gradients overflow at loss scale 1 (step {self.step}); try --precision fp32")


def backward(
    forward: Callable, table: Tensor, batch: Batch, accumulate: int, autocast: Callable, scale: Callable
) -> Tensor:
    """Computes gradients of the mean loss over this process's share of a batch, in `accumulate` parts.

    Returns the loss.
    """
    total = torch.zeros((), device=table.device)
    count = len(batch.x0) // accumulate
    for i in range(accumulate):
        last = i == accumulate - 1
        no_sync = getattr(forward, "no_sync", nullcontext)  # processes average their gradients only in the last part
        with nullcontext() if last else no_sync():
            loss = prediction_losses(forward, table, batch.part(i * count, count), autocast).mean() / accumulate
            scale(loss).backward()
        total += loss.detach()
    return total


# ---- processes and signals -------------------------------------------------------------------------------------------


class Processes:
    """The processes started by torchrun, or a single process."""

    def __init__(self, device: torch.device):
        self.rank = int(os.environ.get("RANK", 0))
        self.world = int(os.environ.get("WORLD_SIZE", 1))
        self.lead = self.rank == 0
        self.device = device
        if self.world == 1:
            return
        backend = "gloo"
        if device.type == "cuda":
            backend = "nccl"
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(self.device)
        dist.init_process_group(backend, timeout=timedelta(hours=2))
        atexit.register(dist.destroy_process_group)
        self.cpu_group = dist.new_group(backend="gloo")  # for signals, without a synchronisation with the GPU

    def mean(self, value: Tensor) -> Tensor:
        if self.world > 1:
            dist.all_reduce(value)
            value /= self.world
        return value

    def agree(self, number: int) -> int:
        """Returns the maximum of the processes' numbers, so that they all stop at the same step."""
        if self.world == 1:
            return number
        flag = torch.tensor(number)
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=self.cpu_group)
        return int(flag)

    def require_same(self, step: int) -> None:
        """Raises InputError if another process begins at another step."""
        first = self.broadcast(step)
        if step != first:
            raise InputError(
                f"process {self.rank} sees the checkpoint of step {step} and process 0 that of step {first}; put the "
                "run folder on a file system that all machines share"
            )

    def broadcast(self, value):
        """Returns the first process's value in all of them."""
        values = [value]
        if self.world > 1:
            dist.broadcast_object_list(values)
        return values[0]


class Output:
    """Passes text on to a stream. Drops the rest if that fails, so a full disk or closed pipe does not end training."""

    def __init__(self, stream):
        # Python has no stream for a closed descriptor.
        self.stream = stream or os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        self._call(partial(self.stream.write, text))
        return len(text)

    def flush(self) -> None:
        self._call(self.stream.flush)

    def _call(self, work: Callable) -> None:
        try:
            work()
        except OSError:  # what is left in the buffer goes to the null device
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


class Stop:
    """Ctrl-C and SIGTERM end the loop after the current step, with everything saved; a second one ends it at once.

    A closed terminal (SIGHUP) does not end it.
    """

    def __init__(self):
        self.signal = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._ask)
        if hasattr(signal, "SIGHUP"):
            signal.signal(signal.SIGHUP, signal.SIG_IGN)

    def _ask(self, number, frame):
        if self.signal:
            raise KeyboardInterrupt
        self.signal = number


# ---- how a run begins ------------------------------------------------------------------------------------------------

# The record of a run is the content of its config.json. `make_network` and `open_folder` complete it.


def begin_resumed(args: argparse.Namespace, given: dict) -> tuple[dict, dict]:
    """Returns the record and the newest checkpoint of the run that --resume names."""
    others = {name for name, value in vars(args).items() if value is not None} - {"resume"}
    refused = sorted((given.keys() - RESUMABLE) | others)
    if refused:
        flag = refused[0].replace("_", "-")
        raise InputError(f"--{flag} cannot change when a run is resumed; omit it, or start a new run")
    file = args.resume / "config.json"
    record, checkpoint = read_config(file), load_checkpoint(args.resume)
    settings, network, schedule = json.loads(checkpoint.pop("identity"))
    if identity(record) != identity({"settings": settings, "network": network, "schedule": schedule}):
        raise InputError(
            f"{file} has changed since {args.resume} began; undo the edit, or start a new run with --config"
        )
    skipped, step = record["settings"]["skip_batches"], checkpoint["step"]
    late = [bad for bad in given.get("skip_batches", []) if bad < step and bad not in skipped]
    if late:
        raise InputError(f"--skip-batches {late[0]}: this run has made step {late[0]} already; it is at step {step}")
    given["skip_batches"] = sorted({*skipped, *given.get("skip_batches", [])})
    record["settings"] |= given
    if "steps" in given:
        record["settings"]["epochs"] = None
    resolve_defaults(record["settings"], sample.choose_device(record["settings"]["device"]))
    return record, checkpoint


def begin_new(args: argparse.Namespace, given: dict) -> tuple:
    """Returns the record of a new run, with or without --config, and the weights of the model that --init names."""
    base = read_config(args.config) if args.config else None
    device = sample.choose_device(given.get("device") or (base and base["settings"]["device"]))
    settings = resolve_settings(args, given, base and base["settings"], device)
    record = {"title": args.preset or DEVICE_PRESETS[device.type], "settings": settings, "init_hash": None}
    if base:
        record |= {
            "title": f"settings of {args.config}",
            "init_hash": base.get("init_hash"),
            "defaulted": base["defaulted"],
        }
        if "data" in base and not {"data", "revision", "size", "image_channels"} & given.keys():
            record["data"] = base["data"]
    if not settings["init"]:
        return record, None
    model = sample.read_model(settings["init"])
    if base and "init" not in given and base.get("init_hash") != model.hash:
        raise InputError(
            f"--config {args.config}: the --init model of that run has changed; to use it anyway, add --init PATH"
        )
    if not base and "size" not in given:
        settings["size"] = model.network.config.image_size[0]
    use_init_model(record, given, model)
    return record, model.network.state_dict()


def use_init_model(record: dict, given: dict, model: sample.Model) -> None:
    """Takes network and schedule from the model that --init names, at the size in the settings."""
    settings, config = record["settings"], model.network.config
    if config.null_label is None:
        if given.get("label_dropout"):
            raise InputError("--label-dropout: the model of --init was trained without it; omit it")
        settings["label_dropout"] = 0.0
    settings["image_channels"], settings["classes"] = config.image_channels, bool(config.num_class_embeds)
    if settings["size"] % config.divisor:
        raise InputError(f"--size {settings['size']} must be a multiple of {config.divisor} for this model")
    side = settings["size"] // config.patch_size
    record["network"] = replace(config, sample_size=side, dropout=settings["dropout"]).to_dict()
    record["schedule"] = model.schedule.to_dict()
    record |= {"init_hash": model.hash, "title": f"from {settings['init']}"}


def prepare_data(record: dict, processes: Processes) -> data.Dataset:
    """Prepares the dataset in the first process, then opens it in the others, and stores its source in the settings.

    Raises InputError in all processes if the first one fails.
    """
    settings = record["settings"]
    options = {"channels": settings["image_channels"], "revision": settings["revision"], "progress": processes.lead}
    found = None
    if processes.lead:
        try:
            dataset = data.prepare(settings["data"], settings["size"], **options)
            found = dataset.source
        except InputError as error:
            found = error
    found = processes.broadcast(found)
    if isinstance(found, InputError):
        raise found
    if not processes.lead:
        dataset = data.prepare(found, settings["size"], **options)
    settings["data"] = found
    if "data" in record and record["data"].get("fingerprint") != dataset.fingerprint:
        raise InputError(f"{found} is not the data in config.json; name the original data with --data")
    if settings["classes"] and not dataset.classes:
        raise InputError(
            f"--classes: the images of {found} have no classes; put the images of each class in a folder of their own"
        )
    return dataset


def make_network(record: dict, classes: tuple) -> tuple:
    """Makes the initialised network and the noise schedule from the record's configs, else from its settings.

    Raises InputError if the record's network has other classes than the data.
    """
    settings = record["settings"]
    if "network" in record:
        config = unet.UNetConfig.from_dict(record["network"])
        schedule = ddpm.Schedule.from_dict(record["schedule"])
    else:
        config, schedule = make_configs(settings, classes)
    if config.num_class_embeds and len(classes) > config.num_class_embeds:
        raise InputError(f"the images have {len(classes)} classes, and the model only {config.num_class_embeds}")
    if config.class_names and classes != config.class_names:
        raise InputError(
            f"the classes of the images ({', '.join(classes)}) are not those of the model "
            f"({', '.join(config.class_names)})"
        )
    record |= {"network": config.to_dict(), "schedule": schedule.to_dict()}
    torch.manual_seed(data.generator(settings["seed"], "weights").initial_seed())
    network = unet.UNet(config)
    record["parameters"] = sum(parameter.numel() for parameter in network.parameters())
    record["gflop_per_image"] = unet.flops(config, config.image_size) / 1e9  # of the forward pass
    return network, schedule


@dataclass
class Run:
    """What the loop needs, however the run began."""

    folder: Path | None  # used only in the first process
    record: dict  # content of config.json
    schedule: ddpm.Schedule
    processes: Processes
    state: State
    table: Tensor  # ddpm.training_table
    batches: Batches
    held_out: HeldOut
    dataset: data.Dataset
    rows: tuple  # of the dataset: training, held out
    autocast: Callable
    folder_status: os.stat_result | None

    def evaluate(self) -> None:
        """Logs the held-out loss, and saves the model as `best` if it is the lowest so far."""
        step, losses = self.state.step, self.held_out.losses(self.state.ema, self.table, self.autocast)
        held_out_loss = losses.mean().item()
        if not math.isfinite(held_out_loss):
            raise Diverged(f"the held-out loss was not finite at step {step}; try a lower --lr")
        quarters = [part.mean().item() for part in losses.tensor_split(4) if len(part)]
        append_metrics(self.folder, {"step": step, "held_out_loss": held_out_loss, "held_out_by_noise": quarters})
        if held_out_loss < self.state.best:
            self.state.best = held_out_loss
            self.save_model("best")

    def model(self) -> sample.Model:
        return sample.Model(self.state.ema, self.schedule, self.folder, "", self.processes.device)

    def draw_preview(self) -> Path:
        """Writes a grid of samples. Returns its path."""
        path = self.folder / f"samples/{self.state.step:08d}.png"
        data.write_png(path, preview(self.model(), self.autocast), {"step": str(self.state.step)})
        return path

    def measure_quality(self) -> str:
        """Compares samples with held-out images, and looks for copies of training images. Returns a sentence."""
        begin = time.perf_counter()
        some = self.rows[0][:: math.ceil(len(self.rows[0]) / SEARCHED)]
        training, held_out = (monitor.choose(self.dataset, rows) for rows in (some, self.rows[1]))
        with self.autocast():
            images = sample.draw_like(self.model(), 0, QUALITY_IMAGES, held_out)
        pixels = [torch.from_numpy(part.images) for part in (training, held_out)]
        found, copies = monitor.quality(load_features(), images, pixels[1]), monitor.memorised(images, *pixels)
        kid, seconds = found["kid"], time.perf_counter() - begin
        line = {"step": self.state.step, **{name: estimate.value for name, estimate in found.items()}}
        line |= {"kid_low": kid.low, "kid_high": kid.high, "near_copies": copies.share}
        line |= {"near_copies_null": copies.null_share, "memorised_p": copies.p, "quality_seconds": seconds}
        append_metrics(self.folder, line)
        text = f"KID {kid.value:.4f} ({kid.low:.4f} to {kid.high:.4f}), near-copies {copies.share:.1%}"
        return f"{text} (others {copies.null_share:.1%}), measured in {seconds:.0f} s"

    def save_model(self, name: str) -> None:
        sample.save_model(self.folder / name, self.state.ema, self.schedule)
        card = model_card(self.folder, self.state.step).encode()
        data.atomic_write(self.folder / name / "README.md", lambda file: file.write(card))

    def report(self, status: str, error: str = "") -> None:
        """Writes report.html. A failure is printed and does not end the training."""
        try:
            report_run(self.folder, self.state.step, status, error)
        except Exception as failure:
            print(f"{self.folder / 'report.html'} could not be written: {data.reason(failure)}", file=sys.stderr)

    def skip_batch(self) -> None:
        """Goes to the next step with the same weights, and logs it."""
        self.state.step += 1
        if self.processes.lead:
            append_metrics(self.folder, {"step": self.state.step, "skipped_batch": self.state.step - 1})
            print(f"skipped the batch of step {self.state.step - 1}")

    def require_folder(self) -> None:
        """Raises InputError if the run folder was deleted or replaced since the run began."""
        with suppress(OSError):
            if os.path.samestat(self.folder_status, self.folder.stat()):
                return
        raise InputError(f"{self.folder} was deleted or replaced during the run, so nothing more can be saved there")

    def save_checkpoint(self) -> None:
        content = self.state.state_dict() | {"identity": identity(self.record)}
        save_checkpoint(self.folder, self.state.step, content, self.record["settings"]["keep"])


def begin_run(args: argparse.Namespace, given: dict, folder: Path | None) -> Run:
    """Begins a run in any of the four ways: new, --config, --init, --resume."""
    if {"steps", "epochs"} <= given.keys():
        raise InputError("--steps and --epochs both set the length of the run; give one of them")
    checkpoint, weights = None, None
    if args.resume:
        record, checkpoint = begin_resumed(args, given)
    else:
        record, weights = begin_new(args, given)
    settings = record["settings"]
    processes = Processes(sample.choose_device(given.get("device") or settings["device"]))
    device, share = processes.device, processes.world * settings["accumulate"]
    settings["device"] = device.type
    if settings["batch_size"] % share:
        raise InputError(
            f"--batch-size {settings['batch_size']} must be a multiple of {share}: processes times --accumulate"
        )
    dataset = prepare_data(record, processes)
    rows, held_rows = data.split(dataset)
    if settings["epochs"]:
        settings["steps"] = math.ceil(settings["epochs"] * len(rows) / settings["batch_size"])
    if not (args.resume or args.config or "warmup" in given):  # cap the default warm-up in a short run
        settings["warmup"] = min(settings["warmup"], settings["steps"] // 10)
    network, schedule = make_network(record, dataset.classes)
    if weights:
        network.load_state_dict(weights)
    network.to(device=device, memory_format=torch.channels_last)
    state = State(network, settings, device)
    if checkpoint:
        state.load_state_dict(checkpoint)
    processes.require_same(state.step)
    if max(given.get("skip_batches") or [0]) >= settings["steps"]:
        raise InputError(f"--skip-batches {max(given['skip_batches'])}: this run has only {settings['steps']} steps")
    if state.step >= settings["steps"]:
        raise InputError(f"this run has finished its {state.step} steps; give a larger number with --steps")
    with data.bad_input("--density-mean and --density-std"):
        cdf = ddpm.timestep_cdf(schedule, settings["density"], settings["density_mean"], settings["density_std"])
    table = ddpm.training_table(schedule, settings["loss"], settings["gamma"]).to(device, torch.float32)
    null, dtype = network.config.null_label, sample.PRECISIONS[settings["precision"]]
    run = Run(
        folder,
        record,
        schedule,
        processes,
        state,
        table,
        batches=Batches(dataset, rows, settings, null, cdf, device, processes.rank, processes.world),
        held_out=HeldOut(dataset, held_rows, settings, cdf, device),
        dataset=dataset,
        rows=(rows, held_rows),
        autocast=partial(torch.autocast, device.type, dtype, enabled=dtype != torch.float32),
        folder_status=folder and folder.stat(),
    )
    if processes.lead:
        open_folder(run, dataset, len(held_rows))
    return run


def out_of_memory(run: Run) -> InputError:
    """Returns the error to raise after the GPU ran out of memory; it names the micro-batches that fit."""
    settings, batch = run.record["settings"], run.batches(run.state.step)
    parts = settings["accumulate"]
    shape = f"{len(batch.x0) // parts} images at a time do not fit in the memory of the GPU"
    while len(batch.x0) % (parts := 2 * parts) == 0:
        part = batch.part(0, len(batch.x0) // parts)
        with suppress(torch.OutOfMemoryError):
            backward(run.state.network, run.table, part, 1, run.autocast, lambda loss: loss)
            return InputError(
                f"{shape}, but {len(part.x0)} do; continue with: python train.py --resume {run.folder} "
                f"--accumulate {parts} (the batch size stays the same)"
            )
    return InputError(f"{shape}, nor does a single one; choose a smaller --size or fewer --channels")


def open_folder(run: Run, dataset: data.Dataset, held_out: int) -> None:
    """Writes config.json and data.png; a new run gets a checkpoint of its initial weights."""
    run.record |= {
        "schema": 1,
        "data": {
            "source": dataset.source,
            "revision": dataset.revision,
            "fingerprint": dataset.fingerprint,
            "images": len(run.batches.rows),
            "held_out": held_out,
            "skipped": list(dataset.skipped[:100]),
        },
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "git_commit": data.git_commit(),
        "processes": run.processes.world,
        "threads": torch.get_num_threads(),
    }
    if defaulted := run.record.pop("defaulted", None):
        print(f"config.json is from an older version; these settings take their defaults: {', '.join(defaulted)}")
    data.write_json(run.folder / "config.json", run.record)
    cut_metrics(run.folder, run.state.step)
    picture = data.grid(data.to_uint8(run.batches(0).x0[:64]), scale=max(1, 128 // dataset.images.shape[-1]))
    data.write_png(run.folder / "samples/data.png", picture)
    if not any(run.folder.glob("checkpoint-*.pt")):
        run.save_checkpoint()  # a run that dies early resumes from the same weights


def print_summary(run: Run, seconds: float) -> None:
    """Prints what is trained on which data, and an estimate of the time."""
    settings, kept, step = run.record["settings"], run.record["data"], run.state.step
    print(f"{kept['images']} images to train on, {kept['held_out']} held out ({kept['source']})")
    for line in [*kept["skipped"][:5], "others, see config.json"][: len(kept["skipped"])]:
        print(f"skipped {line}")
    title = run.record.get("title", "resumed")
    cost = f"{run.record['parameters']:,} parameters, {run.record['gflop_per_image']:.2f} GFLOP an image"
    print(f"{title}: {settings['size']} px, {cost}")
    steps, batch_size = settings["steps"] - step, settings["batch_size"]
    estimate = timedelta(seconds=round(steps * batch_size * seconds / run.processes.world))
    print(
        f"{steps:,} steps of {batch_size} images on {settings['device']} in {settings['precision']}: about {estimate}"
    )
    rate, usual = settings["lr"], RATES[settings["optimizer"]]
    if not usual / 10 <= rate <= usual * 10:
        far, effect = ("below", "many more steps needed") if rate < usual else ("above", "training may diverge")
        print(f"--lr {rate:g} is far {far} {settings['optimizer']}'s default of {usual:g}: {effect}")
    print(f"{run.folder}: {f'continuing from step {step}' if step else 'a new run'}", flush=True)


def measure_cost(run: Run) -> float:
    """Measures the training seconds per image on a part of a batch, without changing weights.

    With torch.compile this compiles the network; if that fails, it says so, and training goes on in eager mode.
    """
    network, batch, settings = run.state.network, run.batches(0), run.record["settings"]
    count = len(batch.x0) // settings["accumulate"]
    if not settings["compile"]:
        count = max(1, min(count, round(100 / run.record["gflop_per_image"])))

    def work() -> None:
        backward(network, run.table, batch.part(0, count), 1, run.autocast, lambda loss: loss).item()
        network.zero_grad()

    if settings["compile"]:
        sample.compile_or_continue(network, work)
    seconds = math.inf
    for _ in range(3):
        start = time.perf_counter()
        work()
        seconds = min(seconds, (time.perf_counter() - start) / count)
    return seconds


# ---- the loop --------------------------------------------------------------------------------------------------------


def train(run: Run) -> int:
    """Trains until the run is finished or stopped by a signal. Returns the exit status."""
    settings, state, processes, folder = run.record["settings"], run.state, run.processes, run.folder
    seconds = measure_cost(run)
    if processes.lead:
        print_summary(run, seconds)
    forward = state.network
    if processes.world > 1:
        forward = torch.nn.parallel.DistributedDataParallel(forward)
    stop, steps, parts = Stop(), settings["steps"], settings["accumulate"]
    logged, logged_at = state.step, time.perf_counter()
    bar = tqdm(total=steps, initial=state.step, unit="step", disable=None if processes.lead else True)
    while state.step < steps:
        # Dropout is the only user of the global generator. Seeding it at each step leaves no state to save.
        torch.manual_seed(data.generator(settings["seed"], "dropout", state.step, processes.rank).initial_seed())
        if state.step in settings["skip_batches"]:
            run.skip_batch()
        else:
            loss = backward(forward, run.table, run.batches(state.step), parts, run.autocast, state.scaler.scale)
            state.update(processes.mean(loss), settings)
        bar.update()

        last = state.step == steps
        due = {
            name for name in ("log", "eval", "preview", "save") if last or state.step % settings[f"{name}_every"] == 0
        }
        every = settings["quality_every"]
        if every and state.step % every == 0 and len(run.rows[1]) >= 3:
            due.add("quality")
        stopped_by = processes.agree(stop.signal)
        if not due and not stopped_by:
            continue
        if processes.lead:
            run.require_folder()
        state.raise_if_diverged(run.batches)  # waits for the device, so not in each step
        if processes.lead and "log" in due:
            images, now = (state.step - logged) * settings["batch_size"], time.perf_counter()
            line = state.metrics(settings) | {"images_per_second": images / (now - logged_at), "time": time.time()}
            logged, logged_at = state.step, now
            append_metrics(folder, line)
            bar.set_postfix_str(f"loss {line.get('loss', math.nan):.4f}, {line['images_per_second']:.1f} images/s")
        if processes.lead and "eval" in due:
            run.evaluate()
        if processes.lead and "quality" in due:
            bar.write(f"step {state.step}: {run.measure_quality()}")
        if processes.lead and "preview" in due:
            bar.write(f"step {state.step}: look at {run.draw_preview()}")
        if processes.lead and ("save" in due or stopped_by):
            run.save_model("model")
            run.save_checkpoint()  # last: all other files of this step are then on disk
        if processes.lead and ("preview" in due or stopped_by):
            run.report("finished" if last else "stopped" if stopped_by else "running")
        if stopped_by:
            break
    bar.close()
    outcome = f"finished; sample with: python sample.py --model {folder}"
    if state.step < steps:
        outcome = f"stopped at step {state.step}; continue with: python train.py --resume {folder}"
    if processes.lead:
        print(outcome)
    return 128 + stopped_by if stopped_by else 0


def profile_run(args: argparse.Namespace, given: dict) -> None:
    """Profiles a new run in a temporary folder."""
    if args.out or args.resume:
        raise InputError("--profile trains nothing and writes no run; omit --out and --resume")
    with tempfile.TemporaryDirectory() as folder:
        profile(begin_run(args, given, Path(folder)), args.profile, prediction_losses)


def main(argv: Sequence[str] | None = None) -> int:
    args, given = parse_arguments(argv)
    sample.set_threads()

    def work() -> int:
        if args.profile:
            return profile_run(args, given)
        resume_after_restart(args, given)
        with run_folder(args) as folder:
            run = begin_run(args, given, folder)
            try:
                with suppress(torch.OutOfMemoryError):
                    return train(run)
                raise out_of_memory(run)
            except InputError as error:
                if run.processes.lead and folder.is_dir():
                    run.report("ended by an error", str(error))
                raise

    with redirect_stdout(Output(sys.stdout)), redirect_stderr(Output(sys.stderr)):
        return data.exit_status(work)


if __name__ == "__main__":
    sys.exit(main())
