"""The server stands: every odd request is answered and leaves nothing behind, and no image depends on the others."""

import base64
import hashlib
import io
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlencode

import numpy as np
import pytest
import torch
from PIL import Image

import data
import ddpm
import monitor
import sample
import server
from builtin import served_images, telemetry
from builtin.served_images import ServedImages
from data import InputError
from tests.conftest import status_of
from tests.test_sample import NAMES, make_model

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the server needs Linux or macOS")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of three classes and a label for none of them."""
    return make_model(tmp_path_factory.mktemp("served") / "m", num_class_embeds=4, class_names=NAMES)


@contextmanager
def serving(folder, *, work=True, batch=4, capacity=10**6, exact=False, precision="fp32", **options):
    """A server in this process on a free port; its engine at rest unless it is to `work`."""
    engine = server.Engine(batch, capacity, exact, telemetry.Metrics())
    served = server.Server(("127.0.0.1", 0), engine, **options)
    served.port = served.server_address[1]
    listening = threading.Thread(target=served.serve_forever, args=(0.05,), daemon=True)
    listening.start()
    try:
        engine.load(folder, torch.device("cpu"), precision)
        if work:
            engine.thread.start()
        yield served
    finally:
        served.drain()
        listening.join()
        assert not engine.thread.is_alive()


@pytest.fixture(scope="module")
def served(folder):
    with serving(folder) as running:
        yield running


def connect(running) -> socket.socket:
    return socket.create_connection(("127.0.0.1", running.port), timeout=30)


def read_answer(connection: socket.socket) -> tuple[int, dict, bytes]:
    received = b""
    while part := connection.recv(65536):
        received += part
    head, _, body = received.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines)
    if body:
        assert "content-length" not in headers or len(body) == int(headers["content-length"])
    return int(first.split()[1]), headers, body


def send(running, *parts: bytes, half_close=False) -> tuple[int, dict, bytes]:
    with connect(running) as connection:
        for part in parts:
            connection.sendall(part)
        if half_close:
            connection.shutdown(socket.SHUT_WR)
        return read_answer(connection)


def head(target: str, *headers: str, method="GET", host="127.0.0.1") -> bytes:
    lines = [f"{method} {target} HTTP/1.1", f"Host: {host}", *headers]
    return "\r\n".join([*lines, "", ""]).encode("utf-8", "surrogateescape")


def get(running, path="/generate_sample/", *headers: str, method="GET", **query):
    target = f"{path}?{urlencode(query)}" if query else path
    return send(running, head(target, *headers, method=method))


def pixels(body: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(body)))


def gauges(running) -> dict[str, float]:
    page = get(running, "/metrics")[2].decode()
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in page.splitlines() if line[0] != "#"}


def footprint() -> tuple[int, int]:
    """Threads and descriptors of this process."""
    return threading.active_count(), len(os.listdir("/dev/fd"))


@contextmanager
def nothing_left(running, seconds=20.0):
    """What is done inside leaves no thread, descriptor or place in the queue behind, and a good request still works."""
    wait_until(lambda: not running.connections)
    before = footprint()
    yield
    assert get(running, steps=1, seed=1)[0] in (200, 401)
    wait_until(lambda: not running.connections and not running.engine.jobs and footprint() == before, seconds)


def wait_until(condition, seconds=20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.005)


# ---- one request after the other -------------------------------------------------------------------------------------


def test_a_picture_is_that_of_sample(served, folder, tmp_path):
    """The same images, laid out and described the same."""
    status, headers, body = get(served, n_images=5, seed=3, steps=4, **{"class": "bee"})
    assert status == 200 and headers["content-type"] == "image/png" and headers["x-seed"] == "3"
    out = tmp_path / "x.png"
    flags = ["--model", str(folder), "--precision", "fp32", "--steps", "4", "-n", "5", "--seed", "3"]
    assert sample.main([*flags, "--class", "bee", "--out", str(out)]) == 0
    theirs = Image.open(out)
    assert Image.open(io.BytesIO(body)).text == theirs.text and headers["x-model-hash"] == theirs.text["model"]
    assert np.abs(pixels(body).astype(int) - np.asarray(theirs)).max() <= 1 and pixels(body).std() > 5


def test_without_a_seed_one_is_told(served):
    status, headers, body = get(served, steps=2)
    again = get(served, steps=2, seed=headers["x-seed"])
    assert status == 200 and body == again[2] and headers["cache-control"] == "no-store"
    assert get(served, steps=2)[1]["x-seed"] != headers["x-seed"]


def test_separate_pictures_as_json(served):
    """Each with its seed, which never passes 2^63 - 1."""
    query = {"steps": 2, "n_images": 3, "seed": 2**63 - 2, "class": "bee"}
    status, headers, body = get(served, "/generate_sample/", "Accept: application/json", method="POST", **query)
    assert status == 200 and headers["content-type"] == "application/json" and "etag" not in headers
    images = json.loads(body)["images"]
    assert [image["seed"] for image in images] == [2**63 - 2, 2**63 - 1, 0]
    grid = pixels(get(served, **query)[2])
    for k, image in enumerate(images):
        picture = base64.b64decode(image["png"])
        y, x = 2 + 18 * (k // 2), 2 + 18 * (k % 2)
        assert np.abs(pixels(picture).astype(int) - grid[y : y + 16, x : x + 16]).max() <= 1
        assert Image.open(io.BytesIO(picture)).text["seed"] == str(image["seed"])
    assert get(served, method="POST", **query)[2].startswith(b"\x89PNG")


def post(running, path: str, content: dict, *headers: str):
    body = json.dumps(content).encode()
    lines = ("Content-Type: application/json", f"Content-Length: {len(body)}", *headers)
    return send(running, head(path, *lines, method="POST") + body)


def test_a_json_body_asks_as_a_query_does(served):
    query = {"steps": 3, "n_images": 2, "seed": 11, "class": "bee", "guidance": 1.5, "sampler": "ddim", "eta": 0.5}
    answer = post(served, "/generate_sample/", query)
    assert answer[0] == 200 and answer[2] == get(served, **query)[2] and "etag" not in answer[1]
    error = json.loads(post(served, "/generate_sample/", {"steps": "3"})[2])["error"]
    assert error["param"] == "steps" and "whole number from 1 to 1000" in error["message"]
    body = json.dumps(query).encode()
    with nothing_left(served):  # in drips, and not all of it
        asked = head(
            "/generate_sample/", "Content-Type: application/json", f"Content-Length: {len(body)}", method="POST"
        )
        assert send(served, asked, *(body[i : i + 9] for i in range(0, len(body), 9)))[2] == answer[2]
        with connect(served) as leaving:
            leaving.sendall(asked + body[:-1])
            leaving.shutdown(socket.SHUT_WR)
            assert leaving.recv(100) == b""


def test_votes_are_counted_once(folder, tmp_path):
    """For images that were made here, in the log of the day, and by vote and model in the metrics."""
    store = ServedImages(tmp_path, 10**7)
    with serving(folder, store=store) as running:
        asked = {"steps": 1, "n_images": 2, "seed": 4}
        images = json.loads(post(running, "/generate_sample/", asked, "Accept: application/json")[2])["images"]
        streamed = [
            content for name, content in events(get(running, "/generate_stream/", **asked)[2]) if name == "image"
        ]
        plain = get(running, steps=1)[1]["x-request-id"] + "-0"
        names = [image["id"] for image in (*images, *streamed)] + [plain]
        assert len(set(names)) == 5
        for name, vote in zip(names, ("up", "down", "up", "up", "down"), strict=True):
            assert post(running, "/feedback", {"image": name, "vote": vote})[0] == 200
            again = post(running, "/feedback", {"image": name, "vote": "up"})
            assert again[0] == 409 and "has a vote already" in json.loads(again[2])["error"]["message"]
        assert post(running, "/feedback", {"image": names[0], "vote": "up"}, "X: 1")[0] == 409
        for other in (names[0][:-1] + "2", "", "../x"):
            assert post(running, "/feedback", {"image": other, "vote": "up"})[0] == 404
        counted, model = gauges(running), running.engine.model.hash
        assert counted[f'papilio_feedback_total{{vote="up",model="{model[:12]}"}}'] == 3
        assert counted[f'papilio_feedback_total{{vote="down",model="{model[:12]}"}}'] == 2
        wait_until(lambda: not store.waiting.unfinished_tasks)
    (day,) = store.days()
    lines = [json.loads(line) for log in day.glob("*.jsonl") for line in log.read_text().splitlines()]
    votes = {line["image"]: (line["vote"], line["model"]) for line in lines if "vote" in line}
    assert votes == {name: (vote, model) for name, vote in zip(names, ("up", "down", "up", "up", "down"), strict=True)}
    assert {facts["file"] for facts, _ in saved_images(store)} == {f"{name}.png" for name in names}


def test_only_finished_images_can_be_voted_on(folder):
    with serving(folder, work=False) as running:
        with connect(running) as connection:
            connection.sendall(head("/generate_stream/?n_images=3&steps=1"))
            found = re.search(rb"^id: (\w+)$", connection.recv(10_000) + connection.recv(10_000), re.MULTILINE)
        vote = {"image": f"{found[1].decode()}-0", "vote": "up"}
        assert post(running, "/feedback", vote)[0] == 404
        running.engine.thread.start()
        wait_until(lambda: not running.engine.jobs)
        assert post(running, "/feedback", vote)[0] == 404


def test_slow_bodies_leave_room_for_probes(folder, monkeypatch):
    monkeypatch.setattr(server, "MAX_CONNECTIONS", 4)
    lines = ("Content-Type: application/json", "Content-Length: 10")
    with serving(folder) as running:
        slow = [connect(running) for _ in range(8)]
        for client in slow:
            with suppress(OSError):  # some are closed to make room
                client.sendall(head("/feedback", *lines, method="POST") + b"{")
        assert get(running, "/healthz")[0] == 200 and get(running, steps=1)[0] == 200
        for client in slow:
            client.close()


def test_only_the_newest_images_can_be_voted_on(folder, monkeypatch):
    monkeypatch.setattr(server, "MAX_ISSUED", 3)
    with serving(folder) as running:
        names = [get(running, steps=1)[1]["x-request-id"] + "-0" for _ in range(5)]
        assert [post(running, "/feedback", {"image": name, "vote": "up"})[0] for name in names] == [404] * 2 + [200] * 3


def test_the_page_and_its_policy(served, folder):
    """Its own script and style are all that it may run; a server with tokens shows it without one."""
    status, headers, body = get(served, "/")
    assert status == 200 and headers["content-type"] == "text/html; charset=utf-8" and len(body.splitlines()) < 400
    policy = dict(part.strip().split(" ", 1) for part in headers["content-security-policy"].split(";"))
    assert policy["default-src"] == policy["frame-ancestors"] == "'none'" and policy["connect-src"] == "'self'"
    for name in ("script", "style"):
        (text,) = re.findall(rb"<%b>(.*?)</%b>" % (name.encode(), name.encode()), body, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text).digest()).decode()
        assert policy[f"{name}-src"] == f"'sha256-{digest.lower()}'"  # header values are in lower case here
    assert not re.search(rb"(src|href|url)\s*[=(]\s*[\"']?(https?:)?//|\bon\w+=|style=", body)
    with serving(folder, tokens=(b"correct-horse",)) as running:
        assert get(running, "/")[0] == 200 and get(running, "/openapi.json")[0] == 401


def test_a_stream_tells_how_long_it_may_take(folder):
    with serving(folder, work=False) as running:
        running.engine.rate = 10.0
        running.engine.submit(job_of(running.engine.model, 4, 10))  # 40 predictions, which go after those below
        job = job_of(running.engine.model, 1, 20)
        running.engine.submit(job)
        assert running.engine.estimate(job) == 4.0
        running.engine.submit(job_of(running.engine.model, 1, 5))
        assert running.engine.estimate(job) == 4.5
        for waiting in list(running.engine.jobs):
            running.engine.end(waiting)


def test_a_model_without_classes_says_so(tmp_path):
    with serving(make_model(tmp_path / "m")) as running:
        for name in ("class", "guidance"):
            status, _, body = get(running, **{name: 1})
            error = json.loads(body)["error"]
            assert status == 400 and error["param"] == name and "trained with classes" in error["message"]
        assert (
            "class"
            not in json.loads(get(running, "/openapi.json")[2])["paths"]["/generate_sample/"]["get"]["parameters"]
        )


def test_the_seed_systems_line_works(served):
    """It asked for JSON and got a PNG."""
    answer = get(served, "/generate_sample/", "accept: application/json", steps=2, n_images=1, seed=0)
    assert answer[0] == 200 and answer[2].startswith(b"\x89PNG")
    assert get(served, "/generate_sample", steps=2, n_images=1, seed=0)[2] == answer[2]


def test_head_samples_nothing(served):
    before = gauges(served).get("papilio_images_total", 0)
    for path in server.ROUTES.keys() - {"/feedback"}:
        status, headers, body = get(served, path, method="HEAD")
        assert (status, body) == (200, b"") and headers["content-type"] == get(served, path)[1]["content-type"]
    assert gauges(served)["papilio_images_total"] == before + 2  # those of the two GETs


def test_a_known_picture_is_not_drawn_again(served):
    _, headers, _ = get(served, steps=2, seed=5)
    before = gauges(served)["papilio_steps_total"]
    status, again, body = get(served, "/generate_sample/", f'If-None-Match: {headers["etag"]}, "x"', steps=2, seed=5)
    assert (status, body) == (304, b"") and again["etag"] == headers["etag"].lower()
    assert get(served, "/generate_sample/", "If-None-Match: *", steps=2, seed=5)[0] == 304
    spelled = head("/generate_sample/?%73teps=2&%73eed=5", f"If-None-Match: {headers['etag']}")
    assert send(served, spelled)[0] == 304 and gauges(served)["papilio_steps_total"] == before
    for other in (
        {"steps": 3},
        {"steps": 2, "sampler": "ddim"},
        {"steps": 2, "guidance": 2},
        {"steps": 2, "class": "ant"},
    ):
        assert get(served, "/generate_sample/", f"If-None-Match: {headers['etag']}", seed=5, **other)[0] == 200


def test_eta_and_spacing_are_those_of_sample(served, folder, tmp_path):
    """A parameter is one row for the command line and the server."""
    query = {"n_images": 2, "seed": 3, "steps": 4, "sampler": "ddim", "eta": 0.75, "spacing": "logsnr", "class": "bee"}
    _, _, body = get(served, **query)
    flags = ["--model", str(folder), "--precision", "fp32", "--steps", "4", "-n", "2", "--seed", "3", "--class", "bee"]
    flags += ["--sampler", "ddim", "--eta", "0.75", "--spacing", "logsnr", "--out", str(tmp_path / "x.png")]
    assert sample.main(flags) == 0
    theirs = Image.open(tmp_path / "x.png")
    assert Image.open(io.BytesIO(body)).text == theirs.text and theirs.text["eta"] == "0.75"
    assert np.abs(pixels(body).astype(int) - np.asarray(theirs)).max() <= 1
    for other in ({"eta": 0.25}, {"spacing": "leading"}):
        assert np.abs(pixels(get(served, **query | other)[2]).astype(int) - np.asarray(theirs)).max() > 1
    status, _, body = get(served, **query | {"sampler": "ddpm"})
    assert (status, json.loads(body)["error"]["param"]) == (400, "eta")


HOST = b"Host: 127.0.0.1\r\n"
GOOD = "/generate_sample/?steps=1&seed=1"
RAW = [  # what is sent, the status that it gets
    # request line
    (b"GET HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    (b"GET / x HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    (b"GET\t/\tHTTP/1.1\r\n" + HOST + b"\r\n", 400),
    (b"G\0ET / HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    (b"BREW / HTTP/1.1\r\n" + HOST + b"\r\n", 501),
    (b"get / HTTP/1.1\r\n" + HOST + b"\r\n", 501),
    (b"GET /\r\n\r\n", 400),
    (b"GET / HTTP/2.0\r\n" + HOST + b"\r\n", 505),
    (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
    (b"GET / HTTP/1.11\r\n" + HOST + b"\r\n", 400),
    (b"GET / ICY/1.1\r\n" + HOST + b"\r\n", 400),
    (b"GET * HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    (b"GET 127.0.0.1:80 HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    (b"GET generate_sample/ HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    (b"GET http://evil.example/healthz HTTP/1.1\r\n" + HOST + b"\r\n", 200),  # a probe asks by any name
    (b"GET http://evil.example" + GOOD.encode() + b" HTTP/1.1\r\n" + HOST + b"\r\n", 421),
    (b"GET http://localhost" + GOOD.encode() + b" HTTP/1.1\r\n" + HOST + b"\r\n", 200),
    (b"GET http://localhost" + GOOD.encode() + b" HTTP/1.1\r\n" + HOST + HOST + b"\r\n", 400),
    (b"GET /\xff HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    (b"GET /\x07 HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    (b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n" + HOST + b"\r\n", 414),
    (b"GET /" + b"a" * 9_000 + b" HTTP/1.1\r\n" + HOST + b"\r\n", 414),
    (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200), 400),
    (b"\r\n\r\n", 400),
    (b"POST " + GOOD.encode() + b" HTTP/1.1\r\n" + HOST + b"\r\n", 200),
    (b"POST " + GOOD.encode() + b" HTTP/1.1\r\n" + HOST + b"Content-Length: 3\r\n\r\nabc", 415),
    (b"POST " + GOOD.encode() + b" HTTP/1.1\r\n" + HOST + b"Content-Length: 16385\r\n\r\nabc", 413),
    (b"POST " + GOOD.encode() + b" HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 411),
    *((b"POST /generate_sample/ HTTP/1.1\r\n" + HOST + b"Content-Type: " + kind + b"\r\nContent-Length: " +
       str(len(body)).encode() + b"\r\n\r\n" + body, status) for kind, body, status in (
        (b"application/json", b'{"steps": 1, "seed": 9223372036854775807, "n_images": 2}', 200),
        (b"Application/JSON; charset=utf-8", b' {"steps": 1, "class": "bee", "guidance": 2}\r\n', 200),
        (b"application/json", b'{"steps": 1.0, "guidance": 2}', 200),
        (b"text/plain", b'{"steps": 1}', 415), (b"application/jsonx", b"{}", 415),
        *((b"application/json", body, 400) for body in (
            b"{", b"[]", b"null", b'"steps"', b"\xff", b"{}{}", b'{"steps": 1, "steps": 2}', b"[" * 16000,
            b'{"steps": "1"}', b'{"steps": 1.5}', b'{"steps": true}', b'{"steps": null}',
            b'{"steps": 0}', b'{"steps": 1001}', b'{"steps": [1]}', b'{"steps": {}}', b'{"steps": NaN}',
            b'{"steps": 1e300}', b'{"seed": 9223372036854775808}', b'{"seed": -1}', b'{"guidance": Infinity}',
            b'{"guidance": 1e400}', b'{"guidance": "2"}', b'{"class": "dog"}', b'{"class": 1}', b'{"sampler": 3}',
            b'{"n_images": 65}', b'{"stream": 1}', b'{"n": 1}', b'{"steps": 1000, "n_images": 64}', b'{"": 1}')))),
    (head(GOOD, "Content-Type: application/json", "Content-Length: 12", method="POST") + b'{"steps": 1}', 400),
    (head("/", method="POST"), 405),
    (head("/", "Content-Length: 3") + b"abc", 413),
    (head("/"), 200),
    (head("/", host="evil.example"), 421),
    (head("/feedback"), 405),
    *((head("/feedback", "Content-Type: application/json", f"Content-Length: {len(body)}", method="POST") + body,
       status) for body, status in (
                           (b'{"image": "0-0", "vote": "up"}', 404), (b'{"image": "0-0", "vote": "sideways"}', 400),
                           (b'{"image": 3, "vote": "up"}', 400), (b'{"vote": "up"}', 400), (b"{}", 400),
                           (b'{"image": "0-0", "vote": "up", "more": 1}', 400),
                           (b'{"image": "0-0", "vote": ["up"]}', 400),
                           (b"\xff", 400))),
    (b"POST /metrics HTTP/1.1\r\n" + HOST + b"Content-Length: 3\r\n\r\nabc", 405),  # before 413
    (b"PUT " + GOOD.encode() + b" HTTP/1.1\r\n" + HOST + b"\r\n", 405),
    (b"OPTIONS " + GOOD.encode() + b" HTTP/1.1\r\n" + HOST + b"\r\n", 405),
    (b"GET " + GOOD.encode() + b" HTTP/1.0\r\n" + HOST + b"\r\n", 200),
    (b"GET /healthz HTTP/1.0\r\n\r\n", 200),
    (b"GET " + GOOD.encode() + b" HTTP/1.0\r\n\r\n", 421),
    # headers
    (b"GET /healthz HTTP/1.1\r\n\r\n", 400),
    (b"GET /healthz HTTP/1.1\r\n" + HOST + HOST + b"\r\n", 400),
    (b"GET " + GOOD.encode() + b" HTTP/1.1\r\nHost: evil.example\r\n\r\n", 421),
    (b"GET " + GOOD.encode() + b" HTTP/1.1\r\nHost: 127.0.0.1.evil.example\r\n\r\n", 421),
    (b"GET " + GOOD.encode() + b" HTTP/1.1\r\nHost: localhost:8000\r\n\r\n", 200),
    (b"GET " + GOOD.encode() + b" HTTP/1.1\r\nHost: [::1]:8000\r\n\r\n", 200),
    (b"GET " + GOOD.encode() + b" HTTP/1.1\r\nHost: localhost:\r\n\r\n", 200),
    (b"GET " + GOOD.encode() + b" HTTP/1.1\r\nHost: a@127.0.0.1\r\n\r\n", 400),
    *((b"GET /healthz HTTP/1.1\r\n" + HOST + line + b"\r\n\r\n", 400) for line in (
        b"X : 1", b"X: 1\r\n folded", b"X: \0", b"X: \x07", b"X: \x7f", b"X: a\rb", b"X: a\nY: b", b"no colon",
        b": empty",
        "Ä: 1".encode(), b"Content-Length: -1", b"Content-Length: +1", b"Content-Length: 0_1",
        "Content-Length: ٣".encode(), b"Content-Length: 5, 5", b"Content-Length: 5\r\nContent-Length: 5",
        b"Content-Length: 5\r\nContent-Length: 6", b"Content-Length: 0\r\nTransfer-Encoding: chunked",
        b"Content-Length:", b"Content-Length: " + b"9" * 5000)),
    (b"GET /healthz HTTP/1.1\r\n" + HOST + b"X: 1\r\n" * 100 + b"\r\n", 431),
    (b"GET /healthz HTTP/1.1\r\n" + HOST + b"X: 1\r\n" * 99 + b"\r\n", 200),
    (b"GET /healthz HTTP/1.1\r\n" + HOST + b"X: " + b"a" * 70_000 + b"\r\n\r\n", 431),
    (b"GET /healthz HTTP/1.1\r\n" + HOST + (b"X: " + b"a" * 1000 + b"\r\n") * 6000 + b"\r\n", 431),
    (b"GET /healthz HTTP/1.1\n" + HOST + b"\r\n", 400),
    # framing
    (b"GET /healthz HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 413),
    (b"GET /healthz HTTP/1.1\r\n" + HOST + b"Content-Length: 40\r\n\r\nGET /metrics HTTP/1.1\r\n" + HOST + b"\r\n",
     413),
    (b"GET /healthz HTTP/1.1\r\n" + HOST + b"Content-Length: 1000000000000\r\n\r\n", 413),
    (b"GET /healthz HTTP/1.1\r\n" + HOST + b"Content-Length: 10\r\n\r\nabc", 413),
    (b"GET /healthz HTTP/1.1\r\n" + HOST + b"Content-Length: 0\r\n\r\n", 200),
    (b"GET /healthz HTTP/1.1\r\n" + HOST + b"Expect: the unexpected\r\n\r\n", 417),
    # query and path
    *((head(f"/generate_sample/?{query}"), 400) for query in (
        *(f"steps={value}" for value in ("0", "-1", "1.5", "1e3", "0x10", "NaN", "inf", "+3", "%2B3", "", "1_0",
                                         "%207%20",
                                         "%D9%A3", "9" * 5000, "1001", "%00", "1%001")),
        "steps", "steps=1&steps=2", "steps=1&step=2", "seed=18446744073709551616", "seed=9223372036854775808",
        "seed=%ff",
        "seed=%", "seed=%zz", "n_images=0", "n_images=65", "sampler=euler", "class=dog", "class=ant,bee", "class=all",
        "guidance=nan", "guidance=-1", "guidance=1e9", "guidance=21", "&", "a=b&" * 1000, "steps=1000&n_images=64",
        "steps=1000&n_images=4&guidance=2", "%73teps=0", "stream=1")),
    (head("/generate_sample/?%73teps=1&seed=9223372036854775807&n_images=2"), 200),
    (head("/generate_sample/?class=cat&guidance=0.5&steps=1"), 200),
    (head("/generate_sample/?"), 200),
    *((head(target), 404) for target in (
        "//evil.example", "/..%2f..%2fetc/passwd", "/%2e%2e/", "/generate_sample//", "/GENERATE_SAMPLE/",
        "/static/../x")),
    *((head(target), 400) for target in ("/\\evil", "/<script>", "/#a", "/%zz|")),
    # access
    (head(GOOD, "Origin: http://evil.example"), 403),
    (head(GOOD, "Origin: null"), 403),
    (head(GOOD, "Origin: http://localhost:3000"), 200),
    (head(GOOD, "Origin: http://127.0.0.1"), 200),
    (head(GOOD, "Sec-Fetch-Site: cross-site"), 403),
    (head(GOOD, "Sec-Fetch-Site: same-origin"), 200),
    (head("/metrics", "Sec-Fetch-Site: cross-site"), 200),
    *((head(GOOD, "Sec-Fetch-Site: cross-site", f"Sec-Fetch-Mode: {mode}", f"Sec-Fetch-Dest: {dest}"), status)
      for mode, dest, status in (("navigate", "document", 200), ("navigate", "iframe", 403), ("no-cors", "image", 403),
                                 ("cors", "empty", 403))),
    (head("/metrics", host="10.0.0.7:8000"), 200),  # by the address of a pod
    (head("/metrics", host="[fd00::7]:8000"), 200),
    (head("/metrics", host="evil.example"), 421),
    (head(GOOD, host="10.0.0.7:8000"), 421),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(RAW)))
def test_odd_requests(served, number):
    request, expected = RAW[number]
    with nothing_left(served):
        status, headers, body = send(served, request)
        assert status == expected
        if status >= 400:
            error = json.loads(body)["error"]
            assert set(error) == {"message", "type", "param", "code", "request_id"}
            assert error["request_id"] == headers["x-request-id"]
            assert not re.search(r"Traceback|evil|script>|\.py|9{20}", body.decode()) and str(ROOT) not in body.decode()
        assert headers["connection"] == "close" and "python" not in str(headers).lower()
        assert status != 405 or headers["allow"].startswith("post" if b"feedback" in request else "get, head")


def test_errors_name_their_parameter(served):
    for query, param in (
        ("steps=0", "steps"),
        ("class=dog", "class"),
        ("steps=1000&n_images=64", "n_images"),
        ("a=1", None),
    ):
        error = json.loads(send(served, head(f"/generate_sample/?{query}"))[2])["error"]
        assert error["param"] == param and (param is None or param in error["message"] or "images" in error["message"])


def test_a_head_in_drips_is_read_and_one_too_slow_is_not(served, monkeypatch):
    with nothing_left(served):
        request = head("/healthz")
        assert send(served, *(request[i : i + 1] for i in range(len(request))))[0] == 200
    monkeypatch.setattr(server, "HEAD_SECONDS", 0.3)
    with nothing_left(served):
        assert send(served, b"GET /heal")[0] == 408  # and then nothing
        with connect(served) as dripping, suppress(BrokenPipeError, ConnectionResetError):
            begin = time.monotonic()
            for _ in range(100):
                dripping.sendall(b"G")
                time.sleep(0.05)
                if time.monotonic() - begin > 0.5:
                    break
            assert read_answer(dripping)[0] == 408


def test_a_silent_a_resetting_and_a_pipelining_client(served):
    with nothing_left(served):
        silent = connect(served)
        pipelined = send(served, head(GOOD) * 50)
        assert pipelined[0] == 200 and pipelined[2].startswith(b"\x89PNG") and pipelined[2].count(b"HTTP/1.1") == 0
        resetting = connect(served)
        resetting.sendall(head("/generate_sample/?n_images=64&steps=3"))
        resetting.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        resetting.close()
        silent.close()
    silent = connect(served)  # a reset in the head is noticed at once
    wait_until(lambda: served.connections)
    silent.sendall(b"GET /heal")
    silent.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    silent.close()
    wait_until(lambda: not served.connections, seconds=5)


def test_a_client_that_never_reads_holds_nothing_up(served, monkeypatch):
    monkeypatch.setattr(server, "WRITE_SECONDS", 0.3)
    with nothing_left(served):
        slow = connect(served)
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.sendall(head("/generate_stream/?n_images=64&steps=20"))
        assert get(served, steps=2)[0] == 200
        wait_until(lambda: not served.engine.jobs, 60)
        slow.close()


def test_a_picture_that_is_not_taken_is_given_up(served, monkeypatch):
    """20 MB: one client never reads, one leaves in the middle."""
    encode = server.data.encode_png
    with nothing_left(served), monkeypatch.context() as patch:
        patch.setattr(server, "WRITE_SECONDS", 0.3)
        patch.setattr(server, "SLOWEST_READER", 10**9)
        patch.setattr(server.data, "encode_png", lambda image, text: encode(image, text) + bytes(20_000_000))
        never, leaving = connect(served), connect(served)
        for client in (never, leaving):
            client.sendall(head(GOOD))
        assert leaving.recv(1000).startswith(b"HTTP/1.1 200")
        leaving.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        leaving.close()
        wait_until(lambda: not served.connections)
        never.close()


def test_half_a_close_counts_as_leaving(served):
    with nothing_left(served):
        before = gauges(served).get("papilio_departures_total", 0)
        status, _, _ = send(served, head("/generate_sample/?n_images=64&steps=100"), half_close=True)
        assert status == 408 and gauges(served)["papilio_departures_total"] == before + 1


def test_tokens(folder):
    with serving(folder, tokens=(b"correct-horse", b"battery-staple")) as running:
        for given in ("Bearer correct-horse", "bearer battery-staple", "Bearer  correct-horse"):
            assert get(running, "/generate_sample/", f"Authorization: {given}", steps=1)[0] == 200
        for line in ("X: 1", "Authorization: Bearer wrong", "Authorization: Bearer ", "Authorization:",
                     "Authorization: Basic correct-horse", "Authorization: correct-horse", "Authorization: Bearer",
                     "Authorization: Bearer Ünïcode", "Authorization: Bearer correct-horse, battery-staple",
                     "Authorization: Bearer correct-hors"):  # fmt: skip
            with nothing_left(running):
                status, headers, body = get(running, "/generate_sample/", line, steps=1)
                assert status == 401 and headers["www-authenticate"] == "bearer" and b"horse" not in body
                assert b"Authorization: Bearer TOKEN" in body
        token = "Authorization: Bearer correct-horse"
        assert send(running, head(GOOD, token, host="behind.a.proxy"))[0] == 200  # the token is enough
        assert send(running, head(GOOD, token, "Origin: https://behind.a.proxy", host="behind.a.proxy"))[0] == 200
        assert send(running, head(GOOD, token, "Origin: https://evil.example", host="behind.a.proxy"))[0] == 403
        assert get(running, "/metrics")[0] == get(running, "/openapi.json")[0] == 401
        for probe in ("/healthz", "/health", "/readyz", "/ready"):
            assert send(running, head(probe, host="10.0.0.7:8000"))[0] == 200


def test_a_heads_cost_is_linear(served, monkeypatch):
    """Spaces before a bad byte, and a head in single bytes: what once took seconds of the processor."""
    begin, searched, bare = time.process_time(), [], server.BARE_LINE_END

    class Counting:
        def search(self, head, seen):
            searched.append(len(head) - seen)
            return bare.search(head, seen)

    for size in (1_000, 30_000):
        line = b"X: " + b" " * size + b"\0"
        assert send(served, b"GET /healthz HTTP/1.1\r\n" + HOST + line + b"\r\n\r\n")[0] == 400

    class Dripping:
        def __init__(self, content):
            self.bytes = iter(content)

        def settimeout(self, seconds):
            pass

        def recv(self, size):
            return bytes([next(self.bytes)])

    content = b"GET / HTTP/1.1\r\n" + HOST + b"X: " + b"a" * 30_000
    monkeypatch.setattr(server, "BARE_LINE_END", Counting())
    assert server.read_head(Dripping(content + b"\r\n\r\nrest"))[0] == content and sum(searched) < 5 * len(content)
    assert time.process_time() - begin < 60  # cubic, it would be hours


# ---- many requests at once -------------------------------------------------------------------------------------------


def in_threads(count: int, work) -> list:
    """work(i) in a thread each; their results, and their first error."""
    results = [None] * count

    def run(i: int) -> None:
        try:
            results[i] = work(i)
        except Exception as error:
            results[i] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results


def queries(count: int) -> list[dict]:
    """Requests of all kinds: lengths, samplers, classes, guidance."""
    rng = random.Random(0)
    found = []
    for seed in range(count):
        query = {"seed": 100 * seed, "steps": rng.randint(1, 12), "n_images": rng.choice([1, 1, 2, 5])}
        query["sampler"] = rng.choice(list(ddpm.SAMPLERS))
        query |= {"class": rng.choice(NAMES)} if rng.random() < 0.5 else {}
        query |= {"guidance": rng.choice([0, 0.5, 1, 2.3])} if rng.random() < 0.5 else {}
        found.append(query)
    return found


def solo(folder, query: dict, tmp_path, *flags, precision="fp32") -> Path:
    """What sample.py draws for a query, by itself."""
    names = {"n_images": "-n"}
    words = [word for key, value in query.items() for word in (names.get(key, f"--{key}"), str(value))]
    out = tmp_path / f"{query['seed']}.png"
    assert sample.main(["--model", str(folder), "--precision", precision, *words, *flags, "--out", str(out)]) == 0
    return out


def test_images_under_load_equal_their_solo_images(folder, tmp_path):
    with serving(folder, batch=5) as running:
        asked = queries(40)
        answers = in_threads(len(asked), lambda i: get(running, **asked[i]))
        counted = gauges(running)
    for query, (status, _, body) in zip(asked, answers, strict=True):
        assert status == 200
        expected = np.asarray(Image.open(solo(folder, query, tmp_path))).astype(int)
        assert np.abs(pixels(body) - expected).max() <= 1
    turns = counted["papilio_step_seconds_count"]
    assert counted["papilio_steps_total"] > 3 * turns  # they did share calls


@pytest.mark.parametrize("precision, count", [("fp32", 24), ("bf16", 8)])
def test_exact_images_under_load_equal_those_of_sample_to_the_byte(folder, tmp_path, precision, count):
    with serving(folder, batch=sample.EXACT_BATCH, exact=True, precision=precision) as running:
        asked, shapes = queries(count), set()
        running.engine.model.network.register_forward_pre_hook(lambda _, inputs: shapes.add(len(inputs[0])))
        answers = in_threads(len(asked), lambda i: get(running, **asked[i]))
        assert answers[0][1]["etag"].startswith('"')
    assert shapes == {sample.EXACT_BATCH, 2 * sample.EXACT_BATCH}  # the latter with guidance
    for query, (_, _, body) in zip(asked, answers, strict=True):
        assert body == solo(folder, query, tmp_path, "--exact", precision=precision).read_bytes()


def test_of_200_at_once_exactly_what_fits_is_admitted(folder):
    """A client may have half of the queue: 16 of 10 image-steps fit into 320. The engine rests meanwhile."""
    with serving(folder, work=False, capacity=320) as running:
        codes, refused = [], threading.Event()

        def ask(i: int) -> int:
            status, headers, _ = get(running, steps=10, seed=i)
            codes.append(status)
            assert status == 200 or int(headers["retry-after"]) >= 1
            if codes.count(429) == 184:
                refused.set()

        asking = threading.Thread(target=in_threads, args=(200, ask))
        asking.start()
        assert refused.wait(60) and gauges(running)["papilio_queue_requests"] == 16
        running.engine.thread.start()
        asking.join()
        assert sorted(codes) == [200] * 16 + [429] * 184


class World:
    """An engine on a clock of its own, on which a prediction takes 1 / rate seconds."""

    def __init__(self, monkeypatch, rate=70.0, believed=1.0, seconds=120.0):
        monkeypatch.setattr(server, "time", SimpleNamespace(monotonic=lambda: self.now))
        self.now, self.rate, self.seconds = 0.0, rate, seconds
        self.engine = server.Engine(8, 20_000, False, telemetry.Metrics())
        self.engine.rate = rate * believed
        self.worked, self.ended, self.refused = 0, {}, []  # predictions, {job: time of its end}, Retry-After

    def submit(self, client="", images=1, steps=10) -> server.Job | None:
        """Submits a request of this moment. Returns None if it is refused."""
        drawings = [sample.Drawing(i, None, range(steps)) for i in range(images)]
        deadline = self.now + self.seconds
        job = server.Job(None, drawings, {}, client=client, deadline=deadline, arrived=self.now)
        try:
            self.engine.submit(job)
        except server.Refusal as refusal:
            assert refusal.status == 429
            self.refused.append(int(refusal.headers["Retry-After"]))
            return None
        return job

    def step(self) -> None:
        """Makes a step of the engine; if there is nothing to do, time passes."""
        self.engine.drop()
        chosen = self.engine.choose()
        for _, drawing in chosen:
            drawing.step += 1
            drawing.pixels = True if drawing.step == len(drawing.table) else None
        self.worked += len(chosen)
        self.now += max(1, len(chosen)) / self.rate
        for job in {job for job, _ in chosen if not job.work}:
            self.engine.end(job)
            self.ended[job] = self.now

    def finish(self, jobs) -> None:
        while self.engine.jobs:
            self.step()
        assert all(job.error is None and self.ended[job] < job.deadline for job in jobs)


def test_40_clients_with_8_images_each_are_all_answered_in_time(monkeypatch):
    world = World(monkeypatch)
    jobs = [world.submit(str(i), images=8) for i in range(40)]
    assert None not in jobs
    world.finish(jobs)
    world = World(monkeypatch, rate=15.0)  # a slower network: what is not refused is answered
    jobs = [job for i in range(40) if (job := world.submit(str(i), images=8))]
    assert len(jobs) == 13  # 60% of what can be made in the time
    world.finish(jobs)


@pytest.mark.parametrize("believed", [0.9, 1.1])
@pytest.mark.parametrize("sizes", [((3, 10),), ((8, 10),), ((1, 600), (1, 250), (1, 1), (64, 10)), ((64, 25), (1, 10))])
def test_under_overload_nothing_admitted_is_late_and_no_capacity_is_lost(monkeypatch, sizes, believed):
    """Four times what can be served, at random times, for three timeouts; the rate is measured right and wrong."""
    world, rng, jobs, client = World(monkeypatch, believed=believed), random.Random(0), [], 0
    pause = sum(images * steps for images, steps in sizes) / len(sizes) / world.rate / 4
    coming = 0.0
    while world.now < 360:
        while coming <= world.now:
            client += 1
            images, steps = rng.choice(sizes)
            jobs.append(world.submit(str(client), images, steps))
            coming += rng.expovariate(1 / pause)
        world.step()
    busy, refused = world.worked / (360 * world.rate), jobs.count(None)
    world.finish(job for job in jobs if job)
    assert busy > 0.9 and refused > 0 and max(world.refused) <= server.MAX_RETRY


def test_one_image_beside_two_requests_of_64_and_they_beside_many_small_ones(monkeypatch):
    world = World(monkeypatch)
    large = [world.submit(str(i), images=64) for i in range(2)]
    for _ in range(3):
        world.step()
    small = world.submit("c")
    begun = world.now
    while small not in world.ended:
        world.step()
    assert world.now - begun < 11 * 8 / world.rate  # its own ten steps
    jobs, i = [], 0
    while not all(job in world.ended for job in large):  # small ones all the time: the large ones finish, too
        jobs.append(world.submit(f"client {i}", images=4, steps=5))
        i += 1
        world.step()
        world.step()
    world.finish([*large, *(job for job in jobs if job)])


def test_a_step_of_many_does_not_hold_up_one_of_few(monkeypatch):
    """Two requests of 300 steps that fill the batch; one of a single step goes first."""
    world = World(monkeypatch)
    long = [world.submit(str(i), images=4, steps=300) for i in range(2)]
    world.step()
    short = world.submit("c", steps=1)
    world.step()
    assert short in world.ended
    world.finish(long)


def test_a_greedy_client_leaves_room_for_a_polite_one(monkeypatch):
    """The greedy one asks again whenever it is refused: that raises nobody's Retry-After."""
    world, jobs, lasted = World(monkeypatch), [], []
    polite = None
    for i in range(3000):
        for _ in range(5):
            jobs.append(world.submit("greedy", images=8, steps=20))
        if polite is None and i % 50 == 0:
            polite = world.submit("polite")
            assert polite is not None
            jobs.append(polite)
        world.step()
        if polite in world.ended:
            lasted.append(world.ended[polite] - polite.arrived)
            polite = None
    assert len(lasted) > 30 and max(lasted) < 20 * 8 / world.rate
    assert max(world.refused) <= 1.5 * (160 / world.rate) + 1  # its own excess, whoever else was refused
    world.finish(job for job in jobs if job)


def test_after_an_empty_queue_anything_is_admitted(monkeypatch):
    """Even what the rate, measured too low, says cannot be finished."""
    world = World(monkeypatch, believed=0.02)
    job = world.submit(images=64, steps=100)
    assert job is not None and world.submit() is None
    small = world.submit("another client", steps=1)  # it has counted for half of the room only
    world.step()
    assert small in world.ended
    world.finish([job])


def test_what_cannot_be_in_time_holds_up_nobody(monkeypatch):
    """A request that takes three timeouts, alone at first: the others beside it are in time."""
    world, jobs = World(monkeypatch, rate=20.0), []
    lost = world.submit("lost", images=64, steps=100)
    while lost in world.engine.jobs:
        jobs.append(world.submit(str(len(jobs)), images=8))
        for _ in range(12):
            world.step()
    world.finish(job for job in jobs if job)
    assert lost.error.status == 504 and jobs.count(None) < 0.2 * len(jobs)


def test_the_rate_follows_what_is_seen(folder):
    """Full steps, and single images that are faster than the rate."""
    engine = server.Engine(4, 10**6, False, telemetry.Metrics())
    engine.load(folder, torch.device("cpu"), "fp32")
    measured, engine.rate = engine.rate, 1.0
    engine.submit(job_of(engine.model, 1, 200))
    with torch.inference_mode():
        for _ in range(100):
            engine.step(engine.choose())
    assert engine.rate > 0.05 * measured
    engine.rate = 10**9
    engine.submit(job_of(engine.model, 4, 200))
    with torch.inference_mode():
        for _ in range(150):
            engine.step(engine.choose())
    assert engine.rate < 100 * measured


def test_probes_are_answered_beside_as_many_as_may_wait(folder, monkeypatch):
    with serving(folder, work=False) as running:
        running.engine.max_jobs = 10  # half of it for one client
        clients = [connect(running) for _ in range(5)]
        for client in clients:
            client.sendall(head(GOOD))
        wait_until(lambda: len(running.engine.jobs) == 5)
        assert get(running, steps=1)[0] == 429 and get(running, "/healthz")[0] == get(running, "/readyz")[0] == 200
        running.engine.thread.start()
        assert [read_answer(client)[0] for client in clients] == [200] * 5
        for client in clients:
            client.close()


def test_after_all_have_left_nothing_is_left(folder):
    with serving(folder, seconds=10**6) as running, nothing_left(running):
        clients = [connect(running) for _ in range(60)]
        for i, client in enumerate(clients):
            route = "/generate_stream/" if i % 2 else "/generate_sample/"
            client.sendall(head(f"{route}?n_images=20&steps=300&seed={i}"))
        wait_until(lambda: len(running.engine.jobs) == 60)
        for client in clients:
            client.close()
        wait_until(lambda: not running.engine.jobs and not running.connections)
        now = gauges(running)
        assert now["papilio_queue_requests"] == now["papilio_queue_steps"] == 0
        assert now["papilio_connections"] == 1 and now["papilio_departures_total"] == 60


def test_a_client_that_leaves_costs_one_more_step_and_disturbs_nobody(folder, tmp_path):
    with serving(folder, work=False, batch=8) as running:
        engine = running.engine
        leaving = connect(running)
        leaving.sendall(head("/generate_sample/?n_images=2&steps=50&seed=9"))
        wait_until(lambda: len(engine.jobs) == 1)
        query = {"seed": 4, "steps": 6, "n_images": 2}
        staying = threading.Thread(target=lambda: answers.append(get(running, **query)))
        answers = []
        staying.start()
        wait_until(lambda: len(engine.jobs) == 2)
        with torch.inference_mode():  # the engine's own turns, by hand
            for _ in range(2):
                engine.drop()
                engine.step(engine.choose())
            job = engine.jobs[0]
            steps = job.drawings[0].step
            leaving.close()
            engine.drop()
            assert job not in engine.jobs and job.drawings[0].step == steps == 2
        engine.thread.start()
        staying.join()
    expected = np.asarray(Image.open(solo(folder, query, tmp_path))).astype(int)
    assert np.abs(pixels(answers[0][2]) - expected).max() <= 1


def job_of(model, images: int, steps: int, seed=0, guidance=1.0) -> server.Job:
    table = ddpm.sampler_table(model.schedule, steps=steps)
    return server.Job(model, [sample.Drawing(seed + i, 0, table, guidance) for i in range(images)], {})


def test_guided_requests_take_two_places(folder):
    """A guided image-step takes two predictions: half as many of them, and no step much larger than the batch."""
    engine = server.Engine(8, 10**6, False, telemetry.Metrics())
    engine.load(folder, torch.device("cpu"), "fp32")
    for i in range(4):
        engine.submit(job_of(engine.model, 3, 1000, guidance=2.0 if i < 2 else 1.0))
    for _ in range(40):
        chosen = engine.choose()
        assert sum(drawing.weight for _, drawing in chosen) in (8, 9) and len(set(chosen)) == len(chosen)
        for _, drawing in chosen:
            drawing.step += 1


def test_deadlines_count_the_queue(folder):
    with serving(folder, work=False, seconds=0.3) as running:
        waiting = threading.Thread(target=lambda: answers.append(get(running, steps=1)))
        answers = []
        waiting.start()
        wait_until(lambda: len(running.engine.jobs) == 1)
        time.sleep(0.4)
        running.engine.thread.start()
        waiting.join()
        assert (
            answers[0][0] == 504
            and int(answers[0][1]["retry-after"]) >= 1
            and gauges(running).get("papilio_steps_total", 0) == 0
        )


def test_a_failing_step_fails_and_the_server_goes_on(folder, monkeypatch):
    with serving(folder) as running:
        monkeypatch.setattr(sample, "advance", lambda *_: 1 / 0)
        assert get(running, steps=1)[0] == 500
        assert b"ZeroDivision" not in get(running, steps=1)[2]
        monkeypatch.undo()
        assert get(running, steps=1)[0] == 200 and get(running, "/healthz")[0] == 200
        assert gauges(running)["papilio_engine_errors_total"] == 2


def test_a_poisonous_request_fails_alone(folder, tmp_path, monkeypatch):
    """Those in its batch get the images that they would have had without it, noise at each step included."""
    advance = sample.advance

    def poisoned(model, drawings, *options):
        if len(drawings) > 1:
            for drawing in drawings:  # fails after the noise is drawn, as out of memory does
                drawing.drawn = drawing.drawn if drawing.drawn is not None else drawing.noise()
        if any(drawing.seed == 666 for drawing in drawings):
            raise torch.OutOfMemoryError("poison")
        return advance(model, drawings, *options)

    queries = [{"seed": seed, "steps": 5, "n_images": 2, "sampler": "ddpm"} for seed in (1, 666, 2, 3)]
    with serving(folder, work=False, batch=8) as running:
        monkeypatch.setattr(sample, "advance", poisoned)
        answers = {}
        asking = [threading.Thread(target=lambda q=q: answers.update({q["seed"]: get(running, **q)})) for q in queries]
        for thread in asking:
            thread.start()
        wait_until(lambda: len(running.engine.jobs) == 4)
        running.engine.thread.start()
        for thread in asking:
            thread.join()
        monkeypatch.undo()
    assert {seed: answer[0] for seed, answer in answers.items()} == {1: 200, 666: 500, 2: 200, 3: 200}
    for query in queries:
        if query["seed"] != 666:
            expected = np.asarray(Image.open(solo(folder, query, tmp_path))).astype(int)
            assert np.abs(pixels(answers[query["seed"]][2]) - expected).max() <= 1


def test_a_step_that_fails_at_its_end_is_made_again_for_all(folder, tmp_path, monkeypatch):
    """Out of memory while the pixels of the last step are made: nobody has advanced, and nobody loses an image."""
    convert, failed = data.to_uint8, []

    def fail_once(images):
        if len(images) > 1 and not failed:
            failed.append(True)
            raise torch.OutOfMemoryError("once")
        return convert(images)

    with serving(folder, batch=8) as running:
        monkeypatch.setattr(data, "to_uint8", fail_once)
        query = {"seed": 3, "steps": 4, "n_images": 3, "sampler": "ddpm"}
        status, _, body = get(running, **query)
        monkeypatch.undo()
    assert status == 200 and failed
    expected = np.asarray(Image.open(solo(folder, query, tmp_path))).astype(int)
    assert np.abs(pixels(body) - expected).max() <= 1


def test_failing_steps_do_not_count_as_fast_ones_and_in_the_end_the_engine_gives_up(folder, monkeypatch):
    """A GPU whose every call fails needs a new process."""
    with serving(folder) as running:
        rate = running.engine.rate
        monkeypatch.setattr(sample, "advance", lambda *_: 1 / 0)
        assert get(running, steps=1)[0] == 500 and get(running, "/healthz")[0] == 200
        assert running.engine.rate == rate
        for _ in range(server.MAX_FAILURES):
            get(running, steps=1)
        wait_until(lambda: get(running, "/healthz")[0] == 503)


def test_an_engine_without_progress_is_unhealthy(folder, monkeypatch):
    monkeypatch.setattr(server, "STUCK_SECONDS", 0.2)
    monkeypatch.setattr(server, "STUCK_STEPS", 0)
    stuck = threading.Event()
    with serving(folder) as running:
        monkeypatch.setattr(sample, "advance", lambda *_: stuck.wait(20))
        waiting = threading.Thread(target=lambda: get(running, steps=1))
        waiting.start()
        wait_until(lambda: get(running, "/healthz")[0] == 503)
        assert get(running, "/readyz")[0] == get(running, steps=1)[0] == 503
        monkeypatch.undo()
        stuck.set()
        waiting.join()
        assert get(running, "/healthz")[0] == 200


def test_who_reads_the_log_may_go(folder, monkeypatch):
    class Gone(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    with serving(folder) as running:
        monkeypatch.setattr(sys, "stderr", Gone())
        monkeypatch.setattr(sample, "advance", lambda *_: 1 / 0)
        assert get(running, steps=1)[0] == 500
        monkeypatch.undo()
        assert get(running, steps=1)[0] == 200


def test_what_a_schedule_does_not_allow_is_the_clients_mistake(tmp_path):
    """An offset of its timesteps leaves none for as many steps as there are."""
    model = make_model(tmp_path / "m")
    file = model / "scheduler/scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"steps_offset": 1}))
    with serving(model) as running:
        status, _, body = get(running, sampler="ddpm")
        assert status == 400 and json.loads(body)["error"]["param"] == "steps"
        assert get(running, sampler="ddpm", steps=5)[0] == 200


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_dead_engine_is_told(folder, monkeypatch):
    with serving(folder) as running:
        monkeypatch.setattr(running.engine, "choose", lambda: 1 / 0)
        assert get(running, steps=1)[0] == 500
        running.engine.thread.join()
        assert [get(running, path)[0] for path in ("/healthz", "/readyz", "/generate_sample/")] == [503, 503, 503]
        assert gauges(running)["papilio_worker_up"] == 0


def test_an_error_of_the_server_is_not_taken_for_a_client_that_left(folder, monkeypatch):
    """An OSError that has nothing to do with the connection: 500 and a traceback."""

    def full(*_):
        raise OSError(28, "No space left on device")

    logged = []
    with serving(folder) as running:
        monkeypatch.setattr(server, "log", logged.append)
        monkeypatch.setattr(server.data, "encode_png", full)
        assert get(running, steps=1)[0] == 500
        assert any("No space left" in line for line in logged)
        monkeypatch.undo()
        assert get(running, steps=1)[0] == 200


def test_connections_follow_the_limit_of_open_files(folder, monkeypatch):
    for limit, connections in ((10, 2), (164, 50), (320, 128), (576, 256), (10**6, 256)):
        monkeypatch.setattr(server, "file_limit", lambda limit=limit: limit)
        with server.Server(("127.0.0.1", 0), server.Engine(4, 100, False, telemetry.Metrics())) as made:
            assert made.max_connections == connections and made.engine.max_jobs == connections * 7 // 8


def test_300_idle_connections_do_not_matter(served):
    with nothing_left(served, 20):
        idle = [connect(served) for _ in range(300)]
        assert get(served, "/healthz")[0] == get(served, steps=1)[0] == 200
        assert threading.active_count() < 300 and gauges(served)["papilio_connections"] <= server.MAX_CONNECTIONS + 1
        for client in idle:
            client.close()


def test_idle_connections_stay_open_below_the_bound(served):
    clients = [connect(served) for _ in range(3)]
    assert get(served, steps=1)[0] == 200
    for client in clients:
        client.sendall(head("/healthz"))
        assert read_answer(client)[0] == 200
        client.close()


def test_at_the_bound_with_all_waiting_one_more_is_turned_away(folder, monkeypatch):
    monkeypatch.setattr(server, "MAX_CONNECTIONS", 3)
    with serving(folder, work=False) as running:
        running.engine.max_jobs = 100
        clients = [connect(running) for _ in range(3)]
        for client in clients:
            client.sendall(head(GOOD))
        wait_until(lambda: sum(running.connections.values()) == 3)
        status, headers, body = get(running, "/healthz")
        assert status == 503 and headers["retry-after"] == "5"
        assert json.loads(body)["error"].keys() == set(server.ERROR_FIELDS)
        assert running.metrics.numbers["papilio_turned_away_total"] == 1
        running.engine.thread.start()
        assert [read_answer(client)[0] for client in clients] == [200] * 3
        for client in clients:
            client.close()
        wait_until(lambda: not running.connections)
        assert get(running, "/healthz")[0] == 200


def test_soak(served, request):
    """Many small requests: memory and descriptors stay flat. 10,000 by --soak."""
    count = 10_000 if request.config.getoption("--soak") else 300

    def ask(worker: int) -> None:
        for i in range(count // 8):
            assert get(served, steps=1, seed=i)[0] == 200

    in_threads(8, ask)
    before = gauges(served)
    with nothing_left(served):
        in_threads(8, ask)
    after = gauges(served)
    grown = sum(page.get("process_resident_memory_bytes", 0) * sign for page, sign in ((after, 1), (before, -1)))
    print(f"{2 * count} requests, {grown / 2**20:.1f} MiB more after the second half")
    assert grown < 20 * 2**20


# ---- streams ---------------------------------------------------------------------------------------------------------


def events(body: bytes) -> list[tuple[str, dict]]:
    found = re.findall(r"^event: (.*)\ndata: (.*)\n\n", body.decode(), re.MULTILINE)
    return [(name, json.loads(content)) for name, content in found]


def test_a_stream_shows_the_drawing_and_ends_at_the_same_images(served):
    status, headers, body = get(served, "/generate_stream/", n_images=3, steps=5, seed=2, sampler="ddpm")
    assert status == 200 and headers["content-type"] == "text/event-stream"
    found = events(body)
    assert found[0][0] == "queued" and found[0][1]["images"] == 3 and found[-1] == ("done", {"images": 3})
    assert body.startswith(b"retry: 600000\nid: ") and headers["x-accel-buffering"] == "no"
    again = get(served, "/generate_stream/", f"Last-Event-ID: {headers['x-request-id']}", n_images=3, steps=5)
    assert (again[0], again[2]) == (204, b"")  # EventSource then stops to reconnect
    finished = {content["seed"]: pixels(base64.b64decode(content["png"])) for name, content in found if name == "image"}
    assert sorted(finished) == [2, 3, 4]
    for k in range(3):
        steps = [content["step"] for name, content in found if name in ("step", "image") and content["image"] == k]
        assert steps == sorted(set(steps)) and steps[-1] == 5 and len(steps) > 1
    for seed, image in finished.items():
        one = pixels(get(served, n_images=1, steps=5, seed=seed, sampler="ddpm")[2])[2:-2, 2:-2]
        assert np.abs(one.astype(int) - image).max() <= 1


def test_a_stream_says_what_went_wrong_and_beats_while_it_waits(folder, monkeypatch):
    monkeypatch.setattr(server, "HEARTBEAT_SECONDS", 0.05)
    with serving(folder, work=False, seconds=0.3) as running:
        answers = []
        waiting = threading.Thread(target=lambda: answers.append(get(running, "/generate_stream/", steps=1)))
        waiting.start()
        time.sleep(0.5)
        running.engine.thread.start()
        waiting.join()
        status, _, body = answers[0]
        name, content = events(body)[-1]
        assert status == 200 and name == "error" and "in time" in content["error"]["message"]
        assert body.count(b": still here") >= 3


def test_a_stream_that_is_not_sent_in_time_says_so(folder, monkeypatch):
    """The images are drawn in time, but their pictures take too long."""
    encode = server.data.encode_png

    def slow(*picture):
        time.sleep(0.3)
        return encode(*picture)

    with serving(folder, seconds=1) as running:
        monkeypatch.setattr(server.data, "encode_png", slow)
        status, _, body = get(running, "/generate_stream/", steps=1, n_images=8)
        names = [name for name, _ in events(body)]
        assert status == 200 and names[-1] == "error" and 0 < names.count("image") < 8


# ---- models come and go ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exact", [False, True])
def test_a_new_model_is_taken_between_steps_and_begun_requests_finish_on_the_old(folder, tmp_path, exact):
    other = make_model(tmp_path / "other", num_class_embeds=4, class_names=NAMES, norm_num_groups=4)
    query = {"seed": 6, "steps": 8, "n_images": 2}
    with serving(folder, work=False, batch=8, exact=exact) as running:
        answers = {}
        before = threading.Thread(target=lambda: answers.update(old=get(running, **query)))
        before.start()
        wait_until(lambda: len(running.engine.jobs) == 1)
        with torch.inference_mode():
            running.engine.step(running.engine.choose())
        running.engine.load(other, torch.device("cpu"), "fp32")
        after = threading.Thread(target=lambda: answers.update(new=get(running, **query)))
        after.start()
        wait_until(lambda: len(running.engine.jobs) == 2)
        running.engine.thread.start()
        before.join()
        after.join()
        hashes = [answers[name][1]["x-model-hash"] for name in ("old", "new")]
        assert hashes == [sample.load(path).hash for path in (folder, other)]
    for name, path in (("old", folder), ("new", other)):
        expected = solo(path, query, tmp_path, *["--exact"] * exact)
        difference = np.abs(pixels(answers[name][2]) - np.asarray(Image.open(expected)).astype(int))
        assert difference.max() <= 1 - exact


def test_a_bad_model_is_refused_and_counted(folder, tmp_path, capsys):
    broken = make_model(tmp_path / "broken", num_class_embeds=4, class_names=NAMES)
    network = sample.read_model(broken).network
    network.conv_out.bias.data.fill_(float("nan"))
    sample.save_model(broken, network, ddpm.Schedule())
    with serving(folder) as running:
        before = get(running, steps=2, seed=1)
        running.engine.load(folder, torch.device("cpu"), "fp32", running.engine.model.hash)
        with pytest.raises(InputError, match=f"--model-hash abc: .* has the hash {running.engine.model.hash}"):
            running.engine.load(folder, torch.device("cpu"), "fp32", "abc")
        for bad in (broken, tmp_path, tmp_path / "nothing"):
            running.engine.reload(bad, torch.device("cpu"), "fp32")
        counted = gauges(running)
        assert counted['papilio_model_loads_total{result="refused"}'] == 3
        assert counted['papilio_model_loads_total{result="loaded"}'] == 2
        assert get(running, steps=2, seed=1)[2] == before[2]
    assert "not finite" in capsys.readouterr().err


def test_of_two_reloads_the_later_stays(folder, tmp_path, monkeypatch):
    other = make_model(tmp_path / "other", num_class_embeds=4, class_names=NAMES, norm_num_groups=4)
    plain, begun = sample.load, threading.Event()

    def load(path, *how, **more):
        if path == folder:
            begun.set()
            time.sleep(0.5)
        return plain(path, *how, **more)

    with serving(folder) as running:
        monkeypatch.setattr(sample, "load", load)
        engine = running.engine
        engine.loader.submit(engine.reload, folder, torch.device("cpu"), "fp32")
        begun.wait()
        engine.loader.submit(engine.reload, other, torch.device("cpu"), "fp32").result()
        assert running.engine.model.hash == plain(other).hash


# ---- what is kept ----------------------------------------------------------------------------------------------------


def test_saved_images_say_what_made_them(folder, tmp_path):
    store = ServedImages(tmp_path / "saved", 10**7)
    with serving(folder, store=store) as running:
        _, headers, body = get(running, n_images=2, steps=3, seed=8)
        get(running, "/generate_stream/", n_images=1, steps=3, seed=8)
        wait_until(lambda: len(list(tmp_path.glob("saved/*/*.png"))) == 3 and not running.connections)
        assert gauges(running)["papilio_saved_bytes"] == sum(f.stat().st_size for f in tmp_path.glob("saved/*/*"))
    (log,) = tmp_path.glob("saved/*/*.jsonl")
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    for line, seed, label in zip(lines, (8, 9, 8), ("cat", "ant", "cat"), strict=True):
        with Image.open(log.parent / line["file"]) as image:
            assert image.text["seed"] == str(seed) == str(line["seed"]) and image.text["class"] == label
            assert image.text["model"] == headers["x-model-hash"] and image.text["steps"] == "3"
            saved = np.asarray(image)
        one = solo(folder, {"seed": seed, "steps": 3, "n_images": 1}, tmp_path)
        assert np.abs(np.asarray(Image.open(one))[2:-2, 2:-2].astype(int) - saved).max() <= 1


def noise(seed: int, channels=3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (channels, 16, 16), generator=generator, dtype=torch.uint8)


def test_what_was_saved_is_read_back(tmp_path):
    """Facts and pixels of every image; a damaged picture is None, a deleted one and a broken line are passed over."""
    store = ServedImages(tmp_path, 10**7)
    colour, grey = noise(0), noise(1, channels=1)
    assert store.save("first", [(colour, {"seed": 5}), (grey, {"seed": 6})]) == ([], [])
    store.save("second", [(grey, {})])
    (day,) = store.days()
    found = saved_images(ServedImages(tmp_path))
    names = [("first", 5), ("first", 6), ("second", None)]
    assert [(facts["request"], facts.get("seed")) for facts, _ in found] == names
    for (_, pixels), saved in zip(found, (colour, grey, grey), strict=True):
        assert np.array_equal(pixels, saved)
    (day / "first-1.png").write_bytes((day / "first-1.png").read_bytes()[:60])
    (day / "second-0.png").unlink()
    with open(next(day.glob("*.jsonl")), "a") as log:
        log.write("[" * 100_000 + '\n{"file": "../../x.png", "request": "../../x"}\n{"request": 3}\n{"file": "thi')
    assert [pixels is None for _, pixels in saved_images(store)] == [False, True]


def test_links_and_pipes_in_the_folder_are_not_opened(tmp_path):
    """A link to a picture elsewhere, a pipe that nobody writes to, and links in place of a log and of a day."""
    store = ServedImages(tmp_path / "saved", 10**7)
    store.save("first", [(noise(k), {}) for k in range(3)])
    (day,) = store.days()
    (log,) = store.logs(day)
    (tmp_path / "elsewhere.png").write_bytes((day / "first-0.png").read_bytes())
    for name in ("first-0.png", "first-1.png"):
        (day / name).unlink()
    (day / "first-0.png").symlink_to(tmp_path / "elsewhere.png")
    os.mkfifo(day / "first-1.png")
    (day / "1-00000000.jsonl").symlink_to(log)
    os.mkfifo(day / "2-00000000.jsonl")
    (day.parent / "2020-01-01").symlink_to(day)
    assert [pixels is None for _, pixels in saved_images(store)] == [True, True, False]


def saved_images(store) -> list[tuple]:
    """Returns (facts, pixels) of the images that still exist."""
    records = [record for day in store.days() for record in store.records(day)]
    return [(facts, store.read(file)) for file, facts in records if os.path.lexists(file)]


def saved(folder) -> list[str]:
    return sorted(f"{file.parent.name}/{file.name}" for file in folder.rglob("*.png"))


def on(monkeypatch, day: str) -> None:
    monkeypatch.setattr(data.time, "strftime", lambda *_: day)


def test_at_the_limit_an_even_sample_of_the_day_stays(tmp_path, monkeypatch):
    """Of 600 images, those that stay come from all of the day, and are the same for one process or for three."""
    on(monkeypatch, "2020-01-01")
    stores = [ServedImages(tmp_path, 60_000)] + [ServedImages(tmp_path, 60_000) for _ in range(2)]
    reported = []
    for i in range(600):
        errors, deleted = stores[i % 3].save(f"r{i:03}", [(noise(i), {"seed": i})])
        assert not errors
        reported += deleted
        assert sum(file.stat().st_size for file in tmp_path.rglob("*.*")) <= 1.1 * 60_000
    kept = [int(name[-9:-6]) for name in saved(tmp_path)]
    assert len(kept) > 20 and len(kept) + len(set(reported)) == 600
    assert np.histogram(kept, 3, (0, 600))[0].min() > 0.15 * len(kept)
    found = saved_images(stores[0])
    assert found and all(np.array_equal(pixels, noise(facts["seed"])) for facts, pixels in found)


def test_the_oldest_day_makes_room_image_by_image(tmp_path, monkeypatch):
    """Yesterday does not vanish with the first image after midnight, and is gone when today needs all."""
    store = ServedImages(tmp_path, 30_000)
    on(monkeypatch, "2020-01-01")
    for i in range(20):
        store.save(f"old{i}", [(noise(i), {})])
    before = len(saved(tmp_path))
    on(monkeypatch, "2020-01-02")
    _, deleted = store.save("new", [(noise(0), {})])
    assert before > 10 and len(saved(tmp_path)) >= before - 1 and len(deleted) <= 2
    for i in range(40):
        store.save(f"new{i}", [(noise(i), {})])
    assert [path.name for path in tmp_path.iterdir()] == ["2020-01-02"]
    assert sum(file.stat().st_size for file in tmp_path.rglob("*.*")) <= 30_000


def test_files_of_somebody_else_are_never_deleted(tmp_path, monkeypatch):
    """Folders that look like a day of ours, links, names that lead elsewhere, and files that no log names."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "x-0.png").write_bytes(bytes(9000))
    (outside / "theirs.jsonl").write_text('{"file": "x-0.png", "request": "x"}\n')
    folder = tmp_path / "served"
    (folder / "2019-01-01").mkdir(parents=True)
    for name in ("photo.png", "notes.txt", "theirs.jsonl"):
        (folder / "2019-01-01" / name).write_bytes(bytes(9000))
    (folder / "2019-01-02").symlink_to(outside)  # a day that is a link
    (folder / "2019-01-03").mkdir()
    holiday = tmp_path / "0-holiday"  # before all dates
    holiday.mkdir()
    (holiday / "photo-1.png").write_bytes(bytes(9000))
    (holiday / "12-abcdef01.jsonl").touch()
    names = ["../../outside/x", "../../0-holiday/photo", f"{holiday}/photo", "a\0b"]
    lines = [json.dumps({"file": f"{name}-{k}.png", "request": name}) for name in names for k in (0, 1)]
    (folder / "2019-01-03/1-abcdef01.jsonl").write_text("\n".join(lines))
    (folder / "2019-01-03/linked-0.png").symlink_to(outside / "x-0.png")
    with open(folder / "2019-01-03/1-abcdef01.jsonl", "a") as log:
        log.write('\n{"file": "linked-0.png", "request": "linked"}\n')
    store = ServedImages(folder, 20_000)
    on(monkeypatch, "2020-01-01")
    for i in range(40):
        assert store.save(f"new{i}", [(noise(i), {})])[0] == []
    assert sorted(path.name for path in (folder / "2019-01-01").iterdir()) == ["notes.txt", "photo.png", "theirs.jsonl"]
    assert (
        len(list(holiday.iterdir())) == 2
        and len(list(outside.iterdir())) == 2
        and (outside / "x-0.png").stat().st_size == 9000
    )
    assert (folder / "2019-01-02").is_symlink()


def test_what_cannot_be_deleted_stops_no_saving(tmp_path, monkeypatch):
    """A folder where an image should be, in an old day."""
    old = tmp_path / "2019-01-01"
    (old / "a-0.png").mkdir(parents=True)
    (old / "1-abcdef01.jsonl").write_text('{"file": "a-0.png", "request": "a"}\n')
    store = ServedImages(tmp_path, 20_000)
    on(monkeypatch, "2020-01-01")
    for i in range(40):
        assert store.save(f"new{i}", [(noise(i), {})])[0] == []
    assert len(saved(tmp_path)) > 5 and (old / "a-0.png").is_dir()


def test_a_slow_disk_holds_up_nobody(folder, tmp_path, monkeypatch):
    """More requests than connections and than may wait to be saved: all are answered; what is lost is counted."""
    monkeypatch.setattr(server, "MAX_CONNECTIONS", 4)
    monkeypatch.setattr(served_images, "MAX_SAVES", 5)
    store, released = ServedImages(tmp_path, 10**7), threading.Event()
    save = store.save
    monkeypatch.setattr(store, "save", lambda *given: released.wait(20) and save(*given))
    with serving(folder, store=store) as running:
        assert [get(running, steps=1)[0] for _ in range(12)] == [200] * 12
        assert get(running, "/healthz")[0] == 200
        assert gauges(running)["papilio_save_errors_total"] == 12 - 1 - 5  # one is being saved
        released.set()
    assert len(saved(tmp_path)) == 6  # also what waits at the end


def test_what_other_processes_save_counts(tmp_path):
    store = ServedImages(tmp_path, 10**5)
    other = ServedImages(tmp_path, 10**5)
    for i in range(60):
        other.save(f"theirs{i}", [(noise(i), {})])
    for i in range(60):
        store.save(f"mine{i}", [(noise(i), {})])
    assert sum(file.stat().st_size for file in tmp_path.rglob("*.*")) <= 1.1 * 10**5
    store.scan()
    assert store.bytes == sum(file.stat().st_size for file in tmp_path.rglob("*.*"))


def test_a_folder_that_cannot_be_written_is_refused_at_the_start(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write to .*file"):
        ServedImages(tmp_path / "file", 10**6)
    with pytest.raises(InputError, match="cannot write to /proc"):
        ServedImages(Path("/proc/self"), 10**6)


def test_images_are_saved_after_the_response(folder, tmp_path, monkeypatch):
    """The client has the whole picture, and the end of the connection, while its images are still being saved."""
    store, read = ServedImages(tmp_path, 10**7), threading.Event()
    save = store.save
    monkeypatch.setattr(store, "save", lambda *given: read.wait(20) and save(*given))
    with serving(folder, store=store) as running:
        assert get(running, steps=1)[0] == 200 and not saved(tmp_path)
        assert get(running, "/generate_stream/", steps=1)[0] == 200 and not saved(tmp_path)
        read.set()
        wait_until(lambda: len(saved(tmp_path)) == 2)


def test_a_line_that_does_not_fit_on_the_disk_spoils_no_other(tmp_path, monkeypatch):
    """A vote whose line is cut off in the middle; then an image is saved, and is found."""

    class Full(io.FileIO):
        def write(self, content):
            return super().write(content[:7])

    store = ServedImages(tmp_path, 10**7)
    store.save("first", [(noise(0), {})])
    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", lambda path, *how, **more: Full(path, "a"))
        (error,), _ = store.save_vote({"image": "first-0", "vote": "up"})
        assert "No space left" in str(error)
    assert store.save("second", [(noise(1), {})]) == ([], [])
    assert [facts["request"] for facts, _ in saved_images(store)] == ["first", "second"]


def test_a_disk_that_refuses_fails_no_request(folder, tmp_path):
    store = ServedImages(tmp_path / "saved", 10**7)
    (tmp_path / "saved").rmdir()
    (tmp_path / "saved").write_text("a file is where the folder was")
    with serving(folder, store=store) as running:
        assert get(running, steps=1)[0] == 200
        wait_until(lambda: "papilio_save_errors_total 1" in running.metrics.page({}))


# ---- documents -------------------------------------------------------------------------------------------------------


def parse_metrics(page: str) -> dict[str, str]:
    """Prometheus text format 0.0.4, strictly: name -> type."""
    types, current, seen = {}, None, set()
    for line in page.removesuffix("\n").split("\n"):
        if line.startswith("# "):
            _, word, name, rest = line.split(" ", 3)
            assert (name not in types) == (word == "HELP" or name == current)
            current = name
            if word == "TYPE":
                assert name not in types and rest in ("counter", "gauge", "histogram")
                types[name] = rest
            continue
        found = re.fullmatch(r'([a-z_]+)(\{(?:[a-z_]+="(?:[^"\\\n]|\\["\\n])*",?)+\})? (\S+)', line)
        assert found and line not in seen
        float(found[3])
        seen.add(found[1] + (found[2] or ""))
        assert re.sub(r"_(bucket|sum|count)$", "", found[1]) == current or found[1] == current
    return types


def test_metrics_are_well_formed_and_add_up(served):
    get(served, steps=2)
    page = get(served, "/metrics")[2].decode()
    types = parse_metrics(page)
    assert set(types) == set(telemetry.METRICS)
    counted = gauges(served)
    for name, kind in types.items():
        if kind == "histogram":
            for key in [key for key in counted if key.startswith(f"{name}_count")]:
                labels = key.removeprefix(f"{name}_count").strip("{}")
                buckets = [counted[k] for k in counted if k.startswith(f"{name}_bucket{{{labels}") and "le=" in k]
                infinite = f'{name}_bucket{{{labels}{"," if labels else ""}le="+Inf"}}'
                assert counted[infinite] == counted[key] and buckets[:15] == sorted(buckets[:15])
    assert counted["papilio_worker_up"] == 1
    assert sys.platform != "linux" or counted["process_resident_memory_bytes"] > 2**20
    (info,) = (key for key in counted if key.startswith("papilio_model_info"))
    assert f'hash="{served.engine.model.hash}"' in info


def test_labels_are_escaped():
    metrics = telemetry.Metrics()
    metrics.add("papilio_model_loads_total", result='a"b\\c\nd')
    assert 'result="a\\"b\\\\c\\nd"' in metrics.page({})
    parse_metrics(metrics.page({}))


def test_alerts_and_scraping_use_metrics_that_exist(served):
    page = get(served, "/metrics")[2].decode()
    known = set(parse_metrics(page))
    known |= {name + suffix for name in known for suffix in ("_bucket", "_sum", "_count")} | set(monitor.WATCH_METRICS)
    rules = (ROOT / "deploy/alerts.yml").read_text()
    used = set(re.findall(r"\b(?:papilio|process)_\w+", rules))
    assert used and used <= known
    for alert in ("Latency", "Error", "Worker", "Queue", "Watch"):
        assert re.search(rf"alert: \w*{alert}", rules)
    assert "/metrics" in (ROOT / "deploy/prometheus.yml").read_text()


def test_openapi_and_validator_are_one_table(served):
    document = json.loads(get(served, "/openapi.json")[2])
    assert set(document["paths"]) == set(server.ROUTES)
    (query,) = {json.dumps(document["paths"][path]["get"]["parameters"]) for path in
                ("/generate_sample/", "/generate_stream/")}  # fmt: skip
    schemas = {row["name"]: row["schema"] for row in json.loads(query)}
    assert set(schemas) == {"n_images", "seed", "class", "guidance", "sampler", "steps", "spacing", "eta"}
    for name, schema in schemas.items():
        good = schema.get("enum") or [schema["minimum"], min(schema["maximum"], 64)]
        bad = ["nonsense"] if "enum" in schema else [schema["minimum"] - 1, schema["maximum"] + 1]
        for value in good:
            assert get(served, **{"steps": 1, "sampler": "ddim"} | {name: value})[0] == 200
        for value in bad:
            assert get(served, **{"steps": 1} | {name: value})[0] == 400


def test_a_model_without_classes_has_no_such_parameters(tmp_path):
    with serving(make_model(tmp_path / "m")) as running:
        document = json.loads(get(running, "/openapi.json")[2])
        names = [row["name"] for row in document["paths"]["/generate_sample/"]["get"]["parameters"]]
        assert names == ["n_images", "seed", "sampler", "steps", "spacing", "eta"]
        assert get(running, steps=1)[0] == 200 and get(running, steps=1, guidance=2)[0] == 400


def test_schemathesis_finds_nothing(served, monkeypatch, tmp_path):
    """Generated from the document: good and bad requests, at least 40 of each route."""
    monkeypatch.setattr(served, "max_cost", 10**9)
    monkeypatch.setattr(sample, "MAX_IMAGES", 4)
    table = ddpm.sampler_table

    def two_steps(schedule, sampler, steps, spacing, eta):  # no schema can say that eta needs ddim
        return table(schedule, sampler, 2, spacing, eta if sampler == "ddim" else 0)

    monkeypatch.setattr(ddpm, "sampler_table", two_steps)
    tool = Path(sys.executable).with_name("schemathesis")
    flags = [
        "--phases",
        "examples,coverage,fuzzing",
        "--max-examples",
        "40",
        "--seed",
        "1",
        "--generation-database",
        "none",
    ]
    done = subprocess.run(
        [tool, "run", f"http://127.0.0.1:{served.port}/openapi.json", "--checks", "all", *flags],
        cwd=tmp_path, capture_output=True, text=True, timeout=300)  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]


def test_the_curl_lines_of_the_docs_work(tmp_path):
    """With a small model of the size and the classes of the default one."""
    box = sample.read_model(sample.DEFAULT_MODEL).network.config
    classes = dict(num_class_embeds=box.num_class_embeds, class_names=box.class_names)
    folder = make_model(tmp_path / "model", sample_size=box.sample_size, down_block_types=["DownBlock2D"] * 2,
                        up_block_types=["UpBlock2D"] * 2, add_attention=False, **classes)  # fmt: skip
    lines = re.findall(r"^curl .*$", (ROOT / "docs/serving.md").read_text(), re.MULTILINE)
    assert len(lines) >= 5
    with serving(folder, batch=8) as running:
        for line in lines:
            line = line.replace("127.0.0.1:8000", f"127.0.0.1:{running.port}").replace("curl ", "curl -sSf ", 1)
            done = subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True, timeout=120)
            assert done.returncode == 0, (line, done.stderr)
            assert done.stdout or "-o " in line
    pictures = [Image.open(io.BytesIO(file.read_bytes())).size for file in sorted(tmp_path.glob("*.png"))]
    assert len(pictures) == 4 and min(map(min, pictures)) >= 64


# ---- the command -----------------------------------------------------------------------------------------------------


@contextmanager
def command(*flags, cwd=ROOT, drain=None, **environment):
    """`python server.py` on a free port, killed at the end; its stderr is in `said`. A shutdown has `drain` seconds."""
    patched = f"import sys, server; server.DRAIN_SECONDS = {drain}; sys.exit(server.main())"
    program = [ROOT / "server.py"] if drain is None else ["-c", patched]
    process = subprocess.Popen(
        [sys.executable, *program, "--port", "0", "--precision", "fp32", *map(str, flags)],
        cwd=cwd, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment)  # fmt: skip
    process.said = []
    listening = threading.Event()

    def read() -> None:
        for line in process.stderr:
            process.said.append(line)
            if found := re.search(r"listening on http://\S+:(\d+)", line):
                process.port = int(found[1])
                listening.set()

    reader = threading.Thread(target=read)
    reader.start()
    try:
        assert listening.wait(60), process.said
        yield process
    finally:
        process.kill()
        process.wait()
        reader.join()
        process.stderr.close()


def patched(statement: str, *flags) -> subprocess.Popen:
    """`python server.py` on a free port after a statement that replaces a part of it."""
    program = f"import sys, time, sample, server; {statement}; sys.exit(server.main())"
    words = [sys.executable, "-c", program, "--port", "0", "--precision", "fp32", *map(str, flags)]
    return subprocess.Popen(
        words, cwd=ROOT, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )


def listens(process: subprocess.Popen) -> None:
    """Reads the log up to the line that gives the port, and no further."""
    while not (found := re.search(r"listening on http://\S+:(\d+)", process.stderr.readline())):
        assert process.poll() is None
    process.port = int(found[1])


def test_sigterm_while_a_model_loads_ends_the_process(folder):
    with patched("sample.load = lambda *_: server.log('loading') or time.sleep(600)", "--model", folder) as process:
        assert "loading" in process.stderr.readline()
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0


def test_a_log_that_nobody_reads_holds_nothing_up(folder):
    """A full pipe: 2,000 lines of 300 bytes. Requests are answered, the model is loaded again, SIGTERM ends it."""
    many = "log = server.log; server.log = lambda text: [log(text + ' ' * 300) for _ in range(100)]"
    with patched(many, "--model", folder) as process:
        listens(process)
        for seed in range(20):
            assert get(process, steps=1, seed=seed)[0] == 200
        process.send_signal(signal.SIGHUP)
        wait_until(lambda: gauges(process)['papilio_model_loads_total{result="loaded"}'] == 2)
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0


@pytest.mark.parametrize(
    "statement, message",
    [
        ("server.Engine.choose = lambda self: 1 / 0", "ZeroDivisionError"),
        ("server.STUCK_SECONDS = server.STUCK_STEPS = 0.5; sample.advance = lambda *_: time.sleep(600)", "no progress"),
    ],
)
def test_without_progress_the_process_leaves_with_an_error(folder, statement, message):
    """The request gets an error, and a supervisor sees an exit status of 1."""
    with patched(f"server.DRAIN_SECONDS = 1; {statement}", "--model", folder) as process:
        listens(process)
        assert get(process, steps=1)[0] in (500, 503)
        assert process.wait(20) == 1 and message in process.stderr.read()


def test_shutdown_under_load_answers_everyone(folder):
    """SIGTERM while 30 wait: each accepted request gets its whole picture or a clean 503, and the exit status is 0."""
    flags = ("--model", folder, "--batch-size", "2", "--queue", 10**6, "--timeout", 10**6)
    with command(*flags, drain=2) as process:
        statuses, begun = [], threading.Barrier(31)

        def ask(i: int) -> None:
            with connect(process) as connection:
                connection.sendall(head(f"/generate_sample/?n_images=16&steps=400&seed={i}"))
                begun.wait()
                status, headers, body = read_answer(connection)
                assert status == 503 or pixels(body).shape[0] > 16
                statuses.append(status)

        asking = threading.Thread(target=in_threads, args=(30, ask))
        asking.start()
        begun.wait()
        wait_until(lambda: gauges(process)["papilio_queue_requests"] == 30)
        begin = time.monotonic()
        process.send_signal(signal.SIGTERM)
        wait_until(lambda: get(process, "/readyz")[0] == 503)
        status, headers, _ = get(process, steps=1)
        assert status == 503 and "retry-after" in headers and get(process, "/healthz")[0] == 200
        asking.join()
        assert process.wait(20) == 0
        print(f"drained in {time.monotonic() - begin:.2f} s, {statuses.count(200)} of 30 finished")
        assert len(statuses) == 30 and 503 in statuses


def test_a_public_address_warns_and_answers_to_its_names_alone(folder, tmp_path):
    flags = ("--model", folder, "--host", "0.0.0.0", "--allow-host", "Butterflies.Example", "--save", tmp_path / "kept")
    with command(*flags) as process:
        wait_until(lambda: any("WARNING" in line and "token" in line for line in process.said))
        for host, status in (("butterflies.example", 200), ("127.0.0.1", 200), ("other.example", 421)):
            assert send(process, head("/generate_sample/?steps=1", host=host))[0] == status
        wait_until(lambda: len(list(tmp_path.glob("kept/*/*.png"))) == 2)
    file = tmp_path / "tokens"
    file.write_text("correct-horse\n")
    with command("--model", folder, "--host", "0.0.0.0", "--token-file", file) as process:
        assert get(process, steps=1)[0] == 401
        file.write_text("battery-staple\n")
        process.send_signal(signal.SIGHUP)
        mine = "Authorization: Bearer battery-staple"
        wait_until(lambda: get(process, "/openapi.json", mine)[0] == 200)
        file.write_text("short\n")
        process.send_signal(signal.SIGHUP)
        wait_until(lambda: any("the current ones stay" in line for line in process.said))
        assert get(process, "/openapi.json", mine)[0] == 200
        file.write_text("correct-horse\n")
        process.send_signal(signal.SIGHUP)
        wait_until(lambda: get(process, "/openapi.json", mine)[0] == 401)
        assert get(process, "/generate_sample/", "Authorization: Bearer correct-horse", steps=1)[0] == 200
        assert not any("WARNING" in line for line in process.said)


def test_a_shutdown_in_a_long_step_ends_well(tmp_path):
    """A step of the default model with 32 images takes a second: the process does not wait for it, nor crash."""
    flags = ("--model", sample.DEFAULT_MODEL, "--batch-size", "32", "--queue", 10**6, "--timeout", 10**6)
    with command(*flags, drain=1, OMP_NUM_THREADS="2") as process:
        clients = [connect(process) for _ in range(2)]
        for client in clients:
            client.sendall(head("/generate_sample/?n_images=64&steps=100"))
        wait_until(lambda: gauges(process)["papilio_queue_requests"] == 2)
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGHUP)  # changes nothing any more
        assert [read_answer(client)[0] for client in clients] == [503, 503]
        assert process.wait(20) == 0, process.said
        for client in clients:
            client.close()


def test_log_lines_for_machines(folder):
    """One JSON object a line, one line a request."""
    with command("--model", folder, "--log", "json") as process:
        assert get(process, steps=1)[0] == 200 and get(process, steps=0)[0] == 400
        wait_until(lambda: len(process.said) == 4)
    lines = [json.loads(line) for line in process.said]
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", line["time"]) for line in lines)
    assert "listening" in lines[1]["message"]
    assert [(line["route"], line["status"]) for line in lines[2:]] == [
        ("/generate_sample/", 200),
        ("/generate_sample/", 400),
    ]
    assert lines[2]["ms"] >= 0 and re.fullmatch("[0-9a-f]{16}", lines[2]["request"])


def test_names_of_hosts():
    engine = server.Engine(4, 100, False, telemetry.Metrics())
    with server.Server(
        ("127.0.0.1", 0), engine, hosts=["Papilio.Example:8443", "fd00::1", "[fd00::2]", "[FD00::3]:80"]
    ) as made:
        assert {"papilio.example", "[fd00::1]", "[fd00::2]", "[fd00::3]", "localhost"} <= made.hosts
        assert made.allows("papilio.example") and not made.allows("example")
    for pattern, host, allowed in (
        ("*", "anything.example", True),
        ("*.Example.org", "a.b.example.org", True),
        ("*.example.org", "example.org", False),
        ("*.example.org", "evil-example.org", False),
        ("*.example.org", "example.org.evil.example", False),
    ):
        with server.Server(("127.0.0.1", 0), engine, hosts=[pattern]) as made:
            assert made.allows(host) == allowed and made.allows("localhost")
    with pytest.raises(InputError, match="--allow-host"):
        server.Server(("127.0.0.1", 0), engine, hosts=["two words"])


def test_asked_twice_it_stops_at_once(folder):
    with command("--model", folder, "--batch-size", "1") as process, connect(process) as connection:
        connection.sendall(head("/generate_sample/?n_images=64&steps=100"))
        wait_until(lambda: gauges(process)["papilio_queue_requests"] == 1)
        process.send_signal(signal.SIGTERM)
        wait_until(lambda: get(process, "/readyz")[0] == 503)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 128 + signal.SIGTERM


def test_sighup_loads_the_newest_run(tmp_path, folder):
    """In a folder of its own, whose newest run changes."""
    first = make_model(tmp_path / "runs/a/model")
    with command(cwd=tmp_path) as process:
        old = sample.load(first).hash
        assert get(process, steps=1, seed=1)[1]["x-model-hash"] == old
        long = connect(process)
        long.sendall(head("/generate_sample/?steps=100&n_images=30"))
        wait_until(lambda: gauges(process)["papilio_queue_requests"] == 1)
        second = make_model(tmp_path / "runs/b/model", norm_num_groups=4)
        process.send_signal(signal.SIGHUP)
        new = sample.load(second).hash
        wait_until(lambda: get(process, steps=1, seed=1)[1]["x-model-hash"] == new)
        status, headers, _ = read_answer(long)
        long.close()
        assert (status, headers["x-model-hash"]) == (200, old)
        (tmp_path / "runs/c/model/unet").mkdir(parents=True)
        (tmp_path / f"runs/c/model/unet/{sample.WEIGHTS}.safetensors").write_bytes(b"nothing")
        process.send_signal(signal.SIGHUP)
        wait_until(lambda: gauges(process).get('papilio_model_loads_total{result="refused"}') == 1)
        assert get(process, steps=1, seed=1)[1]["x-model-hash"] == new
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 0


@pytest.mark.parametrize("flags, words", [
    (["--model", "nowhere"], "no such folder"),
    (["--token-file", "nowhere"], "nowhere: No such file or directory; check its path"),
    (["--host", "203.0.113.7"], "address; choose another --host or --port"),
    (["--port", "99999"], "not a whole number from 0 to 65535"),
    (["--queue", "0"], "not a whole number"),
    (["--timeout", "0"], "not a number from 0.1"),
])  # fmt: skip
def test_bad_flags_get_one_sentence(flags, words, capfd):
    port = [] if "--port" in flags else ["--port", "0"]
    handlers = [signal.getsignal(number) for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)]
    before = footprint()
    assert status_of(server.main, [*flags, *port]) == 2
    assert handlers == [signal.getsignal(number) for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)]
    error = capfd.readouterr().err
    assert words in error and "Traceback" not in error
    wait_until(lambda: footprint() == before)


def test_bad_environment_and_tokens(tmp_path, monkeypatch):
    bad = subprocess.run(
        [sys.executable, "server.py"], cwd=ROOT, env=os.environ | {"PORT": "http"}, capture_output=True
    )
    assert bad.returncode == 2 and b"--port: 'http' is not a whole number" in bad.stderr
    file = tmp_path / "tokens"
    for text, good in (
        ("correct-horse\n\nbattery-staple \n", True),
        ("", False),
        ("short", False),
        ("two words here", False),
    ):
        file.write_text(text)
        if good:
            assert server.read_tokens(file) == (b"correct-horse", b"battery-staple")
        else:
            with pytest.raises(InputError, match="one token per line"):
                server.read_tokens(file)
    monkeypatch.setenv("PAPILIO_TOKEN", "from-the-environment")
    assert server.read_tokens(None) == (b"from-the-environment",)
    monkeypatch.setenv("PAPILIO_TOKEN", "")
    with pytest.raises(InputError, match="PAPILIO_TOKEN"):  # a secret that is missing, say
        server.read_tokens(None)
    monkeypatch.delenv("PAPILIO_TOKEN")
    assert server.read_tokens(None) == ()
