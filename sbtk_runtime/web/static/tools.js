// The buttons around the paper, and the keys that do the same.

import { announce } from "./announce.js";
import { listenForKeys } from "./keys.js";
import { byId, choose, chosen, enable, onChoice } from "./page.js";
import { SIZES } from "./strokes.js";

/** @typedef {import("./drawing.js").Drawing} Drawing */
/** @typedef {import("./sketch_pad.js").SketchPad} SketchPad */
/** @typedef {import("./strokes.js").SizeName} SizeName */
/** @typedef {import("./strokes.js").Tool} Tool */

const NAMES = /** @type {SizeName[]} */ (Object.keys(SIZES));

/**
 * Lets buttons and keys steer the pad.
 * @param {SketchPad} pad
 * @param {{ switchKind: () => void, toResults: () => void, likeFocused: () => void }} more
 */
export function offerTools(pad, { switchKind, toResults, likeFocused }) {
  const { drawing } = pad;
  const take = () => {
    pad.tool = /** @type {Tool} */ (chosen("tool"));
    pad.size = SIZES[/** @type {SizeName} */ (chosen("size"))];
    pad.element.dataset.tool = pad.tool;
  };
  const [undo, redo, clear] = ["undo", "redo", "clear"].map((id) => byId(id, HTMLButtonElement));
  const follow = () => {
    const { canUndo, canRedo, visible } = drawing;
    enable([[undo, canUndo], [redo, canRedo], [clear, visible.length > 0]]);
  };
  const goBack = () => drawing.undo() && announce("Undone.");
  const goOn = () => drawing.redo() && announce("Redone.");
  const wipe = () => {
    if (drawing.visible.length === 0) return;
    drawing.clear();
    announce("Paper cleared. Undo brings the sketch back.");
  };
  /** @param {Tool} tool */
  const toolKey = (tool) => {
    choose("tool", tool);
    take();
    announce(tool === "pen" ? "Pen." : "Eraser.");
  };
  /** @param {SizeName} size */
  const sizeKey = (size) => {
    choose("size", size);
    take();
    announce(`${size} line.`);
  };

  onChoice("tool", take);
  onChoice("size", take);
  undo.addEventListener("click", goBack);
  redo.addEventListener("click", goOn);
  clear.addEventListener("click", wipe);
  drawing.addEventListener("change", follow);
  take();
  follow();

  listenForKeys(
    [
      { keys: "D", does: "To the paper", run: () => pad.element.focus() },
      { keys: "R", does: "To the photos", run: toResults },
      { keys: "B", does: "Pen", run: () => toolKey("pen") },
      { keys: "E", does: "Eraser", run: () => toolKey("eraser") },
      ...NAMES.map((size, index) => ({
        keys: `${index + 1}`,
        does: `${size[0].toUpperCase()}${size.slice(1)} line`,
        run: () => sizeKey(size),
      })),
      { keys: "Ctrl+Z", does: "Undo", run: goBack },
      { keys: "Ctrl+Shift+Z or Ctrl+Y", does: "Redo", run: goOn },
      { keys: "Delete or X", does: "Clear the paper", run: wipe },
      { keys: "U", does: "Open a picture", run: () => byId("upload", HTMLButtonElement).click() },
      { keys: "S", does: "Switch between sketch and photo", run: switchKind },
      { keys: "F", does: "Choose a folder", run: () => byId("folder", HTMLSelectElement).focus() },
      { keys: "T", does: "Light or dark", run: () => byId("theme", HTMLButtonElement).click() },
      { keys: "L", does: "On a photo: more like this", run: likeFocused },
      { keys: "?", does: "This list", run: () => byId("help-open", HTMLButtonElement).click() },
    ],
    [
      ["Ctrl+V", "Paste a picture"],
      ["Arrows", "On the paper: move the pen. Among photos: to the next"],
      ["Space", "On the paper: put the pen down, or lift it"],
      ["Enter", "On a photo: show it large"],
      ["Escape", "Close"],
    ],
  );
}
