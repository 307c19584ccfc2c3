"""Reads the images and videos that --predict names."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.datasets.files import decode_image
from common.datasets.pixels import Decoded
from common.errors import InputError
from common.files import refuse_pipe
from common.inputs import is_video

CONTAINERS = "mov,mp4,avi,matroska,webm"  # FFmpeg's names of what it may take a video for
MAX_PIXELS = 2**27  # of a frame, 134 megapixels


def read_file(path: str) -> Iterator[tuple[int | None, Decoded]]:
    """Yields (None, the image) of an image file, or (number, frame) of all frames of a video.

    Frames count from 0. Raises InputError for a file that cannot be read, also after some frames.
    """
    if is_video(path):
        yield from video_frames(path)
    else:
        yield None, decode_image(Path(path), reduce=True)


def video_frames(path: str) -> Iterator[tuple[int, Decoded]]:
    """Yields (number, frame) of a video, upright. Needs PyAV.

    FFmpeg gets an open file, and may take it for CONTAINERS alone: a playlist that is named .mp4
    would make it open other files and addresses. Raises InputError for a file that cannot be read.
    """
    import av

    refuse_pipe(Path(path), "video")
    number = -1
    limits = {"format_whitelist": CONTAINERS}
    try:
        with open(path, "rb") as file, av.open(file, container_options=limits) as container:
            if not container.streams.video:
                raise InputError(f"video {path} has sound alone; give one with pictures")
            stream = container.streams.video[0]
            stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}
            for number, frame in enumerate(container.decode(stream)):
                yield number, _upright(frame)
    except (av.FFmpegError, OSError, ValueError) as error:
        raise InputError(
            f"video {path} cannot be decoded after {number + 1} frames ({error}); replace it"
        ) from None
    if number < 0:
        raise InputError(f"video {path} has no frame that can be decoded; replace it")


def _upright(frame: Any) -> Decoded:
    """Converts a frame of PyAV, turned as its video says."""
    pixels = frame.to_ndarray(format="rgb24")
    quarters = round(frame.rotation / 90)
    pixels = np.rot90(pixels, quarters)  # counterclockwise, as the rotation
    image = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
    return Decoded(image, tuple(image.shape[-2:]))
