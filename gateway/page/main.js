// The page's beginning: its parts are put together, and its buttons and keys are given something to do.

import { takeFiles, save } from "./files.js";
import { Gateway, Refused } from "./gateway.js";
import { BINDINGS, HELP, nameOf } from "./keys.js";
import { Labeling } from "./labeling.js";
import { Labels } from "./labels.js";
import { listenToMouse } from "./mouse.js";
import { Painter } from "./painter.js";
import { element, showLabels, showObjects } from "./panel.js";
import { cocoOf, masksOf } from "./saving.js";
import { Stage } from "./stage.js";

const $ = (id) => document.getElementById(id);
const TOKEN = "splitsam.token"; // kept until the tab is closed
const TYPES_TEXT = "input:not([type=radio]), select, textarea";

const gateway = new Gateway(() => sessionStorage.getItem(TOKEN), askForToken);
const labeling = new Labeling({
  gateway,
  stage: new Stage(new Painter($("image"), $("marks")), $("stage")),
  labels: new Labels(localStorage),
  told: { changed, failed, said: (text) => show("status", text), timed: (text) => show("timing", text) },
});

const actions = {
  chooseFile: () => $("file").click(),
  showHelp: () => $("help-dialog").showModal(),
  saveCoco: (kind) => saveAs((objects) => cocoOf(labeling, objects, kind)),
  saveMasks: () => saveAs((objects) => masksOf(labeling, objects)),
};

function act(action, given = []) {
  const owner = [actions, labeling, labeling.stage, labeling.session].find((each) => action in each);
  owner[action](...given);
}

async function saveAs(write) {
  if (labeling.picture === null || labeling.session.objects.length === 0) return;
  if (labeling.answers.isWaiting) {
    failed(new Refused("A mask is still on its way: save again in a moment.", "WAIT"));
    return;
  }
  const masks = labeling.masks();
  const { name, content } = await write(masks);
  save(content, name);
  labeling.session.saved();
  const others = labeling.session.objects.length - masks.length;
  show("status", `Saved as ${name}${others ? `, without ${others} for which no mask has come` : ""}.`);
}

function askForToken(message) {
  const dialog = $("token-dialog");
  show("token-text", message);
  $("token").value = "";
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => {
      const isGiven = dialog.returnValue === "ok" && $("token").value.trim() !== "";
      if (isGiven) sessionStorage.setItem(TOKEN, $("token").value.trim());
      resolve(isGiven);
    }, { once: true });
  });
}

function show(id, text) {
  if ($(id).textContent !== text) $(id).textContent = text;
}

function failed(error) {
  show("problem", error?.message ?? "");
  $("retry").hidden = error === null || labeling.picture === null;
}

function changed() {
  const { picture, session, isPreviewing } = labeling;
  $("empty").hidden = picture !== null;
  $("undo").disabled = !session.canUndo;
  $("redo").disabled = !session.canRedo;
  $("finish").disabled = session.current === null;
  for (const id of ["zoom-in", "zoom-out", "fit"]) $(id).disabled = picture === null;
  for (const id of ["save-rle", "save-polygons", "save-png"]) $(id).disabled = session.objects.length === 0;
  $("preview").setAttribute("aria-pressed", `${isPreviewing}`);
  showLabels($("labels"), labeling);
  showObjects($("objects"), labeling);
}

const buttons = {
  open: ["chooseFile"],
  undo: ["undo"],
  redo: ["redo"],
  finish: ["finish"],
  "zoom-in": ["zoom", [1.25]],
  "zoom-out": ["zoom", [0.8]],
  fit: ["fit"],
  preview: ["togglePreview"],
  help: ["showHelp"],
  retry: ["retry"],
  "save-rle": ["saveCoco", ["rle"]],
  "save-polygons": ["saveCoco", ["polygons"]],
  "save-png": ["saveMasks"],
};
for (const [id, [action, given]] of Object.entries(buttons)) $(id).addEventListener("click", () => act(action, given));

addEventListener("keydown", (event) => {
  if (document.querySelector("dialog[open]") || event.altKey || event.target.matches(TYPES_TEXT)) return;
  const name = nameOf(event);
  const isOnPicture = event.target === $("marks");
  const found = BINDINGS.find(({ keys, onPicture }) => keys.includes(name) && (isOnPicture || !onPicture));
  if (!found) return;
  event.preventDefault();
  act(found.action, found.arguments);
});
addEventListener("beforeunload", (event) => {
  if (!labeling.session.isSaved) event.preventDefault();
});
$("add-label").addEventListener("submit", (event) => {
  event.preventDefault();
  if (labeling.labels.add($("new-label").value)) labeling.useLabel(labeling.labels.at);
  $("new-label").value = "";
});

$("help-rows").append(
  ...HELP.map(([keys, says]) => {
    const head = element("th", { scope: "row" }, element("kbd", {}, keys));
    return element("tr", {}, head, element("td", {}, says));
  }),
);
takeFiles($("file"), $("stage"), (file) => labeling.open(file));
listenToMouse($("marks"), labeling);
new ResizeObserver(() => labeling.stage.resized()).observe($("stage"));
changed();
