"""Two datasets that label different objects: what may be a negative of the other classes?

The images and the classes of the generated coco are parted in two. Each half of the images keeps
the boxes of its half of the classes, so it shows objects that only the other half labels.
"""

import json
import os
import shlex
from pathlib import Path

from benchmarks.claims.across import FLAGS
from benchmarks.claims.study import Effect, Study, ap50
from common.datasets.tiny.generate import generate
from common.files import atomic_path

NAMES = ("even", "odd")
LIMIT = None  # images that are generated; None: all


def make_halves(work: Path) -> dict[str, str]:
    """Writes both datasets below `work`. Returns the flag that names them, as {"halves": flag}."""
    root = generate("coco", work / "data", workers=os.cpu_count(), limit=LIMIT)
    source = json.loads((root / "coco/annotations/instances_train2017.json").read_text())
    parts = []
    for half, name in enumerate(NAMES):
        categories = source["categories"][half::2]
        images = source["images"][half::2]
        ids = {row["id"] for row in categories}
        shown = {row["id"] for row in images}
        annotations = [
            row
            for row in source["annotations"]
            if row["image_id"] in shown and row["category_id"] in ids
        ]
        file = root / f"{name}.json"
        with atomic_path(file) as path:
            rows = {"images": images, "annotations": annotations, "categories": categories}
            path.write_text(json.dumps(rows))
        parts.append(f"{name}={file}:{root / 'coco/train2017'}")
    return {"halves": f"--datasets {shlex.quote(','.join(parts))}"}


ON = "{halves} --eval-datasets coco --batch-size 8 --base-batch-size 8"
AP50 = "AP50 of all classes"
HALVES = Study(
    "halves",
    "Two datasets label different halves of the classes. What may be a negative?",
    {
        "all_boxes": (
            "`scaledet.py`, one dataset with all boxes",
            "scaledet.py --datasets coco --steps 600",
        ),
        "scaledet": (
            "`scaledet.py`, negatives of both datasets",
            f"scaledet.py {ON} {FLAGS['scaledet']}",
        ),
        "own": (
            "`scaledet.py`, own negatives",
            f"scaledet.py {ON} {FLAGS['scaledet']} --neg-scope own",
        ),
        "unified": (
            "`unidetector.py`, negatives of both datasets",
            f"unidetector.py {ON} {FLAGS['unidetector']} --structure unified",
        ),
        "unidetector": (
            "`unidetector.py`, own negatives",
            f"unidetector.py {ON} {FLAGS['unidetector']}",
        ),
    },
    {AP50: ap50("coco")},
    (
        Effect("own", "scaledet", AP50, "own negatives help `scaledet.py`", ours=True),
        Effect("unidetector", "unified", AP50, "own negatives help `unidetector.py`"),
        Effect("all_boxes", "own", AP50, "all boxes beat half of them", ours=True),
    ),
    note="`even` has every second class and every second image of the generated `coco`, `odd` has "
    "the rest. An image shows objects of both, and has the boxes of its own classes. The models "
    "are tested with all boxes of all classes, by name, after 600 steps of 8 images, 300 for each "
    "stage of UniDetector. This is a mild case: of the images that show a class about half have "
    "its boxes, and all images have one style. Images without a box of their half are left out. "
    "With negatives of both datasets, half of a class's objects are negatives. This probably "
    "lowers its scores, and AP sees their order alone. With own negatives, the boxes of one half "
    "are no negatives for the classes of the other, though true ones. By hand, we looked at one "
    "trained `scaledet.py` of each kind, at boxes with a score of .3 or more. With own negatives, "
    "more objects have a box of their class, but several times as many boxes give an object a "
    "class of the other half. Every variant with halves trains its proposals with unlabelled "
    "objects as background; `scaledet.py` leaves out those that score .85 or more. "
    "`category_extended.py` is made for harder cases, and has [a study of its "
    "own](category_extended.md).",
    make=make_halves,
)
