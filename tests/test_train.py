"""Training: it learns, it resumes to the bit, it is the same on two processes, and nothing bad reaches a file."""

import errno
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
import ddpm
import sample
import train
import unet
from tests.conftest import OFTEN, TINY
from tests.shapes import make_shapes

ROOT = Path(__file__).parent.parent
CLOCK = {"time", "images_per_second"}  # the only fields that may differ between equal runs


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


def environment() -> dict:
    return os.environ | {"OMP_NUM_THREADS": "1"}


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
    recipe = {"lr": 4e-3, "dropout": 0, "density": "uniform", "warmup": 20, "decay": "constant", "log_every": 20}
    rare = {"eval_every": 1000, "preview_every": 1000, "save_every": 1000}
    flags = [text for name, value in (recipe | rare).items() for text in (f"--{name.replace('_', '-')}", str(value))]
    where = ["--data", str(shapes), "--out", str(tmp_path / "run"), "--steps", "400", "--no-flips"]
    assert train.main([*where, *TINY, *flags]) == 0
    losses = [line["loss"] for line in metrics(tmp_path / "run") if "loss" in line]
    assert len(losses) == 20
    assert losses[0] > 0.4 and np.mean(losses[-3:]) < 0.25 * losses[0]


def test_bf16_keeps_weights_in_float32(tmp_path, fit):
    assert fit(tmp_path / "run", "--precision", "bf16") == 0
    state = train.load_checkpoint(tmp_path / "run")
    floats = [v for _, v in flatten(state) if isinstance(v, torch.Tensor) and v.is_floating_point()]
    assert {value.dtype for value in floats} == {torch.float32}
    lines = metrics(tmp_path / "run")
    plain = tmp_path / "plain"
    assert fit(plain) == 0
    pairs = [(a["loss"], b["loss"]) for a, b in zip(lines, metrics(plain), strict=True) if "loss" in a]
    assert all(a != b and abs(a - b) < 0.02 * b for a, b in pairs)  # another rounding, the same course


# ---- schedules of the rate and of the average ------------------------------------------------------------------------


def test_learning_rate():
    settings = {"lr": 2.0, "warmup": 9, "decay": "cosine", "steps": 109}
    rates = [train.learning_rate(settings, step) for step in range(110)]
    assert rates[:9] == pytest.approx([0.2 * (i + 1) for i in range(9)])
    assert rates[9] == 2 and rates[59] == pytest.approx(1) and rates[109] == pytest.approx(0, abs=1e-12)
    assert train.learning_rate(settings | {"decay": "constant"}, 100) == 2


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


def make_batches(shapes, rank=0, world=1, **changes) -> train.Batches:
    settings = train.DEFAULTS | {"batch_size": 8, "classes": True} | changes
    dataset = data.prepare(str(shapes), 16, progress=False)
    cdf = ddpm.timestep_cdf(ddpm.Schedule())
    return train.Batches(dataset, data.split(dataset)[0], settings, cdf, torch.device("cpu"), rank, world)


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


def test_held_out_loss_is_fixed(shapes):
    dataset = data.prepare(str(shapes), 16, progress=False)
    _, rows = data.split(dataset)
    schedule = ddpm.Schedule(prediction_type="v_prediction")
    table = ddpm.training_table(schedule).float()
    cdf = ddpm.timestep_cdf(schedule)
    zero = [
        train.HeldOut(
            dataset, rows, train.DEFAULTS | {"batch_size": size, "seed": seed}, cdf, torch.device("cpu")
        ).loss(lambda x, t, labels: torch.zeros_like(x), table, torch.no_grad)
        for size, seed in ((8, 0), (3, 5))
    ]
    assert zero[0] == pytest.approx(zero[1], rel=1e-6)
    # For a network that says 0 the loss is the mean square of v = alpha eps - sigma x0, near alpha^2 + sigma^2 E x0^2.
    assert 0.5 < zero[0] < 1.5


# ---- several processes -----------------------------------------------------------------------------------------------


def test_two_processes_make_the_steps_of_one(tmp_path, shapes):
    """Gradients to float32 rounding: the norms of the first step, and the weights after three of them."""
    flags = ["--data", shapes, "--steps", 3, *TINY, "--dropout", 0, "--log-every", 1, "--eval-every", 3]
    for name, processes, more in (("one", 1, []), ("two", 2, []), ("parts", 1, ["--accumulate", 4])):
        made = subprocess.run(
            command(*flags, *more, "--out", tmp_path / name, processes=processes),
            env=environment(),
            capture_output=True,
            text=True,
        )
        assert made.returncode == 0, made.stderr
    one, two, parts = (metrics(tmp_path / name) for name in ("one", "two", "parts"))
    for other in (two, parts):
        assert len(other) == len(one) == 4
        for a, b in zip(one, other, strict=True):
            assert a == pytest.approx(b, rel=1e-5)
    states = [train.load_checkpoint(tmp_path / name)["optimizer"]["state"] for name in ("one", "two", "parts")]
    for i, moments in states[0].items():  # the mean of the gradients so far
        scale = moments["exp_avg"].abs().max()
        for other in states[1:]:
            assert (moments["exp_avg"] - other[i]["exp_avg"]).abs().max() <= 1e-4 * scale + 1e-9


def test_two_processes_stop_together_and_resume(tmp_path, shapes):
    flags = ["--data", shapes, "--steps", 4000, *TINY, *OFTEN, "--log-every", 1, "--out", tmp_path / "run"]
    running = subprocess.Popen(command(*flags, processes=2), env=environment(), start_new_session=True)
    wait_for_step(running, tmp_path / "run", 3)
    os.killpg(running.pid, signal.SIGTERM)
    assert running.wait(timeout=60) != 0
    step = train.load_checkpoint(tmp_path / "run")["step"]
    assert 3 <= step < 4000
    resumed = command("--resume", tmp_path / "run", "--steps", step + 2, processes=2)
    assert subprocess.run(resumed, env=environment(), timeout=120).returncode == 0
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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("step", [1, 4, 7])  # before the first checkpoint, at one, between two
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
    flags = ["--data", shapes, "--steps", 40, *TINY, *OFTEN]
    for name in ("whole", "killed"):
        running = subprocess.Popen(command(*flags, "--out", tmp_path / name), env=environment())
        if name == "killed":
            wait_for_step(running, tmp_path / name, 9)
            running.kill()
        running.wait(timeout=120)
    assert running.returncode == -signal.SIGKILL and train.load_checkpoint(tmp_path / "killed")["step"] < 40
    resumed = command("--resume", tmp_path / "killed")
    assert subprocess.run(resumed, env=environment(), timeout=120).returncode == 0
    assert_same_run(tmp_path / "killed", tmp_path / "whole")


@pytest.mark.parametrize(
    "damage", [lambda b: b[:-5], lambda b: b[:2000] + bytes([b[2000] ^ 1]) + b[2001:], lambda b: b""]
)
def test_damaged_checkpoint_is_passed_over(tmp_path, capsys, monkeypatch, fit, trained, damage):
    with monkeypatch.context() as patch:
        stop_at(patch, 9, lambda: os.kill(os.getpid(), signal.SIGINT))
        fit(tmp_path / "run", *ACCUMULATED)
    newest = tmp_path / "run/checkpoint-00000009.pt"
    newest.write_bytes(damage(newest.read_bytes()))
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
    assert sample.read_json(tmp_path / "run/config.json")["settings"]["steps"] == 7


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
    assert "no longer what they were" in error_of(capsys)


def test_config_repeats_a_run(tmp_path, trained):
    config = str(trained / "config.json")
    assert train.main(["--config", config, "--out", str(tmp_path / "again")]) == 0
    assert_same_run(tmp_path / "again", trained)
    assert train.main(["--config", config, "--out", str(tmp_path / "other"), "--seed", "1"]) == 0
    assert weights(tmp_path / "other") != weights(trained)
    content = sample.read_json(trained / "config.json")
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
        update(self, value, settings)
        kept["state"] = self

    monkeypatch.setattr(train.State, "update", patched)
    return kept


@pytest.mark.parametrize("loss", [True, False])
def test_not_finite_never_reaches_weights_or_files(tmp_path, monkeypatch, capsys, fit, shapes, loss):
    kept = poison(monkeypatch, 5, loss)  # seen when metrics are read, at step 6; the last save was at step 4
    assert fit(tmp_path / "run") == 1
    message = error_of(capsys)
    batch = make_batches(shapes, classes=False).indices(5).tolist()
    assert "step 5," in message and str(batch) in message
    state = kept.pop("state")
    for name in ("network", "ema"):
        for key, tensor in getattr(state, name).state_dict().items():
            assert torch.equal(tensor, kept[f"{name}.{key}"]), key
    assert metrics(tmp_path / "run")[-1]["step"] == 4
    assert train.load_checkpoint(tmp_path / "run")["step"] == 4
    assert all(tensor.isfinite().all() for tensor in unet.read_weights(
        tmp_path / "run/model/unet/diffusion_pytorch_model.safetensors").values())  # fmt: skip


def test_fp16_overflow_is_counted_and_is_no_divergence(tmp_path, monkeypatch, fit):
    kept = poison(monkeypatch, 5, loss=False)
    assert fit(tmp_path / "run", "--precision", "fp16") == 0
    overflows = {line["step"]: line["overflows"] for line in metrics(tmp_path / "run") if "loss" in line}
    assert overflows == {3: 0, 6: 1, 9: 0, 12: 0}
    assert kept["state"].scaler.get_scale() == 2**15
    moved = [not torch.equal(t, kept[f"network.{k}"]) for k, t in kept["state"].network.state_dict().items()]
    assert any(moved)


def test_fp16_not_finite_loss_stops_for_good(tmp_path, monkeypatch, capsys, fit):
    kept = poison(monkeypatch, 4, loss=True)
    assert fit(tmp_path / "run", "--precision", "fp16") == 1 and "step 4," in error_of(capsys)
    for key, tensor in kept["state"].network.state_dict().items():  # steps 5 and 6 had finite gradients
        assert torch.equal(tensor, kept[f"network.{key}"]), key


# ---- files -----------------------------------------------------------------------------------------------------------


def test_files_of_a_run(trained, shapes):
    assert sorted(path.name for path in trained.glob("checkpoint-*")) == [
        "checkpoint-00000008.pt",
        "checkpoint-00000012.pt",
    ]
    assert sorted(path.name for path in (trained / "samples").iterdir()) == [
        "00000005.png", "00000010.png", "00000012.png", "data.png"]  # fmt: skip
    first = make_batches(shapes, classes=False)(0)[0]
    assert np.array_equal(
        np.asarray(Image.open(trained / "samples/data.png")), np.asarray(data.grid(data.to_uint8(first)))
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
    write = train.Hashing.write

    def full(self, content):
        if "00000008" in str(getattr(self.file, "name", "")):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(self, content)

    with monkeypatch.context() as patch:
        patch.setattr(train.Hashing, "write", full)
        assert fit(tmp_path / "run", *ACCUMULATED) == 2
    assert "No space left on device" in error_of(capsys)
    assert [path.name for path in (tmp_path / "run").glob("*checkpoint*")] == ["checkpoint-00000004.pt"]
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
    assert error_of(capsys).startswith("--channels comes from the model")
    assert train.main(["--init", "nowhere", "--out", str(tmp_path / "no")]) == 2
    assert "there is no such folder" in error_of(capsys)
    assert not (tmp_path / "no").exists()


def test_classes_are_learnt_and_named(tmp_path, fit):
    assert fit(tmp_path / "run", "--classes", steps=2) == 0
    config = sample.load(tmp_path / "run").network.config
    assert config.class_names == ("circle", "diamond", "hexagon", "square", "triangle") and config.num_class_embeds == 5


@pytest.mark.parametrize("channels", ["1", "3"])
def test_grey_patches_and_epochs(tmp_path, shapes, channels):
    flags = ["--image-channels", channels, "--patch-size", "2", "--attention", "4", "--epochs", "1"]
    status = train.main(["--data", str(shapes), *TINY, *flags, "--out", str(tmp_path / "run")])
    config = sample.read_json(tmp_path / "run/config.json")
    assert status == 0 and config["settings"]["steps"] == math.ceil(config["data"]["images"] / 8)
    assert sample.load(tmp_path / "run").shape == (int(channels), 16, 16)


def test_presets(capsys):
    parameters = {}
    for name, preset in train.PRESETS.items():
        config, schedule = train.design(train.DEFAULTS | preset, ())
        with torch.device("meta"):
            parameters[name] = sum(p.numel() for p in unet.UNet(config).parameters())
        assert config.image_size == ({"nano": 32, "small": 64}.get(name, 128),) * 2
    assert parameters["classic"] == 113_673_219  # the diffusers butterfly tutorial's
    assert schedule.prediction_type == "epsilon"
    assert parameters["nano"] < parameters["small"] < parameters["base"] < parameters["classic"]


def test_the_device_decides_and_says_so(tmp_path, capsys, shapes, monkeypatch):
    monkeypatch.setattr(sample, "choose_device", lambda name=None: torch.device("cpu"))
    monkeypatch.setattr(train, "backward", lambda network, *rest: torch.zeros(()))
    monkeypatch.setattr(train.State, "update", lambda self, loss, settings: setattr(self, "step", self.step + 1))
    assert train.main(["--data", str(shapes), "--out", str(tmp_path / "run"), "--steps", "1"]) == 0
    said = capsys.readouterr().out
    assert "nano: 32 px, 7,202,691 parameters, 2.43 GFLOP an image" in said and "about 0:00:0" in said


def test_without_a_compiler_training_goes_on_eager(tmp_path, shapes):
    """torch.compile for a CPU needs a C++ compiler; with none there is one line, and the same weights as without."""
    flags = ["--data", shapes, "--steps", 2, *TINY, "--out"]
    broken = environment() | {"CXX": str(tmp_path / "no-compiler"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    made = subprocess.run(command(*flags, tmp_path / "a", "--compile"), env=broken, capture_output=True, text=True)
    assert made.returncode == 0 and made.stdout.count("torch.compile does not work here") == 1, made.stderr
    assert subprocess.run(command(*flags, tmp_path / "b"), env=environment()).returncode == 0
    assert weights(tmp_path / "a") == weights(tmp_path / "b")


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["--data", "nowhere"], "'nowhere' is no folder"),
        (["--size", "0"], "'0' is not a whole number from 8 to 1024"),
        (["--size", "65"], "--size 65 must be a multiple of 2"),
        (["--preset", "huge"], "invalid choice: 'huge'"),
        (["--steps", "0"], "'0' is not a whole number from 1"),
        (["--steps", "5", "--epochs", "2"], "--steps and --epochs say the same thing"),
        (["--lr", "nan"], "'nan' is not a number"),
        (["--lr", "-1"], "'-1' is not a number"),
        (["--accumulate", "3"], "--batch-size 8 must be a multiple of 3"),
        (["--attention", "5"], "--attention 5: the levels' sides are 16, 8"),
        (["--channels", ""], "--size 16 must be a multiple of"),
        (["--head-dim", "24"], "channels do not divide into heads of 24"),
        (["--channels", "15,30"], "must be even"),
        (["--zero-snr", "--prediction", "epsilon"], "cannot go with the prediction of epsilon"),
        (["--image-channels", "2"], "channels 2"),
        (["--device", "tpu"], "--device tpu"),
        (["--init", "nowhere"], "comes from the model that --init names"),
        (["--config", "nowhere.json"], "nowhere.json cannot be read"),
        (["--resume", "nowhere"], "cannot change when a run is resumed"),
        (["--revision", "main"], "revision 'main' is for hub ids"),
        (["--no-such-flag"], "unrecognized arguments"),
    ],
)
def test_bad_flags(tmp_path, capsys, monkeypatch, fit, flags, sentence):
    monkeypatch.chdir(tmp_path)
    try:
        status = fit(tmp_path / "run", *flags)
    except SystemExit as stop:  # argparse
        status = stop.code
    assert status == 2 and sentence in error_of(capsys)
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
    good = sample.read_json(trained / "config.json")

    def attempt(content) -> str:
        path = tmp_path / "config.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        assert train.main(["--config", str(path), "--out", str(tmp_path / "run")]) == 2
        return error_of(capsys)

    assert "it is not JSON" in attempt("{")
    assert "something else than a JSON object" in attempt("[]")
    assert "no config.json of a run" in attempt({"settings": {}})
    for name, value in (("lr", "fast"), ("steps", 0), ("steps", 1.5), ("flips", 1), ("channels", [0]), ("loss", "l1"),
                        ("size", True), ("data", 3), ("classes", None)):  # fmt: skip
        assert f"{name} cannot be {value!r}" in attempt(good | {"settings": good["settings"] | {name: value}})
    assert not (tmp_path / "run").exists()


def test_out_under_a_file(tmp_path, capsys, fit):
    (tmp_path / "file").write_text("")
    assert fit(tmp_path / "file/run") == 2 and "a file is where a folder is needed" in error_of(capsys)


def test_every_setting_is_explained(capsys):
    with pytest.raises(SystemExit):
        train.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for rows in train.SETTINGS.values():
        for name, (_, _, sentence) in rows.items():
            assert f"--{name.replace('_', '-')}" in text and len(sentence.split()) > 1
