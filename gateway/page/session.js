// The objects of one image and the way they were made. A state is never changed but replaced, which is all that undo needs.

import { EMPTY, isEmpty } from "./prompts.js";

/**
 * @typedef {{id: number, label: string, prompt: import("./prompts.js").Prompt}} Labeled
 * @typedef {{objects: Labeled[], current: number | null}} State current: the id of the object that clicks go to
 */

const START = Object.freeze({ objects: [], current: null });
const MOST_STEPS = 500;

export class Session {
  /** @param {() => void} changed called after every change */
  constructor(changed = () => {}) {
    this.state = START;
    this.isSaved = true;
    this._past = [];
    this._future = [];
    this._nextId = 1;
    this._changed = changed;
  }

  get objects() {
    return this.state.objects;
  }

  /** The object that clicks go to, or null: then the next click begins one. */
  get current() {
    return this.objects.find((each) => each.id === this.state.current) ?? null;
  }

  get prompt() {
    return this.current?.prompt ?? EMPTY;
  }

  /** Let the current object, or a new one, have another prompt. */
  ask(prompt, label) {
    const id = this.current?.id ?? this._nextId++;
    const asked = { id, label: this.current?.label ?? label, prompt };
    const objects = this.current ? this.objects.map((each) => (each.id === id ? asked : each)) : [...this.objects, asked];
    this._go({ objects, current: id });
  }

  /** Finish the current object; the next click begins another. */
  finish() {
    if (this.current) this._go({ ...this.state, current: null });
  }

  select(id) {
    if (id !== this.state.current && this.objects.some((each) => each.id === id)) this._go({ ...this.state, current: id });
  }

  remove(id) {
    const objects = this.objects.filter((each) => each.id !== id);
    const current = this.state.current === id ? null : this.state.current;
    if (objects.length < this.objects.length) this._go({ objects, current });
  }

  relabel(id, label) {
    if (this.objects.some((each) => each.id === id && each.label !== label)) {
      this._go({ ...this.state, objects: this.objects.map((each) => (each.id === id ? { ...each, label } : each)) });
    }
  }

  get canUndo() {
    return this._past.length > 0;
  }

  get canRedo() {
    return this._future.length > 0;
  }

  undo() {
    this._step(this._past, this._future);
  }

  redo() {
    this._step(this._future, this._past);
  }

  /** Say that all of it was exported. */
  saved() {
    this.isSaved = true;
  }

  _step(from, to) {
    if (from.length === 0) return;
    to.push(this.state);
    this._show(from.pop());
  }

  _go(state) {
    this._past.push(this.state);
    if (this._past.length > MOST_STEPS) this._past.shift();
    this._future.length = 0;
    this._show(state);
  }

  _show(state) {
    this.state = state;
    this.isSaved = state.objects.every((each) => isEmpty(each.prompt));
    this._changed();
  }
}
