// Asks for masks with keys and tokens that the decoder does not take, all at once; prints what each one got, as JSON.
//   node recovery.mjs ENCODER DECODER TOKEN_FILE IMAGE UNKNOWN_KEY OTHER_MODELS_KEY
import { readFileSync } from "node:fs";
import { Splitsam } from "./client.mjs";

const [encoder, decoder, tokenFile, path, ...keys] = process.argv.slice(2);
const token = readFileSync(tokenFile, "utf8").trim();
const sam = new Splitsam({ encoder, decoder, protos: "protos", token, timeoutMs: 100_000 });
const prompt = { points: [{ x: 100, y: 120, label: "POINT_LABEL_FOREGROUND" }] };
const image = await sam.encode(path);
const asked = [
  ...keys.map((key) => sam.predict({ ...image, key }, prompt)),
  sam.predict(image, { ...prompt, refinementToken: "0".repeat(64) }),
  sam.predict({ ...image, key: "no key" }, prompt),
];
const settled = await Promise.allSettled(asked);
const answers = settled.map(({ value, reason }) =>
  value
    ? { key: value.image.key, area: value.masks[0].areaPx }
    : { reason: reason.reason, violations: reason.violations, requestId: reason.requestId },
);
console.log(JSON.stringify({ key: image.key, sent: image.sent, answers }));
sam.close();
