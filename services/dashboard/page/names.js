// What a metric is called and means: the project's vocabulary, sent along with the run, else the name itself.

let vocabulary = {};

export function learn(entries) { vocabulary = entries ?? {}; }

/** A chart of one run's metric, with the standard deviation around it where there is one. */
export function chartOf(run, name, names, more = {}) {
  const known = vocabulary[name] ?? {};
  const std = name.endsWith("/mean") ? name.replace(/mean$/, "std") : null;
  return {
    title: name, unit: known.unit ?? "", meaning: known.meaning ?? null,
    series: [{ run, metric: name, label: name, band: std && names.includes(std) ? std : null }],
    ...more,
  };
}

/** A chart of several metrics of a run that belong together. */
export function together(run, title, pairs, names) {
  const series = pairs.filter(([name]) => names.includes(name)).map(([metric, label]) => ({ run, metric, label }));
  const meaning = pairs.map(([name]) => vocabulary[name]?.meaning).find(Boolean);
  return { title, unit: vocabulary[pairs[0][0]]?.unit ?? "", meaning, series };
}
