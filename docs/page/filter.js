// Filters the rows of the ledger, or the sections of the pitfalls. Without JavaScript it stays
// hidden, and everything is there.
const [form, find, lesson, count] = [".filter", "#find", "#lesson", "#count"].map((s) => document.querySelector(s));
const rows = [...document.querySelectorAll("#rows tr[id]")];
const sections = rows.length ? rows.map((row) => [row]) : headings();

// A pitfall is a heading of the second level with all that follows it.
function headings() {
  const found = [];
  for (const part of document.querySelector("article").children) {
    if (part.tagName === "H2") found.push([]);
    if (found.length && part !== form) found.at(-1).push(part);
  }
  return found;
}

function filter() {
  const words = find.value.toLowerCase().split(/\s+/).filter(Boolean);
  let shown = 0;
  for (const section of sections) {
    const text = section.map((part) => part.textContent.toLowerCase()).join(" ");
    const here = !lesson?.value || section[0].dataset.lesson === lesson.value;
    const hidden = !here || !words.every((word) => text.includes(word));
    for (const part of section) part.hidden = hidden;
    shown += !hidden;
  }
  for (const body of document.querySelectorAll("#rows tbody")) body.hidden = !body.querySelector("tr[id]:not([hidden])");
  count.textContent = `${shown} / ${sections.length}`;
  const query = new URLSearchParams({ q: find.value, ...(lesson && { lesson: lesson.value }) });
  history.replaceState(null, "", words.length || lesson?.value ? `?${query}${location.hash}` : location.pathname + location.hash);
}

const asked = new URLSearchParams(location.search);
find.value = asked.get("q") ?? "";
if (lesson) lesson.value = asked.get("lesson") ?? "";
form.hidden = false;
form.addEventListener("input", filter);
form.addEventListener("submit", (event) => event.preventDefault());
filter();
