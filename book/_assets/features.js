// The list of features: show only rows that hold a text.
document.getElementById("nb-filter").addEventListener("input", (event) => {
  const wanted = event.target.value.toLowerCase();
  for (const table of document.querySelectorAll("table.nb-sortable"))
    for (const row of table.tBodies[0].rows)
      row.hidden = !row.textContent.toLowerCase().includes(wanted);
});
