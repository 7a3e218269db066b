// The plot of one measure against another in report.html; helpers are in page.js.
"use strict";

const SHAPES = ["M-5,0a5,5 0 1,0 10,0a5,5 0 1,0 -10,0", "M-4.5,-4.5h9v9h-9z", "M0,-6L5.6,4.4H-5.6z", "M0,-6.2L5.4,0L0,6.2L-5.4,0z",
  "M0,6L5.6,-4.4H-5.6z", "M-2,-5.6h4v3.6h3.6v4h-3.6v3.6h-4v-3.6h-3.6v-4h3.6z", "M-5.4,-2.4L-2.4,-5.4H2.4L5.4,-2.4V2.4L2.4,5.4H-2.4L-5.4,2.4z"];
const STAR = "M0,-8L2,-2.6L7.6,-2.5L3.2,1L4.7,6.5L0,3.3L-4.7,6.5L-3.2,1L-7.6,-2.5L-2,-2.6z";

function paretoPlot(figure, data) {
  const names = Object.keys(data.metrics);
  if (names.length < 2) return;
  const options = ["images", "cost"].flatMap((group) => names.filter((n) => data.metrics[n].group === group)
    .map((n) => [n, data.metrics[n].title, group === "images" ? "about the images" : "cost"]));
  const first = data.y || names[0];
  const state = { x: data.x || names.find((n) => n !== first), y: first, set: null };
  const controls = make("div", { className: "controls" });
  const plot = make("div"), legend = make("ul", { className: "legend" });
  const words = make("p", { className: "soft", ariaLive: "polite" });
  const caption = figure.querySelector("figcaption");
  figure.insertBefore(controls, caption);
  figure.insertBefore(plot, caption);
  figure.insertBefore(legend, caption);
  figure.insertBefore(words, caption);
  const tip = tooltip(figure);

  function change(key, value) {
    Object.assign(state, key === "set" ? {} : { set: null }, { [key]: value });
    refresh();
  }

  function refresh() {
    const { sets, chosen } = alike(data, state);
    state.set = chosen;
    controls.replaceChildren(
      selection("across", options, state.x, (v) => change("x", v)), selection("up", options, state.y, (v) => change("y", v)),
      ...(sets.size > 1 ? [selection("measured alike", [...sets].map(([key, rows], i) => [key, `setting ${i + 1}: ${rows.length} rows`]),
        chosen, (v) => change("set", v))] : []));
    redraw();
  }

  const short = (row, name) => shown(row.values[name].value, data.metrics[name].percent);

  function redraw() {
    const rows = alike(data, state).sets.get(state.set) || [];
    plot.replaceChildren(make("div", { className: "axis", textContent: `↑ ${axisTitle(data, state.y, false)}` }),
      chart(data, state, rows, Math.max(280, plot.clientWidth), tip),
      make("div", { className: "axis across", textContent: axisTitle(data, state.x, true) }));
    legend.replaceChildren(...Object.keys(data.styles).filter((m) => rows.some((r) => r.method === m)).map((m) => key(data, m)));
    const front = frontOf(data, state, rows);
    words.textContent = !rows.length ? "No row measured both." : front === null ? "No front: one of the two is neither better high nor low."
      : `On the front: ${front.map((r) => `${r.label} (${short(r, state.x)}; ${short(r, state.y)})`).join(", ")}.`;
  }

  controls.addEventListener("change", (event) => {  // the controls are made anew: keep the keyboard where it was
    const index = [...controls.querySelectorAll("select")].indexOf(event.target);
    queueMicrotask(() => controls.querySelectorAll("select")[index]?.focus());
  }, true);
  refresh();
  let width = plot.clientWidth;
  new ResizeObserver(() => { if (plot.clientWidth !== width) { width = plot.clientWidth; redraw(); } }).observe(plot);
}

function alike(data, state) {
  const sets = new Map();
  for (const row of data.rows) {
    const x = row.values[state.x], y = row.values[state.y];
    if (!x || !y || x.value === null || y.value === null) continue;
    const key = `${x.set}/${y.set}`;
    sets.set(key, [...(sets.get(key) || []), row]);
  }
  const ordered = new Map([...sets].sort((a, b) => b[1].length - a[1].length));
  return { sets: ordered, chosen: ordered.has(state.set) ? state.set : ordered.keys().next().value };
}

const hollow = (data, state, row) => row.disturbed && (data.metrics[state.x].timing || data.metrics[state.y].timing);

function frontOf(data, state, rows) {
  const signs = [state.x, state.y].map((n) => ({ lower: -1, higher: 1 })[data.metrics[n].better]);
  if (signs.includes(undefined)) return null;
  const whole = rows.filter((row) => !hollow(data, state, row));
  // the rule of harness/reporting/front.py: differences within the tolerance of a budget are none
  const slack = [state.x, state.y].map((n) => data.metrics[n].tolerance || 0);
  const good = (row) => [state.x, state.y].map((n, i) => signs[i] * row.values[n].value);
  const [first, then] = slack[0] && !slack[1] ? [1, 0] : [0, 1];
  const order = [...whole].sort((a, b) => good(b)[first] - good(a)[first] || good(b)[then] - good(a)[then]);
  const beats = (a, b) => {
    const gaps = a.map((v, i) => v - b[i]), outside = gaps.map((g, i) => (Math.abs(g) <= slack[i] ? 0 : g));
    return outside.every((g) => g >= 0) && (outside.some((g) => g > 0) || (gaps.every((g) => g >= 0) && gaps.some((g) => g > 0)));
  };
  const front = [];
  for (const row of order) if (!front.some((other) => beats(good(other), good(row)))) front.push(row);
  return front.sort((a, b) => a.values[state.x].value - b.values[state.x].value);
}

function value(data, row, name) {
  const { title, percent } = data.metrics[name], found = row.values[name];
  const ends = (pair, open, close) => pair ? ` ${open}${shown(pair[0], percent)} – ${shown(pair[1], percent)}${close}` : "";
  return `${title} ${shown(found.value, percent)}${ends(found.interval, "[", "]")}${ends(found.spread, "(trainings ", ")")}`;
}

function ticks(low, high, count) {
  const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((s) => s >= rough);
  return Array.from({ length: Math.floor(high / step) - Math.ceil(low / step) + 1 }, (_, i) => (Math.ceil(low / step) + i) * step);
}

function axis(data, rows, name, from, to) {
  const scale = data.metrics[name].percent ? 100 : 1;
  const all = rows.flatMap((r) => [r.values[name].value, ...(r.values[name].spread || r.values[name].interval || [])]).map((v) => v * scale);
  let low = Math.min(...all), high = Math.max(...all);
  const pad = 0.06 * (high - low) || Math.abs(high) * 0.05 || 1;
  [low, high] = [low - pad, high + pad];
  const at = (v) => from + (to - from) * (v * scale - low) / (high - low);
  return { at, ticks: ticks(low, high, Math.max(3, Math.round(Math.abs(to - from) / 90))).map((v) => [at(v / scale), +v.toPrecision(6)]) };
}

function axisTitle(data, name, across) {
  const { title, better, percent } = data.metrics[name];
  const arrow = { lower: across ? " (← better)" : " (lower is better)", higher: across ? " (better →)" : " (higher is better)" };
  return title + (percent ? ", %" : "") + (arrow[better] || "");
}

function chart(data, state, rows, width, tip) {
  const height = Math.min(460, Math.max(320, width * 0.55)), left = 52, bottom = height - 22, top = 8, right = width - 6;
  const svg = draw("svg", { class: "plot", viewBox: `0 0 ${width} ${height}`, height, role: "group" });
  const title = `${data.metrics[state.y].title} against ${data.metrics[state.x].title}`;
  svg.setAttribute("aria-label", title);
  if (!rows.length) return svg;
  const x = axis(data, rows, state.x, left + 8, right - 8), y = axis(data, rows, state.y, bottom - 4, top + 4);
  for (const [at, text] of x.ticks) svg.append(draw("line", { class: "rule", x1: at, x2: at, y1: top, y2: bottom }),
    draw("text", { x: at, y: bottom + 16, "text-anchor": "middle" }, text));
  for (const [at, text] of y.ticks) svg.append(draw("line", { class: "rule", x1: left, x2: right, y1: at, y2: at }),
    draw("text", { x: left - 7, y: at + 4, "text-anchor": "end" }, text));
  const places = sideBySide(rows.map((r) => x.at(r.values[state.x].value)), Math.min(10, width / 60), left + 7, right - 7);
  const front = frontOf(data, state, rows) || [];
  const points = rows.map((row, i) => ({ row, x: places[i], y: y.at(row.values[state.y].value) }));
  if (front.length > 1) svg.append(draw("path", { class: "front", d: staircase(data, state, front.map((r) => points[rows.indexOf(r)])) }));
  const marks = points.map((p) => mark(data, state, p, x, y, frontOf(data, state, rows) && !front.includes(p.row), tip));
  svg.append(...marks.filter((m) => m.classList.contains("beaten")), ...marks.filter((m) => !m.classList.contains("beaten")));
  return svg;
}

// nothing was measured between two points, so the line holds the worse value until the next one
function staircase(data, state, points) {
  const sorted = [...points].sort((a, b) => a.x - b.x), early = data.metrics[state.x].better === "higher";
  return sorted.map((p, i) => !i ? `M${p.x},${p.y}` : early ? `V${p.y}H${p.x}` : `H${p.x}V${p.y}`).join("");
}

function sideBySide(values, gap, low, high) {
  const order = values.map((v, i) => [v, i]).sort((a, b) => a[0] - b[0]), moved = [...values];
  let cluster = [];
  const spread = () => cluster.forEach(([, i], place) => {
    const half = gap * (cluster.length - 1) / 2, middle = cluster.reduce((sum, [v]) => sum + v, 0) / cluster.length;
    moved[i] = Math.max(low + half, Math.min(high - half, middle)) + gap * place - half;
  });
  for (const item of order) {
    if (cluster.length && item[0] - cluster[cluster.length - 1][0] > 5) { spread(); cluster = []; }
    cluster.push(item);
  }
  spread();
  return moved;
}

function mark(data, state, { row, x, y }, xAxis, yAxis, beaten, tip) {
  const style = data.styles[row.method], text = [row.label, ...[state.y, state.x].map((n) => value(data, row, n))].join("\n");
  const names = ["point", beaten && "beaten", hollow(data, state, row) && "hollow", style.colour || "dense"].filter(Boolean);
  const group = draw("g", { class: names.join(" "), tabindex: 0, role: "img", "aria-label": text });
  if (style.colour) group.style.setProperty("--colour", style.colour);
  const ends = (name) => row.values[name].spread || row.values[name].interval;
  const yEnds = ends(state.y)?.map(yAxis.at), aside = x - xAxis.at(row.values[state.x].value);
  const xEnds = ends(state.x)?.map((end) => xAxis.at(end) + aside);
  if (yEnds) group.append(draw("path", { class: "whisker", d: `M${x},${yEnds[0]}V${yEnds[1]}M${x - 3},${yEnds[0]}h6M${x - 3},${yEnds[1]}h6` }));
  if (xEnds && xEnds[1] - xEnds[0] > 2) group.append(draw("path", { class: "whisker", d: `M${xEnds[0]},${y}H${xEnds[1]}M${xEnds[0]},${y - 3}v6M${xEnds[1]},${y - 3}v6` }));
  const point = draw("path", { class: "mark", transform: `translate(${x},${y})`, d: row.dense ? STAR : shape(style) });
  group.append(point, draw("circle", { cx: x, cy: y, r: 10, fill: "transparent" }));
  for (const event of ["mouseenter", "focus"]) group.addEventListener(event, () => tip.show(text, point.getBoundingClientRect()));
  for (const event of ["mouseleave", "blur"]) group.addEventListener(event, tip.hide);
  return group;
}

const shape = (style) => style.shape < 0 ? STAR : SHAPES[style.shape % SHAPES.length];

function key(data, method) {
  const style = data.styles[method], svg = draw("svg", { viewBox: "-9 -9 18 18", "aria-hidden": "true", class: style.colour ? "" : "dense" });
  svg.append(draw("path", { d: shape(style) }));
  if (style.colour) svg.style.color = style.colour;
  return make("li", { className: "key" }, svg, method);
}
