// COCO's run lengths: column by column, beginning with a run outside the mask, written as pycocotools writes them.

/**
 * The run lengths in a string of COCO's compressed RLE.
 *
 * Six bits a letter, the lowest five first: the sixth says that more follow, the highest bit given is the sign. From the
 * fourth run on, what is written is the difference to the run before the previous one.
 *
 * @param {string} counts
 * @returns {number[]} pixels outside, inside, outside, ...
 */
export function readCounts(counts) {
  const runs = [];
  let at = 0;
  while (at < counts.length) {
    let value = 0;
    let shift = 0;
    let letter;
    do {
      if (at === counts.length) throw new RangeError("the mask is cut off");
      letter = counts.charCodeAt(at++) - 48;
      value |= (letter & 31) << shift;
      shift += 5;
    } while (letter & 32);
    if (letter & 16 && shift < 32) value |= -1 << shift;
    runs.push(runs.length > 2 ? value + runs[runs.length - 2] : value);
  }
  return runs;
}

/**
 * The mask's pixels inside a box of whole pixels that holds all of them, row by row.
 *
 * @param {{size: [number, number], counts: string}} rle its size is [height, width]
 * @param {[number, number, number, number]} box x0, y0, x1, y1, the last two exclusive
 * @param {number} inside what pixels of the mask become
 * @returns {Uint32Array} (y1 - y0) * (x1 - x0) values, 0 outside the mask
 */
export function drawRuns(rle, [x0, y0, x1, y1], inside) {
  const height = rle.size[0];
  const width = x1 - x0;
  const pixels = new Uint32Array(width * (y1 - y0));
  let at = 0;
  readCounts(rle.counts).forEach((run, index) => {
    const end = at + run;
    if (index % 2 === 0) {
      at = end;
      return;
    }
    while (at < end) {
      const x = Math.floor(at / height);
      const y = at - x * height;
      const rows = Math.min(end - at, height - y);
      for (let to = (y - y0) * width + x - x0, row = 0; row < rows; row++, to += width) pixels[to] = inside;
      at += rows;
    }
  });
  return pixels;
}
