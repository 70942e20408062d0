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
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from http import HTTPMethod, HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch
from torch import Tensor

import data
import sample
import unet
from builtin import served_images, telemetry
from data import Flag, InputError, real, whole

MAX_HEAD = 32 * 1024  # bytes of the request line and the header fields
MAX_TARGET = 8 * 1024  # bytes
MAX_HEADERS = 100
MAX_BODY = 16 * 1024  # bytes
MAX_ISSUED = 100_000  # images that can be voted on, the newest ones
MAX_CONNECTIONS = 256  # fewer if RLIMIT_NOFILE is low
OTHER_FILES = 64  # descriptors for everything that is not a connection
MAX_FAILURES = 20  # calls of the network that fail in a row before the engine gives up
LOAD = 0.6  # of the time limit: admitted jobs take at most this long in all, at the measured rate
AGED = 0.3  # of the time limit: jobs older than this go first
STUCK_SECONDS, STUCK_STEPS = 60.0, 100  # a step longer than this and than so many usual steps will never end
MAX_RETRY = 120  # seconds in Retry-After
HEAD_SECONDS = 10.0  # to receive a request
WRITE_SECONDS = 10.0  # to send a response, plus its length / SLOWEST_READER
SLOWEST_READER = 64 * 1024  # bytes a second
LINGER_SECONDS = 2.0  # to read what a client still sends after the response
HEARTBEAT_SECONDS = 10.0  # between signs of life in a stream
DRAIN_SECONDS = 6.0  # to finish admitted jobs, then at most 2 s to close: containers are killed after 10 s
LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
ERROR_FIELDS = ("message", "type", "param", "code", "request_id")
GET, GET_OR_POST, POST = ("GET", "HEAD"), ("GET", "HEAD", "POST"), ("POST",)  # methods of a route
CLASS_NAMES = ("class", "guidance")  # parameters that not every model has


# Answered under any host name, without a token. Cloud Run reserves paths that end in z.
PROBES = ("/healthz", "/health", "/readyz", "/ready")
GENERATING = ("/generate_sample/", "/generate_stream/")
PAGE = Path(__file__).parent / "web/index.html"
VOTES = ("up", "down")


class Refusal(Exception):
    """An error response: status, message (it echoes no input), name of the parameter, headers."""

    def __init__(self, status: int, message: str, param: str | None = None, headers: dict | None = None):
        super().__init__(message)
        self.status, self.param, self.headers = status, param, headers or {}


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


# ---- log -------------------------------------------------------------------------------------------------------------

LOG_AS_JSON = threading.Event()
LOG: queue.Queue = queue.Queue(maxsize=1000)  # lines to be written; if nobody reads stderr, further ones are dropped


def log(text: str, **fields) -> None:
    """Queues a line for stderr: the time and the last 1,000 characters of a text, without control characters.

    With --log json it is a JSON object, which also has the given fields.
    """
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    text = re.sub(r"[^ -~]+", " ", text)[-1000:]
    line = f"{now} {text}\n"
    if LOG_AS_JSON.is_set():
        line = json.dumps({"time": now, "message": text, **fields}) + "\n"
    with suppress(queue.Full):
        LOG.put_nowait(line)


def write_log() -> None:
    """Writes queued lines. The server runs it in a thread of its own, because a full pipe blocks."""
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

# ---- reading a request -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Request:
    method: str
    path: str  # not decoded
    query: str  # not decoded
    host: str  # lower case, without the port
    headers: dict  # by lower-case name; repeated fields are joined with a comma (RFC 9110, 5.3)


def receive(connection: socket.socket, deadline: float) -> bytes:
    """Returns the next bytes. Raises Refusal after the deadline, and ClientLeft if the client leaves."""
    while (remaining := deadline - time.monotonic()) > 0:
        with client_errors(), suppress(TimeoutError):
            connection.settimeout(remaining)
            part = connection.recv(65536)
            if not part:
                raise ClientLeft
            return part
    raise Refusal(408, f"the request took longer than {HEAD_SECONDS:g} seconds")


def read_head(connection: socket.socket) -> tuple[bytes, bytes]:
    """Reads up to the first empty line, which ends the head of a request. Returns the head, and what came after it.

    Raises Refusal as soon as the bytes are not valid HTTP, too many or too slow, and ClientLeft if the client leaves.
    """
    deadline, head, searched = time.monotonic() + HEAD_SECONDS, b"", 0
    while (end := head.find(b"\r\n\r\n", searched)) < 0 and len(head) <= MAX_HEAD:
        if head and not head[:1].isalpha() or BARE_LINE_END.search(head, searched):
            raise Refusal(400, "this is not an HTTP request")
        searched = max(0, len(head) - 3)
        head += receive(connection, deadline)
    if 0 <= end <= MAX_HEAD:
        return head[:end], head[end + 4 :]
    if b"\r\n" in head[:MAX_TARGET]:
        raise Refusal(431, f"the head of the request is longer than {MAX_HEAD} bytes")
    raise Refusal(414, f"the target of the request is longer than {MAX_TARGET} bytes")


# RFC 9112, 2.2: a lone LF need not be accepted, a lone CR must not be.
BARE_LINE_END = re.compile(rb"(?<!\r)\n|\r[^\n]")
TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]"  # RFC 9110, 5.6.2
REQUEST_LINE = re.compile(rb"(" + TOKEN + rb"{1,32}) (\S+) HTTP/(\d\.\d)")  # RFC 9112, 2.3 and 3: single spaces
# RFC 9112, 5: no space before the colon, no folded lines; visible characters, spaces and tabs. It can match in one way
# only, so that matching takes linear time.
FIELD = re.compile(rb"(" + TOKEN + rb"+):([\t\x20-\x7e\x80-\xff]*)")
CHARACTERS = r"(?:[\w.~!$&'()*+,;=:@/-]|%[0-9A-Fa-f]{2})*"  # RFC 3986, 3.3 and 3.4
# RFC 9112, 3.2.1 and 3.2.2
TARGET = re.compile(rf"(?:http://([^/?#]+))?(/{CHARACTERS})(?:\?({CHARACTERS}))?", re.ASCII)
HOST = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::[0-9]{0,5})?", re.ASCII)  # RFC 3986, 3.2.2 and 3.2.3
ORIGIN = re.compile(rf"https?://{HOST.pattern}", re.ASCII)  # RFC 6454, 6.2


def parse_head(head: bytes) -> Request:
    """Parses the head of a request. Raises Refusal if it is malformed."""
    first, *lines = head.split(b"\r\n")
    line = REQUEST_LINE.fullmatch(first)
    if not line:
        raise Refusal(400, "the first line must be a method, a target and HTTP/1.1")
    method, target, version = (word.decode("latin-1") for word in line.groups())
    if version not in ("1.0", "1.1"):
        raise Refusal(505, "only HTTP/1.1 and 1.0 are implemented")
    if method not in (*HTTPMethod, "QUERY"):
        raise Refusal(501, "this method is not known")
    if len(target) > MAX_TARGET:
        raise Refusal(414, f"the target of the request is longer than {MAX_TARGET} bytes")
    parts = TARGET.fullmatch(target)
    if not parts:
        raise Refusal(400, "the target must be a path that begins with /, percent-encoded")
    authority, path, query = parts.groups()
    headers = parse_fields(lines)
    named = headers.get("host", "unnamed" if version == "1.0" else "")
    # RFC 9112, 3.2.2: the authority of an absolute target replaces Host, which must be valid all the same.
    hosts = [HOST.fullmatch(name.lower()) for name in (named, authority or named)]
    if None in hosts:
        raise Refusal(400, "there must be one Host header, with the name of this server")
    return Request(method, path, query or "", hosts[1][1], headers)


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


def body_length(headers: dict, most: int) -> int:
    """Returns the number of bytes of the body.

    Raises Refusal for malformed framing (RFC 9112, 6.1 to 6.3), more than `most` bytes, and an Expect header.
    """
    length, encoded = headers.get("content-length", "0"), "transfer-encoding" in headers
    if not re.fullmatch(r"[0-9]{1,19}", length) or encoded and "content-length" in headers:
        raise Refusal(400, "Content-Length is malformed, or sent with Transfer-Encoding")
    if "expect" in headers:
        raise Refusal(417, "the Expect header is not supported")
    if encoded and most:
        raise Refusal(411, "a body needs a Content-Length")
    if encoded or int(length) > most:
        raise Refusal(413, f"the body of this request may have at most {most} bytes")
    return int(length)


def parse_query(query: str) -> list[tuple]:
    """Returns (name, text) of each parameter of a query. Raises Refusal."""
    try:
        return urllib.parse.parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query), errors="strict")
    except ValueError as error:
        raise Refusal(400, "the query must have the form name=value&name=value, in UTF-8") from error


def parse_values(pairs: Iterable[tuple], flags: dict, parse: Callable) -> dict:
    """Turns (name, value) pairs, whose names are the keys of `flags`, into {field of a DrawRequest: parsed value}.

    `parse` is Flag.parse for texts, and Flag.check for JSON. Raises Refusal, which names the parameter.
    """
    values = {}
    for name, value in pairs:
        if name in CLASS_NAMES and name not in flags:
            raise Refusal(400, f"{name} needs a model that was trained with classes and label dropout", name)
        if name not in flags:
            raise Refusal(400, f"unknown parameter; the known parameters are: {', '.join(flags)}")
        flag = flags[name]
        if flag.dest in values:
            raise Refusal(400, f"{name} is given twice", name)
        try:
            values[flag.dest] = parse(flag, value)
        except argparse.ArgumentTypeError as error:
            raise Refusal(400, f"{name} must be {flag.wanted}", name) from error
    return values


# ---- the engine ------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Job:
    """An admitted request for images. The engine sets `news` after each step of it, and `done` at its end."""

    model: sample.Model
    drawings: list[sample.Drawing]
    facts: dict
    connection: socket.socket | None = None
    client: bytes | str = ""  # its token, or else its address
    deadline: float = math.inf  # of time.monotonic()
    repeatable: bool = False  # the seed was given
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

    def __init__(self, batch: int, capacity: int, exact: bool, metrics: telemetry.Metrics):
        self.batch = sample.EXACT_BATCH if exact else batch
        self.capacity, self.exact, self.metrics = capacity, exact, metrics
        self.lock = threading.Condition()
        self.loader = ThreadPoolExecutor(1)  # one load after the other, so that the latest wins
        self.jobs: list[Job] = []
        self.model: sample.Model | None = None  # of new jobs
        self.rate = 100.0  # predictions a second
        self.step_began = math.inf  # time.monotonic() of the step that is being made
        self.failures = 0  # in a row
        self.max_jobs = MAX_CONNECTIONS
        self.closing = self.failed = False
        self.thread = threading.Thread(target=self.loop, name="engine", daemon=True)

    def load(self, named: Path | None, device: torch.device, precision: str, expected: str | None = None) -> None:
        """Reads the named model or the newest one and tries it; new jobs get it from now on.

        Raises InputError, and keeps the current model, if the new one does not work or has not the expected hash.
        """
        path, which = sample.find_model(named)
        model = sample.load(path, device, precision)
        if expected not in (None, model.hash):
            raise InputError(f"--model-hash {expected}: the model in {path} has the hash {model.hash}; correct either")
        rate = sample.measure_rate(model, self.batch)
        with self.lock:
            self.model, self.rate = model, rate
        self.metrics.add("papilio_model_loads_total", result="loaded")
        log(f"{which}: {model.shape[1]} px, {device.type}, {precision}, model {model.hash[:12]}")

    def reload(self, *source) -> None:
        """Calls `load`. An error is logged and counted, and the current model stays."""
        try:
            self.load(*source)
        except Exception as error:
            self.metrics.add("papilio_model_loads_total", result="refused")
            log(f"the model was not loaded, the current one stays: {error}")

    def room(self, seconds: float) -> int:
        """Returns how much work is admitted: as much as LOAD * seconds allow at the measured rate, up to `capacity`."""
        return int(min(self.capacity, LOAD * self.rate * seconds))

    def submit(self, job: Job) -> None:
        """Admits a job, or raises Refusal: 503 while shutting down, 429 with Retry-After if the queue is full.

        A client with queued jobs may use half of the room. When others ask, its work counts as at most half. A job that
        finds the queue empty is always admitted.
        """
        with self.lock:
            if self.closing or not self.alive():
                raise shutting_down()
            room = self.room(job.deadline - job.arrived)
            used = Counter()  # of the room, by each client
            for other in [*self.jobs, job]:
                used[other.client] += max(other.work, room // self.max_jobs)
            own = used.pop(job.client)
            excess = own + sum(min(work, room / 2) for work in used.values()) - room
            if any(other.client == job.client for other in self.jobs):
                excess = max(excess, own - room / 2)
            if len(job.drawings[0].table) * self.batch > room / 2:  # needs an empty queue to be in time
                excess = sum(other.work for other in self.jobs)
            if self.jobs and excess > 0:
                raise Refusal(429, "the queue is full; retry later", headers=self.retry_after(excess))
            self.jobs.append(job)
            self.lock.notify_all()

    def retry_after(self, work: float) -> dict:
        """Returns the header that asks a client to wait until this work is done; jittered, so that clients spread."""
        seconds = math.ceil(work / self.rate * random.uniform(1, 1.5))
        return {"Retry-After": str(max(1, min(seconds, MAX_RETRY)))}

    def estimate(self, job: Job) -> float:
        """Returns the seconds until a job is finished, if no others come: those with less work left go first."""
        with self.lock:
            return round(sum(min(other.work, job.work) for other in self.jobs) / self.rate, 1)

    def too_late(self) -> Refusal:
        headers = self.retry_after(sum(job.work for job in self.jobs))
        return Refusal(504, "the images were not finished in time; request fewer, or retry later", headers=headers)

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
        if self.thread.is_alive():  # do not exit in the middle of a step
            self.thread.join(0.5)

    def alive(self) -> bool:
        """Returns False if the thread has failed, or takes far longer than usual for a step."""
        limit = max(STUCK_SECONDS, STUCK_STEPS * self.batch / self.rate)
        return not self.failed and time.monotonic() < self.step_began + limit

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
            self.failed = True
            log(traceback.format_exc())
        finally:
            for job in list(self.jobs):
                self.end(job, drawing_failed())

    def drop(self) -> None:
        """Ends jobs that are late or whose client has left.

        The caller holds the lock, so that no handler closes a connection meanwhile.
        """
        poll, watched = select.poll(), {job.connection.fileno(): job for job in self.jobs if job.connection}
        for number in watched:
            poll.register(number, select.POLLIN)
        for number, _ in poll.poll(0):
            if watched[number].gone():
                self.end(watched[number], client_left())
        for job in list(self.jobs):
            if job.deadline < time.monotonic():
                self.end(job, self.too_late())

    def choose(self) -> Members:
        """Chooses the images of the next step: of the job with the least work left, then of the next one, in order.

        Jobs older than AGED that can still be in time go first, the oldest one at the head. Work admitted before a job
        takes at most LOAD of its time limit, so no job is late.
        """
        now, room, chosen = time.monotonic(), self.batch, []

        def rank(job: Job) -> tuple:
            aged = now > job.arrived + AGED * (job.deadline - job.arrived)
            possible = job.work < self.rate * (job.deadline - now)
            return job.arrived if aged and possible else math.inf, job.work

        for job in sorted(self.jobs, key=rank):
            for drawing in job.drawings:
                if room > 0 and drawing.work:
                    chosen.append((job, drawing))
                    room -= 1 if self.exact else drawing.weight  # exact calls are padded anyway
        return chosen

    def step(self, chosen: Members) -> None:
        """Makes one step of each image.

        Images of one model share a call of the network; those with guidance, which need two predictions each, share
        another one.
        """
        self.step_began, cpu = time.monotonic(), time.process_time()
        groups = {}
        for job, drawing in chosen:
            groups.setdefault((job.model, drawing.weight), []).append((job, drawing))
            if drawing is job.drawings[0] and drawing.step == 0:
                self.metrics.observe("papilio_queue_wait_seconds", self.step_began - job.arrived)
        for members in groups.values():
            self.advance(members)
        if self.failures > MAX_FAILURES:
            raise RuntimeError("all calls of the network fail")
        seconds = time.monotonic() - self.step_began
        predictions = sum(drawing.weight for _, drawing in chosen)
        full = predictions >= self.batch or predictions / seconds > self.rate  # a part of a batch is less efficient
        if full and not self.failures:
            self.rate += 0.1 * (predictions / seconds - self.rate)
        self.metrics.observe("papilio_step_seconds", seconds)
        self.metrics.add("papilio_steps_total", predictions)
        self.metrics.add("papilio_sampling_cpu_seconds_total", time.process_time() - cpu)
        for job in {job for job, _ in chosen}:
            if not job.work:
                self.end(job)
            job.news.set()
        self.step_began = math.inf

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


# ---- HTTP ------------------------------------------------------------------------------------------------------------


class Handler(BaseHTTPRequestHandler):
    protocol_version = request_version = "HTTP/1.1"
    disable_nagle_algorithm, server_version, sys_version, head_only = True, "papilio", "", False
    server: "Server"

    def log_request(self, *_) -> None:
        """Disables the log of http.server."""

    def handle(self) -> None:
        self.id, self.status, self.route, self.close_connection = secrets.token_hex(8), 0, "none", True
        begin = time.perf_counter()
        try:
            head, rest = read_head(self.connection)
            begin = time.perf_counter()
            self.answer(parse_head(head), rest)
        except Refusal as refusal:
            self.refuse(refusal)
        except ClientLeft:
            self.status = self.status or 499
        except Exception:
            log(traceback.format_exc())
            if not self.status:
                self.refuse(Refusal(500, "this is an error in the server"))
        seconds = time.perf_counter() - begin
        if self.route != "none" or self.status != 499:  # a connection without a request is not logged
            self.server.metrics.observe("papilio_request_seconds", seconds, route=self.route, status=str(self.status))
            ms = round(1000 * seconds)
            text = f"{self.id} {self.route} {self.status} {ms} ms"
            log(text, request=self.id, route=self.route, status=self.status, ms=ms)

    def answer(self, request: Request, body: bytes) -> None:
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
        length = body_length(request.headers, MAX_BODY if request.method == "POST" else 0)
        if route not in PROBES:
            self.check_access(request)
        deadline = time.monotonic() + HEAD_SECONDS
        while len(body) < length:
            body += receive(self.connection, deadline)
        self.body = body[:length]
        self.server.mark(self.connection, True)
        respond(self, request)

    def check_access(self, request: Request) -> None:
        """Raises Refusal for foreign host names (DNS rebinding), pages of other sites (CSRF) and a missing token."""
        tokens, sent = self.server.tokens, request.headers
        scraped = self.route == "/metrics" and re.fullmatch(
            r"[\d.]+|\[.*\]", request.host
        )  # addresses cannot be rebound
        if not (tokens or scraped or self.server.allows(request.host)):
            raise Refusal(421, "unknown host name; allow it with --allow-host")
        origin = ORIGIN.fullmatch(sent.get("origin", f"http://{request.host}").lower())
        same = origin and (origin[1] == request.host or self.server.allows(origin[1]))
        opened = (sent.get("sec-fetch-mode"), sent.get("sec-fetch-dest", "document")) == ("navigate", "document")
        embedded = self.route in GENERATING and sent.get("sec-fetch-site") == "cross-site" and not opened
        if embedded or not same:
            raise Refusal(403, "pages of other sites may not use this server")
        scheme, _, given = sent.get("authorization", "").encode("latin-1").partition(b" ")
        given = given.strip(b" ")
        matches = [hmac.compare_digest(given, token) for token in tokens]  # all of them, for constant time
        if tokens and not (scheme.lower() == b"bearer" and any(matches)) and self.route != "/":  # the page asks for it
            text = "send one of this server's tokens in a header: Authorization: Bearer TOKEN"
            raise Refusal(401, text, headers={"WWW-Authenticate": "Bearer"})
        self.client = given if tokens else self.client_address[0]

    def respond(self, status: int, body: bytes | None, kind: str, headers: dict | None = None) -> None:
        """Sends a response, or only its head if there is no body.

        Raises ClientLeft if the client does not take it in time.
        """
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
            self.connection.settimeout(WRITE_SECONDS)
            self.end_headers()
        if body and not self.head_only:
            self.write(body)

    def write(self, content: bytes) -> None:
        """Sends bytes. Raises ClientLeft if the client does not take them in time."""
        with client_errors():
            self.connection.settimeout(WRITE_SECONDS + len(content) / SLOWEST_READER)
            self.wfile.write(content)

    def refuse(self, refusal: Refusal) -> None:
        with suppress(ClientLeft):
            self.respond(refusal.status, self.error_body(refusal), "application/json", refusal.headers)

    def error_body(self, refusal: Refusal) -> bytes:
        kind = "server_error" if refusal.status >= 500 else "invalid_request"
        code = re.sub(r"\W", "_", HTTPStatus(refusal.status).phrase.lower())
        error = dict(zip(ERROR_FIELDS, (str(refusal), kind, refusal.param, code, self.id), strict=True))
        return json.dumps({"error": error}).encode() + b"\n"

    # -- routes

    def get_probe(self, request: Request) -> None:
        """Health: whether the engine makes progress; if not, restart the server. Readiness: whether a model
        is loaded and the server is not shutting down."""
        if "ready" in self.route:
            self.model()
        if not self.engine.alive() or self.engine.closing and "ready" in self.route:
            raise shutting_down()
        self.respond(200, b"ok\n", "text/plain")

    def get_metrics(self, request: Request) -> None:
        """Metrics in the text format of Prometheus."""
        page = self.server.metrics.page(gauges(self.server)).encode()
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
        if job.repeatable and request.method != "POST":  # the same request gives the same picture
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
        self.server.issue([f"{self.id}-{k}" for k in range(len(job.drawings))], job.model.hash)
        if as_json:
            content = {"images": [self.image_content(job, k, drawing.pixels) for k, drawing in enumerate(job.drawings)]}
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
            self.write(f"retry: 600000\nid: {self.id}\n".encode())
            steps, sent = job.facts["steps"], [0] * len(job.drawings)
            wait = self.engine.estimate(job)
            self.send("queued", {"request_id": self.id, "images": len(sent), "steps": steps, "seconds": wait})
            while min(sent) < steps and not job.error and (remaining := job.deadline - time.monotonic()) > 0:
                if not job.news.wait(min(remaining, HEARTBEAT_SECONDS)):
                    self.write(b": still here\n\n")
                job.news.clear()
                for k, drawing in enumerate(job.drawings):
                    step, pixels = drawing.preview
                    if step > sent[k] and time.monotonic() < job.deadline:
                        content = {"image": k, "step": step, "steps": steps, **self.image_content(job, k, pixels)}
                        if step == steps:
                            self.server.issue([content["id"]], job.model.hash)
                        self.send("image" if step == steps else "step", content)
                        sent[k] = step
        if min(sent) == steps:
            self.send("done", {"images": len(sent)})
            return self.save_images(job)
        error = job.error or self.engine.too_late()
        self.status = error.status
        self.send("error", json.loads(self.error_body(error)))

    def send(self, event: str, content: dict) -> None:
        self.write(f"event: {event}\ndata: {json.dumps(content)}\n\n".encode())

    def get_page(self, request: Request) -> None:
        """The page for people."""
        page = PAGE.read_bytes()
        parts = re.findall(rb"<(script|style)>(.*?)</", page, re.DOTALL)
        hashes = {name.decode(): base64.b64encode(hashlib.sha256(text).digest()).decode() for name, text in parts}
        policy = "default-src 'none'; img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
        policy += "frame-ancestors 'none'" + "".join(f"; {name}-src 'sha256-{hashes[name]}'" for name in hashes)
        self.respond(200, page, "text/html; charset=utf-8", {"Content-Security-Policy": policy})

    def post_feedback(self, request: Request) -> None:
        """Records a vote on an image: a JSON object with the ID of the image and the vote. One vote an image."""
        content = self.json_body(request)
        image, vote = content.get("image"), content.get("vote")
        if content.keys() != {"image", "vote"} or vote not in VOTES or not isinstance(image, str):
            raise Refusal(400, f"the body must be an object with image, an ID, and vote, one of: {', '.join(VOTES)}")
        model, store = self.server.take_vote(image), self.server.store
        self.server.metrics.add("papilio_feedback_total", vote=vote, model=model[:12])
        if store:
            facts = {"image": image, "vote": vote, "model": model, "time": f"{time.time():.3f}"}
            self.server.save(partial(store.save_vote, facts))
        self.respond(200, b"{}\n", "application/json")

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
        flags = sample.parameters(model)
        if self.body:
            given = parse_values(self.json_body(request).items(), flags, Flag.check)
        else:
            given = parse_values(parse_query(request.query), flags, Flag.parse)
        wanted = sample.DrawRequest(**fields | given)
        try:
            with self.server.planning:
                table = wanted.table(model.schedule)
        except InputError as error:  # for example, steps_offset goes beyond the last timestep
            raise Refusal(400, str(error), "eta" if "eta" in str(error) else "steps") from error
        images = wanted.images(model.network.config)
        exact = self.server.engine.exact
        facts = wanted.facts(model, len(table), exact) | sample.grid_facts(model.network.config, images)
        drawings = [sample.Drawing(seed, label, table, wanted.guidance) for label, seed in images]
        deadline = time.monotonic() + self.server.seconds
        job = Job(model, drawings, facts, self.connection, self.client, deadline, "seed" in given)
        if job.work > self.server.max_cost:
            most = f"images x steps may be at most {self.server.max_cost}; guidance counts twice"
            raise Refusal(400, most, "n_images")
        return job

    def json_body(self, request: Request) -> dict:
        """Parses the body, which must be a JSON object. Raises Refusal."""
        if not re.match(r"application/json\s*(;|$)", request.headers.get("content-type", "").lower()):
            raise Refusal(415, "a body must be JSON: send Content-Type: application/json")
        if request.query:
            raise Refusal(400, "send the parameters in the query or in the body, not in both")
        try:
            return unet.parse_object(self.body)
        except ValueError as error:
            raise Refusal(400, "the body must be a JSON object in UTF-8, in which no name occurs twice") from error

    @contextmanager
    def submitted(self, job: Job) -> Iterator[None]:
        """Gives the job to the engine and ends it afterwards, whatever happens."""
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
        store = self.server.store
        if store:
            images = [(drawing.pixels, image_facts(job, drawing)) for drawing in job.drawings]
            self.server.save(partial(store.save, self.id, images))

    def image_content(self, job: Job, k: int, pixels: Tensor) -> dict:
        """Returns what JSON says of image k: its ID, its seed, and its PNG in base64."""
        drawing = job.drawings[k]
        picture = data.encode_png(data.grid(pixels[None], padding=0), image_facts(job, drawing))
        return {"id": f"{self.id}-{k}", "seed": drawing.seed, "png": base64.b64encode(picture).decode()}


def job_headers(job: Job) -> dict:
    return {"X-Seed": str(job.facts["seed"]), "X-Model-Hash": job.model.hash}


def image_facts(job: Job, drawing: sample.Drawing) -> dict:
    own = sample.grid_facts(job.model.network.config, [(drawing.label, drawing.seed)])
    return job.facts | own | {"seed": drawing.seed}


# path: (method of Handler, HTTP methods, media type); the docstring of the method describes the route in /openapi.json
ROUTES = {
    "/": (Handler.get_page, GET, "text/html"),
    "/generate_sample/": (Handler.get_sample, GET_OR_POST, "image/png"),
    "/generate_stream/": (Handler.get_stream, GET, "text/event-stream"),
    "/feedback": (Handler.post_feedback, POST, "application/json"),
    "/openapi.json": (Handler.get_openapi, GET, "application/json"),
    "/metrics": (Handler.get_metrics, GET, "text/plain"),
    **dict.fromkeys(PROBES, (Handler.get_probe, GET, "text/plain")),
}


def openapi(model: sample.Model) -> dict:
    """Returns the OpenAPI document, from the tables of routes and parameters."""
    query = [{"name": name, "in": "query", "schema": flag.schema()} for name, flag in sample.parameters(model).items()]
    values = {row["name"]: row["schema"] for row in query}
    vote = {"image": {"type": "string"}, "vote": {"enum": list(VOTES)}}
    strict = {"type": "object", "additionalProperties": False}
    bodies = {
        "/generate_sample/": strict | {"properties": values},
        "/feedback": strict | {"properties": vote, "required": list(vote)},
    }
    properties = dict.fromkeys(ERROR_FIELDS, {"type": ["string", "null"]})
    error = {"type": "object", "properties": {"error": {"type": "object", "properties": properties}}}
    paths = {}
    for path, (respond, methods, kind) in ROUTES.items():
        operation = {
            "summary": " ".join((respond.__doc__ or "").split()),
            "responses": {
                "200": {"description": "success", "content": {kind: {}}},
                "default": {"description": "an error", "content": {"application/json": {"schema": error}}},
            },
        }
        inputs = {"GET": {"parameters": query if path in GENERATING else []}}
        content = {"application/json": {"schema": bodies.get(path)}}
        inputs["POST"] = {"requestBody": {"content": content, "required": path == "/feedback"}}
        paths[path] = {method.lower(): operation | inputs[method] for method in methods if method in inputs}
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
    store     a served_images.ServedImages, or None
    seconds   time limit of a request, including the queue
    max_cost  image-steps that a request may ask for
    """

    request_queue_size = 128

    def __init__(self, address, engine: Engine, *, hosts=(), tokens=(), store=None, seconds=120.0, max_cost=6400):
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self.hosts = {*LOOPBACK, *map(host_name, (address[0], *hosts))}
        self.engine, self.tokens, self.metrics, self.store = engine, tokens, engine.metrics, store
        self.seconds, self.max_cost = seconds, max_cost
        self.lock = threading.Condition()
        # Half of the descriptors, because equally many rejected connections may still be closing.
        self.max_connections = max(2, min(MAX_CONNECTIONS, (file_limit() - OTHER_FILES) // 2))
        engine.max_jobs = self.max_connections * 7 // 8  # the others are for probes and refusals
        self.planning = threading.Lock()  # one at a time, so that handlers do not compete with the engine for the GIL
        self.issued: OrderedDict = OrderedDict()  # {ID of an image: hash of its model, None after a vote}, oldest first
        self.connections: dict = {}  # {socket: whether a request is in flight}, oldest first
        if store:
            threading.Thread(target=store.save_waiting, args=(self.report_save,), name="saves", daemon=True).start()
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

    def issue(self, images: list[str], model: str) -> None:
        """Remembers the IDs of images, on which clients may vote, and the hash of their model."""
        with self.lock:
            self.issued |= dict.fromkeys(images, model)
            while len(self.issued) > MAX_ISSUED:
                self.issued.popitem(last=False)

    def take_vote(self, image: str) -> str:
        """Returns the model's hash of an image that has no vote yet. Raises Refusal, also the next time."""
        with self.lock:
            if image not in self.issued:
                raise Refusal(404, "this image is not known: it is too old, or from another server", "image")
            model, self.issued[image] = self.issued[image], None
        if model is None:
            raise Refusal(409, "this image has a vote already", "image")
        return model

    def save(self, call: Callable) -> None:
        """Queues a call of the store."""
        try:
            self.store.waiting.put_nowait(call)
        except queue.Full:
            self.report_save([f"more than {served_images.MAX_SAVES} requests wait to be saved"], [])

    def report_save(self, errors: list, deleted: list) -> None:
        for error in errors:
            self.metrics.add("papilio_save_errors_total")
            log(f"not saved: {error}")
        for file in deleted:
            log(f"--save-limit: deleted {file}; a random sample of that day stays")

    def handle_error(self, request, client_address) -> None:
        """Logs an exception of a handler's thread, which socketserver would print."""
        log(traceback.format_exc())

    # -- what handlers and main ask for

    def allows(self, host: str) -> bool:
        """Returns whether the server answers to a host name: one of its hosts, which may be * or *.example.org."""
        suffixes = tuple(name[1:] for name in self.hosts if name.startswith("*"))
        return host in self.hosts or host.endswith(suffixes)

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
        if self.store:
            wait_until_done(self.store.waiting, 1)
        self.server_close()


def gauges(server: "Server") -> dict:
    """Returns the gauges of a server and of its process."""
    engine = server.engine
    with engine.lock:
        model, jobs = engine.model, list(engine.jobs)
    numbers = {
        "papilio_batch_capacity": engine.batch,
        "papilio_queue_requests": len(jobs),
        "papilio_queue_steps": sum(job.work for job in jobs),
        "papilio_queue_capacity_steps": engine.room(server.seconds),
        "papilio_connections": len(server.connections),
        "papilio_worker_up": engine.alive(),
    }
    if server.store:
        numbers["papilio_saved_bytes"] = server.store.bytes
    if model:
        key = telemetry.labelled(
            "papilio_model_info", hash=model.hash, pixels=model.shape[1], precision=model.precision
        )
        numbers[key] = 1
    return numbers | telemetry.process_gauges()


# ---- command line ----------------------------------------------------------------------------------------------------

SERVER_FLAGS = {
    "model": [
        sample.MODEL_FLAG,
        Flag("--model-hash", None, str, "refuse a model with another hash; X-Model-Hash names that of a loaded one"),
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
        Flag("--log", "text", ("text", "json"), "format of the log lines on stderr"),
        Flag("--save-limit", 1000, whole(1), "size limit of the --save folder in MB; above it, random images of the "
             "oldest day are deleted"),
    ],
}  # fmt: skip


def file_limit() -> int:
    """Returns how many file descriptors this process may have."""
    import resource  # not on Windows

    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def host_name(text: str) -> str:
    """Returns a host name or address in lower case, as in a Host header; * and *.example.org are allowed.

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
    if args.log == "json":
        LOG_AS_JSON.set()
    tokens = read_tokens(args.token_file)
    device = sample.choose_device(args.device)
    source = args.model, device, sample.choose_precision(device, args.precision), args.model_hash
    store = served_images.ServedImages(args.save, args.save_limit * 10**6) if args.save else None
    engine = Engine(args.batch_size, max(args.queue, args.max_cost), bool(args.exact), telemetry.Metrics())
    server = Server(
        (args.host, args.port),
        engine,
        hosts=args.allow_host or (),
        tokens=tokens,
        store=store,
        seconds=args.timeout,
        max_cost=args.max_cost,
    )
    signals, endings = [], {signal.SIGTERM, signal.SIGINT}
    caught = (*endings, signal.SIGHUP)
    handlers = {number: signal.signal(number, lambda number, frame: signals.append(number)) for number in caught}
    threading.Thread(target=server.serve_forever, args=(0.1,), daemon=True).start()

    def begin() -> None:
        engine.load(*source)
        engine.thread.start()
        if host_name(args.host) not in LOOPBACK and not tokens:
            log("WARNING: anyone who reaches this address may use it; --token-file asks for a token")
        log(f"listening on http://{host_name(server.server_address[0])}:{server.server_address[1]}")

    beginning = engine.loader.submit(begin)
    while engine.alive() and not endings & set(signals):
        time.sleep(0.1)  # polled: a signal delivered to another thread would not interrupt a longer wait
        if beginning.done() and beginning.exception():
            server.drain()
            for number, handler in handlers.items():
                signal.signal(number, handler)
            raise beginning.exception()
        if signal.SIGHUP in signals and beginning.done():
            signals.remove(signal.SIGHUP)
            engine.loader.submit(engine.reload, *source)
            server.reload_tokens(args.token_file)
    healthy = engine.alive()
    log("shutting down" if healthy else "the engine makes no progress: leaving with an error")
    for number in endings:  # a second signal exits at once; by default, PID 1 would ignore it
        signal.signal(number, lambda number, frame: os._exit(128 + number))
    server.drain()
    wait_until_done(LOG, 1)
    os._exit(0 if healthy else 1)  # sys.exit would abort if a thread is still in a step or writes a line


def main(argv: Sequence[str] | None = None) -> int:
    parser = data.Parser("server.py", "Serve images over HTTP.", __doc__)
    data.add_flags(parser, SERVER_FLAGS)
    args = parser.parse_args(argv)
    sample.set_threads()
    return data.exit_status(lambda: serve(args))


if __name__ == "__main__":
    sys.exit(main())
