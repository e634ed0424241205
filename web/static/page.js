// The page: rows for the elements of the tree, the details of one, and dialogs for actions.
// Rows are made once and changed in place, so that a thousand of them cost little.

import { bytes, rate, duration, plural } from "./format.js";
import { actionsOf, mergeActionsOf, heatMap } from "./actions.js";

const $ = (id) => document.getElementById(id);
const elements = new Map(); // name -> element
const rows = new Map(); // name -> its row
let order = [], server = "", selected = "", fileSystems = [];

function make(tag, attributes = {}, ...children) {
  const e = document.createElement(tag);
  for (const [k, v] of Object.entries(attributes)) k in e ? e[k] = v : e.setAttribute(k, v);
  e.append(...children);
  return e;
}

function set(node, text) { if (node.textContent !== text) node.textContent = text; }

function stateOf(e) {
  if (e.state === "invalid") return ["invalid", "bad"];
  if (e.failed) return ["failed", "bad"];
  if (e.full) return ["full", "bad"];
  if (e.state === "overflow") return ["overflow", "bad"];
  if (e.merge && e.merge.state === "running") return ["merging", "warn"];
  if (e.merge && e.merge.state === "paused") return ["merge paused", "warn"];
  if (e.merge && e.merge.state === "failed") return ["merge failed", "bad"];
  return ["", ""];
}

// Rows.

function depthOf(e) {
  let n = 1;
  for (let p = elements.get(e.parent); p; p = elements.get(p.parent)) n++;
  return n;
}

function makeRow(name) {
  const r = make("tr", { role: "row", tabIndex: -1 });
  r.dataset.name = name;
  r.cells_ = {
    name: make("span"), kind: make("span", { className: "kind" }), state: make("span"),
    size: make("td", { className: "wide" }), meter: make("meter", { min: 0, max: 100, low: 80, high: 95, optimum: 0 }), percent: make("span"),
    reads: make("td", { className: "number wide" }), writes: make("td", { className: "number wide" }), full: make("td", { className: "number" }),
  };
  const c = r.cells_;
  r.append(make("td", {}, c.name, " ", c.state, c.kind), /* what matters most is cut off last */ c.size, make("td", {}, make("div", { className: "fill" }, c.meter, c.percent)), c.reads, c.writes, c.full);
  for (const d of r.children) d.setAttribute("role", "gridcell");
  rows.set(name, r);
  return r;
}

function updateRow(e) {
  const r = rows.get(e.name), c = r.cells_;
  const depth = depthOf(e);
  r.setAttribute("aria-level", depth);
  r.firstChild.style.paddingLeft = `${.4 + (depth - 1) * 1.1}rem`;
  set(c.name, e.name);
  set(c.kind, e.unnamed ? "unnamed checkpoint" : e.kind);
  const [word, how] = stateOf(e);
  set(c.state, word);
  c.state.className = how;
  set(c.size, bytes(e.size_bytes));
  c.meter.hidden = !e.has_store;
  c.meter.value = e.percent;
  c.meter.setAttribute("aria-label", `${e.name}: fill`);
  set(c.percent, e.has_store ? `${e.percent.toFixed(1)} %` : "");
  set(c.reads, rate(e.rates.read_bytes));
  set(c.writes, rate(e.rates.written_bytes));
  set(c.full, duration(e.rates.seconds_to_full));
  // Rows out of sight are not laid out, and would have no name for screen readers.
  const label = [e.name, c.kind.textContent, word, c.percent.textContent, c.full.textContent && `full in ${c.full.textContent}`].filter(Boolean).join(", ");
  if (r.ariaLabel !== label) r.ariaLabel = label;
  c.full.className = "number" + (e.rates.seconds_to_full < 3600 ? " warn" : "");
}

// Rows whose elements have changed are brought up to date a few at a time: the page answers in between.
const stale = new Set();
let refreshing = 0;
function refresh(name) {
  stale.add(name);
  if (!refreshing) refreshing = setTimeout(refreshSome);
}

function refreshSome() {
  const until = performance.now() + 6;
  for (const name of stale) {
    stale.delete(name);
    if (rows.has(name) && elements.has(name)) updateRow(elements.get(name));
    if (performance.now() > until) break;
  }
  refreshing = stale.size ? setTimeout(refreshSome, 16) : 0;
}

// Parents come before their children; children of one parent stay together.
function treeOrder() {
  const children = new Map();
  for (const name of order) {
    const parent = elements.get(name)?.parent || "";
    children.has(parent) ? children.get(parent).push(name) : children.set(parent, [name]);
  }
  const list = [], seen = new Set();
  const stack = [...(children.get("") || [])].reverse();
  while (stack.length) {
    const name = stack.pop();
    if (seen.has(name)) continue;
    seen.add(name);
    list.push(name);
    stack.push(...[...(children.get(name) || [])].reverse());
  }
  for (const name of order) if (!seen.has(name)) list.push(name);
  return list;
}

function arrange() {
  const body = $("rows"), list = treeOrder();
  for (const [name, r] of rows) if (!elements.has(name)) { r.remove(); rows.delete(name); }
  let at = body.firstElementChild;
  for (const name of list) {
    const r = rows.get(name) || makeRow(name);
    if (!r.ariaLevel) updateRow(elements.get(name)); else refresh(name);
    if (r === at) at = at.nextElementSibling; else body.insertBefore(r, at);
  }
  $("empty").hidden = list.length > 0;
  if (selected && !elements.has(selected)) select("");
  if (!body.querySelector('tr[tabindex="0"]') && body.firstElementChild) body.firstElementChild.tabIndex = 0;
  filter();
}

function filter() {
  const text = $("find").value.trim().toLowerCase();
  for (const [name, r] of rows) r.hidden = text !== "" && !name.toLowerCase().includes(text);
}

function focusRow(r) {
  if (!r) return;
  for (const o of $("rows").querySelectorAll('tr[tabindex="0"]')) o.tabIndex = -1;
  r.tabIndex = 0;
  r.focus();
}

function sibling(r, step) {
  do r = r?.[step]; while (r && r.hidden);
  return r;
}

$("rows").addEventListener("keydown", (ev) => {
  const r = ev.target.closest("tr");
  if (!r) return;
  const body = $("rows");
  const e = elements.get(r.dataset.name);
  switch (ev.key) {
    case "ArrowDown": focusRow(sibling(r, "nextElementSibling")); break;
    case "ArrowUp": focusRow(sibling(r, "previousElementSibling")); break;
    case "ArrowLeft": focusRow(rows.get(e.parent)); break;
    case "ArrowRight": { const n = sibling(r, "nextElementSibling"); if (n && elements.get(n.dataset.name).parent === e.name) focusRow(n); break; }
    case "Home": focusRow(body.firstElementChild); break;
    case "End": focusRow(body.lastElementChild); break;
    case "Enter": case " ": select(r.dataset.name); $("details").focus({ preventScroll: innerWidth > 960 }); break;
    default: return;
  }
  ev.preventDefault();
});
$("rows").addEventListener("click", (ev) => {
  const r = ev.target.closest("tr");
  if (!r) return;
  focusRow(r);
  select(r.dataset.name);
  if (innerWidth <= 960) $("details").scrollIntoView(); // it is below the tree
});
$("find").addEventListener("input", filter);

// Details.

function select(name) {
  rows.get(selected)?.setAttribute("aria-selected", "false");
  selected = name;
  lastHeat = null;
  rows.get(name)?.setAttribute("aria-selected", "true");
  $("details-none").hidden = !!name;
  $("details-body").hidden = !name;
  $("actions").dataset.key = "";
  if (!name) { set($("details-title"), "Select an element"); return; }
  showDetails();
  drawHeat();
}

function showDetails() {
  const e = elements.get(selected);
  if (!e) return;
  set($("details-title"), `${e.name} · ${e.unnamed ? "unnamed checkpoint" : e.kind}`);
  const [word, how] = stateOf(e);
  set($("state"), word ? (e.error ? `${word}: ${e.error}` : word) : "ok");
  $("state").className = how || "good";
  showActions(e);
  const m = e.merge;
  $("merge").hidden = !m;
  if (m) {
    const percent = m.total_bytes > 0 ? 100 * m.copied_bytes / m.total_bytes : (m.state === "done" ? 100 : 0);
    set($("merge-text"), `Merge into ${m.disk}: ${m.state}, ${bytes(m.copied_bytes)} of ${bytes(m.total_bytes)}${m.error ? ": " + m.error : ""}`);
    $("merge-bar").value = percent;
  }
  const figures = [["Disk", e.disk]];
  if (e.parent) figures.push(["On", e.parent]);
  figures.push(["Size", bytes(e.size_bytes)]);
  if (e.uri) figures.push(["URI", e.uri]);
  if (e.file) figures.push(["File", e.file]);
  if (e.connections) figures.push(["Clients", String(e.connections)]);
  if (e.has_store) {
    figures.push(["COW device", `${bytes(e.allocated_bytes)} of ${bytes(e.total_bytes)}, ${e.percent.toFixed(1)} %, ${plural(e.exceptions, "exception")}`]);
    if (e.kind !== "checkpoint") {
      figures.push(["Fills", e.rates.fill_bytes > 0 ? `${rate(e.rates.fill_bytes) || "less than 1 B/s"}, over ${duration(e.rates.window_seconds)}` : "not now"]);
      if (e.rates.seconds_to_full != null) figures.push(["Full in", `${duration(e.rates.seconds_to_full)} at that rate`]);
    }
  }
  if (e.kind !== "checkpoint") {
    figures.push(["Reads", `${rate(e.rates.read_bytes) || "none"}, ${e.rates.reads.toFixed(0)} a second`]);
    figures.push(["Writes", `${rate(e.rates.written_bytes) || "none"}, ${e.rates.writes.toFixed(0)} a second`]);
  }
  const dl = $("figures");
  if (dl.children.length !== figures.length * 2) dl.replaceChildren(...figures.flatMap(() => [make("dt"), make("dd")]));
  figures.forEach(([k, v], i) => { set(dl.children[2 * i], k); set(dl.children[2 * i + 1], v); });
}

function showActions(e) {
  const actions = actionsOf(e, server, elements), more = mergeActionsOf(e, server);
  const key = [e.name, ...actions.map((a) => a.id), ...more.map((a) => a.id)].join(" ");
  if ($("actions").dataset.key === key) return; // buttons keep the focus
  $("actions").dataset.key = key;
  $("actions").replaceChildren(...actions.map((a) => make("button", { type: "button", id: `action-${a.id}`, className: a.danger ? "danger" : "", onclick: () => ask(a, selected) }, a.label)));
  $("merge-actions").replaceChildren(...more.map((a) => make("button", { type: "button", id: `action-${a.id}`, onclick: () => run(a.do(), `${a.label}: done`) }, a.label)));
}

async function run(promise, text) {
  try { await promise; toast(text); } catch (err) { toast(err.message); }
}

let toastTimer;
function toast(text) {
  set($("toast"), text);
  clearTimeout(toastTimer);
  toastTimer = setTimeout(() => set($("toast"), ""), 6000);
}

// Dialogs.

let asking = null;
function ask(action, name) {
  const e = elements.get(name);
  if (!e) return;
  asking = { action, name };
  set($("dialog-title"), action.title(e));
  set($("dialog-text"), action.text(e));
  set($("dialog-error"), "");
  const ok = $("dialog-ok");
  set(ok, action.ok);
  ok.className = action.danger ? "danger" : "primary";
  ok.disabled = false;
  $("dialog-fields").replaceChildren(...(action.fields ? action.fields(e, elements) : []).map((f) => {
    let input;
    if (f.options) {
      input = make("select", { name: f.name }, ...f.options.map((o) => make("option", { value: o }, o)));
    } else {
      input = make("input", { name: f.name, required: true, autocomplete: "off", spellcheck: false });
      if (f.pattern) { input.pattern = f.pattern; input.title = f.hint; }
    }
    return make("label", {}, f.label, " ", input);
  }));
  $("dialog").showModal();
  ($("dialog-fields").querySelector("input, select") || $("dialog-cancel")).focus();
}

$("dialog-cancel").addEventListener("click", () => $("dialog").close());
$("dialog-form").addEventListener("submit", async (ev) => {
  ev.preventDefault();
  const { action, name } = asking, e = elements.get(name);
  if (!e) { $("dialog").close(); toast(`${name} is gone`); return; }
  $("dialog-ok").disabled = true;
  try {
    await action.do(e, Object.fromEntries(new FormData($("dialog-form"))));
    $("dialog").close();
    toast(`${action.title(e)}: done`);
    rows.get(name)?.focus();
  } catch (err) {
    set($("dialog-error"), err.message);
    $("dialog-ok").disabled = false;
  }
});

// The map: parts of the disk from left to right and from top to bottom.

const columns = 64, lines = 8;
let lastHeat = null, heatTimer;

function colour(name) { return getComputedStyle(document.documentElement).getPropertyValue(name).trim(); }

async function drawHeat() {
  clearTimeout(heatTimer);
  const name = selected;
  if (!name || !elements.has(name)) return;
  let h;
  try { h = await heatMap(name, columns * lines); } catch (err) { set($("map-text"), err.message); h = null; }
  if (name !== selected) return;
  if (h) paint(h);
  heatTimer = setTimeout(drawHeat, document.hidden ? 10000 : 1000);
}

function paint(h) {
  const canvas = $("map"), g = canvas.getContext("2d");
  const w = canvas.width / columns, high = canvas.height / lines;
  g.fillStyle = colour("--map");
  g.fillRect(0, 0, canvas.width, canvas.height);
  const stored = colour("--stored"), written = colour("--written");
  let full = 0, active = 0;
  h.stored.forEach((part, i) => {
    const x = (i % columns) * w, y = Math.floor(i / columns) * high;
    full += part;
    if (part > 0) {
      g.globalAlpha = .25 + .75 * part;
      g.fillStyle = stored;
      g.fillRect(x, y, w - 1, high - 1);
    }
    if (lastHeat?.writes && h.writes && lastHeat.name === h.name && h.writes[i] !== lastHeat.writes[i]) {
      active++;
      g.globalAlpha = 1;
      g.fillStyle = written;
      g.fillRect(x + w / 4, y + high / 4, w / 2, high / 2);
    }
  });
  g.globalAlpha = 1;
  const n = h.stored.length;
  const text = `${(100 * full / n).toFixed(1)} % of the disk is in its own layer; ` +
    (h.writes ? (active ? `${plural(active, "part")} of ${n} written in the last second` : "nothing is being written") : "writes are not observed");
  set($("map-text"), text);
  lastHeat = h;
}

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { if (lastHeat) paint(lastHeat); });

// Reports.

function summary() {
  let nodes = 0, checkpoints = 0, disks = 0, reads = 0, writes = 0;
  for (const e of elements.values()) {
    if (e.kind === "node") nodes++; else if (e.kind === "disk") disks++; else checkpoints++;
    reads += e.rates.read_bytes;
    writes += e.rates.written_bytes;
  }
  let text = `${plural(disks, "disk")}, ${checkpoints ? plural(checkpoints, "checkpoint") + ", " : ""}${plural(nodes, server === "fleet" ? "node" : "snapshot")}`;
  text += ` · reads ${rate(reads) || "none"} · writes ${rate(writes) || "none"}`;
  for (const f of fileSystems) text += ` · ${bytes(f.free_bytes)} free on ${f.path}${f.seconds_to_full != null ? ", full in " + duration(f.seconds_to_full) : ""}`;
  set($("summary"), text);
}

function alarm(text) { $("alarm").hidden = !text; set($("alarm"), text); }

function receive(u) {
  if (u.server) server = u.server;
  alarm(u.error ? `Changes are refused: ${u.error}` : "");
  for (const e of u.elements || []) elements.set(e.name, e);
  if (u.file_systems) fileSystems = u.file_systems;
  if (u.order) {
    order = u.order;
    const present = new Set(order);
    for (const name of [...elements.keys()]) if (!present.has(name)) elements.delete(name);
    arrange();
  } else {
    for (const e of u.elements || []) refresh(e.name);
  }
  summary();
  showDetails();
}

function connect() {
  const source = new EventSource("/live");
  source.onopen = () => { elements.clear(); order = []; };
  source.onmessage = (ev) => receive(JSON.parse(ev.data));
  source.onerror = () => {
    alarm("The server does not answer; trying again …");
    if (source.readyState === EventSource.CLOSED) setTimeout(connect, 3000);
  };
}
connect();
