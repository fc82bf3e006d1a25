// The buttons around the canvas, and the keyboard shortcuts.

import { setUpCanvasBars } from "./canvas_bars.js";
import { announce, byId, checkedValue, isTextInput, onRadioChange, setChecked, setEnabled, showToast } from "./dom.js";
import { LINE_WIDTHS } from "./drawing.js";

/** @typedef {import("./sketch_pad.js").SketchPad} SketchPad */
/** @typedef {import("./drawing.js").LineWidth} LineWidth */
/** @typedef {import("./drawing.js").Tool} Tool */
/** @typedef {{ keys: string, action: string, run: (event: KeyboardEvent) => void }} Shortcut */

const SINGLE_KEYS_KEY = "sbtk-single-keys";
const CTRL = /Mac|iPhone|iPad/.test(navigator.platform) ? "⌘" : "Ctrl";
/** @type {Record<Tool, { keys: string, name: string }>} */
const TOOLS = {
  pen: { keys: "B", name: "Pen" },
  line: { keys: "N", name: "Straight line" },
  eraser: { keys: "E", name: "Eraser" },
  "stroke-eraser": { keys: "Shift+E", name: "Stroke eraser" },
  select: { keys: "V", name: "Select strokes" },
};
const WIDTH_NAMES = /** @type {LineWidth[]} */ (Object.keys(LINE_WIDTHS));

/**
 * Connects buttons and keyboard shortcuts to the canvas.
 * @param {SketchPad} pad
 * @param {{ toggleKind: () => void, focusResults: () => void, likeFocused: () => void }} actions
 */
export function setUpToolbar(pad, { toggleKind, focusResults, likeFocused }) {
  const { drawing } = pad;
  const applyTool = () => {
    pad.tool = /** @type {Tool} */ (checkedValue("tool"));
    pad.size = LINE_WIDTHS[/** @type {LineWidth} */ (checkedValue("width"))];
  };
  const [undoButton, redoButton, clearButton] = ["undo", "redo", "clear"].map((id) => byId(id, HTMLButtonElement));
  const updateButtons = () => {
    const { canUndo, canRedo, visible } = drawing;
    setEnabled([[undoButton, canUndo], [redoButton, canRedo], [clearButton, visible.length > 0]]);
  };
  const undo = () => drawing.undo() && announce("Undone.");
  const redo = () => drawing.redo() && announce("Redone.");
  const clear = () => {
    if (drawing.visible.length === 0) return;
    drawing.clear();
    announce("Canvas cleared. Undo restores the sketch.");
  };
  const removeOrClear = () => (pad.selection.strokes.length > 0 ? pad.selection.remove() : clear());
  /** @param {Tool} tool */
  const selectTool = (tool) => {
    setChecked("tool", tool);
    applyTool();
    announce(`${TOOLS[tool].name}.`);
  };
  /** @param {LineWidth} width */
  const selectWidth = (width) => {
    setChecked("width", width);
    applyTool();
    announce(`${capitalize(width)} line.`);
  };

  onRadioChange("tool", applyTool);
  onRadioChange("width", applyTool);
  undoButton.addEventListener("click", undo);
  redoButton.addEventListener("click", redo);
  clearButton.addEventListener("click", clear);
  drawing.addEventListener("change", updateButtons);
  applyTool();
  updateButtons();
  const canvasShortcuts = setUpCanvasBars(pad, () => selectTool("select"));

  setUpShortcuts(
    [
      { keys: "D", action: "Go to the canvas", run: () => pad.element.focus() },
      { keys: "R", action: "Go to the photos", run: focusResults },
      ...Object.entries(TOOLS).map(([tool, { keys, name }]) => ({
        keys,
        action: name,
        run: () => selectTool(/** @type {Tool} */ (tool)),
      })),
      ...WIDTH_NAMES.map((width, index) => ({
        keys: `${index + 1}`,
        action: `${capitalize(width)} line`,
        run: () => selectWidth(width),
      })),
      { keys: "Ctrl+Z", action: "Undo", run: undo },
      { keys: "Ctrl+Shift+Z or Ctrl+Y", action: "Redo", run: redo },
      { keys: "Delete or X", action: "Delete the selected strokes, or clear the canvas", run: removeOrClear },
      ...canvasShortcuts,
      { keys: "U", action: "Open an image", run: () => byId("upload", HTMLButtonElement).click() },
      { keys: "S", action: "Switch between sketch and photo", run: toggleKind },
      { keys: "F", action: "Choose a folder", run: () => byId("folder", HTMLSelectElement).focus() },
      { keys: "T", action: "Change the theme", run: changeTheme },
      { keys: "L", action: "On a photo: more like this", run: likeFocused },
      { keys: "?", action: "Show this help", run: () => byId("help-open", HTMLButtonElement).click() },
    ],
    [
      ["Ctrl+V", "Paste an image"],
      ["Arrows", "On the canvas: move the pen or the selected strokes. On a photo: go to the next one"],
      ["Space", "On the canvas: lower or lift the pen"],
      ["Shift", "While drawing: a straight line. While rotating: steps of 15°"],
      ["Page Down or Page Up", "On the canvas, with the selection tool: select the next stroke"],
      [", or .", "On the canvas: rotate the selected strokes"],
      ["< or >", "On the canvas: scale the selected strokes"],
      ["Enter", "On a photo: enlarge it"],
      ["Escape", "Close"],
    ],
  );
}

function changeTheme() {
  const radios = [...document.querySelectorAll("#theme input")].filter((radio) => radio instanceof HTMLInputElement);
  const next = radios[(radios.findIndex(({ checked }) => checked) + 1) % radios.length];
  next.click();
  showToast(`Theme: ${next.value}.`);
}

/**
 * Registers shortcuts and lists them in the help. Users can turn off single keys, because these interfere
 * with speech input.
 * @param {Shortcut[]} shortcuts `keys` is "B", "Ctrl+Z" or "Ctrl+Shift+Z"; alternatives are joined by " or "
 * @param {[string, string][]} others keys that are handled elsewhere, for the help only
 */
function setUpShortcuts(shortcuts, others) {
  const dialog = byId("help", HTMLDialogElement);
  const singleKeys = byId("single-keys", HTMLInputElement);
  singleKeys.checked = loadSingleKeys();
  singleKeys.addEventListener("change", () => saveSingleKeys(singleKeys.checked));
  listShortcuts(byId("help-keys", HTMLElement), [
    ...shortcuts.map(({ keys, action }) => /** @type {[string, string]} */ ([keys, action])),
    ...others,
  ]);
  byId("help-open", HTMLButtonElement).addEventListener("click", () => dialog.showModal());
  byId("help-close", HTMLButtonElement).addEventListener("click", () => dialog.close());
  dialog.addEventListener("click", (event) => {
    if (event.target === dialog) dialog.close();
  });
  document.addEventListener("keydown", (event) => {
    if (event.defaultPrevented || isTextInput(event.target)) return;
    if (document.querySelector("dialog[open]") !== null) return;
    const pressed = keyName(event);
    const shortcut = shortcuts.find(({ keys }) => keys.split(" or ").includes(pressed));
    if (shortcut === undefined || (!pressed.startsWith("Ctrl+") && !singleKeys.checked)) return;
    event.preventDefault();
    shortcut.run(event);
  });
}

/**
 * Returns the name of the pressed keys as in the list of shortcuts.
 * @param {KeyboardEvent} event
 * @returns {string}
 */
function keyName(event) {
  if (event.altKey) return "";
  const key = event.key.length === 1 ? latinKey(event).toUpperCase() : event.key;
  const isLetter = /^[A-Z]$/.test(key);
  const ctrl = event.ctrlKey || event.metaKey ? "Ctrl+" : "";
  return `${ctrl}${event.shiftKey && (isLetter || key.length > 1) ? "Shift+" : ""}${key}`;
}

/**
 * Returns the character of a key. For layouts without Latin letters, such as Greek, it is the Latin letter in
 * the same position.
 * @param {KeyboardEvent} event
 */
function latinKey({ key, code }) {
  return key > "\x7f" && /^Key[A-Z]$/.test(code) ? code.slice(3) : key;
}

/**
 * @param {HTMLElement} list
 * @param {[string, string][]} rows keys and action
 */
function listShortcuts(list, rows) {
  for (const [keys, action] of rows) {
    const term = document.createElement("dt");
    keys.split(" or ").forEach((key, index) => {
      if (index > 0) term.append(" or ");
      const label = document.createElement("kbd");
      label.textContent = key === "+" ? key : key.replace("Ctrl", CTRL).replaceAll("+", " + ");
      term.append(label);
    });
    const description = document.createElement("dd");
    description.textContent = action;
    const row = document.createElement("div");
    row.append(term, description);
    list.append(row);
  }
}

function loadSingleKeys() {
  try {
    return localStorage.getItem(SINGLE_KEYS_KEY) !== "off";
  } catch {
    return true;
  }
}

/** @param {boolean} isOn */
function saveSingleKeys(isOn) {
  try {
    localStorage.setItem(SINGLE_KEYS_KEY, isOn ? "on" : "off");
  } catch {
    // Storage is blocked: the setting applies until the page is closed.
  }
}

/** @param {string} text */
function capitalize(text) {
  return text.charAt(0).toUpperCase() + text.slice(1);
}
