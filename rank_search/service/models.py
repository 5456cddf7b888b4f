"""What the service answers and takes, as its OpenAPI document tells it. No database."""

from __future__ import annotations

import math
from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from rank_search.notebook import front_html
from rank_search.study.records import State
from rank_search.study.states import Action, JobState, Role

MOST_TRIAL = 2**31 - 1


class Model(BaseModel):
    """Base of what is answered."""

    model_config = ConfigDict(use_attribute_docstrings=True, from_attributes=True)


class Body(BaseModel):
    """Base of what is taken."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class Error(Model):
    """Why a request was refused."""

    error: str
    """One line: the rule, the value, the way out."""


class Health(Model):
    """That the service is there."""

    status: Literal["ok"] = "ok"
    version: str


class Study(Model):
    """How far a study is."""

    name: str
    state: Literal["submitted", "running", "idle", "pausing", "paused", "stopping", "stopped", "ended", "given up"]
    """``idle``: no trial is running, and nobody asked for that."""
    wanted: int
    """Trials that its file asks for."""
    finished: int
    """Trials that count towards them."""
    running: int = 0
    complete: int = 0
    pruned: int = 0
    infeasible: int = 0
    failed: int = 0
    requeued: int = 0
    skipped: int = 0
    front: int = 0
    """Points of the front."""
    best_loss: float | None = None
    dense_loss: float | None = None
    unit: str
    """What losses are nats per: token or example."""
    seconds: float = 0.0
    """Spent in measurements, all workers together."""
    reason: str | None = None
    """Why it stopped or was given up."""
    asked_by: str | None = None
    """Who submitted it; null where it came another way."""
    created: datetime
    last_activity: datetime | None = None


class StudyDetail(Study):
    """A study with its file and its model."""

    file: dict[str, Any]
    """The study file, all keys."""
    model_params: int | None = None
    """Parameters of the dense model; null before it was loaded."""
    target_layers: int | None = None
    dashboard: str | None = None
    """Where its page is in optuna-dashboard."""
    failures: list[Failure] = []
    queued: int = 0
    """Rank maps queued by hand that no worker has taken yet."""


class Failure(Model):
    """A failed trial."""

    trial: int
    reason: str


class Studies(Model):
    """All studies, in alphabetical order."""

    studies: list[Study]


class Trial(Model):
    """A trial without its rank map."""

    number: int
    state: State
    source: str
    worker: str
    started: datetime
    finished: datetime | None
    loss: float | None
    """Nats per unit, of the highest fidelity it reached."""
    standard_error: float | None
    num_params: int | None
    kept_of_targets: float | None
    kept_of_model: float | None
    fidelity: str | None
    seconds: float | None
    reason: str | None
    """Why it failed, was requeued or skipped, or is infeasible."""
    same_as: int | None
    promotes: int | None


class Trials(Model):
    """Some trials by ascending number."""

    trials: list[Trial]
    next: int | None
    """``after`` of the next page; null on the last one."""


class Point(Model):
    """A point of a front."""

    trial: int
    source: str
    num_params: int
    kept_of_targets: float
    kept_of_model: float
    loss: float
    standard_error: float
    perplexity: float | None
    """Null where exp(loss) overflows."""
    fidelity: str
    fold_deviation: float | None = None
    metrics: dict[str, float | None] = {}


class Front(Model):
    """A study's front, by ascending parameters, beside the dense model."""

    study: str
    unit: str
    dense_loss: float | None
    dense_params: int
    points: list[Point]

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        return front_html(
            [
                (
                    point.trial, point.source, point.num_params, point.kept_of_targets, point.loss,
                    point.standard_error, math.inf if point.perplexity is None else point.perplexity,
                )
                for point in self.points
            ]
        )  # fmt: skip


class Worker(Model):
    """A worker as its trials tell of it."""

    worker: str
    """Host, process, start."""
    trial: int | None
    """The one it is at."""
    measured: int
    last: datetime
    """When it last began or ended a trial."""


class Workers(Model):
    """The workers of a study, the one that was busy last first."""

    workers: list[Worker]


class Layer(Model):
    """A target layer, and the ranks it may have."""

    name: str
    group: str
    depth: int
    m: int
    n: int
    least_rank: int | None
    """Null where the layer can only be dense."""
    most_rank: int | None
    step: int | None
    may_be_dense: bool


class Layers(Model):
    """The target layers of a study."""

    layers: list[Layer]


class Requested(Model):
    """What the workers of a study are asked to do."""

    study: str
    action: Action


class QueuedRankMap(Body):
    """A rank map to measure."""

    ranks: Annotated[dict[str, Annotated[int, Field(ge=1, le=2**31 - 1)]], Field(max_length=100_000)]
    """Module name → rank; target layers that are left out stay dense."""


class Queued(Model):
    """A rank map that waits to be measured."""

    number: int
    source: str
    """Source of the trial that it becomes."""


class ApplyBody(Body):
    """Write the checkpoint of a trial's rank map."""

    kind: Literal["apply"]
    study: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]
    trial: Annotated[int, Field(ge=0, le=MOST_TRIAL)]
    finetune: bool = True
    """Repeat the trial's short fine-tune, so that the checkpoint is what was measured."""
    form: Literal["factored", "dense"] = "factored"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"


class ConfirmBody(Body):
    """Fine-tune a trial's rank map for longer, write its checkpoint, and score that on the test text, too."""

    kind: Literal["confirm"]
    study: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]
    trial: Annotated[int, Field(ge=0, le=MOST_TRIAL)]
    steps: Annotated[int, Field(ge=1, le=1_000_000)]
    """Optimiser steps of the fine-tune."""
    form: Literal["factored", "dense"] = "factored"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"


JobBody = Annotated[ApplyBody | ConfirmBody, Field(discriminator="kind")]


class Job(Model):
    """A job on a trial's rank map."""

    number: int
    study: str
    trial: int
    kind: Literal["apply", "confirm"]
    options: dict[str, Any]
    state: JobState
    attempt: int
    reason: str | None
    """Why it failed."""
    result: dict[str, Any]
    """Losses, nats per unit, with their standard errors; parameters."""
    asked_by: str
    worker: str | None
    created: datetime
    started: datetime | None
    finished: datetime | None


class Jobs(Model):
    """Jobs, the first one first."""

    jobs: list[Job]


class Login(Body):
    """A token, to open a session with."""

    token: Annotated[str, Field(max_length=200)]


class SessionTold(Model):
    """Who asks."""

    name: str
    role: Role
    auth: bool
    """Whether the service asks for a login at all."""
    csrf: str | None
    """What a browser's requests that change something bring along as X-CSRF-Token."""
    dashboard: bool
    """Whether optuna-dashboard is at ``/``."""


StudyDetail.model_rebuild()
