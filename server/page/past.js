// History in the browser: what was asked, its drawing, and a small picture. A picture belongs to its settings and seed,
// so going back asks for it again and gets the same one.

const STORE = "fewstep.past", MOST = 40, THUMB = 112;

export class Past {
  #place; #back; #entries = [];

  // back(entry): the user has clicked it
  constructor(place, back) {
    this.#place = place; this.#back = back;
    try { this.#entries = JSON.parse(localStorage.getItem(STORE) ?? "[]"); } catch { this.#entries = []; }
    this.#show();
  }

  get length() { return this.#entries.length; }

  // `asked` are the settings, `image` the shown <img>. The same settings are kept once.
  keep(asked, image) {
    const same = JSON.stringify(asked);
    if (!image.naturalWidth || (this.#entries.length && JSON.stringify(this.#entries[0].asked) === same)) return;
    const entries = this.#entries.filter((entry) => JSON.stringify(entry.asked) !== same);
    this.#entries = [{ asked, thumb: small(image) }, ...entries].slice(0, MOST);
    this.#save();
    this.#show();
  }

  forget() { this.#entries = []; this.#save(); this.#show(); }

  #save() {
    try {
      localStorage.setItem(STORE, JSON.stringify(this.#entries));
    } catch { // the browser gives no more room: half of it will do
      if (this.#entries.length < 2) return;
      this.#entries.length >>= 1;
      this.#save();
    }
  }

  #show() {
    this.#place.replaceChildren(...this.#entries.map((entry) => {
      const button = Object.assign(document.createElement("button"), { type: "button", title: `${entry.asked.prompt} · seed ${entry.asked.seed}` });
      button.append(Object.assign(document.createElement("img"), { src: entry.thumb, alt: entry.asked.prompt }));
      button.addEventListener("click", () => this.#back(entry));
      return button;
    }));
    this.#place.parentElement.hidden = !this.#entries.length;
  }
}

function small(image) {
  const canvas = Object.assign(document.createElement("canvas"), { width: THUMB, height: Math.round((THUMB * image.naturalHeight) / image.naturalWidth) });
  const brush = canvas.getContext("2d");
  brush.imageSmoothingEnabled = image.naturalWidth > THUMB;
  brush.drawImage(image, 0, 0, canvas.width, canvas.height);
  return canvas.toDataURL("image/webp", 0.85);
}
