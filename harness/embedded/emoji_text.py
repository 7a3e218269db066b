"""Words to tokens to vectors for the embedded backbone: a tokenizer and two tiny CLIP text encoders.

The tokenizer is an ordinary `CLIPTokenizer` whose merges were trained until every word of every caption is
one token. Any other word breaks into pieces that no caption contains; all of them carry the one vector learnt
for "unknown word" (see `tie_unknown_words`), so a strange prompt is weak but never an error.
"""

from collections import Counter
from collections.abc import Sequence
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from harness.data.emoji import all_captions

MAX_LENGTH = 16
WIDTH = 96
NUM_LAYERS = 2
START, END, UNKNOWN = "<|startoftext|>", "<|endoftext|>", "<|unknown|>"
END_OF_WORD = "</w>"
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"


def train_merges(words: Sequence[str]) -> list[tuple[str, str]]:
    """Byte-pair merges, most frequent pair first and ties by spelling, until every word is one piece.

    `tokenizers` trains faster but breaks ties by chance: a checkpoint would not fit the next run's token ids.
    """
    split = [[*word[:-1], word[-1] + END_OF_WORD] for word in words]
    merges = []
    while counts := Counter(pair for pieces in split for pair in pairwise(pieces)):
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        split = [_merge(pieces, best) for pieces in split]
    return merges


def _merge(pieces: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for piece in pieces:
        if merged and (merged[-1], piece) == pair:
            merged[-1] += piece
        else:
            merged.append(piece)
    return merged


@cache
def build_tokenizer(words: tuple[str, ...] = (), max_length: int = MAX_LENGTH) -> CLIPTokenizer:
    """The tokenizer in which each of `words` is one token, padded with the end mark; default: the words of the emoji captions."""
    words = tuple(sorted(set(words or (word for caption in all_captions() for word in caption.split()))))
    merges = train_merges(words)
    pieces = {letter + end for letter in LETTERS for end in ("", END_OF_WORD)} | {a + b for a, b in merges}
    whole = [word + END_OF_WORD for word in words]
    vocab = [*whole, *sorted(pieces - set(whole)), UNKNOWN, START, END]
    return CLIPTokenizer(vocab={piece: i for i, piece in enumerate(vocab)}, merges=merges, unk_token=UNKNOWN,
                         bos_token=START, eos_token=END, pad_token=END, model_max_length=max_length)


def token_ids(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """(B, 16) token ids for a tokenizer of 16, exactly those that `StableDiffusion3Pipeline.encode_prompt` would use."""
    return tokenizer(captions, padding="max_length", max_length=tokenizer.model_max_length, truncation=True,
                     return_tensors="pt").input_ids


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModelWithProjection:
    """An untrained text encoder of width 96."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=4 * WIDTH, projection_dim=WIDTH,
        num_hidden_layers=NUM_LAYERS, num_attention_heads=3, max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id)
    encoder = CLIPTextModelWithProjection._from_config(config, attn_implementation="eager")
    torch.nn.init.normal_(encoder.get_input_embeddings().weight, std=0.3)
    return encoder


def hide_words(ids: Tensor, tokenizer: CLIPTokenizer, share: float) -> Tensor:
    """The ids with a random share of the words replaced by the unknown word, so that it has a meaning too."""
    marks = (ids == tokenizer.bos_token_id) | (ids == tokenizer.eos_token_id)
    return torch.where((torch.rand(ids.shape) < share) & ~marks, tokenizer.unk_token_id, ids)


@torch.no_grad()
def tie_unknown_words(encoder: CLIPTextModelWithProjection, tokenizer: CLIPTokenizer, captions: Sequence[str] = ()) -> None:
    """Give every piece that none of `captions` contains the vector of the unknown word, in place; default: the emoji's."""
    seen = token_ids(tokenizer, list(captions or all_captions())).unique()
    weight = encoder.get_input_embeddings().weight
    unseen = torch.ones(len(weight), dtype=torch.bool)
    unseen[seen] = False
    weight[unseen] = weight[tokenizer.unk_token_id].clone()


def build_silent_t5() -> tuple[T5EncoderModel, T5TokenizerFast]:
    """A T5 encoder of one tiny layer, all weights zero, so its output is rows of zeros; and its tokenizer.

    `StableDiffusion3Pipeline` takes "no T5" as rows of zeros too, but `from_pretrained` refuses a folder
    without one unless told `text_encoder_3=None, tokenizer_3=None`. With this the folder loads as any other.
    """
    tokenizer = T5TokenizerFast(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)], extra_ids=0)
    encoder = T5EncoderModel(T5Config(
        vocab_size=len(tokenizer), d_model=2 * WIDTH, d_kv=8, d_ff=8, num_layers=1, num_heads=1,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id))
    for parameter in encoder.parameters():
        torch.nn.init.zeros_(parameter)
    return encoder.eval(), tokenizer
