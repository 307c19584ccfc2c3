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
        "scratch": (
            "oid alone, 900 steps from scratch",
            f"scaledet.py {EVALUATED} --datasets oid --steps 900",
        ),
        "short": (
            "oid alone, 300 steps from scratch",
            f"scaledet.py {EVALUATED} --datasets oid --steps 300",
        ),
        "alone": ("then oid alone", f"{NEW} {FROM} --datasets oid"),
        "names": ("then oid, old names as negatives", f"{NEW} {FROM} --datasets oid,coco@0,o365@0"),
        "replay": ("then oid and 100 images of each old one", f"{NEW} {FROM} {REPLAY}"),
    },
    {
        "oid AP50": ap50("oid"),
        "coco AP50": ap50("coco"),
        "o365 AP50": ap50("o365"),
        OLD: ap50("coco", "o365"),
        "lineart AP50, never trained on": ap50("lineart"),
    },
    (
        Effect(
            "before", "alone", OLD, "training on oid alone costs AP on coco and o365", ours=True
        ),
        Effect("replay", "alone", OLD, "a replay keeps coco and o365", ours=True),
        Effect("replay", "before", OLD, "coco and o365 even gain in a replay", ours=True),
        Effect("names", "alone", OLD, "old names as negatives keep coco and o365", ours=True),
        Effect("replay", "names", OLD, "images replayed beat old names alone", ours=True),
        Effect("alone", "short", "oid AP50", "the old weights help oid", ours=True),
        Effect(
            "alone",
            "scratch",
            "oid AP50",
            "300 steps from the old weights beat 900 from scratch",
            ours=True,
        ),
        Effect("alone", "replay", "oid AP50", "a replay costs some AP on oid", ours=True),
    ),
    "finetuning.md",
    "The first training has 600 steps, the second 300, at a quarter of the learning rate that the "
    "trainings from scratch have. The old weights have seen the 600 steps of the first training "
    "when the second begins. Half of the images of the replay are of oid, which is then seen half "
    "as often: this may be all that the replay costs. Old names are negatives in it, too. The "
    "images of oid show its own classes alone, all with boxes. They are the drawings of coco in "
    "other colours; o365 has other drawings. Of coco's 61 classes 48 have their name in oid, too, "
    "and 52 of o365's 102. Training on oid alone costs o365 more than coco, probably due to the "
    "drawings. An old name is a wrong negative where oid has another word for the class (Cattle, "
    "cow).",
)
