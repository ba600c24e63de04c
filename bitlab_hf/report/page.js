"use strict";
// Shows the values at the step under the pointer.
for (const holder of document.querySelectorAll("script[data-for]")) {
  const svg = document.getElementById(holder.dataset.for);
  const data = JSON.parse(holder.textContent);
  const [left, top, width, height] = data.box;
  const [low, high] = data.x;
  const rule = document.createElementNS("http://www.w3.org/2000/svg", "line");
  rule.setAttribute("class", "rule");
  rule.setAttribute("y1", top);
  rule.setAttribute("y2", top + height);
  const tip = document.createElement("div");
  tip.className = "tip";
  const hide = () => { rule.remove(); tip.remove(); };
  svg.addEventListener("pointerleave", hide);
  svg.addEventListener("pointermove", (event) => {
    const frame = svg.getBoundingClientRect();
    const zoom = svg.viewBox.baseVal.width / frame.width;
    const step = low + ((event.clientX - frame.left) * zoom - left) / width * (high - low);
    const near = (points) => points.reduce(
      (best, point) => Math.abs(point[0] - step) < Math.abs(best[0] - step) ? point : best);
    const lines = data.lines.filter((line) => line.points.length);
    if (!lines.length || step < low || step > high) { hide(); return; }
    const at = near(lines.flatMap((line) => line.points))[0];
    const across = left + (at - low) / (high - low) * width;
    rule.setAttribute("x1", across);
    rule.setAttribute("x2", across);
    svg.append(rule);
    tip.replaceChildren(row(null, `step ${Math.round(at)}`, ""));
    for (const line of lines) {
      const point = near(line.points);
      if (Math.abs(point[0] - at) < 0.01) tip.append(row(line.style, line.name, point[2]));
    }
    if (data.level) tip.append(row("level", data.level[0], data.level[1]));
    svg.parentElement.append(tip);
    const shift = across / zoom > frame.width / 2 ? -tip.offsetWidth - 12 : 12;
    tip.style.left = `${svg.offsetLeft + across / zoom + shift}px`;
    tip.style.top = `${svg.offsetTop + top / zoom + 8}px`;
  });
}

function row(style, name, value) {
  const line = document.createElement("div");
  if (style) {
    const mark = document.createElement("i");
    mark.className = style;
    line.append(mark);
  }
  line.append(value === "" ? name : `${name}: ${value}`);
  return line;
}
