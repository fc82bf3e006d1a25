// Strokes outlive a reload of the page, in this tab only. Pictures do not.

/** @typedef {import("./drawing.js").Drawing} Drawing */
/** @typedef {import("./strokes.js").Stroke} Stroke */

const KEPT_AS = "sbtk-sketch";
const MAX_CHARACTERS = 1_000_000;

/**
 * Keeps the strokes when the page is left.
 * @param {Drawing} drawing
 */
export function keepSketch(drawing) {
  window.addEventListener("pagehide", () => {
    const strokes = drawing.visible.filter((mark) => mark.kind === "stroke").map(rounded);
    const text = drawing.picture === null && strokes.length > 0 ? JSON.stringify(strokes) : "";
    try {
      if (text !== "" && text.length <= MAX_CHARACTERS) sessionStorage.setItem(KEPT_AS, text);
      else sessionStorage.removeItem(KEPT_AS);
    } catch {
      // Storage may be forbidden or full; then the sketch is gone, as on any page.
    }
  });
}

/**
 * Brings kept strokes back.
 * @param {Drawing} drawing
 */
export function restoreSketch(drawing) {
  try {
    const strokes = JSON.parse(sessionStorage.getItem(KEPT_AS) ?? "[]");
    if (Array.isArray(strokes)) for (const stroke of strokes.filter(isStroke)) drawing.add(stroke);
  } catch {
    // Nothing usable was kept.
  }
}

/** @param {Stroke} stroke @returns {Stroke} */
function rounded({ kind, tool, points }) {
  const round = (/** @type {number} */ length) => Math.round(length * 10) / 10;
  return { kind, tool, points: points.map(({ x, y, width }) => ({ x: round(x), y: round(y), width: round(width) })) };
}

/**
 * @param {any} value
 * @returns {value is Stroke}
 */
function isStroke(value) {
  return (
    value?.kind === "stroke" &&
    (value.tool === "pen" || value.tool === "eraser") &&
    Array.isArray(value.points) &&
    value.points.length > 0 &&
    value.points.every((/** @type {any} */ point) => [point?.x, point?.y, point?.width].every(Number.isFinite))
  );
}
