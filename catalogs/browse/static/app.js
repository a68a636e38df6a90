// The page: asks for what matches, shows it as a grid, marks clips. Filters, panel and dialogs are modules of their own.

import { $, copy, count, debounced, el, get, hours, post, shown, toast, told } from './base.js';
import { exportDialog, helpDialog, markAll, sqlDialog } from './dialogs.js';
import { bindTexts, condition, drawFilters, readAddress, state, writeAddress } from './filters.js';
import { closePanel, focusComment, openClip, showPanel, togglePlay } from './panel.js';
import { forgetThumbnails, thumbnail } from './thumbs.js';

const PAGE = 60, STATUSES = ['kept', 'rejected', 'pending', 'quarantined'], LOOK_EVERY_MS = 30_000;

let info = null;             // what the server shows: columns, formats, read_only …
let total = { clips: 0, hours: 0 };
let cards = [];              // clips in the grid, in order
let place = -1;              // of the clip with the frame, in `cards`
let anchor = -1;             // where a selection by Shift begins
let finished = true;         // no further page
let asking = null;           // the request under way; a newer one ends it
const selected = new Set();

// ---- asking and showing -------------------------------------------------------------------------------------------

const ask = (offset, limit) => ({ where: condition(), sort: state.sort, desc: state.desc ? 1 : '', offset, limit });

/** The first page of what matches now. */
async function look() {
  asking?.abort();
  const mine = asking = new AbortController();
  $('#sql').textContent = condition() || 'every clip';
  document.body.classList.add('asking');
  writeAddress();
  try {
    const found = await get('/api/clips', ask(0, PAGE), mine.signal);
    showProblem(null);
    showCounts(found);
    forgetThumbnails();
    $('#grid').replaceChildren();
    [cards, place, anchor] = [[], -1, -1];
    selected.clear();
    showSelection();
    $('#content').scrollTop = 0;
    append(found.clips);
  } catch (error) {
    if (error.name !== 'AbortError') showProblem(error.message);
  }
  if (asking === mine) document.body.classList.remove('asking');
}

async function lookFurther() {
  if (finished || !cards.length) return;
  finished = true;  // one page at a time
  const mine = asking;
  const found = await told(() => get('/api/clips', ask(cards.length, PAGE), mine.signal));
  if (found && asking === mine) append(found.clips);
}

/** Counts alone, after marks. */
async function recount() {
  const found = await told(() => get('/api/clips', ask(0, 0)));
  if (found) showCounts(found);
}

function showCounts(found) {
  total = found.total;
  $('#count').textContent = count(total.clips);
  $('#hours').textContent = hours(total.hours);
  $('#took').textContent = `of ${count(info.clips)} · ${(found.seconds * 1000).toFixed(0)} ms`;
  const there = STATUSES.filter(name => found.statuses[name].clips || name !== 'quarantined');
  $('#statuses').replaceChildren(...there.map(name => el('span', { class: 'amount', dataset: { status: name } }, el('span', { class: `dot is-${name}` }),
    `${name} `, el('b', {}, count(found.statuses[name].clips)), el('span', { class: 'muted' }, ` ${hours(found.statuses[name].hours)}`))));
  $('#bar').replaceChildren(...there.map(name => el('i', { class: `is-${name}`, style: { 'flex-grow': String(found.statuses[name].clips) } })));
  $('#marking').hidden = info.read_only;
}

/** A condition that cannot be used is told where it is written; what was shown stays. */
function showProblem(message) {
  $('#where-error').hidden = message === null;
  $('#where-error').textContent = message ?? '';
  $('#where').classList.toggle('bad', message !== null);
}

function append(found) {
  finished = found.length < PAGE;
  $('#grid').append(...found.map((clip, i) => drawCard(clip, cards.length + i)));
  cards.push(...found);
  $('#foot').textContent = cards.length ? (finished ? `all ${count(cards.length)} shown` : '') : 'no clip matches';
  if (found.length) showCaptions(found.map(clip => clip.clip_id));
  if (!finished && $('#sentinel').getBoundingClientRect().top < innerHeight) lookFurther();
}

function drawCard(clip, number) {
  const value = state.sort !== 'source' && state.sort !== 'duration' ? el('span', { class: 'value', title: state.sort }, shown(clip.value)) : null;
  const box = el('input', { type: 'checkbox', class: 'pick', 'aria-label': 'Select', onclick: event => { event.stopPropagation(); pick(number, event.shiftKey); } });
  const length = clip.kind === 'image' ? 'picture' : `${(clip.duration ?? 0).toFixed(1)} s`;
  const node = el('article', { class: 'card', role: 'listitem', dataset: { id: clip.clip_id } },
    el('div', { class: 'thumb' }, thumbnail(clip.clip_id), box, value, el('span', { class: 'length' }, length), el('span', { class: 'mark' })), el('p', { class: 'caption' }));
  node.addEventListener('click', event => {
    if (event.shiftKey || event.ctrlKey || event.metaKey) pick(number, event.shiftKey);
    else { moveTo(number); open(clip.clip_id); }
  });
  dress(node, clip);
  return node;
}

/** What a mark changes of a card. */
function dress(node, clip) {
  for (const name of STATUSES) node.classList.toggle(`is-${name}`, clip.status === name);
  $('.mark', node).textContent = { keep: '✓', reject: '✕' }[clip.mark] ?? '';
  node.title = [clip.status, clip.mark ? `marked ${clip.mark}` : '', clip.comment ?? ''].filter(Boolean).join(' · ');
  node.classList.toggle('noted', Boolean(clip.comment));
}

async function showCaptions(ids) {
  const found = await told(() => get('/api/captions', { ids: ids.join(',') }));
  for (const [id, text] of Object.entries(found ?? {})) {
    const line = $(`#grid [data-id="${CSS.escape(id)}"] .caption`);
    if (line) { line.textContent = text; line.title = text; }
  }
}

// ---- moving, selecting, marking -----------------------------------------------------------------------------------

const nodeAt = number => $('#grid').children[number];

function moveTo(number) {
  if (!cards.length) return;
  nodeAt(place)?.classList.remove('current');
  place = Math.max(0, Math.min(cards.length - 1, number));
  nodeAt(place).classList.add('current');
  nodeAt(place).scrollIntoView({ block: 'nearest' });
  if (place > cards.length - PAGE / 2) lookFurther();
}

function step(by) {
  moveTo(place < 0 ? 0 : place + by);
  if (openClip() && cards[place]) openSoon(cards[place].clip_id);
}

/** Cards beside each other: as many as begin at the same height. */
function columns() {
  const top = nodeAt(0)?.offsetTop;
  let number = 0;
  while (nodeAt(number)?.offsetTop === top) number += 1;
  return Math.max(1, number);
}

function pick(number, range) {
  const chosen = range && anchor >= 0 ? [Math.min(anchor, number), Math.max(anchor, number)] : [number, number];
  const on = range || !selected.has(cards[number].clip_id);
  for (let i = chosen[0]; i <= chosen[1]; i += 1) selected[on ? 'add' : 'delete'](cards[i].clip_id);
  anchor = number;
  moveTo(number);
  showSelection();
}

function showSelection() {
  $('#selected').textContent = selected.size ? `${count(selected.size)} selected` : '';
  for (const node of $('#grid').children) {
    node.classList.toggle('selected', selected.has(node.dataset.id));
    $('.pick', node).checked = selected.has(node.dataset.id);
  }
}

/** The clips that keys and buttons are about: those selected, else the open one, else the one with the frame. */
function targets() {
  if (selected.size) return [...selected];
  return openClip() ? [openClip()] : place >= 0 ? [cards[place].clip_id] : [];
}

async function change(ids, what) {
  if (info.read_only) return toast('a snapshot is for looking only: browse the catalog as it is now to mark clips', 'bad');
  if (!ids.length) return toast('move to a clip first');
  const done = await told(() => post('/api/marks', { ids, ...what }));
  if (!done) return undefined;
  if (ids.length > 1) toast(`${count(done.marked)} clips marked`);
  const changed = new Map(done.clips.map(clip => [clip.clip_id, clip]));
  cards.forEach((card, i) => {
    if (changed.has(card.clip_id)) dress(nodeAt(i), Object.assign(card, changed.get(card.clip_id)));
  });
  if (changed.has(openClip())) open(openClip());
  return recount();
}

const mark = value => change(targets(), { mark: value });

function open(id) {
  state.clip = id;
  writeAddress();
  return showPanel(id, info.columns, {
    mark: value => change([id], { mark: value }), comment: text => change([id], { comment: text }).then(() => toast('noted')),
    open, step, close, readOnly: info.read_only,
  });
}
const openSoon = debounced(open, 120);

function close() {
  state.clip = null;
  writeAddress();
  closePanel();
}

function key(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || $('#dialog').open) return;
  const writing = event.target.matches('input:not([type=checkbox]):not([type=range]), textarea, select');
  if (event.key === 'Escape') {
    if (writing) event.target.blur();
    else if (openClip()) close();
    else { selected.clear(); showSelection(); }
    return;
  }
  if (writing || (event.target.matches('input[type=range]') && event.key.startsWith('Arrow'))) return;
  const here = () => cards[place]?.clip_id;
  const actions = {
    k: () => mark('keep'), r: () => mark('reject'), u: () => mark(null), x: () => place >= 0 && pick(place, false), '/': () => $('#search').focus(),
    c: async () => { if (!openClip() && here()) await open(here()); focusComment(); }, '?': helpDialog,
    ArrowLeft: () => step(-1), ArrowRight: () => step(1), ArrowUp: () => step(-columns()), ArrowDown: () => step(columns()),
    Enter: () => here() && open(here()), ' ': () => (openClip() ? togglePlay() : here() && open(here())),
  };
  const onButton = event.target.matches('button, summary, input[type=checkbox], a') && (event.key === 'Enter' || event.key === ' ');
  if (!actions[event.key] || onButton) return;
  event.preventDefault();
  actions[event.key]();
}

// ---- sorting, refreshing, starting --------------------------------------------------------------------------------

function drawSort() {
  const names = [...info.orders, ...info.columns.filter(c => c.sortable).map(c => c.name)];
  const text = name => ({ source: 'source, time', duration: 'duration' })[name] ?? name;
  $('#sort').replaceChildren(...names.map(name => el('option', { value: name, selected: name === state.sort }, text(name))));
  $('#direction').textContent = state.desc ? '↓' : '↑';
  $('#direction').title = state.desc ? 'largest first' : 'smallest first';
}

async function lookForChanges(byHand) {
  if (info.read_only || document.hidden) return byHand && toast('a snapshot does not change');
  const changes = await get('/api/changes').catch(error => byHand && toast(error.message, 'bad'));
  if (!changes) return undefined;
  const names = Object.entries(changes).map(([name, [old, now]]) => `${name} ${old} → ${now}`);
  $('#banner').hidden = !names.length;
  $('#banner span').textContent = `The catalog has changed: ${names.join(', ')}`;
  return byHand && !names.length && toast('nothing has changed');
}

async function reload() {
  $('#reload').disabled = true;
  const done = await told(() => post('/api/reload', {}));
  $('#reload').disabled = false;
  if (!done) return;
  $('#banner').hidden = true;
  await load();
}

/** Read what the server shows, draw the filters, look. */
async function load() {
  info = await get('/api/info');
  $('#root').textContent = info.root;
  document.title = `${info.root.split('/').pop()} · datakit`;
  $('#badge').hidden = !info.read_only;
  $('#badge').textContent = `${info.snapshot ? `snapshot ${info.snapshot}` : 'snapshot'}: read-only`;
  document.body.classList.toggle('captioned', info.versions.captions > 0);
  drawSort();
  const first = look();
  drawFilters(await get('/api/facets'), debounced(look, 150));
  await first;
  if (Object.keys(state.ranges).length) await look();  // ranges need the facets' expressions
}

async function start() {
  if (!readAddress()) state.where = (await get('/api/info')).where ?? '';
  bindTexts();
  await load();
  if (state.clip) open(state.clip);
  $('#sort').addEventListener('change', event => { state.sort = event.target.value; state.desc = state.sort !== 'source'; drawSort(); look(); });
  $('#direction').addEventListener('click', () => { state.desc = !state.desc; drawSort(); look(); });
  $('#copy-sql').addEventListener('click', () => told(() => copy(condition())));
  $('#open-sql').addEventListener('click', () => sqlDialog(open));
  $('#open-export').addEventListener('click', () => exportDialog(info, total));
  $('#open-help').addEventListener('click', helpDialog);
  $('#refresh').addEventListener('click', () => told(() => lookForChanges(true)));
  $('#reload').addEventListener('click', reload);
  $('#toggle-filters').addEventListener('click', () => document.body.classList.toggle('filters-open'));
  $('#mark-all').addEventListener('click', () => markAll(total, info.read_only, look));
  for (const button of document.querySelectorAll('[data-mark]')) {
    button.addEventListener('click', () => mark(button.dataset.mark === 'clear' ? null : button.dataset.mark));
  }
  addEventListener('keydown', key);
  addEventListener('hashchange', async () => { readAddress(); await load(); if (state.clip) open(state.clip); else closePanel(); });
  new IntersectionObserver(entries => entries[0].isIntersecting && lookFurther(), { root: $('#content'), rootMargin: '600px' }).observe($('#sentinel'));
  setInterval(() => told(() => lookForChanges(false)), LOOK_EVERY_MS);
  document.body.dataset.ready = 'yes';
}

start().catch(error => toast(error.message, 'bad'));
