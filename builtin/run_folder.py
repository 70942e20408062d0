"""The folder of a run: who may write into it, its checkpoints and its metrics."""

import argparse
import hashlib
import io
import json
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

import torch

import data
import sample
from data import InputError


def save_checkpoint(folder: Path, step: int, content: dict, keep: int) -> None:
    """Writes a checkpoint atomically, with its SHA-256 appended, and then deletes older checkpoints."""
    torch.save(content, buffer := io.BytesIO())  # in memory first: torch's writer hides errors of the disk
    parts = buffer.getbuffer(), hashlib.sha256(buffer.getbuffer()).digest()
    data.atomic_write(folder / f"checkpoint-{step:08d}.pt", lambda file: file.writelines(parts))
    # By time: by step, a damaged checkpoint could outlive newer ones.
    files = sorted(folder.glob("checkpoint-*.pt"), key=lambda file: file.stat().st_mtime_ns)
    for old in files[:-keep]:
        with data.disk_errors(f"delete {old}"):
            old.unlink()


def load_checkpoint(folder: Path) -> dict:
    """Reads the newest intact checkpoint, and reports damaged ones. Raises InputError if there is none."""
    for file in sorted(folder.glob("checkpoint-*.pt"), reverse=True):
        problem = "is damaged"
        try:
            content = file.read_bytes()
            if hashlib.sha256(content[:-32]).digest() == content[-32:]:
                return torch.load(io.BytesIO(content[:-32]), map_location="cpu", weights_only=True)
        except OSError as error:
            problem = f"cannot be read ({error.strerror})"
        print(f"{file} {problem}; trying the previous one", file=sys.stderr)
    raise InputError(f"{folder} has no intact checkpoint, so it cannot be resumed; start a new run")


def append_metrics(folder: Path, record: dict) -> None:
    path = folder / "metrics.jsonl"
    with data.disk_errors(f"write {path}"), open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def cut_metrics(folder: Path, step: int) -> None:
    """Drops lines logged after the checkpoint, which will be logged again, and a line cut off by a crash."""
    path = folder / "metrics.jsonl"
    kept = []
    with data.disk_errors(f"read {path}"):
        lines = path.read_bytes().splitlines() if path.exists() else []
    for line in lines:
        with suppress(ValueError, TypeError, KeyError):
            if json.loads(line)["step"] <= step:
                kept.append(line + b"\n")
    data.atomic_write(path, lambda file: file.write(b"".join(kept)))


# What a run may write before its first checkpoint.
BEFORE_TRAINING = {"lock", "config.json", "metrics.jsonl", "samples", "data.png"}


def is_untrained(folder: Path) -> bool:
    """Returns whether a run ended in this folder before its first checkpoint."""
    names = {path.name for path in [*folder.glob("*"), *folder.glob("samples/*")] if path.suffix != ".tmp"}
    metrics = folder / "metrics.jsonl"
    logged = metrics.exists() and metrics.stat().st_size > 0
    return "lock" in names and names <= BEFORE_TRAINING and not logged


def new_folder(out: Path | None) -> Path:
    """Makes the folder of a new run: `out`, or one named after the current time.

    Raises InputError if `out` is not empty, so that nothing is overwritten.
    """
    if out:
        with data.disk_errors(f"use the folder --out {out}"):
            out.mkdir(parents=True, exist_ok=True)
            if any(out.iterdir()) and not is_untrained(out):
                raise InputError(f"--out {out} is not empty; use --resume to continue a run, or name a new folder")
        return out
    name = datetime.now().strftime("%Y-%m-%d-%H%M%S")
    for ending in ("", *(f"-{i}" for i in range(2, 100))):  # several runs may start in one second
        folder = sample.RUNS / f"{name}{ending}"
        with data.disk_errors(f"make the folder {folder}"), suppress(FileExistsError):
            folder.mkdir(parents=True)
            return folder
    raise InputError(f"{folder} exists; name another folder with --out")


def launch_name() -> str:
    """Returns a name of the torchrun that started this process: machine, process number, time of its start."""
    started = ""
    with suppress(OSError, IndexError):  # /proc exists only on Linux
        started = Path(f"/proc/{os.getppid()}/stat").read_text().rpartition(")")[2].split()[19]
    return f"{platform.node()} {os.getppid()} {started}".strip()


def resume_after_restart(args: argparse.Namespace, given: dict) -> None:
    """Makes the command resume its run if torchrun has restarted it and the run has a checkpoint.

    The run to resume is the one whose lock holds launch_name(). With --out, only the first process checks this.
    """
    if args.resume or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        return
    locks = [args.out / "lock"] if args.out else sample.RUNS.glob("*/lock")
    locks = sorted((lock for lock in locks if lock.is_file()), key=lambda lock: lock.stat().st_mtime_ns)
    elsewhere = args.out and os.environ.get("RANK", "0") != "0"  # perhaps on another machine
    for lock in locks:
        if any(lock.parent.glob("checkpoint-*.pt")) and (elsewhere or lock.read_text() == launch_name()):
            given.clear()
            vars(args).update(dict.fromkeys(vars(args)), resume=lock.parent)


@contextmanager
def run_folder(args: argparse.Namespace) -> Iterator[Path | None]:
    """Makes and locks the folder of this run, in the first process; the others get None.

    Raises InputError if another process trains in it, or if --out holds something else.
    """
    if os.environ.get("RANK", "0") != "0":
        yield None
        return
    folder = args.resume or new_folder(args.out)
    if not any((folder / name).exists() for name in ("lock", "config.json")) and args.resume:
        raise InputError(f"--resume {folder} is not a run folder: it has no config.json; name a run's folder")
    sentence = f"another process is training in {folder}; wait until it ends, or name another folder with --out"
    with data.locked(folder / "lock", launch_name(), sentence):
        data.remove_temporary_files(folder)
        if args.resume and is_untrained(folder):
            raise InputError(
                f"{folder}: this run ended before its first checkpoint; repeat its first command with --out {folder}"
            )
        try:
            yield folder
        finally:
            if [path.name for path in folder.glob("*")] == ["lock"]:  # the run has not begun
                with suppress(OSError):
                    (folder / "lock").unlink()
                    folder.rmdir()
