"""Trains the feature extractor of monitor.py: the script that made `features.safetensors`.

    python -m builtin.train_features

It was run once and is kept for reading. A new file would have other features, and no earlier measurement of quality
would be comparable with later ones.
"""

import hashlib
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from tqdm import tqdm

import data
import unet
from builtin import butterflies, features

STEPS, BATCH, SEED = 2000, 64, 1


def blur(images: Tensor, severity: Tensor) -> Tensor:
    """Gaussian, up to 3 pixels of 64."""
    sigma = (0.3 + 2.7 * severity)[:, None]
    kernel = torch.exp(-(torch.arange(-7, 8) ** 2) / (2 * sigma**2))
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(3, 0)  # (3 B, 15)
    flat = F.pad(images.flatten(0, 1)[None], (7, 7, 7, 7), mode="replicate")
    flat = F.conv2d(flat, kernel[:, None, None, :], groups=len(kernel))
    return F.conv2d(flat, kernel[:, None, :, None], groups=len(kernel))[0].unflatten(0, (-1, 3))


def noise(images: Tensor, severity: Tensor) -> Tensor:
    return images + 0.3 * severity[:, None, None, None] * torch.randn_like(images)


def cast(images: Tensor, severity: Tensor) -> Tensor:
    """A gain and a shift of each colour."""
    severity = severity[:, None, None, None]
    size = (len(images), 3, 1, 1)
    return images * (1 + 0.3 * severity * torch.randn(size)) + 0.2 * severity * torch.randn(size)


def warp(images: Tensor, severity: Tensor) -> Tensor:
    """Smooth displacements, like those of a badly learnt shape."""
    coarse = 0.15 * severity[:, None, None, None] * torch.randn(len(images), 2, 6, 6)
    offsets = F.interpolate(coarse, images.shape[2:], mode="bicubic").permute(0, 2, 3, 1)
    grid = F.affine_grid(torch.eye(2, 3).expand(len(images), 2, 3), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid + offsets, padding_mode="border", align_corners=False)


def seam(images: Tensor, severity: Tensor) -> Tensor:
    """Blends in the right half of another specimen, more visibly with more severity."""
    severity = severity[:, None, None, None]
    mixed = images * (1 - severity) + images.roll(1, 0) * severity
    return torch.cat([images[..., :32], mixed[..., 32:]], dim=-1)


def blocks(images: Tensor, severity: Tensor) -> Tensor:
    """Offsets cells of 4 x 4 pixels against each other."""
    coarse = 0.3 * severity[:, None, None, None] * torch.randn(len(images), 3, 16, 16)
    return images + F.interpolate(coarse, scale_factor=4, mode="nearest")


DAMAGES = (blur, noise, cast, warp, seam, blocks)


def batch(images: Tensor, labels: Tensor, step: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns uint8 images of a step, their labels, and severities of the damages (B, 6), a third of them above 0."""
    torch.manual_seed(data.generator(SEED, "damage", step).initial_seed())
    rows = torch.randint(len(images), (BATCH,))
    done = torch.rand(BATCH, len(DAMAGES)) * (torch.rand(BATCH, len(DAMAGES)) < 1 / 3)
    x = data.to_float(data.flip(images[rows], SEED, step))
    for i, damage in enumerate(DAMAGES):
        x = torch.where(done[:, i, None, None, None] > 0, damage(x, done[:, i]), x)
    return data.to_uint8(x), labels[rows], done


class Trained(nn.Module):
    """The extractor with two heads and with batch norms, which are folded into its convolutions at the end."""

    def __init__(self):
        super().__init__()
        self.inner = features.Features()
        self.norms = nn.ModuleList(nn.BatchNorm2d(conv.out_channels) for conv in self.inner.convs)
        self.whiten = nn.BatchNorm1d(self.norms[-1].num_features, affine=False)
        self.heads = nn.Linear(self.norms[-1].num_features, len(butterflies.FAMILIES) + len(DAMAGES))

    def forward(self, images: Tensor) -> Tensor:
        h = data.to_float(images)
        for conv, norm in zip(self.inner.convs, self.norms, strict=True):
            h = F.relu(norm(conv(h)))
        return self.heads(self.whiten(h.mean((2, 3))))

    def folded(self) -> features.Features:
        for i, norm in enumerate(self.norms):
            self.inner.convs[i] = fuse_conv_bn_eval(self.inner.convs[i].eval(), norm.eval())
        return self.inner.eval()


def main() -> None:
    dataset = data.prepare(f"synthetic:8192:{SEED}", features.Features.SIDE, channels=3)
    images, labels = torch.from_numpy(dataset.images), torch.from_numpy(dataset.labels)
    torch.manual_seed(SEED)
    network = Trained().train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.05)
    bar = tqdm(range(STEPS))
    for step in bar:
        optimizer.param_groups[0]["lr"] = 2e-3 * (1 + math.cos(math.pi * step / STEPS)) / 2
        x, families, done = batch(images, labels, step)
        with torch.autocast("cpu", torch.bfloat16):
            output = network(x)
        output = output.float()
        classes = F.cross_entropy(output[:, : -len(DAMAGES)], families)
        severities = F.mse_loss(output[:, -len(DAMAGES) :], done)
        (classes + 5 * severities).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 99:
            bar.write(f"step {step + 1}: families {classes:.3f}, damages {severities:.4f} (of {done.var():.4f})")

    network = network.eval().folded()
    with torch.no_grad():
        # Weights in half precision, as they are saved; then mean and deviation over undamaged butterflies.
        network.convs.half().float()
        values = features.features_of(network, images)
        network.std.copy_(values.std(0).clamp(min=1e-3))
        network.mean.copy_(values.mean(0))
    tensors = {name: tensor.half() for name, tensor in network.state_dict().items()}
    data.atomic_write(features.FEATURES, lambda file: unet.write_safetensors(tensors, file))
    print(f"wrote {features.FEATURES}: {hashlib.sha256(features.FEATURES.read_bytes()).hexdigest()}")


if __name__ == "__main__":
    main()
