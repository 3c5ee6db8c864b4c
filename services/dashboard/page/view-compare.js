// Two or more runs: the same curves in one plot, what they came to, and where their recipes differ.

import { get } from "./api.js";
import { Board, controls } from "./charts.js";
import { fill, h, table } from "./dom.js";
import { number } from "./format.js";

const FIRST = ["reward/mean", "kl/reference", "length/mean", "policy/entropy_sampled", "reward/coverage", "reward/focus", "reward/repeat", "throughput/tokens_per_s"];
const MOST = 8;

export async function show(place, run, query) {
  const { name, summary, settings, link } = run;
  const { runs } = await get("runs");
  const chosen = [name, ...(query.with ? query.with.split("\n") : [])].filter((one, i, all) => all.indexOf(one) === i && runs.some((known) => known.name === one)).slice(0, MOST);
  const pick = h("fieldset", { class: "pick" }, h("legend", {}, "Runs"), runs.map((known) => h("label", { class: "check" },
    h("input", { type: "checkbox", checked: chosen.includes(known.name), disabled: known.name === name, onchange: (event) => {
      const others = chosen.filter((one) => one !== name && one !== known.name);
      if (event.target.checked) others.push(known.name);
      location.hash = link("compare", { with: others.join("\n") });
    } }), h("span", {}, known.name))));
  const body = h("div", { class: "stack" });
  fill(place, h("h1", {}, "Compare"), pick, body);
  if (chosen.length < 2) { fill(body, h("p", { class: "quiet" }, runs.length < 2 ? "There is one run here; show a directory of runs to compare." : "Choose a second run.")); return {}; }
  const summaries = await Promise.all(chosen.map((one) => (one === name ? summary : get("run", { run: one }))));
  const common = [...new Set(summaries.flatMap(({ metrics }) => metrics))].sort();
  const board = new Board(settings);
  const chart = (metric) => ({ title: metric, unit: "", meaning: null, series: summaries.filter(({ metrics }) => metrics.includes(metric)).map((one) => ({ run: one.name, metric, label: one.name })) });
  const grid = h("div", { class: "grid wide" }, FIRST.filter((metric) => common.includes(metric)).map((metric) => board.add(chart(metric))));
  const more = h("select", { "aria-label": "Add a metric", onchange: (event) => { if (event.target.value) grid.append(board.add(chart(event.target.value))); event.target.value = ""; } }, h("option", { value: "" }, "add a metric …"), common.filter((metric) => !FIRST.includes(metric)).map((metric) => h("option", {}, metric)));
  const keys = differences(summaries.map(({ recipe }) => recipe ?? {}));
  fill(body, h("div", { class: "headed" }, controls(board), more), grid,
    h("section", { class: "card" }, h("h2", {}, "Last values"), table("Last values", ["metric", ...chosen], [["steps", ...summaries.map(({ steps }) => number(steps))], ...common.filter((metric) => FIRST.includes(metric) || metric.startsWith("evaluation")).map((metric) => [metric, ...summaries.map(({ last }) => number(last?.[metric]))])], { numeric: chosen.map((_, i) => i + 1) })),
    h("section", { class: "card" }, h("h2", {}, "Where the recipes differ"), keys.length ? table("Where the recipes differ", ["key", ...chosen], keys) : h("p", { class: "quiet" }, "Nowhere.")));
  return {
    told(kind, data) { if (kind === "steps") board.told(name, data); if (kind === "cut" || kind === "reset") board.reload(); },
    close() { board.close(); },
  };
}

/** Rows [key, value of each run] where they differ; what a run lacks altogether is one row. */
function differences(trees, path = "") {
  const keys = [...new Set(trees.flatMap((tree) => Object.keys(tree)))].sort();
  return keys.flatMap((key) => {
    const values = trees.map((tree) => tree[key]), full = path ? `${path}.${key}` : key;
    if (values.every(isTree)) return differences(values, full);
    const shown = values.map((value) => (value === undefined ? "–" : isTree(value) ? (value.kind ? `kind ${value.kind}` : "set") : JSON.stringify(value)));
    return new Set(shown).size > 1 ? [[full, ...shown]] : [];
  });
}

const isTree = (value) => Boolean(value) && typeof value === "object" && !Array.isArray(value);
