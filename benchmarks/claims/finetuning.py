"""A detector of two datasets learns the classes of a third one: what it gains, what it forgets."""

from benchmarks.claims.study import Effect, Study, ap50

EVALUATED = "--eval-datasets oid,coco,o365,lineart"
NEW = f"scaledet.py {EVALUATED} --steps 300 --lr 5e-4"
FROM = "--weights {before}"
REPLAY = "--datasets oid,coco@100,o365@100 --dataset-ratios oid=2,coco=1,o365=1"
OLD = "mean AP50 of coco and o365"

FINETUNING = Study(
    "finetuning",
    "scaledet.py is trained on coco and o365, and then learns oid. What does it gain and forget?",
    {
        "before": ("first, coco and o365", f"scaledet.py {EVALUATED} --datasets coco,o365"),
        "scratch": ("oid alone, not from these weights", f"{NEW} --datasets oid"),
        "alone": ("oid alone", f"{NEW} {FROM} --datasets oid"),
        "names": ("oid, the old names as negatives", f"{NEW} {FROM} --datasets oid,coco@0,o365@0"),
        "replay": ("oid and 100 images of each old dataset", f"{NEW} {FROM} {REPLAY}"),
    },
    {
        "oid AP50": ap50("oid"),
        "coco AP50": ap50("coco"),
        "o365 AP50": ap50("o365"),
        OLD: ap50("coco", "o365"),
        "lineart AP50, never trained on": ap50("lineart"),
    },
    (
        Effect("before", "alone", OLD, "new classes alone unteach the old ones"),
        Effect("replay", "alone", OLD, "a replay keeps the old classes"),
        Effect("names", "alone", OLD, "old names as negatives keep the old classes"),
        Effect("alone", "scratch", "oid AP50", "the old weights help the new classes"),
        Effect("alone", "replay", "oid AP50", "a replay costs some of the new classes"),
    ),
    "finetuning.md",
    "The first training has 600 steps, the second 300. Objects of old classes in the images of oid "
    "have no box, so with the old names as negatives they are trained as background.",
)
