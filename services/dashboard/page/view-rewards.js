// What each source says, over the steps and as a histogram whose bars are links to their samples.

import { get } from "./api.js";
import { Board, bars, barsIn, controls } from "./charts.js";
import { atMost, fill, h } from "./dom.js";
import { sourceName } from "./format.js";
import { chartOf, together } from "./names.js";

export async function show(place, run, _query) {
  const { name, summary, settings, link } = run;
  const board = new Board(settings);
  const sources = [{ name: "", kind: "combined" }, ...summary.sources];
  const cards = sources.map((source) => ({ source, drawn: h("div", {}) }));
  const names = summary.metrics;
  fill(place, h("h1", {}, "Rewards by source"), controls(board),
    cards.map(({ source, drawn }) => h("section", { class: "card source", "aria-label": sourceName(source.name) },
      h("h2", {}, sourceName(source.name), h("span", { class: "quiet" }, source.kind && source.kind !== source.name ? ` ${source.kind}` : "")),
      h("div", { class: "halves" }, board.add(chartOf(name, source.name ? `reward/${source.name}/mean` : "reward/mean", names)), drawn))),
    h("h2", {}, "Spread, parts and failures"),
    h("div", { class: "grid" }, [
      together(name, "spread within prompts", [["reward/within_prompt_std", "std"]], names),
      together(name, "groups without variance, share", [["reward/flat_share", "share"]], names),
      together(name, "attention reward, its parts", [["reward/coverage", "coverage"], ["reward/focus", "focus"], ["reward/repeat", "repeat"]], names),
      together(name, "failed scores a step", [["reward/failed", "reward"], ...summary.sources.map((source) => [`reward/${source.name}/failed`, source.name])], names),
    ].filter(({ series }) => series.length).map((chart) => board.add(chart))));

  const count = async () => {
    const [low, high] = board.range ?? [null, null];
    await Promise.all(cards.map(async ({ source, drawn }) => {
      const found = await get("histogram", { run: name, source: source.name, low, high, bins: barsIn(drawn) });
      fill(drawn, bars(found, sourceName(source.name), (from, to) => link("samples", { source: source.name || "*", low: from, high: to, step_from: low, step_to: high })));
    }));
  };
  const again = atMost(2000, () => { if (!document.hidden) count().catch(() => {}); });
  const before = board.zoomed;
  board.zoomed = (range) => { before?.(range); count().catch(() => {}); };
  await count();
  return {
    told(kind, data) {
      if (kind === "steps") board.told(name, data);
      if (kind === "samples") again();
      if (kind === "cut" || kind === "reset" || (kind === "progress" && data.done)) { board.reload(); again(); }
    },
    close() { board.close(); again.cancel(); },
  };
}
