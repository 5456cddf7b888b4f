"""What a sampler of the project's own goes by: the newest measured trials and the first ones, the front, and what is
being measured. Read from the project's own tables, which hold whole rank maps in one column. No Optuna."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from sqlalchemy import Engine, select
from sqlalchemy.orm import Session

from rank_search.ranks import RankMap
from rank_search.study.bounded import thinned
from rank_search.study.engine import READ_ONLY, translated
from rank_search.study.records import State
from rank_search.study.stored import rank_map_of
from rank_search.study.tables import FrontRow, StudyRow, TrialRow

NEWEST = 128
"""So many of the newest trials that are complete, feasible or not, ..."""
OLDEST = 32
"""... so many of the first ones, which are farthest from the closed form and tell most for that, ..."""
BEST = 128
"""... and so many points of the front."""
RUNNING = 256
"""So many of the newest running trials. What is beyond them may be proposed twice, and then is skipped; to read the
rank maps of a thousand workers before every trial would be most of what a database does."""


@dataclass(frozen=True, slots=True)
class Tried:
    """A rank map that was measured, or is being measured.

    Attributes:
        number: of its trial.
        loss: of the highest fidelity, nats per token; None of a running trial.
        kept: kept fraction of the target layers; None of a running trial.
    """

    number: int
    rank_map: RankMap
    loss: float | None
    kept: float | None


class Evidence:
    """Reads it, each rank map once; bounded, so that a proposal costs the same however many trials a study has.

    Args:
        engine: of a database that has the project's tables.
        name: of the study.
    """

    def __init__(self, engine: Engine, name: str) -> None:
        self._engine = engine.execution_options(**READ_ONLY)
        self._rank_maps: dict[int, RankMap] = {}
        # Made once, for to make a statement takes about as long as to execute it.
        self._mine = TrialRow.study_id == select(StudyRow.id).where(StudyRow.name == name).scalar_subquery()
        columns = select(TrialRow.number, TrialRow.loss, TrialRow.kept_of_targets).where(self._mine)
        complete = columns.where(TrialRow.state.in_([State.COMPLETE, State.INFEASIBLE]))
        oldest = complete.order_by(TrialRow.number).limit(OLDEST)
        newest = complete.order_by(TrialRow.number.desc()).limit(NEWEST)
        running = columns.where(TrialRow.state == State.RUNNING).order_by(TrialRow.number.desc()).limit(RUNNING)
        self._queries = oldest, newest, running
        front = select(FrontRow.trial, FrontRow.loss, FrontRow.kept_of_targets).where(FrontRow.study == name)
        self._front = front.order_by(FrontRow.num_params)

    def read(self) -> list[Tried]:
        """Complete trials, :data:`BEST` of the front, the :data:`OLDEST` and the :data:`NEWEST`, and :data:`RUNNING`
        ones, by number.

        Raises:
            StorageError: the database cannot be reached or is damaged.
        """
        with translated(self._engine.url), Session(self._engine) as session:
            best = thinned(session.execute(self._front).all(), BEST)
            found: dict[int, tuple[float | None, float | None]] = {number: (loss, kept) for number, loss, kept in best}
            for query in self._queries:
                found |= {number: (loss, kept) for number, loss, kept in session.execute(query)}
            self._read_rank_maps(session, found)
        return [Tried(number, self._rank_maps[number], *found[number]) for number in sorted(found)]

    def _read_rank_maps(self, session: Session, numbers: Iterable[int]) -> None:
        wanted = [number for number in numbers if number not in self._rank_maps]
        if wanted:
            query = select(TrialRow.number, TrialRow.rank_map).where(self._mine, TrialRow.number.in_(wanted))
            self._rank_maps |= {number: rank_map_of(text) for number, text in session.execute(query)}
