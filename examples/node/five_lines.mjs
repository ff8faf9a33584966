import { readFile } from "node:fs/promises";
import { promisify } from "node:util";
import grpc from "@grpc/grpc-js";
import loader from "@grpc/proto-loader";

const files = ["splitsam/v1/encoder.proto", "splitsam/v1/decoder.proto"];
const definition = loader.loadSync(files, { includeDirs: ["protos"], longs: Number });
const { EncoderService, DecoderService } = grpc.loadPackageDefinition(definition).splitsam.v1;
const encoder = new EncoderService("127.0.0.1:50051", grpc.credentials.createInsecure());
const decoder = new DecoderService("127.0.0.1:50052", grpc.credentials.createInsecure());

const { embedding } = await promisify(encoder.encodeImage).call(encoder, { image: await readFile("photo.jpg") });
const prompts = [{ points: [{ x: 500, y: 300, label: "POINT_LABEL_FOREGROUND" }] }];
const images = [{ embeddingKey: embedding.embeddingKey, prompts }];
const answer = await promisify(decoder.predictMasks).call(decoder, { images });
console.log(answer.images[0].prompts[0].masks[0]); // { predictedIou, areaPx, box, rle: { size, counts }, ... }
