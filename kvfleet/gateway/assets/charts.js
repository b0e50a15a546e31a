// Charts of rates: differences between totals, over a window that slides.
const KEEP = 300;
const WINDOW = 10;
const seen = []; // [{at, series}], the newest last

function difference(newer, older) {
  return { sum: newer.sum - older.sum, count: newer.count - older.count,
    buckets: newer.buckets.map(([le, n], i) => [le, n - (older.buckets[i]?.[1] ?? 0)]) };
}
const mean = (h) => (h.count > 0 ? (h.sum / h.count) * 1000 : null);
function quantile(h, q) {
  // As Prometheus does: linear within the bucket; nothing is known beyond the last bound.
  if (h.count <= 0) return null;
  const wanted = q * h.count;
  let low = 0, below = 0;
  for (const [le, n] of h.buckets) {
    if (n >= wanted) return (le === null ? low : low + ((le - low) * (wanted - below)) / Math.max(n - below, 1e-9)) * 1000;
    [low, below] = [le ?? low, n];
  }
  return low * 1000;
}

const CHARTS = [
  { title: "Requests", unit: (v) => compact(v) + "/s", of: (d, s) => [d.requests / s] },
  { title: "Errors", unit: (v) => compact(v) + "/s", of: (d, s) => [d.errors / s] },
  { title: "Latency", unit: duration, names: ["mean", "95 %"], of: (d) => [mean(d.latency), quantile(d.latency, 0.95)] },
  { title: "First byte", unit: duration, names: ["mean", "95 %"], of: (d) => [mean(d.ttfb), quantile(d.ttfb, 0.95)] },
  { title: "Tokens", unit: (v) => compact(v) + "/s", names: ["prompt", "answer"],
    of: (d, s) => [d.tokens.prompt / s, d.tokens.completion / s] },
];
const points = CHARTS.map(() => []);

function remember(series, at) {
  if (seen.length && series.requests < seen.at(-1).series.requests) {
    seen.length = 0; // the gateway began anew
    points.forEach((list) => { list.length = 0; });
  }
  seen.push({ at, series });
  while (seen.length > 2 && at - seen[0].at > WINDOW * 1000) seen.shift();
  const older = seen[0], seconds = (at - older.at) / 1000;
  if (seconds < 0.5) return;
  const d = { requests: series.requests - older.series.requests, errors: series.errors - older.series.errors,
    latency: difference(series.latency, older.series.latency), ttfb: difference(series.ttfb, older.series.ttfb),
    tokens: Object.fromEntries(Object.entries(series.tokens).map(([k, n]) => [k, n - older.series.tokens[k]])) };
  CHARTS.forEach((chart, i) => {
    points[i].push({ at, values: chart.of(d, seconds) });
    while (points[i].length > KEEP) points[i].shift();
  });
}

function curve(list, index, top, from, until) {
  // A gap stands where nothing is known.
  let path = "", isDown = false;
  for (const { at, values } of list) {
    const value = values[index];
    if (value === null || value === undefined) { isDown = false; continue; }
    const x = ((at - from) / Math.max(until - from, 1)) * 100, y = 40 - (value / top) * 38;
    path += `${isDown ? "L" : "M"}${x.toFixed(2)} ${y.toFixed(2)}`;
    isDown = true;
  }
  return path;
}

function drawCharts() {
  put(byId("charts"), ...CHARTS.map((chart, i) => {
    const list = points[i];
    const known = list.flatMap(({ values }) => values).filter((v) => v !== null && v !== undefined);
    const top = Math.max(...known, 1e-9), now = list.at(-1)?.values || [];
    const until = list.at(-1)?.at ?? 0, from = Math.min(list[0]?.at ?? 0, until - 30000);
    const said = (v) => (v === null || v === undefined ? "–" : chart.unit(v));
    const names = chart.names || [""];
    const spoken = names.map((name, n) => `${name} ${said(now[n])}`.trim()).join(", ");
    const legend = names.map((name, n) =>
      make(n ? "span.key.second" : name ? "span.key" : "span", {}, name ? name + " " : "", make("b", {}, said(now[n]))));
    const label = `${chart.title}, now ${spoken}; most ${known.length ? chart.unit(Math.max(...known)) : "–"}`;
    return make("figure.chart", {},
      make("figcaption", {}, make("span.soft", {}, chart.title), legend),
      make("svg", { viewBox: "0 0 100 40", preserveAspectRatio: "none", role: "img", "aria-label": label },
        make("line.grid", { x1: 0, x2: 100, y1: 40, y2: 40 }), make("line.grid", { x1: 0, x2: 100, y1: 2, y2: 2 }),
        names.map((_, n) => make(n ? "path.curve.second" : "path.curve", { d: curve(list, n, top, from, until) }))),
      make("div.ends", {}, make("span", {}, list.length ? span((until - from) / 1000) + " ago" : ""),
        make("span", {}, known.length ? "most " + chart.unit(Math.max(...known)) : "")));
  }));
}
