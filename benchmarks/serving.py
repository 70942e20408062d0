"""The server beside the obvious one and the seed system's, with the model in the box.

    python -m benchmarks.serving                      all rows, some minutes
    python -m benchmarks.serving --rows load          one of them: load, beside, answers

"obvious" is FastAPI with uvicorn: the same weights, precision and sampler, kept loaded, one request at a time. "seed"
is the same but reads the checkpoint for every request. Each runs in a process of its own, and all but the one that is
measured are stopped by a signal meanwhile. Clients are threads that ask for one image, again and again.
"""

import argparse
import json
import re
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import data
import ddpm
import sample
from benchmarks.speed import machine

ROOT = Path(__file__).resolve().parent.parent
CONTENDERS = ("ours", "obvious", "seed")
CLIENTS = (1, 8, 64)


def obvious(port: int, again: bool) -> None:
    """The server that one writes first; with `again` the model is read for every request."""
    import fastapi
    import uvicorn

    app, lock = fastapi.FastAPI(), threading.Lock()
    device = sample.choose_device()

    def load() -> sample.Model:
        return sample.load(sample.BOX, device, sample.choose_precision(device))

    sample.set_threads()
    kept = load()

    @app.get("/readyz")
    def ready() -> str:
        return "ready"

    @app.get("/generate_sample/")
    def generate(steps: int = 10, n_images: int = 1, seed: int = 0):
        with lock:
            model = load() if again else kept
            labels = [(seed + i) % model.network.config.class_count for i in range(n_images)]
            table = ddpm.plan(model.schedule, steps=steps)
            images = sample.draw(model, range(seed, seed + n_images), table, labels)
        return fastapi.Response(data.encode_png(data.grid(images)), media_type="image/png")

    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return listening.getsockname()[1]


def ask(port: int, target: str) -> tuple[int, dict, float]:
    """Status, headers and seconds of one request whose answer is read to its end."""
    begin, received = time.perf_counter(), b""
    with socket.create_connection(("127.0.0.1", port), timeout=300) as connection:
        connection.sendall(f"GET {target} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n".encode())
        while part := connection.recv(65536):
            received += part
    lines = received.partition(b"\r\n\r\n")[0].decode("latin-1").split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines[1:])
    return int(lines[0].split()[1]), headers, time.perf_counter() - begin


@contextmanager
def running(*names: str, flags: tuple[str, ...] = ()):
    """Server processes, by name: (process, port), stopped but for those that `awake` wakes."""
    found = {}
    try:
        for name in names:
            port = free_port()
            words = ["server.py", "--model", str(sample.BOX), "--port", str(port), *flags]
            words = words if name == "ours" else ["-m", "benchmarks.serving", "--serve", name, "--port", str(port)]
            process = subprocess.Popen([sys.executable, *words], cwd=ROOT, stderr=subprocess.DEVNULL)
            found[name] = process, port
            wait_for(lambda port=port: ask(port, "/readyz")[0] == 200)
            ask(port, "/generate_sample/?seed=1")
            process.send_signal(signal.SIGSTOP)
        yield found
    finally:
        for process, _ in found.values():
            process.kill()
            process.wait()


def wait_for(condition, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with suppress(OSError):
            if condition():
                return
        time.sleep(0.005)
    raise TimeoutError("it did not come to that")


@contextmanager
def awake(process: subprocess.Popen):
    process.send_signal(signal.SIGCONT)
    try:
        yield
    finally:
        process.send_signal(signal.SIGSTOP)


def load(port: int, clients: int, seconds: float) -> dict[str, float]:
    """Images a second and latencies of so many clients, each with one request at a time."""
    latencies, stop = [], time.monotonic() + seconds
    begin = time.perf_counter()

    def client(number: int) -> None:
        seed = 1000 * number
        while time.monotonic() < stop:
            status, _, taken = ask(port, f"/generate_sample/?seed={seed}")
            assert status == 200, status
            latencies.append(taken)
            seed += 1

    threads = [threading.Thread(target=client, args=(i,)) for i in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    cuts = statistics.quantiles(latencies, n=100, method="inclusive") if len(latencies) > 1 else latencies * 99
    rate = len(latencies) / (time.perf_counter() - begin)
    return {"images/s": rate, "p50": cuts[49], "p95": cuts[94], "p99": cuts[98]}


def measure_load(repetitions: int, seconds: float) -> dict:
    found = {f"{name}, {clients}": [] for clients in CLIENTS for name in CONTENDERS}
    with running(*CONTENDERS) as servers:
        for _ in range(repetitions):
            for clients in CLIENTS:
                for name, (process, port) in servers.items():
                    with awake(process):
                        found[f"{name}, {clients}"].append(load(port, clients, seconds))
                    print(name, clients, found[f"{name}, {clients}"][-1], flush=True)
    return found


def measure_beside(repetitions: int) -> dict:
    """Seconds of a one-image request that comes half a second after one of 64 images, and of that one."""
    found = {}
    with running("ours", "obvious") as servers:
        for _ in range(repetitions):
            for name, (process, port) in servers.items():
                with awake(process), ThreadPoolExecutor() as pool:
                    long = pool.submit(ask, port, "/generate_sample/?n_images=64")
                    time.sleep(0.5)
                    short = ask(port, "/generate_sample/?seed=5")
                for what, answer in (("one image", short), ("64 images", long.result())):
                    found.setdefault(f"{name}, {what}", []).append(answer[2])
    return found


def measure_answers(repetitions: int) -> dict:
    """Seconds to refuse with 429, until a client's departure is noticed, and from SIGTERM to the end under load."""
    found = {"to refuse with 429": [], "to notice a departure": [], "to drain": []}

    def waiting(port: int) -> int:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as page:
            return int(re.search(rb"^papilio_queue_requests (\d+)", page.read(), re.MULTILINE)[1])

    for _ in range(repetitions):
        with running("ours", flags=("--queue", "6400", "--timeout", "3600")) as servers:
            process, port = servers["ours"]
            process.send_signal(signal.SIGCONT)
            leaving = socket.create_connection(("127.0.0.1", port))
            leaving.sendall(b"GET /generate_sample/?n_images=64&steps=100 HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
            wait_for(lambda port=port: waiting(port) == 1)
            for _ in range(20):
                status, _, taken = ask(port, "/generate_sample/?n_images=64&steps=100")
                assert status == 429
                found["to refuse with 429"].append(taken)
            begin = time.perf_counter()
            leaving.close()
            wait_for(lambda port=port: waiting(port) == 0)
            found["to notice a departure"].append(time.perf_counter() - begin)
            target = "/generate_sample/?n_images=8"
            clients = [threading.Thread(target=ask, args=(port, target)) for _ in range(16)]
            for client in clients:
                client.start()
            wait_for(lambda port=port: waiting(port) >= 10)
            begin = time.perf_counter()
            process.send_signal(signal.SIGTERM)
            process.wait()
            found["to drain"].append(time.perf_counter() - begin)
            for client in clients:
                client.join()
    return found


def spread(values: list[float]) -> str:
    return f"{min(values):.3g} / {statistics.median(values):.3g} / {max(values):.3g}"


def tables(found: dict) -> list[str]:
    lines = []
    if "load" in found:
        lines += ["| clients | server | images/s | p50, s | p95, s | p99, s |", "|---|---|---|---|---|---|"]
        for key, rows in found["load"].items():
            name, clients = key.split(", ")
            cells = [spread([row[column] for row in rows]) for column in ("images/s", "p50", "p95", "p99")]
            lines.append(f"| {clients} | {name} | {' | '.join(cells)} |")
        lines.append("")
        for clients in CLIENTS:
            ours = [row["images/s"] for row in found["load"][f"ours, {clients}"]]
            for name in CONTENDERS[1:]:
                peer = [row["images/s"] for row in found["load"][f"{name}, {clients}"]]
                ratios = [a / b for a, b in zip(ours, peer, strict=True)]
                lines.append(f"- {clients} clients, images a second, ours / {name}: {spread(ratios)}")
        lines.append("")
    rows = {name: values for row in ("beside", "answers") for name, values in found.get(row, {}).items()}
    if rows:
        lines += ["| seconds | min / median / max | n |", "|---|---|---|"]
        lines += [f"| {name} | {spread(values)} | {len(values)} |" for name, values in rows.items()]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--rows", nargs="+", choices=("load", "beside", "answers"), default=["load", "beside", "answers"]
    )
    parser.add_argument("--repetitions", type=int, default=5, help="(default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=8, help="of each load (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/serving", help="of .md and .json")
    parser.add_argument("--serve", choices=CONTENDERS[1:], help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return obvious(args.port, args.serve == "seed")
    work = {"load": lambda: measure_load(args.repetitions, args.seconds),
            "beside": lambda: measure_beside(args.repetitions),
            "answers": lambda: measure_answers(args.repetitions)}  # fmt: skip
    found = {name: work[name]() for name in args.rows}
    facts = machine() | {"repetitions": args.repetitions, "seconds": args.seconds}
    args.out.with_suffix(".json").write_text(json.dumps({"machine": facts} | found, indent=1) + "\n")
    text = [
        *tables(found),
        "",
        "min / median / max. " + ", ".join(f"{key} {value}" for key, value in facts.items()),
        "",
    ]
    args.out.with_suffix(".md").write_text("\n".join(text))
    print("\n".join(text))


if __name__ == "__main__":
    main()
