"""Counters, histograms and gauges in the text format of Prometheus, and the metrics of the server."""

import math
import os
import threading
import time
from contextlib import suppress
from pathlib import Path

import torch

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
    is_time = name.endswith("_seconds") and not name.endswith("_timestamp_seconds")
    return "histogram" if is_time else "gauge"


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
        return exposition(METRICS, numbers)


def exposition(metrics: dict, numbers: dict) -> str:
    """Returns numbers {name and labels: value} in Prometheus text format 0.0.4, with the help texts of `metrics`."""
    lines = []
    for name, sentence in metrics.items():
        lines += [f"# HELP {name} {sentence}", f"# TYPE {name} {metric_type(name)}"]
        names = [name]
        if metric_type(name) == "histogram":
            names = [f"{name}_bucket", f"{name}_sum", f"{name}_count"]
        lines += [f"{key} {value:.15g}" for key, value in numbers.items() if key.partition("{")[0] in names]
    return "\n".join([*lines, ""])


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
