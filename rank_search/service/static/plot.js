// The front as SVG: every point is a link to its rank map.

const SPACE = { left: 62, right: 16, top: 14, bottom: 44, width: 640, height: 400 };

function made(name, attributes, text) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, String(value));
  if (text !== undefined) element.textContent = text;
  return element;
}

function scale(low, high, from, to) {
  const width = high > low ? high - low : 1;
  return (value) => from + ((value - low) / width) * (to - from);
}

function ticks(low, high, count) {
  return Array.from({ length: count }, (_, index) => low + ((high - low) * index) / (count - 1));
}

export function millions(params) {
  return params >= 1e6 ? `${(params / 1e6).toFixed(2)} M` : params.toLocaleString("en");
}

// Draw anew; focus stays on the point that has it.
export function draw(svg, { study, front, trials, onPoint }) {
  const focused = document.activeElement?.closest?.("#plot a")?.dataset.trial;
  const chosen = svg.querySelector("a.chosen")?.dataset.trial;
  svg.replaceChildren();
  const points = front?.points ?? [];
  if (points.length === 0) {
    svg.append(made("text", { x: 320, y: 200, "text-anchor": "middle" }, "No trial has ended yet."));
    return;
  }
  const losses = points.map((point) => point.loss);
  if (front.dense_loss !== null) losses.push(front.dense_loss);
  const high = Math.max(...losses);
  const low = Math.min(...losses);
  const margin = (high - low || 1) * 0.06;
  const sizes = [...points.map((point) => point.num_params), front.dense_params];
  const least = Math.min(...sizes);
  const most = Math.max(...sizes);
  const spare = (most - least || 1) * 0.03;
  const x = scale(least - spare, most + spare, SPACE.left, SPACE.width - SPACE.right);
  const y = scale(low - margin, high + margin, SPACE.height - SPACE.bottom, SPACE.top);
  axes(svg, x, y, [least, most], [low, high], front.unit);
  if (front.dense_loss !== null) {
    const at = y(front.dense_loss);
    svg.append(made("line", { class: "dense", x1: SPACE.left, x2: SPACE.width - SPACE.right, y1: at, y2: at }));
    svg.append(made("text", { x: SPACE.left + 4, y: at - 4 }, "dense"));
  }
  for (const trial of trials) {
    const isIn = trial.loss !== null && trial.loss <= high + margin && trial.num_params >= least - spare;
    if (isIn) svg.append(made("circle", { class: "trial", cx: x(trial.num_params), cy: y(trial.loss), r: 3 }));
  }
  const steps = points.map((point, index) =>
    index === 0 ? `M${x(point.num_params)},${y(point.loss)}` : `H${x(point.num_params)}V${y(point.loss)}`);
  svg.append(made("path", { class: "steps", d: steps.join("") }));
  for (const point of points) svg.append(link(study, point, x, y, front.unit, onPoint, chosen));
  if (focused !== undefined) svg.querySelector(`a[data-trial="${focused}"]`)?.focus();
}

function link(study, point, x, y, unit, onPoint, chosen) {
  const told = `Trial ${point.trial}: ${millions(point.num_params)} parameters, loss ${point.loss.toFixed(4)}`;
  const anchor = made("a", {
    href: `/v1/studies/${encodeURIComponent(study)}/rank-map?trial=${point.trial}`,
    download: `${study}-trial-${point.trial}.rank_map.json`, tabindex: 0,
    "aria-label": `${told} nats per ${unit}; downloads its rank map`, "data-trial": point.trial,
  });
  if (String(point.trial) === chosen) anchor.classList.add("chosen");
  anchor.append(made("circle", { cx: x(point.num_params), cy: y(point.loss), r: 12, "fill-opacity": 0, stroke: "none" }));
  anchor.append(made("circle", { cx: x(point.num_params), cy: y(point.loss), r: 6 }));
  const show = () => {
    for (const other of anchor.parentNode.querySelectorAll("a.chosen")) other.classList.remove("chosen");
    anchor.classList.add("chosen");
    onPoint(point);
  };
  anchor.addEventListener("pointerenter", show);
  anchor.addEventListener("focus", show);
  return anchor;
}

function axes(svg, x, y, sizes, losses, unit) {
  const bottom = SPACE.height - SPACE.bottom;
  svg.append(made("line", { class: "axis", x1: SPACE.left, x2: SPACE.width - SPACE.right, y1: bottom, y2: bottom }));
  svg.append(made("line", { class: "axis", x1: SPACE.left, x2: SPACE.left, y1: SPACE.top, y2: bottom }));
  for (const size of ticks(...sizes, 4)) {
    svg.append(made("text", { x: x(size), y: bottom + 18, "text-anchor": "middle" }, millions(Math.round(size))));
  }
  for (const loss of ticks(...losses, 5)) {
    svg.append(made("text", { x: SPACE.left - 6, y: y(loss) + 4, "text-anchor": "end" }, loss.toFixed(3)));
  }
  svg.append(made("text", { x: 340, y: SPACE.height - 6, "text-anchor": "middle" }, "parameters"));
  svg.append(made("text", { x: 8, y: 12 }, `loss, nats per ${unit}`));
}
