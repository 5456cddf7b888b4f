"""What the dashboard costs a worker, and how it bears a large study.

    python scripts/bench_dashboard.py [--trials 2000] [--seconds 400] [--trial-seconds 2] [--folder DIR] [--json FILE]

A study is filled with trials of made-up losses on the shapes of SmolLM2-135M, as in bench_service.py. Then:

- the worker: trials that sleep for --trial-seconds are added for --seconds, the dashboard kept current between them as
  by every worker. Told are the seconds of writing it before the first trial and later on, the share of the time that
  all of that took, and the mean seconds of a trial with it and without (`plain_trial_s`);
- the pages: `rank-search dashboard` runs as a process of its own while another one adds a trial every second, and
  Debian's Chromium opens the study's page (until all figures are drawn), its note, and a trial (until its rank map is
  there). Told are the seconds until then, and of the answers that a page asks for at first and every few seconds.

--folder keeps the database for the next time.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from _browser import FIGURES, chromium, figure, serving
from _run import run_script
from bench_service import NAME, add_trial, filled, open_study, searching, tell

from rank_search.dashboard.refreshing import Refreshing
from rank_search.study.store import StudyStore

WAIT = 60_000.0
"""Milliseconds after which a page counts as not there."""


def main() -> None:
    args = _arguments()
    with filled(args.folder, args.trials) as (url, _):
        row = {"trials": args.trials, **worker(url, args), **pages(url), "load": round(os.getloadavg()[0], 1)}
    tell(row, args.json)


class Timed(Refreshing):
    """Keeps what every time that the dashboard is written, or another worker's turn, has taken."""

    def __init__(self, storage: str) -> None:
        super().__init__(storage, NAME, on_trouble=print)
        self.seconds: list[float] = []

    def _write(self, *, whose_turn: bool) -> None:
        started = time.perf_counter()
        super()._write(whose_turn=whose_turn)
        self.seconds.append(time.perf_counter() - started)


def worker(url: str, args: argparse.Namespace) -> dict[str, Any]:
    """Trials, with the dashboard kept current between them and without."""
    study, space = open_study(url)
    plain = _trials(lambda number: add_trial(study, space, number), lambda: None, args.seconds / 5, args.trial_seconds)
    with Timed(url) as dashboard:
        dashboard.begin()
        first = dashboard.seconds.pop()
        with_it = _trials(
            lambda number: add_trial(study, space, number), dashboard.after_trial, args.seconds, args.trial_seconds
        )
    study.close()
    return {
        "seconds": round(sum(with_it)), "first_write_s": round(first, 2),
        "write_s": [round(seconds, 2) for seconds in dashboard.seconds],
        "share": round((first + sum(dashboard.seconds)) / (first + sum(with_it)), 4),
        "plain_trial_s": round(statistics.mean(plain), 3), "trial_s": round(statistics.mean(with_it), 3),
    }  # fmt: skip


def _trials(add: Callable[[int], None], after: Callable[[], None], seconds: float, pause: float) -> list[float]:
    """Seconds of trials that are added for so long, each with what comes after it."""
    taken: list[float] = []
    while sum(taken) < seconds:
        started = time.perf_counter()
        time.sleep(pause)
        add(len(taken))
        after()
        taken.append(time.perf_counter() - started)
    return taken


def pages(url: str) -> dict[str, Any]:
    """Seconds until pages are there, a search running beside."""
    with StudyStore(url) as store:
        trial = store.front(NAME).knee().trial
    started = time.perf_counter()
    with searching(url), serving("dashboard", NAME, "--storage", url) as address, chromium() as browser:
        ready = time.perf_counter() - started
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        page.set_default_timeout(WAIT)
        detail = f"{address.partition('/dashboard')[0]}/api/studies/1"
        size = [0]

        def ask(path: str) -> None:
            with urllib.request.urlopen(path) as answer:
                size[0] = len(answer.read())

        def study() -> None:
            page.goto(address)
            for title in FIGURES[:4]:  # there is no factor bank to draw spectra from
                figure(page, title).wait_for()

        def note() -> None:
            page.goto(f"{address}/note")
            page.get_by_text("Best point of the front for a budget").wait_for()

        def of_trial() -> None:
            page.goto(f"{address}/trials?numbers={trial}")
            page.get_by_text("rank_map.json").first.wait_for()

        told = {"start_s": round(ready, 1), "study_page_s": _seconds(study), "note_s": _seconds(note)}
        told |= {"trial_page_s": _seconds(of_trial)}
        told |= {"answer_s": _seconds(lambda: ask(detail)), "answer_mb": round(size[0] / 2**20, 2)}
        later = f"{detail}?after={10**6}"  # as a page asks that knows all trials
        told |= {"later_answer_s": _seconds(lambda: ask(later)), "later_answer_mb": round(size[0] / 2**20, 2)}
    return told


def _seconds(call: Callable[[], None]) -> float:
    """Seconds of the middle one of three calls."""
    taken = []
    for _ in range(3):
        started = time.perf_counter()
        call()
        taken.append(time.perf_counter() - started)
    return round(statistics.median(taken), 2)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=2000)
    parser.add_argument("--seconds", type=float, default=400.0)
    parser.add_argument("--trial-seconds", type=float, default=2.0)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    run_script(main)
