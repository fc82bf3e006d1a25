// Mouse, pen and finger draw on the pad.

import { SIDE } from "./strokes.js";

/** @typedef {import("./sketch_pad.js").SketchPad} SketchPad */
/** @typedef {import("./strokes.js").Touchdown} Touchdown */
/** @typedef {import("./strokes.js").Tool} Tool */

const ERASER_BUTTON = 5;
// A hand that rests on the screen is no pen.
const PALM_MS = 1000;

/**
 * Lets pointers draw. One at a time: two fingers zoom the page, and a pen wins over a finger.
 * @param {SketchPad} pad
 */
export function drawWithPointers(pad) {
  const element = pad.element;
  /** @type {PointerEvent | null} */
  let drawing = null;
  let penSeenMs = -Infinity;

  element.addEventListener("pointerdown", (event) => {
    if (event.pointerType === "pen") penSeenMs = event.timeStamp;
    if (!mayDraw(event, drawing, penSeenMs)) return;
    if (drawing !== null) pad.drop();
    drawing = event;
    element.setPointerCapture(event.pointerId);
    pad.begin(placeOf(element, event), toolOf(event, pad.tool));
  });

  element.addEventListener("pointermove", (event) => {
    if (event.pointerType === "pen") penSeenMs = event.timeStamp;
    if (event.pointerId === drawing?.pointerId) {
      const places = coalesced(event).map((part) => placeOf(element, part));
      const ahead = event.getPredictedEvents?.() ?? [];
      pad.extend(places, ahead.slice(0, 1).map((part) => placeOf(element, part)));
    } else if (event.pointerType !== "touch") {
      pad.hover(placeOf(element, event));
    }
  });

  element.addEventListener("pointerup", (event) => {
    if (event.pointerId !== drawing?.pointerId) return;
    drawing = null;
    pad.extend([placeOf(element, event)]);
    pad.lift();
  });

  element.addEventListener("pointercancel", (event) => {
    if (event.pointerId !== drawing?.pointerId) return;
    drawing = null;
    // Fingers are cancelled when they turn out to scroll or zoom.
    if (event.pointerType === "touch") pad.drop();
    else pad.lift();
  });

  element.addEventListener("pointerleave", () => pad.hover(null));
  element.addEventListener("contextmenu", (event) => event.preventDefault());
}

/**
 * @param {PointerEvent} event
 * @param {PointerEvent | null} drawing the pointer that draws already
 * @param {number} penSeenMs
 */
function mayDraw(event, drawing, penSeenMs) {
  if (event.button !== 0 && event.button !== ERASER_BUTTON) return false;
  if (event.pointerType === "touch" && event.timeStamp - penSeenMs < PALM_MS) return false;
  if (drawing !== null) return event.pointerType === "pen" && drawing.pointerType === "touch";
  return event.isPrimary;
}

/**
 * The other end of some pens is an eraser.
 * @param {PointerEvent} event
 * @param {Tool} tool
 * @returns {Tool}
 */
function toolOf(event, tool) {
  return event.button === ERASER_BUTTON ? "eraser" : tool;
}

/**
 * @param {PointerEvent} event
 * @returns {PointerEvent[]} what happened since the last event, finer than the screen repaints
 */
function coalesced(event) {
  const parts = event.getCoalescedEvents?.() ?? [];
  return parts.length > 0 ? parts : [event];
}

/**
 * @param {Element} element
 * @param {PointerEvent} event
 * @returns {Touchdown}
 */
function placeOf(element, event) {
  const box = element.getBoundingClientRect();
  return {
    x: ((event.clientX - box.left) / box.width) * SIDE,
    y: ((event.clientY - box.top) / box.height) * SIDE,
    pressure: event.pointerType === "pen" && event.pressure > 0 ? event.pressure : null,
    timeMs: event.timeStamp,
  };
}
