// A pen for who has no pointer: arrows move it, the space bar puts it down and lifts it.

import { announce } from "./announce.js";
import { SIDE } from "./strokes.js";

/** @typedef {import("./sketch_pad.js").SketchPad} SketchPad */

const STEP = 20;
const LEAP = 100;
/** @type {Record<string, [number, number]>} */
const WAYS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

/**
 * Lets the keyboard draw while the pad has the focus.
 * @param {SketchPad} pad
 */
export function drawWithKeys(pad) {
  const at = { x: SIDE / 2, y: SIDE / 2 };
  let isDown = false;

  const place = () => ({ ...at, pressure: null, timeMs: performance.now() });
  const show = () => pad.hover(at, { isKept: true });
  const lift = () => {
    if (isDown) pad.lift();
    isDown = false;
  };

  pad.element.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const way = WAYS[event.key];
    if (way !== undefined) {
      const step = event.shiftKey ? LEAP : STEP;
      at.x = Math.min(SIDE, Math.max(0, at.x + way[0] * step));
      at.y = Math.min(SIDE, Math.max(0, at.y + way[1] * step));
      if (isDown) pad.extend([place()]);
    } else if (event.key === " ") {
      if (isDown) {
        lift();
      } else {
        isDown = true;
        pad.begin(place());
      }
      announce(`Pen ${isDown ? "down" : "up"} at ${percent(at.x)} across, ${percent(at.y)} down.`);
    } else if (event.key === "Escape" && isDown) {
      lift();
      announce("Pen up.");
    } else {
      return;
    }
    event.preventDefault();
    event.stopPropagation();
    show();
  });

  pad.element.addEventListener("focus", () => {
    if (pad.element.matches(":focus-visible")) show();
  });
  pad.element.addEventListener("blur", () => {
    lift();
    pad.hover(null);
  });
  pad.element.addEventListener("pointerdown", () => {
    isDown = false;
  });
}

/** @param {number} length */
function percent(length) {
  return `${Math.round((length / SIDE) * 100)} percent`;
}
