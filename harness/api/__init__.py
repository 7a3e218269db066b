"""The contract between the harness and everything that plugs into it. One sitting to read.

`sites`: where a method acts and its plan there. `method`, `backbone`, `metric`, `data`: the four kinds of plug-ins.

Letters used in every shape of this project: B rows of a batch (with classifier-free guidance both halves of an image are
rows), N image tokens before and M after a reduction, D width, T text tokens, P width of the pooled prompt.
Words: `keep_ratio` is the fraction of tokens *computed*, in (0, 1]; `timestep` is the noise level, 1 = pure noise; `step` is
the 0-based index of the sampling loop; `site` is a place where a method may reduce tokens.
"""

from harness.api.backbone import Backbone as Backbone
from harness.api.backbone import Batch as Batch
from harness.api.data import Content as Content
from harness.api.data import DataSet as DataSet
from harness.api.declared import check_method
from harness.api.measure import Measure as Measure
from harness.api.measure import Traits as Traits
from harness.api.method import Method as Method
from harness.api.method import Stage as Stage
from harness.api.method import TrainableMethod as TrainableMethod
from harness.api.metric import Metric as Metric
from harness.api.metric import Planned as Planned
from harness.api.metric import Subject as Subject
from harness.api.metric import Unavailable as Unavailable
from harness.api.metric import disturbance as disturbance
from harness.api.metric import disturbed as disturbed
from harness.api.records import MeasureRecord as MeasureRecord
from harness.api.records import Part as Part
from harness.api.records import Result as Result
from harness.api.records import Trial as Trial
from harness.api.registry import ConfigError as ConfigError
from harness.api.registry import NotHere as NotHere
from harness.api.registry import Registry
from harness.api.registry import brief as brief
from harness.api.registry import build_config as build_config
from harness.api.registry import did_you_mean as did_you_mean
from harness.api.registry import named as named
from harness.api.registry import require as require
from harness.api.registry import show as show
from harness.api.registry import sources_of as sources_of
from harness.api.sites import Call as Call
from harness.api.sites import Reduction as Reduction
from harness.api.sites import Run as Run
from harness.api.sites import Site as Site
from harness.api.sites import SiteKind as SiteKind

METHODS: Registry[Method] = Registry("method", check_method)
BACKBONES: Registry[Backbone] = Registry("backbone")
METRICS: Registry[Metric] = Registry("metric")
DATASETS: Registry[DataSet] = Registry("dataset")
