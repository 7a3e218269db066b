"""FLOPs are what the closed form says, per image, over the whole loop, and a budget is met as far as tokens allow."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny_pipeline
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor

from harness.api import METHODS, ConfigError, Method
from harness.backbones.flux import Flux
from harness.backbones.pixart import PixArt
from harness.backbones.sd3 import SD3
from harness.cost.budget import solve_budget
from harness.cost.flops import Meter
from harness.engine.sampler import SamplerConfig
from harness.engine.tokens import Keep, num_kept

TEXT = 6


@pytest.fixture(scope="module")
def backbone() -> SD3:
    return SD3.from_pipeline(tiny_pipeline(), text_length=TEXT)


@pytest.fixture(scope="module")
def meter(backbone) -> Meter:
    return Meter(backbone, SamplerConfig(num_steps=3, guidance_scale=4.0))


def block_flops(kept: int, text: int, width: int, dual: bool, last: bool) -> tuple[int, int]:
    """(linear, attention) FLOPs of one row of an SD3 block that computes `kept` image tokens, without its modulation."""
    per_token = 2 * (4 + 8) * width**2  # query, key, value, output; feed-forward of four times the width
    linear = per_token * (kept + text) - (last * 2 * (1 + 8) * width**2 * text)  # the last block drops the text's output and mlp
    attention = 4 * (kept + text) ** 2 * width
    if dual:
        linear += 2 * 4 * width**2 * kept
        attention += 4 * kept**2 * width
    return linear, attention


def modulation_flops(width: int, dual: bool, last: bool) -> int:
    return 2 * width**2 * ((9 if dual else 6) + (2 if last else 6))


def outside_flops(config, tokens: int, text: int) -> int:
    """Patch embedding, time and text embedding, final layer."""
    width = config.num_attention_heads * config.attention_head_dim
    patch = config.patch_size**2 * config.in_channels
    time_text = 2 * (256 * width + width**2 + config.pooled_projection_dim * width + width**2)
    return (2 * patch * width * tokens + time_text + 2 * config.joint_attention_dim * width * text + 2 * width * 2 * width
            + 2 * width * config.patch_size**2 * config.out_channels * tokens)


def expected(config, kept_by_block: list[int], tokens: int, text: int) -> tuple[int, int]:
    width = config.num_attention_heads * config.attention_head_dim
    linear, attention = outside_flops(config, tokens, text), 0
    for block, kept in enumerate(kept_by_block):
        dual, last = block in config.dual_attention_layers, block == config.num_layers - 1
        more, core = block_flops(kept, text, width, dual, last)
        linear, attention = linear + more + modulation_flops(width, dual, last), attention + core
    return linear, attention


def test_dense_flops_are_the_closed_form(backbone, meter):
    linear, attention = expected(backbone.transformer.config, [64] * 4, 64, TEXT)
    assert (meter.dense.linear, meter.dense.attention, meter.dense.method) == (3 * 2 * linear, 3 * 2 * attention, 0)


@pytest.mark.parametrize("keep_ratio", [0.9, 0.5, 0.123])
def test_reduced_flops_are_the_closed_form(backbone, meter, keep_ratio):
    kept = num_kept(keep_ratio, 64)
    linear, attention = expected(backbone.transformer.config, [64, kept, kept, kept], 64, TEXT)
    cost = meter.count(METHODS.build("random_drop", {"keep_ratio": keep_ratio}))
    assert (cost.linear, cost.attention, cost.method) == (3 * 2 * linear, 3 * 2 * attention, 0)


def test_without_guidance_half_of_the_rows_are_paid(backbone, meter):
    alone = Meter(backbone, SamplerConfig(num_steps=3, guidance_scale=1.0))
    assert 2 * alone.dense.total == meter.dense.total


def test_matching_is_booked_to_the_method_and_counts_in_the_total(meter):
    # tomesd compares every token with one destination of each 2 x 2 cell: (64 - 16) x 16 products of width 32, two rows
    cost = meter.count(METHODS.build("tomesd", {"keep_ratio": 0.5}))
    matching = 2 * (64 - 16) * 16 * 32
    assert cost.method == 3 * 2 * 4 * matching
    assert cost.total == cost.linear + cost.attention + cost.method
    assert cost.paper_rule == cost.linear / 2 + cost.attention


class Ramp(Method):
    """Keeps more tokens at each step; reads the step, so no step may stand for another."""

    name = "ramp"

    def reduce(self, hidden_states: Tensor, site) -> Keep:
        num = 16 * (site.step + 1)
        return Keep(site.rand(64).topk(num, dim=1).indices, 64)


class Warming(Method):
    """Carries state: reduces only after it has seen a prediction."""

    name = "warming"
    warm = False

    def reset(self) -> None:
        self.warm = False

    def observe(self, call, prediction: Tensor) -> None:
        self.warm = True

    def reduce(self, hidden_states: Tensor, site) -> Keep | None:
        return Keep(site.rand(64).topk(16, dim=1).indices, 64) if self.warm else None


@pytest.mark.parametrize(("method", "kept"), [(Ramp, (16, 32, 48)), (Warming, (64, 16, 16))])
def test_steps_that_differ_are_counted_one_by_one(backbone, meter, method, kept):
    cost, fractions = meter.counted(method(None))
    linear, attention = zip(*(expected(backbone.transformer.config, [k] * 4, 64, TEXT) for k in kept), strict=True)
    assert (cost.linear, cost.attention) == (2 * sum(linear), 2 * sum(attention))
    assert fractions["ffn"] == [[k / 64] * 4 for k in kept]


def test_counting_twice_gives_the_same_and_leaves_the_method_alone(meter):
    method = METHODS.build("tomesd", {"keep_ratio": 0.6, "ffn": True})
    before = dict(vars(method))
    assert meter.count(method) == meter.count(method)
    assert vars(method) == before


def full_size(**changes) -> SD3:
    """The shapes of SD3-Medium at 1024 pixels; no memory behind them."""
    config = dict(sample_size=128, patch_size=2, in_channels=16, out_channels=16, num_layers=24, attention_head_dim=64,
                  num_attention_heads=24, joint_attention_dim=4096, caption_projection_dim=1536, pooled_projection_dim=2048,
                  pos_embed_max_size=192)
    with torch.device("meta"):
        transformer = SD3Transformer2DModel(**{**config, **changes})
    parts = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3"))
    pipe = StableDiffusion3Pipeline(transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(), **parts)
    return SD3.from_pipeline(pipe, text_length=333)


def test_the_published_sizes_of_stable_diffusion_3():
    one = SamplerConfig(num_steps=1, guidance_scale=1.0)
    pair = SamplerConfig(num_steps=1, guidance_scale=7.0)
    medium = full_size()
    assert Meter(medium, one).dense.total / 1e12 == pytest.approx(8.904, abs=0.001)
    assert Meter(medium, pair).dense.paper_rule / 1e12 == pytest.approx(11.797, abs=0.002)
    larger = Meter(full_size(dual_attention_layers=tuple(range(13)), pos_embed_max_size=384, qk_norm="rms_norm"), one)
    assert larger.dense.total / 1e12 == pytest.approx(11.250, abs=0.001)
    cost = larger.count(METHODS.build("random_drop", {"keep_ratio": 0.6}))
    assert cost.cut(larger.dense) == pytest.approx(0.442, abs=0.001)


def test_the_papers_rule_gives_its_flux_and_its_pixart_only_with_cross_attention_as_self_attention():
    def shapes(family, name):
        return family(family.Config(weights="shape_only", architecture=name, device="meta"))

    flux = Meter(shapes(Flux, "flux-dev"), SamplerConfig(num_steps=1, guidance_scale=3.5))
    assert flux.dense.paper_rule / 1e12 == pytest.approx(44.63, abs=0.005)
    pixart = Meter(shapes(PixArt, "pixart-sigma"), SamplerConfig(num_steps=1, guidance_scale=4.5))
    assert pixart.dense.paper_rule / 1e12 == pytest.approx(8.957, abs=0.002)
    run, (text, _) = pixart.run, pixart.loop.conditioning([""]).values()
    per_key = 4 * run.num_tokens * run.width * run.num_blocks * run.guidance_halves  # of one attention in every block
    as_printed = pixart.dense.paper_rule + per_key * (run.num_tokens - text.shape[1])
    assert as_printed / 1e12 == pytest.approx(12.97, abs=0.005)


# ---------------------------------------------------------------------------------------------- budgets


@pytest.fixture(scope="module")
def possible_cuts(meter) -> list[float]:
    return [meter.cut(METHODS.build("random_drop", {"keep_ratio": kept / 64})) for kept in range(1, 65)]


@pytest.mark.parametrize("cut", [0.1, 0.24, 0.41, 0.6])
def test_a_solved_budget_is_the_nearest_that_tokens_allow(meter, possible_cuts, cut):
    solution = solve_budget(meter, "random_drop", {}, cut)
    assert abs(solution.executed - cut) == pytest.approx(min(abs(c - cut) for c in possible_cuts), abs=1e-12)
    assert solution.executed == meter.cut(METHODS.build("random_drop", {"keep_ratio": solution.value}))
    assert solution.asked == cut


def test_the_methods_own_cost_is_paid_from_the_budget(meter):
    solution = solve_budget(meter, "tomesd", {"ffn": True}, 0.2)
    cost = meter.count(METHODS.build("tomesd", {"ffn": True, "keep_ratio": solution.value}))
    assert cost.method > 0 and 1 - cost.total / meter.dense.total == pytest.approx(0.2, abs=0.01)


def test_a_budget_out_of_reach_says_what_is_reachable_and_what_to_change(meter):
    with pytest.raises(ConfigError, match=r"'tomesd' cannot cut 50.0% .* keep_ratio in \[0.25, 1\] it reaches 0 to \d+.\d%; "
                                          r"set ffn: true, or ask for at most 0.\d+"):
        solve_budget(meter, "tomesd", {}, 0.5)
    with pytest.raises(ConfigError, match="ask for at most"):
        solve_budget(meter, "random_drop", {"first_block": True}, 0.99)


def test_a_budget_needs_a_free_knob(meter):
    with pytest.raises(ConfigError, match="'dense' has no knob"):
        solve_budget(meter, "dense", {}, 0.2)
    with pytest.raises(ConfigError, match="already sets keep_ratio=0.5"):
        solve_budget(meter, "random_drop", {"keep_ratio": 0.5}, 0.2)
    with pytest.raises(ConfigError, match=r"flops_cut must lie in \(0, 1\), got 24"):
        solve_budget(meter, "random_drop", {}, 24)
