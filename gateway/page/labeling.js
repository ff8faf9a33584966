// What somebody can do on the page. Places are pixels of the screen, from the picture's corner, unless they say otherwise.

import { Answers } from "./answers.js";
import { colourOf } from "./labels.js";
import { Hover } from "./hover.js";
import { Refused } from "./gateway.js";
import { fieldsOf, isEmpty, maskOf, withBox, withPoint } from "./prompts.js";
import { Session } from "./session.js";
import * as views from "./view.js";

const NO_PICTURE = "This file is no picture that the browser can show: choose a JPEG, PNG or WebP file.";
const LEAVE = "Open another image? The objects of this one are not saved.";

export class Labeling {
  /**
   * @param {object} parts
   * @param {import("./gateway.js").Gateway} parts.gateway
   * @param {import("./painter.js").Painter} parts.painter
   * @param {import("./labels.js").Labels} parts.labels
   * @param {HTMLElement} parts.screen where the picture is shown
   * @param {{changed: Function, said: Function, timed: Function, failed: Function}} parts.told
   */
  constructor({ gateway, painter, labels, screen, told }) {
    Object.assign(this, { labels, image: null, view: null, isPreviewing: true });
    this.session = new Session();
    this._parts = { gateway, painter, screen, told };
    this._preview = null;
    this._box = null; // pixels of the image, while it is drawn
    this._corner = null; // of a box drawn with keys
    this._cursor = null;
    this._clicked = new WeakMap(); // when, by prompt
    this._toPaint = [];
    this._isDue = { image: false, marks: false };
  }

  // ---- the image

  async open(file) {
    const { gateway, told } = this._parts;
    if (!this.session.isSaved && !confirm(LEAVE)) return;
    told.said(`Opening ${file.name} …`);
    const bitmap = await createImageBitmap(file).catch(() => null);
    if (bitmap === null) {
      told.failed(new Refused(NO_PICTURE, "NO_PICTURE"));
      return;
    }
    this._hover?.close();
    const { width, height } = bitmap;
    const image = { name: file.name, file, bitmap, width, height, opening: gateway.open(file) };
    this.image = image;
    this.session = new Session(() => this._changed());
    this.answers = new Answers((prompt) => this._ask(image, prompt), {
      came: (prompt) => this.image === image && this._came(prompt),
      failed: (error) => this.image === image && told.failed(error),
    });
    Object.assign(this, { _hover: null, _preview: null, _box: null, _corner: null, _cursor: null });
    this.fit();
    this._changed();
    try {
      const opened = await image.opening;
      if (this.image !== image) return;
      told.failed(null);
      const how = opened.cache_hit ? "found in the cache" : "encoded";
      told.said(`${file.name}, ${width} × ${height}: ${how} in ${Math.round(opened.ms)} ms. Point at an object.`);
      this._follow(image, opened.key);
    } catch (error) {
      if (this.image === image) told.failed(error);
    }
  }

  /** Once more for whatever failed. */
  async retry() {
    if (this.image === null) return;
    this._parts.told.failed(null);
    await this._reopen(this.image);
    this.answers.retry();
  }

  _follow(image, key) {
    this._hover?.close();
    this._hover = new Hover({ key, token: this._parts.gateway.token() }, {
      came: (mask) => this._previewed(mask),
      failed: (error) => (error.reason === "EMBEDDING_EXPIRED" ? this._reopen(image) : this._parts.told.failed(error)),
    });
  }

  /** The services have forgotten the image, or it never got there. */
  async _reopen(image) {
    image.reopening ??= this._parts.gateway.open(image.file);
    image.opening = image.reopening;
    try {
      const { key } = await image.reopening;
      if (this.image === image) this._follow(image, key);
    } catch (error) {
      if (this.image === image) this._parts.told.failed(error);
    } finally {
      image.reopening = null;
    }
  }

  async _ask(image, prompt) {
    const { gateway } = this._parts;
    const fields = fieldsOf(prompt, this.answers.masks);
    try {
      return await gateway.mask((await image.opening).key, fields);
    } catch (error) {
      if (error.reason !== "EMBEDDING_EXPIRED") throw error;
      await this._reopen(image);
      return gateway.mask((await image.opening).key, fields);
    }
  }

  // ---- clicks and boxes

  /** @param {0 | 1} label 1: on the object @param {number} since when, on the clock of `performance` */
  click(at, label, since = performance.now()) {
    if (this.image === null || !views.isInside(this.view, this.image, at)) return;
    this._askFor(withPoint(this.session.prompt, ...this._toImage(at), label), since);
  }

  box(from, to, since = performance.now()) {
    this._box = null;
    if (this.image === null) return;
    const [[x0, y0], [x1, y1]] = [this._toImage(from), this._toImage(to)];
    if (Math.abs(x1 - x0) < 1 || Math.abs(y1 - y0) < 1) this._draw();
    else this._askFor(withBox(this.session.prompt, [x0, y0], [x1, y1]), since);
  }

  drawBox(from, to) {
    if (this.image === null) return;
    this._stopPreview();
    this._box = [...this._toImage(from), ...this._toImage(to)];
    this._draw();
  }

  cancel() {
    Object.assign(this, { _box: null, _corner: null });
    this._draw();
  }

  _askFor(prompt, since) {
    this._stopPreview();
    this._clicked.set(prompt, since);
    this.session.ask(prompt, this.labels.chosen);
  }

  _came(prompt) {
    const { told } = this._parts;
    told.failed(null);
    const at = this.session.objects.findIndex((each) => each.prompt === prompt);
    if (at >= 0) {
      const { box, area, score } = this.answers.masks.get(prompt);
      const found = box === null ? "nothing found there" : `${area.toLocaleString("en")} pixels, score ${score.toFixed(2)}`;
      told.said(`Object ${at + 1}, ${this.session.objects[at].label}: ${found}.`);
    }
    this._toPaint.push(prompt);
    told.changed();
    this._draw();
  }

  // ---- the mouse that hovers

  hover(at) {
    if (!this.isPreviewing || !this._hover || !isEmpty(this.session.prompt)) return;
    if (views.isInside(this.view, this.image, at)) this._hover.move({ points: [this._toImage(at)] });
    else this.leave();
  }

  leave() {
    this._stopPreview();
    this._draw();
  }

  togglePreview() {
    this.isPreviewing = !this.isPreviewing;
    this.leave();
    this._parts.told.changed();
  }

  _previewed(mask) {
    if (!isEmpty(this.session.prompt) || this._box) return;
    this._preview = mask;
    this._parts.told.failed(null);
    this._parts.told.timed(`Preview: ${Math.round(mask.ms)} ms`);
    this._draw();
  }

  _stopPreview() {
    this._hover?.leave();
    this._preview = null;
  }

  // ---- the cross that keys move; it is in pixels of the image

  moveCursor(dx, dy) {
    if (this.image === null) return;
    const { width, height } = this._parts.screen.getBoundingClientRect();
    const from = this._cursor ? views.toScreen(this.view, this._cursor) : [width / 2 - dx, height / 2 - dy];
    this._cursor = this._toImage([from[0] + dx, from[1] + dy]);
    const at = views.toScreen(this.view, this._cursor);
    if (this._corner) this.drawBox(views.toScreen(this.view, this._corner), at);
    else this.hover(at);
    this._draw();
  }

  clickCursor(label) {
    this.moveCursor(0, 0);
    if (this.image !== null) this._askFor(withPoint(this.session.prompt, ...this._cursor, label), performance.now());
  }

  cornerCursor() {
    this.moveCursor(0, 0);
    if (this._corner) this.box(...[this._corner, this._cursor].map((place) => views.toScreen(this.view, place)));
    this._corner = this._corner || !this._cursor ? null : this._cursor;
  }

  // ---- objects

  finish() {
    this.session.finish();
  }

  undo() {
    this.session.undo();
  }

  redo() {
    this.session.redo();
  }

  removeCurrent() {
    if (this.session.current) this.session.remove(this.session.current.id);
  }

  selectNext(step) {
    const { objects, current } = this.session;
    if (objects.length === 0) return;
    const at = current ? objects.indexOf(current) + step : step > 0 ? 0 : -1;
    this.session.select(objects.at(at % objects.length).id);
  }

  /** For the current object, and those that follow. */
  useLabel(at) {
    if (!this.labels.choose(at)) return;
    if (this.session.current) this.session.relabel(this.session.current.id, this.labels.chosen);
    this._parts.told.changed();
  }

  removeLabel(at) {
    this.labels.remove(at);
    this._parts.told.changed();
  }

  /** The objects with their masks, those left out for which none has come. */
  masks() {
    return this.session.objects
      .map(({ id, label, prompt }) => ({ id, label, mask: maskOf(prompt, this.answers.masks) }))
      .filter(({ mask }) => mask !== null);
  }

  // ---- the view

  fit() {
    if (this.image) this._look(views.fit(this.image, this._parts.screen.getBoundingClientRect()));
  }

  zoom(factor, at = null) {
    const { width, height } = this._parts.screen.getBoundingClientRect();
    if (this.image) this._look(views.zoom(this.view, factor, at ?? [width / 2, height / 2]));
  }

  pan(dx, dy) {
    if (this.image) this._look(views.pan(this.view, dx, dy));
  }

  resized() {
    this._parts.painter.resize();
    if (this.image) this._look(this.view);
  }

  _look(view) {
    this.view = view;
    this._isDue.image = true;
    this._draw();
  }

  _toImage(at) {
    return views.toImage(this.view, this.image, at);
  }

  // ---- drawing

  _changed() {
    this.answers.follow(this.session.objects);
    this._parts.told.changed();
    this._draw();
  }

  _draw() {
    if (!this._isDue.marks && this.image) requestAnimationFrame(() => this._drawNow());
    this._isDue.marks = this.image !== null;
  }

  _drawNow() {
    const { painter } = this._parts;
    const { current, prompt } = this.session;
    const masks = this.masks().map(({ id, label, mask }) => ({
      mask,
      colour: colourOf(this.labels.names.indexOf(label)),
      isCurrent: id === current?.id,
    }));
    if (this._preview) masks.push({ mask: this._preview, colour: colourOf(this.labels.at), isCurrent: false });
    const boxes = [prompt.box, this._box].filter((box) => box !== null);
    if (this._isDue.image) painter.drawImage(this.view, this.image.bitmap);
    painter.drawMarks(this.view, masks, { points: prompt.points, boxes, cursor: this._cursor });
    this._isDue = { image: false, marks: false };
    if (this._toPaint.length > 0) setTimeout(() => this._painted()); // after this frame
  }

  _painted() {
    for (const prompt of this._toPaint.splice(0)) {
      if (!this._clicked.has(prompt)) continue;
      const { duration } = performance.measure("click to mask", { start: this._clicked.get(prompt), end: performance.now() });
      const { ms } = this.answers.masks.get(prompt);
      this._parts.told.timed(`Mask: ${Math.round(duration)} ms from the click, ${Math.round(ms)} of them in the gateway`);
    }
  }
}
