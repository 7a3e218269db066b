"""The metrics: one import a line fills the registry."""

from harness.metrics import fd as fd
from harness.metrics import features as features
from harness.metrics import flops as flops
from harness.metrics import latency as latency
from harness.metrics import memory as memory
from harness.metrics import paired as paired
from harness.metrics import scores as scores
from harness.metrics import tokens as tokens
from harness.metrics import velocity as velocity
