// The drawing as an image file for the server: dark ink on white.

import { paintMarks, placeOf } from "./ink.js";
import { SIDE } from "./strokes.js";

/** @typedef {import("./drawing.js").Drawing} Drawing */
/** @typedef {import("./drawing.js").Mark} Mark */

const SMALL_PX = 512;
const LARGE_PX = 1024;
// The server cuts a sketch to its ink; a small drawing is sent larger, so that its lines stay sharp.
const INK_PX = 320;
// The server takes paler marks for paper.
const PALEST = 255 - 24;

/**
 * Returns what to send for the drawing: a picture nobody drew on as it is, all else as a PNG of
 * the whole paper; null while the paper is blank.
 * @param {Drawing} drawing
 * @param {readonly Mark[]} [unfinished] marks that are still being made
 * @returns {Promise<Blob | null>}
 */
export async function sketchFile(drawing, unfinished = []) {
  if (unfinished.length === 0 && drawing.bare !== null) return drawing.bare.file;
  const marks = [...drawing.visible, ...unfinished];
  if (!marks.some((mark) => mark.kind === "picture" || (mark.kind === "stroke" && mark.tool === "pen"))) {
    return null;
  }
  const canvas = painted(marks);
  const isErased = marks.some((mark) => mark.kind === "stroke" && mark.tool === "eraser");
  if (isErased && isBlank(canvas)) return null;
  return canvas.convertToBlob({ type: "image/png" });
}

/**
 * @param {readonly Mark[]} marks
 * @returns {OffscreenCanvas}
 */
function painted(marks) {
  const ink = extent(marks);
  const sidePx = Math.round(Math.min(LARGE_PX, Math.max(SMALL_PX, (INK_PX / ink) * SIDE)));
  const canvas = new OffscreenCanvas(sidePx, sidePx);
  const context = contextOf(canvas);
  context.scale(sidePx / SIDE, sidePx / SIDE);
  paintMarks(context, marks, "#000");
  context.globalCompositeOperation = "destination-over";
  context.fillStyle = "#fff";
  context.fillRect(0, 0, SIDE, SIDE);
  return canvas;
}

/**
 * The longer side of what is drawn, in units.
 * @param {readonly Mark[]} marks
 * @returns {number}
 */
function extent(marks) {
  let [left, right, top, bottom] = [SIDE, 0, SIDE, 0];
  for (const mark of marks) {
    if (mark.kind === "picture") {
      const place = placeOf(mark.picture);
      return Math.max(place.width, place.height);
    }
    if (mark.kind !== "stroke" || mark.tool !== "pen") continue;
    for (const { x, y, width } of mark.points) {
      left = Math.min(left, x - width / 2);
      right = Math.max(right, x + width / 2);
      top = Math.min(top, y - width / 2);
      bottom = Math.max(bottom, y + width / 2);
    }
  }
  return Math.max(1, right - left, bottom - top);
}

/**
 * @param {OffscreenCanvas} canvas
 * @returns {boolean}
 */
function isBlank(canvas) {
  const { data } = contextOf(canvas).getImageData(0, 0, canvas.width, canvas.height);
  for (let index = 0; index < data.length; index += 4) {
    if (data[index] < PALEST || data[index + 1] < PALEST || data[index + 2] < PALEST) return false;
  }
  return true;
}

/**
 * @param {OffscreenCanvas} canvas
 * @returns {OffscreenCanvasRenderingContext2D}
 */
function contextOf(canvas) {
  const context = canvas.getContext("2d", { willReadFrequently: true });
  if (context === null) throw new Error("this browser has no 2D canvas");
  return context;
}
