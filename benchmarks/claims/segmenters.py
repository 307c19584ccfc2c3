"""The studies of the segmenters."""

from benchmarks.claims.study import Effect, Study

COCO_PQ = ("coco-panoptic", "PQ")
COCO_MIOU = ("coco-panoptic", "mIoU")
MAPS = "lmseg.py --datasets ade20k,coco-panoptic"
MEAN = "mean mIoU"
LMSEG = Study(
    "lmseg",
    "What do text, category-guided decoding and augmentation per dataset add?",
    {
        "heads": (
            "a linear classifier per dataset",
            f"{MAPS} --classifier heads --cgd off --no-daa",
        ),
        "text": ("text", f"{MAPS} --cgd off --no-daa"),
        "tau": ("text, at the paper's temperature of .07", f"{MAPS} --cgd off --no-daa --tau 0.07"),
        "cgd": ("text, guided decoding", f"{MAPS} --no-daa"),
        "daa": ("text, guided decoding, augmentation per dataset", MAPS),
        "ade20k": ("all of these, ade20k alone", "lmseg.py --datasets ade20k"),
        "coco": ("all of these, coco-panoptic alone", "lmseg.py --datasets coco-panoptic"),
    },
    {
        "ade20k mIoU": (("ade20k", "mIoU"),),
        "coco mIoU": (COCO_MIOU,),
        MEAN: (("ade20k", "mIoU"), COCO_MIOU),
        "coco PQ": (COCO_PQ,),
    },
    (
        Effect("text", "heads", MEAN, "text beats linear classifiers"),
        Effect(
            "tau",
            "heads",
            MEAN,
            "text of the paper's temperature beats linear classifiers",
            ours=True,
        ),
        Effect("cgd", "text", MEAN, "guided decoding helps"),
        Effect("cgd", "text", "coco PQ", "guided decoding helps panoptic maps"),
        Effect("daa", "cgd", MEAN, "augmentation per dataset helps"),
        Effect("daa", "cgd", "coco PQ", "augmentation per dataset helps panoptic maps"),
        Effect(
            "daa", "ade20k", "ade20k mIoU", "joint training beats ade20k alone in as many steps"
        ),
        Effect("daa", "coco", "coco mIoU", "joint training beats coco alone in as many steps"),
    ),
    "lmseg.md",
    "All variants take as many steps, so a dataset alone is seen twice as often. The temperature "
    "of text is learned and starts at .03 (the paper's .07 does as well here); linear classifiers "
    "have none. Guided decoding helps semantic maps, but not the PQ: stuff is found without it, "
    "and things are hardly found with it either. Without augmentation per dataset both datasets "
    "have that of `ade20k`, in training and at test time: coco is seen at 104 pixels, not 162, "
    "with other crops and with changes of colour. So a part of the gain may be resolution. The "
    "paper trains either semantic or panoptic models. Here one model learns both, so the text may "
    "also tell it the task of an image.",
)

EVALUATED = "--eval-datasets ade20k,ade20k-panoptic,coco-panoptic,o365-instances"
TWO = "dataseg.py --datasets ade20k,coco-panoptic --dataset-ratios ade20k=2,coco-panoptic=3"
ALL = "--datasets ade20k,coco-panoptic,o365"
ALL += f" --dataset-ratios ade20k=2,coco-panoptic=3,o365=3 {EVALUATED}"
MASKS = "o365 mask AP50"
THINGS = "ade20k AP of things"
LONG = f"--steps 1800 {EVALUATED}"
DATASEG = Study(
    "dataseg",
    "What does a joint training gain, what do boxes teach masks, and how are proposals merged?",
    {
        "ade20k": ("ade20k alone", f"dataseg.py --datasets ade20k --steps 450 {EVALUATED}"),
        "coco": (
            "coco-panoptic alone",
            f"dataseg.py --datasets coco-panoptic --steps 675 {EVALUATED}",
        ),
        "o365": ("o365 alone, boxes", f"dataseg.py --datasets o365 --steps 675 {EVALUATED}"),
        "ade20k_long": ("ade20k alone, 1800 steps", f"dataseg.py --datasets ade20k {LONG}"),
        "coco_long": (
            "coco-panoptic alone, 1800 steps",
            f"dataseg.py --datasets coco-panoptic {LONG}",
        ),
        "o365_long": ("o365 alone, boxes, 1800 steps", f"dataseg.py --datasets o365 {LONG}"),
        "maps": ("ade20k and coco-panoptic", f"{TWO} --steps 1125 {EVALUATED}"),
        "joint": ("all three", f"dataseg.py {ALL}"),
        "off": (
            "all three, proposals not merged in training",
            f"dataseg.py {ALL} --no-merge-in-training",
        ),
        "bfloat16": ("all three, in bfloat16", f"dataseg.py {ALL} --amp on"),
        "backgrounds": (
            "all three, a background for each",
            f"-m benchmarks.claims.dataseg_backgrounds {ALL}",
        ),
        "sum": (
            "all three, merged by sums when predicting",
            f"dataseg.py --eval-only --weights {{joint}} {EVALUATED} --merge sum",
        ),
        "off_sum": (
            "all three, not merged in training, sums when predicting",
            f"dataseg.py --eval-only --weights {{off}} {EVALUATED} --merge sum",
        ),
    },
    {
        "ade20k mIoU": (("ade20k", "mIoU"),),
        THINGS: (("ade20k-panoptic", "AP things"),),
        "coco PQ": (COCO_PQ,),
        MASKS: (("o365-instances", "mask AP50"),),
    },
    (
        Effect("joint", "ade20k", "ade20k mIoU", "other datasets help ade20k"),
        Effect("joint", "coco", "coco PQ", "other datasets help coco"),
        Effect("joint", "o365", MASKS, "maps of others help where there are boxes alone"),
        Effect("joint", "ade20k", THINGS, "instances of others reach ade20k, whose maps have none"),
        Effect("joint", "maps", "ade20k mIoU", "boxes of o365 help ade20k, too"),
        Effect(
            "joint",
            "ade20k_long",
            "ade20k mIoU",
            "others help ade20k even in as many steps",
            ours=True,
        ),
        Effect(
            "joint", "coco_long", "coco PQ", "others help coco even in as many steps", ours=True
        ),
        Effect(
            "joint",
            "o365_long",
            MASKS,
            "maps of others help boxes even in as many steps",
            ours=True,
        ),
        Effect(
            "joint",
            "ade20k_long",
            THINGS,
            "instances reach ade20k even in as many steps",
            ours=True,
        ),
        Effect("joint", "backgrounds", "ade20k mIoU", "one background for all helps ade20k"),
        Effect("joint", "backgrounds", "coco PQ", "one background for all helps coco"),
        Effect("joint", "off", "ade20k mIoU", "merging in training helps", ours=True),
        Effect("joint", "off", "coco PQ", "merging in training helps panoptic maps", ours=True),
        Effect("joint", "sum", "ade20k mIoU", "the maximum beats the sum", ours=True),
        Effect("joint", "off_sum", "ade20k mIoU", "merging beats Mask2Former's sums", ours=True),
        Effect("joint", "bfloat16", "ade20k mIoU", "bfloat16 costs some mIoU", ours=True),
        Effect("joint", "bfloat16", "coco PQ", "bfloat16 costs some PQ", ours=True),
    ),
    "dataseg.md",
    "A joint training has 1800 steps: on average 450 of `ade20k` and 675 of each of the others. A "
    "dataset alone is seen as often in 450 or 675 steps, and the pair in 1125; in 1800 steps alone "
    "a dataset is seen more often. All are tested on all datasets. The maps of `ade20k` for "
    "training have no instances, and yet the AP of its things also rises in a longer training "
    "without instances. So not all of the joint training's gain comes from those of others. "
    "Mask2Former does not merge in training, and sums up when predicting. On the same weights, its "
    "sum has a higher mIoU than the maximum. Both choices together are not clearly better than "
    "ours. In one model, most proposals that joined a merged target covered what the matched one "
    "covered (there is no record of it). That this is why no effect of merging in training is "
    "clear is a guess. With a background for each dataset the seeds differ more. The means of "
    "`ade20k` hardly change; coco PQ and o365 mask AP50 are lower in each of the three seeds, but "
    "not clearly. With so many tests, a p just below .05 is weak evidence.",
)

PQ = "PQ"
MIOU = "mIoU"
AP = "AP of things"
ALONE = "mIoU of the semantic task alone"
TOLD = "cityscapes-panoptic (the task is {})"
ONEFORMER = Study(
    "oneformer",
    "Does the contrastive loss help, and does the model listen to the task?",
    {
        "without": (
            "all tasks, without the contrastive loss",
            "oneformer.py --datasets cityscapes-panoptic --no-contrastive",
        ),
        "with": (
            "all tasks, with the contrastive loss",
            "oneformer.py --datasets cityscapes-panoptic --sentences each",
        ),
        "semantic": (
            "the semantic task alone, with the contrastive loss",
            "oneformer.py --datasets cityscapes",
        ),
    },
    {
        PQ: (("cityscapes-panoptic", "PQ"),),
        MIOU: (("cityscapes-panoptic", "mIoU"),),
        ALONE: (("cityscapes", "mIoU"),),
        AP: (("cityscapes-panoptic", "AP things"),),
        "PQ of things": (("cityscapes-panoptic", "PQ things"),),
        "PQ if told instance": ((TOLD.format("instance"), "PQ"),),
        "PQ of things if told semantic": ((TOLD.format("semantic"), "PQ things"),),
        "AP of things if told panoptic": ((TOLD.format("panoptic"), "AP things"),),
    },
    (
        Effect("with", "without", PQ, "the contrastive loss helps PQ"),
        Effect("with", "without", MIOU, "the contrastive loss helps mIoU"),
        Effect("with", "without", AP, "the contrastive loss helps AP of things"),
        Effect("with", "semantic", MIOU, "a training for all tasks beats one for one", ALONE),
        Effect("with", "with", PQ, "told instance, it leaves out stuff", "PQ if told instance"),
        Effect(
            "with",
            "with",
            "PQ of things",
            "told semantic, it joins things of a class",
            "PQ of things if told semantic",
        ),
        Effect(
            "with",
            "with",
            AP,
            "told instance, it finds things better than told panoptic",
            "AP of things if told panoptic",
        ),
    ),
    "oneformer.md",
    "The contrastive loss compares the 4 images of a batch, few for such a loss. All variants take "
    "800 steps. Each of the three tasks is drawn for a third of the images, so the semantic task "
    "gets a third of those that it gets alone: that may be why it is worse. Both columns of mIoU "
    "are of the same images and truth. The panoptic and the instance task are not trained alone. "
    'That "semantic" and "instance" change little may be for want of steps: four times as many '
    "change a little for the former, and nothing for the latter, see the generated run above.",
)

SEGMENTERS = (LMSEG, DATASEG, ONEFORMER)
