"""The watch of monitor.py: its tests against naive loops and known rates, then folders, servers and messages."""

import base64
import http.server
import json
import math
import re
import shutil
import struct
import sys
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import ddpm
import monitor
import sample
from builtin import features
from builtin.served_images import ServedImages
from tests.conftest import status_of
from tests.test_sample import NAMES, make_model
from tests.test_server import serving

COUNT = 800  # of the golden set: a fifth to fit, 640 to compare with


def normal(n, d, seed, shift=0.0):
    return shift + torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def measured(labels, values) -> monitor.Measured:
    """Images that are nothing but their classes and features; the statistics are other numbers without a shift."""
    labels = torch.as_tensor(labels)
    statistics = normal(len(labels), 3, int(values.sum() * 1e6) % 2**31)
    empty = torch.zeros(len(labels), 1, 8, 8, dtype=torch.uint8)
    return monitor.Measured(empty, labels, values, statistics, np.array([""] * len(labels)))


# ---- statistics ------------------------------------------------------------------------------------------------------


def naive_mmd(kernel, chosen):
    inside = [i for i, one in enumerate(chosen) if one]
    outside = [i for i, one in enumerate(chosen) if not one]

    def mean(rows, columns):
        values = [float(kernel[i, j]) for i in rows for j in columns if i != j]
        return sum(values) / len(values)

    return mean(inside, inside) + mean(outside, outside) - 2 * mean(inside, outside)


def test_vectorised_permutations_equal_a_naive_loop():
    labels = torch.randint(3, (30,), generator=torch.Generator().manual_seed(1))
    current = torch.arange(30) >= 21
    values = normal(30, 4, 0)
    kernel = monitor.gaussian_kernel(normal(20, 4, 9), values)
    assert kernel.diagonal().eq(0).all() and torch.equal(kernel, kernel.T)
    chosen = monitor.permutations(labels, current, 50, data.generator("test"))
    expected = [naive_mmd(kernel, row) for row in chosen]
    assert torch.allclose(monitor.mmd(kernel, chosen), torch.tensor(expected), atol=1e-6)
    near = (kernel > 0.8).float()
    pairs = [sum(float(near[i, j]) for i in range(30) for j in range(30) if row[i] and row[j]) for row in chosen]
    assert monitor.near_pairs(near, chosen).tolist() == pairs and max(pairs) > 0


def test_permutations_keep_the_number_of_each_class_and_are_uniform():
    labels = torch.tensor([2, 0, 1, 0, 1, 2, 0, 0, 5, 1])
    current = torch.tensor([1, 0, 1, 1, 0, 0, 1, 0, 0, 0], dtype=torch.bool)
    chosen = monitor.permutations(labels, current, 4000, data.generator("uniform"))
    for label in (0, 1, 2, 5):
        assert (chosen[:, labels == label].sum(1) == current[labels == label].sum()).all()
    shares = chosen.mean(0)
    expected = torch.tensor([{0: 2 / 4, 1: 1 / 3, 2: 1 / 2, 5: 0}[int(label)] for label in labels])
    assert (shares - expected).abs().max() < 4 * 0.5 / math.sqrt(4000)
    pairs = chosen[:, labels == 0][:, :2].sum(1)  # both of two: 1 of 6 choices
    assert abs((pairs == 2).float().mean() - 1 / 6) < 0.03


def test_holm_and_wilson_by_hand():
    assert monitor.holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "c": 0.06, "b": 0.06})
    assert monitor.holm({"a": 0.5, "b": 0.9}) == {"a": 1.0, "b": 1.0}
    assert monitor.wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert monitor.wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)


def test_a_kernel_is_scaled_by_the_part_that_is_fitted():
    """In one dimension: exp(-(difference / median distance)^2 / 2), whatever the unit."""
    fit, values = torch.tensor([[0.0], [1.0], [3.0]]).double(), torch.tensor([[5.0], [7.0]]).double()
    for unit in (1, 1000):
        kernel = monitor.gaussian_kernel(unit * fit, unit * values)
        assert float(kernel[0, 1]) == pytest.approx(math.exp(-0.5 * (2 / 2) ** 2))


def test_fitted_coordinates_do_not_depend_on_what_is_compared():
    values = normal(40, 50, 1)
    kernel = monitor.gaussian_kernel(normal(60, 50, 2), values)
    assert torch.allclose(monitor.gaussian_kernel(normal(60, 50, 2), values[:7]), kernel[:7, :7], atol=1e-6)


def look(seed, n=64, shift=0.0, copies=0):
    """p-values with 15 classes far apart, of which the current images have another mix than the golden ones."""
    random = torch.Generator().manual_seed(seed)
    labels = [torch.arange(count) % 4 for count in (60, 200)]
    labels.append(torch.multinomial(torch.tensor([8.0, 4, 1, 1]), n, True, generator=random))
    centres = 5 * normal(4, 6, 0)
    parts = [centres[part] + normal(len(part), 6, 10 * seed + i) for i, part in enumerate(labels)]
    parts[2] += shift
    parts[2][:copies] = parts[2][0] + 0.01 * normal(copies, 6, seed)
    fit, golden, current = (measured(*pair) for pair in zip(labels, parts, strict=True))
    return monitor.holm(monitor.compare(fit, golden, current, alpha=0.2)[0])


def test_false_alarms_are_as_rare_as_promised_although_the_mix_of_classes_changed():
    """Fresh golden and fresh current sets: at most the 99.9% quantile of a binomial of 200 at 0.05, and not never."""
    smallest = [min(look(seed).values()) for seed in range(200)]
    assert 0 < sum(p <= 0.05 for p in smallest) <= 20


def test_drift_and_copies_are_found():
    assert all(
        look(seed, shift=0.8)["features"] == pytest.approx(3 / 200) for seed in range(5)
    )  # the smallest there is
    for seed in range(5):
        found = look(seed, copies=8)
        assert found["duplicates"] <= 0.05 < found["statistics"]


def test_false_alarms_of_golden_sets_that_all_looks_share():
    """Five golden sets, four times as large as a look: none raises an alarm much more often than promised."""
    random = torch.Generator().manual_seed(0)
    for _ in range(5):
        fit, golden = (measured(torch.zeros(n, dtype=torch.int64), torch.randn(n, 6, generator=random).double())
                       for n in (60, 256))  # fmt: skip
        looks = [measured(torch.zeros(64, dtype=torch.int64), torch.randn(64, 6, generator=random).double())
                 for _ in range(60)]  # fmt: skip
        ps = [min(monitor.holm(monitor.compare(fit, golden, current, 0.2)[0]).values()) for current in looks]
        assert sum(p <= 0.05 for p in ps) <= 9  # 3 are expected


def test_images_that_are_all_the_same_are_no_drift():
    """A model that has collapsed does not differ from itself."""
    parts = [measured([0] * n, torch.ones(n, 6, dtype=torch.float64)) for n in (60, 256, 64)]
    ps, _ = monitor.compare(*parts, alpha=0.2)
    assert ps["features"] == ps["duplicates"] == 1


STATISTIC = {name: i for i, name in enumerate(features.STATISTICS)}


def statistic(name, images):
    return features.statistics_of(images)[:, STATISTIC[name]].tolist()


def flat(*colours, size=16):
    return torch.tensor(colours, dtype=torch.uint8)[:, :, None, None].expand(-1, -1, size, size).clone()


def test_statistics_of_images_that_one_can_work_out():
    images = flat([255, 0, 0], [0, 0, 0], [255, 255, 255], [60, 120, 180])
    assert features.statistics_of(images).isfinite().all() and len(features.STATISTICS) == 13
    assert statistic("brightness", images) == pytest.approx([1 / 3, 0, 1, 120 / 255])
    assert statistic("saturation", images) == pytest.approx([1, 0, 0, 120 / 255])
    assert statistic("redness", images) == pytest.approx([2 / 3, 0, 0, -60 / 255])
    assert statistic("blueness", images) == pytest.approx([-1 / 3, 0, 0, 60 / 255])
    assert statistic("black pixels", images) == [0, 1, 0, 0]
    assert statistic("white pixels", images) == [0, 0, 1, 0]
    assert statistic("contrast", images) == pytest.approx([0, 0, 0, 0], abs=1e-9)
    framed = flat([255, 255, 255])
    framed[:, :, 2:-2, 2:-2] = 0
    assert statistic("border brightness", framed) == [1] and statistic("brightness", framed) != [1]
    framed[:, 0, :2] = 0
    assert statistic("border saturation", framed) == pytest.approx([32 / 112])
    half = flat([0, 0, 0])
    half[..., :8] = 255
    assert statistic("asymmetry", half) == [1] and statistic("asymmetry", framed) == [0]
    assert statistic("JPEG blocks", half) == pytest.approx([1], abs=1e-4)
    assert statistic("JPEG blocks", half.roll(1, 3)[..., 2:]) == pytest.approx([0], abs=1e-4)
    noisy = torch.randint(256, (1, 3, 64, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    blurred = torch.nn.functional.avg_pool2d(noisy.float(), 3, 1, 1).byte()
    for name in ("sharpness", "fine grain"):
        assert statistic(name, blurred) < statistic(name, noisy)
    assert torch.equal(features.statistics_of(noisy[:, :1]), features.statistics_of(noisy[:, :1].expand(-1, 3, -1, -1)))
    many = torch.cat([noisy, blurred] * 40)
    assert torch.allclose(features.statistics_of(many)[-2:], features.statistics_of(many[:2]))


# ---- drift -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("watch") / "m", num_class_embeds=4, class_names=NAMES)


@pytest.fixture(scope="module")
def reference(folder, tmp_path_factory):
    """The golden set of a tiny model, by the command."""
    out = tmp_path_factory.mktemp("golden") / "reference"
    flags = ["--model", str(folder), "-n", str(COUNT), "--steps", "2", "--precision", "fp32", "--out", str(out)]
    assert monitor.main(["reference", *flags]) == 0
    return out


@pytest.fixture(scope="module")
def drawn(folder):
    """160 images as a server draws them, with their facts."""
    model = sample.load(folder)
    seeds, table = range(5000, 5160), ddpm.sampler_table(model.schedule, steps=2)
    labels = [seed % 3 for seed in seeds]
    pixels = sample.draw(model, seeds, table, labels, batch_size=40)
    request = sample.DrawRequest(1, None, None, 1.0, "ipndm", 2, None, 0.0)
    facts = request.facts(model, 2)
    return [
        (image, facts | {"seed": seed, "class": NAMES[label]})
        for image, seed, label in zip(pixels, seeds, labels, strict=True)
    ]


def serve(folder, images, age=3600.0) -> ServedImages:
    """Saves images as the server does, one a second, the last one `age` seconds ago."""
    store = ServedImages(folder, 10**9)
    begin = time.time() - age - len(images)
    for i, (pixels, facts) in enumerate(images):
        errors, _ = store.save(f"r{i:04}", [(pixels, {**facts, "time": begin + i})])
        assert not errors
    return store


def darker(images):
    return [((pixels.float() * 0.8).byte(), facts) for pixels, facts in images]


@pytest.fixture
def judged(reference, tmp_path, monkeypatch, capsys):
    """judged(folder, *flags): runs `drift`. Returns exit status, document and what was printed."""
    monkeypatch.chdir(tmp_path)

    def run(images, *flags, golden=reference, n=160):
        Path("drift.json").unlink(missing_ok=True)
        flags = ["--reference", str(golden), "-n", str(n), "--json", "drift.json", *map(str, flags)]
        status = monitor.main(["drift", str(images), *flags])
        printed = "".join(capsys.readouterr())
        document = json.loads(Path("drift.json").read_text()) if Path("drift.json").exists() else None
        return status, document, printed

    return run


def table(document, title) -> dict:
    """Rows of a table of a report by their first cells."""
    (found,) = [table for table in document["tables"] if table["title"].startswith(title)]
    return {tuple(row[:-2]): row[-2:] for row in found["rows"]}


def test_a_golden_set_says_what_made_it(reference, folder):
    kept = json.loads((reference / "reference.json").read_text())
    model = sample.read_model(folder)
    assert kept["facts"]["model"] == model.hash and kept["facts"]["steps"] == 2
    assert kept["classes"] == list(NAMES) and kept["features"] == monitor.FEATURES_HASH
    golden = monitor.read_golden(str(reference), None).images
    assert len(golden.labels) == COUNT and sorted(golden.labels.bincount().tolist()) == [266, 267, 267]
    table = ddpm.sampler_table(model.schedule, steps=2)
    seed = monitor.GOLDEN_SEED + 5
    again = sample.draw(sample.load(folder), [seed], table, [seed % 3])
    assert golden.names[5] == f"seed {seed}" and (again.int() - golden.pixels[5:6]).abs().max() <= 1
    assert data.picture_size(reference / "grid.png") == (8 * 18 + 2, 8 * 18 + 2)


def test_images_of_the_same_model_are_in_control(judged, drawn, tmp_path):
    store = serve(tmp_path / "served", drawn)
    for vote in ("up", "up", "down"):
        store.save_vote({"image": "x", "vote": vote, "model": "abc", "time": str(time.time())})
    status, document, printed = judged("served")
    assert (
        status == 0
        and printed.startswith("In control: no test finds a difference between 160 images")
        and not document["alarm"]
    )
    assert document["verdict"] in printed and document["p"] > 0.01
    assert table(document, "Votes") == {("abc", 3): ["66.7%", "20.8% to 93.9%"]}
    page = Path("drift.html").read_text()
    inside = re.search(r'<script type="application/json" id="document">(.*?)</script>', page, re.DOTALL)[1]
    assert json.loads(inside) == document and "://" not in page.replace("http://www.w3.org/2000/svg", "")
    for grid in document["pictures"]:
        assert len(grid["items"]) == 8
    source = document["pictures"][0]["items"][0]
    png = base64.b64decode(source["source"].removeprefix("data:image/png;base64,"))
    assert png == (tmp_path / "served" / source["caption"]).read_bytes() or len(png) < 2000


def test_what_is_fitted_is_not_compared(judged, drawn, tmp_path, monkeypatch):
    """Otherwise a nominal 5% of false alarms becomes 13% and more."""
    serve(tmp_path / "served", drawn[:64])
    compare, parts = monitor.compare, []
    monkeypatch.setattr(monitor, "compare", lambda *sets: parts.append(sets[:2]) or compare(*sets))
    judged("served")
    fit, compared = ({*part.names} for part in parts[0])
    assert (len(fit), len(compared), len(fit & compared)) == (COUNT // 5, COUNT - COUNT // 5, 0)


def test_drift_is_an_alarm_that_says_what_changed(judged, drawn, tmp_path):
    serve(tmp_path / "served", darker(drawn))
    status, document, printed = judged("served")
    assert status == 1 and document["alarm"] and document["p"] < 0.001
    assert printed.startswith("Drift: 160 images differ from the golden set in features, statistics")
    before, now, change = next(row[1:] for row in document["tables"][1]["rows"] if row[0] == "brightness")
    assert float(now) == pytest.approx(0.8 * float(before), rel=0.02) and float(change) < 0
    assert "brightness" in printed


def test_a_request_mix_that_changed_is_news_and_no_drift(judged, drawn, tmp_path):
    """First all classes, then one class nearly alone, beside images with other settings and of another model."""
    first = [pair for pair in drawn if pair[1]["class"] == NAMES[0]]
    rest = [pair for pair in drawn if pair[1]["class"] != NAMES[0]]
    other = [(pixels, facts | {"steps": 5}) for pixels, facts in darker(rest[:20])]
    other += [(pixels, facts | {"model": "0" * 64}) for pixels, facts in darker(rest[:20])]
    serve(tmp_path / "served", [*rest, *other, *rest[:20], *first])
    status, document, printed = judged("served", n=70)
    assert status == 0 and "70 images" in printed
    asked = table(document, "Requests")
    assert asked["class", NAMES[0]] == [0, len(first)] and asked["class", NAMES[1]][0] > asked["class", NAMES[1]][1]
    assert asked["steps", "5"] == [20, 0] and sum(asked["model", "0" * 40]) == 20
    status, _, printed = judged("served")
    assert status == 0 and "160 images" in printed  # a seed counts once


def test_too_few_images_are_not_judged(judged, drawn, tmp_path):
    serve(tmp_path / "served", drawn[:63])
    status, document, printed = judged("served")
    assert status == 2 and document is None
    assert "a test needs 64 images on each side; 63 have the settings and classes of the golden set" in printed


def test_damaged_images_are_an_alarm_of_their_own(judged, drawn, tmp_path):
    store = serve(tmp_path / "served", drawn[:120])
    files = [file for day in store.days() for file, _ in store.records(day)]
    files[0].write_bytes(b"no picture")
    assert judged("served")[0] == 0  # 1 of 120
    data.write_png(files[1], data.grid(drawn[1][0].repeat(1, 2, 2)[None], padding=0))
    status, document, printed = judged("served")
    assert status == 1 and "Damaged: 2 of 120 images cannot be read or have another size." in printed
    assert document["p"] > 0.01
    for file in files[:60]:
        file.write_bytes(b"no picture")
    status, document, printed = judged("served")
    assert status == 1 and "Damaged: 60 of 120" in printed and "p" not in document


def test_links_in_the_folder_are_not_followed(judged, drawn, tmp_path):
    store = serve(tmp_path / "served", drawn)
    files = [file for day in store.days() for file, _ in store.records(day)]
    secret = torch.full((3, 16, 16), 7, dtype=torch.uint8)
    data.write_png(tmp_path / "secret.png", data.grid(secret[None], padding=0))
    for file in files[:2]:
        file.unlink()
        file.symlink_to(tmp_path / "secret.png")
    status, document, printed = judged("served")
    assert status == 1 and "Damaged: 2 of 160" in printed
    shown = {item["caption"] for grid in document["pictures"] for item in grid["items"]}
    assert not shown & {f"{file.parent.name}/{file.name}" for file in files[:2]}


def test_a_folder_is_judged_while_a_server_writes_it(judged, drawn, tmp_path):
    store = serve(tmp_path / "served", drawn[:100])
    done, failed = threading.Event(), []

    def write():
        i = 0
        while not done.is_set():
            pixels, facts = drawn[100 + i % 60]
            failed.extend(store.save(f"w{i}", [(pixels, facts)])[0])
            if i > 10:
                (store.folder / time.strftime("%Y-%m-%d", time.gmtime()) / f"w{i - 10}-0.png").unlink()
            i += 1

    writer = threading.Thread(target=write)
    writer.start()
    try:
        statuses = [judged("served", n=64)[0] for _ in range(3)]
    finally:
        done.set()
        writer.join()
    assert statuses == [0, 0, 0] and not failed


def test_pictures_of_any_origin_are_compared(judged, drawn, tmp_path):
    """A folder with classes as subfolders against another; and a folder without classes against a golden set."""

    def write(name, images, classes=True):
        for pixels, facts in images:
            path = Path(name) / (facts["class"] if classes else "") / f"{facts['seed']}.png"
            data.write_png(path, data.grid(pixels[None], padding=0))

    write("a", drawn[::2])
    write("b", drawn[1::2])
    write("dark", darker(drawn[::2]))
    write("plain", drawn[:80], classes=False)
    status, document, printed = judged("a", "--size", 16, golden="b", n=64)
    assert status == 0 and document["title"] == "a against b"
    assert judged("dark", "--size", 16, golden="b")[0] == 1
    assert judged("plain")[0] == 0
    assert judged("plain", "--size", 16, golden="a")[0] == 0
    few, _, printed = judged("a", golden=str(tmp_path / "nowhere"))
    assert few == 2 and "nowhere" in printed
    few, _, printed = judged("a", golden="reference")
    assert few == 2 and "there is no such golden set; draw one with `monitor.py reference`" in printed


def test_a_damaged_or_foreign_reference_is_refused(judged, reference, drawn, tmp_path, capsys):
    serve(tmp_path / "served", drawn)
    copy = tmp_path / "copy"
    shutil.copytree(reference, copy)
    content = bytearray((copy / "images.npz").read_bytes())
    content[-100] ^= 1
    (copy / "images.npz").write_bytes(content)
    status, _, printed = judged("served", golden=copy)
    assert status == 2 and "is damaged, or from another version; delete" in printed
    shutil.copy(reference / "images.npz", copy)
    kept = json.loads((copy / "reference.json").read_text())
    (copy / "reference.json").write_text(json.dumps(kept | {"features": "0" * 64}))
    assert judged("served", golden=copy)[0] == 2
    assert monitor.main(["reference", "--out", str(reference)]) == 2
    assert "already has a golden set; choose another folder" in capsys.readouterr().err


def test_what_the_golden_set_cannot_judge_is_refused(judged, drawn, tmp_path):
    """Another model, and a golden set that is too small for the looks that share it."""
    serve(tmp_path / "served", [(pixels, facts | {"model": "0" * 64}) for pixels, facts in drawn])
    status, _, printed = judged("served")
    assert status == 2 and "each side; 0 have the settings and classes of the golden set" in printed
    status, _, printed = judged("served", n=161)
    assert status == 2 and "-n 161 needs a golden set of at least 805 images" in printed


HOSTILE = [
    None,
    True,
    5,
    -1,
    1.5,
    10**400,
    math.nan,
    "x",
    "",
    [],
    {},
    [[]] * 9,
    "</script><img src=x onerror=alert(1)>",
]


def test_hostile_lines_of_the_log_break_nothing(judged, drawn, folder, tmp_path, capsys):
    """Every fact of a line in turn has every value; lines that are no objects; pictures that decoders fall over."""
    store = serve(tmp_path / "served", drawn[:100])
    (day,) = store.days()
    with open(next(day.glob("*.jsonl")), "a") as log:
        for key in [*drawn[0][1], "file", "request", "time", "vote"]:
            for value in HOSTILE:
                log.write(
                    json.dumps({"file": "r0000-0.png", "time": 5.0, "vote": "up", **drawn[0][1], key: value}) + "\n"
                )
        log.write("5\n[]\nnull\n" + "[" * 5000 + '\n{"time": 1' + "0" * 400 + "}\n")
    (day / "r0050-0.png").write_bytes(png_without_palette())
    status, document, printed = judged("served", n=100)
    assert status == 0 and document["p"] > 0.01, printed
    ServedImages(tmp_path / "served", 10**8)  # a server that starts
    assert monitor.main(["replay", "served", "--model", str(folder), "-n", "500"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "r0050-0.png is damaged" in " ".join(lines) and not any("Traceback" in line for line in lines)


def png_without_palette() -> bytes:
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 16, 16, 8, 3, 0, 0, 0)
    rows = zlib.compress(b"\0" * 17 * 16)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def test_a_failure_is_no_drift(judged, reference, monkeypatch):
    monkeypatch.setattr(monitor, "load_features", lambda: 1 / 0)
    status, _, printed = judged("anywhere")
    assert status == 3 and "ZeroDivisionError" in printed


# ---- replay ----------------------------------------------------------------------------------------------------------


def replay(subject, *flags) -> int:
    return monitor.main(["replay", str(subject), "-n", "12", *map(str, flags)])


def test_served_images_come_out_the_same(folder, drawn, tmp_path, capsys):
    store = serve(tmp_path / "served", drawn)
    assert replay(store.folder, "--model", folder) == 0
    assert capsys.readouterr().out.endswith("12 images drawn again, 0 differ; 0 images of other models were skipped\n")


def test_other_pixels_weights_and_damage_are_found(folder, drawn, tmp_path, capsys):
    other = make_model(tmp_path / "other", num_class_embeds=4, class_names=NAMES, layers_per_block=2)
    facts = [facts for _, facts in drawn]
    # What a server with these facts but other weights would have saved.
    wrong = sample.draw(sample.load(other), range(5000, 5003), ddpm.sampler_table(ddpm.Schedule(), steps=2), [0, 1, 2])
    images = [(pixels, facts[i]) for i, pixels in enumerate(wrong)]
    broken = facts[4] | {"steps": "many"}
    images += [drawn[3], (drawn[4][0], broken), (drawn[5][0], {"model": facts[5]["model"]}), drawn[6]]
    store = serve(tmp_path / "served", images)
    (day,) = store.days()
    (day / "r0006-0.png").write_bytes(b"no picture")
    assert replay(store.folder, "--model", folder) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("/")[-1].split()[0] for line in lines[1:-1]] == [f"r000{i}-0.png" for i in (0, 1, 2, 4, 5, 6)]
    assert "differs by" in lines[1] and "cannot be drawn again" in lines[4] and "is damaged" in lines[6]
    assert replay(store.folder, "--model", other) == 2
    assert "none of the 7 images in" in capsys.readouterr().err
    assert replay(tmp_path / "nowhere", "--model", folder) == 2


def test_a_server_draws_its_images_again(folder, tmp_path, capsys, monkeypatch):
    """What it served with a token, over HTTP; then a server with another model, one that refuses, and none."""
    token, saved = "a-long-token", tmp_path / "saved"
    monkeypatch.setenv("PAPILIO_TOKEN", token)
    options = {"tokens": (token.encode(),), "store": ServedImages(saved, 10**8)}
    with serving(folder, **options) as running:
        url = f"http://127.0.0.1:{running.port}"
        headers = {"Authorization": f"Bearer {token}"}
        for query in ("seed=7&n_images=3", "seed=9&class=cat&guidance=2&sampler=ddim&eta=0.5&spacing=leading"):
            monitor.fetch(f"{url}/generate_sample/?{query}&steps=3", headers=headers)
        deadline = time.monotonic() + 20
        while len(list(saved.rglob("*.png"))) < 4 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert replay(saved, "--url", url) == 0
        assert "4 images drawn again, 0 differ" in capsys.readouterr().out
        monkeypatch.setenv("PAPILIO_TOKEN", "another-token")
        assert replay(saved, "--url", url) == 3
        assert "gave no image (401); check that" in capsys.readouterr().err
        monkeypatch.setenv("PAPILIO_TOKEN", f"{token}\n")  # as files of secrets end
        assert replay(saved, "--url", url) == 0
        monkeypatch.setenv("PAPILIO_TOKEN", "SECRET \u20ac")
        assert replay(saved, "--url", url) == 3
        assert "SECRET" not in "".join(capsys.readouterr())
        (log,) = saved.glob("*/*.jsonl")
        log.write_text(
            log.read_text() + json.dumps(json.loads(log.read_text().splitlines()[0]) | {"steps": "many"}) + "\n"
        )
        monkeypatch.setenv("PAPILIO_TOKEN", token)
        assert replay(saved, "--url", url, "-n", "100") == 1
        assert "cannot be drawn again: the server rejects its settings" in capsys.readouterr().out
    other = make_model(tmp_path / "other", num_class_embeds=4, class_names=NAMES, layers_per_block=2)
    monkeypatch.setenv("PAPILIO_TOKEN", "another-token")
    with serving(other, tokens=(b"another-token",)) as running:
        assert replay(saved, "--url", f"http://127.0.0.1:{running.port}/") == 1
        assert capsys.readouterr().out.count("was made by model") >= 4
    assert replay(saved, "--url", url) == 3


# ---- watch -----------------------------------------------------------------------------------------------------------


class Hook(http.server.BaseHTTPRequestHandler):
    """Keeps the messages that it takes, and answers with the next status of `answers`, at the end 200."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        status = self.server.answers.pop(0) if self.server.answers else 200
        if status == 200:
            assert self.headers["Content-Type"] == "application/json"
            self.server.taken.append(json.loads(body)["text"])
        self.send_response(status)
        if status == 302:
            self.send_header("Location", f"http://127.0.0.1:{self.server.server_port}/elsewhere")
        self.end_headers()

    def do_GET(self):
        self.server.taken.append("followed a redirect")

    def log_message(self, *_):
        pass


@pytest.fixture
def hook(monkeypatch):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hook)
    server.taken, server.answers = [], []
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setattr(monitor.time, "sleep", lambda seconds: None)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def watch(reference, hook, tmp_path, capsys):
    """watch(): one look, in a process of its own as far as its state goes. Returns status, new messages and output."""

    def run(*flags):
        before = len(hook.taken)
        address = f"http://127.0.0.1:{hook.server_port}/services/T0/SECRET"
        flags = [
            "-n",
            "64",
            "--alpha",
            "0.01",
            "--every",
            "0",
            "--webhook",
            address,
            "--out",
            str(tmp_path / "watch"),
            *flags,
        ]
        status = monitor.main(["watch", str(tmp_path / "served"), "--reference", str(reference), *flags])
        printed = "".join(capsys.readouterr())
        assert "SECRET" not in printed
        kept = [file for file in (tmp_path / "watch").iterdir() if "SECRET" in file.read_text(errors="replace")]
        assert not kept
        return status, hook.taken[before:], printed

    return run


def add(tmp_path, images, name, age=3600.0):
    store = ServedImages(tmp_path / "served", 10**9)
    for i, (pixels, facts) in enumerate(images):
        store.save(f"{name}{i}", [(pixels, {**facts, "time": time.time() - age + i / 1000})])


def fresh(drawn, first):
    """The same images under other seeds, so that they count as new ones."""
    return [(pixels, facts | {"seed": first + i}) for i, (pixels, facts) in enumerate(drawn)]


def test_an_episode_has_one_message_and_one_recovery(watch, drawn, tmp_path):
    """Each look is a restart in mid-episode: the state is all that one look leaves to the next."""
    (tmp_path / "served").mkdir()
    assert watch()[:2] == (0, [])  # nothing yet
    messages = []
    looks = [
        drawn[:64],
        darker(drawn[:64]),
        darker(drawn[64:128]),
        drawn[:64],
        drawn[64:128],
        drawn[:64],
        drawn[64:128],
    ]
    statuses = []
    for i, images in enumerate(looks):
        add(tmp_path, fresh(images, 1000 * i), f"look{i}-", age=7000 - 100 * i)
        status, new, _ = watch()
        statuses.append(status)
        messages += [(i, text) for text in new]
    assert statuses == [0, 1, 1, 1, 1, 0, 0]
    assert [i for i, _ in messages] == [1, 5]
    assert (
        messages[0][1].startswith("Drift: 64 images differ")
        and messages[1][1] == "Recovered: the drift alarm has ended."
    )
    state = json.loads((tmp_path / "watch/state.json").read_text())
    assert state["tests"] == 7 and len(state["history"]) == 7 and not state["unsent"]
    assert len(list((tmp_path / "watch").glob("alarm-*.html"))) in (1, 2) and (tmp_path / "watch/report.html").exists()
    assert watch()[0] == 0  # no image is used twice
    assert json.loads((tmp_path / "watch/state.json").read_text())["tests"] == 7
    metrics = (tmp_path / "watch/papilio.prom").read_text()
    assert 'papilio_watch_alarm{kind="drift"} 0\n' in metrics and "papilio_watch_tests_total 7\n" in metrics
    assert (
        "# TYPE papilio_watch_timestamp_seconds gauge\n" in metrics and "papilio_watch_timestamp_seconds 1" in metrics
    )


def test_a_message_is_sent_until_it_is_taken(watch, hook, drawn, tmp_path):
    add(tmp_path, darker(drawn[:64]), "dark")
    hook.answers += [500, 302, 404]
    status, messages, printed = watch()
    assert status == 1 and messages == [] and printed.count("the webhook did not accept a message (") == 3
    assert "papilio_watch_unsent_messages 1\n" in (tmp_path / "watch/papilio.prom").read_text()
    hook.answers += [503]
    status, messages, _ = watch()  # another process
    assert status == 1 and len(messages) == 1 and messages[0].startswith("Drift")
    assert watch()[1] == []
    assert "followed a redirect" not in hook.taken


def test_a_message_survives_a_process_that_is_killed_while_it_sends(watch, drawn, tmp_path, monkeypatch):
    add(tmp_path, darker(drawn[:64]), "dark")
    with monkeypatch.context() as patch:
        patch.setattr(monitor, "send", lambda *_: sys.exit(9))
        assert status_of(watch) == 9
    assert len(json.loads((tmp_path / "watch/state.json").read_text())["unsent"]) == 1
    status, messages, _ = watch()
    assert status == 1 and len(messages) == 1 and messages[0].startswith("Drift")


def test_images_that_are_too_young_wait(watch, drawn, tmp_path):
    add(tmp_path, darker(drawn[:64]), "young", age=20)
    assert watch()[:2] == (0, [])
    assert json.loads((tmp_path / "watch/state.json").read_text())["tests"] == 0


def test_silence_and_damage_are_alarms(watch, drawn, tmp_path):
    store = ServedImages(tmp_path / "served", 10**9)
    add(tmp_path, drawn[:20], "old", age=2 * 3600)
    status, messages, _ = watch("--stale", "1")
    assert status == 1 and messages == [f"Stale: no image was saved in {tmp_path / 'served'} for 1 h."]
    add(tmp_path, drawn[20:100], "new", age=600)
    (day,) = store.days()
    for i in (60, 70, 79):
        (day / f"new{i}-0.png").write_bytes(b"no picture")
    status, messages, _ = watch("--stale", "1")
    assert status == 1 and messages == [
        "Recovered: the stale alarm has ended.",
        "Damaged: 3 of 67 images cannot be read or have another size.",
    ]


def test_another_model_is_an_alarm(watch, drawn, tmp_path):
    add(tmp_path, drawn[:10], "before")
    add(tmp_path, [(pixels, facts | {"model": "0" * 64}) for pixels, facts in drawn[:20]], "swapped", age=600)
    status, messages, _ = watch()
    assert status == 1 and len(messages) == 1 and messages[0].startswith("Model: images were made by 000000000000, and")
    add(tmp_path, drawn[:64], "back", age=100)
    status, messages, _ = watch()
    assert status == 0 and messages == ["Recovered: the model alarm has ended."]


def test_a_look_that_cannot_be_judged_does_not_end_the_watch(watch, reference, drawn, tmp_path, monkeypatch):
    """Deleted images, a full disk, and a clock that was wrong."""
    add(tmp_path, darker(drawn[:64]), "dark")
    with monkeypatch.context() as patch:
        patch.setattr(monitor, "write_report", lambda *_: (_ for _ in ()).throw(data.InputError("no space left")))
        status, messages, printed = watch()
    assert status == 1 and messages[0].startswith("Drift") and "error: no space left" in printed
    state = json.loads((tmp_path / "watch/state.json").read_text())
    (tmp_path / "watch/state.json").write_text(json.dumps(state | {"last": time.time() + 1e6}))
    watch()
    assert json.loads((tmp_path / "watch/state.json").read_text())["last"] <= time.time()
    (tmp_path / "watch/state.json").write_text(json.dumps(state | {"unsent": None}))
    status, _, printed = watch()
    assert status == 2 and "state.json is damaged, or belongs to another golden set" in printed


def test_a_wrong_address_in_the_environment_is_refused(reference, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PAPILIO_WEBHOOK", "file:///etc/SECRET")
    flags = ["--reference", str(reference), "-n", "64", "--every", "0", "--out", str(tmp_path)]
    assert monitor.main(["watch", str(tmp_path), *flags, "-n", "161"]) == 2
    assert "-n 161 needs a golden set of at least 805 images" in capsys.readouterr().err
    assert monitor.main(["watch", str(tmp_path), *flags]) == 2
    error = capsys.readouterr().err
    assert "$PAPILIO_WEBHOOK: not a web address; give one like https://host/path" in error and "SECRET" not in error
    monkeypatch.delenv("PAPILIO_WEBHOOK")
    assert monitor.main(["watch", str(tmp_path / "nowhere"), *flags]) == 2
    assert "name the folder that `server.py --save` writes" in capsys.readouterr().err


def test_it_looks_again_and_again(watch, reference, drawn, tmp_path, monkeypatch):
    """With --every it goes on until it is stopped; SIGTERM ends it with exit status 0."""
    pauses = []

    def sleep(seconds):
        pauses.append(seconds)
        if len(pauses) == 3:
            monitor.signal.raise_signal(monitor.signal.SIGTERM)

    monkeypatch.setattr(monitor.time, "sleep", sleep)
    add(tmp_path, drawn[:64], "first")
    flags = ["--reference", str(reference), "-n", "64", "--every", "7", "--out", str(tmp_path / "watch")]
    assert status_of(monitor.main, ["watch", str(tmp_path / "served"), *flags]) == 0
    assert pauses == [7, 7, 7] and json.loads((tmp_path / "watch/state.json").read_text())["tests"] == 1
    other = ["--reference", str(reference), "-n", "64", "--every", "0", "--out", str(tmp_path / "watch")]
    state = json.loads((tmp_path / "watch/state.json").read_text())
    (tmp_path / "watch/state.json").write_text(json.dumps(state | {"golden": {}}))
    assert monitor.main(["watch", str(tmp_path / "served"), *other]) == 2


@pytest.mark.parametrize("address", ["hooks.slack.com/SECRET", "ftp://x/SECRET", "http:///SECRET", "http://[SECRET"])
def test_a_wrong_address_is_not_repeated(address, capsys):
    assert status_of(monitor.main, ["watch", "served", "--webhook", address]) == 2
    error = capsys.readouterr().err
    assert "--webhook: not a web address; give one like https://host/path" in error and "SECRET" not in error
