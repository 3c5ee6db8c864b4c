// Curves in small multiples: one zoom, one smoothing, one scale for a whole board. The server sends as many points as
// the width shows; a board asks only for what is on the screen.

import uPlot from "./vendor/uPlot.esm.js";
import { get } from "./api.js";
import { append, atMost, fill, h, later, table } from "./dom.js";
import { number } from "./format.js";

const HUES = ["--line-1", "--line-2", "--line-3", "--line-4", "--line-5", "--line-6", "--line-7", "--line-8"];
const POINTS = 400;
const REFRESH_MS = 2000;
const ROWS = 12;
const WHOLE = [0, 1, 2, 3, 4, 5, 6, 7].flatMap((power) => [1, 2, 5].map((one) => one * 10 ** power));

const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const key = (run, metric) => `${run}\n${metric}`;

/** Exponential mean without the pull of its beginning; `weight` in 0 … 0.99. */
export function smooth(values, weight) {
  if (!weight) return values;
  let mean = 0, share = 0;
  return values.map((value) => {
    if (value === null || value === undefined) return null;
    mean = weight * mean + (1 - weight) * value;
    share = weight * share + (1 - weight);
    return mean / share;
  });
}

/**
 * A board of charts of one or more runs. A chart is {title, meaning, unit, series: [{run, metric, label, band}]}; `band`
 * names the metric of a standard deviation.
 */
export class Board {
  constructor(settings) {
    this.settings = settings; // {smoothing, log}: kept by the page
    this.charts = new Map();
    this.curves = new Map();
    this.range = null;
    this.marks = [];
    this.steps = 0;
    this.closed = false;
    this.seen = new IntersectionObserver((entries) => {
      for (const entry of entries) this.charts.get(entry.target).visible = entry.isIntersecting;
      this.load();
    }, { rootMargin: "200px" });
    this.sized = new ResizeObserver((entries) => { for (const entry of entries) this.charts.get(entry.target.closest("figure"))?.resize(); });
    this.load = later(20, () => this.fetch());
    this.refresh = atMost(REFRESH_MS, () => { if (!document.hidden) this.reload(); else this.stale = true; });
    this.soon = atMost(1000, () => this.redraw()); // a run of many steps a second is not drawn as often
    this.shown = () => { if (!document.hidden && this.stale) { this.stale = false; this.reload(); } };
    document.addEventListener("visibilitychange", this.shown);
    this.themed = () => this.redraw();
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", this.themed);
    addEventListener("themed", this.themed);
  }

  add(description) {
    const chart = new Chart(this, description);
    this.charts.set(chart.element, chart);
    this.seen.observe(chart.element);
    this.sized.observe(chart.plotted);
    return chart.element;
  }

  needed(visible = true) {
    const names = new Map();
    for (const chart of this.charts.values()) {
      if (visible && !chart.visible) continue;
      for (const { run, metric, band } of chart.description.series) {
        for (const name of [metric, band]) if (name) { if (!names.has(run)) names.set(run, new Set()); names.get(run).add(name); }
      }
    }
    return names;
  }

  async fetch() {
    const asked = [];
    const range = this.range;
    for (const [run, names] of this.needed()) {
      const missing = [...names].filter((name) => !this.curves.has(key(run, name)));
      for (let i = 0; i < missing.length; i += 48) {
        const part = missing.slice(i, i + 48);
        asked.push(get("curves", { run, name: part, low: range?.[0], high: range?.[1], points: POINTS }).then((found) => {
          if (this.closed || range !== this.range) return;
          for (const name of part) this.curves.set(key(run, name), found.curves[name] ?? { width: 1, step: [], mean: [] });
          this.steps = Math.max(this.steps, found.steps);
          this.preview = found.preview;
        }));
      }
    }
    try { await Promise.all(asked); } catch (error) { if (!this.closed) this.failed?.(error); return; }
    if (!this.closed) { for (const chart of this.charts.values()) if (chart.visible) chart.draw(); this.drawn?.(); }
  }

  reload() { this.curves.clear(); this.fetch(); }

  zoom(low, high) {
    this.range = low === null ? null : [Math.max(0, Math.floor(low)), Math.ceil(high)];
    this.curves.clear();
    this.zoomed?.(this.range);
    this.fetch();
  }

  /** New steps of a live run: added to what is drawn point by point, asked for anew where a point is several steps. */
  told(run, { rows, asks, steps }) {
    this.steps = Math.max(this.steps, steps);
    if (this.range) return;
    if (asks || document.hidden) { this.refresh(); return; }
    for (const [step, figures] of rows) {
      for (const [name, value] of Object.entries(figures)) {
        const curve = this.curves.get(key(run, name));
        if (!curve) continue;
        if (curve.width > 1 || curve.step.length > 2 * POINTS) { this.refresh(); continue; }
        if (curve.step.length && step <= curve.step.at(-1)) continue;
        curve.step.push(step);
        curve.mean.push(value);
      }
    }
    this.soon();
  }

  redraw() { for (const chart of this.charts.values()) if (chart.visible) chart.draw(); }

  close() {
    this.closed = true;
    this.load.cancel();
    this.refresh.cancel();
    this.soon.cancel();
    this.seen.disconnect();
    this.sized.disconnect();
    document.removeEventListener("visibilitychange", this.shown);
    matchMedia("(prefers-color-scheme: dark)").removeEventListener("change", this.themed);
    removeEventListener("themed", this.themed);
    for (const chart of this.charts.values()) chart.plot?.destroy();
  }
}

/** Of the y axis: a little air, and what never changes in the middle. */
function span(_plot, low, high) {
  if (low === null || low === undefined) return [0, 1];
  // Smoothing rounds: where a few last digits are all that differs, no number stands between them for an axis to name.
  if (high - low <= 1e-9 * Math.max(Math.abs(low), Math.abs(high))) return low === 0 ? [0, 1] : [low - Math.abs(low) / 2, low + Math.abs(low) / 2];
  const air = 0.06 * (high - low);
  return [low >= 0 && low - air < 0 ? 0 : low - air, high + air];
}

class Chart {
  constructor(board, description) {
    this.board = board;
    this.description = description;
    this.visible = false;
    this.now = h("span", { class: "now" });
    this.plotted = h("div", { class: "plot", role: "img", "aria-label": description.title });
    this.rows = h("div", { class: "rows", hidden: true });
    this.toggle = h("button", { class: "small", type: "button", "aria-expanded": "false", "aria-label": `Table of ${description.title}`, onclick: () => this.flip() }, "table");
    const several = description.series.length > 1;
    this.element = h("figure", { class: "chart" },
      h("figcaption", {},
        h("span", { class: "title", title: description.meaning }, description.title, description.unit ? h("span", { class: "unit" }, ` ${description.unit}`) : null),
        this.now, this.toggle),
      several ? h("div", { class: "legend" }, description.series.map((one, i) => h("span", { class: "key" }, h("i", { class: `line-${i % 8 + 1}` }), one.label))) : null,
      this.plotted, this.rows);
  }

  flip() {
    const shown = this.rows.hidden;
    this.rows.hidden = !shown;
    this.plotted.hidden = shown;
    this.toggle.setAttribute("aria-expanded", String(shown));
    this.toggle.textContent = shown ? "curve" : "table";
    if (!shown) { this.plot?.destroy(); this.plot = null; }
    this.draw();
  }

  series() {
    return this.description.series.map((one) => {
      const curve = this.board.curves.get(key(one.run, one.metric));
      const spread = one.band ? this.board.curves.get(key(one.run, one.band)) : null;
      return { one, curve, spread };
    });
  }

  draw() {
    const found = this.series();
    if (found.some(({ curve }) => !curve)) return;
    this.say(found);
    if (!this.rows.hidden) { this.tabulate(found); return; }
    const { data, kinds } = this.data(found);
    const shape = kinds.map(({ kind, i }) => `${kind}${i}`).join() + this.board.settings.log + css("--paper");
    if (this.plot && this.shape === shape) { this.plot.setData(data, true); return; }
    this.plot?.destroy();
    this.shape = shape;
    this.plot = new uPlot(this.options(kinds, data), data, this.plotted);
  }

  /** Columns for the plot: x, then for each series its edges of a band, the raw line where smoothed, and the line. */
  data(found) {
    const weight = this.board.settings.smoothing;
    const steps = [...new Set(found.flatMap(({ curve }) => curve.step))].sort((a, b) => a - b);
    const place = new Map(steps.map((step, i) => [step, i]));
    const spreadOut = (curve, values) => {
      if (curve.step.length === steps.length) return values;
      const column = new Array(steps.length).fill(null);
      curve.step.forEach((step, i) => { column[place.get(step)] = values[i]; });
      return column;
    };
    const data = [steps], kinds = [];
    const single = found.length === 1;
    found.forEach(({ curve, spread }, i) => {
      const mean = curve.mean;
      if (single && spread && spread.mean.length === mean.length && mean.length) {
        data.push(mean.map((value, k) => value + spread.mean[k]), mean.map((value, k) => value - spread.mean[k]));
        kinds.push({ kind: "high", i }, { kind: "low", i });
      } else if (single && curve.max) {
        data.push(curve.max, curve.min);
        kinds.push({ kind: "high", i }, { kind: "low", i });
      }
      if (weight && single) { data.push(mean); kinds.push({ kind: "raw", i }); }
      data.push(spreadOut(curve, smooth(mean, weight)));
      kinds.push({ kind: "line", i });
    });
    return { data, kinds };
  }

  options(kinds, data) {
    const text = css("--quiet"), grid = css("--grid");
    const log = this.board.settings.log;
    const positive = data.slice(1).every((column) => column.every((value) => value === null || value > 0));
    const axis = { stroke: text, grid: { stroke: grid, width: 1 }, ticks: { show: false }, font: "11px system-ui, sans-serif" };
    const high = kinds.findIndex(({ kind }) => kind === "high");
    const hue = (i) => css(HUES[i % HUES.length]);
    return {
      width: this.width(), height: 168,
      legend: { show: false },
      cursor: { sync: { key: "steps" }, y: false, drag: { x: true, y: false, setScale: false }, points: { size: 6 } },
      select: { show: true },
      scales: { x: { time: false }, y: { range: log ? undefined : span, ...(log ? (positive ? { distr: 3 } : { distr: 4, asinh: 0.01 }) : {}) } },
      axes: [
        { ...axis, size: 26, gap: 4, incrs: WHOLE },
        { ...axis, size: 52, gap: 4, values: (_, ticks) => ticks.map((tick) => (tick === null ? "" : number(tick))) },
      ],
      bands: high < 0 ? [] : [{ series: [high + 1, high + 2], fill: `color-mix(in srgb, ${hue(0)} 18%, transparent)` }],
      series: [{}, ...kinds.map(({ kind, i }) => ({
        stroke: kind === "line" ? hue(i) : kind === "raw" ? `color-mix(in srgb, ${hue(i)} 35%, transparent)` : "transparent",
        width: kind === "line" ? 1.6 : 1,
        spanGaps: true,
        points: { show: kind === "line" && data[0].length < 40, size: 4, fill: hue(i) },
      }))],
      hooks: {
        setSelect: [(plot) => {
          if (plot.select.width < 4) return;
          this.board.zoom(plot.posToVal(plot.select.left, "x"), plot.posToVal(plot.select.left + plot.select.width, "x"));
        }],
        setCursor: [(plot) => this.point(plot.cursor.idx)],
        draw: [(plot) => this.drawMarks(plot)],
        ready: [(plot) => plot.over.addEventListener("dblclick", () => this.board.zoom(null))],
      },
    };
  }

  width() { return Math.max(160, this.plotted.clientWidth); }

  resize() { if (this.plot && !this.plotted.hidden) this.plot.setSize({ width: this.width(), height: 168 }); }

  /** Faults and starts as lines across the curve. */
  drawMarks(plot) {
    const { ctx, bbox } = plot;
    ctx.save();
    for (const { step, level } of this.board.marks) {
      const x = plot.valToPos(step, "x", true);
      if (x < bbox.left || x > bbox.left + bbox.width) continue;
      ctx.strokeStyle = css(level === "fault" ? "--bad" : "--quiet");
      ctx.globalAlpha = level === "fault" ? 0.75 : 0.45;
      ctx.lineWidth = devicePixelRatio;
      ctx.setLineDash(level === "fault" ? [] : [3 * devicePixelRatio, 3 * devicePixelRatio]);
      ctx.beginPath();
      ctx.moveTo(x, bbox.top);
      ctx.lineTo(x, bbox.top + bbox.height);
      ctx.stroke();
    }
    ctx.restore();
  }

  point(index) {
    if (index === null || index === undefined || !this.plot) { this.say(this.series()); return; }
    const step = this.plot.data[0][index];
    const values = this.series().map(({ one, curve }) => {
      const at = curve?.step.indexOf(step) ?? -1;
      return at < 0 ? null : (this.description.series.length > 1 ? `${one.label} ` : "") + number(curve.mean[at]);
    });
    fill(this.now, h("span", { class: "quiet" }, `step ${step} `), values.filter(Boolean).join("  "));
  }

  say(found) {
    const lasts = found.map(({ one, curve }) => (curve?.mean.length ? `${found.length > 1 ? `${one.label} ` : ""}${number(curve.mean.at(-1))}` : null)).filter(Boolean);
    fill(this.now, found.length > 3 ? "" : lasts.join("  ") || "no values");
    const words = found.map(({ one, curve }) => {
      if (!curve?.mean.length) return `${one.label ?? one.metric}: no values`;
      const low = Math.min(...(curve.min ?? curve.mean)), high = Math.max(...(curve.max ?? curve.mean));
      return `${one.label ?? one.metric}: ${number(curve.mean[0])} at step ${curve.step[0]}, ${number(curve.mean.at(-1))} at step ${curve.step.at(-1)}, lowest ${number(low)}, highest ${number(high)}`;
    });
    this.plotted.setAttribute("aria-label", `${this.description.title}. ${words.join("; ")}.`);
    this.plotted.dataset.points = String(Math.max(0, ...found.map(({ curve }) => curve?.step.length ?? 0)));
    this.plotted.dataset.last = String(Math.max(-1, ...found.map(({ curve }) => curve?.step.at(-1) ?? -1)));
  }

  tabulate(found) {
    const steps = [...new Set(found.flatMap(({ curve }) => curve.step))].sort((a, b) => a - b);
    const stride = Math.max(1, Math.ceil(steps.length / ROWS));
    const chosen = steps.filter((_, i) => (steps.length - 1 - i) % stride === 0);
    const rows = chosen.map((step) => [String(step), ...found.map(({ curve }) => { const at = curve.step.indexOf(step); return at < 0 ? "–" : number(curve.mean[at]); })]);
    fill(this.rows, table(this.description.title, ["step", ...found.map(({ one }) => one.label ?? one.metric)], rows, { numeric: [...Array(found.length + 1).keys()] }));
  }
}

/** The controls of a board: smoothing, scale, range of steps. */
export function controls(board) {
  const { settings } = board;
  const shown = h("output", {}, settings.smoothing.toFixed(2));
  const low = h("input", { type: "number", min: "0", placeholder: "first", "aria-label": "From step" });
  const high = h("input", { type: "number", min: "0", placeholder: "last", "aria-label": "To step" });
  const whole = h("button", { type: "button", class: "small", hidden: true, onclick: () => board.zoom(null) }, "whole run");
  let typed = false; // what stands in the fields is the user's then
  const ranged = () => {
    typed = true;
    const from = low.value === "" ? 0 : Number(low.value), to = high.value === "" ? board.steps : Number(high.value);
    if (low.value === "" && high.value === "") board.zoom(null);
    else if (to >= from) board.zoom(from, to);
    typed = false;
  };
  for (const input of [low, high]) {
    input.addEventListener("change", ranged);
    input.addEventListener("keydown", (event) => { if (event.key === "Enter") ranged(); });
  }
  const before = board.zoomed;
  board.zoomed = (range) => {
    if (!typed) { low.value = range ? range[0] : ""; high.value = range ? range[1] : ""; }
    whole.hidden = !range;
    before?.(range);
  };
  return h("div", { class: "controls", role: "group", "aria-label": "Curves" },
    h("label", {}, "Smoothing ", h("input", {
      type: "range", min: "0", max: "0.98", step: "0.02", value: settings.smoothing,
      oninput: (event) => { settings.smoothing = Number(event.target.value); shown.textContent = settings.smoothing.toFixed(2); settings.keep(); board.redraw(); },
    }), shown),
    h("label", {}, h("input", {
      type: "checkbox", checked: settings.log,
      onchange: (event) => { settings.log = event.target.checked; settings.keep(); board.redraw(); },
    }), " log scale"),
    h("span", { class: "range" }, "Steps ", low, " to ", high, " ", whole),
    h("span", { class: "quiet hint" }, "drag over a curve to zoom, double-click for the whole run"));
}

/** As many bars as a finger can tell apart in `element`: 26 pixels each. */
export function barsIn(element) { return Math.max(6, Math.min(40, Math.floor(element.clientWidth / 26))); }

/** Bars of a histogram; each is a link made by `link(low, high)`. */
export function bars(found, title, link) {
  if (!found.count) return h("p", { class: "quiet" }, found.failed ? `no value; ${number(found.failed)} failed` : "no value yet");
  const most = Math.max(...found.counts);
  const items = found.counts.map((count, i) => {
    const low = found.edges[i], high = found.edges[i + 1], last = i === found.counts.length - 1;
    const said = `${number(low)} to ${number(high)}: ${number(count)} samples`;
    const bar = h("a", { class: "bar", href: link(low, last ? null : high), title: said, "aria-label": `${title} ${said}` }, h("i", {}));
    bar.firstChild.style.height = `${count ? Math.max(2, (100 * count) / most) : 0}%`;
    if (!count) { bar.removeAttribute("href"); bar.setAttribute("aria-hidden", "true"); bar.removeAttribute("aria-label"); }
    return bar;
  });
  return h("div", { class: "histogram" },
    append(h("div", { class: "bars", role: "group", "aria-label": `Histogram of ${title}: each bar opens its samples` }), items),
    h("div", { class: "edges quiet" }, h("span", {}, number(found.min)), h("span", {}, `mean ${number(found.mean)} · std ${number(found.std)} · ${number(found.count)} samples${found.failed ? ` · ${number(found.failed)} failed` : ""}`), h("span", {}, number(found.max))));
}
