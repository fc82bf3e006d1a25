// Pictures from outside: chosen, pasted, or dropped on the page.

import { BadPicture, TYPES, pictureFrom } from "./picture.js";
import { say } from "./announce.js";
import { byId } from "./page.js";
import { PHOTO_TYPE } from "./results.js";

/** @typedef {import("./picture.js").Picture} Picture */

/**
 * @param {(picture: Picture) => void} took
 * @param {(id: number) => void} tookPhoto a photo of the gallery was dropped
 */
export function takePictures(took, tookPhoto) {
  const chooser = byId("chooser", HTMLInputElement);
  chooser.accept = TYPES.join(",");
  byId("upload", HTMLButtonElement).addEventListener("click", () => chooser.click());
  chooser.addEventListener("change", () => {
    void take(chooser.files?.[0], took);
    chooser.value = ""; // So that the same file can be chosen again.
  });
  document.addEventListener("paste", (event) => {
    const files = [...(event.clipboardData?.files ?? [])];
    if (files.length > 0) event.preventDefault();
    if (files.length > 0) void take(files.find(({ type }) => TYPES.includes(type)) ?? files[0], took);
  });
  acceptDrops((event) => {
    const id = event.dataTransfer?.getData(PHOTO_TYPE);
    if (id) tookPhoto(Number(id));
    else void take(event.dataTransfer?.files[0], took);
  });
}

/**
 * @param {File | undefined} file
 * @param {(picture: Picture) => void} took
 */
async function take(file, took) {
  if (file === undefined) {
    say("Only picture files can be dropped here.");
    return;
  }
  try {
    took(await pictureFrom(file));
  } catch (error) {
    say(error instanceof BadPicture ? error.message : "That picture cannot be opened.");
  }
}

/** @param {(event: DragEvent) => void} dropped */
function acceptDrops(dropped) {
  const root = document.documentElement;
  let depth = 0; // dragenter and dragleave also come for everything inside.
  const show = () => root.classList.toggle("is-dropping", depth > 0);
  document.addEventListener("dragenter", (event) => {
    if (!isWanted(event)) return;
    depth += 1;
    show();
  });
  document.addEventListener("dragleave", (event) => {
    if (!isWanted(event)) return;
    depth = Math.max(0, depth - 1);
    show();
  });
  document.addEventListener("dragover", (event) => {
    if (!isWanted(event)) return;
    event.preventDefault();
    if (event.dataTransfer) event.dataTransfer.dropEffect = "copy";
  });
  document.addEventListener("drop", (event) => {
    depth = 0;
    show();
    if (!isWanted(event)) return;
    event.preventDefault();
    dropped(event);
  });
}

/** @param {DragEvent} event */
function isWanted(event) {
  const types = event.dataTransfer?.types ?? [];
  return types.includes("Files") || types.includes(PHOTO_TYPE);
}
