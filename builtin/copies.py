"""Whether generated images copy training images: the nearest training image of each, and two tests of all together."""

import functools
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import data

ALPHA = 0.01  # false-alarm rate of the verdict
NULL = 1000  # images that no model made, at most; they give the share of near-copies to expect
NEIGHBOURS = 50
NEAR = 1 / 4
SAME = 0.05  # any image nearer than this is a near-copy, however close the other training images are
SIDE = 64  # larger images are scaled down to this
SHIFT = 2  # pixels, after scaling
SHIFTS, MIDDLE = range(2 * SHIFT + 1), range(SHIFT, SHIFT + 1)
FLOOR = 4.0  # in levels of 255; images with less contrast keep a norm below 1
BLOCK = 2**24  # distances held in memory at once


@dataclass(frozen=True)
class Nearest:
    """The nearest training image of each of N images."""

    index: Tensor  # int64 (N,)
    mirrored: Tensor  # bool (N,): the training image's mirror image is nearer
    distance: Tensor  # float32 (N,), from 0 to 2
    near: Tensor  # bool (N,): this is a near-copy


@dataclass(frozen=True)
class Memorisation:
    """Whether a set of generated images copies training images."""

    generated: Nearest
    held_out: Nearest
    null: Tensor  # bool: which images that no model made are near-copies
    nearer: int  # generated images whose nearest neighbour is a held-out image
    expected: float  # number of these without memorisation
    p_copies: float
    p_nearer: float

    @property
    def share(self) -> float:
        """Share of near-copies among the generated images."""
        return float(self.generated.near.float().mean())

    @property
    def null_share(self) -> float:
        return float(self.null.float().mean())

    @property
    def p(self) -> float:
        """The smaller of the p-values, adjusted for two tests (Bonferroni)."""
        return min(1.0, 2 * min(self.p_copies, self.p_nearer))

    @property
    def found(self) -> bool:
        return self.p <= ALPHA

    @property
    def verdict(self) -> str:
        near, count = int(self.generated.near.sum()), len(self.generated.near)
        word = "Memorised" if self.found else "Not memorised"
        return (
            f"{word}: {near} of {count} generated images ({self.share:.1%}) are near-copies of training images, "
            f"against {self.null_share:.1%} of {len(self.null)} images that no model made (p {self.p_copies:.2g}); "
            f"{self.nearer} are nearer to a held-out image than to any training image, and {self.expected:.1f} are "
            f"expected (p {self.p_nearer:.2g}). Adjusted p {self.p:.2g}, alarm at {ALPHA:g}."
        )


def memorised(images: Tensor, training: Tensor, held_out: Tensor) -> Memorisation:
    """Tests whether generated images copy training images: uint8 (N, C, H, W) of one shape. Without held-out images,
    only near-copies are tested.

    near-copies  Fisher's exact test: is their share larger than among images that no model made? Those are the held-out
                 images and, up to NULL in all, training images, each compared with the other training images.
    nearer       If the model does not memorise, held-out and training images are interchangeable. The number of
                 generated images whose nearest neighbour is a held-out image (Platzer & Reutterer 2021) is therefore
                 compared with the numbers for random choices of the held-out images.
                 Images with near-duplicates are left out: `data.split` never separates those.

    Raises InputError for fewer than two different training images.
    """
    rows = distinct(training)
    if len(rows) < 2:
        raise data.InputError("memorisation needs at least 2 different training images; name others")
    some = torch.randperm(len(rows), generator=data.generator("null"))[: max(0, NULL - len(held_out))]
    training = training[rows]
    generated, fresh = nearest(images, training), nearest(held_out[:NULL], training)
    null = torch.cat([fresh.near, nearest(training[some], training, some).near])
    p_copies = fisher(int(generated.near.sum()), len(images), int(null.sum()), len(null))
    nearer, expected, p_nearer = nearer_to_held_out(images, training, held_out)
    generated, fresh = (replace(part, index=rows[part.index]) for part in (generated, fresh))
    return Memorisation(generated, fresh, null, nearer, expected, p_copies, p_nearer)


def distinct(images: Tensor) -> Tensor:
    """Returns the index of the first of each group of equal images, ascending: int64."""
    first = {}
    for i, image in enumerate(images.numpy()):
        first.setdefault(image.tobytes(), i)
    return torch.tensor(list(first.values()), dtype=torch.int64)


def nearest(images: Tensor, training: Tensor, own: Tensor | None = None) -> Nearest:
    """Finds the nearest of the training images (M, C, H, W) to each of the images (N, C, H, W), uint8 both.

    The image and its mirror image are compared at all shifts by up to SHIFT pixels. `own` (N,) says that the images are
    these training images, which are then compared with the others.

    An image is a near-copy if its nearest training image is less than a quarter as far away as the median of its 50
    nearest ones; images that are close to many are thus not counted (Carlini et al. 2023, section 5.1, use a third).
    Memory: 1,000 bytes per training image, plus 64 MiB or 200 bytes per training image, whichever is more.
    """
    described = torch.cat([describe(part, MIDDLE)[:, 0, 0] for part in training.split(256)])
    squares = described.square().sum(1, keepdim=True)
    columns = torch.cat([described, torch.ones_like(squares), squares], 1).T
    empty = torch.empty(0)
    parts = [(empty.long(), empty.bool(), empty, empty.bool())]
    for start in range(0, len(images), rows := max(1, BLOCK // (2 * len(SHIFTS) ** 2 * len(training)))):
        x = describe(images[start : start + rows], SHIFTS)
        x = torch.cat([-2 * x, x.square().sum(3, keepdim=True), torch.ones_like(x[..., :1])], 3)
        both = (x.flatten(0, 2) @ columns).view(*x.shape[:3], -1).amin(2)  # squared distances, plain and mirrored
        distances = both.amin(1).clamp(min=0).sqrt()
        if own is not None:
            distances[torch.arange(len(x)), own[start : start + rows]] = torch.inf
        closest = distances.topk(min(NEIGHBOURS, len(training)), largest=False)
        index, distance = closest.indices[:, 0], closest.values[:, 0]
        plain, mirrored = both[torch.arange(len(x)), :, index].T
        near = distance < (NEAR * closest.values.median(1).values).clamp(min=SAME)
        parts.append((index, mirrored < plain, distance, near))
    return Nearest(*(torch.cat(column) for column in zip(*parts, strict=True)))


def describe(images: Tensor, shifts: range) -> Tensor:
    """Describes uint8 (N, C, H, W) images without a border: (N, 2, S * S, d), plain and mirrored, at S x S shifts.

    A descriptor has the means of 8 x 8 cells of grey and 4 x 4 cells of colour, since JPEG compression changes colour
    most. Less the mean grey and divided by the norm, it does not depend on brightness and contrast. The norm is below 1
    for images with hardly any contrast.
    """
    x = images.float()
    layers = []
    for part, cells in ((x.mean(1, keepdim=True), 8), (x - x.mean(1, keepdim=True), 4)):
        rows, columns = (cell_weights(side, cells)[list(shifts)] for side in x.shape[2:])
        means = torch.einsum("yah,nchw,xbw->nyxcab", rows, part, columns)
        if cells == 8:
            means = means - means.mean((3, 4, 5), keepdim=True)
        layers.append(torch.stack([means, means.flip(-1)], 1).flatten(2, 3).flatten(3))
    described = torch.cat(layers, 3)
    return described / described.norm(dim=3, keepdim=True).clamp(min=8 * FLOOR)


@functools.cache
def cell_weights(side: int, cells: int) -> Tensor:
    """Returns the weights of a line's pixels in the means of its cells, at each shift: (2 * SHIFT + 1, cells, side).

    The line is scaled down to SIDE pixels if it is longer, and slightly blurred.
    """
    lines = torch.eye(side)[:, None]
    if side > SIDE:
        lines = F.adaptive_avg_pool1d(lines, SIDE)
    lines = F.conv1d(F.pad(lines, (1, 1), mode="replicate"), torch.tensor([[[0.25, 0.5, 0.25]]]))
    windows = lines[:, 0].unfold(1, lines.shape[2] - 2 * SHIFT, 1)  # (side, shifts, pixels)
    return F.adaptive_avg_pool1d(windows, cells).permute(1, 2, 0)


def fisher(part: int, whole: int, null_part: int, null_whole: int) -> float:
    """Returns the one-sided p-value of Fisher's exact test that a share, part / whole, is not larger than another."""
    total, successes = whole + null_whole, part + null_part
    k = torch.arange(part, min(whole, successes) + 1)
    logs = log_choose(successes, k) + log_choose(total - successes, whole - k) - log_choose(total, whole)
    return min(1.0, float(logs.exp().sum()))


def log_choose(n: int | Tensor, k: int | Tensor) -> Tensor:
    """Returns the logarithm of the binomial coefficient, -inf if k is not from 0 to n."""
    n, k = torch.as_tensor(n, dtype=torch.float64), torch.as_tensor(k, dtype=torch.float64)
    return torch.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)


def nearer_to_held_out(images: Tensor, training: Tensor, held_out: Tensor) -> tuple[int, float, float]:
    """Counts the images whose nearest neighbour is a held-out one. Returns the number, its mean over random choices of
    the held-out images, and the p-value: the share of random choices with at most this number."""
    pool = torch.cat([training, held_out])
    groups = torch.from_numpy(data.near_duplicates(pool.numpy()))
    alone = groups.bincount()[groups] == 1
    held = (torch.arange(len(pool)) >= len(training))[alone]
    if not held.any():
        return 0, 0.0, 1.0
    times = nearest(images, pool[alone]).index.bincount(minlength=len(held))
    number = int(times[held].sum())
    values, sizes = times.unique(return_counts=True)
    draws = np.random.Generator(np.random.Philox(0)).multivariate_hypergeometric(sizes.numpy(), int(held.sum()), 99_999)
    at_most = (draws @ values.numpy() <= number).sum()
    return number, len(images) * float(held.float().mean()), float(at_most + 1) / 100_000
