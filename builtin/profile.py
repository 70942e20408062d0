"""Where the time of training goes: the parts of a step, the share of the machine's peak, a trace, the data."""

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path

import torch

import data
import sample

STEPS = 10
DECODED = 256  # images that are decoded with each number of workers


def profile(run, trace: Path, prediction_losses: Callable) -> None:
    """Prints where the time of `run`, a train.Run, goes and writes a trace of three steps. Saves nothing of the run."""
    settings, device = run.record["settings"], run.processes.device
    step = partial(timed_step, run, prediction_losses)
    for _ in range(3):  # warm-up
        step()
    times = [step() for _ in range(STEPS)]
    parts = {name: statistics.median(part[name] for part in times) for name in times[0]}
    total = sum(parts.values())
    print(f"a step of {len(run.batches(0).x0)} images takes {1000 * total:.1f} ms (medians of {STEPS} steps)")
    for name, seconds in parts.items():
        print(f"  {name:10}{1000 * seconds:9.1f} ms {seconds / total:6.1%}")
    rate = 3 * run.record["gflop_per_image"] * len(run.batches(0).x0) / total
    peak = peak_gflops(device, sample.PRECISIONS[settings["precision"]])
    print(
        f"{rate:,.0f} GFLOP/s, {rate / peak:.0%} of the {peak:,.0f} GFLOP/s that a product of matrices reaches in "
        f"{settings['precision']} here"
    )
    print(f"decoding {settings['data']} at {settings['size']} px:")
    for workers, speed in decoding_speeds(settings).items():
        print(f"  {workers:2} worker{'s' * (workers > 1):1} {speed:9,.0f} images/s")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it reports a missing GPU as an error
    activities = {torch.profiler.ProfilerActivity.CPU}
    if device.type == "cuda":
        activities.add(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as recorded:
        for _ in range(3):
            step()
    with tempfile.TemporaryDirectory() as folder:
        recorded.export_chrome_trace(f"{folder}/trace.json")
        content = Path(folder, "trace.json").read_bytes()
    data.atomic_write(trace, lambda file: file.write(content))
    print(f"wrote {trace}, a trace of three steps: open it in chrome://tracing or at ui.perfetto.dev")


def timed_step(run, prediction_losses: Callable) -> dict:
    """Makes a step, and returns the seconds of its parts."""
    seconds, network = {}, run.state.network

    def timed(name: str, work: Callable):
        begin = time.perf_counter()
        with torch.profiler.record_function(name):
            result = work()
            wait_for(run.processes.device)
        seconds[name] = time.perf_counter() - begin
        return result

    batch = timed("data", lambda: run.batches(run.state.step))
    loss = timed("forward", lambda: prediction_losses(network, run.table, batch, run.autocast).mean())
    timed("backward", lambda: run.state.scaler.scale(loss).backward())
    timed("optimizer", lambda: run.state.update(loss.detach(), run.record["settings"]))
    timed("EMA", lambda: run.state.average(run.record["settings"]))
    seconds["optimizer"] -= seconds["EMA"]  # an update averages too
    return seconds


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def peak_gflops(device: torch.device, dtype: torch.dtype, side: int = 2048) -> float:
    """Measures the fastest of five products of two matrices with side x side elements, in GFLOP/s."""
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    fastest = float("inf")
    for _ in range(6):  # the first one allocates
        begin = time.perf_counter()
        a @ b
        wait_for(device)
        fastest = min(fastest, time.perf_counter() - begin)
    return 2 * side**3 / fastest / 1e9


def decoding_speeds(settings: dict) -> dict:
    """Measures how many images of the run's data are decoded per second with 1, 2, 4 ... workers."""
    source = data.find_source(settings["data"], settings["revision"])
    decode = partial(data.decode_item, size=settings["size"], channels=settings["image_channels"])
    speeds, workers = {}, 1
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        items = list(islice(data.READERS[source.kind](source, Path(scratch))[2], DECODED))
        while workers <= os.cpu_count():
            with ThreadPoolExecutor(workers) as pool:
                begin = time.perf_counter()
                list(pool.map(decode, items))
                speeds[workers] = len(items) / (time.perf_counter() - begin)
            workers *= 2
    return speeds
