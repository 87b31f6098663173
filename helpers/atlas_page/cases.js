// The list of cases, of which only the rows in view exist, and one case in full.

const ROW = 40; // pixels, as in atlas.css
let order = []; // the cases of the selection, sorted

const gain = (i) => (A().asked[i] && B().asked[i] ? B().deep[i] - A().deep[i] : NaN);
const SORTS = {
  id: { label: "admission", of: (i) => ids[i] },
  truth: { label: "true code", of: (i) => gold[i] },
  a: { label: "outcome of A", of: (i) => A().kind[i] },
  b: { label: "outcome of B", of: (i) => B().kind[i] },
  gain: { label: "levels gained from A to B", of: gain },
  reward: { label: "change in reward", of: (i) => B().reward[i] - A().reward[i] },
  grounding: { label: "grounding of the reasoning", of: (i) => shown().grounding[i] },
  length: { label: "length of the note", of: (i) => words[i] },
  trained: { label: "training cases of the code", of: (i) => trained[i] },
  sure: sure && { label: "how sure the ideal reader is", of: (i) => sure[i] },
};
if (!sure) delete SORTS.sure;

function sorted(cases) {
  const { of } = SORTS[state.sort];
  const values = new Float64Array(count);
  for (const i of cases) values[i] = Number.isNaN(of(i)) ? Infinity : of(i) * (state.down ? -1 : 1);
  return cases.sort((x, y) => values[x] - values[y] || x - y);
}

function current() {
  return state.case >= 0 && !bad[state.case] ? state.case : (order[0] ?? -1);
}

function drawList(cases) {
  order = sorted(cases);
  const { label } = SORTS[state.sort];
  byId("sorted").textContent = `by ${label}${state.down ? ", largest first" : ""}`;
  byId("rows").style.height = `${order.length * ROW}px`;
  reveal();
  drawRows();
}

function drawRows() {
  const list = byId("list");
  const first = Math.max(0, Math.floor(sizes.scroll / ROW) - 4);
  const last = Math.min(order.length, Math.ceil((sizes.scroll + sizes.list) / ROW) + 4);
  const now = current();
  const rows = [];
  for (let place = first; place < last; place++) {
    const i = order[place];
    const own = kept.get(ids[i]);
    rows.push(
      h(
        "div",
        {
          role: "option",
          id: `row-${i}`,
          class: "row",
          "aria-selected": String(i === now),
          "aria-posinset": place + 1,
          "aria-setsize": order.length,
          style: { top: `${place * ROW}px` },
          onclick: () => openCase(i),
        },
        h("span", { class: "star", "aria-label": own?.mark ? "marked" : null, role: own?.mark ? "img" : null }, own?.mark ? "★" : own?.comment ? "✎" : ""),
        h("span", { class: "id" }, String(ids[i])),
        h("span", { class: "truth" }, h("b", {}, nodes[gold[i]].name), ` ${nodes[gold[i]].title ?? ""}`),
        pill(A(), i, "A"),
        isOne() ? null : pill(B(), i, "B"),
      ),
    );
  }
  byId("rows").replaceChildren(...rows);
  const row = now >= 0 && byId(`row-${now}`);
  if (row) list.setAttribute("aria-activedescendant", row.id);
  else list.removeAttribute("aria-activedescendant");
}

function pill(column, i, letter) {
  const kind = column.kind[i];
  const answer = column.predicted[i];
  const text = answer >= 0 ? nodes[answer].name : answer === UNUSABLE ? "unusable" : "not asked";
  const outcome = KIND_NAMES[kind] ?? "not asked";
  const element = h("span", { class: "pill" }, h("span", { class: "hidden" }, `${letter}, ${outcome}: `), ["✓ ", "≈ ", "~ ", "✗ ", "∅ ", ""][kind] + text);
  if (kind < 5) {
    element.style.background = KIND_COLOURS[kind];
    element.style.color = inkOn(channels(KIND_COLOURS[kind]));
  }
  return element;
}

// Scrolls the list so that the current case is in view.
function reveal() {
  const top = Math.max(0, order.indexOf(current()) * ROW);
  const most = Math.max(0, order.length * ROW - sizes.list);
  let scroll = Math.min(sizes.scroll, most);
  if (top < scroll) scroll = top;
  else if (top + ROW > scroll + sizes.list) scroll = top + ROW - sizes.list;
  if (scroll === sizes.scroll) return;
  sizes.scroll = scroll;
  requestAnimationFrame(() => (byId("list").scrollTop = sizes.scroll));
}

function openCase(i) {
  if (i < 0) return;
  state.case = i;
  reveal();
  drawRows();
  drawCase();
  writeAddress(false);
}

function step(by) {
  const place = order.indexOf(current());
  openCase(order[Math.max(0, Math.min(order.length - 1, place + by))] ?? -1);
}

function listKeys(event) {
  const page = Math.max(1, Math.floor(sizes.list / ROW) - 1);
  const by = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -Infinity, End: Infinity }[event.key];
  if (event.altKey || event.ctrlKey || event.metaKey) return;
  if (event.key === "Enter") {
    event.preventDefault();
    byId("case").querySelector("h3")?.focus();
  } else if (by) {
    event.preventDefault();
    step(by);
  }
}

// ------------------------------------------------------------------------------- one case

let areOthersOpen = false; // the answers of the columns that are neither A nor B

const CITED = 1;
const MISSED = 2;
const DIFFERENT = 4;
const WORD = /[\p{L}\p{N}_]+(?:[.'/-][\p{L}\p{N}_]+)*/gu;
const CLAUSE = /[.;,:()\n]+(?:\s|$)|\s[-–]\s/;
const MOST_COMPARED = 800; // words of a reasoning that are compared with another's
const LONGEST = 4000; // words of a reasoning that are looked for in the note, and characters of a phrase

// What the reasoning takes from the note word for word: findings of a rationale in the course's form, whole clauses of two
// words and more, and runs of three words and more.
function citedPhrases(think, note) {
  const noteWords = Array.from(note.toLowerCase().matchAll(WORD), (match) => match[0]);
  const places = new Map();
  noteWords.forEach((word, place) => {
    const known = places.get(word);
    if (!known) places.set(word, [place]);
    else if (known.length < 200) known.push(place);
  });
  const quoted = /Findings: ([^]*?)\.(?:\s|$)/.exec(think)?.[1].split("; ") ?? [];
  const findings = quoted.filter((quote) => quote && quote !== "nothing specific");
  const phrases = new Set();
  let left = LONGEST;
  for (const clause of [...findings, ...think.split(CLAUSE)]) {
    const own = Array.from((clause ?? "").toLowerCase().matchAll(WORD), (match) => match[0]).slice(0, left);
    left -= own.length;
    const least = findings.includes(clause) ? 1 : 2;
    for (let start = 0; start < own.length; ) {
      let run = 0;
      for (const place of places.get(own[start]) ?? []) {
        let length = 1;
        while (length < 60 && start + length < own.length && own[start + length] === noteWords[place + length]) length++;
        run = Math.max(run, length);
      }
      if (run > 2 || (run >= least && run === own.length)) phrases.add(own.slice(start, start + run).join(" "));
      start += Math.max(1, run);
    }
  }
  return [...phrases].sort((x, y) => y.length - x.length);
}

// Sets a bit for each character of a phrase in the text, whatever its case and white space; returns whether it occurs.
function markPhrases(marks, text, phrases, bit) {
  return phrases.filter((phrase) => {
    const parts = phrase.split(/[^\p{L}\p{N}_]+/u).filter(Boolean);
    if (!parts.length || phrase.length > LONGEST) return false; // no pattern of that size is compiled
    const pattern = new RegExp(`(?<![\\p{L}\\p{N}_])${parts.join("[^\\p{L}\\p{N}_]+")}(?![\\p{L}\\p{N}_])`, "giu");
    let occurs = false;
    for (const match of text.matchAll(pattern)) {
      const [from, to] = [match.index, match.index + match[0].length];
      if (bit === MISSED && marks.slice(from, to).some((mark) => mark & CITED)) continue;
      for (let at = from; at < to; at++) marks[at] |= bit;
      occurs = true;
    }
    return occurs;
  });
}

// The characters of `text` whose words are not in the longest common sequence of words with `other`.
function markDifferences(marks, text, other) {
  const tokens = (source) => Array.from(source.matchAll(/\S+/g)).slice(0, MOST_COMPARED);
  const [x, y] = [tokens(text), tokens(other)];
  const table = Array.from({ length: x.length + 1 }, () => new Uint16Array(y.length + 1));
  for (let i = x.length - 1; i >= 0; i--) {
    for (let j = y.length - 1; j >= 0; j--) {
      table[i][j] = x[i][0] === y[j][0] ? table[i + 1][j + 1] + 1 : Math.max(table[i + 1][j], table[i][j + 1]);
    }
  }
  for (let i = 0, j = 0; i < x.length; ) {
    if (j < y.length && x[i][0] === y[j][0]) (i++, j++);
    else if (j < y.length && table[i][j + 1] >= table[i + 1][j]) j++;
    else marks.fill(DIFFERENT, x[i].index, x[i].index + x[i++][0].length);
  }
}

function pieces(text, marks) {
  const result = [];
  for (let from = 0; from < text.length; ) {
    let to = from + 1;
    while (to < text.length && marks[to] === marks[from]) to++;
    let piece = text.slice(from, to);
    if (marks[from] & DIFFERENT) piece = h("span", { class: "different" }, piece);
    if (marks[from] & CITED) piece = h("mark", {}, piece);
    else if (marks[from] & MISSED) piece = h("ins", {}, piece);
    result.push(piece);
    from = to;
  }
  return result;
}

function drawCase() {
  const box = byId("case");
  const i = current();
  if (i < 0) return redraw(box, h("p", { class: "hint" }, "No case passes all filters. Take one away above."));
  const { note, missed, answers } = texts(i);
  const answerOf = (column) => answers[columns.indexOf(column)];
  const own = kept.get(ids[i]) ?? { mark: false, comment: "" };
  const place = order.indexOf(i);
  const focusColumn = shown();
  const marks = new Uint8Array(note.length);
  markPhrases(marks, note, citedPhrases(answerOf(focusColumn)?.[0] ?? "", note), CITED);
  const left = answerOf(focusColumn)?.[0] ? markPhrases(marks, note, missed, MISSED) : [];
  const both = isOne() ? [A()] : [A(), B()];
  const others = columns.filter((column) => !both.includes(column) && column.asked[i]);

  redraw(
    box,
    h(
      "div",
      { class: "case-head" },
      h("h3", { tabindex: "-1" }, `Admission ${ids[i]}`, h("span", { class: "hint" }, ` ${place + 1} of ${grouped(order.length)}`)),
      h("span", { class: "buttons" },
        h("button", { type: "button", data: { key: "previous" }, "aria-disabled": String(place === 0), onclick: () => step(-1) }, "‹ Previous"),
        h("button", { type: "button", data: { key: "next" }, "aria-disabled": String(place === order.length - 1), onclick: () => step(1) }, "Next ›"),
        h("button", { type: "button", data: { key: "mark" }, "aria-pressed": String(own.mark), onclick: toggleMark }, own.mark ? "★ Marked" : "☆ Mark"),
      ),
    ),
    h("div", { class: "truth-path" }, h("h4", {}, "Truth"), path(gold[i], i), h("p", { class: "hint" }, facts(i))),
    h("h4", {}, "Admission note"),
    answerOf(focusColumn)?.[0] && h("p", { class: "hint legend" },
      h("mark", {}, `cited by ${focusColumn.label}`), " in its reasoning, word for word",
      left.length > 0 && [" · ", h("ins", {}, "mattered, not cited"), ` speaks for the true code: ${left.join("; ")}`]),
    h("div", { class: "note", tabindex: "0", role: "region", "aria-label": "Admission note" }, pieces(note, marks)),
    h("div", { class: "answers" }, both.map((column, k) => card(column, i, note, answerOf(column), isOne() ? null : answerOf(both[1 - k]), "AB"[k]))),
    others.length > 0 && h("details", { class: "others", open: areOthersOpen, ontoggle: (event) => (areOthersOpen = event.target.open) }, h("summary", {}, plural(others.length, "other column")), others.map((column) => brief(column, i, answerOf(column)))),
    h("label", { class: "comment" }, "My comment", h("textarea", { id: "comment", rows: 2, data: { key: "comment" }, oninput: (event) => comment(i, event.target.value) }, own.comment)),
  );
}

function facts(i) {
  const parts = [`${plural(trained[i], "training case")} of this code`, plural(words[i], "word")];
  if (sure) parts.unshift(`the ideal reader gives its best code ${percent(sure[i])}`);
  return parts.join(" · ");
}

function card(column, i, note, answer, other, letter) {
  const think = answer?.[0] ?? "";
  const marks = new Uint8Array(think.length);
  if (other?.[0]) markDifferences(marks, think, other[0]);
  markPhrases(marks, think, citedPhrases(think, note), CITED);
  const rewards = Object.entries(column.rewards).filter(([, values]) => !Number.isNaN(values[i]));
  return h(
    "section",
    { class: "card", style: { borderTopColor: column.colour }, "aria-label": `${letter}: ${column.label}` },
    h("h4", {}, `${letter} ${column.label} `, pill(column, i, letter)),
    !answer && h("p", { class: "hint" }, "This model was not asked."),
    answer && [
      h("h5", {}, "Reasoning", other?.[0] && think ? h("span", { class: "hint" }, " ", h("span", { class: "different" }, "underlined"), ": differs from the other") : null),
      h("div", { class: "think", tabindex: "0", role: "region", "aria-label": `Reasoning of ${column.label}` }, think ? pieces(think, marks) : h("span", { class: "hint" }, "none")),
      answer[1] && h("p", { class: "problem" }, `Form: ${answer[1]}.`),
      answer[2] && h("details", {}, h("summary", {}, "The whole completion"), h("div", { class: "think", tabindex: "0", role: "region", "aria-label": `Completion of ${column.label}` }, answer[2])),
      h("h5", {}, "Answer", column.distance[i] !== null && h("span", { class: "hint" }, column.distance[i] ? ` ${plural(column.distance[i], "edge")} of the tree from the truth` : " the truth")),
      column.predicted[i] >= 0 ? path(column.predicted[i], i) : h("p", {}, "✗ no usable answer"),
      h("h5", {}, "Rewards"),
      rewards.length
        ? h("dl", { class: "rewards" }, rewards.map(([name, values]) => h("div", {}, h("dt", {}, name), h("dd", {}, decimal(values[i], true)))))
        : h("p", { class: "hint" }, "no text to reward"),
    ],
  );
}

// Chapter, block, category and code of an answer, each with whether it is that of the truth.
function path(leaf, i) {
  const steps = LEVELS.map((_, depth) => up[depth][leaf]);
  return h(
    "ol",
    { class: "path" },
    steps.map((node, depth) => {
      if (depth === 3 && nodes[node].key === nodes[steps[2]].key) return null; // a category that is a code itself
      const right = node === up[depth][gold[i]];
      const { name, title } = nodes[node];
      return h("li", { class: right ? "right" : "wrong" }, h("span", { class: "tick", role: "img", "aria-label": right ? "right" : "wrong" }, right ? "✓" : "✗"), ` ${depth ? h("b", {}, name).textContent : ""} ${depth ? (title ?? (depth === 3 ? "(not in this ICD-10-CM)" : "")) : `${name}: ${title}`}`);
    }),
  );
}

function brief(column, i, answer) {
  const leaf = column.predicted[i];
  return h("div", { class: "brief" }, dot(column), h("b", {}, column.label), " ", pill(column, i, ""), ` ${leaf >= 0 ? (nodes[leaf].title ?? "") : ""}`, answer && whole(answer) ? h("div", { class: "think", tabindex: "0", role: "region", "aria-label": `Reasoning of ${column.label}` }, whole(answer)) : null);
}

function toggleMark() {
  const i = current();
  if (i < 0) return;
  keep(ids[i], { mark: !kept.get(ids[i])?.mark });
  afterKeeping();
  drawCase();
}

function comment(i, text) {
  keep(ids[i], { comment: text });
  afterKeeping();
}

function afterKeeping() {
  const values = [...kept.values()];
  const lost = isStored ? "" : "; this browser keeps nothing: save them as CSV";
  byId("kept").textContent = values.length ? `${values.filter((own) => own.mark).length} marked, ${values.filter((own) => own.comment).length} commented${lost}` : "";
  drawFacets();
  drawRows();
}

function saveMarks() {
  const file = new Blob(["\ufeff", marksAsCsv()], { type: "text/csv" });
  const secret = document.querySelector(".credentialed") ? "-credentialed" : "";
  const link = h("a", { href: URL.createObjectURL(file), download: `error-atlas-${atlas.run}${secret}.csv` });
  document.body.append(link);
  link.click();
  link.remove();
  URL.revokeObjectURL(link.href);
}
