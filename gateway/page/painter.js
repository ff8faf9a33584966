// Draws the image on one canvas, and on another above it the masks, clicks and boxes.

import { drawRuns } from "./rle.js";
import { toScreen } from "./view.js";

const FILL = 0x73; // of 255: the image has to be seen through it
const FILL_CURRENT = 0x99;
const TURN = 2 * Math.PI;

export class Painter {
  /** @param {HTMLCanvasElement} below the image @param {HTMLCanvasElement} above all else */
  constructor(below, above) {
    this._below = below.getContext("2d");
    this._above = above.getContext("2d");
    this._layers = new WeakMap();
  }

  /** Take the size that the canvases have on the page. */
  resize() {
    for (const { canvas } of [this._below, this._above]) {
      canvas.width = Math.round(canvas.clientWidth * devicePixelRatio);
      canvas.height = Math.round(canvas.clientHeight * devicePixelRatio);
    }
  }

  drawImage(view, bitmap) {
    const context = this._begin(this._below);
    context.imageSmoothingEnabled = view.scale < 2;
    context.setTransform(this._matrix(view));
    context.drawImage(bitmap, 0, 0);
  }

  /**
   * @param {{mask: object, colour: string, isCurrent: boolean}[]} masks
   * @param {{points: object[], boxes: number[][], cross: number[] | null}} marks pixels of the image
   */
  drawMarks(view, masks, marks) {
    const context = this._begin(this._above);
    context.imageSmoothingEnabled = view.scale < 1;
    for (const each of masks) this._drawMask(context, view, each);
    context.setTransform(devicePixelRatio, 0, 0, devicePixelRatio, 0, 0);
    for (const [x0, y0, x1, y1] of marks.boxes) this._drawBox(context, toScreen(view, [x0, y0]), toScreen(view, [x1, y1]));
    for (const point of marks.points) this._drawPoint(context, toScreen(view, [point.x, point.y]), point.label);
    if (marks.cross) this._drawCross(context, toScreen(view, marks.cross));
  }

  _begin(context) {
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.clearRect(0, 0, context.canvas.width, context.canvas.height);
    return context;
  }

  _matrix({ scale, x, y }) {
    const ratio = devicePixelRatio;
    return new DOMMatrix([scale * ratio, 0, 0, scale * ratio, x * ratio, y * ratio]);
  }

  _drawMask(context, view, { mask, colour, isCurrent }) {
    if (mask.box === null) return;
    context.setTransform(this._matrix(view));
    context.drawImage(this._layer(mask, colour, isCurrent), mask.box[0], mask.box[1]);
    if (!mask.polygons) return;
    context.setTransform(this._matrix({ ...view, x: view.x + view.scale / 2, y: view.y + view.scale / 2 })); // centres of pixels
    context.lineJoin = "round";
    for (const [width, style] of isCurrent ? [[4, "#000c"], [2, "#fff"]] : [[1.5, colour]]) {
      context.lineWidth = width / view.scale;
      context.strokeStyle = style;
      context.stroke(outline(mask.polygons));
    }
  }

  /** The mask in its colour, as large as its box; made once. */
  _layer(mask, colour, isCurrent) {
    const name = `${colour} ${isCurrent}`;
    const layers = this._layers.get(mask) ?? new Map();
    this._layers.set(mask, layers);
    if (!layers.has(name)) layers.set(name, layerOf(mask, colour, isCurrent ? FILL_CURRENT : FILL));
    return layers.get(name);
  }

  _drawBox(context, [x0, y0], [x1, y1]) {
    for (const [width, style] of [[4, "#000a"], [2, "#fff"]]) {
      context.lineWidth = width;
      context.strokeStyle = style;
      context.strokeRect(x0, y0, x1 - x0, y1 - y0);
    }
  }

  /** A plus or a minus: the colour alone would not tell everybody. */
  _drawPoint(context, [x, y], label) {
    context.beginPath();
    context.arc(x, y, 8, 0, TURN);
    context.fillStyle = label ? "#0a7d33" : "#c4161c";
    context.fill();
    context.lineWidth = 2;
    context.strokeStyle = "#fff";
    context.moveTo(x - 4, y);
    context.lineTo(x + 4, y);
    if (label) {
      context.moveTo(x, y - 4);
      context.lineTo(x, y + 4);
    }
    context.stroke();
  }

  _drawCross(context, [x, y]) {
    for (const [width, style] of [[4, "#000"], [2, "#fff"]]) {
      context.lineWidth = width;
      context.strokeStyle = style;
      context.beginPath();
      for (const [dx, dy] of [[1, 0], [-1, 0], [0, 1], [0, -1]]) {
        context.moveTo(x + 5 * dx, y + 5 * dy);
        context.lineTo(x + 16 * dx, y + 16 * dy);
      }
      context.stroke();
    }
  }
}

/** @param {string} colour as #rrggbb */
function layerOf(mask, colour, alpha) {
  const [x0, y0, x1, y1] = mask.box;
  const [red, green, blue] = [1, 3, 5].map((at) => parseInt(colour.slice(at, at + 2), 16));
  const pixels = drawRuns(mask.rle, mask.box, ((alpha << 24) | (blue << 16) | (green << 8) | red) >>> 0); // little-endian
  const layer = new OffscreenCanvas(x1 - x0, y1 - y0);
  layer.getContext("2d").putImageData(new ImageData(new Uint8ClampedArray(pixels.buffer), x1 - x0), 0, 0);
  return layer;
}

function outline(polygons) {
  const path = new Path2D();
  for (const ring of polygons.flatMap(({ outer, holes }) => [outer, ...holes])) {
    path.moveTo(ring[0], ring[1]);
    for (let at = 2; at < ring.length; at += 2) path.lineTo(ring[at], ring[at + 1]);
    path.closePath();
  }
  return path;
}
