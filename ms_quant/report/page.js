"use strict";
// Values under the pointer or a finger.
const tip = document.createElement("div");
tip.id = "tip";
tip.hidden = true;
document.body.append(tip);
function show(event) {
  const mark = event.target.closest && event.target.closest("[data-t]");
  tip.hidden = !mark;
  if (!mark) return;
  tip.textContent = mark.getAttribute("data-t");
  const box = mark.getBoundingClientRect();
  const x = event.clientX || box.left, y = event.clientY || box.top;
  tip.style.left = Math.max(4, Math.min(x + 12, innerWidth - tip.offsetWidth - 8)) + "px";
  tip.style.top = Math.max(4, y > 60 ? y - tip.offsetHeight - 10 : y + 20) + "px";
}
for (const name of ["pointerover", "pointerdown", "focusin"]) document.addEventListener(name, show);

// Tables that are sorted by a column and filtered by words.
function value(row, column) {
  const cell = row.cells[column], number = cell.getAttribute("data-v");
  return number === null ? cell.textContent : number === "" ? null : Number(number);
}
function sort(table, column, down) {
  const body = table.tBodies[0];
  const keys = [...body.rows].map((row) => [value(row, column), row]);
  keys.sort(([a], [b]) => {
    if (a === null || b === null) return (a === null) - (b === null);  // nothing goes last
    const order = typeof a === "number" ? a - b : a.localeCompare(b, "en", { numeric: true });
    return down ? -order : order;
  });
  body.append(...keys.map(([, row]) => row));
  table.querySelectorAll("th").forEach((head, k) => {
    if (k === column) head.setAttribute("aria-sort", down ? "descending" : "ascending");
    else head.removeAttribute("aria-sort");
  });
}
for (const table of document.querySelectorAll("table.sorts")) {
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    const button = document.createElement("button");
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const number = value(table.tBodies[0].rows[0], column);
      const first = typeof number === "string" ? "ascending" : "descending";
      const now = head.getAttribute("aria-sort");
      sort(table, column, now ? now === "ascending" : first === "descending");
    });
  });
  const input = document.getElementById(table.id + "-filter");
  const count = document.getElementById(table.id + "-count");
  if (input) input.addEventListener("input", () => {
    const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const row of table.tBodies[0].rows) {
      const text = row.textContent.toLowerCase();
      row.hidden = !words.every((word) => text.includes(word));
      shown += !row.hidden;
    }
    count.textContent = shown + " of " + table.tBodies[0].rows.length + " rows";
  });
}

// Histograms of the linear that is chosen.
for (const choice of document.querySelectorAll("select.linears")) {
  const data = JSON.parse(document.getElementById(choice.id + "-data").textContent);
  const draw = () => {
    const chosen = data[choice.selectedIndex];
    document.getElementById(choice.id + "-note").textContent = chosen.note;
    chosen.parts.forEach((part, k) => histogram(document.getElementById(choice.id + "-" + k), part));
    const panels = document.querySelectorAll("#" + choice.id + "-panels > figure");
    panels.forEach((panel, k) => { panel.hidden = k >= chosen.parts.length; });
  };
  choice.addEventListener("change", draw);
  draw();
}
function histogram(figure, part) {
  const svg = figure.querySelector("svg"), most = Math.max(...part.counts), sum = part.counts.reduce((a, b) => a + b);
  const width = 100 / part.counts.length;
  const share = (count) => (100 * count / sum).toPrecision(3) + " %";
  figure.querySelector("figcaption").textContent = part.title;
  figure.querySelector(".axis.x").textContent = part.unit;
  svg.replaceChildren(...part.counts.map((count, k) => {
    const bar = document.createElementNS("http://www.w3.org/2000/svg", "rect");
    const height = 100 * count / most;
    const first = part.start + k * part.step, last = first + part.step - part.inside;
    for (const [key, it] of Object.entries({ x: k * width, y: 100 - height, width: width * 0.9, height }))
      bar.setAttribute(key, it.toFixed(2));
    const words = (x) => Number(x.toPrecision(4)).toString();
    bar.setAttribute("data-t", (first === last ? words(first) : words(first) + " to " + words(last)) + ": " + share(count));
    return bar;
  }));
  const ends = figure.querySelectorAll(".xs .tick"), end = part.start + part.step * part.counts.length - part.inside;
  const middle = (part.start + end) / 2;
  [part.start, part.inside ? Math.round(middle) + 0 : middle, end].forEach((x, k) => { ends[k].textContent = Number(x.toPrecision(3)); });
  const tops = figure.querySelectorAll(".ys .tick");
  tops[0].textContent = "0";
  tops[1].textContent = (100 * most / sum).toPrecision(2) + " %";
}

// The page of a running job is read again, unless someone types.
const seconds = Number(document.body.getAttribute("data-reload"));
if (seconds) setInterval(() => {
  const typed = [...document.querySelectorAll("input")].some((input) => input.value);
  if (!typed) location.reload();
}, 1000 * seconds);
