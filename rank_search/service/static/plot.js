// The front as SVG: every point is a link to its rank map.

const SPACE = { left: 62, right: 16, top: 30, bottom: 44, width: 640, height: 400 };
const MANY = 60;  // points of a front; more are drawn smaller

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

// Draw anew; focus stays on the point that has it. Tab reaches one point, arrow keys the others.
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
  const links = points.map((point) => link(study, point, x, y, front.unit, onPoint, points.length > MANY));
  svg.append(...links);
  const current = links.find((one) => one.dataset.trial === chosen);
  (current ?? links[0]).setAttribute("tabindex", "0");
  if (current !== undefined) choose(current);
  svg.onkeydown = (event) => {
    const at = links.indexOf(event.target);
    const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: links.length - 1 }[event.key];
    if (at < 0 || links[to] === undefined) return;
    event.preventDefault();
    links[to].focus();
  };
  if (focused !== undefined) svg.querySelector(`a[data-trial="${focused}"]`)?.focus();
}

// The chosen point is drawn over all others: as a mark of its own, for a link that moved would lose its focus.
function choose(anchor) {
  const svg = anchor.parentNode;
  for (const other of svg.querySelectorAll("a.chosen")) other.classList.remove("chosen");
  for (const other of svg.querySelectorAll("a[tabindex='0']")) other.setAttribute("tabindex", "-1");
  anchor.classList.add("chosen");
  anchor.setAttribute("tabindex", "0");
  svg.querySelector(".mark")?.remove();
  const dot = anchor.lastElementChild;
  svg.append(made("circle", { class: "mark", cx: dot.getAttribute("cx"), cy: dot.getAttribute("cy"), r: 6 }));
}

function link(study, point, x, y, unit, onPoint, small) {
  const told = `Trial ${point.trial}: ${millions(point.num_params)} parameters, loss ${point.loss.toFixed(4)}`;
  const anchor = made("a", {
    href: `/v1/studies/${encodeURIComponent(study)}/rank-map?trial=${point.trial}`,
    download: `${study}-trial-${point.trial}.rank_map.json`, tabindex: -1,
    "aria-label": `${told} nats per ${unit}; downloads its rank map`, "data-trial": point.trial,
  });
  const place = { cx: x(point.num_params), cy: y(point.loss) };
  anchor.append(made("circle", { ...place, class: "reach", r: small ? 5 : 12 }));
  anchor.append(made("circle", { ...place, class: small ? "small" : "", r: small ? 3 : 6 }));
  const show = () => {
    choose(anchor);
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
  for (const [index, size] of ticks(...sizes, 4).entries()) {
    const anchor = index === 3 ? "end" : "middle";
    const right = index === 3 ? SPACE.width - 4 : x(size);
    svg.append(made("text", { x: right, y: bottom + 18, "text-anchor": anchor }, millions(Math.round(size))));
  }
  for (const loss of ticks(...losses, 5)) {
    svg.append(made("text", { x: SPACE.left - 6, y: y(loss) + 4, "text-anchor": "end" }, loss.toFixed(3)));
  }
  svg.append(made("text", { x: 340, y: SPACE.height - 6, "text-anchor": "middle" }, "parameters"));
  svg.append(made("text", { x: 8, y: 18 }, `loss, nats per ${unit}`));
}
