"""
Images that a decoder gets wrong or that take all memory: levels of 16 and 32 bits, floats, strips, decompression bombs.

    python -m pytest tests/robustness/test_images.py
"""
import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

import data
from configurator import UserError
from data import MAX_PIXELS, MAX_SIDE, load_image, transform_image

RAMP = np.arange(64)[None] * np.ones((64, 1))                        # (64, 64) levels 0 to 63


def stored(array, path):
    Image.fromarray(array).save(path)
    return path


@pytest.mark.parametrize("name, levels, scale", [
    ("a.png", (RAMP * 1040).astype(np.uint16), 65535), ("a.tiff", (RAMP * 1040).astype(np.uint16), 65535),
    ("dark.png", (RAMP * 3).astype(np.uint16), 65535),               # a night picture stays dark
    ("i16.tiff", (RAMP * 1040).astype(np.int32), 65535), ("i8.tiff", (RAMP * 4).astype(np.int32), 255),
    ("i32.tiff", (RAMP * 30_000_000).astype(np.int32), 63 * 30_000_000),
    ("f1.tiff", (RAMP / 63).astype(np.float32), 1), ("f8.tiff", (RAMP * 4).astype(np.float32), 255),
    ("f16.tiff", (RAMP * 1040).astype(np.float32), 65535), ("f.tiff", (RAMP * 1e6).astype(np.float32), 63e6),
    ("black.tiff", (RAMP * 0).astype(np.float32), 1), ("black.png", (RAMP * 0).astype(np.uint16), 65535),
    ("negative.tiff", (RAMP / 63 - 0.5).astype(np.float32), 1), ("a.ppm", (RAMP * 1040).astype(np.int32), 65535),
])
def test_gray_levels_are_scaled_not_clipped(tmp_path, name, levels, scale):
    image = load_image(str(stored(levels, tmp_path / name)))
    expected = np.rint(np.clip(levels.astype(np.float64), 0, None) / scale * 255)
    for channel in range(3):
        assert abs(np.asarray(image, dtype=np.float64)[:, :, channel] - expected).max() <= 1 and image.mode == "RGB"
    if levels.max() * 255 / scale > 250 and levels.min() >= 0:
        assert len(np.unique(np.asarray(image))) == 64


def test_big_endian_and_numbers_that_are_none(tmp_path):
    levels = (RAMP * 1040).astype(">u2")
    big = Image.frombytes("I;16B", (64, 64), levels.tobytes())
    assert np.array_equal(np.asarray(transform_image(big, 28)), np.asarray(transform_image(Image.fromarray(levels.astype("<u2")), 28)))
    odd = np.where(RAMP == 5, np.nan, np.where(RAMP == 9, np.inf, RAMP / 63)).astype(np.float32)
    image = np.asarray(load_image(str(stored(odd, tmp_path / "nan.tiff"))))
    assert (image[:, [5, 9]] == 0).all() and image[0, 63, 0] == 255 and image[0, 32, 0] == 130


def png(width, height, color_type=0, bits=8):
    """A PNG of one color, a few kilobytes whatever its size."""
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    stripe = zlib.compressobj(9)
    row = bytes(1 + (width * bits * {0: 1, 2: 3, 6: 4}[color_type] + 7) // 8)
    body = b"".join(stripe.compress(row) for _ in range(height)) + stripe.flush()
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, color_type, 0, 0, 0))
            + chunk(b"IDAT", body) + chunk(b"IEND", b""))


@pytest.mark.parametrize("width, height", [(17_000, 10_000), (13_000, 13_700), (1_000_000, 91)])
def test_more_pixels_than_the_bound_are_never_decoded(tmp_path, width, height, monkeypatch, capfd):
    content = png(width, height, bits=1)
    (tmp_path / "bomb.png").write_bytes(content)
    monkeypatch.setattr(data, "to_rgb", lambda image: pytest.fail("it was decoded"))
    for source in (str(tmp_path / "bomb.png"), tmp_path / "bomb.png", io.BytesIO(content)):
        with pytest.raises(UserError) as caught:
            load_image(source)
        assert f"{width:,} x {height:,} pixels, expected at most 90,000,000 in all" in str(caught.value)


def test_the_header_of_a_bomb_is_enough(tmp_path):
    for size in [(2**31 - 1, 2**31 - 1), (60_000, 60_000), (0, 5)]:
        content = bytearray(png(1, 1))
        content[16:24] = struct.pack(">II", *size)
        content[29:33] = struct.pack(">I", zlib.crc32(bytes(content[12:29])))
        (tmp_path / "a.png").write_bytes(content)
        with pytest.raises(UserError, match="a.png: "):
            load_image(str(tmp_path / "a.png"))


@pytest.mark.parametrize("width, height", [(1, 60_000), (60_000, 1), (1080, 20_000), (20_000, 300), (2, 1_000_000)])
@pytest.mark.parametrize("pad", [True, False])
def test_a_strip_takes_no_square_of_its_length(monkeypatch, width, height, pad):
    image, sides = Image.effect_noise((width, height), 200).convert("RGB"), []
    new, resize = Image.new, Image.Image.resize
    monkeypatch.setattr(Image, "new", lambda mode, size, *more: sides.append(size) or new(mode, size, *more))
    monkeypatch.setattr(Image.Image, "resize", lambda self, size, *more, **keys: sides.append(size) or resize(self, size, *more, **keys))
    pixels = transform_image(image, 336, pad)
    assert pixels.shape == (3, 336, 336) and pixels.isfinite().all() and image.size == (width, height)
    assert all(a * b <= MAX_PIXELS for a, b in sides) and sides


def test_a_shortened_strip_shows_the_same_picture():
    """Against the same picture at a size where nothing is shortened."""
    coarse = Image.effect_noise((3, 40), 200).convert("RGB")
    short, long = coarse.resize((600, 8000), Image.Resampling.BICUBIC), coarse.resize((1200, 16_000), Image.Resampling.BICUBIC)
    assert max(short.size) < MAX_SIDE < max(long.size)
    assert (transform_image(short, 112) - transform_image(long, 112)).abs().max() < 0.1
    long = Image.effect_noise((400, 3), 200).convert("RGB").resize((8000, 60), Image.Resampling.BICUBIC)
    middle = transform_image(long.crop((3970, 0, 4030, 60)), 112, pad=False)
    assert (transform_image(long, 112, pad=False) - middle).abs()[:, :, 8:-8].max() < 0.1
