// One page, no build: read /v1/info, build the controls it allows, post to /v1/generate, show the picture and its times.

const $ = (id) => document.getElementById(id);
const STAGES = ["queue", "text", "denoise", "decode", "encode"];
const EXAMPLES = [
  "a large red circle above a small blue square on a gray background",
  "two green triangles on a pink background",
  "a yellow star to the left of a purple ring",
  "a small white cross, a large black square and an orange circle",
];
const HISTORY_LENGTH = 24;
let models = [];
let running = null; // the AbortController of the request in flight

const current = () => models.find((model) => model.name === $("model").value);

async function call(path, body, signal) {
  const headers = { "Content-Type": "application/json" };
  const key = sessionStorage.getItem("key");
  if (key) headers.Authorization = `Bearer ${key}`;
  const reply = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal });
  const data = await reply.json().catch(() => null);
  if (reply.ok && data) return data;
  if (reply.status === 401) $("key-field").hidden = false;
  throw new Error(data?.error?.message ?? `the server answered ${reply.status}`);
}

async function connect() {
  const info = await call("/v1/info");
  models = info.models;
  $("server").textContent = `fewstep ${info.version} · ${models.length === 1 ? "one model" : models.length + " models"}`;
  $("model").replaceChildren(...models.map((model) => new Option(model.name, model.name)));
  showError("");
  showModel();
}

function showModel() {
  const model = current();
  const guidance = model.spec.guidance;
  const counts = model.max_steps ? teacherSteps(model.max_steps, model.default_steps) : model.steps;
  $("steps").replaceChildren(...counts.map((count) => stepChoice(count, count === model.default_steps)));
  $("guidance-field").hidden = guidance.mode === "none";
  $("negative-field").hidden = guidance.mode !== "cfg";
  [$("guidance").min, $("guidance").max] = guidance.range;
  $("guidance").value = guidance.default;
  showGuidance();
}

function teacherSteps(most, usual) {
  const usable = [...new Set([1, 2, 4, 8, 25, 50, usual])].filter((count) => count <= most);
  return usable.sort((a, b) => a - b);
}

function stepChoice(count, checked) {
  const label = document.createElement("label");
  const input = Object.assign(document.createElement("input"), { type: "radio", name: "steps", value: count, checked });
  const face = Object.assign(document.createElement("span"), { textContent: count });
  label.append(input, face);
  return label;
}

const showGuidance = () => { $("guidance-value").textContent = Number($("guidance").value).toFixed(1); };

function requestBody() {
  const body = { prompt: $("prompt").value, model: $("model").value, steps: Number(document.querySelector("#steps input:checked").value) };
  const mode = current().spec.guidance.mode;
  if (mode !== "none") body.guidance = Number($("guidance").value);
  if (mode === "cfg" && $("negative").value.trim()) body.negative_prompt = $("negative").value;
  const seed = $("seed").value.trim();
  if (seed && $("dice").getAttribute("aria-pressed") === "false") {
    if (!/^\d+$/.test(seed)) throw new Error(`seed is ${JSON.stringify(seed)}; use a whole number from 0, or press the dice`);
    if (!Number.isSafeInteger(Number(seed))) throw new Error(`seed is ${seed}; this page sends at most ${Number.MAX_SAFE_INTEGER}`);
    body.seed = Number(seed);
  }
  return body;
}

async function generate() {
  running?.abort(); // the server drops the work of a caller who leaves
  const mine = (running = new AbortController());
  setBusy(true);
  const began = performance.now();
  try {
    if (!models.length) await connect();
    const body = requestBody();
    const result = await call("/v1/generate", body, mine.signal);
    const entry = { prompt: body.prompt, result, roundTripMs: performance.now() - began };
    show(entry);
    remember(entry);
  } catch (error) {
    if (error.name !== "AbortError") showError(error instanceof TypeError ? "the server cannot be reached; is it still running?" : error.message);
  } finally {
    if (running === mine) { running = null; setBusy(false); }
  }
}

function setBusy(busy) {
  $("generate").setAttribute("aria-busy", busy);
  $("generate").textContent = busy ? "Generating…" : "Generate";
  $("frame").classList.toggle("busy", busy);
}

function showError(message) {
  $("error").textContent = message;
  $("error").hidden = !message;
}

const source = (result) => `data:image/${result.format};base64,${result.pictures[0].b64}`;
const ms = (seconds) => (seconds < 0.01 ? (seconds * 1e3).toFixed(1) : Math.round(seconds * 1e3)) + " ms";

function show({ prompt, result, roundTripMs }) {
  showError("");
  const { timings } = result;
  const picture = $("picture");
  Object.assign(picture, { src: source(result), alt: prompt, hidden: false, className: result.width < 256 ? "pixels" : "" });
  $("empty").hidden = true;
  $("seed").value = result.pictures[0].seed;
  $("latency").textContent = ms(timings.total_s);
  const parts = STAGES.map((stage) => [stage, timings[stage + "_s"]]);
  const known = parts.reduce((total, [, seconds]) => total + seconds, 0);
  parts.push(["other", Math.max(0, timings.total_s - known)]); // waiting between calls, and the server's own work
  const sum = Math.max(known, timings.total_s) || 1;
  $("bar").hidden = false;
  $("bar").setAttribute("aria-label", parts.map(([stage, seconds]) => `${stage} ${ms(seconds)}`).join(", "));
  $("bar").replaceChildren(...parts.map(([stage, seconds]) => {
    const part = Object.assign(document.createElement("i"), { className: stage });
    part.style.width = `${(100 * seconds) / sum}%`;
    return part;
  }));
  $("stages").replaceChildren(...parts.map(([stage, seconds]) => {
    const row = Object.assign(document.createElement("div"), { className: stage });
    row.append(Object.assign(document.createElement("dt"), { textContent: stage }), Object.assign(document.createElement("dd"), { textContent: ms(seconds) }));
    return row;
  }));
  const guided = result.guidance === 1 ? "" : ` · guidance ${result.guidance}`;
  $("about").textContent = `${result.model} · ${result.steps} ${result.steps === 1 ? "step" : "steps"} · ${result.nfe} NFE${guided} · seed ${result.pictures[0].seed} · ${ms(roundTripMs / 1e3)} with the round trip`;
  $("notes").replaceChildren(...result.notes.map((note) => Object.assign(document.createElement("li"), { textContent: note })));
  Object.assign($("save"), { href: source(result), download: `fewstep-${result.pictures[0].seed}.${result.format}`, hidden: false });
}

function remember(entry) {
  const button = Object.assign(document.createElement("button"), { type: "button", title: entry.prompt });
  button.append(Object.assign(document.createElement("img"), { src: source(entry.result), alt: entry.prompt, className: $("picture").className }));
  button.addEventListener("click", () => { show(entry); $("prompt").value = entry.prompt; });
  $("history").prepend(button);
  while ($("history").children.length > HISTORY_LENGTH) $("history").lastChild.remove();
  $("history-section").hidden = false;
}

function setDice(random) {
  $("dice").setAttribute("aria-pressed", random);
}

$("form").addEventListener("submit", (event) => { event.preventDefault(); generate(); });
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); generate(); }
});
$("model").addEventListener("change", showModel);
$("guidance").addEventListener("input", showGuidance);
$("seed").addEventListener("input", () => setDice(!$("seed").value.trim()));
$("dice").addEventListener("click", () => setDice($("dice").getAttribute("aria-pressed") === "false"));
$("key").addEventListener("change", () => { sessionStorage.setItem("key", $("key").value); connect().catch((error) => showError(error.message)); });
$("examples").append(...EXAMPLES.map((text) => {
  const button = Object.assign(document.createElement("button"), { type: "button", textContent: text });
  button.addEventListener("click", () => { $("prompt").value = text; generate(); });
  return button;
}));
connect().catch((error) => { $("server").textContent = "not connected"; showError(error.message); });
