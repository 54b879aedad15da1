// Remembers the language that was chosen, and opens each page in it. Without JavaScript the links at
// the top do the same, page by page.
const choices = [...document.querySelectorAll(".languages a")];

function remembered() {
  try {
    return localStorage.getItem("language");
  } catch {
    return null; // a browser may forbid it
  }
}

for (const link of choices) {
  link.addEventListener("click", () => {
    link.hash = location.hash;
    try {
      localStorage.setItem("language", link.lang);
    } catch {
      // then it is not remembered
    }
  });
}
const wanted = choices.find((link) => link.lang === remembered());
if (wanted && wanted.lang !== document.documentElement.lang) {
  wanted.hash = location.hash;
  location.replace(wanted.href);
}
