// The lists beside the picture, made anew when what they show has changed; the focus stays where it was.

import { colourOf } from "./labels.js";

/** @param {string} name of an element @param {object} fields its properties; `data-focus` finds it again */
export function element(name, fields, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(fields)) {
    if (key in made) made[key] = value;
    else made.setAttribute(key, value);
  }
  made.append(...children);
  return made;
}

export function showLabels(list, labeling) {
  const { names, at } = labeling.labels;
  const inUse = new Set(labeling.session.objects.map(({ label }) => label));
  refill(list, [names, at, [...inUse]], () =>
    names.map((name, index) => {
      const choose = {
        type: "radio",
        name: "label",
        checked: index === at,
        onchange: () => labeling.useLabel(index),
        "data-focus": `label ${name}`,
      };
      const row = element("label", {}, element("input", choose), swatch(index), name);
      if (index < 9) row.append(element("kbd", { "aria-hidden": "true" }, `${index + 1}`));
      if (inUse.has(name) || names.length === 1) return row;
      const remove = { type: "button", "aria-label": `Remove the label ${name}`, onclick: () => labeling.removeLabel(index) };
      return element("div", { className: "row" }, row, element("button", remove, "×"));
    }),
  );
}

export function showObjects(list, labeling) {
  const { objects, current } = labeling.session;
  const about = objects.map(({ id, label }) => [id, label, labeling.labels.names.indexOf(label), id === current?.id]);
  refill(list, about, () =>
    about.map(([id, label, colour, isCurrent], at) => {
      const select = {
        type: "button",
        className: "name",
        onclick: () => labeling.session.select(id),
        "aria-current": `${isCurrent}`,
        "data-focus": `object ${id}`,
      };
      const remove = { type: "button", "aria-label": `Remove object ${at + 1}`, onclick: () => labeling.session.remove(id) };
      return element("li", {}, swatch(colour), element("button", select, `${at + 1}. ${label}`), element("button", remove, "×"));
    }),
  );
}

function swatch(at) {
  const made = element("span", { className: "swatch", "aria-hidden": "true" });
  made.style.background = colourOf(at);
  return made;
}

function refill(list, about, make) {
  const shown = JSON.stringify(about);
  if (list.dataset.shown === shown) return;
  const focused = list.contains(document.activeElement) ? document.activeElement : null;
  const name = focused?.getAttribute("data-focus") ?? "";
  list.replaceChildren(...make());
  list.dataset.shown = shown;
  if (focused) (list.querySelector(`[data-focus="${CSS.escape(name)}"]`) ?? list.querySelector("button, input"))?.focus();
}
