// All runs of a directory, newest first.

import { fill, h, table } from "./dom.js";
import { ago, number } from "./format.js";

export async function show(place, { runs, link, states }) {
  const sorted = [...runs].sort((a, b) => (b.last_s ?? 0) - (a.last_s ?? 0));
  const now = Date.now() / 1000;
  const chosen = new Set();
  const compare = h("a", { class: "button", hidden: true }, "Compare");
  const choose = (name, is) => {
    if (is) chosen.add(name); else chosen.delete(name);
    compare.hidden = chosen.size < 2;
    compare.textContent = `Compare ${chosen.size} runs`;
    const [first, ...rest] = chosen;
    if (first) compare.href = link(first, "compare", { with: rest.join("\n") });
  };
  fill(place, h("h1", {}, "Runs"), runs.length ? table("Runs", ["", "run", "state", "steps", "last reward", "last step"], sorted.map((run) => [
    h("input", { type: "checkbox", "aria-label": `Compare ${run.name}`, onchange: (event) => choose(run.name, event.target.checked) }),
    h("a", { href: link(run.name, "overview") }, run.name),
    h("span", { class: "state" }, h("i", { class: `dot ${run.state}` }), states[run.state] ?? run.state),
    run.total_steps ? `${number(run.steps)} / ${number(run.total_steps)}` : number(run.steps),
    number(run.reward),
    run.last_s ? `${ago(now - run.last_s)} ago` : "–",
  ]), { numeric: [3, 4, 5] }) : h("p", { class: "quiet" }, "There is no run in this directory yet."), h("p", {}, compare));
}
