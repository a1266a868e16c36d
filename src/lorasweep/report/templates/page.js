// Draws the figures in the page's colours, opens a point's run folder, sorts and filters the table of trials.
"use strict";

function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

function themed(layout) {
  const style = { "font.color": colour("--ink"), "font.size": 13, "hoverlabel.bgcolor": colour("--soft") };
  style["font.family"] = getComputedStyle(document.body).fontFamily;
  style["hoverlabel.font.color"] = colour("--ink");
  style["hoverlabel.bordercolor"] = colour("--rule");
  for (const axis of Object.keys(layout).filter((key) => /^[xy]axis/.test(key))) {
    style[axis + ".gridcolor"] = colour("--grid");
    style[axis + ".linecolor"] = colour("--rule");
    style[axis + ".tickcolor"] = colour("--rule");
  }
  return style;
}

function draw(node, figure) {
  const options = { responsive: true, displaylogo: false, displayModeBar: false };
  return Plotly.newPlot(node, figure.data, figure.layout, options).then(() => {
    Plotly.relayout(node, themed(node.layout));
    node.on("plotly_click", (event) => {
      const link = event.points[0].customdata;
      if (typeof link === "string" && link.startsWith("../")) window.open(link, "_blank", "noopener");
    });
  });
}

function drawFigures() {
  for (const source of document.querySelectorAll(".figure-data")) {
    const nodes = source.closest("section").querySelectorAll(".figure");
    JSON.parse(source.textContent).forEach((figure, index) => draw(nodes[index], figure));
  }
}

function recolour() {
  for (const node of document.querySelectorAll(".js-plotly-plot")) Plotly.relayout(node, themed(node.layout));
}

function compare(a, b) {
  const [x, y] = [Number(a), Number(b)];
  return Number.isNaN(x) || Number.isNaN(y) ? a.localeCompare(b) : x - y;
}

function sortBy(heading) {
  const column = heading.cellIndex;
  const order = heading.getAttribute("aria-sort") === "ascending" ? -1 : 1;
  for (const other of heading.parentElement.cells) other.removeAttribute("aria-sort");
  heading.setAttribute("aria-sort", order === 1 ? "ascending" : "descending");
  const body = heading.closest("table").tBodies[0];
  const keyed = Array.from(body.rows, (row) => [row.cells[column].dataset.key, row]);
  const known = keyed.filter(([key]) => key !== undefined).sort(([a], [b]) => order * compare(a, b));
  const unknown = keyed.filter(([key]) => key === undefined);
  body.append(...known.concat(unknown).map(([, row]) => row));
}

function filterRows(text) {
  const wanted = text.toLowerCase();
  for (const row of document.querySelectorAll("#trial-table tbody tr")) {
    row.hidden = !row.textContent.toLowerCase().includes(wanted);
  }
}

for (const button of document.querySelectorAll(".trials thead button")) {
  button.addEventListener("click", () => sortBy(button.closest("th")));
}
document.getElementById("filter").addEventListener("input", (event) => filterRows(event.target.value));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", recolour);
function openTarget() {
  const folded = document.querySelector(":target > details.more");
  if (folded !== null) folded.open = true;
}
addEventListener("hashchange", openTarget);
openTarget();

for (const button of document.querySelectorAll(".copy")) {
  button.hidden = false;
  button.addEventListener("click", async () => {
    await navigator.clipboard.writeText(button.nextElementSibling.textContent);
    button.textContent = "Copied";
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  });
}
drawFigures();
