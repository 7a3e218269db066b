"""What the Shiva-DiT paper reports for a comparison, beside what this sweep measured for the same one. No torch.

The paper's figures are of SD3.5-Medium at 1024 x 1024 with 50 steps: other metrics on another model. What can be compared is
the direction, and that is what the verdict speaks of; it is computed from the rows, never written down here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from harness.reporting.paired import Comparison, compare_any, corrected
from harness.reporting.rows import Row, SweepResults, heading
from harness.reporting.tables import cell, markdown
from harness.reporting.words import numbers, one_training, over_seeds_words, p_words

SOURCE = "arXiv:2602.05605v1"
LEAST, GREATEST = "least", "greatest"
"""In place of allowed values: the row with the least or greatest value of an option, of rows that differ in it alone."""
PAIRS, ONE, EACH = ("pairs", "12_of_24"), (1,), ("per_layer",)
QUALITY = "quality"
"""Stands for the sweep's headline metric."""


@dataclass(frozen=True)
class Claim:
    """The paper says that one setting is better than another, which differs from it in `option` alone.

    better, worse: values of the option (a key of the trial, dotted) in the two settings. where: further options that both have.
    paper: metric of the paper -> (better's, worse's number). ours: our metrics that measure the same thing.
    """

    place: str
    text: str
    option: str
    better: Any
    worse: Any
    paper: Mapping[str, tuple[float, float]]
    ours: tuple[str, ...]
    where: Mapping[str, tuple] = ()


FEATURES = ("dense/feature_mse", "dense/feature_cosine")
IMAGES = (QUALITY, "dense/velocity_error")
CLAIMS = (
    Claim("Table 2", "a router for each pair of blocks beats one for all", "method.router_groups", PAIRS, ONE,
          {"feature MSE": (0.894, 2.102), "cosine": (0.881, 0.829)}, FEATURES),
    Claim("Table 2", "a router for each pair of blocks beats one per block", "method.router_groups", PAIRS, EACH,
          {"feature MSE": (0.894, 1.072), "cosine": (0.881, 0.862)}, FEATURES),
    Claim("Table 2", "a router for each pair of blocks beats 8 groups over 24 blocks", "method.router_groups", PAIRS,
          ("8_of_24",), {"feature MSE": (0.894, 0.906), "cosine": (0.881, 0.879)}, FEATURES),
    Claim("Table 2", "with a router per block, a narrow one beats a wide one", "method.router_width", LEAST, GREATEST,
          {"feature MSE": (1.072, 1.831), "cosine": (0.862, 0.805)}, FEATURES, {"method.router_groups": EACH}),
    Claim("Table 2", "with one router for all blocks, a wide one beats a narrow one", "method.router_width", GREATEST, LEAST,
          {"feature MSE": (1.254, 2.102), "cosine": (0.862, 0.829)}, FEATURES, {"method.router_groups": ONE}),
    Claim("Table 3", "an adaptive ratio policy beats a fixed ratio", "method.ratio_policy", ("additive",), ("fixed",),
          {"FID": (17.36, 21.76), "ImageReward": (0.880, 0.835), "CLIP": (30.94, 30.75), "CLIP-IQA": (0.500, 0.497)}, IMAGES),
)
VERDICTS = {(True, False): "**held here**", (False, True): "**did not hold here**", (True, True): "**mixed here**",
            (False, False): "**no difference shown**"}


def paper_section(sweep: SweepResults) -> str:
    """A line per claim that the sweep has rows for, and a sentence each; '' when there is none. Rows are over training seeds."""
    pairs = [(claim, better, worse, metric) for claim in CLAIMS for better, worse in matches(sweep.rows, claim)
             for metric in _metrics(sweep, claim) if None not in (better.value(metric), worse.value(metric))]
    if not pairs:
        return ""
    comparisons = corrected([compare_any(better, worse, metric) for _, better, worse, metric in pairs])
    found: dict[tuple[str, str, str], list[Comparison]] = {}
    claims = {}
    for (claim, better, worse, _), comparison in zip(pairs, comparisons, strict=True):
        key = (claim.text, better.trial_id, worse.trial_id)
        claims[key] = claim
        found.setdefault(key, []).append(comparison)
    heads = ["claim", "paper: better / worse", "here: settings", "here: better / worse", "here"]
    lines = [_line(claims[key], mine) for key, mine in found.items()]
    sentences = "\n".join(f"- {_sentence(claims[key], mine)}" for key, mine in found.items())
    return ("## What the paper says\n\n"
            f"The paper's numbers ({SOURCE}) are of another model and data set: directions can be compared, sizes cannot. "
            "*Here* is computed from the rows of this sweep: to count, a difference must pass its test (5 %, "
            f"Holm-corrected over {len(comparisons)} comparisons) and, with several training seeds, no training of one setting "
            f"may lie among those of the other.\n\n{markdown(heads, lines)}\n\n{sentences}")


def matches(rows: Sequence[Row], claim: Claim) -> Iterator[tuple[Row, Row]]:
    """(better, worse) by the claim: finished rows that differ in its option only."""
    sets: dict[str, list[Row]] = {}
    for row in rows:
        options = _options(row)
        if claim.option in options and all(options.get(key) in values for key, values in dict(claim.where).items()):
            rest = {key: value for key, value in options.items() if key not in (claim.option, "train.seed")}
            sets.setdefault(json.dumps(rest, sort_keys=True), []).append(row)
    for group in sets.values():
        for better in _having(group, claim.option, claim.better):
            yield from ((better, worse) for worse in _having(group, claim.option, claim.worse) if worse is not better)


def _options(row: Row) -> dict[str, Any]:
    """Dotted keys of the trial; empty for a row without numbers."""
    if not row.result.get("metrics"):
        return {}
    return {f"{group}.{key}": value for group, options in row.trial.items() if isinstance(options, Mapping)
            for key, value in options.items()}


def _having(rows: Sequence[Row], option: str, wanted: Any) -> list[Row]:
    def value(row: Row) -> Any:
        return _options(row)[option]

    if wanted in (LEAST, GREATEST):
        return [(min if wanted == LEAST else max)(rows, key=value)] if len({value(row) for row in rows}) > 1 else []
    return [row for row in rows if value(row) in wanted]


def _metrics(sweep: SweepResults, claim: Claim) -> list[str]:
    names = [sweep.quality if name == QUALITY else name for name in claim.ours]
    return [name for name in dict.fromkeys(names) if name in sweep.metrics]


# ---------------------------------------------------------------------------------------------- words


def _head(c: Comparison) -> str:
    return heading(c.row, c.metric, brief=True)


def _line(claim: Claim, mine: Sequence[Comparison]) -> list[str]:
    paper = "; ".join(f"{name} {better:g} / {worse:g}" for name, (better, worse) in claim.paper.items())
    ours = "; ".join(f"{_head(c)} {cell(c.row, c.metric)} / {cell(c.other, c.metric)}" for c in mine)
    return [f"{claim.place}: {claim.text}", paper, f"`{mine[0].row.label}` / `{mine[0].other.label}`", ours, verdict(mine)]


def verdict(mine: Sequence[Comparison]) -> str:
    """Whether the claim held in our metrics, taken together, and that it rests on one training where it does."""
    if all(c.refused for c in mine):
        return "not comparable here"
    outcomes = [c.verdict for c in mine]
    once = " (one training each)" if one_training(mine[0].row, mine[0].other) else ""
    return VERDICTS["better" in outcomes, "worse" in outcomes] + once


def _sentence(claim: Claim, mine: Sequence[Comparison]) -> str:
    parts = []
    for c in mine:
        if c.refused:
            parts.append(f"{_head(c)} not compared ({c.refused})")
            continue
        parts.append(f"{_head(c)} {numbers(c)} ({p_words(c.p)}{over_seeds_words(c)})")
    return (f"{claim.place}, {claim.text}: {verdict(mine)}. `{mine[0].row.label}` minus `{mine[0].other.label}`: "
            f"{'; '.join(parts)}.")
