"use strict";
// What the page was filled with, as typed arrays, and the statistics of a selection.

const atlas = JSON.parse(document.getElementById("numbers").textContent);
const LEVELS = ["chapter", "block", "category", "full"];
const LEVEL_NAMES = ["chapter", "block", "category", "code"];
const KINDS = ["full", "category", "chapter", "wrong", "unusable"]; // the deepest level that is right
const KIND_NAMES = atlas.kinds.map(([label]) => label);
const KIND_COLOURS = atlas.kinds.map(([, colour]) => colour);
const REWARDS = ["format", "hierarchical", "grounding", "total"];
const UNUSABLE = -1;
const NOT_ASKED = -2;
const CHUNK = 200; // as in helpers/atlas.py

const count = atlas.cases.hadm_id.length;
const nodes = atlas.nodes.map(([depth, parent, key, name, title]) => ({ depth, parent, key, name, title }));
const childrenOf = nodes.map(() => []);
const roots = [];
nodes.forEach((node, i) => (node.parent < 0 ? roots : childrenOf[node.parent]).push(i));
const nodeOf = new Map(nodes.map((node, i) => [`${LEVELS[node.depth]}:${node.key}`, i]));

// up[depth][node]: the node above it (or itself) at a depth; -1 for a node that lies higher
const up = LEVELS.map((_, depth) =>
  Int32Array.from(nodes, (node, i) => {
    while (i >= 0 && nodes[i].depth > depth) i = nodes[i].parent;
    return i >= 0 && nodes[i].depth === depth ? i : -1;
  }),
);

const ids = Float64Array.from(atlas.cases.hadm_id);
const caseOf = new Map(atlas.cases.hadm_id.map((id, i) => [String(id), i]));
const gold = Int32Array.from(atlas.cases.gold);
const words = Int32Array.from(atlas.cases.words);
const trained = Int32Array.from(atlas.cases.trained);
const sure = count && atlas.cases.sure[0] !== null ? numbers(atlas.cases.sure) : null;

function numbers(values) {
  return Float64Array.from(values, (value) => (value === null ? NaN : value));
}

const KIND_OF_DEPTH = [3, 2, 2, 1, 0];

const columns = atlas.columns.map((column) => {
  const predicted = Int32Array.from(column.predicted);
  const asked = new Uint8Array(count);
  const usable = new Uint8Array(count);
  const deep = new Uint8Array(count); // how many of the four levels are right
  const right = LEVELS.map(() => new Float64Array(count)); // right[depth]: 1, 0, or NaN where the model was not asked
  const answered = new Float64Array(count); // whether the answer is usable, as above
  const kind = new Uint8Array(count); // index into KINDS; 5 where the model was not asked
  for (let i = 0; i < count; i++) {
    const answer = predicted[i];
    asked[i] = answer !== NOT_ASKED;
    usable[i] = answer >= 0;
    while (answer >= 0 && deep[i] < 4 && up[deep[i]][answer] === up[deep[i]][gold[i]]) deep[i]++;
    kind[i] = !asked[i] ? 5 : !usable[i] ? 4 : KIND_OF_DEPTH[deep[i]];
    for (let depth = 0; depth < 4; depth++) right[depth][i] = !asked[i] ? NaN : deep[i] > depth ? 1 : 0;
    answered[i] = asked[i] ? usable[i] : NaN;
  }
  const rewards = Object.fromEntries(REWARDS.map((name) => [name, numbers(column[name])]));
  return { ...column, predicted, asked, usable, deep, right, answered, kind, rewards, grounding: rewards.grounding, reward: rewards.total };
});
const columnOf = new Map(columns.map((column) => [column.key, column]));
const ideal = columnOf.get("ideal");

const repeats = count - new Set(atlas.cases.subject_id).size;

// ------------------------------------------------------------------------------- texts, on demand

const chunks = [...document.querySelectorAll("script.texts")];
const chunkTexts = [];

function texts(i) {
  const place = Math.floor(i / CHUNK);
  if (!chunkTexts[place]) chunkTexts[place] = JSON.parse(chunks[place].textContent);
  const [note, missed, answers] = chunkTexts[place][i % CHUNK];
  return { note, missed, answers };
}

const lowered = new Map(); // "note", or the key of a column -> texts in lower case, for the search

function searchable(what) {
  while (readOn(what));
  return lowered.get(what);
}

// Reads the next texts, so that a search need not wait for all of them; returns whether there were any left.
function readOn(what) {
  if (!lowered.has(what)) lowered.set(what, []);
  const list = lowered.get(what);
  const place = columns.findIndex((column) => column.key === what);
  const [from, to] = [list.length, Math.min(count, list.length + CHUNK)];
  for (let i = from; i < to; i++) {
    const { note, answers } = texts(i);
    list.push((what === "note" ? note : whole(answers[place])).toLowerCase());
  }
  return to > from;
}

function whole(answer) {
  return answer ? answer[2] || answer[0] : "";
}

// ------------------------------------------------------------------------------- statistics

const Z = 1.959964;
const FEWEST = 20; // values that a normal approximation needs; below, and where all are equal, a mean has no interval

function wilson(hits, n) {
  // Wilson (JASA 22, 1927)
  if (!n) return [NaN, NaN];
  const p = hits / n;
  const centre = (p + (Z * Z) / (2 * n)) / (1 + (Z * Z) / n);
  const half = (Z / (1 + (Z * Z) / n)) * Math.sqrt((p * (1 - p)) / n + (Z * Z) / (4 * n * n));
  return [Math.max(0, centre - half), Math.min(1, centre + half)];
}

function pairedShares(gained, lost, n) {
  // Bonett and Price (J Educ Behav Stat 37, 2012), for the difference of two shares on the same cases
  if (!n) return [NaN, NaN];
  const p = (gained + 1) / (n + 2);
  const q = (lost + 1) / (n + 2);
  const half = Z * Math.sqrt((p + q - (p - q) ** 2) / (n + 2));
  return [Math.max(-1, p - q - half), Math.min(1, p - q + half)];
}

// The mean of a measure over cases, with its interval, without keeping the values.
class Collected {
  n = 0;
  sum = 0;
  squares = 0;
  gained = 0;
  lost = 0;
  add(value) {
    if (value !== value) return; // NaN: no value
    this.n += 1;
    this.sum += value;
    this.squares += value * value;
    if (value > 0) this.gained += 1;
    else if (value < 0) this.lost += 1;
  }
  addAll(other) {
    this.n += other.n;
    this.sum += other.sum;
    this.squares += other.squares;
    this.gained += other.gained;
    this.lost += other.lost;
  }
  told(kind) {
    if (kind === "share") return share(this.gained, this.n);
    return kind === "difference" ? difference(this.gained, this.lost, this.n) : this.mean;
  }
  get mean() {
    const { n, sum, squares } = this;
    if (!n) return { value: NaN, low: NaN, high: NaN, n };
    const variance = Math.max(0, (squares - (sum * sum) / n) / (n - 1));
    if (n < FEWEST || variance < 1e-12) return { value: sum / n, low: NaN, high: NaN, n };
    const half = Z * Math.sqrt(variance / n);
    return { value: sum / n, low: sum / n - half, high: sum / n + half, n };
  }
}

function collect(cases, values) {
  const collected = new Collected();
  for (const i of cases) collected.add(values[i]);
  return collected;
}

function collectChange(cases, from, to) {
  const collected = new Collected();
  for (const i of cases) collected.add(to[i] - from[i]);
  return collected;
}

// The differences of two lists of numbers, case by case.
function minus(to, from) {
  const result = new Float64Array(count);
  for (let i = 0; i < count; i++) result[i] = to[i] - from[i];
  return result;
}

function share(hits, n) {
  const [low, high] = wilson(hits, n);
  return { value: n ? hits / n : NaN, low, high, n };
}

function difference(gained, lost, n) {
  const [low, high] = pairedShares(gained, lost, n);
  return { value: n ? (gained - lost) / n : NaN, low, high, n };
}

// ------------------------------------------------------------------------------- text

const MINUS = "−";

function percent(value, signed = false) {
  if (Number.isNaN(value)) return "–";
  const text = Math.abs(100 * value).toFixed(value && Math.abs(value) < 0.0995 ? 1 : 0);
  return sign(value, text, signed) + " %";
}

function decimal(value, signed = false) {
  return Number.isNaN(value) ? "–" : sign(value, Math.abs(value).toFixed(2), signed);
}

function sign(value, text, signed) {
  if (!Number(text)) return text;
  return (value < 0 ? MINUS : signed ? "+" : "") + text;
}

const grouped = new Intl.NumberFormat("en").format;

function plural(n, noun) {
  return `${grouped(n)} ${noun}${n === 1 ? "" : "s"}`;
}

// Everything that is shown is made here: texts become text nodes, never markup.
function h(tag, properties = {}, ...content) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "class") element.className = value;
    else if (name === "style") Object.assign(element.style, value);
    else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "data") Object.assign(element.dataset, value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...content.flat(2).filter((piece) => piece !== null && piece !== undefined && piece !== false));
  return element;
}

function byId(id) {
  return document.getElementById(id);
}
