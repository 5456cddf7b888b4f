// The page: a list of studies, or one study as its events tell it.

import { ask, logIn, send, session } from "/service/api.js";
import { draw, millions } from "/service/plot.js";

const LAST_TRIALS = 30;
const EVERY = 3000;

const at = (id) => document.getElementById(id);
const state = { name: null, told: null, front: null, trials: new Map(), groups: null, point: null, stream: null, timer: null };

function row(cells) {
  const line = document.createElement("tr");
  for (const cell of cells) {
    const place = document.createElement("td");
    place.append(cell ?? "");
    line.append(place);
  }
  return line;
}

function anchor(text, href, download) {
  const found = document.createElement("a");
  found.textContent = text;
  found.href = href;
  if (download) found.download = download;
  return found;
}

const fixed = (value, digits) => (value === null ? "" : value.toFixed(digits));
const path = (name, ...parts) => ["/v1/studies", encodeURIComponent(name), ...parts].join("/");

let teller = null;  // whose message is shown: that of someone's click, or of what is asked again and again

function tell(message, by) {
  at("trouble").textContent = message;
  teller = message === "" ? null : by;
}

async function attempt(action, by = "click") {
  try {
    if (by === "click") tell("", by);
    const found = await action();
    if (teller === by) tell("", by);
    return found;
  } catch (error) {
    if (error.status === 401) showLogin();
    tell(error.message, by);
    return undefined;
  }
}

function fill(id, rows) {
  const place = at(id);
  if (rows.length === 0) {
    rows.push(row(["none yet"]));
    rows[0].cells[0].colSpan = place.parentNode.tHead.rows[0].cells.length;
  }
  place.replaceChildren(...rows);
}

function only(section) {
  for (const id of ["login", "overview", "study"]) at(id).hidden = id !== section;
}

function leave() {
  state.stream?.close();
  clearInterval(state.timer);
  Object.assign(state, { name: null, told: null, front: null, trials: new Map(), groups: null, point: null, stream: null });
}

function showLogin() {
  leave();
  only("login");
  at("token").focus();
}

function showWho(told) {
  at("who").textContent = told.auth ? `${told.name} (${told.role})` : "";
  at("log-out").hidden = !told.auth;
  at("to-dashboard").hidden = !told.dashboard;
  document.body.classList.toggle("read-only", told.role !== "write");
}

// All studies

async function showStudies() {
  const told = await attempt(() => ask("/v1/studies"), "again");
  if (told === undefined) return;
  at("no-studies").hidden = told.studies.length > 0;
  at("studies").replaceChildren(...told.studies.map((study) => row([
    anchor(study.name, `#/${encodeURIComponent(study.name)}`), study.state, `${study.finished} of ${study.wanted}`,
    String(study.front), fixed(study.best_loss, 4), fixed(study.dense_loss, 4),
  ])));
}

// One study

function showProgress() {
  const told = state.told;
  const reason = told.reason ? `: ${told.reason}` : "";
  at("progress").textContent =
    `${told.state}${reason}. ${told.finished} of ${told.wanted.toLocaleString("en")} trials, ${told.front} on the front.`;
  const ends = ["stopping", "stopped", "ended", "given up"].includes(told.state);
  const waits = ["pausing", "paused"].includes(told.state);
  at("pause").disabled = ends || waits;
  at("resume").disabled = ["running", "ended"].includes(told.state);
  at("stop").disabled = ends;
  at("study-dashboard").hidden = !told.dashboard || at("to-dashboard").hidden;
  if (told.dashboard) at("study-dashboard").href = told.dashboard;
  for (const id of ["front-csv", "front-png", "front-json"]) at(id).hidden = told.front === 0;
}

function showFront() {
  draw(at("plot"), { study: state.name, front: state.front, trials: [...state.trials.values()], onPoint: showPoint });
}

function showTrials() {
  const last = [...state.trials.values()].sort((a, b) => b.number - a.number).slice(0, LAST_TRIALS);
  fill("trials", last.map((trial) => row([
    String(trial.number), trial.state, trial.source, trial.num_params === null ? "" : millions(trial.num_params),
    fixed(trial.kept_of_targets, 3), fixed(trial.loss, 4), fixed(trial.seconds, 1),
  ])));
}

function showWorkers(workers) {
  fill("workers", workers.map((worker) => row([
    worker.worker.split(":").slice(0, 2).join(":"), worker.trial === null ? "" : String(worker.trial),
    String(worker.measured), new Date(worker.last).toLocaleTimeString(),
  ])));
}

async function showPoint(point) {
  const name = state.name;
  state.point = point;
  const heading = document.createElement("p");
  heading.textContent = `Trial ${point.trial} (${point.source}): ${millions(point.num_params)} parameters, ` +
    `${(100 * point.kept_of_targets).toFixed(1)} % of the target layers kept, loss ${point.loss.toFixed(4)} ` +
    `± ${point.standard_error.toFixed(4)}.`;
  at("point").replaceChildren(heading);
  at("apply").hidden = false;
  const found = await attempt(
    () => Promise.all([layerGroups(name), ask(`${path(name, "rank-map")}?trial=${point.trial}`)]));
  if (found === undefined || state.name !== name || state.point !== point) return;
  const [groups, file] = found;
  const table = document.createElement("table");
  const head = table.createTHead().insertRow();
  for (const title of ["Layer type", "Ranks", "Dense"]) {
    const cell = document.createElement("th");
    cell.scope = "col";
    cell.textContent = title;
    head.append(cell);
  }
  const body = table.createTBody();
  for (const [group, names] of groups) {
    const ranks = names.map((layer) => file.ranks[layer]).filter((rank) => rank !== undefined);
    const range = ranks.length === 0 ? "" : `${Math.min(...ranks)} to ${Math.max(...ranks)}`;
    body.append(row([group, range, `${names.length - ranks.length} of ${names.length}`]));
  }
  at("point").replaceChildren(heading, table);
}

async function layerGroups(name) {
  if (state.groups === null) {
    const { layers } = await ask(path(name, "layers"));
    const groups = new Map();
    for (const layer of layers) groups.set(layer.group, [...(groups.get(layer.group) ?? []), layer.name]);
    if (state.name === name) state.groups = groups;
    return groups;
  }
  return state.groups;
}

async function showJobs() {
  const name = state.name;
  const told = await attempt(() => ask(`/v1/jobs?study=${encodeURIComponent(name)}`), "again");
  if (told === undefined || state.name !== name) return;
  fill("jobs", told.jobs.map((job) => row([
    `${job.number} (${job.kind})`, String(job.trial), job.reason ? `${job.state}: ${job.reason}` : job.state,
    job.state === "done" ? anchor("tar", `/v1/jobs/${job.number}/checkpoint`, `${name}-trial-${job.trial}.tar`) : "",
  ])));
}

function showStudy(name) {
  only("study");
  at("details").hidden = true;  // until it is known that there is such a study
  at("study-heading").textContent = name;
  at("point").replaceChildren();
  at("apply").hidden = true;
  for (const kind of ["csv", "png"]) at(`front-${kind}`).href = path(name, `front.${kind}`);
  at("front-json").href = path(name, "front");
  for (const kind of ["csv", "png", "json"]) at(`front-${kind}`).download = `${name}-front.${kind}`;
  for (const id of ["trials", "workers", "jobs"]) at(id).replaceChildren();
  at("progress").textContent = "";
  at("plot").replaceChildren();
  state.name = name;
  state.stream = new EventSource(path(name, "events"));
  const on = (kind, handle) => state.stream.addEventListener(kind, (event) => handle(JSON.parse(event.data)));
  on("study", (told) => {
    state.told = told;
    at("details").hidden = false;
    showProgress();
  });
  on("front", (front) => { state.front = front; showFront(); });
  on("points", ({ added, removed }) => {
    const gone = new Set([...removed, ...added.map((point) => point.trial)]);
    const points = [...state.front.points.filter((point) => !gone.has(point.trial)), ...added];
    state.front = { ...state.front, points: points.sort((a, b) => a.num_params - b.num_params) };
    showFront();
  });
  on("trials", (trials) => {
    for (const trial of trials) state.trials.set(trial.number, trial);
    showTrials();
    showFront();
  });
  on("workers", showWorkers);
  state.stream.onerror = () => attempt(() => ask(path(name)), "stream");  // tells why; the browser tries again
  state.stream.onopen = () => { if (teller === "stream") tell("", "stream"); };
  state.timer = setInterval(showJobs, EVERY);
  showJobs();
}

async function follow() {
  if (location.hash === "#main") return;  // the skip link
  leave();
  tell("", "click");
  if (location.hash.startsWith("#/")) {
    showStudy(decodeURIComponent(location.hash.slice(2)));
  } else {
    only("overview");
    await showStudies();
    state.timer = setInterval(showStudies, EVERY);
  }
}

async function begin() {
  const told = await attempt(session);
  if (told === undefined) return;
  showWho(told);
  await follow();
}

at("login-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  const told = await attempt(() => logIn(at("token").value));
  at("token").value = "";
  if (told === undefined) return;
  showWho(told);
  await follow();
});
at("log-out").addEventListener("click", async () => {
  await attempt(() => ask("/v1/session", { method: "DELETE" }));
  showLogin();
});
at("submit-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  const told = await attempt(() => ask("/v1/studies", { method: "POST", body: at("file").value, type: "application/toml" }));
  if (told === undefined) return;
  at("file").value = "";
  location.hash = `#/${encodeURIComponent(told.name)}`;
});
for (const verb of ["pause", "resume", "stop"]) {
  at(verb).addEventListener("click", () => attempt(() => ask(path(state.name, verb), { method: "POST" })));
}
at("apply").addEventListener("click", async () => {
  await attempt(() => send("/v1/jobs", { kind: "apply", study: state.name, trial: state.point.trial }));
  await showJobs();
});
window.addEventListener("hashchange", follow);
begin();
