"""A backbone of a few numbers, for tests of the training recipe that take milliseconds."""

from types import SimpleNamespace

import torch
from torch import Tensor, nn

from harness.api import Backbone, Run, Stage, TrainableMethod
from harness.engine.ports import BlockView, ModulePort, Port
from harness.training.batches import TrainingSet

WIDTH, GRID = 4, (2, 2)
_PORT = ModulePort("hidden_states", 0, output=None)


class ToyBlock(nn.Module):
    """x + linear(x)."""

    def __init__(self) -> None:
        super().__init__()
        self.attn1, self.norm1 = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, N, D)."""
        return hidden_states + self.attn1(hidden_states)


class ToyTransformer(nn.Module):
    """Blocks one after the other on the pixels as tokens."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, num_blocks: int) -> None:
        super().__init__()
        self.transformer_blocks = nn.ModuleList(ToyBlock() for _ in range(num_blocks))
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        """(B, C, H, W)."""
        tokens = hidden_states.flatten(2).transpose(1, 2)
        for block in self.transformer_blocks:
            tokens = block(tokens)
        return tokens.transpose(1, 2).view_as(hidden_states)


class Toy(Backbone):
    """Rectified flow on (4, 2, 2) latents. captions: of every call of `encode`."""

    name, latent_shape, resolution = "toy", (WIDTH, *GRID), 2
    fingerprint, default_num_steps, default_guidance_scale = "toy", 4, 1.0
    port = Port(lambda transformer: [BlockView(block, _PORT, {}) for block in transformer.transformer_blocks],
                lambda transformer, kwargs: kwargs["timestep"][:, None].expand(-1, WIDTH),
                lambda transformer, kwargs: kwargs["timestep"][:, None].expand(-1, 2))

    def __init__(self, num_blocks: int = 4) -> None:
        torch.manual_seed(0)
        self.transformer = ToyTransformer(num_blocks).requires_grad_(False)
        self.scheduler, self.captions = SimpleNamespace(), []

    def encode(self, prompts):
        """Nothing, and it is noted."""
        self.captions.append(list(prompts))
        return {}

    def denoise(self, latents, timestep, conditioning):
        """The blocks."""
        return self.transformer(latents, timestep=timestep)

    def decode(self, latents):
        """Latents."""
        return latents

    encode_images = decode

    def noised(self, latents, noise, level):
        """A straight line."""
        t = level[:, None, None, None]
        return (1 - t) * latents + t * noise, level * 1000, noise - latents

    def set_timesteps(self, num_steps):
        """Even."""
        return torch.linspace(1000, 1000 / num_steps, num_steps)

    def noise_level(self, timestep):
        """0..1000 -> 0..1."""
        return timestep / 1000

    def run(self, timesteps, guidance_halves):
        """Of the blocks."""
        return Run("toy", len(self.transformer.transformer_blocks), GRID, WIDTH, 2, tuple((timesteps / 1000).tolist()),
                   guidance_halves, attention="self")

    def on_meta(self):
        """Not for counting."""
        raise NotImplementedError


class Number(TrainableMethod, nn.Module):
    """A number that trains; its loss is `slope` times it. Nothing is reduced."""

    name, needs_teacher = "number", False
    stages = (Stage("only", share=1.0),)
    slope, decay, rate = 1.0, None, 0.1

    def __init__(self) -> None:
        super().__init__(None)
        self.number = nn.Parameter(torch.ones(()))

    def reduce(self, hidden_states, site):
        """None."""

    def stage_key(self, stage):
        """No options."""
        return {}

    def start_stage(self, stage, generator):
        """The number."""
        decay = {} if self.decay is None else {"weight_decay": self.decay}
        return [{"params": [self.number], "lr": self.rate, "name": "number", **decay}]

    def losses(self):
        """slope * number."""
        return {"number": self.slope * self.number}


def toy_data(count: int = 12) -> TrainingSet:
    """Random latents whose captions are their numbers."""
    latents = torch.randn(count, WIDTH, *GRID, generator=torch.Generator().manual_seed(3))
    return TrainingSet(latents, [str(index) for index in range(count)], "toy data")
