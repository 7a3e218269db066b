"""Low-rank adapters on the linear layers of attention and feed-forward, through peft, for any diffusers transformer.

Source: LoRA, Hu et al. 2021, arXiv:2106.09685; DoRA, Liu et al. 2024, arXiv:2402.09353.
"""

from __future__ import annotations

import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from harness.api import ConfigError


def check_adapters(transformer: nn.Module, kind: str) -> None:
    """ConfigError where adapters of `kind` are undefined: DoRA divides each row of a weight by its length (its Eq. 5)."""
    if kind != "dora":
        return
    rows = {name: int((torch.linalg.norm(transformer.get_submodule(name).weight, dim=1) == 0).sum())
            for name in adapted_layers(transformer)}
    zero = {name: count for name, count in rows.items() if count}
    if zero:
        name, count = next(iter(zero.items()))
        raise ConfigError(f"train.adapter: dora divides each row of a weight by its length, and {count} of "
                          f"{transformer.get_submodule(name).weight.shape[0]} rows of '{name}' are zero ({len(zero)} such layers "
                          "of the backbone), so it is undefined there; take train.adapter: lora")


def adapted_layers(transformer: nn.Module) -> list[str]:
    """Names of the linear layers that take an adapter."""
    return [name for name, module in transformer.named_modules()
            if isinstance(module, nn.Linear) and "blocks." in name and "norm" not in name]


def add_adapters(transformer: nn.Module, kind: str, rank: int) -> None:
    """Insert trainable float32 adapters ('dora' or 'lora') in place; all else is frozen. The output does not change yet."""
    config = LoraConfig(r=rank, lora_alpha=rank, use_dora=kind == "dora", target_modules=adapted_layers(transformer))
    inject_adapter_in_model(config, transformer)
    for name, parameter in transformer.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # made in the backbone's dtype; in bfloat16 small updates would be lost


def adapter_state(transformer: nn.Module) -> dict[str, Tensor]:
    """The adapters' tensors, on the CPU."""
    return {key: value.detach().cpu().contiguous() for key, value in get_peft_model_state_dict(transformer).items()}


def load_adapters(transformer: nn.Module, state: dict[str, Tensor]) -> None:
    """Fill adapters made by `add_adapters` with the same kind and rank."""
    result = set_peft_model_state_dict(transformer, state)
    if result.unexpected_keys:
        raise ValueError(f"adapter weights do not fit this transformer: unexpected {result.unexpected_keys[:3]}")


def merge_adapters(transformer: nn.Module) -> None:
    """Fold the adapters into the weights and remove their modules, so that inference costs nothing extra."""
    for name, module in list(transformer.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()
            parent, _, child = name.rpartition(".")
            setattr(transformer.get_submodule(parent), child, module.get_base_layer())
    if hasattr(transformer, "peft_config"):
        del transformer.peft_config  # else peft takes a later stage's adapters for a second set beside these
