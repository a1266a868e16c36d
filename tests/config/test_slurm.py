"""No setting of Slurm workers is out of range, and none can write a line of its own into the batch file."""

from __future__ import annotations

import pytest

from lorasweep.config.compose import compose_driver
from lorasweep.errors import ConfigError


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num": 0}, "`worker.num >= 1` must hold, but got 0."),
        ({"pack_size": 0}, "`worker.pack_size >= 1` must hold, but got 0."),
        ({"lease_s": 1}, "`worker.lease_s >= 2` must hold, but got 1"),
        ({"time_min": 0}, "`worker.time_min >= 1` must hold, but got 0."),
        ({"nodes": 0}, "`worker.nodes >= 1` must hold, but got 0."),
        ({"tasks_per_node": 0}, "`worker.tasks_per_node >= 1` must hold, but got 0."),
        ({"cpus": 0}, "`worker.cpus >= 1` must hold, but got 0."),
        ({"gpus": -1}, "`worker.gpus >= 0` must hold, but got -1."),
        ({"mem_gb": 0}, "`worker.mem_gb > 0` must hold, but got 0.0. Leave it out for the default."),
        ({"signal_s": 0}, "`worker.signal_s >= 1` must hold, but got 0."),
        ({"time_min": 2}, "`worker.signal_s < 120` must hold, the seconds of `worker.time_min`, but got 120."),
        ({"partition": "a\nb"}, r"`worker.partition` must be one line of text, but got 'a\\nb'."),
        ({"account": " "}, "`worker.account` must be one line of text, but got ' '."),
        ({"setup": ["module load a", "b\nc"]}, r"`worker.setup\[1\]` must be one line of text, but got 'b\\nc'."),
        ({"extra": {"mail-user": "me\nrm x"}}, r"`worker.extra.mail-user` must be one line of text, but got"),
        (
            {"extra": {"mail_type": "END"}},
            "`worker.extra` must have long names of sbatch's options .* 'mail_type'. Wri",
        ),
        ({"extra": {"time": 5}}, "`worker.extra` must hold .* no key of their own, but got 'time'. Set `worker.time_m"),
        ({"extra": {"output": "x"}}, "`worker.extra` must hold .* but got 'output'. Leave it out: lorasweep needs it"),
        ({"extra": {"nice": 1.5}}, "`worker.extra.nice` must be a text, but got 1.5."),
        ({"partitions": "a"}, r"`worker.partitions` is not a setting. Did you mean `worker.partition`\?"),
    ],
)
def test_a_setting_of_slurm_workers_out_of_range_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        compose_driver({"worker": "slurm", **{f"worker.{key}": value for key, value in settings.items()}})


def test_more_options_of_sbatch_keep_their_kinds():
    driver = compose_driver({"worker": "slurm", "worker.extra": {"nice": 5, "exclusive": True, "reservation": "a b"}})
    assert driver.worker.extra == {"nice": 5, "exclusive": True, "reservation": "a b"}
