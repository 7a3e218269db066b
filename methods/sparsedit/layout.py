"""SparseDiT's plan: what each block is, and how many pooled tokens there are at each step."""

import re

from harness.api import Run, require

MODULE = "GSSSRD"
"""One generation, three sparse, one recovery, one dense block: the authors' module."""
LETTERS = re.compile(r"P*(GS*RD*)*D*")


def layout_of(written: str | None, num_blocks: int) -> str:
    """A letter per block: P pooling, G generation, S sparse, R recovery, D dense.

    Without one: a pooling block, as many whole modules as leave a dense block at the end, then dense ones. On 28 blocks that is
    the authors' DiT-XL/2. Where not even one module fits, its sparse and dense blocks are the ones to go.
    """
    if written is None:
        body = num_blocks - 2
        require(body >= 2, f"sparsedit: {num_blocks} blocks leave no room for a module; at least 4 are needed")
        modules = MODULE * (body // len(MODULE)) or ("G" + "S" * (body - 2))[: body - 1] + "R"
        written = ("P" + modules).ljust(num_blocks, "D")
    require(len(written) == num_blocks, f"sparsedit.layout: '{written}' describes {len(written)} blocks, the backbone has "
            f"{num_blocks}; write a letter for each")
    return written


def check_letters(layout: str) -> None:
    """Refuse what is no layout: pooling first, then modules G, S..., R, D..., and a module at all."""
    require(LETTERS.fullmatch(layout) is not None and "G" in layout, f"sparsedit.layout: '{layout}' is no layout; write a letter "
            "per block: P (pooling) first, then modules of one G, any S, one R and any D, then D")


def progress_share(progress: float) -> float:
    """0 in the first quarter of the sampling, then a line up to 1: how far the number of tokens has grown."""
    return max(0.0, (4 * progress - 1) / 3)


MEAN_SHARE = 0.375
"""Of `progress_share` over all of the sampling."""


def ratio_at(progress: float, keep_ratio: float, swing: float) -> float:
    """Share of tokens at `progress` in [0, 1] of the sampling, around a mean of keep_ratio, and never above 1."""
    swing = min(swing, (1 / keep_ratio - 1) / (1 - MEAN_SHARE))
    return keep_ratio * (1 + swing * (progress_share(progress) - MEAN_SHARE))


def pool_sizes(run: Run, keep_ratio: float, swing: float) -> list[tuple[int, int]]:
    """(height, width) of the pooled grid at each step. What rounding takes from one step is given to the next."""
    progress = [(index + 0.5) / run.num_steps for index in range(run.num_steps)]
    ratios = [ratio_at(one, keep_ratio, swing) for one in progress]
    lift, owed, sizes = keep_ratio - sum(ratios) / len(ratios), 0.0, []
    for ratio in ratios:
        wanted = min(max(ratio + lift, 0.0), 1.0) * run.num_tokens + owed
        sizes.append(nearest_size(wanted, run.grid))
        owed = wanted - sizes[-1][0] * sizes[-1][1]
    return sizes


def nearest_size(wanted: float, grid: tuple[int, int]) -> tuple[int, int]:
    """The pooled grid nearest to `wanted` tokens, with sides in the grid's proportion, give or take 2."""
    height, width = grid
    side = (max(wanted, 1) / (height * width)) ** 0.5
    near = [(high, wide) for high in range(1, height + 1) for wide in range(1, width + 1)
            if abs(high - side * height) < 2 and abs(wide - side * width) < 2]
    return min(near, key=lambda size: (abs(size[0] * size[1] - wanted), abs(size[0] * width - size[1] * height), size))
