// A batch that was not trained on: why, and each of its samples with its scores.

import { get } from "./api.js";
import { fill, h } from "./dom.js";
import { number } from "./format.js";
import { MEASURES, chooser, coloured, legend, strengths } from "./tokens.js";
import { scores } from "./view-sample.js";

export async function show(place, run, query) {
  const { name, settings } = run;
  const { why, samples, more } = await get("bad_batch", { run: name, step: query.step });
  const names = Object.keys(MEASURES).filter((measure) => samples.some((sample) => sample.measures[measure]));
  const cards = h("div", { class: "stack" }), scale = h("div", {});
  const colour = (measure) => {
    const over = samples.map((sample) => sample.measures[measure]).filter(Boolean);
    if (measure) { const { low, high } = strengths(measure, over.flat()); fill(scale, legend(measure, low, high)); }
    fill(cards, samples.map((sample) => h("article", { class: "card", "aria-label": `Sample ${sample.sample_id}` },
      h("h2", {}, `${sample.sample_id} `, sample.finish_reason === "length" ? h("span", { class: "tag" }, "cut") : null),
      h("p", { class: "prompt" }, sample.prompt || "(empty prompt)"),
      measure && sample.measures[measure] ? coloured(sample, measure, over) : h("p", { class: "tokens flat" }, sample.response),
      scores(sample))));
  };
  const first = names.includes(settings.measure) ? settings.measure : names[0];
  fill(place, h("h1", {}, `The batch of step ${number(Number(query.step))}, not trained on`), h("p", { class: "fault" }, why ?? "The file does not say why."),
    more ? h("p", { class: "quiet" }, `${number(more)} more samples are in bad_batches/ of the run.`) : null,
    names.length ? chooser(names, first, colour) : null, scale, cards);
  colour(first);
  return {};
}
