"""Start-up on annotations at real size, against pycocotools: first start, later starts, workers.

The annotations are random, in the layout of Objects365 or, with masks, of COCO. The images are
empty files, and `load_datasets` looks for all of them, as in a training. Each step runs in a
process of its own, and imports are not counted. pycocotools takes 18 GB for the second:
--peer-share 0.1 measures it on a tenth of the images and boxes.

    python benchmarks/annotations.py --images 118000 --boxes 860000 --masks
    python benchmarks/annotations.py --images 1700000 --boxes 25000000

Both write to benchmarks/annotations-<device>.json.
"""

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
SEED, PATCHES, RUN, TOUCHED, DRAWN = 0, 50, 100_000, 20_000, 300_000
PLACES = {  # the annotations and the image folder under the data root; the images' names
    "coco": ("coco/annotations/instances_train2017.json", "coco/train2017", "{0:012d}.jpg"),
    "o365": (
        "objects365/annotations/zhiyuan_objv2_train.json",
        "objects365/train",
        "patch{1}/objects365_{0:08d}.jpg",
    ),
}


def generate(root: Path, name: str, images: int, boxes: int, masks: bool) -> Path:
    """Writes the json and the empty images below `root`. Annotations are unordered, as in COCO."""
    from common.labels import Vocabulary

    rng, vocabulary = np.random.default_rng(SEED), Vocabulary.known(name)
    path, folder = (root / place for place in PLACES[name][:2])
    for i in range(PATCHES):
        (folder / f"patch{i}").mkdir(parents=True, exist_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    polygons = [polygon(rng) for _ in range(1000)]
    classes = rng.permutation(len(vocabulary)) + 1.0
    with path.open("w") as file:
        file.write('{"info": {"description": "drawn at random"}, "images": [')
        for i in range(images):
            image = PLACES[name][2].format(i, i % PATCHES)
            entry = {"height": 480, "width": 640, "id": i, "file_name": image}
            file.write((", " if i else "") + json.dumps(entry))
            os.close(os.open(folder / image, os.O_CREAT))
        file.write('], "annotations": [')
        for first in range(0, boxes, RUN):
            n = min(RUN, boxes - first)
            of = rng.integers(images, size=n)
            label = rng.choice(vocabulary.ids, n, p=(1 / classes) / sum(1 / classes))
            corner = rng.uniform(0, 300, (n, 2)).round(2)
            size = rng.uniform(1, 180, (n, 2)).round(2)
            mask = rng.integers(len(polygons), size=n) if masks else np.zeros(n, int)
            rows = zip(of.tolist(), label.tolist(), corner.tolist(), size.tolist(), mask.tolist())
            entries = []
            for id, (image, k, (x, y), (w, h), m) in enumerate(rows, first):
                mask_of = f'"segmentation": {polygons[m]}, ' if masks else ""
                entries.append(
                    f'{{{mask_of}"area": {w * h / 2:.4f}, "iscrowd": 0, "image_id": {image}, '
                    f'"bbox": [{x}, {y}, {w}, {h}], "category_id": {k}, "id": {id}}}'
                )
            file.write((", " if first else "") + ", ".join(entries))
        names = [{"id": id, "name": name} for id, name in zip(vocabulary.ids, vocabulary.names)]
        file.write('], "categories": ' + json.dumps(names) + "}")
    return path


def polygon(rng: np.random.Generator) -> str:
    """About as long as COCO's."""
    return json.dumps([rng.uniform(0, 480, 2 * int(3 + rng.exponential(24))).round(2).tolist()])


def memory(field: str, file: str = "status") -> float:
    """Returns the peak MB of this process. ru_maxrss would begin with those of its parent."""
    lines = Path(f"/proc/self/{file}").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field + ":")).split()[1]) / 1024


def in_worker(touch) -> float:
    """MB that a forked process does not share any more after `touch()`."""
    os.sync()  # else the pages of files that were just written would count
    read, write = os.pipe()
    if not os.fork():
        touch()
        os.write(write, str(memory("Private_Dirty", "smaps_rollup")).encode())
        os._exit(0)
    os.wait()
    return float(os.read(read, 100))


def concord(root: Path, name: str) -> dict:
    from common.datasets import load_datasets
    from common.datasets.pixels import readable_formats
    from common.sampling import ClassAwareSampler, RepeatFactorSampler, repeat_factors

    logging.basicConfig()
    readable_formats()  # loads Pillow's plugins, which every training needs
    imports, start, busy = memory("VmRSS"), time.perf_counter(), time.process_time()
    (dataset,) = load_datasets(name, "train", str(root))
    dataset.summary()
    record = {"seconds": time.perf_counter() - start, "CPU seconds": time.process_time() - busy}
    record["peak, MB"] = memory("VmHWM") - imports
    record["resident, MB"] = memory("VmRSS") - imports
    rows = np.random.default_rng(SEED).integers(len(dataset), size=TOUCHED)

    def touch() -> float:
        return sum(dataset.index.boxes[dataset.index.rows(row)].sum() for row in rows)

    record["worker's own memory, MB"] = in_worker(touch)
    samplers = {
        "repeat factor": lambda: RepeatFactorSampler(repeat_factors([dataset], 0.001), SEED),
        "class aware": lambda: ClassAwareSampler([dataset], SEED),
    }
    for title, make in samplers.items():
        before, start = memory("RssAnon"), time.perf_counter()
        stream = iter(make())
        next(stream)
        first = time.perf_counter()
        sum(1 for _ in islice(stream, DRAWN))
        record[f"{title} sampler"] = {
            "seconds to the first": first - start,
            "images per second": DRAWN / (time.perf_counter() - first),
            "memory, MB": memory("RssAnon") - before,
        }
    return record


def pycocotools(root: Path, name: str) -> dict:
    from pycocotools.coco import COCO

    imports, start, busy = memory("VmRSS"), time.perf_counter(), time.process_time()
    coco = COCO(root / PLACES[name][0])
    record = {"seconds": time.perf_counter() - start, "CPU seconds": time.process_time() - busy}
    record["peak, MB"] = memory("VmHWM") - imports
    record["resident, MB"] = memory("VmRSS") - imports
    images = np.random.default_rng(SEED).integers(len(coco.imgs), size=TOUCHED).tolist()

    def touch() -> float:
        return sum(sum(entry["bbox"]) for image in images for entry in coco.imgToAnns[image])

    record["worker's own memory, MB"] = in_worker(touch)
    return record


def alone(step: str, root: Path, name: str) -> dict:
    """What `step` returns, from a process of its own."""
    command = [sys.executable, __file__, "--alone", step, str(root), name]
    environment = os.environ | {"CONCORD_CACHE": str(root / "cache")}
    output = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True, env=environment
    ).stdout
    return json.loads(output.splitlines()[-1], parse_float=lambda x: round(float(x), 2))


def main() -> None:
    if sys.argv[1:2] == ["--alone"]:
        step, root, name = sys.argv[2:]
        print(
            "\n"
            + json.dumps({"concord": concord, "pycocotools": pycocotools}[step](Path(root), name))
        )
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=118_000)
    parser.add_argument("--boxes", type=int, default=860_000)
    parser.add_argument("--masks", action="store_true", help="with polygons")
    parser.add_argument(
        "--peer-share", type=float, default=1, help="part of the data that pycocotools loads"
    )
    parser.add_argument(
        "--folder", help="where to generate; what is made there is removed at the end"
    )
    args = parser.parse_args()
    name = "coco" if args.masks else "o365"
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        root = Path(folder)
        size = generate(root / "whole", name, args.images, args.boxes, args.masks).stat().st_size
        time.sleep(3)  # a folder that was changed in the last two seconds is listed again
        record = {
            "json, MB": round(size / 2**20),
            "pycocotools has": f"{args.peer_share:.0%} of the images and boxes",
            "first start": alone("concord", root / "whole", name),
            "second start": alone("concord", root / "whole", name),
        }
        part = root / "whole"
        if args.peer_share < 1:
            part = root / "part"
            generate(
                part,
                name,
                *(round(n * args.peer_share) for n in (args.images, args.boxes)),
                args.masks,
            )
            record["first start on that part"] = alone("concord", part, name)
        record["pycocotools"] = alone("pycocotools", part, name)
    print(json.dumps(record, indent=1))
    from benchmarks.paired import cpu_name, record_path, write_json

    path = record_path("annotations", cpu_name())
    runs = json.loads(path.read_text()) if path.exists() else {}
    runs[f"{args.images} images, {args.boxes} boxes{' with masks' if args.masks else ''}"] = record
    write_json(path, runs)


if __name__ == "__main__":
    main()
