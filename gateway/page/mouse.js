// What the mouse does on the picture, in words of `Labeling`; places are pixels of the screen, from the picture's corner.

const SLACK_PX = 5; // a click may slip as far before it is a drag

/** @param {HTMLElement} picture @param {import("./labeling.js").Labeling} labeling */
export function listenToMouse(picture, labeling) {
  let held = null;
  const placeOf = ({ offsetX, offsetY }) => [offsetX, offsetY];

  picture.addEventListener("contextmenu", (event) => event.preventDefault());
  picture.addEventListener("pointerdown", (event) => {
    if (held !== null) return;
    picture.focus({ focusVisible: false });
    const isPan = event.button === 1 || event.shiftKey;
    held = { at: placeOf(event), button: event.ctrlKey ? 2 : event.button, isPan, isDrag: isPan };
    if (event.button === 1) event.preventDefault(); // no scrolling with the wheel pressed
    picture.setPointerCapture(event.pointerId);
  });
  picture.addEventListener("pointermove", (event) => {
    const at = placeOf(event);
    if (held === null) {
      labeling.hover(at);
      return;
    }
    held.isDrag ||= Math.hypot(at[0] - held.at[0], at[1] - held.at[1]) > SLACK_PX;
    if (held.isPan) {
      labeling.stage.pan(at[0] - held.at[0], at[1] - held.at[1]);
      held.at = at;
    } else if (held.isDrag && held.button === 0) labeling.drawBox(held.at, at);
  });
  picture.addEventListener("pointerup", (event) => {
    if (held === null) return;
    const { at, button, isPan, isDrag } = held;
    held = null;
    if (isPan) return;
    if (!isDrag) labeling.click(at, button === 2 ? 0 : 1, event.timeStamp);
    else if (button === 0) labeling.box(at, placeOf(event), event.timeStamp);
  });
  picture.addEventListener("pointercancel", () => {
    held = null;
    labeling.cancel();
  });
  addEventListener("keydown", ({ key }) => {
    if (key === "Escape") held = null;
  });
  picture.addEventListener("pointerleave", () => labeling.leave());
  picture.addEventListener(
    "wheel",
    (event) => {
      event.preventDefault();
      labeling.stage.zoom(Math.exp(-event.deltaY * (event.deltaMode ? 0.05 : 0.0015)), placeOf(event));
    },
    { passive: false },
  );
}
