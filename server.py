"""A model folder in, images over HTTP out.

    python server.py                                      the newest run or the default model, on 127.0.0.1:8000
    python server.py --save served                        keeps the images, in a folder with a size limit
    PORT=80 python server.py --host 0.0.0.0 --allow-host butterflies.example --token-file tokens

    curl -o butterflies.png 'http://127.0.0.1:8000/generate_sample/?n_images=4&seed=7'

One thread, the engine's, calls the network. Each turn is one step of up to `--batch-size` images, which may belong to
different requests and be at different steps. Each connection has a thread that reads, waits and writes. `http.server`
provides sockets, threads and the writing of responses. Requests are parsed here, strictly by RFC 9110 and 9112:
`http.server` is too lenient.
"""

import argparse
import base64
import hashlib
import hmac
import json
import math
import os
import queue
import random
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
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch
from torch import Tensor

import data
import monitor
import sample
from data import Flag, InputError, real, whole

MAX_HEAD = 32 * 1024  # bytes of the request line and the header fields
MAX_TARGET = 8 * 1024  # bytes
MAX_HEADERS = 100
MAX_CONNECTIONS = 256  # fewer if RLIMIT_NOFILE is low
MAX_SAVES = 100  # finished requests whose images wait to be saved
OTHER_FILES = 64  # descriptors for everything that is not a connection
MAX_FAILURES = 20  # calls of the network that fail in a row before the engine gives up
LOAD = 0.6  # of the time limit: admitted jobs take at most this long in all, at the measured rate
AGED = 0.3  # of the time limit: older jobs go first
STUCK_SECONDS, STUCK_STEPS = 60.0, 100  # a step that takes longer, also in steps of usual length, will never end
MAX_IMAGES = 64  # of one request
MAX_RETRY = 120  # seconds in Retry-After
HEAD_SECONDS = 10.0  # to receive a request
WRITE_SECONDS = 10.0  # to send a response, plus its length / SLOWEST_READER
SLOWEST_READER = 64 * 1024  # bytes a second
LINGER_SECONDS = 2.0  # to read what a client still sends after its response
HEARTBEAT_SECONDS = 10.0  # between signs of life in a stream
DRAIN_SECONDS = 6.0  # to finish admitted jobs, then at most 2 s to close: containers are killed after 10 s
LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
ERROR_FIELDS = ("message", "type", "param", "code", "request_id")
METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT", "QUERY")
CLASS_NAMES = ("class", "guidance")  # parameters that not every model has
HTTP_NAMES = {"n": "n_images", "classes": "class"}  # names of parameters that differ from fields of a DrawRequest


class Refusal(Exception):
    """An error response: status, message (it echoes no input), name of the parameter, headers."""

    def __init__(self, status: int, message: str, param: str | None = None, headers: dict | None = None):
        super().__init__(message)
        self.status, self.message, self.param, self.headers = status, message, param, headers or {}


# Functions, because an exception that is raised again accumulates tracebacks.
shutting_down = partial(Refusal, 503, "this server is shutting down; retry later", headers={"Retry-After": "5"})
drawing_failed = partial(Refusal, 500, "the images could not be drawn")
client_left = partial(Refusal, 408, "the client has left")


class ClientLeft(Exception):
    """The client has closed its connection, or does not read."""


@contextmanager
def client_errors() -> Iterator[None]:
    """Turns an OSError of a client's connection into ClientLeft, so that it is not taken for an error of the server."""
    try:
        yield
    except OSError as error:
        raise ClientLeft from error


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

    Raises Refusal as soon as the bytes are not valid HTTP, too many or too slow, and ClientLeft if the client leaves.
    """
    deadline, head, searched = time.monotonic() + seconds, b"", 0
    while (end := head.find(b"\r\n\r\n", searched)) < 0 and len(head) <= MAX_HEAD:
        if head and not head[:1].isalpha() or BARE_LINE_END.search(head, searched):
            raise Refusal(400, "this is not an HTTP request")
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            raise Refusal(408, f"the head of the request took longer than {seconds:g} seconds")
        with client_errors(), suppress(TimeoutError):
            connection.settimeout(remaining)
            part = connection.recv(65536)
            if not part:
                raise ClientLeft
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
    """Parses the head of a request. Raises Refusal if it is malformed."""
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
        raise Refusal(
            400,
            "the target must be a path that begins with /; characters that URLs do not allow must be percent-encoded",
        )
    authority, path, query = parts.groups()
    headers = parse_fields(lines)
    check_framing(headers)
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


def check_framing(headers: dict) -> None:
    """Raises Refusal for malformed framing (RFC 9112, 6.1 to 6.3)."""
    both = "content-length" in headers and "transfer-encoding" in headers
    if both or not CONTENT_LENGTH.fullmatch(headers.get("content-length", "0")):
        raise Refusal(400, "Content-Length is malformed, or sent with Transfer-Encoding")


def check_no_body(headers: dict) -> None:
    """Raises Refusal for a body or an Expect header."""
    if "expect" in headers:
        raise Refusal(417, "the Expect header is not supported")
    if int(headers.get("content-length", 0)) or "transfer-encoding" in headers:
        raise Refusal(413, "a request must not have a body")


def parse_query(query: str, flags: dict) -> dict:
    """Parses a query, whose parameters are the keys of `flags`. Returns {field of a DrawRequest: value}.

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
        if flag is None and name in CLASS_NAMES:
            raise Refusal(400, f"{name} needs a model that was trained with classes and label dropout", name)
        if flag is None:
            raise Refusal(400, f"unknown parameter; the known parameters are: {', '.join(flags)}")
        if flag.dest in values:
            raise Refusal(400, f"{name} is given twice", name)
        try:
            values[flag.dest] = flag.parse(text)
        except argparse.ArgumentTypeError as error:
            raise Refusal(400, f"{name} must be {flag.wanted}", name) from error
    return values


def parameters(model: sample.Model) -> dict:
    """Returns {name: Flag}, the parameters of a request: DRAW_FLAGS, within the limits of this model and server."""
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
    """An admitted request for images. The engine sets `news` after each of its steps, and `done` at its end."""

    model: sample.Model
    request: sample.DrawRequest
    drawings: list[sample.Drawing]
    facts: dict
    connection: socket.socket | None = None
    client: bytes | str = ""  # its token, or else its address
    deadline: float = math.inf  # of time.monotonic()
    arrived: float = field(default_factory=time.monotonic)
    drained: int = 0  # bytes that the client sent after the request
    error: Refusal | None = None
    news: threading.Event = field(default_factory=threading.Event)
    done: threading.Event = field(default_factory=threading.Event)

    @property
    def work(self) -> int:
        """Predictions still to be made."""
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
    """Owns the network: admits jobs, and advances a batch of their images by one step at a time, in its own thread."""

    def __init__(self, batch: int, capacity: int, exact: bool, metrics: monitor.Metrics):
        self.batch = sample.EXACT_BATCH if exact else batch
        self.capacity, self.exact, self.metrics = capacity, exact, metrics
        self.lock = threading.Condition()
        self.loader = ThreadPoolExecutor(1)  # one load after the other, so that the latest wins
        self.jobs: list[Job] = []
        self.model: sample.Model | None = None  # of new jobs
        self.rate = 100.0  # predictions a second
        self.step_began: float | None = None  # time.monotonic() of the step that is being made
        self.failures = 0  # in a row
        self.max_jobs = MAX_CONNECTIONS * 7 // 8  # the other connections are for probes and refusals
        self.closing = False
        self.thread = threading.Thread(target=self.loop, name="engine", daemon=True)

    def load(self, named: Path | None, device: torch.device, precision: str) -> None:
        """Reads the named model or the newest one and tries it; new jobs get it from now on.

        Raises InputError, and keeps the current model, if the new one does not work.
        """
        path, which = sample.find_model(named)
        model = sample.load(path, device, precision)
        x = torch.zeros(self.batch, *model.shape, device=device)
        t = torch.zeros(self.batch, dtype=torch.int64, device=device)
        seconds = math.inf
        with torch.inference_mode():
            for _ in range(3):  # the first call allocates
                begin = time.perf_counter()
                finite = bool(model.network(x, t, t if model.network.class_embedding else None).isfinite().all())
                seconds = min(seconds, time.perf_counter() - begin)
        if not finite:
            raise InputError(f"{path}: the network's output is not finite")
        with self.lock:
            self.model, self.rate = model, self.batch / seconds
        self.metrics.add("papilio_model_loads_total", result="loaded")
        log(f"{which}: {model.shape[1]} px, {device.type}, {precision}, model {model.hash[:12]}")

    def reload(self, *source) -> None:
        """Calls `load`. An error is logged and counted, and the current model stays."""
        try:
            self.load(*source)
        except Exception as error:
            self.metrics.add("papilio_model_loads_total", result="refused")
            log(f"the model was not loaded, the current one stays: {error}")

    def room(self, seconds: float) -> float:
        """Returns how much work is admitted: what takes LOAD of a time limit at the measured rate, up to `capacity`."""
        return min(self.capacity, LOAD * self.rate * seconds)

    def submit(self, job: Job) -> None:
        """Admits a job, or raises Refusal: 503 while shutting down, 429 with Retry-After if the queue is full.

        A client may fill half of the room, and counts for no more than half. A job that finds the queue empty is always
        admitted.
        """
        with self.lock:
            if self.closing or not self.alive():
                raise shutting_down()
            room = self.room(job.deadline - job.arrived)
            used = Counter()  # of the room, by each client
            for other in [*self.jobs, job]:
                used[other.client] += max(other.work, room / self.max_jobs)
            own = used.pop(job.client)
            excess = own + sum(min(work, room / 2) for work in used.values()) - room
            if any(other.client == job.client for other in self.jobs):
                excess = max(excess, own - room / 2)
            if len(job.drawings[0].table) * self.batch > room / 2:  # too many steps to be in time beside others
                excess = sum(other.work for other in self.jobs)
            if self.jobs and excess > 0:
                raise Refusal(429, "the queue is full; retry later", headers=self.retry_after(excess))
            self.jobs.append(job)
            self.lock.notify_all()

    def retry_after(self, work: float) -> dict:
        """Returns the header that asks a client to wait until this work is done; jittered, so that clients spread."""
        seconds = math.ceil(work / self.rate * random.uniform(1, 1.5))
        return {"Retry-After": str(max(1, min(seconds, MAX_RETRY)))}

    def too_late(self) -> Refusal:
        text = "the images were not finished in time; request fewer, or retry later"
        return Refusal(504, text, headers=self.retry_after(sum(job.work for job in self.jobs)))

    def end(self, job: Job, error: Refusal | None = None) -> None:
        """Ends a job, which is finished unless there is an error. Its connection is no longer watched."""
        with self.lock:
            if job in self.jobs:
                self.jobs.remove(job)
                job.error = error
                self.metrics.add("papilio_departures_total", error is not None and error.status == 408)
            self.lock.notify_all()
        job.news.set()
        job.done.set()

    def close(self, seconds: float) -> None:
        """Admits no more jobs, finishes what it can within `seconds`, and refuses the rest."""
        self.loader.shutdown(wait=False, cancel_futures=True)
        with self.lock:
            self.closing = True
            self.lock.notify_all()
            self.lock.wait_for(lambda: not self.jobs, seconds)
            for job in list(self.jobs):
                self.end(job, shutting_down())
        if self.thread.ident:  # do not exit in the middle of a step
            self.thread.join(0.5)

    def alive(self) -> bool:
        """Returns whether the thread lives, and does not take far longer than usual for a step."""
        began, limit = self.step_began, max(STUCK_SECONDS, STUCK_STEPS * self.batch / self.rate)
        stuck = began is not None and time.monotonic() > began + limit
        return (self.thread.is_alive() or self.thread.ident is None) and not stuck

    @torch.inference_mode()
    def loop(self) -> None:
        try:
            while self.jobs or not self.closing:
                with self.lock:
                    self.lock.wait_for(lambda: self.jobs or self.closing)
                    self.drop()
                    chosen = self.choose()
                if chosen:
                    self.step(chosen)
        except Exception:
            log(traceback.format_exc())
        finally:
            for job in list(self.jobs):
                self.end(job, drawing_failed())

    def drop(self) -> None:
        """Ends jobs that are late or whose client has left. The caller holds the lock: connections stay open."""
        poll, watched = select.poll(), {job.connection.fileno(): job for job in self.jobs if job.connection}
        for number in watched:
            poll.register(number, select.POLLIN)
        for number, _ in poll.poll(0):
            if watched[number].gone():
                self.end(watched[number], client_left())
        for job in [job for job in self.jobs if job.deadline < time.monotonic()]:
            self.end(job, self.too_late())

    def choose(self) -> Members:
        """Chooses the images of the next step: of the job with the least work left, then of the next one, in order.

        Jobs older than AGED that can still be in time go first, the oldest one at the head. What was admitted before
        takes at most LOAD of the time limit, so none is late.
        """
        now, room, chosen = time.monotonic(), self.batch, []

        def rank(job: Job) -> tuple:
            aged = now > job.arrived + AGED * (job.deadline - job.arrived)
            possible = job.work < self.rate * (job.deadline - now)
            return job.arrived if aged and possible else math.inf, job.work

        for job in sorted(self.jobs, key=rank):
            for drawing in job.drawings:
                if room > 0 and drawing.pixels is None:
                    chosen.append((job, drawing))
                    room -= 1 if self.exact else drawing.weight  # exact calls are padded anyway
        return chosen

    def step(self, chosen: Members) -> None:
        """Makes one step of each image.

        Images of one model share a call of the network; those with guidance, which need two predictions each, share
        another one.
        """
        self.step_began, begin, cpu = time.monotonic(), time.perf_counter(), time.process_time()
        groups = {}
        for job, drawing in chosen:
            groups.setdefault((job.model, drawing.weight), []).append((job, drawing))
            if drawing is job.drawings[0] and drawing.step == 0:
                self.metrics.observe("papilio_queue_wait_seconds", self.step_began - job.arrived)
        for members in groups.values():
            self.advance(members)
        if self.failures > MAX_FAILURES:
            raise RuntimeError("all calls of the network fail")
        seconds = time.perf_counter() - begin
        predictions = sum(drawing.weight for _, drawing in chosen)
        full = predictions >= self.batch or predictions / seconds > self.rate  # a part of a batch is less efficient
        if full and not self.failures:
            self.rate += 0.1 * (predictions / seconds - self.rate)
        self.metrics.observe("papilio_step_seconds", seconds)
        self.metrics.add("papilio_steps_total", predictions)
        self.metrics.add("papilio_sampling_cpu_seconds_total", time.process_time() - cpu)
        for job in {job for job, _ in chosen}:
            if all(drawing.pixels is not None for drawing in job.drawings):
                self.end(job)
            job.news.set()
        self.step_began = None

    def advance(self, members: Members) -> None:
        """Makes one step of images of one model, in one call of the network; with `exact`, in a full batch.

        If that fails, tries each image alone, so that only the request that causes the failure fails.
        """
        model, drawings = members[0][0].model, [drawing for _, drawing in members]
        try:
            for drawing in drawings:
                if drawing.state is None:
                    drawing.begin(model)
            sample.advance(model, drawings, self.batch if self.exact else len(drawings))
            self.metrics.add("papilio_images_total", sum(drawing.pixels is not None for drawing in drawings))
            self.failures = 0
        except Exception:
            log(traceback.format_exc())
            self.metrics.add("papilio_engine_errors_total")
            self.failures += 1
            if len(members) == 1:
                return self.end(members[0][0], drawing_failed())
            for job, drawing in members:
                if not job.done.is_set():
                    self.advance([(job, drawing)])


# ---- log -------------------------------------------------------------------------------------------------------------

LOG: queue.Queue = queue.Queue(maxsize=1000)  # lines to be written; if nobody reads stderr, further ones are dropped


def log(text: str) -> None:
    """Queues a line for stderr: the time and the last 1,000 characters of a text, without control characters."""
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    with suppress(queue.Full):
        LOG.put_nowait(f"{now} {re.sub(r'[^ -~]+', ' ', text)[-1000:]}\n")


def write_log() -> None:
    """Writes queued lines: in a thread of its own, because a full pipe blocks."""
    while True:
        line = LOG.get()
        with suppress(OSError, ValueError):  # stderr may be closed
            sys.stderr.write(line)
            sys.stderr.flush()
        LOG.task_done()


def wait_until_done(tasks: queue.Queue, seconds: float) -> None:
    """Waits for `seconds` until all tasks of a queue are done."""
    with tasks.all_tasks_done:
        tasks.all_tasks_done.wait_for(lambda: not tasks.unfinished_tasks, seconds)


threading.Thread(target=write_log, daemon=True).start()


# ---- HTTP ------------------------------------------------------------------------------------------------------------


class Handler(BaseHTTPRequestHandler):
    protocol_version = request_version = "HTTP/1.1"
    requestline, disable_nagle_algorithm, server_version, sys_version, head_only = "", True, "papilio", "", False
    server: "Server"

    def log_message(self, *_) -> None:
        """Disables the log of http.server."""

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
        except ClientLeft:
            self.status = self.status or 499
        except Exception:
            log(traceback.format_exc())
            if not self.status:
                with suppress(ClientLeft):
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
            raise Refusal(404, f"unknown path; the known paths are: {', '.join(ROUTES)}")
        self.route = route
        respond, methods, _ = ROUTES[route]
        if request.method not in methods:
            allowed = ", ".join(methods)
            raise Refusal(405, f"the methods of this route are {allowed}", headers={"Allow": allowed})
        check_no_body(request.headers)
        if route not in PROBES:
            self.check_access(request)
        respond(self, request)

    def check_access(self, request: Request) -> None:
        """Raises Refusal for foreign host names (DNS rebinding), pages of other sites (CSRF) and a missing token."""
        tokens, sent = self.server.tokens, request.headers
        scraped = self.route == "/metrics" and re.fullmatch(r"[\d.]+|\[.*\]", request.host)  # by address: not rebound
        if not (tokens or scraped or self.server.allows(request.host)):
            raise Refusal(421, "unknown host name; allow it with --allow-host")
        origin = re.fullmatch(r"https?://(.*)", sent.get("origin", f"http://{request.host}").lower())
        origin_host = HOST.fullmatch(origin[1]) if origin else None
        same = origin_host and (origin_host[1] == request.host or self.server.allows(origin_host[1]))
        opened = (sent.get("sec-fetch-mode"), sent.get("sec-fetch-dest", "document")) == ("navigate", "document")
        embedded = self.route in GENERATING and sent.get("sec-fetch-site") == "cross-site" and not opened
        if embedded or not same:
            raise Refusal(403, "pages of other sites may not use this server")
        scheme, _, given = sent.get("authorization", "").encode("latin-1").partition(b" ")
        given = given.strip(b" ")
        matches = [hmac.compare_digest(given, token) for token in tokens]  # all of them, for constant time
        if tokens and not (scheme.lower() == b"bearer" and any(matches)):
            text = "send one of this server's tokens in a header: Authorization: Bearer TOKEN"
            raise Refusal(401, text, headers={"WWW-Authenticate": "Bearer"})
        self.client = given if tokens else self.client_address[0]

    def respond(self, status: int, body: bytes | None, kind: str, headers: dict | None = None) -> None:
        """Sends a response; without a body only its head. Raises ClientLeft if the client does not take it in time."""
        self.status = status
        self.send_response(status)
        fields = {
            "Content-Type": kind,
            "Connection": "close",
            "X-Content-Type-Options": "nosniff",
            "Cross-Origin-Resource-Policy": "same-origin",
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
        with client_errors():
            self.connection.settimeout(WRITE_SECONDS + len(body or b"") / SLOWEST_READER)
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
        """Draws images: a PNG, as a grid if there are several. POST with `Accept: application/json`: the PNG of each
        image in base64, with its seed."""
        job = self.new_job(request)
        as_json = request.method == "POST" and "application/json" in request.headers.get("accept", "")
        headers = job_headers(job)
        if request.method != "POST" and "seed" in urllib.parse.parse_qs(
            request.query
        ):  # the same request gives the same picture
            tag = f'"{hashlib.sha256(json.dumps(job.facts).encode()).hexdigest()[:32]}"'
            known = request.headers.get("if-none-match", "")
            weak = "" if self.engine.exact else "W/"  # bits depend on the batch, except with --exact
            headers |= {"ETag": weak + tag, "Cache-Control": "no-cache"}
            if tag in re.findall(r'"[^"]*"', known) or known == "*":
                return self.respond(304, None, "image/png", headers)
        if self.head_only:
            return self.respond(200, None, "image/png", headers)
        with self.submitted(job):
            job.done.wait(max(0, job.deadline - time.monotonic()))
        if job.error:
            raise job.error
        if as_json:
            content = {"images": [image_content(job, drawing, drawing.pixels) for drawing in job.drawings]}
            self.respond(200, json.dumps(content).encode(), "application/json", headers)
        else:
            images = torch.stack([drawing.pixels for drawing in job.drawings])
            self.respond(200, data.encode_png(data.grid(images), job.facts), "image/png", headers)
        self.save_images(job)

    def get_stream(self, request: Request) -> None:
        """Draws images and reports progress as server-sent events: queued, step (with the newest estimate of an image),
        image (finished), and at the end done or error."""
        if "last-event-id" in request.headers:  # the automatic reconnection of an EventSource, which 204 stops
            return self.respond(204, None, "text/event-stream")
        job = self.new_job(request)
        for drawing in job.drawings:
            drawing.watched = True
        headers = job_headers(job) | {"X-Accel-Buffering": "no"}  # no buffering in nginx
        if self.head_only:
            return self.respond(200, None, "text/event-stream", headers)
        with self.submitted(job):
            self.respond(200, None, "text/event-stream", headers)
            self.send_lines(f"retry: 600000\nid: {self.id}\n")
            self.send("queued", {"request_id": self.id, "images": len(job.drawings), "steps": job.facts["steps"]})
            unfinished = dict(enumerate(job.drawings))
            while unfinished and not job.error and (remaining := job.deadline - time.monotonic()) > 0:
                if not job.news.wait(min(remaining, HEARTBEAT_SECONDS)):
                    self.send_lines(": still here\n\n")
                job.news.clear()
                for k, drawing in list(unfinished.items()):
                    if time.monotonic() < job.deadline and self.send_progress(job, k, drawing):
                        del unfinished[k]
        if not unfinished:
            self.send("done", {"images": len(job.drawings)})
            return self.save_images(job)
        error = job.error or self.engine.too_late()
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
        content = {"image": k, "step": step, "steps": job.facts["steps"], **image_content(job, drawing, pixels)}
        self.send("image" if finished else "step", content)
        return finished

    def send(self, event: str, content: dict) -> None:
        self.send_lines(f"event: {event}\ndata: {json.dumps(content)}\n\n")

    def send_lines(self, text: str) -> None:
        """Sends a part of a stream. Raises ClientLeft if the client does not take it in time."""
        with client_errors():
            self.connection.settimeout(WRITE_SECONDS)
            self.wfile.write(text.encode())

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
            with self.server.planning:
                table = wanted.table(model.schedule)
        except InputError as error:  # for example, steps_offset goes beyond the last timestep
            raise Refusal(400, str(error), "eta" if "eta" in str(error) else "steps") from error
        images = wanted.images(model.network.config)
        facts = wanted.facts(model, len(table)) | sample.grid_facts(model.network.config, images)
        drawings = [sample.Drawing(seed, label, table, wanted.guidance) for label, seed in images]
        job = Job(model, wanted, drawings, facts, client=self.client)
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
        except ClientLeft:
            self.engine.end(job, client_left())
            raise
        finally:
            self.engine.end(job, self.engine.too_late())

    def save_images(self, job: Job) -> None:
        """Queues the images to be saved, with --save."""
        if self.server.store:
            images = [(drawing.pixels, image_facts(job, drawing)) for drawing in job.drawings]
            try:
                self.server.saves.put_nowait((self.id, images))
            except queue.Full:
                self.server.report_save([f"more than {MAX_SAVES} requests wait to be saved"], [])


def job_headers(job: Job) -> dict:
    return {"X-Seed": str(job.request.seed), "X-Model-Hash": job.model.hash}


def image_facts(job: Job, drawing: sample.Drawing) -> dict:
    facts = dict(job.facts)
    if drawing.label is not None:
        facts["class"] = sample.class_name(job.model.network.config, drawing.label)
    return facts | {"seed": drawing.seed}


def image_content(job: Job, drawing: sample.Drawing, pixels: Tensor) -> dict:
    picture = data.encode_png(data.grid(pixels[None], padding=0), image_facts(job, drawing))
    return {"seed": drawing.seed, "png": base64.b64encode(picture).decode()}


GET, POST = ("GET", "HEAD"), ("GET", "HEAD", "POST")
# path: (method of Handler, HTTP methods, media type); the docstring of the method describes the route in /openapi.json
ROUTES = {
    "/generate_sample/": (Handler.get_sample, POST, "image/png"),
    "/generate_stream/": (Handler.get_stream, GET, "text/event-stream"),
    "/openapi.json": (Handler.get_openapi, GET, "application/json"),
    "/metrics": (Handler.get_metrics, GET, "text/plain"),
    "/healthz": (Handler.get_health, GET, "text/plain"),
    "/health": (Handler.get_health, GET, "text/plain"),
    "/readyz": (Handler.get_ready, GET, "text/plain"),
    "/ready": (Handler.get_ready, GET, "text/plain"),
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
    for path, (respond, methods, kind) in ROUTES.items():
        responses = {
            "200": {"description": "success", "content": {kind: {}}},
            "default": {"description": "an error", "content": {"application/json": error, "text/plain": {}}},
        }
        operation = {"summary": " ".join((respond.__doc__ or "").split()), "responses": responses}
        if path in GENERATING:
            responses["304"] = {"description": "the client has this picture already"}
            operation["parameters"] = query
        paths[path] = {"get": operation}
        if "POST" in methods:
            paths[path]["post"] = operation
    return {"openapi": "3.1.0", "info": {"title": "Papilio", "version": model.hash[:12]}, "paths": paths}


BUSY = (
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: 5\r\nConnection: close\r\n\r\n"
    b'{"error": {"message": "all connections are in use", "type": "server_error", "param": null, "code": '
    b'"service_unavailable", "request_id": null}}\n'
)


class Server(ThreadingHTTPServer):
    """Accepts connections, within limits, and holds what the handlers share.

    hosts     names that it answers to, besides those of the loopback interface
    tokens    accepted bearer tokens (bytes); empty: no authentication
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
        # Half of the descriptors, because as many rejected connections may still be closing.
        self.max_connections = max(2, min(MAX_CONNECTIONS, (file_limit() - OTHER_FILES) // 2))
        engine.max_jobs = self.max_connections * 7 // 8
        self.planning = threading.Lock()  # one at a time, so that handlers leave the interpreter to the engine
        self.saves: queue.Queue = queue.Queue(MAX_SAVES)  # (request id, images with facts)
        self.connections: dict = {}  # {socket: whether a request is in flight}, oldest first
        if store:
            threading.Thread(target=self.save_loop, name="saves", daemon=True).start()
        with data.disk_errors(f"listen on {address[0]} port {address[1]}", "choose another --host or --port"):
            super().__init__(address, Handler)

    server_bind = socketserver.TCPServer.server_bind  # http.server's own makes a reverse DNS lookup

    # -- connections

    def process_request(self, connection: socket.socket, address) -> None:
        """Starts a thread for a connection.

        At max_connections, closes the oldest connection with no request in flight; if there is none, rejects this one.
        """
        with self.lock:
            full = len(self.connections) >= self.max_connections
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
        if threading.active_count() < 2 * self.max_connections + OTHER_FILES // 2:
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

    def save_loop(self) -> None:
        """Saves queued images, in a thread of its own: neither responses nor connections wait for the disk."""
        while True:
            self.report_save(*self.store.save(*self.saves.get()))
            self.saves.task_done()

    def report_save(self, errors: list, deleted: list) -> None:
        for error in errors:
            self.metrics.add("papilio_save_errors_total")
            log(f"not saved: {error}")
        for file in deleted:
            log(f"--save-limit: a random sample of the day is kept, without {file}")

    def handle_error(self, request, client_address) -> None:
        """Logs an exception of a handler's thread, which socketserver would print."""
        log(traceback.format_exc())

    # -- what handlers and main ask for

    def gauges(self) -> dict:
        engine = self.engine
        with engine.lock:
            model, jobs = engine.model, list(engine.jobs)
            numbers = {
                "papilio_batch_capacity": engine.batch,
                "papilio_queue_requests": len(jobs),
                "papilio_queue_steps": sum(job.work for job in jobs),
                "papilio_queue_capacity_steps": engine.room(self.seconds),
                "papilio_connections": len(self.connections),
                "papilio_worker_up": engine.alive(),
            }
        if self.store:
            numbers["papilio_saved_bytes"] = self.store.bytes
        if model:
            key = monitor.labelled(
                "papilio_model_info", hash=model.hash, pixels=model.shape[1], precision=model.precision
            )
            numbers[key] = 1
        return numbers | monitor.process_gauges()

    def allows(self, host: str) -> bool:
        """Returns whether the server answers to a host name: one of its hosts, which may be * or *.example.org."""
        suffixes = tuple(name[1:] for name in self.hosts if name.startswith("*"))
        return host in self.hosts or bool(suffixes) and host.endswith(suffixes)

    def reload_tokens(self, file: Path | None) -> None:
        """Reads the tokens again. An error is logged, and the current ones stay."""
        try:
            self.tokens = read_tokens(file)
        except InputError as error:
            log(f"the tokens were not read, the current ones stay: {error}")

    def drain(self) -> None:
        """Finishes what can be finished in DRAIN_SECONDS, refuses the rest, and stops listening."""
        end = time.monotonic() + DRAIN_SECONDS
        self.engine.close(DRAIN_SECONDS)
        self.shutdown()
        with self.lock:
            self.lock.wait_for(lambda: not any(self.connections.values()), max(1, end - time.monotonic()))
        wait_until_done(self.saves, 1)
        self.server_close()


# ---- command line ----------------------------------------------------------------------------------------------------

SERVER_FLAGS = {
    "model": [
        sample.MODEL_FLAG,
        *sample.DEVICE_FLAGS,
        Flag("--exact", None, bool, "images bit-identical to those of sample.py --exact, in any batch"),
    ],
    "access": [
        Flag("--host", "127.0.0.1", str, "address to listen on; 0.0.0.0 means all addresses of this machine"),
        Flag("--port", os.environ.get("PORT", "8000"), whole(0, 65535), "port to listen on, from $PORT if that is set; "
             "0 takes a free one"),
        Flag("--allow-host", None, str, "host name to answer to, besides localhost: a name, *.example.org or *; may be "
             "repeated",
             {"action": "append"}),
        Flag("--token-file", None, Path, "file of accepted bearer tokens, one per line (default: the tokens "
             "in $PAPILIO_TOKEN)"),
    ],
    "limits": [
        Flag("--batch-size", 8, whole(1, 1024), "images per call of the network; --exact has a batch size of its own"),
        Flag("--max-cost", 6400, whole(1), "images x steps allowed per request; guidance counts twice"),
        Flag("--queue", 20_000, whole(1), "images x steps that may wait; further requests get 429"),
        Flag("--timeout", 120.0, real(0.1, 10**6), "seconds after which a request gets 504"),
        Flag("--save", None, Path, "folder to save served images in, for monitor.py (default: images are not saved)"),
        Flag("--save-limit", 1000, whole(1), "size limit of the --save folder in MB; above it, random images of the "
             "oldest day are deleted"),
    ],
}  # fmt: skip


def file_limit() -> int:
    """Returns how many file descriptors this process may have."""
    import resource  # not on Windows

    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def host_name(text: str) -> str:
    """Returns a host name or address in lower case, as a Host header has it, or with * for any name or any prefix.

    Raises InputError if it is none of these.
    """
    if re.fullmatch(r"\*(\.[\w.-]+)?", text):
        return text.lower()
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
        with data.disk_errors(f"read {source}", "check its path and permissions"):
            content = file.read_bytes()
    tokens = tuple(line.strip() for line in content.splitlines() if line.strip())
    wanted = file or "PAPILIO_TOKEN" in os.environ
    if wanted and not (tokens and all(re.fullmatch(rb"[!-~]{8,}", token) for token in tokens)):
        raise InputError(f"{source}: it needs one token per line, of at least 8 visible ASCII characters")
    return tokens


def serve(args: argparse.Namespace) -> int:
    if sys.platform == "win32":
        raise InputError("the server needs Linux or macOS; on Windows run it in WSL or a container")
    tokens = read_tokens(args.token_file)
    device, metrics = sample.choose_device(args.device), monitor.Metrics()
    source = args.model, device, sample.choose_precision(device, args.precision)
    store = data.ServedImages(args.save, args.save_limit * 10**6) if args.save else None
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
    loading = engine.loader.submit(engine.load, *source)
    try:
        if wait_for(loading.done, signals):
            loading.result()
            engine.thread.start()
            if args.host not in (*LOOPBACK, "::1") and not tokens:
                log("WARNING: anyone who reaches this address may use it; --token-file asks for a token")
            log(f"listening on http://{host_name(server.server_address[0])}:{server.server_address[1]}")
    except InputError:
        server.drain()
        for number, handler in handlers.items():
            signal.signal(number, handler)
        raise
    while wait_for(lambda: signal.SIGHUP in signals, signals, engine.alive):
        signals.remove(signal.SIGHUP)
        engine.loader.submit(engine.reload, *source)
        server.reload_tokens(args.token_file)
    log("shutting down")
    for number in (signal.SIGTERM, signal.SIGINT):  # a second signal exits at once
        signal.signal(number, signal.SIG_DFL)
    healthy = engine.alive()
    server.drain()
    if not healthy:
        log("the engine makes no progress: leaving, so that a supervisor starts the server again")
    wait_until_done(LOG, 1)
    os._exit(0 if healthy else 1)  # sys.exit would abort if a thread is still in a step or writes a line


def wait_for(condition: Callable, signals: list, healthy: Callable = lambda: True) -> bool:
    """Waits for a condition. Returns False if SIGTERM or SIGINT arrives before, or the engine is not healthy."""
    while not condition():
        if {signal.SIGTERM, signal.SIGINT} & set(signals) or not healthy():
            return False
        time.sleep(0.1)  # polled: a signal delivered to another thread would not interrupt a longer wait
    return True


def main(argv: Sequence[str] | None = None) -> int:
    parser = data.Parser("server.py", "Serve images over HTTP.", __doc__)
    data.add_flags(parser, SERVER_FLAGS)
    args = parser.parse_args(argv)
    sample.set_threads()
    return data.exit_status(lambda: serve(args))


if __name__ == "__main__":
    sys.exit(main())
