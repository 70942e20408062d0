"""Shared by the benchmarks: command lines, results folders, progress, the machine's description, other checkouts."""

import argparse
import math
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from datetime import datetime
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import NoReturn

import torch
from torch import Tensor
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
COMMITTED = ROOT / "benchmarks"


# ---- command lines ---------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """Reports a bad flag in one sentence, and ends --help with the second paragraph of the docstring, the examples.

    Adds the flags that all benchmarks have: --out and --update.
    """

    def __init__(self, name: str, docstring: str, rows: str = ""):
        first, examples, *rest = docstring.strip("\n").split("\n\n")
        description = "\n\n".join([first, *rest]).rstrip()
        if rows:
            description += f"\n\n{rows}"
        formatter = argparse.RawDescriptionHelpFormatter
        texts = {"description": description, "epilog": f"examples:\n{examples.rstrip()}", "formatter_class": formatter}
        super().__init__(f"python -m benchmarks.{name}", allow_abbrev=False, **texts)
        self.name = name
        results = f"runs/benchmarks/{name}-<date-time>"
        self.add_argument("--out", type=Path, metavar="FOLDER", help=f"new folder for results (default: {results})")
        self.add_argument("--update", action="store_true", help="also replace the committed results in benchmarks/")

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; {self.prog} --help lists the flags\n")

    def add_rows(self, rows: Iterable[str], compared: str, module: str) -> None:
        """Adds flags for a benchmark with several rows. A checkout for --against, in row `compared`, needs `module`."""
        self.rows, self.compared = list(rows), compared
        self.add_argument(
            "--only", type=some_of(self.rows), metavar="ROWS", help="rows separated by commas (default: all)"
        )
        self.add_argument(
            "--repeats", type=number(int, 1), default=5, metavar="N", help="repetitions (default: %(default)s)"
        )
        self.add_argument(
            "--against",
            type=checkout_with(module),
            metavar="FOLDER",
            help=f"another checkout of this project, as one more contender of row {compared}",
        )

    def chosen_rows(self, args: argparse.Namespace) -> list[str]:
        """Returns the rows to measure. Exits with a sentence if flags contradict each other."""
        if args.update and (args.only or args.against):
            self.error("--update replaces all rows: leave out --only and --against")
        names = args.only or self.rows
        if args.against and self.compared not in names:
            self.error(f"--against is for row {self.compared}: add it to --only")
        return names

    def require(self, packages: Iterable[str]) -> None:
        """Exits with a sentence if one of these packages is not installed."""
        missing = [name for name in packages if not find_spec(name)]
        if missing:
            self.exit(2, f"error: {', '.join(missing)} missing: pip install -r benchmarks/requirements.txt\n")


def number(kind: type, least: float) -> Callable[[str], float]:
    """An argparse type: an int or a float of at least `least`."""

    def read(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not least <= value < math.inf:
            word = {int: "a whole number", float: "a number"}[kind]
            raise argparse.ArgumentTypeError(f"{text!r} is not {word} of at least {least}")
        return value

    return read


def some_of(names: Iterable[str]) -> Callable[[str], list[str]]:
    """An argparse type: names of rows, separated by commas."""

    def read(text: str) -> list[str]:
        chosen = list(dict.fromkeys(text.replace(" ", "").split(",")))
        unknown = [repr(name) for name in chosen if name not in names]
        if unknown:
            raise argparse.ArgumentTypeError(f"there is no row {', '.join(unknown)}; the rows are {', '.join(names)}")
        return chosen

    return read


def checkout_with(module: str) -> Callable[[str], Path]:
    """An argparse type: another checkout of this project, which must have a module of that name."""

    def read(text: str) -> Path:
        folder = Path(text).resolve()
        if not (folder / module).is_file():
            raise argparse.ArgumentTypeError(f"{text} is not a checkout of this project: it has no {module}")
        return folder

    return read


# ---- results ---------------------------------------------------------------------------------------------------------


class Results:
    """The files of one run, NAME.md, NAME.json and so on, in a folder of their own."""

    def __init__(self, parser: Parser, args: argparse.Namespace):
        now = datetime.now().strftime("%Y-%m-%d-%H%M%S")
        self.name, self.update = parser.name, args.update
        self.folder = args.out or ROOT / f"runs/benchmarks/{self.name}-{now}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            occupied = any(self.folder.iterdir())
        except OSError as error:
            parser.error(f"--out {self.folder}: {error.strerror}")
        if occupied:
            parser.error(f"--out {self.folder}: this folder is not empty, and results go to a new one")

    def path(self, suffix: str) -> Path:
        return self.folder / f"{self.name}{suffix}"

    def write(self, suffix: str, text: str) -> None:
        self.path(suffix).write_text(text)

    def finish(self) -> None:
        """Says where the results are; with --update, copies them over the committed ones first."""
        files = sorted(self.folder.glob(f"{self.name}.*"))
        folder = os.path.relpath(self.folder)
        where = f"results: {folder}/ ({', '.join(file.name for file in files)})"
        if self.update:
            for file in files:
                shutil.copy(file, COMMITTED)
            where += ", also copied to benchmarks/"
        print(where)


def machine() -> dict:
    """Describes the processor and the versions that a result depends on."""
    cpu = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        models = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = next(iter(models), cpu)
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # missing in PyTorch 2.10
    bf16 = [name for name, there in capabilities.items() if there is True and "bf16" in name]
    packages = ("torch", "diffusers", "denoising_diffusion_pytorch", "numpy")
    return {
        "cpu": ", ".join([cpu, *bf16]),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: version(name) for name in packages if find_spec(name)},
    }


def described(facts: dict) -> str:
    return ", ".join(f"{key} {value}" for key, value in facts.items())


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """Returns the lines of a Markdown table."""
    head = list(head)
    return [f"| {' | '.join(head)} |", "|---" * len(head) + "|", *(f"| {' | '.join(row)} |" for row in rows)]


# ---- progress --------------------------------------------------------------------------------------------------------


class Progress(tqdm):
    """On a terminal, one line: what is running, how much of the work is done, and about how long is left."""

    def __init__(self, total: float):
        form = "{desc} ({n_fmt}/{total_fmt}, {elapsed} elapsed, about {remaining} left)"
        super().__init__(total=total, disable=None, leave=False, smoothing=0, bar_format=form)

    @contextmanager
    def part(self, what: str, share: float = 1):
        """Names a part of the work while it runs, and counts it when it is done."""
        self.set_description_str(what)
        yield
        self.update(share)

    def say(self, text: str) -> None:
        """Prints a line above the bar."""
        with self.external_write_mode():
            print(text, flush=True)


# ---- another checkout ------------------------------------------------------------------------------------------------


def checkout_name(folder: Path) -> str:
    """Returns the folder's name, and its commit if git knows it."""
    command = ["git", "-C", str(folder), "rev-parse", "--short", "HEAD"]
    found = subprocess.run(command, capture_output=True, text=True)
    if found.returncode:
        return folder.name
    return f"{folder.name} ({found.stdout.strip()})"


@contextmanager
def network_of(checkout: Path, model: Path, size: int):
    """Runs worker.py on a checkout's modules: yields a function that calls the network of a model folder once."""
    with subprocess.Popen(
        [sys.executable, "-P", str(COMMITTED / "worker.py"), str(model), str(size)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(checkout)},
        text=True,
    ) as process:

        def answer() -> str:
            line = process.stdout.readline()
            if not line:
                raise RuntimeError(f"the network of {checkout} could not be called; its error is above")
            return line.strip()

        output = torch.load(answer())

        def work() -> Tensor:
            process.stdin.write("\n")
            process.stdin.flush()
            answer()
            return output

        yield work


def ratio(numerators: list[float], denominators: list[float]) -> str:
    """Describes the ratios of measurements that were taken in turns."""
    ratios = [a / b for a, b in zip(numerators, denominators, strict=True)]
    return f"minimum {min(ratios):.3g}, median {median(ratios):.3g}, n {len(ratios)}"
