"""The coordinate u joins learning rates of every rank and α; users only ever see learning rates inside their range."""

import math
from collections import Counter

import pytest
from tests.sweep.controller.conftest import ask_for_proposal, make_arm, make_trial

from lorasweep.config.sweep import NamedSampler
from lorasweep.sweep.controller.encoding import SpaceEncoding, build_rate_law, draw_sobol_point
from lorasweep.sweep.definition.arms import read_definition
from lorasweep.sweep.definition.ranges import Range

RANKS = [1, 4, 16, 64]
LR = Range(low=1e-4, high=1e-2, log=True)
RANK_AND_RATE = {"method.rank": Range(choices=RANKS), "optim.lr": LR}
QMC = NamedSampler(name="qmc")


@pytest.fixture
def build_law(write_file, content):
    """Returns the rate law of an arm with these settings and this space."""

    def build(settings, space):
        settings = {"method": "lora", **settings}
        content["arms"] = {"arm": {"settings": settings, "space": space, "trials": 4}}
        return build_rate_law(read_definition(write_file(content)).arms[0])

    return build


RATES = {"optim.lr": {"low": 1e-4, "high": 1e-2, "log": True}}


@pytest.mark.parametrize(
    ("settings", "space", "params", "expected"),
    [
        ({}, {"method.rank": RANKS}, {"method.rank": 64}, 16),  # s · r is α, whatever the rank
        ({"method.alpha": 4, "method.rank": 8}, {}, {}, 4),
        ({}, {"method.alpha": [1, 9]}, {"method.alpha": 9}, 9),
        ({"method.scaling": "alpha", "method.alpha": 2}, {"method.rank": RANKS}, {"method.rank": 16}, 32),
        ({"method.scaling": "alpha"}, {"method.alpha": [1, 2]}, {"method.alpha": 2}, 16),  # the default rank is 8
        ({"method.scaling": "alpha_over_sqrt_rank"}, {"method.rank": RANKS}, {"method.rank": 64}, 16 * math.sqrt(64)),
        ({"optim.lr_ratio_b": 16}, {"method.rank": RANKS}, {"method.rank": 4}, 16 * 16),
        ({}, {"optim.lr_ratio_b": [1, 4]}, {"optim.lr_ratio_b": 4}, 16 * 4),
        ({}, {"method.alpha": [0, 16]}, {"method.alpha": 0}, 1),
        ({"optim": "adamw"}, {}, {}, 16),
        # without a scaling, and with another optimizer than Adam, u is the learning rate
        *((settings, {}, {}, 1) for settings in ({"method": "full"}, {"method": "intrinsic"}, {"optim": "sgd"})),
    ],
)
def test_u_is_the_rate_times_the_root_of_scaling_rank_and_ratio(build_law, settings, space, params, expected):
    law = build_law(settings, {**space, **RATES})
    assert law.factor({**params, "optim.lr": 1e-3}) == pytest.approx(math.sqrt(expected))


SPACES = {
    "rank": RANK_AND_RATE,
    "factor": RANK_AND_RATE | {"method.alpha": Range(choices=[0.5, 1, 4]), "method.scaling": Range(choices=["alpha"])},
    "alpha": RANK_AND_RATE | {"method.alpha": Range(low=1, high=64, log=True)},
    "rank range": {"method.rank": Range(low=1, high=64, log=True, is_whole=True), "optim.lr": LR},
    "scaling": RANK_AND_RATE | {"method.scaling": Range(choices=["alpha_over_rank", "alpha_over_sqrt_rank"])},
    "ratio": RANK_AND_RATE | {"optim.lr_ratio_b": Range(low=1, high=16, log=True)},
    "choices of rates": {"method.rank": Range(choices=RANKS), "optim.lr": Range(choices=[0.1, 1])},
}


def encode_space(space, sampler=QMC):
    return SpaceEncoding(space, law=build_rate_law(make_arm(space, sampler)))


@pytest.mark.parametrize("name", SPACES)
def test_points_come_back_as_the_parameters_that_they_were(name):
    encoding = encode_space(SPACES[name])
    for index in range(32):
        params = encoding.decode(draw_sobol_point(encoding, index, seed=0))
        again = encoding.decode(encoding.encode(params))
        # u is the rate times a factor and divided by it again: two roundings
        assert again == {
            key: pytest.approx(value, rel=1e-15) if key == "optim.lr" else value for key, value in params.items()
        }


SAMPLERS = {
    "tpe": NamedSampler(name="tpe"),
    "gp": NamedSampler(name="gp"),
    "qmc": QMC,
}


@pytest.mark.parametrize(("name", "sampler"), [("factor", "qmc"), ("alpha", "tpe"), ("ratio", "gp")])
def test_no_proposal_leaves_the_range_of_rates(name, sampler):
    arm, trials = make_arm(SPACES[name], SAMPLERS[sampler], trials=12), []
    for number in range(12):
        params = ask_for_proposal(arm, trials)
        assert LR.low <= params["optim.lr"] <= LR.high
        trials.append(make_trial(params, search_score=float(number % 5)))


def test_sobol_points_have_every_octave_of_u_and_every_rank_once_per_group():
    space = {"method.rank": Range(choices=RANKS), "optim.lr": LR}
    encoding = encode_space(space)
    points = [draw_sobol_point(encoding, index, seed=0) for index in range(64)]
    low, high = encoding.ranges["optim.lr"].low, encoding.ranges["optim.lr"].high
    octaves = Counter(int(math.log2(point["optim.lr"] / low)) for point in points)
    whole = int(math.log2(high / low))  # the last part is shorter than an octave
    per_octave = 64 / math.log2(high / low)
    # 64 points have one in each 64th of the range, so a part has at most one more or less at each end
    assert all(abs(octaves[octave] - per_octave) <= 2 for octave in range(whole))
    for start in range(0, 64, len(RANKS)):
        ranks = [encoding.decode(point)["method.rank"] for point in points[start : start + len(RANKS)]]
        assert sorted(ranks) == RANKS


def test_a_model_does_not_repeat_a_rate_that_was_moved_into_its_range():
    """Two points beyond an end of the range are the same setting."""
    space = SPACES["factor"]
    arm = make_arm(space, SAMPLERS["gp"], trials=24)
    trials, seen = [], []
    for _ in range(16):
        params = ask_for_proposal(arm, trials)
        cost = -math.log(params["optim.lr"]) - math.log(params["method.rank"])  # the best is beyond the range
        trials.append(make_trial(params, search_score=cost))
        seen.append((params["method.rank"], params["method.alpha"], f"{params['optim.lr']:.2g}"))
    assert len(set(seen)) == len(seen)
