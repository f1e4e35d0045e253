// What the last decode step read of the slots that are kept, where a policy reads some pages only

function tally(rows) {
  const compressed = rows.filter((_, layer) => !layers[layer].sliding);
  const counted = (compressed.length ? compressed : rows).flat();
  return { rows, counted, heads: rows.map(count), everywhere: count(counted) };
}

function readRows() {
  if (!layers.some((layer) => layer.reads)) return null;
  return layers.map((layer, index) => layer.reads?.map(unpack) ?? rows[index]);
}

// Tokens that are kept but were not read look neither read nor dropped.
function markHeld(kept) {
  for (let position = 0; position < seen; position++) {
    spans[position].toggleAttribute("data-held", kept !== null && kept[position] > 0);
  }
}

function readSummary(total, read, kept) {
  const some = (counts) => counts.reduce((sum, n) => sum + (n > 0), 0);
  const where = total === 1 ? "" : " in at least one row";
  const dropped = seen - some(kept);
  return (
    `${rowsInWords(total)}: the last step read ${number(some(read))} of ${number(some(kept))}` +
    ` tokens that are kept${where}, ${number(dropped)} ${dropped === 1 ? "is" : "are"} dropped.`
  );
}

function readersInWords(layer, position) {
  if (reading === null) return "";
  const row = reading.rows[layer];
  const readers = row.flatMap((one, head) => (keeps(one, position) ? [head] : []));
  return `, read by ${headsOf(readers, row.length)}`;
}

function fillShow() {
  byId("shown").hidden = reading === null;
  byId("show").addEventListener("change", () => {
    shown = byId("show").value === "read" ? reading : held;
    paint();
  });
}
