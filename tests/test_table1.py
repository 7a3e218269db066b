"""The paper's Table 1, counted: the dense model is the paper's, and the cuts come from the counter."""

import pytest

from harness.api import ConfigError
from harness.backbones.sd3 import SD3
from harness.cost.flops import Meter
from harness.engine.sampler import SamplerConfig
from harness.study import table1


@pytest.fixture(scope="module")
def data():
    """Two rows whose steps are alike, so that one is counted."""
    rows = {name: table1.ROWS[name] for name in ("ToMeSD", "Shiva-80")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(table1, "ROWS", rows)
        found = table1.measure([0])
        return found, table1.report(found), table1.figures(found)


def test_the_papers_dense_number_is_sd3_mediums(data):
    dense = {name: table1.Cost(**found["dense"]).paper_rule / table1.STEPS / 1e12
             for name, found in data[0]["architectures"].items()}
    assert dense["sd3-medium"] == pytest.approx(table1.DENSE_T, abs=0.005)
    assert dense["sd3.5-medium"] > 1.3 * table1.DENSE_T


def test_the_papers_rule_gives_the_papers_cuts_and_the_honest_one_less(data):
    for row in ("ToMeSD", "Shiva-80"):
        cuts = table1._cuts(data[0], "sd3-medium", row)
        assert cuts["rule"] == pytest.approx(cuts["paper"], abs=0.5)
        assert cuts["honest"] < cuts["free"] < cuts["rule"]


def test_the_report_holds_every_number_it_speaks_of(data):
    found, text, figures = data
    assert "11.80 T by the paper's rule" in text and "SD3.5-Medium" in text and "table1.png" in figures
    for row in ("ToMeSD", "Shiva-80"):
        assert f"| {row} |" in text and f"{table1._cuts(found, 'sd3-medium', row)['honest']:.1f}" in text


def test_an_unknown_architecture_is_named():
    with pytest.raises(ConfigError, match="sd3-medum.*Did you mean 'sd3-medium'"):
        SD3.on_shapes("sd3-medum")


def test_counting_needs_no_weights():
    backbone = SD3.on_shapes("sd3-medium")
    assert {p.device.type for p in backbone.transformer.parameters()} == {"meta"}
    assert Meter(backbone, SamplerConfig(num_steps=1)).run.num_tokens == 4096
