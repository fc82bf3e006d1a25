// What is on the paper, and the way back to what was.

/** @typedef {import("./strokes.js").Stroke} Stroke */
/** @typedef {import("./picture.js").Picture} Picture */
/** @typedef {Stroke | { kind: "picture", picture: Picture } | { kind: "clear" }} Mark */

/**
 * The marks made on the paper, oldest first. Dispatches "change" after each.
 */
export class Drawing extends EventTarget {
  /** @type {Mark[]} */
  #marks = [];
  /** @type {Mark[]} */
  #undone = [];

  /** @param {Mark} mark */
  add(mark) {
    this.#marks.push(mark);
    this.#undone = [];
    this.#changed();
  }

  /** Leaves a blank paper; undo brings back what was on it. */
  clear() {
    if (this.visible.length > 0) this.add({ kind: "clear" });
  }

  /** @returns {boolean} whether there was anything to undo */
  undo() {
    const mark = this.#marks.pop();
    if (mark === undefined) return false;
    this.#undone.push(mark);
    this.#changed();
    return true;
  }

  /** @returns {boolean} whether there was anything to redo */
  redo() {
    const mark = this.#undone.pop();
    if (mark === undefined) return false;
    this.#marks.push(mark);
    this.#changed();
    return true;
  }

  get canUndo() {
    return this.#marks.length > 0;
  }

  get canRedo() {
    return this.#undone.length > 0;
  }

  /** @returns {readonly Mark[]} the marks on the paper as it is: none older than the last fresh sheet */
  get visible() {
    const start = this.#marks.findLastIndex((mark) => mark.kind !== "stroke");
    if (start < 0) return this.#marks;
    return this.#marks.slice(this.#marks[start].kind === "clear" ? start + 1 : start);
  }

  /** @returns {Picture | null} the picture, while nothing is drawn over it */
  get bare() {
    const [first, ...others] = this.visible;
    return first?.kind === "picture" && others.length === 0 ? first.picture : null;
  }

  /** @returns {Picture | null} the picture, drawn over or not */
  get picture() {
    const first = this.visible[0];
    return first?.kind === "picture" ? first.picture : null;
  }

  #changed() {
    this.dispatchEvent(new Event("change"));
  }
}
