"""A step of a pack of the embedded model dispatches no more operators than it did."""

import pytest
from bench_operators import MIXED, build_config, count_pack_step, write_model

from lorasweep.training.inputs import load_inputs

# Upper bounds, which may only fall. To renew them after a change that needs fewer operators, write the new totals here.
# They are those of torch 2.13 and the transformers of constraints.txt. If only such a version has changed, check out
# the last green commit, run this test with the new version, and write its totals here first.
TOTALS = {
    ("equal", 1, 0.0): 679,
    ("equal", 8, 0.0): 694,
    ("mixed", 8, 0.0): 875,
    ("mixed", 32, 0.0): 947,
    ("mixed", 8, 0.1): 1093,
    ("mixed", 32, 0.1): 1165,
}


@pytest.fixture(scope="module")
def tiny_inputs(tmp_path_factory):
    settings = write_model("tiny", tmp_path_factory.mktemp("tiny"))
    return settings, load_inputs(build_config(settings))


@pytest.mark.parametrize(("kind", "slots", "dropout"), TOTALS)
def test_the_operators_of_a_step_only_fall(tiny_inputs, kind, slots, dropout):
    settings, inputs = tiny_inputs
    ranks = [8] * slots if kind == "equal" else [MIXED[slot % len(MIXED)] for slot in range(slots)]
    found = count_pack_step(ranks, inputs, {**settings, "method.dropout": dropout})
    assert found.total() <= TOTALS[kind, slots, dropout], dict(found)
