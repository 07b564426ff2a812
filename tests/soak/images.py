"""Random images: the reader into memory and the one from disk take the same, show the same, and
name what they cannot read."""

import io
import os
import random
import shutil
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from PIL import Image

import data
from tests.data.folders import noise
from tests.soak.harness import ROOT, Part, obey_permissions

SIZE = 16
FORMATS = {  # ending: format, modes
    "png": ("PNG", ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")),
    "jpg": ("JPEG", ("L", "RGB", "CMYK")),
    "jpeg": ("JPEG", ("L", "RGB", "CMYK")),
    "bmp": ("BMP", ("1", "L", "P", "RGB", "RGBA")),
    "tif": ("TIFF", ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "LAB", "I;16", "I", "F", "YCbCr")),
    "webp": ("WEBP", ("L", "RGB", "RGBA")),
    "ppm": ("PPM", ("1", "L", "RGB", "I;16")),
    "GIF": ("GIF", ("L", "P")),  # of an ending that is not read
}
OTHER = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PCX", "TGA", "ICO", "JPEG2000")
SIDES = (SIZE, SIZE, 1, 2, 3, 7, 15, 17, 31, 64, 200, 3000)
BROKEN = ("truncated", "zeroed", "a byte", "many bytes", "empty", "text", "a folder", "a link",
          "appended", "a bomb", "other ending", "exif", "animated", "unreadable")  # fmt: skip


def picture(rng: random.Random, mode: str) -> Image.Image:
    width, height = rng.choice(SIDES), rng.choice(SIDES)
    y, x = np.mgrid[0:height, 0:width]
    wave = (x * rng.uniform(0, 9) + y * rng.uniform(0, 9) + rng.uniform(0, 200)) % 256
    if mode in ("I;16", "I"):
        return Image.fromarray((wave * 257).astype(np.uint16 if mode == "I;16" else np.int32))
    if mode == "F":
        return Image.fromarray(wave.astype(np.float32))
    colours = np.stack([wave, wave[::-1], wave.max() - wave], 2).astype(np.uint8)
    shown = Image.fromarray(colours)
    return shown.convert("L").convert(mode) if mode == "LA" else shown.convert(mode)


def encode(rng: random.Random, kind: str, mode: str) -> tuple[bytes, Image.Image]:
    shown, file = picture(rng, mode), io.BytesIO()
    more: dict[str, Any] = {}
    if kind == "TIFF" and rng.random() < 0.5:
        more["compression"] = rng.choice(["tiff_lzw", "tiff_adobe_deflate", "packbits"])
    if kind == "JPEG":
        more |= {"quality": rng.choice([1, 50, 95]), "progressive": rng.random() < 0.3}
    shown.save(file, kind, **more)
    return file.getvalue(), shown


def bomb(rng: random.Random) -> bytes:
    """A PNG that says it has billions of pixels."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(
            ">I", zlib.crc32(name + content)
        )  # fmt: skip

    side = rng.choice([20_000, 60_000, 2**31 - 1])
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    start, body = b"\x89PNG\r\n\x1a\n", zlib.compress(bytes(1000))
    return start + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def spoil(rng: random.Random, how: str, content: bytes, shown: Image.Image, file: Path) -> None:
    place = rng.randrange(len(content))
    if how == "truncated":
        content = content[:place]
    elif how == "zeroed":
        content = content[:place] + bytes(len(content) - place)
    elif how in ("a byte", "many bytes"):
        changed = bytearray(content)
        for _ in range(1 if how == "a byte" else 50):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        content = bytes(changed)
    elif how in ("empty", "text", "appended"):
        content = {"empty": b"", "text": b"<html>404</html>", "appended": content + bytes(99)}[how]
    elif how == "a bomb":
        content = bomb(rng)
    elif how in ("other ending", "exif", "animated"):
        buffer, shown = io.BytesIO(), shown.convert("RGB").resize((20, 30))
        kind = rng.choice(OTHER) if how == "other ending" else "PNG"
        more: dict[str, Any] = {}
        if how == "exif":
            more["exif"] = Image.Exif()
            more["exif"][0x0112] = rng.randrange(0, 12)
            kind = rng.choice(["PNG", "JPEG", "WEBP"])
        if how == "animated":
            more, kind = {"save_all": True, "append_images": [shown]}, "WEBP"
        shown.save(buffer, kind, **more)
        content = buffer.getvalue()
    if how == "a folder":
        file.mkdir()
    elif how == "a link":
        file.symlink_to("nowhere")
    else:
        file.write_bytes(content)


def configurations() -> dict[str, Any]:
    """For the reader into memory and the one from disk."""
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        own = ["data=folder", f"data.size={SIZE}", "model=resnet8"]
        disk = ["recipe=imagenet", f"data.resize={SIZE}", "data.workers=0", "recipe.flip=false"]
        both = {"memory": compose("config", own), "disk": compose("config", [*own, *disk])}
    GlobalHydra.instance().clear()
    return both


def read(cfg: Any) -> tuple[str, Any]:
    """What went wrong, else "", and the test images with their labels; training images are read
    as well."""
    told: list[str] = []
    try:
        source = data.resolve(cfg.data, 1, cfg.recipe)
        loader = data.load(source, cfg.data, cfg.recipe, 1, 0, "cpu", told.append)
        trained = sum(len(labels) for _, labels in loader.train(0))
        parts = [(x, labels) for x, labels in loader.test(4)]
    except ValueError as error:
        return str(error), None
    constants = torch.tensor([loader.mean, loader.std])[:, :, None, None]
    pixels = torch.cat([x for x, _ in parts]) * constants[1] + constants[0]
    labels = torch.cat([x for _, x in parts])
    return "", (255 * pixels, labels, trained, dict(loader.unreadable), told)


def compare(one: Any, other: Any, exact: bool) -> list[str]:
    """What differs between two readers. They scale by other filters, so that only the mean colours
    of what was scaled are alike."""
    found = []
    for name, a, b in zip(("labels", "training", "unreadable"), one[1:4], other[1:4], strict=True):
        if (a.tolist() != b.tolist()) if name == "labels" else a != b:
            found.append(f"{name}: {a} and {b}")
    if one[0].shape != other[0].shape:
        return [*found, f"shapes {one[0].shape} and {other[0].shape}"]
    apart = one[0] - other[0]
    worst = (apart if exact else apart.mean((2, 3))).abs().amax()
    return [*found, f"pixels differ by {worst:.3f}"] if worst > (0.01 if exact else 25) else found


def run(part: Part, count: int, only: int | None) -> None:
    both = configurations()
    base = noise(part.home / "base", train=3, test=3)
    for file in base.rglob("*.png"):
        Image.open(file).convert("RGB").resize((SIZE, SIZE)).save(file)
    for rng, folder in part.tries(count, only):
        shutil.copytree(base, folder, dirs_exist_ok=True)
        ending = rng.choice(list(FORMATS))
        kind, modes = FORMATS[ending]
        mode = rng.choice(modes)
        how = rng.choice(BROKEN) if rng.random() < 0.5 else "whole"
        where = folder / rng.choice(["train", "test"]) / rng.choice(["cat", "dog"])
        file = where / f"{rng.choice(['x', 'ü ä', '[b]', 'a' * 100])}.{ending}"
        content, shown = encode(rng, kind, mode)
        if how == "whole":
            file.write_bytes(content)
        else:
            spoil(rng, how, content, shown, file)
            if how == "unreadable":
                file.chmod(0)
        part.tried[f"{kind} {mode}" if how == "whole" else how] += 1
        what = f"{how} {kind} {mode} {shown.size} in {file.relative_to(folder)}"
        on_error = rng.choice(["raise", "skip"])
        for cfg in both.values():
            cfg.data.root, cfg.data.cache = str(folder), str(folder / "cache")
            cfg.data.on_error = on_error
        pid = os.fork()  # a decoder may take the process with it
        if pid == 0:
            code = 1
            try:
                obey_permissions()
                report(part, both, what, file, shown.size == (SIZE, SIZE) and how == "whole")
                code = bool(part.faults)
            except BaseException as error:
                part.fault(f"{what}: {type(error).__name__}: {error}")
            finally:
                os._exit(code)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if status:
            part.faults.append(what)
        if status < 0:
            part.fault(f"{what}: signal {-status}")


def report(part: Part, both: dict[str, Any], what: str, file: Path, exact: bool) -> None:
    memory, disk = (read(both[name]) for name in ("memory", "disk"))
    if bool(memory[0]) != bool(disk[0]):
        part.fault(f"{what}: memory says {memory[0]!r}, disk {disk[0]!r}")
    elif memory[0]:
        for text in (memory[0], disk[0]):
            if file.name not in text or "\n" in text:
                part.fault(f"{what}: not named: {text}")
    elif found := compare(memory[1], disk[1], exact):
        part.fault(f"{what}: {'; '.join(found)}")
