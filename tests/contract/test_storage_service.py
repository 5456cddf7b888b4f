"""What the service keeps in the database: submitted studies, requests, queued rank maps, jobs, tokens."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sqlalchemy import update

from rank_search.errors import ConflictError, InputError, RankMapError
from rank_search.launch import exits
from rank_search.launch.job_worker import do_jobs
from rank_search.progress import SILENT, Preempted, Progress
from rank_search.ranks import RankMap
from rank_search.study import jobs
from rank_search.study.heeding import PAUSED, STOPPED, Heeding
from rank_search.study.jobs import MAX_ATTEMPTS, MOST_OPEN, JobState
from rank_search.study.listing import front_outline, mark_of, study_lines, trial_summaries
from rank_search.study.liveness import WorkerId
from rank_search.study.requests import Action, ask_for, asked_for, queue_rank_map, queued_rank_maps
from rank_search.study.store import StudyStore
from rank_search.study.submissions import Fate, count_of_studies, resume, set_fate, submission, submissions, submit
from rank_search.study.tables import JobRow
from rank_search.study.tokens import Role, check_token, create_token, has_tokens, revoke_token, tokens
from tests.contract.synthetic import make_spec, measure, open_study, run_trials

ELSEWHERE = "elsewhere:1:x"
"""A worker on another host, of which nothing is known."""


@pytest.fixture
def store(storage: str) -> Iterator[StudyStore]:
    with StudyStore(storage) as opened:
        yield opened


def test_a_study_is_taken_on_once(store: StudyStore) -> None:
    spec = make_spec("new")
    with ThreadPoolExecutor(4) as pool:
        taken = list(pool.map(lambda _: _taken_on(store, "new"), range(4)))
    assert sorted(taken) == [False, False, False, True]
    found = submission(store.engine, "new")
    assert found is not None
    assert (found.spec, found.asked_by, found.fate) == (spec, "me", Fate.OPEN)
    assert asked_for(store.engine, "new") is Action.RUN


def _taken_on(store: StudyStore, name: str) -> bool:
    try:
        submit(store.engine, make_spec(name), "me", most=10)
    except ConflictError:
        return False
    return True


def test_studies_that_came_another_way_count_too(storage: str, store: StudyStore) -> None:
    open_study(storage).close()
    with pytest.raises(ConflictError, match="there is a study 'tiny' already"):
        submit(store.engine, make_spec("tiny"), "me", most=10)
    with pytest.raises(ConflictError, match="no more than 1"):
        submit(store.engine, make_spec("other"), "me", most=1)
    assert submissions(store.engine) == []
    submit(store.engine, make_spec("other"), "me", most=2)
    assert count_of_studies(store.engine) == 2


def test_resuming_opens_a_submission_again(store: StudyStore) -> None:
    number = submit(store.engine, make_spec("new"), "me", most=10).number
    set_fate(store.engine, number, Fate.GIVEN_UP, "no GPU")
    ask_for(store.engine, "new", Action.STOP, "me")
    resume(store.engine, "new", "you")
    found = submission(store.engine, "new")
    assert found is not None
    assert (found.fate, found.reason, asked_for(store.engine, "new")) == (Fate.OPEN, None, Action.RUN)


def test_several_may_be_the_first_to_ask_something_of_a_study(store: StudyStore) -> None:
    for number in range(10):
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda action: ask_for(store.engine, f"study{number}", action, "me"), [*Action, Action.STOP]))  # noqa: B023
        assert asked_for(store.engine, f"study{number}") in Action


def test_workers_heed_what_is_asked_between_trials(storage: str, store: StudyStore) -> None:
    study = open_study(storage, ladder=[0.5], sampler="random")
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 3:
            ask_for(store.engine, "tiny", Action.RUN, "me")

    heeding = Heeding(study, SILENT, sleep=sleep)
    assert heeding.stop_reason() is None
    ask_for(store.engine, "tiny", Action.PAUSE, "me")
    before = heeding.now()
    assert heeding.stop_reason() is None  # it waited until the study was resumed
    assert len(slept) == 3
    assert heeding.now() < before  # and its clock stood still
    ask_for(store.engine, "tiny", Action.PAUSE, "me")
    assert Heeding(study, SILENT, patience=2.0, sleep=lambda _: None).stop_reason() == PAUSED

    class Asked(Progress):
        def seconds_left(self) -> float | None:
            return 30.0

    with pytest.raises(Preempted):  # a signal in a pause: no trial needs the grace time
        Heeding(study, Asked()).stop_reason()
    ask_for(store.engine, "tiny", Action.STOP, "me")
    assert heeding.stop_reason() == STOPPED
    study.close()


def test_a_queued_rank_map_is_measured_once_and_before_anything_new(storage: str, store: StudyStore) -> None:
    study = open_study(storage, ladder=[0.5], sampler="random")
    run_trials(study, 3)
    wanted = RankMap({"block.0.attn": 2, "block.1.mlp": 7})
    queued = queue_rank_map(store.engine, "tiny", wanted, "me")
    assert [one.rank_map for one in queued_rank_maps(store.engine, "tiny")] == [wanted]
    study.take_requests()
    study.take_requests()
    assert queued_rank_maps(store.engine, "tiny") == []
    proposals = [study.ask(), study.ask()]
    assert [(one.source, one.rank_map) for one in proposals if one.source == queued.source] == [(queued.source, wanted)]
    assert proposals[0].source == queued.source
    study.tell(proposals[0], measure(wanted))
    study.close()
    trial = store.trial("tiny", proposals[0].number)
    assert trial is not None
    assert trial.rank_map == wanted


def test_a_rank_map_that_was_taken_but_not_marked_is_not_measured_twice(storage: str, store: StudyStore) -> None:
    """A worker that dies between the two."""
    study = open_study(storage, ladder=[0.5], sampler="random")
    queued = queue_rank_map(store.engine, "tiny", RankMap({"block.0.attn": 2}), "me")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rank_search.study.study.mark_taken", lambda *_: None)
        study.take_requests()
    study.take_requests()
    sources = [study.ask().source for _ in range(5)]
    assert sources.count(queued.source) == 1
    study.close()


def test_a_rank_map_that_a_study_could_not_propose_is_refused(storage: str, store: StudyStore) -> None:
    open_study(storage).close()
    for ranks, told in (({"x": 1}, "x is not a target layer"), ({"block.0.attn": 9}, "block.0.attn has rank 9")):
        with pytest.raises(RankMapError, match=told):
            queue_rank_map(store.engine, "tiny", RankMap(ranks), "me")
    assert queued_rank_maps(store.engine, "tiny") == []


def _job(store: StudyStore, folder: Path) -> jobs.Job:
    return jobs.add_job(store.engine, "tiny", 0, "apply", {"dtype": "float32"}, folder, "me")


def test_a_job_is_claimed_once_renewed_and_done(storage: str, store: StudyStore, tmp_path: Path) -> None:
    open_study(storage).close()
    added = [_job(store, tmp_path) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        claimed = list(pool.map(lambda _: jobs.claim_job(store.engine, str(WorkerId.current())), range(5)))
    numbers = sorted(job.number for job in claimed if job is not None)
    assert numbers == [job.number for job in added]
    first = next(job for job in claimed if job is not None and job.number == numbers[0])
    assert first.folder == tmp_path / str(first.number)
    assert jobs.renew_job(store.engine, first)
    assert jobs.finish_job(store.engine, first, {"validation": {"loss": 1.5}})
    done = jobs.job(store.engine, first.number)
    assert done is not None
    assert (done.state, done.result, done.options) == (
        JobState.DONE,
        {"validation": {"loss": 1.5}},
        {"dtype": "float32"},
    )
    assert not jobs.cancel_job(store.engine, first.number)


def test_a_job_whose_worker_is_gone_goes_to_another_and_only_that_ones_result_counts(
    storage: str, store: StudyStore, tmp_path: Path
) -> None:
    open_study(storage).close()
    number = _job(store, tmp_path).number
    lost = jobs.claim_job(store.engine, ELSEWHERE)
    assert lost is not None
    assert jobs.claim_job(store.engine, ELSEWHERE) is None
    assert jobs.waiting_jobs(store.engine) == 0
    _age(store, number)
    assert jobs.waiting_jobs(store.engine) == 1
    other = jobs.claim_job(store.engine, ELSEWHERE)
    assert other is not None
    assert (other.attempt, other.checkpoint == lost.checkpoint) == (2, False)
    assert not jobs.renew_job(store.engine, lost)
    assert not jobs.finish_job(store.engine, lost, {})
    assert not jobs.fail_job(store.engine, lost, "late")
    assert jobs.finish_job(store.engine, other, {"validation": {}})


def test_a_job_of_a_dead_process_of_this_host_is_claimed_at_once(
    storage: str, store: StudyStore, tmp_path: Path
) -> None:
    open_study(storage).close()
    _job(store, tmp_path)
    here = WorkerId.current()
    dead = f"{here.host}:{2**22 + 1}:{here.token}"  # above the largest process id
    assert jobs.claim_job(store.engine, dead) is not None
    assert jobs.claim_job(store.engine, ELSEWHERE) is not None


def test_a_job_that_kills_its_workers_fails(storage: str, store: StudyStore, tmp_path: Path) -> None:
    open_study(storage).close()
    number = _job(store, tmp_path).number
    for _ in range(MAX_ATTEMPTS):
        assert jobs.claim_job(store.engine, ELSEWHERE) is not None
        _age(store, number)
    assert jobs.claim_job(store.engine, ELSEWHERE) is None
    failed = jobs.job(store.engine, number)
    assert failed is not None
    assert failed.state is JobState.FAILED
    assert f"died {MAX_ATTEMPTS} times" in (failed.reason or "")


def test_a_job_that_was_given_back_has_all_its_attempts_left(storage: str, store: StudyStore, tmp_path: Path) -> None:
    open_study(storage).close()
    _job(store, tmp_path)
    for _ in range(MAX_ATTEMPTS + 2):
        claimed = jobs.claim_job(store.engine, ELSEWHERE)
        assert claimed is not None
        assert claimed.attempt == 1
        assert jobs.give_back_job(store.engine, claimed)


def test_a_job_over_which_a_defect_shows_fails_and_does_not_stand_before_the_others(
    storage: str, store: StudyStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_study(storage, ladder=[0.5]).close()
    for trial in (0, 1):
        jobs.add_job(store.engine, "tiny", trial, "apply", {}, tmp_path, "me")

    def result(_store: StudyStore, _storage: str, claimed: jobs.Job, _progress: Progress) -> dict[str, float]:
        if claimed.trial == 0:
            raise RuntimeError("out of\nmemory")
        return {}

    monkeypatch.setattr("rank_search.launch.job_worker._result", result)
    with pytest.raises(RuntimeError):
        do_jobs(storage)
    assert do_jobs(storage) == exits.DONE
    first, second = jobs.jobs(store.engine, "tiny")
    assert (first.state, first.reason) == (JobState.FAILED, "RuntimeError: out of memory")
    assert second.state is JobState.DONE


def test_a_job_of_a_preempted_worker_is_given_back(
    storage: str, store: StudyStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_study(storage, ladder=[0.5]).close()
    jobs.add_job(store.engine, "tiny", 0, "apply", {}, tmp_path, "me")

    def preempted(*_: object) -> None:
        raise Preempted

    monkeypatch.setattr("rank_search.launch.job_worker._result", preempted)
    assert do_jobs(storage) == exits.PREEMPTED
    (job,) = jobs.jobs(store.engine, "tiny")
    assert (job.state, job.attempt) == (JobState.WAITING, 0)


def test_no_more_jobs_wait_than_allowed(
    storage: str, store: StudyStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_study(storage).close()
    assert MOST_OPEN >= 10
    monkeypatch.setattr(jobs, "MOST_OPEN", 2)
    numbers = [_job(store, tmp_path).number for _ in range(2)]
    with pytest.raises(ConflictError, match="2 jobs wait or run"):
        _job(store, tmp_path)
    assert jobs.cancel_job(store.engine, numbers[0])
    _job(store, tmp_path)
    assert len(jobs.jobs(store.engine, "tiny")) == 3
    assert jobs.jobs(store.engine, "other") == []


def _age(store: StudyStore, number: int) -> None:
    """Have a job not renewed for longer than a worker may take."""
    from datetime import timedelta

    with store.engine.begin() as connection:
        before = connection.execute(JobRow.__table__.select().where(JobRow.id == number)).one().renewed
        aged = before - timedelta(seconds=jobs.CLAIM_SECONDS + 5)
        connection.execute(update(JobRow).where(JobRow.id == number).values(renewed=aged))


def test_a_token_is_right_until_it_is_revoked(store: StudyStore) -> None:
    assert not has_tokens(store.engine)
    text = create_token(store.engine, "ci", Role.WRITE)
    found = check_token(store.engine, text)
    assert found is not None
    assert (found.name, found.role) == ("ci", Role.WRITE)
    assert check_token(store.engine, f"{text[:-1]}{'A' if text[-1] != 'A' else 'B'}") is None
    with pytest.raises(ConflictError, match="there is a token 'ci' already"):
        create_token(store.engine, "ci", Role.READ)
    with pytest.raises(InputError, match="a token's name is"):
        create_token(store.engine, "a b\n", Role.READ)
    revoke_token(store.engine, "ci")
    assert check_token(store.engine, text) is None
    assert not has_tokens(store.engine)
    assert [token.revoked is not None for token in tokens(store.engine)] == [True]
    with pytest.raises(InputError, match="there is no token 'no'"):
        revoke_token(store.engine, "no")


def test_a_list_of_studies_tells_what_each_ones_status_tells(storage: str, store: StudyStore) -> None:
    for name in ("a", "b"):
        study = open_study(storage, name, ladder=[0.5], sampler="random")
        run_trials(study, 3)
        study.fail(study.ask(), "cause")
        study.ask()
        study.close()
    for line in study_lines(store.engine):
        status = store.status(line.record.name)
        assert line.record == store.study(line.record.name)
        assert line.front == len(store.front(line.record.name))
        for name in ("finished", "running", "complete", "failed", "best_loss", "wanted", "last_activity", "unit"):
            assert getattr(line.status, name) == getattr(status, name), name
        assert line.status.seconds == pytest.approx(status.seconds)


def test_a_mark_changes_with_every_change_and_only_then(storage: str, store: StudyStore) -> None:
    assert mark_of(store.engine, "tiny") is None
    study = open_study(storage, ladder=[0.5], sampler="random")
    marks = [mark_of(store.engine, "tiny")]
    study.set_dense_loss(2.5)
    marks.append(mark_of(store.engine, "tiny"))
    proposal = study.ask()
    marks.append(mark_of(store.engine, "tiny"))
    study.tell(proposal, measure(proposal.rank_map))
    marks.append(mark_of(store.engine, "tiny"))
    study.fail(study.ask(), "cause")
    marks.append(mark_of(store.engine, "tiny"))
    study.set_stop_reason("enough")
    marks.append(mark_of(store.engine, "tiny"))
    study.close()
    assert len(set(marks)) == len(marks)
    assert mark_of(store.engine, "tiny") == marks[-1]


def test_summaries_of_trials_are_what_is_stored_without_rank_maps(storage: str, store: StudyStore) -> None:
    study = open_study(storage, ladder=[0.5], sampler="random")
    run_trials(study, 4)
    study.close()
    stored = {trial.number: trial for trial in store.trials("tiny")}
    found = trial_summaries(store.engine, "tiny")
    assert [trial.number for trial in found] == sorted(stored)
    for trial in found:
        measured = stored[trial.number].measurement
        assert measured is not None
        assert (trial.loss, trial.fidelity, trial.seconds) == (measured.loss, measured.fidelity.label, measured.seconds)
        assert (trial.started, trial.finished) == (stored[trial.number].started, stored[trial.number].finished)
    assert [trial.number for trial in trial_summaries(store.engine, "tiny", after=1, limit=1)] == [2]
    whole, outline = store.front("tiny"), front_outline(store.engine, "tiny")
    assert [(p.trial, p.source, p.measurement) for p in outline] == [(p.trial, p.source, p.measurement) for p in whole]
