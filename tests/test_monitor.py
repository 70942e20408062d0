"""monitor.py against naive formulas, closed forms, and images whose order of quality is known."""

import dataclasses
import hashlib
import json
import math

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


def normal(n, d, seed, mean=0.0, std=1.0):
    return mean + std * torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- statistics ------------------------------------------------------------------------------------------------------


def naive_kid(x, y):
    """MMD^2 as the definition has it: three sums over pairs of different images."""
    d = x.shape[1]

    def mean(a, b, same):
        values = [
            (float(p @ q) / d + 1) ** 3 for i, p in enumerate(a) for j, q in enumerate(b) if not (same and i == j)
        ]
        return sum(values) / len(values)

    return mean(x, x, True) + mean(y, y, True) - 2 * mean(x, y, False)


def test_kid_is_its_definition():
    x, y = normal(12, 5, 0), normal(9, 5, 1, 0.3)
    value, error = monitor.kid(x, y)
    assert value == pytest.approx(naive_kid(x, y), rel=1e-12)
    without_x = [naive_kid(torch.cat([x[:i], x[i + 1 :]]), y) for i in range(12)]
    without_y = [naive_kid(x, torch.cat([y[:i], y[i + 1 :]])) for i in range(9)]
    jackknife = sum((len(v) - 1) / len(v) * sum((u - np.mean(v)) ** 2 for u in v) for v in (without_x, without_y))
    assert error == pytest.approx(math.sqrt(jackknife), rel=1e-9)


def test_kid_does_not_depend_on_how_pairs_are_cut_into_parts():
    x, y = normal(2100, 3, 0), normal(1030, 3, 1)
    d, n, m = 3, 2100, 1030
    k = [(a @ b.T / d + 1) ** 3 for a, b in ((x, x), (y, y), (x, y))]
    whole = (k[0].sum() - k[0].trace()) / (n * (n - 1)) + (k[1].sum() - k[1].trace()) / (m * (m - 1)) - 2 * k[2].mean()
    assert monitor.kid(x, y)[0] == pytest.approx(float(whole), rel=1e-9)


def test_kid_is_unbiased_and_its_interval_covers_the_truth():
    """For x ~ N(mean, 1) in one dimension, E (xy + 1)^3 follows from moments."""
    mean, n = 0.5, 400
    mx, my = (mean, 1 + mean**2, mean**3 + 3 * mean), (0.0, 1.0, 0.0)  # first three moments

    def expected(a, b):
        return a[2] * b[2] + 3 * a[1] * b[1] + 3 * a[0] * b[0] + 1

    truth = expected(mx, mx) + expected(my, my) - 2 * expected(mx, my)
    found = [monitor.kid(normal(n, 1, 2 * s, mean), normal(n, 1, 2 * s + 1)) for s in range(300)]
    values = torch.tensor([value for value, _ in found])
    assert abs(values.mean() - truth) < 4 * values.std() / math.sqrt(300)
    covered = sum(abs(value - truth) < 1.96 * error for value, error in found) / 300
    assert 0.9 < covered < 0.99
    same = torch.tensor([monitor.kid(normal(80, 4, 2 * s), normal(80, 4, 2 * s + 1))[0] for s in range(200)])
    assert abs(same.mean()) < 4 * same.std() / math.sqrt(200) and same.min() < 0 < same.max()


def test_kid_needs_images():
    with pytest.raises(ValueError, match="at least 3"):
        monitor.kid(normal(2, 4, 0), normal(5, 4, 1))


def with_moments(n, mean, covariance, seed):
    """Samples whose mean and covariance are exactly these."""
    x = normal(n, len(mean), seed)
    x = (x - x.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(x.T.cov())).T
    return x @ torch.linalg.cholesky(covariance).T + mean


def test_frechet_distance_of_known_gaussians():
    zero = torch.zeros(4, dtype=torch.float64)
    a, b = torch.tensor([1.0, 2, 3, 4]).double(), torch.tensor([4.0, 3, 2, 1]).double()
    x, y = with_moments(50, zero, a.diag(), 0), with_moments(70, zero + 2, b.diag(), 1)
    closed = 16 + float((a.sqrt() - b.sqrt()).square().sum())  # commuting covariances
    assert monitor.frechet_distance(x, y) == pytest.approx(closed, rel=1e-9)
    assert monitor.frechet_distance(x, x) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_of_any_gaussians():
    x, y = normal(200, 6, 0) @ normal(6, 6, 1), normal(100, 6, 2) @ normal(6, 6, 3)
    product = (x.T.cov() @ y.T.cov()).numpy()
    cross = np.sqrt(np.abs(np.linalg.eigvals(product))).sum()
    expected = float((x.mean(0) - y.mean(0)).square().sum() + x.T.cov().trace() + y.T.cov().trace()) - 2 * cross
    assert monitor.frechet_distance(x, y) == pytest.approx(expected, rel=1e-9)
    assert monitor.frechet_distance(y, x) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_of_flat_gaussians():
    """Covariances of ranks 3 and 5 in 12 dimensions, whose other eigenvalues are 0 but for rounding."""
    turn = torch.linalg.qr(normal(12, 12, 0)).Q
    zero, one = torch.zeros(12, dtype=torch.float64), torch.eye(12, dtype=torch.float64)
    roots = [torch.tensor([1.0, 2, 3] + [0] * 9).double(), torch.tensor([2.0, 2, 0, 1, 4] + [0] * 7).double()]
    x, y = (with_moments(40, zero, one, seed) * root @ turn.T + seed for seed, root in enumerate(roots))
    expected = 12 + float((roots[0] - roots[1]).square().sum())
    assert monitor.frechet_distance(x, y) == pytest.approx(expected, abs=1e-5)
    assert monitor.frechet_distance(y, x) == pytest.approx(expected, abs=1e-5)
    few = normal(4, 12, 2)
    assert monitor.frechet_distance(few, few + 1) == pytest.approx(12, abs=1e-5)


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
    few = monitor.quality(network, images, real[:128])
    assert few.fd is None and "FD -" in str(few)
    assert monitor.quality(network, images, real[:129]).fd > 0


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
    assert rows[0].kid_low <= 0 <= rows[0].kid_high  # unseen real ones cannot be told from real ones
    for better, worse in zip(rows, rows[1:], strict=False):
        assert better.kid_high < worse.kid_low and better.fd < worse.fd


# ---- the command -----------------------------------------------------------------------------------------------------


def quality_of(tmp_path, *arguments) -> dict:
    out = tmp_path / "quality.json"
    assert monitor.main(["quality", *map(str, arguments), "--json", str(out)]) == 0
    return json.loads(out.read_text())


def test_images_against_images(tmp_path, capsys):
    found = quality_of(
        tmp_path, "synthetic:60:1", "--real", "synthetic:200:2", "--train", "synthetic:60:1", "--size", 32, "-n", 40
    )
    assert (found["images"]["images"], found["images"]["real"]) == (30, 100)
    shown = capsys.readouterr().out
    assert "synthetic:60:1 against 100 images of synthetic:200:2" in shown and "N 30" in shown


def test_a_run_knows_its_data(trained, tmp_path, shapes):
    found = quality_of(tmp_path, trained, "-n", 8)
    assert found["images"]["real"] < 20 and found["real"]["source"] == str(shapes)
    assert found["training"]["fingerprint"] == found["real"]["fingerprint"]
    assert found["made_by"]["model"] and found["training_images"]["kid"] < found["images"]["kid"]
    again = quality_of(tmp_path, trained, "-n", 8)
    assert again == found
    assert quality_of(tmp_path, trained, "-n", 8, "--seed", 50)["images"] != found["images"]


def test_a_run_on_synthetic_butterflies_is_compared_with_fresh_ones(fit, tmp_path, monkeypatch):
    monkeypatch.setattr(monitor, "UNSEEN", "synthetic:60:9")
    assert fit(tmp_path / "run", "--classes", data="synthetic:30", steps=2) == 0
    found = quality_of(tmp_path, tmp_path / "run", "-n", 6)
    assert (found["real"]["source"], found["training"]["source"]) == ("synthetic:60:9", "synthetic:30")
    assert found["images"]["real"] == 30


def test_a_model_folder_needs_real_images(tmp_path, capsys):
    folder = make_model(tmp_path / "m", num_class_embeds=4, class_names=("ant", "bee", "cat"))
    assert monitor.main(["quality", str(folder)]) == 2
    assert "--real" in capsys.readouterr().err
    found = quality_of(tmp_path, folder, "--real", "synthetic:20", "-n", 6)
    assert found["training"] is None


def test_the_model_in_the_box_is_compared_with_fresh_ones(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(monitor, "UNSEEN", "synthetic:60:9")
    monkeypatch.setattr(monitor.sample, "DEFAULT_MODEL", make_model(tmp_path / "box"))
    assert quality_of(tmp_path, "-n", 6)["real"]["source"] == "synthetic:60:9"


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
    assert "is not what it was for" in capsys.readouterr().err


def test_size_is_a_models_own(trained, capsys):
    assert monitor.main(["quality", str(trained), "--size", "64"]) == 2
    assert "at their own size" in capsys.readouterr().err


def test_pictures_of_any_size_are_read(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(6):
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (40 + i, 50, 3), np.uint8)).save(folder / f"{i}.png")
    assert quality_of(tmp_path, folder, "--real", "synthetic:60")["images"]["images"] == 6
