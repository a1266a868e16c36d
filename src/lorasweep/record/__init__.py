"""Records on disk: one class each for a run, a trial and a sweep, with which other packages read and write them.

`run.json` is the record of a run and `steps.jsonl` the log of its steps, to which `training/open_run.py` appends.
`sweep.json` is the record of a sweep with all of its trials.
"""

from lorasweep.record.json_file import MAX_NUMBER, dump_row, is_number, write_record
from lorasweep.record.run import (
    ANSWERS_FILE,
    RETAINED_SCORES_FILE,
    RUN_FILE,
    STEPS_FILE,
    TEST_SCORES_FILE,
    RunRecord,
    RunStatus,
    compute_sha256,
    read_last_step,
    read_run,
    read_steps,
    restore_config,
    utc_now,
)
from lorasweep.record.sweep import (
    JOURNAL_FILE,
    MAX_LOOKS,
    SWEEP_FILE,
    ArmRow,
    LookRow,
    Question,
    QuestionName,
    RetainedRow,
    SettingRow,
    SweepChange,
    SweepRecord,
    SweepState,
    count_seeds_due,
    describe_confirmation,
    find_winner,
    get_run_folder,
    list_confirm_runs,
    read_sweep,
)
from lorasweep.record.trial import COST_FIELDS, STATES, Stage, Subject, Trial, TrialState, build_frame, name_run
