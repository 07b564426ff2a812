"""Every file gives the same pixels, or the same refusal, to both readers: to the one that holds
images in memory and to the one that reads them from disk."""

import os
import re
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from data import memory
from data.decoding import decode
from data.splits import Files

SIZE = 12
RNG = np.random.default_rng(0)
PICTURE = Image.fromarray(RNG.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8))
RAMP = np.arange(SIZE**2).reshape(SIZE, SIZE)


def disk(file):
    return decode(file, apply_exif=True)


def held(file):
    files = Files(file.parent, np.array([os.fsencode(file.name)]), torch.tensor([0]), True)
    return memory.hold(files, "train", SIZE, str(file.parent / "cache"), "raise").images[0]


readers = pytest.mark.parametrize("read", [disk, held])


def turned():
    exif = Image.Exif()
    exif[0x112] = 6
    return exif


def tiff(pixels, bits, sample=1, photometric=1):
    """A grey TIFF without compression; `sample`: 1 unsigned, 2 signed, 3 floating-point;
    `photometric`: 1 black is zero, 0 white is."""
    tags = [(256, SIZE), (257, SIZE), (258, bits), (259, 1), (262, photometric), (273, 8), (277, 1)]
    tags += [(278, SIZE), (279, len(pixels)), (339, sample)]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return b"II*\0" + struct.pack("<I", 8 + len(pixels)) + pixels + b"\x0a\0" + entries + bytes(4)


def packed(values):
    """12 bits each."""
    pairs = values.reshape(-1, 2)
    return b"".join(bytes([a >> 4, (a & 15) << 4 | b >> 8, b & 255]) for a, b in pairs.tolist())


KINDS = {
    "a.PNG": PICTURE,
    "a.bmp": PICTURE,
    "a.ppm": PICTURE,
    "a.tiff": PICTURE,
    "a.jpg": PICTURE,
    "grey.jpg": PICTURE.convert("L"),
    "cmyk.jpg": PICTURE.convert("CMYK"),
    "1.png": PICTURE.convert("1"),
    "la.png": PICTURE.convert("LA"),
    "rgba.webp": PICTURE.convert("RGBA"),
    "palette.png": PICTURE.quantize(8),
}


@readers
@pytest.mark.parametrize("name", KINDS)
def test_eight_bits_of_any_mode_are_pils(tmp_path, read, name):
    how = {"transparency": 3} if "palette" in name else {}
    KINDS[name].save(tmp_path / name, **how)
    with Image.open(tmp_path / name) as opened:
        expected = np.asarray(opened.convert("RGB"))
    assert np.array_equal(read(tmp_path / name).permute(1, 2, 0).numpy(), expected)


@readers
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.tif", "a.webp"])
def test_exif_is_followed(tmp_path, read, name):
    PICTURE.save(tmp_path / name, exif=turned(), lossless=True)
    PICTURE.save(tmp_path / f"plain-{name}", lossless=True)
    assert torch.equal(read(tmp_path / name), read(tmp_path / f"plain-{name}").rot90(-1, (1, 2)))


@readers
def test_of_an_animation_the_first_frame(tmp_path, read):
    for name, kind in (("gif.png", "GIF"), ("a.webp", "WEBP"), ("a.tif", "TIFF")):
        frames = [PICTURE.quantize(8), PICTURE.transpose(0).quantize(8)]
        frames[0].save(
            tmp_path / name, kind, save_all=True, append_images=frames[1:], lossless=True
        )
        with Image.open(tmp_path / name) as opened:
            expected = np.asarray(opened.convert("RGB"))
        assert np.array_equal(read(tmp_path / name).permute(1, 2, 0).numpy(), expected), name


DEEP = {
    "16.png": lambda file: Image.fromarray((RAMP * 458).astype(np.uint16)).save(file),
    "16.tif": lambda file: file.write_bytes(tiff((RAMP * 458).astype("<u2").tobytes(), 16)),
    "white-is-zero.tif": lambda file: file.write_bytes(
        tiff((65535 - RAMP * 458).astype("<u2").tobytes(), 16, photometric=0)
    ),
    "16.pgm": lambda file: file.write_bytes(
        b"P5 12 12 65535\n" + (RAMP * 458).astype(">u2").tobytes()
    ),
    "12.tif": lambda file: file.write_bytes(tiff(packed(RAMP * 458 >> 4), 12)),
    "10.pgm": lambda file: file.write_bytes(
        b"P5 12 12 1023\n" + (RAMP * 458 >> 6).astype(">u2").tobytes()
    ),
}


@readers
@pytest.mark.parametrize("name", DEEP)
def test_more_than_eight_bits_are_scaled_by_their_type(tmp_path, read, name):
    DEEP[name](tmp_path / name)
    pixels = read(tmp_path / name).int()
    assert torch.equal(pixels[0], pixels[2])
    assert (pixels[0] - torch.from_numpy(RAMP) * 458 * 255 // 65535).abs().max() <= 1


REFUSED = {
    "float.tif": (tiff(RAMP.astype("<f4").tobytes(), 32, 3), "are floating-point numbers"),
    "32.tif": (tiff(RAMP.astype("<u4").tobytes(), 32), "are signed or 32-bit integers"),
    "signed.tif": (tiff(RAMP.astype("<i2").tobytes(), 16, 2), "are signed or 32-bit integers"),
    "empty.jpg": (b"", "the file is empty"),
    "text.png": (b"<html>not found</html>", "not an image"),
}


@readers
@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_range_or_is_no_image_is_refused(tmp_path, read, name):
    content, reason = REFUSED[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"cannot read the image .*{name} \(.*{reason}") as error:
        read(tmp_path / name)
    assert "\n" not in str(error.value)


@readers
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.tif", "a.webp"])
@pytest.mark.parametrize("part", [0.3, 0.9])
def test_a_truncated_file_is_refused(tmp_path, read, name, part):
    file = tmp_path / name
    PICTURE.resize((64, 64)).save(file)
    whole = file.read_bytes()
    file.write_bytes(whole[: int(part * len(whole))])
    with pytest.raises(ValueError, match=f"cannot read the image {re.escape(str(file))}"):
        read(file)


@readers
@pytest.mark.parametrize("name", ["huge.png", "huge.jpg"])
def test_an_image_too_large_to_be_safe_is_refused(tmp_path, read, name, monkeypatch):
    """Whichever decoder would take it."""
    for file in (name, f"other-{name}"):
        PICTURE.resize((64, 64)).save(tmp_path / file)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4000)
    assert read(tmp_path / f"other-{name}").dtype == torch.uint8  # up to twice that PIL only warns
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)
    with pytest.raises(ValueError, match=rf"cannot read the image .*{name} \(.*4096 pixels"):
        read(tmp_path / name)


@readers
def test_an_error_can_be_printed_whatever_the_name(tmp_path, read):
    file = tmp_path / os.fsdecode(b"\xe9.png")
    file.write_bytes(b"")
    with pytest.raises(ValueError, match=r"\\xe9\.png \(the file is empty\)") as error:
        read(file)
    str(error.value).encode()
