// The gateway's pointer: what a click would give, while the mouse moves. Only the newest position matters, here too: one
// that the network has not taken yet is replaced by the next.

import { Refused, refusal } from "./gateway.js";

const WAIT_MS = [1000, 2000, 5000, 15_000]; // after the connection was lost, or could not be opened again
const NO_PREVIEW = "There is no preview at the moment: its connection to the gateway cannot be opened.";

export class Hover {
  /**
   * @param {{key: string, token: string | null}} start
   * @param {{came: (mask: object) => void, failed: (error: Error) => void}} told
   */
  constructor(start, told) {
    this._start = JSON.stringify({ key: start.key, formats: ["rle"], ...(start.token && { token: start.token }) });
    this._told = told;
    this._socket = null;
    this._waiting = null;
    this._sent = 0;
    this._wanted = 0; // answers to positions before this one are stale
    this._notBefore = 0;
    this._losses = 0;
    this._isClosed = false;
  }

  /** @param {{points: number[][]}} fields */
  move(fields) {
    this._waiting = fields;
    this._send();
  }

  /** The mouse has gone: what is still on its way is not shown. */
  leave() {
    this._waiting = null;
    this._wanted = this._sent + 1;
  }

  close() {
    this._isClosed = true;
    this._socket?.close();
  }

  _send() {
    if (this._waiting === null || this._isClosed) return;
    if (this._socket === null) this._connect();
    else if (this._socket.readyState === WebSocket.OPEN) {
      if (this._socket.bufferedAmount > 0) {
        requestAnimationFrame(() => this._send());
        return;
      }
      this._socket.send(JSON.stringify({ id: ++this._sent, ...this._waiting }));
      this._waiting = null;
    }
  }

  _connect() {
    if (performance.now() < this._notBefore) return;
    const url = new URL("/v1/pointer", location.href);
    url.protocol = url.protocol.replace("http", "ws");
    const socket = new WebSocket(url);
    this._socket = socket;
    socket.onopen = () => {
      this._losses = 0;
      socket.send(this._start);
      this._send();
    };
    socket.onmessage = ({ data }) => this._hear(JSON.parse(data));
    socket.onerror = () => this._told.failed(new Refused(NO_PREVIEW, "NO_PREVIEW"));
    socket.onclose = () => {
      this._socket = null;
      this._notBefore = performance.now() + WAIT_MS[Math.min(this._losses++, WAIT_MS.length - 1)];
    };
  }

  _hear(answer) {
    if (this._isClosed) return;
    if (answer.error) this._told.failed(refusal(answer));
    else if (answer.masks && answer.id >= this._wanted) {
      this._wanted = answer.id;
      this._told.came({ ...answer.masks[0], ms: answer.ms });
    }
  }
}
