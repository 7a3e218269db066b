"""The catalogue: one import a line fills the registry."""

from methods import dense as dense
from methods import diffcr as diffcr
from methods import diffusers_cache as diffusers_cache
from methods import dydit as dydit
from methods import fewer_steps as fewer_steps
from methods import finetuned as finetuned
from methods import first_block_cache as first_block_cache
from methods import ibtm as ibtm
from methods import norm_topk as norm_topk
from methods import oracle as oracle
from methods import random_drop as random_drop
from methods import sdtm as sdtm
from methods import shiva as shiva
from methods import sparsedit as sparsedit
from methods import taylor_forecast as taylor_forecast
from methods import tofu as tofu
from methods import toma as toma
from methods import tomesd as tomesd
