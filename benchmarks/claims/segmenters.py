"""The studies of the segmenters."""

from benchmarks.claims.study import Effect, Study

LMSEG = Study(
    "lmseg",
    "What do text, category-guided decoding and augmentation per dataset add?",
    {
        "heads": (
            "a linear classifier per dataset",
            "lmseg.py --datasets ade20k,coco-panoptic --classifier heads --cgd off --no-daa",
        ),
        "text": ("text", "lmseg.py --datasets ade20k,coco-panoptic --cgd off --no-daa"),
        "cgd": ("and guided decoding", "lmseg.py --datasets ade20k,coco-panoptic --no-daa"),
        "daa": ("and augmentation per dataset", "lmseg.py --datasets ade20k,coco-panoptic"),
        "ade20k": ("the same, ade20k alone", "lmseg.py --datasets ade20k"),
        "coco": ("the same, coco-panoptic alone", "lmseg.py --datasets coco-panoptic"),
    },
    {
        "ade20k mIoU": ("ade20k", "mIoU"),
        "coco-panoptic mIoU": ("coco-panoptic", "mIoU"),
        "coco-panoptic PQ": ("coco-panoptic", "PQ"),
    },
    (
        Effect("text", "heads", "ade20k mIoU", "text beats linear classifiers"),
        Effect("cgd", "text", "ade20k mIoU", "guided decoding helps"),
        Effect("daa", "cgd", "ade20k mIoU", "augmentation per dataset helps"),
        Effect("daa", "ade20k", "ade20k mIoU", "joint training beats a single dataset"),
        Effect("daa", "coco", "coco-panoptic PQ", "joint training beats a single dataset"),
    ),
    "lmseg.md",
)

JOINT = "dataseg.py --datasets ade20k,coco-panoptic,o365"
JOINT += " --dataset-ratios ade20k=2,coco-panoptic=3,o365=3"
EVERY = "--eval-datasets ade20k,coco-panoptic,o365-instances"
DATASEG = Study(
    "dataseg",
    "What does a joint training gain, what do boxes teach masks, and how are proposals merged?",
    {
        "ade20k": ("ade20k alone", f"dataseg.py --datasets ade20k {EVERY}"),
        "coco": ("coco-panoptic alone", f"dataseg.py --datasets coco-panoptic {EVERY}"),
        "two": ("both, without boxes", f"dataseg.py --datasets ade20k,coco-panoptic {EVERY}"),
        "joint": ("both, and o365 with boxes alone", f"{JOINT} {EVERY}"),
        "off": ("the same, no merging in training", f"{JOINT} {EVERY} --no-merge-in-training"),
        "sum": ("the same, merged by sums", f"{JOINT} {EVERY} --merge sum"),
    },
    {
        "ade20k mIoU": ("ade20k", "mIoU"),
        "coco-panoptic PQ": ("coco-panoptic", "PQ"),
        "o365 mask AP50": ("o365-instances", "mask AP50"),
    },
    (
        Effect("joint", "ade20k", "ade20k mIoU", "joint training helps"),
        Effect("joint", "coco", "coco-panoptic PQ", "joint training helps"),
        Effect("joint", "two", "o365 mask AP50", "boxes alone teach masks"),
        Effect("joint", "off", "ade20k mIoU", "merging in training helps"),
        Effect("joint", "sum", "ade20k mIoU", "the maximum beats the sum"),
    ),
    "dataseg.md",
)

ONEFORMER = Study(
    "oneformer",
    "Does the contrastive loss help, and does the model listen to the task?",
    {
        "without": (
            "without the contrastive loss",
            "oneformer.py --datasets cityscapes-panoptic --no-contrastive",
        ),
        "own": ("with it", "oneformer.py --datasets cityscapes-panoptic --sentences each"),
    },
    {
        "PQ": ("cityscapes-panoptic", "PQ"),
        "mIoU": ("cityscapes-panoptic", "mIoU"),
        "AP of things": ("cityscapes-panoptic", "AP things"),
        "PQ if told instance": ("cityscapes-panoptic (the task is instance)", "PQ"),
    },
    (
        Effect("own", "without", "PQ", "the contrastive loss helps"),
        Effect("own", "without", "mIoU", "the contrastive loss helps"),
    ),
    "oneformer.md",
)

SEGMENTERS = (LMSEG, DATASEG, ONEFORMER)
