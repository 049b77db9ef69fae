// The list of features: show only rows that hold a text, and sort by a column.
const tables = document.querySelectorAll("table.nb-sortable");

document.getElementById("nb-filter").addEventListener("input", (event) => {
  const wanted = event.target.value.toLowerCase();
  for (const table of tables)
    for (const row of table.tBodies[0].rows)
      row.hidden = !row.textContent.toLowerCase().includes(wanted);
});

const key = (cell) => {
  const number = parseFloat(cell.textContent.replace("−", "-").match(/[-+]?\d[\d.]*/)?.[0]);
  return [Number.isNaN(number) ? Infinity : number, cell.textContent];
};

for (const table of tables)
  for (const head of table.tHead.rows[0].cells) {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") !== "ascending";
      const rows = [...table.tBodies[0].rows].map((row) => [key(row.cells[head.cellIndex]), row]);
      const numbers = ["feature", "alone", "detection", "again"].includes(button.textContent);
      rows.sort(([a], [b]) => (numbers && a[0] !== b[0] ? a[0] - b[0] : a[1].localeCompare(b[1])));
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      table.tBodies[0].append(...(up ? rows : rows.reverse()).map(([, row]) => row));
    });
  }
