"""The studies of the detectors."""

from benchmarks.claims.study import Effect, Study

TWO = "--datasets coco,o365"
UNSEEN = "--eval-datasets coco,o365,lineart"

SCALEDET = Study(
    "scaledet",
    "Does the soft loss help, which negatives, and how many datasets?",
    {
        "hard": ("hard loss alone", f"scaledet.py {TWO} {UNSEEN} --lam 0"),
        "raw": ("and soft loss, raw cosines", f"scaledet.py {TWO} {UNSEEN} --sim-norm none"),
        "soft": ("and soft loss, cosines rescaled to [0, 1]", f"scaledet.py {TWO} {UNSEEN}"),
        "own": ("the same, own negatives alone", f"scaledet.py {TWO} {UNSEEN} --neg-scope own"),
        "one": ("one dataset: coco", f"scaledet.py --datasets coco {UNSEEN}"),
        "three": ("three: and oid", f"scaledet.py --datasets coco,o365,oid {UNSEEN}"),
        "four": ("four: and lvis", f"scaledet.py --datasets coco,o365,oid,lvis {UNSEEN}"),
    },
    {
        "coco AP50": ("coco", "AP50"),
        "o365 AP50": ("o365", "AP50"),
        "lineart AP50, never trained on": ("lineart", "AP50"),
    },
    (
        Effect("soft", "hard", "lineart AP50, never trained on", "the soft loss helps elsewhere"),
        Effect("soft", "hard", "coco AP50", "the soft loss helps on the training datasets"),
        Effect("soft", "raw", "coco AP50", "rescaled cosines are better than raw ones"),
        Effect("soft", "own", "coco AP50", "negatives of all datasets are better"),
        Effect("four", "soft", "lineart AP50, never trained on", "more datasets help elsewhere"),
        Effect("soft", "one", "lineart AP50, never trained on", "two datasets beat one elsewhere"),
    ),
    "scaledet.md",
)

BOXES = "detic.py --datasets coco-base"
LABELS = "detic.py --datasets coco-base,in21k --steps 400 --weights {boxes}"
DETIC = Study(
    "detic",
    "What do image-level labels add, and which proposal should get them?",
    {
        "boxes": ("boxes of base classes", BOXES),
        "longer": ("the same, 400 steps more", f"{BOXES} --steps 400 --weights {{boxes}}"),
        "max_size": ("image labels: the largest proposal", LABELS),
        "image": ("the whole image", f"{LABELS} --image-label-loss image"),
        "max_score": ("the highest score", f"{LABELS} --image-label-loss max_score"),
        "min_loss": ("the lowest loss", f"{LABELS} --image-label-loss min_loss"),
        "wsddn": ("WSDDN", f"{LABELS} --image-label-loss wsddn"),
        "all": ("boxes of all classes", "detic.py --datasets coco --eval-datasets coco-base"),
        "upper": (
            "the same, 400 steps more: upper bound",
            "detic.py --datasets coco --eval-datasets coco-base --steps 400 --weights {all}",
        ),
    },
    {"base AP50": ("coco-base", "AP50 base"), "novel AP50": ("coco-base", "AP50 novel")},
    (
        Effect("max_size", "longer", "novel AP50", "image labels teach novel classes"),
        Effect("max_size", "longer", "base AP50", "image labels help base classes"),
        Effect("max_size", "image", "novel AP50", "the largest proposal beats the whole image"),
        Effect("max_size", "max_score", "novel AP50", "it beats the highest score"),
        Effect("max_size", "min_loss", "novel AP50", "it beats the lowest loss"),
        Effect("max_size", "wsddn", "novel AP50", "it beats WSDDN"),
        Effect("upper", "max_size", "novel AP50", "boxes would teach more"),
    ),
    "detic.md",
)

KNOWN = f"unidetector.py {TWO} --eval-datasets coco,o365,lvis"
CALIBRATED = "unidetector.py --eval-only --eval-datasets lvis --weights {partitioned}"
UNIDETECTOR = Study(
    "unidetector",
    "How should label spaces share a classifier, and how strong should the calibration be?",
    {
        "separate": ("a classifier per dataset", f"{KNOWN} --structure separate"),
        "unified": ("one: equal names merged", f"{KNOWN} --structure unified"),
        "partitioned": ("one: own names alone", KNOWN),
        "gamma0": ("partitioned, gamma 0", f"{CALIBRATED} --gamma 0"),
        "gamma3": ("partitioned, gamma 0.3", f"{CALIBRATED} --gamma 0.3"),
        "gamma9": ("partitioned, gamma 0.9", f"{CALIBRATED} --gamma 0.9"),
    },
    {
        "known AP50": ("lvis", "AP50 known"),
        "unknown AP50": ("lvis", "AP50 unknown"),
        "AR of proposals": ("lvis (proposals)", "AR@100"),
    },
    (
        Effect("partitioned", "separate", "unknown AP50", "one classifier beats one per dataset"),
        Effect("partitioned", "unified", "unknown AP50", "own names beat merged ones"),
        Effect("partitioned", "gamma0", "unknown AP50", "calibration helps unknown classes"),
        Effect("partitioned", "gamma0", "known AP50", "calibration helps known classes"),
        Effect("partitioned", "gamma9", "unknown AP50", "0.6 is better than 0.9"),
    ),
    "unidetector.md",
)

MERGED = "unidet.py --datasets coco,oid"
UNIDET = Study(
    "unidet",
    "Which classes are one, and what is a joint label space worth?",
    {
        "partitioned": ("a classifier per dataset", f"{MERGED} --stage partitioned"),
        "learned": (
            "its heads merged, as learned",
            f"{MERGED} --stage learn --weights {{partitioned}}",
        ),
        "unified": (
            "retrained on the learned space",
            f"{MERGED} --stage unified --label-space {{learned}}/label_space.csv",
        ),
        "names": ("retrained, equal names merged", f"{MERGED} --stage unified --label-space names"),
    },
    {
        "coco AP50": ("coco", "AP50"),
        "oid AP50": ("oid", "AP50"),
        "precision of the merges": ("merges", "precision"),
        "recall": ("merges", "recall"),
    },
    (
        Effect("unified", "partitioned", "coco AP50", "the unified detector is better"),
        Effect("unified", "partitioned", "oid AP50", "the unified detector is better"),
        Effect("unified", "names", "coco AP50", "learned merges beat equal names"),
        Effect("unified", "names", "oid AP50", "learned merges beat equal names"),
    ),
    "unidet.md",
)

PARTS = "category_extended.py --datasets cityscapes-common,cityscapes-rare"
PARTS += " --eval-datasets cityscapes-common"
ELSEWHERE = ("cityscapes-common", "AP50 elsewhere")
CATEGORY_EXTENDED = Study(
    "category_extended",
    "What supervises objects that a dataset does not annotate?",
    {
        "plain": ("all are background", f"{PARTS} --stage first --negatives plain"),
        "aware": (
            "negatives: positives of others (2001.04621)",
            f"{PARTS} --stage first --negatives dataset_aware",
        ),
        "first": ("negatives without a conflict", f"{PARTS} --stage first"),
        "as_full": (
            "pseudo boxes as if they were all",
            f"{PARTS} --pseudo-boxes {{whole}} --pseudo-negatives as_full",
        ),
        "whole": ("and mined boxes, weighted background", PARTS),
    },
    {"own AP50": ("cityscapes-common", "AP50 own"), "elsewhere AP50": ELSEWHERE},
    (
        Effect("first", "plain", "elsewhere AP50", "conflict-free negatives beat plain training"),
        Effect("aware", "plain", "elsewhere AP50", "the loss of 2001.04621 beats plain training"),
        Effect("whole", "first", "elsewhere AP50", "mined boxes help"),
        Effect("whole", "as_full", "elsewhere AP50", "weighted background helps"),
    ),
    "category_extended.md",
)

COARSE = "groupsoftmax.py --datasets coco,oid-top --eval-datasets coco,oid-top,oid --steps 300"
GROUPSOFTMAX = Study(
    "groupsoftmax",
    "What does a coarse class teach of its finer ones?",
    {
        "plain": ("plain softmax", f"{COARSE} --groups plain"),
        "groups": ("softmax over groups", COARSE),
    },
    {
        "coco AP50": ("coco", "AP50"),
        "oid-top AP50": ("oid-top", "AP50"),
        "fine AP50 where labels are coarse": ("oid", "AP50 fine"),
    },
    (
        Effect("groups", "plain", "fine AP50 where labels are coarse", "groups keep fine classes"),
        Effect("groups", "plain", "oid-top AP50", "groups help coarse classes"),
        Effect("groups", "plain", "coco AP50", "groups help the fine dataset"),
    ),
    "groupsoftmax.md",
)

DOMAINS = "domain_attention.py --datasets coco,o365,oid"
DOMAIN_ATTENTION = Study(
    "domain_attention",
    "Do adapters that the image chooses help a shared backbone?",
    {
        "without": ("one backbone, no adapters", f"{DOMAINS} --no-attention"),
        "one": ("one adapter a block", f"{DOMAINS} --adapters 1"),
        "bank": ("a bank of adapters, mixed by the image", DOMAINS),
        "less": ("a bank in half of the blocks", f"{DOMAINS} --less-blocks"),
    },
    {name: (name.removesuffix(" AP50"), "AP50") for name in ("coco AP50", "o365 AP50", "oid AP50")},
    (
        Effect("bank", "without", "coco AP50", "adapters help"),
        Effect("bank", "without", "o365 AP50", "adapters help"),
        Effect("bank", "one", "coco AP50", "a bank beats one adapter"),
        Effect("bank", "one", "o365 AP50", "a bank beats one adapter"),
    ),
    "domain_attention.md",
)

PLAIN = "plaindet.py --datasets coco,lvis,oid"
CONTROL = f"{PLAIN} --queries-from boxes --sampling size"
PLAINDET = Study(
    "plaindet",
    "What do text classifiers, composed queries and sampling by hardness add?",
    {
        "joint": ("one linear classifier for all", f"{CONTROL} --classifier joint"),
        "heads": ("a linear classifier per dataset", f"{CONTROL} --classifier heads"),
        "text": ("text of its own classes", CONTROL),
        "queries": ("and queries composed of the text", f"{PLAIN} --sampling size"),
        "whole": ("and sampling by hardness", PLAIN),
    },
    {name: (name.removesuffix(" AP50"), "AP50") for name in ("coco AP50", "lvis AP50", "oid AP50")},
    (
        Effect("text", "heads", "coco AP50", "text beats linear classifiers"),
        Effect("text", "heads", "lvis AP50", "text beats linear classifiers"),
        Effect("queries", "text", "coco AP50", "composed queries help"),
        Effect("queries", "text", "oid AP50", "composed queries help"),
        Effect("whole", "queries", "lvis AP50", "sampling by hardness helps the hard dataset"),
    ),
    "plaindet.md",
)

OMDET = Study(
    "omdet",
    "Do task tokens in the decoder help, and does a second dataset?",
    {
        "none": ("queries alone", f"omdet.py {TWO} {UNSEEN} --fusion none"),
        "merged": ("task tokens beside the queries", f"omdet.py {TWO} {UNSEEN}"),
        "coco": ("the same, coco alone", f"omdet.py --datasets coco {UNSEEN}"),
    },
    SCALEDET.columns,
    (
        Effect("merged", "none", "coco AP50", "fusion helps"),
        Effect("merged", "none", "o365 AP50", "fusion helps"),
        Effect("merged", "coco", "lineart AP50, never trained on", "a second dataset helps"),
    ),
    "omdet.md",
)

ASKED = "metr.py --datasets coco,cityscapes-instances"
METR = Study(
    "metr",
    "Must an object be matched to the queries of its own class?",
    {
        "any": ("matched to any query", f"{ASKED} --matching any"),
        "group": ("matched within its class", ASKED),
    },
    {"coco AP50": ("coco", "AP50"), "cityscapes AP50": ("cityscapes-instances", "AP50")},
    (
        Effect("group", "any", "coco AP50", "matching within the class helps"),
        Effect("group", "any", "cityscapes AP50", "matching within the class helps"),
    ),
    "metr.md",
)

DETECTORS = (SCALEDET, DETIC, UNIDETECTOR, UNIDET, CATEGORY_EXTENDED, GROUPSOFTMAX)
DETECTORS += (DOMAIN_ATTENTION, PLAINDET, OMDET, METR)
