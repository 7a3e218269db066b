"""Every method on every family of backbones: it runs, or it refuses with the reason; docs/backbones.md says which."""

import re
from pathlib import Path

import pytest
import torch
from conftest import TinySD3, tiny_pipeline
from tiny import TinyFlux, TinyPixArt, tiny_dit, tiny_flux, tiny_pixart

from harness.api import METHODS, ConfigError, Method
from harness.backbones.dit import DiT
from harness.cost.flops import Meter
from harness.engine.sampler import SamplerConfig, sample

CONFIG = SamplerConfig(num_steps=4, guidance_scale=3.0, batch_size=3)
SEEDS = [3, 1, 159]
PROMPTS = {"dit": ["3", "7", "500"]}
FAMILIES = {"sd3": lambda: TinySD3.from_pipeline(tiny_pipeline()), "flux": lambda: TinyFlux.from_pipeline(tiny_flux(), 32),
            "pixart": lambda: TinyPixArt.from_pipeline(tiny_pixart()), "dit": lambda: DiT.from_pipeline(tiny_dit())}
NAMES = METHODS.names()
DOCS = Path(__file__).parent.parent / "docs" / "backbones.md"


@pytest.fixture(scope="module", params=FAMILIES)
def backbone(request):
    """Shared by the tests of a family: leave it as you found it."""
    torch.manual_seed(0)
    made = FAMILIES[request.param]()
    made.family = request.param
    for parameter in made.transformer.parameters():  # gates that begin at zero would hide what a method does
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    return made


def documented(family: str) -> dict[str, str]:
    """{method: 'runs' or the reason} of a column of the table in the docs."""
    lines = [line.split("|")[1:-1] for line in DOCS.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    start = next(i for i, cells in enumerate(lines) if cells[0].strip() == "method")
    column = [cell.strip() for cell in lines[start]].index(family)
    rows = [[cell.strip() for cell in cells] for cells in lines[start + 2:]]
    return {row[0].strip("`"): row[column] for row in rows if re.fullmatch("`[a-z0-9_]+`", row[0])}


def build(name: str, ratio: float | None):
    """The method with its knob at `ratio` and seeded parameters."""
    torch.manual_seed(0)
    knob = METHODS.get(name).knob
    return METHODS.build(name, {knob: ratio} if knob and ratio else {})


def drawn(backbone, method, seeds=SEEDS, size=3):
    """Latents (B, C, H, W) and the kept fractions as executed."""
    prompts, kept = PROMPTS.get(backbone.family, ["a red apple", "a cat", "two dogs"]), {}

    def read(live):
        kept.update({kind: live.token_count.kept(kind, live.run.num_steps) for kind in ("attention", "ffn")})

    config = SamplerConfig(num_steps=4, guidance_scale=3.0, batch_size=size)
    chosen = [prompts[SEEDS.index(seed)] for seed in seeds]
    return torch.cat([batch.latents for batch in sample(backbone, method, config, chosen, seeds, read)]), kept


def runs(backbone, name: str) -> bool:
    """Whether the docs say that it runs; if not, that it refuses in words is checked here."""
    said = documented(backbone.family)[name]
    if said == "runs":
        return True
    with pytest.raises(ConfigError) as caught:
        drawn(backbone, build(name, 0.6))
    assert said in str(caught.value), "the table gives a part of the message"
    return False


def test_the_table_in_the_docs_names_every_method():
    for family in FAMILIES:
        assert sorted(documented(family)) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_what_runs_is_counted_and_the_rest_refuses(backbone, name):
    if runs(backbone, name):
        latents, kept = drawn(backbone, build(name, 0.6))
        assert torch.isfinite(latents).all()
        if not METHODS.get(name).dynamic:
            counted = Meter(backbone, CONFIG).counted(build(name, 0.6))[1]
            for kind in kept:
                torch.testing.assert_close(torch.tensor(kept[kind]), torch.tensor(counted[kind]), atol=0.01, rtol=0)


OTHERS = pytest.mark.parametrize("backbone", [family for family in FAMILIES if family != "sd3"], indirect=True)
"""What test_method_contract shows on SD3 is shown on the other families here."""


@OTHERS
@pytest.mark.parametrize("name", [name for name in NAMES if METHODS.get(name).knob])
def test_a_ratio_of_one_is_the_dense_model_and_less_is_not(backbone, name):
    if runs(backbone, name):
        dense, _ = drawn(backbone, build("dense", None))
        assert torch.equal(drawn(backbone, build(name, 1.0))[0], dense)
        assert not torch.allclose(drawn(backbone, build(name, 0.5))[0], dense, atol=1e-5)
        assert torch.equal(drawn(backbone, build("dense", None))[0], dense), "it left something behind"


@OTHERS
@pytest.mark.parametrize("name", NAMES)
def test_an_image_does_not_depend_on_its_batch(backbone, name):
    if runs(backbone, name):
        together, _ = drawn(backbone, build(name, 0.6))
        alone, _ = drawn(backbone, build(name, 0.6), SEEDS[2:], 1)
        scale = float(together.abs().max())  # solvers of noise prediction multiply rounding at the noisiest step
        torch.testing.assert_close(alone[0], together[2], atol=1e-4 * max(1.0, scale), rtol=0)


class Idle(Method):
    """Has sites and reduces nothing; with `asks` it reads what conditions the model."""

    name, sites, asks = "idle", frozenset({"block", "attention", "ffn"}), False

    def reduce(self, hidden_states, site):
        """None."""
        if self.asks:
            assert site.call.time_embedding.shape == (1, 32) and site.call.pooled_prompt is site.call.pooled_prompt


@pytest.mark.parametrize("asks", [False, True])
def test_a_method_that_does_nothing_costs_the_dense_model_and_what_it_asks_for_is_its_own(backbone, asks):
    meter, idle = Meter(backbone, SamplerConfig(num_steps=1, guidance_scale=1.0)), Idle(None)
    idle.asks = asks
    cost, dense = meter.count(idle), meter.dense
    assert (cost.linear, cost.attention) == (dense.linear, dense.attention)
    embedder = 2 * (256 * 32 + 32**2)  # DiT's blocks embed timesteps themselves: it is asked once more, for all of them
    assert cost.method == (embedder if backbone.family == "dit" and asks else 0)
