// Mouse, pen and fingers on the canvas.

import { gripped, zoomed } from "./canvas_view.js";

/** @typedef {import("./canvas_view.js").Grip} Grip */
/** @typedef {import("./canvas_view.js").View} View */
/** @typedef {import("./drawing.js").PointerSample} PointerSample */
/** @typedef {import("./sketch_pad.js").SketchPad} SketchPad */

const MIDDLE_BUTTON = 1;
const ERASER_BUTTON = 5;
// Touches this soon after pen input are taken for the palm of the hand.
const PALM_MS = 1000;
const WHEEL_PX = 300;

/**
 * Draws with pointers, one at a time. Two fingers, the wheel with Ctrl, and the middle button move the view.
 * A pen interrupts a finger.
 * @param {SketchPad} pad
 */
export function handlePointers(pad) {
  const element = pad.element;
  /** @type {PointerEvent | null} */
  let active = null;
  let penSeenMs = -Infinity;
  const isPalm = (/** @type {PointerEvent} */ { pointerType, timeStamp }) =>
    pointerType === "touch" && (timeStamp - penSeenMs < PALM_MS || active?.pointerType === "pen");
  const isMoving = handleView(pad, isPalm);

  element.addEventListener("pointerdown", (event) => {
    if (event.pointerType === "pen") penSeenMs = event.timeStamp;
    if (isMoving()) {
      // A second finger has come down: the first one was not meant to draw.
      if (active !== null) pad.cancel();
      active = null;
      return;
    }
    if (isPalm(event) || !mayDraw(event, active)) return;
    if (active !== null) pad.cancel();
    active = event;
    element.setPointerCapture(event.pointerId);
    // The other end of some pens is an eraser.
    pad.start(sampleFrom(pad, event), event.button === ERASER_BUTTON ? "eraser" : pad.tool);
  });

  element.addEventListener("pointermove", (event) => {
    if (event.pointerType === "pen") penSeenMs = event.timeStamp;
    if (event.pointerId === active?.pointerId) {
      const samples = coalescedEvents(event).map((part) => sampleFrom(pad, part));
      const predicted = event.getPredictedEvents?.() ?? [];
      pad.extend(samples, predicted.slice(0, 1).map((part) => sampleFrom(pad, part)));
    } else if (event.pointerType !== "touch") {
      pad.showCursor(pad.placeAt(event));
    }
  });

  element.addEventListener("pointerup", (event) => {
    if (event.pointerId !== active?.pointerId) return;
    active = null;
    pad.extend([sampleFrom(pad, event)]);
    pad.finish();
  });

  element.addEventListener("pointercancel", (event) => {
    if (event.pointerId !== active?.pointerId) return;
    active = null;
    // Touches are cancelled when they become a gesture of the system.
    if (event.pointerType === "touch") pad.cancel();
    else pad.finish();
  });

  element.addEventListener("pointerleave", () => pad.showCursor(null));
  element.addEventListener("contextmenu", (event) => event.preventDefault());
}

/**
 * Zooms and moves the view. Returns a function that tells whether pointers are doing so.
 * @param {SketchPad} pad
 * @param {(event: PointerEvent) => boolean} isPalm
 * @returns {() => boolean}
 */
function handleView(pad, isPalm) {
  const element = pad.element;
  /** @type {Map<number, { clientX: number, clientY: number, isMiddle: boolean }>} fingers and middle buttons */
  const down = new Map();
  /** @type {{ grip: Grip, view: View } | null} where the movement began */
  let start = null;
  const grip = () => gripOf(pad, [...down.values()]);
  const isMoving = () => down.size > 1 || [...down.values()].some(({ isMiddle }) => isMiddle);
  const restart = () => (start = isMoving() ? { grip: grip(), view: pad.view } : null);

  element.addEventListener("pointerdown", (event) => {
    if (event.pointerType === "pen") {
      // What lay on the screen before the pen is the palm of the hand, in several places.
      down.clear();
      restart();
    }
    const isMiddle = event.button === MIDDLE_BUTTON;
    if ((event.pointerType !== "touch" && !isMiddle) || isPalm(event)) return;
    if (isMiddle) event.preventDefault();
    const { clientX, clientY } = event;
    down.set(event.pointerId, { clientX, clientY, isMiddle });
    if (isMoving()) element.setPointerCapture(event.pointerId);
    restart();
  });
  element.addEventListener("pointermove", ({ pointerId, clientX, clientY }) => {
    const pointer = down.get(pointerId);
    if (pointer === undefined) return;
    down.set(pointerId, { ...pointer, clientX, clientY });
    if (start !== null) pad.view = gripped(start.view, start.grip, grip());
  });
  for (const kind of ["pointerup", "pointercancel"]) {
    element.addEventListener(kind, (event) => {
      if (event instanceof PointerEvent && down.delete(event.pointerId)) restart();
    });
  }
  element.addEventListener(
    "wheel",
    (event) => {
      // Trackpads report a pinch as the wheel with Ctrl.
      if (event.ctrlKey || event.metaKey) {
        pad.view = zoomed(pad.view, Math.exp(-event.deltaY / WHEEL_PX), { ...pad.sharesAt(event), spread: 1 });
      } else if (pad.view.scale > 1) {
        const from = { ...pad.sharesAt(event), spread: 1 };
        const { width } = element.getBoundingClientRect();
        pad.view = gripped(pad.view, from, { x: from.x - event.deltaX / width, y: from.y - event.deltaY / width, spread: 1 });
      } else {
        return;
      }
      event.preventDefault();
    },
    { passive: false },
  );
  return isMoving;
}

/**
 * @param {PointerEvent} event
 * @param {PointerEvent | null} active the pointer that is already drawing
 */
function mayDraw(event, active) {
  if (event.button !== 0 && event.button !== ERASER_BUTTON) return false;
  if (active !== null) return event.pointerType === "pen" && active.pointerType === "touch";
  return event.isPrimary;
}

/**
 * Returns the events since the last frame.
 * @param {PointerEvent} event
 * @returns {PointerEvent[]}
 */
function coalescedEvents(event) {
  const parts = event.getCoalescedEvents?.() ?? [];
  return parts.length > 0 ? parts : [event];
}

/**
 * @param {SketchPad} pad
 * @param {PointerEvent} event
 * @returns {PointerSample}
 */
function sampleFrom(pad, event) {
  const pressure = event.pointerType === "pen" && event.pressure > 0 ? event.pressure : null;
  return { ...pad.placeAt(event), pressure, timeMs: event.timeStamp, hasShift: event.shiftKey };
}

/**
 * Returns the middle of one or two pointers, and their distance.
 * @param {SketchPad} pad
 * @param {{ clientX: number, clientY: number }[]} pointers
 * @returns {Grip}
 */
function gripOf(pad, pointers) {
  const [a, b = a] = pointers.map((pointer) => pad.sharesAt(pointer));
  const spread = Math.max(0.02, Math.hypot(a.x - b.x, a.y - b.y));
  return { x: (a.x + b.x) / 2, y: (a.y + b.y) / 2, spread };
}
