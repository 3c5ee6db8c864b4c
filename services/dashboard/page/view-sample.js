// One sample, token by token. The pointer on a response token, or the arrow keys, light what the token looked at in the
// prompt; the pointer on a prompt token lights the response tokens that looked at it.

import { get, getMap } from "./api.js";
import { fill, h, table } from "./dom.js";
import { clock, number } from "./format.js";
import { MEASURES, chooser, extent, legend, pieces, promptPieces, rangeOf, shownPiece, spoken, strengths, tint } from "./tokens.js";
import { value } from "./view-samples.js";

const BLOCK = 256;

export async function show(place, run, query) {
  const { name, link, settings } = run;
  const step = query.step ?? null;
  const sample = await get("sample", { run: name, sample: query.sample, step });
  const names = Object.keys(MEASURES).filter((measure) => sample.measures[measure]);
  let measure = names.includes(settings.measure) ? settings.measure : names[0];
  const view = new TokenView(sample, (low) => getMap({ run: name, sample: sample.sample_id, step: sample.step, low, count: BLOCK }));
  const scale = h("div", {});
  const colour = (chosen) => { measure = settings.measure = chosen; settings.keep(); const { low, high } = view.colour(measure); fill(scale, legend(measure, low, high)); };
  const index = Number(/:(\d+)$/.exec(sample.sample_id)?.[1] ?? NaN);
  fill(place,
    h("div", { class: "headed" }, h("h1", {}, `Sample ${Number.isNaN(index) ? "" : index} of step ${sample.step}`),
      h("a", { class: "button", href: link("group", { group: sample.group_id, step: sample.step }) }, "its group side by side")),
    facts(sample),
    h("section", { class: "card", "aria-labelledby": "tokens" }, h("h2", { id: "tokens" }, "Tokens"),
      names.length ? [chooser(names, measure, colour), scale] : h("p", { class: "quiet" }, "The sample holds no figure a token."),
      view.notes(), view.element),
    h("section", { class: "card", "aria-labelledby": "scores" }, h("h2", { id: "scores" }, "Scores"), scores(sample)));
  if (measure) colour(measure);
  return { close() { view.closed = true; } };
}

class TokenView {
  constructor(sample, load) {
    this.sample = sample;
    this.load = load;
    this.blocks = new Map();
    this.pieces = pieces(sample);
    const content = new Set(sample.content), salient = new Map(sample.salient.map((at, i) => [at, sample.salient_weights[i] ?? 1]));
    this.prompt = promptPieces(sample).map((piece, at) => h("span", {
      class: `token${content.size && !content.has(at) ? " outside" : ""}${salient.has(at) ? " salient" : ""}`,
      title: salient.has(at) ? `salient, weight ${number(salient.get(at))}` : content.has(at) ? null : "not content",
      onpointerenter: () => this.lookedAtBy(at), onpointerleave: () => this.restore(),
    }, shownPiece(piece, sample.prompt_ids[at]), salient.has(at) ? h("span", { class: "unseen" }, " (salient) ") : null));
    this.response = this.pieces.map((piece, t) => h("span", {
      class: "token", role: "option", id: `t${t}`, "aria-selected": "false", "aria-label": spoken(piece, sample.response_ids[t]),
      onpointerenter: () => { if (this.pinned === null) this.at(t); }, onclick: () => { this.pinned = this.pinned === t ? null : t; this.at(t); },
    }, shownPiece(piece, sample.response_ids[t])));
    this.pinned = null;
    this.now = null;
    this.readout = h("p", { class: "readout", role: "status" }, this.response.length ? "Point at a token of the response, or use the arrow keys in it." : "The response is empty.");
    this.list = h("div", { class: "tokens", role: "listbox", tabindex: "0", "aria-label": "Response tokens", onkeydown: (event) => this.key(event), onpointerleave: () => { if (this.pinned === null) this.leave(); },
      onfocus: () => { if (this.now === null && this.response.length && this.list.matches(":focus-visible")) { this.pinned = 0; this.at(0); } } }, this.response);
    this.element = h("div", { class: "reader" },
      h("div", {}, h("h3", {}, "Prompt"), h("div", { class: "tokens prompt", tabindex: "0", role: "region", "aria-label": "Prompt" }, this.prompt)),
      h("div", {}, h("h3", {}, "Response"), this.list.childElementCount ? this.list : h("p", { class: "quiet" }, "(empty)")),
      this.readout);
  }

  notes() {
    const { has_map: kept, no_tokenizer: without, salient } = this.sample;
    return h("p", { class: "quiet notes" },
      kept ? "The map was kept: the content of the prompt is lit by what the token under the pointer looked at, the template only faintly. " : "The run kept no map of this sample (rollout.keep_maps), so the prompt cannot be lit. ",
      salient.length ? [h("span", { class: "token salient" }, "Underlined"), " are the salient tokens. "] : "",
      without ? `Ids in place of pieces: ${without}.` : "");
  }

  colour(measure) {
    const values = this.sample.measures[measure], range = rangeOf(measure, [values]);
    this.strength = strengths(measure, values, range);
    this.restore();
    return range;
  }

  restore() { this.response.forEach((token, t) => { tint(token, this.strength?.[t]); }); }

  key(event) {
    const last = this.response.length - 1, now = this.now ?? -1;
    const to = { ArrowRight: now + 1, ArrowDown: now + 10, ArrowLeft: now - 1, ArrowUp: now - 10, Home: 0, End: last }[event.key];
    if (event.key === "Escape") { this.pinned = null; this.leave(); return; }
    if (to === undefined || last < 0) return;
    event.preventDefault();
    this.pinned = Math.min(last, Math.max(0, to));
    this.at(this.pinned);
  }

  async at(t) {
    if (this.now !== null) { this.response[this.now].classList.remove("at"); this.response[this.now].setAttribute("aria-selected", "false"); }
    this.now = t;
    this.response[t].classList.add("at");
    this.response[t].setAttribute("aria-selected", "true");
    this.list.setAttribute("aria-activedescendant", `t${t}`);
    this.say(t, null);
    const row = await this.row(t);
    if (this.closed || this.now !== t || !row) return;
    // Over the content: the template's tokens take most of it, whatever the response says, and stay faint.
    const inside = this.sample.content.length ? this.sample.content : [...row.keys()];
    const most = extent([inside.map((j) => row[j] ?? 0)]).high;
    this.prompt.forEach((token, j) => tint(token, most ? Math.min(1, row[j] / most) * (token.classList.contains("outside") ? 0.3 : 1) : 0));
    const order = [...row.keys()].sort((a, b) => row[b] - row[a]).slice(0, 3);
    this.say(t, order.map((j) => `${spoken(promptPieces(this.sample)[j], this.sample.prompt_ids[j])} ${number(row[j])}`).join(", "));
  }

  leave() {
    if (this.now !== null) { this.response[this.now].classList.remove("at"); this.response[this.now].setAttribute("aria-selected", "false"); }
    this.now = null;
    this.prompt.forEach((token) => tint(token, null));
  }

  say(t, looks) {
    const { measures, response_ids: ids } = this.sample;
    const figures = Object.entries(measures).map(([name, values]) => `${MEASURES[name].title} ${number(values[t])}`);
    fill(this.readout, h("strong", {}, `${t}: ${spoken(this.pieces[t], ids[t])}`), ` · id ${ids[t]} · ${figures.join(" · ")}`, looks ? [" · looks most at ", h("strong", {}, looks)] : "");
  }

  async row(t) {
    if (!this.sample.has_map) return null;
    const low = BLOCK * Math.floor(t / BLOCK);
    if (!this.blocks.has(low)) this.blocks.set(low, this.load(low).catch(() => null));
    const block = await this.blocks.get(low);
    return block && t - low < block.rows ? block.data.subarray((t - low) * block.columns, (t - low + 1) * block.columns) : null;
  }

  /** The response lit by how much each token looked at the prompt token `at`. */
  async lookedAtBy(at) {
    if (!this.sample.has_map || this.pinned !== null) return;
    const rows = await Promise.all(this.response.map((_, t) => this.row(t)));
    const shares = rows.map((row) => row?.[at] ?? 0), most = extent([shares]).high;
    if (!this.closed && this.prompt[at].matches(":hover")) this.response.forEach((token, t) => tint(token, most ? shares[t] / most : 0));
  }
}

function facts(sample) {
  const versions = sample.policy_versions ?? [];
  const rows = [
    ["reward", value(sample.reward?.value, sample.reward?.error?.code ?? (sample.reward ? null : "not_scored"))],
    ["advantage", number(sample.advantage)], ["KL to the reference", number(sample.kl_reference)],
    ["value", sample.value === null ? null : number(sample.value)],
    ["tokens", `${sample.response_ids.length} after ${sample.prompt_ids.length}`], ["finish", sample.finish_reason],
    ["policy version", versions.map(([incarnation, at, tokens]) => `${incarnation}.${at}${versions.length > 1 ? ` (${tokens})` : ""}`).join(", ")],
    ["staleness", versions.length ? Math.max(...versions.map(([, at]) => sample.step - at)) : null],
    ["flags", sample.flags?.length ? sample.flags.join(", ") : null], ["made", clock(sample.created_at)], ["id", sample.sample_id],
  ];
  return h("dl", { class: "facts" }, rows.filter(([, shown]) => shown !== null && shown !== undefined && shown !== "").map(([title, shown]) => h("div", {}, h("dt", {}, title), h("dd", {}, shown))));
}

/** Every source's score with what it says of it, and failures with their reasons. */
export function scores(sample) {
  const all = [["reward", sample.reward], ...Object.entries(sample.scores ?? {})].filter(([, score]) => score);
  if (!all.length) return h("p", { class: "quiet" }, "No source has scored it.");
  return table("Scores", ["source", "value", "detail"], all.map(([name, score]) => [
    name, value(score.value, score.error?.code),
    score.error ? h("span", { class: "failed" }, `${score.error.kind}: ${score.error.message}`) : detail(score.detail),
  ]), { numeric: [1] });
}

export function detail(found) {
  const { judged_by: principles = [], ...rest } = found ?? {};
  const pairs = Object.entries(rest);
  const list = principles.length ? h("details", { class: "judged-by" }, h("summary", {}, principles.length === 1 ? "1 principle" : `${principles.length} principles`), h("ol", { class: "principles" }, principles.map((text) => h("li", {}, text)))) : null;
  if (list) return h("div", {}, pairs.length ? detail(rest) : null, list);
  return pairs.length ? h("span", { class: "pairs" }, pairs.map(([name, amount]) => h("span", {}, h("span", { class: "quiet" }, `${name.replaceAll("_", " ")} `), typeof amount === "number" ? number(amount) : String(amount)))) : "–";
}
