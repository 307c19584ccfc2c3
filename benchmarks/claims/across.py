"""All detectors, and all segmenters, on the same datasets with the same steps."""

from benchmarks.claims.study import Study

DETECTORS = {
    "scaledet": "",
    "detic": "",
    "unidetector": "--steps 300 --classifier-steps 300",
    "unidet": "--stage partitioned",
    "category_extended": "--stage first",
    "groupsoftmax": "",
    "domain_attention": "",
    "plaindet": "",
    "omdet": "",
    "metr": "",
}
SAME = "--datasets coco,o365 --steps 600 --batch-size 8 --base-batch-size 8"
ACROSS_DETECTORS = Study(
    "detectors",
    "What does each detector gain from the same two datasets in 600 steps of 8 images?",
    {key: (key, f"{key}.py {SAME} {flags}".strip()) for key, flags in DETECTORS.items()},
    {"coco AP50": ("coco", "AP50"), "o365 AP50": ("o365", "AP50")},
    (),
    costs=True,
)

MAPS = "--datasets coco-panoptic,ade20k-panoptic --steps 1200 --batch-size 4 --base-batch-size 4"
ACROSS_SEGMENTERS = Study(
    "segmenters",
    "What does each segmenter gain from the same two datasets in 1200 steps of 4 images?",
    {key: (key, f"{key}.py {MAPS}") for key in ("lmseg", "dataseg", "oneformer")},
    {
        "coco PQ": ("coco-panoptic", "PQ"),
        "coco mIoU": ("coco-panoptic", "mIoU"),
        "ade20k PQ": ("ade20k-panoptic", "PQ"),
        "ade20k mIoU": ("ade20k-panoptic", "mIoU"),
    },
    (),
    costs=True,
)

ACROSS = (ACROSS_DETECTORS, ACROSS_SEGMENTERS)
