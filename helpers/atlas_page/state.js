// What the reader has chosen: two columns, filters, a case. It stands in the address of the page.

const state = { a: "", b: "", shown: "b", measure: "right", level: "full", sort: "id", down: false, case: -1, filters: {} };
const bad = new Uint16Array(count); // a bit for each filter that a case fails

const A = () => columnOf.get(state.a);
const B = () => columnOf.get(state.b);
const shown = () => (state.shown === "a" ? A() : B());
const isOne = () => state.a === state.b;

// ------------------------------------------------------------------------------- bands

function quantileBands(values, parts) {
  const sorted = values.slice().sort();
  const cuts = [...new Set(Array.from({ length: parts - 1 }, (_, i) => sorted[Math.floor(((i + 1) * count) / parts)]))];
  return cuts.filter((cut) => cut > sorted[0]);
}

function bandOf(cuts) {
  return (value) => {
    let band = 0;
    while (band < cuts.length && value >= cuts[band]) band++;
    return band;
  };
}

const lengthCuts = quantileBands(words, 5);
const FACETS = {
  length: {
    title: "Length of the note, words",
    bands: [...lengthCuts, Infinity].map((cut, i) => {
      const from = i ? lengthCuts[i - 1] : 0;
      return cut === Infinity ? `${from} and more` : i ? `${from}–${cut - 1}` : `under ${cut}`;
    }),
    of: () => (i) => bandOf(lengthCuts)(words[i]),
  },
  sure: sure && {
    title: "How sure the ideal reader is",
    bands: ["under 50 %", "50–70 %", "70–90 %", "90–99 %", "99 % and more"],
    of: () => (i) => bandOf([0.5, 0.7, 0.9, 0.99])(sure[i]),
  },
  trained: {
    title: "Training cases of the code",
    bands: ["none", "1–9", "10–29", "30–99", "100 and more"],
    of: () => (i) => bandOf([1, 10, 30, 100])(trained[i]),
  },
  grounding: {
    title: "Grounding of the reasoning",
    bands: ["no text", "0 and less", "up to 0.5", "up to 0.99", "all of it"],
    ofShown: true,
    of: () => {
      const values = shown().grounding;
      return (i) => (Number.isNaN(values[i]) ? 0 : values[i] <= 0 ? 1 : values[i] <= 0.5 ? 2 : values[i] < 0.99 ? 3 : 4);
    },
  },
  named: {
    title: "The reasoning names",
    bands: ["the answer’s category", "another category", "no category"],
    ofShown: true,
    of: () => {
      const { named, usable } = shown();
      return (i) => (named[i] && usable[i] ? named[i] - 1 : 2);
    },
  },
  mine: {
    title: "My marks",
    bands: ["marked", "commented, not marked", "neither"],
    of: () => (i) => {
      const own = kept.get(ids[i]);
      return !own ? 2 : own.mark ? 0 : own.comment ? 1 : 2;
    },
  },
};
for (const [key, facet] of Object.entries(FACETS)) if (!facet) delete FACETS[key];

// ------------------------------------------------------------------------------- filters

const nameOf = (node) => (node < 0 ? "no usable answer" : nodes[node].name);
const kindsOf = (cell) => [Math.floor(cell / 5), cell % 5];
const REPAIRED = [5, 10, 15, 20]; // B is right where A is not
const BROKEN = [1, 2, 3, 4];

function flowFilter(bit) {
  return {
    bit,
    read(text) {
      const [level, from, to] = text.split("_");
      const [start, end] = [nodeOf.get(`${level}:${from}`), nodeOf.get(`${level}:${to}`)];
      return start === undefined || (end === undefined && to !== "none") ? null : { from: start, to: end ?? -1 };
    },
    write: ({ from, to }) => `${LEVELS[nodes[from].depth]}_${nodes[from].key}_${to < 0 ? "none" : nodes[to].key}`,
    label: ({ from, to }) => `${nameOf(from)} taken by ${shown().label} for ${from === to ? "itself" : nameOf(to)}`,
    test({ from, to }) {
      const above = up[nodes[from].depth];
      const { predicted } = shown();
      return (i) => above[gold[i]] === from && (to < 0 ? predicted[i] === UNUSABLE : predicted[i] >= 0 && above[predicted[i]] === to);
    },
  };
}

function searchFilter(bit, place) {
  return {
    bit,
    read: (text) => text.trim() || null,
    write: (query) => query,
    label: (query) => (place === "note" ? `note: ${query}` : `reasoning of ${shown().label}: ${query}`),
    test(query) {
      const hits = search(place === "note" ? "note" : shown().key, query);
      return (i) => hits[i];
    },
  };
}

function facetFilter(bit, key) {
  const { title, bands, of, ofShown } = FACETS[key];
  return {
    bit,
    read(text) {
      const chosen = text.split("_").map(Number);
      return chosen.every((band) => band in bands) ? chosen : null;
    },
    write: (chosen) => chosen.join("_"),
    label: (chosen) => `${title}${ofShown ? ` (${shown().label})` : ""}: ${chosen.map((band) => bands[band]).join(" or ")}`,
    test(chosen) {
      const band = of();
      return (i) => chosen.includes(band(i));
    },
  };
}

const FILTERS = {
  node: {
    bit: 0,
    read: (text) => nodeOf.get(text) ?? null,
    write: (node) => `${LEVELS[nodes[node].depth]}:${nodes[node].key}`,
    label: (node) => `true ${LEVEL_NAMES[nodes[node].depth]} ${nodes[node].name}`,
    test: (node) => (i) => up[nodes[node].depth][gold[i]] === node,
  },
  change: {
    bit: 1,
    read(text) {
      const cells = text.split("_").map((pair) => pair.split("-").map((kind) => KINDS.indexOf(kind)));
      return cells.every(([a, b]) => a >= 0 && b >= 0) ? cells.map(([a, b]) => 5 * a + b) : null;
    },
    write: (cells) => cells.map((cell) => kindsOf(cell).map((kind) => KINDS[kind]).join("-")).join("_"),
    label(cells) {
      if (String(cells) === String(REPAIRED)) return `repaired: ${A().label} wrong → ${B().label} right`;
      if (String(cells) === String(BROKEN)) return `broken: ${A().label} right → ${B().label} wrong`;
      if (cells.length > 2) return `${cells.length} cells of ${A().label} → ${B().label}`;
      const names = cells.map((cell) => kindsOf(cell).map((kind) => KIND_NAMES[kind]));
      return names.map(([a, b]) => `${A().label} ${a} → ${B().label} ${b}`).join(" or ");
    },
    test(cells) {
      const [a, b] = [A().kind, B().kind];
      const wanted = new Uint8Array(36);
      for (const cell of cells) wanted[6 * kindsOf(cell)[0] + kindsOf(cell)[1]] = 1;
      return (i) => wanted[6 * a[i] + b[i]];
    },
  },
  flow: flowFilter(2),
  pair: flowFilter(3),
  note: searchFilter(4, "note"),
  think: searchFilter(5, "think"),
};
Object.keys(FACETS).forEach((key, i) => (FILTERS[key] = facetFilter(6 + i, key)));

const searches = new Map();

function search(what, query) {
  const key = `${what}|${query}`;
  if (!searches.has(key)) {
    const parts = [...query.toLowerCase().matchAll(/"([^"]+)"|(\S+)/g)].map((match) => match[1] ?? match[2]);
    const texts = searchable(what);
    searches.set(key, Uint8Array.from(texts, (text) => parts.every((part) => text.includes(part))));
  }
  return searches.get(key);
}

function applyFilters() {
  bad.fill(0);
  for (const [key, value] of Object.entries(state.filters)) {
    const { bit, test } = FILTERS[key];
    const fits = test(value);
    for (let i = 0; i < count; i++) if (!fits(i)) bad[i] |= 1 << bit;
  }
}

// The cases that pass all filters but one's own, so that a picture shows what else there is to choose.
function selected(except) {
  const mask = except ? ~(1 << FILTERS[except].bit) : ~0;
  const result = [];
  for (let i = 0; i < count; i++) if (!(bad[i] & mask)) result.push(i);
  return result;
}

// ------------------------------------------------------------------------------- address

const PLAIN = { a: null, b: null, shown: "b", measure: "right", level: "full", sort: "id" };

function address() {
  const parameters = new URLSearchParams();
  for (const [name, usual] of Object.entries(PLAIN)) if (state[name] !== usual) parameters.set(name, state[name]);
  if (state.down) parameters.set("down", "1");
  for (const [key, value] of Object.entries(state.filters)) parameters.set(key, FILTERS[key].write(value));
  if (state.case >= 0) parameters.set("case", ids[state.case]);
  return "#" + parameters.toString().replace(/%3A/g, ":").replace(/%40/g, "@").replace(/%2C/g, ",");
}

const writing = { timer: 0, isNew: false };

// After the picture is drawn: a browser may take its time over an address.
function writeAddress(isNew) {
  writing.isNew ||= isNew;
  clearTimeout(writing.timer);
  writing.timer = setTimeout(() => {
    const [change, text] = [writing.isNew ? "pushState" : "replaceState", address()];
    writing.isNew = false;
    if (text === location.hash) return;
    try {
      history[change](null, "", text);
    } catch {
      // a frame without an address of its own, as in a notebook
    }
  }, 150);
}

function readAddress() {
  const parameters = new URLSearchParams(location.hash.slice(1));
  const [a, b] = defaultPair();
  const choices = { shown: ["a", "b"], measure: Object.keys(MEASURES), level: LEVELS, sort: Object.keys(SORTS) };
  state.a = columnOf.has(parameters.get("a")) ? parameters.get("a") : a;
  state.b = columnOf.has(parameters.get("b")) ? parameters.get("b") : b;
  for (const [name, known] of Object.entries(choices)) {
    state[name] = known.includes(parameters.get(name)) ? parameters.get(name) : PLAIN[name];
  }
  state.down = parameters.get("down") === "1";
  state.case = caseOf.get(parameters.get("case")) ?? -1;
  state.filters = {};
  for (const [key, filter] of Object.entries(FILTERS)) {
    const value = parameters.has(key) ? filter.read(parameters.get(key)) : null;
    if (value !== null) state.filters[key] = value;
  }
}

function defaultPair() {
  const writers = columns.filter((column) => column.reward.some((value) => !Number.isNaN(value)));
  const other = columns.find((column) => column.key.startsWith("grpo:"));
  if (other && columnOf.has("grpo")) return ["grpo", other.key];
  if (columnOf.has("sft") && columnOf.has("grpo")) return ["sft", "grpo"];
  const [first, second] = writers.length ? writers : columns;
  return [first.key, (second ?? first).key];
}

// ------------------------------------------------------------------------------- marks and comments

const kept = new Map(); // hadm_id -> {mark, comment}
const STORE = `error-atlas:${atlas.run}`;
let isStored = true; // whether this browser keeps what is marked

// All marks that this browser keeps under the name of the run: those of another tab, or of an older run, too.
function stored() {
  try {
    return new Map(JSON.parse(localStorage.getItem(STORE) ?? "[]"));
  } catch {
    return new Map(); // nothing kept, or nothing readable
  }
}

function keep(id, change) {
  const own = { mark: false, comment: "", ...kept.get(id), ...change };
  const all = stored();
  for (const marks of [kept, all]) {
    if (own.mark || own.comment) marks.set(id, own);
    else marks.delete(id);
  }
  try {
    localStorage.setItem(STORE, JSON.stringify([...all]));
    isStored = true;
  } catch {
    isStored = false; // the CSV is the way to keep them
  }
}

function recall() {
  kept.clear();
  for (const [id, own] of stored()) {
    if (caseOf.has(String(id))) kept.set(id, { mark: Boolean(own?.mark), comment: String(own?.comment ?? "") });
  }
}

const CSV = ["hadm_id", "true_code", "a", "a_code", "a_outcome", "b", "b_code", "b_outcome", "mark", "comment"];

function marksAsCsv() {
  const rows = [CSV];
  for (const [id, own] of [...kept].sort(([a], [b]) => a - b)) {
    const i = caseOf.get(String(id));
    const answers = [A(), B()].flatMap((column) => [
      column.key,
      column.predicted[i] >= 0 ? nodes[column.predicted[i]].name : "",
      KINDS[column.kind[i]] ?? "",
    ]);
    rows.push([id, nodes[gold[i]].name, ...answers, own.mark ? 1 : 0, own.comment]);
  }
  return rows.map((row) => row.map(csvCell).join(",")).join("\r\n") + "\r\n";
}

function csvCell(value) {
  let text = String(value);
  if (/^[=+\-@\t\r']/.test(text)) text = `'${text}`; // no spreadsheet takes it for a formula
  return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}

function readCsv(text) {
  const rows = [[""]];
  const comma = /^[^,\n]*;/.test(text) ? ";" : ","; // as spreadsheets of some countries save it
  let quoted = false;
  for (let i = text.charCodeAt(0) === 0xfeff ? 1 : 0; i < text.length; i++) {
    const row = rows.at(-1);
    const letter = text[i];
    if (quoted && letter === '"' && text[i + 1] === '"') row[row.length - 1] += text[++i];
    else if (letter === '"') quoted = !quoted;
    else if (!quoted && letter === comma) row.push("");
    else if (!quoted && letter === "\n") rows.push([""]);
    else if (quoted || letter !== "\r") row[row.length - 1] += letter;
  }
  return rows.filter((row) => row.length > 1 || row[0]);
}

// Adds what a CSV holds to the marks; returns what to say about it.
function loadMarks(text) {
  const [header = [], ...rows] = readCsv(text.replace(/\r\n?/g, "\n"));
  const [id, mark, comment] = ["hadm_id", "mark", "comment"].map((name) => header.indexOf(name));
  if (id < 0 || (mark < 0 && comment < 0)) return "Not loaded: the file has no columns hadm_id and mark or comment.";
  let loaded = 0;
  for (const row of rows) {
    const i = caseOf.get((row[id] ?? "").trim().replace(/\.0$/, "")); // as a spreadsheet may write it
    if (i === undefined) continue;
    const change = {};
    const own = kept.get(ids[i]) ?? { mark: false, comment: "" };
    if (mark >= 0) change.mark = own.mark || /^\s*(1(\.0)?|true|yes|x)\s*$/i.test(row[mark] ?? "");
    const said = (row[comment] ?? "").replace(/^'(?=[=+\-@\t\r'])/, "");
    if (said && !own.comment.includes(said)) change.comment = own.comment ? `${own.comment}\n${said}` : said;
    keep(ids[i], change);
    loaded++;
  }
  const unknown = rows.length - loaded;
  return `Loaded ${plural(loaded, "case")}` + (unknown ? `; ${unknown} of other runs left out.` : ".");
}
