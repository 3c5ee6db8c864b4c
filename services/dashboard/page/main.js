// The shell: who may come in, which run, which view. A view is `show(place, run, query)` that returns {told, close}.

import { Refused, get, setToken, takeToken } from "./api.js";
import { fill, h } from "./dom.js";
import { ago, number } from "./format.js";
import { learn } from "./names.js";
import { follow } from "./stream.js";

const VIEWS = [ // name, title, key after g
  ["overview", "Overview", "o"], ["rewards", "Rewards", "r"], ["flow", "Queues", "q"], ["samples", "Samples", "s"],
  ["verdicts", "Verdicts", "v"], ["failures", "Failures", "f"], ["compare", "Compare", "c"],
];
const STATES = {
  running: "running", silent: "gives no sign", finished: "finished", stopped: "stopped", failed: "failed", unknown: "state unknown",
};

const bar = document.getElementById("bar"), main = document.getElementById("main");
const settings = { smoothing: 0.6, log: false, ...JSON.parse(localStorage.getItem("attune-settings") ?? "{}") };
settings.keep = () => localStorage.setItem("attune-settings", JSON.stringify(settings));

let runs = [], open = null, view = null, turn = 0;

export function link(run, name, query) {
  const pairs = Object.entries(query ?? {}).filter(([, value]) => value !== null && value !== undefined && value !== "");
  const more = pairs.length ? `?${new URLSearchParams(pairs)}` : "";
  return `#/run/${encodeURIComponent(run)}/${name}${more}`;
}

function place() {
  const [path, query] = location.hash.replace(/^#\/?/, "").split("?");
  const parts = path.split("/");
  const named = parts[0] === "run" && parts[1] ? decodeURIComponent(parts[1]) : null;
  return { run: named, name: parts[2] || "overview", query: Object.fromEntries(new URLSearchParams(query ?? "")) };
}

async function go() {
  const mine = ++turn;
  view?.close?.();
  view = null;
  let { run, name, query } = place();
  try {
    if (!runs.length || !run) runs = (await get("runs")).runs;
    if (mine !== turn) return;
    if (!run && runs.length === 1) { history.replaceState(null, "", link(runs[0].name, "overview")); ({ run, name, query } = place()); }
    const module = import(run ? `./view-${VIEWS.some(([known]) => known === name) || ["sample", "group", "bad"].includes(name) ? name : "overview"}.js` : "./view-runs.js");
    if (run) await enter(run); else leave();
    if (mine !== turn) return;
    head(name);
    const { show } = await module;
    if (mine !== turn) return;
    fill(main);
    const shown = await show(main, run ? { ...open, settings, link: (to, more) => link(run, to, more) } : { runs, link, states: STATES }, query);
    if (mine !== turn) { shown?.close?.(); return; }
    view = shown ?? {};
    document.title = run ? `${run} · ${(VIEWS.find(([known]) => known === name) ?? [0, name])[1]} · Attune` : "Runs · Attune";
  } catch (error) {
    if (mine === turn) trouble(error);
  }
}

async function enter(run) {
  if (open?.name === run) return;
  leave();
  const summary = await get("run", { run });
  learn(summary.vocabulary);
  open = { name: run, summary, leave: null };
  open.leave = follow(run, told);
}

function leave() { open?.leave?.(); open = null; }

async function told(kind, data) {
  if (!open) return;
  const { summary } = open;
  if (kind === "lost") summary.lost = data.message; else if (kind !== "progress") summary.lost = null;
  if (kind === "status") { if (data) summary.status = { ...data, seen: performance.now() }; }
  else if (kind === "steps") {
    summary.steps = data.steps;
    for (const name of Object.keys(data.rows.at(-1)?.[1] ?? {})) if (!summary.metrics.includes(name)) summary.metrics.push(name);
    if (data.rows.length) summary.last = { step: data.rows.at(-1)[0], ...data.rows.at(-1)[1] };
  } else if (kind === "events") {
    for (const { kind: event } of data) {
      if (event === "start") summary.state = "running";
      if (event === "finished" || event === "stopped") summary.state = event;
      if (event === "ended") summary.state = "failed";
    }
  } else if (kind === "progress") summary.progress = data;
  else if (kind === "hello") { summary.problem = data.problem; if (data.steps !== summary.steps) { kind = "reset"; summary.steps = data.steps; } }
  state(); // before anything is asked, which may fail
  if (kind === "reset" || kind === "cut" || (kind === "progress" && data.done && !summary.metrics.length)) {
    const name = open.name;
    const fresh = await get("run", { run: name }).catch(() => null);
    if (!fresh || open?.name !== name) return;
    Object.assign(summary, fresh);
    state();
  }
  view?.told?.(kind, data);
}

// The bar

const dot = h("i", { class: "dot" }), word = h("span", {}), how = h("span", { class: "quiet", id: "how" });

function head(name) {
  const choose = open && runs.length > 1 ? h("select", { "aria-label": "Run", onchange: (event) => { location.hash = link(event.target.value, name); } },
    runs.map((run) => h("option", { value: run.name, selected: run.name === open.name }, run.name))) : null;
  const tab = name === "sample" || name === "group" ? "samples" : name;
  fill(bar,
    h("div", { class: "row" },
      h("a", { class: "brand", href: runs.length > 1 || !open ? "#/" : link(open.name, "overview") }, "Attune"),
      open ? [choose ?? h("strong", { class: "run" }, open.name), h("span", { class: "state" }, dot, word), how] : null,
      h("span", { class: "space" }), theme()),
    open ? h("nav", { "aria-label": "Views" }, VIEWS.map(([known, title]) => h("a", { href: link(open.name, known), "aria-current": known === tab ? "page" : null }, title))) : null);
  state();
}

function state() {
  if (!open) return;
  const { summary } = open;
  const status = summary.status;
  const age = status ? status.age_s + (status.seen ? (performance.now() - status.seen) / 1000 : 0) : null;
  let now = summary.state;
  if (now === "running" && age > 30) now = "silent";
  if (now === "silent" && age < 30) now = "running";
  dot.className = `dot ${now}`;
  word.textContent = STATES[now] ?? now;
  const total = status?.total_steps;
  const parts = [`${number(summary.steps)}${total ? ` of ${number(total)}` : ""} steps`];
  if (now === "silent") parts.push(`no sign for ${ago(age)}`);
  if (summary.progress && !summary.progress.done) parts.push(`indexing ${Math.round(100 * (0.3 * summary.progress.metrics + 0.7 * summary.progress.samples))} %`);
  if (summary.problem) parts.push(summary.problem);
  if (summary.lost) parts.push(`connection lost: ${summary.lost}`);
  how.textContent = parts.join(" · ");
}

setInterval(state, 5000);

function theme() {
  const names = ["auto", "light", "dark"];
  const now = () => localStorage.getItem("attune-theme") ?? "auto";
  const button = h("button", { type: "button", class: "small", onclick: () => {
    localStorage.setItem("attune-theme", names[(names.indexOf(now()) + 1) % 3]);
    dress();
    label();
    dispatchEvent(new Event("themed"));
  } });
  const label = () => { button.textContent = `theme: ${now()}`; };
  label();
  return button;
}

function dress() {
  const chosen = localStorage.getItem("attune-theme") ?? "auto";
  if (chosen === "auto") document.documentElement.removeAttribute("data-theme");
  else document.documentElement.dataset.theme = chosen;
}

// Trouble

function trouble(error) {
  if (error instanceof Refused && error.status === 401) { leave(); door(error.message); return; }
  fill(main, h("div", { class: "card trouble", role: "alert" }, h("h1", {}, "That did not work"), h("p", {}, error.message), h("p", {}, h("button", { type: "button", onclick: go }, "Try again"), " ", h("a", { href: "#/" }, "All runs"))));
  if (!(error instanceof Refused)) console.error(error);
}

function door(message) {
  fill(bar, h("div", { class: "row" }, h("span", { class: "brand" }, "Attune"), h("span", { class: "space" }), theme()));
  const input = h("input", { type: "password", autocomplete: "off", "aria-label": "Token", required: true });
  fill(main, h("form", { class: "card trouble", onsubmit: (event) => { event.preventDefault(); setToken(input.value); go(); } },
    h("h1", {}, "Token needed"), h("p", { role: "alert" }, message), h("p", {}, input, " ", h("button", {}, "Open"))));
  input.focus();
}

// Keys: g and a letter goes to a view, / to the search of samples.
let before = 0;
addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input, select, textarea")) return;
  if (event.key === "/" && open) { event.preventDefault(); location.hash = link(open.name, "samples", { focus: "1" }); }
  else if (event.key === "g") before = performance.now();
  else if (performance.now() - before < 1500 && open) {
    before = 0;
    const found = VIEWS.find(([, , key]) => key === event.key);
    if (found) location.hash = link(open.name, found[0]);
  }
});

addEventListener("hashchange", () => { takeToken(); go(); });
takeToken();
dress();
go();
