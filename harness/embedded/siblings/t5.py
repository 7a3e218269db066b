"""A T5 encoder for the embedded Flux and PixArt, which says what the two CLIP encoders of the embedded SD3 say.

Its words are single pieces, any other word is the unknown piece, and it learns by regression on the features of the trained CLIP
encoders: piece i of T5 is word i of the caption, and word i + 1 of CLIP, which has a start mark. With and without a mask over the
padding, because PixArt gives one and Flux does not.
"""

from __future__ import annotations

import logging

import torch
from diffusers import StableDiffusion3Pipeline
from torch import Tensor
from torch.nn import functional as F
from transformers import T5Config, T5EncoderModel, T5TokenizerFast

from harness.data.emoji import all_captions
from harness.embedded.emoji_text import MAX_LENGTH, hide_words, token_ids

log = logging.getLogger(__name__)

STEPS, BATCH_SIZE, PEAK_RATE = 1000, 64, 2e-3
HIDDEN_SHARE = 0.02
MARK = "\N{LOWER ONE EIGHTH BLOCK}"
"""What sentencepiece writes for the space before a word."""


def build_tokenizer() -> T5TokenizerFast:
    """Every word of every caption is one piece; the end mark follows the last, then padding, as in any T5."""
    words = sorted({word for caption in all_captions() for word in caption.split()})
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), *((MARK + word, -1.0) for word in words)]
    return T5TokenizerFast(vocab=vocab, extra_ids=0, model_max_length=MAX_LENGTH)


def build_encoder(tokenizer: T5TokenizerFast, width: int) -> T5EncoderModel:
    """An untrained T5 encoder, 2 layers."""
    return T5EncoderModel(T5Config(
        vocab_size=len(tokenizer), d_model=width, d_kv=32, d_ff=2 * width, num_layers=2, num_heads=width // 32, dropout_rate=0.0,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id))


@torch.no_grad()
def wanted_features(pipe: StableDiffusion3Pipeline, ids: Tensor) -> Tensor:
    """(B, 16, D) of CLIP token ids (B, 16): both encoders' features from the first word on, each row of unit variance."""
    encoders = (pipe.text_encoder, pipe.text_encoder_2)
    features = torch.cat([encoder(ids, output_hidden_states=True).hidden_states[-2] for encoder in encoders], dim=-1)
    return F.layer_norm(torch.cat([features[:, 1:], features[:, -1:]], dim=1), features.shape[-1:])


def train_t5(pipe: StableDiffusion3Pipeline, steps: int = STEPS) -> tuple[T5EncoderModel, T5TokenizerFast]:
    """The encoder and its tokenizer; the share of the variance that is left over, on all captions, goes to the log."""
    torch.manual_seed(0)
    captions, tokenizer = [*all_captions(), ""], build_tokenizer()
    clip = token_ids(pipe.tokenizer, captions)
    pieces = tokenizer(captions, padding="max_length", max_length=MAX_LENGTH, truncation=True, return_tensors="pt").input_ids
    encoder = build_encoder(tokenizer, 2 * pipe.text_encoder.config.hidden_size)
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=PEAK_RATE, weight_decay=0.01)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_RATE, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        chosen = torch.randint(len(captions), (BATCH_SIZE,))
        hidden = hide_words(clip[chosen], pipe.tokenizer, HIDDEN_SHARE)
        found = hidden[:, 1:] == pipe.tokenizer.unk_token_id
        batch = pieces[chosen]
        batch[:, :-1] = torch.where(found, tokenizer.unk_token_id, batch[:, :-1])
        loss = _error(encoder, batch, wanted_features(pipe, hidden), masked=step % 2 == 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rates.step()
    encoder.eval().requires_grad_(False)
    left = [float(_error(encoder, pieces, wanted_features(pipe, clip), masked)) for masked in (True, False)]
    log.info("T5: left-over variance %.4f with a mask, %.4f without", *left)
    return encoder, tokenizer


def _error(encoder: T5EncoderModel, pieces: Tensor, wanted: Tensor, masked: bool) -> Tensor:
    mask = (pieces != encoder.config.pad_token_id).float() if masked else torch.ones(pieces.shape)
    found = encoder(pieces, attention_mask=mask)[0]
    return ((found - wanted).square().mean(-1) * mask).sum() / mask.sum()
