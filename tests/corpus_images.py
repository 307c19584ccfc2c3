"""Image files of all kinds, and what --predict names."""

import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL
from corpus import COLOR, HEIGHT, WIDTH, Case, photos, picture, write
from PIL import Image

from common.datasets.files import decode_image
from common.errors import InputError
from common.frames import read_file
from common.inputs import find_files

RGB = Image.new("RGB", (WIDTH, HEIGHT), COLOR)
BLACK = Image.new("RGB", (WIDTH, HEIGHT))
SEEN = {"size": (HEIGHT, WIDTH), "rgb": COLOR}
TWO = SEEN | {"several": True}
MANY = {"near": True, "several": True}
NEAR = {"size": (HEIGHT, WIDTH), "near": True}  # after lossy compression
NO_IMAGE = "image DIR/0.png cannot be decoded"
YCBCR = NEAR if int(PIL.__version__.partition(".")[0]) >= 13 else NO_IMAGE  # of Pillow itself

# -- images


def image(content: bytes | str, name: str = "0.png") -> Callable[[Path], dict]:
    """An image file that is decoded."""

    def attempt(folder: Path) -> dict:
        decoded = decode_image(write(folder / name, content))
        pixel = tuple(decoded.image[:, 0, 0].tolist())
        return {
            "size": tuple(decoded.image.shape[-2:]),
            "rgb": pixel,
            "near": max(abs(np.subtract(pixel, COLOR))) <= 12,
            "bits": decoded.bits,
            "transparent": decoded.transparent,
            "several": decoded.several,
        }

    return attempt


def saved(picture: Image.Image = RGB, kind: str = "png", **options) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def of_mode(mode: str, kind: str = "png", **options) -> Callable[[Path], dict]:
    return image(saved(RGB.convert(mode), kind, **options))


def values(kind: str, number: float, name: str = "png") -> Callable[[Path], dict]:
    """An image of one channel that holds one number."""
    return image(saved(Image.fromarray(np.full((HEIGHT, WIDTH), number, kind)), name))


def exif(tag: int, kind: str = "jpeg") -> Callable[[Path], dict]:
    """An image with an EXIF orientation."""
    fields = Image.Exif()
    fields[0x0112] = tag
    return image(saved(RGB, kind, exif=fields))


def chunk(name: bytes, data: bytes) -> bytes:
    """Returns a chunk of a PNG."""
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, height: int, rows: bytes | None, *others: bytes, kind: int = 2) -> bytes:
    """Returns a PNG whose header may promise what its rows do not hold."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, kind, 0, 0, 0))
    body = b"" if rows is None else chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(others) + body + chunk(b"IEND", b"")


def tiff_loop() -> bytes:
    """Returns a TIFF whose list of pages leads back to its start."""
    return b"II*\0" + struct.pack("<IHHHIII", 8, 1, 256, 4, 1, 30, 8)


def five_bands() -> bytes:
    """Returns a TIFF of one pixel with five bands of 16 bits, as of a satellite."""
    fields = {256: 1, 257: 1, 258: 16, 259: 1, 262: 1, 273: 8, 277: 5, 278: 1, 279: 10}
    entries = [struct.pack("<HHII", tag, 4, 1, value) for tag, value in fields.items()]
    return b"II*\0" + struct.pack("<I", 18) + bytes(10) + struct.pack("<H", 9) + b"".join(entries)


def cut(kind: str, part: float) -> bytes:
    """Returns the first part of a noisy image, which does not fit in a few bytes."""
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    data = saved(Image.fromarray(noise), kind)
    return data[: int(len(data) * part)]


def flipped(kind: str, place: int) -> bytes:
    """Returns an image in which one byte is inverted."""
    data = bytearray(picture(kind))
    data[place] ^= 255
    return bytes(data)


EXIF_TEXT = b"Exif\0\0II*\0" + struct.pack("<IHHHI", 8, 1, 0x0112, 2, 4) + b"six\0" + bytes(4)
ROWS = (b"\0" + bytes(COLOR) * WIDTH) * HEIGHT
LOSSLESS = ("png", "bmp", "gif", "tiff")
LOSSY = ("jpeg", "webp", "jpeg2000")
IMAGES = [
    *[(kind, image(picture(kind), f"0.{kind}"), SEEN) for kind in LOSSLESS],
    *[(kind, image(picture(kind), f"0.{kind}"), NEAR) for kind in LOSSY],
    *[(f"{kind} named .png", image(picture(kind)), NEAR) for kind in ("jpeg", "webp", "bmp")],
    ("a PNG named .jpg", image(picture(), "0.jpg"), SEEN),
    ("a PNG without ending", image(picture(), "0"), SEEN),
    ("one frame", image(saved(kind="gif")), SEEN | {"several": False}),
    ("two frames", image(saved(kind="gif", save_all=True, append_images=[BLACK])), TWO),
    ("two pages", image(saved(kind="tiff", save_all=True, append_images=[BLACK])), TWO),
    ("two frames of WebP", image(saved(kind="webp", save_all=True, append_images=[BLACK])), MANY),
    ("MPO", image(saved(kind="mpo", save_all=True, append_images=[RGB])), NEAR),
    ("one pixel", image(picture("png", 1, 1)), SEEN | {"size": (1, 1)}),
    ("one row", image(picture("png", 9000, 1)), SEEN | {"size": (1, 9000)}),
    ("one column", image(picture("png", 1, 9000)), SEEN | {"size": (9000, 1)}),
    ("grey", of_mode("L"), {"rgb": (82, 82, 82), "bits": 8}),
    ("grey and alpha", of_mode("LA"), {"rgb": (82, 82, 82), "transparent": False}),
    ("palette", of_mode("P"), {"size": (HEIGHT, WIDTH), "bits": 8}),
    ("palette and transparency", of_mode("P", transparency=0), {"bits": 8}),
    ("one bit", of_mode("1"), {"rgb": (0, 0, 0), "bits": 8}),
    ("alpha", of_mode("RGBA"), SEEN | {"transparent": False}),
    ("CMYK", of_mode("CMYK", "jpeg"), NEAR),
    ("CMYK in TIFF", of_mode("CMYK", "tiff"), {"bits": 8}),
    ("YCbCr in TIFF", of_mode("YCbCr", "tiff"), YCBCR),
    ("Lab in TIFF", image(saved(Image.new("LAB", (WIDTH, HEIGHT)), "tiff")), {"bits": 8}),
    ("clear", image(saved(Image.new("RGBA", (9, 9)))), {"rgb": (128,) * 3, "transparent": True}),
    ("16 bits", values("uint16", 65535), {"rgb": (255,) * 3, "bits": 16}),
    ("12 bits", values("uint16", 4095), {"rgb": (255,) * 3, "bits": 12}),
    ("16 bits that are 8", values("uint16", 255), {"rgb": (255,) * 3, "bits": 8}),
    ("16 bits black", values("uint16", 0), {"rgb": (0,) * 3, "bits": 8}),
    ("32 bits", values("int32", 2**30 - 1, "tiff"), {"rgb": (255,) * 3, "bits": 30}),
    ("32 bits negative", values("int32", -5, "tiff"), {"size": (HEIGHT, WIDTH)}),
    ("floating point", values("float32", 0.5, "tiff"), ("DIR/0.png", "save it with 8 bits")),
    ("NaN", values("float32", np.nan, "tiff"), ("DIR/0.png", "save it with 8 bits")),
    ("EXIF 1", exif(1), NEAR),
    ("EXIF 6", exif(6), {"size": (WIDTH, HEIGHT)}),
    ("EXIF 6 in PNG", exif(6, "png"), {"size": (WIDTH, HEIGHT)}),
    ("EXIF 0", exif(0), NEAR),
    ("EXIF 9", exif(9), NEAR),
    ("EXIF 65535", exif(65535), NEAR),
    ("EXIF a text", image(saved(kind="jpeg", exif=EXIF_TEXT)), NEAR),
    ("EXIF garbage", image(saved(kind="jpeg", exif=b"Exif\0\0garbage")), NEAR),
    ("EXIF cut off", image(saved(kind="jpeg", exif=b"Exif\0\0II*\0\xff\xff\xff\x7f")), NEAR),
    ("colour profile garbage", image(saved(icc_profile=b"no profile")), SEEN),
    ("text after the end", image(picture() + b"<?php ?>"), SEEN),
    ("empty", image(b""), NO_IMAGE),
    ("text", image("no image"), NO_IMAGE),
    ("NUL bytes", image(bytes(4000)), NO_IMAGE),
    ("HTML", image("<!DOCTYPE html><html></html>"), f"{NO_IMAGE} (it is a web page"),
    ("SVG", image('<svg xmlns="http://www.w3.org/2000/svg"/>'), NO_IMAGE),
    ("PostScript", image("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), NO_IMAGE),
    ("PDF", image(saved(kind="pdf")), NO_IMAGE),
    ("zip", image(b"PK\x03\x04" + bytes(99)), NO_IMAGE),
    ("icon", image(saved(kind="ico")), NO_IMAGE),
    ("PPM", image(saved(kind="ppm")), NO_IMAGE),
    ("HEIC", image(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"), f"{NO_IMAGE} (it is HEIC"),
    ("AVIF header alone", image(b"\0\0\0\x18ftypavif\0\0\0\0mif1avif"), NO_IMAGE),
    ("numpy", image(b"\x93NUMPY\x01\0"), NO_IMAGE),
    (
        "git-lfs",
        image("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        "run git lfs pull",
    ),
    ("TIFF of five bands", image(five_bands()), f"{NO_IMAGE} (it is a TIFF of a kind that"),
    *[(f"{kind} of 9 bytes", image(cut(kind, 0)[:9] or b"x"), NO_IMAGE) for kind in LOSSY],
    *[(f"{kind} cut in half", image(cut(kind, 0.5)), NO_IMAGE) for kind in (*LOSSLESS, *LOSSY)],
    *[(f"{kind} cut at the end", image(cut(kind, 0.97)), NO_IMAGE) for kind in LOSSY],
    ("PNG of a wrong checksum", image(flipped("png", 30)), NO_IMAGE),
    ("PNG of a flipped signature", image(flipped("png", 1)), NO_IMAGE),
    ("PNG without rows", image(png(WIDTH, HEIGHT, None)), NO_IMAGE),
    ("PNG of too few rows", image(png(WIDTH, HEIGHT, ROWS[:91])), SEEN),
    ("PNG of too many rows", image(png(WIDTH, HEIGHT, ROWS + ROWS)), SEEN),
    ("PNG without its end", image(png(WIDTH, HEIGHT, ROWS)[:-12]), SEEN),
    ("PNG of width 0", image(png(0, HEIGHT, ROWS)), NO_IMAGE),
    ("PNG of 2**31 rows", image(png(2**31 - 1, 2**31 - 1, ROWS)), ("DIR/0.png", "megapixels")),
    ("PNG of 60000 x 60000", image(png(60_000, 60_000, ROWS)), "more than 178 megapixels"),
    ("PNG of no colour type", image(png(WIDTH, HEIGHT, ROWS, kind=5)), NO_IMAGE),
    ("PNG without palette", image(png(WIDTH, HEIGHT, ROWS, kind=3)), NO_IMAGE),
    (
        "PNG with a text bomb",
        image(png(WIDTH, HEIGHT, ROWS, chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2**27))))),
        NO_IMAGE,
    ),
    ("TIFF that loops", image(tiff_loop()), NO_IMAGE),
    ("TIFF without pages", image(b"II*\0\0\0\0\0"), NO_IMAGE),
    ("BMP of negative size", image(flipped("bmp", 21)), "DIR/0.png"),
    ("GIF of size 0", image(b"GIF89a" + bytes(7) + b";"), NO_IMAGE),
]


def folder_as_image(folder: Path) -> dict:
    (folder / "0.png").mkdir()
    return image_at(folder / "0.png")


def pipe_as_image(folder: Path) -> dict:
    os.mkfifo(folder / "0.png")
    return image_at(folder / "0.png")


def image_at(path: Path) -> dict:
    return {"size": tuple(decode_image(path).image.shape[-2:])}


IMAGES += [
    ("a folder", folder_as_image, "image DIR/0.png is a folder; give image files"),
    ("a pipe", pipe_as_image, "DIR/0.png is no regular file, but a device or pipe"),
    ("missing", lambda folder: image_at(folder / "0.png"), "DIR/0.png does not exist"),
    ("below a file", lambda folder: image_at(write(folder / "a", "") / "0.png"), "DIR/a/0.png"),
    ("/dev/zero", lambda _: image_at(Path("/dev/zero")), "but a device or pipe"),
    ("name of 300 letters", lambda folder: image_at(folder / ("x" * 300)), "DIR/xxx"),
    ("name of two lines", lambda folder: image_at(folder / "a\nb.png"), "DIR/a\\nb.png"),
]

# -- what --predict names


def predict(*names: str, **files) -> Callable[[Path], dict]:
    """The files that names stand for are all read. `files`: "__" stands for "/", "_" for "."."""

    def attempt(folder: Path) -> dict:
        photos(folder, "a.png", "b.jpg")
        for name, content in files.items():
            write(folder / name.replace("__", "/").replace("_", "."), content)
        paths, problems = find_files([name.replace("DIR", str(folder)) for name in names])
        for problem in problems:
            raise InputError(problem)
        frames = [frame for path in paths for frame in read_file(path)]
        found = [Path(path).relative_to(folder).as_posix() for path in paths]
        return {"found": found, "images": len(frames)}

    return attempt


def made(make: Callable[[Path], None], *names: str) -> Callable[[Path], dict]:
    """`make` puts something odd into the folder of the images."""

    def attempt(folder: Path) -> dict:
        make(folder)
        return predict(*names)(folder)

    return attempt


PLAYLIST = "#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n"
PREDICT = [
    ("a file", predict("DIR/a.png"), {"found": ["a.png"], "images": 1}),
    ("a folder", predict("DIR"), {"found": ["a.png", "b.jpg"]}),
    ("a file twice", predict("DIR/a.png", "DIR/a.png"), {"images": 2}),
    ("a pattern", predict("DIR/*.png"), {"found": ["a.png"]}),
    ("a deep pattern", predict("DIR/**/*.png", x__y_png=picture()), {"images": 2}),
    ("a pattern of nothing", predict("DIR/*.gif"), "DIR/*.gif: there is no image or video"),
    ("a pattern that never closes", predict("DIR/[a.png"), "DIR/[a.png"),
    ("a folder of text", predict("DIR/t", t__a_txt="x"), ("DIR/t: there is no", "1 other file")),
    ("an empty folder", made(lambda f: (f / "e").mkdir(), "DIR/e"), "there is no image or video"),
    ("hidden images", predict("DIR/h", h___png=picture()), "there is no image or video"),
    ("nothing there", predict("DIR/gone.png"), "image DIR/gone.png does not exist"),
    ("empty name", predict(""), "does not exist"),
    ("two lines", predict("DIR/a\nb.png"), "DIR/a\\nb.png does not exist"),
    ("300 letters", predict("DIR/" + "x" * 300), ("DIR/xxx", "does not exist")),
    ("NUL", predict("DIR/a\0.png"), "DIR/a\\x00.png"),
    ("an address", predict("https://example.com/a.jpg"), "is an address; download the file"),
    ("a home of nobody", predict("~nobody-here/a.png"), "~nobody-here/a.png does not exist"),
    ("a device", predict("/dev/zero"), "/dev/zero is no regular file"),
    ("a pipe", made(lambda f: os.mkfifo(f / "p.png"), "DIR/p.png"), "but a device or pipe"),
    ("a pipe of video", made(lambda f: os.mkfifo(f / "p.mp4"), "DIR/p.mp4"), "device or pipe"),
    (
        "a link to itself",
        made(lambda f: (f / "l.png").symlink_to("l.png"), "DIR/l.png"),
        "DIR/l.png",
    ),
    ("a link to nothing", made(lambda f: (f / "l.png").symlink_to("x"), "DIR/l.png"), "DIR/l.png"),
    ("a folder named .png", made(lambda f: (f / "d.png").mkdir(), "DIR/d.png"), "there is no"),
    ("a folder in a folder", made(lambda f: (f / "d.png").mkdir(), "DIR"), {"images": 2}),
    ("text named .png", predict("DIR/t.png", t_png="text"), "DIR/t.png cannot be decoded"),
    ("text named .mp4", predict("DIR/t.mp4", t_mp4="text"), "video DIR/t.mp4 cannot be decoded"),
    ("an empty video", predict("DIR/t.mp4", t_mp4=""), "video DIR/t.mp4 cannot be decoded"),
    ("a playlist", predict("DIR/t.mp4", t_mp4=PLAYLIST), "video DIR/t.mp4 cannot be decoded"),
    ("a picture named .mp4", predict("DIR/t.mp4", t_mp4=picture()), "DIR/t.mp4 cannot be decoded"),
    ("json", predict("DIR/t.json", t_json="{}"), "DIR/t.json cannot be decoded"),
]
GROUPS = {"image": IMAGES, "--predict": PREDICT}
CASES = [
    Case(f"{group}: {title}", attempt, expected)
    for group, rows in GROUPS.items()
    for title, attempt, expected in rows
]
