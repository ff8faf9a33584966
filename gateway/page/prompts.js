// What was clicked and drawn for one object. Prompts never change: each click makes a new one that knows the one before,
// so that undo is a step back, and the mask that an answer brings is found by the prompt that it answers.

/**
 * @typedef {object} Prompt
 * @property {{x: number, y: number, label: 0 | 1}[]} points pixels of the upright image; 1 on the object, 0 not on it
 * @property {[number, number, number, number] | null} box x0, y0, x1, y1
 * @property {Prompt | null} before
 * @property {boolean} refines the mask of the prompt before is sent along; after a new box it would only mislead
 */

export const EMPTY = Object.freeze({ points: [], box: null, before: null, refines: false });

/** @returns {Prompt} */
export function withPoint(prompt, x, y, label) {
  return { points: [...prompt.points, { x, y, label }], box: prompt.box, before: prompt, refines: true };
}

/** From any two corners. @returns {Prompt} */
export function withBox(prompt, [x0, y0], [x1, y1]) {
  const box = [Math.min(x0, x1), Math.min(y0, y1), Math.max(x0, x1), Math.max(y0, y1)];
  return { points: prompt.points, box, before: prompt, refines: false };
}

export function isEmpty(prompt) {
  return prompt.points.length === 0 && prompt.box === null;
}

/**
 * The newest mask that is here for a prompt: its own, or while that is on its way that of one before.
 *
 * @param {WeakMap<Prompt, object>} answers
 */
export function maskOf(prompt, answers) {
  for (let each = prompt; each !== null; each = each.before) {
    if (answers.has(each)) return answers.get(each);
  }
  return null;
}

/** As `/v1/masks` and the pointer take it. */
export function fieldsOf(prompt, answers) {
  const fields = { points: prompt.points.map(({ x, y }) => [x, y]), labels: prompt.points.map(({ label }) => label) };
  if (prompt.box !== null) fields.box = prompt.box;
  const token = prompt.refines ? maskOf(prompt.before, answers)?.refinement_token : null;
  return token ? { ...fields, refinement_token: token } : fields;
}
