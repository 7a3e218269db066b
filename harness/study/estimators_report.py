"""Report and figure of the estimator study, from its records alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from harness.reporting.plots import PALETTE, STYLE
from harness.statistics.intervals import mean_interval
from harness.study.writing import mean_with_interval, picture, table

Values = list[float]
Statistic = Callable[[np.ndarray, np.ndarray], float]
SCORERS = {"random": "chance (`random`)", "norm": "the norm of the token that enters the block (`norm`)",
           "router": "a trained router (`router`)"}
LOSS_NAMES = {"diffusion": "diffusion loss", "distill": "distillation loss"}


def pearson(truth: np.ndarray, estimate: np.ndarray) -> float:
    """Correlation; 0 for an estimate that does not vary."""
    return 0.0 if estimate.std() == 0 or truth.std() == 0 else float(np.corrcoef(truth, estimate)[0, 1])


def cosine(truth: np.ndarray, estimate: np.ndarray) -> float:
    """Cosine; 0 for an estimate that is zero."""
    norm = np.linalg.norm(truth) * np.linalg.norm(estimate)
    return 0.0 if norm == 0 else float(truth @ estimate / norm)


def same_sign(truth: np.ndarray, estimate: np.ndarray) -> float:
    """Share of tokens whose estimate has the true sign; an estimate of zero counts one half."""
    return float(np.mean(np.where(estimate == 0, 0.5, np.sign(truth) == np.sign(estimate))))


def agreement(records: Sequence[dict[str, Any]], estimator: str, statistic: Statistic, side: str = "all") -> Values:
    """`statistic` of each record (one sample of one block) over its tokens; side: 'all', 'kept' or 'rejected' tokens."""
    values = []
    for record in records:
        part = {"all": slice(None), "kept": slice(record["num_kept_tokens"]), "rejected": slice(record["num_kept_tokens"], None)}
        pair = (np.array(record["truth"])[part[side]], np.array(record["estimates"][estimator])[part[side]])
        values.append(statistic(*pair))
    return values


def by_sample(records: Sequence[dict[str, Any]], values: Sequence[float]) -> Values:
    """Means per sample: the independent units of the interval, for blocks and scorers share their samples."""
    groups: dict[tuple, Values] = {}
    for record, value in zip(records, values, strict=True):
        groups.setdefault((record["seed"], record["level"]), []).append(value)
    return [float(np.mean(group)) for group in groups.values()]


def _select(data: dict[str, Any], **wanted: Any) -> list[dict[str, Any]]:
    return [record for record in data["records"] if all(record[key] == value for key, value in wanted.items())]


def _estimators(data: dict[str, Any]) -> list[str]:
    return list(data["records"][0]["estimates"])


def _blocks(data: dict[str, Any]) -> range:
    return range(1, data["num_blocks"])


# ---------------------------------------------------------------------------------------------- text


def report(data: dict[str, Any]) -> str:
    """The findings in words, tables and a figure."""
    parts = [_opening(data), "## Conclusion", _conclusion(data), "## Tokens", *_token_tables(data), _figure_text(data),
             _sides(data), "## k", *_budget_tables(data), "## By what chose the tokens", _scorer_table(data)]
    return "\n\n".join(parts)


def _opening(data: dict[str, Any]) -> str:
    samples = len({(record["seed"], record["level"]) for record in data["records"]})
    flips = sum(len(record["truth"]) for record in _select(data, loss="diffusion"))
    return (
        "**Which gradient estimator of Shiva-DiT agrees with the true change of the loss, for tokens and for k, on the trained "
        "embedded SD3 backbone? Is Eq. 7 as printed right?**\n\n"
        f"{samples} training images with noise (timesteps stratified), {data['num_tokens']} tokens, keep ratio "
        f"{data['keep_ratio']} in every block but the first, tokens chosen by: "
        f"{', '.join(SCORERS[name] for name in data['scorers'])}. In each of the {data['num_blocks'] - 1} routed blocks "
        f"{data['tokens_per_side']} kept and {data['tokens_per_side']} rejected tokens, at random, change their status, one at "
        f"a time: {flips:,} exact loss changes, float32 forward, float64 loss. *Truth* is the loss with the token in the block "
        f"minus the loss without it; the estimate is dL/dpi_i, so a right estimator correlates positively. For k, truth is the "
        f"loss change per token when the {data['more_tokens']} next-best tokens join, the estimate sum_i dL/dpi_i dpi_i/dk with "
        "the soft rank at tau_rank 0.2, tau_sel 0.1. Choices of other blocks are held fixed. Correlations are taken per sample "
        "and block, then averaged; brackets are 95 % intervals over samples.")


def _verdict(values: Values) -> str:
    low, high = mean_interval(values) or (-1.0, 1.0)  # too few samples say nothing
    return "right" if low > 0 else "wrong" if high < 0 else "no information"


def _conclusion(data: dict[str, Any]) -> str:
    lines = []
    for loss, title in LOSS_NAMES.items():
        means = {name: np.mean(agreement(_select(data, loss=loss), name, pearson)) for name in _estimators(data)}
        order = sorted(means, key=means.get, reverse=True)
        lines.append(f"**Eq. 7 as printed, {title}**: {_by_block(data, loss, 'all')}. Among kept tokens alone: "
                     f"{_by_block(data, loss, 'kept')}. Among rejected tokens alone: {_by_block(data, loss, 'rejected')}. Every "
                     f"estimator over all blocks, best first: {', '.join(f'`{name}` {means[name]:+.2f}' for name in order)}.")
    lines.append("Each number is a mean Pearson correlation with the exact loss change; 'right' and 'wrong' are said where its "
                 "95 % interval over samples excludes zero. `eq7_prose`, the signs of appendix A.2, is minus Eq. 7, so it is "
                 "wrong where Eq. 7 is right: where kept and rejected tokens differ above, no single sign mends the rule.")
    return "\n\n".join(lines)


def _by_block(data: dict[str, Any], loss: str, side: str) -> str:
    words = []
    for block in _blocks(data):
        records = _select(data, loss=loss, block=block)
        values = by_sample(records, agreement(records, "eq7", pearson, side))
        words.append(f"block {block} {_verdict(values)} ({np.mean(values):+.2f})")
    return ", ".join(words)


def _sides(data: dict[str, Any]) -> str:
    """Kept and rejected tokens apart."""
    rows = []
    for name in ("eq7", "eq7_prose", "dense_contrast", "teacher_contrast"):
        for side in ("kept", "rejected"):
            cells = []
            for block in _blocks(data):
                records = _select(data, loss="diffusion", block=block)
                cells.append(mean_with_interval(by_sample(records, agreement(records, name, pearson, side))))
            rows.append([f"`{name}`, {side}", *cells])
    head = ["estimator, tokens", *(f"block {block}" for block in _blocks(data))]
    return ("Kept and rejected tokens apart, diffusion loss, Pearson. The printed rule gives kept tokens what the residual copy "
            "is worth, which before a norm is minus what the block is worth, and rejected tokens the loss's slope along the "
            "token itself. `dense_contrast` and `teacher_contrast` differ for rejected tokens alone: the first pays a dense "
            "pass of each block for the residual that the token would get here, the second takes the teacher's, which the routed "
            f"model has drifted away from in deep blocks.\n\n{table(head, rows)}")


def _token_tables(data: dict[str, Any]) -> list[str]:
    parts = []
    for loss, title in LOSS_NAMES.items():
        rows, records = [], _select(data, loss=loss)
        for name in _estimators(data):
            per_block = [f"{np.mean(agreement(_select(data, loss=loss, block=block), name, pearson)):+.2f}"
                         for block in _blocks(data)]
            pooled = [mean_with_interval(by_sample(records, agreement(records, name, statistic)))
                      for statistic in (pearson, cosine, same_sign)]
            sides = [f"{np.mean(agreement(records, name, pearson, side)):+.2f}" for side in ("kept", "rejected")]
            rows.append([f"`{name}`", *per_block, *pooled, *sides])
        head = ["estimator", *(f"block {block}" for block in _blocks(data)), "all: Pearson", "all: cosine", "all: same sign",
                "kept only", "rejected only"]
        parts.append(f"{title.capitalize()}. Pearson correlation per block, then over all blocks Pearson, cosine and share of "
                     "equal signs (an estimate of zero counts one half; chance is 0.5); last, Pearson among kept and among "
                     f"rejected tokens alone.\n\n{table(head, rows)}")
    return parts


def _budget_tables(data: dict[str, Any]) -> list[str]:
    parts = []
    for loss, title in LOSS_NAMES.items():
        rows, records = [], _select(data, loss=loss)
        truth = np.array([record["k_truth"] for record in records])
        for name in _estimators(data):
            estimate = np.array([record["k_estimates"][name] for record in records])
            signs = [same_sign(t[None], e[None]) for t, e in zip(truth, estimate, strict=True)]
            per_block = [_sign_in_block(records, signs, block) for block in _blocks(data)]
            ratio = np.median(estimate[truth != 0] / truth[truth != 0])
            rows.append([f"`{name}`", *per_block, mean_with_interval(by_sample(records, signs)),
                         f"{pearson(truth, estimate):+.2f}", f"{ratio:+.2f}"])
        head = ["estimator", *(f"block {block}" for block in _blocks(data)), "all: same sign", "all: Pearson", "median ratio"]
        parts.append(f"{title.capitalize()}. Share of samples in which the estimated dL/dk has the true sign, per block and "
                     "over all; Pearson correlation over all samples and blocks; median of estimate / truth (1 is exact). The "
                     f"truth is negative (more tokens help) in {np.mean(truth < 0):.0%}.\n\n{table(head, rows)}")
    return parts


def _sign_in_block(records: Sequence[dict[str, Any]], signs: Sequence[float], block: int) -> str:
    return f"{np.mean([sign for record, sign in zip(records, signs, strict=True) if record['block'] == block]):.2f}"


def _scorer_table(data: dict[str, Any]) -> str:
    head = ["estimator", *(f"{scorer}, {loss}" for loss in LOSS_NAMES for scorer in data["scorers"])]
    rows = []
    for name in _estimators(data):
        cells = []
        for loss in LOSS_NAMES:
            for scorer in data["scorers"]:
                records = _select(data, loss=loss, scorer=scorer)
                cells.append(mean_with_interval(by_sample(records, agreement(records, name, pearson))))
        rows.append([f"`{name}`", *cells])
    return "Pearson correlation for tokens over all blocks.\n\n" + table(head, rows)


def _figure_text(data: dict[str, Any]) -> str:
    return picture("estimators.png", "Agreement of every estimator with exact loss changes, per block",
                   "Agreement with exact leave-one-in / leave-one-out loss changes, per routed block. Top: Pearson correlation "
                   "over tokens, mean over samples and scorers, bars are 95 % intervals over samples; points of one "
                   "block are set side by side. Bottom: share of samples in which the estimated dL/dk has the true sign; "
                   "dotted, chance.")


# ---------------------------------------------------------------------------------------------- figure


def figures(data: dict[str, Any]) -> dict[str, Figure]:
    """estimators.png."""
    names = _estimators(data)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(2, 2, figsize=(11, 7.5), sharex=True, sharey="row", layout="constrained")
        for column, (loss, title) in enumerate(LOSS_NAMES.items()):
            for index, name in enumerate(names):
                style = {"color": PALETTE[index % len(PALETTE)], "marker": "os^DvPX"[index % 7], "markersize": 4, "linewidth": 1}
                x = np.array(_blocks(data)) + 0.08 * (index - (len(names) - 1) / 2)
                tokens = [_per_sample(data, loss, block, name) for block in _blocks(data)]
                axes[0][column].errorbar(x, [np.mean(v) for v in tokens], yerr=_bars(tokens), label=name, **style)
                axes[1][column].plot(x, [_mean_sign(data, loss, block, name) for block in _blocks(data)], label=name, **style)
            axes[0][column].axhline(0, color="#222222", linewidth=0.8)
            axes[1][column].axhline(0.5, color="#222222", linewidth=0.8, linestyle=":")
            axes[0][column].set_title(title)
            axes[1][column].set_xlabel("routed block")
            axes[1][column].set_xticks(list(_blocks(data)))
        axes[0][0].set_ylabel("Pearson, dL/dpi against exact change")
        axes[1][0].set_ylabel("share of samples, dL/dk of true sign")
        axes[0][0].set_ylim(-1.05, 1.05)
        axes[1][0].set_ylim(-0.05, 1.05)
        figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=len(names), fontsize=8)
        return {"estimators.png": figure}


def _bars(groups: Sequence[Values]) -> np.ndarray:
    """(2, blocks) distances from the mean to the ends of its interval."""
    ends = [mean_interval(values) or (np.mean(values),) * 2 for values in groups]
    return np.array([[np.mean(v) - low, high - np.mean(v)] for v, (low, high) in zip(groups, ends, strict=True)]).clip(0).T


def _per_sample(data: dict[str, Any], loss: str, block: int, name: str) -> Values:
    records = _select(data, loss=loss, block=block)
    return by_sample(records, agreement(records, name, pearson))


def _mean_sign(data: dict[str, Any], loss: str, block: int, name: str) -> float:
    pairs = [(record["k_truth"], record["k_estimates"][name]) for record in _select(data, loss=loss, block=block)]
    return float(np.mean([same_sign(np.array([truth]), np.array([estimate])) for truth, estimate in pairs]))
