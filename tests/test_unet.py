"""The network against diffusers' UNet2DModel, and its weights' files against the safetensors package."""

import io
import json
import math
import pathlib
import platform
import struct
import tracemalloc
from collections import OrderedDict

import pytest
import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from diffusers import UNet2DModel
from diffusers.models.attention_processor import Attention, AttnProcessor
from diffusers.models.embeddings import get_timestep_embedding
from torch.utils.flop_counter import FlopCounterMode

import sample
import unet
from unet import UNet, UNetConfig

PLAIN = ("DownBlock2D", "UpBlock2D")
ATTN = ("AttnDownBlock2D", "AttnUpBlock2D")


def blocks(down: str, up: str) -> dict:
    """Block types from letters: "ppa" is two plain levels and one with attention."""
    return {
        "down_block_types": [(ATTN if c == "a" else PLAIN)[0] for c in down],
        "up_block_types": [(ATTN if c == "a" else PLAIN)[1] for c in up],
    }


GOOGLE = {
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
    "attention_head_dim": None,
    "norm_num_groups": 4,
}
SMALL = {"block_out_channels": [8, 16], "norm_num_groups": 4, "attention_head_dim": 4, **blocks("pa", "ap")}
CONFIGS = {
    "butterfly": {
        "block_out_channels": [8, 8, 16, 16, 24, 24],
        "norm_num_groups": 4,
        "layers_per_block": 2,
        "sample_size": 32,
        **blocks("ppppap", "papppp"),
    },
    "google-cifar10": {
        **GOOGLE,
        "block_out_channels": [8, 16, 16, 16],
        **blocks("papp", "ppap"),
        "sample_size": 16,
    },
    "google-church": {**GOOGLE, "block_out_channels": [8, 8, 16, 16, 24, 24], **blocks("ppppap", "papppp")},
    "attention-everywhere": {**SMALL, "block_out_channels": [8, 16, 24], **blocks("aaa", "aaa")},
    "attention-up-differs-from-down": {**SMALL, "block_out_channels": [8, 16, 24], **blocks("app", "apa")},
    "one-head": {**SMALL, "attention_head_dim": None},
    "head-dim-left-out": {**{k: v for k, v in SMALL.items() if k != "attention_head_dim"}},
    "scale-shift": {**SMALL, "resnet_time_scale_shift": "scale_shift"},
    "scale-shift-mid-norm": {**SMALL, "resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 2},
    "mid-norm-groups": {**SMALL, "attn_norm_num_groups": 8},
    "classes": {**SMALL, "num_class_embeds": 5},
    "one-layer": {**SMALL, "layers_per_block": 1},
    "three-layers": {**SMALL, "layers_per_block": 3},
    "mid-scale": {**SMALL, "mid_block_scale_factor": 1.7},
    "centered-swish": {**SMALL, "center_input_sample": True, "act_fn": "swish"},
    "no-mid-attention": {**SMALL, "add_attention": False},
    "no-mid-block": {**SMALL, "mid_block_type": None},
    "time-dim": {**SMALL, "time_embedding_dim": 20},
    "channels-1-to-2": {**SMALL, "in_channels": 1, "out_channels": 2},
    "one-level": {**SMALL, "block_out_channels": [8], **blocks("a", "p")},
}
SIZES = {"butterfly": (32, 64), "google-church": (64, 32), "google-cifar10": (16, 16)}  # the rest: (8, 12)


def randomised(module, seed=0):
    """All parameters random, with activations of order one: a fresh network's zeros would hide errors."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(noise / math.sqrt(parameter[0].numel()))
            else:
                parameter.copy_(0.3 * noise + ("norm" in name and name.endswith("weight")))
    return module


def pair(name):
    """diffusers' network and ours with the same random weights, and an input for them."""
    peer = randomised(UNet2DModel(**CONFIGS[name])).eval()
    ours = unet.build(UNetConfig.from_dict(CONFIGS[name]), peer.state_dict())
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, ours.config.in_channels, *SIZES.get(name, (8, 12)), generator=generator)
    labels = torch.tensor([4, 0, 2]) if ours.config.num_class_embeds else None
    return peer, ours, x, torch.tensor([0, 37, 999]), labels


def error(a, b):
    """Largest difference relative to the largest value."""
    return float((a - b).abs().max() / b.abs().max())


PATCH_2 = {"patch_size": 2, "in_channels": 12, "out_channels": 12}


def tiny(**changes) -> UNetConfig:
    return UNetConfig.from_dict({**SMALL, **changes})


# ---- the network -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_forward_is_that_of_diffusers(name):
    peer, ours, x, t, labels = pair(name)
    with torch.no_grad():
        expected, found = peer(x, t, labels).sample, ours(x, t, labels)
    assert found.dtype == torch.float32 and found.shape == expected.shape
    assert expected.std() > 0.05  # a network that says nothing would agree with anything
    assert error(found, expected) < 1e-5


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_are_those_of_diffusers(name):
    """In float64, where a wrong gradient cannot be taken for rounding."""
    peer, ours, x, t, labels = pair(name)
    gradients = []
    weight = torch.randn(len(x), ours.config.out_channels, *x.shape[2:], dtype=torch.float64)
    for network in (peer.double(), ours.double()):
        sample = x.double().requires_grad_()
        out = network(sample, t, labels)
        ((out if network is ours else out.sample) * weight).sum().backward()
        gradients.append({"x": sample.grad, **{n: p.grad for n, p in network.named_parameters()}})
    expected, found = gradients
    assert expected.keys() == found.keys()
    largest = max(float(g.abs().max()) for g in expected.values())
    for n in expected:  # some are zero in exact arithmetic (a key's bias): measure those against the largest
        scale = max(float(expected[n].abs().max()), 1e-4 * largest)
        assert float((found[n] - expected[n]).abs().max()) < 1e-10 * scale, n


@pytest.mark.parametrize("name", CONFIGS)
def test_state_dict_names_and_shapes_load_strictly_both_ways(name):
    peer = UNet2DModel(**CONFIGS[name])
    ours = UNet(UNetConfig.from_dict(CONFIGS[name]))
    ours.load_state_dict(peer.state_dict(), strict=True)
    peer.load_state_dict(ours.state_dict(), strict=True)
    assert {n: v.shape for n, v in peer.state_dict().items()} == {n: v.shape for n, v in ours.state_dict().items()}


@pytest.mark.parametrize(("dim", "shift", "flip"), [(32, 0, True), (128, 1, False)])
def test_sinusoids_are_those_of_the_paper(dim, shift, flip):
    """Against the formula in float64: float32 angles up to 1000 are good to about 1e-4."""
    t = torch.tensor([0, 1, 500, 999])
    found = unet.sinusoids(t, dim, shift, flip)
    for row, time in zip(found.double(), t.tolist(), strict=True):
        angles = [time * 10000 ** (-k / (dim // 2 - shift)) for k in range(dim // 2)]
        parts = [[math.sin(a) for a in angles], [math.cos(a) for a in angles]]
        expected = torch.tensor(sum(parts[::-1] if flip else parts, []), dtype=torch.float64)
        assert (row - expected).abs().max() < 2e-4


@pytest.mark.parametrize("dim", [8, 128, 224])
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("flip", [True, False])
def test_sinusoids_are_those_of_diffusers_to_the_bit(dim, shift, flip):
    """Rounding included: an angle near 1000 turns one unit in the last place of a frequency into 6e-5."""
    t = torch.arange(1000)
    expected = get_timestep_embedding(t, dim, flip_sin_to_cos=flip, downscale_freq_shift=shift)
    assert torch.equal(unet.sinusoids(t, dim, shift, flip), expected)


def test_parameter_counts_and_cost_of_the_published_networks():
    classic = UNetConfig.from_dict(
        {
            "block_out_channels": [128, 128, 256, 256, 512, 512],
            "sample_size": 128,
            **blocks("ppppap", "papppp"),
        }
    )
    cifar = UNetConfig.from_dict(
        {
            **GOOGLE,
            "norm_num_groups": 32,
            "block_out_channels": [128, 256, 256, 256],
            **blocks("papp", "ppap"),
        }
    )
    with torch.device("meta"):
        assert sum(p.numel() for p in UNet(classic).parameters()) == 113_673_219
        assert sum(p.numel() for p in UNet(cifar).parameters()) == 35_746_307
    assert round(unet.flops(classic, (128, 128)) / 1e9, 1) == 124.1
    assert unet.flops(tiny(patch_size=2, in_channels=12, out_channels=12), (16, 16)) == unet.flops(
        tiny(in_channels=12, out_channels=12), (8, 8)
    )


@pytest.mark.parametrize("name", ["butterfly", "classes"])
def test_flops_are_those_counted_in_a_real_pass_of_diffusers(name):
    """With its attention written out: the counter does not know the fused kernel of a CPU."""
    peer, ours, x, t, labels = pair(name)
    for module in peer.modules():
        if isinstance(module, Attention):
            module.set_processor(AttnProcessor())
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        peer(x[:1], t[:1], None if labels is None else labels[:1])
    assert unet.flops(ours.config, x.shape[2:]) == counter.get_total_flops()


def test_fresh_network_outputs_zero_and_its_residual_branches_are_the_identity():
    torch.manual_seed(0)
    network = UNet(tiny(num_class_embeds=3))
    x, emb = torch.randn(2, 16, 8, 8), torch.randn(2, 16)
    with torch.no_grad():
        out = network(torch.randn(2, 3, 8, 8), torch.tensor([3, 900]), torch.tensor([0, 2]))
        assert torch.equal(out, torch.zeros_like(out))
        assert torch.equal(network.mid_block(x, iter([emb, emb])), x)
        assert torch.equal(network.down_blocks[1].attentions[0](x), x)
        assert torch.equal(network.down_blocks[1].resnets[1](x, emb), x)
    trained = randomised(network)
    assert trained.mid_block(x, iter([emb, emb])).sub(x).abs().max() > 0.1  # the identity was the zeros' doing


def test_dropout_acts_in_training_alone():
    network = randomised(UNet(tiny(dropout=0.5)))
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([1, 2])
    with torch.no_grad():
        assert not torch.equal(network.train()(x, t), network(x, t))
        without = randomised(UNet(tiny(dropout=0.0)))
        assert torch.equal(network.eval()(x, t), without(x, t))


def test_bfloat16_is_near_float32():
    _, ours, x, t, labels = pair("butterfly")
    with torch.no_grad():
        expected = ours(x, t, labels)
        found = ours.bfloat16()(x, t, labels)
    assert found.dtype == torch.bfloat16
    assert 0 < error(found.float(), expected) < 0.1


@pytest.mark.parametrize("name", CONFIGS)
def test_a_copy_for_drawing_computes_the_same_as_diffusers_and_leaves_the_network_as_it_is(name):
    """q, k and v by one product, and all projections of the embeddings, of images at different timesteps."""
    peer, ours, x, t, labels = pair(name)
    before = {key: value.clone() for key, value in ours.state_dict().items()}
    copy = unet.for_drawing(ours, "cpu", torch.float32)
    with torch.no_grad():
        for times in (t, t.flip(0), torch.tensor([37, 37, 37])):
            assert error(copy(x, times, labels), peer(x, times, labels).sample) < 1e-5
    assert sum(v.numel() for v in copy.parameters()) == sum(v.numel() for v in ours.parameters())
    assert not any("to_q." in key or "time_emb_proj" in key for key in copy.state_dict())
    assert ours.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in ours.state_dict().items())


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_convolutions_give_the_same_bits(name):
    _, ours, x, t, labels = pair(name)
    plain, packed = (unet.for_drawing(ours, "cpu", torch.bfloat16, packed=packed) for packed in (False, True))
    inner = [module for module in packed.modules() if isinstance(module, unet.Conv2d)]
    if platform.machine() in ("x86_64", "AMD64") and sample.has_bf16(torch.device("cpu")):
        assert inner and all(module.packed is not None and not module.weight.numel() for module in inner)
    assert all(module.packed is None for module in plain.modules() if isinstance(module, unet.Conv2d))
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(packed(x, t, labels), plain(x, t, labels))


@pytest.mark.parametrize("missing", ["switch", "function", "processor"])
def test_where_convolutions_cannot_be_packed_they_stay_as_they_are(missing, monkeypatch):
    def refuse(*args):
        raise RuntimeError("mkldnn_reorder_conv2d_weight: bf16 path needs the cpu support avx512bw")

    if missing == "switch":
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    elif missing == "function":
        monkeypatch.delattr(torch._C._nn, "mkldnn_reorder_conv2d_weight")
    else:
        monkeypatch.setattr(torch._C._nn, "mkldnn_reorder_conv2d_weight", refuse)
    network = unet.for_drawing(UNet(tiny()), "cpu", torch.bfloat16)
    assert all(module.packed is None and module.weight.numel() for module in network.modules()
               if isinstance(module, unet.Conv2d))  # fmt: skip


def test_labels_are_needed_exactly_where_there_are_classes():
    x, t = torch.zeros(1, 3, 8, 8), torch.tensor([0])
    for network, labels in ((UNet(tiny()), torch.tensor([0])), (UNet(tiny(num_class_embeds=2)), None)):
        with pytest.raises(ValueError, match="labels"):
            network(x, t, labels)


def test_memory_format_of_the_input_changes_nothing():
    _, ours, x, t, _ = pair("attention-everywhere")
    with torch.no_grad():
        found = [ours(v, t) for v in (x, x.contiguous(memory_format=torch.channels_last), x.mT.contiguous().mT)]
    assert found[0].is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    seen, network = [], UNet(tiny())  # a network in training, whose weights nobody has converted
    network.conv_in.register_forward_hook(lambda module, inputs, output: seen.extend([inputs[0], output]))
    network(x, t)
    assert all(v.is_contiguous(memory_format=torch.channels_last) for v in seen)


# ---- patches -----------------------------------------------------------------------------------------------


def patched(p=2, colours=3):
    config = tiny(in_channels=colours * p * p, out_channels=colours * p * p, patch_size=p)
    return randomised(UNet(config)).eval()


@pytest.mark.parametrize("p", [2, 4])
def test_patches_put_each_pixel_in_its_channel(p):
    """Channel c p^2 + i p + j of the inner network is colour c at row i, column j of each patch."""
    network = patched(p)
    seen = {}
    network.conv_in.register_forward_hook(lambda module, inputs, output: seen.update(inside=inputs[0]))
    network.conv_out.register_forward_hook(lambda module, inputs, output: seen.update(out=output))
    x = torch.randn(2, 3, 4 * p, 6 * p)
    with torch.no_grad():
        result = network(x, torch.tensor([1, 700]))
    assert seen["inside"].shape == (2, 3 * p * p, 4, 6) and result.shape == x.shape
    for c in range(3):
        for i in range(p):
            for j in range(p):
                k = c * p * p + i * p + j
                assert torch.equal(seen["inside"][:, k], x[:, c, i::p, j::p])
                assert torch.equal(result[:, c, i::p, j::p], seen["out"][:, k])


def test_patches_are_a_plain_unet2dmodel_between_two_shuffles():
    network = patched()
    config = network.config.to_dict()
    assert config.pop("patch_size") == 2
    peer = UNet2DModel(**config).eval()
    peer.load_state_dict(network.state_dict(), strict=True)
    x, t = torch.randn(2, 3, 16, 8), torch.tensor([5, 500])
    with torch.no_grad():
        expected = F.pixel_shuffle(peer(F.pixel_unshuffle(x, 2), t).sample, 2)
        assert error(network(x, t), expected) < 1e-5
    assert network.config.image_channels == 3 and network.config.divisor == 4


def test_image_size_counts_pixels():
    assert tiny().image_size is None and tiny().divisor == 2
    assert tiny(sample_size=8, in_channels=12, out_channels=12, patch_size=2).image_size == (16, 16)
    assert tiny(sample_size=[8, 12]).image_size == (8, 12)


# ---- configuration -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_config_round_trip_and_diffusers_opens_it(name):
    config = UNetConfig.from_dict({"_class_name": "UNet2DModel", **CONFIGS[name]})
    written = json.loads(json.dumps(config.to_dict()))
    assert UNetConfig.from_dict(written) == config and "patch_size" not in written
    peer = UNet2DModel.from_config(written)
    assert UNetConfig.from_dict(dict(peer.config)) == config  # as diffusers saves it, private keys included


def test_our_own_keys_are_written_only_where_they_say_something():
    plain = tiny(num_class_embeds=2)
    named = tiny(num_class_embeds=2, class_names=["peacock", "monarch"], **PATCH_2)
    written = json.loads(json.dumps(named.to_dict()))
    assert written.keys() - plain.to_dict().keys() == {"class_names", "patch_size"}
    assert UNetConfig.from_dict(written) == named
    assert UNet2DModel.from_config(written).config.num_class_embeds == 2  # which warns of our keys and goes on


def test_defaults_are_those_of_diffusers():
    """Files leave keys out and rely on them."""
    with torch.device("meta"):
        theirs = {k: v for k, v in UNet2DModel().config.items() if not k.startswith("_")}
    assert UNetConfig.from_dict(theirs) == UNetConfig()
    assert UNetConfig().to_dict().keys() == theirs.keys()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"surprise": 1}, "surprise"),
        ({"encoder_hid_dim": None}, "encoder_hid_dim"),
        ({"down_block_types": ["DownBlock2D", "SkipDownBlock2D"]}, "SkipDownBlock2D"),
        ({"down_block_types": ["DownBlock2D", "UpBlock2D"]}, "UpBlock2D"),
        ({"up_block_types": ["UpBlock2D", "ResnetUpsampleBlock2D"]}, "ResnetUpsampleBlock2D"),
        ({"mid_block_type": "UNetMidBlock2DCrossAttn"}, "UNetMidBlock2DCrossAttn"),
        ({"time_embedding_type": "fourier"}, "fourier"),
        ({"time_embedding_type": "learned"}, "learned"),
        ({"downsample_type": "resnet"}, "downsample_type"),
        ({"upsample_type": "resnet"}, "upsample_type"),
        ({"downsample_padding": 2}, "downsample_padding"),
        ({"act_fn": "gelu"}, "gelu"),
        ({"resnet_time_scale_shift": "ada_group"}, "ada_group"),
        ({"class_embed_type": "timestep"}, "class_embed_type"),
        ({"block_out_channels": [8, 16, 24]}, "block_out_channels"),
        ({"block_out_channels": [8, 18]}, "18"),
        ({"block_out_channels": [7, 14], "norm_num_groups": 7}, "block_out_channels"),
        ({"block_out_channels": [8, -16]}, "block_out_channels"),
        ({"block_out_channels": [8, 16.0]}, "block_out_channels"),
        ({"block_out_channels": 16}, "type"),
        ({"in_channels": 0}, "in_channels"),
        ({"in_channels": True}, "in_channels"),
        ({"in_channels": "3"}, "in_channels"),
        ({"layers_per_block": 0}, "layers_per_block"),
        ({"layers_per_block": 10**9}, "layers_per_block"),  # would build blocks for hours
        ({"attention_head_dim": 0}, "attention_head_dim"),
        ({"num_class_embeds": -1}, "num_class_embeds"),
        ({"time_embedding_dim": 1.5}, "time_embedding_dim"),
        ({"dropout": 1.0}, "dropout"),
        ({"dropout": "some"}, "type"),
        ({"dropout": math.nan}, "dropout"),
        ({"mid_block_scale_factor": 0}, "mid_block_scale_factor"),
        ({"mid_block_scale_factor": math.nan}, "mid_block_scale_factor"),
        ({"norm_eps": "tiny"}, "norm_eps"),
        ({"norm_eps": -1.0}, "norm_eps"),
        ({"norm_eps": math.nan}, "norm_eps"),
        ({"freq_shift": "1"}, "freq_shift"),
        ({"freq_shift": 4}, "freq_shift"),  # half of the first channels: a division by zero
        ({"center_input_sample": "no"}, "center_input_sample"),
        ({"flip_sin_to_cos": 1.5}, "flip_sin_to_cos"),
        ({"sample_size": "64"}, "sample_size"),
        ({"sample_size": -3}, "sample_size"),
        ({"sample_size": [1, 2, 3]}, "sample_size"),
        ({"in_channels": 6, "patch_size": 2}, "patch_size"),
        ({"in_channels": 12, "out_channels": 3, "patch_size": 2}, "patch_size"),
        ({"patch_size": 0}, "patch_size"),
        ({"class_names": "ab", "num_class_embeds": 2}, "class_names"),
        ({"class_names": [1, 2], "num_class_embeds": 2}, "class_names"),
        ({"class_names": ["a", "b", "c"], "num_class_embeds": 2}, "class_names"),
        ({"class_names": ["a"]}, "class_names"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_what_is_not_implemented_is_refused_by_name(change, named):
    with pytest.raises(ValueError, match=named) as caught:
        UNetConfig.from_dict({**SMALL, **change})
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 250


def test_heads_and_groups_that_do_not_divide_are_refused():
    for change in ({"attention_head_dim": 3}, {"attn_norm_num_groups": 5}):
        with pytest.raises(ValueError, match="divi"):
            UNet(tiny(**change))


# ---- safetensors -------------------------------------------------------------------------------------------


def tensors_of_all_kinds() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    tensors = {str(d).split(".")[1]: torch.randn(3, 5).to(d) for d in unet.DTYPES.values()}
    tensors["scalar"] = torch.tensor(1.5)
    tensors["empty"], tensors["empty.2d"] = torch.empty(0), torch.empty(0, 4)
    tensors["channels_last"] = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    tensors["strided"] = torch.randn(4, 6)[::2, 1::3]
    tensors["parameter"] = torch.nn.Parameter(torch.randn(7).bfloat16())  # odd bytes before what follows
    tensors['ünï "quoted"\\'] = torch.randn(2).double()
    return tensors


def same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape, name
        assert torch.equal(found[name], tensor), name


def written(tensors) -> bytes:
    file = io.BytesIO()
    unet.write_safetensors(tensors, file)
    return file.getvalue()


def test_the_official_package_opens_what_we_write(tmp_path):
    tensors = tensors_of_all_kinds()
    path = tmp_path / "x.safetensors"
    path.write_bytes(written(tensors))
    same(safetensors.torch.load_file(path), tensors)
    same(safetensors.torch.load(path.read_bytes()), tensors)
    same(unet.read_safetensors(path), tensors)
    path.write_bytes(written({}))
    assert safetensors.torch.load_file(path) == unet.read_safetensors(path) == {}
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}  # transformers and diffusers insist on it


@pytest.mark.parametrize("metadata", [None, {"format": "pt", "ünï": "x" * 1000}])
def test_we_open_what_the_official_package_writes(tmp_path, metadata):
    tensors = {name: tensor.detach().contiguous() for name, tensor in tensors_of_all_kinds().items()}
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file(tensors, path, metadata)
    same(unet.read_safetensors(path), tensors)
    same(unet.read_weights(path), tensors)


def test_our_file_is_the_same_whatever_the_order_of_the_names():
    tensors = tensors_of_all_kinds()
    assert written(tensors) == written(dict(reversed(tensors.items())))


def json_of(shape: bytes) -> bytes:
    return b'{"a":{"dtype":"F32","shape":[%s],"data_offsets":[0,8]}}' % shape


def with_header(header, data=b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(shape=(2,), begin=0, end=8, dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def one(changes=(), drop=None, data=bytes(8), **kw):
    fields = {**entry(**kw), **dict(changes)}
    fields.pop(drop, None)
    return with_header({"a": fields}, data)


def floats(*values):
    return one(data=struct.pack("<2f", *values))


NAN, INF = math.nan, math.inf
HOSTILE = {
    "empty file": b"",
    "7 bytes": bytes(7),
    "header length 0": bytes(8),
    "header length 2^63": struct.pack("<Q", 2**63) + b"{}",
    "header length 2^64-1": struct.pack("<Q", 2**64 - 1) + b"{}",
    "header length 2^40": struct.pack("<Q", 2**40) + b"{}",
    "header longer than the file": struct.pack("<Q", 3) + b"{}",
    "not JSON": with_header(b"{nonsense}"),
    "a list": with_header(b"[]"),
    "a list of names": with_header(b'["a"]'),
    "a number": with_header(b"1"),
    "null": with_header(b"null"),
    "text before": with_header(b" {}"),
    "text behind": with_header(b"{}{}"),
    "duplicate names": with_header(b'{"a":%s,"a":%s}' % ((json.dumps(entry()).encode(),) * 2), bytes(8)),
    "duplicate keys": with_header(json_of(b'2],"shape":[2'), bytes(8)),
    "deep lists": with_header(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "deep objects": with_header(b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
    "invalid UTF-8": with_header(b'{"\xff\xfe":1}'),
    "number of 10,000 digits": with_header(json_of(b"9" * 10_000)),
    "unknown dtype": one(dtype="F31"),
    "integers": one(dtype="I32"),
    "dtype no string": one({"dtype": 32}),
    "negative shape": one({"shape": [-2]}),
    "two negatives": one({"shape": [-1, -2]}),
    "float shape": one({"shape": [2.0]}),
    "bool shape": one({"shape": [True, 2]}),
    "NaN shape": one({"shape": [NAN]}),
    "string shape": one({"shape": "2"}),
    "null shape": one({"shape": None}),
    "shape too small": one({"shape": [1]}),
    "shape too large": one({"shape": [3]}),
    "shape of 2^40": one({"shape": [2**40]}),
    "bytes overflowing to 0": one({"shape": [2**32, 2**32]}, end=0, data=b""),
    "shape and offsets of 2^40": one({"shape": [2**40], "data_offsets": [0, 2**42]}),
    "hole at the start": one(begin=4, end=12, data=bytes(12)),
    "hole between": with_header({"a": entry(), "b": entry(begin=12, end=20)}, bytes(20)),
    "overlap": with_header({"a": entry(), "b": entry(begin=4, end=12)}, bytes(12)),
    "same bytes twice": with_header({"a": entry(), "b": entry()}, bytes(8)),
    "reversed": one(begin=8, end=0),
    "negative offsets": one(begin=-8, end=0),
    "float offsets": one({"data_offsets": [0.0, 8.0]}),
    "bool offsets": one({"data_offsets": [False, 8]}),
    "one offset": one({"data_offsets": [0]}),
    "three offsets": one({"data_offsets": [0, 8, 8]}),
    "beyond the end": one(data=bytes(7)),
    "trailing bytes": one(data=bytes(9)),
    "trailing bytes and no tensor": with_header({}, bytes(8)),
    "metadata of numbers": with_header({"__metadata__": {"step": 7}}),
    "metadata a list": with_header({"__metadata__": []}),
    "no dtype": one(drop="dtype"),
    "no shape": one(drop="shape"),
    "no offsets": one(drop="data_offsets"),
    "an extra key": one({"extra": 1}),
    "entry a list": with_header({"a": []}),
}
# Where we are stricter than the official package: dtypes no network here has, names that occur twice, keys that the
# format does not have, and a space before the header's brace.
STRICTER = {"integers", "duplicate names", "an extra key", "text before"}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_damaged_or_hostile_file_gets_one_sentence(tmp_path, name):
    path = tmp_path / "x.safetensors"
    path.write_bytes(HOSTILE[name])
    tracemalloc.start()
    with pytest.raises(ValueError) as caught:
        unet.read_safetensors(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20 * len(HOSTILE[name]) + 2**20
    message = str(caught.value)
    assert 10 < len(message) < 250 and "\n" not in message and message.isprintable()
    if name in STRICTER:
        assert safetensors.torch.load(HOSTILE[name]).keys() <= {"a"}
    else:
        with pytest.raises(safetensors.SafetensorError):
            safetensors.torch.load(HOSTILE[name])


def test_a_file_cut_anywhere_is_refused(tmp_path):
    whole = written({"a": torch.randn(4, 3), "b": torch.randn(5).bfloat16(), "c": torch.tensor(1.0)})
    path = tmp_path / "x.safetensors"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError):
            unet.read_safetensors(path)
    path.write_bytes(whole)
    assert unet.read_safetensors(path).keys() == {"a", "b", "c"}


# ---- .bin --------------------------------------------------------------------------------------------------


class Evil:
    """Unpickled, it writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (pathlib.Path.write_text, (pathlib.Path(self.path), "owned"))


def test_bin_is_read_without_running_code(tmp_path):
    tensors = {"a": torch.randn(3), "b": torch.randn(2, 2).bfloat16(), "n": torch.randn(2, 3, 4, 4).mT}
    path = tmp_path / "x.bin"
    torch.save(OrderedDict(tensors), path)
    same(unet.read_weights(path), tensors)
    torch.save(tensors, path, _use_new_zipfile_serialization=False)  # as written before torch 1.6
    same(unet.read_weights(path), tensors)
    mark = tmp_path / "mark"
    torch.save({"a": Evil(mark)}, path)
    with pytest.raises(ValueError, match="damaged|more than tensors"):
        unet.read_weights(path)
    assert not mark.exists()
    torch.load(path, weights_only=False)
    assert mark.exists()  # the file would have done it


@pytest.mark.filterwarnings("ignore:Validating sparse tensor")
@pytest.mark.parametrize(
    "content",
    [
        torch.ones(3),
        [torch.ones(3)],
        {"a": 1.0},
        {"a": {"b": torch.ones(1)}},
        {1: torch.ones(3)},
        {"a": torch.ones(1).expand(2**20, 2**20)},  # 4 bytes in the file, 4 TB as a tensor
        {"a": torch.ones(3, dtype=torch.complex64)},
        {"a": torch.ones(3).to_sparse()},
        {"a": torch.ones(3, device="meta")},
    ],
    ids=["tensor", "list", "number", "nested", "int-name", "expanded", "complex", "sparse", "meta"],
)
def test_bin_that_holds_anything_but_named_tensors_is_refused(tmp_path, content):
    path = tmp_path / "x.bin"
    torch.save(content, path)
    with pytest.raises(ValueError):
        unet.read_weights(path)


def test_damaged_bin_is_refused(tmp_path):
    path = tmp_path / "x.bin"
    torch.save({"a": torch.ones(300)}, path)
    whole = path.read_bytes()
    for content in (b"", b"nonsense", whole[:100], whole[: len(whole) // 2], whole[:-1]):
        path.write_bytes(content)
        with pytest.raises(ValueError):
            unet.read_weights(path)
    with pytest.raises(FileNotFoundError):
        unet.read_weights(tmp_path / "none.bin")


@pytest.mark.parametrize("suffix", ["bin", "safetensors"])
def test_legacy_attention_names_are_brought_up_to_date(tmp_path, suffix):
    state = randomised(UNet(tiny())).state_dict()
    new = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    old = {}
    for name, tensor in state.items():
        for now, then in new.items():
            name = name.replace(now, then)
        old[name] = tensor.clone()
    assert sum(name not in state for name in old) == 8 * 6  # weights and biases of six attentions
    path = tmp_path / f"x.{suffix}"
    (torch.save if suffix == "bin" else safetensors.torch.save_file)(old, path)
    same(unet.read_weights(path), state)


# ---- build -------------------------------------------------------------------------------------------------


def test_build_names_the_tensor_that_does_not_fit():
    config = tiny()
    state = UNet(config).state_dict()
    name = "mid_block.attentions.0.to_out.0.weight"
    cases = [
        ({n: v for n, v in state.items() if n != name}, f"lacks.*{name}"),
        ({**state, "extra.weight": torch.ones(1)}, "unexpected.*extra.weight"),
        ({**state, name: torch.ones(16, 8)}, rf"{name}.*\(16, 8\), not \(16, 16\)"),
        ({}, "lacks"),
    ]
    for weights, message in cases:
        with pytest.raises(ValueError, match=message):
            unet.build(config, weights)


def test_build_is_in_float32_and_evaluation_mode_and_channels_last():
    config = tiny(dropout=0.5)
    state = randomised(UNet(config)).bfloat16().state_dict()
    network = unet.build(config, state)
    assert not network.training
    same(network.state_dict(), {name: value.float() for name, value in state.items()})
    assert all(p.requires_grad and not p.is_meta for p in network.parameters())
    assert network.conv_in.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("suffix", ["bin", "safetensors"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", unet.DTYPES.values())
def test_one_value_that_is_not_finite_is_found(tmp_path, dtype, value, suffix):
    state = UNet(tiny()).state_dict()
    state["conv_in.bias"] = torch.zeros(8, dtype=dtype)
    state["conv_in.bias"][3] = value
    path = tmp_path / f"x.{suffix}"
    (torch.save if suffix == "bin" else safetensors.torch.save_file)(state, path)
    with pytest.raises(ValueError, match="conv_in.bias' that is not finite"):
        unet.build(tiny(), unet.read_weights(path))


def test_weights_too_large_for_float32_are_refused():
    """Finite in float64, infinite in the network."""
    state = UNet(tiny()).state_dict()
    state["conv_in.bias"] = torch.full((8,), 1e300, dtype=torch.float64)
    with pytest.raises(ValueError, match="conv_in.bias"):
        unet.build(tiny(), state)


@pytest.mark.parametrize("channels", [2**20, 2**40, 2**62])
@pytest.mark.parametrize("field", ["block_out_channels", "time_embedding_dim", "in_channels", "num_class_embeds"])
def test_a_huge_network_with_small_weights_is_refused_unallocated(field, channels):
    """2^20 channels are terabytes; 2^62 overflow the size of a tensor."""
    state = UNet(tiny()).state_dict()
    value = [channels, channels] if field == "block_out_channels" else channels
    with pytest.raises(ValueError):
        unet.build(tiny(**{field: value}), state)
