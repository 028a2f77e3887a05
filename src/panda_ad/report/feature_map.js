"use strict";
// The feature map: gallery and test images in the plane of the gallery's first two principal components.

function featureMap(element, model, openImage) {
  const { features } = model;
  const nameOf = document.getElementById("map-name");
  const points = features.gallery.map(([x, y], i) => ({ x, y, row: -1, group: 0, name: features.names[i] ?? `normal image ${i + 1}` }));
  features.test.forEach(([x, y], row) => points.push({ x, y, row, group: 1 + model.groupOf[row], name: model.paths[row] }));
  points.sort((p, q) => p.x - q.x);
  const groups = [{ name: "normal (training)", color: "--calibration" }, ...model.groups];
  const columns = groups.map((_, g) => points.map(p => (p.group === g ? p.y : null)));
  const span = (_, low, high) => { const pad = (high - low) * 0.05 || 1; return [low - pad, high + pad]; };
  const u = plot(element, {
    height: 280,
    padding: [8, 10, 0, 0],
    cursor: { show: true, x: false, y: false, points: { show: false }, drag: { x: false, y: false, setScale: false } },
    scales: { x: { time: false, range: span }, y: { range: span } },
    axes: [axis({ size: 24, space: 60, label: "first component" }), axis({ size: 34, space: 40, label: "second component" })],
    series: [{}, ...groups.map(group => ({
      paths: () => null,
      stroke: () => css(group.color),
      points: { show: true, size: group.label === 1 ? 7 : 6, width: 1.5, stroke: () => css(group.color),
        fill: () => (group.label === 1 ? css(group.color) : group.label === 0 ? css("--page") : "transparent") },
    }))],
  }, [points.map(p => p.x), ...columns]);

  const ring = make("i", { class: "ring", hidden: "" });
  u.over.append(ring);
  let current = null;
  const position = p => [u.valToPos(p.x, "x"), u.valToPos(p.y, "y")];
  const show = p => {
    current = p;
    ring.hidden = !p;
    if (!p) { nameOf.textContent = ""; return; }
    const [x, y] = position(p);
    ring.style.left = `${x}px`;
    ring.style.top = `${y}px`;
    nameOf.textContent = p.row < 0 ? `${p.name} · normal (training)` : `${p.name} · ${model.kinds[model.kind[p.row]]} · score ${number(model.scores[p.row])}`;
  };
  u.over.addEventListener("pointermove", event => {
    const box = u.over.getBoundingClientRect();
    const x = event.clientX - box.left, y = event.clientY - box.top;
    let best = null, least = 18 ** 2;
    for (const p of points) {
      const [px, py] = position(p);
      const d = (px - x) ** 2 + (py - y) ** 2;
      if (d < least) { least = d; best = p; }
    }
    if (best !== current) show(best);
  });
  u.over.addEventListener("pointerleave", () => { if (document.activeElement !== element) show(null); });
  u.over.addEventListener("click", () => { if (current && current.row >= 0) openImage(current.row); });

  // An arrow key goes to the nearest point in its direction: distance along it, sideways distance counted twice.
  const directions = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  element.addEventListener("keydown", event => {
    if (event.key === "Enter" && current && current.row >= 0) { openImage(current.row); return; }
    const direction = directions[event.key];
    if (!direction) return;
    event.preventDefault();
    if (!current) { show(points[points.length >> 1]); return; }
    const [cx, cy] = position(current);
    let best = null, least = Infinity;
    for (const p of points) {
      const [px, py] = position(p);
      const along = (px - cx) * direction[0] + (py - cy) * direction[1];
      const aside = Math.abs((px - cx) * direction[1]) + Math.abs((py - cy) * direction[0]);
      if (p !== current && along > 0.01 && along + 2 * aside < least) { least = along + 2 * aside; best = p; }
    }
    if (best) show(best);
  });
  element.addEventListener("focus", () => { if (!current) show(points[points.length >> 1]); });
  element.addEventListener("blur", () => show(null));

  const legend = document.getElementById("map-legend");
  for (const group of groups) {
    const swatch = make("i", { class: group.label === 1 ? "swatch dot" : "swatch dot hollow" });
    swatch.style.setProperty("--swatch", `var(${group.color})`);
    legend.append(make("li", {}, swatch, group.name));
  }
}
