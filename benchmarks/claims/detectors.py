"""The studies of the detectors."""

from benchmarks.claims.study import Effect, Study, ap50

TWO = "--datasets coco,o365"
UNSEEN = "--eval-datasets coco,o365,lineart"
TRAINED = "mean AP50 of coco and o365"
ELSEWHERE = "lineart AP50, never trained on"

SCALEDET = Study(
    "scaledet",
    "Does the soft loss help, which negatives, and how many datasets?",
    {
        "hard": ("hard loss", f"scaledet.py {TWO} {UNSEEN} --lam 0"),
        "soft": ("hard and soft loss", f"scaledet.py {TWO} {UNSEEN}"),
        "strong": ("hard and 10 times the soft loss", f"scaledet.py {TWO} {UNSEEN} --lam 10"),
        "own": ("both losses, own negatives", f"scaledet.py {TWO} {UNSEEN} --neg-scope own"),
        "o365": ("both losses, o365 alone", f"scaledet.py --datasets o365 {UNSEEN}"),
        "lvis": ("both losses, lvis alone", f"scaledet.py --datasets lvis {UNSEEN}"),
        "four": (
            "both losses, coco, o365, oid, lvis",
            f"scaledet.py --datasets coco,o365,oid,lvis {UNSEEN}",
        ),
    },
    {
        "coco AP50": ap50("coco"),
        "o365 AP50": ap50("o365"),
        TRAINED: ap50("coco", "o365"),
        ELSEWHERE: ap50("lineart"),
    },
    (
        Effect("soft", "hard", TRAINED, "the soft loss helps on the training datasets"),
        Effect("soft", "hard", ELSEWHERE, "the soft loss helps elsewhere"),
        Effect("strong", "hard", ELSEWHERE, "ten times the soft loss helps elsewhere", ours=True),
        Effect("soft", "own", TRAINED, "negatives of all datasets beat own ones", ours=True),
        Effect("soft", "own", ELSEWHERE, "they beat own ones elsewhere, too", ours=True),
        Effect("soft", "o365", ELSEWHERE, "coco and o365 beat o365 alone elsewhere"),
        Effect("four", "lvis", ELSEWHERE, "four datasets beat the best one elsewhere"),
    ),
    "scaledet.md",
    "All variants take 600 steps of 8 images. `lineart` has the art of `o365`, in black and white, "
    "and `lvis` shows more of it than any other dataset. That negatives of all datasets are meant "
    "is our reading of the paper; UniDetector claims the contrary for its classifier.",
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
        "first": ("the highest objectness", f"{LABELS} --image-label-loss first"),
        "wsddn": ("WSDDN", f"{LABELS} --image-label-loss wsddn"),
        "all": ("boxes of all classes", "detic.py --datasets coco --eval-datasets coco-base"),
        "upper": (
            "the same, 400 steps more: upper bound",
            "detic.py --datasets coco --eval-datasets coco-base --steps 400 --weights {all}",
        ),
    },
    {"base AP50": (("coco-base", "AP50 base"),), "novel AP50": (("coco-base", "AP50 novel"),)},
    (
        Effect("max_size", "longer", "novel AP50", "image labels teach novel classes"),
        Effect("max_size", "image", "novel AP50", "the largest box beats the whole image"),
        Effect("max_size", "max_score", "novel AP50", "the largest box beats the highest score"),
        Effect("max_size", "first", "novel AP50", "the largest box beats the highest objectness"),
        Effect("max_size", "wsddn", "novel AP50", "the largest box beats WSDDN"),
        Effect("upper", "max_size", "novel AP50", "boxes teach novel classes more"),
    ),
    "detic.md",
    "With image labels, half of the 400 steps are of images with boxes. The weight of the image "
    "labels is the same for all losses; it was chosen with the largest proposal, and WSDDN is a "
    "mean over classes where the others are sums.",
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
        "known AP50": (("lvis", "AP50 known"),),
        "unknown AP50": (("lvis", "AP50 unknown"),),
        "lvis AP50": ap50("lvis"),
    },
    (
        Effect("partitioned", "separate", "lvis AP50", "one classifier beats one per dataset"),
        Effect("partitioned", "unified", "lvis AP50", "own names beat merged ones"),
        Effect("partitioned", "gamma0", "unknown AP50", "calibration helps unknown classes"),
        Effect("partitioned", "gamma3", "unknown AP50", "gamma 0.6 is better than 0.3"),
        Effect("partitioned", "gamma9", "unknown AP50", "gamma 0.6 is better than 0.9"),
    ),
    "unidetector.md",
    "`lvis` was never trained on; its known classes have names of the training. Gamma is 0.6 "
    "where no other is named. The paper's comparison with a detector whose proposals and classes "
    "are trained together is not made: there is no such network here.",
)

MERGED = "unidet.py --datasets coco,oid"
BOTH = "mean AP50 of coco and oid"
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
        "text": (
            "retrained, similar names merged",
            f"{MERGED} --stage unified --label-space benchmarks/claims/text_merges.csv",
        ),
    },
    {
        "coco AP50": ap50("coco"),
        "oid AP50": ap50("oid"),
        BOTH: ap50("coco", "oid"),
        "precision of the merges": (("merges", "precision"),),
        "recall": (("merges", "recall"),),
    },
    (
        Effect("unified", "partitioned", BOTH, "the unified detector beats the partitioned one"),
        Effect("unified", "names", BOTH, "learned merges beat equal names"),
        Effect("unified", "text", BOTH, "learned merges beat similar names"),
        Effect(
            "learned", "names", "precision of the merges", "learned merges are right more often"
        ),
        Effect("learned", "partitioned", BOTH, "merging without training costs nothing"),
    ),
    "unidet.md",
    "The retrained detectors start anew and take as many steps as the partitioned one. Similar "
    "names have a cosine of MiniLM's embeddings of .85 or more, the best threshold in hindsight.",
)

PARTS = "category_extended.py --datasets cityscapes-common,cityscapes-rare"
PARTS += " --eval-datasets cityscapes-common"
MINED = f"{PARTS} --pseudo-boxes {{whole}}"
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
        "full": ("mined boxes, all else background", f"{MINED} --pseudo-negatives plain"),
        "positives": ("mined boxes alone", f"{MINED} --pseudo-negatives conflict_free"),
        "whole": ("mined boxes and weighted background", PARTS),
    },
    {
        "own AP50": (("cityscapes-common", "AP50 own"),),
        "elsewhere AP50": (("cityscapes-common", "AP50 elsewhere"),),
    },
    (
        Effect("aware", "plain", "elsewhere AP50", "the loss of 2001.04621 beats plain training"),
        Effect("first", "plain", "elsewhere AP50", "conflict-free negatives beat plain training"),
        Effect("whole", "first", "elsewhere AP50", "mined boxes help"),
        Effect("whole", "positives", "elsewhere AP50", "weighted background beats none"),
        Effect("whole", "full", "elsewhere AP50", "weighted background beats all of it"),
    ),
    "category_extended.md",
    "Elsewhere: classes that the training images of `cityscapes-common` show but do not annotate. "
    "Variants with mined boxes train twice.",
)

COARSE = "groupsoftmax.py --datasets coco,oid-top --eval-datasets coco,oid-top,oid --steps 300"
GROUPSOFTMAX = Study(
    "groupsoftmax",
    "What does a coarse class teach of its finer ones?",
    {
        "coco": ("coco alone", "groupsoftmax.py --datasets coco --eval-datasets coco --steps 300"),
        "plain": ("coco and oid-top, plain softmax", f"{COARSE} --groups plain"),
        "groups": ("coco and oid-top, softmax over groups", COARSE),
    },
    {
        "coco AP50": ap50("coco"),
        "oid-top AP50": ap50("oid-top"),
        "fine AP50 where labels are coarse": (("oid", "AP50 fine"),),
    },
    (
        Effect("groups", "coco", "coco AP50", "a coarse dataset helps the fine one"),
        Effect("groups", "plain", "coco AP50", "groups help the fine dataset"),
        Effect("groups", "plain", "oid-top AP50", "groups help the coarse dataset"),
        Effect("groups", "plain", "fine AP50 where labels are coarse", "groups find fine classes"),
    ),
    "groupsoftmax.md",
)

DOMAINS = "domain_attention.py --datasets coco,o365,oid"
MEAN = "mean AP50"
DOMAIN_ATTENTION = Study(
    "domain_attention",
    "Do adapters that the image chooses help a shared backbone?",
    {
        "without": ("one backbone, no adapters", f"{DOMAINS} --no-attention"),
        "one": ("one adapter a block", f"{DOMAINS} --adapters 1"),
        "bank": ("a bank of adapters, mixed by the image", DOMAINS),
        "less": ("a bank in half of the blocks", f"{DOMAINS} --less-blocks"),
    },
    {
        "coco AP50": ap50("coco"),
        "o365 AP50": ap50("o365"),
        "oid AP50": ap50("oid"),
        MEAN: ap50("coco", "o365", "oid"),
    },
    (
        Effect("one", "without", MEAN, "an adapter helps"),
        Effect("bank", "without", MEAN, "a bank of adapters helps"),
        Effect("bank", "one", MEAN, "a bank beats one adapter"),
    ),
    "domain_attention.md",
    "The paper also compares with a detector per dataset. A step here has images of all three.",
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
        "hub": (
            "and queries adapted to the dataset (Detection Hub)",
            f"{PLAIN} --queries-from text_dataset --sampling size",
        ),
        "queries": ("and queries composed of the text", f"{PLAIN} --sampling size"),
        "equal": (
            "and sampling as if all were as hard",
            f"{PLAIN} --sampling size --dataset-ratios coco=123,lvis=100,oid=100",
        ),
        "whole": ("and sampling by hardness", PLAIN),
    },
    {
        "coco AP50": ap50("coco"),
        "lvis AP50": ap50("lvis"),
        "oid AP50": ap50("oid"),
        MEAN: ap50("coco", "lvis", "oid"),
    },
    (
        Effect("heads", "joint", MEAN, "a classifier per dataset beats one for all"),
        Effect("text", "heads", MEAN, "text beats linear classifiers"),
        Effect("queries", "text", MEAN, "composed queries help"),
        Effect("hub", "text", MEAN, "queries adapted to the dataset help (Detection Hub)"),
        Effect("whole", "queries", MEAN, "sampling by hardness helps"),
        Effect("whole", "equal", MEAN, "it is the hardness that helps, not the sizes"),
    ),
    "plaindet.md",
    "Sampling by hardness also draws small datasets more often: its weights are those of `equal` "
    "where all losses are the same.",
)

OMDET = Study(
    "omdet",
    "Do task tokens in the decoder help, and does a second dataset?",
    {
        "none": ("queries alone", f"omdet.py {TWO} {UNSEEN} --fusion none"),
        "merged": ("task tokens beside the queries", f"omdet.py {TWO} {UNSEEN}"),
        "o365": ("the same, o365 alone", f"omdet.py --datasets o365 {UNSEEN}"),
    },
    SCALEDET.columns,
    (
        Effect("merged", "none", TRAINED, "fusion helps"),
        Effect("merged", "none", ELSEWHERE, "fusion helps elsewhere"),
        Effect("merged", "o365", ELSEWHERE, "two datasets beat one elsewhere"),
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
    {
        "coco AP50": ap50("coco"),
        "cityscapes AP50": ap50("cityscapes-instances"),
        MEAN: ap50("coco", "cityscapes-instances"),
    },
    (Effect("group", "any", MEAN, "matching within the class is needed"),),
    "metr.md",
    "The control shows what the matching is for: a query that is asked for cats learns to say yes "
    "to dogs.",
)

DETECTORS = (SCALEDET, DETIC, UNIDETECTOR, UNIDET, CATEGORY_EXTENDED, GROUPSOFTMAX)
DETECTORS += (DOMAIN_ATTENTION, PLAINDET, OMDET, METR)
