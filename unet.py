"""The denoising network: a hand-written U-Net, its configuration, and the file format of its weights.

It computes the same function as diffusers' UNet2DModel, with the same configuration keys and parameter names, so that
model folders need no conversion. `patch_size` p is ours: it adds a pixel_unshuffle before and a pixel_shuffle after a
plain UNet2DModel with p^2 times the channels and 1/p the size.

Architecture: Ho et al. 2020, "Denoising Diffusion Probabilistic Models", appendix B. Weights: the safetensors format.
"""

import json
import math
import os
import platform
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# ---- configuration ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class UNetConfig:
    """The fields of `unet/config.json`. Defaults are UNet2DModel's, which old files rely on by leaving keys out."""

    sample_size: int | tuple[int, int] | None = None  # side of the inner network's input, pixels / patch_size
    in_channels: int = 3  # of the inner network, image channels * patch_size^2
    out_channels: int = 3
    center_input_sample: bool = False  # x <- 2x - 1, for inputs in [0, 1]
    time_embedding_type: str = "positional"
    time_embedding_dim: int | None = None  # None: 4 * block_out_channels[0]
    freq_shift: int = 0  # lowest frequency is 10000^-(half-1)/(half-freq_shift)
    flip_sin_to_cos: bool = True  # embedding is [cos, sin] rather than [sin, cos]
    down_block_types: tuple[str, ...] = ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D")
    mid_block_type: str | None = "UNetMidBlock2D"
    up_block_types: tuple[str, ...] = ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D")
    block_out_channels: tuple[int, ...] = (224, 448, 672, 896)
    layers_per_block: int = 2  # resnets a level on the way down; one more on the way up
    mid_block_scale_factor: float = 1  # residual sums of the middle block are divided by it
    downsample_padding: int = 1  # 0: pad right and below only, as the original release did
    downsample_type: str = "conv"
    upsample_type: str = "conv"
    dropout: float = 0.0
    act_fn: str = "silu"
    attention_head_dim: int | None = 8  # channels a head; None: one head
    norm_num_groups: int = 32
    attn_norm_num_groups: int | None = None  # groups of the middle attention's norm
    norm_eps: float = 1e-5
    resnet_time_scale_shift: str = "default"  # or "scale_shift": the time embedding scales and shifts norm2
    add_attention: bool = True  # attention in the middle block
    class_embed_type: str | None = None
    num_class_embeds: int | None = None
    num_train_timesteps: int | None = None
    patch_size: int = 1  # ours: pixels a side of a patch
    class_names: tuple[str, ...] | None = None  # ours; num_class_embeds is one more if the last label means "no class"

    # The implemented choices; anything else is refused by name.
    CHOICES = {
        "time_embedding_type": ("positional",),
        "mid_block_type": ("UNetMidBlock2D", None),
        "downsample_type": ("conv",),
        "upsample_type": ("conv",),
        "downsample_padding": (0, 1),
        "act_fn": ("silu", "swish"),
        "resnet_time_scale_shift": ("default", "scale_shift"),
        "class_embed_type": (None,),
    }

    WHOLE = ("in_channels", "out_channels", "layers_per_block", "norm_num_groups", "patch_size", "block_out_channels")
    OPTIONAL = ("sample_size", "time_embedding_dim", "attention_head_dim", "attn_norm_num_groups", "num_class_embeds")

    def __post_init__(self):
        for name, allowed in self.CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} {getattr(self, name)!r} is not implemented; implemented: {allowed}")
        for kind, names in (("Down", self.down_block_types), ("Up", self.up_block_types)):
            for name in names:
                if name not in (f"{kind}Block2D", f"Attn{kind}Block2D"):
                    raise ValueError(f"block type {name!r} is not implemented as a {kind.lower()} block")
        levels = len(self.block_out_channels)
        if not levels == len(self.down_block_types) == len(self.up_block_types) or levels == 0:
            raise ValueError("block_out_channels, down_block_types and up_block_types differ in length or are empty")
        for name in self.WHOLE + self.OPTIONAL:
            value = getattr(self, name)
            if value is None and name in self.OPTIONAL:
                continue
            most = {"layers_per_block": 64, "num_class_embeds": 2**24}.get(name, 2**16)  # a tensor's size fits 2^63
            several = name in ("block_out_channels", "sample_size") and isinstance(value, tuple)
            for number in value if several else [value]:
                if type(number) is not int or not 1 <= number <= most:
                    raise ValueError(f"{name} must be a whole number from 1 to {most}, not {value!r}")
        if isinstance(self.sample_size, tuple) and len(self.sample_size) != 2:
            raise ValueError(f"sample_size must be one whole number or two, not {self.sample_size!r}")
        for name in ("mid_block_scale_factor", "norm_eps"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 < value < math.inf:
                raise ValueError(f"{name} must be a positive number, not {value!r}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, not {self.dropout!r}")
        for name in ("center_input_sample", "flip_sin_to_cos", "add_attention"):
            if type(getattr(self, name)) is not bool:
                raise ValueError(f"{name} must be true or false, not {getattr(self, name)!r}")
        if type(self.freq_shift) is not int or not 0 <= self.freq_shift < self.block_out_channels[0] // 2:
            raise ValueError(f"freq_shift must be from 0 to below half of the first channels, not {self.freq_shift!r}")
        self._check_class_names()
        for channels in self.block_out_channels:
            if channels % self.norm_num_groups:
                raise ValueError(f"{channels} channels do not divide into {self.norm_num_groups} groups")
        if self.block_out_channels[0] % 2:
            raise ValueError(f"block_out_channels[0] must be even, not {self.block_out_channels[0]}")
        if self.in_channels % self.patch_size**2 or self.out_channels % self.patch_size**2:
            raise ValueError("in_channels and out_channels must be multiples of patch_size^2")

    def _check_class_names(self):
        names = self.class_names
        if names is None:
            return
        strings = isinstance(names, tuple) and all(isinstance(name, str) for name in names)
        if not strings or len(names) > (self.num_class_embeds or 0):
            raise ValueError("class_names must be a list of names, no more than num_class_embeds")

    @classmethod
    def from_dict(cls, config: dict) -> "UNetConfig":
        """Makes a configuration from a `config.json`, without its private keys (`_class_name`).

        Raises ValueError, which names the key, for what is not implemented or has a wrong value.
        """
        config = {key: value for key, value in config.items() if not key.startswith("_")}
        unknown = config.keys() - {field.name for field in fields(cls)}
        if unknown:
            names = ", ".join(sorted(unknown))
            raise ValueError(f"the network's configuration has keys that are not implemented: {names}")
        for key, value in config.items():
            if isinstance(value, list):
                config[key] = tuple(value)
        try:
            return cls(**config)
        except TypeError as error:  # for example a string instead of a number
            raise ValueError(f"the network's configuration has a value of the wrong type: {error}") from error

    def to_dict(self) -> dict:
        """Returns the content of `config.json`, without our own keys at their defaults, so that diffusers opens it."""
        config = asdict(self)
        for key, default in (("patch_size", 1), ("class_names", None)):
            if config[key] == default:
                del config[key]
        return config

    @property
    def null_label(self) -> int | None:
        """The label that means "no class", or None if the network was trained without one."""
        if self.class_names and len(self.class_names) + 1 == self.num_class_embeds:
            return len(self.class_names)
        return None

    @property
    def class_count(self) -> int:
        """Number of classes, without "no class"; 0 for a network without classes."""
        return (self.num_class_embeds or 0) - (self.null_label is not None)

    @property
    def image_channels(self) -> int:
        return self.in_channels // self.patch_size**2

    @property
    def image_size(self) -> tuple[int, int] | None:
        """(height, width) of the images in pixels, or None if the configuration does not tell."""
        if self.sample_size is None:
            return None
        sides = self.sample_size
        if isinstance(sides, int):
            sides = (sides, sides)
        return sides[0] * self.patch_size, sides[1] * self.patch_size

    @property
    def divisor(self) -> int:
        """Image height and width must be multiples of this: patch size, times 2 for each level but the last."""
        return self.patch_size * 2 ** (len(self.block_out_channels) - 1)


# ---- the network -----------------------------------------------------------------------------------------------------


def zeroed(module: nn.Module) -> nn.Module:
    """Sets a module's parameters to 0, to start a residual branch or the output there (Goyal et al. 2017)."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


class Conv2d(nn.Conv2d):
    """A convolution whose weights can be stored in the layout of oneDNN's bf16 kernels.

    PyTorch otherwise converts them in each call, which takes longer than the convolution of a small image. The result
    is bit-identical.
    """

    packed: Tensor | None = None

    def pack(self) -> None:
        """Converts the weights. They can then no longer be copied, moved, cast or saved."""
        with suppress(AttributeError, RuntimeError):  # this processor or this PyTorch does not support it
            self.convolve = torch.ops.mkldnn._convolution_pointwise
            how = self.padding, self.stride, self.dilation, self.groups
            self.packed = torch._C._nn.mkldnn_reorder_conv2d_weight(self.weight.to_mkldnn(), *how)
            self.weight.data = self.weight.new_empty(0)

    def forward(self, x: Tensor) -> Tensor:
        if self.packed is None:
            return super().forward(x)
        how = self.padding, self.stride, self.dilation, self.groups
        return self.convolve(x, self.packed, self.bias, *how, "none", [], "")


def can_pack(weight: Tensor) -> bool:
    """Returns whether a weight is of a type that Conv2d.pack supports: bf16 on an x86 CPU with oneDNN."""
    mkldnn = torch.backends.mkldnn
    x86 = weight.device.type == "cpu" and platform.machine().lower() in ("x86_64", "amd64")
    return x86 and weight.dtype == torch.bfloat16 and mkldnn.is_available() and mkldnn.enabled


class Resnet(nn.Module):
    """norm, SiLU, conv, time embedding, norm, SiLU, dropout, conv; plus the input (by a 1x1 conv if widths differ)."""

    def __init__(self, config: UNetConfig, in_channels: int, out_channels: int, scale: float = 1):
        super().__init__()
        groups, eps, time_dim = config.norm_num_groups, config.norm_eps, time_embedding_dim(config)
        self.scale_shift = config.resnet_time_scale_shift == "scale_shift"
        self.scale = scale
        self.norm1 = nn.GroupNorm(groups, in_channels, eps)
        self.conv1 = Conv2d(in_channels, out_channels, 3, padding=1)
        self.emb_channels = 2 * out_channels if self.scale_shift else out_channels
        self.time_emb_proj = nn.Linear(time_dim, self.emb_channels)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps)
        self.dropout = nn.Dropout(config.dropout)
        self.conv2 = zeroed(Conv2d(out_channels, out_channels, 3, padding=1))
        self.conv_shortcut = Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """x (B, in, H, W) and the time embedding after `time_emb_proj` (B, out or 2 out) -> (B, out, H, W)."""
        emb = emb[:, :, None, None]
        h = self.conv1(F.silu(self.norm1(x)))
        if self.scale_shift:
            scale, shift = emb.chunk(2, dim=1)
            h = self.norm2(h) * (1 + scale) + shift
        else:
            h = self.norm2(h + emb)
        h = self.conv2(self.dropout(F.silu(h)))
        if self.conv_shortcut is not None:
            x = self.conv_shortcut(x)
        return residual(x, h, self.scale)


def residual(x: Tensor, h: Tensor, scale: float) -> Tensor:
    if scale == 1:
        return x + h
    return (x + h) / scale


class Attention(nn.Module):
    """Self-attention over all pixels, with a residual connection (Vaswani et al. 2017, eq. 1)."""

    def __init__(self, config: UNetConfig, channels: int, groups: int | None, scale: float = 1):
        super().__init__()
        if channels % (head_dim := config.attention_head_dim or channels):
            raise ValueError(f"{channels} channels do not divide into heads of {head_dim}")
        self.heads = channels // head_dim
        self.scale = scale
        self.group_norm = nn.GroupNorm(groups, channels, config.norm_eps) if groups else None
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([zeroed(nn.Linear(channels, channels))])
        self.to_qkv: nn.Linear | None = None  # for drawing: the three above in one

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        h = x
        if self.group_norm is not None:
            h = self.group_norm(x)
        h = h.flatten(2).transpose(1, 2)  # (B, HW, C), without a copy if channels are last
        split = (batch, height * width, self.heads, channels // self.heads)
        if self.to_qkv is None:
            q, k, v = self.to_q(h), self.to_k(h), self.to_v(h)
        else:
            q, k, v = self.to_qkv(h).chunk(3, dim=2)
        q, k, v = (part.view(split).transpose(1, 2) for part in (q, k, v))
        h = F.scaled_dot_product_attention(q, k, v)  # (B, heads, HW, head_dim)
        h = self.to_out[0](h.transpose(1, 2).flatten(2))  # (B, HW, C)
        h = h.transpose(1, 2).unflatten(2, (height, width))  # (B, C, H, W)
        return residual(x, h, self.scale)


class Downsample(nn.Module):
    """Halves height and width by a convolution of stride 2."""

    def __init__(self, channels: int, padding: int):
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, stride=2, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        if not self.conv.padding[0]:
            x = F.pad(x, (0, 1, 0, 1))
        return self.conv(x)


class Upsample(nn.Module):
    """Doubles height and width: nearest-neighbour interpolation, then a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Block(nn.Module):
    """One level: resnets, each followed by attention if the level has it, then down- or upsampling if there is any."""

    def __init__(self, config: UNetConfig, widths: list[tuple[int, int]], attention: bool, **resample):
        super().__init__()
        self.resnets = nn.ModuleList(Resnet(config, *width) for width in widths)
        self.attentions = nn.ModuleList(
            Attention(config, width[1], config.norm_num_groups) if attention else nn.Identity() for width in widths
        )
        for name, module in resample.items():  # `downsamplers` or `upsamplers`, a list of one, as the files name it
            self.add_module(name, nn.ModuleList([module]))


class MidBlock(nn.Module):
    """The lowest level: a resnet, attention, a resnet."""

    def __init__(self, config: UNetConfig):
        super().__init__()
        channels, scale = config.block_out_channels[-1], config.mid_block_scale_factor
        groups = config.attn_norm_num_groups
        if config.resnet_time_scale_shift == "default":  # with "scale_shift" diffusers has no norm here by default
            groups = groups or config.norm_num_groups
        self.resnets = nn.ModuleList(Resnet(config, channels, channels, scale) for _ in range(2))
        attention = Attention(config, channels, groups, scale) if config.add_attention else nn.Identity()
        self.attentions = nn.ModuleList([attention])

    def forward(self, h: Tensor, embs: Iterator[Tensor]) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](h, next(embs))), next(embs))


class TimeEmbedding(nn.Module):
    """An MLP on the sinusoids of the timestep."""

    def __init__(self, in_dim: int, dim: int):
        super().__init__()
        self.linear_1 = nn.Linear(in_dim, dim)
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


def time_embedding_dim(config: UNetConfig) -> int:
    return config.time_embedding_dim or 4 * config.block_out_channels[0]


def sinusoids(t: Tensor, dim: int, freq_shift: int, flip: bool) -> Tensor:
    """(B,) timesteps -> (B, dim) float32 sines and cosines of geometric frequencies (Vaswani et al. 2017, 3.5)."""
    half = dim // 2
    # The order of operations is that of diffusers: one bit of a frequency changes an angle near 1000 by 6e-5.
    exponent = -math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / (half - freq_shift)
    angles = t.float()[:, None] * torch.exp(exponent)
    parts = [angles.sin(), angles.cos()]
    if flip:
        parts.reverse()
    return torch.cat(parts, dim=1)


class UNet(nn.Module):
    """The network: `network(x, t, labels)` maps noisy images, timesteps and class labels to the prediction."""

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        widths, layers, time_dim = config.block_out_channels, config.layers_per_block, time_embedding_dim(config)
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.time_embedding = TimeEmbedding(widths[0], time_dim)
        count = config.num_class_embeds
        self.class_embedding = nn.Embedding(count, time_dim) if count else None

        self.down_blocks = nn.ModuleList()
        skips = [widths[0]]  # channels of each skip connection, in the order they are pushed
        for i, (kind, width) in enumerate(zip(config.down_block_types, widths, strict=True)):
            pairs = [(skips[-1] if j == 0 else width, width) for j in range(layers)]
            resample = {}
            if i < last:
                resample = {"downsamplers": Downsample(width, config.downsample_padding)}
            self.down_blocks.append(Block(config, pairs, kind.startswith("Attn"), **resample))
            skips += [width] * (layers + len(resample))
        self.mid_block = MidBlock(config) if config.mid_block_type else None
        self.up_blocks = nn.ModuleList()
        channels = widths[-1]
        for i, (kind, width) in enumerate(zip(config.up_block_types, reversed(widths), strict=True)):
            pairs = [((channels if j == 0 else width) + skips.pop(), width) for j in range(layers + 1)]
            resample = {}
            if i < last:
                resample = {"upsamplers": Upsample(width)}
            self.up_blocks.append(Block(config, pairs, kind.startswith("Attn"), **resample))
            channels = width

        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, widths[0], config.norm_eps)
        self.conv_out = zeroed(nn.Conv2d(widths[0], config.out_channels, 3, padding=1))
        self.to_embs: nn.Linear | None = None  # for drawing: `time_emb_proj` of all resnets in one

    def resnets(self) -> list[Resnet]:
        """All resnets, in the order in which they are applied."""
        blocks = [*self.down_blocks, self.mid_block, *self.up_blocks]
        return [resnet for block in blocks if block is not None for resnet in block.resnets]

    def embed(self, t: Tensor, labels: Tensor | None) -> Sequence[Tensor]:
        """Embeds timesteps and labels (B,): for each resnet, in order, a tensor (B, its emb_channels)."""
        config = self.config
        emb = sinusoids(t, config.block_out_channels[0], config.freq_shift, config.flip_sin_to_cos)
        emb = self.time_embedding(emb.to(self.conv_in.weight.dtype))
        if labels is not None:
            emb = emb + self.class_embedding(labels)
        emb = F.silu(emb)
        if self.to_embs is None:
            return [resnet.time_emb_proj(emb) for resnet in self.resnets()]
        return self.to_embs(emb).split([resnet.emb_channels for resnet in self.resnets()], dim=1)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """x (B, C, H, W), t (B,) timesteps, labels (B,) int64 -> prediction (B, C, H, W) in the network's dtype."""
        if (labels is None) != (self.class_embedding is None):
            raise ValueError("a class-conditional network needs labels, and an unconditional one takes none")
        embs = iter(self.embed(t, labels))
        x = x.to(self.conv_in.weight.dtype)
        if self.config.center_input_sample:
            x = 2 * x - 1
        x = F.pixel_unshuffle(x, self.config.patch_size)  # (B, C p^2, H/p, W/p)
        h = self.conv_in(x.contiguous(memory_format=torch.channels_last))
        skips = [h]
        for block in self.down_blocks:
            for resnet, attention in zip(block.resnets, block.attentions, strict=True):
                h = attention(resnet(h, next(embs)))
                skips.append(h)
            if hasattr(block, "downsamplers"):
                h = block.downsamplers[0](h)  # half the height and width
                skips.append(h)
        if self.mid_block is not None:
            h = self.mid_block(h, embs)
        for block in self.up_blocks:
            for resnet, attention in zip(block.resnets, block.attentions, strict=True):
                h = attention(resnet(torch.cat([h, skips.pop()], dim=1), next(embs)))
            if hasattr(block, "upsamplers"):
                h = block.upsamplers[0](h)  # twice the height and width
        h = self.conv_out(F.silu(self.conv_norm_out(h)))
        return F.pixel_shuffle(h, self.config.patch_size)  # (B, C, H, W)


def for_drawing(network: UNet, device: torch.device, dtype: torch.dtype, packed: bool = True) -> UNet:
    """Returns a copy of a network for drawing: faster, equal up to rounding, and impossible to train or save.

    It has one matrix product for q, k and v, one for the time embeddings of all resnets and, with `packed`, the
    convolutions of Conv2d.pack, which torch.compile does not support. Unchanged weights share memory with the network.
    """
    with torch.device("meta"):
        copy = UNet(network.config)
    copy.load_state_dict(network.state_dict(), assign=True)
    copy.to(device=device, dtype=dtype, memory_format=torch.channels_last).eval().requires_grad_(False)
    for module in list(copy.modules()):
        if isinstance(module, Attention):
            module.to_qkv = concatenated([module.to_q, module.to_k, module.to_v])
            del module.to_q, module.to_k, module.to_v
        elif isinstance(module, Conv2d) and packed and can_pack(module.weight):
            module.pack()
    copy.to_embs = concatenated([resnet.time_emb_proj for resnet in copy.resnets()])
    for resnet in copy.resnets():
        del resnet.time_emb_proj
    return copy


def concatenated(layers: list[nn.Linear]) -> nn.Linear:
    """Returns one layer without gradients whose output is that of the given layers, concatenated."""
    layer = nn.Linear(layers[0].in_features, sum(part.out_features for part in layers), device="meta")
    for name in ("weight", "bias"):
        values = torch.cat([getattr(part, name) for part in layers])
        setattr(layer, name, nn.Parameter(values, requires_grad=False))
    return layer


def flops(config: UNetConfig, size: tuple[int, int]) -> int:
    """Counts floating-point operations of a forward pass for one image of (height, width); a multiply-add is 2."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        labels = torch.zeros(1, dtype=torch.int64) if config.num_class_embeds else None
        UNet(config)(torch.zeros(1, config.image_channels, *size), torch.zeros(1, dtype=torch.int64), labels)
    return counter.get_total_flops()


# ---- weights ---------------------------------------------------------------------------------------------------------

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
MAX_HEADER = 100_000_000  # bytes, the official package's limit
LEGACY_NAMES = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}


def write_safetensors(tensors: dict[str, Tensor], file) -> None:
    """Writes named tensors, sorted by name, to a binary file in the safetensors format.

    Format: 8 bytes little-endian header length, JSON header {name: {dtype, shape, data_offsets}}, then the data.
    """
    names = {dtype: name for name, dtype in DTYPES.items()}
    header = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in sorted(tensors.items()):
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # spaces, so that the data begins at a multiple of 8
    file.write(len(text).to_bytes(8, "little") + text)
    for _, tensor in sorted(tensors.items()):
        file.write(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())


def read_safetensors(path: str | os.PathLike) -> dict[str, Tensor]:
    """Reads a safetensors file of floating-point tensors.

    Raises ValueError, one sentence, for any violation of the format: length and JSON of the header, dtypes, shapes,
    offsets that leave a hole or overlap, trailing bytes.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER):
            raise ValueError("is truncated or not a safetensors file: its header does not fit")
        entries = _parse_header(file.read(length))
        end = 0
        for entry in sorted(entries, key=lambda entry: (entry.begin, entry.end)):
            if entry.begin != end or entry.end - entry.begin != math.prod(entry.shape) * entry.dtype.itemsize:
                raise ValueError(f"is damaged: the bytes of {entry} overlap, leave a hole or do not fit its shape")
            end = entry.end
        start = 8 + length
        if start + end != size:
            raise ValueError(f"is damaged: {start + end} bytes expected, {size} found")
        tensors = {}
        for entry in entries:
            values = torch.empty(math.prod(entry.shape), dtype=entry.dtype)  # read in place: one copy in memory
            file.seek(start + entry.begin)
            if file.readinto(values.view(torch.uint8).numpy()) != entry.end - entry.begin:
                raise ValueError(f"is truncated: it ends inside {entry}")
            tensors[entry.name] = values.reshape(entry.shape)
    return tensors


@dataclass(frozen=True)
class Entry:
    """A tensor as the header of a safetensors file describes it."""

    name: str
    dtype: torch.dtype
    shape: list[int]
    begin: int  # bytes, from the end of the header
    end: int

    def __str__(self) -> str:
        return f"tensor {self.name[:80]!r}"


def _parse_header(text: bytes) -> list[Entry]:
    """Parses the JSON header. Raises ValueError for anything that the format does not allow."""
    try:
        if not text.startswith(b"{"):  # "must begin with a { character"
            raise ValueError("it is not an object")
        header = parse_object(text)  # "Duplicate keys are disallowed."
    except ValueError as error:
        raise ValueError(f"has a damaged header: {str(error)[:100]}") from error
    metadata = header.pop("__metadata__", {})  # "Arbitrary JSON is not allowed, all values must be strings."
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("has a damaged header: __metadata__ must map names to strings")
    entries = []
    for name, entry in header.items():
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            raise ValueError(f"has a damaged header: tensor {name[:80]!r} needs exactly dtype, shape and data_offsets")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise ValueError(f"has tensor {name[:80]!r} of a dtype that is not one of {', '.join(DTYPES)}")
        if not _are_sizes(shape, at_most=8) or not _are_sizes(offsets, at_most=2) or len(offsets) != 2:
            raise ValueError(f"has a damaged header: shape or offsets of tensor {name[:80]!r}")
        entries.append(Entry(name, DTYPES[dtype], shape, *offsets))
    return entries


def parse_object(text: bytes) -> dict:
    """Parses a JSON object in UTF-8. Raises ValueError for anything else, and for names that occur twice."""

    def no_duplicates(pairs):
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a name occurs twice")
        return dict(pairs)

    try:
        content = json.loads(text.decode("utf-8"), object_pairs_hook=no_duplicates)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(content, dict):
        raise ValueError("it is not an object")
    return content


def _are_sizes(values, at_most: int) -> bool:
    if not isinstance(values, list) or len(values) > at_most:
        return False
    return all(type(value) is int and 0 <= value < 2**48 for value in values)


def read_weights(path: str | os.PathLike) -> dict[str, Tensor]:
    """Reads named tensors from `.safetensors`, or from a `.bin` of torch.save with weights_only, which runs no code.

    Renames the tensors of old diffusers files. Raises ValueError, which says what is wrong with the file.
    """
    read = read_safetensors if str(path).endswith(".safetensors") else _read_bin
    tensors = read(path)
    for old, new in LEGACY_NAMES.items():
        tensors = {name.replace(old, new): tensor for name, tensor in tensors.items()}
    return tensors


def _read_bin(path: str | os.PathLike) -> dict[str, Tensor]:
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # torch.load raises many types for a damaged file
        raise ValueError("is damaged, or holds more than tensors") from error
    if not isinstance(tensors, dict):
        raise ValueError("does not hold named tensors")
    for name, value in tensors.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ValueError("does not hold named tensors")
        # An expanded tensor of 4 bytes may claim terabytes; sparse, meta and nested ones have no plain storage.
        plain = value.layout == torch.strided and value.device.type == "cpu" and value.dtype in DTYPES.values()
        if not plain or value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise ValueError(f"has tensor {name[:80]!r} that is not a plain floating-point tensor")
    return tensors


def build(config: UNetConfig, weights: dict[str, Tensor]) -> UNet:
    """Makes a network with these weights, in float32 and evaluation mode.

    Raises ValueError, which names the tensor, if one is missing, unexpected or of another shape, before anything is
    allocated, or if a value is not finite.
    """
    with torch.device("meta"):
        network = UNet(config)
    expected = network.state_dict()
    for name in sorted(expected.keys() | weights.keys()):
        if name not in weights:
            raise ValueError(f"lacks tensor {name[:80]!r}")
        if name not in expected:
            raise ValueError(f"has an unexpected tensor {name[:80]!r}")
        if weights[name].shape != expected[name].shape:
            shapes = f"{tuple(weights[name].shape)}, not {tuple(expected[name].shape)}"
            raise ValueError(f"has tensor {name!r} of shape {shapes}")
    weights = {name: tensor.float() for name, tensor in weights.items()}
    for name, tensor in weights.items():
        if not tensor.isfinite().all():
            raise ValueError(f"has a value in tensor {name!r} that is not finite in float32")
    network.load_state_dict(weights, assign=True)
    return network.to(memory_format=torch.channels_last).eval()
