"""Images of odd kinds: deep, transparent, very large, and files that Pillow would hand on."""

import json
import os
import struct
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common.datasets import load_datasets, pixels
from common.datasets.files import decode_image, read_image, read_size
from common.datasets.pixels import FORMATS, GREY, to_8_bits
from common.errors import InputError


@pytest.mark.parametrize(
    "values, bits, expected",
    [
        ([0, 1, 128, 255], 8, [0, 1, 128, 255]),
        ([0, 1023], 10, [0, 255]),
        ([0, 2048, 4095], 12, [0, 127, 255]),
        ([0, 257, 128 * 257, 65535], 16, [0, 1, 128, 255]),
        ([0, 2**20 - 1], 20, [0, 255]),
        ([0, 2**31 - 1], 32, [0, 127]),
        ([-5, 0, 200], 8, [0, 0, 200]),
    ],
)
def test_the_depth_is_what_the_values_need(values, bits, expected):
    seen, depth = to_8_bits(np.array([values]))
    assert depth == bits and seen.dtype == np.uint8
    assert seen[0].tolist() == expected


@pytest.mark.parametrize("ending", ["png", "tif"])
def test_twelve_bits_in_a_file_of_sixteen_are_seen(tmp_path, ending):
    path = tmp_path / f"a.{ending}"
    Image.fromarray(np.array([[0, 2048, 4095]], np.uint16)).save(path)
    decoded = decode_image(path)
    assert decoded.image.tolist() == [[[0, 127, 255]]] * 3
    assert decoded.bits == 12 and decoded.notes == ("12 bits a channel, seen as 8", "", "")


def test_integers_of_32_bits_are_seen(tmp_path):
    path = tmp_path / "a.tif"
    Image.fromarray(np.array([[0, 100, 255]], np.int32)).save(path)
    assert read_image(path)[0].tolist() == [[0, 100, 255]]
    Image.fromarray(np.array([[-7, 100, 255]], np.int32)).save(path)
    assert read_image(path)[0].tolist() == [[0, 100, 255]]


def test_unsigned_integers_of_32_bits_are_not_negative(tmp_path):
    """The bright half of the range has the sign bit set."""
    path = tmp_path / "a.tif"
    values = np.array([[0, 2**31, 2**32 - 1]], np.uint32)
    Image.fromarray(values.view(np.int32)).save(path)
    signed = struct.pack("<HHLL", 339, 3, 1, 2)  # Pillow writes SampleFormat 2
    unsigned = struct.pack("<HHLL", 339, 3, 1, 1)
    path.write_bytes(path.read_bytes().replace(signed, unsigned))
    assert read_image(path)[0].tolist() == [[0, 127, 255]]


def test_floating_point_pixels_are_one_line(tmp_path):
    path = tmp_path / "a.tif"
    Image.fromarray(np.ones((4, 5), np.float32)).save(path)
    with pytest.raises(InputError, match=r"a\.tif cannot be decoded \(floating-point pixels"):
        read_image(path)


HIDDEN = (255, 0, 255)


def transparent(kind: str, path) -> None:
    """Writes 4 x 4 pixels: the left half is green, the right half is hidden magenta."""
    image = Image.new("RGBA", (4, 4), (0, 200, 0, 255))
    image.paste((*HIDDEN, 0), (2, 0, 4, 4))
    if kind == "rgba":
        image.save(path)
    elif kind == "palette":
        colors = Image.new("P", (4, 4), 0)
        colors.putpalette([0, 200, 0, *HIDDEN])
        colors.paste(1, (2, 0, 4, 4))
        colors.save(path, transparency=1)
    else:  # a colour key
        image.convert("RGB").save(path, transparency=HIDDEN)


@pytest.mark.parametrize("kind", ["rgba", "palette", "key"])
def test_transparent_pixels_are_grey(tmp_path, kind):
    transparent(kind, tmp_path / "a.png")
    decoded = decode_image(tmp_path / "a.png")
    assert decoded.image[:, 0, 0].tolist() == [0, 200, 0]
    assert decoded.image[:, 0, 3].tolist() == list(GREY)
    assert decoded.transparent and str(GREY) in decoded.notes[1]


def test_grey_with_alpha_and_half_transparent_pixels(tmp_path):
    Image.fromarray(np.array([[[200, 255], [200, 0]]], np.uint8), "LA").save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png")[0].tolist() == [[200, 128]]
    Image.new("RGBA", (1, 1), (228, 28, 128, 128)).save(tmp_path / "b.png")
    red, green, blue = read_image(tmp_path / "b.png").flatten().tolist()
    assert abs(red - 178) <= 1 and abs(green - 78) <= 1 and blue == 128


def test_opaque_alpha_changes_nothing(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 4), np.uint8)
    pixels[..., 3] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    decoded = decode_image(tmp_path / "a.png")
    assert np.array_equal(decoded.image.permute(1, 2, 0).numpy(), pixels[..., :3])
    assert not decoded.transparent and decoded.notes == ("", "", "")


def own(folder, names):
    """A dataset of images in `folder`, without boxes but for one."""
    images = [{"id": i, "file_name": n, "height": 4, "width": 4} for i, n in enumerate(names)]
    box = {"id": 1, "image_id": 0, "category_id": 1, "bbox": [0, 0, 3, 3]}
    record = {"images": images, "annotations": [box], "categories": [{"id": 1, "name": "cat"}]}
    (folder / "a.json").write_text(json.dumps(record))
    return f"my={folder}/a.json:{folder}"


def test_a_dataset_tells_of_its_kinds_of_pixels_once(tmp_path, caplog):
    names = ["deep-1.png", "deep-2.png", "clear-1.png", "clear-2.png", "plain.png", "moves.gif"]
    for name in names[:2]:
        Image.fromarray(np.full((4, 4), 4000, np.uint16)).save(tmp_path / name)
    for name in names[2:4]:
        transparent("rgba", tmp_path / name)
    Image.new("RGB", (4, 4)).save(tmp_path / names[4])
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / names[5], save_all=True, append_images=frames[1:])
    (dataset,) = load_datasets(own(tmp_path, names), "train")
    with caplog.at_level("INFO"):
        for row in [4, 0, 1, 2, 3, 5, 5]:
            dataset.load(row)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 3 and "moves.gif' has several frames or pages" in lines[2]
    assert "my: image 'deep-1.png' has 12 bits" in lines[0] and "clear-1.png" in lines[1]


# -- JPEG


def in_kind(kind: str, path) -> None:
    """Writes a JPEG of 41 x 30 pixels that are smooth and noisy in parts."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8))
    image = image.resize((41, 30))
    exif = Image.Exif()
    options = {"quality": 80}
    if kind.startswith("4:"):
        options["subsampling"] = kind
    elif kind in ("L", "CMYK"):
        image = image.convert(kind)
    elif kind.startswith("tag"):
        exif[0x0112] = int(kind[-1])
    elif kind in ("progressive", "keep_rgb"):
        options[kind] = True
    form = "JPEG"
    if kind == "MPO":
        form, options["save_all"], options["append_images"] = kind, True, [image]
    image.save(path, form, exif=exif, **options)


def both_ways(path, monkeypatch, **more):
    """Decodes by simplejpeg where that is possible, then by Pillow; tells who decoded the first."""
    seen = []
    simplejpeg = pixels.simplejpeg

    class Counted:
        @staticmethod
        def decode_jpeg(data, **options):
            seen.append(simplejpeg.decode_jpeg(data, **options))
            return seen[-1]

    found = []
    for decoder in (Counted, None):
        monkeypatch.setattr(pixels, "simplejpeg", decoder)
        try:
            found.append(decode_image(path, **more))
        except InputError as error:
            found.append(str(error))
    monkeypatch.setattr(pixels, "simplejpeg", simplejpeg)
    return *found, bool(seen)


PLAIN = ("4:4:4", "4:2:2", "4:2:0", "L", "progressive", "keep_rgb", "tag0", "tag1", "tag9")
FOR_PILLOW = ("CMYK", "MPO", "tag2", "tag3", "tag4", "tag5", "tag6", "tag7", "tag8")


@pytest.mark.parametrize("kind", PLAIN + FOR_PILLOW)
def test_jpegs_have_the_pixels_of_pillow(tmp_path, monkeypatch, kind):
    in_kind(kind, tmp_path / "a.jpg")
    ours, pillows, by_simplejpeg = both_ways(tmp_path / "a.jpg", monkeypatch)
    assert by_simplejpeg == (kind in PLAIN)
    assert torch.equal(ours.image, pillows.image) and ours.image.float().std() > 10
    assert ours.size == pillows.size == tuple(ours.image.shape[1:])
    assert ours.notes == pillows.notes


@pytest.mark.parametrize("end", [0.3, 0.6, 0.99, -1, -2])
def test_jpegs_that_are_cut_off_are_errors(tmp_path, monkeypatch, end):
    in_kind("4:2:0", tmp_path / "a.jpg")
    content = (tmp_path / "a.jpg").read_bytes()
    end = int(end * len(content)) if 0 < end < 1 else end
    (tmp_path / "a.jpg").write_bytes(content[:end])
    ours, pillows, by_simplejpeg = both_ways(tmp_path / "a.jpg", monkeypatch)
    assert ours == pillows and "a.jpg cannot be decoded (" in ours
    assert not by_simplejpeg


def test_damage_that_pillow_bears_is_borne(tmp_path, monkeypatch, capfd):
    """Pillow shows what is left of the pixels; the decoder writes nothing past the log."""
    in_kind("4:2:0", tmp_path / "a.jpg")
    content = (tmp_path / "a.jpg").read_bytes()
    half = content[: len(content) * 3 // 4] + b"\xff\xd9"
    for damaged in (half, content[:-2] + 20 * b"more" + content[-2:]):
        (tmp_path / "a.jpg").write_bytes(damaged)
        ours, pillows, by_simplejpeg = both_ways(tmp_path / "a.jpg", monkeypatch)
        assert torch.equal(ours.image, pillows.image) and not by_simplejpeg
    assert capfd.readouterr() == ("", "")


def test_jpegs_of_a_tar_file_are_decoded_alike(tmp_path, monkeypatch):
    in_kind("4:2:0", tmp_path / "a.jpg")
    data = (tmp_path / "a.jpg").read_bytes()
    ours, pillows, by_simplejpeg = both_ways(Path("in a.tar"), monkeypatch, data=data)
    assert by_simplejpeg and torch.equal(ours.image, pillows.image)


# -- large images


@pytest.fixture
def small_limit(monkeypatch):
    """Pillow warns above 600 pixels, and refuses images above 1200."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 600)


def noise(height, width):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


def test_a_large_jpeg_is_decoded_at_half_its_size(tmp_path, small_limit, monkeypatch):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    noise(20, 41).save(tmp_path / "a.jpg", exif=exif)
    decoded = decode_image(tmp_path / "a.jpg", reduce=True)
    assert decoded.image.shape == (3, 21, 10) and decoded.size == (41, 20)
    assert read_size(tmp_path / "a.jpg") == (41, 20)
    assert read_image(tmp_path / "a.jpg").shape == (3, 41, 20)  # annotations fit this size
    ours, pillows, by_simplejpeg = both_ways(tmp_path / "a.jpg", monkeypatch, reduce=True)
    assert torch.equal(ours.image, pillows.image) and not by_simplejpeg
    noise(20, 30).save(tmp_path / "b.jpg")
    assert decode_image(tmp_path / "b.jpg", reduce=True).image.shape == (3, 20, 30)


def test_no_warning_below_the_limit_and_one_line_beyond(tmp_path, small_limit):
    noise(20, 40).save(tmp_path / "a.png")
    noise(20, 70).save(tmp_path / "b.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_image(tmp_path / "a.png")
    with pytest.raises(InputError, match=r"b\.png has more than .* megapixels; make it smaller"):
        read_image(tmp_path / "b.png")


def test_strips_copy_every_row(tmp_path, monkeypatch):
    noise(23, 7).save(tmp_path / "a.png")
    whole = read_image(tmp_path / "a.png")
    monkeypatch.setattr("common.datasets.pixels.STRIP", 30)
    assert torch.equal(read_image(tmp_path / "a.png"), whole)


# -- trust


def test_a_postscript_file_starts_no_program(tmp_path, monkeypatch):
    """Pillow would run gs on it; a stand-in on PATH leaves a trace if it runs."""
    path = tmp_path / "0.jpg"
    path.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    program = tmp_path / "gs"
    program.write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for read in (read_image, read_size):
        with pytest.raises(InputError, match=r"0\.jpg cannot be decoded \(it is none of JPEG"):
            read(path)
    assert not (tmp_path / "ran").exists()
    assert "EPS" not in FORMATS
