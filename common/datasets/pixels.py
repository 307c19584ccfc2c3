"""Turns what Pillow decodes into upright 8-bit RGB: deep, transparent and very large images too."""

from dataclasses import dataclass

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

try:
    import simplejpeg  # the extra `fast`
except ImportError:
    simplejpeg = None

# Pillow decodes these in this process, MPO as JPEG. For PostScript it would start a program.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "JPEG2000", "AVIF")
GREY = (128, 128, 128)  # close to the padding, which is 0 after normalisation
STRIP = 2**24  # pixels that are copied at once
SAMPLE_FORMAT = 339  # the TIFF tag of the kind of number
SIGNED = 2
TURNED = range(2, 9)  # EXIF tags of pixels that are not stored upright


@dataclass
class Decoded:
    """An image file as RGB.

    image:       (3, H, W) uint8, upright
    size:        (height, width) of the upright file; `image` is smaller if it was reduced
    bits:        depth of the values in the file by `to_8_bits`, 8 or more
    transparent: some pixels were transparent, wholly or partly; they are on GREY
    several:     the file has further frames or pages; `image` is the first
    """

    image: Tensor
    size: tuple[int, int]
    bits: int = 8
    transparent: bool = False
    several: bool = False

    @property
    def notes(self) -> tuple[str, str, str]:
        """What a user should know that it has: depth, transparency, frames; "" for nothing odd."""
        depth = f"{self.bits} bits a channel, seen as 8" if self.bits > 8 else ""
        background = f"transparent pixels, seen as grey {GREY}" if self.transparent else ""
        frames = "several frames or pages, of which the first is seen" if self.several else ""
        return depth, background, frames


def readable_formats() -> tuple[str, ...]:
    """Returns those of FORMATS that this Pillow can decode."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def halve_large(image: Image.Image) -> None:
    """Makes an opened JPEG of more than Image.MAX_IMAGE_PIXELS decode at half its size.

    It then needs a quarter of the memory. Other files and formats stay as they are.
    """
    limit = Image.MAX_IMAGE_PIXELS
    if limit and image.width * image.height > limit:
        half = (image.width // 2, image.height // 2)
        image.draft(image.mode, half)


def decode_jpeg(image: Image.Image) -> Decoded | None:
    """Decodes an opened JPEG by simplejpeg: the pixels of `to_rgb` in two thirds of the time.

    Returns None for a file that is left to Pillow: of another format, with four channels, turned by
    its EXIF tag, very large, or damaged in any way. All are, if simplejpeg is not installed.
    """
    limit = Image.MAX_IMAGE_PIXELS
    is_large = limit and image.width * image.height > limit
    is_plain = image.format == "JPEG" and image.mode in ("L", "RGB")
    if simplejpeg is None or is_large or not is_plain:
        return None
    if image.getexif().get(ExifTags.Base.Orientation) in TURNED:
        return None
    image.fp.seek(0)
    try:
        pixels = simplejpeg.decode_jpeg(image.fp.read(), strict=True)
    except ValueError:  # also for damage that Pillow says nothing of
        return None
    return Decoded(torch.from_numpy(pixels).permute(2, 0, 1), pixels.shape[:2])


def to_rgb(image: Image.Image) -> Decoded:
    """Converts an image to RGB. Turns it upright in place by its EXIF tag.

    Pixels of more than 8 bits are divided as `to_8_bits` says. Transparent pixels get the
    background GREY, so that a colour that nobody sees has no effect. Raises ValueError for
    floating-point pixels, whose range is unknown.
    """
    if image.mode == "F":
        raise ValueError("floating-point pixels; save it with 8 bits")
    several = has_frames(image)
    ImageOps.exif_transpose(image, in_place=True)
    bits = 8
    transparent = False
    if image.mode.startswith("I"):
        values, bits = to_8_bits(_integers(image))
        image = Image.fromarray(values)
    elif image.has_transparency_data:
        image, transparent = on_grey(image)
    if image.mode != "RGB":
        image = image.convert("RGB")
    pixels = _copied(image)
    return Decoded(pixels, (image.height, image.width), bits, transparent, several)


def has_frames(image: Image.Image) -> bool:
    """Returns whether a GIF, WebP, PNG or TIFF has more than the frame or page that is decoded."""
    try:
        return getattr(image, "is_animated", False)
    except (OSError, SyntaxError, ValueError):  # the second one is broken
        return True


def to_8_bits(values: np.ndarray) -> tuple[np.ndarray, int]:
    """Divides integers (H, W), so that the image's own depth fills 0..255. Also returns the depth.

    The depth is the smallest even number of bits, 8 or more, that holds the largest value. Cameras
    have 10, 12, 14 or 16 bits, and the brightest pixel of a picture that is not very dark is in the
    upper three quarters of their range. So 12 bits in a file of 16 are seen as they were taken, and
    0..255 in a file of 32 stay. Negative values become 0.
    """
    largest = int(values.max(initial=0))
    bits = max(8, largest.bit_length())
    bits += bits % 2
    values = values.clip(min=0)
    if bits <= 16:
        table = np.arange(2**bits) * 255 // (2**bits - 1)
        return table.astype(np.uint8)[values], bits
    values = values.astype(np.int64)
    return (values * 255 // (2**bits - 1)).astype(np.uint8), bits


def _integers(image: Image.Image) -> np.ndarray:
    """Returns the pixel values (H, W) of an image of integers.

    Pillow reads 32 bits of a TIFF as signed. Here they are unsigned, unless its tag says signed.
    """
    values = np.asarray(image)
    tags = getattr(image, "tag_v2", None)
    if tags and values.dtype == np.int32 and tags.get(SAMPLE_FORMAT, (1,))[0] != SIGNED:
        return values.view(np.uint32)
    return values


def on_grey(image: Image.Image) -> tuple[Image.Image, bool]:
    """Puts an image with transparency on GREY. Also returns whether a pixel is transparent."""
    image = image.convert("RGBA")
    least, _ = image.getchannel("A").getextrema()
    if least == 255:
        return image, False
    background = Image.new("RGBA", image.size, GREY)
    return Image.alpha_composite(background, image), True


def _copied(image: Image.Image) -> Tensor:
    """Copies an RGB image to a tensor (3, H, W), in strips: Pillow would need a second copy."""
    pixels = np.empty((image.height, image.width, 3), np.uint8)
    rows = max(1, STRIP // image.width)
    for top in range(0, image.height, rows):
        bottom = min(image.height, top + rows)
        strip = image.crop((0, top, image.width, bottom))
        pixels[top:bottom] = np.asarray(strip)
    return torch.from_numpy(pixels).permute(2, 0, 1)
