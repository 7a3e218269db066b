"""Which schedulers of diffusers run here, one rule for every family: a scheduler is run as its pipeline runs it, or refused.

What the one sampler gives a scheduler: each of its timesteps once, in its order (a second-order one lists its extra evaluations
there, and they are counted as executed), the prediction, and, where its steps draw noise, a generator for each image, so that an
image depends on its own seed. What needs more, such as inputs scaled to a noise level, is refused before anything is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from harness.api import ConfigError, require

FILE = "scheduler/scheduler_config.json"
"""Where the folder of a pipeline says which scheduler it has."""
FLOW, NOISE = "flow_prediction", "epsilon"
"""What a transformer predicts, in the words of `prediction_type`."""
STEADY = ("dpmsolver", "dpmsolver++", "deis")

Config = Mapping[str, Any]


def _never(config: Config) -> bool:
    return False


def _always(config: Config) -> bool:
    return True


def _where_sde(config: Config) -> bool:
    return config.get("algorithm_type") not in STEADY


@dataclass(frozen=True)
class _Rule:
    """predicts: prediction types that it takes; None: it is made for flows and has no such option. draws: whether its steps draw
    noise. absent: options that must not be set, for they ask for more than is done here. not_for: families whose pipeline cannot
    run it.
    """

    predicts: tuple[str, ...] | None
    draws: Callable[[Config], bool] = _never
    absent: tuple[str, ...] = ()
    not_for: tuple[str, ...] = ()


_EITHER = (NOISE, FLOW)
_RULES = {
    "FlowMatchEulerDiscreteScheduler": _Rule(None, lambda config: bool(config.get("stochastic_sampling")), ("invert_sigmas",)),
    "FlowMatchHeunDiscreteScheduler": _Rule(None, not_for=("flux",)),
    "FlowMatchLCMScheduler": _Rule(None, _always, ("invert_sigmas", "scale_factors")),
    "DPMSolverMultistepScheduler": _Rule(_EITHER, _where_sde, ("variance_type",)),
    "DPMSolverSinglestepScheduler": _Rule(_EITHER, _where_sde, ("variance_type",)),
    "UniPCMultistepScheduler": _Rule(_EITHER),
    "DEISMultistepScheduler": _Rule(_EITHER),
    "DDIMScheduler": _Rule((NOISE,)),
    "DDPMScheduler": _Rule((NOISE,), _always),
    "LCMScheduler": _Rule((NOISE,), _always),
}
"""Each is compared with its pipeline in tests/test_schedulers.py."""


def known_for(family: str, predicts: str) -> list[str]:
    """Names of the schedulers that a family runs."""
    flows = predicts == FLOW
    return sorted(name for name, rule in _RULES.items()
                  if family not in rule.not_for and (flows if rule.predicts is None else predicts in rule.predicts))


def check_scheduler(name: str, config: Config, family: str, predicts: str) -> None:
    """ConfigError where a pipeline's scheduler needs more of the sampler than it does, or is made for another prediction.

    name: its class. predicts: what the family's transformer predicts, FLOW or NOISE.
    """
    known, where = known_for(family, predicts), f"backbone.weights: {FILE}: {name}"
    require(name in known, f"{where} draws noise of its own, scales its inputs, or does not fit a model that predicts "
            f"{_said(predicts)}; save the pipeline with one of: {', '.join(known)}")
    rule = _RULES[name]
    for option in rule.absent:
        require(not config.get(option), f"{where}: {option}: {config.get(option)!r} is not run here; remove {option}")
    require(config.get("variance_type") not in ("learned", "learned_range"), f"{where}: variance_type: "
            f"{config.get('variance_type')} needs the learned variance, which is dropped here; write variance_type: fixed_small")
    if rule.predicts is None:
        return
    asked, flows = config.get("prediction_type", NOISE), bool(config.get("use_flow_sigmas"))
    require(asked == predicts, f"{where}: prediction_type is '{asked}', not {predicts}, which backbone '{family}' predicts; "
            f"write prediction_type: {predicts}")
    require(flows == (predicts == FLOW), f"{where}: use_flow_sigmas: {str(flows).lower()}, but backbone '{family}' predicts "
            f"{_said(predicts)}; write use_flow_sigmas: {str(not flows).lower()}")


def _said(predicts: str) -> str:
    return "the velocity of a flow" if predicts == FLOW else "the noise"


def draws_noise(scheduler: Any) -> bool:
    """Whether the steps of a checked scheduler draw noise."""
    return _RULES[type(scheduler).__name__].draws(scheduler.config)


def spread(scheduler: Any, num_steps: int, device: torch.device, **options: Any) -> Tensor:
    """The timesteps of `num_steps` steps, in the order in which the transformer is asked: (evaluations,).

    A second-order scheduler asks more than once per step. On a meta twin the schedule stays a real one: tables are built from it.
    """
    total = scheduler.config.num_train_timesteps
    require(num_steps <= total, f"sampler.num_steps: {num_steps}, but the scheduler of the model knows {total} noise levels; "
            f"take at most {total}")
    count = {} if "sigmas" in options else {"num_inference_steps": num_steps}
    try:
        scheduler.set_timesteps(**count, device="cpu" if device.type == "meta" else device, **options)
    except ValueError as error:
        raise ConfigError(f"sampler.num_steps: {num_steps}: {type(scheduler).__name__} refuses ({error}); take another number, "
                          f"or correct {FILE}") from None
    if hasattr(scheduler, "set_begin_index"):  # else it looks its place up, and takes the second of two equal timesteps
        scheduler.set_begin_index(0)
    return scheduler.timesteps


def copied(scheduler: Any) -> Any:
    """A fresh scheduler of the same class and options, for a twin that counts."""
    return type(scheduler).from_config(scheduler.config)
