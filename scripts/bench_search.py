"""Ways to search rank maps, by the hypervolume of their confirmed fronts against GPU-seconds, over seeds.

    python scripts/bench_search.py STUDY.toml --rows ROWS.jsonl
        [--competitors study,ladder] [--seeds 0,1,2] | [--runs ladder@0,study@0,study@1]
        [--gpu-seconds 600] [--steps 100] [--score-blocks 64] [--confirm-blocks 64] [--piece-seconds 450]
        [--json FILE] [--plot FILE]
    python scripts/bench_search.py --merge ROWS.jsonl|FOLDER ... [--json FILE] [--plot FILE]

Competitors:

    svd-tpe, svd-nsga2     Optuna as written in an afternoon: one whole number a layer, default samplers, and plain SVD
                           made in every trial
    bank-tpe, bank-nsga2   the same on the study's factor bank
    bolaco                 kept fractions of five layer types by a Gaussian process, at one budget after the other
    evolution              in the form of EvoPress, at the budgets of the study's ladder
    ladder                 the closed form alone, at more and more budgets
    nested-ladder          the closed form alone, sliced from nested fine-tunes
    study                  the study file as it is; `study:sampler=mutation:space=direct` changes keys of its [search],
                           and `study:finetune.mode=own` fine-tunes every trial, `=nested` slices from nested fine-tunes

Whatever is not sliced is fine-tuned for --steps. The validation blocks are cut in two: competitors see --score-blocks
of them, and their fronts are compared on --confirm-blocks others: of every front the points that it holds for the best
at --budgets sizes. Models that may be on a front are scored on these as well, while they stand. That costs a competitor
nothing; sampling, storing, fine-tuning, scoring and what it shares with others do: the factor bank before the first
trial, the nested fine-tune of a range of sizes with the first trial in it.
Seeds draw the sampling and the order of the training blocks; nested fine-tunes are those of the study's own seed.
GPU-seconds are those that pass; on a CPU, which other processes may share, they are the processor time of this process.

Every trial is appended to ROWS.jsonl at once. A call ends with the first trial after --piece-seconds, and the same call
goes on from there.
Where --rows is a folder, calls of other competitors or seeds have files of their own in it, so that several may run at
once, and --merge takes the whole folder. On a GPU one fine-tune that nobody counts comes first, for what is compiled;
nested fine-tunes count what is compiled for them.

Sizes for SmolLM2-135M on an H200, where the bank takes 8 s, five nested ranges 43, a trial of 30 steps 2 and a sliced
one 0.15: 120 s a run. One process a GPU with a file of rows each, called again until all runs are done; seconds
of a shared GPU are others. Processes whose idle threads spin slow each other: export GOMP_SPINCOUNT=3000, as the
command line does, and a few OMP_NUM_THREADS.

    python scripts/bench_search.py studies/smollm2-135m-wikitext2/search.toml --rows rows/ --seeds 0 --gpu-seconds 120
        --steps 30 --score-blocks 32 --confirm-blocks 32 [--competitors svd-tpe,bank-tpe,ladder,study]
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

from _bench import environment, evaluator_with, with_work_dir
from _competitors import Competitor, Evolution, FiveTypes, Ladder, PlainOptuna, Told, plain_svd
from _confirming import Confirmation
from _laps import Clock, Laps, Piece, PieceEndedError
from _ranges import Ranges, seconds_of_ranges
from _run import run_script
from _search_rows import Protocol, Record, RecordFile, Run, merged, rank_map_of, report

from rank_search.api import facts_of
from rank_search.baselines.measured import untrained_loss
from rank_search.baselines.methods import Allocations
from rank_search.errors import InputError, NonFiniteLossError
from rank_search.factors.bank import FactorBank, TrialBanks
from rank_search.factors.decompose import Factors
from rank_search.model.garbage import sparing_the_collector
from rank_search.preparing import Prepared, prepare
from rank_search.ranks import RankMap, RankSpace
from rank_search.score import score
from rank_search.spec import StudyFile, StudySpec, load_study_file, parse_study
from rank_search.stop_rules import StopRules
from rank_search.study.optuna_study import quiet
from rank_search.study.records import MEASURED, State
from rank_search.study.store import StudyStore
from rank_search.study.study import Study, given_seeds
from rank_search.task import Examples
from rank_search.trial import Evaluator, Look
from rank_search.worker import Outcome, work

_SEARCHED = 0.9
"""Share of its seconds that a study which climbs may measure for; the rest is sampling and storing."""
SIMPLE = ("svd-tpe", "svd-nsga2", "bank-tpe", "bank-nsga2", "bolaco", "evolution", "ladder", "nested-ladder")


def main() -> None:
    args = _arguments()
    if args.merge:
        report(*merged(_row_files(args.merge)), args.json, args.plot)
        return
    piece = Piece(args.piece_seconds)
    bench = Bench(load_study_file(args.study), args)
    with quiet():
        for run in args.runs:
            bench.go_on(run, piece)
    report(bench.file.records, bench.protocol, args.json, args.plot)
    left = [f"{name} {seed}" for name, seed in args.runs if not bench.is_done((name, seed))]
    print(f"not done yet: {', '.join(left)}; run again" if left else "all runs are done")


class Bench:
    """A prepared study, its validation blocks cut in two, and the file of records."""

    def __init__(self, study: StudyFile, args: argparse.Namespace) -> None:
        self._args = args
        self._study = study
        self._is_warm = False
        self._nested: Prepared | None = None
        prepared = prepare(study, nested=False)
        if prepared.splits.folds:
            raise InputError("validation.folds leaves no validation blocks to compare on; leave it out")
        validation, seen, unseen = prepared.splits.validation, args.score_blocks, args.confirm_blocks
        if seen + unseen > len(validation):
            raise InputError(
                f"--score-blocks {seen} and --confirm-blocks {unseen} exceed the study's {len(validation)} validation "
                "blocks; lower one"
            )
        self._clock = time.process_time if prepared.device.type == "cpu" else time.perf_counter
        self._prepared = _seeing(prepared, seen)
        task = prepared.loaded.task
        self._unseen = Examples.of(task, validation[seen : seen + unseen].columns).to(prepared.device)
        self._calibration = Examples.of(task, prepared.splits.calibration.columns).to(prepared.device)
        space, search = prepared.space, study.spec.search
        dense = score(prepared.model, self._unseen, batch_blocks=study.spec.run.score_batch_blocks)
        self.protocol = Protocol(
            study=study.spec.digest[:12], steps=args.steps, score_blocks=seen, confirm_blocks=unseen,
            gpu_seconds=args.gpu_seconds, budgets=args.budgets,
            dense_loss=round(dense.loss, 6), reference_rise=args.reference_rise,
            dense_params=space.model_params, least_params=_params_at(space, search.min_kept),
            most_params=_params_at(space, search.max_kept),
        )  # fmt: skip
        self._rows = _rows_file(args)
        self.file = RecordFile(self._rows, self.protocol, environment(prepared.device))
        if not self.file.preparation():
            with tempfile.TemporaryDirectory() as folder:  # where nothing is found, but all is made
                self.file.add({"preparation": {"bank": _seconds_of_bank(Path(folder), study, self._clock)}})

    def is_done(self, run: Run) -> bool:
        """A run has had its GPU-seconds, or its study has stopped by itself."""
        trials = self.file.trials(run)
        return self.file.has_ended(run) or bool(trials and trials[-1]["gpu_seconds"] >= self.protocol.gpu_seconds)

    def go_on(self, run: Run, piece: Piece) -> None:
        """Search until all is done or the piece's time is over."""
        if self.is_done(run) or piece.is_over():
            return
        self._warm_up()
        search = self._search_simple if run[0] in SIMPLE else self._search_study
        search(run, piece)

    def _warm_up(self) -> None:
        """On a GPU, what the first fine-tune of a process compiles belongs to no competitor."""
        if self._is_warm or self._prepared.device.type == "cpu":
            return
        self._is_warm = True
        first = self._prepared.allocator.closed_form(self._study.spec.search.ladder[0])
        self._tuning(0).measure(first)

    # Competitors that ask and tell

    def _search_simple(self, run: Run, piece: Piece) -> None:
        competitor = self._competitor(run)
        trials = self.file.trials(run)
        competitor.restore([Told(self._rank_map(t), t["loss"], t["num_params"], t["state"]) for t in trials])
        nested = run[0] == "nested-ladder"
        prepared = self._sliced() if nested else self._prepared
        look = self._confirmation(prepared, trials)
        evaluator = Evaluator(prepared, look) if nested else self._tuning(run[1], look)
        ranges = Ranges(self.file, prepared, [self._rank_map(trial) for trial in trials], is_sliced=nested)
        spent = trials[-1]["gpu_seconds"] if trials else self._start(bank=competitor.factors == "bank")
        self._end_if_spent(run, spent)
        number = len(trials)
        with sparing_the_collector() as settle:  # as a study's worker does
            while spent < self.protocol.gpu_seconds and not piece.is_over():
                started = self._clock()
                rank_map = competitor.propose()
                if competitor.factors == "svd":
                    evaluator = self._tuning(run[1], look, svd=True)
                loss = _loss_of(evaluator, rank_map)
                state = competitor.tell(Told(rank_map, loss, prepared.space.num_params(rank_map)))
                confirmed = look.take()
                spent += self._clock() - started - confirmed.seconds + ranges.seconds_of_first(rank_map)
                more = {"state": state, **confirmed.told}
                self._add(run, number, spent, rank_map, loss, "sliced" if nested else "tuned", more)
                number += 1
                piece.count()
                settle()

    def _competitor(self, run: Run) -> Competitor:
        name, seed = run
        allocator, search, args = self._prepared.allocator, self._study.spec.search, self._args
        match name:
            case "svd-tpe" | "bank-tpe":
                return PlainOptuna(allocator, "tpe", seed, "svd" if name.startswith("svd") else "bank")
            case "svd-nsga2" | "bank-nsga2":
                return PlainOptuna(allocator, "nsga2", seed, "svd" if name.startswith("svd") else "bank")
            case "bolaco":
                return FiveTypes(
                    allocator, search, self._untrained, seed, evaluations=args.evaluations, blocks=args.search_blocks
                )
            case "evolution":
                return Evolution(
                    allocator, search, self._untrained, seed, generations=args.generations, offspring=args.offspring,
                    blocks=args.search_blocks,
                )  # fmt: skip
        return Ladder(allocator, search)

    def _untrained(self, rank_map: RankMap, blocks: int) -> float:
        prepared = self._prepared
        loss = untrained_loss(
            prepared.model, prepared.targets, self._factors, self._calibration[:blocks],
            batch_blocks=min(blocks, prepared.spec.run.score_batch_blocks),
        )  # fmt: skip
        return loss(rank_map)

    @cached_property
    def _factors(self) -> Mapping[str, Factors]:
        """The bank's, on the device."""
        return self._prepared.bank.on(self._prepared.device)

    # Studies

    def _search_study(self, run: Run, piece: Piece) -> None:
        spec = self._study_spec(run)
        nested = spec.finetune.mode == "nested"
        made = self._sliced() if nested else self._prepared
        banks = made.trial_banks if nested else TrialBanks.single(made.bank)
        file = StudyFile(spec=spec, folder=self._study.folder)
        prepared = dataclasses.replace(made, study=file, trial_banks=banks)
        trials = self.file.trials(run)
        database = Path(f"{self._rows.resolve().with_suffix('')}.{spec.name}.db")
        if trials and not database.exists():
            raise InputError(
                f"{self._rows} has trials of {run[0]} {run[1]}, whose study {database} is gone; remove them"
            )
        storage = f"sqlite:///{database}"
        _refuse_others(database, spec.name, {trial["trial"] for trial in trials})
        spent = trials[-1]["gpu_seconds"] if trials else self._start(bank=True)
        self._end_if_spent(run, spent)
        ranges = Ranges(self.file, prepared, [self._rank_map(trial) for trial in trials], is_sliced=nested)
        clock = Laps(self._clock, spent, self.protocol.gpu_seconds, piece)
        if clock.is_over():
            return
        clock.start()
        given = {}
        if asked := given_seeds(spec, storage, prepared.allocator):
            rules = Allocations.of(prepared)
            given = {seed: rules.rank_map(seed.allocation, seed.kept) for seed in asked}
        study = Study.open(spec, storage, prepared.allocator, facts_of(prepared), given)
        look = self._confirmation(prepared, trials)

        def keep(outcome: Outcome) -> None:
            measured, number = outcome.measurement, outcome.proposal.number
            confirmed = look.take()
            clock.add(ranges.seconds_of_first(outcome.proposal.rank_map) - confirmed.seconds)
            # A pruned trial has the loss of a few blocks, or of no fine-tune: none of those that are compared.
            loss = None if measured is None or outcome.state is State.PRUNED else measured.loss
            fidelity = "predicted" if measured is None else measured.fidelity.label
            self._add(run, number, clock.lap(), outcome.proposal.rank_map, loss, fidelity, confirmed.told)
            clock.check()

        try:
            ended = work(study, Evaluator(prepared, look), 10**9, rules=StopRules.of(spec.search), on_outcome=keep)
            self.file.add({"competitor": run[0], "seed": run[1], "ended": ended})
        except PieceEndedError:
            pass
        finally:
            study.close()

    def _study_spec(self, run: Run) -> StudySpec:
        """The study file with the changes of a competitor's name, its seed, and the fine-tune's steps."""
        name, seed = run
        tables = self._study.spec.model_dump(mode="json")
        _, *changes = name.split(":")
        for change in changes:
            key, _, value = change.partition("=")
            table, _, key = key.rpartition(".")
            if table and (table, key) != ("finetune", "mode"):
                raise InputError(
                    f"competitor {name!r} changes {table}.{key}; change keys of [search] and finetune.mode"
                )
            tables[table or "search"][key] = _number(value)
        if tables["finetune"]["mode"] != self._study.spec.finetune.mode:
            tables["finetune"] |= {"steps": None, "tokens": None}  # those of the other mode
        tables["search"] |= {"seed": tables["search"]["seed"] + seed, "trials": 10**9}
        if tables["search"]["fidelities"] is not None:
            # A study that climbs has to know its end, to promote what is left before it.
            tables["search"]["gpu_seconds"] = _SEARCHED * (self.protocol.gpu_seconds - self._start(bank=True))
        if tables["finetune"]["mode"] == "own":
            tables["finetune"] |= {"steps": self.protocol.steps, "tokens": None}
        plain = "".join(letter if letter.isalnum() else "-" for letter in name)
        tables["name"] = f"{plain}-{seed}"
        return parse_study(tables, where=f"competitor {name}")

    # What both share

    def _tuning(self, seed: int, look: Look | None = None, *, svd: bool = False) -> Evaluator:
        """Fine-tunes every rank map for the protocol's steps: on the bank, or on plain SVD made now."""
        prepared = self._prepared
        spec = prepared.spec
        finetune = spec.finetune.model_copy(update={"mode": "own", "steps": self.protocol.steps, "tokens": None})
        search = spec.search.model_copy(update={"seed": spec.search.seed + seed})
        study = StudyFile(spec=spec.model_copy(update={"search": search}), folder=prepared.study.folder)
        seeded = dataclasses.replace(prepared, study=study)
        if svd:
            bank = FactorBank(Path(), prepared.bank.key, plain_svd(prepared.targets), {})
            return evaluator_with(dataclasses.replace(seeded, bank=bank), finetune, look)
        return evaluator_with(seeded, finetune, look)

    def _sliced(self) -> Prepared:
        """The study with nested fine-tunes, of which trials are slices; made, and their seconds kept, at first."""
        if self._nested is None:
            tables = self._study.spec.model_dump(mode="json")
            if tables["finetune"]["mode"] != "nested":
                tables["finetune"] |= {"mode": "nested", "steps": None, "tokens": None}
            study = StudyFile(spec=parse_study(tables, where="the nested study"), folder=self._study.folder)
            folder = self._rows.with_suffix(".nested").resolve()  # found there by later calls on the same machine
            is_counted = bool(self.file.preparation().get("nested"))
            if not is_counted:
                shutil.rmtree(folder, ignore_errors=True)  # what is found costs nothing
            prepared = prepare(with_work_dir(study, folder), nested=False)
            seconds = seconds_of_ranges(prepared, self._clock)  # on another machine again, before a run's clock starts
            if not is_counted:
                self.file.add({"preparation": {"nested": seconds}})
            self._nested = _seeing(prepared, self.protocol.score_blocks)
        return self._nested

    def _confirmation(self, prepared: Prepared, trials: Sequence[Record]) -> Confirmation:
        """Of a run that has these trials already."""
        measured = [(t["loss"], t["num_params"]) for t in trials if "confirmed" in t]
        return Confirmation(prepared, self._unseen, self._clock, measured)

    def _start(self, *, bank: bool) -> float:
        """GPU-seconds spent before the first trial."""
        return self.file.preparation()["bank"] if bank else 0.0

    def _end_if_spent(self, run: Run, spent: float) -> None:
        """A run whose preparation alone takes its GPU-seconds has no trials."""
        if spent >= self.protocol.gpu_seconds and not self.is_done(run):
            self.file.add({"competitor": run[0], "seed": run[1], "ended": "preparation took all GPU-seconds"})

    def _rank_map(self, trial: Record) -> RankMap:
        return rank_map_of(trial, self._prepared.space)

    def _add(
        self, run: Run, number: int, spent: float, rank_map: RankMap, loss: float | None, fidelity: str,
        more: dict[str, object],
    ) -> None:  # fmt: skip
        ranks = [rank_map.get(shape.name) for shape in self._prepared.space.shapes]
        record = {
            "competitor": run[0], "seed": run[1], "trial": number, "gpu_seconds": round(spent, 3),
            "loss": _round(loss), "num_params": self._prepared.space.num_params(rank_map), "fidelity": fidelity,
            "digest": rank_map.digest[:16], "ranks": ranks, **more,
        }  # fmt: skip
        self.file.add(record)
        kept = self._prepared.space.kept_of_targets(rank_map)
        print(
            f"{run[0]} seed {run[1]} trial {number}: {spent:.1f} s, kept {kept:.4f}, loss {record['loss']}", flush=True
        )


def _refuse_others(database: Path, name: str, recorded: set[int]) -> None:
    """Refuse a study that knows more than the rows do: it would search with what it has not paid for."""
    if not database.exists():
        return
    with StudyStore(f"sqlite:///{database}") as store:
        known = [] if name not in store.studies() else store.trials(name)
    if more := [t.number for t in known if t.state in MEASURED and t.number not in recorded]:
        raise InputError(
            f"{database} has a trial {more[0]} that the rows lack; remove the database and its study's rows"
        )


def _seconds_of_bank(folder: Path, study: StudyFile, clock: Clock) -> float:
    """Of the factor bank, made in a folder."""
    passed, counted = time.perf_counter(), clock()
    times = prepare(with_work_dir(study, folder), nested=False).times
    share = (clock() - counted) / (time.perf_counter() - passed)
    return round(share * (times.statistics + times.decomposition + times.bank), 3)


def _seeing(prepared: Prepared, blocks: int) -> Prepared:
    """The same with the first so many validation blocks."""
    splits = dataclasses.replace(prepared.splits, validation=prepared.splits.validation[:blocks])
    return dataclasses.replace(prepared, splits=splits)


def _params_at(space: RankSpace, kept: float) -> int:
    """Parameters of the whole model at a kept fraction of the target layers."""
    return space.model_params - space.dense_params + int(kept * space.dense_params)


def _loss_of(evaluator: Evaluator, rank_map: RankMap) -> float | None:
    """None where it, or a loss of the fine-tune, is not finite."""
    try:
        return evaluator.measure(rank_map).loss
    except NonFiniteLossError:
        return None


def _round(loss: float | None) -> float | None:
    return None if loss is None else round(loss, 6)


def _number(text: str) -> object:
    """A value of a study file's key."""
    try:
        return int(text) if text.lstrip("-").isdigit() else float(text)
    except ValueError:
        return text


def _rows_file(args: argparse.Namespace) -> Path:
    """The file of rows; in a folder, one of these competitors and seeds."""
    rows: Path = args.rows
    if rows.suffix:
        return rows
    rows.mkdir(parents=True, exist_ok=True)
    names = hashlib.sha256(",".join(dict.fromkeys(name for name, _ in args.runs)).encode()).hexdigest()[:8]
    seeds = dict.fromkeys(str(seed) for _, seed in args.runs)
    return rows / f"seeds-{'-'.join(seeds)}-{names}.jsonl"


def _row_files(paths: Sequence[Path]) -> list[Path]:
    """Files, and those of folders."""
    return [file for path in paths for file in (sorted(path.glob("*.jsonl")) if path.is_dir() else [path])]


def _runs(text: str) -> list[Run]:
    """``COMPETITOR@SEED,...``"""
    pairs = [run.rpartition("@") for run in text.split(",")]
    return [(name, int(seed)) for name, _, seed in pairs]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, nargs="?")
    parser.add_argument("--merge", type=Path, nargs="+", metavar="ROWS")
    parser.add_argument("--rows", type=Path, help="JSON lines to append to and to go on from, or a folder")
    parser.add_argument("--competitors", type=lambda text: text.split(","), default=[*SIMPLE, "study"])
    parser.add_argument("--seeds", type=lambda text: [int(seed) for seed in text.split(",")], default=[0, 1, 2])
    parser.add_argument("--runs", type=_runs, help="competitors, each with its seed, in place of all at all seeds")
    parser.add_argument("--gpu-seconds", type=float, default=200.0, help="of every competitor and seed")
    parser.add_argument("--steps", type=int, default=100, help="of the own fine-tune")
    parser.add_argument("--score-blocks", type=int, default=64)
    parser.add_argument("--confirm-blocks", type=int, default=64)
    parser.add_argument("--budgets", type=int, default=100, help="at which the points of a front are compared")
    parser.add_argument(
        "--reference-rise", type=float, default=2.0, help="nats above the dense loss that count nothing"
    )
    parser.add_argument("--piece-seconds", type=float, default=450.0)
    parser.add_argument("--evaluations", type=int, default=50, help="of Bolaco's search, at each budget")
    parser.add_argument("--search-blocks", type=int, default=8, help="calibration blocks that Bolaco and evolution see")
    parser.add_argument("--generations", type=int, default=5, help="of evolution between two measurements of a parent")
    parser.add_argument("--offspring", type=int, default=16, help="of evolution in a generation")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    if (args.study is None) == (args.merge is None):
        parser.error("give a study file, or files of rows after --merge")
    if args.study is not None and args.rows is None:
        parser.error("give --rows, where a later call finds what this one measured")
    args.runs = args.runs or [(name, seed) for seed in args.seeds for name in args.competitors]
    for name, _ in args.runs:
        if name not in SIMPLE and name.partition(":")[0] != "study":
            parser.error(f"{name!r} is none of the competitors {', '.join(SIMPLE)}, study or study:KEY=VALUE...")
    return args


if __name__ == "__main__":
    run_script(main)
