"use strict";
// The page's one state is the threshold: `model.set` moves it, everything else follows. An image is anomalous when score > threshold.

(() => {
  const byId = id => document.getElementById(id);
  const data = JSON.parse(byId("data").textContent);
  const ascending = values => [...values].sort((a, b) => a - b);
  const model = { ...data, threshold: 0, own: data.threshold };
  model.sorted = ascending(data.scores);
  model.good = ascending(data.scores.filter((_, i) => !data.labels[i]));
  model.bad = ascending(data.scores.filter((_, i) => data.labels[i]));

  // Kinds get a color each; past the palette the rarest share the last one.
  const PALETTE = 9;
  const sizes = data.kinds.map((_, k) => data.kind.filter(other => other === k).length);
  const anomalous = data.kinds.map((_, k) => k).filter(k => data.labels[data.kind.indexOf(k)]);
  const common = new Set([...anomalous].sort((a, b) => sizes[b] - sizes[a]).slice(0, anomalous.length > PALETTE ? PALETTE - 1 : PALETTE));
  model.groups = [];
  const groupOfKind = new Map();
  const group = (name, color, label) => model.groups.push({ name, color, label, scores: [] }) - 1;
  data.kinds.forEach((kind, k) => { if (!anomalous.includes(k)) groupOfKind.set(k, group(kind, "--good", 0)); });
  [...common].sort((a, b) => a - b).forEach((k, i) => groupOfKind.set(k, group(data.kinds[k], `--kind-${i}`, 1)));
  const rest = anomalous.filter(k => !common.has(k));
  if (rest.length) {
    const other = group(`${rest.length} other kinds`, `--kind-${PALETTE - 1}`, 1);
    rest.forEach(k => groupOfKind.set(k, other));
  }
  model.groupOf = data.kind.map(k => groupOfKind.get(k));
  data.scores.forEach((s, i) => model.groups[model.groupOf[i]].scores.push(s));
  model.groups.forEach(g => g.scores.sort((a, b) => a - b));

  // Slider positions are ranks: one for each distinct score of test and calibration, so that a long tail takes no room.
  const distinct = new Set([...data.scores, ...data.calibration]);
  if (model.own !== null) distinct.add(model.own);
  if (!distinct.size) distinct.add(0);
  model.candidates = ascending(distinct);
  const lowest = model.candidates[0];
  model.candidates.unshift(lowest - Math.max(1e-9, Math.abs(lowest) * 1e-6)); // below all: everything raises an alarm

  const slider = byId("slider"), budget = byId("budget");
  slider.max = model.candidates.length - 1;
  const m = data.calibration.length;
  let pending = 0, note = "";

  // Conformal: with k of m calibration scores above the threshold, at most (k + 1) / (m + 1) of good parts raise an alarm.
  function promise() {
    const k = countAbove(model.calibration, model.threshold);
    if (!m) return "No calibration images: nothing can be promised about false alarms.";
    const [low, high] = data.rates[k];
    return `${whole(k)} of ${counted(m, "calibration image", "calibration images")} would raise an alarm: expect at most ${percent((k + 1) / (m + 1))} false alarms (1 in ${whole(Math.floor((m + 1) / (k + 1)))} good parts); ` +
      `the true rate lies between ${percent(low)} and ${percent(high)} with ${percent(data.confidence)} confidence.`;
  }

  // What to write down to get this threshold from the calibration, which knows its own scores only: verdict.false_alarm_rate.
  function carryOver() {
    const k = countAbove(model.calibration, model.threshold), rate = (k + 1) / (m + 1);
    if (!m || k === m) return { line: "", command: "", why: m ? "No false-alarm rate gives a threshold below all calibration scores." : "Without calibration images no false-alarm rate gives this threshold." };
    const digits = m < 5000 ? 4 : 6, value = (Math.ceil(rate * 10 ** digits - 1e-7) / 10 ** digits).toFixed(digits).replace(/0+$/, "");
    const nearest = model.calibration[m - 1 - k], same = (scores, t) => countAbove(scores, t) === countAbove(scores, model.threshold);
    const why = same(model.good, nearest) && same(model.bad, nearest) ? "" :
      `The calibration’s nearest threshold is ${number(nearest)}: ${counted(countAbove(model.good, nearest), "false alarm", "false alarms")} and ${counted(model.bad.length - countAbove(model.bad, nearest), "miss", "misses")} on the test images.`;
    return { line: `false_alarm_rate: ${value}`, command: `panda-ad score FOLDER --bundle ${data.bundle} --false-alarm-rate ${value}`, why };
  }

  function mistakes() {
    const rows = data.scores.map((score, row) => ({ score, row, label: data.labels[row], path: data.paths[row], kind: data.kinds[data.kind[row]] }));
    const wrong = rows.filter(({ score, label }) => (score > model.threshold) !== (label === 1)).sort((a, b) => b.label - a.label || (a.path < b.path ? -1 : 1));
    return wrong.map(({ label, kind, score, path }) => [label ? "miss" : "false alarm", kind, number(score), path].join("\t")).join("\n");
  }

  function update() {
    const falseAlarms = countAbove(model.good, model.threshold), caught = countAbove(model.bad, model.threshold);
    const misses = model.bad.length - caught;
    const rate = (a, b) => (b ? (a / b).toFixed(3) : "–");
    const { line, command, why } = carryOver();
    const texts = {
      "threshold-value": number(model.threshold), "false-alarms": whole(falseAlarms), misses: whole(misses),
      "false-alarms-name": falseAlarms === 1 ? "False alarm" : "False alarms", "misses-name": misses === 1 ? "Miss" : "Misses",
      precision: rate(caught, caught + falseAlarms), recall: rate(caught, model.bad.length),
      "cell-passed": whole(model.good.length - falseAlarms), "cell-false-alarms": whole(falseAlarms), "cell-misses": whole(misses), "cell-caught": whole(caught),
      promise: note || promise(), "carry-line": line, "carry-command": command, "carry-why": why,
      "mistakes-title": `${counted(misses, "miss", "misses")} and ${counted(falseAlarms, "false alarm", "false alarms")} as a list`,
    };
    for (const [id, text] of Object.entries(texts)) byId(id).textContent = text;
    byId("carry").hidden = !line;
    byId("mistakes").value = mistakes();
    byId("cell-misses").classList.toggle("bad", misses > 0);
    byId("cell-false-alarms").classList.toggle("bad", falseAlarms > 0);
    const spoken = `${counted(falseAlarms, "false alarm", "false alarms")} of ${whole(model.good.length)} good, ${counted(misses, "miss", "misses")} of ${whole(model.bad.length)} defective`;
    slider.setAttribute("aria-valuetext", `score ${number(model.threshold)}: ${spoken}`);
    if (document.activeElement !== budget && m) {
      const kept = Math.floor((m + 1) / (countAbove(model.calibration, model.threshold) + 1)); // what this threshold really promises
      budget.value = model.threshold === model.own && Number(budget.defaultValue) <= kept ? budget.defaultValue : kept;
    }
    for (const cell of document.querySelectorAll("[data-caught]")) {
      const kind = data.kinds.indexOf(cell.dataset.caught);
      const count = data.scores.filter((s, i) => data.kind[i] === kind && s > model.threshold).length;
      cell.firstChild.textContent = `${whole(count)} `;
    }
    byId("reset").disabled = model.threshold === (model.own ?? model.candidates.at(-1));
    followers.forEach(follow => follow());
    clearTimeout(pending);
    pending = setTimeout(() => { byId("summary").textContent = spoken; gallery.refresh(); }, 120);
  }

  function setIndex(index, why = "") {
    note = why;
    slider.value = index;
    model.threshold = model.candidates[index];
    update();
  }
  model.set = (value, why = "") => setIndex(Math.max(0, upperBound(model.candidates, value) - 1), why); // the same partition as `value`

  slider.addEventListener("input", () => setIndex(Number(slider.value)));
  budget.addEventListener("input", () => {
    const n = Number(budget.value);
    if (!m || !(n >= 1)) return;
    const l = Math.floor((m + 1) / n + 1e-9); // the l-th largest calibration score keeps the budget
    if (l > m) setIndex(0);
    else if (l >= 1) model.set(model.calibration[m - l]);
    else model.set(model.calibration[m - 1], `${m} calibration images can promise 1 in ${m + 1} at best; 1 in ${number(n)} needs at least ${Math.ceil(n) - 1}. Set to the highest calibration score.`);
  });
  // By selection: the clipboard's own interface is closed to sandboxed frames, as MLflow's are.
  function copy(element, button) {
    const text = element.value ?? element.textContent, area = make("textarea", { class: "hidden", "aria-hidden": "true" });
    area.value = text;
    button.after(area);
    area.select();
    button.textContent = document.execCommand("copy") ? "Copied" : "Select and copy";
    area.remove();
    button.focus();
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  }

  const reset = () => (model.own === null ? setIndex(model.candidates.length - 1) : model.set(model.own));
  byId("reset").addEventListener("click", reset);
  byId("bar").addEventListener("submit", event => event.preventDefault());

  for (const button of document.querySelectorAll("[data-copy]")) button.addEventListener("click", () => copy(byId(button.dataset.copy), button));

  const gallery = makeGallery(model);
  model.threshold = model.own ?? model.candidates.at(-1);
  const followers = [histogram(byId("histogram"), model), curves(model)];
  reset();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redrawPlots);
  document.documentElement.classList.add("ready");
})();
