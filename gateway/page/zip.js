// Several files in one, as a browser asks before a page may save many. They are stored as they are: PNG is compressed.

import { crc32 } from "./crc.js";

const FLAGS = 0x0800; // names are UTF-8
const DATE = 0x0021; // 1 January 1980: the same masks make the same file

/**
 * @param {{name: string, content: Uint8Array}[]} files
 * @returns {Blob}
 */
export function zipFile(files) {
  const parts = [];
  const entries = [];
  let offset = 0;
  for (const { name, content } of files) {
    const path = new TextEncoder().encode(name);
    const about = [20, FLAGS, 0, 0, DATE, [crc32(content)], [content.length], [content.length], path.length, 0];
    const local = record(0x04034b50, about);
    entries.push(record(0x02014b50, [20, ...about, 0, 0, 0, [0], [offset]]), path);
    parts.push(local, path, content);
    offset += local.length + path.length + content.length;
  }
  const size = entries.reduce((sum, each) => sum + each.length, 0);
  const end = record(0x06054b50, [0, 0, files.length, files.length, [size], [offset], 0]);
  return new Blob([...parts, ...entries, end], { type: "application/zip" });
}

/** Numbers of two bytes, those in brackets of four, after a signature of four; all little-endian. */
function record(signature, fields) {
  const all = [[signature], ...fields];
  const view = new DataView(new ArrayBuffer(all.reduce((sum, each) => sum + (Array.isArray(each) ? 4 : 2), 0)));
  let at = 0;
  for (const field of all) {
    if (Array.isArray(field)) view.setUint32(at, field[0], true);
    else view.setUint16(at, field, true);
    at += Array.isArray(field) ? 4 : 2;
  }
  return new Uint8Array(view.buffer);
}
