// The live socket. `want` may be called as often as the pen moves: only the newest question is sent, and the server too
// drops what a newer frame displaces.

const LATER_MS = [300, 1000, 3000, 8000];
const FINAL = [1008, 1009]; // refused, too large: coming again would change nothing

export class Session {
  #compose; #heard; #state; #socket = null; #wanted = false; #busy = false; #ready = false; #frame = 0; #failures = 0; #asked = new Map();

  // compose(): {header, picture, asked} of what is wanted now, or null. heard(message, picture, asked, ms since it was
  // asked). state(name): "ready", "lost" (and coming back), "refused" (for good).
  constructor(compose, heard, state) {
    this.#compose = compose; this.#heard = heard; this.#state = state;
  }

  // Whether nothing newer than this frame is asked or about to be.
  newest(frame) { return frame === this.#frame && !this.#wanted && !this.#busy; }

  open(key) {
    this.close();
    const url = new URL("/v1/live", location.href);
    url.protocol = url.protocol.replace("http", "ws");
    const socket = (this.#socket = new WebSocket(url));
    socket.binaryType = "arraybuffer";
    socket.onopen = () => { if (key) socket.send(JSON.stringify({ key })); };
    socket.onmessage = ({ data }) => { if (socket === this.#socket) this.#read(data); };
    socket.onclose = ({ code }) => { if (socket === this.#socket) this.#lost(code, key); };
  }

  close() {
    const socket = this.#socket;
    this.#socket = null; this.#ready = false; this.#asked.clear();
    socket?.close();
  }

  want() {
    if (this.#wanted) return;
    this.#wanted = true;
    requestAnimationFrame(() => this.#send());
  }

  async #send() {
    if (!this.#ready || this.#busy || !this.#wanted) return; // sent once the server is ready
    if (this.#socket.bufferedAmount > 0) { requestAnimationFrame(() => this.#send()); return; }
    this.#wanted = false; this.#busy = true;
    const socket = this.#socket, question = await this.#compose();
    if (question && socket.readyState === WebSocket.OPEN) {
      const header = JSON.stringify({ frame: ++this.#frame, ...question.header });
      this.#asked.set(this.#frame, { asked: question.asked, atMs: performance.now() });
      socket.send(question.picture ? new Blob([header, "\n", question.picture]) : header);
    }
    this.#busy = false;
    if (this.#wanted) requestAnimationFrame(() => this.#send());
  }

  #read(data) {
    const bytes = typeof data === "string" ? null : new Uint8Array(data);
    const end = bytes ? bytes.indexOf(10) : 0;
    const message = JSON.parse(bytes ? new TextDecoder().decode(bytes.subarray(0, end)) : data);
    if (message.type === "ready") { this.#ready = true; this.#failures = 0; this.#state("ready"); if (this.#wanted) this.#send(); return; }
    const question = this.#asked.get(message.frame);
    if (message.type !== "started") {
      for (const frame of this.#asked.keys()) if (frame <= message.frame) this.#asked.delete(frame);
    }
    this.#heard(message, bytes?.subarray(end + 1), question?.asked, question ? performance.now() - question.atMs : 0);
  }

  #lost(code, key) {
    this.#ready = false;
    if (FINAL.includes(code)) { this.#state("refused"); return; }
    this.#wanted ||= this.#asked.size > 0;
    this.#asked.clear();
    this.#state("lost");
    setTimeout(() => { if (this.#socket?.readyState === WebSocket.CLOSED) this.open(key); }, LATER_MS[Math.min(this.#failures++, LATER_MS.length - 1)]);
  }
}
