"""Quality after equal training time, at 32 px: the recipe of preset `classic` against preset `nano`.

    python -m benchmarks.quality --data drawn FOLDER                  drawn butterflies and images of your own
    python -m benchmarks.quality --recipe "patch 2 = --preset nano --patch-size 2"    another; as many as wanted

The classic network is made for 128 px; at 32 px it is scaled to the one of CIFAR-10 (Ho et al. 2020), and its recipe
is also given nano's network, with its average of the weights too: the tutorial's program draws from the last ones.
Warm-up is a tenth of the steps. A short run of each measures its speed and sets its number of steps; all are drawn from
with the same sampler, each by seeds of its own, and compared with the same images. Intervals are those of the draws:
trained again with another seed, a recipe may come out otherwise.
"""

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import sample
from monitor import is_drawn

ROOT = Path(__file__).resolve().parent.parent
CIFAR = "--preset classic --size 32 --channels 128,256,256,256 --attention 16"
SMALL = "--preset classic --size 32 --channels 32,64,128 --attention 8 --layers 1 --head-dim 32 --groups 4"
RECIPES = {
    "classic, network of CIFAR-10": CIFAR,
    "classic, network of nano": SMALL,
    "classic, network of nano, averaged": f"{SMALL} --ema 500000",
    "nano": "--preset nano",
}
PROBE = 30  # steps that a recipe's speed is measured in


def run(module: str, *arguments: str) -> None:
    subprocess.run([sys.executable, str(ROOT / module), *arguments], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def train(out: Path, flags: list[str], steps: int, every: int) -> float:
    """Trains `steps` steps; seconds they took, evaluations, pictures and checkpoints left out."""
    watch = [part for name in ("eval", "preview", "save") for part in (f"--{name}-every", str(every))]
    fixed = ["--steps", str(steps), "--warmup", str(steps // 10), "--log-every", "10", *watch, "--out", str(out)]
    run("train.py", *flags, *fixed)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "images_per_second" in line]
    starts = [0, *(line["images"] for line in lines)]
    parts = zip(starts, lines, strict=False)
    return sum((line["images"] - start) / line["images_per_second"] for start, line in parts)


def measure(flags: list[str], seconds: float, images: int, seed: int, scratch: Path) -> dict:
    """Trains a recipe for so many seconds and draws from it: what `monitor.py quality` finds, and the training's."""
    probe = train(scratch / "probe", flags, PROBE, 1000)
    steps = round(seconds / probe * PROBE)
    taken = train(scratch / "run", flags, steps, steps)
    record = scratch / "quality.json"
    run("monitor.py", "quality", str(scratch / "run"), "-n", str(images), "--seed", str(seed), "--json", str(record))
    found = json.loads(record.read_text())
    return {"steps": steps, "seconds": taken, **found["images"], "training_images": found["training_images"]}


def line(name: str, row: dict) -> str:
    half = (row["kid_high"] - row["kid_low"]) / 2
    fd = "" if row["fd"] is None else f"{row['fd']:.1f}"
    return f"| {name} | {row['steps']} | {row['seconds']:.0f} | {row['kid']:.4f} ± {half:.4f} | {fd} |"


def table(rows: dict[str, dict]) -> list[str]:
    """Markdown: a row a recipe, and how far the first ones are from the last. The interval of a difference is that of
    two independent numbers; they have the real images in common, so that it is rather too wide."""
    last_name, last = list(rows.items())[-1]
    real = {"steps": "", "seconds": float("nan"), **last["training_images"]}
    lines = ["| recipe | steps | seconds | KID, 95% interval | FD |", "|---|---|---|---|---|"]
    lines += [line(name, row) for name, row in rows.items()]
    lines += [line("as many training images", real).replace("nan", ""), ""]
    for name, row in list(rows.items())[:-1]:
        half = sum((part["kid_high"] - part["kid_low"]) ** 2 for part in (row, last)) ** 0.5 / 2
        lines.append(f"- KID of {name} less that of {last_name}: {row['kid'] - last['kid']:.4f} ± {half:.4f}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600, help="of training a recipe (default: %(default)s)")
    parser.add_argument("--data", nargs="+", default=["drawn"], help="(default: drawn)")
    parser.add_argument("--recipe", action="append", metavar="NAME = FLAGS", help="one to measure instead of these")
    parser.add_argument("--images", type=int, default=1000, help="to draw (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of training (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/quality", help="of .md and .json")
    args = parser.parse_args()
    sample.set_threads()
    recipes = RECIPES
    if args.recipe:
        recipes = {name.strip(): flags for name, _, flags in (recipe.partition("=") for recipe in args.recipe)}
    facts, found = {"threads": torch.get_num_threads(), "torch": torch.__version__, "seed": args.seed}, {}
    for source in args.data:
        rows = found[source if is_drawn(source) else Path(source).name] = {}
        for i, (name, flags) in enumerate(recipes.items()):
            common = ["--data", source, "--seed", str(args.seed), *["--classes"] * is_drawn(source)]
            flags = [*common, *shlex.split(flags)]
            with tempfile.TemporaryDirectory() as scratch:
                rows[name] = measure(flags, args.seconds, args.images, i * args.images, Path(scratch))
            print(line(name, rows[name]), flush=True)
            args.out.with_suffix(".json").write_text(json.dumps(facts | {"found": found}, indent=1) + "\n")
    text = []
    for source, rows in found.items():
        text += [f"{source}, {args.images} images drawn, seed {args.seed}:", "", *table(rows), ""]
    args.out.with_suffix(".md").write_text("\n".join([*text, str(facts), ""]))


if __name__ == "__main__":
    main()
