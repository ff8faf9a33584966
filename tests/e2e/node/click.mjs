// Encodes an image, clicks on it, and provokes an error; prints what came of it as JSON.
//   SPLITSAM_TOKEN=... node click.mjs ENCODER DECODER PROTOS IMAGE X Y
import { readFile } from "node:fs/promises";
import grpc from "@grpc/grpc-js";
import loader from "@grpc/proto-loader";

const [encoderAddress, decoderAddress, protos, path, x, y] = process.argv.slice(2);
const files = ["splitsam/v1/encoder.proto", "splitsam/v1/decoder.proto"];
const definition = loader.loadSync(files, { includeDirs: [protos], longs: Number, enums: String, defaults: true });
const { EncoderService, DecoderService } = grpc.loadPackageDefinition(definition).splitsam.v1;
const credentials = grpc.credentials.createInsecure();
const encoder = new EncoderService(encoderAddress, credentials);
const decoder = new DecoderService(decoderAddress, credentials);

const metadata = new grpc.Metadata();
if (process.env.SPLITSAM_TOKEN) metadata.set("authorization", `Bearer ${process.env.SPLITSAM_TOKEN}`);

function call(client, method, request) {
  const deadline = Date.now() + 60_000;
  return new Promise((resolve, reject) =>
    client[method](request, metadata, { deadline }, (error, answer) => (error ? reject(error) : resolve(answer))),
  );
}

const encoded = await call(encoder, "encodeImage", { image: await readFile(path) });
const { embeddingKey, imageSize } = encoded.embedding;
const click = (point) => ({ images: [{ embeddingKey, prompts: [{ points: [point] }] }] });
const answer = await call(decoder, "predictMasks", click({ x, y, label: "POINT_LABEL_FOREGROUND" }));
const [mask] = answer.images[0].prompts[0].masks;
const refusal = await call(decoder, "predictMasks", click({ x, y })).catch((error) => error);

console.log(
  JSON.stringify({
    image: imageSize,
    cacheHit: encoded.cacheHit,
    index: mask.maskIndex,
    score: mask.predictedIou,
    area: mask.areaPx,
    box: mask.box,
    rle: { size: mask.rle.size, bytes: mask.rle.counts.length },
    error: { code: refusal.code, name: grpc.status[refusal.code], details: refusal.details },
  }),
);
encoder.close();
decoder.close();
