"""What several test files share: a dataset of shapes, a tiny trained run, and a cache of their own."""

import functools
import os
import signal

import pytest
import torch
from PIL import Image

import ddpm
import train
import unet
from tests.shapes import make_shapes

torch.set_num_threads(1)  # networks this small gain nothing from a second thread, and spin in it

SIZES = ["--size", "16", "--channels", "8,16", "--attention", "8", "--head-dim", "8", "--batch-size", "8"]
TINY = [*SIZES, "--warmup", "2", "--precision", "fp32"]
OFTEN = ["--log-every", "3", "--eval-every", "4", "--preview-every", "8", "--save-every", "4"]


def pytest_addoption(parser):
    parser.addoption("--soak", action="store_true", help="the long proofs, for some minutes each")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--soak"):
        items[:] = [item for item in items if not item.get_closest_marker("soak")]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Half of the tests for each process; who has done its own takes from the other, so that they end together."""
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log) if config.getoption("dist") == "load" else None


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory):
    """A folder that all processes of a run have in common."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session")
def shapes(tmp_path_factory):
    return make_shapes(tmp_path_factory.mktemp("shapes"), count=60, size=16)


@pytest.fixture(scope="session", autouse=True)
def own_cache(shared_folder):
    """One for all processes of a run, so that each data set is prepared once."""
    os.environ["PAPILIO_CACHE"] = str(shared_folder / "cache")


@pytest.fixture(autouse=True)
def signal_handlers():
    """Training takes over Ctrl-C; pytest gets it back."""
    signals = {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGINT)}
    before = {number: signal.getsignal(number) for number in signals}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session", autouse=True)
def counted_once():
    """Counting the operations of a network takes longer than a step of it, and most runs here have the same one."""
    unet.flops = functools.cache(unet.flops)


@pytest.fixture
def fit(shapes):
    """fit(out, *flags): a tiny training run in this process; returns the exit status."""

    def run(out, *flags, data=shapes, steps=12):
        return train.main(["--data", str(data), "--out", str(out), "--steps", str(steps), *TINY, *OFTEN, *flags])

    return run


@pytest.fixture(scope="session")
def trained(shapes, tmp_path_factory):
    """A finished run of 12 steps: flips, dropout and gradient accumulation on."""
    out = tmp_path_factory.mktemp("runs") / "unbroken"
    flags = ["--accumulate", "2", "--dropout", "0.2"]
    assert train.main(["--data", str(shapes), "--out", str(out), "--steps", "12", *TINY, *OFTEN, *flags]) == 0
    return out


def png_text(path) -> dict:
    with Image.open(path, formats=["PNG"]) as image:
        return dict(image.text)


def status_of(command, *arguments) -> int:
    """The exit status of a command, whether it or argparse ends it."""
    try:
        return command(*arguments)
    except SystemExit as stopped:
        return stopped.code


def randomise(network: torch.nn.Module, seed: int = 0) -> None:
    """Gives every parameter a value, those that start at zero too: a zero hides what is multiplied by it."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


@torch.inference_mode()
def denoise(network, table, noise, *, labels=None, start=None, known=None, progress=None) -> torch.Tensor:
    """The plainest loop over the steps of a table: the reference for sample.draw and the server."""
    x = noise()
    if start:
        x = start(x)
    state = ddpm.initial_state(x)
    for i, row in enumerate(table):
        t = torch.full((len(state),), int(row[ddpm.TIMESTEP]))
        output = network(state[:, ddpm.X], t, labels)
        fresh = noise() if ddpm.needs_noise(row) else None
        state, x0 = ddpm.step(state, output, row.expand(len(state), -1), fresh, known)
        if progress:
            progress(i, state[:, ddpm.X], x0)
    return state[:, ddpm.X]
