// Tables marked nb-sortable: a click, or a key, on the name of a column sorts its rows.
document.addEventListener("DOMContentLoaded", () => {
  const text = (row, i) => row.cells[i].textContent.trim().replace("−", "-");
  const number = (said) => parseFloat(said.match(/[-+]?\d[\d.]*/)?.[0]);

  for (const table of document.querySelectorAll("table.nb-sortable")) {
    const rows = [...table.tBodies[0].rows];
    for (const head of table.tHead.rows[0].cells) {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => {
        const i = head.cellIndex, up = head.getAttribute("aria-sort") !== "ascending";
        // Numbers are what most cells begin or end with; a cell without one stays at the end.
        const many = rows.filter((row) => /^[-+]?\d|\d\s*%?$/.test(text(row, i))).length > rows.length / 2;
        const none = (row) => (many ? Number.isNaN(number(text(row, i))) : !text(row, i));
        const order = (a, b) => (many ? number(text(a, i)) - number(text(b, i)) : text(a, i).localeCompare(text(b, i)));
        const sorted = rows.filter((row) => !none(row)).sort((a, b) => (up ? order(a, b) : order(b, a)));
        for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
        head.setAttribute("aria-sort", up ? "ascending" : "descending");
        table.tBodies[0].append(...sorted, ...rows.filter(none));
      });
    }
  }
});
