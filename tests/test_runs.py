"""Runs that can be seen and compared: report, comparison, model card, profile."""

import base64
import io
import json
import os
import re
import shutil
import signal

import pytest
import torch
from PIL import Image

import data
import monitor
import sample
import train
from builtin import features, profile, run_report
from tests.conftest import OFTEN, TINY
from tests.test_train import error_of, metrics, stop_at


def document_of(page) -> dict:
    """The JSON inside a report."""
    text = re.search(r'<script type="application/json" id="document">(.*?)</script>', page.read_text(), re.S)[1]
    return json.loads(text)


def lines_of(document: dict) -> dict:
    return {title: plot["lines"] for plot in document["series"] for title in [plot["title"]]}


# ---- report ----------------------------------------------------------------------------------------------------------


def test_report_shows_what_was_logged(trained):
    document, logged = document_of(trained / "report.html"), metrics(trained)
    lines = lines_of(document)
    for name, field in (("training", "loss"), ("held-out", "held_out_loss")):
        assert lines["Loss"][name] == [[line["step"], line[field]] for line in logged if field in line]
    assert lines["Learning rate"]["learning rate"] == [[line["step"], line["lr"]] for line in logged if "lr" in line]
    quarters = lines["Held-out loss by noise level"]
    assert list(quarters) == ["least noise", "second quarter", "third quarter", "most noise"]
    for i, (step, loss) in enumerate(lines["Loss"]["held-out"]):  # 8 images: all quarters are equally large
        assert sum(line[i][1] for line in quarters.values()) / 4 == pytest.approx(loss, rel=1e-6)
        assert all(line[i][0] == step for line in quarters.values())
    best = min(line["held_out_loss"] for line in logged if "held_out_loss" in line)
    assert (
        document["verdict"].startswith("Finished: step 12 of 12. Lowest held-out loss ")
        and f"{best:.4f}" in document["verdict"]
    )
    assert document["reload"] == 0 and document["facts"]["images seen"] == "96"
    config = data.read_json(trained / "config.json")
    assert document["facts"]["data: fingerprint"] == config["data"]["fingerprint"]
    (table,) = (table for table in document["tables"] if table["title"] == "Settings")
    assert dict(map(tuple, table["rows"]))["batch_size"] == "8" and len(table["rows"]) == len(train.DEFAULTS)
    assert [item["caption"] for item in document["film"]["items"]] == ["step 8", "step 12"]
    shown = Image.open(io.BytesIO(base64.b64decode(document["film"]["items"][1]["source"].partition(",")[2])))
    assert shown.size == data.picture_size(trained / "samples/00000012.png")


def test_the_noise_levels_are_in_order(trained):
    """For a network that says 0 the loss of v is alpha^2 eps^2 + sigma^2 x0^2: the quarters have rising timesteps."""
    run = trained
    dataset = data.prepare(data.read_json(run / "config.json")["data"]["source"], 16, progress=False)
    cdf = train.ddpm.timestep_cdf(train.ddpm.Schedule())
    held_out = train.HeldOut(dataset, data.split(dataset)[1], train.DEFAULTS, cdf, torch.device("cpu"))
    table = torch.ones(1000, 5)
    losses = held_out.losses(lambda x, t, labels: t[:, None, None, None] * torch.ones_like(x), table, torch.no_grad)
    assert len(losses) == 8 and (losses.diff() > 0).all()


def test_report_while_it_trains(tmp_path, monkeypatch, fit):
    """Rewritten at each preview, readable at any time, and reloading itself only until the end."""
    states, report = [], train.report_run

    def recording(folder, step, state, error):
        report(folder, step, state, error)
        document = document_of(folder / "report.html")
        states.append((state, document["reload"] > 0, len(document["film"]["items"]), document["verdict"]))

    monkeypatch.setattr(train, "report_run", recording)
    assert fit(tmp_path / "run") == 0
    assert [state[:3] for state in states] == [("running", True, 1), ("finished", False, 2)]
    assert re.match(r"Running at 20\d\d-\d\d-\d\d \d\d:\d\d UTC: step 8 of 12\. Lowest held-out loss", states[0][3])


def test_quality_is_measured_at_an_interval_and_shown(tmp_path, monkeypatch, capsys, fit, shapes):
    """The same numbers as monitor.py's functions give for the same images; a resumed run has the same."""
    run = tmp_path / "run"
    monkeypatch.setattr(train, "QUALITY_IMAGES", 20)
    assert fit(run, "--quality-every", "8", "--eval-every", "3", steps=16) == 0
    lines = [line for line in metrics(run) if "kid" in line]
    assert [line["step"] for line in lines] == [8, 16]
    dataset = data.prepare(str(shapes), 16, progress=False)
    training, held_out = (monitor.choose(dataset, rows) for rows in data.split(dataset))
    images = sample.draw_like(sample.load(run), 0, 20, held_out)
    pixels = [torch.from_numpy(part.images) for part in (training, held_out)]
    found = monitor.quality(features.load_features(), images, pixels[1])
    assert lines[1]["kid"] == pytest.approx(found["kid"].value, rel=1e-3)
    assert lines[1]["kid_low"] < lines[1]["kid"] < lines[1]["kid_high"]
    copies = monitor.memorised(images, *pixels)
    assert (lines[1]["near_copies"], lines[1]["near_copies_null"]) == (copies.share, copies.null_share)
    document = document_of(run / "report.html")
    assert lines_of(document)["KID against held-out images"]["KID"] == [[line["step"], line["kid"]] for line in lines]
    assert document["tables"][0]["rows"][0][:2] == [16, f"{lines[1]['kid']:.4g}"]
    assert re.fullmatch(r"\d:\d\d:\d\d, [\d.]+% of the time", document["facts"]["time for quality"])
    assert f"- kid: {lines[1]['kid']:.4g} (step 16)" in (run / "model/README.md").read_text()
    again = tmp_path / "again"
    with monkeypatch.context() as patch:
        stop_at(patch, 7, lambda: os.kill(os.getpid(), signal.SIGINT))
        assert fit(again, "--quality-every", "8", "--eval-every", "3", steps=16) == 130
    assert train.main(["--resume", str(again)]) == 0 and metrics(again) == metrics(run)
    assert "step 16: KID " in capsys.readouterr().out


@pytest.mark.parametrize("batch_size, every", [(16, 1500), (64, 500), (8, 2500)])
def test_quality_takes_a_twentieth_of_the_time_by_default(batch_size, every):
    """256 images of 10 predictions, against 3 passes for each image that is trained on, in whole previews."""
    settings = train.DEFAULTS | {"batch_size": batch_size}
    train.resolve_defaults(settings, torch.device("cpu"))
    assert settings["quality_every"] == every
    assert 0.05 * every * batch_size * 3 >= 256 * 10
    assert 0.05 * (every - 500) * batch_size * 3 < 256 * 10


def test_logs_that_are_long_damaged_or_half_written(tmp_path, trained):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    lines = [
        json.dumps({"step": i, "loss": 2.0 + i % 2, "images_per_second": 10.0, "images": 8 * i})
        for i in range(1, 40_001)
    ]
    (run / "metrics.jsonl").write_text(
        "\n".join([*lines, '{"step": 40001, "loss": NaN}', "null", '{"step": 40002, "lo'])
    )
    run_report.report_run(run, 40_000, "running")
    (points,) = [
        plot["lines"]["training"] for plot in document_of(run / "report.html")["series"] if plot["title"] == "Loss"
    ]
    assert len(points) <= run_report.POINTS and points[-1][0] == 40_000
    assert all(abs(value - 2.5) < 0.05 for _, value in points)  # means of neighbours, not a choice of them
    assert (run / "report.html").stat().st_size < 1_000_000
    assert run_report.read_run(run).seconds() == pytest.approx(32_000)
    (run / "metrics.jsonl").unlink()
    (run / "samples/00000050 copy.png").write_bytes(b"x")  # not a grid of the run
    (run / "samples/00000012.png").write_bytes(b"damaged")
    run_report.report_run(run, 12, "running")
    assert [item["caption"] for item in document_of(run / "report.html")["film"]["items"]] == ["step 8"]
    assert document_of(run / "report.html")["series"] == []


def test_hostile_text_stays_text(tmp_path, trained):
    run = tmp_path / "run</script><b>"
    shutil.copytree(trained, run)
    run_report.report_run(run, 12, "running")
    assert document_of(run / "report.html")["title"] == f"Run {run}"


# ---- comparison ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sweep(shapes, tmp_path_factory):
    """Three learning rates, and a folder that holds no run."""
    folder = tmp_path_factory.mktemp("sweep")
    for rate in ("0.001", "0.01", "0.03"):
        flags = ["--data", str(shapes), "--steps", "12", *TINY, *OFTEN, "--lr", rate]
        assert train.main([*flags, "--out", str(folder / f"lr-{rate}")]) == 0
    (folder / "notes").mkdir()
    return folder


def test_runs_are_compared(sweep, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folders = sorted(map(str, sweep.iterdir()))
    assert monitor.main(["compare", *folders, "--json", "compare.json"]) == 0
    printed = capsys.readouterr()
    assert printed.err.startswith(f"skipped {sweep / 'notes'}: ") and "config.json cannot be read" in printed.err
    document = json.loads((tmp_path / "compare.json").read_text())
    (table,) = document["tables"]
    assert table["columns"] == ["run", "steps", "lowest held-out loss", "lowest KID", "time", "lr"]
    lowest = {
        str(sweep / f"lr-{rate}"): min(
            line["held_out_loss"] for line in metrics(sweep / f"lr-{rate}") if "held_out_loss" in line
        )
        for rate in ("0.001", "0.01", "0.03")
    }
    order = sorted(lowest, key=lowest.get)
    assert [row[0] for row in table["rows"]] == order
    assert all(row[2].startswith(f"{lowest[row[0]]:.4f} (step ") for row in table["rows"])
    assert [row[5] for row in table["rows"]] == [name.rpartition("-")[2] for name in order]
    assert list(lines_of(document_of(tmp_path / "compare.html"))["Held-out loss"]) == order
    assert f"{order[0]} has the lowest held-out loss: {lowest[order[0]]:.4f}" in printed.out
    assert document == document_of(tmp_path / "compare.html")
    assert monitor.main(["compare", *folders, "--sort", "kid"]) == 0
    assert "No run has a KID yet." in capsys.readouterr().out


def test_runs_on_other_data_are_not_ranked_in_silence(sweep, trained, tmp_path, capsys):
    run = tmp_path / "other"
    shutil.copytree(trained, run)
    config = data.read_json(run / "config.json")
    config["data"]["fingerprint"] = "0" * 64
    data.write_json(run / "config.json", config)
    page = ["--out", str(tmp_path / "compare.html")]
    assert monitor.main(["compare", str(run), str(sweep / "lr-0.01"), *page]) == 0
    assert "These losses cannot be compared, because the runs differ in: data." in capsys.readouterr().out
    config["settings"]["prediction"] = "epsilon"
    data.write_json(run / "config.json", config)
    assert monitor.main(["compare", str(run), str(sweep / "lr-0.01"), *page]) == 0
    assert "because the runs differ in: data, prediction." in capsys.readouterr().out


def test_nothing_to_compare(tmp_path, capsys):
    assert monitor.main(["compare", str(tmp_path)]) == 2
    assert f"none of {tmp_path} is a run; name folders that train.py wrote" in error_of(capsys)
    (tmp_path / "config.json").write_text('{"settings": 3}')
    assert monitor.main(["compare", str(tmp_path)]) == 2
    assert "is not the config.json of a run" in capsys.readouterr().err


def test_a_damaged_run_spoils_no_comparison(sweep, tmp_path, capsys):
    run = tmp_path / "damaged"
    shutil.copytree(sweep / "lr-0.01", run)
    lines = ['{"step": 2, "held_out_loss": [1]}', '{"step": 3, "images_per_second": 5}', '{"step": 4, "loss": "low"}']
    (run / "metrics.jsonl").write_text("\n".join(lines))
    assert monitor.main(["compare", str(run), str(sweep / "lr-0.03"), "--out", str(tmp_path / "c.html")]) == 0
    assert f"{sweep / 'lr-0.03'} has the lowest held-out loss" in capsys.readouterr().out


def test_report_and_card_name_the_step_at_which_a_run_ended(tmp_path, monkeypatch, capsys, fit):
    """Stopped between two lines of the log, or ended by an error."""
    with monkeypatch.context() as patch:
        stop_at(patch, 7, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert fit(tmp_path / "run") == 143
    document = document_of(tmp_path / "run/report.html")
    assert document["verdict"].startswith("Stopped: step 7 of 12.") and not document["alarm"] and not document["reload"]
    assert "for 7 of 12 steps" in " ".join((tmp_path / "run/model/README.md").read_text().split())
    assert run_report.read_run(tmp_path / "run").step == 7
    capsys.readouterr()

    def full(*args):
        raise data.InputError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(train.Run, "evaluate", full)
        assert train.main(["--resume", str(tmp_path / "run")]) == 2
    document = document_of(tmp_path / "run/report.html")
    assert document["verdict"].startswith("Ended by an error: step 8 of 12.") and document["alarm"]
    assert "Error: the disk is full." in document["verdict"] and not document["reload"]


def test_a_report_that_fails_ends_no_training(tmp_path, monkeypatch, capsys, fit, trained):
    def broken(*args):
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr(train, "report_run", broken)
    assert fit(tmp_path / "run") == 0
    assert "report.html could not be written: division by zero" in capsys.readouterr().err


# ---- model card ------------------------------------------------------------------------------------------------------


def test_the_card_is_one_of_the_hub_and_its_code_draws(trained):
    from huggingface_hub import ModelCard

    for name in ("model", "best"):
        card = ModelCard.load(trained / name / "README.md")
        assert {
            "library_name": "diffusers",
            "tags": ["diffusion", "ddpm", "papilio"],
        }.items() <= card.data.to_dict().items()
    config = data.read_json(trained / "config.json")
    assert config["data"]["fingerprint"] in card.content and "- dropout: 0.2" in card.content
    last = [line["held_out_loss"] for line in metrics(trained) if "held_out_loss" in line][-1]
    assert f"- held-out loss: {last:.4f} (step 12)" in (trained / "model/README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", (trained / "model/README.md").read_text(), re.S)
    names = {}
    exec(code.replace("THIS_FOLDER", str(trained / "model")).replace("=50", "=2"), names)
    assert len(names["images"]) == 8 and names["images"][0].size == (16, 16)


@pytest.mark.parametrize(
    "flags, sentence", [(["--patch-size", "2"], "fold patches"), (["--classes"], "class-conditional")]
)
def test_a_card_promises_no_pipeline_that_there_is_not(tmp_path, fit, flags, sentence):
    assert fit(tmp_path / "run", *flags, steps=1) == 0
    card = (tmp_path / "run/model/README.md").read_text()
    assert sentence in card and "```python" not in card


# ---- profile ---------------------------------------------------------------------------------------------------------


def test_profile_names_the_parts_of_a_step(tmp_path, monkeypatch, capsys, shapes):
    monkeypatch.chdir(tmp_path)
    assert train.main(["--data", str(shapes), *TINY, "--profile", "trace.json"]) == 0
    printed = capsys.readouterr().out
    shares = {name: float(share) for name, share in re.findall(r"^  (\w+) +[\d.]+ ms +([\d.]+)%$", printed, re.M)}
    assert list(shares) == ["data", "forward", "backward", "optimizer", "EMA"]
    assert sum(shares.values()) == pytest.approx(100, abs=0.3) and min(shares.values()) > 0
    assert re.search(r"\d+% of the [\d,]+ GFLOP/s that a product of matrices reaches in fp32", printed)
    assert re.search(r"^   1 worker +[\d,]+ images/s$", printed, re.M)
    events = {event.get("name") for event in json.loads((tmp_path / "trace.json").read_text())["traceEvents"]}
    assert {"data", "forward", "backward", "optimizer", "EMA", "aten::convolution"} <= events
    assert not (tmp_path / "runs").exists()
    assert train.main(["--data", str(shapes), *TINY, "--profile", "trace.json", "--out", "run"]) == 2
    assert "--profile trains nothing and writes no run; omit --out and --resume" in error_of(capsys)


def test_the_peak_is_what_a_product_takes(monkeypatch):
    """A clock that advances by one second at each look: 2 n^3 operations in a second."""
    ticks = iter(range(100))
    monkeypatch.setattr(profile.time, "perf_counter", lambda: float(next(ticks)))
    assert profile.peak_gflops(torch.device("cpu"), torch.float32, side=100) == pytest.approx(2e6 / 1e9)
