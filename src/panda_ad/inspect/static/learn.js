// SPDX-License-Identifier: Apache-2.0
// The page of what the model learns: says that a change is being made, and Z takes the last one back.
'use strict';
(() => {
  const said = document.getElementById('working');
  const working = button => { said.hidden = false; button.textContent = button.dataset.working; button.setAttribute('aria-busy', 'true'); };
  for (const form of document.querySelectorAll('main form')) {
    form.addEventListener('submit', event => {
      if (form.dataset.sent) { event.preventDefault(); return; }
      form.dataset.sent = '1';
      if (event.submitter) working(event.submitter);
    });
  }
  const look = document.getElementById('look');
  if (look) look.addEventListener('click', () => working(look));
  window.addEventListener('pageshow', event => { if (event.persisted) location.reload(); });
  document.addEventListener('keydown', event => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.repeat || event.target.matches('input:not([type=checkbox]), select, textarea')) return;
    const undo = document.querySelector('#undo button');
    if (event.key.toLowerCase() === 'z' && undo) { event.preventDefault(); undo.click(); }
  });
})();
