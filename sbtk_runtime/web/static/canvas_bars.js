// The buttons on the canvas, which zoom it and flip what is selected, and the button that traces an image.

import { MAX_SCALE, WHOLE, zoomed, ZOOM_STEP } from "./canvas_view.js";
import { announce, byId, setEnabled } from "./dom.js";

/** @typedef {import("./sketch_pad.js").SketchPad} SketchPad */
/** @typedef {{ keys: string, action: string, run: () => void }} Shortcut */

/**
 * Connects the buttons to the canvas.
 * @param {SketchPad} pad
 * @param {() => void} onSelectAll called when all strokes get selected
 * @returns {Shortcut[]} their shortcuts
 */
export function setUpCanvasBars(pad, onSelectAll) {
  return [...setUpSelection(pad, onSelectAll), ...setUpTrace(pad), ...setUpZoom(pad)];
}

/**
 * @param {SketchPad} pad
 * @param {() => void} onSelectAll
 * @returns {Shortcut[]}
 */
function setUpSelection({ selection, element }, onSelectAll) {
  /** @type {[string, () => void][]} */
  const actions = [
    ["flip-horizontally", () => selection.scale(-1, 1)],
    ["flip-vertically", () => selection.scale(1, -1)],
    ["duplicate", () => selection.duplicate()],
    ["remove-selected", () => selection.remove()],
  ];
  const [flipHorizontally, flipVertically, duplicate] = actions.map(([, run]) => run);
  for (const [id, run] of actions) byId(id, HTMLButtonElement).addEventListener("click", run);
  const bar = byId("selection-bar", HTMLElement);
  selection.addEventListener("change", () => {
    const count = selection.strokes.length;
    if (count === 0 && bar.contains(document.activeElement)) element.focus();
    bar.hidden = count === 0;
    announce(count === 0 ? "Nothing selected." : `${count} ${count === 1 ? "stroke" : "strokes"} selected.`);
  });
  return [
    { keys: "Ctrl+A", action: "Select all strokes", run: () => { onSelectAll(); selection.selectAll(); } },
    { keys: "Ctrl+D", action: "Duplicate the selected strokes", run: duplicate },
    { keys: "Shift+H", action: "Flip them horizontally", run: flipHorizontally },
    { keys: "Shift+V", action: "Flip them vertically", run: flipVertically },
  ];
}

/**
 * @param {SketchPad} pad
 * @returns {Shortcut[]}
 */
function setUpTrace({ drawing }) {
  const button = byId("trace", HTMLButtonElement);
  const toggle = () => {
    if (drawing.image === null && drawing.traced === null) return;
    const isTraced = drawing.traced === null;
    drawing.trace(isTraced);
    announce(isTraced ? "Draw over the image. Only your strokes are searched for." : "Searching with the image.");
  };
  const update = () => {
    const isHidden = drawing.image === null && drawing.traced === null;
    if (isHidden && document.activeElement === button) byId("upload", HTMLButtonElement).focus();
    button.hidden = isHidden;
    button.setAttribute("aria-pressed", String(drawing.traced !== null));
  };
  button.addEventListener("click", toggle);
  drawing.addEventListener("change", update);
  update();
  return [{ keys: "O", action: "Trace the image", run: toggle }];
}

/**
 * @param {SketchPad} pad
 * @returns {Shortcut[]}
 */
function setUpZoom(pad) {
  const [zoomIn, zoomOut, whole] = ["canvas-zoom-in", "canvas-zoom-out", "canvas-zoom-whole"].map((id) =>
    byId(id, HTMLButtonElement),
  );
  const zoom = (/** @type {number} */ factor) => {
    pad.view = zoomed(pad.view, factor);
    announce(`Canvas at ${percent(pad)}.`);
  };
  const showWhole = () => {
    pad.view = WHOLE;
    announce("The whole canvas is shown.");
  };
  const update = () => {
    const { scale } = pad.view;
    if (scale === 1 && document.activeElement === whole) zoomIn.focus();
    whole.hidden = scale === 1;
    whole.textContent = percent(pad);
    setEnabled([[zoomIn, scale < MAX_SCALE], [zoomOut, scale > 1]]);
  };
  zoomIn.addEventListener("click", () => zoom(ZOOM_STEP));
  zoomOut.addEventListener("click", () => zoom(1 / ZOOM_STEP));
  whole.addEventListener("click", showWhole);
  pad.addEventListener("view", update);
  return [
    { keys: "+ or =", action: "Zoom in on the canvas", run: () => zoom(ZOOM_STEP) },
    { keys: "-", action: "Zoom out", run: () => zoom(1 / ZOOM_STEP) },
    { keys: "0", action: "Show the whole canvas", run: showWhole },
  ];
}

/** @param {SketchPad} pad */
function percent({ view }) {
  return `${Math.round(view.scale * 100)}%`;
}
