"""Model folders travel to diffusers and back, an image depends on its seed alone, bad input gets one sentence."""

import ast
import functools
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from PIL import Image

import data
import ddpm
import monitor
import sample
import server
import train
import unet
from builtin import export
from tests import lines
from tests.conftest import denoise, png_text, randomise, status_of

ROOT = Path(__file__).parent.parent
SMALL = dict(
    sample_size=16,
    block_out_channels=(16, 32),
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    layers_per_block=1,
    norm_num_groups=8,
    attention_head_dim=16,
)


def make_model(folder: Path, schedule: ddpm.Schedule | None = None, **changes) -> Path:
    network = unet.UNet(unet.UNetConfig(**SMALL | changes)).eval()
    randomise(network)
    sample.save_model(folder, network, schedule or ddpm.Schedule(prediction_type="v_prediction"))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model") / "m")


@pytest.fixture(scope="module")
def model(folder):
    return sample.load(folder)


def generators(seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def pipeline_uint8(pipeline, seeds, steps) -> np.ndarray:
    """What DDPMPipeline draws, as uint8 (N, C, H, W)."""
    pipeline.set_progress_bar_config(disable=True)
    drawn = pipeline(len(seeds), generator=generators(seeds), num_inference_steps=steps, output_type="np").images
    return (drawn * 255).round().astype(np.uint8).transpose(0, 3, 1, 2)


def assert_close(ours, theirs) -> None:
    """At most one level off in under 0.5% of values."""
    difference = np.abs(np.asarray(ours).astype(int) - np.asarray(theirs).astype(int))
    assert difference.max() <= 1 and (difference > 0).mean() < 0.005
    assert np.asarray(ours).std() > 5  # pictures, not a constant


# ---- to diffusers and back -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spacing, variance, prediction", [
    ("leading", "fixed_small", "epsilon"), ("trailing", "fixed_small", "v_prediction"),
    ("linspace", "fixed_large", "sample")])  # fmt: skip
def test_diffusers_opens_ours_and_draws_the_same(tmp_path, spacing, variance, prediction):
    schedule = ddpm.Schedule(timestep_spacing=spacing, variance_type=variance, prediction_type=prediction)
    path = make_model(tmp_path / "m", schedule)
    pipeline = DDPMPipeline.from_pretrained(path)
    assert dict(pipeline.scheduler.config)["timestep_spacing"] == spacing
    ours = sample.load(path)
    for name, tensor in pipeline.unet.state_dict().items():
        assert torch.equal(tensor, sample.read_model(path).network.state_dict()[name])
    drawn = sample.draw(ours, [5, 6, 7], ddpm.sampler_table(ours.schedule, "ddpm", 10), batch_size=2)
    assert_close(drawn, pipeline_uint8(pipeline, [5, 6, 7], 10))


@pytest.mark.parametrize("layout", ["safetensors", "bin", "flat", "flat bin"])
def test_ours_opens_what_diffusers_writes(tmp_path, layout):
    peer = UNet2DModel(**SMALL).eval()
    randomise(peer)
    pipeline = DDPMPipeline(unet=peer, scheduler=DDPMScheduler(variance_type="fixed_large"))
    pipeline.save_pretrained(tmp_path / "m", safe_serialization="bin" not in layout)
    if "flat" in layout:  # as the google/ddpm-* repositories lie
        for file in [*(tmp_path / "m/unet").iterdir(), *(tmp_path / "m/scheduler").iterdir()]:
            file.rename(tmp_path / "m" / file.name)
        (tmp_path / "m/unet").rmdir()
        (tmp_path / "m/scheduler").rmdir()
    ours = sample.load(tmp_path / "m")
    assert ours.schedule == ddpm.Schedule(variance_type="fixed_large")
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([10, 900])
    with torch.no_grad():
        expected = peer(x, t).sample
        assert (ours.network(x, t) - expected).abs().max() <= 1e-5 * expected.abs().max()
    drawn = sample.draw(ours, [1, 2], ddpm.sampler_table(ours.schedule, "ddpm", 8))
    assert_close(drawn, pipeline_uint8(pipeline, [1, 2], 8))


def test_patches_are_pixels_of_the_inner_network(tmp_path):
    """UNet2DModel opens the network inside the patches, and shuffling the pixels of its draw gives ours."""
    path = make_model(tmp_path / "m", patch_size=2, in_channels=12, out_channels=12, sample_size=8)
    inner = DDPMPipeline(UNet2DModel.from_pretrained(path / "unet"), DDPMScheduler.from_pretrained(path / "scheduler"))
    ours = sample.load(path)
    assert ours.shape == (3, 16, 16)
    drawn = sample.draw(ours, [3, 4], ddpm.sampler_table(ours.schedule, "ddpm", 6))
    theirs = torch.nn.functional.pixel_shuffle(torch.from_numpy(pipeline_uint8(inner, [3, 4], 6)).float(), 2)
    assert_close(drawn, theirs)


def test_class_folder_opens_in_diffusers(tmp_path):
    path = make_model(tmp_path / "m", num_class_embeds=3, class_names=("a", "b", "c"))
    peer = UNet2DModel.from_pretrained(path / "unet").eval()
    assert DDPMScheduler.from_pretrained(path / "scheduler").config.prediction_type == "v_prediction"
    ours = sample.load(path)
    x, t, labels = torch.randn(3, 3, 16, 16), torch.tensor([1, 500, 999]), torch.tensor([2, 0, 1])
    with torch.no_grad():
        expected = peer(x, t, labels).sample
        assert (ours.network(x, t, labels) - expected).abs().max() <= 1e-5 * expected.abs().max()


# ---- what is refused -------------------------------------------------------------------------------------------------


class Attack:
    """Unpickled, it writes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize(
    "damage, sentence",
    [
        (lambda m: shutil.rmtree(m), "there is no such folder"),
        (lambda m: (m / "unet/config.json").unlink(), "it has no network configuration"),
        (lambda m: (m / "scheduler/scheduler_config.json").unlink(), "it has no scheduler configuration"),
        (lambda m: (m / WEIGHTS).unlink(), "has no weights"),
        (lambda m: (m / "unet/config.json").write_text("{"), "it is not JSON"),
        (lambda m: (m / "unet/config.json").write_text("[]"), "does not hold a JSON object"),
        (lambda m: (m / "unet/config.json").write_bytes(b"\xff"), "it is not JSON"),
        (
            lambda m: edit(m / "unet/config.json", down_block_types=["DownBlock2D", "SkipDownBlock2D"]),
            "SkipDownBlock2D",
        ),
        (lambda m: edit(m / "unet/config.json", resnet_pre_temb_non_linearity=True), "resnet_pre_temb_non_linearity"),
        (lambda m: edit(m / "unet/config.json", sample_size=None), "sample_size must be given"),
        (lambda m: edit(m / "unet/config.json", sample_size=15), "be a multiple of 2 in pixels"),
        (lambda m: edit(m / "unet/config.json", block_out_channels=[16, 64]), "shape"),
        (lambda m: edit(m / "unet/config.json", add_attention=False), "unexpected tensor"),
        (lambda m: edit(m / "scheduler/scheduler_config.json", _class_name="PNDMScheduler"), "PNDMScheduler"),
        (lambda m: edit(m / "scheduler/scheduler_config.json", variance_type="learned_range"), "learned_range"),
        (lambda m: (m / WEIGHTS).write_bytes((m / WEIGHTS).read_bytes()[:-9]), "is damaged"),
        (lambda m: (m / WEIGHTS).write_bytes(b"\xff" * 100), "its header does not fit"),
    ],
)
def test_damaged_folder(tmp_path, capsys, folder, damage, sentence):
    shutil.copytree(folder, tmp_path / "m")
    damage(tmp_path / "m")
    with pytest.raises(data.InputError, match=re.escape(sentence)) as raised:
        sample.load(tmp_path / "m")
    assert str(tmp_path / "m") in str(raised.value) and "\n" not in str(raised.value)
    assert sample.main(["--model", str(tmp_path / "m"), "--out", str(tmp_path / "out.png")]) == 2
    assert capsys.readouterr().err == f"error: {raised.value}\n" and not (tmp_path / "out.png").exists()


def test_hostile_pickle_runs_nothing(tmp_path, folder):
    shutil.copytree(folder, tmp_path / "m")
    (tmp_path / "m" / WEIGHTS).unlink()
    torch.save(
        {"conv_in.weight": Attack(tmp_path / "attacked")}, tmp_path / "m" / WEIGHTS.replace("safetensors", "bin")
    )
    with pytest.raises(data.InputError, match="more than tensors"):
        sample.load(tmp_path / "m")
    assert not (tmp_path / "attacked").exists()


def test_hash_changes_with_any_part(tmp_path, folder, model):
    shutil.copytree(folder, tmp_path / "copy")
    assert sample.load(tmp_path / "copy").hash == model.hash and len(model.hash) == 64
    edit(tmp_path / "copy/scheduler/scheduler_config.json", clip_sample_range=2.0)
    assert sample.load(tmp_path / "copy").hash != model.hash
    shutil.copytree(folder, tmp_path / "other")
    content = bytearray((tmp_path / "other" / WEIGHTS).read_bytes())
    content[-4] ^= 1
    (tmp_path / "other" / WEIGHTS).write_bytes(content)
    assert sample.load(tmp_path / "other").hash != model.hash


# ---- an image depends on its seed alone ------------------------------------------------------------------------------

SAMPLERS = [("ipndm", 6, 0.0), ("unipc", 6, 0.0), ("dpm++", 6, 0.0), ("ddim", 6, 1.0), ("ddpm", 12, 0.0)]


@pytest.mark.parametrize("sampler, steps, eta", SAMPLERS)
def test_image_depends_on_its_seed_alone(model, sampler, steps, eta):
    table = ddpm.sampler_table(model.schedule, sampler, steps, eta=eta)
    alone = torch.cat([sample.draw(model, [seed], table) for seed in range(40, 47)])
    assert alone.float().std() > 20 and (alone[0] != alone[1]).float().mean() > 0.5
    for size in (2, 3, 8):
        together = sample.draw(model, range(40, 47), table, batch_size=size)
        assert (together.int() - alone.int()).abs().max() <= 1
    backwards = sample.draw(model, range(46, 39, -1), table, batch_size=3).flip(0)
    assert (backwards.int() - alone.int()).abs().max() <= 1


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("sampler, steps, eta", SAMPLERS)
def test_exact_is_equal_to_the_bit(folder, precision, sampler, steps, eta):
    model = sample.load(folder, precision=precision)
    table = ddpm.sampler_table(model.schedule, sampler, steps, eta=eta)
    nine = sample.draw(model, range(9), table, exact=True)
    for seeds in ([0], [3, 2], [8, 1, 4, 5, 0, 7]):
        assert torch.equal(sample.draw(model, seeds, table, exact=True), nine[seeds])


def test_bf16_differs_between_batch_sizes_by_little(folder):
    """Measured, on an AMD EPYC with AVX512-BF16: 1 and 1. Other kernels round otherwise, so the bound is generous."""
    model = sample.load(folder, precision="bf16")
    differences = []
    for sampler, steps in (("ipndm", 8), ("unipc", 8), ("ddpm", 8)):
        table = ddpm.sampler_table(model.schedule, sampler, steps)
        sets = [sample.draw(model, range(8), table, batch_size=size).int() for size in (1, 3, 8)]
        differences += [(sets[0] - other).abs().flatten().float() for other in sets[1:]]
    differences = torch.cat(differences)
    print("bf16 largest", differences.max(), "99.9th percentile", differences.quantile(0.999))
    assert differences.quantile(0.999) <= 4 and differences.max() <= 24


def test_bf16_images_of_the_default_model_are_near_float32s():
    """Two of its images as sample.py draws them, packed convolutions and all: near the plain path's."""
    sets = []
    for precision in ("fp32", "bf16"):
        model = sample.load(sample.DEFAULT_MODEL, precision=precision, packed=precision == "bf16")
        sets.append(sample.draw(model, range(2), ddpm.sampler_table(model.schedule), range(2)).float())
    difference = (sets[0] - sets[1]).abs()
    print("bf16 against fp32: RMS", difference.square().mean().sqrt(), "largest", difference.max())
    assert difference.square().mean().sqrt() <= 1.5 and difference.quantile(0.999) <= 16


# ---- device and precision --------------------------------------------------------------------------------------------


def test_precision_follows_the_hardware(monkeypatch):
    cpu = torch.device("cpu")
    for capabilities, precision in (({"avx512_bf16": True}, "bf16"), ({"amx_bf16": True, "avx512_bf16": False}, "bf16"),
                                    ({"avx512_bf16": False, "avx2": True}, "fp32"), ({}, "fp32")):  # fmt: skip
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=capabilities: found, raising=False)
        assert sample.choose_precision(cpu) == precision
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert sample.choose_precision(cpu) == "fp32" and sample.choose_precision(cpu, "bf16") == "bf16"
    with pytest.raises(data.InputError, match="fp16"):
        sample.choose_precision(cpu, "fp16")


def test_prepared_network(folder):
    network = sample.load(folder, precision="bf16").network
    assert {parameter.dtype for parameter in network.parameters()} == {torch.bfloat16}
    assert network.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    assert not network.training and not any(parameter.requires_grad for parameter in network.parameters())


def test_device_is_the_fastest_there_is(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert sample.choose_device().type == "mps"
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert sample.choose_device().type == "cpu"
    with pytest.raises(data.InputError, match="--device cuda"):
        sample.choose_device("cuda")


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_other_devices_draw_what_the_cpu_draws(folder, device):
    try:
        sample.choose_device(device)
    except data.InputError:
        pytest.skip(f"no {device} device")
    sets = []
    for place in ("cpu", device):
        model = sample.load(folder, place)
        sets.append(sample.draw(model, range(4), ddpm.sampler_table(model.schedule, steps=10)).int())
    assert (sets[0] - sets[1]).abs().max() <= 2


# ---- command line ----------------------------------------------------------------------------------------------------


def cells(picture: Path, count: int, side: int = 16, padding: int = 2) -> list[np.ndarray]:
    """The images of a grid, row by row."""
    pixels = np.asarray(Image.open(picture))
    columns = (pixels.shape[1] - padding) // (side + padding)
    corners = [
        (i // columns * (side + padding) + padding, i % columns * (side + padding) + padding) for i in range(count)
    ]
    return [pixels[y : y + side, x : x + side] for y, x in corners]


@pytest.mark.parametrize("n", [1, 5, 8])
def test_grid_and_its_text(tmp_path, capsys, folder, model, n):
    out = tmp_path / "grid.png"
    assert sample.main(["-n", str(n), "--model", str(folder), "--seed", "7", "--steps", "3", "--out", str(out)]) == 0
    text = png_text(out)
    assert (text["seed"], text["steps"], text["sampler"], text["model"]) == ("7", "3", ddpm.DEFAULT_SAMPLER, model.hash)
    used = sample.load(folder, precision=text["precision"])
    expected = sample.draw(used, range(7, 7 + n), ddpm.sampler_table(model.schedule, steps=3))
    for cell, image in zip(cells(out, n), expected, strict=True):
        assert np.array_equal(cell, image.permute(1, 2, 0))


def test_each_file_is_named_by_its_seed(tmp_path, folder):
    flags = ["-n", "3", "--model", str(folder), "--seed", "9", "--steps", "2", "--precision", "fp32"]
    assert sample.main([*flags, "--each", "--out", str(tmp_path / "birds")]) == 0
    assert sample.main([*flags, "--out", str(tmp_path / "grid.png")]) == 0
    assert sorted(path.name for path in (tmp_path / "birds").iterdir()) == ["10.png", "11.png", "9.png"]
    for seed, cell in zip((9, 10, 11), cells(tmp_path / "grid.png", 3), strict=True):
        assert np.array_equal(np.asarray(Image.open(tmp_path / f"birds/{seed}.png")), cell)
        assert png_text(tmp_path / f"birds/{seed}.png")["seed"] == str(seed)


def test_only_missing_images_are_drawn(tmp_path, folder, monkeypatch, capsys):
    """A file with other facts, another size or damage is drawn again; one that is complete is left alone."""
    birds = tmp_path / "birds"
    flags = ["--model", str(folder), "--steps", "2", "-n", "6", "--seed", "3", "--each", "--out", str(birds)]
    assert sample.main([*flags, "--batch-size", "1"]) == 0
    whole = {file.name: file.read_bytes() for file in birds.iterdir()}
    (birds / "4.png").unlink()
    (birds / "5.png").write_bytes(whole["5.png"][:50])
    (birds / "6.png").write_bytes(whole["3.png"])  # of another seed
    before = {file.name: file.stat().st_mtime_ns for file in birds.iterdir()}
    capsys.readouterr()
    assert sample.main([*flags, "--batch-size", "1"]) == 0
    assert f"wrote 3 images to {birds}/; 3 had been drawn before" in capsys.readouterr().out
    assert {file.name: file.read_bytes() for file in birds.iterdir()} == whole
    kept = [name for name, time in before.items() if (birds / name).stat().st_mtime_ns == time]
    assert sorted(kept) == ["3.png", "7.png", "8.png"]
    (birds / "5.png").write_bytes(whole["5.png"][:-40])  # the end is missing
    assert sample.main([*flags, "--batch-size", "1"]) == 0 and (birds / "5.png").read_bytes() == whole["5.png"]
    capsys.readouterr()
    for change in (["--steps", "3"], ["--eta", "0.5", "--sampler", "ddim"], ["--scale", "2"], ["--exact"]):
        assert sample.main([*flags, *change]) == 0
        assert capsys.readouterr().out.splitlines()[-1] == f"wrote 6 images to {birds}/"


def test_a_walk_of_another_length_is_drawn_again(tmp_path, folder, capsys):
    flags = ["--model", str(folder), "--steps", "2", "--walk", "1", "2", "--each", "--exact", "--out"]
    for count, out in ((3, "a"), (5, "a"), (5, "b")):
        assert sample.main([*flags, str(tmp_path / out), "-n", str(count)]) == 0
    for i in range(5):
        assert (tmp_path / f"a/{i}.png").read_bytes() == (tmp_path / f"b/{i}.png").read_bytes()


@pytest.mark.parametrize("world", [1, 2, 4])
def test_processes_share_the_images_of_one(tmp_path, folder, monkeypatch, world):
    """Each draws its share, and together they draw what one process does, to the byte with --exact."""
    flags = ["--model", str(folder), "--steps", "2", "-n", "7", "--each", "--exact", "--out"]
    assert sample.main([*flags, str(tmp_path / "one")]) == 0
    one = {file.name: file.read_bytes() for file in (tmp_path / "one").iterdir()}
    drawn = []
    for rank in reversed(range(world)):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(world))
        assert sample.main([*flags, str(tmp_path / "many")]) == 0
        drawn.append(len(list((tmp_path / "many").iterdir())))
    assert {file.name: file.read_bytes() for file in (tmp_path / "many").iterdir()} == one
    shares = {1: [7], 2: [3, 7], 4: [1, 3, 5, 7]}  # files after each process, the last one first
    assert drawn == shares[world]


def test_processes_need_single_files(tmp_path, folder, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for flags in ([], ["--each", "--film", str(tmp_path / "film.gif")]):
        assert sample.main(["--model", str(folder), *flags, "--out", str(tmp_path / "x.png")]) == 2
        assert "several processes draw only single files; add --each and omit --film" in capsys.readouterr().err


def test_newest_run_is_the_default(tmp_path, capsys, monkeypatch, folder):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sample, "DEFAULT_MODEL", tmp_path / "box")
    assert sample.main([]) == 2
    assert "train one with `python train.py" in capsys.readouterr().err and not list(tmp_path.iterdir())
    shutil.copytree(folder, tmp_path / "box")
    path, which = sample.find_model(None)
    assert path == tmp_path / "box" and which.startswith("the default model (runs/ has no model yet")
    for name, age in (("old", 200), ("new", 100), ("middle", 150)):
        shutil.copytree(folder, tmp_path / "runs" / name / "model")
        moment = (tmp_path / "runs" / name / "model" / WEIGHTS).stat().st_mtime - age
        os.utime(tmp_path / "runs" / name / "model" / WEIGHTS, (moment, moment))
    assert sample.main(["-n", "2", "--steps", "1"]) == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith(f"{Path('runs/new')} (the newest run; override with --model): ")
    assert Path("samples.png").exists()


def test_classes_by_name_and_number(tmp_path, capsys, folder):
    path = str(make_model(tmp_path / "m", num_class_embeds=3, class_names=("ant", "bee", "cat")))
    pictures = []
    for label in ("bee", "1", "2"):
        assert sample.main(["--model", path, "--class", label, "--steps", "2", "--out", str(tmp_path / "x.png")]) == 0
        pictures.append((tmp_path / "x.png").read_bytes())
    assert pictures[0] == pictures[1] != pictures[2]
    photo = tmp_path / "photo.png"
    data.write_png(photo, Image.new("RGB", (16, 16), "red"))
    for flags, sentence in ((["--class", "dog"], "it has ant, bee, cat"), (["--class", "3"], "no such class"),
                            (["--from", str(photo)], "name the picture's class with --class")):  # fmt: skip
        assert sample.main(["--model", path, *flags]) == 2 and sentence in capsys.readouterr().err
    assert sample.main(["--model", str(folder), "--class", "bee"]) == 2
    assert "trained without classes" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["--steps", "0"], "'0' is not a whole number of at least 1"),
        (["--steps", "1001"], "steps must be from 1 to 1000"),
        (["--steps", "1.5"], "'1.5' is not a whole number"),
        (["--sampler", "heun"], "invalid choice: 'heun'"),
        (["--eta", "2", "--sampler", "ddim"], "is not a number from 0 to 1"),
        (["--eta", "0.5"], "needs the sampler ddim"),
        (["--eta", "nan", "--sampler", "ddim"], "is not a number from 0 to 1"),
        (["-n", "0"], "'0' is not a whole number from 1"),
        (["--seed", "-1"], "'-1' is not a whole number"),
        (["--seed", "9" * 5000], "is not a whole number"),
        (["--batch-size", "0"], "'0' is not a whole number from 1"),
        (["--exact", "--batch-size", "2"], "omit --batch-size"),
        (["--precision", "fp16", "--device", "cpu"], "fp16 is slower"),
        (["--device", "tpu"], "--device tpu"),
        (["--out", "."], "is a folder; name a file, or add --each"),
        (["--out", "file", "--each"], "is a file, but --each needs a folder"),
        (["--out", "x.jpg"], "pictures are PNG files"),
        (["--out", "file/x.png"], "a file is where a folder is needed"),
        (["--model", "nowhere"], "nowhere: there is no such folder"),
    ],
)
def test_bad_flags(tmp_path, capsys, monkeypatch, folder, flags, sentence):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("kept")
    status = status_of(sample.main, ["--model", str(folder), "--steps", "2", *flags])
    errors = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert status == 2 and len(errors) == 1 and sentence in errors[0]
    assert [path.name for path in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_text() == "kept"


def test_interrupted(tmp_path, monkeypatch, capsys, folder):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(ddpm, "step", interrupt)
    assert sample.main(["--model", str(folder), "--out", str(tmp_path / "x.png")]) == 130
    assert not list(tmp_path.iterdir())


# ---- the house -------------------------------------------------------------------------------------------------------

MAY_IMPORT = {
    "ddpm": set(),
    "unet": set(),
    "data": {"builtin", "numpy", "PIL", "tqdm", "datasets", "torchvision"},
    "sample": {"ddpm", "unet", "data", "tqdm"},
    "monitor": {"ddpm", "data", "sample", "builtin", "numpy"},
    "train": {"ddpm", "unet", "data", "sample", "monitor", "builtin", "numpy", "PIL", "tqdm"},
    "server": {"unet", "data", "sample", "builtin"},  # unet for its strict JSON parser
}


@pytest.mark.parametrize("module", MAY_IMPORT)
def test_who_may_import_whom(module):
    """The arrows of the design; `torch.distributed` only where processes share work."""
    source = (ROOT / f"{module}.py").read_text(encoding="utf-8")
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
    tops = {name.split(".")[0] for name in names} - set(sys.stdlib_module_names)
    assert tops <= MAY_IMPORT[module] | {"torch"}
    assert ("distributed" in source) == (module == "train")


def test_modules_stay_short():
    """The limits of the design: a reader pays for every token."""
    sizes = {name: lines.measure((ROOT / name).read_text(encoding="utf-8")) for name in lines.MODULES}
    assert max(size.tokens for size in sizes.values()) <= 9000
    assert sum(size.tokens for size in sizes.values()) <= 52_000
    assert not any(size.unformatted for size in sizes.values())
    assert all(size.longest <= 60 for size in sizes.values())


def test_an_f_string_is_one_token():
    source = 'def f(x):\n    """Doc."""\n    return f"{x} and {x!r:>{3}}" if x else ""  # why\n'
    size = lines.measure(source)
    assert (size.lines, size.tokens, size.conditionals, size.longest, size.longest_name) == (2, 12, 1, 2, "f")


@pytest.mark.parametrize("module", [data, sample, train, server, monitor])
def test_help_ends_with_examples_and_a_bad_flag_gets_one_sentence(module, capsys):
    assert status_of(module.main, ["--help"]) == 0
    examples = capsys.readouterr().out.partition("examples:\n")[2].splitlines()
    assert len(examples) == 3 and all(f"{module.__name__}.py" in line for line in examples)
    assert status_of(module.main, ["--sedd", "3"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and line.endswith(f"{module.__name__}.py --help lists the flags")


def test_start_up_pays_for_no_data_library():
    code = "import sys, sample; sys.exit(any(name in sys.modules for name in ('torchvision', 'datasets', 'pyarrow')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


# ---- more of what must not matter, and of what must be said ----------------------------------------------------------


def test_peers_open_our_folders_without_a_warning(tmp_path, caplog, folder):
    """Missing or unexpected weights are only warned of, by diffusers, and then filled with random numbers."""
    from diffusers.utils import logging

    library = logging.get_logger("diffusers")
    library.addHandler(caplog.handler)

    def said() -> list[str]:
        lines = [record.getMessage() for record in caplog.records]
        return [line for line in lines if "accelerate" not in line]  # an optional package, not our folder

    try:
        DDPMPipeline.from_pretrained(folder)
        assert not said()
        UNet2DModel.from_pretrained(
            make_model(tmp_path / "p", patch_size=2, in_channels=12, out_channels=12, sample_size=8) / "unet"
        )
        assert all("patch_size" in line for line in said())  # the one key that is ours
    finally:
        library.removeHandler(caplog.handler)


@pytest.mark.parametrize("file", ["unet/config.json", "scheduler/scheduler_config.json", WEIGHTS])
def test_no_permission(monkeypatch, capsys, folder, file):
    """Simulated, for root may read everything."""
    import builtins
    import io

    def guarded(path, *args, real, **kwargs):
        if str(path).endswith(file):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *args, **kwargs)

    for module in (builtins, io):
        monkeypatch.setattr(module, "open", functools.partial(guarded, real=open))
    assert sample.main(["--model", str(folder)]) == 2
    assert capsys.readouterr().err == f"error: cannot read {folder / file}: Permission denied; check its permissions\n"


def test_neighbours_of_other_classes_do_not_matter(tmp_path):
    model = sample.load(make_model(tmp_path / "m", num_class_embeds=4))
    table = ddpm.sampler_table(model.schedule, steps=5)
    labels = [3, 0, 2, 1, 3]
    alone = torch.cat([sample.draw(model, [i], table, [label]) for i, label in enumerate(labels)])
    other = sample.draw(model, [0], table, [1])
    assert (alone[0] != other[0]).float().mean() > 0.1  # the class is seen at all
    assert (sample.draw(model, range(5), table, labels, batch_size=3).int() - alone.int()).abs().max() <= 1
    exact = sample.draw(model, range(5), table, labels, exact=True)
    assert torch.equal(sample.draw(model, [4, 1], table, [3, 0], exact=True), exact[[4, 1]])


def test_seeds_count_on(tmp_path, folder):
    """On the command line image k of seed s is image 0 of seed s + k, to the bit with --exact."""
    flags = ["--model", str(folder), "--steps", "3", "--exact", "--each"]
    assert sample.main([*flags, "-n", "6", "--seed", "20", "--out", str(tmp_path / "six")]) == 0
    for seed in (20, 23, 25):
        assert sample.main([*flags, "-n", "1", "--seed", str(seed), "--out", str(tmp_path / "one")]) == 0
        assert (tmp_path / f"one/{seed}.png").read_bytes() == (tmp_path / f"six/{seed}.png").read_bytes()


def test_progress_counts_every_image_and_step(model):
    counts = []
    table = ddpm.sampler_table(model.schedule, steps=3)
    sample.draw(model, range(5), table, batch_size=2, progress=lambda i, x: counts.append((i, len(x))))
    assert counts == [(0, 2), (1, 2), (2, 2), (0, 2), (1, 2), (2, 2), (0, 1), (1, 1), (2, 1)]


@pytest.mark.parametrize("device", ["cpu:x", "cuda:99", "cpu:-1", ":"])
def test_device_that_is_none(capsys, folder, device):
    assert sample.main(["--model", str(folder), "--device", device]) == 2
    assert capsys.readouterr().err.startswith(f"error: --device {device}: ")


def test_memory_that_is_full(monkeypatch, capsys, tmp_path, folder):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(ddpm, "step", full)
    assert sample.main(["--model", str(folder), "--out", str(tmp_path / "x.png")]) == 2
    assert "smaller --batch-size" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_arrows_have_no_cycle():
    order = list(MAY_IMPORT)
    for i, module in enumerate(order):
        assert not MAY_IMPORT[module] & set(order[i:])


# ---- classes, pictures, walks, films ---------------------------------------------------------------------------------

NAMES = ("ant", "bee", "cat")


@pytest.fixture(scope="module")
def by_class(tmp_path_factory):
    """A model of three classes and a label for none of them."""
    return make_model(tmp_path_factory.mktemp("classes") / "m", num_class_embeds=4, class_names=NAMES)


def drawn(folder, tmp_path, *flags, n=2) -> list[np.ndarray]:
    """The images that the command draws, one after the other."""
    out = tmp_path / "drawn.png"
    flags = ["--model", str(folder), "--steps", "4", "--precision", "fp32", "-n", str(n), *flags, "--out", str(out)]
    assert sample.main(flags) == 0
    return cells(out, int(png_text(out)["count"]))


def stacked(images: list[np.ndarray]) -> np.ndarray:
    return np.stack(images).astype(int)


def picture_of(folder: Path, path: Path, seed: int = 3) -> np.ndarray:
    pixels = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return pixels


def test_guidance_is_the_formula_of_two_draws_of_one_call(by_class):
    """Against two calls of the network at each step, in a loop of this test's own."""
    model = sample.load(by_class)
    table = ddpm.sampler_table(model.schedule, steps=5)
    for guidance in (0.0, 0.5, 1.0, 3.0):

        def composed(x, t, labels, guidance=guidance):
            null = torch.full_like(labels, 3)
            with_class, without = model.network(x, t, labels), model.network(x, t, null)
            return guidance * with_class + (1 - guidance) * without

        noise = [ddpm.normal([sample.image_generator(seed)], model.shape) for seed in (5, 6)]
        expected = denoise(composed, table, lambda noise=noise: torch.cat(noise), labels=torch.tensor([2, 0]))
        found = sample.draw(model, [5, 6], table, [2, 0], guidance=guidance)
        assert (found.int() - data.to_uint8(expected).int()).abs().max() <= 1, guidance


def test_guidance_costs_one_call_a_step(by_class, monkeypatch):
    model = sample.load(by_class)
    sizes = []
    real = model.network.forward
    monkeypatch.setattr(model.network, "forward", lambda x, *rest: sizes.append(len(x)) or real(x, *rest))
    sample.draw(model, [1, 2, 3], ddpm.sampler_table(model.schedule, steps=4), [0, 1, 2], guidance=2.0)
    assert sizes == [6] * 4


def test_guidance_of_one_and_of_zero(by_class, tmp_path):
    plain = drawn(by_class, tmp_path, "--class", "bee")
    model = sample.load(by_class)
    free = sample.draw(model, range(2), ddpm.sampler_table(model.schedule, steps=4), [3, 3])
    free = list(free.numpy().transpose(0, 2, 3, 1))
    assert np.array_equal(drawn(by_class, tmp_path, "--class", "bee", "--guidance", "1"), plain)
    assert np.array_equal(drawn(by_class, tmp_path, "--class", "bee", "--guidance", "0"), free)
    two = drawn(by_class, tmp_path, "--class", "bee", "--guidance", "2")
    assert (stacked(two) != stacked(plain)).mean() > 0.1 and (stacked(free) != stacked(plain)).mean() > 0.1


def test_without_a_class_they_come_in_turn_by_seed(by_class, tmp_path):
    found = drawn(by_class, tmp_path, "--seed", "4", n=3)
    assert png_text(tmp_path / "drawn.png")["class"] == "bee,cat,ant"
    for seed, name, image in zip((4, 5, 6), ("bee", "cat", "ant"), found, strict=True):
        assert np.array_equal(drawn(by_class, tmp_path, "--seed", str(seed), "--class", name, n=1)[0], image)
    walk = drawn(by_class, tmp_path, "--walk", "4", "9")
    assert np.array_equal(walk, drawn(by_class, tmp_path, "--walk", "4", "9", "--class", "bee"))
    each = ["--model", str(by_class), "--steps", "1", "-n", "2", "--seed", "2", "--each", "--out", str(tmp_path / "e")]
    assert sample.main(each) == 0
    assert [png_text(tmp_path / f"e/{seed}.png")["class"] for seed in (2, 3)] == ["cat", "ant"]


def test_guided_images_do_not_depend_on_the_batch(by_class):
    model = sample.load(by_class)
    table, labels = ddpm.sampler_table(model.schedule, steps=5), [0, 1, 2, 1, 0]
    whole = sample.draw(model, range(5), table, labels, guidance=3.0)
    parts = sample.draw(model, range(5), table, labels, guidance=3.0, batch_size=2)
    assert (whole.int() - parts.int()).abs().max() <= 1
    exact = sample.draw(model, range(5), table, labels, guidance=3.0, exact=True)
    assert torch.equal(sample.draw(model, [3, 0], table, [1, 0], guidance=3.0, exact=True), exact[[3, 0]])


def test_a_row_of_each_class(by_class, tmp_path):
    rows = drawn(by_class, tmp_path, "--class", "all", n=4)
    with Image.open(tmp_path / "drawn.png") as grid:
        assert len(rows) == 12 and grid.size == (4 * 18 + 2, 3 * 18 + 2)
    for k, name in enumerate(NAMES):
        one = drawn(by_class, tmp_path, "--class", name, n=4)
        assert np.abs(stacked(one) - stacked(rows[4 * k : 4 * k + 4])).max() <= 1
    chosen = drawn(by_class, tmp_path, "--class", "cat,0", n=4)
    assert np.abs(stacked(chosen) - stacked(rows[8:] + rows[:4])).max() <= 1
    flags = ["--model", str(by_class), "--class", "all", "--steps", "1", "--each", "-n", "2", "--seed", "5"]
    assert sample.main([*flags, "--out", str(tmp_path / "each")]) == 0
    found = sorted(path.name for path in (tmp_path / "each").iterdir())
    assert found == [f"{name}-{seed}.png" for name in NAMES for seed in (5, 6)]


def test_a_mask_leaves_the_rest_as_it_was(folder, tmp_path):
    pixels = picture_of(folder, tmp_path / "p.png")
    mask = np.zeros((16, 16), np.uint8)
    mask[4:11, 2:9] = 255
    Image.fromarray(mask).save(tmp_path / "m.png")
    flags = ["--from", str(tmp_path / "p.png"), "--mask", str(tmp_path / "m.png")]
    for more in ([], ["--strength", "0.5"], ["--sampler", "ddpm"], ["--sampler", "dpm++"], ["--sampler", "ddim"]):
        for image in drawn(folder, tmp_path, *flags, *more):
            assert np.array_equal(image[mask == 0], pixels[mask == 0])
            assert (image[mask == 255] != pixels[mask == 255]).mean() > 0.5


def test_strength_from_nothing_to_a_fresh_draw(folder, tmp_path):
    pixels = picture_of(folder, tmp_path / "p.png")
    fresh = stacked(drawn(folder, tmp_path, "--seed", "4"))
    flags = ["--seed", "4", "--from", str(tmp_path / "p.png"), "--strength"]
    assert np.array_equal(stacked(drawn(folder, tmp_path, *flags, "1")), fresh)
    distances = [np.abs(stacked(drawn(folder, tmp_path, *flags, s)) - pixels).mean() for s in ("0.002", "0.2", "0.7")]
    assert distances[0] < 3 and distances[0] < distances[1] < distances[2]
    assert np.array_equal(
        stacked(drawn(folder, tmp_path, *flags[:-1])), stacked(drawn(folder, tmp_path, *flags, "0.6"))
    )


def test_a_variation_begins_with_the_noised_picture(folder, tmp_path, monkeypatch):
    """alpha x0 + sigma eps at the last timestep that is kept, with the seed's own noise."""
    pixels = picture_of(folder, tmp_path / "p.png")
    seen = []
    real = unet.UNet.forward

    def forward(self, x, t, labels=None):
        seen.append((x.clone(), t.tolist()))
        return real(self, x, t, labels)

    monkeypatch.setattr(unet.UNet, "forward", forward)
    drawn(folder, tmp_path, "--from", str(tmp_path / "p.png"), "--strength", "0.3", "--seed", "8", n=1)
    x, t = seen[0]
    assert t == [299] and len(seen) == 1  # 0.3 of 4 steps
    betas = np.linspace(1e-4, 0.02, 1000)
    signal = np.prod(1 - betas[:300])
    noise = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(8)).numpy()
    expected = np.sqrt(signal) * (pixels.transpose(2, 0, 1) / 127.5 - 1) + np.sqrt(1 - signal) * noise
    assert np.abs(x.numpy() - expected).max() < 1e-5


def test_a_walk_ends_at_the_images_of_its_seeds(folder, tmp_path):
    for more in ([], ["--sampler", "ddpm"], ["--exact"]):
        ends = [drawn(folder, tmp_path, "--seed", seed, *more, n=1)[0] for seed in ("11", "40")]
        walk = drawn(folder, tmp_path, "--walk", "11", "40", *more, n=5)
        assert np.abs(stacked([walk[0], walk[-1]]) - stacked(ends)).max() <= (0 if more == ["--exact"] else 1)
        steps = [np.abs(stacked([a]) - stacked([b])).mean() for a, b in itertools.pairwise(walk)]
        assert min(steps) > 0 and max(steps) < np.abs(stacked([walk[0]]) - stacked([walk[-1]])).mean()


@pytest.mark.parametrize("suffix", ["png", "gif"])
def test_the_film_of_a_draw_ends_with_it(folder, tmp_path, suffix):
    film = tmp_path / f"film.{suffix}"
    drawn(folder, tmp_path, "--film", str(film), "--batch-size", "2", n=3)
    with Image.open(film) as frames:
        assert frames.n_frames == 4 and frames.is_animated  # the noise after steps 1 to 3, and the images
        stages = []
        for i in range(4):
            frames.seek(i)
            stages.append(np.asarray(frames.convert("RGB")).astype(int))
        assert frames.info["duration"] == 2000
    last = np.asarray(Image.open(tmp_path / "drawn.png").convert("RGB")).astype(int)
    apart = [np.abs(stage - last).mean() for stage in stages]
    assert apart[0] == max(apart) and apart[-1] <= {"png": 0, "gif": 12}[suffix]  # a GIF has 256 colours


def test_the_film_of_a_walk_is_the_walk(folder, tmp_path):
    walk = drawn(folder, tmp_path, "--walk", "1", "2", "--film", str(tmp_path / "w.png"), n=4)
    with Image.open(tmp_path / "w.png") as frames:
        assert frames.n_frames == 4
        for i, image in enumerate(walk):
            frames.seek(i)
            assert np.array_equal(np.asarray(frames)[2:-2, 2:-2], image)


def test_pixels_are_enlarged(folder, tmp_path):
    drawn(folder, tmp_path, n=3)
    with Image.open(tmp_path / "drawn.png") as small:
        image = np.asarray(small)[2:18, 2:18]
    flags = ["--model", str(folder), "-n", "3", "--steps", "4", "--precision", "fp32", "--scale", "5"]
    assert sample.main([*flags, "--out", str(tmp_path / "large.png")]) == 0
    with Image.open(tmp_path / "large.png") as large:
        assert np.array_equal(np.asarray(large)[2:82, 2:82], np.kron(image, np.ones((5, 5, 1), np.uint8)))


def test_the_text_of_a_picture_says_how_it_was_made(by_class, tmp_path):
    picture_of(by_class, tmp_path / "p.png")
    flags = ["--class", "bee", "--guidance", "2.5", "--from", str(tmp_path / "p.png"), "--strength", "0.5"]
    drawn(by_class, tmp_path, *flags)
    text = png_text(tmp_path / "drawn.png")
    assert (text["class"], text["guidance"], text["strength"], text["steps"]) == ("bee", "2.5", "0.5", "2")
    drawn(by_class, tmp_path, "--walk", "3", "9")
    text = png_text(tmp_path / "drawn.png")
    assert text["walk"] == "3 9" and "seed" not in text
    drawn(by_class, tmp_path, "--guidance", "3")  # classes in turn
    assert png_text(tmp_path / "drawn.png")["guidance"] == "3.0"


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["--class", "dog"], "--class 'dog': this model has no such class; it has ant, bee, cat"),
        (["--class", "ant,3"], "--class '3': this model has no such class"),
        (["--class", "ant,"], "--class '': this model has no such class"),
        (
            ["--guidance", "2", "--from", "photo.png"],
            "--guidance 2 needs a class; name the picture's class with --class",
        ),
        (["--guidance", "-1", "--class", "ant"], "'-1' is not a number from 0 to 1000"),
        (["--guidance", "nan", "--class", "ant"], "'nan' is not a number from 0 to 1000"),
        (["--strength", "0.5"], "--strength is the noise added to a picture; name the picture with --from"),
        (["--from", "{png}", "--strength", "0"], "'0' is not a number from 0.001 to 1"),
        (["--from", "{png}", "--strength", "1.5"], "'1.5' is not a number from 0.001 to 1"),
        (["--from", "nowhere.png"], "--from nowhere.png cannot be read: No such file or directory"),
        (["--from", "{text}"], "cannot be read: not an image, or of a format that is not known"),
        (["--from", "{png}", "--mask", "nowhere.png"], "--mask nowhere.png cannot be read"),
        (["--mask", "{png}"], "--mask fills a part of a picture; name the picture with --from"),
        (["--walk", "1", "2", "--seed", "0"], "--walk names two seeds; omit --seed"),
        (["--walk", "1", "2", "-n", "1"], "--walk needs at least 2 images"),
        (["--walk", "1", "x"], "'x' is not a whole number of at least 0"),
        (["--film", "film.mp4"], "--film film.mp4: films are animated PNG or GIF files"),
        (["--film", "x.png", "--out", "./x.png"], "--out, --film: these paths overlap"),
        (["--film", "x/1.png", "--out", "x", "--each"], "--out, --film: these paths overlap"),
        (["--from", "p.png", "--out", "{png}"], "--out, --from: these paths overlap"),
        (["--from", "p.png", "--out", ".", "--each"], "--out, --from: these paths overlap"),
        (["--film", "folder.gif"], "--film folder.gif: films are animated PNG or GIF files"),
        (["--film", "p.png/film.gif"], "cannot make the folder of p.png/film.gif: a file is where a folder is needed"),
        (["--from", "{png}", "--mask", "large.png"], "--mask large.png is 20 x 16 and --from"),
    ],
)
def test_bad_values_of_the_new_flags(by_class, tmp_path, capsys, monkeypatch, flags, sentence):
    monkeypatch.chdir(tmp_path)
    picture_of(by_class, tmp_path / "p.png")
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "folder.gif").mkdir()
    Image.new("L", (20, 16)).save(tmp_path / "large.png")
    flags = [flag.format(png=tmp_path / "p.png", text=tmp_path / "text.png") for flag in flags]
    before = sorted(tmp_path.iterdir())
    status = status_of(sample.main, ["--model", str(by_class), "--steps", "1", *flags])
    assert status == 2 and sentence in capsys.readouterr().err and sorted(tmp_path.iterdir()) == before


def test_a_model_that_changes_while_it_is_read_is_refused(tmp_path, monkeypatch):
    """Its hash would be that of other bytes."""
    folder, other = make_model(tmp_path / "m"), make_model(tmp_path / "other", norm_num_groups=4)
    read = unet.read_weights

    def replaced(file):
        tensors = read(file)
        shutil.copyfile(other / "unet/config.json", folder / "unet/config.json")
        return tensors

    monkeypatch.setattr(unet, "read_weights", replaced)
    with pytest.raises(data.InputError, match="changed while it was read"):
        sample.read_model(folder)


def test_guidance_needs_a_model_with_a_null_label(tmp_path, capsys):
    old = make_model(tmp_path / "m", num_class_embeds=3, class_names=NAMES)
    assert sample.main(["--model", str(old), "--class", "ant", "--guidance", "2"]) == 2
    assert "--guidance 2: this model was not trained with classes and label dropout" in capsys.readouterr().err


@pytest.mark.parametrize("names, count", [((), 3), (("a",), 3), (None, 3)], ids=str)
def test_only_one_label_more_than_names_means_no_class(tmp_path, capsys, names, count):
    old = str(make_model(tmp_path / "m", num_class_embeds=count, class_names=names))
    data.write_png(tmp_path / "photo.png", Image.new("RGB", (16, 16), "red"))
    flags = ["--model", old, "--from", str(tmp_path / "photo.png")]
    assert sample.main(flags) == 2 and "this model needs a class" in capsys.readouterr().err
    flags = ["--model", old, "--steps", "1", "-n", "1", "--out", str(tmp_path / "x.png"), "--class"]
    assert sample.main([*flags, "2"]) == 0
    assert sample.main([*flags, "3"]) == 2 and "--class '3': this model has no such class" in capsys.readouterr().err


def test_files_of_classes_never_meet(tmp_path):
    """Names that are one once a file may bear them, and classes named twice."""
    path = str(make_model(tmp_path / "m", num_class_embeds=4, class_names=("a b", "a_b", "A_B")))
    flags = ["--model", path, "--steps", "1", "-n", "2", "--each", "--out", str(tmp_path / "each")]
    assert sample.main([*flags, "--class", "all"]) == 0
    found = {file.name: png_text(file) for file in (tmp_path / "each").iterdir()}
    assert sorted(found) == [f"{label}-{seed}.png" for label in range(3) for seed in range(2)]
    for name, text in found.items():
        label, seed = name.removesuffix(".png").split("-")
        assert (text["class"], text["seed"]) == (("a b", "a_b", "A_B")[int(label)], seed)
    shutil.rmtree(tmp_path / "each")
    assert sample.main([*flags, "--class", "a_b, 1"]) == 0
    assert sorted(file.name for file in (tmp_path / "each").iterdir()) == ["0.png", "1.png"]


@pytest.mark.parametrize("changes", [{"in_channels": 1, "out_channels": 1}, {"in_channels": 12, "out_channels": 12}])
def test_masks_and_walks_of_grey_and_patches(tmp_path, changes):
    patch = 2 if changes["in_channels"] == 12 else 1
    path = make_model(tmp_path / "m", sample_size=16 // patch, patch_size=patch, **changes)
    pixels = picture_of(path, tmp_path / "p.png")
    Image.fromarray((np.arange(256).reshape(16, 16) % 16 // 8 * 255).astype(np.uint8)).save(tmp_path / "m.png")
    flags = ["--from", str(tmp_path / "p.png"), "--mask", str(tmp_path / "m.png"), "--precision", "bf16"]
    expected = pixels if patch == 2 else np.asarray(Image.fromarray(pixels).convert("L"))
    for image in drawn(path, tmp_path, *flags, "--sampler", "ddim", "--eta", "0.5", "--batch-size", "2", n=3):
        assert np.array_equal(image[:, :8], expected[:, :8]) and not np.array_equal(image, expected)
    walk = drawn(path, tmp_path, "--walk", "1", "2", n=3)
    assert np.abs(stacked(walk[:1]) - stacked(drawn(path, tmp_path, "--seed", "1", n=1))).max() <= 1


def test_the_film_of_walks_of_classes_is_a_row_of_them(by_class, tmp_path):
    rows = drawn(by_class, tmp_path, "--walk", "1", "2", "--class", "all", "--film", str(tmp_path / "w.png"), n=4)
    with Image.open(tmp_path / "w.png") as frames:
        assert frames.n_frames == 4
        frames.seek(1)
        image = np.asarray(frames)
    for k in range(3):
        assert np.array_equal(image[2:18, 2 + k * 18 : 18 + k * 18], rows[4 * k + 1])


def test_a_path_that_is_no_text(folder, tmp_path):
    """Linux allows any bytes in a name; the picture's text takes them escaped."""
    path = os.fsdecode(os.fsencode(tmp_path) + b"/bad\xff.png")
    try:
        picture_of(folder, path)
    except OSError:
        pytest.skip("this system has no such names")
    drawn(folder, tmp_path, "--from", path)
    assert png_text(tmp_path / "drawn.png")["from"].endswith("bad\\udcff.png")


# ---- threads, compilation --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text,expected",
    [("max 100000", 4), ("150000 100000", 2), ("50000 100000", 1), ("900000 100000", 4), ("nonsense", 4)],
)
def test_threads_follow_a_containers_share(text, expected, tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        (tmp_path / "cpu.max").write_text(text + "\n")
        sample.set_threads(tmp_path / "cpu.max")
        sample.set_threads(tmp_path / "missing")
        assert torch.get_num_threads() == expected
        monkeypatch.setenv("OMP_NUM_THREADS", "3")
        torch.set_num_threads(4)
        sample.set_threads(tmp_path / "cpu.max")
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("precision, levels", [("fp32", 1), ("bf16", 8)][: 1 + sample.has_bf16(torch.device("cpu"))])
def test_compiled_draws_what_eager_draws(tmp_path, monkeypatch, shared_folder, precision, levels):
    cache = shared_folder / "compiled"  # PyTorch's headers are compiled into it once
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(cache))
    before = set(cache.rglob("*.so"))
    one_level = {"block_out_channels": (16,), "down_block_types": ("AttnDownBlock2D",), "mid_block_type": None}
    path = make_model(tmp_path / "m", **one_level, up_block_types=("UpBlock2D",))
    model = sample.load(path, precision=precision)
    table = ddpm.sampler_table(model.schedule, steps=6)
    eager = sample.draw(model, range(3), table).int()
    sample.compile_for_drawing(model.network, 3)
    compiled = sample.draw(model, range(3), table).int()
    assert set(cache.rglob("*.so")) - before  # it was compiled, and kept
    assert (eager - compiled).abs().max() <= levels and eager.float().std() > 20


def test_compile_is_asked_for_by_a_flag(folder, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(sample, "compile_for_drawing", lambda *how: asked.append(how))
    flags = ["--model", str(folder), "--steps", "2", "-n", "1", "--out", str(tmp_path / "x.png")]
    assert sample.main(flags) == 0 and not asked
    assert sample.main([*flags, "--compile"]) == 0 and isinstance(asked[0][0], unet.UNet) and asked[0][1] == 1


def test_where_compile_does_not_work_drawing_goes_on_eager(folder, tmp_path, monkeypatch, capsys):
    def refuse(*args, **kwargs):
        raise RuntimeError("no compiler here\nand more")

    plain = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **how: plain(f, **how) if how.get("disable") else refuse)
    flags = ["--model", str(folder), "--steps", "2", "-n", "1", "--out"]
    assert sample.main([*flags, str(tmp_path / "a.png")]) == 0
    assert sample.main([*flags, str(tmp_path / "b.png"), "--compile"]) == 0
    assert capsys.readouterr().out.count("torch.compile does not work here (no compiler here): continuing") == 1
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_the_default_model_is_drawn_from_where_there_is_no_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert sample.main(["-n", "8"]) == 0
    assert (
        "the default model (runs/ has no model yet; override with --model): 64 px, ipndm, 10 steps"
        in capsys.readouterr().out
    )
    with Image.open(tmp_path / "samples.png") as picture:
        assert np.asarray(picture).std() > 20
    assert sum(file.stat().st_size for file in sample.DEFAULT_MODEL.rglob("*")) < 12_000_000


def test_the_default_model_draws_butterflies():
    """Nearer to fresh specimens than these are when blurred; and diffusers opens it."""
    precision = sample.choose_precision(torch.device("cpu"))
    model, features = sample.load(sample.DEFAULT_MODEL, precision=precision), monitor.load_features()
    assert model.network.config.class_names == tuple(data.prepare("synthetic:30", 32, channels=3).classes)
    labels = torch.randint(15, (75,), generator=torch.Generator().manual_seed(0)).tolist()
    drawn = sample.draw(model, range(75), ddpm.sampler_table(model.schedule), labels, batch_size=15)
    real = monitor.random_subset(monitor.read_images("synthetic:620:5", (3, 64, 64)), 300).images
    real = torch.from_numpy(real)
    blurred = data.to_uint8(torch.nn.functional.avg_pool2d(data.to_float(real), 5, 1, 2, count_include_pad=False))
    ours, worse = (monitor.quality(features, images, real)["kid"] for images in (drawn, blurred))
    assert ours.high < worse.low and ours.low < 0 < ours.high
    model, peer = sample.load(sample.DEFAULT_MODEL), UNet2DModel.from_pretrained(sample.DEFAULT_MODEL / "unet")
    x, t, label = torch.randn(2, 3, 64, 64), torch.tensor([900, 20]), torch.tensor([3, 15])
    with torch.no_grad():
        assert (peer(x, t, label).sample - model.network(x, t, label)).abs().max() < 1e-4


def test_exporting_the_default_model_again_gives_the_same_bytes(tmp_path, monkeypatch, capsys):
    source = sample.DEFAULT_MODEL
    monkeypatch.setattr(sample, "DEFAULT_MODEL", tmp_path / "model")
    export.main(str(source))
    assert capsys.readouterr().out.startswith(f"wrote {tmp_path / 'model'}")
    for file in (WEIGHTS, "unet/config.json", "scheduler/scheduler_config.json", "model_index.json"):
        assert (tmp_path / "model" / file).read_bytes() == (source / file).read_bytes()


def test_a_copy_for_drawing_is_not_saved(folder, tmp_path):
    model = sample.load(folder)
    with pytest.raises(ValueError, match="prepared for drawing"):
        sample.save_model(tmp_path / "copy", model.network, model.schedule)
    assert not (tmp_path / "copy").exists()
