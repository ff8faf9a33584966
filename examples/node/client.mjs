// A client of both services: looks an image up before it sends it, waits as it is told, encodes again what has expired.
// protos/PROTOCOL.md says what each of these rules is for.
import { createHash } from "node:crypto";
import { readFileSync } from "node:fs";
import { readFile } from "node:fs/promises";
import { setTimeout as sleep } from "node:timers/promises";
import grpc from "@grpc/grpc-js";
import loader from "@grpc/proto-loader";
import { SplitsamError } from "./errors.mjs";

const FILES = ["splitsam/v1/encoder.proto", "splitsam/v1/decoder.proto"];
const LOADING = { longs: Number, enums: String, defaults: true, oneofs: true };
const RETRYABLE = new Set([grpc.status.RESOURCE_EXHAUSTED, grpc.status.UNAVAILABLE]);
const ATTEMPTS = 5;

export class Splitsam {
  /**
   * @param {object} options
   * @param {string} options.encoder host:port of the encoder service
   * @param {string} options.decoder host:port of the decoder service
   * @param {string} options.protos folder with splitsam/v1/*.proto
   * @param {string} [options.token] sent as `authorization: Bearer` with every call
   * @param {{ca?: string, cert?: string, key?: string, serverName?: string}} [options.tls] PEM files; absent: plain text
   * @param {number} [options.timeoutMs] deadline of one `encode` or one `predict`, waits included
   */
  constructor({ encoder, decoder, protos, token, tls, timeoutMs = 30_000 }) {
    const definition = loader.loadSync(FILES, { ...LOADING, includeDirs: [protos] });
    const { EncoderService, DecoderService } = grpc.loadPackageDefinition(definition).splitsam.v1;
    const read = (path) => (path ? readFileSync(path) : null);
    const credentials = tls
      ? grpc.credentials.createSsl(read(tls.ca), read(tls.key), read(tls.cert))
      : grpc.credentials.createInsecure();
    const options = tls?.serverName
      ? { "grpc.ssl_target_name_override": tls.serverName, "grpc.default_authority": tls.serverName }
      : {};
    this.encoder = new EncoderService(encoder, credentials, options);
    this.decoder = new DecoderService(decoder, credentials, options);
    this.metadata = new grpc.Metadata();
    if (token) this.metadata.set("authorization", `Bearer ${token}`);
    this.timeoutMs = timeoutMs;
  }

  close() {
    this.encoder.close();
    this.decoder.close();
  }

  /** Encode the image file at a path; its bytes are sent only if nobody has encoded it yet. Returns a handle to it. */
  async encode(path) {
    const deadline = Date.now() + this.timeoutMs;
    const image = await readFile(path);
    const imageSha256 = createHash("sha256").update(image).digest();
    // Without a cache nothing can be looked up, and the image has to be sent.
    const lookUp = this.#call(this.encoder, "lookUpEmbedding", { imageSha256 }, deadline, "CACHE_UNAVAILABLE");
    const found = await lookUp.catch((error) => {
      if (error.reason !== "CACHE_UNAVAILABLE") throw error;
      return { found: false };
    });
    const answer = found.found
      ? { embedding: found.embedding, cacheHit: true }
      : await this.#call(this.encoder, "encodeImage", { image }, deadline);
    const { embeddingKey: key, imageSize } = answer.embedding;
    return { path, key, width: imageSize.width, height: imageSize.height, cacheHit: answer.cacheHit, sent: !found.found };
  }

  /**
   * Masks for one prompt on an image that `encode` gave a handle to.
   *
   * An embedding that has expired, or that another model made, is encoded again, once. A refinement token that has expired is
   * left out: the answer is then the prompt's own mask, unrefined.
   *
   * @param {object} image a handle; the answer has the one to go on with
   * @param {object} prompt as splitsam.v1.Prompt: points, box, refinementToken
   * @param {object} [output] as splitsam.v1.OutputOptions
   */
  async predict(image, prompt, output = {}) {
    const deadline = Date.now() + this.timeoutMs;
    for (let renewals = 0; ; ) {
      try {
        const images = [{ embeddingKey: image.key, prompts: [prompt] }];
        const answer = await this.#call(this.decoder, "predictMasks", { images, output }, deadline);
        return { image, masks: answer.images[0].prompts[0].masks };
      } catch (error) {
        if (error.reason === "REFINEMENT_EXPIRED") {
          const { refinementToken, ...rest } = prompt;
          if (!refinementToken || !(rest.points?.length || rest.box)) throw error;
          prompt = rest;
        } else if (["EMBEDDING_EXPIRED", "MODEL_MISMATCH"].includes(error.reason) && renewals++ === 0) {
          image = await this.encode(image.path);
        } else {
          throw error;
        }
      }
    }
  }

  /** One call, sent again exactly when the server says, a few times, never past the deadline, nor for one reason. */
  async #call(client, method, request, deadline, noRetryOn = undefined) {
    for (let attempt = 1; ; attempt++) {
      try {
        return await new Promise((resolve, reject) =>
          client[method](request, this.metadata, { deadline }, (error, answer) =>
            error ? reject(new SplitsamError(error)) : resolve(answer),
          ),
        );
      } catch (error) {
        const wait = error.retryDelayMs;
        const mayRetry = RETRYABLE.has(error.code) && wait !== undefined && attempt < ATTEMPTS;
        if (!mayRetry || error.reason === noRetryOn || Date.now() + wait >= deadline) throw error;
        await sleep(wait);
      }
    }
  }
}
