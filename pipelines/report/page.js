"use strict";

// What is wider than the page scrolls by itself. Its hint is shown, and the keyboard stops at it,
// only while it is wider.
function measure() {
  for (const box of document.querySelectorAll(".wide")) {
    const wide = box.scrollWidth > box.clientWidth;
    box.previousElementSibling.hidden = !wide;
    box.tabIndex = wide ? 0 : -1;
  }
}
for (const event of ["load", "resize"]) addEventListener(event, measure);
document.addEventListener("toggle", measure, true); // a topic was opened; this does not bubble

// The film: one text or more, token by token, after each shown number of denoiser calls.
function play(film) {
  const [slider, shown, button, title, legend, reels] =
    ["call", "shown", "play", "title", "legend", "reels"].map(id => document.getElementById(id));
  const add = (parent, tag, text = "") => {
    const made = parent.appendChild(document.createElement(tag));
    made.textContent = text;
    return made;
  };

  // From masked (paper) over evidence (blue, on the scale of log(1 + SNR)) to revealed (green);
  // letters are fainter where the model is less sure.
  function paint(span, gamma, sure) {
    const share = gamma === null ? 1 : Math.min(Math.log1p(gamma) / Math.log1p(100), 1);
    const colour = gamma === null ? "revealed" : "evidence";
    span.style.background = `color-mix(in oklab, var(--${colour}) ${100 * share}%, transparent)`;
    span.style.color = `color-mix(in srgb, var(--ink) ${30 + 0.7 * sure}%, transparent)`;
  }

  for (const [name, value] of Object.entries(film.title)) {
    add(title, "dt", name);
    add(title, "dd", value);
  }
  for (const [name, gamma] of [["0", 0], ["1", 1], ["10", 10], ["100", 100], ["∞", null]]) {
    paint(add(legend, "span", name), gamma, 100);
  }
  const rows = film.given.map(given => {
    const reel = add(reels, "p");
    reel.className = "reel";
    return given.map(kept => {
      const span = add(reel, "span");
      span.classList.toggle("given", Boolean(kept));
      return span;
    });
  });

  const last = film.frames.length - 1;
  function show(at) {
    const frame = film.frames[at];
    rows.forEach((spans, row) => spans.forEach((span, column) => {
      const gamma = frame.gamma[row][column], sure = frame.sure[row][column];
      span.textContent = film.texts[frame.tokens[row][column]];
      span.title = `SNR ${gamma === null ? "∞" : gamma}, confidence ${sure} %`;
      paint(span, gamma, sure);
    }));
    slider.value = at;
    shown.value = `call ${film.calls[at]} of ${film.calls[last]}`;
    slider.setAttribute("aria-valuetext", shown.value);
  }

  let timer = null;
  function stop() { clearInterval(timer); timer = null; button.textContent = "Play"; }
  function start() {
    if (Number(slider.value) === last) show(0);
    timer = setInterval(step, Math.max(40, Math.min(400, 12000 / film.frames.length)));
    button.textContent = "Pause";
  }
  function step() { if (Number(slider.value) === last) stop(); else show(Number(slider.value) + 1); }
  button.addEventListener("click", () => timer ? stop() : start());
  slider.addEventListener("input", () => { stop(); show(Number(slider.value)); });
  slider.max = last;
  // A film that does not play begins in its middle: at call 0 nothing is decided yet.
  const moves = film.autoplay && !matchMedia("(prefers-reduced-motion: reduce)").matches;
  show(moves ? 0 : last >> 1);
  if (moves) start();
}
const film = document.getElementById("film");
if (film) {
  play(JSON.parse(film.textContent));
  film.parentElement.hidden = false;
}
