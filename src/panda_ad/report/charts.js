"use strict";
// Charts: histogram rows, ROC, precision-recall. Each takes the page's model and returns what must follow the threshold.

const css = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const make = (tag, attributes = {}, ...children) => {
  const element = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "text") element.textContent = value;
    else if (key === "class") element.className = value;
    else element.setAttribute(key, value);
  }
  element.append(...children);
  return element;
};
const SVG = "http://www.w3.org/2000/svg";
const number = value => new Intl.NumberFormat("en", { maximumSignificantDigits: 4 }).format(value);
const whole = value => new Intl.NumberFormat("en").format(value);
const counted = (n, one, many) => `${whole(n)} ${n === 1 ? one : many}`;
const percent = value => `${new Intl.NumberFormat("en", { maximumSignificantDigits: 3 }).format(100 * value)}\u00a0%`;

// First index of ascending `sorted` whose value is above v: so many values are <= v.
function upperBound(sorted, v) {
  let low = 0, high = sorted.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (sorted[middle] <= v) low = middle + 1; else high = middle;
  }
  return low;
}
const countAbove = (sorted, v) => sorted.length - upperBound(sorted, v);

const plots = [];
function plot(element, options, data) {
  const height = options.height;
  const width = () => Math.max(80, Math.floor(element.clientWidth));
  const u = new uPlot({ legend: { show: false }, ...options, width: width() }, data, element);
  new ResizeObserver(() => { if (u.width !== width()) u.setSize({ width: width(), height }); }).observe(element);
  plots.push(u);
  return u;
}
const redrawPlots = () => plots.forEach(u => u.redraw());

// Paper is as wide whatever the window: half a page for each chart, in light colors.
const PRINTED = { width: 340, height: 260 };
addEventListener("beforeprint", () => {
  document.documentElement.classList.add("printing");
  plots.forEach(u => { u.onScreen = { width: u.width, height: u.height }; u.setSize(PRINTED); });
});
addEventListener("afterprint", () => {
  document.documentElement.classList.remove("printing");
  plots.forEach(u => u.setSize(u.onScreen));
});

const axis = extra => ({
  stroke: () => css("--muted"), font: "11px " + css("--font"), labelFont: "11px " + css("--font"), labelSize: 16, labelGap: 0,
  grid: { stroke: () => css("--rule"), width: 1 }, ticks: { show: false }, ...extra,
});

// One axis for all rows, in bins: logarithmic where the scores span more than a factor of 30; where some are negative, linear
// around zero and logarithmic beyond (asinh of v / unit) from 30 units on, the unit being what normal scores are like.
function scoreAxis(values, bins, normal = []) {
  let low = Infinity, high = -Infinity;
  for (const v of values) { if (v < low) low = v; if (v > high) high = v; }
  const unit = [...normal].map(Math.abs).sort((v, w) => v - w)[normal.length >> 1] || 0;
  const log = low > 0 && high / low > 30;
  const both = low <= 0 && unit > 0 && high - low > 30 * unit;
  const f = log ? Math.log10 : both ? v => Math.asinh(v / unit) : v => v;
  let a = f(low), b = f(high);
  const pad = b > a ? (b - a) * 0.02 : Math.abs(a) * 0.01 + 0.5;
  a -= pad; b += pad;
  const toBin = v => (log && v <= 0 ? 0 : Math.min(bins, Math.max(0, ((f(v) - a) / (b - a)) * bins)));
  const toScore = x => { const s = a + (x / bins) * (b - a); return log ? 10 ** s : both ? unit * Math.sinh(s) : s; };
  const ticks = [];
  if (log) {
    const steps = b - a > 3 ? [1] : [1, 2, 5];
    for (let e = Math.floor(a); e <= b; e++) for (const s of steps) ticks.push(s * 10 ** e);
  } else if (both) {
    const first = Math.floor(Math.log10(unit)), last = Math.log10(Math.max(high, -low));
    const steps = last - first > 2 ? [1] : [1, 2, 5];
    ticks.push(0);
    for (let e = first; e <= last; e++) for (const s of steps) if (s * 10 ** e >= 0.8 * unit) ticks.push(s * 10 ** e, -s * 10 ** e);
    ticks.sort((v, w) => v - w);
  } else {
    const raw = (b - a) / 6, unit = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 5, 10].map(s => s * unit).find(s => s >= raw);
    for (let i = Math.ceil(a / step); i * step <= b; i++) ticks.push(i * step + 0); // + 0: never -0
  }
  return { label: log ? "score (logarithmic)" : both ? "score (logarithmic away from 0)" : "score", toBin, toScore, ticks: ticks.filter(t => f(t) >= a && f(t) <= b) };
}

// Rows of bars as SVG, stretched to any width, so that a page prints as wide as its paper; the threshold is a custom property.
function histogram(element, model) {
  const bins = 56;
  const scale = scoreAxis([...model.sorted, ...model.calibration], bins, model.calibration);
  const groups = [...model.groups];
  if (model.calibration.length) groups.unshift({ name: "calibration", color: "--calibration", scores: model.calibration, label: 0 });
  const at = score => `${(100 * scale.toBin(score)) / bins}%`;
  const rows = groups.map(group => {
    const name = make("span", { class: "kind" }, make("i", { class: "swatch" }), make("span", { text: group.name, title: group.name }));
    name.firstChild.style.setProperty("--swatch", `var(${group.color})`);
    const chart = make("div", { class: "row-chart", role: "img" }, rowBars(group, scale, bins));
    const count = make("span", { class: "row-count" });
    element.append(name, chart, count);
    const pick = event => {
      const box = chart.getBoundingClientRect();
      model.set(scale.toScore((bins * (event.clientX - box.left)) / box.width));
    };
    chart.addEventListener("pointerdown", event => { chart.setPointerCapture(event.pointerId); pick(event); });
    chart.addEventListener("pointermove", event => { if (event.buttons & 1) pick(event); });
    return { group, chart, count };
  });
  const ruler = make("div", { class: "ruler", "aria-hidden": "true" }, make("span", { class: "ruler-label", text: scale.label }));
  for (const tick of scale.ticks) {
    const mark = make("span", { class: "tick", text: number(tick) });
    mark.style.left = at(tick);
    ruler.append(mark);
  }
  element.append(ruler);
  return () => {
    element.style.setProperty("--at", at(model.threshold));
    for (const { group, chart, count } of rows) {
      const above = countAbove(group.scores, model.threshold), n = group.scores.length;
      const what = group.label ? "caught" : above === 1 ? "false alarm" : "false alarms";
      count.replaceChildren(make("b", { text: whole(above) }), ` of ${whole(n)} `, make("span", { text: what }));
      chart.setAttribute("aria-label", `${group.name}: scores ${number(group.scores[0])} to ${number(group.scores[n - 1])}; ${whole(above)} of ${whole(n)} ${what}`);
    }
  };
}

function rowBars(group, scale, bins) {
  const counts = new Array(bins).fill(0);
  for (const s of group.scores) counts[Math.min(bins - 1, Math.floor(scale.toBin(s)))]++;
  const most = Math.max(1, ...counts), svg = document.createElementNS(SVG, "svg"), path = document.createElementNS(SVG, "path");
  svg.setAttribute("viewBox", `0 0 ${bins} 100`);
  svg.setAttribute("preserveAspectRatio", "none");
  path.setAttribute("d", counts.map((n, x) => (n ? `M${x + 0.07} 100v${(-94 * n) / most}h.86V100z` : "")).join(""));
  path.style.fill = `var(${group.color})`;
  svg.append(path);
  return svg;
}

// Operating points from 'nothing raises an alarm' down: one for each distinct test score.
function operatingPoints(model) {
  const points = [{ t: model.sorted[model.sorted.length - 1], fp: 0, tp: 0 }];
  const thresholds = [...new Set(model.sorted)].reverse();
  thresholds.forEach((_, i) => {
    const t = i + 1 < thresholds.length ? thresholds[i + 1] : model.candidates[0];
    points.push({ t, fp: countAbove(model.good, t), tp: countAbove(model.bad, t) });
  });
  return points;
}

const unit = { time: false, range: [0, 1] };
function curveChart(element, readout, model, spec) {
  const at = t => spec.point(countAbove(model.good, t), countAbove(model.bad, t));
  const dot = (u, [x, y], fill, size) => {
    const { ctx } = u, ratio = devicePixelRatio;
    ctx.setLineDash([]);
    ctx.beginPath();
    ctx.arc(u.valToPos(x, "x", true), u.valToPos(y, "y", true), size * ratio, 0, 7);
    ctx.fillStyle = fill; ctx.fill();
    ctx.lineWidth = 2 * ratio; ctx.strokeStyle = css("--ink"); ctx.stroke();
  };
  const u = plot(element, {
    height: 280,
    padding: [8, 10, 0, 0],
    cursor: { drag: { x: false, y: false, setScale: false }, points: { show: false } },
    scales: { x: unit, y: unit },
    axes: [axis({ label: spec.x, size: 24, space: 50 }), axis({ label: spec.y, size: 34, space: 40 })],
    series: [
      {},
      { stroke: () => css("--accent"), width: 2, points: { show: false }, paths: uPlot.paths.linear() },
      { stroke: () => css("--muted"), width: 1, dash: [4, 4], points: { show: false }, spanGaps: true },
    ],
    hooks: { draw: [u => {
      u.ctx.save();
      if (model.own !== null) dot(u, at(model.own), css("--page"), 4);
      dot(u, at(model.threshold), css("--accent"), 5);
      u.ctx.restore();
    }] },
  }, spec.data);
  const nearest = event => {
    const box = u.over.getBoundingClientRect();
    const x = u.posToVal(event.clientX - box.left, "x"), y = u.posToVal(event.clientY - box.top, "y");
    let best = null, least = Infinity;
    for (const p of spec.points) {
      const [px, py] = spec.point(p.fp, p.tp);
      const d = (px - x) ** 2 + (py - y) ** 2;
      if (d < least) { least = d; best = p; }
    }
    return best;
  };
  const show = t => {
    const [x, y] = at(t);
    readout.textContent = spec.text(x, y);
  };
  u.over.addEventListener("pointermove", event => show(nearest(event).t));
  u.over.addEventListener("pointerleave", () => show(model.threshold));
  u.over.addEventListener("click", event => model.set(nearest(event).t));
  element.setAttribute("role", "img");
  return () => {
    show(model.threshold);
    element.setAttribute("aria-label", `${spec.name}; at the threshold ${readout.textContent}`);
    u.redraw();
  };
}

function curves(model) {
  const byId = id => document.getElementById(id);
  if (!model.good.length || !model.bad.length) {
    for (const id of ["roc", "pr"]) byId(id).replaceChildren(make("p", { class: "caption", text: "Needs good and defective test images." }));
    return () => {};
  }
  const points = operatingPoints(model), good = model.good.length, bad = model.bad.length;
  const roc = curveChart(byId("roc"), byId("roc-readout"), model, {
    name: "ROC curve", x: "false alarms, share of good", y: "caught, share of defective", points,
    point: (fp, tp) => [fp / good, tp / bad],
    text: (x, y) => `${percent(x)} false alarms, ${percent(y)} caught`,
    data: [points.map(p => p.fp / good), points.map(p => p.tp / bad), points.map(p => p.fp / good)],
  });
  // Average precision is the area of steps: precision p_i holds from recall r_(i-1) to r_i.
  const x = [], y = [];
  points.slice(1).forEach((p, i) => { const h = p.tp / (p.tp + p.fp); x.push(points[i].tp / bad, p.tp / bad); y.push(h, h); });
  const pr = curveChart(byId("pr"), byId("pr-readout"), model, {
    name: "Precision-recall curve", x: "recall", y: "precision", points: points.slice(1),
    point: (fp, tp) => [tp / bad, tp + fp ? tp / (tp + fp) : 1],
    text: (r, p) => `recall ${percent(r)}, precision ${percent(p)}`,
    data: [x, y, x.map(() => bad / (bad + good))],
  });
  return () => { roc(); pr(); };
}
