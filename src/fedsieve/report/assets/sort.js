// Numbers sort from the largest on, names from the first letter on; a second click turns that round. What lacks is last.
for (const table of document.querySelectorAll("table.sorts")) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  const key = (row, i) => {
    const data = row.cells[i].querySelector("data");
    return data ? Number(data.value) : heads[i].className ? NaN : row.cells[i].textContent.trim();
  };
  const order = (a, b) =>
    typeof a === "string" ? a.localeCompare(b, undefined, {numeric: true}) : a - b;
  heads.forEach((head, i) => {
    const button = document.createElement("button");
    button.append(...head.childNodes);
    head.append(button);
    button.onclick = () => {
      const now = head.getAttribute("aria-sort");
      const up = now ? now === "descending" : !head.className;
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      body.append(...[...body.rows].sort((one, two) => {
        const a = key(one, i), b = key(two, i), lacking = (a !== a) - (b !== b);
        return lacking || a !== a ? lacking : up ? order(a, b) : order(b, a);
      }));
    };
  });
}
