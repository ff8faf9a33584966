// A mask's run lengths, decoded as COCO writes them, and drawn.
import pngjs from "pngjs";

/**
 * Column-major run lengths, zeros first. A number is groups of five bits, the lowest first, each a character from "0" on with
 * 32 added while more follow; it is negative where the last group's highest bit is set. From the fourth number
 * on it is the difference to the last but one.
 */
export function runLengths(counts) {
  const runs = [];
  for (let at = 0; at < counts.length; ) {
    let value = 0;
    let shift = 0;
    let group;
    do {
      group = counts.charCodeAt(at++) - 48;
      value |= (group & 31) << shift;
      shift += 5;
    } while (group & 32);
    if (group & 16) value |= -1 << shift;
    runs.push(runs.length > 2 ? value + runs[runs.length - 2] : value);
  }
  return runs;
}

/** Rows of a mask, one byte a pixel: 1 inside, 0 outside. */
export function pixels({ size: [height, width], counts }) {
  const rows = new Uint8Array(height * width);
  let column = 0;
  let row = 0;
  runLengths(counts).forEach((run, index) => {
    for (let left = run; left > 0; left--) {
      rows[row * width + column] = index % 2;
      if (++row === height) [row, column] = [0, column + 1];
    }
  });
  return rows;
}

/** A PNG to lay over the photo: a colour where the mask is, nothing elsewhere. */
export function overlay(rle, [red, green, blue] = [30, 144, 255]) {
  const [height, width] = rle.size;
  const picture = new pngjs.PNG({ width, height });
  pixels(rle).forEach((inside, index) => picture.data.set([red, green, blue, inside * 128], 4 * index));
  return pngjs.PNG.sync.write(picture);
}
