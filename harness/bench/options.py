"""What the command line may say to a benchmark."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from harness.api import require

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """device, dtype: as torch names them; of the model, where there is one. width: of the random SD3 blocks.

    rounds: A-B-B-A rounds; None takes the benchmark's own number. sweep: the file that `sweep` runs.
    """

    device: str = "cpu"
    dtype: str = "float32"
    width: int = 768
    rounds: int | None = None
    sweep: Path = Path("sweeps/ablation.yaml")

    def __post_init__(self) -> None:
        require(self.dtype in DTYPES, f"--dtype must be one of {', '.join(DTYPES)}, got {self.dtype}")
        require(self.width >= 64 and self.width % 64 == 0, f"--width must be a multiple of 64, a head's width, got {self.width}")
        require(self.rounds is None or self.rounds >= 2,
                f"--rounds must be at least 2 to have a spread (6 for an interval), got {self.rounds}")
        require(self.device == "cpu" or (self.device.startswith("cuda") and _has_cuda()),
                f"--device: '{self.device}' asked for, but torch sees no such device; use cpu")


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()
