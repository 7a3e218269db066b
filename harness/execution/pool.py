"""Running jobs on Ray: the only module that imports it. Everything Ray knows may be lost; the results folder is the memory.

Each node offers one `node_slot`. A score job takes 1/workers of it, a timing job all of it, so that a latency is measured with
no other job of ours on the node. (A resource that only timing jobs take would not keep score jobs away.) A resumed sweep is a
fresh Tuner over the jobs that are missing: Tune's own restore trusts snapshots that a crash leaves stale or truncated.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import secrets
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.api import ConfigError, require
from harness.execution import worker
from harness.execution.head_node import require_answer, require_head_node
from harness.execution.private_folder import PrivateFolder
from harness.execution.results_folder import Job, ResultsFolder
from harness.execution.worker import RunJob
from harness.storage.masking import Log

PROJECT = Path(__file__).resolve().parents[2]
FREE_S = 5.0
"""After a round, resources are told as free within a second."""
_QUIET = {
    "RAY_AIR_NEW_OUTPUT": "0", "RAY_USAGE_STATS_ENABLED": "0", "RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "600",
    "RAY_worker_niceness": "0",  # Ray's default of 15 starves a job, and bends its timing, as soon as anything else runs
    "TUNE_DISABLE_SIGINT_HANDLER": "1"}  # its handler waits for the running trials; ours ends at once, for nothing is lost
_WORKER = {"OMP_WAIT_POLICY": "PASSIVE", "DO_NOT_TRACK": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false",
           "DIFFUSERS_VERBOSITY": "error", "TRANSFORMERS_VERBOSITY": "error"}


@dataclass(frozen=True)
class Share:
    """What each job takes of a node. workers: score jobs at once. cpus, gpus: of a score job."""

    workers: int
    cpus: int
    gpus: float

    def bundle(self, alone: bool) -> dict[str, float]:
        """Ray resources of a job; one that times has the node to itself, so it may use all cores whatever it asks."""
        if alone:
            return {"CPU": 1, "node_slot": 1.0} | ({"GPU": math.ceil(self.gpus)} if self.gpus else {})
        slot = math.floor(1e4 / self.workers) / 1e4  # Ray counts resources in ten-thousandths
        return {"CPU": self.cpus, "node_slot": slot} | ({"GPU": self.gpus} if self.gpus else {})


class Cluster:
    """A Ray cluster for the time of a `with` block: our own on this machine, or the one at RAY_ADDRESS."""

    def __init__(self, share: Share) -> None:
        self.share = share
        self.address = os.environ.get("RAY_ADDRESS") or None
        self._folder: PrivateFolder | None = None
        self._before: dict[str, str | None] = {}
        self._starts = self._runs = 0

    def __enter__(self) -> Cluster:
        os.environ.update(_QUIET)
        for key, value in _WORKER.items():
            os.environ.setdefault(key, value)
        os.environ.pop("OMP_NUM_THREADS", None)  # Ray sets it per worker, and only where it is not set
        if self.address:
            require_head_node(self.address)
        self._folder = PrivateFolder()
        with contextlib.ExitStack() as undo:
            undo.callback(self._close)
            if not self.address:
                self._own_token()
            self._start()
            undo.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        self._close()

    def _close(self) -> None:
        import ray

        with contextlib.suppress(Exception):
            ray.shutdown()
        if self._folder:
            self._folder.close()
            self._folder = None
        for key, value in self._before.items():
            os.environ.pop(key, None)
            if value is not None:
                os.environ[key] = value

    def _own_token(self) -> None:
        """Without a token every port of Ray is remote code execution; and by default they listen on all interfaces."""
        token = self._folder.path / "token"
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32), encoding="utf-8")
        ours = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
        self._before = {key: os.environ.get(key) for key in ours}
        os.environ.update(ours)

    def _start(self) -> None:
        on_terminate = signal.getsignal(signal.SIGTERM)
        self._starts += 1
        self._init()
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_terminate)  # Ray puts its own in place, which ends in a page of addresses

    def _free(self) -> None:
        """Tune can leave an actor behind that was still starting when the last job ended, and it would hold its share of the
        node for ever. Disconnected, we have none."""
        import ray

        end = time.monotonic() + FREE_S
        while not self.address and time.monotonic() < end:  # on a cluster of others, what is taken need not be ours
            if ray.available_resources().get("node_slot", 0) >= ray.cluster_resources().get("node_slot", 0):
                return
            time.sleep(0.1)
        ray.shutdown()
        if self.address:
            require_answer(self.address)  # Ray's own call would wait for minutes where the head node is gone
        self._start()

    def _init(self) -> None:
        import ray

        for name in ("ray", "ray.tune", "ray.train", "ray.data"):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # a dead worker is our failed part, not a page of Ray's
        if not self.address:
            ray.init(num_cpus=self.share.workers * self.share.cpus, resources={"node_slot": 1}, include_dashboard=False,
                     log_to_driver=False, logging_level=logging.ERROR, object_store_memory=100 * 2**20,
                     _temp_dir=str(self._folder.path / f"r{self._starts}"))  # Ray opens it to everybody: ours around it is not
            return
        path = os.pathsep.join(p for p in (str(PROJECT), os.environ.get("PYTHONPATH")) if p)
        try:
            ray.init(address=self.address, log_to_driver=False, logging_level=logging.ERROR,
                     runtime_env={"env_vars": {**_WORKER, "PYTHONPATH": path}})
        except ConnectionError as error:
            raise ConfigError(f"RAY_ADDRESS={self.address}: something listens there but does not let us in ({error}); check "
                              "RAY_AUTH_MODE and RAY_AUTH_TOKEN_PATH, and that both sides run the same Ray") from None
        require("node_slot" in ray.cluster_resources(),
                f"RAY_ADDRESS={self.address}: its nodes offer no node_slot, so timings could not be kept apart; start each node "
                "with: ray start --resources='{\"node_slot\": 1}'")

    def explain(self) -> str:
        """What the cluster has, what is free, and what a job of ours asks for."""
        import ray

        have, free = ray.cluster_resources(), ray.available_resources()
        names = ("CPU", "GPU", "node_slot")
        table = ", ".join(f"{name} {free.get(name, 0):g} of {have.get(name, 0):g} free" for name in names if name in have)
        score, timing = self.share.bundle(alone=False), self.share.bundle(alone=True)
        return (f"The cluster has {table}. A score job asks for {score}, a timing job for {timing}. Where more is asked than "
                "there is, lower `resources` in the sweep file; where it is not free, another program holds it.")

    def run(self, jobs: Sequence[Job], folder: ResultsFolder, run_job: RunJob | None = None,
            following: Callable[[], Job | None] | None = None) -> None:
        """Do `jobs`, in this order where there is a choice, into `folder`; returns when all are over or on Ctrl-C.

        following: says, whenever a worker is free, which of `jobs` is next; None while that waits for jobs that run.
        """
        from ray import tune

        if self._runs:
            self._free()
        self._runs += 1
        by_key = {job.key: job for job in jobs}
        share, root, here, held = self.share, folder.path.resolve(), os.getcwd(), folder.held

        def do(config: dict[str, Any]) -> dict[str, Any]:
            os.chdir(here if os.path.isdir(here) else root)  # relative paths of a sweep file mean the driver's folder
            if not share.gpus:
                os.environ["CUDA_VISIBLE_DEVICES"] = ""  # Ray hides no GPU from a job that asks for none
            return {"ok": worker.run(by_key[config["job"]], root, run_job, capture=True, held=held)}

        storage = str(self._folder.path / "tune")  # not beside the results: Tune does not survive a full disk
        tuner = tune.Tuner(
            tune.with_resources(do, lambda config: tune.PlacementGroupFactory([share.bundle(by_key[config["job"]].alone)])),
            param_space={} if following else {"job": tune.grid_search(list(by_key))},
            tune_config=tune.TuneConfig(reuse_actors=True, trial_name_creator=_name, trial_dirname_creator=_name,
                                        num_samples=len(by_key) if following else 1,
                                        search_alg=_one_by_one(following, self._slots) if following else None),
            run_config=tune.RunConfig(name=f"tune-{time.time_ns()}", storage_path=storage, verbose=0,
                                      failure_config=tune.FailureConfig(max_failures=1), callbacks=[_outcomes(folder, by_key)]))
        with Log(open(root / ".progress" / "ray.log", "ab"), encoding="utf-8", line_buffering=True) as file, \
                contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):  # Ray prints past its log levels
            tuner.fit()


    def _slots(self) -> int:
        """Score jobs that the cluster can run at once, as it is now."""
        import ray

        return max(1, round(ray.cluster_resources().get("node_slot", 1) * self.share.workers))


def _one_by_one(following: Callable[[], Job | None], slots: Callable[[], int]) -> Any:
    """A Tune searcher that asks `following` for a job where a slot is free, and ends where it has none and none runs."""
    from ray.tune.search import Searcher

    return type("OneByOne", (_Turns, Searcher), {})(following, slots)


class _Turns:
    """What of that searcher is ours."""

    def __init__(self, following: Callable[[], Job | None], slots: Callable[[], int]) -> None:
        super().__init__()
        self.following, self.slots, self.running = following, slots, set()

    def suggest(self, trial_id: str) -> dict[str, str] | str | None:
        if len(self.running) >= self.slots():  # decided ahead of a free worker, a promotion would miss who comes meanwhile
            return None
        job = self.following()
        if job is None:
            return None if self.running else "FINISHED"
        self.running.add(trial_id)
        return {"job": job.key}

    def on_trial_complete(self, trial_id: str, result: dict | None = None, error: bool = False) -> None:
        self.running.discard(trial_id)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the results folder is the memory."""

    restore = save

    def __reduce__(self) -> Any:  # Tune pickles its tuner for a restore that is not used; `following` holds the driver
        return object, ()


def _name(trial: Any) -> str:
    return trial.config["job"]


def _outcomes(folder: ResultsFolder, jobs: dict[str, Job]) -> Any:
    """A Tune callback by which every job that is over has a part, before the next is decided on.

    A job whose process died twice gets its failed part here; other failures write their own. What a worker elsewhere wrote is
    waited for: a network file system may show a new file some seconds late.
    """
    from ray import tune

    class Outcomes(tune.Callback):
        def on_trial_complete(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
            if (trial.last_result or {}).get("ok"):
                folder.wait_for_part(jobs[trial.config["job"]])

        def on_trial_error(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
            job = jobs[trial.config["job"]]
            if not folder.there() or folder.finished(job):  # a worker of a lost node came to its end after all
                return
            with contextlib.suppress(OSError):  # on a full disk the job stays missing
                said = Path(trial.error_file).read_text(encoding="utf-8").strip().splitlines()[-1]
                folder.write_failure(job, "WorkerDied", "the worker process ended without a result, twice; out of memory is the "
                                     f"usual reason. Ray says: {said[:300]}")

    return Outcomes()
