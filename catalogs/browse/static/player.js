// Plays one clip in a loop, without cutting it from its film: only the span's time is shown.

import { el, get } from './base.js';

const NEAR_END_S = 0.04;

/** A player for `media` as the server describes it: kind, src, fallback, start, end (seconds of the file; null: all of it). */
export function player(media, onnote) {
  if (media.kind === 'image') {
    const picture = el('img', { class: 'still', src: media.src, alt: 'the picture' });
    picture.addEventListener('error', () => { picture.src = media.fallback; }, { once: true });
    return { node: el('div', { class: 'player' }, picture), toggle() {}, stop() {} };
  }
  const video = el('video', { playsinline: true, preload: 'auto', tabindex: -1 });
  video.muted = true;
  const button = el('button', { class: 'quiet', 'aria-label': 'Play or pause', onclick: toggle }, '▶');
  const sound = el('button', { class: 'quiet', 'aria-label': 'Sound', title: 'Sound', onclick: () => { video.muted = !video.muted; label(); } }, 'sound off');
  const seek = el('input', { type: 'range', min: 0, max: 1, step: 0.001, value: 0, 'aria-label': 'Position in the clip' });
  const clock = el('span', { class: 'mono muted' });
  const speed = el('select', { 'aria-label': 'Speed', onchange: () => { video.playbackRate = +speed.value; } },
    ...[0.25, 0.5, 1, 2].map(rate => el('option', { value: rate, selected: rate === 1 }, `${rate}×`)));
  const wait = el('div', { class: 'wait' }, 'loading…');
  let start = 0, end = null, stopped = false, fellBack = false;

  const last = () => end ?? (Number.isFinite(video.duration) ? video.duration : 0);
  const again = () => { video.currentTime = start; };

  function label() {
    button.textContent = video.paused ? '▶' : '❚❚';
    sound.textContent = video.muted ? 'sound off' : 'sound on';
    const length = Math.max(0.001, last() - start), at = Math.max(0, video.currentTime - start);
    seek.value = at / length;
    clock.textContent = `${Math.min(at, length).toFixed(2)} / ${length.toFixed(2)} s`;
  }

  /** Back to the start where the span ends: a fragment's end pauses once, and does not loop. */
  function watch(time) {
    if (end !== null && time >= end - NEAR_END_S) again();
    label();
  }

  function everyFrame(_, frame) {
    if (stopped) return;
    watch(frame.mediaTime);
    video.requestVideoFrameCallback(everyFrame);
  }

  function load(source, from, to) {
    [start, end] = [from, to];
    video.src = to === null ? source : `${source}#t=${from.toFixed(6)},${to.toFixed(6)}`;
    play();
  }

  function play() {
    video.play().catch(error => { if (error.name === 'NotAllowedError') label(); });
  }

  function toggle() {
    if (video.paused) play();
    else video.pause();
  }

  async function failed() {
    if (stopped) return;
    if (media.fallback && !fellBack) {
      fellBack = true;
      onnote('this browser cannot play the source: showing a transcode');
      load(media.fallback, 0, null);
      return;
    }
    wait.textContent = await get(video.src.split('#')[0]).then(() => 'this clip cannot be played', error => error.message);
    wait.hidden = false;
  }

  video.addEventListener('error', failed);
  video.addEventListener('playing', () => { wait.hidden = true; label(); });
  video.addEventListener('loadeddata', () => { wait.hidden = true; if (video.currentTime < start) again(); label(); });
  video.addEventListener('timeupdate', () => watch(video.currentTime));
  video.addEventListener('ended', () => { again(); play(); });
  video.addEventListener('pause', () => {
    label();
    if (!stopped && end !== null && video.currentTime >= end - 2 * NEAR_END_S) { again(); play(); }
  });
  video.addEventListener('click', toggle);
  seek.addEventListener('input', () => { video.currentTime = start + seek.value * (last() - start) * 0.999; });
  if (video.requestVideoFrameCallback) video.requestVideoFrameCallback(everyFrame);
  load(media.src, media.start ?? 0, media.end ?? null);
  return {
    node: el('div', { class: 'player' }, el('div', { class: 'screen' }, video, wait), el('div', { class: 'controls' }, button, seek, clock, speed, sound)),
    toggle,
    stop() { stopped = true; video.removeAttribute('src'); video.load(); },
  };
}
