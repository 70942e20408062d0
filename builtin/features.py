"""How images are compared: features of a pinned network, their distances, and simple statistics of pixels.

None of them may change, or measurements of different versions could not be compared. `builtin/train_features.py` made
`features.safetensors`.
"""

import hashlib
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import data
import unet
from data import InputError

FEATURES = Path(__file__).parent / "features.safetensors"
FEATURES_HASH = "a3daaf4402247b69d568ca1730fa2f0524006d7d2ef808b7127dc9ce8bc2840d"


class Features(nn.Module):
    """Maps uint8 images (N, 1 or 3, H, W) to float32 (N, 128), standardised on synthetic butterflies.

    `builtin/train_features.py` trained it to classify the families of synthetic butterflies and to estimate how much
    each had been damaged. It scales images to 64 x 64 pixels, so it does not see the finest detail of larger ones.
    """

    SIDE = 64
    LAYERS = ((32, 1), (48, 2), (64, 1), (96, 2), (96, 1), (128, 2), (128, 1))  # channels, stride

    def __init__(self):
        super().__init__()
        widths = [3, *(width for width, _ in self.LAYERS)]
        self.convs = nn.ModuleList(
            nn.Conv2d(before, width, 3, stride, padding=1)
            for before, (width, stride) in zip(widths, self.LAYERS, strict=False)
        )
        self.register_buffer("mean", torch.zeros(widths[-1]))
        self.register_buffer("std", torch.ones(widths[-1]))

    def forward(self, images: Tensor) -> Tensor:
        h = data.to_float(images).expand(-1, 3, -1, -1)
        if h.shape[2:] != (self.SIDE, self.SIDE):
            h = F.interpolate(h, (self.SIDE, self.SIDE), mode="bilinear", antialias=True)
        for conv in self.convs:
            h = F.relu(conv(h))
        return (h.mean((2, 3)) - self.mean) / self.std


def load_features() -> Features:
    """Reads the pinned extractor. Raises InputError if its file is missing or another one."""
    with data.disk_errors(f"read {FEATURES}"):
        found = hashlib.sha256(FEATURES.read_bytes()).hexdigest()
    if found != FEATURES_HASH:
        raise InputError(
            f"{FEATURES} is not the file of this version; restore it, because numbers are comparable only with that one"
        )
    network = Features()
    tensors = unet.read_safetensors(FEATURES)
    network.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    return network.to(memory_format=torch.channels_last).eval().requires_grad_(False)


def features_of(network: Features, images: Tensor) -> Tensor:
    """Returns the features of uint8 (N, C, H, W) images: float64 (N, 128)."""
    return torch.cat([network(part) for part in images.split(64)]).double()


def kid(x: Tensor, y: Tensor) -> tuple[float, float]:
    """Returns the kernel distance of two sets of features (N, d) and (M, d), and its standard error.

    The unbiased estimate of MMD^2 with the kernel (x.y/d + 1)^3 (Binkowski et al. 2018, section 4), from all pairs
    rather than subsets; it can be below 0 for sets from one distribution. The standard error is the jackknife's, which
    leaves out each image of either set in turn (Arvesen 1969). It covers the choice of images, not that of a training
    seed, and is a third too large for sets from one distribution. Raises ValueError for fewer than 3 images.
    """
    m, n = len(x), len(y)
    if min(m, n) < 3:
        raise ValueError(f"a kernel distance needs at least 3 images on each side, not {m} and {n}")

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / a.shape[1] + 1) ** 3

    def row_sums(a: Tensor, b: Tensor) -> Tensor:
        return torch.cat([kernel(part, b).sum(1) for part in a.split(1024)])

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
    return float(value), float(variance.sqrt())


def frechet_distance(x: Tensor, y: Tensor) -> float:
    """Returns the Frechet distance of Gaussians fitted to two sets of features (N, d) (Heusel et al. 2017, eq. 6).

    It is biased upwards by about 1/N, so compare it only between equal numbers of images, with N above d.
    """
    covariances = x.T.cov(), y.T.cov()
    values, vectors = torch.linalg.eigh(covariances[0])
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ covariances[1] @ root).clamp(min=0).sqrt().sum()
    traces = sum(covariance.trace() for covariance in covariances)
    return max(0.0, float((x.mean(0) - y.mean(0)).square().sum() + traces - 2 * cross))


STATISTICS = (
    "brightness",
    "contrast",
    "saturation",
    "redness",  # red minus the mean of the three channels
    "blueness",  # likewise
    "black pixels",  # share of pixels darker than 0.04
    "white pixels",  # brighter than 0.96
    "sharpness",  # logarithm of the Laplacian's mean square
    "fine grain",  # share of the Laplacian's energy that a 3 x 3 mean removes
    "JPEG blocks",  # share of horizontal differences at borders of 8 x 8 blocks
    "border brightness",  # of the outer 2 pixels
    "border saturation",  # of the same pixels
    "asymmetry",  # mean difference from the mirror image
)


def statistics_of(images: Tensor) -> Tensor:
    """Returns the STATISTICS of uint8 (N, C, H, W) images: float64 (N, 13). Channels are scaled to 0..1."""
    return torch.cat([_statistics(part) for part in images.split(64)])


def _statistics(images: Tensor) -> Tensor:
    x = images.double().expand(-1, 3, -1, -1) / 255
    luma, colour = x.mean(1), x.amax(1) - x.amin(1)
    differences = luma.diff(dim=2).abs().mean(1)  # (N, W - 1)
    laplacian = 4 * luma - sum(luma.roll(shift, side) for shift in (-1, 1) for side in (1, 2))
    laplacian = laplacian[:, 1:-1, 1:-1]
    energy = laplacian.square().mean((1, 2)) + 1e-6
    smooth = F.avg_pool2d(laplacian[:, None], 3, 1).square().mean((1, 2, 3))
    border = torch.ones(luma.shape[1:], dtype=torch.bool)
    border[2:-2, 2:-2] = False
    columns = (
        luma.mean((1, 2)),
        (luma - luma.mean((1, 2), keepdim=True)).square().mean((1, 2)).sqrt(),
        colour.mean((1, 2)),
        (x[:, 0] - luma).mean((1, 2)),
        (x[:, 2] - luma).mean((1, 2)),
        (luma < 0.04).double().mean((1, 2)),
        (luma > 0.96).double().mean((1, 2)),
        energy.log(),
        1 - smooth / energy,
        differences[:, 7::8].sum(1) / (differences.sum(1) + 1e-6),
        luma[:, border].mean(1),
        colour[:, border].mean(1),
        (luma - luma.flip(-1)).abs().mean((1, 2)),
    )
    return torch.stack(columns, 1)
