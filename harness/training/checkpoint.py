"""Checkpoints inside a stage: everything the next step depends on, in one safetensors file, so that a killed job goes on."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from harness.api import TrainableMethod
from harness.storage.durable import placed
from harness.training.batches import Batches

log = logging.getLogger(__name__)


@dataclass
class StageState:
    """A stage between two steps. generator: the method's own randomness. step: steps done. series: what was recorded."""

    method: TrainableMethod
    adapters: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    batches: Batches
    generator: torch.Generator
    step: int = 0
    series: dict[str, list[tuple[int, float]]] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write the state to `path`, which is whole at every moment."""
        tensors = {f"method.{name}": value for name, value in self.method.state_dict().items()}
        tensors |= {f"adapters.{name}": value for name, value in self.adapters.items()}
        for index, moments in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": value for name, value in moments.items()}
        tensors |= {f"batches.{name}": value for name, value in self.batches.state().items()}
        tensors["generator"] = self.generator.get_state()
        facts = {"step": self.step, "series": self.series, "method": self.method.training_state()}
        with placed(path) as unfinished:  # clones: safetensors refuses tensors that share memory
            save_file({name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}, unfinished,
                      metadata={"facts": json.dumps(facts)})

    def load(self, path: Path) -> None:
        """Go on from `path`. Without a file there, or with one that cannot be read, the stage begins at its first step."""
        if not path.exists():
            return
        try:
            with safe_open(path, "pt") as file:
                tensors, facts = {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["facts"])
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            log.warning("the checkpoint %s cannot be read (%s); the stage begins anew", path, error)
            return
        self._restore(tensors)
        self.step = facts["step"]
        self.series = {name: [(step, value) for step, value in points] for name, points in facts["series"].items()}
        self.method.load_training_state(facts["method"])
        log.info("training goes on at step %d of the stage, from %s", self.step, path)

    def _restore(self, tensors: dict[str, Tensor]) -> None:
        self.method.load_state_dict(_under("method.", tensors))
        with torch.no_grad():
            for name, value in _under("adapters.", tensors).items():
                self.adapters[name].copy_(value)
        moments: dict[int, dict[str, Tensor]] = {}
        for key, value in _under("optimizer.", tensors).items():
            index, name = key.split(".", 1)
            moments.setdefault(int(index), {})[name] = value
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})
        self.batches.load_state(_under("batches.", tensors))
        self.generator.set_state(tensors["generator"])


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
