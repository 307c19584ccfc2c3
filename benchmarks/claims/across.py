"""All detectors, and all segmenters, on the same datasets with the same steps."""

from benchmarks.claims.study import Study, ap50

FLAGS = {
    "scaledet": "--steps 600",
    "detic": "--steps 600",
    "unidetector": "--steps 300 --classifier-steps 300 --gamma 0",
    "unidet": "--steps 600 --stage partitioned",
    "category_extended": "--steps 600 --stage first",
    "groupsoftmax": "--steps 600",
    "domain_attention": "--steps 600",
    "plaindet": "--steps 600",
    "omdet": "--steps 600",
    "metr": "--steps 600",
}
SAME = "--datasets coco,o365 --batch-size 8 --base-batch-size 8"
ACROSS_DETECTORS = Study(
    "detectors",
    "What does each detector reach on the same two datasets in 600 steps of 8 images?",
    {name: (f"`{name}.py`", f"{name}.py {flags} {SAME}") for name, flags in FLAGS.items()},
    {"coco AP50": ap50("coco"), "o365 AP50": ap50("o365"), "mean AP50": ap50("coco", "o365")},
    (),
    note="This is no ranking of the methods. Learning rates and frozen parts are those of each "
    "demonstration: `category_extended.py`, `plaindet.py`, `omdet.py` and `metr.py` have a frozen "
    "backbone, and DETRs need longer trainings than these. `unidet.py` and `category_extended.py` "
    "run their first stage alone; the steps of `unidetector.py` are those of both its stages, each "
    "of a network of its own. Learning rates for batches of 4 are not raised for these of 8.",
    costs=True,
)

SEGMENTED = "--datasets coco-panoptic,ade20k-panoptic --steps 1200 --batch-size 4"
SEGMENTED += " --base-batch-size 4"
ACROSS_SEGMENTERS = Study(
    "segmenters",
    "What does each segmenter reach on the same two datasets in 1200 steps of 4 images?",
    {
        name: (f"`{name}.py`", f"{name}.py {SEGMENTED}")
        for name in ("lmseg", "dataseg", "oneformer")
    },
    {
        "coco PQ": (("coco-panoptic", "PQ"),),
        "coco mIoU": (("coco-panoptic", "mIoU"),),
        "ade20k PQ": (("ade20k-panoptic", "PQ"),),
        "ade20k mIoU": (("ade20k-panoptic", "mIoU"),),
    },
    (),
    note="The settings are those of each demonstration, with a frozen backbone. `lmseg.py` has "
    "crops of 130 pixels of `ade20k-panoptic` and images of 162 of `coco-panoptic`, the others "
    "have 160.",
    costs=True,
)

ACROSS = (ACROSS_DETECTORS, ACROSS_SEGMENTERS)
