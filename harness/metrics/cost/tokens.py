"""How many image tokens the modules computed, as executed."""

from collections.abc import Iterator

import numpy as np

from harness.api import METRICS, Measure, Metric, Subject


@METRICS.register("tokens")
class Tokens(Metric):
    """Mean kept fraction over steps and blocks, by the injection's count; the full [step][block] table is in `executed`."""

    group = "cost"
    measures = ("tokens/kept_attention", "tokens/kept_ffn")

    needs_weights = False

    def measure(self, subject: Subject) -> Iterator[Measure]:
        """Fractions in (0, 1]; series over steps."""
        for kind in ("attention", "ffn"):
            table = np.asarray(subject.kept[kind])
            series = tuple((step, float(row.mean())) for step, row in enumerate(table))
            yield Measure(f"tokens/kept_{kind}", float(table.mean()), "none", series=series,
                          heading=f"tokens kept, {'FFN' if kind == 'ffn' else kind}", percent=True)
