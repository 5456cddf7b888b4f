"""Workers as an Indexed Job of Kubernetes: written as YAML and applied with ``kubectl``.

Kubernetes itself starts workers again, by their exit codes: a preempted one always, one of a wrong configuration never.
The database's URL comes from a secret, mounted as a file; study and factor bank lie on a shared volume.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import Field

from rank_search.api import STORAGE_FILE_VARIABLE
from rank_search.errors import InputError, one_line
from rank_search.launch import exits
from rank_search.launch.job import Job, Worker
from rank_search.launch.options import Options, parse_options
from rank_search.launch.restarts import described

POLL_SECONDS = 5.0
"""How often the cluster is asked."""
_ANSWER_SECONDS = 10
"""What is asked in mid-run must be answered so soon: signals wait for it."""
_LONGEST_NAME = 63
"""Characters of a label, and of a pod's host name."""
_DIGITS = 6
"""Of a digest, which tell two studies apart whose names Kubernetes would take for one."""
SPARE_SECONDS = 30
"""What a pod gets beyond the grace time of its worker."""
_USER = 10001
"""Of the worker image."""
_SECRET_FOLDER = "/run/secrets/rank-search"
_INDEX = "batch.kubernetes.io/job-completion-index"


class KubernetesOptions(Options):
    """``--option`` of ``--on kubernetes``."""

    image: str = Field(min_length=1)
    """The worker image, with tag or digest."""
    volume: str = Field(min_length=1)
    """The persistent volume claim that holds the study; all nodes must be able to mount it at once."""
    study: str | None = None
    """The study file's path on the volume. Default: its folder's name and its own."""
    mount: str = Field("/studies", pattern=r"^/")
    """Where the volume is mounted."""
    namespace: str = "default"
    """The namespace of the job, the secret and the volume claim."""
    name: str | None = None
    """The job's name. Default: rank-search- and the study's name."""
    secret: str = "rank-search-database"
    """The secret that holds the database's URL."""
    key: str = "url"
    """The key of the URL in the secret."""
    gpu: str = "nvidia.com/gpu"
    """The resource that GPUs are requested as."""
    cpu: str = "4"
    """CPUs of a worker."""
    memory: str = "32Gi"
    """Memory of a worker."""
    retries: int = Field(5, ge=0)
    """How often a worker that dies is started again."""
    apply: bool = True
    """Whether to apply the manifest, or only to write it."""


class KubernetesLauncher:
    """Applies the manifest of a job and watches its pods.

    Args:
        job: what to run; its number of workers must be given.
        options: where and how.
        gpus: of each worker.
    """

    def __init__(self, job: Job, options: KubernetesOptions, gpus: int) -> None:
        self._options = options
        self._manifest = manifest(job, options, gpus)
        self._path = job.logs / f"{job.name}.job.yaml"
        self._name = self._manifest["metadata"]["name"]
        self._seen = self._all("not applied", "stopped")
        self._next = 0.0
        self._applied = False
        self._stopping = False
        self.trouble = ""

    @classmethod
    def of(cls, job: Job, options: Mapping[str, str], *, on_cpu: bool) -> KubernetesLauncher:
        """With ``--option`` as given.

        Raises:
            InputError: an option that is wrong or missing, or no number of workers.
        """
        parsed = parse_options(KubernetesOptions, "kubernetes", options)
        if job.workers is None:
            raise InputError("--on kubernetes cannot tell how many GPUs there are; give --workers N")
        gpus = 0 if on_cpu else 1 if job.gpus_per_worker is None else job.gpus_per_worker
        return cls(job, parsed, gpus)

    def start(self) -> None:
        """Write the manifest and apply it.

        Raises:
            InputError: it cannot be written, or ``kubectl`` is not there or refuses it.
        """
        write_manifest(self._manifest, self._path)
        if self._options.apply:
            self._remove_ended()
            self._applied = True  # before it answers: where it does not, the cluster may have the job all the same
            self._seen = self._all("", "waiting")
            try:
                self._kubectl("apply", "-f", str(self._path))
            except InputError as error:
                self.kill()
                raise InputError(f"{error}; {self.trouble}" if self.trouble else str(error)) from None

    def workers(self) -> list[Worker]:
        """All workers as the cluster last told them; where it does not answer, they go on."""
        if self._applied and time.monotonic() >= self._next:
            try:
                if self._stopping:
                    self._delete()
                else:
                    self._look()
                self.trouble = ""
            except InputError as error:
                self.trouble = str(error)
            self._next = time.monotonic() + POLL_SECONDS
        return self._seen

    def stop(self) -> None:
        """Delete the job, now or as soon as the cluster answers; its pods have their grace time."""
        self._stopping = True
        self._next = 0.0
        self.workers()

    def kill(self) -> None:
        """Delete the job if any of its workers has not ended; where that is not possible, say so."""
        if all(worker.has_ended for worker in self._seen):
            return
        self.stop()
        if self._applied:
            command = f"kubectl --namespace {self._options.namespace} delete job {self._name}"
            self.trouble = f"{self.trouble}; the job may still be there, delete it with `{command}`"
            self._applied = False
            self._seen = self._all("", "stopped")

    @property
    def manifest_only(self) -> Path | None:
        """The manifest's path, where it is only to be written."""
        return None if self._options.apply else self._path

    def _look(self) -> None:
        asked = "-o", "json"
        told = self._kubectl("get", "job", self._name, *asked, "--ignore-not-found", seconds=_ANSWER_SECONDS)
        if not told.strip():
            gone = "somebody has deleted the job"
            self._seen = [w if w.has_ended else replace(w, state="given up", note=gone) for w in self._seen]
            return
        label = f"batch.kubernetes.io/job-name={self._name}"
        pods = json.loads(self._kubectl("get", "pods", "-l", label, *asked, seconds=_ANSWER_SECONDS))
        self._seen = workers_of(json.loads(told), pods["items"], len(self._seen))

    def _delete(self) -> None:
        self._kubectl("delete", "job", self._name, "--wait=false", "--ignore-not-found", seconds=_ANSWER_SECONDS)
        self._applied = False
        self._seen = self._all("", "stopped")

    def _all(self, device: str, state: str) -> list[Worker]:
        return [Worker(str(index), device, state) for index in range(self._manifest["spec"]["completions"])]

    def _remove_ended(self) -> None:
        """Remove the job of an earlier launch if it has ended: applied again, it would start nothing."""
        told = self._kubectl("get", "job", self._name, "-o", "json", "--ignore-not-found")
        conditions = json.loads(told or "{}").get("status", {}).get("conditions", ())
        if any(one["type"] in {"Complete", "Failed"} and one["status"] == "True" for one in conditions):
            self._kubectl("delete", "job", self._name)

    def _kubectl(self, *arguments: str, seconds: float = 60) -> str:
        command = ["kubectl", "--namespace", self._options.namespace, *arguments]
        try:
            return subprocess.run(
                command, capture_output=True, text=True, check=True, timeout=seconds,
                start_new_session=True,  # Ctrl-C on the terminal is for the launch, which deletes the job
            ).stdout  # fmt: skip
        except OSError as error:
            raise InputError(
                f"kubectl cannot be run ({error.strerror or error}); apply {self._path} where it can"
            ) from None
        except subprocess.CalledProcessError as error:
            said = Exception(error.stderr.strip() or described(error.returncode))
            raise InputError(f"kubectl {arguments[0]}: {one_line(said)}") from None
        except subprocess.TimeoutExpired:
            raise InputError(f"kubectl {arguments[0]} did not answer within {seconds:g} s; check the cluster") from None


def manifest(job: Job, options: KubernetesOptions, gpus: int) -> dict[str, Any]:
    """The Indexed Job, as plain data."""
    count = job.workers or 1
    study = f"{options.mount}/{options.study or f'{job.study.resolve().parent.name}/{job.study.name}'}"
    pod = {
        "restartPolicy": "Never",  # a job that reads exit codes asks for this
        "terminationGracePeriodSeconds": int(job.grace) + SPARE_SECONDS,
        "automountServiceAccountToken": False,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": _USER,
            "runAsGroup": _USER,
            "fsGroup": _USER,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [_container(job, options, gpus, study)],
        "volumes": [
            {"name": "studies", "persistentVolumeClaim": {"claimName": options.volume}},
            {
                "name": "database",
                "secret": {"secretName": options.secret, "items": [{"key": options.key, "path": "url"}]},
            },
            {"name": "shm", "emptyDir": {"medium": "Memory"}},
        ],
    }
    labels = {"app.kubernetes.io/name": "rank-search", "app.kubernetes.io/instance": _dns(job.name, _LONGEST_NAME)}
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {
            # A pod's host name is the job's with its index.
            "name": options.name or _dns(f"rank-search-{job.name}", _LONGEST_NAME - len(f"-{count - 1}")),
            "namespace": options.namespace,
            "labels": labels,
        },
        "spec": {
            "completionMode": "Indexed",
            "completions": count,
            "parallelism": count,
            "backoffLimitPerIndex": options.retries,
            "maxFailedIndexes": count,
            "podFailurePolicy": {"rules": _failure_rules()},
            "template": {"metadata": {"labels": labels}, "spec": pod},
        },
    }


def write_manifest(content: dict[str, Any], path: Path) -> None:
    """Write a manifest as YAML.

    Raises:
        InputError: it cannot be written, or PyYAML is missing.
    """
    try:
        import yaml
    except ModuleNotFoundError:
        raise InputError("--on kubernetes needs PyYAML; pip install 'rank-search[kubernetes]'") from None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    except OSError as error:
        raise InputError(f"manifest {path} cannot be written: {error.strerror or error}") from None


def workers_of(job: Mapping[str, Any], pods: list[Mapping[str, Any]], count: int) -> list[Worker]:
    """The workers, from what the cluster tells of the job and its pods; the newest pod of an index counts."""
    newest: dict[int, Mapping[str, Any]] = {}
    made: dict[int, int] = {}
    for pod in sorted(pods, key=lambda pod: pod["metadata"]["creationTimestamp"]):
        index = int(pod["metadata"]["annotations"][_INDEX])
        newest[index], made[index] = pod, made.get(index, 0) + 1
    failed = _indexes(job.get("status", {}).get("failedIndexes", ""))
    return [_worker(index, newest.get(index), made.get(index, 1) - 1, index in failed) for index in range(count)]


def _worker(index: int, pod: Mapping[str, Any] | None, restarts: int, failed: bool) -> Worker:
    if pod is None:
        return Worker(str(index), "", "given up" if failed else "waiting", restarts)
    status, node = pod["status"], pod["spec"].get("nodeName", "")
    codes = [
        container["state"]["terminated"]["exitCode"]
        for container in status.get("containerStatuses", [])
        if "terminated" in container.get("state", {})
    ]
    code = codes[0] if codes else None
    state = {"Running": "running", "Succeeded": "done"}.get(status["phase"], "waiting")
    note = status.get("reason", "") if state == "waiting" else ""
    if failed:
        state, note = "given up", f"last with exit code {code}"
    host = pod["spec"].get("hostname")
    return Worker(str(index), node, state, restarts, host, note, exit_code=code)


def _container(job: Job, options: KubernetesOptions, gpus: int, study: str) -> dict[str, Any]:
    limits: dict[str, Any] = {"memory": options.memory}
    requests: dict[str, Any] = {"cpu": options.cpu, "memory": options.memory}
    if gpus:
        limits[options.gpu] = requests[options.gpu] = gpus
    return {
        "name": "worker",
        "image": options.image,
        "command": list(job.command(study, python="python")),
        "env": [
            {"name": STORAGE_FILE_VARIABLE, "value": f"{_SECRET_FOLDER}/url"},
            {"name": "OMP_NUM_THREADS", "value": str(max(1, int(options.cpu)) if options.cpu.isdecimal() else 1)},
        ],
        "resources": {"requests": requests, "limits": limits},
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
        "volumeMounts": [
            {"name": "studies", "mountPath": options.mount},
            {"name": "database", "mountPath": _SECRET_FOLDER, "readOnly": True},
            {"name": "shm", "mountPath": "/dev/shm"},
        ],
    }


def _failure_rules() -> list[dict[str, Any]]:
    def on(action: str, code: int) -> dict[str, Any]:
        codes = {"containerName": "worker", "operator": "In", "values": [code]}
        return {"action": action, "onExitCodes": codes}

    return [
        on("FailIndex", exits.CONFIGURATION),
        on("Ignore", exits.PREEMPTED),
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
    ]


def _indexes(text: str) -> set[int]:
    """``1,3-5`` as numbers."""
    found: set[int] = set()
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        found |= set(range(int(first), int(last or first) + 1))
    return found


def _dns(name: str, longest: int) -> str:
    """A name as Kubernetes takes it: lower-case letters, digits and hyphens. Another one only where it must be, and
    then with digits of its digest.
    """
    made = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    if made == name and len(made) <= longest:
        return made
    digits = hashlib.sha256(name.encode()).hexdigest()[:_DIGITS]
    return f"{made[: longest - _DIGITS - 1].strip('-')}-{digits}".strip("-")
