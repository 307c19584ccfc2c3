"""The studies of the detectors."""

from benchmarks.claims.study import Effect, Study, ap50

TWO = "--datasets coco,o365"
UNSEEN = "--eval-datasets coco,o365,lineart"
TRAINED = "mean AP50 of coco and o365"
LINEART = "lineart AP50, never trained on"

SCALEDET = Study(
    "scaledet",
    "Does the soft loss help, which negatives, and how many datasets?",
    {
        "hard": ("coco and o365, hard loss", f"scaledet.py {TWO} {UNSEEN} --lam 0"),
        "soft": ("coco and o365, hard and soft loss", f"scaledet.py {TWO} {UNSEEN}"),
        "raw": (
            "coco and o365, soft loss of raw cosines",
            f"scaledet.py {TWO} {UNSEEN} --sim-norm none",
        ),
        "strong": ("coco and o365, 10 times the soft loss", f"scaledet.py {TWO} {UNSEEN} --lam 10"),
        "own": ("coco and o365, own negatives", f"scaledet.py {TWO} {UNSEEN} --neg-scope own"),
        "bfloat16": (
            "coco and o365, hard and soft loss, in bfloat16",
            f"scaledet.py {TWO} {UNSEEN} --amp on",
        ),
        "o365": ("o365", f"scaledet.py --datasets o365 {UNSEEN}"),
        "lvis": ("lvis", f"scaledet.py --datasets lvis {UNSEEN}"),
        "three": ("coco, o365, oid", f"scaledet.py --datasets coco,o365,oid {UNSEEN}"),
        "four": ("coco, o365, oid, lvis", f"scaledet.py --datasets coco,o365,oid,lvis {UNSEEN}"),
        "four_own": (
            "coco, o365, oid, lvis, own negatives",
            f"scaledet.py --datasets coco,o365,oid,lvis {UNSEEN} --neg-scope own",
        ),
    },
    {
        "coco AP50": ap50("coco"),
        "o365 AP50": ap50("o365"),
        TRAINED: ap50("coco", "o365"),
        LINEART: ap50("lineart"),
    },
    (
        Effect("soft", "hard", TRAINED, "the soft loss helps on the training datasets"),
        Effect("soft", "hard", LINEART, "the soft loss helps on lineart"),
        Effect("soft", "raw", TRAINED, "rescaled cosines beat raw ones", ours=True),
        Effect("strong", "hard", LINEART, "ten times the soft loss helps on lineart", ours=True),
        Effect("own", "soft", TRAINED, "own negatives beat those of two datasets", ours=True),
        Effect(
            "own", "soft", LINEART, "own negatives beat those of two datasets on lineart", ours=True
        ),
        Effect("four_own", "four", TRAINED, "own negatives beat those of four datasets", ours=True),
        Effect("soft", "bfloat16", TRAINED, "bfloat16 costs some AP", ours=True),
        Effect("soft", "o365", LINEART, "coco and o365 beat o365 in as many steps on lineart"),
        Effect(
            "own",
            "o365",
            LINEART,
            "coco and o365 with own negatives beat o365 in as many steps on lineart",
            ours=True,
        ),
        Effect("three", "soft", LINEART, "a third dataset helps lineart in as many steps"),
        Effect("four", "lvis", LINEART, "four datasets beat lvis in as many steps on lineart"),
        Effect(
            "four_own",
            "lvis",
            LINEART,
            "four with own negatives beat lvis in as many steps on lineart",
            ours=True,
        ),
    ),
    "scaledet.md",
    "The soft loss and negatives of all datasets are on where nothing else is said. We read the "
    "paper so that the classes of all datasets are negatives; UniDetector claims the contrary for "
    "its classifier. A phone of `coco` (cell phone) is then a negative of `o365` (Mobile phone), "
    "and four datasets have many such pairs. With own negatives, two datasets beat `o365` on "
    "`lineart`, so these pairs are the likely reason why more datasets do not help. All variants "
    "take 600 steps of 8 images, so with more datasets each is seen less; by default, the number "
    "of steps grows with that of the datasets. `lineart` has the art of `o365` in black and white. "
    "`lvis` shows 68 of its 87 emoji, half of them in this art, and `o365` 21. The texts are "
    "fixed, so similar names get similar scores without a soft loss, too. The soft loss is a mean "
    "over the labels where the hard loss is a sum. So its gradient is small beside that of the "
    "hard loss, and smaller with more datasets: how it is scaled hardly matters either. Ten times "
    "as strong, it raises scores that the hard loss lowers, which is probably why it costs AP.",
)

BOXES = "detic.py --datasets coco-base"
ALL = "detic.py --datasets coco --eval-datasets coco-base"
LABELS = "detic.py --datasets coco-base,in21k --dataset-sizes in21k=160 --steps 400"
LABELS += " --weights {boxes}"
DETIC = Study(
    "detic",
    "What do image-level labels add, and which proposal should get them?",
    {
        "boxes": ("boxes, 280 steps", BOXES),
        "longer": ("boxes, 680 steps", f"{BOXES} --steps 400 --weights {{boxes}}"),
        "max_size": ("image label to the largest proposal", LABELS),
        "image": ("image label to the whole image", f"{LABELS} --image-label-loss image"),
        "max_score": ("image label to the highest score", f"{LABELS} --image-label-loss max_score"),
        "first": ("image label to the highest objectness", f"{LABELS} --image-label-loss first"),
        "wsddn": (
            "image label to all proposals, weighted (WSDDN)",
            f"{LABELS} --image-label-loss wsddn --image-label-weight 50",
        ),
        "all": ("boxes of novel classes, too, 280 steps", ALL),
        "upper": ("boxes of novel classes, too, 680 steps", f"{ALL} --steps 400 --weights {{all}}"),
    },
    {"base AP50": (("coco-base", "AP50 base"),), "novel AP50": (("coco-base", "AP50 novel"),)},
    (
        Effect("max_size", "longer", "novel AP50", "image labels teach novel classes"),
        Effect("max_size", "image", "novel AP50", "the largest box beats the whole image"),
        Effect("max_size", "max_score", "novel AP50", "the largest box beats the highest score"),
        Effect("max_size", "first", "novel AP50", "the largest box beats the highest objectness"),
        Effect("max_size", "wsddn", "novel AP50", "the largest box beats WSDDN", ours=True),
        Effect("upper", "max_size", "novel AP50", "boxes teach novel classes more", ours=True),
    ),
    "detic.md",
    "With image labels, 400 steps follow the first 280. Half of them are of images with boxes. The "
    "weight of the image labels is .5, officially .1, as the steps are few. WSDDN has 50, as its "
    "loss is a mean over 100 columns where the others are sums. Officially it has .1, too, so the "
    "paper's WSDDN is weaker than this one. Images with labels have 160 pixels, those with boxes "
    "192, officially 320 and 640: in an image of 96 pixels, only one level of the pyramid proposes "
    "boxes smaller than the image. In the paper, the largest box, the whole image and the highest "
    "objectness are within a point of AP, and far above the highest score and WSDDN. Here an image "
    "with a label shows one object, a third to four fifths as wide as the image. So the whole "
    "image is mostly texture, and score and objectness choose the same object as the size does. "
    "That this explains their order is a guess.",
)

THREE_SETS = f"{TWO} --eval-datasets coco,o365,lvis"
KNOWN = f"unidetector.py {THREE_SETS}"
CALIBRATED = "unidetector.py --eval-only --eval-datasets lvis --weights {partitioned}"
UNCALIBRATED = "unknown AP50, gamma 0"
AR = "AR of 100 proposals"
UNIDETECTOR = Study(
    "unidetector",
    "How should label spaces share a classifier, and how strong should the calibration be?",
    {
        "separate": ("a classifier per dataset", f"{KNOWN} --structure separate"),
        "unified": ("one classifier, equal names merged", f"{KNOWN} --structure unified"),
        "partitioned": ("one classifier, own names alone", KNOWN),
        "coupled": (
            "own names alone, localizer and classifier in one network",
            f"-m benchmarks.claims.unidetector_coupled {THREE_SETS}",
        ),
        "gamma3": ("own names alone, gamma .3", f"{CALIBRATED} --gamma 0.3"),
        "gamma9": ("own names alone, gamma .9", f"{CALIBRATED} --gamma 0.9"),
    },
    {
        "known AP50": (("lvis", "AP50 known"),),
        "unknown AP50": (("lvis", "AP50 unknown"),),
        UNCALIBRATED: (("lvis (no calibration)", "AP50 unknown"),),
        "lvis AP50": ap50("lvis"),
        AR: (("lvis (proposals)", "AR@100"),),
    },
    (
        Effect("partitioned", "separate", "lvis AP50", "one classifier beats one per dataset"),
        Effect("partitioned", "unified", "lvis AP50", "own names beat merged ones"),
        Effect("partitioned", "coupled", "lvis AP50", "decoupled training beats coupled"),
        Effect(
            "partitioned",
            "partitioned",
            "unknown AP50",
            "calibration of gamma .6 helps unknown classes",
            UNCALIBRATED,
        ),
        Effect("partitioned", "gamma3", "unknown AP50", "gamma .6 beats .3", ours=True),
        Effect("partitioned", "gamma9", "unknown AP50", "gamma .6 beats .9", ours=True),
    ),
    "unidetector.md",
    "`lvis` was never trained on; its classes are known if a training dataset has the name. Gamma "
    "is .6 where no other is named. Calibration multiplies the scores of a class by one number, so "
    "it changes which detections are among the 300 of an image, and no ranking within a class. The "
    "localizer has 250 steps, the classifier 450, and the coupled network 450, scored like the "
    "others. The paper's coupled baseline has a plain RPN, and uses neither objectness nor "
    "calibration. One classifier of own names is better than the other two in the mean, but by no "
    "more than seeds differ.",
)

PAIR = "--datasets coco,oid"
MERGED = f"unidet.py {PAIR}"
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
        "shuffled": (
            "retrained, the learned merges shuffled",
            f"-m benchmarks.claims.unidet_shuffled {PAIR} --stage unified"
            " --label-space {learned}/label_space.csv",
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
        Effect("unified", "names", BOTH, "learned merges beat equal names", ours=True),
        Effect("unified", "text", BOTH, "learned merges beat similar names", ours=True),
        Effect("unified", "shuffled", BOTH, "learned merges beat shuffled ones", ours=True),
        Effect("partitioned", "learned", BOTH, "merging the heads without training costs some AP"),
        Effect(
            "unified", "learned", BOTH, "retraining on the learned merges beats merging the heads"
        ),
    ),
    "unidet.md",
    "The retrained detectors start anew and take as many steps as the partitioned one. As in the "
    "paper, merges are chosen on the images that are evaluated, which favours the learned ones. "
    "But a class has few boxes there, and most of the learned merges are wrong. Few classes are "
    "merged, so merging the heads and training again change little. Names are strong rivals: "
    "most classes that are one have the same name. Similar names have a cosine of MiniLM's "
    "embeddings of .85 or more, the best threshold in hindsight; a class is in one pair at most. "
    "The official unified detector is better than the partitioned one by .1 to .3 points with the "
    "shorter training, and with the longer one no better.",
)

PARTS = "category_extended.py --datasets cityscapes-common,cityscapes-rare"
PARTS += " --eval-datasets cityscapes-common"
MINED = f"{PARTS} --pseudo-boxes {{whole}}"
NOT_OWN = "AP50 of unannotated classes"
CATEGORY_EXTENDED = Study(
    "category_extended",
    "What supervises objects that a dataset does not annotate?",
    {
        "plain": ("all else is background", f"{PARTS} --stage first --negatives plain"),
        "aware": (
            "negatives: boxes of other classes (2001.04621)",
            f"{PARTS} --stage first --negatives dataset_aware",
        ),
        "first": ("negatives without a conflict", f"{PARTS} --stage first"),
        "full": ("mined boxes, all else background", f"{MINED} --pseudo-negatives plain"),
        "positives": (
            "mined boxes, negatives without a conflict",
            f"{MINED} --pseudo-negatives conflict_free",
        ),
        "unmined": ("no mined boxes, weighted background", f"{MINED} --least-confidence 1"),
        "whole": ("mined boxes, weighted background", PARTS),
    },
    {
        "own AP50": (("cityscapes-common", "AP50 own"),),
        NOT_OWN: (("cityscapes-common", "AP50 elsewhere"),),
    },
    (
        Effect("aware", "plain", NOT_OWN, "the loss of 2001.04621 beats plain training"),
        Effect("first", "plain", NOT_OWN, "conflict-free negatives beat plain training"),
        Effect("first", "aware", NOT_OWN, "conflict-free negatives beat those of 2001.04621"),
        Effect("whole", "first", NOT_OWN, "the second training helps"),
        Effect(
            "positives",
            "first",
            NOT_OWN,
            "mined boxes help beside conflict-free negatives",
            ours=True,
        ),
        Effect("whole", "positives", NOT_OWN, "weighted background helps the second training"),
        Effect("whole", "full", NOT_OWN, "weighted background beats full background"),
        Effect(
            "whole", "unmined", NOT_OWN, "mined boxes help beside weighted background", ours=True
        ),
        Effect(
            "unmined", "whole", "own AP50", "mined boxes cost some AP of own classes", ours=True
        ),
    ),
    "category_extended.md",
    "The training images of `cityscapes-common` show the unannotated classes, too. "
    "A first training mines the boxes, and a second one of as many steps begins anew: so the "
    "variants with mined boxes all have the same boxes. Objects of these images hardly ever lie in "
    "the box of another. So the conflict that 2001.04621 leaves is rare here. The later paper's "
    "first training leaves out many correct negatives, which probably makes it worse. Mined boxes "
    "add positives. Conflict-free negatives are few, and mined boxes add none: this may be why "
    "they do not help there. The minutes of `mined boxes, weighted "
    "background` are of both trainings and the mining.",
)

FINE = "groupsoftmax.py --datasets coco --eval-datasets coco"
COARSE = "groupsoftmax.py --datasets coco,oid-top --eval-datasets coco,oid-top,oid --steps 300"
GROUPSOFTMAX = Study(
    "groupsoftmax",
    "What does a coarse class teach of its finer ones?",
    {
        "coco": ("coco alone", f"{FINE} --steps 300"),
        "shorter": ("coco alone, 200 steps", f"{FINE} --steps 200"),
        "plain": ("coco and oid-top, plain softmax", f"{COARSE} --groups plain"),
        "groups": ("coco and oid-top, softmax over groups", COARSE),
    },
    {
        "coco AP50": ap50("coco"),
        "oid-top AP50": ap50("oid-top"),
        "fine AP50 where labels are coarse": (("oid", "AP50 fine"),),
    },
    (
        Effect("groups", "shorter", "coco AP50", "a second dataset helps coco"),
        Effect(
            "groups",
            "coco",
            "coco AP50",
            "a second dataset helps coco even in as many steps",
            ours=True,
        ),
        Effect("groups", "plain", "coco AP50", "groups help the fine dataset"),
        Effect("groups", "plain", "oid-top AP50", "groups help the coarse dataset"),
        Effect("groups", "plain", "fine AP50 where labels are coarse", "groups find fine classes"),
    ),
    "groupsoftmax.md",
    "In 300 steps with `oid-top`, coco is seen as often as in 200 steps alone, and less often than "
    "in 300 steps alone. A dozen classes of coco have another name in Open Images, so the table "
    "does not know their coarse class: a box of Animal on a cow then counts against cow. There "
    "is no paper. The official README has COCO AP 38.6 alone, and 39.3 with as many epochs of COCO "
    "and traffic signs, whose classes are others.",
)

DOMAINS = "--datasets coco,o365,oid"
MEAN = "mean AP50"
DOMAIN_ATTENTION = Study(
    "domain_attention",
    "Do adapters that the image chooses help a shared backbone?",
    {
        "without": ("one backbone, no adapters", f"domain_attention.py {DOMAINS} --no-attention"),
        "fixed": (
            "gates that are the same for all images",
            f"-m benchmarks.claims.domain_attention_fixed {DOMAINS}",
        ),
        "one": ("one adapter a block", f"domain_attention.py {DOMAINS} --adapters 1"),
        "bank": (
            "a bank of adapters a block, mixed by the image",
            f"domain_attention.py {DOMAINS}",
        ),
    },
    {
        "coco AP50": ap50("coco"),
        "o365 AP50": ap50("o365"),
        "oid AP50": ap50("oid"),
        MEAN: ap50("coco", "o365", "oid"),
    },
    (
        Effect("bank", "without", MEAN, "a bank of adapters helps"),
        Effect("one", "without", MEAN, "one adapter a block helps", ours=True),
        Effect("bank", "one", MEAN, "a bank beats one adapter", ours=True),
        Effect("fixed", "without", MEAN, "gates that are the same for all images help", ours=True),
        Effect(
            "bank",
            "fixed",
            MEAN,
            "gates that the image chooses beat gates that are the same",
            ours=True,
        ),
    ),
    "domain_attention.md",
    "The gates of this small network hardly depend on the image or its dataset: its maps are "
    "narrow, an adapter has 1 to 12 hidden neurons, and a few hundred steps move it little. With "
    "gates that are the same for all images the gain stays, so it does not come from what the "
    "image chooses. All gates multiply each residual branch by about .9. That this explains the "
    "gain is a guess, and one adapter a block has such gates, too, and gains less. Seeds differ "
    "more than the variants with gates do. Officially adapters start from a trained SE-ResNet. The "
    "paper also compares with a detector per dataset; that comparison is not made here.",
)

PLAIN = "plaindet.py --datasets coco,lvis,oid"
CONTROL = f"{PLAIN} --queries-from boxes --sampling size"
# the weights of --sampling hardness where all losses are equal, from the sizes of the datasets
EQUAL = "--sampling size --dataset-ratios coco=123,lvis=100,oid=100"
PLAINDET = Study(
    "plaindet",
    "What do text classifiers, composed queries and sampling by hardness add?",
    {
        "joint": (
            "one linear classifier, classes of other datasets negative",
            f"{CONTROL} --classifier joint",
        ),
        "heads": ("a linear classifier per dataset", f"{CONTROL} --classifier heads"),
        "text": ("text classifier, plain queries", CONTROL),
        "hub": (
            "text classifier, queries of Detection Hub",
            f"{PLAIN} --queries-from text_dataset --sampling size",
        ),
        "queries": ("text classifier, composed queries", f"{PLAIN} --sampling size"),
        "equal": ("composed queries, small datasets sampled more", f"{PLAIN} {EQUAL}"),
        "whole": ("composed queries, sampling by hardness", PLAIN),
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
        Effect("whole", "equal", MEAN, "it is the hardness that helps, not the sizes", ours=True),
    ),
    "plaindet.md",
    "Sampling by hardness also draws small datasets more often. `small datasets sampled more` has "
    "the shares that it would have if all datasets were equally hard: `coco` is drawn a quarter "
    "less. The datasets are nearly equally hard here, so hardness has little to say. Composed and "
    "adapted queries have no positions, as in the official code, which may be why they do not "
    "help in short trainings. A text classifier compares unit vectors as wide as the text, a "
    "linear one does not, which may be a part of its gain. A linear classifier for all datasets "
    "learns shared names from all of them, and other names as negatives; neither tells here. The "
    "calibration of the text is off, as it would make MiniLM's texts more alike.",
)

OMDET = Study(
    "omdet",
    "Do task tokens in the decoder help, and does a second dataset?",
    {
        "none": ("no task tokens in the decoder", f"omdet.py {TWO} {UNSEEN} --fusion none"),
        "merged": ("task tokens beside the queries", f"omdet.py {TWO} {UNSEEN}"),
        "o365": ("task tokens, o365 alone", f"omdet.py --datasets o365 {UNSEEN}"),
        "coco_short": (
            "task tokens, coco alone, 450 steps",
            f"omdet.py --datasets coco {UNSEEN} --steps 450",
        ),
        "o365_short": (
            "task tokens, o365 alone, 450 steps",
            f"omdet.py --datasets o365 {UNSEEN} --steps 450",
        ),
    },
    SCALEDET.columns,
    (
        Effect("merged", "none", TRAINED, "task tokens in the decoder help"),
        Effect("merged", "coco_short", "coco AP50", "o365 helps coco"),
        Effect("merged", "o365_short", "o365 AP50", "coco helps o365"),
        Effect("merged", "o365", "o365 AP50", "coco helps o365 even in as many steps", ours=True),
        Effect("merged", "o365_short", LINEART, "coco and o365 beat o365 alone on lineart"),
        Effect("merged", "o365", LINEART, "both beat o365 in as many steps on lineart", ours=True),
    ),
    "omdet.md",
    "Where no steps are named there are 900. In 450 steps a dataset alone is seen about as often "
    "as in the pair, in 900 twice as often. The pair has twice the steps of the former, which may "
    "be all that it gains. Its gain on `coco` is not clear, as one of the seeds gains far more. "
    "The tokens are fused as in OmDet-Turbo. All variants select their queries and classify by "
    "the names, so the tokens probably need not tell them a second time.",
)

ASKED = "metr.py --datasets coco,cityscapes-instances"
METR = Study(
    "metr",
    "Must an object be matched to the queries of its own class, and does a second dataset help?",
    {
        "any": ("matched to any query", f"{ASKED} --matching any"),
        "group": ("matched within its class", ASKED),
        "coco": ("matched within its class, coco alone", "metr.py --datasets coco"),
        "shorter": (
            "matched within its class, coco alone, 800 steps",
            "metr.py --datasets coco --steps 800",
        ),
    },
    {
        "coco AP50": ap50("coco"),
        "cityscapes AP50": ap50("cityscapes-instances"),
        MEAN: ap50("coco", "cityscapes-instances"),
    },
    (
        Effect("group", "any", MEAN, "matching within the class is needed", ours=True),
        Effect("group", "shorter", "coco AP50", "a second dataset helps coco", ours=True),
        Effect(
            "group",
            "coco",
            "coco AP50",
            "a second dataset helps coco even in as many steps",
            ours=True,
        ),
    ),
    "metr.md",
    "Where any query may match, a query that is asked for one class is trained to accept objects "
    "of another. Where no steps are named there are 1200. In 800 steps coco alone is seen about as "
    "often as in the pair. The pair then has 400 steps more, which may be all that it gains: in as "
    "many steps, coco alone is better. All 7 classes of `cityscapes-instances` are coco's, drawn "
    "in other colours.",
)

DETECTORS = (SCALEDET, DETIC, UNIDETECTOR, UNIDET, CATEGORY_EXTENDED, GROUPSOFTMAX)
DETECTORS += (DOMAIN_ATTENTION, PLAINDET, OMDET, METR)
