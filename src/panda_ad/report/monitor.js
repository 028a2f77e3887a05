"use strict";
// Drift report: score histogram, share of alarms, and a dot plot per figure against the calibration images' band.

const data = JSON.parse(document.getElementById("data").textContent);
const still = { drag: { x: false, y: false, setScale: false }, points: { show: false } };

function bars(element) {
  const bins = 40, all = [...data.calibration, ...data.scores];
  const scale = scoreAxis(all, bins, data.calibration);
  const share = values => {
    const counts = new Array(bins).fill(0);
    for (const v of values) counts[Math.min(bins - 1, Math.floor(scale.toBin(v)))] += 1 / values.length;
    return [...counts, 0];
  };
  plot(element, {
    height: 240, padding: [8, 10, 0, 0], cursor: still,
    scales: { x: { time: false, range: [0, bins] }, y: { range: (_, low, high) => [0, high * 1.05] } },
    axes: [
      axis({ size: 34, label: scale.label, splits: () => scale.ticks.map(scale.toBin), values: (_, at) => at.map(x => number(scale.toScore(x))) }),
      axis({ size: 44, values: (_, at) => at.map(percent) }),
    ],
    series: [
      {},
      { stroke: () => css("--calibration"), fill: () => css("--rule"), width: 1, paths: uPlot.paths.stepped({ align: 1 }), points: { show: false } },
      { stroke: () => css("--accent"), width: 2, paths: uPlot.paths.stepped({ align: 1 }), points: { show: false } },
    ],
    hooks: { draw: [u => {
      const x = Math.round(u.valToPos(scale.toBin(data.threshold), "x", true));
      u.ctx.fillStyle = css("--ink");
      u.ctx.fillRect(x - 1, u.bbox.top, 2, u.bbox.height);
    }] },
  }, [Array.from({ length: bins + 1 }, (_, i) => i), share(data.calibration), share(data.scores)]);
}

function alarms(element) {
  const x = data.alarms.map(a => a.until);
  plot(element, {
    height: 240, padding: [8, 10, 0, 0], cursor: still,
    scales: { x: { time: false, range: [0, data.scores.length] }, y: { range: (_, low, high) => [0, Math.min(1, Math.max(4 * data.rate, high * 1.1))] } },
    axes: [axis({ size: 34, label: "image" }), axis({ size: 44, values: (_, at) => at.map(percent) })],
    series: [
      {},
      { stroke: () => css("--bad"), width: 2, points: { show: true, size: 6 } },
      { stroke: () => css("--muted"), width: 1, dash: [4, 4], points: { show: false } },
    ],
  }, [[0, ...x], [null, ...data.alarms.map(a => a.share)], [data.rate, ...x.map(() => data.rate)]]);
}

function dots(name, figure) {
  const element = document.getElementById(name), readout = document.getElementById(`${name}-readout`);
  const rest = readout.textContent;
  const scale = scoreAxis([...figure.values, ...figure.band], 1, name === "score" ? data.calibration : []); // logarithmic where scores span orders of magnitude
  const band = u => {
    const at = v => u.valToPos(scale.toBin(v), "y", true), { left, width } = u.bbox, [low, middle, high] = figure.band;
    u.ctx.save();
    u.ctx.fillStyle = css("--rule");
    u.ctx.fillRect(left, at(high), width, Math.max(1, at(low) - at(high)));
    u.ctx.fillStyle = css("--muted");
    u.ctx.fillRect(left, Math.round(at(middle)), width, 1);
    u.ctx.restore();
  };
  plot(element, {
    height: 200, padding: [8, 10, 0, 0], cursor: still,
    scales: { x: { time: false, range: [0, figure.values.length + 1] }, y: { range: [-0.05, 1.05] } },
    axes: [axis({ size: 22 }), axis({ size: 48, splits: () => scale.ticks.map(scale.toBin), values: () => scale.ticks.map(number) })],
    series: [{}, { stroke: () => css("--accent"), paths: () => null, points: { show: true, size: 4, fill: () => css("--accent") } }],
    hooks: {
      drawClear: [band],
      setCursor: [v => {
        const i = v.cursor.idx;
        readout.textContent = i === null || i === undefined ? rest : `${number(figure.values[i])} · ${data.times[i]} · ${data.paths[i]}`;
      }],
    },
  }, [figure.values.map((_, i) => i + 1), figure.values.map(scale.toBin)]);
}

bars(document.getElementById("histogram"));
alarms(document.getElementById("alarms"));
for (const [name, figure] of Object.entries(data.figures)) dots(name, figure);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redrawPlots);
