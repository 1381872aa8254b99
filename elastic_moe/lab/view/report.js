// Sorting, filtering and highlighting. The page is complete without it.
"use strict";
(() => {
  const root = document.documentElement;
  const table = document.getElementById("points");
  const body = table.tBodies[0];
  const rows = [...body.rows];
  const headings = [...table.tHead.rows[0].cells];
  const dots = [...document.querySelectorAll(".dot")];

  // Numbers by size, names by letters and numbers in them; what was not measured goes last.
  const compare = (a, b, down) => {
    if (a === "" || b === "") return (a === "") - (b === "");
    const x = Number(a), y = Number(b);
    const order = Number.isNaN(x) || Number.isNaN(y)
      ? a.localeCompare(b, "en", { numeric: true }) : x - y;
    return down ? -order : order;
  };
  headings.forEach((heading, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...heading.childNodes);
    heading.append(button);
    button.addEventListener("click", () => {
      const down = heading.getAttribute("aria-sort") === "ascending";
      headings.forEach((other) => other.removeAttribute("aria-sort"));
      heading.setAttribute("aria-sort", down ? "descending" : "ascending");
      const key = (row) => row.cells[column].dataset.key;
      body.append(...rows.sort((a, b) => compare(key(a), key(b), down)));
    });
  });

  const search = document.getElementById("search");
  const onlyPareto = document.getElementById("only-pareto");
  const onlyTrained = document.getElementById("only-trained");
  const filter = () => {
    const words = search.value.toLowerCase().split(/\s+/);
    let shown = 0;
    for (const row of rows) {
      const name = row.dataset.name.toLowerCase();
      row.hidden = !words.every((word) => name.includes(word))
        || (onlyPareto.checked && !("pareto" in row.dataset))
        || (onlyTrained.checked && "untrained" in row.dataset);
      shown += !row.hidden;
      for (const dot of dots) {
        if (dot.dataset.point === row.dataset.point) dot.classList.toggle("dim", row.hidden);
      }
    }
    document.getElementById("shown").textContent = `${shown} of ${rows.length} shown`;
  };
  for (const input of [search, onlyPareto, onlyTrained]) input.addEventListener("input", filter);
  filter();

  // The same sub-network in both panels and in the table.
  const mark = (point, on) => {
    for (const element of [...dots, ...rows]) {
      if (element.dataset.point === point) element.classList.toggle("hot", on);
    }
  };
  for (const element of [...dots, ...rows]) {
    element.addEventListener("pointerenter", () => mark(element.dataset.point, true));
    element.addEventListener("pointerleave", () => mark(element.dataset.point, false));
  }
  for (const dot of dots) {
    dot.addEventListener("click", () => {
      const row = rows.find((r) => r.dataset.point === dot.dataset.point);
      if (row && !row.hidden) row.scrollIntoView({ block: "center" });
    });
  }

  document.getElementById("download").addEventListener("click", () => {
    const text = document.getElementById("sweep").textContent;
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
    link.download = "sweep.json";
    link.click();
    URL.revokeObjectURL(link.href);
  });
  root.classList.add("js");
})();
