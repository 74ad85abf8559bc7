// Prometheus' text format, and what two scrapes tell of the time between them.

const PREFIX = "dsc_serve_";
const LINE = /^([A-Za-z_:][\w:]*)(?:\{(.*)\})? (\S+)(?: -?\d+)?$/;
const LABEL = /(\w+)="((?:[^"\\]|\\.)*)"/g;

/** The server's own series: name without its prefix → Map of labels as they stand → {labels, value}. */
export function parse(text) {
  const families = new Map();
  for (const line of text.split("\n")) {
    if (!line.startsWith(PREFIX)) continue;
    const found = LINE.exec(line);
    if (!found) continue;
    const [, name, labels = "", value] = found;
    const short = name.slice(PREFIX.length);
    if (!families.has(short)) families.set(short, new Map());
    const pairs = [...labels.matchAll(LABEL)].map(([, label, content]) => [label, content]);
    families.get(short).set(labels, { labels: Object.fromEntries(pairs), value: Number(value) });
  }
  return families;
}

/** The sum of a family's series that `fits`; null where there are none. */
export function sum(families, name, fits = () => true) {
  const series = [...(families.get(name)?.values() ?? [])].filter(({ labels }) => fits(labels));
  return series.length ? series.reduce((total, { value }) => total + value, 0) : null;
}

/** What counters grew by; one that fell began anew. Null where either scrape has none of them. */
export function increase(before, after, name, fits = () => true) {
  const [old, now] = [before.get(name), after.get(name)];
  if (!old || !now) return null;
  let total = 0;
  for (const [key, { labels, value }] of now) {
    const earlier = old.get(key);
    if (earlier && fits(labels)) total += value >= earlier.value ? value - earlier.value : value;
  }
  return total;
}

/** Quantiles of what a histogram observed between two scrapes, as Prometheus interpolates; nulls: it was nothing. */
export function quantiles(before, after, name, wanted) {
  const bucket = `${name}_bucket`;
  const edges = [...new Set([...(after.get(bucket)?.values() ?? [])].map(({ labels }) => labels.le))]
    .map((le) => ({ le, edge: le === "+Inf" ? Infinity : Number(le) }))
    .sort((a, b) => a.edge - b.edge);
  const counts = edges.map(({ le }) => increase(before, after, bucket, (labels) => labels.le === le) ?? 0);
  const all = counts.at(-1) ?? 0;
  return wanted.map((share) => {
    if (!(all > 0)) return null;
    const rank = share * all;
    const i = counts.findIndex((count) => count >= rank);
    const low = i > 0 ? edges[i - 1].edge : 0;
    if (edges[i].edge === Infinity) return low;
    const below = i > 0 ? counts[i - 1] : 0;
    return low + ((edges[i].edge - low) * (rank - below)) / (counts[i] - below || 1);
  });
}
