"""The study file: TOML checked against typed, strict models. Pure: no torch, no Optuna."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from rank_search.earlier import STORED, as_meant
from rank_search.errors import StudyFileError, StudyMismatchError
from rank_search.ranks import Storage
from rank_search.search_spec import STOP_KEYS, Fraction, Name, Positive, Seed, Table
from rank_search.search_spec import Allocation as Allocation
from rank_search.search_spec import SearchSpec as SearchSpec

Method = Literal["kfac", "whitened", "asvd", "fwsvd", "svd"]
Layers = Literal["linear", "attention", "query-value"]
Granularity = Literal["matrix", "head"]
TaskName = Literal["causal-lm", "masked-lm", "sequence-classification", "seq2seq-lm"]
MetricName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?$")]

METRICS: dict[str, tuple[TaskName, ...]] = {
    "accuracy": ("causal-lm", "masked-lm", "sequence-classification"),
    "f1": ("sequence-classification",),
    "exact_match": ("seq2seq-lm",),
    "perplexity": ("causal-lm", "masked-lm", "seq2seq-lm"),
}
"""Metrics that come with the package and need no network, and the tasks that each of them fits."""

_TASK_OF_COLUMN: dict[str, TaskName] = {
    "pair_column": "sequence-classification",
    "label_column": "sequence-classification",
    "target_column": "seq2seq-lm",
}

LOSS_UNITS: dict[TaskName, str] = {
    "causal-lm": "token",
    "masked-lm": "token",
    "sequence-classification": "example",
    "seq2seq-lm": "token",
}
"""What a task's loss is a mean over."""

PLAIN_RATE = 4e-4
"""Learning rate of the factors, the same for all rank maps."""

SCALED_RATE = 8e-4
"""Learning rate of the factors before it is scaled by what a rank map removes."""

LEAST_REMOVED = 0.125
"""Removed fraction that a scaled learning rate counts at least: below it, a lower rate only trains less."""

PYTHON_DOCS = "python-docs"
"""Name of the text that every Python has: the language reference in ``pydoc_data.topics``."""


class ModelSpec(Table):
    """``[model]``: which pretrained model."""

    source: Name
    """Hub id, folder, or GGUF file; a relative path is relative to the study file."""
    task: TaskName = "causal-lm"
    """What it predicts: the next token, masked tokens, the label of a text, or a text from another one."""
    revision: Name | None = None
    """Commit, tag or branch of a hub model; a study stores the commit it resolves to."""
    trust_remote_code: bool = False
    """Allow a hub model or folder to run its own code."""


class TargetSpec(Table):
    """``[targets]``: which weight matrices may be factorised."""

    layers: Layers = "linear"
    """All linear layers of the blocks, those of attention, or query and value projections alone."""
    share: Fraction | None = None
    """Keep only the fewest of the selected layers that hold this share of their parameters."""
    include: tuple[str, ...] = ()
    """Patterns on module names to add, anywhere in the model."""
    exclude: tuple[str, ...] = ()
    """Patterns on module names to leave out."""
    split_qkv: bool = False
    """Factorise query, key and value of a fused projection on their own, as `<module>.q`, `.k` and `.v`."""
    granularity: Granularity = "matrix"
    """Factorise whole matrices, or attention's projections head by head, as `<module>.head.<i>` (of a fused one
    `<module>.q.head.<i>`)."""
    storage: Storage = "pivoted"
    """Which parameter count is the objective, and how a layer of rank r is stored: as r of its rows and the others'
    coefficients, r (m + n - r) numbers, or as two factors, r (m + n). At equal counts pivoted storage keeps more."""
    rank_multiple: Positive = 1
    """Allow only ranks that are multiples of this, and for a layer whose largest useful rank is smaller that one."""
    frozen: dict[str, Positive | Literal["dense"]] = Field(default={})
    """Patterns on names of target layers, each with the one rank that these may have, or `"dense"`; where several fit,
    the last counts."""


class DataSpec(Table):
    """``[data]``: text, and how many blocks of it go where."""

    train: Name = PYTHON_DOCS
    """Hub dataset id, file (text, JSONL, CSV or Parquet), or ``python-docs``."""
    validation: Name | None = None
    """A source of its own; without one, validation blocks are cut from the end of ``train``."""
    test: Name | None = None
    """For `evaluate --study`. A search scores nothing on it, and refuses one whose text it sees in another role."""
    config: Name | None = None
    """Configuration of a hub dataset."""
    revision: Name | None = None
    """Commit, tag or branch of a hub dataset."""
    train_split: str = "train"
    """Split of a dataset; files have none."""
    validation_split: str = "validation"
    """Split of a dataset."""
    test_split: str = "test"
    """Split of a dataset."""
    column: str = "text"
    """The text's column in JSONL, CSV, Parquet and hub datasets."""
    pair_column: Name | None = None
    """Of sequence classification: the column of a second text that is judged together with the first."""
    label_column: Name | None = None
    """Of sequence classification: the labels' column; None: ``label``."""
    target_column: Name | None = None
    """Of ``seq2seq-lm``: the column of the text to be written; None: ``target``."""
    sequence_length: Annotated[int, Field(ge=2)] = 128
    """Tokens in a block; in tasks with labels, the most that is read of an example. There, numbers of blocks count
    examples: the rows of a table, without repeated ones, in an order shuffled once and always the same."""
    calibration_blocks: Positive = 64
    """From the start of `train`, for the statistics of the layers."""
    train_blocks: Positive | None = None
    """None: all that is left."""
    validation_blocks: Positive | None = None
    """None: all of a validation source of its own, else a tenth of ``train``."""
    test_blocks: Positive | None = None
    """None: all."""


class ValidationSpec(Table):
    """``[validation]``: what a trial is measured by, beside the number of its parameters."""

    metrics: tuple[MetricName, ...] = ()
    """Beside the loss: ``accuracy``, ``f1`` (mean over classes), ``exact_match`` (of texts that the model writes, which
    takes time), ``perplexity``, or metrics of the hub by name."""
    trust_remote_code: bool = False
    """Allow metrics of the hub, which run their own code."""
    folds: Annotated[int, Field(ge=2, le=1000)] | None = None
    """Cross-validation: what follows calibration is cut into so many folds, and every trial is fine-tuned and scored as
    often, each time on another one. Its loss is their mean."""

    @field_validator("metrics")
    @classmethod
    def _once_and_known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(value)) < len(value):
            raise ValueError("name every metric once")
        return value

    @model_validator(mode="after")
    def _trusted(self) -> ValidationSpec:
        for name in self.metrics:
            if name not in METRICS and not self.trust_remote_code:
                raise ValueError(
                    f"metric {name!r} is none of {', '.join(METRICS)}; set trust_remote_code = true to run one of the "
                    "hub, which brings its own code"
                )
        return self


class FactorSpec(Table):
    """``[factors]``: how the matrices are factorised."""

    method: Method = "kfac"
    """Both sides weighed (`kfac`), inputs alone (`whitened`, `asvd`), rows alone (`fwsvd`), or nothing (`svd`)."""
    damping: Annotated[float, Field(gt=0, le=1)] = 1e-4
    """Added to the diagonal of A and G, relative to its mean."""
    seed: Seed = 0
    """Of the labels that are sampled from the model's own output."""
    anchor: Fraction = 0.8
    """Take the statistics once more, on the model that the closed form makes at this kept fraction of the target
    layers, and decompose by the mean of both: layers then count as they do between the dense and the compressed model.
    1: by the dense model's alone."""
    slope_power: Annotated[float, Field(ge=0, le=1)] = 0.5
    """On that compressed model, measure how fast the loss rises along what each layer lost, and multiply the layer's
    predicted rises by this power of what that is of its prediction (`kfac` alone). 0: leave them as they are."""
    gain_step: Annotated[float, Field(ge=0, le=1)] = 0.2
    """On that compressed model, measure whether each layer's output should be larger or smaller, and scale its factors
    by this share of a Newton step of that one number (`kfac` alone). 0: leave them as they are."""


class FinetuneSpec(Table):
    """``[finetune]``: the short fine-tune of a trial."""

    mode: Literal["own", "nested"] = "own"
    """Every trial is fine-tuned on its own, or the bank's factors once for all trials, which then slice them."""
    nested_steps: Positive = 128
    """Optimiser steps of a range's nested fine-tune in the mean of all, each under another rank map."""
    nested_ranges: Annotated[int, Field(ge=1, le=32)] = 5
    """Ranges of kept fractions, from `search.min_kept` to `search.max_kept`, with a nested fine-tune each, made when a
    trial first asks for it."""
    steps: Annotated[int, Field(ge=0, lt=2**53)] | None = None
    """Budget of a trial's own fine-tune in optimiser steps; where neither this nor ``tokens`` is given, 100, and 0 in
    nested mode. 0: no fine-tune of its own."""
    tokens: Positive | None = None
    """Budget in tokens, instead of in steps; the last step that it begins is taken whole."""
    batch_blocks: Positive = 8
    """Blocks in a step."""
    learning_rate: Annotated[float, Field(gt=0, le=1e30)] | None = None
    """Of AdamW for the factors, at its peak, before it is scaled; None: 8e-4 where it is scaled, else 4e-4."""
    learning_rate_scale: Literal["removed", "rank", "none"] | None = None
    """Multiply `learning_rate` by the fraction of the target layers' parameters that a rank map removes (the less is
    broken, the less there is to repair); in each layer by 1 - rank / min(m, n); or by nothing. None: `removed` in
    pivoted storage, whose layers all lose a little, and `none` in two-factor storage, where few of them lose much."""
    dense_learning_rate: Annotated[float, Field(gt=0, le=1e30)] = 1e-4
    """Of AdamW for what `train = "all"` trains beside the factors, at its peak."""
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of the steps in which the learning rate rises; it then falls by a cosine."""
    weight_decay: Annotated[float, Field(ge=0, le=10)] = 0.0
    """Of AdamW."""
    clip: Annotated[float, Field(gt=0)] = 1.0
    """Largest norm of the gradient."""
    train: Literal["factors", "all"] = "factors"
    """Train the factors alone, or every parameter of the model along; the nested fine-tune itself trains factors."""
    compiled: bool = True
    """On a GPU, compile the model's blocks around the target layers where the factors are trained alone: a step takes
    about half the time, the first one of a process up to 20 s more."""

    @model_validator(mode="after")
    def _one_budget(self) -> FinetuneSpec:
        if self.tokens is not None and self.steps is not None:
            raise ValueError("give steps or tokens, not both")
        return self

    @model_validator(mode="after")
    def _trains_something(self, info: ValidationInfo) -> FinetuneSpec:
        if info.context == STORED:  # it came before the rule, and does what "factors" does
            return self
        if self.mode == "nested" and self.train == "all" and not self.steps and self.tokens is None:
            raise ValueError(
                "train = 'all' is for a trial's own steps, of which nested mode has none by itself; "
                "give steps or leave train out"
            )
        return self

    def at(self, kept: float, storage: Storage) -> FinetuneSpec:
        """The fine-tune of a rank map that keeps this fraction of the target layers: its learning rate is its own."""
        scale = self.learning_rate_scale or ("removed" if storage == "pivoted" else "none")
        rate = self.learning_rate or (PLAIN_RATE if scale == "none" else SCALED_RATE)
        if scale == "removed":
            scale, rate = "none", rate * max(1 - kept, LEAST_REMOVED)
        return self.model_copy(update={"learning_rate": rate, "learning_rate_scale": scale})

    def steps_for(self, sequence_length: int) -> int:
        """Optimiser steps of the budget, for blocks of ``sequence_length`` tokens."""
        if self.tokens is None:
            default = 0 if self.mode == "nested" else 100
            return default if self.steps is None else self.steps
        return -(-self.tokens // (self.batch_blocks * sequence_length))


class RunSpec(Table):
    """``[run]``: where and how it runs; nothing here changes what a measurement means."""

    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d{1,9})?)$")] = "auto"
    """`auto` (a GPU where there is one), `cpu`, `cuda` or `cuda:N`."""
    work_dir: str = "work"
    """Working folder (blocks, factor banks), relative to the study file."""
    bank_url: str | None = None
    """Where all hosts keep factor banks, beside their working folders: `s3://bucket/folder`, `gs://...`, `file:///...`
    or another URL that fsspec opens. Whoever builds a bank uploads it; whoever lacks it downloads it. Credentials come
    from the environment."""
    gpus_per_model: Annotated[int, Field(ge=1, le=64)] | None = None
    """GPUs that the model is spread over, block by block, where it does not fit one. None: as many as
    `launch --gpus-per-worker` gives to a worker, else one."""
    score_batch_blocks: Positive = 8
    """Blocks in a batch of scoring and of calibration."""
    calibration_batch_blocks: Positive | None = None
    """Blocks in a batch of calibration, where it should be another: a large one keeps a GPU busy. None: as above."""
    statistics_memory: Annotated[float, Field(gt=0, le=1e6)] | None = None
    """GiB that the statistics of the target layers may take, on the model's device; those of more are collected group
    by group, with a calibration pass each. None: a third of what is free once the model is loaded."""
    threads: Annotated[int, Field(ge=1, le=4096)] | None = None
    """CPU threads; None leaves torch's default."""
    lease_seconds: Annotated[float, Field(ge=1, le=86400)] = 120.0
    """How long a worker may be silent before its trial is proposed again; it gives a sign three times as often."""
    database_patience_seconds: Annotated[float, Field(ge=0, le=864000)] = 1800.0
    """How long a worker waits for a database that is away, or full, before it ends with exit code 75."""
    checkpoint_seconds: Annotated[float, Field(ge=0, le=864000)] = 60.0
    """How often a fine-tune that takes longer keeps its state in the working folder, for whoever has to go on with it;
    writing takes a twentieth of the time at most. 0: never."""

    @model_validator(mode="after")
    def _gpus_of_any_number(self) -> RunSpec:
        if (self.gpus_per_model or 1) > 1 and self.device not in ("auto", "cuda"):
            raise ValueError(f"gpus_per_model needs device = 'auto' or 'cuda', not {self.device!r}")
        return self

    @field_validator("bank_url")
    @classmethod
    def _url_without_secrets(cls, value: str | None) -> str | None:
        if value is None:
            return None
        # The value is in none of the messages, for it may hold what nobody should read.
        protocol, _, place = value.partition("://")
        if re.search(r":.*@", place, re.DOTALL) or "?" in value or "#" in value:
            raise ValueError("takes no password, '?' or '#'; its driver reads credentials from the environment")
        if not re.fullmatch(r"[a-z][a-z0-9+.-]*", protocol) or not place.strip("/") or not value.isprintable():
            raise ValueError("must be a URL such as s3://bucket/folder or file:///folder")
        if protocol in {"file", "local"} and not place.startswith("/"):
            raise ValueError("must name an absolute folder, as file:///folder does")
        return value


class StudySpec(Table):
    """A whole study file."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]
    model: ModelSpec
    targets: TargetSpec = TargetSpec()
    data: DataSpec = DataSpec()
    validation: ValidationSpec = ValidationSpec()
    factors: FactorSpec = FactorSpec()
    finetune: FinetuneSpec = FinetuneSpec()
    search: SearchSpec = SearchSpec()
    run: RunSpec = RunSpec()

    @model_validator(mode="after")
    def _columns_of_the_task(self) -> StudySpec:
        for key, task in _TASK_OF_COLUMN.items():
            if getattr(self.data, key) is not None and self.model.task != task:
                raise ValueError(
                    f"data.{key} goes with model.task = {task!r}, not with {self.model.task!r}; leave it out"
                )
        return self

    @model_validator(mode="after")
    def _metrics_of_the_task(self) -> StudySpec:
        for name in self.validation.metrics:
            if self.model.task not in METRICS.get(name, (self.model.task,)):
                raise ValueError(
                    f"validation.metrics: {name!r} does not fit model.task = {self.model.task!r}; it fits "
                    f"{', '.join(METRICS[name])}"
                )
        return self

    @model_validator(mode="after")
    def _one_validation(self) -> StudySpec:
        if self.validation.folds is not None:
            if self.finetune.mode == "nested":
                raise ValueError(
                    "validation.folds needs finetune.mode = 'own': a nested fine-tune would see every fold"
                )
            for key in ("validation", "validation_blocks", "train_blocks"):
                if getattr(self.data, key) is not None:
                    raise ValueError(
                        f"validation.folds cuts validation from data.train; leave out data.{key}, or validation.folds"
                    )
        return self

    @model_validator(mode="after")
    def _fidelities_reach_the_top(self) -> StudySpec:
        top = self.highest_fidelity
        if self.search.fidelities is not None and self.search.fidelities[-1] != top:
            told = "has steps of its own" if top == "tuned" else "has none"
            raise ValueError(
                f"search.fidelities ends with {self.search.fidelities[-1]!r}, but the fine-tune of a trial {told} "
                f"(finetune.steps): let it end with {top!r}"
            )
        return self

    @model_validator(mode="after")
    def _enough_training(self) -> StudySpec:
        if self.data.train_blocks is not None and self.data.train_blocks < self.finetune.batch_blocks:
            raise ValueError(
                f"data.train_blocks ({self.data.train_blocks}) must be at least finetune.batch_blocks "
                f"({self.finetune.batch_blocks})"
            )
        return self

    def meaning(self) -> dict[str, Any]:
        """All that decides what a measurement means and which are proposed: everything but when to stop and where it
        runs."""
        tables = self.model_dump(mode="json")
        del tables["run"]
        for key in STOP_KEYS:
            del tables["search"][key]
        if self.finetune.mode == "own":
            del tables["finetune"]["nested_steps"], tables["finetune"]["nested_ranges"]
        return tables

    @property
    def highest_fidelity(self) -> Literal["sliced", "tuned"]:
        """That of the front: ``tuned`` where trials have a fine-tune of their own."""
        return "tuned" if self.finetune.steps_for(self.data.sequence_length) > 0 else "sliced"

    @property
    def digest(self) -> str:
        """SHA-256 of :meth:`meaning`."""
        return hashlib.sha256(json.dumps(self.meaning(), sort_keys=True).encode()).hexdigest()

    def check_same_meaning(self, stored: StudySpec) -> None:
        """Refuse to go on with a stored study under a file that means something else.

        Raises:
            StudyMismatchError: naming the first field that differs.
        """
        old, new = dict(_flatten(stored.meaning())), dict(_flatten(self.meaning()))
        for key in sorted(old.keys() | new.keys()):
            if old.get(key) != new.get(key):
                raise StudyMismatchError(
                    f"study {self.name!r} was made with {key} = {json.dumps(old.get(key))}, the file now says "
                    f"{json.dumps(new.get(key))}; give the file a new name or restore the value"
                )


class StudyFile(BaseModel):
    """A study file with the folder that its relative paths start from."""

    model_config = ConfigDict(frozen=True)

    spec: StudySpec
    folder: Path

    @property
    def work_dir(self) -> Path:
        """The study's working folder."""
        return self.folder / self.spec.run.work_dir

    @property
    def default_storage(self) -> str:
        """SQLite file beside the working folder."""
        return f"sqlite:///{(self.folder / self.spec.name).resolve()}.db"


def load_study_file(path: Path | str) -> StudyFile:
    """Read and check a study file.

    Raises:
        StudyFileError: missing, not TOML, or against the schema; one line that names the field.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise StudyFileError(f"study file {path}: {reason}") from None
    try:
        tables = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # a whole number of thousands of digits is a plain ValueError
        raise StudyFileError(f"study file {path} is not valid TOML: {error}") from None
    return StudyFile(spec=parse_study(tables, where=f"study file {path}"), folder=path.parent)


def parse_study(tables: dict[str, Any], *, where: str, stored: bool = False) -> StudySpec:
    """Check the tables of a study file, or of one that was ``stored`` by this version or an earlier one.

    Raises:
        StudyFileError: one line that names the first field against the schema.
    """

    def refuse_date(value: object) -> None:
        raise StudyFileError(f"{where}: no key takes a date or time, as {value} is; put text in quotes")

    try:
        text = json.dumps(as_meant(tables) if stored else tables, default=refuse_date)
        return StudySpec.model_validate_json(text, context=STORED if stored else None)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in first["loc"])
        if field.startswith("targets.frozen."):  # followed by the pattern, and by which of two types it is not
            told = f"{first['loc'][2]!r} {tables['targets']['frozen'][first['loc'][2]]!r}"
            told += '; give it a rank from 1 on, or "dense"'
            raise StudyFileError(f"{where}: targets.frozen gives {told}") from None
        if first["type"] == "extra_forbidden":
            raise StudyFileError(f"{where}: unknown key {field!r}{_nearest(first['loc'])}") from None
        message = first["msg"].removeprefix("Value error, ")
        given = "" if first["type"] in {"missing", "value_error"} else f", not {first['input']!r}"
        raise StudyFileError(f"{where}: {field + ': ' if field else ''}{message}{given}") from None


def _nearest(location: tuple[int | str, ...]) -> str:
    table: type[BaseModel] = StudySpec
    for part in location[:-1]:
        annotation = table.model_fields[str(part)].annotation
        assert isinstance(annotation, type)
        table = annotation
    names = list(table.model_fields)
    close = difflib.get_close_matches(str(location[-1]), names, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known keys are {', '.join(names)}"


def _flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flatten(inner, f"{prefix}.{key}" if prefix else key)
    else:
        yield prefix, value
