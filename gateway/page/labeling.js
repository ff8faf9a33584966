// What somebody can do on the page. Places are pixels of the screen, from the picture's corner, unless they say otherwise.

import { Answers } from "./answers.js";
import { Refused } from "./gateway.js";
import { Hover } from "./hover.js";
import { colourOf } from "./labels.js";
import { Picture } from "./picture.js";
import { fieldsOf, isEmpty, maskOf, withBox, withPoint } from "./prompts.js";
import { Session } from "./session.js";

const NO_PICTURE = "This file is no picture that the browser can show: choose a JPEG, PNG or WebP file.";
const NOT_KEPT = "The services cannot keep images at the moment: clicks may fail until they can.";
const LEAVE = "Open another image? The objects of this one are not saved.";
const NOTHING = { preview: null, box: null, corner: null, cross: null };

export class Labeling {
  /**
   * @param {object} parts
   * @param {import("./gateway.js").Gateway} parts.gateway
   * @param {import("./stage.js").Stage} parts.stage
   * @param {import("./labels.js").Labels} parts.labels
   * @param {{changed: Function, said: Function, timed: Function, failed: Function}} parts.told
   */
  constructor({ gateway, stage, labels, told }) {
    Object.assign(this, { stage, labels, picture: null, session: new Session(), isPreviewing: true });
    this._gateway = gateway;
    this._told = told;
    this._hover = null;
    this._drawn = NOTHING; // what is under way: mask, box, its first corner and the cross, pixels of the image
    this._clicked = new WeakMap(); // when, by prompt
    this._toPaint = [];
  }

  // ---- the image

  async open(file) {
    if (!this.session.isSaved && !confirm(LEAVE)) return;
    this._told.said(`Opening ${file.name} …`);
    this._newest = file;
    const bitmap = await createImageBitmap(file).catch(() => null);
    if (this._newest !== file) return; // another one was opened meanwhile
    if (bitmap === null) {
      this._told.failed(new Refused(NO_PICTURE, "NO_PICTURE"));
      return;
    }
    this._hover?.close();
    this._hover = null;
    this._drawn = NOTHING;
    const picture = new Picture(file, bitmap, this._gateway);
    const isHere = () => this.picture === picture;
    this.picture?.bitmap.close();
    this.picture = picture;
    this.session = new Session(() => this._changed());
    this.answers = new Answers((prompt) => picture.mask(fieldsOf(prompt, this.answers.masks)), {
      came: (prompt) => isHere() && this._came(prompt),
      failed: (error) => isHere() && this._told.failed(error),
    });
    this.stage.show(picture, () => this._scene(), () => this._painted());
    this._told.changed();
    await this._begin(picture, picture.opened());
  }

  /** Once more for whatever failed. */
  async retry() {
    await this._begin(this.picture, this.picture.reopen());
    this.answers.retry();
  }

  async _begin(picture, opening) {
    try {
      const { key, cache_hit, ms, stored } = await opening;
      if (this.picture !== picture) return;
      const how = cache_hit ? "found in the cache" : "encoded";
      this._told.failed(stored ? null : new Refused(NOT_KEPT, "NOT_KEPT"));
      this._told.said(`${picture.name}, ${picture.width} × ${picture.height}: ${how} in ${Math.round(ms)} ms.`);
      this._hover?.close();
      this._hover = new Hover({ key, token: this._gateway.token() }, {
        came: (mask) => this._previewed(mask),
        failed: (error) => {
          if (error.reason === "EMBEDDING_EXPIRED" && picture.mayReopen) this._begin(picture, picture.reopen());
          else this._told.timed(error.message); // of what matters, the next click will tell
        },
      });
    } catch (error) {
      if (this.picture === picture) this._told.failed(error);
    }
  }

  // ---- clicks and boxes

  /** @param {0 | 1} label 1: on the object @param {number} since when, on the clock of `performance` */
  click(at, label, since = performance.now()) {
    if (this.stage.holds(at)) this._ask(withPoint(this.session.prompt, ...this.stage.toImage(at), label), since);
  }

  box(from, to, since = performance.now()) {
    if (this.picture === null) return;
    this._drawn = { ...this._drawn, box: null };
    const [[x0, y0], [x1, y1]] = [this.stage.toImage(from), this.stage.toImage(to)];
    if (Math.abs(x1 - x0) < 1 || Math.abs(y1 - y0) < 1) this.stage.draw();
    else this._ask(withBox(this.session.prompt, [x0, y0], [x1, y1]), since);
  }

  drawBox(from, to) {
    if (this.picture === null) return;
    this._stopPreview();
    this._drawn = { ...this._drawn, box: [...this.stage.toImage(from), ...this.stage.toImage(to)] };
    this.stage.draw();
  }

  cancel() {
    this._drawn = { ...NOTHING, cross: this._drawn.cross };
    this.stage.draw();
  }

  _ask(prompt, since) {
    this._stopPreview();
    this._clicked.set(prompt, since);
    this.session.ask(prompt, this.labels.chosen);
  }

  _came(prompt) {
    this._told.failed(null);
    const at = this.session.objects.findIndex((each) => each.prompt === prompt);
    if (at >= 0) {
      const { box, area, score } = this.answers.masks.get(prompt);
      const found = box ? `${area.toLocaleString("en")} pixels, score ${score.toFixed(2)}` : "nothing was found there";
      this._told.said(`Object ${at + 1}, ${this.session.objects[at].label}: ${found}.`);
    }
    this._toPaint.push(prompt);
    this.stage.draw();
  }

  // ---- the mouse that hovers

  hover(at) {
    if (!this.isPreviewing || !this._hover || !isEmpty(this.session.prompt)) return;
    if (this.stage.holds(at)) this._hover.move({ points: [this.stage.toImage(at)] });
    else this.leave();
  }

  leave() {
    this._stopPreview();
    this.stage.draw();
  }

  togglePreview() {
    this.isPreviewing = !this.isPreviewing;
    this.leave();
    this._told.changed();
  }

  _previewed(mask) {
    this._told.timed(`Preview: ${Math.round(mask.ms)} ms in the gateway`);
    this._drawn = { ...this._drawn, preview: mask };
    this.stage.draw();
  }

  _stopPreview() {
    this._hover?.leave();
    this._drawn = { ...this._drawn, preview: null };
  }

  // ---- the cross that keys move

  moveCross(dx, dy) {
    if (this.picture === null) return;
    const { cross, corner } = this._drawn;
    const [x, y] = cross ? this.stage.toScreen(cross) : this.stage.centre;
    const moved = this.stage.toImage([x + dx, y + dy]);
    this._drawn = { ...this._drawn, cross: moved };
    if (corner) this.drawBox(this.stage.toScreen(corner), this.stage.toScreen(moved));
    else this.hover(this.stage.toScreen(moved));
    this.stage.draw();
  }

  clickCross(label) {
    this.moveCross(0, 0);
    if (this.picture) this._ask(withPoint(this.session.prompt, ...this._drawn.cross, label), performance.now());
  }

  /** Begin a box where the cross is, or finish it there. */
  cornerCross() {
    this.moveCross(0, 0);
    const { cross, corner } = this._drawn;
    this._drawn = { ...this._drawn, corner: corner ? null : cross };
    if (corner) this.box(this.stage.toScreen(corner), this.stage.toScreen(cross));
  }

  // ---- objects

  removeCurrent() {
    if (this.session.current) this.session.remove(this.session.current.id);
  }

  selectNext(step) {
    const { objects, current } = this.session;
    const at = current ? objects.indexOf(current) + step : Math.min(step, 0);
    if (objects.length > 0) this.session.select(objects.at(at % objects.length).id);
  }

  /** For the current object, and those that follow. */
  useLabel(at) {
    if (!this.labels.choose(at)) return;
    if (this.session.current) this.session.relabel(this.session.current.id, this.labels.chosen);
    this._told.changed();
  }

  removeLabel(at) {
    this.labels.remove(at);
    this._told.changed();
    this.stage.draw(); // those after it have other colours now
  }

  /** The objects that have a mask. */
  masks() {
    return this.session.objects
      .map(({ id, label, prompt }) => ({ id, label, mask: maskOf(prompt, this.answers.masks) }))
      .filter(({ mask }) => mask !== null);
  }

  // ---- what follows

  _changed() {
    if (!isEmpty(this.session.prompt)) this._stopPreview();
    this.answers.follow(this.session.objects);
    this.labels.hold(this.session.objects.map(({ label }) => label));
    this._told.changed();
    this.stage.draw();
  }

  _scene() {
    const { current, prompt } = this.session;
    const { preview, box, cross } = this._drawn;
    const masks = this.masks().map(({ id, label, mask }) => ({
      mask,
      colour: colourOf(this.labels.names.indexOf(label)),
      isCurrent: id === current?.id,
    }));
    if (preview) masks.push({ mask: preview, colour: colourOf(this.labels.at), isCurrent: false });
    return { masks, marks: { points: prompt.points, boxes: [prompt.box, box].filter(Boolean), cross } };
  }

  _painted() {
    for (const prompt of this._toPaint.splice(0)) {
      const taken = { start: this._clicked.get(prompt), end: performance.now() };
      const { duration } = performance.measure("click to mask", taken);
      const { ms } = this.answers.masks.get(prompt);
      this._told.timed(`Mask: ${Math.round(duration)} ms from the click, ${Math.round(ms)} of them in the gateway`);
    }
  }
}
