"""The backbones: one import a line fills the registry."""

from harness.backbones import dit as dit
from harness.backbones import flux as flux
from harness.backbones import pixart as pixart
from harness.backbones import sd3 as sd3
