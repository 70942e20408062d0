"""What a run has done so far: its report, its comparison with other runs, and the card of its model."""

import base64
import io
import json
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

import data
from builtin.report import write_page
from data import InputError

POINTS = 500  # of a curve; neighbouring values are averaged beyond that
FRAMES = 24  # grids of samples in a report
RELOAD_SECONDS = 20

# Curves of a report: title, whether the axis is logarithmic, and {name of a line: field of metrics.jsonl}. A field that
# holds a list gives a line for each element.
CURVES = (
    ("Loss", True, {"training": "loss", "held-out": "held_out_loss"}),
    ("Held-out loss by noise level", True, {"": "held_out_by_noise"}),
    ("Learning rate", False, {"learning rate": "lr"}),
    ("Gradient norm", True, {"gradient norm": "grad_norm"}),
    ("Images per second", False, {"images per second": "images_per_second"}),
    ("KID against held-out images", False, {"KID": "kid", "95% interval, low": "kid_low", "high": "kid_high"}),
    ("Precision and recall", False, {name: name for name in ("precision", "recall", "density", "coverage")}),
    ("Near-copies of training images", False, {"share": "near_copies", "among held-out images": "near_copies_null"}),
)
LISTS = ("held_out_by_noise",)
NOISE_LEVELS = ("least noise", "second quarter", "third quarter", "most noise")  # elements of held_out_by_noise


@dataclass(frozen=True)
class RunRecord:
    """The content of a run folder's config.json and metrics.jsonl."""

    folder: Path
    config: dict
    metrics: list[dict]

    @property
    def step(self) -> int:
        """The last step that was logged or saved."""
        saved = [int(file.stem.partition("-")[2]) for file in self.folder.glob("checkpoint-[0-9]*.pt")]
        return max([0, *saved, *(line["step"] for line in self.metrics)])

    @property
    def settings(self) -> dict:
        return self.config["settings"]

    def points(self, field: str) -> list[tuple]:
        """Returns (step, value) of each line that has a field."""
        return [(line["step"], line[field]) for line in self.metrics if line.get(field) is not None]

    def lowest(self, field: str) -> tuple | None:
        """Returns (value, step) of the lowest value of a field."""
        return min(((value, step) for step, value in self.points(field)), default=None)

    def seconds(self) -> float:
        """Returns the time that the run has taken, with evaluation, previews and saving."""
        seconds, images = 0.0, 0
        for line in self.metrics:
            if line.get("images_per_second") and "images" in line:
                seconds += (line["images"] - images) / line["images_per_second"]
                images = line["images"]
        return seconds


def is_number(value) -> bool:
    return isinstance(value, int | float)


def read_run(folder: Path) -> RunRecord:
    """Reads a run folder, also while it is written. Raises InputError if it holds no run."""
    config = data.read_json(folder / "config.json")
    if not isinstance(config.get("settings"), dict) or not isinstance(config.get("data", {}), dict):
        raise InputError(f"{folder / 'config.json'} is not the config.json of a run")
    lines = []
    with data.disk_errors(f"read {folder / 'metrics.jsonl'}"), suppress(FileNotFoundError):
        lines = (folder / "metrics.jsonl").read_bytes().splitlines()
    metrics = []
    for line in lines:
        with suppress(ValueError, TypeError, KeyError, AttributeError):  # the last line may be half written
            record = json.loads(line, parse_constant=lambda _: None)  # NaN is no value
            numbers = {name: value for name, value in record.items() if is_number(value) or name in LISTS}
            metrics.append({**numbers, "step": int(record["step"])})
    return RunRecord(folder, config, metrics)


def thinned(points: list[tuple]) -> list[list]:
    """Averages neighbouring points so that at most POINTS are left."""
    size = -(-len(points) // POINTS)
    groups = [points[start : start + size] for start in range(0, len(points), size or 1)]
    return [[group[-1][0], sum(value for _, value in group) / len(group)] for group in groups]


def curves(run: RunRecord) -> list[dict]:
    series = []
    for title, log, fields in CURVES:
        lines = {}
        for name, field in fields.items():
            points = run.points(field)
            if points and isinstance(points[0][1], list):
                for i, level in enumerate(NOISE_LEVELS[: len(points[0][1])]):
                    lines[level] = thinned([(step, values[i]) for step, values in points])
            elif points:
                lines[name] = thinned(points)
        if lines:
            series.append({"title": title, "log": log, "lines": lines})
    return series


def film(run: RunRecord) -> dict:
    """Returns the grids of samples through time, at most FRAMES of them, as JPEG images."""
    files = sorted(file for file in (run.folder / "samples").glob("*.png") if file.stem.isdecimal())
    count = min(FRAMES, len(files))
    chosen = [files[round(i * (len(files) - 1) / max(count - 1, 1))] for i in range(count)]
    items = []
    for file in chosen:
        try:
            with Image.open(file) as image:
                image.convert("RGB").save(encoded := io.BytesIO(), "JPEG", quality=85)
        except OSError:  # damaged
            continue
        source = f"data:image/jpeg;base64,{base64.b64encode(encoded.getvalue()).decode()}"
        items.append({"caption": f"step {int(file.stem):,}", "source": source})
    return {"title": "Samples, with the same seeds each time", "items": items}


def duration(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}"


def cost(run: RunRecord, step: int) -> dict:
    """Returns what a run has cost so far, for the facts of a report."""
    images = step * run.settings["batch_size"]
    facts = {"parameters": f"{run.config['parameters']:,}"} if "parameters" in run.config else {}
    if "gflop_per_image" in run.config:  # a backward pass takes twice the operations of a forward pass
        facts["training operations"] = f"{3e9 * run.config['gflop_per_image'] * images:.3g} FLOP"
    facts |= {"images seen": f"{images:,}", "time": duration(run.seconds())}
    if measured := sum(seconds for _, seconds in run.points("quality_seconds")):
        share = measured / max(measured, run.seconds())
        facts["time for quality"] = f"{duration(measured)}, {share:.1%} of the time"
    return facts


def as_cell(value) -> str:
    """Returns the text of a setting."""
    return "-" if value in (None, []) else data.as_text(value)


def report_run(folder: Path, step: int, state: str, error: str = "") -> None:
    """Writes report.html into the folder of a run at a step. The page reloads itself if the state is "running"."""
    run = read_run(folder)
    total, best = run.settings["steps"], run.lowest("held_out_loss")
    verdict = f"{state.capitalize()}: step {step:,} of {total:,}."
    if state == "running":  # the page of a killed run stays as it is
        verdict = f"Running at {time.strftime('%Y-%m-%d %H:%M', time.gmtime())} UTC: step {step:,} of {total:,}."
    if best:
        verdict += f" Lowest held-out loss {best[0]:.4f}, at step {best[1]:,}."
    verdict += f" Error: {error}." * bool(error)
    kept = run.config.get("data", {})
    rows = [[name, as_cell(value)] for name, value in run.settings.items()]
    document = {
        "title": f"Run {folder}",
        "verdict": verdict,
        "alarm": bool(error),
        "reload": RELOAD_SECONDS if state == "running" else 0,
        "film": film(run),
        "series": curves(run),
        "tables": [quality_table(run), {"title": "Settings", "columns": ["setting", "value"], "rows": rows}],
        "facts": {
            **{f"data: {name}": as_cell(value) for name, value in kept.items() if name != "skipped"},
            **cost(run, step),
            **{f"version of {name}": text for name, text in run.config.get("versions", {}).items()},
            "commit of the run": run.config.get("git_commit") or "unknown",
            "processes": run.config.get("processes", 1),
        },
    }
    write_page(folder / "report.html", document)


def quality_table(run: RunRecord) -> dict:
    """Returns the measured quality, newest first."""
    names = {"kid": "KID", "fd": "FD"} | {name: name for name in ("precision", "recall", "density", "coverage")}
    names |= {"near_copies": "near-copies", "near_copies_null": "near-copies, other images"}
    rows = []
    for line in reversed(run.metrics):
        if "kid" in line:
            rows.append([line["step"], *(f"{line[name]:.4g}" if name in line else "-" for name in names)])
    title = "Quality of 256 samples against held-out images; near-copies of training images among samples and others"
    return {"title": title, "columns": ["step", *names.values()], "rows": rows[:20]}


# ---- several runs ----------------------------------------------------------------------------------------------------

COMPARED = {"loss": "training loss", "held_out_loss": "held-out loss", "kid": "KID"}


# Settings that change what a loss measures.
OF_THE_LOSS = {"prediction", "loss", "gamma", "density", "density_mean", "density_std", "noise_schedule", "zero_snr",
               "timesteps", "size", "image_channels", "patch_size"}  # fmt: skip


def compare_runs(runs: list[RunRecord], sort: str) -> dict:
    """Returns the document of a comparison, the run with the lowest `sort` first."""

    def key(run: RunRecord) -> tuple:
        best = run.lowest(sort)
        return best is None, best or ()

    runs = sorted(runs, key=key)
    names = dict.fromkeys(name for run in runs for name in run.settings)
    texts = {name: [as_cell(run.settings.get(name)) for run in runs] for name in names}
    differing = [name for name, values in texts.items() if len(set(values)) > 1]
    rows = []
    for i, run in enumerate(runs):
        bests = [run.lowest(field) for field in ("held_out_loss", "kid")]
        cells = [f"{best[0]:.4f} (step {best[1]})" if best else "-" for best in bests]
        steps = f"{run.step} of {run.settings.get('steps')}"
        rows.append([str(run.folder), steps, *cells, duration(run.seconds()), *(texts[name][i] for name in differing)])
    columns = ["run", "steps", "lowest held-out loss", "lowest KID", "time", *differing]
    series = [
        {"title": title[0].upper() + title[1:], "log": field != "kid", "lines": lines}
        for field, title in COMPARED.items()
        if (lines := {str(run.folder): thinned(points) for run in runs if (points := run.points(field))})
    ]
    best = runs[0].lowest(sort)
    verdict = f"No run has a {COMPARED[sort]} yet."
    if best:
        verdict = f"{runs[0].folder} has the lowest {COMPARED[sort]}: {best[0]:.4f}, at step {best[1]:,}."
    fingerprints = {run.config.get("data", {}).get("fingerprint") for run in runs}
    reasons = ["data"] * (len(fingerprints) > 1) + [name for name in differing if name in OF_THE_LOSS]
    if reasons and sort != "kid":
        verdict += f" These losses cannot be compared, because the runs differ in: {', '.join(reasons)}."
    return {
        "title": f"{len(runs)} runs",
        "verdict": verdict,
        "alarm": False,
        "tables": [{"title": f"Runs, sorted by {COMPARED[sort]}", "columns": columns, "rows": rows}],
        "series": series,
        "facts": {},
    }


# ---- model card ------------------------------------------------------------------------------------------------------

CARD = """---
library_name: diffusers
pipeline_tag: unconditional-image-generation
tags: [diffusion, ddpm, papilio]
---

# {title}

A denoising diffusion model ({prediction}, {schedule} noise schedule) that draws images of {size} x {size} pixels like
those of its training data. {parameters} parameters, trained with Papilio {version} for {step:,} of {steps:,} steps of
{batch_size} images.

## Drawing images

With Papilio, in a folder that holds its code:

```sh
python sample.py --model THIS_FOLDER -n 8
```

{diffusers}

## Training data

{data}

## Measured quality

{quality}

These numbers were measured with Papilio's own feature extractor against images that were held out of training, so they
are comparable between its runs, but not with a published FID or KID.

## Limits

The model draws only what its training data shows, and has the same gaps. Whether images may be published
depends on the licence of the data. `python monitor.py memorised` checks whether it reproduces training images.

## Settings

{settings}
"""

WITH_DIFFUSERS = """With diffusers:

```python
from diffusers import DDIMScheduler, DDPMPipeline

pipeline = DDPMPipeline.from_pretrained("THIS_FOLDER")
pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, timestep_spacing="trailing")
images = pipeline(batch_size=8, num_inference_steps=50).images
```"""


def with_diffusers(network: dict) -> str:
    """Returns instructions for drawing with diffusers and a model of this configuration."""
    if network.get("patch_size", 1) > 1:
        return "diffusers has no pipeline for networks that fold patches of pixels into channels, as this one does."
    if network.get("num_class_embeds"):
        return (
            "diffusers has no pipeline for class-conditional pixel models; its `UNet2DModel` and schedulers open the "
            "subfolders `unet` and `scheduler`."
        )
    return WITH_DIFFUSERS


def model_card(folder: Path, step: int) -> str:
    """Returns the README.md of a run's model at a step, in the format of model cards on the Hugging Face hub."""
    run = read_run(folder)
    settings, kept = run.settings, run.config["data"]
    held_out = run.points("held_out_loss")[-1:]
    quality = [f"- held-out loss: {value:.4f} (step {step:,})" for step, value in held_out]
    measured = next((line for line in reversed(run.metrics) if "kid" in line), {})
    for name in ("kid", "fd", "precision", "recall", "density", "coverage", "near_copies"):
        if name in measured:
            quality.append(f"- {name.replace('_', '-')}: {measured[name]:.4g} (step {measured['step']:,})")
    given = {name: as_cell(value) for name, value in settings.items() if value not in (None, [])}
    described = {"source": kept["source"], "revision": kept["revision"], "SHA-256": kept["fingerprint"]}
    described |= {"training images": kept["images"], "held-out images": kept["held_out"]}
    return CARD.format(
        title=folder.resolve().name,
        prediction=settings["prediction"],
        schedule=settings["noise_schedule"],
        size=settings["size"],
        parameters=f"{run.config['parameters']:,}",
        version=data.VERSION,
        step=step,
        steps=settings["steps"],
        batch_size=settings["batch_size"],
        diffusers=with_diffusers(run.config["network"]),
        data="\n".join(f"- {name}: {value}" for name, value in described.items() if value is not None),
        quality="\n".join(quality) or "- nothing yet",
        settings="\n".join(f"- {name}: {text}" for name, text in given.items()),
    )
