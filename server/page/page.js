// Type or draw, and the picture follows. No build: these modules are what the browser runs.

import { choose, dice, model, moveSteps, offer, read, showModel, showValues, steer, steerable, steerableModel, write } from "./knobs.js";
import { ms, showQueue, showTimes } from "./meter.js";
import { Pad } from "./pad.js";
import { Past } from "./past.js";
import { Session } from "./session.js";

const $ = (id) => document.getElementById(id);
const EXAMPLES = [
  "a large red circle above a small blue square on a gray background",
  "two green triangles on a pink background",
  "a yellow star to the left of a purple ring",
  "a small white cross, a large black square and an orange circle",
];
const REST_MS = 1200; // so long after the last change a picture is worth keeping
const LOSSLESS_PIXELS = 256 * 256;
let shown = null; // what the picture in the page was asked with
let resting = 0;

const pad = new Pad($("pad"), $("colours"), (what) => { if (what === "stroke") changed(); else setRubber(false); });
const past = new Past($("past"), (entry) => goBack(entry));
const session = new Session(compose, heard, (state) => ({ ready, lost, refused })[state]());

async function connect() {
  const key = sessionStorage.getItem("fewstep.key");
  const reply = await fetch("/v1/info", { headers: key ? { Authorization: `Bearer ${key}` } : {} });
  const info = await reply.json().catch(() => null);
  $("key-form").hidden = reply.status !== 401;
  if (!reply.ok || !info) throw new Error(info?.error?.message ?? `the server answered ${reply.status}`);
  offer(info.models);
  $("draw").disabled = !info.models.some(steerable);
  $("draw").title = $("draw").disabled ? "None of the served models follows drawings" : "Draw, and the picture follows the pen";
  showError("");
  showSteer();
  session.open(key);
}

function tryToConnect() {
  connect().catch((error) => {
    $("server").textContent = "not connected";
    showError(error instanceof TypeError ? "the server cannot be reached; is it running?" : error.message);
  });
}

function ready() { $("server").textContent = "live"; showError(""); }
function lost() { $("server").textContent = "connection lost, trying again"; setBusy(false); }
function refused() { $("server").textContent = "not connected"; setBusy(false); }

// What the socket sends: the settings, and the drawing where there is one.
async function compose() {
  try {
    const asked = read();
    if (!asked.prompt) return null;
    const { spec } = model(), [width, height] = spec.sizes[0];
    const header = { ...asked, format: width * height <= LOSSLESS_PIXELS ? "png" : "webp" };
    if (!drawing() || pad.empty) return { header, asked };
    const way = steer();
    asked[way] = way === "control" ? { scale: Number($("scale").value) } : { strength: Number($("strength").value) };
    header[way] = { ...asked[way] };
    if (way === "control" && spec.control_kinds?.length) header.control.kind = lineKind(spec.control_kinds);
    asked.strokes = structuredClone(pad.strokes);
    return { header, asked, picture: await pad.file(width, height) };
  } catch (error) {
    setBusy(false);
    showError(error.message);
    return null;
  }
}

const drawing = () => $("draw").getAttribute("aria-pressed") === "true" && steerable(model());
const lineKind = (kinds) => ["scribble", "sketch", "lineart", "canny"].find((kind) => kinds.includes(kind)) ?? kinds[0];

function heard(message, picture, asked, tookMs) {
  if (message.dropped !== undefined) showQueue(message.ahead ?? 0, message.dropped);
  if (message.type === "picture") show(message, picture, asked, tookMs);
  else if (message.type === "failed" && (message.frame === null || session.newest(message.frame))) {
    setBusy(false);
    showError(message.error.message);
    if (message.error.code === "invalid_api_key") $("key-form").hidden = false;
  }
}

function changed() {
  clearTimeout(resting);
  if (!$("prompt").value.trim()) return;
  setBusy(true);
  session.want();
}

function show(message, bytes, asked, tookMs) {
  const picture = $("picture"), before = picture.src, last = session.newest(message.frame);
  const url = URL.createObjectURL(new Blob([bytes], { type: `image/${message.format}` }));
  picture.onload = () => {
    if (before) URL.revokeObjectURL(before);
    if (last) resting = setTimeout(() => past.keep(asked, picture), REST_MS);
  };
  Object.assign(picture, { src: url, alt: asked.prompt, hidden: false, className: message.width < 256 ? "pixels" : "" });
  Object.assign($("save"), { href: url, download: `fewstep-${message.seed}.${message.format}`, hidden: false });
  $("empty").hidden = true;
  shown = asked;
  showError("");
  showTimes(message.timings, tookMs);
  const guided = message.guidance === 1 ? "" : ` · guidance ${Number(message.guidance.toFixed(2))}`;
  $("about").textContent = `${message.model} · ${message.steps} ${message.steps === 1 ? "step" : "steps"} · ${message.nfe} NFE${guided} · seed ${message.seed}`;
  $("notes").replaceChildren(...message.notes.map((note) => Object.assign(document.createElement("li"), { textContent: note })));
  if (!last) return;
  setBusy(false);
  $("said").textContent = `Picture made in ${ms(tookMs / 1e3)}`;
}

function setBusy(busy) { $("frame").classList.toggle("busy", busy); }

function showError(text) {
  $("error").textContent = text;
  $("error").hidden = !text;
}

// Enter: the picture is kept, and unless the seed is held, another one is made.
function another() {
  clearTimeout(resting);
  if (!$("prompt").value.trim()) { showError("the prompt is empty; say what the picture should show"); return; }
  if (shown) past.keep(shown, $("picture"));
  if ($("lock").getAttribute("aria-pressed") === "false") dice();
  changed();
}

function goBack({ asked, thumb }) {
  write(asked);
  grow();
  pad.lines = !asked.edit;
  pad.strokes = asked.strokes ?? [];
  setDrawing(Boolean(asked.strokes) && steerable(model()));
  setLock(true); // the words may change; the seed one came back for should not
  if (!shown) { Object.assign($("picture"), { src: thumb, alt: asked.prompt, hidden: false }); $("empty").hidden = true; }
  changed();
}

function setDrawing(on) {
  if (on && !steerable(model())) { $("model").value = steerableModel().name; showModel(); }
  $("draw").setAttribute("aria-pressed", on);
  $("draw").setAttribute("aria-expanded", on);
  $("pad-section").hidden = !on;
  $("stage").classList.toggle("drawing", on);
  showSteer();
}

function showSteer() {
  const on = drawing(), lines = steer() === "control";
  pad.lines = lines;
  $("scale-field").hidden = !(on && lines);
  $("strength-field").hidden = !(on && !lines);
  $("colours").hidden = $("brush-field").hidden = lines;
  pad.draw();
}

function setRubber(on) { pad.rubber = on; $("rubber").setAttribute("aria-pressed", on); }
function setLock(on) { $("lock").setAttribute("aria-pressed", on); }
const pressed = (id) => $(id).getAttribute("aria-pressed") === "true";

function isDark() {
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}

function nameTheme() { $("theme").title = isDark() ? "Light colours" : "Dark colours"; $("theme").ariaLabel = $("theme").title; }

function switchTheme() {
  const theme = isDark() ? "light" : "dark";
  document.documentElement.dataset.theme = theme;
  localStorage.setItem("fewstep.theme", theme);
  nameTheme();
  pad.draw();
}

function grow() {
  $("prompt").style.height = "auto";
  $("prompt").style.height = `${$("prompt").scrollHeight}px`;
}

const SHORTCUTS = [
  ["/", "to the prompt", () => { $("prompt").focus(); $("prompt").select(); }],
  ["d", "draw, or stop drawing", () => { if (!$("draw").disabled) $("draw").click(); }],
  ["r", "new seed", () => $("dice").click()],
  ["l", "keep the seed, or let it go", () => $("lock").click()],
  ["-", "fewer steps", () => { moveSteps(-1); changed(); }],
  ["+", "more steps", () => { moveSteps(1); changed(); }],
  ["z", "undo a stroke", () => pad.undo()],
  ["s", "download the picture", () => { if (!$("save").hidden) $("save").click(); }],
  ["t", "light or dark", switchTheme],
  ["?", "this list", () => $("help").showModal()],
];
const ALSO = [["Enter", "in the prompt: keep the picture, make another"], ["Esc", "leave the prompt, so that single keys work"], ["arrows, Space", "on the drawing pad: move the pen, put it down, lift it"]];

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || $("help").open) return;
  const field = event.target.closest("textarea, select, input:not([type=range], [type=radio], [type=checkbox])");
  if (event.key === "Escape" && field) field.blur();
  const shortcut = !field && $("single").checked && SHORTCUTS.find(([key]) => key === event.key.toLowerCase());
  if (!shortcut) return;
  event.preventDefault();
  shortcut[2]();
}

$("prompt").addEventListener("input", () => { grow(); changed(); });
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); another(); }
});
$("knobs").addEventListener("submit", (event) => event.preventDefault());
$("model").addEventListener("change", () => { showModel(); showSteer(); changed(); });
for (const id of ["steps", "guidance", "scale", "strength"]) $(id).addEventListener("input", () => { showValues(); changed(); });
$("negative").addEventListener("input", changed);
$("seed").addEventListener("input", () => { setLock(true); changed(); });
$("dice").addEventListener("click", () => { dice(); changed(); });
$("lock").addEventListener("click", () => setLock(!pressed("lock")));
$("draw").addEventListener("click", () => { setDrawing(!pressed("draw")); if (pressed("draw")) $("pad").focus(); if (!pad.empty) changed(); });
$("steer").addEventListener("change", () => { choose(steer()); showSteer(); changed(); });
$("brush").addEventListener("input", () => { pad.width = Number($("brush").value); });
$("rubber").addEventListener("click", () => setRubber(!pressed("rubber")));
$("undo").addEventListener("click", () => pad.undo());
$("clear").addEventListener("click", () => pad.clear());
$("forget").addEventListener("click", () => past.forget());
$("theme").addEventListener("click", switchTheme);
$("help-button").addEventListener("click", () => $("help").showModal());
$("single").addEventListener("change", () => localStorage.setItem("fewstep.single", $("single").checked));
$("key-form").addEventListener("submit", (event) => { event.preventDefault(); sessionStorage.setItem("fewstep.key", $("key").value); tryToConnect(); });
document.addEventListener("keydown", onKey);
addEventListener("resize", grow);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", nameTheme);

$("examples").append(...EXAMPLES.map((text) => {
  const button = Object.assign(document.createElement("button"), { type: "button", textContent: text });
  button.addEventListener("click", () => { $("prompt").value = text; grow(); changed(); $("prompt").focus(); });
  return button;
}));
for (const [key, words] of [...ALSO, ...SHORTCUTS]) {
  const row = document.createElement("div");
  const name = document.createElement("dt");
  name.append(Object.assign(document.createElement("kbd"), { textContent: key }));
  row.append(name, Object.assign(document.createElement("dd"), { textContent: words }));
  $("shortcuts").append(row);
}
$("single").checked = localStorage.getItem("fewstep.single") !== "false";
nameTheme();
dice();
tryToConnect();
