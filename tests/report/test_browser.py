"""The page in a real browser: figures are drawn, nothing is logged as an error, the table sorts and filters."""

import re
import shutil
import subprocess

import pytest
from tests.files import edit_json

from .conftest import report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
OPTIONS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
OPTIONS += ["--disable-background-networking", "--disable-component-update", "--enable-logging=stderr"]
OPTIONS += ["--virtual-time-budget=5000", "--dump-dom"]
PROBE = """
<script>
addEventListener("load", () => setTimeout(() => {
  const table = document.getElementById("trial-table");
  const shown = () => Array.from(table.tBodies[0].rows).filter((row) => !row.hidden);
  const scores = () => shown().map((row) => row.cells[2].dataset.key ?? "none").join(" ");
  const say = (name, text) => {
    const node = document.createElement("output");
    node.id = name;
    node.textContent = text;
    document.body.append(node);
  };
  const figures = Array.from(document.querySelectorAll(".figure"));
  const drawn = () => figures.filter((node) => node.childNodes.length > 0).length;
  say("drawn", drawn() === figures.length && document.querySelectorAll(".figure .main-svg").length > 0);
  const arms = document.querySelector(".arms").parentElement;
  say("arms", arms.scrollWidth <= arms.clientWidth);
  say("width", document.documentElement.scrollWidth <= innerWidth);
  if (table === null) return;
  const score = table.tHead.rows[0].cells[2];
  score.firstElementChild.click();
  say("rising", scores());
  score.firstElementChild.click();
  say("falling", scores());
  const filter = document.getElementById("filter");
  filter.value = "failed";
  filter.dispatchEvent(new Event("input"));
  say("failed", shown().length);
}, 2000));
</script>
"""

COMPLAINT = r"CONSOLE.*(?:Uncaught|Error|Failed|Refused).*"

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="needs chromium in the search path")]


def open_page(page, profile, *, size):
    """Returns the page as the browser has it after five seconds, and what it logged."""
    command = [str(CHROMIUM), *OPTIONS, f"--user-data-dir={profile}", f"--window-size={size}", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, done.stderr


@pytest.mark.parametrize("size", ["1280,900", "500,900"])
def test_page_draws_sorts_and_logs_no_error(confirmed, tmp_path, size):
    sweep = confirmed

    def add_metric(raw):  # a further column
        metrics = [raw["search_metric"], {"name": "exact_match", "direction": "maximize"}]
        raw.update(name="<b>&amp;</b>", test_metrics=metrics)
        for run in raw["confirm"]:
            run["test_scores"]["exact_match"] = 0.4 + run["seed"] % 100 / 1000

    edit_json(sweep / "sweep.json", add_metric)
    report(sweep)
    page = sweep / "report/index.html"
    page.write_text(page.read_text().replace("</body>", PROBE + "</body>"))
    dom, log = open_page(page, tmp_path / "profile", size=size)
    said = dict(re.findall(r'<output id="(\w+)">(.*?)</output>', dom))
    assert said["drawn"] == "true"
    rising, falling = said["rising"].split(), said["falling"].split()
    # the failed trial has no score and comes last either way
    assert (rising[-1], falling[-1]) == ("none", "none")
    values = [float(score) for score in rising[:-1]]
    assert len(values) == 24 + 11  # trials and confirm runs
    assert values == sorted(values)
    assert falling[:-1] == rising[-2::-1]
    assert said["failed"] == "1"
    # nothing makes the whole page scroll sideways, on a phone neither
    assert said["width"] == "true"
    assert said["arms"] == "true"  # no column is clipped
    assert not re.findall(COMPLAINT, log)
