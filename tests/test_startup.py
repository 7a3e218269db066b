"""What needs no model imports none: help and refused options answer in a second."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from test_outline import BASE, MISTAKES

ROOT = Path(__file__).parent.parent
HEAVY = {"torch", "diffusers", "transformers", "peft", "accelerate", "torchvision", "torchmetrics", "ray", "mlflow", "optuna"}
SCRIPT = """
import runpy, sys
module, *sys.argv[1:] = sys.argv[1:]
try:
    runpy.run_module(module, run_name="__main__", alter_sys=True)
    code = 0
except SystemExit as end:
    code = end.code
print("\\n" + repr((code, sorted(HEAVY & set(sys.modules)))))
"""


def imported(*command: str) -> tuple[int, list[str]]:
    """(exit code, heavy libraries that were imported) of python -m `command`."""
    done = subprocess.run([sys.executable, "-c", f"HEAVY = {HEAVY!r}{SCRIPT}", *command], capture_output=True, text=True,
                          cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return ast.literal_eval(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("module", ["run", "report", "tracking", "bench", "study", "embedded.siblings.train",
                                    "execution.pretrain"])
def test_help_imports_nothing_heavy(module):
    assert imported(f"harness.{module}", "--help") == (0, [])


@pytest.mark.parametrize("command", [["harness.study", "syntetic"], ["harness.bench", "inference", "--width", "3"],
                                     ["harness.run", "no/such.yaml"], ["harness.run", "--workers", "0", "sweeps/smoke.yaml"]],
                         ids=" ".join)
def test_a_refused_command_line_imports_nothing_heavy(command):
    assert imported(*command) == (2, [])


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_refused_option_imports_nothing_heavy(mistake, tmp_path):
    (tmp_path / "s.yaml").write_text(BASE.replace(*MISTAKES[mistake], 1))
    assert imported("harness.run", str(tmp_path / "s.yaml"), "--results", str(tmp_path)) == (2, [])
