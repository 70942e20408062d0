"""Quality after equal training time, at 32 px: the recipe of preset `classic` against preset `nano`.

    python -m benchmarks.quality --seconds 600                       drawn butterflies
    python -m benchmarks.quality --seconds 600 --data FOLDER         images of your own

The classic network is made for 128 px; at 32 px it is scaled to the one of CIFAR-10 (Ho et al. 2020), and its recipe
is also given nano's network. The tutorial's own program draws from the last weights; each is also given nano's average.
Warm-up is a tenth of the steps. A short run of each measures its speed and sets its number of steps; all are drawn from
with the same sampler and compared with the same images.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from monitor import is_drawn

ROOT = Path(__file__).resolve().parent.parent
SIZED = ["--size", "32", "--classes"]
CLASSIC = ["--preset", "classic", *SIZED]
CIFAR = ["--channels", "128,256,256,256", "--attention", "16"]
NANO = ["--channels", "32,64,128", "--attention", "8", "--layers", "1", "--head-dim", "32", "--groups", "4"]
RECIPES = {
    "classic, network of CIFAR-10": [*CLASSIC, *CIFAR],
    "classic, network of nano": [*CLASSIC, *NANO],
    "classic, network of nano, averaged": [*CLASSIC, *NANO, "--ema", "500000"],
    "nano": ["--preset", "nano", *SIZED],
}


def run(module: str, *arguments: str) -> None:
    subprocess.run([sys.executable, str(ROOT / module), *arguments], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def train(out: Path, flags: list[str], steps: int, every: int) -> float:
    """Trains `steps` steps; seconds they took, evaluations, pictures and checkpoints left out."""
    watch = [part for name in ("log", "eval", "preview", "save") for part in (f"--{name}-every", str(every))]
    watch[1] = "10"
    run("train.py", *flags, "--steps", str(steps), "--warmup", str(steps // 10), *watch, "--out", str(out))
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "images_per_second" in line]
    starts = [0, *(line["images"] for line in lines)]
    parts = zip(starts, lines, strict=False)
    return sum((line["images"] - start) / line["images_per_second"] for start, line in parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--data", default="drawn")
    parser.add_argument("--images", type=int, default=1000, help="to draw (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/quality.json")
    args = parser.parse_args()
    rows = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name, flags in RECIPES.items():
            flags = [*flags, "--data", args.data, "--seed", str(args.seed)]
            flags = flags if is_drawn(args.data) else [flag for flag in flags if flag != "--classes"]
            folder = Path(scratch) / name.replace(" ", "-")
            probe = train(folder / "probe", flags, 30, 1000)
            steps = round(args.seconds / probe * 30)
            begin = time.perf_counter()
            seconds = train(folder / "run", flags, steps, steps)
            wall = time.perf_counter() - begin
            run("monitor.py", "quality", str(folder / "run"), "-n", str(args.images), "--json", str(folder / "q.json"))
            found = json.loads((folder / "q.json").read_text())
            rows[name] = {"steps": steps, "seconds": seconds, "wall": wall} | found["images"]
            rows["training images"] = found["training_images"]
            print(name, rows[name], flush=True)
    args.out.write_text(json.dumps({"data": args.data, "seed": args.seed, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
