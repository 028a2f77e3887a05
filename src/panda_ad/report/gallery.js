"use strict";
// The gallery of images and the viewer of one image.

const PAGE = 48;
const source = base64 => `data:image/jpeg;base64,${base64}`;

// Magma-like ramp; transparent where nothing stands out, so that the part below stays visible.
const HEAT = [[0, 20, 12, 60, 0], [0.25, 101, 21, 110, 90], [0.5, 183, 55, 84, 150], [0.75, 249, 142, 9, 190], [1, 252, 255, 164, 215]];
const RAMP = Array.from({ length: 256 }, (_, i) => {
  const v = i / 255, k = HEAT.findIndex(([at], j) => j > 0 && v <= at);
  const low = HEAT[k - 1], high = HEAT[k], w = (v - low[0]) / (high[0] - low[0]);
  return [1, 2, 3, 4].map(c => low[c] + w * (high[c] - low[c]));
});

function paintHeat(canvas, base64, opaque = false) {
  const picture = new Image();
  picture.onload = () => {
    canvas.width = picture.width;
    canvas.height = picture.height;
    const context = canvas.getContext("2d", { willReadFrequently: true });
    context.drawImage(picture, 0, 0);
    const pixels = context.getImageData(0, 0, canvas.width, canvas.height);
    for (let i = 0; i < pixels.data.length; i += 4) {
      const [r, g, b, a] = RAMP[pixels.data[i]];
      pixels.data[i] = r; pixels.data[i + 1] = g; pixels.data[i + 2] = b; pixels.data[i + 3] = opaque ? 255 : a;
    }
    context.putImageData(pixels, 0, 0);
  };
  picture.src = source(base64);
}

function paintScale(canvas) {
  const context = canvas.getContext("2d");
  for (let x = 0; x < canvas.width; x++) {
    const [r, g, b] = RAMP[Math.round((x / (canvas.width - 1)) * 255)];
    context.fillStyle = `rgb(${r},${g},${b})`;
    context.fillRect(x, 0, 1, canvas.height);
  }
}

function drawOutline(image) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", `0 0 ${image.outlineSize[0]} ${image.outlineSize[1]}`);
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("class", "outline");
  svg.setAttribute("aria-hidden", "true");
  for (const name of ["halo", "edge"]) {
    const path = document.createElementNS(SVG, "path");
    path.setAttribute("class", name);
    path.setAttribute("d", image.outline);
    svg.append(path);
  }
  return svg;
}

function picture(image, overlays, spot = false) {
  const frame = make("span", { class: "frame" }, make("img", { src: source(image.thumb), alt: "", width: image.width, height: image.height }));
  frame.style.setProperty("--ratio", `${image.width} / ${image.height}`);
  frame.style.setProperty("--natural", `${image.width / image.height}`);
  if (overlays && image.heat) {
    const canvas = make("canvas", { class: "heat", "aria-hidden": "true" });
    paintHeat(canvas, image.heat);
    frame.append(canvas);
  }
  if (overlays && image.outline) frame.append(drawOutline(image));
  if (spot && image.spot) frame.append(spotBox(image.spot.box));
  return frame;
}

// Where the full-resolution picture lies in the image.
function spotBox([x0, y0, x1, y1]) {
  const box = make("span", { class: "spot-box", "aria-hidden": "true" });
  Object.assign(box.style, { left: `${100 * x0}%`, top: `${100 * y0}%`, width: `${100 * (x1 - x0)}%`, height: `${100 * (y1 - y0)}%` });
  return box;
}

const VERDICTS = { "false-alarm": "False alarm", miss: "Miss", caught: "Caught", passed: "Passed" };

function makeGallery(model) {
  const byId = id => document.getElementById(id);
  const { images, normals } = model;
  const cards = byId("cards"), kindFilter = byId("filter-kind"), verdictFilter = byId("filter-verdict"), sort = byId("sort");
  const section = byId("images");
  let shown = [], limit = PAGE, viewed = -1;

  const verdict = row => {
    const alarm = model.scores[row] > model.threshold;
    return model.labels[row] ? (alarm ? "caught" : "miss") : alarm ? "false-alarm" : "passed";
  };
  const wrong = row => (model.scores[row] > model.threshold) !== (model.labels[row] === 1);
  // Ranks, not scores: a long tail would otherwise decide alone what is a bad mistake.
  const rank = v => upperBound(model.sorted, v);
  const margin = row => (model.labels[row] ? 1 : -1) * (rank(model.scores[row]) - rank(model.threshold));
  const orders = {
    worst: (a, b) => wrong(b.row) - wrong(a.row) || margin(a.row) - margin(b.row),
    high: (a, b) => model.scores[b.row] - model.scores[a.row],
    low: (a, b) => model.scores[a.row] - model.scores[b.row],
    name: (a, b) => (model.paths[a.row] < model.paths[b.row] ? -1 : 1),
  };

  const neighbors = image => {
    const list = make("ul", { class: "near", "aria-label": "Nearest normal images" });
    for (const index of image.neighbors) {
      const alt = `normal image ${normals[index].path}`;
      list.append(make("li", {}, make("img", { src: source(normals[index].thumb), alt, title: alt })));
    }
    return list;
  };

  const card = image => {
    const { row } = image, kind = model.kinds[model.kind[row]], state = verdict(row);
    const open = make("button", { type: "button", class: "open", "aria-label": `${VERDICTS[state]}: ${kind}, ${model.paths[row]}, score ${number(model.scores[row])}. Open` }, picture(image, true));
    open.addEventListener("click", () => view(shown.indexOf(image)));
    const item = make("li", { class: `card ${wrong(row) ? "wrong" : "right"}`, "data-row": row }, open,
      make("p", { class: "line" }, make("span", { class: `badge ${state}`, text: VERDICTS[state] }), make("span", { class: "kind-name", text: kind, title: kind }),
        make("span", { class: "score", text: number(model.scores[row]), title: `score; p ${number(model.pValues[row])}` })),
      make("p", { class: "path", text: model.paths[row], title: model.paths[row] }));
    if (image.neighbors.length) item.append(neighbors({ neighbors: image.neighbors.slice(0, 3) }));
    return item;
  };

  function refresh() {
    const kind = kindFilter.value, want = verdictFilter.value;
    shown = images.filter(({ row }) => {
      if (kind && model.kinds[model.kind[row]] !== kind) return false;
      if (want === "wrong" || want === "right") return wrong(row) === (want === "wrong");
      return !want || verdict(row) === want;
    }).sort((a, b) => orders[sort.value](a, b) || a.row - b.row);
    const part = shown.slice(0, limit);
    cards.replaceChildren(...part.map(card));
    if (!shown.length) cards.append(make("li", { class: "none", text: "No image fits these filters." }));
    byId("shown").textContent = `${whole(shown.length)} of ${counted(images.length, "image", "images")}${part.length < shown.length ? `, the first ${part.length} shown` : ""}`;
    byId("more").hidden = part.length >= shown.length;
    byId("more").textContent = `Show ${Math.min(PAGE, shown.length - part.length)} more`;
  }

  const viewer = byId("viewer");
  function view(at) {
    const image = shown[at];
    if (!image) return;
    viewed = at;
    const { row } = image, kind = model.kinds[model.kind[row]], state = verdict(row);
    byId("viewer-title").textContent = model.paths[row];
    const frames = make("div", { class: "frames" }, make("figure", {}, picture(image, false, true), make("figcaption", { text: "image" })));
    if (image.heat || image.outline) {
      const what = [image.heat && "heat map", image.outline && "ground truth"].filter(Boolean).join(" and ");
      frames.append(make("figure", {}, picture(image, true), make("figcaption", { text: what })));
    }
    if (image.spot) {
      const spot = make("img", { class: "spot", src: source(image.spot.thumb), alt: "" });
      frames.append(make("figure", {}, spot, make("figcaption", { text: "worst spot at full resolution" })));
    }
    const facts = make("dl", { class: "facts" });
    const fact = (name, value) => facts.append(make("div", {}, make("dt", { text: name }), make("dd", {}, value)));
    fact("verdict", make("span", { class: `badge ${state}`, text: VERDICTS[state] }));
    fact("kind", kind);
    fact("score", `${number(model.scores[row])} (threshold ${number(model.threshold)})`);
    if (image.components) {
      // the thresholded sum, told apart in units that mean something alone
      const signed = value => `${value < 0 ? "\u2212" : "+"}${Math.abs(value).toFixed(1)}`;
      fact("made of", `whole image ${signed(image.components[0])}, worst spot ${signed(image.components[1])} (in spreads of normal images)`);
    }
    fact("p-value", number(model.pValues[row]));
    const near = make("ul", { class: "near large" });
    for (const index of image.neighbors) {
      near.append(make("li", {}, make("img", { src: source(normals[index].thumb), alt: "" }), make("span", { text: normals[index].path })));
    }
    const parts = [frames, facts];
    if (image.neighbors.length) parts.push(make("h3", { text: "Nearest normal images" }), near);
    byId("viewer-body").replaceChildren(...parts);
    byId("previous").disabled = at === 0;
    byId("next").disabled = at === shown.length - 1;
    if (!viewer.open) viewer.showModal();
  }
  byId("previous").addEventListener("click", () => view(viewed - 1));
  byId("next").addEventListener("click", () => view(viewed + 1));
  byId("close").addEventListener("click", () => viewer.close());
  viewer.addEventListener("keydown", event => {
    if (event.key === "ArrowLeft") view(viewed - 1);
    if (event.key === "ArrowRight") view(viewed + 1);
  });
  viewer.addEventListener("click", event => { if (event.target === viewer) viewer.close(); });

  for (const kind of model.kinds) {
    const n = images.filter(({ row }) => model.kinds[model.kind[row]] === kind).length;
    kindFilter.append(make("option", { value: kind, text: `${kind} (${whole(n)})` }));
  }
  for (const element of [kindFilter, verdictFilter, sort]) element.addEventListener("change", () => { limit = PAGE; refresh(); });
  byId("more").addEventListener("click", () => {
    const first = limit;
    limit += PAGE;
    refresh();
    cards.children[first]?.querySelector("button")?.focus();
  });
  for (const [id, name] of [["show-heat", "heat"], ["show-outline", "outline"]]) {
    const box = byId(id);
    if (!box) continue;
    const apply = () => section.classList.toggle(`no-${name}`, !box.checked);
    box.addEventListener("change", apply);
    apply();
  }
  byId("tools").addEventListener("submit", event => event.preventDefault());
  if (model.heat && byId("heat-scale")) {
    paintScale(byId("heat-scale").querySelector("canvas"));
    byId("heat-low").textContent = number(model.heat[0]);
    byId("heat-high").textContent = number(model.heat[1]);
  }

  return {
    refresh: () => { limit = PAGE; refresh(); },
  };
}
