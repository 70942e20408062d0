"""builtin/copies.py and `monitor.py memorised` against planted copies, naive loops, scipy and fresh images."""

import base64
import io
import itertools
import json

import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from PIL import Image

import data
import monitor
import sample
import train
from builtin import butterflies, copies
from tests.conftest import status_of


def jpeg(images):
    """The images as JPEG of quality 50."""
    decoded = []
    for image in images:
        pixels = image.permute(1, 2, 0).numpy().squeeze()
        Image.fromarray(pixels).save(file := io.BytesIO(), "JPEG", quality=50)
        decoded.append(torch.from_numpy(np.array(Image.open(file))).reshape(*image.shape[1:], -1).permute(2, 0, 1))
    return torch.stack(decoded)


def blurred(images, sigma=0.7):
    weights = torch.exp(-(torch.arange(-3, 4) ** 2) / (2 * sigma**2))
    channels = images.shape[1]
    kernel = (weights[:, None] * weights / weights.sum() ** 2).expand(channels, 1, 7, 7)
    return F.conv2d(F.pad(images.float(), (3,) * 4, mode="replicate"), kernel, groups=channels).round().byte()


def moved(images, down, right):
    """The images shifted by at most 2 pixels; the border is continued."""
    padded = F.pad(images.float(), (2, 2, 2, 2), mode="replicate").byte()
    height, width = images.shape[2:]
    return padded[:, :, 2 - down : 2 - down + height, 2 - right : 2 - right + width]


def darker(images):
    return (0.7 * images.float()).byte()


KINDS = {
    "exact": lambda images: images,
    "flipped": lambda images: images.flip(-1),
    "JPEG": jpeg,
    "blurred": blurred,
    "moved right": lambda images: moved(images, 0, 2),
    "moved left": lambda images: moved(images, 0, -2),
    "moved up": lambda images: moved(images, -2, 0),
    "moved down": lambda images: moved(images, 2, 0),
    "moved by one and two": lambda images: moved(images, 1, -2),
    "darker": darker,
    "flipped and darker": lambda images: darker(images.flip(-1)),
    "moved and JPEG": lambda images: jpeg(moved(images, 2, 1)),
}


def synthetic(count, seed, size=32, channels=3):
    return torch.from_numpy(monitor.read_images(f"synthetic:{count}:{seed}", (channels, size, size)).images)


@pytest.fixture(scope="module")
def sets():
    """Fresh images of one distribution: 400 generated, 600 training and 300 held-out ones of 32 px."""
    images = synthetic(1300, 5)  # tests/test_monitor.py renders these too
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return images[order].split([400, 600, 300])


def planted(sets, share, kind):
    """The first images become copies of training images 7, 14, ..."""
    generated, training, _ = sets
    rows = torch.arange(7, 600, 7)[: round(share * len(generated))]
    return torch.cat([KINDS[kind](training[rows]), generated[len(rows) :]]), rows


# ---- planted copies --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_planted_copies_are_found(sets, kind):
    """5% raise the alarm. Four copies in 400 are named first, whether or not they are enough to prove anything."""
    images, rows = planted(sets, 0.2, kind)
    found = copies.nearest(images, sets[1])
    right = (found.index[: len(rows)] == rows) & found.near[: len(rows)]
    assert right.float().mean() >= 0.9
    plain = found.mirrored[: len(rows)].float().mean()  # a symmetrical image may be either
    assert plain >= 0.9 if "flipped" in kind else plain <= 0.1
    assert found.near[len(rows) :].float().mean() <= 0.02
    few = {*range(4), *range(len(rows), len(images))}  # 1% copies: the four, and the images that are none
    first = [i for i in found.distance.argsort().tolist() if i in few][:8]
    assert len({0, 1, 2, 3} & set(first)) >= 3 and found.near[:4].sum() >= 3
    images, rows = planted(sets, 0.05, kind)
    judged = copies.memorised(images, *sets[1:])
    assert judged.found and judged.p_copies < 1e-6
    assert 0.04 <= judged.share <= 0.07 and judged.null_share <= 0.02


def test_fresh_images_are_not_copies(sets):
    for part in (sets, (sets[2], sets[1], sets[0])):
        found = copies.memorised(*part)
        assert not found.found and found.share <= 0.02


@pytest.mark.parametrize("size,channels", [(16, 3), (32, 1), (48, 3), (64, 3), (128, 3)])
def test_copies_at_other_sizes_and_in_grey(size, channels):
    training = synthetic(120, 5, size, channels)
    rows = torch.arange(0, 120, 5)
    for kind in ("exact", "moved left", "moved by one and two", "flipped and darker"):
        found = copies.nearest(KINDS[kind](training[rows]), training)
        assert found.near.float().mean() >= 0.9 and (found.index == rows).float().mean() >= 0.95, kind
    others = copies.nearest(synthetic(60, 6, size, channels), training)
    assert others.near.float().mean() <= 0.15  # the 50 nearest are of many families, so that the limit is high


def test_an_image_that_the_training_set_has_many_times(sets):
    generated, training, held_out = sets
    often = torch.cat([training[:200], training[:3].repeat(80, 1, 1, 1), training[200:]])
    images = torch.cat([jpeg(training[:3].flip(-1)).repeat(10, 1, 1, 1), generated[30:]])
    found = copies.memorised(images, often, held_out)
    assert found.found and found.generated.near[:30].all() and found.null_share <= 0.02
    assert found.generated.index[:30].tolist() == [0, 1, 2] * 10  # the first of equal images
    plain = copies.memorised(images, training, held_out)
    assert (found.p_copies, found.p_nearer) == (plain.p_copies, plain.p_nearer)
    moved_rows = found.generated.index.where(found.generated.index < 200, found.generated.index - 240)
    assert moved_rows.equal(plain.generated.index)


# ---- no false alarms -------------------------------------------------------------------------------------------------


def test_fresh_images_raise_alarms_no_more_often_than_promised(sets):
    """40 choices of three sets. Both p-values are uniform or larger."""
    images, random = torch.cat(sets), torch.Generator().manual_seed(1)
    images = F.avg_pool2d(images.float(), 2).byte()
    found = []
    for _ in range(40):
        chosen = images[torch.randperm(len(images), generator=random)[:260]]
        found.append(copies.memorised(*chosen.split([60, 120, 80])))
    for alpha in (copies.ALPHA, 0.1, 0.3):
        for ps in ([f.p for f in found], [f.p_copies for f in found], [f.p_nearer for f in found]):
            alarms = sum(p <= alpha for p in ps)
            assert scipy.stats.binom.sf(alarms - 1, len(ps), alpha) > 1e-3, alpha
    assert min(f.p_nearer for f in found) < 0.1  # the test is not just silent
    assert np.mean([f.nearer for f in found]) == pytest.approx(np.mean([f.expected for f in found]), rel=0.1)


def test_blurred_or_noisy_images_are_no_copies(sets):
    """The quality of a model moves all distances to training images; neither test takes that for copying."""
    generated, training, held_out = sets
    noise = 60 * torch.randn(generated.shape, generator=torch.Generator().manual_seed(0))
    for images in (blurred(generated, 2.0), (generated + noise).clamp(0, 255).byte()):
        found = copies.memorised(images, training, held_out)
        rank_test = scipy.stats.mannwhitneyu(found.generated.distance, found.held_out.distance)
        assert rank_test.pvalue < 1e-3 and not found.found and 0.02 < found.p_nearer < 0.98


def test_small_sets(sets):
    """The case that memorises most: few images, nearly none of them held out."""
    generated, training, held_out = sets
    images = blurred(training[:43].repeat(3, 1, 1, 1))
    found = copies.memorised(images, training[:43], held_out[:7])
    assert found.found and found.p_copies < 1e-3 and found.p_nearer < 1e-3 and found.nearer == 0
    assert not copies.memorised(generated[:100], training[:43], held_out[:7]).found
    alone = copies.memorised(images, training[:43], held_out[:0])  # nothing is known to be held out
    assert alone.found and (alone.nearer, alone.expected, alone.p_nearer) == (0, 0.0, 1.0)
    assert not copies.memorised(generated[:5], training[:2], held_out[:1]).found
    with pytest.raises(data.InputError, match="at least 2 different"):
        copies.memorised(images, training[:1].repeat(9, 1, 1, 1), held_out)


def test_plain_images():
    """Without contrast there is nothing to copy, nor to divide by."""
    grey = torch.arange(100, 160, dtype=torch.uint8).view(60, 1, 1, 1).expand(60, 3, 16, 16).contiguous()
    found = copies.nearest(grey[:7], grey)
    assert found.distance.eq(0).all() and not found.mirrored.any()
    noisy = (grey + torch.randint(2, grey.shape, generator=torch.Generator().manual_seed(0))).byte()
    assert copies.nearest(noisy, grey).distance.max() < copies.SAME  # noise of a level is not stretched
    assert not copies.memorised(noisy[:20], noisy[20:50], noisy[50:]).found


# ---- against direct calculations -------------------------------------------------------------------------------------


def naive_descriptor(image, top, left, mirrored):
    """Of a uint8 (C, H, W) image of at most 64 px, in float64, one window at a time."""
    x = image.double()[None]
    channels, height, width = image.shape
    blur = torch.tensor([[1, 2, 1], [2, 4, 2], [1, 2, 1]]).double().div(16).expand(channels, 1, 3, 3)
    x = F.conv2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), blur, groups=channels)
    x = x[..., top : top + height - 4, left : left + width - 4]
    if mirrored:
        x = x.flip(-1)
    grey = x.mean(1, keepdim=True)
    cells = F.adaptive_avg_pool2d(grey, 8)
    values = torch.cat([(cells - cells.mean()).flatten(), F.adaptive_avg_pool2d(x - grey, 4).flatten()])
    return values / max(values.norm(), 32)


@pytest.mark.parametrize("size,channels", [(16, 3), (23, 1)])
def test_nearest_equals_a_naive_loop(size, channels, monkeypatch):
    images, training = synthetic(9, 1, size, channels), synthetic(60, 2, size, channels)
    images[0], images[1], images[2] = training[5], training[6].flip(-1), moved(training[7:8], 1, -2)[0]
    targets = torch.stack([naive_descriptor(image, 2, 2, False) for image in training])
    monkeypatch.setattr(copies, "BLOCK", 2 * 50 * 60 * 2)  # four images at a time
    found = copies.nearest(images, training)
    for i, image in enumerate(images):
        places = list(itertools.product((False, True), range(5), range(5)))
        tried = torch.stack([naive_descriptor(image, top, left, mirrored) for mirrored, top, left in places])
        distances = torch.cdist(tried, targets, compute_mode="donot_use_mm_for_euclid_dist")
        best = distances.min(0)
        assert found.index[i] == best.values.argmin()
        assert found.distance[i] == pytest.approx(float(best.values.min()), abs=2e-3)
        assert found.mirrored[i] == places[best.indices[best.values.argmin()]][0]
        nearest50 = best.values.sort().values[:50]
        assert found.near[i] == (nearest50[0] < max(nearest50[24] / 4, 0.05))
    assert found.near[:3].all()


def test_an_image_is_not_compared_with_itself():
    images = synthetic(30, 2, 16)
    images[20] = images[4]
    own = torch.tensor([3, 4, 29])
    found = copies.nearest(images[own], images, own)
    for i, row in enumerate(own):
        others = torch.arange(30) != row
        alone = copies.nearest(images[row][None], images[others])
        assert found.index[i] == others.nonzero()[alone.index[0], 0]
        assert found.distance[i] == pytest.approx(float(alone.distance[0]), abs=1e-3)
    assert found.index[1] == 20 and found.near.tolist() == [False, True, False]


def test_the_order_of_the_images_does_not_matter(sets):
    images, _ = planted(sets, 0.05, "JPEG")
    first = copies.memorised(images, *sets[1:])
    orders = [torch.randperm(len(part), generator=torch.Generator().manual_seed(3)) for part in (images, *sets[1:])]
    second = copies.memorised(*(part[order] for part, order in zip((images, *sets[1:]), orders, strict=True)))
    assert orders[1][second.generated.index].equal(first.generated.index[orders[0]])
    assert second.generated.near.equal(first.generated.near[orders[0]])
    assert second.null.sum() == first.null.sum()  # all of the training images are looked up
    assert (second.nearer, second.expected) == (first.nearer, first.expected)
    assert second.p_copies == pytest.approx(first.p_copies) and second.p_nearer == pytest.approx(first.p_nearer)


@pytest.mark.parametrize("table", [(4, 400, 0, 2000), (20, 400, 1, 100), (0, 5, 3, 7), (5, 5, 0, 1), (3, 9, 9, 30)])
def test_fisher_equals_scipy(table):
    part, whole, null_part, null_whole = table
    rows = [[part, whole - part], [null_part, null_whole - null_part]]
    expected = scipy.stats.fisher_exact(rows, alternative="greater").pvalue
    assert copies.fisher(*table) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("times", [(3, 2, 0, 1, 0, 4, 0, 1, 0, 0), (1, 1, 1, 1, 1, 1, 5, 0, 2, 0), (2,) * 6 + (0,) * 4])
def test_nearer_equals_all_choices_of_held_out_images(times):
    """Ten images, the last four held out, and copies of each that are generated so many times."""
    pool = torch.randint(256, (10, 3, 16, 16), generator=torch.Generator().manual_seed(0)).byte()
    images = pool.repeat_interleave(torch.tensor(times), 0)
    number, expected, p = copies.nearer_to_held_out(images, pool[:6], pool[6:])
    sums = [sum(choice) for choice in itertools.combinations(times, 4)]
    exact = np.mean([total <= sum(times[6:]) for total in sums])
    assert number == sum(times[6:]) and expected == pytest.approx(np.mean(sums), rel=1e-6)
    assert p == pytest.approx(exact, abs=4 * np.sqrt(exact * (1 - exact) / 1e5) + 2e-5)


def test_near_duplicates_do_not_count_as_nearer():
    """Of a pair, neither can be held out without the other."""
    pool = torch.randint(256, (12, 3, 16, 16), generator=torch.Generator().manual_seed(0)).byte()
    pool[1], pool[9] = pool[0] ^ 1, pool[8] ^ 1
    number, expected, _ = copies.nearer_to_held_out(pool, pool[:8], pool[8:])
    assert expected == pytest.approx(12 * 2 / 8) and number <= 12 - 6


# ---- the command -----------------------------------------------------------------------------------------------------


def run_command(tmp_path, *arguments):
    files = ["--out", str(tmp_path / "page.html"), "--json", str(tmp_path / "page.json")]
    status = monitor.main(["memorised", *map(str, arguments), *files])
    return status, json.loads((tmp_path / "page.json").read_text())


def test_command_on_images(tmp_path, capsys):
    sources = ["--real", "synthetic:80:2", "--size", 32]
    status, page = run_command(tmp_path, "synthetic:60:1", "--train", "synthetic:60:1", *sources)
    assert status == 1 and page["alarm"] and page["p"] < 1e-6
    assert page["verdict"].startswith("Memorised: 30 of 30") and page["verdict"] in capsys.readouterr().out
    assert [row[1:3] for row in page["tables"][0]["rows"]][0] == [30, 30]
    assert [len(values) for values in page["histograms"][0]["lines"].values()] == [30, 40]
    assert len(page["pictures"][0]["items"]) == monitor.PAIRS
    assert (tmp_path / "page.html").read_text().count("data:image/png") == monitor.PAIRS
    status, page = run_command(tmp_path, "synthetic:60:1", "--train", "synthetic:60:3", *sources)
    assert status == 0 and not page["alarm"] and page["verdict"].startswith("Not memorised: 1 of 30")


def test_pairs_are_shown_side_by_side_closest_first():
    training, random = synthetic(40, 1, 16), torch.Generator().manual_seed(0)
    images = training[[5, 6, 7]].clone()
    images[0] += torch.randint(3, images[0].shape, generator=random).byte()
    images[1] = images[1].flip(-1)
    images[2] = synthetic(2, 9, 16)[0]
    found = copies.memorised(images, training, training[:0])
    shown = monitor.closest_pairs(images, training, found, ["a, ", "b, ", "c, "])["items"]
    assert [item["caption"][0] for item in shown] == ["b", "a", "c"]
    assert shown[0]["caption"].startswith("b, training image 6") and shown[0]["caption"].endswith("mirrored")
    png = data.decode_png(io.BytesIO(base64.b64decode(shown[0]["source"].partition(",")[2])))
    pixels = torch.from_numpy(np.array(png)).reshape(3, 16, 32)
    assert pixels.equal(torch.cat([images[1], training[6].flip(-1)], 2))


def test_command_on_a_run(trained, tmp_path, shapes):
    status, page = run_command(tmp_path, trained, "-n", 8)
    assert status in (0, 1) and page["pictures"][0]["items"][0]["caption"].startswith("seed ")
    assert page["facts"]["training images"].endswith(str(shapes)) and page["facts"]["model"]


def test_command_needs_training_images(tmp_path, capsys):
    assert status_of(monitor.main, ["memorised", "synthetic:40:1", "--real", "synthetic:40:2"]) == 2
    assert "--train" in capsys.readouterr().err


# ---- trained networks ------------------------------------------------------------------------------------------------


@pytest.mark.soak
def test_a_network_overfitted_on_50_images_is_caught(tmp_path):
    """Takes ten minutes."""
    for i in range(50):
        Image.fromarray(butterflies.render(3, i, 16).transpose(1, 2, 0)).save(tmp_path / f"{i:03}.png")
    network = ["--size", "16", "--channels", "32,64", "--attention", "8", "--no-flips", "--optimizer", "adamw"]
    rest = ["--steps", "4000", "--preview-every", "4000", "--precision", "fp32"]
    assert train.main(["--data", str(tmp_path), "--out", str(tmp_path / "run"), *network, *rest]) == 0
    status, page = run_command(tmp_path, tmp_path / "run", "-n", 200)
    assert status == 1 and page["p"] < 1e-4


@pytest.mark.soak
def test_the_default_model_is_cleared(tmp_path):
    """200 of its images against the 20,000 that it was trained on."""
    status, page = run_command(tmp_path, sample.DEFAULT_MODEL, "--train", "synthetic:20000", "-n", 200)
    assert status == 0 and page["p"] > 0.05
