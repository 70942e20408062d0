"""monitor.py: images whose order of quality is known, and the command `quality`."""

import dataclasses
import hashlib
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import data
import monitor
import sample
from builtin import features, train_features
from tests.conftest import status_of
from tests.test_sample import make_model

# ---- images ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def synthetic():
    """Two sets of synthetic butterflies that share none, uint8 (600, 3, 32, 32)."""
    sets = (monitor.read_images(f"synthetic:1300:{seed}", (3, 32, 32)) for seed in (5, 6))
    return [torch.from_numpy(monitor.random_subset(images, 600).images) for images in sets]


@pytest.fixture(scope="module")
def network():
    """The features, worked out once for each batch of images."""
    network, known = monitor.load_features(), {}
    forward = network.forward

    def remembered(images):
        key = images.shape, hashlib.sha256(images.numpy().tobytes()).digest()
        if key not in known:
            known[key] = forward(images)
        return known[key]

    network.forward = remembered
    return network


def test_classes_by_chance():
    images = monitor.read_images("synthetic:620:5", (3, 64, 64))
    some = monitor.random_subset(images, 300)
    flat, all_flat = (torch.from_numpy(part.images).flatten(1).float() for part in (some, images))
    assert len(flat.unique(dim=0)) == len(some.labels) == 300
    assert 2 < np.bincount(some.labels, minlength=15).var() < 100  # 19 for a multinomial, 0 in turn
    assert np.array_equal(images.labels[torch.cdist(flat, all_flat).argmin(1)], some.labels)
    # In the whole set each family is as frequent as the others.
    assert len(monitor.random_subset(images, 900).images) == 310


def dataset(images, labels, classes=()):
    """A prepared dataset of these images, as far as monitor.py looks at it."""
    known = {"images": images, "labels": labels, "classes": classes, "source": "drawn-birds/set"}
    fields = {field.name: None for field in dataclasses.fields(data.Dataset)}
    return data.Dataset(**fields | known)


def test_other_images_are_taken_at_random():
    """A folder has its classes one after the other; the first of them are not like all."""
    images = dataset(np.arange(600).reshape(600, 1, 1, 1), np.arange(600) // 200, ("a", "b", "c"))
    some = monitor.random_subset(images, 300)
    assert len(some.images) == 300 and len(monitor.random_subset(images, 900).images) == 600
    assert all(60 < count < 140 for count in np.bincount(some.labels))


def test_frechet_distance_needs_more_images_than_features(network, synthetic):
    images, real = synthetic
    assert "fd" not in monitor.quality(network, images, real[:128])
    assert monitor.quality(network, images, real[:129])["fd"].value > 0


def test_features_are_the_pinned_ones(tmp_path, monkeypatch):
    network = monitor.load_features()
    assert not any(parameter.requires_grad for parameter in network.parameters())
    assert features.FEATURES.stat().st_size < 2_000_000
    other = tmp_path / "features.safetensors"
    content = bytearray(features.FEATURES.read_bytes())
    content[-1] ^= 1
    other.write_bytes(content)
    monkeypatch.setattr(features, "FEATURES", other)
    with pytest.raises(data.InputError, match="not the file of this version"):
        monitor.load_features()
    other.unlink()
    with pytest.raises(data.InputError, match="cannot read"):
        monitor.load_features()


def test_features_see_grey_as_colour_and_no_batch(synthetic):
    network, images = monitor.load_features(), synthetic[0][:6]
    grey = images[:, :1]
    assert torch.allclose(network(grey), network(grey.expand(-1, 3, -1, -1)))
    together = monitor.features_of(network, images)
    assert together.shape == (6, 128) and together.dtype == torch.float64
    assert torch.allclose(together[3], monitor.features_of(network, images[3:4])[0], atol=1e-4)


def test_folding_batch_norms_keeps_the_features():
    """The script that made the extractor: batches as it trains on, and the network that it saves."""
    torch.manual_seed(0)
    images = torch.from_numpy(data.prepare("synthetic:30:7", 64, channels=3).images)
    x, labels, done = train_features.batch(images, torch.arange(30) % 15, 3)
    assert x.shape == (train_features.BATCH, 3, 64, 64) and labels.shape == (train_features.BATCH,)
    assert 0.2 < (done > 0).float().mean() < 0.5 and (done > 0).any(0).all()
    network = train_features.Trained().train()
    for _ in range(2):  # norms learn means and variances
        network(x)
    h = data.to_float(x)
    network.eval()
    for conv, norm in zip(network.inner.convs, network.norms, strict=True):
        h = F.relu(norm(conv(h)))
    with torch.no_grad():
        assert torch.allclose(network.folded()(x), h.mean((2, 3)), atol=1e-4)


def test_features_are_scaled_to_synthetic_butterflies():
    images = torch.from_numpy(data.prepare("synthetic:300:7", 64, channels=3).images)
    features = monitor.features_of(monitor.load_features(), images)
    assert features.mean(0).abs().mean() < 0.1 and (features.std(0) - 1).abs().mean() < 0.15


def damaged(images, how, amount):
    x = data.to_float(images)
    random = torch.Generator().manual_seed(1)
    if how == "blur":
        weights = torch.exp(-(torch.arange(-3, 4) ** 2) / (2 * amount**2))
        kernel = (weights[:, None] * weights / weights.sum() ** 2).expand(3, 1, 7, 7)
        x = F.conv2d(F.pad(x, (3, 3, 3, 3), mode="replicate"), kernel, groups=3)
    elif how == "noise":
        x = x + amount * torch.randn(x.shape, generator=random)
    elif how == "blocks":
        x = F.interpolate(F.avg_pool2d(x, amount), scale_factor=amount)
    else:
        x = x + amount * torch.tensor([1.0, -0.3, -0.7])[:, None, None]
    return data.to_uint8(x)


@pytest.mark.parametrize(
    "how,amounts",
    [("blur", (0.6, 1.0, 1.6)), ("noise", (0.15, 0.25, 0.4)), ("cast", (0.08, 0.16, 0.3)), ("blocks", (2, 4, 8))],
)
def test_quality_ranks_damage_with_intervals_apart(network, synthetic, how, amounts):
    images, real = synthetic
    rows = [monitor.quality(network, images, real)]
    rows += [monitor.quality(network, damaged(images, how, amount), real) for amount in amounts]
    assert rows[0]["kid"].low <= 0 <= rows[0]["kid"].high  # unseen real ones cannot be told from real ones
    for better, worse in zip(rows, rows[1:], strict=False):
        assert better["kid"].high < worse["kid"].low and better["fd"].value < worse["fd"].value


# ---- the command -----------------------------------------------------------------------------------------------------


def quality_of(tmp_path, *arguments) -> tuple[dict, dict]:
    """Returns the facts of a report, and its metrics by set and measure."""
    out = tmp_path / "quality.json"
    where = ["--out", str(tmp_path / "quality.html"), "--json", str(out)]
    assert monitor.main(["quality", *map(str, arguments), *where]) == 0
    document = json.loads(out.read_text())
    return document["facts"], {(metric["of"], metric["measure"]): metric for metric in document["metrics"]}


def test_images_against_images(tmp_path, capsys):
    facts, found = quality_of(
        tmp_path, "synthetic:60:1", "--real", "synthetic:200:2", "--train", "synthetic:60:1", "--size", 32, "-n", 40
    )
    assert {(metric["n"], metric["real_n"]) for metric in found.values()} == {(30, 100)}
    assert len(found) == 2 * 5  # too few images for FD
    for measure in ("kid", "precision", "recall", "density", "coverage"):
        ours, theirs = (found[which, measure] for which in ("images", "training images"))
        assert ours | {"of": "training images"} == theirs  # they are the same images
        assert ours["low"] < ours["value"] < ours["high"]
    shown = capsys.readouterr().out
    assert "synthetic:60:1 against 100 images of synthetic:200:2" in shown
    kid = found["images", "kid"]
    assert f"KID           images           {kid['value']:.4f}" in shown
    assert facts["training images"] == "synthetic:60:1" and facts["source"] == "synthetic:60:1"
    page = (tmp_path / "quality.html").read_text()
    document = json.loads(page.split('id="document">')[1].split("</script>")[0])
    assert document["metrics"][0]["value"] == kid["value"] and document["tables"][0]["rows"]
    assert [len(part["items"]) for part in document["pictures"]] == [15, 15, 15]


def test_a_run_knows_its_data(trained, tmp_path, shapes):
    facts, found = quality_of(tmp_path, trained, "-n", 8)
    kid = found["images", "kid"]
    assert kid["real_n"] < 20 and facts["real images"] == str(shapes)
    assert facts["training fingerprint"] == facts["real fingerprint"]
    assert facts["model"] and found["training images", "kid"]["value"] < kid["value"]
    assert quality_of(tmp_path, trained, "-n", 8)[1] == found
    assert quality_of(tmp_path, trained, "-n", 8, "--seed", 50)[1]["images", "kid"] != kid


def test_a_run_on_synthetic_butterflies_is_compared_with_fresh_ones(fit, tmp_path, monkeypatch):
    monkeypatch.setattr(monitor, "UNSEEN", "synthetic:60:9")
    assert fit(tmp_path / "run", "--classes", data="synthetic:30", steps=2) == 0
    facts, found = quality_of(tmp_path, tmp_path / "run", "-n", 6)
    assert (facts["real images"], facts["training images"]) == ("synthetic:60:9", "synthetic:30")
    assert found["images", "kid"]["real_n"] == 30


def test_a_model_folder_needs_real_images(tmp_path, capsys):
    folder = make_model(tmp_path / "m", num_class_embeds=4, class_names=("ant", "bee", "cat"))
    assert monitor.main(["quality", str(folder)]) == 2
    assert "--real" in capsys.readouterr().err
    facts, found = quality_of(tmp_path, folder, "--real", "synthetic:20", "-n", 6)
    assert "training images" not in facts and {which for which, _ in found} == {"images"}


def test_the_model_in_the_box_is_compared_with_fresh_ones(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(monitor, "UNSEEN", "synthetic:60:9")
    monkeypatch.setattr(monitor.sample, "DEFAULT_MODEL", make_model(tmp_path / "box"))
    assert quality_of(tmp_path, "-n", 6)[0]["real images"] == "synthetic:60:9"


def test_classes_are_drawn_as_often_as_real_ones_have_them(tmp_path, monkeypatch):
    folder = make_model(tmp_path / "m", num_class_embeds=3, class_names=("circle", "square"))
    labels = []

    def draw(model, seeds, table, part, **options):
        labels.extend(part)
        return torch.zeros(len(part), *model.shape, dtype=torch.uint8)

    monkeypatch.setattr(sample, "draw", draw)
    model = monitor.sample.load(folder)
    sample.draw_like(model, 0, 400, dataset(None, np.array([0, 0, 0, 1]), ("circle", "square")))
    assert len(labels) == 400 and 260 < labels.count(0) < 340 and labels.count(1) == 400 - labels.count(0)
    labels.clear()
    sample.draw_like(model, 0, 400, dataset(None, None))
    assert 160 < labels.count(0) < 240 and labels.count(1) == 400 - labels.count(0)  # never "no class"


@pytest.mark.parametrize(
    "arguments,words",
    [
        (["nowhere"], "neither a folder"),
        (["synthetic:20:1"], "--real"),
        (["synthetic:20:1", "--real", "nowhere"], "nowhere"),
        (["synthetic:20:1", "--real", "synthetic:20:1", "-n", "2"], "from 3"),
        (["synthetic:4:1", "--real", "synthetic:20:1"], "at least 3 images"),
    ],
)
def test_bad_input_gets_a_sentence(arguments, words, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert status_of(monitor.main, ["quality", *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error and "Traceback" not in error


def test_a_run_whose_data_changed(trained, tmp_path, capsys):
    run = tmp_path / "run"
    (run / "model").mkdir(parents=True)
    for name in ("config.json", "metrics.jsonl"):
        (run / name).write_bytes((trained / name).read_bytes())
    for file in (trained / "model").rglob("*"):
        if file.is_file():
            target = run / "model" / file.relative_to(trained / "model")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())
    config = json.loads((run / "config.json").read_text())
    config["data"]["fingerprint"] = "0"
    (run / "config.json").write_text(json.dumps(config))
    assert monitor.main(["quality", str(run)]) == 2
    assert "has changed since" in capsys.readouterr().err


def test_size_is_a_models_own(trained, capsys):
    assert monitor.main(["quality", str(trained), "--size", "64"]) == 2
    assert "at their own size" in capsys.readouterr().err


def test_pictures_of_any_size_are_read(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(6):
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (40 + i, 50, 3), np.uint8)).save(folder / f"{i}.png")
    assert quality_of(tmp_path, folder, "--real", "synthetic:60")[1]["images", "kid"]["n"] == 6
