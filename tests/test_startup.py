"""What needs no model imports none: help and refused options answer within two seconds of a core."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from test_outline import BASE, MISTAKES

ROOT = Path(__file__).parent.parent
HEAVY = {"torch", "diffusers", "transformers", "peft", "accelerate", "torchvision", "torchmetrics", "ray", "mlflow", "optuna"}
SCRIPT = """
import runpy, sys, time
module, *sys.argv[1:] = sys.argv[1:]
try:
    runpy.run_module(module, run_name="__main__", alter_sys=True)
    code = 0
except SystemExit as end:
    code = end.code
print("\\n" + repr((code, sorted(HEAVY & set(sys.modules)), time.process_time())))
"""
MOST_CPU_S = 2.0
COMMANDS = sorted(".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__")
                  for path in (ROOT / "harness").rglob("*.py") if '__name__ == "__main__"' in path.read_text(encoding="utf-8"))


def imported(*command: str) -> tuple[int, list[str]]:
    """(exit code, heavy libraries that were imported) of python -m `command`."""
    done = subprocess.run([sys.executable, "-c", f"HEAVY = {HEAVY!r}{SCRIPT}", *command], capture_output=True, text=True,
                          cwd=ROOT)
    assert done.returncode == 0, done.stderr
    code, heavy, cpu_s = ast.literal_eval(done.stdout.splitlines()[-1])
    assert cpu_s < MOST_CPU_S, done.stdout
    return code, heavy


@pytest.mark.parametrize("module", COMMANDS)
def test_help_imports_nothing_heavy(module):
    assert imported(module, "--help") == (0, [])


@pytest.mark.parametrize("command", [["harness.study", "syntetic"], ["harness.bench", "inference", "--width", "3"],
                                     ["harness.run", "no/such.yaml"], ["harness.run", "--workers", "0", "sweeps/smoke.yaml"]],
                         ids=" ".join)
def test_a_refused_command_line_imports_nothing_heavy(command):
    assert imported(*command) == (2, [])


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_refused_option_imports_nothing_heavy(mistake, tmp_path):
    (tmp_path / "s.yaml").write_text(BASE.replace(*MISTAKES[mistake], 1))
    assert imported("harness.run", str(tmp_path / "s.yaml"), "--results", str(tmp_path)) == (2, [])
