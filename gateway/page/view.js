// Where the image is on the screen: pixels of the image times the scale, plus an offset.

const LEAST_SCALE = 0.02;
const MOST_SCALE = 40;

/** @typedef {{scale: number, x: number, y: number}} View x and y: where the image's top left corner is */

/** The whole image, in the middle. @returns {View} */
export function fit(image, screen) {
  const scale = Math.min(screen.width / image.width, screen.height / image.height);
  return { scale, x: (screen.width - scale * image.width) / 2, y: (screen.height - scale * image.height) / 2 };
}

/** Nearer by a factor; what is at the place stays there. @returns {View} */
export function zoom(view, factor, [x, y]) {
  const scale = Math.min(MOST_SCALE, Math.max(LEAST_SCALE, view.scale * factor));
  const by = scale / view.scale;
  return { scale, x: x - (x - view.x) * by, y: y - (y - view.y) * by };
}

/** @returns {View} */
export function pan(view, dx, dy) {
  return { ...view, x: view.x + dx, y: view.y + dy };
}

/** A place on the screen in pixels of the image, kept inside it. */
export function toImage(view, image, [x, y]) {
  return [clamp((x - view.x) / view.scale, image.width), clamp((y - view.y) / view.scale, image.height)];
}

export function toScreen(view, [x, y]) {
  return [x * view.scale + view.x, y * view.scale + view.y];
}

export function isInside(view, image, [x, y]) {
  const [left, top] = [(x - view.x) / view.scale, (y - view.y) / view.scale];
  return left >= 0 && top >= 0 && left < image.width && top < image.height;
}

function clamp(value, most) {
  return Math.min(most, Math.max(0, value));
}
