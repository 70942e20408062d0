"""Runs that are killed, doubled, restarted or left without disk, terminal or memory: nothing is lost or mixed up."""

import errno
import io
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import data
import sample
import train
from builtin import run_folder
from data import InputError
from tests.conftest import OFTEN, TINY
from tests.test_train import (
    ROOT,
    PowerCut,
    assert_same_run,
    environment,
    error_of,
    in_two_processes,
    metrics,
    stop_at,
    weights,
)

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a system with fork and file locks")


@pytest.fixture(scope="module")
def whole(shapes, tmp_path_factory):
    """A run of 12 steps that nothing interrupted."""
    out = tmp_path_factory.mktemp("faults") / "whole"
    assert train.main(["--data", str(shapes), "--out", str(out), "--steps", "12", *TINY, *OFTEN]) == 0
    return out


# ---- who may write into a folder -------------------------------------------------------------------------------------


def test_a_folder_in_use_is_refused(tmp_path, capsys, fit, whole):
    """Another process holds the lock: to the system, another opened file is the same as another process."""
    shutil.copytree(whole, tmp_path / "run")
    before = weights(tmp_path / "run")
    with data.locked(tmp_path / "run/lock", "other", "in use"):
        assert train.main(["--resume", str(tmp_path / "run"), "--steps", "20"]) == 2
        assert f"another process is training in {tmp_path / 'run'}; wait" in error_of(capsys)
    assert weights(tmp_path / "run") == before
    (tmp_path / "new").mkdir()
    with data.locked(tmp_path / "new/lock", "other", "in use"):  # it has only begun
        assert fit(tmp_path / "new") == 2
        assert "another process is training in" in error_of(capsys)
    assert os.listdir(tmp_path / "new") == ["lock"]
    assert train.main(["--resume", str(tmp_path / "run"), "--steps", "13"]) == 0


def test_a_killed_process_leaves_no_lock(tmp_path):
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        with data.locked(tmp_path / "lock", "child", "in use"):
            os.write(writer, b"locked")
            time.sleep(60)
    assert os.read(reader, 6) == b"locked"
    with pytest.raises(InputError, match="in use"), data.locked(tmp_path / "lock", "parent", "in use"):
        raise AssertionError("two holders")
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with data.locked(tmp_path / "lock", "parent", "in use"):
        assert (tmp_path / "lock").read_text() == "parent"


def test_runs_of_one_second_get_folders_of_their_own(tmp_path, monkeypatch):
    class Noon:
        @staticmethod
        def now():
            return Noon

        @staticmethod
        def strftime(text):
            return "2026-01-01-120000"

    monkeypatch.setattr(run_folder, "datetime", Noon)
    monkeypatch.chdir(tmp_path)
    names = [run_folder.new_folder(None).name for _ in range(3)]
    assert names == ["2026-01-01-120000", "2026-01-01-120000-2", "2026-01-01-120000-3"]


def test_a_run_that_cannot_begin_leaves_no_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert train.main(["--data", "nowhere", *TINY]) == 2
    assert train.main(["--data", "nowhere", *TINY, "--out", "there"]) == 2
    assert not list(tmp_path.glob("runs/*")) and not (tmp_path / "there").exists()


# ---- what killed processes leave -------------------------------------------------------------------------------------


def test_temporary_files_of_a_killed_save_are_deleted(tmp_path, whole):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    left = [run / ".config.json.0123456789ab.tmp", run / "model/unet/.diffusion.safetensors.ba9876543210.tmp"]
    kept = [run / ".notes", run / ".notes.tmp", run / "model/x.0123456789ab.tmp"]
    for path in left + kept:
        path.write_bytes(b"x")
    assert train.main(["--resume", str(run), "--steps", "13"]) == 0
    assert not any(path.exists() for path in left) and all(path.exists() for path in kept)


def test_scratch_folders_of_the_cache_are_deleted_after_a_day(tmp_path, monkeypatch, shapes):
    monkeypatch.setenv("PAPILIO_CACHE", str(tmp_path))
    old, fresh, writing, foreign = (
        tmp_path / "data" / name
        for name in (".aaaaaaaaaaaaaaaa.000000000000", ".aaaaaaaaaaaaaaaa.000000000001",
                     ".aaaaaaaaaaaaaaaa.000000000002", ".somebody")
    )  # fmt: skip
    for folder in (old, fresh, writing, foreign):
        folder.mkdir(parents=True)
        (folder / "images.bin").write_bytes(b"x")
    for path in (old / "images.bin", old, writing, foreign / "images.bin", foreign):
        os.utime(path, (0, time.time() - 90_000))
    data.prepare(str(shapes), 16, progress=False)
    assert not old.exists() and fresh.exists() and writing.exists() and foreign.exists()


def test_a_run_killed_before_its_first_checkpoint_starts_over(tmp_path, monkeypatch, capsys, fit, whole):
    def power_cut(*args):
        raise PowerCut

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(train, "save_checkpoint", power_cut)
        with pytest.raises(PowerCut):
            fit(run)
    assert (run / "config.json").exists()
    assert train.main(["--resume", str(run)]) == 2
    assert f"{run}: this run ended before its first checkpoint; repeat its first command with --out" in error_of(capsys)
    assert fit(run) == 0
    assert_same_run(run, whole)


@pytest.mark.parametrize("name", ["config.json", "notes.txt", "samples/mine.png", "metrics.jsonl"])
def test_only_what_a_run_left_is_written_over(tmp_path, capsys, fit, name):
    """Without a lock the file is somebody's; with one, only a run's own files are replaced, and no metrics."""
    (tmp_path / "run" / name).parent.mkdir(parents=True)
    (tmp_path / "run" / name).write_text('{"mine": 1}\n')
    if name != "config.json":
        (tmp_path / "run/lock").touch()
    assert fit(tmp_path / "run") == 2 and "is not empty" in error_of(capsys)
    assert (tmp_path / "run" / name).read_text() == '{"mine": 1}\n'


# ---- restarts by torchrun, errors of several processes ---------------------------------------------------------------

DIES_ONCE = """
import os, signal, sys
import train

update = train.State.update


def dying(self, loss, settings):
    update(self, loss, settings)
    if self.step == 6 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and os.environ["RANK"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)


train.State.update = dying
sys.exit(train.main())
"""


def restarted(folder, shapes, *flags, processes=1) -> subprocess.CompletedProcess:
    (folder / "dies.py").write_text(DIES_ONCE)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [*torchrun, "--max-restarts=1", str(folder / "dies.py"), "--data", str(shapes), "--steps", "12"]
    variables = environment() | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [*command, *TINY, *OFTEN, *flags], cwd=folder, env=variables, capture_output=True, text=True, timeout=180
    )


def test_a_worker_killed_under_torchrun_goes_on(tmp_path, shapes, whole):
    """Restarted without --out, it finds its own run among others and continues from its newest checkpoint."""
    (tmp_path / "runs/other").mkdir(parents=True)
    (tmp_path / "runs/other/lock").write_text("elsewhere 1")
    (tmp_path / "runs/other/checkpoint-00000001.pt").touch()
    done = restarted(tmp_path, shapes)
    assert done.returncode == 0, done.stderr
    assert "continuing from step 4" in done.stdout
    (run,) = (path for path in (tmp_path / "runs").iterdir() if path.name != "other")
    assert_same_run(run, whole)


def test_a_restarted_command_with_out_resumes(tmp_path, monkeypatch, fit, whole):
    """A restarted process has the flags of the first start: nothing is refused and nothing begins again."""
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")

    def crash():
        raise RuntimeError("crash")

    with monkeypatch.context() as patch:
        stop_at(patch, 6, crash)
        with pytest.raises(RuntimeError, match="crash"):
            fit(tmp_path / "run", "--preset", "nano")
    assert fit(tmp_path / "run", "--preset", "nano") == 0
    assert_same_run(tmp_path / "run", whole)
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT")
    assert fit(tmp_path / "run", "--preset", "nano") == 2


def test_a_restart_does_not_touch_the_run_of_another_launch(tmp_path, monkeypatch, capsys, fit, whole):
    """Its first attempt was refused; so is each restart."""
    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "run/lock").write_text("elsewhere 12 345")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert fit(tmp_path / "run", "--seed", "7", steps=20) == 2 and "is not empty" in error_of(capsys)
    assert metrics(tmp_path / "run") == metrics(whole)


def test_a_process_without_the_checkpoint_is_told_so(monkeypatch):
    processes = train.Processes(torch.device("cpu"))
    processes.rank = 1
    monkeypatch.setattr(processes, "broadcast", lambda step: 8)
    processes.require_same(8)
    with pytest.raises(InputError, match="process 1 sees the checkpoint of step 0 and process 0 that of step 8; put"):
        processes.require_same(0)


def test_an_error_of_both_processes_is_printed_once(tmp_path, shapes):
    """Bad flags, before the processes know each other, and a divergence, long after."""
    bad = in_two_processes(tmp_path, ["--data", shapes, *TINY, "--accumulate", "3", "--out", tmp_path / "a"])
    assert bad.returncode == 2 and bad.stderr.count("error:") == 1 and "multiple of 6" in bad.stderr
    patch = "train.ddpm.losses = lambda table, output, target, t: output.mean((1, 2, 3)) * float('nan')"
    diverged = in_two_processes(
        tmp_path, ["--data", shapes, *TINY, *OFTEN, "--steps", 9, "--out", tmp_path / "b"], patch=patch
    )
    assert diverged.returncode == 1 and diverged.stderr.count("error:") == 1, diverged.stderr
    assert "not finite at step 0" in diverged.stderr and "Traceback" not in diverged.stderr


# ---- no terminal, no disk, no folder, no memory ----------------------------------------------------------------------


def test_training_goes_on_without_anyone_to_read_its_output(tmp_path, shapes, whole):
    """Standard output on a full disk, standard error a pipe that nobody reads, and the terminal hangs up."""
    code = """
import os, signal, sys, train
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup has it ignored
train.Stop()
os.kill(os.getpid(), signal.SIGHUP)
sys.exit(train.main())
"""
    flags = ["--data", shapes, "--out", tmp_path / "run", "--steps", 12, *TINY, *OFTEN]
    reader, writer = os.pipe()
    os.close(reader)
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-c", code, *map(str, flags)]
        variables = environment() | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
        assert subprocess.run(command, stdout=full, stderr=writer, env=variables, timeout=120).returncode == 0
    os.close(writer)
    assert_same_run(tmp_path / "run", whole)


def test_output_is_complete_until_it_fails(tmp_path):
    with open(tmp_path / "out", "w") as file:
        out = train.Output(file)
        print("one", file=out, flush=True)
        os.dup2(os.open("/dev/full", os.O_WRONLY), file.fileno())
        for _ in range(3):
            print("two", file=out, flush=True)
    assert (tmp_path / "out").read_text() == "one\n"
    assert train.Output(io.StringIO()).isatty() is False
    missing = train.Output(None)  # of a process that began with a closed descriptor
    print("three", file=missing)
    missing.stream.close()


@pytest.mark.parametrize("what", ["deleted", "replaced", "a file"])
def test_a_folder_that_is_gone_is_told_from_a_full_disk(tmp_path, monkeypatch, capsys, fit, what):
    def take_away():
        shutil.move(tmp_path / "run", tmp_path / "elsewhere")
        if what == "replaced":
            (tmp_path / "run").mkdir()
        elif what == "a file":
            (tmp_path / "run").touch()

    with monkeypatch.context() as patch:
        stop_at(patch, 6, take_away)
        assert fit(tmp_path / "run") == 2
    assert f"{tmp_path / 'run'} was deleted or replaced during the run" in error_of(capsys)
    assert not list(tmp_path.glob("run/*"))
    assert train.main(["--resume", str(tmp_path / "elsewhere")]) == 0  # nothing was lost


FULL, DENIED = "free some space", "check its permissions"


@pytest.mark.parametrize("code, remedy", [("ENOSPC", FULL), ("EDQUOT", FULL), ("EROFS", DENIED), ("EACCES", DENIED)])
def test_the_remedy_fits_the_error(tmp_path, monkeypatch, capsys, fit, code, remedy):
    def fail(path, write, whole=data.atomic_write):
        if "00000004" in str(path):
            with data.disk_errors(f"write {path}"):
                number = getattr(errno, code)
                raise OSError(number, os.strerror(number))
        whole(path, write)

    monkeypatch.setattr(data, "atomic_write", fail)
    assert fit(tmp_path / "run") == 2
    assert f"{os.strerror(getattr(errno, code))}; {remedy} or choose another place" in error_of(capsys)


@pytest.mark.parametrize("status", ["one", "both"])
def test_a_batch_that_diverges_is_skipped_on_request(tmp_path, monkeypatch, capsys, fit, whole, status):
    """The loss of step 6, and of step 7 too, is not finite whenever it is computed."""
    bad, losses = {"one": {6}, "both": {6, 7}}[status], train.prediction_losses
    batch_of = train.Batches.__call__
    current = []

    def remember(self, step):
        current[:] = [step]
        return batch_of(self, step)

    def planted(*args):
        return losses(*args) * (float("nan") if current[0] in bad and torch.is_grad_enabled() else 1)

    monkeypatch.setattr(train.Batches, "__call__", remember)
    monkeypatch.setattr(train, "prediction_losses", planted)
    assert fit(tmp_path / "run") == 1
    assert "resume with --skip-batches 6 to skip this batch" in error_of(capsys)
    skip = "6"
    if status == "both":
        assert train.main(["--resume", str(tmp_path / "run"), "--skip-batches", "6"]) == 1
        assert "resume with --skip-batches 7 to skip" in error_of(capsys)
        skip = "7"
    assert train.main(["--resume", str(tmp_path / "run"), "--skip-batches", skip]) == 0
    assert "skipped the batch of step 6" in capsys.readouterr().out
    skip = ",".join(map(str, sorted(bad)))
    skipped = [line["skipped_batch"] for line in metrics(tmp_path / "run") if "skipped_batch" in line]
    assert skipped == sorted(bad)
    assert fit(tmp_path / "again", "--skip-batches", skip) == 0
    assert_same_run(tmp_path / "run", tmp_path / "again")
    assert weights(tmp_path / "run") != weights(whole)
    assert train.main(["--resume", str(tmp_path / "run"), "--steps", "13"]) == 0  # remembered by the run
    for steps, sentence in (("3", "this run has made step 3 already; it is at step 13"), ("70", "has only 20 steps")):
        assert train.main(["--resume", str(tmp_path / "run"), "--steps", "20", "--skip-batches", steps]) == 2
        assert f"--skip-batches {steps}: " in (error := error_of(capsys)) and sentence in error


def test_an_interval_of_skipped_batches_has_no_loss(tmp_path, fit):
    assert fit(tmp_path / "run", "--skip-batches", "0,1,2", steps=6) == 0
    lines = [line for line in metrics(tmp_path / "run") if "lr" in line]
    assert "loss" not in lines[0] and "grad_norm" not in lines[0] and lines[1]["loss"] > 0


def test_a_gpu_that_is_too_small_names_the_batch_that_fits(tmp_path, monkeypatch, capsys, fit):
    losses = train.prediction_losses
    fits = [2]

    def limited(network, table, batch, autocast):
        if len(batch.x0) > fits[0] and torch.is_grad_enabled():
            raise torch.OutOfMemoryError("CUDA out of memory")
        return losses(network, table, batch, autocast)

    monkeypatch.setattr(train, "prediction_losses", limited)
    run = tmp_path / "run"
    assert fit(run) == 2
    error = error_of(capsys)
    assert "8 images at a time do not fit in the memory of the GPU, but 2 do" in error
    assert f"python train.py --resume {run} --accumulate 4 (" in error
    assert train.main(["--resume", str(run), "--accumulate", "4"]) == 0
    assert fit(tmp_path / "again", "--accumulate", "4") == 0
    assert_same_run(run, tmp_path / "again")
    fits[0] = 5
    assert fit(tmp_path / "half") == 2 and "but 4 do; " in (error := error_of(capsys)) and "--accumulate 2 (" in error
    fits[0] = 0
    assert fit(tmp_path / "none") == 2 and "nor does a single one" in error_of(capsys)


# ---- kill -9 ---------------------------------------------------------------------------------------------------------


def child(work) -> int:
    """Calls work() in a forked process. Returns its exit status, or minus the signal that killed it."""
    process = os.fork()
    if not process:
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(1, 2)
            status = work()
        except BaseException:
            status = 99
        os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


CALLS = [(os, "fsync"), (os, "replace"), (Path, "unlink"), (Path, "mkdir"), (run_folder.torch, "save")]


def killed_at(fit, out: Path, number: int) -> int:
    """Trains in a process that kills itself at its n-th call of a function that a save uses."""

    def work():
        count = [0]

        def killing(real):
            def call(*args, **kwargs):
                count[0] += 1
                if count[0] == number:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*args, **kwargs)

            return call

        for holder, name in CALLS:
            setattr(holder, name, killing(getattr(holder, name)))
        return fit(out)

    return child(work)


def finish(fit, out: Path) -> None:
    """Continues a killed run by the advice of the errors: resume it, or begin again where nothing was trained."""
    if train.main(["--resume", str(out)]) and not (out / "checkpoint-00000012.pt").exists():
        assert fit(out) == 0


def test_killed_at_calls_of_a_save(tmp_path, fit, whole, request):
    """At some of the calls, or with --soak at each."""
    soak, number = request.config.getoption("--soak"), 0
    while True:
        number += 1 if soak else 17
        run = tmp_path / str(number)
        status = killed_at(fit, run, number)
        if not status:
            break
        assert status == -signal.SIGKILL
        if run.exists():
            finish(fit, run)
            assert_same_run(run, whole)
            assert not list(run.rglob(".*.tmp"))
    print(f"\nkilled at {number - 1} calls")
    assert number > 50


def test_killed_at_random_moments(tmp_path, fit, whole, request):
    """Three times, or with --soak 50 times."""
    moments = random.Random(0)
    for i in range(50 if request.config.getoption("--soak") else 3):
        run = tmp_path / str(i)

        seconds = moments.uniform(0.05, 1.2)

        def work(run=run, seconds=seconds):
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.setitimer(signal.ITIMER_REAL, seconds)
            return fit(run)

        assert child(work) in (0, -signal.SIGALRM)
        if run.exists():
            finish(fit, run)
            assert_same_run(run, whole)


def test_a_file_that_may_not_grow_is_a_full_disk(tmp_path, fit, whole, shapes):
    """The system's limit for the size of a file, below that of a checkpoint."""
    size = (whole / "checkpoint-00000012.pt").stat().st_size
    out = tmp_path / "errors"

    def work():
        resource.setrlimit(resource.RLIMIT_FSIZE, (size - 1, size - 1))
        with open(out, "w") as sys.stderr:
            return fit(tmp_path / "run")

    assert child(work) == 2
    assert "File too large; free some space" in out.read_text()
    assert not list((tmp_path / "run").rglob(".*.tmp"))
    finish(fit, tmp_path / "run")
    assert_same_run(tmp_path / "run", whole)
    assert json.loads((tmp_path / "run/config.json").read_text())["settings"]["steps"] == 12
    assert sample.find_model(tmp_path / "run")[0] == tmp_path / "run"
