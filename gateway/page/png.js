// Masks as 8-bit grey PNG files. A canvas would write colours with alpha, and may change them on the way.

import { crc32 } from "./crc.js";
import { drawRuns } from "./rle.js";

const SIGNATURE = [137, 80, 78, 71, 13, 10, 26, 10];

/**
 * A picture of the image's size in which the pixels of each mask have its value; where masks overlap, the last one's.
 *
 * @param {{width: number, height: number}} image
 * @param {{mask: {rle: object}, value: number}[]} layers values 1 to 255
 * @returns {Promise<Uint8Array>} the file
 */
export async function maskFile({ width, height }, layers) {
  const rows = new Uint8Array(height * (width + 1)); // each row begins with its filter, 0: none
  for (const { mask, value } of layers) {
    drawRuns(mask.rle, [0, 0, width, height], value).forEach((pixel, at) => {
      if (pixel) rows[at + Math.floor(at / width) + 1] = pixel;
    });
  }
  const head = new Uint8Array(13);
  const view = new DataView(head.buffer);
  view.setUint32(0, width);
  view.setUint32(4, height);
  head.set([8, 0, 0, 0, 0], 8); // bits, grey, deflate, filters by row, not interlaced
  const parts = [chunk("IHDR", head), chunk("IDAT", await deflated(rows)), chunk("IEND", new Uint8Array())];
  return new Uint8Array(await new Blob([new Uint8Array(SIGNATURE), ...parts]).arrayBuffer());
}

async function deflated(bytes) {
  const stream = new Blob([bytes]).stream().pipeThrough(new CompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

function chunk(name, content) {
  const bytes = new Uint8Array(content.length + 12);
  const view = new DataView(bytes.buffer);
  view.setUint32(0, content.length);
  bytes.set(new TextEncoder().encode(name), 4);
  bytes.set(content, 8);
  view.setUint32(content.length + 8, crc32(bytes.subarray(4, content.length + 8)));
  return bytes;
}
