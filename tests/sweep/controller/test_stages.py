"""After the search each arm's best settings run on fresh seeds and are scored once on test data, whatever happens."""

import pytest
from tests.sweep.conftest import NoInputs

from lorasweep.errors import Diverged, OutOfMemory
from lorasweep.record import read_run, read_sweep
from lorasweep.sweep.controller.lifecycle import reopen_sweep

ASKED = {"frozen": 1, "full": 3, "lora": 3}


@pytest.fixture
def confirming(three_arms):
    """A sweep with three seeds in its confirm stage."""
    three_arms["settings"]["confirm.seeds"] = 3
    three_arms["arms"]["lora"]["trials"] = 4
    return three_arms


def counts(path):
    arms = [row.arm for row in read_sweep(path).confirm]
    return {arm: arms.count(arm) for arm in arms}


def score_by_rate(config, step=None):
    return 1.0 if config.method.name == "frozen" else config.optim.lr


def test_each_arms_best_settings_run_on_the_same_fresh_seeds_after_the_search(begin, work, runs, confirming):
    inputs_cache = NoInputs()

    def score(config, step):
        if len(runs.begun) <= 8:
            assert inputs_cache.test_reads == 0  # nothing of the test split is read before the search is over
        return score_by_rate(config)

    runs.score = score
    folder = begin(confirming)
    assert work(folder, inputs_cache=inputs_cache)
    assert inputs_cache.test_reads > 0
    record = read_sweep(folder.path)
    assert record.status == "complete"
    assert counts(folder.path) == ASKED
    assert len(record.confirm_seeds) == 3
    for arm in ("full", "lora"):
        winner = min((row for row in record.trials if row.arm == arm), key=lambda row: (row.search_score, row.number))
        assert [row.trial for row in record.settings if row.subject == arm] == [winner.number]
        rows = [row for row in record.confirm if row.arm == arm]
        assert [row.seed for row in rows] == record.confirm_seeds
        for number, row in enumerate(rows):
            assert (row.state, row.reason, row.run) == ("complete", None, f"runs/{arm}-confirm-{number:04d}")
            config = runs.configs[folder.path / row.run]
            assert config.optim.lr == winner.params["optim.lr"]
            assert getattr(config.method, "rank", None) == winner.params.get("method.rank")
            assert {config.seed, config.seeds.init, config.seeds.data_order, config.seeds.dropout} == {row.seed}
            assert row.search_score == read_run(folder.path / row.run).best["bits_per_byte"]
            assert row.test_scores == {"bits_per_byte": row.search_score + 1}
    assert [row.seed for row in record.confirm if row.arm == "frozen"] == record.confirm_seeds[:1]


def test_a_stopped_trial_is_no_winner_and_confirm_runs_are_not_stopped(begin, work, runs, confirming):
    confirming["settings"] |= {"trainer.max_steps": 4, "trainer.eval_every_steps": 2}
    folder = begin(confirming, "arms.lora.trials=8", constant_answer={"bits_per_byte": 0.01})
    runs.score = score_by_rate
    assert work(folder)
    record = read_sweep(folder.path)
    lora = [row for row in record.trials if row.arm == "lora"]
    assert {row.state for row in lora} == {"complete", "stopped"}
    (chosen,) = [row for row in record.settings if row.arm == "lora"]
    assert lora[chosen.trial].state == "complete"
    assert {row.state for row in record.confirm} == {"complete"}


def test_nothing_is_confirmed_if_no_trial_is_better_than_an_answer_without_training(begin, work, runs, confirming):
    confirming["settings"] |= {"trainer.max_steps": 4, "trainer.eval_every_steps": 2}
    folder = begin(confirming, "sweep.max_failures=100", constant_answer={"bits_per_byte": 1.0})

    def score(config, step):
        if config.method.name == "full":  # what a run had before it diverged does not count
            return 0.5 if step == 2 else fail()
        return 1.0 if config.method.name == "frozen" else 1.0 + config.optim.lr

    def fail():
        raise Diverged("the training loss became NaN")

    runs.score = score
    assert work(folder)
    record = read_sweep(folder.path)
    assert (record.status, record.confirm, record.confirm_seeds, record.looks) == ("complete", [], [], [])
    assert any("nothing was confirmed" in warning for warning in record.warnings)
    runs.score = score_by_rate  # more trials that learn something are confirmed
    grown = reopen_sweep(folder.path, changes={"arms.lora.trials": 8})
    assert work(grown)
    assert counts(folder.path)["lora"] == 3


def test_a_finished_search_gets_the_stage_later_and_more_seeds_later_still(begin, work, runs, confirming):
    whole, folder = begin(confirming, folder="whole"), begin(confirming, "confirm.seeds=0")
    assert work(whole)
    assert work(folder)
    trials = read_sweep(folder.path).trials
    for seeds in (2, 3):
        assert work(reopen_sweep(folder.path, changes={"confirm.seeds": seeds}))
        assert read_sweep(folder.path).trials == trials
        assert counts(folder.path) == {"frozen": 1, "full": seeds, "lora": seeds}
    expected, found = read_sweep(whole.path), read_sweep(folder.path)
    assert (found.confirm, found.settings, found.confirm_seeds) == (
        expected.confirm,
        expected.settings,
        expected.confirm_seeds,
    )


@pytest.mark.parametrize(
    ("error", "state"), [(Diverged("the training loss became NaN"), "failed"), (OutOfMemory("2 GiB"), "infeasible")]
)
def test_a_seed_that_can_not_be_trained_or_scored_keeps_its_row_and_stops_nothing(
    begin, work, runs, confirming, error, state
):
    def fail(config, step=None):
        if step is None or config.seed:
            raise error
        return score_by_rate(config)

    setattr(runs, "score" if state == "failed" else "score_on_test", fail)
    # a seed that diverges is a result of the sweep and no fault of it
    folder = begin(confirming, f"sweep.max_failures={2 if state == 'failed' else 100}")
    assert work(folder)
    rows = read_sweep(folder.path).confirm
    assert {(row.state, row.search_score, row.reason) for row in rows} == {(state, None, str(error))}
    assert counts(folder.path) == ASKED
    begun = len(runs.begun)
    assert work(reopen_sweep(folder.path))
    assert len(runs.begun) == begun


def test_an_arm_without_a_complete_trial_is_left_out_and_said_so(begin, work, runs, confirming):
    def score(config, step):
        if config.method.name == "full":
            raise Diverged("the training loss became NaN")
        return score_by_rate(config)

    runs.score = score
    folder = begin(confirming, "sweep.max_failures=100")
    assert work(folder)
    assert counts(folder.path) == {"frozen": 1, "lora": 3}
    for _ in range(2):  # once in the record, also after the sweep is resumed
        assert sum("`full` has no trial with a score" in said for said in read_sweep(folder.path).warnings) == 1
        assert work(reopen_sweep(folder.path))


@pytest.fixture
def packed(confirming):
    """Two arms whose trials and seeds share packs of two."""
    confirming["settings"]["worker.pack_size"] = 2
    confirming["arms"]["other"] = confirming["arms"]["lora"] | {"trials": 2}
    return confirming


def test_seeds_of_different_arms_share_even_packs_and_are_scored_after_them(begin, work, runs, packed):
    folder = begin(packed, "worker.pack_size=4")
    assert work(folder)
    confirmed = [[name.partition("-confirm")[0] for name in pack] for pack in runs.begun if "-confirm" in pack[0]]
    assert sorted(confirmed) == [["frozen"], ["full"], ["full"], ["full"], ["lora"] * 3, ["other"] * 3]
    assert [len(pack) for pack in confirmed] == [3, 3, 1, 1, 1, 1]  # the large ones first
    assert counts(folder.path) == ASKED | {"other": 3}
    assert len(runs.scored) == 10
