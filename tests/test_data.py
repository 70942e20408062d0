"""data.py against hand-computed values, Pillow and NumPy references, and deliberate damage."""

import errno
import hashlib
import http.server
import io
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

import data
from builtin import butterflies
from data import InputError
from tests.conftest import png_text, status_of
from tests.shapes import make_shapes


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PAPILIO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return make_shapes(tmp_path_factory.mktemp("shapes"), count=40, size=24)


def encode(image, format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def solid(mode, colour, size=(16, 16)):
    return Image.new(mode, size, colour)


def prepare(folder, size=16, **options):
    return data.prepare(str(folder), size, progress=False, **options)


def noise_images(count, size=16, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, 3, size, size), np.uint8)


def save_all(folder, images):
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        Image.fromarray(image.transpose(1, 2, 0)).save(folder / f"{i:04d}.png")
    return folder


def leftovers(folder):
    return [path.name for path in folder.rglob(".*")]


# ---------------------------------------------------------------------------------------------------- pixels


def test_float_pair_is_exact_and_is_diffusers_formula():
    levels = torch.arange(256, dtype=torch.uint8)
    floats = data.to_float(levels)
    assert floats.dtype == torch.float32 and floats[0] == -1 and floats[255] == 1
    assert torch.equal(data.to_uint8(floats), levels)
    draws = torch.linspace(-1.5, 1.5, 100_001)
    reference = ((draws / 2 + 0.5).clamp(0, 1).numpy() * 255).round().astype("uint8")
    assert np.array_equal(data.to_uint8(draws).numpy(), reference)
    assert data.to_uint8(draws.bfloat16()).dtype == torch.uint8


def palette_with_transparency():
    image = Image.new("P", (16, 16), 1)
    image.putpalette([10, 20, 30, 200, 100, 50])
    return encode(image, transparency=b"\x00\x80")  # entry 0 clear, entry 1 half covered


def half(colour):  # 128/255 of a colour over white
    return tuple(round(255 + (level - 255) * 128 / 255) for level in colour)


CONVERSIONS = {
    "RGB": (encode(solid("RGB", (200, 100, 50))), (200, 100, 50)),
    "L": (encode(solid("L", 77)), (77, 77, 77)),
    "1": (encode(solid("1", 1)), (255, 255, 255)),
    "RGBA half": (encode(solid("RGBA", (200, 100, 50, 128))), half((200, 100, 50))),
    "RGBA clear black": (encode(solid("RGBA", (0, 0, 0, 0))), (255, 255, 255)),
    "LA": (encode(solid("LA", (40, 128))), half((40, 40, 40))),
    "RGB with a clear colour": (encode(solid("RGB", (9, 9, 9)), transparency=(9, 9, 9)), (255, 255, 255)),
    "palette": (encode(solid("RGB", (10, 20, 30)).quantize(4)), (10, 20, 30)),
    "palette, transparent": (palette_with_transparency(), half((200, 100, 50))),
    "CMYK": (encode(solid("CMYK", (0, 255, 255, 0)), "TIFF"), (255, 0, 0)),
    "CMYK JPEG": (encode(solid("CMYK", (0, 255, 255, 0)), "JPEG", quality=100), (255, 0, 0)),
    "16 bit": (encode(Image.fromarray(np.full((16, 16), 257 * 60, np.uint16))), (60, 60, 60)),
    "16 bit white": (encode(Image.fromarray(np.full((16, 16), 65535, np.uint16))), (255, 255, 255)),
    "16 bit big-endian": (
        encode(Image.frombytes("I;16B", (16, 16), (257 * 60).to_bytes(2, "big") * 256), "TIFF"),
        (60, 60, 60),
    ),
    "32 bit": (encode(Image.fromarray(np.full((16, 16), 257 * 61, np.int32)), "TIFF"), (61, 61, 61)),
    "BMP": (encode(solid("RGB", (1, 2, 3)), "BMP"), (1, 2, 3)),
    "WebP": (encode(solid("RGB", (1, 2, 3)), "WEBP", lossless=True), (1, 2, 3)),
}


@pytest.mark.parametrize("name", CONVERSIONS)
def test_every_mode_becomes_8_bits_on_white(name):
    encoded, colour = CONVERSIONS[name]
    tolerance = 3 if "JPEG" in name else 1 if "half" in name or name in ("LA", "palette, transparent") else 0
    pixels = data.decode(encoded, 8, 3)
    assert pixels.shape == (3, 8, 8) and pixels.dtype == np.uint8
    assert np.abs(pixels.astype(int) - np.array(colour)[:, None, None]).max() <= tolerance
    grey = data.decode(encoded, 8, 1)
    assert grey.shape == (1, 8, 8)
    luma = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]  # ITU-R 601
    assert np.abs(grey - luma).max() <= tolerance + 1


def test_floating_point_images_are_refused():
    with pytest.raises(ValueError, match="floating-point"):
        data.decode(encode(solid("F", 0.5), "TIFF"), 8, 3)


def test_an_animation_gives_its_first_frame():
    red, blue = solid("RGB", (255, 0, 0)), solid("RGB", (0, 0, 255))
    pixels = data.decode(encode(red, "GIF", save_all=True, append_images=[blue]), 8, 3)
    assert pixels[:, 0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone(orientation):
    upright = Image.fromarray(noise_images(1)[0].transpose(1, 2, 0))
    turn = Image.Transpose
    as_stored = {  # what a camera held that way stores: the inverse of what the tag asks for
        2: turn.FLIP_LEFT_RIGHT,
        3: turn.ROTATE_180,
        4: turn.FLIP_TOP_BOTTOM,
        5: turn.TRANSPOSE,
        6: turn.ROTATE_90,
        7: turn.TRANSVERSE,
        8: turn.ROTATE_270,
    }
    stored = upright.transpose(as_stored[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = data.decode(encode(stored, exif=exif), 16, 3)
    assert np.array_equal(pixels.transpose(1, 2, 0), np.asarray(upright))


@pytest.mark.parametrize("orientation, turned", [(6, Image.Transpose.ROTATE_90), (8, Image.Transpose.ROTATE_270)])
def test_a_turned_photo_is_cropped_as_it_is_seen(orientation, turned):
    """Twice as high as wide, stored lying: the same as the upright photo without a tag, with and without scaling."""
    upright = Image.fromarray(noise_images(1, 64)[0].transpose(1, 2, 0)).crop((0, 0, 32, 64))
    exif = Image.Exif()
    exif[0x0112] = orientation
    for size in (32, 16):
        pixels = data.decode(encode(upright.transpose(turned), exif=exif), size, 3)
        assert np.array_equal(pixels, data.decode(encode(upright), size, 3))
    middle = np.asarray(upright)[16:48].transpose(2, 0, 1)
    assert np.array_equal(data.decode(encode(upright.transpose(turned), exif=exif), 32, 3), middle)


@pytest.mark.parametrize("size", [(300, 120), (120, 300)])
def test_a_circle_stays_a_circle_and_the_centre_is_kept(size):
    image = solid("RGB", "white", size)
    x, y = size[0] / 2, size[1] / 2
    ImageDraw.Draw(image).ellipse((x - 40, y - 40, x + 40, y + 40), fill="black")
    dark = data.decode(encode(image), 60, 1)[0] < 128
    rows, columns = np.nonzero(dark)
    assert np.ptp(rows) == np.ptp(columns) and 38 <= np.ptp(rows) + 1 <= 42  # 80 of 120 px is 40 of 60
    assert abs(rows.mean() - 29.5) < 0.5 and abs(columns.mean() - 29.5) < 0.5
    assert dark.sum() == pytest.approx(np.pi * 20**2, rel=0.04)


def test_fitting_pixels_are_cropped_without_resampling():
    pixels = np.random.default_rng(1).integers(0, 256, (16, 25, 3), np.uint8)
    assert np.array_equal(data.decode(encode(Image.fromarray(pixels)), 16, 3).transpose(1, 2, 0), pixels[:, 4:20])


def test_scaling_is_pillows_antialiased_lanczos():
    pixels = noise_images(1, 64)[0]
    image = Image.fromarray(pixels.transpose(1, 2, 0))
    reference = np.asarray(image.resize((16, 16), Image.Resampling.LANCZOS)).transpose(2, 0, 1)
    assert np.array_equal(data.decode(encode(image), 16, 3), reference)
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255  # without antialiasing these would turn black or white
    grey = data.decode(encode(Image.fromarray(stripes)), 16, 3)
    assert np.abs(grey[:, :, 2:-2].astype(int) - 128).max() < 12


def test_draft_mode_of_a_large_jpeg_changes_little():
    ramp = np.linspace(0, 255, 1024).astype(np.uint8)
    image = Image.fromarray(
        np.stack([np.tile(ramp, (1024, 1)), np.tile(ramp[:, None], 1024), 0 * ramp[:, None] + ramp], 2)
    )
    reference = np.asarray(image.resize((32, 32), Image.Resampling.LANCZOS)).transpose(2, 0, 1)
    pixels = data.decode(encode(image, "JPEG", quality=95), 32, 3)
    assert np.abs(pixels.astype(int) - reference).max() <= 4


def test_grid_puts_every_image_in_its_place():
    images = noise_images(5, 8)
    picture = np.asarray(data.grid(torch.from_numpy(images), columns=3, padding=2))
    assert picture.shape == (22, 32, 3)
    assert np.array_equal(picture[2:10, 12:20], images[1].transpose(1, 2, 0))
    assert np.array_equal(picture[12:20, 12:20], images[4].transpose(1, 2, 0))
    assert (picture[12:20, 22:30] == 255).all() and (picture[:2] == 255).all()
    assert data.grid(images[:, :1]).mode == "L"
    assert data.grid(images[:1]).size == (12, 12)
    assert data.grid(noise_images(9, 8)).size == (32, 32)
    plain, large = (np.asarray(data.grid(images[:2], padding=0, scale=scale)) for scale in (1, 3))
    assert np.array_equal(large, np.kron(plain, np.ones((3, 3, 1), np.uint8)))
    for wrong in (images[:0], images.astype(np.float32), images[:, :2], images[0]):
        with pytest.raises(InputError, match="grid"):
            data.grid(wrong)


# ------------------------------------------------------------------------------------------------- randomness


def test_generator_is_a_function_of_its_key():
    def draw(*key):
        return torch.randint(2**62, (4,), generator=data.generator(*key)).tolist()

    assert draw(1, "noise", 2) == draw(np.int64(1), "noise", torch.tensor(2))
    keys = [
        (1, "noise", 2),
        (1, "noise", 3),
        (2, "noise", 2),
        (1, "flip", 2),
        ("1", "noise", 2),
        (1, "noise2"),
    ]
    assert len({tuple(draw(*key)) for key in keys}) == len(keys)
    expected = int.from_bytes(hashlib.blake2b(b'[7, "a"]', digest_size=8).digest(), "little") // 2
    assert data.generator(7, "a").initial_seed() == expected < 2**63
    with pytest.raises(TypeError):
        data.generator(0.5)


@pytest.mark.parametrize(("n", "batch"), [(10, 4), (7, 7), (3, 8), (100, 1)])
def test_batches_walk_through_fresh_permutations(n, batch):
    stream = torch.cat([data.batch_indices(n, 3, step, batch) for step in range(4 * n)])
    epochs = stream[: len(stream) // n * n].view(-1, n)
    assert (epochs.sort(dim=1).values == torch.arange(n)).all()
    assert len({tuple(epoch) for epoch in epochs.tolist()}) > 1
    assert not torch.equal(stream, torch.cat([data.batch_indices(n, 4, s, batch) for s in range(4 * n)]))


def test_batches_need_no_history_and_do_not_share_memory():
    unbroken = [data.batch_indices(50, 0, step, 8) for step in range(30)]
    data._permutation.cache_clear()
    assert torch.equal(data.batch_indices(50, 0, 21, 8), unbroken[21])
    data.batch_indices(50, 0, 21, 8).zero_()
    assert torch.equal(data.batch_indices(50, 0, 21, 8), unbroken[21])
    # the global sequence does not depend on how it is cut
    assert torch.equal(torch.cat([data.batch_indices(50, 0, s, 4) for s in range(60)]), torch.cat(unbroken))


def test_flips_mirror_half_of_the_images_and_agree_between_processes():
    images = torch.from_numpy(noise_images(400, 8))
    whole = data.flip(images, 5, 11)
    mirrored = [torch.equal(a, b.flip(-1)) for a, b in zip(whole, images, strict=True)]
    kept = [torch.equal(a, b) for a, b in zip(whole, images, strict=True)]
    assert all(a != b for a, b in zip(mirrored, kept, strict=True)) and 150 < sum(mirrored) < 250
    parts = [data.flip(images[s : s + 100], 5, 11, start=s, total=400) for s in range(0, 400, 100)]
    assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(data.flip(images, 5, 12), whole) and not torch.equal(data.flip(images, 6, 11), whole)


# ---------------------------------------------------------------------------------------------------- writing


def test_png_text_round_trip(tmp_path):
    text = {"seed": "0", "prompt": "Schmetterling – 蝶", "long": "x" * 5000}
    path = tmp_path / "new" / "folder" / "a.png"
    data.write_png(path, solid("RGB", (1, 2, 3)), text)
    assert png_text(path) == text
    with Image.open(path) as image:
        assert image.getpixel((0, 0)) == (1, 2, 3)
    data.write_png(path, solid("L", 9))
    assert png_text(path) == {} and leftovers(tmp_path) == []


def fail_with(code):
    def fail(*_):
        raise OSError(code, os.strerror(code))

    return fail


@pytest.mark.parametrize("where", ["write", "fsync", "replace"])
def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch, where):
    path = tmp_path / "weights.bin"
    data.atomic_write(path, lambda file: file.write(b"old"))
    write = lambda file: file.write(b"new")  # noqa: E731
    if where == "write":
        write = fail_with(errno.ENOSPC)
    else:
        monkeypatch.setattr(os, where, fail_with(errno.ENOSPC))
    with pytest.raises(InputError, match=r"weights\.bin: No space left on device; free some space"):
        data.atomic_write(path, write)
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["weights.bin"]


def test_a_crash_while_writing_leaves_the_old_file(tmp_path):
    path = tmp_path / "a"
    data.atomic_write(path, lambda file: file.write(b"old"))

    def crash(file):
        file.write(b"half")
        raise KeyError("mine")

    with pytest.raises(KeyError):
        data.atomic_write(path, crash)
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["a"]


def test_places_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="a file is where a folder is needed"):
        data.atomic_write(tmp_path / "file" / "a", lambda file: None)
    with pytest.raises(InputError, match="folder"):
        data.atomic_write(tmp_path / "folder", lambda file: None)
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


# ---------------------------------------------------------------------------------------------------- folders


def test_a_folder_of_classes(tmp_path):
    images = noise_images(6)
    save_all(tmp_path / "s" / "train" / "moth", images[:2])
    save_all(tmp_path / "s" / "train" / "bee", images[2:4])
    save_all(tmp_path / "s" / "test" / "moth", images[4:])
    save_all(tmp_path / "s" / ".thumbnails", images[:1])
    (tmp_path / "s" / "train" / "bee" / "0001.png").rename(tmp_path / "s" / "train" / "bee" / "0001.PNG")
    (tmp_path / "s" / "notes.txt").write_text("no image")
    dataset = prepare(tmp_path / "s")
    assert dataset.classes == ("bee", "moth") and dataset.labels.tolist() == [1, 1, 0, 0, 1, 1]
    assert dataset.labels.dtype == np.int64 and dataset.skipped == ()
    assert np.array_equal(dataset.images, images[[4, 5, 2, 3, 0, 1]])  # test/ comes before train/
    assert isinstance(dataset.images, np.memmap)
    dataset.images[0] = 0  # a private copy: what is on disk stays as it is
    assert np.array_equal(prepare(tmp_path / "s").images[0], images[4])
    first = (tmp_path / "s" / "test" / "moth" / "0000.png").read_bytes()
    assert dataset.digests[0].tobytes() == hashlib.sha256(first).digest()
    assert dataset.source == str((tmp_path / "s").resolve()) and dataset.revision is None


def test_no_classes_without_two_class_folders(tmp_path):
    images = noise_images(4)
    one = save_all(tmp_path / "one" / "only", images).parent
    root = save_all(tmp_path / "root", images)
    save_all(root / "deeper", images)
    for folder in (one, root):
        dataset = prepare(folder)
        assert dataset.classes == () and dataset.labels is None


def test_one_channel(shapes):
    grey, colour = prepare(shapes, 24, channels=1), prepare(shapes, 24)
    assert grey.images.shape == (40, 1, 24, 24)
    luma = np.tensordot([0.299, 0.587, 0.114], colour.images.astype(float), (0, 1))
    assert np.abs(luma - grey.images[:, 0]).max() <= 1
    assert np.array_equal(grey.digests, colour.digests)


def test_the_fingerprint_covers_pixels_labels_names_and_order(shapes):
    dataset = prepare(shapes)
    facts = [[40, 3, 16, 16], ["circle", "diamond", "hexagon", "square", "triangle"]]
    content = json.dumps(facts).encode() + dataset.labels.tobytes() + dataset.images.tobytes()
    assert dataset.fingerprint == hashlib.sha256(content).hexdigest()
    others = [
        (dataset.images[::-1], dataset.labels, dataset.classes),
        (dataset.images, dataset.labels[::-1], dataset.classes),
        (dataset.images, None, ()),
        (dataset.images, dataset.labels, ("a", *dataset.classes[1:])),
    ]
    assert dataset.fingerprint not in {data.data_fingerprint(*other) for other in others}


def damage(folder, kind, monkeypatch):
    """One more file that cannot be read, and what its line says."""
    if kind == "truncated":
        (folder / "bad.jpg").write_bytes(encode(Image.fromarray(noise_images(1, 64)[0].T), "JPEG")[:1500])
        return "bad.jpg: .*truncated"
    if kind == "text":
        (folder / "bad.png").write_text("not a picture")
        return "bad.png: not an image"
    if kind == "empty":
        (folder / "bad.png").write_bytes(b"")
        return "bad.png: not an image"
    if kind == "float":
        solid("F", 0.5).save(folder / "bad.tif")
        return "bad.tif: floating-point"
    # Pillow raises by itself above twice the limit and only warns below it
    side = {"bomb": 40, "large bomb": 100}[kind]
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    solid("RGB", "red", (side, side)).save(folder / "bad.png")
    return "bad.png: .*(pixels|decompression bomb)"


@pytest.mark.parametrize("kind", ["truncated", "text", "empty", "float", "bomb", "large bomb"])
@pytest.mark.filterwarnings("error")
def test_an_unreadable_file_is_named_counted_and_skipped(tmp_path, monkeypatch, kind):
    folder = save_all(tmp_path / "s", noise_images(120, 8))
    line = damage(folder, kind, monkeypatch)
    dataset = prepare(folder, 8)
    assert len(dataset.images) == 120 == len(dataset.digests)
    assert len(dataset.skipped) == 1
    assert re.match(line, dataset.skipped[0])
    assert prepare(folder, 8).skipped == dataset.skipped


def test_over_one_percent_of_unreadable_files_is_an_error(tmp_path, cache):
    folder = save_all(tmp_path / "s", noise_images(98, 8))
    for i in range(2):
        (folder / f"bad{i}.png").write_text("text")
    with pytest.raises(InputError, match=r"2 of 100 images .*bad0\.png: not an image.*bad1"):
        prepare(folder, 8)
    assert leftovers(cache) == [] and list(cache.rglob("*.bin")) == []
    (folder / "bad1.png").unlink()
    save_all(folder / "more", noise_images(1, 8))
    assert len(prepare(folder, 8).skipped) == 1  # 1 of 100 is not over 1%


def test_sources_that_are_none(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.txt").write_text("")
    one = save_all(tmp_path / "one", noise_images(1))
    for source, sentence in [
        (tmp_path / "missing", "neither a folder nor a parquet file here, and not a Hugging Face dataset id"),
        (tmp_path / "empty", "holds no images"),
        (tmp_path / "text.txt", "not parquet"),
        (one / "0000.png", "name the folder"),
        (one, "at least 2 are needed"),
        ("", "neither a folder"),
        ("x" * 5000, "neither a folder"),
        ("nul\0byte", "neither a folder"),
        ("a/b/c", "not a Hugging Face dataset id"),
    ]:
        with pytest.raises(InputError, match=sentence):
            prepare(source)
    with pytest.raises(InputError, match="--revision main: only Hugging Face datasets"):
        prepare(one, revision="main")


@pytest.mark.parametrize("size", [0, -8, 7, 1025])
def test_sizes_that_are_none(shapes, size):
    with pytest.raises(InputError, match=f"images of {size} px: the size must be from 8 to 1024"):
        prepare(shapes, size)


def test_any_size_and_wrong_channels(shapes):
    assert prepare(shapes, 65).images.shape == (40, 3, 65, 65)
    assert len(data.split(prepare(shapes, 65))[1]) == 5
    with pytest.raises(InputError, match="4 image channels"):
        prepare(shapes, channels=4)


# ------------------------------------------------------------------------------------------------------ cache


def forbid(*_, **__):
    raise AssertionError("must not be called")


def test_prepared_data_is_opened_without_decoding(shapes, monkeypatch):
    first = prepare(shapes)
    monkeypatch.setattr(data, "decode", forbid)
    again = prepare(shapes)
    assert again.folder == first.folder and again.fingerprint == first.fingerprint
    assert np.array_equal(again.images, first.images) and np.array_equal(again.labels, first.labels)
    assert again.classes == first.classes and np.array_equal(again.digests, first.digests)
    with pytest.raises(InputError, match="cannot be read"):  # another size is decoded, and fails here
        prepare(shapes, 8)


def test_a_changed_source_is_prepared_anew(tmp_path):
    folder = save_all(tmp_path / "s", noise_images(4))
    first = prepare(folder)
    os.utime(folder / "0002.png", ns=(1, 1))
    second = prepare(folder)
    assert second.folder != first.folder and second.fingerprint == first.fingerprint
    save_all(folder / "more", noise_images(1, seed=1))
    assert len(prepare(folder).images) == 5
    assert len({prepare(folder, 8).folder, prepare(folder, channels=1).folder, prepare(folder).folder}) == 3


@pytest.mark.parametrize("name", ["images.bin", "labels.npy", "digests.npy", "meta.json"])
@pytest.mark.parametrize("how", ["cut", "gone"])
def test_a_damaged_cache_is_rebuilt(shapes, cache, name, how):
    dataset = prepare(shapes)
    path = dataset.folder / name
    content = path.read_bytes()
    del dataset
    path.unlink() if how == "gone" else path.write_bytes(content[: len(content) // 2])
    assert np.array_equal(prepare(shapes).images, prepare(shapes).images)
    assert path.read_bytes() == content and leftovers(cache) == []


def test_a_cache_that_grew_is_rebuilt(shapes):
    path = prepare(shapes).folder / "images.bin"
    content = path.read_bytes()
    path.write_bytes(content + b"x")
    prepare(shapes)
    assert path.read_bytes() == content


def test_a_slower_process_takes_the_faster_ones_data(shapes, cache, monkeypatch):
    fill = data._fill

    def overtaken(*args):
        monkeypatch.setattr(data, "_fill", fill)
        nested.append(prepare(shapes))
        fill(*args)

    nested = []
    monkeypatch.setattr(data, "_fill", overtaken)
    dataset = prepare(shapes)
    assert dataset.folder == nested[0].folder and dataset.fingerprint == nested[0].fingerprint
    assert len(list((cache / "data").iterdir())) == 1


def test_a_full_disk_while_preparing(shapes, cache, monkeypatch):
    monkeypatch.setattr(os, "fsync", fail_with(errno.ENOSPC))
    with pytest.raises(InputError, match="No space left on device"):
        prepare(shapes)
    assert list((cache / "data").iterdir()) == []


def test_a_cache_that_cannot_be_made(shapes, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="a file is where a folder is needed"):
        prepare(shapes, cache=tmp_path / "file")


def test_where_the_cache_is(tmp_path, monkeypatch):
    assert data.cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("PAPILIO_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert data.cache_folder() == tmp_path / "xdg" / "papilio"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert data.cache_folder().parts[-2:] == (".cache", "papilio")


def test_reading_ahead_is_bounded(tmp_path, monkeypatch):
    """Encoded images are read a few at a time: a large dataset need not fit in memory."""
    read, most, decode_item = [], [], data.decode_item

    def decode(item, **options):
        most.append(len(read) - item.label)
        return decode_item(item, **options)

    monkeypatch.setattr(data, "decode_item", decode)
    content = encode(solid("L", 7))
    items = (read.append(i) or data.Item(str(i), content, i) for i in range(600))
    labels, digests, skipped = data._decode_all(tmp_path / "images.bin", items, 600, 8, 1, False)
    assert labels == list(range(600)) and len(digests) == 600 and not skipped
    assert max(most) <= 256 and (tmp_path / "images.bin").stat().st_size == 600 * 64


# ---------------------------------------------------------------------------------------------------- parquet


def parquet(path, columns, features):
    import datasets

    datasets.disable_progress_bars()
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(columns, features=features).to_parquet(str(path))
    return path


def encoded_images(count, seed=0):
    images = noise_images(count, seed=seed)
    return images, [encode(Image.fromarray(image.transpose(1, 2, 0))) for image in images]


def test_parquet_with_an_image_column_and_class_names(tmp_path):
    import datasets

    images, encoded = encoded_images(6)
    features = datasets.Features(
        {
            "note": datasets.Value("string"),
            "kind": datasets.ClassLabel(names=["owl", "ant"]),
            "photo": datasets.Image(),
        }
    )
    rows = [{"bytes": each, "path": None} for each in encoded]
    columns = {"note": ["x"] * 6, "kind": [0, 1, 1, 0, 0, 1], "photo": rows}
    path = parquet(tmp_path / "p" / "train.parquet", columns, features)
    for source in (path, path.parent):
        dataset = prepare(source)
        assert dataset.classes == ("owl", "ant") and dataset.labels.tolist() == [0, 1, 1, 0, 0, 1]
        assert np.array_equal(dataset.images, images)
        assert dataset.digests[3].tobytes() == hashlib.sha256(encoded[3]).digest()


def test_parquet_with_raw_structs_in_several_files(tmp_path):
    import datasets

    value = datasets.Value
    features = datasets.Features(
        {"picture": {"bytes": value("binary"), "path": value("string")}, "label": value("int64")}
    )
    images, encoded = encoded_images(200)
    rows = [{"bytes": each, "path": f"{i}.png"} for i, each in enumerate(encoded)]
    rows[120] = {"bytes": b"broken", "path": "120.png"}
    labels = [(7, 30)[i % 2] for i in range(200)]
    for part in range(2):
        half = slice(100 * part, 100 * part + 100)
        parquet(tmp_path / "p" / f"{part}.parquet", {"picture": rows[half], "label": labels[half]}, features)
    dataset = prepare(tmp_path / "p")
    assert dataset.skipped == ("120.png: not an image, or of a format that is not known",)
    assert dataset.classes == ("7", "30") and dataset.labels[:3].tolist() == [0, 1, 0]
    assert np.array_equal(dataset.images, np.delete(images, 120, 0))
    assert len(dataset.labels) == 199 and dataset.labels[119:121].tolist() == [1, 1]


def test_parquet_with_binary_cells_and_text_labels(tmp_path):
    import datasets

    images, encoded = encoded_images(3)
    features = datasets.Features({"jpg": datasets.Value("binary"), "class": datasets.Value("string")})
    path = parquet(tmp_path / "a.parquet", {"jpg": encoded, "class": ["fly", "bee", "fly"]}, features)
    dataset = prepare(path)
    assert dataset.classes == ("bee", "fly") and dataset.labels.tolist() == [1, 0, 1]
    assert np.array_equal(dataset.images, images)


def test_missing_labels_mean_no_classes(tmp_path):
    assert data._dense_labels([0, None], ("a",)) == (None, ())
    assert data._dense_labels([0, -1], ("a",)) == (None, ())
    assert data._dense_labels([None, None], ()) == (None, ())


def test_parquet_without_images_or_broken(tmp_path):
    import datasets

    features = datasets.Features({"a": datasets.Value("int64"), "b": datasets.Value("string")})
    path = parquet(tmp_path / "a.parquet", {"a": [1], "b": ["x"]}, features)
    with pytest.raises(InputError, match="no column holds images; the columns are: a, b"):
        prepare(path)
    (tmp_path / "b.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(InputError, match="cannot load"):
        prepare(tmp_path / "b.parquet")


# -------------------------------------------------------------------------------------------------------- hub


def without_proxies(monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


def closed_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def test_a_hub_that_refuses_is_noticed(monkeypatch, cache):
    without_proxies(monkeypatch)
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{closed_port()}")
    with pytest.raises(InputError, match="'org/name' is no folder here, and the Hugging Face hub at http://127.0.0.1"):
        prepare("org/name")
    assert leftovers(cache) == []


def test_a_hanging_name_lookup_is_noticed(monkeypatch):
    without_proxies(monkeypatch)
    monkeypatch.setenv("HF_ENDPOINT", "http://hub.invalid")
    begun, ended = [], []

    def hang(*_, **__):
        begun.append(True)
        time.sleep(30)
        ended.append(True)

    monkeypatch.setattr(socket, "getaddrinfo", hang)
    with pytest.raises(InputError, match="hub at http://hub.invalid did not answer within 5 seconds"):
        prepare("smithsonian")
    assert begun and not ended


@pytest.mark.parametrize(("status", "reachable"), [(200, True), (404, True), (500, True), (502, False), (504, False)])
def test_any_answer_but_a_proxys_failure_counts(monkeypatch, status, reachable):
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            seen.append(self.path)
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_):
            pass

    seen = []
    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    without_proxies(monkeypatch)
    try:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        assert data._hub_answers() is reachable
        # through a proxy: it is asked, for a hub whose name nobody knows
        monkeypatch.setenv("HF_ENDPOINT", "http://hub.invalid/")
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.delenv("no_proxy", raising=False)
        monkeypatch.delenv("NO_PROXY", raising=False)
        assert data._hub_answers() is reachable and seen[-1] == "http://hub.invalid/"
    finally:
        server.shutdown()
        server.server_close()


def test_a_hub_id_and_its_revision(monkeypatch):
    import datasets

    images, encoded = encoded_images(4)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    rows = [{"bytes": each, "path": None} for each in encoded]
    table = datasets.Dataset.from_dict({"image": rows, "label": [0, 1, 1, 0]}, features=features)
    calls = []

    def load(name, **options):
        calls.append((name, options))
        return table

    monkeypatch.setattr(data, "_hub_answers", lambda: True)
    monkeypatch.setattr(datasets, "load_dataset", load)
    dataset = prepare("smithsonian", revision="abc")
    assert calls == [("huggan/smithsonian_butterflies_subset", {"revision": "abc", "split": "train"})]
    assert dataset.source == "huggan/smithsonian_butterflies_subset" and dataset.revision == "abc"
    assert np.array_equal(dataset.images, images) and dataset.classes == ("a", "b")
    # what is prepared needs neither the hub nor datasets
    monkeypatch.setattr(data, "_hub_answers", forbid)
    monkeypatch.setattr(datasets, "load_dataset", forbid)
    monkeypatch.setattr(socket, "getaddrinfo", forbid)
    assert prepare("smithsonian", revision="abc").fingerprint == dataset.fingerprint


def test_what_datasets_says_becomes_one_sentence(monkeypatch):
    import datasets

    def load(*_, **__):
        raise datasets.exceptions.DatasetNotFoundError("Dataset 'org/name' doesn't exist\nand more\nlines")

    monkeypatch.setattr(data, "_hub_answers", lambda: True)
    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(InputError) as caught:
        prepare("org/name")
    assert str(caught.value) == "cannot load 'org/name': Dataset 'org/name' doesn't exist"


# ------------------------------------------------------------------------------------------------------ split


def smooth_images(count, size=32, seed=0):
    """Images that survive JPEG and scaling: few large patches."""
    patches = np.random.default_rng(seed).integers(0, 256, (count, 4, 4, 3), np.uint8)
    return [Image.fromarray(each).resize((size, size), Image.Resampling.BICUBIC) for each in patches]


def brute_force_groups(images):
    """Every pair, in float64, and a flood fill: an independent oracle for near_duplicates."""
    n, c, h, w = images.shape
    cells = images.reshape(n, c, 8, h // 8, 8, w // 8).mean((3, 5), dtype=np.float64)
    near = np.zeros((n, n), bool)
    for i in range(n):
        for other in (cells, cells[..., ::-1]):
            near[i] |= np.sqrt(np.square(cells[i] - other).mean((1, 2, 3))) <= data.NEAR_DUPLICATE
    groups = np.full(n, -1)
    for i in range(n):
        todo = [i] if groups[i] < 0 else []
        while todo:
            j = todo.pop()
            groups[j] = i
            todo += np.flatnonzero(near[j] & (groups < 0)).tolist()
    return groups


def same_partition(a, b):
    return len({*zip(a.tolist(), b.tolist(), strict=True)}) == len(set(a.tolist())) == len(set(b.tolist()))


@pytest.mark.parametrize("spread", [3, 9, 12])
def test_near_duplicates_are_exactly_those_of_all_pairs(spread):
    draws = np.random.default_rng(spread)
    base = draws.integers(100, 160, (60, 3, 8, 8)) + draws.integers(-70, 70, (60, 1, 1, 1))
    copies = np.concatenate([base, base[:40, :, :, ::-1] + 7, base[:20]])  # 7: nearly the limit, all in the mean
    images = (copies + draws.integers(-spread, spread + 1, copies.shape)).astype(np.uint8)
    images = np.repeat(np.repeat(images, 2, 2), 2, 3)[draws.permutation(len(images))]
    groups = data.near_duplicates(images, chunk=16)
    assert same_partition(groups, brute_force_groups(images))
    assert same_partition(groups, data.near_duplicates(images))
    assert 60 <= len(set(groups.tolist())) < 120 or spread == 12


def test_near_duplicates_of_many_copies_are_joined_in_few_rounds(monkeypatch):
    """4.5 million pairs: joined one by one they would take minutes."""
    rounds, minimum = [], np.minimum

    class Counting:
        def __call__(self, a, b):
            return minimum(a, b)

        def at(self, *pairs):
            rounds.append(len(pairs[1]))
            minimum.at(*pairs)

    monkeypatch.setattr(np, "minimum", Counting())
    assert len(set(data.near_duplicates(np.full((3000, 3, 8, 8), 200, np.uint8)).tolist())) == 1
    assert len(rounds) < 100


def test_recompressed_and_mirrored_copies_stay_together(tmp_path):
    folder = tmp_path / "s"
    folder.mkdir()
    for i, image in enumerate(smooth_images(60)):
        image.save(folder / f"{i}.png")
        image.save(folder / f"{i}-again.jpg", quality=40)
        image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).resize((64, 64)).save(folder / f"{i}-mirrored.jpg")
    dataset = prepare(folder, 32)
    groups = data.near_duplicates(dataset.images)
    assert sorted(np.unique(groups, return_counts=True)[1].tolist()) == [3] * 60
    train, held_out = data.split(dataset)
    assert len(held_out) >= 180 // 7 and len(held_out) % 3 == 0
    assert not set(groups[train].tolist()) & set(groups[held_out].tolist())


def test_the_split_does_not_depend_on_order_or_size(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    images = smooth_images(90)
    images[5], images[6] = images[4].transpose(Image.Transpose.FLIP_LEFT_RIGHT), images[4]
    order = np.random.default_rng(0).permutation(len(images))
    for i, image in enumerate(images):
        image.save(one / f"{i:03d}.png")
        image.save(two / f"{order[i]:03d}.png")
    chosen = []
    for folder, size in ((one, 32), (two, 32), (one, 16)):
        dataset = prepare(folder, size)
        train, held_out = data.split(dataset)
        assert train.dtype == held_out.dtype == np.int64
        assert np.array_equal(np.sort(np.concatenate([train, held_out])), np.arange(90))
        assert (np.diff(train) > 0).all() and (np.diff(held_out) > 0).all()
        chosen.append(sorted(dataset.digests[i].tobytes() for i in held_out))
    assert chosen[0] == chosen[1] == chosen[2] and len(chosen[0]) >= 12


def digests(n):
    return np.stack([np.frombuffer(hashlib.sha256(b"%d" % i).digest(), np.uint8) for i in range(n)])


def split_of(groups, digests):
    return data.split(SimpleNamespace(groups=groups, digests=digests))


@pytest.mark.parametrize(("n", "held"), [(2, 1), (6, 1), (70, 10), (700, 100), (1000, 100), (5000, 100), (10_000, 200)])
def test_how_many_are_held_out(n, held):
    train, held_out = split_of(np.arange(n), digests(n))
    assert len(held_out) == held and len(train) == n - held


@pytest.mark.parametrize(
    ("sizes", "held"),
    [
        ([300] + [1] * 400, 100),  # the large group never enters
        ([660] + [1] * 40, 40),  # it may not enter, though the rest does not suffice
        ([500, 160] + [1] * 40, 200),  # the smaller of the large ones has to
        ([350, 350], 350),
        ([700], 100),  # all alike: no clean split, so single images
        ([2], 1),
    ],
)
def test_large_groups(sizes, held):
    groups = np.repeat(np.arange(len(sizes)), sizes)
    train, held_out = split_of(groups, digests(len(groups)))
    assert len(held_out) == held and len(train) == len(groups) - held
    if len(sizes) > 1:
        assert not set(groups[train].tolist()) & set(groups[held_out].tolist())


def test_held_out_groups_are_those_of_the_smallest_digests():
    ranks = np.lexsort(digests(700).T[::-1])
    assert split_of(np.arange(700), digests(700))[1].tolist() == sorted(ranks[:100].tolist())


# ------------------------------------------------------------------------------------------ synthetic butterflies

PINNED = Path(__file__).with_name("synthetic.png")  # made by `python -m tests.test_data`, once for each VERSION


def specimens(indices, size, seed=0):
    return np.stack([butterflies.render(seed, i, size) for i in indices])


def shrink(images, factor):
    n, channels, side, _ = images.shape
    parts = images.reshape(n, channels, side // factor, factor, side // factor, factor)
    return parts.mean((3, 5), dtype=np.float64)


def test_a_specimen_is_the_same_on_every_machine():
    """To 2 levels of the picture that is kept: a change of the pictures needs a new VERSION and a new file."""
    assert int(png_text(PINNED)["version"]) == butterflies.VERSION
    kept = np.asarray(Image.open(PINNED))
    found = np.asarray(data.grid(specimens(range(len(butterflies.FAMILIES)), 32)))
    assert found.shape == kept.shape and np.abs(found.astype(int) - kept).max() <= 2


def test_a_specimen_depends_on_seed_and_index_alone():
    forward = specimens((0, 8, 23), 32)
    assert np.array_equal(specimens((23, 8, 0), 32)[::-1], forward)
    for other in (specimens((15, 23, 8), 32), specimens((0, 8, 23), 32, seed=1)):  # the first of each: one family
        assert all(np.abs(a.astype(int) - b).mean() > 3 for a, b in zip(forward, other, strict=True))
    far = butterflies.render(2**50, 2**50, 32)
    assert far.shape == (3, 32, 32) and far.std() > 20


@pytest.mark.parametrize("size", [16, 50, 64, 100, 128, 256])
def test_a_specimen_is_one_picture_at_every_size(size):
    """Area means of a four times larger drawing: antialiased, and the same pose and pattern."""
    indices = range(0, 15, 2 if size < 100 else 5)
    small, large = specimens(indices, size), shrink(specimens(indices, 4 * size), 4)
    assert small.shape == (len(indices), 3, size, size) and small.dtype == np.uint8
    difference = np.abs(small - large).mean((1, 2, 3))
    assert difference.max() < 4, difference  # of 255; two specimens of a family differ by over 10
    assert small[:, :, 0, 0].min() > 220  # paper


def test_synthetic_data_are_balanced_and_independent_of_their_number(monkeypatch):
    monkeypatch.setattr(data, "near_duplicates", forbid)  # none is a copy, however alike
    few, many = prepare("synthetic:20"), prepare("synthetic:45")
    assert np.array_equal(many.images[:20], few.images) and np.array_equal(many.images, specimens(range(45), 16))
    assert many.classes == tuple(butterflies.FAMILIES) and len(many.classes) >= 10
    assert np.bincount(many.labels).tolist() == [3] * 15
    assert (many.source, many.revision, len(set(many.groups.tolist()))) == (
        "synthetic:45",
        str(butterflies.VERSION),
        45,
    )
    others = prepare("synthetic:20:7")
    assert np.array_equal(others.images, specimens(range(20), 16, seed=7))
    assert len({few.fingerprint, many.fingerprint, others.fingerprint, prepare("synthetic:20", 24).fingerprint}) == 4
    train, held_out = data.split(many)
    assert len(held_out) == 6 and set(train) | set(held_out) == set(range(45))
    grey = prepare("synthetic:20", channels=1)
    weights = np.array([299, 587, 114]).reshape(1, 3, 1, 1) / 1000  # ITU-R 601 luma
    assert np.abs(grey.images - (few.images * weights).sum(1, keepdims=True)).max() < 1.01


def test_the_fingerprint_of_synthetic_data_is_that_of_their_recipe(monkeypatch):
    """Another machine may round otherwise: a fingerprint of its pixels would refuse to go on with a run."""
    before = prepare("synthetic:4")
    render = butterflies.render
    monkeypatch.setattr(butterflies, "render", lambda *key: render(*key) ^ 1)  # one level aside
    monkeypatch.setenv("PAPILIO_CACHE", str(before.folder.parent / "elsewhere"))
    after = prepare("synthetic:4")
    assert after.fingerprint == before.fingerprint and after.checksum != before.checksum
    monkeypatch.setattr(butterflies, "VERSION", 99)
    assert prepare("synthetic:4").fingerprint != before.fingerprint


def test_the_older_name_drawn_means_the_same_data_and_split():
    """Pinned: resumed runs compare this fingerprint, and hold the same images out."""
    dataset = prepare("synthetic:64", 64)
    assert dataset.fingerprint == "80c231e2281351b011e49442d148c34a55100a3a8ad2c54a08d528d9c383f65f"
    assert data.split(dataset)[1].tolist() == [9, 10, 15, 17, 24, 42, 49, 53, 63]
    older = prepare("drawn:64", 64)
    assert (older.folder, older.source) == (dataset.folder, "synthetic:64")
    assert prepare("drawn:20:7").fingerprint == prepare("synthetic:20:7").fingerprint


def test_families_are_told_apart_on_unseen_specimens():
    """A linear classifier on 16 px: softmax regression, 450 to learn from and 150 of later numbers to judge."""
    pixels = torch.from_numpy(np.stack([butterflies.render(0, i, 16) for i in range(600)])).flatten(1) / 255
    labels = torch.arange(600) % len(butterflies.FAMILIES)
    mean, spread = pixels[:450].mean(0), pixels[:450].std(0) + 1e-3
    torch.manual_seed(0)
    model = torch.nn.Linear(768, len(butterflies.FAMILIES))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    for _ in range(150):
        loss = torch.nn.functional.cross_entropy(model((pixels[:450] - mean) / spread), labels[:450])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    accuracy = (model((pixels[450:] - mean) / spread).argmax(1) == labels[450:]).float().mean()
    print(f"accuracy on unseen specimens: {accuracy:.3f}")
    assert accuracy >= 0.9


@pytest.mark.parametrize(
    "source",
    [
        "synthetic:",
        "synthetic:0",
        "synthetic:1",
        "synthetic:x",
        "synthetic:-3",
        "synthetic:5:",
        "synthetic:5:6:7",
        "synthetic:5.0",
    ],
)
def test_synthetic_data_that_are_none(source):
    with pytest.raises(InputError, match=f"'{source}': write synthetic, synthetic:N"):
        prepare(source)


@pytest.mark.parametrize("source", ["synthetic:9", "auto"])
def test_synthetic_data_have_no_revision(source):
    with pytest.raises(
        InputError, match=f"--revision abc: only Hugging Face datasets have revisions, and {source} is none"
    ):
        prepare(source, revision="abc")


def test_auto_without_the_hub_renders_butterflies_and_says_so(monkeypatch, capsys):
    monkeypatch.setattr(data, "_hub_answers", lambda: False)
    monkeypatch.setattr(butterflies, "COUNT", 30)
    dataset = data.prepare("auto", 16)
    assert dataset.source == "synthetic:30"
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith(
        "data: SYNTHETIC BUTTERFLIES (--data auto), because 'huggan/smithsonian_butterflies_subset'"
    )


def test_auto_takes_the_smithsonian_where_hub_or_cache_has_it(monkeypatch, capsys):
    import datasets

    table = datasets.Dataset.from_dict(
        {"image": [{"bytes": each, "path": None} for each in encoded_images(4)[1]]},
        features=datasets.Features({"image": datasets.Image()}),
    )
    monkeypatch.setattr(data, "_hub_answers", lambda: True)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: table)
    for answers in (lambda: True, forbid):  # the second time from the cache: nobody is asked
        monkeypatch.setattr(data, "_hub_answers", answers)
        assert data.prepare("auto", 16).source == "huggan/smithsonian_butterflies_subset"
        assert capsys.readouterr().out == "data: the Smithsonian butterflies (--data auto)\n"


# ---------------------------------------------------------------------------------------------- command line


def test_command_line_describes(shapes, tmp_path, capsys):
    out = tmp_path / "pictures" / "data.png"
    assert data.main([str(shapes), "--size", "16", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    dataset = prepare(shapes)
    for words in ("40 of 16 x 16 pixels, RGB", "8 circle", f"{dataset.fingerprint} (verified)", str(out)):
        assert words in printed
    assert str(dataset.folder) in printed and "35 for training, 5 held out" in printed
    assert png_text(out) == {"fingerprint": dataset.fingerprint}
    with Image.open(out) as picture:
        assert picture.size == (7 * 18 + 2, 6 * 18 + 2)


def test_command_line_names_skipped_files(tmp_path, capsys):
    folder = save_all(tmp_path / "s", noise_images(150, 8))
    (folder / "bad.png").write_text("text")
    assert data.main([str(folder), "--size", "8", "--channels", "1", "--out", str(tmp_path / "d.png")]) == 0
    printed = capsys.readouterr().out
    assert "bad.png: not an image" in printed and "grey" in printed and "classes      none" in printed


def test_a_flipped_byte_is_noticed(shapes, tmp_path, capsys):
    dataset = prepare(shapes)
    with open(dataset.folder / "images.bin", "r+b") as file:
        file.seek(1234)
        byte = file.read(1)[0]
        file.seek(1234)
        file.write(bytes([byte ^ 1]))
    assert data.main([str(shapes), "--size", "16", "--out", str(tmp_path / "d.png")]) == 2
    assert "is damaged; delete it" in capsys.readouterr().err
    assert not (tmp_path / "d.png").exists()


@pytest.mark.parametrize(
    "arguments",
    [["nowhere"], ["SHAPES", "--size", "0"], ["SHAPES", "--size", "64x48"], ["SHAPES", "--channels", "2"]],
)
def test_command_line_errors_are_one_sentence(shapes, capsys, arguments):
    assert status_of(data.main, [str(shapes) if word == "SHAPES" else word for word in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1 and captured.out == ""


def test_command_line_output_that_cannot_be_written(shapes, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    out = str(tmp_path / "file" / "d.png")
    assert data.main([str(shapes), "--size", "16", "--out", out]) == 2
    assert "error: cannot write" in capsys.readouterr().err


def test_importing_costs_neither_torchvision_nor_datasets():
    program = "import data, sys; print([m for m in ('torchvision', 'datasets') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_shapes_are_the_same_for_the_same_seed(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        make_shapes(tmp_path / name, count=10, size=16, seed=seed)
    prints = [prepare(tmp_path / name).fingerprint for name in "abc"]
    assert prints[0] == prints[1] != prints[2]
    assert len(list((tmp_path / "a").rglob("*.png"))) == 10


if __name__ == "__main__":
    drawn = data.grid(specimens(range(len(butterflies.FAMILIES)), 32))
    data.write_png(PINNED, drawn, {"version": str(butterflies.VERSION)})
