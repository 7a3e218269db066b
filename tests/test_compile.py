"""Compiled blocks: the same images, a handful of graphs however the number of kept tokens changes, on every family."""

import pytest
import torch
from conftest import TinySD3, tiny_pipeline
from tiny import TinyFlux, TinyPixArt, tiny_dit, tiny_flux, tiny_pixart

from harness.api import METHODS, ConfigError, Method
from harness.backbones.dit import DiT
from harness.engine import compiling
from harness.engine.sampler import SamplerConfig, sample
from harness.engine.tokens import Keep
from harness.sweep.file import load
from harness.sweep.resolve import resolve

FAMILIES = {"sd3": lambda: TinySD3.from_pipeline(tiny_pipeline()), "flux": lambda: TinyFlux.from_pipeline(tiny_flux(), 32),
            "pixart": lambda: TinyPixArt.from_pipeline(tiny_pixart()), "dit": lambda: DiT.from_pipeline(tiny_dit())}
MOST_GRAPHS = {"sd3": 4, "flux": 4, "pixart": 2, "dit": 2}
"""One for each kind of block, and one more where a first call is of another layout in memory."""
STEPS = 3


class Varying(Method):
    """Another number of tokens at every step and block, from `counts`."""

    name, sites, knob = "varying", frozenset({"block"}), None

    def __init__(self, counts):
        super().__init__(None)
        self.counts = counts

    def reduce(self, hidden_states, site):
        """The first tokens."""
        count = self.counts[(2 * site.step + site.block) % len(self.counts)]
        return Keep(torch.arange(count, device=hidden_states.device), hidden_states.shape[1])


@pytest.fixture(autouse=True)
def _no_code_generation(monkeypatch):
    monkeypatch.setitem(compiling.COMPILE, "backend", "eager")  # graphs are counted, not their code
    torch._dynamo.reset()
    compiling._compiled.clear()


@pytest.fixture(params=FAMILIES)
def family(request):
    """Its name and a fresh backbone. Every family where graphs are built anew; else one with two kinds of block and one with one,
    or the two whose inner layers differ."""
    return request.param, FAMILIES[request.param]()


def drawn(backbone, method, compile="off", **options):
    """Latents (1, C, H, W) and the number of graphs that were built for them."""
    torch._dynamo.utils.counters.clear()
    config = SamplerConfig(**{"num_steps": STEPS, "guidance_scale": 3.0, "batch_size": 1, "compile": compile, **options})
    latents = torch.cat([batch.latents for batch in sample(backbone, method, config, ["7"], [3])])
    return latents, torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.slow
def test_a_few_graphs_and_then_none_however_k_changes(family):
    name, backbone = family
    first = Varying([17, 23, 40, 51])
    compiled, graphs = drawn(backbone, first, "dynamic")
    assert 0 < graphs <= MOST_GRAPHS[name]
    torch.testing.assert_close(compiled, drawn(backbone, first)[0], atol=1e-4 * max(1, float(compiled.abs().max())), rtol=0)
    assert drawn(backbone, Varying([19, 33, 12, 60, 29]), "dynamic")[1] == 0, "other counts need no other graphs"


@pytest.mark.slow
@pytest.mark.parametrize("family", ["flux", "pixart"], indirect=True)
def test_static_graphs_are_at_most_one_for_each_count_and_kind_of_block(family):
    name, backbone = family
    many, few = Varying([17, 23, 40]), Varying([32])
    _, graphs = drawn(backbone, many, "static", num_steps=2)
    assert graphs <= 3 * MOST_GRAPHS[name]
    backbone = FAMILIES[name]()
    assert drawn(backbone, few, "static", num_steps=2)[1] < graphs, "k_multiple, which leaves fewer counts, leaves fewer graphs"


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sd3", "dit"], indirect=True)
def test_the_dense_model_is_compiled_too_and_nothing_is_left_behind(family):
    _, backbone = family
    dense = METHODS.build("dense", {})
    plain, none = drawn(backbone, dense)
    compiled, graphs = drawn(backbone, dense, "dynamic")
    assert none == 0 < graphs
    torch.testing.assert_close(compiled, plain, atol=1e-4 * max(1, float(plain.abs().max())), rtol=0)
    assert not any("forward" in vars(module) for module in backbone.transformer.modules())


@pytest.mark.parametrize("family", ["sd3", "flux"], indirect=True)
def test_a_method_inside_the_blocks_keeps_its_sites(family):
    _, backbone = family
    method = METHODS.build("tofu", {"keep_ratio": 0.6})
    compiled, _ = drawn(backbone, method, "dynamic")
    plain, _ = drawn(backbone, method)
    torch.testing.assert_close(compiled, plain, atol=1e-4 * max(1, float(plain.abs().max())), rtol=0)
    assert not torch.allclose(plain, drawn(backbone, METHODS.build("dense", {}))[0], atol=1e-5)


def test_hooks_of_others_are_not_compiled_away():
    with pytest.raises(ConfigError, match="sampler.compile"):
        drawn(FAMILIES["flux"](), METHODS.build("diffusers_cache", {}), "dynamic")


def test_cuda_graphs_are_asked_of_torch_for_each_count_and_leave_results_of_their_own(monkeypatch):
    """What can be shown without a GPU: the options given to torch.compile, and that a replay cannot overwrite a kept result."""
    asked, memory = [], torch.zeros(2, 3)

    def replaying(forward, **options):
        asked.append(options)
        return lambda value: (memory.add_(value), None)

    monkeypatch.setattr(torch, "compile", replaying)
    runs = compiling.compiled(torch.nn.Linear(3, 3), torch.nn.Linear, "cuda_graphs")
    first, none = runs(1)
    runs(1)
    assert none is None and torch.equal(first, torch.ones(2, 3)) and torch.equal(memory, torch.full((2, 3), 2.0))
    assert asked == [{"dynamic": False, "mode": "reduce-overhead", **compiling.COMPILE}]


def test_cuda_graphs_are_refused_where_torch_would_silently_run_without(tmp_path):
    with pytest.raises(ConfigError, match=r"sampler\.compile: 'cuda_graphs', but backbone\.device is 'cpu'"):
        drawn(FAMILIES["sd3"](), METHODS.build("dense", {}), "cuda_graphs")
    file = tmp_path / "graphs.yaml"
    file.write_text("name: graphs\nseeds: 0-1\nbackbone: {name: sd3}\nsampler: {compile: cuda_graphs}\n"
                    "metrics: [flops]\nmethods: [dense]\n")
    with pytest.raises(ConfigError, match=r"graphs\.yaml: sampler\.compile: 'cuda_graphs'"):
        resolve(load(file))


def test_compiled_code_is_not_kept_where_others_can_foretell_it(tmp_path, monkeypatch):
    """torch's own place is /tmp/torchinductor_<user>, and code that lies there is run."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compiling.compiled(torch.nn.Linear(2, 2), torch.nn.Linear, "static")
    assert cache_dir() == str(tmp_path / "dit-harness" / "inductor")
