"""IBTM: the difference that guidance makes says which tokens carry the prompt; merge the others.

|conditional - unconditional| prediction of one step is the importance of tokens in the next. Destinations are drawn among the
most important tokens; the least important ones are folded into them first.

Source: Wu et al. 2025 (Importance-Based Token Merging), arXiv:2411.16720; defaults of its official PixArt code, from a reading.
Differs: acts at the joint attention of MMDiT blocks (PixArt: self- and cross-attention); SD3.5's second attention shares the
plan of the first. Blocks 7 to 20 of PixArt's 28 become the middle half of the depth. Ties are broken by noise per token, not per
pair. Draws come from (seed, step, block), not from the global generator. `ffn` is ours: attention alone saves little.
`ibtm_proxy` replaces the guidance difference where there is none, by the change of the prediction since the step before; it is
not the authors' method and has no preset.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor
from torch.nn.functional import avg_pool2d

from harness.api import METHODS, Call, Method, Run, Site, require
from harness.engine.tokens import Fold, cells, cosine, fold_best, fold_into, num_kept, others

FORCED = 1e5
"""Added to the score of sources that are not important enough to be destinations, so that they merge first."""


@METHODS.register("ibtm")
class IBTM(Method):
    """Merge by importance around the attention of the middle blocks."""

    of_depth = ("blocks",)
    presets: ClassVar = {
        "official": {"keep_ratio": 0.5},
        "table1": {"keep_ratio": 0.75, "first_step": "dense", "blocks": [7, 20]},
    }

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """keep_ratio: fraction of tokens a reduced module computes.

        dst_ratio: destinations, as a fraction of all tokens. pool: they are drawn among the pool * keep_ratio * N most important
        tokens (the authors' U-Net code has 1.4). metric: a token is folded into the destination nearest in the grid, or most
        similar in features (U-Net code). prune_share: in this share of the steps, from the first, a destination is computed
        alone; afterwards the mean of its group. first_step: before an importance is known, merge as ToMeSD does or compute all.
        blocks: first and last reduced block; None: the middle half. ffn: reduce the feed-forward too.
        """

        keep_ratio: float = 0.5
        dst_ratio: float = 0.25
        pool: float = 1.0
        metric: Literal["distance", "features"] = "distance"
        prune_share: float = 0.2
        first_step: Literal["random2d", "dense"] = "random2d"
        blocks: tuple[int, ...] | None = None
        ffn: bool = False

        def __post_init__(self) -> None:
            require(0 < self.dst_ratio <= 1, f"ibtm.dst_ratio must lie in (0, 1], got {self.dst_ratio}")
            require(self.pool >= 1, f"ibtm.pool must be at least 1, got {self.pool}")
            floor = max(self.dst_ratio, 0.25 if self.first_step == "random2d" else 0)
            require(floor <= self.keep_ratio <= 1, f"ibtm.keep_ratio must lie in [{floor:g}, 1], got {self.keep_ratio}: "
                    f"destinations (dst_ratio {self.dst_ratio}; a quarter in a random2d first step) are never merged away")
            require(0 <= self.prune_share <= 1, f"ibtm.prune_share must lie in [0, 1], got {self.prune_share}")
            require(self.blocks is None or len(self.blocks) == 2 and 0 <= self.blocks[0] <= self.blocks[1],
                    f"ibtm.blocks: expected [first, last], got {list(self.blocks or ())}")

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.sites = frozenset({"attention", "ffn"} if config.ffn else {"attention"})
        self.reset()

    def begin(self, run: Run) -> None:
        """Refuse runs without a guidance pair and blocks that the backbone lacks."""
        self._check_guidance(run)
        first, last = self.config.blocks or (run.num_blocks // 4, 3 * run.num_blocks // 4 - 1)
        require(first <= last < run.num_blocks, f"{self.name}.blocks: [{first}, {last}] does not fit the {run.num_blocks} blocks "
                f"of backbone '{run.backbone}'; give [first, last] within them, or null for the middle half (of two or more)")
        require(min(run.grid) >= 2, f"{self.name}: a grid of {run.grid} tokens is too small")
        self._blocks, self._run = range(first, last + 1), run

    def _check_guidance(self, run: Run) -> None:
        require(run.guidance_halves == 2, "ibtm: importance is the difference that guidance makes, and this run has no guidance; "
                "set sampler.guidance_scale above 1, or use method 'ibtm_proxy'")

    def reset(self) -> None:
        """No importance is known before the first step."""
        self._importance: Tensor | None = None
        self._last: Tensor | None = None

    def observe(self, call: Call, prediction: Tensor) -> None:
        """prediction: (B, C, H, W). Importance (images, N) of the next step."""
        change = self._change(call, prediction.float())
        if change is not None:
            height, width = self._run.grid
            patch = (change.shape[-2] // height, change.shape[-1] // width)
            self._importance = avg_pool2d(change.mean(dim=1), patch).flatten(1)

    def _change(self, call: Call, prediction: Tensor) -> Tensor | None:
        """(images, C, H, W) absolute difference whose mean over channels is the importance."""
        uncond, cond = prediction.chunk(2)
        return (cond - uncond).abs()

    def reduce(self, hidden_states: Tensor, site: Site) -> Fold | None:
        """hidden_states: (B, N, D), the modulated input of the module."""
        num_tokens = hidden_states.shape[1]
        removed = num_tokens - num_kept(self.config.keep_ratio, num_tokens)
        if site.block not in self._blocks or removed == 0:
            return None
        if "ibtm" not in site.memory:
            if self._importance is None:
                match = None if self.config.first_step == "dense" else self._random2d(hidden_states, site, removed)
            else:
                match = self._by_importance(hidden_states, site, removed)
            prune = site.step < self.config.prune_share * site.run.num_steps
            site.memory["ibtm"] = match and fold_into(num_tokens, *match, mode="prune" if prune else "mean")
        return site.memory["ibtm"]

    def _random2d(self, hidden_states: Tensor, site: Site, removed: int) -> tuple[Tensor, Tensor]:
        """(src, dst), each (B, R), as ToMeSD matches them: a random destination in each 2 x 2 cell."""
        members = cells(site.grid, 2, hidden_states.device)
        pick = site.rand(hidden_states.shape[1])[:, members].argmax(dim=-1, keepdim=True)  # (B, K, 1)
        dst = members.expand(len(pick), -1, -1).gather(2, pick).squeeze(2)
        src = others(dst, hidden_states.shape[1])
        return fold_best(cosine(hidden_states, src, dst), dst, src, removed)

    def _by_importance(self, hidden_states: Tensor, site: Site, removed: int) -> tuple[Tensor, Tensor]:
        """(src, dst), each (B, R). Destinations, and with the grid's distance the whole match, are shared by guided halves."""
        importance, num_tokens = self._importance, hidden_states.shape[1]
        halves = hidden_states.shape[0] // len(importance)
        noise = site.rand(num_tokens)[: len(importance)]
        num_pool = min(num_tokens, int((num_tokens - removed) * self.config.pool + 1e-3))
        values, order = importance.sort(dim=1, descending=True, stable=True)
        dst = order.gather(1, noise[:, :num_pool].topk(num_kept(self.config.dst_ratio, num_tokens), dim=1).indices)
        src = others(dst, num_tokens)
        bonus = FORCED * (importance.gather(1, src) < values[:, num_pool - 1:num_pool])
        if self.config.metric == "features":
            src, dst, bonus = (x.repeat(halves, 1) for x in (src, dst, bonus))
            return fold_best(cosine(hidden_states, src, dst), dst, src, removed, bonus)
        match = fold_best(self._nearness(src, dst, noise), dst, src, removed, bonus)
        return match[0].repeat(halves, 1), match[1].repeat(halves, 1)

    def _nearness(self, src: Tensor, dst: Tensor, noise: Tensor) -> Tensor:
        """(images, S, K) minus the distance in the grid; up to 1e-5 of noise breaks ties."""
        width = self._run.grid[1]
        down = (src // width).unsqueeze(2) - (dst // width).unsqueeze(1)
        across = (src % width).unsqueeze(2) - (dst % width).unsqueeze(1)
        ties = noise.gather(1, src).unsqueeze(2) + noise.gather(1, dst).unsqueeze(1)
        return 0.5e-5 * ties - (down.square() + across.square()).float().sqrt()


@METHODS.register("ibtm_proxy")
class IBTMProxy(IBTM):
    """IBTM for runs without a guidance pair: importance is the change of the prediction since the step before."""

    presets: ClassVar = {}

    def _check_guidance(self, run: Run) -> None:
        """Needs none."""

    def _change(self, call: Call, prediction: Tensor) -> Tensor | None:
        last, self._last = self._last, prediction
        if last is None:
            return None
        return (prediction - last).abs().unflatten(0, (call.guidance_halves, -1)).mean(dim=0)
