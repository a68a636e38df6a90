// Filters: sliders with histograms, checkboxes, caption search, a free condition; and the SQL that they make.

import { $, count, el, shown } from './base.js';

const STEPS = 200;

/** What is looked for; kept in the address of the page. */
export const state = { where: '', search: '', ranges: {}, choices: {}, sort: 'source', desc: false, clip: null };

let facets = { ranges: [], choices: [] };
let changed = () => {};

/** The condition as SQL; empty: everything. */
export function condition() {
  const parts = [];
  for (const range of facets.ranges) {
    const [low, high] = state.ranges[range.name] ?? [null, null];
    if (low !== null && high !== null) parts.push(`${range.expression} BETWEEN ${low} AND ${high}`);
    else if (low !== null) parts.push(`${range.expression} >= ${low}`);
    else if (high !== null) parts.push(`${range.expression} <= ${high}`);
  }
  for (const [name, values] of Object.entries(state.choices)) if (values.length) parts.push(oneOf(name, values));
  if (state.search.trim()) parts.push(contains(state.search.trim()));
  const free = state.where.trim();
  if (free) parts.push(parts.length ? `(${free})` : free);
  return parts.join(' AND ');
}

const quoted = text => `'${text.replaceAll("'", "''")}'`;

function oneOf(name, values) {
  const named = values.filter(value => value !== null).map(quoted);
  const parts = [];
  if (named.length) parts.push(named.length === 1 ? `${name} = ${named[0]}` : `${name} IN (${named.join(', ')})`);
  if (values.includes(null)) parts.push(`${name} IS NULL`);
  return parts.length > 1 ? `(${parts.join(' OR ')})` : parts[0];
}

function contains(text) {
  const special = /[%_\\]/.test(text);
  return special ? `strpos(lower(caption), ${quoted(text.toLowerCase())}) > 0` : `caption ILIKE ${quoted(`%${text}%`)}`;
}

/** State to the address, as `#q=dog&r.motion=2..20&c.status=kept`. No value is written as ∅. */
export function writeAddress() {
  const out = new URLSearchParams();
  if (state.search) out.set('q', state.search);
  if (state.where) out.set('where', state.where);
  for (const [name, [low, high]] of Object.entries(state.ranges)) out.set(`r.${name}`, `${low ?? ''}..${high ?? ''}`);
  for (const [name, values] of Object.entries(state.choices)) for (const value of values) out.append(`c.${name}`, value ?? '∅');
  if (state.sort !== 'source') out.set('sort', state.sort);
  if (state.desc) out.set('desc', '1');
  if (state.clip) out.set('clip', state.clip);
  history.replaceState(null, '', `#${out}`);
}

export function readAddress() {
  const given = new URLSearchParams(location.hash.slice(1));
  Object.assign(state, {
    search: given.get('q') ?? '', where: given.get('where') ?? '', sort: given.get('sort') ?? 'source',
    desc: given.get('desc') === '1', clip: given.get('clip'), ranges: {}, choices: {},
  });
  const bound = text => (text !== '' && Number.isFinite(Number(text)) ? Number(text) : null);
  for (const [key, value] of given) {
    if (key.startsWith('r.')) {
      const [low, high] = value.split('..').map(bound);
      state.ranges[key.slice(2)] = [low ?? null, high ?? null];
    } else if (key.startsWith('c.')) (state.choices[key.slice(2)] ??= []).push(value === '∅' ? null : value);
  }
  return location.hash.length > 1;
}

/** Draw the filters for what the catalog holds. `onchange` runs whenever the condition is another. */
export function drawFilters(found, onchange) {
  facets = found;
  changed = onchange;
  $('#choices').replaceChildren(...facets.choices.map(drawChoice));
  $('#ranges').replaceChildren(...facets.ranges.filter(range => range.score).map(drawRange));
  const more = facets.ranges.filter(range => !range.score);
  $('#more-ranges').replaceChildren(...more.map(drawRange));
  $('#more').hidden = !more.length;
  $('#more').open ||= more.some(range => state.ranges[range.name]);
  $('#search').value = state.search;
  $('#where').value = state.where;
}

/** The boxes for text, which stay. */
export function bindTexts() {
  $('#search').addEventListener('input', event => { state.search = event.target.value; changed(); });
  $('#where').addEventListener('input', event => { state.where = event.target.value; changed(); });
  $('#clear').addEventListener('click', () => {
    Object.assign(state, { where: '', search: '', ranges: {}, choices: {} });
    drawFilters(facets, changed);
    changed();
  });
}

function drawChoice(choice) {
  const offered = new Set(choice.values.map(([value]) => value));
  const absent = (state.choices[choice.name] ?? []).filter(value => !offered.has(value)).map(value => [value, 0]);
  const boxes = [...choice.values, ...absent].map(([value, clips]) => {
    const box = el('input', { type: 'checkbox', onchange: () => choose(choice.name, value, box.checked) });
    box.checked = (state.choices[choice.name] ?? []).includes(value);
    const name = el('span', { class: 'name', title: value ?? 'no value' }, value ?? 'none');
    return el('label', { class: `choice ${choice.name === 'status' ? `is-${value}` : ''}` }, box, name, el('span', { class: 'muted' }, count(clips)));
  });
  const few = boxes.slice(0, 8), rest = boxes.slice(8);
  return el('fieldset', { dataset: { facet: choice.name } }, el('legend', { title: choice.meaning }, choice.name), ...few,
    rest.length ? el('details', {}, el('summary', {}, `${rest.length} more`), ...rest) : null);
}

function choose(name, value, on) {
  const others = (state.choices[name] ?? []).filter(known => known !== value);
  state.choices[name] = on ? [...others, value] : others;
  if (!state.choices[name].length) delete state.choices[name];
  changed();
}

/** A histogram, two thumbs, and the two bounds as numbers. A thumb at its end is no bound. */
function drawRange(range) {
  const step = range.whole ? 1 : 10 ** Math.floor(Math.log10((range.high - range.low) / STEPS));
  const valueAt = position => {
    const value = range.low + (range.high - range.low) * position / STEPS;
    return +(Math.round(value / step) * step).toPrecision(8);
  };
  const positionOf = value => Math.max(0, Math.min(STEPS, (value - range.low) / (range.high - range.low) * STEPS));
  const thumb = (which, label) => el('input', {
    type: 'range', min: 0, max: STEPS, step: range.whole ? STEPS / Math.max(1, Math.round(range.high - range.low)) : 1, class: which,
    'aria-label': `${range.name} ${label}`, oninput: () => slide(which),
  });
  const number = (which, label) => el('input', { type: 'number', step: 'any', 'aria-label': `${range.name} ${label}, number`, onchange: () => type(which) });
  const low = thumb('low', 'at least'), high = thumb('high', 'at most');
  const from = number('low', 'at least'), to = number('high', 'at most');
  const bars = drawBars(range);

  function slide(which) {
    if (+low.value > +high.value) (which === 'low' ? low : high).value = (which === 'low' ? high : low).value;
    const bound = [+low.value <= 0 ? null : valueAt(+low.value), +high.value >= STEPS ? null : valueAt(+high.value)];
    set(bound);
  }
  function type() {
    set([from, to].map(box => (box.value === '' ? null : +box.value)));
  }
  function set(bound) {
    if (bound[0] === null && bound[1] === null) delete state.ranges[range.name];
    else state.ranges[range.name] = bound;
    show();
    changed();
  }
  function show() {
    const [least, most] = state.ranges[range.name] ?? [null, null];
    low.value = least === null ? 0 : positionOf(least);
    high.value = most === null ? STEPS : positionOf(most);
    from.value = least ?? '';
    to.value = most ?? '';
    from.placeholder = shown(range.low);
    to.placeholder = shown(range.high);
    const share = [low, high].map(box => box.value / STEPS * bars.length);
    bars.forEach((bar, i) => bar.classList.toggle('out', i + 1 <= share[0] || i >= share[1]));
    box.classList.toggle('active', range.name in state.ranges);
  }
  const missing = range.missing ? ` · ${count(range.missing)} without` : '';
  const box = el('div', { class: 'range', dataset: { range: range.name } },
    el('div', { class: 'title' }, el('span', { title: `${range.meaning}${missing}` }, range.name), el('span', { class: 'muted' }, range.unit)),
    el('div', { class: 'bars', 'aria-hidden': 'true' }, ...bars), el('div', { class: 'thumbs' }, low, high), el('div', { class: 'bounds' }, from, to));
  show();
  return box;
}

function drawBars(range) {
  const most = Math.max(...range.counts);
  return range.counts.map(clips => el('i', { style: { height: clips ? `${Math.max(4, 100 * Math.sqrt(clips / most))}%` : '0' } }));
}
