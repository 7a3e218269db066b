"""Nothing runs code that it reads, listens to strangers, phones home, tells a login, or writes outside the results folder."""

import ast
import base64
import importlib.util
import json
import logging
import os
import pickle
import shutil
import signal
import stat
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import fake_sweep
import psutil
import pytest
from fake_results import make_sweep
from test_run import Sweep

import harness.backbones as backbones
from harness.api import BACKBONES, ConfigError
from harness.execution.driver import FAILED
from harness.reporting.rows import load_sweep
from harness.storage.masking import masked, storable, storable_tree
from harness.sweep.file import load
from harness.sweep.yaml import parse
from harness.tracking.ui import server

assert backbones
ROOT = Path(__file__).parent.parent
FILES = sorted(file for folder in ("harness", "methods") for file in (ROOT / folder).rglob("*.py"))



@pytest.fixture
def sweep_file(tmp_path, monkeypatch):
    """The fake sweep in an empty folder, to be run here."""
    fake_sweep.install(monkeypatch)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    (tmp_path / "fake.yaml").write_text(fake_sweep.TEXT)
    return Sweep(tmp_path)


PICKLERS = ("pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal")


def flaws(source: str) -> list[str]:
    """Calls and imports in `source` that run what they read."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            if names != ["UnpicklingError", "pickle"]:  # what torch raises for what it does not load
                found += [name for name in names if name.split(".")[0] in PICKLERS]
        elif isinstance(node, ast.Call):
            name, given = ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}
            wrong = (name in ("eval", "exec", "os.system", "yaml.unsafe_load", "yaml.full_load")
                     or name == "yaml.load" and given.get("Loader") != "_Loader"
                     or name == "torch.load" and given.get("weights_only") != "True"
                     or name in ("np.load", "numpy.load") and given.get("allow_pickle") != "False"
                     or given.get("shell", "False") != "False" or given.get("trust_remote_code", "False") != "False")
            found += [ast.unparse(node)] * wrong
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_nothing_that_is_read_is_run(file):
    assert not flaws(file.read_text(encoding="utf-8"))


@pytest.mark.parametrize("source", [
    "import pickle", "from joblib import load", "eval(x)", "torch.load(p)", "torch.load(p, weights_only=False)", "np.load(p)",
    "yaml.load(t, Loader=yaml.Loader)", "subprocess.run(x, shell=True)", "f(trust_remote_code=True)"])
def test_the_scan_above_sees_what_it_looks_for(source):
    assert flaws(source)


def test_a_sweep_file_builds_no_objects():
    with pytest.raises(ConfigError, match="tags are not possible"):
        parse("name: !!python/object/apply:os.system ['true']", "x.yaml")


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def test_a_pickled_checkpoint_in_a_model_folder_is_not_run(tmp_path):
    folder, mark = tmp_path / "model", tmp_path / "mark"
    shutil.copytree(ROOT / "harness" / "embedded" / "emoji_sd3", folder)
    weights = next((folder / "transformer").glob("*.safetensors"))
    weights.with_suffix(".bin").write_bytes(pickle.dumps(Bomb(mark)))
    weights.unlink()
    with pytest.raises(Exception, match="(?i)weights|pickle|load"):
        BACKBONES.build("sd3", {"weights": str(folder)})
    assert not mark.exists()
    pickle.loads(pickle.dumps(Bomb(mark)))
    assert mark.exists()


# ---------------------------------------------------------------------------------------------- paths


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    fake_sweep.install(monkeypatch)
    return Sweep(tmp_path)


@pytest.mark.parametrize("name", ["../x", "/tmp/x", "..", ".", "a/b", "a/../../b", ".hidden", "a..b", "a\\b", "a\0b", "~"])
def test_a_sweep_cannot_be_named_out_of_the_results(sweep, name):
    sweep.file.write_text(fake_sweep.TEXT.replace("name: fake", f"name: {json.dumps(name)}"))
    with pytest.raises(ConfigError):
        load(sweep.file)


@pytest.mark.parametrize("link", [".", "artifacts", "parts", "sweep.json", ".driver", "artifacts/0123456789ab"])
def test_a_link_that_leads_out_of_the_results_is_refused(sweep, tmp_path, link):
    (tmp_path / "elsewhere").mkdir()
    place = sweep.folder / link
    place.parent.mkdir(parents=True, exist_ok=True)
    place.symlink_to(tmp_path / "elsewhere")
    sweep.file.write_text(fake_sweep.TEXT)
    with pytest.raises(ConfigError, match="is a link"):
        sweep()
    assert not any((tmp_path / "elsewhere").iterdir())


def test_a_report_reads_nothing_outside_its_folder(tmp_path):
    folder = tmp_path / "results" / "ablation"
    results = make_sweep(folder, images=4)
    file = folder / f"{results[0]['trial_id']}.json"
    for wrong in ("../../secret.npz", "/etc/passwd"):
        file.write_text(json.dumps(results[0] | {"artifacts": {"images": wrong}}))
        with pytest.raises(ConfigError, match="outside the results folder"):
            load_sweep(folder)
    file.write_text(json.dumps(results[0]))
    header = json.loads((folder / "sweep.json").read_text())
    (folder / "sweep.json").write_text(json.dumps(header | {"trial_ids": ["../other"]}))
    with pytest.raises(ConfigError, match="is no trial id"):
        load_sweep(folder)


# ---------------------------------------------------------------------------------------------- network and logins


SCRIPT = """
import json, os, stat
import psutil
from harness.execution.pool import Cluster, Share

with Cluster(Share(1, 1, 0)):
    import ray

    @ray.remote
    def telemetry():
        return {name: os.environ.get(name) for name in ("RAY_USAGE_STATS_ENABLED", "DO_NOT_TRACK", "HF_HUB_DISABLE_TELEMETRY")}

    seen = ray.get(telemetry.remote())
    family = [psutil.Process(), *psutil.Process().children(recursive=True)]
    heard = {c.laddr.ip.removeprefix("::ffff:") for p in family for c in p.net_connections("inet")
             if c.status == psutil.CONN_LISTEN}
    token, mode = os.environ["RAY_AUTH_TOKEN_PATH"], os.environ["RAY_AUTH_MODE"]
    modes = [stat.S_IMODE(os.stat(path).st_mode) for path in (token, os.path.dirname(token))]
    words = open(token).read()
    told = any(words in " ".join(process.cmdline()) for process in family)
left = [name for name in os.environ if name.startswith("RAY_AUTH")]
print(json.dumps([len(family), sorted(heard), seen, modes, mode, told, left]))
"""


def test_our_ray_listens_on_this_machine_only_asks_for_a_token_and_sends_nothing_home():
    without = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "DO_NOT", "HF_"))}
    asked = {"PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "1"}  # whatever the user's shell says
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=ROOT, env=without | asked, capture_output=True, text=True,
                          check=True, timeout=240)
    processes, heard, seen, modes, mode, told, left = json.loads(done.stdout.splitlines()[-1])
    assert processes > 3 and heard == ["127.0.0.1"]
    assert seen == {"RAY_USAGE_STATS_ENABLED": "0", "DO_NOT_TRACK": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    assert modes == [0o600, 0o700] and mode == "token" and not told and not left


@pytest.mark.skipif(importlib.util.find_spec("flask_wtf") is None, reason="mlflow[auth] is not installed")
def test_mlflow_listens_on_this_machine_only_lets_in_who_knows_the_password_and_sends_nothing_home(tmp_path, empty_database):
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    with server(uri, tmp_path / "artifacts", 5873, "hunter2-hunter2") as address:
        for path in ("/", "/ajax-api/2.0/mlflow/experiments/search?max_results=5", "/get-artifact?path=x&run_uuid=y",
                     "/api/2.0/mlflow-artifacts/artifacts", "/graphql"):
            assert status(address + path) == status(address + path, login="harness:guess") == 401, path
        create = address + "/ajax-api/2.0/mlflow/experiments/create"
        assert status(create, {"name": "x"}) == 401 and status(create, {"name": "x"}, "harness:hunter2-hunter2") == 200
        assert status(address, login="harness:hunter2-hunter2") == 200
        (parent,) = [child for child in psutil.Process().children() if "mlflow" in child.cmdline()]
        family = [parent, *parent.children(recursive=True)]
        heard = {c.laddr.ip for p in family for c in p.net_connections("inet") if c.status == psutil.CONN_LISTEN}
        assert heard == {"127.0.0.1"}
        assert all(p.environ()["MLFLOW_DISABLE_TELEMETRY"] == "true" and p.environ()["DO_NOT_TRACK"] == "true" for p in family)
        assert not any(secret in " ".join(p.cmdline()) for p in family for secret in (uri, "hunter2"))
        config = Path(parent.environ()["MLFLOW_AUTH_CONFIG_PATH"])
        assert [stat.S_IMODE(path.stat().st_mode) for path in (config, config.parent)] == [0o600, 0o700]
    assert not config.parent.exists()


def status(address: str, data: dict | None = None, login: str = "") -> int:
    """The code that a request is answered with."""
    headers = {"Content-Type": "application/json"}
    if login:
        headers["Authorization"] = f"Basic {base64.b64encode(login.encode()).decode()}"
    request = urllib.request.Request(address, data=json.dumps(data).encode() if data else None, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def test_without_a_login_mlflows_pages_do_not_open(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'mlflow\[auth\]'"), server("sqlite:///x", tmp_path, 5874, "x"):
        pass


@pytest.mark.parametrize("uri", ["http://me:hunter2@host:5000", "postgresql://me:hunter2@host/db", "mysql://hunter2@host/db",
                                 "https://host/x?token=hunter2", "http://host/?a=b&sslpassword=hunter2"])
def test_a_login_in_an_address_is_not_told(uri):
    assert "hunter2" not in masked(f"MLflow at {uri}: no answer") and "host" in masked(uri)


def test_a_login_in_the_environment_is_not_told(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "hunter2")
    assert masked("401 for hunter2") == "401 for ***"


@pytest.mark.parametrize(("text", "shown"), [
    ("{root}/harness/trial/job.py, line 3", "./harness/trial/job.py, line 3"),
    ("file://{root}/x", "file://./x"), ("'{root}'", "'.'"),
    ("{home}/models/x", "~/models/x"), ("/home/somebody/x: no", "~/x: no"), ("/Users/somebody/x", "~/x"),
    ("{prefix}/lib/x.py", "<python>/lib/x.py"), ("/data/results/a/parts", "<results>/a/parts"),
    ("/data/results-of-others", "/data/results-of-others"), ("/other{root}/x", "/other{root}/x"), ("a/home/b", "a/home/b"),
    ("https://me:hunter2@hub/x", "https://***@hub/x"), ("Authorization: Bearer hunter2", "Authorization: Bearer ***"),
    ("token hf_abcdefghijklmnopqrstuvwxyz", "token ***"), ("no @ here, 3/4 of x", "no @ here, 3/4 of x")])
def test_what_is_kept_names_no_login_and_no_folder_of_the_machine(text, shown):
    places = {"root": ROOT, "home": Path.home(), "prefix": sys.prefix}
    assert storable(text.format(**places), "/data/results") == shown.format(**places)
    assert storable_tree({"a": [text.format(**places), 3, None]}, "/data/results") == {"a": [shown.format(**places), 3, None]}


def test_a_failed_job_leaves_no_login_and_no_folder_of_the_machine(sweep_file, empty_database, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("HF_TOKEN", "swordfish")

    def failing(job, trial, store, progress, out_dir):
        logging.getLogger("x").warning("reading %s with swordfish", sweep_file.results / "y")
        sys.stderr.write(f"{Path.home()}/z\n")
        raise OSError(f"https://me:hunter2@hub/x?token=hunter2 for {sweep_file.results.resolve()}/fake and {Path.home()}/model")

    sweep_file.results.mkdir()
    shutil.copy(empty_database, sweep_file.results / "mlflow.db")
    assert sweep_file(run_job=failing, publish=True) == FAILED
    places = [str(place) for place in (ROOT, Path.home(), sys.prefix, sweep_file.results)]
    files = [path for path in sweep_file.results.rglob("*") if path.is_file() and path.name != "mlflow.db"]
    for path in files:
        content = path.read_text(encoding="utf-8", errors="replace")
        assert not [word for word in ("hunter2", "swordfish", *places) if word in content], path
    database = (sweep_file.results / "mlflow.db").read_bytes()  # where the files of runs lie, it must say: they are beside it
    assert b"hunter2" not in database and b"swordfish" not in database and b"https://***@hub" in database
    assert not [line for line in database.split(b"mlartifacts")[0].split(b"\0") if str(Path.home()).encode() + b"/model" in line]
    names = {path.name for path in files}
    assert {"error.txt", "result.json", "score.log"} <= names and any(name.endswith(".score.json") for name in names)
    (error,) = {row["error"]["message"] for row in sweep_file.rows().values() if row["error"]["job"] == "score"}
    assert error == "https://***@hub/x?token=*** for <results>/fake and ~/model"
