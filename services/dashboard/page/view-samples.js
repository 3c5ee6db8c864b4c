// The sample browser: search, filters and order; its state is in the address, so it can be sent and gone back to.

import { get } from "./api.js";
import { append, fill, h, later } from "./dom.js";
import { number } from "./format.js";

const PAGE = 50;
const FIELDS = ["text", "step_from", "step_to", "source", "low", "high", "finish", "flag", "failed", "code", "group", "has_map", "sort", "offset"];
const SORTS = [["newest", "newest first"], ["oldest", "oldest first"], ["-reward", "highest reward"], ["reward", "lowest reward"], ["-advantage", "highest advantage"], ["advantage", "lowest advantage"], ["-kl", "highest KL"], ["-tokens", "longest"], ["tokens", "shortest"]];

export async function show(place, run, query) {
  const { name, summary, link } = run;
  const wanted = Object.fromEntries(FIELDS.filter((field) => query[field]).map((field) => [field, query[field]]));
  const choices = await get("choices", { run: name });
  const results = h("div", { class: "results", "aria-live": "off" }), count = h("p", { class: "quiet", role: "status" });
  let fresh = 0, asked = null;

  const set = (field, value) => {
    if (value === "" || value === null || value === false) delete wanted[field]; else wanted[field] = String(value);
    if (field !== "offset") delete wanted.offset;
    history.replaceState(null, "", link("samples", wanted));
    search();
  };
  const soon = later(250, set);
  const field = (title, input) => h("label", {}, h("span", {}, title), input);
  const step = (which, title) => h("input", { type: "number", min: "0", "aria-label": title, placeholder: which === "step_from" ? "first" : "last", value: wanted[which] ?? "", oninput: (event) => soon(which, event.target.value) });
  const bound = (which) => h("input", { type: "number", step: "any", placeholder: which === "low" ? "lowest" : "highest", "aria-label": which === "low" ? "Value from" : "Value below", value: wanted[which] ?? "", oninput: (event) => soon(which, event.target.value) });
  const choose = (which, none, options) => h("select", { onchange: (event) => set(which, event.target.value) }, h("option", { value: "" }, none), options.map(([value, title]) => h("option", { value, selected: wanted[which] === value }, title)));
  const sources = [["*", "reward"], ...summary.sources.map((source) => [source.name, source.name])];
  const words = h("input", { type: "search", placeholder: "words or \"a phrase\" in prompt and response", value: wanted.text ?? "", oninput: (event) => soon("text", event.target.value) });
  const valued = choose("source", "any value", sources);
  const form = h("form", { class: "filters", role: "search", "aria-label": "Samples", onsubmit: (event) => event.preventDefault() },
    field("Search", words),
    h("span", { class: "pair" }, h("label", {}, h("span", {}, "Steps"), step("step_from", "From step")), step("step_to", "To step")),
    h("span", { class: "pair" }, h("label", {}, h("span", {}, "Value of"), valued), bound("low"), bound("high")),
    field("Finish", choose("finish", "any", choices.finish.map((one) => [one, one]))),
    field("Flag", choose("flag", "any", Object.entries(choices.flags).map(([one, many]) => [one, `${one} (${many})`]))),
    field("Failed", choose("failed", "any or none", sources)),
    choices.maps ? h("label", { class: "check" }, h("input", { type: "checkbox", checked: Boolean(wanted.has_map), onchange: (event) => set("has_map", event.target.checked ? "true" : "") }), h("span", {}, "with map")) : null,
    field("Order", h("select", { onchange: (event) => set("sort", event.target.value) }, SORTS.map(([value, title]) => h("option", { value, selected: (wanted.sort ?? "newest") === value }, title)))),
    Object.keys(wanted).length ? h("a", { class: "button small", href: link("samples") }, "clear") : null);

  const search = async () => {
    asked?.abort();
    asked = new AbortController();
    fresh = 0;
    const { source, failed, low, high, ...more } = wanted;
    const one = (value) => (value === "*" ? "" : value);
    try {
      const ranged = low || high ? { source: one(source ?? "*"), low, high } : {};
      const found = await get("samples", { run: name, ...more, ...ranged, failed: one(failed), limit: PAGE }, asked.signal);
      draw(found);
    } catch (error) {
      if (error.name !== "AbortError") fill(results, h("p", { role: "alert" }, error.message));
    }
  };

  const draw = (found) => {
    const tags = ["group", "code"].filter((which) => wanted[which]).map((which) => h("button", { type: "button", class: "tag", onclick: () => set(which, "") }, `${which} ${wanted[which]} ×`));
    fill(count, `${number(found.total)} samples`, found.total ? `, ${number(found.offset + 1)} to ${number(found.offset + found.rows.length)}` : "", " ", tags);
    const names = summary.sources.map((source) => source.name);
    const heads = ["step", "prompt and response", "reward", ...names, "advantage", "KL", "tokens"];
    const rows = found.rows.map((row) => {
      const to = link("sample", { sample: row.sample_id, step: row.step });
      return h("tr", { onclick: (event) => { if (!event.target.closest("a")) location.hash = to; } },
        h("td", { class: "number", "data-head": "step" }, row.step),
        h("td", { class: "texts" }, h("a", { href: to, class: "row-link" }, h("span", { class: "prompt" }, row.prompt || "(empty prompt)"), h("span", { class: "response" }, row.response || "(empty response)"), signs(row))),
        h("td", { class: "number", "data-head": "reward" }, value(row.reward, row.code)),
        names.map((source) => h("td", { class: "number", "data-head": source }, row.scores[source] ? value(row.scores[source].value, row.scores[source].code) : "–")),
        h("td", { class: "number", "data-head": "advantage" }, number(row.advantage)),
        h("td", { class: "number", "data-head": "KL" }, number(row.kl)),
        h("td", { class: "number", "data-head": "tokens" }, row.tokens));
    });
    const turn = (offset, title) => h("button", { type: "button", disabled: offset < 0 || offset >= found.total, onclick: () => { set("offset", offset); scrollTo(0, 0); } }, title);
    fill(results, found.rows.length ? h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Samples" }, h("table", { class: "samples" }, h("caption", { class: "unseen" }, "Samples"),
      h("thead", {}, h("tr", {}, heads.map((head, i) => h("th", { scope: "col", class: i === 1 ? null : "number" }, head)))),
      append(h("tbody", {}), rows))) : h("p", { class: "quiet" }, summary.progress?.done === false ? "Samples are still being indexed." : "No sample is like that."),
    found.total > PAGE ? h("p", { class: "turn" }, turn(found.offset - PAGE, "← before"), " ", turn(found.offset + PAGE, "after →")) : null);
  };

  const news = h("button", { type: "button", class: "small", hidden: true, onclick: () => { news.hidden = true; search(); } });
  fill(place, h("h1", { class: "unseen" }, "Samples"), form, h("div", { class: "headed" }, count, news), results);
  if (query.focus) words.focus();
  await search();
  return {
    told(kind, data) {
      if (kind === "samples") { fresh += data.added; news.hidden = false; news.textContent = `${number(fresh)} new samples: show`; }
      if (kind === "cut" || kind === "reset") search();
    },
    close() { asked?.abort(); soon.cancel(); },
  };
}

function signs(row) {
  const found = [row.finish === "length" ? "cut" : null, row.has_map ? "map" : null, row.stale ? `stale ${row.stale}` : null, ...row.flags].filter(Boolean);
  return found.length ? h("span", { class: "tags" }, found.map((sign) => h("span", { class: "tag" }, sign))) : null;
}

export function value(amount, code) {
  return code ? h("span", { class: "failed", title: `failed: ${code}` }, code.replaceAll("_", " ")) : number(amount);
}
