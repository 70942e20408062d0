"""A model folder in, images over HTTP out.

    python server.py                                      the newest run or the default model, on 127.0.0.1:8000
    python server.py --save served                        keeps the images, in a folder with a size limit
    PORT=80 python server.py --host 0.0.0.0 --allow-host butterflies.example --token-file tokens

    curl -o butterflies.png 'http://127.0.0.1:8000/generate_sample/?n_images=4&seed=7'

One thread, the engine's, calls the network. Each turn is one step of up to `--batch-size` images, which may belong to
different requests and be at different steps. Each connection has a thread that reads, waits and writes. `http.server`
provides sockets, threads and the writing of responses. Requests are read and checked here, by RFC 9110 and 9112 without
the leniencies that `http.server` allows.
"""

import argparse
import base64
import hashlib
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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch

import data
import sample
from data import Flag, InputError, real, whole

MAX_HEAD = 32 * 1024  # bytes of the request line and the header fields
MAX_TARGET = 8 * 1024  # bytes
MAX_HEADERS = 100
MAX_CONNECTIONS = 256
MAX_THREADS = 2 * MAX_CONNECTIONS  # above it a rejected connection is closed at once
MAX_JOBS = 224  # the other connections are for probes and refusals
MAX_IMAGES = 64  # of one request
MAX_RETRY = 120  # seconds in Retry-After
HEAD_SECONDS = 10.0  # to receive a request
WRITE_SECONDS = 10.0  # to send a response, in addition to its length at SLOWEST_READER
SLOWEST_READER = 64 * 1024  # bytes a second
LINGER_SECONDS = 2.0  # to read what a client still sends after its response
HEARTBEAT_SECONDS = 10.0  # between signs of life in a stream
DRAIN_SECONDS = 6.0  # to finish what was admitted, plus at most 2 s for the rest: container hosts kill after 10 s
LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
ERROR_FIELDS = ("message", "type", "param", "code", "request_id")
METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT", "QUERY")
HTTP_NAMES = {"n": "n_images", "classes": "class"}  # names of parameters that differ from fields of a DrawRequest


class Refusal(Exception):
    """A response that is an error: status, one sentence that repeats nothing of the request, parameter, headers."""

    def __init__(self, status: int, message: str, param: str | None = None, headers: dict | None = None):
        super().__init__(message)
        self.status, self.message, self.param, self.headers = status, message, param, headers or {}


# Functions, because an exception must be new each time: it keeps the frames that it passed through.
shutting_down = partial(Refusal, 503, "this server is shutting down; ask another one", headers={"Retry-After": "5"})
drawing_failed = partial(Refusal, 500, "the images could not be drawn")
client_left = partial(Refusal, 408, "the client has left")
too_late = partial(Refusal, 504, "the images were not finished in time; ask for fewer, or later")


# ---- reading a request -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Request:
    method: str
    path: str  # not decoded
    query: str  # not decoded
    host: str  # lower case, without the port
    headers: dict  # by lower-case name; repeated fields are joined with a comma (RFC 9110, 5.3)


def read_head(connection: socket.socket, seconds: float = HEAD_SECONDS) -> bytes:
    """Reads up to the first empty line, which ends the head of a request.

    Raises Refusal as soon as the bytes cannot become a request, are too many or too late, and OSError if the client
    leaves.
    """
    deadline, head, searched = time.monotonic() + seconds, b"", 0
    while (end := head.find(b"\r\n\r\n", searched)) < 0 and len(head) <= MAX_HEAD:
        if head and not head[:1].isalpha() or BARE_LINE_END.search(head, searched):
            raise Refusal(400, "this is not an HTTP request")
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            raise Refusal(408, f"the head of the request took longer than {seconds:g} seconds")
        connection.settimeout(remaining)
        with suppress(TimeoutError):
            part = connection.recv(65536)
            if not part:
                raise ConnectionResetError("the client has left")
            searched = max(0, len(head) - 3)
            head += part
    if 0 <= end <= MAX_HEAD:
        return head[:end]
    if b"\r\n" in head[:MAX_TARGET]:
        raise Refusal(431, f"the head of the request is longer than {MAX_HEAD} bytes")
    raise Refusal(414, f"the target of the request is longer than {MAX_TARGET} bytes")


BARE_LINE_END = re.compile(
    rb"(?<!\r)\n|\r[^\n]"
)  # RFC 9112, 2.2: a lone LF need not be accepted, a lone CR must not be
TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]"  # RFC 9110, 5.6.2
VERSION = re.compile(rb"HTTP/\d\.\d")  # RFC 9112, 2.3
# RFC 9112, 5: no space before the colon, no folded lines; visible characters, spaces and tabs. It can match in one way
# only, so that matching takes linear time.
FIELD = re.compile(rb"(" + TOKEN + rb"+):([\t\x20-\x7e\x80-\xff]*)")
CHARACTERS = r"(?:[\w.~!$&'()*+,;=:@/-]|%[0-9A-Fa-f]{2})*"  # RFC 3986, 3.3 and 3.4
TARGET = re.compile(
    rf"(?:http://([^/?#]*))?(/{CHARACTERS})(?:\?({CHARACTERS}))?", re.ASCII
)  # RFC 9112, 3.2.1 and 3.2.2
HOST = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::[0-9]{0,5})?", re.ASCII)  # RFC 3986, 3.2.2 and 3.2.3
CONTENT_LENGTH = re.compile(r"[0-9]{1,19}")  # RFC 9112, 6.2


def parse_head(head: bytes) -> Request:
    """Parses the head of a request. Raises Refusal if it is malformed or announces a body."""
    line, *lines = head.split(b"\r\n")
    words = line.split(b" ")  # RFC 9112, 3: single spaces
    if len(words) != 3 or not re.fullmatch(TOKEN + rb"{1,32}", words[0]) or not VERSION.fullmatch(words[2]):
        raise Refusal(400, "the first line must be a method, a target and HTTP/1.1")
    method, target, version = (word.decode("latin-1") for word in words)
    if version not in ("HTTP/1.0", "HTTP/1.1"):
        raise Refusal(505, "only HTTP/1.1 and 1.0 are implemented")
    if method not in METHODS:
        raise Refusal(501, "this method is not known")
    if len(target) > MAX_TARGET:
        raise Refusal(414, f"the target of the request is longer than {MAX_TARGET} bytes")
    parts = TARGET.fullmatch(target)
    if not parts:
        raise Refusal(400, "the target must be a path that begins with /, with all other characters percent-encoded")
    authority, path, query = parts.groups()
    headers = parse_fields(lines)
    check_no_body(headers)
    if version == "HTTP/1.0":
        headers.setdefault("host", "unnamed")
    named = headers.get("host", "").lower()
    if authority is None:  # RFC 9112, 3.2.2: the authority of an absolute target replaces Host
        authority = named
    host = HOST.fullmatch(authority.lower())
    if not host or not HOST.fullmatch(named):  # RFC 9112, 3.2
        raise Refusal(400, "there must be one Host header, with the name of this server")
    return Request(method, path, query or "", host[1], headers)


def parse_fields(lines: list[bytes]) -> dict:
    """Parses header fields to {lower-case name: value}. Raises Refusal."""
    if len(lines) > MAX_HEADERS:
        raise Refusal(431, f"there are more than {MAX_HEADERS} headers")
    headers = {}
    for line in lines:
        field = FIELD.fullmatch(line)
        if not field:
            raise Refusal(400, "a header is malformed")
        name, value = field[1].decode().lower(), field[2].strip(b" \t").decode("latin-1")
        if name in headers:
            value = f"{headers[name]}, {value}"
        headers[name] = value
    return headers


def check_no_body(headers: dict) -> None:
    """Raises Refusal for malformed framing (RFC 9112, 6.1 to 6.3), for a body and for an expectation."""
    length = headers.get("content-length", "0")
    both = "content-length" in headers and "transfer-encoding" in headers
    if both or not CONTENT_LENGTH.fullmatch(length):
        raise Refusal(400, "Content-Length is malformed, or stands beside Transfer-Encoding")
    if "expect" in headers:
        raise Refusal(417, "expectations are not implemented")
    if int(length) or "transfer-encoding" in headers:
        raise Refusal(413, "requests have no body here; leave it out")


def parse_query(query: str, flags: dict) -> dict:
    """Parses a query by the flags of its parameters. Returns {field of a DrawRequest: value}.

    Raises Refusal, which names the parameter.
    """
    values = {}
    pairs = query.split("&") if query else []
    for pair in pairs:
        name, _, text = pair.partition("=")
        try:
            name, text = (urllib.parse.unquote_plus(part, errors="strict") for part in (name, text))
        except UnicodeDecodeError as error:
            raise Refusal(400, "the query is not UTF-8") from error
        flag = flags.get(name)
        if flag is None:
            raise Refusal(400, f"there is an unknown parameter; the known ones are: {', '.join(flags)}")
        if flag.dest in values:
            raise Refusal(400, f"{name} is given twice", name)
        try:
            values[flag.dest] = flag.parse(text)
        except argparse.ArgumentTypeError as error:
            raise Refusal(400, f"{name} must be {flag.wanted}", name) from error
    return values


def parameters(model: sample.Model) -> dict:
    """Returns the parameters of a request: sample.DRAW_FLAGS by name, as far as this model and server allow them."""
    config = model.network.config
    changes = {
        "n": {"type": whole(1, MAX_IMAGES), "default": 1},
        "seed": {"help": "seed of the first image; image i has seed + i (default: chosen at random)"},
        "steps": {"type": whole(1, model.schedule.num_train_timesteps)},
        "guidance": {"type": real(0, 20)},
        "classes": {
            "type": tuple(sample.class_name(config, label) for label in range(config.class_count)),
            "help": "class of the images (default: the classes in turn, by seed)",
        },
    }
    flags = {flag.dest: replace(flag, **changes.get(flag.dest, {})) for flag in sample.DRAW_FLAGS}
    if config.null_label is None:
        del flags["guidance"]
    if not config.class_count:
        del flags["classes"]
    return {HTTP_NAMES.get(name, name): flag for name, flag in flags.items()}


def schema(flag: Flag) -> dict:
    """Returns the JSON schema of a parameter, for /openapi.json."""
    found = {"description": flag.help}
    if flag.default is not None:
        found["default"] = flag.default
    if isinstance(flag.type, tuple):
        return found | {"type": "string", "enum": list(flag.type)}
    kind = {int: "integer", float: "number"}[flag.type.kind]
    return found | {"type": kind, "minimum": flag.type.least, "maximum": flag.type.most}


# ---- the engine ------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Job:
    """A request for images, from its admission to its end. The engine sets `news` at each change, `done` at the end."""

    model: sample.Model
    request: sample.DrawRequest
    drawings: list[sample.Drawing]
    facts: dict
    connection: socket.socket | None = None
    client: str = ""  # its address and query
    deadline: float = math.inf  # of time.monotonic()
    arrived: float = field(default_factory=time.monotonic)
    spent: int = 0  # predictions made, plus those that the job missed before it came
    drained: int = 0  # bytes that the client sent after the request
    error: Refusal | None = None
    news: threading.Event = field(default_factory=threading.Event)
    done: threading.Event = field(default_factory=threading.Event)

    @property
    def weight(self) -> int:
        """Predictions for a step of one image."""
        return self.drawings[0].weight

    @property
    def work(self) -> int:
        """Predictions that remain to be made."""
        return sum(drawing.work for drawing in self.drawings)

    def gone(self) -> bool:
        """Returns whether the client has left; called when its connection is readable.

        Bytes after the request are discarded, because they would hide the end of the connection. A client that keeps
        sending counts as gone.
        """
        with suppress(OSError):
            part = self.connection.recv(2**20)
            self.drained += len(part)
            return not part or self.drained > 2**20
        return True


Members = list[tuple[Job, sample.Drawing]]


class Engine:
    """Owns the network: admits jobs, and advances them by one step a turn in a thread of its own."""

    QUANTUM = 16  # predictions that a job may have in each round

    def __init__(self, batch: int, capacity: int, exact: bool, metrics: "Metrics"):
        self.batch = sample.EXACT_BATCH if exact else batch
        self.capacity, self.exact, self.metrics = capacity, exact, metrics
        self.lock, self.loading = threading.Condition(), threading.Lock()
        self.jobs: list[Job] = []
        self.promises: list[tuple] = []  # (time, work, client): when a refused client may come back
        self.model: sample.Model | None = None  # of new jobs
        self.rate = 100.0  # predictions a second in full batches
        self.closing = False
        self.thread = threading.Thread(target=self.loop, name="engine", daemon=True)

    def load(self, named: Path | None, device: torch.device, precision: str) -> None:
        """Reads the named model or the newest one and tries it; new jobs get it from now on.

        Raises InputError if it does not work. The current model stays then.
        """
        path, which = sample.find_model(named)
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
        log(f"{which}: {model.shape[1]} px, {device.type}, {precision}, model {model.hash[:12]}")

    def reload(self, *source) -> None:
        """Calls `load`. An error is logged and counted, and the current model stays."""
        with self.loading:  # one after the other, so that the last one asked for is the one that stays
            try:
                self.load(*source)
            except Exception as error:
                self.metrics.add("papilio_model_loads_total", result="refused")
                log(f"the model was not loaded, the current one stays: {error}")

    def submit(self, job: Job) -> None:
        """Admits a job. Raises Refusal if it cannot be taken.

        503 while shutting down; 400 if the job could not be finished in time even alone; otherwise 429 with the seconds
        after which there will be room. That room is reserved until two seconds later, as far as it would not become
        free by then, and at most half of the queue, because some of the refused clients do not come back.
        """
        with self.lock:
            if self.closing or not self.alive():
                raise shutting_down()
            now = time.monotonic()
            possible = self.rate * (job.deadline - job.arrived)  # work that can be finished in time
            if job.work > possible:
                raise Refusal(400, "this takes longer than is allowed here; ask for fewer images or steps", "n_images")
            room = min(self.capacity, possible)
            least = room / MAX_JOBS  # each job takes at least this much of it
            cost = max(job.work, least)
            costs = sum(max(other.work, least) for other in self.jobs)
            excess = costs + cost - room
            speed = self.rate * costs / max(1, sum(other.work for other in self.jobs))
            self.promises = sorted(promise for promise in self.promises if promise[0] > now - 2)
            kept = next((promise for promise in self.promises if promise[0] <= now and promise[2] == job.client), None)
            owed, missing = self.reserved(now, speed)
            if kept:
                missing = 0
            if self.jobs and excess + min(missing, room / 2) > 0:
                seconds = min(max(0, math.ceil(1.5 * (excess + owed) / speed)) + 1, MAX_RETRY)
                if seconds < MAX_RETRY:
                    self.promises.append((now + seconds, cost, job.client))
                raise Refusal(429, "the queue is full", headers={"Retry-After": str(seconds)})
            if kept:
                self.promises.remove(kept)
            job.spent = self.newest_round() * self.QUANTUM
            self.jobs.append(job)
            self.lock.notify_all()

    def reserved(self, now: float, speed: float) -> tuple[float, float]:
        """Returns the work that was promised, and how much of it will not become free by the promised times."""
        owed = missing = 0.0
        for due, work, _ in self.promises:
            owed += work
            missing = max(missing, 1.5 * owed - speed * max(0, due - now))  # 1.5: rates vary
        return owed, missing

    def end(self, job: Job, error: Refusal | None = None) -> None:
        """Ends a job, which is finished unless there is an error. Its connection is not watched any more."""
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
            self.closing = True
            self.lock.notify_all()
            self.lock.wait_for(lambda: not self.jobs, seconds)
            for job in list(self.jobs):
                self.end(job, shutting_down())
        if self.thread.ident:  # do not exit in the middle of a step
            self.thread.join(0.5)

    def alive(self) -> bool:
        return self.thread.is_alive() or self.thread.ident is None

    @torch.inference_mode()
    def loop(self) -> None:
        try:
            while self.jobs or not self.closing:
                with self.lock:
                    self.lock.wait_for(lambda: self.jobs or self.closing)
                    self.drop()
                    chosen = self.choose()
                try:
                    if chosen:
                        self.turn(chosen)
                except Exception:  # for example out of memory: this batch is lost, the other jobs continue
                    log(traceback.format_exc())
                    self.metrics.add("papilio_engine_errors_total")
                    for job in {job for job, _ in chosen}:
                        self.end(job, drawing_failed())
        finally:
            for job in list(self.jobs):
                self.end(job, drawing_failed())

    def drop(self) -> None:
        """Ends jobs that are late or whose client has left. The caller holds the lock, which keeps connections open."""
        poll, watched = select.poll(), {job.connection.fileno(): job for job in self.jobs if job.connection}
        for number in watched:
            poll.register(number, select.POLLIN)
        for number, _ in poll.poll(0):
            if watched[number].gone():
                self.end(watched[number], client_left())
        for job in [job for job in self.jobs if job.deadline < time.monotonic()]:
            self.end(job, too_late())

    def choose(self) -> Members:
        """Chooses the images of the next turn: one of each job, again and again, until the batch is full.

        Images that have begun come first. The measure of fairness is predictions: a job that has had its QUANTUM of a
        round waits for the others, and none may save up more than a round (deficit round robin, Shreedhar & Varghese
        1996, for batches).
        """
        for job in self.jobs:
            job.spent = max(job.spent, (self.newest_round() - 1) * self.QUANTUM)
        unfinished = {job: [drawing for drawing in job.drawings if drawing.pixels is None] for job in self.jobs}
        shares, room, chosen = dict.fromkeys(self.jobs, 0), self.batch, []
        while room > 0 and unfinished:
            job = min(unfinished, key=lambda job: (job.spent // self.QUANTUM, shares[job]))
            chosen.append((job, unfinished[job].pop(0)))
            shares[job] += 1
            job.spent += job.weight
            room -= 1 if self.exact else job.weight  # exact calls are padded anyway
            if not unfinished[job]:
                del unfinished[job]
        return chosen

    def newest_round(self) -> int:
        return max((job.spent for job in self.jobs), default=0) // self.QUANTUM

    def turn(self, chosen: Members) -> None:
        """Makes one step of each image.

        Images of one model share a call of the network. Guided ones, which need two predictions each, have their own.
        """
        begin, cpu = time.perf_counter(), time.process_time()
        groups = {}
        for job, drawing in chosen:
            groups.setdefault((job.model, job.weight), []).append((job, drawing))
            if drawing is job.drawings[0] and drawing.step == 0:
                self.metrics.observe("papilio_queue_wait_seconds", time.monotonic() - job.arrived)
        for members in groups.values():
            self.advance(members)
        seconds = time.perf_counter() - begin
        predictions = sum(job.weight for job, _ in chosen)
        if predictions >= self.batch:
            self.rate += 0.1 * (predictions / seconds - self.rate)
        self.metrics.observe("papilio_step_seconds", seconds)
        self.metrics.add("papilio_steps_total", predictions)
        self.metrics.add("papilio_sampling_cpu_seconds_total", time.process_time() - cpu)
        for job in {job for job, _ in chosen}:
            if all(drawing.pixels is not None for drawing in job.drawings):
                self.end(job)
            job.news.set()

    def advance(self, members: Members) -> None:
        """Makes one step of images of one model, in one call of the network; with `exact`, in a full batch."""
        drawings = [drawing for _, drawing in members]
        for drawing in drawings:
            if drawing.step == 0:
                drawing.begin(members[0][0].model)
        sample.advance(members[0][0].model, drawings, self.batch if self.exact else len(drawings))
        self.metrics.add("papilio_images_total", sum(drawing.pixels is not None for drawing in drawings))


# ---- telemetry -------------------------------------------------------------------------------------------------------

# name: help. Names follow the conventions of Prometheus, which give the type: see metric_type.
METRICS = {
    "papilio_request_seconds": "Time from a request's head to the end of its response, by route and status.",
    "papilio_queue_wait_seconds": "Time from a request's admission to its first step.",
    "papilio_step_seconds": "Time of a turn of the engine: one step of a batch of images.",
    "papilio_steps_total": "Image-steps made, guided ones counted twice; turns and capacity tell how full batches are.",
    "papilio_images_total": "Images finished.",
    "papilio_sampling_cpu_seconds_total": "CPU time of the process while the network ran.",
    "papilio_departures_total": "Clients that left before their images were finished.",
    "papilio_engine_errors_total": "Turns that failed.",
    "papilio_model_loads_total": "Models loaded, by result.",
    "papilio_save_errors_total": "Images that could not be saved.",
    "papilio_saved_bytes": "Bytes in the folder of served images.",
    "papilio_batch_capacity": "Image-steps that fit in a turn.",
    "papilio_queue_requests": "Requests that are admitted and not finished.",
    "papilio_queue_steps": "Image-steps that these still need.",
    "papilio_queue_capacity_steps": "Image-steps that may wait, or can be finished in time.",
    "papilio_connections": "Open connections.",
    "papilio_turned_away_total": "Connections refused because all others had a request in flight.",
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
    return "histogram" if name.endswith("_seconds") else "gauge"


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
        lines = []
        for name, sentence in METRICS.items():
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


def log(text: str) -> None:
    """Writes a line to stderr: the time and the last 1,000 characters of a text, without control characters."""
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    with suppress(OSError):  # nobody may be reading
        print(now, re.sub(r"[^ -~]+", " ", text)[-1000:], file=sys.stderr, flush=True)


# ---- HTTP ------------------------------------------------------------------------------------------------------------


class Handler(BaseHTTPRequestHandler):
    protocol_version = request_version = "HTTP/1.1"
    requestline, disable_nagle_algorithm, server_version, sys_version, head_only = "", True, "papilio", "", False
    server: "Server"

    def log_message(self, *_) -> None:
        """Replaces the log of http.server."""

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
        except OSError:  # the client has left, or does not read
            self.status = self.status or 499
        except Exception:
            log(traceback.format_exc())
            if not self.status:
                with suppress(OSError):
                    self.refuse(Refusal(500, "this is an error in the server"))
        seconds = time.perf_counter() - begin
        if self.route != "none" or self.status != 499:  # a connection without a request is not logged
            self.server.metrics.observe("papilio_request_seconds", seconds, route=self.route, status=str(self.status))
            log(f"{self.id} {self.route} {self.status} {1000 * seconds:.0f} ms")

    def answer(self, request: Request) -> None:
        self.head_only = request.method == "HEAD"
        route = request.path
        if route not in ROUTES:
            route += "/"
        if route not in ROUTES:
            raise Refusal(404, f"there is nothing at this path; there is: {', '.join(ROUTES)}")
        self.route = route
        if request.method not in ("GET", "HEAD"):
            raise Refusal(405, "only GET and HEAD are implemented", headers={"Allow": "GET, HEAD"})
        if route not in PROBES:
            self.check_access(request)
        respond, _ = ROUTES[route]
        respond(self, request)

    def check_access(self, request: Request) -> None:
        """Raises Refusal for foreign host names (DNS rebinding), pages of other sites (CSRF) and a missing token."""
        hosts, tokens = self.server.hosts, self.server.tokens
        if request.host not in hosts:
            raise Refusal(421, "this server does not have that name; --allow-host tells it its public names")
        origin = re.fullmatch(r"https?://(.*)", request.headers.get("origin", f"http://{request.host}").lower())
        origin_host = HOST.fullmatch(origin[1]) if origin else None
        cross_site = self.route in GENERATING and request.headers.get("sec-fetch-site") == "cross-site"
        if cross_site or not origin_host or origin_host[1] not in hosts:
            raise Refusal(403, "pages of other sites may not use this server")
        scheme, _, given = request.headers.get("authorization", "").encode("latin-1").partition(b" ")
        matches = [hmac.compare_digest(given, token) for token in tokens]  # all of them, for constant time
        if tokens and not (scheme.lower() == b"bearer" and any(matches)):
            raise Refusal(401, "a token is needed", headers={"WWW-Authenticate": "Bearer"})

    def respond(self, status: int, body: bytes | None, kind: str, headers: dict | None = None) -> None:
        """Sends a response; without a body only its head. Raises OSError if the client does not take it in time."""
        self.status = status
        self.connection.settimeout(WRITE_SECONDS + len(body or b"") / SLOWEST_READER)
        self.send_response(status)
        fields = {
            "Content-Type": kind,
            "Connection": "close",
            "X-Content-Type-Options": "nosniff",
            "Cache-Control": "no-store",
            "X-Request-Id": self.id,
            **(headers or {}),
        }
        if body is not None:
            fields["Content-Length"] = str(len(body))
        for name, value in fields.items():
            if re.search(r"[^ -~]", value):
                raise ValueError(f"the header {name} has characters that a header may not have")
            self.send_header(name, value)
        self.end_headers()
        if body and not self.head_only:
            self.wfile.write(body)

    def refuse(self, refusal: Refusal) -> None:
        self.respond(refusal.status, self.error_body(refusal), "application/json", refusal.headers)

    def error_body(self, refusal: Refusal) -> bytes:
        kind = "server_error" if refusal.status >= 500 else "invalid_request"
        code = re.sub(r"\W", "_", HTTPStatus(refusal.status).phrase.lower())
        error = dict(zip(ERROR_FIELDS, (refusal.message, kind, refusal.param, code, self.id), strict=True))
        return json.dumps({"error": error}).encode() + b"\n"

    # -- routes

    def get_health(self, request: Request) -> None:
        """Whether the process answers and its engine is alive; if not, restart it."""
        self.report(self.engine.alive() or self.engine.closing)

    def get_ready(self, request: Request) -> None:
        """Whether requests are taken: a model is loaded, the engine is alive, and the server is not shutting down."""
        engine = self.engine
        self.report(engine.model is not None and engine.alive() and not engine.closing)

    def report(self, good: bool) -> None:
        status, text = (200, b"ok\n") if good else (503, b"no\n")
        self.respond(status, text, "text/plain")

    def get_metrics(self, request: Request) -> None:
        """Metrics in the text format of Prometheus."""
        page = self.server.metrics.page(self.server.gauges()).encode()
        self.respond(200, page, "text/plain; version=0.0.4; charset=utf-8")

    def get_openapi(self, request: Request) -> None:
        """This document."""
        self.respond(200, json.dumps(openapi(self.model())).encode(), "application/json")

    def get_sample(self, request: Request) -> None:
        """Draws images: a PNG, as a grid if there are several."""
        job = self.new_job(request)
        headers = job_headers(job)
        if "seed" in urllib.parse.parse_qs(request.query):  # the same request gives the same picture
            tag = f'"{hashlib.sha256(json.dumps(job.facts).encode()).hexdigest()[:32]}"'
            weak = "" if self.engine.exact else "W/"  # bits depend on the batch, except with --exact
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
        self.save_images(job)

    def get_stream(self, request: Request) -> None:
        """Draws images and reports progress as server-sent events: queued, step (with the newest estimate of an image),
        image (finished), error."""
        job = self.new_job(request)
        for drawing in job.drawings:
            drawing.watched = True
        if self.head_only:
            return self.respond(200, None, "text/event-stream", job_headers(job))
        with self.submitted(job):
            self.respond(200, None, "text/event-stream", job_headers(job))
            self.send("queued", {"request_id": self.id, "images": len(job.drawings), "steps": job.facts["steps"]})
            unfinished = dict(enumerate(job.drawings))
            while unfinished and not job.error and (remaining := job.deadline - time.monotonic()) > 0:
                if not job.news.wait(min(remaining, HEARTBEAT_SECONDS)):
                    self.send_heartbeat()
                job.news.clear()
                for k, drawing in list(unfinished.items()):
                    if time.monotonic() < job.deadline and self.send_progress(job, k, drawing):
                        del unfinished[k]
        if not unfinished:
            return self.save_images(job)
        error = job.error or too_late()
        self.status = error.status
        self.send("error", json.loads(self.error_body(error)))

    def send_progress(self, job: Job, k: int, drawing: sample.Drawing) -> bool:
        """Sends image k, or its newest preview if there is one. Returns whether the image is finished."""
        newest, drawing.preview = drawing.preview, None
        finished = drawing.pixels is not None
        if finished:
            newest = drawing.step, drawing.pixels
        if newest is None:
            return False
        step, pixels = newest
        picture = data.encode_png(data.grid(pixels[None], padding=0), image_facts(job, drawing))
        content = {"image": k, "seed": drawing.seed, "step": step, "steps": job.facts["steps"]}
        content["png"] = base64.b64encode(picture).decode()
        self.send("image" if finished else "step", content)
        return finished

    def send(self, event: str, content: dict) -> None:
        """Sends one event. Raises OSError if the client does not take it in time."""
        self.connection.settimeout(WRITE_SECONDS)
        self.wfile.write(f"event: {event}\ndata: {json.dumps(content)}\n\n".encode())

    def send_heartbeat(self) -> None:
        self.connection.settimeout(WRITE_SECONDS)
        self.wfile.write(b": still here\n\n")

    # -- jobs

    @property
    def engine(self) -> Engine:
        return self.server.engine

    def model(self) -> sample.Model:
        if self.engine.model is None:
            raise Refusal(503, "the model is still being loaded", headers={"Retry-After": "2"})
        return self.engine.model

    def new_job(self, request: Request) -> Job:
        """Turns a query into a job. Raises Refusal."""
        model = self.model()
        fields = {flag.dest: flag.default for flag in sample.DRAW_FLAGS}
        fields |= {"n": 1, "seed": secrets.randbelow(2**31)}
        wanted = sample.DrawRequest(**fields | parse_query(request.query, parameters(model)))
        try:
            table = wanted.table(model.schedule)
        except InputError as error:  # for example an offset that goes beyond the last timestep
            raise Refusal(400, str(error), "eta" if wanted.eta else "steps") from error
        images = wanted.images(model.network.config)
        facts = wanted.facts(model, len(table)) | sample.grid_facts(model.network.config, images)
        drawings = [sample.Drawing(seed, label, table, wanted.guidance) for label, seed in images]
        job = Job(model, wanted, drawings, facts, client=f"{self.client_address[0]} {request.query}")
        if job.work > self.server.max_cost:
            most = f"images x steps may be at most {self.server.max_cost}; guidance counts twice"
            raise Refusal(400, most, "n_images")
        return job

    @contextmanager
    def submitted(self, job: Job) -> Iterator[None]:
        """Gives the job to the engine and ends it afterwards, whatever happens."""
        job.connection, job.deadline = self.connection, job.arrived + self.server.seconds
        self.engine.submit(job)
        try:
            yield
        except OSError:
            self.engine.end(job, client_left())
            raise
        finally:
            self.engine.end(job, too_late())

    def save_images(self, job: Job) -> None:
        """Saves the images, with --save. A request does not fail because the disk does."""
        if self.server.store:
            images = [(drawing.pixels, image_facts(job, drawing)) for drawing in job.drawings]
            for error in self.server.store.save(self.id, images):
                self.server.metrics.add("papilio_save_errors_total")
                log(f"not saved: {error}")


def job_headers(job: Job) -> dict:
    return {"X-Seed": str(job.request.seed), "X-Model-Hash": job.model.hash}


def image_facts(job: Job, drawing: sample.Drawing) -> dict:
    facts = dict(job.facts)
    if drawing.label is not None:
        facts["class"] = sample.class_name(job.model.network.config, drawing.label)
    return facts | {"seed": drawing.seed}


# path: (method that responds, whose docstring describes it; media type)
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
PROBES = ("/healthz", "/health", "/readyz", "/ready")  # answered under any host name, without a token


def openapi(model: sample.Model) -> dict:
    """Returns the OpenAPI document, from the tables of routes and parameters."""
    query = [{"name": name, "in": "query", "schema": schema(flag)} for name, flag in parameters(model).items()]
    properties = dict.fromkeys(ERROR_FIELDS, {"type": ["string", "null"]})
    error = {"type": "object", "required": list(ERROR_FIELDS), "properties": properties}
    error = {"schema": {"type": "object", "required": ["error"], "properties": {"error": error}}}
    paths = {}
    for path, (respond, kind) in ROUTES.items():
        responses = {
            "200": {"description": "success", "content": {kind: {}}},
            "default": {"description": "an error", "content": {"application/json": error, "text/plain": {}}},
        }
        operation = {"summary": " ".join(respond.__doc__.split()), "responses": responses}
        if path in GENERATING:
            responses["304"] = {"description": "the client has this picture already"}
            operation["parameters"] = query
        paths[path] = {"get": operation}
    return {"openapi": "3.1.0", "info": {"title": "Papilio", "version": model.hash[:12]}, "paths": paths}


BUSY = (
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: 5\r\nConnection: close\r\n\r\n"
    b'{"error": {"message": "all connections are in use", "type": "server_error", "param": null, "code": '
    b'"service_unavailable", "request_id": null}}\n'
)


class Server(ThreadingHTTPServer):
    """Sockets and threads, within limits, and what the handlers share.

    hosts     names that it answers to, besides those of the loopback interface
    tokens    bytes, of which a request must bring one; if there are none, everyone may ask
    store     a data.ServedImages, or None
    seconds   time limit of a request, including the queue
    max_cost  image-steps that a request may ask for
    """

    daemon_threads, request_queue_size, allow_reuse_address = True, 128, True

    def __init__(self, address, engine: Engine, *, hosts=(), tokens=(), store=None, seconds=120.0, max_cost=6400):
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self.hosts = {*LOOPBACK, *(host_name(name) for name in (address[0], *hosts))}
        self.engine, self.tokens, self.metrics, self.store = engine, tokens, engine.metrics, store
        self.seconds, self.max_cost = seconds, max_cost
        self.lock = threading.Condition()
        self.connections: dict = {}  # oldest first; whether a request is in flight
        with data.disk_errors(f"listen on {address[0]} port {address[1]}", "choose another --host or --port"):
            super().__init__(address, Handler)

    server_bind = socketserver.TCPServer.server_bind  # that of http.server looks up this machine's name

    # -- connections

    def process_request(self, connection: socket.socket, address) -> None:
        """Starts a thread for a connection.

        At MAX_CONNECTIONS, closes the oldest connection with no request in flight; if there is none, rejects this one.
        """
        with self.lock:
            full = len(self.connections) >= MAX_CONNECTIONS
            idle = next((other for other, in_flight in self.connections.items() if not in_flight), None)
            if full and idle:
                del self.connections[idle]
                with suppress(OSError):
                    idle.shutdown(socket.SHUT_RDWR)
            if not full or idle:
                self.connections[connection] = False
        if not full or idle:
            return super().process_request(connection, address)
        self.metrics.add("papilio_turned_away_total")
        with suppress(OSError):
            connection.setblocking(False)
            connection.send(BUSY)
        if threading.active_count() < MAX_THREADS:
            threading.Thread(target=self.shutdown_request, args=(connection,), daemon=True).start()
        else:
            connection.close()

    def mark(self, connection: socket.socket, in_flight: bool) -> None:
        with self.lock:
            if connection in self.connections:
                self.connections[connection] = in_flight
            self.lock.notify_all()

    def shutdown_request(self, connection: socket.socket) -> None:
        """Closes a connection after reading what the client still sends: otherwise it may never see the response."""
        self.mark(connection, False)
        with suppress(OSError):
            connection.shutdown(socket.SHUT_WR)
            deadline = time.monotonic() + LINGER_SECONDS
            while (remaining := deadline - time.monotonic()) > 0:
                connection.settimeout(remaining)
                if not connection.recv(65536):
                    break
        self.close_request(connection)
        with self.lock:
            self.connections.pop(connection, None)

    # -- what handlers and main ask for

    def gauges(self) -> dict:
        engine = self.engine
        with engine.lock:
            model, jobs = engine.model, list(engine.jobs)
            numbers = {
                "papilio_batch_capacity": engine.batch,
                "papilio_queue_requests": len(jobs),
                "papilio_queue_steps": sum(job.work for job in jobs),
                "papilio_queue_capacity_steps": min(engine.capacity, engine.rate * self.seconds),
                "papilio_connections": len(self.connections),
                "papilio_worker_up": engine.alive(),
            }
        if self.store:
            numbers["papilio_saved_bytes"] = self.store.bytes
        if model:
            key = labelled("papilio_model_info", hash=model.hash, pixels=model.shape[1], precision=model.precision)
            numbers[key] = 1
        return numbers | process_gauges()

    def drain(self) -> None:
        """Finishes what can be finished in DRAIN_SECONDS, refuses the rest, and stops listening."""
        end = time.monotonic() + DRAIN_SECONDS
        self.engine.close(DRAIN_SECONDS)
        self.shutdown()
        with self.lock:
            self.lock.wait_for(lambda: not any(self.connections.values()), max(1, end - time.monotonic()))
        self.server_close()


# ---- command line ----------------------------------------------------------------------------------------------------

SERVER_FLAGS = {
    "model": [
        sample.MODEL_FLAG,
        *sample.DEVICE_FLAGS,
        Flag("--exact", None, bool, "the same bits as sample.py --exact, whatever is drawn at the same time"),
    ],
    "access": [
        Flag("--host", "127.0.0.1", str, "address to listen on; 0.0.0.0 means all addresses of this machine"),
        Flag("--port", os.environ.get("PORT", "8000"), whole(0, 65535), "port to listen on, from $PORT if that is set; "
             "0 takes a free one"),
        Flag("--allow-host", None, str, "host name to answer to, besides localhost; may be repeated",
             {"action": "append"}),
        Flag("--token-file", None, Path, "tokens, one a line, of which a request must bring one (default: "
             "$PAPILIO_TOKEN)"),
    ],
    "limits": [
        Flag("--batch-size", 8, whole(1, 1024), "images per call of the network; --exact has a batch size of its own"),
        Flag("--max-cost", 6400, whole(1), "images x steps that one request may ask for"),
        Flag("--queue", 20_000, whole(1), "images x steps that may wait; further requests get 429"),
        Flag("--timeout", 120.0, real(0.1, 10**6), "seconds after which a request gets 504"),
        Flag("--save", None, Path, "folder to save served images in, for monitor.py (default: none are saved)"),
        Flag("--save-limit", 1000, whole(1), "megabytes in that folder, above which the oldest day is deleted"),
    ],
}  # fmt: skip


def host_name(text: str) -> str:
    """Returns a host name or address in lower case, as a Host header has it. Raises InputError if it is neither."""
    if re.fullmatch(r"[^[]*:.*:.*", text):  # an IPv6 address without brackets
        text = f"[{text}]"
    match = HOST.fullmatch(text.lower())
    if not match:
        raise InputError(f"--host and --allow-host take a host name or an address, not {text!r}")
    return match[1]


def read_tokens(file: Path | None) -> tuple[bytes, ...]:
    """Reads the tokens of a file, or else of $PAPILIO_TOKEN; there may be none. Raises InputError for a bad one."""
    source, content = "$PAPILIO_TOKEN", os.environ.get("PAPILIO_TOKEN", "").encode()
    if file:
        source = f"--token-file {file}"
        with data.disk_errors(f"read {source}"):
            content = file.read_bytes()
    tokens = tuple(line.strip() for line in content.splitlines() if line.strip())
    wanted = file or "PAPILIO_TOKEN" in os.environ
    if wanted and not (tokens and all(re.fullmatch(rb"[!-~]{8,}", token) for token in tokens)):
        raise InputError(f"{source}: a token is one line of at least 8 visible ASCII characters")
    return tokens


def serve(args: argparse.Namespace) -> None:
    if sys.platform == "win32":
        raise InputError("the server needs Linux or macOS; on Windows run it in WSL or a container")
    tokens = read_tokens(args.token_file)
    device, metrics = sample.choose_device(args.device), Metrics()
    source = args.model, device, sample.choose_precision(device, args.precision)
    store = None
    if args.save:
        store = data.ServedImages(args.save, args.save_limit * 10**6)
    engine = Engine(args.batch_size, max(args.queue, args.max_cost), bool(args.exact), metrics)
    server = Server(
        (args.host, args.port),
        engine,
        hosts=args.allow_host or (),
        tokens=tokens,
        store=store,
        seconds=args.timeout,
        max_cost=args.max_cost,
    )
    signals, handlers = [], {}
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        handlers[number] = signal.signal(number, lambda number, frame: signals.append(number))
    threading.Thread(target=server.serve_forever, args=(0.1,), daemon=True).start()
    try:
        engine.load(*source)
    except InputError:
        server.drain()
        for number, handler in handlers.items():
            signal.signal(number, handler)
        raise
    engine.thread.start()
    if args.host not in (*LOOPBACK, "::1") and not tokens:
        log("WARNING: anyone who reaches this address may use it; --token-file asks for a token")
    log("listening on http://{}:{}".format(*server.server_address[:2]))
    while not {signal.SIGTERM, signal.SIGINT} & set(signals):
        if signal.SIGHUP in signals:
            signals.remove(signal.SIGHUP)
            threading.Thread(target=engine.reload, args=source, daemon=True).start()
        time.sleep(0.1)  # polled: a signal that reaches another thread would not wake this one from a longer wait
    log("shutting down")
    for number in (signal.SIGTERM, signal.SIGINT):  # the second time: at once
        signal.signal(number, signal.SIG_DFL)
    server.drain()
    os._exit(0)  # the interpreter's own exit aborts if a thread is still in a step or writes a line


def main(argv: Sequence[str] | None = None) -> int:
    parser = data.Parser("server.py", "Draw images over HTTP.", __doc__)
    data.add_flags(parser, SERVER_FLAGS)
    args = parser.parse_args(argv)
    sample.set_threads()
    return data.exit_status(lambda: serve(args))


if __name__ == "__main__":
    sys.exit(main())
