// What keys and the mouse do: one table for the page to act on and for its help to show.

/**
 * @typedef {object} Binding
 * @property {string[]} keys as `nameOf` names them
 * @property {string} action of the page, of `Labeling`, its stage or its session
 * @property {any[]} [arguments]
 * @property {boolean} [onPicture] only while the picture has the focus: elsewhere the key presses a button or scrolls
 * @property {string} [shown] and `says`: a row of the help; bindings of one row name it once
 * @property {string} [says]
 */

const CROSS = "Move the cross; with Shift, far";
/** @type {Binding[]} */
export const BINDINGS = [
  { keys: ["o"], action: "chooseFile", shown: "O", says: "Open an image; dropping or pasting one does, too" },
  { keys: ["Ctrl+z"], action: "undo", shown: "Ctrl Z", says: "Undo" },
  { keys: ["Ctrl+y", "Ctrl+Shift+z"], action: "redo", shown: "Ctrl Y", says: "Redo" },
  { keys: ["n"], action: "finish", shown: "N or Enter", says: "Finish the object; the next click begins another" },
  { keys: ["Enter"], action: "finish", onPicture: true },
  { keys: [","], action: "selectNext", arguments: [-1], shown: ", and .", says: "The object before, the object after" },
  { keys: ["."], action: "selectNext", arguments: [1] },
  { keys: ["Delete"], action: "removeCurrent", shown: "Delete", says: "Remove the object" },
  ...Array.from({ length: 9 }, (_, at) => ({
    keys: [`${at + 1}`],
    action: "useLabel",
    arguments: [at],
    ...(at === 0 && { shown: "1 to 9", says: "Choose a label" }),
  })),
  { keys: ["+", "="], action: "zoom", arguments: [1.25], shown: "+ and −", says: "Zoom in, zoom out" },
  { keys: ["-"], action: "zoom", arguments: [0.8] },
  { keys: ["0"], action: "fit", shown: "0", says: "Show the whole image" },
  { keys: ["p"], action: "togglePreview", shown: "P", says: "Preview under the mouse: on or off" },
  { keys: ["ArrowLeft"], action: "moveCross", arguments: [-2, 0], onPicture: true, shown: "Arrows", says: CROSS },
  { keys: ["ArrowRight"], action: "moveCross", arguments: [2, 0], onPicture: true },
  { keys: ["ArrowUp"], action: "moveCross", arguments: [0, -2], onPicture: true },
  { keys: ["ArrowDown"], action: "moveCross", arguments: [0, 2], onPicture: true },
  { keys: ["Shift+ArrowLeft"], action: "moveCross", arguments: [-24, 0], onPicture: true },
  { keys: ["Shift+ArrowRight"], action: "moveCross", arguments: [24, 0], onPicture: true },
  { keys: ["Shift+ArrowUp"], action: "moveCross", arguments: [0, -24], onPicture: true },
  { keys: ["Shift+ArrowDown"], action: "moveCross", arguments: [0, 24], onPicture: true },
  { keys: [" "], action: "clickCross", arguments: [1], onPicture: true, shown: "Space", says: "It is on the object" },
  { keys: ["x"], action: "clickCross", arguments: [0], onPicture: true, shown: "X", says: "It is not on the object" },
  { keys: ["b"], action: "cornerCross", onPicture: true, shown: "B, twice", says: "A box from where it is to where it is then" },
  { keys: ["Escape"], action: "cancel", shown: "Escape", says: "Forget the box that is being drawn" },
  { keys: ["s"], action: "saveCoco", arguments: ["rle"], shown: "S", says: "Save as COCO with run lengths" },
  { keys: ["?"], action: "showHelp", shown: "?", says: "This help" },
];

const MOUSE = [
  ["Left click", "On the object"],
  ["Right click", "Not on the object"],
  ["Drag", "A box around the object"],
  ["Wheel", "Zoom"],
  ["Middle drag, or Shift and drag", "Move the image"],
];

/** [with, what happens] */
export const HELP = [...MOUSE, ...BINDINGS.filter(({ shown }) => shown).map(({ shown, says }) => [shown, says])];

/** As in `Ctrl+Shift+z`; Shift is named only where it does not already make another character. */
export function nameOf({ key, ctrlKey, metaKey, shiftKey }) {
  const isCommand = ctrlKey || metaKey;
  const letter = isCommand || /^[A-Z]$/.test(key) ? key.toLowerCase() : key;
  const isShifted = shiftKey && (isCommand || key.length > 1);
  return `${isCommand ? "Ctrl+" : ""}${isShifted ? "Shift+" : ""}${key.length > 1 ? key : letter}`;
}
