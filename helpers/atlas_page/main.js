// Controls, keys, and the one way in which anything changes.

function update({ filters, ...changes }, isNew = true) {
  Object.assign(state, changes);
  for (const [key, value] of Object.entries(filters ?? {})) {
    if (value === null || value === "" || (Array.isArray(value) && !value.length)) delete state.filters[key];
    else state.filters[key] = value;
  }
  draw();
  writeAddress(isNew);
}

const FIRST = 16; // ms, a frame, that a change may take before the browser shows what is ready

// What a change redraws: first the panels in view while there is time, then, after that frame, the others.
const PANELS = {
  "panel-scores": (cases) => drawScores(cases),
  "panel-flow": () => drawChange(),
  "panel-tree": () => drawTree(),
  "panel-heat": () => drawHeat(),
  pairs: () => drawPairs(),
  "panel-facets": () => drawFacets(),
  cases: (cases) => (drawList(cases), drawCase()),
};
const inView = new Set(Object.keys(PANELS));
const waiting = { timer: 0, panels: [] };

function draw(time = FIRST) {
  applyFilters();
  const cases = selected();
  drawControls();
  drawChips();
  byId("status").textContent = `${plural(cases.length, "case")} selected`;
  byId("tip").hidden = true;
  const order = Object.keys(PANELS).sort((x, y) => inView.has(y) - inView.has(x));
  const until = performance.now() + time;
  while (order.length && inView.has(order[0]) && performance.now() < until) PANELS[order.shift()](cases);
  waiting.panels = [...order, "labels"];
  delete document.body.dataset.settled;
  clearTimeout(waiting.timer);
  requestAnimationFrame(() => (waiting.timer = setTimeout(() => drawWaiting(cases))));
}

function drawWaiting(cases) {
  const panel = waiting.panels.shift();
  if (!panel) return readAhead();
  if (panel === "labels") labelTree();
  else PANELS[panel](cases);
  waiting.timer = setTimeout(() => drawWaiting(cases));
}

// When all is drawn: the notes, some at a time, so that the first search finds them read.
function readAhead() {
  document.body.dataset.settled = "yes";
  if (readOn("note")) waiting.timer = setTimeout(readAhead, 20);
}

function drawControls() {
  const { a, b } = state;
  byId("model-a").value = a;
  byId("model-b").value = b;
  document.querySelector(`#shown [value=${state.shown}]`).checked = true;
  for (const option of byId("measure").options) option.textContent = MEASURES[option.value].label();
  byId("measure").value = state.measure;
  byId("level").value = state.level;
  byId("level").disabled = !MEASURES[state.measure].levelled;
  byId("sort").value = state.sort + (state.down ? "-" : "");
  for (const place of ["note", "think"]) {
    const box = byId(`search-${place}`);
    if (document.activeElement !== box) box.value = state.filters[place] ?? "";
  }
}

function drawChips() {
  const chips = Object.entries(state.filters).map(([key, value]) => {
    const text = FILTERS[key].label(value);
    return h("li", {}, h("button", { type: "button", class: "chip", data: { key }, "aria-label": `Remove filter ${text}`, onclick: () => update({ filters: { [key]: null } }) }, text, h("span", { "aria-hidden": "true" }, " ×")));
  });
  const hadFocus = byId("chips").contains(document.activeElement);
  redraw(byId("chips"), chips.length ? chips : h("li", { class: "hint" }, "No filter: press any mark below"));
  byId("clear").hidden = chips.length < 2;
  const nearest = byId("chips").querySelector("button") ?? byId("cases");
  if (hadFocus && !byId("chips").contains(document.activeElement)) nearest.focus({ preventScroll: true });
}

function clearFilters() {
  const hadFocus = document.activeElement === byId("clear");
  state.filters = {};
  update({});
  if (hadFocus) byId("cases").focus({ preventScroll: true });
}

function wireControls() {
  const options = () => columns.map((column) => h("option", { value: column.key }, column.label));
  byId("model-a").replaceChildren(...options());
  byId("model-b").replaceChildren(...options());
  byId("measure").replaceChildren(...Object.keys(MEASURES).map((key) => h("option", { value: key })));
  byId("level").replaceChildren(...LEVELS.map((level, depth) => h("option", { value: level }, LEVEL_NAMES[depth])));
  const directions = Object.entries(SORTS).flatMap(([key, { label }]) => [h("option", { value: key }, label), h("option", { value: `${key}-` }, `${label}, largest first`)]);
  byId("sort").replaceChildren(...directions);
  byId("model-a").onchange = (event) => update({ a: event.target.value });
  byId("model-b").onchange = (event) => update({ b: event.target.value });
  byId("swap").onclick = () => update({ a: state.b, b: state.a, filters: { change: (state.filters.change ?? []).map((cell) => 5 * kindsOf(cell)[1] + kindsOf(cell)[0]).sort((x, y) => x - y) } });
  byId("shown").onchange = (event) => update({ shown: event.target.value });
  byId("measure").onchange = (event) => update({ measure: event.target.value });
  byId("level").onchange = (event) => update({ level: event.target.value });
  byId("sort").onchange = (event) => update({ sort: event.target.value.replace("-", ""), down: event.target.value.endsWith("-") });
  byId("clear").onclick = clearFilters;
  byId("save").onclick = saveMarks;
  byId("load").onchange = async (event) => {
    const [file] = event.target.files;
    if (!file) return;
    const message = loadMarks(await file.text());
    event.target.value = "";
    draw();
    afterKeeping();
    byId("kept").textContent = `${message} ${byId("kept").textContent}`;
  };
  for (const place of ["note", "think"]) {
    let wait = 0;
    byId(`search-${place}`).oninput = (event) => {
      clearTimeout(wait);
      wait = setTimeout(() => update({ filters: { [place]: event.target.value.trim() || null } }, state.filters[place] === undefined), 120);
    };
  }
  byId("read").onclick = readCase;
  document.querySelector(".skip").onclick = (event) => {
    event.preventDefault(); // the address holds the view
    byId("cases").scrollIntoView();
    byId("cases").focus({ preventScroll: true });
  };
  byId("help-open").onclick = () => byId("help").showModal();
  for (const box of ["transition", "heat", "facets", "pairs"]) roving(byId(box));
  byId("tree").addEventListener("keydown", treeKeys);
  byId("list").addEventListener("keydown", listKeys);
  byId("list").addEventListener("scroll", scrolled, { passive: true });
}

function readCase() {
  byId("case").scrollIntoView();
  byId("case").querySelector("h3")?.focus({ preventScroll: true });
}

function turn(by) {
  step(by);
  const { top, bottom } = byId("case").querySelector("h3")?.getBoundingClientRect() ?? { top: 0, bottom: 0 };
  if (top < 0 || bottom > innerHeight) byId("case").scrollIntoView();
}

const KEYS = {
  n: () => turn(1),
  p: () => turn(-1),
  m: toggleMark,
  c: () => byId("comment")?.focus(),
  "/": () => byId("search-note").focus(),
  u: () => state.filters.node !== undefined && update({ filters: { node: nodes[state.filters.node].parent < 0 ? null : nodes[state.filters.node].parent } }),
  x: clearFilters,
  "?": () => byId("help").showModal(),
};

function shortcut(event) {
  const isText = event.target.closest?.("input:not([type=checkbox], [type=radio], [type=file]), textarea, select, dialog");
  if (event.key === "Escape" && !byId("tip").hidden) byId("tip").hidden = true;
  if (event.key === "Escape" && isText && !isText.matches("dialog")) event.target.id === "comment" ? byId("list").focus() : event.target.blur();
  if (isText || event.altKey || event.ctrlKey || event.metaKey || !byId("keys").checked) return;
  const action = KEYS[event.key];
  if (!action) return;
  event.preventDefault();
  action();
}

function scrolled() {
  sizes.scroll = byId("list").scrollTop;
  drawRows();
}

function measureBoxes() {
  const before = [sizes.tree, sizes.list];
  sizes.tree = byId("tree").clientHeight;
  sizes.list = byId("list").clientHeight;
  return before[0] !== sizes.tree || before[1] !== sizes.list;
}

function resized() {
  if (!measureBoxes()) return;
  drawTree();
  labelTree();
  drawRows();
}

function start() {
  recall();
  readAddress();
  wireControls();
  measureBoxes();
  drawMacro();
  draw(Infinity); // whole before it is seen: nothing shifts
  afterKeeping();
  addEventListener("keydown", shortcut);
  addEventListener("popstate", () => {
    document.activeElement?.blur(); // a box of the search shows what the address says
    readAddress();
    draw();
  });
  addEventListener("storage", ({ key }) => {
    if (key !== STORE) return; // another tab has marked a case
    recall();
    draw();
    afterKeeping();
  });
  for (const type of ["pointerover", "focusin"]) document.addEventListener(type, tipFor);
  document.addEventListener("pointerout", (event) => event.relatedTarget || (byId("tip").hidden = true));
  new ResizeObserver(resized).observe(document.body);
  const watch = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries) inView[isIntersecting ? "add" : "delete"](target.id);
  });
  for (const panel of Object.keys(PANELS)) watch.observe(byId(panel));
  document.body.dataset.ready = "yes";
}

start();
