"""Text encoders that read learned tokens before a class name: frozen themselves, differentiable in the tokens."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.errors import InputError
from common.text import check_package, load_clip, load_minilm


class ContextEncoder:
    """n context tokens, learned elsewhere, go between the start token and the name: (n, width) -> (K, D).

    width: of the encoder's token embeddings; its weights are frozen and part of no model

    Raises InputError for .npy files, which have no encoder, and where the encoder cannot be had.
    Source: mightyzau/LMSeg:mask_former/modeling/text_heads/clip_text_encoder.py, after CoOp (arXiv 2109.01134).
    """

    def __init__(self, encoder: str, device: torch.device):
        if encoder.endswith(".npy"):
            raise InputError(f"--text-encoder {encoder} is a file, which cannot read context tokens; name an encoder")
        self.clip, self.device = encoder != "minilm", device
        if not self.clip:
            check_package("learned context (--context-tokens 0 needs none)")
        self.model, self.tokenizer = load_clip(encoder) if self.clip else load_minilm()
        self.model = self.model.to(device).requires_grad_(False).eval()
        if self.clip and not isinstance(getattr(self.model, "text_projection", None), nn.Parameter):
            raise InputError(f"--text-encoder {encoder}: only CLIP has a text transformer that reads context; name one")
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
        x = model.ln_final(model.transformer(x, attn_mask=model.attn_mask[: x.shape[1], : x.shape[1]]))
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
