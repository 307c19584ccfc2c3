"""The studies of the segmenters."""

from benchmarks.claims.study import Effect, Study

TWO = "lmseg.py --datasets ade20k,coco-panoptic"
COCO_PQ = ("coco-panoptic", "PQ")
COCO_MIOU = ("coco-panoptic", "mIoU")
MEAN = "mean mIoU"
LMSEG = Study(
    "lmseg",
    "What do text, category-guided decoding and augmentation per dataset add?",
    {
        "heads": (
            "a linear classifier per dataset",
            f"{TWO} --classifier heads --cgd off --no-daa",
        ),
        "text": ("text", f"{TWO} --cgd off --no-daa"),
        "cgd": ("and guided decoding", f"{TWO} --no-daa"),
        "daa": ("and augmentation per dataset", TWO),
        "ade20k": ("the same, ade20k alone", "lmseg.py --datasets ade20k"),
        "coco": ("the same, coco-panoptic alone", "lmseg.py --datasets coco-panoptic"),
    },
    {
        "ade20k mIoU": (("ade20k", "mIoU"),),
        "coco mIoU": (COCO_MIOU,),
        MEAN: (("ade20k", "mIoU"), COCO_MIOU),
        "coco PQ": (COCO_PQ,),
    },
    (
        Effect("text", "heads", MEAN, "text beats linear classifiers"),
        Effect("cgd", "text", MEAN, "guided decoding helps"),
        Effect("daa", "cgd", "coco PQ", "augmentation per dataset helps"),
        Effect("daa", "ade20k", "ade20k mIoU", "joint training beats ade20k alone"),
        Effect("daa", "coco", "coco mIoU", "joint training beats coco alone"),
    ),
    "lmseg.md",
    "All variants take as many steps. Without augmentation per dataset both have that of "
    "`ade20k`, in training and at test time.",
)

EVERY = "--eval-datasets ade20k,coco-panoptic,o365-instances"
MAPS = "dataseg.py --datasets ade20k,coco-panoptic --dataset-ratios ade20k=2,coco-panoptic=3"
JOINT = "dataseg.py --datasets ade20k,coco-panoptic,o365"
JOINT += " --dataset-ratios ade20k=2,coco-panoptic=3,o365=3"
MASKS = "o365 mask AP50"
DATASEG = Study(
    "dataseg",
    "What does a joint training gain, what do boxes teach masks, and how are proposals merged?",
    {
        "ade20k": ("ade20k alone", f"dataseg.py --datasets ade20k {EVERY}"),
        "coco": ("coco-panoptic alone", f"dataseg.py --datasets coco-panoptic {EVERY}"),
        "o365": ("o365 alone, boxes", f"dataseg.py --datasets o365 {EVERY}"),
        "maps": ("ade20k and coco-panoptic", f"{MAPS} {EVERY}"),
        "joint": ("all three", f"{JOINT} {EVERY}"),
        "off": ("the same, no merging in training", f"{JOINT} {EVERY} --no-merge-in-training"),
        "sum": (
            "all three, merged by sums when predicting",
            f"dataseg.py --eval-only --weights {{joint}} {EVERY} --merge sum",
        ),
    },
    {
        "ade20k mIoU": (("ade20k", "mIoU"),),
        "coco PQ": (COCO_PQ,),
        MASKS: (("o365-instances", "mask AP50"),),
    },
    (
        Effect("joint", "ade20k", "ade20k mIoU", "joint training beats ade20k alone"),
        Effect("joint", "coco", "coco PQ", "joint training beats coco alone"),
        Effect("joint", "o365", MASKS, "maps of others help where there are boxes alone"),
        Effect("joint", "maps", MASKS, "boxes teach masks of their classes"),
        Effect("joint", "off", "ade20k mIoU", "merging in training helps"),
        Effect("joint", "sum", "ade20k mIoU", "the maximum beats the sum"),
    ),
    "dataseg.md",
    "All variants take as many steps, so each dataset of a joint training is seen less often. The "
    "paper also compares a background per dataset with a shared one; here there is a shared one "
    "alone.",
)

PQ = "PQ"
ONEFORMER = Study(
    "oneformer",
    "Does the contrastive loss help, and does the model listen to the task?",
    {
        "without": (
            "without the contrastive loss",
            "oneformer.py --datasets cityscapes-panoptic --no-contrastive",
        ),
        "with": ("with it", "oneformer.py --datasets cityscapes-panoptic --sentences each"),
    },
    {
        PQ: (("cityscapes-panoptic", "PQ"),),
        "mIoU": (("cityscapes-panoptic", "mIoU"),),
        "AP of things": (("cityscapes-panoptic", "AP things"),),
        "PQ if told instance": (("cityscapes-panoptic (the task is instance)", "PQ"),),
    },
    (
        Effect("with", "without", PQ, "the contrastive loss helps PQ"),
        Effect("with", "without", "mIoU", "the contrastive loss helps mIoU"),
        Effect("with", "with", PQ, "the model listens to the task", "PQ if told instance"),
    ),
    "oneformer.md",
)

SEGMENTERS = (LMSEG, DATASEG, ONEFORMER)
