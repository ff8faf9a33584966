// The files that a page full of objects is saved as.

import { cocoFile } from "./coco.js";
import { maskFile } from "./png.js";
import { zipFile } from "./zip.js";

const INSIDE = 255;

/** COCO's JSON. @param {"rle" | "polygons"} kind @returns {{name: string, content: Blob}} */
export function cocoOf({ picture, labels }, objects, kind) {
  const text = JSON.stringify(cocoFile(picture, objects, labels.names, kind));
  return { name: `${stem(picture.name)}.coco.json`, content: new Blob([text], { type: "application/json" }) };
}

/** A ZIP with a PNG for each object, 255 inside, and one in which each has its number. */
export async function masksOf({ picture }, objects) {
  const files = [];
  for (const [at, { label, mask }] of objects.entries()) {
    files.push({ name: `${at + 1}-${plain(label)}.png`, content: await maskFile(picture, [{ mask, value: INSIDE }]) });
  }
  const all = objects.slice(0, INSIDE).map(({ mask }, at) => ({ mask, value: at + 1 }));
  files.push({ name: "objects.png", content: await maskFile(picture, all) });
  return { name: `${stem(picture.name)}.masks.zip`, content: zipFile(files) };
}

function stem(name) {
  return plain(name.replace(/\.[^.]*$/, "")) || "image";
}

/** As a file may be called anywhere. */
function plain(text) {
  return text.replace(/[^\p{L}\p{N}._-]+/gu, "_").replace(/^\.+/, "");
}
