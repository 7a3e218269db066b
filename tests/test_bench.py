"""Benchmarks: that their arms are what they say, that verdicts follow bars, and that memory is really seen. Nothing is timed."""

import json

import pytest
import torch
from conftest import TinySD3, tiny_pipeline

from harness.api import METHODS, ConfigError
from harness.bench import inference, soft_topk, training_cost
from harness.bench.__main__ import main
from harness.bench.measurements import Bar, Measurement, as_json, as_table
from harness.bench.memory import peak_bytes
from harness.bench.options import BenchOptions
from harness.bench.timing import Times, interleave
from harness.engine.injection import attach
from harness.engine.sampler import Loop


def test_peak_memory_sees_what_is_held_at_once_and_what_an_operator_frees():
    held = peak_bytes(lambda: [torch.empty(1000) for _ in range(5)])
    assert held == 5 * 4000 or held == 5 * 4032  # the allocator may round up
    one_by_one = peak_bytes(lambda: [torch.empty(1000).sum() for _ in range(5)])
    assert 4000 <= one_by_one < 2 * 4000
    x = torch.zeros(1000, requires_grad=True)
    assert peak_bytes(lambda: torch.sigmoid(x).exp().sum().backward()) >= 2 * 4000  # saved for backward


def test_the_bar_on_memory_is_met_and_would_catch_naive_autograd():
    """Memory is a count, not a time: so it can be a test. At N = 1024 naive autograd holds 8 MiB, the exact form 2."""
    scores, grad = torch.randn(2, 1, 1024)
    naive, exact = (peak_bytes(soft_topk._pass(form, scores, grad)) for form in (soft_topk.pairwise_rank, soft_topk.soft_rank))
    assert naive >= 2 * 1024**2 * 4
    assert exact <= naive * (4096 / 1024)**2 / 50


def test_rounds_are_interleaved_and_fast_arms_repeat():
    order = []
    times = interleave({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=2)
    assert times.calls["a"] > 1
    runs = [name for i, name in enumerate(order) if i == 0 or order[i - 1] != name]
    assert runs[:5] == ["a", "b", "a", "b", "a"]  # warm-up; then A, B B, A A, B B, A, of which equal neighbours fuse
    assert len(times.seconds["a"]) == len(times.seconds["b"]) == 2


def test_a_ratio_is_taken_round_by_round():
    times = Times({"slow": [10.0, 2.0, 6.0], "fast": [5.0, 1.0, 2.0]}, {"slow": [4.0] * 3, "fast": [1.0] * 3})
    ratio, interval = times.ratio("slow", "fast")
    assert ratio == 2.0 and interval is None  # three rounds carry none
    assert times.cpu_ratio("slow", "fast") == 4.0


@pytest.mark.parametrize("bar,value,verdict", [(Bar(">=", 5), 5.0, "PASS"), (Bar(">=", 5), 4.99, "FAIL"),
                                               (Bar("<=", 1.05), 1.06, "FAIL"), (Bar("<", 1.0), float("nan"), "FAIL")])
def test_the_verdict_follows_the_bar(bar, value, verdict):
    row = Measurement("x", value, bar)
    assert row.verdict == verdict and verdict in as_table([row])
    assert json.loads(json.dumps(as_json([row])))[0]["verdict"] == verdict
    assert Measurement("x", value).verdict == ""


def test_options_are_refused_with_a_remedy():
    for bad, message in (({"width": 100}, "multiple of 64"), ({"rounds": 1}, "at least 2"), ({"device": "cuda:99"}, "use cpu"),
                         ({"dtype": "float8"}, "one of float32")):
        with pytest.raises(ConfigError, match=message):
            BenchOptions(**bad)


def test_the_direct_arm_computes_k_tokens_in_every_block_and_leaves_the_model_untouched(tiny_backbone):
    loop = Loop(tiny_backbone, inference.SAMPLER)
    seen = []
    hooks = [block.ff.register_forward_hook(lambda m, a, out: seen.append(out.shape[1]))
             for block in tiny_backbone.transformer.transformer_blocks]
    try:
        step = inference._step(loop, METHODS.build("dense", {}), 20)
        assert torch.isfinite(step()).all()
        assert seen == [20] * 4
        assert all("forward" not in vars(block) for block in tiny_backbone.transformer.transformer_blocks)
    finally:
        for hook in hooks:
            hook.remove()


def test_the_routed_arm_keeps_as_many_tokens_as_the_direct_one(tiny_backbone):
    loop = Loop(tiny_backbone, inference.SAMPLER)
    method = METHODS.build("shiva", {"keep_ratio": inference.KEEP_RATIO, "ratio_policy": "fixed", "first_block": True})
    method.begin(loop.run)
    with attach(tiny_backbone, method, loop.run) as injection:
        loop.predict(injection, 0, torch.randn(1, *tiny_backbone.latent_shape), loop.conditioning([""]),
                     torch.zeros(2, dtype=torch.int64))
    assert {m for m, _ in injection.token_count.tokens.values()} == {method.table[0][0]} == {38}


@pytest.fixture(scope="module")
def arms():
    backbone = TinySD3.from_pipeline(tiny_pipeline())
    batch = training_cost._batch(backbone, 2)
    return {name: training_cost._Arm(backbone, estimator, batch) for name, estimator in training_cost.ESTIMATORS.items()}


def test_the_training_arms_train_what_they_say(arms):
    for name, arm in arms.items():
        before = [p.detach().clone() for p in arm.parameters]
        arm.step()
        learned = {g["name"] for g in arm.optimizer.param_groups if any(p.grad is not None for p in g["params"])}
        assert learned == ({"adapters"} if name == "dense" else {"router", "policy", "adapters"})
        assert all(torch.equal(p, old) for p, old in zip(arm.parameters, before, strict=True))  # so k stays what it is
    assert arms["dense"].mean_keep == 1.0
    assert arms["Shiva without teacher"].mean_keep == arms["Shiva with teacher"].mean_keep == pytest.approx(0.6, abs=1 / 64)


def test_only_the_arm_with_a_teacher_runs_one(arms):
    for name, arm in arms.items():
        calls = []
        hook = arm.teacher.transformer.proj_out.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        try:
            arm.step()
        finally:
            hook.remove()
        assert len(calls) == (name == "Shiva with teacher")


def test_the_command_line_reports_every_number_and_fails_on_a_missed_bar(monkeypatch, tmp_path, capsys):
    rows = [Measurement("good", 2.0, Bar(">=", 1)), Measurement("bad", 2.0, Bar("<=", 1))]
    monkeypatch.setattr(soft_topk, "run", lambda options: iter(rows))
    assert main(["soft-topk", "--json", str(tmp_path / "x.json")]) == 1
    assert "FAIL" in capsys.readouterr().out
    record = json.loads((tmp_path / "x.json").read_text())
    assert record["environment"]["threads"] == torch.get_num_threads()
    assert [row["verdict"] for row in record["rows"]] == ["PASS", "FAIL"]
    assert main(["soft-topk", "--width", "3"]) == 2
