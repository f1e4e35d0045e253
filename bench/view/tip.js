// What the pointer is at

function showTip(event, text) {
  const tip = byId("tip");
  tip.textContent = text;
  tip.hidden = false;
  const { offsetWidth: width, offsetHeight: height } = tip;
  const below = event.clientY + 18 + height < window.innerHeight;
  tip.style.left = `${Math.max(4, Math.min(event.clientX + 12, window.innerWidth - width - 4))}px`;
  tip.style.top = `${below ? event.clientY + 18 : event.clientY - height - 12}px`;
}

function point(position) {
  document.querySelector(".here")?.classList.remove("here");
  spans[position].classList.add("here");
  const { width, bottom } = mapSize();
  const cursor = byId("cursor");
  cursor.hidden = position >= seen;
  cursor.style.cssText = `left:${LEFT + ((position + 0.5) / seen) * width}px;top:${TOP}px;height:${bottom - TOP}px`;
}

function away() {
  document.querySelector(".here")?.classList.remove("here");
  byId("tip").hidden = byId("cursor").hidden = true;
}

for (const panel of document.querySelectorAll(".tokens")) {
  panel.addEventListener("pointermove", (event) => {
    const span = event.target.closest(".tokens > span");
    if (!span) return away();
    const position = spans.indexOf(span);
    point(position);
    showTip(event, describe(position));
  });
  panel.addEventListener("pointerleave", away);
}

canvas.addEventListener("pointermove", (event) => {
  const cell = cellAt(event);
  if (!cell) return away();
  point(cell.first);
  showTip(event, describeCell(cell));
});
canvas.addEventListener("pointerleave", away);
canvas.addEventListener("click", (event) => {
  const cell = cellAt(event);
  if (!cell) return;
  choose(cell.layer, null);
  const span = spans[cell.first], panel = span.parentElement;
  panel.scrollTo({ top: span.offsetTop - panel.clientHeight / 2, behavior: "smooth" });
});
