// The labels to choose from, kept in the browser for the next image.

// Told apart by most people with any kind of sight for colours, on light and on dark.
const COLOURS = ["#1f83ff", "#e0489b", "#f2dd3c", "#00b890", "#ff9d1e", "#8e63ff", "#5ec8f2", "#e5532d", "#a3c644"];
const MOST_LETTERS = 60;

export function colourOf(at) {
  return COLOURS[at % COLOURS.length];
}

export class Labels {
  /** @param {Storage} storage */
  constructor(storage) {
    this._storage = storage;
    this.names = read(storage);
    this.at = 0;
  }

  get chosen() {
    return this.names[this.at];
  }

  /** Whether there is such a label. */
  choose(at) {
    if (at < 0 || at >= this.names.length) return false;
    this.at = at;
    return true;
  }

  /** Add a label, or find it, and choose it; false for an empty one. */
  add(text) {
    const name = text.trim().slice(0, MOST_LETTERS);
    if (!name) return false;
    if (!this.names.includes(name)) this.names.push(name);
    this._keep();
    return this.choose(this.names.indexOf(name));
  }

  /** See to it that these are there: undo may bring back an object whose label was removed meanwhile. */
  hold(names) {
    const lost = names.filter((name, at) => !this.names.includes(name) && names.indexOf(name) === at);
    if (lost.length === 0) return;
    this.names.push(...lost);
    this._keep();
  }

  remove(at) {
    if (this.names.length === 1) return;
    this.names.splice(at, 1);
    if (at <= this.at) this.at = Math.max(0, this.at - 1);
    this._keep();
  }

  _keep() {
    this._storage.setItem("splitsam.labels", JSON.stringify(this.names));
  }
}

function read(storage) {
  try {
    const names = JSON.parse(storage.getItem("splitsam.labels"));
    if (Array.isArray(names) && names.length && names.every((name) => typeof name === "string" && name)) return names;
  } catch {
    // Somebody else's, or half written: begin anew.
  }
  return ["object"];
}
