"""Replays whole sweeps on stored complete runs, from the search to the verdicts, and counts wrong and open answers.

    python benchmarks/bench_answers.py [--replays 500] [--tasks stdlib_docs ...] [--seconds TODAY TUNED OURS]
    python benchmarks/bench_answers.py --minutes 12 --rows 200 500 1000 [--without-full]

Tables (`benchmarks/answers/`, made by `record_answers.py`): LoRA at ranks × learning rates and full fine-tuning at
learning rates, each on several seeds, with validation curves and the score of each test document or example. Between
two stored rates, scores are interpolated (modified Akima splines in the logarithm of the rate).

A replay draws a seed for the search, seeds for the confirm stage and test documents (or examples), all with
replacement. The search proposes with the product's `propose`, in the product's batches and with its numbers of trials,
stops trials by the product's `explain_stop`, and predicts with the product's `predict_best`; the confirm stage asks
`answer_questions` at each look. Truth is the mean over all seeds and documents, at the rate whose mean is best. The
truth of a rank is decidable if its share of full's gain is within half a margin of 1 or at least two margins away;
likewise for the smallest rank.

`wrong`: a verdict is false; for `setting`, the regret is more than 5 % of the gain. `settled`: the line that the report
prints first is no "open". `regret`: by how much the chosen setting of a rank is worse than the best of that rank, as a
share of full's gain. `runs` and `steps`: of search and confirm stage.

`time_to_answer`: today's way is Optuna's TPE over rank, α and rate for one trial after another with a median pruner, as
many trials as give the same median regret for every rank, then the same seeds one by one. Both ways' steps are
multiplied with the seconds of a trial-step that `bench_today.py` prints (--seconds TODAY TUNED OURS).

With `--minutes` the product's `fit_minutes` cuts the sweep first, at the rates of `build_rates`. A replay then has the
trials, seeds and ranks that are left, and draws `--rows` test examples. `settled` has the share of replays in which
each question is settled, of those where its truth is decidable; `two settled` that of replays with two settled
questions, of those with two decidable ones. A setting is decidable if its true regret is, as a rank is.
"""

from __future__ import annotations

import argparse
import csv
import functools
import itertools
import json
import math
import multiprocessing
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from numpy.typing import NDArray
from scipy.interpolate import Akima1DInterpolator

from lorasweep.config.compose import compose_run, compose_sweep
from lorasweep.config.data import ScoreMetric
from lorasweep.config.sweep import parse_margin
from lorasweep.record import Question, Subject, Trial
from lorasweep.report.evidence.estimates import ConfirmScores
from lorasweep.report.evidence.questions import AnswerRow, MarginScale, answer_questions, compute_level
from lorasweep.sweep.controller.encoding import History
from lorasweep.sweep.controller.predictions import predict_best
from lorasweep.sweep.controller.proposals import find_batch_start, propose
from lorasweep.sweep.controller.stopping import explain_stop
from lorasweep.sweep.cost import Rates, fit_minutes
from lorasweep.sweep.definition.arms import DEFAULT_TRIALS, Arm, Definition, read_definition
from lorasweep.sweep.definition.confirm import list_questions
from lorasweep.sweep.definition.ranges import Range

FOLDER = Path(__file__).parent / "answers"
RANKS = (1, 4, 16, 64)
MIN_SEEDS = 3
"""Fewer recorded seeds say too little on the truth, which is the mean over all seeds."""
RANK, LR = "method.rank", "optim.lr"
ALPHA = 16.0
"""α of the stored runs."""
NUM_TRIALS = {"lora": DEFAULT_TRIALS, "full": DEFAULT_TRIALS // 2}
TODAY_TRIALS = (16, 24, 32, 48, 64, 96, 128, 192)
"""Numbers of trials of today's way that are tried."""
NUM_RATES = 121
"""Number of learning rates among which the true best one is found: steps of 4 % over two decades."""
DECIDABLE = (0.5, 2.0)
"""A true difference is decidable up to the first or from the second number of margins on."""
Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Run:
    """One stored run."""

    values: tuple[float, ...]
    """The metric on validation data at each evaluation."""
    losses: tuple[float, ...]
    test: Array
    """(groups,) The test score of each group."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Table:
    """All runs of a task: by rank (0 for full fine-tuning), rate and seed; the frozen base by seed."""

    name: str
    sign: int
    shares: Array
    num_steps: int
    num_evaluations: int
    runs: Mapping[tuple[int, float, int], Run]
    frozen: Mapping[int, Run]
    cache: dict[tuple[int, float, int], Run] = field(default_factory=dict)

    @property
    def seeds(self) -> list[int]:
        return sorted(self.frozen)

    @cached_property
    def rates(self) -> dict[int, list[float]]:
        """The stored rates of each rank, ascending."""
        return {
            rank: sorted({rate for r, rate, _ in self.runs if r == rank}) for rank in {rank for rank, _, _ in self.runs}
        }

    @cached_property
    def curves(self) -> dict[tuple[int, int], Akima1DInterpolator]:
        """By rank and seed: validation values and test scores as a function of the logarithm of the rate."""
        return {
            (rank, seed): Akima1DInterpolator(
                np.log(rates),
                [
                    np.concatenate([run.values, run.losses, run.test])
                    for run in (self.runs[rank, rate, seed] for rate in rates)
                ],
                method="makima",
            )
            for rank, rates in self.rates.items()
            for seed in self.seeds
        }

    def find_run(self, rank: int, rate: float, seed: int) -> Run:
        """Returns the run of a setting, between stored rates if the rate is not stored."""
        key = rank, rate, seed
        if key not in self.cache:
            found, num = self.curves[rank, seed](math.log(rate)), self.num_evaluations
            self.cache[key] = Run(values=tuple(found[:num]), losses=tuple(found[num : 2 * num]), test=found[2 * num :])
        return self.cache[key]

    def mean(self, rank: int, rate: float) -> float:
        """Returns the true test score of a setting: the mean over all seeds and groups."""
        return statistics.fmean(float(self.find_run(rank, rate, seed).test @ self.shares) for seed in self.seeds)

    @cached_property
    def best(self) -> dict[int, float]:
        """The true test score of each rank at its best rate, of `NUM_RATES` over the stored range."""
        return {
            rank: min(
                (self.mean(rank, float(rate)) for rate in np.geomspace(rates[0], rates[-1], NUM_RATES)),
                key=lambda mean: self.sign * mean,
            )
            for rank, rates in self.rates.items()
        }

    def regret(self, rank: int, rate: float) -> float:
        """Returns how much worse a rate is than the best rate of its rank, as a share of full's gain."""
        return self.sign * (self.mean(rank, rate) - self.best[rank]) / self.gain

    @property
    def base(self) -> float:
        return statistics.fmean(float(run.test @ self.shares) for run in self.frozen.values())

    @property
    def gain(self) -> float:
        """Full fine-tuning's true gain, positive."""
        return self.sign * (self.base - self.best[0])


def list_tasks() -> list[str]:
    """Returns the recorded tasks with enough seeds for a replay."""
    seeds = Counter(path.name.rsplit("_seed", 1)[0] for path in FOLDER.glob("*_seed*.csv"))
    return sorted((task for task, num in seeds.items() if num >= MIN_SEEDS), reverse=True)


def read_table(task: str, folder: Path = FOLDER) -> Table:
    about = json.loads((folder / f"{task}.json").read_text())
    runs, frozen = {}, {}
    for path in sorted(folder.glob(f"{task}_seed*.csv")):
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                test = np.array([float(x) for x in row["test"].split()])
                values, losses = (tuple(map(float, row[name].split())) for name in ("values", "losses"))
                run = Run(values=values, losses=losses, test=test)
                if row["method"] == "frozen":
                    frozen[int(row["seed"])] = run
                else:
                    runs[int(row["rank"] or 0), float(row["lr"]), int(row["seed"])] = run
    weights = np.array(about["weights"])
    steps = about["settings"]["trainer.max_steps"]
    return Table(
        name=task,
        sign=-1 if about["metric"].endswith("accuracy") else 1,
        shares=weights / weights.sum(),
        num_steps=steps,
        num_evaluations=steps // about["settings"]["trainer.eval_every_steps"],
        runs=runs,
        frozen=frozen,
    )


def build_arms(table: Table) -> dict[str, Arm]:
    """Returns the arms of a sweep over the rates of the table, with the product's numbers of trials."""
    return {method: _build_arm(table, method, trials=trials) for method, trials in NUM_TRIALS.items()}


def _build_arm(table: Table, method: str, *, trials: int, ranks: Sequence[int] = RANKS) -> Arm:
    rates = table.rates[RANKS[0] if method == "lora" else 0]
    space = {LR: Range(low=rates[0], high=rates[-1], log=True)}
    has_ranks = method == "lora" and len(ranks) > 1
    if has_ranks:
        space[RANK] = Range(choices=tuple(ranks))
    settings = {
        "method": method,
        "trainer.max_steps": table.num_steps,
        "trainer.eval_every_steps": table.num_steps // table.num_evaluations,
        **({RANK: ranks[0]} if method == "lora" else {}),
    }
    base = compose_run(settings)
    return Arm(
        name=method,
        space=space,
        settings=settings,
        corner_configs=(base,),
        trials=trials,
        sweep_config=compose_sweep({}),
        confirm_each=RANK if has_ranks else None,
    )


def with_seed(arm: Arm, seed: int) -> Arm:
    """Returns an arm of a sweep with another seed, with the same composed settings."""
    config = replace(arm.sweep_config, sweep=replace(arm.sweep_config.sweep, seed=seed))
    return replace(arm, sweep_config=config)


@dataclass(frozen=True, kw_only=True)
class Search:
    """The trials of an arm as they ended."""

    trials: list[Trial]
    steps: int


def run_search(arm: Arm, table: Table, *, rng: np.random.Generator) -> Search:
    """Replays the search of an arm, batch by batch, with one seed for all trials."""
    seed = int(rng.choice(table.seeds, size=arm.trials)[0])
    metric, ended, begun = get_metric(table), list[Trial](), list[Trial]()
    for number in range(arm.trials):
        if find_batch_start(arm, number) == number:
            ended += [end_trial(trial, arm, table, seed=seed) for trial in begun]
            begun = []
        params, _ = propose(arm, History(arm, [*ended, *begun], metric=metric), number=number)
        begun.append(Trial(arm="", number=number, run="", params=params))
    ended += [end_trial(trial, arm, table, seed=seed) for trial in begun]
    return Search(trials=ended, steps=sum(trial.step for trial in ended))


def get_metric(table: Table) -> ScoreMetric:
    return ScoreMetric(name="metric", direction="minimize" if table.sign == 1 else "maximize")


def end_trial(trial: Trial, arm: Arm, table: Table, *, seed: int) -> Trial:
    """Returns a trial as it ended: complete with its best value, or stopped at half."""
    config = arm.base
    run = table.find_run(trial.params.get(RANK, getattr(config.method, "rank", 0)), trial.params[LR], seed)
    metric = get_metric(table)
    untrained = {"metric": table.frozen[seed].values[0], "loss": table.frozen[seed].losses[0]}
    values: dict[int, float] = {}
    for value, loss in zip(run.values, run.losses, strict=True):
        step = config.trainer.eval_every_steps * (len(values) + 1)
        values[step] = value
        if explain_stop(config, step, {"metric": value, "loss": loss}, untrained=untrained, metric=metric):
            return replace(trial, state="stopped", search_score=value, values=values)
    best = table.sign * min(table.sign * value for value in run.values)
    return replace(trial, state="complete", search_score=best, values=values)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One replay."""

    answers: list[AnswerRow]
    regrets: list[float]
    """For each rank: how much worse the chosen rate is than the best rate, as a share of full's gain."""
    search_steps: int
    full_steps: int
    """The steps of full fine-tuning's search, which are part of `search_steps`."""
    confirm_steps: int
    num_seeds: int
    num_runs: int


QUESTIONS = [
    Question(
        name=name,
        arm="lora",
        key=RANK,
        subjects=[f"lora-rank-{rank}" for rank in RANKS],
        reference="full" if name == "as_good_as_full" else None,
    )
    for name in ("as_good_as_full", "smallest")
]


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """The settings that the searches of a sweep chose."""

    searches: Mapping[str, Search]
    """By arm."""
    rates: Mapping[int, float]
    """By rank; 0 is full fine-tuning."""
    regrets: Mapping[int, float]
    """By rank: the regret that the model of the search expects."""


def choose_settings(
    table: Table, arms: Mapping[str, Arm], *, ranks: Sequence[int], number: int, rng: np.random.Generator
) -> Chosen:
    """Replays the searches of a sweep, and returns what they chose for full fine-tuning and each rank."""
    searches = {name: run_search(with_seed(arm, number), table, rng=rng) for name, arm in arms.items()}
    metric, found, rates = get_metric(table), {}, {}
    if "full" in searches:
        complete = [trial for trial in searches["full"].trials if trial.state == "complete"]
        winner = min(complete, key=lambda trial: table.sign * (trial.search_score or 0.0))
        of_full, trials, rates = Subject(arm="full"), searches["full"].trials, {0: winner.params[LR]}
        found[0] = predict_best(arms["full"], trials, of_full, metric=metric, chosen=winner.params)
    arm = with_seed(arms["lora"], number)
    for rank in ranks:
        subject = Subject(arm=arm.name, key=RANK, value=rank) if arm.confirm_each else Subject(arm=arm.name)
        found[rank] = predict_best(arm, searches["lora"].trials, subject, metric=metric)
    known = {rank: prediction for rank, prediction in found.items() if prediction is not None}
    assert len(known) == len(found)
    return Chosen(
        searches=searches,
        rates={rank: prediction.params[LR] for rank, prediction in known.items()} | rates,
        regrets={rank: prediction.regret or 0.0 for rank, prediction in known.items()},
    )


def name_subject(rank: int) -> str:
    return f"lora-rank-{rank}" if rank else "full"


@dataclass(kw_only=True)
class Confirmation:
    """The confirm stage of a replayed sweep."""

    table: Table
    chosen: Chosen
    seeds: list[int]
    """The stored seed of each run, drawn with replacement."""
    groups: NDArray[np.int64]
    """The drawn groups of test examples."""
    looks: Sequence[int]
    """The numbers of seeds of all planned looks."""
    questions: Sequence[Question]
    values: dict[str, dict[int, Array]] = field(default_factory=dict)
    answers: list[AnswerRow] = field(default_factory=list)
    looks_done: list[int] = field(default_factory=list)
    num_runs: int = 0
    """The number of runs that trained."""

    @property
    def scale(self) -> MarginScale:
        trained = {name: found for name, found in self.values.items() if name != "frozen"}
        best = min(trained, key=lambda name: self.table.sign * np.mean([*trained[name].values()]))
        full = "full" if "full" in trained else None
        return MarginScale(
            margin=parse_margin("5%"), metric=get_metric(self.table), base="frozen", full=full, best=best
        )

    @property
    def scores(self) -> ConfirmScores:
        shares = self.table.shares[self.groups]
        errors = {name_subject(rank): regret for rank, regret in self.chosen.regrets.items()}
        return ConfirmScores(
            values=self.values,
            shares=shares / shares.sum(),
            num_examples=len(shares),
            problems=(),
            search_errors=errors,
        )

    def train(self, look: int) -> None:
        """Trains all subjects up to a number of seeds, and answers the questions."""
        ranks = {name_subject(rank): rank for rank in self.chosen.rates}
        for index, name in itertools.product(range(look), ["frozen", *ranks]):
            if index not in self.values.setdefault(name, {}):
                seed = self.seeds[index]
                rank, table = ranks.get(name), self.table
                run = table.frozen[seed] if rank is None else table.find_run(rank, self.chosen.rates[rank], seed)
                self.values[name][index] = run.test[self.groups]
                self.num_runs += rank is not None
        self.looks_done.append(look)
        self.answers = answer_questions(self.questions, self.scores, self.scale, looks=self.looks)

    def run(self) -> None:
        """Trains up to each planned look, until no open answer may settle."""
        for look in self.looks:
            self.train(look)
            if not any(answer.may_settle for answer in self.answers):
                break


def confirm(
    table: Table,
    chosen: Chosen,
    *,
    looks: Sequence[int],
    rng: np.random.Generator,
    rows: int | None = None,
    questions: Sequence[Question] = QUESTIONS,
) -> Confirmation:
    """Replays a confirm stage with its own draw of seeds and of `rows` groups of test examples, by default all."""
    seeds = [int(seed) for seed in rng.choice(table.seeds, size=max(looks))]
    groups = rng.integers(len(table.shares), size=rows or len(table.shares))
    stage = Confirmation(table=table, chosen=chosen, seeds=seeds, groups=groups, looks=looks, questions=questions)
    stage.run()
    return stage


def replay_sweep(table: Table, arms: Mapping[str, Arm], *, number: int, looks: Sequence[int]) -> Outcome:
    """Returns the outcome of one sweep with its own draw of seeds and test groups."""
    rng = np.random.default_rng(number)
    chosen = choose_settings(table, arms, ranks=RANKS, number=number, rng=rng)
    stage = confirm(table, chosen, looks=looks, rng=rng)
    full, lora = chosen.searches["full"], chosen.searches["lora"]
    return Outcome(
        answers=stage.answers,
        regrets=[table.regret(rank, chosen.rates[rank]) for rank in RANKS],
        search_steps=lora.steps + full.steps,
        full_steps=full.steps,
        confirm_steps=stage.num_runs * table.num_steps,
        num_seeds=max(stage.looks_done),
        num_runs=len(lora.trials) + len(full.trials) + stage.num_runs,
    )


def replay(task: str, looks: Sequence[int], numbers: Sequence[int]) -> list[Outcome]:
    """Returns the outcomes of replays with these numbers."""
    table = read_table(task)
    arms = build_arms(table)
    return [replay_sweep(table, arms, number=number, looks=looks) for number in numbers]


def replay_in_processes(
    replay: Callable[..., list[Any]], settings: Sequence[Any], *, replays: int, processes: int
) -> list[Any]:
    """Returns the outcomes of `replay(*settings, numbers)` for all numbers."""
    parts = [range(start, replays, processes) for start in range(processes)]
    if processes == 1:
        return replay(*settings, parts[0])
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        return [outcome for found in pool.map(functools.partial(replay, *settings), parts) for outcome in found]


@dataclass(frozen=True, kw_only=True)
class Truth:
    """What is true of a table, in margins."""

    behind_full: dict[str, float]
    """By subject: how far its best rate is behind full fine-tuning's best rate."""
    behind_larger: dict[str, float]
    """By subject: how far it is behind the best larger rank."""


def find_truth(table: Table) -> Truth:
    margin = 0.05 * table.gain
    costs = {rank: table.sign * table.best[rank] for rank in (0, *RANKS)}
    return Truth(
        behind_full={f"lora-rank-{rank}": (costs[rank] - costs[0]) / margin for rank in RANKS},
        behind_larger={
            f"lora-rank-{rank}": max((costs[rank] - costs[other]) / margin for other in RANKS if other > rank)
            for rank in RANKS[:-1]
        },
    )


def is_wrong(answer: AnswerRow, truth: Truth) -> bool:
    """Returns whether a verdict is false."""
    if answer.name == "smallest":
        behind = truth.behind_larger[answer.subject]
        return {"sufficient": behind > 1, "insufficient": behind <= 1}.get(answer.verdict, False)
    behind = truth.behind_full[answer.subject]
    return {
        "better": behind >= 0,
        "equivalent": abs(behind) >= 1,
        "not worse": behind >= 1,
        "worse": behind <= 0,
    }.get(answer.verdict, False)


def is_line_settled(name: str, answers: Sequence[AnswerRow]) -> bool:
    """Returns whether the report's line on a question is settled."""
    verdicts = [answer.verdict for answer in answers if answer.name == name]
    if name == "as_good_as_full":  # yes from some rank on, or no at every rank
        return verdicts[-1] in ("better", "equivalent", "not worse") or all(v == "worse" for v in verdicts)
    # the smallest sufficient rank: the next smaller one is refuted, or there is none
    sufficient = next((n for n, verdict in enumerate(verdicts) if verdict == "sufficient"), len(verdicts))
    return sufficient == 0 or verdicts[sufficient - 1] == "insufficient"


def summarize(outcomes: Sequence[Outcome], truth: Truth) -> dict[str, Any]:
    margins = {"as_good_as_full": truth.behind_full, "smallest": truth.behind_larger}
    wrong = {
        name: statistics.fmean(
            any(is_wrong(answer, truth) for answer in outcome.answers if answer.name == name) for outcome in outcomes
        )
        for name in margins
    }
    regrets = [regret for outcome in outcomes for regret in outcome.regrets]
    wrong["setting"] = statistics.fmean(regret > 0.05 for regret in regrets)
    settled = {
        name: statistics.fmean(is_line_settled(name, outcome.answers) for outcome in outcomes) for name in margins
    }
    decidable = [
        answer.is_settled
        for outcome in outcomes
        for answer in outcome.answers
        if not DECIDABLE[0] < abs(margins[answer.name][answer.subject]) < DECIDABLE[1]
    ]
    return {
        "wrong": {name: round(value, 4) for name, value in wrong.items()},
        "settled": {name: round(value, 4) for name, value in settled.items()},
        "settled_decidable": round(statistics.fmean(decidable), 4) if decidable else None,
        "regret_median": round(statistics.median(regrets), 4),
        "regret_p95": round(float(np.quantile(regrets, 0.95)), 4),
        "seeds": round(statistics.fmean(outcome.num_seeds for outcome in outcomes), 2),
        "runs": round(statistics.fmean(outcome.num_runs for outcome in outcomes), 1),
        "steps": round(statistics.fmean(outcome.search_steps + outcome.confirm_steps for outcome in outcomes)),
    }


def replay_today(table: Table, number: int) -> list[tuple[list[float], int]]:
    """Returns the regret of each rank's best trial, and the steps, of Optuna's TPE with a median pruner.

    One search gives the results after each of `TODAY_TRIALS`, because its first trials do not depend on their number.

    It searches rank, α/r in 1, 2 and 4, and the learning rate, one trial after another. The stored runs have one α; at
    another α a trial has the run of the same lr · √α. A rank without a trial gets the best trial's lr · √α.
    """
    seed = int(np.random.default_rng(number).choice(table.seeds))
    rates = table.rates[RANKS[0]]
    study = optuna.create_study(
        direction="minimize",
        sampler=optuna.samplers.TPESampler(seed=number),
        pruner=optuna.pruners.MedianPruner(),
    )
    found: dict[int, tuple[float, float]] = {}
    steps, results = 0, list[tuple[list[float], int]]()
    for trials in range(1, TODAY_TRIALS[-1] + 1):
        trial = study.ask()
        rank = trial.suggest_categorical("rank", RANKS)
        ratio = trial.suggest_categorical("alpha_over_rank", (1, 2, 4))
        rate = trial.suggest_float("lr", rates[0], rates[-1], log=True) * math.sqrt(ratio * rank / ALPHA)
        rate = min(max(rate, rates[0]), rates[-1])
        values = [table.sign * value for value in table.find_run(rank, rate, seed).values]
        for evaluation, value in enumerate(values, start=1):
            trial.report(value, evaluation)
            steps += table.num_steps // table.num_evaluations
            if trial.should_prune():
                break
        best = min(values[:evaluation])
        study.tell(trial, best)
        found[rank] = min(found.get(rank, (math.inf, 0.0)), (best, rate))
        if trials in TODAY_TRIALS:
            winner = min(found.values())
            results.append(([table.regret(rank, found.get(rank, winner)[1]) for rank in RANKS], steps))
    return results


def measure_time_to_answer(
    table: Table, outcomes: Sequence[Outcome], seconds: tuple[float, float, float], *, replays: int, processes: int
) -> dict[str, float]:
    """Returns how many times longer today's way takes, by default and tuned, for the same median regret and seeds."""
    wanted = statistics.median(regret for outcome in outcomes for regret in outcome.regrets)
    with multiprocessing.get_context("spawn").Pool(
        processes, optuna.logging.set_verbosity, [optuna.logging.ERROR]
    ) as pool:
        replayed = pool.map(functools.partial(replay_today, table), range(replays))
    results = [
        (
            trials,
            statistics.fmean(steps for _, steps in found),
            statistics.median(one for each, _ in found for one in each),
        )
        for trials, found in zip(TODAY_TRIALS, zip(*replayed, strict=True), strict=True)
    ]
    trials, steps, regret = next((result for result in results if result[2] <= wanted), results[-1])
    full_steps = statistics.fmean(outcome.full_steps for outcome in outcomes)
    confirm_steps = statistics.fmean(outcome.confirm_steps for outcome in outcomes)
    ours = statistics.fmean(outcome.search_steps for outcome in outcomes) + confirm_steps
    theirs = steps + full_steps + confirm_steps
    today, tuned, own = seconds
    return {
        "trials": trials,
        "regret": round(regret, 4),
        "today": round(theirs * today / (ours * own), 2),
        "tuned": round(theirs * tuned / (ours * own), 2),
    }


EPOCH_STEPS = 150
"""Steps of a run that `--minutes` cuts no further: one epoch of 2,400 texts."""
STEP_S = 0.5
"""Seconds of a step of full fine-tuning in the cut sweep, with which full fine-tuning and LoRA at two ranks, each with
the fewest trials and seeds, take 17 minutes, as on the loaded machine where this was first tried."""


def build_rates() -> list[Rates]:
    """Returns rates as those of a small classifier: a pack of 8 LoRA trials steps in 2.8 times the time of `full`."""

    def build(arm: str, *, slots: int, step_s: float, steps_scored: float) -> Rates:
        return Rates(
            arms=(arm,),
            slots=slots,
            reason="",
            loading_s=0.5,
            step_s=step_s * STEP_S,
            step_tokens=0.0,
            evaluation_s=slots * steps_scored * STEP_S,
            final_s=0.0,
            test_s=steps_scored * STEP_S,
            answers_s={},
            num_scored={"validation": 300, "test": 300},
            num_train=16 * EPOCH_STEPS,
            peak_memory_bytes=0,
            metric="",
            trained_params={},
        )

    shapes = {"frozen": (1, 0.0), "full": (1, 1.0), "lora": (8, 2.8)}
    return [build(arm, slots=slots, step_s=step_s, steps_scored=6.0) for arm, (slots, step_s) in shapes.items()]


def cut_sweep(minutes: float, *, has_full: bool) -> tuple[Definition, str]:
    """Returns the sweep that fits the minutes, and what it gives up."""
    rates = {"low": 1e-5, "high": 1e-3, "log": True}
    arms: dict[str, Any] = {
        "frozen": {"settings": {"method": "frozen"}},
        "full": {"settings": {"method": "full"}, "space": {LR: rates}},
        "lora": {"settings": {"method": "lora"}, "space": {RANK: list(RANKS), LR: rates}, "confirm_each": RANK},
    }
    settings = {"model": "tiny", "trainer.max_steps": EPOCH_STEPS, "trainer.batch_size": 16}
    settings |= {"trainer.eval_every_steps": EPOCH_STEPS // 2}
    kept = {name: arm for name, arm in arms.items() if has_full or name != "full"}
    definition = read_definition({"name": "cut", "settings": settings, "arms": kept})
    rates_of_arms = [group for group in build_rates() if has_full or group.arms != ("full",)]
    fitted = fit_minutes(definition, rates_of_arms, minutes, typed=["trainer.max_steps"])
    return fitted.definition, fitted.given_up


def replay_cut(
    task: str, minutes: float, rows: int, numbers: Sequence[int], *, has_full: bool
) -> list[dict[str, tuple[bool, bool, bool]]]:
    """Returns of each replay, for each question that is asked: whether it is decidable, settled, and wrong."""
    table, (definition, _) = read_table(task), cut_sweep(minutes, has_full=has_full)
    kept = {arm.name: arm for arm in definition.arms}
    ranks = [subject.value or kept["lora"].settings[RANK] for subject in kept["lora"].subjects]
    trials = {name: kept[name].trials for name in ("full", "lora") if name in kept}
    arms = {name: _build_arm(table, name, trials=number, ranks=ranks) for name, number in trials.items()}
    looks, names = definition.sweep_config.confirm.list_looks(), [name_subject(rank) for rank in ranks]
    asked = {question.name for question in list_questions(definition)}
    questions = [replace(one, subjects=names) for one in QUESTIONS if one.name in asked]
    trained = [*([0] if "full" in kept else []), *ranks]
    best = min(table.sign * table.best[rank] for rank in (trained[:1] if "full" in kept else trained))
    margin = 0.05 * (table.sign * table.base - best)
    costs = {rank: table.sign * table.best[rank] / margin for rank in trained}
    found = []
    for number in numbers:
        rng = np.random.default_rng(number)
        chosen = choose_settings(table, arms, ranks=ranks, number=number, rng=rng)
        stage = confirm(table, chosen, looks=looks, rng=rng, rows=rows, questions=questions)
        found.append(dict(_judge(stage, costs, margin=margin)))
    return found


def _judge(
    stage: Confirmation, costs: Mapping[int, float], *, margin: float
) -> Iterator[tuple[str, tuple[bool, bool, bool]]]:
    """Yields each question with whether its line is decidable, settled, and wrong. `costs` are scores in margins."""
    ranks = [rank for rank in costs if rank]
    behind = {name_subject(rank): costs[rank] - costs.get(0, 0.0) for rank in ranks}
    larger = {
        name_subject(rank): max(costs[rank] - costs[other] for other in ranks if other > rank) for rank in ranks[:-1]
    }
    truth = Truth(behind_full=behind, behind_larger=larger)
    for name in dict.fromkeys(answer.name for answer in stage.answers):
        answers = [answer for answer in stage.answers if answer.name == name]
        if name == "smallest":  # down to the first rank that is not enough
            needed = [*itertools.takewhile(lambda rank: larger[name_subject(rank)] <= 1, ranks[-2::-1])]
            needed += [rank for rank in ranks[-2::-1] if rank not in needed][:1]
            is_decidable = all(_is_decidable(larger[name_subject(rank)]) for rank in needed)
        else:
            is_decidable = _is_decidable(behind[name_subject(ranks[-1])])
        yield name, (is_decidable, is_line_settled(name, answers), any(is_wrong(one, truth) for one in answers))
    scale = stage.scale
    gain = scale.find_gain(stage.scores, level=compute_level(stage.questions, stage.looks))
    limit = scale.find_margin(gain)
    rank = min(ranks, key=lambda rank: stage.table.sign * np.mean([*stage.values[name_subject(rank)].values()]))
    regret = stage.table.regret(rank, stage.chosen.rates[rank]) * stage.table.gain / margin
    is_settled = limit is not None and stage.chosen.regrets[rank] <= limit
    yield "setting", (_is_decidable(regret), is_settled, is_settled and regret > 1)


def _is_decidable(margins: float) -> bool:
    return not DECIDABLE[0] < abs(margins) < DECIDABLE[1]


def summarize_cut(found: Sequence[Mapping[str, tuple[bool, bool, bool]]]) -> dict[str, Any]:
    """Returns the shares of settled and of wrong questions over all replays."""

    def share(values: Iterable[bool]) -> float | None:
        listed = [*values]
        return round(statistics.fmean(listed), 3) if listed else None

    several = [replay for replay in found if sum(decidable for decidable, _, _ in replay.values()) >= 2]
    return {
        "settled": {name: share(one[name][1] for one in found if one[name][0]) for name in found[0]},
        "wrong": {name: share(one[name][2] for one in found) for name in found[0]},
        "two settled": share(sum(ok for decidable, ok, _ in one.values() if decidable) >= 2 for one in several),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", help=f"default: those with at least {MIN_SEEDS} recorded seeds")
    parser.add_argument("--replays", type=int, default=500)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument(
        "--seconds",
        type=float,
        nargs=3,
        metavar=("TODAY", "TUNED", "OURS"),
        help="seconds of a trial-step with its share of evaluations, as bench_today.py measures them",
    )
    parser.add_argument("--minutes", type=float, help="cut the sweeps to this time first")
    parser.add_argument("--rows", type=int, nargs="+", default=[200, 500, 1000], help="test examples, with --minutes")
    parser.add_argument("--without-full", action="store_true", help="with --minutes: no arm of full fine-tuning")
    args = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    if args.minutes:
        definition, given_up = cut_sweep(args.minutes, has_full=not args.without_full)
        print({arm.name: arm.trials for arm in definition.arms}, definition.sweep_config.confirm.seeds, given_up)
        for task, rows in itertools.product(args.tasks or list_tasks(), args.rows):
            replay_one = functools.partial(replay_cut, has_full=not args.without_full)
            settings = (task, args.minutes, rows)
            found = replay_in_processes(replay_one, settings, replays=args.replays, processes=args.processes)
            print(f"{task}, {rows} test examples: {summarize_cut(found)}", flush=True)
        return
    looks = compose_sweep({}).confirm.list_looks()
    for task in args.tasks or list_tasks():
        table = read_table(task)
        truth = find_truth(table)
        outcomes = replay_in_processes(replay, (task, looks), replays=args.replays, processes=args.processes)
        print(f"{task}: gain {table.gain:.4g}, base {table.base:.4g}, {len(table.seeds)} seeds")
        for name, value in summarize(outcomes, truth).items():
            print(f"  {name}: {value}")
        if args.seconds:
            ratio = measure_time_to_answer(
                table, outcomes, args.seconds, replays=min(args.replays, 100), processes=args.processes
            )
            print("  time to an answer, today's way over ours:", ratio)
        print("  behind full, margins:", {name: round(value, 2) for name, value in truth.behind_full.items()})
        print("  behind the best larger rank:", {name: round(value, 2) for name, value in truth.behind_larger.items()})
        sys.stdout.flush()


if __name__ == "__main__":
    main()
