// The settings that the chosen model allows, read from /v1/info: nothing can be set that the server would refuse.

const $ = (id) => document.getElementById(id);
const LIVE_STEPS = 8; // a teacher's usual 25 steps are too many to follow a hand
let models = [], chosen = "control";
let counts = [];

export const model = () => models.find((one) => one.name === $("model").value);
export const steerable = (one) => Boolean(one?.control || one?.edit);
export const steer = () => document.querySelector("#steer input:checked").value;

export function offer(found) {
  models = found;
  $("model").replaceChildren(...models.map((one) => new Option(one.name, one.name)));
  showModel();
}

// What drawings are taken for from here on, by models that can do both; one that cannot leaves the choice as it is.
export function choose(way) { chosen = way; }

// A model that follows drawings: the chosen one where it does, else the first; undefined where none does.
export function steerableModel() {
  return steerable(model()) ? model() : models.find(steerable);
}

export function showModel() {
  const { spec, max_steps: most, steps, default_steps: usual, control, edit } = model();
  counts = most ? Array.from({ length: most }, (_, k) => k + 1) : steps;
  $("steps").max = counts.length - 1;
  $("steps").value = Math.max(0, counts.indexOf(most ? Math.min(usual, LIVE_STEPS) : usual));
  [$("guidance").min, $("guidance").max] = spec.guidance.range;
  $("guidance").value = spec.guidance.default;
  $("guidance-field").hidden = spec.guidance.mode === "none";
  $("negative-field").hidden = spec.guidance.mode !== "cfg";
  for (const [way, able] of [["control", control], ["edit", edit]]) document.querySelector(`#steer [value=${way}]`).disabled = !able;
  const way = { control, edit }[chosen] ? chosen : control ? "control" : "edit";
  document.querySelector(`#steer [value=${way}]`).checked = true;
  $("steer").hidden = !(control && edit);
  showValues();
}

export function showValues() {
  const steps = counts[$("steps").value];
  $("steps-value").textContent = steps;
  $("steps").setAttribute("aria-valuetext", `${steps} ${steps === 1 ? "step" : "steps"}`);
  for (const [name, digits] of [["guidance", 1], ["scale", 2], ["strength", 2]]) $(`${name}-value`).textContent = Number($(name).value).toFixed(digits);
}

export function moveSteps(by) {
  $("steps").value = Number($("steps").value) + by;
  showValues();
}

// What is asked, without the drawing. Errors: a seed that is none.
export function read() {
  const one = model(), { guidance } = one.spec, seed = $("seed").value.trim();
  if (!/^\d+$/.test(seed) || !Number.isSafeInteger(Number(seed))) {
    throw new Error(`seed is ${JSON.stringify(seed)}; use a whole number from 0 to ${Number.MAX_SAFE_INTEGER}, or press the dice`);
  }
  const asked = { prompt: $("prompt").value.trim(), model: one.name, steps: counts[$("steps").value], seed: Number(seed) };
  if (guidance.mode !== "none") asked.guidance = Number($("guidance").value);
  if (guidance.mode === "cfg" && asked.guidance !== 1 && $("negative").value.trim()) asked.negative_prompt = $("negative").value.trim();
  return asked;
}

// The knobs as they were when `asked` was read. A model that is no longer served leaves them as they are.
export function write(asked) {
  if (models.some((one) => one.name === asked.model) && asked.model !== model().name) { $("model").value = asked.model; showModel(); }
  $("prompt").value = asked.prompt;
  $("seed").value = asked.seed;
  $("negative").value = asked.negative_prompt ?? "";
  if (counts.includes(asked.steps)) $("steps").value = counts.indexOf(asked.steps);
  if (asked.guidance !== undefined) $("guidance").value = asked.guidance;
  if (asked.control) $("scale").value = asked.control.scale;
  if (asked.edit) $("strength").value = asked.edit.strength;
  for (const way of ["control", "edit"]) if (asked[way]) { chosen = way; document.querySelector(`#steer [value=${way}]`).checked = true; }
  showValues();
}

export function dice() { $("seed").value = crypto.getRandomValues(new Uint32Array(1))[0]; }
