// What every part of the page uses: making elements, asking the server, showing numbers and messages.

const token = document.querySelector('meta[name="datakit-token"]').content;

export const $ = (selector, root = document) => root.querySelector(selector);

/** Make an element. Text always goes in as text, never as HTML: captions come from anywhere. */
export function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith('on')) node.addEventListener(name.slice(2), value);
    else if (name === 'dataset') Object.assign(node.dataset, value);
    else if (name === 'style') for (const [property, text] of Object.entries(value)) node.style.setProperty(property, text);
    else node.setAttribute(name, value === true ? '' : value);
  }
  node.append(...children.filter(child => child !== null && child !== undefined && child !== false));
  return node;
}

/** GET JSON; errors carry the server's sentence. */
export async function get(path, parameters = {}, signal) {
  const given = Object.entries(parameters).filter(([, value]) => value !== null && value !== undefined && value !== '');
  const query = new URLSearchParams(given).toString();
  return answer(await fetch(query ? `${path}?${query}` : path, { signal }));
}

/** POST JSON with the page's token. */
export async function post(path, body) {
  return answer(await fetch(path, {
    method: 'POST', body: JSON.stringify(body), headers: { 'Content-Type': 'application/json', 'X-Datakit-Token': token },
  }));
}

async function answer(response) {
  const data = await response.json().catch(() => ({ error: `the server answered ${response.status}` }));
  if (!response.ok) throw new Error(data.error ?? `the server answered ${response.status}`);
  return data;
}

/** A message that goes by itself. */
export function toast(text, kind = '') {
  const node = el('div', { class: `toast ${kind}` }, text);
  $('#toasts').append(node);
  setTimeout(() => node.remove(), kind === 'bad' ? 8000 : 3000);
}

/** Run something that a person asked for; what fails is told. */
export async function told(action) {
  try {
    return await action();
  } catch (error) {
    if (error.name !== 'AbortError') toast(error.message, 'bad');
    return undefined;
  }
}

export async function copy(text) {
  await navigator.clipboard.writeText(text);
  toast('copied');
}

export function debounced(action, milliseconds) {
  let timer;
  return (...values) => {
    clearTimeout(timer);
    timer = setTimeout(() => action(...values), milliseconds);
  };
}

export const count = number => number.toLocaleString('en');

export function hours(value) {
  if (value >= 10) return `${value.toLocaleString('en', { maximumFractionDigits: 0 })} h`;
  if (value >= 1) return `${value.toFixed(1)} h`;
  return value >= 1 / 60 ? `${(value * 60).toFixed(1)} min` : `${(value * 3600).toFixed(1)} s`;
}

/** A value as people read it. */
export function shown(value) {
  if (value === null || value === undefined) return '–';
  if (typeof value === 'number') return Number.isInteger(value) ? String(value) : String(+value.toPrecision(4));
  if (Array.isArray(value)) return value.length ? value.map(shown).join(', ') : '–';
  if (typeof value === 'object') return Object.entries(value).map(([name, part]) => `${name}=${shown(part)}`).join(' ');
  return String(value);
}

/** A dialog with a title; gives the function that closes it. */
export function openDialog(title, ...content) {
  const dialog = $('#dialog');
  const close = () => dialog.close();
  dialog.replaceChildren(
    el('header', {}, el('h2', {}, title), el('button', { class: 'quiet', onclick: close, 'aria-label': 'Close' }, '✕')), ...content);
  if (!dialog.open) dialog.showModal();
  return close;
}

/**
 * Ask something. Gives the chosen value, null when the dialog was closed.
 * @param answers of [value, text, class] for the buttons.
 */
export function asked(title, text, answers) {
  return new Promise(resolve => {
    let chosen = null;
    const close = openDialog(title, el('p', {}, text), el('div', { class: 'buttons' },
      ...answers.map(([value, label, kind]) => el('button', { class: kind, onclick: () => { chosen = value; close(); } }, label))));
    $('#dialog').addEventListener('close', () => resolve(chosen), { once: true });
  });
}
