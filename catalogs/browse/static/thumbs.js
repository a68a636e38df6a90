// Thumbnails of cards that are in sight, a few at a time: a browser has six connections to a server, and what was asked
// about clips must not wait behind pictures that take a second each.

import { el, get } from './base.js';

const AT_ONCE = 3;

const waiting = new Set(), loading = new Set();
const watcher = new IntersectionObserver(entries => {
  for (const { target, isIntersecting } of entries) waiting[isIntersecting ? 'add' : 'delete'](target);
  next();
}, { rootMargin: '250px' });

/** The picture of a clip, which comes when it is in sight. */
export function thumbnail(id) {
  const picture = el('img', { alt: '', width: 320, height: 180, draggable: 'false', dataset: { clip: id } });
  picture.addEventListener('load', () => done(picture));
  picture.addEventListener('error', () => { done(picture); missing(picture, id); });
  watcher.observe(picture);
  return picture;
}

/** The grid is another: nobody waits for these pictures any more. */
export function forgetThumbnails() {
  watcher.disconnect();
  waiting.clear();
  for (const picture of loading) picture.removeAttribute('src');
  loading.clear();
}

function next() {
  for (const picture of waiting) {
    if (loading.size >= AT_ONCE) return;
    waiting.delete(picture);
    watcher.unobserve(picture);
    loading.add(picture);
    picture.src = `/thumb/${picture.dataset.clip}.jpg`;
  }
}

function done(picture) {
  loading.delete(picture);
  next();
}

/** A placeholder that says why. */
async function missing(picture, id) {
  if (!picture.isConnected) return;
  picture.style.visibility = 'hidden';
  const reason = await get(`/thumb/${id}.jpg`).then(() => 'no picture', error => error.message);
  picture.replaceWith(el('div', { class: 'nothing', title: reason }, 'no picture'));
}
