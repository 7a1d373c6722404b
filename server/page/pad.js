// The drawing pad: strokes are kept, so they can be undone, kept with the history, and drawn at any size. Coordinates
// are thousandths of the side. As lines it gives white on black (what edge ControlNets read), as colours what is seen.

const PAPER = "#ffffff", RUBBER = -1;
const COLOURS = [["black", "#16161d"], ["grey", "#8b8b94"], ["red", "#d92a2a"], ["orange", "#f08a24"], ["yellow", "#f5d327"],
  ["green", "#2c9a3f"], ["blue", "#2a55d9"], ["purple", "#8a3fc4"], ["pink", "#f4a3bd"]];
const LINE = 12, RUBBER_LINE = 60, STEP = 20, FAR = 100;

export class Pad {
  #canvas; #small = document.createElement("canvas"); #changed; #strokes = []; #open = null; #colour = 0; #rubber = false; #at = [500, 500]; #byKey = false;
  width = 90; // of the brush
  lines = true;

  constructor(canvas, colours, changed) {
    this.#canvas = canvas; this.#changed = changed;
    canvas.addEventListener("pointerdown", (event) => this.#down(event));
    canvas.addEventListener("pointermove", (event) => this.#move(event));
    for (const end of ["pointerup", "pointercancel"]) canvas.addEventListener(end, () => this.#lift());
    canvas.addEventListener("keydown", (event) => this.#key(event));
    canvas.addEventListener("blur", () => { this.#lift(); this.#byKey = false; this.draw(); });
    new ResizeObserver(() => this.draw()).observe(canvas);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
    colours.append(...COLOURS.map(([name, value], number) => this.#swatch(name, value, number)));
  }

  get strokes() { return this.#strokes.slice(this.#strokes.findLastIndex((stroke) => stroke.clear) + 1); }
  set strokes(strokes) { this.#strokes = strokes.map((stroke) => ({ ...stroke })); this.#open = null; this.draw(); }
  get empty() { return this.strokes.length === 0; }
  set rubber(on) { this.#rubber = on; }

  undo() { this.#open = null; this.#strokes.pop(); this.#settle(); }
  clear() { if (!this.empty) { this.#open = null; this.#strokes.push({ clear: true }); this.#settle(); } }

  draw() {
    const canvas = this.#canvas, side = Math.round(canvas.clientWidth * devicePixelRatio);
    if (!side) return;
    if (canvas.width !== side) canvas.width = canvas.height = side;
    const style = getComputedStyle(canvas);
    const ground = this.lines ? style.backgroundColor : PAPER;
    const brush = this.#render(canvas.getContext("2d"), side, side, ground, (stroke) => this.lines ? style.color : COLOURS[stroke.c][1], LINE);
    if (!this.#byKey) return;
    const [x, y] = this.#at.map((value) => (value * side) / 1000), arm = 10 * devicePixelRatio;
    brush.strokeStyle = style.accentColor; brush.lineWidth = 2 * devicePixelRatio;
    brush.beginPath(); brush.moveTo(x - arm, y); brush.lineTo(x + arm, y); brush.moveTo(x, y - arm); brush.lineTo(x, y + arm); brush.stroke();
  }

  // The drawing as a file of the model's size.
  file(width, height) {
    const canvas = this.#small, thin = Math.max(1250 / width, 5); // never under 1.25 pixels
    if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
    this.#render(canvas.getContext("2d", { willReadFrequently: true }), width, height, this.lines ? "#000" : PAPER, (stroke) => this.lines ? "#fff" : COLOURS[stroke.c][1], thin);
    const type = width * height <= 256 * 256 || this.lines ? "image/png" : "image/jpeg";
    return new Promise((done) => canvas.toBlob(done, type, 0.92));
  }

  #render(brush, width, height, ground, ink, line) {
    brush.fillStyle = ground; brush.fillRect(0, 0, width, height);
    brush.lineCap = brush.lineJoin = "round";
    for (const stroke of this.strokes) {
      const erased = stroke.c === RUBBER;
      brush.strokeStyle = erased ? ground : ink(stroke);
      brush.lineWidth = ((this.lines ? (erased ? RUBBER_LINE : line) : stroke.w) * width) / 1000;
      trace(brush, stroke.p, width / 1000, height / 1000);
    }
    return brush;
  }

  #swatch(name, value, number) {
    const label = Object.assign(document.createElement("label"), { title: name });
    const input = Object.assign(document.createElement("input"), { type: "radio", name: "colour", ariaLabel: name, checked: number === 0 });
    const face = document.createElement("span");
    face.style.background = value;
    input.addEventListener("change", () => { this.#colour = number; this.#changed("tool"); });
    label.append(input, face);
    return label;
  }

  #begin() { this.#strokes.push(this.#open = { c: this.#rubber ? RUBBER : this.#colour, w: this.width, p: [...this.#at] }); }
  #lift() { if (this.#open) { this.#open = null; this.#changed("stroke"); } }
  #settle() { this.draw(); this.#changed("stroke"); }

  #down(event) {
    if (event.button !== 0) return;
    this.#canvas.setPointerCapture(event.pointerId);
    this.#byKey = false; this.#at = this.#place(event); this.#begin(); this.#settle();
  }

  #move(event) {
    if (!this.#open || !this.#canvas.hasPointerCapture(event.pointerId)) return;
    for (const part of event.getCoalescedEvents?.() ?? [event]) this.#to(this.#place(part));
    this.#settle();
  }

  #to([x, y]) {
    this.#at = [x, y];
    const p = this.#open?.p;
    if (p && (p.at(-2) !== x || p.at(-1) !== y)) p.push(x, y);
  }

  #place(event) {
    const box = this.#canvas.getBoundingClientRect();
    return [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height].map((part) => Math.round(Math.min(1, Math.max(0, part)) * 1000));
  }

  #key(event) {
    const way = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (!way && event.key !== " ") return;
    event.preventDefault(); event.stopPropagation();
    this.#byKey = true;
    if (way) this.#to(this.#at.map((value, axis) => Math.min(1000, Math.max(0, value + way[axis] * (event.shiftKey ? FAR : STEP)))));
    else if (this.#open) this.#lift();
    else this.#begin();
    this.draw();
    if (this.#open) this.#changed("stroke");
  }
}

function trace(brush, p, across, down) {
  brush.beginPath();
  brush.moveTo(p[0] * across, p[1] * down);
  for (let k = 2; k < p.length; k += 2) brush.lineTo(p[k] * across, p[k + 1] * down);
  if (p.length === 2) brush.lineTo(p[0] * across, p[1] * down); // a dot
  brush.stroke();
}
