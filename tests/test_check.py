"""python -m common.datasets: what is there is listed, and everything wrong with it is counted."""

import io
import json
import re
import sys
import tarfile
from collections import Counter

import numpy as np
import pytest
from conftest import REAL
from PIL import Image

from common.command import run_command
from common.datasets import __main__ as tool
from common.datasets import names
from common.datasets.files import read_image, read_size
from common.datasets.known import KNOWN


@pytest.fixture
def tell(monkeypatch, capsys):
    """tell(*args) -> exit code, Counter of kinds of problems, stdout, stderr."""

    def start(*args) -> tuple[int, Counter, str, str]:
        monkeypatch.setattr(sys, "argv", ["datasets", *map(str, args)])
        code = 0
        try:
            run_command(tool.main)
        except SystemExit as exit:
            code = exit.code
        out, err = capsys.readouterr()
        counts = re.findall(r"^  (\S.*\S) +(\d+)$", out, re.MULTILINE)
        return code, Counter({kind: int(count) for kind, count in counts}), out, err

    return start


def picture(path, width=8, height=6, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path, **options)


def coco(root, files, boxes=()):
    """A COCO json of files of 8 x 6 pixels; boxes are (row of the file, x, y, w, h)."""
    record = {
        "images": [
            {"id": i, "file_name": file, "width": 8, "height": 6} for i, file in enumerate(files)
        ],
        "categories": [{"id": 1, "name": "person"}, {"id": 2, "name": "bicycle"}],
        "annotations": [
            {"id": k, "image_id": i, "category_id": 1, "bbox": bbox}
            for k, (i, *bbox) in enumerate(boxes)
        ],
    }
    (root / "a.json").write_text(json.dumps(record))
    return f"my={root}/a.json:{root}"


def test_a_clean_dataset(tmp_path, tell):
    picture(tmp_path / "a.png")
    picture(tmp_path / "turned.jpg", 6, 8, exif=orientation(6))
    boxes = [
        (0, 0, 0, 8, 6),
        (0, 1, 1, 2, 2),
        (1, 0, 0, 8.9, 6),
    ]  # what is less than a pixel is rounding
    for flags in ([], ["--quick"]):
        code, counts, out, err = tell(
            "check", coco(tmp_path, ["a.png", "turned.jpg"], boxes), *flags
        )
        assert code == 0 and not counts and not err
        assert re.search(r"none of 1\d kinds of problems", out)
        assert "2 images (0 without a box), 3 boxes" in out and "2 classes (1 with boxes)" in out


def orientation(value: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = value
    return exif.tobytes()


@pytest.mark.parametrize("value", range(1, 9))
def test_the_size_in_the_header_is_that_of_the_decoded_image(tmp_path, value):
    picture(tmp_path / "a.jpg", exif=orientation(value))
    assert read_size(tmp_path / "a.jpg") == tuple(read_image(tmp_path / "a.jpg").shape[-2:])


def test_everything_wrong_is_counted(tmp_path, tell):
    picture(tmp_path / "a.png")
    picture(tmp_path / "wide.png", 16)
    picture(tmp_path / "cut.png", 90, 90)
    data = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(data[: len(data) // 2])
    (tmp_path / "text.png").write_text("no image")
    files = [
        "a.png",
        "wide.png",
        "cut.png",
        "text.png",
        "gone1.png",
        "gone2.png",
        "gone3.png",
        "gone4.png",
        "a.png",
    ]
    outside = [
        (0, -3, 0, 5, 6),
        (1, 7, 0, 9, 6),
        (1, 7, 0, 12, 6),
        (0, 8, 0, 3, 3),
        (5, -9, 0, 3, 3),
    ]
    boxes = [
        *outside,
        (0, 1, 1, 0, 4),
        (0, 1, 1, 2, 2),
        (0, 1, 1, 2, 2),
        (0, 1, 1, 2, 2),
        (1, 1, 1, 2, 2),
    ]
    code, counts, out, _ = tell("check", coco(tmp_path, files, boxes))
    assert code == 1 and counts == {
        "images listed twice": 1,
        "missing images": 4,
        "broken images, masks or label maps": 2,
        "images of another size than annotated": 1,
        "boxes partly outside their image": 2,  # the second of wide.png ends where its 16 pixels do
        "boxes wholly outside their image": 2,
        "boxes without an area": 1,
        "boxes given twice": 2,
    }
    assert (
        "      gone1.png\n      gone2.png\n      gone3.png\n      ...\n" in out
        and "gone4" not in out
    )
    assert (
        "wide.png: 6 x 16 (height, width), not 6 x 8" in out and "text.png cannot be decoded" in out
    )
    code, counts, *_ = tell("check", coco(tmp_path, files, boxes), "--quick")
    assert (
        code == 1
        and counts["broken images, masks or label maps"] == 1
        and counts["missing images"] == 4
    )
    assert counts["images of another size than annotated"] == 2  # the header of cut.png is whole


def test_more_images_than_one_process_takes(tmp_path, tell):
    files = [f"{i}.png" for i in range(150)]
    for file in files:
        picture(tmp_path / file)
    (tmp_path / "77.png").write_text("")
    picture(tmp_path / "149.png", 3)
    code, counts, out, _ = tell("check", coco(tmp_path, files, [(149, 0, 0, 8, 6)]))
    assert code == 1 and {kind: count for kind, count in counts.items() if count} == {
        "broken images, masks or label maps": 1,
        "images of another size than annotated": 1,
        "boxes partly outside their image": 1,
    }
    assert "77.png cannot be decoded" in out and "149.png: 6 x 3" in out


def test_masks_are_decoded(tmp_path, tell):
    picture(tmp_path / "a.png")
    text = coco(tmp_path, ["a.png"], [(0, 0, 0, 2, 2)])
    record = json.loads((tmp_path / "a.json").read_text())
    record["annotations"][0]["segmentation"] = {"size": [9, 9], "counts": [81]}
    (tmp_path / "a.json").write_text(json.dumps(record))
    code, counts, out, _ = tell("check", text)
    assert (
        code == 1
        and counts["broken images, masks or label maps"] == 1
        and "an RLE of size [9, 9]" in out
    )
    assert tell("check", text, "--quick")[0] == 0


def test_label_maps(tmp_path, tell):
    for i, value in enumerate((0, 1, 7)):
        picture(tmp_path / f"images/{i}.png")
        (tmp_path / "maps").mkdir(exist_ok=True)
        Image.fromarray(np.full((6, 8), value, np.uint8)).save(tmp_path / f"maps/{i}.png")
    (tmp_path / "maps/classes.txt").write_text("sky\nroad\ncar\n")
    code, counts, out, _ = tell("check", f"my={tmp_path}/maps:{tmp_path}/images")
    assert (
        code == 1
        and counts["broken images, masks or label maps"] == 1
        and counts["missing label maps"] == 0
    )
    assert (
        "maps/2.png has the value 7" in out
        and "2 classes occur" in out
        and "boxes" not in "".join(counts)
    )


def test_tar_files(tmp_path, tell):
    (tmp_path / "x").mkdir()
    picture(tmp_path / "a.png")
    with tarfile.open(tmp_path / "x/cat.tar", "w") as tar:
        tar.add(tmp_path / "a.png", "1.png")
        info = tarfile.TarInfo("2.png")
        info.size = 3
        tar.addfile(info, io.BytesIO(b"abc"))
    for flags in ([], ["--quick"]):
        code, counts, out, _ = tell("check", f"my={tmp_path}/x/", *flags)
        assert code == 1 and {k for k, n in counts.items() if n} == {
            "broken images, masks or label maps"
        }
        assert "cat.tar/2.png cannot be decoded" in out


def test_all_splits_are_checked_and_one_that_is_not_there_is_told(tmp_path, tell):
    (tmp_path / "coco/annotations").mkdir(parents=True)
    picture(tmp_path / "coco/val2017/a.png")
    coco(tmp_path, ["a.png"])
    (tmp_path / "a.json").rename(tmp_path / "coco/annotations/instances_val2017.json")
    code, counts, out, err = tell("check", "coco,in21k", "--data-root", tmp_path)
    assert code == 2 and not any(counts.values()) and out.count("1 images (1 without a box)") == 1
    train, imagenet = err.splitlines()
    assert (
        f"{tmp_path}/coco/annotations/instances_train2017.json does not exist; put COCO 2017"
        in train
    )
    assert (
        f"cocodataset.org) there, its images in {tmp_path}/coco/train2017, as data/README.md shows"
        in train
    )
    assert "imagenet/ImageNet-21K does not exist; put ImageNet-21K (image-net.org)" in imagenet
    assert tell("check", "coco:val", "--data-root", tmp_path)[0] == 0


@pytest.mark.parametrize(
    "args, words",
    [
        (["cocoo"], "unknown dataset 'cocoo'; nearest: coco"),
        (["coco:test"], "has no split 'test'"),
        ([","], "no dataset named"),
        (["my=a.json:b/"], "annotations a.json do not exist"),
        (["lineart"], "add --tiny"),
        (["odinw13:val", "--data-root", "/"], "dataset 'odinw-pistols': /odinw/"),
        (["coco", "--data-root", "/nowhere"], "data root /nowhere does not exist"),
    ],
)
def test_bad_names(tell, args, words):
    code, _, out, err = tell("check", *args)
    assert (
        code == 2
        and words in err
        and all(line.startswith("error: ") for line in err.splitlines())
        and not out
    )


def test_the_readers_line_about_an_unknown_category(tmp_path, tell):
    picture(tmp_path / "a.png")
    text = coco(tmp_path, ["a.png"], [(0, 0, 0, 2, 2)])
    (tmp_path / "a.json").write_text(
        (tmp_path / "a.json").read_text().replace('"category_id": 1', '"category_id": 5')
    )
    code, _, _, err = tell("check", text)
    assert code == 2 and "has the unknown category_id 5" in err


def test_generated_data_is_clean(tell, tiny_root):
    code, counts, *_ = tell(
        "check", "coco,oid:val,ade20k:val,coco-panoptic:val,in21k", "--data-root", tiny_root
    )
    assert code == 0 and not any(counts.values())


def test_generated_stand_ins(tell, tiny_root, monkeypatch):
    monkeypatch.setattr(
        names, "generate", lambda name, cache, size: tiny_root if size == 192 else None
    )
    code, counts, out, _ = tell("check", "lineart", "--tiny", "--quick")
    assert code == 0 and not any(counts.values()) and "4 images" in out


def test_the_list_has_a_line_for_each_split(tmp_path, tell):
    (tmp_path / "coco/annotations").mkdir(parents=True)
    (tmp_path / "coco/annotations/instances_val2017.json").write_text("")
    code, _, out, _ = tell("list", "--data-root", tmp_path)
    rows = [line.split() for line in out.splitlines()]
    assert code == 0 and [row[:2] for row in rows] == [
        [n, split] for n, k in KNOWN.items() for split in k.splits
    ]
    (train,), (val,) = (
        [row for row in rows if row[:2] == ["coco", split]] for split in ("train", "val")
    )
    assert train[2:5] == ["80", "classes", "missing"] and "(cocodataset.org)" in out
    assert val[2:] == ["80", "classes", f"{tmp_path}/coco/annotations/instances_val2017.json"]
    assert (
        len({line.index(" classes ") for line in out.splitlines() if " classes " in line}) == 1
    )  # aligned


@pytest.mark.skipif(not REAL.is_dir(), reason=f"no real samples at {REAL}")
def test_real_samples_are_clean(tell):
    code, counts, out, _ = tell("check", "coco,coco-panoptic:val,oid:train", "--data-root", REAL)
    assert (
        code == 0
        and not any(counts.values())
        and "96 images" in out
        and "32 images, 327 segments" in out
    )


def test_what_a_training_would_refuse_or_warn_of_is_counted(tmp_path, tell):
    picture(tmp_path / "A.png")
    picture(tmp_path / "turned.jpg", exif=orientation(6))
    picture(tmp_path / "b.png")
    corners = [(0, 4, 3, 8, 6), (1, 4, 3, 8, 6), (2, 5, 2, 8, 5)]
    text = coco(tmp_path, ["a.png", "turned.jpg", "b.png"], corners)
    record = json.loads((tmp_path / "a.json").read_text())
    record["annotations"][0]["segmentation"] = [[1, 1, 5, 1, 5, 4]]
    record["categories"][1]["name"] = "Person"
    for annotation in record["annotations"]:
        annotation["iscrowd"] = 1
    (tmp_path / "a.json").write_text(json.dumps(record))
    for flags in ([], ["--quick"]):
        code, counts, out, err = tell("check", text, *flags)
        assert (
            code == 1
            and not err
            and {kind: n for kind, n in counts.items() if n}
            == {
                "class names alike but for case or spaces": 1,
                "images whose name is spelt otherwise": 1,
                "images annotated before their EXIF turn": 1,
                "boxes partly outside their image": 3,
                "doubts about the boxes": 1,
                "nothing to train on": 1,
            }
            | ({"boxes without a mask beside others": 2} if flags else {})
        )
    assert "      a.png: A.png\n" in out and "      turned.jpg\n" in out
    assert "would fit as x1, y1, x2, y2" in out and "3 crowd, group or difficult" in out


def test_boxes_without_a_mask_are_counted(tmp_path, tell):
    picture(tmp_path / "a.png")
    text = coco(tmp_path, ["a.png"], [(0, 0, 0, 4, 4), (0, 0, 0, 3, 3), (0, 1, 1, 3, 3)])
    record = json.loads((tmp_path / "a.json").read_text())
    record["annotations"][0]["segmentation"] = [[1, 1, 5, 1, 5, 4]]
    record["annotations"][1]["segmentation"] = {"size": [6, 8], "counts": [48]}  # no pixel
    (tmp_path / "a.json").write_text(json.dumps(record))
    code, counts, *_ = tell("check", text)
    assert code == 1 and counts["boxes without a mask beside others"] == 2


def test_doubts_about_label_maps(tmp_path, tell):
    (tmp_path / "maps").mkdir()
    for i, value in enumerate((255, 0)):
        picture(tmp_path / f"images/{i}.png")
        Image.fromarray(np.full((6, 8), value, np.uint8)).save(tmp_path / f"maps/{i}.png")
    (tmp_path / "maps/classes.txt").write_text("sky\nroad\n")
    code, counts, out, _ = tell("check", f"my={tmp_path}/maps:{tmp_path}/images")
    assert code == 1 and counts["label maps of void alone"] == 1
    assert counts["doubts about the label maps"] == 2 and "0 and 255 alone" in out


def test_all_faulty_entries_are_counted(tmp_path, tell):
    picture(tmp_path / "a.png")
    text = coco(tmp_path, ["a.png"] * 2, [(0, 0, 0, 2, 2)] * 4)
    record = json.loads((tmp_path / "a.json").read_text())
    record["images"][1]["width"] = None
    boxes = record["annotations"]
    boxes[0]["bbox"] = None
    boxes[1]["image_id"] = 9
    boxes[2]["bbox"][2] = -2
    boxes[3]["image_id"] = 1  # it is listed, though its width is wrong
    (tmp_path / "a.json").write_text(json.dumps(record))
    code, counts, out, err = tell("check", text)
    assert code == 2 and counts == {"faulty entries": 4} and "image 1 has the width None" in err
    assert "annotation 0 has the bbox None" in out and "      ...\n" in out
