"""Attention and feed-forward of diffusers' joint blocks with some heads or channel groups left out or masked.

Left out, a part is not computed; masked, it is computed and multiplied. For masks of 0 and 1 both give the same.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from harness.api import Reduction, require
from harness.engine.tokens import Keep

STREAMS = ("hidden_states", "encoder_hidden_states")


class NarrowAttention(Reduction):
    """All tokens; of the image queries the `heads` alone, or all of them times mask (B, H).

    Text is computed in every head, and looks at the image's keys and values there; without text, a head left out has none.
    """

    kinds = frozenset({"attention"})

    def __init__(self, heads: list[int] | None = None, mask: Tensor | None = None) -> None:
        self._heads, self._mask = heads, mask

    def execute(self, module: nn.Module, forward: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """What diffusers' joint attention computes; (image, text), or the image alone without text."""
        extra = sorted(key for key, value in kwargs.items() if value is not None and key not in STREAMS)
        require(hasattr(module, "to_q") and len(args) <= 2 and not extra, "dydit: heads can be left out of diffusers' attention "
                f"among image and text tokens, not of {type(module).__name__} with {extra or 'other arguments'}")
        image = (*args, kwargs.get("hidden_states"))[0]
        text = args[1] if len(args) > 1 else kwargs.get("encoder_hidden_states")
        # among image tokens alone nobody looks at the keys and values of a head that is left out: they are not made either
        made = self._heads if text is None else None
        keys = _normed(module.norm_k, _heads(module, module.to_k, image, made))
        values = _heads(module, module.to_v, image, made)
        if text is None:
            return self._image(module, image, keys, values)
        text_queries = _normed(module.norm_added_q, _heads(module, module.add_q_proj, text))
        keys = torch.cat([keys, _normed(module.norm_added_k, _heads(module, module.add_k_proj, text))], dim=2)
        values = torch.cat([values, _heads(module, module.add_v_proj, text)], dim=2)
        text = F.scaled_dot_product_attention(text_queries, keys, values).transpose(1, 2).flatten(2)
        text = text if module.context_pre_only else module.to_add_out(text)
        if self._heads is not None:
            left = torch.tensor(self._heads, device=keys.device)
            keys, values = keys[:, left], values[:, left]
        return self._image(module, image, keys, values), text

    def _image(self, module: nn.Module, image: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """keys, values: (B, H, N + T, d) of the heads that are left."""
        queries = _normed(module.norm_q, _heads(module, module.to_q, image, self._heads))
        found, out = F.scaled_dot_product_attention(queries, keys, values), module.to_out[0]
        if self._heads is None:
            return out((found * self._mask[..., None, None].to(values.dtype)).transpose(1, 2).flatten(2))
        weight = out.weight[:, _channels(module, out.weight.shape[1], self._heads)]
        return F.linear(found.transpose(1, 2).flatten(2), weight, out.bias)


class NarrowFeedForward(Keep):
    """The tokens `indices` alone through the channel groups `groups` (of `num_groups`); the others get nothing."""

    kinds = frozenset({"ffn"})

    def __init__(self, indices: Tensor, num_total: int, groups: list[int], num_groups: int) -> None:
        super().__init__(indices, num_total)
        self._groups, self._num_groups = groups, num_groups

    def execute(self, module: nn.Module, forward: Any, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        """diffusers' feed-forward: a projection with its activation, and a projection back."""
        if len(self._groups) == self._num_groups:
            return forward(*args, **kwargs)
        first, second = module.net[0], module.net[2]
        width = first.proj.weight.shape[0] // self._num_groups
        groups = torch.tensor(self._groups, device=first.proj.weight.device)
        rows = (groups[:, None] * width + torch.arange(width, device=groups.device)).flatten()
        hidden = first.gelu(F.linear((*args, kwargs.get("hidden_states"))[0], *_rows(first.proj, rows)))
        return F.linear(hidden, second.weight[:, rows], second.bias)


class MaskedFeedForward(Reduction):
    """All tokens; channel groups times groups (B, G), the output times tokens (B, N): training, where masks carry gradients."""

    kinds = frozenset({"ffn"})

    def __init__(self, groups: Tensor, tokens: Tensor) -> None:
        self._groups, self._tokens = groups, tokens

    @property
    def mean_tokens(self) -> float:
        """Tokens that the masks let through."""
        return float(self._tokens.detach().sum(1).mean())

    def execute(self, module: nn.Module, forward: Any, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        """Masks go on the hidden features before the activation, which maps 0 to 0."""
        first = module.net[0]
        hidden = first.proj((*args, kwargs.get("hidden_states"))[0])
        mask = self._groups.to(hidden.dtype).repeat_interleave(hidden.shape[-1] // self._groups.shape[1], dim=1)
        return module.net[2](first.gelu(hidden * mask[:, None]))

    def restore(self, computed: Tensor, bypass: Tensor | None) -> Tensor:
        """(B, N, D), nothing for masked tokens."""
        return computed * self._tokens[..., None].to(computed.dtype)


def _heads(module: nn.Module, linear: nn.Module, tokens: Tensor, heads: list[int] | None = None) -> Tensor:
    """(B, N, D) -> (B, H, N, d): `linear` of the tokens, for these of the module's heads alone, None for all."""
    if heads is None:
        return linear(tokens).unflatten(-1, (module.heads, -1)).transpose(1, 2)
    channels = _channels(module, linear.weight.shape[0], heads)
    return F.linear(tokens, *_rows(linear, channels)).unflatten(-1, (len(heads), -1)).transpose(1, 2)


def _channels(module: nn.Module, width: int, heads: list[int]) -> Tensor:
    """Of `width` channels of all heads, those of `heads`."""
    each, device = width // module.heads, module.to_q.weight.device
    return (torch.tensor(heads, device=device)[:, None] * each + torch.arange(each, device=device)).flatten()


def _normed(norm: nn.Module | None, features: Tensor) -> Tensor:
    return features if norm is None else norm(features)


def _rows(linear: nn.Linear, rows: Tensor) -> tuple[Tensor, Tensor | None]:
    return linear.weight[rows], None if linear.bias is None else linear.bias[rows]
