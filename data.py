"""Datasets and image files: images from a folder, parquet or the hub in, one uint8 array out; and PNG writing.

    python data.py photos/                              prepares a folder, verifies it, prints what is in it
    python data.py synthetic:64 --size 64               renders 64 synthetic butterflies
    python data.py cifar10/ --size 32 --out cifar.png   reads the parquet files of a folder

`prepare` decodes a source once and caches the result; `split` sets aside held-out images that have no near-duplicate
among the training images. `batch_indices`, `flip` and `generator` are pure functions of (seed, step), so there is no
loader state. The file also owns PNG and atomic writing, and what all command lines share.
"""

import argparse
import errno
import functools
import hashlib
import io
import itertools
import json
import math
import operator
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NoReturn

try:
    import fcntl
except ImportError:  # Windows: run folders are not locked
    fcntl = None

import numpy as np
import torch
from numpy import ndarray
from PIL import Image, ImageOps, PngImagePlugin
from torch import Tensor

VERSION = "0.1.0"
FORMAT = 2  # of the prepared folder and of the decoding that fills it; it is part of every cache key
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
SIZES = (8, 1024)  # 8: the near-duplicate descriptor has 8 x 8 cells
SHORT_NAMES = {"smithsonian": "huggan/smithsonian_butterflies_subset"}
LABEL_COLUMNS = ("label", "labels", "class", "fine_label")
HUB_SECONDS = 5.0
# RMS difference in levels of 255. 11 pairs of 700 butterflies on white and 84 pairs of CIFAR-10 (both at 32 px) are
# closer. All that were looked at show one photograph, recompressed, shifted or mirrored, or specimens that are hard to
# tell apart; no group has more than 3 images. At 12, different specimens join in a chain of 18.
NEAR_DUPLICATE = 8.0
DESCRIPTOR_CELLS = 8  # a side of the near-duplicate descriptor


class InputError(ValueError):
    """Bad input: reported as one sentence and an exit status, without a traceback."""

    status = 2


@dataclass(frozen=True)
class Dataset:
    """Prepared images, all of one size, and what they came from."""

    images: ndarray  # uint8 (N, C, H, W), a copy-on-write memory map
    labels: ndarray | None  # int64 (N,), indices into classes
    classes: tuple[str, ...]  # () if there are none
    digests: ndarray  # uint8 (N, 32): SHA-256 of each encoded image, or of a synthetic one's number; for any size
    groups: ndarray  # int64 (N,): near-duplicates have the same number
    checksum: str  # SHA-256 of images, labels and class names, in order
    # The checksum; for synthetic images, which may differ by 2 levels elsewhere, SHA-256 of the recipe.
    fingerprint: str
    source: str  # absolute path, Hugging Face dataset id or synthetic:N
    revision: str | None  # of a Hugging Face dataset, or version of the synthetic images
    skipped: tuple[str, ...]  # "name: reason"
    folder: Path  # where the prepared data is cached


@dataclass(frozen=True)
class Source:
    """Where images come from, before anything is decoded."""

    kind: str  # a key of READERS
    name: str  # absolute path, Hugging Face dataset id or synthetic:N
    revision: str | None
    root: Path = Path()  # of `files`
    files: tuple[str, ...] = ()  # relative posix paths, sorted


@dataclass(frozen=True)
class Item:
    """An image before decoding: its encoded bytes, a file, or a function that renders it at a size."""

    name: str
    encoded: bytes | Path | Callable  # render(size) -> uint8 (3, size, size)
    label: int | str | None


@contextmanager
def bad_input(what: str) -> Iterator[None]:
    """Turns a ValueError into an InputError that begins with `what`."""
    try:
        yield
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"{what}: {error}") from error


# ---- pixels ----------------------------------------------------------------------------------------------------------


def to_float(images: Tensor) -> Tensor:
    """Converts uint8 levels 0..255 of any shape to float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """Converts floats in [-1, 1] of any shape and precision to uint8, clamped and rounded as diffusers does."""
    return ((images.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)


def decode(encoded: bytes, size: int, channels: int) -> ndarray:
    """Decodes one image to uint8 (channels, size, size): upright, on white, centre-cropped.

    Of an animation it takes the first frame. Raises what Pillow raises for damaged data, and ValueError for a
    decompression bomb and for floating-point pixels.
    """
    with Image.open(io.BytesIO(encoded)) as image:
        # Pillow only warns between this limit and twice this limit. Nothing has been decoded yet.
        if Image.MAX_IMAGE_PIXELS and image.width * image.height > Image.MAX_IMAGE_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels, more than Pillow's MAX_IMAGE_PIXELS")
        image.draft(None, (2 * size, 2 * size))  # JPEG: decode at 1/2, 1/4 or 1/8, at least twice the target
        image = _to_mode(ImageOps.exif_transpose(image), channels)
    return _pixels(_crop_and_scale(image, size))


def decode_png(file: Path | BinaryIO) -> ndarray:
    """Decodes a PNG file at its own size: uint8 (C, H, W). Raises what Pillow raises for damaged data."""
    with Image.open(file, formats=["PNG"]) as image:
        return _pixels(_to_mode(image, len(image.getbands())))


def _pixels(image: Image.Image) -> ndarray:
    """Returns the pixels of a grey or RGB image as (C, H, W)."""
    pixels = np.asarray(image)
    return pixels.reshape(*pixels.shape[:2], -1).transpose(2, 0, 1)


def png_facts(path: Path) -> dict:
    """Returns the text chunks of a PNG file with its size as "width" and "height", or {} if it cannot be read."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            image.load()  # raises if the file was cut off
            return {**image.info, "width": image.width, "height": image.height}
    except Exception:  # decoders raise nearly anything for a damaged file
        return {}


def picture_size(path: Path | str) -> tuple[int, int]:
    """Returns width and height of an image file, before it is turned upright."""
    with Image.open(path) as image:
        return image.size


def _to_mode(image: Image.Image, channels: int) -> Image.Image:
    """Converts any Pillow mode to "L" (1 channel) or "RGB" (3) of 8 bits, with transparency composited on white."""
    if image.mode == "F":
        raise ValueError("floating-point pixels, whose range is unknown")
    if image.mode.startswith("I"):  # 16 bits a pixel: convert() would clip at 255 instead of scaling
        levels = np.asarray(image).astype(np.float64) / 257
        image = Image.fromarray(levels.round().clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    if channels == 3 or image.mode != "L":
        image = image.convert("RGB")
    return image.convert({1: "L", 3: "RGB"}[channels])


def _crop_and_scale(image: Image.Image, size: int) -> Image.Image:
    """Scales the central square to size x size in one antialiased step, or only crops if it has that size already."""
    width, height = image.size
    side = min(width, height)
    left = (width - side) / 2
    top = (height - side) / 2
    if side == size:
        return image.crop((int(left), int(top), int(left) + side, int(top) + side))
    return image.resize((size, size), Image.Resampling.LANCZOS, box=(left, top, left + side, top + side))


def grid(images: Tensor | ndarray, columns: int | None = None, padding: int = 2, scale: int = 1) -> Image.Image:
    """Arranges uint8 (N, C, H, W) images, C 1 or 3, N >= 1, in rows on white; in about a square by default.

    Each pixel becomes `scale` x `scale` pixels. Raises InputError for any other shape or type.
    """
    if isinstance(images, Tensor):
        images = images.detach().cpu()
    images = np.asarray(images)
    if images.ndim != 4 or images.dtype != np.uint8 or not len(images) or images.shape[1] not in (1, 3):
        raise InputError(
            f"a grid needs uint8 images of shape (N, 1 or 3, H, W), N >= 1; got {images.dtype} {images.shape}"
        )
    images = images.repeat(scale, 2).repeat(scale, 3)
    count, channels, height, width = images.shape
    columns = min(columns or math.ceil(math.sqrt(count)), count)
    rows = math.ceil(count / columns)
    step_y, step_x = height + padding, width + padding
    canvas = np.full((rows * step_y + padding, columns * step_x + padding, channels), 255, np.uint8)
    for i, image in enumerate(images):
        y = i // columns * step_y + padding
        x = i % columns * step_x + padding
        canvas[y : y + height, x : x + width] = image.transpose(1, 2, 0)
    if channels == 1:
        canvas = canvas[:, :, 0]
    return Image.fromarray(canvas)


# ---- randomness ------------------------------------------------------------------------------------------------------


def generator(*key: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """Returns a generator seeded by its key alone: 63 bits of BLAKE2b over the key's ints and strings.

    Similar keys give unrelated streams, and ("a", 1) differs from ("a1",). PyTorch's CPU generator keeps only the low
    32 bits of a seed, so two of 100,000 keys may share a stream there; CUDA's keeps all.
    """
    text = json.dumps([part if isinstance(part, str) else operator.index(part) for part in key])
    seed = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1
    return torch.Generator(device=device).manual_seed(seed)


@functools.lru_cache(maxsize=2)  # a batch lies in one epoch, or across the border of two
def _permutation(n: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(n, generator=generator(seed, "order", epoch))


def batch_indices(n: int, seed: int, step: int, batch_size: int) -> Tensor:
    """Returns the indices, among n images, of the global batch of a step: int64 (batch_size,).

    Position g = step * batch_size + i of the run belongs to epoch g // n, and each epoch is another permutation of
    range(n). A batch may reach into the next epochs.
    """
    samples = torch.arange(step * batch_size, (step + 1) * batch_size)
    epochs, places = samples // n, samples % n
    return torch.cat([_permutation(n, seed, epoch)[places[epochs == epoch]] for epoch in epochs.unique().tolist()])


def flip(images: Tensor, seed: int, step: int, start: int = 0, total: int | None = None) -> Tensor:
    """Mirrors about half of the images (B, C, H, W) left-right, by (seed, step, position).

    A process with rows start : start + B of a global batch of `total` images passes start and total. It generates the
    bits of the whole batch and uses its own, so that the number of processes changes nothing.
    """
    end = start + len(images)
    bits = torch.randint(2, (total or end, 1, 1, 1), generator=generator(seed, "flip", step), dtype=torch.bool)
    return torch.where(bits[start:end].to(images.device), images.flip(-1), images)


# ---- writing ---------------------------------------------------------------------------------------------------------


@contextmanager
def disk_errors(action: str, remedy: str = "") -> Iterator[None]:
    """Turns an OSError (disk full, no permission, is a directory) into an InputError: one sentence with a remedy."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        if isinstance(error, FileExistsError | NotADirectoryError):
            reason = "a file is where a folder is needed"
        usual = "check its permissions or choose another place"
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            usual = "free some space or choose another place"
        remedy = remedy or usual
        raise InputError(f"cannot {action}: {reason}; {remedy}") from error


def atomic_write(path: Path | str, write: Callable) -> None:
    """Calls write(file) on a temporary file and renames it to `path`, which keeps its content if anything fails.

    Creates parent folders. Raises InputError for any OSError; other exceptions of `write` pass through.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.urandom(6).hex()}.tmp")
    with disk_errors(f"write {path}"):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists() and not (path.is_file() or path.is_dir()):  # as root, a device would be replaced
                raise OSError(errno.EINVAL, "it is a device or a pipe")
            # Not tempfile: its files are readable by their owner only, and model folders are shared.
            with open(temporary, "xb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
    with suppress(OSError):  # a rename is durable once its folder is synced; some systems cannot open a folder
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def remove_temporary_files(folder: Path) -> None:
    """Deletes what killed calls of atomic_write left in a folder that no other process writes to."""
    with disk_errors(f"delete temporary files in {folder}"):
        for file in folder.rglob(".*.tmp"):
            if re.fullmatch(r"\..+\.[0-9a-f]{12}\.tmp", file.name):
                file.unlink()


@contextmanager
def locked(file: Path, holder: str, sentence: str) -> Iterator[None]:
    """Locks a file, into which it writes the name of its holder. Raises InputError(sentence) if it is locked already.

    The system releases the lock when the process ends, however it ends.
    """
    with ExitStack() as stack:
        with disk_errors(f"lock {file}"):
            opened = stack.enter_context(open(file, "a+", encoding="utf-8"))
        try:
            if fcntl:
                fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(sentence) from None
        except OSError:  # a file system without locks
            pass
        with disk_errors(f"write {file}"):
            opened.truncate(0)
            opened.write(holder)
            opened.flush()
        yield


def write_json(path: Path, content: dict) -> None:
    """Writes a JSON object atomically, with sorted keys. Raises InputError as atomic_write does."""
    text = json.dumps(content, indent=2, sort_keys=True) + "\n"
    atomic_write(path, lambda file: file.write(text.encode()))


def read_json(path: Path) -> dict:
    """Reads a JSON object. Raises InputError if the file is missing, unreadable or not a JSON object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or "it is not JSON"
        raise InputError(f"{path} cannot be read: {reason}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} does not hold a JSON object")
    return content


def encode_png(
    image: Image.Image, text: Mapping | None = None, film: Sequence[Image.Image] = (), format: str = "PNG"
) -> bytes:
    """Encodes a PNG file with `text` as its text chunks.

    With `film` it is an animation: those pictures at ten a second, then `image` for two seconds; `format` may be "GIF".
    """
    info = PngImagePlugin.PngInfo()
    for key, value in (text or {}).items():
        info.add_text(key, str(value).encode("utf-8", "backslashreplace").decode())  # a path may be invalid UTF-8
    options = {}
    if film:
        options = {"append_images": [*film[1:], image], "loop": 0, "duration": [100] * len(film) + [2000]}
    first = [*film, image][0]
    first.save(file := io.BytesIO(), format, pnginfo=info, save_all=bool(film), **options)
    return file.getvalue()


def write_png(path: Path | str, *picture) -> None:
    """Writes encode_png(*picture), as a GIF if the name ends in .gif. Raises InputError as atomic_write does."""
    format = "GIF" if Path(path).suffix.lower() == ".gif" else "PNG"
    encoded = encode_png(*picture, format=format)
    atomic_write(path, lambda file: file.write(encoded))


# ---- sources ---------------------------------------------------------------------------------------------------------


def is_synthetic(source: str) -> bool:
    """Returns whether a source is rendered by builtin/butterflies.py."""
    return source.partition(":")[0] in ("synthetic", "drawn")  # "drawn" is the name in runs of version 0.1.0


def original_name(source: str) -> str:
    """Returns a source's name in fingerprints and random keys: they keep "drawn", the first name of "synthetic"."""
    return re.sub(r"^synthetic\b", "drawn", source)


def find_source(source: str, revision: str | None = None) -> Source:
    """Finds out what `source` names: a folder of images, parquet files, a Hugging Face dataset, synthetic images.

    Raises InputError for anything else.
    """
    path = Path(os.path.expanduser(source))
    if revision and (is_synthetic(source) or source == "auto" or os.path.exists(path)):
        raise InputError(
            f"--revision {revision}: only Hugging Face datasets have revisions, and {source} is none; omit it"
        )
    if is_synthetic(source):
        return _find_synthetic(source)
    if source and os.path.isdir(path):
        files = _list_files(path)
        for kind, suffixes in (("folder", SUFFIXES), ("parquet", {".parquet"})):
            chosen = tuple(name for name in files if Path(name).suffix.lower() in suffixes)
            if chosen:
                return Source(kind, str(path.resolve()), None, path.resolve(), chosen)
        raise InputError(f"{source} holds no images ({' '.join(sorted(SUFFIXES))}) and no parquet files")
    if os.path.isfile(path):
        if path.suffix.lower() != ".parquet":
            raise InputError(f"{source} is a single file but not parquet; name the folder of the images")
        return Source("parquet", str(path.resolve()), None, path.resolve().parent, (path.name,))
    name = SHORT_NAMES.get(source, source)
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        raise InputError(
            f"{source!r} is neither a folder nor a parquet file here, and not a Hugging Face dataset id; name a folder "
            "of images, a .parquet file, a Hugging Face dataset id like org/name, or one of: auto, synthetic, "
            f"{', '.join(SHORT_NAMES)}"
        )
    return Source("hub", name, revision)


def _find_synthetic(source: str) -> Source:
    from builtin import butterflies

    match = re.fullmatch(r"\w+(?::(\d{1,9})(?::(\d{1,15}))?)?", source, re.ASCII)
    count, seed = 0, 0
    if match:
        count, seed = int(match[1] or butterflies.COUNT), int(match[2] or 0)
    if count < 2:
        raise InputError(
            f"{source!r}: write synthetic, synthetic:N for N butterflies (at least 2), or synthetic:N:SEED for others"
        )
    name = f"synthetic:{count}"
    if seed:
        name += f":{seed}"
    return Source("synthetic", name, str(butterflies.VERSION))


def _list_files(root: Path) -> list[str]:
    """Lists relative posix paths of all files that are not hidden, sorted. Links to folders are not followed."""

    def refuse(error: OSError) -> None:
        raise InputError(f"cannot list {error.filename}: {error.strerror}; check its permissions") from error

    found = []
    for folder, subfolders, names in os.walk(root, onerror=refuse):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        found += [Path(folder, name) for name in names if not name.startswith(".")]
    return sorted(path.relative_to(root).as_posix() for path in found)


# A reader takes a source and a scratch folder and returns (number of images, class names, items). The names are () if
# there are no classes, and None if they have to be made from the labels.
Contents = tuple[int, tuple | None, Iterable[Item]]


def _read_folder(source: Source, scratch: Path) -> Contents:
    """Reads a folder of image files; the class of an image is the name of its folder."""
    parents = [Path(name).parent.name for name in source.files]
    classes = tuple(sorted(set(parents)))
    if "" in classes or len(classes) == 1:
        classes = ()
    index = {name: i for i, name in enumerate(classes)}
    pairs = zip(source.files, parents, strict=True)
    items = (Item(name, source.root / name, index.get(parent)) for name, parent in pairs)
    return len(parents), classes, items


def _read_synthetic(source: Source, scratch: Path) -> Contents:
    """Reads synthetic butterflies; the classes, families of butterflies, take turns."""
    from builtin import butterflies

    count, seed = (int(part) for part in f"{source.name}:0".split(":")[1:3])
    families = tuple(butterflies.FAMILIES)

    def items() -> Iterator[Item]:
        for i in range(count):
            # Digests are made of this name: another word than "drawn" would change every split.
            name = f"drawn {source.revision} {seed} {i}"
            yield Item(name, functools.partial(butterflies.render, seed, i), i % len(families))

    return count, families, items()


def _read_parquet(source: Source, scratch: Path) -> Contents:
    """Reads parquet files, through an Arrow copy in the scratch folder."""
    files = [str(source.root / name) for name in source.files]
    return _read_table(_load_table(source, "parquet", data_files=files, cache_dir=str(scratch)))


def _read_hub(source: Source, scratch: Path) -> Contents:
    """Reads a dataset of the Hugging Face hub, which `datasets` caches."""
    if not _hub_answers():
        raise InputError(
            f"{source.name!r} is no folder here, and the Hugging Face hub at {_hub_address()} did not answer within "
            f"{HUB_SECONDS:.0f} seconds; name a folder of images or a .parquet file, or set HF_ENDPOINT to a "
            "mirror or https_proxy to a proxy"
        )
    return _read_table(_load_table(source, source.name, revision=source.revision))


READERS = {"folder": _read_folder, "synthetic": _read_synthetic, "parquet": _read_parquet, "hub": _read_hub}


def _load_table(source: Source, *args, **options):
    """Calls datasets.load_dataset. Raises InputError for any failure."""
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    try:
        return datasets.load_dataset(*args, split="train", **options)
    except Exception as error:
        raise InputError(f"cannot load {source.name!r}: {reason(error)}") from error


def _read_table(table) -> Contents:
    """Reads a datasets.Dataset."""
    import datasets

    image, label = _image_column(table.features), _label_column(table.features)
    if image is None:
        raise InputError(f"no column holds images; the columns are: {', '.join(table.features)}")
    classes = ()
    columns = [image]
    if label:
        columns = [image, label]
        names = getattr(table.features[label], "names", None)
        classes = names and tuple(names)
    table = table.select_columns(columns).cast_column(image, datasets.Image(decode=False))

    def items() -> Iterator[Item]:
        for i, row in enumerate(table):
            cell = row[image] or {"path": None, "bytes": None}
            encoded = cell["bytes"]
            if not encoded:
                # An empty cell becomes empty bytes, which fail to decode and are skipped like a damaged file.
                encoded = Path(cell["path"]) if cell["path"] else b""
            yield Item(cell["path"] or f"row {i}", encoded, row.get(label))

    return len(table), classes, items()


def _image_column(features) -> str | None:
    """Finds the images by type: an Image feature, else a struct with "bytes", else binary."""
    import datasets

    kinds = (
        lambda feature: isinstance(feature, datasets.Image),
        lambda feature: isinstance(feature, dict) and "bytes" in feature,
        lambda feature: getattr(feature, "dtype", None) in ("binary", "large_binary"),
    )
    return next((name for kind in kinds for name, feature in features.items() if kind(feature)), None)


def _label_column(features) -> str | None:
    """Finds the labels by type: a ClassLabel, else integers or strings under one of the usual names."""
    import datasets

    for name, feature in features.items():
        if isinstance(feature, datasets.ClassLabel):
            return name
    for name in LABEL_COLUMNS:
        if re.fullmatch(r"u?int\d+|(large_)?string", str(getattr(features.get(name), "dtype", None))):
            return name
    return None


def _hub_answers(seconds: float = HUB_SECONDS) -> bool:
    """Returns whether the hub, directly or through a proxy, answers before the deadline."""
    answers = []

    def ask() -> None:
        try:
            request = urllib.request.Request(_hub_address(), method="HEAD")
            # A new opener reads the *_proxy variables now; urlopen keeps those of its first call.
            urllib.request.build_opener().open(request, timeout=seconds).close()
            answers.append(True)
        except urllib.error.HTTPError as error:
            answers.append(error.code not in (502, 503, 504))  # a proxy that cannot reach the hub
        except Exception:
            answers.append(False)

    # In a thread, because no timeout applies to a name lookup; a daemon, so that it does not delay the exit.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return answers == [True]


def _hub_address() -> str:
    return os.environ.get("HF_ENDPOINT") or "https://huggingface.co"


def reason(error: Exception) -> str:
    """Returns the first line of an error, at most 200 characters."""
    if isinstance(error, Image.UnidentifiedImageError):  # its own text has the address of a buffer
        return "not an image, or of a format that is not known"
    text = str(getattr(error, "strerror", None) or error).strip() or type(error).__name__
    return text.splitlines()[0][:200]


# ---- preparing -------------------------------------------------------------------------------------------------------


def cache_folder() -> Path:
    """Returns $PAPILIO_CACHE, else papilio/ in $XDG_CACHE_HOME, else ~/.cache/papilio."""
    if os.environ.get("PAPILIO_CACHE"):
        return Path(os.environ["PAPILIO_CACHE"]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "papilio"


def prepare(
    source: str,
    size: int,
    *,
    channels: int = 3,
    revision: str | None = None,
    cache: Path | None = None,
    progress: bool = True,
) -> Dataset:
    """Decodes all images of a source into one array on disk, which later calls open.

    source    a folder of images (sub-folders are classes), a .parquet file or a folder of them, a Hugging Face dataset
              "org/name", "smithsonian", "synthetic" (or "synthetic:N", "synthetic:N:SEED"), or "auto": smithsonian if
              it is cached or the hub can be reached, else synthetic; the choice is printed
    size      pixels a side, 8 to 1024; images are scaled to it by their shorter side and centre-cropped
    channels  3 (RGB) or 1 (grey)
    revision  of a Hugging Face dataset: branch, tag or commit
    cache     where prepared data is kept; see cache_folder

    Raises InputError for a source that cannot be read, fewer than 2 images, more than 1% of unreadable files, and a
    disk that fails.
    """
    if not SIZES[0] <= size <= SIZES[1]:
        raise InputError(f"images of {size} px: the size must be from {SIZES[0]} to {SIZES[1]}")
    if channels not in (1, 3):
        raise InputError(f"{channels} image channels: use 3 (RGB) or 1 (grey)")
    if source == "auto" and not revision:
        return _prepare_auto(size, channels=channels, cache=cache, progress=progress)
    found = find_source(str(source), revision)
    with disk_errors(f"read {found.name}"):
        key = _cache_key(found, size, channels)
    cache = Path(cache or cache_folder())
    folder = cache / "data" / key
    if dataset := _open(folder):
        return dataset
    with disk_errors(f"prepare {found.name} in {cache}"):
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_scratch(folder.parent)
        scratch = folder.with_name(f".{key[:16]}.{os.urandom(6).hex()}")
        scratch.mkdir()
        try:
            _fill(scratch, found, size, channels, progress)
            _commit(scratch, folder)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    if dataset := _open(folder):
        return dataset
    raise InputError(f"the prepared data in {folder} changed while it was written; run again")


def _remove_scratch(parent: Path) -> None:
    """Deletes scratch folders into which nothing was written for a day: their processes were killed."""
    for folder in parent.glob(".*"):
        if re.fullmatch(r"\.[0-9a-f]{16}\.[0-9a-f]{12}", folder.name):
            with suppress(OSError):  # another process deletes it too
                newest = max(path.stat().st_mtime for path in (folder, *folder.rglob("*")))
                if time.time() - newest > 86_400:
                    shutil.rmtree(folder)


def _prepare_auto(size: int, **options) -> Dataset:
    """Prepares the Smithsonian butterflies, or synthetic ones if that fails, and prints which and why."""
    try:
        dataset = prepare("smithsonian", size, **options)
    except InputError as error:
        print(f"data: SYNTHETIC BUTTERFLIES (--data auto), because {str(error).partition(';')[0]}", flush=True)
        return prepare("synthetic", size, **options)
    print("data: the Smithsonian butterflies (--data auto)", flush=True)
    return dataset


def _cache_key(source: Source, size: int, channels: int) -> str:
    """Hashes what the prepared data depends on: source, revision, files with length and time, size, descriptor."""
    listing = []
    for name in source.files:
        try:
            status = os.stat(source.root / name)
            listing.append((name, status.st_size, status.st_mtime_ns))
        except OSError:  # a broken link, which is reported and skipped at decoding
            listing.append((name, None, None))
    descriptor = [NEAR_DUPLICATE, DESCRIPTOR_CELLS]
    facts = [FORMAT, descriptor, source.kind, source.name, source.revision, size, channels, listing]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


def _fill(folder: Path, source: Source, size: int, channels: int, progress: bool) -> None:
    """Writes images.bin, labels.npy, digests.npy, groups.npy and meta.json of a source into an empty folder."""
    with tempfile.TemporaryDirectory(dir=folder.parent, ignore_cleanup_errors=True) as scratch:
        total, classes, items = READERS[source.kind](source, Path(scratch))
        labels, digests, skipped = _decode_all(folder / "images.bin", items, total, size, channels, progress)
        del items  # it keeps the Arrow file open, which some systems refuse to delete
    if len(skipped) > 0.01 * total:
        shown = "; ".join([*skipped[:3], "..."][: len(skipped)])
        raise InputError(
            f"{len(skipped)} of {total} images in {source.name} cannot be read (over 1%); "
            f"repair or remove them: {shown}"
        )
    if len(digests) < 2:
        raise InputError(f"{source.name} holds {len(digests)} readable image(s); at least 2 are needed")
    labels, classes = _dense_labels(labels, classes)
    shape = (len(digests), channels, size, size)
    images = np.memmap(folder / "images.bin", np.uint8, "r", shape=shape)
    checksum = fingerprint = data_fingerprint(images, labels, classes)
    if source.kind == "synthetic":
        # Each has its own random numbers, so that none is a near-duplicate.
        groups = np.arange(len(images))
        recipe = [original_name(source.name), source.revision, shape]
        fingerprint = hashlib.sha256(json.dumps(recipe).encode()).hexdigest()
    else:
        groups = near_duplicates(images)
    if labels is not None:
        np.save(folder / "labels.npy", labels)
    np.save(folder / "digests.npy", np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 32))
    np.save(folder / "groups.npy", groups)
    meta = {
        "format": FORMAT,
        "shape": shape,
        "classes": classes,
        "checksum": checksum,
        "fingerprint": fingerprint,
        "source": source.name,
        "revision": source.revision,
        "skipped": skipped,
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")


def _decode_all(path: Path, items: Iterable[Item], total: int, size: int, channels: int, progress: bool) -> tuple:
    """Appends each decoded image to the file `path`, in the order of items. Returns (labels, digests, skipped)."""
    from tqdm import tqdm

    labels, digests, skipped, items = [], [], [], iter(items)
    decode_one = functools.partial(decode_item, size=size, channels=channels)
    # Warning filters apply to the process, so they are set here and not in each thread.
    with warnings.catch_warnings(), open(path, "wb") as file, ThreadPoolExecutor(os.cpu_count()) as pool:
        warnings.simplefilter("ignore")
        bar = tqdm(desc="preparing", total=total, disable=None if progress else True, unit="image")
        while chunk := list(itertools.islice(items, 4 * os.cpu_count())):  # few at a time, to bound the memory
            for item, (digest, pixels) in zip(chunk, pool.map(decode_one, chunk), strict=True):
                bar.update()
                if isinstance(pixels, str):
                    skipped.append(f"{item.name}: {pixels}")
                    continue
                file.write(pixels.tobytes())
                labels.append(item.label)
                digests.append(digest)
        bar.close()
        file.flush()
        os.fsync(file.fileno())
    return labels, digests, skipped


def decode_item(item: Item, size: int, channels: int) -> tuple:
    """Returns an item's digest and pixels, uint8 (channels, size, size); for a damaged one None and the reason."""
    encoded = item.encoded
    try:
        if isinstance(encoded, Path):
            encoded = encoded.read_bytes()
        if isinstance(encoded, bytes):
            return hashlib.sha256(encoded).digest(), decode(encoded, size, channels)
        image = _to_mode(Image.fromarray(encoded(size).transpose(1, 2, 0)), channels)
        return hashlib.sha256(item.name.encode()).digest(), _pixels(image)
    except Exception as error:  # decoders raise many types for a damaged file
        return None, reason(error)


def _dense_labels(labels: list, classes: tuple | None) -> tuple[ndarray | None, tuple]:
    """Returns int64 labels 0..K-1 and K names; (None, ()) if there are no classes or an image has no label."""
    if classes == () or any(label is None for label in labels):
        return None, ()
    if classes is None:  # labels without names: their sorted values are the names
        values = sorted(set(labels))
        index = {value: i for i, value in enumerate(values)}
        labels = [index[label] for label in labels]
        classes = tuple(str(value) for value in values)
    if min(labels) < 0:  # the hub's -1 stands for "no label"
        return None, ()
    return np.array(labels, np.int64), classes


def _commit(scratch: Path, folder: Path) -> None:
    """Renames a finished folder to its place, unless another process was faster."""
    try:
        scratch.rename(folder)
    except OSError:
        if _open(folder) is None:  # damaged, and therefore prepared again
            shutil.rmtree(folder)
            scratch.rename(folder)


def _open(folder: Path) -> Dataset | None:
    """Opens the prepared data in a folder; None if it is missing or a file does not have its length."""
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        shape, classes = tuple(meta["shape"]), tuple(meta["classes"])
        if meta["format"] != FORMAT or (folder / "images.bin").stat().st_size != math.prod(shape):
            return None
        # Copy-on-write, because PyTorch warns about arrays that are not writable.
        images = np.memmap(folder / "images.bin", np.uint8, "c", shape=shape)
        digests = np.load(folder / "digests.npy")
        groups = np.load(folder / "groups.npy")
        labels = np.load(folder / "labels.npy") if classes else None
        arrays = [array for array in (digests, groups, labels) if array is not None]
        if any(len(array) != len(images) for array in arrays) or groups.dtype != np.int64:
            return None
        return Dataset(
            images,
            labels,
            classes,
            digests,
            groups,
            checksum=meta["checksum"],
            fingerprint=meta["fingerprint"],
            source=meta["source"],
            revision=meta["revision"],
            skipped=tuple(meta["skipped"]),
            folder=folder,
        )
    except (OSError, ValueError, KeyError, TypeError, EOFError):
        return None


def data_fingerprint(images: ndarray, labels: ndarray | None, classes: tuple[str, ...]) -> str:
    """Returns SHA-256, in hex, of shape, class names, labels (as little-endian int64) and images, in order."""
    digest = hashlib.sha256(json.dumps([list(images.shape), list(classes)]).encode())
    if labels is not None:
        digest.update(labels.astype("<i8").tobytes())
    for start in range(0, len(images), 1024):
        digest.update(np.ascontiguousarray(images[start : start + 1024]))
    return digest.hexdigest()


# ---- split -----------------------------------------------------------------------------------------------------------


def split(dataset: Dataset) -> tuple[ndarray, ndarray]:
    """Returns (train, held_out): ascending int64 indices, chosen by content and not by the order of the images.

    About n/7 images are held out up to n = 700, then 100, then n/50: whole groups of near-duplicates, in the order of
    their smallest digest. At another size
    the same images are chosen, except that a pair may be near-duplicates at one size only.
    """
    n = len(dataset.groups)
    target = min(max(1, n // 7), max(100, n // 50))
    members = {}
    for i in sorted(range(n), key=lambda i: dataset.digests[i].tobytes()):
        members.setdefault(int(dataset.groups[i]), []).append(i)
    ranked = list(members.values())  # in the order of each group's smallest digest
    held = _add_groups([], ranked, target, most=1.5 * target)
    if len(held) < target:  # the groups left would exceed the target by half: add the smallest, up to n/2 in all
        rest = [group for group in ranked if group[0] not in held]
        held = _add_groups(held, sorted(rest, key=len), target, most=n / 2)
    if not held:  # nearly all images are near-duplicates: no clean split exists
        held = [i for group in ranked for i in group][:target]
    held_out = np.array(sorted(held), np.int64)
    return np.setdiff1d(np.arange(n), held_out), held_out


def _add_groups(held: list, groups: list, target: int, most: float) -> list:
    """Adds whole groups in order until `target` is reached, leaving out any that would exceed `most`."""
    held = list(held)
    for group in groups:
        if len(held) >= target:
            break
        if len(held) + len(group) <= most:
            held += group
    return held


def near_duplicates(images: ndarray, chunk: int = 512) -> ndarray:
    """Groups uint8 (N, C, H, W) images: int64 (N,), equal numbers for images linked by a chain of near-duplicates.

    Two images are near-duplicates if the RMS difference of their 8 x 8 area means, one of them mirrored or not, is at
    most NEAR_DUPLICATE. Every such pair is found without comparing all pairs: the mean of the cells equals
    that of the mirror image, and two means differ by no more than the RMS difference, so that with the images sorted by
    mean only a window behind each image can hold its duplicates.

    Memory: 4 x 64 x C bytes an image, twice, besides chunks.
    """
    cells = _area_means(images)
    means = cells.mean((1, 2, 3), dtype=np.float64)
    order = np.argsort(means)
    cells, means = cells[order], means[order]
    squares = np.einsum("nchw,nchw->n", cells, cells, dtype=np.float64)
    limit = NEAR_DUPLICATE**2 * cells[0].size  # of a squared distance
    parents = np.arange(len(cells))
    for start in range(0, len(cells), chunk):
        here = slice(start, min(start + chunk, len(cells)))
        last = np.searchsorted(means, means[here.stop - 1] + NEAR_DUPLICATE * 1.001)
        for other in range(start, last, chunk):
            there = slice(other, min(other + chunk, last))
            right = cells[there].astype(np.float64).reshape(there.stop - other, -1)
            for left in (cells[here], cells[here, ..., ::-1]):
                products = left.astype(np.float64).reshape(len(left), -1) @ right.T
                distances = squares[here, None] + squares[there] - 2 * products
                rows, columns = np.nonzero(distances <= limit)
                _join(parents, rows + start, columns + other)
    groups = np.empty(len(cells), np.int64)
    groups[order] = order[parents]
    return groups


def _area_means(images: ndarray) -> ndarray:
    """Returns float32 (N, C, 8, 8) area means, in levels, of uint8 (N, C, H, W) images, read in chunks."""
    cells = np.empty((*images.shape[:2], DESCRIPTOR_CELLS, DESCRIPTOR_CELLS), np.float32)
    for start in range(0, len(images), 256):
        levels = torch.from_numpy(images[start : start + 256].astype(np.float32))
        cells[start : start + 256] = torch.nn.functional.adaptive_avg_pool2d(levels, DESCRIPTOR_CELLS).numpy()
    return cells


def _join(parents: ndarray, rows: ndarray, columns: ndarray) -> None:
    """Joins each pair (rows[k], columns[k]) in place (union-find); every parent is a root before and after."""
    while not np.array_equal(parents[rows], parents[columns]):
        a, b = parents[rows], parents[columns]
        np.minimum.at(parents, np.maximum(a, b), np.minimum(a, b))
        while not np.array_equal(parents, parents[parents]):
            parents[:] = parents[parents]


# ---- command lines ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Number:
    """A type for argparse: an int or a float in a range, in decimal notation."""

    kind: type
    least: float
    most: float

    def __call__(self, text: str) -> float:
        value = math.nan
        if re.fullmatch({int: r"[0-9]{1,19}", float: DECIMAL}[self.kind], text):
            value = self.kind(text)
        if not math.isfinite(value) or not self.least <= value <= self.most:
            raise argparse.ArgumentTypeError(f"{text!r} is not {self}")
        return value

    def __str__(self) -> str:
        name = {int: "a whole number", float: "a number"}[self.kind]
        if self.most >= 2**63 - 1:
            return f"{name} of at least {self.least}"
        return f"{name} from {self.least} to {self.most}"


DECIMAL = r"-?([0-9]{1,20}\.?[0-9]{0,20}|\.[0-9]{1,20})([eE][+-]?[0-9]{1,3})?"


def whole(least: int, most: int = 2**63 - 1) -> Number:
    return Number(int, least, most)


def real(least: float, most: float = math.inf) -> Number:
    return Number(float, least, most)


@dataclass(frozen=True)
class Flag:
    """One flag of a command line, or parameter of the server. A command line is a table {title: [flags]}."""

    name: str  # "--batch-size"
    default: object
    type: Callable | tuple[str, ...]  # an argparse type; a tuple of choices; or bool, which makes --name and --no-name
    help: str
    options: dict = field(default_factory=dict)  # further arguments of add_argument

    @property
    def dest(self) -> str:
        return self.options.get("dest") or self.name.lstrip("-").replace("-", "_")

    @property
    def wanted(self) -> str:
        """What a value must be, for an error message."""
        if isinstance(self.type, tuple):
            return f"one of: {', '.join(self.type)}"
        return str(self.type)

    def parse(self, text: str):
        """Parses the text of a value. Raises argparse.ArgumentTypeError."""
        if not isinstance(self.type, tuple):
            return self.type(text)
        if text not in self.type:
            raise argparse.ArgumentTypeError(f"{text!r} is not {self.wanted}")
        return text

    def accepts(self, value) -> bool:
        """Returns whether a value from a JSON file is valid for the flag."""
        if self.type is bool or value is self.default:
            return isinstance(value, bool) or value is self.default
        try:
            return self.parse(as_text(value)) == value
        except (ValueError, argparse.ArgumentTypeError):
            return False

    def check(self, value):
        """Returns a value from JSON if it is valid for the flag. Raises argparse.ArgumentTypeError if not."""
        if isinstance(value, float) and value.is_integer():  # JSON has one type of numbers: 2.0 is an integer
            value = int(value)
        if isinstance(value, list | dict | None) or not self.accepts(value):
            raise argparse.ArgumentTypeError(f"this is not {self.wanted}")
        return self.parse(as_text(value))

    def schema(self) -> dict:
        """Returns the JSON schema of a value."""
        schema = {"description": self.help}
        if self.default is not None:
            schema["default"] = self.default
        if isinstance(self.type, tuple):
            return schema | {"type": "string", "enum": list(self.type)}
        kind = {int: "integer", float: "number"}[self.type.kind]
        return schema | {"type": kind, "minimum": self.type.least, "maximum": self.type.most}


def as_text(value) -> str:
    """Returns a value in the notation of the command line."""
    if isinstance(value, list):
        return ",".join(map(str, value))
    return str(value)


def git_commit() -> str | None:
    """Returns the commit of this code: $PAPILIO_COMMIT, which containers have, or that of the repository; else None."""
    if os.environ.get("PAPILIO_COMMIT"):
        return os.environ["PAPILIO_COMMIT"]
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    with suppress(OSError, subprocess.CalledProcessError):
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


class Version(argparse.Action):
    """Prints version and commit, and exits."""

    def __call__(self, parser, *_) -> NoReturn:
        print(f"Papilio {VERSION}, commit {git_commit() or 'unknown'}")
        parser.exit()


class Parser(argparse.ArgumentParser):
    """An argparse parser that reports a bad flag in one sentence.

    Its --help ends with the examples in the second paragraph of the module's docstring.
    """

    def __init__(self, prog: str, description: str, docstring: str, **options):
        examples = "\n".join(["examples:", *(docstring or "").split("\n\n")[1:2]])  # python -OO has no docstrings
        formatter = argparse.RawDescriptionHelpFormatter
        texts = {"description": description, "epilog": examples, "formatter_class": formatter}
        super().__init__(prog, allow_abbrev=False, **texts, **options)
        self.add_argument("--version", action=Version, nargs=0, help="print version and commit, and exit")

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; {self.prog} --help lists the flags\n")


METAVARS = {str: "NAME", Path: "PATH"}


def add_flags(parser: argparse.ArgumentParser, table: dict) -> None:
    """Adds a table {title: [flags]} to a parser, each flag with its default in the help text."""
    for title, flags in table.items():
        group = parser.add_argument_group(title)
        for flag in flags:
            how = {"type": flag.type, "metavar": METAVARS.get(flag.type, "N")}
            if isinstance(flag.type, tuple):
                how = {"choices": flag.type}
            elif flag.type is bool:
                how = {"action": argparse.BooleanOptionalAction}
            text = flag.help
            if flag.default not in (None, argparse.SUPPRESS):
                text += f" (default: {flag.default})"
            text = text.replace("%", "%%")
            group.add_argument(flag.name, default=flag.default, help=text, **how | flag.options | {"dest": flag.dest})


def exit_status(work: Callable) -> int:
    """Runs a command and returns its exit status: 0 or its own; 2, with one sentence, for bad input; 130 for Ctrl-C."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # a file name may be invalid UTF-8
    try:
        return work() or 0
    except InputError as error:
        if os.environ.get("RANK", "0") != "0":  # the first process reports errors of all; torchrun ends the others
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(3)
        print(f"error: {error}", file=sys.stderr)
        return error.status
    except (MemoryError, RuntimeError) as error:
        # torch.OutOfMemoryError is a RuntimeError; on a CPU only the message identifies it.
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        print("error: out of memory; choose a smaller --batch-size or --size", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


FLAGS = {
    "dataset": [
        Flag("--size", 64, whole(*SIZES), "width and height of the images in pixels"),
        Flag("--channels", 3, whole(1, 3), "3 for colour, 1 for grey"),
        Flag("--revision", None, str, "branch, tag or commit of a Hugging Face dataset (default: the newest)"),
        Flag("--out", Path("data.png"), Path, "PNG file to write, with a grid of up to 64 images"),
    ]
}


def print_summary(dataset: Dataset, out: Path) -> None:
    """Verifies a dataset, prints what is in it and writes a grid of up to 64 images to `out`."""
    n, channels, size, _ = dataset.images.shape
    colours = {1: "grey", 3: "RGB"}[channels]
    revision = f" at revision {dataset.revision}" if dataset.revision else ""
    print(f"source       {dataset.source}{revision}")
    print(f"images       {n:,} of {size} x {size} pixels, {colours}")
    print(f"prepared in  {dataset.folder} ({dataset.images.nbytes / 1e6:,.1f} MB)")
    print(f"classes      {len(dataset.classes) or 'none'}")
    for label, name in enumerate(dataset.classes):
        print(f"             {(dataset.labels == label).sum():>7,} {name}")
    print(f"skipped      {len(dataset.skipped)}")
    for line in dataset.skipped[:10]:
        print(f"             {line}")
    if data_fingerprint(dataset.images, dataset.labels, dataset.classes) != dataset.checksum:
        raise InputError(f"the prepared data in {dataset.folder} is damaged; delete it and run again")
    print(f"fingerprint  {dataset.fingerprint} (verified)")
    train, held_out = split(dataset)
    sizes = np.unique(dataset.groups, return_counts=True)[1]
    repeated = sizes[sizes > 1]
    print(f"split        {len(train):,} for training, {len(held_out):,} held out")
    print(f"duplicates   {len(repeated):,} groups of near-duplicates, {repeated.sum():,} images in all")
    shown = np.linspace(0, n - 1, min(n, 64)).round().astype(np.int64)
    write_png(out, grid(dataset.images[shown]), {"fingerprint": dataset.fingerprint})
    print(f"picture      {out} ({len(shown)} images)")


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser("data.py", "Prepare, verify and describe a dataset.", __doc__)
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="folder of images, .parquet file or folder of them, Hugging Face dataset id (org/name), smithsonian, "
        "synthetic[:COUNT[:SEED]], or auto",
    )
    add_flags(parser, FLAGS)
    args = parser.parse_args(argv)

    def work() -> None:
        dataset = prepare(args.source, args.size, channels=args.channels, revision=args.revision)
        print_summary(dataset, args.out)

    return exit_status(work)


if __name__ == "__main__":
    sys.exit(main())
