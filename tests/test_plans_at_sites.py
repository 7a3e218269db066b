"""Every plan at every kind of site of every family: it works, or it is refused by name before it computes anything wrong."""

import pytest
import torch
from conftest import PROMPTS
from tiny import TinyFlux, TinyPixArt, tiny_dit, tiny_flux, tiny_pixart

import methods as _methods  # noqa: F401  (defines the plans of methods)
from harness.api import ConfigError, Method, Reduction
from harness.backbones.dit import DiT
from harness.cost.flops import Meter
from harness.engine.injection import attach
from harness.engine.sampler import Loop, SamplerConfig, initial_noise
from harness.engine.tokens import AbsorbKeep, CachedKeep, Fold, Keep, Merge, Mixture, PerRow, Skip, SoftMerge
from methods.diffcr.gates import Gate, GatedKeep
from methods.dydit.narrow import MaskedFeedForward, NarrowAttention, NarrowFeedForward
from methods.first_block_cache import _Seen as SeenByCache
from methods.oracle import _MostChanged
from methods.sdtm.cache import _Blend, _Record
from methods.shiva.estimators import Gated
from methods.sparsedit.attention import CrossAttention, MeanAttention
from methods.sparsedit.resized import Generation, MergeBack, Recovery
from methods.taylor_forecast import _Seen as SeenByForecast

CONFIG = SamplerConfig(num_steps=1, guidance_scale=1.0)
BLOCK, HALF = 1, 32
FAMILIES = ("sd3", "flux", "pixart", "dit")


class _Noting:
    def note(self, *found):
        """What steps caches are told."""


def rows(x):
    """Positions (B, HALF) of every second token."""
    return torch.arange(0, x.shape[1], 2, device=x.device).expand(x.shape[0], -1)


def group(x):
    return torch.arange(x.shape[1], device=x.device).div(2, rounding_mode="floor").expand(x.shape[0], -1)


def soft_merge(x, site):
    mix = torch.full((x.shape[0], 1, HALF, 64), 1 / 64)
    return SoftMerge(torch.arange(64), mix, mix.transpose(2, 3), torch.arange(HALF), rows(x))


def recovery(x, site):
    """Of half of the tokens where `Generation` came before, else of all."""
    return Recovery(MergeBack(32), torch.ones(x.shape[0], 64, x.shape[2]), (x.shape[1] // 8, 8), site)


PLANS = {
    Reduction: lambda x, site: Reduction(),
    Keep: lambda x, site: Keep(rows(x), 64),
    CachedKeep: lambda x, site: CachedKeep(rows(x), 64, torch.ones_like(x)),
    AbsorbKeep: lambda x, site: AbsorbKeep(rows(x), x),
    Skip: lambda x, site: Skip(),
    Merge: lambda x, site: Merge(lambda h: h[:, ::2], lambda h: h.repeat_interleave(2, 1), HALF),
    Fold: lambda x, site: Fold(rows(x), group(x)),
    SoftMerge: soft_merge,
    PerRow: lambda x, site: PerRow([Keep(rows(x)[:1], 64), None], 64),
    Mixture: lambda x, site: Mixture([Keep(rows(x), 64), None], [torch.tensor(0.25), torch.tensor(0.75)], 64),
    Gated: lambda x, site: Gated(Keep(rows(x), 64), torch.zeros(x.shape[:2]), "output_gate"),
    GatedKeep: lambda x, site: GatedKeep(rows(x), 64, torch.full((*x.shape[:2], 1), 0.5), {}),
    Gate: lambda x, site: Gate(torch.full((*x.shape[:2], 1), 0.5)),
    NarrowAttention: lambda x, site: NarrowAttention(heads=[0]),
    NarrowFeedForward: lambda x, site: NarrowFeedForward(rows(x), 64, [0], 2),
    MaskedFeedForward: lambda x, site: MaskedFeedForward(torch.tensor([[1.0, 0.0]] * len(x)), torch.ones(x.shape[:2])),
    MeanAttention: lambda x, site: MeanAttention(),
    CrossAttention: lambda x, site: CrossAttention(x[:, ::2]),
    Generation: lambda x, site: Generation((4, 8), site),
    Recovery: recovery,
    _Record: lambda x, site: _Record({}, None),
    _Blend: lambda x, site: _Blend(Fold(rows(x), group(x)), torch.ones_like(x), torch.ones(x.shape[:2]), 0.1),
    _MostChanged: lambda x, site: _MostChanged(x, HALF, 1, site.memory),
    SeenByCache: lambda x, site: SeenByCache(_Noting(), [0, 1]),
    SeenByForecast: lambda x, site: SeenByForecast(_Noting(), 0),
}
WHOLE = (Reduction, _Record, SeenByCache, SeenByForecast)
"""Those that compute what the dense model does."""
AT_BLOCKS = (Gated, GatedKeep, Generation, Recovery, _MostChanged, SeenByCache, SeenByForecast)
AT_ATTENTION, AT_FFN = (NarrowAttention, MeanAttention, CrossAttention), (NarrowFeedForward, MaskedFeedForward)


def refusal(plan: type, kind: str, family: str) -> str | None:
    """The table: what is said where a plan does not run; None where it does."""
    for plans, alone in ((AT_BLOCKS, "block"), (AT_ATTENTION, "attention"), (AT_FFN, "ffn")):
        if plan in plans and kind != alone:
            return f"the plan {plan.__name__} of method 'planned' can be used at {alone} sites alone"
    if plan is Skip and kind == "attention" and family in ("sd3", "flux"):
        return "the plan Skip of method 'planned' computes no token, and what the module gives for text would be missing"
    if family == "flux" and plan in (Merge, Generation) and kind != "ffn":
        return f"{plan.__name__} has no token positions"
    if family == "flux" and plan in AT_ATTENTION:
        return r"not (of|for) FluxAttention with \['image_rotary_emb'\]"
    if plan in (Generation, Recovery) and family != "sd3":
        return f"{plan.__name__} needs diffusers' joint blocks"
    return None


@pytest.fixture(scope="module")
def backbones(tiny_backbone):
    return {"sd3": tiny_backbone, "flux": TinyFlux.from_pipeline(tiny_flux(), resolution=32),
            "pixart": TinyPixArt.from_pipeline(tiny_pixart()), "dit": DiT.from_pipeline(tiny_dit())}


class Planned(Method):
    """`make(hidden_states, site)` at one block."""

    name = "planned"

    def __init__(self, make, kind):
        super().__init__(None)
        self.make, self.sites = make, frozenset({kind})

    def reduce(self, hidden_states, site):
        """The plan."""
        made = self.make.get(site.block)
        return None if made is None else made(hidden_states, site)


def predict(backbone, plan, kind):
    """The prediction (2, C, H, W) with a plan of this class at one block, and what puts the tokens back at the next."""
    make = {BLOCK: PLANS[plan], **({BLOCK + 1: recovery} if plan is Generation else {})} if plan else {}
    loop, method = Loop(backbone, CONFIG), Planned(make, kind)
    noise = initial_noise([1, 2], backbone.latent_shape, torch.device("cpu"), torch.float32)
    prompts = ["3", "7"] if backbone.name == "dit" else PROMPTS[:2]
    with torch.no_grad(), attach(backbone, method, loop.run) as injection:
        return loop.predict(injection, 0, noise, loop.conditioning(prompts), torch.tensor([1, 2]))


def test_the_table_knows_every_plan():
    def below(one):
        return {one, *(found for child in one.__subclasses__() for found in below(child))}

    ours = {plan for plan in below(Reduction) if plan.__module__.startswith(("harness", "methods"))}
    abstract = {"_Resized", "_Attention"}
    assert {plan for plan in ours if plan.__name__ not in abstract} == set(PLANS)


@pytest.mark.parametrize("kind", ["block", "attention", "ffn"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: f"{plan.__module__.split('.')[1]}.{plan.__name__}")
def test_a_plan_works_at_a_site_or_is_refused_by_name(backbones, plan, family, kind):
    backbone, said = backbones[family], refusal(plan, kind, family)
    if said is not None:
        with pytest.raises(ConfigError, match=said):
            predict(backbone, plan, kind)
        return
    found, dense = predict(backbone, plan, kind), predict(backbone, None, kind)
    assert found.shape == dense.shape and torch.isfinite(found).all()
    assert torch.equal(found, dense) if plan in WHOLE else not torch.equal(found, dense)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_skipped_feed_forward_is_one_that_gives_zero(backbones, family):
    backbone = backbones[family]
    skipped = predict(backbone, Skip, "ffn")
    block = backbone.port.blocks(backbone.transformer)[BLOCK].block
    silent = block.ff.register_forward_hook(lambda module, args, output: torch.zeros_like(output))
    wanted = predict(backbone, None, "block")
    silent.remove()
    assert torch.equal(skipped, wanted)


@pytest.mark.parametrize("family", ["pixart", "dit"])
def test_an_attention_without_text_can_be_skipped(backbones, family):
    backbone = backbones[family]
    skipped = predict(backbone, Skip, "attention")
    block = backbone.port.blocks(backbone.transformer)[BLOCK].block
    silent = block.attn1.register_forward_hook(lambda module, args, output: torch.zeros_like(output))
    wanted = predict(backbone, None, "block")
    silent.remove()
    assert torch.equal(skipped, wanted)


@pytest.mark.parametrize("kind", ["block", "attention", "ffn"])
@pytest.mark.parametrize("family", FAMILIES)
def test_plans_made_of_plans_are_counted_part_by_part(backbones, family, kind):
    backbone = backbones[family]
    meter = Meter(backbone, CONFIG)

    def cost(plan):
        return meter.count(Planned({BLOCK: plan}, kind)).transformer

    half = cost(PLANS[Keep])
    assert half < meter.dense.total
    alone = cost(lambda x, site: PerRow([Keep(rows(x), 64)], 64))
    both = cost(lambda x, site: Mixture([Keep(rows(x), 64), PerRow([None], 64)], [torch.tensor(0.5)] * 2, 64))
    assert alone == half and both > meter.dense.total


def test_at_a_branch_a_cached_token_repeats_the_output_and_an_absorbed_one_shares_it():
    hidden, kept = torch.arange(8.0).view(1, 4, 2), torch.tensor([[0, 2]])
    old = torch.full((1, 4, 2), -1.0)
    cached = CachedKeep(kept, 4, old)
    restored = cached.restore(10 * cached.reduce(hidden), None)
    assert restored[0].tolist() == [[0, 10], [-1, -1], [40, 50], [-1, -1]] and torch.equal(cached.updated, restored)
    first = CachedKeep(kept, 4, None)
    assert first.restore(first.reduce(hidden), None)[0, 1].tolist() == [0, 0]
    similar = torch.tensor([[[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]]])
    absorbed = AbsorbKeep(kept, similar)
    out = absorbed.restore(torch.tensor([[[5.0, 5.0], [7.0, 7.0]]]), None)
    assert out[0, :, 0].tolist() == [5, 5, 7, 7]
