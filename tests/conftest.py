"""What several test files share: a data set of drawn shapes, a tiny trained run, and a cache of their own."""

import os
import signal

import pytest
import torch
from PIL import Image

import train
from tests.shapes import make_shapes

torch.set_num_threads(1)  # networks this small gain nothing from a second thread, and spin in it

SIZES = ["--size", "16", "--channels", "16,32", "--attention", "8", "--head-dim", "16", "--batch-size", "8"]
TINY = [*SIZES, "--warmup", "2", "--precision", "fp32"]
OFTEN = ["--log-every", "3", "--eval-every", "4", "--preview-every", "8", "--save-every", "4"]


def pytest_addoption(parser):
    parser.addoption("--soak", action="store_true", help="ask the server 20,000 times, for some minutes")


@pytest.fixture(scope="session")
def shapes(tmp_path_factory):
    return make_shapes(tmp_path_factory.mktemp("shapes"), count=60, size=16)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    os.environ["PAPILIO_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def signal_handlers():
    """Training takes over Ctrl-C; pytest gets it back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


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
