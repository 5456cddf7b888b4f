"""From a study file to a launch: what can be refused is refused before any worker starts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from rank_search import api
from rank_search.errors import BudgetError, DeviceError, InputError
from rank_search.launch import exits
from rank_search.launch.job import Job, Launcher, check_grace
from rank_search.launch.supervisor import Board, Watch, supervise
from rank_search.spec import StudyFile, load_study_file

ENGINES = ("local", "ray", "slurm", "kubernetes")
DETACHABLE = ("slurm", "kubernetes")
"""Engines that keep workers alive by themselves."""


def launch(
    study: Path | str,
    board: Board,
    *,
    storage: str | None = None,
    trials: int | None = None,
    workers: int | None = None,
    gpus_per_worker: int | None = None,
    on: str = "local",
    options: Mapping[str, str] | None = None,
    grace: float = 30.0,
    detach: bool = False,
    on_leaving: Callable[[str], object] = lambda _line: None,
) -> int:
    """Start workers on a study, watch over them until it has its trials, and return an exit code.

    The tables are made under the database's lock before any worker starts. The first worker builds the factor bank and
    makes the study, the others wait for it.

    Args:
        workers: None takes one a GPU, or one for a few cores.
        gpus_per_worker: None takes as many as the study file spreads the model over, or one where there are GPUs.
        on: the engine, one of :data:`ENGINES`, with its options.
        grace: seconds that a worker which is asked to stop may take to finish its trial.
        detach: leave once a cluster has taken the workers on.
        on_leaving: takes what was done, in one line, where nobody watches over the workers from here.

    Raises:
        InputError: the study file, the database, the devices or the engine's options; no worker was started.
    """
    if detach and on not in DETACHABLE:
        raise InputError(f"--detach leaves workers to a cluster ({' or '.join(DETACHABLE)}), not to --on {on}")
    file = load_study_file(study)
    job = make_job(
        file, Path(study), storage=storage, trials=trials, workers=workers, gpus_per_worker=gpus_per_worker, grace=grace
    )
    wanted = trials or file.spec.search.trials
    watch = Watch(job, wanted)
    launcher = make_launcher(on, job, file, watch, options or {})
    written = _manifest_only(launcher) if on == "kubernetes" else None
    if detach or written is not None:
        # The database may be reachable from the cluster only; its workers make the tables, too.
        launcher.start()
        on_leaving(
            f"workers submitted; `rank-search status {study}` shows how far the study is" if written is None
            else f"wrote {written}; apply it with `kubectl apply -f {written}`"
        )  # fmt: skip
        return exits.DONE
    _prepare_database(job, file, on)
    return supervise(launcher, job, watch, board)


def make_job(
    file: StudyFile, path: Path, *, storage: str | None = None, trials: int | None = None, workers: int | None = None,
    gpus_per_worker: int | None = None, grace: float = 30.0,
) -> Job:  # fmt: skip
    """What is to be launched.

    Raises:
        BudgetError: a number below what makes sense.
        DeviceError: the study file names one GPU, which all workers would share.
    """
    for name, value, least in (("workers", workers, 1), ("trials", trials, 1), ("gpus-per-worker", gpus_per_worker, 0)):
        if value is not None and value < least:
            raise BudgetError(f"--{name} must be at least {least}, not {value}")
    check_grace(grace)
    if file.spec.run.device.startswith("cuda:"):
        raise DeviceError(
            f"run.device = {file.spec.run.device!r} would put all workers on one GPU; say 'auto', 'cuda' or 'cpu'"
        )
    if gpus_per_worker is None and (file.spec.run.gpus_per_model or 1) > 1:
        gpus_per_worker = file.spec.run.gpus_per_model
    return Job(
        path, file.spec.name, api.storage_url(storage, file), file.work_dir / "logs", trials, workers, gpus_per_worker,
        grace, file.spec.run.database_patience_seconds,
    )  # fmt: skip


def make_launcher(on: str, job: Job, file: StudyFile, watch: Watch, options: Mapping[str, str]) -> Launcher:
    """The engine of a name. Each engine's own library is loaded here, and only here.

    Raises:
        InputError: no such engine, its library is missing, or an option that it does not take.
    """
    match on:
        case "local":
            from rank_search.launch.devices import slots
            from rank_search.launch.local import LocalLauncher

            if options:
                raise InputError(f"--on local takes no --option, not {next(iter(options))!r}")
            places = slots(job.workers, job.gpus_per_worker, on_cpu=file.spec.run.device == "cpu")
            return LocalLauncher(job, places, watch.measured)
        case "ray":
            from rank_search.launch.ray_cluster import RayLauncher

            return RayLauncher.of(job, watch.measured, options, on_cpu=file.spec.run.device == "cpu")
        case "slurm":
            from rank_search.launch.slurm import SlurmLauncher

            return SlurmLauncher.of(job, options, on_cpu=file.spec.run.device == "cpu")
        case "kubernetes":
            from rank_search.launch.kubernetes import KubernetesLauncher

            return KubernetesLauncher.of(job, options, on_cpu=file.spec.run.device == "cpu")
        case _:
            raise InputError(f"--on must be one of {', '.join(ENGINES)}, not {on!r}")


def _manifest_only(launcher: Launcher) -> Path | None:
    """What the engine writes, where it was asked to do nothing else."""
    from rank_search.launch.kubernetes import KubernetesLauncher

    return launcher.manifest_only if isinstance(launcher, KubernetesLauncher) else None


def _prepare_database(job: Job, file: StudyFile, on: str) -> None:
    """Make the tables, and refuse a study that the workers would refuse one after the other."""
    from rank_search.study.hosts import refuse_other_hosts, require_server
    from rank_search.study.store import find_study
    from rank_search.study.upgrading import upgrade

    if on == "kubernetes":
        require_server(job.storage, on)
    upgrade(job.storage)
    stored = find_study(job.storage, job.name)
    if stored is not None:
        file.spec.check_same_meaning(stored.spec)
    refuse_other_hosts(job.storage, job.name)
