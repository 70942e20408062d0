"""How images are compared: features of a pinned network, and simple statistics of pixels.

None of them may change, or measurements of different versions could not be compared. `builtin/train_features.py` made
`features.safetensors`.
"""

import hashlib
from collections.abc import Callable
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


def features_of(extract: Callable, images: Tensor) -> Tensor:
    """Returns the features of uint8 (N, C, H, W) images: float64 (N, d), on the CPU. `extract` takes 64 at a time."""
    return torch.cat([extract(part).cpu() for part in images.split(64)]).double()


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
