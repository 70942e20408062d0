"""Compares recipes of training by the quality of their images, after equal training time, at 32 px.

    python -m benchmarks.quality                                            the four recipes: an hour on two cores
    python -m benchmarks.quality --data synthetic FOLDER --seconds 150      also with images of your own
    python -m benchmarks.quality --recipe "patch 2 = --preset nano --patch-size 2"      one other recipe

The recipes are those of the presets `classic` (diffusers' butterfly training tutorial) and `nano`. The network of
`classic` is for 128 px; at 32 px it is replaced by that of CIFAR-10 (Ho et al. 2020). The recipe of `classic` is also
run with the network of `nano`, and with averaged weights, which the tutorial does not have. Warm-up is a tenth of the
steps. A short run of each recipe measures its speed, which gives the number of steps. All models are sampled with the
same sampler, each with seeds of its own, and compared with the same images. The intervals are those of sampling: the
same recipe with another training seed may differ by more.
"""

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks import common, ours

CIFAR = "--preset classic --size 32 --channels 128,256,256,256 --attention 16"
SMALL = "--preset classic --size 32 --channels 32,64,128 --attention 8 --layers 1 --head-dim 32 --groups 4"
RECIPES = {
    "classic, network of CIFAR-10": CIFAR,
    "classic, network of nano": SMALL,
    "classic, network of nano, averaged": f"{SMALL} --ema 500000",
    "nano": "--preset nano",
}
PROBE = 30  # steps of the run that measures a recipe's speed


# ---- measuring -------------------------------------------------------------------------------------------------------


def run(module: str, *arguments: str) -> None:
    """Runs a module of this project. Exits with a sentence if it fails; its own error is on stderr already."""
    done = subprocess.run(
        [sys.executable, str(common.ROOT / module), *arguments], cwd=common.ROOT, stdout=subprocess.DEVNULL
    )
    if done.returncode:
        sys.exit(f"error: {module} failed; the reason is above, and what was measured before is kept")


def train(out: Path, flags: list[str], steps: int, every: int) -> float:
    """Trains a model. Returns the seconds of its steps, without evaluations, previews and checkpoints."""
    watch = [part for name in ("eval", "preview", "save") for part in (f"--{name}-every", str(every))]
    fixed = ["--steps", str(steps), "--warmup", str(steps // 10), "--log-every", "10", *watch, "--out", str(out)]
    run("train.py", *flags, *fixed)
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    seconds, start = 0.0, 0
    for line in metrics:
        if "images_per_second" in line:
            seconds += (line["images"] - start) / line["images_per_second"]
            start = line["images"]
    return seconds


def measure(flags: list[str], seconds: float, images: int, seed: int, scratch: Path) -> dict:
    """Trains a recipe for about `seconds` and samples it. Returns the results of training and of monitor.py quality."""
    print("  measuring the speed of training", flush=True)
    probe = train(scratch / "probe", flags, PROBE, 1000)
    steps = max(1, round(seconds / probe * PROBE))
    print(f"  training: {steps:,} steps, about {seconds:.0f} s", flush=True)
    taken = train(scratch / "run", flags, steps, steps)
    print(f"  sampling {images:,} images", flush=True)
    record = scratch / "quality.json"
    written = ("--out", str(scratch / "quality.html"), "--json", str(record))
    run("monitor.py", "quality", str(scratch / "run"), "-n", str(images), "--seed", str(seed), *written)
    metrics = json.loads(record.read_text())["metrics"]
    return {"steps": steps, "seconds": taken, **distances(metrics, "images")} | {
        "training_images": distances(metrics, "training images")
    }


def distances(metrics: list[dict], which: str) -> dict:
    """Returns KID with its interval, and FD if there is one, of a set in the JSON of monitor.py quality."""
    found = {metric["measure"]: metric for metric in metrics if metric["of"] == which}
    kid, fd = found["kid"], found.get("fd", {})
    return {"kid": kid["value"], "kid_low": kid["low"], "kid_high": kid["high"], "fd": fd.get("value")}


# ---- the tables ------------------------------------------------------------------------------------------------------


def cells(name: str, row: dict) -> list[str]:
    half = (row["kid_high"] - row["kid_low"]) / 2
    fd = "" if row["fd"] is None else f"{row['fd']:.1f}"
    training = ["", ""]
    if "steps" in row:
        training = [str(row["steps"]), f"{row['seconds']:.0f}"]
    return [name, *training, f"{row['kid']:.4f} ± {half:.4f}", fd]


def table(rows: dict[str, dict]) -> list[str]:
    """Returns Markdown: a row for each recipe, then the differences in KID between the others and the last one.

    The interval of a difference is that of two independent numbers. It is somewhat too wide: both were measured with
    the same real images.
    """
    last_name, last = list(rows.items())[-1]
    lines = [cells(name, row) for name, row in rows.items()]
    lines.append(cells("as many training images", last["training_images"]))
    text = [*common.table(("recipe", "steps", "seconds", "KID, 95% interval", "FD"), lines), ""]
    for name, row in list(rows.items())[:-1]:
        half = sum((part["kid_high"] - part["kid_low"]) ** 2 for part in (row, last)) ** 0.5 / 2
        text.append(f"- KID of {name} minus KID of {last_name}: {row['kid'] - last['kid']:.4f} ± {half:.4f}")
    if len(rows) > 1:
        text.append("")
    return text


def report(found: dict, args: argparse.Namespace, facts: dict) -> str:
    lines = []
    for source, rows in found.items():
        lines += [f"{source}, {args.images} sampled images, seed {args.seed}:", "", *table(rows)]
    return "\n".join([*lines, common.described(facts), ""])


def recipe(text: str) -> tuple[str, str]:
    """An argparse type: NAME = FLAGS."""
    name, _, flags = text.partition("=")
    if not flags.strip():
        raise argparse.ArgumentTypeError(f'{text!r} is not of the form "NAME = FLAGS"')
    return name.strip(), flags


def parser() -> common.Parser:
    parser = common.Parser("quality", __doc__)
    parser.add_argument(
        "--seconds",
        type=common.number(float, 1),
        default=600,
        metavar="S",
        help="training time of each recipe (default: %(default)s)",
    )
    parser.add_argument(
        "--data",
        nargs="+",
        default=[ours.SYNTHETIC],
        metavar="SOURCE",
        help="training images, as in train.py --data (default: synthetic butterflies)",
    )
    parser.add_argument(
        "--recipe", type=recipe, action="append", metavar="NAME=FLAGS", help="recipe to measure instead; repeatable"
    )
    parser.add_argument(
        "--images",
        type=common.number(int, 3),
        default=1000,
        metavar="N",
        help="number of images to sample (default: %(default)s)",
    )
    parser.add_argument(
        "--seed", type=common.number(int, 0), default=0, metavar="N", help="training seed (default: %(default)s)"
    )
    return parser


def main() -> None:
    flags = parser()
    args = flags.parse_args()
    if args.update and args.recipe:
        flags.error("--update replaces the table of the four recipes: leave out --recipe")
    results = common.Results(flags, args)
    ours.set_threads()
    recipes = dict(args.recipe or RECIPES)
    facts = common.machine() | {"seed": args.seed, "training seconds": args.seconds}
    found, count = {}, 0
    for source in args.data:
        synthetic = ours.is_synthetic(source)
        rows = found[source if synthetic else Path(source).name] = {}
        for i, (name, settings) in enumerate(recipes.items()):
            left = (len(args.data) * len(recipes) - count) * args.seconds / 60
            count += 1
            print(f"{source}, {name} ({i + 1} of {len(recipes)}); training left: about {left:.0f} minutes", flush=True)
            common_flags = ["--data", source, "--seed", str(args.seed)]
            if synthetic:
                common_flags.append("--classes")
            with tempfile.TemporaryDirectory() as scratch:
                rows[name] = measure(
                    [*common_flags, *shlex.split(settings)], args.seconds, args.images, i * args.images, Path(scratch)
                )
            print(f"| {' | '.join(cells(name, rows[name]))} |", flush=True)
            results.write(".json", json.dumps({"machine": facts, "found": found}, indent=1) + "\n")
            results.write(".md", report(found, args, facts))
    results.finish()


if __name__ == "__main__":
    main()
