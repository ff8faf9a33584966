// Prints the pixels of run lengths, as JSON: [{ size, counts }, ...] comes in on stdin.
import { readFileSync } from "node:fs";
import { pixels } from "./mask.mjs";

const masks = JSON.parse(readFileSync(0, "utf8"));
console.log(JSON.stringify(masks.map((rle) => Buffer.from(pixels(rle)).toString("base64"))));
