"""The Inception network of 2015 by which papers compute FID, on the blocks of torchvision's Inception.

Features and resizing are those of pytorch-fid, which accepts the same weights file. Nothing is downloaded.
"""

import hashlib
import io
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import data
from builtin.quality import SPLITS, Estimate, inception_score, measures
from data import InputError

HASH = "6726825d"  # the SHA-256 of the weights file that defines FID begins with this
NAME = f"pt_inception-2015-12-05-{HASH}.pth"
RELEASE = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{NAME}"
STAGES = {  # dimensions of the features: the layers that lead there from the stage before
    64: ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "maxpool1"),
    192: ("Conv2d_3b_1x1", "Conv2d_4a_3x3", "maxpool2"),
    768: ("Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6a", "Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"),
    2048: ("Mixed_7a", "Mixed_7b", "Mixed_7c"),
}


def build_layers() -> nn.Module:
    """Returns torchvision's Inception with 1,008 classes and the pooling of the TensorFlow graph of 2015.

    Averages leave out the padding, and the last block takes maxima (Szegedy et al. 2016 has averages there, too).
    """
    from torchvision.models import inception

    def average(x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)

    def maximum(x: Tensor) -> Tensor:
        return F.max_pool2d(x, 3, stride=1, padding=1)

    def pooled(block: type, pool: Callable) -> type:
        class Block(block):
            def _forward(self, x: Tensor) -> list[Tensor]:
                # torchvision pools inside this method; to replace its last branch costs 5% of the time.
                return [*super()._forward(x)[:-1], self.branch_pool(pool(x))]

        return Block

    a, c, e = (pooled(block, average) for block in (inception.InceptionA, inception.InceptionC, inception.InceptionE))
    blocks = [inception.BasicConv2d, a, inception.InceptionB, c, inception.InceptionD, e, None]
    layers = inception.Inception3(1008, aux_logits=False, inception_blocks=blocks, init_weights=False)
    layers.Mixed_7c = pooled(inception.InceptionE, maximum)(2048)
    return layers


class Inception(nn.Module):
    """Maps uint8 images (N, 1 or 3, H, W) of any size to float32 features (N, 64, 192, 768 or 2048)."""

    def __init__(self, weights: str = ""):
        super().__init__()
        self.layers = build_layers()
        self.weights = weights  # first 8 hex digits of the file's SHA-256

    def forward(self, images: Tensor, dims: int = 2048) -> Tensor:
        h = images.to(self.layers.fc.weight.device).float().expand(-1, 3, -1, -1) / 255
        h = 2 * F.interpolate(h, (299, 299), mode="bilinear", align_corners=False) - 1  # without antialiasing
        for width, names in STAGES.items():
            for name in names:
                h = getattr(self.layers, name)(h)
            if width == dims:
                return h.mean((2, 3))
        raise ValueError(f"features have 64, 192, 768 or 2048 dimensions, not {dims}")

    def logits(self, features: Tensor) -> Tensor:
        """Returns the logits of features (N, 2048) for the Inception score: (N, 1008), without bias as in its code."""
        return features @ self.layers.fc.weight.to(features).T

    def measures(self, x: Tensor, y: Tensor) -> dict[str, Estimate]:
        """Returns quality.measures of features (N, 2048) and (M, 2048), with the Inception score "is" of x.

        The Frechet distance is called "fid" if the weights are those of FID. Like everyone's, it is also computed from
        fewer images than dimensions.
        """
        found = measures(x, y, singular=True)
        if self.weights == HASH:
            found = {"fid": found.pop("fd")} | found
        if len(x) >= SPLITS:
            found["is"] = inception_score(self.logits(x))
        return found


def load_inception(path: Path | None) -> Inception:
    """Reads a weights file, or the one that pytorch-fid or torch-fidelity left in torch's cache if path is None.

    Raises InputError if it is missing or damaged.
    """
    if path is None:
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        path = next(iter(sorted(folder.glob(f"*inception-2015-12-05-{HASH}.pth"))), folder / NAME)
    with data.disk_errors(f"read the Inception weights {path}", f"put the file {RELEASE} there"):
        content = path.read_bytes()
    network = Inception(hashlib.sha256(content).hexdigest()[:8])
    try:
        network.layers.load_state_dict(torch.load(io.BytesIO(content), weights_only=True, map_location="cpu"))
    except Exception as error:  # a damaged file raises almost anything
        remedy = f"get {NAME} again from {RELEASE}"
        raise InputError(f"{path} does not hold the weights of this Inception network; {remedy}") from error
    return network.to(memory_format=torch.channels_last).eval().requires_grad_(False)
