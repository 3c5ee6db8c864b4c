// Staleness, queues, idle time: whether the parts keep each other busy.

import { Board, controls } from "./charts.js";
import { fill, h } from "./dom.js";
import { together } from "./names.js";

const CHARTS = [
  ["staleness", [["staleness/mean", "mean"], ["staleness/max", "max"]]],
  ["groups waiting", [["queue/scored", "scored"], ["queue/generated", "generated"]]],
  ["idle share", [["idle/learner", "learner"], ["idle/rollouts", "rollouts"]]],
  ["where a step's time goes", [["time/step_s", "step"], ["time/wait_batch_s", "waiting"], ["time/train_s", "training"], ["time/publish_s", "publishing"], ["time/evaluation_s", "evaluating"]]],
  ["speed", [["throughput/tokens_per_s", "response tokens"]]],
  ["length", [["length/mean", "mean"], ["length/max", "max"], ["length/prompt_mean", "prompt"]]],
  ["cut at the limit", [["length/truncated_share", "share"]]],
  ["failed groups", [["ledger/failed", "failed"]]],
  ["incarnation", [["incarnation", "of the driver"], ["version/incarnation_max", "of the samples"]]],
  ["drift of rollouts to learner", [["drift/logprob_max", "log-probability"], ["drift/attention_max", "attention"]]],
];

export async function show(place, run) {
  const { name, summary, settings } = run;
  const board = new Board(settings);
  const charts = CHARTS.map(([title, pairs]) => together(name, title, pairs, summary.metrics)).filter(({ series }) => series.length);
  fill(place, h("h1", {}, "Staleness and queues"), controls(board),
    h("div", { class: "grid wide" }, charts.map((chart) => board.add(chart))),
    charts.length ? null : h("p", { class: "quiet" }, "No step yet."));
  return {
    told(kind, data) {
      if (kind === "steps") board.told(name, data);
      if (kind === "cut" || kind === "reset" || (kind === "progress" && data.done)) board.reload();
    },
    close() { board.close(); },
  };
}
