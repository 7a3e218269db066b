"""SparseDiT's two attentions on diffusers' joint attention: the mean of all values, and from one set of tokens to another."""

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from harness.api import Reduction, require

STREAMS = ("hidden_states", "encoder_hidden_states")


class _Attention(Reduction):
    """All tokens that it is given; a subclass says where the image's output comes from."""

    kinds = frozenset({"attention"})

    def execute(self, module: nn.Module, forward: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """(image, text), or the image alone where there is no text. Text keeps its attention to text and image."""
        extra = sorted(key for key, value in kwargs.items() if value is not None and key not in STREAMS)
        require(hasattr(module, "to_q") and not extra, "sparsedit: its attentions stand in for diffusers' attention among image "
                f"and text tokens, not for {type(module).__name__} with {extra or 'other arguments'}")
        image = (*args, kwargs.get("hidden_states"))[0]
        text = args[1] if len(args) > 1 else kwargs.get("encoder_hidden_states")
        source = self.source(image)
        values = _heads(module, module.to_v(source))
        if text is None:
            return self.image(module, image, source, None, values)
        keys = torch.cat([_normed(module.norm_k, _heads(module, module.to_k(source))),
                          _normed(module.norm_added_k, _heads(module, module.add_k_proj(text)))], dim=2)
        values = torch.cat([values, _heads(module, module.add_v_proj(text))], dim=2)
        queries = _normed(module.norm_added_q, _heads(module, module.add_q_proj(text)))
        found = _joined(F.scaled_dot_product_attention(queries, keys, values))
        return self.image(module, image, source, keys, values), found if module.context_pre_only else module.to_add_out(found)

    def source(self, image: Tensor) -> Tensor:
        """The image tokens that keys and values are taken from, (B, K, D)."""
        return image

    @abstractmethod
    def image(self, module: nn.Module, image: Tensor, source: Tensor, keys: Tensor | None, values: Tensor) -> Tensor:
        """The module's output for the image tokens."""


class MeanAttention(_Attention):
    """Every image token gets the mean of all values, as uniform attention would: no query, and no key beside the text's."""

    def image(self, module: nn.Module, image: Tensor, source: Tensor, keys: Tensor | None, values: Tensor) -> Tensor:
        """(B, N, D)."""
        return module.to_out[0](_joined(values.mean(2, keepdim=True))).expand(-1, image.shape[1], -1)


class CrossAttention(_Attention):
    """Image queries are the block's tokens, keys and values those of `other` (B, K, D), normalised and modulated alike."""

    def __init__(self, other: Tensor) -> None:
        self._other = other

    def source(self, image: Tensor) -> Tensor:
        """The other tokens."""
        return self._other

    def image(self, module: nn.Module, image: Tensor, source: Tensor, keys: Tensor | None, values: Tensor) -> Tensor:
        """(B, M, D)."""
        if keys is None:
            keys = _normed(module.norm_k, _heads(module, module.to_k(source)))
        queries = _normed(module.norm_q, _heads(module, module.to_q(image)))
        return module.to_out[0](_joined(F.scaled_dot_product_attention(queries, keys, values)))


def _heads(module: nn.Module, features: Tensor) -> Tensor:
    """(B, N, H d) -> (B, H, N, d)."""
    return features.unflatten(-1, (module.heads, -1)).transpose(1, 2)


def _joined(features: Tensor) -> Tensor:
    """(B, H, N, d) -> (B, N, H d)."""
    return features.transpose(1, 2).flatten(2)


def _normed(norm: nn.Module | None, features: Tensor) -> Tensor:
    return features if norm is None else norm(features)
