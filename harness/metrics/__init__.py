"""The metrics: one import a line fills the registry."""

from harness.metrics.cost import flops as flops
from harness.metrics.cost import latency as latency
from harness.metrics.cost import memory as memory
from harness.metrics.cost import tokens as tokens
from harness.metrics.dense import features as features
from harness.metrics.dense import lpips as lpips
from harness.metrics.dense import paired as paired
from harness.metrics.dense import scores as scores
from harness.metrics.dense import velocity as velocity
from harness.metrics.fidelity import fd as fd
from harness.metrics.fidelity import fd_dinov2 as fd_dinov2
from harness.metrics.fidelity import fid as fid
from harness.metrics.fidelity import kid as kid
from harness.metrics.fidelity import precision_recall as precision_recall
from harness.metrics.prompt import clip_iqa as clip_iqa
from harness.metrics.prompt import clip_score as clip_score
from harness.metrics.prompt import hps as hps
from harness.metrics.prompt import image_reward as image_reward
