// What failed and why: scores by source and code, batches and groups given up, faults of parts.

import { get } from "./api.js";
import { atMost, fill, h, table } from "./dom.js";
import { clock, number, sourceName } from "./format.js";
import { said } from "./view-overview.js";

export async function show(place, run) {
  const { name, link } = run;
  const body = h("div", { class: "stack" });
  const draw = async () => {
    const [{ failures }, { events, counts }, { batches }] = await Promise.all([get("failures", { run: name }), get("events", { run: name, level: "fault", most: 200 }), get("bad_batches", { run: name })]);
    const faults = counts.filter(({ level }) => level === "fault");
    fill(body,
      h("section", { class: "card" }, h("h2", {}, "Scores that failed"), failures.length ? table("Failed scores by source and code", ["source", "code", "kind", "samples", "steps", "one of them said", "sample"], failures.map((one) => [
        sourceName(one.source), h("strong", {}, one.code), one.kind ?? "–", h("a", { href: link("samples", { failed: one.source || "*", code: one.code }) }, number(one.count)), one.first === one.last ? number(one.first) : `${number(one.first)} to ${number(one.last)}`, one.message ?? "–",
        h("a", { href: link("sample", { sample: one.sample_id, step: one.step }) }, "example"),
      ]), { numeric: [3] }) : h("p", { class: "quiet" }, "Every score that was asked for is there.")),
      batches.length ? h("section", { class: "card" }, h("h2", {}, "Batches that were not trained on"), table("Batches that were not trained on, newest first", ["step", "why", "samples"], batches.map(({ step, why }) => [number(step), why ?? "–", h("a", { href: link("bad", { step }) }, "look at them")]), { numeric: [0] })) : null,
      h("section", { class: "card" }, h("h2", {}, "Faults of the run"), faults.length ? [
        table("Faults by kind", ["what", "times", "last"], faults.map(({ kind, count, last }) => [kind.replaceAll("_", " "), number(count), clock(last)]), { numeric: [1] }),
        h("h3", {}, "Newest first"),
        table("Faults, newest first", ["time", "step", "what", "said"], [...events].reverse().map((event) => [clock(event.time), number(event.step), h("span", { class: "fault" }, event.kind.replaceAll("_", " ")), said(event.data)]), { numeric: [1] }),
      ] : h("p", { class: "quiet" }, "None.")));
  };
  const again = atMost(2000, () => { if (!document.hidden) draw().catch(() => {}); });
  fill(place, h("h1", {}, "Failures"), body);
  await draw();
  return { told(kind) { if (["samples", "events", "cut", "reset"].includes(kind)) again(); }, close() { again.cancel(); } };
}
