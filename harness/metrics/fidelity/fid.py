"""FID: Frechet distance of Inception features to the real images, by torch-fidelity's or by clean-fid's network and resize.

fid_<n> is torch-fidelity's (the value of the original code), fid_clean_<n> clean-fid's; 5000 images are fid_5k. Numbers compare
at equal n, library and reference only, and below 2048 images the bias that all methods share is most of the value.

Source: Heusel et al. 2017, arXiv:1706.08500; Parmar et al. 2022, arXiv:2104.11222.
Differs: the matrix root by symmetric eigenvalues (`Frechet`), equal to the libraries' to 1e-5.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from harness.api import METRICS, Measure, Metric, Subject, Traits, require
from harness.metrics.extractors.base import Extractor, count_name, distance_title
from harness.metrics.fidelity import fd
from harness.metrics.fidelity.fd import Frechet
from harness.metrics.fidelity.feature_sets import features_of
from harness.metrics.fidelity.inception_options import InceptionOptions
from harness.metrics.fidelity.spread import DistanceOptions, distance_measure, images_and_dense


@METRICS.register("fid")
class Fid(Metric):
    """Against the real images of the trial's data split; lower is better."""

    group = "fidelity"
    needs_reference = True
    least_images = 4

    @dataclass(frozen=True, kw_only=True)
    class Config(InceptionOptions):
        """See InceptionOptions."""

        def __post_init__(self) -> None:
            self.check("fid")

    def names(self, num_images: int) -> tuple[str, ...]:
        """'fidelity/fid_5k', and 'fidelity/fid_inf_5k' where there are images enough to extrapolate."""
        return with_extrapolation(self.config.measure_name("fid", num_images), num_images)

    def measure(self, subject: Subject) -> Iterator[Measure]:
        """The distance with its interval, spread over subsets, and gap to dense; the extrapolated one."""
        extractor = self.config.extractor(subject)
        title = distance_title("FID", self.config.library, count_name(len(subject.images)))
        said = Traits(title=title, lead=2)
        yield from frechet_measures(self.names(len(subject.images)), subject, extractor, self.config, said)


def with_extrapolation(name: str, num_images: int) -> tuple[str, ...]:
    """`name`, such as 'fidelity/fid_clean_5k', and what its extrapolation is called where there is one: 'fid_clean_inf_5k'."""
    start, _, count = name.rpartition("_")
    return (name, f"{start}_inf_{count}") if num_images >= fd.EXTRAPOLATE_FROM else (name,)


def frechet_measures(names: Sequence[str], subject: Subject, extractor: Extractor, options: DistanceOptions,
                     said: Traits) -> Iterator[Measure]:
    """The Frechet distance of a trial's images in the features of `extractor`, of which it says `said`; its extrapolation."""
    n = len(subject.images)
    require(n >= 4, f"{names[0]}: a distance with its spread needs at least 4 images, and the trial has {n}; widen seeds")
    features = features_of(subject, extractor)
    frechet = Frechet(images_and_dense(features), features.reference)
    found = distance_measure(names[0], lambda weights: [frechet(row) for row in weights], features, options)
    measure = replace(found.measure, title=said.title, lead=said.lead)
    yield measure
    notes = {"reference_id": features.reference_id, "num_reference": len(features.reference)}
    yield from fd.extrapolation(names[-1], measure, found.whole, found.left_out, notes)
