// Tokens coloured by a measure. One hue for what is never negative, two for what has a sign; the strongest tint still
// leaves the text readable in light and in dark.

import { fill, h } from "./dom.js";
import { number } from "./format.js";

export const MEASURES = {
  mass: { title: "attention mass", meaning: "share of the attention that goes to the prompt's content (M)" },
  salient_mass: { title: "on salient words", meaning: "share of the attention that goes to the salient tokens (C)" },
  entropy: { title: "attention entropy", meaning: "of the attention over the content, nats; low is sharp" },
  peak: { title: "peak share", meaning: "share of the mass that the most looked-at position has" },
  logprob: { title: "log-probability", meaning: "of the token under the policy that drew it, nats; strong is unlikely", turned: true },
  policy_entropy: { title: "policy entropy", meaning: "of the policy's distribution at the token, nats; low is sure" },
  kl: { title: "KL to the reference", meaning: "log-probability minus the reference's, nats", signed: true },
};

/** The lowest and highest of several columns of numbers, nulls aside. A loop: a call takes some 100,000 arguments. */
export function extent(columns) {
  let low = Infinity, high = -Infinity;
  for (const values of columns) {
    for (const value of values) {
      if (value === null) continue;
      if (value < low) low = value;
      if (value > high) high = value;
    }
  }
  return { low, high };
}

/** The range that a measure is coloured by, of the values [T] of each sample that is compared. */
export function rangeOf(name, columns) {
  const { low, high } = extent(columns);
  if (!MEASURES[name].signed) return { low, high };
  const most = Math.max(1e-9, -low, high);
  return { low: -most, high: most };
}

/** Strengths [T] in -1 … 1 of a measure within its range. */
export function strengths(name, values, { low, high }) {
  const { signed, turned } = MEASURES[name];
  const within = (value) => (high > low ? (value - low) / (high - low) : 0.5);
  const strength = (value) => (signed ? value / high : turned ? 1 - within(value) : within(value));
  return values.map((value) => (value === null ? null : strength(value)));
}

export function tint(element, strength) {
  if (strength === null || strength === undefined) { element.style.removeProperty("--tint"); element.classList.remove("less"); return; }
  element.style.setProperty("--tint", `${Math.round(100 * Math.min(1, Math.abs(strength)))}%`);
  element.classList.toggle("less", strength < 0);
}

/** What is shown of a piece: its text with line ends made visible; where there is none, its id. */
export function shownPiece(piece, id) {
  if (piece === null || piece === undefined) return `⟨${id}⟩`;
  if (piece === "") return "·";
  return piece.replaceAll("\n", "⏎\n").replaceAll("\t", "⇥\t");
}

export function pieces(sample) { return sample.pieces ?? sample.response_ids.map(() => null); }

export function promptPieces(sample) { return sample.prompt_pieces ?? sample.prompt_ids.map(() => null); }

export function spoken(piece, id) {
  if (piece === null || piece === undefined) return `token id ${id}`;
  return piece === "" ? "no text of its own" : piece.trim() === "" ? "blank" : piece.trim();
}

/** A response as spans coloured within `range`, without keys or pointer: for groups and lists. */
function coloured(sample, measure, range) {
  const values = sample.measures[measure];
  const strength = strengths(measure, values, range);
  return h("p", { class: "tokens flat" }, pieces(sample).map((piece, i) => {
    const span = h("span", { class: "token", title: `${MEASURES[measure].title} ${number(values[i])}` }, shownPiece(piece, sample.response_ids[i]));
    tint(span, strength[i]);
    return span;
  }));
}

export function legend(measure, low, high) {
  const { title, meaning, signed, turned } = MEASURES[measure];
  return h("div", { class: "scale" }, h("span", {}, number(turned ? high : low)), h("i", { class: signed ? "both" : "one", "aria-hidden": "true" }), h("span", {}, number(turned ? low : high)), h("span", { class: "quiet" }, `${title}: ${meaning}`));
}

/** Buttons that choose the measure; only those that the sample holds. */
export function chooser(names, chosen, choose) {
  return h("div", { class: "chooser", role: "radiogroup", "aria-label": "Colour the response by" }, names.map((name) => {
    const input = h("input", { type: "radio", name: "measure", value: name, checked: name === chosen, onchange: () => choose(name) });
    return h("label", { title: MEASURES[name].meaning }, input, h("span", {}, MEASURES[name].title));
  }));
}

/** Articles of samples coloured on one scale by the measure that is chosen: [chooser, scale, articles]. */
export function onOneScale(samples, settings, shape, article) {
  const names = Object.keys(MEASURES).filter((measure) => samples.some((sample) => sample.measures[measure]));
  const articles = h("div", { class: shape }), scale = h("div", {});
  const colour = (measure) => {
    settings.measure = measure;
    settings.keep();
    const range = measure ? rangeOf(measure, samples.map((sample) => sample.measures[measure] ?? [])) : null;
    if (measure) fill(scale, legend(measure, range.low, range.high));
    fill(articles, samples.map((sample, i) => article(sample, i, sample.measures[measure] ? coloured(sample, measure, range) : h("p", { class: "tokens flat" }, sample.response))));
  };
  const first = names.includes(settings.measure) ? settings.measure : names[0];
  colour(first);
  return [names.length ? chooser(names, first, colour) : null, scale, articles];
}
