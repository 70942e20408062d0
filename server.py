"""A model folder in, images over HTTP out: sampling that a stranger may call.

python server.py                             the newest run, or the model in the box, on 127.0.0.1:8000
curl -o butterflies.png 'http://127.0.0.1:8000/generate_sample/?n_images=4&seed=7'

One thread, the engine's, calls the network: each turn is one step of up to `--batch-size` images, of whatever requests
they are and however many steps these have. A thread a connection reads, waits and writes. `http.server` keeps sockets
and threads and writes answers; what comes in is read and checked here (RFC 9112), for it forgives too much.
"""

import argparse
import base64
import hashlib
import heapq
import hmac
import json
import math
import os
import re
import secrets
import select
import signal
import socket
import socketserver
import sys
import threading
import time
import traceback
import urllib.parse
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import lru_cache, partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch
from torch import Tensor

import data
import ddpm
import sample
from data import InputError

MAX_HEAD, MAX_TARGET, MAX_HEADERS, MAX_CONNECTIONS, MAX_IMAGES = 32 * 1024, 8 * 1024, 100, 256, 64
HEAD_SECONDS, WRITE_SECONDS, LINGER_SECONDS, HEARTBEAT_SECONDS = 10.0, 10.0, 2.0, 10.0
SLOWEST_READER = 64 * 1024  # bytes a second: an answer may take so long, beside WRITE_SECONDS
DRAIN_SECONDS = 6.0  # and at most 2 s for what follows: container hosts kill at 10 s
MAX_JOBS, MAX_RETRY = 224, 120  # the other connections are for probes and refusals; seconds in Retry-After
LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
ERROR = ("message", "type", "param", "code", "request_id")
METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT", "QUERY")


class Refusal(Exception):
    """An answer that is an error: status, one sentence that repeats nothing of what came in, parameter, headers."""

    def __init__(self, status: int, message: str, param: str | None = None, headers: dict[str, str] | None = None):
        super().__init__(message)
        self.status, self.message, self.param, self.headers = status, message, param, headers or {}


# Made anew each time: an exception keeps the frames that it went through.
closed = partial(Refusal, 503, "this server is shutting down; ask another one", headers={"Retry-After": "5"})
failed = partial(Refusal, 500, "the images could not be drawn")
left = partial(Refusal, 408, "the client has left")
late = partial(Refusal, 504, "the images were not finished in time; ask for fewer, or later")


# ---- reading a request -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Request:
    method: str
    path: str  # as it came, nothing decoded
    query: str
    host: str  # without the port, lower case
    headers: dict[str, str]  # by lower-case name; what came twice is joined with a comma


def read_head(connection: socket.socket, seconds: float = HEAD_SECONDS) -> bytes:
    """What comes before the first empty line. Refusal for what cannot become a request, as soon as that is seen, and
    for one that is too long or too late; OSError where the client leaves."""
    deadline, head, seen = time.monotonic() + seconds, b"", 0
    while (end := head.find(b"\r\n\r\n", seen)) < 0 and len(head) <= MAX_HEAD:
        if head and not head[:1].isalpha() or BARE.search(head, seen):
            raise Refusal(400, "this is no HTTP request")
        if (left := deadline - time.monotonic()) <= 0:
            raise Refusal(408, f"the request's head took longer than {seconds:g} seconds")
        connection.settimeout(left)
        with suppress(TimeoutError):
            part = connection.recv(65536)
            if not part:
                raise ConnectionResetError("left")
            seen = max(0, len(head) - 3)  # what came before was looked at
            head += part
    if not 0 <= end <= MAX_HEAD:
        if b"\r\n" in head[:MAX_TARGET]:
            raise Refusal(431, f"the request's head is longer than {MAX_HEAD} bytes")
        raise Refusal(414, f"the request's target is longer than {MAX_TARGET} bytes")
    return head[:end]


BARE = re.compile(rb"(?<!\r)\n|\r[^\n]")
TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]"
PLAIN = r"(?:[\w.~!$&'()*+,;=:@/-]|%[0-9A-Fa-f]{2})*"
TARGET = re.compile(rf"(?:http://([^/?#]*))?(/{PLAIN})(?:\?({PLAIN}))?", re.ASCII)
HOST = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::[0-9]{0,5})?", re.ASCII)


def parse_head(head: bytes) -> Request:
    """RFC 9112 without its leniencies. Refusal for everything else, and for a body: no route takes one."""
    line, *lines = head.split(b"\r\n")
    words = line.split(b" ")
    if len(words) != 3 or not re.fullmatch(TOKEN + rb"{1,32}", words[0]) or not re.fullmatch(rb"HTTP/\d\.\d", words[2]):
        raise Refusal(400, "the first line must be a method, a target and HTTP/1.1")
    method, target, version = (word.decode("latin-1") for word in words)
    if version not in ("HTTP/1.0", "HTTP/1.1"):
        raise Refusal(505, "HTTP/1.1 and 1.0 are spoken here")
    if method not in METHODS:
        raise Refusal(501, "this method is not known here")
    if len(target) > MAX_TARGET:
        raise Refusal(414, f"the request's target is longer than {MAX_TARGET} bytes")
    found = TARGET.fullmatch(target)
    if not found:
        raise Refusal(400, "the target must be a path that begins with /, with all other characters percent-encoded")
    if len(lines) > MAX_HEADERS:
        raise Refusal(431, f"there are more than {MAX_HEADERS} headers")
    headers: dict[str, str] = {}
    for line in lines:
        pair = re.fullmatch(rb"(" + TOKEN + rb"+):([\t\x20-\x7e\x80-\xff]*)", line)  # one way to match: linear time
        if not pair:
            raise Refusal(400, "a header is malformed")
        name, value = pair[1].decode().lower(), pair[2].strip(b" \t").decode("latin-1")
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    length = headers.get("content-length", "0")
    if not re.fullmatch(r"[0-9]{1,19}", length) or ("content-length" in headers and "transfer-encoding" in headers):
        raise Refusal(400, "Content-Length is malformed, or stands beside Transfer-Encoding")
    if "expect" in headers:
        raise Refusal(417, "no expectation is met here")
    if int(length) or "transfer-encoding" in headers:
        raise Refusal(413, "no body is taken here; leave it out")
    if version == "HTTP/1.0":
        headers.setdefault("host", "unnamed")
    authority = HOST.fullmatch((found[1] if found[1] is not None else headers.get("host", "")).lower())
    if not authority or not HOST.fullmatch(headers.get("host", "").lower()):
        raise Refusal(400, "there must be one Host header, with the name of this server")
    return Request(method, found[2], found[3] or "", authority[1], headers)


def parse_query(query: str, schemas: dict[str, dict]) -> dict[str, int | float | str]:
    """The values of a query's parameters; each is what its schema says, and there once. Refusal, with its name."""
    values: dict[str, int | float | str] = {}
    for pair in query.split("&") if query else ():
        name, _, text = pair.partition("=")
        try:
            name, text = (urllib.parse.unquote_plus(part, errors="strict") for part in (name, text))
        except UnicodeDecodeError as error:
            raise Refusal(400, "the query is not UTF-8") from error
        if name not in schemas:
            raise Refusal(400, f"there is a parameter that is not known; known here: {', '.join(schemas)}")
        if name in values:
            raise Refusal(400, f"{name} is given twice", name)
        values[name] = parse_value(name, text, schemas[name])
    return values


def parse_value(name: str, text: str, schema: dict) -> int | float | str:
    if "enum" in schema:
        if text in schema["enum"]:
            return text
        raise Refusal(400, f"{name} must be one of: {', '.join(schema['enum'])}", name)
    number, kind, pattern = float, "number", r"[0-9]{1,5}(\.[0-9]{1,20})?(e-[0-9]{1,3})?"
    if schema["type"] == "integer":
        number, kind, pattern = int, "whole number", r"[0-9]{1,19}"
    if re.fullmatch(pattern, text) and schema["minimum"] <= number(text) <= schema["maximum"]:
        return number(text)
    raise Refusal(400, f"{name} must be a {kind} from {schema['minimum']} to {schema['maximum']}", name)


def parameters(model: sample.Model) -> dict[str, dict]:
    """The parameters of a draw, as JSON schemas: what the validator accepts and what /openapi.json says."""
    config, total = model.network.config, model.schedule.num_train_timesteps
    usual = f"calls of the network an image (default {min(ddpm.DEFAULT_STEPS, total)}; with ddpm {total})"
    table = {
        "steps": {"type": "integer", "minimum": 1, "maximum": total, "description": usual},
        "n_images": {"type": "integer", "minimum": 1, "maximum": MAX_IMAGES, "default": 1},
        "seed": {"type": "integer", "minimum": 0, "maximum": 2**63 - 1, "description": "image i is that of seed + i"},
        "sampler": {"type": "string", "enum": list(ddpm.SAMPLERS), "default": ddpm.DEFAULT_SAMPLER},
    }
    if config.class_count:
        names = [sample.class_name(config, label) for label in range(config.class_count)]
        table["class"] = {"type": "string", "enum": names, "description": "(default: the classes in turn, by seed)"}
    if config.null_label is not None:
        text = "how much of a class: 1 as trained (default), 0 nothing, more exaggerates it"
        table["guidance"] = {"type": "number", "minimum": 0, "maximum": 20, "description": text}
    return table


# ---- the engine ------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Drawing:
    """One image on its way."""

    seed: int
    label: int | None
    step: int = 0  # the next one
    noise: Callable[[], Tensor] | None = None  # from here on: None until the first step, and but for `pixels` after it
    state: Tensor | None = None  # (1, 4, C, H, W)
    preview: tuple[int, Tensor] | None = None  # steps made, estimate of x0, uint8 (C, H, W): taken, or replaced
    pixels: Tensor | None = None  # uint8 (C, H, W), once finished


@dataclass(eq=False)
class Job:
    """A request for images, from its admission to its end. The engine writes, and sets `news` and then `done`."""

    model: sample.Model
    args: argparse.Namespace  # as of sample.py
    table: Tensor
    drawings: list[Drawing]
    facts: dict
    watched: bool = False  # whether previews are wanted
    connection: socket.socket | None = None
    client: str = ""  # its address and what it asks for
    deadline: float = math.inf  # of time.monotonic()
    arrived: float = field(default_factory=time.monotonic)
    spent: int = 0  # predictions made, and those before it came
    drained: int = 0  # bytes that came after the request
    error: Refusal | None = None
    news: threading.Event = field(default_factory=threading.Event)
    done: threading.Event = field(default_factory=threading.Event)

    @property
    def weight(self) -> int:
        """Predictions that an image-step takes: two with guidance."""
        return 1 if self.args.guidance in (0, 1) else 2

    @property
    def left(self) -> int:
        """Its price from here."""
        return self.weight * sum(len(self.table) - drawing.step for drawing in self.drawings)

    def gone(self) -> bool:
        """Whether the client has left; asked where its connection is readable. What came after the request is thrown
        away, for it would hide the end, and a client that does not stop sending counts as gone."""
        with suppress(OSError):
            part = self.connection.recv(2**20)
            self.drained += len(part)
            return not part or self.drained > 2**20
        return True


class Engine:
    """Owns the network: admits jobs, and advances them by one step a turn on a thread of its own."""

    QUANTUM = 16  # predictions that a job has in each round

    def __init__(self, batch: int, capacity: int, exact: bool, metrics: "Metrics"):
        self.batch = sample.EXACT_BATCH if exact else batch
        self.capacity, self.exact, self.metrics = capacity, exact, metrics
        self.lock, self.loading = threading.Condition(), threading.Lock()
        self.jobs: list[Job] = []
        self.promises: list[tuple[float, float, str]] = []  # when a client that was refused may come, with what
        self.model: sample.Model | None = None  # of new jobs
        self.rate, self.closed = 100.0, False  # image-steps a second of full batches
        self.thread = threading.Thread(target=self.run, name="engine", daemon=True)

    def load(self, path: Path | None, device: torch.device, precision: str) -> None:
        """Reads the model named, or the newest one, tries it, and gives it to the jobs that come from now on.
        InputError where it does not work; the one before stays."""
        path = path or sample.newest_run()
        model = sample.load(path, device, precision)
        x = torch.zeros(self.batch, *model.shape, device=device)
        t = torch.zeros(self.batch, dtype=torch.int64, device=device)
        with torch.inference_mode():
            for _ in range(2):  # the first call allocates
                begin = time.perf_counter()
                finite = bool(model.network(x, t, t if model.network.class_embedding else None).isfinite().all())
        if not finite:
            raise InputError(f"{path}: the network's output is not finite")
        with self.lock:
            self.model, self.rate = model, self.batch / (time.perf_counter() - begin)
        self.metrics.add("papilio_model_loads_total", result="loaded")
        log(f"{path}: {model.shape[1]} px, {device.type}, {precision}, model {model.hash[:12]}")

    def reload(self, *source) -> None:
        """As `load`, but whatever is wrong is told and counted: the model before goes on."""
        with self.loading:  # one after the other, so that the newest is the last
            try:
                self.load(*source)
            except Exception as error:
                self.metrics.add("papilio_model_loads_total", result="refused")
                log(f"the model was not loaded, the one before stays: {error}")

    def submit(self, job: Job) -> None:
        """Refusal where the job cannot be taken: 503; 400 for one that could not be finished in time even alone; or 429
        with the seconds after which there is room for it. That room is kept until two seconds later, as far as it would
        not come free by then: half the queue at most, for not all who are refused come again."""
        with self.lock:
            if self.closed or not self.alive():
                raise closed()
            now, possible = time.monotonic(), self.rate * (job.deadline - job.arrived)  # what can be finished in time
            if job.left > possible:
                raise Refusal(400, "this takes longer than is allowed here; ask for fewer images or steps", "n_images")
            room = min(self.capacity, possible)
            place = room / MAX_JOBS  # the least that a job takes of it
            cost, costs = max(job.left, place), [max(other.left, place) for other in self.jobs]
            excess = sum(costs) + cost - room
            speed = self.rate * sum(costs) / max(1, sum(other.left for other in self.jobs))
            self.promises = sorted(promise for promise in self.promises if promise[0] > now - 2)
            kept = next((promise for promise in self.promises if promise[0] <= now and promise[2] == job.client), None)
            owed = missing = 0.0
            for due, promised, _ in self.promises:
                owed += promised
                missing = max(missing, 1.5 * owed - speed * max(0, due - now))  # 1.5: rates vary
            if self.jobs and excess + (0 if kept else min(missing, room / 2)) > 0:
                seconds = min(max(0, math.ceil(1.5 * (excess + owed) / speed)) + 1, MAX_RETRY)
                if seconds < MAX_RETRY:
                    self.promises.append((now + seconds, cost, job.client))
                raise Refusal(429, "the queue is full", headers={"Retry-After": str(seconds)})
            if kept:
                self.promises.remove(kept)
            job.spent = self.newest_round() * self.QUANTUM
            self.jobs.append(job)
            self.lock.notify_all()

    def end(self, job: Job, error: Refusal | None = None) -> None:
        """Ends a job, finished or, with an error, not. From then on its connection is not looked at any more."""
        with self.lock:
            if job in self.jobs:
                self.jobs.remove(job)
                job.error = error
                self.metrics.add("papilio_departures_total", error is not None and error.status == 408)
            self.lock.notify_all()
        job.news.set()
        job.done.set()

    def close(self, seconds: float) -> None:
        """Takes no more jobs, finishes what it can in that time and refuses the rest."""
        with self.lock:
            self.closed = True
            self.lock.notify_all()
            self.lock.wait_for(lambda: not self.jobs, seconds)
            for job in list(self.jobs):
                self.end(job, closed())
        if self.thread.ident:  # not to leave in the middle of a step
            self.thread.join(0.5)

    def alive(self) -> bool:
        return self.thread.is_alive() or self.thread.ident is None

    @torch.inference_mode()
    def run(self) -> None:
        try:
            while self.jobs or not self.closed:
                with self.lock:
                    self.lock.wait_for(lambda: self.jobs or self.closed)
                    self.drop()
                    chosen = self.choose()
                try:
                    if chosen:
                        self.turn(chosen)
                except Exception:  # a full memory, say: the batch is lost, the others go on
                    log(traceback.format_exc())
                    self.metrics.add("papilio_engine_errors_total")
                    for job in {job for job, _ in chosen}:
                        self.end(job, failed())
        finally:
            for job in list(self.jobs):
                self.end(job, failed())

    def drop(self) -> None:
        """Ends jobs whose time is over and those whose client has left; under the lock, so that no connection of a job
        is closed meanwhile."""
        poll, watched = select.poll(), {job.connection.fileno(): job for job in self.jobs if job.connection}
        for number in watched:
            poll.register(number, select.POLLIN)
        for number, _ in poll.poll(0):
            if watched[number].gone():
                self.end(watched[number], left())
        for job in [job for job in self.jobs if job.deadline < time.monotonic()]:
            self.end(job, late())

    def choose(self) -> list[tuple[Job, Drawing]]:
        """The images of the next turn: one of each job, and so on until the batch is full; those that were begun come
        first. Fair in predictions: a job that has had its QUANTUM of a round waits for those that have not, and none
        may save up more than a round (deficit round robin, Shreedhar & Varghese 1996, for batches)."""
        newest, room, chosen = self.newest_round(), self.batch, []
        for job in self.jobs:
            job.spent = max(job.spent, (newest - 1) * self.QUANTUM)
        order = [(job.spent // self.QUANTUM, 0, place) for place, job in enumerate(self.jobs)]
        heapq.heapify(order)
        unfinished = [iter([drawing for drawing in job.drawings if drawing.pixels is None]) for job in self.jobs]
        while order and room > 0:
            _, share, place = heapq.heappop(order)
            if drawing := next(unfinished[place], None):
                job = self.jobs[place]
                chosen.append((job, drawing))
                job.spent += job.weight
                room -= 1 if self.exact else job.weight  # exact calls are padded anyway
                heapq.heappush(order, (job.spent // self.QUANTUM, share + 1, place))
        return chosen

    def newest_round(self) -> int:
        return max((job.spent for job in self.jobs), default=0) // self.QUANTUM

    def turn(self, chosen: list[tuple[Job, Drawing]]) -> None:
        """One step of each image. Those of one model share a call of the network, guided ones apart: they need two
        predictions each."""
        begin, cpu = time.perf_counter(), time.process_time()
        groups: dict[tuple, list[tuple[Job, Drawing]]] = {}
        for job, drawing in chosen:
            groups.setdefault((job.model, job.weight), []).append((job, drawing))
            if drawing is job.drawings[0] and drawing.step == 0:
                self.metrics.observe("papilio_queue_wait_seconds", time.monotonic() - job.arrived)
        for members in groups.values():
            self.advance(members)
        seconds = time.perf_counter() - begin
        if (price := sum(job.weight for job, _ in chosen)) >= self.batch:
            self.rate += 0.1 * (price / seconds - self.rate)
        self.metrics.observe("papilio_step_seconds", seconds)
        self.metrics.add("papilio_steps_total", price)
        self.metrics.add("papilio_sampling_cpu_seconds_total", time.process_time() - cpu)
        for job in {job for job, _ in chosen}:
            if all(drawing.pixels is not None for drawing in job.drawings):
                self.end(job)
            job.news.set()

    def advance(self, members: list[tuple[Job, Drawing]]) -> None:
        """One call of the network: one step of images of one model, in a full batch where bits are to be exact."""
        model, guided = members[0][0].model, members[0][0].weight == 2
        null, device = model.network.config.null_label, model.device
        columns = states, rows, noises, labels, guidance = [], [], [], [], []
        for job, drawing in members:
            if drawing.state is None:
                drawing.noise = sample.noise_of(drawing.seed, model.shape, model.network.config.patch_size)
                drawing.state = ddpm.initial_state(drawing.noise().to(device))
            states.append(drawing.state)
            rows.append(job.table[drawing.step])
            noisy = rows[-1][ddpm.MATRIX + ddpm.NOISE] != 0  # no number is taken from a generator where none is used
            noises.append(drawing.noise() if noisy else torch.zeros(1, *model.shape))
            labels.append(null if job.args.guidance == 0 else drawing.label)
            guidance.append(job.args.guidance)
        for column in columns:
            column += column[:1] * (self.batch - len(members) if self.exact else 0)
        label = None if labels[0] is None else torch.tensor(labels, device=device)
        by_image = torch.tensor(guidance, device=device)[:, None, None, None]
        network = ddpm.guided(model.network, by_image, null) if guided else model.network
        state, table = torch.cat(states), torch.stack(rows)
        output = network(state[:, ddpm.X], table[:, ddpm.TIMESTEP].long().to(device), label)
        state, x0 = ddpm.step(state, output, table, torch.cat(noises).to(device))
        for i, (job, drawing) in enumerate(members):
            drawing.state = state[i : i + 1].clone()  # a view would hold all of the batch
            drawing.step += 1
            if job.watched:
                drawing.preview = drawing.step, data.to_uint8(x0[i]).cpu()
            if drawing.step == len(job.table):
                drawing.pixels, drawing.state, drawing.noise = data.to_uint8(state[i, ddpm.X]).cpu(), None, None
                self.metrics.add("papilio_images_total")


# ---- telemetry -------------------------------------------------------------------------------------------------------

# name: (type, what it is)
FAMILIES = {
    "papilio_request_seconds": ("histogram", "From a request's head to the end of its answer, by route and status."),
    "papilio_queue_wait_seconds": ("histogram", "From a request's admission to its first step."),
    "papilio_step_seconds": ("histogram", "A turn of the engine: one step of a batch of images."),
    "papilio_steps_total": ("counter", "Image-steps, guided ones twice; by turns and capacity, how full these are."),
    "papilio_images_total": ("counter", "Images finished."),
    "papilio_sampling_cpu_seconds_total": ("counter", "CPU time of the process while the network ran."),
    "papilio_departures_total": ("counter", "Clients that left before their images were finished."),
    "papilio_engine_errors_total": ("counter", "Turns that failed."),
    "papilio_model_loads_total": ("counter", "Models loaded, by result."),
    "papilio_save_errors_total": ("counter", "Images that could not be saved."),
    "papilio_saved_bytes": ("gauge", "Bytes in the folder of saved images."),
    "papilio_batch_capacity": ("gauge", "Image-steps that fit a turn."),
    "papilio_queue_requests": ("gauge", "Requests that have been admitted and are not finished."),
    "papilio_queue_steps": ("gauge", "Their image-steps that are left."),
    "papilio_queue_capacity_steps": ("gauge", "Image-steps that may wait, or can be finished in time."),
    "papilio_connections": ("gauge", "Open connections."),
    "papilio_turned_away_total": ("counter", "Connections closed at their bound, with all of them waiting."),
    "papilio_worker_up": ("gauge", "1 while the engine's thread lives."),
    "papilio_model_info": ("gauge", "1; the labels say which model new requests get."),
    "papilio_gpu_memory_bytes": ("gauge", "Memory that tensors take on the GPU."),
    "process_resident_memory_bytes": ("gauge", "Memory of the process."),
    "process_cpu_seconds_total": ("counter", "CPU time of the process."),
    "process_open_fds": ("gauge", "Open file descriptors."),
}
BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120)


def labelled(name: str, **labels: str) -> str:
    escapes = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})
    pairs = ",".join(f'{key}="{str(value).translate(escapes)}"' for key, value in labels.items())
    return f"{name}{{{pairs}}}" if pairs else name


class Metrics:
    """Counters and histograms, and the page that shows them with gauges: Prometheus text format 0.0.4."""

    def __init__(self):
        self.lock = threading.RLock()
        self.numbers: dict[str, float] = {}  # by name and labels

    def add(self, name: str, value: float = 1, **labels: str) -> None:
        key = labelled(name, **labels)
        with self.lock:
            self.numbers[key] = self.numbers.get(key, 0) + value

    def observe(self, name: str, value: float, **labels: str) -> None:
        with self.lock:  # a page has all of it or nothing
            for bound in (*BUCKETS, math.inf):
                self.add(f"{name}_bucket", value <= bound, **labels, le="+Inf" if bound == math.inf else f"{bound:g}")
            self.add(f"{name}_sum", value, **labels)
            self.add(f"{name}_count", 1, **labels)

    def page(self, gauges: dict[str, float]) -> str:
        with self.lock:
            numbers = self.numbers | gauges
        lines = []
        for family, (kind, sentence) in FAMILIES.items():
            lines += [f"# HELP {family} {sentence}", f"# TYPE {family} {kind}"]
            names = {family + suffix for suffix in (("_bucket", "_sum", "_count") if kind == "histogram" else ("",))}
            lines += [f"{key} {value:.15g}" for key, value in numbers.items() if key.partition("{")[0] in names]
        return "\n".join([*lines, ""])


def process_gauges() -> dict[str, float]:
    """Of this process, where the system tells (Linux); CPU time everywhere."""
    found = {"process_cpu_seconds_total": time.process_time()}
    with suppress(OSError, ValueError):
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        found["process_resident_memory_bytes"] = pages * os.sysconf("SC_PAGE_SIZE")
        found["process_open_fds"] = len(os.listdir("/proc/self/fd"))
    return found | ({"papilio_gpu_memory_bytes": torch.cuda.memory_allocated()} if torch.cuda.is_available() else {})


def image_facts(job: Job, drawing: Drawing) -> dict:
    own = {} if drawing.label is None else {"class": sample.class_name(job.model.network.config, drawing.label)}
    return job.facts | own | {"seed": drawing.seed}


def log(text: str) -> None:
    """A line on stderr: time, and the end of a text, without control characters."""
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    with suppress(OSError):  # whoever reads it may be gone
        print(now, re.sub(r"[^ -~]+", " ", text)[-1000:], file=sys.stderr, flush=True)


# ---- HTTP ------------------------------------------------------------------------------------------------------------


table_of = lru_cache(64)(ddpm.plan)


class Handler(BaseHTTPRequestHandler):
    protocol_version = request_version = "HTTP/1.1"
    requestline, disable_nagle_algorithm, server_version, sys_version, head_only = "", True, "papilio", "", False
    server: "Server"

    def log_message(self, *_) -> None:
        """http.server's own log; ours is a line a request."""

    def handle(self) -> None:
        self.id, self.status, self.route, self.close_connection = secrets.token_hex(8), 0, "none", True
        begin = time.perf_counter()
        try:
            try:
                head = read_head(self.connection)
                begin = time.perf_counter()
                self.server.mark(self.connection, True)
                self.answer(parse_head(head))
            except Refusal as refusal:
                self.refuse(refusal)
        except OSError:  # the client is gone, or does not read
            self.status = self.status or 499
        except Exception:
            log(traceback.format_exc())
            if not self.status:
                with suppress(OSError):
                    self.refuse(Refusal(500, "this is a fault of the server"))
        seconds = time.perf_counter() - begin
        if self.route != "none" or self.status != 499:  # a connection without a request is no request
            self.server.metrics.observe("papilio_request_seconds", seconds, route=self.route, status=str(self.status))
            log(f"{self.id} {self.route} {self.status} {1000 * seconds:.0f} ms")

    def answer(self, request: Request) -> None:
        self.head_only = request.method == "HEAD"
        path = request.path if request.path in ROUTES else request.path + "/"
        if path not in ROUTES:
            raise Refusal(404, f"there is nothing here; there is: {', '.join(ROUTES)}")
        self.route = path
        if request.method not in ("GET", "HEAD"):
            raise Refusal(405, "only GET and HEAD are known here", headers={"Allow": "GET, HEAD"})
        if path not in PROBES:
            self.check_access(request)
        ROUTES[path][0](self, request)

    def check_access(self, request: Request) -> None:
        """Against rebound names, pages of other sites that use a visitor's browser, and strangers."""
        hosts, tokens = self.server.hosts, self.server.tokens
        if request.host not in hosts:
            raise Refusal(421, "this is not the server of that name; --allow-host tells it its public names")
        origin = re.fullmatch(r"https?://(.*)", request.headers.get("origin", f"http://{request.host}").lower())
        host = HOST.fullmatch(origin[1]) if origin else None
        cross = self.route in GENERATING and request.headers.get("sec-fetch-site") == "cross-site"
        if not host or host[1] not in hosts or cross:
            raise Refusal(403, "pages of other sites may not use this server")
        scheme, _, given = request.headers.get("authorization", "").encode("latin-1").partition(b" ")
        if tokens and not (scheme.lower() == b"bearer" and any([hmac.compare_digest(given, t) for t in tokens])):
            raise Refusal(401, "a token is needed", headers={"WWW-Authenticate": "Bearer"})

    def respond(self, status: int, body: bytes | None, kind: str, headers: dict[str, str] | None = None) -> None:
        """Sends an answer; without a body, its head alone. OSError where the client does not take it in time."""
        self.status = status
        self.connection.settimeout(WRITE_SECONDS + len(body or b"") / SLOWEST_READER)
        self.send_response(status)
        all_headers = {"Content-Type": kind, "Connection": "close", "X-Content-Type-Options": "nosniff",
                       "Cache-Control": "no-store", "X-Request-Id": self.id} | (headers or {})  # fmt: skip
        all_headers |= {} if body is None else {"Content-Length": str(len(body))}
        for name, value in all_headers.items():
            if re.search(r"[^ -~]", value):
                raise ValueError(f"the header {name} has characters that no header may have")
            self.send_header(name, value)
        self.end_headers()
        if body and not self.head_only:
            self.wfile.write(body)

    def refuse(self, refusal: Refusal) -> None:
        self.respond(refusal.status, self.error_body(refusal), "application/json", refusal.headers)

    def error_body(self, refusal: Refusal) -> bytes:
        kind = "server_error" if refusal.status >= 500 else "invalid_request"
        code = re.sub(r"\W", "_", HTTPStatus(refusal.status).phrase.lower())
        error = dict(zip(ERROR, (refusal.message, kind, refusal.param, code, self.id), strict=True))
        return json.dumps({"error": error}).encode() + b"\n"

    # -- routes

    def get_health(self, request: Request) -> None:
        """The process answers and its engine lives: where this fails, start it anew."""
        self.tell(self.server.engine.alive() or self.server.engine.closed)

    def get_ready(self, request: Request) -> None:
        """Requests are taken: a model is loaded, the engine lives, and the server is not shutting down."""
        engine = self.server.engine
        self.tell(engine.model is not None and engine.alive() and not engine.closed)

    def tell(self, good: bool) -> None:
        self.respond(200 if good else 503, b"ok\n" if good else b"no\n", "text/plain")

    def get_metrics(self, request: Request) -> None:
        """Telemetry in the text format of Prometheus."""
        page = self.server.metrics.page(self.server.gauges()).encode()
        self.respond(200, page, "text/plain; version=0.0.4; charset=utf-8")

    def get_openapi(self, request: Request) -> None:
        """This document."""
        self.respond(200, json.dumps(describe_routes(self.model())).encode(), "application/json")

    def get_sample(self, request: Request) -> None:
        """Draws images: a PNG, in a grid where there are several."""
        job = self.new_job(request)
        headers = self.job_headers(job)
        if "seed" in urllib.parse.parse_qs(request.query):  # the same request gives the same picture
            tag = f'"{hashlib.sha256(json.dumps(job.facts).encode()).hexdigest()[:32]}"'
            weak = "" if self.server.engine.exact else "W/"  # bits depend on the batch, unless they are exact
            headers |= {"ETag": weak + tag, "Cache-Control": "no-cache"}
            if tag in re.findall(r'"[^"]*"', request.headers.get("if-none-match", "")):
                return self.respond(304, None, "image/png", headers)
        if self.head_only:
            return self.respond(200, None, "image/png", headers)
        with self.submitted(job):
            job.done.wait(max(0, job.deadline - time.monotonic()))
        if job.error:
            raise job.error
        images = torch.stack([drawing.pixels for drawing in job.drawings])
        self.respond(200, data.encode_png(data.grid(images), job.facts), "image/png", headers)
        self.keep(job)

    def get_stream(self, request: Request) -> None:
        """Draws images and tells how it goes, as server-sent events: queued, step (with the newest estimate of an
        image), image (finished), error."""
        job = self.new_job(request)
        job.watched = True
        if self.head_only:
            return self.respond(200, None, "text/event-stream", self.job_headers(job))
        with self.submitted(job):
            self.respond(200, None, "text/event-stream", self.job_headers(job))
            self.send("queued", {"request_id": self.id, "images": len(job.drawings), "steps": len(job.table)})
            waiting = dict(enumerate(job.drawings))
            while waiting and not job.error and (left := job.deadline - time.monotonic()) > 0:
                if not job.news.wait(min(left, HEARTBEAT_SECONDS)):
                    self.send("", {})
                job.news.clear()
                for k, drawing in list(waiting.items()):
                    newest, drawing.preview = drawing.preview, None
                    newest = newest if drawing.pixels is None else (drawing.step, drawing.pixels)
                    if newest is None or time.monotonic() > job.deadline:
                        continue
                    step, pixels = newest
                    picture = data.encode_png(data.grid(pixels[None], padding=0), image_facts(job, drawing))
                    facts = {"image": k, "seed": drawing.seed, "step": step, "steps": len(job.table)}
                    name = "image" if pixels is drawing.pixels else "step"
                    self.send(name, facts | {"png": base64.b64encode(picture).decode()})
                    if name == "image":
                        del waiting[k]
        if not waiting:
            return self.keep(job)
        error = job.error or late()
        self.status = error.status
        self.send("error", json.loads(self.error_body(error)))

    def send(self, event: str, content: dict) -> None:
        """One event, or, unnamed, a heartbeat; OSError where the client does not take it in time."""
        self.connection.settimeout(WRITE_SECONDS)
        text = f"event: {event}\ndata: {json.dumps(content)}\n\n" if event else ": still here\n\n"
        self.wfile.write(text.encode())

    # -- jobs

    def model(self) -> sample.Model:
        if self.server.engine.model is None:
            raise Refusal(503, "the model is still being loaded", headers={"Retry-After": "2"})
        return self.server.engine.model

    def new_job(self, request: Request) -> Job:
        model = self.model()
        values = parse_query(request.query, parameters(model))
        given = {"n": 1, "seed": secrets.randbelow(2**31)} | {NAMES.get(name, name): values[name] for name in values}
        args = argparse.Namespace(**vars(DEFAULTS) | given)
        try:
            table = table_of(model.schedule, args.sampler, args.steps)
        except ValueError as error:  # an offset that leads past the last timestep, say
            raise Refusal(400, str(error), "steps") from error
        jobs = sample.choose_jobs(args, model.network.config)
        facts = sample.describe(args, model, table, 1.0) | sample.describe_grid(model.network.config, jobs)
        client = f"{self.client_address[0]} {request.query}"
        job = Job(model, args, table, [Drawing(seed, label) for label, seed in jobs], facts, client=client)
        if job.left > self.server.max_cost:
            most = f"images x steps may be at most {self.server.max_cost}; guidance counts twice"
            raise Refusal(400, most, "n_images")
        return job

    @contextmanager
    def submitted(self, job: Job) -> Iterator[None]:
        """The job is the engine's inside; afterwards it is ended, whatever happened."""
        job.connection, job.deadline = self.connection, job.arrived + self.server.seconds
        self.server.engine.submit(job)
        try:
            yield
        except OSError:
            self.server.engine.end(job, left())
            raise
        finally:
            self.server.engine.end(job, late())

    def keep(self, job: Job) -> None:
        """A request does not fail because the disk does."""
        if self.server.store:
            for error in self.server.store.save(self.id, [(d.pixels, image_facts(job, d)) for d in job.drawings]):
                self.server.metrics.add("papilio_save_errors_total")
                log(f"not saved: {error}")

    def job_headers(self, job: Job) -> dict[str, str]:
        return {"X-Seed": str(job.args.seed), "X-Model-Hash": job.model.hash}


# path: what answers it, whose docstring describes it, and what comes back
ROUTES = {
    "/generate_sample/": (Handler.get_sample, "image/png"),
    "/generate_stream/": (Handler.get_stream, "text/event-stream"),
    "/openapi.json": (Handler.get_openapi, "application/json"),
    "/metrics": (Handler.get_metrics, "text/plain"),
    "/healthz": (Handler.get_health, "text/plain"),
    "/health": (Handler.get_health, "text/plain"),
    "/readyz": (Handler.get_ready, "text/plain"),
    "/ready": (Handler.get_ready, "text/plain"),
}
GENERATING = ("/generate_sample/", "/generate_stream/")
PROBES = ("/healthz", "/health", "/readyz", "/ready")  # for the machinery around: by any name, without a token


def describe_routes(model: sample.Model) -> dict:
    """The OpenAPI document, from the tables of routes and parameters."""
    query = [{"name": name, "in": "query", "schema": schema} for name, schema in parameters(model).items()]
    fields = dict.fromkeys(ERROR, {"type": ["string", "null"]})
    error = {"type": "object", "required": list(ERROR), "properties": fields}
    error = {"schema": {"type": "object", "required": ["error"], "properties": {"error": error}}}
    paths = {}
    for path, (work, kind) in ROUTES.items():
        good = {"description": "as asked for", "content": {kind: {}}}
        bad = {"description": "why not", "content": {"application/json": error, "text/plain": {}}}
        unchanged = {"304": {"description": "as before"}} if path in GENERATING else {}
        responses = {"200": good, "default": bad} | unchanged
        operation = {"summary": " ".join(work.__doc__.split()), "responses": responses}
        paths[path] = {"get": operation | ({"parameters": query} if path in GENERATING else {})}
    return {"openapi": "3.1.0", "info": {"title": "Papilio", "version": model.hash[:12]}, "paths": paths}


BUSY = (b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: 5\r\nConnection: close\r\n"
        b'\r\n{"error": {"message": "all connections are taken", "type": "server_error", "param": null, "code": '
        b'"service_unavailable", "request_id": null}}\n')  # fmt: skip


class Server(ThreadingHTTPServer):
    """Sockets and threads, bounded; and what the handlers share.

    hosts     names by which it may be asked, beside those of this machine's loopback
    tokens    bytes, of which a request must bring one; none: everyone may ask
    store     where images are kept, or None
    seconds   after which a request is given up, the queue included
    max_cost  images x steps that a request may ask for
    """

    daemon_threads, request_queue_size, allow_reuse_address = True, 128, True

    def __init__(self, address, engine: Engine, *, hosts=(), tokens=(), store=None, seconds=120.0, max_cost=6400):
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        names = (f"[{name}]" if re.fullmatch(r"[^[]*:.*:.*", name) else name for name in (address[0], *hosts))
        named = [HOST.fullmatch(name.lower()) for name in names]
        if not all(named):
            raise InputError("--host and --allow-host take the name or address of a machine")
        self.hosts = {*LOOPBACK, *(name[1] for name in named)}
        self.engine, self.tokens, self.metrics, self.store = engine, tokens, engine.metrics, store
        self.seconds, self.max_cost = seconds, max_cost
        self.lock = threading.Condition()
        self.connections: dict[socket.socket, bool] = {}  # the oldest first; whether it waits for an answer
        self.lingering: deque[tuple[float, socket.socket]] = deque()
        with data.disk_errors(f"listen on {address[0]} port {address[1]}", "choose another --host or --port"):
            super().__init__(address, Handler)

    server_bind = socketserver.TCPServer.server_bind  # http.server's asks the network for this machine's name

    # -- connections

    def process_request(self, connection: socket.socket, address) -> None:
        """A thread for it. At the bound the oldest one that waits for nothing makes room; where all wait, no."""
        with self.lock:
            full = len(self.connections) >= MAX_CONNECTIONS
            idle = next((other for other, waits in self.connections.items() if not waits), None) if full else None
            if idle:
                del self.connections[idle]
                with suppress(OSError):
                    idle.shutdown(socket.SHUT_RDWR)
            if not full or idle:
                self.connections[connection] = False
        if not full or idle:
            return super().process_request(connection, address)
        connection.setblocking(False)
        self.metrics.add("papilio_turned_away_total")
        with suppress(OSError):
            connection.send(BUSY)
            connection.shutdown(socket.SHUT_WR)
        self.lingering.append((time.monotonic() + LINGER_SECONDS, connection))

    def service_actions(self) -> None:
        """Called by serve_forever, twice a second or more often: closes those that were turned away."""
        while self.lingering and (self.lingering[0][0] < time.monotonic() or len(self.lingering) > MAX_CONNECTIONS):
            self.lingering.popleft()[1].close()

    def mark(self, connection: socket.socket, waits: bool) -> None:
        with self.lock:
            if connection in self.connections:
                self.connections[connection] = waits
            self.lock.notify_all()

    def shutdown_request(self, connection: socket.socket) -> None:
        """Closed at once, a client that still sends would never see its answer: what it sends is thrown away first."""
        self.mark(connection, False)
        with suppress(OSError):
            connection.shutdown(socket.SHUT_WR)
            deadline = time.monotonic() + LINGER_SECONDS
            while (left := deadline - time.monotonic()) > 0:
                connection.settimeout(left)
                if not connection.recv(65536):
                    break
        self.close_request(connection)
        with self.lock:
            self.connections.pop(connection, None)

    # -- what handlers and main ask for

    def gauges(self) -> dict[str, float]:
        engine = self.engine
        with engine.lock:
            model, jobs = engine.model, list(engine.jobs)
            numbers = {
                "papilio_batch_capacity": engine.batch,
                "papilio_queue_requests": len(jobs),
                "papilio_queue_steps": sum(job.left for job in jobs),
                "papilio_queue_capacity_steps": min(engine.capacity, engine.rate * self.seconds),
                "papilio_connections": len(self.connections),
                "papilio_worker_up": engine.alive(),
            }
        numbers |= {"papilio_saved_bytes": self.store.bytes} if self.store else {}
        if model:
            key = labelled("papilio_model_info", hash=model.hash, pixels=model.shape[1], precision=model.precision)
            numbers[key] = 1
        return numbers | process_gauges()

    def drain(self) -> None:
        """Finishes what was admitted, as far as DRAIN_SECONDS go, and refuses the rest; then stops listening."""
        end = time.monotonic() + DRAIN_SECONDS
        self.engine.close(DRAIN_SECONDS)
        self.shutdown()
        with self.lock:
            self.lock.wait_for(lambda: not any(self.connections.values()), max(1, end - time.monotonic()))
        self.server_close()


# ---- command line ----------------------------------------------------------------------------------------------------

FLAGS = {
    "what to serve": {
        "--model": (None, Path, "a run, a model folder or a diffusers folder (default: the newest run, or the model in "
                    "the box); SIGHUP loads it anew"),
        "--device": (None, str, "cpu, cuda or mps (default: the fastest there is)"),
        "--precision": (None, tuple(sample.PRECISIONS), "default: bf16 where the hardware has it, else fp32"),
        "--exact": (False, bool, "the same bits as sample.py --exact, whatever else is drawn at the time"),
    },
    "to whom": {
        "--host": ("127.0.0.1", str, "address to listen on; 0.0.0.0 is all of this machine's"),
        "--port": (os.environ.get("PORT", "8000"), sample.whole_number(0, 65535), "$PORT, or 8000; 0 takes a free one"),
        "--allow-host": (None, str, "a name to answer to, beside localhost; may be repeated", {"action": "append"}),
        "--token-file": (None, Path, "tokens, one a line, of which a request must bring one (default: $PAPILIO_TOKEN)"),
    },
    "how much": {
        "--batch-size": (8, sample.whole_number(1, 1024), "images that share a call of the network, but with --exact"),
        "--max-cost": (6400, sample.whole_number(1), "images x steps that one request may ask for"),
        "--queue": (20_000, sample.whole_number(1), "images x steps that may wait; more are refused for a while"),
        "--timeout": (120.0, sample.real(0.1, 10**6), "seconds after which a request is given up"),
        "--save": (None, Path, "folder to keep what was drawn in, for monitor.py (default: nothing is kept)"),
        "--save-limit": (1000, sample.whole_number(1), "megabytes of it; above them the oldest day is deleted"),
    },
}  # fmt: skip


def read_tokens(file: Path | None) -> tuple[bytes, ...]:
    """Of the file, or else of $PAPILIO_TOKEN; none where neither is there. InputError for what is no token."""
    source, text = "$PAPILIO_TOKEN", os.environ.get("PAPILIO_TOKEN")
    if file:
        with data.disk_errors(f"read --token-file {file}"):
            source, text = f"--token-file {file}", file.read_text(encoding="utf-8", errors="replace")
    tokens = [line.strip() for line in (text or "").splitlines() if line.strip()]
    if text is not None and not (tokens and all(re.fullmatch(r"[!-~]{8,}", token) for token in tokens)):
        raise InputError(f"{source}: a token is one line of at least 8 visible ASCII characters")
    return tuple(token.encode() for token in tokens)


def serve(args: argparse.Namespace) -> None:
    if sys.platform == "win32":
        raise InputError("the server needs Linux or macOS; on Windows it runs inside of WSL or a container")
    tokens = read_tokens(args.token_file)
    device, metrics = sample.choose_device(args.device), Metrics()
    source = args.model, device, sample.choose_precision(device, args.precision)
    store = sample.Store(args.save, args.save_limit * 10**6) if args.save else None
    engine = Engine(args.batch_size, max(args.queue, args.max_cost), args.exact, metrics)
    server = Server((args.host, args.port), engine, hosts=args.allow_host or (), tokens=tokens, store=store,
                    seconds=args.timeout, max_cost=args.max_cost)  # fmt: skip
    received, wakeup = socket.socketpair()
    wakeup.setblocking(False)
    signal.set_wakeup_fd(wakeup.fileno())  # gets the number of each signal, whichever thread is interrupted
    before = {n: signal.signal(n, lambda *_: None) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    threading.Thread(target=server.serve_forever, args=(0.1,), daemon=True).start()
    try:
        engine.load(*source)
    except InputError:
        server.drain()
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(-1)
        received.close()
        wakeup.close()
        raise
    engine.thread.start()
    if args.host not in (*LOOPBACK, "::1") and not tokens:
        log("WARNING: whoever reaches this address may draw; --token-file asks for a token")
    log("listening on http://{}:{}".format(*server.server_address[:2]))
    while received.recv(1)[0] == signal.SIGHUP:
        threading.Thread(target=engine.reload, args=source, daemon=True).start()
    log("shutting down")
    for number in (signal.SIGTERM, signal.SIGINT):  # asked twice: at once
        signal.signal(number, signal.SIG_DFL)
    server.drain()
    os._exit(0)  # the interpreter's own end aborts where a thread is still in a step, or writes a line


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("server.py", allow_abbrev=False, description="Draw images over HTTP.")
    sample.add_flags(parser, FLAGS)
    args = parser.parse_args(argv)
    sample.set_threads()
    return data.exit_status(lambda: serve(args))


DEFAULTS = sample.parse_arguments([])  # of what a request does not say
NAMES = {"n_images": "n", "class": "classes"}  # of a request's parameters among those of sample.py

if __name__ == "__main__":
    sys.exit(main())
