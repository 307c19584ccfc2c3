"""Makes classifiers of pictures, of text, or of both: a table .npy with a row for each class.

    python -m common.exemplars FOLDER --out mine.npy             # a folder of pictures per class
    python -m common.exemplars lvis,in-l --classes lvis --data-root DATA --out lvis.npy
    python -m common.exemplars FOLDER --aggregator visual_aggregator.pth --out mine.npy
    python -m common.exemplars lvis,in-l --classes lvis --text descriptions.json --out both.npy
    python -m common.exemplars --classes lvis --text descriptions.json --out text.npy
    python -m common.exemplars in21k --train --out aggregator.safetensors

--text-encoder DATASET=TABLE.npy trains and evaluates with the table. A row is the mean of CLIP's
features of a few pictures of the class, or what an aggregator makes of them. The names of the rows
are written beside the table, TABLE.txt, one a line in the order of the rows.

After Multi-Modal Classifiers for Open-Vocabulary Object Detection (arXiv 2306.05493); source:
prannaykaul/mm-ovod:tools/{sample_exemplars,get_exemplars_tta,generate_vision_classifier_agg,
dump_clip_features_lvis_sentences,norm_feat_sum_norm}.py.
"""

import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from common import aggregator
from common.command import COUNT, Range, check_ranges, run_command
from common.datasets import load_datasets
from common.datasets.known import ALIASES, KNOWN
from common.errors import InputError
from common.files import atomic_path
from common.labels import Vocabulary, fold, quoted
from common.pictures import Picture, Pool, Views, draw, encode, load_tower
from common.text import PROMPTS, embed, load_clip

# Shapes: C classes of the table, P pictures of a class, V views of a picture, D width of a feature.

log = logging.getLogger("concord")
TINY_SIZE = 192  # pixels; that of the detectors, so that they share one set of generated images
KINDS = ("boxes", "instances", "image_labels")
CONTEXT = {"mean": 0.4, "aggregator": 0.2}  # of a box's sides, added around it
TRAINED_ON = 50  # pictures of a class, at most, that an aggregator is trained on


@dataclass
class Args:
    pictures: Annotated[str, tyro.conf.Positional] = ""
    """a folder with a sub-folder of pictures per class, or datasets as in --datasets, by commas"""
    out: str = ""
    """the table to write, .npy; with --train the aggregator, .safetensors"""
    classes: str = ""
    """the rows: a dataset, "cat, dog" or a .txt file; empty: all classes of the pictures"""
    data_root: str = ""
    """folder of the datasets; empty: $DETECTRON2_DATASETS, else ./data"""
    tiny: bool = False
    """generated stand-ins of the datasets"""
    encoder: str = "ViT-B-32/openai"
    """open_clip MODEL/PRETRAINED, or lite0: ImageNet features, offline, centred over the classes"""
    per_class: Annotated[int, Range(1)] = 5
    """pictures of a class, drawn by the area of their boxes; fewer if there are fewer"""
    views: Annotated[int, COUNT] = 5
    """random crops, flips and colours of a picture; 0: the picture itself"""
    aggregator: str = ""
    """weights of a visual aggregator, the published ones or those of --train; empty: the mean"""
    text: str = ""
    """added to the pictures: a .npy table, descriptions {name: [sentences]} in a .json, or prompts
    of the names: imagenet, a, photo, name"""
    train: bool = False
    """train a visual aggregator on the pictures"""
    steps: Annotated[int, COUNT] = 1000
    """steps of --train"""
    lr: Annotated[float, Range(above=0)] = 1e-4
    """learning rate of --train, falls by half a cosine to 0"""
    workers: Annotated[int, COUNT] = 4
    """processes that read pictures"""
    seed: Annotated[int, COUNT] = 42
    """seed of the pictures drawn, of their views and of --train"""


# -- Pictures --------------------------------------------------------------------------------------


def choose(args: Args) -> tuple[Vocabulary, list[list[Picture]]]:
    """Returns the classes of the table and the pictures of each.

    Raises InputError as `load_datasets`, and for a class without a picture; --train leaves it out.
    """
    entries = args.pictures
    if os.path.isdir(os.path.expanduser(entries)):
        entries = f"pictures={os.path.expanduser(entries)}"
    size = TINY_SIZE if args.tiny else 0
    datasets = load_datasets(entries, "train", args.data_root, size, accepts=KINDS, check=False)
    pools = list(map(Pool, datasets))
    vocabulary = classes_of(args)
    if vocabulary is None:
        names = {}
        for name in (name for dataset in datasets for name in dataset.vocabulary.names):
            names.setdefault(fold(name), name)
        vocabulary = Vocabulary("pictures", tuple(names.values()))
    count = TRAINED_ON if args.train else args.per_class
    chosen = [draw(pools, name, count, args.seed) for name in vocabulary.names]
    if args.train:
        chosen = list(filter(None, chosen))
    elif bare := [name for name, found in zip(vocabulary.names, chosen) if not found]:
        raise InputError(
            f"{args.pictures} has no picture of {quoted(bare)}; add pictures, or name the classes "
            "that have some with --classes"
        )
    fewer = sum(len(pictures) < args.per_class for pictures in chosen)
    message = "%d pictures of %d classes; %d classes have fewer than %d"
    log.info(message, sum(map(len, chosen)), len(chosen), fewer, args.per_class)
    return vocabulary, chosen


def classes_of(args: Args) -> Vocabulary | None:
    """Returns the classes of --classes in their order; None if it is not given."""
    name = args.classes.partition(":")[0].strip()
    if not name:
        return None
    if "=" in args.classes or ALIASES.get(name, name) in KNOWN:
        size = TINY_SIZE if args.tiny else 0
        of = load_datasets(args.classes, "train", args.data_root, size, accepts=KINDS, check=False)
        return of[0].vocabulary
    return Vocabulary.parse(args.classes, source="--classes")


def picture_features(args: Args, chosen: list[list[Picture]]) -> list[Tensor]:
    """Returns the features (P, V, D) of each class's pictures, not normalised."""
    tower = load_tower(args.encoder)
    context = CONTEXT["aggregator" if args.aggregator or args.train else "mean"]
    views = Views(chosen, tower, context, args.views, args.seed)
    return encode(tower, views, min(args.workers, os.cpu_count() or 1))


# -- Tables ----------------------------------------------------------------------------------------


def image_rows(args: Args, features: list[Tensor]) -> Tensor:
    """Returns the rows (C, D) of classes with features (P, V, D): their mean, or aggregated.

    The features of lite0, which are all positive, are centred: the mean of the rows is taken off.
    """
    flat = [f.flatten(0, 1) for f in features]  # (P V, D) each
    if args.aggregator:
        model = aggregator.load_aggregator(args.aggregator, flat[0].shape[-1])
        with torch.no_grad():
            return torch.cat([model(f[None]) for f in flat])
    rows = torch.stack([f.mean(0) for f in flat])
    return rows - rows.mean(0) if args.encoder == "lite0" else rows


def text_rows(args: Args, names: tuple[str, ...]) -> Tensor:
    """Returns the rows (C, D) of --text, of norm 1. Raises InputError if it cannot be made."""
    if args.text.endswith(".npy"):
        return embed(names, args.text)
    if args.encoder == "lite0":
        raise InputError("--encoder lite0 has no text; give --text a .npy table, or use open_clip")
    if args.text.endswith(".json"):
        return description_rows(Path(args.text).expanduser(), args.encoder, names)
    if args.text not in PROMPTS:
        raise InputError(
            f"--text {args.text}: give a .npy table, a .json of descriptions, or one of "
            f"{', '.join(PROMPTS)}"
        )
    return embed(names, args.encoder, args.text)


@torch.no_grad()
def description_rows(file: Path, encoder: str, names: tuple[str, ...]) -> Tensor:
    """Returns the mean embedding of each class's sentences, (C, D) of norm 1.

    file: json {class name: [sentences]}. The embeddings are not normalised before their mean.
    Raises InputError for a file that is not so, and for a class without a sentence.
    """
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        sentences = {fold(name): list(map(str.strip, texts)) for name, texts in record.items()}
    except (OSError, ValueError, RecursionError, AttributeError, TypeError) as error:
        raise InputError(
            f"--text {file} cannot be read ({error}); give json, {{class name: [sentences]}}"
        ) from None
    if bare := [name for name in names if not sentences.get(fold(name))]:
        raise InputError(f"--text {file} has no sentence for {quoted(bare)}; add some")
    model, tokenizer = load_clip(encoder, "--encoder", "lite0")
    device = model.logit_scale.device
    rows = []
    for name in names:
        tokens = tokenizer(sentences[fold(name)])  # what is too long is cut
        rows.append(model.encode_text(tokens.to(device)).float().mean(0).cpu())
    return F.normalize(torch.stack(rows), dim=-1)


def fuse(text: Tensor, image: Tensor) -> Tensor:
    """w = norm(norm(w_text) + norm(w_image)): text and image (C, D), result (C, D) of norm 1.

    Raises InputError if their widths differ.
    """
    if text.shape != image.shape:
        raise InputError(
            f"--text has rows of width {text.shape[-1]}, the pictures {image.shape[-1]}; take both "
            "from one CLIP"
        )
    return F.normalize(F.normalize(text, dim=-1) + F.normalize(image, dim=-1), dim=-1)


def build_table(args: Args) -> tuple[tuple[str, ...], Tensor]:
    """Returns C class names and their rows (C, D) of norm 1, of pictures, --text, or both."""
    if not args.pictures:
        vocabulary = classes_of(args)
        if not args.text or vocabulary is None:
            raise InputError("name pictures, or --text and --classes; --help says what they are")
        return vocabulary.names, text_rows(args, vocabulary.names)
    vocabulary, chosen = choose(args)
    text = text_rows(args, vocabulary.names) if args.text else None  # fails before the pictures
    rows = image_rows(args, picture_features(args, chosen))
    lengths = rows.norm(dim=-1)
    if not (torch.isfinite(lengths).all() and lengths.all()):
        raise InputError("the features of a class are zero or not finite; give other pictures")
    return vocabulary.names, F.normalize(rows, dim=-1) if text is None else fuse(text, rows)


def write_table(path: Path, names: tuple[str, ...], rows: Tensor) -> None:
    """Writes the rows to `path`, and their names beside it, with the ending .txt."""
    with atomic_path(path.with_suffix(".txt")) as temporary:
        temporary.write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
    with atomic_path(path) as temporary:
        np.save(temporary, rows.numpy().astype(np.float32))
    log.info("%s: %d rows of width %d", path, *rows.shape)


def main() -> None:
    """Writes a table, or with --train an aggregator."""
    args = tyro.cli(Args, prog="python -m common.exemplars", description=__doc__)
    check_ranges(args)
    ending = ".safetensors" if args.train else ".npy"
    out = Path(args.out).expanduser()
    if out.suffix != ending:
        raise InputError(f"--out '{args.out}': give the name of the file to write, *{ending}")
    if not args.train:
        write_table(out, *build_table(args))
        return
    _, chosen = choose(args)
    features = picture_features(args, chosen)
    torch.manual_seed(args.seed)
    model = aggregator.train(features, args.per_class, args.steps, args.lr)
    with atomic_path(out) as temporary:
        save_file(model.state_dict(), temporary)
    log.info("%s: an aggregator of features of width %d", out, features[0].shape[-1])


if __name__ == "__main__":
    run_command(main)
