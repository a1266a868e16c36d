"""Mistakes that people make: each is one sentence with the key and the remedy, exit code 2, and changes nothing."""

import json

import pytest
import yaml
from tests.files import list_names
from tests.small_runs import MINI

from lorasweep.cli import run
from lorasweep.outcome import WRONG_REQUEST

MODEL = "model.path=embedded:tiny"
CLASSIFIER = ["train", "model=classifier", MODEL, "data=table"]
TABLE = ["sweep", "sentences", MODEL, "data.train=rows.csv"]
TYPOS = [
    (["sweep", "quickstat"], ["Did you mean `quickstart`?"]),
    (["plan", "mini.yml"], ["but 'mini.yml' does not. Did you mean `mini.yaml`?"]),
    (["sweep", "quickstart", "method.rnak=4"], ["`method.rnak`", "Did you mean `method.rank`?"]),
    (["sweep", "quickstart", "optim.learning_rate=1e-3"], ["`optim.learning_rate`", "Did you mean `optim.lr`?"]),
    (["sweep", "quickstart", "lora_r=4"], ["`lora_r`", "Did you mean `method.rank`?"]),
    (["sweep", "quickstart", "method.lora_alpha=4"], ["Did you mean `method.alpha`?"]),
    (["sweep", "quickstart", "trials=4"], ["Did you mean `sweep.trials`?"]),
    (["sweep", "quickstart", "arms.lora.trails=3"], ["`arms.lora.trails`", "Did you mean `trials`?"]),
    (["sweep", "quickstart", "arms.lroa.trials=3"], ["Did you mean `arms.lora.trials`?"]),
    (["swep", "quickstart"], ["must get a command", "Did you mean `sweep`?"]),
    (["sweep", "quickstart", "arms.fulll=null"], ["`arms.fulll=null`", "Did you mean `arms.full`?"]),
    (["sweep", "quickstart", "worker=slrum"], ["`worker`", "local, ray, slurm", "Did you mean `slurm`?"]),
    (["sweep", "quickstart", "sampler=tpee"], ["`sampler`", "Did you mean `tpe`?"]),
    (["sweep", "spaces.yaml"], ["arm `lora`", "`method.rnak`", "Did you mean `method.rank`?"]),
    (["train", "metod=lora"], ["`metod`", "Did you mean `method`?"]),
    (["train", "method=lroa"], ["`method`", "Did you mean `lora`?"]),
    (["train", "trainer.max_step=3"], ["Did you mean `trainer.max_steps`?"]),
    (["train", "logger=[csv,wand]"], ["`logger`", "Did you mean `wandb`?"]),
    (["help", "optm"], ["Did you mean `optim`?"]),
    (["help", "data=tabel"], ["Did you mean `data=table`?"]),
    (["help", "method.rnk"], ["Did you mean `method.rank`?"]),
    (["help", "a" * 5000 + ".b"], ["must get a setting, a group, a command or a sweep, but got 'aaa"]),
    (["new", "a.yaml", MODEL, "data.trian=rows.csv"], ["`data.trian`", "Did you mean `data.train`?"]),
    (["sweep", MODEL, "data.trian=rows.csv"], ["`data.trian`", "Did you mean `data.train`?"]),
    (["sweep", MODEL, "data.train=rows.csv", "optim.learning_rate=1"], ["Did you mean `optim.lr`?"]),
    (["export", "fulll", "--format", "peft", "--out", "out"], ["but 'fulll' does not. Did you mean `full`?"]),
]
TYPES = [
    (["train", "trainer.max_steps=many"], ["`trainer.max_steps` must be a whole number", "'many'"]),
    (["train", "optim.lr=high"], ["`optim.lr` must be a number", "'high'"]),
    (["train", "trainer.progress=maybe"], ["`trainer.progress` must be true or false"]),
    (["train", "seed=-1"], ["`seed", ">= 0"]),
    (["sweep", "quickstart", "confirm.seeds=three"], ["`confirm.seeds`", "'three'"]),
    (["sweep", "quickstart", "confirm.margin=small"], ["`confirm.margin`", "such as `5%`"]),
    (["sweep", "quickstart", "method.rank"], ["`key=value`", "method.rank"]),
    (["new", "a.yaml", MODEL], ["`data.train=FILE`", "but got `model.path`"]),
    (["new", "none/a.yaml", MODEL, "data.train=rows.csv"], ["the folder of `FILE.yaml` must exist, but 'none'"]),
]
RANGES = [
    (["train", "method.rank=0"], ["`method.rank >= 1` must hold, but got 0"]),
    (["train", "optim.lr=-1"], ["`optim.lr > 0` must hold"]),
    (["sweep", "quickstart", "confirm.seeds=2000"], ["`confirm.seeds"]),
    (["sweep", "quickstart", "confirm.margin=200%"], ["`confirm.margin`"]),
    (["sweep", "quickstart", "sweep.epochs=0"], ["`sweep.epochs > 0` must hold"]),
    (["sweep", "quickstart", "arms.lora.optim.lr={low: 1e-2, high: 1e-4}"], ["the range of `optim.lr`", "Swap them."]),
    (["sweep", "quickstart", "arms.lora.method.rank=[]"], ["the range of `method.rank`", "at least one choice"]),
    (["sweep", "quickstart", "arms.lora.method.rank=[4,4]"], ["the range of `method.rank`", "no choice twice"]),
]
FILES = [
    ([*CLASSIFIER, "data.train=row.csv"], ["`data.train`", "Did you mean `rows.csv`?"]),
    ([*CLASSIFIER, "data.train=full/mime.txt"], ["`data.train`", "Did you mean `full/mine.txt`?"]),
    (["sweep", "sentences", MODEL, "data.train=row.csv"], ["`data.train`", "Did you mean `rows.csv`?"]),
    (["new", "a.yaml", MODEL, "data.train=row.csv"], ["`data.train`", "Did you mean `rows.csv`?"]),
    (["sweep", MODEL, "data.train=row.csv"], ["`data.train`", "Did you mean `rows.csv`?"]),
    ([*TABLE, "data.test=rows.csv"], ["`data.train`, `data.validation` and `data.test` must be different"]),
    ([*TABLE, "data.test=tests.csv"], ["`data.test` must name an existing file"]),
    (["new", "a.txt", "data.train=rows.csv"], ["suffix .yaml, but got 'a.txt'"]),
    (["new", "mini.yaml", "data.train=rows.csv"], ["exists already. Remove it, or name another one."]),
    (["new", "a.yaml", "--like", "no.yaml"], ["a training file must be a YAML file", "no.yaml"]),
    (["new", "a.yaml", "--like", "mini.yaml"], ["must be a training file of axolotl, TRL or LLaMA-Factory"]),
    (["sweep", "./notes.txt"], ["notes.txt: `just words` is not a setting."]),
    (["sweep", "rows.csv"], ["Name data by `data.train=rows.csv`."]),
    (["sweep", "mini.yaml", "model=causal_lm", "model.path=./no/model"], ["`model.path` must be"]),
    (["train", "model.path=embedded:big"], ["`model.path` must name an embedded model (tiny)"]),
    (["status", "."], ["a sweep's folder must contain sweep.json, but '.' does not."]),
    (["compare", "nowhere"], ["nowhere"]),
    (["sweep", "--resume", "nowhere"], ["a sweep's folder must exist, but 'nowhere' does not."]),
    (["status", "don"], ["but 'don' does not. Did you mean `done`?"]),
    (["status"], ["`DIR` must name the folder of a sweep, because the folder `outputs` has none."]),
    (["reproduce", "full"], ["a run's folder must contain run.json, but 'full' does not."]),
    (["train", "data.train=https://me:open-sesame@host/a.csv", "data=table"], ["but got 'https://***@host/a.csv'."]),
    (["sweep", "mini.yaml", "model.path=https://me:open-sesame@host"], ["`model.path` must not contain a password"]),
]
COLUMNS = [
    ([*TABLE, "data.text=tekst"], ["`data.text` must be a column", "Did you mean `text`?"]),
    ([*TABLE, "data.label=lable"], ["`data.label` must be a column", "Did you mean `label`?"]),
    (["new", "a.yaml", MODEL, "data.train=rows.csv", "data.group=autor"], ["`data.group`", "Did you mean `author`?"]),
    (
        ["sweep", "conversations", MODEL, "data.train=chat.jsonl", "data.prompt=prompt", "data.completion=anser"],
        ["Did you mean `answer`?"],
    ),
]
ORDERS = [
    (["sweep"], ["(`data.train=FILE`, or `data.path=HUB-ID data.train=SPLIT`), but got nothing."]),
    (["sweep", "done"], ["To resume it, or to add to it, type `lorasweep sweep --resume done`."]),
    (["plan", "./done"], ["`lorasweep sweep --resume ./done`"]),
    (["sweep", "quickstart", "--resume", "done"], ["must be left out with `--resume`"]),
    (["sweep", "--resume", "done", "--minutes", "5"], ["`--minutes` must be left out with `--resume`"]),
    (["export", "done", "--format", "peft", "--into", "a.yaml"], ["`--into` must come with `--format`"]),
    (["train", "output=full"], ["`output` must be a new or empty folder, but 'full' is not."]),
    (["sweep", "mini.yaml", "sweep.output=full"], ["`sweep.output` must be a new or empty folder, but 'full' is not."]),
    (["train", "resume=true"], ["`resume=true` must come with `output=DIR`"]),
    (["train", "method=full", "model.quantization=nf4"], ["`model.quantization` must be none with `method=full`"]),
    (["train", "method=full", "optim.lr_ratio_b=4"], ["`optim.lr_ratio_b` must be 1 unless `method=lora`"]),
    (["sweep", "quickstart", "arms.lora.confirm_each=method.alpha"], ["`arms.lora.confirm_each`", "`space`"]),
    (["train", "hydra.run.dir=foo"], ["Name the folder by `output=DIR`, and that of a sweep by `sweep.output=DIR`."]),
    (["train", "-m", "seed=1,2", "++hydra.job.chdir=true"], ["`hydra.job.chdir` must be left out"]),
]
MISTAKES = [*TYPOS, *TYPES, *RANGES, *FILES, *COLUMNS, *ORDERS]


@pytest.fixture
def files(here):
    (here / "mini.yaml").write_text(yaml.safe_dump(MINI, sort_keys=False))
    arm = {"settings": {"method": "lora"}, "space": {"method.rnak": [1, 4]}, "confirm_each": "method.rank"}
    (here / "spaces.yaml").write_text(yaml.safe_dump({"settings": {"model": "tiny"}, "arms": {"lora": arm}}))
    (here / "full").mkdir()
    (here / "full" / "mine.txt").write_text("mine")
    (here / "done").mkdir()
    (here / "done" / "sweep.json").write_text("{}")
    (here / "notes.txt").write_text("just words\n")
    (here / "rows.csv").write_text("text,label,author\n" + "".join(f"text {n},{n % 2},{n % 9}\n" for n in range(60)))
    rows = [{"prompt": f"add {n} and 1", "answer": f"it is {n + 1}"} for n in range(60)]
    (here / "chat.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return here


@pytest.mark.parametrize(("words", "said"), MISTAKES, ids=[" ".join(words)[:70] for words, _ in MISTAKES])
def test_a_mistake_is_one_sentence_with_key_and_remedy_and_changes_nothing(files, capsys, caplog, words, said):
    before = list_names(files)
    assert run(words) == WRONG_REQUEST == 2
    output = capsys.readouterr()
    assert output.err.count("\n") == 1
    assert output.err.startswith("lorasweep: ")
    assert [part for part in said if part not in output.err] == []
    assert output.out == ""
    assert caplog.text == ""  # it would stand on standard error
    assert list_names(files) == before
