"""Compares samplers, numbers of steps and choices of timesteps: two tables and a picture for a model.

    python -m benchmarks.samplers                          the default model
    python -m benchmarks.samplers --model runs/NAME        a run
    python -m benchmarks.samplers -n 64                    fewer images: faster, with wider intervals

The first table is the distance from the images of a deterministic sampler with 200 steps and the same seeds: root mean
square over pixels, in levels of 255. The second is KID to real images, which does not depend on that reference. The
picture has 16 seeds with the default sampler in the first row, and with 200 steps in the second.
"""

from itertools import product
from pathlib import Path

import torch

from benchmarks import common, ours

DETERMINISTIC = ("ddim", "dpm++", "unipc", "ipndm")
TIMESTEPS = ("trailing", "logsnr", "linspace", "leading")
STEPS = (5, 8, 10, 12, 15, 20, 30, 50)
KID_STEPS = (5, 8, 10, 15, 20)
REFERENCE = ("unipc", 200, "trailing")
SECOND = ("ipndm", 200, "trailing")


def rms(a: torch.Tensor, b: torch.Tensor) -> str:
    return f"{(a.float() - b.float()).square().mean().sqrt():.2f}"


def distances(model, labels: list[int] | None, picture: Path) -> list[str]:
    """Returns the first table, and writes the picture."""

    def samples(*how) -> torch.Tensor:
        return ours.generate(model, range(16), how, labels, batch_size=16)

    rows = []
    with common.Progress(len(DETERMINISTIC) * len(TIMESTEPS) * sum(STEPS) + 410) as progress:
        with progress.part("200 steps, twice", 410):
            reference, second = samples(*REFERENCE), samples(*SECOND)
            ours.write_png(picture, torch.cat([samples(), reference]), columns=16)
        for sampler, timesteps in product(DETERMINISTIC, TIMESTEPS):
            row = [f"{sampler}, {timesteps}"]
            for steps in STEPS:
                with progress.part(f"distance of {sampler}, {timesteps}, {steps} steps", steps):
                    row.append(rms(samples(sampler, steps, timesteps), reference))
            rows.append(row)
            progress.say(f"| {' | '.join(row)} |")
    head = ("sampler, timesteps", *(f"{steps} steps" for steps in STEPS))
    between = f"Distance between {REFERENCE[0]} and {SECOND[0]}, both with 200 steps: {rms(second, reference)}."
    return [*common.table(head, rows), "", between]


def kernel_distances(model, count: int, real) -> list[str]:
    features = ours.load_features()
    rows = []
    with common.Progress(len(DETERMINISTIC) * sum(KID_STEPS)) as progress:
        for sampler in DETERMINISTIC:
            row = [sampler]
            for steps in KID_STEPS:
                with progress.part(f"KID of {sampler}, {steps} steps", steps):
                    kid = ours.kernel_distance(features, model, (sampler, steps, "trailing"), count, real)
                row.append(f"{kid.value:.4f} ± {kid.high - kid.value:.4f}")
            rows.append(row)
            progress.say(f"| {' | '.join(row)} |")
    return common.table(("sampler, trailing", *(f"{steps} steps" for steps in KID_STEPS)), rows)


def parser() -> common.Parser:
    parser = common.Parser("samplers", __doc__)
    parser.add_argument(
        "--model", type=Path, metavar="FOLDER", help="run or model folder, in place of the default model"
    )
    parser.add_argument(
        "-n", type=common.number(int, 3), default=512, metavar="N", help="images for each KID (default: %(default)s)"
    )
    return parser


def main() -> None:
    flags = parser()
    args = flags.parse_args()
    if args.update and args.model:
        flags.error("--update replaces the table of the default model: leave out --model")
    ours.set_threads()
    folder = args.model or ours.DEFAULT_MODEL
    try:
        model = ours.load(folder)
        real = ours.real_images(folder, model)
    except ours.InputError as error:
        flags.error(f"--model: {error}")
    results = common.Results(flags, args)
    class_count = model.network.config.class_count
    labels = None
    if class_count:
        labels = [seed % class_count for seed in range(16)]
    name = args.model or "the default model"
    facts = common.described(common.machine())
    lines = [
        f"{name}: {model.shape[1]} px, {model.precision}, model {model.hash[:12]}",
        "",
        "Distance from the images of 200 steps, n = 16:",
        "",
        *distances(model, labels, results.path(".png")),
        "",
        f"KID to {len(real.images):,} images of {real.source}, with its 95% interval, n = {args.n}:",
        "",
        *kernel_distances(model, args.n, real),
        "",
        facts,
        "",
    ]
    results.write(".md", "\n".join(lines))
    results.finish()


if __name__ == "__main__":
    main()
