"""A realistic sweep's folder for the report's tests: arms frozen, lora (complete, stopped, failed) and full."""

import math
import random
import shutil

import pytest
from tests.files import edit_json

from lorasweep.config.build import as_settings
from lorasweep.config.compose import compose_run
from lorasweep.config.data import ScoreMetric
from lorasweep.record import (
    ArmRow,
    Question,
    RunRecord,
    SettingRow,
    Subject,
    SweepRecord,
    Trial,
    find_winner,
    name_run,
    read_sweep,
    write_record,
)
from lorasweep.report.facts import read_findings
from lorasweep.report.write import write_report

BASE_SCORE = 2.031
FULL_PARAMS = 1_280_000
LORA_PARAMS_PER_RANK = 11_264
STEPS = 150

LORA_SPACE = {
    "method.rank": [1, 4, 16, 64],
    "method.alpha": [8, 16, 32, 64],
    "optim.lr": {"low": 1e-3, "high": 3e-2, "log": True},
}
FULL_SPACE = {"optim.lr": {"low": 1e-4, "high": 5e-3, "log": True}}


def curve_to(score):
    """Returns a validation curve that starts at the base's score and falls to `score`."""
    return [
        (step, score + (BASE_SCORE - score) * math.exp(-4 * step / STEPS) * (1 - step / STEPS))
        for step in range(0, STEPS + 1, 25)
    ]


def make_trial(arm, number, params, curve, **fields):
    """Returns a complete trial whose score is that of the curve's last step, unless `fields` say otherwise."""
    value = curve[-1][1] if curve else None
    known = {"state": "complete", "search_score": value, "run": name_run("search", arm, number)}
    return Trial(arm=arm, number=number, params=params, values=dict(curve), **(known | fields))


def write_run(folder, trial, *, method, rank=0, **values):
    """Writes a run's record as training does; `rank` is that of a LoRA arm that does not sweep it."""
    rank = int(trial.params.get("method.rank", rank))
    trained = {"frozen": 0, "full": FULL_PARAMS}.get(method, LORA_PARAMS_PER_RANK * rank)
    done = trial.step
    lora = {"method.rank": rank, "method.alpha": 16} if method == "lora" else {}
    config = as_settings(compose_run({"method": method, "optim.lr": 1e-3, **lora, **trial.params}))
    best_step = min(trial.values, key=trial.values.__getitem__, default=None)
    record = RunRecord(
        status=trial.state,
        config=config,
        arm=trial.arm,
        trial=trial.number,
        metric="bits_per_byte",
        direction="minimize",
        wall_s=(0.05 if method == "full" else 0.038 + 1e-8 * trained) * done + 1.1,
        steps_planned=STEPS if method != "frozen" else 0,
        steps_done=done,
        tokens_trained=done * 16 * 128,
        tokens_per_s=52_000.0,
        trainable_params=trained,
        total_params=FULL_PARAMS + trained,
        trainable_fraction=trained / FULL_PARAMS,
        adapter_bytes=4 * trained,
        peak_memory_bytes=400 * 2**20 + 40 * trained,
        best={} if best_step is None else {"bits_per_byte": trial.values[best_step], "step": best_step},
        files={"best/adapter_model.safetensors": {"bytes": 4 * trained, "sha256": "0" * 64}},
    )
    for name, value in values.items():
        setattr(record, name, value)
    (folder / trial.run).mkdir(parents=True, exist_ok=True)
    write_record(record, folder / trial.run)


def lora_trials(count, rng):
    """Returns lora trials: every third stopped, the fifth failed, the others complete."""
    made = []
    for number in range(count):
        rank, alpha = rng.choice(LORA_SPACE["method.rank"]), rng.choice(LORA_SPACE["method.alpha"])
        lr = 10 ** rng.uniform(-3, math.log10(3e-2))
        params = {"method.rank": rank, "method.alpha": alpha, "optim.lr": lr}
        # as of a tiny model: falls with rank, best where lr · √(α/16) is about 0.012
        score = 1.68 + 0.11 * rank**-0.6 + 0.09 * math.log10(lr * (alpha / 16) ** 0.5 / 0.012) ** 2
        score += rng.gauss(0, 0.004)
        state = "failed" if number == 4 else "stopped" if number % 3 == 2 else "complete"
        curve = {"failed": [], "stopped": curve_to(score)[:3], "complete": curve_to(score)}[state]
        reasons = {"failed": "The loss became NaN at step 12.", "stopped": "has learned nothing at step 50"}
        made.append(make_trial("lora", number, params, curve, state=state, reason=reasons.get(state)))
    return made


def full_trials(count):
    """Returns complete full fine-tuning trials on a grid of learning rates."""
    rates = [10 ** (-4 + 1.7 * number / max(count - 1, 1)) for number in range(count)]
    curves = [curve_to(1.662 + 0.12 * math.log10(lr / 1.1e-3) ** 2) for lr in rates]
    return [make_trial("full", number, {"optim.lr": lr}, curves[number]) for number, lr in enumerate(rates)]


def build_sweep(folder, *, lora=18, full=6, frozen=1, name="quickstart"):
    """Writes a sweep's folder with that many trials per arm (an arm of 0 trials is left out) and returns it."""
    rng = random.Random(7)
    base = make_trial("frozen", 0, {}, [(0, BASE_SCORE)])
    trials = {"frozen": [base][:frozen], "lora": lora_trials(lora, rng), "full": full_trials(full)}
    spaces = {"frozen": {}, "lora": LORA_SPACE, "full": FULL_SPACE}
    for arm, rows in trials.items():
        for row in rows:
            write_run(folder, row, method=arm)
    folder.mkdir(parents=True, exist_ok=True)
    write_record(
        SweepRecord(
            status="complete",
            name=name,
            description="Rank, α and learning rate for LoRA on English prose, beside full fine-tuning.",
            search_metric=ScoreMetric(name="bits_per_byte", direction="minimize"),
            margin="5%",
            definition={},
            arms=[
                ArmRow(name=arm, method=arm, trials=len(rows), settings={"method": arm}, space=spaces[arm])
                for arm, rows in trials.items()
                if rows
            ],
            trials=[row for rows in trials.values() for row in rows],
            started_at="2026-11-24T10:00:00+00:00",
            ended_at="2026-11-24T10:02:31+00:00",
            makespan_s=151.2,
        ),
        folder,
    )
    return folder


def confirm_sweep(folder, *, seeds=5, examples=40, noise=0.004):
    """Adds a confirm stage to a sweep built by `build_sweep`: the setting of each subject on that many seeds.

    Test scores are the setting's validation score plus noise; single examples have scores unless `examples` is 0.
    """
    rng = random.Random(11)
    sweep = read_sweep(folder)
    difficulty = [rng.gauss(0, 0.3) for _ in range(examples)]
    for arm in sweep.arms:
        numbers = iter(range(1000))
        for setting in list_settings(sweep, arm):
            sweep.settings.append(setting)
            for seed in range(1 if arm.is_base else seeds):
                value = (setting.score or 0.0) + (0 if arm.is_base else rng.gauss(0, noise))
                number = next(numbers)
                # an example is as hard in every run, with a little noise of the run's own
                scores = [value + hardness + rng.gauss(0, 0.01) for hardness in difficulty]
                value = sum(scores) / len(scores) if scores else value
                run = make_trial(
                    arm.name,
                    number,
                    setting.params,
                    curve_to(value)[: 1 if arm.is_base else None],
                    stage="confirm",
                    subject=setting.subject,
                    setting_number=setting.setting,
                    seed=seed,
                    test_scores={sweep.search_metric.name: value},
                    run=name_run("confirm", arm.name, number),
                )
                rank = arm.settings.get("method.rank", 0)
                write_run(folder, run, method=arm.method, rank=rank, test={sweep.search_metric.name: value})
                if scores:  # all with the same weight, two to a group
                    lines = [f"{row},{score!r},1.0,document {row // 2}" for row, score in enumerate(scores)]
                    text = "\n".join(["row,score,weight,group", *lines, ""])
                    (folder / run.run / "test_scores.csv").write_text(text)
                sweep.confirm.append(run)
    sweep.confirm_seeds, sweep.looks = list(range(seeds)), [seeds]
    sweep.questions = list_questions(sweep)
    write_record(sweep, folder)
    return folder


def list_settings(sweep, arm):
    """Returns the best complete trial of an arm, or that of each value of its `confirm_each` key as if predicted."""
    settings = []
    for number, subject in enumerate(arm.subjects):
        best = find_winner((row for row in sweep.trials if row.subject == subject.name), record=sweep)
        if best is None:
            continue
        params = dict(best.params)
        if arm.key:  # beside the trial, so that nothing was tried there
            params["optim.lr"] = float(f"{1.02 * params['optim.lr']:.3g}")
        setting = SettingRow(
            subject=subject.name,
            arm=arm.name,
            setting=number,
            params=params,
            trial=None if arm.key else best.number,
            score=best.search_score,
            regret=0.0 if arm.is_base else 0.001,
        )
        settings.append(setting)
    return settings


def list_questions(sweep):
    """Returns the questions that the controller states for these settings."""
    subjects = {arm.name: [row.subject for row in sweep.settings if row.arm == arm.name] for arm in sweep.arms}
    full = next((arm.name for arm in sweep.arms if arm.method == "full" and subjects[arm.name]), None)
    trained = [arm for arm in sweep.arms if arm.method == "lora" and subjects[arm.name]]
    asked = [("as_good_as_full", arm, full) for arm in trained if full] + [
        ("smallest", arm, None) for arm in trained if arm.key
    ]
    return [
        Question(name=name, arm=arm.name, key=arm.key, subjects=subjects[arm.name], reference=reference)
        for name, arm, reference in asked
    ]


def build_rank_sweep(folder, scores, *, fixed=None, seeds=5, examples=0, noise=0.002):
    """Writes a confirmed sweep with frozen, full, and one lora arm with `confirm_each: method.rank`.

    With the score `fixed` there is also an arm of LoRA whose settings are fixed.

    Each rank has five trials on a parabola over the learning rate, without noise, whose best score is given; confirm
    runs have noise.
    """
    build_sweep(folder, lora=0)
    sweep = read_sweep(folder)
    space = {"method.rank": list(scores), "optim.lr": {"low": 1e-3, "high": 1e-1, "log": True}}
    arm = ArmRow(
        name="lora",
        method="lora",
        trials=5 * len(scores),
        settings={"method": "lora", "method.alpha": 16},
        space=space,
        subjects=[Subject(arm="lora", key="method.rank", value=rank) for rank in sorted(scores)],
    )
    sweep.arms.append(arm)
    for rank, score in scores.items():
        for place in range(5):
            number, lr = len(sweep.trials), 0.01 * 10 ** ((place - 2) / 2)
            value = score + 0.05 * math.log10(lr / 0.01) ** 2
            row = make_trial(
                "lora",
                number,
                {"method.rank": rank, "optim.lr": lr},
                curve_to(value),
                subject=Subject(arm="lora", key="method.rank", value=rank).name,
            )
            write_run(folder, row, method="lora")
            sweep.trials.append(row)
    if fixed is not None:
        settings = {"method": "lora", "method.rank": 32, "method.alpha": 16}
        sweep.arms.append(ArmRow(name="present", method="lora", trials=1, settings=settings, space={}))
        row = make_trial("present", len(sweep.trials), {}, curve_to(fixed))
        write_run(folder, row, method="lora", rank=32)
        sweep.trials.append(row)
    write_record(sweep, folder)
    return confirm_sweep(folder, seeds=seeds, examples=examples, noise=noise)


def drop_full(sweep):
    """Leaves full fine-tuning out of a sweep's record."""

    def drop(raw):
        for name in ("arms", "trials", "settings", "confirm"):
            raw[name] = [row for row in raw[name] if row.get("arm", row.get("name")) != "full"]
        raw["questions"] = [row for row in raw["questions"] if row["reference"] != "full"]

    edit_json(sweep / "sweep.json", drop)


def report(folder):
    """Writes the report of a sweep and returns its findings."""
    findings = read_findings(folder)
    write_report(findings)
    return findings


def scatter_seeds(sweep, subject, spread):
    """Moves the scores of a subject's seeds apart."""

    def change(raw):
        for place, row in enumerate(row for row in raw["confirm"] if row["subject"] == subject):
            row["test_scores"]["bits_per_byte"] += spread * (-1) ** place

    edit_json(sweep / "sweep.json", change)
    return sweep


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """Returns the folder of a finished sweep of 25 trials, which no test may change."""
    return build_sweep(tmp_path_factory.mktemp("finished") / "quickstart")


@pytest.fixture(scope="session")
def finished_and_confirmed(tmp_path_factory):
    """Returns the folder of the same sweep with a confirm stage of 5 seeds and 40 test examples."""
    return confirm_sweep(build_sweep(tmp_path_factory.mktemp("confirmed") / "quickstart"))


# Copies: to write a sweep takes longer, because each record waits for the disk.
@pytest.fixture
def sweep(finished, tmp_path):
    """Returns the folder of a finished sweep of 25 trials, which the test may change."""
    return shutil.copytree(finished, tmp_path / "quickstart")


@pytest.fixture
def confirmed(finished_and_confirmed, tmp_path):
    """Returns the folder of a confirmed sweep, which the test may change."""
    return shutil.copytree(finished_and_confirmed, tmp_path / "quickstart")


def confirm_winners(folder):
    """Makes the confirmed settings of a changed sweep those of the trials that win now."""
    record = read_sweep(folder)
    for setting in record.settings:
        winner = find_winner((row for row in record.trials if row.arm == setting.arm), record=record)
        if winner is not None:
            setting.trial, setting.params, setting.score = winner.number, winner.params, winner.search_score
    write_record(record, folder)
