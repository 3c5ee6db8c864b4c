// The samples of one prompt side by side, coloured on one scale, with all their scores.

import { get } from "./api.js";
import { fill, h } from "./dom.js";
import { number } from "./format.js";
import { onOneScale, promptPieces, shownPiece } from "./tokens.js";
import { value } from "./view-samples.js";

export async function show(place, run, query) {
  const { name, link, settings } = run;
  const { samples, more } = await get("group", { run: name, group: query.group, step: query.step });
  if (!samples.length) { fill(place, h("p", { class: "quiet" }, "This group is not there; the run may have been cut back since.")); return {}; }
  const sources = [...new Set(samples.flatMap((sample) => Object.keys(sample.scores ?? {})))];
  const best = Math.max(...samples.map((sample) => sample.reward?.value ?? -Infinity));
  const article = (sample, i, tokens) => h("article", { class: "card", "aria-label": `Sample ${i}` },
    h("h2", {}, h("a", { href: link("sample", { sample: sample.sample_id, step: sample.step }) }, `Sample ${sample.sample_id.split(":").at(-1)}`), !more && sample.reward?.value === best ? h("span", { class: "tag good" }, "highest") : null, sample.finish_reason === "length" ? h("span", { class: "tag" }, "cut") : null),
    h("dl", { class: "facts" }, fact("reward", value(sample.reward?.value, sample.reward?.error?.code ?? (sample.reward ? null : "not_scored"))), sources.map((source) => fact(source, sample.scores?.[source] ? value(sample.scores[source].value, sample.scores[source].error?.code) : "–")), fact("advantage", number(sample.advantage)), fact("KL", number(sample.kl_reference)), fact("tokens", String(sample.response_ids.length))),
    tokens);
  const first = samples[0];
  const salient = new Set(first.salient);
  fill(place, h("h1", {}, `A group of step ${first.step}`), h("p", { class: "quiet" }, `${samples.length} samples of one prompt, ${query.group}`),
    more ? h("p", { class: "quiet" }, `${number(more)} more samples are too much for one page: `, h("a", { href: link("samples", { group: query.group, step_from: first.step, step_to: first.step }) }, "all of the group"), ".") : null,
    h("section", { class: "card", "aria-label": "Prompt" }, h("h2", {}, "Prompt"), h("p", { class: "tokens flat" }, promptPieces(first).map((piece, at) => h("span", { class: `token${salient.has(at) ? " salient" : ""}` }, shownPiece(piece, first.prompt_ids[at]))))),
    onOneScale(samples, settings, "side", article));
  return {};
}

const fact = (title, shown) => h("div", {}, h("dt", {}, title), h("dd", {}, shown));
