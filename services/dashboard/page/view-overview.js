// What the run does now, the curves that are looked at first, the rest of them by name, and faults on the time line.

import { get } from "./api.js";
import { Board, controls } from "./charts.js";
import { atMost, fill, h, table } from "./dom.js";
import { ago, clock, number, percent } from "./format.js";
import { chartOf, together } from "./names.js";

const FIRST = ["reward/mean", "kl/reference", "policy/entropy_sampled", "length/mean", "length/truncated_share", "policy/clip_share", "policy/grad_norm", "reward/within_prompt_std", "value/explained_variance", "time/step_s"];
const TILES = [["reward/mean", "reward"], ["kl/reference", "KL to reference"], ["length/mean", "tokens a response"], ["throughput/tokens_per_s", "tokens/s"], ["staleness/mean", "staleness"], ["idle/learner", "learner idle", percent], ["idle/rollouts", "rollouts idle", percent], ["ledger/failed", "failed groups"]];

export async function show(place, run, _query) {
  const { name, summary, settings } = run;
  const board = new Board(settings);
  const tiles = h("dl", { class: "tiles" }), parts = h("div", {}), faults = h("div", {});
  const grid = h("div", { class: "grid" }), rest = h("div", {});
  fill(place, h("h1", { class: "unseen" }, `Overview of ${name}`),
    h("section", { class: "card now-card", "aria-labelledby": "now" }, h("h2", { id: "now" }, "Now"), parts, tiles),
    h("section", { "aria-labelledby": "curves" }, h("div", { class: "headed" }, h("h2", { id: "curves" }, "Curves"), controls(board)), grid),
    h("section", { class: "card", "aria-labelledby": "faults" }, h("h2", { id: "faults" }, "Faults and events"), faults),
    rest);

  const drawn = new Set();
  const charts = () => {
    const names = summary.metrics;
    for (const metric of FIRST) if (names.includes(metric) && !drawn.has(metric)) { drawn.add(metric); grid.append(board.add(chartOf(name, metric, names))); }
    const parts = ["reward/coverage", "reward/focus", "reward/repeat"];
    if (names.includes(parts[0]) && !drawn.has(parts[0])) { parts.forEach((part) => drawn.add(part)); grid.append(board.add(together(name, "attention reward, its parts", parts.map((part) => [part, part.slice(7)]), names))); }
    fill(rest, h("h2", {}, "Every metric"), groups(names).map(([prefix, members]) => {
      const inside = h("div", { class: "grid" });
      return h("details", { class: "group", ontoggle: (event) => {
        if (!event.target.open || inside.childElementCount) return;
        for (const metric of members) inside.append(board.add(chartOf(name, metric, names)));
      } }, h("summary", {}, prefix, h("span", { class: "quiet" }, ` ${members.length}`)), inside);
    }));
  };

  const now = () => {
    const { status, last } = summary;
    fill(tiles, TILES.filter(([metric]) => last?.[metric] !== undefined).map(([metric, title, form]) => h("div", {}, h("dt", {}, title), h("dd", {}, (form ?? number)(last[metric])))));
    fill(parts, status ? [
      h("p", { class: "phase" }, ended(summary) ? `${summary.state} after ${number(summary.steps)} steps` : [h("strong", {}, status.phase), h("span", { class: "quiet" }, ` for ${ago(Math.max(0, status.time - status.since))}`)]),
      status.parts?.length && !ended(summary) ? h("ul", { class: "parts", "aria-label": "Parts of the run" }, status.parts.map((part) => h("li", {}, h("i", { class: `dot ${part.state}` }), h("span", { class: "part" }, part.name), h("span", { class: "quiet" }, part.state === "gone" ? "gone, to be started again" : part.state, part.still_s > 5 ? ` · no progress for ${ago(part.still_s)}` : "")))) : null,
    ] : h("p", { class: "quiet" }, "This run wrote no status.json: what its parts do now is not known."));
  };

  const look = async () => {
    const found = await get("events", { run: name, level: "" , most: 2000 });
    board.marks = found.events.filter(({ level, kind }) => level === "fault" || kind === "start").filter(({ step, kind }) => step || kind !== "start").map(({ step, level }) => ({ step, level }));
    board.redraw();
    const bad = found.events.filter(({ level }) => level === "fault").reverse();
    const line = timeline(found.events, summary.steps);
    fill(faults,
      bad.length ? null : h("p", { class: "quiet" }, "No fault so far."),
      line,
      bad.length ? table("Faults, newest first", ["time", "step", "what", "said"], bad.slice(0, 50).map((event) => [clock(event.time), number(event.step), h("span", { class: "fault" }, event.kind.replaceAll("_", " ")), said(event.data)]), { numeric: [1] }) : null,
      h("details", {}, h("summary", {}, "All events"), table("Events, newest first", ["time", "step", "what", "said"], [...found.events].reverse().slice(0, 200).map((event) => [clock(event.time), number(event.step), event.kind.replaceAll("_", " "), said(event.data)]), { numeric: [1] })));
  };
  const lookAgain = atMost(1000, () => look().catch(() => {}));

  board.failed = (error) => fill(grid, h("p", { role: "alert" }, error.message));
  charts();
  now();
  await look();
  const timer = setInterval(() => { if (summary.status && !ended(summary) && summary.status.seen) now(); }, 5000);
  return {
    told(kind, data) {
      if (kind === "steps") { if (!grid.childElementCount || data.asks) charts(); board.told(name, data); now(); }
      else if (kind === "status") now();
      else if (kind === "events") { lookAgain(); now(); }
      else if (kind === "cut" || kind === "reset" || (kind === "progress" && data.done)) { charts(); board.reload(); now(); lookAgain(); }
    },
    close() { board.close(); clearInterval(timer); lookAgain.cancel(); },
  };
}

const ended = (summary) => ["finished", "stopped", "failed"].includes(summary.state);

function groups(names) {
  const found = new Map();
  for (const name of names) {
    const prefix = name.includes("/") ? name.split("/")[0] : "other";
    if (!found.has(prefix)) found.set(prefix, []);
    found.get(prefix).push(name);
  }
  return [...found];
}

/** Where faults, restarts and commits lie among the steps. */
function timeline(events, steps) {
  if (!steps || !events.length) return null;
  const marks = events.filter(({ level }) => level !== "note");
  return h("div", { class: "timeline", role: "img", "aria-label": `Time line of ${number(steps)} steps: ${marks.filter(({ level }) => level === "fault").length} faults, ${marks.filter(({ kind }) => kind === "start").length} starts, ${marks.filter(({ kind }) => kind === "committed").length} commits` },
    marks.map((event) => {
      const mark = h("i", { class: event.level === "fault" ? "fault" : event.kind, title: `${clock(event.time)} step ${event.step}: ${event.kind.replaceAll("_", " ")}` });
      mark.style.left = `${Math.min(100, (100 * event.step) / steps)}%`;
      return mark;
    }),
    h("span", { class: "quiet" }, "0"), h("span", { class: "quiet end" }, number(steps)));
}

export function said(data) {
  return Object.entries(data ?? {}).filter(([, value]) => value !== null && value !== undefined).map(([name, value]) => `${name} ${typeof value === "object" ? JSON.stringify(value) : value}`).join(" · ");
}
