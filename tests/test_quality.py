"""builtin/quality.py and builtin/inception.py against pytorch-fid, torch-fidelity, closed forms and naive loops."""

import functools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pytorch_fid import fid_score
from pytorch_fid import inception as pytorch_fid
from torch import nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

import data
import monitor
from builtin import inception, quality
from builtin.features import features_of
from tests.conftest import status_of


def normal(n, d, seed, mean=0.0, std=1.0):
    return mean + std * torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- kernel and Frechet distance -------------------------------------------------------------------------------------


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
    value, low, high = quality.kid(x, y)
    assert value == pytest.approx(naive_kid(x, y), rel=1e-12)
    without_x = [naive_kid(torch.cat([x[:i], x[i + 1 :]]), y) for i in range(12)]
    without_y = [naive_kid(x, torch.cat([y[:i], y[i + 1 :]])) for i in range(9)]
    jackknife = sum((len(v) - 1) / len(v) * sum((u - np.mean(v)) ** 2 for u in v) for v in (without_x, without_y))
    assert (value - low, high - value) == pytest.approx([1.96 * math.sqrt(jackknife)] * 2, rel=1e-9)


def test_kid_does_not_depend_on_how_pairs_are_cut_into_parts():
    x, y = normal(2100, 3, 0), normal(1030, 3, 1)
    d, n, m = 3, 2100, 1030
    k = [(a @ b.T / d + 1) ** 3 for a, b in ((x, x), (y, y), (x, y))]
    whole = (k[0].sum() - k[0].trace()) / (n * (n - 1)) + (k[1].sum() - k[1].trace()) / (m * (m - 1)) - 2 * k[2].mean()
    assert quality.kid(x, y).value == pytest.approx(float(whole), rel=1e-9)


def test_kid_is_unbiased_and_its_interval_covers_the_truth():
    """For x ~ N(mean, 1) in one dimension, E (xy + 1)^3 follows from moments."""
    mean, n = 0.5, 400
    mx, my = (mean, 1 + mean**2, mean**3 + 3 * mean), (0.0, 1.0, 0.0)  # first three moments

    def expected(a, b):
        return a[2] * b[2] + 3 * a[1] * b[1] + 3 * a[0] * b[0] + 1

    truth = expected(mx, mx) + expected(my, my) - 2 * expected(mx, my)
    found = [quality.kid(normal(n, 1, 2 * s, mean), normal(n, 1, 2 * s + 1)) for s in range(300)]
    values = torch.tensor([estimate.value for estimate in found])
    assert abs(values.mean() - truth) < 4 * values.std() / math.sqrt(300)
    covered = sum(estimate.low < truth < estimate.high for estimate in found) / 300
    assert 0.9 < covered < 0.99
    same = torch.tensor([quality.kid(normal(80, 4, 2 * s), normal(80, 4, 2 * s + 1)).value for s in range(200)])
    assert abs(same.mean()) < 4 * same.std() / math.sqrt(200) and same.min() < 0 < same.max()


def test_kid_needs_images():
    with pytest.raises(ValueError, match="at least 3"):
        quality.kid(normal(2, 4, 0), normal(5, 4, 1))


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
    assert quality.frechet_distance(x, y).value == pytest.approx(closed, rel=1e-9)
    assert quality.frechet_distance(x, x).value == pytest.approx(0, abs=1e-9)


def test_frechet_distance_of_any_gaussians():
    x, y = normal(200, 6, 0) @ normal(6, 6, 1), normal(100, 6, 2) @ normal(6, 6, 3)
    product = (x.T.cov() @ y.T.cov()).numpy()
    cross = np.sqrt(np.abs(np.linalg.eigvals(product))).sum()
    expected = float((x.mean(0) - y.mean(0)).square().sum() + x.T.cov().trace() + y.T.cov().trace()) - 2 * cross
    assert quality.frechet_distance(x, y).value == pytest.approx(expected, rel=1e-9)
    assert quality.frechet_distance(y, x).value == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_of_flat_gaussians():
    """Covariances of ranks 3 and 5 in 12 dimensions, whose other eigenvalues are 0 but for rounding."""
    turn = torch.linalg.qr(normal(12, 12, 0)).Q
    zero, one = torch.zeros(12, dtype=torch.float64), torch.eye(12, dtype=torch.float64)
    roots = [torch.tensor([1.0, 2, 3] + [0] * 9).double(), torch.tensor([2.0, 2, 0, 1, 4] + [0] * 7).double()]
    x, y = (with_moments(40, zero, one, seed) * root @ turn.T + seed for seed, root in enumerate(roots))
    expected = 12 + float((roots[0] - roots[1]).square().sum())
    assert quality.frechet_distance(x, y).value == pytest.approx(expected, abs=1e-5)
    assert quality.frechet_distance(y, x).value == pytest.approx(expected, abs=1e-5)
    few = normal(4, 12, 2)
    assert quality.frechet_distance(few, few + 1).value == pytest.approx(12, abs=1e-5)


def test_kid_equals_that_of_torch_fidelity():
    x, y = normal(1100, 20, 0), normal(1100, 20, 1, 0.2)  # one subset of all images
    peer = kid_features_to_metric(x, y, kid_subsets=1, kid_subset_size=1100, verbose=False)
    assert quality.kid(x, y).value == pytest.approx(peer["kernel_inception_distance_mean"], rel=1e-9)


@pytest.mark.parametrize("dims,n", [(64, 400), (300, 320)])
def test_frechet_distance_equals_that_of_pytorch_fid(dims, n):
    mix = normal(dims, dims, 2, std=dims**-0.5)
    x, y = normal(n, dims, 0) @ mix, normal(n + 50, dims, 1, 0.1, 0.8)
    moments = [moment for part in (x, y) for moment in (part.mean(0).numpy(), np.cov(part.numpy(), rowvar=False))]
    expected = fid_score.calculate_frechet_distance(*moments)
    assert quality.frechet_distance(x, y).value == pytest.approx(expected, rel=1e-6)


def test_the_interval_of_the_frechet_distance_is_that_of_the_jackknife():
    x, y = normal(150, 3, 0) @ normal(3, 3, 1) + 1, normal(100, 3, 2)
    value, low, high = quality.frechet_distance(x, y)

    def jackknife(values):
        return (len(values) - 1) * np.var(values)

    variance = jackknife([quality.frechet_distance(torch.cat([x[:i], x[i + 1 :]]), y).value for i in range(150)])
    variance += jackknife([quality.frechet_distance(x, torch.cat([y[:i], y[i + 1 :]])).value for i in range(100)])
    assert (high - value) == pytest.approx(1.96 * math.sqrt(variance), rel=0.05)
    assert low == pytest.approx(2 * value - high)
    assert quality.frechet_distance(y, x) == pytest.approx((value, low, high))


# ---- neighbours ------------------------------------------------------------------------------------------------------


def test_precision_and_recall_equal_those_of_torch_fidelity():
    x, y = normal(1500, 5, 0, 0.3, 0.7), normal(1200, 5, 1)
    peer = prc_features_to_metric(x, y, prc_neighborhood=3, save_cpu_ram=False, verbose=False)
    found = quality.prdc(x, y)
    assert found["precision"].value == pytest.approx(peer["precision"], abs=1e-6)
    assert found["recall"].value == pytest.approx(peer["recall"], abs=1e-6)
    assert peer["precision"] > peer["recall"] + 0.1


def naive_prdc(x, y):
    """The definitions, image by image: precision, recall, density, coverage."""

    def radius(points, i, k):
        return sorted(math.dist(points[i], p) for j, p in enumerate(points) if j != i)[k - 1]

    near = [[math.dist(a, b) for b in y] for a in x]
    balls_x, balls_y, wide_y = (
        [radius(points, i, k) for i in range(len(points))] for points, k in ((x, 3), (y, 3), (y, 5))
    )
    n, m = range(len(x)), range(len(y))
    return [
        sum(any(near[i][j] <= balls_y[j] for j in m) for i in n) / len(n),
        sum(any(near[i][j] <= balls_x[i] for i in n) for j in m) / len(m),
        sum(near[i][j] <= wide_y[j] for i in n for j in m) / (5 * len(n)),
        sum(any(near[i][j] <= wide_y[j] for i in n) for j in m) / len(m),
    ]


def test_intervals_are_those_of_halves(monkeypatch):
    """Values and intervals from naive loops over the same halves, in blocks of which the last is shorter."""
    monkeypatch.setattr(quality, "BLOCK", 16)
    x, y = normal(41, 3, 0, 0.5, 0.8), normal(50, 3, 1)
    halves = [quality._halves(len(part), name) for part, name in ((x, "images"), (y, "real"))]
    for kept, count in zip(halves, (41, 50), strict=True):
        assert kept[:10].sum(1).tolist() == [count // 2] * 10 and kept[-1].all()
        assert torch.equal(kept[10:20], ~kept[:10]) and len(kept.unique(dim=0)) == 21
    values = np.array([naive_prdc(x[a].tolist(), y[b].tolist()) for a, b in zip(*halves, strict=True)])
    limits = (1, 1, math.inf, 1)
    for estimate, (*by_half, whole), most in zip(quality.prdc(x, y).values(), values.T, limits, strict=True):
        half_width = 2.093 * np.std(by_half)
        expected = whole, max(0, whole - half_width), min(most, whole + half_width)
        assert estimate == pytest.approx(expected, abs=1e-9)


def circle(count, part=1.0):
    """Points at equal distances on a circle, or on the first part of it."""
    angles = 2 * math.pi * torch.arange(round(part * count), dtype=torch.float64) / count
    return torch.stack([angles.cos(), angles.sin()], 1)


def test_neighbours_on_a_circle():
    """Of 100 points. The fifth neighbour is 3 places away and the third 2, so balls hold 7 and 5 of them."""
    y = circle(100)
    values = {name: estimate.value for name, estimate in quality.prdc(y, y).items()}
    assert values == pytest.approx({"precision": 1, "recall": 1, "density": 7 / 5, "coverage": 1})
    # Half of the circle: its ends' third neighbours are 3 places away, on one side; wide balls reach 3 places, too.
    values = {name: estimate.value for name, estimate in quality.prdc(circle(100, 0.5), y).items()}
    assert values == pytest.approx({"precision": 1, "recall": 0.56, "density": 7 / 5, "coverage": 0.56})
    values = {name: estimate for name, estimate in quality.prdc(circle(100) + 5, y).items()}
    assert set(values.values()) == {(0, 0, 0)}


def test_density_and_coverage_of_one_distribution():
    """Density is 1 on average. A ball has no image if its k nearest of both sets are all real (Naeem et al., eq. 9)."""
    n, m, k = 60, 40, 5
    found = [quality.prdc(normal(n, 3, 2 * s), normal(m, 3, 2 * s + 1)) for s in range(64)]
    empty = math.prod((m - 1 - i) / (n + m - 1 - i) for i in range(k))
    for name, expected in (("density", 1), ("coverage", 1 - empty)):
        values = torch.tensor([measured[name].value for measured in found])
        assert abs(values.mean() - expected) < 4 * values.std() / 8
        assert values.std() < 0.2


def test_a_tight_cluster_inside_a_wide_one():
    """All of it is precise, but it recalls little; the other way round, little is precise, and all recalled."""
    tight, wide = normal(300, 4, 0, std=0.2), normal(300, 4, 1)
    found, swapped = quality.prdc(tight, wide), quality.prdc(wide, tight)
    assert found["precision"].value > 0.99 and found["recall"].value < 0.1
    assert swapped["precision"].value < 0.1 and swapped["recall"].value > 0.99
    assert swapped["density"].value < 0.1 < 1 < found["density"].value


def test_intervals_are_as_wide_as_fresh_sets_differ():
    found = [quality.measures(normal(120, 6, 2 * s, 0.2, 0.9), normal(120, 6, 2 * s + 1)) for s in range(80)]
    for name in ("kid", "fd", "precision", "recall", "density", "coverage"):
        values = torch.tensor([measured[name].value for measured in found])
        half_width = torch.tensor([measured[name].value - measured[name].low for measured in found]).mean()
        assert 1 / 1.5 < half_width / (1.96 * values.std()) < 1.5, name


def test_measures_that_need_more_images_are_left_out():
    others = {"precision", "recall", "density", "coverage"}
    for count, expected in ((2, set()), (3, {"kid"}), (11, {"kid"}), (12, {"kid"} | others)):
        assert set(quality.measures(normal(40, 20, 0), normal(count, 20, 1))) == expected
    assert set(quality.measures(normal(21, 20, 0), normal(40, 20, 1))) == {"kid", "fd"} | others
    assert set(quality.measures(normal(3, 20, 0), normal(40, 20, 1), singular=True)) == {"kid", "fd"}


# ---- Inception score -------------------------------------------------------------------------------------------------


def test_inception_score_equals_that_of_torch_fidelity():
    logits = normal(107, 30, 0, std=3)
    peer = isc_features_to_metric(logits)
    found = quality.inception_score(logits)
    assert found.value == pytest.approx(peer["inception_score_mean"], rel=1e-9)
    half_width = 2.262 * peer["inception_score_std"] / math.sqrt(9)  # its deviation has 10 in the denominator
    assert found.high - found.value == pytest.approx(half_width, rel=1e-9)


def test_inception_score_of_sure_classes():
    """Each part has its ten classes equally often; then of logits that say nothing."""
    rows = np.random.RandomState(2020).permutation(200)
    classes = torch.empty(200, dtype=torch.int64)
    classes[rows] = torch.arange(200) % 10
    found = quality.inception_score(1000 * nn.functional.one_hot(classes, 10).double())
    assert found == pytest.approx((10, 10, 10))
    assert quality.inception_score(torch.zeros(50, 7).double()) == pytest.approx((1, 1, 1))


# ---- Inception -------------------------------------------------------------------------------------------------------


def pictures_like(count, seed, side=32):
    """Coloured noise with coarse and fine parts: uint8 (count, 3, side, side)."""
    random = torch.Generator().manual_seed(seed)
    coarse = nn.functional.interpolate(torch.randn(count, 3, 4, 4, generator=random), side, mode="bilinear")
    fine = torch.randn(count, 3, side, side, generator=random)
    return (128 + 50 * coarse + 15 * fine * torch.rand(count, 1, 1, 1, generator=random)).clamp(0, 255).byte()


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file of random weights whose batch norms know the statistics of some pictures, so that no layer is dead."""
    torch.manual_seed(0)
    network = inception.Inception()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
            module.momentum = None  # the mean over all batches
    with torch.no_grad():
        network.layers.fc.bias.uniform_(-1, 1)
        network.train()(pictures_like(6, 0))
    file = tmp_path_factory.mktemp("weights") / "random.pth"
    torch.save(network.layers.state_dict(), file)
    return file


@pytest.fixture(scope="module")
def network(weights):
    return inception.load_inception(weights)


@pytest.fixture
def peer(weights, monkeypatch):
    """pytorch-fid, which finds the random weights where it would download those of FID."""
    state = torch.load(weights, weights_only=True)
    monkeypatch.setattr(pytorch_fid, "load_state_dict_from_url", lambda *_, **__: state)


def fid_of_folders(images, folder, dims):
    """What pytorch-fid says of two sets of images that are written to PNG files."""
    for name, part in zip("xy", images, strict=True):
        (folder / name).mkdir()
        for i, pixels in enumerate(part):
            Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(folder / name / f"{i}.png")
    return fid_score.calculate_fid_given_paths([str(folder / name) for name in "xy"], 50, "cpu", dims, num_workers=0)


def check_fid(network, folder, count, dims):
    images = pictures_like(count, 1), pictures_like(count, 2).flip(1) // 2
    x, y = (features_of(functools.partial(network, dims=dims), part) for part in images)
    found, expected = quality.frechet_distance(x, y).value, fid_of_folders(images, folder, dims)
    print(f"{count} images, {dims} dimensions: {found:.6f}, pytorch-fid {expected:.6f}")
    assert found == pytest.approx(expected, rel=1e-3)


def test_fid_of_folders_equals_that_of_pytorch_fid(network, peer, tmp_path):
    check_fid(network, tmp_path, 66, 64)


@pytest.mark.soak
def test_fid_at_2048_dimensions_equals_that_of_pytorch_fid(network, peer, tmp_path):
    torch.set_num_threads(2)
    check_fid(network, tmp_path, 2060, 2048)


def test_features_equal_those_of_pytorch_fid(network, peer):
    theirs = pytorch_fid.InceptionV3([0, 1, 2, 3]).eval()
    for count, side in ((2, 32), (1, 310)):
        images = pictures_like(count, 3, side)
        with torch.no_grad():
            maps = theirs(images / 255)
        for dims, expected in zip((64, 192, 768, 2048), (part.mean((2, 3)) for part in maps), strict=True):
            found = network(images, dims)
            assert found.shape == (count, dims) and (found - expected).abs().max() < 1e-4 * expected.abs().max()
            assert expected.std() > 0.05 * expected.abs().max()
    grey = pictures_like(1, 3)[:, :1]
    assert torch.allclose(network(grey, 64), network(grey.expand(-1, 3, -1, -1), 64))
    with pytest.raises(ValueError, match="not 100"):
        network(grey, 100)


def test_logits_of_the_inception_score_equal_those_of_torch_fidelity(network, weights):
    """Without the bias, which would change the score."""
    theirs = FeatureExtractorInceptionV3("", ["2048", "logits_unbiased", "logits"], str(weights))
    features, expected, biased = theirs(pictures_like(2, 4))
    assert torch.allclose(network.logits(features.double()).float(), expected, atol=1e-4)
    assert not torch.allclose(biased, expected, atol=1e-2)


def test_only_the_known_file_gives_fid():
    network = inception.Inception(inception.HASH)
    network.layers.fc = nn.Linear(8, 20).requires_grad_(False)
    x, y = normal(15, 8, 0), normal(14, 8, 1)
    assert network.measures(x, y)["fid"] == quality.frechet_distance(x, y)
    assert list(network.measures(x[:5], y[:5])) == ["fid", "kid"]  # fewer than dimensions; too few for the others
    network.weights = "abcdef12"
    found = network.measures(x, y)
    assert set(found) == {"fd", "kid", "is", "precision", "recall", "density", "coverage"}


def test_fid_of_few_images_is_said_to_be_biased():
    found = {"images": {"fid": quality.Estimate(1.234, 1, 2)}}
    for n, m, label in ((10_000, 10_000, "FID"), (9_999, 10_000, "FID (biased: N below 10,000)")):
        (row,) = quality.as_rows(quality.as_records("Inception", found, {"images": n}, m))
        assert row == ["Inception", label, "", "images", "1.23", "1.00 to 2.00", f"{n:,}", f"{m:,}"]


def test_weights_come_from_torchs_cache(weights, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(data.InputError) as refused:
        inception.load_inception(None)
    assert str(tmp_path / "checkpoints" / inception.NAME) in str(refused.value) and inception.RELEASE in str(
        refused.value
    )
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth").symlink_to(weights)  # torch-fidelity's
    assert inception.load_inception(None).weights != inception.HASH  # whatever its name says


def test_damaged_weights_get_a_sentence(tmp_path, capsys):
    bad = {"empty": b"", "text": b"hello", "cut": None, "others": None, "list": None}
    torch.save({"a": torch.zeros(2)}, tmp_path / "others")
    torch.save([1, 2], tmp_path / "list")
    (tmp_path / "cut").write_bytes((tmp_path / "others").read_bytes()[:300])
    images = ["quality", "synthetic:30:1", "--real", "synthetic:30:2", "--inception"]
    for name, content in bad.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        assert status_of(monitor.main, [*images, str(tmp_path / name)]) == 2
        error = capsys.readouterr().err
        assert f"error: {tmp_path / name} does not hold the weights" in error and error.count("\n") == 1
    assert status_of(monitor.main, [*images, str(tmp_path / "missing.pth")]) == 2
    error = capsys.readouterr().err
    assert "missing.pth: No such file" in error and inception.RELEASE in error and error.count("\n") == 1


class Small(inception.Inception):
    """Features of 64 dimensions, which are fast."""

    def __init__(self, weights):
        super().__init__(weights)
        self.layers.fc = nn.Linear(64, 20)
        self.requires_grad_(False).eval()

    def forward(self, images):
        return super().forward(images, 64)


@pytest.mark.parametrize("weights,which", [("abcdef12", "auto"), (inception.HASH, "file.pth")])
def test_the_command_with_inception(weights, which, tmp_path, capsys, monkeypatch):
    """It says FID for the known weights only; for others "FD", and which weights."""
    monkeypatch.chdir(tmp_path)
    asked = []
    monkeypatch.setattr(monitor, "load_inception", lambda path: asked.append(path) or Small(weights))
    arguments = ["quality", "synthetic:32:1", "--real", "synthetic:32:2", "--size", "32", "--inception", which]
    assert monitor.main([*arguments, "--json", "quality.json"]) == 0
    assert asked == [None if which == "auto" else Path(which)]
    shown, page = capsys.readouterr().out, (tmp_path / "quality.html").read_text()
    found = json.loads((tmp_path / "quality.json").read_text())
    measured = {metric["measure"] for metric in found["metrics"] if metric["features"] == f"Inception {weights}"}
    distance = "fid" if weights == inception.HASH else "fd"
    assert measured == {distance, "is", "kid", "precision", "recall", "density", "coverage"}
    for text in (shown, page):
        assert f"Inception {weights}" in text and ("FID" in text) == (distance == "fid")
