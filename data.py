"""Files and pixels: from a folder, parquet files or a hub id to one uint8 array on disk, and back to PNG.

`prepare` decodes a source once and caches it; `split` sets near-duplicate-free held-out images aside;
`batch_indices`, `flip` and `generator` are pure functions of (seed, step): there is no loader state.

    python data.py SOURCE     prepares, verifies and describes a data set
"""

import argparse
import functools
import hashlib
import io
import json
import math
import operator
import os
import re
import shutil
import sys
import tempfile
import threading
import urllib.error
import urllib.request
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps, PngImagePlugin

FORMAT = 1  # of the prepared folder and of the conversion that fills it: a change makes every cache key a new one
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
SIZES = (8, 1024)  # 8: the near-duplicate descriptor has 8 x 8 cells
SHORT_NAMES = {"smithsonian": "huggan/smithsonian_butterflies_subset"}
LABEL_COLUMNS = ("label", "labels", "class", "fine_label")
HUB_SECONDS = 5.0
# Levels of 255, RMS. Of 700 butterflies on white and of CIFAR-10, at 32 px, 11 and 84 pairs are within it. In
# samples seen by eye they were one photograph, recompressed, shifted or mirrored, or specimens hard to tell
# apart; no group exceeds 3. At 12, different specimens join in a chain of 18.
NEAR_DUPLICATE = 8.0


class InputError(ValueError):
    """Bad input: worth one sentence and exit status 2, no traceback."""


@dataclass(frozen=True)
class Dataset:
    """Prepared images, all of one size, and what they came from."""

    images: np.ndarray  # uint8 (N, C, H, W), a memory map that copies on write
    labels: np.ndarray | None  # int64 (N,), indices into classes
    classes: tuple[str, ...]  # () where there are none
    digests: np.ndarray  # uint8 (N, 32): SHA-256 of each image's encoded bytes, the same at every size
    fingerprint: str  # SHA-256 over images, labels and class names, in order
    source: str  # absolute path or hub id
    revision: str | None  # of a hub id
    skipped: tuple[str, ...]  # "name: reason"
    folder: Path  # where it is cached


@dataclass(frozen=True)
class Source:
    """Where images come from, before anything is decoded."""

    kind: str  # "folder", "parquet" or "hub"
    name: str  # absolute path or hub id
    revision: str | None
    root: Path  # of `files`
    files: tuple[str, ...]  # relative posix paths, sorted; () for the hub


@dataclass(frozen=True)
class Item:
    """One image that is still encoded: its bytes, or the file that holds them."""

    name: str
    encoded: bytes | Path
    label: int | str | None


# ---------------------------------------------------------------------------------------------------- pixels


def to_float(images: torch.Tensor) -> torch.Tensor:
    """uint8 levels 0..255 of any shape -> float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Float in [-1, 1] of any shape and precision -> uint8, clamped and rounded as diffusers does."""
    return ((images.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)


def decode(encoded: bytes, size: int, channels: int) -> np.ndarray:
    """One encoded image -> uint8 (channels, size, size): upright, on white, centre-cropped, never squashed.

    Of an animation, the first frame. Raises what Pillow raises for damaged data, and ValueError for a
    decompression bomb and for floating-point pixels.
    """
    with Image.open(io.BytesIO(encoded)) as image:
        # Pillow only warns up to twice its limit; nothing is decoded before this line.
        if Image.MAX_IMAGE_PIXELS and image.width * image.height > Image.MAX_IMAGE_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels, more than Pillow's MAX_IMAGE_PIXELS")
        image.draft(None, (2 * size, 2 * size))  # JPEG: decode at 1/2, 1/4 or 1/8, at least twice the target
        image = _convert(ImageOps.exif_transpose(image), "L" if channels == 1 else "RGB")
    pixels = np.asarray(_fit(image, size))
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)


def _convert(image: Image.Image, mode: str) -> Image.Image:
    """Any Pillow mode -> "L" or "RGB" of 8 bits, transparency composited on white."""
    if image.mode == "F":
        raise ValueError("floating-point pixels, whose range is unknown")
    if image.mode.startswith("I"):  # 16 bits a pixel: convert() would clip at 255 instead of scaling
        levels = np.asarray(image).astype(np.float64) / 257
        image = Image.fromarray(levels.round().clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == mode else image.convert("RGB").convert(mode)


def _fit(image: Image.Image, size: int) -> Image.Image:
    """The central square, scaled to size x size in one antialiased step; its own pixels where it fits."""
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    if side == size:
        return image.crop((int(left), int(top), int(left) + side, int(top) + side))
    return image.resize((size, size), Image.Resampling.LANCZOS, box=(left, top, left + side, top + side))


def grid(images: torch.Tensor | np.ndarray, columns: int | None = None, padding: int = 2) -> Image.Image:
    """uint8 (N, C, H, W), C 1 or 3, any N >= 1 -> one picture on white, row by row, near-square if not told.

    Raises InputError for any other shape or type.
    """
    images = np.asarray(images.detach().cpu() if isinstance(images, torch.Tensor) else images)
    if images.ndim != 4 or images.dtype != np.uint8 or not len(images) or images.shape[1] not in (1, 3):
        raise InputError(
            f"a grid needs uint8 images of shape (N, 1 or 3, H, W), N >= 1; got {images.dtype} {images.shape}"
        )
    count, channels, height, width = images.shape
    columns = min(columns or math.ceil(math.sqrt(count)), count)
    rows = math.ceil(count / columns)
    step_y, step_x = height + padding, width + padding
    canvas = np.full((rows * step_y + padding, columns * step_x + padding, channels), 255, np.uint8)
    for i, image in enumerate(images):
        y, x = i // columns * step_y + padding, i % columns * step_x + padding
        canvas[y : y + height, x : x + width] = image.transpose(1, 2, 0)
    return Image.fromarray(canvas[:, :, 0] if channels == 1 else canvas)


# ------------------------------------------------------------------------------------------------- randomness


def generator(*key: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator seeded by its key alone: 63 bits of BLAKE2b over the key's ints and strings.

    Neighbouring keys give unrelated streams, and ("a", 1) is not ("a1",). PyTorch's CPU generator keeps only
    the low 32 bits of a seed, so two of 100,000 keys may share a stream there; CUDA's keeps all.
    """
    text = json.dumps([part if isinstance(part, str) else operator.index(part) for part in key])
    seed = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1
    return torch.Generator(device=device).manual_seed(seed)


@functools.lru_cache(maxsize=2)  # a batch looks at one epoch, or at two where it straddles
def _permutation(n: int, seed: int, epoch: int) -> torch.Tensor:
    return torch.randperm(n, generator=generator(seed, "order", epoch))


def batch_indices(n: int, seed: int, step: int, batch_size: int) -> torch.Tensor:
    """Which of n images make up the global batch of a step: int64 (batch_size,), a pure function.

    Sample g = step * batch_size + position belongs to epoch g // n, a fresh permutation of range(n). Batches
    run on over the end of an epoch, and hold several epochs where batch_size > n.
    """
    samples = torch.arange(step * batch_size, (step + 1) * batch_size)
    epochs, places = samples // n, samples % n
    return torch.cat([_permutation(n, seed, epoch)[places[epochs == epoch]] for epoch in epochs.unique().tolist()])


def flip(images: torch.Tensor, seed: int, step: int, start: int = 0, total: int | None = None) -> torch.Tensor:
    """(B, C, H, W) -> the same with about half of the images mirrored left-right, by (seed, step, position).

    A process that holds rows start : start + B of a global batch of `total` passes both, so that the number
    of processes changes nothing: the bits of the whole batch are drawn and its own rows used.
    """
    total = start + len(images) if total is None else total
    bits = torch.randint(2, (total,), generator=generator(seed, "flip", step), dtype=torch.bool)
    mine = bits[start : start + len(images)].to(images.device)
    return torch.where(mine[:, None, None, None], images.flip(-1), images)


# ---------------------------------------------------------------------------------------------------- writing


@contextmanager
def disk_errors(action: str) -> Iterator[None]:
    """Turn what the disk says (full, no permission, is a directory) into one sentence."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        if isinstance(error, FileExistsError | NotADirectoryError):
            reason = "a file is where a folder is needed"
        raise InputError(
            f"cannot {action}: {reason}; free some space, check its permissions or choose another place"
        ) from error


def atomic_write(path: Path | str, write: Callable[[BinaryIO], None]) -> None:
    """Call write(file) so that `path` holds all of it or, after any failure, what it held before.

    Parent folders are created. Raises InputError for any OSError; what else `write` raises passes through.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.urandom(6).hex()}.tmp")
    with disk_errors(f"write {path}"):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Not tempfile: its files are private to the user, and a model folder is shared.
            with open(temporary, "xb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
    with suppress(OSError):  # a rename is on disk once its folder is; some systems cannot open a folder
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_png(path: Path | str, image: Image.Image, text: Mapping[str, str] | None = None) -> None:
    """Write a PNG atomically, with `text` as its text chunks. Raises InputError as atomic_write does."""
    info = PngImagePlugin.PngInfo()
    for key, value in (text or {}).items():
        info.add_text(key, str(value))
    atomic_write(path, lambda file: image.save(file, "PNG", pnginfo=info))


def read_png_text(path: Path | str) -> dict[str, str]:
    """The text chunks of a PNG, {} where it has none. Raises InputError for what is no readable PNG."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            return {key: str(value) for key, value in image.text.items()}
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"cannot read the PNG {path}: {_reason(error)}") from error


# ---------------------------------------------------------------------------------------------------- sources


def find_source(source: str, revision: str | None = None) -> Source:
    """What `source` names: a folder of images, parquet files, or a hub id. Raises InputError for all else."""
    path = Path(os.path.expanduser(source))
    if revision and os.path.exists(path):
        raise InputError(f"revision {revision!r} is for hub ids, and {source} is on this disk; leave it out")
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
            f"{source!r} is no folder or parquet file here and no hub id; name a folder of images, "
            f"a .parquet file, a hub id like org/name, or one of: {', '.join(SHORT_NAMES)}"
        )
    return Source("hub", name, revision, Path(), ())


def _list_files(root: Path) -> list[str]:
    """Relative posix paths of all files that are not hidden, sorted. Links to folders are not followed."""

    def refuse(error: OSError) -> None:
        raise InputError(f"cannot list {error.filename}: {error.strerror}; check its permissions") from error

    found = []
    for folder, subfolders, names in os.walk(root, onerror=refuse):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        found += [Path(folder, name) for name in names if not name.startswith(".")]
    return sorted(path.relative_to(root).as_posix() for path in found)


def _read_folder(source: Source) -> tuple[int, tuple[str, ...], Iterable[Item]]:
    """(count, class names, items): an image's class is the name of the folder it lies in."""
    parents = [Path(name).parent.name for name in source.files]
    classes = tuple(sorted(set(parents)))
    if "" in classes or len(classes) == 1:
        classes = ()
    index = {name: i for i, name in enumerate(classes)}
    pairs = zip(source.files, parents, strict=True)
    items = (Item(name, source.root / name, index.get(parent)) for name, parent in pairs)
    return len(parents), classes, items


def _read_table(table) -> tuple[int, tuple[str, ...] | None, Iterable[Item]]:
    """(count, class names, items) of a datasets.Dataset; the names are None where only its labels tell."""
    import datasets

    image, label = _image_column(table.features), _label_column(table.features)
    if image is None:
        raise InputError(f"no column holds images; the columns are: {', '.join(table.features)}")
    classes = getattr(table.features[label], "names", None) if label else ()
    table = table.select_columns([image, label] if label else [image])
    table = table.cast_column(image, datasets.Image(decode=False))

    def items() -> Iterator[Item]:
        for i, row in enumerate(table):
            cell = row[image] or {"path": None, "bytes": None}
            file = Path(cell["path"]) if cell["path"] else b""
            # An empty cell becomes empty bytes, which no decoder accepts: named and skipped as damaged.
            yield Item(cell["path"] or f"row {i}", cell["bytes"] or file, row[label] if label else None)

    return len(table), tuple(classes) if classes is not None else None, items()


def _image_column(features) -> str | None:
    """By type: an Image feature, else a struct with "bytes", else binary."""
    import datasets

    kinds = (
        lambda feature: isinstance(feature, datasets.Image),
        lambda feature: isinstance(feature, dict) and "bytes" in feature,
        lambda feature: getattr(feature, "dtype", None) in ("binary", "large_binary"),
    )
    return next((name for kind in kinds for name, feature in features.items() if kind(feature)), None)


def _label_column(features) -> str | None:
    """By type: a ClassLabel, else integers or strings under one of the usual names."""
    import datasets

    for name, feature in features.items():
        if isinstance(feature, datasets.ClassLabel):
            return name
    for name in LABEL_COLUMNS:
        if re.fullmatch(r"u?int\d+|(large_)?string", str(getattr(features.get(name), "dtype", None))):
            return name
    return None


def _hub_answers(seconds: float = HUB_SECONDS) -> bool:
    """Whether the hub, or the proxy's way to it, answers anything at all before the deadline."""
    answers: list[bool] = []

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

    # A thread, because no timeout reaches into a hanging name lookup; a daemon, so as not to delay the exit.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return answers == [True]


def _hub_address() -> str:
    return os.environ.get("HF_ENDPOINT") or "https://huggingface.co"


def _load_table(source: Source, scratch: Path):
    """The source as a datasets.Dataset. Raises InputError where hub or datasets refuse."""
    if source.kind == "hub" and not _hub_answers():
        raise InputError(
            f"{source.name!r} is no folder here, and the hub at {_hub_address()} gave no answer within "
            f"{HUB_SECONDS:.0f} seconds; name a folder of images or a .parquet file, or set HF_ENDPOINT to a "
            "mirror or https_proxy to a proxy"
        )
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    try:
        if source.kind == "hub":
            return datasets.load_dataset(source.name, revision=source.revision, split="train")
        files = [str(source.root / name) for name in source.files]
        # The Arrow copy that datasets makes goes with the scratch folder: only our array stays.
        return datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(scratch))
    except Exception as error:
        raise InputError(f"cannot load {source.name!r}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """The first line of an error, in short, without the addresses of buffers."""
    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image, or of a format that is not known"
    lines = str(getattr(error, "strerror", None) or error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:200]


# -------------------------------------------------------------------------------------------------- preparing


def cache_folder() -> Path:
    """$PAPILIO_CACHE, else papilio/ in $XDG_CACHE_HOME, else ~/.cache/papilio."""
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
    """Decode every image of a source once, into one array on disk; the next call only opens it.

    source    a folder of images (sub-folders are classes), a .parquet file or a folder of them, a hub id
              "org/name", or "smithsonian"
    size      pixels a side, 8 to 1024; images are scaled to it by their shorter side and centre-cropped
    channels  3 (RGB) or 1 (grey)
    revision  of a hub id: branch, tag or commit
    cache     where prepared data lives; see cache_folder

    Raises InputError for a source that cannot be read, fewer than 2 images, more than 1% of unreadable files,
    and a disk that refuses.
    """
    size = _check_size(size)
    if channels not in (1, 3):
        raise InputError(f"channels {channels}: use 3 (RGB) or 1 (grey)")
    found = find_source(str(source), revision)
    with disk_errors(f"read {found.name}"):
        key = _cache_key(found, size, channels)
    cache = Path(cache or cache_folder())
    folder = cache / "data" / key
    dataset = _open(folder)
    if dataset:
        return dataset
    with disk_errors(f"prepare {found.name} in {cache}"):
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = folder.with_name(f".{key[:16]}.{os.urandom(6).hex()}")
        scratch.mkdir()
        try:
            _fill(scratch, found, size, channels, progress)
            _commit(scratch, folder)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    dataset = _open(folder)
    if dataset is None:
        raise InputError(f"the prepared data in {folder} changed while it was written; run again")
    return dataset


def _check_size(size: int | str) -> int:
    least, most = SIZES
    if not str(size).isdecimal() or not least <= int(size) <= most:
        raise InputError(
            f"size {size}: images here are square, so use one whole number of pixels from {least} to {most}"
        )
    return int(size)


def _cache_key(source: Source, size: int, channels: int) -> str:
    """Changes with the source, its revision, and the name, length and time of each of its files."""
    listing = []
    for name in source.files:
        try:
            stat = os.stat(source.root / name)
            listing.append((name, stat.st_size, stat.st_mtime_ns))
        except OSError:  # a link to nowhere: named and skipped when it is decoded
            listing.append((name, None, None))
    facts = [FORMAT, source.kind, source.name, source.revision, size, channels, listing]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


def _fill(folder: Path, source: Source, size: int, channels: int, progress: bool) -> None:
    """Write images.bin, labels.npy, digests.npy and meta.json of a source into an empty folder."""
    with tempfile.TemporaryDirectory(dir=folder.parent, ignore_cleanup_errors=True) as scratch:
        if source.kind == "folder":
            total, classes, items = _read_folder(source)
        else:
            total, classes, items = _read_table(_load_table(source, Path(scratch)))
        labels, digests, skipped = _decode_all(folder / "images.bin", items, total, size, channels, progress)
        del items  # it holds the Arrow file open, which some systems then refuse to delete
    if len(skipped) > 0.01 * total:
        raise InputError(
            f"{len(skipped)} of {total} images in {source.name} cannot be read (over 1%); "
            "repair or remove them: " + "; ".join(skipped[:3]) + ("; ..." if len(skipped) > 3 else "")
        )
    if len(digests) < 2:
        raise InputError(f"{source.name} holds {len(digests)} readable image(s); at least 2 are needed")
    labels, classes = _dense_labels(labels, classes)
    shape = (len(digests), channels, size, size)
    images = np.memmap(folder / "images.bin", np.uint8, "r", shape=shape)
    if labels is not None:
        np.save(folder / "labels.npy", labels)
    np.save(folder / "digests.npy", np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 32))
    meta = {
        "format": FORMAT,
        "shape": shape,
        "classes": classes,
        "fingerprint": fingerprint(images, labels, classes),
        "source": source.name,
        "revision": source.revision,
        "skipped": skipped,
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")


def _decode_all(
    path: Path, items: Iterable[Item], total: int, size: int, channels: int, progress: bool
) -> tuple[list, list[bytes], list[str]]:
    """Append each decoded image to the file `path`, in the order of items: (labels, digests, skipped)."""
    from tqdm import tqdm

    def work(item: Item) -> tuple[Item, bytes, np.ndarray | str]:
        try:
            encoded = item.encoded.read_bytes() if isinstance(item.encoded, Path) else item.encoded
            return item, hashlib.sha256(encoded).digest(), decode(encoded, size, channels)
        except Exception as error:  # damaged files make decoders raise nearly anything
            return item, b"", _reason(error)

    labels, digests, skipped = [], [], []
    workers = os.cpu_count() or 1
    # Warning filters belong to the process, so they are set out here and not by each thread.
    with warnings.catch_warnings(), open(path, "wb") as file, ThreadPoolExecutor(workers) as pool:
        warnings.simplefilter("ignore")
        done = _ordered_map(pool, work, items, window=4 * workers)
        for item, digest, pixels in tqdm(done, "preparing", total, disable=not progress, unit="image"):
            if isinstance(pixels, str):
                skipped.append(f"{item.name}: {pixels}")
                continue
            file.write(pixels.tobytes())
            labels.append(item.label)
            digests.append(digest)
        file.flush()
        os.fsync(file.fileno())
    return labels, digests, skipped


def _ordered_map(pool: ThreadPoolExecutor, work: Callable, items: Iterable, window: int) -> Iterator:
    """pool.map that reads at most `window` items ahead, so that memory stays flat."""
    pending = deque()
    for item in items:
        pending.append(pool.submit(work, item))
        if len(pending) >= window:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def _dense_labels(labels: list, classes: tuple[str, ...] | None) -> tuple[np.ndarray | None, tuple[str, ...]]:
    """int64 labels 0..K-1 and K names; (None, ()) where there are no classes or an image has no label."""
    if classes == () or any(label is None for label in labels):
        return None, ()
    if classes is None:  # labels whose names nobody gave: their sorted values are the names
        values = sorted(set(labels))
        index = {value: i for i, value in enumerate(values)}
        labels, classes = [index[label] for label in labels], tuple(str(value) for value in values)
    if min(labels) < 0:  # the hub's -1 stands for "no label"
        return None, ()
    return np.array(labels, np.int64), classes


def _commit(scratch: Path, folder: Path) -> None:
    """Move a finished folder to its place. If another process was faster, its folder stays."""
    try:
        scratch.rename(folder)
    except OSError:
        if _open(folder) is None:  # damaged: that is why this process prepared it again
            shutil.rmtree(folder)
            scratch.rename(folder)


def _open(folder: Path) -> Dataset | None:
    """The prepared data in a folder, or None where it is missing or its files do not have their lengths."""
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        shape, classes = tuple(meta["shape"]), tuple(meta["classes"])
        if meta["format"] != FORMAT or (folder / "images.bin").stat().st_size != math.prod(shape):
            return None
        digests = np.load(folder / "digests.npy")
        labels = np.load(folder / "labels.npy") if classes else None
        if digests.shape != (shape[0], 32) or (classes and labels.shape != shape[:1]):
            return None
        # Copy on write: PyTorch warns of an array that is not writable, and the file stays as it is all the same.
        images = np.memmap(folder / "images.bin", np.uint8, "c", shape=shape)
        origin = {name: meta[name] for name in ("fingerprint", "source", "revision")}
        skipped = tuple(meta["skipped"])
        return Dataset(images, labels, classes, digests, **origin, skipped=skipped, folder=folder)
    except (OSError, ValueError, KeyError, TypeError, EOFError):
        return None


def fingerprint(images: np.ndarray, labels: np.ndarray | None, classes: tuple[str, ...]) -> str:
    """SHA-256 hex over shape, class names, labels (as little-endian int64) and images, in order."""
    digest = hashlib.sha256(json.dumps([list(images.shape), list(classes)]).encode())
    if labels is not None:
        digest.update(labels.astype("<i8").tobytes())
    for start in range(0, len(images), 1024):
        digest.update(np.ascontiguousarray(images[start : start + 1024]))
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------------ split


def split(dataset: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """(train, held_out): ascending int64 indices, chosen by content, the same images whatever their order.

    About n/7 images are held out up to n = 700, then 100, then n/50. Near-duplicates stay on one side. At
    another size the same images are chosen, unless a pair near the limit is within it at one size only.
    """
    return choose_held_out(near_duplicates(dataset.images), dataset.digests)


def choose_held_out(groups: np.ndarray, digests: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Take whole groups, in the order of their smallest digest, until enough images are held out.

    groups   int64 (N,): images with the same number stay together
    digests  uint8 (N, 32)
    """
    n = len(groups)
    target = min(max(1, n // 7), max(100, n // 50))
    members: dict[int, list[int]] = {}
    for i in sorted(range(n), key=lambda i: digests[i].tobytes()):
        members.setdefault(int(groups[i]), []).append(i)
    ranked = list(members.values())  # a dict keeps its order: here that of each group's smallest digest
    held = _take([], ranked, target, most=1.5 * target)
    if len(held) < target:  # only groups that overshoot by half are left: the smallest ones, up to n/2 in all
        taken = set(held)
        rest = [group for group in ranked if group[0] not in taken]
        held = _take(held, sorted(rest, key=len), target, most=n / 2)
    if not held:  # nearly all images are alike, and no split is clean
        held = _take([], [[i] for group in ranked for i in group], target, most=target)
    held_out = np.array(sorted(held), np.int64)
    return np.setdiff1d(np.arange(n), held_out), held_out


def _take(held: list[int], groups: list[list[int]], target: int, most: float) -> list[int]:
    """Add whole groups in order, none that would make it more than `most`, until `target` is reached."""
    held = list(held)
    for group in groups:
        if len(held) >= target:
            break
        if len(held) + len(group) <= most:
            held += group
    return held


def near_duplicates(images: np.ndarray, chunk: int = 512) -> np.ndarray:
    """uint8 (N, C, H, W) -> int64 (N,): equal numbers for images that a chain of near-duplicates links.

    Two images are near-duplicates if their 8 x 8 area means, or those of one and of the other's mirror image,
    differ by at most NEAR_DUPLICATE levels, root mean square. Every such pair is found, without comparing all
    pairs: the mean of the cells is that of their mirror image, and two means differ by no more than the RMS
    difference, so in the order of the means only a window behind each image can hold its duplicates.

    Memory: 4 x 64 x C bytes an image, twice, besides chunks.
    """
    cells = _describe(images)
    means = cells.mean((1, 2, 3), dtype=np.float64)
    order = np.argsort(means)
    cells, means = cells[order], means[order]
    both = cells.reshape(len(cells), -1), cells[..., ::-1].reshape(len(cells), -1)
    squares = np.square(both[0]).sum(1)
    limit = NEAR_DUPLICATE**2 * both[0].shape[1]  # of a squared distance
    parents = np.arange(len(cells))
    for start in range(0, len(cells), chunk):
        stop = min(start + chunk, len(cells))
        last = np.searchsorted(means, means[stop - 1] + NEAR_DUPLICATE * 1.001)
        for other in range(start, last, chunk):
            right = slice(other, min(other + chunk, last))
            for left in both:
                squared = squares[start:stop, None] + squares[right] - 2 * left[start:stop] @ both[0][right].T
                # 1% more than the limit, for the rounding of this formula; _link measures again.
                rows, columns = np.nonzero(squared <= 1.01 * limit)
                _link(parents, left, both[0], rows + start, columns + other, limit)
    groups = np.empty(len(cells), np.int64)
    groups[order] = order[_roots(parents)]
    return groups


def _describe(images: np.ndarray) -> np.ndarray:
    """uint8 (N, C, H, W) -> float32 (N, C, 8, 8) area means in levels, read in chunks."""
    cells = np.empty((*images.shape[:2], 8, 8), np.float32)
    for start in range(0, len(images), 256):
        levels = torch.from_numpy(images[start : start + 256].astype(np.float32))
        cells[start : start + 256] = torch.nn.functional.adaptive_avg_pool2d(levels, 8).numpy()
    return cells


def _link(parents: np.ndarray, left: np.ndarray, right: np.ndarray, rows, columns, limit: float) -> None:
    """Union-find: join each pair (rows[k], columns[k]) whose squared distance is within the limit."""
    while len(rows):
        roots = _roots(parents)  # in a data set of copies nearly every pair is a known one
        fresh = roots[rows] != roots[columns]
        rows, columns = rows[fresh], columns[fresh]
        head_rows, head_columns = rows[:4096], columns[:4096]
        close = np.square(left[head_rows] - right[head_columns]).sum(1, dtype=np.float64) <= limit
        for a, b in zip(head_rows[close].tolist(), head_columns[close].tolist(), strict=True):
            a, b = _root(parents, a), _root(parents, b)
            parents[max(a, b)] = min(a, b)
        rows, columns = rows[4096:], columns[4096:]


def _root(parents: np.ndarray, i: int) -> int:
    while parents[i] != i:
        i = int(parents[i])
    return i


def _roots(parents: np.ndarray) -> np.ndarray:
    """The root of every element; shortens the paths in place."""
    while not np.array_equal(parents, parents[parents]):
        parents[:] = parents[parents]
    return parents


# ---------------------------------------------------------------------------------------------- command line


def exit_status(work: Callable[[], None]) -> int:
    """Runs a command: 0, or 2 and one sentence on stderr for bad input, or 130 for Ctrl-C."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # a file's name may be no text at all
    try:
        work()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        # A CPU says so in words only; a GPU's torch.OutOfMemoryError is a RuntimeError too.
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        print("error: the memory is full; choose a smaller --batch-size or size", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def describe(dataset: Dataset, out: Path) -> None:
    """Verify a data set, print what is in it and write a grid of up to 64 images to `out`."""
    n, channels, size, _ = dataset.images.shape
    revision = f" at revision {dataset.revision}" if dataset.revision else ""
    print(f"source       {dataset.source}{revision}")
    print(f"images       {n:,} of {size} x {size} pixels, {'grey' if channels == 1 else 'RGB'}")
    print(f"prepared in  {dataset.folder} ({dataset.images.nbytes / 1e6:,.1f} MB)")
    print(f"classes      {len(dataset.classes) or 'none'}")
    for label, name in enumerate(dataset.classes):
        print(f"             {(dataset.labels == label).sum():>7,} {name}")
    print(f"skipped      {len(dataset.skipped)}")
    for line in dataset.skipped[:10]:
        print(f"             {line}")
    if fingerprint(dataset.images, dataset.labels, dataset.classes) != dataset.fingerprint:
        raise InputError(f"the prepared data in {dataset.folder} is damaged; delete it and run again")
    print(f"fingerprint  {dataset.fingerprint} (verified)")
    groups = near_duplicates(dataset.images)
    train, held_out = choose_held_out(groups, dataset.digests)
    sizes = np.unique(groups, return_counts=True)[1]
    repeated = sizes[sizes > 1]
    print(f"split        {len(train):,} for training, {len(held_out):,} held out")
    print(f"duplicates   {len(repeated):,} groups of near-duplicates, {repeated.sum():,} images in all")
    spread = np.linspace(0, n - 1, min(n, 64)).round().astype(np.int64)
    write_png(out, grid(dataset.images[spread]), {"fingerprint": dataset.fingerprint})
    print(f"picture      {out} ({len(spread)} images)")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Prepare, verify and describe a data set.")
    parser.add_argument(
        "source",
        help="A folder of images, a .parquet file or a folder of them, a hub id (org/name), or smithsonian.",
    )
    parser.add_argument("--size", default="64", help="Pixels a side, 8 to 1024 (default: %(default)s).")
    parser.add_argument("--channels", type=int, default=3, help="3 for RGB or 1 for grey (default: %(default)s).")
    parser.add_argument("--revision", help="The branch, tag or commit of a hub id (default: its newest).")
    parser.add_argument(
        "--out", type=Path, default=Path("data.png"), help="Where the picture goes (default: %(default)s)."
    )
    args = parser.parse_args(argv)
    return exit_status(
        lambda: describe(prepare(args.source, args.size, channels=args.channels, revision=args.revision), args.out)
    )


if __name__ == "__main__":
    sys.exit(main())
