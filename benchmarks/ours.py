"""The calls of the benchmarks into this project's own modules, all in one place."""

import io
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor

import data
import ddpm
import monitor
import sample
import train
import unet

DEFAULT_MODEL = sample.DEFAULT_MODEL
DEFAULT_SAMPLER, DEFAULT_STEPS = ddpm.DEFAULT_SAMPLER, ddpm.DEFAULT_STEPS
SYNTHETIC = "synthetic"  # source of synthetic butterflies

InputError = data.InputError
set_threads = sample.set_threads
save_model = sample.save_model
compile_network = sample.compile_for_drawing  # of a network that `prepared` has left unpacked
flops = unet.flops
png = data.encode_png
grid = data.grid


# ---- models and sampling ---------------------------------------------------------------------------------------------


def load(folder: Path) -> sample.Model:
    device = sample.choose_device()
    return sample.load(folder, device, sample.choose_precision(device))


def prepared(network: unet.UNet, precision: str = "bf16", packed: bool = True) -> unet.UNet:
    """Returns a copy of a network prepared for sampling, as sample.py does."""
    return unet.for_drawing(network, torch.device("cpu"), sample.PRECISIONS[precision], packed)


def network_of(config: dict) -> unet.UNet:
    return prepared(unet.UNet(unet.UNetConfig(**config)))


def same_network(peer, precision: str = "bf16", packed: bool = True) -> unet.UNet:
    """Builds our network with the weights of a UNet2DModel."""
    config = unet.UNetConfig.from_dict(dict(peer.config))
    weights = {name: tensor.float().clone() for name, tensor in peer.state_dict().items()}
    return prepared(unet.build(config, weights), precision, packed)


def untrained(preset: str) -> tuple[unet.UNet, ddpm.Schedule]:
    config, schedule = train.make_configs(train.DEFAULTS | train.PRESETS[preset], ())
    return unet.UNet(config), schedule


def preset_model(name: str, size: int | None = None) -> sample.Model:
    """Builds an untrained model of a preset, at the preset's image size or another."""
    network, schedule = untrained(name)
    network = prepared(network)
    if size:
        network.config = replace(network.config, sample_size=size // network.config.patch_size)
    return model_of(network, schedule)


def model_of(network: unet.UNet, schedule: ddpm.Schedule | None = None) -> sample.Model:
    return sample.Model(network, schedule or ddpm.Schedule(), Path(), "", torch.device("cpu"), "bf16")


def generate(
    model: sample.Model, seeds: Sequence[int], how: tuple = (), labels: list[int] | None = None, batch_size: int = 8
) -> Tensor:
    """Samples an image for each seed. `how` is sampler, steps and timesteps, or nothing for the defaults."""
    return sample.draw(model, seeds, ddpm.sampler_table(model.schedule, *how), labels, batch_size=batch_size)


def write_png(path: Path, images: Tensor, columns: int) -> None:
    data.write_png(path, data.grid(images, columns=columns), {})


def sampling(model: sample.Model, count: int, steps: int | None = None) -> Callable[[], object]:
    """Returns a function that samples images in one batch and encodes a PNG of them."""
    table = ddpm.sampler_table(model.schedule, steps=steps)

    def work() -> None:
        images = sample.draw(model, range(count), table, batch_size=count)
        data.grid(images).save(io.BytesIO(), "PNG")

    return work


# ---- quality ---------------------------------------------------------------------------------------------------------


def is_synthetic(source: str) -> bool:
    return data.is_synthetic(source)


def real_images(folder: Path, model: sample.Model) -> data.Dataset:
    """Returns images that a run has not seen; for a model folder, synthetic ones."""
    if (folder / "metrics.jsonl").exists():
        return monitor.images_of_run(folder, model.shape)[1]
    return monitor.unseen_synthetic(model.shape)


def kernel_distance(features, model: sample.Model, how: tuple, count: int, real: data.Dataset) -> monitor.Estimate:
    images = sample.draw_like(model, 0, count, real, ddpm.sampler_table(model.schedule, *how))
    return monitor.quality(features, images, torch.from_numpy(real.images))["kid"]


load_features = monitor.load_features


# ---- training --------------------------------------------------------------------------------------------------------


def training(images: Tensor, changes: dict) -> Callable[[], object]:
    """Returns a function that does a step of train.py's loop, including its data, optimizer and EMA."""
    settings = train.DEFAULTS | {"precision": "bf16"} | changes
    settings["lr"] = train.RATES[settings["optimizer"]]
    config, schedule = train.make_configs(settings, ())
    network = unet.UNet(config).to(memory_format=torch.channels_last)
    device = torch.device("cpu")
    state = train.State(network, settings, device)
    table = ddpm.training_table(schedule).float()
    cdf = ddpm.timestep_cdf(schedule, settings["density"], settings["density_mean"], settings["density_std"])
    dataset = SimpleNamespace(images=images.numpy(), labels=None)
    batches = train.Batches(dataset, np.arange(len(images)), settings, None, cdf, device, 0, 1)

    def autocast():
        return torch.autocast("cpu", torch.bfloat16)

    def work() -> None:
        batch = batches(state.step)
        loss = train.backward(network, table, batch, 1, autocast, state.scaler.scale)
        state.update(loss, settings)

    return work
