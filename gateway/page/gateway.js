// The gateway's JSON API. What fails is a `Refused`, whose message is for whoever labels.

export class Refused extends Error {
  /** @param {string} reason stable and upper-case, as EMBEDDING_EXPIRED */
  constructor(message, reason) {
    super(message);
    this.reason = reason;
  }
}

const AWAY = "The gateway cannot be reached: check the connection, then try again.";

export class Gateway {
  /**
   * @param {() => string | null} token the caller's, if there is one
   * @param {(message: string) => Promise<boolean>} login called where one is needed; whether one was given
   */
  constructor(token, login) {
    this.token = token;
    this._askForToken = login;
    this._loggingIn = null;
  }

  /**
   * Open an image: by its digest alone if it was opened before, else by sending it.
   *
   * @param {Blob} file
   * @returns {Promise<{key: string, width: number, height: number, cache_hit: boolean, ms: number}>}
   */
  async open(file) {
    if (globalThis.crypto?.subtle) { // only where the page is served over TLS, or on this machine
      const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", await file.arrayBuffer()));
      const name = [...digest].map((byte) => byte.toString(16).padStart(2, "0")).join("");
      try {
        return await this._call(`/v1/images/${name}`);
      } catch (error) {
        if (error.reason !== "NOT_ENCODED") throw error;
      }
    }
    return this._call("/v1/images", file, "application/octet-stream");
  }

  /** The best mask of a prompt, to refine and to export. */
  async mask(key, fields) {
    const asked = { key, ...fields, formats: ["rle", "polygons"], refinement_tokens: true };
    const answer = await this._call("/v1/masks", JSON.stringify(asked), "application/json");
    return { ...answer.masks[0], ms: answer.ms };
  }

  async _call(path, body, type) {
    const token = this.token();
    const headers = { ...(token && { authorization: `Bearer ${token}` }), ...(type && { "content-type": type }) };
    let response;
    try {
      response = await fetch(path, { method: body === undefined ? "GET" : "POST", headers, body, cache: "no-store" });
    } catch {
      throw new Refused(AWAY, "AWAY");
    }
    const answer = await response.json().catch(() => null);
    if (response.ok && answer !== null) return answer;
    if (response.status === 401 && (await this._logIn(refusal(answer).message))) return this._call(path, body, type);
    throw refusal(answer, `The gateway answered with status ${response.status}; try again in a moment.`);
  }

  /** Whoever is refused meanwhile waits for the same token. */
  _logIn(message) {
    this._loggingIn ??= this._askForToken(message).finally(() => {
      this._loggingIn = null;
    });
    return this._loggingIn;
  }
}

/** What an answer with an error says. */
export function refusal(answer, otherwise = AWAY) {
  return new Refused(answer?.error?.message ?? otherwise, answer?.error?.reason ?? "UNKNOWN");
}
