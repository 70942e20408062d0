"""How close a set of images is to a real one: the numbers that papers report, from features, with 95% intervals.

x (N, d) are the features of the images and y (M, d) those of the real ones, float64. The intervals cover the choice of
the images on both sides, not that of a training seed, and not the bias of a number that depends on N and M.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import data

K = {"precision": 3, "recall": 3, "density": 5, "coverage": 5}  # neighbours, as their papers have them
NAMES = {"fid": "FID", "is": "Inception score", "kid": "KID", "fd": "FD"} | {name: name for name in K}
DECIMALS = {"fid": 2, "is": 2, "fd": 2}  # others have 4
COLUMNS = ("features", "measure", "k", "of", "value", "95% interval", "N", "real N")
BLOCK = 1024  # rows of a matrix of distances that are in memory at once
BISECTIONS = 10  # of both sets, at random; each half is measured by itself
NEAREST = 80  # a half of a set has at least 5 of the nearest 80, except with a probability of 1e-17
FEW = 2 * (K["coverage"] + 1)  # images whose halves have neighbours
SPLITS = 10  # of the Inception score
UNBIASED = 10_000  # images from which the bias of FID is small
# Quantiles of 95% intervals: of the normal distribution, and of Student's t with 19 and 9 degrees of freedom.
NORMAL, HALVES, PARTS = 1.960, 2.093, 2.262


class Estimate(NamedTuple):
    """A number and its 95% interval."""

    value: float
    low: float
    high: float


def _interval(value: Tensor, half_width: Tensor, least: float = 0, most: float = math.inf) -> Estimate:
    """Returns an estimate whose interval stays within what the number can be."""
    return Estimate(float(value), max(least, float(value - half_width)), min(most, float(value + half_width)))


def measures(x: Tensor, y: Tensor, singular: bool = False) -> dict[str, Estimate]:
    """Returns "kid", "fd", "precision", "recall", "density" and "coverage".

    Numbers that need more images are left out: KID needs 3 on each side, FD more than d (unless `singular` allows
    covariances without full rank), the others 12.
    """
    found, count = {}, min(len(x), len(y))
    if count >= 3:
        found["kid"] = kid(x, y)
    if count > (2 if singular else x.shape[1]):
        found["fd"] = frechet_distance(x, y)
    if count >= FEW:
        found |= prdc(x, y)
    return found


def kid(x: Tensor, y: Tensor) -> Estimate:
    """Returns the kernel distance of two sets of features (N, d) and (M, d).

    The unbiased estimate of MMD^2 with the kernel (x.y/d + 1)^3 (Binkowski et al. 2018, section 4), from all pairs
    rather than subsets; it can be below 0 for sets from one distribution. The standard error is the jackknife's, which
    leaves out each image of either set in turn (Arvesen 1969). It is a third too large for sets from one distribution.
    Raises ValueError for fewer than 3 images.
    """
    m, n = len(x), len(y)
    if min(m, n) < 3:
        raise ValueError(f"a kernel distance needs at least 3 images on each side, not {m} and {n}")

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / a.shape[1] + 1) ** 3

    def row_sums(a: Tensor, b: Tensor) -> Tensor:
        return torch.cat([kernel(part, b).sum(1) for part in a.split(BLOCK)])

    def row_sums_within(a: Tensor) -> Tensor:  # without the kernel of an image and itself
        itself = ((a * a).sum(1) / a.shape[1] + 1) ** 3
        return row_sums(a, a) - itself

    xx, yy = row_sums_within(x), row_sums_within(y)
    xy, yx = row_sums(x, y), row_sums(y, x)
    within_x, within_y, between = xx.sum(), yy.sum(), xy.sum()
    value = within_x / (m * (m - 1)) + within_y / (n * (n - 1)) - 2 * between / (m * n)
    without_x = (within_x - 2 * xx) / ((m - 1) * (m - 2)) - 2 * (between - xy) / ((m - 1) * n)
    without_y = (within_y - 2 * yy) / ((n - 1) * (n - 2)) - 2 * (between - yx) / (m * (n - 1))
    variance = sum((len(part) - 1) * part.var(correction=0) for part in (without_x, without_y))
    return _interval(value, NORMAL * variance.sqrt(), least=-math.inf)


def frechet_distance(x: Tensor, y: Tensor) -> Estimate:
    """Returns the Frechet distance of Gaussians fitted to two sets of features (N, d) (Heusel et al. 2017, eq. 6).

    It is biased upwards by about 1/N, so compare it only between equal numbers of images, with N above d. The standard
    error is that of the infinitesimal jackknife (Jaeckel 1972): the variance of the images' influences on the distance,
    which are quadratic forms of the optimal transports between the Gaussians. With them the distance takes two
    eigendecompositions of d x d. This error is 50% too large for sets from one distribution.
    """
    shift = x.mean(0) - y.mean(0)
    covariances = x.T.cov(), y.T.cov()
    root, inverse = _square_roots(covariances[0])
    cross, inverse_cross = _square_roots(root @ covariances[1] @ root)
    value = shift.square().sum() + sum(covariance.trace() for covariance in covariances) - 2 * cross.trace()
    to_y, to_x = inverse @ cross @ inverse, root @ inverse_cross @ root
    variance = 0.0
    for points, away, transport in ((x, shift, to_y), (y, -shift, to_x)):
        centred = points - points.mean(0)
        influence = ((centred - centred @ transport + 2 * away) * centred).sum(1)
        variance += influence.var() / len(points)
    return _interval(value.clamp(min=0), NORMAL * variance.sqrt())


def _square_roots(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the square root of a symmetric, positive semidefinite matrix, and the pseudo-inverse of that root."""
    values, vectors = torch.linalg.eigh(matrix)
    smallest = values[-1] * len(matrix) * torch.finfo(matrix.dtype).eps  # below it, rounding errors of zero
    values = torch.where(values > smallest, values, 0).sqrt()
    return vectors * values @ vectors.T, vectors * torch.where(values > 0, 1 / values, 0) @ vectors.T


def prdc(x: Tensor, y: Tensor) -> dict[str, Estimate]:
    """Returns precision and recall (Kynkaanniemi et al. 2019, section 2), density and coverage (Naeem et al. 2020).

    A ball around an image reaches to its k-th nearest neighbour in its own set, k as in K.
        precision   share of images that lie in the ball of a real one
        recall      share of real images that lie in the ball of an image
        density     mean number of balls of real images that an image lies in, divided by k; 1 for real images
        coverage    share of real images whose ball has an image in it
    All depend on N and M. The standard error is the standard deviation over random halves of both sets (Shao & Wu
    1989): numbers that depend on nearest neighbours make the usual jackknife too large by half. It is 0 where the
    number is 0 or 1 in every half. Needs 12 images on each side and time for N^2 + M^2 + NM distances; 1,024 (N + M)
    of them are in memory at once.
    """
    kept_x, kept_y = _halves(len(x), "images"), _halves(len(y), "real")
    (balls_x,) = _radii(x, kept_x, [K["recall"]])
    balls_y, wide_y = _radii(y, kept_y, [K["precision"], K["coverage"]])
    precise, inside = torch.zeros(2, len(kept_x), dtype=torch.float64)
    recalled, covered = torch.zeros(2, *kept_y.shape, dtype=torch.bool)
    for rows in torch.arange(len(x)).split(BLOCK):
        distances = torch.cdist(x[rows], y)
        for half, kept in enumerate(kept_x[:, rows]):
            some = distances[kept]
            precise[half] += (some <= balls_y[half]).any(1).sum()
            recalled[half] |= (some <= balls_x[half, rows[kept], None]).any(0)
            within = some <= wide_y[half]
            inside[half] += within.sum()
            covered[half] |= within.any(0)
    n, m = kept_x.sum(1).double(), kept_y.sum(1).double()
    found = {
        "precision": precise / n,
        "recall": (recalled & kept_y).sum(1) / m,
        "density": inside / n / K["density"],
        "coverage": covered.sum(1) / m,
    }
    most = {"density": math.inf}
    return {
        name: _interval(values[-1], HALVES * values[:-1].std(correction=0), most=most.get(name, 1))
        for name, values in found.items()
    }


def _halves(count: int, name: str) -> Tensor:
    """Chooses pairs of complementary random halves, then the whole set: bool (2 BISECTIONS + 1, count)."""
    random = data.generator("halves", name)
    first = torch.stack([torch.randperm(count, generator=random) < count // 2 for _ in range(BISECTIONS)])
    return torch.cat([first, ~first, torch.ones(1, count, dtype=torch.bool)])


def _radii(points: Tensor, kept: Tensor, ks: Sequence[int]) -> list[Tensor]:
    """Returns, for each k, the distances of points (N, d) to their k-th neighbour in each subset: float64 (S, N).

    kept (S, N) marks the subsets; the distance is -1 for points that are not in it.
    """
    found = [[] for _ in ks]
    for block, in_subset in zip(points.split(BLOCK), kept.split(BLOCK, dim=1), strict=True):
        nearest = torch.cdist(block, points).topk(min(NEAREST, len(points)), largest=False)  # a point itself is first
        counts = kept[:, nearest.indices].cumsum(2)  # (S, n, NEAREST)
        for radii, k in zip(found, ks, strict=True):
            place = (counts > k).to(torch.uint8).argmax(2)
            radii.append(torch.where(in_subset, nearest.values.gather(1, place.T).T, -1))
    return [torch.cat(radii, 1) * (1 + 1e-9) for radii in found]  # surfaces count as inside despite rounding


def inception_score(logits: Tensor) -> Estimate:
    """Returns the Inception score of logits (N, classes) (Salimans et al. 2016, section 4).

    It is the exponential of the mean KL divergence of an image's classes from those of all images, averaged over ten
    parts of the images, which are those of torch-fidelity; the interval is that of this average. Needs 10 images.
    """
    rows = np.random.RandomState(2020).permutation(len(logits))  # noqa: NPY002
    logs = logits[torch.from_numpy(rows)].double().log_softmax(1)
    scores = []
    for i in range(SPLITS):
        part = logs[i * len(logs) // SPLITS : (i + 1) * len(logs) // SPLITS]
        together = part.logsumexp(0) - math.log(len(part))
        scores.append((part.exp() * (part - together)).sum(1).mean().exp())
    scores = torch.stack(scores)
    return _interval(scores.mean(), PARTS * scores.std() / SPLITS**0.5, least=1)


def as_records(features: str, found: dict[str, dict], counts: dict[str, int], real: int) -> list[dict]:
    """Returns a record, for JSON, of each measure of each set of images.

    found    {set: {measure: Estimate}}, with the features of this name
    counts   {set: its number of images}
    real     number of real images
    """
    return [
        {"features": features, "measure": name, "k": K.get(name), "of": which, **measured[name]._asdict()}
        | {"n": counts[which], "real_n": real}
        for name in NAMES
        for which, measured in found.items()
        if name in measured
    ]


def as_rows(records: list[dict]) -> list[list[str]]:
    """Returns records as the rows of a table, under COLUMNS."""
    rows = []
    for record in records:
        name, n, real = (record[key] for key in ("measure", "n", "real_n"))
        value, low, high = (f"{record[key]:.{DECIMALS.get(name, 4)}f}" for key in Estimate._fields)
        label = NAMES[name]
        if name == "fid" and min(n, real) < UNBIASED:
            label += f" (biased: N below {UNBIASED:,})"
        k = str(record["k"] or "")
        rows.append([record["features"], label, k, record["of"], value, f"{low} to {high}", f"{n:,}", f"{real:,}"])
    return rows
