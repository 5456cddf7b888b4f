"""The service over a made-up study, in this process."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
from starlette.testclient import TestClient

from rank_search.service.app import create_app
from rank_search.service.serving import take_port
from rank_search.service.settings import Settings
from rank_search.study.store import StudyStore
from rank_search.study.tokens import Role, create_token, revoke_token
from tests.contract.synthetic import open_study, run_trials

BASE = "http://127.0.0.1:8000"
DENSE_LOSS = 2.9
MEASURED = 8
WANTED = 12


@dataclass(frozen=True)
class Served:
    """A service with two tokens, one more that was revoked, and the study ``tiny``, of which trials are left."""

    client: TestClient
    storage: str
    folder: Path
    root: Path
    read: str
    write: str
    revoked: str

    @property
    def reading(self) -> dict[str, str]:
        """Headers of one who may read."""
        return {"authorization": f"Bearer {self.read}"}

    @property
    def writing(self) -> dict[str, str]:
        """Headers of one who may write."""
        return {"authorization": f"Bearer {self.write}"}


def make_study(storage: str, trials: int = MEASURED) -> None:
    """The study ``tiny`` with some trials."""
    study = open_study(storage, ladder=[0.9, 0.5], sampler="random", trials=WANTED)
    study.set_dense_loss(DENSE_LOSS)
    run_trials(study, trials)
    study.close()


@contextmanager
def served(folder: Path, **settings: Any) -> Iterator[Served]:
    """A service that asks for tokens and hardly limits how often one may ask, over a database in a folder."""
    storage, root = f"sqlite:///{folder}/s.db", folder / "root"
    root.mkdir(exist_ok=True)
    if not (folder / "s.db").exists():
        make_study(storage)
    with StudyStore(storage) as store:
        read, write, revoked = (
            create_token(store.engine, name, role)
            for name, role in (("reader", Role.READ), ("writer", Role.WRITE), ("gone", Role.WRITE))
        )
        revoke_token(store.engine, "gone")
    values: dict[str, Any] = {"auth": True, "roots": (root,), "rate": 1e6, "burst": 10**6, "poll_seconds": 0.1}
    app = create_app(Settings(storage, folder / "service", **{**values, **settings}))
    with TestClient(app, base_url=BASE) as client:
        yield Served(client, storage, folder / "service", root, read, write, revoked)


@contextmanager
def on_port(service: Served) -> Iterator[str]:
    """The service's application on a port of its own, answered by a thread; yields its address."""
    listening = take_port("127.0.0.1", 0)
    config = uvicorn.Config(service.client.app, log_level="error", lifespan="off", ws="none")  # the client began it
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
