const token = document.querySelector("meta[name=datakit-token]").content;
const at = (selector) => document.querySelector(selector);
const figures = [...document.querySelectorAll("figure")];
const keys = { ArrowLeft: "left", ArrowRight: "right", " ": "tie" };
let pairs = [], here = 0, before = 0, busy = false;

const ask = async (path, body) => {
  const how = body && { method: "POST", headers: { "Content-Type": "application/json", "X-Datakit-Token": token }, body: JSON.stringify(body) };
  const answer = await fetch(path, how);
  const told = await answer.json();
  if (!answer.ok) throw new Error(told.error || answer.statusText);
  return told;
};

const complain = (text) => {
  at("#error").hidden = !text;
  at("#error").textContent = text;
};

const show = () => {
  const over = here >= pairs.length, all = before + pairs.length;
  at("#count").textContent = `${before + here} of ${all}`;
  at("#judged").style.width = `${all ? (100 * (before + here)) / all : 100}%`;
  at("#work").hidden = over;
  at("#end").hidden = !over;
  document.body.dataset.pair = over ? "" : pairs[here].pair;
  if (over) return;
  at("#prompt").textContent = pairs[here].prompt || "(no prompt)";
  for (const figure of figures) {
    const video = figure.querySelector("video");
    figure.classList.remove("chosen");
    figure.querySelector(".problem").hidden = true;
    video.hidden = false;
    video.src = `/video/${pairs[here].pair}/${figure.dataset.side}`;
  }
};

const choose = async (choice) => {
  if (busy || here >= pairs.length) return;
  busy = true;
  figures.forEach((figure) => figure.classList.toggle("chosen", choice === figure.dataset.side));
  try {
    await ask("/api/vote", { pair: pairs[here].pair, choice });
    complain("");
    here += 1;
    show();
  } catch (e) {
    complain(`The vote was not saved: ${e.message}`);
  }
  busy = false;
};

const replay = () => figures.forEach((figure) => { const v = figure.querySelector("video"); v.currentTime = 0; v.play(); });

for (const figure of figures) {
  figure.addEventListener("click", () => choose(figure.dataset.side));
  const video = figure.querySelector("video");
  video.addEventListener("error", () => {
    if (!video.getAttribute("src")) return;
    video.hidden = true;
    figure.querySelector(".problem").hidden = false;
    figure.querySelector(".problem").textContent = "This video cannot be played.";
  });
}
document.querySelectorAll("button[data-choice]").forEach((button) => button.addEventListener("click", () => { button.blur(); choose(button.dataset.choice); }));
addEventListener("keydown", (event) => {
  if (event.repeat || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key in keys) choose(keys[event.key]);
  else if (event.key === "r") replay();
  else if (event.key === "Backspace" && here > 0 && !busy) { here -= 1; show(); }
  else return;
  event.preventDefault();
});

try {
  const told = await ask("/api/pairs");
  pairs = told.pairs;
  before = told.all - pairs.length;
  show();
} catch (e) {
  complain(e.message);
}
document.body.dataset.ready = "1";
