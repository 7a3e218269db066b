"""The staged training: cached by content, reproducible, and leaving the backbone as it was."""

import pytest
import torch
from conftest import TinySD3, tiny_pipeline
from torch.utils.flop_counter import FlopCounterMode

from harness import adapters
from harness.api import METHODS, ConfigError, build_config
from harness.sampler import SamplerConfig, sample
from harness.store import Store
from harness.train import TrainConfig, TrainingSet, train

CONFIG = TrainConfig(steps=16, batch_size=4, warmup_steps=2, adapter_rank=2, adapter_lr=1e-3, distill_every=2)


@pytest.fixture(scope="module")
def data():
    """Structured random latents: blobs, so that there is something to predict."""
    torch.manual_seed(5)
    latents = torch.nn.functional.interpolate(torch.randn(12, 4, 2, 2), scale_factor=4, mode="bilinear")
    return TrainingSet(latents, [f"thing {i}" for i in range(12)], "test data")


def run(backbone, data, store, config=CONFIG, **options):
    """A trained method, its result and its progress reports."""
    method, seen = METHODS.build("shiva", {"router_lr": 3e-3, "policy_lr": 3e-2, **options}), []
    return method, train(backbone, method, config, data, store, lambda *report: seen.append(report)), seen


def test_training_is_reproducible_and_an_equal_one_is_loaded_not_repeated(tiny_backbone, data, tmp_path):
    first, trained, seen = run(tiny_backbone, data, Store(tmp_path / "a"))
    again, _, _ = run(tiny_backbone, data, Store(tmp_path / "b"))
    loaded, reloaded, silent = run(tiny_backbone, data, Store(tmp_path / "a"))
    assert seen and not silent
    for key, value in first.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]) and torch.equal(value, loaded.state_dict()[key])
    assert trained.series == {name: [tuple(point) for point in points] for name, points in reloaded.series.items()}
    config = SamplerConfig(num_steps=2, batch_size=2)
    images = [next(sample(t.backbone, m, config, ["a", "b"], [1, 2])).latents for m, t in ((first, trained), (loaded, reloaded))]
    assert torch.equal(*images)


def test_a_smaller_budget_reuses_the_routers_warm_up(tiny_backbone, data, tmp_path):
    store = Store(tmp_path)
    _, first, _ = run(tiny_backbone, data, store, keep_ratio=0.6)
    _, second, seen = run(tiny_backbone, data, store, keep_ratio=0.4)
    stages = [t.info["stages"] for t in (first, second)]
    assert stages[0]["router"]["store"] == stages[1]["router"]["store"]
    assert stages[0]["policy"]["store"] != stages[1]["policy"]["store"]
    assert {report[0] for report in seen} == {"train policy", "train joint"}


def test_ratio_policies_share_the_routers_warm_up_and_keep_their_own_parameters(tiny_backbone, data, tmp_path):
    store = Store(tmp_path)
    _, first, _ = run(tiny_backbone, data, store, ratio_policy="additive")
    fixed, second, seen = run(tiny_backbone, data, store, ratio_policy="fixed")
    assert first.info["stages"]["router"]["store"] == second.info["stages"]["router"]["store"]
    assert {report[0] for report in seen} == {"train policy", "train joint"}
    assert torch.sigmoid(fixed.policy.anchor).item() == pytest.approx(0.6)


def test_adapters_are_an_axis_of_the_stages_that_train_them_alone(tiny_backbone, data, tmp_path):
    store = Store(tmp_path)
    run(tiny_backbone, data, store)
    _, _, seen = run(tiny_backbone, data, store, TrainConfig(**{**CONFIG.__dict__, "adapter": "none"}))
    assert {report[0] for report in seen} == {"train joint"}


def test_the_training_seed_is_an_axis(tiny_backbone, data, tmp_path):
    first, *_ = run(tiny_backbone, data, Store(tmp_path))
    other, *_ = run(tiny_backbone, data, Store(tmp_path), TrainConfig(**{**CONFIG.__dict__, "seed": 1}))
    assert not torch.equal(first.routers.routers[0].token.weight, other.routers.routers[0].token.weight)


@pytest.mark.parametrize("adapter", ["dora", "lora"])
def test_adapters_change_a_copy_and_never_the_backbone(data, tmp_path, adapter):
    backbone = TinySD3.from_pipeline(tiny_pipeline())
    before = {key: value.clone() for key, value in backbone.transformer.state_dict().items()}
    _, trained, _ = run(backbone, data, Store(tmp_path), TrainConfig(**{**CONFIG.__dict__, "adapter": adapter}))
    after = backbone.transformer.state_dict()
    assert list(after) == list(before) and all(torch.equal(before[key], after[key]) for key in before)
    adapted = trained.backbone.transformer.state_dict()
    assert list(adapted) == list(before), "merged adapters leave no module behind"
    changed = [key for key in before if not torch.equal(before[key], adapted[key])]
    assert changed and all("norm" not in key and "blocks." in key for key in changed)
    assert trained.backbone.fingerprint != backbone.fingerprint


def test_without_adapters_the_backbone_itself_is_sampled(tiny_backbone, data, tmp_path):
    _, trained, _ = run(tiny_backbone, data, Store(tmp_path), TrainConfig(**{**CONFIG.__dict__, "adapter": "none"}))
    assert trained.backbone is tiny_backbone


@pytest.mark.parametrize("kind", ["dora", "lora"])
def test_fresh_adapters_and_merged_adapters_do_not_change_the_output(kind):
    pipe = tiny_pipeline()
    backbone = TinySD3.from_pipeline(pipe)
    inputs = (torch.randn(1, 4, 8, 8), torch.tensor([500.0]), backbone.encode(["a"]))
    plain = backbone.denoise(*inputs)
    adapters.add_adapters(backbone.transformer, kind, 2)
    torch.testing.assert_close(backbone.denoise(*inputs), plain, atol=1e-5, rtol=1e-4)
    for name, parameter in backbone.transformer.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    moved = backbone.denoise(*inputs)
    adapters.merge_adapters(backbone.transformer)
    torch.testing.assert_close(backbone.denoise(*inputs), moved, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(moved, plain, atol=1e-3)


def test_routed_training_computes_fewer_tokens_than_dense_training(tiny_backbone):
    from harness.api import Call
    from harness.injection import attach
    from harness.sampler import Loop

    loop, counts = Loop(tiny_backbone, SamplerConfig(num_steps=2)), {}
    for ratio in (1.0, 0.4):
        method = METHODS.build("random_drop", {"keep_ratio": ratio})
        with attach(tiny_backbone, method, loop.run) as injection, FlopCounterMode(display=False) as counter:
            injection.begin_call(Call(step=-1, timestep=torch.ones(2), seeds=torch.tensor([1, 2]), training=True))
            noisy = torch.randn(2, 4, 8, 8, requires_grad=True)
            tiny_backbone.denoise(noisy, torch.tensor([500.0, 500.0]), tiny_backbone.encode(["a", "b"])).sum().backward()
        counts[ratio] = counter.get_total_flops()
    assert counts[0.4] < 0.7 * counts[1.0]


def test_a_diverging_training_stops_with_the_stage_and_step_named(tiny_backbone, data, tmp_path):
    with pytest.raises(FloatingPointError, match="stage 'router' at step"):
        run(tiny_backbone, TrainingSet(data.latents * float("nan"), data.captions, "broken"), Store(tmp_path))


@pytest.mark.parametrize("key,value", [("steps", 0), ("caption_drop", 1.0), ("adapter", "qlora"), ("step", 3),
                                       ("adapter_lr", "1e-4")])
def test_bad_training_options_are_refused(key, value):
    with pytest.raises(ConfigError, match=f"train.*{key}"):
        build_config(TrainConfig, {key: value}, "train")
