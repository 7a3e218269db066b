"""The metrics: one import a line fills the registry."""

from harness.metrics import clip_iqa as clip_iqa
from harness.metrics import clip_score as clip_score
from harness.metrics import fd as fd
from harness.metrics import fd_dinov2 as fd_dinov2
from harness.metrics import features as features
from harness.metrics import fid as fid
from harness.metrics import flops as flops
from harness.metrics import hps as hps
from harness.metrics import image_reward as image_reward
from harness.metrics import kid as kid
from harness.metrics import latency as latency
from harness.metrics import lpips as lpips
from harness.metrics import memory as memory
from harness.metrics import paired as paired
from harness.metrics import precision_recall as precision_recall
from harness.metrics import scores as scores
from harness.metrics import tokens as tokens
from harness.metrics import velocity as velocity
