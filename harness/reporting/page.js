// The interactive parts of report.html. All text goes in by textContent: labels and prompts are not trusted.
const SVG = "http://www.w3.org/2000/svg";
const VIRIDIS = ["#440154", "#472d7b", "#3b528b", "#2c728e", "#21918c", "#28ae80", "#5ec962", "#addc30", "#fde725"];

function make(tag, properties = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}

function draw(tag, attributes = {}, text = null) {
  const node = document.createElementNS(SVG, tag);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== null) node.textContent = text;
  return node;
}

function selection(label, options, value, changed) {
  const select = make("select");
  const groups = new Map();
  for (const [key, text, group] of options) {
    if (group && !groups.has(group)) {
      groups.set(group, make("optgroup", { label: group }));
      select.append(groups.get(group));
    }
    (groups.get(group) || select).append(make("option", { value: key, textContent: text }));
  }
  select.value = value;
  select.addEventListener("change", () => changed(select.value));
  return make("label", {}, label, select);
}

const shown = (number, percent) => number === null ? "–" : percent ? `${(100 * number).toFixed(1)} %` : `${+number.toPrecision(4)}`;

function tooltip(figure) {
  const tip = make("div", { className: "tip", hidden: true });
  figure.append(tip);
  return {
    hide() { tip.hidden = true; },
    show(text, box) {
      tip.textContent = text;
      tip.hidden = false;
      const outer = figure.getBoundingClientRect();
      const left = Math.min(box.right - outer.left + 10, outer.width - tip.offsetWidth);
      tip.style.left = `${Math.max(0, left)}px`;
      tip.style.top = `${box.top - outer.top - tip.offsetHeight - 8}px`;
    },
  };
}

// ------------------------------------------------------------------------------------------------ pictures

function pictureBrowser(figure, data) {
  const found = data.pictures;
  if (!found) return;
  const caption = figure.querySelector("figcaption"), count = found.seeds.length;
  const rows = data.rows.filter((row) => found.rows[row.id]);
  caption.append(` ${count} of ${found.of} images of each of ${rows.length} rows are embedded${count < found.of ? ", evenly spaced" : ""}, `
    + (found.lossless ? "without loss." : `as JPEG of at most ${found.side} px: look at fine detail in the originals (images.npz).`));
  if (!count) return;
  const chosen = new Set(rows.slice(0, 4).map((row) => row.id));
  const boxes = make("fieldset", {}, make("legend", { textContent: "rows" }));
  for (const row of rows) {
    const box = make("input", { type: "checkbox", checked: chosen.has(row.id) });
    box.addEventListener("change", () => { chosen[box.checked ? "add" : "delete"](row.id); show(); });
    boxes.append(make("label", {}, box, ` ${row.label}`));
  }
  const slider = make("input", { type: "range", min: 0, max: count - 1, value: 0 });
  const words = make("p", { ariaLive: "polite" }), gallery = make("div", { className: "gallery" });
  slider.addEventListener("input", show);
  figure.insertBefore(make("div", { className: "controls" }, make("label", { className: "wide" }, "image", slider)), caption);
  figure.insertBefore(boxes, caption);
  figure.insertBefore(words, caption);
  figure.insertBefore(gallery, caption);

  function show() {
    const index = +slider.value, prompt = found.prompts[index];
    slider.setAttribute("aria-valuetext", `image ${index + 1}: ${prompt}`);
    words.replaceChildren(make("strong", { textContent: prompt || "no prompt" }),
      make("span", { className: "soft", textContent: ` — image ${index + 1} of ${count}, seed ${found.seeds[index]}` }));
    gallery.replaceChildren(...rows.filter((row) => chosen.has(row.id)).map((row) => make("div", {},
      make("img", { src: found.rows[row.id][index], alt: `${row.label}: ${prompt}`, className: found.side <= 128 ? "small" : "" }), row.label)));
  }
  show();
}

// ------------------------------------------------------------------------------------------------ keep ratios

function colour(share) {
  const place = Math.max(0, Math.min(1, share)) * (VIRIDIS.length - 1), low = Math.min(VIRIDIS.length - 2, Math.floor(place));
  const parts = (hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
  const [a, b] = [parts(VIRIDIS[low]), parts(VIRIDIS[low + 1])];
  return `rgb(${a.map((v, i) => Math.round(v + (place - low) * (b[i] - v))).join(",")})`;
}

function keepMaps(figure, data) {
  const rows = data.rows.filter((row) => row.kept), caption = figure.querySelector("figcaption");
  if (!rows.length) return;
  const low = Math.min(...rows.map((row) => Math.min(...row.kept.flat())));
  const bar = make("i");
  bar.style.background = `linear-gradient(to right, ${VIRIDIS.join(",")})`;
  const maps = make("div", { className: "maps" }), tip = tooltip(figure);
  figure.insertBefore(make("div", { className: "scale" }, `${low.toFixed(2)} kept`, bar, low < 1 ? "1.00 kept (all)" : "all"), caption);
  figure.insertBefore(maps, caption);
  maps.append(...rows.map((row) => keepMap(row, low, tip)));
}

function keepMap(row, low, tip) {
  const steps = row.kept.length, blocks = row.kept[0].length;
  const mean = row.kept.flat().reduce((sum, v) => sum + v, 0) / (steps * blocks);
  const canvas = make("canvas", { width: blocks, height: steps, tabIndex: 0 });
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", `${row.label}: mean kept ${mean.toFixed(3)}. Arrow keys read single values.`);
  const context = canvas.getContext("2d"), at = [0, 0];
  row.kept.forEach((line, step) => line.forEach((kept, block) => {
    context.fillStyle = colour(low < 1 ? (kept - low) / (1 - low) : 1);
    context.fillRect(block, step, 1, 1);
  }));

  function show(step, block) {
    at[0] = Math.max(0, Math.min(steps - 1, step));
    at[1] = Math.max(0, Math.min(blocks - 1, block));
    const box = canvas.getBoundingClientRect(), right = box.left + (at[1] + 1) * box.width / blocks;
    tip.show(`step ${at[0]}, block ${at[1]}: ${row.kept[at[0]][at[1]]} kept`, { right, top: box.top + at[0] * box.height / steps });
  }
  canvas.addEventListener("mousemove", (event) => {
    const box = canvas.getBoundingClientRect();
    show(Math.floor((event.clientY - box.top) / box.height * steps), Math.floor((event.clientX - box.left) / box.width * blocks));
  });
  canvas.addEventListener("focus", () => show(...at));
  canvas.addEventListener("keydown", (event) => {
    const move = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (move) { event.preventDefault(); show(at[0] + move[0], at[1] + move[1]); }
  });
  for (const event of ["mouseleave", "blur"]) canvas.addEventListener(event, tip.hide);
  return make("div", {}, make("strong", { textContent: row.label }),
    make("div", { className: "down" }, make("span", { textContent: `step 0–${steps - 1} →` }), canvas),
    make("span", { className: "soft", textContent: `block 0–${blocks - 1} →   mean kept ${mean.toFixed(3)}` }));
}

// ------------------------------------------------------------------------------------------------ tables

// a cell is sorted by its leading number; cells without one stay last
function sortTable(head) {
  const table = head.closest("table"), column = head.cellIndex, up = head.getAttribute("aria-sort") !== "ascending";
  for (const other of table.querySelectorAll("th[aria-sort]")) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", up ? "ascending" : "descending");
  const body = table.tBodies[0], sign = up ? 1 : -1;
  const key = (row) => {
    const text = (row.cells[column]?.textContent || "").trim().replace("−", "-").replace("∞", "Infinity");
    return { text, number: column ? parseFloat(text) : NaN };
  };
  const lines = [...body.rows].map((row) => [row, key(row)]);
  lines.sort(([, a], [, b]) => {
    const lacking = [a, b].map((k) => Number.isNaN(k.number));
    if (lacking[0] !== lacking[1]) return lacking[0] - lacking[1];
    return lacking[0] ? sign * a.text.localeCompare(b.text) : sign * (a.number - b.number) || 0;
  });
  body.append(...lines.map(([row]) => row));
}

const WIDGETS = { plot: paretoPlot, browser: pictureBrowser, maps: keepMaps };
for (const part of document.querySelectorAll("section.part")) {
  const data = JSON.parse(part.querySelector('script[type="application/json"]').textContent);
  for (const figure of part.querySelectorAll("figure.widget")) WIDGETS[figure.dataset.widget](figure, data);
}
document.addEventListener("click", (event) => {
  const head = event.target.closest?.(".sort")?.closest("th");
  if (head) sortTable(head);
});
