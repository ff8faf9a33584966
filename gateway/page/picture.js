// An image that is open on the page, and its embedding, which the services may forget.

const REOPENED_MS = 5000; // where the cache is away, an image is not sent again for every click

export class Picture {
  /**
   * @param {File} file
   * @param {ImageBitmap} bitmap of it, upright
   * @param {import("./gateway.js").Gateway} gateway
   */
  constructor(file, bitmap, gateway) {
    Object.assign(this, { name: file.name, width: bitmap.width, height: bitmap.height, bitmap });
    this._file = file;
    this._gateway = gateway;
    this._reopened = -Infinity;
    this._opening = gateway.open(file);
  }

  /** What opening it answered; throws `Refused`. */
  opened() {
    return this._opening;
  }

  get mayReopen() {
    return performance.now() > this._reopened + REOPENED_MS;
  }

  reopen() {
    if (this.mayReopen) {
      this._reopened = performance.now();
      this._opening = this._gateway.open(this._file);
    }
    return this._opening;
  }

  /** The mask of a prompt's fields; the image is opened again if it has been forgotten. */
  async mask(fields) {
    try {
      return await this._gateway.mask((await this._opening).key, fields);
    } catch (error) {
      if (error.reason !== "EMBEDDING_EXPIRED") throw error;
      return this._gateway.mask((await this.reopen()).key, fields);
    }
  }
}
