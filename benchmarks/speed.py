"""Speed and memory beside the peers, interleaved, in one process a row: a table and JSON.

    pip install -r benchmarks/requirements.txt
    python -m benchmarks.speed                   all rows, about half an hour on two cores
    python -m benchmarks.speed --rows 3,4        some rows
    python -m benchmarks.speed --model FOLDER    the model of the rows that draw with a trained one

Each figure is the least, the median and the greatest of at least five repetitions; the contenders of a row take turns.
Where a figure is extrapolated from fewer steps, its name says so.
"""

import argparse
import copy
import io
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

import data
import ddpm
import sample
import train
import unet

ROOT = Path(__file__).resolve().parent.parent
# UNet2DModel as the diffusers butterfly tutorial has it; and the network of CIFAR-10 in Ho et al. 2020.
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


def times(contenders: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each contender, taking turns; once each beforehand."""
    for work in contenders.values():
        work()
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, work in contenders.items():
            begin = time.perf_counter()
            work()
            seconds[name].append(time.perf_counter() - begin)
    return seconds


def our_network(config: dict, precision: str = "bf16") -> unet.UNet:
    network = unet.UNet(unet.UNetConfig(**config))
    sample.prepare(network, torch.device("cpu"), precision)
    network.fuse()
    return network


def peer_network(config: dict):
    from diffusers import UNet2DModel

    return UNet2DModel(**config).eval().requires_grad_(False)


def preset_network(name: str) -> tuple[unet.UNet, ddpm.Schedule, int]:
    settings = train.DEFAULTS | train.PRESETS[name]
    config, schedule = train.design(settings, ())
    network = unet.UNet(config)
    sample.prepare(network, torch.device("cpu"), "bf16")
    network.fuse()
    return network, schedule, settings["size"]


def call(network, size: int, batch: int = 1) -> Callable[[], object]:
    x, t = torch.randn(batch, 3, size, size), torch.full((batch,), 500)

    @torch.inference_mode()
    def work():
        out = network(x.to(next(network.parameters()).dtype), t)
        return out if isinstance(out, torch.Tensor) else out.sample

    return work


def png(images: torch.Tensor) -> None:
    data.grid(images).save(io.BytesIO(), "PNG")


def our_draw(model: sample.Model, count: int, steps: int | None = None) -> Callable[[], object]:
    table = ddpm.plan(model.schedule, steps=steps)
    return lambda: png(sample.draw(model, range(count), table, batch_size=count))


def our_model(network: unet.UNet, schedule: ddpm.Schedule) -> sample.Model:
    return sample.Model(network, schedule, ROOT, "", torch.device("cpu"), "bf16")


def their_draw(steps: int) -> Callable[[], object]:
    """DDPMPipeline as the seed system uses it: float32, its own scheduler, one image."""
    from diffusers import DDPMPipeline, DDPMScheduler

    pipeline = DDPMPipeline(peer_network(BUTTERFLY), DDPMScheduler(num_train_timesteps=1000))
    pipeline.set_progress_bar_config(disable=True)
    return lambda: pipeline(1, num_inference_steps=steps).images[0].save(io.BytesIO(), "PNG")


# ---- rows ------------------------------------------------------------------------------------------------------------
# Each returns {contender: (seconds or other values, unit)}; the first contender is the peer, others are compared to it.

TIMED_STEPS = 20  # of the peers' 1000, which are extrapolated from them


def row_1(repeats: int) -> dict:
    """One image of 128 px to a PNG in a warm process: the seed system's path / preset base at the default steps."""
    network, schedule, _ = preset_network("base")
    model = our_model(network, schedule)
    found = times({"peer": their_draw(TIMED_STEPS), "ours": our_draw(model, 1), "ours, 8": our_draw(model, 8)}, repeats)
    scaled = {"DDPMPipeline, 1000 steps, extrapolated": [value * 1000 / TIMED_STEPS for value in found["peer"]]}
    scaled[f"base, {ddpm.DEFAULT_STEPS} steps"] = found["ours"]
    return scaled | {f"base, {ddpm.DEFAULT_STEPS} steps, an image of 8": [value / 8 for value in found["ours, 8"]]}


def row_2(repeats: int) -> dict:
    """The same 113.7M network, one image of 128 px: DDPMPipeline 1000 steps / ours at the default steps."""
    model = our_model(our_network(BUTTERFLY), ddpm.Schedule())
    found = times({"peer": their_draw(TIMED_STEPS), "ours": our_draw(model, 1)}, repeats)
    return {
        "DDPMPipeline, 1000 steps, extrapolated": [value * 1000 / TIMED_STEPS for value in found["peer"]],
        f"ours, {ddpm.DEFAULT_STEPS} steps": found["ours"],
    }


def row_3(repeats: int) -> dict:
    """One call of the 113.7M network at 128 px, one image: UNet2DModel as users run it, float32 / ours."""
    peer, ours = peer_network(BUTTERFLY), our_network(BUTTERFLY)
    return times({"UNet2DModel, float32": call(peer, 128), "ours": call(ours, 128)}, 3 * repeats)


def row_4(repeats: int) -> dict:
    """The same call, the peer at its best: bf16, channels_last."""
    peer = peer_network(BUTTERFLY).to(torch.bfloat16, memory_format=torch.channels_last)
    return times({"UNet2DModel, bf16": call(peer, 128), "ours": call(our_network(BUTTERFLY), 128)}, 3 * repeats)


def row_4_compiled(repeats: int) -> dict:
    """The same call, both compiled."""
    peer = peer_network(BUTTERFLY).to(torch.bfloat16, memory_format=torch.channels_last)
    ours = our_network(BUTTERFLY)
    peer.compile(), ours.compile()
    return times({"UNet2DModel, bf16, compiled": call(peer, 128), "ours, compiled": call(ours, 128)}, 3 * repeats)


def training_data(count: int = 2048) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def their_training(batch: int, best: bool) -> Callable[[], object]:
    """A step of diffusers' unconditional script, without accelerate: float32, or bf16 autocast and channels_last."""
    from diffusers import DDPMScheduler, UNet2DModel
    from diffusers.training_utils import EMAModel

    network = UNet2DModel(**CIFAR).train()
    if best:
        network.to(memory_format=torch.channels_last)
    scheduler = DDPMScheduler(num_train_timesteps=1000)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8)
    average = EMAModel(network.parameters(), decay=0.9999, use_ema_warmup=True)
    images = data.to_float(training_data())
    loader = iter(torch.utils.data.DataLoader(images.repeat(50, 1, 1, 1), batch_size=batch, shuffle=True))

    def work():
        clean = next(loader)
        noise = torch.randn(clean.shape)
        t = torch.randint(0, 1000, (batch,))
        with torch.autocast("cpu", torch.bfloat16, enabled=best):
            output = network(scheduler.add_noise(clean, noise, t), t).sample
        loss = torch.nn.functional.mse_loss(output.float(), noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average.step(network.parameters())
        return loss.item()

    return work


def our_training(batch: int, changes: dict) -> Callable[[], object]:
    """A step of train.py's loop, its data, optimizer and EMA included."""
    settings = train.DEFAULTS | {"batch_size": batch, "optimizer": "adamw", "precision": "bf16", "compile": False}
    settings |= changes
    config, schedule = train.design(settings, ())
    network = unet.UNet(config).to(memory_format=torch.channels_last)
    device = torch.device("cpu")
    state = train.State(network, settings, device)
    images = training_data().numpy()
    dataset = SimpleNamespace(images=images, labels=None)
    table = ddpm.training_table(schedule).float()
    cdf = ddpm.timestep_cdf(schedule, settings["density"], settings["density_mean"], settings["density_std"])
    batches = train.Batches(dataset, np.arange(len(images)), settings, None, cdf, device, 0, 1)
    scaler = state.scaler

    def autocast():
        return torch.autocast("cpu", torch.bfloat16)

    def work():
        part = batches(state.step)
        state.update(train.backward(network, table, part, 1, autocast, scaler, nullcontext), settings)

    return work


CIFAR_SETTINGS = {"size": 32, "channels": [128, 256, 256, 256], "attention": [16], "layers": 2, "head_dim": 8,
                  "groups": 32, "prediction": "epsilon", "density": "uniform"}  # fmt: skip


def images_a_second(found: dict[str, list[float]], batch: int) -> dict[str, list[float]]:
    return {name: [batch / value for value in values] for name, values in found.items()}


def row_5(repeats: int) -> dict:
    """Training images a second, the network of CIFAR-10, batch 16: diffusers' script's loop / ours."""
    contenders = {
        "diffusers, float32": their_training(16, False),
        "diffusers, bf16, channels_last": their_training(16, True),
        "ours": our_training(16, CIFAR_SETTINGS),
    }
    return images_a_second(times(contenders, repeats), 16)


def row_5_lucidrains(repeats: int) -> dict:
    """Training images a second, batch 16, 32 px: denoising-diffusion-pytorch's network and loop / ours of its size."""
    from denoising_diffusion_pytorch import GaussianDiffusion, Unet

    peer = GaussianDiffusion(Unet(dim=64, dim_mults=(1, 2, 4, 8), flash_attn=False), image_size=32, timesteps=1000)
    average, images = copy.deepcopy(peer), training_data().float() / 255
    optimizer = torch.optim.Adam(peer.parameters(), lr=1e-4, betas=(0.9, 0.99))

    def work():
        loss = peer(images[torch.randint(len(images), (16,))])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(peer.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for kept, new in zip(average.parameters(), peer.parameters(), strict=True):
                kept.lerp_(new, 0.005)
        return loss.item()

    ours = {"size": 32, "channels": [128, 256, 256, 256], "attention": [16], "layers": 2, "head_dim": 32}
    return images_a_second(times({"lucidrains, float32": work, "ours": our_training(16, ours)}, repeats), 16)


def peak() -> float:
    """Measured bf16 GFLOP/s: the best of a large product and of a large convolution."""
    a, x = torch.randn(2048, 2048, dtype=torch.bfloat16), torch.randn(8, 192, 32, 32, dtype=torch.bfloat16)
    weight = torch.randn(192, 192, 3, 3, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    x = x.to(memory_format=torch.channels_last)
    found = times({"product": lambda: a @ a, "conv": lambda: F.conv2d(x, weight, padding=1)}, 20)
    work = {"product": 2 * 2048**3, "conv": 2 * 8 * 192 * 192 * 9 * 32 * 32}
    return max(work[name] / min(values) / 1e9 for name, values in found.items())


def row_7(repeats: int) -> dict:
    """GFLOP/s reached while drawing at 128 px, beside the measured peak of bf16."""
    network, schedule, size = preset_network("base")
    loops = {
        "classic, batch 1": (our_model(our_network(BUTTERFLY), ddpm.Schedule()), 1),
        "base, batch 1": (our_model(network, schedule), 1),
        "base, batch 8": (our_model(network, schedule), 8),
    }
    found = times({name: our_draw(model, count, 5) for name, (model, count) in loops.items()}, repeats)
    rates = {"peak": [peak()]}
    for name, (model, count) in loops.items():
        gflop = 5 * count * unet.flops(model.network.config, (size, size)) / 1e9
        rates[name] = [gflop / value for value in found[name]]
    return rates


def draw_in_a_process(folder: Path, *flags: str) -> tuple[float, float]:
    """Seconds and peak MiB of `python sample.py` from its start."""
    begin = time.perf_counter()
    command = [sys.executable, str(ROOT / "sample.py"), "--model", str(folder), "--out", f"{folder}/out.png", *flags]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{command} failed")
    return time.perf_counter() - begin, usage.ru_maxrss / (1024 if sys.platform == "linux" else 2**20)


def row_8(repeats: int) -> dict:
    """Peak MiB of a process that loads a 128 px model and draws one image."""
    found = {}
    for name in ("base", "classic"):
        config, schedule = train.design(train.DEFAULTS | train.PRESETS[name], ())
        with tempfile.TemporaryDirectory() as folder:
            sample.save_model(Path(folder), unet.UNet(config), schedule)
            found[name] = [draw_in_a_process(Path(folder), "-n", "1", "--steps", "2")[1] for _ in range(repeats)]
    return found


def row_9(repeats: int) -> dict:
    """Seconds of `python sample.py -n 8` with the model in the box, from the start of the process."""
    command = [sys.executable, "sample.py", "-n", "8", "--out", os.devnull + ".png"]
    with tempfile.TemporaryDirectory() as folder:
        command[-1] = f"{folder}/samples.png"
        return times(
            {"sample.py -n 8": lambda: subprocess.run(command, cwd=ROOT, capture_output=True, check=True)}, repeats
        )


def row_10(repeats: int) -> dict:
    """Seconds of a draw by preset base's network against size, batch and steps, one of them changed at a time."""
    network, schedule, _ = preset_network("base")
    contenders = {}
    for size, batch, steps in (
        [(s, 1, 10) for s in (32, 64, 128, 256)]
        + [(128, b, 10) for b in (2, 4, 8, 16)]
        + [(128, 1, s) for s in (5, 20, 50)]
    ):
        config = replace(network.config, sample_size=size // network.config.patch_size)
        sized = copy.copy(network)
        sized.config = config
        contenders[f"{size} px, batch {batch}, {steps} steps"] = our_draw(our_model(sized, schedule), batch, steps)
    return times(contenders, repeats)


ROWS = {"1": (row_1, "s"), "2": (row_2, "s"), "3": (row_3, "s"), "4": (row_4, "s"), "4c": (row_4_compiled, "s"),
        "5": (row_5, "images/s"), "5l": (row_5_lucidrains, "images/s"), "7": (row_7, "GFLOP/s"), "8": (row_8, "MiB"),
        "9": (row_9, "s"), "10": (row_10, "s")}  # fmt: skip

WITH_PEER = {"1", "2", "3", "4", "4c", "5", "5l"}  # rows whose first contender is a peer


def machine() -> dict:
    info = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = next((line.split(":")[1].strip() for line in info if line.startswith("model name")), "")
    packages = ("torch", "diffusers", "denoising_diffusion_pytorch", "numpy")
    versions = {name: version(name) for name in packages if find_spec(name)}
    return {
        "cpu": cpu or platform.processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
    } | versions


def markdown(results: dict) -> str:
    lines = ["| row | contender | least | median | greatest | n | peer / ours |", "|---|---|---|---|---|---|---|"]
    for name, row in results.items():
        first, unit = None, row["unit"]
        for contender, values in row["values"].items():
            first = first or median(values)
            ratio = f"{median(values) / first if unit == 'images/s' else first / median(values):.3g}"
            ratio = ratio if name in WITH_PEER else ""
            shown = " | ".join(f"{value:.4g}" for value in (min(values), median(values), max(values)))
            lines.append(f"| {name} | {contender} ({unit}) | {shown} | {len(values)} | {ratio} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", help="numbers with commas between (default: all)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--out", type=Path, default=ROOT / "benchmarks/speed", help="of .json and .md (default: %(default)s)"
    )
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:  # a process of its own for each row, so that none inherits another's memory or threads
        work, unit = ROWS[args.one]
        json.dump({"what": work.__doc__, "unit": unit, "values": work(args.repeats)}, sys.stdout)
        return
    results = {}
    for name in args.rows.split(",") if args.rows else ROWS:
        command = [sys.executable, "-m", "benchmarks.speed", "--one", name, "--repeats", str(args.repeats)]
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True, text=True)
        results[name] = json.loads(done.stdout.splitlines()[-1])
        print(f"{results[name]['what']}\n{markdown({name: results[name]})}", flush=True)
    record = {"machine": machine(), "rows": results}
    args.out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    what = "".join(f"- {name}: {row['what']}\n" for name, row in results.items())
    facts = ", ".join(f"{key} {value}" for key, value in record["machine"].items())
    args.out.with_suffix(".md").write_text(f"{what}\n{markdown(results)}\n{facts}\n")


if __name__ == "__main__":
    main()
