"""What FID and KID have in common: Inception features, by one of two libraries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from harness.api import Subject
from harness.metrics.extractors.base import NAMES, Extractor, count_name, device_of
from harness.metrics.extractors.catalogue import build_extractor, check_extractor
from harness.metrics.fidelity.spread import DistanceOptions


@dataclass(frozen=True, kw_only=True)
class InceptionOptions(DistanceOptions):
    """library: whose network and resize. weights: the library's file; None fetches it once. See DistanceOptions."""

    library: Literal["torch-fidelity", "clean-fid"] = "torch-fidelity"
    weights: str | None = None

    def check(self, name: str) -> None:
        """ConfigError when an option of metric `name` is out of range or the file is not the library's."""
        super().check(name)
        check_extractor(f"{name}.weights", self.library, self.weights)

    def measure_name(self, metric: str, num_images: int) -> str:
        """'fidelity/fid_5k', 'fidelity/kid_clean_5k'."""
        return f"fidelity/{metric}{NAMES[self.library]}_{count_name(num_images)}"

    def extractor(self, subject: Subject) -> Extractor:
        """The network, on the device of the trial's model. Raises Unavailable."""
        return build_extractor(self.library, self.weights, device_of(subject))
