"""Which sampler, how many steps, which timesteps: two tables for a model, and a picture to look at.

    python -m benchmarks.samplers                        the model in the box
    python -m benchmarks.samplers --model FOLDER -n 256  fewer images, so wider intervals

The first table is the distance from a deterministic draw of 200 steps of the same seeds: root mean square over pixels,
in levels of 255. The second is KID to real images, for which a draw need not be near to any other. The picture has 16
seeds at the default in the first row and with 200 steps in the second.
"""

import argparse
from pathlib import Path

import torch

import data
import ddpm
import monitor
import sample

DETERMINISTIC = ("ddim", "dpm++", "unipc", "ipndm")
STEPS = (5, 8, 10, 12, 15, 20, 30, 50)
LONG = ("unipc", 200, "trailing")


def row(name: str, values: list[str]) -> str:
    return f"| {' | '.join([name, *values])} |"


def distances(model: sample.Model, labels: list[int] | None, out: Path) -> list[str]:
    def draw(*how) -> torch.Tensor:
        return sample.draw(model, range(16), ddpm.plan(model.schedule, *how), labels, batch_size=16)

    def rms(a: torch.Tensor, b: torch.Tensor) -> str:
        return f"{(a.float() - b.float()).square().mean().sqrt():.2f}"

    reference = draw(*LONG)
    data.write_png(out, data.grid(torch.cat([draw(), reference]), columns=16), {})
    lines = [row("sampler, timesteps", [f"{steps} steps" for steps in STEPS]), "|---" * (1 + len(STEPS)) + "|"]
    for sampler in DETERMINISTIC:
        for spacing in ("trailing", "logsnr", "linspace", "leading"):
            found = [rms(draw(sampler, steps, spacing), reference) for steps in STEPS]
            lines.append(row(f"{sampler}, {spacing}", found))
            print(lines[-1], flush=True)
    other = rms(draw("ipndm", *LONG[1:]), reference)
    return [*lines, "", f"Two draws of 200 steps, with {LONG[0]} and ipndm: {other} apart."]


def kernel_distances(model: sample.Model, count: int, real: monitor.Images) -> list[str]:
    features = monitor.load_features()
    steps = (5, 8, 10, 15, 20)
    lines = [row("sampler, trailing", [f"{number} steps" for number in steps]), "|---" * (1 + len(steps)) + "|"]
    for sampler in DETERMINISTIC:
        found = []
        for number in steps:
            table = ddpm.plan(model.schedule, sampler, number, "trailing")
            quality = monitor.quality(features, monitor.draw(model, 0, count, real, table), real.pixels)
            found.append(f"{quality.kid:.4f} ± {quality.kid_high - quality.kid:.4f}")
        lines.append(row(sampler, found))
        print(lines[-1], flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("weights/butterflies"), help="(default: %(default)s)")
    parser.add_argument("-n", type=int, default=512, help="images a KID (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/samplers"), help="of .md and .png")
    args = parser.parse_args()
    sample.set_threads()
    device = sample.choose_device()
    model = sample.load(args.model, device, sample.choose_precision(device))
    count = model.network.config.class_count
    labels = [seed % count for seed in range(16)] if count else None
    trained = (args.model / "metrics.jsonl").exists()
    real = monitor.images_of_run(args.model, model.shape)[1] if trained else monitor.fresh(model.shape)
    text = "\n".join([
        f"{args.model}: {model.shape[1]} px, {model.precision}, model {model.hash[:12]}, torch {torch.__version__}", "",
        "Distance from the long draw, n = 16:", "", *distances(model, labels, args.out.with_suffix(".png")), "",
        f"KID to {len(real.pixels):,} images of {real.source}, with its 95% interval, n = {args.n}:", "",
        *kernel_distances(model, args.n, real), "",
    ])  # fmt: skip
    args.out.with_suffix(".md").write_text(text)


if __name__ == "__main__":
    main()
