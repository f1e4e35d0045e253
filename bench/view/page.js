"use strict";

window.onerror = (message, source, line) => {
  const box = document.getElementById("error");
  box.hidden = false;
  box.textContent = `The script of this page failed in line ${line}: ${message}`;
};

const byId = (id) => document.getElementById(id);
const number = (value) => value.toLocaleString("en");
const { seen, prompt: promptTokens, layers } = JSON.parse(byId("data").textContent);
const spans = [...document.querySelectorAll(".tokens > span")];
const rows = layers.map((layer) => layer.rows.map(unpack)); // [layer][head]: bytes of bits
const compressed = rows.filter((_, layer) => !layers[layer].sliding);
const held = tally(rows); // of them heads: [layer][position], heads that keep it
const reading = readRows() && tally(readRows()); // the same of what the last step read
let shown = held;
let scope = { layer: null, head: null };
let palette = [];

// Data

function unpack(text) {
  return Uint8Array.from(atob(text), (char) => char.charCodeAt(0));
}

function keeps(row, position) {
  return (row[position >> 3] >> (position & 7)) & 1;
}

function count(some) {
  const found = new Uint16Array(seen);
  for (const row of some) {
    for (let position = 0; position < seen; position++) found[position] += keeps(row, position);
  }
  return found;
}

function chosen(of) {
  if (scope.layer === null) return of.counted;
  const layer = of.rows[scope.layer];
  return scope.head === null ? layer : [layer[scope.head]];
}

function countChosen(of) {
  return scope.layer === null ? of.everywhere : count(chosen(of));
}

// Colours

function makePalette() {
  const style = getComputedStyle(document.documentElement);
  const stops = ["--low", "--middle", "--high"].map((name) =>
    style.getPropertyValue(name).match(/[0-9a-f]{2}/gi).map((pair) => parseInt(pair, 16)),
  );
  palette = Array.from({ length: 101 }, (_, percent) => {
    const place = percent / 50;
    const first = Math.min(1, Math.floor(place));
    const mixed = stops[first].map((low, i) => low + (stops[first + 1][i] - low) * (place - first));
    const light = 0.299 * mixed[0] + 0.587 * mixed[1] + 0.114 * mixed[2];
    return { paper: `rgb(${mixed.map(Math.round)})`, ink: light > 120 ? "#0b1220" : "#ffffff" };
  });
}

function colour(share) {
  return palette[Math.round(share * 100)];
}

// The text

function paintText() {
  const some = chosen(shown);
  const kept = countChosen(shown);
  const holders = shown === held ? null : countChosen(held);
  for (let position = 0; position < seen; position++) {
    const { dataset, style } = spans[position];
    const { paper, ink } = kept[position] ? colour(kept[position] / some.length) : {};
    dataset.n = kept[position];
    style.background = paper ?? "";
    style.color = ink ?? "";
  }
  markHeld(holders);
  const one = some.length === 1;
  byId("summary").textContent =
    holders === null ? keptSummary(some.length, kept) : readSummary(some.length, kept, holders);
  byId("none").textContent = one ? "evicted" : "in no row";
  byId("unread").hidden = holders === null;
  byId("ramp").classList.toggle("one", one);
  byId("least").textContent = one ? "" : `1 of ${some.length}`;
  const most = holders === null ? "kept" : "read";
  byId("most").textContent = one ? most : `${some.length} of ${some.length} rows`;
}

function keptSummary(total, kept) {
  const lost = kept.reduce((sum, n) => sum + (n === 0), 0);
  return (
    `${rowsInWords(total)}: ${number(seen - lost)} of ${number(seen)} tokens are kept` +
    (total === 1 ? `, ${number(lost)} evicted.` : ` in at least one row, ${number(lost)} in none.`)
  );
}

function rowsInWords(total) {
  if (scope.layer === null) {
    return `${number(total)} rows of ${compressed.length || rows.length} layers`;
  }
  const name = layerName(scope.layer);
  return scope.head === null ? `${name}, ${total} heads` : `${name}, head ${scope.head}`;
}

function layerName(layer) {
  return `Layer ${layer}${layers[layer].sliding ? " (sliding window)" : ""}`;
}

function tokenInWords(position) {
  const text = spans[position].textContent;
  const what = text ? JSON.stringify(text) : "part of the character that follows";
  return `Position ${number(position)}: ${what}`;
}

function describe(position) {
  if (position >= seen) {
    return `${tokenInWords(position)}\nGenerated last and not fed again: no row can hold it.`;
  }
  const lines = [tokenInWords(position)];
  if (scope.layer !== null) lines.push(headsInWords(scope.layer, position));
  const rowsOf = (of) => `${number(of.everywhere[position])} of ${number(of.counted.length)} rows`;
  lines.push(`Kept in ${rowsOf(held)}` + (reading ? `, read in ${rowsOf(reading)}` : ""));
  return lines.join("\n");
}

function headsInWords(layer, position) {
  const keepers = rows[layer].flatMap((row, head) => (keeps(row, position) ? [head] : []));
  const who = headsOf(keepers, rows[layer].length);
  const all = `${layerName(layer)}: kept by ${who} of ${rows[layer].length}`;
  return all + readersInWords(layer, position);
}

function headsOf(some, total) {
  if (some.length === total) return "every head";
  return some.length ? `head ${some.join(", ")}` : "no head";
}

// The map

const canvas = document.querySelector("#map canvas");
const LEFT = 34, TOP = 18, BOTTOM = 22;

function mapSize() {
  const width = Math.max(1, canvas.parentElement.clientWidth - LEFT - 1);
  const height = Math.max(4, Math.min(16, Math.floor(480 / rows.length)));
  return { width, height, bins: Math.min(seen, Math.floor(width)), bottom: TOP + height * rows.length };
}

function firstOf(bin, bins) {
  return Math.floor((bin * seen) / bins);
}

function paintMap() {
  const { width, height, bins, bottom } = mapSize();
  const ratio = window.devicePixelRatio || 1;
  canvas.width = Math.round((LEFT + width + 1) * ratio);
  canvas.height = Math.round((bottom + BOTTOM) * ratio);
  canvas.style.height = `${bottom + BOTTOM}px`;
  const pen = canvas.getContext("2d");
  const style = getComputedStyle(document.documentElement);
  const css = (name) => style.getPropertyValue(name).trim();
  pen.scale(ratio, ratio);
  pen.fillStyle = css("--panel");
  pen.fillRect(LEFT, TOP, width, bottom - TOP);
  const edge = (bin) => Math.round((LEFT + (bin * width) / bins) * ratio) / ratio;
  const gap = height >= 6 ? 1 : 0;
  rows.forEach((layer, index) => {
    for (let bin = 0; bin < bins; bin++) {
      const first = firstOf(bin, bins), last = firstOf(bin + 1, bins);
      const sum = (of) => of.heads[index].subarray(first, last).reduce((all, n) => all + n, 0);
      const kept = sum(shown);
      if (!kept && !sum(held)) continue;
      pen.fillStyle = kept ? colour(kept / layer.length / (last - first)).paper : css("--held");
      pen.fillRect(edge(bin), TOP + index * height, edge(bin + 1) - edge(bin), height - gap);
    }
  });
  paintAxes(pen, css, width, height, bottom);
}

function paintAxes(pen, css, width, height, bottom) {
  const at = (position) => LEFT + (position / seen) * width;
  pen.font = "11px system-ui, sans-serif";
  pen.fillStyle = css("--soft");
  pen.textBaseline = "middle";
  pen.textAlign = "right";
  const every = Math.ceil(14 / height);
  for (let layer = 0; layer < rows.length; layer += every) {
    pen.fillText(layer, LEFT - 6, TOP + (layer + 0.5) * height);
  }
  pen.fillText("layer", LEFT - 6, TOP / 2);
  pen.textAlign = "center";
  const step = tickStep(seen, width / 70);
  for (let position = 0; position < seen; position += step) {
    pen.fillRect(at(position), bottom, 1, 4);
    pen.fillText(number(position), Math.max(at(position), LEFT + 4), bottom + 13);
  }
  pen.fillStyle = css("--accent");
  pen.textAlign = "right";
  if (promptTokens < seen) {
    pen.fillText("answer", LEFT + width, TOP / 2);
    pen.fillRect(at(promptTokens), TOP / 2 + 6, 1, bottom - TOP / 2 - 6);
  }
  if (scope.layer !== null) {
    pen.strokeStyle = css("--accent");
    pen.strokeRect(LEFT - 0.5, TOP + scope.layer * height - 1, width + 1, height + 1);
  }
}

function tickStep(total, most) {
  const least = total / Math.max(1, most);
  const ten = 10 ** Math.floor(Math.log10(least));
  return Math.max(1, [1, 2, 5, 10].map((n) => n * ten).find((n) => n >= least));
}

function cellAt(event) {
  const { width, height, bins } = mapSize();
  const box = canvas.getBoundingClientRect();
  const bin = Math.floor(((event.clientX - box.left - LEFT) / width) * bins);
  const layer = Math.floor((event.clientY - box.top - TOP) / height);
  if (bin < 0 || bin >= bins || layer < 0 || layer >= rows.length) return null;
  return { layer, first: firstOf(bin, bins), last: firstOf(bin + 1, bins) };
}

function describeCell({ layer, first, last }) {
  if (last - first === 1) return `${tokenInWords(first)}\n${headsInWords(layer, first)}`;
  const text = spans.slice(first, last).map((span) => span.textContent).join("");
  const sum = (of) => of.heads[layer].subarray(first, last).reduce((all, n) => all + n, 0);
  const kept = sum(held), read = reading ? `, ${sum(reading)} read` : "";
  const most = (last - first) * rows[layer].length;
  return (
    `Positions ${number(first)} to ${number(last - 1)}: ${JSON.stringify(text)}\n` +
    `${layerName(layer)}: ${kept} of ${most} slots kept${read}`
  );
}

// Which rows are shown: the address says it, as in #layer=1&head=0

function choose(layer, head) {
  const parts = [["layer", layer], ["head", head]].filter(([, value]) => value !== null);
  location.replace(`#${parts.map((part) => part.join("=")).join("&") || "all"}`);
}

function below(limit, text) {
  return text !== null && /^\d+$/.test(text) && Number(text) < limit ? Number(text) : null;
}

function readAddress() {
  const asked = new URLSearchParams(location.hash.slice(1));
  const layer = below(rows.length, asked.get("layer"));
  scope = { layer, head: layer === null ? null : below(rows[layer].length, asked.get("head")) };
  fillSelects();
  paint();
  for (const link of document.querySelectorAll("#bars a")) {
    link.toggleAttribute("aria-current", link.hash === `#layer=${layer}`);
  }
  for (const link of document.querySelectorAll("#heads a")) {
    const row = `#layer=${layer}&head=${scope.head}`;
    link.toggleAttribute("aria-current", link.hash === row);
  }
}

function fillSelects() {
  const all = compressed.length && compressed.length < rows.length ? "all compressed" : "all";
  const names = rows.map((_, layer) => layerName(layer).replace("Layer ", ""));
  fill("layer", [all, ...names], scope.layer);
  const inLayer = scope.layer === null ? [] : rows[scope.layer].map((_, head) => String(head));
  fill("head", ["all", ...inLayer], scope.head);
  byId("head").disabled = scope.layer === null;
}

function fill(id, names, value) {
  const options = names.map((name, index) => new Option(name, index ? index - 1 : ""));
  byId(id).replaceChildren(...options);
  byId(id).value = value ?? "";
}

function paint() {
  paintText();
  paintMap();
}

const picked = (id) => (byId(id).value === "" ? null : Number(byId(id).value));
byId("layer").addEventListener("change", () => choose(picked("layer"), null));
byId("head").addEventListener("change", () => choose(picked("layer"), picked("head")));
window.addEventListener("hashchange", readAddress);
window.addEventListener("resize", paintMap);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  makePalette();
  paint();
});
fillShow();
makePalette();
readAddress();
