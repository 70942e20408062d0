"""Measures the server beside a simple FastAPI server, with the default model.

    python -m benchmarks.serving                                  all rows: about ten minutes
    python -m benchmarks.serving --only load-8,answers            two rows
    python -m benchmarks.serving --only load-8 --against FOLDER   also an older checkout of this project

"simple" is FastAPI with uvicorn: same weights, precision and sampler, one request at a time; "reloading" is the same,
but reads the model folder for each request. Each server has a process of its own; all but the one being measured are
stopped by a signal. Clients are threads that request one image after another. Requires Linux or macOS, and
pip install -r benchmarks/requirements.txt
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
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from benchmarks import common, ours

PEERS = ("simple", "reloading")
OTHER = "other checkout"
ROWS = {
    "load-1": "Images per second and latency with 1 client.",
    "load-8": "The same with 8 clients.",
    "load-64": "The same with 64 clients.",
    "beside": "Latency of a request for one image that comes half a second after a request for 64, and of the latter.",
    "answers": "Time to refuse with 429, to notice that a client has left, and to finish admitted requests on SIGTERM.",
}
LOADS = {f"load-{clients}": clients for clients in (1, 8, 64)}


# ---- servers ---------------------------------------------------------------------------------------------------------


def serve_simply(port: int, reloading: bool) -> None:
    import fastapi
    import uvicorn

    app, lock = fastapi.FastAPI(), threading.Lock()
    ours.set_threads()
    kept = ours.load(ours.DEFAULT_MODEL)

    @app.get("/readyz")
    def ready() -> str:
        return "ready"

    @app.get("/generate_sample/")
    def generate(steps: int = 10, n_images: int = 1, seed: int = 0):
        with lock:
            model = ours.load(ours.DEFAULT_MODEL) if reloading else kept
            labels = [(seed + i) % model.network.config.class_count for i in range(n_images)]
            images = ours.generate(model, range(seed, seed + n_images), (ours.DEFAULT_SAMPLER, steps), labels)
        return fastapi.Response(ours.png(ours.grid(images)), media_type="image/png")

    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return listening.getsockname()[1]


def ask(port: int, target: str) -> tuple[int, float]:
    """Sends a request and reads the answer to its end. Returns status and seconds."""
    begin, received = time.perf_counter(), b""
    with socket.create_connection(("127.0.0.1", port), timeout=300) as connection:
        connection.sendall(f"GET {target} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n".encode())
        while part := connection.recv(65536):
            received += part
    return int(received.split(None, 2)[1]), time.perf_counter() - begin


def command(name: str, port: int, flags: tuple[str, ...]) -> list[str]:
    if name in PEERS:
        return [sys.executable, "-m", "benchmarks.serving", "--serve", name, "--port", str(port)]
    return [sys.executable, "server.py", "--model", str(ours.DEFAULT_MODEL.resolve()), "--port", str(port), *flags]


@contextmanager
def running(*names: str, against: Path | None = None, flags: tuple[str, ...] = (), warm: bool = True):
    """Starts servers, and stops each by SIGSTOP when it has answered. Yields {name: (process, port)}."""
    found = {}
    try:
        for name in names:
            port = free_port()
            folder = against if name == OTHER else common.ROOT
            process = subprocess.Popen(command(name, port, flags), cwd=folder, stderr=subprocess.DEVNULL)
            found[name] = process, port
            wait_for(lambda port=port: ask(port, "/readyz")[0] == 200, process)
            if warm:
                ask(port, "/generate_sample/?seed=1")
            process.send_signal(signal.SIGSTOP)
        yield found
    finally:
        for process, _ in found.values():
            process.kill()
            process.wait()


def wait_for(condition: Callable[[], bool], process: subprocess.Popen, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        with suppress(OSError):
            if condition():
                return
        time.sleep(0.005)
    state = "did not answer in time" if process.poll() is None else f"ended with status {process.returncode}"
    raise RuntimeError(f"a server {state}: {' '.join(process.args)}")


@contextmanager
def awake(process: subprocess.Popen):
    process.send_signal(signal.SIGCONT)
    try:
        yield
    finally:
        process.send_signal(signal.SIGSTOP)


# ---- measuring -------------------------------------------------------------------------------------------------------


def load(port: int, clients: int, seconds: float) -> dict[str, float]:
    """Measures images per second and latency of clients that each have one request at a time."""
    latencies, stop = [], time.monotonic() + seconds
    begin = time.perf_counter()

    def client(number: int) -> None:
        seed = 1000 * number
        while time.monotonic() < stop:
            status, taken = ask(port, f"/generate_sample/?seed={seed}")
            assert status == 200, status
            latencies.append(taken)
            seed += 1

    threads = [threading.Thread(target=client, args=(i,)) for i in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    rate = len(latencies) / (time.perf_counter() - begin)
    cuts = latencies * 99
    if len(latencies) > 1:
        cuts = statistics.quantiles(latencies, n=100, method="inclusive")
    return {"images/s": rate, "p50": cuts[49], "p95": cuts[94], "p99": cuts[98]}


def measure_load(rows: list[str], repeats: int, seconds: float, against: Path | None) -> dict:
    names = ["ours", *PEERS]
    turns = {LOADS[row]: names for row in rows}
    if against:
        names = [*names, OTHER]
        turns[8] = names
    found = {f"{name}, {clients}": [] for clients, contenders in turns.items() for name in contenders}
    print("starting the servers", flush=True)
    with running(*names, against=against) as servers, common.Progress(len(found) * repeats) as progress:
        for repetition in range(1, repeats + 1):
            for clients, contenders in turns.items():
                for name in contenders:
                    process, port = servers[name]
                    what = f"load-{clients}: {name}, repetition {repetition} of {repeats}"
                    with progress.part(what), awake(process):
                        measured = load(port, clients, seconds)
                    found[f"{name}, {clients}"].append(measured)
                    shown = ", ".join(f"{column} {value:.3g}" for column, value in measured.items())
                    progress.say(f"{what}: {shown}")
    return found


def measure_beside(repeats: int) -> dict:
    """Measures a request for one image that arrives half a second after a request for 64 images, and the latter."""
    found, names = {}, ("ours", "simple")
    with running(*names) as servers, common.Progress(len(names) * repeats) as progress:
        for repetition in range(1, repeats + 1):
            for name, (process, port) in servers.items():
                what = f"beside: {name}, repetition {repetition} of {repeats}"
                with progress.part(what), awake(process), ThreadPoolExecutor() as pool:
                    long = pool.submit(ask, port, "/generate_sample/?n_images=64")
                    time.sleep(0.5)
                    _, short_seconds = ask(port, "/generate_sample/?seed=5")
                    _, long_seconds = long.result()
                found.setdefault(f"{name}, one image", []).append(short_seconds)
                found.setdefault(f"{name}, 64 images", []).append(long_seconds)
    return found


REFUSED, LEFT, DRAINED = "to refuse with 429", "to notice that a client has left", "to finish on SIGTERM"


def measure_answers(repeats: int) -> dict:
    found = {REFUSED: [], LEFT: [], DRAINED: []}
    with common.Progress(repeats) as progress:
        for repetition in range(1, repeats + 1):
            with (
                progress.part(f"answers: repetition {repetition} of {repeats}"),
                running("ours", flags=("--queue", "6400", "--timeout", "3600")) as servers,
            ):
                for what, seconds in answers(*servers["ours"]):
                    found[what].append(seconds)
    return found


def answers(process: subprocess.Popen, port: int):
    """Fills the queue of a server. Yields what was measured, and the seconds."""

    def waiting() -> int:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as page:
            return int(re.search(rb"^papilio_queue_requests (\d+)", page.read(), re.MULTILINE)[1])

    process.send_signal(signal.SIGCONT)
    leaving = socket.create_connection(("127.0.0.1", port))
    leaving.sendall(b"GET /generate_sample/?n_images=64&steps=100 HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
    wait_for(lambda: waiting() == 1, process)
    for _ in range(20):
        status, taken = ask(port, "/generate_sample/?n_images=64&steps=100")
        assert status == 429, status
        yield REFUSED, taken
    begin = time.perf_counter()
    leaving.close()
    wait_for(lambda: waiting() == 0, process)
    yield LEFT, time.perf_counter() - begin
    clients = [threading.Thread(target=ask, args=(port, "/generate_sample/?n_images=8")) for _ in range(16)]
    for client in clients:
        client.start()
    wait_for(lambda: waiting() >= 10, process)
    begin = time.perf_counter()
    process.send_signal(signal.SIGTERM)
    process.wait()
    yield DRAINED, time.perf_counter() - begin
    for client in clients:
        client.join()


# ---- the tables ------------------------------------------------------------------------------------------------------


def spread(values: list[float]) -> str:
    return f"{min(values):.3g} / {statistics.median(values):.3g} / {max(values):.3g}"


def load_table(found: dict) -> list[str]:
    columns = ("images/s", "p50", "p95", "p99")
    rows = []
    for key, measured in found.items():
        name, clients = key.split(", ")
        rows.append([clients, name, *(spread([one[column] for one in measured]) for column in columns)])
    return [*common.table(("clients", "server", "images/s", "p50, s", "p95, s", "p99, s"), rows), ""]


def rates(found: dict, name: str, clients: str | int) -> list[float]:
    return [measured["images/s"] for measured in found[f"{name}, {clients}"]]


def ratios(found: dict) -> list[str]:
    lines = []
    for key in found:
        name, clients = key.split(", ")
        if name in PEERS:
            both = zip(rates(found, "ours", clients), rates(found, name, clients), strict=True)
            lines.append(f"- {clients} clients, images per second, ours / {name}: {spread([a / b for a, b in both])}")
    return [*lines, ""]


def comparison(found: dict, against: Path | None) -> list[str]:
    """Returns a line with the ratio of the rates of two checkouts with 8 clients, or nothing."""
    if not against:
        return []
    ratio = common.ratio(rates(found, "ours", 8), rates(found, OTHER, 8))
    other = common.checkout_name(against)
    return [f"- 8 clients, images per second, this checkout / {other}: {ratio}", ""]


def report(found: dict, facts: dict, against: Path | None = None) -> str:
    lines = []
    if "load" in found:
        lines += load_table(found["load"]) + ratios(found["load"]) + comparison(found["load"], against)
    seconds = {**found.get("beside", {}), **found.get("answers", {})}
    if seconds:
        rows = [[name, spread(values), str(len(values))] for name, values in seconds.items()]
        lines += [*common.table(("seconds", "minimum / median / maximum", "n"), rows), ""]
    return "\n".join([*lines, f"minimum / median / maximum. {common.described(facts)}", ""])


def parser() -> common.Parser:
    rows = "rows:\n" + "\n".join(f"  {name:9}{what}" for name, what in ROWS.items())
    parser = common.Parser("serving", __doc__, rows)
    parser.add_rows(ROWS, "load-8", "server.py")
    parser.add_argument(
        "--seconds",
        type=common.number(float, 0.1),
        default=8,
        metavar="S",
        help="duration of each load (default: %(default)s)",
    )
    parser.add_argument("--serve", choices=PEERS, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    return parser


def main() -> None:
    flags = parser()
    args = flags.parse_args()
    if args.serve:
        serve_simply(args.port, args.serve == "reloading")
        return
    names = flags.chosen_rows(args)
    flags.require(("fastapi", "uvicorn"))
    results = common.Results(flags, args)
    ours.set_threads()
    facts = common.machine() | {"repetitions": args.repeats, "seconds": args.seconds}
    loads = [name for name in names if name in LOADS]
    work = {}
    if loads:
        work["load"] = lambda: measure_load(loads, args.repeats, args.seconds, args.against)
    if "beside" in names:
        work["beside"] = lambda: measure_beside(args.repeats)
    if "answers" in names:
        work["answers"] = lambda: measure_answers(args.repeats)
    found = {}
    for name, measure in work.items():
        found[name] = measure()
        results.write(".json", json.dumps({"machine": facts, **found}, indent=1) + "\n")
        results.write(".md", report(found, facts, args.against))
    print(report(found, facts, args.against))
    results.finish()


if __name__ == "__main__":
    main()
