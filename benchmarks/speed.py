"""Speed and memory beside the peers, interleaved, in one process a row: a table and JSON.

    pip install -r benchmarks/requirements.txt
    python -m benchmarks.speed                   all rows, about half an hour on two cores
    python -m benchmarks.speed --rows 3,4        some rows

Each figure is the least, the median and the greatest of at least five repetitions; the contenders of a row take turns,
with the same number of threads. Where a figure is extrapolated from fewer steps, its name says so. Peers get their data
as tensors in memory, as ours is: what their scripts spend on reading and augmenting images is not counted. Memory is
the greatest resident size of a process of its own (Linux).
"""

import argparse
import copy
import io
import itertools
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
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

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


def prepared(network: unet.UNet, precision: str = "bf16") -> unet.UNet:
    """As sample.py draws with it."""
    sample.prepare(network, torch.device("cpu"), precision)
    network.fuse()
    return network


def peer_network(config: dict):
    from diffusers import UNet2DModel

    return UNet2DModel(**config).eval().requires_grad_(False)


def same_network(peer, precision: str = "bf16") -> unet.UNet:
    """Ours with the weights of a UNet2DModel."""
    config = unet.UNetConfig.from_dict(dict(peer.config))
    weights = {name: tensor.float().clone() for name, tensor in peer.state_dict().items()}
    return prepared(unet.build(config, weights), precision)


def check_same(contenders: dict[str, Callable[[], Tensor]]) -> dict[str, Callable[[], Tensor]]:
    """RuntimeError unless all give the first one's output, to the rounding of bf16."""
    first, *others = (work().float() for work in contenders.values())
    for other in others:
        if (error := float((other - first).norm() / first.norm())) > 0.05:
            raise RuntimeError(f"the outputs differ by {error:.1%}")
    return contenders


def preset_network(name: str) -> tuple[unet.UNet, ddpm.Schedule, int]:
    settings = train.DEFAULTS | train.PRESETS[name]
    config, schedule = train.design(settings, ())
    return prepared(unet.UNet(config)), schedule, settings["size"]


def call(network, size: int, batch: int = 1) -> Callable[[], Tensor]:
    x = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))
    t = torch.full((batch,), 500)

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
    model = our_model(same_network(peer_network(BUTTERFLY)), ddpm.Schedule())
    found = times({"peer": their_draw(TIMED_STEPS), "ours": our_draw(model, 1)}, repeats)
    return {
        "DDPMPipeline, 1000 steps, extrapolated": [value * 1000 / TIMED_STEPS for value in found["peer"]],
        f"ours, {ddpm.DEFAULT_STEPS} steps": found["ours"],
    }


def row_3(repeats: int) -> dict:
    """One call of the 113.7M network at 128 px, same weights: UNet2DModel as users run it, float32 / ours."""
    peer = peer_network(BUTTERFLY)
    contenders = {
        "UNet2DModel, float32": call(peer, 128),
        "ours, bf16": call(same_network(peer), 128),
        "ours, float32": call(same_network(peer, "fp32"), 128),
    }
    return times(check_same(contenders), 3 * repeats)


def row_4(repeats: int) -> dict:
    """The same call, the peer at its best: bf16, channels_last."""
    peer = peer_network(BUTTERFLY)
    ours = same_network(peer)
    peer.to(torch.bfloat16, memory_format=torch.channels_last)
    return times(check_same({"UNet2DModel, bf16": call(peer, 128), "ours, bf16": call(ours, 128)}), 3 * repeats)


def row_4_compiled(repeats: int) -> dict:
    """The same call, both compiled."""
    peer = peer_network(BUTTERFLY)
    ours = same_network(peer)
    peer.to(torch.bfloat16, memory_format=torch.channels_last)
    peer.compile()
    sample.compile_for_drawing(ours, 1)
    contenders = {"UNet2DModel, bf16, compiled": call(peer, 128), "ours, bf16, compiled": call(ours, 128)}
    return times(check_same(contenders), 3 * repeats)


def training_data(count: int = 2048) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def their_training(best: bool) -> Callable[[], object]:
    """A step of diffusers' unconditional script, without accelerate: float32, its AdamW and EMA; or at its best, with
    bf16 autocast, channels_last, fused AdamW and foreach EMA."""
    from diffusers import DDPMScheduler, UNet2DModel
    from diffusers.training_utils import EMAModel

    network = UNet2DModel(**CIFAR).train()
    if best:
        network.to(memory_format=torch.channels_last)
    scheduler = DDPMScheduler(num_train_timesteps=1000)
    options = {"lr": 1e-4, "betas": (0.95, 0.999), "weight_decay": 1e-6, "eps": 1e-8, "fused": best}
    optimizer = torch.optim.AdamW(network.parameters(), **options)
    average = EMAModel(network.parameters(), decay=0.9999, use_ema_warmup=True, foreach=best)
    images = data.to_float(training_data())

    def work():
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
    """A step of denoising-diffusion-pytorch's Trainer, without accelerate: float32, EMA every 10 steps; or at its best,
    with bf16 autocast, channels_last and fused Adam."""
    from denoising_diffusion_pytorch import GaussianDiffusion, Unet

    peer = GaussianDiffusion(Unet(dim=64, dim_mults=(1, 2, 4, 8), flash_attn=False), image_size=32, timesteps=1000)
    if best:
        peer.to(memory_format=torch.channels_last)
    average, images = copy.deepcopy(peer), training_data().float() / 255
    optimizer = torch.optim.Adam(peer.parameters(), lr=1e-4, betas=(0.9, 0.99), fused=best)
    steps = itertools.count()

    def work():
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


def our_training(changes: dict) -> Callable[[], object]:
    """A step of train.py's loop, its data, optimizer and EMA included."""
    settings = train.DEFAULTS | {"batch_size": BATCH, "precision": "bf16"} | changes
    settings["lr"] = train.RATES[settings["optimizer"]]
    config, schedule = train.design(settings, ())
    network = unet.UNet(config).to(memory_format=torch.channels_last)
    device = torch.device("cpu")
    state = train.State(network, settings, device)
    images = training_data().numpy()
    table = ddpm.training_table(schedule).float()
    cdf = ddpm.timestep_cdf(schedule, settings["density"], settings["density_mean"], settings["density_std"])
    dataset = SimpleNamespace(images=images, labels=None)
    batches = train.Batches(dataset, np.arange(len(images)), settings, None, cdf, device, 0, 1)

    def autocast():
        return torch.autocast("cpu", torch.bfloat16)

    def work():
        part = batches(state.step)
        state.update(train.backward(network, table, part, 1, autocast, state.scaler, nullcontext), settings)

    return work


BATCH = 16
# The network of CIFAR-10, and one as large as lucidrains' of dim 64: 35.7M parameters, 3.65 GFLOP.
CIFAR_SETTINGS = {"size": 32, "channels": [128, 256, 256, 256], "attention": [16], "layers": 2, "head_dim": 8,
                  "groups": 32, "prediction": "epsilon", "density": "uniform"}  # fmt: skip
LUCIDRAINS_SETTINGS = {"size": 32, "channels": [64, 128, 256, 448], "attention": [4], "layers": 1, "head_dim": 32,
                       "groups": 8}  # fmt: skip
TRAININGS = {
    "diffusers, float32": "their_training(False)",
    "diffusers, bf16, channels_last, fused": "their_training(True)",
    "ours, AdamW": "our_training(CIFAR_SETTINGS | {'optimizer': 'adamw'})",
    "ours, Muon": "our_training(CIFAR_SETTINGS)",
}


def images_a_second(contenders: dict, repeats: int) -> dict[str, list[float]]:
    return {name: [BATCH / value for value in values] for name, values in times(contenders, repeats).items()}


def row_5(repeats: int) -> dict:
    """Training images a second, the network of CIFAR-10, batch 16: diffusers' script's loop / ours."""
    return images_a_second({name: eval(maker) for name, maker in TRAININGS.items()}, repeats)


def row_5_memory(repeats: int) -> dict:
    """Peak MiB of a process that trains so, three steps."""
    code = "from benchmarks.speed import *; work = {}; work(), work(), work()"
    return {name: [memory_of(code.format(maker)) for _ in range(repeats)] for name, maker in TRAININGS.items()}


def row_5_lucidrains(repeats: int) -> dict:
    """Training images a second, batch 16, 32 px: denoising-diffusion-pytorch's network and loop / ours of its size."""
    contenders = {
        "lucidrains, float32": lucidrains_training(False),
        "lucidrains, bf16, channels_last, fused": lucidrains_training(True),
        "ours, AdamW": our_training(LUCIDRAINS_SETTINGS | {"optimizer": "adamw"}),
        "ours, Muon": our_training(LUCIDRAINS_SETTINGS),
    }
    return images_a_second(contenders, repeats)


def peak() -> dict[str, tuple[Callable[[], object], int]]:
    """What the machine can do in bf16: a large product and large convolutions, and their floating-point operations."""
    a = torch.randn(2048, 2048, dtype=torch.bfloat16)
    work = {"product": (lambda: a @ a, 2 * 2048**3)}
    for width, side in ((128, 64), (192, 32), (256, 32)):
        x = torch.randn(8, width, side, side, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
        weight = torch.randn(width, width, 3, 3, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
        convolve = partial(F.conv2d, x, weight, padding=1)
        work[f"convolution of {width} channels, {side} px"] = convolve, 2 * 8 * width**2 * 9 * side**2
    return work


def row_7(repeats: int) -> dict:
    """Share of the measured bf16 peak (the best of a product and three convolutions) that drawing at 128 px reaches."""
    network, schedule, size = preset_network("base")
    classic = our_model(prepared(unet.UNet(unet.UNetConfig(**BUTTERFLY))), ddpm.Schedule())
    base = our_model(network, schedule)
    loops = {"classic, batch 1": (classic, 1), "base, batch 1": (base, 1), "base, batch 8": (base, 8)}
    limits = peak()
    contenders = {name: our_draw(model, count, 5) for name, (model, count) in loops.items()}
    found = times(contenders | {name: work for name, (work, _) in limits.items()}, repeats)
    rates = {name: [flop / value / 1e9 for value in found[name]] for name, (_, flop) in limits.items()}
    best = max(max(values) for values in rates.values())
    for name, (model, count) in loops.items():
        gflop = 5 * count * unet.flops(model.network.config, (size, size)) / 1e9
        rates[f"{name}: % of the peak"] = [100 * gflop / value / best for value in found[name]]
    return rates


def memory_of(code: str) -> float:
    """Peak resident MiB of a new Python process that runs this."""
    code += "; print(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True)
    return int(done.stdout.split()[-2]) / 1024


def row_8(repeats: int) -> dict:
    """Peak MiB of a process that loads a 128 px model and draws one image."""
    found = {}
    for name in ("base", "classic"):
        config, schedule = train.design(train.DEFAULTS | train.PRESETS[name], ())
        with tempfile.TemporaryDirectory() as folder:
            sample.save_model(Path(folder), unet.UNet(config), schedule)
            flags = ["--model", folder, "--out", f"{folder}/out.png", "-n", "1", "--steps", "2"]
            found[name] = [memory_of(f"import sample; assert sample.main({flags}) == 0") for _ in range(repeats)]
    return found


def row_9(repeats: int) -> dict:
    """Seconds of `python sample.py -n 8` in a fresh clone, with the model in the box, from the start of the process."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["git", "clone", "--quiet", str(ROOT), folder], check=True)

        def draw():
            subprocess.run([sys.executable, "sample.py", "-n", "8"], cwd=folder, capture_output=True, check=True)

        return times({"sample.py -n 8": draw}, repeats)


CURVES = [(size, 1, 10) for size in (32, 64, 128, 256)] + [(128, batch, 10) for batch in (2, 4, 8, 16)]
CURVES += [(128, 1, steps) for steps in (5, 20, 50)]


def curve_draw(size: int, batch: int, steps: int) -> Callable[[], object]:
    """A draw by preset base's network at another size."""
    network, schedule, _ = preset_network("base")
    network.config = replace(network.config, sample_size=size // network.config.patch_size)
    return our_draw(our_model(network, schedule), batch, steps)


def row_10(repeats: int) -> dict:
    """Seconds of a draw by preset base's network against size, batch and steps, one of them changed at a time."""
    return times({"{} px, batch {}, {} steps".format(*point): curve_draw(*point) for point in CURVES}, repeats)


def row_10_memory(repeats: int) -> dict:
    """Peak MiB of a process that does so."""
    code = "from benchmarks.speed import *; curve_draw(*{})()"
    return {"{} px, batch {}, {} steps".format(*point): [memory_of(code.format(point))] for point in CURVES}


ROWS = {
    "1": (row_1, "s"), "2": (row_2, "s"), "3": (row_3, "s"), "4": (row_4, "s"), "4c": (row_4_compiled, "s"),
    "5": (row_5, "images/s"), "5l": (row_5_lucidrains, "images/s"), "5m": (row_5_memory, "MiB"),
    "7": (row_7, "GFLOP/s"), "8": (row_8, "MiB"), "9": (row_9, "s"), "10": (row_10, "s"), "10m": (row_10_memory, "MiB"),
}  # fmt: skip
WITH_PEER = {"1", "2", "3", "4", "4c", "5", "5l", "5m"}  # rows whose first contender is a peer


def machine() -> dict:
    info = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = next((line.split(":")[1].strip() for line in info if line.startswith("model name")), "")
    packages = ("torch", "diffusers", "denoising_diffusion_pytorch", "numpy")
    versions = {name: version(name) for name in packages if find_spec(name)}
    known = getattr(torch.cpu, "get_capabilities", dict)()  # PyTorch 2.10 does not tell
    bf16 = [name for name, there in known.items() if there is True and "bf16" in name]
    return {
        "cpu": ", ".join([cpu or platform.processor(), *bf16]),
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
    parser.add_argument("--rows", default=",".join(ROWS), help="with commas between (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="at least 5 for a result (default: %(default)s)")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "benchmarks/speed", help="of .json and .md (default: %(default)s)"
    )
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:  # a process of its own for each row, so that none inherits another's memory or threads
        work, unit = ROWS[args.one]
        json.dump({"what": work.__doc__, "unit": unit, "values": work(args.repeats)}, sys.stdout)
        return
    if unknown := set(args.rows.split(",")) - ROWS.keys():
        parser.error(f"--rows: there is no row {', '.join(sorted(unknown))}; rows are {', '.join(ROWS)}")
    sample.set_threads()
    pinned = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    results = {}
    for name in args.rows.split(","):
        command = [sys.executable, "-m", "benchmarks.speed", "--one", name, "--repeats", str(args.repeats)]
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, env=pinned, check=True, text=True)
        results[name] = json.loads(done.stdout.splitlines()[-1])
        print(f"{results[name]['what']}\n{markdown({name: results[name]})}", flush=True)
    record = {"machine": machine(), "rows": results}
    args.out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    what = "".join(f"- {name}: {row['what']}\n" for name, row in results.items())
    facts = ", ".join(f"{key} {value}" for key, value in record["machine"].items())
    args.out.with_suffix(".md").write_text(f"{what}\n{markdown(results)}\n{facts}\n")


if __name__ == "__main__":
    main()
