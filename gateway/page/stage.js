// Where the picture is shown: which part of it, and when it is drawn anew, at most once a frame.

import * as views from "./view.js";

export class Stage {
  /**
   * @param {import("./painter.js").Painter} painter
   * @param {HTMLElement} screen
   */
  constructor(painter, screen) {
    this._painter = painter;
    this._screen = screen;
    this._picture = null;
    this._view = null;
    this._isImageDue = false;
    this._isDue = false;
  }

  /**
   * @param {import("./picture.js").Picture} picture
   * @param {() => {masks: object[], marks: object}} scene what is on it, as `Painter.drawMarks` takes it
   * @param {() => void} painted called after every frame
   */
  show(picture, scene, painted) {
    Object.assign(this, { _picture: picture, _scene: scene, _painted: painted });
    this.fit();
  }

  /** Soon. */
  draw() {
    if (this._isDue || this._picture === null) return;
    this._isDue = true;
    requestAnimationFrame(() => this._drawNow());
  }

  fit() {
    if (this._picture) this._look(views.fit(this._picture, this._screen.getBoundingClientRect()));
  }

  zoom(factor, at = this.centre) {
    if (this._picture) this._look(views.zoom(this._view, factor, at));
  }

  pan(dx, dy) {
    if (this._picture) this._look(views.pan(this._view, dx, dy));
  }

  /** The page gave it another size. */
  resized() {
    this._painter.resize();
    if (this._picture) this._look(this._view);
  }

  get centre() {
    const { width, height } = this._screen.getBoundingClientRect();
    return [width / 2, height / 2];
  }

  holds(at) {
    return this._picture !== null && views.isInside(this._view, this._picture, at);
  }

  toImage(at) {
    return views.toImage(this._view, this._picture, at);
  }

  toScreen(place) {
    return views.toScreen(this._view, place);
  }

  _look(view) {
    this._view = view;
    this._isImageDue = true;
    this.draw();
  }

  _drawNow() {
    this._isDue = false;
    if (this._isImageDue) this._painter.drawImage(this._view, this._picture.bitmap);
    this._isImageDue = false;
    const { masks, marks } = this._scene();
    this._painter.drawMarks(this._view, masks, marks);
    setTimeout(this._painted); // its turn comes when the frame is done
  }
}
