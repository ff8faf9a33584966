// Clicks on a photo, refines the mask with further clicks, and writes it as a PNG to lay over the photo.
//   node click.mjs photo.jpg --click 131,410 --click 127,189 --out mask.png
//   node click.mjs photo.jpg --click 131,410:1 --click 600,370:0 --ca ca.pem --token-file token
import { readFileSync } from "node:fs";
import { writeFile } from "node:fs/promises";
import { parseArgs } from "node:util";
import { Splitsam } from "./client.mjs";
import { SplitsamError } from "./errors.mjs";
import { overlay } from "./mask.mjs";

const text = (fallback) => ({ type: "string", ...(fallback && { default: fallback }) });
const { values, positionals } = parseArgs({
  allowPositionals: true,
  options: {
    encoder: text("127.0.0.1:50051"),
    decoder: text("127.0.0.1:50052"),
    protos: text(new URL("../../protos", import.meta.url).pathname),
    "token-file": text(),
    ca: text(),
    cert: text(),
    key: text(),
    "server-name": text(),
    "timeout-ms": text("30000"),
    click: { type: "string", multiple: true },
    out: text(),
  },
});
const [photo] = positionals;
if (!photo || !values.click) throw new Error("usage: node click.mjs PHOTO --click X,Y[:1|:0] [--click ...] [--out FILE]");

const points = values.click.map((click) => {
  const [, x, y, label] = /^([\d.]+),([\d.]+)(?::([01]))?$/.exec(click) ?? [];
  if (x === undefined) throw new Error(`--click takes X,Y, X,Y:1 or X,Y:0, not ${click}`);
  return { x: Number(x), y: Number(y), label: label === "0" ? "POINT_LABEL_BACKGROUND" : "POINT_LABEL_FOREGROUND" };
});
const { ca, cert, key, "server-name": serverName } = values;
const sam = new Splitsam({
  ...values,
  token: values["token-file"] && readFileSync(values["token-file"], "utf8").trim(),
  tls: (ca || cert || serverName) && { ca, cert, key, serverName },
  timeoutMs: Number(values["timeout-ms"]),
});

try {
  let image = await sam.encode(photo);
  console.log(`${photo}: ${image.width} x ${image.height}, ${image.sent ? "sent and encoded" : "was encoded before"}`);
  let mask;
  for (let clicks = 1; clicks <= points.length; clicks++) {
    // Each further click refines what the clicks before it gave: all points so far, and the token of the last mask.
    const prompt = { points: points.slice(0, clicks), ...(mask && { refinementToken: mask.refinementToken }) };
    const answer = await sam.predict(image, prompt, { refinementTokens: true });
    image = answer.image;
    [mask] = answer.masks;
    console.log(`${clicks} clicks: score ${mask.predictedIou.toFixed(3)}, area ${mask.areaPx} px`);
  }
  if (values.out) await writeFile(values.out, overlay(mask.rle));
} catch (error) {
  if (!(error instanceof SplitsamError)) throw error;
  console.error(`${error.message}${error.requestId ? `, request ${error.requestId}` : ""}`);
  process.exitCode = 1;
} finally {
  sam.close();
}
