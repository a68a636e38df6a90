// The dialogs: SQL, export and tag, keys.

import { asked, copy, count, el, get, hours, openDialog, post, shown, told } from './base.js';
import { condition } from './filters.js';

let lastQuery = "SELECT status, count(*) AS clips, round(sum(end_s - start_s) / 3600, 2) AS hours, avg(motion) AS motion\nFROM clips GROUP BY status ORDER BY clips DESC";

/** Free questions. A clip_id in the answer opens the clip. */
export function sqlDialog(open) {
  const text = el('textarea', { rows: 5, spellcheck: 'false', class: 'mono', 'aria-label': 'SQL' });
  text.value = lastQuery;
  const result = el('div', { class: 'result' }), problem = el('p', { class: 'error', role: 'alert' });
  const run = async () => {
    lastQuery = text.value;
    problem.textContent = '';
    button.disabled = true;
    try {
      const found = await get('/api/sql', { q: text.value });
      result.replaceChildren(rows(found, id => { close(); open(id); }));
    } catch (error) {
      problem.textContent = error.message;
      result.replaceChildren();
    }
    button.disabled = false;
  };
  text.addEventListener('keydown', event => { if (event.key === 'Enter' && (event.ctrlKey || event.metaKey)) run(); });
  const button = el('button', { class: 'primary', onclick: run }, 'Run');
  const close = openDialog('SQL', el('p', { class: 'muted' }, 'SELECT over clips (the joined view), videos, decisions, captions, embeddings, marks, losses, runs. Ctrl+Enter runs it.'),
    text, el('div', { class: 'buttons' }, button), problem, result);
}

function rows(found, open) {
  const cell = (value, name) => (name.endsWith('clip_id') && typeof value === 'string'
    ? el('td', {}, el('button', { class: 'link mono', onclick: () => open(value) }, value))
    : el('td', { class: typeof value === 'number' ? 'number' : '' }, shown(value)));
  return el('div', {}, el('p', { class: 'muted' }, `${count(found.rows.length)} rows${found.more ? ', and more that are not shown' : ''}`),
    el('table', { class: 'rows' }, el('thead', {}, el('tr', {}, ...found.columns.map(name => el('th', {}, name)))),
      el('tbody', {}, ...found.rows.map(row => el('tr', {}, ...row.map((value, i) => cell(value, found.columns[i])))))));
}

/** Take the rows along, or give the selection a name. */
export function exportDialog(info, total) {
  const where = condition();
  const format = el('select', { 'aria-label': 'Format' }, ...info.formats.map(name => el('option', {}, name)));
  const columns = el('textarea', { rows: 3, class: 'mono', spellcheck: 'false', 'aria-label': 'Columns' });
  columns.value = info.export_columns.join(', ');
  const problem = el('p', { class: 'error', role: 'alert' });
  const chosen = () => columns.value.split(/[\s,]+/).filter(Boolean);
  const unknown = () => chosen().filter(name => !info.columns.some(c => c.name === name));
  const download = () => {
    problem.textContent = unknown().length ? `no column ${unknown()[0]}` : '';
    if (unknown().length) return;
    const query = new URLSearchParams({ format: format.value, where, columns: chosen().join(',') });
    el('a', { href: `/api/export?${query}`, download: `clips.${format.value}` }).click();
  };
  const everything = () => { columns.value = info.columns.map(c => c.name).join(', '); };
  const name = el('input', { type: 'text', placeholder: 'name', 'aria-label': 'Name of the tag' });
  const note = el('input', { type: 'text', placeholder: 'note', 'aria-label': 'Note' });
  const tagged = el('p', { role: 'status' });
  const tag = () => told(async () => {
    tagged.textContent = 'reading the selection…';
    try {
      const done = await post('/api/tag', { name: name.value.trim(), note: note.value.trim(), where, columns: chosen() });
      tagged.textContent = `tagged ${name.value.trim()}: ${count(done.clips)} clips, ${hours(done.hours)}, content ${done.content_hash}`;
    } catch (error) {
      tagged.textContent = '';
      throw error;
    }
  });
  const command = `datakit catalog export ${info.root} --format jsonl --out clips.jsonl --where '${(where || 'true').replaceAll("'", "'\\''")}'`;
  openDialog('Export', el('p', {}, `${count(total.clips)} clips, ${hours(total.hours)}: `, el('code', {}, where || 'all')),
    el('div', { class: 'row' }, el('label', {}, 'as ', format), el('button', { class: 'primary', onclick: download }, 'Download'), el('button', { onclick: everything }, 'All columns')),
    columns, problem, el('h3', {}, 'Tag this selection'), el('p', { class: 'muted' }, 'The versions of the tables and the condition get a name; vacuum keeps what it names.'),
    el('div', { class: 'row' }, name, note, el('button', { onclick: tag, disabled: info.read_only }, 'Tag')), tagged,
    el('h3', {}, 'On the command line'), el('p', { class: 'muted' }, 'Open-Sora, WebDataset, Hugging Face, Lance, with clip files:'),
    el('div', { class: 'row' }, el('code', { class: 'command' }, command), el('button', { onclick: () => told(() => copy(command)) }, 'Copy')));
}

/** Mark all that matches, once somebody has read how many that are. */
export async function markAll(total, readOnly, done) {
  if (readOnly) return;
  const number = count(total.clips);
  const value = await asked(`Mark all ${number} clips that match`, el('code', {}, condition() || 'every clip'),
    [['keep', 'Keep', 'keep'], ['reject', 'Reject', 'reject'], ['clear', 'Clear marks', '']]);
  if (!value) return;
  const sure = await asked('Sure?', `${number} clips will be marked: ${value}. A mark wins over the recipe.`,
    [[false, 'Cancel', ''], [true, `Mark ${number} clips`, 'primary']]);
  if (!sure) return;
  await told(async () => {
    await post('/api/marks', { where: condition(), expected: total.clips, mark: value === 'clear' ? null : value });
    await done();
  });
}

const KEYS = [['← → ↑ ↓', 'move'], ['Enter', 'open'], ['Space', 'open; play or pause'], ['Esc', 'close; drop the selection'], ['k', 'keep'], ['r', 'reject'],
  ['u', 'clear: leave it to the recipe'], ['c', 'comment'], ['x, or Ctrl+click', 'select'], ['Shift+click', 'select up to here'], ['/', 'search captions']];

export function helpDialog() {
  openDialog('Keys', el('table', {}, el('tbody', {}, ...KEYS.map(([key, what]) => el('tr', {}, el('th', {}, el('kbd', {}, key)), el('td', {}, what))))),
    el('p', { class: 'muted' }, 'Keys mark the selected clips, else the one with the frame. Marks are written at once; they win over the recipe.'));
}
