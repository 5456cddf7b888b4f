"""The service from Python: the same nouns as the library, over HTTP.

::

    with rs.Client("http://127.0.0.1:8000", token) as client:
        study = client.submit("study.toml")
        for event in study.events():
            ...
        study.rank_map(knee=True).write("rank_map.json", folder=".")
        study.apply(trial=12).wait().download("compressed")

Needs the extra ``client``; torch and databases are not loaded.
"""

from __future__ import annotations

import json
import tarfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, Literal, Self, TypeVar, cast

from rank_search.errors import InputError, ServiceError, one_line
from rank_search.export.rank_map_file import RankMapFile
from rank_search.spec import StudyFile, StudySpec, load_study_file

if TYPE_CHECKING:
    import httpx2
    from pydantic import BaseModel

    from rank_search.service import models

    Answer = TypeVar("Answer", bound=BaseModel)

Kind = Literal["study", "front", "points", "trials", "workers"]
"""Kinds of events."""

_PAGE = 1000
_PIECE = 2**18


@dataclass(frozen=True, slots=True)
class Event:
    """What a study's events tell.

    Attributes:
        kind: ``study``, ``front``, ``points``, ``trials`` or ``workers``.
        data: as :class:`StudyDetail` without its file, :class:`Front`, and lists of :class:`Trial` and :class:`Worker`
            of :mod:`rank_search.service.models` have it; of ``points`` the points ``added`` to the front, and the
            trials ``removed`` from it.
    """

    kind: Kind
    data: Any


class Client:
    """A service; usable as a context manager.

    Every method raises :class:`ServiceError` where the service refuses a request, with its one line, or cannot be
    reached.

    Args:
        url: where it is.
        token: from ``rank-search token create``; None where the service asks for none.
        timeout: seconds without an answer.

    Raises:
        InputError: httpx2 is missing, or the URL is none.
    """

    def __init__(self, url: str, token: str | None = None, *, timeout: float = 30.0) -> None:
        try:
            import httpx2
        except ModuleNotFoundError as error:
            raise InputError(f"the client needs {error.name}; pip install 'rank-search[client]'") from None
        if not url.startswith(("http://", "https://")):
            raise InputError(f"the service's URL begins with http:// or https://, unlike {url!r}")
        headers = {} if token is None else {"authorization": f"Bearer {token}"}
        self._http = httpx2.Client(base_url=url.rstrip("/"), headers=headers, timeout=timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close all connections."""
        self._http.close()

    def studies(self) -> list[models.Study]:
        """All studies, and how far they are."""
        from rank_search.service.models import Studies

        return self._read(Studies, "/v1/studies").studies

    def study(self, name: str) -> RemoteStudy:
        """A study by its name; asks nothing yet."""
        return RemoteStudy(self, name)

    def submit(self, study: StudyFile | StudySpec | Mapping[str, Any] | Path | str) -> RemoteStudy:
        """Have the service take a study on.

        Paths in it are the service's own: absolute, in one of the folders it is open to.

        Args:
            study: its file, or what is in it.

        Raises:
            StudyFileError: the file is missing or malformed.
        """
        if isinstance(study, Path | str):
            study = load_study_file(study)
        if isinstance(study, StudyFile):
            study = study.spec
        tables = study.model_dump(mode="json", exclude_none=True) if isinstance(study, StudySpec) else dict(study)
        told = self._ask("POST", "/v1/studies", json=tables).json()
        return RemoteStudy(self, told["name"])

    def jobs(self, study: str | None = None) -> list[models.Job]:
        """All jobs, or those of one study."""
        from rank_search.service.models import Jobs

        return self._read(Jobs, "/v1/jobs", **({} if study is None else {"study": study})).jobs

    def job(self, number: int) -> RemoteJob:
        """A job by its number; asks nothing yet."""
        return RemoteJob(self, number)

    def _read(self, kind: type[Answer], path: str, **query: Any) -> Answer:
        return kind.model_validate_json(self._ask("GET", path, params=query).content)

    def _ask(self, method: str, path: str, **arguments: Any) -> httpx2.Response:
        import httpx2

        try:
            answer = self._http.request(method, path, **arguments)
        except httpx2.HTTPError as error:
            raise self._unreachable(error) from None
        _check(answer)
        return answer

    @contextmanager
    def _stream(self, path: str) -> Iterator[httpx2.Response]:
        import httpx2

        try:
            with self._http.stream("GET", path) as answer:
                if answer.is_error:
                    answer.read()
                _check(answer)
                yield answer
        except httpx2.HTTPError as error:
            raise self._unreachable(error) from None

    def _unreachable(self, error: Exception) -> ServiceError:
        return ServiceError(f"service {self._http.base_url}: {one_line(error)}; is it running, and is this its URL?")


@dataclass(frozen=True, slots=True)
class RemoteStudy:
    """A study of a service."""

    client: Client
    name: str

    def status(self) -> models.StudyDetail:
        """How far it is, with its file."""
        from rank_search.service.models import StudyDetail

        return self.client._read(StudyDetail, self._path())

    def trials(self, after: int = -1) -> Iterator[models.Trial]:
        """Its trials by ascending number, those above ``after``, without their rank maps."""
        from rank_search.service.models import Trials

        following: int | None = after
        while following is not None:
            page = self.client._read(Trials, self._path("trials"), after=following, limit=_PAGE)
            yield from page.trials
            following = page.next

    def front(self) -> models.Front:
        """Its front; a notebook shows a table."""
        from rank_search.service.models import Front

        return self.client._read(Front, self._path("front"))

    def front_csv(self) -> str:
        """Its front as CSV."""
        return self.client._ask("GET", self._path("front.csv")).text

    def front_png(self) -> bytes:
        """A picture of its front."""
        return self.client._ask("GET", self._path("front.png")).content

    def layers(self) -> list[models.Layer]:
        """Its target layers, and the ranks they may have."""
        from rank_search.service.models import Layers

        return self.client._read(Layers, self._path("layers")).layers

    def workers(self) -> list[models.Worker]:
        """Its workers, the one that was busy last first."""
        from rank_search.service.models import Workers

        return self.client._read(Workers, self._path("workers")).workers

    def rank_map(
        self, *, trial: int | None = None, kept: float | None = None, max_params: int | None = None,
        max_loss: float | None = None, knee: bool = False,
    ) -> RankMapFile:  # fmt: skip
        """The rank map file of one trial, chosen as :func:`rank_search.export` does."""
        choices = {"trial": trial, "kept": kept, "max_params": max_params, "max_loss": max_loss, "knee": knee or None}
        query = {name: value for name, value in choices.items() if value is not None}
        return self.client._read(RankMapFile, self._path("rank-map"), **query)

    def events(self) -> Iterator[Event]:
        """What happens, from all there is now on, without end; leave the loop when it is enough."""
        with self.client._stream(self._path("events")) as answer:
            kind = ""
            for line in answer.iter_lines():
                name, _, value = line.partition(": ")
                if name == "event":
                    kind = value
                elif name == "data":
                    yield Event(cast(Kind, kind), json.loads(value))

    def pause(self) -> None:
        """Have workers propose nothing new until it is resumed."""
        self.client._ask("POST", self._path("pause"))

    def resume(self) -> None:
        """Have it go on after a pause, a stop or a failure."""
        self.client._ask("POST", self._path("resume"))

    def stop(self) -> None:
        """Have workers end after the trials under way."""
        self.client._ask("POST", self._path("stop"))

    def queue(self, rank_map: Mapping[str, int]) -> str:
        """Have a rank map measured before anything new, and return the source of the trial that it becomes."""
        answer = self.client._ask("POST", self._path("rank-maps"), json={"ranks": dict(rank_map)})
        return str(answer.json()["source"])

    def apply(
        self, trial: int, *, finetune: bool = True, form: Literal["factored", "dense"] = "factored",
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    ) -> RemoteJob:  # fmt: skip
        """Have the checkpoint of a trial's rank map written."""
        return self._job({"kind": "apply", "trial": trial, "finetune": finetune, "form": form, "dtype": dtype})

    def confirm(
        self, trial: int, steps: int, *, form: Literal["factored", "dense"] = "factored",
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    ) -> RemoteJob:  # fmt: skip
        """Have a trial's rank map fine-tuned for so many steps, written, and scored on the test text, too."""
        return self._job({"kind": "confirm", "trial": trial, "steps": steps, "form": form, "dtype": dtype})

    def _job(self, body: dict[str, Any]) -> RemoteJob:
        answer = self.client._ask("POST", "/v1/jobs", json={**body, "study": self.name})
        return RemoteJob(self.client, int(answer.json()["number"]))

    def _path(self, *parts: str) -> str:
        from urllib.parse import quote

        return "/".join(["/v1/studies", quote(self.name, safe=""), *parts])

    def _repr_html_(self) -> str:
        """What a notebook shows: the front."""
        return self.front()._repr_html_()


@dataclass(frozen=True, slots=True)
class RemoteJob:
    """A job of a service."""

    client: Client
    number: int

    def status(self) -> models.Job:
        """How far it is."""
        from rank_search.service.models import Job

        return self.client._read(Job, f"/v1/jobs/{self.number}")

    def wait(self, timeout: float | None = None, every: float = 1.0) -> RemoteJob:
        """Wait until it is done.

        Args:
            timeout: seconds, None: as long as it takes.

        Raises:
            ServiceError: it failed or was cancelled, or the time is over.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while (told := self.status()).state not in {"done", "failed", "cancelled"}:
            if deadline is not None and time.monotonic() >= deadline:
                raise ServiceError(f"job {self.number} is still {told.state} after {timeout:g} s; wait again")
            time.sleep(every)
        if told.state != "done":
            raise ServiceError(f"job {self.number} {told.state}: {told.reason or 'before a worker began it'}")
        return self

    def cancel(self) -> None:
        """Cancel it, if no worker has begun it."""
        self.client._ask("DELETE", f"/v1/jobs/{self.number}")

    def download(self, out: Path | str) -> Path:
        """Write its checkpoint into a folder, which appears whole or not at all, and return that.

        Raises:
            CheckpointError: the folder is in the way or cannot be written.
        """
        from rank_search.compress.folder import check_free

        out = Path(out)
        check_free(out)
        with self.client._stream(f"/v1/jobs/{self.number}/checkpoint") as answer:
            _unpack(answer.iter_bytes(_PIECE), out)
        return out


def _check(answer: httpx2.Response) -> None:
    if not answer.is_error:
        return
    try:
        reason = str(answer.json()["error"])
    except (ValueError, KeyError, TypeError):
        reason = f"answered with {answer.status_code}; is this the URL of a rank-search service?"
    raise ServiceError(reason, answer.status_code)


def _unpack(pieces: Iterator[bytes], out: Path) -> None:
    import tempfile

    from rank_search.errors import CheckpointError

    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as scratch:
            with tarfile.open(fileobj=cast(IO[bytes], _Pieces(pieces)), mode="r|") as tar:
                tar.extractall(scratch, filter="data")
            (top,) = Path(scratch).iterdir()
            if out.exists():
                out.rmdir()
            top.replace(out)
    except (OSError, tarfile.TarError, ValueError) as error:
        raise CheckpointError(f"checkpoint {out} cannot be written: {one_line(error)}; try again") from None


class _Pieces:
    """Pieces as a file that is read from its beginning to its end."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self._rest = b""

    def read(self, size: int) -> bytes:
        while len(self._rest) < size and (piece := next(self._pieces, b"")):
            self._rest += piece
        found, self._rest = self._rest[:size], self._rest[size:]
        return found
