// The slides' keys. Without JavaScript the links at the foot of each slide do the same.
const slides = [...document.querySelectorAll(".slide")];

function current() {
  const middle = innerHeight / 2;
  const at = slides.findIndex((slide) => slide.getBoundingClientRect().bottom > middle);
  return at < 0 ? slides.length - 1 : at;
}

addEventListener("keydown", (event) => {
  if (event.altKey || event.ctrlKey || event.metaKey) return;
  const step = { ArrowRight: 1, ArrowDown: 1, PageDown: 1, " ": 1, ArrowLeft: -1, ArrowUp: -1, PageUp: -1 }[event.key];
  if (!step || event.target.closest("pre, input, select")) return;
  event.preventDefault();
  const to = slides[Math.min(slides.length - 1, Math.max(0, current() + step))];
  history.replaceState(null, "", `#${to.id}`);
  to.scrollIntoView();
  to.focus({ preventScroll: true });
});
