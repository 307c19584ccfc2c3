"""What --predict names: files, folders, patterns and videos, and what of it cannot be read."""

import importlib.util
import json
import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import common.predictions
from common.command import run_command
from common.errors import InputError, SomeFailed
from common.frames import read_file
from common.inference import predict_files
from common.inputs import find_files
from common.labels import LabelSpace, Vocabulary


def picture(path, size=(60, 40)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, "green").save(path)
    return str(path)


@pytest.fixture
def photos(tmp_path):
    """A folder with two images, a folder of another one, and what systems leave in folders."""
    folder = tmp_path / "photos"
    for name in ("b.JPG", "a.png", "deep/c.jpg"):
        picture(folder / name)
    for name in (".DS_Store", "Thumbs.db", "notes.txt", "._a.png"):
        (folder / name).write_bytes(b"no image")
    return folder


def found(*names):
    paths, problems = find_files([str(name) for name in names])
    assert not problems
    return paths


def test_a_folder_gives_its_images_and_counts_the_rest(photos, caplog):
    caplog.set_level("INFO")
    assert found(photos) == [str(photos / "a.png"), str(photos / "b.JPG")]
    (line,) = caplog.messages
    assert "2 images and videos" in line and "4 other files" in line and "1 folder" in line


def test_patterns_and_the_home_folder(photos, monkeypatch):
    assert found(photos / "*.png") == [str(photos / "a.png")]
    everywhere = [str(photos / name) for name in ("a.png", "b.JPG", "deep/c.jpg")]
    assert found(photos / "**" / "*") == everywhere
    monkeypatch.setenv("HOME", str(photos.parent))
    assert found("~/photos/a.png", "~/photos/*.JPG") == everywhere[:2]


def test_a_file_whose_name_looks_like_a_pattern(tmp_path):
    path = picture(tmp_path / "photo[1].jpg")
    assert found(path) == [path]


@pytest.mark.parametrize(
    "name, words",
    [
        ("missing.jpg", "missing.jpg does not exist"),
        ("*.bmp", "there is no image or video; it needs .jpg"),
        ("empty", "there is no image or video, but 1 other file; it needs .jpg"),
        ("https://example.com/a.jpg", "is an address; download"),
    ],
)
def test_names_of_nothing(tmp_path, monkeypatch, name, words):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "a.txt").touch()
    monkeypatch.chdir(tmp_path)
    paths, problems = find_files([name])
    assert paths == [] and len(problems) == 1
    assert words in next(iter(problems))


# -- the run over all files


VOCABULARY = Vocabulary("set", ["cat", "dog"], ids=[17, 18])


def detect(batch, label_space):
    """One detection an image: all of it is a dog."""
    height, width = batch.samples[0].original_size
    return [
        {
            "boxes": torch.tensor([[0.0, 0, width, height]]),
            "labels": torch.tensor([1]),
            "scores": torch.tensor([0.9]),
            "class_names": ["dog"],
            "size": (height, width),
        }
    ]


def predict(folder, *names, predict=detect):
    args = SimpleNamespace(predict=tuple(map(str, names)), score_threshold=0.5)
    predict_files(predict, args, LabelSpace([VOCABULARY]), lambda sample: sample, folder)


def record(folder):
    return json.loads((folder / "predictions.json").read_text())


def test_a_broken_file_does_not_stop_the_others(tmp_path, caplog):
    first, last = picture(tmp_path / "a.jpg"), picture(tmp_path / "c.jpg", (30, 20))
    (tmp_path / "b.jpg").write_bytes(b"xx")
    names = [first, tmp_path / "b.jpg", tmp_path / "gone.jpg", last]
    with pytest.raises(SomeFailed, match="2 of 4 files could not be predicted"):
        predict(tmp_path / "out", *names)
    errors = [r.getMessage() for r in caplog.records if r.levelno == logging.ERROR]
    assert len(errors) == 2 and "gone.jpg does not exist" in errors[0] and "b.jpg" in errors[1]
    written = record(tmp_path / "out")
    assert [image["file_name"] for image in written["images"]] == [first, last]
    assert [image["id"] for image in written["images"]] == [0, 1]
    assert [a["bbox"] for a in written["annotations"]] == [[0, 0, 60, 40], [0, 0, 30, 20]]
    assert [a["id"] for a in written["annotations"]] == [0, 1]
    assert (tmp_path / "out" / "c-1.jpg").is_file()


@pytest.mark.parametrize("letter", ["a", "猫"])
def test_a_name_of_250_letters_is_cut(tmp_path, letter):
    """A file system takes 255 bytes. The others go on."""
    long = letter * (250 // len(letter.encode())) + ".jpg"
    first, last = picture(tmp_path / long), picture(tmp_path / "c.jpg")
    predict(tmp_path / "out", first, last)
    names = sorted(path.name for path in (tmp_path / "out").glob("*.jpg"))
    assert names == sorted([letter * (200 // len(letter.encode())) + "-0.jpg", "c-1.jpg"])
    assert record(tmp_path / "out")["images"][0]["file_name"] == first


def test_a_single_broken_file_is_the_error(tmp_path):
    (tmp_path / "b.jpg").write_bytes(b"xx")
    for name in ("b.jpg", "gone.jpg"):
        with pytest.raises(InputError, match=name):
            predict(tmp_path / "out", tmp_path / name)


def test_the_exit_code_is_one(capsys):
    def main():
        raise SomeFailed("1 of 2 files could not be predicted")

    with pytest.raises(SystemExit) as exit:
        run_command(main)
    assert exit.value.code == 1
    assert capsys.readouterr().err == "error: 1 of 2 files could not be predicted\n"


def test_an_image_beyond_the_memory_is_named(tmp_path, caplog):
    names = [picture(tmp_path / name) for name in ("a.jpg", "b.jpg")]

    def run_out(batch, label_space):
        if batch.samples[0].image_id.endswith("a.jpg"):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return detect(batch, label_space)

    with pytest.raises(SomeFailed, match="1 of 2"):
        predict(tmp_path / "out", *names, predict=run_out)
    assert "a.jpg does not fit into memory" in caplog.text
    assert len(record(tmp_path / "out")["images"]) == 1


def test_an_interrupt_keeps_what_is_predicted(tmp_path):
    names = [picture(tmp_path / name) for name in ("a.jpg", "b.jpg")]

    def interrupted(batch, label_space):
        if batch.samples[0].image_id.endswith("b.jpg"):
            raise KeyboardInterrupt
        return detect(batch, label_space)

    with pytest.raises(KeyboardInterrupt):
        predict(tmp_path / "out", *names, predict=interrupted)
    assert len(record(tmp_path / "out")["images"]) == 1


def test_odd_pixels_are_counted(tmp_path, caplog):
    caplog.set_level("INFO")
    for name in ("a.png", "b.png"):
        Image.fromarray(np.full((4, 5), 4000, np.uint16)).save(tmp_path / name)
    predict(tmp_path / "out", tmp_path)
    assert "2 of 2 images: 12 bits a channel" in caplog.text


# -- large images


def test_a_large_image_is_drawn_smaller(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    picture(tmp_path / "a.png", (1200, 900))
    predict(tmp_path / "whole", tmp_path / "a.png")
    monkeypatch.setattr(common.predictions, "DRAWN", 300_000)
    predict(tmp_path / "half", tmp_path / "a.png")
    assert Image.open(tmp_path / "whole" / "a-0.jpg").size == (1200, 900)
    assert Image.open(tmp_path / "half" / "a-0.jpg").size == (600, 450)
    assert "at 1/2 of its size" in caplog.text
    whole, half = record(tmp_path / "whole"), record(tmp_path / "half")
    assert whole["annotations"] == half["annotations"] and whole["images"] == half["images"]


def test_a_reduced_jpeg_is_predicted_at_its_own_size(tmp_path, monkeypatch):
    path = picture(tmp_path / "a.jpg", (160, 120))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    seen = []

    def spy(batch, label_space):
        seen.append(batch.sizes[0])
        return detect(batch, label_space)

    predict(tmp_path / "out", path, predict=spy)
    assert seen == [(60, 80)]
    written = record(tmp_path / "out")
    assert (written["images"][0]["height"], written["images"][0]["width"]) == (120, 160)
    assert written["annotations"][0]["bbox"] == [0, 0, 160, 120]


# -- videos


@pytest.fixture
def av():
    return pytest.importorskip("av")


def write_video(av, path, frames, codec="mpeg4"):
    """Writes frames (H, W, 3) uint8."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        for pixels in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())


def levels(count, height=48, width=64):
    """Frames of rising brightness; the upper left quarter is red."""
    frames = []
    for i in range(count):
        pixels = np.full((height, width, 3), 40 * i, np.uint8)
        pixels[: height // 2, : width // 2] = (250, 0, 0)
        frames.append(pixels)
    return frames


@pytest.mark.parametrize("ending, codec", [("mp4", "mpeg4"), ("avi", "mpeg4"), ("webm", "vp8")])
def test_frames_of_a_video(tmp_path, av, ending, codec):
    if codec == "vp8":
        codec = "libvpx"
    write_video(av, tmp_path / f"a.{ending}", levels(5), codec)
    frames = list(read_file(str(tmp_path / f"a.{ending}")))
    assert [number for number, _ in frames] == [0, 1, 2, 3, 4]
    for number, decoded in frames:
        assert decoded.size == (48, 64) and decoded.image.dtype == torch.uint8
        lower = decoded.image[:, 30:, 40:].float().mean()
        assert abs(lower - 40 * number) < 12


def test_a_video_is_predicted_frame_by_frame(tmp_path, av):
    write_video(av, tmp_path / "clip.mp4", levels(3))
    image = picture(tmp_path / "z.jpg")
    predict(tmp_path / "out", tmp_path / "clip.mp4", image)
    written = record(tmp_path / "out")
    assert [i.get("frame") for i in written["images"]] == [0, 1, 2, None]
    assert written["images"][1]["file_name"] == str(tmp_path / "clip.mp4")
    assert len(written["annotations"]) == 4
    assert (tmp_path / "out" / "clip-frame000002-2.jpg").is_file()


def test_a_turned_video_is_upright(tmp_path, av):
    """A phone writes the frames as they are, and how to turn them in the track's header."""
    path = tmp_path / "a.mp4"
    write_video(av, path, levels(2))
    data = bytearray(path.read_bytes())
    matrix = data.index(b"tkhd") + 4 + 40  # of 16.16 numbers; the last column has 2.30
    clockwise = np.array([0, 1 << 16, 0, -(1 << 16), 0, 0, 48 << 16, 0, 1 << 30], ">i4")
    data[matrix : matrix + 36] = clockwise.tobytes()
    path.write_bytes(data)
    _, decoded = next(read_file(str(path)))
    assert decoded.size == (64, 48)
    red = decoded.image[0].float() - decoded.image[1].float() > 120
    assert red[4:28, 28:44].all() and not red[:, :20].any()  # the upper right quarter


def test_a_cut_video_keeps_the_frames_before(tmp_path, av, caplog):
    noise = np.random.default_rng(0)
    frames = [noise.integers(0, 256, (48, 64, 3), np.uint8) for _ in range(8)]
    write_video(av, tmp_path / "a.avi", frames)
    data = (tmp_path / "a.avi").read_bytes()
    (tmp_path / "a.avi").write_bytes(data[: len(data) // 2])
    (tmp_path / "b.mp4").write_bytes(b"no video")
    with pytest.raises(SomeFailed, match="1 of 2"):
        predict(tmp_path / "out", tmp_path / "a.avi", tmp_path / "b.mp4")
    assert "b.mp4 cannot be decoded after 0 frames" in caplog.text
    assert 0 < len(record(tmp_path / "out")["images"]) < 8


def test_a_playlist_named_as_a_video_opens_nothing(tmp_path, av):
    write_video(av, tmp_path / "secret.mp4", levels(2))
    path = tmp_path / "a.mp4"
    path.write_text(f"#EXTM3U\n#EXTINF:1,\nfile://{tmp_path}/secret.mp4\n#EXT-X-ENDLIST\n")
    with pytest.raises(InputError, match=r"a\.mp4 cannot be decoded"):
        list(read_file(str(path)))


def test_without_the_package_one_line_says_what_to_install(tmp_path, monkeypatch, caplog):
    for name in ("a.mp4", "b.mov"):
        (tmp_path / name).touch()
    image = picture(tmp_path / "c.jpg")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SomeFailed, match="2 of 3"):
        predict(tmp_path / "out", tmp_path)
    lines = [line for line in caplog.messages if "pip install av" in line]
    assert len(lines) == 1 and "a.mp4 and 1 more need PyAV" in lines[0]
    assert record(tmp_path / "out")["images"][0]["file_name"] == image
