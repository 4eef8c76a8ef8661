"use strict";
// A click on a column's head sorts by it, a second one the other way round; what was not measured stays last.
const keyOf = (row, column) => {
  const cell = row.cells[column];
  if (cell.dataset.key === undefined) return cell.textContent;
  return cell.dataset.key === "" ? null : Number(cell.dataset.key);
};
const compare = (a, b) => typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), "en", {numeric: true});
for (const button of document.querySelectorAll("thead button")) {
  button.addEventListener("click", () => {
    const head = button.closest("th"), body = head.closest("table").tBodies[0];
    const down = head.getAttribute("aria-sort") === "ascending";
    for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const rows = Array.from(body.rows, row => ({row, key: keyOf(row, head.cellIndex)}));
    rows.sort((a, b) => a.key === null || b.key === null ? (a.key === null) - (b.key === null) : (down ? -1 : 1) * compare(a.key, b.key));
    body.append(...rows.map(({row}) => row));
  });
}
// A row is shown where it holds all the words of the filter; the page is whole without this script, so it is hidden till now.
for (const input of document.querySelectorAll("input[type=search]")) {
  const block = input.closest(".table"), body = block.querySelector("tbody"), said = block.querySelector("output");
  input.closest(".tools").hidden = false;
  input.addEventListener("input", () => {
    const words = input.value.toLowerCase().split(/\s+/).filter(Boolean), rows = Array.from(body.rows);
    for (const row of rows) {
      const text = Array.from(row.cells, cell => cell.textContent.toLowerCase()).join(" ");
      row.hidden = !words.every(word => text.includes(word));
    }
    said.textContent = words.length ? `${rows.filter(row => !row.hidden).length} of ${rows.length} rows` : "";
  });
}
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach(each => { each.open = true; }));
