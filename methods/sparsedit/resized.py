"""SparseDiT's blocks that change the number of tokens: generation, which pools, and recovery, which merges back."""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from harness.api import Reduction, Site, require


class MergeBack(nn.Module):
    """up W1 + X W2, where W1 starts at zero and W2 at the identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.sparse, self.dense = nn.Linear(width, width), nn.Linear(width, width)
        nn.init.zeros_(self.sparse.weight)
        nn.init.eye_(self.dense.weight)
        for linear in (self.sparse, self.dense):
            nn.init.zeros_(linear.bias)

    def forward(self, up: Tensor, dense: Tensor) -> Tensor:
        """(B, N, D) of each -> (B, N, D)."""
        return self.sparse(up.to(self.sparse.weight.dtype)) + self.dense(dense.to(self.dense.weight.dtype))


class _Resized(Reduction):
    """A block that gets another number of tokens than came and hands on as many, and whose attention looks at those that came."""

    kinds = frozenset({"block"})

    def __init__(self, num_tokens: int, size: tuple[int, int], site: Site) -> None:
        self.num_tokens, self._size, self._grid, self._memory = num_tokens, size, site.grid, site.memory

    def execute(self, module: nn.Module, forward: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """The block, after its own norm has made keys of the tokens that came."""
        require(hasattr(module, "use_dual_attention") and "temb" in kwargs,
                f"sparsedit: {type(self).__name__} needs diffusers' joint blocks, and this is a {type(module).__name__}")
        normed = module.norm1(self._came, emb=kwargs["temb"])
        self._memory["keys"] = {"attn": normed[0], "attn2": normed[5]} if module.use_dual_attention else {"attn": normed[0]}
        return forward(*args, **kwargs)


class Generation(_Resized):
    """(B, N, D) -> (B, M, D) by averaging cells of the grid."""

    def __init__(self, size: tuple[int, int], site: Site) -> None:
        super().__init__(size[0] * size[1], size, site)

    def reduce(self, hidden_states: Tensor) -> Tensor:
        """Adaptive average pooling."""
        self._came = hidden_states
        planes = hidden_states.transpose(1, 2).unflatten(2, self._grid)
        return F.adaptive_avg_pool2d(planes, self._size).flatten(2).transpose(1, 2)


class Recovery(_Resized):
    """(B, M, D) -> (B, N, D): each token takes its nearest pooled one and what the module was given."""

    def __init__(self, merge: MergeBack, dense: Tensor, size: tuple[int, int], site: Site) -> None:
        super().__init__(dense.shape[1], size, site)
        self._merge, self._dense = merge, dense

    def reduce(self, hidden_states: Tensor) -> Tensor:
        """Z = up W1 + X W2."""
        self._came = hidden_states
        planes = hidden_states.transpose(1, 2).unflatten(2, self._size)
        up = F.interpolate(planes, size=self._grid, mode="nearest").flatten(2).transpose(1, 2)
        return self._merge(up, self._dense).to(hidden_states.dtype)
