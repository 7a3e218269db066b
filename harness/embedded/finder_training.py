"""How the finder of subjects is trained and measured. The command line is `harness.embedded.train_finder`."""

import json
import logging
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from harness.data.scene_plan import scene, subjects
from harness.data.scenes import render
from harness.embedded.finder import CELLS, FACTS, WEIGHTS, Finder, asked_found, find, found, signed
from harness.storage.durable import writing

BATCH, PEAK, WARM_UP, EMA = 48, 2e-3, 100, 0.995
SAVE_EVERY_S, LOG_EVERY = 120, 50
NUM_HELD_OUT = 2000
log = logging.getLogger(__name__)


def batch(start: int, size: int, split: str = "train") -> tuple[np.ndarray, Tensor]:
    """Scenes start ... start + size - 1: images (size, 128, 128, 3), and the class of each cell (size, 16, 16)."""
    order, images, labels = {name: 1 + place for place, name in enumerate(subjects())}, [], []
    for index in range(start, start + size):
        one = scene(split, index)
        picture, masks = render(one)
        share = masks.reshape(len(masks), CELLS, -1, CELLS, masks.shape[-1] // CELLS).mean((2, 4))  # (k, 16, 16)
        classes = np.array([order[placed.subject] for placed in one.placed])
        labels.append(np.where(share.max(0) >= 0.3, classes[share.argmax(0)], 0))
        images.append(picture)
    return np.stack(images), torch.from_numpy(np.stack(labels))


def worn(images: Tensor) -> Tensor:
    """(B, 3, H, W), half of them blurred and noised."""
    size = int(torch.randint(48, 128, ()))
    soft = F.interpolate(F.interpolate(images, (size, size), mode="bilinear", antialias=True), images.shape[-2:], mode="bilinear")
    noisy = soft + 0.12 * torch.rand(()) * torch.randn_like(soft)
    return torch.where(torch.rand(len(images), 1, 1, 1) < 0.5, noisy, images)


class FinderTraining:
    """The network, its averaged weights, its optimiser and its checkpoint."""

    def __init__(self, path: Path, steps: int) -> None:
        self.path, self.steps, self.step = path, steps, 0
        torch.manual_seed(0)
        self.network, self.averaged = Finder().to(memory_format=torch.channels_last), Finder().eval().requires_grad_(False)
        self.averaged.load_state_dict(self.network.state_dict())
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=PEAK, weight_decay=0.01)
        if path.exists():
            saved = torch.load(path, weights_only=True)
            self.network.load_state_dict(saved["network"])
            self.averaged.load_state_dict(saved["averaged"])
            self.optimizer.load_state_dict(saved["optimizer"])
            torch.set_rng_state(saved["rng"])
            self.step = saved["step"]

    def save(self) -> None:
        """Replace the checkpoint in one move."""
        with writing(self.path) as file:
            torch.save({"network": self.network.state_dict(), "averaged": self.averaged.state_dict(),
                        "optimizer": self.optimizer.state_dict(), "rng": torch.get_rng_state(), "step": self.step}, file)

    def advance(self) -> float:
        """One step; returns the loss. Cosine decay to zero after a warm-up."""
        done = self.step / self.steps
        for group in self.optimizer.param_groups:
            group["lr"] = PEAK * min(1.0, (self.step + 1) / WARM_UP) * 0.5 * (1 + np.cos(np.pi * done))
        images, labels = batch(self.step * BATCH, BATCH)
        loss = F.cross_entropy(self.network(worn(signed(images)).to(memory_format=torch.channels_last)), labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        with torch.no_grad():
            for average, now in zip(self.averaged.parameters(), self.network.parameters(), strict=True):
                average.lerp_(now, 1 - min(EMA, (1 + self.step) / (10 + self.step)))
        return float(loss.detach())

    def run(self) -> None:
        """Go on to the last step, with a checkpoint every two minutes."""
        saved, losses = time.monotonic(), []
        while self.step < self.steps:
            losses.append(self.advance())
            if self.step % LOG_EVERY == 0:
                log.info("finder step %d of %d, loss %.4f", self.step, self.steps, sum(losses) / len(losses))
                losses.clear()
            if time.monotonic() - saved > SAVE_EVERY_S:
                self.save()
                saved = time.monotonic()
        self.save()


def held_out(network: Finder, num: int = NUM_HELD_OUT) -> dict:
    """What it reaches on `num` scenes of the reference split, which share no pair of subjects with its training."""
    scenes = [scene("reference", index) for index in range(num)]
    probabilities = np.concatenate([find(batch(start, 100, "reference")[0], network) for start in range(0, num, 100)])
    order = {name: place for place, name in enumerate(subjects())}
    there = np.zeros((num, len(order)), bool)
    for row, one in enumerate(scenes):
        there[row, [order[name] for name in one.subjects]] = True
    seen = found(probabilities)
    cells = np.concatenate([batch(start, 100, "reference")[1].numpy() for start in range(0, num, 100)])
    guess = probabilities.argmax(1)
    both, either = ((guess > 0) & (cells > 0)).sum(), ((guess > 0) | (cells > 0)).sum()
    asked_for = asked_found([one.caption for one in scenes], probabilities)
    return {"num_scenes": num, "subject_accuracy": round(float(np.mean(asked_for)), 4),
            "recall": round(float(seen[there].mean()), 4), "precision": round(float(there[seen].mean()), 4),
            "cell_accuracy": round(float((guess == cells).mean()), 4), "foreground_iou": round(float(both / either), 4)}


def export(training: FinderTraining) -> dict:
    """Write the averaged weights in half precision, and the facts, measured with those."""
    state = {name: tensor.half().contiguous() for name, tensor in training.averaged.state_dict().items()}
    training.averaged.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    facts = {"steps": training.step, "batch": BATCH, "parameters": sum(p.numel() for p in training.averaged.parameters()),
             "held_out": held_out(training.averaged)}
    save_file(state, WEIGHTS)
    FACTS.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return facts
