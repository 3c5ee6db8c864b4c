// What judges said: how often the response was better, whether both orders agree, and by which principles.

import { get } from "./api.js";
import { bars, barsIn } from "./charts.js";
import { atMost, fill, h, table } from "./dom.js";
import { number, percent } from "./format.js";
import { detail } from "./view-sample.js";

export async function show(place, run, query) {
  const { name, summary, link } = run;
  const judges = summary.sources.filter(({ kind }) => kind === "judge" || kind === "principle");
  if (!judges.length) { fill(place, h("h1", {}, "Verdicts"), h("p", { class: "quiet" }, "The recipe has no judge and no principle-following model among its sources.")); return {}; }
  const source = judges.find((judge) => judge.name === query.source) ?? judges[0];
  const recipe = summary.recipe?.reward?.sources?.[source.name] ?? {};
  const body = h("div", { class: "stack" });
  const draw = async () => {
    const [found, histogram] = await Promise.all([get("verdicts", { run: name, source: source.name, only: query.only }), get("histogram", { run: name, source: source.name, bins: barsIn(body) - 2 })]);
    const compares = recipe.mode !== "rate" && source.kind === "judge";
    fill(body,
      h("dl", { class: "tiles" }, tile("verdicts", number(found.count)), tile("failed", number(histogram.failed)),
        compares ? tile("response better than reference", percent(found.better)) : null,
        found.consistent === null ? null : tile("same in both orders", percent(found.consistent)),
        found.mass === null ? null : tile("probability on allowed answers", number(found.mass)),
        found.spread === null ? null : tile("spread of a rating", number(found.spread)),
        found.principles === null ? null : tile("principles a verdict", number(found.principles))),
      h("section", { class: "card" }, h("h2", {}, "Values"), bars(histogram, source.name, (low, high) => link("samples", { source: source.name, low, high }))),
      asked(recipe),
      found.consistent === null ? null : h("p", { class: "filters" }, ["", "consistent", "inconsistent"].map((only) => h("a", { class: "button small", href: link("verdicts", { source: source.name, only }), "aria-current": (query.only ?? "") === only ? "true" : null }, only || "all verdicts"))),
      table("Verdicts, newest first", ["step", "prompt and response", "value", "detail"], found.rows.map((row) => [
        number(row.step), h("a", { class: "row-link", href: link("sample", { sample: row.sample_id, step: row.step }) }, h("span", { class: "prompt" }, row.prompt || "(empty prompt)"), h("span", { class: "response" }, row.response || "(empty response)")),
        number(row.value), h("span", {}, row.detail.consistent === undefined ? null : h("span", { class: row.detail.consistent ? "tag good" : "tag bad" }, row.detail.consistent ? "both orders agree" : "orders disagree"), " ", detail(row.detail)),
      ]), { numeric: [0, 2] }));
  };
  const again = atMost(3000, () => { if (!document.hidden) draw().catch(() => {}); });
  fill(place, h("div", { class: "headed" }, h("h1", {}, "Verdicts"), judges.length > 1 ? h("nav", { class: "filters", "aria-label": "Judges" }, judges.map((judge) => h("a", { class: "button small", href: link("verdicts", { source: judge.name }), "aria-current": judge === source ? "true" : null }, judge.name))) : null), body);
  await draw();
  return { told(kind) { if (["samples", "cut", "reset"].includes(kind)) again(); }, close() { again.cancel(); } };
}

const tile = (title, shown) => h("div", {}, h("dt", {}, title), h("dd", {}, shown));

function asked(recipe) {
  const { principles, rubric, count, negated, model } = recipe;
  return h("section", { class: "card" }, h("h2", {}, "What the judge is asked"), h("dl", { class: "facts" }, tile("model", model ?? "–"), recipe.mode ? tile("mode", recipe.mode) : null),
    Array.isArray(principles) && principles.length ? [h("h3", {}, "Principles"), h("ol", { class: "principles" }, principles.map((principle) => h("li", {}, principle)))] : typeof principles === "string" ? h("p", {}, `${count} principles of the set ${principles}, drawn for each sample`, negated ? `, negated with probability ${negated}` : "", ".") : null,
    rubric ? h("details", {}, h("summary", {}, "Rubric"), h("pre", { tabindex: "0" }, rubric)) : null);
}
