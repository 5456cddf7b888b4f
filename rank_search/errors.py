"""Every exception that rank_search raises on purpose.

::

    RankSearchError                 message is one line: the rule, the value, the way out
    ├── InputError                  something the user gave; nothing was changed; the CLI exits with 2
    │   ├── StudyFileError          study file missing, malformed, or against its schema
    │   ├── ModelError              no such model, unusable format, remote code not allowed
    │   ├── TargetError             a pattern that matches nothing, a layer that cannot be a target
    │   ├── DataError               text missing, too short, or overlapping between splits
    │   ├── MetricError             a metric that cannot be loaded, or does not take what it is given
    │   ├── BudgetError             a kept fraction or parameter budget that cannot be met
    │   ├── RankMapError            a rank map that does not fit its model
    │   ├── DeviceError             a device that was asked for and is not there
    │   ├── CheckpointError         a checkpoint folder that is in the way or cannot be written
    │   ├── StudyMismatchError      a study resumed with a file that means something else
    │   ├── ConflictError           something that does not go with what is there already
    │   └── StorageError            database unreachable, of an unknown version, or without the study
    │       ├── UnavailableError    it may pass by itself: no connection, a full disk
    │       │   └── CrowdedError    a server that has as many connections as it allows
    │       └── LeaseLostError      a trial that another worker has taken over; what came of it is not stored
    ├── OutOfPatienceError          the database stayed unavailable for too long
    ├── DeviceLostError             a GPU that this process cannot use any more
    ├── HostMemoryError             the host has no memory left for this process
    ├── ServiceError                a service that refuses a request or cannot be reached
    ├── DecompositionError          a layer whose factors could not be computed
    ├── BankError                   a factor bank that cannot be written or fetched, or is damaged
    ├── ExhaustedError              a study whose space has no rank map left that was not proposed
    └── TrialError                  one trial failed; the study goes on
        └── NonFiniteLossError      a loss that is NaN or infinite
"""

from __future__ import annotations

_LONGEST_REASON = 300
"""Characters of a library's message that go into one of ours."""


class RankSearchError(Exception):
    """Base class; ``str(error)`` is one line fit for a terminal."""

    exit_code = 2


class InputError(RankSearchError):
    """Something the user gave is wrong, and nothing was changed."""


class StudyFileError(InputError):
    """The study file is missing, malformed or against its schema."""


class ModelError(InputError):
    """The model is missing, in an unusable format, or needs remote code that the study does not allow."""


class TargetError(InputError):
    """A pattern matches no layer, or a layer cannot be a target."""


class DataError(InputError):
    """Text is missing, too short for its blocks, or shared between splits."""


class MetricError(InputError):
    """A metric cannot be loaded, or does not take what it is given."""


class BudgetError(InputError):
    """A kept fraction or parameter budget cannot be met."""


class RankMapError(InputError):
    """A rank map does not fit the model it is applied to."""


class DeviceError(InputError):
    """A device was asked for that is not there."""


class CheckpointError(InputError):
    """A checkpoint folder is in the way, or cannot be written."""


class StudyMismatchError(InputError):
    """A study is resumed with a file that means something else."""


class ConflictError(InputError):
    """What is asked for does not go with what is there already."""


class StorageError(InputError):
    """The database cannot be reached, is of an unknown version, or lacks the study."""


class UnavailableError(StorageError):
    """The database cannot be reached, has no room or is held by another process; that may pass by itself."""


class CrowdedError(UnavailableError):
    """The database server has as many connections as it allows."""


class LeaseLostError(StorageError):
    """A trial was taken from a worker that did not renew its lease; what it measured is not stored."""


class OutOfPatienceError(RankSearchError):
    """The database stayed unavailable for longer than a worker waits."""

    exit_code = 75


class DeviceLostError(RankSearchError):
    """A GPU has failed under this process, which cannot use it any more; another process may."""

    exit_code = 71


class HostMemoryError(RankSearchError):
    """The host has no memory left for this process, or a limit keeps it from it; another process may have more."""

    exit_code = 71


class ServiceError(RankSearchError):
    """A service refuses a request or cannot be reached; ``status`` is HTTP's, where there was an answer."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class DecompositionError(RankSearchError):
    """The factors of a layer could not be computed."""

    def __init__(self, layer: str, reason: str) -> None:
        super().__init__(layer, reason)  # what it is made of, so that it can go from one process to another
        self.layer = layer

    def __str__(self) -> str:
        layer, reason = self.args
        return f"layer {layer}: {reason}"


class BankError(RankSearchError):
    """A factor bank cannot be written or fetched, or is damaged."""


class ExhaustedError(RankSearchError):
    """The study has proposed every rank map that its space seems to have."""


class TrialError(RankSearchError):
    """One trial failed; its reason is stored and the study goes on."""


class NonFiniteLossError(TrialError):
    """A loss is NaN or infinite."""


def one_line(error: BaseException) -> str:
    """A library's message, which may run over many lines, as one; a long one is cut after a word."""
    text = " ".join(str(error).split())
    if len(text) > _LONGEST_REASON:
        cut = text[: _LONGEST_REASON - 2]
        text = f"{cut.rpartition(' ')[0] or cut} …"
    return text or type(error).__name__
