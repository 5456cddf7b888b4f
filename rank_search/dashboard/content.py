"""All that is shown of a study, put together."""

from __future__ import annotations

import json
from dataclasses import dataclass

from rank_search.dashboard.artifacts import artifacts
from rank_search.dashboard.figures import SPECTRA, Figure, figures
from rank_search.dashboard.notes import study_note, trial_notes
from rank_search.dashboard.spectra import Spectra, stored_spectra
from rank_search.study.board import Board, optuna_id, stored_figure, write_board
from rank_search.study.overview import Overview, read_overview
from rank_search.study.store import StudyStore


@dataclass(frozen=True, slots=True)
class Content:
    """A study with its figures, by their ids."""

    overview: Overview
    figures: dict[str, Figure]


def read_content(store: StudyStore, name: str, spectra: Spectra | None = None) -> Content:
    """Read a study and draw it; spectra come from ``spectra``, the bank, or what a worker has drawn before.

    Raises:
        StorageError: the database cannot be reached, or lacks the study.
        BankError: the study's bank is damaged.
    """
    overview = read_overview(store, name)
    drawn = figures(overview, spectra or stored_spectra(overview.record))
    if SPECTRA not in drawn and (known := stored_figure(store.engine, name, SPECTRA)):
        drawn[SPECTRA] = json.loads(known)
    return Content(overview, drawn)


def show(store: StudyStore, name: str, spectra: Spectra | None = None) -> int:
    """Write what optuna-dashboard shows of a study, and return how much of it has changed.

    Raises:
        StorageError: the database cannot be reached, or lacks the study.
        BankError: the study's bank is damaged.
    """
    content = read_content(store, name, spectra)
    study_id = optuna_id(store.engine, name)
    drawn = {key: json.dumps(figure, separators=(",", ":"), allow_nan=False) for key, figure in content.figures.items()}
    board = Board(
        note=study_note(content.overview, study_id),
        trial_notes=trial_notes(content.overview),
        figures=drawn,
        artifacts=artifacts(content.overview, study_id),
    )
    return write_board(store.engine, name, board)
