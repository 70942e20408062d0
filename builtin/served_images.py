"""The folder of the images that a server has made."""

import errno
import hashlib
import heapq
import json
import math
import os
import queue
import re
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
from torch import Tensor

import data
from data import InputError

MAX_SAVES = 100  # requests whose images wait to be saved


class ServedImages:
    """A folder of the images that the server has made: written by the server, read by the monitor.

    An image is `<day>/<request>-<k>.png`. A line of JSON with its facts is in `<day>/<process>.jsonl`; so is a line for
    each vote. Above `limit` bytes images are deleted: those of the oldest day first, and those of one day in random
    order, so that an even sample of the day stays. Several threads and processes may save into one folder. Without a
    limit the folder is only read. Links and everything else that is not a plain file are never followed or opened.
    """

    def __init__(self, folder: Path, limit: int | None = None):
        self.folder, self.limit, self.lock = folder, limit, threading.Lock()
        self.waiting: queue.Queue = queue.Queue(MAX_SAVES)  # calls of `save` and `save_vote`, without arguments
        self.log_name = f"{os.getpid()}-{os.urandom(4).hex()}.jsonl"
        if limit:
            with data.disk_errors(f"write to {folder}"):
                folder.mkdir(parents=True, exist_ok=True)
                tempfile.TemporaryFile(dir=folder).close()
                self.scan()

    def days(self) -> list[Path]:
        """Lists the folders of days, oldest first. Links, and folders without a log, belong to something else."""
        named = (path for path in self.folder.iterdir() if re.fullmatch(r"\d{4}-\d\d-\d\d", path.name))
        return sorted(day for day in named if not day.is_symlink() and self.logs(day))

    def logs(self, day: Path) -> list[Path]:
        named = (log for log in day.glob("*.jsonl") if re.fullmatch(r"\d+-[0-9a-f]{8}\.jsonl", log.name))
        return sorted(log for log in named if log.is_file() and not log.is_symlink())

    def lines(self, day: Path) -> Iterator[dict]:
        """Yields the lines of a day's logs that are JSON objects with a time."""
        for log in self.logs(day):
            lines = []
            with suppress(OSError):  # deleted by another process
                lines = log.read_bytes().splitlines()
            for line in lines:
                # Cut off by a crash, or not ours.
                with suppress(ValueError, KeyError, TypeError, RecursionError, OverflowError):
                    facts = json.loads(line)
                    if math.isfinite(float(facts["time"])):
                        yield facts

    def records(self, day: Path) -> Iterator[tuple]:
        """Yields (file, facts) of each image that the logs of a day name, whether it still exists or not."""
        for facts in self.lines(day):
            if re.fullmatch(r"[\w-]+-\d+\.png", str(facts.get("file"))):  # in this folder, whatever the line says
                yield day / facts["file"], facts

    def read(self, file: Path) -> np.ndarray | None:
        """Returns the pixels of an image: uint8 (C, H, W), or None if it is damaged. Raises FileNotFoundError."""
        try:
            if stat.S_ISREG(file.lstat().st_mode):
                return data.decode_png(file)
        except FileNotFoundError:
            raise
        except Exception:  # decoders raise nearly anything for a damaged file
            pass
        return None

    def scan(self) -> None:
        """Lists the images that this and other processes have saved, as a heap whose first image is deleted first."""
        self.images, self.bytes, self.unscanned = [], 0, 0
        for day in self.days():
            for log in self.logs(day):
                with suppress(OSError):  # deleted by another process
                    self.bytes += log.stat().st_size
            for file, _ in self.records(day):
                with suppress(OSError):
                    self._add(file, file.lstat().st_size)

    def _add(self, file: Path, size: int) -> None:
        order = hashlib.blake2b(file.name.encode()).digest()  # random, and the same in all processes
        heapq.heappush(self.images, (file.parent.name, order, file, size))
        self.bytes += size

    def save(self, name: str, images: Sequence[tuple]) -> tuple[list, list]:
        """Saves (uint8 (C, H, W) image, facts) pairs. Returns errors and the images deleted to make room."""
        day = self._today()
        errors, deleted = [], []
        with self.lock:
            for k, (pixels, facts) in enumerate(images):
                facts = {"file": f"{name}-{k}.png", "request": name, "time": f"{time.time():.3f}", **facts}
                try:
                    deleted += self._save_one(day / facts["file"], pixels, facts)
                except (InputError, OSError) as error:
                    errors.append(error)
        return errors, deleted

    def save_waiting(self, report: Callable) -> None:
        """Makes the calls in the queue `waiting`, and calls report(errors, deleted) after each. It never returns."""
        while True:
            report(*self.waiting.get()())
            self.waiting.task_done()

    def save_vote(self, facts: dict) -> tuple[list, list]:
        """Appends a vote to the log of the day. Returns errors, and nothing deleted."""
        with self.lock:
            try:
                self._append(self._today(), facts)
            except OSError as error:
                return [error], []
        return [], []

    def _today(self) -> Path:
        return self.folder / time.strftime("%Y-%m-%d", time.gmtime())

    def _append(self, day: Path, facts: dict) -> None:
        """Appends a line to the log of a day: all of it or, if the disk is full, nothing."""
        day.mkdir(exist_ok=True)
        line = json.dumps(facts).encode() + b"\n"
        with open(day / self.log_name, "ab", buffering=0) as log:
            end = log.tell()
            if log.write(line) < len(line):
                log.truncate(end)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _save_one(self, path: Path, pixels: Tensor, facts: dict) -> list[Path]:
        """Saves an image unless it is the first to delete. Returns the deleted files."""
        encoded = data.encode_png(data.grid(pixels[None], padding=0), facts)
        size = len(encoded) + len(json.dumps(facts)) + 1
        if self.unscanned > self.limit / 50:  # others save here too
            self.scan()
        self._add(path, size)
        self.unscanned += size
        deleted = self._make_room()
        if path not in deleted:
            self._append(path.parent, facts)  # first, so that no file is without a line
            data.atomic_write(path, lambda file: file.write(encoded))
        return deleted

    def _make_room(self) -> list[Path]:
        """Deletes images, and logs of days without images, until the rest fit. Returns the images."""
        deleted = []
        while self.bytes > self.limit and self.images:
            day, _, file, size = heapq.heappop(self.images)
            self.bytes -= size
            with suppress(OSError):  # somebody else's by now, or gone
                file.unlink()
            deleted.append(file)
            if self.images and self.images[0][0] != day:
                self._delete_logs(file.parent)
        return deleted

    def _delete_logs(self, day: Path) -> None:
        with suppress(OSError):  # other files are kept
            for log in self.logs(day):
                self.bytes -= log.stat().st_size
                log.unlink()
            day.rmdir()
