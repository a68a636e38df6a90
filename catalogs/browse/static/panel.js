// The side panel: one clip with all that the catalog knows about it.

import { $, el, get, shown, told } from './base.js';
import { player } from './player.js';

let current = null, loading = null;

/** The clip that is open, or null. */
export const openClip = () => current?.id ?? null;
export const togglePlay = () => current?.player?.toggle();
export const focusComment = () => $('#panel .comment input')?.focus();

export function closePanel() {
  loading?.abort();
  current?.player?.stop();
  current = null;
  $('#panel').hidden = true;
  document.body.classList.remove('panel-open');
}

/**
 * Show a clip.
 * @param actions what the panel's buttons do: mark(value), comment(text), open(id), step(by), close(), readOnly.
 */
export async function showPanel(id, columns, actions) {
  loading?.abort();
  loading = new AbortController();
  document.body.classList.add('panel-open');
  const panel = $('#panel');
  panel.hidden = false;
  if (current?.id !== id) {
    current?.player?.stop();
    current = { id, player: null };
    panel.replaceChildren(heading(id, actions), el('p', { class: 'muted' }, 'reading…'));
  }
  const record = await told(() => get(`/api/clip/${encodeURIComponent(id)}`, {}, loading.signal));
  if (!record || current?.id !== id) return;
  draw(record, columns, actions);
}

function draw(record, columns, actions) {
  const { clip } = record, note = el('p', { class: 'note muted' });
  const kept = current.player;  // marks do not stop the film
  const playing = kept ?? (current.player = player(record.media, text => { note.textContent = text; }));
  if (!kept) note.textContent = { transcode: 'a transcode: browsers do not play the source', 'clip file': 'the clip’s own file: the source is not there' }[record.media.of] ?? '';
  else note.textContent = $('#panel .note')?.textContent ?? '';
  const scroll = $('#panel').scrollTop;
  const parts = [
    heading(clip.clip_id, actions), playing.node, note, verdict(record, actions), section('Marks', true, marks(record.marks)), timeline(record, actions), captions(record),
    alike(record, actions), failures(clip),
    section('Columns', table(columns, clip), true), section('Video', facts(record.video)),
    section('Decision', facts(record.decision)), section('Stages', stages(clip.stage_versions)),
    section('Runs', ...record.runs.map(run)), losses(record.losses),
  ];
  $('#panel').replaceChildren(...parts.filter(Boolean));
  $('#panel').scrollTop = kept ? scroll : 0;
}

function heading(id, actions) {
  const button = (text, label, onclick) => el('button', { class: 'quiet', 'aria-label': label, title: label, onclick }, text);
  return el('header', {}, button('◀', 'Previous (←)', () => actions.step(-1)), button('▶', 'Next (→)', () => actions.step(1)),
    el('code', { class: 'id', title: 'clip_id' }, id), el('span', { class: 'grow' }), button('✕', 'Close (Esc)', actions.close));
}

function verdict(record, actions) {
  const { clip, decision } = record;
  const mark = (value, text, kind) => el('button', {
    class: `${kind} ${clip.mark === value && value ? 'on' : ''}`, disabled: actions.readOnly, onclick: () => actions.mark(value) }, text);
  const box = el('input', { type: 'text', placeholder: 'comment', value: clip.comment ?? '', disabled: actions.readOnly, 'aria-label': 'Comment' });
  const save = () => actions.comment(box.value.trim() || null);
  box.addEventListener('keydown', event => { if (event.key === 'Enter') save(); });
  const reasons = (clip.reasons ?? []).map(reason => el('span', { class: 'chip' }, reason));
  return el('div', { class: 'verdict' },
    el('div', { class: 'row' }, el('span', { class: `status is-${clip.status}` }, clip.status), clip.mark ? el('span', { class: 'muted' }, `marked ${clip.mark}`) : null, ...reasons,
      el('span', { class: 'muted' }, [decision.recipe, clip.level > 0 ? `level ${clip.level}` : null].filter(Boolean).join(' · '))),
    el('div', { class: 'row' }, mark('keep', 'Keep', 'keep'), mark('reject', 'Reject', 'reject'), mark(null, 'Clear', '')),
    el('div', { class: 'row comment' }, box, el('button', { onclick: save, disabled: actions.readOnly }, 'Save')));
}

/** All clips of the video, where they are in it. */
function timeline(record, actions) {
  const { siblings, clip, video } = record;
  const length = Math.max(video.duration_s ?? 0, ...siblings.map(s => s.end_s ?? 0), 0.001);
  const pieces = siblings.map(s => el('button', {
    class: `piece is-${s.status} ${s.clip_id === clip.clip_id ? 'here' : ''}`, title: `${shown(s.start_s)}–${shown(s.end_s)} s, ${s.status}`,
    'aria-label': `clip from ${shown(s.start_s)} s`, onclick: () => actions.open(s.clip_id),
    style: { left: `${100 * (s.start_s ?? 0) / length}%`, width: `${100 * Math.max(0, (s.end_s ?? 0) - (s.start_s ?? 0)) / length}%` } }));
  const number = siblings.length === 1 ? 'the only clip' : `${siblings.length} clips`;
  return el('div', { class: 'lineage' }, el('div', { class: 'muted', title: clip.uri ?? '' }, name(clip.uri)),
    el('div', { class: 'timeline' }, ...pieces), el('div', { class: 'muted' }, `${shown(clip.start_s)}–${shown(clip.end_s)} s of ${shown(video.duration_s)} s, ${number}`));
}

const name = uri => (uri ?? '').split('/').slice(-2).join('/');

function captions({ captions: all, decision }) {
  if (!all.length) return null;
  return section(all.length === 1 ? 'Caption' : `Captions (${all.length})`, true, ...all.map(c => el('div', { class: 'caption-row' },
    el('div', { class: 'muted' }, `${c.style} · ${c.model}${c.caption_id === decision.caption_id ? ' · chosen' : ''} `,
      ...(c.flags ?? []).map(flag => el('span', { class: 'chip' }, flag))),
    c.text !== null ? el('p', {}, c.text) : el('p', { class: 'error' }, `${c.error_kind ?? 'no text'}: ${c.error ?? ''}`),
    c.original ? el('details', {}, el('summary', {}, 'as the model wrote it'), el('p', { class: 'muted' }, c.original)) : null)));
}

function alike({ alike: group, clip }, actions) {
  const others = group.filter(c => c.clip_id !== clip.clip_id);
  if (!others.length) return null;
  const what = c => {
    if (clip.duplicate_of === c.clip_id) return `the better one; ${clip.duplicate_kind} ${shown(clip.duplicate_similarity)}`;
    return c.duplicate_of === clip.clip_id ? `repeats this one; ${c.duplicate_kind} ${shown(c.duplicate_similarity)}` : 'of the same group';
  };
  return section(`Duplicates (${others.length})`, true, el('div', { class: 'alike' }, ...others.map(c => el('button', { class: 'other', onclick: () => actions.open(c.clip_id) },
    el('img', { src: `/thumb/${c.clip_id}.jpg`, alt: '', loading: 'lazy' }), el('span', { class: `dot is-${c.status}` }), what(c)))));
}

function failures(clip) {
  if (!clip.errors?.length) return null;
  return section('Errors', true, ...clip.errors.map(e => el('p', { class: 'error' }, `${e.stage}, ${e.kind}: ${e.message}`)));
}

/** Every column with unit and meaning; those that are shown elsewhere come here in short. */
function table(columns, clip) {
  return el('table', {}, el('tbody', {}, ...columns.map(c => el('tr', { class: clip[c.name] === null ? 'empty' : '' },
    el('th', {}, c.name), el('td', { class: 'value', title: shown(clip[c.name]) }, short(shown(clip[c.name])), c.unit && clip[c.name] !== null ? el('span', { class: 'muted' }, ` ${c.unit}`) : null),
    el('td', { class: 'muted meaning' }, c.meaning + (clip[c.name] === null ? ` (filled by ${c.filled_by})` : ''))))));
}

const short = text => (text.length > 90 ? `${text.slice(0, 88)}…` : text);

function facts(values) {
  const rows = Object.entries(values ?? {}).filter(([, value]) => value !== null && shown(value) !== '–');
  return rows.length ? el('table', {}, el('tbody', {}, ...rows.map(([key, value]) => el('tr', {}, el('th', {}, key), el('td', { class: 'value wide' }, shown(value)))))) : null;
}

const stages = versions => facts(Object.fromEntries((versions ?? []).map(v => [v.stage, v.fingerprint])));

function run({ config, ...rest }) {
  return el('div', { class: 'run' }, facts(rest), el('details', {}, el('summary', {}, 'settings'), el('pre', {}, JSON.stringify(config, null, 1))));
}

function marks(rows) {
  return rows.length ? el('ul', { class: 'history' }, ...rows.map(m => el('li', {}, el('b', {}, m.mark ?? 'cleared'), ` ${m.comment ?? ''} `,
    el('span', { class: 'muted' }, `${m.author}, ${m.created_at}`)))) : null;
}

function losses(rows) {
  if (!rows.length) return null;
  return section('Training loss', el('table', {}, el('tbody', {}, ...rows.map(r => el('tr', {},
    el('th', {}, `${r.run_id} noise ${r.noise_level}`), el('td', { class: 'value' }, `${shown(r.loss)} (${r.count} samples)`))))));
}

/** A part that opens; `true` among its parts: it is open. Nothing where it has no parts. */
function section(title, ...parts) {
  const nodes = parts.filter(part => part && part !== true);
  return nodes.length ? el('details', { class: 'section', open: parts.includes(true) }, el('summary', {}, title), ...nodes) : null;
}
