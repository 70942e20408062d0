"""Measures speed and memory beside diffusers and denoising-diffusion-pytorch.

    python -m benchmarks.speed                             all rows: half an hour on two cores
    python -m benchmarks.speed --only 3,5                  two rows
    python -m benchmarks.speed --only 3 --against FOLDER   also an older checkout of this project

The contenders of a row take turns in one process, with the same number of threads; each row has a process of its own.
Rows 3, 4 and 4c have three times as many repetitions as --repeats says. "extrapolated" in a contender's name means that
fewer steps were timed. All training data are tensors in memory: reading and augmenting images is not measured. Memory
is the peak resident size of a separate process (Linux). Requires: pip install -r benchmarks/requirements.txt
"""

import argparse
import copy
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import common, ours

# The networks of diffusers' butterfly training tutorial (our preset `classic`), and of CIFAR-10 in Ho et al. 2020.
BUTTERFLY = {
    "sample_size": 128,
    "block_out_channels": (128, 128, 256, 256, 512, 512),
    "down_block_types": ("DownBlock2D",) * 4 + ("AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D") + ("UpBlock2D",) * 4,
    "layers_per_block": 2,
}
CIFAR = {
    "sample_size": 32,
    "block_out_channels": (128, 256, 256, 256),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 2,
}
Values = dict[str, list[float]]  # of each contender


# ---- measuring -------------------------------------------------------------------------------------------------------


def times(contenders: dict[str, Callable[[], object]], repeats: int) -> Values:
    """Measures the seconds of each contender in turns, after one call of each that is not counted."""
    seconds = {name: [] for name in contenders}
    with common.Progress(len(contenders) * (repeats + 1)) as progress:
        for name, work in contenders.items():
            with progress.part(f"{name}: first call"):
                work()
        for repetition in range(1, repeats + 1):
            for name, work in contenders.items():
                with progress.part(f"{name}: repetition {repetition} of {repeats}"):
                    begin = time.perf_counter()
                    work()
                    seconds[name].append(time.perf_counter() - begin)
    return seconds


def images_per_second(contenders: dict[str, Callable[[], object]], repeats: int) -> Values:
    return {name: [BATCH / value for value in values] for name, values in times(contenders, repeats).items()}


def peak_memory(programs: dict[str, str], repeats: int) -> Values:
    """Measures the peak resident MiB of new Python processes that run these programs."""
    found = {name: [] for name in programs}
    with common.Progress(len(programs) * repeats) as progress:
        for repetition in range(1, repeats + 1):
            for name, program in programs.items():
                with progress.part(f"{name}: repetition {repetition} of {repeats}"):
                    found[name].append(memory_of(program))
    return found


def memory_of(program: str) -> float:
    program += "; print(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    command = [sys.executable, "-c", program]
    done = subprocess.run(
        command, cwd=common.ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True
    )
    return int(done.stdout.split()[-2]) / 1024


def checked(contenders: dict[str, Callable[[], Tensor]]) -> dict[str, Callable[[], Tensor]]:
    """Raises RuntimeError unless all contenders have the output of the first one, up to the rounding of bf16."""
    first, *others = (work().float() for work in contenders.values())
    for other in others:
        error = float((other - first).norm() / first.norm())
        if error > 0.05:
            raise RuntimeError(f"the outputs differ by {error:.1%}")
    return contenders


# ---- sampling: rows 1 to 4 -------------------------------------------------------------------------------------------

TIMED_STEPS = 20  # of the 1000 of DDPMPipeline, whose time is extrapolated from these


def peer_network(config: dict):
    from diffusers import UNet2DModel

    return UNet2DModel(**config).eval().requires_grad_(False)


def peer_pipeline(peer):
    from diffusers import DDPMPipeline, DDPMScheduler

    return DDPMPipeline(peer, DDPMScheduler(num_train_timesteps=1000))


def peer_sampling(steps: int) -> Callable[[], object]:
    """DDPMPipeline with its defaults: float32, the scheduler of training, one image."""
    pipeline = peer_pipeline(peer_network(BUTTERFLY))
    pipeline.set_progress_bar_config(disable=True)
    return lambda: pipeline(1, num_inference_steps=steps).images[0].save(ours.io.BytesIO(), "PNG")


def extrapolated(seconds: list[float]) -> Values:
    return {"DDPMPipeline, 1000 steps, extrapolated": [value * 1000 / TIMED_STEPS for value in seconds]}


def row_1(repeats: int) -> Values:
    """An image of 128 px as a PNG, model loaded: DDPMPipeline, classic's network, 1000 steps / base, default steps."""
    model = ours.preset_model("base")
    contenders = {
        "peer": peer_sampling(TIMED_STEPS),
        "ours": ours.sampling(model, 1),
        "ours, batch of 8": ours.sampling(model, 8),
    }
    found = times(contenders, repeats)
    name = f"base, {ours.DEFAULT_STEPS} steps"
    each = [value / 8 for value in found["ours, batch of 8"]]
    return extrapolated(found["peer"]) | {name: found["ours"], f"{name}, each image of a batch of 8": each}


def row_2(repeats: int) -> Values:
    """The same, both with classic's network of 113.7M parameters: DDPMPipeline, 1000 steps / ours, default steps."""
    model = ours.model_of(ours.same_network(peer_network(BUTTERFLY)))
    found = times({"peer": peer_sampling(TIMED_STEPS), "ours": ours.sampling(model, 1)}, repeats)
    return extrapolated(found["peer"]) | {f"ours, {ours.DEFAULT_STEPS} steps": found["ours"]}


def call(network, size: int) -> Callable[[], Tensor]:
    x = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    t = torch.full((1,), 500)

    @torch.inference_mode()
    def work() -> Tensor:
        out = network(x.to(next(network.parameters()).dtype), t)
        return out if isinstance(out, Tensor) else out.sample

    return work


THIS, OTHER = "this checkout, bf16, own process", "other checkout, bf16, own process"


def row_3(repeats: int, against: Path | None = None) -> Values:
    """A call of that network at 128 px, same weights: UNet2DModel in float32 / ours in bf16 and float32."""
    peer = peer_network(BUTTERFLY)
    contenders = {
        "UNet2DModel, float32": call(peer, 128),
        "ours, bf16": call(ours.same_network(peer), 128),
        "ours, float32": call(ours.same_network(peer, "fp32"), 128),
    }
    with ExitStack() as stack:
        if against:  # both checkouts in processes of their own, so that they are measured alike
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            peer_pipeline(peer).save_pretrained(folder)
            for name, checkout in ((THIS, common.ROOT), (OTHER, against)):
                contenders[name] = stack.enter_context(common.network_of(checkout, folder, 128))
        return times(checked(contenders), 3 * repeats)


def row_4(repeats: int) -> Values:
    """The same call, with UNet2DModel also in bf16 and channels_last."""
    peer = peer_network(BUTTERFLY)
    network = ours.same_network(peer)
    peer.to(torch.bfloat16, memory_format=torch.channels_last)
    return times(checked({"UNet2DModel, bf16": call(peer, 128), "ours, bf16": call(network, 128)}), 3 * repeats)


def row_4_compiled(repeats: int) -> Values:
    """The same call as in row 4, both compiled."""
    peer = peer_network(BUTTERFLY)
    network = ours.same_network(peer, packed=False)
    peer.to(torch.bfloat16, memory_format=torch.channels_last)
    peer.compile()
    ours.compile_network(network, 1)
    contenders = {"UNet2DModel, bf16, compiled": call(peer, 128), "ours, bf16, compiled": call(network, 128)}
    return times(checked(contenders), 3 * repeats)


# ---- training: rows 5 ------------------------------------------------------------------------------------------------

BATCH = 16


def training_data(count: int = 2048) -> Tensor:
    return torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def diffusers_training(best: bool) -> Callable[[], object]:
    """A step of diffusers' unconditional training script, without accelerate: float32, its AdamW and EMA.

    With `best`: bf16 autocast, channels_last, fused AdamW and foreach EMA.
    """
    from diffusers import DDPMScheduler, UNet2DModel
    from diffusers.training_utils import EMAModel

    network = UNet2DModel(**CIFAR).train()
    if best:
        network.to(memory_format=torch.channels_last)
    scheduler = DDPMScheduler(num_train_timesteps=1000)
    options = {"lr": 1e-4, "betas": (0.95, 0.999), "weight_decay": 1e-6, "eps": 1e-8, "fused": best}
    optimizer = torch.optim.AdamW(network.parameters(), **options)
    average = EMAModel(network.parameters(), decay=0.9999, use_ema_warmup=True, foreach=best)
    images = training_data().float() / 127.5 - 1

    def work() -> float:
        clean = images[torch.randint(len(images), (BATCH,))]
        noise = torch.randn(clean.shape)
        t = torch.randint(0, 1000, (BATCH,))
        with torch.autocast("cpu", torch.bfloat16, enabled=best):
            output = network(scheduler.add_noise(clean, noise, t), t).sample
        loss = F.mse_loss(output.float(), noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average.step(network.parameters())
        return loss.item()

    return work


def lucidrains_training(best: bool) -> Callable[[], object]:
    """A step of denoising-diffusion-pytorch's Trainer, without accelerate: float32, EMA every 10 steps.

    With `best`: bf16 autocast, channels_last and fused Adam.
    """
    from denoising_diffusion_pytorch import GaussianDiffusion, Unet

    peer = GaussianDiffusion(Unet(dim=64, dim_mults=(1, 2, 4, 8), flash_attn=False), image_size=32, timesteps=1000)
    if best:
        peer.to(memory_format=torch.channels_last)
    average = copy.deepcopy(peer)
    images = training_data().float() / 255
    optimizer = torch.optim.Adam(peer.parameters(), lr=1e-4, betas=(0.9, 0.99), fused=best)
    steps = itertools.count()

    def work() -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=best):
            loss = peer(images[torch.randint(len(images), (BATCH,))])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(peer.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if next(steps) % 10 == 0:
            with torch.no_grad():
                torch._foreach_lerp_(list(average.parameters()), list(peer.parameters()), 0.005)
        return loss.item()

    return work


def our_training(settings: dict, optimizer: str) -> Callable[[], object]:
    return ours.training(training_data(), settings | {"batch_size": BATCH, "optimizer": optimizer})


# The network of CIFAR-10, and one with as many parameters and operations as that of denoising-diffusion-pytorch with
# dim 64: 35.7M parameters, 3.65 GFLOP.
CIFAR_SETTINGS = {
    "size": 32,
    "channels": [128, 256, 256, 256],
    "attention": [16],
    "layers": 2,
    "head_dim": 8,
    "groups": 32,
    "prediction": "epsilon",
    "density": "uniform",
}
LUCIDRAINS_SETTINGS = {
    "size": 32,
    "channels": [64, 128, 256, 448],
    "attention": [4],
    "layers": 1,
    "head_dim": 32,
    "groups": 8,
}
TRAININGS = {
    "diffusers, float32": partial(diffusers_training, False),
    "diffusers, bf16, channels_last, fused": partial(diffusers_training, True),
    "ours, AdamW": partial(our_training, CIFAR_SETTINGS, "adamw"),
    "ours, Muon": partial(our_training, CIFAR_SETTINGS, "muon"),
}


def row_5(repeats: int) -> Values:
    """Training images per second, the network of CIFAR-10, batch 16: diffusers' training script / ours."""
    return images_per_second({name: make() for name, make in TRAININGS.items()}, repeats)


def row_5_memory(repeats: int) -> Values:
    """Peak memory of a process that does three steps of row 5."""
    program = "from benchmarks.speed import TRAININGS; work = TRAININGS[{!r}](); work(); work(); work()"
    return peak_memory({name: program.format(name) for name in TRAININGS}, repeats)


def row_5_lucidrains(repeats: int) -> Values:
    """Training images per second, 32 px, batch 16: denoising-diffusion-pytorch / ours with a network of its size."""
    contenders = {
        "lucidrains, float32": lucidrains_training(False),
        "lucidrains, bf16, channels_last, fused": lucidrains_training(True),
        "ours, AdamW": our_training(LUCIDRAINS_SETTINGS, "adamw"),
        "ours, Muon": our_training(LUCIDRAINS_SETTINGS, "muon"),
    }
    return images_per_second(contenders, repeats)


# ---- the program by itself: rows 7 to 10 -----------------------------------------------------------------------------


def peak_operations() -> dict[str, tuple[Callable[[], object], int]]:
    """Returns operations that show what the machine can do in bf16, and their numbers of floating-point operations."""
    a = torch.randn(2048, 2048, dtype=torch.bfloat16)
    work = {"matrix product (GFLOP/s)": (lambda: a @ a, 2 * 2048**3)}
    for width, side in ((128, 64), (192, 32), (256, 32)):
        x = torch.randn(8, width, side, side, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
        weight = torch.randn(width, width, 3, 3, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
        convolve = partial(F.conv2d, x, weight, padding=1)
        work[f"convolution, {width} channels, {side} px (GFLOP/s)"] = convolve, 2 * 8 * width**2 * 9 * side**2
    return work


def row_7(repeats: int) -> Values:
    """Share of the machine's bf16 peak, the best of a matrix product and convolutions, that sampling at 128 px uses."""
    classic = ours.model_of(ours.network_of(BUTTERFLY))
    base = ours.preset_model("base")
    loops = {"classic, batch 1": (classic, 1), "base, batch 1": (base, 1), "base, batch 8": (base, 8)}
    limits = peak_operations()
    contenders = {name: ours.sampling(model, count, 5) for name, (model, count) in loops.items()}
    found = times(contenders | {name: work for name, (work, _) in limits.items()}, repeats)
    rates = {name: [flop / value / 1e9 for value in found[name]] for name, (_, flop) in limits.items()}
    best = max(max(values) for values in rates.values())
    for name, (model, count) in loops.items():
        gflop = 5 * count * ours.flops(model.network.config, model.shape[1:]) / 1e9
        rates[f"{name} (% of the peak)"] = [100 * gflop / value / best for value in found[name]]
    return rates


def row_8(repeats: int) -> Values:
    """Peak memory of a process that loads a model for 128 px and samples one image."""
    with tempfile.TemporaryDirectory() as folder:
        programs = {}
        for name in ("base", "classic"):
            model = Path(folder, name)
            ours.save_model(model, *ours.untrained(name))
            flags = ["--model", str(model), "--out", f"{folder}/out.png", "-n", "1", "--steps", "2"]
            programs[name] = f"import sample; assert sample.main({flags}) == 0"
        return peak_memory(programs, repeats)


def row_9(repeats: int) -> Values:
    """Time of `python sample.py -n 8` with the default model in a fresh clone, including the start of Python."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["git", "clone", "--quiet", str(common.ROOT), folder], check=True)
        command = [sys.executable, "sample.py", "-n", "8"]
        run = partial(subprocess.run, command, cwd=folder, capture_output=True, check=True)
        return times({"sample.py -n 8": run}, repeats)


CURVES = [(size, 1, 10) for size in (32, 64, 128, 256)] + [(128, batch, 10) for batch in (2, 4, 8, 16)]
CURVES += [(128, 1, steps) for steps in (5, 20, 50)]
CURVE_NAME = "{} px, batch {}, {} steps"


def curve_sampling(size: int, batch: int, steps: int) -> Callable[[], object]:
    return ours.sampling(ours.preset_model("base", size), batch, steps)


def row_10(repeats: int) -> Values:
    """Time of sampling with the network of preset base: size, batch and steps, one of them changed at a time."""
    return times({CURVE_NAME.format(*point): curve_sampling(*point) for point in CURVES}, repeats)


def row_10_memory(repeats: int) -> Values:
    """Peak memory of a process that does what row 10 does, measured once."""
    program = "from benchmarks.speed import curve_sampling; curve_sampling(*{})()"
    return peak_memory({CURVE_NAME.format(*point): program.format(point) for point in CURVES}, 1)


# ---- the table -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    work: Callable[..., Values]
    unit: str  # empty where the contenders' names have units
    peer: str = ""  # the package of the first contender, which the others are compared with


ROWS = {
    "1": Row(row_1, "s", "diffusers"),
    "2": Row(row_2, "s", "diffusers"),
    "3": Row(row_3, "s", "diffusers"),
    "4": Row(row_4, "s", "diffusers"),
    "4c": Row(row_4_compiled, "s", "diffusers"),
    "5": Row(row_5, "images/s", "diffusers"),
    "5l": Row(row_5_lucidrains, "images/s", "denoising_diffusion_pytorch"),
    "5m": Row(row_5_memory, "MiB", "diffusers"),
    "7": Row(row_7, ""),
    "8": Row(row_8, "MiB"),
    "9": Row(row_9, "s"),
    "10": Row(row_10, "s"),
    "10m": Row(row_10_memory, "MiB"),
}


def cells(name: str, row: dict) -> list[list[str]]:
    """Returns the table's lines of one row, each with the row's number first."""
    lines, first = [], median(next(iter(row["values"].values())))
    for contender, values in row["values"].items():
        ratio = ""
        if ROWS[name].peer:
            ratio = f"{first / median(values):.3g}"
            if row["unit"] == "images/s":
                ratio = f"{median(values) / first:.3g}"
        if row["unit"]:
            contender += f" ({row['unit']})"
        spread = [f"{value:.4g}" for value in (min(values), median(values), max(values))]
        lines.append([name, contender, *spread, str(len(values)), ratio])
    return lines


def markdown(rows: dict[str, dict]) -> str:
    head = ("row", "contender", "minimum", "median", "maximum", "n", "gain over peer")
    lines = common.table(head, [line for name, row in rows.items() for line in cells(name, row)])
    return "\n".join(lines) + "\n"


def comparison(rows: dict[str, dict], against: Path | None) -> str:
    """Returns a line with the ratio of row 3's times in two checkouts, or nothing."""
    if not against or "3" not in rows:
        return ""
    values = rows["3"]["values"]
    ratio = common.ratio(values[OTHER], values[THIS])
    return f"- 3: time of {common.checkout_name(against)} / time of this checkout: {ratio}\n"


def report(record: dict, against: Path | None) -> str:
    rows = record["rows"]
    what = "".join(f"- {name}: {row['what']}\n" for name, row in rows.items())
    return f"{what}{comparison(rows, against)}\n{markdown(rows)}\n{common.described(record['machine'])}\n"


def measure(name: str, args: argparse.Namespace) -> dict:
    """Measures a row in a process of its own, so that no row inherits the memory or threads of another."""
    command = [sys.executable, "-m", "benchmarks.speed", "--one", name, "--repeats", str(args.repeats)]
    if args.against:
        command += ["--against", str(args.against)]
    pinned = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(command, cwd=common.ROOT, stdout=subprocess.PIPE, env=pinned, text=True)
    if done.returncode:
        sys.exit(f"error: row {name} failed; the reason is above, and what was measured before is kept")
    return json.loads(done.stdout.splitlines()[-1])


def measure_here(name: str, args: argparse.Namespace) -> dict:
    row = ROWS[name]
    options = {}
    if name == "3":
        options["against"] = args.against
    return {"what": row.work.__doc__, "unit": row.unit, "values": row.work(args.repeats, **options)}


def parser() -> common.Parser:
    rows = "rows:\n" + "\n".join(f"  {name:5}{row.work.__doc__}" for name, row in ROWS.items())
    parser = common.Parser("speed", __doc__, rows)
    parser.add_rows(ROWS, "3", "sample.py")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    return parser


def main() -> None:
    flags = parser()
    args = flags.parse_args()
    if args.one:
        print(json.dumps(measure_here(args.one, args)))
        return
    names = flags.chosen_rows(args)
    flags.require({ROWS[name].peer for name in names} - {""})
    results = common.Results(flags, args)
    ours.set_threads()
    record = {"machine": common.machine(), "rows": {}}
    for i, name in enumerate(names, 1):
        print(f"row {name} ({i} of {len(names)}): {ROWS[name].work.__doc__}", flush=True)
        row = record["rows"][name] = measure(name, args)
        results.write(".json", json.dumps(record, indent=1) + "\n")
        results.write(".md", report(record, args.against))
        print(markdown({name: row}) + comparison({name: row}, args.against), flush=True)
    results.finish()


if __name__ == "__main__":
    main()
