"""Compute per image over the whole sampling loop, counted on shapes; a multiply-add counts two (see `harness.cost.flops`)."""

from collections.abc import Iterator

from harness.api import METRICS, Measure, Metric, Subject


@METRICS.register("flops")
class Flops(Metric):
    """Total FLOPs, what the method itself adds to them, and the cut against dense; the paper's rule in columns of its own."""

    group = "cost"
    measures = ("compute/gflops_per_image", "compute/flops_cut", "compute/method_gflops_per_image",
                "compute/paper_rule_gflops_per_image", "compute/paper_rule_cut", "compute/method_parameters")

    needs_weights = False

    def measure(self, subject: Subject) -> Iterator[Measure]:
        """GFLOPs per image: transformer with all guided halves, plus the method's own; text encoders and autoencoder apart."""
        cost, dense = subject.cost or subject.meter.count(subject.method), subject.meter.dense
        run = subject.meter.run
        notes = {"rule": "one multiply-add counts two", "num_steps": run.num_steps, "rows_per_image": run.guidance_halves}
        if subject.method.dynamic:
            notes["dynamic"] = "counted from what each image decided"
        if subject.method.uncounted:
            notes["uncounted"] = subject.method.uncounted
        yield Measure("compute/gflops_per_image", cost.total / 1e9, "lower", notes=notes, heading="GFLOP / image", unit="GFLOP")
        yield Measure("compute/flops_cut", cost.cut(dense), "higher", heading="FLOPs cut", percent=True)
        yield Measure("compute/method_gflops_per_image", cost.method / 1e9, "lower", heading="of it the method's own")
        yield Measure("compute/paper_rule_gflops_per_image", cost.paper_rule / 1e9, "lower",
                      notes={"rule": "linear layers one per multiply-add, attention 4 N^2 D, the method's own cost left out"},
                      heading="GFLOP / image, paper's rule", unit="GFLOP")
        yield Measure("compute/paper_rule_cut", cost.paper_rule_cut(dense), "higher", heading="cut, paper's rule", percent=True)
        yield Measure("compute/method_parameters", subject.method.num_parameters, "none", heading="parameters added")
