"""The catalogue: one import a line fills the registry."""

from methods import dense as dense
from methods import random_drop as random_drop
from methods import shiva as shiva
from methods import tomesd as tomesd
