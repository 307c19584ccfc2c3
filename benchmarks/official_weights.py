"""The table of official checkpoints in docs/official-weights.md: which ones load, and for what.

Tensors of the official names and shapes, without values, are converted and compared with the model
that the converted settings make. No file is downloaded.

    python benchmarks/official_weights.py    # writes docs/official-weights.md
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from types import ModuleType

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import dataseg
import detic
import lmseg
import oneformer
import scaledet
import unidet
import unidetector
from benchmarks import mask2former_layouts, oneformer_layouts
from benchmarks import official_layouts as layouts
from benchmarks.official_layouts import Layout, tensors
from common.clip_resnet import CLIPResNetC4, load_by_prefix
from common.convert import join
from common.errors import InputError
from common.labels import LabelSpace, Vocabulary

PAGE = Path(__file__).resolve().parent.parent / "docs" / "official-weights.md"
HEAD = """# Official weights

Written by `python benchmarks/official_weights.py`: it converts tensors of the official names and
shapes, and compares them with the model. No code in a file runs, and a converted file is kept in
the cache. A file of any other kind is refused with one line.

*evaluates*: `--eval-only` and `--predict` work, with the settings of the official configuration and
the text embeddings or the class head in the file; a training can start from it, too. *trains*:
only that.
"""

Files = dict[str, Layout]  # the files of one row, {name: layout}
Check = Callable[[Files], str]  # what a command can do with the files; raises InputError


@dataclass
class Family:
    """One table: a row for each file, or for files that belong together, a column a command."""

    source: str  # where the files are listed
    commands: dict[str, Check]
    rows: dict[str, list[Callable[[], Layout]]]  # names by commas, a layout for each


# -- Commands --------------------------------------------------------------------------------------


@lru_cache
def shapes(method: ModuleType, settings: tuple, classes: tuple) -> dict[str, torch.Size]:
    """Returns {tensor: shape} of the method's model with these settings and datasets.

    classes: (dataset, number of classes, width of the text, 0 for none) of each dataset
    """
    vocabularies = []
    for dataset, count, width in classes:
        text = torch.zeros(count, width) if width else None
        names = tuple(map(str, range(count)))
        vocabularies.append(Vocabulary(dataset, names, text=text))
    with torch.device("meta"):
        args = method.Args(**dict(settings))
        model = method.Model(args, LabelSpace(vocabularies), pretrained=False)
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def convert(method: ModuleType, files: Files) -> tuple[dict, dict]:
    """Returns the converted tensors and the metadata of the files, all of which fit the model.

    Raises InputError as the conversion does, and AssertionError if a tensor does not fit.
    """
    parts = [method.OFFICIAL(tensors(layout), name) for name, layout in files.items()]
    converted, metadata = join(parts) if len(parts) > 1 else parts[0]
    if lacks := metadata.pop("lacks", ""):
        raise InputError(lacks)
    classes = []
    for dataset, record in metadata["vocabularies"].items():
        text = converted.pop(f"label_space.{dataset}", None)
        width = 0 if text is None else text.shape[1]
        classes.append((dataset, len(record["names"]), width))
    found = {name: tensor.shape for name, tensor in converted.items()}
    settings = metadata["args"] | metadata.get("own_head", {})
    wanted = shapes(method, tuple(settings.items()), tuple(classes) or (("any", 1, 8),))
    if not classes:
        wanted = {name: shape for name, shape in wanted.items() if is_base(name, metadata)}
    assert found == wanted, sorted(found.items() ^ wanted.items())[:4]
    return converted, metadata


def is_base(name: str, metadata: dict) -> bool:
    """Tells if a tensor is of the model without its classifier. metadata: of converted weights"""
    return "base" not in metadata or name.partition(".")[0] in metadata["base"]


def segments(method: ModuleType, files: Files) -> str:
    """Says which classes a segmenter has, and with which backbone."""
    _, metadata = convert(method, files)
    if not metadata["vocabularies"]:
        return "trains"
    record = next(iter(metadata["vocabularies"].values()))
    datasets = " or ".join(metadata["vocabularies"])
    backbone = metadata["args"]["backbone"]
    return f"evaluates ({backbone}; {len(record['names'])} classes of {datasets})"


def detects(files: Files) -> str:
    """Says which classes a Detic has, and with which backbone."""
    _, metadata = convert(detic, files)
    [(dataset, record)] = metadata["vocabularies"].items()
    count, boxed = len(record["names"]), len(metadata["boxed"])
    novel = f", {count - boxed} of them novel" * (boxed < count)
    return f"evaluates ({metadata['args']['backbone']}; {count} classes of {dataset}{novel})"


def starts(method: ModuleType, files: Files) -> str:
    """Says that a training can start from the files."""
    convert(method, files)
    return "trains"


def locates(files: Files) -> str:
    """Says what a UniDetector detects."""
    _, metadata = convert(unidetector, files)
    if metadata["args"].get("stage") == "localizer":
        return "evaluates (proposals alone), and trains a classifier"
    [(dataset, record)] = metadata["vocabularies"].items()
    note = ", without proposals of its own" * (
        "rpn_head.rpn_cls.weight" in list(files.values())[-1]
    )
    return f"evaluates ({len(record['names'])} classes of {dataset}{note})"


def encodes(files: Files) -> str:
    """Says with which CLIP ResNet a file starts a classifier; "" for two files."""
    if len(files) > 1:
        return ""
    [(name, layout)] = files.items()
    model = "RN50x4" if "x4" in name.lower() else "RN50"
    with torch.device("meta"):
        encoder = CLIPResNetC4(model, pretrained=False)
    load_by_prefix(encoder, tensors(layout), name)
    return f"trains ({model}/FILE, `--text-encoder {model}/openai`)"


# -- Files -----------------------------------------------------------------------------------------

FAMILIES: dict[str, Family] = {}


def detic_rows() -> dict[str, list[Callable[[], Layout]]]:
    """Returns the rows of Detic's model zoo."""
    rows = {}
    for data in ("Lbase", "L"):
        for backbone, size in (("R5021k", "640b64"), ("SwinB", "896b32")):
            build = partial(layouts.detic, "SwinB" if "Swin" in backbone else "R50")
            tail = f"CLIP_{backbone}_{size}_4x"
            rows[f"BoxSup-C2_{data}_{tail}"] = [build]
            rows[f"Detic_{data}I_{tail}_ft4x_max-size"] = [build]
    tail = "CLIP_R5021k_640b64_4x_ft4x_max-size"
    rows[f"Detic_LbaseCCimg_{tail}"] = [partial(layouts.detic, "R50")]
    rows[f"Detic_LbaseCCcapimg_{tail}"] = [partial(layouts.detic, "R50", captions=True)]
    rows["BoxSup-C2_LCOCO_CLIP_SwinB_896b32_4x"] = [partial(layouts.detic, "SwinB")]
    for data, backbone in [
        ("LI21k", "SwinB_896b32"),
        ("LCOCOI21k", "SwinB_896b32"),
        ("LCOCOI21k", "R5021k_640b32"),
        ("LCOCOI21k", "R18_640b32"),
    ]:
        kind = backbone.partition("_")[0].replace("R5021k", "R50")
        name = f"Detic_{data}_CLIP_{backbone}_4x_ft4x_max-size"
        rows[name] = [partial(layouts.detic, kind, 22047)]
    rows["Detic_LCOCOI21k_CLIP_CXT21k_640b32_4x_ft4x_max-size"] = [layouts.detic_convnext]
    for name in ("BoxSup-DeformDETR_L_R50_4x", "Detic_DeformDETR_LI_R50_4x_ft4x"):
        rows[name] = [layouts.detic_deformable]
    for name in ("BoxSup", "Detic"):
        losses = [""] if name == "BoxSup" else ["_max-size", "_caption", "_max-size_caption"]
        for loss in losses:
            rows[f"{name}_OVCOCO_CLIP_R50_1x{loss}"] = [layouts.detic_c4]
    return {f"{name}.pth": row for name, row in rows.items()}


FAMILIES["Detic"] = Family(
    "facebookresearch/Detic:docs/MODEL_ZOO.md",
    {"detic.py --weights FILE": detects, "scaledet.py --weights FILE": partial(starts, scaledet)},
    detic_rows(),
)
FAMILIES["CenterNet2"] = Family(
    "xingyizhou/CenterNet2:docs/MODEL_ZOO.md",
    {"detic.py --weights FILE": detects, "scaledet.py --weights FILE": partial(starts, scaledet)},
    {
        "CenterNet-S4_DLA_8x.pth": [layouts.centernet_one_stage],
        "CenterNet-FPN_R50_1x.pth": [layouts.centernet_one_stage],
        "CenterNet2-F_R50_1x.pth": [layouts.centernet2_faster],
        "CenterNet2_R50_1x.pth": [partial(layouts.centernet2, 80)],
        "CenterNet2_X101-DCN_2x.pth": [partial(layouts.centernet2, 80)],
        "CenterNet2_DLA-BiFPN-P3_4x.pth": [partial(layouts.centernet2, 80)],
        "CenterNet2_DLA-BiFPN-P3_24x.pth": [partial(layouts.centernet2, 80)],
        "CenterNet2_R2-101-DCN_896_4x.pth": [partial(layouts.centernet2, 80)],
        "CenterNet2_R2-101-DCN-BiFPN_1280_4x.pth": [partial(layouts.centernet2, 80)],
        "CenterNet2_R2-101-DCN-BiFPN_4x+4x_1560_ST.pth": [partial(layouts.centernet2, 80)],
        "CenterNet2_DLA-BiFPN-P5_640_24x_ST.pth": [partial(layouts.centernet2, 80)],
        "LVIS_CenterNet2_R50_1x.pth": [partial(layouts.centernet2, 1203)],
        "LVIS_CenterNet2_R50_Fed_1x.pth": [partial(layouts.centernet2, 1203)],
        "O365_CenterNet2_R50_1x.pth": [partial(layouts.centernet2, 365)],
    },
)
FAMILIES["UniDet"] = Family(
    "xingyizhou/UniDet:projects/UniDet/unidet_docs/REPRODUCE.md; [unidet.md](unidet.md) says what"
    " is read of it",
    {"unidet.py --weights FILE": partial(starts, unidet)},
    {
        f"{name}.pth": [layouts.unidet]
        for name in (
            *(f"Partitioned_COI_R50_{schedule}" for schedule in ("2x", "6x", "8x")),
            "Partitioned_COIM_R50_6x+2x",
            "Partitioned_COI_RS101_2x",
            "Unified_human_COI_R50_2x",
            *(f"Unified_learned_COI_R50_{schedule}" for schedule in ("2x", "6x", "8x")),
            "Unified_learned_COIM_R50_6x+2x",
            "Unified_learned_COI_RS200_6x",
            "Unified_learned_COIM_RS200_6x+2x",
        )
    },
)
FAMILIES["UniDetector"] = Family(
    "zhenyuw16/UniDetector:README.md, the three models trained on COCO",
    {
        "unidetector.py --weights FILE": locates,
        "unidetector.py --classifier-backbone RN50/FILE": encodes,
    },
    {
        "FIRST.pth": [layouts.localizer],
        "SECOND.pth": [layouts.classifier],
        "END2END.pth": [layouts.end_to_end],
        "FIRST.pth,SECOND.pth": [layouts.localizer, layouts.classifier],
        "FIRST.pth,END2END.pth": [layouts.localizer, layouts.end_to_end],
    },
)
FAMILIES["RegionCLIP"] = Family(
    "microsoft/RegionCLIP:docs/MODEL_ZOO.md, and its converted file at zhenyuw16/UniDetector",
    {"unidetector.py --classifier-backbone MODEL/FILE": encodes},
    {
        "regionclip_pretrained-cc_rn50.pth": [layouts.regionclip],
        "regionclip_pretrained-cc_rn50x4.pth": [partial(layouts.regionclip, "RN50x4")],
        "regionclip_pretrained-cc_rn50_mmdet.pth": [layouts.classifier],
        **{
            f"regionclip_finetuned-{data}_{model.lower()}.pth": [
                partial(layouts.regionclip, model, "roi_heads.box_predictor.")
            ]
            for data in ("coco", "lvis")
            for model in ("RN50", "RN50x4")
        },
        **{
            f"teacher_{model}_student_{model}_OAI_CLIP.pth": [
                partial(layouts.regionclip, model, "teacher_backbone.")
            ]
            for model in ("RN50", "RN50x4")
        },
        **{
            f"rpn_{data}.pth": [layouts.regionclip_rpn]
            for data in ("coco_48", "coco_65", "coco_80", "lvis_866", "lvis_866_lsj")
        },
    },
)


def mask2former_rows() -> dict[str, list[Callable[[], Layout]]]:
    """Returns the rows of Mask2Former's zoo, with their published figures."""
    rows = {}
    for task, backbones in mask2former_layouts.ZOO.items():
        for backbone, (file, figure) in backbones.items():
            given = mask2former_layouts.settings(task, backbone)
            build = partial(mask2former_layouts.layout, **given)
            rows[f"{task} {figure}: model_final_{file}.pkl"] = [build]
    return rows


FAMILIES["Mask2Former"] = Family(
    "facebookresearch/Mask2Former:MODEL_ZOO.md, with the published PQ, mask AP or mIoU (one scale);"
    " [lmseg.md](lmseg.md) says how it is evaluated",
    {
        "lmseg.py --weights FILE": partial(segments, lmseg),
        "dataseg.py --weights FILE": partial(starts, dataseg),
    },
    mask2former_rows(),
)


def oneformer_rows() -> dict[str, list[Callable[[], Layout]]]:
    """Returns the rows of OneFormer's zoo, with their published figures, and of a ResNet-50."""
    build = oneformer_layouts.layout
    rows = {"ade20k: a ResNet-50": [partial(build, "R50", 150)]}
    for dataset, backbones in oneformer_layouts.ZOO.items():
        for backbone, files in backbones.items():
            for file, figure in files.items():
                given = oneformer_layouts.settings(dataset, file)
                rows[f"{dataset} {figure}: {file}.pth"] = [partial(build, backbone, **given)]
    return rows


FAMILIES["OneFormer"] = Family(
    "SHI-Labs/OneFormer:README.md, with the published PQ; [oneformer.md](oneformer.md) says how it"
    " is evaluated. Files with a ConvNeXt or a DiNAT are refused",
    {"oneformer.py --weights FILE": partial(segments, oneformer)},
    oneformer_rows(),
)

# -- Page ------------------------------------------------------------------------------------------


def result(check: Check, name: str, row: list[Callable[[], Layout]]) -> str:
    """Returns what the command can do with the files of a row, or why it refuses them."""
    names = [Path(part).stem for part in name.split(",")]
    files = {part: build() for part, build in zip(names, row, strict=True)}
    try:
        return check(files)
    except InputError as error:
        reason = str(error).split(", which is not")[0].split(";")[0]
        return "refused: " + reason.removeprefix("they are of ")


def line(family: Family, name: str) -> str:
    """Returns the line of a row in the table of its family."""
    cells = [result(check, name, family.rows[name]) for check in family.commands.values()]
    return f"| `{name}` | {' | '.join(cells)} |"


def page() -> str:
    """Returns the whole page."""
    text = HEAD
    for title, family in FAMILIES.items():
        commands = [f"`{command}`" for command in family.commands]
        text += f"\n## {title}\n\n{family.source}\n\n| file | {' | '.join(commands)} |\n"
        text += "|---" * (1 + len(commands)) + "|\n"
        for name in family.rows:
            text += line(family, name) + "\n"
    return text


if __name__ == "__main__":
    PAGE.write_text(page())
    print(f"{PAGE}: {sum(len(family.rows) for family in FAMILIES.values())} rows")
