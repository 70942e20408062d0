"""Training: it learns, it resumes to the bit, it is the same on two processes, and nothing bad reaches a file."""

import errno
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.optim.optimizer import register_optimizer_step_pre_hook

import data
import ddpm
import sample
import train
import unet
from builtin import butterflies, muon
from tests.conftest import OFTEN, TINY, randomise, status_of
from tests.shapes import make_shapes

ROOT = Path(__file__).parent.parent
CLOCK = {"time", "images_per_second", "quality_seconds"}  # the only fields that may differ between equal runs


def metrics(run: Path) -> list[dict]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in CLOCK} for line in lines]


def weights(run: Path, name: str = "model") -> bytes:
    return (run / name / "unet/diffusion_pytorch_model.safetensors").read_bytes()


def flatten(state, prefix=""):
    if isinstance(state, dict):
        for key, value in state.items():
            yield from flatten(value, f"{prefix}.{key}")
    else:
        yield prefix, state


def assert_same_run(a: Path, b: Path) -> None:
    """Weights, average, moments, metrics and pictures, bit for bit."""
    assert metrics(a) == metrics(b)
    assert weights(a) == weights(b) and weights(a, "best") == weights(b, "best")
    states = [dict(flatten(train.load_checkpoint(run))) for run in (a, b)]
    assert states[0].keys() == states[1].keys() and len(states[0]) > 100
    for name, value in states[0].items():
        other = states[1][name]
        assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other, name
    pictures = [sorted(path.name for path in (run / "samples").iterdir()) for run in (a, b)]
    assert pictures[0] == pictures[1]
    for name in pictures[0]:
        assert (a / "samples" / name).read_bytes() == (b / "samples" / name).read_bytes()


def command(*flags, processes: int = 1) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return [sys.executable, *(launcher if processes > 1 else []), str(ROOT / "train.py"), *map(str, flags)]


IN_TWO = """
import json, multiprocessing, os, sys, time
import data, sample, train
from builtin import butterflies

exec(sys.argv[1])


def work(rank, port, flags):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE="2")
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    sys.exit(train.main(flags))


if __name__ == "__main__":
    kind = multiprocessing.get_context("fork" if hasattr(os, "fork") else "spawn")
    for port, flags in json.loads(sys.argv[2]):
        both = [kind.Process(target=work, args=(rank, port, flags)) for rank in range(2)]
        [process.start() for process in both]
        while any(process.is_alive() for process in both):  # as torchrun does
            if any(process.exitcode for process in both):
                [process.terminate() for process in both]
            time.sleep(0.02)
        if any(process.exitcode for process in both):
            sys.exit(max(process.exitcode for process in both))
"""


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def in_two_processes(folder: Path, *runs, patch: str = "") -> subprocess.CompletedProcess:
    """Each run on two processes as torchrun would start them, of which one has imported PyTorch for all; `patch` is
    code that changes the modules before."""
    (folder / "two.py").write_text(IN_TWO)
    work = json.dumps([(free_port(), list(map(str, flags))) for flags in runs])
    variables = environment() | {"PYTHONPATH": str(ROOT), "HF_ENDPOINT": "http://127.0.0.1:9", "no_proxy": "*"}
    command = [sys.executable, str(folder / "two.py"), patch, work]
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=120)


def environment() -> dict:
    return os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}


def error_of(capsys) -> str:
    """The one sentence on stderr."""
    lines = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert len(lines) == 1, lines
    return lines[0].split("error: ", 1)[1]


def stop_at(monkeypatch, step: int, act):
    """Calls act() inside the update that makes `step` complete."""
    update = train.State.update

    def patched(self, loss, settings):
        update(self, loss, settings)
        if self.step == step:
            act()

    monkeypatch.setattr(train.State, "update", patched)


# ---- it learns -------------------------------------------------------------------------------------------------------


def test_one_batch_is_overfitted(tmp_path):
    """Eight images, seen again and again: the loss falls to a fraction of where it began, 1 for v at zero output."""
    shapes = make_shapes(tmp_path / "eight", count=9, size=16)
    recipe = {"lr": 4e-3, "dropout": 0, "density": "uniform", "warmup": 20, "decay": "constant", "log_every": 10}
    rare = {"eval_every": 1000, "preview_every": 1000, "save_every": 1000}
    flags = [text for name, value in (recipe | rare).items() for text in (f"--{name.replace('_', '-')}", str(value))]
    where = ["--data", str(shapes), "--out", str(tmp_path / "run"), "--steps", "200", "--no-flips"]
    assert train.main([*where, *TINY, *flags, "--channels", "16,32", "--head-dim", "16"]) == 0
    losses = [line["loss"] for line in metrics(tmp_path / "run") if "loss" in line]
    assert len(losses) == 20
    assert losses[0] > 0.4 and np.mean(losses[-3:]) < 0.25 * losses[0]


def test_bf16_keeps_weights_in_float32(tmp_path, fit):
    assert fit(tmp_path / "run", "--precision", "bf16", steps=6) == 0
    state = train.load_checkpoint(tmp_path / "run")
    floats = [v for _, v in flatten(state) if isinstance(v, torch.Tensor) and v.is_floating_point()]
    assert {value.dtype for value in floats} == {torch.float32}
    lines = metrics(tmp_path / "run")
    plain = tmp_path / "plain"
    assert fit(plain, steps=6) == 0
    pairs = [(a["loss"], b["loss"]) for a, b in zip(lines, metrics(plain), strict=True) if "loss" in a]
    assert all(a != b and abs(a - b) < 0.02 * b for a, b in pairs)  # another rounding, the same course


# ---- schedules of the rate and of the average ------------------------------------------------------------------------


def test_learning_rate():
    settings = {"lr": 2.0, "warmup": 9, "decay": "cosine", "steps": 109}
    rates = [train.learning_rate(settings, step) for step in range(110)]
    assert rates[:9] == pytest.approx([0.2 * (i + 1) for i in range(9)])
    assert rates[9] == 2 and rates[59] == pytest.approx(1) and rates[109] == pytest.approx(0, abs=1e-12)
    assert train.learning_rate(settings | {"decay": "constant"}, 100) == 2


@pytest.mark.parametrize("optimizer, share", [("muon", 0.3), ("adamw", 1)])
def test_each_update_has_the_rate_of_its_step(tmp_path, fit, optimizer, share):
    """As each optimizer holds it when it steps, and as it is logged: warm-up over 2 of 6 steps, then half a cosine."""
    expected = [0.02 * part for part in (1 / 3, 2 / 3, *((1 + math.cos(math.pi * k / 4)) / 2 for k in range(4)))]
    held = {}

    def record(stepping, args, kwargs):
        held.setdefault(type(stepping).__name__, []).append(float(stepping.param_groups[0]["lr"]))

    hook = register_optimizer_step_pre_hook(record)
    try:
        assert fit(tmp_path / "run", "--optimizer", optimizer, "--lr", "0.02", "--log-every", "1", steps=6) == 0
    finally:
        hook.remove()
    assert held["AdamW"] == pytest.approx([share * rate for rate in expected])
    assert optimizer == "adamw" or held["Muon"] == pytest.approx(expected)
    logged = {line["step"]: line["lr"] for line in metrics(tmp_path / "run") if "lr" in line}
    assert list(logged) == [1, 2, 3, 4, 5, 6] and list(logged.values()) == pytest.approx(expected)


@pytest.mark.parametrize("optimizer, share", [("muon", 0.3), ("adamw", 1)])
def test_weights_decay_by_the_rate_times_the_weight_decay(optimizer, share):
    """Without gradients nothing else moves them: those of AdamW beside Muon by its share of the rate."""
    tiny = {"channels": [8, 16], "attention": [8], "size": 16, "head_dim": 8, "precision": "fp32"}
    settings = train.DEFAULTS | tiny | {"optimizer": optimizer, "lr": 0.1, "weight_decay": 0.5, "warmup": 0}
    network = unet.UNet(train.make_configs(settings, ())[0])
    randomise(network)
    before = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    state = train.State(network, settings, torch.device("cpu"))
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    state.update(torch.tensor(1.0), settings)
    kept = {name: float((p.detach() / before[name]).mean()) for name, p in network.named_parameters()}
    assert kept["conv_in.weight"] == pytest.approx(1 - share * 0.1 * 0.5, rel=1e-5)
    assert kept["mid_block.resnets.0.conv1.weight"] == pytest.approx(1 - 0.1 * 0.5, rel=1e-5)
    assert set(np.round(list(kept.values()), 4)) == {0.95, round(1 - share * 0.05, 4)}


def test_average_halves_in_its_half_life():
    """After the ramp, images that are one half-life old count half: the product of what is kept is 1/2."""
    settings = {"ema": 640, "batch_size": 8}
    kept = math.prod(1 - train.ema_weight(settings, step) for step in range(5000, 5080))
    assert kept == pytest.approx(0.5, rel=1e-12)
    # While it grows, the half-life is a tenth of the images seen: from n to 1.1 n images about half is kept.
    kept = math.prod(1 - train.ema_weight(settings | {"ema": 10**9}, step) for step in range(10_000, 11_000))
    assert kept == pytest.approx(2 ** -(10 * math.log(1.1)), rel=1e-3)
    assert train.ema_weight(settings | {"ema": 0}, 5) == 1


def test_average_follows_its_formula(tmp_path, monkeypatch, fit):
    expected, update = {}, train.State.update

    def patched(self, loss, settings):
        before = {name: value.double() for name, value in self.ema.named_parameters()}
        update(self, loss, settings)
        weight = train.ema_weight(settings, self.step - 1)
        for name, value in self.network.named_parameters():
            expected[name] = before[name] + weight * (value.detach().double() - before[name])
            assert torch.allclose(dict(self.ema.named_parameters())[name].double(), expected[name], atol=1e-7)

    monkeypatch.setattr(train.State, "update", patched)
    assert fit(tmp_path / "run", steps=4) == 0 and len(expected) > 50


# ---- pure functions of (seed, step, position) ------------------------------------------------------------------------


def make_batches(shapes, rank=0, world=1, null=None, **changes) -> train.Batches:
    settings = train.DEFAULTS | {"batch_size": 8, "classes": True} | changes
    dataset = data.prepare(str(shapes), 16, progress=False)
    cdf = ddpm.timestep_cdf(ddpm.Schedule())
    return train.Batches(dataset, data.split(dataset)[0], settings, null, cdf, torch.device("cpu"), rank, world)


def test_batches_are_pure_and_cut_into_shares(shapes):
    whole = make_batches(shapes)
    forward = [whole(step) for step in (0, 1, 7)]
    backward = [make_batches(shapes)(step) for step in (7, 1, 0)]
    for a, b in zip(forward, reversed(backward), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    shares = [make_batches(shapes, rank, 4)(7) for rank in range(4)]
    for part, full in zip(zip(*shares, strict=True), forward[2], strict=True):
        assert torch.equal(torch.cat(part), full)
    other = make_batches(shapes, seed=1)(7)
    assert not torch.equal(other[0], forward[2][0]) and not torch.equal(other[3], forward[2][3])


def test_hidden_labels_are_pure_a_share_and_cut_into_shares(shapes):
    seen = make_batches(shapes, batch_size=800)(3)[1]
    hidden = make_batches(shapes, batch_size=800, null=5, label_dropout=0.25)(3)[1]
    share = float((hidden == 5).float().mean())
    assert abs(share - 0.25) < 5 * math.sqrt(0.25 * 0.75 / 800)  # five standard deviations
    assert torch.equal(hidden[hidden != 5], seen[hidden != 5]) and not (seen == 5).any()
    parts = [make_batches(shapes, rank, 4, batch_size=800, null=5, label_dropout=0.25)(3)[1] for rank in range(4)]
    assert torch.equal(torch.cat(parts), hidden)
    for other in ({"seed": 1}, {}):
        again = make_batches(shapes, batch_size=800, null=5, label_dropout=0.25, **other)(3 if other else 4)[1]
        assert not torch.equal(again == 5, hidden == 5)


def test_held_out_loss_is_fixed(shapes):
    dataset = data.prepare(str(shapes), 16, progress=False)
    _, rows = data.split(dataset)
    schedule = ddpm.Schedule(prediction_type="v_prediction")
    table = ddpm.training_table(schedule).float()
    cdf = ddpm.timestep_cdf(schedule)
    zero = [
        train.HeldOut(dataset, rows, train.DEFAULTS | {"batch_size": size, "seed": seed}, cdf, torch.device("cpu"))
        .losses(lambda x, t, labels: torch.zeros_like(x), table, torch.no_grad)
        .mean()
        .item()
        for size, seed in ((8, 0), (3, 5))
    ]
    assert zero[0] == pytest.approx(zero[1], rel=1e-6)
    # For a network that says 0 the loss is the mean square of v = alpha eps - sigma x0, near alpha^2 + sigma^2 E x0^2.
    assert 0.5 < zero[0] < 1.5


def test_held_out_loss_is_of_the_average(tmp_path, monkeypatch, fit):
    seen, losses = [], train.HeldOut.losses

    def recording(self, network, *rest):
        seen.append({name: value.clone() for name, value in network.state_dict().items()})
        return losses(self, network, *rest)

    monkeypatch.setattr(train.HeldOut, "losses", recording)
    assert fit(tmp_path / "run", steps=4) == 0 and len(seen) == 1
    state = train.load_checkpoint(tmp_path / "run")
    assert all(torch.equal(value, state["ema"][name]) for name, value in seen[0].items())
    assert not any(torch.equal(seen[0][name], state["network"][name]) for name in ("conv_in.weight", "conv_out.weight"))


# ---- several processes -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def by_two(tmp_path_factory, shapes):
    """Three steps of each optimizer on two processes, Muon's updates not rounded to bfloat16, and one on the data that
    `auto` finds (the hub is a closed port): folder, flags, what was printed."""
    folder = tmp_path_factory.mktemp("two")
    flags = ["--data", shapes, "--steps", 3, *TINY, "--log-every", 1, "--eval-every", 3]
    runs = [[*flags, "--optimizer", name, "--out", folder / name] for name in ("adamw", "muon")]
    runs.append(["--out", folder / "auto", "--steps", 1, *TINY])
    made = in_two_processes(folder, *runs, patch="sample.has_bf16 = lambda device: False; butterflies.COUNT = 20")
    assert made.returncode == 0, made.stderr
    return folder, [str(flag) for flag in flags], made.stdout


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_two_processes_make_the_steps_of_one(tmp_path, monkeypatch, by_two, optimizer):
    """Gradients to float32 rounding: the norms of the first step, and the weights after three of them. Muon's updates
    are not rounded to bfloat16 here."""
    monkeypatch.setattr(sample, "has_bf16", lambda device: False)
    folder, flags, _ = by_two
    for name, more in (("one", []), ("parts", ["--accumulate", "4"])):
        assert train.main([*flags, "--optimizer", optimizer, *more, "--out", str(tmp_path / name)]) == 0
    runs = tmp_path / "one", folder / optimizer, tmp_path / "parts"
    one, two, parts = map(metrics, runs)
    for other in (two, parts):
        assert len(other) == len(one) == 4
        for a, b in zip(one, other, strict=True):
            assert a.keys() == b.keys()
            for name in a:
                assert a[name] == pytest.approx(b[name], rel=1e-5), name
    saved = [train.load_checkpoint(run) for run in runs]
    for kind, moment in (("adamw", "exp_avg"), *([("muon", "momentum")] if optimizer == "muon" else [])):
        for i, moments in saved[0][kind]["state"].items():  # the mean of the gradients so far
            scale = moments[moment].abs().max()
            for other in saved[1:]:
                assert (moments[moment] - other[kind]["state"][i][moment]).abs().max() <= 1e-4 * scale + 1e-9


def test_two_processes_and_data_that_cannot_be_read(tmp_path):
    """One sentence, and no traceback of the one that waited."""
    (tmp_path / "empty").mkdir()
    made = in_two_processes(tmp_path, ["--data", tmp_path / "empty", "--out", tmp_path / "run", *TINY])
    assert made.returncode != 0 and made.stderr.count(f"error: {tmp_path / 'empty'} holds no images") == 1
    assert "Traceback" not in made.stderr and not (tmp_path / "run").exists()


def test_two_processes_take_what_auto_found(by_two):
    """The first one asks and draws; the others are told."""
    folder, _, said = by_two
    assert said.count("data: SYNTHETIC BUTTERFLIES") == 1
    assert data.read_json(folder / "auto/config.json")["settings"]["data"] == "synthetic:20"


def test_two_processes_stop_together_and_resume(tmp_path, shapes):
    flags = ["--data", shapes, "--steps", 4000, *TINY, *OFTEN, "--log-every", 1, "--out", tmp_path / "run"]
    running = subprocess.Popen(command(*flags, processes=2), env=environment(), start_new_session=True)
    wait_for_step(running, tmp_path / "run", 3)
    os.killpg(running.pid, signal.SIGTERM)
    assert running.wait(timeout=60) != 0
    step = train.load_checkpoint(tmp_path / "run")["step"]
    assert 3 <= step < 4000
    resumed = in_two_processes(tmp_path, ["--resume", tmp_path / "run", "--steps", step + 2])
    assert resumed.returncode == 0, resumed.stderr
    assert train.load_checkpoint(tmp_path / "run")["step"] == step + 2


# ---- resuming --------------------------------------------------------------------------------------------------------


def wait_for_step(running: subprocess.Popen, run: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and running.poll() is None:
        if (run / "metrics.jsonl").exists() and f'"step": {step},' in (run / "metrics.jsonl").read_text():
            return
        time.sleep(0.01)
    raise AssertionError(f"step {step} was not reached")


ACCUMULATED = ("--accumulate", "2", "--dropout", "0.2")


@pytest.mark.parametrize(
    "step, number",  # before the first checkpoint, at one, between two
    [(1, signal.SIGINT), (4, signal.SIGINT), (7, signal.SIGINT), (7, signal.SIGTERM)],
)
def test_stopped_by_a_signal_and_resumed(tmp_path, monkeypatch, capsys, fit, trained, step, number):
    with monkeypatch.context() as patch:
        stop_at(patch, step, lambda: os.kill(os.getpid(), number))
        assert fit(tmp_path / "run", *ACCUMULATED) == 128 + number
    assert f"stopped at step {step}" in capsys.readouterr().out
    assert sample.load(tmp_path / "run").network.config.image_size == (16, 16)  # a usable model
    assert train.load_checkpoint(tmp_path / "run")["step"] == step
    assert train.main(["--resume", str(tmp_path / "run")]) == 0
    # The stop left a checkpoint of its own; the newest of both runs are equal.
    assert_same_run(tmp_path / "run", trained)


@pytest.mark.parametrize("step", [2, 6, 11])
def test_crashed_and_resumed(tmp_path, monkeypatch, fit, trained, step):
    """An error in the middle saves nothing: the run goes on from the last checkpoint, or from the beginning."""

    def crash():
        raise RuntimeError("power cut")

    with monkeypatch.context() as patch:
        stop_at(patch, step, crash)
        with pytest.raises(RuntimeError, match="power cut"):
            fit(tmp_path / "run", *ACCUMULATED)
    with open(tmp_path / "run/metrics.jsonl", "a") as file:
        file.write('{"step": 99, "loss": 1.0}\n{"step": 4, "lo')  # logged past the checkpoint; cut off by the crash
    assert train.main(["--resume", str(tmp_path / "run")]) == 0
    assert_same_run(tmp_path / "run", trained)


def test_killed_and_resumed(tmp_path, shapes):
    flags = ["--data", shapes, "--steps", 20, *TINY, *OFTEN]
    running = subprocess.Popen(command(*flags, "--out", tmp_path / "killed"), env=environment())
    wait_for_step(running, tmp_path / "killed", 9)
    running.kill()
    running.wait(timeout=120)
    assert train.main([*map(str, flags), "--out", str(tmp_path / "whole")]) == 0
    assert running.returncode == -signal.SIGKILL and train.load_checkpoint(tmp_path / "killed")["step"] < 20
    assert train.main(["--resume", str(tmp_path / "killed")]) == 0
    assert_same_run(tmp_path / "killed", tmp_path / "whole")


def test_damaged_checkpoint_is_passed_over(tmp_path, capsys, monkeypatch, fit, trained):
    with monkeypatch.context() as patch:
        stop_at(patch, 9, lambda: os.kill(os.getpid(), signal.SIGINT))
        fit(tmp_path / "run", *ACCUMULATED)
    newest = tmp_path / "run/checkpoint-00000009.pt"
    whole = newest.read_bytes()
    assert train.load_checkpoint(tmp_path / "run")["step"] == 9
    for damaged in (whole[:-5], b"", whole[:2000] + bytes([whole[2000] ^ 1]) + whole[2001:]):
        newest.write_bytes(damaged)
        capsys.readouterr()
        assert train.load_checkpoint(tmp_path / "run")["step"] == 8
        assert "is damaged" in capsys.readouterr().err
    assert train.main(["--resume", str(tmp_path / "run")]) == 0
    assert_same_run(tmp_path / "run", trained)


def test_finished_run_is_extended_only_on_request(tmp_path, capsys, fit, trained):
    assert train.main(["--resume", str(trained)]) == 2
    assert "give a larger number with --steps" in error_of(capsys)
    assert fit(tmp_path / "run", steps=5) == 0
    assert train.main(["--resume", str(tmp_path / "run"), "--steps", "7"]) == 0
    steps = [line["step"] for line in metrics(tmp_path / "run")]
    assert steps == [3, 4, 5, 5, 6, 7, 7] and train.load_checkpoint(tmp_path / "run")["step"] == 7
    assert data.read_json(tmp_path / "run/config.json")["settings"]["steps"] == 7


def test_new_run_never_overwrites(capsys, fit, trained):
    before = weights(trained)
    assert fit(trained) == 2 and "is not empty" in error_of(capsys) and weights(trained) == before


def test_resume_refuses_other_data_and_other_settings(tmp_path, capsys, fit):
    shapes = make_shapes(tmp_path / "shapes", count=40, size=16)
    assert fit(tmp_path / "run", data=shapes, steps=4) == 0
    assert train.main(["--resume", str(tmp_path / "run"), "--lr", "1", "--steps", "6"]) == 2
    assert error_of(capsys).startswith("--lr cannot change")
    next(shapes.rglob("*.png")).unlink()
    assert train.main(["--resume", str(tmp_path / "run"), "--steps", "6"]) == 2
    assert "is not the data in config.json" in error_of(capsys)


def test_config_repeats_a_run(tmp_path, trained):
    config = str(trained / "config.json")
    assert train.main(["--config", config, "--out", str(tmp_path / "again")]) == 0
    assert_same_run(tmp_path / "again", trained)
    assert train.main(["--config", config, "--out", str(tmp_path / "other"), "--seed", "1"]) == 0
    assert weights(tmp_path / "other") != weights(trained)
    content = data.read_json(trained / "config.json")
    settings = content["settings"]
    assert not [
        name for name, value in settings.items() if value is None and name not in ("revision", "epochs", "init")
    ]
    assert Path(settings["data"]).is_absolute() and len(content["data"]["fingerprint"]) == 64
    assert content["versions"]["torch"] == torch.__version__


# ---- what is not finite ----------------------------------------------------------------------------------------------


def poison(monkeypatch, step: int, loss: bool):
    """Makes the loss, or one gradient alone, not finite at a step; keeps what weights and average were before it."""
    update, kept = train.State.update, {}

    def patched(self, value, settings):
        if self.step == step:
            kept.update({f"{name}.{key}": tensor.clone() for name in ("network", "ema")
                         for key, tensor in getattr(self, name).state_dict().items()})  # fmt: skip
            self.network.conv_in.weight.grad[0, 0, 0, 0] = math.nan if loss else math.inf
            value = value * math.nan if loss else value
        poisoned = self.step == step
        update(self, value, settings)
        kept["state"] = self
        if poisoned:
            kept["after"] = {key: tensor.clone() for key, tensor in self.network.state_dict().items()}

    monkeypatch.setattr(train.State, "update", patched)
    return kept


@pytest.mark.parametrize("loss", [True, False])
def test_not_finite_never_reaches_a_file(tmp_path, monkeypatch, capsys, fit, shapes, loss):
    kept = poison(monkeypatch, 6, loss)  # seen after another update, at step 8; the last save was at step 4
    assert fit(tmp_path / "run") == 1
    message = error_of(capsys)
    batch = make_batches(shapes, classes=False).indices(6).tolist()
    assert "step 6," in message and str(batch) in message
    assert kept["state"].step == 8 and metrics(tmp_path / "run")[-1]["step"] == 6
    assert train.load_checkpoint(tmp_path / "run")["step"] == 4
    assert all(tensor.isfinite().all() for tensor in unet.read_weights(
        tmp_path / "run/model/unet/diffusion_pytorch_model.safetensors").values())  # fmt: skip


def test_fp16_overflow_is_counted_and_is_no_divergence(tmp_path, monkeypatch, fit):
    kept = poison(monkeypatch, 5, loss=False)
    assert fit(tmp_path / "run", "--precision", "fp16", steps=9) == 0
    overflows = {line["step"]: line["overflows"] for line in metrics(tmp_path / "run") if "loss" in line}
    assert overflows == {3: 0, 6: 1, 9: 0}
    assert kept["state"].scaler.get_scale() == 2**15
    for key, tensor in kept["after"].items():  # neither optimizer made that step, and both went on
        assert torch.equal(tensor, kept[f"network.{key}"]), key
        assert not torch.equal(tensor, kept["state"].network.state_dict()[key]), key


def test_fp16_not_finite_loss_stops_for_good(tmp_path, monkeypatch, capsys, fit):
    kept = poison(monkeypatch, 6, loss=True)
    assert fit(tmp_path / "run", "--precision", "fp16") == 1 and "step 6," in error_of(capsys)
    assert kept["state"].step == 8 and train.load_checkpoint(tmp_path / "run")["step"] == 4


# ---- files -----------------------------------------------------------------------------------------------------------


def test_files_of_a_run(trained, shapes):
    assert sorted(path.name for path in trained.glob("checkpoint-*")) == [
        "checkpoint-00000008.pt",
        "checkpoint-00000012.pt",
    ]
    assert sorted(path.name for path in (trained / "samples").iterdir()) == [
        "00000008.png", "00000012.png", "data.png"]  # fmt: skip
    first = make_batches(shapes, classes=False)(0)[0]
    assert np.array_equal(
        np.asarray(Image.open(trained / "samples/data.png")), np.asarray(data.grid(data.to_uint8(first), scale=8))
    )
    losses = {line["step"]: line["held_out_loss"] for line in metrics(trained) if "held_out_loss" in line}
    assert list(losses) == [4, 8, 12]
    assert (weights(trained, "best") == weights(trained)) == (min(losses, key=losses.get) == 12)
    assert not list(trained.rglob(".*"))  # no temporary file


def test_saving_replaces_only_the_weights(tmp_path, monkeypatch, fit):
    assert fit(tmp_path / "run", steps=4) == 0
    files = [path for path in (tmp_path / "run/model").rglob("*.json")]
    before = {path: path.stat().st_mtime_ns for path in files}
    old = weights(tmp_path / "run")
    assert train.main(["--resume", str(tmp_path / "run"), "--steps", "8"]) == 0
    assert len(files) == 3 and before == {path: path.stat().st_mtime_ns for path in files}
    assert weights(tmp_path / "run") != old


def test_full_disk_keeps_what_was_saved(tmp_path, monkeypatch, capsys, fit, trained):
    class Full:
        """Takes 200 kB, then the disk is full."""

        def __init__(self, file):
            self.file, self.left = file, 200_000 if "00000008" in file.name else 10**12

        def write(self, content):
            self.left -= len(content)
            if self.left < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return self.file.write(content)

        def writelines(self, parts):
            for part in parts:
                self.write(part)

        def __getattr__(self, name):
            return getattr(self.file, name)

    def fill(path, write, whole=data.atomic_write):
        whole(path, (lambda file: write(Full(file))) if "checkpoint" in str(path) else write)

    with monkeypatch.context() as patch:
        patch.setattr(data, "atomic_write", fill)
        assert fit(tmp_path / "run", *ACCUMULATED) == 2
    assert "No space left on device" in error_of(capsys)
    assert [path.name for path in (tmp_path / "run").glob("*checkpoint-*4.pt")] == ["checkpoint-00000004.pt"]
    assert not list((tmp_path / "run").glob(".*"))
    assert train.main(["--resume", str(tmp_path / "run")]) == 0
    assert_same_run(tmp_path / "run", trained)


# ---- fine-tuning, presets, compile -----------------------------------------------------------------------------------


def test_init_starts_from_a_model(tmp_path, monkeypatch, capsys, shapes, trained):
    seen = []
    monkeypatch.setattr(train, "backward", lambda network, *rest: seen.append(network) or torch.zeros(()))
    monkeypatch.setattr(train.State, "update", lambda self, loss, settings: setattr(self, "step", self.step + 1))
    flags = ["--init", str(trained), "--data", str(shapes), "--steps", "1", "--precision", "fp32"]
    assert train.main([*flags, "--out", str(tmp_path / "run"), "--batch-size", "4"]) == 0
    assert weights(tmp_path / "run") == weights(trained)  # no step has moved them
    assert train.main([*flags, "--out", str(tmp_path / "no"), "--channels", "8"]) == 2
    assert error_of(capsys).startswith("--channels is set by the model")
    assert train.main(["--init", "nowhere", "--out", str(tmp_path / "no")]) == 2
    assert "there is no such folder" in error_of(capsys)
    assert not (tmp_path / "no").exists()


def test_classes_are_learnt_and_named(tmp_path, fit):
    assert fit(tmp_path / "run", "--classes", steps=2) == 0
    config = sample.load(tmp_path / "run").network.config
    names = ("circle", "diamond", "hexagon", "square", "triangle")
    assert (config.class_names, config.num_class_embeds, config.null_label) == (names, 6, 5)
    assert fit(tmp_path / "without", "--classes", "--label-dropout", "0", steps=2) == 0
    config = sample.load(tmp_path / "without").network.config
    assert (config.class_names, config.num_class_embeds, config.null_label) == (names, 5, None)


def test_a_class_and_no_class_are_learnt(tmp_path):
    """Dark and light images: from the same noise a class draws its own, and no class between the two."""
    for name, level in (("dark", 60), ("light", 200)):
        for i in range(30):
            blocks = np.random.default_rng(i).integers(level - 40, level + 40, (8, 8, 3)).astype(np.uint8)
            pixels = blocks.repeat(2, 0).repeat(2, 1)  # apart enough to be no near-duplicates
            (tmp_path / name).mkdir(exist_ok=True)
            Image.fromarray(pixels).save(tmp_path / name / f"{i}.png")
    flags = ["--data", str(tmp_path), "--out", str(tmp_path / "run"), "--classes", "--label-dropout", "0.3", *TINY]
    assert train.main([*flags, "--steps", "100", "--lr", "3e-3", "--batch-size", "16", "--dropout", "0"]) == 0
    model = sample.load(tmp_path / "run")
    table = ddpm.sampler_table(model.schedule, steps=8)
    seeds = [*range(8), *range(8)]
    dark, light = sample.draw(model, seeds, table, [0] * 8 + [1] * 8).float().mean((1, 2, 3)).chunk(2)
    free = sample.draw(model, range(8), table).float().mean()
    assert light.mean() - dark.mean() > 60 and dark.mean() < free < light.mean()


def test_auto_is_resolved_so_that_a_repeated_run_needs_no_network(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data, "_hub_answers", lambda: False)
    monkeypatch.setattr(butterflies, "COUNT", 40)
    assert train.DEFAULTS["data"] == "auto"
    assert train.main(["--out", str(tmp_path / "a"), "--steps", "2", *TINY]) == 0
    said = capsys.readouterr().out
    assert said.startswith("data: SYNTHETIC BUTTERFLIES (--data auto), because ") and "nano: 16 px" in said
    assert data.read_json(tmp_path / "a/config.json")["settings"]["data"] == "synthetic:40"

    def forbid():
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(data, "_hub_answers", forbid)
    assert train.main(["--config", str(tmp_path / "a/config.json"), "--out", str(tmp_path / "b")]) == 0
    assert weights(tmp_path / "a") == weights(tmp_path / "b")
    assert train.main(["--resume", str(tmp_path / "a"), "--steps", "3"]) == 0
    capsys.readouterr()
    assert train.main(["--out", str(tmp_path / "c"), "--revision", "main"]) == 2
    assert error_of(capsys).startswith("--revision main: only Hugging Face datasets have revisions")


def test_hidden_classes_that_cannot_be(tmp_path, capsys, fit, trained):
    flags = ["--label-dropout", "0.4", "--data", "synthetic:20", "--out", str(tmp_path / "run"), "--steps", "1"]
    assert train.main(flags) == 2
    assert error_of(capsys).startswith("--label-dropout needs --classes")
    assert train.main([*flags, "--init", str(trained)]) == 2
    assert error_of(capsys).startswith("--label-dropout: the model of --init was trained without it")
    assert train.main(["--init", str(trained), *flags[2:]]) == 0
    assert data.read_json(tmp_path / "run/config.json")["settings"]["label_dropout"] == 0


@pytest.mark.parametrize("channels", ["1", "3"])
def test_grey_patches_and_epochs(tmp_path, shapes, channels):
    flags = ["--image-channels", channels, "--patch-size", "2", "--attention", "4", "--epochs", "1"]
    status = train.main(["--data", str(shapes), *TINY, *flags, "--out", str(tmp_path / "run")])
    config = data.read_json(tmp_path / "run/config.json")
    assert status == 0 and config["settings"]["steps"] == math.ceil(config["data"]["images"] / 8)
    assert sample.load(tmp_path / "run").shape == (int(channels), 16, 16)


def test_presets(capsys):
    parameters = {}
    for name, preset in train.PRESETS.items():
        config, schedule = train.make_configs(train.DEFAULTS | preset, ())
        with torch.device("meta"):
            parameters[name] = sum(p.numel() for p in unet.UNet(config).parameters())
        assert config.image_size == ({"nano": 32, "small": 64}.get(name, 128),) * 2
    assert parameters["classic"] == 113_673_219  # the diffusers butterfly tutorial's
    assert schedule.prediction_type == "epsilon"
    assert parameters["nano"] < parameters["small"] < parameters["base"] < parameters["classic"]


@pytest.mark.parametrize(
    "flags,rate",
    [([], 0.01), (["--optimizer", "adamw"], 1e-3), (["--preset", "classic"], 1e-4), (["--lr", "0.5"], 0.5)],
)
def test_the_learning_rate_is_the_optimizers_own(flags, rate):
    run, given = train.parse_arguments(flags)
    assert train.resolve_settings(run, given, None, torch.device("cpu"))["lr"] == rate


def test_a_learning_rate_far_from_the_usual_is_said_to_be(fit, tmp_path, capsys):
    assert fit(tmp_path / "a", "--lr", "1e-4", steps=1) == 0
    assert "--lr 0.0001 is far below muon's default of 0.01" in capsys.readouterr().out
    assert fit(tmp_path / "b", "--lr", "1e-3", steps=1) == 0
    assert "is far" not in capsys.readouterr().out
    assert fit(tmp_path / "c", "--lr", "0.5", steps=1) == 0
    assert "--lr 0.5 is far above muon's default of 0.01" in capsys.readouterr().out


def test_a_size_that_does_not_fit_is_refused_before_any_image_is_read(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train.data, "prepare", lambda *_, **__: pytest.fail("read"))
    assert train.main(["--data", "drawn", "--preset", "nano", "--size", "33", "--out", str(tmp_path / "a")]) == 2
    assert "--size 33 must be a multiple of 4" in capsys.readouterr().err


def test_the_device_decides_and_says_so(tmp_path, capsys, shapes, monkeypatch):
    monkeypatch.setattr(sample, "choose_device", lambda name=None: torch.device("cpu"))
    monkeypatch.setattr(train, "backward", lambda network, *rest: torch.zeros(()))
    monkeypatch.setattr(train.State, "update", lambda self, loss, settings: setattr(self, "step", self.step + 1))
    assert train.main(["--data", str(shapes), "--out", str(tmp_path / "run"), "--steps", "1"]) == 0
    said = capsys.readouterr().out
    assert "nano: 32 px, 2,736,099 parameters, 0.76 GFLOP an image" in said and "about 0:00:0" in said


def test_without_a_compiler_training_goes_on_eager(tmp_path, monkeypatch, capsys, shapes):
    """torch.compile for a CPU needs a C++ compiler; with none there is one line, and the same weights as without."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", (str(tmp_path / "no-compiler"),))
    small = ["--channels", "8", "--attention", "", "--head-dim", "8"]
    flags = ["--data", str(shapes), "--steps", "2", *TINY, *small, "--out"]
    assert train.main([*flags, str(tmp_path / "a"), "--compile"]) == 0
    assert capsys.readouterr().out.count("torch.compile does not work here") == 1
    torch._dynamo.reset()
    assert train.main([*flags, str(tmp_path / "b")]) == 0
    assert weights(tmp_path / "a") == weights(tmp_path / "b")


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["--data", "nowhere"], "'nowhere' is neither a folder"),
        (["--size", "0"], "'0' is not a whole number from 8 to 1024"),
        (["--size", "65"], "--size 65 must be a multiple of 2"),
        (["--preset", "huge"], "invalid choice: 'huge'"),
        (["--steps", "0"], "'0' is not a whole number from 1"),
        (["--steps", "5", "--epochs", "2"], "--steps and --epochs both set the length"),
        (["--lr", "nan"], "'nan' is not a number"),
        (["--lr", "-1"], "'-1' is not a number"),
        (["--lr", "1e39"], "'1e39' is not a number from 0 to 1000"),  # a finite gradient, and an infinite step
        (["--accumulate", "3"], "--batch-size 8 must be a multiple of 3"),
        (["--attention", "5"], "--attention 5: the resolutions are only 16, 8"),
        (["--channels", ""], "--channels needs at least one number"),
        (["--head-dim", "24"], "channels do not divide into heads of 24"),
        (["--channels", "15,30"], "must be even"),
        (["--zero-snr", "--prediction", "epsilon"], "needs prediction_type v_prediction or sample"),
        (["--image-channels", "2"], "2 image channels"),
        (["--device", "tpu"], "--device tpu"),
        (["--init", "nowhere"], "is set by the model of --init"),
        (["--config", "nowhere.json"], "nowhere.json cannot be read"),
        (["--resume", "nowhere"], "--resume nowhere is not a run folder"),
        (["--revision", "main"], "--revision main: only Hugging Face datasets"),
        (["--no-such-flag"], "unrecognized arguments"),
    ],
)
def test_bad_flags(tmp_path, capsys, monkeypatch, fit, flags, sentence):
    monkeypatch.chdir(tmp_path)
    assert status_of(fit, tmp_path / "run", *flags) == 2 and sentence in error_of(capsys)
    assert not list(tmp_path.iterdir())


def test_bad_data(tmp_path, capsys, fit):
    (tmp_path / "empty").mkdir()
    (tmp_path / "one").mkdir()
    Image.new("RGB", (16, 16)).save(tmp_path / "one/a.png")
    for name, sentence in (("empty", "holds no images"), ("one", "at least 2 are needed")):
        assert fit(tmp_path / "run", data=tmp_path / name) == 2 and sentence in error_of(capsys)
    flat = make_shapes(tmp_path / "flat", 20, 16)
    for path in list(flat.rglob("*.png")):
        path.rename(flat / path.name)
    assert fit(tmp_path / "run", "--classes", data=flat) == 2 and "have no classes" in error_of(capsys)
    assert not (tmp_path / "run").exists()


def test_bad_config(tmp_path, capsys, trained):
    good = data.read_json(trained / "config.json")

    def attempt(content) -> str:
        path = tmp_path / "config.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        assert train.main(["--config", str(path), "--out", str(tmp_path / "run")]) == 2
        return error_of(capsys)

    assert "it is not JSON" in attempt("{")
    assert "does not hold a JSON object" in attempt("[]")
    for nothing in ({"settings": {}}, {"settings": ["size"]}, {"network": {}}, {"settings": {"size": 16}, "data": 3}):
        assert "is not the config.json of a run: it has no settings" in attempt(nothing)
    unknown = good | {"settings": good["settings"] | {"warp": 9}}
    assert "settings that this version does not know: warp" in attempt(unknown)
    for name, value in (("lr", "fast"), ("steps", 0), ("steps", 1.5), ("flips", 1), ("channels", [0]), ("loss", "l1"),
                        ("size", True), ("data", 3), ("classes", None)):  # fmt: skip
        assert f"{name} cannot be {value!r}" in attempt(good | {"settings": good["settings"] | {name: value}})
    assert not (tmp_path / "run").exists()


def test_a_config_of_an_older_version_takes_defaults_and_says_which(tmp_path, capsys, fit):
    """A setting that it lacks is the default, on --config and on --resume, and the run goes on to the bit."""
    assert fit(tmp_path / "whole", steps=8) == 0
    assert fit(tmp_path / "old", steps=4) == 0
    path = tmp_path / "old/config.json"
    config = data.read_json(path)
    for name in ("gamma", "clip"):
        del config["settings"][name]
    path.write_text(json.dumps(config))
    capsys.readouterr()
    assert train.main(["--config", str(path), "--out", str(tmp_path / "again")]) == 0
    said = "config.json is from an older version; these settings take their defaults: clip, gamma"
    assert said in capsys.readouterr().out
    assert weights(tmp_path / "again") == weights(tmp_path / "old")
    assert train.main(["--resume", str(tmp_path / "old"), "--steps", "6"]) == 0
    assert said in capsys.readouterr().out
    assert data.read_json(path)["settings"] == data.read_json(tmp_path / "whole/config.json")["settings"] | {"steps": 6}
    assert train.main(["--resume", str(tmp_path / "old"), "--steps", "7"]) == 0
    assert "older version" not in capsys.readouterr().out


def test_resuming_a_version_with_other_optimizers_is_refused(tmp_path, capsys, fit):
    assert fit(tmp_path / "run", steps=4) == 0
    content = train.load_checkpoint(tmp_path / "run")
    content["optimizer"] = content.pop("adamw")
    train.save_checkpoint(tmp_path / "run", 5, content, keep=2)
    before = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert train.main(["--resume", str(tmp_path / "run"), "--steps", "6"]) == 2
    assert "has no state of adamw" in error_of(capsys)
    assert before == sorted(path.name for path in (tmp_path / "run").iterdir())


def test_a_config_may_be_cut_down_to_its_settings(tmp_path, fit):
    assert fit(tmp_path / "run", steps=4) == 0
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"settings": data.read_json(tmp_path / "run/config.json")["settings"]}))
    assert train.main(["--config", str(path), "--out", str(tmp_path / "again")]) == 0
    assert weights(tmp_path / "again") == weights(tmp_path / "run")


def test_a_damaged_checkpoint_of_a_later_step_does_not_displace_a_good_one(tmp_path, capsys):
    train.save_checkpoint(tmp_path, 5, {"step": 5}, keep=1)
    (tmp_path / "checkpoint-00000010.pt").write_bytes(b"damaged")
    train.save_checkpoint(tmp_path, 7, {"step": 7}, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-00000007.pt"]
    assert train.load_checkpoint(tmp_path) == {"step": 7}


def test_out_under_a_file(tmp_path, capsys, fit):
    (tmp_path / "file").write_text("")
    assert fit(tmp_path / "file/run") == 2 and "a file is where a folder is needed" in error_of(capsys)


def test_every_setting_is_explained(capsys):
    with pytest.raises(SystemExit):
        train.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for flags in train.SETTINGS.values():
        for flag in flags:
            assert flag.name in text and len(flag.help.split()) > 1


# ---- crashes between two files, and what they leave ------------------------------------------------------------------


class PowerCut(BaseException):
    """Nothing catches it, and nothing is tidied up."""


@pytest.mark.parametrize("where, time", [("best", 2), ("model", 2), ("model", 3), ("checkpoint-00000004.pt", 1)])
def test_crash_between_the_files_of_one_step(tmp_path, monkeypatch, fit, trained, where, time):
    """Steps 4, 8 and 12 save: crashed before the second or the last of these, or before a checkpoint is pruned."""
    times = []

    def crash_before(holder, name):
        real = getattr(holder, name)

        def patched(path, *args, **kwargs):
            times.append(path.name == where)
            if times[-1] and sum(times) == time:
                raise PowerCut
            return real(path, *args, **kwargs)

        return patched

    with monkeypatch.context() as patch:
        patch.setattr(sample, "save_model", crash_before(sample, "save_model"))
        patch.setattr(Path, "unlink", crash_before(Path, "unlink"))
        with pytest.raises(PowerCut):
            fit(tmp_path / "run", *ACCUMULATED)
    finished = where.startswith("checkpoint")  # the last one was in place
    assert train.main(["--resume", str(tmp_path / "run")]) == (2 if finished else 0)
    assert_same_run(tmp_path / "run", trained)


@pytest.mark.parametrize("tail", [b"\xff\xfe", b"17\n", b"{}\n", b'{"step": 4, "loss": 1', b"\0" * 40, b"null", b""])
def test_metrics_are_cut_after_a_step(tmp_path, tail):
    """Whatever the end of a file looks like after a crash, lines up to the step stay as they are."""
    kept = b'{"step": 3, "loss": 1.0}\n{"step": 4, "loss": 0.5}\n{"step": 4, "held_out_loss": 0.7}\n'
    (tmp_path / "metrics.jsonl").write_bytes(kept + b'{"step": 5, "loss": 0.25}\n' + tail)
    train.cut_metrics(tmp_path, 4)
    assert (tmp_path / "metrics.jsonl").read_bytes() == kept


def test_checkpoint_that_cannot_be_read_is_passed_over(tmp_path, capsys, fit):
    assert fit(tmp_path / "run", steps=4) == 0
    (tmp_path / "run/checkpoint-00000099.pt").mkdir()
    assert train.main(["--resume", str(tmp_path / "run"), "--steps", "5"]) in (0, 2)
    assert "checkpoint-00000099.pt" in capsys.readouterr().err


def test_run_whose_config_is_damaged(tmp_path, capsys, fit):
    assert fit(tmp_path / "run", steps=1) == 0
    capsys.readouterr()
    good = data.read_json(tmp_path / "run/config.json")
    for damage in ({"network": None}, {"network": {"act_fn": "x"}}, {"schedule": {"beta_schedule": "x"}}, {"data": 3},
                   {"schedule": 3}, {"settings": good["settings"] | {"seed": 5}}):  # fmt: skip
        data.write_json(tmp_path / "run/config.json", good | damage)
        assert train.main(["--resume", str(tmp_path / "run"), "--steps", "2"]) == 2, damage
        assert "config.json" in error_of(capsys)


def test_best_is_the_lowest(tmp_path, monkeypatch, fit):
    losses = iter([3.0, 1.0, 2.0])
    saved = {}
    save = sample.save_model

    def recording(folder, network, schedule):
        save(folder, network, schedule)
        saved.setdefault(folder.name, []).append(weights(folder.parent, folder.name))

    monkeypatch.setattr(train.HeldOut, "losses", lambda *args: torch.tensor([next(losses)]))
    monkeypatch.setattr(sample, "save_model", recording)
    assert fit(tmp_path / "run") == 0
    assert saved["best"] == saved["model"][:2] and len(saved["model"]) == 3
    assert weights(tmp_path / "run", "best") == saved["model"][1]


def test_full_disk_while_logging(tmp_path, monkeypatch, capsys, fit, trained):
    import builtins

    real = open

    def full(path, mode="r", *args, **kwargs):
        if str(path).endswith("metrics.jsonl") and "a" in mode and (tmp_path / "run/checkpoint-00000004.pt").exists():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(path, mode, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(builtins, "open", full)
        assert fit(tmp_path / "run", *ACCUMULATED) == 2
    assert "No space left on device" in error_of(capsys)
    assert train.main(["--resume", str(tmp_path / "run")]) == 0
    assert_same_run(tmp_path / "run", trained)


def test_asked_twice_it_stops_at_once(tmp_path, monkeypatch, fit):
    def twice():
        for _ in range(2):
            signal.raise_signal(signal.SIGINT)

    stop_at(monkeypatch, 6, twice)
    assert fit(tmp_path / "run") == 130
    assert train.load_checkpoint(tmp_path / "run")["step"] == 4  # not saved again


# ---- more of the average, the order and the rate ---------------------------------------------------------------------


def test_no_average_is_the_weights(tmp_path, fit):
    assert fit(tmp_path / "run", "--ema", "0") == 0
    state = train.load_checkpoint(tmp_path / "run")
    for name, value in state["network"].items():
        assert torch.allclose(state["ema"][name], value, rtol=1e-6, atol=1e-8), name


def test_learning_rate_is_that_of_pytorch():
    settings = {"lr": 0.3, "warmup": 7, "decay": "cosine", "steps": 50}
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.3)
    warm = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / 8, total_iters=7)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=43)
    peer = torch.optim.lr_scheduler.SequentialLR(optimizer, [warm, cosine], milestones=[7])
    for step in range(50):
        assert train.learning_rate(settings, step) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        optimizer.step()
        peer.step()


def test_an_epoch_shows_every_training_image_once_and_no_other(shapes):
    dataset = data.prepare(str(shapes), 16, progress=False)
    train_rows, held_rows = data.split(dataset)
    seen = torch.cat([make_batches(shapes).indices(step) for step in range(len(train_rows))])  # 8 epochs
    assert torch.equal(torch.bincount(seen, minlength=60)[train_rows], torch.full((len(train_rows),), 8))
    assert not set(seen.tolist()) & set(held_rows.tolist())


def test_labels_and_pixels_are_those_of_their_rows(shapes):
    dataset = data.prepare(str(shapes), 16, progress=False)
    batches = make_batches(shapes, flips=False)
    x0, labels, t, eps = batches(3)
    rows = batches.indices(3).numpy()
    assert np.array_equal(data.to_uint8(x0).numpy(), dataset.images[rows])
    assert labels.tolist() == dataset.labels[rows].tolist()
    mirrored = make_batches(shapes)(3)[0]
    same = [torch.equal(a, b) for a, b in zip(mirrored, x0, strict=True)]
    flipped = [torch.equal(a, b.flip(-1)) for a, b in zip(mirrored, x0, strict=True)]
    assert all(a or b for a, b in zip(same, flipped, strict=True)) and not all(flipped) and not all(same)


# ---- more of fine-tuning and compiling -------------------------------------------------------------------------------


def test_config_repeats_a_fine_tuning(tmp_path, shapes, trained):
    """At another size than the model's, and from another folder."""
    flags = ["--init", str(trained), "--data", str(shapes), "--size", "24", "--steps", "2", "--batch-size", "4"]
    assert train.main([*flags, "--precision", "fp32", "--out", str(tmp_path / "a")]) == 0
    assert train.main(["--config", str(tmp_path / "a/config.json"), "--out", str(tmp_path / "b")]) == 0
    configs = [data.read_json(tmp_path / name / "config.json") for name in "ab"]
    assert configs[0]["settings"] == configs[1]["settings"] and configs[0]["settings"]["size"] == 24
    assert weights(tmp_path / "a") == weights(tmp_path / "b")


def test_fine_tuning_refuses_other_classes(tmp_path, capsys, fit):
    """A model of five shapes and pictures of two: their labels would mean others."""
    assert fit(tmp_path / "five", "--classes", steps=1) == 0
    two = make_shapes(tmp_path / "two", 60, 16)
    for name in ("circle", "diamond", "hexagon"):
        shutil.rmtree(two / name)
    capsys.readouterr()
    flags = ["--init", str(tmp_path / "five"), "--data", str(two), "--steps", "1", "--batch-size", "4"]
    assert train.main([*flags, "--out", str(tmp_path / "run")]) == 2
    assert "the classes of the images (square, triangle) are not those of the model" in error_of(capsys)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("when", ["made", "called"])
def test_compile_that_raises(tmp_path, monkeypatch, capsys, fit, when):
    """Some Pythons have no torch.compile at all, some machines no compiler."""

    def refuse(*args, **kwargs):
        raise RuntimeError("no compiler here\nand more")

    plain = torch.compile
    made = []

    def broken(model=None, **options):
        if options.get("disable"):
            return plain(model, **options)
        made.append(options)
        return refuse if when == "called" else refuse()

    monkeypatch.setattr(torch, "compile", broken)
    assert fit(tmp_path / "run", "--compile", steps=2) == 0 and len(made) == 1
    assert capsys.readouterr().out.count("torch.compile does not work here (no compiler here): continuing") == 1


def test_held_out_loss_that_is_not_finite(tmp_path, monkeypatch, capsys, fit):
    """Finite weights can be too large to run; no NaN is logged as if it were a number, which JSON does not know."""
    losses = iter([0.5, math.nan, 0.4])
    monkeypatch.setattr(train.HeldOut, "losses", lambda *args: torch.tensor([next(losses)]))
    assert fit(tmp_path / "run") == 1 and "step 8" in error_of(capsys)
    assert "NaN" not in (tmp_path / "run/metrics.jsonl").read_text()
    assert train.load_checkpoint(tmp_path / "run")["step"] == 4


def test_best_is_remembered_by_a_resumed_run(tmp_path, monkeypatch, fit):
    for losses, stop in (([1.0], 6), ([3.0, 2.0], None)):
        values = iter(losses)
        with monkeypatch.context() as patch:
            patch.setattr(train.HeldOut, "losses", lambda *args, values=values: torch.tensor([next(values)]))
            if stop:
                stop_at(patch, stop, lambda: signal.raise_signal(signal.SIGINT))
                assert fit(tmp_path / "run") == 130
                first = weights(tmp_path / "run", "best")
            else:
                assert train.main(["--resume", str(tmp_path / "run")]) == 0
    assert weights(tmp_path / "run", "best") == first != weights(tmp_path / "run")


def test_dropout_is_another_at_every_step(tmp_path, monkeypatch, fit):
    seeds, backward = [], train.backward

    def recording(*args):
        seeds.append(torch.initial_seed())
        return backward(*args)

    monkeypatch.setattr(train, "backward", recording)
    assert fit(tmp_path / "run", steps=6) == 0
    assert len(set(seeds[-6:])) == 6


# ---- what a run may go on from, and be repeated from -----------------------------------------------------------------


def test_fine_tuning_that_dies_early_goes_on_from_the_same_weights(tmp_path, monkeypatch, shapes, trained):
    flags = ["--init", str(trained), "--data", str(shapes), "--steps", "3", "--batch-size", "4", "--precision", "fp32"]
    assert train.main([*flags, "--out", str(tmp_path / "whole")]) == 0

    def crash():
        raise PowerCut

    with monkeypatch.context() as patch:
        stop_at(patch, 1, crash)
        with pytest.raises(PowerCut):
            train.main([*flags, "--out", str(tmp_path / "killed")])
    assert train.main(["--resume", str(tmp_path / "killed")]) == 0
    assert_same_run(tmp_path / "killed", tmp_path / "whole")


def test_without_a_whole_checkpoint_nothing_is_overwritten(tmp_path, capsys, fit):
    assert fit(tmp_path / "run", steps=4) == 0
    for file in (tmp_path / "run").glob("checkpoint-*"):
        file.write_bytes(file.read_bytes()[:-1])
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert train.main(["--resume", str(tmp_path / "run"), "--steps", "9"]) == 2
    assert "no intact checkpoint" in error_of(capsys)
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}


def test_config_repeats_only_what_it_had(tmp_path, capsys, fit):
    shapes = make_shapes(tmp_path / "shapes", 40, 16)
    assert fit(tmp_path / "run", data=shapes, steps=1) == 0
    next(shapes.rglob("*.png")).unlink()
    flags = ["--config", str(tmp_path / "run/config.json"), "--out", str(tmp_path / "again")]
    assert train.main(flags) == 2 and "is not the data in" in error_of(capsys)
    assert train.main([*flags, "--data", str(shapes)]) == 0


def test_density_without_a_timestep(tmp_path, capsys, fit):
    assert fit(tmp_path / "run", "--density-mean", "20", "--density-std", "0.01") == 2
    assert "no timestep has noise near" in error_of(capsys) and not (tmp_path / "run").exists()


# ---- Muon ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows,columns", [(12, 40), (40, 12), (16, 16)])
def test_orthogonalise_keeps_directions_and_evens_sizes(rows, columns):
    """Against the singular value decomposition, whose U V^T is what is approached."""
    x = torch.randn(3, rows, columns, generator=torch.Generator().manual_seed(0))
    found = muon.orthogonalise(x)
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    inner = u.mT @ found @ vh.mT
    sizes = inner.diagonal(dim1=1, dim2=2)
    assert sizes.min() > 0.5 and sizes.max() < 1.3
    assert (inner - torch.diag_embed(sizes)).abs().max() < 0.05


def test_muon_is_that_of_pytorch_on_matrices():
    """torch.optim.Muon takes matrices only; a convolution is compared as the matrix that it is."""
    shapes = [(24, 10), (24, 10), (8, 30), (8, 6, 3, 3)]
    start = [torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i, shape in enumerate(shapes)]
    ours = [value.clone().requires_grad_() for value in start]
    peers = [value.clone().flatten(1).requires_grad_() for value in start]
    optimizer = muon.Muon(ours, lr=0.02, weight_decay=0.1)
    peer = torch.optim.Muon(peers, lr=0.02, weight_decay=0.1, momentum=0.95, adjust_lr_fn="original")
    for step in range(4):
        for i, (a, b) in enumerate(zip(ours, peers, strict=True)):
            a.grad = torch.randn(a.shape, generator=torch.Generator().manual_seed(100 * step + i))
            b.grad = a.grad.flatten(1).clone()
        optimizer.step()
        peer.step()
    for a, b, value in zip(ours, peers, start, strict=True):
        moved = b - value.flatten(1)
        assert moved.abs().mean() > 0.002
        assert (a.flatten(1) - b).abs().max() < 0.05 * moved.abs().max()


def test_who_is_updated_by_whom(shapes):
    settings = train.DEFAULTS | {"channels": [16, 32], "attention": [8], "size": 16, "head_dim": 16, "lr": 0.01}
    network = unet.UNet(train.make_configs(settings, ())[0])
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    state = train.State(network, settings, torch.device("cpu"))
    by = {key: [names[id(p)] for p in state.optimizers[key].param_groups[0]["params"]] for key in ("adamw", "muon")}
    assert sorted(by["adamw"] + by["muon"]) == sorted(names.values())
    assert "conv_in.weight" in by["adamw"] and "conv_out.weight" in by["adamw"]
    assert "mid_block.resnets.0.norm1.weight" in by["adamw"] and "time_embedding.linear_1.weight" in by["adamw"]
    assert "mid_block.attentions.0.to_q.weight" in by["muon"] and "down_blocks.0.resnets.0.conv1.weight" in by["muon"]
    assert train.State(network, settings | {"optimizer": "adamw"}, torch.device("cpu")).optimizers.keys() == {"adamw"}
