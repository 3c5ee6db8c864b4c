// A batch that was not trained on: why, and each of its samples with its scores.

import { get } from "./api.js";
import { fill, h } from "./dom.js";
import { number } from "./format.js";
import { onOneScale } from "./tokens.js";
import { scores } from "./view-sample.js";

export async function show(place, run, query) {
  const { name, settings } = run;
  const { why, samples, more } = await get("bad_batch", { run: name, step: query.step });
  fill(place, h("h1", {}, `The batch of step ${number(Number(query.step))}, not trained on`), h("p", { class: "fault" }, why ?? "The file does not say why."),
    more ? h("p", { class: "quiet" }, `${number(more)} more samples are in bad_batches/ of the run.`) : null,
    onOneScale(samples, settings, "stack", (sample, _, tokens) => h("article", { class: "card", "aria-label": `Sample ${sample.sample_id}` },
      h("h2", {}, `${sample.sample_id} `, sample.finish_reason === "length" ? h("span", { class: "tag" }, "cut") : null),
      h("p", { class: "prompt" }, sample.prompt || "(empty prompt)"),
      tokens, scores(sample))));
  return {};
}
