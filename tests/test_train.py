"""The staged training: cached by content, reproducible, and leaving the backbone as it was."""

import logging
from dataclasses import replace

import pytest
import torch
from conftest import TinySD3, tiny_pipeline
from torch.utils.flop_counter import FlopCounterMode

from harness.api import METHODS, ConfigError, Stage, TrainableMethod, build_config
from harness.engine import adapters
from harness.engine.sampler import SamplerConfig, sample
from harness.storage.store import Store
from harness.tracking.mapping import metrics as mirrored
from harness.training.batches import Batches
from harness.training.train import TrainConfig, TrainingSet, train

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
    _, _, seen = run(tiny_backbone, data, store, replace(CONFIG, adapter="none"))
    assert {report[0] for report in seen} == {"train joint"}


def test_the_training_seed_is_an_axis(tiny_backbone, data, tmp_path):
    first, *_ = run(tiny_backbone, data, Store(tmp_path))
    other, *_ = run(tiny_backbone, data, Store(tmp_path), replace(CONFIG, seed=1))
    assert not torch.equal(first.routers.routers[0].token.weight, other.routers.routers[0].token.weight)


@pytest.mark.parametrize("adapter", ["dora", "lora"])
def test_adapters_change_a_copy_and_never_the_backbone(data, tmp_path, adapter):
    backbone = TinySD3.from_pipeline(tiny_pipeline())
    before = {key: value.clone() for key, value in backbone.transformer.state_dict().items()}
    _, trained, _ = run(backbone, data, Store(tmp_path), replace(CONFIG, adapter=adapter))
    after = backbone.transformer.state_dict()
    assert list(after) == list(before) and all(torch.equal(before[key], after[key]) for key in before)
    adapted = trained.backbone.transformer.state_dict()
    assert list(adapted) == list(before), "merged adapters leave no module behind"
    changed = [key for key in before if not torch.equal(before[key], adapted[key])]
    assert changed and all("norm" not in key and "blocks." in key for key in changed)
    assert trained.backbone.fingerprint != backbone.fingerprint


def test_without_adapters_the_backbone_itself_is_sampled(tiny_backbone, data, tmp_path):
    _, trained, _ = run(tiny_backbone, data, Store(tmp_path), replace(CONFIG, adapter="none"))
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
    from harness.engine.injection import attach
    from harness.engine.sampler import Loop

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


# ---------------------------------------------------------------------------------------------- stopped and resumed


class Killed(Exception):
    pass


def run_until(stage, step, backbone, data, store, config):
    """A training that dies after `step` steps of `stage`."""
    def progress(name, done, total):
        if (name, done) == (f"train {stage}", step):
            raise Killed

    with pytest.raises(Killed):
        train(backbone, METHODS.build("shiva", {"router_lr": 3e-3, "policy_lr": 3e-2}), config, data, store, progress)


def test_a_killed_training_goes_on_from_its_checkpoint_to_the_same_end(tiny_backbone, data, tmp_path):
    config = replace(CONFIG, checkpoint_every=3, validate_every=4, validation_images=4, strata=3)
    whole, expected, _ = run(tiny_backbone, data, Store(tmp_path / "whole"), config)
    store = Store(tmp_path / "killed")
    for stage, step in (("router", 5), ("policy", 4), ("joint", 3)):
        run_until(stage, step, tiny_backbone, data, store, config)
        assert len(list(store.root.glob("trained/.*.work/checkpoint.safetensors"))) == 1
    resumed, found, seen = run(tiny_backbone, data, store, config)
    assert seen == [("train joint", 4, 4)], "three of the last stage's four steps were in the checkpoint"
    assert found.series == expected.series
    for key, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key
    for key, value in expected.backbone.transformer.state_dict().items():
        assert torch.equal(value, found.backbone.transformer.state_dict()[key]), key
    assert not list(store.root.glob("trained/.*.work")), "a finished stage leaves no checkpoint"


def test_how_often_checkpoints_are_written_changes_nothing(tiny_backbone, data, tmp_path):
    run(tiny_backbone, data, Store(tmp_path), replace(CONFIG, checkpoint_every=1))
    _, _, seen = run(tiny_backbone, data, Store(tmp_path), replace(CONFIG, checkpoint_every=0))
    assert not seen


def test_an_unreadable_checkpoint_is_not_trusted(tiny_backbone, data, tmp_path, caplog):
    config, store = replace(CONFIG, checkpoint_every=3), Store(tmp_path / "killed")
    _, expected, _ = run(tiny_backbone, data, Store(tmp_path / "whole"), config)
    run_until("router", 5, tiny_backbone, data, store, config)
    [path] = store.root.glob("trained/.*.work/checkpoint.safetensors")
    path.write_bytes(path.read_bytes()[:200])
    with caplog.at_level(logging.WARNING):
        _, found, seen = run(tiny_backbone, data, store, config)
    assert "cannot be read" in caplog.text and seen[0] == ("train router", 1, 8) and found.series == expected.series


# ---------------------------------------------------------------------------------------------- batches


def levels(backbone, data, steps=12, one_timestep=False, **options):
    config = TrainConfig(batch_size=4, strata=6, **options)
    batches = Batches(backbone, data, config, Stage("s", 1.0, one_timestep=one_timestep), 0)
    return torch.stack([batches.draw(step).level for step in range(steps)])


def test_stratified_timesteps_take_one_draw_from_each_slice(tiny_backbone, data):
    assert (levels(tiny_backbone, data).mul(4).long().sort(1).values == torch.arange(4)).all()
    assert not (levels(tiny_backbone, data, timesteps="uniform").mul(4).long().sort(1).values == torch.arange(4)).all()


def test_a_shared_timestep_visits_each_stratum_once_per_round(tiny_backbone, data):
    shared = levels(tiny_backbone, data, one_timestep=True)
    assert (shared == shared[:, :1]).all()
    assert (shared[:, 0].mul(6).long().view(2, 6).sort(1).values == torch.arange(6)).all()
    uniform = levels(tiny_backbone, data, one_timestep=True, timesteps="uniform")
    assert (uniform == uniform[:, :1]).all()
    assert not (uniform[:, 0].mul(6).long().view(2, 6).sort(1).values == torch.arange(6)).all()


def test_held_out_images_are_validated_on_and_never_trained_on(tiny_backbone, data):
    known = {float(latent.sum()): i for i, latent in enumerate(data.latents)}

    def images(batches):  # rectified flow: clean = noisy - level * target
        clean = torch.cat([b.noisy - b.level[:, None, None, None] * b.target for b in batches])
        return [min(known.values(), key=lambda i: float((data.latents[i] - one).abs().max())) for one in clean]

    config = TrainConfig(batch_size=4, validate_every=5, validation_images=8)
    batches = Batches(tiny_backbone, data, config, Stage("s", 1.0), 0)
    trained_on = set(images([batches.draw(step) for step in range(20)]))
    held_out = images(batches.validation())
    assert len(set(held_out)) == 8 and len(trained_on) == 4 and not trained_on & set(held_out)
    again = Batches(tiny_backbone, data, replace(config, seed=3), Stage("t", 0.5), 7)
    for one, other in zip(batches.validation(), again.validation(), strict=True):
        assert torch.equal(one.noisy, other.noisy) and torch.equal(one.level, other.level)
    assert [float(b.level[0]) for b in again.validation()] == [0.25, 0.75]


# ---------------------------------------------------------------------------------------------- validation


def test_validation_does_not_touch_the_training(tiny_backbone, data, tmp_path):
    often, rare = (replace(CONFIG, validate_every=every, validation_images=4) for every in (2, 5))
    _, one, _ = run(tiny_backbone, data, Store(tmp_path / "a"), often)
    _, other, _ = run(tiny_backbone, data, Store(tmp_path / "b"), rare)
    curves = [{name: points for name, points in t.series.items() if name.startswith("train/")} for t in (one, other)]
    assert curves[0] == curves[1]
    assert [step for step, _ in one.series["val/dense_mse"]] == [1, 3, 5, 7, 9, 11, 13, 15]
    assert [step for step, _ in other.series["val/diffusion_mse"]] == [4, 7, 11, 15], "also at the end of each stage"
    common = {step: value for step, value in one.series["val/dense_mse"]}
    assert all(common[step] == value for step, value in other.series["val/dense_mse"] if step in common), \
        "validation has no noise of its own"
    kept = dict(one.series["val/keep_ratio"])
    assert kept[1] == pytest.approx((1 + 3 * 0.625) / 4), "over all blocks: the first in full, three at the warm-up's mean ratio"
    assert all(0 < value <= 1 for value in kept.values()) and len(set(kept.values())) > 2


def test_validation_curves_reach_mlflow_by_step(tiny_backbone, data, tmp_path):
    _, trained, _ = run(tiny_backbone, data, Store(tmp_path), replace(CONFIG, steps=4, validate_every=1, validation_images=4))
    rows = list(mirrored({"metrics": {}, "series": trained.series}))
    for name in ("train/diffusion", "val/diffusion_mse", "val/dense_mse"):
        assert [step for key, _, step in rows if key == name] == [0, 1, 2, 3]


# ---------------------------------------------------------------------------------------------- cost


def saved_bytes(*arguments):
    """A training and the bytes of activations that its steps kept for the backward pass."""
    total = 0

    def pack(tensor):
        nonlocal total
        total += tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        _, trained, _ = run(*arguments)
    return trained, total


def test_gradient_checkpointing_keeps_less_and_learns_the_same(tiny_backbone, data, tmp_path):
    plain, kept = saved_bytes(tiny_backbone, data, Store(tmp_path), CONFIG)
    frugal, kept_less = saved_bytes(tiny_backbone, data, Store(tmp_path), replace(CONFIG, gradient_checkpointing=True))
    assert kept_less < 0.5 * kept
    assert plain.series == frugal.series
    weights = [t.backbone.transformer.state_dict() for t in (plain, frugal)]
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())


class Plain(TrainableMethod, torch.nn.Module):
    """A number that trains towards zero; keeps every token, and reads the teacher's features or not."""

    name = "plain"
    stages = (Stage("only", share=1.0),)
    needs_teacher = True

    def __init__(self, config=None) -> None:
        super().__init__(config)
        self.number = torch.nn.Parameter(torch.ones(()))
        self.given = []

    def reduce(self, hidden_states, site):
        self.given.append(len(self.teacher_features))

    def stage_key(self, stage):
        return {}

    def start_stage(self, stage, generator):
        return [{"params": [self.number], "lr": 1e-2, "name": "number"}]

    def losses(self):
        return {"number": self.number ** 2}


@pytest.mark.parametrize("distill,needed,calls", [(1.0, False, 2), (0.0, True, 2), (0.0, False, 1)])
def test_the_teacher_runs_only_where_something_reads_it(data, tmp_path, monkeypatch, distill, needed, calls):
    backbone, count = TinySD3.from_pipeline(tiny_pipeline()), []
    monkeypatch.setattr(Plain, "needs_teacher", needed)
    monkeypatch.setattr(TinySD3, "denoise", lambda self, *inputs: count.append(1) or super(TinySD3, self).denoise(*inputs))
    method = Plain()
    trained = train(backbone, method, TrainConfig(steps=3, batch_size=4, distill_weight=distill), data, Store(tmp_path))
    assert len(count) == 3 * calls and set(method.given) == {4 if calls == 2 else 0}
    assert ("train/distill" in trained.series) == (distill > 0) and "train/number" in trained.series


class Twice(Plain):
    """Adapts the backbone in two stages."""

    stages = (Stage("first", share=0.9, adapters=True), Stage("second", share=0.1, adapters=True))


def test_a_later_stage_goes_on_from_the_adapted_backbone(tiny_backbone, data, tmp_path):
    config = TrainConfig(steps=20, batch_size=4, warmup_steps=1, adapter_rank=2, adapter_lr=1e-2, distill_weight=0.0)
    store, weights = Store(tmp_path), [tiny_backbone.transformer.state_dict()]
    for stages in (Twice.stages[:1], Twice.stages):
        method = Twice()
        method.stages = stages
        weights.append(train(tiny_backbone, method, config, data, store).backbone.transformer.state_dict())
    base, first, both = (torch.cat([value.flatten() for value in w.values()]) for w in weights)
    assert 0 < (both - first).norm() < 0.5 * (both - base).norm()


@pytest.mark.parametrize("kind", ["dora", "lora"])
def test_adapters_of_a_half_precision_backbone_train_in_float32(kind):
    transformer = tiny_pipeline().transformer.to(torch.bfloat16)
    adapters.add_adapters(transformer, kind, 2)
    trained = {name: p for name, p in transformer.named_parameters() if p.requires_grad}
    assert trained and all(p.dtype == torch.float32 for p in trained.values())
    inputs = {"hidden_states": torch.randn(1, 4, 8, 8), "encoder_hidden_states": torch.randn(1, 6, 24),
              "pooled_projections": torch.randn(1, 20)}
    out = transformer(timestep=torch.tensor([500.0]), **{key: x.bfloat16() for key, x in inputs.items()}).sample
    out.float().square().mean().backward()
    assert out.dtype == torch.bfloat16
    assert any(float(p.grad.abs().max()) > 0 and p.grad.dtype == torch.float32 for p in trained.values())
    adapters.merge_adapters(transformer)
    assert {p.dtype for p in transformer.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("changes,named", [({"validate_every": 2, "validation_images": 6}, "validation_images: 6"),
                                           ({"validate_every": 2, "validation_images": 12}, "validation_images: 12"),
                                           ({"distill_weight": -1.0}, "distill_weight"), ({"timesteps": "sobol"}, "timesteps")])
def test_options_that_cannot_be_met_are_refused(tiny_backbone, data, tmp_path, changes, named):
    with pytest.raises(ConfigError, match=f"train.{named}"):
        config = build_config(TrainConfig, {"steps": 4, "batch_size": 4, **changes}, "train")
        run(tiny_backbone, data, Store(tmp_path), config)
