// The masks of prompts. One prompt is with the gateway at a time, and what waits is looked up when it is its turn: of
// clicks that came faster than answers only the newest is asked.

import { isEmpty } from "./prompts.js";

export class Answers {
  /**
   * @param {(prompt: object) => Promise<object>} ask
   * @param {{came: (prompt: object) => void, failed: (error: Error) => void}} told
   */
  constructor(ask, told) {
    this.masks = new WeakMap();
    this._failed = new WeakSet();
    this._objects = [];
    this._isAsking = false;
    this._ask = ask;
    this._told = told;
  }

  /** See to it that these objects get their masks; earlier ones are no longer of interest. */
  follow(objects) {
    this._objects = objects;
    if (!this._isAsking) this._run();
  }

  /** Ask once more for what has failed. */
  retry() {
    this._failed = new WeakSet();
    this.follow(this._objects);
  }

  get isWaiting() {
    return this._next() !== undefined;
  }

  _next() {
    return this._objects
      .map(({ prompt }) => prompt)
      .find((prompt) => !isEmpty(prompt) && !this.masks.has(prompt) && !this._failed.has(prompt));
  }

  async _run() {
    this._isAsking = true;
    for (let prompt = this._next(); prompt; prompt = this._next()) {
      try {
        this.masks.set(prompt, await this._ask(prompt));
        this._told.came(prompt);
      } catch (error) {
        this._failed.add(prompt);
        this._told.failed(error);
      }
    }
    this._isAsking = false;
  }
}
