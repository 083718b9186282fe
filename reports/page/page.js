"use strict";
// What the page does beyond standing there: headings that sort (sortable.min.js), a filter for each longer table, and
// a switch between light and dark. Without scripts the page shows the same numbers.
(() => {
  const root = document.documentElement;
  const stored = (value) => {
    try {
      if (value) localStorage.setItem("lamabench-theme", value);
      return localStorage.getItem("lamabench-theme");
    } catch {
      return null; // a browser may refuse storage to files
    }
  };
  const toggle = document.createElement("button");
  const system = matchMedia("(prefers-color-scheme: dark)");
  const theme = () => root.dataset.theme || (system.matches ? "dark" : "light");
  const other = () => (theme() === "dark" ? "light" : "dark");
  const label = () => { toggle.textContent = other() === "dark" ? "Dark" : "Light"; };
  const last = stored();
  if (last === "dark" || last === "light") root.dataset.theme = last;
  toggle.id = "theme";
  toggle.type = "button";
  toggle.title = "Switch between light and dark";
  toggle.addEventListener("click", () => {
    root.dataset.theme = stored(other()) || other();
    label();
  });
  system.addEventListener("change", label);
  label();
  document.querySelector("header").append(toggle);

  for (const table of document.querySelectorAll("table.sortable")) {
    for (const heading of table.tHead.rows[0].cells) {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...heading.childNodes);
      heading.append(button);
    }
    const rows = [...table.tBodies[0].rows];
    if (rows.length < 4) continue;
    const words = (row) => [...row.cells].map((cell) => cell.textContent).concat(row.dataset.words).join(" ");
    const text = new Map(rows.map((row) => [row, words(row).toLowerCase()]));
    const box = document.createElement("div");
    const field = document.createElement("input");
    const count = document.createElement("output");
    box.className = "filter";
    field.type = "search";
    field.placeholder = "Filter rows: family, study, …";
    field.setAttribute("aria-label", `Filter the rows of: ${table.caption.textContent.trim()}`);
    field.setAttribute("list", "words");
    field.autocomplete = "off";
    field.addEventListener("input", () => {
      const wanted = field.value.toLowerCase().split(/\s+/).filter(Boolean);
      let shown = 0;
      for (const row of rows) {
        row.hidden = !wanted.every((word) => text.get(row).includes(word));
        shown += row.hidden ? 0 : 1;
      }
      count.value = wanted.length ? `${shown} of ${rows.length} rows` : "";
    });
    box.append(field, count);
    table.parentElement.before(box);
  }
})();
