// SPDX-License-Identifier: Apache-2.0
// The threshold's page: says what the slider's position costs. All figures come from the server.
'use strict';
(() => {
  const byId = id => document.getElementById(id), slider = byId('step'), parts = byId('parts');
  if (!slider) return;
  const steps = JSON.parse(byId('steps').textContent), between = byId('steps').dataset.between;
  const language = document.documentElement.lang;
  const number = (value, digits) => value.toLocaleString(language, { maximumSignificantDigits: digits, useGrouping: false });
  const count = value => (value < 9.95 ? number(value, 2) : Math.round(value).toLocaleString(language));
  const share = value => (100 * value).toLocaleString(language, { maximumSignificantDigits: 3 }) + ' %';
  try { parts.value = localStorage.getItem('panda.parts') ?? parts.value; } catch { /* private window */ }

  function show() {
    const step = steps[slider.max - slider.value], many = Math.max(1, Number(parts.value) || 1), line = byId('line');
    const x = Math.min(790, 10 + (step.value - line.dataset.low) * line.dataset.scale);
    line.setAttribute('x1', x);
    line.setAttribute('x2', x);
    byId('expected').textContent = count(many * step.rate);
    byId('between').textContent = between.replace('{low}', count(many * step.low)).replace('{high}', count(many * step.high));
    byId('missed').textContent = step.missed;
    byId('false-alarms').textContent = step.false_alarms;
    byId('undecided').textContent = step.undecided;
    byId('value').textContent = number(step.value, 4);
    byId('promised').textContent = share(step.rate);
    slider.setAttribute('aria-valuetext', `${byId('expected').textContent} ${document.querySelector('.costs dt').textContent}`);
    if (byId('rate')) {
      byId('rate').value = step.rate;
      byId('save').disabled = slider.value === slider.dataset.now;
      byId('parameter').textContent = `verdict: {false_alarm_rate: ${Number(step.rate.toPrecision(4))}}`;
    }
  }
  slider.addEventListener('input', show);
  parts.addEventListener('input', () => { try { localStorage.setItem('panda.parts', parts.value); } catch { /* private window */ } show(); });
  byId('choose').addEventListener('submit', () => { setTimeout(() => { byId('save').disabled = true; }); });
  show();
})();
