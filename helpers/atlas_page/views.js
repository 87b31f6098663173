// The pictures of a selection: scores, change from A to B, tree, true against predicted, slices.

const SHADES = ["#C98A1B", "#E3BE7F", "#F7F7F7", "#8066AE", "#3F1D6B"]; // sand is wrong or lost, purple right or gained

const channels = (colour) => [1, 3, 5].map((k) => parseInt(colour.slice(k, k + 2), 16));
const ramps = new Map(); // stops -> 101 colours and the ink that is legible on each

function ramp(stops) {
  const key = String(stops);
  if (!ramps.has(key)) {
    const rgb = stops.map(channels);
    const colours = Array.from({ length: 101 }, (_, percent) => {
      const at = (percent / 100) * (rgb.length - 1);
      const low = Math.min(Math.floor(at), rgb.length - 2);
      const mixed = rgb[low].map((from, k) => Math.round(from + (rgb[low + 1][k] - from) * (at - low)));
      return [`rgb(${mixed})`, inkOn(mixed)];
    });
    ramps.set(key, colours);
  }
  return ramps.get(key);
}

function paint(element, stops, place) {
  const percent = Math.round(100 * Math.max(0, Math.min(1, place)));
  const [background, ink] = Number.isNaN(place) ? ["#ececec", "#111"] : ramp(stops)[percent];
  element.style.background = background;
  element.style.color = ink;
}

function inkOn(rgb) {
  const [r, g, b] = rgb.map((channel) => (channel / 255 <= 0.04045 ? channel / 3294.6 : ((channel / 255 + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.179 ? "#000" : "#fff";
}

const depthNow = () => LEVELS.indexOf(state.level);
const rightNow = (column) => column.right[depthNow()];

// What the tree is coloured by: a value for each case, and how the mean of a node is told.
const MEASURES = {
  right: {
    label: () => `share right, ${shown().label}`,
    of: () => rightNow(shown()),
    kind: "share",
    range: [0, 1],
    levelled: true,
  },
  change: {
    label: () => `change in share right, ${A().label} → ${B().label}`,
    of: () => minus(rightNow(B()), rightNow(A())),
    kind: "difference",
    range: [-0.4, 0.4],
    levelled: true,
  },
  reward: { label: () => `mean reward, ${shown().label}`, of: () => shown().reward, kind: "mean", range: [-0.5, 1.1] },
  reward_change: {
    label: () => `change in reward, ${A().label} → ${B().label}`,
    of: () => minus(B().reward, A().reward),
    kind: "gain",
    range: [-0.4, 0.4],
  },
  grounding: { label: () => `grounding, ${shown().label}`, of: () => shown().grounding, kind: "mean", range: [0, 1] },
  ceiling: ideal && {
    label: () => `distance to the ideal reader, ${shown().label}`,
    of: () => minus(rightNow(shown()), rightNow(ideal)),
    kind: "difference",
    range: [-0.4, 0.4],
    levelled: true,
  },
};
if (!ideal) delete MEASURES.ceiling;

const isSigned = (kind) => kind === "difference" || kind === "gain";
const tell = (kind, value) => (kind === "share" || kind === "difference" ? percent : decimal)(value, isSigned(kind));

function told(kind, { value, low, high }) {
  if (Number.isNaN(value)) return "no value";
  const range = Number.isNaN(low) ? "" : ` [${tell(kind, low)}, ${tell(kind, high)}]`;
  return tell(kind, value).replace(" %", " %") + range;
}

// ------------------------------------------------------------------------------- redrawing, keys, tips

// Replaces what is in a box; the focus stays on the mark with the same key.
function redraw(box, ...content) {
  const key = box.contains(document.activeElement) ? document.activeElement.dataset.key : null;
  box.replaceChildren(...content.flat().filter(Boolean));
  const marks = [...box.querySelectorAll("[data-key]")];
  const same = key && marks.find((mark) => mark.dataset.key === key);
  if (box.dataset.roving !== undefined) marks.forEach((mark, i) => (mark.tabIndex = (same ? mark === same : i === 0) ? 0 : -1));
  if (same) same.focus({ preventScroll: true });
}

// One stop for the tab key; arrows move to the nearest mark in their direction.
function roving(box) {
  box.dataset.roving = "";
  box.addEventListener("keydown", (event) => {
    const step = { ArrowUp: [0, -1], ArrowDown: [0, 1], ArrowLeft: [-1, 0], ArrowRight: [1, 0] }[event.key];
    const from = event.target.closest("[data-key]");
    if (!step || !from || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    const place = (mark) => {
      const { x, y, width, height } = mark.getBoundingClientRect();
      return step[0] ? [(x + width / 2) * step[0], y + height / 2] : [(y + height / 2) * step[1], x + width / 2];
    };
    const [along, across] = place(from);
    let best = null;
    for (const mark of box.querySelectorAll("[data-key]")) {
      const [far, aside] = place(mark);
      const distance = far - along + 4 * Math.abs(aside - across);
      if (far > along + 2 && (!best || distance < best.distance)) best = { mark, distance };
    }
    if (!best) return;
    from.tabIndex = -1;
    best.mark.tabIndex = 0;
    best.mark.focus();
  });
}

const tips = new WeakMap(); // mark -> function that gives the lines of its tip

function withTip(element, lines) {
  tips.set(element, lines);
  return element;
}

function tipFor(event) {
  const mark = event.target.closest?.("[data-key]");
  const tip = byId("tip");
  if (!mark || !tips.has(mark)) return void (tip.hidden = true);
  const [first, ...rest] = tips.get(mark)();
  tip.replaceChildren(h("strong", {}, first), ...rest.filter(Boolean).map((line) => h("div", {}, line)));
  tip.hidden = false;
  const { left, bottom, top } = mark.getBoundingClientRect();
  const isPointer = event.type.startsWith("pointer");
  const [x, y] = isPointer ? [event.clientX + 14, event.clientY + 16] : [left + 12, bottom + 6];
  const { offsetWidth: width, offsetHeight: height } = tip;
  tip.style.left = `${Math.max(4, Math.min(x, innerWidth - width - 8))}px`;
  tip.style.top = `${y + height > innerHeight - 8 ? Math.max(4, (isPointer ? event.clientY : top) - height - 10) : y}px`;
}

// ------------------------------------------------------------------------------- scores

function drawScores(cases) {
  const all = cases.length === count;
  byId("count").textContent = all ? `all ${plural(count, "case")}` : `${grouped(cases.length)} of ${plural(count, "case")}`;
  const both = isOne() ? [A()] : [A(), B()];
  const lines = [
    ...LEVELS.map((_, depth) => [`right ${LEVEL_NAMES[depth]}`, "share", (column) => column.right[depth]]),
    ["usable answer", "share", (column) => column.answered],
    ["reward", "mean", (column) => column.reward],
    ["grounding", "mean", (column) => column.grounding],
  ];
  const shared = cases.filter((i) => both.every((column) => column.asked[i])); // like with like
  const rows = lines.map(([name, kind, of]) => {
    const results = both.map((column) => collect(shared, of(column)).told(kind));
    const cells = results.map((result) => h("td", {}, h("b", {}, tell(kind, result.value)), interval(kind, result)));
    const change = kind === "share" ? "difference" : "gain";
    const gap = isOne() ? null : collectChange(shared, of(A()), of(B())).told(change);
    const isClear = gap && (gap.low > 0 || gap.high < 0);
    return h(
      "tr",
      {},
      h("th", { scope: "row" }, name),
      cells,
      h("td", { class: "plot" }, whiskers(results, both, kind)),
      gap && h("td", { class: isClear ? "clear" : "" }, h("b", {}, tell(change, gap.value)), interval(change, gap)),
    );
  });
  const hints = [];
  if (["change", "flow", "pair", "named", "grounding", "think"].some((key) => key in state.filters)) hints.push("Cases chosen by their outcome: these scores follow from the choice.");
  for (const column of both) {
    const asked = cases.filter((i) => column.asked[i]).length;
    if (asked < cases.length) hints.push(`${column.label} was asked in ${grouped(asked)} of these cases${isOne() ? "" : ": the scores count those of both"}.`);
  }
  const heads = both.map((column, k) => h("th", { scope: "col" }, dot(column), `${"AB"[k]} ${column.label}`));
  redraw(
    byId("scores"),
    h(
      "table",
      { class: "scores" },
      h("thead", {}, h("tr", {}, h("td"), heads, h("td", { class: "plot" }), !isOne() && h("th", { scope: "col" }, "B − A"))),
      h("tbody", {}, rows),
    ),
    h("p", { class: "hint fixed" }, hints.join(" ")),
  );
}

function interval(kind, { value, low, high }) {
  if (Number.isNaN(value) || Number.isNaN(low)) return null;
  return h("span", { class: "interval" }, `[${tell(kind, low).replace(" %", "")}, ${tell(kind, high).replace(" %", "")}]`);
}

function dot(column) {
  return h("span", { class: "dot", style: { background: column.colour }, "aria-hidden": "true" });
}

// The values of A and B with their intervals on one scale; the numbers beside them say the same.
function whiskers(results, both, kind) {
  const place = (value) => 100 * Math.max(0, Math.min(1, kind === "share" ? value : (value + 0.5) / 1.6));
  const lines = results.map(({ value, low, high }, k) => {
    if (Number.isNaN(value)) return null;
    const colour = both[k].colour;
    const from = Number.isNaN(low) ? value : low;
    const to = Number.isNaN(high) ? value : high;
    return h(
      "span",
      { class: "whisker" },
      h("i", { style: { left: `${place(from)}%`, width: `${place(to) - place(from)}%`, background: colour } }),
      h("b", { style: { left: `${place(value)}%`, background: colour } }),
    );
  });
  return h("span", { class: "whiskers", "aria-hidden": "true" }, lines);
}

function drawMacro() {
  const known = columns.filter((column) => atlas.scores[column.key]);
  byId("repeats").textContent = repeats
    ? `${plural(repeats, "case")} here are of a patient who has another one.`
    : "each is of another patient.";
  if (!known.length) return redraw(byId("macro"), h("p", {}, "This run has no metrics.json: notebook 6 makes it."));
  const at = (column, level) => atlas.scores[column.key][level];
  const levels = ["chapter", "category", "full"];
  const rows = known.map((column) =>
    h(
      "tr",
      {},
      h("th", { scope: "row" }, dot(column), column.label),
      levels.map((level) => {
        const { f1_gold: value, ci } = at(column, level) ?? {};
        return h("td", {}, h("b", {}, decimal(value ?? NaN)), ci && ci[0] !== null && interval("mean", { value, low: ci[0], high: ci[1] }));
      }),
    ),
  );
  redraw(
    byId("macro"),
    h(
      "table",
      { class: "scores" },
      h("caption", {}, "Macro-F1 of the whole test set, from metrics.json: its intervals are a bootstrap over patients. A selection has none here: its classes would be others."),
      h("thead", {}, h("tr", {}, h("td"), levels.map((level) => h("th", { scope: "col" }, level === "full" ? "code" : level)))),
      h("tbody", {}, rows),
    ),
  );
}

// ------------------------------------------------------------------------------- from A to B

function drawChange() {
  const box = byId("transition");
  byId("panel-flow").classList.toggle("single", isOne());
  const cells = new Int32Array(36);
  const cases = selected("change");
  for (const i of cases) cells[6 * A().kind[i] + B().kind[i]]++;
  const at = (a, b) => cells[6 * a + b];
  const range = [0, 1, 2, 3, 4];
  const total = range.reduce((sum, a) => sum + range.reduce((part, b) => part + at(a, b), 0), 0);
  const chosen = state.filters.change ?? [];
  const toggled = (list) => {
    const isOn = list.every((cell) => chosen.includes(cell));
    const others = chosen.filter((cell) => !list.includes(cell));
    return isOn ? others : [...others, ...list].sort((x, y) => x - y);
  };
  const pick = (list) => update({ filters: { change: toggled(list) } });
  const most = Math.max(1, ...range.flatMap((a) => range.filter((b) => b !== a).map((b) => at(a, b))));
  const sum = (list) => list.reduce((n, cell) => n + at(...kindsOf(cell)), 0);

  const take = byId("transition-take");
  if (isOne()) {
    redraw(take, `One model is chosen twice: choose another for A or B to see what changes.`);
  } else {
    const button = (list, text) =>
      h("button", { type: "button", class: "link", "aria-pressed": String(list.every((cell) => chosen.includes(cell))), data: { key: text.split(" ")[1] }, onclick: () => update({ filters: { change: String(chosen) === String(list) ? [] : list } }) }, text);
    redraw(take, `${B().label} has `, button(REPAIRED, `${sum(REPAIRED)} repaired`), ` and `, button(BROKEN, `${sum(BROKEN)} broken`), ` of ${plural(total, "answer")} of ${A().label}.`);
  }

  const cell = (a, b) => {
    const n = at(a, b);
    const index = 5 * a + b;
    const text = `${A().label} ${KIND_NAMES[a]}, ${B().label} ${KIND_NAMES[b]}: ${plural(n, "case")}`;
    const button = h("button", { type: "button", "aria-label": text, "aria-pressed": String(chosen.includes(index)), data: { key: `c${index}` }, onclick: () => pick([index]) }, String(n));
    if (a === b) paint(button, ["#F4F4F4", "#D4D4D4"], n / (total || 1));
    else paint(button, b < a ? ["#F7F7F7", "#A794C9"] : ["#F7F7F7", "#E3BE7F"], n ? 0.15 + (0.85 * n) / most : 0);
    if (!n && !chosen.includes(index)) button.classList.add("none");
    withTip(button, () => [text, total ? `${percent(n / total)} of the answers` : "", b < a ? "B is better" : b > a ? "B is worse" : "no change"]);
    return h("td", {}, button);
  };
  const edge = (list, n, name) =>
    h("button", { type: "button", class: "edge", "aria-label": `${name}: ${plural(n, "case")}`, data: { key: `e${list}` }, onclick: () => pick(list) }, String(n));
  redraw(
    box,
    h(
      "table",
      { class: "matrix" },
      h("caption", { class: "hidden" }, `Outcome of ${A().label} in rows, of ${B().label} in columns`),
      h(
        "thead",
        {},
        h("tr", {}, h("td", { class: "corner" }, dot(A()), `A ${A().label} ↓`, h("br"), dot(B()), `B ${B().label} →`), KIND_NAMES.map((name, b) => h("th", { scope: "col" }, swatch(b), name)), h("th", { scope: "col" }, "all")),
      ),
      h(
        "tbody",
        {},
        range.map((a) => {
          const row = range.map((b) => 5 * a + b);
          return h("tr", {}, h("th", { scope: "row" }, swatch(a), KIND_NAMES[a]), range.map((b) => cell(a, b)), h("td", {}, edge(row, sum(row), `${A().label} ${KIND_NAMES[a]}`)));
        }),
        h(
          "tr",
          {},
          h("th", { scope: "row" }, "all"),
          range.map((b) => {
            const column = range.map((a) => 5 * a + b);
            return h("td", {}, edge(column, sum(column), `${B().label} ${KIND_NAMES[b]}`));
          }),
          h("td", { class: "total" }, grouped(total)),
        ),
      ),
    ),
  );
}

function swatch(kind) {
  return h("span", { class: "swatch", style: { background: KIND_COLOURS[kind] }, "aria-hidden": "true" });
}

// ------------------------------------------------------------------------------- tree

const treeMarks = new Map(); // node -> its element, with its parts
const sizes = { tree: 620, list: 720, scroll: 0 }; // pixels, kept so that no redrawing has to wait for the layout
const LINE = 15; // pixels that a line of text needs

function drawTree() {
  const box = byId("tree");
  const measure = MEASURES[state.measure];
  const values = measure.of();
  const cases = selected("node");
  const zoom = state.filters.node ?? -1;
  const totals = new Int32Array(nodes.length);
  const collected = nodes.map(() => null);
  for (const i of cases) {
    totals[gold[i]]++;
    (collected[gold[i]] ??= new Collected()).add(values[i]);
  }
  for (let node = nodes.length - 1; node >= 0; node--) {
    const { parent } = nodes[node]; // stands before its children
    if (!collected[node] || parent < 0) continue;
    totals[parent] += totals[node];
    (collected[parent] ??= new Collected()).addAll(collected[node]);
  }
  const height = sizes.tree;
  const needed = [];
  const lay = (node, top, size) => {
    if (size < 2) return;
    needed.push([node, top, size]);
    let from = top;
    for (const child of childrenOf[node]) {
      const part = (size * totals[child]) / totals[node];
      if (totals[child]) lay(child, from, part);
      from += part;
    }
  };
  for (let node = zoom < 0 ? -1 : nodes[zoom].parent; node >= 0; node = nodes[node].parent) needed.unshift([node, 0, height]);
  if (zoom >= 0) lay(zoom, 0, height);
  else {
    let from = 0;
    for (const node of roots) {
      if (!totals[node]) continue;
      lay(node, from, (height * totals[node]) / cases.length);
      from += (height * totals[node]) / cases.length;
    }
  }
  const focused = box.contains(document.activeElement) ? document.activeElement : null;
  const wanted = new Set(needed.map(([node]) => node));
  for (const [node, mark] of treeMarks) if (!wanted.has(node)) mark.hidden = true;
  const isNew = needed.some(([node]) => !treeMarks.has(node));
  for (const [node, top, size] of needed) {
    if (!treeMarks.has(node)) treeMarks.set(node, treeMark(node));
    const mark = treeMarks.get(node);
    mark.hidden = false;
    const result = collected[node] ? collected[node].told(measure.kind) : { value: NaN, n: 0 };
    const { depth, name, title } = nodes[node];
    mark.style.top = `${top}px`;
    mark.style.height = `${Math.max(1, size - 1)}px`;
    paint(mark, SHADES, (result.value - measure.range[0]) / (measure.range[1] - measure.range[0]));
    const value = Number.isNaN(result.value) || size < LINE ? "" : tell(measure.kind, result.value);
    treeLabels.set(mark, () => `${LEVEL_NAMES[depth]} ${name}, ${plural(totals[node], "case")}, ${measure.label()} ${told(measure.kind, result)}`);
    mark.setAttribute("aria-selected", String(node === zoom));
    mark.classList.toggle("small", size < LINE);
    mark.classList.toggle("tall", size >= 3 * LINE);
    mark.lastElementChild.textContent = value;
    withTip(mark, () => [
      `${depth === 1 ? "Block" : ""} ${depth === 0 ? "Chapter " : ""}${name}${title && depth ? ` ${title}` : ""}`.trim(),
      plural(totals[node], "case") + (result.n < totals[node] ? `, ${grouped(result.n)} of them with a value` : ""),
      `${measure.label()}${measure.levelled ? ` (${LEVEL_NAMES[depthNow()]})` : ""}: ${told(measure.kind, result)}`,
      measure.kind === "difference" && `better in ${collected[node].gained}, worse in ${collected[node].lost}`,
      node === zoom ? "Click to go up" : "Click to zoom in and filter",
    ]);
  }
  if (isNew) {
    const all = [...treeMarks.keys()].sort((x, y) => x - y); // the order of the classification
    box.replaceChildren(...all.map((node) => treeMarks.get(node)));
  }
  const first = focused && !focused.hidden ? focused : (treeMarks.get(zoom) ?? treeMarks.get(needed[0]?.[0]));
  box.querySelector("[tabindex='0']")?.setAttribute("tabindex", "-1");
  first?.setAttribute("tabindex", "0");
  if (focused && document.activeElement !== first) first?.focus({ preventScroll: true });
  box.classList.toggle("empty", !cases.length);
  drawCrumbs(zoom);
  drawLegend(measure);
}

const treeLabels = new Map(); // mark -> what a screen reader says, written after the picture

function labelTree() {
  for (const [mark, label] of treeLabels) mark.setAttribute("aria-label", label());
  treeLabels.clear();
}

function treeMark(node) {
  const { depth, name, title } = nodes[node];
  const text = depth === 0 ? name : title ? `${name} ${title}` : name;
  return h(
    "div",
    {
      role: "treeitem",
      "aria-level": depth + 1,
      tabindex: "-1",
      class: `node depth-${depth}`,
      data: { key: String(node) },
      onclick: () => update({ filters: { node: node === state.filters.node ? (nodes[node].parent < 0 ? null : nodes[node].parent) : node } }),
    },
    h("span", { class: "name" }, text),
    h("span", { class: "value" }),
  );
}

function treeKeys(event) {
  const mark = event.target.closest("[role=treeitem]");
  if (!mark || event.altKey || event.ctrlKey || event.metaKey) return;
  const all = [...event.currentTarget.children].filter((node) => !node.hidden);
  const place = all.indexOf(mark);
  const depth = (element) => Number(element.getAttribute("aria-level"));
  const level = depth(mark);
  const beside = (list) => list.find((other) => depth(other) === level);
  let next = null;
  if (event.key === "Enter" || event.key === " ") mark.click();
  else if (event.key === "ArrowDown") next = beside(all.slice(place + 1));
  else if (event.key === "ArrowUp") next = beside(all.slice(0, place).reverse());
  else if (event.key === "ArrowRight") next = depth(all[place + 1] ?? mark) === level + 1 ? all[place + 1] : null;
  else if (event.key === "ArrowLeft") next = all.slice(0, place).reverse().find((other) => depth(other) === level - 1);
  else if (event.key === "Home") next = all[0];
  else if (event.key === "End") next = all.at(-1);
  else return;
  event.preventDefault();
  if (!next) return;
  mark.tabIndex = -1;
  next.tabIndex = 0;
  next.focus();
}

function drawCrumbs(zoom) {
  const path = [];
  for (let node = zoom; node >= 0; node = nodes[node].parent) path.unshift(node);
  const crumb = (node, text) =>
    h("button", { type: "button", class: "link", data: { key: `k${node}` }, "aria-current": node === zoom ? "location" : null, onclick: () => update({ filters: { node: node < 0 ? null : node } }) }, text);
  redraw(byId("crumbs"), crumb(-1, "All chapters"), path.map((node) => [" › ", crumb(node, nodes[node].name)]).flat());
}

function drawLegend(measure) {
  const [low, high] = measure.range;
  redraw(
    byId("legend"),
    h("span", {}, (isSigned(measure.kind) ? "≤ " : "") + tell(measure.kind, low)),
    h("span", { class: "ramp", style: { background: `linear-gradient(to right, ${SHADES})` } }),
    h("span", {}, (isSigned(measure.kind) ? "≥ " : "") + tell(measure.kind, high)),
  );
}

// ------------------------------------------------------------------------------- true against predicted

const MOST_ROWS = 20;
const MOST_COLUMNS = 24;

function drawHeat() {
  const zoom = state.filters.node ?? -1;
  const depth = zoom < 0 ? 0 : 2;
  const above = up[depth];
  const { predicted, label } = shown();
  const { flow } = state.filters;
  const isOther = flow && nodes[flow.from].depth !== depth; // chosen in the table of another level
  const cases = isOther ? selected() : selected("flow");
  const rows = new Map(); // true class -> predicted class -> cases
  const totals = new Map();
  const named = new Map();
  for (const i of cases) {
    if (predicted[i] === NOT_ASKED) continue;
    const [from, to] = [above[gold[i]], predicted[i] < 0 ? UNUSABLE : above[predicted[i]]];
    if (!rows.has(from)) rows.set(from, new Map());
    rows.get(from).set(to, (rows.get(from).get(to) ?? 0) + 1);
    totals.set(from, (totals.get(from) ?? 0) + 1);
    named.set(to, (named.get(to) ?? 0) + 1);
  }
  const n = (from, to) => rows.get(from)?.get(to) ?? 0;
  const { rowClasses, columnClasses, left } = depth ? classesInside(totals, named) : allChapters();

  const lost = (from) => totals.get(from) - n(from, from);
  const sized = rowClasses.filter((from) => totals.get(from) >= 10 && lost(from));
  const worst = sized.sort((x, y) => lost(y) / totals.get(y) - lost(x) / totals.get(x))[0];
  const level = LEVEL_NAMES[depth];
  byId("heat-take").textContent =
    worst === undefined
      ? `${label}, by ${level}.`
      : `${label} loses most in ${nodes[worst].name}: ${lost(worst)} of ${totals.get(worst)} are not given the right ${level}.`;

  const table = heatTable(depth, rowClasses, columnClasses);
  const chosen = state.filters.flow;
  for (const from of rowClasses) {
    table.sizes.get(from).textContent = ` ${totals.get(from) ?? 0}`;
    for (const to of columnClasses) {
      const cases = n(from, to);
      const button = heatButton(table, from, to, cases);
      if (!cases) continue;
      const part = cases / totals.get(from);
      button.textContent = cases;
      button.setAttribute("aria-label", `true ${nameOf(from)}, predicted ${nameOf(to)}: ${cases} of ${totals.get(from)}`);
      button.setAttribute("aria-pressed", String(Boolean(chosen && chosen.from === from && chosen.to === to)));
      paint(button, from === to ? OWN : OTHER, from === to ? part : 0.1 + 1.8 * part);
      withTip(button, () => [
        `${nameOf(from)} → ${nameOf(to)}`,
        `${cases} of ${plural(totals.get(from), "case")} (${percent(part)} ${interval95(cases, totals.get(from))})`,
        nodes[from].title,
        to >= 0 && to !== from ? `taken for ${nodes[to].title ?? nameOf(to)}` : "",
      ]);
    }
  }
  table.caption.textContent = `True ${level} in rows, ${level} predicted by ${label} in columns, cases`;
  const more = left > 0 ? ` ${plural(left, "rarer column")} left out: see the pairs below.` : "";
  table.hint.textContent = `Purple: right ${level}. Sand: another one. Shade: share of the row. ∅: no usable answer.${more}`;
  const marks = [...table.element.querySelectorAll("button:not([hidden])")];
  const stop = marks.find((button) => button === document.activeElement) ?? marks[0];
  byId("heat").querySelector("[tabindex='0']")?.setAttribute("tabindex", "-1");
  stop?.setAttribute("tabindex", "0");
  if (stop) byId("heat").removeAttribute("tabindex");
  else byId("heat").setAttribute("tabindex", "0"); // it may have to be scrolled even without a mark
}

const OWN = ["#F1EDF8", "#8066AE", "#3F1D6B"];
const OTHER = ["#FBF3E4", "#E3BE7F", "#C98A1B"];
const heat = { key: "", chapters: null };

// The table for these classes: made once, then only its numbers change. That of the chapters is kept for the way back.
function heatTable(depth, rowClasses, columnClasses) {
  const key = `${rowClasses}|${columnClasses}`;
  if (heat.key === key) return heat.table;
  heat.key = key;
  heat.table = depth ? makeHeatTable(depth, rowClasses, columnClasses) : (heat.chapters ??= makeHeatTable(depth, rowClasses, columnClasses));
  byId("heat").replaceChildren(heat.table.element, heat.table.hint);
  return heat.table;
}

function makeHeatTable(depth, rowClasses, columnClasses) {
  const table = { cells: new Map(), buttons: new Map(), sizes: new Map(), caption: h("caption", { class: "hidden" }), hint: h("p", { class: "hint" }) };
  const short = (to) => (to < 0 ? "∅" : depth ? nodes[to].name : nodes[to].key);
  const cell = (from, to) => {
    table.cells.set(`${from}_${to}`, h("td", { class: from === to ? "own" : null }));
    return table.cells.get(`${from}_${to}`);
  };
  const row = (from) => {
    table.sizes.set(from, h("span", { class: "hint" }));
    return h("tr", {}, h("th", { scope: "row" }, nodes[from].name, table.sizes.get(from)), columnClasses.map((to) => cell(from, to)));
  };
  table.element = h(
    "table",
    { class: "heat", style: { minWidth: `${10 + 1.25 * columnClasses.length}rem` } },
    table.caption,
    h("colgroup", {}, h("col", { class: "first" }), h("col", { span: columnClasses.length })),
    h("thead", {}, h("tr", {}, h("td", { class: "corner" }, "true ↓, predicted →"), columnClasses.map((to) => h("th", { scope: "col", title: nameOf(to) }, short(to))))),
    h("tbody", {}, rowClasses.map(row)),
  );
  return table;
}

// The button of a cell, which a cell has from the first time that it holds a case.
function heatButton({ cells, buttons }, from, to, cases) {
  const key = `${from}_${to}`;
  if (cases && !buttons.has(key)) {
    const pick = () => {
      const chosen = state.filters.flow;
      update({ filters: { flow: chosen && chosen.from === from && chosen.to === to ? null : { from, to } } });
    };
    buttons.set(key, h("button", { type: "button", tabindex: "-1", data: { key }, onclick: pick }));
    cells.get(key).append(buttons.get(key));
  }
  if (buttons.has(key)) buttons.get(key).hidden = !cases;
  return buttons.get(key);
}

// All chapters that are true in some case or that a column names, whatever is selected.
function allChapters() {
  const rowClasses = roots.filter((root) => atlas.cases.gold.some((leaf) => up[0][leaf] === root));
  return { rowClasses, columnClasses: [...roots, UNUSABLE], left: 0 };
}

// The most frequent categories of a zoomed tree, and what they are taken for.
function classesInside(totals, named) {
  const often = (map) => [...map.keys()].sort((x, y) => map.get(y) - map.get(x));
  const rowClasses = often(totals).slice(0, MOST_ROWS).sort((x, y) => x - y);
  const others = often(named).filter((to) => to >= 0 && !rowClasses.includes(to));
  const room = Math.max(0, MOST_COLUMNS - rowClasses.length);
  const columnClasses = [...rowClasses, ...others.slice(0, room)].sort((x, y) => x - y);
  return { rowClasses, columnClasses: [...columnClasses, UNUSABLE], left: others.length - room };
}

function interval95(hits, n) {
  const [low, high] = wilson(hits, n);
  return `[${percent(low)}, ${percent(high)}]`;
}

function drawPairs() {
  const { predicted, usable } = shown();
  const pairs = new Map();
  const totals = new Map();
  for (const i of selected("pair")) {
    totals.set(gold[i], (totals.get(gold[i]) ?? 0) + 1);
    if (!usable[i] || predicted[i] === gold[i]) continue;
    const key = `${gold[i]}_${predicted[i]}`;
    pairs.set(key, (pairs.get(key) ?? 0) + 1);
  }
  const top = [...pairs].sort((x, y) => y[1] - x[1]).slice(0, 8);
  const chosen = state.filters.pair;
  const rows = top.map(([key, n]) => {
    const [from, to] = key.split("_").map(Number);
    const isOn = Boolean(chosen && chosen.from === from && chosen.to === to);
    const of = totals.get(from);
    const kind = up[2][from] === up[2][to] ? 1 : up[0][from] === up[0][to] ? 2 : 3;
    return withTip(
      h(
        "button",
        { type: "button", class: "pair", "aria-pressed": String(isOn), data: { key }, onclick: () => update({ filters: { pair: isOn ? null : { from, to } } }) },
        h("span", { class: "codes" }, `${nodes[from].name} → ${nodes[to].name}`),
        h("span", { class: "bar" }, h("i", { style: { width: `${(100 * n) / of}%`, background: KIND_COLOURS[kind] } })),
        h("span", { class: "number" }, `${n} of ${of}`),
        h("span", { class: "titles" }, `${nodes[from].title ?? "?"} → ${nodes[to].title ?? "?"}`),
      ),
      () => [`${nodes[from].name} taken for ${nodes[to].name}`, nodes[from].title, `→ ${nodes[to].title}`, `${n} of ${plural(of, "case")} ${interval95(n, of)}; ${KIND_NAMES[kind]}`],
    );
  });
  redraw(byId("pairs"), rows.length ? rows : h("p", { class: "hint" }, "No wrong code in this selection."));
}

// ------------------------------------------------------------------------------- slices

function drawFacets() {
  const { asked, kind } = shown();
  const boxes = Object.entries(FACETS).map(([key, { title, bands, of, ofShown }]) => {
    const band = of();
    const [sizes, rights] = [new Int32Array(bands.length), new Int32Array(bands.length)];
    for (const i of selected(key)) {
      if (!asked[i]) continue;
      sizes[band(i)]++;
      rights[band(i)] += kind[i] === 0;
    }
    const chosen = state.filters[key] ?? [];
    const most = Math.max(1, ...sizes);
    const bars = bands.map((name, k) => {
      const isOn = chosen.includes(k);
      const next = isOn ? chosen.filter((other) => other !== k) : [...chosen, k].sort();
      const [n, right] = [sizes[k], rights[k]];
      const text = `${title}, ${name}: ${plural(n, "case")}${n ? `, ${percent(right / n)} right` : ""}`;
      return withTip(
        h(
          "button",
          { type: "button", class: "band", "aria-label": text, "aria-pressed": String(isOn), data: { key: `${key}${k}` }, onclick: () => update({ filters: { [key]: next } }) },
          h("span", { class: "name" }, name),
          h("span", { class: "bar" }, h("i", { style: { width: `${(100 * n) / most}%` } }), h("b", { style: { width: `${(100 * right) / most}%` } })),
          h("span", { class: "number" }, n ? `${n} · ${percent(right / n)}` : "0"),
        ),
        () => [`${title}: ${name}`, plural(n, "case"), n ? `right code, ${shown().label}: ${percent(right / n)} ${interval95(right, n)}` : ""],
      );
    });
    return h("fieldset", { class: "facet" }, h("legend", {}, title, ofShown ? ` (${shown().label})` : ""), bars);
  });
  redraw(byId("facets"), boxes);
}
