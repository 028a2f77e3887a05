// SPDX-License-Identifier: Apache-2.0
// The queue's page: layers over the picture, one zoom for all pictures, keys, what comes next in advance, dropped files.
'use strict';
(() => {
  const byId = id => document.getElementById(id);
  const page = byId('queue');
  const kept = (name, value) => { try { localStorage.setItem('panda.' + name, value); } catch { /* private window */ } };
  const was = (name, otherwise) => { try { return localStorage.getItem('panda.' + name) ?? otherwise; } catch { return otherwise; } };

  // ---- what led to the verdict, which the server may still be computing
  const evidence = byId('evidence');
  const get = url => fetch(url, { headers: { accept: 'text/plain' } });
  if (evidence) {
    get(evidence.dataset.from).then(async answer => {
      const text = await answer.text();
      if (!answer.ok) { evidence.replaceChildren(line(text)); return; }
      evidence.innerHTML = text; // rendered and escaped by the server
      byId('overlay').replaceChildren(byId('overlay-of').content);
      byId('normals').replaceChildren(byId('normals-of').content);
      layers();
      zoom.apply();
      document.documentElement.classList.add('explained');
      ahead();
    }).catch(error => evidence.replaceChildren(line(String(error))));
  }
  function line(text) {
    const p = document.createElement('p');
    p.className = 'bad';
    p.textContent = text;
    return p;
  }

  // ---- the next picture, before it is asked for
  function ahead() {
    const next = page.dataset.next, photo = document.querySelector('#subject .photo');
    if (!next || !photo) return;
    const here = new URL(photo.src).pathname.split('/picture/')[0];
    new Image().src = `${here}/picture/${next}/screen`;
    get(`${here}/evidence/${next}`).catch(() => {});
  }

  // ---- heat map and region
  const heat = byId('heat'), opacity = byId('opacity'), region = byId('region');
  function layers() {
    const map = document.querySelector('#overlay .heat'), box = document.querySelector('#overlay .region');
    if (map) { map.hidden = !heat.checked; map.style.opacity = opacity.value / 100; }
    if (box) box.style.display = region.checked ? '' : 'none';
  }
  if (heat) {
    heat.checked = was('heat', '1') === '1';
    region.checked = was('region', '1') === '1';
    opacity.value = was('opacity', '60');
    for (const [box, name] of [[heat, 'heat'], [region, 'region']]) {
      box.addEventListener('change', () => { kept(name, box.checked ? '1' : '0'); layers(); });
    }
    opacity.addEventListener('input', () => { kept('opacity', opacity.value); layers(); });
    layers();
  }

  // ---- one zoom for all pictures: scale, and the middle of what is seen in shares of the frame
  const zoom = {
    scale: 1, x: 0.5, y: 0.5,
    apply() {
      const half = 0.5 / this.scale;
      this.x = Math.min(1 - half, Math.max(half, this.x));
      this.y = Math.min(1 - half, Math.max(half, this.y));
      for (const stage of document.querySelectorAll('.stage')) {
        stage.style.transform = `scale(${this.scale}) translate(${(0.5 - this.x) * 100}%, ${(0.5 - this.y) * 100}%)`;
      }
      const photo = document.querySelector('#subject .photo');
      if (photo && this.scale > 1.5 && photo.dataset.full) { photo.src = photo.dataset.full; delete photo.dataset.full; }
      if (byId('zoom')) byId('zoom').value = `${Math.round(this.scale * 100)} %`;
    },
    by(factor, x = 0.5, y = 0.5) { // x, y: the place in the frame that stays where it is
      const scale = Math.min(16, Math.max(1, this.scale * factor));
      this.x += (x - 0.5) * (1 / this.scale - 1 / scale);
      this.y += (y - 0.5) * (1 / this.scale - 1 / scale);
      this.scale = scale;
      this.apply();
    },
    move(dx, dy) { this.x -= dx / this.scale; this.y -= dy / this.scale; this.apply(); },
    reset() { Object.assign(this, { scale: 1, x: 0.5, y: 0.5 }); this.apply(); },
  };
  const place = (event, frame) => {
    const box = frame.getBoundingClientRect();
    return [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height, box];
  };
  const look = document.querySelector('.frames');
  if (look) {
    const fingers = new Map();
    look.addEventListener('wheel', event => {
      const frame = event.target.closest('.frame');
      if (!frame) return;
      event.preventDefault();
      const [x, y] = place(event, frame);
      zoom.by(Math.exp(-event.deltaY / 400), x, y);
    }, { passive: false });
    look.addEventListener('pointerdown', event => {
      const frame = event.target.closest('.frame');
      if (!frame) return;
      fingers.set(event.pointerId, { x: event.clientX, y: event.clientY, frame });
      frame.setPointerCapture(event.pointerId);
    });
    look.addEventListener('pointermove', event => {
      const last = fingers.get(event.pointerId);
      if (!last) return;
      const size = last.frame.getBoundingClientRect().width, others = [...fingers].filter(([id]) => id !== event.pointerId);
      if (others.length) {
        const other = others[0][1];
        const apart = p => Math.hypot(p.x - other.x, p.y - other.y) || 1;
        zoom.by(apart({ x: event.clientX, y: event.clientY }) / apart(last), ...place(event, last.frame));
      } else {
        zoom.move((event.clientX - last.x) / size, (event.clientY - last.y) / size);
      }
      Object.assign(last, { x: event.clientX, y: event.clientY });
    });
    for (const end of ['pointerup', 'pointercancel']) look.addEventListener(end, event => fingers.delete(event.pointerId));
    look.addEventListener('dblclick', event => {
      const frame = event.target.closest('.frame');
      if (frame) zoom.scale > 1 ? zoom.reset() : zoom.by(3, ...place(event, frame));
    });
    byId('zoom-in').addEventListener('click', () => zoom.by(1.5));
    byId('zoom-out').addEventListener('click', () => zoom.by(1 / 1.5));
    byId('zoom-reset').addEventListener('click', () => zoom.reset());
  }

  // ---- decisions
  const form = byId('decide'), kind = byId('kind');
  const press = selector => { const button = document.querySelector(selector); if (button) button.click(); };
  if (form) {
    form.addEventListener('submit', event => {
      if (form.dataset.sent) { event.preventDefault(); return; } // a key held down decides one image
      form.dataset.sent = '1';
      if (event.submitter && event.submitter.dataset.working) event.submitter.textContent = event.submitter.dataset.working;
    });
    for (const chip of document.querySelectorAll('[data-kind]')) {
      chip.addEventListener('click', () => { kind.value = chip.dataset.kind; press('#decide .defect'); });
    }
    kind.addEventListener('keydown', event => {
      if (event.key === 'Enter') { event.preventDefault(); press('#decide .defect'); }
      if (event.key === 'Escape') kind.blur();
    });
    window.addEventListener('pageshow', () => delete form.dataset.sent);
  }
  const keys = {
    g: () => press('#decide .good'), t: () => press('#decide .teach'), d: () => press('#decide .defect'), u: () => press('#decide [value=unsure]'),
    n: () => press('#next'), z: () => press('#undo button'), h: () => heat && heat.click(), r: () => region && region.click(),
    '+': () => zoom.by(1.5), '=': () => zoom.by(1.5), '-': () => zoom.by(1 / 1.5), 0: () => zoom.reset(),
    ArrowLeft: () => zoom.move(0.1, 0), ArrowRight: () => zoom.move(-0.1, 0),
    ArrowUp: () => zoom.move(0, 0.1), ArrowDown: () => zoom.move(0, -0.1),
  };
  document.addEventListener('keydown', event => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches('input:not([type=checkbox]), select, textarea')) return;
    if (event.key.startsWith('Arrow') && zoom.scale === 1) return; // the page scrolls
    const act = keys[event.key.length === 1 ? event.key.toLowerCase() : event.key];
    const chip = /^[1-9]$/.test(event.key) && document.querySelectorAll('[data-kind]')[event.key - 1];
    if (!act && !chip) return;
    event.preventDefault();
    if (!event.repeat || event.key.startsWith('Arrow')) chip ? chip.click() : act();
  });

  // ---- files that are chosen or dropped
  const files = byId('files'), said = byId('dropped');
  async function send(list) {
    let last = '';
    for (const file of list) {
      said.textContent = page.dataset.dropping.replace('{name}', file.name);
      const answer = await fetch(page.dataset.drop, {
        method: 'POST', body: file, headers: { 'x-csrf': page.dataset.csrf, 'content-type': 'application/octet-stream', accept: 'text/plain' },
      });
      const text = await answer.text();
      if (!answer.ok) { said.textContent = `${page.dataset.error}: ${file.name}: ${text}`; return; }
      last = text;
    }
    if (last) location.assign(`${location.pathname}?at=${last}`);
  }
  if (files) {
    const start = list => send([...list]).catch(error => { said.textContent = `${page.dataset.error}: ${error.message}`; });
    files.addEventListener('change', () => start(files.files));
    document.addEventListener('dragover', event => event.preventDefault());
    document.addEventListener('drop', event => { event.preventDefault(); start(event.dataTransfer.files); });
  }
})();
