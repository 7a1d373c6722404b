// What is shown while it runs: latency with its trace, where the time went, queue and dropped frames.

const $ = (id) => document.getElementById(id);
const STAGES = ["queue", "text", "denoise", "decode", "encode"];
const KEPT = 60;
const latencies = [];

export const ms = (seconds) => (seconds < 0.01 ? (seconds * 1e3).toFixed(1) : Math.round(seconds * 1e3)) + " ms";

export function showQueue(ahead, dropped) {
  $("queue").textContent = ahead;
  $("dropped").textContent = dropped;
}

// `tookMs`: from the change to the picture in the page. What the server's stages leave of it is network and waiting.
export function showTimes(timings, tookMs) {
  const took = Math.max(tookMs / 1e3, timings.total_s), parts = STAGES.map((stage) => [stage, timings[stage + "_s"]]);
  parts.push(["other", Math.max(0, took - parts.reduce((sum, [, seconds]) => sum + seconds, 0))]);
  const sum = parts.reduce((total, [, seconds]) => total + seconds, 0) || 1;
  $("latency").textContent = ms(took);
  $("bar").hidden = false;
  $("bar").setAttribute("aria-label", parts.map(([stage, seconds]) => `${stage} ${ms(seconds)}`).join(", "));
  const bars = $("bar").children, rows = $("stages").children;
  if (!bars.length) build(parts);
  parts.forEach(([, seconds], k) => {
    bars[k].style.flexGrow = seconds / sum;
    rows[k].lastChild.textContent = ms(seconds);
  });
  drawTrace(took * 1e3);
}

function build(parts) {
  const make = (tag, properties) => Object.assign(document.createElement(tag), properties);
  $("bar").append(...parts.map(([stage]) => make("i", { className: stage })));
  $("stages").append(...parts.map(([stage]) => {
    const row = make("div", { className: stage });
    row.append(make("dt", { textContent: stage }), make("dd", {}));
    return row;
  }));
}

function drawTrace(tookMs) {
  latencies.push(tookMs);
  if (latencies.length > KEPT) latencies.shift();
  const top = Math.max(...latencies), across = 120 / (KEPT - 1);
  $("trace").firstElementChild.setAttribute("points", latencies.map((value, k) => `${(k * across).toFixed(1)},${(27 - (25 * value) / top).toFixed(1)}`).join(" "));
}
